"""The modules that replace a model's experts and Linears, with their weights in sparse storage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers.integrations.moe import _default_apply_gate

from samoyeds_hf import ops
from samoyeds_hf.format import SUFFIXES, SparseWeight, decode, stored_shapes
from samoyeds_hf.pattern import SparsityPattern

__all__ = ["SamoyedsExperts", "SamoyedsLinear", "SparseModule", "build_sparse"]


class SparseModule(nn.Module):
    """Holds weights as parameters ``name``, ``name_meta``, ``name_index`` (never trained).

    Parameters and not buffers: only those are sharded over ranks and offloaded. The dense name on
    the values is a guard: without this package transformers stops with a size mismatch there.
    """

    def __init__(self, dense: nn.Module, patterns: Mapping[str, SparsityPattern]) -> None:
        super().__init__()
        self.patterns = dict(patterns)
        # Not registered as a child: an empty copy of the module replaced, for its gate function,
        # its scalars, and unpatch_model.
        vars(self)["_dense"] = _without_weights(dense)
        for name, pattern in self.patterns.items():
            weight = dense.get_parameter(name)
            shapes = stored_shapes(weight.shape, pattern)
            dtypes = (weight.dtype, torch.uint8, torch.uint8)
            for suffix, shape, dtype in zip(SUFFIXES, shapes, dtypes, strict=True):
                empty = torch.empty(shape, dtype=dtype, device="meta")
                self.register_parameter(name + suffix, nn.Parameter(empty, requires_grad=False))

    def stored(self, name: str) -> SparseWeight:
        """The three tensors of one weight."""
        return SparseWeight(*(self.get_parameter(name + suffix) for suffix in SUFFIXES))

    def store(self, name: str, weight: SparseWeight) -> None:
        """Replace the three tensors of one weight."""
        for suffix, tensor in zip(SUFFIXES, weight, strict=True):
            self.register_parameter(name + suffix, nn.Parameter(tensor, requires_grad=False))

    def dense_shape(self, name: str) -> torch.Size:
        """Shape of one weight before it became sparse."""
        return self._dense_module.get_parameter(name).shape

    def to_dense(self) -> nn.Module:
        """The module that was replaced, with the pruned weights."""
        dense = copy.copy(self._dense_module)
        dense._parameters = dict(dense._parameters)
        for name, pattern in self.patterns.items():
            weight = decode(self.stored(name), pattern)
            trainable = dense.get_parameter(name).requires_grad
            dense.register_parameter(name, nn.Parameter(weight, requires_grad=trainable))
        return dense.train(self.training)

    @property
    def _dense_module(self) -> nn.Module:
        module: nn.Module = vars(self)["_dense"]
        return module


class SamoyedsExperts(SparseModule):
    """All experts of one MoE layer; takes the place of the model's fused experts module.

    Parameters (canonical tensors of :mod:`samoyeds_hf.format`; E experts, H hidden, I inner):
    ``gate_up_proj`` ``[E, 2I*N/M, H/2]`` and ``down_proj`` ``[E, H*N/M, I/2]`` in the model's
    dtype, each with ``_meta`` and ``_index`` in uint8.
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
        gate_up, down = self.stored("gate_up_proj"), self.stored("down_proj")
        up_pattern, down_pattern = (
            str(self.patterns[name]) for name in ("gate_up_proj", "down_proj")
        )
        hidden = hidden_states.to(gate_up.values.dtype)
        out: torch.Tensor
        if self.has_fused_gate:
            out = ops.moe_mlp(
                hidden, top_k_index, top_k_weights, *gate_up, *down, up_pattern, down_pattern
            )
        else:
            both = ops.moe_up(hidden, top_k_index, *gate_up, up_pattern)
            inner = self._apply_gate(both).to(hidden.dtype)
            out = ops.moe_down(inner, top_k_index, top_k_weights, *down, down_pattern)
        return out.to(hidden_states.dtype)

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        """The model's own gate, ``[S, 2I]`` to ``[S, I]``, row by row."""
        gate: Callable[[torch.Tensor], torch.Tensor] = getattr(self._dense_module, "_apply_gate")  # noqa: B009
        return gate(both)

    def extra_repr(self) -> str:
        """Sizes and pattern, as ``print(model)`` shows them."""
        up, down = (self.patterns[name] for name in ("gate_up_proj", "down_proj"))
        pattern = describe(up) if up == down else f"gate_up {describe(up)}, down {describe(down)}"
        return (
            f"{self.num_experts} experts, H={self.hidden_dim}, I={self.intermediate_dim}, {pattern}"
        )


class SamoyedsLinear(SparseModule):
    """A Linear without bias in sparse storage: ``weight`` ``[m*N/M, k/2]``, meta and index."""

    def __init__(self, dense: nn.Linear, patterns: Mapping[str, SparsityPattern]) -> None:
        super().__init__(dense, patterns)
        self.in_features, self.out_features = dense.in_features, dense.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., k]`` to ``[..., m]`` in the dtype of x."""
        weight = self.stored("weight")
        out: torch.Tensor = ops.linear(
            x.to(weight.values.dtype), *weight, str(self.patterns["weight"])
        )
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes and pattern, as ``print(model)`` shows them."""
        pattern = describe(self.patterns["weight"])
        return f"in_features={self.in_features}, out_features={self.out_features}, {pattern}"


def build_sparse(dense: nn.Module, patterns: Mapping[str, SparsityPattern]) -> SparseModule:
    """The sparse module that takes a dense one's place, still without weights (on meta)."""
    if isinstance(dense, nn.Linear):
        return SamoyedsLinear(dense, patterns)
    return SamoyedsExperts(dense, patterns)


def describe(pattern: SparsityPattern) -> str:
    """``1:2 × V=64``, or ``2:4``."""
    return str(pattern) if pattern.v is None else f"{pattern.n}:{pattern.m} × V={pattern.v}"


def _without_weights(module: nn.Module) -> nn.Module:
    """A shallow copy whose own parameters are on meta; hooks of accelerate stay behind."""
    shell = copy.copy(module)
    shell._parameters = {
        name: None
        if parameter is None
        else nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for name, parameter in module._parameters.items()
    }
    for name in ("_hf_hook", "_old_forward", "forward"):
        vars(shell).pop(name, None)
    return shell


def _has_fused_gate(dense: nn.Module) -> bool:
    """Whether the gate is SiLU(gate) * up, which a backend computes inside the first product."""
    is_default = getattr(type(dense), "_apply_gate", None) is _default_apply_gate
    act_fn = getattr(dense, "act_fn", None)
    is_silu = act_fn is nn.functional.silu or type(act_fn).__name__ in ("SiLU", "SiLUActivation")
    return is_default and is_silu
