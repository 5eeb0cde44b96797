// The 2:4 product of cuSPARSELt through its C API, as a user gets it at best: the plan made once
// and searched, the result by rows or by columns, whichever is faster. cusparselt.py compiles and
// runs it.
//
//   cusparselt 14336 4096 4096 8     m (out features), n (tokens), k (in features), runs; and more
//
// D [m, n] = A [m, k] * B [k, n], bf16, random; A 2:4, B by columns, so that a token is contiguous.
// A CSV line for each four numbers: m,n,k,runs,result,p20_us,p50_us,p80_us. As in timing.py: `runs`
// products with weights and tokens of their own are timed together and the time is divided. Before
// them 1 GB is read, which leaves nothing of theirs in the L2, and behind which their launches
// hide.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cusparseLt.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace {

using Element = __nv_bfloat16;

constexpr int kReplays = 25;
constexpr std::size_t kFlushBytes = std::size_t{1} << 30;
constexpr int kBlocks = 1056, kThreads = 256;  // of the kernels below: all of an H200
constexpr std::uint32_t kAlignment = 16;       // bytes

void check(bool is_good, const char* call, const char* why) {
  if (is_good) return;
  std::fprintf(stderr, "cusparselt: %s: %s\n", call, why);
  std::exit(1);
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

__global__ void read_all(const uint4* data, std::size_t count, unsigned* found) {
  const std::size_t stride = std::size_t{gridDim.x} * blockDim.x;
  unsigned bits = 0;
  for (std::size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
    bits |= data[i].x | data[i].y | data[i].z | data[i].w;
  }
  if (bits) *found = bits;  // never: it is all zeros
}

struct Flush {
  Buffer<uint4> data = allocate<uint4>(kFlushBytes / sizeof(uint4));
  Buffer<unsigned> found = allocate<unsigned>(1);

  Flush() { CHECK(cudaMemset(data.get(), 0, kFlushBytes)); }

  void operator()() const {
    read_all<<<kBlocks, kThreads>>>(data.get(), kFlushBytes / sizeof(uint4), found.get());
    CHECK(cudaGetLastError());
  }
};

// --- the product ---------------------------------------------------------------------------------

struct Shape {
  std::int64_t m, n, k;
  int runs;
};

// `runs` products with weights and tokens of their own, and one plan.
class Products {
 public:
  Products(const cusparseLtHandle_t& handle, const Shape& shape, cusparseOrder_t order)
      : handle_(handle), shape_(shape), result_(allocate<Element>(shape.m * shape.n)) {
    const auto& [m, n, k, runs] = shape;
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
    for (int run = 0; run < runs; ++run) {
      weights_.push_back(sparse_weight());
      tokens_.push_back(random_matrix(k * n, 1.f));
    }
    search();
  }
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  ~Products() {
    cusparseLtMatmulPlanDestroy(&plan_);
    cusparseLtMatmulAlgSelectionDestroy(&selection_);
    for (const auto* matrix : {&a_, &b_, &d_}) cusparseLtMatDescriptorDestroy(matrix);
  }

  void operator()() {
    for (int run = 0; run < shape_.runs; ++run) {
      CHECK(cusparseLtMatmul(&handle_, &plan_, &kOne, weights_[run].get(), tokens_[run].get(),
                             &kZero, result_.get(), result_.get(), workspace_.get(), &stream_, 1));
    }
  }

 private:
  static constexpr float kOne = 1.f, kZero = 0.f, kWeightDeviation = 0.02f;

  Buffer<std::uint8_t> sparse_weight() {
    const Buffer<Element> dense = random_matrix(shape_.m * shape_.k, kWeightDeviation);
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

  const cusparseLtHandle_t& handle_;
  const Shape shape_;
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

// --- time ----------------------------------------------------------------------------------------

struct Time {
  float p20, p50, p80;  // microseconds of one product
};

Time measure(Products& products, int runs, const Flush& flush) {
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  products();
  std::vector<float> samples(kReplays);
  for (float& sample : samples) {
    flush();
    CHECK(cudaEventRecord(start));
    products();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&sample, start, end));
    sample *= 1e3f / static_cast<float>(runs);
  }
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(end));
  std::sort(samples.begin(), samples.end());
  return {samples[kReplays / 5], samples[kReplays / 2], samples[kReplays * 4 / 5]};
}

void print_faster(const cusparseLtHandle_t& handle, const Shape& shape, const Flush& flush) {
  Time times[2];
  const cusparseOrder_t orders[] = {CUSPARSE_ORDER_ROW, CUSPARSE_ORDER_COL};
  for (int i = 0; i < 2; ++i) {
    Products products(handle, shape, orders[i]);
    times[i] = measure(products, shape.runs, flush);
  }
  const bool is_by_columns = times[1].p50 < times[0].p50;
  const Time& time = times[is_by_columns];
  std::printf("%lld,%lld,%lld,%d,%s,%.2f,%.2f,%.2f\n", static_cast<long long>(shape.m),
              static_cast<long long>(shape.n), static_cast<long long>(shape.k), shape.runs,
              is_by_columns ? "columns" : "rows", time.p20, time.p50, time.p80);
}

}  // namespace

int main(int argc, char** argv) {
  check(argc > 1 && argc % 4 == 1, "arguments", "m n k runs, and more such fours");
  cusparseLtHandle_t handle;
  CHECK(cusparseLtInit(&handle));
  {
    const Flush flush;
    for (int i = 1; i < argc; i += 4) {
      const Shape shape{std::atoll(argv[i]), std::atoll(argv[i + 1]), std::atoll(argv[i + 2]),
                        std::atoi(argv[i + 3])};
      check(shape.m > 0 && shape.n > 0 && shape.k > 0 && shape.runs > 0, "arguments",
            "m, n, k and runs must be positive numbers");
      print_faster(handle, shape, flush);
    }
  }
  CHECK(cusparseLtDestroy(&handle));
  return 0;
}
