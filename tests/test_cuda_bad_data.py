"""Bad indices, metadata and packed bytes that were forced through read and write nothing foreign.

Needs a CUDA device.
"""

from __future__ import annotations

import pytest
import torch
from cuda_helpers import (
    DEVICE,
    GPU,
    Guarded,
    Layer,
    Shape,
    Weight,
    generator,
    linear,
    moe_down,
    moe_mlp,
    moe_up,
    random_layer,
    random_seed,
    synchronize,
    unpack,
)
from helpers import assert_same_bits

from samoyeds_hf.format import SparseWeight

pytestmark = GPU

KINDS = ["2:4", "4:4:32", "1:2:32", "1:2:64", "1:2:128", "1:2:8", "4:8:32", "3:5:8", "1:16:32"]
KINDS += ["3:4:32", "3:4:64"]


def check_that_nothing_foreign_is_touched(layer: Layer) -> None:
    """The borders of outputs and workspace are checked in each call, CUDA errors by waiting."""
    moe_mlp(layer)
    moe_up(layer)
    inner = torch.zeros(layer.top_k_index.numel(), layer.shape.inner, device=DEVICE)
    moe_down(layer, inner.to(layer.hidden.dtype))
    for weight in (layer.gate_up, layer.down):
        unpack(weight.packed, weight)
        single = Weight(SparseWeight(*(t[:1] for t in weight.stored)), weight.pattern, weight.rows)
        num_bytes = weight.packed.num_bytes // weight.experts
        if not weight.is_gate_up:
            vars(single)["packed"] = Guarded.around(weight.packed.bytes[:num_bytes])
        linear(single, torch.zeros(20, weight.cols, dtype=weight.dtype, device=DEVICE))
    synchronize()


def layer_of(text: str, seed: int) -> Layer:
    sizes = {"3:5:8": (40, 40), "4:4:32": (96, 96)}.get(
        text, (128, 160 if text != "1:2:128" else 128)
    )
    hidden, inner = sizes
    if inner % 64 and text in ("1:2:64", "3:4:64"):
        inner = 192
    shape = Shape(70, experts=3, hidden=hidden, inner=inner, up=text, down=text)
    return random_layer(shape, torch.bfloat16, seed)


@pytest.mark.parametrize("text", KINDS)
def test_forced_bad_index_and_meta(text: str) -> None:
    """Validation refuses these when a checkpoint is loaded; even so they must not hurt."""
    seed = random_seed()
    rng = generator(seed)
    for index_byte in (255, 16, 2, None):
        for meta_byte in (0x00, 0xFF, 0x40, None):
            layer = layer_of(text, seed)
            for weight in (layer.gate_up, layer.down):
                for tensor, byte in (
                    (weight.stored.index, index_byte),
                    (weight.stored.meta, meta_byte),
                ):
                    if byte is None:
                        tensor.random_(0, 256, generator=rng)
                    else:
                        tensor.fill_(byte)
            check_that_nothing_foreign_is_touched(layer)


@pytest.mark.parametrize("text", KINDS)
def test_random_bytes_as_a_packed_weight(text: str) -> None:
    seed = random_seed()
    layer = layer_of(text, seed)
    for fill in (None, 0xFF, 0x00, 0x7F):
        for weight in (layer.gate_up, layer.down):
            if fill is None:
                weight.packed.bytes.random_(0, 256, generator=generator(seed))
            else:
                weight.packed.bytes.fill_(fill)
        check_that_nothing_foreign_is_touched(layer)


def test_neighbours_of_a_bad_expert_are_right() -> None:
    """Garbage in one expert changes the tokens of that expert alone."""
    for text in ("1:2:32", "3:4:32", "2:4", "4:8:32"):
        layer = layer_of(text, random_seed())
        clean = moe_mlp(layer)
        for weight in (layer.gate_up, layer.down):
            weight.packed.bytes.view(3, -1)[1].random_(0, 256)
        found = moe_mlp(layer)
        others = (layer.top_k_index != 1).all(dim=1)
        assert_same_bits(found[others], clean[others])
