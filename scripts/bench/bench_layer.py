"""One expert layer, sparse beside the dense paths of Transformers: the same tokens and experts.

    python scripts/bench/bench_layer.py [--model mixtral-8x7b] [--device cuda] [--tokens 1 16 ...]

Wall clock with the device synchronised, because the sparse path without kernels asks the host which
experts are hit. Writes scripts/bench/results/layer_<device>.csv; run it again for other models and
it replaces their rows.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
import transformers
from record import machine
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from samoyeds_hf import SparsityPattern
from samoyeds_hf.compress import compress
from samoyeds_hf.experts import SamoyedsExperts

SHAPES = {  # hidden, inner, experts, top-k
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "qwen1.5-moe-a2.7b": (2048, 1408, 60, 4),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
}
DENSE_PATHS = ("eager", "grouped_mm", "batched_mm")
RESULTS = Path(__file__).parent / "results"


def dense_layer(hidden: int, inner: int, experts: int, top_k: int, device: str) -> MixtralExperts:
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
    )
    with torch.device(device):
        layer = MixtralExperts(config).to(torch.bfloat16).eval().requires_grad_(False)
        for weight in layer.parameters():
            weight.normal_(std=0.02)
    return layer


def sparse_layer(dense: MixtralExperts, pattern: SparsityPattern) -> SamoyedsExperts:
    names = ("gate_up_proj", "down_proj")
    layer = SamoyedsExperts(dense, dict.fromkeys(names, pattern))
    for name in names:
        stored, _ = compress(dense.get_parameter(name), pattern, "magnitude", name)
        layer.store(name, stored)
    return layer


def time_us(
    layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], device: str
) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of the wall clock: at least 5 runs, about 2 s in all."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    layer(*inputs)
    sync()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 2e6 and len(times) < 200):
        start = time.perf_counter()
        layer(*inputs)
        sync()
        times.append((time.perf_counter() - start) * 1e6)
    quantiles = statistics.quantiles(times, n=5)
    return quantiles[0], statistics.median(times), quantiles[3]


def measure(name: str, tokens: list[int], pattern: SparsityPattern, device: str) -> list[dict]:
    hidden, inner, experts, top_k = SHAPES[name]
    dense = dense_layer(hidden, inner, experts, top_k, device)
    sparse = sparse_layer(dense, pattern)
    rows = []
    for count in tokens:
        x = torch.randn(count, hidden, device=device, dtype=torch.bfloat16)
        scores = torch.rand(count, experts, device=device)
        weights, index = scores.softmax(-1).topk(top_k)
        inputs = (x, index, weights)
        runs = {}
        for path in DENSE_PATHS:
            if path == "batched_mm" and count * top_k > 64:
                continue  # it copies a weight for each (token, choice)
            dense.config._experts_implementation = path
            runs[f"dense {path}"] = time_us(dense, inputs, device)
        runs["sparse, plain torch"] = time_us(sparse, inputs, device)
        best = min(p50 for path, (_, p50, _) in runs.items() if path.startswith("dense"))
        for path, (p20, p50, p80) in runs.items():
            rows.append(
                {
                    "model": name,
                    "tokens": count,
                    "pattern": str(pattern) if path.startswith("sparse") else "",
                    "path": path,
                    "p20_us": f"{p20:.0f}",
                    "p50_us": f"{p50:.0f}",
                    "p80_us": f"{p80:.0f}",
                    "x_best_dense": f"{best / p50:.2f}",
                }
            )
            print(f"{name:18} T={count:<6} {path:20} {p50:10.0f} us  {best / p50:.2f}x best dense")
    return rows


def where(device: str) -> dict[str, str | int]:
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {**gpu, **machine(), "transformers": transformers.__version__}


def write(rows: list[dict], path: Path) -> None:
    """Replace the rows of the models measured; keep the others."""
    measured = {row["model"] for row in rows}
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["model"] not in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows([*kept, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="mixtral-8x7b")
    parser.add_argument("--pattern", default="1:2:128")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 4096])
    parser.add_argument("--out", type=Path, default=None, help="CSV to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pattern = SparsityPattern.parse(arguments.pattern)
    with torch.no_grad():
        rows = measure(arguments.model, arguments.tokens, pattern, arguments.device)
    columns = where(arguments.device)
    out = arguments.out or RESULTS / f"layer_{arguments.device}.csv"
    write([{**row, **columns} for row in rows], out)


if __name__ == "__main__":
    main()
