"""What the operators require of their arguments, said alike by every backend and by the fakes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn

import torch

from samoyeds_hf.errors import SamoyedsError
from samoyeds_hf.format import VALUE_DTYPES, SparseWeight, stored_shapes
from samoyeds_hf.pattern import SparsityPattern

PACKED_DTYPES = (torch.bfloat16, torch.float16)  # that the kernels take


@lru_cache
def parse(text: str) -> SparsityPattern:
    """The pattern that an operator's argument names.

    Raises:
        PatternError: it names none.
    """
    return SparsityPattern.parse(text)


def require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """``torch._check``, without its cost of microseconds where the answer is plain: decode pays it.

    Raises:
        RuntimeError: with the message, if the condition does not hold.
    """
    if condition is not True:
        torch._check(condition, message)


def refuse_backward(*_: Any) -> NoReturn:
    """The backward of every operator.

    Raises:
        SamoyedsError: always.
    """
    raise SamoyedsError(
        "Sparse weights are for inference, found a backward pass through them; run or compile the "
        "model under torch.no_grad()."
    )


def check_product(
    x: torch.Tensor, weight: SparseWeight, pattern: SparsityPattern, num_lead: int = 1
) -> int:
    """Shapes and dtypes of one product; returns its number of out features.

    ``num_lead`` is 1 for a weight with a dimension of experts, and 0 for a single matrix.

    Raises:
        RuntimeError: here and below; says what was required and found.
    """
    require(
        weight.values.dim() == num_lead + 2 and (x.dim() == 2 or num_lead == 0),
        lambda: (
            f"the input must have 2 dimensions and values {num_lead + 2}, found {list(x.shape)} "
            f"and {list(weight.values.shape)}"
        ),
    )
    *lead, kept, half_k = weight.values.shape
    rows = kept // pattern.n * pattern.m
    expected = stored_shapes((*lead, rows, half_k * 2), pattern)
    found = tuple(tuple(tensor.shape) for tensor in weight)
    require(
        found == expected,
        lambda: f"values, meta and index must have the shapes {expected}, found {found}",
    )
    require(
        x.shape[-1] == half_k * 2,
        lambda: f"the input must have {half_k * 2} features, found {x.shape[-1]}",
    )
    require(
        x.dtype == weight.values.dtype and x.dtype in VALUE_DTYPES,
        lambda: (
            f"input and values must share one dtype of {list(VALUE_DTYPES)}, found {x.dtype} and "
            f"{weight.values.dtype}"
        ),
    )
    require(
        weight.meta.dtype == weight.index.dtype == torch.uint8,
        lambda: f"meta, index must be uint8, found {weight.meta.dtype}, {weight.index.dtype}",
    )
    return rows


def check_routing(top_k_index: torch.Tensor, num_tokens: int, rows_of: str) -> None:
    """That there are K choices, int64, for each of ``num_tokens`` tokens."""
    require(
        top_k_index.dtype == torch.int64 and top_k_index.dim() == 2,
        lambda: (
            f"top_k_index must be int64 [T, K], found {top_k_index.dtype} {list(top_k_index.shape)}"
        ),
    )
    require(
        top_k_index.shape[0] == num_tokens,
        lambda: (
            f"top_k_index and {rows_of} must have as many tokens, found "
            f"{top_k_index.shape[0]} and {num_tokens}"
        ),
    )


def check_weights(top_k_weights: torch.Tensor, top_k_index: torch.Tensor) -> None:
    """That each choice has a routing weight."""
    require(
        top_k_weights.shape == top_k_index.shape and top_k_weights.is_floating_point(),
        lambda: (
            f"top_k_weights must be floating with the shape of top_k_index "
            f"{list(top_k_index.shape)}, found {top_k_weights.dtype} {list(top_k_weights.shape)}"
        ),
    )


def check_up(
    hidden: torch.Tensor, top_k_index: torch.Tensor, weight: SparseWeight, pattern: SparsityPattern
) -> int:
    """Arguments of the first product; returns its number of out features."""
    out_features = check_product(hidden, weight, pattern)
    check_routing(top_k_index, hidden.shape[0], "hidden")
    return out_features


def check_down(
    inner: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weight: SparseWeight,
    pattern: SparsityPattern,
) -> int:
    """Arguments of the second product; returns its number of out features."""
    out_features = check_product(inner, weight, pattern)
    check_routing(top_k_index, top_k_weights.shape[0], "top_k_weights")
    check_weights(top_k_weights, top_k_index)
    num_rows = top_k_index.shape[0] * top_k_index.shape[1]
    require(
        inner.shape[0] == num_rows,
        lambda: f"there must be a row for each (token, choice), {num_rows}, found {inner.shape[0]}",
    )
    return out_features


def check_mlp(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: SparseWeight,
    down: SparseWeight,
    gate_up_pattern: SparsityPattern,
    down_pattern: SparsityPattern,
) -> None:
    """Arguments of the whole layer: both products, and that they fit each other."""
    two_i = check_up(hidden, top_k_index, gate_up, gate_up_pattern)
    check_weights(top_k_weights, top_k_index)
    inner = hidden.new_empty(0, down.values.shape[-1] * 2)
    out_features = check_product(inner, down, down_pattern)
    require(
        gate_up.values.shape[0] == down.values.shape[0],
        lambda: (
            f"gate_up_proj and down_proj must have as many experts, found "
            f"{gate_up.values.shape[0]} and {down.values.shape[0]}"
        ),
    )
    require(
        two_i == inner.shape[1] * 2 and out_features == hidden.shape[1],
        lambda: (
            f"gate_up_proj [{two_i}, {hidden.shape[1]}] and down_proj [{out_features}, "
            f"{inner.shape[1]}] do not form an MLP"
        ),
    )


def check_packed(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> None:
    """That a packed weight ``[E, P]`` and an input fit, and everything is on one device."""
    require(
        weight.dim() == 2 and weight.is_contiguous(),
        lambda: f"a packed weight must be a contiguous [E, P], found {list(weight.shape)}",
    )
    require(
        x.dtype == weight.dtype and x.dtype in PACKED_DTYPES,
        lambda: (
            f"input and packed weight must share one dtype of {list(PACKED_DTYPES)}, found "
            f"{x.dtype} and {weight.dtype}"
        ),
    )
    # NOTE: kernels take addresses, and one of another device would be read as if it were here.
    devices = [tensor.device for tensor in (weight, *others)]
    require(
        all(device == x.device for device in devices),
        lambda: f"everything must be on one device, found the input on {x.device} and {devices}",
    )


def check_packed_up(x: torch.Tensor, top_k_index: torch.Tensor, gate_up: torch.Tensor) -> None:
    """Arguments of the first product on a packed weight."""
    check_packed(x, gate_up, top_k_index)
    require(x.dim() == 2, lambda: f"the input must have 2 dimensions, found {list(x.shape)}")
    check_routing(top_k_index, x.shape[0], "hidden")


def check_packed_down(
    inner: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, down: torch.Tensor
) -> None:
    """Arguments of the second product on a packed weight."""
    check_packed(inner, down, top_k_index, top_k_weights)
    check_routing(top_k_index, top_k_weights.shape[0], "top_k_weights")
    check_weights(top_k_weights, top_k_index)
    num_rows = top_k_index.shape[0] * top_k_index.shape[1]
    require(
        inner.dim() == 2 and inner.shape[0] == num_rows,
        lambda: (
            f"there must be a row for each (token, choice), {num_rows}, found {list(inner.shape)}"
        ),
    )


def check_packed_mlp(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> None:
    """Arguments of the whole layer on packed weights."""
    check_packed_up(hidden, top_k_index, gate_up)
    check_weights(top_k_weights, top_k_index)
    check_packed(hidden, down, top_k_weights)
    require(
        gate_up.shape[0] == down.shape[0],
        lambda: (
            f"gate_up_proj and down_proj must have as many experts, found {gate_up.shape[0]} and "
            f"{down.shape[0]}"
        ),
    )


def check_packed_linear(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Arguments of a Linear on a packed weight."""
    check_packed(x, weight)
    require(
        x.dim() > 0 and weight.shape[0] == 1,
        lambda: (
            f"a packed Linear takes [..., k] and a weight [1, P], found {list(x.shape)} and "
            f"{list(weight.shape)}"
        ),
    )
