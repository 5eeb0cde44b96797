"""Uneven budgets: the pattern of each weight by what it costs the model, at one total sparsity.

At a given share of dropped weights some layers stand a sparser pattern than others. Losses are
measured (:mod:`samoyeds_hf.pruning.sensitivity`), taken as if they added up, and the cheapest
choice that drops enough is found exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from samoyeds_hf.errors import CalibrationError, ConfigError
from samoyeds_hf.pattern import GROUP, KEPT_PER_GROUP, SparsityPattern
from samoyeds_hf.pruning.sensitivity import EACH, measure_errors, unmeasured

if TYPE_CHECKING:
    from samoyeds_hf.pruning.layer import PruneSettings
    from samoyeds_hf.pruning.sensitivity import Measured
    from samoyeds_hf.pruning.team import Team
    from samoyeds_hf.pruning.walk import Layers

_DEFAULT_V = 64
_MAX_STATES = 1 << 16  # partial choices that are followed; sums of real models are far fewer


def default_candidates(pattern: SparsityPattern) -> tuple[SparsityPattern, ...]:
    """From sparse to dense, with the V of ``pattern``: 87.5, 81.25, 75, 62.5 and 50 % dropped."""
    v = pattern.v or _DEFAULT_V
    sparse = [SparsityPattern(n, m, v) for n, m in ((1, 4), (3, 8), (1, 2), (3, 4))]
    return (*sparse, SparsityPattern.parse("2:4"))


def budget_overrides(
    layers: Layers,
    patterns: Mapping[str, SparsityPattern],
    tokens: torch.Tensor,  # [N, S] int64
    settings: PruneSettings,
    budget: float,
    candidates: Sequence[SparsityPattern] | None = None,
    *,
    team: Team | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Overrides for a :class:`~samoyeds_hf.SamoyedsConfig` that together drop ``budget``.

    Args:
        layers: of the dense model, in memory or streamed; its weights are as before afterwards.
        patterns: by full name, the weights that share the budget; the patterns themselves only
            give the V of the default candidates.
        tokens: calibration sequences without padding.
        settings: how weights are pruned.
        budget: share of those weights' elements that is dropped, at least: 0.75.
        candidates: what may be chosen; by default :func:`default_candidates`.
        team: the processes that share the work.
        on_layer: is told the number of each layer that was measured.

    Returns:
        ``{regex: pattern}``, a weight each; the experts of a list are taken together.

    Raises:
        CalibrationError: no tokens, or a loss that is not finite.
        ConfigError: no weights, or a budget that the candidates do not reach.
        PatternError: a weight that no candidate divides.
        UnsupportedModelError: a decoder that cannot run layer by layer.
    """
    check_budget(budget)
    if not patterns:
        raise ConfigError("A budget needs weights to share it, found none; remove an override.")
    if candidates is None:
        candidates = default_candidates(next(iter(patterns.values())))
    # refuses what is out of reach before the long work
    choose_patterns(unmeasured(layers.decoder, patterns, budget, candidates), budget)
    measured = measure_errors(
        layers, patterns, tokens, settings, budget, candidates, team=team, on_layer=on_layer
    )
    chosen = choose_patterns(measured, budget)
    # A key is a weight's name, or has a * where the number of an expert stands.
    return {re.escape(key).replace(re.escape(EACH), "[0-9]+"): str(p) for key, p in chosen.items()}


def check_budget(budget: float) -> None:
    """Refuse what is no share.

    Raises:
        ConfigError: not between 0 and 1.
    """
    if isinstance(budget, bool) or not isinstance(budget, float | int) or not 0 < budget < 1:
        raise ConfigError(
            f"A budget is the share of weights that is dropped, between 0 and 1, found {budget!r}; "
            "use e.g. 0.75."
        )


def choose_patterns(
    measured: Mapping[str, Mapping[str, Measured]], budget: float
) -> dict[str, SparsityPattern]:
    """The patterns with the least sum of losses that drop a share ``budget`` of all elements.

    Exact: partial choices are extended weight by weight, and of two the one that keeps no less and
    loses no less is forgotten (Nemhauser and Ullmann 1969, for the knapsack). Only if more than
    65536 are left, which needs weights of many unrelated sizes, they are thinned; the budget holds
    all the same. Of equal losses the choice that keeps less wins.

    Args:
        measured: by name, then by the text of each pattern that it may get.
        budget: between 0 and 1.

    Raises:
        ConfigError: no share, or the sparsest patterns drop less.
        CalibrationError: a loss that is not finite.
    """
    check_budget(budget)
    names = list(measured)
    options = [_options(name, measured[name]) for name in names]
    total = sum(next(iter(measured[name].values())).elements for name in names)
    allowed = math.floor(total * (1 - Fraction(str(budget))))  # of kept elements
    rest = sum(int(option.kept.min()) for option in options)  # of the weights yet to be chosen
    if rest > allowed:
        raise ConfigError(
            f"A budget of {budget:g} must be within reach, found {1 - rest / total:.4g} with the "
            "sparsest candidate everywhere; add sparser candidates or lower the budget."
        )
    front = _Front.start()
    steps = []
    for option in options:
        rest -= int(option.kept.min())
        front = front.extend(option, allowed - rest)
        steps.append(front)
    # the last state of a front keeps the most and loses the least
    state, chosen = len(front.loss) - 1, {}
    for name, option, step in reversed(list(zip(names, options, steps, strict=True))):
        chosen[name] = option.patterns[int(step.choice[state])]
        state = int(step.parent[state])
    return {name: chosen[name] for name in names}


@dataclass(frozen=True)
class _Options:
    """What one weight may become."""

    patterns: list[SparsityPattern]
    kept: torch.Tensor  # [C] int64, elements
    loss: torch.Tensor  # [C] fp64


def _options(name: str, measured: Mapping[str, Measured]) -> _Options:
    for text, found in measured.items():
        if not math.isfinite(found.loss):
            raise CalibrationError(
                f"Losses must be finite to choose patterns, found {found.loss} for {name} with "
                f"{text}; look for a damaged shard."
            )
    patterns = [SparsityPattern.parse(text) for text in measured]
    kept = [
        found.elements * pattern.n * KEPT_PER_GROUP // (pattern.m * GROUP)
        for pattern, found in zip(patterns, measured.values(), strict=True)
    ]
    loss = torch.tensor([found.loss for found in measured.values()], dtype=torch.float64)
    return _Options(patterns, torch.tensor(kept), loss)


@dataclass(frozen=True)
class _Front:
    """Partial choices of which none is worse than another: by rising ``kept``, falling ``loss``."""

    kept: torch.Tensor  # [S] int64, elements kept so far
    loss: torch.Tensor  # [S] fp64, sum so far
    parent: torch.Tensor  # [S] int64, state of the front before
    choice: torch.Tensor  # [S] int64, option taken since

    @classmethod
    def start(cls) -> _Front:
        """Nothing chosen."""
        zero = torch.zeros(1, dtype=torch.int64)
        return cls(zero, zero.double(), zero, zero)

    def extend(self, option: _Options, allowed: int) -> _Front:
        """Every state with every option that stays below ``allowed``, the best of them."""
        choices = len(option.kept)
        kept = (self.kept.unsqueeze(1) + option.kept).flatten()
        loss = (self.loss.unsqueeze(1) + option.loss).flatten()
        order = torch.arange(len(kept))[kept <= allowed]
        order = order[loss[order].argsort(stable=True)]
        order = order[kept[order].argsort(stable=True)]
        least = loss[order].cummin(0).values
        order = order[torch.cat([torch.ones(1, dtype=torch.bool), least[1:] < least[:-1]])]
        order = order[_thinned(kept[order])]
        return _Front(kept[order], loss[order], order // choices, order % choices)


def _thinned(kept: torch.Tensor) -> torch.Tensor:
    """Which states of a front ``[S]``, by rising ``kept``, are followed: all, unless too many."""
    if len(kept) <= _MAX_STATES:
        return torch.arange(len(kept))
    low, high = int(kept[0]), int(kept[-1])
    bucket = (kept - low) * (_MAX_STATES - 1) // (high - low + 1)
    last = torch.cat([bucket[1:] > bucket[:-1], torch.ones(1, dtype=torch.bool)])
    last[0] = True  # with the state that keeps least the budget stays within reach
    return last.nonzero().squeeze(1)
