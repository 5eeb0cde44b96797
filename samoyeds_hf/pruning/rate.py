"""The learning rate of a distillation, which is lowered where it does harm.

See :mod:`samoyeds_hf.pruning.distill_settings` for what the numbers below rest on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from samoyeds_hf.pruning.distill_settings import DistillSettings
from samoyeds_hf.pruning.training import schedule

# Shares of its steps after which a rate is checked, and from how many times the KL before on it did
# harm: near its peak the KL is high, too, and the rest of the steps makes that good.
CHECKS = ((0.25, 1.5), (0.5, 1.25))
_LOWER = 0.25  # factor of a rate that did harm
_MOST = 4  # times that it is lowered


@dataclass
class Rate:
    """Starts from the untrained weights, each with a lower peak and a schedule of its own."""

    settings: DistillSettings
    starts: list[int] = field(default_factory=lambda: [0])  # steps done before each
    trials: list[float] = field(default_factory=list)  # KL on the sequences held back, at checks

    @property
    def peak(self) -> float:
        """Since the last start."""
        return self.settings.learning_rate * _LOWER ** (len(self.starts) - 1)

    def of(self, step: int) -> float:
        """The rate of a step that comes after the last start."""
        start, settings = self.starts[-1], self.settings
        return self.peak * schedule(step - start, settings.steps - start, settings.warmup)

    def limit(self, done: int) -> float | None:
        """From how many times the KL before on it did harm; None: it is not checked now."""
        start, steps = self.starts[-1], self.settings.steps
        if not self.settings.backtrack or len(self.starts) > _MOST or done >= steps:
            return None
        ends = {start + max(1, int(share * (steps - start))): times for share, times in CHECKS}
        return ends.get(done)
