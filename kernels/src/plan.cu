// Which instance of the matrix kernel runs, and into what parts the product is cut, by the rules of
// rules.hpp.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "samoyeds/hopper.cuh"
#include "samoyeds/launch.hpp"
#include "samoyeds/rules.hpp"
#include "samoyeds/ssmm.cuh"
#include "samoyeds/tile_sizes.hpp"

namespace samoyeds {
namespace {

constexpr int kMaxSplits = 8;
constexpr std::int64_t kMaxSplitPairs = 4096;
constexpr std::int64_t kMaxTiles = 1 << 23;  // of tokens, see Tile::group
constexpr int kReservedBytes = 1024;  // of an SM's shared memory, by CUDA for each thread block
// The least that tiles of another size than full ones are chosen for. Of a product without routing
// it is known how many there are; wide ones take longer for their results.
constexpr double kShortGain = 0.005, kWideGain = 0.02;

// Tokens that an expert which is hit at all meets on average, when the router is fair.
struct Load {
  double experts_hit;
  double tokens_each;
};

Load expected_load(std::int64_t num_experts, std::int64_t num_tokens, std::int64_t top_k) {
  const double experts = static_cast<double>(num_experts);
  const double missed = std::max(0.0, 1.0 - static_cast<double>(top_k) / experts);
  const double hit = experts * (1.0 - std::pow(missed, static_cast<double>(num_tokens)));
  return {hit, static_cast<double>(num_tokens * top_k) / std::max(hit, 1.0)};
}

// Tiles of tokens, on average: the last one of an expert is half full. Where one or two do for
// most, they are counted by how likely it is that an expert meets more, if tokens choose alike:
// half a tile more for each would split k as if there were another wave.
double expected_tiles(const Load& load, const SsmmVariant& variant, const Layout& layout) {
  const double tile = tokens_of(variant, layout), mean = load.tokens_each;
  if (mean > 2 * tile) return load.experts_hit * (mean / tile + 0.5);
  double tiles = 1;
  for (int full = 1; full <= 4; ++full) {
    // Poisson's, by the normal distribution: more than so many full tiles.
    tiles += 0.5 * std::erfc((full * tile + 0.5 - mean) / std::sqrt(2 * mean));
  }
  return load.experts_hit * tiles;
}

// Slabs of the Hopper kernel: 128 dense rows.
int slab_tiles(const Layout& layout) { return layout.kind == Kind::kDense24 ? 8 : 4; }

// Slabs of a part of the rows, Hopper kernel only.
int part_slabs(const SsmmVariant& variant) { return variant.warps_m / 4 * variant.cluster; }

// Items of a tile of tokens: parts of the rows, without splits.
int parts_of(const SsmmVariant& variant, const Layout& layout) {
  if (!variant.is_hopper) return ceil_div(layout.tiles, variant.tiles_m);
  return ceil_div(layout.tiles / slab_tiles(layout), part_slabs(variant));
}

// Behind whole parts of the rows: those of two tiles of tokens become one item.
bool leaves_half_a_part(const SsmmVariant& variant, const Layout& layout) {
  if (!variant.is_hopper) return false;
  const int slabs = layout.tiles / slab_tiles(layout), whole = part_slabs(variant);
  return slabs > whole && slabs % whole == whole / 2;
}

int largest_stages(const Device& device, const SsmmVariant& variant, SamoyedsPlan plan,
                   const Layout& layout) {
  if (variant.is_hopper) return variant.hopper_stages[kernel_number(layout)];
  const int budget =
      std::min(device.block_shared_bytes,
               device.sm_shared_bytes / static_cast<int>(plan.blocks_per_sm) - kReservedBytes);
  for (plan.stages = kMaxStages; plan.stages >= 2; --plan.stages) {
    if (shared_bytes(variant, plan, layout) <= budget) return static_cast<int>(plan.stages);
  }
  return 0;
}

// The tiles of a product, Hopper kernel only.
TileProblem tile_problem(const SsmmVariant& variant, const Layout& layout) {
  TileProblem problem{};
  problem.most_tokens = tokens_of(variant, layout);
  problem.step = kLiveStep;
  problem.parts = parts_of(variant, layout);
  problem.blocks = layout.blocks;
  problem.slab_tiles = slab_tiles(layout);
  if (variant.is_short) problem.item_clocks = kShortItemClocks;
  return problem;
}

// Clocks of an expert's tiles of tokens, on average, a part of the rows each: Hopper kernel only.
double expected_clocks(const SamoyedsPlan& plan, const Layout& layout, double tokens) {
  const TileProblem problem = tile_problem(*find_variant(plan, SAMOYEDS_BF16), layout);
  const Tiling tiling = tiling_of(layout, plan);
  // If tokens choose alike, how many an expert meets is Poisson's, by the normal distribution.
  constexpr int kSteps = 12;  // to either side
  constexpr double kStep = 0.25;
  double clocks = 0, weights = 0;
  for (int i = -kSteps; i <= kSteps; ++i) {
    const int count = std::max(1, static_cast<int>(tokens + i * kStep * std::sqrt(tokens) + 0.5));
    const int tiles = ceil_div(count, tiling.most), size = tiling.size(count, tiles);
    const std::int64_t rest = item_clocks(problem, count - (tiles - 1) * size);
    const double weight = std::exp(-0.5 * (i * kStep) * (i * kStep));
    clocks += weight * static_cast<double>((tiles - 1) * item_clocks(problem, size) + rest);
    weights += weight;
  }
  return clocks / weights;
}

// Whether an expert's short tiles take less time than the full ones of the same rows.
bool are_worth_it(const SamoyedsPlan& short_tiles, const Layout& layout, double tokens) {
  SamoyedsPlan full_tiles = short_tiles;
  full_tiles.n_frags = kFullFrags;
  const auto clocks = [&](const SamoyedsPlan& plan) {
    return expected_clocks(plan, layout, tokens);
  };
  return clocks(short_tiles) < (1 - kShortGain) * clocks(full_tiles);
}

int steps_of(const Layout& layout, const SamoyedsPlan& plan) {
  return ceil_div(layout.blocks, static_cast<int>(plan.warps_k));
}

// A part of k of less than four steps would not fill the pipeline.
int max_splits(const Layout& layout, const SamoyedsPlan& plan) {
  return std::min(kMaxSplits, std::max(1, steps_of(layout, plan) / 4));
}

// Splits of k that cost the least, counted in bytes: weights that the thread blocks could have read
// until the last wave ends, and results that are written and read again, in fp32 where there are
// splits.
int best_splits(const Device& device, const Layout& layout, const SsmmVariant& variant,
                const SamoyedsPlan& plan, const Load& load, double num_pairs) {
  const double slots = static_cast<double>(device.num_sms) * plan.blocks_per_sm;
  const double tiles_n = expected_tiles(load, variant, layout);
  const int tiles_m = ceil_div(layout.tiles, variant.tiles_m);
  const double step_bytes = static_cast<double>(variant.tiles_m) * plan.warps_k * kBlockStride;
  const int steps = steps_of(layout, plan);
  int best = 1;
  double best_cost = 1e30;
  for (int splits = 1; splits <= max_splits(layout, plan); ++splits) {
    const double waves = std::ceil(tiles_n * tiles_m * splits / slots);
    // Each item also costs about half a step of its own.
    const double weights = waves * (static_cast<double>(steps) / splits + 0.5) * slots * step_bytes;
    const bool is_partial = splits > 1 || num_pairs <= kMaxPartialPairs;
    const double results = num_pairs * layout.rows * 2 * (is_partial ? 4 * splits : 2);
    if (weights + results < best_cost * 0.97) best_cost = weights + results, best = splits;
  }
  return best;
}

}  // namespace

const SsmmVariant* find_variant(const SamoyedsPlan& plan, SamoyedsDtype dtype) {
  const SsmmVariant* table = dtype == SAMOYEDS_BF16 ? bf16_variants() : fp16_variants();
  for (int i = 0; i < kNumVariants; ++i) {
    const SsmmVariant& v = table[i];
    if (v.m_frags == plan.m_frags && v.n_frags == plan.n_frags && v.warps_m == plan.warps_m &&
        v.warps_n == plan.warps_n && v.warps_k == plan.warps_k && v.cluster == plan.cluster) {
      return &v;
    }
  }
  return nullptr;
}

Tiling tiling_of(const Layout& layout, const SamoyedsPlan& plan) {
  if (layout.kind == Kind::kGeneral) return {kGeneralTokens};
  const SsmmVariant& variant = *find_variant(plan, SAMOYEDS_BF16);
  const int tokens = tokens_of(variant, layout);
  if (variant.is_hopper) return {tokens, kPlaceAlign, kLiveStep};
  return {tokens};
}

bool may_use_hopper(const Device& device, const Layout& layout, bool is_down) {
  // Whole blocks of k, and whole slabs; combine() expects the down product's columns in order.
  return device.capability == 90 &&
         (layout.kind == Kind::kDense24 || layout.kind == Kind::kSwitched) &&
         !(is_down && layout.interleaved) && layout.cols % kBlockCols == 0 &&
         layout.rows % kSlabRows == 0;
}

int shared_bytes(const SsmmVariant& variant, const SamoyedsPlan& plan, const Layout& layout) {
  if (variant.is_hopper) return variant.hopper_bytes[kernel_number(layout)];
  return static_cast<int>(plan.stages) * variant.stage_bytes + variant.scratch_bytes;
}

Error check_plan(const Device& device, const SamoyedsPlan& plan, const Layout& layout,
                 bool is_down) {
  const SsmmVariant* variant = find_variant(plan, SAMOYEDS_BF16);
  if (!variant) {
    return invalid("a plan's fragments and warps must be those of a compiled kernel, found " +
                   std::to_string(plan.m_frags) + " x " + std::to_string(plan.n_frags) +
                   " fragments and " + std::to_string(plan.warps_m) + " * " +
                   std::to_string(plan.warps_n) + " * " + std::to_string(plan.warps_k) +
                   " warps, clusters of " + std::to_string(plan.cluster));
  }
  if (variant->needs_sm90a && device.capability != 90) {
    return unsupported("this plan needs a GPU of compute capability 9.0, found another");
  }
  if (!serves(*variant, layout)) {
    return unsupported(layout.kind == Kind::kStepped
                           ? "(3, 4, V) needs a plan of 3 fragments of rows a warp, found " +
                                 std::to_string(plan.m_frags)
                           : "this plan needs a weight with the pattern (3, 4, V), found another");
  }
  if (!kernel_for(*variant, layout)) {
    return unsupported("this plan needs a V that is a multiple of " +
                       std::string(variant->is_hopper ? "128" : "64"));
  }
  if (variant->is_hopper && is_down && layout.interleaved) {
    return unsupported("this plan needs a down product whose weight is no gate_up, found one");
  }
  if (variant->is_hopper && !may_use_hopper(device, layout, is_down)) {
    return unsupported("this plan needs m and k that are multiples of 128, found " +
                       std::to_string(layout.rows) + " x " + std::to_string(layout.cols));
  }
  if (variant->is_hopper &&
      (plan.splits != 1 || plan.stages != variant->hopper_stages[kernel_number(layout)])) {
    return invalid("this plan must have 1 split and " +
                   std::to_string(variant->hopper_stages[kernel_number(layout)]) +
                   " stages, found " + std::to_string(plan.splits) + " and " +
                   std::to_string(plan.stages));
  }
  if (plan.stages < 1 || plan.stages > kMaxStages) {
    return invalid("a plan's stages must be 1 to " + std::to_string(kMaxStages) + ", found " +
                   std::to_string(plan.stages));
  }
  if (plan.splits < 1 || plan.splits > std::max(1, layout.blocks) ||
      (plan.splits > 1 && !is_down)) {
    return invalid("a plan's splits must be 1, or at most " + std::to_string(layout.blocks) +
                   " for the down product, found " + std::to_string(plan.splits));
  }
  if (plan.blocks_per_sm < 1 || plan.blocks_per_sm > variant->min_blocks) {
    return invalid("this plan's blocks_per_sm must be 1 to " + std::to_string(variant->min_blocks) +
                   ", found " + std::to_string(plan.blocks_per_sm));
  }
  const int bytes = shared_bytes(*variant, plan, layout);
  const int most = variant->is_hopper ? device.all_shared_bytes : device.block_shared_bytes;
  if (bytes > most) {
    return invalid("a plan needs at most " + std::to_string(most) +
                   " bytes of shared memory on this GPU, found " + std::to_string(bytes));
  }
  return {};
}

SamoyedsPlan choose_plan(const Device& device, const Layout& layout, std::int64_t num_experts,
                         std::int64_t num_tokens, std::int64_t top_k, bool is_down,
                         bool allows_hopper) {
  const Load load = expected_load(num_experts, num_tokens, top_k);
  for (const Rule& rule : kRules) {
    const SsmmVariant& variant = *find_variant(rule.plan, SAMOYEDS_BF16);
    const bool may_run =
        serves(variant, layout) && kernel_for(variant, layout) &&
        device.capability >= rule.min_capability && device.capability <= rule.max_capability &&
        (!switches_rows(layout) || rule.v_step == 0 || layout.pattern.v % rule.v_step == 0);
    if (!may_run || layout.cols < rule.min_cols || load.tokens_each < rule.min_tokens ||
        load.tokens_each > rule.max_tokens) {
      continue;
    }
    SamoyedsPlan plan = rule.plan;
    if (variant.is_hopper && !(allows_hopper && may_use_hopper(device, layout, is_down))) continue;
    // A product without routing has sizes of its own, see tile_sizes.hpp.
    if (variant.is_short &&
        (num_experts == 1 || !are_worth_it(rule.plan, layout, load.tokens_each))) {
      continue;
    }
    const bool may_split = is_down && !variant.is_hopper && num_tokens * top_k <= kMaxSplitPairs;
    const double items = expected_tiles(load, variant, layout) * parts_of(variant, layout) *
                         variant.cluster * (may_split ? max_splits(layout, plan) : 1);
    if (items < rule.min_waves * device.num_sms * plan.blocks_per_sm) continue;
    plan.stages = largest_stages(device, variant, plan, layout);
    if (plan.stages < 3 && plan.blocks_per_sm > 1) {
      plan.blocks_per_sm = 1;
      plan.stages = largest_stages(device, variant, plan, layout);
    }
    if (plan.stages < 2) continue;
    // Many rows in fp32, one for each split, would be the largest traffic of the layer.
    const std::int64_t num_pairs = num_tokens * top_k;
    plan.splits =
        may_split ? best_splits(device, layout, variant, plan, load, static_cast<double>(num_pairs))
                  : 1;
    return plan;
  }
  // Nothing larger fits this GPU's shared memory.
  SamoyedsPlan plan{1, 4, 8, 1, 1, 0, 1, 1, 1};
  if (layout.kind == Kind::kStepped) plan = {3, 1, 4, 2, 1, 0, 1, 1, 1};
  plan.stages = largest_stages(device, *find_variant(plan, SAMOYEDS_BF16), plan, layout);
  return plan;
}

void share_tiles(const Layout& up_layout, SamoyedsPlan& up, const Layout& down_layout,
                 SamoyedsPlan& down) {
  if (tiling_of(up_layout, up) == tiling_of(down_layout, down)) return;
  const auto with_full_tiles = [](SamoyedsPlan plan) {
    plan.n_frags = kFullFrags;
    return plan;
  };
  const SamoyedsPlan full_up = with_full_tiles(up), full_down = with_full_tiles(down);
  if (tiling_of(up_layout, full_up) == tiling_of(down_layout, full_down)) {
    up = full_up;
    down = full_down;
  }
}

namespace {

// A product without routing, Hopper kernel only: its tiles, and the kernel that has such.
struct Cut {
  const SsmmVariant* variant;
  int kernel;
  TileSizes sizes;
  std::int64_t end;  // clocks
  bool is_copied;    // results are copied out while the next item is multiplied
};

Cut cut_rows(const SsmmVariant& variant, int kernel, const SsmmArgs& args, int num_clusters) {
  TileProblem problem = tile_problem(variant, args.layout);
  problem.num_rows = args.tokens.num_rows;
  problem.most_tokens = variant.hopper_tokens[kernel];
  problem.num_clusters = num_clusters;
  const TileSizes sizes = best_sizes(problem);
  // Results that are copied gain where enough items follow. H200: with 2.9 items a cluster (4096 x
  // 4096 x 14336) a product takes 233 us so and 244 without, with 3.0 (14336 x 1024 x 4096) 70 and
  // 74.
  const std::int64_t items = std::int64_t{problem.parts} * (sizes.num_large + sizes.num_small);
  const bool is_copied = args.output == Output::kRows && 2 * items > 5 * num_clusters;
  return {&variant, kernel, sizes, *end_of_items(problem, sizes, INT64_MAX), is_copied};
}

// With tiles of the size that ends it first.
Cut best_cut(const SamoyedsPlan& plan, SamoyedsDtype dtype, const SsmmArgs& args,
             int num_clusters) {
  const SsmmVariant& variant = *find_variant(plan, dtype);
  const int number = kernel_number(args.layout);
  Cut best = cut_rows(variant, number, args, num_clusters);
  if (variant.is_short || switch_period(args.layout) != 4) return best;
  const auto consider = [&](const SsmmVariant& other, int kernel, double gain) {
    const Cut cut = cut_rows(other, kernel, args, num_clusters);
    const auto bound = (1 - gain) * static_cast<double>(best.end);
    if (cut.is_copied && static_cast<double>(cut.end) < bound) best = cut;
  };
  SamoyedsPlan short_tiles = plan;
  short_tiles.n_frags = kShortFrags;
  consider(*find_variant(short_tiles, dtype), number, 0);
  consider(variant, kWideKernel, kWideGain);
  return best;
}

}  // namespace

Error ssmm(const Stream& stream, const SamoyedsPlan& plan, SamoyedsDtype dtype, SsmmArgs args,
           std::int64_t max_tiles) {
  const SsmmVariant* variant = find_variant(plan, dtype);
  const int parts = parts_of(*variant, args.layout) * static_cast<int>(plan.splits);
  const int cluster = variant->cluster;
  const std::int64_t slots = stream.device.num_sms * plan.blocks_per_sm / cluster;
  int kernel = kernel_number(args.layout), bytes = shared_bytes(*variant, plan, args.layout);
  if (variant->is_hopper && !args.tokens.tiles) {
    const Cut cut = best_cut(plan, dtype, args, static_cast<int>(slots));
    variant = cut.variant;
    kernel = cut.kernel;
    bytes = variant->hopper_bytes[kernel];
    args.tokens.sizes = cut.sizes;
    max_tiles = cut.sizes.num_large + cut.sizes.num_small;
    if (cut.is_copied) {
      args.output = Output::kMatrix;
      SAMOYEDS_RETURN_IF_ERROR(map_matrix(args.out, args.tokens.num_rows, args.layout.rows,
                                          variant->hopper_box_rows[kernel], args.matrix));
    }
  }
  if (max_tiles > kMaxTiles) {
    return unsupported("a product must have at most " + std::to_string(kMaxTiles) +
                       " tiles of tokens, found " + std::to_string(max_tiles));
  }
  const std::int64_t items = max_tiles * parts;
  args.stages = static_cast<int>(plan.stages);
  args.splits = make_divisor(static_cast<int>(plan.splits));
  args.parts = make_divisor(parts);
  args.whole_parts = make_divisor(parts - (leaves_half_a_part(*variant, args.layout) ? 1 : 0));
  // Beyond the last item each thread block, or cluster, still asks for one.
  const std::int64_t most = INT32_MAX - 2 * slots;
  if (items > most) {
    return unsupported("a product must have at most " + std::to_string(most) + " parts, found " +
                       std::to_string(items));
  }
  return launch_clusters(stream, variant->kernels[kernel],
                         static_cast<unsigned>(std::min(items, slots) * cluster), variant->threads,
                         bytes, cluster, args);
}

const char* heuristics() {
  static const std::string text = [] {
    std::string table =
        "capability  pattern  V      k        tokens/expert  waves   m_frags  n_frags  "
        "warps (m, n, k)  cluster  blocks/SM  measured\n";
    for (const Rule& r : kRules) {
      const auto at_least = [](double x) {
        char text[16] = "any";
        if (x > 0) std::snprintf(text, sizeof text, ">= %g", x);
        return std::string(text);
      };
      char most[16] = "", line[200];
      if (r.max_tokens < kAny) std::snprintf(most, sizeof most, "<= %g", r.max_tokens);
      const std::string tokens = r.max_tokens < kAny ? most : at_least(r.min_tokens);
      std::snprintf(line, sizeof line,
                    "%s%d.%d      %-7s  %-5s  %-7s  %-13s  %-6s  %-7d  %-7d  (%d, %d, %d)        "
                    "%-7d  %-9d  ",
                    r.max_capability == r.min_capability ? "= " : ">=", r.min_capability / 10,
                    r.min_capability % 10,
                    find_variant(r.plan, SAMOYEDS_BF16)->is_stepped ? "3:4:V" : "others",
                    r.v_step ? "64*n" : "any", at_least(r.min_cols).c_str(), tokens.c_str(),
                    at_least(r.min_waves).c_str(), static_cast<int>(r.plan.m_frags),
                    static_cast<int>(r.plan.n_frags), static_cast<int>(r.plan.warps_m),
                    static_cast<int>(r.plan.warps_n), static_cast<int>(r.plan.warps_k),
                    static_cast<int>(r.plan.cluster), static_cast<int>(r.plan.blocks_per_sm));
      table += std::string(line) + r.measured + "\n";
    }
    return table +
           "stages: as many as shared memory holds; splits of the down product: those that cost "
           "the\n"
           "least, counted in bytes.\n";
  }();
  return text.c_str();
}

}  // namespace samoyeds
