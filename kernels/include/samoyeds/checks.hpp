// What the C interface requires of its arguments.
#pragma once

#include "samoyeds/device.hpp"
#include "samoyeds/fragment.cuh"

namespace samoyeds {

inline constexpr std::int64_t kAlignment = 16;  // bytes, of every device pointer
inline constexpr std::int64_t kMaxExperts = 65535;
inline constexpr std::int64_t kMaxWeightSize = 1 << 20;  // rows, and columns
inline constexpr std::int64_t kMaxTopK = 1024;
inline constexpr std::int64_t kMaxPairs = 1 << 28;  // tokens times top-k

// Aligned, and not null.
Error check_pointer(const void* pointer, const char* name);
Error check_range(std::int64_t value, std::int64_t low, std::int64_t high, const char* name);
Error check_pairs(std::int64_t num_tokens, std::int64_t top_k);
// Also its pointers: the weights only where a sum over the choices needs them.
Error check_routing(const SamoyedsRouting* routing, bool needs_weights);

// The layout of a weight whose members but packed and num_bytes are right, ...
Error layout_of(const SamoyedsWeight* weight, Layout& layout);
// ... and of one with room for it.
Error packed_layout_of(const SamoyedsWeight* weight, Layout& layout);

}  // namespace samoyeds
