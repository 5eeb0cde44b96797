// Global to shared memory, by warps of their own: in those that multiply, the tensor cores would
// wait for every address.
//
// One stage of the pipeline holds, for each of kWarpsK parts of k, a block (128 columns) of every
// weight tile and of every token.
//
//   stage   weights  [kWarpsK][kTilesM][2320 B]   fragment order, as packed
//           tokens   [kWarpsK][kTokens][272 B]    128 columns of a row of x, and 16 bytes more, so
//                                                 that ldmatrix reads 8 rows without bank conflicts
#pragma once

#include "samoyeds/ptx.cuh"
#include "samoyeds/scheduler.cuh"

namespace samoyeds {

inline constexpr int kBlockStride = kRowsOffset + kRowsBytes;  // also without the row bits
inline constexpr int kTokenBytes = kBlockCols * 2;
inline constexpr int kTokenStride = kTokenBytes + 16;
inline constexpr int kMaxStages = 8;
static_assert(kBlockStride == 2320 && kTokenStride == 272, "the drawing above");

// The buffers of a thread block, and who may use one: `full` completes when its copies are there,
// `empty` when every warp that multiplies is done with it.
template <class Shape>
struct Stages {
  static constexpr int kBytes =
      Shape::kTilesPerStage * kBlockStride + Shape::kWarpsK * Shape::kTokens * kTokenStride;

  std::uint32_t buffers;   // shared memory [count][kBytes]
  std::uint32_t barriers;  // [2][kMaxStages]
  int count;

  __device__ std::uint32_t weights(int slot) const { return buffers + slot * kBytes; }
  __device__ std::uint32_t tokens(int slot) const {
    return weights(slot) + Shape::kTilesPerStage * kBlockStride;
  }
  __device__ std::uint32_t full(int slot) const { return barriers + slot * 8; }
  __device__ std::uint32_t empty(int slot) const { return barriers + (kMaxStages + slot) * 8; }

  // By one thread, before the block's first __syncthreads().
  __device__ void init() const {
    for (int slot = 0; slot < count; ++slot) {
      ptx::init_barrier(full(slot), Shape::kLoaders + (ptx::kHasBulkCopies ? 1 : 0));
      ptx::init_barrier(empty(slot), kConsumers);
    }
  }
};

// A place in the ring of stages, and the parity of its present phase.
struct Turn {
  int slot = 0;
  std::uint32_t parity = 0;

  __device__ void advance(int count) {
    if (++slot == count) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <class Shape>
class Loader {
  using T = typename Shape::T;
  static constexpr int kTokens = Shape::kTokens, kParts = Shape::kWarpsK;
  static constexpr int kChunkBytes = 16;
  static constexpr int kChunks = kTokenBytes / kChunkBytes;      // of a row of x in a block
  static constexpr int kRowsAtOnce = Shape::kLoaders / kChunks;  // neighbours copy one row
  static constexpr int kPasses = kTokens / kRowsAtOnce;
  static constexpr int kAtOnce = kPasses % 4 == 0 ? 4 : 3;  // addresses read before the first copy
  static_assert(sizeof(T) == 2, "a row of x has two bytes an element, as kTokenBytes says");
  static_assert(Shape::kLoaders % kChunks == 0, "whole rows at once");
  static_assert(kTokens % (kRowsAtOnce * kAtOnce) == 0, "rows come in whole passes");
  // Where each expert has a tile or two, nobody else soon reads the same weights.
  static constexpr bool kIsOnce = !Shape::kMovesRegisters || Shape::kIsTall;
  static constexpr int kBarrier = 2;  // of the loading warps; 0 and 1 are taken

 public:
  // `rows` is shared memory [kTokens].
  __device__ Loader(const SsmmArgs& args, const Stages<Shape>& stages, const T** rows)
      : args_(args),
        stages_(stages),
        rows_(rows),
        thread_(threadIdx.x - kConsumers),
        chunk_(thread_ % kChunks * kChunkBytes) {}

  __device__ int num_steps() const { return ceil_div(block_end_ - block_begin_, kParts); }

  // Does not touch x.
  __device__ void begin(const Work& work) {
    const Layout& layout = args_.layout;
    const Tokens& tokens = args_.tokens;
    block_begin_ = work.block_begin;
    block_end_ = work.block_end;
    num_tiles_ = min(Shape::kTilesM, layout.tiles - work.first_tile_m);
    num_tokens_ = work.tile.count;
    weights_ = args_.packed + work.tile.expert * layout.expert_bytes;
    first_tile_ = work.first_tile_m;
    if constexpr (ptx::kHasBulkCopies) {
      weights_ += block_offset(layout, first_tile_ + tile(), block_begin_ + part());
      stride_ = block_stride(layout, first_tile_ + tile());
    }
    ptx::sync_some(kBarrier, Shape::kLoaders);  // the rows of the item before are no longer needed
    for (int r = thread_; r < kTokens; r += Shape::kLoaders) {
      // Places without a token are not copied: what lies in their buffers meets only columns of the
      // result that nobody stores.
      int row = 0;
      if (r < num_tokens_) {
        const int place = work.tile.first + r;
        row = tokens.pairs ? __ldg(tokens.pairs + place) / tokens.pairs_per_row : place;
      }
      rows_[r] = static_cast<const T*>(args_.x) + static_cast<std::int64_t>(row) * layout.cols;
    }
    ptx::sync_some(kBarrier, Shape::kLoaders);
  }

  // Starts the weights of a step; the tokens of the same step must follow.
  __device__ void load_weights(int step, int slot) const {
    const int parts = min(kParts, block_end_ - block_begin_ - step * kParts);
    const int block_bytes = args_.layout.block_bytes;
    const std::uint32_t to = stages_.weights(slot);
    if constexpr (ptx::kHasBulkCopies) {
      // A thread copies one block.
      if (thread_ == 0) {
        ptx::arrive_expecting(stages_.full(slot), parts * num_tiles_ * block_bytes);
      }
      __syncwarp();
      if (thread_ < Shape::kTilesPerStage && part() < parts && tile() < num_tiles_) {
        ptx::copy_bulk<kIsOnce>(to + thread_ * kBlockStride, weights_ + step * kParts * stride_,
                                block_bytes, stages_.full(slot));
      }
    } else {
      for (int i = 0; i < Shape::kTilesPerStage; ++i) {
        const int part = i / Shape::kTilesM, tile = i % Shape::kTilesM;
        if (part >= parts || tile >= num_tiles_) continue;
        const std::uint8_t* from = weights_ + block_offset(args_.layout, first_tile_ + tile,
                                                           block_begin_ + step * kParts + part);
        for (int byte = thread_ * kChunkBytes; byte < block_bytes;
             byte += Shape::kLoaders * kChunkBytes) {
          ptx::copy_async(to + i * kBlockStride + byte, from + byte);
        }
      }
    }
  }

  __device__ void load_tokens(int step, int slot) const {
    const int first = block_begin_ + step * kParts, parts = min(kParts, block_end_ - first);
    const int first_row = thread_ / kChunks;
    for (int part = 0; part < parts; ++part) {
      const int col = (first + part) * kBlockCols + chunk_ / static_cast<int>(sizeof(T));
      const std::uint32_t to =
          stages_.tokens(slot) + (part * kTokens + first_row) * kTokenStride + chunk_;
      // Weights beyond k are zero, but 0 * NaN is not: the tokens' columns there must be zero too.
      const bool is_real = col < args_.layout.cols;
#pragma unroll 1  // more addresses at once than kAtOnce would cost registers
      for (int pass = 0; pass < kPasses; pass += kAtOnce) {
        if (pass * kRowsAtOnce >= num_tokens_) break;
        const T* from[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) from[i] = rows_[first_row + (pass + i) * kRowsAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first_row + (pass + i) * kRowsAtOnce >= num_tokens_) continue;
          ptx::copy_async_or_zero(to + (pass + i) * kRowsAtOnce * kTokenStride,
                                  from[i] + (is_real ? col : 0), is_real);
        }
      }
    }
    ptx::arrive_after_copies(stages_.full(slot));
  }

 private:
  // Of the thread's own block, where a thread copies one.
  static_assert(Shape::kTilesPerStage <= kWarpThreads, "a warp copies a stage's weights at once");
  __device__ int tile() const { return thread_ % Shape::kTilesM; }
  __device__ int part() const { return thread_ / Shape::kTilesM; }

  const SsmmArgs& args_;
  const Stages<Shape>& stages_;
  const T** rows_;  // of x, of the item's tokens
  int thread_, chunk_;
  int block_begin_ = 0, block_end_ = 0;
  int num_tiles_ = 0, num_tokens_ = 0;
  int first_tile_ = 0;
  const std::uint8_t* weights_ = nullptr;  // of the expert; for bulk copies, the thread's own block
  int stride_ = 0;                         // for bulk copies: to the tile's next block
};

}  // namespace samoyeds
