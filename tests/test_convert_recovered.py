"""Conversions that train what is left: layer by layer, or the whole model after pruning."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from calibrated import LENGTH, SAMPLES, calibrated, letters_tokenizer, save_source
from checkpoints import contents, convert, load_as_auto, poke, refused
from tiny_models import BY_NAME, same_state
from transformers import AutoConfig

import samoyeds_hf
from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.pruning.calibration import Calibration
from samoyeds_hf.pruning.distill_settings import DistillSettings
from samoyeds_hf.pruning.recover import BlockSettings
from samoyeds_hf.recovery import recover_checkpoint
from samoyeds_hf.report_files import read_report
from samoyeds_hf.verify import check_checkpoint

pytest_plugins = ("layerwise",)
pytestmark = pytest.mark.usefixtures("still")


def test_recovery_by_layers_is_logged(source: Path, text: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", calibrated(text, recover="block"))
    assert report.recover == "block"
    head, *rows = (tmp_path / "out" / "samoyeds_block.csv").read_text().splitlines()
    assert head == "step,loss,learning_rate,layer"
    num_layers = AutoConfig.from_pretrained(source).num_hidden_layers
    assert [int(row.split(",")[0]) for row in rows] == list(range(len(rows)))
    assert {int(row.split(",")[-1]) for row in rows} == set(range(num_layers))
    losses = [float(row.split(",")[1]) for row in rows[: len(rows) // num_layers]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_recovery_by_layers_trains_all_of_them(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers that have pruned weights, and nothing else; of DeepSeek-V3 the first has none."""
    # with the usual rate so few batches do not help, and the old weights come back
    slow = partial(BlockSettings, learning_rate=1e-4)
    monkeypatch.setattr("samoyeds_hf.pruning.layer.BlockSettings", slow)
    source = save_source(BY_NAME[name], tmp_path / "dense")
    config = calibrated(text, recover="block")
    report = convert(source, tmp_path / "out", config)
    assert report.trained == "layers"
    layers = {weight.name.split(".")[2] for weight in report.weights}
    old, new = contents(source), contents(tmp_path / "out")
    model = load_as_auto(tmp_path / "out")
    parameters = {n for n, _ in model.named_parameters()}
    changed = {n for n in old.keys() & new.keys() if old[n] != new[n]}
    assert {n.split(".")[2] for n in changed} == layers
    assert changed <= parameters
    assert any("attn" in n for n in changed)
    checked = check_checkpoint(tmp_path / "out", source, progress=False)
    assert checked.changed == ()
    assert checked.trained >= len(changed)
    assert "of them trained" in str(checked)
    # and in memory
    patched = load_as_auto(source)
    again = samoyeds_hf.patch_model(patched, config=config, calibration=letters_tokenizer())
    assert again.trained == "layers"
    assert same_state(patched, model)
    # outside those layers a difference is damage
    poke(tmp_path / "out", "lm_head.weight", (0, 0), b"\x01\x02")
    assert check_checkpoint(tmp_path / "out", source, progress=False).changed == ("lm_head.weight",)


def test_recovery_by_layers_is_remembered_by_what_comes_after(
    source: Path, text: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out", calibrated(text, recover="block"))
    settings = DistillSettings(steps=2, batch_size=2, train="experts")
    calibration = Calibration(str(text), SAMPLES, LENGTH)
    given = {"progress": False, "device": "cpu"}
    recover_checkpoint(tmp_path / "out", source, tmp_path / "more", calibration, settings, **given)
    assert read_report(tmp_path / "more").trained == "layers"
    assert check_checkpoint(tmp_path / "more", source, progress=False).changed == ()


def test_distilling_conversion_goes_on_after_pruning(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer_steps = partial(DistillSettings, steps=60)
    monkeypatch.setattr("samoyeds_hf.recovery.DistillSettings", fewer_steps)
    config = calibrated(text, recover="distill")
    whole = convert(source, tmp_path / "whole", config)
    assert whole.recover == "distill"
    with monkeypatch.context() as patch:
        patch.setattr("samoyeds_hf.recovery.distill", stopped)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", config)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["out.partial", "out.pruned", "whole"]
    other = calibrated(text, "sparsegpt", recover="distill")
    refused(
        CheckpointError,
        "found another recipe",
        call=lambda: convert(source, tmp_path / "out", other, resume=True),
    )
    convert(source, tmp_path / "out", config, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def stopped(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
