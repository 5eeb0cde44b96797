"""What training after pruning makes small: KL of logits, in chunks, and errors of hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_CHUNK = 1 << 25  # elements in fp32 at once; a handful of such temporaries are alive


class _Divergence(torch.autograd.Function):
    """Sum over positions of tau^2 KL(teacher || student); the gradient is made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,  # [T, vocabulary]
        teacher: torch.Tensor,  # [T, vocabulary]
        temperature: float,
    ) -> torch.Tensor:
        grad = torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        step = max(1, _CHUNK // student.shape[-1])
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            log_q = (student[rows].float() / temperature).log_softmax(dim=-1)
            log_p = (teacher[rows].float() / temperature).log_softmax(dim=-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum(dim=-1).double().sum()
            grad[rows] = (log_q.exp_() - p) * temperature
        ctx.save_for_backward(grad)
        return (total * temperature**2).float()

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad.mul_(scale), None, None


def divergence(
    student: torch.Tensor,  # [..., vocabulary] logits
    teacher: torch.Tensor,  # [..., vocabulary] logits
    temperature: float = 1.0,
) -> torch.Tensor:
    """``tau^2 KL(softmax(teacher / tau) || softmax(student / tau))`` summed over positions, fp32.

    In fp32 and never for all positions at once: beside the logits of both models it takes their
    size once more, in their dtype, for the gradient, which is made in the forward pass. tau^2 keeps
    the size of the gradient (Hinton et al. 2015, arXiv 1503.02531, section 2.1).
    """
    width = student.shape[-1]
    flat = student.reshape(-1, width), teacher.detach().reshape(-1, width)
    total: torch.Tensor = _Divergence.apply(*flat, temperature)  # type: ignore[no-untyped-call]
    return total


def relative_errors(
    output: torch.Tensor,  # [..., H]
    target: torch.Tensor,  # [..., H]
) -> torch.Tensor:
    """``|output - target|^2 / |target|^2`` of every token ``[...]``, fp32.

    Relative to each token: what follows normalises it, and a few tokens are far larger than others.
    """
    wanted = target.float()
    lost = (output.float() - wanted).square().sum(dim=-1)
    return lost / wanted.square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)


def hidden_error(
    states: Sequence[torch.Tensor],  # of each layer [B, S, H]
    wanted: Sequence[torch.Tensor],  # the same
) -> torch.Tensor:
    """:func:`relative_errors` summed over tokens and averaged over layers, fp32."""
    pairs = zip(states, wanted, strict=True)
    errors = [relative_errors(state, target.to(state.device)).sum() for state, target in pairs]
    return torch.stack(errors).mean()
