// Shared memory to registers to sparse tensor cores.
//
// (1, 2, V) without resetting accumulators: D runs through all of k, as if the weight were plain
// 2:4, and is the sum of both dense rows. Let s_j be 1 where Sub-Row j belongs to the odd row.
// Whenever s changes, odd += (s_old - s_new) * D; at the end odd += s_last * D, even = D - odd.
// One multiply-add an accumulator every V columns (128 at most), for two results an accumulator.
//
// (3, 4, V) is the same for each of a block's three slots: "even" is row s of the block, "odd" row
// s + 1. Then rows that two slots have in common are added up.
//
// NOTE: a non-finite weight or activation in one of two such rows therefore reaches the other.
#pragma once

#include "samoyeds/load.cuh"

namespace samoyeds {

// Fragment A of a step, from a block in shared memory; by a whole warp.
__device__ __forceinline__ uint4 load_values(std::uint32_t block, int step) {
  // Lane l addresses row l%8 of the matrix of register l/8.
  const int lane = threadIdx.x % kWarpThreads;
  std::uint32_t a[4];
  ptx::load_matrices(
      a, block + matrix_offset(step, lane / kHalfTile) + lane % kHalfTile * kMatrixRowBytes);
  return {a[0], a[1], a[2], a[3]};
}

// Its metadata and the next step's.
__device__ __forceinline__ std::uint32_t load_meta(std::uint32_t block, int pair) {
  const int lane = threadIdx.x % kWarpThreads;
  return ptx::load_shared_word(block + meta_pair_offset(pair) + lane * 4);
}

template <int kMFrags, int kNFrags>
struct Accumulators {
  float d[kMFrags][kNFrags][4];  // [..][0, 1] row g, [..][2, 3] row g + 8; tokens 2t, 2t + 1
  float odd[kMFrags][kNFrags][4];
  std::uint32_t rows[kMFrags];  // bit r: row r takes the odd dense row at present
  static constexpr bool kIsStepped = kMFrags % kSlots == 0;

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < kMFrags; ++m) {
      rows[m] = 0;
#pragma unroll
      for (int n = 0; n < kNFrags; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d[m][n][i] = odd[m][n][i] = 0.f;
      }
    }
  }

  __device__ __forceinline__ void switch_rows(int m, std::uint32_t next) {
    if constexpr (kIsStepped) {
      // NOTE: taken by whole warps, and also what keeps the compiler from moving the additions
      // behind the products that follow, where they would need a second copy of d.
      if (next == rows[m]) return;
    }
    const std::uint32_t low_row = 1u << threadIdx.x % kWarpThreads / 4;
    const std::uint32_t high_row = low_row << kHalfTile;
    const auto change = [&](std::uint32_t row) {
      return (rows[m] & row ? 1.f : 0.f) - (next & row ? 1.f : 0.f);
    };
    const float low = change(low_row), high = change(high_row);
    rows[m] = next;
#pragma unroll
    for (int n = 0; n < kNFrags; ++n) {
      odd[m][n][0] = fmaf(low, d[m][n][0], odd[m][n][0]);
      odd[m][n][1] = fmaf(low, d[m][n][1], odd[m][n][1]);
      odd[m][n][2] = fmaf(high, d[m][n][2], odd[m][n][2]);
      odd[m][n][3] = fmaf(high, d[m][n][3], odd[m][n][3]);
    }
  }

  // Afterwards d holds the even dense rows and odd the odd ones.
  __device__ void separate_rows() {
#pragma unroll
    for (int m = 0; m < kMFrags; ++m) {
      switch_rows(m, 0);
#pragma unroll
      for (int n = 0; n < kNFrags; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d[m][n][i] -= odd[m][n][i];
      }
    }
  }

  // Of slots in fragments m, m + 1, m + 2, after separate_rows(). Afterwards their d holds rows 0,
  // 1, 2 of the block, and `odd` of the last of them row 3.
  __device__ void merge_slots() {
    static_assert(kIsStepped, "a thread has all slots of a block");
#pragma unroll
    for (int m = 0; m < kMFrags; ++m) {
      if (m % kSlots == 0) continue;
#pragma unroll
      for (int n = 0; n < kNFrags; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d[m][n][i] += odd[m - 1][n][i];
      }
    }
  }

  // What is left to sum and to store at the end: all but the odd rows that merge_slots() has added.
  __device__ static constexpr bool keeps_odd(int m) {
    return !kIsStepped || m % kSlots == kSlots - 1;
  }
};

// One block of 128 columns. `weights` and `tokens` are this warp's in shared memory. The odd-row
// bits change at most every kSwitchPeriod steps, as switch_period(); the first kLive fragments of
// tokens are multiplied.
template <typename T, int kSwitchPeriod, int kLive, int kMFrags, int kNFrags>
__device__ __forceinline__ void multiply_block(Accumulators<kMFrags, kNFrags>& acc,
                                               std::uint32_t weights, std::uint32_t tokens) {
  static_assert(kSwitchPeriod == 0 || kSwitchPeriod == 1 || kSwitchPeriod == 2 ||
                    kSwitchPeriod == kStepsPerBlock,
                "the periods that switch_period() knows");
  static_assert(kLive > 0 && kLive <= kNFrags, "live fragments are some of the warp's");
  const int lane = threadIdx.x % kWarpThreads;
  const auto switch_fragment = [&](int m, int step) {
    acc.switch_rows(m, ptx::load_shared_word(weights + m * kBlockStride + kRowsOffset + step * 4));
  };
  const auto switch_rows = [&](int step) {
#pragma unroll
    for (int m = 0; m < kMFrags; ++m) switch_fragment(m, step);
  };
  constexpr bool kSwitchesInside = kSwitchPeriod == 1 || kSwitchPeriod == 2;
  // While the tensor cores multiply one fragment the next one switches.
  constexpr bool kSwitchesOneByOne = Accumulators<kMFrags, kNFrags>::kIsStepped;
  if constexpr (kSwitchPeriod == kStepsPerBlock) switch_rows(0);
  // NOTE: not unrolled: fragments of later steps would be read early, into registers that the
  // accumulators need.
#pragma unroll 1
  for (int pair = 0; pair < kStepsPerBlock / 2; ++pair) {
    std::uint32_t meta[kMFrags];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int step = pair * 2 + half;
      if constexpr (kSwitchesInside && !kSwitchesOneByOne) {
        if (step % kSwitchPeriod == 0) switch_rows(step);
      }
      // Lane l addresses chunk l/8 of the step's four, row l%8 of the fragment's eight.
      const int chunk = step * kStepCols * 2 + lane / 8 * 16;
      std::uint32_t b[kLive][4];
#pragma unroll
      for (int n = 0; n < kLive; ++n) {
        ptx::load_matrices(b[n], tokens + (n * 8 + lane % 8) * kTokenStride + chunk);
      }
#pragma unroll
      for (int m = 0; m < kMFrags; ++m) {
        const std::uint32_t tile = weights + m * kBlockStride;
        if constexpr (kSwitchesInside && kSwitchesOneByOne) {
          if (step % kSwitchPeriod == 0) switch_fragment(m, step);
        }
        const uint4 a = load_values(tile, step);
        if (half == 0) meta[m] = load_meta(tile, pair);
#pragma unroll
        for (int n = 0; n < kLive; ++n) {
          if (half == 0) {
            ptx::multiply_sparse<T, 0>(acc.d[m][n], a, b[n], meta[m]);
          } else {
            ptx::multiply_sparse<T, 1>(acc.d[m][n], a, b[n], meta[m]);
          }
        }
      }
    }
  }
}

}  // namespace samoyeds
