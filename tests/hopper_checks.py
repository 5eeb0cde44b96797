"""Layers for the tests of the Hopper kernel, and the plans that ask for it."""

from __future__ import annotations

import pytest
import torch
from cuda_checks import check_down, check_mlp, check_up
from cuda_helpers import (
    DEVICE,
    GPU,
    Layer,
    Shape,
    Weight,
    generator,
    moe_down,
    moe_mlp,
    moe_up,
    random_layer,
)
from helpers import assert_same_bits
from plans import HOPPER, Instance, PlanNumbers, Product

from samoyeds_hf import library

NEEDS_HOPPER = [
    *GPU,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]

PATTERNS = ("1:2:128", "1:2:64", "1:2:32", "2:4")  # each has a kernel of its own
# gate_up [512, 384] of 4 slabs, down [384, 256] of 3
MIDDLE = Shape(300, experts=3, hidden=384, inner=256, up="1:2:128", down="1:2:64")

each_pattern = pytest.mark.parametrize("text", PATTERNS)


def product_of(weight: Weight, may_split: bool = False) -> Product:
    pattern = weight.pattern
    v = 0 if pattern.n == pattern.m else pattern.sub_row(weight.cols)
    return Product(v, weight.rows, weight.cols, may_split)


def hopper_plan(weight: Weight, instance: Instance = HOPPER, **changes: int) -> library.Plan:
    """The only one of an instance, or one step beyond."""
    numbers = instance.plan(instance.stages(product_of(weight))[0])
    return library.Plan(*numbers._replace(**changes))


def layer_plans(
    layer: Layer, up: Instance = HOPPER, down: Instance = HOPPER
) -> dict[str, library.Plan]:
    return {"plan": hopper_plan(layer.gate_up, up), "down_plan": hopper_plan(layer.down, down)}


def instance_of(plan: library.Plan) -> Instance:
    return PlanNumbers(*(getattr(plan, name) for name in PlanNumbers._fields)).instance


def layer_with(counts: list[int], dtype: torch.dtype, seed: int, sizes: Shape = MIDDLE) -> Layer:
    """Expert e meets counts[e] tokens, in any order; each token has one choice."""
    shape = sizes._replace(tokens=sum(counts), experts=len(counts), top_k=1)
    layer = random_layer(shape, dtype, seed)
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    order = torch.randperm(len(experts), generator=torch.Generator().manual_seed(seed))
    layer.top_k_index.copy_(experts[order, None])
    return layer


def check_layer(layer: Layer, seed: int, up: Instance = HOPPER, down: Instance = HOPPER) -> None:
    """The layer, and each of its products alone."""
    check_mlp(layer, **layer_plans(layer, up, down))
    check_up(layer, hopper_plan(layer.gate_up, up))
    check_down(layer, seed, hopper_plan(layer.down, down))


def check_isolation(
    layer: Layer, seed: int, up: Instance = HOPPER, down: Instance = HOPPER
) -> None:
    """NaN in all tokens of expert 2, and in some of another, stays there; one choice a token."""
    up_plan, down_plan = layer_plans(layer, up, down).values()
    tokens, inner_size = layer.shape.tokens, layer.shape.inner
    inner = torch.randn(tokens, inner_size, generator=generator(seed), device=DEVICE)
    inner = inner.to(layer.hidden.dtype)
    is_bad = layer.top_k_index[:, 0] == 2
    is_bad[(~is_bad).nonzero()[[0, 7, 8, 101, -1], 0]] = True

    def results() -> dict[str, torch.Tensor]:
        return {
            "mlp": moe_mlp(layer, up_plan, down_plan),
            "up": moe_up(layer, up_plan),
            "down": moe_down(layer, inner, down_plan),
        }

    clean = results()
    layer.hidden[is_bad] = inner[is_bad] = float("nan")
    for name, found in results().items():
        assert_same_bits(found[~is_bad], clean[name][~is_bad])
        assert found[is_bad].isnan().any(dim=1).all(), name
