// From the router's choice to token lists: a stable counting sort of the pairs by expert.
//
// Each thread block owns a run of pairs, each of its warps a part of that with a histogram of its
// own, so that places follow from prefix sums alone and equal inputs give equal lists. Pairs of the
// other blocks' runs each block counts for itself while they are few: reading all choices from the
// L2 then costs less than a second kernel. Many are counted by a kernel before, a run for each of
// its blocks.
//
// What costs is latency: a thread block has work for a few thousand clocks, and little of it is
// more than one load, one sum or one vote after the other.
#include <algorithm>

#include "samoyeds/launch.hpp"
#include "samoyeds/panels.cuh"
#include "samoyeds/ptx.cuh"

namespace samoyeds {
namespace {

constexpr int kMaxRouteWarps = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kRunPairs = 256;  // of a thread block, unless there are more than ...
constexpr int kMaxRouteBlocks = 128;
constexpr int kManyPairs = 4096;    // more are counted by a kernel of their own ...
constexpr int kCountThreads = 256;  // ... with so few that the next one has room beside it
constexpr int kRouteArrays = 4;     // [E] in shared memory, beside a histogram for each warp

struct RouteArgs : Route {
  int run_pairs;                 // of a thread block
  int part_pairs, num_parts;     // of a warp, a multiple of kWarpThreads; of a run that is full
  Divisor experts, tile_tokens;  // num_experts, tiling.most
};

// The expert of a pair, -1: none here, as for pairs from `end` on.
__device__ int expert_of(const RouteArgs& args, int pair, int end) {
  const std::int64_t e = pair < end ? args.top_k_index[pair] : -1;
  return e >= 0 && e < args.num_experts ? static_cast<int>(e) : -1;
}

// Numbers of the experts to their exclusive prefix sums, by one warp, a run of them for each lane;
// returns the total.
__device__ int to_prefix_sums(int num_experts, int* numbers) {
  const int lane = threadIdx.x % kWarpThreads, run = ceil_div(num_experts, kWarpThreads);
  const int begin = min(lane * run, num_experts), end = min(begin + run, num_experts);
  int own = 0;
#pragma unroll 4
  for (int e = begin; e < end; ++e) own += numbers[e];
  int sum = own;
#pragma unroll
  for (int distance = 1; distance < kWarpThreads; distance *= 2) {
    const int left = __shfl_up_sync(kAll, sum, distance);
    if (lane >= distance) sum += left;
  }
  const int total = __shfl_sync(kAll, sum, kWarpThreads - 1);
  sum -= own;
#pragma unroll 1
  for (int e = begin; e < end; ++e) {
    const int number = numbers[e];
    numbers[e] = sum;
    sum += number;
  }
  return total;
}

// The last of numbers[0 .. count - 1], which do not descend, that is at most x; numbers[0] is.
__device__ int last_not_above(const int* numbers, int count, int x) {
  int last = 0;
#pragma unroll 1
  for (int step = 1 << (31 - __clz(count)); step > 0; step /= 2) {
    if (last + step < count && numbers[last + step] <= x) last += step;
  }
  return last;
}

// Adds the pairs begin .. end - 1 to counts[row_of(pair)][E], by all threads of the block; those of
// row -1 do not count.
template <typename RowOf>
__device__ void count_pairs(const RouteArgs& args, int begin, int end, int* counts,
                            RowOf&& row_of) {
  constexpr int kAtOnce = kManyPairs / (kMaxRouteWarps * kWarpThreads);
#pragma unroll 1
  for (int base = begin; base < end; base += kAtOnce * blockDim.x) {
    const int own = base + threadIdx.x;
    int expert[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) expert[i] = expert_of(args, own + i * blockDim.x, end);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (base + i * blockDim.x >= end) break;
      const int row = row_of(own + i * blockDim.x);
      const int at = expert[i] < 0 || row < 0 ? -1 : row * args.num_experts + expert[i];
      // Many pairs of one expert would wait for each other: a warp that agrees adds once.
      int agree;
      __match_all_sync(kAll, at, &agree);
      if (at < 0) continue;
      if (!agree) {
        atomicAdd(&counts[at], 1);
      } else if (threadIdx.x % kWarpThreads == 0) {
        atomicAdd(&counts[at], kWarpThreads);
      }
    }
  }
}

// The pairs that a thread block of both kernels owns.
struct Run {
  int begin, end;
};

__device__ Run own_run(const RouteArgs& args) {
  const int begin = min(static_cast<int>(blockIdx.x) * args.run_pairs, args.num_pairs);
  return {begin, min(begin + args.run_pairs, args.num_pairs)};
}

__global__ void __launch_bounds__(kCountThreads) count_runs_kernel(RouteArgs args) {
  ptx::let_next_kernel_start();
  extern __shared__ int counts[];  // [E]
  for (int e = threadIdx.x; e < args.num_experts; e += blockDim.x) counts[e] = 0;
  __syncthreads();
  const Run run = own_run(args);
  count_pairs(args, run.begin, run.end, counts, [](int) { return 0; });
  __syncthreads();
  for (int e = threadIdx.x; e < args.num_experts; e += blockDim.x) {
    args.run_counts[blockIdx.x * args.num_experts + e] = counts[e];
  }
}

// Adds what count_runs_kernel has counted, of the runs before this block's and of those after it. A
// thread sums one expert's of a share of the runs.
__device__ void add_run_counts(const RouteArgs& args, int* before, int* after) {
  constexpr int kLoads = 16;
  const int num_experts = args.num_experts, block = blockIdx.x, num_runs = gridDim.x;
  const int num_shares = max(1, static_cast<int>(blockDim.x) / args.experts);
#pragma unroll 1
  for (int i = threadIdx.x; i < num_shares * num_experts; i += blockDim.x) {
    const int share = i / args.experts, expert = i - share * num_experts;
    int sum_before = 0, sum_after = 0;
#pragma unroll kLoads
    for (int run = share; run < num_runs; run += num_shares) {
      const int count = args.run_counts[run * num_experts + expert];
      sum_before += run < block ? count : 0;
      sum_after += run > block ? count : 0;
    }
    atomicAdd(&before[expert], sum_before);
    atomicAdd(&after[expert], sum_after);
  }
}

__global__ void __launch_bounds__(kMaxRouteWarps* kWarpThreads, 1) route_kernel(RouteArgs args) {
  // [warps][E] counts of this block's run, then [E] each: pairs of the runs before it and after it
  // (then all), first place, first tile; and the number of tiles.
  extern __shared__ int counts[];
  const int num_experts = args.num_experts, num_warps = blockDim.x / kWarpThreads;
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  int* own = counts + warp * num_experts;
  int* before = counts + num_warps * num_experts;
  int* totals = before + num_experts;
  int* first_place = totals + num_experts;
  int* first_tile = first_place + num_experts;

#pragma unroll 1
  for (int i = threadIdx.x; i < (num_warps + 2) * num_experts; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  const Run run = own_run(args);
  const int part_begin = min(run.begin + warp * args.part_pairs, run.end);
  const int part_end = min(part_begin + args.part_pairs, run.end);
  // A lane's expert, and which lanes have the same: of the last pair, mostly the only one.
  int expert = -1;
  unsigned same = 0;
#pragma unroll 1
  for (int base = part_begin; base < part_end; base += kWarpThreads) {
    expert = expert_of(args, base + lane, part_end);
    same = __match_any_sync(kAll, expert);
    if (expert >= 0 && lane == __ffs(same) - 1) own[expert] += __popc(same);
    __syncwarp();
  }
  // The choices were there before count_runs_kernel began.
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  if (args.run_counts) {
    add_run_counts(args, before, totals);
  } else if (gridDim.x > 1) {
    count_pairs(args, 0, args.num_pairs, before, [&](int pair) {
      return pair < run.begin ? 0 : pair < run.end ? -1 : 1;
    });
  }
  __syncthreads();
  const Tiling tiling = args.tiling;
#pragma unroll 1
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    // A warp's count of an expert becomes the number of that expert's pairs before the warp's part.
    constexpr int kAtOnce = 8;
    int sum = before[e];
#pragma unroll 1
    for (int w = 0; w < args.num_parts; w += kAtOnce) {
      int count[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        count[i] = w + i < args.num_parts ? counts[(w + i) * num_experts + e] : 0;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (w + i < args.num_parts) counts[(w + i) * num_experts + e] = sum;
        sum += count[i];
      }
    }
    const int total = sum + totals[e];
    totals[e] = total;
    first_place[e] = tiling.aligned(total);
    first_tile[e] = (total + tiling.most - 1) / args.tile_tokens;
  }
  __syncthreads();
  if (warp < 2) {
    const int total = to_prefix_sums(num_experts, warp == 0 ? first_place : first_tile);
    if (warp == 1 && lane == 0) {
      first_tile[num_experts] = total;
      if (blockIdx.x == 0) *args.num_tiles = total;
    }
    if (warp == 1 && lane < 2 && blockIdx.x == 0 && args.num_claimed) args.num_claimed[lane] = 0;
  }
  __syncthreads();

#pragma unroll 1
  for (int base = part_begin; base < part_end; base += kWarpThreads) {
    if (args.part_pairs > kWarpThreads) {
      expert = expert_of(args, base + lane, part_end);
      same = __match_any_sync(kAll, expert);
    }
    const int pair = base + lane;
    if (expert >= 0) {
      const int place = first_place[expert] + own[expert] + __popc(same & ((1u << lane) - 1));
      args.pairs[place] = pair;
      if (args.places) args.places[pair] = place;
    } else if (args.places && pair < part_end) {
      args.places[pair] = kNoPlace;
    }
    __syncwarp();
    if (expert >= 0 && lane == __ffs(same) - 1) own[expert] += __popc(same);
    __syncwarp();
  }
  // The last warps have no pairs where those are few.
  const int num_tiles = first_tile[num_experts];
#pragma unroll 1
  for (int tile = (blockDim.x - 1 - threadIdx.x) * gridDim.x + blockIdx.x; tile < num_tiles;
       tile += gridDim.x * blockDim.x) {
    const int e = last_not_above(first_tile, num_experts, tile), first = first_tile[e];
    const int of_expert = first_tile[e + 1] - first, i = tile - first;
    const int tokens = tiling.size(totals[e], of_expert);
    const int in_group = i / kMaxGroup * kMaxGroup;
    args.tiles[tile] = {e, first_place[e] + i * tokens, min(tokens, totals[e] - i * tokens),
                        (first + in_group) << 8 | min(kMaxGroup, of_expert - in_group)};
  }
  if (!args.places) return;
  // Places without a pair: up to the next expert's, or the end.
#pragma unroll 1
  for (int e = blockIdx.x * num_warps + warp; e < num_experts; e += gridDim.x * num_warps) {
    const int end = e + 1 < num_experts ? first_place[e + 1] : args.max_places;
#pragma unroll 1
    for (int i = first_place[e] + totals[e] + lane; i < end; i += kWarpThreads) {
      args.pairs[i] = kNoPair;
    }
  }
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
  return num_pairs / tiling.most + std::min(num_pairs, num_experts);
}

std::int64_t max_places(std::int64_t num_pairs, std::int64_t num_experts) {
  return num_pairs + std::min(num_pairs, num_experts) * (kPlaceAlign - 1);
}

Error route(Stream stream, const Route& given) {
  RouteArgs args{};
  static_cast<Route&>(args) = given;
  // A thread for each pair and for each expert, as far as they go; two warps at least, as one sums
  // pairs and one tiles.
  const int wanted = ceil_div(std::max(args.num_pairs, args.num_experts), kWarpThreads);
  const int num_warps = std::clamp(wanted, 2, kMaxRouteWarps);
  const int num_threads = num_warps * kWarpThreads, num_blocks = num_runs(args.num_pairs);
  args.run_pairs = ceil_div(args.num_pairs, num_blocks);
  args.part_pairs = ceil_div(args.run_pairs, num_threads) * kWarpThreads;
  args.num_parts = args.num_pairs == 0 ? 0 : ceil_div(args.run_pairs, args.part_pairs);
  args.experts = make_divisor(std::max(1, args.num_experts));
  args.tile_tokens = make_divisor(args.tiling.most);
  const int expert_bytes = (num_warps + kRouteArrays) * static_cast<int>(sizeof(int));
  constexpr int kMoreBytes = sizeof(int);  // the number of tiles
  const int shared = expert_bytes * args.num_experts + kMoreBytes;
  if (shared > stream.device.block_shared_bytes) {
    const int most = (stream.device.block_shared_bytes - kMoreBytes) / expert_bytes;
    return unsupported("routing needs at most " + std::to_string(most) +
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
    SAMOYEDS_RETURN_IF_ERROR(launch(stream, count_runs_kernel, num_blocks, kCountThreads,
                                    args.num_experts * static_cast<int>(sizeof(int)), args));
    stream.overlaps = true;
  }
  return launch(stream, route_kernel, num_blocks, num_threads, shared, args);
}

}  // namespace samoyeds
