// Patterns that are neither N == M nor, with V a multiple of 32, (1, 2, V) or (3, 4, V): right for
// every N <= M <= 16 and every V, not fast.
//
// One warp computes one tile of up to 16 kept rows, whole blocks of N, x 8 tokens. Whenever a
// Sub-Row ends, its sums go to the dense rows that the index names, in shared memory. Sub-Rows that
// end inside a matrix instruction are multiplied one at a time, with the other groups' values set
// to zero.
#include "samoyeds/epilogue.cuh"
#include "samoyeds/launch.hpp"

namespace samoyeds {
namespace {

constexpr int kMaxDenseRows = kMaxM * kTileRows;  // of one tile: N = 1, M = 16
constexpr int kMaxGridY = 65535;
static_assert(kMaxDenseRows * kGeneralTokens * sizeof(float) <= 48 * 1024,
              "a tile's sums fit the shared memory that a kernel may declare");

// The registers of a lane's load hold groups t and t + 4 of a step; keep those in [first, last).
__device__ uint4 only_groups(uint4 a, int first, int last) {
  const int group = threadIdx.x % 4;
  if (group < first || group >= last) a.x = a.y = 0;
  if (group + 4 < first || group + 4 >= last) a.z = a.w = 0;
  return a;
}

template <typename T>
struct Tokens8 {
  static_assert(kGeneralTokens == 8, "fragment B has 8 tokens");
  const T* row;  // of x, of this lane's token; null where there is none

  // Fragment B of a step: columns 2t, 2t + 1 and the same 8, 16, 24 further.
  __device__ void load(std::uint32_t (&b)[4], int col, int cols) const {
    for (int i = 0; i < 4; ++i) {
      const int c = col + i * 8 + threadIdx.x % 4 * 2;
      b[i] = row && c < cols ? __ldg(reinterpret_cast<const std::uint32_t*>(row + c)) : 0;
    }
  }
};

// Adds the sums of a finished Sub-Row to the dense rows they belong to.
__device__ void flush(float (&d)[4], float* dense, const Layout& l, const std::uint8_t* expert,
                      int tile, int sub_row) {
  const int lane = threadIdx.x;
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * kHalfTile;
    if (kept_row_of(l, tile, row) >= 0) {
      // A damaged index must stay inside the tile.
      const int index =
          min(static_cast<int>(expert[index_byte_offset(l, tile, sub_row, row)]), l.pattern.m - 1);
      float* to = dense + dense_row(l.pattern, row, index) * kGeneralTokens + lane % 4 * 2;
      to[0] += d[half * 2];
      to[1] += d[half * 2 + 1];
    }
    d[half * 2] = d[half * 2 + 1] = 0.f;
  }
  __syncwarp();  // the next Sub-Row may add to the same dense row from another lane
}

template <typename T>
__global__ void __launch_bounds__(kWarpThreads) general_kernel(const __grid_constant__ SsmmArgs a) {
  __shared__ float dense[kMaxDenseRows * kGeneralTokens];
  const Layout& l = a.layout;
  const int tile_m = blockIdx.z * gridDim.y + blockIdx.y, lane = threadIdx.x;
  if (tile_m >= l.tiles) return;
  Tile tile;
  if (a.tokens.tiles) {
    if (static_cast<int>(blockIdx.x) >= *a.tokens.num_tiles) return;
    tile = a.tokens.tiles[blockIdx.x];
  } else {
    const int first = blockIdx.x * kGeneralTokens;
    tile = {0, first, min(kGeneralTokens, a.tokens.num_rows - first), 0};
  }
  const int dense_rows = l.rows_per_tile / l.pattern.n * l.pattern.m;
  for (int i = lane; i < dense_rows * kGeneralTokens; i += kWarpThreads) dense[i] = 0.f;
  __syncwarp();
  const auto pair_of = [&](int token) {
    return a.tokens.pairs ? a.tokens.pairs[tile.first + token] : tile.first + token;
  };
  Tokens8<T> tokens{nullptr};
  if (lane / 4 < tile.count) {
    const std::int64_t row = pair_of(lane / 4) / a.tokens.pairs_per_row;
    tokens.row = static_cast<const T*>(a.x) + row * l.cols;
  }

  const std::uint8_t* expert = a.packed + tile.expert * l.expert_bytes;
  float d[4] = {};
  for (int block = 0; block < l.blocks; ++block) {
    const std::uint8_t* weights = expert + block_offset(l, tile_m, block);
#pragma unroll
    for (int step = 0; step < kStepsPerBlock; ++step) {
      const int start = block * kBlockCols + step * kStepCols;
      if (start >= l.cols) break;
      const auto word = [&](int offset) {
        return *reinterpret_cast<const std::uint32_t*>(weights + offset + lane * 4);
      };
      const uint4 values = {word(matrix_offset(step, 0)), word(matrix_offset(step, 1)),
                            word(matrix_offset(step, 2)), word(matrix_offset(step, 3))};
      const std::uint32_t meta = word(meta_pair_offset(step / 2));
      std::uint32_t b[4];
      tokens.load(b, start, l.cols);
      const int end = min(start + kStepCols, l.cols);
      for (int col = start; col < end;) {
        const int sub_row = col / l.pattern.v;
        const int stop = min((sub_row + 1) * l.pattern.v, end);
        const uint4 part = only_groups(values, (col - start) / kGroup, (stop - start) / kGroup);
        if (step % 2 == 0) {
          ptx::multiply_sparse<T, 0>(d, part, b, meta);
        } else {
          ptx::multiply_sparse<T, 1>(d, part, b, meta);
        }
        if (stop % l.pattern.v == 0) flush(d, dense, l, expert, tile_m, sub_row);
        col = stop;
      }
    }
  }

  const int first_row = tile_m * (l.rows_per_tile / l.pattern.n) * l.pattern.m;
  for (int i = lane; i < dense_rows * kGeneralTokens; i += kWarpThreads) {
    const int token = i / dense_rows, row = i % dense_rows;
    if (token >= tile.count || first_row + row >= l.rows) continue;
    const float value = dense[row * kGeneralTokens + token];
    const std::int64_t place = static_cast<std::int64_t>(pair_of(token)) * l.rows + first_row + row;
    if (a.output == Output::kRows) {
      static_cast<T*>(a.out)[place] = narrow<T>(value);
    } else {
      static_cast<float*>(a.out)[place] = value;
    }
  }
}

}  // namespace

std::vector<const void*> general_kernels() {
  return {reinterpret_cast<const void*>(&general_kernel<__nv_bfloat16>),
          reinterpret_cast<const void*>(&general_kernel<__half>)};
}

Error general(const Stream& stream, SamoyedsDtype dtype, const SsmmArgs& args,
              std::int64_t max_tiles) {
  // More tiles of rows than kMaxGridY, which 2^20 rows may need, go on along z.
  const int depth = ceil_div(args.layout.tiles, kMaxGridY);
  const dim3 grid(static_cast<unsigned>(max_tiles), ceil_div(args.layout.tiles, depth), depth);
  return dtype == SAMOYEDS_BF16
             ? launch(stream, general_kernel<__nv_bfloat16>, grid, kWarpThreads, 0, args)
             : launch(stream, general_kernel<__half>, grid, kWarpThreads, 0, args);
}

}  // namespace samoyeds
