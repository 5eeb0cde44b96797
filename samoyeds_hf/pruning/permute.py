"""Orders of the intermediate dimension: free at run time, and some suit a pattern better.

A neuron is a gate row, an up row and a down column; an expert computes the same whatever the
order of its neurons. In gate and up a pattern drops M - N of M neighbouring rows in each V-chunk,
which costs least where rows that need the same chunks are no neighbours. In down it keeps 2 of 4
neighbouring columns, and Sub-Rows of V of them, which costs least where columns that matter to the
same rows lie together.

Held-out perplexity without and with, tests/assets/tiny-moe, ``best`` on 64 x 512 tokens: 1:2:64,
three seeds, 18.04 and 17.70, 19.05 and 18.80, 18.96 and 18.58, in 95 instead of 83 s; 1:2:128, two
seeds, 18.90 and 18.75, 20.59 and 20.20 (1 CPU core, commit 1594f00). One seed on other text, after
block recovery: 1:2:32 15.71 and 15.51, 1:2:128 16.62 and 16.20, before it 18.71 and 18.17, 21.25
and 20.93 (1ae9b06). By an older ``best``, two seeds, bits per byte: 1:2:32 0.978 and 0.970, 1.001
and 0.982, 1:2:128 1.017 and 1.002, but 1.027 and 1.045 (a635da5). Two models of the laboratory,
relative to dense: 1:2:32 1.148 and 1.140, 1.158 and 1.151, 1:2:128 1.187 and 1.179, 1.204 and 1.195
(H200, 5dc1076 and 1ae9b06); distilled, 1:2:128 1.043 and 1.041, 1.046 and 1.044, 1:2:32 1.040 and
1.040 (1594f00, 1ae9b06).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from samoyeds_hf.errors import PatternError
from samoyeds_hf.pattern import GROUP

if TYPE_CHECKING:
    from samoyeds_hf.pattern import SparsityPattern
    from samoyeds_hf.pruning.moments import Hessian

TRIES = 64  # swaps that are tried for each neuron
_LEAST = 16  # regions shorter than this are tried as if they were as long
_LEAST_GAIN = 1e-7  # of all that there is to keep; below it is rounding
_DRAWN = 256  # tries that are looked up together


@dataclass(frozen=True)
class Down:
    """What the order of neurons means to down."""

    weight: torch.Tensor  # [E, H, I]
    pattern: SparsityPattern
    squares: torch.Tensor  # [E, I]  mean square of each of its inputs, before gate and up change


def pairing(
    gate_up: torch.Tensor,  # [E, 2I, H]
    pattern: SparsityPattern,
    hessian: Hessian,
    *,
    down: Down | None = None,
    tries: int = TRIES,
    seed: int = 0,
) -> torch.Tensor:
    """An order of the neurons of each expert that suits the patterns, ``[E, I]`` int64.

    Raises the sum, over gate and up together and over down, of the share that a mask by Wanda's
    scores keeps. A local search from the order that is there: regions of neighbouring neurons
    are paired at random, each pair tries to swap one neuron of each. For 2:4 in down it is the
    channel permutation of Pool and Yu (2021). The identity where no order is better than another.

    Args:
        gate_up: gate rows, then up rows.
        pattern: of gate and up.
        hessian: of their inputs; only its diagonal is read.
        down: the other half of the expert; without it only gate and up are looked at.
        tries: of each neuron; more gain little.
        seed: of the tries. They are the same on every device.

    Raises:
        PatternError: a pattern does not divide its shape, or shapes do not belong together.
    """
    experts, rows, k = gate_up.shape
    neurons = rows // 2
    pattern.check_fits(rows, k, "gate_up")
    order = torch.arange(neurons, device=gate_up.device).repeat(experts, 1)
    sides: list[_Side] = []
    if down is not None:
        if down.weight.shape[::2] != (experts, neurons):
            raise PatternError(
                f"down must be [{experts}, H, {neurons}], found {list(down.weight.shape)}."
            )
        down.pattern.check_fits(down.weight.shape[1], neurons, "down")
        sides.append(_Columns(down))
    if rows % 2 == 0 and _looks_at_rows(neurons, pattern, [side.region for side in sides]):
        sides.append(_Rows(gate_up, hessian.diagonal, pattern))
    region = math.lcm(*(side.region for side in sides))
    if sides and neurons // region > 1:
        _search(order, sides, region, tries, seed)
    return order


@dataclass(frozen=True)
class Search:
    """What :func:`pairing` with both halves of an expert does, from shapes alone: many operations
    on little data, so that starting them counts.
    """

    calls: float  # operations on tensors
    elements: float  # that they read or write


def search_of(
    experts: int,
    neurons: int,
    hidden: int,
    pattern: SparsityPattern,  # of gate and up
    down: SparsityPattern,
) -> Search:
    """The search for the orders of ``experts`` experts together, leading terms only."""
    columns = _region_of(down, neurons)
    has_rows = _looks_at_rows(neurons, pattern, [columns])
    regions = neurons // (math.lcm(pattern.m, columns) if has_rows else columns)
    if regions < 2:
        return Search(0, 0)
    tries = TRIES * max(neurons // regions, _LEAST)
    places = experts * (regions // 2 * 2)  # of neurons that a try swaps
    compared = 1 if columns == GROUP else 2  # orders whose groups a try looks at
    # a group of four rows of H is gathered, and the sum of its two largest takes seven operations
    elements = places * hidden * (compared * (2 * GROUP + 7 * 3) + 18)
    calls = 38
    if has_rows:
        chunks = 2 * hidden // pattern.sub_row(hidden)  # of gate and of up
        elements += places * 2 * pattern.m * chunks * 3
        calls += 7
    return Search(tries * calls, tries * elements)


def permute_intermediate(
    gate_up: torch.Tensor,  # [E, 2I, H]
    down: torch.Tensor,  # [E, H, I]
    order: torch.Tensor,  # [E, I]  int64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both weights with the neurons in that order; the experts compute what they did.

    Raises:
        PatternError: shapes that do not belong together, or an order that is no permutation.
    """
    experts, neurons = order.shape
    if gate_up.shape[:2] != (experts, 2 * neurons) or down.shape[::2] != (experts, neurons):
        raise PatternError(
            f"An order [{experts}, {neurons}] needs gate_up [{experts}, {2 * neurons}, H] and "
            f"down [{experts}, H, {neurons}], found {list(gate_up.shape)} and {list(down.shape)}."
        )
    identity = torch.arange(neurons, device=order.device).expand(experts, -1)
    if not torch.equal(order.sort(dim=1).values, identity):
        raise PatternError("An order of neurons must name each once, found one that does not.")
    rows = torch.cat((order, order + neurons), dim=1)  # gate, then up
    columns = order.unsqueeze(1).expand(-1, down.shape[1], -1)
    return (
        gate_up.gather(1, rows.unsqueeze(-1).expand(-1, -1, gate_up.shape[2])),
        down.gather(2, columns),
    )


def _region_of(down: SparsityPattern, neurons: int) -> int:
    """Neighbouring columns of down that are pruned together: a group, or a Sub-Row's."""
    return GROUP if down.n == down.m else down.sub_row(neurons)


def _looks_at_rows(neurons: int, pattern: SparsityPattern, others: list[int]) -> bool:
    """Whether the order of neurons means something to gate and up, beside other regions."""
    is_divided = neurons % pattern.m == 0 and neurons % math.lcm(pattern.m, *others) == 0
    return pattern.n < pattern.m and is_divided


class _Side(Protocol):
    """A weight whose kept share depends on the order of neurons."""

    region: int  # swaps between different regions of so many neurons do not meet

    def look_up(self, tries: torch.Tensor) -> None:
        """What all tries ``[T, 2, P]`` read, ahead of them: places of neurons that are swapped."""

    def gain(self, number: int, orders: torch.Tensor) -> torch.Tensor:
        """How much more of all there is each swap of a try keeps, ``[E, P]``.

        Args:
            number: of the try.
            orders: ``[2, E, I]``, as it is, and with a neuron of each pair swapped; neurons are
                numbered through all experts.
        """

    def take(self, accepted: torch.Tensor) -> None:
        """Remember which of the places just tried were swapped, ``[E, 2 P]`` bool."""


def _search(
    order: torch.Tensor,  # [E, I]  changed in place
    sides: list[_Side],
    region: int,
    tries: int,
    seed: int,
) -> None:
    """Try swaps at random and keep those that gain.

    A try is a few operations on little data, and takes as long as it takes to start them. So what
    can be read for many tries is, and the orders before and after a try are one tensor.
    """
    experts, neurons = order.shape
    rng = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers for every device
    regions = neurons // region
    half = regions // 2
    first = torch.arange(experts, device=order.device).unsqueeze(1) * neurons
    orders = (order + first).repeat(2, 1, 1)
    left = tries * max(region, _LEAST)
    while left > 0:
        drawn = []
        for _ in range(min(left, _DRAWN)):
            pairs = torch.randperm(regions, generator=rng)[: 2 * half].view(2, half)
            drawn.append(pairs * region + torch.randint(region, (2, half), generator=rng))
        left -= len(drawn)
        places = torch.stack(drawn).to(order.device)  # [T, 2, P]
        for side in sides:
            side.look_up(places)
        here, there = places.flatten(1), places.flip(1).flatten(1)
        for number in range(len(drawn)):
            own = orders[0].index_select(1, here[number])  # [E, 2 P]
            swapped = orders[0].index_select(1, there[number])
            orders[1].index_copy_(1, here[number], swapped)
            gain = sides[0].gain(number, orders)
            for side in sides[1:]:
                gain = gain + side.gain(number, orders)
            accepted = gain > _LEAST_GAIN
            accepted = torch.cat((accepted, accepted), dim=1)  # of both neurons of a pair
            taken = torch.where(accepted, swapped, own)
            orders.index_copy_(2, here[number], taken.expand(2, -1, -1))
            for side in sides:
                side.take(accepted)
    order.copy_(orders[0] - first)


class _Rows:
    """Gate and up: neurons of one block of M rows compete for each V-chunk."""

    def __init__(
        self,
        weight: torch.Tensor,  # [E, 2I, H]
        diagonal: torch.Tensor,  # [E, H]
        pattern: SparsityPattern,
    ) -> None:
        self.pattern, self.region = pattern, pattern.m
        profiles = []
        for own, squares in zip(weight, diagonal, strict=True):
            score = own.to(squares.dtype).square().mul_(squares).view(*own.shape[:1], -1, GROUP)
            best = _two_best(score.unbind(dim=-1))  # [2I, H/4]
            chunks = best.view(len(own), own.shape[1] // pattern.sub_row(own.shape[1]), -1)
            profiles.append(torch.cat(chunks.sum(dim=-1).chunk(2), dim=1) / score.sum())
        self.profile = torch.cat(profiles)  # [E I, 2 H/V]  what 2:4 keeps of a neuron
        self.experts = len(profiles)

    def look_up(self, tries: torch.Tensor) -> None:
        self.members = _members(tries, self.region)

    def gain(self, number: int, orders: torch.Tensor) -> torch.Tensor:
        which = orders.index_select(2, self.members[number])
        profile = self.profile.index_select(0, which.flatten())
        blocks = profile.view(2, self.experts, 2, -1, self.region, profile.shape[1])
        kept = _most(blocks, self.pattern, dim=-2).sum(dim=-1)  # [2, E, 2, P]
        return (kept[1] - kept[0]).sum(dim=1)

    def take(self, accepted: torch.Tensor) -> None:
        """Nothing to remember: profiles are looked up by neuron."""


class _Columns:
    """Down: columns of one group compete in each row, and rows of one block for each V-chunk."""

    def __init__(self, down: Down) -> None:
        self.pattern = down.pattern
        experts, rows, neurons = down.weight.shape
        self.region = _region_of(down.pattern, neurons)
        scores = []
        for own, squares in zip(down.weight, down.squares, strict=True):
            score = own.to(squares.dtype).square().mul_(squares)  # [H, I]
            scores.append((score / score.sum()).T)
        self.score = torch.cat(scores)  # [E I, H]
        # what 2:4 keeps of each row in each region, ``[E, I/V, H]``
        regions = self.score.view(experts, neurons // self.region, -1, GROUP, rows)
        self.kept = _two_best(regions.unbind(dim=-2)).sum(dim=2)

    def look_up(self, tries: torch.Tensor) -> None:
        self.members = _members(tries, GROUP)
        self.regions = tries.flatten(1) // self.region

    def gain(self, number: int, orders: torch.Tensor) -> torch.Tensor:
        self.tried = self.regions[number]
        self.before = self.kept.index_select(1, self.tried)
        if self.region == GROUP:  # a region is a group, of which it is known what is kept
            self.after = self._groups(number, orders[1:])[0]
        else:
            groups = self._groups(number, orders)
            self.after = self.before - groups[0] + groups[1]
        gain = self._total(self.after) - self._total(self.before)
        return gain.view(len(gain), 2, -1).sum(dim=1)

    def _groups(self, number: int, orders: torch.Tensor) -> torch.Tensor:
        """What is kept of each row in the groups of a try, ``[..., E, 2 P, H]``."""
        which = orders.index_select(2, self.members[number])
        columns = self.score.index_select(0, which.flatten())
        groups = columns.view(*orders.shape[:2], -1, GROUP, columns.shape[1])
        return _two_best(groups.unbind(dim=-2))

    def take(self, accepted: torch.Tensor) -> None:
        kept = torch.where(accepted.unsqueeze(2), self.after, self.before)
        self.kept.index_copy_(1, self.tried, kept)

    def _total(self, kept: torch.Tensor) -> torch.Tensor:
        """What stays of regions ``[..., H]`` when rows are dropped."""
        if self.pattern.n == self.pattern.m:
            return kept.sum(dim=-1)
        blocks = kept.view(*kept.shape[:-1], -1, self.pattern.m)
        return _most(blocks, self.pattern, dim=-1).sum(dim=-1)


def _members(tries: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the groups of `count` neighbours that the places ``[T, 2, P]`` are in, in a row."""
    inside = torch.arange(count, device=tries.device)
    return ((tries // count).unsqueeze(-1) * count + inside).flatten(1)


def _most(x: torch.Tensor, pattern: SparsityPattern, dim: int) -> torch.Tensor:
    """The sum of the N largest of M along a dimension."""
    if pattern.n == 1:
        return x.amax(dim=dim)
    return x.topk(pattern.n, dim=dim).values.sum(dim=dim)


def _two_best(four: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The sum of the two largest of four tensors, elementwise."""
    a, b, c, d = four
    high_ab, high_cd = torch.maximum(a, b), torch.maximum(c, d)
    low = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
    second = torch.maximum(torch.minimum(high_ab, high_cd), low)
    return torch.maximum(high_ab, high_cd).add_(second)
