"""The kernel library: its interface is the header's, and each way of not having one is told."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stub_kernels import (
    HEADER,
    builds_of,
    compile_stub,
    needs_cmake,
    needs_compiler,
    write_nvcc,
    write_script,
    write_sources,
)

from samoyeds_hf import environment, interface, library
from samoyeds_hf.errors import BuildError, ConfigError, KernelError, SamoyedsError
from samoyeds_hf.interface import KernelLibrary, Launch, Plan, Routing, Weight

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the library is built on Linux")

STRUCTURES = (Weight, Routing, Plan, Launch)


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has not decided yet, with a cache and sources of its own and no variables."""
    for name in ("LIBRARY", "KERNELS", "CACHE"):
        monkeypatch.delenv(f"SAMOYEDS_HF_{name}", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_decision", None)
    monkeypatch.setattr(environment, "_not_announced", threading.Lock())
    library._open.cache_clear()
    yield
    library._open.cache_clear()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that build in a second, and an nvcc that says it is there."""
    folder = write_sources(tmp_path / "kernels")
    monkeypatch.setattr("samoyeds_hf.build.kernels_dir", lambda: folder)
    monkeypatch.setenv("CUDA_HOME", str(write_nvcc(tmp_path / "cuda")))
    return folder


def remove_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> None:
        raise BuildError("Building the kernels needs nvcc, found none.")

    monkeypatch.setattr("samoyeds_hf.toolchain.find_toolchain", find)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(capabilities))
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(capabilities))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda i: capabilities[i])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    return [record.getMessage() for record in caplog.records if record.name == "samoyeds_hf"]


# --- the interface ---------------------------------------------------------------------------

PROBE = r"""
#include <cstddef>
#include <cstdio>
#include "samoyeds/api.h"
template <class T> const char* code();
template <> const char* code<int>() { return "int"; }
template <> const char* code<int64_t>() { return "int64"; }
template <> const char* code<const char*>() { return "text"; }
template <> const char* code<const SamoyedsWeight*>() { return "Weight"; }
template <> const char* code<const SamoyedsRouting*>() { return "Routing"; }
template <> const char* code<SamoyedsPlan*>() { return "Plan"; }
template <> const char* code<const SamoyedsLaunch*>() { return "Launch"; }
template <> const char* code<void*>() { return "pointer"; }
template <> const char* code<const void*>() { return "pointer"; }
template <> const char* code<uint8_t*>() { return "pointer"; }
template <> const char* code<const uint8_t*>() { return "pointer"; }
template <> const char* code<int32_t*>() { return "pointer"; }
template <class R, class... A> void show(const char* name, R (*)(A...)) {
  std::printf("%s %s", name, code<R>());
  const char* arguments[] = {"", code<A>()...};
  for (size_t i = 1; i <= sizeof...(A); ++i) std::printf(" %s", arguments[i]);
  std::puts("");
}
#define SHOW(name) show(#name, name)
#define SIZE(type) std::printf("%s %zu\n", #type, sizeof(type))
#define MEMBER(type, name) std::printf("%s %zu %zu\n", #name, offsetof(type, name), \
                                       sizeof(type::name))
int main() {
  std::printf("%d %d %d\n", SAMOYEDS_ABI_VERSION, SAMOYEDS_OK, SAMOYEDS_UNSUPPORTED);
LINES}
"""
CODES = {
    ctypes.c_int: "int",
    ctypes.c_int64: "int64",
    ctypes.c_char_p: "text",
    ctypes.c_void_p: "pointer",
    **{ctypes.POINTER(structure): structure.__name__ for structure in STRUCTURES},
}


def functions_of_header() -> list[str]:
    text = re.sub(r"//.*", "", HEADER.read_text())
    return re.findall(r"\b(samoyeds_\w+)\s*\(", text)


@needs_compiler
def test_interface_is_that_of_the_header(tmp_path: Path) -> None:
    lines, expected = [], [f"{interface.ABI_VERSION} 0 2"]
    for structure in STRUCTURES:
        name = f"Samoyeds{structure.__name__}"
        lines.append(f"SIZE({name});")
        expected.append(f"{name} {ctypes.sizeof(structure)}")
        for member, *_ in structure._fields_:
            field = getattr(structure, member)
            lines.append(f"MEMBER({name}, {member});")
            expected.append(f"{member} {field.offset} {field.size}")
    for function, types in interface.SIGNATURES.items():
        lines.append(f"SHOW({function});")
        expected.append(" ".join([function, *(CODES[kind] for kind in types)]))
    (tmp_path / "probe.cpp").write_text(PROBE.replace("LINES", "\n".join(lines)))
    compile_stub(tmp_path / "libsamoyeds.so")
    command = ["g++", "-Wno-invalid-offsetof", f"-I{HEADER.parents[1]}", "probe.cpp", "-o", "probe"]
    subprocess.run([*command, "libsamoyeds.so", "-Wl,-rpath,$ORIGIN"], cwd=tmp_path, check=True)
    printed = subprocess.check_output([tmp_path / "probe"], text=True).splitlines()
    assert printed == expected
    assert sorted(functions_of_header()) == sorted(interface.SIGNATURES)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc on PATH")
@pytest.mark.parametrize("standard", ["c99", "c17"])
def test_header_is_plain_c(standard: str) -> None:
    flags = [f"-std={standard}", "-Wall", "-Wextra", "-Werror", f"-I{HEADER.parents[1]}"]
    source = '#include "samoyeds/api.h"\nint main(void) { return SAMOYEDS_OK; }\n'
    command = ["gcc", *flags, "-fsyntax-only", "-x", "c", "-"]
    subprocess.run(command, input=source, text=True, check=True)


@needs_compiler
def test_library(tmp_path: Path) -> None:
    path = compile_stub(tmp_path / "libsamoyeds.so", '-DINFO="sm_90a, CUDA 13.0"')
    found = KernelLibrary(path)
    assert (found.path, found.layout) == (path, "stub.v1")
    assert found.build_info == "sm_90a, CUDA 13.0"
    assert found.heuristics.startswith("rule")
    found.check(0)
    assert found.handle.samoyeds_packed_bytes(Weight(rows=8)) == -2
    with pytest.raises(KernelError, match=r"^A stub has no kernels, found a call\.$"):
        found.check(found.handle.samoyeds_prepare(0))
    with pytest.raises(ctypes.ArgumentError):
        found.handle.samoyeds_packed_bytes(Launch())


def test_errors_are_the_packages() -> None:
    assert issubclass(KernelError, SamoyedsError)
    assert issubclass(KernelError, RuntimeError)
    assert issubclass(BuildError, KernelError)


@needs_compiler
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-DABI=99"], r"interface version 2 of the kernel library, found version 99 at .*\.so"),
        (["-DONE_FUNCTION_LESS"], "every function, found one that does not .*samoyeds_route"),
    ],
)
def test_library_of_another_version(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        KernelLibrary(compile_stub(tmp_path / "lib.so", *flags))


@needs_compiler
def test_damaged_library(tmp_path: Path) -> None:
    """A file that ends early is refused and not mapped: that would kill the process."""
    path = compile_stub(tmp_path / "lib.so")
    content = path.read_bytes()
    for length in (0, 10, 64, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(KernelError, match=f"damaged one of {length} bytes"):
            KernelLibrary(path)
    path.write_bytes(content[:18] + b"\xff\xff" + content[20:])  # of another machine
    with pytest.raises(KernelError, match="found one that does not"):
        KernelLibrary(path)
    with pytest.raises(KernelError, match=r"can be read, found .*nowhere\.so"):
        KernelLibrary(tmp_path / "nowhere.so")


# --- which one is loaded ---------------------------------------------------------------------


def test_without_gpu(
    sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is built, and nothing is wrong: plain torch is the path."""
    pretend_gpus(monkeypatch)
    assert library.load() is None
    assert library.load(without_gpu=True) is None
    assert library.unavailable_reason() == "no CUDA GPU here"
    assert warnings(caplog) == []
    assert builds_of(sources) == []


def test_cuda_is_not_initialised() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert library.load() is None
    assert not torch.cuda.is_initialized()


def test_torch_for_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, (9, 4))
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm calls its GPUs "cuda" as well
    assert library.unavailable_reason() == "no CUDA GPU here"


def test_old_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pretend_gpus(monkeypatch, (7, 5), (6, 1))
    assert library.load() is None
    reason = "kernels need a GPU of compute capability 8.0, found 7.5"
    assert library.unavailable_reason() == reason
    assert [reason in text for text in warnings(caplog)] == [True]


@needs_cmake
def test_turned_off(
    sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_gpus(monkeypatch, (9, 0))
    monkeypatch.setenv("SAMOYEDS_HF_KERNELS", "0")
    library.build_ahead()
    assert library.load() is None
    assert library.load(without_gpu=True) is None
    assert library.unavailable_reason() == "turned off by SAMOYEDS_HF_KERNELS=0"
    assert warnings(caplog) == []


@needs_cmake
def test_first_use_builds(
    sources: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pretend_gpus(monkeypatch, (9, 0), (7, 5))
    assert "not built yet" in environment.execution_path()
    assert builds_of(sources) == []
    found = library.load()
    assert found is not None
    assert found is library.load() is library.load(without_gpu=True)
    assert library.unavailable_reason() is None
    assert builds_of(sources) == ["90a-real"]
    assert found.build_info == "90a-real, CUDA 13.0"
    assert environment.execution_path().startswith("CUDA kernels (bf16, fp16)")
    assert warnings(caplog) == []
    begin, end = capfd.readouterr().err.splitlines()
    assert begin.startswith("samoyeds_hf: building the CUDA kernels for 90a with CUDA 13.0, once")
    assert re.fullmatch(rf"samoyeds_hf: kernels built in \d+ s: {found.path}", end)


@needs_cmake
def test_a_later_process_needs_no_nvcc(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, (9, 0))
    built = library.build_ahead(("90a", "80", "90a"))
    assert builds_of(sources) == ["80-real;90a-real"]
    remove_nvcc(monkeypatch)
    found = library.load()
    assert found is not None
    assert found.path == built.path
    monkeypatch.setattr(library, "_decision", None)
    pretend_gpus(monkeypatch, (8, 9))  # for which this library holds nothing
    assert library.load() is None


@needs_cmake
def test_all_architectures_without_gpu(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the image of a container, say; then every GPU is served."""
    pretend_gpus(monkeypatch)
    built = library.build_ahead()
    assert builds_of(sources) == [""]  # whatever CMakeLists.txt says
    assert library.load(without_gpu=True) is built
    pretend_gpus(monkeypatch, (8, 0), (12, 0))
    monkeypatch.setattr(library, "_decision", None)
    assert library.load() is built
    with pytest.raises(ConfigError, match="--arch is one of 80, 86, 89, 90a, ptx, found '75'"):
        library.build_ahead(("75",))


def test_no_nvcc_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_gpus(monkeypatch, (9, 0))
    remove_nvcc(monkeypatch)
    threads = [threading.Thread(target=library.load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    environment.announce_path()
    reason = "Building the kernels needs nvcc, found none"
    assert library.unavailable_reason() == f"{reason}."
    assert warnings(caplog) == [f"samoyeds_hf: experts run in {environment.execution_path()}."]
    assert reason in environment.execution_path()


@needs_cmake
def test_threads_build_once(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, (8, 6))
    found: list[KernelLibrary | None] = []
    threads = [threading.Thread(target=lambda: found.append(library.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is not None
    assert found == [found[0]] * 8
    assert builds_of(sources) == ["86-real"]


@needs_cmake
def test_failed_build_is_told_and_not_repeated(
    sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_gpus(monkeypatch, (9, 0))
    good = (sources / "CMakeLists.txt").read_text()
    (sources / "CMakeLists.txt").write_text(good.replace("INFO=", "ABI=bad INFO="))
    assert library.load() is None
    (warning,) = warnings(caplog)
    log = re.search(r"the compiler ended with exit code \d+ \(log: (.+?)\)", warning)
    assert log is not None, warning
    assert "bad" in Path(log[1]).read_text()
    assert "It ends:\n" in str(library.unavailable_reason())  # the log's last lines

    monkeypatch.setattr(library, "_decision", None)
    assert library.load() is None
    assert "when it was tried before" in str(library.unavailable_reason())
    assert len(builds_of(sources)) == 1
    with pytest.raises(BuildError, match="exit code"):
        library.build_ahead()
    assert len(builds_of(sources)) == 2


@needs_cmake
def test_damaged_library_in_the_cache(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, (9, 0))
    path = library.build_ahead().path
    content = path.read_bytes()

    def damage() -> None:
        path.unlink()  # the process has it open
        path.write_bytes(content[:1000])
        library._open.cache_clear()
        monkeypatch.setattr(library, "_decision", None)

    damage()
    assert "not built yet" in environment.execution_path()
    assert library.load() is not None
    assert len(builds_of(sources)) == 2
    damage()
    assert library.build_ahead().path == path
    assert len(builds_of(sources)) == 3
    damage()
    remove_nvcc(monkeypatch)
    assert library.load() is None
    assert f"remove {path}" in str(library.unavailable_reason())
    with pytest.raises(KernelError, match="damaged"):
        library.load(without_gpu=True)
    assert "damaged" in environment.execution_path()


@needs_compiler
def test_library_of_the_wheel_comes_first(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpus(monkeypatch, (9, 0))
    shipped = compile_stub(tmp_path / "libsamoyeds.so")
    monkeypatch.setattr(library, "shipped_library", lambda: shipped)
    found = library.load()
    assert found is not None
    assert found.path == shipped
    assert library.build_ahead() is found is library.load(without_gpu=True)
    assert builds_of(sources) == []


@needs_compiler
def test_named_library(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, (9, 0))
    path = compile_stub(tmp_path / "mine.so")
    monkeypatch.setenv("SAMOYEDS_HF_LIBRARY", str(path))
    found = library.load()
    assert found is not None
    assert found.path == path
    monkeypatch.setattr(library, "_decision", None)
    monkeypatch.setenv("SAMOYEDS_HF_LIBRARY", str(tmp_path / "nowhere.so"))
    for attempt in (library.load, library.unavailable_reason, environment.announce_path):
        with pytest.raises(KernelError, match="correct the path in SAMOYEDS_HF_LIBRARY"):
            attempt()
    assert builds_of(sources) == []


@needs_compiler
def test_driver_that_is_too_old(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA 13 runtime needs a CUDA 13 driver; torch may well bring an older one."""
    pretend_gpus(monkeypatch, (9, 0))
    real, version = ctypes.CDLL, 12080

    def open_library(name: str) -> object:
        if name != "libcuda.so.1":
            return real(name)

        def driver_version(found: object) -> None:
            found._obj.value = version  # type: ignore[attr-defined]

        return SimpleNamespace(cuDriverGetVersion=driver_version)

    monkeypatch.setattr("ctypes.CDLL", open_library)
    reason = "kernels built with CUDA 13 need a driver for it, found one for CUDA 12"
    assert str(library.unavailable_reason()).startswith(reason)
    assert builds_of(sources) == []  # it would be of no use
    shipped = compile_stub(tmp_path / "libsamoyeds.so", '-DINFO="sm_90a, CUDA 13.0"')
    monkeypatch.setattr(library, "shipped_library", lambda: shipped)
    monkeypatch.setattr(library, "_decision", None)
    assert str(library.unavailable_reason()).startswith(reason)
    version = 13000
    monkeypatch.setattr(library, "_decision", None)
    assert library.unavailable_reason() is None


def test_compiler_that_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_gpus(monkeypatch, (9, 0))
    write_script(tmp_path / "cuda" / "bin" / "nvcc", "#!/bin/sh\necho broken >&2; exit 1\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert library.load() is None
    assert ["nvcc that runs" in text and "'broken'" in text for text in warnings(caplog)] == [True]
