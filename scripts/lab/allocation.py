"""Which option each weight gets, so that a model of given bytes loses least."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lab.patterns import Columns, PatternLike

from samoyeds_hf.errors import PatternError


@dataclass(frozen=True)
class Option:
    """What one pattern costs for one weight."""

    pattern: PatternLike
    num_bytes: int
    loss: float  # rise, in nats a token

    @property
    def has_columns(self) -> bool:
        """Whether some columns stay dense."""
        return isinstance(self.pattern, Columns)


def allocate(options: Mapping[str, Sequence[Option]], num_bytes: int) -> dict[str, Option]:
    """An option for each weight, with at most ``num_bytes`` together and a small sum of losses.

    Starts from the smallest options and takes the step that saves most loss a byte, as long as one
    fits, along each weight's lower convex hull: the optimum, up to the bytes that are left over.

    Raises:
        PatternError: the smallest options are too large already.
    """
    hulls = {name: _hull(found) for name, found in options.items()}
    chosen = dict.fromkeys(hulls, 0)
    left = num_bytes - sum(hull[0].num_bytes for hull in hulls.values())
    if left < 0:
        raise PatternError(
            f"The smallest patterns must fit into {num_bytes} bytes, found {num_bytes - left}; "
            "give sparser ones."
        )
    steps: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        hull, place = hulls[name], chosen[name]
        if place + 1 < len(hull):
            heapq.heappush(steps, (_slope(hull[place], hull[place + 1]), name))

    for name in hulls:
        offer(name)
    while steps:
        _, name = heapq.heappop(steps)
        hull, place = hulls[name], chosen[name]
        more = hull[place + 1].num_bytes - hull[place].num_bytes
        if more > left:
            continue  # nor does any later step of this weight; others may still fit
        left -= more
        chosen[name] += 1
        offer(name)
    return {name: hull[chosen[name]] for name, hull in hulls.items()}


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options that are worth their bytes: loss falls, by less and less a byte."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.num_bytes, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-1], option) < _slope(hull[-2], hull[-1]):
            hull.pop()
        if hull and option.num_bytes == hull[-1].num_bytes:
            continue
        hull.append(option)
    return hull


def _slope(smaller: Option, larger: Option) -> float:
    """Change of the loss a byte, below 0 where bytes help."""
    return (larger.loss - smaller.loss) / (larger.num_bytes - smaller.num_bytes)
