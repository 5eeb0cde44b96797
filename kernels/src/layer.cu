// Queues the kernels of a layer, or of one product.
#include "samoyeds/layer.hpp"

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

class Runner {
 public:
  Runner(const Device& device, const SamoyedsLaunch& launch, const Job& job)
      : stream_{device, static_cast<cudaStream_t>(launch.stream)},
        workspace_(static_cast<std::uint8_t*>(launch.workspace)),
        job_(job) {}

  Error mlp(const void* hidden, void* out) {
    if (!shares_tiles()) SAMOYEDS_RETURN_IF_ERROR(route(true));
    SAMOYEDS_RETURN_IF_ERROR(route(false));
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
    return product(false, hidden, out, Output::kRows, true, false);
  }

  Error down(const void* inner, void* out) {
    SAMOYEDS_RETURN_IF_ERROR(route(true));
    return down_and_combine(inner, out, true, false);
  }

 private:
  Error route(bool for_down) {
    const Layout& layout = for_down ? job_.down_layout : job_.up_layout;
    const SamoyedsPlan& plan = for_down ? job_.down_plan : job_.up_plan;
    stream_.overlaps = false;
    return samoyeds::route(stream_, job_.routing->top_k_index, static_cast<int>(job_.num_pairs),
                           static_cast<int>(job_.num_experts), tiling_of(layout, plan), pairs(),
                           tiles(for_down), num_tiles(for_down));
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
    args.tokens = {tiles(is_down), num_tiles(is_down), pairs(), 0,
                   make_divisor(is_down ? 1 : static_cast<int>(job_.routing->top_k))};
    args.out = out;
    args.output = output;
    args.split_stride = job_.num_pairs * weight.rows;
    args.is_early = is_early;
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
    const Output output = job_.is_partial ? Output::kPartial : Output::kRows;
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
    stream_.overlaps = true;
    return combine(stream_, dtype(), args);
  }

  bool shares_tiles() const { return job_.up && job_.down && job_.up_tiles == job_.down_tiles; }
  std::uint8_t* at(std::int64_t offset) const { return workspace_ + offset; }
  int* pairs() const { return reinterpret_cast<int*>(at(job_.pairs)); }
  Tile* tiles(bool for_down) const {
    return reinterpret_cast<Tile*>(at(for_down ? job_.down_tiles : job_.up_tiles));
  }
  int* num_tiles(bool for_down) const {
    const bool is_second = for_down && job_.up && !shares_tiles();
    return reinterpret_cast<int*>(at(job_.counts)) + (is_second ? 1 : 0);
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
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(launch->workspace, "workspace"));
  if (launch->workspace_bytes < job.total) {
    return invalid("workspace must have " + std::to_string(job.total) + " bytes, found " +
                   std::to_string(launch->workspace_bytes));
  }
  return {};
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

Error linear(const SamoyedsLaunch* launch, const SamoyedsWeight* weight, const void* x,
             std::int64_t num_rows, void* out) {
  if (!launch) return invalid("launch must not be null");
  DeviceGuard guard;
  SAMOYEDS_RETURN_IF_ERROR(guard.enter(launch->device));
  SsmmArgs args{};
  SAMOYEDS_RETURN_IF_ERROR(packed_layout_of(weight, args.layout));
  if (weight->num_experts != 1) {
    return invalid("samoyeds_linear needs one expert, found " +
                   std::to_string(weight->num_experts));
  }
  SAMOYEDS_RETURN_IF_ERROR(check_range(num_rows, 0, kMaxPairs, "num_rows"));
  if (num_rows == 0) return {};
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(x, "x"));
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(out, "out"));
  SamoyedsPlan plan;
  SAMOYEDS_RETURN_IF_ERROR(
      plan_product(guard.device(), launch->plan, args.layout, 1, num_rows, 1, false, plan));
  args.packed = static_cast<const std::uint8_t*>(weight->packed);
  args.x = x;
  args.tokens = {nullptr, nullptr, nullptr, static_cast<int>(num_rows), make_divisor(1)};
  args.out = out;
  args.output = Output::kRows;
  const Stream stream{guard.device(), static_cast<cudaStream_t>(launch->stream)};
  const Tiling tiling = tiling_of(args.layout, plan);
  return multiply(stream, static_cast<SamoyedsDtype>(weight->dtype), plan, args,
                  max_tiles(num_rows, 1, tiling));
}

}  // namespace samoyeds
