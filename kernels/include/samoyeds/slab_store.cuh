// The Hopper kernel, shared to global memory, by one warp for each warpgroup, while those go on:
// copies of their results, or the numbers of the rows that they store themselves.
#pragma once

#include "samoyeds/slab_scheduler.cuh"
#include "samoyeds/slab_stage.cuh"

namespace samoyeds {

// By one warp for each warpgroup, where that stores rows: of each token of a tile the row of the
// result, ahead of time.
template <class Shape, class Buffers>
__device__ void bring_numbers(const SsmmArgs& args, const SlabScheduler<Shape>& scheduler,
                              const Buffers& buffers, int group) {
  const int lane = threadIdx.x % kWarpThreads;
  scheduler.template for_each<false>(buffers, [&](const SlabWork& work, auto&& look_ahead) {
    for (int i = lane; i < work.count(); i += kWarpThreads) {
      const int place = work.first + i;
      const int row = args.tokens.pairs ? __ldg(args.tokens.pairs + place) : place;
      ptx::store_shared(buffers.numbers(group) + i * 4, static_cast<std::uint32_t>(row));
    }
    arrive_for_warp<kGroupWarps>([&](int) { ptx::arrive(buffers.staged(group, 0)); });
    look_ahead();
    Buffers::wait_until_numbers_are_read(group);
  });
}

// By one warp for each warpgroup: its panels to global memory, while the next item is multiplied.
template <class Shape, int kSwitchPeriod, class Passes>
class SlabStore {
  using Buffers = HopperBuffers<Shape, kSwitchPeriod>;
  static_assert(Passes::kIsCopied, "rows are stored by SlabStage");
  static constexpr int kBoxRows = Shape::kBoxRows;
  static_assert(!Passes::kIsMatrix || Passes::kRows % kBoxRows == 0, "a pass is whole boxes");
  static_assert(kLiveStep % kBoxRows == 0, "so is a full tile, of a multiple of kLiveStep");

 public:
  __device__ SlabStore(const SsmmArgs& args, const Buffers& buffers, int group)
      : args_(args), buffers_(buffers), group_(group) {}

  // Until there are no more items.
  __device__ void run() {
    if constexpr (Passes::kIsMatrix) {
      if (is_leader()) ptx::prefetch_map(args_.matrix);
    }
    for (int pass = 0; pass < Buffers::kOwn; ++pass) Buffers::set_free(group_, pass);
    while (true) {
      wait_until_staged(0);
      work_ = buffers_.get_results_of(group_, slot_);
      if (work_.count() == 0) return;
      store_item();
    }
  }

 private:
  __device__ bool has(int pass) const {
    return (Shape::kIsWide ? Passes::first(pass) : pass * Passes::kRows) < work_.count();
  }

  __device__ void store_item() {
    if constexpr (Shape::kIsWide) {
      // Copies go on: when at most the second one is left, the first one's pass has been read. Each
      // part of memory is given back as soon as it has been read.
      store(0);
      if (has(1)) {
        store(1);
        wait_for_reads<1>();
      } else {
        wait_for_reads<0>();
      }
      // NOTE: for the last pass. An item without it would else leave the buffer to the next one,
      // whose passes may be written before those of this one have been waited for: `staged` then
      // completes twice, which looks as if it had not.
      if (has(4)) Buffers::set_free(group_, 4);
      if (has(2)) store(2);
      wait_for_reads<0>();
      buffers_.give_back(slot_);
      if (has(3)) {
        store(3);
        wait_for_reads<0>();
      }
      buffers_.give_weights_back(slot_);
      if (has(4)) {
        store(4);
        wait_for_reads<0>();
      }
      Buffers::set_free(group_, 0);
    } else {
      store(0);
      int pass = 1;
      for (; pass < Passes::kCount && has(pass); ++pass) {
        store(pass);
        wait_for_reads<1>();
        Buffers::set_free(group_, pass - 1);
      }
      wait_for_reads<0>();
      Buffers::set_free(group_, pass - 1);
    }
  }

  __device__ void wait_until_staged(int pass) {
    ptx::wait(buffers_.staged(group_, pass), parities_ >> pass & 1);
    parities_ ^= 1u << pass;
  }

  __device__ void store(int pass) {
    if (pass > 0) wait_until_staged(pass);
    if (!is_leader()) return;
    const int first = Shape::kIsWide ? Passes::first(pass) : pass * Passes::kRows;
    const int room = Shape::kIsWide ? Passes::room(pass) : Passes::kRows;
    const int count = min(room, work_.count() - first);
    const std::uint32_t results = buffers_.results(group_, pass, slot_);
    const int slab = work_.first_slab() + group_;
#pragma unroll
    for (int panel = 0; panel < Passes::kPanels; ++panel) {
      if constexpr (Passes::kIsMatrix) {
        const int column = Passes::column(args_.layout, slab, panel);
        // Tiles end where boxes do, or with the matrix. For wide ones a loop would take more
        // registers than these warps have.
        const auto store_from = [&](int row) {
          ptx::store_box(args_.matrix, work_.first + first + row, column,
                         Passes::at(results, pass, panel, row, 0));
        };
        if constexpr (Shape::kIsWide) {
          static_assert(Passes::kRows == 3 * kBoxRows, "three boxes at most");
          store_from(0);
          if (count > kBoxRows) store_from(kBoxRows);
          // Of 40 tokens the last 8 go out with 8 that have.
          if (count > 2 * kBoxRows) store_from(room - kBoxRows);
        } else {
          for (int row = 0; row < count; row += kBoxRows) store_from(row);
        }
      } else {
        ptx::store_bulk(
            static_cast<std::uint8_t*>(args_.out) +
                panel_offset(slab * Passes::kPanels + panel, args_.places, work_.first + first),
            Passes::at(results, pass, panel, 0, 0),
            ceil_div(count, kPlaceAlign) * kPlaceAlign * kPanelBytes);
      }
    }
    ptx::commit_stores();
  }

  template <int kPending>
  __device__ void wait_for_reads() const {
    if (is_leader()) ptx::wait_for_stores<kPending>();
  }

  __device__ static bool is_leader() { return threadIdx.x % kWarpThreads == 0; }

  const SsmmArgs& args_;
  const Buffers& buffers_;
  int group_;
  SlabWork work_;
  int slot_ = 0;                // the item's last
  std::uint32_t parities_ = 0;  // bit p: of the next phase of `staged`, pass p
};

}  // namespace samoyeds
