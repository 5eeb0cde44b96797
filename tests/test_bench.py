"""The benchmarks of the kernels run from end to end, on tiny shapes and without a GPU."""

from __future__ import annotations

import csv
import ctypes
import importlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import plans
import pytest
import torch

from samoyeds_hf import SparsityPattern, validate
from samoyeds_hf.errors import BuildError
from samoyeds_hf.toolchain import Toolchain

BENCH = Path(__file__).parent.parent / "scripts" / "bench"
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """Imports a script of scripts/bench; afterwards none of their short names is left behind."""
    monkeypatch.syspath_prepend(BENCH)
    before = set(sys.modules)

    class Bench:
        def __getattr__(self, name: str) -> ModuleType:
            return importlib.import_module(name)

    yield Bench()  # type: ignore[misc]
    for name in set(sys.modules) - before:
        if (BENCH / f"{name}.py").exists():
            del sys.modules[name]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("text", ["1:2:32", "3:4:8", "2:4", "2:2:16"])
def test_random_weights_are_canonical(bench: ModuleType, text: str) -> None:
    pattern = SparsityPattern.parse(text)
    stored = bench.layers.random_stored((3, 16, 64), pattern, CPU)
    validate(stored, pattern, (3, 16, 64))


def test_targets(bench: ModuleType) -> None:
    def text(model: str, tokens: int, pattern: str = "1:2:128") -> str:
        return str(bench.targets.target_of(model, tokens, pattern))

    assert text("mixtral-8x7b", 64) == "3.0x, 75% of the floor"
    assert text("mixtral-8x7b", 256) == "None"  # nothing was asked for
    assert text("qwen1.5-moe", 4) == "2.5x"
    assert text("qwen1.5-moe", 256) == "3.5x, 65% of the floor"
    assert text("qwen3-30b-a3b", 1024) == "1.5x"
    assert text("mixtral-8x22b", 16384) == "12.3 ms"
    assert text("mixtral-8x22b", 8192) == "1.3x"
    assert text("mixtral-8x7b", 64, "2:4") == "None"
    for model in bench.layers.SHAPES:
        assert model in bench.targets.LARGE + bench.targets.FINE
        assert set(bench.targets.TIMES_MS[model]) == {4096, 16384}
    target = bench.targets.Target(3.0, 0.75)
    assert target.is_met(3.0, 0.75, 1.0)
    assert not target.is_met(3.1, 0.74, 1.0)
    assert not target.is_met(2.9, 0.9, 1.0)
    target = bench.targets.Target(time_ms=1.9)
    assert target.is_met(1.0, 0.1, 1900.0)
    assert not target.is_met(9.0, 0.9, 1900.1)


def test_targets_of_products(bench: ModuleType) -> None:
    targets = bench.targets
    for text in bench.bench_ssmm.CASES:
        target = targets.product_target_of(text, targets.TARGET_PATTERN)
        assert target.dense >= 2
    assert str(targets.product_target_of("14336x4096x4096", "1:2:128")) == (
        "2.5x dense, 1.7x cuSPARSELt"
    )
    assert str(targets.product_target_of("14336x4096x4096", "1:2:64")) == "0.8x 1:2:128"
    assert str(targets.product_target_of("14336x4096x4096", "2:4")) == "1.6x dense"
    assert targets.product_target_of("14336x4096x4096", "1:2:32") is None
    target = targets.ProductTarget(dense=2.5, cusparselt=1.7)
    assert target.is_met({"dense": 2.5, "cusparselt": 1.7, "target_pattern": None}) is True
    assert target.is_met({"dense": 2.5, "cusparselt": 1.6, "target_pattern": 1.0}) is False
    assert target.is_met({"dense": 2.5, "cusparselt": None, "target_pattern": 1.0}) is None
    assert target.is_met({"dense": 2.4, "cusparselt": None, "target_pattern": 1.0}) is False
    assert targets.ceiling_tflops(SparsityPattern.parse("1:2:64").density) == 3400
    assert targets.ceiling_tflops(SparsityPattern.parse("2:4").density) == 1700


def test_floors_are_those_of_the_format(bench: ModuleType) -> None:
    pattern = SparsityPattern.parse("1:2:128")
    shape = bench.layers.SHAPES["mixtral-8x7b"]
    dense = shape.expert_bytes(None)
    assert dense == 3 * 4096 * 14336 * 2
    bits = 16 * shape.expert_bytes(pattern) / dense
    assert bits == pytest.approx(4.53, abs=0.01)  # the number that format.py gives


def test_rows_measured_again_replace_the_old_ones(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    bench.record.merge_rows(path, [{"a": 1, "us": 5}, {"a": 2, "us": 6}], ("a",))
    bench.record.merge_rows(path, [{"a": 2, "us": 7, "new": "x"}], ("a",))
    assert rows_of(path) == [{"a": "1", "us": "5", "new": ""}, {"a": "2", "us": "7", "new": "x"}]


def test_writers_of_one_file_lose_no_row(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"

    def write(writer: int) -> None:
        for row in range(20):
            bench.record.merge_rows(path, [{"a": f"{writer}-{row}", "us": row}], ("a",))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert len(rows_of(path)) == 80


def test_plans_to_try_are_of_every_kernel(bench: ModuleType) -> None:
    assert plans.PlanNumbers._fields == bench.tune_plans.FIELDS
    assert [plans.Instance(*each) for each in bench.tune_plans.INSTANCES] == plans.INSTANCES
    for is_down in (False, True):
        found = [plans.PlanNumbers(*plan) for plan in bench.tune_plans.candidates(is_down)]
        assert len(found) == len(set(found)) == len(plans.INSTANCES) * (48 if is_down else 12)
        assert {plan.instance for plan in found} == set(plans.INSTANCES)
        assert is_down or {plan.splits for plan in found} == {1}


def test_experts(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = bench.layers.Shape(hidden=128, inner=64, experts=4, top_k=2)
    monkeypatch.setitem(bench.layers.SHAPES, "mixtral-8x7b", tiny)
    monkeypatch.setattr(bench.layers, "COLD_BYTES", 1e5)
    path = tmp_path / "experts_h200.csv"
    arguments = ["--device", "cpu", "--models", "mixtral-8x7b", "--tokens", "1", "64"]
    arguments += ["--patterns", "1:2:32", "2:4", "--out", str(path)]
    bench.bench_experts.main(arguments)
    bench.bench_experts.main(arguments)
    rows = rows_of(path)
    assert len(rows) == (4 + 2) + (3 + 2)  # batched_mm only where it copies few weights
    for tokens in ("1", "64"):
        dense = [r for r in rows if r["tokens"] == tokens and not r["pattern"]]
        assert max(float(row["x_best_dense"]) for row in dense) == 1
    ours = [row for row in rows if row["path"] == "samoyeds"]
    assert all(0 < float(row["relative_error"]) < 0.02 for row in ours)
    assert int(rows[0]["runs"]) > 1  # the weights of one token's experts fit in a cache
    pytest.importorskip("matplotlib")
    bench.plot.main([str(path)])
    assert path.with_suffix(".png").exists()


def test_experts_after_a_rest(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = bench.layers.Shape(hidden=128, inner=64, experts=4, top_k=2)
    monkeypatch.setitem(bench.layers.SHAPES, "mixtral-8x7b", tiny)
    monkeypatch.setattr(bench.layers, "COLD_BYTES", 1e5)
    monkeypatch.setattr(bench.bench_experts, "FIRST_RESTED", 64)
    clocks = {50: bench.timing.Clock(CPU), 0: bench.timing.Clock(CPU)}
    monkeypatch.setattr(bench.bench_experts, "clocks_of", lambda *_, **__: clocks)
    path = tmp_path / "experts_h200.csv"
    arguments = ["--device", "cpu", "--models", "mixtral-8x7b", "--patterns", "2:4"]
    bench.bench_experts.main([*arguments, "--tokens", "63", "64", "--out", str(path)])
    rows = rows_of(path)
    rests = {(row["tokens"], row["rest_ms"]) for row in rows}
    assert rests == {("63", "0"), ("64", "50"), ("64", "0")}
    for tokens, rest in rests:  # speeds are beside dense after the same rest
        case = [r for r in rows if (r["tokens"], r["rest_ms"]) == (tokens, rest)]
        best_us = min(float(row["p50_us"]) for row in case if not row["pattern"])
        for row in case:
            expected = pytest.approx(best_us, rel=0.01)
            assert float(row["x_best_dense"]) * float(row["p50_us"]) == expected
    pytest.importorskip("matplotlib")
    shown = bench.plot.rested(rows)
    assert {(row["tokens"], row["rest_ms"]) for row in shown} == {("63", "0"), ("64", "50")}


@pytest.mark.slow
def test_builds_beside_each_other(bench: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    """Each one's process has its own environment; here all of them run plain torch."""
    more = "--models qwen3-30b-a3b --tokens 3 --patterns 1:2:16 --rounds 2 --rest-ms 0"
    small = f"{more} --shrink 16 --device cpu".split()
    bench.compare_builds.main(["one=", "two=,OMP_NUM_THREADS=1", *small])
    out = capfd.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("qwen3")]
    assert line.startswith("qwen3-30b-a3b 1:2:16 T=3 ")
    assert next(cell for cell in line.split() if cell.endswith("x")) == "1.000x"
    assert "bits" not in line  # the same results
    with pytest.raises(RuntimeError, match=r"one: .* found 'half'"):
        bench.compare_builds.main(["one=", *small, "--patterns", "half"])


def test_what_a_build_is(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    build = bench.compare_builds.Build.parse("new=lib/x.so,A=1,B=")
    assert build.name == "new"
    assert build.variables == {"SAMOYEDS_HF_LIBRARY": "lib/x.so", "A": "1", "B": ""}
    for text in ("x.so", "=x.so", "new=x.so,A"):
        with pytest.raises(SystemExit):
            bench.compare_builds.parse_args([text])
        assert "a build is name=library[,VARIABLE=value...], found" in capsys.readouterr().err


def test_every_expert_meets_as_many_tokens(bench: ModuleType) -> None:
    tokens = bench.products.Product.parse("64x5x128x3").random_tokens(CPU)
    assert tokens.top_k_index.flatten().bincount().tolist() == [5, 5, 5] == tokens.counts
    assert tokens.offsets.tolist() == [5, 10, 15]
    assert tokens.sorted_by_expert().shape == (15, 128)


def test_products(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "ssmm_h200.csv"
    arguments = ["--device", "cpu", "--shapes", "64x24x256", "64x5x128x4"]
    arguments += ["--patterns", "1:2:128", "1:2:32", "2:4", "--out", str(path)]
    bench.bench_ssmm.main(arguments)
    bench.bench_ssmm.main(arguments)
    rows = rows_of(path)
    assert [(row["m"], row["n"], row["k"], row["groups"]) for row in rows] == [
        *[("64", "24", "256", "1")] * 4,
        *[("64", "5", "128", "4")] * 4,
    ]
    assert [row["path"] for row in rows] == [
        *["cuBLAS", "samoyeds", "samoyeds", "samoyeds"],
        *["F.grouped_mm", "samoyeds", "samoyeds", "samoyeds"],
    ]
    assert {row["x_dense"] for row in rows if not row["pattern"]} == {"1.000"}
    ours = [row for row in rows if row["path"] == "samoyeds"]
    assert all(0 <= float(row["relative_error"]) < 0.01 for row in ours)
    assert {row["x_1:2:128"] for row in ours if row["pattern"] == "1:2:128"} == {"1.000"}
    assert {row["x_cusparselt"] for row in rows} == {""}  # which a CPU does not run
    pytest.importorskip("matplotlib")
    bench.plot.main([str(path)])
    assert path.with_suffix(".png").exists()


def test_wrong_products_are_not_timed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = bench.products.linear
    monkeypatch.setattr(bench.products, "linear", lambda *args: linear(*args).roll(1, dims=-1))
    with pytest.raises(SystemExit, match="wrong results are not timed"):
        bench.bench_ssmm.main(["--device", "cpu", "--shapes", "64x24x128"])


def test_rows_of_products(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every path, with times made up: 100 us are 1000 TFLOP/s."""
    product = bench.products.Product(10_000, 500, 10_000)

    def took(time_us: float) -> object:
        return bench.bench_ssmm.Measured(bench.timing.Time(1, time_us, 999), 1700, 1e-3)

    found = {
        ("", "cuBLAS"): took(130),
        ("2:4", "cuSPARSELt"): took(90),
        ("1:2:128", "samoyeds"): took(50),
        ("1:2:64", "samoyeds"): took(65),
        ("", "cuBLAS kernel"): took(120),
        ("1:2:64", "samoyeds kernel"): took(60),
    }
    target = bench.targets.ProductTarget(dense=2.5, cusparselt=1.7)
    monkeypatch.setitem(bench.targets.PRODUCT_TARGETS, str(product), {"1:2:128": target})
    rows = [bench.bench_ssmm.row_of(product, found, *key, rest_ms=0, runs=3) for key in found]
    dense, rival, ours, finer, dense_alone, alone = rows
    assert dense["tflops"] == "769.2"
    assert (dense["x_cusparselt"], dense["share_of_ceiling"], dense["met"]) == ("0.692", "", "")
    assert (rival["x_dense"], rival["x_cusparselt"]) == ("1.444", "1.000")
    assert rival["share_of_ceiling"] == f"{1e5 / 90 / 1700:.3f}"
    assert (ours["x_dense"], ours["x_cusparselt"], ours["met"]) == ("2.600", "1.800", "yes")
    assert ours["share_of_ceiling"] == f"{2000 / 3400:.3f}"
    assert (finer["x_1:2:128"], finer["target"], finer["met"]) == ("0.769", "0.8x 1:2:128", "no")
    assert (dense_alone["x_dense"], dense_alone["includes"]) == ("1.000", "product")
    assert alone["x_dense"] == "2.000"  # of dense measured in the same way
    assert (alone["x_1:2:128"], alone["met"]) == ("", "")  # its kernel was not seen there

    pytest.importorskip("matplotlib")
    path = tmp_path / "ssmm_h200.csv"
    columns = dict.fromkeys(("gpu", "cuda", "torch", "transformers", "commit"), "none")
    bench.record.merge_rows(path, [{**row, **columns} for row in rows], bench.bench_ssmm.KEY)
    bench.plot.main([str(path)])
    assert path.with_suffix(".png").exists()


def test_kernels_of_paths_in_turn(bench: ModuleType) -> None:
    timing = bench.timing
    flush = f"void {timing.FLUSH_KERNEL}<512, 1>"
    kernels = [
        ("fill_kernel", 0.0, 1.0),  # before the first flush: not of a path
        (flush, 1.0, 8.0),
        (flush, 8.0, 9.0),  # its second half
        ("nvjet_dense", 11.0, 20.0),
        ("splitKreduce_kernel", 20.0, 23.0),
        ("nvjet_dense", 23.0, 33.0),
        (flush, 33.0, 40.0),
        ("void hopper_kernel<2>(SsmmArgs)", 47.0, 70.0),  # early: it waits for the copy until 50
        ("gather_kernel(Gather)", 41.0, 50.0),
        ("void hopper_kernel<2>(SsmmArgs)", 75.0, 100.0),
    ]
    dense, ours = timing.alone_us(reversed(kernels))
    assert dense == [("nvjet_dense", 9), ("splitKreduce_kernel", 3), ("nvjet_dense", 10)]
    assert timing.samples_of([dense], 2, ()) == [11.0]
    assert timing.samples_of([ours], 2, ("hopper_kernel", "ssmm_kernel")) == [20.0, 25.0]
    assert timing.samples_of([ours], 2, ("ssmm_kernel",)) == []


def test_paths_run_in_turn(bench: ModuleType) -> None:
    calls: list[str] = []
    paths = [[lambda name=name: calls.append(name)] * 2 for name in "ab"]
    first, _ = bench.timing.Clock(CPU).in_turn(paths)
    assert calls == ["a", "a", "b", "b"] * bench.timing.CPU_ROUNDS
    assert first.mhz is None
    assert first.time.p20 <= first.time.p50 <= first.time.p80


def test_the_faster_result_of_the_rival_counts(bench: ModuleType) -> None:
    def took(time_us: float) -> object:
        return bench.bench_ssmm.Measured(bench.timing.Time(1, time_us, 999))

    found = {
        ("", "cuBLAS"): took(3),
        ("2:4", "cuSPARSELt"): took(2),
        ("2:4", "cuSPARSELt, by columns"): took(1),
        ("2:4", "samoyeds"): took(4),
    }
    kept = bench.bench_ssmm.faster_rival(found)
    assert {key: each.time.p50 for key, each in kept.items()} == {
        ("", "cuBLAS"): 3,
        ("2:4", "cuSPARSELt"): 1,
        ("2:4", "samoyeds"): 4,
    }


RIVAL = """
#include <stdint.h>
#include <stdlib.h>
static int64_t sizes[5];
const char* products_create(int64_t m, int64_t n, int64_t k, int runs, int by_columns, void** out) {
  if (m % 16) return "m must be a multiple of 16";
  sizes[0] = m, sizes[1] = n, sizes[2] = k, sizes[3] = runs, sizes[4] = by_columns;
  *out = calloc(runs, sizeof(int));
  return 0;
}
const char* products_multiply(void* products, int i, void* stream) {
  if (i >= sizes[3] || stream != (void*)7) return "no such product";
  ++((int*)products)[i];
  return 0;
}
int64_t size(int i) { return sizes[i]; }
int times(void* products, int i) { return ((int*)products)[i]; }
void products_destroy(void* products) { free(products); }
"""


@pytest.fixture
def rival(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler, beside a package; it keeps its arguments in a file."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\necho "$@" > "$0.log"\n')
    nvcc.chmod(0o755)
    packages = tmp_path / "nvidia"
    for name in ("cusparselt/lib/libcusparseLt.so.0", "cu13/include/cusparse.h"):
        (packages / name).parent.mkdir(parents=True)
        (packages / name).touch()
    toolchain = Toolchain(nvcc, "13.0", Path("cmake"), "Ninja")
    monkeypatch.setattr(bench.cusparselt, "PACKAGES", packages)
    monkeypatch.setattr(bench.cusparselt, "find_toolchain", lambda: toolchain)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return nvcc


def test_rival_is_compiled(bench: ModuleType, rival: Path, tmp_path: Path) -> None:
    library = bench.cusparselt.compile_library(tmp_path, torch.device("cuda"))
    command = rival.with_suffix(".log").read_text().split()
    assert "-arch=sm_90" in command
    assert "-shared" in command
    assert str(BENCH / "cusparselt.cu") in command
    assert str(library) == command[command.index("-o") + 1]
    assert str(tmp_path / "nvidia" / "cu13" / "include") == command[command.index("-isystem") + 1]


def test_rival_that_is_missing_or_fails(bench: ModuleType, rival: Path, tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    with pytest.raises(BuildError, match="needs a CUDA device, found cpu"):
        bench.cusparselt.compile_library(tmp_path, CPU)
    rival.write_text("#!/bin/sh\necho no such header >&2; exit 1\n")
    with pytest.raises(BuildError, match=r"failed on cusparselt\.cu:\nno such header"):
        bench.cusparselt.compile_library(tmp_path, cuda)
    (tmp_path / "nvidia" / "cusparselt" / "lib" / "libcusparseLt.so.0").unlink()
    with pytest.raises(BuildError, match="needs the package that torch comes with, found none"):
        bench.cusparselt.compile_library(tmp_path, cuda)
    assert bench.bench_ssmm.compile_rival(tmp_path, cuda) is None  # the rest is measured without


def test_rival_multiplies(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The functions of cusparselt.cu, in C and with nothing behind them."""
    source, library = tmp_path / "rival.c", tmp_path / "librival.so"
    source.write_text(RIVAL)
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    functions = ctypes.CDLL(str(library))
    functions.times.argtypes = [ctypes.c_void_p, ctypes.c_int]
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7), raising=True
    )
    products = bench.cusparselt.Products(library, 128, 64, 256, 3, is_by_columns=True)
    assert [functions.size(i) for i in range(5)] == [128, 64, 256, 3, 1]
    steps = products.steps()
    assert len(steps) == 3
    for step in [*steps, steps[1]]:
        step()
    assert [functions.times(products._products, i) for i in range(3)] == [1, 2, 1]
    with pytest.raises(RuntimeError, match="m must be a multiple of 16"):
        bench.cusparselt.Products(library, 100, 64, 256, 3, is_by_columns=False)


@pytest.mark.parametrize("model", ["mixtral-8x7b", "qwen1.5-moe"])
def test_models(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    config_class, sizes = bench.random_models.CONFIGS[model]
    tiny = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "intermediate_size": 32,
    }
    sizes = {**sizes, **{key: tiny[key] for key in tiny if key in sizes}}
    monkeypatch.setitem(bench.random_models.CONFIGS, model, (config_class, sizes))
    monkeypatch.setattr(bench.model_memory, "CONTEXT", 32)
    path = tmp_path / "model_h200.csv"
    arguments = ["--device", "cpu", "--model", model, "--layers", "2", "--pattern", "1:2:32"]
    arguments += ["--batches", "1", "3", "--prefill-tokens", "9", "--new-tokens", "12"]
    arguments += ["--most", "5", "--temporary", str(tmp_path), "--out", str(path)]
    for side in ("dense", "sparse"):
        phases = ["prefill", "decode", "batch", "load"]
        bench.bench_model.main([*arguments, "--sides", side, "--phases", *phases])
    found = {(row["side"], row["phase"], row["batch"], row["metric"]) for row in rows_of(path)}
    for side in ("dense", "sparse"):
        assert {(side, "decode", batch, "tokens_per_s") for batch in ("1", "3")} <= found
        assert (side, "prefill", "1", "p50_ms") in found
        assert (side, "batch", "", "largest_batch") in found
    assert ("sparse", "load", "", "peak_gpu_gb") in found
    pytest.importorskip("matplotlib")
    bench.plot.main([str(path)])
    assert path.with_suffix(".png").exists()
