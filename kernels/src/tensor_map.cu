// Tensor maps: how a matrix lies in global memory, as the copy engine wants to be told.
#include <cudaTypedefs.h>

#include <atomic>
#include <cstring>

#include "samoyeds/launch.hpp"
#include "samoyeds/panels.cuh"

namespace samoyeds {
namespace {

using Encode = PFN_cuTensorMapEncodeTiled_v12000;

// A function of the driver, which this library is not linked to: it loads where there is none.
Error find_encode(Encode& encode) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                            12000, cudaEnableDefault, &result);
#else
  const cudaError_t code =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
  SAMOYEDS_RETURN_IF_ERROR(check_cuda(code, "asking the driver for tensor maps"));
  if (result != cudaDriverEntryPointSuccess || !function) {
    return unsupported("kernels for this GPU need a driver with tensor maps, 525 or newer");
  }
  encode = reinterpret_cast<Encode>(function);
  return {};
}

}  // namespace

Error map_matrix(void* matrix, int rows, int columns, int box_rows, TensorMap& map) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "one is copied to the other");
  static std::atomic<Encode> found = nullptr;  // the same whoever finds it
  Encode encode = found;
  if (!encode) {
    SAMOYEDS_RETURN_IF_ERROR(find_encode(encode));
    found = encode;
  }
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {sizes[0] * 2};
  const cuuint32_t box[] = {kPanelCols, static_cast<cuuint32_t>(box_rows)}, every[] = {1, 1};
  CUtensorMap made;
  const CUresult code =
      encode(&made, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, matrix, sizes, row_bytes, box, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code == CUDA_SUCCESS) {
    std::memcpy(&map, &made, sizeof map);
    return {};
  }
  return {SAMOYEDS_CUDA_ERROR, "describing the result [" + std::to_string(rows) + ", " +
                                   std::to_string(columns) + "] to the GPU failed with CUresult " +
                                   std::to_string(static_cast<int>(code))};
}

}  // namespace samoyeds
