// The Hopper kernel: its tile, what a thread block has to compute, and its shared memory.
#pragma once

#include "samoyeds/load.cuh"
#include "samoyeds/panels.cuh"
#include "samoyeds/wgmma.cuh"

namespace samoyeds {

inline constexpr int kGroupThreads = 128;  // a warpgroup
inline constexpr int kGroupWarps = kGroupThreads / kWarpThreads;
inline constexpr int kSlabRows = 128;  // dense

// By a whole warp, when its lanes have done what they arrive for: lane i calls arrive(i), for i <
// kCount.
// NOTE: racecheck follows an mbarrier from the lanes that arrive, and not from those that
// __syncwarp() puts before them. In a library built for it all lanes arrive.
#ifdef SAMOYEDS_RACECHECK
inline constexpr int kArrivingLanes = kWarpThreads;
#else
inline constexpr int kArrivingLanes = 1;
#endif
template <int kCount, typename Arrive>
__device__ __forceinline__ void arrive_for_warp(Arrive&& arrive) {
  __syncwarp();
  if constexpr (kArrivingLanes == 1) {
    const int lane = threadIdx.x % kWarpThreads;
    if (lane < kCount) arrive(lane);
  } else {
    for (int i = 0; i < kCount; ++i) arrive(i);
  }
}

inline constexpr int kWidePasses = 5;  // own buffer, lent tokens twice, lent weights, own buffer

// kTokens: of a tile, at most. With more of them weights are loaded less often, and less memory is
// left to results; the registers hold 192, N = M 208.
// kPassRows: rows of a panel that go out at a time, or of two panels half of each.
// kIsWide: of products without routing a few tokens more, where they save a round of items. There
// is hardly memory for results then, so that some of the slots' is lent to them: items take longer.
template <typename T_, int kTokens_, int kPassRows_, bool kIsWide_ = false>
struct HopperShape {
  using T = T_;
  static constexpr int kTokens = kTokens_, kPassRows = kPassRows_;
  static constexpr bool kIsWide = kIsWide_;
  static constexpr int kGroups = 2;  // warpgroups that multiply; one more loads and stores
  // Of wide tiles as many go out through lent tokens, fewer through lent weights, and a warpgroup's
  // own buffer has room for some in between.
  static constexpr int kFewRows = 64, kOwnRows = kIsWide ? 80 : kPassRows;
  // Of a matrix, tokens that one copy takes: a pass is whole boxes.
  static constexpr int kBoxRows = kPassRows / 2 % 16 == 0 ? 16 : 8;
  static constexpr int kCluster = 2;  // thread blocks
  static constexpr int kThreads = (kGroups + 1) * kGroupThreads;
  // Moved from the warps that load and store to those that multiply. All have 168 at first, so that
  // there is not one more to give; who asks for it waits forever.
  static constexpr int kRegisters = 240, kHelperRegisters = 24;
  static_assert(kGroups * kRegisters + kHelperRegisters == (kGroups + 1) * 168, "all of them");
};

// The same in all lanes of a warp, and the compiler knows it: addresses then need no register of
// each thread.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// A tile of tokens, and slabs of this thread block; small numbers in one, as registers are few.
struct SlabWork {
  int expert = 0, first = 0;  // of the tile
  int packed = 0;  // first slab << 16 | alone << 15 | slabs << 8 | tokens; a weight has 2^13 slabs

  static constexpr int kAlone = 1 << 15;

  __device__ int count() const { return packed & 255; }
  __device__ int num_slabs() const { return packed >> 8 & 127; }
  // The other thread block of the cluster has another tile: tokens are not loaded for each other.
  __device__ bool is_alone() const { return packed & kAlone; }
  __device__ int first_slab() const { return packed >> 16; }
};

// The shared memory of a thread block: a ring of slots, each a block of k, and results on their way
// out. A slot has three parts: the weights of every slab, and two halves of the block of the
// tokens, a panel each. Each part is filled again as soon as it is read itself, weights once they
// are in registers or, where N = M and they are two parts, multiplied: `full` completes when the
// copies are there, `empty` when every warp that multiplies is done with it, of tokens those of the
// whole cluster.
// kSwitchPeriod: 0 where N = M, else as switch_period().
//
// Results go out in passes, see SlabPasses: two buffers of each warpgroup take them in turn. Of
// wide tiles it has one, the first pass goes through that, the second and third through a panel
// each of the item's last slot, once both warpgroups are done with it, the fourth through that
// slot's weights, and the last through the buffer again. Where a warp stores for a warpgroup,
// `staged` completes when a pass is written, with the first it is told what it is of, and it gives
// the memory back. Where none does, that warp brings the numbers of the rows.
//
// The warps that load look up which item comes next, and say so with the weights of its first
// block: those that multiply would spend some 1000 clocks on that between two items.
template <class Shape, int kSwitchPeriod>
struct HopperBuffers {
  static constexpr int kSlabTiles = kSwitchPeriod == 0 ? 8 : 4;  // of 16 kept rows
  static constexpr int kTileBytes = kRowsOffset + (kSwitchPeriod == 0 ? 0 : kRowsBytes);
  static constexpr int kWeightBytes = Shape::kGroups * kSlabTiles * kTileBytes;
  static constexpr int kTilePanelBytes = Shape::kTokens * kPanelBytes;
  static constexpr int kPassBytes = Shape::kPassRows * kPanelBytes;
  static constexpr int kOwnBytes = Shape::kOwnRows * kPanelBytes;
  static constexpr int kFewBytes = Shape::kFewRows * kPanelBytes;
  static constexpr int kMaxPasses =
      Shape::kIsWide ? kWidePasses : ceil_div(2 * Shape::kTokens, Shape::kPassRows);
  static constexpr int kHalves = 2;
  // Whether the parts of a slot have barriers of their own. For V = 64 and 32 waiting and releasing
  // more often costs more than it gives, so there a slot is one part.
  static constexpr bool kIsSplit = kSwitchPeriod == 0 || kSwitchPeriod == 4;
  // N = M: a warpgroup's first 64 kept rows of a block, which it multiplies first, and the others.
  static constexpr int kWeightParts = kSwitchPeriod == 0 ? 2 : 1;
  static constexpr int kPartTiles = kSlabTiles / kWeightParts;  // of a slab
  static constexpr int kParts = kIsSplit ? kWeightParts + kHalves : 1;
  // Of a warpgroup, one for each token, where results are rows: those of wide tiles never are.
  static constexpr int kNumbersBytes = Shape::kIsWide ? 0 : Shape::kTokens * 4;
  static constexpr int kSlots = kSwitchPeriod == 0 ? 2 : 3;
  static constexpr int kOwn = Shape::kIsWide ? 1 : 2;  // buffers of a warpgroup, a pass each
  static constexpr int kRounds = 8;                    // that may be known, see next_item()
  static constexpr int kBarriers = 2 * kSlots * kParts + Shape::kGroups * kMaxPasses + kRounds;
  static constexpr int kItemBytes = 8;      // SlabWork but for its expert
  static constexpr int kResultsBytes = 16;  // whose results a warpgroup's are: item, last slot
  static constexpr int kAlignment = 1024;   // of swizzled rows
  static constexpr int kBytes =
      kAlignment + kSlots * (kHalves * kTilePanelBytes + kWeightBytes) +
      Shape::kGroups * (kOwn * kOwnBytes + kNumbersBytes + kResultsBytes) + kSlots * kItemBytes +
      kBarriers * 8 + kRounds * 4;
  static_assert(kBytes <= 227 * 1024, "what a thread block of sm_90 may have");
  static_assert(!Shape::kIsWide || 2 * kPassBytes <= kTilePanelBytes,
                "a panel is lent to two passes");
  static_assert(!Shape::kIsWide || kAlignment - 1 + kFewBytes <= kSlabTiles * kTileBytes,
                "a slab's weights to one, wherever it has to begin");

  std::uint32_t base;  // shared memory, a multiple of kAlignment

  __device__ std::uint32_t tokens(int slot, int half) const {
    return base + (slot * kHalves + half) * kTilePanelBytes;
  }
  __device__ static constexpr bool is_lent(int pass) {
    return Shape::kIsWide && pass > 0 && pass < kWidePasses - 1;
  }
  // Where a warpgroup puts a pass of an item whose last slot is `slot`.
  __device__ std::uint32_t results(int group, int pass, int slot) const {
    if (Shape::kIsWide && pass == 3) {  // of swizzled rows
      return (weights(slot) + group * kSlabTiles * kTileBytes + kAlignment - 1) &
             ~static_cast<std::uint32_t>(kAlignment - 1);
    }
    return is_lent(pass) ? tokens(slot, group) + (pass - 1) * kPassBytes
                         : own(group) + pass % kOwn * kOwnBytes;
  }
  __device__ std::uint32_t numbers(int group) const {
    return own(Shape::kGroups) + group * kNumbersBytes;
  }
  __device__ std::uint32_t weights(int slot) const {
    return numbers(Shape::kGroups) + slot * kWeightBytes;
  }
  __device__ std::uint32_t full_weights(int slot, int part = 0) const {
    return barrier(slot * kWeightParts + part);
  }
  __device__ std::uint32_t empty_weights(int slot, int part = 0) const {
    return full_weights(kSlots + slot, part);
  }
  __device__ std::uint32_t full_tokens(int slot, int half) const {
    return barrier(kIsSplit ? 2 * kSlots * kWeightParts + slot * kHalves + half : slot);
  }
  __device__ std::uint32_t empty_tokens(int slot, int half) const {
    return full_tokens(kSlots + slot, half);
  }
  __device__ std::uint32_t staged(int group, int pass) const {
    return barrier(2 * kSlots * kParts + group * kMaxPasses + pass);
  }
  __device__ std::uint32_t item(int slot) const {
    return staged(Shape::kGroups, 0) + kRounds * 8 + slot * kItemBytes;
  }
  __device__ std::uint32_t results_of(int group) const {
    return item(kSlots) + group * kResultsBytes;
  }

  __device__ void init() const {
    constexpr int kGroupArrivals = kGroupWarps * kArrivingLanes;
    constexpr int kReaders = Shape::kGroups * kGroupArrivals;
    for (int slot = 0; slot < kSlots; ++slot) {
      for (int part = 0; part < kWeightParts; ++part) {
        ptx::init_barrier(full_weights(slot, part), 1);
        ptx::init_barrier(empty_weights(slot, part),
                          kIsSplit ? kReaders : Shape::kCluster * kReaders);
      }
      for (int half = 0; half < kHalves && kIsSplit; ++half) {
        ptx::init_barrier(full_tokens(slot, half), 1);
        ptx::init_barrier(empty_tokens(slot, half), Shape::kCluster * kReaders);
      }
    }
    for (int group = 0; group < Shape::kGroups; ++group) {
      for (int pass = 0; pass < kMaxPasses; ++pass) {
        ptx::init_barrier(staged(group, pass), kGroupArrivals);
      }
    }
    for (int round = 0; round < kRounds; ++round) ptx::init_barrier(told(round), 1);
  }

  // Which item comes after that of a round. One thread of the cluster tells both thread blocks, in
  // each of which one thread expects it. Of the warps that load, or bring rows' numbers, the first
  // can be as many rounds ahead of the last as there are slots, and one more, where items are one
  // block of k each.
  __device__ void expect_next(int round) const { ptx::arrive_expecting(told(round), 4); }
  __device__ void tell_next(int round, int item) const {
    for (int rank = 0; rank < Shape::kCluster; ++rank) {
      ptx::send_word(next_at(round), static_cast<std::uint32_t>(item), told(round), rank);
    }
  }
  __device__ int next_item(int round) const {
    static_assert(kRounds > kSlots + 1, "none is overwritten before all have read it");
    ptx::wait(told(round), round / kRounds % 2);
    return uniform(static_cast<int>(ptx::load_shared_word(next_at(round))));
  }

  // Weights come first, then the tokens, half by half. What is no part of its own is there, and is
  // released, with the others.
  __device__ __forceinline__ void wait_for_weights(int slot, std::uint32_t parity,
                                                   int part = 0) const {
    ptx::wait(full_weights(slot, part), parity);
  }
  __device__ __forceinline__ void wait_for_tokens(int slot, int half, std::uint32_t parity) const {
    if constexpr (kIsSplit) ptx::wait(full_tokens(slot, half), parity);
  }

  // By the thread that announces the weights of an item's first block, before it does; of no tokens
  // where there are no more items.
  __device__ void put_item(int slot, const SlabWork& work) const { put(item(slot), work); }
  // When they are there. Without the expert.
  __device__ SlabWork item_with_weights(const Turn& turn) const {
    wait_for_weights(turn.slot, turn.parity);
    return get(item(turn.slot));
  }
  // By a thread of a warpgroup before its warps arrive at the first pass, for the warp that stores.
  __device__ void put_results_of(int group, const SlabWork& work, int slot) const {
    put(results_of(group), work);
    ptx::store_shared(results_of(group) + kItemBytes, static_cast<std::uint32_t>(slot));
  }
  __device__ SlabWork get_results_of(int group, int& slot) const {
    slot = static_cast<int>(ptx::load_shared_word(results_of(group) + kItemBytes));
    return get(results_of(group));
  }

  // By a whole warp that has read a part of a slot. Of tokens one arrival stands for it in each
  // thread block of the cluster, as they load for each other.
  __device__ __forceinline__ void release_weights(int slot, int part = 0) const {
    if constexpr (kIsSplit) {
      arrive_for_warp<1>([&](int) { ptx::arrive(empty_weights(slot, part)); });
    }
  }
  __device__ __forceinline__ void release_tokens(int slot, int half) const {
    if (!kIsSplit && half + 1 < kHalves) return;
    arrive_for_warp<Shape::kCluster>([&](int i) {
      // Lane 0 in its own thread block, see get().
      ptx::arrive_at(empty_tokens(slot, half), i ^ static_cast<int>(blockIdx.x % Shape::kCluster));
    });
  }
  // By the warp that stores, for a warpgroup: the panels that were lent.
  __device__ __forceinline__ void give_back(int slot) const {
    static_assert(!Shape::kIsWide || kIsSplit, "each panel is a part");
    constexpr int kArrivals = Shape::kCluster * kGroupWarps;  // for a part
    arrive_for_warp<kHalves * kArrivals>(
        [&](int i) { ptx::arrive_at(empty_tokens(slot, i / kArrivals), i % Shape::kCluster); });
  }
  // Likewise its weights.
  __device__ __forceinline__ void give_weights_back(int slot) const {
    arrive_for_warp<kGroupWarps>([&](int) { ptx::arrive(empty_weights(slot)); });
  }
  // By the warp that stores, and at first: a warpgroup's own buffer for a pass may be written. This
  // and the next are named barriers, whose parity would take a register from those that multiply.
  __device__ __forceinline__ static void set_free(int group, int pass) {
    __syncwarp();
    ptx::arrive_some(free_barrier(group, pass), kGroupThreads + kWarpThreads);
  }
  __device__ __forceinline__ static void wait_until_free(int group, int pass) {
    ptx::sync_some(free_barrier(group, pass), kGroupThreads + kWarpThreads);
  }
  // By a warpgroup that stores rows, and by the warp that brings their numbers: they are read.
  __device__ __forceinline__ static void let_numbers_go(int group) {
    ptx::arrive_some(kNumbersBarrier + group, kGroupThreads + kWarpThreads);
  }
  __device__ __forceinline__ static void wait_until_numbers_are_read(int group) {
    ptx::sync_some(kNumbersBarrier + group, kGroupThreads + kWarpThreads);
  }
  // By a warpgroup where nobody stores for it.
  __device__ __forceinline__ static void sync_group(int group) {
    ptx::sync_some(kFreeBarrier + group, kGroupThreads);
  }
  // By all `groups` that have read the item's last slot: it may be written.
  __device__ __forceinline__ static void wait_for_others(int groups) {
    // Not the same one, as the next item's may be under way already.
    ptx::sync_some(groups > 1 ? kReadBarrier : kReadBarrier + 1, groups * kGroupThreads);
  }

 private:
  // Turns has those between.
  static constexpr int kReadBarrier = 1, kFreeBarrier = 9, kNumbersBarrier = 11;
  static constexpr int kOtherFreeBarrier = 13;

  __device__ static int free_barrier(int group, int pass) {
    return (pass % kOwn == 0 ? kFreeBarrier : kOtherFreeBarrier) + group;
  }

  __device__ std::uint32_t barrier(int number) const { return weights(kSlots) + number * 8; }
  __device__ std::uint32_t told(int round) const {
    return staged(Shape::kGroups, 0) + round % kRounds * 8;
  }
  __device__ std::uint32_t next_at(int round) const {
    return results_of(Shape::kGroups) + round % kRounds * 4;
  }

  __device__ static void put(std::uint32_t to, const SlabWork& work) {
    ptx::store_shared(to, static_cast<std::uint32_t>(work.first),
                      static_cast<std::uint32_t>(work.packed));
  }
  __device__ static SlabWork get(std::uint32_t from) {
    // Read by the lane that arrives for its warp when this place may be written again: racecheck
    // does not follow the other lanes through __syncwarp().
    std::uint32_t first = 0, packed = 0;
    if (threadIdx.x % kWarpThreads == 0) {
      first = ptx::load_shared_word(from);
      packed = ptx::load_shared_word(from + 4);
    }
    return {0, uniform(static_cast<int>(first)), uniform(static_cast<int>(packed))};
  }

  __device__ std::uint32_t own(int group) const {
    return tokens(kSlots, 0) + group * kOwn * kOwnBytes;
  }
};

}  // namespace samoyeds
