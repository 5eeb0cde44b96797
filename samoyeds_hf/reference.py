"""Expert layers in plain torch: the path without kernels, right on any device, never fast.

One dense expert at a time is decoded and multiplied, so the layer never needs more memory than
its sparse weights, one dense expert and the activations.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from samoyeds_hf.format import SparseWeight, decode
from samoyeds_hf.pattern import SparsityPattern


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The dense product, in the dtype of its arguments also inside ``torch.autocast``.

    The operators have one dtype whatever surrounds them: modules cast to it and back.
    """
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x, weight)


def grouped_linear(
    x: torch.Tensor,  # [S // rows_per_token, k]
    expert_of_row: torch.Tensor,  # [S] int64; outside 0..E-1 = belongs to no expert here
    weight: SparseWeight,  # of dense shape [E, m, k]
    pattern: SparsityPattern,
    rows_per_token: int,
) -> torch.Tensor:
    """Row s of the result ``[S, m]`` is row ``s // rows_per_token`` of x times its expert's weight.

    Rows that belong to no expert are zero. ``rows_per_token`` is K where x holds tokens, and 1
    where it already holds a row for each (token, choice).
    """
    num_experts, kept, _ = weight.values.shape
    num_rows = expert_of_row.shape[0]
    out = x.new_zeros(num_rows, kept // pattern.n * pattern.m)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        # NOTE: a graph cannot ask which experts are hit, so every expert sees every row: right,
        # and as slow as it sounds.
        rows = x.repeat_interleave(rows_per_token, dim=0)
        for expert in range(num_experts):
            y = linear(rows, _dense_expert(weight, expert, pattern))
            out = torch.where((expert_of_row == expert).unsqueeze(1), y, out)
        return out
    for expert in expert_of_row.unique().tolist():
        if 0 <= expert < num_experts:
            hit = (expert_of_row == expert).nonzero().squeeze(1)
            dense = _dense_expert(weight, expert, pattern)
            out[hit] = linear(x[hit // rows_per_token], dense)
    return out


def combine(
    rows: torch.Tensor,  # [T*K, H]
    top_k_index: torch.Tensor,  # [T, K]
    top_k_weights: torch.Tensor,  # [T, K]
    num_experts: int,
) -> torch.Tensor:
    """Sum over K, in order and in fp32, of each token's rows times their routing weights."""
    num_tokens, top_k = top_k_weights.shape
    is_mine = (top_k_index >= 0) & (top_k_index < num_experts)
    weights = torch.where(is_mine, top_k_weights.float(), 0)
    by_choice = rows.view(num_tokens, top_k, rows.shape[-1])
    total = torch.zeros(num_tokens, rows.shape[-1], dtype=torch.float32, device=rows.device)
    for choice in range(top_k):
        total += by_choice[:, choice].float() * weights[:, choice, None]
    return total.to(rows.dtype)


def moe_mlp(
    hidden: torch.Tensor,  # [T, H]
    top_k_index: torch.Tensor,  # [T, K]
    top_k_weights: torch.Tensor,  # [T, K]
    gate_up: SparseWeight,  # of [E, 2I, H]
    down: SparseWeight,  # of [E, H, I]
    gate_up_pattern: SparsityPattern,
    down_pattern: SparsityPattern,
) -> torch.Tensor:
    """The whole expert layer ``[T, H]`` with the gate SiLU(gate) * up."""
    expert_of_row = top_k_index.reshape(-1)
    both = grouped_linear(hidden, expert_of_row, gate_up, gate_up_pattern, top_k_index.shape[1])
    gate, up = both.chunk(2, dim=-1)
    inner = functional.silu(gate) * up
    rows = grouped_linear(inner, expert_of_row, down, down_pattern, 1)
    return combine(rows, top_k_index, top_k_weights, down.values.shape[0])


def _dense_expert(weight: SparseWeight, expert: int, pattern: SparsityPattern) -> torch.Tensor:
    return decode(SparseWeight(*(tensor[expert] for tensor in weight)), pattern)
