// The Hopper kernel, global to shared memory: bulk copies alone, as weights and panels lie in
// memory as they are wanted.
#pragma once

#include "samoyeds/slab_scheduler.cuh"

namespace samoyeds {

// After the last item, by the warp that announces weights.
template <class Buffers>
__device__ void announce_end(const Buffers& buffers, const Turn& turn) {
  ptx::wait(buffers.empty_weights(turn.slot), turn.parity ^ 1);
  if (threadIdx.x % kWarpThreads == 0) {
    buffers.put_item(turn.slot, SlabWork{});
    ptx::arrive(buffers.full_weights(turn.slot));
  }
}

// Two warps, ahead of those that multiply by as many slots as there are, into the next items too.
// Few copies a slot, as the copy engine spends time on each: with one for each tile of weights, ten
// instead of three, products took up to 9 % longer. The next item is looked up when the first slots
// have been filled: what then comes waits for the results of the item before.

template <class Shape, class Buffers>
__device__ void load_tokens(const SsmmArgs& args, const SlabScheduler<Shape>& scheduler,
                            const Buffers& buffers) {
  const int rank = blockIdx.x % Shape::kCluster;
  const bool is_leader = threadIdx.x % kWarpThreads == 0;
  const Layout& layout = args.layout;
  Turn turn;
  // Tokens alone need the previous kernel, and results follow from them. Weights and routing were
  // there before it: each kernel lets the next one start only when it has waited itself.
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  scheduler.template for_each<true>(buffers, [&](const SlabWork& work, auto&& look_ahead) {
    // Eight places at a time, so that what is copied is as it lies there; a share for each block.
    const int eights = ceil_div(work.count(), kPlaceAlign);
    const bool is_alone = work.is_alone();
    const int first = is_alone ? 0 : eights * rank / Shape::kCluster * kPlaceAlign;
    const int end = is_alone ? eights : eights * (rank + 1) / Shape::kCluster;
    const int count = end * kPlaceAlign - first;
    constexpr int kTogether = Buffers::kIsSplit ? 1 : Buffers::kHalves;  // panels of a part
    constexpr int kAtOnce = Buffers::kSlots - (Shape::kIsWide ? 1 : 0);  // not lent
    const int last_at_once = min(kAtOnce, layout.blocks) - 1;
    const int weight_bytes =
        Buffers::kIsSplit ? 0 : work.num_slabs() * Buffers::kSlabTiles * layout.block_bytes;
    const int bytes = weight_bytes + eights * kPlaceAlign * kTogether * kPanelBytes;
    for (int block = 0; block < layout.blocks; ++block) {
      for (int part = 0; part < Buffers::kHalves; part += kTogether) {
        ptx::wait(buffers.empty_tokens(turn.slot, part), turn.parity ^ 1);
        if (is_leader) {
          if (!Buffers::kIsSplit && block == 0) buffers.put_item(turn.slot, work);
          const std::uint32_t full = buffers.full_tokens(turn.slot, part);
          ptx::arrive_expecting(full, bytes);
          for (int half = part; half < part + kTogether && count > 0; ++half) {
            const std::uint8_t* tokens =
                static_cast<const std::uint8_t*>(args.x) +
                panel_offset(block * Buffers::kHalves + half, args.places, work.first + first);
            const std::uint32_t to = buffers.tokens(turn.slot, half) + first * kPanelBytes;
            if (is_alone) {
              ptx::copy_bulk<false>(to, tokens, count * kPanelBytes, full);
            } else {
              ptx::copy_bulk_to_cluster<Shape::kCluster>(to, tokens, count * kPanelBytes, full);
            }
          }
        }
        __syncwarp();
      }
      turn.advance(Buffers::kSlots);
      if (block == last_at_once) look_ahead();
    }
  });
  if constexpr (!Buffers::kIsSplit) announce_end(buffers, turn);
}

template <class Shape, class Buffers>
__device__ void load_weights(const SsmmArgs& args, const SlabScheduler<Shape>& scheduler,
                             const Buffers& buffers) {
  static_assert(kBundleTiles % Buffers::kSlabTiles == 0, "a slab lies in one bundle");
  // A copy brings what a bundle has of a part: all of it, two slabs, or where weights are two parts
  // half of it, a slab's.
  constexpr int kParts = Buffers::kWeightParts, kTiles = kBundleTiles / kParts;
  static_assert(kParts == 1 || kTiles == Buffers::kPartTiles, "a bundle is a slab, or parts whole");
  const bool is_leader = threadIdx.x % kWarpThreads == 0;
  const Layout& layout = args.layout;
  Turn turn;
  scheduler.template for_each<false>(buffers, [&](const SlabWork& work, auto&& look_ahead) {
    const std::uint8_t* expert = args.packed + work.expert * layout.expert_bytes;
    const int first = work.first_slab() * Buffers::kSlabTiles;
    const int count = work.num_slabs() * Buffers::kSlabTiles;
    constexpr int kAtOnce = Buffers::kSlots - (Shape::kIsWide ? 1 : 0);  // not lent
    const int last_at_once = min(kAtOnce, layout.blocks) - 1;
    for (int block = 0; block < layout.blocks; ++block) {
      for (int part = 0; part < kParts; ++part) {
        ptx::wait(buffers.empty_weights(turn.slot, part), turn.parity ^ 1);
        if (is_leader) {
          const std::uint32_t full = buffers.full_weights(turn.slot, part);
          if constexpr (Buffers::kIsSplit) {  // else load_tokens() announces them
            if (block == 0 && part == 0) buffers.put_item(turn.slot, work);
            ptx::arrive_expecting(full, count / kParts * layout.block_bytes);
          }
          // Contiguous: where it is two slabs, the first is even, see SlabScheduler::of().
          for (int tile = part * kTiles; tile < count; tile += kBundleTiles) {
            const int bytes = min(kTiles, count - tile) * layout.block_bytes;
            ptx::copy_bulk<false>(buffers.weights(turn.slot) + tile * Buffers::kTileBytes,
                                  expert + block_offset(layout, first + tile, block), bytes, full);
          }
        }
        __syncwarp();
      }
      turn.advance(Buffers::kSlots);
      if (block == last_at_once) look_ahead();
    }
  });
  if constexpr (Buffers::kIsSplit) announce_end(buffers, turn);
}

}  // namespace samoyeds
