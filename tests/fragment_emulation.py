"""The kernels' fragment order in plain loops, on the CPU, written from its description.

The drawing is in kernels/include/samoyeds/fragment.cuh. Nothing here is shared with it, so that a
test of one against the other means something.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import numpy as np
import torch

from samoyeds_hf import SparsityPattern
from samoyeds_hf.format import SparseWeight, stored_shapes

NAME = "m16k128.v4"
TILE_ROWS = 16  # kept rows of a tile
BUNDLE_TILES = 8  # whose blocks lie together
BLOCK_COLS = 128  # dense columns of a block
DENSE24, SWITCHED, STEPPED, GENERAL = "dense24", "switched", "stepped", "general"
SLOTS = 3  # of a block of (3, 4, V), each in a tile of its own
EMPTY_NIBBLE = 4  # positions 0 and 1: of rows and columns that do not exist


@dataclass(frozen=True)
class Layout:
    """Where everything of one expert's weight ``[rows, cols]`` lies."""

    rows: int
    cols: int
    pattern: SparsityPattern
    is_gate_up: bool

    @property
    def kind(self) -> str:
        n, m, v = self.pattern.n, self.pattern.m, self.pattern.sub_row(self.cols)
        if n == m:
            return DENSE24
        kinds = {(1, 2): SWITCHED, (3, 4): STEPPED}
        return kinds.get((n, m), GENERAL) if v % 32 == 0 else GENERAL

    @property
    def has_switches(self) -> bool:
        """A bit a step says which of two dense rows a kept row belongs to."""
        return self.kind in (SWITCHED, STEPPED)

    @property
    def is_interleaved(self) -> bool:
        """Gate rows and up rows share tiles; no block of M rows may hold both."""
        if not self.is_gate_up or self.kind == GENERAL or self.rows % 2:
            return False
        return self.rows // 2 % self.pattern.m == 0

    @property
    def kept(self) -> int:
        return self.rows // self.pattern.m * self.pattern.n

    @property
    def rows_per_tile(self) -> int:
        whole_blocks = TILE_ROWS // self.pattern.n * self.pattern.n
        return whole_blocks if self.kind == GENERAL else TILE_ROWS

    @property
    def tiles(self) -> int:
        if self.kind == STEPPED:
            blocks_of_rows = self.rows // self.pattern.m
            halves = self.is_interleaved
            return SLOTS * (ceil(blocks_of_rows / 2 / 8) if halves else ceil(blocks_of_rows / 16))
        if self.is_interleaved:
            return ceil(self.kept / 2 / 8)
        return ceil(self.kept / self.rows_per_tile)

    @property
    def blocks(self) -> int:
        return ceil(self.cols / BLOCK_COLS)

    @property
    def block_bytes(self) -> int:
        return 2304 + (16 if self.has_switches else 0)

    def block_start(self, tile: int, block: int) -> int:
        """Byte of a block of a tile: bundles, in them blocks, in those tiles."""
        first = tile - tile % BUNDLE_TILES
        bundle = range(first, min(first + BUNDLE_TILES, self.tiles))
        before = first * self.blocks + block * len(bundle) + bundle.index(tile)
        return before * self.block_bytes

    @property
    def sub_rows(self) -> int:
        return self.cols // self.pattern.sub_row(self.cols)

    @property
    def index_offset(self) -> int:
        return self.tiles * self.blocks * self.block_bytes

    @property
    def expert_bytes(self) -> int:
        has_index = self.kind == GENERAL
        return self.index_offset + (self.tiles * self.sub_rows * TILE_ROWS if has_index else 0)

    def kept_row(self, tile: int, row: int) -> int | None:
        """Kept row that row 0..15 of a tile holds."""
        if self.kind == STEPPED:
            return self._slot_of_block(tile // SLOTS, tile % SLOTS, row)
        if self.is_interleaved:
            half = self.kept // 2
            low = 8 * tile + row % 8
            if low >= half:
                return None
            return low + half if row >= 8 else low
        kept = tile * self.rows_per_tile + row
        return kept if row < self.rows_per_tile and kept < self.kept else None

    def _slot_of_block(self, three: int, slot: int, row: int) -> int | None:
        """Rows of three tiles are blocks: 16 in a row or, with gate and up, 8 and 8 of each."""
        blocks_of_rows = self.rows // self.pattern.m
        if self.is_interleaved:
            half = blocks_of_rows // 2
            block = 8 * three + row % 8
            if block >= half:
                return None
            block += half if row >= 8 else 0
        else:
            block = 16 * three + row
            if block >= blocks_of_rows:
                return None
        return SLOTS * block + slot


def value_byte(row: int, column: int) -> int:
    """Of a value in its block; column 0..63 counts compressed columns, eight to a matrix."""
    start = 0 if row < 8 else 1024 + 128
    return start + column // 8 * 128 + row % 8 * 16 + column % 8 * 2


def nibble_place(row: int, group: int) -> tuple[int, int]:
    """Byte of the 32-bit word in its block, and first bit in the word; group 0..31."""
    step, inside = group // 8, group % 8
    word = (row % 8) * 4 + (step % 2) * 2 + (1 if inside >= 4 else 0)
    start = 1024 if step < 2 else 1024 + 128 + 1024
    return start + word * 4, (16 if row >= 8 else 0) + inside % 4 * 4


class Places(NamedTuple):
    """For each stored element, where it lies in an expert."""

    value: np.ndarray  # [kept, cols/2]  byte
    nibble: np.ndarray  # [kept, cols/4]  which nibble: 2 * byte, + 1 for the high one
    unused_nibbles: np.ndarray  # of rows and columns that do not exist
    switch: np.ndarray  # [bits, 4]  kept row, Sub-Row, byte, bit in the byte
    index: np.ndarray  # [bytes, 3]  kept row, Sub-Row, byte


@lru_cache
def places(layout: Layout) -> Places:
    """One block, row and column at a time."""
    values = np.zeros((layout.kept, layout.cols // 2), dtype=np.int64)
    nibbles = np.zeros((layout.kept, layout.cols // 4), dtype=np.int64)
    unused, switches, indices = [], [], []
    v = layout.pattern.sub_row(layout.cols)
    for tile in range(layout.tiles):
        for row in range(TILE_ROWS):
            kept = layout.kept_row(tile, row)
            for block in range(layout.blocks):
                start = layout.block_start(tile, block)
                for inside in range(64):
                    column = block * 64 + inside
                    if kept is not None and column < layout.cols // 2:
                        values[kept, column] = start + value_byte(row, inside)
                for inside in range(32):
                    byte, bit = nibble_place(row, inside)
                    place = 2 * (start + byte) + bit // 4
                    group = block * 32 + inside
                    if kept is not None and group < layout.cols // 4:
                        nibbles[kept, group] = place
                    else:
                        unused.append(place)
                if layout.has_switches and kept is not None:
                    for step in range(4):
                        column = min(block * BLOCK_COLS + 32 * step, layout.cols - 1)
                        byte = start + 2304 + 4 * step + row // 8
                        switches.append((kept, column // v, byte, row % 8))
            if layout.kind == GENERAL and kept is not None:
                for sub_row in range(layout.sub_rows):
                    byte = (tile * layout.sub_rows + sub_row) * TILE_ROWS + row
                    indices.append((kept, sub_row, layout.index_offset + byte))
    return Places(
        values,
        nibbles,
        np.array(unused, dtype=np.int64),
        np.array(switches, dtype=np.int64).reshape(-1, 4),
        np.array(indices, dtype=np.int64).reshape(-1, 3),
    )


def pack(
    stored: SparseWeight, pattern: SparsityPattern, rows: int, is_gate_up: bool
) -> torch.Tensor:
    """Canonical tensors ``[E, kept, ..]`` of bf16 or fp16 to bytes ``[E, expert_bytes]``."""
    layout = Layout(rows, stored.values.shape[-1] * 2, pattern, is_gate_up)
    where = places(layout)
    values = stored.values.contiguous().view(torch.int16).numpy().view(np.uint16)
    meta, index = stored.meta.numpy(), stored.index.numpy()
    packed = np.zeros((values.shape[0], layout.expert_bytes), dtype=np.uint8)
    for expert, out in enumerate(packed):
        for shift in (0, 1):  # little-endian
            out[where.value + shift] = (values[expert] >> (8 * shift)).astype(np.uint8)
        nibbles = np.zeros(2 * out.size, dtype=np.uint8)
        nibbles[where.unused_nibbles] = EMPTY_NIBBLE
        nibbles[where.nibble[:, 0::2]] = meta[expert] & 15
        nibbles[where.nibble[:, 1::2]] = meta[expert] >> 4
        out |= nibbles[0::2] | nibbles[1::2] << 4
        for kept, sub_row, byte, bit in where.switch:
            slot = kept % pattern.n
            out[byte] |= int(index[expert, kept, sub_row] == slot + 1) << bit
        for kept, sub_row, byte in where.index:
            out[byte] = index[expert, kept, sub_row]
    return torch.from_numpy(packed)


def unpack(
    packed: torch.Tensor,  # [E, expert_bytes]  uint8
    pattern: SparsityPattern,
    shape: tuple[int, int],  # rows, cols
    dtype: torch.dtype,
    is_gate_up: bool,
) -> SparseWeight:
    """The canonical tensors again."""
    layout = Layout(*shape, pattern, is_gate_up)
    where, source = places(layout), packed.numpy()
    sizes = stored_shapes((source.shape[0], *shape), pattern)
    values = np.zeros(sizes[0], dtype=np.uint16)
    meta, index = (np.zeros(size, dtype=np.uint8) for size in sizes[1:])
    for expert, bytes_in in enumerate(source):
        for shift in (0, 1):
            values[expert] |= bytes_in[where.value + shift].astype(np.uint16) << (8 * shift)
        nibbles = np.stack((bytes_in & 15, bytes_in >> 4), axis=-1).reshape(-1)
        picked = nibbles[where.nibble]
        meta[expert] = picked[:, 0::2] | picked[:, 1::2] << 4
        if layout.kind == DENSE24:  # every row is kept, in its own place
            index[expert] = (np.arange(layout.kept) % pattern.n)[:, None]
        for kept, sub_row, byte, bit in where.switch:
            index[expert, kept, sub_row] = kept % pattern.n + (bytes_in[byte] >> bit & 1)
        for kept, sub_row, byte in where.index:
            index[expert, kept, sub_row] = bytes_in[byte]
    return SparseWeight(
        torch.from_numpy(values.view(np.int16)).view(dtype),
        torch.from_numpy(meta),
        torch.from_numpy(index),
    )
