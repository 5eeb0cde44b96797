// The Hopper kernel: which part of the product a thread block computes next.
#pragma once

#include "samoyeds/slab_buffers.cuh"

namespace samoyeds {

// Which item a cluster computes next: the first one that nobody has claimed yet. Dealt out ahead of
// time, items had kept some clusters busy after others were done, as they take different times.
template <class Shape>
class SlabScheduler {
 public:
  __device__ explicit SlabScheduler(const SsmmArgs& args) : args_(args) {}

  // Without tokens beyond the last item. Reads what it needs each time rather than keep registers.
  __device__ SlabWork at(int item) const {
    const int num_tiles =
        uniform(args_.tokens.tiles ? __ldg(args_.tokens.num_tiles)
                                   : args_.tokens.sizes.num_large + args_.tokens.sizes.num_small);
    const int parts = args_.parts.value, whole_parts = args_.whole_parts.value;
    // Half parts of two tiles are one item, where that saves a round. It comes about when whole
    // parts of those tiles do, whose tokens are then in the L2.
    const int num_whole = num_tiles * whole_parts, clusters = gridDim.x / Shape::kCluster;
    const int num_single = num_tiles * parts, num_paired = num_whole + ceil_div(num_tiles, 2);
    const bool is_paired =
        whole_parts < parts && ceil_div(num_paired, clusters) < ceil_div(num_single, clusters);
    const int num_items = is_paired ? num_paired : num_single;
    if (item >= num_items) return {};
    if (!is_paired) return of_part(item, args_.parts);
    const int period = 2 * whole_parts + 1, pair = item / period, whole = item - pair;
    if (item % period < 2 * whole_parts && whole < num_whole) {
      return of_part(whole, args_.whole_parts);
    }
    return of_half_parts(2 * pair, num_tiles);
  }

  // Calls visit(SlabWork, look_ahead) for each item of this cluster; look_ahead() is to be called
  // once meanwhile, where there is time to look up the next one. kTells: by one warp of each thread
  // block, when the kernel before, which sets num_claimed to 0, has ended; that of the first block
  // claims the next item early, as the count takes its time to answer.
  template <bool kTells, class Buffers, typename Visit>
  __device__ __forceinline__ void for_each(const Buffers& buffers, Visit&& visit) const {
    const int clusters = gridDim.x / Shape::kCluster;
    const bool tells = kTells && threadIdx.x % kWarpThreads == 0;
    const bool claims = tells && blockIdx.x % Shape::kCluster == 0;
    SlabWork work = at(blockIdx.x / Shape::kCluster), next;
    for (int round = 0; work.count() > 0; ++round, work = next) {
      if (tells) buffers.expect_next(round);
      const int claimed = claims ? clusters + atomicAdd(args_.num_claimed, 1) : 0;
      visit(work, [&] {
        if (claims) buffers.tell_next(round, claimed);
        next = at(buffers.next_item(round));
      });
    }
  }

 private:
  static constexpr int kPartSlabs = Shape::kCluster * Shape::kGroups;

  // Where each tile has as many items as parts.
  __device__ SlabWork of_part(int item, const Divisor& parts) const {
    const int guess = item / parts;  // a tile of the same group
    Tile tile = tile_at(guess);
    const int group_first = tile.group >> 8, group_size = tile.group & 255;
    int part = item - group_first * parts.value;
    if (group_size > 1) {
      const int chosen = group_first + part % group_size;
      part /= group_size;
      if (chosen != guess) tile = tile_at(chosen);
    }
    return of(tile, part * kPartSlabs);
  }

  // What is left of the rows behind whole parts, of two neighbouring tiles: one for each block.
  __device__ SlabWork of_half_parts(int first, int num_tiles) const {
    static_assert(Shape::kCluster == 2, "two thread blocks, half a part for each");
    const int begin = args_.whole_parts.value * kPartSlabs;
    if (first + 1 == num_tiles) return of(tile_at(first), begin);
    const Tile tile = tile_at(first + static_cast<int>(blockIdx.x % Shape::kCluster));
    return {uniform(tile.expert), uniform(tile.first),
            uniform(begin << 16 | SlabWork::kAlone | Shape::kGroups << 8 | tile.count)};
  }

  // This thread block's of the slabs of a part that begins with `begin`.
  __device__ SlabWork of(const Tile& tile, int begin) const {
    const int count = min(kPartSlabs, args_.layout.rows / kSlabRows - begin);
    // A block with two slabs begins with an even one.
    const int rank = blockIdx.x % Shape::kCluster;
    const int first = ceil_div(count * rank, Shape::kCluster);
    const int slabs = ceil_div(count * (rank + 1), Shape::kCluster) - first;
    return {uniform(tile.expert), uniform(tile.first),
            uniform((begin + first) << 16 | slabs << 8 | tile.count)};
  }

  __device__ Tile tile_at(int number) const {
    if (args_.tokens.tiles) {
      const int4 t = __ldg(reinterpret_cast<const int4*>(args_.tokens.tiles) + number);
      return {t.x, t.y, t.z, t.w};
    }
    const TileSizes& sizes = args_.tokens.sizes;
    if (number < sizes.num_large) {
      const int group_first = number / kMaxGroup * kMaxGroup;
      const int group_size = min(kMaxGroup, sizes.num_large - group_first);
      return {0, number * sizes.large, sizes.large, group_first << 8 | group_size};
    }
    // Small tiles are a group of their own, which comes last: they fill what the others leave.
    const int first = sizes.num_large * sizes.large + (number - sizes.num_large) * sizes.small;
    return {0, first, min(sizes.small, args_.tokens.num_rows - first),
            sizes.num_large << 8 | sizes.num_small};
  }

  const SsmmArgs& args_;
};

}  // namespace samoyeds
