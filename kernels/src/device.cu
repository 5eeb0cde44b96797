// Errors, and what the library knows of each GPU.
#include "samoyeds/device.hpp"

#include <algorithm>
#include <array>
#include <mutex>
#include <utility>
#include <vector>

#include "samoyeds/launch.hpp"

namespace samoyeds {
namespace {

constexpr int kMaxDevices = 64;

thread_local std::string last_text;

Error query_properties(int ordinal, Device& device) {
  int major = 0, minor = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } wanted[] = {
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMultiProcessorCount, &device.num_sms},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device.all_shared_bytes},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &device.sm_shared_bytes},
  };
  for (const auto& each : wanted) {
    SAMOYEDS_RETURN_IF_ERROR(check_cuda(cudaDeviceGetAttribute(each.value, each.attribute, ordinal),
                                        "asking for the GPU"));
  }
  device.capability = major * 10 + minor;
  if (device.capability >= 80) return {};
  return unsupported(
      "kernels need a GPU with sparse tensor cores, compute capability 8.0 or newer, found " +
      std::to_string(major) + "." + std::to_string(minor));
}

// CUDA loads a kernel when it is first asked about, which cannot be done inside a graph capture.
Error load_kernel(const void* kernel, int& own_shared_bytes) {
  cudaFuncAttributes attributes;
  SAMOYEDS_RETURN_IF_ERROR(
      check_cuda(cudaFuncGetAttributes(&attributes, kernel), "loading a kernel for this GPU"));
  own_shared_bytes = static_cast<int>(attributes.sharedSizeBytes);
  return {};
}

Error load_kernels(Device& device) {
  int most_own = 0;
  for (const SsmmVariant* table : {bf16_variants(), fp16_variants()}) {
    for (int i = 0; i < kNumVariants; ++i) {
      if (table[i].needs_sm90a && device.capability != 90) continue;
      for (const SsmmKernel function : table[i].kernels) {
        if (!function) continue;
        const auto* kernel = reinterpret_cast<const void*>(function);
        int own = 0;
        SAMOYEDS_RETURN_IF_ERROR(load_kernel(kernel, own));
        SAMOYEDS_RETURN_IF_ERROR(
            check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            device.all_shared_bytes - own),
                       "reserving shared memory"));
        most_own = std::max(most_own, own);
      }
    }
  }
  for (const auto& kernels :
       {pack_kernels(), route_kernels(), gather_kernels(), general_kernels(), combine_kernels()}) {
    for (const void* kernel : kernels) {
      int ignored = 0;
      SAMOYEDS_RETURN_IF_ERROR(load_kernel(kernel, ignored));
    }
  }
  device.block_shared_bytes = device.all_shared_bytes - most_own;
  return {};
}

}  // namespace

Error invalid(std::string text) { return {SAMOYEDS_INVALID_ARGUMENT, std::move(text)}; }
Error unsupported(std::string text) { return {SAMOYEDS_UNSUPPORTED, std::move(text)}; }
Error check_cuda(cudaError_t code, const char* doing) {
  if (code == cudaSuccess) return {};
  cudaGetLastError();  // an error that is reported here must not surface again elsewhere
  return {SAMOYEDS_CUDA_ERROR, std::string(doing) + " failed: " + cudaGetErrorString(code)};
}

int report(const Error& error) {
  if (error) last_text = error.text;
  return error.status;
}

const char* last_error() { return last_text.c_str(); }

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

Error DeviceGuard::enter(std::int64_t ordinal) {
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
  Device& device = devices[static_cast<std::size_t>(ordinal)];
  if (device.ordinal < 0) {
    SAMOYEDS_RETURN_IF_ERROR(query_properties(static_cast<int>(ordinal), device));
    SAMOYEDS_RETURN_IF_ERROR(load_kernels(device));
    device.ordinal = static_cast<int>(ordinal);  // only now: what failed is tried again
  }
  device_ = &device;
  return {};
}

}  // namespace samoyeds
