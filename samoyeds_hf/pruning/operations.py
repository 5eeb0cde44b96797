"""How much arithmetic pruning takes, from shapes alone, leading terms only."""

from __future__ import annotations

from dataclasses import dataclass

from samoyeds_hf.pruning import admm, refine


@dataclass(frozen=True)
class Operations:
    """Multiplications and additions, by the arithmetic that a GPU does them in."""

    double: float = 0.0  # fp64: factors
    exact: float = 0.0  # fp32: residuals and errors; on a CPU all that is not fp64
    fast: float = 0.0  # TF32 on a GPU: products inside iterations

    def __add__(self, other: Operations) -> Operations:
        return Operations(
            self.double + other.double, self.exact + other.exact, self.fast + other.fast
        )

    @property
    def total(self) -> float:
        """All of them."""
        return self.double + self.exact + self.fast


def operations(experts: int, rows: int, k: int, method: str, refined: bool) -> Operations:
    """What :func:`~samoyeds_hf.pruning.prune_experts` does for weights ``[experts, rows, k]``.

    Args:
        experts: E.
        rows: O.
        k: K.
        method: a name in ``METHODS``.
        refined: whether it refines; ``best`` always does.
    """
    product = 2.0 * experts * rows * k * k  # W H
    cube = 1.0 * experts * k**3
    # Cholesky is a third of a cube, a triangular inverse one, their product two
    factors = -(-admm.STEPS // admm.HOLD)
    sweep = Operations(double=cube / 3 + cube, fast=product / 2)
    search = Operations(
        exact=factors * (cube / 3 + cube) + 2 * product,
        fast=factors * 2 * cube + admm.STEPS * product,
    )
    found = {
        "magnitude": [Operations()],
        "wanda": [Operations()],
        "sparsegpt": [sweep],
        "admm": [search],
        "best": [sweep, search],
    }[method]
    solve = Operations(exact=product, fast=refine.STEPS * product)
    local = Operations(exact=product, fast=product)
    error = Operations(exact=product)
    total = error  # of no weights at all, what errors are relative to
    for one in found:
        total += one + error
        if refined or method == "best":
            total += solve + error
            for _ in range(refine.ROUNDS):
                total += local + solve
    return total
