"""Which elements of a weight a sparsity pattern keeps."""

from __future__ import annotations

import re
from dataclasses import dataclass

from samoyeds_hf.errors import PatternError

MAX_M = 16
GROUP = 4  # every 4 consecutive elements of a kept Sub-Row ...
KEPT_PER_GROUP = 2  # ... keep 2


@dataclass(frozen=True)
class SparsityPattern:
    """In each block of M rows x V columns, N Sub-Rows are kept, and in them 2 of every 4 elements.

    Samoyeds (EuroSys'25, arXiv 2503.10725). N = M is plain 2:4. ``v=None`` makes a Sub-Row as long
    as the whole row; it is what ``"2:4"`` means, where no Sub-Row is ever dropped.

    Raises:
        PatternError: not 1 <= N <= M <= 16, or V not a positive multiple of 4.
    """

    n: int
    m: int
    v: int | None = None

    def __post_init__(self) -> None:
        numbers = (self.n, self.m) if self.v is None else (self.n, self.m, self.v)
        if any(type(number) is not int for number in numbers):
            raise PatternError(f"N, M and V must be integers, found {numbers}; use e.g. '1:2:64'.")
        if not 1 <= self.n <= self.m <= MAX_M:
            raise PatternError(
                f"A pattern needs 1 <= N <= M <= {MAX_M}, found N={self.n}, M={self.m}; "
                "use e.g. '1:2:64' or '2:4'."
            )
        if self.v is None and self.n < self.m:
            raise PatternError(
                f"A pattern with N < M needs a Sub-Row length V, found none in {self.n}:{self.m}; "
                f"use e.g. '{self.n}:{self.m}:64'."
            )
        if self.v is not None and (self.v <= 0 or self.v % GROUP):
            raise PatternError(
                f"V must be a positive multiple of {GROUP}, found {self.v}; use e.g. 32, 64 or 128."
            )

    @classmethod
    def parse(cls, text: str | SparsityPattern) -> SparsityPattern:
        """``"N:M:V"``, or ``"2:4"`` for N = M.

        Raises:
            PatternError: the text is neither.
        """
        if isinstance(text, cls):
            return text
        if text == "2:4":
            return cls(1, 1)
        numbers = "([0-9]{1,9}):([0-9]{1,9}):([0-9]{1,9})"
        match = re.fullmatch(numbers, text) if isinstance(text, str) else None
        if match is None:
            raise PatternError(
                f"A pattern is written 'N:M:V' (for example '1:2:64') or '2:4', found {text!r}."
            )
        return cls(*(int(number) for number in match.groups()))

    def __str__(self) -> str:
        return "2:4" if self.v is None else f"{self.n}:{self.m}:{self.v}"

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.n / self.m * KEPT_PER_GROUP / GROUP

    def sub_row(self, k: int) -> int:
        """V for a weight with k in features."""
        return k if self.v is None else self.v

    def kept_rows(self, rows: int) -> int:
        """Rows of the stored tensors for a weight with so many out features."""
        return rows * self.n // self.m

    def num_bytes(self, rows: int, k: int, element_size: int) -> int:
        """Bytes of values, meta and index for one weight ``[rows, k]``."""
        per_row = k // 2 * element_size + k // 8 + k // self.sub_row(k)
        return self.kept_rows(rows) * per_row

    def check_fits(self, rows: int, k: int, name: str = "weight") -> None:
        """Refuse a weight ``[rows, k]`` that the pattern does not divide.

        Raises:
            PatternError: rows % M, k % 8 or k % V is not 0, where the last names the V that do
                divide; or the weight is empty.
        """
        if rows < 1 or k < 1:
            raise PatternError(f"{name}: a weight must have elements, found shape [{rows}, {k}].")
        if rows % self.m:
            raise PatternError(
                f"{name}: M must divide the out features, found M={self.m} and {rows} rows; "
                f"use an M among {[m for m in range(1, MAX_M + 1) if rows % m == 0]}."
            )
        if k % 8:
            raise PatternError(
                f"{name}: the in features must be a multiple of 8, found {k}; leave this layer "
                f"dense with overrides={{'{name}': 'dense'}}."
            )
        if k % self.sub_row(k):
            divisors = [v for v in range(GROUP, k + 1, GROUP) if k % v == 0]
            raise PatternError(
                f"{name}: V must divide the in features, found V={self.v} and {k}; "
                f"the V that divide {k} are {divisors}."
            )
