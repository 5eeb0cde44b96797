"""Weights in the kernels' own order: what it takes to pack one, and to get it back exactly.

A packed weight is one tensor ``[E, P]``: P values' worth of bytes an expert, in the values' dtype.
Its order belongs to the kernel library, which names it (``layout``); nothing else in the package
knows it, and it is never written to disk.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from functools import lru_cache

import torch

from samoyeds_hf import library
from samoyeds_hf.checks import PACKED_DTYPES
from samoyeds_hf.errors import KernelError
from samoyeds_hf.format import SparseWeight, stored_shapes
from samoyeds_hf.library import KernelLibrary, Launch, Weight
from samoyeds_hf.pattern import SparsityPattern

# SamoyedsDtype of kernels/include/samoyeds/api.h
DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

_SEGMENT = 10 << 20  # bytes; torch's allocator gives larger tensors a segment of their own
_ALIGNMENT = 16  # bytes; the kernels load and store so many at once


@dataclass(frozen=True)
class PackedSpec:
    """What a packed tensor stands for: a dense weight ``[experts, rows, cols]`` and its pattern."""

    experts: int
    rows: int
    cols: int
    pattern: SparsityPattern
    dtype: torch.dtype
    is_gate_up: bool  # the first half of the rows is the gate, the other half up

    def as_weight(self) -> Weight:
        """The library's description of it, still without an address."""
        return Weight(
            num_experts=self.experts,
            rows=self.rows,
            cols=self.cols,
            n=self.pattern.n,
            m=self.pattern.m,
            v=self.pattern.sub_row(self.cols),
            dtype=DTYPE_CODES[self.dtype],
            is_gate_up=int(self.is_gate_up),
        )


def why_not(spec: PackedSpec, device: torch.device) -> str | None:
    """Why a weight cannot be packed on a device, or None if it can.

    The first call for a GPU loads the kernels onto it.

    Raises:
        KernelError: that first call came while a CUDA graph was captured.
    """
    if device.type != "cuda":
        return f"the weights are on {device}"
    if spec.dtype not in PACKED_DTYPES:
        return f"the weights are {spec.dtype} (kernels take bf16 and fp16)"
    if library.load() is None:
        return library.unavailable_reason()
    reason = _why_not_on(torch.cuda.current_device() if device.index is None else device.index)
    if reason is not None:
        return reason
    try:
        _packed_bytes(spec)
    except KernelError as error:
        return str(error)
    return None


def pack(stored: SparseWeight, spec: PackedSpec) -> torch.Tensor:
    """Canonical tensors ``[E, m*N/M, ..]`` on a GPU to the packed ``[E, P]``, with all their bits.

    Raises:
        KernelError: the library refuses; :func:`why_not` says so before.
    """
    kernels, device = loaded(), stored.values.device
    shape = (spec.experts, _packed_bytes(spec) // spec.experts // spec.dtype.itemsize)
    packed = torch.empty(shape, dtype=spec.dtype, device=device)
    weight = point_to(spec.as_weight(), packed)
    aligned = [align(tensor) for tensor in stored]
    addresses = [tensor.data_ptr() for tensor in aligned]
    launch = launch_on(device)
    kernels.check(
        kernels.handle.samoyeds_pack(ctypes.byref(launch), ctypes.byref(weight), *addresses)
    )
    return packed


def unpack(packed: torch.Tensor, spec: PackedSpec) -> SparseWeight:
    """The canonical tensors that :func:`pack` was given, on the same GPU.

    Raises:
        KernelError: the tensor is not on a GPU, or not a packed weight of this kind.
    """
    if not packed.is_cuda:
        raise KernelError(
            f"A packed weight is read on a CUDA device, found it on {packed.device}; move the "
            "module with .to(), which brings its weights back to the canonical order first."
        )
    kernels = loaded()
    shapes = stored_shapes((spec.experts, spec.rows, spec.cols), spec.pattern)
    dtypes = (spec.dtype, torch.uint8, torch.uint8)
    stored = SparseWeight(
        *(
            torch.empty(shape, dtype=dtype, device=packed.device)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )
    )
    weight = point_to(spec.as_weight(), packed)
    addresses = [tensor.data_ptr() for tensor in stored]
    launch = launch_on(packed.device)
    kernels.check(
        kernels.handle.samoyeds_unpack(ctypes.byref(launch), ctypes.byref(weight), *addresses)
    )
    return stored


def settle(new: torch.Tensor) -> None:
    """Let ``new`` be ready for every stream, and give the memory of what it replaced back.

    NOTE: torch would keep that memory, and the next weight, of a slightly other size, does not fit
    in: a model would come to take twice its size while it is packed.
    """
    if new.is_cuda:
        torch.cuda.current_stream(new.device).synchronize()
        if new.numel() * new.element_size() >= _SEGMENT:
            torch.cuda.empty_cache()


def pack_now(
    stored: SparseWeight,  # of dense shape [E, m, k]
    pattern: SparsityPattern,
    is_gate_up: bool = False,
) -> torch.Tensor | None:
    """Pack a weight for one call only, or None where kernels do not serve it.

    Raises:
        KernelError: see :func:`why_not`.
    """
    experts, kept, half_cols = stored.values.shape
    rows = kept // pattern.n * pattern.m
    spec = PackedSpec(experts, rows, half_cols * 2, pattern, stored.values.dtype, is_gate_up)
    reason = why_not(spec, stored.values.device)
    if reason is not None:
        announce_plain_torch(reason)
        return None
    _announce(
        "some weights on a GPU are not kept in the kernels' order (offloaded ones cannot be) and "
        "are brought into it at each call: right, but slow"
    )
    return pack(stored, spec)


def announce_plain_torch(reason: str) -> None:
    """Say once a process why experts on a GPU run without the kernels that are there."""
    if library.load() is not None:  # else the library has said it
        _announce(f"experts on a GPU run in plain torch where {reason}")


@lru_cache(maxsize=1)
def loaded() -> KernelLibrary:
    """The kernel library.

    Raises:
        KernelError: there is none.
    """
    kernels = library.load()
    if kernels is None:
        raise KernelError(f"Packed weights need the kernel library: {library.unavailable_reason()}")
    return kernels


def launch_on(device: torch.device) -> Launch:
    """The device and its current stream, as the library takes them."""
    return Launch(device=device.index, stream=torch.cuda.current_stream(device).cuda_stream)


def point_to(weight: Weight, packed: torch.Tensor) -> Weight:
    """Give a description the address of its tensor."""
    weight.packed = packed.data_ptr()
    weight.num_bytes = packed.numel() * packed.element_size()
    return weight


def align(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor contiguous and at an address that kernels can read; a copy if need be."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _packed_bytes(spec: PackedSpec) -> int:
    kernels = loaded()
    num_bytes = int(kernels.handle.samoyeds_packed_bytes(ctypes.byref(spec.as_weight())))
    if num_bytes < 0:
        kernels.check(-num_bytes)
    return num_bytes


@lru_cache
def _why_not_on(index: int) -> str | None:
    """Load the kernels onto a GPU, once."""
    if torch.cuda.is_current_stream_capturing():
        raise KernelError(
            f"Kernels are loaded onto cuda:{index} before a CUDA graph is captured, found none "
            "loaded; run the model once before the capture."
        )
    kernels = loaded()
    try:
        kernels.check(kernels.handle.samoyeds_prepare(index))
    except KernelError as error:
        return str(error)
    return None


@lru_cache
def _announce(text: str) -> None:
    logging.getLogger("samoyeds_hf").warning("samoyeds_hf: %s.", text)
