"""What is measured, the most important first: patterns x methods x recovery x ideas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby

DENSE = "dense"
BUDGET = "1:2:32"  # its bytes are those of "75 %"
VENOM = "venom:64:2:8"
UNSTRUCTURED = "unstructured:0.75"

TARGETS = ("1:2:32", "1:2:128", "2:4", "3:4:128")
OTHERS = ("1:2:64", "8:16:32", "4:8:32", "1:2:16")
PATTERNS = (*TARGETS, VENOM, UNSTRUCTURED, *OTHERS)

BEST = "best"
METHODS = (
    BEST,
    "sparsegpt+refine",
    "admm+refine",
    "admm+refine+asymmetric",
    "wanda+refine",
    "sparsegpt",
    "admm",
    "wanda",
    "magnitude",
)

NONE = "none"
DISTILL = "distill"
TWICE = "distill-twice"  # the same text, in another order, in steps of one schedule
BLOCK = "block"
BLOCK_DISTILL = "block+distill"
RECOVERIES = (NONE, DISTILL, TWICE, BLOCK, BLOCK_DISTILL)
PASSES = {DISTILL: 1, TWICE: 2}  # of a distillation over its text

# Changes at the bytes of BUDGET. permute: rows of gate and up in another order. uneven: patterns by
# the package's own measure, weight by weight; probed: by the loss of the model. columns: some input
# columns stay dense and the rest gets sparser.
PERMUTE, UNEVEN, PROBED, COLUMNS = "permute", "uneven", "probed", "columns"
IDEAS = (
    NONE,
    PERMUTE,
    UNEVEN,
    PROBED,
    COLUMNS,
    "permute+uneven",
    "columns+probed",
    "permute+columns+probed",
)

MASKED = "masked"  # zeros in the dense model
KERNELS = "samoyeds"  # encoded, through the package's own experts
PATHS = (MASKED, KERNELS)


@dataclass(frozen=True)
class Cell:
    """One measurement of one model."""

    pattern: str
    method: str = BEST
    recovery: str = NONE
    ideas: str = NONE
    path: str = MASKED

    def __str__(self) -> str:
        parts = [self.pattern, self.method]
        parts += [part for part in (self.ideas, self.recovery) if part != NONE]
        return " ".join(parts) + (f" ({self.path})" if self.path != MASKED else "")

    @property
    def steps(self) -> tuple[str, ...]:
        """The recoveries, in order."""
        return () if self.recovery == NONE else tuple(self.recovery.split("+"))


@dataclass(frozen=True)
class Choice:
    """Which cells a run is about."""

    patterns: tuple[str, ...] = PATTERNS
    methods: tuple[str, ...] = METHODS
    recoveries: tuple[str, ...] = RECOVERIES
    ideas: tuple[str, ...] = IDEAS
    paths: tuple[str, ...] = PATHS

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Of what can be chosen."""
        return tuple(field.name for field in fields(cls))

    def __contains__(self, cell: Cell) -> bool:
        return (
            cell.pattern in self.patterns
            and cell.method in self.methods
            and cell.recovery in self.recoveries
            and cell.ideas in self.ideas
            and cell.path in self.paths
        )


def cells(choice: Choice) -> list[Cell]:
    """The chosen cells in the order in which they are measured.

    What continues a cell follows it where it can, so that it is not pruned again.
    """
    return [cell for cell in dict.fromkeys(_in_order()) if cell in choice]


def share_of(cells: Sequence[Cell], worker: int, workers: int) -> list[Cell]:
    """The cells that one of several processes measures, in order.

    What continues a cell stays with it, and all that needs every weight's own loss is in one
    process, which measures those once.
    """
    mine: list[Cell] = []
    taken = 0
    for (_, _, ideas, _), run in groupby(cells, key=_pruned_as):
        owner = taken % workers
        if {PROBED, COLUMNS}.intersection(ideas.split("+")):
            owner = workers - 1
        else:
            taken += 1
        if owner == worker:
            mine += run
    return mine


def _pruned_as(cell: Cell) -> tuple[str, str, str, bool]:
    """Alike for cells that begin with the same pruned model."""
    return cell.pattern, cell.method, cell.ideas, BLOCK in cell.steps


def _in_order() -> Iterator[Cell]:
    for pattern in (*TARGETS, VENOM):
        yield from _with(Cell(pattern), DISTILL)
    plain = Cell(BUDGET)
    yield from _with(replace(plain, ideas=IDEAS[-1]), DISTILL)
    yield from (replace(plain, ideas=ideas) for ideas in IDEAS[1:])
    for pattern in (BUDGET, "1:2:128"):
        yield from (Cell(pattern, method) for method in METHODS)
    yield from (Cell(pattern) for pattern in (UNSTRUCTURED, *OTHERS))
    yield from (Cell(pattern, path=KERNELS) for pattern in (BUDGET, "2:4"))
    yield from _with(Cell("1:2:128", ideas=PERMUTE), DISTILL)
    yield from (Cell(BUDGET, method, DISTILL) for method in METHODS[1:4])
    yield from (Cell(pattern, recovery=DISTILL) for pattern in (UNSTRUCTURED, *OTHERS))
    for pattern in TARGETS:
        yield from _with(Cell(pattern, recovery=BLOCK), BLOCK_DISTILL)
    yield from _with(replace(plain, ideas=UNEVEN, recovery=BLOCK), BLOCK_DISTILL)
    for pattern in (BUDGET, "1:2:128", "3:4:128"):
        yield from _with(Cell(pattern, ideas=PERMUTE, recovery=BLOCK), BLOCK_DISTILL)
    yield from (replace(plain, ideas=ideas, recovery=DISTILL) for ideas in IDEAS[1:])
    yield from (Cell(pattern, recovery=TWICE) for pattern in TARGETS)
    yield from (Cell(pattern, method) for method in METHODS for pattern in PATTERNS)


def _with(cell: Cell, recovery: str) -> Iterable[Cell]:
    """A cell, and the recovery that goes on from it."""
    return (cell, replace(cell, recovery=recovery))
