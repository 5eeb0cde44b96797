// The tiles of a product without routing, Hopper kernel: sizes with which its items end soonest,
// where each cluster takes the next item when it is free.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include "samoyeds/args.cuh"

namespace samoyeds {

// Of an item, beside its blocks: measured, runs 50 and 88 of the kernel's log. Since then those of
// full tiles have become some 200 shorter (run 90), by which nothing is chosen.
inline constexpr int kItemClocks = 3000, kShortItemClocks = 2600;

// What the sizes follow from.
struct TileProblem {
  int num_rows;
  int most_tokens, step;  // of a tile; full ones have the most, or a multiple of step
  int parts;              // items of a tile
  int blocks;             // of k, 128 columns each
  int slab_tiles;         // of 16 kept rows: 4, or 8 where N = M
  int num_clusters;
  int item_clocks = kItemClocks;  // beside its blocks
};

// At the peak a block takes a clock for each token and tile of a slab. Measured, runs 50 and 81 of
// the kernel's log, it takes some 353 more, and with few tokens as long as its weights need to
// come.
inline std::int64_t item_clocks(const TileProblem& problem, int tokens) {
  const int multiplied =
      std::min(ceil_div(tokens, problem.step) * problem.step, problem.most_tokens);
  const int block = std::max(353 + problem.slab_tiles * multiplied, 150 * problem.slab_tiles);
  return static_cast<std::int64_t>(problem.blocks) * block + problem.item_clocks;
}

// When clusters are done, each of which takes the next item when it is free.
class Clusters {
 public:
  explicit Clusters(std::int64_t count) : levels_{{{0, count}}} {}

  // So many items of the same time.
  void take(std::int64_t items, std::int64_t time) {
    while (items > 0) {
      Level& first = *std::min_element(
          begin(), end(), [](const Level& a, const Level& b) { return a.free_at < b.free_at; });
      if (items < first.count) {  // once for each time: the others remain
        levels_[num_levels_++] = {first.free_at, first.count - items};
        first.count = items;
      }
      // Where all are free at once, whole rounds at once.
      const std::int64_t rounds = num_levels_ == 1 ? items / first.count : 1;
      first.free_at += rounds * time;
      items -= rounds * first.count;
    }
  }
  std::int64_t last() const {
    std::int64_t last = 0;
    for (std::size_t i = 0; i < num_levels_; ++i) last = std::max(last, levels_[i].free_at);
    return last;
  }

 private:
  struct Level {
    std::int64_t free_at, count;
  };
  Level* begin() { return levels_.data(); }
  Level* end() { return begin() + num_levels_; }

  std::array<Level, 4> levels_;  // one, and one more for each of up to three times
  std::size_t num_levels_ = 1;
};

// When the items of these tiles end, or nothing where that cannot be before `bound`.
inline std::optional<std::int64_t> end_of_items(const TileProblem& problem, const TileSizes& sizes,
                                                std::int64_t bound) {
  struct Same {
    std::int64_t items, clocks;
  };
  const int num_full = std::max(0, sizes.num_small - 1);
  const int rest = problem.num_rows - sizes.num_large * sizes.large - num_full * sizes.small;
  const std::int64_t parts = problem.parts;
  const Same all[] = {{sizes.num_large * parts, item_clocks(problem, sizes.large)},
                      {num_full * parts, item_clocks(problem, sizes.small)},
                      {rest > 0 ? parts : 0, item_clocks(problem, rest)}};
  std::int64_t sum = 0;
  for (const Same& each : all) sum += each.items * each.clocks;
  if (sum / problem.num_clusters >= bound) return {};
  Clusters clusters(problem.num_clusters);
  for (const Same& each : all) clusters.take(each.items, each.clocks);
  return clusters.last();
}

// As few small tiles as there can be, or one more, after at most kMaxGroup large ones fewer than
// there can be.
inline TileSizes best_sizes(const TileProblem& problem) {
  TileSizes best{};
  std::int64_t best_end = INT64_MAX;
  const auto consider = [&](const TileSizes& sizes) {
    const auto end = end_of_items(problem, sizes, best_end);
    if (end && *end < best_end) best_end = *end, best = sizes;
  };
  const int step = problem.step;
  // Multiples of the step, or the most.
  for (int large = problem.most_tokens; large >= problem.most_tokens / 2;
       large = (large - 1) / step * step) {
    const int most_large = problem.num_rows / large;
    for (int num_large = most_large; num_large >= std::max(0, most_large - kMaxGroup);
         --num_large) {
      const int left = problem.num_rows - num_large * large, least = ceil_div(left, large);
      if (left == 0) consider({large, num_large, large, 0});
      for (int count = least; count <= std::min(least + 1, kMaxGroup) && left > 0; ++count) {
        const int small =
            std::min(ceil_div(ceil_div(left, count), step) * step, problem.most_tokens);
        consider({large, num_large, small, ceil_div(left, small)});
      }
    }
  }
  return best;
}

}  // namespace samoyeds
