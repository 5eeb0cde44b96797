"""Calibrated pruning of a model in memory: what cannot be pruned, and what is interrupted."""

from __future__ import annotations

import pytest
import torch
from helpers import loop_mask
from tiny_models import (
    MIXTRAL,
    PATTERN,
    Family,
    make_toy,
    same_state,
)
from torch import nn
from transformers import PreTrainedModel
from walking import IDS, prune

from samoyeds_hf import SamoyedsConfig, SparsityPattern
from samoyeds_hf.errors import CalibrationError, CheckpointError, PatternError
from samoyeds_hf.pruning.decoder import Decoder
from samoyeds_hf.pruning.layer import PruneSettings
from samoyeds_hf.pruning.walk import InMemory, Walk, prune_model
from samoyeds_hf.selection import select


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS[0], r"must be \[sequences, length\], found \[9\]"),
        (IDS[:0], r"must be \[sequences, length\], found \[0, 9\]"),
        (IDS[:, :0], r"must be \[sequences, length\], found \[6, 0\]"),
        (IDS[None], r"must be \[sequences, length\], found \[1, 6, 9\]"),
        (IDS + 128, "in the model's vocabulary, 0 to 127, found 1[0-9][0-9] to 2[0-9][0-9]; use"),
        (torch.as_tensor([[5, -1]]), "in the model's vocabulary, 0 to 127, found -1 to 5; use"),
    ],
)
def test_bad_tokens(ids: torch.Tensor, message: str) -> None:
    model, before = MIXTRAL.make(), MIXTRAL.make()
    with pytest.raises(CalibrationError, match=message) as info:
        prune(model, ids=ids)
    assert "\n" not in str(info.value)
    assert same_state(model, before)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm", "magnitude"])
def test_weights_that_are_not_finite(method: str) -> None:
    model = MIXTRAL.make()
    name = "model.layers.1.mlp.experts.down_proj"
    model.get_parameter(name).data[2, 3, 5] = float("nan")
    with pytest.raises(CheckpointError, match="must be finite to be pruned, found nan") as info:
        prune(model, method, refine=True)
    assert name in str(info.value)
    assert "\n" not in str(info.value)


def test_weights_that_are_not_finite_in_a_group_of_experts() -> None:
    model = MIXTRAL.make()
    model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").data[2, 3, 5] = float("nan")
    place = r"gate_up_proj\[2:3\] .* row 3 of matrix 0, column 5"
    with pytest.raises(CheckpointError, match=place):
        prune(model, moments_bytes=1)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.0.self_attn.v_proj.weight"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(name: str, value: float) -> None:
    model = MIXTRAL.make()
    model.get_parameter(name).data.fill_(value)
    with pytest.raises(CalibrationError, match=r"must be finite .*found NaN or infinity") as info:
        prune(model)
    assert "\n" not in str(info.value)


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    model = MIXTRAL.make()
    model.get_parameter("model.layers.1.self_attn.v_proj.weight").data.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=r"model\.layers\.1"):
        prune(model)


def test_a_pattern_that_does_not_divide() -> None:
    model = MIXTRAL.make()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(PatternError):
        prune_model(model, {name: SparsityPattern.parse("1:2:48")}, IDS, PruneSettings("wanda"))


def unreachable() -> PreTrainedModel:
    """A router that never sends a token to expert 3: its score is the mean of the others'."""
    settings = {**MIXTRAL.settings, "num_experts_per_tok": 1}
    model = Family("top1", "Mixtral", settings).make()
    for layer in model.model.layers:
        weight = layer.mlp.gate.weight.data
        weight[3] = weight[:3].mean(dim=0)
    return model


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm", "best"])
@pytest.mark.parametrize("memory", [1, 10**9])
def test_an_expert_that_no_token_reaches(method: str, memory: int) -> None:
    model, dense = unreachable(), unreachable()
    for weight in prune(model, method, moments_bytes=memory):
        assert weight.tokens[3] == 0
        assert sum(weight.tokens) == IDS.numel()
        fallback = "is pruned by magnitude"
        if weight.name.endswith("gate_up_proj"):
            fallback = "uses the moments of its layer"
        (note,) = [note for note in weight.notes if note.startswith("expert 3: ")]
        assert note == f"expert 3: no calibration token reached this expert: it {fallback}"
        if weight.name.endswith("down_proj"):
            kept = dense.get_parameter(weight.name)[3]
            assert torch.equal(weight.mask[3], loop_mask(kept, SparsityPattern.parse(PATTERN)))
        assert torch.isfinite(model.get_parameter(weight.name)).all()
        assert 0 < weight.errors[3] < 1


def test_a_linear_that_no_token_reaches() -> None:
    """A list of experts with the routing inside: one whose module is never called."""
    model = make_toy()

    def first_only(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.experts[0](x) + self.shared_expert(x)
        return out

    block = type("First", (type(model.layers[0]),), {"forward": first_only})
    for layer in model.layers:
        layer.__class__ = block
    for weight in prune(model):
        if ".experts.0." in weight.name:
            assert weight.tokens == (IDS.numel(),)
        else:
            assert weight.tokens == (0,)
            assert weight.notes == (
                "no calibration token reached this expert: it is pruned by magnitude",
            )


def test_a_walk_that_goes_on_where_another_one_stood() -> None:
    whole, halves = MIXTRAL.make(), MIXTRAL.make()
    prune(whole)
    targets = select(halves, SamoyedsConfig(PATTERN)).targets
    layers = InMemory(Decoder.find(halves, targets))
    first = Walk(layers, targets, IDS, PruneSettings("wanda"))
    next(iter(first))
    kept = [hidden.clone() for hidden in first.hidden]
    second = Walk(layers, targets, IDS, PruneSettings("wanda"))
    second.resume(1, kept)
    assert [result.index for result in second] == [1]
    assert same_state(whole, halves)
