// From the router's choice to token lists: a stable counting sort of the pairs by expert.
//
// Each thread block owns a run of pairs, each of its warps a part of that with a histogram of its
// own, so that places follow from prefix sums alone and equal inputs give equal lists. Pairs of the
// other blocks' runs each block counts for itself while they are few: reading all choices from the
// L2 then costs less than a second kernel. Many are counted by a kernel before, a run for each of
// its blocks.
#include <algorithm>

#include "samoyeds/launch.hpp"
#include "samoyeds/panels.cuh"
#include "samoyeds/ptx.cuh"

namespace samoyeds {
namespace {

constexpr int kMaxRouteWarps = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kAhead = 8;       // loads in flight a lane
constexpr int kRunPairs = 256;  // of a thread block, unless there are more than ...
constexpr int kMaxRouteBlocks = 128;
constexpr int kManyPairs = 4096;  // more are counted by a kernel of their own
constexpr int kRouteArrays = 5;   // [E] in shared memory, beside a histogram for each warp

// Calls visit(pair, expert) for the pairs begin .. end - 1, in order, `step` threads at a time;
// expert -1: none here. Threads beyond the end are called with -1 too, so that a warp stays whole.
template <typename Visit>
__device__ void for_each_pair(const Route& args, int begin, int end, int step, Visit&& visit) {
  for (int base = begin; base < end; base += kAhead * step) {
    const int own = base + threadIdx.x % step;
    int expert[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const std::int64_t e = own + i * step < end ? args.top_k_index[own + i * step] : -1;
      expert[i] = e >= 0 && e < args.num_experts ? static_cast<int>(e) : -1;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i * step < end) visit(own + i * step, expert[i]);
    }
  }
}

// Exclusive prefix sums of value(e) over the experts, by one warp; returns the total.
template <typename Value, typename Store>
__device__ int prefix_sums(int num_experts, Value&& value, Store&& store) {
  const int lane = threadIdx.x % kWarpThreads;
  int total = 0;
  for (int base = 0; base < num_experts; base += kWarpThreads) {
    const int e = base + lane, own = e < num_experts ? value(e) : 0;
    int sum = own;
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      const int left = __shfl_up_sync(kAll, sum, distance);
      if (lane >= distance) sum += left;
    }
    if (e < num_experts) store(e, total + sum - own);
    total += __shfl_sync(kAll, sum, kWarpThreads - 1);
  }
  return total;
}

// Adds the pairs begin .. end - 1 to counts[E], by all threads of the block.
__device__ void count_pairs(const Route& args, int begin, int end, int* counts) {
  for_each_pair(args, begin, end, blockDim.x, [&](int, int expert) {
    // Many pairs of one expert would wait for each other: a warp that agrees adds once.
    int agree;
    __match_all_sync(kAll, expert, &agree);
    if (expert < 0) return;
    if (!agree) {
      atomicAdd(&counts[expert], 1);
    } else if (threadIdx.x % kWarpThreads == 0) {
      atomicAdd(&counts[expert], kWarpThreads);
    }
  });
}

// The pairs that a thread block of both kernels owns.
struct Run {
  int begin, end;
};

__device__ Run own_run(const Route& args) {
  const int run = ceil_div(args.num_pairs, static_cast<int>(gridDim.x));
  const int begin = min(blockIdx.x * run, args.num_pairs);
  return {begin, min(begin + run, args.num_pairs)};
}

__global__ void __launch_bounds__(kMaxRouteWarps* kWarpThreads, 1) count_runs_kernel(Route args) {
  ptx::let_next_kernel_start();
  extern __shared__ int counts[];  // [E]
  for (int e = threadIdx.x; e < args.num_experts; e += blockDim.x) counts[e] = 0;
  __syncthreads();
  const Run run = own_run(args);
  count_pairs(args, run.begin, run.end, counts);
  __syncthreads();
  for (int e = threadIdx.x; e < args.num_experts; e += blockDim.x) {
    args.run_counts[blockIdx.x * args.num_experts + e] = counts[e];
  }
}

// Adds what count_runs_kernel has counted, of the runs before this block's and of those after it.
__device__ void add_run_counts(const Route& args, int* before, int* after) {
  const int lane = threadIdx.x % kWarpThreads, num_warps = blockDim.x / kWarpThreads;
  for (int run = threadIdx.x / kWarpThreads; run < gridDim.x; run += num_warps) {
    if (run == blockIdx.x) continue;
    int* sums = run < blockIdx.x ? before : after;
    const int* counts = args.run_counts + run * args.num_experts;
    for (int e = lane; e < args.num_experts; e += kWarpThreads) atomicAdd(&sums[e], counts[e]);
  }
}

__global__ void __launch_bounds__(kMaxRouteWarps* kWarpThreads, 1) route_kernel(Route args) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  // [warps][E] counts of this block's run, then [E] each: pairs of the runs before it and after it,
  // all pairs, first pair, first tile.
  extern __shared__ int counts[];
  const int num_experts = args.num_experts, num_warps = blockDim.x / kWarpThreads;
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  int* own = counts + warp * num_experts;
  int* before = counts + num_warps * num_experts;
  int* after = before + num_experts;
  int* totals = after + num_experts;
  int* first_pair = totals + num_experts;
  int* first_tile = first_pair + num_experts;

  for (int i = threadIdx.x; i < (num_warps + 2) * num_experts; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  const Run run = own_run(args);
  if (args.run_counts) {
    add_run_counts(args, before, after);
  } else if (gridDim.x > 1) {
    count_pairs(args, 0, run.begin, before);
    count_pairs(args, run.end, args.num_pairs, after);
  }
  const int part = ceil_div(run.end - run.begin, static_cast<int>(blockDim.x)) * kWarpThreads;
  const int part_begin = min(run.begin + warp * part, run.end);
  const int part_end = min(part_begin + part, run.end);
  for_each_pair(args, part_begin, part_end, kWarpThreads, [&](int, int expert) {
    const unsigned same = __match_any_sync(kAll, expert);
    if (expert >= 0 && lane == __ffs(same) - 1) own[expert] += __popc(same);
    __syncwarp();
  });
  __syncthreads();
  // A warp's count of an expert becomes the number of that expert's pairs before the warp's part.
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    int sum = before[e];
    for (int w = 0; w < num_warps; ++w) {
      const int count = counts[w * num_experts + e];
      counts[w * num_experts + e] = sum;
      sum += count;
    }
    totals[e] = sum + after[e];
  }
  __syncthreads();
  const Tiling tiling = args.tiling;
  const auto round_up = [&](int x) { return ceil_div(x, tiling.align) * tiling.align; };
  const auto tiles_of = [&](int e) { return ceil_div(totals[e], tiling.tokens); };
  if (warp == 0) {
    prefix_sums(
        num_experts, [&](int e) { return round_up(totals[e]); },
        [&](int e, int sum) { first_pair[e] = sum; });
  } else if (warp == 1) {
    const int total =
        prefix_sums(num_experts, tiles_of, [&](int e, int sum) { first_tile[e] = sum; });
    if (lane == 0 && blockIdx.x == 0) *args.num_tiles = total;
    if (lane < 2 && blockIdx.x == 0 && args.num_claimed) args.num_claimed[lane] = 0;
  }
  __syncthreads();

  const auto write_tile = [&](int e, int i) {
    const int num_tiles = tiles_of(e), in_group = i / kMaxGroup * kMaxGroup;
    const int tokens = tiling.is_even ? round_up(ceil_div(totals[e], num_tiles)) : tiling.tokens;
    args.tiles[first_tile[e] + i] = {
        e, first_pair[e] + i * tokens, min(tokens, totals[e] - i * tokens),
        (first_tile[e] + in_group) << 8 | min(kMaxGroup, num_tiles - in_group)};
  };
  // The first block writes the tiles: a thread the first few of an expert, a warp the rest.
  constexpr int kFew = 4;
  bool has_many = false;
  for (int e = threadIdx.x; e < num_experts && blockIdx.x == 0; e += blockDim.x) {
    for (int i = 0; i < min(kFew, tiles_of(e)); ++i) write_tile(e, i);
    has_many |= tiles_of(e) > kFew;
  }
  if (__syncthreads_or(has_many)) {
    for (int e = warp; e < num_experts; e += num_warps) {
      for (int i = kFew + lane; i < tiles_of(e); i += kWarpThreads) write_tile(e, i);
    }
  }
  if (args.places && blockIdx.x == 0) {
    // Places between the experts' and behind the last one's.
    for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
      const int end = first_pair[e] + totals[e];
      for (int i = end; i < first_pair[e] + round_up(totals[e]); ++i) args.pairs[i] = kNoPair;
    }
    const int last = num_experts - 1;
    for (int i = first_pair[last] + round_up(totals[last]) + threadIdx.x; i < args.max_places;
         i += blockDim.x) {
      args.pairs[i] = kNoPair;
    }
  }
  for_each_pair(args, part_begin, part_end, kWarpThreads, [&](int pair, int expert) {
    const unsigned same = __match_any_sync(kAll, expert);
    if (expert >= 0) {
      const int place = first_pair[expert] + own[expert] + __popc(same & ((1u << lane) - 1));
      args.pairs[place] = pair;
      if (args.places) args.places[pair] = place;
    } else if (args.places && pair < part_end) {
      args.places[pair] = kNoPlace;
    }
    __syncwarp();
    if (expert >= 0 && lane == __ffs(same) - 1) own[expert] += __popc(same);
    __syncwarp();
  });
}

int num_runs(std::int64_t num_pairs) {
  const std::int64_t runs = (num_pairs + kRunPairs - 1) / kRunPairs;
  return static_cast<int>(std::clamp<std::int64_t>(runs, 1, kMaxRouteBlocks));
}

}  // namespace

std::vector<const void*> route_kernels() {
  return {reinterpret_cast<const void*>(&count_runs_kernel),
          reinterpret_cast<const void*>(&route_kernel)};
}

std::int64_t num_run_counts(std::int64_t num_pairs, std::int64_t num_experts) {
  return num_pairs > kManyPairs ? num_runs(num_pairs) * num_experts : 0;
}

std::int64_t max_tiles(std::int64_t num_pairs, std::int64_t num_experts, Tiling tiling) {
  // Each expert that is hit has at most one tile more than it could fill.
  return num_pairs / tiling.tokens + std::min(num_pairs, num_experts);
}

std::int64_t max_places(std::int64_t num_pairs, std::int64_t num_experts) {
  return num_pairs + std::min(num_pairs, num_experts) * (kPlaceAlign - 1);
}

Error route(Stream stream, Route args) {
  // A thread for each pair and for each expert, as far as they go; two warps at least, as one sums
  // pairs and one tiles.
  const int wanted =
      ceil_div(args.num_pairs > args.num_experts ? args.num_pairs : args.num_experts, kWarpThreads);
  const int num_warps = std::clamp(wanted, 2, kMaxRouteWarps);
  const int num_threads = num_warps * kWarpThreads, num_blocks = num_runs(args.num_pairs);
  const int expert_bytes = (num_warps + kRouteArrays) * static_cast<int>(sizeof(int));
  const int shared = expert_bytes * args.num_experts;
  if (shared > stream.device.block_shared_bytes) {
    return unsupported("routing needs at most " +
                       std::to_string(stream.device.block_shared_bytes / expert_bytes) +
                       " experts on this GPU, found " + std::to_string(args.num_experts));
  }
  if (shared > 48 * 1024) {
    // Always the same limit: another thread may be about to launch with more than `shared`.
    if (Error e = check_cuda(
            cudaFuncSetAttribute(route_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 stream.device.block_shared_bytes),
            "reserving shared memory")) {
      return e;
    }
  }
  args.max_places = static_cast<int>(max_places(args.num_pairs, args.num_experts));
  if (num_run_counts(args.num_pairs, args.num_experts) == 0) args.run_counts = nullptr;
  if (args.run_counts) {
    // A thread block counts fewer experts than fit the kernel after it.
    SAMOYEDS_RETURN_IF_ERROR(launch(stream, count_runs_kernel, num_blocks, num_threads,
                                    args.num_experts * static_cast<int>(sizeof(int)), args));
    stream.overlaps = true;
  }
  return launch(stream, route_kernel, num_blocks, num_threads, shared, args);
}

}  // namespace samoyeds
