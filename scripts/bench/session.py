"""One side of one model in scripts/bench/bench_model.py, and where its results go."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from layers import Shape
from record import merge_rows
from transformers import PreTrainedConfig, PreTrainedModel

from samoyeds_hf import SamoyedsConfig

KEY = ("model", "side", "pattern", "modules", "phase", "batch", "metric")
# generate() changes grouped_mm into batched_mm for decoding; under another name it leaves it.
GROUPED = "grouped_mm_kept"


@dataclass
class Session:
    """What all phases share."""

    args: argparse.Namespace
    side: str
    config: PreTrainedConfig
    device: torch.device
    columns: dict[str, object]

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def sparsity(self) -> SamoyedsConfig:
        return SamoyedsConfig(self.args.pattern, modules=self.args.modules)

    @property
    def shape(self) -> Shape:
        config = self.config
        inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
        return Shape(config.hidden_size, inner, config.num_experts, config.num_experts_per_tok)

    def report(self, phase: str, path: str, batch: int | str = "", **values: float) -> None:
        """Write metrics, named with their unit, and print them."""
        case = {
            "model": self.args.model,
            "side": self.side,
            "pattern": self.args.pattern if self.side == "sparse" else "",
            "modules": " ".join(self.args.modules) if self.side == "sparse" else "",
            "phase": phase,
            "batch": batch,
        }
        rows = [
            {**case, "metric": name, "value": f"{value:.5g}", "path": path, **self.columns}
            for name, value in values.items()
        ]
        merge_rows(self.args.out, rows, KEY)
        numbers = ", ".join(f"{name} {value:.5g}" for name, value in values.items())
        what = f"{phase} {batch}".rstrip()
        print(f"{self.args.model} {self.side} {what} ({path}): {numbers}", flush=True)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def random_ids(self, *shape: int) -> torch.Tensor:
        return torch.randint(2, self.config.vocab_size, shape, device=self.device)

    def stopwatch(self) -> Callable[[], float]:
        """Seconds since now, when the device has finished."""
        self.synchronize()
        start = time.perf_counter()

        def seconds() -> float:
            self.synchronize()
            return time.perf_counter() - start

        return seconds

    def use_experts(self, model: PreTrainedModel, implementation: str) -> str:
        """Choose the dense side's experts implementation; returns what results call the path."""
        if self.side == "sparse":
            return "samoyeds"
        model.set_experts_implementation(implementation)
        return implementation.removesuffix("_kept")
