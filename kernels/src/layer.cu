// Queues the kernels of a layer, or of one product.
#include "samoyeds/layer.hpp"
#include "samoyeds/panels.cuh"

namespace samoyeds {
namespace {

// A product by the kernel that serves its pattern.
Error multiply(Stream stream, SamoyedsDtype dtype, const SamoyedsPlan& plan, const SsmmArgs& args,
               std::int64_t max_tiles) {
  if (max_tiles == 0) return {};  // no experts
  if (args.layout.kind != Kind::kGeneral) return ssmm(stream, plan, dtype, args, max_tiles);
  stream.overlaps = false;  // the general kernel does not wait by itself
  return general(stream, dtype, args, max_tiles);
}

Error check_workspace(const SamoyedsLaunch& launch, std::int64_t num_bytes) {
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(launch.workspace, "workspace"));
  if (launch.workspace_bytes >= num_bytes) return {};
  return invalid("workspace must have " + std::to_string(num_bytes) + " bytes, found " +
                 std::to_string(launch.workspace_bytes));
}

class Runner {
 public:
  Runner(const Device& device, const SamoyedsLaunch& launch, const Job& job)
      : stream_{device, static_cast<cudaStream_t>(launch.stream)},
        workspace_(static_cast<std::uint8_t*>(launch.workspace)),
        job_(job) {}

  Error mlp(const void* hidden, void* out) {
    if (!shares_tiles()) SAMOYEDS_RETURN_IF_ERROR(route(true));
    SAMOYEDS_RETURN_IF_ERROR(route(false));
    if (job_.is_hopper) {
      SAMOYEDS_RETURN_IF_ERROR(gather(false, hidden));
      SAMOYEDS_RETURN_IF_ERROR(
          product(false, at(job_.panels), at(job_.inner), Output::kGated, true, false));
      return down_and_combine(at(job_.inner), out, true, false);
    }
    if (job_.is_fused) {
      SAMOYEDS_RETURN_IF_ERROR(product(false, hidden, at(job_.inner), Output::kGated, true, false));
    } else {
      SAMOYEDS_RETURN_IF_ERROR(product(false, hidden, at(job_.both), Output::kRows, true, false));
      SAMOYEDS_RETURN_IF_ERROR(gate());
    }
    // Only a matrix kernel right before keeps the promise that is_early needs.
    const bool is_early = job_.is_fused && job_.down_layout.kind != Kind::kGeneral;
    return down_and_combine(at(job_.inner), out, job_.is_fused, is_early);
  }

  Error up(const void* hidden, void* out) {
    stream_.overlaps = false;
    SAMOYEDS_RETURN_IF_ERROR(
        clear_unrouted(stream_, job_.routing->top_k_index, static_cast<int>(job_.num_pairs),
                       static_cast<int>(job_.num_experts), job_.up->rows * 2, out));
    SAMOYEDS_RETURN_IF_ERROR(route(false));
    if (job_.is_hopper) {
      SAMOYEDS_RETURN_IF_ERROR(gather(false, hidden));
      hidden = at(job_.panels);
    }
    return product(false, hidden, out, Output::kRows, true, false);
  }

  Error down(const void* inner, void* out) {
    SAMOYEDS_RETURN_IF_ERROR(route(true));
    if (job_.is_hopper) {
      SAMOYEDS_RETURN_IF_ERROR(gather(true, inner));
      inner = at(job_.panels);
    }
    return down_and_combine(inner, out, true, false);
  }

 private:
  Error route(bool for_down) {
    const Layout& layout = for_down ? job_.down_layout : job_.up_layout;
    const SamoyedsPlan& plan = for_down ? job_.down_plan : job_.up_plan;
    Route args{};
    args.top_k_index = job_.routing->top_k_index;
    args.num_pairs = static_cast<int>(job_.num_pairs);
    args.num_experts = static_cast<int>(job_.num_experts);
    args.tiling = tiling_of(layout, plan);
    args.run_counts = reinterpret_cast<int*>(at(job_.run_counts));
    args.pairs = pairs();
    args.places = places();
    args.tiles = tiles(for_down);
    args.num_tiles = num_tiles(for_down);
    args.num_claimed = num_claimed(false);
    stream_.overlaps = false;
    return samoyeds::route(stream_, args);
  }

  // Rows of the first product's x to panels.
  Error gather(bool is_down, const void* x) {
    Gather args{};
    args.x = x;
    args.columns = is_down ? job_.down_layout.cols : job_.up_layout.cols;
    args.pairs_per_row = make_divisor(is_down ? 1 : static_cast<int>(job_.routing->top_k));
    args.pairs = pairs();
    args.max_places = static_cast<int>(job_.max_places);
    args.panels = at(job_.panels);
    stream_.overlaps = true;
    return samoyeds::gather(stream_, args);
  }

  // overlaps: may start before the previous kernel has ended; is_early: as in SsmmArgs.
  Error product(bool is_down, const void* x, void* out, Output output, bool overlaps,
                bool is_early) {
    const SamoyedsWeight& weight = is_down ? *job_.down : *job_.up;
    const Layout& layout = is_down ? job_.down_layout : job_.up_layout;
    const SamoyedsPlan& plan = is_down ? job_.down_plan : job_.up_plan;
    SsmmArgs args{};
    args.layout = layout;
    args.packed = static_cast<const std::uint8_t*>(weight.packed);
    args.x = x;
    args.tokens = {tiles(is_down),
                   num_tiles(is_down),
                   pairs(),
                   0,
                   make_divisor(is_down ? 1 : static_cast<int>(job_.routing->top_k)),
                   {}};
    args.out = out;
    args.output = output;
    args.split_stride = job_.num_pairs * weight.rows;
    args.places = static_cast<int>(job_.max_places);
    args.is_early = is_early;
    args.num_claimed = num_claimed(is_down);
    stream_.overlaps = overlaps;
    return multiply(stream_, dtype(), plan, args,
                    max_tiles(job_.num_pairs, job_.num_experts, tiling_of(layout, plan)));
  }

  Error gate() {
    stream_.overlaps = false;
    return samoyeds::gate(stream_, dtype(), job_.routing->top_k_index,
                          static_cast<int>(job_.num_pairs), static_cast<int>(job_.num_experts),
                          static_cast<int>(job_.down->cols), at(job_.both), at(job_.inner));
  }

  Error down_and_combine(const void* inner, void* out, bool overlaps, bool is_early) {
    const Output output = job_.is_hopper    ? Output::kPanels
                          : job_.is_partial ? Output::kPartial
                                            : Output::kRows;
    SAMOYEDS_RETURN_IF_ERROR(product(true, inner, at(job_.rows), output, overlaps, is_early));
    Combine args{};
    args.top_k_index = job_.routing->top_k_index;
    args.top_k_weights = job_.routing->top_k_weights;
    args.weights_dtype = static_cast<SamoyedsDtype>(job_.routing->weights_dtype);
    args.num_tokens = static_cast<int>(job_.routing->num_tokens);
    args.top_k = static_cast<int>(job_.routing->top_k);
    args.num_experts = static_cast<int>(job_.num_experts);
    args.rows = at(job_.rows);
    args.is_partial = job_.is_partial;
    args.splits = static_cast<int>(job_.down_plan.splits);
    args.columns = static_cast<int>(job_.down->rows);
    args.out = out;
    args.places = places();
    args.max_places = static_cast<int>(job_.max_places);
    args.tile_columns = job_.down_layout.kind == Kind::kDense24 ? kTileRows : 2 * kTileRows;
    stream_.overlaps = true;
    return combine(stream_, dtype(), args);
  }

  bool shares_tiles() const { return job_.up && job_.down && job_.up_tiles == job_.down_tiles; }
  std::uint8_t* at(std::int64_t offset) const { return workspace_ + offset; }
  int* pairs() const { return reinterpret_cast<int*>(at(job_.pairs)); }
  int* places() const { return job_.is_hopper ? reinterpret_cast<int*>(at(job_.places)) : nullptr; }
  Tile* tiles(bool for_down) const {
    return reinterpret_cast<Tile*>(at(for_down ? job_.down_tiles : job_.up_tiles));
  }
  int* num_tiles(bool for_down) const {
    const bool is_second = for_down && job_.up && !shares_tiles();
    return reinterpret_cast<int*>(at(job_.counts)) + (is_second ? 1 : 0);
  }
  int* num_claimed(bool for_down) const {
    return reinterpret_cast<int*>(at(job_.counts)) + 2 + (for_down ? 1 : 0);
  }
  SamoyedsDtype dtype() const {
    return static_cast<SamoyedsDtype>(job_.down ? job_.down->dtype : job_.up->dtype);
  }

  Stream stream_;
  std::uint8_t* workspace_;
  const Job& job_;
};

// What all layers check before they queue anything.
Error prepare_layer(DeviceGuard& guard, const SamoyedsLaunch* launch,
                    const SamoyedsRouting* routing, const SamoyedsWeight* up,
                    const SamoyedsWeight* down, Job& job) {
  if (!launch) return invalid("launch must not be null");
  SAMOYEDS_RETURN_IF_ERROR(guard.enter(launch->device));
  SAMOYEDS_RETURN_IF_ERROR(make_job(guard.device(), *launch, routing, up, down, job));
  if (job.num_pairs == 0) return {};
  Layout ignored;
  if (up) SAMOYEDS_RETURN_IF_ERROR(packed_layout_of(up, ignored));
  if (down) SAMOYEDS_RETURN_IF_ERROR(packed_layout_of(down, ignored));
  return check_workspace(*launch, job.total);
}

}  // namespace

Error moe_mlp(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
              const SamoyedsWeight* gate_up, const SamoyedsWeight* down, const void* hidden,
              void* out) {
  DeviceGuard guard;
  Job job;
  if (!gate_up || !down) return invalid("samoyeds_moe_mlp needs both weights");
  SAMOYEDS_RETURN_IF_ERROR(prepare_layer(guard, launch, routing, gate_up, down, job));
  if (job.num_pairs == 0) return {};
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(hidden, "hidden"));
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(out, "out"));
  return Runner(guard.device(), *launch, job).mlp(hidden, out);
}

Error moe_up(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
             const SamoyedsWeight* weight, const void* hidden, void* out) {
  DeviceGuard guard;
  Job job;
  if (!weight) return invalid("samoyeds_moe_up needs a weight");
  SAMOYEDS_RETURN_IF_ERROR(prepare_layer(guard, launch, routing, weight, nullptr, job));
  if (job.num_pairs == 0) return {};
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(hidden, "hidden"));
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(out, "out"));
  return Runner(guard.device(), *launch, job).up(hidden, out);
}

Error moe_down(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
               const SamoyedsWeight* weight, const void* inner, void* out) {
  DeviceGuard guard;
  Job job;
  if (!weight) return invalid("samoyeds_moe_down needs a weight");
  SAMOYEDS_RETURN_IF_ERROR(prepare_layer(guard, launch, routing, nullptr, weight, job));
  if (job.num_pairs == 0) return {};
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(inner, "inner"));
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(out, "out"));
  return Runner(guard.device(), *launch, job).down(inner, out);
}

namespace {

// Of samoyeds_linear: its layout, its plan, and the panels that the Hopper kernel reads.
struct LinearJob {
  Layout layout{};
  SamoyedsPlan plan{};
  std::int64_t places = 0, panel_bytes = 0, workspace_bytes = 0;  // panels, then num_claimed
};

Error prepare_linear(const Device& device, const SamoyedsLaunch& launch,
                     const SamoyedsWeight* weight, std::int64_t num_rows, LinearJob& job) {
  SAMOYEDS_RETURN_IF_ERROR(layout_of(weight, job.layout));
  if (weight->num_experts != 1) {
    return invalid("samoyeds_linear needs one expert, found " +
                   std::to_string(weight->num_experts));
  }
  SAMOYEDS_RETURN_IF_ERROR(check_range(num_rows, 0, kMaxPairs, "num_rows"));
  SAMOYEDS_RETURN_IF_ERROR(
      plan_product(device, launch.plan, job.layout, 1, num_rows, 1, false, true, job.plan));
  if (is_hopper(job.plan)) {
    job.places = max_places(num_rows, 1);
    job.panel_bytes = job.places * job.layout.cols * 2;
    job.workspace_bytes = job.panel_bytes + static_cast<std::int64_t>(sizeof(int));
  }
  return {};
}

}  // namespace

std::int64_t linear_workspace_bytes(const SamoyedsLaunch* launch, const SamoyedsWeight* weight,
                                    std::int64_t num_rows) {
  DeviceGuard guard;
  LinearJob job;
  const Error error = [&]() -> Error {
    if (!launch) return invalid("launch must not be null");
    SAMOYEDS_RETURN_IF_ERROR(guard.enter(launch->device));
    return prepare_linear(guard.device(), *launch, weight, num_rows, job);
  }();
  return error ? -report(error) : job.workspace_bytes;
}

Error linear(const SamoyedsLaunch* launch, const SamoyedsWeight* weight, const void* x,
             std::int64_t num_rows, void* out) {
  if (!launch) return invalid("launch must not be null");
  DeviceGuard guard;
  SAMOYEDS_RETURN_IF_ERROR(guard.enter(launch->device));
  LinearJob job;
  SAMOYEDS_RETURN_IF_ERROR(prepare_linear(guard.device(), *launch, weight, num_rows, job));
  if (num_rows == 0) return {};
  SsmmArgs args{};
  SAMOYEDS_RETURN_IF_ERROR(packed_layout_of(weight, args.layout));
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(x, "x"));
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(out, "out"));
  Stream stream{guard.device(), static_cast<cudaStream_t>(launch->stream)};
  if (job.workspace_bytes > 0) {
    SAMOYEDS_RETURN_IF_ERROR(check_workspace(*launch, job.workspace_bytes));
    Gather gathered{};
    gathered.x = x;
    gathered.num_rows = static_cast<int>(num_rows);
    gathered.columns = job.layout.cols;
    gathered.pairs_per_row = make_divisor(1);
    gathered.max_places = static_cast<int>(job.places);
    gathered.panels = launch->workspace;
    args.num_claimed = gathered.num_claimed =
        reinterpret_cast<int*>(static_cast<std::uint8_t*>(launch->workspace) + job.panel_bytes);
    SAMOYEDS_RETURN_IF_ERROR(gather(stream, gathered));
    x = launch->workspace;
    stream.overlaps = true;
  }
  args.packed = static_cast<const std::uint8_t*>(weight->packed);
  args.x = x;
  args.tokens = {nullptr, nullptr, nullptr, static_cast<int>(num_rows), make_divisor(1), {}};
  args.out = out;
  args.output = Output::kRows;
  args.places = static_cast<int>(job.places);
  return multiply(stream, static_cast<SamoyedsDtype>(weight->dtype), job.plan, args,
                  max_tiles(num_rows, 1, tiling_of(args.layout, job.plan)));
}

}  // namespace samoyeds
