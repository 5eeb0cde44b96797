// Which part of the product a thread block computes next. Thread blocks are persistent: block b
// takes the items b, b + gridDim.x, ... Only the device knows how many there are: no host waits.
#pragma once

#include "samoyeds/args.cuh"

namespace samoyeds {

struct Work {
  Tile tile;                   // of tokens
  int first_tile_m;            // of 16 kept rows
  int block_begin, block_end;  // of k, 128 columns each
  int split;
};

template <class Shape>
class Scheduler {
  static constexpr int kTokens = Shape::kTokens;

 public:
  __device__ explicit Scheduler(const SsmmArgs& args) : args_(args) {
    num_tiles_ =
        args.tokens.tiles ? *args.tokens.num_tiles : ceil_div(args.tokens.num_rows, kTokens);
  }

  __device__ int num_items() const { return num_tiles_ * args_.parts.value; }

  // Inside a group of tiles the tile varies fastest, then the split, then the rows.
  __device__ Work at(int item) const {
    const int guess = item / args_.parts;  // a tile of the same group
    Work work;
    work.tile = tile_at(guess);
    const int group_first = work.tile.group >> 8, group_size = work.tile.group & 255;
    int part = item - group_first * args_.parts.value;
    if (group_size > 1) {
      const int chosen = group_first + part % group_size;
      part /= group_size;
      if (chosen != guess) work.tile = tile_at(chosen);
    }
    const int row_part = part / args_.splits, blocks = args_.layout.blocks;
    work.split = part - row_part * args_.splits.value;
    work.first_tile_m = row_part * Shape::kTilesM;
    work.block_begin = blocks * work.split / args_.splits;
    work.block_end = blocks * (work.split + 1) / args_.splits;
    return work;
  }

 private:
  __device__ Tile tile_at(int number) const {
    if (args_.tokens.tiles) {
      const int4 t = __ldg(reinterpret_cast<const int4*>(args_.tokens.tiles) + number);
      return {t.x, t.y, t.z, t.w};
    }
    const int first = number * kTokens, group_first = number / kMaxGroup * kMaxGroup;
    const int group_size = min(kMaxGroup, num_tiles_ - group_first);
    return {0, first, min(kTokens, args_.tokens.num_rows - first), group_first << 8 | group_size};
  }

  const SsmmArgs& args_;
  int num_tiles_;
};

}  // namespace samoyeds
