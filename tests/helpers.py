"""References in plain loops, written from the format's description and not from its code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from samoyeds_hf import SparsityPattern
from samoyeds_hf.format import SparseWeight

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bits as integers: tells -0.0 from 0.0 and one NaN from another."""
    return tensor.contiguous().view(BITS[tensor.dtype])


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(bits(found), bits(expected))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance relative to the norm of what was expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def random_mask(
    shape: tuple[int, ...], pattern: SparsityPattern, rng: torch.Generator
) -> torch.Tensor:
    """A mask ``[..., m, k]`` that is exactly the pattern; every such mask is possible."""
    *lead, rows, k = shape
    v = pattern.sub_row(k)
    # The order of random numbers is a permutation: "< N" marks exactly N places.
    inside = torch.rand(*lead, rows, k // 4, 4, generator=rng).argsort(dim=-1) < 2
    blocks = (*lead, rows // pattern.m, pattern.m, k // v)
    kept = torch.rand(blocks, generator=rng).argsort(dim=-2) < pattern.n
    kept = kept.view(*lead, rows, k // v).repeat_interleave(v, dim=-1)
    return inside.view(*lead, rows, k) & kept


def loop_mask(weight: torch.Tensor, pattern: SparsityPattern) -> torch.Tensor:
    """Magnitude mask of one matrix ``[m, k]``: the larger first, of equals the earlier one."""
    rows, k = weight.shape
    v = pattern.sub_row(k)
    size = [[abs(x) for x in row] for row in weight.double().tolist()]
    mask = torch.zeros(rows, k, dtype=torch.bool)
    for top in range(0, rows, pattern.m):
        for left in range(0, k, v):
            kept, energy = {}, {}
            for row in range(top, top + pattern.m):
                kept[row] = []
                for group in range(left, left + v, 4):
                    order = sorted(range(group, group + 4), key=lambda c: (-size[row][c], c))
                    kept[row] += order[:2]
                energy[row] = sum(size[row][column] ** 2 for column in kept[row])
            for row in sorted(energy, key=lambda r: (-energy[r], r))[: pattern.n]:
                mask[row, kept[row]] = True
    return mask


def loop_encode(weight: torch.Tensor, mask: torch.Tensor, pattern: SparsityPattern) -> SparseWeight:
    """Values, meta and index of a weight ``[..., m, k]``, one matrix, block and group at a time."""
    *lead, rows, k = weight.shape
    v, n, m = pattern.sub_row(k), pattern.n, pattern.m
    num_matrices = weight[..., 0, 0].numel()
    kept_rows = rows // m * n
    values = torch.zeros(num_matrices, kept_rows, k // 2, dtype=BITS[weight.dtype])
    meta = torch.zeros(num_matrices, kept_rows, k // 8, dtype=torch.uint8)
    index = torch.zeros(num_matrices, kept_rows, k // v, dtype=torch.uint8)
    dense = bits(weight).reshape(num_matrices, rows, k).tolist()
    keep = mask.reshape(num_matrices, rows, k).tolist()
    for matrix in range(num_matrices):
        for block in range(rows // m):
            for column in range(k // v):
                left, slot = column * v, 0
                for inside in range(m):
                    row = block * m + inside
                    if not any(keep[matrix][row][left : left + v]):
                        continue
                    out = block * n + slot
                    index[matrix, out, column] = inside
                    for group in range(left // 4, (left + v) // 4):
                        i0, i1 = (i for i in range(4) if keep[matrix][row][group * 4 + i])
                        values[matrix, out, group * 2] = dense[matrix][row][group * 4 + i0]
                        values[matrix, out, group * 2 + 1] = dense[matrix][row][group * 4 + i1]
                        nibble = i0 + 4 * i1
                        meta[matrix, out, group // 2] += nibble * 16 if group % 2 else nibble
                    slot += 1
                assert slot == n
    return SparseWeight(
        values.view(weight.dtype).view(*lead, kept_rows, k // 2),
        meta.view(*lead, kept_rows, k // 8),
        index.view(*lead, kept_rows, k // v),
    )


def loop_decode(stored: SparseWeight, pattern: SparsityPattern) -> torch.Tensor:
    """The dense weight ``[..., m, k]``, one stored value at a time."""
    *lead, kept_rows, half_k = stored.values.shape
    k, rows = half_k * 2, kept_rows // pattern.n * pattern.m
    v = pattern.sub_row(k)
    num_matrices = stored.values[..., 0, 0].numel()
    dense = torch.zeros(num_matrices, rows, k, dtype=BITS[stored.values.dtype])
    values = bits(stored.values).reshape(num_matrices, kept_rows, half_k).tolist()
    meta = stored.meta.reshape(num_matrices, kept_rows, k // 8).tolist()
    index = stored.index.reshape(num_matrices, kept_rows, k // v).tolist()
    for matrix in range(num_matrices):
        for r in range(kept_rows):
            for c in range(half_k):
                group = c // 2
                byte = meta[matrix][r][group // 2]
                nibble = byte // 16 if group % 2 else byte % 16
                position = nibble // 4 if c % 2 else nibble % 4
                row = r // pattern.n * pattern.m + index[matrix][r][c // (v // 2)]
                dense[matrix, row, group * 4 + position] = values[matrix][r][c]
    return dense.view(stored.values.dtype).view(*lead, rows, k)


def silu_gate(both: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * up, where gate is the first half of ``[..., 2I]``."""
    gate, up = both.chunk(2, dim=-1)
    return functional.silu(gate) * up


def loop_experts(
    hidden: torch.Tensor,  # [T, H]
    top_k_index: torch.Tensor,  # [T, K]; outside 0..E-1 = no expert
    top_k_weights: torch.Tensor,  # [T, K]
    gate_up: torch.Tensor,  # [E, 2I, H]  dense
    down: torch.Tensor,  # [E, H, I]  dense
    dtype: torch.dtype,  # that everything is computed in
    gate: Callable[[torch.Tensor], torch.Tensor] = silu_gate,
) -> torch.Tensor:
    """The expert layer ``[T, H]``, a choice and an expert at a time.

    All its tokens in one product, as dense torch would: products of one token round differently.
    """
    num_experts = gate_up.shape[0]
    gate_up, down, hidden = (tensor.to(dtype) for tensor in (gate_up, down, hidden))
    out = torch.zeros_like(hidden)
    for choice, experts in enumerate(top_k_index.T):
        for expert in range(num_experts):
            hit = (experts == expert).nonzero().squeeze(1)
            inner = gate(hidden[hit] @ gate_up[expert].T)
            weights = top_k_weights[hit, choice, None].to(dtype)
            out[hit] += (inner @ down[expert].T) * weights
    return out


def assert_as_good_as_dense(
    ours: torch.Tensor, dense: torch.Tensor, exact: torch.Tensor, what: str = ""
) -> None:
    """Our error is at most twice that of dense torch in the same dtype, plus one rounding.

    Args:
        ours: in the dtype under test.
        dense: the same computation on dense weights in that dtype.
        exact: the same computation in fp64.
        what: for the message.
    """
    assert ours.dtype == dense.dtype
    assert ours.shape == exact.shape
    if not exact.numel():
        return
    rounding = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    allowed = 2 * (dense.double() - exact).abs().max().item() + rounding
    found = (ours.double() - exact).abs().max().item()
    assert found <= allowed, f"error {found:.3g}, allowed {allowed:.3g} {what}"
