"""Calibrated pruning of a whole model, one decoder layer after the other.

Only the hidden states of the calibration sequences go from layer to layer, and those that a layer
gets come from layers that are pruned already. So a walk needs one layer at a time: of a model in
memory, or of one whose layers are read when they are due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from samoyeds_hf.errors import CalibrationError, UnsupportedModelError
from samoyeds_hf.pruning.decoder import Call, Decoder, alike, run_layer
from samoyeds_hf.pruning.follow import DenseInputs
from samoyeds_hf.pruning.inputs import to_host
from samoyeds_hf.pruning.layer import LayerPruner, PrunedWeight, PruneSettings
from samoyeds_hf.pruning.recover import recover_block
from samoyeds_hf.pruning.team import Team
from samoyeds_hf.pruning.training import Log

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from samoyeds_hf.pattern import SparsityPattern


class Layers(Protocol):
    """Where a walk gets the parts of a model from."""

    @property
    def decoder(self) -> Decoder:
        """The model's decoder; the layers may be without weights."""

    def open(self) -> torch.device:
        """Make all that is used before the first layer ready to run; where it is."""

    def close(self) -> None:
        """That is not needed any more."""

    def load(self, index: int) -> nn.Module:
        """One layer, ready to run."""

    def release(self, index: int) -> None:
        """That layer is not needed any more."""


@dataclass(frozen=True)
class InMemory:
    """The layers of a model that is loaded."""

    decoder: Decoder

    def open(self) -> torch.device:
        """It is ready."""
        device: torch.device = self.decoder.model.device
        return device

    def close(self) -> None:
        """Nothing."""

    def load(self, index: int) -> nn.Module:
        """It is loaded."""
        return self.decoder.layers[index]

    def release(self, index: int) -> None:
        """It stays."""


@dataclass(frozen=True)
class LayerResult:
    """A layer that was pruned in place; valid until the walk goes on."""

    index: int
    path: str  # "model.layers.3"
    layer: nn.Module
    weights: list[PrunedWeight]


class Walk:
    """Iterate to prune layer by layer; each step gives a :class:`LayerResult`.

    Args:
        layers: where layers come from.
        patterns: of each weight that becomes sparse, by full name.
        tokens: calibration sequences ``[N, S]`` int64, without padding.
        settings: how weights are pruned.
        team: the processes that share the work; each walks, and all get the same result.

    Raises:
        CalibrationError: no sequences.
        UnsupportedModelError: a decoder that cannot run layer by layer.
    """

    def __init__(
        self,
        layers: Layers,
        patterns: Mapping[str, SparsityPattern],
        tokens: torch.Tensor,
        settings: PruneSettings,
        team: Team | None = None,
    ) -> None:
        if tokens.ndim != 2 or not tokens.numel():
            raise CalibrationError(
                f"Calibration tokens must be [sequences, length], found {list(tokens.shape)}."
            )
        _check_vocabulary(layers.decoder.model, tokens)
        self.layers, self.settings, self.team = layers, settings, team or Team()
        self.log: Log | None = None  # is told of each step of a layer's recovery
        self.by_layer: dict[int, dict[str, SparsityPattern]] = {}
        for name, pattern in patterns.items():
            index = layers.decoder.layer_of(name)
            if index is not None:
                self.by_layer.setdefault(index, {})[name] = pattern
        self.next = 0  # the layer that ``hidden`` is the input of
        self.hidden, self.calls = self._begin(tokens)
        # The same tokens in the dense model, where it is followed; None while they are the same.
        self.dense: list[torch.Tensor] | None = None

    @property
    def last(self) -> int:
        """The last layer that has anything to prune."""
        return max(self.by_layer)

    def resume(
        self,
        next_layer: int,
        hidden: Sequence[torch.Tensor],
        dense: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Go on where an earlier walk stood: before a layer, with its input batches."""
        self.next, self.hidden = next_layer, list(hidden)
        self.dense = None if dense is None else list(dense)

    def __iter__(self) -> Iterator[LayerResult]:
        while self.next <= self.last:
            index = self.next
            layer = self.layers.load(index)
            try:
                path = f"{self.layers.decoder.path}.{index}"
                yield LayerResult(index, path, layer, self._prune(index, path, layer))
            finally:
                self.layers.release(index)

    @torch.no_grad()
    def _prune(self, index: int, path: str, layer: nn.Module) -> list[PrunedWeight]:
        weights: list[PrunedWeight] = []
        if index in self.by_layer:
            outputs: list[torch.Tensor] = []

            def run() -> None:
                if self.settings.block is None or self.settings.follows_dense or outputs:
                    for _ in self._outputs(index, layer, self.hidden):
                        pass
                else:
                    outputs.extend(map(to_host, self._outputs(index, layer, self.hidden)))

            dense = None
            if self.settings.follows_dense:
                self.dense = list(self.hidden) if self.dense is None else self.dense
                dense = DenseInputs(
                    layer,
                    run=partial(self._advance, index, layer, self.dense),
                    outputs=self.dense,
                    run_one=lambda: next(self._outputs(index, layer, self.hidden)),
                )
            patterns = self.by_layer[index]
            pruner = LayerPruner(layer, path, patterns, run, self.settings, self.team, dense)
            weights = pruner.prune()
            if self.settings.block is not None:
                targets = outputs if self.dense is None else self.dense
                self._recover(index, layer, pruner, targets)
                weights = [pruner.measured_again(weight) for weight in weights]
        elif self.dense is not None:
            self._advance(index, layer, self.dense)
        if index < self.last:
            self._advance(index, layer, self.hidden)
        self.next = index + 1
        return weights

    def _recover(
        self, index: int, layer: nn.Module, pruner: LayerPruner, targets: list[torch.Tensor]
    ) -> None:
        """Train what is left towards the dense layer's outputs; one process does it for all."""
        pairs = list(zip(self.hidden, self.calls, strict=True))
        by_size = {hidden.shape[0]: calls for hidden, calls in pairs}
        if any(by_size[h.shape[0]] is not c for h, c in pairs):
            raise UnsupportedModelError(
                "Recovery by layers needs layers that are told nothing of the tokens, found "
                f"{type(layer).__name__}, which is; use --recover distill."
            )

        def run(hidden: torch.Tensor) -> torch.Tensor:
            return run_layer(layer, hidden, by_size[hidden.shape[0]][index])

        settings, log = self.settings.block, None
        if settings is not None and self.log is not None:
            log = partial(_log_step, self.log, index, settings.num_steps(len(self.hidden)))
        weights = pruner.trainable(settings is None or settings.train == "all")
        if self.team.leads:
            recover_block(layer, run, self.hidden, targets, weights, settings, log)
        for parameter, _ in weights.values():
            self.team.follow_tensor(parameter.data)

    def _advance(self, index: int, layer: nn.Module, hidden: list[torch.Tensor]) -> None:
        """Put a layer's outputs in the place of its inputs."""
        for position, output in enumerate(self._outputs(index, layer, hidden)):
            hidden[position] = to_host(output)

    def _outputs(
        self, index: int, layer: nn.Module, hidden: list[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        device = next(layer.parameters()).device
        for batch, calls in zip(hidden, self.calls, strict=True):
            yield run_layer(layer, batch.to(device, non_blocking=True), calls[index])

    @torch.no_grad()
    def _begin(self, tokens: torch.Tensor) -> tuple[list[torch.Tensor], list[list[Call]]]:
        """Inputs of the first layer and every layer's call, batch by batch."""
        decoder = self.layers.decoder
        device = self.layers.open()
        hidden: list[torch.Tensor] = []
        calls: list[list[Call]] = []
        try:
            for batch in tokens.split(self.settings.batch_size):
                first, recorded = decoder.record(batch.to(device))
                hidden.append(to_host(first))
                # Without padding the calls of all batches of a size are alike, and kept once. Not
                # where layers are told the tokens, as with inputs per layer or hashed routing.
                calls.append(next((known for known in calls if alike(known, recorded)), recorded))
        finally:
            self.layers.close()
        return hidden, calls


def _log_step(log: Log, index: int, steps: int, row: Mapping[str, float]) -> None:
    """Steps are counted through the layers, so that a log that goes on knows where."""
    log({**row, "step": index * steps + int(row["step"]), "layer": index})


def _check_vocabulary(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    size = model.config.get_text_config().vocab_size
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= size:
        raise CalibrationError(
            f"Calibration tokens must be in the model's vocabulary, 0 to {size - 1}, found "
            f"{low} to {high}; use the model's own tokenizer."
        )


def prune_model(
    model: PreTrainedModel,
    patterns: Mapping[str, SparsityPattern],
    tokens: torch.Tensor,  # [N, S] int64
    settings: PruneSettings,
    *,
    on_layer: Callable[[LayerResult], None] | None = None,
) -> list[PrunedWeight]:
    """Prune a loaded dense model in place: afterwards its weights are zero outside the masks.

    Args:
        model: with its weights in memory, on one device.
        patterns: by full name of the weight, ``Selection.targets``.
        tokens: calibration sequences without padding.
        settings: how.
        on_layer: is told of each layer.

    Raises:
        CalibrationError: no tokens, or data that cannot be used.
        PatternError: a weight that its pattern does not divide.
        UnsupportedModelError: a decoder that cannot run layer by layer.
    """
    was_training = model.training
    model.eval()
    pruned: list[PrunedWeight] = []
    try:
        walk = Walk(InMemory(Decoder.find(model, patterns)), patterns, tokens, settings)
        for result in walk:
            pruned += result.weights
            if on_layer is not None:
                on_layer(result)
    finally:
        model.train(was_training)
    return pruned
