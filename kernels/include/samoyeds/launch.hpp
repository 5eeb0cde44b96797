// Host side, shared by the sources: devices, plans, and how kernels are started.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "samoyeds/api.h"
#include "samoyeds/args.cuh"

namespace samoyeds {

struct Device {
  int ordinal = -1;
  int capability = 0;  // 10 * major + minor
  int num_sms = 0;
  int block_shared_bytes = 0;  // most that one thread block may have
  int sm_shared_bytes = 0;
};

// A stream, and whether the next kernel may start before its predecessor on it has ended: then it
// must wait by itself (ptx::wait_for_previous_kernel) before it touches what that one writes.
struct Stream {
  const Device& device;
  cudaStream_t handle;
  bool overlaps = false;
};

// Status with a text, as the C interface reports it.
struct Error {
  SamoyedsStatus status = SAMOYEDS_OK;
  std::string text;
  explicit operator bool() const { return status != SAMOYEDS_OK; }
};

Error invalid(std::string text);
Error unsupported(std::string text);
Error check_cuda(cudaError_t code, const char* doing);

using SsmmKernel = void (*)(SsmmArgs);

// An instance of the matrix kernel.
struct SsmmVariant {
  int m_frags, n_frags, warps_m, warps_n, warps_k;  // as in SamoyedsPlan
  int tokens;                                       // of a tile
  int tiles_m;                                      // of 16 kept rows, that a thread block computes
  int min_blocks;                                   // on an SM, as its registers allow
  int threads;
  bool needs_sm90a;
  int stage_bytes, scratch_bytes;  // of shared memory
  SsmmKernel kernels[4];           // by switch_period(): 0, 1, 2, 4; null where there is none
};
inline constexpr int kNumVariants = 10;
const SsmmVariant* bf16_variants();  // [kNumVariants]
const SsmmVariant* fp16_variants();
// Of the kernels above, the one for a weight.
inline SsmmKernel kernel_for(const SsmmVariant& variant, const Layout& layout) {
  const int period = switch_period(layout);
  return variant.kernels[period == 4 ? 3 : period];
}
const SsmmVariant* find_variant(const SamoyedsPlan& plan, SamoyedsDtype dtype);

// Above so many rows the down product's results are stored in the model's dtype, as dense torch
// does: in fp32 they would be the largest traffic of the layer.
inline constexpr std::int64_t kMaxPartialPairs = 512;

// Shared memory of a plan, and whether a device can run it for a weight.
int shared_bytes(const SsmmVariant& variant, const SamoyedsPlan& plan);
Error check_plan(const Device& device, const SamoyedsPlan& plan, const Layout& layout,
                 bool may_split);
SamoyedsPlan choose_plan(const Device& device, const Layout& layout, std::int64_t num_experts,
                         std::int64_t num_tokens, std::int64_t top_k, bool is_down);

// The kernels; each queues one and returns.
Error pack(const Stream& stream, const Layout& layout, int num_experts, std::uint8_t* packed,
           const void* values, const std::uint8_t* meta, const std::uint8_t* index);
Error unpack(const Stream& stream, const Layout& layout, int num_experts,
             const std::uint8_t* packed, void* values, std::uint8_t* meta, std::uint8_t* index);
std::int64_t max_tiles(std::int64_t num_pairs, std::int64_t num_experts, std::int64_t tile_tokens);
Error route(const Stream& stream, const std::int64_t* top_k_index, int num_pairs, int num_experts,
            int tile_tokens, int* pairs, Tile* tiles, int* num_tiles);
Error ssmm(const Stream& stream, const SamoyedsPlan& plan, SamoyedsDtype dtype, SsmmArgs args,
           std::int64_t max_tiles);
// Patterns that no matrix instruction fits: tiles of kGeneralTokens tokens.
inline constexpr int kGeneralTokens = 8;
Error general(const Stream& stream, SamoyedsDtype dtype, const SsmmArgs& args,
              std::int64_t max_tiles);

struct Combine {
  const std::int64_t* top_k_index;  // [T, K]
  const void* top_k_weights;        // [T, K]
  SamoyedsDtype weights_dtype;
  int num_tokens, top_k, num_experts;
  const void* rows;  // [splits, T*K, m]
  bool is_partial;   // rows are fp32, else of the result's dtype
  int splits;
  int columns;  // m
  void* out;    // [T, m]
};
Error combine(const Stream& stream, SamoyedsDtype dtype, const Combine& args);
// inner [pairs, I] = SiLU(gate) * up of both [pairs, 2I].
Error gate(const Stream& stream, SamoyedsDtype dtype, const std::int64_t* top_k_index,
           int num_pairs, int num_experts, int inner_size, const void* both, void* inner);
// Zeros into the rows of `out` [pairs, columns] whose choice belongs to no expert here.
Error clear_unrouted(const Stream& stream, const std::int64_t* top_k_index, int num_pairs,
                     int num_experts, std::int64_t row_bytes, void* out);

namespace detail {
template <typename T>
struct Identity {
  using type = T;
};
template <typename T>
using Same = typename Identity<T>::type;  // not deduced: arguments convert to the kernel's types
}  // namespace detail

template <typename... Args>
Error launch(const Stream& stream, void (*kernel)(Args...), dim3 grid, dim3 block, int shared,
             const detail::Same<Args>&... args) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream.handle;
  config.attrs = &overlap;
  config.numAttrs = stream.overlaps && stream.device.capability >= 90 ? 1 : 0;
  return check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "launching a kernel");
}

}  // namespace samoyeds
