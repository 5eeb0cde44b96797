"""What calibrated pruning and distillation will need: memory, and time on the machine that asks.

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
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.pruning.decoder import Decoder
from samoyeds_hf.pruning.memory import peak_memory
from samoyeds_hf.pruning.moments import Hessian
from samoyeds_hf.pruning.operations import operations
from samoyeds_hf.pruning.permute import TRIES, Down, pairing, search_of
from samoyeds_hf.pruning.recover import PASSES
from samoyeds_hf.report import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from samoyeds_hf.plan import ConversionPlan
    from samoyeds_hf.pruning.distill_settings import DistillSettings
    from samoyeds_hf.pruning.layer import PruneSettings
    from samoyeds_hf.pruning.recover import BlockSettings

# Names, in configurations of transformers, of the number of experts that a token meets.
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token")
_PASSES = 2  # of all tokens through a layer, and one more for each stream of hidden states
_BACK = 3  # of a pass forward and back, to a pass forward
_MASKED_BYTES, _WHOLE_BYTES = 24, 20  # of an element that recovery by layers trains, see recover.py
_MASKED_TRAINING, _WHOLE_TRAINING = 20, 16  # of one that distillation trains, see masters.py
_STATE_BYTES = 12  # of it in a file to go on from: master and moments
_SIZE_ON_CPU, _SIZE_ON_GPU = 1024, 4096  # of the product that is timed
_TOUCHED_ON_CPU, _TOUCHED_ON_GPU = 1 << 18, 1 << 22  # elements of what else is


@dataclass(frozen=True)
class _Time:
    """How long it takes to compute something."""

    device: torch.device
    operations: float  # multiplications and additions
    rate: float  # of them a second

    @property
    def seconds(self) -> float:
        """Of computing; reading and writing files comes on top."""
        return self.operations / self.rate

    @property
    def _text(self) -> str:
        where = "the GPU" if self.device.type == "cuda" else "the CPU"
        return (
            f"about {_duration(self.seconds)} on {where} ({self.operations / 1e12:.3g} T "
            f"operations at {self.rate / 1e12:.3g} T/s as measured now)"
        )


@dataclass(frozen=True)
class Cost(_Time):
    """An estimate; ``str`` is a line for ``samoyeds plan``."""

    device_bytes: int  # one layer, its masks, and the more of pruning and recovery by layers
    host_bytes: int  # hidden states, and what experts were called with
    search_seconds: float = 0.0  # for orders of neurons, see permute.py

    @property
    def seconds(self) -> float:
        """Of computing; reading and writing files comes on top."""
        return super().seconds + self.search_seconds

    def __str__(self) -> str:
        search = ""
        if self.search_seconds > 0:
            search = f", {_duration(self.search_seconds)} of it for the order of neurons"
        return (
            f"calibration: {self._text}{search}, {format_bytes(self.device_bytes)} there, and "
            f"{format_bytes(self.host_bytes)} of hidden states in memory"
        )


@dataclass(frozen=True)
class DistillationCost(_Time):
    """An estimate of a distillation; ``str`` is a line for ``samoyeds plan``."""

    device_bytes: int  # both models and what training keeps; activations come on top
    host_bytes: int  # what is trained as it was
    disk_bytes: int  # beside the output, until that is there: the pruned checkpoint, and two states

    def __str__(self) -> str:
        return (
            f"distillation: {self._text}, {format_bytes(self.device_bytes)} and activations there, "
            f"{format_bytes(self.host_bytes)} in memory, and until it is done "
            f"{format_bytes(self.disk_bytes)} more of disk"
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
    config, top_k = plan.model_config.get_text_config(), _top_k(plan)
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
        search_seconds=_search_seconds(plan, settings, device) if settings.permute else 0.0,
    )


def estimate_distillation(
    plan: ConversionPlan,
    settings: DistillSettings,
    samples: int,
    sequence_length: int,
    device: torch.device,
) -> DistillationCost:
    """The cost of distilling what the plan makes, on so many sequences."""
    config, top_k = plan.model_config.get_text_config(), _top_k(plan)
    specs = [spec for unit in plan.units for spec in unit.outputs.values()]
    counts = {spec.name: math.prod(spec.shape) for spec in specs}
    ends = _embeddings(plan.model)
    used = config.vocab_size * config.hidden_size  # the head; what is looked up costs nothing
    for spec in specs:
        if len(spec.shape) < 2 or spec.name in ends:
            continue
        met = min(top_k, spec.shape[0]) / spec.shape[0] if len(spec.shape) == 3 else 1
        used += int(counts[spec.name] * met)
    unmasked = counts.keys() - plan.patterns.keys() if settings.train == "all" else set()
    whole = sum(counts[name] for name in unmasked)
    masked = sum(counts[name] * pattern.density for name, pattern in plan.patterns.items())
    itemsize = 2 if device.type == "cuda" else 4  # as both models are loaded
    models = 2 * itemsize * sum(counts.values())
    gradient = itemsize * max(counts[name] for name in unmasked | plan.patterns.keys())
    seen = settings.steps * settings.batch_size * (1 + _BACK)
    # before and after, and at most two checks meanwhile
    seen += settings.num_held_back(samples) * 2 * (4 if settings.backtrack else 2)
    return DistillationCost(
        device=device,
        operations=2.0 * used * seen * sequence_length,
        rate=measure_rate(device),
        device_bytes=models + gradient + int(_MASKED_TRAINING * masked + _WHOLE_TRAINING * whole),
        host_bytes=int(4 * (masked + whole)),
        disk_bytes=plan.disk_need + int(2 * _STATE_BYTES * (masked + whole)),
    )


def _embeddings(model: PreTrainedModel) -> set[str]:
    """Names of the weights at both ends, which may be one."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(module.weight) for module in modules if module is not None}
    return {
        name
        for name, weight in model.named_parameters(remove_duplicate=False)
        if id(weight) in weights
    }


def _top_k(plan: ConversionPlan) -> int:
    """How many experts a token meets."""
    config = plan.model_config.get_text_config()
    return next((int(getattr(config, name)) for name in _TOP_K if hasattr(config, name)), 1)


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


def measure_search(device: torch.device) -> tuple[float, float]:
    """Seconds of a search for orders of neurons: of an operation, as of a small search, and of an
    element that one reads or writes.
    """

    def best(run: Callable[[], torch.Tensor]) -> float:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            float(run().flatten()[0])
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    pattern, hidden, neurons = SparsityPattern(1, 2, 32), 32, 128
    gate_up = torch.randn(1, 2 * neurons, hidden, device=device)  # [E, 2I, H]
    down = Down(gate_up[:, :neurons].mT, pattern, torch.ones(1, neurons, device=device))
    hessian = Hessian(
        matrix=torch.eye(hidden, device=device).unsqueeze(0),
        dead=torch.zeros(1, hidden, dtype=torch.bool, device=device),
        tokens=torch.ones(1, dtype=torch.int64, device=device),
        notes=((),),
    )
    tries = 4
    calls = search_of(1, neurons, hidden, pattern, pattern).calls * tries / TRIES
    call = best(lambda: pairing(gate_up, pattern, hessian, down=down, tries=tries)) / calls
    count, size = 20, _TOUCHED_ON_GPU if device.type == "cuda" else _TOUCHED_ON_CPU
    few, many = (torch.randn(2, n, device=device).unbind() for n in (1, size))

    def compare(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for _ in range(count):
            found = torch.maximum(x, y)
        return found

    touching = best(lambda: compare(*many)) - best(lambda: compare(*few))
    return call, max(0.0, touching) / (count * 3 * size)


def _search_seconds(plan: ConversionPlan, settings: PruneSettings, device: torch.device) -> float:
    """Of the search for orders of the neurons of fused experts."""
    call, element = measure_search(device)
    shapes = {spec.name: spec.shape for unit in plan.units for spec in unit.outputs.values()}
    total = 0.0
    for name, pattern in plan.patterns.items():
        experts, *sizes = shapes[name]
        if len(sizes) != 2 or reads_intermediate(name):
            continue
        beside = name.rpartition(".")[0] + "."
        down = next(
            other
            for other in plan.patterns
            if other.startswith(beside) and reads_intermediate(other)
        )
        neurons, hidden = sizes[0] // 2, sizes[1]
        group = _group_of(experts, hidden, settings)
        search = search_of(group, neurons, hidden, pattern, plan.patterns[down])
        rounds = -(-experts // group)
        total += rounds * (search.calls * call + search.elements * element)
    return total


def _group_of(experts: int, k: int, settings: PruneSettings) -> int:
    """How many of them have their moments in memory together."""
    return max(1, min(experts, settings.moments_bytes // (4 * k**2)))


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
            group = _group_of(weight.experts, weight.k, settings)
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
