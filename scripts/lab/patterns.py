"""The patterns of the laboratory by name, and dense columns beside a pattern."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TypeAlias

import torch
from lab.mask_patterns import Unstructured, Venom

from samoyeds_hf import SparsityPattern
from samoyeds_hf.errors import PatternError
from samoyeds_hf.pruning import problem
from samoyeds_hf.pruning.projection import project

PatternLike: TypeAlias = "SparsityPattern | problem.PatternLike"

_STEP = 4  # dense columns come in steps of this many
_FOUR = 4  # columns that VENOM keeps of M
_TWO_OF_FOUR = SparsityPattern(1, 1)


@dataclass(frozen=True)
class Columns:
    """A pattern, and some input columns of each expert that stay dense. Masks only.

    The columns can be stored as a side matrix of 2:4 with two gathered columns and two zeros in
    every four, which the kernels run as it is; that is what their bytes are counted as.
    """

    base: SparsityPattern
    columns: int
    rows: int  # of one expert, which share the columns

    @property
    def m(self) -> int:
        """Rows that are projected together."""
        return self.rows

    @property
    def n(self) -> int:
        """As many: no order of the rows is better than another."""
        return self.rows

    def __str__(self) -> str:
        return f"{self.base}+{self.columns} columns"

    def sub_row(self, k: int) -> int:
        """All columns: which of them stay dense is one choice."""
        return k

    def check_fits(self, rows: int, k: int, name: str = "weight") -> None:
        """Refuse a weight ``[rows, k]`` that the pattern does not divide.

        Raises:
            PatternError: it does not, or has other rows than were given, or too few columns.
        """
        self.base.check_fits(rows, k, name)
        if rows != self.rows or not 0 < self.columns < k:
            raise PatternError(
                f"{name}: {self} needs {self.rows} rows and more inputs than columns, found a "
                f"weight [{rows}, {k}]."
            )

    def num_bytes(self, rows: int, k: int, element_size: int) -> int:
        """Bytes of the pattern, the side matrix and int32 indices of its columns."""
        side = _TWO_OF_FOUR.num_bytes(rows, 2 * self.columns, element_size)
        return self.base.num_bytes(rows, k, element_size) + side + 4 * self.columns

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """A good mask ``[rows of experts, k]``: columns that lose most to the pattern stay dense.

        Not exact: the columns are chosen once, then the pattern is projected without them.
        """
        k = x.shape[-1]
        lost = x.masked_fill(project(x, self.base), 0).double().square()
        energy = lost.view(-1, self.rows, k).sum(dim=1)  # [E, k]
        chosen = energy.topk(self.columns, dim=-1).indices
        dense = torch.zeros_like(energy, dtype=torch.bool).scatter_(-1, chosen, True)
        every_row = dense.repeat_interleave(self.rows, dim=0)  # [rows of experts, k]
        return project(x.masked_fill(every_row, 0), self.base) | every_row


class FastVenom(Venom):
    """The same masks, with all choices of columns compared at once: ADMM projects 90 times."""

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest mask, exactly, bool ``[rows, k]``."""
        rows, k = x.shape
        blocks = x.abs().view(rows // self.v, self.v, k // self.columns, self.columns)
        size = blocks.permute(3, 0, 2, 1).contiguous()  # [M, blocks, k/M, V]
        pairs = list(itertools.combinations(range(self.columns), 2))
        first, second = torch.tensor(pairs, device=x.device).T
        high = torch.maximum(size[first], size[second])  # [pairs, blocks, k/M, V]
        low = torch.minimum(size[first], size[second])
        place = {pair: number for number, pair in enumerate(pairs)}
        fours = list(itertools.combinations(range(self.columns), _FOUR))
        # the two largest of four, from the larger and the smaller of two pairs
        kept = [
            torch.maximum(high[p], high[q]).square_().sum(dim=-1)
            + torch.minimum(high[p], high[q]).maximum(low[p]).maximum(low[q]).square_().sum(dim=-1)
            for p, q in ((place[four[:2]], place[four[2:]]) for four in fours)
        ]
        best = torch.stack(kept).argmax(dim=0)  # [blocks, k/M]
        columns = torch.tensor(fours, device=x.device)[best].unsqueeze(1)  # [blocks, 1, k/M, 4]
        columns = columns.expand(-1, self.v, -1, -1)
        inside = project(blocks.gather(-1, columns).view(-1, _FOUR), _TWO_OF_FOUR)
        mask = torch.zeros(blocks.shape, dtype=torch.bool, device=x.device)
        return mask.scatter_(-1, columns, inside.view(columns.shape)).view(rows, k)


def filled(base: SparsityPattern, rows: int, k: int, num_bytes: int) -> Columns | None:
    """As many dense columns beside ``base`` as fit into so many bytes of bf16; None is none."""
    best = None
    for columns in range(_STEP, k, _STEP):
        pattern = Columns(base, columns, rows)
        if pattern.num_bytes(rows, k, 2) > num_bytes:
            break
        best = pattern
    return best


def pattern_of(text: str) -> PatternLike:
    """``N:M:V``, ``2:4``, ``venom:V:N:M`` or ``unstructured:SPARSITY``.

    Raises:
        PatternError: no such pattern.
    """
    kind, _, rest = text.partition(":")
    if kind == "venom":
        v, n, m = (int(number) for number in rest.split(":"))
        return FastVenom(v, n, m)
    if kind == "unstructured":
        return Unstructured(float(rest))
    return SparsityPattern.parse(text)


def size_of(pattern: PatternLike, weight: torch.Tensor) -> int | None:
    """Bytes of a weight ``[E, O, K]`` or ``[O, K]`` in bf16; None if it is no format of ours."""
    if not isinstance(pattern, (SparsityPattern, Columns)):
        return None
    rows, k = weight.shape[-2:]
    return weight.numel() // (rows * k) * pattern.num_bytes(rows, k, 2)


def fits(pattern: PatternLike, weight: torch.Tensor) -> bool:
    """Whether a pattern divides a weight."""
    try:
        pattern.check_fits(*weight.shape[-2:])
    except PatternError:
        return False
    return True
