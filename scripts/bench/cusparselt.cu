// The 2:4 product of cuSPARSELt through its C API, as a user gets it at best: the plan made once
// and searched. cusparselt.py compiles it to a library and calls it.
//
// D [m, n] = A [m, k] * B [k, n], bf16, random; A 2:4, B by columns, so that a token is contiguous,
// D by rows or by columns. Each of the functions at the end returns what went wrong, or null.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cusparseLt.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Element = __nv_bfloat16;

constexpr int kBlocks = 1056, kThreads = 256;  // of the kernel below: all of an H200
constexpr std::uint32_t kAlignment = 16;       // bytes

void check(bool is_good, const char* call, const char* why) {
  if (!is_good) throw std::runtime_error(std::string(call) + ": " + why);
}

void check(cudaError_t code, const char* call) {
  check(code == cudaSuccess, call, cudaGetErrorString(code));
}

void check(cusparseStatus_t code, const char* call) {
  check(code == CUSPARSE_STATUS_SUCCESS, call, cusparseLtGetErrorString(code));
}

#define CHECK(call) check((call), #call)

struct Free {
  void operator()(void* data) const { cudaFree(data); }
};

template <typename T>
using Buffer = std::unique_ptr<T, Free>;

template <typename T>
Buffer<T> allocate(std::size_t count) {
  void* data = nullptr;
  CHECK(cudaMalloc(&data, std::max<std::size_t>(count * sizeof(T), kAlignment)));
  return Buffer<T>(static_cast<T*>(data));
}

// --- data ----------------------------------------------------------------------------------------

__device__ float uniform(std::uint32_t x) {  // (0, 1]
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return (static_cast<float>(x ^ x >> 16) + 0.5f) * 0x1p-32f;
}

__global__ void fill_normal(Element* out, std::size_t count, float deviation, std::uint32_t seed) {
  const std::size_t stride = std::size_t{gridDim.x} * blockDim.x;
  for (std::size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
    const std::uint32_t number = 2 * static_cast<std::uint32_t>(i) + seed * 0x9e3779b9u;
    const float radius = sqrtf(-2.f * logf(uniform(number)));
    out[i] = __float2bfloat16(deviation * radius * cospif(2.f * uniform(number + 1)));
  }
}

Buffer<Element> random_matrix(std::int64_t count, float deviation) {
  static std::uint32_t seed = 0;
  Buffer<Element> matrix = allocate<Element>(count);
  fill_normal<<<kBlocks, kThreads>>>(matrix.get(), count, deviation, ++seed);
  CHECK(cudaGetLastError());
  return matrix;
}

// --- the product ---------------------------------------------------------------------------------

// Products with weights and tokens of their own, and one plan.
class Products {
 public:
  Products(std::int64_t m, std::int64_t n, std::int64_t k, int count, cusparseOrder_t order)
      : m_(m), k_(k), result_(allocate<Element>(m * n)) {
    CHECK(cusparseLtInit(&handle_));
    const std::int64_t leading = order == CUSPARSE_ORDER_COL ? m : n;
    CHECK(cusparseLtStructuredDescriptorInit(&handle_, &a_, m, k, k, kAlignment, CUDA_R_16BF,
                                             CUSPARSE_ORDER_ROW, CUSPARSELT_SPARSITY_50_PERCENT));
    CHECK(cusparseLtDenseDescriptorInit(&handle_, &b_, k, n, k, kAlignment, CUDA_R_16BF,
                                        CUSPARSE_ORDER_COL));
    CHECK(cusparseLtDenseDescriptorInit(&handle_, &d_, m, n, leading, kAlignment, CUDA_R_16BF,
                                        order));
    CHECK(cusparseLtMatmulDescriptorInit(&handle_, &product_, CUSPARSE_OPERATION_NON_TRANSPOSE,
                                         CUSPARSE_OPERATION_NON_TRANSPOSE, &a_, &b_, &d_, &d_,
                                         CUSPARSE_COMPUTE_32F));
    CHECK(cusparseLtMatmulAlgSelectionInit(&handle_, &selection_, &product_,
                                           CUSPARSELT_MATMUL_ALG_DEFAULT));
    CHECK(cusparseLtMatmulPlanInit(&handle_, &plan_, &product_, &selection_));
    for (int i = 0; i < count; ++i) {
      weights_.push_back(sparse_weight());
      tokens_.push_back(random_matrix(k * n, 1.f));
    }
    search();
    CHECK(cudaStreamSynchronize(stream_));
  }
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  ~Products() {
    cusparseLtMatmulPlanDestroy(&plan_);
    cusparseLtMatmulAlgSelectionDestroy(&selection_);
    for (const auto* matrix : {&a_, &b_, &d_}) cusparseLtMatDescriptorDestroy(matrix);
    cusparseLtDestroy(&handle_);
  }

  void multiply(int i, cudaStream_t stream) {
    CHECK(cusparseLtMatmul(&handle_, &plan_, &kOne, weights_.at(i).get(), tokens_.at(i).get(),
                           &kZero, result_.get(), result_.get(), workspace_.get(), &stream, 1));
  }

 private:
  static constexpr float kOne = 1.f, kZero = 0.f, kWeightDeviation = 0.02f;

  Buffer<std::uint8_t> sparse_weight() {
    const Buffer<Element> dense = random_matrix(m_ * k_, kWeightDeviation);
    std::size_t num_bytes = 0, scratch_bytes = 0;
    CHECK(cusparseLtSpMMAPrune(&handle_, &product_, dense.get(), dense.get(),
                               CUSPARSELT_PRUNE_SPMMA_STRIP, stream_));
    CHECK(cusparseLtSpMMACompressedSize(&handle_, &plan_, &num_bytes, &scratch_bytes));
    Buffer<std::uint8_t> compressed = allocate<std::uint8_t>(num_bytes);
    const Buffer<std::uint8_t> scratch = allocate<std::uint8_t>(scratch_bytes);
    CHECK(cusparseLtSpMMACompress(&handle_, &plan_, dense.get(), compressed.get(), scratch.get(),
                                  stream_));
    CHECK(cudaStreamSynchronize(stream_));  // before the buffers go
    return compressed;
  }

  // Leaves the fastest algorithm in the plan.
  void search() {
    CHECK(cusparseLtMatmulSearch(&handle_, &plan_, &kOne, weights_[0].get(), tokens_[0].get(),
                                 &kZero, result_.get(), result_.get(), nullptr, &stream_, 1));
    std::size_t num_bytes = 0;
    CHECK(cusparseLtMatmulGetWorkspace(&handle_, &plan_, &num_bytes));
    workspace_ = allocate<std::uint8_t>(num_bytes);
  }

  const std::int64_t m_, k_;
  cusparseLtHandle_t handle_;
  cusparseLtMatDescriptor_t a_, b_, d_;
  cusparseLtMatmulDescriptor_t product_;
  cusparseLtMatmulAlgSelection_t selection_;
  cusparseLtMatmulPlan_t plan_;
  cudaStream_t stream_ = nullptr;              // the default stream
  std::vector<Buffer<std::uint8_t>> weights_;  // compressed
  std::vector<Buffer<Element>> tokens_;        // [k, n], by columns
  Buffer<Element> result_;                     // one for all, as torch's allocator would give
  Buffer<std::uint8_t> workspace_;
};

// --- functions for Python ------------------------------------------------------------------------

template <typename Call>
const char* error_of(Call&& call) {
  static thread_local std::string text;
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

}  // namespace

extern "C" {

const char* products_create(std::int64_t m, std::int64_t n, std::int64_t k, int count,
                            int is_by_columns, void** products) {
  return error_of([&] {
    const cusparseOrder_t order = is_by_columns ? CUSPARSE_ORDER_COL : CUSPARSE_ORDER_ROW;
    *products = new Products(m, n, k, count, order);
  });
}

// Number i, launched on a stream.
const char* products_multiply(void* products, int i, cudaStream_t stream) {
  return error_of([&] { static_cast<Products*>(products)->multiply(i, stream); });
}

void products_destroy(void* products) { delete static_cast<Products*>(products); }

}  // extern "C"
