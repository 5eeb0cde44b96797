"""Recovery of one decoder layer: what is left of it learns the dense layer's output.

Cautious Adam on fp32 masters of what the masks keep, and of all that has no mask, towards given
outputs, on given inputs: the layer alone runs, so it fits where pruning fits. Bytes a weight beside
the layer's own: 24 times the share kept, and 20 where there is no mask and so no places (20 and 16
as in :mod:`samoyeds_hf.pruning.masters`, 4 for what was there before); and the dense gradient of
one weight at a time.

More passes over the same text bring each layer nearer to its targets and, from some number on, the
model further from the dense one. On tests/assets/tiny-moe (``best``, 1:2:32, one seed; KL on 65,536
held-out tokens, CPU, fp32, torch 2.13):

============  =======  ======  =====  =====  =====  =====
calibration   batches  passes    3.6      7     14     29
============  =======  ======  =====  =====  =====  =====
64 x 512      8 x 8    KL      0.540  0.505  0.481  0.506
256 x 512     32 x 8   KL      0.463  0.439  0.428
256 x 512     8 x 32   KL                    0.444
============  =======  ======  =====  =====  =====  =====

With 14 passes in the first row, half the rate (0.498) and twice the rate (0.513) are worse. All
that is of the pruned weights alone. On another text (64 x 512, 14 passes, one seed) they end at
0.558, and whole layers at 0.524, with three times the rate for what has no mask also at 0.524, in
the same time (320 s on a core; 92da548). Perplexity at 1:2:64 was 16.9 (5650b6b) and is 16.3.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from samoyeds_hf.errors import CalibrationError, ConfigError
from samoyeds_hf.pruning.distill_settings import TRAINED
from samoyeds_hf.pruning.losses import relative_errors
from samoyeds_hf.pruning.masters import OPTIMIZER, Masters, make_optimizer
from samoyeds_hf.pruning.training import Log, check_count, check_number, pick, schedule

_MAX_NORM = 1.0  # of a step's gradient
PASSES = 14  # over what is trained on, where no number of steps is given
BLOCK_RECOVERY = (
    f"{OPTIMIZER}, {PASSES} passes, whole layers"  # of a conversion, which has no settings for it
)


@dataclass(frozen=True)
class BlockSettings:
    """How a layer is recovered.

    Args:
        steps: of the optimizer, each on one batch; None is 14 for each batch that is trained on.
        learning_rate: the peak, for weights with 1024 inputs; see :meth:`Masters.step`.
        warmup: share of the steps in which the learning rate rises.
        held_back: share of the batches, at least one, that only measure.
        train: "all", also the layer's router, norms, attention and dense experts; or "experts", the
            masked weights alone.
        seed: of the order of the batches.

    Raises:
        ConfigError: a value that cannot be.
    """

    steps: int | None = None
    learning_rate: float = 1e-3
    warmup: float = 0.1
    held_back: float = 0.125
    train: str = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_count("steps", self.steps)
        check_number("learning_rate", self.learning_rate, 0, 1)
        check_number("warmup", self.warmup, 0, 1, or_low=True)
        check_number("held_back", self.held_back, 0, 1, or_low=True)
        check_count("seed", self.seed, 0)
        if self.train not in TRAINED:
            raise ConfigError(f"train must be one of {list(TRAINED)}, found {self.train!r}.")

    def num_trained(self, batches: int) -> int:
        """How many of so many batches, two or more, are not held back."""
        return max(1, batches - max(1, round(self.held_back * batches)))

    def num_steps(self, batches: int) -> int:
        """Of a layer with so many batches, those held back among them."""
        return PASSES * self.num_trained(batches) if self.steps is None else self.steps


@dataclass(frozen=True)
class BlockReport:
    """What a recovery did: the relative squared error on the batches held back."""

    first: float  # before
    last: float  # after; what is kept is never worse than before
    kept: bool  # whether the trained weights were better, and are in the layer
    seconds: float


def recover_block(
    layer: nn.Module,
    run: Callable[[torch.Tensor], torch.Tensor],
    inputs: Sequence[torch.Tensor],  # batches [B, S, H]
    targets: Sequence[torch.Tensor],  # batches [B, S, H]
    weights: Mapping[str, tuple[nn.Parameter, torch.Tensor | None]],
    settings: BlockSettings | None = None,
    log: Log | None = None,
) -> BlockReport:
    """Train weights of a pruned layer in place, their masks held.

    The loss is the squared error of a token's output relative to the square of its target, averaged
    over tokens: the next layer normalises each token, and a few tokens are far larger than the
    others. The better of before and after on the batches held back stays in the layer.

    Args:
        layer: in eval mode, pruned, in bf16 or fp32.
        run: the layer's output for one batch of inputs, on the layer's device.
        inputs: what the layer gets in the pruned model; may be on the CPU.
        targets: what it should make of them.
        weights: parameters of the layer to train by name, each with its mask (bool) or None;
            ``settings.train`` is about which a walk gives.
        settings: how; None is the default.
        log: is told of each step: step, loss, learning_rate.

    Raises:
        CalibrationError: fewer than two batches, as many inputs as targets, weights that cannot be
            trained, or a loss that is not finite.
    """
    start, settings = time.monotonic(), settings or BlockSettings()
    if len(inputs) != len(targets) or len(inputs) < 2 or not weights:
        raise CalibrationError(
            "Recovery of a layer needs weights, and two batches or more with a target each, found "
            f"{len(weights)} weights, {len(inputs)} batches and {len(targets)} targets; give more "
            "sequences, or smaller batches."
        )
    count = settings.num_trained(len(inputs))
    masters = Masters(
        {name: weight for name, (weight, _) in weights.items()},
        {name: mask for name, (_, mask) in weights.items() if mask is not None},
    )
    device = next(iter(masters.weights.values())).device

    def loss_of(number: int) -> torch.Tensor:
        target = targets[number].to(device, non_blocking=True)
        return relative_errors(run(inputs[number].to(device, non_blocking=True)), target).mean()

    @torch.no_grad()
    def measure() -> float:
        held = range(count, len(inputs))
        return sum(float(loss_of(number)) for number in held) / len(held)

    before = measure()
    untrained = {name: master.detach().clone() for name, master in masters.values.items()}
    with masters.attached(layer):
        _train(masters, loss_of, len(inputs), settings, log)
    after = measure()
    if kept := after < before:  # not where it is NaN
        return BlockReport(before, after, kept, time.monotonic() - start)
    masters.load(untrained)
    return BlockReport(before, before, kept, time.monotonic() - start)


def _train(
    masters: Masters,
    loss_of: Callable[[int], torch.Tensor],
    batches: int,
    settings: BlockSettings,
    log: Log | None,
) -> None:
    optimizer = make_optimizer(masters)
    count, steps = settings.num_trained(batches), settings.num_steps(batches)
    for step in range(steps):
        rate = settings.learning_rate * schedule(step, steps, settings.warmup)
        loss = loss_of(int(pick(step, 1, count, settings.seed)))
        loss.backward()
        masters.step(optimizer, rate, _MAX_NORM)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CalibrationError(
                f"The loss of a layer must be finite, found {value} in step {step}; lower the "
                "learning rate."
            )
        if log is not None:
            log({"step": step, "loss": value, "learning_rate": rate})
