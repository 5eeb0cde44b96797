"""A calibrated conversion that was killed, anywhere, and is resumed: as if nothing had happened."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_convert_failures as failures
import torch
from calibrated import LENGTH, SAMPLES, SHARD_SIZE, calibrated
from checkpoints import SINGLE, convert, files_in, headers, refused
from safetensors.torch import load_file, save_file
from tiny_models import PATTERN

from samoyeds_hf import SamoyedsConfig, convert_layers
from samoyeds_hf.conversion_state import ConversionState
from samoyeds_hf.convert_layers import read_calibration
from samoyeds_hf.errors import CheckpointError

pytest_plugins = ("layerwise",)
pytestmark = pytest.mark.usefixtures("still")

WORKING = {"conversion.json", ".lock"}


@pytest.mark.slow
def test_killed_anywhere_then_resumed(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every fsync, rename and unlink; the whole directory is then as if nothing happened."""
    monkeypatch.setattr(failures, "EVENTS", ("fsync", "replace", "rename", "unlink"))
    config = calibrated(text)
    data = read_calibration(config, source)
    monkeypatch.setattr(convert_layers, "read_calibration", lambda *_: data)  # it takes long
    convert(source, tmp_path / "whole" / "out", config)
    expected = files_in(tmp_path / "whole" / "out")
    endings, hidden = set(), set()

    def attempt(number: int) -> bool:
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        killed = failures.run_and_die(lambda: convert(source, out, config), number)
        hidden.update(path.name for path in out.with_name("out.partial").glob("hidden*"))
        if not out.exists():
            convert(source, out, config, resume=True)
            endings.add("resumed")
        elif killed:
            endings.add("complete")  # killed after it got its name
        found = files_in(out) or {}
        assert {name: found[name] for name in set(found) - WORKING} == expected
        assert {path.name for path in out.parent.iterdir()} == {"out"}
        shutil.rmtree(out.parent)
        return killed

    assert failures.points(attempt) > 45
    assert endings == {"resumed", "complete"}
    assert {"hidden-before-00001.bin", "hidden-before-00002.bin.tmp"} <= hidden


def stop_after(layers: int, call: Callable[[], object]) -> None:
    """Run ``call`` until some layers are noted as done, then press Ctrl-C."""
    left, finish = [layers], ConversionState.finish

    def counting(self: ConversionState, *arguments: Any) -> None:
        finish(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as context:
        context.setattr(ConversionState, "finish", counting)
        with pytest.raises(KeyboardInterrupt):
            call()


@pytest.fixture
def interrupted(own: Path, text: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A copy of the source, its text, and a destination with two of three layers done."""
    mine = Path(shutil.copy(text, tmp_path / text.name))
    out = tmp_path / "out"
    stop_after(2, lambda: convert(own, out, calibrated(mine), shard_size=SHARD_SIZE))
    assert not out.exists()
    partial = out.with_name("out.partial")
    assert json.loads((partial / "conversion.json").read_text())["next_layer"] == 2
    assert (partial / "hidden-before-00002.bin").is_file()
    return own, mine, out


def resume(work: tuple[Path, Path, Path], config: SamoyedsConfig | None = None, **more: Any) -> Any:
    source, text, out = work
    config = calibrated(text) if config is None else config
    return convert(source, out, config, **{"shard_size": SHARD_SIZE, "resume": True, **more})


def refuses_another(
    what: str, work: tuple[Path, Path, Path], config: SamoyedsConfig | None = None
) -> None:
    """Of something else than was begun, resuming loses nothing."""
    refused(
        CheckpointError,
        f"found another {what} than in",
        "--overwrite",
        call=lambda: resume(work, config),
        kept=work[2].with_name("out.partial"),
    )


def assert_finished(out: Path, finished: dict[str, bytes]) -> None:
    """As an uninterrupted conversion left it; the card names the source's directory."""
    found = files_in(out) or {}
    assert found.keys() == finished.keys()
    card = found["README.md"].replace(b"`own`", b"`dense`").replace(b" own`", b" dense`")
    assert {**found, "README.md": card} == finished
    assert not out.with_name(f"{out.name}.partial").exists()


def test_resumed_with_what_is_done_untouched(
    interrupted: tuple[Path, Path, Path], finished: dict[str, bytes]
) -> None:
    *_, out = interrupted
    partial = out.with_name("out.partial")
    done = json.loads((partial / "conversion.json").read_text())["done"]
    assert len(done) > 2
    before = {name: (partial / name).stat().st_ino for name in done}
    resume(interrupted)
    assert {name: (out / name).stat().st_ino for name in done} == before
    assert_finished(out, finished)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "settings", [{"asymmetric": True, "refine": True}, {"method": "best"}], ids=str
)
def test_resumed_with_the_dense_model_followed(
    settings: dict[str, Any], layers: int, source: Path, text: Path, tmp_path: Path
) -> None:
    """Its hidden states are kept too."""
    config = calibrated(text, **settings)
    convert(source, tmp_path / "whole" / "out", config)
    out = tmp_path / "halves" / "out"
    stop_after(layers, lambda: convert(source, out, config))
    kept = load_file(out.with_name("out.partial") / f"hidden-before-{layers:05d}.bin")
    pruned, dense = (
        [kept[key] for key in sorted(kept) if key.startswith(kind)] for kind in ("hidden", "dense")
    )
    assert [t.shape for t in pruned] == [t.shape for t in dense]
    assert not any(torch.equal(a, b) for a, b in zip(pruned, dense, strict=True))
    convert(source, out, config, resume=True)
    assert files_in(out) == files_in(tmp_path / "whole" / "out")


def test_another_block_recovery_is_not_gone_on_with(own: Path, text: Path, tmp_path: Path) -> None:
    """As versions left it that said nothing of theirs: its layers would have two."""
    out, config = tmp_path / "out", calibrated(text, recover="block")
    stop_after(1, lambda: convert(own, out, config))
    state = out.with_name("out.partial") / "conversion.json"
    content = json.loads(state.read_text())
    del content["fingerprint"]["block recovery"]
    state.write_text(json.dumps(content))
    refused(
        CheckpointError,
        "another block recovery than in",
        "--overwrite",
        call=lambda: convert(own, out, config, resume=True),
        kept=tmp_path,
    )


@pytest.mark.parametrize("layers", [1, 3])
def test_resumed_after_the_first_and_the_last_layer(
    layers: int, own: Path, text: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stop_after(layers, lambda: convert(own, out, calibrated(text), shard_size=SHARD_SIZE))
    resume((own, text, out))
    assert_finished(out, finished)


def test_resumed_with_the_text_elsewhere(
    interrupted: tuple[Path, Path, Path], finished: dict[str, bytes], tmp_path: Path
) -> None:
    """It is the tokens that count, and the name that is stored; not where the file lies."""
    own, text, out = interrupted
    (tmp_path / "elsewhere").mkdir()
    moved = text.rename(tmp_path / "elsewhere" / text.name)
    resume((own, moved, out))
    assert_finished(out, finished)


@pytest.mark.parametrize(
    "victim",
    [
        *("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"),
        "model.layers.1.self_attn.q_proj.weight",
    ],
)
def test_a_shard_that_was_deleted_is_made_again(
    victim: str, interrupted: tuple[Path, Path, Path], finished: dict[str, bytes]
) -> None:
    *_, out = interrupted
    headers(out.with_name("out.partial"))[victim].file.unlink()
    resume(interrupted)
    assert_finished(out, finished)


def test_a_shard_that_was_deleted_when_all_were_done(
    own: Path, text: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    """What its layer was given is gone by then: all layers are done again."""
    out = tmp_path / "out"
    stop_after(3, lambda: convert(own, out, calibrated(text), shard_size=SHARD_SIZE))
    partial = out.with_name("out.partial")
    assert not (partial / "hidden-before-00001.bin").exists()
    headers(partial)["model.layers.1.mlp.experts.down_proj"].file.unlink()
    resume((own, text, out))
    assert_finished(out, finished)


def test_all_shards_deleted_and_the_state_kept(
    interrupted: tuple[Path, Path, Path], finished: dict[str, bytes]
) -> None:
    *_, out = interrupted
    for file in out.with_name("out.partial").glob("*.safetensors"):
        file.unlink()
    resume(interrupted)
    assert_finished(out, finished)


def test_stopped_again_while_a_deleted_shard_is_made(
    interrupted: tuple[Path, Path, Path], finished: dict[str, bytes]
) -> None:
    *_, out = interrupted
    for layers in (1, 2):
        partial = out.with_name("out.partial")
        headers(partial)["model.layers.0.mlp.experts.gate_up_proj"].file.unlink()
        stop_after(layers, lambda: resume(interrupted))
    resume(interrupted)
    assert_finished(out, finished)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def fewer(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(max(tensors))
    save_file(tensors, path)


def shorter(path: Path) -> None:
    kept = load_file(path)
    save_file({n: t[:, :-1].contiguous() if t.ndim > 1 else t for n, t in kept.items()}, path)


def flipped(path: Path) -> None:
    """One bit of a value: the file reads well."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def exchanged(path: Path) -> None:
    """Two batches in each other's place."""
    kept = load_file(path)
    first, second = "hidden.000000", "hidden.000001"
    kept[first], kept[second] = kept[second], kept[first]
    save_file(kept, path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(b"\xff" * 1000),
    "cut": cut,
    "fewer sequences": fewer,
    "shorter sequences": shorter,
    "a flipped bit": flipped,
    "exchanged batches": exchanged,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_hidden_states(
    damage: Callable[[Path], object],
    interrupted: tuple[Path, Path, Path],
    finished: dict[str, bytes],
) -> None:
    *_, out = interrupted
    partial = out.with_name("out.partial")
    damage(partial / "hidden-before-00002.bin")
    shards = {
        name: data for name, data in (files_in(partial) or {}).items() if "hidden" not in name
    }
    refused(
        CheckpointError,
        "hidden-before-00002.bin must hold the hidden states to go on with",
        "start again with --overwrite.",
        call=lambda: resume(interrupted),
    )
    assert not out.exists()
    assert shards.items() <= (files_in(partial) or {}).items()
    resume(interrupted, resume=False, overwrite=True)  # the way out that the message names
    assert_finished(out, finished)


def shuffle(text: Path) -> None:
    text.write_text(text.read_text()[::-1])


NOTHING: Callable[[Path], object] = lambda text: None  # noqa: E731
CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "text": (shuffle, {}),
    "method": (NOTHING, {"method": "sparsegpt"}),
    "refine": (NOTHING, {"refine": True}),
    "asymmetric": (NOTHING, {"asymmetric": True}),
    "pattern": (NOTHING, {"pattern": "2:4"}),
}


@pytest.mark.parametrize(("edit", "settings"), CHANGES.values(), ids=CHANGES)
def test_resume_of_another_calibration(
    edit: Callable[[Path], object],
    settings: dict[str, Any],
    interrupted: tuple[Path, Path, Path],
) -> None:
    _, text, out = interrupted
    edit(text)
    refuses_another("recipe", interrupted, calibrated(text, **settings))
    assert not out.exists()


@pytest.mark.parametrize("change", [{"seed": 1}, {"samples": 9}, {"sequence_length": 11}], ids=str)
def test_resume_with_other_windows(
    change: dict[str, int], interrupted: tuple[Path, Path, Path]
) -> None:
    _, text, _ = interrupted
    data = {"data": str(text), "samples": SAMPLES, "sequence_length": LENGTH, **change}
    refuses_another("recipe", interrupted, calibrated(text, calibration=data))


def test_resume_with_another_tokenizer(interrupted: tuple[Path, Path, Path]) -> None:
    own, *_ = interrupted
    tokenizer = json.loads((own / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (own / "tokenizer.json").write_text(json.dumps(tokenizer))
    refuses_another("recipe", interrupted)


def test_resume_with_another_source(interrupted: tuple[Path, Path, Path]) -> None:
    own, *_ = interrupted
    os.utime(own / SINGLE, ns=(1, 1))
    refuses_another("source", interrupted)


def test_resume_without_calibration(interrupted: tuple[Path, Path, Path]) -> None:
    """A conversion that looks at no data does not go on with one that does."""
    refuses_another("recipe", interrupted, SamoyedsConfig(PATTERN))


def test_disk_full_when_hidden_states_are_kept(
    source: Path,
    text: Path,
    finished: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, pwrite = tmp_path / "out", os.pwrite

    def limited(file: int, *rest: Any) -> int:
        if "hidden-before-00002" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, *rest)

    with monkeypatch.context() as context:
        context.setattr(os, "pwrite", limited)
        refused(
            CheckpointError,
            "No space left on device",
            "--resume",
            call=lambda: convert(source, out, calibrated(text), shard_size=SHARD_SIZE),
        )
    assert not list((tmp_path / "out.partial").glob("*.tmp*"))
    assert not list((tmp_path / "out.partial").glob(".tmp*"))
    convert(source, out, calibrated(text), shard_size=SHARD_SIZE, resume=True)
    assert files_in(out) == finished
