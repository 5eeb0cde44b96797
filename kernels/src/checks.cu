// What the C interface requires of its arguments: requirement, what was found.
#include "samoyeds/checks.hpp"

namespace samoyeds {

static_assert(kMaxPairs <= INT32_MAX, "the kernels number pairs with int");

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

Error check_pairs(std::int64_t num_tokens, std::int64_t top_k) {
  SAMOYEDS_RETURN_IF_ERROR(check_range(num_tokens, 0, INT32_MAX, "num_tokens"));
  SAMOYEDS_RETURN_IF_ERROR(check_range(top_k, 1, kMaxTopK, "top_k"));
  return check_range(num_tokens * top_k, 0, kMaxPairs, "num_tokens * top_k");
}

Error check_routing(const SamoyedsRouting* r, bool needs_weights) {
  if (!r) return invalid("routing must not be null");
  SAMOYEDS_RETURN_IF_ERROR(check_pairs(r->num_tokens, r->top_k));
  if (r->num_tokens == 0) return {};
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(r->top_k_index, "top_k_index"));
  if (!needs_weights) return {};
  SAMOYEDS_RETURN_IF_ERROR(check_pointer(r->top_k_weights, "top_k_weights"));
  return check_range(r->weights_dtype, SAMOYEDS_BF16, SAMOYEDS_FP32, "weights_dtype");
}

Error layout_of(const SamoyedsWeight* w, Layout& layout) {
  if (!w) return invalid("a weight must not be null");
  SAMOYEDS_RETURN_IF_ERROR(check_range(w->dtype, SAMOYEDS_BF16, SAMOYEDS_FP16, "a weight's dtype"));
  SAMOYEDS_RETURN_IF_ERROR(check_range(w->num_experts, 0, kMaxExperts, "num_experts"));
  SAMOYEDS_RETURN_IF_ERROR(check_range(w->m, 1, kMaxM, "M"));
  SAMOYEDS_RETURN_IF_ERROR(check_range(w->n, 1, w->m, "N"));
  SAMOYEDS_RETURN_IF_ERROR(check_range(w->rows, 1, kMaxWeightSize, "rows"));
  SAMOYEDS_RETURN_IF_ERROR(check_range(w->cols, 8, kMaxWeightSize, "cols"));
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

}  // namespace samoyeds
