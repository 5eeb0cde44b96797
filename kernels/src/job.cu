// The plans of a layer and the order of its workspace.
#include "samoyeds/layer.hpp"

namespace samoyeds {
namespace {

Error check_mlp(const SamoyedsWeight& up, const SamoyedsWeight& down) {
  if (up.dtype == down.dtype && up.num_experts == down.num_experts && up.rows == 2 * down.cols &&
      up.cols == down.rows && up.is_gate_up) {
    return {};
  }
  return invalid("gate_up [" + std::to_string(up.num_experts) +
                 ", 2I, H] and down [E, H, I] must form an MLP in one dtype, found [" +
                 std::to_string(up.rows) + ", " + std::to_string(up.cols) + "] and [" +
                 std::to_string(down.num_experts) + ", " + std::to_string(down.rows) + ", " +
                 std::to_string(down.cols) + "]");
}

// A buffer begins with a line of the L2. Bulk copies that begin 16 bytes behind one read 29 % more
// from there, and layers at T = 4096 took up to 1.4 times as long.
void lay_out_workspace(Job& job) {
  constexpr std::int64_t kLineBytes = 128;
  const auto take = [&job](std::int64_t bytes) {
    const std::int64_t offset = job.total;
    job.total += (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
    return offset;
  };
  const auto take_tiles = [&](Tiling tiling) {
    return take(max_tiles(job.num_pairs, job.num_experts, tiling) *
                static_cast<std::int64_t>(sizeof(Tile)));
  };
  job.counts = take(4 * sizeof(int));
  job.run_counts =
      take(num_run_counts(job.num_pairs, job.num_experts) * static_cast<std::int64_t>(sizeof(int)));
  job.max_places = job.is_hopper ? max_places(job.num_pairs, job.num_experts) : job.num_pairs;
  job.pairs = take(job.max_places * static_cast<std::int64_t>(sizeof(int)));
  if (job.is_hopper) {
    job.places = take(job.num_pairs * static_cast<std::int64_t>(sizeof(int)));
    job.panels = take(job.max_places * (job.up ? job.up->cols : job.down->cols) * 2);
  }
  const Tiling up = job.up ? tiling_of(job.up_layout, job.up_plan) : Tiling{0};
  if (job.up) job.up_tiles = take_tiles(up);
  if (!job.down) return;
  const Tiling down = tiling_of(job.down_layout, job.down_plan);
  job.down_tiles = down == up ? job.up_tiles : take_tiles(down);
  if (job.up) {
    if (!job.is_fused) job.both = take(job.num_pairs * job.up->rows * 2);
    job.inner = take(job.max_places * job.down->cols * 2);
  }
  if (job.is_hopper && job.up) {
    job.rows = job.panels;  // of the same size, and no longer needed then
    return;
  }
  job.rows = take(job.max_places * job.down->rows *
                  (job.is_partial ? 4 * static_cast<std::int64_t>(job.down_plan.splits) : 2));
}

}  // namespace

Error plan_product(const Device& device, const SamoyedsPlan* given, const Layout& layout,
                   std::int64_t num_experts, std::int64_t num_tokens, std::int64_t top_k,
                   bool is_down, bool allows_hopper, SamoyedsPlan& plan) {
  if (layout.kind == Kind::kGeneral) {
    plan = {};
    plan.splits = 1;
    return {};
  }
  plan = given
             ? *given
             : choose_plan(device, layout, num_experts, num_tokens, top_k, is_down, allows_hopper);
  return check_plan(device, plan, layout, is_down);
}

Error make_job(const Device& device, const SamoyedsLaunch& launch, const SamoyedsRouting* routing,
               const SamoyedsWeight* up, const SamoyedsWeight* down, Job& job) {
  SAMOYEDS_RETURN_IF_ERROR(check_routing(routing, down != nullptr));
  if (!up && !down) return invalid("a layer needs at least one weight");
  job.routing = routing;
  job.up = up;
  job.down = down;
  job.num_experts = up ? up->num_experts : down->num_experts;
  job.num_pairs = routing->num_tokens * routing->top_k;
  // Both products or none: what is not given follows what is.
  const auto is_other = [](const SamoyedsPlan* given) { return given && !is_hopper(*given); };
  bool allows_hopper = !is_other(launch.plan) && !is_other(launch.down_plan);
  const auto plan = [&](const SamoyedsPlan* given, bool is_down, const Layout& layout,
                        SamoyedsPlan& chosen) -> Error {
    return plan_product(device, given, layout, job.num_experts, routing->num_tokens, routing->top_k,
                        is_down, allows_hopper, chosen);
  };
  const auto plan_both = [&]() -> Error {
    if (up) SAMOYEDS_RETURN_IF_ERROR(plan(launch.plan, false, job.up_layout, job.up_plan));
    if (!down) return {};
    const SamoyedsPlan* given = up ? launch.down_plan : launch.plan;
    return plan(given, true, job.down_layout, job.down_plan);
  };
  if (up) SAMOYEDS_RETURN_IF_ERROR(layout_of(up, job.up_layout));
  if (down) SAMOYEDS_RETURN_IF_ERROR(layout_of(down, job.down_layout));
  if (up && down) {
    SAMOYEDS_RETURN_IF_ERROR(check_mlp(*up, *down));
    job.is_fused = job.up_layout.interleaved;
  }
  SAMOYEDS_RETURN_IF_ERROR(plan_both());
  if (up && down &&
      (is_hopper(job.up_plan) != is_hopper(job.down_plan) ||
       (is_hopper(job.up_plan) && !job.is_fused))) {
    if (launch.plan || launch.down_plan) {
      return invalid("both products of a layer must have the plan of the Hopper kernel, or none");
    }
    allows_hopper = false;
    SAMOYEDS_RETURN_IF_ERROR(plan_both());
  }
  job.is_hopper = up ? is_hopper(job.up_plan) : is_hopper(job.down_plan);
  if (up && down && job.is_hopper && !launch.plan && !launch.down_plan) {
    share_tiles(job.up_layout, job.up_plan, job.down_layout, job.down_plan);
  }
  job.is_partial =
      down && !job.is_hopper && (job.down_plan.splits > 1 || job.num_pairs <= kMaxPartialPairs);
  if (job.num_pairs > 0) lay_out_workspace(job);
  return {};
}

}  // namespace samoyeds
