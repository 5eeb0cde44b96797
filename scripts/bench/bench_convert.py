"""How fast a checkpoint is converted, and in how much memory.

    python scripts/bench/bench_convert.py                 # 4 GB in 8 shards
    python scripts/bench/bench_convert.py --gigabytes 1 --pattern 2:4

The checkpoint is made up: a Mixtral of half the width of 8x7B with random bf16 weights under the
Hub's names, as many layers as fit. It is converted in a fresh process. Megabytes are those of the
dense weights; the time includes reading, syncing and the index, and not the imports. Memory is that
of the process: VmHWM counts the pages of the mapped source too, which the kernel may take back at
any time; the anonymous part cannot be taken back and is sampled every few milliseconds. Both stand
beside the plan's estimate and the size of two fused tensors, which is what the converter may use.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from bench_encode import memory_of_process
from record import machine
from safetensors.torch import save_file

from samoyeds_hf import SamoyedsConfig
from samoyeds_hf.convert import DEFAULT_SHARD_SIZE, convert_checkpoint
from samoyeds_hf.plan import plan_conversion

RESULTS = Path(__file__).parent / "results" / "convert_cpu.csv"
HIDDEN, INNER, EXPERTS, VOCAB, HEADS, KV_HEADS = 2048, 7168, 8, 32000, 16, 4
SAMPLE_SECONDS = 0.005

Shapes = dict[str, tuple[int, ...]]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--pattern", default="1:2:64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temporary", type=Path, help="where the checkpoints are made")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)  # fresh process
    return parser.parse_args(argv)


# --- the checkpoint -----------------------------------------------------------------------------


def layer_shapes(layer: int) -> Shapes:
    name, kv_size = f"model.layers.{layer}", HIDDEN // HEADS * KV_HEADS
    shapes: Shapes = {f"{name}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qo"}
    shapes |= {f"{name}.self_attn.{p}_proj.weight": (kv_size, HIDDEN) for p in "kv"}
    shapes |= {f"{name}.{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
    shapes[f"{name}.block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        prefix = f"{name}.block_sparse_moe.experts.{expert}"
        shapes |= {f"{prefix}.{p}.weight": (INNER, HIDDEN) for p in ("w1", "w3")}
        shapes[f"{prefix}.w2.weight"] = (HIDDEN, INNER)
    return shapes


def size_of(shapes: Shapes) -> int:
    """Bytes in bf16."""
    return sum(2 * torch.Size(shape).numel() for shape in shapes.values())


def model_shapes(gigabytes: float) -> tuple[Shapes, int]:
    """Every tensor, and the number of layers that come nearest to the size."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    layers = max(1, round((gigabytes * 1e9 - size_of(shapes)) / size_of(layer_shapes(0))))
    for layer in range(layers):
        shapes |= layer_shapes(layer)
    return shapes, layers


def split(shapes: Shapes, shards: int) -> Iterator[Shapes]:
    """The tensors in order, in so many files of about the same size."""
    room, part = size_of(shapes) / shards, {}
    for name, shape in shapes.items():
        part[name] = shape
        if size_of(part) >= room:
            yield part
            part = {}
    if part:
        yield part


def write_checkpoint(directory: Path, shapes: Shapes, layers: int, shards: int) -> None:
    """One shard after the other; the weights are pieces of a long random vector."""
    config = transformers.MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_local_experts=EXPERTS,
        architectures=["MixtralForCausalLM"],
        dtype=torch.bfloat16,
    )
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    longest = max(torch.Size(shape).numel() for shape in shapes.values())
    pool = torch.randn(longest + 997, generator=generator).bfloat16()
    parts, weight_map = list(split(shapes, shards)), {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {}
        for position, (name, shape) in enumerate(part.items()):
            start = (number * 131 + position * 17) % 997
            tensors[name] = pool[start : start + torch.Size(shape).numel()].clone().view(shape)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": size_of(shapes)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


# --- the fresh process ----------------------------------------------------------------------------


class AnonymousPeak:
    """Context that samples the anonymous resident memory of this process."""

    def __enter__(self) -> AnonymousPeak:
        self.num_bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.num_bytes = max(self.num_bytes, memory_of_process("RssAnon"))

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def measure(source: Path, destination: Path, pattern: str) -> dict[str, float]:
    config = SamoyedsConfig(pattern)
    plan = plan_conversion(source, config, DEFAULT_SHARD_SIZE)  # imports the model's class
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before, anonymous = memory_of_process("VmRSS"), memory_of_process("RssAnon")
    start = time.perf_counter()
    with AnonymousPeak() as peak:
        convert_checkpoint(source, destination, config, progress=False)
    seconds = time.perf_counter() - start
    fused = max(spec.num_bytes for unit in plan.units for spec in unit.outputs.values())
    return {
        "dense_mb": plan.bytes_before / 1e6,
        "sparse_mb": plan.bytes_after / 1e6,
        "seconds": seconds,
        "mb_per_s": plan.bytes_before / 1e6 / seconds,
        "baseline_rss_mb": before / 1e6,
        "peak_rss_mb": memory_of_process("VmHWM") / 1e6,
        "growth_rss_mb": (memory_of_process("VmHWM") - before) / 1e6,
        "growth_anonymous_mb": (peak.num_bytes - anonymous) / 1e6,
        "plan_mb": plan.peak_memory / 1e6,
        "two_fused_mb": 2 * fused / 1e6,
    }


def bench(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Make the checkpoint, convert it in a fresh process, and say what that took."""
    shapes, layers = model_shapes(args.gigabytes)
    print(f"writing {size_of(shapes) / 1e9:.2f} GB in {args.shards} shards ...", flush=True)
    (folder / "dense").mkdir()
    write_checkpoint(folder / "dense", shapes, layers, args.shards)
    load = os.getloadavg()[0]
    command = [sys.executable, __file__, "--pattern", args.pattern, "--measure"]
    done = subprocess.run(
        [*command, str(folder / "dense"), str(folder / "sparse")],
        env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    return {
        "layers": layers,
        "hidden": HIDDEN,
        "inner": INNER,
        "experts": EXPERTS,
        "shards": args.shards,
        "dtype": "bfloat16",
        "pattern": args.pattern,
        "threads": args.threads,
        **{key: round(value, 1) for key, value in measured.items()},
        "load": round(load, 2),
        **machine(),
        "transformers": transformers.__version__,
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.measure:
        print(json.dumps(measure(*args.measure, args.pattern)))
        return
    with tempfile.TemporaryDirectory(dir=args.temporary) as folder:
        row = bench(args, Path(folder))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    print("\n".join(f"{key:20} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
