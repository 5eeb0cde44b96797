// Canonical tensors to fragment order and back: a permutation, so exact both ways.
#include "samoyeds/launch.hpp"

namespace samoyeds {
namespace {

constexpr int kValuesPerStep = kStepCols / 2;

// Where one lane of one block finds what it holds.
struct Place {
  int tile, block, lane;
  std::int64_t expert;
};

struct Canonical {
  std::int64_t values_row, meta_row, index_row;  // elements of a kept row
};

__device__ Canonical canonical(const Layout& l) {
  return {values_per_row(l.cols), meta_bytes_per_row(l.cols), index_per_row(l.pattern, l.cols)};
}

// A warp takes a block; consecutive warps take consecutive ones.
__device__ bool find_place(const Layout& l, int num_experts, Place& place) {
  const std::int64_t number =
      (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpThreads;
  const std::int64_t per_expert = static_cast<std::int64_t>(l.tiles) * l.blocks;
  place.expert = number / per_expert;
  place.tile = static_cast<int>(number % per_expert / l.blocks);
  place.block = static_cast<int>(number % l.blocks);
  place.lane = threadIdx.x % kWarpThreads;
  return place.expert < num_experts;
}

// Row of a tile and first compressed column of a block that register `reg` of a step holds.
__device__ int row_of(int lane, int reg) { return lane / 4 + reg % 2 * kHalfTile; }
__device__ int column_of(int lane, int step, int reg) {
  return step * kValuesPerStep + lane % 4 * 2 + reg / 2 * 8;
}
// First of the four groups whose nibbles metadata word `word` of a lane holds: those of row lane/4
// in its low half, those of the row 8 further in its high half.
__device__ int group_of(int lane, int word) { return (word * 2 + lane % 4 / 2) * 8 + lane % 2 * 4; }

__global__ void pack_kernel(Layout l, int num_experts, std::uint8_t* packed,
                            const std::uint16_t* values, const Meta* meta, const Index* index) {
  Place p;
  if (!find_place(l, num_experts, p)) return;
  const Canonical c = canonical(l);
  std::uint8_t* block = packed + p.expert * l.expert_bytes + block_offset(l, p.tile, p.block);
  const std::int64_t first_row = p.expert * l.kept;
  const int first_value = p.block * kBlockCols / 2;
  for (int step = 0; step < kStepsPerBlock; ++step) {
    for (int reg = 0; reg < 4; ++reg) {
      const int kept = kept_row_of(l, p.tile, row_of(p.lane, reg));
      const int column = first_value + column_of(p.lane, step, reg);
      std::uint32_t two = 0;
      if (kept >= 0 && column < c.values_row) {
        const std::uint16_t* from = values + (first_row + kept) * c.values_row + column;
        two = from[0] | static_cast<std::uint32_t>(from[1]) << 16;
      }
      *reinterpret_cast<std::uint32_t*>(block + matrix_offset(step, reg) + p.lane * 4) = two;
    }
  }
  const std::uint32_t unused = encode_nibble(0, 1) * 0x1111u;  // a valid nibble, four times
  for (int word = 0; word < kStepsPerBlock / 2; ++word) {
    std::uint32_t bits = 0;
    for (int half = 0; half < 2; ++half) {
      const int kept = kept_row_of(l, p.tile, p.lane / 4 + half * kHalfTile);
      const int first = p.block * kBlockCols / 8 + group_of(p.lane, word) / 2;
      for (int byte = 0; byte < 2; ++byte) {
        const bool exists = kept >= 0 && first + byte < c.meta_row;
        const std::uint32_t two =
            exists ? meta[(first_row + kept) * c.meta_row + first + byte] : unused & 0xffu;
        bits |= two << (half * 16 + byte * 8);
      }
    }
    *reinterpret_cast<std::uint32_t*>(block + meta_pair_offset(word) + p.lane * 4) = bits;
  }
  if (switches_rows(l) && p.lane < kStepsPerBlock) {
    const int column = min(p.block * kBlockCols + p.lane * kStepCols, l.cols - 1);
    std::uint32_t bits = 0;
    for (int row = 0; row < kTileRows; ++row) {
      const int kept = kept_row_of(l, p.tile, row);
      if (kept < 0) continue;
      const Index found = index[(first_row + kept) * c.index_row + column / l.pattern.v];
      bits |= static_cast<std::uint32_t>(found == switched_index(l, kept, 1)) << row;
    }
    *reinterpret_cast<std::uint32_t*>(block + kRowsOffset + p.lane * 4) = bits;
  }
}

// kPack: the index bytes of general patterns into their region. Else back to the canonical index,
// for every kind: general ones copied, the others from the row bits or the place in the block.
template <bool kPack>
__global__ void index_kernel(Layout l, std::uint8_t* packed, Index* index) {
  const int sub_rows = index_per_row(l.pattern, l.cols);
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t expert = blockIdx.y, total = static_cast<std::int64_t>(l.tiles) * sub_rows;
  if (number >= total * kTileRows) return;
  const int row = static_cast<int>(number % kTileRows);
  const int sub_row = static_cast<int>(number / kTileRows % sub_rows);
  const int tile = static_cast<int>(number / kTileRows / sub_rows);
  std::uint8_t* base = packed + expert * l.expert_bytes;
  const int kept = kept_row_of(l, tile, row);
  const std::int64_t place = kept < 0 ? 0 : (expert * l.kept + kept) * sub_rows + sub_row;
  if (kPack) {
    base[index_byte_offset(l, tile, sub_row, row)] = kept < 0 ? 0 : index[place];
    return;
  }
  if (kept < 0) return;
  if (l.kind == Kind::kGeneral) {
    index[place] = base[index_byte_offset(l, tile, sub_row, row)];
  } else if (l.kind == Kind::kDense24) {
    index[place] = static_cast<Index>(kept % l.pattern.m);
  } else {
    const int column = sub_row * l.pattern.v;
    const std::uint8_t* words = base + block_offset(l, tile, column / kBlockCols) + kRowsOffset;
    const std::uint32_t word =
        *reinterpret_cast<const std::uint32_t*>(words + column % kBlockCols / kStepCols * 4);
    index[place] = static_cast<Index>(switched_index(l, kept, word >> row & 1));
  }
}

__global__ void unpack_kernel(Layout l, int num_experts, const std::uint8_t* packed,
                              std::uint16_t* values, Meta* meta) {
  Place p;
  if (!find_place(l, num_experts, p)) return;
  const Canonical c = canonical(l);
  const std::uint8_t* block = packed + p.expert * l.expert_bytes + block_offset(l, p.tile, p.block);
  const std::int64_t first_row = p.expert * l.kept;
  const int first_value = p.block * kBlockCols / 2;
  for (int step = 0; step < kStepsPerBlock; ++step) {
    for (int reg = 0; reg < 4; ++reg) {
      const int kept = kept_row_of(l, p.tile, row_of(p.lane, reg));
      const int column = first_value + column_of(p.lane, step, reg);
      if (kept < 0 || column >= c.values_row) continue;
      const std::uint32_t two =
          *reinterpret_cast<const std::uint32_t*>(block + matrix_offset(step, reg) + p.lane * 4);
      std::uint16_t* to = values + (first_row + kept) * c.values_row + column;
      to[0] = static_cast<std::uint16_t>(two);
      to[1] = static_cast<std::uint16_t>(two >> 16);
    }
  }
  for (int word = 0; word < kStepsPerBlock / 2; ++word) {
    const std::uint32_t bits =
        *reinterpret_cast<const std::uint32_t*>(block + meta_pair_offset(word) + p.lane * 4);
    for (int half = 0; half < 2; ++half) {
      const int kept = kept_row_of(l, p.tile, p.lane / 4 + half * kHalfTile);
      const int first = p.block * kBlockCols / 8 + group_of(p.lane, word) / 2;
      for (int byte = 0; byte < 2; ++byte) {
        if (kept < 0 || first + byte >= c.meta_row) continue;
        meta[(first_row + kept) * c.meta_row + first + byte] =
            static_cast<Meta>(bits >> (half * 16 + byte * 8));
      }
    }
  }
}

constexpr int kPackThreads = 256;

dim3 lane_grid(const Layout& l, int num_experts) {
  const std::int64_t lanes =
      static_cast<std::int64_t>(num_experts) * l.tiles * l.blocks * kWarpThreads;
  return dim3(static_cast<unsigned>((lanes + kPackThreads - 1) / kPackThreads));
}

dim3 index_grid(const Layout& l, int num_experts) {
  const std::int64_t bytes =
      static_cast<std::int64_t>(l.tiles) * index_per_row(l.pattern, l.cols) * kTileRows;
  return dim3(static_cast<unsigned>((bytes + kPackThreads - 1) / kPackThreads), num_experts);
}

}  // namespace

std::vector<const void*> pack_kernels() {
  return {reinterpret_cast<const void*>(&pack_kernel),
          reinterpret_cast<const void*>(&unpack_kernel),
          reinterpret_cast<const void*>(&index_kernel<true>),
          reinterpret_cast<const void*>(&index_kernel<false>)};
}

Error pack(const Stream& stream, const Layout& layout, int num_experts, std::uint8_t* packed,
           const void* values, const Meta* meta, const Index* index) {
  if (num_experts == 0 || layout.tiles == 0 || layout.cols == 0) return {};
  if (Error e =
          launch(stream, pack_kernel, lane_grid(layout, num_experts), kPackThreads, 0, layout,
                 num_experts, packed, static_cast<const std::uint16_t*>(values), meta, index)) {
    return e;
  }
  if (layout.kind != Kind::kGeneral) return {};
  return launch(stream, index_kernel<true>, index_grid(layout, num_experts), kPackThreads, 0,
                layout, packed, const_cast<Index*>(index));
}

Error unpack(const Stream& stream, const Layout& layout, int num_experts,
             const std::uint8_t* packed, void* values, Meta* meta, Index* index) {
  if (num_experts == 0 || layout.tiles == 0 || layout.cols == 0) return {};
  if (Error e = launch(stream, unpack_kernel, lane_grid(layout, num_experts), kPackThreads, 0,
                       layout, num_experts, packed, static_cast<std::uint16_t*>(values), meta)) {
    return e;
  }
  return launch(stream, index_kernel<false>, index_grid(layout, num_experts), kPackThreads, 0,
                layout, const_cast<std::uint8_t*>(packed), index);
}

}  // namespace samoyeds
