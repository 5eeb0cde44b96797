"""Headers that host compilers read too.

kernels/include/samoyeds/format.cuh says the same as samoyeds_hf.format, and panels.cuh the same as
plain loops written from its description.
"""

import shutil
import subprocess
from pathlib import Path

import fragment_emulation
import pytest
import torch

from samoyeds_hf import SparsityPattern, format

INCLUDE = Path(__file__).parents[1] / "kernels" / "include"

CONSTANTS = r"""
#include <cstdio>
#include "samoyeds/format.cuh"
int main() {
  using namespace samoyeds;
  std::printf("%d %d %d %d", kFormatVersion, kGroup, kKeptPerGroup, kMaxM);
  for (int nibble = -1; nibble < 256; ++nibble)
    if (is_valid_nibble(nibble)) std::printf(" %d", nibble);
}
"""

# Decodes one weight with nothing but the header: N M V m k as arguments, values (float32), meta
# and index on stdin, the dense weight on stdout.
DECODER = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "samoyeds/format.cuh"
using namespace samoyeds;
template <class T> std::vector<T> read(int count) {
  std::vector<T> data(count);
  if (std::fread(data.data(), sizeof(T), count, stdin) != data.size()) std::exit(1);
  return data;
}
int main(int, char** argv) {
  const Pattern pattern{std::atoi(argv[1]), std::atoi(argv[2]), std::atoi(argv[3])};
  const int m = std::atoi(argv[4]), k = std::atoi(argv[5]);
  const int rows = kept_rows(pattern, m), columns = values_per_row(k);
  const auto values = read<float>(rows * columns);
  const auto meta = read<Meta>(rows * meta_bytes_per_row(k));
  const auto index = read<Index>(rows * index_per_row(pattern, k));
  if (std::fgetc(stdin) != EOF) return 2;  // more bytes than the header's shapes say
  std::vector<float> dense(m * k);
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < columns; ++column) {
      const int group = column / kKeptPerGroup;
      const int nibble = nibble_of(meta[row * meta_bytes_per_row(k) + group / 2], group);
      const int sub_row = row * index_per_row(pattern, k) + index_column(pattern, column);
      dense[dense_row(pattern, row, index[sub_row]) * k + dense_column(column, nibble)] =
          values[row * columns + column];
    }
  std::fwrite(dense.data(), sizeof(float), dense.size(), stdout);
}
"""

# Where panels.cuh puts things: a line of numbers for each thing asked about on stdin.
PANELS = r"""
#include <cstdio>
#include <cstring>
#include "samoyeds/panels.cuh"
using namespace samoyeds;
int main() {
  std::printf("%d %d %d %d %d\n", kPanelCols, kPanelBytes, kPlaceAlign, kChunkCols, kPanelChunks);
  char what[16];
  int a, b, c;
  while (std::scanf("%15s %d %d %d", what, &a, &b, &c) == 4) {
    long long found = -1;
    if (!std::strcmp(what, "panel")) found = panel_offset(a, b, c);
    if (!std::strcmp(what, "chunk")) found = swizzled_chunk(a, b);
    if (!std::strcmp(what, "column")) found = first_column_of(a, b);
    std::printf("%lld\n", found);
  }
}
"""

# Every function in device code: each must be usable in a kernel.
KERNEL = r"""
#include "samoyeds/format.cuh"
#include "samoyeds/panels.cuh"
using namespace samoyeds;
__global__ void probe(Pattern pattern, int x, int* out) {
  out[0] = kept_rows(pattern, x) + values_per_row(x) + meta_bytes_per_row(x) + position(x, 1) +
           index_per_row(pattern, x) + index_column(pattern, x) + dense_row(pattern, x, 1) +
           dense_column(x, 4) + nibble_of(static_cast<Meta>(x), 1) + encode_nibble(0, x) +
           is_valid_nibble(x) + kFormatVersion + kGroup + kKeptPerGroup + kMaxM +
           static_cast<int>(panel_offset(x, x, x)) + swizzled_chunk(x, 1) + first_column_of(x, 32) +
           kPanelCols + kPanelBytes + kPlaceAlign + kChunkCols + kPanelChunks;
}
"""

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def compile_host(source: str, folder: Path) -> Path:
    program = folder / "program"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{INCLUDE}"]
    command = ["g++", *flags, "-x", "c++", "-", "-o", str(program)]
    subprocess.run(command, input=source, text=True, check=True)
    return program


@needs_compiler
def test_constants(tmp_path):
    printed = subprocess.check_output([compile_host(CONSTANTS, tmp_path)], text=True)
    version, group, kept, max_m, *nibbles = map(int, printed.split())
    assert version == format.FORMAT_VERSION
    assert group == format.GROUP
    assert kept == format.KEPT_PER_GROUP
    assert max_m == format.MAX_M
    assert tuple(nibbles) == format.VALID_NIBBLES


def random_mask(m: int, k: int, pattern: SparsityPattern, seed: int) -> torch.Tensor:  # [m, k]
    generator = torch.Generator().manual_seed(seed)
    v = pattern.sub_row(k)
    in_group = torch.rand(m, k // 4, 4, generator=generator).argsort(-1) < 2
    in_block = torch.rand(m // pattern.m, pattern.m, k // v, generator=generator).argsort(1)
    sub_rows = (in_block < pattern.n).reshape(m, k // v)
    return in_group.view(m, k) & sub_rows.repeat_interleave(v, dim=1)


@needs_compiler
def test_arithmetic(tmp_path):
    program = compile_host(DECODER, tmp_path)
    for text, m, k in [
        ("1:2:64", 6, 192),  # three Sub-Rows a row
        ("8:16:32", 48, 96),  # many slots, several blocks
        ("3:4:4", 8, 24),  # the smallest V: one group a Sub-Row
        ("2:4", 5, 40),  # no Sub-Row dropped, odd rows
    ]:
        pattern = SparsityPattern.parse(text)
        mask = random_mask(m, k, pattern, seed=m)
        weight = torch.randn(m, k, generator=torch.Generator().manual_seed(k))
        stored = format.encode(weight, mask, pattern)
        arguments = [pattern.n, pattern.m, pattern.sub_row(k), m, k]
        dense = subprocess.run(
            [program, *map(str, arguments)],
            input=b"".join(tensor.numpy().tobytes() for tensor in stored),
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        found = torch.frombuffer(bytearray(dense), dtype=torch.float32).view(m, k)
        torch.testing.assert_close(found, weight * mask, rtol=0, atol=0, msg=text)


class Panels:
    """The functions of panels.cuh: questions are collected, then asked all at once."""

    def __init__(self, folder: Path) -> None:
        self.program = compile_host(PANELS, folder)

    def ask(self, what: str, questions: list[tuple[int, ...]]) -> list[int]:
        lines = [" ".join(map(str, (what, *question, 0, 0)[:4])) for question in questions]
        printed = subprocess.check_output([self.program], input="\n".join(lines), text=True)
        constants, *answers = printed.splitlines()
        assert constants == "64 128 8 8 8"
        assert len(answers) == len(questions)
        return list(map(int, answers))


@pytest.fixture(scope="module")
def panels(tmp_path_factory):
    return Panels(tmp_path_factory.mktemp("panels"))


@needs_compiler
def test_panels(panels):
    """Each element of each place has bytes of its own, where the drawing has them."""
    places, columns = 24, 192
    memory = [None] * (places * columns)  # 2 bytes each
    for panel in range(columns // 64):  # the drawing, from left to right
        for place in range(places):
            for chunk in range(8):
                for column in range(8):
                    at = ((panel * places + place) * 8 + (chunk ^ place % 8)) * 8 + column
                    assert memory[at] is None
                    memory[at] = (place, panel * 64 + chunk * 8 + column)
    elements = [(place, column) for place in range(places) for column in range(columns)]
    panel_of = panels.ask("panel", [(column // 64, places, place) for place, column in elements])
    chunk_of = panels.ask("chunk", [(place, column % 64 // 8) for place, column in elements])
    for element, panel, chunk in zip(elements, panel_of, chunk_of, strict=True):
        assert memory[(panel + chunk) // 2 + element[1] % 8] == element


@needs_compiler
def test_panels_of_many_tokens(panels):
    """Offsets beyond 32 bits: 2^20 columns, 2^28 pairs, for each of 65535 experts 7 places more."""
    places = (1 << 28) + 65535 * 7
    questions = [(0, places, 0), (1, places, 0), ((1 << 14) - 1, places, places - 1)]
    expected = [(panel * places + place) * 128 for panel, places, place in questions]
    assert panels.ask("panel", questions) == expected


@needs_compiler
def test_chunks_are_swizzled_as_wgmma_reads_them(panels):
    """Bits 4 to 6 of an address change with its bits 7 to 9: 128-byte swizzle of the PTX ISA."""
    questions = [(place, chunk) for place in (*range(64), 2**31 - 1) for chunk in range(8)]
    found = panels.ask("chunk", questions)
    for (place, chunk), byte in zip(questions, found, strict=True):
        address = place * 128 + chunk * 16
        assert place * 128 + byte == address ^ (address >> 7 & 7) << 4
    for start in range(0, len(found), 8):  # a permutation of each place's chunks
        assert sorted(found[start : start + 8]) == list(range(0, 128, 16))


def stored_columns(layout: fragment_emulation.Layout) -> list[int]:
    """Dense rows of a weight in the order in which threads hold them, a tile after the other.

    Thread row g has the kept rows g and g + 8 of a tile. Each is two dense rows of (1, 2, V); where
    N = M two neighbouring thread rows exchange theirs, and store two of the first half together.
    """
    columns = []
    for tile in range(layout.tiles):
        for g in range(8):
            if layout.kind == fragment_emulation.SWITCHED:
                for row in (g, g + 8):
                    columns += [2 * layout.kept_row(tile, row), 2 * layout.kept_row(tile, row) + 1]
            elif g % 2 == 0:
                columns += [layout.kept_row(tile, row) for row in (g, g + 1, g + 8, g + 9)]
    return columns


@needs_compiler
@pytest.mark.parametrize(("text", "tile_columns"), [("1:2:64", 32), ("2:4", 16), ("4:4:8", 16)])
def test_columns_of_stored_results(text, tile_columns, panels):
    """Eight stored columns are four neighbours twice, the halves of a tile apart."""
    rows = 384
    layout = fragment_emulation.Layout(rows, 128, SparsityPattern.parse(text), is_gate_up=False)
    assert rows == layout.tiles * tile_columns
    stored = stored_columns(layout)
    assert sorted(stored) == list(range(rows))
    starts = range(0, rows, 8)
    first_of = panels.ask("column", [(start, tile_columns) for start in starts])
    covered = []
    for start, first in zip(starts, first_of, strict=True):
        low = list(range(first, first + 4))
        high = [column + tile_columns // 2 for column in low]
        assert [stored[start + place] for place in (0, 1, 4, 5)] == low
        assert [stored[start + place] for place in (2, 3, 6, 7)] == high
        covered += low + high
    assert sorted(covered) == list(range(rows))  # each once


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_device_code(arch, tmp_path):
    source = tmp_path / "probe.cu"
    source.write_text(KERNEL)
    flags = ["-std=c++17", f"-arch={arch}", "-Werror", "all-warnings", f"-I{INCLUDE}"]
    command = ["nvcc", *flags, "-cubin", "-o", str(tmp_path / "probe.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
