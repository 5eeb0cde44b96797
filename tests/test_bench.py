"""The benchmarks of the kernels run from end to end, on tiny shapes and without a GPU."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import plans
import pytest
import torch

from samoyeds_hf import SparsityPattern, validate

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
    assert text("mixtral-8x22b", 16384) == "1.3x"
    assert text("mixtral-8x7b", 64, "2:4") == "None"
    for model in bench.layers.SHAPES:
        assert model in bench.targets.LARGE + bench.targets.FINE
    target = bench.targets.Target(3.0, 0.75)
    assert target.is_met(3.0, 0.75)
    assert not target.is_met(3.1, 0.74)
    assert not target.is_met(2.9, 0.9)


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


def test_plans_to_try_are_of_every_kernel(bench: ModuleType) -> None:
    assert plans.PlanNumbers._fields == bench.tune_plans.FIELDS
    assert [plans.Instance(*each) for each in bench.tune_plans.INSTANCES] == plans.INSTANCES
    for is_down in (False, True):
        found = [plans.PlanNumbers(*plan) for plan in bench.tune_plans.candidates(is_down)]
        assert len(found) == len(set(found)) == len(plans.INSTANCES) * (40 if is_down else 10)
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
