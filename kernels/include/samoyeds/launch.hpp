// Host side, shared by the sources: the matrix kernel's instances, plans, and every kernel.
#pragma once

#include <cstdint>
#include <vector>

#include "samoyeds/args.cuh"
#include "samoyeds/device.hpp"

namespace samoyeds {

using SsmmKernel = void (*)(SsmmArgs);

// An instance of the matrix kernel.
struct SsmmVariant {
  int m_frags, n_frags, warps_m, warps_n, warps_k, cluster;  // as in SamoyedsPlan
  int tokens;                                                // of a tile
  int tiles_m;     // of 16 kept rows, that a thread block computes
  int min_blocks;  // that fit on an SM by their registers
  int threads;
  bool needs_sm90a;
  int stage_bytes, scratch_bytes;  // of shared memory
  SsmmKernel kernels[4];           // by switch_period(): 0, 1, 2, 4; null where there is none
};
inline constexpr int kNumVariants = 11;
const SsmmVariant* bf16_variants();  // [kNumVariants]
const SsmmVariant* fp16_variants();
// Of the kernels above, the one for a weight.
inline SsmmKernel kernel_for(const SsmmVariant& variant, const Layout& layout) {
  const int period = switch_period(layout);
  return variant.kernels[period == 4 ? 3 : period];
}
const SsmmVariant* find_variant(const SamoyedsPlan& plan, SamoyedsDtype dtype);

// Above so many pairs the down product's results, unless k is split, are stored in the model's
// dtype, as dense torch does: in fp32 they would be the largest traffic of the layer.
inline constexpr std::int64_t kMaxPartialPairs = 512;

// Shared memory of a plan, and whether a device can run it for a weight.
int shared_bytes(const SsmmVariant& variant, const SamoyedsPlan& plan);
Error check_plan(const Device& device, const SamoyedsPlan& plan, const Layout& layout,
                 bool may_split);
SamoyedsPlan choose_plan(const Device& device, const Layout& layout, std::int64_t num_experts,
                         std::int64_t num_tokens, std::int64_t top_k, bool is_down);
const char* heuristics();  // the rules as a table

// The kernels. Each function queues its own and returns; shapes as in api.h.
Error pack(const Stream& stream, const Layout& layout, int num_experts, std::uint8_t* packed,
           const void* values, const Meta* meta, const Index* index);
Error unpack(const Stream& stream, const Layout& layout, int num_experts,
             const std::uint8_t* packed, void* values, Meta* meta, Index* index);
// How the tokens of an expert are cut: tiles of `tokens`, as many as a multiple of `cluster`; the
// last ones may be empty.
struct Tiling {
  std::int64_t tokens;
  int cluster = 1;
  bool operator==(const Tiling& other) const {
    return tokens == other.tokens && cluster == other.cluster;
  }
};
// At most so many tiles, whatever the router chooses.
std::int64_t max_tiles(std::int64_t num_pairs, std::int64_t num_experts, Tiling tiling);
Error route(const Stream& stream, const std::int64_t* top_k_index, int num_pairs, int num_experts,
            Tiling tiling, int* pairs, Tile* tiles, int* num_tiles);
Error ssmm(const Stream& stream, const SamoyedsPlan& plan, SamoyedsDtype dtype, SsmmArgs args,
           std::int64_t max_tiles);
// Layouts of Kind::kGeneral, without a plan; tiles of kGeneralTokens tokens.
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
// Zeros into the rows of `out` [pairs][row_bytes] whose choice belongs to no expert here.
Error clear_unrouted(const Stream& stream, const std::int64_t* top_k_index, int num_pairs,
                     int num_experts, std::int64_t row_bytes, void* out);

// Every kernel but those of the variants, for the device to load.
std::vector<const void*> pack_kernels();
std::vector<const void*> route_kernels();
std::vector<const void*> general_kernels();
std::vector<const void*> combine_kernels();

}  // namespace samoyeds
