"""How long a step takes on the device, with cold caches."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

FLUSH_BYTES = 1 << 30  # many times the 60 MB L2 of an H200; takes about 0.25 ms to read
FLUSH_KERNEL = "at::native::reduce_kernel"  # what reads them
MIN_REPLAYS, MAX_REPLAYS = 12, 50
RESTS_MS = (50, 0)  # of the device, before each replay
CPU_ROUNDS = 3

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


@dataclass(frozen=True)
class Turns:
    """What a path's steps took, one step each, in turn with the other paths."""

    time: Time
    mhz: int | None = None  # clock of the SMs, the median


class Clock:
    """Times steps. On CUDA one graph holds them all, and a sample is a replay's time by events.

    Each step is to work on weights of its own, so that none of them finds its weights in the L2.
    Before each replay 1 GB is read: nothing of the replay before is left in the L2, and no dirty
    lines are written back during the next one, as they would be after a fill. The launch of the
    graph hides behind that read. On a CPU the steps run one by one under a wall clock.

    ``rest_s`` is how long the device does nothing before each replay. Without a rest it may come to
    its power limit, and lowers its clock.
    """

    def __init__(
        self,
        device: torch.device,
        budget_ms: float = 60,
        min_replays: int = MIN_REPLAYS,
        rest_s: float = 0,
    ) -> None:
        self.device, self.budget_ms, self.min_replays = device, budget_ms, min_replays
        self.rest_s = rest_s
        elements = FLUSH_BYTES // 4 if device.type == "cuda" else 0
        # Of a type that sums need not convert: that would be a kernel more, and write.
        self._flush = torch.ones(elements, dtype=torch.float32, device=device)

    def __call__(self, steps: Sequence[Run]) -> Time:
        return self.in_turn([steps])[0].time

    def in_turn(self, paths: Sequence[Sequence[Run]]) -> list[Turns]:
        """Of each path's steps: a replay of the first path, one of the second, and so on, again.

        All of them meet the same clock of the card, which changes with what it has just done.
        """
        if self.device.type != "cuda":
            return self._wall_clock(paths)
        graphs = [capture(steps) for steps in paths]
        for graph in graphs:
            self._replay_us(graph)
        rounds = self._num_replays(sum(self._replay_us(graph) for graph in graphs))
        read_mhz = sm_clock(self.device)
        times: list[list[float]] = [[] for _ in paths]
        mhz: list[list[int | None]] = [[] for _ in paths]
        for _ in range(rounds):
            for i, (graph, steps) in enumerate(zip(graphs, paths, strict=True)):
                found = mhz[i]
                time_us = self._replay_us(graph, lambda found=found: found.append(read_mhz()))
                times[i].append(time_us / len(steps))
        return [Turns(Time.of(times[i]), median_mhz(mhz[i])) for i in range(len(paths))]

    def recorded(self, steps: Sequence[Run]) -> Callable[[], float]:
        """A function that takes microseconds of a step, of one replay each time that it is called.

        For turns of paths that are no longer in one process.
        """
        if self.device.type != "cuda":
            return lambda: self._wall_clock([steps])[0].time.p50
        graph = capture(steps)
        return lambda: self._replay_us(graph) / len(steps)

    def kernels_in_turn(
        self, paths: Sequence[tuple[Sequence[Run], Sequence[str]]]
    ) -> list[Time | None]:
        """Of each path's kernels alone, by the profiler (CUPTI); None where it does not see them.

        A path is its steps and parts of names: of its kernels those with one of them count. With no
        names all of a step's kernels do, together. The steps are launched one by one, behind the
        same flush, and the paths in turn; what an earlier kernel of a step has left in the L2 is
        there.
        """
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(self.min_replays):
                for steps, _ in paths:
                    self._rest()
                    self._flush.sum()
                    for step in steps:
                        step()
            torch.cuda.synchronize()
        turns = alone_us(
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiled.events()
            if event.device_type == DeviceType.CUDA
        )
        if len(turns) != self.min_replays * len(paths):
            return [None] * len(paths)
        found = []
        for i, (steps, names) in enumerate(paths):
            samples = samples_of(turns[i :: len(paths)], len(steps), names)
            found.append(Time.of(samples) if len(samples) >= self.min_replays else None)
        return found

    def _num_replays(self, time_us: float) -> int:
        return max(self.min_replays, min(MAX_REPLAYS, int(self.budget_ms * 1e3 / time_us)))

    def _replay_us(self, graph: torch.cuda.CUDAGraph, meanwhile: Run | None = None) -> float:
        """``meanwhile`` is called while the device works."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._rest()
        self._flush.sum()
        start.record()
        graph.replay()
        end.record()
        if meanwhile:
            meanwhile()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def _rest(self) -> None:
        if self.rest_s:
            torch.cuda.synchronize()
            time.sleep(self.rest_s)

    def _wall_clock(self, paths: Sequence[Sequence[Run]]) -> list[Turns]:
        times: list[list[float]] = [[] for _ in paths]
        for _ in range(CPU_ROUNDS):
            for samples, steps in zip(times, paths, strict=True):
                start = time.perf_counter()
                for step in steps:
                    step()
                samples.append((time.perf_counter() - start) * 1e6 / len(steps))
        return [Turns(Time.of(samples)) for samples in times]


def clocks_of(device: torch.device, budget_ms: float) -> dict[int, Clock]:
    """By milliseconds of rest; a CPU takes none."""
    rests = RESTS_MS if device.type == "cuda" else (0,)
    return {ms: Clock(device, budget_ms, rest_s=ms / 1e3) for ms in rests}


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


Kernel = tuple[str, float]  # its name, and microseconds


def alone_us(kernels: Iterable[tuple[str, float, float]]) -> list[list[Kernel]]:
    """What ran after each flush, from (name, start, end) of all kernels, in microseconds.

    A kernel counts from when those before it have ended: it may start early, and then waits inside.
    """
    turns: list[list[Kernel]] = []
    ended = 0.0
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        if FLUSH_KERNEL in name:
            if not turns or turns[-1]:  # a flush may be two kernels
                turns.append([])
        elif turns:
            turns[-1].append((name, end - max(start, ended)))
        ended = max(ended, end)
    return turns


def samples_of(
    turns: Iterable[Sequence[Kernel]], num_steps: int, names: Sequence[str]
) -> list[float]:
    """Microseconds of each kernel with one of ``names``; without names of a step, on average."""
    if not names:
        return [sum(us for _, us in kernels) / num_steps for kernels in turns]
    return [us for kernels in turns for name, us in kernels if any(part in name for part in names)]


def sm_clock(device: torch.device) -> Callable[[], int | None]:
    """Reads the clock of the SMs in MHz, by the driver's management library (NVML).

    What it returns reads None where there is no such library.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return lambda: None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    handle, mhz, of_sms = ctypes.c_void_p(), ctypes.c_uint(), 1
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
        return lambda: None

    def read() -> int | None:
        failed = nvml.nvmlDeviceGetClockInfo(handle, of_sms, ctypes.byref(mhz))
        return None if failed else mhz.value

    return read


def median_mhz(found: Sequence[int | None]) -> int | None:
    read = [each for each in found if each is not None]
    return round(statistics.median(read)) if read else None


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
