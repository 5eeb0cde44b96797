// The Samoyeds format, version 1, for kernels: the constants and index arithmetic of the canonical
// tensors. samoyeds_hf/format.py defines the format; tests/test_kernel_headers.py compares the two.
//
// Dense weight W [m, k]: m = out features, k = in features. A block is M rows x V columns; N of its
// M Sub-Rows (V consecutive elements of a row) are kept, and a kept one keeps 2 of every 4
// elements.
//
//   values  [E, m*N/M, k/2]  bf16, fp16 or fp32   kept row r = block r/N, slot r%N
//   meta    [E, m*N/M, k/8]  uint8                a nibble a group of 4; low nibble = even group
//   index   [E, m*N/M, k/V]  uint8                row (0..M-1) of its block; ascending by slot
//
// Host compilers read this file too: C++17, no CUDA header.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SAMOYEDS_HOST_DEVICE __host__ __device__
#else
#define SAMOYEDS_HOST_DEVICE
#endif

namespace samoyeds {

inline constexpr int kFormatVersion = 1;
inline constexpr int kGroup = 4;         // every 4 consecutive elements of a kept Sub-Row ...
inline constexpr int kKeptPerGroup = 2;  // ... keep 2
inline constexpr int kMaxM = 16;         // rows of a block, at most
inline constexpr int kNibbleBits = 4;    // metadata of one group
inline constexpr int kPositionBits = 2;  // one position inside a group

using Meta = std::uint8_t;   // two nibbles: groups 2j (low) and 2j + 1 (high)
using Index = std::uint8_t;  // row of a block

// (N, M, V): N of the M Sub-Rows of a block are kept, V elements long. Plain 2:4 is {1, 1, k}.
struct Pattern {
  int n;
  int m;
  int v;
};

// i0 | i1 << 2: the positions, i0 < i1, of the two kept elements of a group.
SAMOYEDS_HOST_DEVICE constexpr int encode_nibble(int i0, int i1) {
  return i0 | i1 << kPositionBits;
}

// Position in its group of kept element `which` (0 or 1).
SAMOYEDS_HOST_DEVICE constexpr int position(int nibble, int which) {
  return nibble >> (which * kPositionBits) & (kGroup - 1);
}

// NOTE: any other nibble makes sparse tensor cores multiply the wrong elements, without an error.
SAMOYEDS_HOST_DEVICE constexpr bool is_valid_nibble(int nibble) {
  return nibble >= 0 && nibble < 1 << kNibbleBits && position(nibble, 0) < position(nibble, 1);
}

// Rows of values, meta and index for m out features.
SAMOYEDS_HOST_DEVICE constexpr int kept_rows(Pattern pattern, int m) {
  return m / pattern.m * pattern.n;
}

// Columns of values for k in features.
SAMOYEDS_HOST_DEVICE constexpr int values_per_row(int k) { return k / kGroup * kKeptPerGroup; }

// Bytes in a row of meta for k in features.
SAMOYEDS_HOST_DEVICE constexpr int meta_bytes_per_row(int k) {
  return k / kGroup * kNibbleBits / 8;
}

// Bytes in a row of index for k in features: one a Sub-Row.
SAMOYEDS_HOST_DEVICE constexpr int index_per_row(Pattern pattern, int k) { return k / pattern.v; }

// Column of index that holds for column `column` of values.
SAMOYEDS_HOST_DEVICE constexpr int index_column(Pattern pattern, int column) {
  return column / values_per_row(pattern.v);
}

// Row of W that kept row `row` stands for, where index says `index`.
SAMOYEDS_HOST_DEVICE constexpr int dense_row(Pattern pattern, int row, int index) {
  return row / pattern.n * pattern.m + index;
}

// Column of W that column `column` of values stands for, in a group with metadata `nibble`.
SAMOYEDS_HOST_DEVICE constexpr int dense_column(int column, int nibble) {
  return column / kKeptPerGroup * kGroup + position(nibble, column % kKeptPerGroup);
}

// The nibble of 2:4 group `group` in its byte of meta, byte group / 2 of the row.
SAMOYEDS_HOST_DEVICE constexpr int nibble_of(Meta meta, int group) {
  return meta >> (group % 2 * kNibbleBits) & ((1 << kNibbleBits) - 1);
}

namespace detail {
constexpr int count_valid_nibbles() {
  int count = 0;
  for (int nibble = 0; nibble < 1 << kNibbleBits; ++nibble) count += is_valid_nibble(nibble);
  return count;
}
}  // namespace detail

static_assert(kGroup == 1 << kPositionBits, "a position takes exactly its bits of a nibble");
static_assert(kNibbleBits == kKeptPerGroup * kPositionBits, "a nibble holds both positions");
static_assert(8 * sizeof(Meta) == 2 * kNibbleBits, "a byte of meta holds two groups: k % 8 == 0");
static_assert(kMaxM - 1 <= UINT8_MAX, "every row of a block fits in one byte of index");
static_assert(detail::count_valid_nibbles() == 6, "2 of 4 positions can be chosen in 6 ways");
static_assert(encode_nibble(0, 1) == 4 && encode_nibble(0, 2) == 8 && encode_nibble(1, 2) == 9 &&
                  encode_nibble(0, 3) == 12 && encode_nibble(1, 3) == 13 &&
                  encode_nibble(2, 3) == 14,
              "the valid nibbles are 4, 8, 9, 12, 13, 14");
static_assert(nibble_of(0xC9, 0) == 0x9 && nibble_of(0xC9, 1) == 0xC, "low nibble = even group");
static_assert(kept_rows({1, 2, 128}, 256) == 128, "(1, 2, V) keeps every second row");
static_assert(dense_row({8, 16, 32}, 9, 5) == 21, "kept row 9 is slot 1 of the second block");

}  // namespace samoyeds
