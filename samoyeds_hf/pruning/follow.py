"""Pruning towards what the dense model does, not only towards the dense weights.

A pruned layer sees inputs x that earlier pruned layers have changed; the dense model's are z. Least
squares against ``W z`` instead of ``W x`` lets each layer make up for errors of those before it
(asymmetric calibration: Li et al. 2025, GPTAQ, arXiv 2504.02692, section 3). It needs no other
method: ``|W z - Q x|^2`` is, up to a constant, the loss of Q against other dense weights. Down also
makes up for what is wrong beside the experts, see :mod:`samoyeds_hf.pruning.residual`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from samoyeds_hf.pruning.inputs import Routed, inner_of
from samoyeds_hf.pruning.residual import MissingMoments, gain_of, missing_of

if TYPE_CHECKING:
    from samoyeds_hf.pruning.moments import Hessian

DAMPING = 0.01  # of each H_jj


class CrossMoments:
    """Sums of ``g^2 (z - x) x^T`` over the tokens routed to each expert, ``[E, K, K]``.

    x is what a token brings to the weight in the pruned model, z what it brings in the dense one,
    and g its router weight in the pruned one.
    """

    def __init__(self, experts: int, k: int, device: torch.device) -> None:
        self.sums = torch.zeros(experts, k, k, device=device)  # fp32
        self.tokens = [0] * experts

    def add(
        self,
        expert: int,
        x: torch.Tensor,  # [t, K]
        z: torch.Tensor,  # [t, K]
        router_weight: torch.Tensor,  # [t]
    ) -> None:
        """Count tokens of one expert."""
        g = router_weight.float().unsqueeze(-1)
        rows = x.float() * g
        self.sums[expert].addmm_((z.float() * g - rows).T, rows)
        self.tokens[expert] += x.shape[0]

    def mean(self, expert: int) -> torch.Tensor:
        """The mean over an expert's tokens, ``[K, K]``; zeros where there were none."""
        return self.sums[expert] / max(1, self.tokens[expert])


class DenseInputs:
    """What the calibration tokens bring to the experts of a layer in the dense model.

    Args:
        layer: with dense weights.
        run: runs all batches, as they are in the dense model, through the layer.
        outputs: what the layer made of them, batch by batch, once they ran.
        run_one: the layer's output for any one batch.
    """

    def __init__(
        self,
        layer: nn.Module,
        run: Callable[[], None],
        outputs: Sequence[torch.Tensor],
        run_one: Callable[[], torch.Tensor],
    ) -> None:
        self._layer, self._run, self._outputs, self._run_one = layer, run, outputs, run_one
        self._routed: dict[str, Routed] = {}
        self._gate_up: dict[str, torch.Tensor] = {}  # [E, 2I, H]
        self._missing: dict[str, list[torch.Tensor]] = {}  # [T, H] each

    def catch(self, modules: Mapping[str, nn.Module]) -> None:
        """Look at dense experts, by path, before anything of the layer is pruned."""
        self._routed = {path: Routed() for path in modules}
        handles = [
            module.register_forward_pre_hook(self._routed[path].catch, with_kwargs=True)
            for path, module in modules.items()
        ]
        try:
            self._run()
        finally:
            for handle in handles:
                handle.remove()
        for path, module in modules.items():
            self._gate_up[path] = module.get_parameter("gate_up_proj").detach().clone()

    @contextmanager
    def comparing(self, modules: Mapping[str, tuple[nn.Module, Routed]]) -> Iterator[None]:
        """While the pruned model's batches run: look at what the layer's output lacks.

        Nothing where the output is not a sum of what one experts module adds and the rest.

        Args:
            modules: the experts, still dense, and what catches their inputs meanwhile, by path.
        """
        gain = None
        for module, _ in modules.values() if len(modules) == 1 else ():
            gain = gain_of(module, self._run_one)
        if gain is None:
            yield
            return
        ((path, (module, routed)),) = modules.items()
        dense = self._routed[path]
        with missing_of(self._layer, module, gain, routed, dense, self._outputs) as missing:
            yield
        self._missing[path] = missing

    def permute(self, path: str, experts: range, gate_up: torch.Tensor) -> None:
        """Take the dense weights ``[len(experts), 2I, H]`` in another order of their neurons."""
        self._gate_up[path][experts.start : experts.stop] = gate_up

    def gate_up_cross(
        self, path: str, routed: Routed, experts: range, weight: torch.Tensor
    ) -> CrossMoments:
        """Cross moments ``[len(experts), H, H]`` of gate and up, whose weight is ``[E, 2I, H]``."""
        cross = CrossMoments(len(experts), weight.shape[-1], weight.device)
        streams = [self._routed[path].hidden]
        for expert, (x, z), g, _ in routed.beside(streams, experts, weight.device):
            cross.add(expert - experts.start, x, z, g)
        return cross

    def down_cross(
        self, path: str, module: nn.Module, routed: Routed, experts: range
    ) -> tuple[CrossMoments, MissingMoments | None]:
        """Cross moments ``[len(experts), I, I]`` of down; gate and up are pruned by now.

        And those with what is missing beside them, ``[len(experts), H, I]``, where that is known.
        """
        pruned = module.get_parameter("gate_up_proj")  # [E, 2I, H]
        dense, missing = self._gate_up[path], self._missing.get(path)
        _, double, width = pruned.shape
        cross, beside = CrossMoments(len(experts), double // 2, pruned.device), None
        streams = [self._routed[path].hidden]
        if missing is not None:
            beside = MissingMoments(len(experts), width, double // 2, pruned.device)
            streams.append(missing)
        for expert, (x, z, *rest), g, share in routed.beside(streams, experts, pruned.device):
            row = expert - experts.start
            here, there = inner_of(module, x, pruned[expert]), inner_of(module, z, dense[expert])
            cross.add(row, here, there, g)
            if beside is not None:
                beside.add(row, here, rest[0], g, share)
        return cross, beside


def follow_dense(
    weight: torch.Tensor,  # [E, O, K]
    cross: CrossMoments,
    hessian: Hessian,
    missing: MissingMoments | None = None,
) -> tuple[torch.Tensor, list[tuple[str, ...]]]:
    """The weights to prune in the place of W: ``W + W C H^-1``, ``[E, O, K]`` fp32.

    C is the mean of the cross moments; what is missing beside is added, see
    :meth:`~samoyeds_hf.pruning.residual.MissingMoments.fit`. They are the best weights for these
    inputs before any is dropped. Also notes, a tuple an expert: one whose H has no factor keeps
    its weights.
    """
    target = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    notes: list[tuple[str, ...]] = []
    alive = (~hessian.dead).sum(dim=1).tolist()  # inputs of each expert
    for expert, dense in enumerate(weight):
        matrix = hessian.matrix[expert].to(torch.float64, copy=True)
        matrix.diagonal().mul_(1 + DAMPING)
        factor, info = torch.linalg.cholesky_ex(matrix)
        moved = dense.float() @ cross.mean(expert)  # [O, K]
        solved = torch.cholesky_solve(moved.T, factor.float()).T
        if missing is not None:
            solved += missing.fit(expert, factor.float(), alive[expert])
        if int(info) or not bool(solved.isfinite().all()):
            target[expert] = dense
            notes.append(("its inputs in the dense model could not be followed",))
        else:
            target[expert] = dense + solved
            notes.append(())
    return target, notes
