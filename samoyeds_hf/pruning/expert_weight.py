"""One weight of a layer that is pruned, and what is known of its experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from samoyeds_hf.errors import CalibrationError

if TYPE_CHECKING:
    from samoyeds_hf.pattern import SparsityPattern


@dataclass(frozen=True)
class ExpertWeight:
    """A weight of the layer that is pruned."""

    name: str  # full
    module: nn.Module
    attribute: str
    pattern: SparsityPattern

    @property
    def parameter(self) -> nn.Parameter:
        """As it is now."""
        return self.module.get_parameter(self.attribute)

    @property
    def stacked(self) -> torch.Tensor:
        """Its data ``[E, m, k]``, a view; a Linear's is one expert."""
        data = self.parameter.data
        return data if data.ndim == 3 else data.unsqueeze(0)


@dataclass(frozen=True)
class ExpertRow:
    """What is known of one expert's weight."""

    error: float
    tokens: int
    notes: tuple[str, ...]
    lost: float  # |W - Q|^2
    norm: float  # |W|^2


def find_weight(layer: nn.Module, path: str, name: str, pattern: SparsityPattern) -> ExpertWeight:
    """A weight by its full name in the model, of whose layers ``path`` is this one's."""
    module_path, _, attribute = name.removeprefix(path + ".").rpartition(".")
    module = layer.get_submodule(module_path)
    return ExpertWeight(name, module, attribute, pattern)


def squares(
    dense: torch.Tensor,  # [E, m, k]
    pruned: torch.Tensor,  # [E, m, k]
) -> tuple[list[float], list[float]]:
    """``|W - Q|^2`` and ``|W|^2`` of each expert, in fp64 an expert at a time."""
    lost = [(old.double() - new).square().sum() for old, new in zip(dense, pruned, strict=True)]
    norm = [old.double().square().sum() for old in dense]
    return torch.stack(lost).tolist(), torch.stack(norm).tolist()


def place_of(weight: ExpertWeight, experts: range) -> str:
    """What messages call a group of experts, whose matrices are counted from 0."""
    whole = len(experts) == weight.stacked.shape[0]
    return weight.name if whole else f"{weight.name}[{experts.start}:{experts.stop}]"


@contextmanager
def naming(weight: ExpertWeight, experts: range) -> Iterator[None]:
    """Errors of moments say whose inputs they were."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"{place_of(weight, experts)}: {error}") from error


def is_linear(weight: ExpertWeight) -> bool:
    """Whether it is a Linear's, as in shared experts, and no fused module's."""
    return isinstance(weight.module, nn.Linear)
