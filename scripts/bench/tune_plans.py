"""Every plan that the kernels accept for one layer and number of tokens, timed and sorted.

    python scripts/bench/tune_plans.py --models mixtral-8x7b --tokens 16 64
    python scripts/bench/tune_plans.py --models qwen3-30b-a3b --tokens 1 --products up --top 20

A tool for the heuristics: it calls the C functions with a plan of its own, and prints what the
heuristics choose beside the best. `up` and `down` time the two products alone (samoyeds_moe_up,
samoyeds_moe_down, each with its routing); `mlp-up` and `mlp-down` time the whole layer with only
that product's plan replaced, which is what counts where the products share their epilogue.

The same timing as bench_experts.py: R runs with weights of their own in a CUDA graph, flushed
before. All plans get a few replays, the best ones many. Plans that the library refuses are counted
and left out. --out keeps all of it as CSV.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from layers import (
    DTYPE,
    FLOOR_BYTES_PER_S,
    SHAPES,
    Shape,
    Tokens,
    layer_specs,
    num_runs,
    pack_layer,
    random_layer,
    random_tokens,
)
from record import gpu_machine, merge_rows
from timing import Clock, Run

from samoyeds_hf import SparsityPattern, library, packed
from samoyeds_hf.errors import KernelError
from samoyeds_hf.interface import KernelLibrary, Plan, Routing, Weight

PRODUCTS = ("up", "down", "mlp-up", "mlp-down")

INSTANCES = (  # m_frags, n_frags, warps_m, warps_n, warps_k, cluster: all of variants.cuh
    (1, 1, 1, 1, 8, 1),
    (1, 1, 2, 1, 4, 1),
    (1, 1, 4, 1, 2, 1),
    (1, 1, 8, 1, 1, 1),
    (1, 2, 8, 1, 1, 1),
    (1, 4, 8, 1, 1, 1),
    (2, 4, 8, 1, 1, 1),
    (2, 6, 8, 1, 1, 1),
    (2, 4, 4, 2, 1, 1),
    (4, 4, 4, 2, 1, 1),
    (3, 1, 1, 1, 8, 1),  # from here on for (3, 4, V) only
    (3, 1, 2, 1, 4, 1),
    (3, 1, 4, 1, 2, 1),
    (3, 1, 8, 1, 1, 1),
    (3, 1, 4, 2, 1, 1),
    (3, 2, 4, 2, 1, 1),
    (3, 4, 4, 2, 1, 1),
    (3, 6, 4, 2, 1, 1),
    (1, 24, 8, 1, 1, 2),  # the Hopper kernel, with full and with short tiles
    (1, 22, 8, 1, 1, 2),
)
STAGES, BLOCKS_PER_SM, SPLITS = (2, 3, 4, 5, 6, 8), (1, 2), (1, 2, 4, 8)

PlanValues = tuple[int, ...]  # in the order of FIELDS
FIELDS = (
    "m_frags",
    "n_frags",
    "warps_m",
    "warps_n",
    "warps_k",
    "stages",
    "blocks_per_sm",
    "splits",
    "cluster",
)


def candidates(is_down: bool) -> Iterator[PlanValues]:
    """Plans to try; the library refuses those that this GPU or this weight cannot run."""
    rest = itertools.product(STAGES, BLOCKS_PER_SM, SPLITS if is_down else (1,))
    for (*warps, cluster), numbers in itertools.product(INSTANCES, rest):
        yield *warps, *numbers, cluster


@dataclass
class Layer:
    """One copy of a layer with its tokens, as the C functions take it."""

    shape: Shape
    pattern: SparsityPattern
    tokens: Tokens
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.tokens.hidden.device
        stored = random_layer(self.shape, self.pattern, device)
        self.tensors["gate_up"], self.tensors["down"] = pack_layer(self.shape, self.pattern, stored)
        pairs = self.tokens.top_k_index.numel()
        for name, width in (("inner", self.shape.inner), ("both", 2 * self.shape.inner)):
            self.tensors[name] = torch.randn(pairs, width, device=device, dtype=DTYPE)
        self.tensors["out"] = torch.empty_like(self.tokens.hidden)

    def weight(self, name: str) -> Weight:
        gate_up, down = layer_specs(self.shape, self.pattern)
        spec = gate_up if name == "gate_up" else down
        return packed.point_to(spec.as_weight(), self.tensors[name])

    def routing(self) -> Routing:
        index, weights = self.tokens.top_k_index, self.tokens.top_k_weights
        return Routing(
            top_k_index=index.data_ptr(),
            top_k_weights=weights.data_ptr(),
            weights_dtype=packed.DTYPE_CODES[weights.dtype],
            num_tokens=index.shape[0],
            top_k=index.shape[1],
        )


@dataclass
class Caller:
    """Calls one product of a layer with a plan."""

    lib: KernelLibrary
    product: str

    @property
    def is_down(self) -> bool:
        return self.product.endswith("down")

    def chosen(self, layer: Layer) -> PlanValues:
        """What the heuristics choose."""
        plan, weight = Plan(), layer.weight("down" if self.is_down else "gate_up")
        count, top_k = layer.tokens.top_k_index.shape
        arguments = (ctypes.byref(weight), count, top_k, int(self.is_down), ctypes.byref(plan))
        self.lib.check(self.lib.handle.samoyeds_choose_plan(0, *arguments))
        return tuple(getattr(plan, name) for name in FIELDS)

    def step(self, layer: Layer, values: PlanValues | None) -> Run:
        """A call to time; the structures and the workspace are made here, once.

        Raises:
            KernelError: the library has no such plan for this layer.
        """
        plan = Plan(*values) if values else None
        routing = layer.routing()
        gate_up, down = layer.weight("gate_up"), layer.weight("down")
        device = layer.tokens.hidden.device
        launch = packed.launch_on(device)
        if plan is not None:
            name = "down_plan" if self.product == "mlp-down" else "plan"
            setattr(launch, name, ctypes.pointer(plan))
        uses = {"up": (gate_up, None), "down": (None, down)}.get(self.product, (gate_up, down))
        pointers = [weight and ctypes.byref(weight) for weight in uses]
        size = self.lib.handle.samoyeds_workspace_bytes(
            ctypes.byref(launch), ctypes.byref(routing), *pointers
        )
        self.lib.check(-min(size, 0))
        workspace = torch.empty(max(size, 16), dtype=torch.uint8, device=device)
        launch.workspace, launch.workspace_bytes = workspace.data_ptr(), workspace.numel()
        call = self._function(layer, [pointer for pointer in pointers if pointer is not None])
        keep = (plan, gate_up, down, workspace)  # the structures point to them

        def run(_: object = keep) -> None:
            launch.stream = torch.cuda.current_stream().cuda_stream  # a graph has its own
            self.lib.check(call(ctypes.byref(launch), ctypes.byref(routing)))

        return run

    def _function(self, layer: Layer, weights: list[Any]) -> Callable[[Any, Any], int]:
        handle, tensors = self.lib.handle, layer.tensors
        function, source, target = {
            "up": (handle.samoyeds_moe_up, layer.tokens.hidden, tensors["both"]),
            "down": (handle.samoyeds_moe_down, tensors["inner"], tensors["out"]),
        }.get(self.product, (handle.samoyeds_moe_mlp, layer.tokens.hidden, tensors["out"]))
        buffers = (source.data_ptr(), target.data_ptr())
        return lambda launch, routing: function(launch, routing, *weights, *buffers)


def sweep(caller: Caller, layers: list[Layer], top: int) -> tuple[list[dict], int]:
    """Rows of the plans that exist, fastest first, the heuristics' own marked; and the refused."""
    quick, thorough = Clock(torch.device("cuda"), 2, min_replays=3), Clock(torch.device("cuda"))
    times: dict[PlanValues, float] = {}
    chosen, refused = caller.chosen(layers[0]), 0
    for values in dict.fromkeys((chosen, *candidates(caller.is_down))):
        try:
            times[values] = quick([caller.step(layer, values) for layer in layers]).p50
        except KernelError:
            refused += 1
    best = sorted(times, key=times.__getitem__)[:top]
    for values in {*best, chosen} & times.keys():
        times[values] = thorough([caller.step(layer, values) for layer in layers]).p50
    rows = [
        {
            **dict(zip(FIELDS, values, strict=True)),
            "is_chosen": "yes" if values == chosen else "",
            "us": f"{times[values]:.2f}",
        }
        for values in sorted(times, key=times.__getitem__)
    ]
    return rows, refused


def floor_us(shape: Shape, pattern: SparsityPattern, layers: list[Layer], product: str) -> float:
    """Time to read the weights of the experts hit, of one product or of both."""
    sizes = {"up": (shape.gate_up,), "down": (shape.down,)}.get(product)
    num_bytes = sum(
        pattern.num_bytes(rows, cols, DTYPE.itemsize)
        for _, rows, cols in sizes or (shape.gate_up, shape.down)
    )
    hit = sum(layer.tokens.num_hit for layer in layers) / len(layers)
    return hit * num_bytes / FLOOR_BYTES_PER_S * 1e6


def print_rows(rows: list[dict], refused: int, floor: float, title: str, top: int) -> None:
    print(f"\n{title}: floor {floor:.1f} us, {len(rows)} plans, {refused} refused")
    print("  us      floor  " + " ".join(f"{name:>13}" for name in FIELDS))
    for place, row in enumerate(rows):
        if place >= top and not row["is_chosen"]:
            continue
        mark = "<- heuristics" if row["is_chosen"] else ""
        cells = " ".join(f"{row[name]:13}" for name in FIELDS)
        print(f"{float(row['us']):9.2f} {floor / float(row['us']):5.0%}  {cells} {mark}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["mixtral-8x7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16])
    parser.add_argument("--patterns", nargs="+", default=["1:2:128"])
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=["mlp-up", "mlp-down"])
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--out", type=Path, help="CSV of all plans")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    lib = library.load()
    if lib is None:
        raise SystemExit(f"Plans need the kernels, found none: {library.unavailable_reason()}")
    device = torch.device("cuda", 0)
    columns = gpu_machine(device)
    torch.manual_seed(0)
    for model, count, text in itertools.product(args.models, args.tokens, args.patterns):
        shape, pattern = SHAPES[model], SparsityPattern.parse(text)
        runs = num_runs(shape, count, pattern)
        layers = [Layer(shape, pattern, random_tokens(shape, count, device)) for _ in range(runs)]
        for product in args.products:
            rows, refused = sweep(Caller(lib, product), layers, args.top)
            title = f"{model} T={count} {text} {product}"
            floor = floor_us(shape, pattern, layers, product)
            print_rows(rows, refused, floor, title, args.top)
            case = {"model": model, "tokens": count, "pattern": text, "product": product}
            if args.out:
                rows = [{**case, **row, "floor_us": f"{floor:.2f}", **columns} for row in rows]
                merge_rows(args.out, rows, ("model", "tokens", "pattern", "product", *FIELDS))


if __name__ == "__main__":
    main()
