// The C interface: checks arguments, lays out the workspace, queues the kernels.
#include <array>
#include <initializer_list>
#include <mutex>

#include "samoyeds/launch.hpp"

#define SAMOYEDS_EXPORT extern "C" __attribute__((visibility("default")))

namespace samoyeds {

Error invalid(std::string text) { return {SAMOYEDS_INVALID_ARGUMENT, std::move(text)}; }
Error unsupported(std::string text) { return {SAMOYEDS_UNSUPPORTED, std::move(text)}; }
Error check_cuda(cudaError_t code, const char* doing) {
  if (code == cudaSuccess) return {};
  cudaGetLastError();  // an error that is reported here must not surface again elsewhere
  return {SAMOYEDS_CUDA_ERROR, std::string(doing) + " failed: " + cudaGetErrorString(code)};
}

namespace {

thread_local std::string last_error;

int report(const Error& error) {
  if (error) last_error = error.text;
  return error.status;
}

constexpr int kMaxDevices = 64;
constexpr std::int64_t kAlignment = 16;
constexpr std::int64_t kMaxSize = INT32_MAX;

#define SAMOYEDS_RETURN_IF_ERROR(expression) \
  if (Error error_ = (expression)) return error_

Error query_device(int ordinal, Device& device) {
  int major = 0, minor = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } wanted[] = {
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMultiProcessorCount, &device.num_sms},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device.block_shared_bytes},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &device.sm_shared_bytes},
  };
  for (const auto& each : wanted) {
    SAMOYEDS_RETURN_IF_ERROR(check_cuda(cudaDeviceGetAttribute(each.value, each.attribute, ordinal),
                                        "asking for the GPU"));
  }
  device.capability = major * 10 + minor;
  if (device.capability < 80) {
    return unsupported(
        "kernels need a GPU with sparse tensor cores, compute capability 8.0 or newer,"
        " found " +
        std::to_string(major) + "." + std::to_string(minor));
  }
  // Loads each kernel, which cannot be done inside a graph capture.
  for (const SsmmVariant* table : {bf16_variants(), fp16_variants()}) {
    for (int i = 0; i < kNumVariants; ++i) {
      if (table[i].needs_sm90a && device.capability != 90) continue;
      for (const SsmmKernel kernel : table[i].kernels) {
        if (!kernel) continue;
        cudaFuncAttributes attributes;
        SAMOYEDS_RETURN_IF_ERROR(check_cuda(cudaFuncGetAttributes(&attributes, kernel),
                                            "loading a kernel for this GPU"));
        SAMOYEDS_RETURN_IF_ERROR(check_cuda(
            cudaFuncSetAttribute(
                kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                device.block_shared_bytes - static_cast<int>(attributes.sharedSizeBytes)),
            "reserving shared memory"));
      }
    }
  }
  device.block_shared_bytes -= 512;  // the matrix kernel's own, at most
  device.ordinal = ordinal;
  return {};
}

// The device, which becomes the current one until the guard goes.
class DeviceGuard {
 public:
  ~DeviceGuard() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  Error enter(std::int64_t ordinal) {
    if (ordinal < 0 || ordinal >= kMaxDevices) {
      return invalid("device must be the ordinal of a CUDA GPU, found " + std::to_string(ordinal));
    }
    int current = 0;
    SAMOYEDS_RETURN_IF_ERROR(check_cuda(cudaGetDevice(&current), "asking for the current GPU"));
    if (current != ordinal) {
      SAMOYEDS_RETURN_IF_ERROR(
          check_cuda(cudaSetDevice(static_cast<int>(ordinal)), "selecting the GPU"));
      previous_ = current;
    }
    static std::array<Device, kMaxDevices> devices;
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    device_ = &devices[static_cast<std::size_t>(ordinal)];
    if (device_->ordinal >= 0) return {};
    return query_device(static_cast<int>(ordinal), *device_);
  }
  const Device& device() const { return *device_; }

 private:
  int previous_ = -1;
  Device* device_ = nullptr;
};

Error check_pointer(const void* pointer, const char* name) {
  if (!pointer) return invalid(std::string(name) + " must not be null");
  if (reinterpret_cast<std::uintptr_t>(pointer) % kAlignment != 0) {
    return invalid(std::string(name) + " must be 16-byte aligned");
  }
  return {};
}

Error check_range(std::int64_t value, std::int64_t low, std::int64_t high, const char* name) {
  if (value >= low && value <= high) return {};
  return invalid(std::string(name) + " must be " + std::to_string(low) + " to " +
                 std::to_string(high) + ", found " + std::to_string(value));
}

Error layout_of(const SamoyedsWeight* w, Layout& layout) {
  if (!w) return invalid("a weight must not be null");
  SAMOYEDS_RETURN_IF_ERROR(check_range(w->dtype, SAMOYEDS_BF16, SAMOYEDS_FP16, "a weight's dtype"));
  SAMOYEDS_RETURN_IF_ERROR(check_range(w->num_experts, 0, 65535, "num_experts"));
  SAMOYEDS_RETURN_IF_ERROR(check_range(w->m, 1, kMaxM, "M"));
  SAMOYEDS_RETURN_IF_ERROR(check_range(w->n, 1, w->m, "N"));
  SAMOYEDS_RETURN_IF_ERROR(check_range(w->rows, 1, 1 << 20, "rows"));
  SAMOYEDS_RETURN_IF_ERROR(check_range(w->cols, 8, 1 << 20, "cols"));
  SAMOYEDS_RETURN_IF_ERROR(check_range(w->v, kGroup, w->cols, "V"));
  if (w->rows % w->m != 0 || w->cols % 8 != 0 || w->cols % w->v != 0 || w->v % kGroup != 0) {
    return invalid("rows must be a multiple of M, cols of 8 and V, V of 4, found [" +
                   std::to_string(w->rows) + ", " + std::to_string(w->cols) + "] with (" +
                   std::to_string(w->n) + ", " + std::to_string(w->m) + ", " +
                   std::to_string(w->v) + ")");
  }
  layout = make_layout(static_cast<int>(w->rows), static_cast<int>(w->cols),
                       {static_cast<int>(w->n), static_cast<int>(w->m), static_cast<int>(w->v)},
                       w->is_gate_up != 0);
  return {};
}

Error packed_layout_of(const SamoyedsWeight* w, Layout& layout) {
  SAMOYEDS_RETURN_IF_ERROR(layout_of(w, layout));
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(w->packed, "packed"));
  const std::int64_t needed = layout.expert_bytes * w->num_experts;
  if (w->num_bytes < needed) {
    return invalid("this weight needs " + std::to_string(needed) + " packed bytes, found " +
                   std::to_string(w->num_bytes));
  }
  return {};
}

Error check_routing(const SamoyedsRouting* r, bool needs_weights) {
  if (!r) return invalid("routing must not be null");
  SAMOYEDS_RETURN_IF_ERROR(check_range(r->num_tokens, 0, kMaxSize, "num_tokens"));
  SAMOYEDS_RETURN_IF_ERROR(check_range(r->top_k, 1, 1024, "top_k"));
  SAMOYEDS_RETURN_IF_ERROR(check_range(r->num_tokens * r->top_k, 0, 1 << 28, "num_tokens * top_k"));
  if (r->num_tokens == 0) return {};
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(r->top_k_index, "top_k_index"));
  if (!needs_weights) return {};
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(r->top_k_weights, "top_k_weights"));
  return check_range(r->weights_dtype, SAMOYEDS_BF16, SAMOYEDS_FP32, "weights_dtype");
}

// Everything a layer needs to know, worked out the same way for its size and for its run.
struct Job {
  const SamoyedsRouting* routing = nullptr;
  const SamoyedsWeight* up = nullptr;
  const SamoyedsWeight* down = nullptr;
  Layout up_layout{}, down_layout{};
  SamoyedsPlan up_plan{}, down_plan{};
  std::int64_t num_pairs = 0, num_experts = 0;
  // Offsets into the workspace.
  std::int64_t pairs = 0, up_tiles = 0, down_tiles = 0, counts = 0, both = 0, inner = 0, rows = 0;
  std::int64_t total = 0;
  bool is_fused = false;    // the gate runs inside the first product
  bool is_partial = false;  // rows are fp32
};

int tile_tokens(const Layout& layout, const SamoyedsPlan& plan) {
  return layout.kind == Kind::kGeneral ? kGeneralTokens : find_variant(plan, SAMOYEDS_BF16)->tokens;
}

Error plan_product(const Device& device, const SamoyedsPlan* given, const Layout& layout,
                   const Job& job, bool is_down, SamoyedsPlan& plan) {
  if (layout.kind == Kind::kGeneral) {
    plan = {};
    plan.splits = 1;
    return {};
  }
  plan = given ? *given
               : choose_plan(device, layout, job.num_experts, job.routing->num_tokens,
                             job.routing->top_k, is_down);
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
  if (up) {
    SAMOYEDS_RETURN_IF_ERROR(layout_of(up, job.up_layout));
    SAMOYEDS_RETURN_IF_ERROR(
        plan_product(device, launch.plan, job.up_layout, job, false, job.up_plan));
  }
  if (down) {
    SAMOYEDS_RETURN_IF_ERROR(layout_of(down, job.down_layout));
    const SamoyedsPlan* given = up ? launch.down_plan : launch.plan;
    SAMOYEDS_RETURN_IF_ERROR(
        plan_product(device, given, job.down_layout, job, true, job.down_plan));
  }
  if (up && down) {
    if (up->dtype != down->dtype || up->num_experts != down->num_experts ||
        up->rows != 2 * down->cols || up->cols != down->rows || !up->is_gate_up) {
      return invalid("gate_up [" + std::to_string(up->num_experts) +
                     ", 2I, H] and down [E, H, I]"
                     " must form an MLP in one dtype, found [" +
                     std::to_string(up->rows) + ", " + std::to_string(up->cols) + "] and [" +
                     std::to_string(down->num_experts) + ", " + std::to_string(down->rows) + ", " +
                     std::to_string(down->cols) + "]");
    }
    job.is_fused = job.up_layout.interleaved;
  }
  const auto take = [&job](std::int64_t bytes) {
    const std::int64_t offset = job.total;
    job.total += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  };
  const auto tiles_bytes = [&](const Layout& layout, const SamoyedsPlan& plan) {
    return max_tiles(job.num_pairs, job.num_experts, tile_tokens(layout, plan)) *
           static_cast<std::int64_t>(sizeof(Tile));
  };
  if (job.num_pairs == 0) return {};
  job.counts = take(2 * sizeof(int));
  job.pairs = take(job.num_pairs * static_cast<std::int64_t>(sizeof(int)));
  if (up) job.up_tiles = take(tiles_bytes(job.up_layout, job.up_plan));
  if (down) {
    const bool shares_tiles = up && tile_tokens(job.up_layout, job.up_plan) ==
                                        tile_tokens(job.down_layout, job.down_plan);
    job.down_tiles =
        shares_tiles ? job.up_tiles : take(tiles_bytes(job.down_layout, job.down_plan));
    job.is_partial = job.down_plan.splits > 1 || job.num_pairs <= kMaxPartialPairs;
  }
  if (up && down) {
    if (!job.is_fused) job.both = take(job.num_pairs * up->rows * 2);
    job.inner = take(job.num_pairs * down->cols * 2);
  }
  if (down) {
    job.rows = take(job.num_pairs * down->rows *
                    (job.is_partial ? 4 * static_cast<std::int64_t>(job.down_plan.splits) : 2));
  }
  return {};
}

class Runner {
 public:
  Runner(const Device& device, const SamoyedsLaunch& launch, const Job& job)
      : stream_{device, static_cast<cudaStream_t>(launch.stream)},
        workspace_(static_cast<std::uint8_t*>(launch.workspace)),
        job_(job) {}

  Error route(bool for_down) {
    const Layout& layout = for_down ? job_.down_layout : job_.up_layout;
    const SamoyedsPlan& plan = for_down ? job_.down_plan : job_.up_plan;
    stream_.overlaps = false;
    return samoyeds::route(stream_, job_.routing->top_k_index, static_cast<int>(job_.num_pairs),
                           static_cast<int>(job_.num_experts), tile_tokens(layout, plan), pairs(),
                           tiles(for_down), num_tiles(for_down));
  }

  // A product; `is_early`: the routing was complete before the previous kernel began.
  Error product(bool is_down, const void* x, void* out, Output output, bool is_early) {
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
    return run(stream_, static_cast<SamoyedsDtype>(weight.dtype), plan, args,
               max_tiles(job_.num_pairs, job_.num_experts, tile_tokens(layout, plan)));
  }

  static Error run(Stream& stream, SamoyedsDtype dtype, const SamoyedsPlan& plan,
                   const SsmmArgs& args, std::int64_t tiles) {
    if (args.layout.kind != Kind::kGeneral) return ssmm(stream, plan, dtype, args, tiles);
    stream.overlaps = false;
    return general(stream, dtype, args, tiles);
  }

  Error gate() {
    stream_.overlaps = false;
    return samoyeds::gate(stream_, dtype(), job_.routing->top_k_index,
                          static_cast<int>(job_.num_pairs), static_cast<int>(job_.num_experts),
                          static_cast<int>(job_.down->cols), at(job_.both), at(job_.inner));
  }

  Error combine(void* out) {
    stream_.overlaps = true;
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
    return samoyeds::combine(stream_, dtype(), args);
  }

  Error down(const void* inner, void* out, bool is_early) {
    SAMOYEDS_RETURN_IF_ERROR(product(true, inner, at(job_.rows),
                                     job_.is_partial ? Output::kPartial : Output::kRows, is_early));
    return combine(out);
  }

  Error mlp(const void* hidden, void* out) {
    const bool shares_tiles = job_.up_tiles == job_.down_tiles;
    if (!shares_tiles) SAMOYEDS_RETURN_IF_ERROR(route(true));
    SAMOYEDS_RETURN_IF_ERROR(route(false));
    stream_.overlaps = true;
    if (job_.is_fused) {
      SAMOYEDS_RETURN_IF_ERROR(product(false, hidden, at(job_.inner), Output::kGated, false));
    } else {
      SAMOYEDS_RETURN_IF_ERROR(product(false, hidden, at(job_.both), Output::kRows, false));
      SAMOYEDS_RETURN_IF_ERROR(gate());
    }
    // Only a matrix kernel right before keeps the promise that is_early needs.
    const bool is_early = job_.is_fused && job_.down_layout.kind != Kind::kGeneral;
    stream_.overlaps = job_.is_fused;
    return down(at(job_.inner), out, is_early);
  }

  Stream& stream() { return stream_; }

 private:
  std::uint8_t* at(std::int64_t offset) const { return workspace_ + offset; }
  int* pairs() const { return reinterpret_cast<int*>(at(job_.pairs)); }
  Tile* tiles(bool for_down) const {
    return reinterpret_cast<Tile*>(at(for_down ? job_.down_tiles : job_.up_tiles));
  }
  int* num_tiles(bool for_down) const {
    const bool is_own = for_down && job_.up && job_.up_tiles != job_.down_tiles;
    return reinterpret_cast<int*>(at(job_.counts)) + (is_own ? 1 : 0);
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
  Runner runner(guard.device(), *launch, job);
  SAMOYEDS_RETURN_IF_ERROR(
      clear_unrouted(runner.stream(), routing->top_k_index, static_cast<int>(job.num_pairs),
                     static_cast<int>(job.num_experts), weight->rows * 2, out));
  SAMOYEDS_RETURN_IF_ERROR(runner.route(false));
  runner.stream().overlaps = true;
  return runner.product(false, hidden, out, Output::kRows, false);
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
  Runner runner(guard.device(), *launch, job);
  SAMOYEDS_RETURN_IF_ERROR(runner.route(true));
  runner.stream().overlaps = true;
  return runner.down(inner, out, false);
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
  SAMOYEDS_RETURN_IF_ERROR(check_range(num_rows, 0, 1 << 28, "num_rows"));
  if (num_rows == 0) return {};
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(x, "x"));
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(out, "out"));
  SamoyedsRouting routing{nullptr, nullptr, 0, num_rows, 1};
  Job job;
  job.routing = &routing;
  job.num_experts = 1;
  SamoyedsPlan plan;
  SAMOYEDS_RETURN_IF_ERROR(
      plan_product(guard.device(), launch->plan, args.layout, job, false, plan));
  args.packed = static_cast<const std::uint8_t*>(weight->packed);
  args.x = x;
  args.tokens = {nullptr, nullptr, nullptr, static_cast<int>(num_rows), make_divisor(1)};
  args.out = out;
  args.output = Output::kRows;
  Stream stream{guard.device(), static_cast<cudaStream_t>(launch->stream)};
  const std::int64_t tokens = tile_tokens(args.layout, plan);
  return Runner::run(stream, static_cast<SamoyedsDtype>(weight->dtype), plan, args,
                     (num_rows + tokens - 1) / tokens);
}

Error pack_or_unpack(const SamoyedsLaunch* launch, const SamoyedsWeight* weight, const void* values,
                     const void* meta, const void* index, Layout& layout, DeviceGuard& guard) {
  if (!launch) return invalid("launch must not be null");
  SAMOYEDS_RETURN_IF_ERROR(guard.enter(launch->device));
  SAMOYEDS_RETURN_IF_ERROR(packed_layout_of(weight, layout));
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(values, "values"));
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(meta, "meta"));
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(index, "index"));
  return {};
}

}  // namespace
}  // namespace samoyeds

using samoyeds::DeviceGuard;
using samoyeds::Error;
using samoyeds::Layout;
using samoyeds::report;

SAMOYEDS_EXPORT int samoyeds_abi_version(void) { return SAMOYEDS_ABI_VERSION; }
SAMOYEDS_EXPORT const char* samoyeds_last_error(void) { return samoyeds::last_error.c_str(); }
SAMOYEDS_EXPORT const char* samoyeds_build_info(void) { return SAMOYEDS_BUILD_INFO; }
SAMOYEDS_EXPORT const char* samoyeds_layout(void) { return samoyeds::kLayoutName; }

SAMOYEDS_EXPORT int samoyeds_prepare(int64_t device) {
  DeviceGuard guard;
  return report(guard.enter(device));
}

SAMOYEDS_EXPORT int64_t samoyeds_packed_bytes(const SamoyedsWeight* weight) {
  Layout layout;
  if (const Error error = samoyeds::layout_of(weight, layout)) return -report(error);
  return layout.expert_bytes * weight->num_experts;
}

SAMOYEDS_EXPORT int samoyeds_pack(const SamoyedsLaunch* launch, const SamoyedsWeight* weight,
                                  const void* values, const uint8_t* meta, const uint8_t* index) {
  DeviceGuard guard;
  Layout layout;
  if (const Error error =
          samoyeds::pack_or_unpack(launch, weight, values, meta, index, layout, guard)) {
    return report(error);
  }
  const samoyeds::Stream stream{guard.device(), static_cast<cudaStream_t>(launch->stream)};
  return report(samoyeds::pack(stream, layout, static_cast<int>(weight->num_experts),
                               static_cast<uint8_t*>(weight->packed), values, meta, index));
}

SAMOYEDS_EXPORT int samoyeds_unpack(const SamoyedsLaunch* launch, const SamoyedsWeight* weight,
                                    void* values, uint8_t* meta, uint8_t* index) {
  DeviceGuard guard;
  Layout layout;
  if (const Error error =
          samoyeds::pack_or_unpack(launch, weight, values, meta, index, layout, guard)) {
    return report(error);
  }
  const samoyeds::Stream stream{guard.device(), static_cast<cudaStream_t>(launch->stream)};
  return report(samoyeds::unpack(stream, layout, static_cast<int>(weight->num_experts),
                                 static_cast<const uint8_t*>(weight->packed), values, meta, index));
}

SAMOYEDS_EXPORT int samoyeds_choose_plan(int64_t device, const SamoyedsWeight* weight,
                                         int64_t num_tokens, int64_t top_k, int64_t is_down,
                                         SamoyedsPlan* plan) {
  DeviceGuard guard;
  Layout layout;
  if (const Error error = guard.enter(device)) return report(error);
  if (const Error error = samoyeds::layout_of(weight, layout)) return report(error);
  if (!plan || num_tokens < 0 || top_k < 1) {
    return report(samoyeds::invalid("plan must not be null, num_tokens >= 0 and top_k >= 1"));
  }
  if (layout.kind == samoyeds::Kind::kGeneral) {
    return report(samoyeds::unsupported("general patterns have one kernel and no plan"));
  }
  *plan = samoyeds::choose_plan(guard.device(), layout, weight->num_experts, num_tokens, top_k,
                                is_down != 0);
  return SAMOYEDS_OK;
}

SAMOYEDS_EXPORT int64_t samoyeds_workspace_bytes(const SamoyedsLaunch* launch,
                                                 const SamoyedsRouting* routing,
                                                 const SamoyedsWeight* gate_up,
                                                 const SamoyedsWeight* down) {
  DeviceGuard guard;
  samoyeds::Job job;
  if (!launch) return -report(samoyeds::invalid("launch must not be null"));
  if (const Error error = guard.enter(launch->device)) return -report(error);
  if (const Error error =
          samoyeds::make_job(guard.device(), *launch, routing, gate_up, down, job)) {
    return -report(error);
  }
  return job.total;
}

SAMOYEDS_EXPORT int samoyeds_moe_mlp(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
                                     const SamoyedsWeight* gate_up, const SamoyedsWeight* down,
                                     const void* hidden, void* out) {
  return report(samoyeds::moe_mlp(launch, routing, gate_up, down, hidden, out));
}

SAMOYEDS_EXPORT int samoyeds_moe_up(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
                                    const SamoyedsWeight* weight, const void* hidden, void* out) {
  return report(samoyeds::moe_up(launch, routing, weight, hidden, out));
}

SAMOYEDS_EXPORT int samoyeds_moe_down(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
                                      const SamoyedsWeight* weight, const void* inner, void* out) {
  return report(samoyeds::moe_down(launch, routing, weight, inner, out));
}

SAMOYEDS_EXPORT int samoyeds_linear(const SamoyedsLaunch* launch, const SamoyedsWeight* weight,
                                    const void* x, int64_t num_rows, void* out) {
  return report(samoyeds::linear(launch, weight, x, num_rows, out));
}

SAMOYEDS_EXPORT int64_t samoyeds_max_tiles(const SamoyedsRouting* routing, int64_t num_experts,
                                           int64_t tile_tokens) {
  if (const Error error = samoyeds::check_routing(routing, false)) return -report(error);
  if (num_experts < 0 || tile_tokens < 1) {
    return -report(samoyeds::invalid("num_experts must be >= 0 and tile_tokens >= 1"));
  }
  return samoyeds::max_tiles(routing->num_tokens * routing->top_k, num_experts, tile_tokens);
}

SAMOYEDS_EXPORT int samoyeds_route(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
                                   int64_t num_experts, int64_t tile_tokens, int32_t* pairs,
                                   int32_t* tiles, int32_t* num_tiles) {
  DeviceGuard guard;
  if (!launch) return report(samoyeds::invalid("launch must not be null"));
  if (const Error error = guard.enter(launch->device)) return report(error);
  if (const Error error = samoyeds::check_routing(routing, false)) return report(error);
  if (num_experts < 1 || num_experts > 65535 || tile_tokens < 1 || tile_tokens > INT32_MAX) {
    return report(samoyeds::invalid("num_experts must be 1 to 65535 and tile_tokens >= 1"));
  }
  if (const Error error = samoyeds::check_pointer(pairs, "pairs")) return report(error);
  if (const Error error = samoyeds::check_pointer(num_tiles, "num_tiles")) return report(error);
  if (const Error error = samoyeds::check_pointer(tiles, "tiles")) return report(error);
  const samoyeds::Stream stream{guard.device(), static_cast<cudaStream_t>(launch->stream)};
  return report(samoyeds::route(stream, routing->top_k_index,
                                static_cast<int>(routing->num_tokens * routing->top_k),
                                static_cast<int>(num_experts), static_cast<int>(tile_tokens), pairs,
                                reinterpret_cast<samoyeds::Tile*>(tiles), num_tiles));
}
