"""Weights in the kernels' order: exact both ways, and never seen by anything but the kernels.

No GPU is needed: emulated_kernels packs on the CPU.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated_kernels
import fragment_emulation
import pytest
import torch
from fragment_emulation import DENSE24, GENERAL, STEPPED, SWITCHED, Layout
from helpers import assert_same_bits, random_mask
from hypothesis import example, given, settings
from hypothesis import strategies as st

from samoyeds_hf import SparsityPattern, ops, packed, packed_ops
from samoyeds_hf.errors import KernelError, SamoyedsError
from samoyeds_hf.format import SparseWeight, encode
from samoyeds_hf.packed import PackedSpec

INCLUDE = Path(__file__).parents[1] / "kernels" / "include"
HALF = (torch.bfloat16, torch.float16)
BF16 = torch.bfloat16

# --- the order of the bytes ------------------------------------------------------------------


def random_stored(
    experts: int, rows: int, cols: int, text: str, dtype: torch.dtype = BF16, seed: int = 0
) -> SparseWeight:
    """Any 16 bits as values: NaN with payloads, infinities, denormals, -0.0."""
    rng = torch.Generator().manual_seed(seed)
    pattern = SparsityPattern.parse(text)
    shape = (experts, rows, cols)
    mask = random_mask(shape, pattern, rng)
    weight = torch.randint(-(1 << 15), 1 << 15, shape, generator=rng, dtype=torch.int16)
    return encode(weight.view(dtype), mask, pattern)


@st.composite
def weights(draw: Any) -> tuple[int, int, int, str]:
    """E, rows, cols and pattern: every kind, tails in rows and columns."""
    n, m = draw(
        st.sampled_from([(1, 1), (2, 2), (1, 2), (1, 4), (3, 4), (3, 5), (8, 16), (15, 16), (7, 9)])
    )
    switches = (n, m) in ((1, 2), (3, 4))
    v = 8 * draw(st.integers(1, 40)) if switches else 4 * draw(st.integers(1, 12))
    cols = v * draw(st.integers(1, max(1, 300 // v)))
    cols = cols if cols % 8 == 0 else 2 * cols
    rows = m * draw(st.integers(1, max(1, 40 // m)))
    text = "2:4" if n == m and draw(st.booleans()) else f"{n}:{m}:{v}"
    return draw(st.integers(1, 2)), rows, cols, text


@settings(max_examples=60)
@given(weights(), st.sampled_from(HALF), st.booleans(), st.integers(0, 1 << 20))
@example((1, 1, 8, "2:4"), BF16, False, 0)
@example((2, 33, 40, "2:4"), BF16, True, 0)  # an odd number of rows: gate and up do not separate
@example((1, 6, 64, "1:2:32"), BF16, True, 0)  # a block holds the last gate and the first up row
@example((2, 20, 72, "3:5:8"), BF16, True, 0)
@example((1, 34, 136, "1:2:136"), BF16, True, 0)  # V is no multiple of 32
@example((1, 64, 1408, "1:2:128"), BF16, True, 0)
@example((1, 32, 288, "1:2:96"), torch.float16, False, 0)  # Sub-Rows across blocks
@example((2, 72, 160, "3:4:32"), BF16, True, 0)  # 9 blocks of gate rows: one more than a half tile
@example((1, 68, 192, "3:4:64"), BF16, False, 0)  # 17 blocks: one more than a tile has rows
@example((1, 36, 96, "3:4:96"), torch.float16, True, 0)  # a block across gate and up
@example((1, 16, 288, "3:4:96"), BF16, False, 0)  # Sub-Rows across blocks of columns
def test_round_trip(
    weight: tuple[int, int, int, str], dtype: torch.dtype, is_gate_up: bool, seed: int
) -> None:
    """unpack(pack(x)) == x bit for bit, in a tensor of the size that the layout says."""
    experts, rows, cols, text = weight
    pattern = SparsityPattern.parse(text)
    stored = random_stored(*weight, dtype, seed)
    tensor = fragment_emulation.pack(stored, pattern, rows, is_gate_up)
    layout = Layout(rows, cols, pattern, is_gate_up)
    assert tensor.shape == (experts, layout.expert_bytes)
    assert layout.expert_bytes % 16 == 0
    again = fragment_emulation.unpack(tensor, pattern, (rows, cols), dtype, is_gate_up)
    assert_same_bits(again.values, stored.values)
    assert torch.equal(again.meta, stored.meta)
    assert torch.equal(again.index, stored.index)


@pytest.mark.parametrize(
    ("text", "rows", "is_gate_up", "kind", "is_interleaved"),
    [
        ("2:4", 64, True, DENSE24, True),
        ("2:4", 64, False, DENSE24, False),
        ("4:4:32", 40, True, DENSE24, True),
        ("4:4:32", 36, True, DENSE24, False),  # a block across gate and up
        ("1:2:32", 64, True, SWITCHED, True),
        ("1:2:32", 66, True, SWITCHED, False),
        ("3:4:32", 64, True, STEPPED, True),
        ("3:4:64", 72, False, STEPPED, False),
        ("3:4:32", 68, True, STEPPED, False),  # a block across gate and up
        ("1:2:16", 64, True, GENERAL, False),
        ("3:4:16", 64, True, GENERAL, False),
        ("2:3:32", 48, True, GENERAL, False),
        ("4:8:32", 64, True, GENERAL, False),
    ],
)
def test_kinds(text: str, rows: int, is_gate_up: bool, kind: str, is_interleaved: bool) -> None:
    layout = Layout(rows, 64, SparsityPattern.parse(text), is_gate_up)
    assert (layout.kind, layout.is_interleaved) == (kind, is_interleaved)
    held = [layout.kept_row(tile, row) for tile in range(layout.tiles) for row in range(16)]
    assert sorted(row for row in held if row is not None) == list(range(layout.kept))
    if is_interleaved:  # what one thread holds, 8 rows apart, is a gate and its up row
        half = layout.kept // 2
        assert all(held[i + 8] == held[i] + half for i in range(8))
    if kind == STEPPED:  # what one thread holds, three tiles one after another, is a block
        for start in range(0, len(held), 3 * 16):
            for row in range(start, start + 16):
                if held[row] is not None:
                    assert held[row] % 3 == 0
                    assert [held[row + 16], held[row + 32]] == [held[row] + 1, held[row] + 2]
                else:
                    assert held[row + 16] is held[row + 32] is None


# Packs one expert with nothing but the header: N M V rows cols is_gate_up as arguments, canonical
# tensors on stdin, the packed bytes on stdout.
PACKER = r"""
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include "samoyeds/fragment.cuh"
using namespace samoyeds;
template <class T> std::vector<T> read(std::size_t count) {
  std::vector<T> data(count);
  if (std::fread(data.data(), sizeof(T), count, stdin) != count) std::exit(1);
  return data;
}
int main(int, char** argv) {
  if (argv[1] == nullptr) { std::printf("%s", kLayoutName); return 0; }
  int a[6];
  for (int i = 0; i < 6; ++i) a[i] = std::atoi(argv[i + 1]);
  const Pattern pattern{a[0], a[1], a[2]};
  const int cols = a[4];
  const Layout l = make_layout(a[3], cols, pattern, a[5] != 0);
  const int columns = values_per_row(cols), groups = cols / kGroup;
  const int sub_rows = index_per_row(pattern, cols);
  const auto values = read<std::uint16_t>(l.kept * columns);
  const auto meta = read<Meta>(l.kept * meta_bytes_per_row(cols));
  const auto index = read<Index>(l.kept * sub_rows);
  std::vector<unsigned char> out(l.expert_bytes);
  for (int tile = 0; tile < l.tiles; ++tile)
    for (int row = 0; row < kTileRows; ++row) {
      const int kept = kept_row_of(l, tile, row);
      for (int block = 0; block < l.blocks; ++block) {
        unsigned char* at = out.data() + block_offset(l, tile, block);
        for (int c = 0; c < kBlockCols / 2; ++c) {
          const int column = block * kBlockCols / 2 + c;
          if (kept < 0 || column >= columns) continue;
          std::memcpy(at + value_offset(row, c), &values[kept * columns + column], 2);
        }
        for (int g = 0; g < kBlockCols / kGroup; ++g) {
          const int group = block * kBlockCols / kGroup + g;
          const bool exists = kept >= 0 && group < groups;
          const int byte = kept * meta_bytes_per_row(cols) + group / 2;
          const unsigned nibble = exists ? nibble_of(meta[byte], group) : encode_nibble(0, 1);
          std::uint32_t word;
          std::memcpy(&word, at + meta_offset(row, g), 4);
          word |= nibble << meta_shift(row, g);
          std::memcpy(at + meta_offset(row, g), &word, 4);
        }
        for (int step = 0; switches_rows(l) && step < kStepsPerBlock; ++step) {
          int column = block * kBlockCols + step * kStepCols;
          column = column < cols ? column : cols - 1;
          const unsigned bit = kept >= 0 && index[kept * sub_rows + column / pattern.v] ==
                                                switched_index(l, kept, 1);
          std::uint32_t word;
          std::memcpy(&word, at + kRowsOffset + 4 * step, 4);
          word |= bit << row;
          std::memcpy(at + kRowsOffset + 4 * step, &word, 4);
        }
      }
      for (int s = 0; l.kind == Kind::kGeneral && s < sub_rows; ++s)
        if (kept >= 0) out[index_byte_offset(l, tile, s, row)] = index[kept * sub_rows + s];
    }
  std::fwrite(out.data(), 1, out.size(), stdout);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
def test_header_says_the_same(tmp_path: Path) -> None:
    program = tmp_path / "pack"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}"]
    command = ["g++", *flags, "-x", "c++", "-", "-o", str(program)]
    subprocess.run(command, input=PACKER, text=True, check=True)
    assert subprocess.check_output([program], text=True) == fragment_emulation.NAME
    for text, rows, cols in [
        ("2:4", 40, 8),
        ("2:4", 66, 136),
        ("4:4:32", 40, 160),
        ("4:4:32", 36, 64),
        ("1:2:32", 64, 160),
        ("1:2:64", 66, 192),
        ("1:2:96", 64, 288),
        ("1:2:128", 144, 384),
        ("1:2:160", 48, 160),
        ("1:2:256", 32, 512),
        ("1:2:24", 24, 72),
        ("3:4:32", 72, 160),
        ("3:4:32", 68, 96),
        ("3:4:64", 128, 192),
        ("3:4:96", 136, 288),
        ("3:4:128", 64, 384),
        ("3:4:256", 8, 256),
        ("3:4:24", 48, 72),
        ("4:8:32", 48, 160),
        ("8:16:64", 96, 64),
        ("3:5:8", 40, 136),
        ("1:16:32", 64, 64),
        ("15:16:40", 48, 40),
        ("7:9:4", 18, 136),
    ]:
        pattern = SparsityPattern.parse(text)
        stored = random_stored(1, rows, cols, text)
        given = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in stored)
        for is_gate_up in (False, True):
            numbers = (pattern.n, pattern.m, pattern.sub_row(cols), rows, cols, int(is_gate_up))
            arguments = [str(program), *map(str, numbers)]
            done = subprocess.run(arguments, input=given, stdout=subprocess.PIPE, check=True)
            expected = fragment_emulation.pack(stored, pattern, rows, is_gate_up)
            assert done.stdout == expected.numpy().tobytes(), (text, rows, cols, is_gate_up)


# --- the operators ---------------------------------------------------------------------------

EXPERTS, TOP_K, WIDTH, INNER = 7, 2, 64, 96
UP, DOWN = "1:2:32", "4:8:16"
OPS = ("mlp", "up", "down", "linear")


def spec(experts: int, rows: int, cols: int, text: str, is_gate_up: bool = False) -> PackedSpec:
    return PackedSpec(experts, rows, cols, SparsityPattern.parse(text), BF16, is_gate_up)


def calls(tokens: int = 5) -> dict[str, tuple[Any, tuple[Any, ...], Any, tuple[Any, ...]]]:
    """By name: the operator on packed weights with its arguments, its canonical twin with its."""
    rng = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, WIDTH, generator=rng).to(BF16)
    index = torch.randint(-1, EXPERTS + 1, (tokens, TOP_K), generator=rng)
    routing = (index, torch.rand(tokens, TOP_K, generator=rng))
    rows = torch.randn(tokens * TOP_K, INNER, generator=rng).to(BF16)
    up = random_normal((EXPERTS, 2 * INNER, WIDTH), UP, rng)
    down = random_normal((EXPERTS, WIDTH, INNER), DOWN, rng)
    single = SparseWeight(*(tensor[0] for tensor in down))
    gate_up = emulated_kernels.pack(up, spec(EXPERTS, 2 * INNER, WIDTH, UP, is_gate_up=True))
    low = emulated_kernels.pack(down, spec(EXPERTS, WIDTH, INNER, DOWN))
    own = torch.ops.samoyeds
    return {
        "mlp": (
            own.packed_mlp,
            (hidden, *routing, gate_up, low, INNER, UP, DOWN),
            ops._moe_mlp_cuda,
            (hidden, *routing, *up, *down, UP, DOWN),
        ),
        "up": (
            own.packed_up,
            (hidden, index, gate_up, 2 * INNER, UP),
            ops._moe_up_cuda,
            (hidden, index, *up, UP),
        ),
        "down": (
            own.packed_down,
            (rows, *routing, low, WIDTH, DOWN),
            ops._moe_down_cuda,
            (rows, *routing, *down, DOWN),
        ),
        "linear": (
            own.packed_linear,
            (rows.view(tokens, TOP_K, INNER), low[:1], WIDTH, DOWN),
            ops._linear_cuda,
            (rows.view(tokens, TOP_K, INNER), *single, DOWN),
        ),
    }


def random_normal(shape: tuple[int, ...], text: str, rng: torch.Generator) -> SparseWeight:
    pattern = SparsityPattern.parse(text)
    weight = (torch.randn(shape, generator=rng) / shape[-1] ** 0.5).to(BF16)
    return encode(weight, random_mask(shape, pattern, rng), pattern)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, tokens: int) -> None:
    op, arguments, *_ = calls(tokens)[name]
    torch.library.opcheck(op, arguments)
    meta = [value.to("meta") if torch.is_tensor(value) else value for value in arguments]
    found, expected = op(*meta), op(*arguments)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("name", OPS)
def test_backward_is_refused(name: str) -> None:
    op, (x, *others), *_ = calls(3)[name]
    out = op(x.requires_grad_(), *others)
    with pytest.raises(SamoyedsError, match=r"are for inference, found a backward .*no_grad"):
        out.sum().backward()


@pytest.mark.parametrize("name", OPS)
def test_canonical_operators_pack_at_each_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.ops.samoyeds.moe_* do on CUDA; without kernels they take the plain path."""
    op, arguments, twin, canonical = calls()[name]
    expected = op(*arguments)
    packings: list[PackedSpec] = []
    emulated_kernels.install(monkeypatch)
    monkeypatch.setattr(
        packed,
        "pack",
        lambda stored, spec: packings.append(spec) or emulated_kernels.pack(stored, spec),
    )
    assert_same_bits(twin(*canonical), expected)
    assert [spec.is_gate_up for spec in packings] == {
        "mlp": [True, False],
        "up": [True],
        "down": [False],
        "linear": [False],
    }[name]
    packings.clear()
    monkeypatch.setattr(packed, "why_not", lambda spec, device: "there are none")
    monkeypatch.setattr(packed, "announce_plain_torch", lambda reason: None)
    assert_same_bits(twin(*canonical), expected)
    assert not packings


def bad_calls() -> Any:
    """(op, position of the argument, change, what the message says)."""

    def wider(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, x), dim=-1)

    def fewer(x: torch.Tensor) -> torch.Tensor:
        return x[1:]

    yield "mlp", 0, torch.Tensor.half, "share one dtype .* found torch.float16 and torch.bfloat16"
    yield "mlp", 0, fewer, "as many tokens, found 5 and 4"
    yield "mlp", 0, lambda x: x[None], "must have 2 dimensions"
    yield "mlp", 1, torch.Tensor.int, "top_k_index must be int64"
    yield "mlp", 2, wider, "shape of top_k_index"
    yield "mlp", 3, torch.Tensor.flatten, "must be a contiguous .E, P."
    yield "mlp", 3, lambda x: x.mT.contiguous().mT, "must be a contiguous"
    yield "mlp", 4, torch.Tensor.half, "share one dtype"
    yield "mlp", 4, fewer, "must have as many experts, found 7 and 6"
    yield "mlp", 1, lambda x: x.to("meta"), "one device, found the input on cpu"
    yield "mlp", 2, lambda x: x.to("meta"), "one device, found the input on cpu"
    yield "mlp", 4, lambda x: x.to("meta"), "one device, found the input on cpu"
    yield "up", 1, fewer, "as many tokens, found 4 and 5"
    yield "up", 2, torch.Tensor.flatten, "must be a contiguous"
    yield "down", 0, fewer, "a row for each .token, choice., 10, found .9, 96."
    yield "down", 2, fewer, "as many tokens"
    yield "down", 3, torch.Tensor.half, "share one dtype"
    yield "linear", 0, torch.Tensor.float, "share one dtype"
    yield "linear", 1, lambda x: torch.cat((x, x)), "and a weight .1, P., found .5, 2, 96. and"


@pytest.mark.parametrize(("name", "position", "change", "message"), list(bad_calls()))
def test_refuses(name: str, position: int, change: Any, message: str) -> None:
    arguments = list(calls()[name][1])
    arguments[position] = change(arguments[position])
    fake = {
        "mlp": packed_ops._packed_mlp_fake,
        "up": packed_ops._packed_up_fake,
        "down": packed_ops._packed_down_fake,
        "linear": packed_ops._packed_linear_fake,
    }[name]
    with pytest.raises(RuntimeError, match=message):
        fake(*arguments)


# --- calls of the library --------------------------------------------------------------------


class RecordedLibrary:
    """Takes every call for done, and keeps what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, tuple[Any, ...]] = {}
        self.statuses: dict[str, int] = {"samoyeds_workspace_bytes": 48}
        self.handle = self
        for module in (packed, packed_ops):
            monkeypatch.setattr(module, "loaded", lambda: self)
            monkeypatch.setattr(
                module, "launch_on", lambda device: packed.Launch(device=3, stream=77)
            )

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            # references to structures are replaced by the structures
            self.calls[name] = tuple(getattr(a, "_obj", a) for a in arguments)
            return self.statuses.get(name, 0)

        return call

    def check(self, status: int) -> None:
        if status:
            raise KernelError(f"status {status}")


def fields(structure: Any) -> dict[str, Any]:
    return {name: getattr(structure, name) for name, *_ in structure._fields_}


def test_what_a_launch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    library = RecordedLibrary(monkeypatch)
    _, arguments, *_ = calls()["mlp"]
    hidden, index, weights, gate_up, low, *_ = arguments
    out = packed_ops.packed_mlp._init_fn(*arguments)
    launch, routing, up, down, x, written = library.calls["samoyeds_moe_mlp"]
    assert (x, written) == (hidden.data_ptr(), out.data_ptr())
    assert fields(routing) == {
        "top_k_index": index.data_ptr(),
        "top_k_weights": weights.data_ptr(),
        "weights_dtype": 2,  # fp32
        "num_tokens": 5,
        "top_k": TOP_K,
    }
    assert fields(up) == {
        "packed": gate_up.data_ptr(),
        "num_bytes": gate_up.numel() * 2,
        "num_experts": EXPERTS,
        "rows": 2 * INNER,
        "cols": WIDTH,
        "n": 1,
        "m": 2,
        "v": 32,
        "dtype": 0,  # bf16
        "is_gate_up": 1,
    }
    assert (down.packed, down.rows, down.cols, down.is_gate_up) == (low.data_ptr(), 64, 96, 0)
    assert (launch.device, launch.stream, launch.workspace_bytes) == (3, 77, 48)
    assert launch.workspace
    assert not launch.plan
    assert library.calls["samoyeds_workspace_bytes"][2:] == (up, down)

    _, arguments, *_ = calls()["up"]
    packed_ops.packed_up._init_fn(*arguments)
    _, routing, up, x, _ = library.calls["samoyeds_moe_up"]
    assert (routing.top_k_weights, up.is_gate_up, x) == (None, 1, arguments[0].data_ptr())
    assert library.calls["samoyeds_workspace_bytes"][3] is None

    _, arguments, *_ = calls()["down"]
    out = packed_ops.packed_down._init_fn(*arguments)
    _, routing, down, x, written = library.calls["samoyeds_moe_down"]
    assert (down.rows, x, written) == (WIDTH, arguments[0].data_ptr(), out.data_ptr())
    assert out.shape == (5, WIDTH)
    assert library.calls["samoyeds_workspace_bytes"][2] is None

    _, arguments, *_ = calls()["linear"]
    out = packed_ops.packed_linear._init_fn(*arguments)
    launch, weight, x, num_rows, written = library.calls["samoyeds_linear"]
    assert (weight.num_experts, num_rows, written) == (1, 10, out.data_ptr())
    assert (launch.workspace_bytes, launch.workspace) == (0, None)
    library.statuses["samoyeds_linear_workspace_bytes"] = 80
    packed_ops.packed_linear._init_fn(*arguments)
    launch, weight, *_ = library.calls["samoyeds_linear"]
    assert library.calls["samoyeds_linear_workspace_bytes"][1:] == (weight, 10)
    assert launch.workspace_bytes == 80
    assert launch.workspace


@pytest.mark.parametrize("name", OPS)
def test_any_input_is_made_readable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turned, or at an address that is no multiple of 16 bytes; weights of any float dtype."""
    library = RecordedLibrary(monkeypatch)
    _, arguments, *_ = calls()[name]
    x = arguments[0]
    shifted = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    assert shifted.data_ptr() % 16
    for changed in (shifted, x.mT.contiguous().mT):
        op = {"mlp": packed_ops.packed_mlp, "up": packed_ops.packed_up}.get(name)
        op = op or {"down": packed_ops.packed_down, "linear": packed_ops.packed_linear}[name]
        given = [changed, *arguments[1:]]
        if name in ("mlp", "down"):
            given[2] = given[2].double()
        out = op._init_fn(*given)
        assert out.is_contiguous()
        entry = "samoyeds_linear" if name == "linear" else f"samoyeds_moe_{name}"
        called = library.calls[entry]
        address = called[2] if name == "linear" else called[-2]
        assert address % 16 == 0
        assert address != changed.data_ptr()
        if name in ("mlp", "down"):
            assert called[1].weights_dtype == 2


@pytest.mark.parametrize("name", OPS)
def test_no_tokens_call_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = RecordedLibrary(monkeypatch)
    _, arguments, *_ = calls(0)[name]
    attribute = getattr(packed_ops, f"packed_{name}")
    assert attribute._init_fn(*arguments).numel() == 0
    assert not library.calls


def test_refusals_of_the_library_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    library = RecordedLibrary(monkeypatch)
    _, arguments, *_ = calls()["mlp"]
    library.statuses["samoyeds_moe_mlp"] = 2
    with pytest.raises(KernelError, match="status 2"):
        packed_ops.packed_mlp._init_fn(*arguments)
    library.statuses["samoyeds_workspace_bytes"] = -1
    with pytest.raises(KernelError, match="status 1"):
        packed_ops.packed_mlp._init_fn(*arguments)
    _, arguments, *_ = calls()["linear"]
    library.statuses["samoyeds_linear_workspace_bytes"] = -2
    with pytest.raises(KernelError, match="status 2"):
        packed_ops.packed_linear._init_fn(*arguments)
    assert "samoyeds_linear" not in library.calls
    library.statuses["samoyeds_packed_bytes"] = -2
    with pytest.raises(KernelError, match="status 2"):
        packed.pack(random_stored(1, 16, 64, "2:4"), spec(1, 16, 64, "2:4"))


def test_pack_and_unpack_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    library = RecordedLibrary(monkeypatch)
    described = spec(2, 16, 64, "2:4")
    stored = random_stored(2, 16, 64, "2:4")
    library.statuses["samoyeds_packed_bytes"] = 2 * 2304
    tensor = packed.pack(stored, described)
    assert (tensor.shape, tensor.dtype) == ((2, 1152), BF16)
    launch, weight, *addresses = library.calls["samoyeds_pack"]
    assert (weight.packed, weight.num_bytes) == (tensor.data_ptr(), 2 * 2304)
    assert weight.v == 64  # a Sub-Row as long as the row
    assert addresses == [part.data_ptr() for part in stored]
    # NOTE: unpack asks for a GPU, because packed bytes elsewhere are nobody's.
    on_gpu: Any = SimpleNamespace(
        is_cuda=True,
        device=torch.device("cpu"),
        data_ptr=tensor.data_ptr,
        numel=tensor.numel,
        element_size=tensor.element_size,
    )
    again = packed.unpack(on_gpu, described)
    assert [part.shape for part in again] == [part.shape for part in stored]
    assert [part.dtype for part in again] == [part.dtype for part in stored]
    launch, weight, *addresses = library.calls["samoyeds_unpack"]
    assert addresses == [part.data_ptr() for part in again]
    assert launch.device == 3


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed.why_not(spec(1, 16, 64, "2:4"), torch.device("cpu")) == "the weights are on cpu"
    gpu = torch.device("cuda:0")
    full = PackedSpec(1, 16, 64, SparsityPattern.parse("2:4"), torch.float32, False)
    assert "the weights are torch.float32" in str(packed.why_not(full, gpu))
    monkeypatch.setattr(packed.library, "load", lambda: None)
    monkeypatch.setattr(packed.library, "unavailable_reason", lambda: "no nvcc")
    assert packed.why_not(spec(1, 16, 64, "2:4"), gpu) == "no nvcc"
    library = RecordedLibrary(monkeypatch)
    monkeypatch.setattr(packed.library, "load", lambda: library)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    packed._why_not_on.cache_clear()
    try:
        library.statuses["samoyeds_prepare"] = 3
        assert packed.why_not(spec(1, 16, 64, "2:4"), gpu) == "status 3"
        library.statuses.clear()
        assert packed.why_not(spec(1, 16, 64, "2:4"), gpu) == "status 3"  # asked once a GPU
        other = torch.device("cuda:1")
        assert packed.why_not(spec(1, 16, 64, "2:4"), other) is None
        assert library.calls["samoyeds_prepare"] == (1,)
        library.statuses["samoyeds_packed_bytes"] = -2
        assert packed.why_not(spec(1, 16, 64, "2:4"), other) == "status 2"
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(KernelError, match="run the model once before the capture"):
            packed.why_not(spec(1, 16, 64, "2:4"), torch.device("cuda:2"))
    finally:
        packed._why_not_on.cache_clear()
