// The instances of the matrix kernel for a dtype; ssmm_bf16.cu and ssmm_fp16.cu compile one each.
#pragma once

#include "samoyeds/launch.hpp"
#include "samoyeds/ssmm.cuh"

namespace samoyeds {

template <class Shape, int kSwitchPeriod>
constexpr SsmmKernel kernel() {
  // Rows that switch at every step cost the largest products more registers than there are.
  if constexpr (Shape::kMovesRegisters && kSwitchPeriod == 1)
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
          Shape::kCluster,
          Shape::kTokens,
          Shape::kTilesM,
          Shape::kMinBlocks,
          Shape::kThreads,
          Shape::kMovesRegisters,
          Stages<Shape>::kBytes,
          SumOverK<Shape>::kScratchBytes,
          {kernel<Shape, 0>(), kernel<Shape, 1>(), kernel<Shape, 2>(), kernel<Shape, 4>()}};
}

template <typename T>
const SsmmVariant* variants() {
  static const SsmmVariant table[kNumVariants] = {
      variant<SsmmShape<T, 1, 1, 1, 1, 8>>(),    variant<SsmmShape<T, 1, 1, 2, 1, 4>>(),
      variant<SsmmShape<T, 1, 1, 4, 1, 2>>(),    variant<SsmmShape<T, 1, 1, 8, 1, 1>>(),
      variant<SsmmShape<T, 1, 2, 4, 1, 2>>(),    variant<SsmmShape<T, 1, 2, 8, 1, 1>>(),
      variant<SsmmShape<T, 1, 4, 8, 1, 1>>(),    variant<SsmmShape<T, 2, 4, 4, 2, 1>>(),
      variant<SsmmShape<T, 4, 4, 4, 2, 1>>(),    variant<SsmmShape<T, 4, 4, 2, 4, 1>>(),
      variant<SsmmShape<T, 4, 4, 4, 2, 1, 2>>(),
  };
  return table;
}

}  // namespace samoyeds
