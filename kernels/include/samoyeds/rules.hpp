// Which instance of the matrix kernel serves which load, with the measurement behind each choice:
// bf16, (1, 2, 128), one expert layer or one of its products, taken while these rules were chosen,
// between commits ee2f871 and the Hopper kernel. Committed results are those in
// scripts/bench/results.
//
// Those whose plan has 3 fragments of rows a warp serve (3, 4, V), all others every other pattern.
#pragma once

#include "samoyeds/api.h"

namespace samoyeds {

// The first rule that holds is taken. Tokens: what an expert that is hit at all is expected to
// meet. Waves: how often the items of the product, with all the splits it may have, would fill the
// GPU.
struct Rule {
  int min_capability, max_capability;
  int v_step;  // V, where N < M, is a multiple of it; 0: any V
  int min_cols;
  double min_tokens, max_tokens;  // an expert
  double min_waves;
  SamoyedsPlan plan;  // stages and splits follow from the device and the shape
  const char* measured;
};

inline constexpr double kAny = 1e30;
inline constexpr int kFullFrags = 24, kShortFrags = 22;  // n_frags: the Hopper kernel's tiles
inline constexpr int kHopper = 90, kNewest = 9999;
// clang-format off: a table
inline constexpr Rule kRules[] = {
    // capability       V   k     tokens      waves  plan
    {kHopper, kHopper,  64, 0,    5,   22,    0.8,   {2, 4, 8, 1, 1, 0, 1, 0, 1},
     "H200, Mixtral-8x7B, T = 64: 206 us, 227 us as (1, 4); T = 24: 201 us, 214 us as the next rule"},
    {80, kNewest,       0,  0,    0,   7,     0.8,   {1, 1, 8, 1, 1, 0, 2, 0, 1},
     "H200, Mixtral-8x7B, T = 16: 216 us, 86 % of the byte floor"},
    {80, kNewest,       0,  0,    0,   2,     0,     {1, 1, 2, 1, 4, 0, 2, 0, 1},
     "H200, Qwen1.5-MoE, T = 1, up alone: 13.6 us; 15.7 us as the next rule"},
    {80, kNewest,       0,  0,    0,   7,     0,     {1, 1, 4, 1, 2, 0, 2, 0, 1},
     "H200, Qwen1.5-MoE, T = 16, down alone: 30.3 us; 30.6 us as the first rule"},
    {kHopper, kHopper,  0,  0,    0,   22,    0.8,   {2, 4, 8, 1, 1, 0, 1, 0, 1},
     "H200, V = 32, Qwen3-30B, T = 256: 105 us; 111 us as (1, 4), two of them on an SM"},
    {kHopper, kHopper,  64, 0,    0,   37,    0.8,   {2, 6, 8, 1, 1, 0, 1, 0, 1},
     "H200, Qwen2-57B, T = 256: 281 us; 306 us as (4, 4)"},
    {kHopper, kHopper,  0,  0,    0,   33,    0.8,   {2, 4, 8, 1, 1, 0, 1, 0, 1},
     "H200, V = 32, Mixtral-8x7B, T = 128: 301 us; 346 us as (2, 4) with 4 * 2 warps"},
    {80, kNewest,       0,  0,    0,   12,    0,     {1, 2, 8, 1, 1, 0, 2, 0, 1},
     "between its neighbours; H200, Qwen1.5-MoE, T = 256, up alone: 85 us; 74 us as the next rule"},
    {80, kNewest,       0,  0,    0,   20,    0,     {1, 4, 8, 1, 1, 0, 2, 0, 1},
     "H200, Qwen3-30B, T = 256: 120 us, 66 % of the byte floor; 134 us as (2, 4)"},
    {kHopper, kHopper,  128, 0,   52, kAny,   0,     {1, kShortFrags, 8, 1, 1, 0, 1, 0, 2},
     "several experts, where it is faster by a model of its tiles; H200, Qwen3-30B, T = 4096: 333 us; 341 us as the next rule"},
    {kHopper, kHopper,  0,  0,    52, kAny,   0,     {1, kFullFrags, 8, 1, 1, 0, 1, 0, 2},
     "H200, Mixtral-8x7B, T = 256: 280 us, 415 us as the next rule; Qwen3-30B, T = 1024: 202 and 226"},
    {kHopper, kHopper,  64, 0,    0,   kAny,  0,     {4, 4, 4, 2, 1, 0, 1, 0, 1},
     "H200, Qwen2-57B, T = 256: 328 us, 71 % of the byte floor"},
    {80, kNewest,       0,  0,    0,   28,    0,     {1, 4, 8, 1, 1, 0, 2, 0, 1},
     "H200, Qwen1.5-MoE, T = 256, up alone: 72.4 us, the same as the next rule"},
    {80, kNewest,       0,  0,    0,   kAny,  0,     {2, 4, 4, 2, 1, 0, 1, 0, 1},
     "H200, Mixtral-8x7B, T = 1024, V = 128, up alone: 883 us; 681 us as (4, 4)"},

    // (3, 4, V): bounds after those of (1, 2, V); no other instance was timed in their place.
    {80, kNewest,       0,  0,    0,   13,    0.8,   {3, 1, 4, 2, 1, 0, 2, 0, 1},
     "H200, (3,4,64), Mixtral-8x7B, T = 16: 312 us, 90 % of the byte floor"},
    {80, kNewest,       0,  0,    0,   2,     0,     {3, 1, 2, 1, 4, 0, 1, 0, 1},
     "H200, (3,4,64), Qwen1.5-MoE, T = 1: 23 us, 30 % of the byte floor"},
    {80, kNewest,       0,  0,    0,   7,     0,     {3, 1, 4, 1, 2, 0, 1, 0, 1},
     "H200, (3,4,64), Qwen1.5-MoE, T = 16: 87 us, 75 % of the byte floor"},
    {80, kNewest,       0,  0,    0,   13,    0,     {3, 1, 4, 2, 1, 0, 2, 0, 1},
     "H200, (3,4,64), Qwen1.5-MoE, T = 64: 128 us, 81 % of the byte floor"},
    {80, kNewest,       0,  0,    0,   28,    0,     {3, 2, 4, 2, 1, 0, 2, 0, 1},
     "H200, (3,4,64), Mixtral-8x7B, T = 64: 336 us, 83 % of the byte floor"},
    {kHopper, kHopper,  0,  0,    48,  kAny,  0,     {3, 6, 4, 2, 1, 0, 1, 0, 1},
     "H200, (3,4,64), Mixtral-8x7B, T = 256: 520 us, 54 % of the byte floor; T = 4096: 0.78x dense"},
    {80, kNewest,       0,  0,    0,   kAny,  0,     {3, 4, 4, 2, 1, 0, 1, 0, 1},
     "H200, (3,4,64), Qwen2-57B, T = 256: 520 us, 67 % of the byte floor"},
};
// clang-format on

}  // namespace samoyeds
