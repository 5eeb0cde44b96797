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

On CUDA, in bf16 and fp16, the kernels run: the weights are packed at each call, which is right and
slow. The modules keep their weights packed and call :mod:`samoyeds_hf.packed_ops` instead.
"""

from __future__ import annotations

from typing import Any

import torch

from samoyeds_hf import packed, packed_ops, reference
from samoyeds_hf.checks import (
    check_down,
    check_mlp,
    check_product,
    check_up,
    parse,
    refuse_backward,
)
from samoyeds_hf.format import SparseWeight, decode

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
    up_pattern, low_pattern = parse(gate_up_pattern), parse(down_pattern)
    check_mlp(hidden, top_k_index, top_k_weights, gate_up, down, up_pattern, low_pattern)
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
    up_pattern, low_pattern = parse(gate_up_pattern), parse(down_pattern)
    check_mlp(hidden, top_k_index, top_k_weights, gate_up, down, up_pattern, low_pattern)
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
    weight, parsed = SparseWeight(values, meta, index), parse(pattern)
    check_up(hidden, top_k_index, weight, parsed)
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
    weight, parsed = SparseWeight(values, meta, index), parse(pattern)
    out_features = check_up(hidden, top_k_index, weight, parsed)
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
    weight, parsed = SparseWeight(values, meta, index), parse(pattern)
    check_down(inner, top_k_index, top_k_weights, weight, parsed)
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
    weight, parsed = SparseWeight(values, meta, index), parse(pattern)
    out_features = check_down(inner, top_k_index, top_k_weights, weight, parsed)
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
    weight, parsed = SparseWeight(values, meta, index), parse(pattern)
    check_product(x, weight, parsed, num_lead=0)
    return reference.linear(x, decode(weight, parsed))


@linear.register_fake
def _linear_fake(
    x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, index: torch.Tensor, pattern: str
) -> torch.Tensor:
    weight, parsed = SparseWeight(values, meta, index), parse(pattern)
    out_features = check_product(x, weight, parsed, num_lead=0)
    return x.new_empty(*x.shape[:-1], out_features)


for _op in (moe_mlp, moe_up, moe_down, linear):
    _op.register_autograd(refuse_backward)


@moe_mlp.register_kernel("cuda")
def _moe_mlp_cuda(
    hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *others: Any
) -> torch.Tensor:
    gate_up, down, texts = SparseWeight(*others[:3]), SparseWeight(*others[3:6]), others[6:]
    routed, patterns = (hidden, top_k_index, top_k_weights), [parse(text) for text in texts]
    check_mlp(*routed, gate_up, down, *patterns)
    gate_up_now = packed.pack_now(gate_up, patterns[0], is_gate_up=True)
    down_now = packed.pack_now(down, patterns[1])
    if gate_up_now is None or down_now is None:
        return reference.moe_mlp(*routed, gate_up, down, *patterns)
    inner = down.values.shape[-1] * 2
    out: torch.Tensor = packed_ops.packed_mlp(*routed, gate_up_now, down_now, inner, *texts)
    return out


@moe_up.register_kernel("cuda")
def _moe_up_cuda(hidden: torch.Tensor, top_k_index: torch.Tensor, *others: Any) -> torch.Tensor:
    weight, text = SparseWeight(*others[:3]), others[3]
    out_features = check_up(hidden, top_k_index, weight, parse(text))
    now = packed.pack_now(weight, parse(text), is_gate_up=True)
    if now is None:
        experts, top_k = top_k_index.reshape(-1), top_k_index.shape[1]
        return reference.grouped_linear(hidden, experts, weight, parse(text), top_k)
    out: torch.Tensor = packed_ops.packed_up(hidden, top_k_index, now, out_features, text)
    return out


@moe_down.register_kernel("cuda")
def _moe_down_cuda(
    inner: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *others: Any
) -> torch.Tensor:
    weight, text = SparseWeight(*others[:3]), others[3]
    out_features = check_down(inner, top_k_index, top_k_weights, weight, parse(text))
    now = packed.pack_now(weight, parse(text))
    if now is None:
        rows = reference.grouped_linear(inner, top_k_index.reshape(-1), weight, parse(text), 1)
        return reference.combine(rows, top_k_index, top_k_weights, weight.values.shape[0])
    out: torch.Tensor = packed_ops.packed_down(
        inner, top_k_index, top_k_weights, now, out_features, text
    )
    return out


@linear.register_kernel("cuda")
def _linear_cuda(x: torch.Tensor, *others: Any) -> torch.Tensor:
    weight, text = SparseWeight(*others[:3]), others[3]
    out_features = check_product(x, weight, parse(text), num_lead=0)
    now = packed.pack_now(SparseWeight(*(tensor[None] for tensor in weight)), parse(text))
    if now is None:
        return reference.linear(x, decode(weight, parse(text)))
    out: torch.Tensor = packed_ops.packed_linear(x, now, out_features, text)
    return out
