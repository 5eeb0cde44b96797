// The instances of the matrix kernel for a dtype; ssmm_bf16.cu and ssmm_fp16.cu compile one each.
#pragma once

#include "samoyeds/hopper.cuh"
#include "samoyeds/launch.hpp"
#include "samoyeds/ssmm.cuh"

namespace samoyeds {

template <class Shape, int kSwitchPeriod>
constexpr SsmmKernel kernel() {
  // Rows that switch at every step cost the largest products more registers than there are. Those
  // of (3, 4, V) switch one fragment after the other, but always switch.
  if constexpr (Shape::kIsStepped ? kSwitchPeriod == 0
                                  : Shape::kMovesRegisters && kSwitchPeriod == 1)
    return nullptr;
  else
    return ssmm_kernel<Shape, (Shape::kIsLarge ? kSwitchPeriod : kAnyPeriod)>;
}

template <class Shape>
constexpr SsmmVariant variant() {
  return {Shape::kMFrags,
          Shape::kNFrags,
          Shape::kWarpsM,
          Shape::kWarpsN,
          Shape::kWarpsK,
          1,
          Shape::kTokens,
          Shape::kTilesM,
          Shape::kMinBlocks,
          Shape::kThreads,
          Shape::kMovesRegisters,
          Shape::kIsStepped,
          Stages<Shape>::kBytes,
          SumOverK<Shape>::kScratchBytes,
          {kernel<Shape, 0>(), kernel<Shape, 1>(), kernel<Shape, 2>(), kernel<Shape, 4>()}};
}

template <class Shape, int kSwitchPeriod>
constexpr void add_hopper_kernel(SsmmVariant& v, int number) {
  using Buffers = HopperBuffers<Shape, kSwitchPeriod>;
  v.kernels[number] = hopper_kernel<Shape, kSwitchPeriod>;
  v.hopper_tokens[number] = Shape::kTokens;
  v.hopper_stages[number] = Buffers::kSlots;
  v.hopper_bytes[number] = Buffers::kBytes;
  v.hopper_box_rows[number] = Shape::kBoxRows;
}

template <class Shape>
constexpr SsmmVariant hopper_variant() {
  SsmmVariant v{};
  v.m_frags = v.warps_n = v.warps_k = v.min_blocks = 1;
  v.n_frags = Shape::kTokens / 8;
  v.warps_m = Shape::kGroups * 4;
  v.cluster = Shape::kCluster;
  v.threads = Shape::kThreads;
  v.needs_sm90a = v.is_hopper = true;
  return v;
}

template <typename T>
constexpr SsmmVariant full_tiles() {
  // As many tokens as there are registers for: where N = M weights take none.
  using Shape = HopperShape<T, 192, 48>;
  SsmmVariant v = hopper_variant<Shape>();
  add_hopper_kernel<HopperShape<T, 208, 96>, 0>(v, 0);
  add_hopper_kernel<Shape, 1>(v, 1);
  add_hopper_kernel<Shape, 2>(v, 2);
  add_hopper_kernel<Shape, 4>(v, 3);
  add_hopper_kernel<HopperShape<T, 200, 96, true>, 4>(v, kWideKernel);
  return v;
}

// Of so few tokens that there is more memory for results, and items take less time.
template <typename T>
constexpr SsmmVariant short_tiles() {
  using Shape = HopperShape<T, 176, 64>;
  SsmmVariant v = hopper_variant<Shape>();
  v.is_short = true;
  add_hopper_kernel<Shape, 4>(v, 3);
  return v;
}

template <typename T>
const SsmmVariant* variants() {
  static const SsmmVariant table[kNumVariants] = {
      variant<SsmmShape<T, 1, 1, 1, 1, 8>>(),
      variant<SsmmShape<T, 1, 1, 2, 1, 4>>(),
      variant<SsmmShape<T, 1, 1, 4, 1, 2>>(),
      variant<SsmmShape<T, 1, 1, 8, 1, 1>>(),
      variant<SsmmShape<T, 1, 2, 8, 1, 1>>(),
      variant<SsmmShape<T, 1, 4, 8, 1, 1>>(),
      variant<SsmmShape<T, 2, 4, 8, 1, 1>>(),
      variant<SsmmShape<T, 2, 6, 8, 1, 1>>(),
      variant<SsmmShape<T, 2, 4, 4, 2, 1>>(),
      variant<SsmmShape<T, 4, 4, 4, 2, 1>>(),
      variant<SsmmShape<T, 3, 1, 1, 1, 8>>(),
      variant<SsmmShape<T, 3, 1, 2, 1, 4>>(),
      variant<SsmmShape<T, 3, 1, 4, 1, 2>>(),
      variant<SsmmShape<T, 3, 1, 8, 1, 1>>(),
      variant<SsmmShape<T, 3, 1, 4, 2, 1>>(),
      variant<SsmmShape<T, 3, 2, 4, 2, 1>>(),
      variant<SsmmShape<T, 3, 4, 4, 2, 1>>(),
      variant<SsmmShape<T, 3, 6, 4, 2, 1>>(),
      full_tiles<T>(),
      short_tiles<T>(),
  };
  return table;
}

}  // namespace samoyeds
