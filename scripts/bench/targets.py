"""What the project asks of one layer of experts, as data: bf16, H200, equal work."""

from __future__ import annotations

from dataclasses import dataclass

TARGET_PATTERN = "1:2:128"


@dataclass(frozen=True)
class Target:
    """At TARGET_PATTERN: times the best dense path, and share of the byte floor."""

    speedup: float
    share: float | None = None

    def __str__(self) -> str:
        return f"{self.speedup}x" + (f", {self.share:.0%} of the floor" if self.share else "")

    def is_met(self, speedup: float, share: float) -> bool:
        return speedup >= self.speedup and (self.share is None or share >= self.share)


LARGE = ("mixtral-8x7b", "mixtral-8x22b")
FINE = ("qwen2-57b-a14b", "qwen1.5-moe", "deepseek-moe-16b", "qwen3-30b-a3b")
TARGETS = (  # models, first and last T, target
    (LARGE, 1, 64, Target(3.0, 0.75)),
    (FINE, 16, 256, Target(3.5, 0.65)),
    (FINE, 1, 4, Target(2.5)),
    (LARGE + FINE, 1024, 1024, Target(1.5)),
    (LARGE + FINE, 4096, 16384, Target(1.3)),
)


def target_of(model: str, num_tokens: int, pattern: str) -> Target | None:
    if pattern != TARGET_PATTERN:
        return None
    for models, first, last, target in TARGETS:
        if model in models and first <= num_tokens <= last:
            return target
    return None
