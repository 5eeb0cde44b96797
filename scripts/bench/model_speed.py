"""The phases prefill and decode of scripts/bench/bench_model.py."""

from __future__ import annotations

import itertools
import statistics
import time
from functools import partial
from typing import Any

import torch
from layers import random_tokens
from session import GROUPED, Session
from timing import Clock, Time
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

PROMPT, SKIPPED_STEPS = 128, 8
BATCHED_PAIRS = 64  # batched_mm copies the weights of each pair's expert


def bench_prefill(session: Session, model: PreTrainedModel) -> None:
    times = {}
    for name in ("grouped_mm", "eager") if session.side == "dense" else ("",):
        path = session.use_experts(model, name)
        times[path] = prefill_ms(session, model)
    path = min(times, key=lambda name: times[name].p50)
    best = times[path]
    session.report("prefill", path, 1, p20_ms=best.p20, p50_ms=best.p50, p80_ms=best.p80)


def prefill_ms(session: Session, model: PreTrainedModel) -> Time:
    """Of five forwards, in milliseconds."""
    ids = session.random_ids(1, session.args.prefill_tokens)
    samples = []
    for _ in range(2 + 5):
        seconds = session.stopwatch()
        model(ids, use_cache=True, logits_to_keep=1)
        samples.append(seconds() * 1e3)
    return Time.of(samples[2:])


class StepClock(LogitsProcessor):
    """Notes when the logits of each step are there, on the device's own time line."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.is_cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())
        return scores

    def steps_ms(self) -> list[float]:
        """Of each decode step; the first mark is the end of the prefill."""
        pairs = itertools.pairwise(self.marks)
        if not self.is_cuda:
            return [(after - before) * 1e3 for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairs]


def bench_decode(session: Session, model: PreTrainedModel, batch: int) -> None:
    path = session.use_experts(model, fastest_experts(session, model, batch))
    # One static compilation a batch: a second one in a row would become a dynamic one.
    torch.compiler.reset()
    vars(model).pop("_compiled_call", None)
    clock = StepClock(session.device)
    settings = GenerationConfig(
        max_new_tokens=session.args.new_tokens,
        do_sample=False,
        cache_implementation="static",
        pad_token_id=0,
    )
    ids = session.random_ids(batch, PROMPT)
    seconds = session.stopwatch()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=settings,
        logits_processor=LogitsProcessorList([clock]),
    )
    total = seconds()
    counted = clock.steps_ms()[SKIPPED_STEPS:]
    step_ms = statistics.fmean(counted)
    session.report(
        "decode",
        path,
        batch,
        tokens_per_s=batch / step_ms * 1e3,
        step_p50_ms=statistics.median(counted),
        compile_s=total - step_ms * session.args.new_tokens / 1e3,
    )


def fastest_experts(session: Session, model: PreTrainedModel, batch: int) -> str:
    """grouped_mm or batched_mm, by the time of one layer of the dense model."""
    shape = session.shape
    if session.side == "sparse" or batch * shape.top_k > BATCHED_PAIRS:
        return GROUPED
    layers = [module for module in model.modules() if hasattr(module, "gate_up_proj")][:8]
    tokens = [random_tokens(shape, batch, session.device) for _ in layers]
    steps = [partial(layer, *t.inputs) for layer, t in zip(layers, tokens, strict=True)]
    times = {}
    for name in (GROUPED, "batched_mm"):
        model.set_experts_implementation(name)
        times[name] = Clock(session.device)(steps).p50
    return min(times, key=times.__getitem__)
