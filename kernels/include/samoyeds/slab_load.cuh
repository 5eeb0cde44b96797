// The Hopper kernel, global to shared memory: bulk copies alone, as weights and panels lie in
// memory as they are wanted.
#pragma once

#include "samoyeds/slab_scheduler.cuh"

namespace samoyeds {

// By the four warps that load: ahead of the others by as many slots as there are, into the next
// items too. Each has its share of the copies; a copy takes its operands from registers that a warp
// has only once, so that lanes could not issue theirs together.
template <class Shape, class Buffers>
__device__ void load_slabs(const SsmmArgs& args, const SlabScheduler<Shape>& scheduler,
                           const Buffers& buffers) {
  const int rank = blockIdx.x % Shape::kCluster;
  const int warp = uniform(threadIdx.x / kWarpThreads % kGroupWarps);
  const bool is_leader = threadIdx.x % kWarpThreads == 0;
  const Layout& layout = args.layout;
  const std::int64_t tile_stride = static_cast<std::int64_t>(layout.blocks) * layout.block_bytes;
  const std::int64_t block_stride = panel_offset(2, args.places, 0);
  Turn turn;
  SlabWork next = scheduler.at(scheduler.first());
  for (int item = scheduler.first(); next.count() > 0; item += scheduler.step()) {
    const SlabWork work = next;
    next = scheduler.at(item + scheduler.step());  // read ahead of time
    const int tiles = work.num_slabs() * Buffers::kSlabTiles;
    const std::uint8_t* weights = args.packed + work.expert * layout.expert_bytes +
                                  block_offset(layout, work.first_slab() * Buffers::kSlabTiles, 0);
    // Eight places at a time, so that what is copied is as it lies there; a share for each block.
    const int eights = ceil_div(work.count(), kPlaceAlign);
    const int first = eights * rank / Shape::kCluster * kPlaceAlign;
    const int count = eights * (rank + 1) / Shape::kCluster * kPlaceAlign - first;
    const std::uint8_t* tokens = static_cast<const std::uint8_t*>(args.x) +
                                 panel_offset(warp % 2, args.places, work.first + first);
    const int bytes = tiles * layout.block_bytes + eights * kPlaceAlign * 2 * kPanelBytes;
    for (int block = 0; block < layout.blocks; ++block) {
      ptx::wait(buffers.empty(turn.slot), turn.parity ^ 1);
      if (is_leader) {
        const std::uint32_t full = buffers.full(turn.slot);
        if (warp == 0) ptx::arrive_expecting(full, bytes);
        if (warp < 2 && count > 0) {
          const std::uint32_t to = buffers.tokens(turn.slot, warp) + first * kPanelBytes;
          ptx::copy_bulk_to_cluster<Shape::kCluster>(to, tokens, count * kPanelBytes, full);
        }
#pragma unroll 1
        for (int tile = warp; tile < tiles; tile += kGroupWarps) {
          ptx::copy_bulk<false>(buffers.weights(turn.slot) + tile * kBlockStride,
                                weights + tile * tile_stride, layout.block_bytes, full);
        }
      }
      __syncwarp();
      weights += layout.block_bytes;
      tokens += block_stride;
      turn.advance(Buffers::kSlots);
    }
  }
}

}  // namespace samoyeds
