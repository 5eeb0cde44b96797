"""The decoder layers of a model, run one at a time instead of by the model's own forward.

Every decoder of transformers hands each layer the hidden states and arguments that do not depend on
them: masks, positions, rotary tables. They are recorded once, by a run of the decoder in which each
layer is replaced by one that notes its arguments and hands on its input; then a layer alone, with
its arguments, does what it does inside the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from samoyeds_hf.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Call:
    """What a decoder gives one layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Decoder:
    """Where a model's decoder layers are."""

    model: PreTrainedModel
    path: str  # of the ModuleList, "model.layers"

    @classmethod
    def find(cls, model: PreTrainedModel, names: Iterable[str]) -> Decoder:
        """The list of layers that holds all of some modules or weights.

        Raises:
            UnsupportedModelError: they do not lie in one list.
        """
        paths = {path for name in names if (path := _first_list(model, name)) is not None}
        if len(paths) != 1:
            raise UnsupportedModelError(
                "Calibration goes through the decoder layer by layer and needs all experts in one "
                f"list of layers, found {sorted(paths) or 'none'} in {type(model).__name__}; use "
                "method 'magnitude', which needs no calibration."
            )
        return cls(model, paths.pop())

    @property
    def layers(self) -> nn.ModuleList:
        """The layers in order."""
        found = self.model.get_submodule(self.path)
        if not isinstance(found, nn.ModuleList):
            raise TypeError(f"{self.path} is a {type(found).__name__}")
        return found

    @property
    def parent_path(self) -> str:
        """Path of the module whose forward runs the layers, "model"; "" is the model itself."""
        return self.path.rpartition(".")[0]

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a tensor or module belongs to; None is outside."""
        if not name.startswith(self.path + "."):
            return None
        return int(name[len(self.path) + 1 :].split(".")[0])

    def is_needed_before(self, name: str) -> bool:
        """Whether a tensor is used before the first layer: in the decoder, but in no layer."""
        parent = self.parent_path
        return name.startswith(parent + "." if parent else "") and self.layer_of(name) is None

    def record(
        self,
        tokens: torch.Tensor,  # [B, S]  int64
    ) -> tuple[torch.Tensor, list[Call]]:
        """The first layer's input ``[B, S, H]``, and the calls of all layers for that batch.

        Raises:
            UnsupportedModelError: a decoder that hands more than hidden states from layer to layer.
        """
        layers = self.layers
        inputs: list[tuple[torch.Tensor, Call]] = []
        recorders = [_Recorder(layer, inputs, len(layers)) for layer in layers]
        # The list's members are replaced and put back: no class and no forward is touched.
        originals = list(layers)
        try:
            for position, recorder in enumerate(recorders):
                layers[position] = recorder
            self.model.get_submodule(self.parent_path)(input_ids=tokens, use_cache=False)
        except _AllRecordedError:
            pass
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            raise UnsupportedModelError(
                "Calibration needs a decoder whose layers map hidden states to hidden states, "
                f"found one that does more in {type(self.model).__name__} ({error}); use method "
                "'magnitude', which needs no calibration."
            ) from error
        finally:
            for position, layer in enumerate(originals):
                layers[position] = layer
        return inputs[0][0], [call for _, call in inputs]


def run_layer(layer: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """One layer's output for its input, ``[B, S, H]`` both (some families have more dimensions).

    Raises:
        UnsupportedModelError: the layer returns, or needs, more than hidden states.
    """
    # Copies, because what a layer leaves in a mapping for later ones is that of one batch only.
    kwargs = {
        key: copy(value) if isinstance(value, MutableMapping) else value
        for key, value in call.kwargs.items()
    }
    try:
        output = layer(hidden, *call.args, **kwargs)
    except KeyError as error:
        raise UnsupportedModelError(
            "Calibration needs layers that map hidden states to hidden states, found "
            f"{type(layer).__name__}, which reads what another one left ({error}); use method "
            "'magnitude', which needs no calibration."
        ) from error
    if isinstance(output, tuple) and len(output) == 1:
        (output,) = output
    if not isinstance(output, torch.Tensor):
        raise UnsupportedModelError(
            "Calibration needs layers that map hidden states to hidden states, found "
            f"{type(layer).__name__}, which also returns other things; use method 'magnitude', "
            "which needs no calibration."
        )
    return output


def alike(one: Any, other: Any) -> bool:
    """Whether two calls, or what is in them, are the same: structures of equal tensors."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one is other or (one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, Call):
        return alike((one.args, one.kwargs), (other.args, other.kwargs))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


class _AllRecordedError(Exception):
    """The last layer was reached: what comes after it is not needed."""


class _Recorder(nn.Module):
    """Takes a layer's place, notes how it is called, and hands on the hidden states."""

    def __init__(self, layer: nn.Module, calls: list[tuple[torch.Tensor, Call]], last: int) -> None:
        super().__init__()
        vars(self)["_layer"], self._calls, self._last = layer, calls, last

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["_layer"], name)  # decoders read attention_type and the like

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._calls.append((hidden_states, Call(args, kwargs)))
        if len(self._calls) == self._last:
            raise _AllRecordedError
        return hidden_states


def _first_list(model: nn.Module, name: str) -> str | None:
    """Path of the first ModuleList on the way to a module or weight."""
    module, path = model, ""
    for part in name.split("."):
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            return None
        module, path = child, f"{path}.{part}" if path else part
        if isinstance(module, nn.ModuleList):
            return path
    return None
