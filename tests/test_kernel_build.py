"""The real kernels on a machine without a GPU: every architecture compiles, and to what it should.

One source for one front end is one test, so that workers share the work; what is compiled, and how,
is what CMake says.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import json
import re
import shlex
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from samoyeds_hf.interface import SIGNATURES, KernelLibrary, Weight
from samoyeds_hf.toolchain import ARCHITECTURES

KERNELS = Path(__file__).parents[1] / "kernels"
SOURCES = sorted(path.name for path in (KERNELS / "src").glob("*.cu"))
# Arrays indexed by what is not known while compiling lie on the stack, and count as no spills.
NO_LOCAL_MEMORY = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
TRAP_BYTES = 512  # 32 instructions, most of them padding
# What there is machine code for, by what the front end compiles for.
MACHINES = {"80": ("80", "86", "89"), "90a": ("90a",)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, ("nvcc", "g++", "cmake"))), reason="no nvcc, g++ or cmake on PATH"
    ),
]


def configure(folder: Path, *options: str) -> None:
    command = ["cmake", "-S", str(KERNELS), "-B", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CMake's folder for what a wheel ships; nothing is built in it."""
    folder = tmp_path_factory.mktemp("configured")
    configure(folder, "-DSAMOYEDS_VERBOSE_PTXAS=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    return folder


def commands_in(folder: Path) -> dict[str, list[str]]:
    """The compiler call of each source."""
    database = json.loads((folder / "compile_commands.json").read_text())
    return {Path(entry["file"]).name: shlex.split(entry["command"]) for entry in database}


def targets_of(command: list[str]) -> set[str]:
    option = "--generate-code=arch="
    return {part.removeprefix(option) for part in command if part.startswith(option)}


@pytest.fixture(scope="module")
def commands(configured: Path) -> dict[str, list[str]]:
    return commands_in(configured)


def target_of(front_end: str) -> str:
    return f"compute_{front_end},code=[{','.join('sm_' + m for m in MACHINES[front_end])}]"


def test_a_wheel_holds_every_architecture(commands: dict[str, list[str]]) -> None:
    assert sorted(commands) == SOURCES
    wanted = {target_of(front_end) for front_end in MACHINES}
    wanted.add("compute_90,code=[compute_90]")  # PTX
    assert sum(map(len, MACHINES.values())) + 1 == len(ARCHITECTURES)
    for source, command in commands.items():
        assert targets_of(command) == wanted, source
        assert "-Werror=all-warnings" in command


@pytest.mark.parametrize(
    ("chosen", "targets"),
    {
        "90a-real": {"compute_90a,code=[sm_90a]"},
        "89-real;86-real": {"compute_86,code=[sm_86,sm_89]"},  # none but those of one front end
        "89-real;90-virtual": {"compute_89,code=[sm_89]", "compute_90,code=[compute_90]"},
    }.items(),
)
def test_architectures_of_ones_own(chosen: str, targets: set[str], tmp_path: Path) -> None:
    options = [f"-DCMAKE_CUDA_ARCHITECTURES={chosen}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    configure(tmp_path, *options)
    for source, command in commands_in(tmp_path).items():
        assert targets_of(command) == targets, source


@pytest.mark.parametrize("front_end", MACHINES)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_to_what_it_should(
    source: str, front_end: str, configured: Path, commands: dict[str, list[str]], tmp_path: Path
) -> None:
    command = [part for part in commands[source] if not part.startswith("--generate-code")]
    command = command[: command.index("-c")]  # then input and output follow
    command += [f"--generate-code=arch={target_of(front_end)}"]
    command += ["-fatbin", "-o", str(tmp_path / "out.fatbin")]
    command += ["--keep", f"--keep-dir={tmp_path}", str(KERNELS / "src" / source)]
    done = subprocess.run(command, cwd=configured, capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed

    assert "C7510" not in printed, printed  # wgmma that waits for each other
    memory = re.findall(r"properties for (\S+)\n +(\d+ bytes stack .* loads)", printed)
    using = [f"{text} in {name}" for name, text in memory if text != NO_LOCAL_MEMORY]
    assert not using, "\n".join(using)
    machines = MACHINES[front_end]
    for arch in machines:
        (cubin,) = tmp_path.glob(f"*.sm_{arch}.cubin" if len(machines) > 1 else "*.cubin")
        kernels = kernels_of(cubin)
        names = [name for name, _ in memory]
        assert all(names.count(name) == len(machines) for name in kernels)
        if "ssmm" in source:
            check_products(kernels, arch)


def check_products(kernels: dict[str, bytes], arch: str) -> None:
    """By kernel, machine code of the matrix kernels."""
    # a kernel that only sm_90a can run is elsewhere nothing but a trap
    real = {name: code for name, code in kernels.items() if len(code) > TRAP_BYTES}
    assert real
    assert arch != "90a" or real == kernels
    products = {name: list(products_of(code)) for name, code in real.items()}
    without = [name for name, found in products.items() if not any(p.is_sparse for p in found)]
    assert not without, "\n".join(without)
    # an instruction for each number of tokens that is multiplied, and no other product
    hopper = {name: set(found) for name, found in products.items() if "hopper" in name}
    sizes = sorted(sorted(tokens for _, tokens in found) for found in hopper.values())
    # short tiles, three periods of switching, wide tiles, and N = M
    steps = list(range(16, 193, 16))
    expected = [steps[:-1], steps, steps, steps, [*steps, 200], [*steps, 208]]
    assert sizes == (expected if arch == "90a" else [])
    assert all(product.is_sparse for found in hopper.values() for product in found)


PRODUCTS = r"""
#define PRODUCT(name, type, kind, shape, b, e) \
  extern "C" __global__ void name(float* d, const unsigned* a) { \
    asm volatile("mma" kind ".sync.aligned." shape ".row.col.f32." type "." type ".f32 " \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, " b ", {%0, %1, %2, %3}" e ";" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])); \
  }
#define SPARSE(name, type, selector) \
  PRODUCT(name, type, ".sp::ordered_metadata", "m16n8k32", "{%4, %5, %6, %7}", ", %4, " selector)
#define DENSE(name, type) PRODUCT(name, type, "", "m16n8k16", "{%4, %5}", "")
SPARSE(sparse_bf16, "bf16", "0x0")
SPARSE(sparse_fp16, "f16", "0x1")
DENSE(dense_bf16, "bf16")
DENSE(dense_fp16, "f16")
"""


def group_product(name: str, dtype: str, is_sparse: bool, is_shared: bool, tokens: int) -> str:
    """A kernel whose single product is that of a warpgroup, which only sm_90a has.

    is_shared: operand A, too, is in shared memory.
    """
    count = tokens // 2  # results of a thread
    operands = [f"%{number}" for number in range(count + 6)]
    results, values = ", ".join(operands[:count]), f"{{{', '.join(operands[count:-2])}}}"
    kind, k, meta = (".sp", 32, f", {operands[-1]}, 0") if is_sparse else ("", 16, "")
    plain = "0"  # operands in shared memory that are not transposed
    if is_shared:
        values, plain = operands[-2], "0, 0"
    text = (
        "{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.fence.sync.aligned; "
        f"wgmma.mma_async{kind}.sync.aligned.m64n{tokens}k{k}.f32.{dtype}.{dtype} "
        f"{{{results}}}, {values}, {operands[-2]}{meta}, p, 1, 1, {plain}; "
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }"
    )
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    inputs = '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(a[4])'
    arguments = "float* d, const unsigned* a, unsigned long long b"
    body = f'asm volatile("{text}" : {outputs} : {inputs});'
    return f'extern "C" __global__ void {name}({arguments}) {{ {body} }}\n'


@pytest.mark.parametrize("arch", MACHINES)
def test_products_are_told_from_each_other(arch: str, tmp_path: Path) -> None:
    """The reading of machine code below, on kernels whose single product is known."""
    source = PRODUCTS
    expected = {
        f"{kind}_{dtype}": [TensorProduct(kind == "sparse", 8)]
        for kind in ("sparse", "dense")
        for dtype in ("bf16", "fp16")
    }
    if arch == "90a":
        kinds = itertools.product(
            ("bf16", "f16"), (True, False), (True, False), (16, 96, 192, 200, 208)
        )
        for dtype, is_sparse, is_shared, tokens in kinds:
            name = f"group_{dtype}_{is_sparse:d}_{is_shared:d}_{tokens}"
            source += group_product(name, dtype, is_sparse, is_shared, tokens)
            expected[name] = [TensorProduct(is_sparse, tokens)]
    (tmp_path / "products.cu").write_text(source)
    command = ["nvcc", f"-arch=sm_{arch}", "-cubin", "products.cu", "-o", "products.cubin"]
    subprocess.run(command, cwd=tmp_path, check=True)
    found = kernels_of(tmp_path / "products.cubin")
    assert {name: list(products_of(code)) for name, code in found.items()} == expected


def kernels_of(cubin: Path) -> dict[str, bytes]:
    """Machine code by kernel: the sections .text.* of an ELF file."""
    data = cubin.read_bytes()
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, entries, names_index = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * entry_size) for i in range(entries)]
    names_at = headers[names_index][4]
    code = {}
    for name_at, _, _, _, start, size in headers:
        name = data[names_at + name_at :].split(b"\0", 1)[0].decode()
        if name.startswith(".text."):
            code[name.removeprefix(".text.")] = data[start : start + size]
    return code


class TensorProduct(NamedTuple):
    """An instruction of the tensor cores."""

    is_sparse: bool
    tokens: int  # columns of the result


def products_of(code: bytes) -> Iterator[TensorProduct]:
    """The products of 16-byte instructions: of a warp, HMMA, or of a warpgroup, HGMMA."""
    for low, high in struct.iter_unpack("<QQ", code):
        if low & 0xFFF == 0x23C:
            yield TensorProduct(high & 0x4200 == 0x4200, 8)
        if low & 0xFFF in (0xDF0, 0x9F0):  # operand A in registers, in shared memory
            yield TensorProduct(high & 0x200 == 0x200, 8 * ((low >> 53 & 31) + 1))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, testrun_uid: str) -> Path:
    """The library with nothing but PTX, hardly optimised: quickly there. One for all workers."""
    folder = tmp_path_factory.getbasetemp().parent / f"library-{testrun_uid}"
    flags = "--no-compress"
    if "--Ofast-compile" in subprocess.check_output(["nvcc", "--help"], text=True):
        flags += " --Ofast-compile=max"
    options = ["-DCMAKE_CUDA_ARCHITECTURES=90-virtual", f"-DCMAKE_CUDA_FLAGS={flags}"]
    command = ["cmake", "--build", str(folder), "--parallel", "2"]
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "libsamoyeds.so").exists():
            configure(folder, *options)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder / "libsamoyeds.so"


def test_exports_are_the_headers_functions(library: Path) -> None:
    printed = subprocess.check_output(["nm", "-D", "--defined-only", library], text=True)
    assert sorted(line.split()[-1] for line in printed.splitlines()) == sorted(SIGNATURES)
    needed = subprocess.check_output(["readelf", "-d", library], text=True)
    libraries = re.findall(r"NEEDED.*\[(\w+)", needed)
    # neither torch nor Python, nor a CUDA runtime or driver that a machine may lack
    assert set(libraries) <= {"libstdc", "libm", "libc", "libgcc_s", "ld", "libdl", "libpthread"}


def test_library_loads_without_gpu(library: Path) -> None:
    found = KernelLibrary(library)
    assert re.fullmatch(r"compute_90, CUDA \d+\.\d+\.\d+", found.build_info)
    assert found.layout == "m16k128.v4"
    assert found.heuristics.count("\n") > 3
    weight = Weight(num_experts=2, rows=64, cols=128, n=1, m=2, v=32)
    num_bytes = found.handle.samoyeds_packed_bytes(ctypes.byref(weight))
    assert num_bytes == 2 * 2 * (2304 + 16)  # two tiles of 16 kept rows, one block of 128 columns
    three_of_four = Weight(num_experts=2, rows=72, cols=128, n=3, m=4, v=32)
    num_bytes = found.handle.samoyeds_packed_bytes(ctypes.byref(three_of_four))
    assert num_bytes == 2 * 2 * 3 * (2304 + 16)  # 16 blocks of rows and 2 more, each in three tiles
    weight.cols = 126
    assert found.handle.samoyeds_packed_bytes(ctypes.byref(weight)) < 0
    assert "126" in found.handle.samoyeds_last_error().decode()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_an_error_with_text(library: Path) -> None:
    found = KernelLibrary(library)
    status = found.handle.samoyeds_prepare(0)
    assert status != 0
    assert found.handle.samoyeds_last_error()


def test_ptx_for_later_gpus(library: Path) -> None:
    data = library.read_bytes()
    assert b".target sm_90" in data
    assert b"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16" in data
