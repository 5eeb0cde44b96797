"""Distillations that are killed: resumed to equal bits, or refused with a sentence."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from distillation import FAST, TEXT, mixtral
from tiny_models import MIXTRAL, same_state, tokens
from transformers import PreTrainedModel

from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.pruning import training as training_module
from samoyeds_hf.pruning.distill import distill
from samoyeds_hf.pruning.distill_settings import DistillReport, DistillSettings
from samoyeds_hf.pruning.training import CsvLog


def run_until(
    state: Path,
    step: int | None,
    save_minutes: float = 0.0,
    settings: DistillSettings = FAST,
    late: bool = False,
) -> bool:
    """Distill in a child that is killed after a step, or ``late``, when it computes what follows.

    Returns whether it was.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    try:
        student, teacher, masks = mixtral()

        def die(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def log(row: Mapping[str, float]) -> None:
            CsvLog(state.with_suffix(".csv"))(row)
            if row["step"] == step:
                student.register_forward_pre_hook(die) if late else die()

        distill(
            student, teacher, TEXT, masks, settings, state=state, log=log, save_minutes=save_minutes
        )
        torch.save(student.state_dict(), state.with_suffix(".result"))
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.fixture(scope="module")
def finished() -> tuple[PreTrainedModel, DistillReport]:
    student, teacher, masks = mixtral()
    return student, distill(student, teacher, TEXT, masks, FAST)


@pytest.mark.parametrize(
    ("kills", "save_minutes"),
    [
        ((0,), 0.0),  # before there is a state
        ((3,), 0.0),
        ((2, 3, 5), 0.0),  # again and again
        ((4,), 60.0),  # long after the last state: from the beginning
    ],
)
def test_killed_and_resumed_to_equal_bits(
    tmp_path: Path,
    finished: tuple[PreTrainedModel, DistillReport],
    kills: tuple[int, ...],
    save_minutes: float,
) -> None:
    state = tmp_path / "run.pt"
    for step in kills:
        assert run_until(state, step, save_minutes)
    assert not run_until(state, None, save_minutes)
    found = torch.load(state.with_suffix(".result"), weights_only=True)
    expected = finished[0].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    rows = state.with_suffix(".csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", *map(str, range(FAST.steps))]
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt", ".csv", ".result"}


LOWERED = DistillSettings(steps=9, batch_size=4, learning_rate=5e-2, held_back=0.2)


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, DistillReport, str]:
    """A run that starts again after 2 and 5 steps, and its log without times."""
    student, teacher, masks = mixtral()
    path = tmp_path_factory.mktemp("lowered") / "run.csv"
    report = distill(student, teacher, TEXT, masks, LOWERED, log=CsvLog(path))
    assert report.learning_rate == LOWERED.learning_rate / 4**2
    return student, report, without_seconds(path)


def without_seconds(path: Path) -> str:
    return "\n".join(row.rsplit(",", 1)[0] for row in path.read_text().splitlines())


@pytest.mark.parametrize(
    ("kills", "late"),
    [
        ((1,), False),  # before the rate is checked for the first time
        ((2,), False),  # after the first step with a lower rate, before that is checked
        ((1, 2), True),  # while it is checked
        ((3,), False),  # between two checks of a rate
        ((4,), True),  # while the second check ends it
        ((5,), False),  # after the last start
        ((0, 1, 2, 3, 4, 5, 6, 7, 8), False),
    ],
)
def test_killed_around_a_new_start_and_resumed_to_equal_bits(
    tmp_path: Path,
    lowered: tuple[PreTrainedModel, DistillReport, str],
    kills: tuple[int, ...],
    late: bool,
) -> None:
    state, (student, report, log) = tmp_path / "run.pt", lowered
    for step in kills:
        assert run_until(state, step, settings=LOWERED, late=late)
    assert not run_until(state, None, settings=LOWERED)
    found = torch.load(state.with_suffix(".result"), weights_only=True)
    expected = student.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert without_seconds(state.with_suffix(".csv")) == log
    fresh, teacher, masks = mixtral()
    again = distill(fresh, teacher, TEXT, masks, LOWERED, state=state)
    assert replace(again, seconds=report.seconds) == report


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    student, teacher, masks = mixtral()
    fresh = copy.deepcopy(student)
    first = distill(student, teacher, TEXT, masks, FAST, state=tmp_path / "run.pt")
    rows: list[Mapping[str, float]] = []
    again = distill(fresh, teacher, TEXT, masks, FAST, state=tmp_path / "run.pt", log=rows.append)
    assert again == first
    assert rows == []
    assert same_state(fresh, student)


def change_settings(work: dict[str, Any]) -> None:
    work["settings"] = DistillSettings(steps=6, batch_size=4, learning_rate=2e-3)


def change_tokens(work: dict[str, Any]) -> None:
    work["tokens"] = tokens(batch=10, length=12, seed=1)


def change_teacher(work: dict[str, Any]) -> None:
    work["teacher"] = MIXTRAL.make(seed=1)


def change_student(work: dict[str, Any]) -> None:
    with torch.no_grad():
        next(work["student"].parameters()).mul_(1.5)


def change_masks(work: dict[str, Any]) -> None:
    name = next(iter(work["masks"]))
    work["masks"] = {**work["masks"], name: ~work["masks"][name]}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (change_settings, "settings"),
        (change_tokens, "tokens"),
        (change_teacher, "teacher"),
        (change_student, "student"),
        (change_masks, "student"),
    ],
)
def test_another_run_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], what: str
) -> None:
    state = tmp_path / "run.pt"
    student, teacher, masks = mixtral()
    work = {"student": student, "teacher": teacher, "tokens": TEXT, "masks": masks}
    short = {**work, "student": copy.deepcopy(student), "settings": FAST}
    with pytest.raises(KeyboardInterrupt):
        distill(**short, state=state, log=stop_at(1), save_minutes=0)
    work["settings"] = FAST
    change(work)
    refused(
        CheckpointError,
        f"found another {what}",
        "--overwrite",
        call=lambda: distill(**work, state=state),
        kept=tmp_path,
    )


def stop_at(step: int) -> Callable[[Mapping[str, float]], None]:
    def log(row: Mapping[str, float]) -> None:
        if row["step"] == step:
            raise KeyboardInterrupt

    return log


@pytest.mark.parametrize("key", ["starts", "masters"])
def test_a_state_of_other_code_is_refused(tmp_path: Path, key: str) -> None:
    state = tmp_path / "run.pt"
    assert run_until(state, 1)
    student, teacher, masks = mixtral()
    content = torch.load(state, weights_only=True)
    del content[key]
    torch.save(content, state)
    refused(
        CheckpointError,
        "run.pt",
        "unreadable (KeyError)",
        "--overwrite",
        call=lambda: distill(student, teacher, TEXT, masks, FAST, state=state),
        kept=tmp_path,
    )


def test_a_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    """As versions left it that said nothing of the optimizer, which was torch's."""
    state = tmp_path / "run.pt"
    assert run_until(state, 1)
    student, teacher, masks = mixtral()
    content = torch.load(state, weights_only=True)
    del content["fingerprint"]["optimizer"]
    torch.save(content, state)
    refused(
        CheckpointError,
        "run.pt",
        "found another optimizer",
        "to the same version",
        "--overwrite",
        call=lambda: distill(student, teacher, TEXT, masks, FAST, state=state),
        kept=tmp_path,
    )


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_state_is_refused(tmp_path: Path, content: bytes | None) -> None:
    state = tmp_path / "run.pt"
    if content is None:
        torch.save(["another", "thing"], state)
    else:
        state.write_bytes(content)
    student, teacher, masks = mixtral()
    refused(
        CheckpointError,
        "run.pt",
        "unreadable",
        call=lambda: distill(student, teacher, TEXT, masks, FAST, state=state),
        kept=tmp_path,
    )


def test_a_state_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **settings: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file: file write failed\nat ...")

    monkeypatch.setattr(training_module.torch, "save", full)
    student, teacher, masks = mixtral()
    refused(
        CheckpointError,
        "room",
        call=lambda: distill(
            student, teacher, TEXT, masks, FAST, state=tmp_path / "a.pt", save_minutes=0
        ),
    )
