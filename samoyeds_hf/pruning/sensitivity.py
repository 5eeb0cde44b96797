"""What each pattern of each weight costs the model's output, measured on the dense model.

Errors relative to a projection's own output do not compare: they say nothing of how much the
output of that projection matters. So every weight is pruned alone, and what counts is how far the
hidden states of the last layer move. All layers for each weight and pattern would be too much, so

* each pattern is tried on the spot: the change of the layer's output, of each token relative to
  its hidden state, which is what the next norm sees;
* for one pattern a weight the changed hidden states of a few sequences go along through all later
  layers. What becomes of their change there is the weight's gain, which scales the other patterns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from samoyeds_hf.errors import PatternError
from samoyeds_hf.pruning.decoder import run_layer
from samoyeds_hf.pruning.inputs import to_host
from samoyeds_hf.pruning.layer import LayerPruner
from samoyeds_hf.pruning.methods import prune_experts
from samoyeds_hf.pruning.walk import LayerResult, Walk

if TYPE_CHECKING:
    from samoyeds_hf.pattern import SparsityPattern
    from samoyeds_hf.pruning.decoder import Decoder
    from samoyeds_hf.pruning.expert_weight import ExpertWeight
    from samoyeds_hf.pruning.inputs import LinearInputs
    from samoyeds_hf.pruning.layer import PrunedWeight, PruneSettings
    from samoyeds_hf.pruning.team import Team
    from samoyeds_hf.pruning.walk import Layers

EACH = "*"  # in the name of a group of weights, where the number of an expert stands
_SAMPLE_TOKENS = 8192  # tokens that carry changes through the layers
_FAST = ("magnitude", "wanda", "sparsegpt")  # sparsegpt stands in for other methods
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")


@dataclass(frozen=True)
class Measured:
    """A weight, or the weights of a list of experts, with one pattern."""

    loss: float  # mean over tokens of |h - h'|^2 / |h|^2 after the last pruned layer
    elements: int  # of the dense weight


def measure_errors(
    layers: Layers,
    patterns: Mapping[str, SparsityPattern],
    tokens: torch.Tensor,  # [N, S] int64
    settings: PruneSettings,
    budget: float,
    candidates: Sequence[SparsityPattern],
    *,
    team: Team | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Measured]]:
    """One walk over the dense model; its weights are as before afterwards.

    Every weight is pruned for the inputs that it has in the dense model, whatever is tried. Moments
    are those of all sequences, changes are measured on the first few. Memory beside a walk's: a
    weight with each candidate, and the hidden states of the few sequences for each weight.

    Args:
        layers: of the dense model, in memory or streamed.
        patterns: its keys are the full names of the weights.
        tokens: calibration sequences without padding.
        settings: how weights are pruned; for a slow method ``sparsegpt`` with ``refine`` stands in.
        budget: share that is to be dropped; the candidate nearest to it goes through all layers.
        candidates: of which each weight tries those that divide it.
        team: the processes that share the work; all get what the first one measured.
        on_layer: is told the number of each layer that was measured.

    Returns:
        By the name of the weight, then by the text of the pattern. The weights of a list of experts
        are taken as one, with ``*`` in the place of the number.

    Raises:
        CalibrationError: no tokens, or inputs that are not finite.
        PatternError: a weight that no candidate divides.
        UnsupportedModelError: a decoder that cannot run layer by layer.
    """
    model = layers.decoder.model
    groups = _groups(layers.decoder, patterns, budget, candidates)
    was_training = model.training
    model.eval()
    try:
        walk = _DenseWalk(layers, patterns, tokens, _fast(settings, tokens), team)
        for result in walk.trying(groups):
            if on_layer is not None:
                on_layer(result.index)
    finally:
        model.train(was_training)
    measured = {key: group.measured() for key, group in groups.items()}
    # ranks may differ in the last bit, and then in the choice
    return walk.team.follow(measured)  # type: ignore[no-any-return]


def unmeasured(
    decoder: Decoder,
    names: Iterable[str],
    budget: float,
    candidates: Sequence[SparsityPattern],
) -> dict[str, dict[str, Measured]]:
    """What :func:`measure_errors` will return, with losses of 0: sizes are known beforehand.

    Raises:
        PatternError: a weight that no candidate divides.
    """
    return {
        key: {str(pattern): Measured(0.0, group.elements) for pattern in group.candidates}
        for key, group in _groups(decoder, names, budget, candidates).items()
    }


def _fast(settings: PruneSettings, tokens: torch.Tensor) -> PruneSettings:
    """Settings for measuring: batches are small, because the first one is the sample."""
    few = max(1, _SAMPLE_TOKENS // max(1, tokens.shape[-1]))
    size = min(settings.batch_size, few)
    # inputs are those of the dense model, and nothing is left to recover
    settings = replace(settings, batch_size=size, asymmetric=False, block=None)
    if settings.method in _FAST:
        return settings
    return replace(settings, method="sparsegpt", refine=True)


@dataclass
class _Group:
    """Weights of one layer that get the same pattern: one, or those of all experts in a list."""

    names: list[str]
    elements: int
    candidates: list[SparsityPattern]  # those that divide the weights
    carried: SparsityPattern  # the one that goes along through the layers
    local: dict[str, float] = field(default_factory=dict)  # change at the layer, by pattern
    final: float = 0.0  # change after the last layer, with the carried pattern

    def measured(self) -> dict[str, Measured]:
        """Losses by pattern."""
        here = self.local[str(self.carried)]
        gain = self.final / here if here > 0 else 1.0
        return {text: Measured(gain * loss, self.elements) for text, loss in self.local.items()}


def _groups(
    decoder: Decoder,
    names: Iterable[str],
    budget: float,
    candidates: Sequence[SparsityPattern],
) -> dict[str, _Group]:
    """What gets patterns of its own, by key."""
    keys: dict[str, list[str]] = {}
    for name in names:
        index = decoder.layer_of(name)
        start = len(f"{decoder.path}.{index}.")
        keys.setdefault(name[:start] + _NUMBER.sub(EACH, name[start:]), []).append(name)
    groups = {}
    for key, members in keys.items():
        shapes = [tuple(decoder.model.get_parameter(name).shape) for name in members]
        elements = sum(math.prod(shape) for shape in shapes)
        fitting = _fitting(candidates, members[0], shapes)
        carried = min(fitting, key=lambda pattern: abs(1 - pattern.density - budget))
        groups[key] = _Group(members, elements, fitting, carried)
    return groups


def _fitting(
    candidates: Sequence[SparsityPattern], name: str, shapes: Iterable[tuple[int, ...]]
) -> list[SparsityPattern]:
    """The candidates that divide all of some weights."""
    sizes = {shape[-2:] for shape in shapes}
    fitting, reason = [], ""
    for pattern in candidates:
        try:
            for rows, k in sizes:
                pattern.check_fits(rows, k, name)
        except PatternError as error:
            reason = str(error)
        else:
            fitting.append(pattern)
    if not fitting:
        raise PatternError(
            f"Each weight needs a candidate that divides it, found none of "
            f"{[str(pattern) for pattern in candidates]} for {name}; {reason}"
        )
    return fitting


class _DenseWalk(Walk):
    """Goes through the layers, tries patterns in each, and leaves all weights as they were."""

    def trying(self, groups: Mapping[str, _Group]) -> Iterator[LayerResult]:
        """Try the candidates of the groups, layer by layer, and fill in what is measured."""
        self._groups, self._by_layer, self.by_layer = groups, self.by_layer, {}
        self._streams: dict[str, torch.Tensor] = {}  # changed hidden states of the sample
        yield from self

    @property
    def last(self) -> int:
        """The last layer that has anything to try."""
        return max(self._by_layer)

    @torch.no_grad()
    def _prune(self, index: int, path: str, layer: nn.Module) -> list[PrunedWeight]:
        """Measures in the place of pruning."""
        dense = self._through(index, layer, self.hidden[0])
        for key, hidden in self._streams.items():
            self._streams[key] = to_host(self._through(index, layer, hidden))
        if index in self._by_layer:
            self._try_all(index, path, layer, dense)
        if index == self.last:
            for key, hidden in self._streams.items():
                self._groups[key].final = _change(hidden.to(dense.device), dense)
        return super()._prune(index, path, layer)  # nothing to prune, so it only goes on

    def _try_all(self, index: int, path: str, layer: nn.Module, dense: torch.Tensor) -> None:
        def run() -> None:
            for _ in self._outputs(index, layer, self.hidden):
                pass

        patterns = self._by_layer[index]
        trials = _Trials(layer, path, patterns, run, self.settings, self.team)
        for key, pattern in trials.each(self._groups):
            changed = self._through(index, layer, self.hidden[0])
            group = self._groups[key]
            group.local[str(pattern)] = _change(changed, dense)
            if pattern == group.carried:
                self._streams[key] = to_host(changed)

    def _through(self, index: int, layer: nn.Module, sample: torch.Tensor) -> torch.Tensor:
        """The layer's output for hidden states of the first batch."""
        device = next(layer.parameters()).device
        return run_layer(layer, sample.to(device, non_blocking=True), self.calls[0][index])


class _Trials(LayerPruner):
    """Prunes the weights of a layer one at a time, and puts them back."""

    def each(self, groups: Mapping[str, _Group]) -> Iterator[tuple[str, SparsityPattern]]:
        """Yields the key of a group and a pattern while the group's weights have that pattern."""
        weights = {weight.name: weight for weight in [*self.first, *self.second]}
        with self._catching(list(weights.values()), routed=True) as linears:
            self.run()
        for key, group in groups.items():
            members = [weights[name] for name in group.names if name in weights]
            if not members:
                continue
            tried = [self._pruned(weight, group.candidates, linears) for weight in members]
            dense = [weight.parameter.data for weight in members]
            try:
                for pattern in group.candidates:
                    for weight, pruned in zip(members, tried, strict=True):
                        self._put(weight, pruned[str(pattern)])
                    yield key, pattern
            finally:
                for weight, data in zip(members, dense, strict=True):
                    weight.parameter.data = data

    def _pruned(
        self,
        weight: ExpertWeight,
        candidates: Sequence[SparsityPattern],
        linears: Mapping[str, LinearInputs],
    ) -> dict[str, torch.Tensor]:
        """This process's experts of a weight with each candidate, in host memory."""
        dense = weight.stacked
        pruned = {str(p): torch.zeros(dense.shape, dtype=dense.dtype) for p in candidates}
        for experts, hessian in self._moments(weight, linears):
            part = slice(experts.start, experts.stop)
            for pattern in candidates:
                result = prune_experts(
                    dense[part],
                    pattern,
                    hessian,
                    method=self.settings.method,
                    refine=self.settings.refine,
                    name=weight.name,
                )
                pruned[str(pattern)][part] = result.weight.to(dense.dtype).cpu()
        return pruned

    def _put(self, weight: ExpertWeight, pruned: torch.Tensor) -> None:
        parameter = weight.parameter
        stacked = pruned.to(parameter.device)
        self.team.exchange(stacked)
        parameter.data = stacked.view(parameter.shape)


def _change(changed: torch.Tensor, hidden: torch.Tensor) -> float:
    """Mean over tokens of ``|h - h'|^2 / |h|^2``; ``[B, S, H]`` both, some have more dimensions."""
    difference = (changed.float() - hidden.float()).flatten(2).square().sum(dim=-1)
    norm = hidden.float().flatten(2).square().sum(dim=-1)
    return float((difference / norm.clamp(min=torch.finfo(norm.dtype).tiny)).mean())
