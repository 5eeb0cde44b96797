"""Patterns to compare masks with: VENOM, and none at all. Nothing stores or runs them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from samoyeds_hf import SparsityPattern
from samoyeds_hf.errors import PatternError
from samoyeds_hf.pruning.projection import project

_COLUMNS = 4  # kept of every M by VENOM, for a whole block of rows
_KEPT = 2  # of those, in each row
_TWO_OF_FOUR = SparsityPattern(1, 1)
_WIDEST = 128  # columns whose unstructured mask is chosen at once by a sweep


@dataclass(frozen=True)
class Venom:
    """V:N:M of VENOM (Castro et al. 2023), with N = 2.

    Every V rows keep 4 of every M columns, and each of the rows 2 of those 4.

    Raises:
        PatternError: N is not 2, M not a multiple of 4 from 4 to 16, or V below 1.
    """

    v: int = 64
    n: int = _KEPT
    columns: int = 8

    def __post_init__(self) -> None:
        if self.v < 1 or self.n != _KEPT or self.columns not in (4, 8, 12, 16):
            raise PatternError(
                f"VENOM here needs V >= 1, N = 2 and M of 4, 8, 12 or 16, found {self}."
            )

    def __str__(self) -> str:
        return f"venom:{self.v}:{self.n}:{self.columns}"

    @property
    def m(self) -> int:
        """Rows whose masks depend on each other: V."""
        return self.v

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.n / self.columns

    def sub_row(self, k: int) -> int:
        """Columns whose masks depend on each other: M."""
        return self.columns

    def check_fits(self, rows: int, k: int, name: str = "weight") -> None:
        """Refuse a weight ``[rows, k]`` that the pattern does not divide.

        Raises:
            PatternError: V does not divide the rows, or M the columns.
        """
        if rows % self.v or k % self.columns:
            raise PatternError(
                f"{name}: {self} needs rows that are a multiple of {self.v} and columns of "
                f"{self.columns}, found [{rows}, {k}]."
            )

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest mask, exactly: every choice of 4 of M columns is tried, bool ``[rows, k]``.

        Ties go to the lower columns.
        """
        rows, k = x.shape
        blocks = x.view(rows // self.v, self.v, k // self.columns, self.columns)
        choices = list(itertools.combinations(range(self.columns), _COLUMNS))
        kept = torch.stack([_kept(blocks.square(), choice) for choice in choices])
        best = kept.argmax(dim=0)  # [blocks, k/M]  the first of equals
        columns = torch.tensor(choices, device=x.device)[best].unsqueeze(1)
        columns = columns.expand(-1, self.v, -1, -1)  # [blocks, V, k/M, 4]
        four = blocks.gather(-1, columns)
        inside = project(four.reshape(-1, _COLUMNS), _TWO_OF_FOUR).view(four.shape)
        mask = torch.zeros(blocks.shape, dtype=torch.bool, device=x.device)
        return mask.scatter_(-1, columns, inside).view(rows, k)


def _kept(
    squares: torch.Tensor,  # [blocks, V, k/M, M]
    columns: tuple[int, ...],
) -> torch.Tensor:
    """What 2 of 4 columns keep of all rows of a block, ``[blocks, k/M]`` fp64."""
    a, b, c, d = (squares[..., column] for column in columns)
    high_ab, high_cd = torch.maximum(a, b), torch.maximum(c, d)
    low = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
    second = torch.maximum(torch.minimum(high_ab, high_cd), low)
    return (torch.maximum(high_ab, high_cd) + second).sum(dim=1, dtype=torch.float64)


@dataclass(frozen=True)
class Unstructured:
    """The largest weights of each row, wherever they are.

    Raises:
        PatternError: the share that is dropped is not above 0 and below 1.
    """

    sparsity: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise PatternError(f"A sparsity must be above 0 and below 1, found {self.sparsity}.")

    def __str__(self) -> str:
        return f"unstructured:{self.sparsity:g}"

    @property
    def m(self) -> int:
        """Rows whose masks depend on each other: every row is alone."""
        return 1

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return 1 - self.sparsity

    def sub_row(self, k: int) -> int:
        """Columns that a sweep chooses at once, with the same share kept: about 128, as SparseGPT.

        Other methods choose among all columns of a row.
        """
        return max(width for width in range(4, min(k, _WIDEST) + 1, 4) if k % width == 0)

    def check_fits(self, rows: int, k: int, name: str = "weight") -> None:
        """Refuse a weight ``[rows, k]`` whose columns are no groups of 4.

        Raises:
            PatternError: 4 does not divide the columns.
        """
        if k % 4:
            raise PatternError(f"{name}: {self} needs columns in fours, found [{rows}, {k}].")

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest mask, bool ``[rows, k]``; ties go to the lower columns."""
        kept = round(x.shape[1] * self.density)
        order = x.abs().sort(dim=1, descending=True, stable=True).indices[:, :kept]
        return torch.zeros_like(x, dtype=torch.bool).scatter_(1, order, True)
