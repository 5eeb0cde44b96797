"""The operators ``torch.ops.samoyeds.*``: schemas, shape checks, fakes, and the plain torch path.

What every backend must fulfil (the plain path here does; a kernel registers itself for its device
with ``register_kernel`` on the same operator):

- Weights come as the canonical tensors of :mod:`samoyeds_hf.format`, validated when they were
  loaded. Activations and values share one dtype: bf16, fp16 or fp32. Inputs are never written.
- ``top_k_index`` is int64 ``[T, K]``. An entry outside 0..E-1 belongs to no expert here: expert
  parallel marks so what other ranks own. It contributes nothing and no weight is read for it.
- Any T >= 0, K >= 1; experts without tokens and tokens with the same expert twice are legal.
- Products accumulate in fp32; the sum over K runs in fp32 in the order of K, so that equal inputs
  give equal bits. The error against fp32 is at most twice that of dense torch in the same dtype.
- The shape of every result follows from the shapes of the arguments alone, and a GPU backend
  works on the current stream without host synchronisation, so that it can be captured in a graph.

Patterns travel as text ("1:2:64"), because a schema has no type for them.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from samoyeds_hf import reference
from samoyeds_hf.format import VALUE_DTYPES, SparseWeight, decode, stored_shapes
from samoyeds_hf.pattern import SparsityPattern

__all__ = ["linear", "moe_down", "moe_mlp", "moe_up"]


@torch.library.custom_op("samoyeds::moe_mlp", mutates_args=())
def moe_mlp(
    hidden: torch.Tensor,  # [T, H]
    top_k_index: torch.Tensor,  # [T, K] int64
    top_k_weights: torch.Tensor,  # [T, K] floating
    gate_up_proj: torch.Tensor,  # [E, 2I*N/M, H/2]
    gate_up_proj_meta: torch.Tensor,  # [E, 2I*N/M, H/8]
    gate_up_proj_index: torch.Tensor,  # [E, 2I*N/M, H/V]
    down_proj: torch.Tensor,  # [E, H*N/M, I/2]
    down_proj_meta: torch.Tensor,  # [E, H*N/M, I/8]
    down_proj_index: torch.Tensor,  # [E, H*N/M, I/V]
    gate_up_pattern: str,
    down_pattern: str,
) -> torch.Tensor:
    """The fused expert layer ``[T, H]``: down(SiLU(gate) * up), weighted and summed over K.

    A backend must fulfil what the module's docstring lists; it may keep the inner activations in
    fp32 or round them to the shared dtype, and skip what belongs to no expert here.

    Gate rows are the first I rows of the dense ``gate_up_proj``, up rows the other I.
    """
    gate_up = SparseWeight(gate_up_proj, gate_up_proj_meta, gate_up_proj_index)
    down = SparseWeight(down_proj, down_proj_meta, down_proj_index)
    up_pattern, low_pattern = _pattern(gate_up_pattern), _pattern(down_pattern)
    _check_mlp(hidden, top_k_index, top_k_weights, gate_up, down, up_pattern, low_pattern)
    return reference.moe_mlp(
        hidden, top_k_index, top_k_weights, gate_up, down, up_pattern, low_pattern
    )


@moe_mlp.register_fake
def _moe_mlp_fake(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_proj_meta: torch.Tensor,
    gate_up_proj_index: torch.Tensor,
    down_proj: torch.Tensor,
    down_proj_meta: torch.Tensor,
    down_proj_index: torch.Tensor,
    gate_up_pattern: str,
    down_pattern: str,
) -> torch.Tensor:
    gate_up = SparseWeight(gate_up_proj, gate_up_proj_meta, gate_up_proj_index)
    down = SparseWeight(down_proj, down_proj_meta, down_proj_index)
    up_pattern, low_pattern = _pattern(gate_up_pattern), _pattern(down_pattern)
    _check_mlp(hidden, top_k_index, top_k_weights, gate_up, down, up_pattern, low_pattern)
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@torch.library.custom_op("samoyeds::moe_up", mutates_args=())
def moe_up(
    hidden: torch.Tensor,  # [T, H]
    top_k_index: torch.Tensor,  # [T, K] int64
    values: torch.Tensor,  # [E, 2I*N/M, H/2]
    meta: torch.Tensor,  # [E, 2I*N/M, H/8]
    index: torch.Tensor,  # [E, 2I*N/M, H/V]
    pattern: str,
) -> torch.Tensor:
    """First product, for models with a gate of their own: ``[T*K, 2I]``, row t*K + j = choice j.

    A backend must fulfil what the module's docstring lists, and write zeros into rows whose choice
    belongs to no expert here: the model's gate sees every row.
    """
    weight, parsed = SparseWeight(values, meta, index), _pattern(pattern)
    _check_up(hidden, top_k_index, weight, parsed)
    return reference.grouped_linear(
        hidden, top_k_index.reshape(-1), weight, parsed, top_k_index.shape[1]
    )


@moe_up.register_fake
def _moe_up_fake(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    values: torch.Tensor,
    meta: torch.Tensor,
    index: torch.Tensor,
    pattern: str,
) -> torch.Tensor:
    weight, parsed = SparseWeight(values, meta, index), _pattern(pattern)
    out_features = _check_up(hidden, top_k_index, weight, parsed)
    return hidden.new_empty(top_k_index.shape[0] * top_k_index.shape[1], out_features)


@torch.library.custom_op("samoyeds::moe_down", mutates_args=())
def moe_down(
    inner: torch.Tensor,  # [T*K, I]
    top_k_index: torch.Tensor,  # [T, K] int64
    top_k_weights: torch.Tensor,  # [T, K] floating
    values: torch.Tensor,  # [E, H*N/M, I/2]
    meta: torch.Tensor,  # [E, H*N/M, I/8]
    index: torch.Tensor,  # [E, H*N/M, I/V]
    pattern: str,
) -> torch.Tensor:
    """Second product ``[T, H]``: rows times their experts' weights, weighted and summed over K.

    A backend must fulfil what the module's docstring lists, and read no row whose choice belongs
    to no expert here: the model's gate may have left anything there.
    """
    weight, parsed = SparseWeight(values, meta, index), _pattern(pattern)
    _check_down(inner, top_k_index, top_k_weights, weight, parsed)
    rows = reference.grouped_linear(inner, top_k_index.reshape(-1), weight, parsed, 1)
    return reference.combine(rows, top_k_index, top_k_weights, values.shape[0])


@moe_down.register_fake
def _moe_down_fake(
    inner: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    values: torch.Tensor,
    meta: torch.Tensor,
    index: torch.Tensor,
    pattern: str,
) -> torch.Tensor:
    weight, parsed = SparseWeight(values, meta, index), _pattern(pattern)
    out_features = _check_down(inner, top_k_index, top_k_weights, weight, parsed)
    return inner.new_empty(top_k_index.shape[0], out_features)


@torch.library.custom_op("samoyeds::linear", mutates_args=())
def linear(
    x: torch.Tensor,  # [..., k]
    values: torch.Tensor,  # [m*N/M, k/2]
    meta: torch.Tensor,  # [m*N/M, k/8]
    index: torch.Tensor,  # [m*N/M, k/V]
    pattern: str,
) -> torch.Tensor:
    """A single sparse Linear without bias: ``[..., m]``.

    A backend must fulfil what the module's docstring lists; it is one expert that sees every row.
    """
    weight, parsed = SparseWeight(values, meta, index), _pattern(pattern)
    _check_product(x, weight, parsed, num_lead=0)
    return torch.nn.functional.linear(x, decode(weight, parsed))


@linear.register_fake
def _linear_fake(
    x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, index: torch.Tensor, pattern: str
) -> torch.Tensor:
    weight, parsed = SparseWeight(values, meta, index), _pattern(pattern)
    out_features = _check_product(x, weight, parsed, num_lead=0)
    return x.new_empty(*x.shape[:-1], out_features)


@lru_cache
def _pattern(text: str) -> SparsityPattern:
    return SparsityPattern.parse(text)


def _check_product(
    x: torch.Tensor, weight: SparseWeight, pattern: SparsityPattern, num_lead: int = 1
) -> int:
    """Shapes and dtypes of one product; returns its number of out features.

    ``num_lead`` is 1 for a weight with a dimension of experts, and 0 for a single matrix.
    """
    torch._check(
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
    torch._check(
        found == expected,
        lambda: f"values, meta and index must have the shapes {expected}, found {found}",
    )
    torch._check(
        x.shape[-1] == half_k * 2,
        lambda: f"the input must have {half_k * 2} features, found {x.shape[-1]}",
    )
    torch._check(
        x.dtype == weight.values.dtype and x.dtype in VALUE_DTYPES,
        lambda: (
            f"input and values must share one dtype of {list(VALUE_DTYPES)}, found {x.dtype} and "
            f"{weight.values.dtype}"
        ),
    )
    torch._check(
        weight.meta.dtype == weight.index.dtype == torch.uint8,
        lambda: f"meta, index must be uint8, found {weight.meta.dtype}, {weight.index.dtype}",
    )
    return rows


def _check_routing(top_k_index: torch.Tensor, num_tokens: int, rows_of: str) -> None:
    torch._check(
        top_k_index.dtype == torch.int64 and top_k_index.dim() == 2,
        lambda: (
            f"top_k_index must be int64 [T, K], found {top_k_index.dtype} {list(top_k_index.shape)}"
        ),
    )
    torch._check(
        top_k_index.shape[0] == num_tokens,
        lambda: (
            f"top_k_index and {rows_of} must have as many tokens, found "
            f"{top_k_index.shape[0]} and {num_tokens}"
        ),
    )


def _check_weights(top_k_weights: torch.Tensor, top_k_index: torch.Tensor) -> None:
    torch._check(
        top_k_weights.shape == top_k_index.shape and top_k_weights.is_floating_point(),
        lambda: (
            f"top_k_weights must be floating with the shape of top_k_index "
            f"{list(top_k_index.shape)}, found {top_k_weights.dtype} {list(top_k_weights.shape)}"
        ),
    )


def _check_up(
    hidden: torch.Tensor, top_k_index: torch.Tensor, weight: SparseWeight, pattern: SparsityPattern
) -> int:
    out_features = _check_product(hidden, weight, pattern)
    _check_routing(top_k_index, hidden.shape[0], "hidden")
    return out_features


def _check_down(
    inner: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weight: SparseWeight,
    pattern: SparsityPattern,
) -> int:
    out_features = _check_product(inner, weight, pattern)
    _check_routing(top_k_index, top_k_weights.shape[0], "top_k_weights")
    _check_weights(top_k_weights, top_k_index)
    num_rows = top_k_index.shape[0] * top_k_index.shape[1]
    torch._check(
        inner.shape[0] == num_rows,
        lambda: f"there must be a row for each (token, choice), {num_rows}, found {inner.shape[0]}",
    )
    return out_features


def _check_mlp(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: SparseWeight,
    down: SparseWeight,
    gate_up_pattern: SparsityPattern,
    down_pattern: SparsityPattern,
) -> None:
    two_i = _check_up(hidden, top_k_index, gate_up, gate_up_pattern)
    _check_weights(top_k_weights, top_k_index)
    inner = hidden.new_empty(0, down.values.shape[-1] * 2)
    out_features = _check_product(inner, down, down_pattern)
    torch._check(
        gate_up.values.shape[0] == down.values.shape[0],
        lambda: (
            f"gate_up_proj and down_proj must have as many experts, found "
            f"{gate_up.values.shape[0]} and {down.values.shape[0]}"
        ),
    )
    torch._check(
        two_i == inner.shape[1] * 2 and out_features == hidden.shape[1],
        lambda: (
            f"gate_up_proj [{two_i}, {hidden.shape[1]}] and down_proj [{out_features}, "
            f"{inner.shape[1]}] do not form an MLP"
        ),
    )
