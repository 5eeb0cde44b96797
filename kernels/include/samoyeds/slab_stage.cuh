// The Hopper kernel, registers to shared memory: the gate, panels or a matrix, which a warp for
// each warpgroup copies from there, see slab_store.cuh; and rows. Rows of pairs lie anywhere: more
// work than one warp gets done meanwhile (products took 6 to 13 % longer), so those that multiply
// store them.
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

// The passes in which a warpgroup's results go out.
template <class Shape, Output kOutput>
struct SlabPasses {
  static constexpr bool kIsGated = kOutput == Output::kGated;
  static constexpr bool kIsMatrix = kOutput == Output::kMatrix;
  static constexpr bool kIsPanels = kIsGated || kOutput == Output::kPanels;
  static constexpr bool kIsCopied = kIsPanels || kIsMatrix;  // by SlabStore; else by SlabStage
  static constexpr int kPanels = kIsGated ? 1 : 2;           // of a slab
  static constexpr int kRows = Shape::kPassRows / kPanels;   // tokens of a pass, at most
  static constexpr int kFew = Shape::kFewRows / kPanels, kOwn = Shape::kOwnRows / kPanels;
  static constexpr int kCount = Shape::kIsWide ? kWidePasses : ceil_div(Shape::kTokens, kRows);

  // Its first token; there is a pass where there are more tokens than those before it.
  // NOTE: by these functions ptxas unrolls less where a pass is not known when the kernel is
  // compiled, so there they are called for wide tiles alone.
  __device__ static constexpr int first(int pass) {
    if (!Shape::kIsWide) return pass * kRows;
    return ((pass > 0) + (pass > 3)) * kFew + ((pass > 1) + (pass > 2)) * kRows;
  }
  // Its tokens, at most.
  __device__ static constexpr int most(int pass) {
    const int left = Shape::kTokens - first(pass);
    return left < room(pass) ? left : room(pass);
  }
  // Tokens that there is room for.
  __device__ static constexpr int room(int pass) {
    if (!Shape::kIsWide || pass == 1 || pass == 2) return kRows;
    return pass < kCount - 1 ? kFew : kOwn;
  }

  // In shared memory.
  __device__ static std::uint32_t at(std::uint32_t results, int pass, int panel, int row,
                                     int column) {
    return results + (panel * (Shape::kIsWide ? room(pass) : kRows) + row) * kPanelBytes +
           swizzled_chunk(row, column / kChunkCols) + column % kChunkCols * 2;
  }
  // Of rows or a matrix, where a panel of a slab begins.
  __device__ static int column(const Layout& layout, int slab, int panel) {
    return layout.interleaved ? panel * (layout.rows / 2) + slab * kPanelCols
                              : (slab * kPanels + panel) * kPanelCols;
  }
};

// By a warpgroup: its results to shared memory, and rows from there to global memory.
template <class Shape, int kSwitchPeriod, class Passes>
class SlabStage {
  using T = typename Shape::T;
  using Buffers = HopperBuffers<Shape, kSwitchPeriod>;
  static constexpr bool kIsSwitched = kSwitchPeriod != 0;
  static constexpr bool kIsGated = Passes::kIsGated, kIsPanels = Passes::kIsPanels;
  static constexpr bool kIsCopied = Passes::kIsCopied;
  static constexpr int kFrags = Passes::kRows / 8;
  static_assert(Passes::kCount <= Buffers::kMaxPasses, "each has a barrier");

 public:
  __device__ SlabStage(const SsmmArgs& args, const Buffers& buffers, int group)
      : args_(args),
        buffers_(buffers),
        group_(group),
        // NOTE: at V = 64, what follows from it would be kept in registers during the item, of
        // which there are too few; elsewhere it fits, and computing it again takes time.
        thread_(kSwitchPeriod == 2 ? ptx::here(threadIdx.x) : threadIdx.x),
        warp_(thread_ / kWarpThreads % kGroupWarps),
        g_(thread_ % kWarpThreads / 4) {}

  // parity: of how many items this thread block has had; slot: the item's last.
  __device__ void run(const SlabAccumulators<Shape>& acc, int parity, const SlabWork& work,
                      int slot) const {
    if constexpr (kIsCopied) {
      hand_over(acc, work, slot);
    } else {
      wait_for_numbers(parity);
      rows(acc, work, slot);
      Buffers::let_numbers_go(group_);
    }
  }

  // Of an item in which this warpgroup has no slab.
  __device__ void skip(int parity) const {
    if constexpr (!kIsCopied) {
      wait_for_numbers(parity);
      Buffers::let_numbers_go(group_);
    }
  }

  // There are no more items.
  __device__ void finish() const {
    if constexpr (kIsCopied) {
      for (int pass = 0; pass < Buffers::kOwn; ++pass) Buffers::wait_until_free(group_, pass);
      tell(SlabWork{}, 0);
      arrive(0);
    }
  }

 private:
  __device__ void wait_for_numbers(int parity) const {
    ptx::wait(buffers_.staged(group_, 0), parity);
  }

  __device__ void hand_over(const SlabAccumulators<Shape>& acc, const SlabWork& work,
                            int slot) const {
#pragma unroll
    for (int pass = 0; pass < Passes::kCount; ++pass) {
      if (Passes::first(pass) >= work.count()) return;
      if (!Buffers::is_lent(pass)) {
        Buffers::wait_until_free(group_, pass);
        if (pass == 0) tell(work, slot);
      } else if (pass == 1) {
        Buffers::wait_for_others(work.num_slabs());
      }
      stage(acc, pass, buffers_.results(group_, pass, slot));
      ptx::make_visible_to_copies();  // those that store it, or that fill the slot again
      arrive(pass);
    }
  }

  // The warp that stores, whose results come.
  __device__ void tell(const SlabWork& work, int slot) const {
    if (threadIdx.x % kGroupThreads == 0) buffers_.put_results_of(group_, work, slot);
  }

  __device__ void arrive(int pass) const {
    arrive_for_warp<1>([&](int) { ptx::arrive(buffers_.staged(group_, pass)); });
  }

  // While some threads still store a pass, others may stage the next. Wide tiles never come here,
  // see for_output().
  __device__ void rows(const SlabAccumulators<Shape>& acc, const SlabWork& work, int slot) const {
#pragma unroll
    for (int pass = 0; pass < Passes::kCount; ++pass) {
      if (Passes::first(pass) >= work.count()) break;
      stage(acc, pass, buffers_.results(group_, pass, slot));
      Buffers::sync_group(group_);
      store_rows(work, pass, slot);
    }
    Buffers::sync_group(group_);
  }

  // Rows [pairs, m]: sixteen threads store 128 columns of one, 16 bytes each.
  __device__ void store_rows(const SlabWork& work, int pass, int slot) const {
    const Layout& layout = args_.layout;
    constexpr int kRowThreads = Passes::kPanels * kPanelChunks;
    // NOTE: computed earlier, it would leave too few registers for stores of 16 bytes.
    const int thread = ptx::here(threadIdx.x % kGroupThreads), chunk = thread % kPanelChunks;
    const int panel = thread / kPanelChunks % Passes::kPanels, slab = work.first_slab() + group_;
    T* out = static_cast<T*>(args_.out) + Passes::column(layout, slab, panel) + chunk * kChunkCols;
    const std::uint32_t results = buffers_.results(group_, pass, slot);
    const int first = Passes::first(pass);
    constexpr int kStep = kGroupThreads / kRowThreads;
    const int rows = Shape::kIsWide ? Passes::most(pass) : Passes::kRows;
#pragma unroll 1
    for (int row = thread / kRowThreads; row < rows; row += kStep) {
      const std::uint64_t to = ptx::load_shared_word(buffers_.numbers(group_) + (first + row) * 4);
      const uint4 columns =
          ptx::load_shared(Passes::at(results, pass, panel, row, chunk * kChunkCols));
      if (first + row >= work.count()) continue;
      *reinterpret_cast<uint4*>(out + to * static_cast<std::uint32_t>(layout.rows)) = columns;
    }
  }

  // Of 8 tokens; the last pass may have fewer.
  __device__ static constexpr int first_frag(int pass) {
    return Shape::kIsWide ? Passes::first(pass) / 8 : pass * kFrags;
  }
  __device__ static constexpr int frags_of(int pass) {
    const int left = Shape::kTokens / 8 - first_frag(pass), most = Passes::room(pass) / 8;
    return left < most ? left : most;
  }

  struct Two {
    float x, y;
  };

  __device__ void stage(const SlabAccumulators<Shape>& acc, int pass, std::uint32_t results) const {
    if constexpr (kIsSwitched) {
      // A kept row has two dense rows, neighbours in the result.
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const Place place(*this, results, pass, c, 0);
#pragma unroll
        for (int frag = 0; frag < frags_of(pass); ++frag) {
          const int i = (first_frag(pass) + frag) * 4 + c;
          put(place, frag, {acc.d[i], acc.odd[i]}, {acc.d[i + 2], acc.odd[i + 2]});
        }
      }
    } else {
      stage_half(acc.d, 0, pass, results);
      stage_half(acc.odd, 1, pass, results);
    }
  }

  // Where a thread puts its columns of token 8 * frag + 2t + c, for each frag: those of row g of
  // its tile, and of row g + 8. half: which 64 kept rows, N = M only.
  struct Place {
    __device__ Place(const SlabStage& stage, std::uint32_t results, int pass, int c, int half) {
      const int token = stage.thread_ % 4 * 2 + c, g = stage.g_, warp = stage.warp_;
      int panel = 0, column, high_panel = 0, high_column = 0;
      if constexpr (kIsGated) {
        column = kIsSwitched ? warp * 16 + g * 2 : half * 32 + warp * 8 + g / 2 * 2;
      } else if constexpr (kIsPanels) {  // in the order of first_column_of()
        panel = kIsSwitched ? warp / 2 : half;
        column = kIsSwitched ? warp % 2 * 32 + g * 4 : warp * 16 + g / 2 * 4;
      } else if (stage.args_.layout.interleaved) {  // gate rows, and up rows
        high_panel = 1;
        column = high_column = kIsSwitched ? warp * 16 + g * 2 : half * 32 + warp * 8 + g / 2 * 2;
      } else {
        panel = high_panel = kIsSwitched ? warp / 2 : half;
        column = kIsSwitched ? warp % 2 * 32 + g * 2 : warp * 16 + g / 2 * 2;
        high_column = column + (kIsSwitched ? 16 : 8);
      }
      low = Passes::at(results, pass, panel, token, column);
      high = Passes::at(results, pass, high_panel, token, high_column);
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
  __device__ void stage_half(const float (&d)[Shape::kTokens / 2], int half, int pass,
                             std::uint32_t results) const {
    const bool is_odd = g_ % 2;
    const Place place(*this, results, pass, is_odd, half);
    const auto exchange = [&](float first, float second) -> Two {
      const float other = __shfl_xor_sync(0xffffffffu, is_odd ? first : second, 4);
      return {is_odd ? other : first, is_odd ? second : other};
    };
#pragma unroll
    for (int frag = 0; frag < frags_of(pass); ++frag) {
      const float* v = d + (first_frag(pass) + frag) * 4;
      put(place, frag, exchange(v[0], v[1]), exchange(v[2], v[3]));
    }
  }

  __device__ static std::uint32_t pack(float x, float y) {
    struct alignas(4) {
      T x, y;
    } two{narrow<T>(x), narrow<T>(y)};
    return *reinterpret_cast<std::uint32_t*>(&two);
  }

  const SsmmArgs& args_;
  const Buffers& buffers_;
  int group_, thread_, warp_, g_;
};

}  // namespace samoyeds
