"""Evaluation: offline runs, the same numbers as the lm_eval command, and errors."""

import json
import os
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

import samoyeds_hf
from samoyeds_hf.errors import EvaluationError
from samoyeds_hf.eval_report import EvalReport, rows_from_results

pytest.importorskip("lm_eval", reason="needs the extra eval")
import lm_eval.tasks
from lm_eval.tasks import TaskManager

from samoyeds_hf.evaluate import evaluate, run

REPOSITORY = Path(__file__).parent.parent
TASKS = REPOSITORY / "configs" / "eval"
TRAINED_MODEL = REPOSITORY / "tests" / "assets" / "tiny-moe"
PATTERN = "1:2:32"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a local evaluation reached for the network: {args[:2]}")

    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory):
    """The trained model of the repository, or else an untrained one of the same class."""
    if (TRAINED_MODEL / "config.json").is_file():
        return TRAINED_MODEL
    directory = tmp_path_factory.mktemp("dense")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def add(a, b):\n    return a + b\n"] * 2, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(
        directory
    )
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
    )
    MixtralForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def sparse_dir(dense_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sparse")
    model = AutoModelForCausalLM.from_pretrained(dense_dir)
    samoyeds_hf.patch_model(model, pattern=PATTERN)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(dense_dir).save_pretrained(directory)
    return directory


@pytest.fixture
def small_index(monkeypatch, some_tasks):
    """A small index in place of all of lm-eval's tasks, which take seconds to read."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: some_tasks)


@pytest.fixture(scope="module")
def some_tasks():
    names = ("arc", "hellaswag", "lambada", "mmlu", "openbookqa", "piqa", "super_glue")
    harness = Path(lm_eval.tasks.__file__).parent
    folders = [harness / name for name in (*names, "wikitext", "winogrande")]
    return TaskManager(include_path=[*folders, TASKS], include_defaults=False)


def test_suites_name_tasks_that_exist(some_tasks):
    for suite in ("samoyeds_quick", "samoyeds_full"):
        members = some_tasks.task_index[suite].cfg["task"]
        assert set(members) <= set(some_tasks.all_tasks)


# --- runs


@pytest.mark.filterwarnings("error:You passed")
def test_sparse_beside_dense(sparse_dir, dense_dir, tmp_path, capsys):
    output = tmp_path / "report.json"
    result = run(
        sparse_dir,
        "python_cloze, python_perplexity",
        output=output,
        against=dense_dir,
        include_path=TASKS,
        limit=8,
        device="cpu",
        dtype="float32",
    )
    captured = capsys.readouterr()
    assert captured.out == f"{result}\n"  # progress is not on stdout
    assert EvalReport.from_json(output.read_text(encoding="utf-8")) == result
    assert (result.pattern, result.dtype, result.against_dtype) == (PATTERN, "float32", "float32")
    assert set(result.versions) == {"torch", "transformers", "lm_eval", "samoyeds_hf"}
    assert [(r.task, r.metric, r.higher_is_better, r.num_samples) for r in result.rows] == [
        ("python_cloze", "acc", True, 8),
        ("python_cloze", "acc_norm", True, 8),
        ("python_perplexity", "byte_perplexity", False, 8),
        ("python_perplexity", "bits_per_byte", False, 8),
    ]
    perplexity = result.rows[2]
    assert perplexity.sparse != perplexity.dense  # two different models were measured
    assert perplexity.recovery == pytest.approx(100 * perplexity.dense / perplexity.sparse)


def test_a_model_recovers_itself(dense_dir, small_index):
    result = evaluate(
        dense_dir, ["python_*"], against=dense_dir, limit=3, num_fewshot=1, device="cpu", seed=7
    )
    assert result.pattern is None
    assert {r.task for r in result.rows} == {"python_cloze", "python_perplexity"}
    for r in result.rows:
        assert r.sparse == r.dense
        assert r.recovery == (pytest.approx(100.0) if r.dense else None)


def test_one_model_alone_from_another_directory(dense_dir, tmp_path, monkeypatch):
    """Data beside the task yaml is found from anywhere, and no cache is written."""
    monkeypatch.chdir(tmp_path)
    include_path = os.path.relpath(TASKS)
    result = evaluate(
        os.path.relpath(dense_dir), "python_cloze", include_path=include_path, limit=2, device="cpu"
    )
    assert [r.dense for r in result.rows] == [None, None]
    assert list(tmp_path.iterdir()) == []


def is_installed():
    try:
        metadata.distribution("samoyeds-hf")
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(not is_installed(), reason="autoload needs the installed package")
def test_the_unmodified_lm_eval_command_gives_the_same_numbers(sparse_dir, tmp_path):
    settings = {"num_fewshot": 2, "limit": 12, "device": "cpu"}
    ours = evaluate(sparse_dir, "python_cloze", include_path=TASKS, **settings)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "python_cloze"]
    command += ["--model_args", f"pretrained={sparse_dir}", "--include_path", str(TASKS)]
    command += ["--output_path", "results"]
    command += [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("results/**/results_*.json")
    theirs = json.loads(written.read_text(encoding="utf-8"))
    assert {(r.metric, r.sparse, r.sparse_stderr) for r in ours.rows} == {
        (r.metric, r.sparse, r.sparse_stderr) for r in rows_from_results(theirs)
    }


def test_the_command_and_the_script_share_run(dense_dir, monkeypatch, capsys):
    cli = pytest.importorskip("samoyeds_hf.cli")
    from typer.testing import CliRunner

    arguments = [str(dense_dir), "--tasks", "python_cloze", "--include-path", str(TASKS)]
    done = CliRunner().invoke(cli.app, ["eval", *arguments, "--limit", "2"])
    assert done.exit_code == 0, done.output
    assert "acc_norm" in done.stdout

    monkeypatch.setattr("sys.argv", ["run_lm_eval.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "scripts" / "run_lm_eval.py"), run_name="__main__")
    assert stop.value.code == 0
    assert "--against" in capsys.readouterr().out


# --- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0.5}, "limit must be a whole number of samples a task, 1 or more, got 0.5"),
        ({"limit": 0}, "limit must be"),
        ({"limit": -1}, "limit must be"),
        ({"limit": True}, "limit must be"),
        ({"num_fewshot": -1}, "num_fewshot must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": "large"}, "batch_size must be"),
        ({"dtype": "int8"}, "dtype must be one of auto, bfloat16, .* got 'int8'"),
        ({"device": "gpu"}, "device must be one of cpu.* got 'gpu'"),
        ({"device": "cuda:99"}, "got 'cuda:99'"),
        ({"include_path": "nowhere"}, "--include-path must be a directory .* got nowhere"),
        ({"tasks": " , "}, "tasks must name at least one"),
        ({"model_dir": "nowhere"}, "a model must be a directory .* got nowhere, which is missing"),
        ({"against": "no/where"}, "got no/where, which is missing: .*hf download"),
        ({"model_dir": __file__}, "which is not a directory"),
        ({"model_dir": TASKS}, "that transformers can open, got .*eval"),
    ],
)
def test_wrong_settings_are_refused_before_weights_are_read(settings, message, dense_dir):
    given = {"model_dir": dense_dir, "tasks": "python_cloze", "include_path": TASKS} | settings
    with pytest.raises(EvaluationError, match=message):
        evaluate(given.pop("model_dir"), given.pop("tasks"), **given)


def test_unknown_tasks_are_named(dense_dir, small_index):
    with pytest.raises(EvaluationError, match=r"got no_such_task, nope: .* --include-path adds"):
        evaluate(dense_dir, "no_such_task,python_cloze,nope", include_path=TASKS)


def test_tasks_without_their_data_are_named(dense_dir, tmp_path):
    for name in ("local_task.py", "python_cloze.yaml"):
        (tmp_path / name).write_bytes((TASKS / name).read_bytes())
    with pytest.raises(EvaluationError, match=r"got python_cloze: .*python_cloze\.jsonl"):
        evaluate(dense_dir, "python_cloze", include_path=tmp_path)


def test_tasks_that_execute_code_are_left_to_lm_eval(dense_dir, tmp_path):
    for path in TASKS.glob("*cloze*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "local_task.py").write_bytes((TASKS / "local_task.py").read_bytes())
    with (tmp_path / "python_cloze.yaml").open("a") as yaml:
        yaml.write("unsafe_code: true\n")
    with pytest.raises(EvaluationError, match=r"got python_cloze: run them in a sandbox"):
        evaluate(dense_dir, "python_cloze", include_path=tmp_path)


def test_a_directory_without_weights_is_refused(dense_dir, tmp_path):
    for path in dense_dir.iterdir():
        if path.is_file() and "safetensors" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(EvaluationError, match="a model must load with its tokenizer"):
        evaluate(tmp_path, "python_cloze", include_path=TASKS, device="cpu")


def test_without_lm_eval_the_extra_is_named(dense_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"pip install 'samoyeds-hf\[eval\]'"):
        evaluate(dense_dir, "python_cloze")


def test_an_old_lm_eval_is_refused(dense_dir, monkeypatch):
    monkeypatch.setattr("samoyeds_hf.evaluate.metadata.version", lambda _: "0.4.9.1")
    with pytest.raises(EvaluationError, match=r"lm-eval >= 0\.4\.13, found 0\.4\.9\.1"):
        evaluate(dense_dir, "python_cloze")


def test_a_launcher_with_several_processes_is_refused(dense_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EvaluationError, match="one process"):
        evaluate(dense_dir, "python_cloze")


def test_output_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    for output in (tmp_path, tmp_path / "missing" / "report.json"):
        with pytest.raises(EvaluationError, match="--output must be a file"):
            run("unused", "python_cloze", output=output)
