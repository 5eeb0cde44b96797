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
  int tokens;                                                // of a tile; Hopper: see tokens_of()
  int tiles_m;     // of 16 kept rows, that a thread block computes; Hopper: see slab_tiles()
  int min_blocks;  // that fit on an SM by their registers
  int threads;
  bool needs_sm90a;
  bool is_stepped;                 // made for (3, 4, V), see serves()
  int stage_bytes, scratch_bytes;  // of shared memory
  // By switch_period(): 0, 1, 2, 4; and kWideKernel. Null where there is none.
  SsmmKernel kernels[5];
  // The Hopper kernel: reads and writes panels, and has its number of stages compiled in.
  bool is_hopper = false, is_short = false;  // with short tiles, see variants.cuh
  // As `kernels`.
  int hopper_tokens[5] = {}, hopper_stages[5] = {}, hopper_bytes[5] = {}, hopper_box_rows[5] = {};
};
inline constexpr int kNumVariants = 20;
// Hopper, period 4: with a few tokens more a tile, for products without routing.
inline constexpr int kWideKernel = 4;
const SsmmVariant* bf16_variants();  // [kNumVariants]
const SsmmVariant* fp16_variants();
// Of the kernels above, the one for a weight.
inline int kernel_number(const Layout& layout) {
  const int period = switch_period(layout);
  return period == 4 ? 3 : period;
}
inline SsmmKernel kernel_for(const SsmmVariant& variant, const Layout& layout) {
  return variant.kernels[kernel_number(layout)];
}
// Of a tile, at most.
inline int tokens_of(const SsmmVariant& variant, const Layout& layout) {
  return variant.is_hopper ? variant.hopper_tokens[kernel_number(layout)] : variant.tokens;
}
// Whether an instance is made for the order of a weight's tiles.
inline bool serves(const SsmmVariant& variant, const Layout& layout) {
  return layout.kind != Kind::kGeneral && variant.is_stepped == (layout.kind == Kind::kStepped);
}
const SsmmVariant* find_variant(const SamoyedsPlan& plan, SamoyedsDtype dtype);
inline bool is_hopper(const SamoyedsPlan& plan) {
  const SsmmVariant* variant = find_variant(plan, SAMOYEDS_BF16);
  return variant && variant->is_hopper;
}
Tiling tiling_of(const Layout& layout, const SamoyedsPlan& plan);
// Both products of a layer must: the first writes what the second reads.
bool may_use_hopper(const Device& device, const Layout& layout, bool is_down);

// Above so many pairs the down product's results, unless k is split, are stored in the model's
// dtype, as dense torch does: in fp32 they would be the largest traffic of the layer.
inline constexpr std::int64_t kMaxPartialPairs = 512;

// Shared memory of a plan, and whether a device can run it for a weight.
int shared_bytes(const SsmmVariant& variant, const SamoyedsPlan& plan, const Layout& layout);
Error check_plan(const Device& device, const SamoyedsPlan& plan, const Layout& layout,
                 bool is_down);
SamoyedsPlan choose_plan(const Device& device, const Layout& layout, std::int64_t num_experts,
                         std::int64_t num_tokens, std::int64_t top_k, bool is_down,
                         bool allows_hopper);
// Full tiles instead of short ones, Hopper kernel only, where both products of a layer then have
// the same: others are listed for each, which takes longer than short tiles save.
void share_tiles(const Layout& up_layout, SamoyedsPlan& up, const Layout& down_layout,
                 SamoyedsPlan& down);
const char* heuristics();  // the rules as a table

// For stores of box_rows x kPanelCols 16-bit numbers of a matrix, which lie in shared memory like a
// panel.
Error map_matrix(void* matrix, int rows, int columns, int box_rows, TensorMap& map);

// The kernels. Each function queues its own and returns; shapes as in api.h.
Error pack(const Stream& stream, const Layout& layout, int num_experts, std::uint8_t* packed,
           const void* values, const Meta* meta, const Index* index);
Error unpack(const Stream& stream, const Layout& layout, int num_experts,
             const std::uint8_t* packed, void* values, Meta* meta, Index* index);
// At most so many tiles, and places where those of an expert start at a multiple of kPlaceAlign,
// whatever the router chooses.
std::int64_t max_tiles(std::int64_t num_pairs, std::int64_t num_experts, Tiling tiling);
std::int64_t max_places(std::int64_t num_pairs, std::int64_t num_experts);
struct Route {
  const std::int64_t* top_k_index;  // [pairs]
  int num_pairs, num_experts;
  Tiling tiling;
  int* run_counts;   // [num_run_counts()]; null: slower where pairs are many
  int* pairs;        // [pairs]; with places [max_places()], kNoPair where there is none
  int* places;       // [pairs]  where each pair is in `pairs`, or kNoPlace; or null
  Tile* tiles;       // [max_tiles()]
  int* num_tiles;    // [1]
  int* num_claimed;  // [2], both products' of SsmmArgs; or null
  int max_places;    // set by route()
};
std::int64_t num_run_counts(std::int64_t num_pairs, std::int64_t num_experts);
Error route(Stream stream, const Route& args);
// x [rows, columns] to panels: to each place the row of its pair, or zeros.
struct Gather {
  const void* x;
  int columns;
  Divisor pairs_per_row;
  const int* pairs;  // [max_places], or null: row r at place r
  int num_rows;      // without pairs
  int max_places;
  void* panels;
  int* num_claimed;  // [1], of SsmmArgs; null: where there was routing
};
Error gather(const Stream& stream, const Gather& args);
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
  const void* rows;  // [splits, T*K, m], or panels
  bool is_partial;   // rows are fp32, else of the result's dtype
  int splits;
  int columns;        // m
  const int* places;  // [T*K]; null: rows are no panels
  int max_places;
  int tile_columns;  // of panels, see first_column_of()
  void* out;         // [T, m]
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
std::vector<const void*> gather_kernels();
std::vector<const void*> general_kernels();
std::vector<const void*> combine_kernels();

}  // namespace samoyeds
