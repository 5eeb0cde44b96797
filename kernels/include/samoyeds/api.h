// The C interface of the Samoyeds kernel library. It knows nothing of torch or Python: pointers,
// sizes, a stream. Plain C, so that any language can call it; samoyeds_hf/library.py does.
//
// Every function that can fail checks its arguments and returns a SamoyedsStatus, or where it
// returns a size the negative status; samoyeds_last_error() then says, in the calling thread, what
// was required and what was found:
//   SAMOYEDS_INVALID_ARGUMENT  an argument is wrong by itself or beside the others
//   SAMOYEDS_UNSUPPORTED       right arguments that no kernel here serves on this GPU
//   SAMOYEDS_CUDA_ERROR        CUDA refused; errors inside a kernel surface later, on the stream
// Work is queued on the stream given, on the device given (the caller's current device is left as
// it was). No device memory is allocated and nothing waits, so that after samoyeds_prepare() all
// of it can be captured in a CUDA graph. Equal inputs and plans give equal bits.
//
// Symbols: T tokens, K choices a token (top-k), E experts here, m x k a dense weight, of an MLP
// gate_up [E, 2I, H] and down [E, H, I]. A pair is one (token, choice): number t*K + j.
// All device pointers are 16-byte aligned, and all tensors contiguous. A workspace at a multiple of
// 128 is fastest: lines of the L2 begin there.
// Limits, checked: K <= 1024, T*K <= 2^28, E <= 65535, m and k <= 2^20, M <= 16; k and V as the
// format says (k a multiple of 8 and V, V of 4). T = 0 is no error.
#pragma once

#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

#define SAMOYEDS_ABI_VERSION 2

typedef enum {
  SAMOYEDS_OK = 0,
  SAMOYEDS_INVALID_ARGUMENT = 1,
  SAMOYEDS_UNSUPPORTED = 2,
  SAMOYEDS_CUDA_ERROR = 3,
} SamoyedsStatus;

typedef enum { SAMOYEDS_BF16 = 0, SAMOYEDS_FP16 = 1, SAMOYEDS_FP32 = 2 } SamoyedsDtype;

// A dense weight [num_experts, rows, cols] in the library's fragment order.
typedef struct {
  void* packed;  // [num_experts, samoyeds_packed_bytes() / num_experts]; only samoyeds_pack writes
  int64_t num_bytes;    // that packed points to, at least samoyeds_packed_bytes()
  int64_t num_experts;  // E
  int64_t rows;         // m
  int64_t cols;         // k
  int64_t n, m, v;      // the pattern (N, M, V); (1, 1, cols) for plain 2:4
  int64_t dtype;        // SAMOYEDS_BF16 or SAMOYEDS_FP16
  int64_t is_gate_up;   // 1: the first half of the rows is the gate, the other half up
} SamoyedsWeight;

typedef struct {
  const int64_t* top_k_index;  // [T, K]; outside 0..E-1 = belongs to no expert here
  const void* top_k_weights;   // [T, K]; not read where no sum over K is asked for
  int64_t weights_dtype;       // SamoyedsDtype
  int64_t num_tokens;          // T
  int64_t top_k;               // K
} SamoyedsRouting;

// How one product runs. The heuristics fill it; tests and benchmarks may ask for another one.
// Fragments and warps must be those of a compiled kernel (variants.cuh). The Hopper kernel, the one
// with clusters, has 3 stages, 2 where N = M, and 1 split; its 24 fragments of tokens stand for 26
// where N = M, and for 25 in products without routing where V is a multiple of 128 and those end
// sooner. Where V is a multiple of 128 it also comes with 22, of which items take less time.
// General patterns have one kernel, which ignores the plan.
typedef struct {
  int64_t m_frags;        // fragments of 16 kept rows that a warp holds
  int64_t n_frags;        // fragments of 8 tokens that a warp holds
  int64_t warps_m;        // of the 8 warps that multiply: along the rows,
  int64_t warps_n;        //   along the tokens,
  int64_t warps_k;        //   and along k, summed at the end
  int64_t stages;         // 1 to 8 buffers of the pipeline, as shared memory allows
  int64_t blocks_per_sm;  // thread blocks on an SM: 1, or 2 for up to 4 fragments of results a warp
  int64_t splits;   // parts of k that different thread blocks compute, up to one for 128 columns;
                    // 1 but for the down product, whose results are then summed in fp32
  int64_t cluster;  // thread blocks that load tokens for each other: 2 in the Hopper kernel, else 1
} SamoyedsPlan;

typedef struct {
  int64_t device;                 // CUDA ordinal
  void* stream;                   // cudaStream_t; null is the default stream
  void* workspace;                // its contents need not outlive the work queued
  int64_t workspace_bytes;        // at least samoyeds_workspace_bytes() or its like for linear
  const SamoyedsPlan* plan;       // of the first or only product; null: the heuristics choose
  const SamoyedsPlan* down_plan;  // of the down product of samoyeds_moe_mlp, likewise
} SamoyedsLaunch;

int samoyeds_abi_version(void);
// Text of the last error of the calling thread; valid until its next one, "" before the first.
const char* samoyeds_last_error(void);
// What the library was built for, e.g. "sm_80 sm_86 sm_89 sm_90a compute_90", and with which CUDA.
const char* samoyeds_build_info(void);
// The name and version of the fragment order; changes whenever packed bytes change meaning.
const char* samoyeds_layout(void);
// The rules that choose a SamoyedsPlan, each with the measurement behind it, as a table in text.
const char* samoyeds_heuristics(void);

// Loads every kernel onto the device, as the first call of any function that takes a device does.
// Call it once a device before a graph capture. UNSUPPORTED: a GPU older than compute capability
// 8.0; INVALID_ARGUMENT or CUDA_ERROR: no such GPU; CUDA_ERROR: the library was not built for it.
int samoyeds_prepare(int64_t device);

// Bytes of a packed weight of all experts, or a negative status. Reads all members but packed and
// num_bytes; asks no GPU.
int64_t samoyeds_packed_bytes(const SamoyedsWeight* weight);
// Canonical tensors (format.cuh; all experts) to weight->packed, and back, exactly. What they hold
// is not checked: every nibble must be valid, every index below M. Needs no workspace.
int samoyeds_pack(const SamoyedsLaunch* launch, const SamoyedsWeight* weight, const void* values,
                  const uint8_t* meta, const uint8_t* index);
int samoyeds_unpack(const SamoyedsLaunch* launch, const SamoyedsWeight* weight, void* values,
                    uint8_t* meta, uint8_t* index);

// The plan that the heuristics choose for num_tokens tokens; is_down: for the down product. Reads
// of the weight what samoyeds_packed_bytes() does; queues nothing. UNSUPPORTED: a general pattern,
// which has no plan.
int samoyeds_choose_plan(int64_t device, const SamoyedsWeight* weight, int64_t num_tokens,
                         int64_t top_k, int64_t is_down, SamoyedsPlan* plan);

// Bytes of workspace that samoyeds_moe_* needs with these plans and this routing, or a negative
// status. gate_up is null for samoyeds_moe_down, down is null for samoyeds_moe_up. Does not read
// packed, num_bytes or the workspace.
int64_t samoyeds_workspace_bytes(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
                                 const SamoyedsWeight* gate_up, const SamoyedsWeight* down);

// The layers. bf16 or fp16 in and out, of the weights' dtype; sums in fp32.
//
// out [T, H] = sum over K, in order, of weight * down(SiLU(gate) * up). hidden is [T, H]; choices
// without an expert here add nothing. gate_up must have is_gate_up set.
int samoyeds_moe_mlp(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
                     const SamoyedsWeight* gate_up, const SamoyedsWeight* down, const void* hidden,
                     void* out);
// out [T*K, rows]: row t*K + j is expert (t, j)'s product with hidden[t]; zeros without an expert.
int samoyeds_moe_up(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
                    const SamoyedsWeight* weight, const void* hidden, void* out);
// out [T, rows] = sum over K, in order, of weight * product with inner [T*K, cols].
int samoyeds_moe_down(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
                      const SamoyedsWeight* weight, const void* inner, void* out);
// out [num_rows, rows] = x [num_rows, cols] times the only expert's weight; num_rows <= 2^28. The
// workspace may be null where samoyeds_linear_workspace_bytes() is 0.
int64_t samoyeds_linear_workspace_bytes(const SamoyedsLaunch* launch, const SamoyedsWeight* weight,
                                        int64_t num_rows);
int samoyeds_linear(const SamoyedsLaunch* launch, const SamoyedsWeight* weight, const void* x,
                    int64_t num_rows, void* out);

// The routing alone. pairs [T*K]: pair numbers sorted by expert, in order inside one; those without
// an expert are left out. tiles [4 * samoyeds_max_tiles()]: (expert, first place in pairs, tokens,
// first tile of its group << 8 | tiles in it) of each tile of at most tile_tokens tokens, in order
// of experts. num_tiles [1]. num_experts is 1 to 65535; UNSUPPORTED: more than the GPU's shared
// memory can count. Neither reads the weights of the choices, the workspace or the plans.
int64_t samoyeds_max_tiles(const SamoyedsRouting* routing, int64_t num_experts,
                           int64_t tile_tokens);
int samoyeds_route(const SamoyedsLaunch* launch, const SamoyedsRouting* routing,
                   int64_t num_experts, int64_t tile_tokens, int32_t* pairs, int32_t* tiles,
                   int32_t* num_tiles);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#if defined(__cplusplus)
}
#endif
