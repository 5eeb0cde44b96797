"""The layers of a checkpoint on disk, read when a walk needs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from samoyeds_hf.pruning.decoder import Decoder
from samoyeds_hf.skeleton import hollow_model

if TYPE_CHECKING:
    from samoyeds_hf.plan import ConversionPlan, Unit


class StreamedLayers:
    """Holds one layer at a time, and at the beginning what is before the first.

    Args:
        plan: of the conversion; the source's files are here.
        device: where layers are run.

    Raises:
        UnsupportedModelError: a model without one list of decoder layers.
    """

    def __init__(self, plan: ConversionPlan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        model = hollow_model(plan.model_config, plan.model.dtype)
        self.decoder = Decoder.find(model, plan.patterns)

    def open(self) -> torch.device:
        """Load embeddings and whatever else the decoder has beside its layers."""
        needed = self.decoder.is_needed_before
        self._load(unit for unit in self.plan.units if any(map(needed, unit.outputs)))
        for name, buffer in list(self.decoder.model.named_buffers()):
            if needed(name) and not buffer.is_meta:
                _put(self.decoder.model, name, buffer.to(self.device))
        return self.device

    def close(self) -> None:
        """Free that."""
        for name, _ in list(self.decoder.model.named_parameters()):
            if self.decoder.is_needed_before(name):
                self._free(name)

    def load(self, index: int) -> nn.Module:
        """Load one layer."""
        self._load(unit for unit in self.plan.units if self._layer_of(unit) == index)
        return self.decoder.layers[index].to(self.device)

    def release(self, index: int) -> None:
        """Free that layer."""
        for name, _ in list(self.decoder.model.named_parameters()):
            if self.decoder.layer_of(name) == index:
                self._free(name)

    def _layer_of(self, unit: Unit) -> int | None:
        return self.decoder.layer_of(next(iter(unit.outputs)))

    def _load(self, units: Iterable[Unit]) -> None:
        for unit in units:
            for name, tensor in self._tensors(unit).items():
                _put(self.decoder.model, name, tensor)

    def _tensors(self, unit: Unit) -> dict[str, torch.Tensor]:
        """A unit's tensors on the device, an expert at a time where its sources allow."""
        names = list(unit.outputs)
        spec = unit.outputs[names[0]]
        if len(names) == 1 and len(spec.shape) == 3 and unit.target.is_by_expert:
            stacked = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
            for expert in range(spec.shape[0]):
                stacked[expert] = unit.target.load_matrix(self.plan.model, expert)
            return {names[0]: stacked}
        loaded = unit.target.load(self.plan.model)
        # A copy, because what is read of a file is mapped, and will be written to.
        return {
            name: loaded[name].to(self.device, spec.dtype, copy=True)
            for name, spec in unit.outputs.items()
        }

    def _free(self, name: str) -> None:
        tensor = self.decoder.model.get_parameter(name)
        _put(self.decoder.model, name, torch.empty_like(tensor, device="meta"))


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace a parameter or buffer of a model."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if attribute in module._parameters:
        module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[attribute] = tensor
