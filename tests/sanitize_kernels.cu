// A small run of every kernel of libsamoyeds, for compute-sanitizer; scripts/sanitize.sh builds it.
//
// No torch: each buffer is a cudaMalloc of exactly its size, so that memcheck sees one byte too
// much, and what a kernel should write is left uninitialised, so that initcheck sees what it reads
// before. Results are compared with plain loops. `--forbidden` runs the same on weights that break
// the format (validation keeps those away from kernels): results are then whatever they are, but no
// memory outside may be touched. `--wide` runs the Hopper kernel's wide tiles, which need many
// rows.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "samoyeds/api.h"

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "sanitize_kernels: %s\n", what.c_str());
  std::exit(2);
}

void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) fail(std::string(what) + ": " + cudaGetErrorString(code));
}

void check(int64_t status, const char* what) {
  if (status < 0 || (status > 0 && status <= SAMOYEDS_CUDA_ERROR)) {
    fail(std::string(what) + ": " + samoyeds_last_error());
  }
}

// --- random numbers, 16-bit floats ---------------------------------------------------------------

class Random {
 public:
  uint32_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 16);
  }
  int below(int n) { return static_cast<int>(bits() % static_cast<uint32_t>(n)); }
  float symmetric() { return static_cast<float>(bits()) / 2147483648.f - 1.f; }

 private:
  uint64_t state_ = 0x9e3779b97f4a7c15ull;
};

uint16_t narrow(float x, int64_t dtype) {
  uint16_t bits;
  if (dtype == SAMOYEDS_BF16) {
    const __nv_bfloat16 h = __float2bfloat16(x);
    std::memcpy(&bits, &h, sizeof bits);
  } else {
    const __half h = __float2half(x);
    std::memcpy(&bits, &h, sizeof bits);
  }
  return bits;
}

float widen(uint16_t bits, int64_t dtype) {
  if (dtype == SAMOYEDS_BF16) return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
  return __half2float(__half(__half_raw{bits}));
}

// --- memory --------------------------------------------------------------------------------------

template <typename T>
class Buffer {
 public:
  explicit Buffer(std::size_t size) : size_(size) {
    check(cudaMalloc(&data_, std::max<std::size_t>(bytes(), 1)), "cudaMalloc");
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    check(cudaMemcpy(data_, host.data(), bytes(), cudaMemcpyHostToDevice), "copy to the GPU");
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return static_cast<T*>(data_); }
  std::size_t bytes() const { return size_ * sizeof(T); }
  std::vector<T> host() const {
    std::vector<T> out(size_);
    check(cudaMemcpy(out.data(), data_, bytes(), cudaMemcpyDeviceToHost), "copy from the GPU");
    return out;
  }

 private:
  void* data_ = nullptr;
  std::size_t size_;
};

// --- weights -------------------------------------------------------------------------------------

struct Pattern {
  int n, m, v;  // v = 0: the whole row
};

struct Weight {
  SamoyedsWeight shape{};
  std::vector<uint16_t> values;
  std::vector<uint8_t> meta, index;
  std::vector<float> dense;  // [E, m, k]
};

Weight make_weight(int experts, int rows, int cols, Pattern p, int64_t dtype, bool is_gate_up,
                   Random& random) {
  const int v = p.v ? p.v : cols, kept = rows / p.m * p.n;
  Weight w;
  w.shape = {nullptr, 0, experts, rows, cols, p.n, p.m, v, dtype, is_gate_up};
  w.values.resize(static_cast<std::size_t>(experts) * kept * cols / 2);
  w.meta.resize(w.values.size() / 4);
  w.index.resize(static_cast<std::size_t>(experts) * kept * (cols / v));
  w.dense.assign(static_cast<std::size_t>(experts) * rows * cols, 0.f);
  const int nibbles[] = {4, 8, 9, 12, 13, 14};
  const float scale = std::sqrt(6.f * p.m / (p.n * static_cast<float>(cols)));
  for (int e = 0; e < experts; ++e) {
    for (int block = 0; block < rows / p.m; ++block) {
      for (int sub_row = 0; sub_row < cols / v; ++sub_row) {
        for (int slot = 0, row = 0; slot < p.n; ++row) {  // N of the M rows, in ascending order
          if (random.below(p.m - row) >= p.n - slot) continue;
          const std::size_t kept_row = static_cast<std::size_t>(e) * kept + block * p.n + slot++;
          w.index[kept_row * (cols / v) + sub_row] = static_cast<uint8_t>(row);
          for (int group = sub_row * v / 4; group < (sub_row + 1) * v / 4; ++group) {
            const int nibble = nibbles[random.below(6)];
            w.meta[kept_row * (cols / 8) + group / 2] |=
                static_cast<uint8_t>(nibble << (group % 2 * 4));
            for (int i = 0; i < 2; ++i) {
              const uint16_t value = narrow(random.symmetric() * scale, dtype);
              w.values[kept_row * (cols / 2) + group * 2 + i] = value;
              const std::size_t dense_row = static_cast<std::size_t>(e) * rows + block * p.m + row;
              w.dense[dense_row * cols + group * 4 + (nibble >> (2 * i) & 3)] = widen(value, dtype);
            }
          }
        }
      }
    }
  }
  return w;
}

struct Packed {
  explicit Packed(const Weight& w)
      : buffer(static_cast<std::size_t>(samoyeds_packed_bytes(&w.shape))), weight(w.shape) {
    weight.packed = buffer.data();
    weight.num_bytes = static_cast<int64_t>(buffer.bytes());
    const Buffer<uint16_t> values(w.values);
    const Buffer<uint8_t> meta(w.meta), index(w.index);
    const SamoyedsLaunch launch{};
    check(samoyeds_pack(&launch, &weight, values.data(), meta.data(), index.data()), "pack");
    check(cudaDeviceSynchronize(), "pack");
  }
  Buffer<uint8_t> buffer;
  SamoyedsWeight weight;
};

void check_unpack(const Weight& w, const Packed& packed, bool is_valid) {
  const Buffer<uint16_t> values(w.values.size());
  const Buffer<uint8_t> meta(w.meta.size()), index(w.index.size());
  const SamoyedsLaunch launch{};
  check(samoyeds_unpack(&launch, &packed.weight, values.data(), meta.data(), index.data()),
        "unpack");
  check(cudaDeviceSynchronize(), "unpack");
  if (!is_valid) return;
  if (values.host() != w.values || meta.host() != w.meta || index.host() != w.index) {
    fail("unpack(pack(weight)) is not the weight");
  }
}

// --- one layer -----------------------------------------------------------------------------------

enum class Plans {
  kChosen,  // by the heuristics
  kAll,     // and every instance
  kHopper,  // and that of the Hopper kernel, see check_counts()
};

struct Case {
  const char* name;
  int tokens, experts, top_k, hidden, inner;
  Pattern up, down;
  int64_t dtype;
  Plans plans;
};

constexpr int kHopperTokens = 208;                  // of a tile, at most
constexpr int kHopperFrags = 24, kShortFrags = 22;  // by which its plans are known
constexpr int64_t kBf16 = SAMOYEDS_BF16, kFp16 = SAMOYEDS_FP16;
constexpr Plans kChosen = Plans::kChosen, kAll = Plans::kAll, kHopper = Plans::kHopper;
const Case kCases[] = {
    {"(1,2,128)", 70, 3, 2, 384, 256, {1, 2, 128}, {1, 2, 128}, kBf16, kAll},
    {"(1,2,128), one token", 1, 5, 2, 256, 128, {1, 2, 128}, {1, 2, 128}, kBf16, kChosen},
    {"(1,2,32), tails", 37, 3, 2, 160, 96, {1, 2, 32}, {1, 2, 32}, kFp16, kAll},
    {"2:4, tails", 37, 3, 3, 136, 72, {1, 1, 0}, {1, 1, 0}, kBf16, kAll},
    {"(16,16,8) across gate and up", 9, 2, 1, 64, 24, {16, 16, 8}, {2, 2, 8}, kFp16, kChosen},
    {"(3,4,128)", 70, 3, 2, 384, 256, {3, 4, 128}, {3, 4, 128}, kFp16, kAll},
    {"(3,4,32), tails", 37, 3, 2, 160, 96, {3, 4, 32}, {3, 4, 32}, kBf16, kAll},
    {"(3,4,64), one token", 1, 5, 2, 256, 128, {3, 4, 64}, {3, 4, 64}, kBf16, kChosen},
    {"(3,4,64) and (1,2,64)", 37, 3, 2, 128, 192, {3, 4, 64}, {1, 2, 64}, kFp16, kChosen},
    {"(3,4,16) and (3,4,32)", 9, 2, 2, 48, 32, {3, 4, 16}, {3, 4, 32}, kBf16, kChosen},
    {"(1,2,8)", 9, 3, 2, 40, 24, {1, 2, 8}, {1, 2, 24}, kBf16, kChosen},
    {"(1,2,8), pairs counted apart", 1400, 7, 3, 40, 24, {1, 2, 8}, {1, 2, 24}, kBf16, kChosen},
    {"(4,8,32) and (8,16,32)", 21, 3, 2, 64, 96, {4, 8, 32}, {8, 16, 32}, kBf16, kChosen},
    {"(1,16,64) and (15,16,4)", 9, 2, 2, 64, 64, {1, 16, 64}, {15, 16, 4}, kFp16, kChosen},
    {"(1,2,64) and general", 9, 3, 2, 128, 128, {1, 2, 64}, {4, 8, 16}, kBf16, kChosen},
    {"general and (1,2,64)", 9, 3, 2, 128, 128, {4, 8, 16}, {1, 2, 64}, kBf16, kChosen},
    // More blocks of k than there are slots, one way or the other.
    {"(1,2,128), many", 330, 3, 2, 640, 384, {1, 2, 128}, {1, 2, 128}, kBf16, kHopper},
    {"(1,2,64) and (1,2,32), many", 330, 3, 2, 512, 512, {1, 2, 64}, {1, 2, 32}, kFp16, kHopper},
    {"(1,2,32) and 2:4, many", 330, 3, 2, 384, 384, {1, 2, 32}, {1, 1, 0}, kBf16, kHopper},
    {"2:4 and (1,2,64), many", 330, 3, 2, 384, 128, {1, 1, 0}, {1, 2, 64}, kFp16, kHopper},
};

// y[m] of one row x[k] and one expert.
std::vector<float> product(const Weight& w, int expert, const float* x) {
  std::vector<float> y(static_cast<std::size_t>(w.shape.rows));
  for (int64_t r = 0; r < w.shape.rows; ++r) {
    const float* row =
        &w.dense[static_cast<std::size_t>((expert * w.shape.rows + r) * w.shape.cols)];
    double sum = 0;
    for (int64_t c = 0; c < w.shape.cols; ++c) sum += static_cast<double>(row[c]) * x[c];
    y[static_cast<std::size_t>(r)] = static_cast<float>(sum);
  }
  return y;
}

class Layer {
 public:
  Layer(const Case& c, bool is_valid) : case_(c), is_valid_(is_valid) {
    up_ = make_weight(c.experts, 2 * c.inner, c.hidden, c.up, c.dtype, true, random_);
    down_ = make_weight(c.experts, c.hidden, c.inner, c.down, c.dtype, false, random_);
    if (!is_valid) {
      for (Weight* w : {&up_, &down_}) {
        for (auto& byte : w->meta) byte = static_cast<uint8_t>(random_.bits());
        for (auto& byte : w->index) byte = static_cast<uint8_t>(random_.bits());
      }
    }
    hidden_ = values(static_cast<std::size_t>(c.tokens) * c.hidden, 1.f);
    inner_ = values(static_cast<std::size_t>(pairs()) * c.inner, 1.f);
    for (int i = 0; i < pairs(); ++i) {
      // Some belong to no expert here; one of them looks like expert 0 in 32 bits.
      const int64_t elsewhere[] = {-1, c.experts, int64_t{1} << 32};
      int64_t chosen = random_.below(c.experts);
      if (c.plans == kHopper && chosen == 1) chosen = 0;
      index_.push_back(random_.below(6) == 0 ? elsewhere[random_.below(3)] : chosen);
      weights_.push_back(random_.symmetric());
    }
    if (c.plans == kHopper) check_counts();
  }

  void run() {
    const Packed up(up_), down(down_);
    check_unpack(up_, up, is_valid_);
    check_unpack(down_, down, is_valid_);
    run_all(up.weight, down.weight, nullptr, nullptr, "heuristics");
    run_linear(down_, nullptr);
    int num_plans = 0;
    if (case_.plans == kAll) num_plans = run_plans(up.weight, down.weight);
    const bool runs_hopper = case_.plans == kHopper && is_hopper_here();
    if (runs_hopper) num_plans = run_hopper(up.weight, down.weight);
    if (!is_valid_) {
      for (const Packed* packed : {&up, &down}) {
        std::vector<uint8_t> garbage(packed->buffer.bytes());
        for (auto& byte : garbage) byte = static_cast<uint8_t>(random_.bits());
        check(cudaMemcpy(packed->buffer.data(), garbage.data(), garbage.size(),
                         cudaMemcpyHostToDevice),
              "garbage");
      }
      run_all(up.weight, down.weight, nullptr, nullptr, "garbage");
      if (runs_hopper) run_hopper(up.weight, down.weight);
      check_unpack(up_, up, false);
    }
    std::printf("%s: right, with %d other plans\n", case_.name, num_plans);
  }

  // Three rounds of wide tiles on 132 SMs: with fewer tokens a tile it would be four.
  void run_wide() {
    const SamoyedsPlan plan{1, kHopperFrags, 8, 1, 1, 3, 1, 1, 2};
    if (is_hopper_here()) run_linear(down_, &plan, 3 * 66 * 200);
  }

 private:
  int pairs() const { return case_.tokens * case_.top_k; }
  bool is_mine(int pair) const {
    const int64_t e = index_[static_cast<std::size_t>(pair)];
    return e >= 0 && e < case_.experts;
  }
  int expert(int pair) const { return static_cast<int>(index_[static_cast<std::size_t>(pair)]); }

  std::vector<float> values(std::size_t size, float scale) {
    std::vector<float> out(size);
    for (auto& x : out) x = widen(narrow(random_.symmetric() * scale, case_.dtype), case_.dtype);
    return out;
  }
  std::vector<uint16_t> narrowed(const std::vector<float>& x) const {
    std::vector<uint16_t> out;
    for (const float value : x) out.push_back(narrow(value, case_.dtype));
    return out;
  }

  void compare(const Buffer<uint16_t>& found, const std::vector<float>& expected,
               const std::string& what) const {
    const std::vector<uint16_t> bits = found.host();
    if (!is_valid_) return;
    float largest = 1e-3f, error = 0;
    for (std::size_t i = 0; i < bits.size(); ++i) {
      const float difference = std::fabs(widen(bits[i], case_.dtype) - expected[i]);
      error = std::isfinite(difference) ? std::max(error, difference) : INFINITY;
      largest = std::max(largest, std::fabs(expected[i]));
    }
    if (!(error <= 0.03f * largest)) {
      fail(std::string(case_.name) + ", " + what + ": error " + std::to_string(error) + " of " +
           std::to_string(largest));
    }
  }

  std::vector<float> up_rows() const {
    std::vector<float> rows;
    for (int pair = 0; pair < pairs(); ++pair) {
      std::vector<float> y(static_cast<std::size_t>(2 * case_.inner));
      if (is_mine(pair)) y = product(up_, expert(pair), &hidden_[row_of(pair)]);
      rows.insert(rows.end(), y.begin(), y.end());
    }
    return rows;
  }
  std::size_t row_of(int pair) const {
    return static_cast<std::size_t>(pair / case_.top_k) * case_.hidden;
  }
  std::vector<float> combined(const std::function<std::vector<float>(int)>& inner_of) const {
    std::vector<float> out(static_cast<std::size_t>(case_.tokens) * case_.hidden);
    for (int pair = 0; pair < pairs(); ++pair) {
      if (!is_mine(pair)) continue;
      const std::vector<float> inner = inner_of(pair);
      const std::vector<float> y = product(down_, expert(pair), inner.data());
      for (std::size_t i = 0; i < y.size(); ++i) {
        out[row_of(pair) + i] += weights_[static_cast<std::size_t>(pair)] * y[i];
      }
    }
    return out;
  }

  // moe_mlp, moe_up and moe_down; null plans: the heuristics. False where a plan is not served.
  bool run_all(const SamoyedsWeight& up, const SamoyedsWeight& down, const SamoyedsPlan* up_plan,
               const SamoyedsPlan* down_plan, const std::string& what) {
    const Buffer<int64_t> index(index_);
    const Buffer<float> weights(weights_);
    const Buffer<uint16_t> hidden(narrowed(hidden_)), inner(narrowed(inner_));
    const SamoyedsRouting routing{index.data(), weights.data(), SAMOYEDS_FP32, case_.tokens,
                                  case_.top_k};
    SamoyedsLaunch launch{};
    launch.plan = up_plan;
    launch.down_plan = down_plan;
    const int64_t mlp_bytes = samoyeds_workspace_bytes(&launch, &routing, &up, &down);
    if (down_plan && mlp_bytes < 0) return false;
    check(mlp_bytes < 0 ? mlp_bytes : 0, "workspace_bytes");
    if (expected_mlp_.empty()) make_expected();
    {
      const Buffer<uint8_t> workspace(static_cast<std::size_t>(mlp_bytes));
      const Buffer<uint16_t> out(expected_mlp_.size());
      launch.workspace = workspace.data();
      launch.workspace_bytes = mlp_bytes;
      hide_from_initcheck(workspace);
      check(samoyeds_moe_mlp(&launch, &routing, &up, &down, hidden.data(), out.data()), "moe_mlp");
      check(cudaDeviceSynchronize(), "moe_mlp");
      compare(out, expected_mlp_, "moe_mlp, " + what);
    }
    {
      const int64_t bytes = samoyeds_workspace_bytes(&launch, &routing, &up, nullptr);
      check(bytes < 0 ? bytes : 0, "workspace_bytes");
      const Buffer<uint8_t> workspace(static_cast<std::size_t>(bytes));
      const Buffer<uint16_t> out(expected_up_.size());
      launch.workspace = workspace.data();
      launch.workspace_bytes = bytes;
      check(samoyeds_moe_up(&launch, &routing, &up, hidden.data(), out.data()), "moe_up");
      check(cudaDeviceSynchronize(), "moe_up");
      compare(out, expected_up_, "moe_up, " + what);
    }
    launch.plan = down_plan;
    const int64_t bytes = samoyeds_workspace_bytes(&launch, &routing, nullptr, &down);
    check(bytes < 0 ? bytes : 0, "workspace_bytes");
    const Buffer<uint8_t> workspace(static_cast<std::size_t>(bytes));
    const Buffer<uint16_t> out(expected_down_.size());
    launch.workspace = workspace.data();
    launch.workspace_bytes = bytes;
    hide_from_initcheck(workspace);
    check(samoyeds_moe_down(&launch, &routing, &down, inner.data(), out.data()), "moe_down");
    check(cudaDeviceSynchronize(), "moe_down");
    compare(out, expected_down_, "moe_down, " + what);
    return true;
  }

  // The Hopper kernel writes panels and matrices by bulk stores, which initcheck does not see. That
  // nothing is read before it is written, tests/test_cuda_hopper.py checks by filling the
  // workspace; what is left of a result is NaN here, and seen by compare().
  template <typename T>
  void hide_from_initcheck(const Buffer<T>& written) const {
    if (case_.plans != kHopper || !is_hopper_here()) return;
    check(cudaMemset(written.data(), 0xff, written.bytes()), "cudaMemset");
  }

  void make_expected() {
    expected_up_ = up_rows();
    const auto size = static_cast<std::size_t>(case_.inner);
    expected_mlp_ = combined([&](int pair) {
      const float* both = &expected_up_[static_cast<std::size_t>(pair) * 2 * size];
      std::vector<float> inner(size);
      for (std::size_t i = 0; i < size; ++i) {
        inner[i] = both[i] / (1 + std::exp(-both[i])) * both[size + i];
      }
      return inner;
    });
    expected_down_ = combined([&](int pair) {
      const auto begin = inner_.begin() + static_cast<std::ptrdiff_t>(pair * size);
      return std::vector<float>(begin, begin + static_cast<std::ptrdiff_t>(size));
    });
  }

  int run_plans(const SamoyedsWeight& up, const SamoyedsWeight& down) {
    const int64_t instances[][6] = {
        // m_frags, n_frags, warps_m, warps_n, warps_k, cluster: all of variants.cuh but the last
        // two
        {1, 1, 1, 1, 8, 1}, {1, 1, 2, 1, 4, 1}, {1, 1, 4, 1, 2, 1}, {1, 1, 8, 1, 1, 1},
        {1, 2, 8, 1, 1, 1}, {1, 4, 8, 1, 1, 1}, {2, 4, 8, 1, 1, 1}, {2, 6, 8, 1, 1, 1},
        {2, 4, 4, 2, 1, 1}, {4, 4, 4, 2, 1, 1}, {3, 1, 1, 1, 8, 1}, {3, 1, 2, 1, 4, 1},
        {3, 1, 4, 1, 2, 1}, {3, 1, 8, 1, 1, 1}, {3, 1, 4, 2, 1, 1}, {3, 2, 4, 2, 1, 1},
        {3, 4, 4, 2, 1, 1}, {3, 6, 4, 2, 1, 1},
    };
    int num_plans = 0;
    for (const auto& [m_frags, n_frags, warps_m, warps_n, warps_k, cluster] : instances) {
      for (const int64_t splits : {1, 2}) {
        const int64_t stages = splits;
        const SamoyedsPlan plan{m_frags, n_frags, warps_m, warps_n, warps_k,
                                stages,  1,       splits,  cluster};
        const std::string what = "plan " + std::to_string(m_frags) + " x " +
                                 std::to_string(n_frags) + ", warps " + std::to_string(warps_m) +
                                 " * " + std::to_string(warps_n) + " * " + std::to_string(warps_k) +
                                 ", cluster " + std::to_string(cluster);
        SamoyedsPlan unsplit = plan;
        unsplit.splits = 1;
        const bool was_run = run_all(up, down, &unsplit, &plan, what);
        num_plans += was_run;
        // The largest need compute capability 9.0 and a V that is a multiple of 64; (3, 4, V) has
        // instances of its own; 96 KB are everywhere.
        const int64_t stage = warps_k * (m_frags * warps_m * 2320 + 8 * n_frags * warps_n * 272);
        const int64_t sums = warps_k > 1 ? 22 << 10 : 0;
        const bool is_served =
            m_frags * n_frags <= (m_frags == 3 ? 12 : 8) && splits <= (case_.inner + 127) / 128 &&
            (m_frags == 3) == (case_.up.n == 3) && stages * stage + sums <= 96 << 10;
        if (is_served && !was_run) fail("the library refuses " + what);
      }
    }
    return num_plans;
  }

  // A case of the Hopper kernel has more than one tile of an expert, an expert without tokens, a
  // number of tokens that is no multiple of 8, and choices of nobody.
  void check_counts() const {
    std::vector<int> counts(static_cast<std::size_t>(case_.experts));
    int elsewhere = 0;
    for (int pair = 0; pair < pairs(); ++pair) {
      ++(is_mine(pair) ? counts[static_cast<std::size_t>(expert(pair))] : elsewhere);
    }
    const int most = *std::max_element(counts.begin(), counts.end());
    const bool has_tail = std::any_of(counts.begin(), counts.end(), [](int n) { return n % 8; });
    if (most <= kHopperTokens || counts[1] != 0 || elsewhere == 0 || !has_tail) {
      fail(std::string(case_.name) + ": no case for the Hopper kernel");
    }
  }

  static bool is_hopper_here() {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "major");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "minor");
    return major == 9 && minor == 0;
  }

  int run_hopper(const SamoyedsWeight& up, const SamoyedsWeight& down) {
    const auto plan_of = [](const SamoyedsWeight& w) -> SamoyedsPlan {
      return {1, kHopperFrags, 8, 1, 1, w.n == w.m ? 2 : 3, 1, 1, 2};
    };
    SamoyedsPlan up_plan = plan_of(up), down_plan = plan_of(down);
    if (!run_all(up, down, &up_plan, &down_plan, "Hopper kernel")) {
      fail("the library refuses the Hopper kernel: " + std::string(samoyeds_last_error()));
    }
    run_linear(down_, &down_plan);
    if (up.v != 128 || down.v != 128) return 1;
    up_plan.n_frags = down_plan.n_frags = kShortFrags;
    if (!run_all(up, down, &up_plan, &down_plan, "short tiles")) {
      fail("the library refuses short tiles: " + std::string(samoyeds_last_error()));
    }
    run_linear(down_, &down_plan);
    return 2;
  }

  // rows: the same ones again and again; all of them once where it is not given.
  void run_linear(const Weight& of, const SamoyedsPlan* plan, int rows = 0) {
    if (rows == 0) rows = pairs();
    std::vector<float> repeated;
    for (int row = 0; row < rows; ++row) {
      const auto first = inner_.begin() + row % pairs() * case_.inner;
      repeated.insert(repeated.end(), first, first + case_.inner);
    }
    Weight one = of;
    one.shape.num_experts = 1;
    one.values.resize(of.values.size() / static_cast<std::size_t>(case_.experts));
    one.meta.resize(of.meta.size() / static_cast<std::size_t>(case_.experts));
    one.index.resize(of.index.size() / static_cast<std::size_t>(case_.experts));
    const Packed packed(one);
    const Buffer<uint16_t> x(narrowed(repeated));
    const Buffer<uint16_t> out(static_cast<std::size_t>(rows) * case_.hidden);
    SamoyedsLaunch launch{};
    launch.plan = plan;
    const int64_t bytes = samoyeds_linear_workspace_bytes(&launch, &packed.weight, rows);
    check(bytes < 0 ? bytes : 0, "linear_workspace_bytes");
    const Buffer<uint8_t> workspace(static_cast<std::size_t>(bytes));
    launch.workspace = workspace.data();
    launch.workspace_bytes = bytes;
    hide_from_initcheck(out);
    check(samoyeds_linear(&launch, &packed.weight, x.data(), rows, out.data()), "linear");
    check(cudaDeviceSynchronize(), "linear");
    std::vector<float> expected;
    for (int row = 0; row < rows; ++row) {
      if (row < pairs()) {
        const auto y = product(of, 0, &inner_[static_cast<std::size_t>(row) * case_.inner]);
        expected.insert(expected.end(), y.begin(), y.end());
      } else {
        const auto same = static_cast<std::size_t>(row % pairs()) * case_.hidden;
        for (int i = 0; i < case_.hidden; ++i) expected.push_back(expected[same + i]);
      }
    }
    compare(out, expected, "linear");
  }

  Case case_;
  bool is_valid_;
  Random random_;
  Weight up_, down_;
  std::vector<float> hidden_, inner_, weights_, expected_up_, expected_mlp_, expected_down_;
  std::vector<int64_t> index_;
};

void run_route(int tokens, int top_k, int experts, int tile_tokens) {
  Random random;
  std::vector<int64_t> index;
  for (int i = 0; i < tokens * top_k; ++i) index.push_back(random.below(experts + 2) - 1);
  const Buffer<int64_t> device_index(index);
  const SamoyedsRouting routing{device_index.data(), nullptr, SAMOYEDS_FP32, tokens, top_k};
  const int64_t most = samoyeds_max_tiles(&routing, experts, tile_tokens);
  check(most < 0 ? most : 0, "max_tiles");
  const Buffer<int32_t> pairs(index.size()), tiles(static_cast<std::size_t>(4 * most)), count(1);
  const SamoyedsLaunch launch{};
  check(samoyeds_route(&launch, &routing, experts, tile_tokens, pairs.data(), tiles.data(),
                       count.data()),
        "route");
  check(cudaDeviceSynchronize(), "route");
  std::vector<int32_t> expected;
  int num_tiles = 0;
  for (int e = 0; e < experts; ++e) {
    const std::size_t before = expected.size();
    for (std::size_t i = 0; i < index.size(); ++i) {
      if (index[i] == e) expected.push_back(static_cast<int32_t>(i));
    }
    const int found = static_cast<int>(expected.size() - before);
    num_tiles += (found + tile_tokens - 1) / tile_tokens;
  }
  // What is left out was never written, so only what is expected is copied.
  std::vector<int32_t> found(expected.size());
  check(cudaMemcpy(found.data(), pairs.data(), found.size() * 4, cudaMemcpyDeviceToHost), "pairs");
  if (found != expected || count.host()[0] != num_tiles) fail("route: wrong pairs or tiles");
  std::printf("route of %d x %d to %d experts: right\n", tokens, top_k, experts);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const bool is_valid = mode != "--forbidden";
  check(samoyeds_prepare(0), "prepare");
  if (mode == "--wide") {
    Layer({"(1,2,128), wide", 330, 3, 2, 256, 384, {1, 2, 128}, {1, 2, 128}, kBf16, kHopper}, true)
        .run_wide();
    std::printf("done\n");
    return 0;
  }
  if (is_valid) {
    run_route(1, 1, 1, 8);
    run_route(300, 4, 60, 32);
    run_route(70, 8, 256, 8);
  }
  for (const Case& c : kCases) Layer(c, is_valid).run();
  std::printf("done\n");
  return 0;
}
