"""How long a step takes on the device, with cold caches."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

FLUSH_BYTES = 1 << 30  # many times the 60 MB L2 of an H200; takes about 0.25 ms to read
MIN_REPLAYS, MAX_REPLAYS = 12, 50
LOAD_US = 50e3  # under which the clock is read

Run = Callable[[], object]


@dataclass(frozen=True)
class Time:
    """Microseconds of one step: 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Time:
        quantiles = statistics.quantiles(samples, n=5)
        return cls(quantiles[0], statistics.median(samples), quantiles[3])


class Clock:
    """Times steps. On CUDA one graph holds them all, and a sample is a replay's time by events.

    Each step is to work on weights of its own, so that none of them finds its weights in the L2.
    Before each replay 1 GB is read: nothing of the replay before is left in the L2, and no dirty
    lines are written back during the next one, as they would be after a fill. The launch of the
    graph hides behind that read. On a CPU the steps run one by one under a wall clock.
    """

    def __init__(
        self, device: torch.device, budget_ms: float = 60, min_replays: int = MIN_REPLAYS
    ) -> None:
        self.device, self.budget_ms, self.min_replays = device, budget_ms, min_replays
        elements = FLUSH_BYTES // 4 if device.type == "cuda" else 0
        self._flush = torch.ones(elements, dtype=torch.int32, device=device)

    def __call__(self, steps: Sequence[Run]) -> Time:
        if self.device.type != "cuda":
            return self._wall_clock(steps)
        graph = capture(steps)
        self._replay_us(graph)
        num_replays = self._num_replays(self._replay_us(graph))
        samples = [self._replay_us(graph) / len(steps) for _ in range(num_replays)]
        return Time.of(samples)

    def kernel(self, steps: Sequence[Run], names: Sequence[str]) -> Time | None:
        """Of the kernel alone that each step has with one of ``names``, by the profiler (CUPTI).

        The steps are launched one by one, in the same order and behind the same flush; what an
        earlier kernel of the step has left in the L2 is there. None where no such kernel is seen.
        """
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(self.min_replays):
                self._flush.sum()
                for step in steps:
                    step()
            torch.cuda.synchronize()
        samples = alone_us(
            (
                (event.name, event.time_range.start, event.time_range.end)
                for event in profiled.events()
                if event.device_type == DeviceType.CUDA
            ),
            names,
        )
        return Time.of(samples) if len(samples) >= self.min_replays else None

    def mhz(self, steps: Sequence[Run], step_us: float) -> int | None:
        """Clock of the SMs while the steps run on, each of them about ``step_us`` long."""
        if sm_clock_mhz(self.device) is None:
            return None
        for _ in range(math.ceil(LOAD_US / (step_us * len(steps)))):
            for step in steps:
                step()
        mhz = sm_clock_mhz(self.device)
        torch.cuda.synchronize()
        return mhz

    def _num_replays(self, time_us: float) -> int:
        return max(self.min_replays, min(MAX_REPLAYS, int(self.budget_ms * 1e3 / time_us)))

    def _replay_us(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def _wall_clock(self, steps: Sequence[Run]) -> Time:
        samples = []
        for _ in range(3):
            start = time.perf_counter()
            for step in steps:
                step()
            samples.append((time.perf_counter() - start) * 1e6 / len(steps))
        return Time.of(samples)


def capture(steps: Sequence[Run]) -> torch.cuda.CUDAGraph:
    """All steps in one graph, one after the other; each runs once before, to load its kernels."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph


def alone_us(kernels: Iterable[tuple[str, float, float]], names: Sequence[str]) -> list[float]:
    """Microseconds of the kernels with one of ``names``, from (name, start, end) of all kernels.

    A kernel counts from when those before it have ended: it may start early, and then waits inside.
    """
    samples, ended = [], 0.0
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        if any(part in name for part in names):
            samples.append(end - max(start, ended))
        ended = max(ended, end)
    return samples


def sm_clock_mhz(device: torch.device) -> int | None:
    """Clock of the SMs now, by the driver's management library (NVML); None without it."""
    if device.type != "cuda":
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    handle, mhz, sm_clock = ctypes.c_void_p(), ctypes.c_uint(), 1
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle))
        or nvml.nvmlDeviceGetClockInfo(handle, sm_clock, ctypes.byref(mhz))
    )
    return None if failed else mhz.value


def copy_rate(device: torch.device) -> float:
    """Bytes per second of a device copy of 2 GiB, read and written."""
    source = torch.ones(1 << 29, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    samples = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() * source.element_size() / statistics.median(samples)


def peak_bytes(step: Run, device: torch.device) -> int:
    """GPU memory that a step needs at its peak beyond what was there, its result included."""
    if device.type != "cuda":
        return 0
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = step()
    torch.cuda.synchronize()
    del out
    return torch.cuda.max_memory_allocated() - before
