// What the host hands to the kernels that multiply: ssmm.cuh and general.cu.
#pragma once

#include "samoyeds/fragment.cuh"

namespace samoyeds {

// Division by a number that is only known at run time, without a division instruction: for
// 0 <= x < 2^31, x / d = x * ceil(2^(31 + s) / d) >> (31 + s) with s = ceil(log2 d).
struct Divisor {
  std::uint32_t multiplier;
  int shift;
  int value;
};

constexpr Divisor make_divisor(int value) {
  int log = 0;
  while ((1ll << log) < value) ++log;
  const std::uint64_t power = 1ull << (31 + log);
  return {static_cast<std::uint32_t>((power + value - 1) / value), 31 + log, value};
}

SAMOYEDS_HOST_DEVICE constexpr int operator/(int x, const Divisor& d) {
  return static_cast<int>(
      static_cast<std::uint64_t>(static_cast<std::uint32_t>(x)) * d.multiplier >> d.shift);
}

inline constexpr int kWarpThreads = 32;
inline constexpr int kWarps = 8;  // of a thread block of the matrix kernel, those that multiply
inline constexpr int kConsumers = kWarps * kWarpThreads;
inline constexpr int kMaxGroup = 8;  // tiles of a group, see Tile
static_assert(kMaxGroup < 1 << 8, "Tile::group has 8 bits for the size of a group");

// Up to so many tokens of one expert, as route() lists them: places first .. first + count - 1 of
// the pairs sorted by expert. Consecutive tiles of one expert form groups that blocks running at
// the same time share, so that weights and tokens meet in the L2.
struct Tile {
  int expert;
  int first;
  int count;
  int group;  // its first tile << 8 | tiles in it
};
// How the tokens of an expert are cut into tiles.
struct Tiling {
  int most;       // tokens of a tile, of which there are as few as can be
  int align = 1;  // an expert's places start at a multiple of it, a power of two
  // Tiles of the same size, a multiple of this power of two, and a rest; 0: full ones and a rest.
  int step = 0;
  SAMOYEDS_HOST_DEVICE constexpr int aligned(int place) const {
    return (place + align - 1) & -align;
  }
  SAMOYEDS_HOST_DEVICE constexpr int size(int tokens, int num_tiles) const {
    return step == 0 ? most : (ceil_div(tokens, num_tiles) + step - 1) & -step;
  }
  bool operator==(const Tiling& other) const {
    return most == other.most && align == other.align && step == other.step;
  }
};
inline constexpr int kNoPlace = -1, kNoPair = -1;
static_assert(sizeof(Tile) == 16, "a tile is one load, and four numbers of samoyeds_route()");

// Without routing, for the Hopper kernel: tiles of `large` tokens, and then of `small`, of which
// the last may have less. Multiples of kLiveStep, or as many as a tile may have.
struct TileSizes {
  int large, num_large;
  int small, num_small;
};

// Which rows of x meet which expert. Without routing (tiles == nullptr) all rows meet expert 0.
struct Tokens {
  const Tile* tiles;
  const int* num_tiles;
  const int* pairs;
  int num_rows;           // of x, without routing
  Divisor pairs_per_row;  // rows of x are tokens: K; or pairs: 1
  TileSizes sizes;        // without routing
};

enum class Output {
  kGated,    // [pairs, m/2]  SiLU(gate) * up; interleaved layouts only
  kRows,     // [pairs, m]
  kPartial,  // [splits, pairs, m]  fp32
  kPanels,   // [m / 64][places]  as panels.cuh; of the Hopper kernel, kGated too
  kMatrix,   // [rows of x, m]  as kRows without routing, through SsmmArgs::matrix; Hopper kernel
};

// A CUtensorMap: how a matrix lies in global memory, for copies of boxes of it (CUDA driver API,
// "Tensor Map Object Management").
struct alignas(64) TensorMap {
  std::uint64_t words[16];
};

struct SsmmArgs {
  Layout layout;
  const std::uint8_t* packed;  // [E, expert_bytes]
  const void* x;               // [rows, k]
  Tokens tokens;
  void* out;
  Output output;
  std::int64_t split_stride;  // elements of a plane of kPartial
  int stages;
  Divisor splits;
  Divisor parts;  // items of a tile of tokens: parts of the rows, times splits
  int places;     // of the panels that the Hopper kernel reads and writes
  bool is_early;  // the routing is complete although the previous kernel may still run; for the
                  // Hopper kernel it always is
  Divisor whole_parts;  // of the Hopper kernel: `parts` without half a part that is left
  int* num_claimed;  // of the Hopper kernel's items, beside the first of each cluster; 0 at first
  TensorMap matrix;  // of `out`, kMatrix only: boxes of one panel, see HopperShape
};

}  // namespace samoyeds
