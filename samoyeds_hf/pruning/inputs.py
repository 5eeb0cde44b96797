"""What reaches the expert weights of one layer: caught by hooks, summed to second moments.

Experts are fused modules, so hooks on Linears see nothing of them. Here the experts module's own
arguments are kept (tokens and routing, once a layer), and moments are summed from those for any
group of experts, at any time: a layer with more moments than memory is done group by group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from samoyeds_hf.pruning.moments import SecondMoments


@dataclass
class Routed:
    """Tokens that reached an experts module, batch by batch, in host memory."""

    hidden: list[torch.Tensor] = field(default_factory=list)  # [T, H] each
    index: list[torch.Tensor] = field(default_factory=list)  # [T, K] each, int64
    weights: list[torch.Tensor] = field(default_factory=list)  # [T, K] each

    def catch(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook ``with_kwargs``: keep what experts are called with."""
        names = ("hidden_states", "top_k_index", "top_k_weights")
        given = [*args, *(kwargs[name] for name in names[len(args) :])]
        for kept, tensor in zip((self.hidden, self.index, self.weights), given, strict=True):
            kept.append(to_host(tensor.detach().reshape(-1, tensor.shape[-1])))

    def by_expert(
        self, experts: range, device: torch.device
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """``(expert, tokens [t, H], router weights [t])`` for each batch and expert with tokens."""
        for expert, (x,), weights, _ in self.beside((), experts, device):
            yield expert, x, weights

    def beside(
        self, others: Sequence[Sequence[torch.Tensor]], experts: range, device: torch.device
    ) -> Iterator[tuple[int, list[torch.Tensor], torch.Tensor, torch.Tensor]]:
        """The same with the rows of other streams ``[T, ...]``, batch by batch, beside the tokens.

        Also each choice's share of the squared router weights of its token, ``[t]`` fp32.
        """
        streams = zip(self.hidden, *others, strict=True)
        for batches, index, weights in zip(streams, self.index, self.weights, strict=True):
            rows = [batch.to(device, non_blocking=True) for batch in batches]
            flat, order = index.to(device).reshape(-1).sort(stable=True)
            bounds = torch.tensor([*experts, experts.stop], device=device)
            edges = torch.searchsorted(flat, bounds).tolist()  # one wait for a batch
            routing = weights.to(device)
            shares = _shares(routing).reshape(-1)
            routing = routing.reshape(-1)
            for expert, start, stop in zip(experts, edges, edges[1:], strict=False):
                if stop > start:
                    chosen = order[start:stop]
                    tokens = chosen // index.shape[1]
                    yield expert, [row[tokens] for row in rows], routing[chosen], shares[chosen]


def _shares(router_weights: torch.Tensor) -> torch.Tensor:
    """``g^2 / sum g^2`` over the choices of each token, ``[T, K]``; 0 where all are 0."""
    squares = router_weights.float().square()
    total = squares.sum(dim=-1, keepdim=True)
    return squares / torch.where(total > 0, total, 1)


def gate_up_moments(
    routed: Routed,
    experts: range,
    width: int,  # H
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> SecondMoments:
    """Second moments ``[len(experts), H, H]`` of the inputs of gate and up."""
    moments = SecondMoments(len(experts), width, dtype=dtype, device=device)
    for expert, x, weights in routed.by_expert(experts, device):
        moments.add(expert - experts.start, x, weights)
    return moments


def layer_moments(
    routed: Routed, width: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The mean of ``g^2 x x^T`` over all tokens and choices ``[H, H]``: all experts as one."""
    moments = SecondMoments(1, width, dtype=dtype, device=device)
    for hidden, weights in zip(routed.hidden, routed.weights, strict=True):
        # sum over the choices of (g x)(g x)^T is (|g| x)(|g| x)^T
        length = weights.to(device).float().square().sum(dim=-1).sqrt()
        moments.add(0, hidden.to(device, non_blocking=True), length)
    choices = sum(index.numel() for index in routed.index)
    return moments.sums[0] / max(1, choices)


def down_moments(
    routed: Routed,
    module: nn.Module,  # the experts, their gate and up already pruned
    experts: range,
    dtype: torch.dtype = torch.float32,
) -> SecondMoments:
    """Second moments ``[len(experts), I, I]`` of the inputs of down."""
    gate_up = module.get_parameter("gate_up_proj")  # [E, 2I, H]
    moments = SecondMoments(
        len(experts), gate_up.shape[1] // 2, shared_inputs=False, dtype=dtype, device=gate_up.device
    )
    for expert, x, weights in routed.by_expert(experts, gate_up.device):
        moments.add(expert - experts.start, inner_of(module, x, gate_up[expert]), weights)
    return moments


def inner_squares(routed: Routed, module: nn.Module, experts: range) -> torch.Tensor:
    """Mean of ``g^2 x^2`` for the inputs x of down, ``[len(experts), I]`` fp32."""
    gate_up = module.get_parameter("gate_up_proj")  # [E, 2I, H]
    shape = (len(experts), gate_up.shape[1] // 2)
    sums, counts = torch.zeros(shape, device=gate_up.device), [0] * len(experts)
    for expert, x, weights in routed.by_expert(experts, gate_up.device):
        inner = inner_of(module, x, gate_up[expert]).float() * weights.float().unsqueeze(-1)
        sums[expert - experts.start] += inner.square().sum(dim=0)
        counts[expert - experts.start] += x.shape[0]
    return sums / torch.tensor(counts, device=sums.device).clamp(min=1).unsqueeze(-1)


def inner_of(module: nn.Module, x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """What an expert's down gets for tokens ``[t, H]``: ``[t, I]``."""
    both = functional.linear(x.to(gate_up.dtype), gate_up)
    inner: torch.Tensor = module._apply_gate(both)  # type: ignore[operator]  # every module has it
    return inner


@dataclass
class LinearInputs:
    """Second moments of one Linear's inputs, summed by a hook."""

    moments: SecondMoments

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype = torch.float32) -> LinearInputs:
        """Empty moments ``[1, K, K]`` on the Linear's device."""
        device = linear.weight.device
        return cls(SecondMoments(1, linear.in_features, dtype=dtype, device=device))

    def catch(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """A forward pre-hook."""
        self.moments.add(0, args[0].reshape(-1, args[0].shape[-1]))


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned where it comes from a GPU so that it travels fast."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor)
