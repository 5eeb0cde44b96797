"""Cautious Adam: Adam that leaves out, of each step, what would go against the batch's gradient.

What is left of a weight's step grows by the share that was left out (Liang et al. 2024, arXiv
2411.16085). Bytes an element, all in fp32: 8 for the moments, and 4 for one weight at a time in a
step, which else works in the memory of the gradients.

On tests/assets/tiny-moe (1:2:64, CPU, fp32, torch 2.13) 320 steps of 2 x 512 tokens of distillation
end at a held-out KL of 0.336 with Adam and a cosine, 0.331 with Adam and a linear decay, 0.330 with
this and a cosine, and 0.326 with both (one seed). Recovery of its layers leaves a KL of 0.515 with
the first of these and 0.509 with the last (means of three seeds).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

_BETAS = (0.9, 0.95)
_EPSILON = 1e-8
_LEAST = 1e-3  # share of a step that counts as left, so that little is not made much of


class CautiousAdam(torch.optim.Optimizer):
    """Cautious Adam without decay.

    Args:
        groups: parameters as "params"; each group's learning rate is its "lr" at the time of a
            step.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move what has a gradient; afterwards the gradients hold nothing of use."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group["lr"])

    def _move(self, weight: torch.Tensor, grad: torch.Tensor, rate: float) -> None:
        state, (first, second) = self.state[weight], _BETAS
        if not state:  # steps is no tensor: it stays on the host, also in a state that is loaded
            state.update(steps=0, mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
        state["steps"] += 1
        steps, mean, square = state["steps"], state["mean"], state["square"]
        mean.lerp_(grad, 1 - first)
        square.mul_(second).addcmul_(grad, grad, value=1 - second)
        spread = square.div(1 - second**steps).sqrt_().add_(_EPSILON)
        agrees = grad.mul_(mean).gt_(0)  # 1 or 0
        share = agrees.mean().clamp_(min=_LEAST)
        change = agrees.mul_(mean).div_(share)
        weight.addcdiv_(change, spread, value=-rate / (1 - first**steps))
