// The matrix kernel: sparse weights times the tokens that the router sends to them, on mma.sp.
//
// One template serves decode and large batches. A thread block has 8 warps that multiply and one or
// four that load. It computes, an item at a time (Scheduler), 16 * kMFrags * kWarpsM kept rows x
// 8 * kNFrags * kWarpsN tokens; kWarpsK warps share a part of the result and each takes every
// kWarpsK-th block of k. Few tokens and small weights: many parts of k, so that all of the chip
// streams weights. Many tokens: one, so that a fragment meets many others.
#pragma once

#include "samoyeds/epilogue.cuh"

namespace samoyeds {

template <typename T_, int kMFrags_, int kNFrags_, int kWarpsM_, int kWarpsN_, int kWarpsK_>
struct SsmmShape {
  using T = T_;
  static constexpr int kMFrags = kMFrags_, kNFrags = kNFrags_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr int kTokens = 8 * kNFrags * kWarpsN;
  static constexpr int kTilesM = kMFrags * kWarpsM;
  static constexpr int kTilesPerStage = kTilesM * kWarpsK;
  using Accumulators = samoyeds::Accumulators<kMFrags, kNFrags>;
  // For (3, 4, V) and nothing else: a warp has tiles by threes, whose rows it stores together.
  static constexpr bool kIsStepped = Accumulators::kIsStepped;
  static constexpr int kTilesTogether = kIsStepped ? kSlots : 1;
  // More accumulators want more registers than two thread blocks can have.
  static constexpr int kMinBlocks = kMFrags * kNFrags > (kIsStepped ? 6 : 4) ? 1 : 2;
  // Fragments of tokens are left out in such steps where a tile is not full. Those made for experts
  // of few tokens, whose last tile is mostly the only one, have more steps.
  static constexpr bool kIsTall = kMFrags == 2 && kWarpsN == 1;
  static constexpr int kLiveStep = kNFrags <= 2 ? kNFrags : kIsTall ? kNFrags / 3 : kNFrags / 2;
  // Large products have a kernel for each period: four copies of their loop would spill registers.
  static constexpr bool kIsLarge = kMFrags * kNFrags > (kIsStepped ? 6 : 2);
  // The largest take registers from the warps that load, as only sm_90a can: four warps at a time.
  static constexpr bool kMovesRegisters = kMFrags * kNFrags > (kIsStepped ? 12 : 8);
  static constexpr int kLoaders = (kMinBlocks == 1 ? 4 : 1) * kWarpThreads;
  static constexpr int kThreads = kConsumers + kLoaders;
  static_assert(sizeof(T) == 2, "the matrix instruction takes 16-bit elements");
  static_assert(kWarpsM * kWarpsN * kWarpsK == kWarps, "every warp has its part");
  static_assert(!kMovesRegisters || kMinBlocks == 1, "four warps load: registers move by fours");
};

inline constexpr int kAnyPeriod = -1;  // known at run time

template <class Shape, int kSwitchPeriod, int kLive>
__device__ __forceinline__ void multiply_live(typename Shape::Accumulators& acc,
                                              std::uint32_t weights, std::uint32_t tokens,
                                              int period) {
  using T = typename Shape::T;
  if constexpr (kSwitchPeriod != kAnyPeriod) {
    multiply_block<T, kSwitchPeriod, kLive>(acc, weights, tokens);
  } else {
    switch (period) {
      case 0:  // not of (3, 4, V)
        if constexpr (!Shape::kIsStepped) multiply_block<T, 0, kLive>(acc, weights, tokens);
        return;
      case 1:
        return multiply_block<T, 1, kLive>(acc, weights, tokens);
      case 2:
        return multiply_block<T, 2, kLive>(acc, weights, tokens);
      default:
        return multiply_block<T, 4, kLive>(acc, weights, tokens);
    }
  }
}

// Only the first `live` fragments of tokens hold any, as the last tile of an expert is seldom full.
template <class Shape, int kSwitchPeriod, int kLive = Shape::kNFrags>
__device__ __forceinline__ void multiply(typename Shape::Accumulators& acc, std::uint32_t weights,
                                         std::uint32_t tokens, int live, int period) {
  constexpr int kFewer = kLive - Shape::kLiveStep;
  if constexpr (kFewer > 0) {
    if (live <= kFewer) {
      return multiply<Shape, kSwitchPeriod, kFewer>(acc, weights, tokens, live, period);
    }
  }
  multiply_live<Shape, kSwitchPeriod, kLive>(acc, weights, tokens, period);
}

// The warps that load: ahead of the others by as many stages as there are, into the next items too.
template <class Shape>
__device__ void load_items(const SsmmArgs& args, const Scheduler<Shape>& scheduler,
                           const Stages<Shape>& stages, const typename Shape::T** rows) {
  Loader<Shape> loader(args, stages, rows);
  int item = blockIdx.x, steps_started = 0;
  if (item < scheduler.num_items()) {
    loader.begin(scheduler.at(item));
    if (args.is_early) {
      // Weights do not depend on the previous kernel.
      steps_started = min(stages.count, loader.num_steps());
      for (int step = 0; step < steps_started; ++step) loader.load_weights(step, step);
    }
  }
  if (args.is_early) ptx::wait_for_previous_kernel();
  Turn turn;
  while (item < scheduler.num_items()) {
    for (int step = 0; step < loader.num_steps(); ++step) {
      if (step >= steps_started) {
        ptx::wait(stages.empty(turn.slot), turn.parity ^ 1);
        loader.load_weights(step, turn.slot);
      }
      loader.load_tokens(step, turn.slot);
      turn.advance(stages.count);
    }
    steps_started = 0;
    item += gridDim.x;
    if (item < scheduler.num_items()) loader.begin(scheduler.at(item));
  }
}

// The warps that multiply.
template <class Shape, int kSwitchPeriod>
__device__ void multiply_items(const SsmmArgs& args, const Scheduler<Shape>& scheduler,
                               const Stages<Shape>& stages) {
  const int warp = threadIdx.x / kWarpThreads;
  const int warp_n = warp % Shape::kWarpsN, warp_m = warp / Shape::kWarpsN % Shape::kWarpsM;
  const int part = warp / (Shape::kWarpsN * Shape::kWarpsM);
  const int first_token = warp_n * 8 * Shape::kNFrags, first_tile = warp_m * Shape::kMFrags;
  const int period = kSwitchPeriod != kAnyPeriod ? kSwitchPeriod : switch_period(args.layout);
  const std::uint32_t weights = (part * Shape::kTilesM + first_tile) * kBlockStride;
  const std::uint32_t tokens = (part * Shape::kTokens + first_token) * kTokenStride;
  const std::uint32_t scratch = stages.buffers + stages.count * Stages<Shape>::kBytes;

  typename Shape::Accumulators acc;
  Turn turn;
  for (int item = blockIdx.x; item < scheduler.num_items(); item += gridDim.x) {
    acc.clear();
    int num_blocks, live;
    {
      const Work work = scheduler.at(item);
      live = ceil_div(max(work.tile.count - first_token, 0), 8);
      num_blocks = work.block_end - work.block_begin;
    }
    for (int block = part; block - part < num_blocks; block += Shape::kWarpsK) {
      ptx::wait(stages.full(turn.slot), turn.parity);
      if (live > 0 && block < num_blocks) {
        multiply<Shape, kSwitchPeriod>(acc, stages.weights(turn.slot) + weights,
                                       stages.tokens(turn.slot) + tokens, live, period);
      }
      ptx::arrive(stages.empty(turn.slot));
      turn.advance(stages.count);
    }
    if (period != 0) acc.separate_rows();
    if constexpr (Shape::kIsStepped) acc.merge_slots();
    if (SumOverK<Shape>::run(acc, scratch)) {
      // Looked up again rather than kept in registers through all of k.
      const Work work = scheduler.at(item);
      store<Shape>(acc, args, work, work.first_tile_m + first_tile, first_token);
    }
  }
}

// kSwitchPeriod as for multiply_block, or kAnyPeriod.
template <class Shape, int kSwitchPeriod>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    ssmm_kernel(const __grid_constant__ SsmmArgs args) {
  if constexpr (Shape::kMovesRegisters && !ptx::kCanMoveRegisters) {
    __trap();  // check_plan() refuses such plans
    return;
  }
  extern __shared__ __align__(128) std::uint8_t buffers[];
  __shared__ std::uint64_t barriers[2 * kMaxStages];
  __shared__ const typename Shape::T* rows[Shape::kTokens];

  const Stages<Shape> stages{ptx::shared_address(buffers), ptx::shared_address(barriers),
                             args.stages};
  if (threadIdx.x == 0) stages.init();
  __syncthreads();
  if (!args.is_early) ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  if constexpr (ptx::kCanMoveRegisters || !Shape::kMovesRegisters) {
    const Scheduler<Shape> scheduler(args);
    if (threadIdx.x >= kConsumers) {
      if constexpr (Shape::kMovesRegisters) ptx::give_registers<40>();
      load_items(args, scheduler, stages, rows);
    } else {
      if constexpr (Shape::kMovesRegisters) ptx::take_registers<232>();
      multiply_items<Shape, kSwitchPeriod>(args, scheduler, stages);
    }
  }
}

}  // namespace samoyeds
