"""nvcc and CMake: finding them, and one compilation of the kernel library.

Nothing here imports torch or looks for a GPU: the wheel's build hook uses this module as well.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from samoyeds_hf.errors import BuildError, ConfigError

LIBRARY_NAME = "libsamoyeds.so"
MINIMUM_CUDA = (12, 5)  # the first with mma.sp::ordered_metadata
MINIMUM_CAPABILITY = (8, 0)  # the first with sparse tensor cores

# what `samoyeds env --build --arch` calls an architecture -> what CMake calls it
ARCHITECTURES = {
    "80": "80-real",
    "86": "86-real",
    "89": "89-real",
    "90a": "90a-real",
    "ptx": "90-virtual",  # compiled by the driver, for GPUs newer than all of the above
}
_DEFAULT_CUDA = Path("/usr/local/cuda")
_LOG_LINES = 15


@dataclass(frozen=True)
class Toolchain:
    """What compiles the library here."""

    nvcc: Path
    cuda: str  # "13.0"
    cmake: Path
    generator: str


def find_toolchain() -> Toolchain:
    """nvcc from CUDA_HOME, PATH or /usr/local/cuda, and what else the build needs.

    Raises:
        BuildError: something is missing or too old; one sentence says what and where to get it.
    """
    if sys.platform != "linux":
        raise BuildError(f"The kernels are built on Linux, found {sys.platform}; there are none.")
    nvcc, cuda = _find_nvcc()
    cmake = _find_cmake()
    if not (os.environ.get("CXX") or shutil.which("g++")):
        raise _missing("g++", "PATH", "install it, or name another compiler by CXX")
    if shutil.which("ninja"):
        return Toolchain(nvcc, cuda, cmake, "Ninja")
    if shutil.which("make"):
        return Toolchain(nvcc, cuda, cmake, "Unix Makefiles")
    raise _missing("ninja or make", "PATH", "install one of them")


def _find_nvcc() -> tuple[Path, str]:
    home = os.environ.get("CUDA_HOME")
    for folder in (f"{home}/bin" if home else "", None, f"{_DEFAULT_CUDA}/bin"):
        if found := shutil.which("nvcc", path=folder):
            break
    else:
        places = f"CUDA_HOME, PATH, {_DEFAULT_CUDA}"
        raise _missing("nvcc", places, "install the CUDA toolkit, or name its folder by CUDA_HOME")
    try:
        done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
        printed = done.stdout + done.stderr
    except OSError as error:
        printed = str(error)
    version = re.search(r"release (\d+)\.(\d+)", printed)
    if version is None:
        raise BuildError(
            f"Building the kernels needs an nvcc that runs, found that `{found} --version` says "
            f"{printed.strip()!r}; name another toolkit by CUDA_HOME."
        )
    major, minor = int(version[1]), int(version[2])
    if (major, minor) < MINIMUM_CUDA:
        needed = ".".join(map(str, MINIMUM_CUDA))
        raise BuildError(
            f"Building the kernels needs nvcc {needed} or newer, found {major}.{minor} at {found}; "
            "name a newer toolkit by CUDA_HOME."
        )
    return Path(found), f"{major}.{minor}"


def _find_cmake() -> Path:
    if found := shutil.which("cmake"):
        return Path(found)
    try:  # the Python package of that name need not be on PATH
        return Path(import_module("cmake").CMAKE_BIN_DIR) / "cmake"
    except (ImportError, AttributeError):
        way_out = "install it (pip install cmake)"
        raise _missing("cmake", "PATH, Python packages", way_out) from None


def _missing(what: str, places: str, way_out: str) -> BuildError:
    return BuildError(f"Building the kernels needs {what}, found none ({places}); {way_out}.")


def check_architectures(names: Iterable[str]) -> tuple[str, ...]:
    """Names of ARCHITECTURES, each once and sorted.

    Raises:
        ConfigError: an unknown one.
    """
    for name in names:
        if name not in ARCHITECTURES:
            raise ConfigError(f"--arch is one of {', '.join(ARCHITECTURES)}, found {name!r}.")
    return tuple(sorted(set(names)))


def architectures_for(capabilities: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    """What a library must hold to run on these GPUs; those without sparse tensor cores want none.

    Machine code also runs on a later minor version: 8.7 takes that of 8.6.
    """
    names = set()
    for major, minor in capabilities:
        if (major, minor) < MINIMUM_CAPABILITY:
            continue
        if major == 8:
            names.add("89" if minor >= 9 else "86" if minor >= 6 else "80")
        else:
            names.add("90a" if (major, minor) == (9, 0) else "ptx")
    return tuple(sorted(names))


def compile_library(
    toolchain: Toolchain, sources: Path, architectures: Sequence[str], folder: Path, log: Path
) -> Path:
    """Configure and compile ``sources`` in ``folder``; all that the tools print goes to ``log``.

    Args:
        toolchain: of ``find_toolchain``.
        sources: holds CMakeLists.txt.
        architectures: names of ARCHITECTURES; empty: what CMakeLists.txt says a wheel ships.
        folder: gets the library and everything else.
        log: file to write.

    Raises:
        BuildError: a tool failed; which, and no full stop: the caller says where the log is.
    """
    configure = [str(toolchain.cmake), "-S", str(sources), "-B", str(folder)]
    configure += ["-G", toolchain.generator, f"-DCMAKE_CUDA_COMPILER={toolchain.nvcc}"]
    configure += ["-DSAMOYEDS_WARNINGS_AS_ERRORS=OFF"]  # a newer compiler may warn of more
    if architectures:
        names = ";".join(ARCHITECTURES[name] for name in architectures)
        configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={names}")
    cores = len(os.sched_getaffinity(0))
    build = [str(toolchain.cmake), "--build", str(folder), "--parallel", str(cores)]
    for command in (configure, build):
        with log.open("a") as file:
            print("$", *command, file=file, flush=True)
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
            )
        if done.returncode != 0:
            step = "compiler" if command is build else "CMake"
            raise BuildError(
                f"The CUDA kernels could not be built: the {step} ended with exit code "
                f"{done.returncode}"
            )
    return folder / LIBRARY_NAME


def last_lines(log: Path) -> str:
    """The end of a log, indented."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-_LOG_LINES:])
