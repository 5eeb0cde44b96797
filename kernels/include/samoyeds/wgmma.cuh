// What only the Hopper kernel uses: its sparse matrix instruction, and clusters of thread blocks.
//
// wgmma.mma_async.sp: four warps, a warpgroup, multiply 64 kept rows by up to 256 tokens while
// their threads go on (PTX ISA, "wgmma.mma_async.sp").
#pragma once

#include "samoyeds/args.cuh"
#include "samoyeds/ptx.cuh"

namespace samoyeds::ptx {

// Global to shared memory, to the same place in all thread blocks of a cluster, each of whose own
// barrier is told; else as copy_bulk.
template <int kCluster>
__device__ __forceinline__ void copy_bulk_to_cluster(std::uint32_t to, const void* from,
                                                     int num_bytes, std::uint32_t barrier) {
  constexpr std::uint16_t kAll = (1 << kCluster) - 1;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(num_bytes), "r"(barrier), "h"(kAll)
      : "memory");
}

// Arrives at the barrier at the same place in a thread block of the cluster.
// NOTE: with .release.cluster spelled out this would compile to a full memory barrier.
__device__ __forceinline__ void arrive_at(std::uint32_t barrier, int rank) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// A word to the same place in a thread block of the cluster, whose own barrier is told of 4 bytes.
__device__ __forceinline__ void send_word(std::uint32_t to, std::uint32_t word,
                                          std::uint32_t barrier, int rank) {
  asm volatile(
      "{ .reg .b32 there, told; mapa.shared::cluster.u32 there, %0, %3; "
      "mapa.shared::cluster.u32 told, %2, %3; "
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [there], %1, [told]; }" ::"r"(to),
      "r"(word), "r"(barrier), "r"(rank)
      : "memory");
}

// Shared to global memory, 16-byte aligned, a multiple of 16 bytes; after make_visible_to_copies().
__device__ __forceinline__ void store_bulk(void* to, std::uint32_t from, int num_bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(num_bytes)
               : "memory");
}
// A box of a matrix, whose first element is at `row` and `column`; what lies beyond the matrix is
// left out. `matrix`: in the kernel's parameters.
__device__ __forceinline__ void store_box(const TensorMap& matrix, int row, int column,
                                          std::uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&matrix),
      "r"(column), "r"(row), "r"(from)
      : "memory");
}
// Ahead of the first of them.
__device__ __forceinline__ void prefetch_map(const TensorMap& matrix) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&matrix) : "memory");
}
__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until all of this thread's groups of stores but kPending have read their shared memory.
template <int kPending>
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// What this thread has written to shared memory, for bulk copies that start later.
__device__ __forceinline__ void make_visible_to_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// All threads of a cluster; barriers that one has initialised are then known to the others.
__device__ __forceinline__ void sync_cluster() {
  asm volatile(
      "fence.mbarrier_init.release.cluster; barrier.cluster.arrive.aligned; "
      "barrier.cluster.wait.aligned;" ::
          : "memory");
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWgmma = true;

// Before the first instruction, and whenever registers that it reads or writes have changed.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Makes one group of the instructions since the last such call.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending groups are not done: what the others read may change again.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Until all are done, and the first kCount sums may be read.
template <int kCount, int kSize>
__device__ __forceinline__ void wgmma_wait_for(float (&d)[kSize]) {
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// clang-format off: lists of registers
#define SAMOYEDS_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SAMOYEDS_D16 SAMOYEDS_D8 ", " "%8, %9, %10, %11, %12, %13, %14, %15"
#define SAMOYEDS_D24 SAMOYEDS_D16 ", " "%16, %17, %18, %19, %20, %21, %22, %23"
#define SAMOYEDS_D32 SAMOYEDS_D24 ", " "%24, %25, %26, %27, %28, %29, %30, %31"
#define SAMOYEDS_D40 SAMOYEDS_D32 ", " "%32, %33, %34, %35, %36, %37, %38, %39"
#define SAMOYEDS_D48 SAMOYEDS_D40 ", " "%40, %41, %42, %43, %44, %45, %46, %47"
#define SAMOYEDS_D56 SAMOYEDS_D48 ", " "%48, %49, %50, %51, %52, %53, %54, %55"
#define SAMOYEDS_D64 SAMOYEDS_D56 ", " "%56, %57, %58, %59, %60, %61, %62, %63"
#define SAMOYEDS_D72 SAMOYEDS_D64 ", " "%64, %65, %66, %67, %68, %69, %70, %71"
#define SAMOYEDS_D80 SAMOYEDS_D72 ", " "%72, %73, %74, %75, %76, %77, %78, %79"
#define SAMOYEDS_D88 SAMOYEDS_D80 ", " "%80, %81, %82, %83, %84, %85, %86, %87"
#define SAMOYEDS_D96 SAMOYEDS_D88 ", " "%88, %89, %90, %91, %92, %93, %94, %95"
#define SAMOYEDS_D100 SAMOYEDS_D96 ", " "%96, %97, %98, %99"
#define SAMOYEDS_D104 SAMOYEDS_D96 ", " "%96, %97, %98, %99, %100, %101, %102, %103"
#define SAMOYEDS_OUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SAMOYEDS_OUT8(i) SAMOYEDS_OUT4(i), SAMOYEDS_OUT4(i + 4)
#define SAMOYEDS_ALL8 SAMOYEDS_OUT8(0)
#define SAMOYEDS_ALL16 SAMOYEDS_ALL8, SAMOYEDS_OUT8(8)
#define SAMOYEDS_ALL24 SAMOYEDS_ALL16, SAMOYEDS_OUT8(16)
#define SAMOYEDS_ALL32 SAMOYEDS_ALL24, SAMOYEDS_OUT8(24)
#define SAMOYEDS_ALL40 SAMOYEDS_ALL32, SAMOYEDS_OUT8(32)
#define SAMOYEDS_ALL48 SAMOYEDS_ALL40, SAMOYEDS_OUT8(40)
#define SAMOYEDS_ALL56 SAMOYEDS_ALL48, SAMOYEDS_OUT8(48)
#define SAMOYEDS_ALL64 SAMOYEDS_ALL56, SAMOYEDS_OUT8(56)
#define SAMOYEDS_ALL72 SAMOYEDS_ALL64, SAMOYEDS_OUT8(64)
#define SAMOYEDS_ALL80 SAMOYEDS_ALL72, SAMOYEDS_OUT8(72)
#define SAMOYEDS_ALL88 SAMOYEDS_ALL80, SAMOYEDS_OUT8(80)
#define SAMOYEDS_ALL96 SAMOYEDS_ALL88, SAMOYEDS_OUT8(88)
#define SAMOYEDS_ALL100 SAMOYEDS_ALL96, SAMOYEDS_OUT4(96)
#define SAMOYEDS_ALL104 SAMOYEDS_ALL96, SAMOYEDS_OUT8(96)
// size: accumulators of a thread, half the tokens; a, rest, flag: the operands after them by number.
// The last of the ones and zeros: operands that are not transposed, those in shared memory.
#define SAMOYEDS_WGMMA(tokens, size, dtype, a, rest, flag, plain, ...) \
  if constexpr (kTokens == tokens) { \
    asm volatile("{ .reg .pred accumulate; setp.ne.u32 accumulate, " flag ", 0; " \
                 "wgmma.mma_async.sp.sync.aligned.m64n" #tokens "k32.f32." dtype "." dtype \
                 " {" SAMOYEDS_D##size "}, " a ", " rest ", accumulate, 1, 1, " plain "; }" \
                 : SAMOYEDS_ALL##size \
                 : __VA_ARGS__, "l"(b), "r"(meta), "n"(kSelector), "r"(static_cast<int>(adds)) \
                 : "memory"); \
  }
#define SAMOYEDS_WGMMA_REGISTERS(tokens, size, dtype, a0, a1, a2, a3, b, meta, selector, flag) \
  SAMOYEDS_WGMMA(tokens, size, dtype, "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}", \
                 "%" #b ", %" #meta ", %" #selector, "%" #flag, "0", \
                 "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w))
#define SAMOYEDS_WGMMA_SHARED(tokens, size, dtype, a0, b, meta, selector, flag, ...) \
  SAMOYEDS_WGMMA(tokens, size, dtype, "%" #a0, "%" #b ", %" #meta ", %" #selector, "%" #flag, \
                 "0, 0", "l"(a))
// The operands behind the sums, by number.
#define SAMOYEDS_WGMMA_OF(do, dtype) \
  do(16, 8, dtype, 8, 9, 10, 11, 12, 13, 14, 15) \
  do(32, 16, dtype, 16, 17, 18, 19, 20, 21, 22, 23) \
  do(48, 24, dtype, 24, 25, 26, 27, 28, 29, 30, 31) \
  do(64, 32, dtype, 32, 33, 34, 35, 36, 37, 38, 39) \
  do(80, 40, dtype, 40, 41, 42, 43, 44, 45, 46, 47) \
  do(96, 48, dtype, 48, 49, 50, 51, 52, 53, 54, 55) \
  do(112, 56, dtype, 56, 57, 58, 59, 60, 61, 62, 63) \
  do(128, 64, dtype, 64, 65, 66, 67, 68, 69, 70, 71) \
  do(144, 72, dtype, 72, 73, 74, 75, 76, 77, 78, 79) \
  do(160, 80, dtype, 80, 81, 82, 83, 84, 85, 86, 87) \
  do(176, 88, dtype, 88, 89, 90, 91, 92, 93, 94, 95) \
  do(192, 96, dtype, 96, 97, 98, 99, 100, 101, 102, 103) \
  do(200, 100, dtype, 100, 101, 102, 103, 104, 105, 106, 107) \
  do(208, 104, dtype, 104, 105, 106, 107, 108, 109, 110, 111)
// clang-format on

// d += A * B, or d = A * B, without waiting: A is 64x32 with 2 of every 4 kept, as a warp's 16 rows
// in registers, an uint4 as for mma.sp, or in shared memory, a plain_descriptor(); B is 32 x
// kTokens in shared memory. d[4j + i]: as an m16n8 fragment of tokens 8j on. Neither d nor what A
// is may be touched before its group is waited for.
template <typename T, int kTokens, int kSelector, int kSize, typename A>
__device__ __forceinline__ void multiply_sparse_async(float (&d)[kSize], const A& a,
                                                      std::uint64_t b, std::uint32_t meta,
                                                      bool adds) {
  static_assert((kTokens % 16 == 0 || kTokens == 200) && kTokens > 0 && kTokens <= 208,
                "the sizes above");
  static_assert(2 * kSize >= kTokens, "an accumulator for each row and token");
  constexpr bool kIsBf16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (std::is_same_v<A, uint4>) {
    if constexpr (kIsBf16) {
      SAMOYEDS_WGMMA_OF(SAMOYEDS_WGMMA_REGISTERS, "bf16")
    } else {
      SAMOYEDS_WGMMA_OF(SAMOYEDS_WGMMA_REGISTERS, "f16")
    }
  } else {
    static_assert(std::is_same_v<A, std::uint64_t>, "registers or a descriptor");
    if constexpr (kIsBf16) {
      SAMOYEDS_WGMMA_OF(SAMOYEDS_WGMMA_SHARED, "bf16")
    } else {
      SAMOYEDS_WGMMA_OF(SAMOYEDS_WGMMA_SHARED, "f16")
    }
  }
}
#else
inline constexpr bool kHasWgmma = false;
__device__ __forceinline__ void wgmma_fence() {}
__device__ __forceinline__ void wgmma_commit() {}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {}
template <int kCount, int kSize>
__device__ __forceinline__ void wgmma_wait_for(float (&)[kSize]) {}
template <typename T, int kTokens, int kSelector, int kSize, typename A>
__device__ __forceinline__ void multiply_sparse_async(float (&)[kSize], const A&, std::uint64_t,
                                                      std::uint32_t, bool) {}
#endif

// Operand B at an address in shared memory that is a multiple of 1024, and `offset` bytes beyond:
// rows of 128 bytes, 128-byte swizzle, 8 rows a repeat (PTX ISA, "Matrix descriptor format").
__device__ __forceinline__ std::uint64_t matrix_descriptor(std::uint32_t address,
                                                           std::uint32_t offset) {
  constexpr std::uint32_t kRepeatBytes = 1024, kSwizzle128 = 1u << 30;
  const std::uint32_t low = (address / 16 | 1u << 16) + offset / 16;
  return static_cast<std::uint64_t>(kSwizzle128 | kRepeatBytes / 16) << 32 | low;
}

// Operand A at an address in shared memory, without swizzle: matrices of 8 rows x 16 bytes, from
// one to the next along k `column_bytes`, along m `row_bytes`.
__device__ __forceinline__ std::uint64_t plain_descriptor(std::uint32_t address, int column_bytes,
                                                          int row_bytes) {
  // NOTE: in a cluster, bits from 24 on are the number of the thread block: they would change
  // column_bytes.
  constexpr std::uint32_t kAddressBits = (1u << 18) - 1;
  const std::uint32_t low =
      (address & kAddressBits) / 16 | static_cast<std::uint32_t>(column_bytes) / 16 << 16;
  return static_cast<std::uint64_t>(row_bytes / 16) << 32 | low;
}

}  // namespace samoyeds::ptx
