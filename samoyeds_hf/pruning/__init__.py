"""Methods that choose which weights stay. A method returns a mask that is exactly the pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from samoyeds_hf.pruning.magnitude import magnitude_mask

if TYPE_CHECKING:
    import torch

    from samoyeds_hf.pattern import SparsityPattern

    # (weight [..., m, k], pattern, name) -> mask [..., m, k] bool
    Method = Callable[[torch.Tensor, SparsityPattern, str], torch.Tensor]

METHODS: dict[str, Method] = {"magnitude": magnitude_mask}
"""Data-free methods by name: each maps (weight, pattern, name) to a mask, expert by expert."""
