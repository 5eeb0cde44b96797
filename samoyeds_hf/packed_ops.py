"""Operators on packed weights, ``torch.ops.samoyeds.packed_*``: the modules' path on a GPU.

They fulfil what :mod:`samoyeds_hf.ops` asks of a backend. A weight is the tensor ``[E, P]`` of
:mod:`samoyeds_hf.packed`; its shape and pattern come as arguments, because bytes do not tell. Work
is queued on the current stream, nothing waits for the device, and everything allocated comes from
torch, so that a CUDA graph can capture each of them.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from samoyeds_hf.checks import (
    check_packed_down,
    check_packed_linear,
    check_packed_mlp,
    check_packed_up,
    parse,
    refuse_backward,
)
from samoyeds_hf.library import KernelLibrary, Launch, Routing, Weight
from samoyeds_hf.packed import (
    DTYPE_CODES,
    PackedSpec,
    align,
    launch_on,
    loaded,
    point_to,
)

__all__ = ["packed_down", "packed_linear", "packed_mlp", "packed_up"]


@torch.library.custom_op("samoyeds::packed_mlp", mutates_args=(), device_types="cuda")
def packed_mlp(
    hidden: torch.Tensor,  # [T, H]
    top_k_index: torch.Tensor,  # [T, K] int64; outside 0..E-1 = no expert here
    top_k_weights: torch.Tensor,  # [T, K] floating
    gate_up: torch.Tensor,  # [E, P]  of a dense [E, 2I, H]
    down: torch.Tensor,  # [E, P2]  of a dense [E, H, I]
    inner: int,  # I
    gate_up_pattern: str,
    down_pattern: str,
) -> torch.Tensor:
    """The fused expert layer ``[T, H]``: down(SiLU(gate) * up), weighted and summed over K.

    Raises:
        RuntimeError: from ``torch._check``, for shapes and dtypes that do not fit each other.
        KernelError: the library refuses, e.g. a packed weight of another shape or pattern.
    """
    check_packed_mlp(hidden, top_k_index, top_k_weights, gate_up, down)
    features = hidden.shape[1]
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if not top_k_index.numel():
        return out.zero_()
    up_weight = _describe(gate_up, 2 * inner, features, gate_up_pattern, is_gate_up=True)
    down_weight = _describe(down, features, inner, down_pattern)
    _launch("samoyeds_moe_mlp", hidden, top_k_index, top_k_weights, up_weight, down_weight, out)
    return out


@packed_mlp.register_fake
def _packed_mlp_fake(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    inner: int,
    gate_up_pattern: str,
    down_pattern: str,
) -> torch.Tensor:
    check_packed_mlp(hidden, top_k_index, top_k_weights, gate_up, down)
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@torch.library.custom_op("samoyeds::packed_up", mutates_args=(), device_types="cuda")
def packed_up(
    hidden: torch.Tensor,  # [T, H]
    top_k_index: torch.Tensor,  # [T, K] int64; outside 0..E-1 = no expert here
    gate_up: torch.Tensor,  # [E, P]  of a dense [E, 2I, H]
    two_inner: int,  # 2I
    pattern: str,
) -> torch.Tensor:
    """First product ``[T*K, 2I]``, row t*K + j = choice j; zeros without an expert.

    Raises:
        RuntimeError: from ``torch._check``, for shapes and dtypes that do not fit each other.
        KernelError: the library refuses, e.g. a packed weight of another shape or pattern.
    """
    check_packed_up(hidden, top_k_index, gate_up)
    out = hidden.new_empty(top_k_index.numel(), two_inner)
    if not top_k_index.numel():
        return out
    weight = _describe(gate_up, two_inner, hidden.shape[1], pattern, is_gate_up=True)
    _launch("samoyeds_moe_up", hidden, top_k_index, None, weight, None, out)
    return out


@packed_up.register_fake
def _packed_up_fake(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    gate_up: torch.Tensor,
    two_inner: int,
    pattern: str,
) -> torch.Tensor:
    check_packed_up(hidden, top_k_index, gate_up)
    return hidden.new_empty(top_k_index.shape[0] * top_k_index.shape[1], two_inner)


@torch.library.custom_op("samoyeds::packed_down", mutates_args=(), device_types="cuda")
def packed_down(
    inner: torch.Tensor,  # [T*K, I]
    top_k_index: torch.Tensor,  # [T, K] int64; outside 0..E-1 = no expert here
    top_k_weights: torch.Tensor,  # [T, K] floating
    down: torch.Tensor,  # [E, P]  of a dense [E, H, I]
    hidden: int,  # H
    pattern: str,
) -> torch.Tensor:
    """Second product ``[T, H]``: rows times their experts' weights, weighted and summed over K.

    Raises:
        RuntimeError: from ``torch._check``, for shapes and dtypes that do not fit each other.
        KernelError: the library refuses, e.g. a packed weight of another shape or pattern.
    """
    check_packed_down(inner, top_k_index, top_k_weights, down)
    out = inner.new_empty(top_k_index.shape[0], hidden)
    if not top_k_index.numel():
        return out.zero_()
    weight = _describe(down, hidden, inner.shape[1], pattern)
    _launch("samoyeds_moe_down", inner, top_k_index, top_k_weights, None, weight, out)
    return out


@packed_down.register_fake
def _packed_down_fake(
    inner: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    down: torch.Tensor,
    hidden: int,
    pattern: str,
) -> torch.Tensor:
    check_packed_down(inner, top_k_index, top_k_weights, down)
    return inner.new_empty(top_k_index.shape[0], hidden)


@torch.library.custom_op("samoyeds::packed_linear", mutates_args=(), device_types="cuda")
def packed_linear(
    x: torch.Tensor,  # [..., k]
    weight: torch.Tensor,  # [1, P]  of a dense [1, m, k]
    out_features: int,  # m
    pattern: str,
) -> torch.Tensor:
    """A single sparse Linear without bias: ``[..., m]``.

    Raises:
        RuntimeError: from ``torch._check``, for shapes and dtypes that do not fit each other.
        KernelError: the library refuses, e.g. a packed weight of another shape or pattern.
    """
    check_packed_linear(x, weight)
    out = x.new_empty(*x.shape[:-1], out_features)
    if not out.numel():
        return out
    x = align(x)
    described = _describe(weight, out_features, x.shape[-1], pattern)
    launch = launch_on(x.device)
    kernels = loaded()
    num_rows = x.numel() // x.shape[-1]
    head = (ctypes.byref(launch), ctypes.byref(described))
    num_bytes = kernels.handle.samoyeds_linear_workspace_bytes(*head, num_rows)
    _workspace = _lend_workspace(kernels, launch, num_bytes, x.device)
    kernels.check(kernels.handle.samoyeds_linear(*head, x.data_ptr(), num_rows, out.data_ptr()))
    return out


@packed_linear.register_fake
def _packed_linear_fake(
    x: torch.Tensor, weight: torch.Tensor, out_features: int, pattern: str
) -> torch.Tensor:
    check_packed_linear(x, weight)
    return x.new_empty(*x.shape[:-1], out_features)


for _op in (packed_mlp, packed_up, packed_down, packed_linear):
    _op.register_autograd(refuse_backward)


def _describe(
    packed: torch.Tensor, rows: int, cols: int, pattern: str, is_gate_up: bool = False
) -> Weight:
    known = _known(packed.shape[0], rows, cols, pattern, packed.dtype, is_gate_up)
    # A copy, because each call writes its own address into it and threads may call at once.
    return point_to(Weight.from_buffer_copy(known), packed)


@lru_cache(maxsize=1024)
def _known(
    experts: int, rows: int, cols: int, pattern: str, dtype: torch.dtype, is_gate_up: bool
) -> Weight:
    return PackedSpec(experts, rows, cols, parse(pattern), dtype, is_gate_up).as_weight()


def _launch(
    entry: str,  # of the library
    x: torch.Tensor,  # [T, H] or [T*K, I]
    top_k_index: torch.Tensor,  # [T, K]
    top_k_weights: torch.Tensor | None,  # [T, K]
    gate_up: Weight | None,
    down: Weight | None,
    out: torch.Tensor,
) -> None:
    """Queue one of the library's ``samoyeds_moe_*`` with the workspace that it asks for."""
    kernels, launch = loaded(), launch_on(x.device)
    x, index = align(x), align(top_k_index)
    routing = Routing(top_k_index=index.data_ptr(), num_tokens=index.shape[0], top_k=index.shape[1])
    if top_k_weights is not None:
        if top_k_weights.dtype not in DTYPE_CODES:
            top_k_weights = top_k_weights.float()
        top_k_weights = align(top_k_weights)
        routing.top_k_weights = top_k_weights.data_ptr()
        routing.weights_dtype = DTYPE_CODES[top_k_weights.dtype]
    both = [None if weight is None else ctypes.byref(weight) for weight in (gate_up, down)]
    head = (ctypes.byref(launch), ctypes.byref(routing))
    num_bytes = kernels.handle.samoyeds_workspace_bytes(*head, *both)
    _workspace = _lend_workspace(kernels, launch, num_bytes, x.device)
    weights = [weight for weight in both if weight is not None]
    function = getattr(kernels.handle, entry)
    kernels.check(function(*head, *weights, x.data_ptr(), out.data_ptr()))


def _lend_workspace(
    kernels: KernelLibrary, launch: Launch, num_bytes: int, device: torch.device
) -> torch.Tensor:
    """Memory for one call, which the caller keeps until it has queued its work.

    Freed after that and before the kernels have run; torch hands it out again only to work that is
    queued behind them on this stream.

    Raises:
        KernelError: ``num_bytes`` is negative, the library's way to refuse.
    """
    if num_bytes < 0:
        kernels.check(-num_bytes)
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    launch.workspace, launch.workspace_bytes = workspace.data_ptr(), num_bytes
    return workspace
