// The matrix kernel for fp16.
#include "samoyeds/variants.cuh"

namespace samoyeds {

const SsmmVariant* fp16_variants() { return variants<__half>(); }

}  // namespace samoyeds
