// The Hopper kernel, registers to global memory: the gate, panels or rows.
#pragma once

#include "samoyeds/epilogue.cuh"
#include "samoyeds/slab_mma.cuh"

namespace samoyeds {

// SiLU(x) = x/2 + x/2 * tanh(x/2). In bf16 by the special function for tanh: the tensor cores wait
// for the gate, and this is half of its work. Its relative error is 2^-11 (PTX ISA, "tanh"), that
// of SiLU at most 2^-12 |x|: a quarter of what bf16 rounds for x > 0, but not relative to SiLU(x)
// where that nears 0 below x = -4.
template <typename T>
__device__ __forceinline__ float gate(float x) {
  if constexpr (std::is_same_v<T, __half>) return silu(x);
  const float half = 0.5f * x;
  return fmaf(half, ptx::tanh(half), half);
}

// The results of a warpgroup, half a tile or less at a time through its staging buffer. kIsPanels:
// panels.cuh, by bulk stores, so that the next item starts while they are on their way; else rows
// [pairs, m].
template <class Shape, int kSwitchPeriod, bool kIsGated, bool kIsPanels>
class SlabStore {
  using T = typename Shape::T;
  static constexpr bool kIsSwitched = kSwitchPeriod != 0;
  static constexpr int kPanels = kIsGated ? 1 : 2;            // of a slab
  static constexpr int kRows = Shape::kTokens / 2 / kPanels;  // tokens that are staged at once
  static constexpr int kPasses = 2 * kPanels;
  static constexpr int kFrags = kRows / 8;
  static constexpr int kNumbersOffset = Shape::kTokens / 2 * kPanelBytes;  // of the rows' numbers

 public:
  // `staged`: the warpgroup's buffer, and behind it a number for each token.
  __device__ SlabStore(const SsmmArgs& args, const SlabWork& work, int slab, std::uint32_t staged)
      : args_(args),
        work_(work),
        slab_(slab),
        staged_(staged),
        warp_(threadIdx.x / kWarpThreads % kGroupWarps),
        g_(threadIdx.x % kWarpThreads / 4) {}

  __device__ void run(const SlabAccumulators<Shape>& acc) const {
    const int barrier = 1 + threadIdx.x / kGroupThreads;
    const bool is_leader = threadIdx.x % kGroupThreads == 0;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int count = min(kRows, work_.count() - pass * kRows);
      if (count <= 0) return;
      // What left the buffer before has been read.
      if (is_leader) ptx::wait_for_stores();
      ptx::sync_some(barrier, kGroupThreads);
      if (!kIsPanels && pass == 0) look_up_rows();
      stage(acc, pass);
      if constexpr (kIsPanels) ptx::make_visible_to_copies();
      ptx::sync_some(barrier, kGroupThreads);
      if constexpr (!kIsPanels) {
        store_rows(pass * kRows, count);
      } else if (is_leader) {
        store_panels(work_.first + pass * kRows, ceil_div(count, kPlaceAlign) * kPlaceAlign);
      }
    }
  }

 private:
  struct Two {
    float x, y;
  };

  __device__ std::uint32_t staged_at(int panel, int row, int column) const {
    return staged_ + (panel * kRows + row) * kPanelBytes +
           swizzled_chunk(row, column / kChunkCols) + column % kChunkCols * 2;
  }

  __device__ void stage(const SlabAccumulators<Shape>& acc, int pass) const {
    if constexpr (kIsSwitched) {
      // A kept row has two dense rows, neighbours in the result.
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const Place place(*this, c, 0);
#pragma unroll
        for (int frag = 0; frag < kFrags; ++frag) {
          const int i = (pass * kFrags + frag) * 4 + c;
          put(place, frag, {acc.d[i], acc.odd[i]}, {acc.d[i + 2], acc.odd[i + 2]});
        }
      }
    } else {
      stage_half(acc.d, 0, pass);
      stage_half(acc.odd, 1, pass);
    }
  }

  // Where a thread puts its columns of token 8 * frag + 2t + c, for each frag: those of row g of
  // its tile, and of row g + 8. half: which 64 kept rows, N = M only.
  struct Place {
    __device__ Place(const SlabStore& store, int c, int half) {
      const int token = threadIdx.x % 4 * 2 + c, g = store.g_, warp = store.warp_;
      int panel = 0, column, high_panel = 0, high_column = 0;
      if constexpr (kIsGated) {
        column = kIsSwitched ? warp * 16 + g * 2 : half * 32 + warp * 8 + g / 2 * 2;
      } else if constexpr (kIsPanels) {  // in the order of first_column_of()
        panel = kIsSwitched ? warp / 2 : half;
        column = kIsSwitched ? warp % 2 * 32 + g * 4 : warp * 16 + g / 2 * 4;
      } else if (store.args_.layout.interleaved) {  // gate rows, and up rows
        high_panel = 1;
        column = high_column = kIsSwitched ? warp * 16 + g * 2 : half * 32 + warp * 8 + g / 2 * 2;
      } else {
        panel = high_panel = kIsSwitched ? warp / 2 : half;
        column = kIsSwitched ? warp % 2 * 32 + g * 2 : warp * 16 + g / 2 * 2;
        high_column = column + (kIsSwitched ? 16 : 8);
      }
      low = store.staged_at(panel, token, column);
      high = store.staged_at(high_panel, token, high_column);
    }
    std::uint32_t low, high;
  };

  // Two neighbouring columns each, of rows g and g + 8 of the tile.
  __device__ void put(const Place& place, int frag, Two low, Two high) const {
    const int offset = frag * 8 * kPanelBytes;
    if constexpr (kIsGated) {
      ptx::store_shared(place.low + offset, pack(gate<T>(low.x) * high.x, gate<T>(low.y) * high.y));
    } else if constexpr (kIsPanels) {
      ptx::store_shared(place.low + offset, pack(low.x, low.y), pack(high.x, high.y));
    } else {
      ptx::store_shared(place.low + offset, pack(low.x, low.y));
      ptx::store_shared(place.high + offset, pack(high.x, high.y));
    }
  }

  // N = M: a kept row is one dense row. Neighbouring rows' threads exchange values, so that each
  // has two columns of one token.
  __device__ void stage_half(const float (&d)[Shape::kTokens / 2], int half, int pass) const {
    const bool is_odd = g_ % 2;
    const Place place(*this, is_odd, half);
    const auto exchange = [&](float first, float second) -> Two {
      const float other = __shfl_xor_sync(0xffffffffu, is_odd ? first : second, 4);
      return {is_odd ? other : first, is_odd ? second : other};
    };
#pragma unroll
    for (int frag = 0; frag < kFrags; ++frag) {
      const float* v = d + (pass * kFrags + frag) * 4;
      put(place, frag, exchange(v[0], v[1]), exchange(v[2], v[3]));
    }
  }

  __device__ void store_panels(int place, int count) const {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      ptx::store_bulk(static_cast<std::uint8_t*>(args_.out) +
                          panel_offset(slab_ * kPanels + panel, args_.places, place),
                      staged_ + panel * kRows * kPanelBytes, count * kPanelBytes);
    }
    ptx::commit_stores();
  }

  // Of each token of the tile, the row of the result: together, and before they are needed.
  __device__ void look_up_rows() const {
    for (int i = threadIdx.x % kGroupThreads; i < work_.count(); i += kGroupThreads) {
      const int place = work_.first + i;
      const int row = args_.tokens.pairs ? __ldg(args_.tokens.pairs + place) : place;
      ptx::store_shared(staged_ + kNumbersOffset + i * 4, static_cast<std::uint32_t>(row));
    }
  }

  // Rows [pairs, m]: sixteen threads store 128 columns of one, 16 bytes each.
  __device__ void store_rows(int first, int count) const {
    const Layout& layout = args_.layout;
    constexpr int kRowThreads = kPanels * kPanelChunks;
    const int thread = threadIdx.x % kGroupThreads, chunk = thread % kPanelChunks;
    const int panel = thread / kPanelChunks % kPanels;
    const int column = layout.interleaved ? panel * (layout.rows / 2) + slab_ * kPanelCols
                                          : (slab_ * kPanels + panel) * kPanelCols;
    T* out = static_cast<T*>(args_.out) + column + chunk * kChunkCols;
#pragma unroll 1  // the sums of the passes to come need the registers
    for (int row = thread / kRowThreads; row < count; row += kGroupThreads / kRowThreads) {
      const std::int64_t to = ptx::load_shared_word(staged_ + kNumbersOffset + (first + row) * 4);
      *reinterpret_cast<uint4*>(out + to * layout.rows) =
          ptx::load_shared(staged_at(panel, row, chunk * kChunkCols));
    }
  }

  __device__ static std::uint32_t pack(float x, float y) {
    struct alignas(4) {
      T x, y;
    } two{narrow<T>(x), narrow<T>(y)};
    return *reinterpret_cast<std::uint32_t*>(&two);
  }

  const SsmmArgs& args_;
  const SlabWork& work_;
  int slab_;
  std::uint32_t staged_;
  int warp_, g_;
};

}  // namespace samoyeds
