"""How a product without routing is cut into tiles of tokens, which needs no GPU to be found out."""

from __future__ import annotations

import heapq
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stub_kernels import needs_compiler
from test_kernel_headers import compile_host

STEP, MAX_GROUP = 16, 8

# A line of sizes, and when their items end, for each line of a problem on stdin.
PROGRAM = r"""
#include <cstdio>
#include "samoyeds/tile_sizes.hpp"
using namespace samoyeds;
int main() {
  TileProblem p;
  while (std::scanf("%d %d %d %d %d %d %d", &p.num_rows, &p.most_tokens, &p.step, &p.parts,
                    &p.blocks, &p.slab_tiles, &p.num_clusters) == 7) {
    const TileSizes s = best_sizes(p);
    std::printf("%d %d %d %d %lld\n", s.large, s.num_large, s.small, s.num_small,
                static_cast<long long>(*end_of_items(p, s, INT64_MAX)));
  }
}
"""


class Problem(NamedTuple):
    rows: int
    parts: int  # of four slabs, 512 dense rows
    blocks: int  # of k
    slab_tiles: int = 4  # of kept rows; 8: N = M
    most_tokens: int = 192  # of a tile
    clusters: int = 66  # of an H200

    def tiles(self, large: int, num_large: int, small: int, num_small: int) -> list[int]:
        """Tokens of each."""
        found = [large] * num_large
        for _ in range(num_small):
            found.append(min(small, self.rows - sum(found)))
        return found

    def end(self, tiles: list[int]) -> int:
        """When each item has been taken by the cluster that was free first."""
        free_at = [0] * self.clusters
        for tokens in tiles:
            multiplied = min(-(-tokens // STEP) * STEP, self.most_tokens)
            block = max(353 + self.slab_tiles * multiplied, 150 * self.slab_tiles)
            for _ in range(self.parts):
                clocks = self.blocks * block + 3000
                heapq.heapreplace(free_at, free_at[0] + clocks)
        return max(free_at)


Found = tuple[tuple[int, int, int, int], int]
Ask = Callable[[Problem], Found]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    program: Path = compile_host(PROGRAM, tmp_path_factory.mktemp("tile_sizes"))

    def ask(problem: Problem) -> Found:
        rows, parts, blocks, slab_tiles, most_tokens, clusters = problem
        line = " ".join(map(str, (rows, most_tokens, STEP, parts, blocks, slab_tiles, clusters)))
        *sizes, end = subprocess.check_output([program], input=line, text=True).split()
        large, num_large, small, num_small = map(int, sizes)
        return (large, num_large, small, num_small), int(end)

    return ask


@needs_compiler
@given(
    problem=st.builds(
        Problem,
        st.integers(1, 5000),
        st.integers(1, 60),
        st.integers(1, 120),
        st.sampled_from([4, 8]),
        st.sampled_from([192, 200, 208]),
        st.integers(1, 70),
    )
)
def test_any_product(ask: Ask, problem: Problem) -> None:
    sizes, end = ask(problem)
    large, _, small, num_small = sizes
    tiles = problem.tiles(*sizes)
    assert sum(tiles) == problem.rows
    assert min(tiles) > 0  # none is left empty
    assert max(tiles) <= problem.most_tokens
    for tokens in (large, small):  # tiles end where boxes do, or are the largest
        assert tokens % STEP == 0 or tokens == problem.most_tokens
    assert 0 <= num_small <= MAX_GROUP  # the small ones are one group
    assert end == problem.end(tiles)
    most = problem.most_tokens
    for tokens in {most, *range(STEP, most, STEP)} - set(range(most // 2)):
        # at least as good as one size
        full, rest = divmod(problem.rows, tokens)
        assert end <= problem.end([tokens] * full + ([rest] if rest else []))


@needs_compiler
@pytest.mark.parametrize(
    ("problem", "sizes"),
    [
        # 14336 x 4096 x 4096, of which wide tiles end with the ninth round; and where N = M
        (Problem(4096, 28, 32), (192, 19, 112, 4)),
        (Problem(4096, 28, 32, most_tokens=200), (200, 13, 192, 8)),
        (Problem(4096, 28, 32, slab_tiles=8, most_tokens=208), (208, 13, 176, 8)),
        (Problem(4224, 33, 32, slab_tiles=8, most_tokens=208), (192, 22, 192, 0)),  # whole rounds
        (Problem(1024, 28, 32), (192, 2, 128, 5)),  # 14336 x 1024 x 4096: three rounds
        (Problem(4096, 8, 112), (176, 16, 160, 8)),  # 4096 x 4096 x 14336
        (Problem(5, 1, 1), (192, 0, 16, 1)),  # one item
        (Problem(192 * 66, 1, 1), (192, 66, 192, 0)),  # one round
    ],
)
def test_known_products(ask: Ask, problem: Problem, sizes: tuple[int, int, int, int]) -> None:
    assert ask(problem)[0] == sizes


@needs_compiler
def test_most_rows(ask: Ask) -> None:
    """2^28 rows of 65536 x 65536, the most that the interface takes, in no time."""
    problem = Problem((1 << 28) - 1, 128, 512)
    sizes, _ = ask(problem)
    large, num_large, small, num_small = sizes
    rest = problem.rows - large * num_large - small * (num_small - 1)
    assert 0 < rest <= small
