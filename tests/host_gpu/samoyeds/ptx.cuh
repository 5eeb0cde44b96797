// What the matrix kernel takes from CUDA, on a CPU: instead of kernels/include/samoyeds/ptx.cuh.
//
// The threads of a block are fibers of one thread of the CPU, which take turns wherever one waits.
// Instructions of a warp are written from the PTX ISA's description of their fragments, and share
// nothing with fragment.cuh. Copies are there at once, so what depends on their timing shows on a
// GPU only. HOST_BULK_COPIES: those of compute capability 9.0, else cp.async.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ thread_local  // one thread of the CPU runs all threads of a block
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct uint4 {
  std::uint32_t x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct __half {
  std::uint16_t bits;
};

inline float widen(__nv_bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
__half __float2half_rn(float);  // this CPU may have none
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return std::exp(x); }
template <typename T>
T __ldg(const T* from) {
  return *from;
}

namespace host {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "host_gpu: %s\n", what);
  std::exit(3);
}

struct Index {
  unsigned x = 0;
};

struct Barrier {  // of shared memory
  int arrivals = 0, pending = 0;
  std::int64_t bytes = 0;
  std::uint32_t phase = 0;

  void complete_if_done() {
    if (pending == 0 && bytes == 0) ++phase, pending = arrivals;
  }
};
struct Meeting {  // of some threads
  int arrived = 0;
  std::uint64_t number = 0;
};
constexpr int kLanes = 32;
struct Warp {
  Meeting meeting;
  std::uint32_t words[kLanes][10];   // operands
  float sums[kLanes][4];             // and results
  std::uint32_t results[kLanes][4];  // of others
};
struct Fiber {
  ucontext_t context{};
  std::vector<char> stack;
  bool is_done = false;
};

// A thread block that runs.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<std::uint32_t, Barrier> barriers;
  std::map<int, Meeting> meetings;
  std::function<void()> kernel;
  ucontext_t turns{};
  std::size_t running = 0;
  std::uint64_t progress = 0;  // counts what may end a wait
};
inline Block* block = nullptr;

inline void wait_for_turn() { swapcontext(&block->fibers[block->running].context, &block->turns); }

// Until `threads` are here; the last one does `then`.
template <typename Then>
void meet(Meeting& meeting, int threads, Then&& then) {
  const std::uint64_t number = meeting.number;
  ++block->progress;
  if (++meeting.arrived == threads) {
    then();
    meeting.arrived = 0;
    ++meeting.number;
    return;
  }
  while (meeting.number == number) wait_for_turn();
}

inline void run_fiber() {
  block->kernel();
  Block& ending = *block;
  ending.fibers[ending.running].is_done = true;
  ++ending.progress;
  wait_for_turn();
}

}  // namespace host

inline host::Index threadIdx, blockIdx, gridDim;
inline void __syncwarp() {}
inline void __syncthreads() {
  host::meet(host::block->meetings[0], static_cast<int>(host::block->fibers.size()), [] {});
}
inline void __trap() { host::fail("trap"); }

namespace host {

inline void run_block(int threads, std::function<void()> kernel) {
  Block running;
  block = &running;
  running.kernel = std::move(kernel);
  running.fibers.resize(static_cast<std::size_t>(threads));
  running.warps.resize(static_cast<std::size_t>(threads / kLanes));
  for (Fiber& fiber : running.fibers) {
    fiber.stack.resize(256 << 10);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool is_done = false; !is_done;) {
    const std::uint64_t before = running.progress;
    is_done = true;
    for (running.running = 0; running.running < running.fibers.size(); ++running.running) {
      Fiber& fiber = running.fibers[running.running];
      if (fiber.is_done) continue;
      is_done = false;
      threadIdx.x = static_cast<unsigned>(running.running);
      swapcontext(&running.turns, &fiber.context);
    }
    if (!is_done && running.progress == before) fail("every thread waits");
  }
  block = nullptr;
}

}  // namespace host

namespace samoyeds {

// The kernel's shared memory, which it declares by this name.
constexpr int kSharedBytes = 227 << 10;
extern thread_local std::uint8_t buffers[];

namespace ptx {

inline constexpr std::int64_t kSharedBase = 1 << 30;  // addresses are small numbers, never 0
inline std::uint32_t shared_address(const void* pointer) {
  const std::int64_t offset = static_cast<const std::uint8_t*>(pointer) - buffers;
  return static_cast<std::uint32_t>(kSharedBase + offset);
}
template <typename T>
T& shared(std::uint32_t address) {
  if (address % sizeof(T) != 0) host::fail("a shared address is not aligned");
  if (address < kSharedBase || address + sizeof(T) > kSharedBase + kSharedBytes) {
    host::fail("a shared address is outside");
  }
  return *reinterpret_cast<T*>(buffers + (address - kSharedBase));
}

inline void init_barrier(std::uint32_t barrier, int arrivals) {
  host::block->barriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void arrive(std::uint32_t barrier) {
  host::Barrier& found = host::block->barriers.at(barrier);
  ++host::block->progress;
  --found.pending;
  found.complete_if_done();
}
inline void wait(std::uint32_t barrier, std::uint32_t parity) {
  while ((host::block->barriers.at(barrier).phase & 1) == parity) host::wait_for_turn();
}

inline void copy_16(std::uint32_t to, const void* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) host::fail("a source is not aligned");
  std::memcpy(&shared<uint4>(to / 16 * 16), from, 16);
  if (to % 16 != 0) host::fail("a shared address is not aligned");
}
#ifdef HOST_BULK_COPIES
inline constexpr bool kHasBulkCopies = true;
#else
inline constexpr bool kHasBulkCopies = false;
#endif
inline void arrive_expecting(std::uint32_t barrier, std::uint32_t num_bytes) {
  host::block->barriers.at(barrier).bytes += num_bytes;
  arrive(barrier);
}
template <bool kOnce>
void copy_bulk(std::uint32_t to, const void* from, int num_bytes, std::uint32_t barrier) {
  for (int byte = 0; byte < num_bytes; byte += 16) {
    copy_16(to + static_cast<std::uint32_t>(byte), static_cast<const char*>(from) + byte);
  }
  host::Barrier& found = host::block->barriers.at(barrier);
  ++host::block->progress;
  found.bytes -= num_bytes;
  found.complete_if_done();
}
inline void copy_async(std::uint32_t to, const void* from) { copy_16(to, from); }
inline void copy_async_or_zero(std::uint32_t to, const void* from, bool read) {
  if (read) {
    copy_16(to, from);
  } else {
    shared<uint4>(to) = {};
  }
}
inline void arrive_after_copies(std::uint32_t barrier) { arrive(barrier); }

inline void sync_some(int barrier, int threads) {
  host::meet(host::block->meetings[barrier], threads, [] {});
}

inline int here(int x) { return x; }

inline uint4 load_shared(std::uint32_t address) {
  if (address % 16 != 0) host::fail("a shared address is not aligned");
  return shared<uint4>(address);
}
inline std::uint32_t load_shared_word(std::uint32_t address) {
  return shared<std::uint32_t>(address);
}
inline float load_shared_float(std::uint32_t address) { return shared<float>(address); }
inline void store_shared(std::uint32_t address, float x) { shared<float>(address) = x; }

inline host::Warp& my_warp() { return host::block->warps[threadIdx.x / host::kLanes]; }

// ldmatrix .x4: lane l has the address of row l % 8 of matrix l / 8, 16 bytes, and gets elements
// 2 * (l % 4) and the next of row l / 4 of each matrix.
inline void load_matrices(std::uint32_t (&out)[4], std::uint32_t address) {
  host::Warp& warp = my_warp();
  const unsigned lane = threadIdx.x % host::kLanes;
  warp.words[lane][0] = address;
  host::meet(warp.meeting, host::kLanes, [&] {
    for (unsigned l = 0; l < host::kLanes; ++l) {
      for (unsigned i = 0; i < 4; ++i) {
        warp.results[l][i] = load_shared_word(warp.words[i * 8 + l / 4][0] + l % 4 * 4);
      }
    }
  });
  std::copy_n(warp.results[lane], 4, out);
}

// mma.sp.m16n8k32, "Matrix fragments for sparse mma.m16n8k32" of the PTX ISA. With l = 4g + t:
//   A  register 0: row g, elements 2t, 2t + 1; 1: row g + 8; 2, 3: the same, 8 elements further
//   B  register i: rows 8i + 2t and the next, column g
//   D  0, 1: row g, columns 2t, 2t + 1; 2, 3: row g + 8
//   metadata  of lanes 4g + 2 * selector, for elements 0..7, and the next, for 8..15; low half: row
//             g, high half: row g + 8; two bits an element
template <typename T, int kSelector>
void multiply_sparse(float (&d)[4], const uint4& a, const std::uint32_t (&b)[4],
                     std::uint32_t meta) {
  static_assert(std::is_same_v<T, __nv_bfloat16>, "products are in bf16");
  host::Warp& warp = my_warp();
  const unsigned lane = threadIdx.x % host::kLanes;
  const std::uint32_t words[10] = {a.x, a.y, a.z, a.w, b[0], b[1], b[2], b[3], meta};
  std::copy_n(words, 10, warp.words[lane]);
  std::copy_n(d, 4, warp.sums[lane]);
  host::meet(warp.meeting, host::kLanes, [&] {
    const auto half = [](std::uint32_t word, int which) {
      return widen(__nv_bfloat16{static_cast<std::uint16_t>(word >> (16 * which))});
    };
    float dense_a[16][32] = {}, dense_b[32][8];
    for (int row = 0; row < 16; ++row) {
      for (int element = 0; element < 16; ++element) {
        const int from = row % 8 * 4 + element % 8 / 2;
        const int reg = row / 8 + element / 8 * 2;
        const int word_of = row % 8 * 4 + 2 * kSelector + element / 8;
        const int position = warp.words[word_of][8] >> (row / 8 * 16 + element % 8 * 2) & 3;
        dense_a[row][element / 2 * 4 + position] = half(warp.words[from][reg], element % 2);
      }
    }
    for (int row = 0; row < 32; ++row) {
      for (int column = 0; column < 8; ++column) {
        dense_b[row][column] = half(warp.words[column * 4 + row % 8 / 2][4 + row / 8], row % 2);
      }
    }
    for (int l = 0; l < host::kLanes; ++l) {
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        double sum = warp.sums[l][i];
        for (int k = 0; k < 32; ++k) {
          if (dense_a[row][k] != 0 || std::isnan(dense_b[k][column])) {
            sum += static_cast<double>(dense_a[row][k]) * dense_b[k][column];
          }
        }
        warp.sums[l][i] = static_cast<float>(sum);
      }
    }
  });
  std::copy_n(warp.sums[lane], 4, d);
}

inline constexpr bool kCanMoveRegisters = true;
template <int kCount>
void take_registers() {}
template <int kCount>
void give_registers() {}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

}  // namespace ptx
}  // namespace samoyeds
