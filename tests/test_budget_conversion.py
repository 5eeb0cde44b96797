"""``samoyeds convert --budget``: patterns chosen once, kept by a conversion that goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from calibrated import calibrated, save_source, write_text
from checkpoints import refused
from tiny_models import MIXTRAL

from samoyeds_hf import PatchReport, SamoyedsConfig, SparsityPattern
from samoyeds_hf.budget import with_budget
from samoyeds_hf.conversion_state import ConversionState
from samoyeds_hf.convert import convert_checkpoint
from samoyeds_hf.errors import CalibrationError, CheckpointError, ConfigError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(MIXTRAL, tmp_path_factory.mktemp("budget") / "dense")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> SamoyedsConfig:
    return calibrated(write_text(tmp_path_factory.mktemp("text") / "a.txt"))


def dropped(report: PatchReport) -> float:
    sizes = [math.prod(weight.shape) for weight in report.weights]
    kept = [SparsityPattern.parse(weight.pattern).density for weight in report.weights]
    return 1 - sum(map(math.prod, zip(sizes, kept, strict=True))) / sum(sizes)


@pytest.mark.parametrize("budget", [0.75, 0.6])
def test_at_least_the_budget_is_dropped(
    budget: float, source: Path, config: SamoyedsConfig, tmp_path: Path
) -> None:
    chosen = with_budget(source, config, budget, progress=False)
    assert chosen.budget == budget
    assert set(chosen.overrides.values()) <= {
        SparsityPattern.parse(text) for text in ("1:4:32", "3:8:32", "1:2:32", "3:4:32", "2:4")
    }
    report = convert_checkpoint(source, tmp_path / "out", chosen, progress=False)
    assert budget <= dropped(report) < budget + 0.1


def test_candidates(source: Path, config: SamoyedsConfig) -> None:
    chosen = with_budget(source, config, 0.6, candidates=["1:2:32", "2:4"], progress=False)
    assert {str(pattern) for pattern in chosen.overrides.values()} == {"1:2:32", "2:4"}


def test_own_overrides_stay_and_are_not_counted(source: Path, config: SamoyedsConfig) -> None:
    own = config.replace(overrides={r"model\.layers\.0\..*": "dense"})
    chosen = with_budget(source, own, 0.75, progress=False)
    assert next(iter(chosen.overrides)) == r"model\.layers\.0\..*"
    assert all(r"layers\.1" in regex for regex in list(chosen.overrides)[1:])


def test_a_conversion_goes_on_with_what_was_chosen(
    source: Path, config: SamoyedsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "out"
    chosen = with_budget(source, config, 0.75, progress=False)
    finish = ConversionState.finish

    def stop(self: ConversionState, *rest: object) -> None:
        finish(self, *rest)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConversionState, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(source, destination, chosen, progress=False)
    monkeypatch.setattr("samoyeds_hf.budget.budget_overrides", None)  # not measured again
    again = with_budget(source, config, 0.75, destination=destination, progress=False)
    assert again == chosen
    convert_checkpoint(source, destination, again, resume=True, progress=False)
    assert SamoyedsConfig.from_dict(chosen.to_dict()) == chosen


def test_a_conversion_does_not_go_on_with_another_budget(
    source: Path, config: SamoyedsConfig, tmp_path: Path
) -> None:
    state = tmp_path / "out.partial" / "conversion.json"
    state.parent.mkdir()
    state.write_text('{"fingerprint": {"recipe": {"overrides": [], "budget": 0.75}}}')
    refused(
        CheckpointError,
        "found a budget of 0.75",
        call=lambda: with_budget(source, config, 0.6, destination=tmp_path / "out"),
    )
    state.write_text("{")
    refused(
        CheckpointError,
        "found it unreadable",
        call=lambda: with_budget(source, config, 0.6, destination=tmp_path / "out"),
    )


def test_what_cannot_be(source: Path, config: SamoyedsConfig) -> None:
    refused(ConfigError, "found 1.5", call=lambda: with_budget(source, config, 1.5))
    without = config.replace(calibration=None)
    refused(CalibrationError, "found none", call=lambda: with_budget(source, without, 0.75))
    refused(ConfigError, "found 'much'", call=lambda: config.replace(budget="much"))
