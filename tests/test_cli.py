"""The command ``samoyeds``: what each one prints, writes and returns, and what mistakes get."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import contents, edit_json, edit_tensors, files_in, save_dense
from checkpoints import convert as convert_directly
from command import STOPPED, Done, Run, in_subprocess, refusal
from tiny_models import MIXTRAL, PATTERN

import samoyeds_hf
from samoyeds_hf import SamoyedsConfig
from samoyeds_hf.cli_options import parse_size
from samoyeds_hf.convert import convert_checkpoint
from samoyeds_hf.errors import ConfigError
from samoyeds_hf.plan import plan_conversion
from samoyeds_hf.report import format_bytes
from samoyeds_hf.verify import check_checkpoint, export_dense

REPOSITORY = Path(__file__).parent.parent
RECIPES = REPOSITORY / "configs" / "recipes"
TASKS = REPOSITORY / "configs" / "eval"
TINY_MOE = REPOSITORY / "tests" / "assets" / "tiny-moe"
UP = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(MIXTRAL, tmp_path_factory.mktemp("dense") / "tiny-mixtral")


@pytest.fixture(scope="module")
def sparse(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sparse") / "converted"
    convert_directly(dense, directory)
    return directory


# --- the command line as such ----------------------------------------------------------------

COMMANDS = ("plan", "convert", "recover", "check", "report", "export-dense", "eval", "env", "demo")


def test_help_lists_every_command_in_whole_sentences(run: Run) -> None:
    done = run("--help")
    assert done.code == 0
    listed = done.out.split("Commands:")[1].strip().splitlines()
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, run: Run) -> None:
    done = run(command, "--help")
    assert done.code == 0
    assert f"Usage: samoyeds {command}" in done.out


def test_help_shows_patterns_and_defaults_as_they_are(run: Run) -> None:
    text = " ".join(run("convert", "--help").out.split())
    assert "N:M:V, or 2:4. [default: 1:2:64]" in text
    assert "[default: magnitude]" in text
    assert "SRC" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convrt"], "No such command 'convrt'"),
        (["plan"], "Missing argument 'SRC'"),
        (["convert", "somewhere"], "Missing argument 'DST'"),
        (["eval", "somewhere"], "Missing option '--tasks'"),
        (["plan", "x", "--patern", "2:4"], "No such option: --patern"),
        (["eval", "x", "--tasks", "y", "--limit", "z"], "Invalid value for '--limit'"),
        (["demo", "--tokens", "0"], "Invalid value for '--tokens'"),
    ],
)
def test_a_command_line_that_cannot_be_read(arguments: list[str], message: str, run: Run) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert message in done.err
    assert "samoyeds" in done.err  # where help is
    assert done.out == ""


def test_import_loads_neither_torch_nor_transformers() -> None:
    """``samoyeds --help`` answers at once."""
    code = "import sys, samoyeds_hf.cli; print({'torch', 'transformers'} & set(sys.modules))"
    assert in_subprocess("-c", code).out == "set()\n"


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("1.5 kb", 1500),
        ("2T", 2 * 10**12),
        ("77", 77),
        ("77B", 77),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "0", "0.1B", "-5GB", "5XB", "5GiB", "5 G B", "1e9"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="'5GB' or '500MB', found"):
        parse_size(text)


# --- plan ------------------------------------------------------------------------------------


def test_plan_prints_layers_totals_and_needs(run: Run, dense: Path, tmp_path: Path) -> None:
    expected = plan_conversion(dense, SamoyedsConfig(PATTERN), 5 * 10**9)
    done = run("plan", dense, "--pattern", PATTERN, "--dst", tmp_path / "new")
    assert done.code == 0, done.err
    head, *rows = (line.split() for line in done.out.splitlines())
    assert head == ["layer", "before", "after", "ratio"]
    assert {"model.layers.0", "model.layers.1", "other", "total"} <= {row[0] for row in rows}
    before = sum(size for _, _, size in stored_sizes(dense))
    assert expected.bytes_before == before
    ratio = f"{expected.bytes_after / before:.3f}"
    total = ["total", *format_bytes(before).split(), *format_bytes(expected.bytes_after).split()]
    assert [*total, ratio] in rows
    assert f"pattern {PATTERN}, method magnitude: 4 weights become sparse" in done.out
    assert f"peak memory {format_bytes(expected.peak_memory)}" in done.out
    assert f"disk need {format_bytes(expected.disk_need)}" in done.out
    assert not (tmp_path / "new").exists()


def stored_sizes(directory: Path) -> list[tuple[str, str, int]]:
    return [(name, dtype, len(data)) for name, (dtype, _, data) in contents(directory).items()]


def test_plan_is_what_convert_writes(run: Run, dense: Path, sparse: Path) -> None:
    out = run("plan", dense, "--pattern", PATTERN).out
    written = sum(file.stat().st_size for file in sparse.glob("*.safetensors"))
    assert f"disk need {format_bytes(written)}" in out


def test_plan_with_a_pattern_that_does_not_fit(run: Run, dense: Path) -> None:
    message = refusal(run("plan", dense, "--pattern", "1:2:48"))
    assert UP in message
    assert "found V=48 and 64; the V that divide 64 are [4, 8, 16, 32, 64]" in message


def test_plan_with_too_little_disk(
    run: Run, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    for arguments in (
        ("plan", dense, "--dst", tmp_path / "new"),
        ("convert", dense, tmp_path / "new"),
        ("convert", dense, tmp_path / "new", "--dry-run"),
    ):
        done = run(*arguments, "--pattern", PATTERN)
        # a plan is worth reading even if it does not fit here
        assert ("disk need" in done.out) == (arguments[0] == "plan" or "--dry-run" in arguments)
        message = refusal(done._replace(out=""))
        assert f"{tmp_path / 'new'} needs " in message
        assert "of disk, found 1.00 kB free; make room" in message
    assert list(tmp_path.iterdir()) == []


def test_plan_of_a_distillation(
    run: Run, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("plan", dense, "--pattern", PATTERN, "--recover", "distill")
    done = run(*options)
    assert done.code == 0, done.err
    (line,) = [text for text in done.out.splitlines() if text.startswith("distillation: about ")]
    assert "calibration:" not in done.out  # magnitude looks at no data
    assert line.endswith(" more of disk")
    assert "calibration: about " in run(*options, "--method", "wanda").out
    # room for the output, but not for what stands beside it meanwhile
    need = plan_conversion(dense, SamoyedsConfig(PATTERN), 5 * 10**9).disk_need
    full = type("Usage", (), {"free": need + 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    assert run("plan", dense, "--pattern", PATTERN).code == 0
    for arguments in (options, ("convert", dense, tmp_path / "new", *options[2:], "--dry-run")):
        more = ("--calibration", "python-stdlib")
        assert "of disk, found " in refusal(run(*arguments, *more)._replace(out=""))
    assert list(tmp_path.iterdir()) == []


def test_plan_of_a_sparse_source(run: Run, sparse: Path) -> None:
    message = refusal(run("plan", sparse))
    assert "must be dense, found one quantised with 'samoyeds'" in message
    assert "samoyeds export-dense" in message


def test_plan_of_another_quantisation(run: Run, dense: Path, tmp_path: Path) -> None:
    copy = save_dense(MIXTRAL, tmp_path / "gptq")
    edit_json(copy / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "found one quantised with 'gptq'" in refusal(run("plan", copy))


def test_plan_of_a_model_without_experts(run: Run, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 64)
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    assert "LlamaForCausalLM" in refusal(run("plan", tmp_path / "llama"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "model directory or a Hub id such as 'org/name', found no 'nowhere'"),
        ("./no/where", "found no './no/where'"),
        (TASKS, "needs a readable config.json, found none in"),
        (TINY_MOE / "config.json", "needs a readable config.json, found none in"),
        ("a" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "convert"])
def test_a_source_that_is_none(
    command: str, source: object, message: str, run: Run, tmp_path: Path
) -> None:
    arguments = [command, source] + ([tmp_path / "new"] if command == "convert" else [])
    done = run(*arguments)
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--pattern", "1-2-64", "written 'N:M:V' (for example '1:2:64') or '2:4', found '1-2-64'"),
        ("--pattern", "3:2:64", "needs 1 <= N <= M <= 16, found N=3, M=2"),
        ("--pattern", "1:2:6", "V must be a positive multiple of 4, found 6"),
        ("--method", "magnitud", "method must be one of ['admm', 'best', "),
        ("--shard-size", "5XB", "written like '5GB' or '500MB', found '5XB'"),
        ("--recipe", "qwen3", "'qwen3-30b-a3b'], found no 'qwen3'"),
        ("--recipe", TASKS, "'qwen3-30b-a3b'], found no "),
        ("--recipe", TINY_MOE / "model-00001-of-00002.safetensors", "must be a readable YAML file"),
    ],
)
def test_settings_that_are_wrong(
    option: str, value: object, message: str, run: Run, dense: Path, tmp_path: Path
) -> None:
    for command in (("plan", dense), ("convert", dense, tmp_path / "new")):
        assert message in refusal(run(*command, option, value))
    assert list(tmp_path.iterdir()) == []


# --- convert ---------------------------------------------------------------------------------


def test_convert(run: Run, dense: Path, sparse: Path, tmp_path: Path) -> None:
    done = run("convert", dense, tmp_path / "new", "--pattern", PATTERN)
    assert done.code == 0, done.err
    assert files_without_names(tmp_path / "new") == files_without_names(sparse)
    report = convert_checkpoint(dense, tmp_path / "again", SamoyedsConfig(PATTERN), progress=False)
    assert done.out == f"{report}\nwritten: {tmp_path / 'new'}\n"
    assert "converting: 100%" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "new"]


def files_without_names(directory: Path) -> dict[str, bytes]:
    """All files; a model card names its directory."""
    found = files_in(directory)
    assert found is not None
    name = directory.name.encode()
    return {k: v.replace(name, b"NAME") if k == "README.md" else v for k, v in found.items()}


def test_convert_with_a_recipe(run: Run, dense: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('pattern: "2:4"\noverrides: {".*layers\\\\.1\\\\..*": dense}\n')
    done = run("convert", dense, tmp_path / "own", "--recipe", recipe)
    assert done.code == 0, done.err
    convert_directly(dense, tmp_path / "expected", SamoyedsConfig.from_recipe(recipe))
    assert contents(tmp_path / "own") == contents(tmp_path / "expected")
    assert "left dense: model.layers.1.mlp.experts" in run("plan", dense, "--recipe", recipe).out


def test_a_bundled_recipe_wants_the_data_of_its_user(run: Run, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", ("--recipe", "deepseek-v2-lite")
    config = SamoyedsConfig.from_recipe(RECIPES / "deepseek-v2-lite.yaml")
    assert f"pattern {config.pattern}, method best" in run("plan", TINY_MOE, *recipe).out
    done = run("convert", TINY_MOE, out, *recipe)
    assert done.code == 1
    assert "needs calibration data" in done.err
    assert "--calibration" in done.err
    assert not out.exists()
    data = ("--calibration", "python-stdlib", "--samples", "1", "--sequence-length", "32")
    assert run("convert", TINY_MOE, out, *recipe, *data, "--dry-run").code == 0


@pytest.mark.parametrize("option", [("--pattern", "2:4"), ("--method", "magnitude")])
def test_a_recipe_beside_a_setting(
    option: tuple[str, str], run: Run, dense: Path, tmp_path: Path
) -> None:
    arguments = ("convert", dense, tmp_path / "new", "--recipe", "qwen3-30b-a3b", *option)
    message = refusal(run(*arguments))
    assert f"found both --recipe and {option[0]}; put the setting into the recipe" in message
    assert list(tmp_path.iterdir()) == []


def test_dry_run_writes_nothing(run: Run, dense: Path, tmp_path: Path) -> None:
    arguments = ("convert", dense, tmp_path / "new", "--pattern", PATTERN, "--dry-run")
    done = run(*arguments)
    assert done.code == 0
    assert done.out == run("plan", dense, "--pattern", PATTERN).out
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "thesis.tex").write_text("precious")
    assert "must be new, found" in refusal(run(*arguments))
    assert "--overwrite replaces checkpoints only" in refusal(run(*arguments, "--overwrite"))
    assert files_in(tmp_path) == {"new/thesis.tex": b"precious"}


def test_shard_size(run: Run, dense: Path, tmp_path: Path, sparse: Path) -> None:
    done = run("convert", dense, tmp_path / "new", "--pattern", PATTERN, "--shard-size", "100KB")
    assert done.code == 0, done.err
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    assert contents(tmp_path / "new") == contents(sparse)


def test_a_destination_that_exists(run: Run, dense: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    assert run("convert", dense, target, "--pattern", "2:4").code == 0
    before = files_in(target)
    message = refusal(run("convert", dense, target, "--pattern", PATTERN))
    assert f"must be new, found {target}; choose another one, or replace it with" in message
    assert files_in(target) == before
    assert run("convert", dense, target, "--pattern", PATTERN, "--overwrite").code == 0
    assert files_in(target) != before
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("place", ["/proc/new", "/dev/null/new", TINY_MOE / "config.json" / "new"])
def test_a_destination_that_cannot_be_written(place: object, run: Run, dense: Path) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    assert str(place) in refusal(run("convert", dense, place, "--pattern", PATTERN))


def test_a_failing_disk(
    run: Run, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", fail)
        done = run("convert", dense, tmp_path / "new", "--pattern", PATTERN)
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "found No space left on device; free space" in last
    done = run("convert", dense, tmp_path / "new", "--pattern", PATTERN, "--resume")
    assert done.code == 0, done.err


# NOTE: the signal comes from within, after the first of several shards: no race, no sleep.


def test_control_c_and_resume(run: Run, dense: Path, sparse: Path, tmp_path: Path) -> None:
    arguments = ("convert", dense, tmp_path / "new", "--pattern", PATTERN, "--shard-size", "100KB")
    done = in_subprocess("-c", STOPPED.format(signal="SIGINT"), *arguments)
    assert done.code == 130
    assert done.err.splitlines()[-1] == "stopped; the same command with --resume continues."
    assert "Traceback" not in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["new.partial"]
    half = files_in(tmp_path / "new.partial")
    assert len([name for name in half if name.endswith(".safetensors")]) == 1

    message = refusal(run(*arguments))
    assert "continue with --resume, or start again with --overwrite" in message
    other = (*arguments[:4], "2:4", *arguments[5:], "--resume")
    done = run(*other)
    assert done.code == 1
    assert "found another recipe" in done.err.splitlines()[-1]
    assert files_in(tmp_path / "new.partial") == half

    done = run(*arguments, "--resume")
    assert done.code == 0, done.err
    assert contents(tmp_path / "new") == contents(sparse)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_control_c_elsewhere_is_silent(
    run: Run, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("samoyeds_hf.plan.load_config", stop)
    assert run("plan", dense) == Done(130, "", "")


def test_resume_without_anything_to_resume(run: Run, dense: Path, tmp_path: Path) -> None:
    arguments = ("convert", dense, tmp_path / "new", "--pattern", PATTERN, "--resume")
    assert run(*arguments).code == 0
    assert "must be new, found" in refusal(run(*arguments))


# --- check and export-dense ------------------------------------------------------------------


def test_check(run: Run, dense: Path, sparse: Path) -> None:
    done = run("check", sparse)
    assert done.code == 0
    assert done.out == f"{check_checkpoint(sparse, progress=False)}\n"
    assert "4 sparse weights are valid" in done.out
    done = run("check", sparse, "--against", dense)
    assert done.code == 0
    assert done.out == f"{check_checkpoint(sparse, dense, progress=False)}\n"
    assert "rel. error" in done.out.splitlines()[0]
    assert done.out.endswith("and equal the source's.\n")


def test_check_against_another_source(run: Run, sparse: Path, tmp_path: Path) -> None:
    changed = save_dense(MIXTRAL, tmp_path / "changed")
    edit_tensors(changed, lambda tensors: tensors["model.norm.weight"].add_(1))
    done = run("check", sparse, "--against", changed)
    assert done.code == 1
    assert "1 of them differ from the source: model.norm.weight" in done.out
    assert "Traceback" not in done.err


@pytest.mark.parametrize("damage", ["index", "truncated", "gone"])
def test_check_of_a_damaged_checkpoint(damage: str, run: Run, dense: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    convert_directly(dense, broken)
    file = broken / "model.safetensors"
    if damage == "index":
        edit_tensors(broken, lambda tensors: tensors[f"{UP}_index"][0, 0].fill_(7))
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        file.unlink()
    done = run("check", broken)
    assert (done.code, done.out) == (1, "")
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    said = {"index": f"{UP}_index", "truncated": "whole safetensors", "gone": "needs model.safe"}
    assert said[damage] in last
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("directory", "message"),
    [
        ("nowhere", "needs a readable config.json, found none in nowhere"),
        (TINY_MOE, "has quant_method 'samoyeds' in its config.json, found None"),
    ],
)
def test_check_and_export_of_no_sparse_checkpoint(
    directory: object, message: str, run: Run, tmp_path: Path
) -> None:
    assert message in refusal(run("check", directory))
    assert message in refusal(run("export-dense", directory, tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_export_dense(run: Run, sparse: Path, tmp_path: Path) -> None:
    export_dense(sparse, tmp_path / "expected", progress=False)
    done = run("export-dense", sparse, tmp_path / "new")
    assert done.code == 0
    assert done.out == f"written: {tmp_path / 'new'}\n"
    assert contents(tmp_path / "new") == contents(tmp_path / "expected")
    assert "must be new" in refusal(run("export-dense", sparse, tmp_path / "new"))
    arguments = ("export-dense", sparse, tmp_path / "new", "--shard-size", "100KB", "--overwrite")
    assert run(*arguments).code == 0
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    assert contents(tmp_path / "new") == contents(tmp_path / "expected")
    assert "'5GB' or '500MB'" in refusal(
        run("export-dense", sparse, tmp_path / "other", "--shard-size", "big")
    )


# --- env and eval ----------------------------------------------------------------------------


def test_env(run: Run) -> None:
    done = run("env")
    assert (done.code, done.err) == (0, "")
    assert torch.__version__.split("+")[0] in done.out
    assert samoyeds_hf.__version__ in done.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dir": "nowhere"}, "got nowhere, which is missing"),
        ({"dir": TASKS}, "that transformers can open"),
        ({"--tasks": "python_cloz"}, "must be known to lm-eval, got python_cloz"),
        ({"--tasks": " , "}, "at least one task"),
        ({"--against": "nowhere"}, "got nowhere, which is missing"),
        ({"--include-path": "nowhere"}, "--include-path must be a directory"),
        ({"--limit": 0}, "limit must be a whole number"),
        ({"--batch-size": "large"}, "batch_size must be a whole number"),
        ({"--batch-size": "0"}, "batch_size must be a whole number"),
        ({"--num-fewshot": -1}, "num_fewshot must be"),
        ({"--dtype": "int8"}, "dtype must be one of"),
        ({"--device": "gpu"}, "device must be one of"),
        ({"--output": TASKS}, "--output must be a file in an existing directory"),
    ],
)
def test_eval_refuses(
    change: dict[str, object], message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs the extra eval")
    local = tasks.TaskManager(include_path=str(TASKS), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: local)  # seconds less
    given = {"dir": TINY_MOE, "--tasks": "python_cloze", "--include-path": TASKS, **change}
    directory = given.pop("dir")
    done = run("eval", directory, *(part for option in given.items() for part in option))
    assert (done.code, done.out) == (1, "")
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_eval_without_the_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = run("eval", TINY_MOE, "--tasks", "python_cloze")
    assert done.code == 1
    assert "pip install 'samoyeds-hf[eval]'" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nowhere"), "found no 'nowhere'; check the path."),
        (("--model", TASKS), "needs a readable config.json"),
        (("--pattern", "1-2-64"), "found '1-2-64'."),
        (("--pattern", "1:2:96"), "the V that divide 256 are"),
    ],
)
def test_demo_refuses(arguments: tuple[object, ...], message: str, run: Run) -> None:
    done = run("demo", *arguments)
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "converted" not in done.out  # before any work


# --- the same from outside -------------------------------------------------------------------


def test_conversion_script_is_the_command(
    run: Run, dense: Path, sparse: Path, tmp_path: Path
) -> None:
    script = REPOSITORY / "scripts" / "convert_checkpoint.py"
    done = in_subprocess(script, dense, tmp_path / "new", "--pattern", PATTERN)
    assert done.code == 0, done.err
    assert files_without_names(tmp_path / "new") == files_without_names(sparse)
    assert refusal(in_subprocess(script, "nowhere", "new", cwd=tmp_path)) == refusal(
        run("convert", "nowhere", "new")
    )


def test_evaluation_script_is_the_command(run: Run) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    script = REPOSITORY / "scripts" / "run_lm_eval.py"
    arguments = ("nowhere", "--tasks", "python_cloze")
    done, same = in_subprocess(script, *arguments), run("eval", *arguments)
    assert (done.code, done.out) == (same.code, same.out) == (1, "")
    assert done.err == same.err


def test_a_reader_that_leaves_early(dense: Path) -> None:
    """``samoyeds plan ... | head -0``: no traceback."""
    process = subprocess.Popen(
        [sys.executable, "-m", "samoyeds_hf.cli", "plan", dense, "--pattern", PATTERN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait()
    process.stderr.close()
