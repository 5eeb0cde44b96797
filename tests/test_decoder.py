"""Decoder layers run one by one: what the model does bit for bit, or a refusal in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SINGLE
from safetensors.torch import save_file
from test_hosts import HUB_CONFIG, hub_weights
from tiny_models import (
    BY_NAME,
    FAMILIES,
    MIXTRAL,
    PATTERN,
    Family,
    ToyBlock,
    ToyConfig,
    ToyModel,
    logits,
    make_toy,
    tokens,
)
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from samoyeds_hf import SamoyedsConfig, hosts
from samoyeds_hf.errors import UnsupportedModelError
from samoyeds_hf.pruning.decoder import Call, Decoder, alike, run_layer
from samoyeds_hf.pruning.layer import PruneSettings
from samoyeds_hf.pruning.walk import prune_model
from samoyeds_hf.selection import select

# The layers of hy_v4 hand more than hidden states to each other.
WALKED = [family for family in FAMILIES if family.name != "hy_v4"]
GEMMA = BY_NAME["gemma4"]


def decoder_of(model: PreTrainedModel) -> Decoder:
    """The list of layers that holds a model's experts."""
    config = SamoyedsConfig("1:2:16", strict=False)
    return Decoder.find(model, select(model, config).targets)


@torch.no_grad()
def run_all(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """The last layer's output, each layer run by itself."""
    hidden, calls = decoder.record(ids)
    for layer, call in zip(decoder.layers, calls, strict=True):
        hidden = run_layer(layer, hidden, call)
    return hidden


def logits_after(decoder: Decoder, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits if ``hidden`` is what its last layer gives, whatever the tokens."""
    other = torch.full_like(ids, 3)
    handle = list(decoder.layers)[-1].register_forward_hook(lambda *_: hidden)
    try:
        return logits(decoder.model, other)
    finally:
        handle.remove()


def assert_walks(model: PreTrainedModel, batch: int, vocabulary: int = 128) -> None:
    decoder = decoder_of(model)
    ids = tokens(batch, 9, seed=batch) % vocabulary
    expected = logits(model, ids)
    found = logits_after(decoder, run_all(decoder, ids), ids)
    assert torch.equal(found, expected)
    assert not torch.equal(logits(model, torch.full_like(ids, 3)), expected)


# --- the same as the model ----------------------------------------------------------------------


@pytest.mark.roundtrip
@pytest.mark.parametrize("family", WALKED, ids=lambda family: family.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_one_by_one_give_the_models_logits(family: Family, dtype: torch.dtype) -> None:
    model = family.make(dtype)
    for batch in (1, 3):
        assert_walks(model, batch)


@pytest.mark.roundtrip
def test_a_model_of_our_own_from_the_hub(tmp_path: Path) -> None:
    for register in (hosts.register_configs, hosts.register_models):
        register()
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG))
    save_file(hub_weights(HUB_CONFIG), tmp_path / SINGLE, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for batch in (1, 3):
        assert_walks(model, batch, vocabulary=96)


def test_experts_in_a_list() -> None:
    model = make_toy()
    decoder = decoder_of(model)
    assert (decoder.path, decoder.parent_path) == ("layers", "")  # not that of the experts
    for batch in (1, 3):
        assert_walks(model, batch)


def test_inputs_per_layer_follow_the_tokens() -> None:
    """What a call holds beside the hidden states may differ from batch to batch."""
    settings = {**GEMMA.settings, "hidden_size_per_layer_input": 16}
    model = Family("ple", "Gemma4", settings, config=GEMMA.config, experts="experts").make()
    decoder = decoder_of(model)
    assert_walks(model, 2)
    one, other = (decoder.record(tokens(2, 9, seed=seed))[1] for seed in (1, 2))
    assert not alike(one, other)
    assert alike(one, decoder.record(tokens(2, 9, seed=1))[1])


def test_calls_without_anything_of_the_tokens_are_alike() -> None:
    decoder = decoder_of(MIXTRAL.make())
    one, other = (decoder.record(tokens(2, 9, seed=seed)) for seed in (1, 2))
    assert not torch.equal(one[0], other[0])
    assert alike(one[1], other[1])
    assert not alike(one[1], decoder.record(tokens(2, 7))[1])


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.ones(2)},
        {"x": torch.zeros(3)},
        {"x": torch.zeros(2, dtype=torch.int64)},
        {"x": None},
        {"y": {"a": (torch.zeros(1), 2)}},
        {"y": {"b": (torch.zeros(1), 1)}},
        {"y": {"a": (torch.zeros(1), 1, 1)}},
        {"y": {"a": [torch.zeros(1), 1]}},
        {"z": 1},
    ],
    ids=str,
)
def test_calls_that_differ(changed: dict[str, Any]) -> None:
    def call(**given: Any) -> Call:
        arguments = {"x": torch.zeros(2), "y": {"a": (torch.zeros(1), 1)}}
        return Call((torch.ones(1), None), {**arguments, **given})

    assert alike(call(), call())
    assert not alike(call(), call(**changed))
    assert not alike(call(), Call((torch.zeros(1), None), call().kwargs))


# --- refusals -----------------------------------------------------------------------------------


def assert_refused(model: PreTrainedModel, ids: torch.Tensor) -> str:
    with pytest.raises(UnsupportedModelError) as info:
        run_all(decoder_of(model), ids)
    message = str(info.value)
    assert message.startswith("Calibration needs ")
    assert message.endswith("use method 'magnitude', which needs no calibration.")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("batch", [1, 2, 3])  # two can be unpacked into two by mistake
def test_layers_that_return_more_than_hidden_states(batch: int) -> None:
    model = BY_NAME["hy_v4"].make()
    message = assert_refused(model, tokens(batch))
    assert "HYV4" in message
    logits(model)  # it is as it was


def test_layers_that_reuse_what_others_left() -> None:
    """Keys and values of an earlier layer: kept once, they would be those of another batch."""
    settings = {
        **GEMMA.settings,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    model = Family("kv", "Gemma4", settings, config=GEMMA.config, experts="experts").make()
    logits(model)
    assert "reads what another one left" in assert_refused(model, tokens())
    with pytest.raises(UnsupportedModelError, match="reads what another one left"):
        prune_model(
            model,
            select(model, SamoyedsConfig(PATTERN)).targets,
            tokens(4),
            PruneSettings("wanda", batch_size=2),
        )


class Towers(ToyModel):
    """Two lists of layers, as an encoder and a decoder have them."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.more = nn.ModuleList(ToyBlock(config) for _ in range(2))


def test_experts_in_two_lists_of_layers() -> None:
    model = Towers(ToyConfig())
    with pytest.raises(UnsupportedModelError) as info:
        decoder_of(model)
    assert "found ['layers', 'more'] in Towers; use method 'magnitude'" in str(info.value)


def test_names_in_no_list_at_all() -> None:
    with pytest.raises(UnsupportedModelError, match="list of layers, found none in ToyModel; use"):
        Decoder.find(make_toy(), ["head.weight", "embed.weight", "nothing.there"])


# --- the model stays as it was ------------------------------------------------------------------


class Broken(ToyModel):
    """Fails between its layers."""

    failure: type[Exception] = TypeError

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> CausalLMOutput:
        x = self.embed(input_ids)
        self.layers[0](x)
        raise self.failure("out of order")


def state(model: nn.Module) -> list[Any]:
    """Every module by identity, and what hangs on it."""
    return [
        (name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


def test_layers_are_put_back() -> None:
    model = MIXTRAL.make()
    before, expected = state(model), logits(model)
    decoder = decoder_of(model)
    decoder.record(tokens())
    assert state(model) == before
    assert "forward" not in vars(model.model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("failure", [TypeError, RuntimeError, IndexError])
def test_layers_are_put_back_after_an_error(
    failure: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "failure", failure)
    model = Broken(ToyConfig())
    before = state(model)
    decoder = decoder_of(model)
    kind = UnsupportedModelError if failure is TypeError else failure
    with pytest.raises(kind, match="out of order"):
        decoder.record(tokens())
    assert state(model) == before


def test_what_a_recorder_does_not_know_it_asks_the_layer() -> None:
    """Decoders read attributes of their layers, such as the kind of attention."""

    class Asking(ToyModel):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> CausalLMOutput:
            x = self.embed(input_ids)
            for layer in self.layers:
                x = layer(x, kind=layer.kind)
            return CausalLMOutput(logits=self.head(x))

    model = Asking(ToyConfig())
    for number, layer in enumerate(model.layers):
        layer.kind = f"kind {number}"
    _, calls = decoder_of(model).record(tokens())
    assert [call.kwargs for call in calls] == [{"kind": "kind 0"}, {"kind": "kind 1"}]
    assert all(call.args == () for call in calls)


# --- names --------------------------------------------------------------------------------------


def test_names_of_layers() -> None:
    decoder = decoder_of(MIXTRAL.make())
    assert (decoder.path, decoder.parent_path) == ("model.layers", "model")
    assert decoder.layer_of("model.layers.1.mlp.experts.down_proj") == 1
    assert decoder.layer_of("model.layers.11.input_layernorm.weight") == 11
    outside = ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight", "model.layersx")
    assert [decoder.layer_of(name) for name in outside] == [None] * 4
    assert decoder.is_needed_before("model.embed_tokens.weight")
    assert not decoder.is_needed_before("lm_head.weight")
    assert not decoder.is_needed_before("model.layers.0.mlp.gate.weight")


def test_names_of_layers_in_the_model_itself() -> None:
    decoder = decoder_of(make_toy())
    assert decoder.layer_of("layers.1.gate.weight") == 1
    assert decoder.is_needed_before("embed.weight")
    assert not decoder.is_needed_before("layers.1.gate.weight")


def test_layers_that_are_no_list() -> None:
    with pytest.raises(TypeError, match="embed is a Embedding"):
        _ = Decoder(make_toy(), "embed").layers
