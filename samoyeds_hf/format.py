"""The Samoyeds format, version 1: encode, decode, validate. Pure torch, any device.

| symbol | meaning |
|---|---|
| W | dense weight `[m, k]`: m = out features, k = in features; experts add a leading E |
| Sub-Row | V consecutive k elements of one output row |
| block | M consecutive output rows x V consecutive k elements |
| (N, M, V) | in each block N of the M Sub-Rows are kept; a kept one keeps 2 of every 4 elements |
| density | N/M x 1/2. (1,2,V), (4,8,V), (8,16,V) = 25 %. N = M is plain 2:4, 50 % |

One block at (1,2,8); row 0 of the block is dropped, row 1 is kept::

              |<------ V = 8 ------>|
      row 0   .  .  .  .  .  .  .  .      values  b  c  e  h      kept elements, left to right
      row 1   .  b  c  .  e  .  .  h      meta    0b1100_1001     group 0: 1 | 2<<2 (low nibble)
                                                                  group 1: 0 | 3<<2 (high nibble)
                                          index   1               row 1 of the block is kept

Canonical tensors (on disk, hardware neutral):

| tensor | shape | dtype | meaning |
|---|---|---|---|
| values | `[..., m*N/M, k/2]` | of W | kept row r = block r//N, slot r%N; column c = element c%2 of 2:4 group c//2 |
| meta | `[..., m*N/M, k/8]` | uint8 | a nibble a group of 4: `i0 | i1 << 2`, `i0 < i1`; low nibble = even group |
| index | `[..., m*N/M, k/V]` | uint8 | row (0..M-1) of its block that the kept Sub-Row is; ascending over slots |

Always two positions a group, also where a value is 0. Dense row of kept row r at values column c:
`(r//N)*M + index[r, c//(V/2)]`. Plain "2:4" has M = N = 1 and V = k: index is one zero a row.
Bits per original weight at (1,2,128), bf16: 4 values + 0.5 meta + 0.03 index = 4.53.

`decode(encode(W, mask)) == where(mask, W, +0)` bit for bit: -0.0, denormals and non-finite values
included. Refused: m not a multiple of M, k not a multiple of V or of 8, V not a multiple of 4,
N > M, an index >= M or not ascending, a nibble that is not one of 4, 8, 9, 12, 13, 14 (a kernel
would read the wrong place), a wrong shape or dtype.
"""  # noqa: E501

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch

from samoyeds_hf.chunks import rows_per_chunk
from samoyeds_hf.errors import FormatError
from samoyeds_hf.pattern import GROUP, KEPT_PER_GROUP, MAX_M, SparsityPattern

__all__ = [
    "FORMAT_VERSION",
    "GROUP",
    "KEPT_PER_GROUP",
    "MAX_M",
    "VALID_NIBBLES",
    "VALUE_DTYPES",
    "SparseWeight",
    "decode",
    "encode",
    "stored_shapes",
    "validate",
]

FORMAT_VERSION = 1
VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SUFFIXES = ("", "_meta", "_index")  # of a tensor's name, in the order of SparseWeight
VALID_NIBBLES = (4, 8, 9, 12, 13, 14)  # i0 | i1 << 2 for i0 < i1

_BITS_DTYPE = {2: torch.int16, 4: torch.int32}  # copies bits where a float copy may quiet a NaN
_NOT_A_NIBBLE = 0xFF


class SparseWeight(NamedTuple):
    """The three canonical tensors of one weight; shapes in the module's table."""

    values: torch.Tensor
    meta: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls

    @property
    def num_bytes(self) -> int:
        """Bytes of the three tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self)


def stored_shapes(
    shape: torch.Size | tuple[int, ...], pattern: SparsityPattern
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of values, meta and index for a dense weight of shape ``[..., m, k]``."""
    *lead, rows, k = shape
    kept = pattern.kept_rows(rows)
    return (*lead, kept, k // 2), (*lead, kept, k // 8), (*lead, kept, k // pattern.sub_row(k))


def encode(
    weight: torch.Tensor,  # [..., m, k]  bf16, fp16 or fp32
    mask: torch.Tensor,  # [..., m, k]  bool, exactly the pattern
    pattern: SparsityPattern,
    name: str = "weight",
) -> SparseWeight:
    """Pack the elements that ``mask`` keeps; works in chunks of rows, so temporaries stay small.

    Raises:
        PatternError: the pattern does not divide the shape.
        FormatError: wrong dtypes or shapes, or a mask that does not keep exactly N Sub-Rows of
            each block and 2 of each 4 inside them.
    """
    if weight.dtype not in VALUE_DTYPES:
        raise FormatError(
            f"{name} must be one of {_dtype_names()}, found {weight.dtype}; convert it first."
        )
    if weight.dim() < 2:
        raise FormatError(f"{name} must have shape [..., m, k], found {list(weight.shape)}.")
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise FormatError(
            f"The mask of {name} must be bool of shape {list(weight.shape)}, found {mask.dtype} of "
            f"{list(mask.shape)}."
        )
    rows, k = weight.shape[-2:]
    pattern.check_fits(rows, k, name)
    shapes = stored_shapes(weight.shape, pattern)
    dtypes = (weight.dtype, torch.uint8, torch.uint8)
    out = SparseWeight(
        *(
            torch.empty(shape, dtype=dtype, device=weight.device)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )
    )
    # m is a multiple of M, so blocks never straddle two matrices and leading dimensions are rows.
    flat_weight, flat_mask = weight.detach().reshape(-1, k), mask.reshape(-1, k)
    flat_out = [tensor.view(-1, tensor.shape[-1]) for tensor in out]
    step = rows_per_chunk(pattern.m, k, weight.device)
    for start in range(0, flat_weight.shape[0], step):
        stop = min(start + step, flat_weight.shape[0])
        encoded = _encode_rows(flat_weight[start:stop], flat_mask[start:stop], pattern)
        if encoded is None:
            _raise_bad_mask(mask, pattern, name)
        kept_start, kept_stop = pattern.kept_rows(start), pattern.kept_rows(stop)
        for target, tensor in zip(flat_out, encoded, strict=True):
            target[kept_start:kept_stop] = tensor
    return out


def decode(stored: SparseWeight, pattern: SparsityPattern) -> torch.Tensor:
    """The dense weight ``[..., m, k]`` with zeros where nothing was kept; exact.

    The tensors are trusted: call :func:`validate` first on data that comes from outside.
    """
    *lead, kept, half_k = stored.values.shape
    k, rows = half_k * 2, kept // pattern.n * pattern.m
    bits = _BITS_DTYPE[stored.values.element_size()]
    dense = torch.zeros(*lead, rows, k, dtype=bits, device=stored.values.device)
    flat_dense = dense.view(-1, k)
    flat = SparseWeight(*(tensor.reshape(-1, tensor.shape[-1]) for tensor in stored))
    step = rows_per_chunk(pattern.m, k, dense.device)
    for start in range(0, flat_dense.shape[0], step):
        stop = min(start + step, flat_dense.shape[0])
        kept_rows = slice(pattern.kept_rows(start), pattern.kept_rows(stop))
        chunk = SparseWeight(*(tensor[kept_rows] for tensor in flat))
        _decode_rows(chunk, pattern, flat_dense[start:stop])
    return dense.view(stored.values.dtype)


def validate(
    stored: SparseWeight,
    pattern: SparsityPattern,
    shape: torch.Size | tuple[int, ...] | None = None,
    name: str = "weight",
) -> None:
    """Refuse tensors that a kernel could not read safely.

    Args:
        stored: values, meta and index.
        pattern: the pattern they were encoded with.
        shape: dense shape ``[..., m, k]`` that they must stand for; None takes it from ``values``.
        name: of the values in messages; ``_meta`` and ``_index`` are added.

    Raises:
        PatternError: the pattern does not divide the shape.
        FormatError: names the tensor, the place and the value found.
    """
    if shape is None:
        if stored.values.dim() < 2:
            raise FormatError(
                f"{name} must have shape [..., m*N/M, k/2], found {list(stored.values.shape)}; "
                "the file is damaged."
            )
        *lead, kept, half_k = stored.values.shape
        if kept % pattern.n:
            raise FormatError(
                f"{name}: rows must be a multiple of N={pattern.n}, found {kept}; the file is "
                "damaged or has another pattern."
            )
        shape = (*lead, kept // pattern.n * pattern.m, half_k * 2)
    pattern.check_fits(shape[-2], shape[-1], name)
    for tensor, suffix, expected in zip(
        stored, SUFFIXES, stored_shapes(shape, pattern), strict=True
    ):
        allowed = (torch.uint8,) if suffix else VALUE_DTYPES
        if tensor.dtype not in allowed:
            names = [str(dtype) for dtype in allowed]
            raise FormatError(f"{name}{suffix} must have dtype {names}, found {tensor.dtype}.")
        if tuple(tensor.shape) != expected:
            raise FormatError(
                f"{name}{suffix} must have shape {list(expected)} for pattern {pattern}, found "
                f"{list(tensor.shape)}; the file is damaged or has another pattern."
            )
    _check_index(stored.index, pattern, f"{name}_index")
    _check_meta(stored.meta, f"{name}_meta")


def _encode_rows(
    weight: torch.Tensor,  # [rows, k]
    mask: torch.Tensor,  # [rows, k]
    pattern: SparsityPattern,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Values, meta and index of some whole blocks, or None if the mask is not the pattern."""
    rows, k = weight.shape
    v = pattern.sub_row(k)
    blocks = rows // pattern.m
    # NOTE: a fresh tensor, because words need aligned bytes, which a slice of bools may not have.
    mask = mask.clone(memory_format=torch.contiguous_format)
    # Four bools read as one word w = b0 | b1<<8 | b2<<16 | b3<<24; the product moves bit 8i to
    # bit 24+i, so the top byte holds the four bits of the group.
    words = mask.view(torch.int32)  # [rows, k/4]
    codes = ((words * 0x01020408) >> 24) & 0xF
    nibbles = _nibble_of_code(mask.device)[codes]  # [rows, k/4] uint8
    sub_rows = nibbles.view(blocks, pattern.m, k // v, v // GROUP)
    kept = sub_rows[..., 0] != _NOT_A_NIBBLE  # [blocks, M, k/V]
    if not bool((kept.sum(dim=1) == pattern.n).all()):
        return None
    # nonzero() lists the kept rows of a block in ascending order: these are the slots.
    slots = kept.transpose(1, 2).nonzero()[:, 2].view(blocks, k // v, pattern.n)
    index = slots.transpose(1, 2).reshape(-1, k // v).to(torch.uint8)
    picked = _dense_sub_rows(index, pattern)
    kept_nibbles = nibbles.view(-1, v // GROUP).index_select(0, picked).view(-1, k // GROUP)
    # All kept Sub-Rows are 2:4 and nothing is set outside them.
    num_kept = blocks * pattern.n * k // 2
    if bool((kept_nibbles == _NOT_A_NIBBLE).any()) or int(mask.sum()) != num_kept:
        return None
    bits = _BITS_DTYPE[weight.element_size()]
    sub_row_values = weight.contiguous().view(bits).view(-1, v).index_select(0, picked)
    sub_row_mask = mask.view(-1, v).index_select(0, picked)
    values = _kept_of_groups(sub_row_values, sub_row_mask).view(-1, k // 2).view(weight.dtype)
    meta = kept_nibbles[:, 0::2] | kept_nibbles[:, 1::2] << 4
    return values, meta, index


def _decode_rows(
    stored: SparseWeight,  # of some whole blocks, two dimensions each
    pattern: SparsityPattern,
    dense: torch.Tensor,  # [rows, k]  bits, zero; written
) -> None:
    v = pattern.sub_row(dense.shape[1])
    values = stored.values.contiguous().view(dense.dtype).view(-1, KEPT_PER_GROUP)
    # A group's two positions, from its nibble.
    nibbles = torch.stack((stored.meta & 0xF, stored.meta >> 4), dim=-1).view(-1, 1)
    positions = torch.cat((nibbles & 3, nibbles >> 2), dim=1).to(torch.int64)
    groups = torch.zeros(values.shape[0], GROUP, dtype=dense.dtype, device=dense.device)
    groups.scatter_(1, positions, values)
    # Sub-Row (block, slot, j) of the kept ones is Sub-Row (block, index, j) of the dense weight.
    dense.view(-1, v)[_dense_sub_rows(stored.index, pattern)] = groups.view(-1, v)


def _kept_of_groups(
    bits: torch.Tensor,  # [Sub-Rows, V]  integer
    mask: torch.Tensor,  # [Sub-Rows, V]  bool, 2 of every 4
) -> torch.Tensor:
    """The two kept elements of each group, ``[groups, 2]``, by bit operations.

    NOTE: masked_select() and where() branch on a mask that nothing predicts: ten times slower.
    """
    a, b, c, d = bits.view(-1, GROUP).unbind(dim=1)
    # -1 where kept: all ones.
    keep_a, keep_b, keep_c, keep_d = mask.view(-1, GROUP).t().to(bits.dtype).neg_().unbind(dim=0)
    first = _select(keep_a, a, _select(keep_b, b, c))
    second = _select(keep_d, d, _select(keep_c, c, b))
    return torch.stack((first, second), dim=-1)


def _select(mask: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y ^ ((x ^ y) & mask)


def _dense_sub_rows(index: torch.Tensor, pattern: SparsityPattern) -> torch.Tensor:
    """Number of each kept Sub-Row among all Sub-Rows of the dense rows, in stored order. int64."""
    per_row = index.shape[-1]
    flat = index.reshape(-1, per_row).to(torch.int64)  # [kept rows, k/V]
    block = torch.arange(flat.shape[0], device=index.device) // pattern.n
    dense_row = (block * pattern.m).unsqueeze(1) + flat
    return (dense_row * per_row + torch.arange(per_row, device=index.device)).reshape(-1)


def _nibble_of_code(device: torch.device) -> torch.Tensor:
    """Table: four mask bits -> nibble, for the six codes with two bits set. [16] uint8."""
    table = torch.full((16,), _NOT_A_NIBBLE, dtype=torch.uint8)
    for nibble in VALID_NIBBLES:
        table[1 << (nibble & 3) | 1 << (nibble >> 2)] = nibble
    return table.to(device)


def _raise_bad_mask(mask: torch.Tensor, pattern: SparsityPattern, name: str) -> NoReturn:
    rows, k = mask.shape[-2:]
    v = pattern.sub_row(k)
    sub_rows = mask.reshape(-1, rows // pattern.m, pattern.m, k // v, v)
    kept = sub_rows.any(dim=-1).sum(dim=2)  # [matrices, m/M, k/V]
    for matrix, block, column in (kept != pattern.n).nonzero()[:1].tolist():
        raise FormatError(
            f"The mask of {name} must keep {pattern.n} of {pattern.m} Sub-Rows in each block, "
            f"found {int(kept[matrix, block, column])} in matrix {matrix}, rows from "
            f"{block * pattern.m}, columns from {column * v}; project the mask to {pattern} first."
        )
    count = mask.reshape(-1, rows, k // GROUP, GROUP).sum(dim=-1)
    bad = (count != KEPT_PER_GROUP) & (count != 0)
    # Every Sub-Row count is right, so what is left is a group of a kept Sub-Row.
    partial = (count == 0) & sub_rows.any(dim=-1).view(-1, rows, k // v).repeat_interleave(
        v // GROUP, dim=-1
    )
    matrix, row, group = (bad | partial).nonzero()[0].tolist()
    raise FormatError(
        f"The mask of {name} must keep 2 of every 4 elements of a kept Sub-Row, found "
        f"{int(count[matrix, row, group])} in matrix {matrix}, row {row}, columns from "
        f"{group * GROUP}; project the mask to {pattern} first."
    )


def _check_index(index: torch.Tensor, pattern: SparsityPattern, name: str) -> None:
    bad = (index >= pattern.m).nonzero()
    if len(bad):
        place = bad[0].tolist()
        raise FormatError(
            f"{name}{place} must be below M={pattern.m}, found {int(index[tuple(place)])}; "
            "the file is damaged, convert the model again."
        )
    *lead, kept, per_row = index.shape
    slots = index.view(*lead, kept // pattern.n, pattern.n, per_row)
    bad = (slots[..., 1:, :] <= slots[..., :-1, :]).nonzero()
    if len(bad):
        *outer, block, slot, column = bad[0].tolist()
        place = [*outer, block * pattern.n + slot + 1, column]
        raise FormatError(
            f"{name}{place} must be above the slot before it, found {int(index[tuple(place)])} "
            f"after {int(slots[(*outer, block, slot, column)])}; the file is damaged, convert the "
            "model again."
        )


def _check_meta(meta: torch.Tensor, name: str) -> None:
    table = torch.zeros(256, dtype=torch.bool)
    for low in VALID_NIBBLES:
        for high in VALID_NIBBLES:
            table[low | high << 4] = True
    # NOTE: a table lookup instead of isin(): isin() sorts, 20 times slower on a large layer.
    bad = (~table.to(meta.device)[meta.to(torch.int32)]).nonzero()
    if len(bad):
        place = bad[0].tolist()
        raise FormatError(
            f"{name}{place} must hold two nibbles of {list(VALID_NIBBLES)}, found "
            f"{int(meta[tuple(place)]):#04x}; the file is damaged, convert the model again."
        )


def _dtype_names() -> list[str]:
    return [str(dtype) for dtype in VALUE_DTYPES]
