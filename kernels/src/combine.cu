// What surrounds the two products: the gate of unfused layouts, zeros for pairs without an expert,
// and the weighted sum over a token's choices.
#include "samoyeds/epilogue.cuh"
#include "samoyeds/launch.hpp"
#include "samoyeds/panels.cuh"

namespace samoyeds {
namespace {

constexpr int kCombineThreads = 256;
template <typename Row>
constexpr int kWide = 16 / static_cast<int>(sizeof(Row));  // columns of one 16-byte load

__device__ bool is_expert(std::int64_t expert, int num_experts) {
  return expert >= 0 && expert < num_experts;
}

template <typename T>
__device__ __forceinline__ float widen(T x) {
  if constexpr (std::is_same_v<T, float>) return x;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(x);
  if constexpr (std::is_same_v<T, __half>) return __half2float(x);
}

// A routing weight as it lies in memory, so that several can be on the way, and what it is worth.
__device__ std::uint32_t weight_bits(const Combine& args, int pair) {
  return args.weights_dtype == SAMOYEDS_FP32
             ? static_cast<const std::uint32_t*>(args.top_k_weights)[pair]
             : static_cast<const std::uint16_t*>(args.top_k_weights)[pair];
}
__device__ float weight_of(const Combine& args, std::uint32_t bits) {
  switch (args.weights_dtype) {
    case SAMOYEDS_BF16:
      return __uint_as_float(bits << 16);
    case SAMOYEDS_FP16:
      return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    default:
      return __uint_as_float(bits);
  }
}

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T at[kWidth];
};

// A thread sums kWidth neighbouring columns of one token: over its choices in order, and inside a
// choice over the parts of k in order, all in fp32.
template <typename T, typename Row, int kWidth>
__global__ void combine_kernel(Combine args) {
  const int per_token = args.columns / kWidth;
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool is_token = number < static_cast<std::int64_t>(args.num_tokens) * per_token;
  const int token = static_cast<int>(number / per_token);
  const int column = static_cast<int>(number % per_token) * kWidth;
  const std::int64_t plane = static_cast<std::int64_t>(args.num_tokens) * args.top_k * args.columns;
  const int splits = std::is_same_v<Row, float> ? args.splits : 1;  // others are whole sums
  // Several parts at a time, so that what is read of them is on the way together.
  constexpr int kAtOnce = 8;
  float weight[kAtOnce];
  bool is_here[kAtOnce], is_last[kAtOnce];  // of its choice
  const Row* from[kAtOnce];
  int choice = 0, split = 0;
  const auto look_up = [&] {
    std::uint32_t bits[kAtOnce];
    std::int64_t expert[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool is_part = is_token && choice < args.top_k;
      const int pair = token * args.top_k + choice;
      bits[i] = is_part ? weight_bits(args, pair) : 0;
      expert[i] = is_part ? args.top_k_index[pair] : -1;
      from[i] = static_cast<const Row*>(args.rows) + split * plane +
                static_cast<std::int64_t>(pair) * args.columns + column;
      is_last[i] = ++split == splits;
      choice += is_last[i] ? 1 : 0;
      split = is_last[i] ? 0 : split;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      weight[i] = weight_of(args, bits[i]);
      is_here[i] = is_expert(expert[i], args.num_experts);
    }
  };
  look_up();  // the kernel before writes rows alone
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  if (!is_token) return;
  float total[kWidth] = {}, sum[kWidth] = {};
#pragma unroll 1
  while (true) {
    Vector<Row, kWidth> part[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      part[i] = {};
      if (is_here[i]) part[i] = *reinterpret_cast<const Vector<Row, kWidth>*>(from[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        sum[j] += widen(part[i].at[j]);
        if (!is_last[i]) continue;
        total[j] = is_here[i] ? fmaf(weight[i], sum[j], total[j]) : total[j];
        sum[j] = 0.f;
      }
    }
    if (choice >= args.top_k) break;
    look_up();
  }
  Vector<T, kWidth> result;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) result.at[i] = narrow<T>(total[i]);
  *reinterpret_cast<Vector<T, kWidth>*>(static_cast<T*>(args.out) +
                                        static_cast<std::int64_t>(token) * args.columns + column) =
      result;
}

// The same from panels: a thread sums the 8 columns of a chunk, in several panels, and has the
// loads of several choices in flight. Thread blocks take neighbouring tokens, whose rows of one
// expert are neighbours too.
constexpr int kPanelsAtOnce = 2, kChoicesAtOnce = 4;
constexpr int kPanelThreads = 128, kPanelBlocks = 8;  // of an SM
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__global__ void __launch_bounds__(kPanelThreads, kPanelBlocks) combine_panels_kernel(Combine args) {
  const int chunk = threadIdx.x % kPanelChunks, first_panel = blockIdx.y * kPanelsAtOnce;
  const int token = blockIdx.x * (kPanelThreads / kPanelChunks) + threadIdx.x / kPanelChunks;
  const int last_panel = min(first_panel + kPanelsAtOnce, args.columns / kPanelCols);
  const bool is_token = token < args.num_tokens;
  const std::int64_t stride = panel_offset(1, args.max_places, 0);
  float total[kPanelsAtOnce][kChunkCols] = {};
  // The eight threads of a token look up a choice each.
  constexpr int kLookedUp = kPanelChunks;
  static_assert(kLookedUp % kChoicesAtOnce == 0, "a token's choices are looked up together");
  for (int first = 0; first < args.top_k; first += kLookedUp) {
    const int pair = token * args.top_k + first + chunk;
    const int own_place = first + chunk < args.top_k && is_token ? args.places[pair] : kNoPlace;
    const float own_weight = own_place == kNoPlace ? 0.f : weight_of(args, weight_bits(args, pair));
    const int num_choices = min(kLookedUp, args.top_k - first);
    if (first == 0) {
      ptx::wait_for_previous_kernel();  // it writes rows alone; choices were there before
      ptx::let_next_kernel_start();
    }
#pragma unroll 1
    for (int k = 0; k < num_choices; k += kChoicesAtOnce) {
      uint4 parts[kChoicesAtOnce][kPanelsAtOnce];
      float weight[kChoicesAtOnce];
#pragma unroll
      for (int c = 0; c < kChoicesAtOnce; ++c) {
        const int place = __shfl_sync(kAllLanes, own_place, k + c, kLookedUp);
        weight[c] = __shfl_sync(kAllLanes, own_weight, k + c, kLookedUp);
        const std::uint8_t* from = static_cast<const std::uint8_t*>(args.rows) +
                                   panel_offset(first_panel, args.max_places, place) +
                                   swizzled_chunk(place, chunk);
#pragma unroll
        for (int i = 0; i < kPanelsAtOnce; ++i) {
          parts[c][i] = {};
          if (place != kNoPlace && first_panel + i < last_panel) {
            parts[c][i] = ptx::load_once(from + i * stride);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kChoicesAtOnce; ++c) {
#pragma unroll
        for (int i = 0; i < kPanelsAtOnce; ++i) {
          Vector<T, kChunkCols> part;
          *reinterpret_cast<uint4*>(&part) = parts[c][i];
#pragma unroll
          for (int j = 0; j < kChunkCols; ++j) {
            total[i][j] = fmaf(weight[c], widen(part.at[j]), total[i][j]);
          }
        }
      }
    }
  }
  if (!is_token) return;
#pragma unroll
  for (int i = 0; i < kPanelsAtOnce; ++i) {
    if (first_panel + i >= last_panel) continue;
    const int column =
        first_column_of((first_panel + i) * kPanelCols + chunk * kChunkCols, args.tile_columns);
    T* out = static_cast<T*>(args.out) + static_cast<std::int64_t>(token) * args.columns + column;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vector<T, kChunkCols / 2> four;
#pragma unroll
      for (int j = 0; j < kChunkCols / 2; ++j) {
        four.at[j] = narrow<T>(total[i][j / 2 * 4 + half * 2 + j % 2]);
      }
      *reinterpret_cast<Vector<T, kChunkCols / 2>*>(out + half * args.tile_columns / 2) = four;
    }
  }
}

template <typename T>
__global__ void gate_kernel(const std::int64_t* top_k_index, int num_pairs, int num_experts,
                            int inner_size, const T* both, T* inner) {
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (number >= static_cast<std::int64_t>(num_pairs) * inner_size) return;
  const int pair = static_cast<int>(number / inner_size);
  // Rows without an expert were never written.
  if (!is_expert(top_k_index[pair], num_experts)) return;
  const T* row = both + static_cast<std::int64_t>(pair) * inner_size * 2 + number % inner_size;
  inner[number] = narrow<T>(silu(widen(row[0])) * widen(row[inner_size]));
}

__global__ void clear_kernel(const std::int64_t* top_k_index, int num_pairs, int num_experts,
                             std::int64_t row_bytes, std::uint8_t* out) {
  for (int pair = blockIdx.x; pair < num_pairs; pair += gridDim.x) {
    if (is_expert(top_k_index[pair], num_experts)) continue;
    auto* row = reinterpret_cast<std::uint16_t*>(out + pair * row_bytes);
    for (std::int64_t i = threadIdx.x; i < row_bytes / 2; i += blockDim.x) row[i] = 0;
  }
}

dim3 grid_for(std::int64_t threads) {
  return dim3(static_cast<unsigned>((threads + kCombineThreads - 1) / kCombineThreads));
}

template <typename T, typename Row>
Error combine_rows(const Stream& stream, const Combine& args) {
  const std::int64_t elements = static_cast<std::int64_t>(args.num_tokens) * args.columns;
  if (args.columns % kWide<Row> == 0) {
    return launch(stream, combine_kernel<T, Row, kWide<Row>>, grid_for(elements / kWide<Row>),
                  kCombineThreads, 0, args);
  }
  return launch(stream, combine_kernel<T, Row, 1>, grid_for(elements), kCombineThreads, 0, args);
}

template <typename T>
Error combine_to(const Stream& stream, const Combine& args) {
  if (args.places) {
    const dim3 grid(ceil_div(args.num_tokens, kPanelThreads / kPanelChunks),
                    ceil_div(args.columns / kPanelCols, kPanelsAtOnce));
    return launch(stream, combine_panels_kernel<T>, grid, kPanelThreads, 0, args);
  }
  return args.is_partial ? combine_rows<T, float>(stream, args) : combine_rows<T, T>(stream, args);
}

template <typename T>
void list_kernels(std::vector<const void*>& kernels) {
  kernels.insert(kernels.end(),
                 {reinterpret_cast<const void*>(&combine_kernel<T, float, kWide<float>>),
                  reinterpret_cast<const void*>(&combine_kernel<T, float, 1>),
                  reinterpret_cast<const void*>(&combine_kernel<T, T, kWide<T>>),
                  reinterpret_cast<const void*>(&combine_kernel<T, T, 1>),
                  reinterpret_cast<const void*>(&combine_panels_kernel<T>),
                  reinterpret_cast<const void*>(&gate_kernel<T>)});
}

}  // namespace

std::vector<const void*> combine_kernels() {
  std::vector<const void*> kernels{reinterpret_cast<const void*>(&clear_kernel)};
  list_kernels<__nv_bfloat16>(kernels);
  list_kernels<__half>(kernels);
  return kernels;
}

Error combine(const Stream& stream, SamoyedsDtype dtype, const Combine& args) {
  return dtype == SAMOYEDS_BF16 ? combine_to<__nv_bfloat16>(stream, args)
                                : combine_to<__half>(stream, args);
}

Error gate(const Stream& stream, SamoyedsDtype dtype, const std::int64_t* top_k_index,
           int num_pairs, int num_experts, int inner_size, const void* both, void* inner) {
  const dim3 grid = grid_for(static_cast<std::int64_t>(num_pairs) * inner_size);
  if (dtype == SAMOYEDS_BF16) {
    return launch(stream, gate_kernel<__nv_bfloat16>, grid, kCombineThreads, 0, top_k_index,
                  num_pairs, num_experts, inner_size, static_cast<const __nv_bfloat16*>(both),
                  static_cast<__nv_bfloat16*>(inner));
  }
  return launch(stream, gate_kernel<__half>, grid, kCombineThreads, 0, top_k_index, num_pairs,
                num_experts, inner_size, static_cast<const __half*>(both),
                static_cast<__half*>(inner));
}

Error clear_unrouted(const Stream& stream, const std::int64_t* top_k_index, int num_pairs,
                     int num_experts, std::int64_t row_bytes, void* out) {
  const int blocks = num_pairs < 16384 ? num_pairs : 16384;
  return launch(stream, clear_kernel, blocks, kCombineThreads, 0, top_k_index, num_pairs,
                num_experts, row_bytes, static_cast<std::uint8_t*>(out));
}

}  // namespace samoyeds
