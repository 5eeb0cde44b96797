"""Pruning all expert weights of one decoder layer, in the order in which data flows.

Gate and up are pruned first. Down's moments are those of what the pruned gate and up hand it, so
that it can make up for some of their error; the next layer sees the output of pruned experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from samoyeds_hf.metrics import relative
from samoyeds_hf.models import reads_intermediate
from samoyeds_hf.pruning.expert_weight import (
    ExpertRow,
    ExpertWeight,
    find_weight,
    is_linear,
    naming,
    place_of,
    squares,
)
from samoyeds_hf.pruning.follow import DenseInputs, follow_dense
from samoyeds_hf.pruning.inputs import (
    LinearInputs,
    Routed,
    down_moments,
    gate_up_moments,
    inner_squares,
    layer_moments,
    to_host,
)
from samoyeds_hf.pruning.methods import prune_experts
from samoyeds_hf.pruning.permute import Down, pairing, permute_intermediate
from samoyeds_hf.pruning.recover import BlockSettings
from samoyeds_hf.pruning.team import Team
from samoyeds_hf.report import WeightReport

if TYPE_CHECKING:
    from samoyeds_hf.config import SamoyedsConfig
    from samoyeds_hf.pattern import SparsityPattern
    from samoyeds_hf.pruning.moments import Hessian

MOMENTS_BYTES = 16 * 10**9  # moments of one group of experts; more experts are done in turn


@dataclass(frozen=True)
class PruneSettings:
    """How expert weights are pruned.

    Args:
        method: a name in :data:`samoyeds_hf.pruning.METHODS`.
        refine: least squares on the mask after the method.
        batch_size: sequences of a forward pass.
        moments_bytes: memory for second moments at a time.
        asymmetric: prune towards what the dense model makes of the same tokens, see
            :mod:`samoyeds_hf.pruning.follow`; ``best`` always does.
        permute: reorder the neurons of each expert first, see
            :mod:`samoyeds_hf.pruning.permute`; the dense model's function stays.
        block: train each layer after it is pruned, see :mod:`samoyeds_hf.pruning.recover`.
    """

    method: str
    refine: bool = False
    batch_size: int = 8
    moments_bytes: int = MOMENTS_BYTES
    asymmetric: bool = False
    permute: bool = False
    block: BlockSettings | None = None

    @classmethod
    def of(cls, config: SamoyedsConfig) -> PruneSettings:
        """What a configuration says about it."""
        block = BlockSettings() if config.recover == "block" else None
        return cls(
            config.method,
            config.refine,
            asymmetric=config.asymmetric,
            permute=config.permute,
            block=block,
        )

    @property
    def follows_dense(self) -> bool:
        """Whether tokens also go through the dense layers."""
        return self.asymmetric or self.method == "best"

    @property
    def follows_output(self) -> bool:
        """Whether down makes up for what the layer's output lacks, see ``residual``.

        Not before recovery: that fits the output itself, and better from weights that did not.
        """
        return self.follows_dense and self.block is None


@dataclass(frozen=True)
class PrunedWeight:
    """One weight that was pruned in place."""

    name: str
    mask: torch.Tensor  # bool, shape and device of the weight
    change: float  # |W - Q| / |W|
    # of each expert, relative in its output and to what it was pruned towards: relative_error
    errors: tuple[float, ...]
    tokens: tuple[int, ...]  # calibration tokens that each expert saw
    notes: tuple[str, ...]  # "expert 3: only 17 calibration tokens, ..."
    seconds: float

    @property
    def error(self) -> float:
        """Mean over the experts of the relative output error."""
        return sum(self.errors) / len(self.errors)

    def report(
        self, name: str, shape: tuple[int, ...], pattern: str, bytes_before: int, bytes_after: int
    ) -> WeightReport:
        """A row of a report."""
        return WeightReport(
            name=name,
            shape=shape,
            pattern=pattern,
            bytes_before=bytes_before,
            bytes_after=bytes_after,
            error=self.change,
            output_error=self.error,
            tokens=self.tokens,
            seconds=self.seconds,
            notes=self.notes,
        )


class LayerPruner:
    """Prunes the expert weights of one layer in place.

    Args:
        layer: with weights, on the device where the work is done.
        path: of the layer in the model.
        patterns: of the layer's weights that become sparse, by full name.
        run: runs all calibration batches through the layer, as often as it is called.
        settings: how.
        team: who shares the work.
        dense: what the same tokens bring in the dense model, where it is followed.
    """

    def __init__(
        self,
        layer: nn.Module,
        path: str,
        patterns: Mapping[str, SparsityPattern],
        run: Callable[[], None],
        settings: PruneSettings,
        team: Team,
        dense: DenseInputs | None = None,
    ) -> None:
        self.layer, self.path = layer, path
        self.settings, self.run, self.team, self.dense = settings, run, team, dense
        weights = [find_weight(layer, path, name, pattern) for name, pattern in patterns.items()]
        self.first = [weight for weight in weights if not reads_intermediate(weight.name)]
        self.second = [weight for weight in weights if reads_intermediate(weight.name)]
        self.pruned: dict[str, torch.Tensor] = {}  # masks by name
        # what recovery is measured against
        self.originals = {w.name: to_host(w.stacked) for w in weights if settings.block}
        fused = {w.name.rpartition(".")[0]: w.module for w in weights if not is_linear(w)}
        self.routed = {path: (module, Routed()) for path, module in fused.items()}

    @torch.no_grad()
    def prune(self) -> list[PrunedWeight]:
        """Prune everything; runs the batches through the layer once, or twice for Linears."""
        if self.dense is not None:
            self.dense.catch({path: module for path, (module, _) in self.routed.items()})
        with self._comparing(), self._catching(self.first, routed=True) as linears:
            self.run()
        pruned = [self._prune(weight, linears) for weight in self.first]
        with self._catching(self.second, routed=False) as linears:
            if linears:
                self.run()
        return pruned + [self._prune(weight, linears) for weight in self.second]

    def trainable(self, whole: bool) -> dict[str, tuple[nn.Parameter, torch.Tensor | None]]:
        """Parameters and masks of what was pruned, by full name; ``whole``: and all others."""
        found: dict[str, tuple[nn.Parameter, torch.Tensor | None]] = {
            weight.name: (weight.parameter, self.pruned[weight.name])
            for weight in (*self.first, *self.second)
        }
        if whole:
            for name, parameter in self.layer.named_parameters(prefix=self.path):
                if parameter.is_floating_point():
                    found.setdefault(name, (parameter, None))
        return found

    def measured_again(self, pruned: PrunedWeight) -> PrunedWeight:
        """The same after recovery has changed the weights."""
        (weight,) = (w for w in (*self.first, *self.second) if w.name == pruned.name)
        lost = norm = 0.0
        for old, new in zip(self.originals[weight.name], weight.stacked, strict=True):
            ((one_lost,), (one_norm,)) = squares(old.to(new.device)[None], new[None])
            lost, norm = lost + one_lost, norm + one_norm
        return replace(pruned, change=relative(lost, norm))

    @contextmanager
    def _catching(
        self, weights: Sequence[ExpertWeight], *, routed: bool
    ) -> Iterator[dict[str, LinearInputs]]:
        """Hooks on the modules of some weights; yields the moments of those that are Linears."""
        linears, handles = {}, []
        for weight in weights:
            if isinstance(weight.module, nn.Linear):
                linears[weight.name] = inputs = LinearInputs.of(weight.module)
                handles.append(weight.module.register_forward_pre_hook(inputs.catch))
        for module, caught in self.routed.values() if routed else ():
            handles.append(module.register_forward_pre_hook(caught.catch, with_kwargs=True))
        try:
            yield linears
        finally:
            for handle in handles:
                handle.remove()

    def _comparing(self) -> AbstractContextManager[None]:
        if self.dense is None or not self.settings.follows_output:
            return nullcontext()
        return self.dense.comparing(self.routed)

    def _prune(self, weight: ExpertWeight, linears: Mapping[str, LinearInputs]) -> PrunedWeight:
        start = time.perf_counter()
        stacked = weight.stacked
        mask = torch.zeros(stacked.shape, dtype=torch.bool, device=stacked.device)
        rows: list[ExpertRow] = []
        for experts, hessian in self._moments(weight, linears):
            part = slice(experts.start, experts.stop)
            if self.settings.permute and weight in self.first and not is_linear(weight):
                self._permute(weight, experts, hessian)
            dense = stacked[part].clone()
            target, said = self._target(weight, experts, dense, hessian)
            result = prune_experts(
                target,
                weight.pattern,
                hessian,
                method=self.settings.method,
                refine=self.settings.refine,
                name=place_of(weight, experts),
            )
            stacked[part], mask[part] = result.weight, result.mask
            rows += [
                ExpertRow(*row)
                for row in zip(
                    result.error.tolist(),
                    hessian.tokens.tolist(),
                    [(*a, *b) for a, b in zip(said, result.notes, strict=True)],
                    *squares(dense, stacked[part]),
                    strict=True,
                )
            ]
        self.team.exchange(stacked, mask)
        self.pruned[weight.name] = mask.view(weight.parameter.shape)
        rows = [row for share in self.team.gather(rows) for row in share]
        place = "expert {}: " if weight.parameter.ndim == 3 else ""
        return PrunedWeight(
            name=weight.name,
            mask=self.pruned[weight.name],
            change=relative(sum(row.lost for row in rows), sum(row.norm for row in rows)),
            errors=tuple(row.error for row in rows),
            tokens=tuple(row.tokens for row in rows),
            notes=tuple(
                place.format(expert) + note for expert, row in enumerate(rows) for note in row.notes
            ),
            seconds=time.perf_counter() - start,
        )

    def _permute(self, weight: ExpertWeight, experts: range, hessian: Hessian) -> None:
        """Put the neurons of some dense experts into an order that suits both patterns."""
        path = weight.name.rpartition(".")[0]
        module, routed = self.routed[path]
        (down,) = (w for w in self.second if w.module is module)
        part = slice(experts.start, experts.stop)
        squares = inner_squares(routed, module, experts)
        side = Down(down.stacked[part], down.pattern, squares)
        order = pairing(weight.stacked[part], weight.pattern, hessian, down=side)
        both = permute_intermediate(weight.stacked[part], down.stacked[part], order)
        weight.stacked[part], down.stacked[part] = both
        if self.dense is not None:
            self.dense.permute(path, experts, both[0])

    def _target(
        self, weight: ExpertWeight, experts: range, dense: torch.Tensor, hessian: Hessian
    ) -> tuple[torch.Tensor, list[tuple[str, ...]]]:
        """The weights ``[e, m, k]`` that the pruned ones are to be near to, and notes."""
        path = weight.name.rpartition(".")[0]
        if self.dense is None or path not in self.routed:
            return dense, [()] * len(experts)
        module, routed = self.routed[path]
        if weight in self.second:
            cross, missing = self.dense.down_cross(path, module, routed, experts)
            return follow_dense(dense, cross, hessian, missing)
        cross = self.dense.gate_up_cross(path, routed, experts, weight.stacked)
        return follow_dense(dense, cross, hessian)

    def _moments(
        self, weight: ExpertWeight, linears: Mapping[str, LinearInputs]
    ) -> Iterator[tuple[range, Hessian]]:
        """Second moments of this process's experts, a group of them at a time."""
        num_experts, _, width = weight.stacked.shape
        share = self.team.share(num_experts)
        if weight.name in linears:
            for expert in share:
                with naming(weight, range(1)):
                    hessian = linears[weight.name].moments.shrunk()
                yield range(expert, expert + 1), hessian
            return
        module, routed = self.routed[weight.name.rpartition(".")[0]]
        step = max(1, self.settings.moments_bytes // (4 * width * width))
        device = weight.parameter.device
        is_down = weight in self.second
        # NOTE: with groups the layer's moments cannot be the sum over the experts at hand
        layer = None if is_down else layer_moments(routed, width, device)
        for start in range(share.start, share.stop, step):
            experts = range(start, min(start + step, share.stop))
            with naming(weight, experts):
                if is_down:
                    hessian = down_moments(routed, module, experts).shrunk()
                else:
                    moments = gate_up_moments(routed, experts, width, device)
                    hessian = moments.shrunk(layer=layer)
            yield experts, hessian
