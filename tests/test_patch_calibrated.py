"""patch_model with calibration data: the weights are the walk's, and bad data is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibrated, letters_tokenizer, tokens_of, write_text
from helpers import relative
from tiny_models import BY_NAME, MIXTRAL, PATTERN, logits, same_state, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

import samoyeds_hf
from samoyeds_hf import SamoyedsConfig
from samoyeds_hf.errors import CalibrationError, UnsupportedModelError
from samoyeds_hf.pruning.layer import PruneSettings
from samoyeds_hf.pruning.walk import prune_model
from samoyeds_hf.selection import select

WANDA = SamoyedsConfig(PATTERN, "wanda")


def data_of(model: PreTrainedModel) -> torch.Tensor:
    return tokens(10, 12) % model.config.get_text_config().vocab_size


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gemma4"])
def test_calibrated_weights_are_those_of_the_walk(name: str) -> None:
    dense, sparse = BY_NAME[name].make(), BY_NAME[name].make()
    config = SamoyedsConfig(PATTERN, "sparsegpt", modules=["experts", "shared_experts"])
    report = samoyeds_hf.patch_model(sparse, config=config, calibration=data_of(sparse))
    targets = select(dense, config).targets
    pruned = prune_model(dense, targets, data_of(dense), PruneSettings("sparsegpt"))
    assert [row.name for row in report.weights] == list(targets)
    by_name = {weight.name: weight for weight in pruned}
    for row in report.weights:
        weight = by_name[row.name]
        assert (row.output_error, row.tokens, row.notes) == (
            weight.error,
            weight.tokens,
            weight.notes,
        )
    assert report.calibration is None  # tokens have no name
    assert relative(logits(sparse), logits(dense)) < 1e-5
    samoyeds_hf.unpatch_model(sparse)
    assert same_state(sparse, dense)


@pytest.mark.parametrize("training", [True, False])
def test_calibrated_model_is_saved_and_loaded(training: bool, tmp_path: Path) -> None:
    model = MIXTRAL.make(torch.bfloat16).train(training)
    config = SamoyedsConfig(PATTERN, "admm", refine=True, calibration={"data": "/not/read.txt"})
    samoyeds_hf.patch_model(model, config=config, calibration=data_of(model))
    assert model.training is training
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert same_state(model, again)
    stored = again.config.quantization_config
    assert (stored.method, stored.refine, stored.calibration) == ("admm", True, None)
    assert torch.equal(logits(model.eval()), logits(again))


def test_calibration_by_a_tokenizer(tmp_path: Path) -> None:
    text = write_text(tmp_path / "letters.txt")
    one, other = MIXTRAL.make(), MIXTRAL.make()
    config = calibrated(text)
    report = samoyeds_hf.patch_model(one, config=config, calibration=letters_tokenizer())
    samoyeds_hf.patch_model(other, config=config, calibration=tokens_of(text))
    assert same_state(one, other)
    assert report.calibration is not None
    assert (report.calibration["data"], report.calibration["samples"]) == ("letters.txt", 10)
    checked = config.replace(calibration={**config.calibration.to_dict(), "sha256": "0" * 64})
    with pytest.raises(CalibrationError, match="must have the sha256 000"):
        samoyeds_hf.patch_model(MIXTRAL.make(), config=checked, calibration=letters_tokenizer())


IDS = tokens(4, 9)
NEEDS = "Method 'wanda' needs calibration data, found none; pass tokens as calibration=, or"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, NEEDS),
        (letters_tokenizer(), NEEDS),  # it says how to read, and the configuration not what
        (IDS[0], r"must be \[sequences, length\] int64, found torch.int64 \[9\]; cut"),
        (IDS[:0], r"int64, found torch.int64 \[0, 9\]"),
        (IDS.int(), "int64, found torch.int32"),
        (IDS.float(), "int64, found torch.float32"),
        (IDS + 128, "in the model's vocabulary, 0 to 127, found 1"),
        (-IDS, "in the model's vocabulary, 0 to 127, found -1"),
        (tokens(1, 129), "must fit the model's max_position_embeddings, 128 tokens, found 129"),
    ],
    ids=["none", "tokenizer", "1-D", "empty", "int32", "float", "large", "negative", "long"],
)
def test_calibration_that_cannot_be_used(data: Any, message: str) -> None:
    model, before = MIXTRAL.make(), MIXTRAL.make()
    with pytest.raises(CalibrationError, match=message) as info:
        samoyeds_hf.patch_model(model, config=WANDA, calibration=data)
    assert "\n" not in str(info.value)
    assert same_state(model, before)
    assert not hasattr(model, "hf_quantizer")
    samoyeds_hf.patch_model(model, config=WANDA, calibration=tokens(1, 128))  # as long as can be


@pytest.mark.parametrize("settings", [{"method": "wanda"}, {"refine": True}], ids=str)
@pytest.mark.parametrize("data", [None, {"data": "somewhere.txt"}], ids=["no data", "data"])
def test_no_data_is_seen_while_loading(
    data: dict[str, str] | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    MIXTRAL.make().save_pretrained(tmp_path)
    config = SamoyedsConfig(PATTERN, calibration=data, **settings)
    with pytest.raises(CalibrationError) as info:
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    message = str(info.value)
    assert "Pruning while loading sees no data" in message
    assert "convert the checkpoint with 'samoyeds convert --calibration'" in message
    assert "patch_model(..., calibration=...)" in message
    assert "\n" not in message


def test_data_that_turns_out_bad_on_the_way() -> None:
    """Layers before are sparse already, as the documentation of patch_model says."""
    model = MIXTRAL.make()
    model.get_parameter("model.layers.1.self_attn.v_proj.weight").data.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="must be finite"):
        samoyeds_hf.patch_model(model, config=WANDA, calibration=IDS)
    kinds = [type(layer.mlp.experts).__name__ for layer in model.model.layers]
    assert kinds == ["SamoyedsExperts", "MixtralExperts"]


def test_weights_that_are_not_finite_are_known_before() -> None:
    model = MIXTRAL.make()
    name = "model.layers.1.mlp.experts.down_proj"
    model.get_parameter(name).data[1, 2, 3] = float("nan")
    with pytest.raises(UnsupportedModelError, match=f"{name} must be finite"):
        samoyeds_hf.patch_model(model, config=WANDA, calibration=IDS)
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"


def test_layers_that_cannot_run_alone() -> None:
    model, before = BY_NAME["hy_v4"].make(), BY_NAME["hy_v4"].make()
    with pytest.raises(UnsupportedModelError, match="use method 'magnitude'"):
        samoyeds_hf.patch_model(model, config=WANDA, calibration=IDS)
    assert same_state(model, before)
    logits(model)
    samoyeds_hf.patch_model(model, PATTERN)  # the way out that the message names
