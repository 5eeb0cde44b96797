// The Hopper kernel, shared memory to sparse tensor cores: weights and tokens are read where they
// are, only metadata goes through registers.
#pragma once

#include "samoyeds/slab_scheduler.cuh"

namespace samoyeds {

// The results of a warpgroup. (1, 2, V): d runs through all of k, odd gathers the odd rows, as in
// mma.cuh. N = M: two times 64 kept rows.
template <class Shape>
struct SlabAccumulators {
  static constexpr int kSize = Shape::kTokens / 2;
  float d[kSize], odd[kSize];
  std::uint32_t rows;  // bit r: row r of this warp's tile takes the odd dense row at present

  __device__ __forceinline__ void clear() {
    rows = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) d[i] = odd[i] = 0.f;
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

// Weights are multiplied by units, whole blocks or halves: what of a unit goes through registers,
// for a warp's 16 kept rows. Metadata and, of (1, 2, V), the rows' bits of each part between two
// changes.
template <int kSwitchPeriod>
struct RowData {
  static constexpr bool kIsSwitched = kSwitchPeriod != 0;
  static constexpr int kUnits = kSwitchPeriod == 1 || kSwitchPeriod == 2 ? 2 : 1;  // of a block
  static constexpr int kSteps = kStepsPerBlock / kUnits;
  static constexpr int kPeriod = kIsSwitched ? kSwitchPeriod : kSteps;
  static constexpr int kParts = kSteps / kPeriod;
  std::uint32_t meta[kSteps / 2];  // each of two steps
  std::uint32_t rows[kParts];

  // `tile`: this warp's block, in shared memory.
  __device__ __forceinline__ void load(std::uint32_t tile, int unit) {
    const std::uint32_t words = tile + unit * half_bytes(kIsSwitched) + kMetaOffset;
#pragma unroll
    for (int i = 0; i < kSteps / 2; ++i) {
      meta[i] = ptx::load_shared_word(words + i * half_bytes(kIsSwitched) +
                                      threadIdx.x % kWarpThreads * 4);
    }
    if constexpr (kIsSwitched) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int step = unit * kSteps + part * kPeriod;
        rows[part] = ptx::load_shared_word(tile + kRowsOffset + step * 4);
      }
    }
  }
};

// The warpgroups of a thread block start their matrix instructions in turn. The tensor cores would
// else go back and forth between them: both are done at the same time, and both switch rows while
// nothing is multiplied. Waiting is a loop, which keeps the compiler from switching rows inside the
// turn.
template <class Buffers>
class Turns {
 public:
  __device__ Turns(const Buffers& buffers, int group) : buffers_(buffers), group_(group) {
    if (group == 1) arrive(0);  // the first turn is group 0's
  }

  // Before an item. is_shared: both warpgroups multiply; else it is always the same one's turn.
  __device__ void share(bool is_shared) { next_ = is_shared ? 1 - group_ : group_; }

  __device__ __forceinline__ void begin() {
    ptx::wait(buffers_.turn(group_), parity_);
    parity_ ^= 1;
  }
  __device__ __forceinline__ void end() const { arrive(next_); }

 private:
  __device__ __forceinline__ void arrive(int group) const {
    __syncwarp();
    if (threadIdx.x % kWarpThreads == 0) ptx::arrive(buffers_.turn(group));
  }

  const Buffers& buffers_;
  int group_, next_ = 0;
  std::uint32_t parity_ = 0;
};

// All of k for one slab, with the first kLive tokens of the tile.
template <class Shape, int kSwitchPeriod, int kLive, class Buffers>
class SlabProduct {
  using T = typename Shape::T;
  using Rows = RowData<kSwitchPeriod>;
  static constexpr int kSums = kLive / 2;

 public:
  // `group`, `warp`: of the thread block, of the warpgroup.
  __device__ __forceinline__ SlabProduct(SlabAccumulators<Shape>& acc, const Buffers& buffers,
                                         int group, int warp, Turns<Buffers>& turns)
      : acc_(acc), buffers_(buffers), group_(group), warp_(warp), turns_(turns) {}

  // What goes through registers is read, and rows are switched, at the end of a unit for the next
  // one, while the other warpgroup multiplies. Not sooner: instructions that run may still read
  // metadata.
  __device__ __forceinline__ void run(Turn& turn, int blocks) {
    ptx::wait(buffers_.full(turn.slot), turn.parity);
    load_rows(turn.slot, 0);
    if constexpr (Rows::kIsSwitched) acc_.rows = rows_.rows[0];  // nothing is summed yet
    int unit = 0;                                                // of the block
    for (int left = blocks * Rows::kUnits; left > 0; --left) {
      multiply(turn.slot, unit);
      if (++unit == Rows::kUnits) {
        unit = 0;
        buffers_.release(turn.slot);
        turn.advance(Buffers::kSlots);
        if (left > 1) ptx::wait(buffers_.full(turn.slot), turn.parity);
      }
      if (left > 1) {
        load_rows(turn.slot, unit);
        if constexpr (Rows::kIsSwitched) acc_.template switch_rows<kLive>(rows_.rows[0]);
      }
    }
  }

 private:
  static constexpr int kOther = 4 * Buffers::kTileStride;  // N = M: to the other 64 kept rows

  __device__ __forceinline__ std::uint32_t slab(int slot) const {
    return buffers_.weights(slot) + group_ * Buffers::kSlabTiles * Buffers::kTileStride;
  }

  __device__ __forceinline__ void load_rows(int slot, int unit) {
    const std::uint32_t tile = slab(slot) + warp_ * Buffers::kTileStride;
    rows_.load(tile, unit);
    if constexpr (!Rows::kIsSwitched) other_.load(tile + kOther, unit);
  }

  __device__ __forceinline__ void multiply(int slot, int unit) {
    const std::uint32_t weights = slab(slot) + unit * Rows::kSteps * kStepBytes;
    const std::uint32_t tokens = buffers_.tokens(slot, unit);
    if constexpr (Rows::kIsSwitched) {
      part<0>(weights, tokens);
      if constexpr (Rows::kParts == 2) {
        acc_.template switch_rows<kLive>(rows_.rows[1]);
        part<1>(weights, tokens);
      }
    } else {
      ptx::wgmma_fence();
      start<0, Rows::kSteps>(acc_.d, weights, tokens, rows_);
      start<0, Rows::kSteps>(acc_.odd, weights + kOther, tokens, other_);
      ptx::wgmma_commit();
      ptx::wgmma_wait_for<kSums>(acc_.d);
      ptx::wgmma_wait_for<kSums>(acc_.odd);
    }
  }

  // Between two changes of rows.
  template <int kPart>
  __device__ __forceinline__ void part(std::uint32_t weights, std::uint32_t tokens) {
    turns_.begin();
    ptx::wgmma_fence();
    start<kPart * Rows::kPeriod, (kPart + 1) * Rows::kPeriod>(acc_.d, weights, tokens, rows_);
    ptx::wgmma_commit();
    turns_.end();
    ptx::wgmma_wait_for<kSums>(acc_.d);
  }

  // Steps kFirst up to kLast of a unit.
  template <int kFirst, int kLast, int kSize>
  __device__ __forceinline__ void start(float (&d)[kSize], std::uint32_t weights,
                                        std::uint32_t tokens, const Rows& rows) const {
    ptx::multiply_sparse_async<T, kLive, kFirst % 2>(
        d,
        ptx::plain_descriptor<kMatrixBytes, Buffers::kTileStride / 2>(weights, kFirst * kStepBytes),
        ptx::swizzled_descriptor(tokens + kFirst / 2 * Buffers::kTilePanelBytes,
                                 kFirst % 2 * kStepCols * 2),
        rows.meta[kFirst / 2]);
    if constexpr (kFirst + 1 < kLast) start<kFirst + 1, kLast>(d, weights, tokens, rows);
  }

  SlabAccumulators<Shape>& acc_;
  const Buffers& buffers_;
  const int group_, warp_;
  Turns<Buffers>& turns_;
  Rows rows_, other_;  // of the unit; N = M: of the other 64 kept rows
};

}  // namespace samoyeds
