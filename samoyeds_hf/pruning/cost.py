"""What calibrated pruning will need: memory, and time on the machine that asks.

Operations are counted from shapes, leading terms only, and divided by the rate of a product that is
timed now; an estimate for deciding whether to start, not a promise.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from samoyeds_hf.models import reads_intermediate
from samoyeds_hf.pruning.decoder import Decoder
from samoyeds_hf.pruning.memory import peak_memory
from samoyeds_hf.pruning.operations import operations
from samoyeds_hf.pruning.recover import PASSES
from samoyeds_hf.report import format_bytes

if TYPE_CHECKING:
    from samoyeds_hf.plan import ConversionPlan
    from samoyeds_hf.pruning.layer import PruneSettings
    from samoyeds_hf.pruning.recover import BlockSettings

# Names, in configurations of transformers, of the number of experts that a token meets.
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token")
_PASSES = 2  # of all tokens through a layer, and one more for each stream of hidden states
_BACK = 3  # of a pass forward and back, to a pass forward
_MASKED_BYTES, _WHOLE_BYTES = 24, 20  # of an element that recovery by layers trains, see recover.py
_SIZE_ON_CPU, _SIZE_ON_GPU = 1024, 4096  # of the product that is timed


@dataclass(frozen=True)
class Cost:
    """An estimate; ``str`` is a line for ``samoyeds plan``."""

    device: torch.device
    operations: float  # multiplications and additions
    rate: float  # of them a second
    device_bytes: int  # one layer, its masks, and the more of pruning and recovery by layers
    host_bytes: int  # hidden states, and what experts were called with

    @property
    def seconds(self) -> float:
        """Of computing; reading and writing files comes on top."""
        return self.operations / self.rate

    def __str__(self) -> str:
        where = "the GPU" if self.device.type == "cuda" else "the CPU"
        return (
            f"calibration: about {_duration(self.seconds)} on {where} "
            f"({self.operations / 1e12:.3g} T operations at {self.rate / 1e12:.3g} T/s as measured "
            f"now), {format_bytes(self.device_bytes)} there, and {format_bytes(self.host_bytes)} "
            "of hidden states in memory"
        )


@dataclass(frozen=True)
class _Weight:
    """One weight of a layer: ``experts`` matrices ``[rows, k]``."""

    experts: int
    rows: int
    k: int
    tokens: float  # rows of input that its experts see together
    num_bytes: int
    kept: float  # share that is not pruned
    is_pruned: bool
    makes_up: bool  # for what the residual stream lacks: down of fused experts


def estimate(
    plan: ConversionPlan, settings: PruneSettings, num_tokens: int, device: torch.device
) -> Cost:
    """The cost of pruning with ``num_tokens`` tokens in all."""
    config = plan.model_config.get_text_config()
    top_k = next((int(getattr(config, name)) for name in _TOP_K if hasattr(config, name)), 1)
    layers = _weights_by_layer(plan, num_tokens, top_k)
    itemsize = plan.model.dtype.itemsize
    streams = 2 if settings.follows_dense else 1
    width = config.hidden_size * itemsize
    # of each stream what a layer gets and what its experts get, and what its output lacks
    kept = (2 * streams + settings.follows_output) * width
    return Cost(
        device=device,
        operations=sum(
            _operations(weight, settings) for weights in layers.values() for weight in weights
        ),
        rate=measure_rate(device),
        device_bytes=max(_device_bytes(weights, settings) for weights in layers.values()),
        host_bytes=num_tokens * (kept + top_k * (8 + itemsize)),
    )


def measure_rate(device: torch.device) -> float:
    """Operations a second of an fp32 product on a device; takes a fraction of a second."""
    size = _SIZE_ON_GPU if device.type == "cuda" else _SIZE_ON_CPU
    x = torch.randn(size, size, device=device)
    best = math.inf
    for _ in range(3):  # the first one loads a library
        start = time.perf_counter()
        float((x @ x)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _weights_by_layer(
    plan: ConversionPlan, num_tokens: int, top_k: int
) -> dict[int, list[_Weight]]:
    """The matrices of each layer up to the last that is pruned."""
    decoder = Decoder.find(plan.model, plan.patterns)
    last = max(decoder.layer_of(name) or 0 for name in plan.patterns)
    layers: dict[int, list[_Weight]] = {}
    for unit in plan.units:
        for name, spec in unit.outputs.items():
            index = decoder.layer_of(name)
            if index is None or index > last or len(spec.shape) < 2:
                continue
            is_stacked = len(spec.shape) == 3
            experts = spec.shape[0] if is_stacked else 1
            seen = num_tokens * (min(top_k, experts) if is_stacked else 1)
            *_, rows, k = spec.shape
            pattern = plan.patterns.get(name)
            is_pruned, kept = pattern is not None, pattern.density if pattern else 1.0
            makes_up = is_pruned and is_stacked and reads_intermediate(name)
            weight = _Weight(experts, rows, k, seen, spec.num_bytes, kept, is_pruned, makes_up)
            layers.setdefault(index, []).append(weight)
    return layers


def _operations(weight: _Weight, settings: PruneSettings) -> float:
    streams = 2 if settings.follows_dense else 1
    one_pass = 2 * weight.tokens * weight.rows * weight.k
    forward = (_PASSES + streams) * one_pass
    if settings.block is not None:
        forward += PASSES * (1 - settings.block.held_back) * _BACK * one_pass
    if not weight.is_pruned:
        return forward
    moments = 2 * weight.tokens * weight.k**2 * streams
    if settings.follows_output:
        forward += one_pass  # dense experts on the dense tokens, as the pruned model routes them
        moments += one_pass * weight.makes_up
    follow = 2.0 * weight.experts * weight.rows * weight.k**2 * (streams - 1)
    shape = (weight.experts, weight.rows, weight.k)
    pruning = operations(*shape, settings.method, settings.refine).total
    return forward + moments + follow + pruning


def _device_bytes(weights: list[_Weight], settings: PruneSettings) -> int:
    """One layer, the masks of its experts, and the moments and temporaries of one weight or what
    recovery trains, without activations.
    """
    held = sum(w.num_bytes for w in weights)
    held += sum(w.experts * w.rows * w.k for w in weights if w.is_pruned)
    if settings.follows_dense:  # dense gate and up stay until down is pruned
        held += max((w.num_bytes for w in weights if w.is_pruned), default=0)
    work = []
    for weight in weights:
        if weight.is_pruned:
            group = max(1, min(weight.experts, settings.moments_bytes // (4 * weight.k**2)))
            moments = 4 * group * weight.k**2
            if settings.follows_dense:
                moments += 4 * group * weight.k**2
            if settings.follows_output:
                moments += 4 * group * weight.k * weight.rows * weight.makes_up
            one = peak_memory(1, weight.rows, weight.k, settings.method, settings.refine)
            work.append(moments + one)
    if settings.block is not None:
        work.append(_recovery_bytes(weights, settings.block))
    return held + max(work, default=0)


def _recovery_bytes(weights: list[_Weight], settings: BlockSettings) -> int:
    """Masters with gradients, moments and places, what was there before, and one dense gradient."""
    trained = [w for w in weights if w.is_pruned or settings.train == "all"]
    training = sum(
        (_MASKED_BYTES if w.is_pruned else _WHOLE_BYTES) * w.kept * w.experts * w.rows * w.k
        for w in trained
    )
    return int(training) + max(w.num_bytes for w in trained)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
