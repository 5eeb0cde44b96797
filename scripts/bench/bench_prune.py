"""Time and memory of calibrated pruning for models of real shapes, on one GPU.

    python scripts/bench/bench_prune.py                              # all models, all methods
    python scripts/bench/bench_prune.py --models mixtral-8x7b --methods admm+refine

Weights and tokens are random, so errors mean nothing here. One decoder layer is measured, with its
forward passes, moments and all of its expert weights, and multiplied by the model's number of MoE
layers: reading and writing files is not in it. The process's memory is the peak of its resident
set, the GPU's that of torch's allocator. Every result goes to results/prune_h200.csv when it is
there, in place of the one before.
"""

from __future__ import annotations

import argparse
import gc
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_models import dense_model
from record import gpu_machine, merge_rows
from transformers import MixtralConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from samoyeds_hf import SamoyedsConfig
from samoyeds_hf.hosts.deepseek_config import DeepseekConfig
from samoyeds_hf.pruning.decoder import Decoder
from samoyeds_hf.pruning.layer import PruneSettings
from samoyeds_hf.pruning.walk import InMemory, Walk
from samoyeds_hf.selection import select

RESULTS = Path(__file__).parent / "results" / "prune_h200.csv"
KEY = ("model", "pattern", "method", "samples", "length")


@dataclass(frozen=True)
class Model:
    """Shapes of a model; two layers of it are made."""

    config: type[PreTrainedConfig]
    sizes: dict[str, Any]
    moe_layers: int
    minutes: float | None = None  # asked of admm+refine for the whole model; wanda+refine a third


MODELS = {
    "deepseek-moe-16b": Model(
        DeepseekConfig,
        {
            "hidden_size": 2048,
            "moe_intermediate_size": 1408,
            "intermediate_size": 10944,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
        moe_layers=27,
        minutes=12,
    ),
    "qwen2-57b-a14b": Model(
        Qwen2MoeConfig,
        {
            "hidden_size": 3584,
            "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        moe_layers=28,
        minutes=20,
    ),
    "mixtral-8x7b": Model(
        MixtralConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        moe_layers=32,
        minutes=35,
    ),
    "mixtral-8x22b": Model(
        MixtralConfig,
        {
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
        },
        moe_layers=56,
        minutes=80,
    ),
    "qwen3-30b-a3b": Model(
        Qwen3MoeConfig,
        {
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
        moe_layers=48,
    ),
}
METHODS = ("wanda+refine", "sparsegpt", "admm+refine", "best", "best+permute")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--pattern", default="1:2:128")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--shrink", type=int, default=1, help="divide sizes, to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(argv)


def make_config(model: Model, shrink: int, length: int) -> PreTrainedConfig:
    """Two layers and a small vocabulary, of which pruning sees nothing."""
    sizes = {
        key: max(1, value // shrink) if key.endswith(("size", "heads")) else value
        for key, value in model.sizes.items()
    }
    return model.config(
        **sizes,
        num_hidden_layers=2,
        vocab_size=1024,
        max_position_embeddings=length,
        bos_token_id=1,
        eos_token_id=None,
    )


def measure(args: argparse.Namespace, name: str, method: str) -> dict[str, object]:
    """Prune the first of two layers."""
    device, model = torch.device(args.device), MODELS[name]
    torch.manual_seed(0)
    dense = dense_model(make_config(model, args.shrink, args.length), device)
    patterns = select(dense, SamoyedsConfig(args.pattern)).targets
    tokens = torch.randint(1024, (args.samples, args.length))
    chosen, *more = method.split("+")
    walk = Walk(
        InMemory(Decoder.find(dense, patterns)),
        patterns,
        tokens,
        PruneSettings(chosen, refine="refine" in more, permute="permute" in more),
    )
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = next(iter(walk))
    if is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    minutes = seconds * model.moe_layers / 60
    asked = None if model.minutes is None else model.minutes / (3 if chosen == "wanda" else 1)
    num_bytes = sum(weight.numel() * weight.element_size() for weight in result.layer.parameters())
    return {
        "model": name,
        "pattern": args.pattern,
        "method": method,
        "samples": args.samples,
        "length": args.length,
        "layer_s": f"{seconds:.4g}",
        **{
            f"{weight.name.rpartition('.')[2]}_s": f"{weight.seconds:.4g}"
            for weight in result.weights
        },
        "moe_layers": model.moe_layers,
        "model_min": f"{minutes:.4g}",
        "asked_min": "" if asked is None or chosen not in ("wanda", "admm") else f"{asked:.4g}",
        "gpu_gb": f"{torch.cuda.max_memory_allocated() / 1e9:.4g}" if is_cuda else "",
        # NOTE: of the process so far; the largest model comes last
        "host_gb": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.4g}",
        "layer_gb": f"{num_bytes / 1e9:.4g}",
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    machine = gpu_machine(torch.device(args.device))
    for name in args.models:
        for method in args.methods:
            row = measure(args, name, method)
            merge_rows(args.out, [{**row, **machine}], KEY)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            gc.collect()
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
