"""Weights that transformers' expert parallel has split over ranks: what this rank holds of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_plain(tensor: object) -> bool:
    """Whether a tensor is what it looks like: no subclass with an inside of its own."""
    return type(tensor) in (torch.Tensor, nn.Parameter)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's experts of a tensor ``[E, ...]``; the tensor itself where nothing is split."""
    if is_plain(tensor):
        return tensor
    distributed = _as_distributed(tensor)
    return tensor if distributed is None else distributed.to_local()


def shared_like(part: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Make this rank's part of a tensor what ``other`` is: split over the same ranks, or whole."""
    distributed = None if is_plain(other) else _as_distributed(other)
    if distributed is None:
        return part
    whole: torch.Tensor = type(distributed).from_local(
        part, distributed.device_mesh, distributed.placements, run_check=False
    )
    return whole


def why_not_local(tensor: torch.Tensor, num_experts: int | None) -> str | None:
    """Why this rank does not simply hold some whole experts of a tensor, or None if it does.

    Args:
        tensor: ``[E, ...]``, or whole.
        num_experts: that the module runs on this rank. NOTE: FSDP splits dimension 0 as well, but
            gathers it for the forward, which runs them all.
    """
    if is_plain(tensor):
        return None
    distributed = _as_distributed(tensor)
    if distributed is None:
        return f"a weight is a {type(tensor).__name__}"
    is_by_expert = [placement.is_shard(0) for placement in distributed.placements] == [True]
    if is_by_expert and distributed.to_local().shape[0] == num_experts:
        return None
    return f"a weight is split over ranks by {distributed.placements}"


def _as_distributed(tensor: torch.Tensor) -> Any:
    """The DTensor that it is, or None."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    inner = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    return inner if isinstance(inner, DTensor) else None
