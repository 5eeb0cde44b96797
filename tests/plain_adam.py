"""Cautious Adam in plain steps, written from the paper and not from the code."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class PlainCautiousAdam:
    """Algorithm 1 of arXiv 2411.16085, a weight after the other, in fp64.

    Of a weight with a mask only what that keeps moves, and only that counts.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]
    ) -> None:
        self.weights, self.masks = weights, masks
        self.count = 0
        self.first: dict[str, torch.Tensor] = {}
        self.second: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, rates: Mapping[str, float]) -> None:
        """Move every weight, and forget its gradient."""
        self.count += 1
        for name, weight in self.weights.items():
            kept = self.masks.get(name, torch.ones_like(weight, dtype=torch.bool))
            grad = weight.grad[kept].double()
            self.first[name] = 0.9 * self.first.get(name, 0) + 0.1 * grad
            self.second[name] = 0.95 * self.second.get(name, 0) + 0.05 * grad**2
            mean = self.first[name] / (1 - 0.9**self.count)
            square = self.second[name] / (1 - 0.95**self.count)
            change = mean / (square.sqrt() + 1e-8)
            agrees = (change * grad > 0).double()
            change = change * agrees / max(float(agrees.mean()), 1e-3)
            weight[kept] -= (rates[name] * change).to(weight.dtype)
            weight.grad = None
