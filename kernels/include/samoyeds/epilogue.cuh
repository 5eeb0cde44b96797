// Registers to global memory: the sum over the warps' parts of k, the gate, the rows' places.
#pragma once

#include "samoyeds/mma.cuh"

namespace samoyeds {

template <typename T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
}

// Two neighbours in one store: `to` is an even column, and rows have an even size.
template <typename T>
__device__ __forceinline__ void store_pair(T* to, float x, float y) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float2*>(to) = {x, y};
  } else {
    struct alignas(4) Two {
      T x, y;
    };
    *reinterpret_cast<Two*>(to) = {narrow<T>(x), narrow<T>(y)};
  }
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// Warps of the other parts of k hand over their sums; part 0 adds them in order and returns true.
template <class Shape>
class SumOverK {
  static constexpr int kFloats = Shape::kMFrags * Shape::kNFrags * 8;
  static constexpr int kWarpsPerPart = kWarps / Shape::kWarpsK;
  static constexpr int kBarrier = 1;  // 0 is __syncthreads()

 public:
  // Warps of part 0 keep their share in registers.
  static constexpr int kScratchBytes =
      (kWarps - kWarpsPerPart) * kFloats * kWarpThreads * static_cast<int>(sizeof(float));

  __device__ static bool run(typename Shape::Accumulators& acc, std::uint32_t scratch) {
    if constexpr (Shape::kWarpsK == 1) return true;
    const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
    const int part = warp / kWarpsPerPart, in_part = warp % kWarpsPerPart;
    const auto at = [&](int p, int i) {
      const int number = ((p - 1) * kWarpsPerPart + in_part) * kFloats + i;
      return scratch + static_cast<std::uint32_t>(number * kWarpThreads + lane) * 4;
    };
    ptx::sync_some(kBarrier, kConsumers);  // part 0 has read the sums of the item before
    if (part != 0) each(acc, [&](int i, float x) { ptx::store_shared(at(part, i), x); });
    ptx::sync_some(kBarrier, kConsumers);
    if (part != 0) return false;
    for (int p = 1; p < Shape::kWarpsK; ++p)
      each(acc, [&](int i, float& x) { x += ptx::load_shared_float(at(p, i)); });
    return true;
  }

 private:
  template <typename Visit>
  __device__ static void each(typename Shape::Accumulators& acc, Visit&& visit) {
    int i = 0;
#pragma unroll
    for (int m = 0; m < Shape::kMFrags; ++m) {
#pragma unroll
      for (int n = 0; n < Shape::kNFrags; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          visit(i++, acc.d[m][n][j]);
          visit(i++, acc.odd[m][n][j]);
        }
      }
    }
  }
};

// One value or, for (1, 2, V), the two neighbours that an accumulator stands for.
template <typename T>
__device__ __forceinline__ void store_rows(T* out_row, int kept, bool is_switched, float even,
                                           float odd) {
  if (is_switched) {
    store_pair(out_row + 2 * kept, even, odd);
  } else {
    out_row[kept] = narrow<T>(even);
  }
}

// Stores this warp's tiles of rows, from first_tile_m on, for its tokens, from first_token of the
// item's tile on. Out: type of the result; kIsGated: SiLU(gate) * up, else every row as it is.
template <typename Out, bool kIsGated, class Shape>
__device__ void store_as(const typename Shape::Accumulators& acc, const SsmmArgs& args,
                         const Work& work, int first_tile_m, int first_token) {
  const Layout& layout = args.layout;
  const int lane = threadIdx.x % kWarpThreads, lane_row = lane / 4, lane_token = lane % 4 * 2;
  const bool is_switched = layout.kind == Kind::kSwitched;
  const int row_size = kIsGated ? layout.rows / 2 : layout.rows;
  Out* plane = static_cast<Out*>(args.out) + work.split * args.split_stride;
  // All rows are looked up before the first is needed.
  int rows[Shape::kNFrags][2];  // -1: no token
#pragma unroll
  for (int n = 0; n < Shape::kNFrags; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int token = first_token + n * 8 + lane_token + c, place = work.tile.first + token;
      rows[n][c] = token >= work.tile.count ? -1
                   : args.tokens.pairs      ? __ldg(args.tokens.pairs + place)
                                            : place;
    }
  }
#pragma unroll
  for (int m = 0; m < Shape::kMFrags; ++m) {
    const int tile = first_tile_m + m;
    if (tile >= layout.tiles) continue;
    const int low = kept_row_of(layout, tile, lane_row);
    const int high = kept_row_of(layout, tile, lane_row + kHalfTile);
#pragma unroll
    for (int n = 0; n < Shape::kNFrags; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (rows[n][c] < 0 || low < 0) continue;  // where `low` does not exist, `high` does not
        Out* out_row = plane + static_cast<std::int64_t>(rows[n][c]) * row_size;
        const float even_low = acc.d[m][n][c], odd_low = acc.odd[m][n][c];
        const float even_high = acc.d[m][n][c + 2], odd_high = acc.odd[m][n][c + 2];
        if constexpr (kIsGated) {
          // The high row is the up row of gate row `low`; they exist together.
          store_rows(out_row, low, is_switched, silu(even_low) * even_high,
                     silu(odd_low) * odd_high);
        } else {
          store_rows(out_row, low, is_switched, even_low, odd_low);
          if (high >= 0) store_rows(out_row, high, is_switched, even_high, odd_high);
        }
      }
    }
  }
}

template <class Shape>
__device__ void store(const typename Shape::Accumulators& acc, const SsmmArgs& args,
                      const Work& work, int first_tile_m, int first_token) {
  using T = typename Shape::T;
  switch (args.output) {
    case Output::kGated:
      return store_as<T, true, Shape>(acc, args, work, first_tile_m, first_token);
    case Output::kRows:
      return store_as<T, false, Shape>(acc, args, work, first_tile_m, first_token);
    case Output::kPartial:
      return store_as<float, false, Shape>(acc, args, work, first_tile_m, first_token);
  }
}

}  // namespace samoyeds
