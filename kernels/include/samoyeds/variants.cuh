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

template <class Shape>
constexpr SsmmVariant hopper_variant() {
  SsmmVariant v{};
  v.m_frags = v.warps_n = v.warps_k = v.min_blocks = 1;
  v.n_frags = Shape::kTokens / 8;
  v.warps_m = Shape::kGroups * 4;
  v.cluster = Shape::kCluster;
  v.tokens = Shape::kTokens;
  v.threads = Shape::kThreads;
  v.needs_sm90a = v.is_hopper = true;
  v.kernels[0] = hopper_kernel<Shape, 0>;
  v.kernels[1] = hopper_kernel<Shape, 1>;
  v.kernels[2] = hopper_kernel<Shape, 2>;
  v.kernels[3] = hopper_kernel<Shape, 4>;
  const int stages[] = {HopperBuffers<Shape, 0>::kSlots, HopperBuffers<Shape, 1>::kSlots,
                        HopperBuffers<Shape, 2>::kSlots, HopperBuffers<Shape, 4>::kSlots};
  const int bytes[] = {HopperBuffers<Shape, 0>::kBytes, HopperBuffers<Shape, 1>::kBytes,
                       HopperBuffers<Shape, 2>::kBytes, HopperBuffers<Shape, 4>::kBytes};
  for (int i = 0; i < 4; ++i) v.hopper_stages[i] = stages[i], v.hopper_bytes[i] = bytes[i];
  return v;
}

template <typename T>
const SsmmVariant* variants() {
  static const SsmmVariant table[kNumVariants] = {
      variant<SsmmShape<T, 1, 1, 1, 1, 8>>(), variant<SsmmShape<T, 1, 1, 2, 1, 4>>(),
      variant<SsmmShape<T, 1, 1, 4, 1, 2>>(), variant<SsmmShape<T, 1, 1, 8, 1, 1>>(),
      variant<SsmmShape<T, 1, 2, 8, 1, 1>>(), variant<SsmmShape<T, 1, 4, 8, 1, 1>>(),
      variant<SsmmShape<T, 2, 4, 8, 1, 1>>(), variant<SsmmShape<T, 2, 6, 8, 1, 1>>(),
      variant<SsmmShape<T, 2, 4, 4, 2, 1>>(), variant<SsmmShape<T, 4, 4, 4, 2, 1>>(),
      variant<SsmmShape<T, 3, 1, 1, 1, 8>>(), variant<SsmmShape<T, 3, 1, 2, 1, 4>>(),
      variant<SsmmShape<T, 3, 1, 4, 1, 2>>(), variant<SsmmShape<T, 3, 1, 8, 1, 1>>(),
      variant<SsmmShape<T, 3, 1, 4, 2, 1>>(), variant<SsmmShape<T, 3, 2, 4, 2, 1>>(),
      variant<SsmmShape<T, 3, 4, 4, 2, 1>>(), variant<SsmmShape<T, 3, 6, 4, 2, 1>>(),
      hopper_variant<HopperShape<T>>(),
  };
  return table;
}

}  // namespace samoyeds
