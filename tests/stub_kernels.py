"""A kernel library without kernels, which a compiler for the host makes in a second.

It has every function of the real ``api.h``; nothing that needs a GPU works.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "kernels"
HEADER = KERNELS / "include" / "samoyeds" / "api.h"

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
needs_cmake = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("cmake")), reason="no g++ or no cmake on PATH"
)

SOURCE = r"""
#include "samoyeds/api.h"
#ifndef ABI
#define ABI SAMOYEDS_ABI_VERSION
#endif
#ifndef INFO
#define INFO "stub"
#endif
typedef SamoyedsLaunch L;
typedef SamoyedsRouting R;
typedef SamoyedsWeight W;
int samoyeds_abi_version(void) { return ABI; }
const char* samoyeds_last_error(void) { return "A stub has no kernels, found a call."; }
const char* samoyeds_build_info(void) { return INFO; }
const char* samoyeds_layout(void) { return "stub.v1"; }
const char* samoyeds_heuristics(void) { return "rule  measured\nnone  never"; }
int samoyeds_prepare(int64_t) { return SAMOYEDS_UNSUPPORTED; }
int64_t samoyeds_packed_bytes(const W*) { return -SAMOYEDS_UNSUPPORTED; }
int samoyeds_pack(const L*, const W*, const void*, const uint8_t*, const uint8_t*) { return 2; }
int samoyeds_unpack(const L*, const W*, void*, uint8_t*, uint8_t*) { return 2; }
int samoyeds_choose_plan(int64_t, const W*, int64_t, int64_t, int64_t, SamoyedsPlan*) { return 2; }
int64_t samoyeds_workspace_bytes(const L*, const R*, const W*, const W*) { return -2; }
int samoyeds_moe_mlp(const L*, const R*, const W*, const W*, const void*, void*) { return 2; }
int samoyeds_moe_up(const L*, const R*, const W*, const void*, void*) { return 2; }
int samoyeds_moe_down(const L*, const R*, const W*, const void*, void*) { return 2; }
int64_t samoyeds_linear_workspace_bytes(const L*, const W*, int64_t) { return -2; }
int samoyeds_linear(const L*, const W*, const void*, int64_t, void*) { return 2; }
int64_t samoyeds_max_tiles(const R*, int64_t, int64_t) { return 0; }
#ifndef ONE_FUNCTION_LESS
int samoyeds_route(const L*, const R*, int64_t, int64_t, int32_t*, int32_t*, int32_t*) { return 2; }
#endif
"""

# Architectures as the library's info; a line in `builds` beside the sources for each build.
CMAKE_LISTS = """\
cmake_minimum_required(VERSION 3.22)
project(stub LANGUAGES CXX)
file(APPEND ${CMAKE_SOURCE_DIR}/builds "${CMAKE_CUDA_ARCHITECTURES}\\n")
if(EXISTS ${CMAKE_SOURCE_DIR}/slow)
  execute_process(COMMAND sleep 3)
endif()
string(REPLACE ";" " " names "${CMAKE_CUDA_ARCHITECTURES}")
add_library(samoyeds SHARED src/stub.cpp)
target_include_directories(samoyeds PRIVATE include)
target_compile_definitions(samoyeds PRIVATE "INFO=\\"${names}, CUDA 13.0\\"")
"""

FAKE_NVCC = """\
#!/bin/sh
echo "Cuda compilation tools, release {version}, V{version}.88"
"""


def compile_stub(path: Path, *flags: str) -> Path:
    """The stub as ``path``; ``flags`` are macros of SOURCE, as in "-DABI=99"."""
    command = ["g++", "-shared", "-fPIC", *flags, f"-I{KERNELS / 'include'}", "-x", "c++", "-"]
    subprocess.run([*command, "-o", str(path)], input=SOURCE, text=True, check=True)
    return path


def write_sources(folder: Path) -> Path:
    """A folder like kernels/, from which CMake builds the stub."""
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "stub.cpp").write_text(SOURCE)
    (folder / "CMakeLists.txt").write_text(CMAKE_LISTS)
    (folder / "include" / "samoyeds").mkdir(parents=True)
    shutil.copy(HEADER, folder / "include" / "samoyeds")
    return folder


def builds_of(sources: Path) -> list[str]:
    """What each build so far was for, as CMake had it."""
    log = sources / "builds"
    return log.read_text().splitlines() if log.exists() else []


def write_nvcc(home: Path, version: str = "13.0") -> Path:
    """A CUDA_HOME whose nvcc knows its version and compiles nothing."""
    return write_script(home / "bin" / "nvcc", FAKE_NVCC.format(version=version)).parents[1]


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path
