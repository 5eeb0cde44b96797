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

// Four neighbours, likewise: `to` is a multiple of four columns, and rows have such a size.
template <typename T>
__device__ __forceinline__ void store_four(T* to, const float (&x)[4]) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
  } else {
    struct alignas(8) Four {
      T x, y, z, w;
    };
    *reinterpret_cast<Four*>(to) = {narrow<T>(x[0]), narrow<T>(x[1]), narrow<T>(x[2]),
                                    narrow<T>(x[3])};
  }
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// Warps of the other parts of k hand over their sums; part 0 adds them in order and returns true.
template <class Shape>
class SumOverK {
  // Of a lane: d of each fragment, and odd of each but those that are added already.
  static constexpr int kFloats =
      (Shape::kMFrags + Shape::kMFrags / Shape::kTilesTogether) * Shape::kNFrags * 4;
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
          if (Shape::Accumulators::keeps_odd(m)) visit(i++, acc.odd[m][n][j]);
        }
      }
    }
  }
};

// The dense rows that accumulator i of fragment m stands for, or of fragments m to m + 2.
template <class Shape>
struct DenseRows {
  static constexpr int kCount = Shape::kIsStepped ? kSteppedM : 2;
  float x[kCount];

  __device__ __forceinline__ DenseRows(const typename Shape::Accumulators& acc, int m, int n,
                                       int i) {
    x[0] = acc.d[m][n][i];
    if constexpr (Shape::kIsStepped) {
      x[1] = acc.d[m + 1][n][i];
      x[2] = acc.d[m + 2][n][i];
      x[3] = acc.odd[m + 2][n][i];
    } else {
      x[1] = acc.odd[m][n][i];
    }
  }

  __device__ __forceinline__ void gate(const DenseRows& up) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = silu(x[i]) * up.x[i];
  }

  // place: as place_of(). is_switched: x are two neighbours, else only the first counts.
  template <typename Out>
  __device__ __forceinline__ void store(Out* out_row, int place, bool is_switched) const {
    if constexpr (Shape::kIsStepped) {
      store_four(out_row + kSteppedM * place, x);
    } else if (is_switched) {
      store_pair(out_row + 2 * place, x[0], x[1]);
    } else {
      out_row[place] = narrow<Out>(x[0]);
    }
  }
};

// Stores this warp's tiles of rows, from first_tile_m on, for its tokens, from first_token of the
// item's tile on. Out: type of the result; kIsGated: SiLU(gate) * up, else every row as it is.
template <typename Out, bool kIsGated, class Shape>
__device__ void store_as(const typename Shape::Accumulators& acc, const SsmmArgs& args,
                         const Work& work, int first_tile_m, int first_token) {
  const Layout& layout = args.layout;
  const int lane = threadIdx.x % kWarpThreads, lane_row = lane / 4, lane_token = lane % 4 * 2;
  const bool is_switched = layout.kind == Kind::kSwitched;
  // NOTE: computed before k is, it would cost the instances with the fewest registers a spill.
  const int row_size = kIsGated ? ptx::here(layout.rows) / 2 : layout.rows;
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
  for (int m = 0; m < Shape::kMFrags; m += Shape::kTilesTogether) {
    const int tile = first_tile_m + m;
    if (tile >= layout.tiles) continue;
    const int low = place_of(layout, tile / Shape::kTilesTogether, lane_row);
    const int high = place_of(layout, tile / Shape::kTilesTogether, lane_row + kHalfTile);
#pragma unroll
    for (int n = 0; n < Shape::kNFrags; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (rows[n][c] < 0 || low < 0) continue;  // where `low` does not exist, `high` does not
        Out* out_row = plane + static_cast<std::int64_t>(rows[n][c]) * row_size;
        DenseRows<Shape> low_rows(acc, m, n, c);
        const DenseRows<Shape> high_rows(acc, m, n, c + 2);
        if constexpr (kIsGated) {
          // The high rows are the up rows of the low ones, gate rows; they exist together.
          low_rows.gate(high_rows);
          low_rows.store(out_row, low, is_switched);
        } else {
          low_rows.store(out_row, low, is_switched);
          if (high >= 0) high_rows.store(out_row, high, is_switched);
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
