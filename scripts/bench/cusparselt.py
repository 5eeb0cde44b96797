"""cuSPARSELt's 2:4 product through its C API, by a library of our own: cusparselt.cu.

torch plans such a product again at each call; the C API keeps a plan that was searched for once.
"""

from __future__ import annotations

import ctypes
import subprocess
import weakref
from functools import partial
from pathlib import Path

import torch
from timing import Run

from samoyeds_hf.errors import BuildError
from samoyeds_hf.toolchain import find_toolchain

SOURCE = Path(__file__).with_suffix(".cu")
PACKAGES = Path(torch.__file__).parents[1] / "nvidia"  # what torch's wheels come with
LIBRARY = "libcusparseLt.so.0"


def compile_library(folder: Path, device: torch.device) -> Path:
    """The library, compiled in ``folder`` for the GPU with the package next to torch.

    Raises:
        BuildError: no GPU, no compiler, no package, or the compiler failed.
    """
    if device.type != "cuda":
        raise BuildError(f"it needs a CUDA device, found {device}.")
    package = next((found.parents[1] for found in PACKAGES.glob(f"*/lib/{LIBRARY}")), None)
    if package is None:
        raise BuildError(f"it needs the package that torch comes with, found none in {PACKAGES}.")
    library = folder / "libproducts.so"
    major, minor = torch.cuda.get_device_capability(device)
    command = [str(find_toolchain().nvcc), "-O3", "-std=c++17", f"-arch=sm_{major}{minor}"]
    command += ["-shared", "-Xcompiler", "-fPIC"]
    command += [str(SOURCE), "-o", str(library), f"-I{package / 'include'}"]
    for header in PACKAGES.glob("*/include/cusparse.h"):  # not every toolkit has it
        command += ["-isystem", str(header.parent)]
    command += [f"-L{package / 'lib'}", f"-l:{LIBRARY}", "-Xlinker", f"-rpath={package / 'lib'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"the compiler failed on {SOURCE.name}:\n{done.stderr or done.stdout}")
    return library


class Products:
    """``runs`` products of a dense ``[m, k]`` at 2:4 with ``n`` tokens, all random.

    Raises:
        RuntimeError: cuSPARSELt, or CUDA, failed; with what it said.
    """

    def __init__(
        self, library: Path, m: int, n: int, k: int, runs: int, *, is_by_columns: bool
    ) -> None:
        functions = ctypes.CDLL(str(library))
        functions.products_create.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int] * 2
        functions.products_create.argtypes += [ctypes.POINTER(ctypes.c_void_p)]
        functions.products_multiply.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
        functions.products_destroy.argtypes = [ctypes.c_void_p]
        functions.products_create.restype = ctypes.c_char_p
        functions.products_multiply.restype = ctypes.c_char_p
        functions.products_destroy.restype = None
        self._functions, self._products, self._runs = functions, ctypes.c_void_p(), runs
        created = ctypes.byref(self._products)
        check(functions.products_create(m, n, k, runs, is_by_columns, created))
        weakref.finalize(self, functions.products_destroy, self._products)

    def steps(self) -> list[Run]:
        """One product each, launched on torch's present stream."""
        return [partial(self._multiply, run) for run in range(self._runs)]

    def _multiply(self, run: int) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        check(self._functions.products_multiply(self._products, run, stream))


def check(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())
