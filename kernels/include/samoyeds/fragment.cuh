// The fragment order "m16k128.v4": how a packed weight lies in memory.
//
// A tile is 16 kept rows, the height of the matrix instruction; a block is 128 dense columns of it:
//
//   block   values  1024 B   rows 0..7: 8 matrices of 8 rows x 16 bytes, two a step of 32 columns
//           meta     128 B   steps 0 and 1: a word a lane, which serves both (selectors 0 and 1)
//           values  1024 B   rows 8..15
//           meta     128 B   steps 2 and 3, of all rows
//           rows      16 B   only where rows switch: a word a step; bit r = row r of the tile takes
//                            the later one of its two dense rows
//
// So ldmatrix reads fragment A, and the halves of all tiles that lie together are one distance
// apart, as wgmma asks of an operand that it reads itself.
//
//   packed [E][bundle][block][tile of the bundle], then, for general patterns, index bytes
//   [tile][Sub-Row][16]
//
// A bundle is eight tiles, the last one of what is left: what a thread block multiplies at a time
// is one contiguous copy, as each copy costs time of its own.
//
// mma.sp.m16n8k32 (PTX ISA, "Matrix fragments for sparse mma.m16n8k32"): with lane = 4g + t,
// register 0 holds row g, compressed columns 2t, 2t+1, the lane-th word of a matrix; register 1 row
// g+8; registers 2, 3 columns 8 further, of the next matrices. The metadata of step j comes from
// lanes t = 2(j%2), 2(j%2)+1: low half row g, high half row g+8.
//
// Host compilers read this file too: C++17, no CUDA header.
#pragma once

#include "samoyeds/format.cuh"

namespace samoyeds {

inline constexpr const char* kLayoutName = "m16k128.v4";

inline constexpr int kTileRows = 16;  // kept rows of a tile
inline constexpr int kBundleTiles = 8;
inline constexpr int kBlockCols = 128;  // dense columns of a block
inline constexpr int kStepCols = 32;    // dense columns of one matrix instruction
inline constexpr int kStepsPerBlock = kBlockCols / kStepCols;
inline constexpr int kHalfTile = kTileRows / 2;
inline constexpr int kMatrixRowBytes = 16;  // 8 compressed columns
inline constexpr int kMatrixBytes = kHalfTile * kMatrixRowBytes;
inline constexpr int kMetaOffset = 2 * kStepsPerBlock * kMatrixBytes;  // in half a tile's part
inline constexpr int kMetaBytes = 128;                                 // of two steps: 32 words
inline constexpr int kHalfBytes = kMetaOffset + kMetaBytes;            // half a tile's part
inline constexpr int kRowsOffset = 2 * kHalfBytes;
inline constexpr int kRowsBytes = kStepsPerBlock * 4;

enum class Kind {
  kDense24,   // N == M: kept rows are the dense rows
  kSwitched,  // (1, 2, V) with V a multiple of a step: a bit says which row of the pair
  kStepped,   // (3, 4, V), likewise: slot s is row s of its block or, one step on, row s + 1
  kGeneral,   // everything else: an index byte a Sub-Row
};

// Of kStepped, tiles come in threes: row r of tile 3t + s is slot s of the r-th block of rows of
// the t-th sixteen. A warp that holds the three has all of a block in one of its threads.
inline constexpr int kSteppedM = 4;
inline constexpr int kSlots = kSteppedM - 1;  // of a block, and tiles that belong together

struct Layout {
  Pattern pattern;
  int rows, cols;     // dense m, k
  int kept;           // kept rows
  int rows_per_tile;  // 16, or of general patterns as many whole blocks of N as fit
  int tiles;
  int blocks;  // along k
  int block_bytes;
  Kind kind;
  bool interleaved;           // rows 0..7 of a tile are gate rows, rows 8..15 their up rows
  std::int64_t index_offset;  // of the index bytes in an expert
  std::int64_t expert_bytes;
  // Kept rows or, of kStepped, blocks of rows: what tiles, or threes of them, hold. NOTE: the last
  // member, because kernels read the others two and four at a time.
  int places;
};

SAMOYEDS_HOST_DEVICE constexpr int ceil_div(int x, int y) { return (x + y - 1) / y; }

// Whether Sub-Rows of a kept row belong to one of two dense rows, as a bit of each step says.
SAMOYEDS_HOST_DEVICE constexpr bool switches_rows(const Layout& l) {
  return l.kind == Kind::kSwitched || l.kind == Kind::kStepped;
}

SAMOYEDS_HOST_DEVICE constexpr Layout make_layout(int rows, int cols, Pattern pattern,
                                                  bool is_gate_up) {
  Layout l{};
  l.pattern = pattern;
  l.rows = rows;
  l.cols = cols;
  l.kept = kept_rows(pattern, rows);
  if (pattern.n == pattern.m) {
    l.kind = Kind::kDense24;
  } else if (pattern.n == 1 && pattern.m == 2 && pattern.v % kStepCols == 0) {
    l.kind = Kind::kSwitched;
  } else if (pattern.n == kSlots && pattern.m == kSteppedM && pattern.v % kStepCols == 0) {
    l.kind = Kind::kStepped;
  } else {
    l.kind = Kind::kGeneral;
  }
  const bool is_general = l.kind == Kind::kGeneral;
  // Gate and up rows can only share a tile where no block of M rows holds both.
  l.interleaved = is_gate_up && !is_general && rows % 2 == 0 && rows / 2 % pattern.m == 0;
  l.rows_per_tile = is_general ? kTileRows / pattern.n * pattern.n : kTileRows;
  const int tiles_of_places = l.kind == Kind::kStepped ? kSlots : 1;
  l.places = l.kept / tiles_of_places;
  l.tiles = tiles_of_places * (l.interleaved ? ceil_div(l.places / 2, kHalfTile)
                                             : ceil_div(l.places, l.rows_per_tile));
  l.blocks = ceil_div(cols, kBlockCols);
  l.block_bytes = kRowsOffset + (switches_rows(l) ? kRowsBytes : 0);
  l.index_offset = static_cast<std::int64_t>(l.tiles) * l.blocks * l.block_bytes;
  l.expert_bytes = l.index_offset;
  if (is_general) {
    l.expert_bytes += static_cast<std::int64_t>(l.tiles) * index_per_row(pattern, cols) * kTileRows;
  }
  return l;
}

// Of Layout::places the one at row `row` of tile `tile`, of kStepped of the tile-th three, or -1.
SAMOYEDS_HOST_DEVICE constexpr int place_of(const Layout& l, int tile, int row) {
  if (l.interleaved) {
    const int half = l.places / 2, in_half = tile * kHalfTile + row % kHalfTile;
    return in_half < half ? in_half + (row < kHalfTile ? 0 : half) : -1;
  }
  const int place = tile * l.rows_per_tile + row;
  return row < l.rows_per_tile && place < l.places ? place : -1;
}

// Kept row that row `row` of tile `tile` holds, or -1.
SAMOYEDS_HOST_DEVICE constexpr int kept_row_of(const Layout& l, int tile, int row) {
  if (l.kind != Kind::kStepped) return place_of(l, tile, row);
  const int block = place_of(l, tile / kSlots, row);
  return block < 0 ? -1 : block * kSlots + tile % kSlots;
}

// Row of its block that a kept row's Sub-Row takes, from its bit. kSwitched and kStepped.
SAMOYEDS_HOST_DEVICE constexpr int switched_index(const Layout& l, int kept, int bit) {
  return kept % l.pattern.n + bit;
}

SAMOYEDS_HOST_DEVICE constexpr int bundle_tiles(const Layout& l, int tile) {
  const int left = l.tiles - tile / kBundleTiles * kBundleTiles;
  return left < kBundleTiles ? left : kBundleTiles;
}

// Bytes from a block of a tile to its next one.
SAMOYEDS_HOST_DEVICE constexpr int block_stride(const Layout& l, int tile) {
  return bundle_tiles(l, tile) * l.block_bytes;
}

SAMOYEDS_HOST_DEVICE constexpr std::int64_t block_offset(const Layout& l, int tile, int block) {
  const int in_bundle = tile % kBundleTiles;
  return (static_cast<std::int64_t>(tile - in_bundle) * l.blocks + in_bundle) * l.block_bytes +
         static_cast<std::int64_t>(block) * block_stride(l, tile);
}

// Byte in a block of the matrix with register `reg` (0..3) of step `step`'s fragment A.
SAMOYEDS_HOST_DEVICE constexpr int matrix_offset(int step, int reg) {
  return reg % 2 * kHalfBytes + (2 * step + reg / 2) * kMatrixBytes;
}

// Byte in a block of the metadata words of steps 2 * pair and 2 * pair + 1.
SAMOYEDS_HOST_DEVICE constexpr int meta_pair_offset(int pair) {
  return pair * kHalfBytes + kMetaOffset;
}

// Byte in a block of the value at tile row `row`, compressed column `column` (0..63).
SAMOYEDS_HOST_DEVICE constexpr int value_offset(int row, int column) {
  const int reg = row / kHalfTile + column % 16 / 8 * 2;
  return matrix_offset(column / 16, reg) + row % kHalfTile * kMatrixRowBytes + column % 8 * 2;
}

// Byte in a block of the metadata word with the nibble of row `row`, group `group` (0..31).
SAMOYEDS_HOST_DEVICE constexpr int meta_offset(int row, int group) {
  const int step = group / 8, in_step = group % 8;
  const int lane = row % kHalfTile * 4 + step % 2 * 2 + (in_step >= 4 ? 1 : 0);
  return meta_pair_offset(step / 2) + lane * 4;
}

// Place of that nibble in its word.
SAMOYEDS_HOST_DEVICE constexpr int meta_shift(int row, int group) {
  return (row >= kHalfTile ? 16 : 0) + group % 4 * kNibbleBits;
}

// Byte in an expert of the index of tile row `row`, Sub-Row `sub_row`; general patterns only.
SAMOYEDS_HOST_DEVICE constexpr std::int64_t index_byte_offset(const Layout& l, int tile,
                                                              int sub_row, int row) {
  const int sub_rows = index_per_row(l.pattern, l.cols);
  return l.index_offset + (static_cast<std::int64_t>(tile) * sub_rows + sub_row) * kTileRows + row;
}

// The bits of the rows change at most every 4, 2 or 1 steps of a block; 0: there are none.
SAMOYEDS_HOST_DEVICE constexpr int switch_period(const Layout& l) {
  const int v = l.pattern.v;
  if (!switches_rows(l)) return 0;
  return v % kBlockCols == 0 ? 4 : v % 64 == 0 ? 2 : 1;
}

static_assert(kRowsOffset == 2304 && kRowsOffset + kRowsBytes == 2320, "the drawing above");
static_assert(value_offset(7, 63) == meta_pair_offset(0) - 2 &&
                  value_offset(15, 63) == meta_pair_offset(1) - 2,
              "values fill their parts of a block");
static_assert(meta_offset(15, 15) == value_offset(8, 0) - 4 &&
                  meta_offset(15, 31) == kRowsOffset - 4,
              "metadata fills its parts of a block");
static_assert(kRowsOffset % 16 == 0 && kRowsBytes % 16 == 0,
              "blocks are copied 16 bytes at a time");

}  // namespace samoyeds
