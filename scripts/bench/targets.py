"""What the project asks of one layer of experts and of one product: bf16, H200, equal work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

TARGET_PATTERN = "1:2:128"


# --- one layer of experts -------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """At TARGET_PATTERN: times the best dense path, share of the byte floor, milliseconds."""

    speedup: float | None = None
    share: float | None = None
    time_ms: float | None = None

    def __str__(self) -> str:
        texts = (
            f"{self.speedup}x" if self.speedup else "",
            f"{self.share:.0%} of the floor" if self.share else "",
            f"{self.time_ms} ms" if self.time_ms else "",
        )
        return ", ".join(filter(None, texts))

    def is_met(self, speedup: float, share: float, time_us: float) -> bool:
        return (
            (self.speedup is None or speedup >= self.speedup)
            and (self.share is None or share >= self.share)
            and (self.time_ms is None or time_us <= 1e3 * self.time_ms)
        )


LARGE = ("mixtral-8x7b", "mixtral-8x22b")
FINE = ("qwen2-57b-a14b", "qwen1.5-moe", "deepseek-moe-16b", "qwen3-30b-a3b")
TARGETS = (  # models, first and last T, target
    (LARGE, 1, 64, Target(3.0, 0.75)),
    (FINE, 16, 256, Target(3.5, 0.65)),
    (FINE, 1, 4, Target(2.5)),
    (LARGE + FINE, 1024, 1024, Target(1.5)),
    (LARGE + FINE, 4096, 16384, Target(1.3)),  # where TIMES_MS says nothing
)
TIMES_MS = {  # T: milliseconds; before TARGETS
    "mixtral-8x7b": {4096: 1.9, 16384: 7.2},
    "mixtral-8x22b": {4096: 3.2, 16384: 12.3},
    "qwen2-57b-a14b": {4096: 1.35, 16384: 4.9},
    "qwen1.5-moe": {4096: 0.34, 16384: 1.0},
    "deepseek-moe-16b": {4096: 0.4, 16384: 1.35},
    "qwen3-30b-a3b": {4096: 0.34, 16384: 1.1},
}


def target_of(model: str, num_tokens: int, pattern: str) -> Target | None:
    if pattern != TARGET_PATTERN:
        return None
    if time_ms := TIMES_MS.get(model, {}).get(num_tokens):
        return Target(time_ms=time_ms)
    for models, first, last, target in TARGETS:
        if model in models and first <= num_tokens <= last:
            return target
    return None


# --- one product ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProductTarget:
    """Least speeds of the sparse op and of its kernel alone, as multiples of these."""

    dense: float | None = None  # cuBLAS or F.grouped_mm
    cusparselt: float | None = None  # at 2:4
    target_pattern: float | None = None  # the same path at TARGET_PATTERN

    @property
    def asked(self) -> dict[str, float]:
        return {name: least for name, least in asdict(self).items() if least is not None}

    def __str__(self) -> str:
        names = {"cusparselt": "cuSPARSELt", "target_pattern": TARGET_PATTERN}
        return ", ".join(f"{least}x {names.get(name, name)}" for name, least in self.asked.items())

    def is_met(self, found: Mapping[str, float | None]) -> bool | None:
        """None where what was measured holds, and something was not measured."""
        pairs = [(least, found[name]) for name, least in self.asked.items()]
        if any(speed is not None and speed < least for least, speed in pairs):
            return False
        return None if any(speed is None for _, speed in pairs) else True


PRODUCT_TARGETS = {  # m x n x k (x groups): pattern: target
    "14336x4096x4096": {
        TARGET_PATTERN: ProductTarget(dense=2.5, cusparselt=1.7),
        "2:4": ProductTarget(dense=1.6),
    },
    "4096x4096x14336": {TARGET_PATTERN: ProductTarget(dense=2.5, cusparselt=1.7)},
    "14336x1024x4096": {TARGET_PATTERN: ProductTarget(dense=2.2)},
    "28672x1024x4096": {TARGET_PATTERN: ProductTarget(dense=2.2)},
    "5120x512x3584x64": {TARGET_PATTERN: ProductTarget(dense=2.0)},
    "2816x256x2048x60": {TARGET_PATTERN: ProductTarget(dense=2.0)},
}


def product_target_of(product: str, pattern: str) -> ProductTarget | None:
    if pattern == "1:2:64":
        return ProductTarget(target_pattern=0.8)
    return PRODUCT_TARGETS.get(product, {}).get(pattern)


# wgmma.mma_async.sp at 2:4 with its weights in registers, measured on an H200; TFLOP/s of the dense
# product, where half of it is computed.
CEILING_TFLOPS_AT_HALF = 1700


def ceiling_tflops(density: float) -> float:
    """Of the dense product, where so much of the weight is kept: 3400 for (1, 2, V)."""
    return CEILING_TFLOPS_AT_HALF * 0.5 / density
