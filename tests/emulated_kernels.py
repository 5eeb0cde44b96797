"""Kernels on the CPU: packing by the plain loops of fragment_emulation, products by unpacking.

With them the modules go through everything that they do on a GPU, without one.
"""

from __future__ import annotations

from typing import Any

import fragment_emulation
import torch

from samoyeds_hf import SparsityPattern, packed, packed_ops, reference
from samoyeds_hf.checks import PACKED_DTYPES
from samoyeds_hf.format import SparseWeight, decode
from samoyeds_hf.packed import PackedSpec


def why_not(spec: PackedSpec, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the weights are on {device}"
    return None if spec.dtype in PACKED_DTYPES else f"the weights are {spec.dtype}"


def pack(stored: SparseWeight, spec: PackedSpec) -> torch.Tensor:
    assert stored.values.dtype == spec.dtype
    assert stored.values.shape[0] == spec.experts
    packed_bytes = fragment_emulation.pack(stored, spec.pattern, spec.rows, spec.is_gate_up)
    return packed_bytes.view(spec.dtype)


def unpack(tensor: torch.Tensor, spec: PackedSpec) -> SparseWeight:
    assert tensor.dtype == spec.dtype
    shape = (spec.rows, spec.cols)
    packed_bytes = tensor.detach().view(torch.uint8)
    return fragment_emulation.unpack(packed_bytes, spec.pattern, shape, spec.dtype, spec.is_gate_up)


def install(monkeypatch: Any) -> None:
    """Until the monkeypatch is undone, the CPU is a device that kernels serve."""
    for function in (why_not, pack, unpack):
        monkeypatch.setattr(packed, function.__name__, function)


def _canonical(
    tensor: torch.Tensor, rows: int, cols: int, text: str, is_gate_up: bool = False
) -> tuple[SparseWeight, SparsityPattern]:
    pattern = SparsityPattern.parse(text)
    spec = PackedSpec(tensor.shape[0], rows, cols, pattern, tensor.dtype, is_gate_up)
    return unpack(tensor, spec), pattern


@packed_ops.packed_mlp.register_kernel("cpu")
def _packed_mlp(hidden, index, weights, gate_up, down, inner, gate_up_text, down_text):  # type: ignore[no-untyped-def]
    width = hidden.shape[1]
    up, up_pattern = _canonical(gate_up, 2 * inner, width, gate_up_text, is_gate_up=True)
    low, low_pattern = _canonical(down, width, inner, down_text)
    return reference.moe_mlp(hidden, index, weights, up, low, up_pattern, low_pattern)


@packed_ops.packed_up.register_kernel("cpu")
def _packed_up(hidden, index, gate_up, two_inner, text):  # type: ignore[no-untyped-def]
    up, pattern = _canonical(gate_up, two_inner, hidden.shape[1], text, is_gate_up=True)
    return reference.grouped_linear(hidden, index.reshape(-1), up, pattern, index.shape[1])


@packed_ops.packed_down.register_kernel("cpu")
def _packed_down(inner, index, weights, down, width, text):  # type: ignore[no-untyped-def]
    low, pattern = _canonical(down, width, inner.shape[1], text)
    rows = reference.grouped_linear(inner, index.reshape(-1), low, pattern, 1)
    return reference.combine(rows, index, weights, down.shape[0])


@packed_ops.packed_linear.register_kernel("cpu")
def _packed_linear(x, weight, out_features, text):  # type: ignore[no-untyped-def]
    stored, pattern = _canonical(weight, out_features, x.shape[-1], text)
    return torch.nn.functional.linear(x, decode(stored, pattern)[0])
