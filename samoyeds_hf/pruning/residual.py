"""What the experts of a layer can make up for beside their own errors: the residual stream's.

A layer's output is ``y = r + c * sum_e g_e D_e x_e`` over the experts e of a token: r comes from
attention, from shared experts and from the layers before, all of which differ from the dense
model's by now. To end where the dense layer ends, at y*, the experts have to add ``(y* - r) / c``.
If each follows its own dense self they add ``sum_e g_e D_e z_e``, where z are the dense model's
inputs. What is missing then,

    R = (y* - r) / c - sum_e g_e D_e z_e

is also the error of other routing. The sum of squares ``|R - sum_e g_e U_e x_e|^2`` over changes
U of down is smallest where each expert takes the share ``g_e^2 / sum_e g_e^2`` of R, if the experts
of a token answer alike; then ``U = E[share * g * R x^T] H^-1`` for each expert alone.

Held-out perplexity of tests/assets/tiny-moe, ``best`` on 64 x 512 tokens, dense 11.2: 21.0 without
and 19.2 with at 1:2:32, 23.9 and 21.2 at 1:2:128. Recovery by layers fits the same output by
training, and ends better where this was left out: 16.9 against 17.7, and 18.5 against 19.1 with
another seed (1:2:64); so it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from samoyeds_hf.pruning.inputs import Routed, to_host

_ROUNDINGS = 4  # between two ways to a layer's output, each up to one eps of what is added
_FEW = 0.01  # of the elements may be further off, where larger terms cancel


class MissingMoments:
    """Sums of ``share * g * R x^T`` over the tokens routed to each expert, ``[E, O, K]``.

    O is the hidden size here; x is what a token brings to down in the pruned model.
    """

    def __init__(self, experts: int, rows: int, k: int, device: torch.device) -> None:
        self.sums = torch.zeros(experts, rows, k, device=device)  # fp32
        self.squares = torch.zeros(experts, dtype=torch.float64, device=device)  # of share * R
        self.tokens = [0] * experts

    def add(
        self,
        expert: int,
        x: torch.Tensor,  # [t, K]
        missing: torch.Tensor,  # [t, O]
        router_weight: torch.Tensor,  # [t]
        share: torch.Tensor,  # [t]
    ) -> None:
        """Count tokens of one expert."""
        wanted = missing.float() * share.float().unsqueeze(-1)
        rows = x.float() * router_weight.float().unsqueeze(-1)
        self.sums[expert].addmm_(wanted.T, rows)
        self.squares[expert] += wanted.square().sum()
        self.tokens[expert] += x.shape[0]

    def fit(
        self,
        expert: int,
        factor: torch.Tensor,  # [K, K]  of Cholesky, of the damped H
        inputs: int,  # of the K those that are not dead
    ) -> torch.Tensor:
        """The change of an expert's weights that makes up for most, ``[O, K]``, shrunk.

        Least squares explains some of anything, of noise ``inputs / tokens``. The change counts
        by the share of what it explains that is not expected of noise, which is R^2 adjusted for
        the number of inputs, over R^2 (Theil 1961, Economic Forecasts and Policy); so an expert
        with fewer tokens than inputs is not changed.
        """
        count = max(1, self.tokens[expert])
        mean = self.sums[expert] / count
        change = torch.cholesky_solve(mean.T, factor).T
        explained = float((change.double() * mean).sum())
        total = float(self.squares[expert]) / count
        return change * beyond_chance(explained, total, self.tokens[expert], inputs)


def beyond_chance(explained: float, total: float, tokens: int, inputs: int) -> float:
    """The share, 0 to 1, of an explained sum of squares that noise would not have explained."""
    if tokens <= inputs or not explained > 0:
        return 0.0
    noise = max(0.0, total - explained) * inputs / (tokens - inputs)
    return max(0.0, 1 - noise / explained)


def gain_of(module: nn.Module, run: Callable[[], torch.Tensor]) -> float | None:
    """c of a layer whose output is ``r + c * experts``; None for one where it is no such sum.

    Found by leaving the experts out: a norm after them, or a layer that adds them to more than one
    stream, is no sum.

    Args:
        module: the experts of the layer.
        run: a batch through the layer; its output, the same each time.
    """
    made: list[torch.Tensor] = []

    def leave_out(_module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        made.append(output)
        return torch.zeros_like(output)

    whole = run()
    handle = module.register_forward_hook(leave_out)
    try:
        rest = run()
    finally:
        handle.remove()
    if len(made) != 1 or made[0].numel() != whole.numel():
        return None
    own = made[0].reshape(whole.shape).float()
    added = whole.float() - rest.float()
    square = own.double().square().sum()
    gain = float((added.double() * own).sum() / square) if square > 0 else 0.0
    size = whole.float().abs() + rest.float().abs() + abs(gain) * own.abs()
    allowed = _ROUNDINGS * torch.finfo(whole.dtype).eps * size
    off = ((added - gain * own).abs() > allowed).float().mean()
    return gain if gain != 0 and float(off) <= _FEW else None


@contextmanager
def missing_of(
    layer: nn.Module,
    module: nn.Module,  # its experts, still dense
    gain: float,
    routed: Routed,  # caught from the pruned model in the same run, before this looks
    dense: Routed,  # of the dense model
    outputs: Sequence[torch.Tensor],  # y*, batch by batch
) -> Iterator[list[torch.Tensor]]:
    """Yields a list that R ``[T, H]`` is added to, in host memory, for each batch that is run.

    With y of dense experts in the pruned model R is ``(y* - y) / c + sum_e g_e D_e (x_e - z_e)``:
    exactly 0 where nothing before was pruned.
    """
    missing: list[torch.Tensor] = []
    made: list[torch.Tensor] = []

    def experts_ran(_module: nn.Module, _args: object, output: torch.Tensor) -> None:
        made.append(output)

    def layer_ran(
        _layer: nn.Module, _args: object, output: torch.Tensor | tuple[torch.Tensor]
    ) -> None:
        (here,), number = made, len(missing)
        made.clear()
        y = output[0] if isinstance(output, tuple) else output
        device, width = y.device, here.shape[-1]
        batch = (dense.hidden[number], routed.index[number], routed.weights[number])
        # NOTE: forward, and not a call, which would run the hooks that catch the pruned model's
        there = module.forward(*(tensor.to(device, non_blocking=True) for tensor in batch))
        wanted = outputs[number].to(device, non_blocking=True)
        found = ((wanted.float() - y) / gain).reshape(-1, width)
        found += here.reshape(-1, width).float() - there.float()
        missing.append(to_host(found.to(y.dtype)))

    handles = [
        module.register_forward_hook(experts_ran),
        layer.register_forward_hook(layer_ran),
    ]
    try:
        yield missing
    finally:
        for handle in handles:
            handle.remove()
