"""The Hopper kernel's tiles of other sizes than most have, V = 128 alone: short and wide ones.

Needs a GPU of compute capability 9.0. Outputs and workspaces are poisoned and guarded, see
cuda_helpers.py.
"""

from __future__ import annotations

import re

import pytest
import torch
from cuda_checks import both_dtypes, check_linear, check_mlp
from cuda_helpers import (
    DEVICE,
    Shape,
    chosen_plan,
    generator,
    linear,
    moe_mlp,
    random_layer,
    random_weight,
    synchronize,
)
from helpers import assert_same_bits
from hopper_checks import (
    MIDDLE,
    NEEDS_HOPPER,
    check_isolation,
    check_layer,
    each_pattern,
    hopper_plan,
    instance_of,
    layer_plans,
    layer_with,
)
from plans import HOPPER, SHORT, Gpu
from torch.profiler import ProfilerActivity, profile

pytestmark = NEEDS_HOPPER


# --- short tiles -----------------------------------------------------------------------------

SHORT_SIZES = MIDDLE._replace(up="1:2:128", down="1:2:128")
SHORT_TOKENS = {
    1: "seven of the eight places are empty",
    33: "the second buffer of results, with one token",
    65: "up: the second buffer; down: the first one again",
    175: "a tile but for one",
    176: "a full tile",
    177: "two tiles, of 96 and of 81",
    1537: "nine tiles: a full group, and one of a single tile",
}


@both_dtypes
@pytest.mark.parametrize("tokens", SHORT_TOKENS)
def test_short_tiles(tokens: int, dtype: torch.dtype, seed: int) -> None:
    """Beside an expert without tokens, and one that begins behind the empty places."""
    layer = layer_with([tokens, 0, 5], dtype, seed, SHORT_SIZES)
    check_layer(layer, seed, SHORT, SHORT)
    for up, down in ((SHORT, HOPPER), (HOPPER, SHORT)):  # each has tiles of its own
        check_mlp(layer, **layer_plans(layer, up, down))


@both_dtypes
def test_every_size_of_short_tiles(dtype: torch.dtype, seed: int) -> None:
    counts = [size - 3 for size in range(16, 177, 16)]
    check_layer(layer_with(counts, dtype, seed, SHORT_SIZES), seed, SHORT, SHORT)


@pytest.mark.parametrize(
    "shape",
    [
        SHORT_SIZES._replace(tokens=450, experts=5, top_k=3, routing="sentinels"),
        Shape(16384, 8, 8, 256, 128, "1:2:128", "1:2:128"),  # many rounds of every thread block
        # up of six slabs: those beyond four of two tiles are one item; down of five
        Shape(8192, 32, 8, 640, 384, "1:2:128", "1:2:128", routing="distinct"),
        Shape(260, 2, 2, 4096, 128, "1:2:256", "1:2:128"),  # long k of up, and another V
        Shape(260, 2, 2, 128, 4096, "1:2:128", "1:2:512"),  # long k of down
    ],
    ids=str,
)
def test_layers_of_short_tiles(shape: Shape, seed: int) -> None:
    check_layer(random_layer(shape, torch.bfloat16, seed), seed, SHORT, SHORT)


@both_dtypes
@pytest.mark.parametrize(("m", "k"), [(384, 256), (768, 256), (7168, 128)])
def test_linear_of_short_tiles(m: int, k: int, dtype: torch.dtype, seed: int) -> None:
    """Rows that the warpgroups store, and rows through a tensor map."""
    rng = generator(seed)
    weight = random_weight((1, m, k), "1:2:128", dtype, rng)
    for rows in (97, 176, 177, 5003):
        x = torch.randn(rows, k, generator=rng, device=DEVICE).to(dtype)
        check_linear(weight, x, hopper_plan(weight, SHORT))


@both_dtypes
def test_short_tiles_do_not_see_each_other(dtype: torch.dtype, seed: int) -> None:
    check_isolation(layer_with([200, 0, 150], dtype, seed, SHORT_SIZES), seed, SHORT, SHORT)


@each_pattern
def test_short_tiles_are_chosen_where_they_are_as_many(text: str) -> None:
    """Of 256 tokens an expert there are two tiles either way, of 384 three instead of two."""
    layer = random_layer(Shape(4, 16, 1, 1024, 768, text, text), torch.bfloat16, 0)
    for is_down, weight in ((False, layer.gate_up), (True, layer.down)):
        for tokens_each, instance in ((96, SHORT), (256, SHORT), (384, HOPPER)):
            chosen = instance_of(chosen_plan(weight, 16 * tokens_each, 1, is_down))
            assert chosen == (instance if text == "1:2:128" else HOPPER), tokens_each


@pytest.mark.parametrize(("up", "down"), [("1:2:128", "1:2:64"), ("1:2:64", "1:2:128")])
def test_a_layer_shares_full_tiles(up: str, down: str, seed: int) -> None:
    """Short ones for one product alone would be listed beside the full ones of the other."""
    layer = random_layer(Shape(2048, 16, 2, 1024, 768, up, down), torch.bfloat16, seed)
    plans = [
        instance_of(chosen_plan(weight, 2048, 2, is_down))
        for weight, is_down in ((layer.gate_up, False), (layer.down, True))
    ]
    assert sorted(plans) == sorted([SHORT, HOPPER]), "each by itself"
    assert_same_bits(moe_mlp(layer), moe_mlp(layer, **layer_plans(layer, HOPPER, HOPPER)))
    check_mlp(layer)


def test_a_layer_of_short_tiles_by_itself(seed: int) -> None:
    layer = random_layer(Shape(2048, 16, 2, 1024, 768, "1:2:128", "1:2:128"), torch.bfloat16, seed)
    assert_same_bits(moe_mlp(layer), moe_mlp(layer, **layer_plans(layer, SHORT, SHORT)))
    check_mlp(layer)


# --- without routing: wide and short tiles ---------------------------------------------------

# On 66 clusters: 13 tiles of 200 rows and eight of 192, the last of which has 152 or 153 of them.
WIDE_ROWS = (4096, 4097)
# By k. 21 tiles of 200 rows, the last of which has 193 or 200 of them; more blocks of k; 17 tiles
# of 200 and four of 176.
MORE_WIDE = {256: (4193, 4200), 640: (4096,), 1280: (4095, 4041)}


def check_tiles(rows: int, m: int, k: int, text: str, dtype: torch.dtype, seed: int) -> int:
    """How many tokens a tile of the kernel that ran has at most."""
    rng = generator(seed)
    weight = random_weight((1, m, k), text, dtype, rng)
    x = torch.randn(rows, k, generator=rng, device=DEVICE).to(dtype)
    check_linear(weight, x, hopper_plan(weight))
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        linear(weight, x, hopper_plan(weight))
        synchronize()
    names = {event.name for event in profiled.events() if "hopper_kernel" in event.name}
    (tokens,) = {re.findall(r"HopperShape<\w+, (?:\(int\))?(\d+)", name)[0] for name in names}
    return int(tokens)


@both_dtypes
@pytest.mark.parametrize("rows", WIDE_ROWS)
def test_wide_tiles(rows: int, dtype: torch.dtype, seed: int) -> None:
    """Where they save a round of items, for V = 128 alone."""
    tokens = check_tiles(rows, 14336, 128, "1:2:128", dtype, seed)
    assert tokens == 200 or Gpu.current().num_sms != 132
    assert check_tiles(rows, 14336, 128, "1:2:64", dtype, seed) == 192
    assert check_tiles(rows, 14336, 128, "2:4", dtype, seed) == 208


@pytest.mark.parametrize("k", MORE_WIDE)
def test_wide_tiles_of_more_blocks(k: int, seed: int) -> None:
    for rows in MORE_WIDE[k]:
        tokens = check_tiles(rows, 14336, k, "1:2:128", torch.bfloat16, seed)
        assert tokens == 200 or Gpu.current().num_sms != 132, f"{rows} rows"


@both_dtypes
@pytest.mark.parametrize(("rows", "k"), [(4041, 128), (1024, 128), (1025, 256)])
def test_short_tiles_without_routing(rows: int, k: int, dtype: torch.dtype, seed: int) -> None:
    """Where they end sooner, for V = 128 alone: 1024 rows are seven tiles in any case."""
    tokens = check_tiles(rows, 14336, k, "1:2:128", dtype, seed)
    assert tokens == 176 or Gpu.current().num_sms != 132
    assert check_tiles(rows, 14336, k, "1:2:64", dtype, seed) == 192
    assert check_tiles(rows, 14336, k, "2:4", dtype, seed) == 208


def test_full_tiles_without_routing(seed: int) -> None:
    """Where they end sooner; and where so few items follow that results are not copied."""
    for rows, m in ((3000, 14336), (200, 256)):
        assert check_tiles(rows, m, 128, "1:2:128", torch.bfloat16, seed) == 192
