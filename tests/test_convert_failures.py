"""Whatever goes wrong: one sentence, DST as it was, and work that can be continued."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import (
    CONFIG,
    INDEX,
    SINGLE,
    assert_same_checkpoint,
    contents,
    convert,
    edit_json,
    edit_tensors,
    files_in,
    headers,
    load_as_auto,
    refused,
    save_dense,
)
from safetensors.torch import load_file, save_file
from tiny_models import MIXTRAL, Family

import samoyeds_hf
from samoyeds_hf import SamoyedsConfig
from samoyeds_hf import convert as module
from samoyeds_hf.convert import resolve_source
from samoyeds_hf.errors import CheckpointError, PatternError, SamoyedsError, UnsupportedModelError
from samoyeds_hf.plan import plan_conversion

SHARD_SIZE = 50_000
SMALL = 30_000  # three shards of the small model
OTHER = SamoyedsConfig("2:4")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer with two experts: for tests that convert many times."""
    settings = {**MIXTRAL.settings, "num_hidden_layers": 1, "num_local_experts": 2}
    return save_dense(Family("small", "Mixtral", settings), tmp_path_factory.mktemp("s") / "dense")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint in several shards; nobody changes it."""
    path = tmp_path_factory.mktemp("shared") / "dense"
    save_dense(MIXTRAL, path, max_shard_size="100KB")
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def own(source: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "own"))


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of an uninterrupted conversion to a directory called "out"."""
    path = tmp_path_factory.mktemp("whole") / "out"
    convert(source, path, shard_size=SHARD_SIZE)
    found = files_in(path)
    assert found is not None
    assert len([name for name in found if name.endswith(".safetensors")]) > 3
    return found


def one_file(directory: Path) -> None:
    """Put a sharded checkpoint into a single file."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(file))
        file.unlink()
    (directory / INDEX).unlink()
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


# --- killed -----------------------------------------------------------------------------------

EVENTS = ("fsync", "replace", "rename", "unlink", "mkdir", "posix_fallocate", "pwrite")
WRITES = 6  # of the many writes of tensors, one in so many is an event


def run_and_die(call: Callable[[], object], at: int) -> bool:
    """Run in a child that is killed when it is about to touch the disk for the ``at``-th time.

    Returns whether it was killed; False means that it came to its end before that.
    """
    child = os.fork()
    if child == 0:
        passed = [0, 0]  # events, writes

        def dying(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **settings: Any) -> Any:
                passed[1] += name == "pwrite"
                if name != "pwrite" or passed[1] % WRITES == 0:
                    if passed[0] == at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    passed[0] += 1
                return function(*args, **settings)

            return call

        for name in EVENTS:
            setattr(os, name, dying(name, getattr(os, name)))
        try:
            call()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def points(call: Callable[[int], bool]) -> int:
    """Kill at every point in turn; returns how many there were."""
    number = 0
    while call(number):
        number += 1
    return number


@pytest.mark.slow
def test_killed_anywhere_then_resumed(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "whole" / "out", shard_size=SMALL)
    finished = files_in(tmp_path / "whole" / "out")
    working = {"conversion.json", ".lock"}
    endings = set()

    def attempt(number: int) -> bool:
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        killed = run_and_die(lambda: convert(small, out, shard_size=SMALL), number)
        if not out.exists():
            convert(small, out, shard_size=SMALL, resume=True)
            endings.add("resumed")
        elif killed:
            endings.add("complete")  # killed after it got its name
        found = files_in(out)
        assert found is not None
        assert {name: found[name] for name in set(found) - working} == finished
        left = {path.name for path in out.parent.iterdir()}
        assert left == {"out"}
        shutil.rmtree(out.parent)
        return killed

    assert points(attempt) > 30
    assert endings == {"resumed", "complete"}


@pytest.mark.slow
def test_killed_while_replacing(small: Path, tmp_path: Path) -> None:
    """The old checkpoint is there, whole, until the new one is; no other name is touched."""
    convert(small, tmp_path / "whole" / "out", shard_size=SMALL)
    finished = files_in(tmp_path / "whole" / "out") or {}
    convert(small, tmp_path / "old" / "out", OTHER)
    old = files_in(tmp_path / "old" / "out")
    seen = set()

    def attempt(number: int) -> bool:
        out = tmp_path / str(number) / "out"
        shutil.copytree(tmp_path / "old" / "out", out)

        def replace(resume: bool = False) -> None:
            convert(small, out, shard_size=SMALL, overwrite=True, resume=resume)

        killed = run_and_die(replace, number)
        found = files_in(out)
        if found == old:
            seen.add("old")
        elif found is None:  # between two renames: set aside, and put back by the next run
            assert files_in(out.with_name("out.replaced")) == old
            seen.add("between")
        else:
            assert finished.items() <= found.items()
            seen.add("new")
        if found is None or found == old:
            replace(resume=True)
            assert files_in(out) == finished
        shutil.rmtree(out.parent)
        return killed

    points(attempt)
    assert seen == {"old", "between", "new"}


def test_a_killed_run_has_lost_no_finished_shard(source: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    assert run_and_die(lambda: convert(source, out, shard_size=SHARD_SIZE), 30)
    done = json.loads((partial / "conversion.json").read_text())["done"]
    before = {name: (partial / name).stat().st_ino for name in done}
    assert before
    convert(source, out, shard_size=SHARD_SIZE, resume=True)
    assert {name: (out / name).stat().st_ino for name in done} == before


# --- resume refuses what does not fit -----------------------------------------------------------


@pytest.fixture
def interrupted(own: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the source, and a destination half written from it."""
    out = tmp_path / "out"
    assert run_and_die(lambda: convert(own, out, shard_size=SHARD_SIZE), 30)
    assert not out.exists()
    return own, out


def touch(source: Path) -> None:
    os.utime(next(source.glob("*.safetensors")), ns=(1, 1))


CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "touched file": (touch, {}, "source"),
    "changed configuration": (
        lambda source: edit_json(source / "config.json", rms_norm_eps=0.5),
        {},
        "source",
    ),
    "recipe": (lambda source: None, {"config": OTHER}, "recipe"),
    "shard size": (lambda source: None, {"shard_size": 70_000}, "shard size"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_resume_of_another_conversion(change: Any, interrupted: tuple[Path, Path]) -> None:
    source, out = interrupted
    edit, settings, named = change
    edit(source)
    settings = {"shard_size": SHARD_SIZE, **settings}
    refused(
        CheckpointError,
        f"found another {named} than in",
        "--overwrite",
        call=lambda: convert(source, out, resume=True, **settings),
        kept=out.with_name("out.partial"),
    )
    assert not out.exists()
    convert(source, out, overwrite=True, **settings)  # the way out that the message names
    load_as_auto(out)


def test_resume_with_another_version(
    interrupted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = interrupted
    monkeypatch.setattr(samoyeds_hf, "__version__", "99.0")
    refused(
        CheckpointError,
        "found another version of samoyeds-hf than in",
        call=lambda: convert(source, out, shard_size=SHARD_SIZE, resume=True),
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fingerprint": 1, "done": {}}'])
def test_resume_from_an_unreadable_state(text: str, interrupted: tuple[Path, Path]) -> None:
    source, out = interrupted
    (out.with_name("out.partial") / "conversion.json").write_text(text)
    refused(
        CheckpointError,
        "conversion.json",
        "--overwrite",
        call=lambda: convert(source, out, shard_size=SHARD_SIZE, resume=True),
    )


def test_resume_with_a_finished_shard_gone(
    interrupted: tuple[Path, Path], finished: dict[str, bytes]
) -> None:
    source, out = interrupted
    partial = out.with_name("out.partial")
    next(partial.glob("*.safetensors")).unlink()
    convert(source, out, shard_size=SHARD_SIZE, resume=True)
    assert contents(out).keys() == contents(out).keys()
    assert {k: v for k, v in (files_in(out) or {}).items() if k.endswith("safetensors")} == {
        k: v for k, v in finished.items() if k.endswith("safetensors")
    }


def test_resume_with_a_finished_shard_cut_short(interrupted: tuple[Path, Path]) -> None:
    source, out = interrupted
    shard = next(out.with_name("out.partial").glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    refused(
        CheckpointError,
        shard.name,
        call=lambda: convert(source, out, shard_size=SHARD_SIZE, resume=True),
    )
    assert not out.exists()


def test_half_written_and_neither_resume_nor_overwrite(interrupted: tuple[Path, Path]) -> None:
    source, out = interrupted
    refused(
        CheckpointError,
        "out.partial",
        "--resume",
        "--overwrite",
        call=lambda: convert(source, out, shard_size=SHARD_SIZE),
        kept=out.with_name("out.partial"),
    )


def test_resume_of_nothing_starts(source: Path, finished: dict[str, bytes], tmp_path: Path) -> None:
    convert(source, tmp_path / "out", shard_size=SHARD_SIZE, resume=True)
    assert files_in(tmp_path / "out") == finished


# --- the destination ----------------------------------------------------------------------------


def test_existing_destination(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    for settings in ({}, {"resume": True}):
        refused(
            CheckpointError,
            "must be new",
            "--overwrite",
            call=lambda settings=settings: convert(source, out, OTHER, **settings),
            kept=tmp_path,
        )
    convert(source, out, OTHER, overwrite=True)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["pattern"] == "2:4"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_empty_destination_is_fine(
    source: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", shard_size=SHARD_SIZE)
    assert files_in(tmp_path / "out") == finished


def test_destination_in_a_new_folder(
    source: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    convert(source, tmp_path / "a" / "b" / "out", shard_size=SHARD_SIZE)
    assert files_in(tmp_path / "a" / "b" / "out") == finished


def test_destination_that_is_a_link(
    source: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    """The work is done on the disk that it leads to."""
    (tmp_path / "large" / "disk").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "large" / "disk")
    convert(source, tmp_path / "out", shard_size=SHARD_SIZE)
    assert (tmp_path / "out").is_symlink()
    found = files_in(tmp_path / "large" / "disk") or {}
    assert {k: v for k, v in found.items() if k != "README.md"} == {
        k: v for k, v in finished.items() if k != "README.md"
    }


def test_working_directory_as_destination(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    convert(source, Path("."), shard_size=SHARD_SIZE)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("content", ["directory", "file"])
def test_overwrite_replaces_checkpoints_only(content: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if content == "directory":
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    else:
        out.write_text("years of work")
    refused(
        CheckpointError,
        "checkpoints only",
        "no config.json",
        call=lambda: convert(source, out, overwrite=True),
        kept=tmp_path,
    )


@pytest.mark.parametrize("place", [".", "below/dense"])
def test_destination_that_holds_the_source(place: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(source, out / place)
    if place != ".":
        shutil.copyfile(source / "config.json", out / "config.json")
    refused(
        CheckpointError,
        "must not hold the source",
        call=lambda: convert(out / place, out, overwrite=True),
        kept=tmp_path,
    )


@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
@pytest.mark.parametrize("settings", [{"overwrite": True}, {"resume": True}], ids=str)
def test_source_in_a_working_directory(
    suffix: str, settings: dict[str, bool], source: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(source, tmp_path / f"out{suffix}"))
    refused(
        CheckpointError,
        "choose another destination",
        call=lambda: convert(own, tmp_path / "out", **settings),
        kept=tmp_path,
    )


def test_working_directory_of_somebody_else(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    for settings in ({"overwrite": True}, {"resume": True}):
        refused(
            CheckpointError,
            "found something else",
            call=lambda settings=settings: convert(source, tmp_path / "out", **settings),
            kept=tmp_path,
        )


def test_set_aside_directory_of_somebody_else(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "thesis.txt").write_text("years of work")
    refused(
        CheckpointError,
        "out.replaced",
        call=lambda: convert(source, tmp_path / "out", overwrite=True),
        kept=tmp_path,
    )


@pytest.mark.parametrize("settings", [{"overwrite": True}, {"resume": True}], ids=str)
def test_two_at_once(
    settings: dict[str, bool], interrupted: tuple[Path, Path], finished: dict[str, bytes]
) -> None:
    source, out = interrupted
    partial = out.with_name("out.partial")
    with (partial / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(
            CheckpointError,
            "Only one process",
            call=lambda: convert(source, out, shard_size=SHARD_SIZE, **settings),
            kept=partial,
        )
    convert(source, out, shard_size=SHARD_SIZE, **settings)
    assert (files_in(out) or {}).keys() == finished.keys()


def test_destination_that_appears_meanwhile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may have finished first: its result is not replaced unasked."""
    out, finish = tmp_path / "out", module._finish

    def late(*args: Any) -> Any:
        shutil.copytree(source, out)
        return finish(*args)

    monkeypatch.setattr(module, "_finish", late)
    refused(CheckpointError, "must be new", call=lambda: convert(source, out))
    assert files_in(out) == files_in(source)


# --- the disk -----------------------------------------------------------------------------------


def test_no_place_to_write(source: Path, tmp_path: Path) -> None:
    """A file where a folder should be: unlike permissions, that stops root too."""
    (tmp_path / "file").write_text("not a folder")
    refused(
        CheckpointError,
        "must be writable",
        "Not a directory",
        call=lambda: convert(source, tmp_path / "file" / "out"),
        kept=tmp_path,
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_to_write(source: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    refused(
        CheckpointError,
        "must be writable",
        "Permission denied",
        call=lambda: convert(source, tmp_path / "closed" / "out"),
    )


def test_too_little_disk_is_known_before(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = plan_conversion(source, CONFIG, SHARD_SIZE).disk_need
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    refused(
        CheckpointError,
        "needs",
        "of disk, found",
        call=lambda: convert(source, tmp_path / "out", shard_size=SHARD_SIZE),
        kept=tmp_path,
    )
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need))
    convert(source, tmp_path / "out", shard_size=SHARD_SIZE)


def test_finished_shards_need_no_disk_again(
    interrupted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = interrupted
    plan = plan_conversion(source, CONFIG, SHARD_SIZE)
    partial = out.with_name("out.partial")
    done = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    usage = shutil.disk_usage(partial)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=plan.disk_need - done)
    )
    convert(source, out, shard_size=SHARD_SIZE, resume=True)


@pytest.mark.parametrize("calls", range(0, 40, 7))
def test_disk_full_in_the_middle(
    calls: int,
    source: Path,
    finished: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left, pwrite, out = [calls], os.pwrite, tmp_path / "out"

    def limited(*args: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*args)

    with monkeypatch.context() as context:
        context.setattr(os, "pwrite", limited)
        refused(
            CheckpointError,
            "No space left on device",
            "--resume",
            call=lambda: convert(source, out, shard_size=SHARD_SIZE),
        )
    assert not out.exists()
    assert not list((tmp_path / "out.partial").glob("*.tmp"))
    convert(source, out, shard_size=SHARD_SIZE, resume=True)
    assert files_in(out) == finished


# --- the source ---------------------------------------------------------------------------------


def drop(directory: Path, name: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop(name))


def put(directory: Path, name: str, tensor: torch.Tensor) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({name: tensor}))


EXPERT = "model.layers.1.block_sparse_moe.experts.2"
NORM = "model.norm.weight"
IN_ONE_FILE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a tensor is missing": (lambda d: drop(d, NORM), [NORM, "missing"]),
    "a matrix of an expert is missing": (
        lambda d: drop(d, f"{EXPERT}.w1.weight"),
        ["model.layers.1.mlp.experts.gate_up_proj", "3 x", "4 x"],
    ),
    "an expert is missing": (
        lambda d: [drop(d, f"{EXPERT}.{w}.weight") for w in ("w1", "w2", "w3")],
        ["model.layers.1.mlp.experts", "[4, ", "[3, "],
    ),
    "all experts are missing": (
        lambda d: edit_tensors(
            d, lambda t: [t.pop(name) for name in list(t) if "layers.1.block" in name]
        ),
        ["model.layers.1.mlp", "missing"],
    ),
    "a wrong shape": (lambda d: put(d, NORM, torch.ones(65)), [NORM, "[64]", "[65]"]),
    "an expert of a wrong shape": (
        lambda d: put(d, f"{EXPERT}.w2.weight", torch.ones(64, 96)),
        ["model.layers.1.mlp.experts.down_proj", "go together"],
    ),
    "experts of another size": (
        lambda d: edit_json(d / "config.json", intermediate_size=96),
        ["mlp.experts.", "configuration and the weights"],
    ),
    "an fp8 tensor": (
        lambda d: put(d, NORM, torch.ones(64).to(torch.float8_e4m3fn)),
        [NORM, "float8_e4m3fn", "dequantise"],
    ),
    "not a number": (
        lambda d: put(d, f"{EXPERT}.w2.weight", torch.full((64, 128), float("nan"))),
        ["model.layers.1.mlp.experts.down_proj", "finite", "nan"],
    ),
    "not safetensors": (
        lambda d: (d / SINGLE).write_bytes(b"version https://git-lfs"),
        [SINGLE, "23 bytes"],
    ),
    "an empty file": (lambda d: (d / SINGLE).write_bytes(b""), [SINGLE, "0 bytes"]),
    "no weights": (lambda d: (d / SINGLE).unlink(), [SINGLE, "found neither"]),
    "no configuration": (lambda d: (d / "config.json").unlink(), ["config.json", "found none"]),
    "a broken configuration": (
        lambda d: (d / "config.json").write_text('{"model_type": '),
        ["config.json"],
    ),
    "a configuration of another kind": (lambda d: (d / "config.json").write_text("[]"), ["object"]),
    "a value of a wrong type": (
        lambda d: edit_json(d / "config.json", num_local_experts="eight"),
        ["config.json", "num_local_experts"],
    ),
    "quantised to fp8": (
        lambda d: edit_json(d / "config.json", quantization_config={"quant_method": "fp8"}),
        ["must be dense", "'fp8'", "dequantise"],
    ),
    "unknown to transformers": (
        lambda d: edit_json(d / "config.json", model_type="nonesuch", architectures=["Nonesuch"]),
        ["nonesuch"],
    ),
    "custom code": (
        lambda d: edit_json(
            d / "config.json", model_type="nonesuch", auto_map={"AutoConfig": "code.Config"}
        ),
        ["nonesuch"],
    ),
}


@pytest.mark.parametrize("case", IN_ONE_FILE.values(), ids=IN_ONE_FILE)
def test_damaged_source(case: Any, own: Path, tmp_path: Path) -> None:
    damage, parts = case
    one_file(own)
    damage(own)
    refused(SamoyedsError, *parts, call=lambda: convert(own, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    # Everything but the values is known from the headers, before anything is written.
    assert (tmp_path / "out.partial").exists() == ("finite" in parts)


def second_shard(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[1]


def name_a_wrong_shard(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][NORM] = second_shard(directory).name
    (directory / INDEX).write_text(json.dumps(index))


IN_SHARDS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a shard is missing": (lambda d: second_shard(d).unlink(), ["-00002-of-", "missing"]),
    "a shard is cut short": (
        lambda d: os.truncate(second_shard(d), second_shard(d).stat().st_size // 2),
        ["-00002-of-", "download it again"],
    ),
    "a shard lacks its last byte": (
        lambda d: os.truncate(second_shard(d), second_shard(d).stat().st_size - 1),
        ["-00002-of-", "download it again"],
    ),
    "the index names a wrong shard": (name_a_wrong_shard, [NORM, "-00002-of-", "index"]),
    "a broken index": (lambda d: (d / INDEX).write_text("{"), [INDEX]),
    "an index without a map": (lambda d: (d / INDEX).write_text("{}"), [INDEX, "weight_map"]),
}


@pytest.mark.parametrize("case", IN_SHARDS.values(), ids=IN_SHARDS)
def test_damaged_shards(case: Any, own: Path, tmp_path: Path) -> None:
    damage, parts = case
    assert len(list(own.glob("*.safetensors"))) > 2
    damage(own)
    refused(CheckpointError, *parts, call=lambda: convert(own, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_sparse_source(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "sparse")
    refused(
        CheckpointError,
        "must be dense",
        "'samoyeds'",
        "export-dense",
        call=lambda: convert(tmp_path / "sparse", tmp_path / "out"),
        kept=tmp_path,
    )


def test_a_model_without_experts(tmp_path: Path) -> None:
    dense = Family("llama", "Llama", {"intermediate_size": 128})
    save_dense(dense, tmp_path / "dense")
    refused(
        UnsupportedModelError,
        "MoE layers",
        "LlamaForCausalLM",
        call=lambda: convert(tmp_path / "dense", tmp_path / "out"),
        kept=tmp_path,
    )


def test_v_that_does_not_divide(source: Path, tmp_path: Path) -> None:
    config = SamoyedsConfig("1:2:128")  # divides the inner size and not the hidden size
    refused(
        PatternError,
        "gate_up_proj",
        "V=128",
        "[4, 8, 16, 32, 64]",
        call=lambda: convert(source, tmp_path / "out", config),
        kept=tmp_path,
    )


def test_not_a_number_is_found_before_dst_exists(own: Path, tmp_path: Path) -> None:
    """And the place is told, with the expert."""
    one_file(own)

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}.w3.weight"][5, 7] = float("inf")

    edit_tensors(own, damage)
    message = refused(CheckpointError, "finite", "inf", call=lambda: convert(own, tmp_path / "out"))
    # gate rows, then up rows: row 5 of w3 is row 128 + 5.
    assert "model.layers.1.mlp.experts.gate_up_proj[2]" in message
    assert "133" in message
    assert "column 7" in message


# --- a repository of the Hub --------------------------------------------------------------------


def only_headers(source: Path, directory: Path) -> Any:
    """What of a repository is known without downloading weights."""
    directory.mkdir()
    for name in ("config.json", INDEX):
        shutil.copyfile(source / name, directory / name)
    files: dict[str, SimpleNamespace] = {}
    for name, tensor in headers(source).items():
        file = files.setdefault(tensor.file.name, SimpleNamespace(tensors={}))
        file.tensors[name] = SimpleNamespace(dtype=tensor.dtype, shape=list(tensor.shape))
    return SimpleNamespace(files_metadata=files)


def test_source_of_the_hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    snapshot = tmp_path / "1234abcd"
    metadata = only_headers(source, snapshot)
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: Any = None, ignore_patterns: Any = None) -> str:
        assert name == "some/model"
        if allow_patterns:
            return str(snapshot)
        asked.append(ignore_patterns)
        return str(shutil.copytree(source, snapshot, dirs_exist_ok=True))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(
        huggingface_hub, "get_safetensors_metadata", lambda name, revision: metadata
    )
    plan = plan_conversion("some/model", CONFIG, SHARD_SIZE)
    assert str(plan) == str(plan_conversion(source, CONFIG, SHARD_SIZE))
    settings: dict[str, Any] = {"shard_size": SHARD_SIZE, "progress": False}
    refused(
        PatternError,
        "V=128",
        call=lambda: module.convert_checkpoint(
            "some/model", tmp_path / "out", SamoyedsConfig("1:2:128"), **settings
        ),
    )
    assert asked == []  # neither needed the weights
    module.convert_checkpoint("some/model", tmp_path / "out", CONFIG, **settings)
    (ignored,) = asked
    assert {"*.bin", "*.py", "consolidated*"} <= set(ignored)
    assert "base_model: some/model" in (tmp_path / "out" / "README.md").read_text()
    convert(source, tmp_path / "local" / "out", shard_size=SHARD_SIZE)
    assert_same_checkpoint(tmp_path / "out", tmp_path / "local" / "out")


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused(
        CheckpointError,
        "'some/model'",
        "reachable repository",
        call=lambda: resolve_source("some/model"),
    )


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c", "bad name/m o"])
def test_source_that_does_not_exist(name: str, tmp_path: Path) -> None:
    refused(
        CheckpointError,
        repr(name),
        call=lambda: module.convert_checkpoint(name, tmp_path / "out", CONFIG),
    )
