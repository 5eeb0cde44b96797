"""cuSPARSELt's 2:4 product, measured by a program of our own: cusparselt.cu.

torch plans such a product again at each call; the C API keeps a plan that was searched for once.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from timing import Time

from samoyeds_hf.errors import BuildError
from samoyeds_hf.toolchain import find_toolchain

SOURCE = Path(__file__).with_suffix(".cu")
PACKAGES = Path(torch.__file__).parents[1] / "nvidia"  # what torch's wheels come with
LIBRARY = "libcusparseLt.so.0"


def compile_program(folder: Path, device: torch.device) -> Path:
    """The program, compiled in ``folder`` for the GPU with the package next to torch.

    Raises:
        BuildError: no GPU, no compiler, no package, or the compiler failed.
    """
    if device.type != "cuda":
        raise BuildError(f"it needs a CUDA device, found {device}.")
    package, program = PACKAGES / "cusparselt", folder / "cusparselt"
    if not (package / "lib" / LIBRARY).exists():
        raise BuildError(f"it needs the package that torch comes with, found none at {package}.")
    major, minor = torch.cuda.get_device_capability(device)
    command = [str(find_toolchain().nvcc), "-O3", "-std=c++17", f"-arch=sm_{major}{minor}"]
    command += [str(SOURCE), "-o", str(program), f"-I{package / 'include'}"]
    for header in PACKAGES.glob("*/include/cusparse.h"):  # not every toolkit has it
        command += ["-isystem", str(header.parent)]
    command += [f"-L{package / 'lib'}", f"-l:{LIBRARY}", "-Xlinker", f"-rpath={package / 'lib'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"the compiler failed on {SOURCE.name}:\n{done.stderr or done.stdout}")
    return program


def measure(program: Path, m: int, n: int, k: int, runs: int) -> Time:
    """Time of one product of a dense ``[m, k]`` at 2:4 with ``n`` tokens.

    Raises:
        RuntimeError: the program failed; with what it printed.
    """
    command = [str(program), *(str(number) for number in (m, n, k, runs))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip() or f"exit code {done.returncode}")
    return Time(*(float(text) for text in done.stdout.split(",")[-3:]))
