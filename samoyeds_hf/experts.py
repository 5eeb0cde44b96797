"""The modules that replace a model's experts and Linears, with their weights in sparse storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers.integrations.moe import _default_apply_gate

from samoyeds_hf import ops, packed, packed_ops
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.sparse_module import SparseModule

__all__ = ["SamoyedsExperts", "SamoyedsLinear", "SparseModule", "build_sparse", "pack_model"]


class SamoyedsExperts(SparseModule):
    """All experts of one MoE layer; takes the place of the model's fused experts module.

    Parameters (canonical tensors of :mod:`samoyeds_hf.format`; E experts, H hidden, I inner):
    ``gate_up_proj`` ``[E, 2I*N/M, H/2]`` and ``down_proj`` ``[E, H*N/M, I/2]`` in the model's
    dtype, each with ``_meta`` and ``_index`` in uint8. Packed, on a GPU with kernels, only the two
    in the model's dtype, ``[E, P]``; see :class:`SparseModule`.
    """

    def __init__(self, dense: nn.Module, patterns: Mapping[str, SparsityPattern]) -> None:
        super().__init__(dense, patterns)
        gate_up = dense.get_parameter("gate_up_proj")
        self.num_experts = int(gate_up.shape[0])  # expert parallel lowers it to the local count
        self.hidden_dim = int(gate_up.shape[2])
        self.intermediate_dim = int(gate_up.shape[1]) // 2
        self._is_expert_parallel = False  # written by transformers
        self.has_fused_gate = _has_fused_gate(dense)

    def forward(
        self,
        hidden_states: torch.Tensor,  # [T, H]
        top_k_index: torch.Tensor,  # [T, K] int64
        top_k_weights: torch.Tensor,  # [T, K]
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, ``[T, H]`` in the dtype of hidden_states."""
        hidden = hidden_states.to(self._tensor("gate_up_proj").dtype)
        if self.has_fused_gate:
            out = self._mlp(hidden, top_k_index, top_k_weights)
        else:
            inner = self._apply_gate(self._up(hidden, top_k_index)).to(hidden.dtype)
            out = self._down(inner, top_k_index, top_k_weights)
        return out.to(hidden_states.dtype)

    def _mlp(self, hidden: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        patterns = (self._texts["gate_up_proj"], self._texts["down_proj"])
        out: torch.Tensor
        if self.is_packed:
            weights = (self._tensor("gate_up_proj"), self._tensor("down_proj"))
            inner = self.intermediate_dim
            out = packed_ops.packed_mlp(hidden, *routing, *weights, inner, *patterns)
        else:
            stored = (*self.stored("gate_up_proj"), *self.stored("down_proj"))
            out = ops.moe_mlp(hidden, *routing, *stored, *patterns)
        return out

    def _up(self, hidden: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
        name, pattern = "gate_up_proj", self._texts["gate_up_proj"]
        both: torch.Tensor
        if self.is_packed:
            rows = 2 * self.intermediate_dim
            both = packed_ops.packed_up(hidden, top_k_index, self._tensor(name), rows, pattern)
        else:
            both = ops.moe_up(hidden, top_k_index, *self.stored(name), pattern)
        return both

    def _down(self, inner: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        name, pattern = "down_proj", self._texts["down_proj"]
        out: torch.Tensor
        if self.is_packed:
            rows = self.hidden_dim
            out = packed_ops.packed_down(inner, *routing, self._tensor(name), rows, pattern)
        else:
            out = ops.moe_down(inner, *routing, *self.stored(name), pattern)
        return out

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        """The model's own gate, ``[S, 2I]`` to ``[S, I]``, row by row."""
        gate: Callable[[torch.Tensor], torch.Tensor] = getattr(self._dense_module, "_apply_gate")  # noqa: B009
        return gate(both)

    def extra_repr(self) -> str:
        """Sizes and pattern, as ``print(model)`` shows them."""
        up, down = (self.patterns[name] for name in ("gate_up_proj", "down_proj"))
        pattern = describe(up) if up == down else f"gate_up {describe(up)}, down {describe(down)}"
        sizes = f"{self.num_experts} experts, H={self.hidden_dim}, I={self.intermediate_dim}"
        return f"{sizes}, {pattern}" + ", packed" * self.is_packed


class SamoyedsLinear(SparseModule):
    """A Linear without bias in sparse storage: ``weight`` ``[m*N/M, k/2]``, meta and index."""

    def __init__(self, dense: nn.Linear, patterns: Mapping[str, SparsityPattern]) -> None:
        super().__init__(dense, patterns)
        self.in_features, self.out_features = dense.in_features, dense.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., k]`` to ``[..., m]`` in the dtype of x."""
        pattern, weight = self._texts["weight"], self._tensor("weight")
        out: torch.Tensor
        if self.is_packed:
            out = packed_ops.packed_linear(x.to(weight.dtype), weight, self.out_features, pattern)
        else:
            out = ops.linear(x.to(weight.dtype), *self.stored("weight"), pattern)
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes and pattern, as ``print(model)`` shows them."""
        pattern = describe(self.patterns["weight"])
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {pattern}" + ", packed" * self.is_packed


def build_sparse(dense: nn.Module, patterns: Mapping[str, SparsityPattern]) -> SparseModule:
    """The sparse module that takes a dense one's place, still without weights (on meta)."""
    if isinstance(dense, nn.Linear):
        return SamoyedsLinear(dense, patterns)
    return SamoyedsExperts(dense, patterns)


def pack_model(model: nn.Module) -> None:
    """Pack every sparse module of a model that can be; says so where one on a GPU cannot."""
    for module in model.modules():
        if isinstance(module, SparseModule):
            reason = module.pack_()
            if reason is not None and any(tensor.is_cuda for tensor in module.parameters()):
                packed.announce_plain_torch(reason)


def describe(pattern: SparsityPattern) -> str:
    """``1:2 × V=64``, or ``2:4``."""
    return str(pattern) if pattern.v is None else f"{pattern.n}:{pattern.m} × V={pattern.v}"


def _has_fused_gate(dense: nn.Module) -> bool:
    """Whether the gate is SiLU(gate) * up, which a backend computes inside the first product."""
    is_default = getattr(type(dense), "_apply_gate", None) is _default_apply_gate
    act_fn = getattr(dense, "act_fn", None)
    is_silu = act_fn is nn.functional.silu or type(act_fn).__name__ in ("SiLU", "SiLUActivation")
    return is_default and is_silu
