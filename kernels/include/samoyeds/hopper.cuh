// The matrix kernel of Hopper for many tokens: the same product as ssmm.cuh, on wgmma.sp.
//
// A thread block has two warpgroups that multiply and one that loads and stores, and stays until
// all items are done. An item is a tile of tokens of one expert times up to four slabs, one for
// each warpgroup of a cluster of two thread blocks. A slab is 128 dense rows: 64 kept rows of (1,
// 2, V), with two sums each, or two times 64 kept rows where N = M. Each block of a cluster loads
// half of the tokens for both, but where it has a tile of its own: see SlabScheduler::at().
//
// What limits it, as far as runs have shown: shared memory, where the instruction reads 98 KB of
// tokens in a step of 128 columns, the warps 19 KB of weights, and 68 KB arrive. A step takes some
// 1150 clocks, beside 768 of wgmma.sp, and an item some 3000 more for its results.
#pragma once

#include "samoyeds/slab_load.cuh"
#include "samoyeds/slab_mma.cuh"
#include "samoyeds/slab_store.cuh"

namespace samoyeds {

// Calls run(std::integral_constant<int, size>), where size is the number of tokens to multiply for
// so many steps of them.
template <class Shape, int kMost = ceil_div(Shape::kTokens, kLiveStep), typename Run>
__device__ __forceinline__ void for_size(int steps, Run&& run) {
  constexpr int kSize = kMost * kLiveStep < Shape::kTokens ? kMost * kLiveStep : Shape::kTokens;
  if (steps == kMost) return run(std::integral_constant<int, kSize>{});
  if constexpr (kMost > 1) for_size<Shape, kMost - 1>(steps, run);
}

// A warpgroup without a slab in this item still signals.
template <class Buffers>
__device__ void skip_blocks(const Buffers& buffers, Turn& turn, int blocks) {
  for (int block = 0; block < blocks; ++block) {
    for (int part = 0; part < Buffers::kWeightParts; ++part) {
      buffers.wait_for_weights(turn.slot, turn.parity, part);
      buffers.release_weights(turn.slot, part);
    }
    for (int half = 0; half < Buffers::kHalves; ++half) {
      buffers.wait_for_tokens(turn.slot, half, turn.parity);
      buffers.release_tokens(turn.slot, half);
    }
    turn.advance(Buffers::kSlots);
  }
}

// Calls run(SlabPasses) with those of an output.
// NOTE: of all outputs, also where tiles are wide, whose results are a matrix: with that alone
// ptxas (CUDA 13.0) no longer sees that all lanes of a warp are at the same place of the ring, and
// matrix instructions wait for their descriptors. Products took 2 % longer.
template <class Shape, typename Run>
__device__ __forceinline__ void for_output(Output output, Run&& run) {
  if (output == Output::kGated) return run(SlabPasses<Shape, Output::kGated>{});
  if (output == Output::kPanels) return run(SlabPasses<Shape, Output::kPanels>{});
  if (output == Output::kMatrix) return run(SlabPasses<Shape, Output::kMatrix>{});
  run(SlabPasses<Shape, Output::kRows>{});
}

template <class Shape, int kSwitchPeriod, class Buffers>
__device__ void multiply_slabs(const SsmmArgs& args, const Buffers& buffers) {
  const int group = uniform(threadIdx.x / kGroupThreads);
  const int warp = uniform(threadIdx.x / kWarpThreads) % kGroupWarps;
  constexpr bool kTakesTurns = kSwitchPeriod == 2;
  const int blocks = args.layout.blocks;
  Turn turn;
  if constexpr (kTakesTurns) Turns::start(group);
  for (int parity = 0;; parity ^= 1) {  // of the item's number
    const SlabWork work = buffers.item_with_weights(turn);
    if (work.count() == 0) break;
    if (group >= work.num_slabs()) {
      skip_blocks(buffers, turn, blocks);
      for_output<Shape>(args.output, [&](auto passes) {
        SlabStage<Shape, kSwitchPeriod, decltype(passes)>(args, buffers, group).skip(parity);
      });
      continue;
    }
    const Turns turns(group, work.num_slabs() == Shape::kGroups);
    SlabAccumulators<Shape> acc;
    acc.template clear<kSwitchPeriod>();
    const int first_tile = group * Buffers::kSlabTiles + warp;
    for_size<Shape>(ceil_div(work.count(), kLiveStep), [&](auto size) {
      SlabProduct<Shape, kSwitchPeriod, decltype(size)::value, Buffers>(acc, buffers, first_tile,
                                                                        turns)
          .run(turn, blocks);
    });
    if constexpr (kSwitchPeriod != 0) acc.separate_rows();
    const int last_slot = (turn.slot == 0 ? Buffers::kSlots : turn.slot) - 1;
    for_output<Shape>(args.output, [&](auto passes) {
      SlabStage<Shape, kSwitchPeriod, decltype(passes)>(args, buffers, group)
          .run(acc, parity, work, last_slot);
    });
  }
  if constexpr (kTakesTurns) Turns::finish(group);
  for_output<Shape>(args.output, [&](auto passes) {
    SlabStage<Shape, kSwitchPeriod, decltype(passes)>(args, buffers, group).finish();
  });
}

// By the four warps that do not multiply.
template <class Shape, int kSwitchPeriod, class Buffers>
__device__ void help(const SsmmArgs& args, const SlabScheduler<Shape>& scheduler,
                     const Buffers& buffers) {
  static_assert(Shape::kGroups == 2, "two warps load, two store");
  const int warp = uniform(threadIdx.x / kWarpThreads) % kGroupWarps;
  if (warp == 0) return load_tokens(args, scheduler, buffers);
  if (warp == 1) return load_weights(args, scheduler, buffers);
  for_output<Shape>(args.output, [&](auto passes) {
    const int group = warp - 2;
    if constexpr (decltype(passes)::kIsCopied) {
      SlabStore<Shape, kSwitchPeriod, decltype(passes)>(args, buffers, group).run();
    } else {
      bring_numbers(args, scheduler, buffers, group);
    }
  });
}

template <class Shape, int kSwitchPeriod>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    hopper_kernel(const __grid_constant__ SsmmArgs args) {
  if constexpr (!ptx::kHasWgmma) {
    __trap();  // check_plan() refuses such plans
    return;
  }
  if constexpr (ptx::kHasWgmma) {
    using Buffers = HopperBuffers<Shape, kSwitchPeriod>;
    // NOTE: aligned here: a stricter __align__ would hold for every kernel of the file, and take
    // shared memory from those that need less.
    extern __shared__ __align__(128) std::uint8_t memory[];
    const Buffers buffers{(ptx::shared_address(memory) + Buffers::kAlignment - 1) &
                          ~static_cast<std::uint32_t>(Buffers::kAlignment - 1)};
    if (threadIdx.x == 0) buffers.init();
    ptx::sync_cluster();
    if (threadIdx.x >= Shape::kGroups * kGroupThreads) {
      ptx::give_registers<Shape::kHelperRegisters>();
      help<Shape, kSwitchPeriod>(args, SlabScheduler<Shape>(args), buffers);
    } else {
      ptx::take_registers<Shape::kRegisters>();
      multiply_slabs<Shape, kSwitchPeriod>(args, buffers);
    }
    // The others may still signal this block's barriers, or copy into it.
    ptx::sync_cluster();
  }
}

}  // namespace samoyeds
