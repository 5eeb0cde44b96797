"""kernels/include/samoyeds/format.cuh says the same as samoyeds_hf.format."""

import shutil
import subprocess
from pathlib import Path

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

# Every function in device code: each must be usable in a kernel.
KERNEL = r"""
#include "samoyeds/format.cuh"
using namespace samoyeds;
__global__ void probe(Pattern pattern, int x, int* out) {
  out[0] = kept_rows(pattern, x) + values_per_row(x) + meta_bytes_per_row(x) + position(x, 1) +
           index_per_row(pattern, x) + index_column(pattern, x) + dense_row(pattern, x, 1) +
           dense_column(x, 4) + nibble_of(static_cast<Meta>(x), 1) + encode_nibble(0, x) +
           is_valid_nibble(x) + kFormatVersion + kGroup + kKeptPerGroup + kMaxM;
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


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_device_code(arch, tmp_path):
    source = tmp_path / "probe.cu"
    source.write_text(KERNEL)
    flags = ["-std=c++17", f"-arch={arch}", "-Werror", "all-warnings", f"-I{INCLUDE}"]
    command = ["nvcc", *flags, "-cubin", "-o", str(tmp_path / "probe.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
