"""The ideas at the bytes of one pattern: uneven budgets, dense columns, or both.

``budgeted`` is what the package does. It knows no columns, so that for those there is another way:
every candidate prunes the whole model once, then one pruned weight at a time is put into the dense
model, and the rise of its loss on training text is what the candidate costs that weight. Rises are
taken to add up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from lab.allocation import Option, allocate
from lab.measure import perplexity
from lab.patterns import Columns, PatternLike, filled, fits, size_of
from transformers import PreTrainedModel

from samoyeds_hf import SparsityPattern
from samoyeds_hf.pruning.budget import budget_overrides
from samoyeds_hf.pruning.decoder import Decoder
from samoyeds_hf.pruning.layer import PruneSettings
from samoyeds_hf.pruning.walk import InMemory

Options: TypeAlias = dict[str, list[Option]]
Weights: TypeAlias = Mapping[str, torch.Tensor]  # [E, O, K] or [O, K]

_PARTS = ((1, 4), (3, 8), (1, 2), (5, 8), (3, 4), (1, 1))  # N:M of uneven budgets
_SPARSER = ((7, 16), (3, 8), (1, 4))  # make room for dense columns
_COLUMNS = 0.03  # share of dense columns that are bytes of another weight


def probe(
    dense: PreTrainedModel,
    weights: Weights,
    budget: SparsityPattern,
    prune: Callable[[Mapping[str, PatternLike]], PreTrainedModel],
    text: torch.Tensor,  # [n, S]
) -> Options:
    """What every candidate costs every weight that it divides."""
    before = math.log(perplexity(dense, text))
    options: Options = {name: [] for name in weights}
    by_name = {name: list(_candidates(weight, budget)) for name, weight in weights.items()}
    for place in range(max(map(len, by_name.values()))):
        patterns = {n: found[place] for n, found in by_name.items() if place < len(found)}
        pruned = prune(patterns)
        for name, pattern in patterns.items():
            rise = _loss_with(dense, name, pruned.get_parameter(name).data, text) - before
            size = size_of(pattern, weights[name])
            if size is not None:
                options[name].append(Option(pattern, size, rise))
    return options


def budgeted(
    dense: PreTrainedModel,
    names: Sequence[str],
    budget: SparsityPattern,
    tokens: torch.Tensor,  # [N, S]
    settings: PruneSettings,
) -> dict[str, PatternLike]:
    """The package's uneven budget: as many kept weights as with ``budget`` everywhere."""
    patterns = dict.fromkeys(names, budget)
    layers = InMemory(Decoder.find(dense, names))
    overrides = budget_overrides(layers, patterns, tokens, settings, 1 - budget.density)
    return {
        name: next(
            SparsityPattern.parse(text)
            for regex, text in overrides.items()
            if re.fullmatch(regex, name)
        )
        for name in names
    }


def probed(options: Options, budget: SparsityPattern, weights: Weights) -> dict[str, PatternLike]:
    """The patterns that cost least while all weights together have the bytes of ``budget``."""
    total = sum(size_of(budget, weight) or 0 for weight in weights.values())
    return {name: option.pattern for name, option in allocate(options, total).items()}


def columns_alone(
    options: Options, budget: SparsityPattern, weights: Weights
) -> dict[str, PatternLike]:
    """The same with each weight within its own bytes: dense columns for a sparser rest."""
    chosen = {}
    for name, weight in weights.items():
        own = [o for o in options[name] if o.has_columns or o.pattern == budget]
        chosen[name] = allocate({name: own}, size_of(budget, weight) or 0)[name].pattern
    return chosen


def _candidates(weight: torch.Tensor, budget: SparsityPattern) -> Iterator[PatternLike]:
    rows, k = weight.shape[-2:]
    for n, m in _PARTS:
        pattern = SparsityPattern(n, m, None if n == m else budget.v)
        if fits(pattern, weight):
            yield pattern
    for n, m in _SPARSER:
        base = SparsityPattern(n, m, budget.v)
        full = filled(base, rows, k, budget.num_bytes(rows, k, 2))
        if full is not None and fits(full, weight):
            yield full
    extra = Columns(budget, max(4, round(_COLUMNS * k / 4) * 4), rows)
    if fits(extra, weight):
        yield extra


def _loss_with(
    model: PreTrainedModel, name: str, weight: torch.Tensor, text: torch.Tensor
) -> float:
    """Mean loss of a model with one weight exchanged; the model is as before afterwards."""
    parameter = model.get_parameter(name)
    own = parameter.data
    try:
        parameter.data = weight
        return math.log(perplexity(model, text))
    finally:
        parameter.data = own
