"""What the GPU tests ask of each product: right, the same twice, zeros where nobody is.

Right is: its error against fp64 is at most twice that of dense torch in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_helpers import (
    HALF_DTYPES,
    Layer,
    Weight,
    generator,
    grouped,
    linear,
    moe_down,
    moe_mlp,
    moe_up,
)
from helpers import assert_as_good_as_dense, assert_same_bits
from torch.nn import functional

both_dtypes = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=["bf16", "fp16"])


def twice(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A result that is bitwise equal on repeat."""
    first, second = call(), call()
    assert_same_bits(second, first)
    return first


def check_mlp(layer: Layer, **plans: Any) -> None:
    ours = twice(lambda: moe_mlp(layer, **plans))
    dense, exact = layer.reference(layer.hidden.dtype), layer.reference(torch.float64)
    assert_as_good_as_dense(ours, dense, exact, f"moe_mlp {layer.shape}")
    alone = ~layer.is_mine.any(dim=1)
    assert_same_bits(ours[alone], torch.zeros_like(ours[alone]))


def check_up(layer: Layer, plan: Any = None, weight: Weight | None = None) -> None:
    """Of the layer's own weight, or of another one for its tokens."""
    weight = weight or layer.gate_up
    ours = twice(lambda: moe_up(layer, plan, weight))
    arguments = layer.hidden, layer.top_k_index, weight.dense
    dense, exact = (grouped(*arguments, dtype) for dtype in (ours.dtype, torch.float64))
    assert_as_good_as_dense(ours, dense, exact, f"moe_up {layer.shape}")
    elsewhere = ours[~layer.is_mine.reshape(-1)]
    assert_same_bits(elsewhere, torch.zeros_like(elsewhere))


def check_down(layer: Layer, seed: int, plan: Any = None) -> None:
    size = (layer.top_k_index.numel(), layer.shape.inner)
    inner = torch.randn(size, generator=generator(seed), device=layer.hidden.device)
    inner = inner.to(layer.hidden.dtype)
    clean = inner.masked_fill(~layer.is_mine.reshape(-1, 1), 0)
    inner[~layer.is_mine.reshape(-1)] = float("nan")  # the model's gate may leave anything there
    ours = twice(lambda: moe_down(layer, inner, plan))
    dense, exact = (
        layer.combine(grouped(clean, layer.top_k_index, layer.down.dense, dtype), dtype)
        for dtype in (ours.dtype, torch.float64)
    )
    assert_as_good_as_dense(ours, dense, exact, f"moe_down {layer.shape}")


def check_linear(weight: Weight, x: torch.Tensor, plan: Any = None) -> None:
    ours = twice(lambda: linear(weight, x, plan))
    dense, exact = (
        functional.linear(x.to(dtype), weight.dense[0].to(dtype))
        for dtype in (x.dtype, torch.float64)
    )
    what = f"linear [{x.shape[0]}, {weight.cols}] to {weight.rows}, {weight.pattern}"
    assert_as_good_as_dense(ours, dense, exact, what)
