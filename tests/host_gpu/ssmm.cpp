// The matrix kernel on a CPU, see samoyeds/ptx.cuh: one product of one instance.
//
// SHAPE: the instance's numbers, as in variants.cuh. Arguments: the members of Product, in order.
// Standard input: packed weights of all experts, x, tiles, pairs. Standard output: the result.
#include "samoyeds/ssmm.cuh"

namespace samoyeds {
alignas(128) thread_local std::uint8_t buffers[kSharedBytes];
}

using namespace samoyeds;

namespace {

struct Product {
  int n, m, v, rows, cols, is_gate_up;
  int experts, num_rows, num_pairs, pairs_per_row;
  int num_tiles;  // 0: without routing
  int output, splits, stages, blocks, is_early;
};

template <typename T>
std::vector<T> read(std::size_t count) {
  std::vector<T> data(count);
  if (std::fread(data.data(), sizeof(T), count, stdin) != count) host::fail("too little input");
  return data;
}

using Shape = SsmmShape<__nv_bfloat16, SHAPE>;

template <int kSwitchPeriod>
void run(const SsmmArgs& args, int blocks) {
  gridDim.x = static_cast<unsigned>(blocks);
  for (int number = 0; number < blocks; ++number) {
    blockIdx.x = static_cast<unsigned>(number);
    std::memset(buffers, 0xff, kSharedBytes);  // NaN
    host::run_block(Shape::kThreads, [&args] { ssmm_kernel<Shape, kSwitchPeriod>(args); });
  }
}

void run_period(const SsmmArgs& args, int blocks) {
  if constexpr (!Shape::kIsLarge) {
    run<kAnyPeriod>(args, blocks);
  } else {
    switch (switch_period(args.layout)) {
      case 1:
        return run<1>(args, blocks);
      case 2:
        return run<2>(args, blocks);
      case 4:
        return run<4>(args, blocks);
      default:
        if constexpr (!Shape::kIsStepped) run<0>(args, blocks);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  Product p;
  constexpr int kNumbers = sizeof(Product) / sizeof(int);
  if (argc != 1 + kNumbers) host::fail("wrong number of arguments");
  int numbers[kNumbers];
  for (int i = 0; i < kNumbers; ++i) numbers[i] = std::atoi(argv[i + 1]);
  std::memcpy(&p, numbers, sizeof p);

  SsmmArgs args{};
  args.layout = make_layout(p.rows, p.cols, {p.n, p.m, p.v}, p.is_gate_up != 0);
  if (Shape::kIsStepped != (args.layout.kind == Kind::kStepped)) host::fail("another instance's");
  const auto packed = read<std::uint8_t>(static_cast<std::size_t>(args.layout.expert_bytes) *
                                         static_cast<std::size_t>(p.experts));
  const auto x =
      read<std::uint16_t>(static_cast<std::size_t>(p.num_rows) * static_cast<std::size_t>(p.cols));
  const auto tiles = read<Tile>(static_cast<std::size_t>(p.num_tiles));
  const auto pairs = read<int>(p.num_tiles ? static_cast<std::size_t>(p.num_pairs) : 0);
  if (std::fgetc(stdin) != EOF) host::fail("too much input");
  args.packed = packed.data();
  args.x = x.data();
  args.tokens = {p.num_tiles ? tiles.data() : nullptr, &p.num_tiles,
                 p.num_tiles ? pairs.data() : nullptr, p.num_rows,
                 make_divisor(p.pairs_per_row),        {}};
  args.output = static_cast<Output>(p.output);
  args.split_stride = static_cast<std::int64_t>(p.num_pairs) * p.rows;
  args.stages = p.stages;
  args.splits = make_divisor(p.splits);
  args.parts = make_divisor(ceil_div(args.layout.tiles, Shape::kTilesM) * p.splits);
  args.is_early = p.is_early != 0;
  if (p.stages * Stages<Shape>::kBytes + SumOverK<Shape>::kScratchBytes > kSharedBytes) {
    host::fail("too much shared memory");
  }

  const std::size_t columns =
      static_cast<std::size_t>(args.output == Output::kGated ? p.rows / 2 : p.rows);
  const std::size_t bytes =
      columns * static_cast<std::size_t>(p.num_pairs) *
      (args.output == Output::kPartial ? 4u * static_cast<unsigned>(p.splits) : 2u);
  constexpr std::size_t kBorder = 4096;
  std::vector<std::uint8_t> out(bytes + 2 * kBorder, 0xff);
  args.out = out.data() + kBorder;
  run_period(args, p.blocks);
  for (std::size_t i = 0; i < kBorder; ++i) {
    if (out[i] != 0xff || out[bytes + kBorder + i] != 0xff) host::fail("written outside");
  }
  std::fwrite(out.data() + kBorder, 1, bytes, stdout);
}
