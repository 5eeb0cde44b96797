// The functions of the C interface, api.h.
#include "samoyeds/api.h"

#include <algorithm>

#include "samoyeds/checks.hpp"
#include "samoyeds/layer.hpp"

using namespace samoyeds;

namespace {

Error check_packing(DeviceGuard& guard, const SamoyedsLaunch* launch, const SamoyedsWeight* weight,
                    const void* values, const void* meta, const void* index, Layout& layout) {
  if (!launch) return invalid("launch must not be null");
  SAMOYEDS_RETURN_IF_ERROR(guard.enter(launch->device));
  SAMOYEDS_RETURN_IF_ERROR(packed_layout_of(weight, layout));
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(values, "values"));
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(meta, "meta"));
  return check_pointer(index, "index");
}

Stream stream_of(const DeviceGuard& guard, const SamoyedsLaunch& launch) {
  return {guard.device(), static_cast<cudaStream_t>(launch.stream)};
}

}  // namespace

int samoyeds_abi_version(void) { return SAMOYEDS_ABI_VERSION; }
const char* samoyeds_last_error(void) { return last_error(); }
const char* samoyeds_build_info(void) { return SAMOYEDS_BUILD_INFO; }
const char* samoyeds_layout(void) { return kLayoutName; }
const char* samoyeds_heuristics(void) { return heuristics(); }

int samoyeds_prepare(int64_t device) {
  DeviceGuard guard;
  return report(guard.enter(device));
}

int64_t samoyeds_packed_bytes(const SamoyedsWeight* weight) {
  Layout layout;
  if (const Error error = layout_of(weight, layout)) return -report(error);
  return layout.expert_bytes * weight->num_experts;
}

int samoyeds_pack(const SamoyedsLaunch* launch, const SamoyedsWeight* weight, const void* values,
                  const uint8_t* meta, const uint8_t* index) {
  DeviceGuard guard;
  Layout layout;
  if (const Error error = check_packing(guard, launch, weight, values, meta, index, layout)) {
    return report(error);
  }
  const Stream stream = stream_of(guard, *launch);
  return report(pack(stream, layout, static_cast<int>(weight->num_experts),
                     static_cast<uint8_t*>(weight->packed), values, meta, index));
}

int samoyeds_unpack(const SamoyedsLaunch* launch, const SamoyedsWeight* weight, void* values,
                    uint8_t* meta, uint8_t* index) {
  DeviceGuard guard;
  Layout layout;
  if (const Error error = check_packing(guard, launch, weight, values, meta, index, layout)) {
    return report(error);
  }
  const Stream stream = stream_of(guard, *launch);
  return report(unpack(stream, layout, static_cast<int>(weight->num_experts),
                       static_cast<const uint8_t*>(weight->packed), values, meta, index));
}

int samoyeds_choose_plan(int64_t device, const SamoyedsWeight* weight, int64_t num_tokens,
                         int64_t top_k, int64_t is_down, SamoyedsPlan* plan) {
  DeviceGuard guard;
  Layout layout;
  if (const Error error = guard.enter(device)) return report(error);
  if (const Error error = layout_of(weight, layout)) return report(error);
  if (const Error error = check_pairs(num_tokens, top_k)) return report(error);
  if (!plan) return report(invalid("plan must not be null"));
  if (layout.kind == Kind::kGeneral) {
    return report(unsupported("general patterns have one kernel and no plan"));
  }
  *plan = choose_plan(guard.device(), layout, weight->num_experts, num_tokens, top_k, is_down != 0,
                      true);
  return SAMOYEDS_OK;
}

int64_t samoyeds_workspace_bytes(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
                                 const SamoyedsWeight* gate_up, const SamoyedsWeight* down) {
  DeviceGuard guard;
  Job job;
  if (!launch) return -report(invalid("launch must not be null"));
  if (const Error error = guard.enter(launch->device)) return -report(error);
  if (const Error error = make_job(guard.device(), *launch, routing, gate_up, down, job)) {
    return -report(error);
  }
  return job.total;
}

int samoyeds_moe_mlp(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
                     const SamoyedsWeight* gate_up, const SamoyedsWeight* down, const void* hidden,
                     void* out) {
  return report(moe_mlp(launch, routing, gate_up, down, hidden, out));
}

int samoyeds_moe_up(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
                    const SamoyedsWeight* weight, const void* hidden, void* out) {
  return report(moe_up(launch, routing, weight, hidden, out));
}

int samoyeds_moe_down(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
                      const SamoyedsWeight* weight, const void* inner, void* out) {
  return report(moe_down(launch, routing, weight, inner, out));
}

int64_t samoyeds_linear_workspace_bytes(const SamoyedsLaunch* launch, const SamoyedsWeight* weight,
                                        int64_t num_rows) {
  return linear_workspace_bytes(launch, weight, num_rows);
}

int samoyeds_linear(const SamoyedsLaunch* launch, const SamoyedsWeight* weight, const void* x,
                    int64_t num_rows, void* out) {
  return report(linear(launch, weight, x, num_rows, out));
}

int64_t samoyeds_max_tiles(const SamoyedsRouting* routing, int64_t num_experts,
                           int64_t tile_tokens) {
  if (const Error error = check_routing(routing, false)) return -report(error);
  if (num_experts < 0 || tile_tokens < 1) {
    return -report(invalid("num_experts must be >= 0 and tile_tokens >= 1"));
  }
  return max_tiles(routing->num_tokens * routing->top_k, num_experts,
                   {static_cast<int>(std::min<int64_t>(tile_tokens, kMaxPairs))});
}

int samoyeds_route(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
                   int64_t num_experts, int64_t tile_tokens, int32_t* pairs, int32_t* tiles,
                   int32_t* num_tiles) {
  DeviceGuard guard;
  if (!launch) return report(invalid("launch must not be null"));
  if (const Error error = guard.enter(launch->device)) return report(error);
  if (const Error error = check_routing(routing, false)) return report(error);
  if (num_experts < 1 || num_experts > kMaxExperts || tile_tokens < 1 || tile_tokens > kMaxPairs) {
    return report(invalid("num_experts must be 1 to 65535 and tile_tokens 1 to 2^28"));
  }
  if (const Error error = check_pointer(pairs, "pairs")) return report(error);
  if (const Error error = check_pointer(num_tiles, "num_tiles")) return report(error);
  if (const Error error = check_pointer(tiles, "tiles")) return report(error);
  const Stream stream = stream_of(guard, *launch);
  Route args{};
  args.top_k_index = routing->top_k_index;
  args.num_pairs = static_cast<int>(routing->num_tokens * routing->top_k);
  args.num_experts = static_cast<int>(num_experts);
  args.tiling = {static_cast<int>(tile_tokens)};
  args.pairs = pairs;
  args.tiles = reinterpret_cast<Tile*>(tiles);
  args.num_tiles = num_tiles;
  return report(route(stream, args));
}
