"""What was asked for: held-out perplexity relative to the dense model, at most this."""

from __future__ import annotations

from dataclasses import dataclass

from lab.cells import BUDGET, DISTILL, NONE


@dataclass(frozen=True)
class Target:
    """A bound that must hold and one to aim at; None is a bound that depends on other cells."""

    must: float | None
    aim: float

    def verdict(self, ratio: float | None, must: float | None) -> str:
        """``aim``, ``must`` or ``missed``; ``-`` if nothing was measured, ``?`` without a bound."""
        if ratio is None:
            return "-"
        if must is None:
            return "?"
        if ratio > must:
            return "missed"
        return "aim" if ratio <= self.aim else "must"


TARGETS: dict[tuple[str, str], Target] = {  # (pattern, recovery)
    ("2:4", NONE): Target(1.015, 1.01),
    ("2:4", DISTILL): Target(1.01, 1.00),
    ("3:4:128", NONE): Target(1.04, 1.03),
    ("3:4:128", DISTILL): Target(1.02, 1.01),
    ("1:2:32", NONE): Target(1.11, 1.09),
    ("1:2:32", DISTILL): Target(1.035, 1.025),
    ("1:2:128", NONE): Target(1.16, 1.12),
    ("1:2:128", DISTILL): Target(1.05, 1.035),
}
# Of any recipe at the bytes of BUDGET; one-shot it must be below VENOM by the same method.
BEST_RECIPE: dict[str, Target] = {NONE: Target(None, 1.07), DISTILL: Target(1.03, 1.02)}
RECIPE = f"best recipe at the bytes of {BUDGET}"
