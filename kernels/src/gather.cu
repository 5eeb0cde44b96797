// Tokens to the panels of panels.cuh, once for each expert that they meet.
#include "samoyeds/launch.hpp"
#include "samoyeds/panels.cuh"
#include "samoyeds/ptx.cuh"

namespace samoyeds {
namespace {

constexpr int kGatherThreads = 256;
constexpr int kPlacesAtOnce = kGatherThreads / kPanelChunks;
constexpr int kPanelsAtOnce = 2;

// Eight threads fill a place's row of a panel, 16 bytes each, and take kPanelsAtOnce panels. Thread
// blocks that run at the same time take the same panels of different places: those columns of x
// stay in the L2, where each token is read once for every expert that it meets.
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(Gather args) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  if (args.num_claimed && threadIdx.x + blockIdx.x + blockIdx.y == 0) *args.num_claimed = 0;
  const int chunk = threadIdx.x % kPanelChunks;
  const int place = blockIdx.x * kPlacesAtOnce + threadIdx.x / kPanelChunks;
  const int first = blockIdx.y * kPanelsAtOnce, panels = args.columns / kPanelCols;
  if (place >= args.max_places) return;
  const int pair = args.pairs ? args.pairs[place] : place < args.num_rows ? place : kNoPair;
  const auto* from =
      static_cast<const uint4*>(args.x) +
      static_cast<std::int64_t>(pair / args.pairs_per_row) * (args.columns / kChunkCols) +
      first * kPanelChunks + chunk;
  auto* to = static_cast<std::uint8_t*>(args.panels) + panel_offset(first, args.max_places, place) +
             swizzled_chunk(place, chunk);
  const std::int64_t stride = panel_offset(1, args.max_places, 0);
  uint4 values[kPanelsAtOnce];
#pragma unroll
  for (int i = 0; i < kPanelsAtOnce; ++i) {
    // Zeros where no pair is: no other place's result depends on them, but they are read.
    values[i] = {};
    if (pair != kNoPair && first + i < panels) values[i] = __ldg(from + i * kPanelChunks);
  }
#pragma unroll
  for (int i = 0; i < kPanelsAtOnce; ++i) {
    if (first + i < panels) *reinterpret_cast<uint4*>(to + i * stride) = values[i];
  }
}

}  // namespace

std::vector<const void*> gather_kernels() {
  return {reinterpret_cast<const void*>(&gather_kernel)};
}

Error gather(const Stream& stream, const Gather& args) {
  const dim3 grid(ceil_div(args.max_places, kPlacesAtOnce),
                  ceil_div(args.columns / kPanelCols, kPanelsAtOnce));
  return launch(stream, gather_kernel, grid, kGatherThreads, 0, args);
}

}  // namespace samoyeds
