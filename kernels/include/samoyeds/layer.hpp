// An expert layer on the GPU: routing, up product with its gate, down product, weighted sum.
#pragma once

#include "samoyeds/checks.hpp"
#include "samoyeds/launch.hpp"

namespace samoyeds {

// What a layer runs with: plans, and where each buffer lies in the workspace. Worked out the same
// way for the size of the workspace and for the run.
struct Job {
  const SamoyedsRouting* routing = nullptr;
  const SamoyedsWeight* up = nullptr;  // null: the layer ends, or begins, with the other product
  const SamoyedsWeight* down = nullptr;
  Layout up_layout{}, down_layout{};
  SamoyedsPlan up_plan{}, down_plan{};
  std::int64_t num_pairs = 0, num_experts = 0;
  // Bytes from the start of the workspace; two products with tiles of one size share their tiles.
  std::int64_t counts = 0;      // int [4]  tiles of up, of down; items claimed of up, of down
  std::int64_t run_counts = 0;  // int [num_run_counts()]
  std::int64_t pairs = 0;       // int [places]
  std::int64_t places = 0;      // int [pairs]  only where a product reads panels, as the next two
  std::int64_t max_places = 0;
  std::int64_t panels = 0;  // [k / 64][max_places]  what the first product reads
  std::int64_t up_tiles = 0, down_tiles = 0;
  std::int64_t both = 0;   // [pairs, 2I]  only where the gate is a kernel of its own
  std::int64_t inner = 0;  // [pairs, I]
  std::int64_t rows = 0;   // [splits, pairs, H]  results of the down product
  std::int64_t total = 0;
  bool is_fused = false;    // the gate runs inside the up product
  bool is_partial = false;  // rows are fp32
  bool is_hopper = false;   // activations are panels; `inner` and `rows` are, too
};

Error make_job(const Device& device, const SamoyedsLaunch& launch, const SamoyedsRouting* routing,
               const SamoyedsWeight* up, const SamoyedsWeight* down, Job& job);

// The plan given or chosen, and checked; empty for general patterns, whose kernel has none.
Error plan_product(const Device& device, const SamoyedsPlan* given, const Layout& layout,
                   std::int64_t num_experts, std::int64_t num_tokens, std::int64_t top_k,
                   bool is_down, bool allows_hopper, SamoyedsPlan& plan);

// The functions of the C interface of the same names, shapes there.
Error moe_mlp(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
              const SamoyedsWeight* gate_up, const SamoyedsWeight* down, const void* hidden,
              void* out);
Error moe_up(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
             const SamoyedsWeight* weight, const void* hidden, void* out);
Error moe_down(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
               const SamoyedsWeight* weight, const void* inner, void* out);
// Negative: an error, as the C interface has it.
std::int64_t linear_workspace_bytes(const SamoyedsLaunch* launch, const SamoyedsWeight* weight,
                                    std::int64_t num_rows);
Error linear(const SamoyedsLaunch* launch, const SamoyedsWeight* weight, const void* x,
             std::int64_t num_rows, void* out);

}  // namespace samoyeds
