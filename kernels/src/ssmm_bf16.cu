// The matrix kernel for bf16.
#include "samoyeds/variants.cuh"

namespace samoyeds {

const SsmmVariant* bf16_variants() { return variants<__nv_bfloat16>(); }

}  // namespace samoyeds
