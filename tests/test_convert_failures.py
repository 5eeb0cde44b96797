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
from typing import Any

import pytest
from checkpoints import (
    CONFIG,
    contents,
    convert,
    edit_json,
    files_in,
    load_as_auto,
    refused,
    save_dense,
)
from tiny_models import MIXTRAL, Family

import samoyeds_hf
from samoyeds_hf import SamoyedsConfig
from samoyeds_hf import convert as module
from samoyeds_hf.errors import CheckpointError
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
