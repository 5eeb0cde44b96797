// Activations as the wgmma kernel reads and writes them.
//
// A place is a row of one token of one expert; the places of an expert are neighbours and start at
// a multiple of 8. A panel is 64 columns of all places:
//
//   panels [columns / 64][places][128 B]    16-byte chunk c of place p lies at chunk c ^ p % 8
//
// That is the 128-byte swizzle in which wgmma reads its operand B from shared memory (PTX ISA,
// "Shared memory matrix layout"), so any run of places is one contiguous copy, without a tensor
// map.
#pragma once

#include "samoyeds/format.cuh"

namespace samoyeds {

inline constexpr int kPanelCols = 64;
inline constexpr int kPanelBytes = kPanelCols * 2;  // of a place
inline constexpr int kPlaceAlign = 8;
inline constexpr int kChunkCols = 8;  // of 16 bytes
inline constexpr int kPanelChunks = kPanelCols / kChunkCols;

// Tokens: a tile is multiplied in such steps.
inline constexpr int kLiveStep = 16;

SAMOYEDS_HOST_DEVICE constexpr std::int64_t panel_offset(std::int64_t panel, std::int64_t places,
                                                         std::int64_t place) {
  return (panel * places + place) * kPanelBytes;
}

// Byte of a chunk in a place's row.
SAMOYEDS_HOST_DEVICE constexpr int swizzled_chunk(int place, int chunk) {
  return (chunk ^ place % kPlaceAlign) * 16;
}

// Results without a gate lie in their panels as threads hold them: of each tile of 16 kept rows, 32
// or where N = M 16 dense rows, stored columns 4i .. 4i + 3 are columns 2i, 2i + 1 of its first
// half, then of its second. Eight stored columns from a multiple of 8 on are four neighbours of the
// first half, stored at 0, 1, 4, 5, the first of which this returns, and four of the second.
SAMOYEDS_HOST_DEVICE constexpr int first_column_of(int stored, int tile_columns) {
  return stored / tile_columns * tile_columns + stored % tile_columns / 2;
}

}  // namespace samoyeds
