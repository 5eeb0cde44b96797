"""Every way to run a product: each legal SamoyedsPlan is right, and an illegal one is refused.

Needs a CUDA device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cuda_helpers import (
    GPU,
    OK,
    Layer,
    LibraryRefusal,
    Shape,
    functions,
    generator,
    grouped,
    kernels,
    last_error,
    linear,
    make_plan,
    moe_down,
    moe_mlp,
    moe_up,
    random_layer,
    random_seed,
    random_weight,
)
from helpers import assert_as_good_as_dense, assert_same_bits, silu_gate
from torch.nn import functional

from samoyeds_hf import library

pytestmark = GPU

NUM_WARPS = 8
TILES = [(1, 1, 1), (1, 2, 1), (1, 4, 1), (2, 4, 2), (4, 4, 2), (4, 4, 4)]  # m, n frags, warps_n
# stages, blocks_per_sm, splits
VARIANTS = [(2, 1, 1), (3, 1, 1), (4, 1, 1), (6, 1, 1), (3, 2, 1), (3, 1, 2), (4, 1, 3), (2, 2, 2)]
# An odd number of blocks of 128 columns, fewer than 8 warps along k, and tails where they may be.
SIZES = {
    "1:2:32": (672, 416),
    "1:2:64": (704, 448),
    "1:2:96": (672, 288),  # Sub-Rows across blocks
    "1:2:128": (640, 384),
    "2:4": (648, 392),
}


class Reference(NamedTuple):
    """A layer, and what its products should be: in its own dtype on dense weights, and in fp64."""

    layer: Layer
    inner: torch.Tensor  # [T*K, I]  input of the down product
    up: tuple[torch.Tensor, torch.Tensor]  # [T*K, 2I]
    down: tuple[torch.Tensor, torch.Tensor]  # [T, H]
    mlp: tuple[torch.Tensor, torch.Tensor]  # [T, H]


def make_reference(tokens: int, text: str, dtype: torch.dtype, seed: int) -> Reference:
    hidden, inner = SIZES[text]
    shape = Shape(tokens, experts=2, top_k=2, hidden=hidden, inner=inner, up=text, down=text)
    layer = random_layer(shape, dtype, seed)
    both = (dtype, torch.float64)
    up = tuple(grouped(layer.hidden, layer.top_k_index, layer.gate_up.dense, d) for d in both)
    gated = silu_gate(up[0])
    down = tuple(
        layer.combine(grouped(gated, layer.top_k_index, layer.down.dense, d), d) for d in both
    )
    mlp = tuple(layer.reference(d) for d in both)
    return Reference(layer, gated, up, down, mlp)  # type: ignore[arg-type]


def plans_of(tile: tuple[int, int, int]) -> Iterator[Any]:
    m_frags, n_frags, warps_n = tile
    rest = NUM_WARPS // warps_n
    for warps_m in (size for size in (1, 2, 4, 8) if size <= rest):
        for stages, blocks_per_sm, splits in VARIANTS:
            yield make_plan(
                m_frags=m_frags,
                n_frags=n_frags,
                warps_m=warps_m,
                warps_n=warps_n,
                warps_k=rest // warps_m,
                stages=stages,
                blocks_per_sm=blocks_per_sm,
                splits=splits,
            )


def describe(plan: Any) -> str:
    return ", ".join(f"{name}={getattr(plan, name)}" for name, *_ in plan._fields_)


def is_right(
    call: Callable[[], torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], what: str
) -> bool:
    """False where the plan was refused; fails where it was not and the result is wrong."""
    try:
        ours = call()
    except LibraryRefusal:
        return False
    assert_same_bits(call(), ours)
    assert_as_good_as_dense(ours, *expected, what)
    return True


@pytest.mark.parametrize("text", SIZES)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_each_legal_plan_is_right(tile: tuple[int, int, int], text: str) -> None:
    seed = random_seed()
    dtype = torch.bfloat16 if seed % 2 else torch.float16
    tile_tokens = 8 * tile[1] * tile[2]
    # 2 experts and 2 choices: about as many pairs an expert as there are tokens
    numbers = [1, tile_tokens // 2, tile_tokens + 1, 3 * tile_tokens - 5]
    references = [make_reference(tokens, text, dtype, seed) for tokens in dict.fromkeys(numbers)]
    right = {"mlp": 0, "up": 0, "down": 0}
    for plan in plans_of(tile):
        whole = make_plan(**{name: getattr(plan, name) for name, *_ in plan._fields_})
        whole.splits = 1
        for case in references:
            layer, what = case.layer, f"{describe(plan)}, {case.layer.shape}"
            right["mlp"] += is_right(lambda: moe_mlp(layer, whole, plan), case.mlp, what)  # noqa: B023
            right["down"] += is_right(lambda: moe_down(layer, case.inner, plan), case.down, what)  # noqa: B023
            if plan.splits == 1:
                right["up"] += is_right(lambda: moe_up(layer, plan), case.up, what)  # noqa: B023
    assert all(right.values()), f"the library refuses every plan of a tile: {right}"


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_each_legal_plan_of_a_linear(tile: tuple[int, int, int]) -> None:
    rng = generator(random_seed())
    weight = random_weight((1, 136, 648), "2:4", torch.bfloat16, rng)
    x = torch.randn(8 * tile[1] * tile[2] * 2 + 3, 648, generator=rng, device="cuda").bfloat16()
    dense = functional.linear(x, weight.dense[0])
    expected = dense, functional.linear(x.double(), weight.dense[0].double())
    plans = [plan for plan in plans_of(tile) if plan.splits == 1]
    right = [is_right(lambda: linear(weight, x, plan), expected, describe(plan)) for plan in plans]  # noqa: B023
    assert any(right), "the library refuses every plan of a tile"


def chosen_plan(weight: Any, tokens: int, top_k: int, is_down: bool) -> library.Plan:
    plan = library.Plan()
    status = functions().samoyeds_choose_plan(
        0, ctypes.byref(weight), tokens, top_k, int(is_down), ctypes.byref(plan)
    )
    assert status == OK, last_error()
    return plan


@pytest.mark.parametrize("text", ["1:2:32", "1:2:128", "2:4"])
@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 256, 1024, 4096])
def test_the_heuristics_choose_a_legal_plan(tokens: int, text: str) -> None:
    hidden, inner = SIZES[text]
    shape = Shape(tokens, 4, 2, hidden, inner, text, text)
    layer = random_layer(shape, torch.bfloat16, random_seed())
    plan = chosen_plan(layer.gate_up.ready, tokens, 2, False)
    down_plan = chosen_plan(layer.down.ready, tokens, 2, True)
    assert plan.splits == 1, describe(plan)
    # The same that runs where no plan is given.
    assert_same_bits(moe_mlp(layer, plan, down_plan), moe_mlp(layer))


def test_the_heuristics_are_printable() -> None:
    assert len(kernels().heuristics.splitlines()) > 1


BAD_NUMBERS = {
    "m_frags": (0, -1, 3, 8, 1 << 40),
    "n_frags": (0, -1, 3, 16, 1 << 32 | 1),
    "warps_m": (0, -1, 3, 16),
    "warps_n": (0, -1, 3, 16),
    "warps_k": (0, -1, 3, 16),
    "stages": (0, -1, 100, 1 << 32 | 3),
    "blocks_per_sm": (0, -1, 1 << 40),
    "splits": (0, -1, 1 << 40),
}


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_illegal_plans_are_refused(name: str) -> None:
    case = make_reference(9, "1:2:64", torch.bfloat16, random_seed())
    layer = case.layer
    for value in BAD_NUMBERS[name]:
        for is_down in (False, True):
            weight = layer.down if is_down else layer.gate_up
            plan = chosen_plan(weight.ready, 9, 2, is_down)
            setattr(plan, name, value)
            calls: list[Callable[[], torch.Tensor]] = (
                [lambda: moe_mlp(layer, None, plan), lambda: moe_down(layer, case.inner, plan)]  # noqa: B023
                if is_down
                else [lambda: moe_mlp(layer, plan), lambda: moe_up(layer, plan)]  # noqa: B023
            )
            for call in calls:
                with pytest.raises(LibraryRefusal):
                    call()
    assert_as_good_as_dense(moe_mlp(layer), *case.mlp)  # nothing bad stays behind


def test_only_the_down_product_is_split() -> None:
    layer = make_reference(9, "1:2:64", torch.bfloat16, random_seed()).layer
    plan = chosen_plan(layer.gate_up.ready, 9, 2, False)
    plan.splits = 2
    for call in (lambda: moe_mlp(layer, plan), lambda: moe_up(layer, plan)):
        with pytest.raises(LibraryRefusal):
            call()
