"""Recovery of sparse checkpoints on disk: what is written, killed and resumed, refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from calibrated import letters_tokenizer, save_source, tokens_of, write_text
from checkpoints import SINGLE, contents, convert, files_in, headers, load_as_auto, refused
from safetensors.torch import load_file, save_file
from tiny_models import BY_NAME, MIXTRAL, PATTERN, Family, logits
from transformers import AutoModelForCausalLM, PreTrainedModel

from samoyeds_hf import SamoyedsConfig, patch_model, unpatch_model
from samoyeds_hf import recovery as module
from samoyeds_hf.cli_recover import recover
from samoyeds_hf.errors import (
    CalibrationError,
    CheckpointError,
    SamoyedsError,
    UnsupportedModelError,
)
from samoyeds_hf.pruning.calibration import Calibration
from samoyeds_hf.pruning.distill import distill
from samoyeds_hf.pruning.distill_settings import DistillSettings
from samoyeds_hf.pruning.masks import kept_masks
from samoyeds_hf.recovery import LOG_FILE, recover_checkpoint
from samoyeds_hf.report_files import read_report
from samoyeds_hf.verify import check_checkpoint

BOTH = SamoyedsConfig(PATTERN, modules=("experts", "shared_experts"))
FAST = DistillSettings(steps=4, batch_size=4, learning_rate=1e-3, train="experts")


# --- checkpoints --------------------------------------------------------------------------------


class Case:
    """A dense checkpoint with a tokenizer, what convert makes of it, and a text."""

    def __init__(
        self, folder: Path, family: Family = MIXTRAL, config: SamoyedsConfig = BOTH
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.dense = save_source(family, folder / "dense", max_shard_size="100KB")
        self.sparse = folder / "sparse"
        convert(self.dense, self.sparse, config, shard_size=100_000)
        self.text = write_text(folder / "letters.txt")
        self.calibration = Calibration(str(self.text), samples=10, sequence_length=12)

    def recover(self, name: str = "out", settings: DistillSettings = FAST, **given: Any) -> Path:
        out = self.folder / name
        arguments = {"progress": False, "device": "cpu", **given}
        calibration = arguments.pop("calibration", self.calibration)
        sparse, dense = arguments.pop("sparse", self.sparse), arguments.pop("dense", self.dense)
        recover_checkpoint(sparse, dense, out, calibration, settings, **arguments)
        return out


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Nobody changes it."""
    return Case(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def recovered(case: Case) -> Path:
    return case.recover("recovered")


def load_as_fp32(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_a_recovered_checkpoint_is_one_like_the_sparse_one(case: Case, recovered: Path) -> None:
    """Same files and tensors; only values differ, and these are what distill makes."""
    student, teacher = (load_as_fp32(path) for path in (case.sparse, case.dense))
    masks = kept_masks(student)
    unpatch_model(student)
    distill(student, teacher, tokens_of(case.text), masks, FAST)
    loaded = load_as_auto(recovered)
    assert all(torch.equal(mask, masks[name]) for name, mask in kept_masks(loaded).items())
    unpatch_model(loaded)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, student.get_parameter(name).bfloat16()), name
    old, new = contents(case.sparse), contents(recovered)
    changed = {name for name in old if old[name] != new[name]}
    assert old.keys() == new.keys()
    assert changed == set(masks)
    shards = {path.name for path in recovered.glob("*.safetensors*")}
    assert shards == {path.name for path in case.sparse.glob("*.safetensors*")}
    assert len(shards) > 2


def test_it_loads_checks_and_says_what_it_is(case: Case, recovered: Path) -> None:
    report = check_checkpoint(recovered, case.dense, progress=False)
    assert report.changed == ()
    errors = {name: error for name, _, _, error in report.rows}
    assert {w.name: w.error for w in read_report(recovered).weights} == pytest.approx(errors)
    config = json.loads((recovered / "config.json").read_text())
    old = json.loads((case.sparse / "config.json").read_text())
    assert config["quantization_config"].pop("recover") == "distill"
    assert old["quantization_config"].pop("recover", None) is None
    assert config == old
    found = json.loads((recovered / "samoyeds_report.json").read_text())
    assert found["recover"] == "distill"
    assert found["distillation"]["settings"]["steps"] == FAST.steps
    assert found["distillation"]["calibration"]["data"] == "letters.txt"
    card = (recovered / "README.md").read_text()
    assert "# recovered, made sparse" in card
    assert found["distillation"]["calibration"]["sha256"] in card
    assert "distilled from the dense model" in card
    rows = (recovered / LOG_FILE).read_text().splitlines()
    assert rows[0] == "step,loss,hidden_error,learning_rate,gradient_norm,seconds"
    assert len(rows) == 1 + FAST.steps
    assert not {"distillation.pt", "conversion.json", ".lock"} & set(files_in(recovered) or {})
    assert str(case.folder) not in (card + json.dumps(found))
    assert (recovered / "tokenizer.json").read_bytes() == (
        case.dense / "tokenizer.json"
    ).read_bytes()


def test_report_and_card_name_the_rate_that_it_was_lowered_to(case: Case) -> None:
    out = case.recover("lowered", DistillSettings(steps=9, batch_size=4, learning_rate=0.5))
    found = json.loads((out / "samoyeds_report.json").read_text())["distillation"]
    asked, used = found["settings"]["learning_rate"], found["result"]["learning_rate"]
    assert used in [asked / 4, asked / 16, asked / 64, asked / 256]
    assert f"learning rate 0.5 -> {used:g}, temperature" in (out / "README.md").read_text()
    rates = [float(row.split(",")[3]) for row in (out / LOG_FILE).read_text().splitlines()[1:]]
    assert max(rates[:2]) > asked / 2
    assert max(rates[-2:]) < used


def test_it_can_be_recovered_again(case: Case, recovered: Path) -> None:
    again = case.recover("again", sparse=recovered)
    assert check_checkpoint(again, progress=False)
    card = (again / "README.md").read_text()
    assert card.count("## How it was distilled") == 1
    assert card.count("## How it was pruned") == 1
    assert len((again / LOG_FILE).read_text().splitlines()) == 1 + FAST.steps


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_families(tmp_path: Path, name: str) -> None:
    """Shared experts are Linears; DeepSeek keeps its router's bias in fp32."""
    case = Case(tmp_path, BY_NAME[name])
    out = case.recover(
        settings=DistillSettings(steps=10, batch_size=10, held_back=0.0, train="experts")
    )
    report = json.loads((out / "samoyeds_report.json").read_text())["distillation"]["result"]
    assert report["last"] < report["first"]
    assert check_checkpoint(out, case.dense, progress=False).changed == ()
    loaded = load_as_auto(out)
    old, new = contents(case.sparse), contents(out)
    assert {n for n in old if old[n] != new[n]} == set(kept_masks(loaded))
    assert bool(logits(loaded).isfinite().all())


@pytest.mark.parametrize("stored_twice", [False, True])
def test_training_all_weights(tmp_path: Path, stored_twice: bool) -> None:
    """Tied embeddings stay tied, also where a checkpoint holds both names."""
    settings = {**MIXTRAL.settings, "tie_word_embeddings": True}
    case = Case(tmp_path, Family("tied", "Mixtral", settings))
    if stored_twice:
        store_head(case.sparse)
    out = case.recover(settings=DistillSettings(steps=4, batch_size=4, train="all"))
    model = load_as_auto(out)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    old, new = contents(case.sparse), contents(out)
    assert old.keys() == new.keys()
    same = {name for name in old if old[name] == new[name]}
    # Norms near 1 move by less than bf16 can tell.
    assert {name for name in same if "norm" not in name} == {
        name for name in old if name.endswith(("_meta", "_index"))
    }
    if stored_twice:
        assert new["lm_head.weight"] == new["model.embed_tokens.weight"]
    report = check_checkpoint(out, case.dense, progress=False)
    assert report.changed == ()
    assert report.trained > 0
    assert f"{report.trained} of them trained" in str(report)
    (out / "samoyeds_report.json").write_text("{")
    refused(
        CheckpointError,
        "samoyeds_report.json",
        call=lambda: check_checkpoint(out, case.dense, progress=False),
    )


def test_training_all_weights_leaves_buffers(tmp_path: Path) -> None:
    """A buffer that differs from the source is damage, whatever was trained."""
    case = Case(tmp_path, BY_NAME["deepseek_v3"])
    out = case.recover(settings=DistillSettings(steps=4, batch_size=4, held_back=0.0))
    assert check_checkpoint(out, case.dense, progress=False).changed == ()
    file = next(f for f in out.glob("*.safetensors") if any(map(is_bias, load_file(f))))
    held = load_file(file)
    (name, *_) = filter(is_bias, held)
    held[name] += 1
    save_file(held, file, metadata={"format": "pt"})
    assert check_checkpoint(out, case.dense, progress=False).changed == (name,)


def is_bias(name: str) -> bool:
    return name.endswith("e_score_correction_bias")


def store_head(directory: Path) -> None:
    """Put the tied head into the checkpoint once more, under its own name."""
    index = json.loads((directory / f"{SINGLE}.index.json").read_text())
    file = directory / index["weight_map"]["model.embed_tokens.weight"]
    held = load_file(file)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, file, metadata={"format": "pt"})
    index["weight_map"]["lm_head.weight"] = file.name
    (directory / f"{SINGLE}.index.json").write_text(json.dumps(index))


def test_a_model_that_was_patched_and_saved(case: Case) -> None:
    """Without report and card, in one file."""
    model = load_as_auto(case.dense)
    patch_model(model, config=BOTH)
    saved = case.folder / "saved"
    model.save_pretrained(saved)
    letters_tokenizer().save_pretrained(saved)
    out = case.recover("from-saved", sparse=saved)
    assert check_checkpoint(out, case.dense, progress=False).changed == ()
    assert len(read_report(out).weights) == 4
    assert (out / "README.md").read_text().startswith("## How it was pruned")


# --- killed, refused ----------------------------------------------------------------------------


def without_times(directory: Path) -> dict[str, bytes]:
    """All files, but for the seconds that a run took."""
    files = files_in(directory) or {}
    report = json.loads(files.pop("samoyeds_report.json"))
    report["distillation"]["result"].pop("seconds")
    rows = [line.rsplit(",", 1)[0] for line in files.pop(LOG_FILE).decode().splitlines()]
    return {**files, "report": json.dumps(report).encode(), "log": "\n".join(rows).encode()}


def run_and_die(call: Callable[[], object], at: int) -> bool:
    """Run in a child that is killed when it is about to rename or delete for the ``at``-th time."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    passed = [0]

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            if passed[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            passed[0] += 1
            return function(*args, **settings)

        return call

    for name in ("replace", "rename", "unlink"):
        setattr(os, name, dying(getattr(os, name)))
    try:
        call()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@pytest.mark.slow
def test_killed_anywhere_then_resumed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers loads in threads, which torch does not always bear after a fork
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    settings = DistillSettings(steps=2, batch_size=4)
    finished = without_times(case.recover("whole/out", settings))
    number, endings = 0, set()
    while True:
        name = f"killed-{number}/out"
        killed = run_and_die(lambda name=name: case.recover(name, settings, save_minutes=0), number)
        out = case.folder / name
        if not out.exists():
            assert killed
            case.recover(name, settings, resume=True)
            endings.add("resumed")
        found = without_times(out)
        working = {"conversion.json", ".lock"}
        assert {key: value for key, value in found.items() if key not in working} == finished
        assert {path.name for path in out.parent.iterdir()} == {"out"}
        number += 1
        if not killed:
            break
    assert number > 10
    assert endings == {"resumed"}


@pytest.fixture
def stopped(case: Case, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a run that was interrupted in its third step."""
    folder = case.folder / "stopped.partial"
    shutil.rmtree(folder, ignore_errors=True)

    class Interrupting(module.CsvLog):
        def __call__(self, row: Mapping[str, float]) -> None:
            super().__call__(row)
            if row["step"] == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "CsvLog", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            case.recover("stopped", save_minutes=0)
    assert (folder / "distillation.pt").exists()
    return folder


def test_an_interrupted_run_continues_where_it_was(
    case: Case, stopped: Path, recovered: Path
) -> None:
    out = case.recover("stopped", resume=True)
    old, new = contents(recovered), contents(out)
    assert old == new
    shutil.rmtree(out)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"settings": DistillSettings(steps=5, batch_size=4)}, "training"),
        ({"calibration": "seed"}, "calibration"),
        ({"dense": "touched"}, "dense checkpoint"),
        ({"sparse": "recovered"}, "sparse checkpoint"),
    ],
)
def test_another_run_is_not_continued(
    case: Case, stopped: Path, recovered: Path, given: dict[str, Any], what: str
) -> None:
    given = dict(given)
    if "calibration" in given:
        given["calibration"] = Calibration(str(case.text), 10, 12, seed=1)
    if "dense" in given:
        given["dense"] = case.folder / "touched"
        shutil.copytree(case.dense, given["dense"])
        os.utime(given["dense"] / "config.json")
    if "sparse" in given:
        given["sparse"] = recovered
    refused(
        CheckpointError,
        f"found another {what}",
        call=lambda: case.recover("stopped", resume=True, **given),
        kept=stopped,
    )
    refused(CheckpointError, "--resume", call=lambda: case.recover("stopped"), kept=stopped)


def test_a_damaged_note_of_the_work(case: Case, stopped: Path) -> None:
    (stopped / "conversion.json").write_text("{}")
    call = lambda: case.recover("stopped", resume=True)  # noqa: E731
    refused(CheckpointError, "conversion.json", "unreadable", call=call, kept=stopped)


def test_what_exists_is_replaced_only_when_asked(case: Case, recovered: Path) -> None:
    refused(CheckpointError, "--overwrite", call=lambda: case.recover("recovered"), kept=recovered)
    shutil.copytree(recovered, case.folder / "replaced-one")
    out = case.recover("replaced-one", DistillSettings(steps=1), overwrite=True)
    assert len((out / LOG_FILE).read_text().splitlines()) == 2


def test_checkpoints_that_cannot_be_recovered(case: Case, tmp_path: Path) -> None:
    other = Case(tmp_path, BY_NAME["olmoe"], SamoyedsConfig(PATTERN))

    def attempt(**given: Any) -> Callable[[], object]:
        return lambda: case.recover("refused", **given)

    refused(CheckpointError, "--against", call=attempt(dense=other.dense), kept=case.folder)
    refused(CheckpointError, "samoyeds", call=attempt(sparse=case.dense), kept=case.folder)
    refused(CheckpointError, "must be dense", call=attempt(dense=case.sparse), kept=case.folder)
    refused(CheckpointError, "nowhere", call=attempt(sparse=tmp_path / "nowhere"))
    short = Calibration(str(case.text), samples=1000, sequence_length=12)
    refused(CalibrationError, "tokens", call=attempt(calibration=short), kept=case.folder)
    refused(CalibrationError, "device", call=attempt(device="abacus"), kept=case.folder)
    refused(CalibrationError, "one GPU", "cpu", call=attempt(cuda_graph=True), kept=case.folder)
    bare = tmp_path / "bare"
    shutil.copytree(case.sparse, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    refused(CalibrationError, "tokenizer", call=attempt(sparse=bare), kept=case.folder)


def test_all_weights_of_a_checkpoint_in_parts(tmp_path: Path) -> None:
    """A dense expert layer stored an expert at a time cannot be written back as it was."""
    config = SamoyedsConfig(PATTERN, overrides={r"model\.layers\.1\.mlp\.experts": "dense"})
    case = Case(tmp_path, config=config)
    split_experts(case.sparse)
    refused(
        UnsupportedModelError,
        "model.layers.1.mlp.experts",
        "train='experts'",
        call=lambda: case.recover(settings=DistillSettings(train="all")),
    )
    out = case.recover()
    assert check_checkpoint(out, case.dense, progress=False).changed == ()


def split_experts(directory: Path) -> None:
    """Store the dense experts of the second layer as Mixtral checkpoints of the Hub do."""
    held = {}
    for file in sorted(directory.glob("*.safetensors")):
        held.update(load_file(file))
        file.unlink()
    (directory / f"{SINGLE}.index.json").unlink()
    up, down = (held.pop(f"model.layers.1.mlp.experts.{n}_proj") for n in ("gate_up", "down"))
    for expert, (gate_up, down_one) in enumerate(zip(up, down, strict=True)):
        path = f"model.layers.1.block_sparse_moe.experts.{expert}"
        gate, up_one = gate_up.chunk(2)
        for name, tensor in (("w1", gate), ("w3", up_one), ("w2", down_one)):
            held[f"{path}.{name}.weight"] = tensor.clone()
    save_file(held, directory / SINGLE, metadata={"format": "pt"})


def test_the_help_names_the_defaults() -> None:
    defaults = DistillSettings()
    names = ("steps", "batch_size", "learning_rate", "temperature", "hidden_weight", "held_back")
    hints = get_type_hints(recover, include_extras=True)
    for name in (*names, "train"):
        (option,) = hints[name].__metadata__
        assert option.help.endswith(f"[default: {getattr(defaults, name)}]"), name
    assert defaults.backtrack
    assert hints["backtrack"].__metadata__[0].help.endswith("[default: backtrack]")


def test_the_command_asks_for_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[bool] = []

    def take(*_: Any, cuda_graph: bool, **given: Any) -> None:
        said.append(cuda_graph)

    monkeypatch.setattr("samoyeds_hf.recovery.recover_checkpoint", take)
    for given in ({}, {"cuda_graph": True}):
        recover(Path("sparse"), Path("out"), against="dense", calibration="text", **given)
    assert said == [False, True]


def test_the_script(case: Case) -> None:
    out = case.folder / "by-script"
    script = Path(__file__).parents[1] / "scripts" / "recover_checkpoint.py"
    options = {
        "against": case.dense,
        "calibration": case.text,
        "samples": 10,
        "sequence-length": 12,
        "steps": 4,
        "batch-size": 4,
        "learning-rate": 1e-3,
        "held-back": DistillSettings().held_back,
        "train": FAST.train,
        "device": "cpu",
    }
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, str(script), str(case.sparse), str(out), *given, "--no-backtrack"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "KL to the dense model" in done.stdout
    assert f"written: {out}" in done.stdout
    settings = replace(FAST, backtrack=False)
    assert contents(out) == contents(case.recover("by-call", settings))
    found = json.loads((out / "samoyeds_report.json").read_text())["distillation"]
    assert found["settings"] == asdict(settings)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith("error: The destination must be new")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.layers.0.mlp.experts.down_proj_index", "below M=2"),
        ("model.layers.0.mlp.gate.weight", "shape"),
    ],
)
def test_a_damaged_sparse_checkpoint(tmp_path: Path, name: str, what: str) -> None:
    case = Case(tmp_path)
    file = headers(case.sparse)[name].file
    held = load_file(file)
    held[name] = held[name][:1].clone() if name.endswith("weight") else held[name].fill_(7)
    save_file(held, file, metadata={"format": "pt"})
    message = refused(SamoyedsError, name, what, call=case.recover)
    assert "convert the model again" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_on_a_gpu(tmp_path: Path, name: str) -> None:
    """In bf16, with fp32 masters; few tokens, so that some experts get none."""
    case = Case(tmp_path, BY_NAME[name])
    # Nothing is held back: of so short a text it would say that the rate is too high.
    settings = DistillSettings(
        steps=30, batch_size=2, learning_rate=3e-4, train="experts", held_back=0.0
    )
    out = case.recover(settings=settings, device="cuda")
    result = json.loads((out / "samoyeds_report.json").read_text())["distillation"]["result"]
    assert result["last"] < result["first"]
    assert check_checkpoint(out, case.dense, progress=False).changed == ()
    old, new = contents(case.sparse), contents(out)
    changed = {tensor for tensor in old if old[tensor] != new[tensor]}
    assert changed == set(kept_masks(load_as_auto(out)))
