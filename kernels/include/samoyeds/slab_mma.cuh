// The Hopper kernel, shared memory to sparse tensor cores: weights go through registers or, where
// N = M, are read where they are, as tokens always are.
#pragma once

#include "samoyeds/mma.cuh"
#include "samoyeds/slab_buffers.cuh"

namespace samoyeds {

// V = 128 and N = M: the first block of an item replaces the sums, so that they need not be
// cleared, nor rows switched before it: products of V = 128 take up to 6 % less.
template <int kSwitchPeriod>
inline constexpr bool kReplaces = kSwitchPeriod == 4 || kSwitchPeriod == 0;

// The results of a warpgroup. (1, 2, V): d runs through all of k, odd gathers the odd rows, as in
// mma.cuh. N = M: two times 64 kept rows.
template <class Shape>
struct SlabAccumulators {
  static constexpr int kSize = Shape::kTokens / 2;
  float d[kSize], odd[kSize];
  std::uint32_t rows;  // bit r: row r of this warp's tile takes the odd dense row at present

  template <int kSwitchPeriod>
  __device__ __forceinline__ void clear() {
    rows = 0;
    // Of tokens that no product has, sums are anything, as are their results, which are not stored.
    if constexpr (kSwitchPeriod != 0) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) odd[i] = 0.f;
    }
    if constexpr (!kReplaces<kSwitchPeriod>) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) d[i] = 0.f;
    }
  }

  template <int kLive>
  __device__ __forceinline__ void switch_rows(std::uint32_t next) {
    const std::uint32_t low_row = 1u << threadIdx.x % kWarpThreads / 4;
    const std::uint32_t high_row = low_row << kHalfTile;
    const auto change = [&](std::uint32_t row) {
      return (rows & row ? 1.f : 0.f) - (next & row ? 1.f : 0.f);
    };
    const float low = change(low_row), high = change(high_row);
    rows = next;
#pragma unroll
    for (int i = 0; i < kLive / 2; ++i) odd[i] = fmaf(i & 2 ? high : low, d[i], odd[i]);
  }

  // Afterwards d holds the even dense rows and odd the odd ones.
  __device__ __forceinline__ void separate_rows() {
    switch_rows<Shape::kTokens>(0);
#pragma unroll
    for (int i = 0; i < kSize; ++i) d[i] -= odd[i];
  }
};

// Weights of a warp for half a block, two steps: 16 kept rows x 32 dense columns each.
struct Fragments {
  uint4 a[2];
  std::uint32_t meta;
  std::uint32_t rows;  // bit r is set where row r takes the odd dense row

  // `tile`: this warp's rows of the block. kHasRows: where rows may change.
  template <int kHalf, bool kHasRows>
  __device__ __forceinline__ void load(std::uint32_t tile) {
    if constexpr (kHasRows) rows = ptx::load_shared_word(tile + kRowsOffset + 2 * kHalf * 4);
    meta = load_meta(tile, kHalf);
#pragma unroll
    for (int i = 0; i < 2; ++i) a[i] = load_values(tile, 2 * kHalf + i);
  }

  // Starts step kStep, number `i` of these, with the first kLive tokens of its panel.
  template <typename T, int kLive, int kStep, int kSize>
  __device__ __forceinline__ void start(float (&d)[kSize], int i, std::uint32_t panel,
                                        bool adds = true) const {
    ptx::multiply_sparse_async<T, kLive, kStep % 2>(
        d, a[i], ptx::matrix_descriptor(panel, kStep % 2 * kStepCols * 2), meta, adds);
  }
};

// The warpgroups of a thread block start their matrix instructions in turn. The tensor cores would
// else go back and forth between them: both are done at the same time, and both switch rows while
// nothing is multiplied.
class Turns {
  static constexpr int kBarrier = 3;  // and those after it; lower ones are taken

 public:
  // is_shared: both warpgroups multiply. One alone has barriers of its own, so that no branch comes
  // between matrix instructions.
  __device__ Turns(int group, bool is_shared)
      : own_(kBarrier + group + (is_shared ? 0 : 2)),
        next_(is_shared ? kBarrier + 1 - group : kBarrier + 4 + group),
        threads_((is_shared ? 2 : 1) * kGroupThreads) {}

  // Once, before any turn: the first is group 0's.
  __device__ static void start(int group) {
    if (group == 1) ptx::arrive_some(kBarrier, 2 * kGroupThreads);
  }
  // Once, after all of them.
  __device__ static void finish(int group) {
    if (group == 0) ptx::sync_some(kBarrier, 2 * kGroupThreads);
  }
  __device__ __forceinline__ void begin() const { ptx::sync_some(own_, threads_); }
  __device__ __forceinline__ void end() const { ptx::arrive_some(next_, threads_); }

 private:
  int own_, next_, threads_;
};

// All of k for one slab, with the first kLive tokens of the tile. Weights that come next are on
// their way to registers while the tensor cores still work.
template <class Shape, int kSwitchPeriod, int kLive, class Buffers>
class SlabProduct {
  using T = typename Shape::T;
  static constexpr int kSums = kLive / 2;

 public:
  // `first_tile`: this warp's of the thread block's tiles of 16 kept rows.
  __device__ __forceinline__ SlabProduct(SlabAccumulators<Shape>& acc, const Buffers& buffers,
                                         int first_tile, const Turns& turns)
      : acc_(acc), buffers_(buffers), first_tile_(first_tile), turns_(turns) {}

  __device__ __forceinline__ void run(Turn& turn, int blocks) {
    buffers_.wait_for_weights(turn.slot, turn.parity);
    load_first(turn.slot);
    if constexpr (kSwitchPeriod == 4) acc_.rows = first_.rows;
#pragma unroll 1
    for (left_ = blocks - 1; left_ >= 0; --left_) {
      slot_ = turn.slot;
      parity_ = turn.parity;
      tile_ = tile_of(slot_);
      turn.advance(Buffers::kSlots);
      const auto load_next = [&] {
        if (left_ == 0) return;
        buffers_.wait_for_weights(turn.slot, turn.parity);
        load_first(turn.slot);
      };
      if constexpr (kSwitchPeriod == 4) {
        whole_block(load_next);
      } else if constexpr (kSwitchPeriod == 2) {
        half_blocks(load_next);
      } else if constexpr (kSwitchPeriod == 1) {
        steps(load_next);
      } else {
        two_times(load_next);
      }
    }
  }

 private:
  // Of wide tiles the item's last slot is lent to its results.
  __device__ __forceinline__ void release(int half) const {
    if (!Shape::kIsWide || left_ > 0) buffers_.release_tokens(slot_, half);
  }
  __device__ __forceinline__ void wait_for_tokens(int half) const {
    buffers_.wait_for_tokens(slot_, half, parity_);
  }

  __device__ __forceinline__ std::uint32_t tile_of(int slot) const {
    return buffers_.weights(slot) + first_tile_ * Buffers::kTileBytes;
  }

  __device__ __forceinline__ void load_first(int slot) {
    if constexpr (kSwitchPeriod != 0) {
      first_.template load<0, true>(tile_of(slot));
    } else {
      load_part_meta(slot, 0);
    }
  }

  // N = M: of the first 64 kept rows, or the others.
  __device__ __forceinline__ void load_part_meta(int slot, int part) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      meta_[2 * part + half] =
          load_meta(tile_of(slot) + part * Buffers::kPartTiles * Buffers::kTileBytes, half);
    }
  }

  __device__ __forceinline__ void start_half(const Fragments& weights, int half,
                                             bool adds = true) const {
    const std::uint32_t panel = buffers_.tokens(slot_, half);
    ptx::wgmma_fence();
    weights.template start<T, kLive, 0>(acc_.d, 0, panel, adds);
    weights.template start<T, kLive, 1>(acc_.d, 1, panel);
    ptx::wgmma_commit();
  }

  // V = 128 and its multiples: rows change once a block.
  template <typename Next>
  __device__ __forceinline__ void whole_block(Next&& load_next) {
    second_.template load<1, false>(tile_);
    wait_for_tokens(0);
    start_half(first_, 0, adds_);
    adds_ = true;
    if (!Shape::kIsWide || left_ > 0) buffers_.release_weights(slot_);  // else they are lent
    wait_for_tokens(1);
    start_half(second_, 1);
    ptx::wgmma_wait<1>();
    release(0);
    load_next();
    ptx::wgmma_wait_for<kSums>(acc_.d);
    release(1);
    if (left_ > 0) acc_.template switch_rows<kLive>(first_.rows);
  }

  // V = 64: in turn, as half a block of products hides little else.
  template <typename Next>
  __device__ __forceinline__ void half_blocks(Next&& load_next) {
    acc_.template switch_rows<kLive>(first_.rows);
    wait_for_tokens(0);
    turns_.begin();
    start_half(first_, 0);
    turns_.end();
    second_.template load<1, true>(tile_);
    ptx::wgmma_wait_for<kSums>(acc_.d);
    acc_.template switch_rows<kLive>(second_.rows);
    wait_for_tokens(1);
    turns_.begin();
    start_half(second_, 1);
    turns_.end();
    buffers_.release_weights(slot_);
    release(0);
    load_next();
    ptx::wgmma_wait_for<kSums>(acc_.d);
    release(1);
  }

  // V = 32. Fragments of one half at a time: two would not fit beside the changes of rows.
  template <typename Next>
  __device__ __forceinline__ void steps(Next&& load_next) {
    wait_for_tokens(0);
    step<0>();
    step<1>();
    release(0);
    first_.template load<1, false>(tile_);
    wait_for_tokens(1);
    step<2>();
    step<3>();
    buffers_.release_weights(slot_);
    release(1);
    load_next();
  }

  template <int kStep>
  __device__ __forceinline__ void step() {
    acc_.template switch_rows<kLive>(ptx::load_shared_word(tile_ + kRowsOffset + kStep * 4));
    ptx::wgmma_fence();
    first_.template start<T, kLive, kStep>(acc_.d, kStep % 2, buffers_.tokens(slot_, kStep / 2));
    ptx::wgmma_commit();
    ptx::wgmma_wait_for<kSums>(acc_.d);
  }

  // N = M: two times 64 kept rows, the first with all of the block's tokens, so that their weights
  // are on their way again while the others are multiplied. All of a block is waited for: with half
  // of one always under way the warpgroups' instructions alternate, and products took 36 % longer.
  template <typename Next>
  __device__ __forceinline__ void two_times(Next&& load_next) {
    wait_for_tokens(0);
    ptx::wgmma_fence();
    start_part<0, 0>(acc_.d);
    wait_for_tokens(1);
    start_part<0, 1>(acc_.d);
    ptx::wgmma_commit();
    buffers_.wait_for_weights(slot_, parity_, 1);
    load_part_meta(slot_, 1);
    ptx::wgmma_fence();
    start_part<1, 0>(acc_.odd);
    ptx::wgmma_commit();
    start_part<1, 1>(acc_.odd);
    ptx::wgmma_commit();
    adds_ = true;
    ptx::wgmma_wait<2>();
    buffers_.release_weights(slot_, 0);
    ptx::wgmma_wait<1>();
    release(0);
    ptx::wgmma_wait_for<kSums>(acc_.d);
    ptx::wgmma_wait_for<kSums>(acc_.odd);
    buffers_.release_weights(slot_, 1);
    release(1);
    load_next();
  }

  // Two steps, of half of the block's tokens.
  template <int kPart, int kHalf, int kSize>
  __device__ __forceinline__ void start_part(float (&d)[kSize]) {
    start_step<kPart, 2 * kHalf>(d, kHalf > 0 || adds_);
    start_step<kPart, 2 * kHalf + 1>(d, true);
  }

  template <int kPart, int kStep, int kSize>
  __device__ __forceinline__ void start_step(float (&d)[kSize], bool adds) {
    const std::uint64_t tokens =
        ptx::matrix_descriptor(buffers_.tokens(slot_, kStep / 2), kStep % 2 * kStepCols * 2);
    ptx::multiply_sparse_async<T, kLive, kStep % 2>(d, weights(kPart, kStep), tokens,
                                                    meta_[2 * kPart + kStep / 2], adds);
  }

  // Of the first 64 kept rows of this warpgroup's slab, or the others.
  __device__ __forceinline__ std::uint64_t weights(int part, int step) const {
    const int first_tile = first_tile_ / kGroupWarps * kGroupWarps + part * Buffers::kPartTiles;
    const std::uint32_t block = buffers_.weights(slot_) + first_tile * Buffers::kTileBytes;
    return ptx::plain_descriptor(block + matrix_offset(step, 0), kMatrixBytes, kHalfBytes);
  }

  SlabAccumulators<Shape>& acc_;
  const Buffers& buffers_;
  const int first_tile_;
  const Turns& turns_;
  bool adds_ = false;  // where kReplaces: a block has been multiplied
  int slot_ = 0;
  std::uint32_t parity_ = 0;  // of the slot
  int left_ = 0;              // blocks after the present one
  std::uint32_t tile_ = 0;    // this warp's, in the slot
  Fragments first_, second_;  // (1, 2, V): of half a block
  std::uint32_t meta_[4];     // N = M: of each half of the block, of the first rows and the others
};

}  // namespace samoyeds
