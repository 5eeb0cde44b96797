"""Second moments of the inputs of expert weights: all that a method knows of the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from samoyeds_hf.errors import CalibrationError
from samoyeds_hf.pruning.products import fast_products

SHRINKAGE = 0.05  # lambda of an expert that saw at least K tokens
FEW_TOKENS = 2000  # below this an expert gets a note


@dataclass(frozen=True)
class Hessian:
    """What a method needs of the calibration data of E experts, which share K.

    The loss of putting Q in the place of W is ``tr((W-Q) H (W-Q)^T)``.
    """

    matrix: torch.Tensor  # [E, K, K]  fp32 or fp64, symmetric, positive diagonal
    dead: torch.Tensor  # [E, K]     bool: inputs that were always 0; there H_jj = 1
    tokens: torch.Tensor  # [E]        int64, tokens that each expert saw
    notes: tuple[tuple[str, ...], ...]  # a tuple an expert: few tokens, fallbacks

    def select(self, experts: slice) -> Hessian:
        """The moments of some experts; views, not copies."""
        return Hessian(
            self.matrix[experts], self.dead[experts], self.tokens[experts], self.notes[experts]
        )

    @property
    def diagonal(self) -> torch.Tensor:
        """H_jj, ``[E, K]``."""
        return self.matrix.diagonal(dim1=-2, dim2=-1)


class SecondMoments:
    """Sums of ``g^2 x x^T`` over the tokens routed to each expert, ``[E, K, K]``.

    x is a token's input to the weight and g its router weight: the square of g is what the error
    of one expert counts in the output of the layer. Gate and up share one; down has its own.
    Memory: ``E * K * K`` elements of ``dtype``.

    ``shared_inputs`` says that channel j means the same in all experts, which holds for gate and
    up. It does not for down: its channels are each expert's own, and the sum over experts has no
    meaning, so that down is shrunk towards its own diagonal instead.

    Raises:
        CalibrationError: a size below 1, or a dtype that is not fp32 or fp64.
    """

    def __init__(
        self,
        experts: int,
        k: int,
        *,
        shared_inputs: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if experts < 1 or k < 1:
            raise CalibrationError(f"Moments need experts and inputs, found E={experts}, K={k}.")
        if dtype not in (torch.float32, torch.float64):
            raise CalibrationError(f"Moments are summed in fp32 or fp64, found {dtype}.")
        self.shared_inputs = shared_inputs
        self.sums = torch.zeros(experts, k, k, dtype=dtype, device=device)  # [E, K, K]
        self.tokens = torch.zeros(experts, dtype=torch.int64)  # [E], on the CPU

    def add(
        self,
        expert: int,
        x: torch.Tensor,  # [T, K]  inputs of the tokens routed to this expert
        router_weight: torch.Tensor | None = None,  # [T]  g; None is 1
    ) -> None:
        """Count tokens of one expert; none is fine. Waits for no GPU: ``shrunk`` looks for NaN.

        Raises:
            CalibrationError: a shape that does not fit.
        """
        experts, k = self.sums.shape[:2]
        if not 0 <= expert < experts:
            raise CalibrationError(f"An expert must be in 0..{experts - 1}, found {expert}.")
        if x.ndim != 2 or x.shape[1] != k:
            raise CalibrationError(f"Inputs must be [tokens, {k}], found {list(x.shape)}.")
        rows = x.detach().to(self.sums)
        if router_weight is not None:
            if router_weight.shape != x.shape[:1]:
                raise CalibrationError(
                    f"Router weights must be [{x.shape[0]}], one a token, "
                    f"found {list(router_weight.shape)}."
                )
            rows = rows * router_weight.detach().to(rows).unsqueeze(-1)
        # NOTE: both factors are rounded alike, so that the sum stays a sum of squares
        with fast_products(rows.device):
            self.sums[expert].addmm_(rows.T, rows)
        self.tokens[expert] += x.shape[0]

    def layer(self) -> torch.Tensor:
        """The mean over all tokens of all experts, ``[K, K]``; zeros where there were none."""
        return self.sums.sum(dim=0) / max(1, int(self.tokens.sum()))

    def shrunk(
        self,
        experts: slice | int = slice(None),
        shrinkage: float = SHRINKAGE,
        *,
        layer: torch.Tensor | None = None,  # [K, K]
        consume: bool = False,
    ) -> Hessian:
        """``sum g^2 x x^T / n + lambda * H_layer`` of some experts, ready for a method.

        lambda = ``shrinkage * max(1, K / n)``: where tokens are fewer than inputs the layer takes
        over. An expert without tokens gets the layer's H, and the identity (which makes each
        method that of magnitude) where the layer has none or ``shared_inputs`` is false.

        Args:
            experts: whose.
            shrinkage: lambda of an expert that saw at least K tokens.
            layer: H_layer; by default the mean over the experts counted here. Give it where they
                are only some of the layer's.
            consume: make the result in the memory of the sums, which are then gone.

        Raises:
            CalibrationError: an input was NaN or infinite, or a sum overflowed.
        """
        chosen = slice(experts, experts + 1) if isinstance(experts, int) else experts
        tokens = self.tokens[chosen]
        k = self.sums.shape[-1]
        # an input that is not finite shows in its own square, which also is the first to overflow
        squares = self.sums[chosen].diagonal(dim1=-2, dim2=-1)  # [E, K]
        finite = squares.isfinite().all(dim=1).tolist()
        if not all(finite):
            raise CalibrationError(
                f"Inputs must be finite and their squares sum up in {self.sums.dtype}, found NaN "
                f"or infinity in expert {finite.index(False) + (chosen.start or 0)}; calibrate in "
                "bf16 or fp32, or look for a damaged shard."
            )
        if not self.shared_inputs:
            layer = None
        elif layer is None:
            layer = self.layer()
        known = layer is not None and bool(layer.any())
        counts = tokens.clamp(min=1).to(self.sums).view(-1, 1, 1)
        matrix = self.sums[chosen].div_(counts) if consume else self.sums[chosen] / counts
        for own, count in zip(matrix, tokens.tolist(), strict=True):  # own is a view: [K, K]
            weight = shrinkage * max(1.0, k / max(1, count))
            if count == 0:
                own.copy_(layer) if layer is not None and known else own.fill_(0).fill_diagonal_(1)
            elif layer is None:
                own.diagonal().mul_(1 + weight)
            else:
                own.add_(layer, alpha=weight)
        notes = tuple(_notes(count, known) for count in tokens.tolist())
        return Hessian(matrix, _revive(matrix), tokens.clone(), notes)


def _notes(tokens: int, layer_known: bool) -> tuple[str, ...]:
    if tokens == 0:
        fallback = "uses the moments of its layer" if layer_known else "is pruned by magnitude"
        return (f"no calibration token reached this expert: it {fallback}",)
    if tokens < FEW_TOKENS:
        return (f"only {tokens} calibration tokens, fewer than {FEW_TOKENS}",)
    return ()


def _revive(matrix: torch.Tensor) -> torch.Tensor:
    """Give dead inputs the row and column of the identity, in place; returns which, [E, K]."""
    dead = matrix.diagonal(dim1=-2, dim2=-1) <= 0
    for own, gone in zip(matrix, dead, strict=True):  # [K, K], [K]: temporaries of one expert
        own.masked_fill_(gone.unsqueeze(-1) | gone.unsqueeze(-2), 0)
        own.diagonal().masked_fill_(gone, 1)
    return dead
