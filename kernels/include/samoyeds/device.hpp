// Host side: errors, GPUs, streams, and how a kernel is started.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "samoyeds/api.h"

namespace samoyeds {

// Status with a text, as the C interface reports it.
struct Error {
  SamoyedsStatus status = SAMOYEDS_OK;
  std::string text;
  explicit operator bool() const { return status != SAMOYEDS_OK; }
};

Error invalid(std::string text);
Error unsupported(std::string text);
Error check_cuda(cudaError_t code, const char* doing);

// Keeps the text for last_error(); returns the status.
int report(const Error& error);
const char* last_error();  // of the calling thread

#define SAMOYEDS_RETURN_IF_ERROR(expression) \
  if (::samoyeds::Error error_ = (expression)) return error_

struct Device {
  int ordinal = -1;
  int capability = 0;  // 10 * major + minor
  int num_sms = 0;
  int all_shared_bytes = 0;    // most that a thread block may have; the Hopper kernel asks for it
  int block_shared_bytes = 0;  // most that it may ask for beside what other kernels declare
  int sm_shared_bytes = 0;
};

// Makes a device the current one until the guard goes.
class DeviceGuard {
 public:
  DeviceGuard() = default;
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard();
  // The first time for a device also loads every kernel onto it.
  Error enter(std::int64_t ordinal);
  const Device& device() const { return *device_; }

 private:
  int previous_ = -1;
  const Device* device_ = nullptr;
};

// A stream, and whether the next kernel may start before its predecessor on it has ended: then it
// must wait by itself (ptx::wait_for_previous_kernel) before it touches what that one writes.
struct Stream {
  const Device& device;
  cudaStream_t handle;
  bool overlaps = false;
};

namespace detail {
template <typename T>
struct Identity {
  using type = T;
};
template <typename T>
using Same = typename Identity<T>::type;  // not deduced: arguments convert to the kernel's types
}  // namespace detail

// `cluster` neighbouring thread blocks run at the same time, and see each other's shared memory.
template <typename... Args>
Error launch_clusters(const Stream& stream, void (*kernel)(Args...), dim3 grid, dim3 block,
                      int shared, int cluster, const detail::Same<Args>&... args) {
  cudaLaunchAttribute attributes[2]{};
  int count = 0;
  if (stream.overlaps && stream.device.capability >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream.handle;
  config.attrs = attributes;
  config.numAttrs = count;
  return check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "launching a kernel");
}

template <typename... Args>
Error launch(const Stream& stream, void (*kernel)(Args...), dim3 grid, dim3 block, int shared,
             const detail::Same<Args>&... args) {
  return launch_clusters(stream, kernel, grid, block, shared, 1, args...);
}

}  // namespace samoyeds
