"""The products of the kernel library against fp64, through its C interface, on fresh random inputs.

Outputs and workspaces are poisoned and guarded, see cuda_helpers.py. Needs a CUDA device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_checks import both_dtypes, check_down, check_linear, check_mlp, check_up
from cuda_helpers import (
    GPU,
    HALF_DTYPES,
    ROUTINGS,
    Shape,
    fresh_examples,
    generator,
    linear,
    moe_down,
    moe_mlp,
    moe_up,
    random_layer,
    random_weight,
)
from helpers import assert_as_good_as_dense, assert_same_bits, silu_gate
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from samoyeds_hf import SparsityPattern
from samoyeds_hf.errors import PatternError

pytestmark = GPU


# --- shapes that Hypothesis draws ------------------------------------------------------------

SIZES = (8, 16, 24, 40, 64, 72, 96, 128, 136, 192, 256, 384, 512, 1408)
FAST_ROWS = ((1, 2), (3, 4), (2, 2), (4, 4))
FAST = [f"{n}:{m}:{v}" for n, m in FAST_ROWS for v in (32, 64, 96, 128, 256)]
GENERAL = ["4:8:32", "8:16:64", "3:5:8", "1:16:64", "1:2:4", "1:2:16", "15:16:8", "16:16:8"]
GENERAL += ["3:4:4", "3:4:16", "2:3:32", "7:8:32"]
MAX_ELEMENTS = 1 << 25  # of a dense weight with all experts


def fitting(rows: int, k: int) -> list[str]:
    """The patterns that divide a weight ``[rows, k]``; the whole row is a Sub-Row too."""
    whole_row = [f"{n}:{m}:{k}" for n, m in ((1, 2), (3, 4), (2, 2), (4, 8), (3, 5), (15, 16))]
    found = []
    for text in dict.fromkeys(["2:4", *FAST, *whole_row, *GENERAL]):
        try:
            SparsityPattern.parse(text).check_fits(rows, k)
        except PatternError:
            continue
        found.append(text)
    return found


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    hidden, inner = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    most = min(256, max(1, MAX_ELEMENTS // (2 * hidden * inner)))
    experts = draw(st.one_of(st.integers(1, min(most, 9)), st.integers(1, most), st.just(most)))
    top_k = draw(st.integers(1, 8))
    routings = [name for name in ROUTINGS if name != "distinct" or top_k <= experts]
    return Shape(
        tokens=draw(st.one_of(st.integers(0, 40), st.integers(0, 300), st.just(4096))),
        experts=experts,
        top_k=top_k,
        hidden=hidden,
        inner=inner,
        up=draw(st.sampled_from(fitting(2 * inner, hidden))),
        down=draw(st.sampled_from(fitting(hidden, inner))),
        routing=draw(st.sampled_from(routings)),
        weights_dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
    )


seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from(HALF_DTYPES)


@fresh_examples(60)
@given(shapes(), dtypes, seeds)
def test_any_layer(shape: Shape, dtype: torch.dtype, seed: int) -> None:
    check_mlp(random_layer(shape, dtype, seed))


@fresh_examples(40)
@given(shapes(), dtypes, seeds)
def test_any_layer_with_a_gate_of_its_own(shape: Shape, dtype: torch.dtype, seed: int) -> None:
    layer = random_layer(shape, dtype, seed)
    check_up(layer)
    check_down(layer, seed)


@fresh_examples(40)
@given(st.data(), st.integers(0, 300), st.sampled_from(SIZES), st.sampled_from(SIZES), dtypes)
def test_any_linear(data: st.DataObject, num_rows: int, m: int, k: int, dtype: Any) -> None:
    rng = generator(data.draw(seeds))
    text = data.draw(st.sampled_from(fitting(m, k)))
    weight = random_weight((1, m, k), text, dtype, rng)
    x = torch.randn(num_rows, k, generator=rng, device="cuda").to(dtype)
    check_linear(weight, x)


# --- shapes that are easily wrong ------------------------------------------------------------

NASTY = {
    "no token": Shape(0),
    "one token": Shape(1),
    "7 tokens, one less than a fragment": Shape(7, experts=1, top_k=1),
    "9 tokens, one more than a fragment": Shape(9, experts=1, top_k=1),
    "fewer tokens than experts: most are idle": Shape(3, experts=61, top_k=1),
    "prime number of experts": Shape(50, experts=13, top_k=3),
    "every token asks every expert": Shape(33, experts=8, top_k=8, routing="distinct"),
    "one expert": Shape(70, experts=1, top_k=1),
    "the same expert in all 8 places": Shape(40, experts=4, top_k=8, routing="one"),
    "all tokens to the last of many": Shape(300, experts=60, top_k=1, routing="one"),
    "only the first and last expert": Shape(129, experts=64, top_k=2, routing="few"),
    "nobody's": Shape(20, routing="nobody"),
    "sentinels of expert parallel": Shape(200, experts=3, top_k=4, routing="sentinels"),
    "pairs counted by a kernel of their own, sentinels": Shape(
        1400, experts=61, top_k=3, routing="sentinels"
    ),
    "256 experts, 8 choices": Shape(
        300, experts=256, top_k=8, hidden=64, inner=64, routing="distinct"
    ),
    "256 experts, one token": Shape(1, experts=256, top_k=8, routing="distinct"),
    "Sub-Row = row": Shape(37, hidden=256, inner=160, up="1:2:256", down="1:2:160"),
    "Sub-Row = row, k = 8": Shape(37, hidden=8, inner=8, up="1:2:8", down="1:2:8"),
    "k = 8": Shape(21, hidden=8, inner=8, up="2:4", down="2:4"),
    "16 kept rows and 8 more": Shape(21, hidden=48, inner=24, up="1:2:16", down="1:2:24"),
    "kept rows no multiple of 16": Shape(21, hidden=40, inner=72, up="2:4", down="2:4"),
    "4 kept rows of gate, 4 of up": Shape(21, hidden=64, inner=8, up="1:2:32", down="1:2:8"),
    "k one step over a block": Shape(21, hidden=160, inner=288),
    "k one group over a step": Shape(21, hidden=136, inner=40, up="2:4", down="2:4"),
    "11 x 128 columns": Shape(90, hidden=2048, inner=1408, up="1:2:128", down="1:2:128"),
    "6 x 128 columns": Shape(90, hidden=2048, inner=768, up="1:2:64", down="1:2:128"),
    "long rows, few columns": Shape(40, hidden=4096, inner=64, up="1:2:128"),
    "V = 96 straddles blocks": Shape(40, hidden=384, inner=288, up="1:2:96", down="1:2:96"),
    "V = 256, two blocks": Shape(40, hidden=768, inner=256, up="1:2:256", down="1:2:256"),
    "3 of 4, 2 blocks of gate rows": Shape(21, hidden=32, inner=8, up="3:4:32", down="3:4:4"),
    "3 of 4, k one step over a block": Shape(21, hidden=160, inner=288, up="3:4:32", down="3:4:32"),
    "3 of 4, 10 blocks of gate rows": Shape(21, hidden=224, inner=40, up="3:4:32", down="2:4"),
    "3 of 4, 18 blocks of rows": Shape(21, hidden=72, inner=96, up="3:4:8", down="3:4:32"),
    "3 of 4, Sub-Row = row": Shape(37, hidden=256, inner=160, up="3:4:256", down="3:4:160"),
    "3 of 4, V = 96 straddles blocks": Shape(40, hidden=384, inner=288, up="3:4:96", down="3:4:96"),
    "3 of 4, 11 x 128 columns": Shape(90, hidden=2048, inner=1408, up="3:4:128", down="3:4:128"),
    "3 of 4 and 1 of 2": Shape(90, hidden=256, inner=384, up="3:4:64", down="1:2:128"),
    "1 of 2 and 3 of 4": Shape(90, hidden=256, inner=384, up="1:2:128", down="3:4:64"),
    "3 of 4 and general": Shape(40, hidden=128, inner=128, up="3:4:128", down="4:8:32"),
    "general and 3 of 4": Shape(40, hidden=128, inner=128, up="4:8:32", down="3:4:128"),
    "N = M with V": Shape(40, hidden=256, inner=136, up="2:2:64", down="4:4:8"),
    # A block of 16 rows holds the last gate rows and the first up rows: they cannot share a tile.
    "a block across gate and up": Shape(40, hidden=64, inner=24, up="16:16:8", down="2:4"),
    "a general block across gate and up": Shape(40, hidden=64, inner=24, up="8:16:64", down="2:4"),
    "5 rows of a block": Shape(40, hidden=40, inner=40, up="3:5:8", down="3:5:40"),
    "1 of 16": Shape(40, hidden=64, inner=128, up="1:16:32", down="1:16:64"),
    "15 of 16": Shape(40, hidden=64, inner=128, up="15:16:32", down="15:16:4"),
    "shortest Sub-Row": Shape(40, hidden=128, inner=64, up="1:2:4", down="4:8:4"),
    "fast and general": Shape(40, hidden=128, inner=128, up="1:2:128", down="4:8:32"),
    "general and fast": Shape(40, hidden=128, inner=128, up="4:8:32", down="1:2:128"),
    "general and 2:4": Shape(40, hidden=128, inner=128, up="8:16:32", down="2:4"),
    "routing weights in bf16": Shape(40, top_k=8, weights_dtype=torch.bfloat16),
    "routing weights in fp16": Shape(40, top_k=8, weights_dtype=torch.float16),
    "prefill": Shape(4096, experts=8, hidden=512, inner=448, up="1:2:128", down="1:2:64"),
    "prefill of 3 of 4": Shape(4096, experts=8, hidden=512, inner=448, up="3:4:128", down="3:4:64"),
    "prefill of 2:4": Shape(4096, experts=8, hidden=512, inner=448, up="2:4", down="2:4"),
    "prefill, general": Shape(2048, experts=8, hidden=256, inner=160, up="4:8:32", down="8:16:32"),
}


@both_dtypes
@pytest.mark.parametrize("reason", NASTY)
def test_nasty_shapes(reason: str, dtype: torch.dtype, seed: int) -> None:
    layer = random_layer(NASTY[reason], dtype, seed)
    check_mlp(layer)
    check_up(layer)
    check_down(layer, seed)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(65536, experts=4, top_k=8, hidden=64, inner=64),
        Shape(65536, experts=256, top_k=1, hidden=64, inner=64, routing="one"),
        Shape(65536, experts=7, top_k=2, hidden=64, inner=64, up="2:4", down="1:2:16"),
        Shape(65536, experts=3, top_k=8, hidden=64, inner=64, up="4:8:32", down="4:8:32"),
    ],
    ids=str,
)
def test_most_tokens(shape: Shape, seed: int) -> None:
    """More than 2^19 pairs, more than 2^15 of them at one expert."""
    check_mlp(random_layer(shape, torch.bfloat16, seed))


@pytest.mark.parametrize(
    "tokens", [*range(1, 18), 24, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257]
)
@pytest.mark.parametrize("text", ["1:2:64", "1:2:128", "3:4:64", "3:4:128", "2:4", "4:8:64"])
def test_every_number_of_tokens_around_a_tile(text: str, tokens: int, seed: int) -> None:
    shape = Shape(tokens, experts=2, top_k=1, hidden=256, inner=192, up=text, down="1:2:64")
    check_mlp(random_layer(shape, torch.bfloat16, seed))


@both_dtypes
def test_tokens_do_not_see_each_other(dtype: torch.dtype, seed: int) -> None:
    """A token that overflowed stays alone with it, also where k has a tail (136 = 128 + 8)."""
    for up, down in (("1:2:8", "1:2:40"), ("2:4", "2:4"), ("1:2:136", "4:8:8")):
        shape = Shape(50, experts=3, hidden=136, inner=40, up=up, down=down)
        layer = random_layer(shape, dtype, seed)
        clean = moe_mlp(layer)
        bad = [0, 13, 49]
        layer.hidden[bad] = float("nan")
        ours = moe_mlp(layer)
        # Not all of it: a row that no expert of the token keeps (V = k) is zero times nothing.
        assert ours[bad].isnan().any(dim=1).all()
        others = [token for token in range(50) if token not in bad]
        assert_same_bits(ours[others], clean[others])


def test_unread_experts_do_not_show(seed: int) -> None:
    """Weights of an expert that no token asks for may be anything."""
    layer = random_layer(Shape(40, experts=6, routing="few"), torch.bfloat16, seed)
    clean = moe_mlp(layer)
    for weight in (layer.gate_up, layer.down):
        weight.packed.tensor.view(6, -1)[1:5] = 0xFF
    assert_same_bits(moe_mlp(layer), clean)


@both_dtypes
@pytest.mark.parametrize("text", ["2:4", "1:2:64", "3:4:64", "2:2:8", "1:1:64"])
def test_sum_over_choices_is_in_fp32_and_in_order(dtype: torch.dtype, text: str) -> None:
    """2^14 + 2^-12 - 2^14 is 0 in fp32, and 2^-12 in another order of the same three."""
    rows = torch.tensor([2.0**14, 2.0**-12, -(2.0**14)], device="cuda").to(dtype)
    layer = random_layer(Shape(1, 1, 3, 64, 64, down=text), dtype, 0)
    # Every kept value is 1, and x has a single element: an output is that element, or zero.
    layer.down.stored.values.fill_(1)
    one_hot = torch.zeros(64, device="cuda", dtype=dtype)
    one_hot[0] = 1
    hit = layer.down.dense[0, :, 0] != 0  # [H]
    assert hit.any()
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2]):
        inner = rows[order, None] * one_hot
        layer.top_k_index.zero_()
        layer.top_k_weights.fill_(1)
        total = torch.zeros((), device="cuda")
        for row in rows[order].float():
            total = total + row
        expected = torch.where(hit, total, 0).to(dtype)[None]
        assert torch.equal(moe_down(layer, inner), expected), order


def test_sums_that_bf16_would_lose(seed: int) -> None:
    """About 2048 terms of 2^-9 an output: in bf16 the sum would stop growing at 1."""
    rng = generator(seed)
    weight = random_weight((1, 64, 8192), "1:2:128", torch.bfloat16, rng)
    weight.stored.values.fill_(2.0**-9)
    x = torch.ones(5, 8192, dtype=torch.bfloat16, device="cuda")
    exact = functional.linear(x.double(), weight.dense[0].double())
    assert torch.equal(linear(weight, x).double(), exact.to(torch.bfloat16).double())


def test_up_of_a_weight_that_is_no_gate(seed: int) -> None:
    """moe_up multiplies any weight: rows in their own order whether or not tiles interleave."""
    layer = random_layer(Shape(30, hidden=128, inner=96), torch.bfloat16, seed)
    plain = random_weight((5, 192, 128), "1:2:32", torch.bfloat16, generator(seed))
    check_up(layer, weight=plain)


def test_parts_equal_the_whole(seed: int) -> None:
    """moe_up, SiLU(gate) * up, moe_down are the layer, but for the rounding of the inner rows."""
    layer = random_layer(Shape(64, experts=4), torch.float16, seed)
    parts = moe_down(layer, silu_gate(moe_up(layer)))
    exact = layer.reference(torch.float64)
    assert_as_good_as_dense(parts, layer.reference(torch.float16), exact)
    torch.testing.assert_close(parts, moe_mlp(layer), rtol=1e-2, atol=1e-2)


def test_layers_do_not_depend_on_the_state_of_the_device(seed: int) -> None:
    """Shared memory, L2 and workspace that others left behind change nothing."""
    layer = random_layer(Shape(77, experts=6, top_k=3), torch.bfloat16, seed)
    other = random_layer(Shape(512, experts=3, hidden=512, inner=512), torch.bfloat16, seed)
    first = moe_mlp(layer)
    for _ in range(20):
        other.hidden.fill_(float("inf"))
        moe_mlp(other)
        assert_same_bits(moe_mlp(layer), first)
