"""The masks that sparse weights were stored with: read from meta and index, never from zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from samoyeds_hf.format import SparseWeight, decode
from samoyeds_hf.sparse_module import SparseModule

if TYPE_CHECKING:
    from torch import nn

    from samoyeds_hf.pattern import SparsityPattern


def kept_mask(stored: SparseWeight, pattern: SparsityPattern) -> torch.Tensor:
    """The mask ``[..., m, k]`` bool of what is kept; true also where a kept value is 0.

    The tensors are trusted, as by :func:`samoyeds_hf.decode`. Memory: three bytes a dense weight.
    """
    ones = torch.ones_like(stored.values, dtype=torch.bfloat16)
    return decode(stored._replace(values=ones), pattern).to(torch.bool)


def kept_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """The mask of every sparse weight of a model, by the name that the dense weight has."""
    return {
        f"{name}.{weight}": kept_mask(module.stored(weight), pattern)
        for name, module in model.named_modules()
        if isinstance(module, SparseModule)
        for weight, pattern in module.patterns.items()
    }
