"""The kernel library in this process: where it is found, and why there may be none.

Looked for in this order: SAMOYEDS_HF_LIBRARY (debugging), what the wheel carries, the cache of
:mod:`samoyeds_hf.build`, and, with a GPU and nvcc, a build now. SAMOYEDS_HF_KERNELS=0 turns the
kernels off (debugging). Where a GPU is present and no library can be had, one warning a process
says why, and everything runs in plain torch.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from samoyeds_hf import build, toolchain
from samoyeds_hf.errors import BuildError, KernelError
from samoyeds_hf.interface import KernelLibrary, Launch, Plan, Routing, Weight
from samoyeds_hf.resources import shipped_library

__all__ = [
    "Decision",
    "KernelLibrary",
    "Launch",
    "Plan",
    "Routing",
    "Weight",
    "build_ahead",
    "decide",
    "load",
    "unavailable_reason",
]

LIBRARY_VARIABLE = "SAMOYEDS_HF_LIBRARY"
KERNELS_VARIABLE = "SAMOYEDS_HF_KERNELS"


@dataclass(frozen=True)
class Decision:
    """Whether this process has kernels, or why it has none."""

    library: KernelLibrary | None
    reason: str | None = None
    is_expected: bool = False  # nothing to warn of: no GPU, or turned off by the user


_lock = threading.RLock()
_decision: Decision | None = None


def load(*, without_gpu: bool = False) -> KernelLibrary | None:
    """The kernel library, found or built at the first call; None where there is none.

    A GPU without kernels is worth one warning a process; ``unavailable_reason`` says why as well.

    Args:
        without_gpu: open a library that exists even where no GPU can run it; builds nothing.

    Raises:
        KernelError: SAMOYEDS_HF_LIBRARY names a library that cannot be used; with
            ``without_gpu`` also that of the wheel or the cache.
    """
    if without_gpu:
        return None if _is_off() else _find_existing()
    decision = decide()
    if decision.library is None and not decision.is_expected:
        from samoyeds_hf.environment import announce_path  # which asks this module

        announce_path()
    return decision.library


def unavailable_reason() -> str | None:
    """Why ``load()`` returns None, or None if it returns a library."""
    return decide().reason


def decide(*, may_build: bool = True) -> Decision:
    """What ``load()`` returns, and why; without a warning. The same for the whole process.

    Args:
        may_build: False: what would have to be built counts as missing, and may be there later.

    Raises:
        KernelError: SAMOYEDS_HF_LIBRARY names a library that cannot be used.
    """
    global _decision
    with _lock:
        if _decision is not None:
            return _decision
        decision = _decide(may_build)
        if may_build:
            _decision = decision
        return decision


def build_ahead(architectures: Sequence[str] = ()) -> KernelLibrary:
    """The library of the wheel, or else of the cache, built now if need be.

    A build that failed before is tried again.

    Args:
        architectures: names of ``toolchain.ARCHITECTURES``; empty: those of the GPUs here, or all
            that a wheel ships where there is no GPU.

    Raises:
        ConfigError: an unknown architecture.
        KernelError: the toolchain is incomplete, or the build fails.
    """
    wanted = toolchain.check_architectures(architectures)
    if shipped_library().is_file():
        return _open(shipped_library())
    tools = toolchain.find_toolchain()
    wanted = wanted or toolchain.architectures_for(_capabilities())
    return _open(build.build(tools, wanted, _is_good, retry=True))


def _decide(may_build: bool) -> Decision:
    if _is_off():
        return Decision(None, f"turned off by {KERNELS_VARIABLE}=0", is_expected=True)
    capabilities = _capabilities()
    if not capabilities:
        return Decision(None, "no CUDA GPU here", is_expected=True)
    architectures = toolchain.architectures_for(capabilities)
    if not architectures:
        pairs = (toolchain.MINIMUM_CAPABILITY, max(capabilities))
        needed, found = (f"{major}.{minor}" for major, minor in pairs)
        return Decision(None, f"kernels need a GPU of compute capability {needed}, found {found}")
    if os.environ.get(LIBRARY_VARIABLE):  # asked for by name: an error must not become a warning
        return Decision(_find_existing())
    try:
        library = _find_or_build(architectures, may_build)
        _check_driver(library.build_info)
    except KernelError as error:
        return Decision(None, str(error))
    return Decision(library)


def _find_existing() -> KernelLibrary | None:
    if chosen := os.environ.get(LIBRARY_VARIABLE):
        return _open(Path(chosen))
    if shipped_library().is_file():
        return _open(shipped_library())
    built = build.find_built((), None)
    return _open(built) if built else None


def _find_or_build(architectures: Sequence[str], may_build: bool) -> KernelLibrary:
    if shipped_library().is_file():
        return _open(shipped_library())
    try:
        tools = toolchain.find_toolchain()
    except BuildError:
        if built := build.find_built(architectures, None):
            return _open(built)
        raise
    built = build.find_built(architectures, tools)
    if built and _is_good(built):
        return _open(built)
    build.check_not_failed(tools, architectures)
    _check_driver(f"CUDA {tools.cuda}")
    if not may_build:
        raise KernelError("not built yet: the first use does, or `samoyeds env --build` now")
    return _open(build.build(tools, architectures, _is_good))


@cache
def _open(path: Path) -> KernelLibrary:
    return KernelLibrary(path)


def _is_good(path: Path) -> bool:
    try:
        _open(path)
    except KernelError:
        return False
    return True


def _check_driver(cuda: str) -> None:
    """Refuse what the GPU's driver is too old for: "... CUDA 13.0" needs one of CUDA 13."""
    needed = re.search(r"CUDA (\d+)", cuda)
    supported = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(supported))
    except OSError:
        return
    if needed and int(needed[1]) > supported.value // 1000:
        raise KernelError(
            f"kernels built with CUDA {needed[1]} need a driver for it, found one for CUDA "
            f"{supported.value // 1000}; update the driver, or name an older toolkit by CUDA_HOME"
        )


def _is_off() -> bool:
    return os.environ.get(KERNELS_VARIABLE) == "0"


def _capabilities() -> list[tuple[int, int]]:
    """Of every NVIDIA GPU that torch sees."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
