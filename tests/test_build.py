"""Building the kernel library: what it needs, how it fails, and what survives a failure."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from stub_kernels import builds_of, needs_cmake, write_nvcc, write_script, write_sources

from samoyeds_hf import build, toolchain
from samoyeds_hf.errors import BuildError, ConfigError
from samoyeds_hf.resources import kernels_dir
from samoyeds_hf.toolchain import Toolchain, find_toolchain

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the library is built on Linux")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("SAMOYEDS_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", str(write_nvcc(tmp_path / "cuda")))


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_sources(tmp_path / "kernels")
    monkeypatch.setattr(build, "kernels_dir", lambda: folder)
    return folder


# --- the toolchain ---------------------------------------------------------------------------


def only_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A PATH with programs of these names, and no CUDA elsewhere."""
    folder.mkdir()
    for name in names:
        write_script(folder / name, "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("samoyeds_hf.toolchain._DEFAULT_CUDA", folder / "nowhere")


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ([], r"needs cmake, found none \(PATH, Python packages\); install it \(pip install cmake"),
        (["cmake"], r"needs g\+\+, found none \(PATH\); install it, or name another compiler by C"),
        (["cmake", "g++"], r"needs ninja or make, found none \(PATH\); install one of them\.$"),
    ],
)
def test_missing_tool(
    there: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cmake", None)  # no Python package of that name either
    only_on_path(tmp_path / "bin", monkeypatch, *there)
    with pytest.raises(BuildError, match=message):
        find_toolchain()


def test_toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_on_path(tmp_path / "bin", monkeypatch, "g++", "make")
    package = SimpleNamespace(CMAKE_BIN_DIR=str(tmp_path / "package"))
    monkeypatch.setitem(sys.modules, "cmake", package)
    nvcc, cmake = tmp_path / "cuda" / "bin" / "nvcc", tmp_path / "package" / "cmake"
    assert find_toolchain() == Toolchain(nvcc, "13.0", cmake, "Unix Makefiles")
    cmake = write_script(tmp_path / "bin" / "cmake", "#!/bin/sh\n")
    write_script(tmp_path / "bin" / "ninja", "#!/bin/sh\n")
    assert find_toolchain() == Toolchain(nvcc, "13.0", cmake, "Ninja")


def test_where_nvcc_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_on_path(tmp_path / "bin", monkeypatch, "cmake", "g++", "make")
    monkeypatch.delenv("CUDA_HOME")
    message = r"needs nvcc, found none \(CUDA_HOME, PATH, .*\); install the CUDA toolkit, or name"
    with pytest.raises(BuildError, match=message):
        find_toolchain()
    default = write_nvcc(tmp_path / "default", "12.5")
    monkeypatch.setattr("samoyeds_hf.toolchain._DEFAULT_CUDA", default)
    assert find_toolchain().cuda == "12.5"
    on_path = write_nvcc(tmp_path / "other", "12.8") / "bin"
    monkeypatch.setenv("PATH", f"{on_path}:{tmp_path / 'bin'}")
    assert find_toolchain().nvcc == on_path / "nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert find_toolchain().cuda == "13.0"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "removed"))
    assert find_toolchain().cuda == "12.8"


def test_nvcc_that_is_of_no_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc(tmp_path / "cuda", "12.4")
    with pytest.raises(
        BuildError, match=r"needs nvcc 12\.5 or newer, found 12\.4 at .*/nvcc; name"
    ):
        find_toolchain()
    for text in ("#!/bin/sh\necho broken; exit 3\n", "#!/nowhere\n"):
        write_script(tmp_path / "cuda" / "bin" / "nvcc", text)
        with pytest.raises(
            BuildError, match=r"needs an nvcc that runs, found that .* says .+; name"
        ):
            find_toolchain()


def test_other_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(BuildError, match="built on Linux, found win32"):
        find_toolchain()


def test_architectures() -> None:
    capabilities = [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 1)]
    found = [toolchain.architectures_for([capability]) for capability in capabilities]
    one_each = ["80", "86", "86", "89", "90a", "ptx", "ptx"]
    assert found == [(), *((name,) for name in one_each)]
    assert toolchain.architectures_for(capabilities) == ("80", "86", "89", "90a", "ptx")
    assert toolchain.check_architectures(["90a", "80", "90a"]) == ("80", "90a")
    with pytest.raises(ConfigError, match="found '90'"):
        toolchain.check_architectures(["80", "90"])


def test_a_wheel_ships_all_of_them() -> None:
    """CMakeLists.txt is where that set is written."""
    text = (kernels_dir() / "CMakeLists.txt").read_text()
    shipped = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES ([^\n]+)", text)
    assert shipped is not None
    assert shipped[1].split() == list(toolchain.ARCHITECTURES.values())


# --- the cache -------------------------------------------------------------------------------


def test_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("SAMOYEDS_HF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert build.cache_dir() == Path("/xdg/samoyeds_hf")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert build.cache_dir() == Path("/home/me/.cache/samoyeds_hf")


def make(tools: Toolchain, *architectures: str) -> Path:
    return build.build(tools, architectures, Path.is_file)


@needs_cmake
def test_key(sources: Path, tmp_path: Path) -> None:
    """Sources, CUDA and architectures: each makes another library, the rest does not."""
    tools = find_toolchain()
    first = make(tools, "90a")
    (sources / "README.md").write_text("not compiled")
    (sources / "include" / "samoyeds" / "api.h").touch()
    assert make(tools, "90a") == first
    assert build.find_built(("90a",), tools) == first
    assert build.find_built(("80",), tools) is None
    second = make(tools, "80", "90a")
    assert build.find_built(("80",), tools) == second
    write_nvcc(tmp_path / "cuda", "13.1")
    newer = find_toolchain()
    assert build.find_built(("80",), newer) is None
    third = make(newer, "80")
    assert build.find_built(("80",), newer) == third
    assert build.find_built(("80",), None) == third  # the newest, without an nvcc
    everything = make(newer)
    assert build.find_built(("89", "ptx"), newer) == build.find_built((), newer) == everything
    with (sources / "src" / "stub.cpp").open("a") as file:
        file.write("// changed\n")
    assert build.find_built((), None) is None
    fourth = make(tools, "90a")
    assert len({first, second, third, everything, fourth}) == 5
    assert len(builds_of(sources)) == 5
    # nothing but the library and the lock stays
    files = sorted(path.name for path in fourth.parent.iterdir())
    assert files == ["libsamoyeds.so", "lock"]


@needs_cmake
@pytest.mark.parametrize("step", ["CMake", "compiler"])
def test_failing_tool(
    step: str, sources: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lists = sources / "CMakeLists.txt"
    good = lists.read_text()
    if step == "CMake":
        lists.write_text(good + 'message(FATAL_ERROR "a reason")\n')
    else:
        (sources / "src" / "stub.cpp").write_text("#error a reason\n")
    with pytest.raises(BuildError) as failed:
        make(find_toolchain(), "90a")
    first, *end = str(failed.value).splitlines()
    match = re.fullmatch(
        rf"The CUDA kernels could not be built: the {step} ended with exit code \d+ "
        r"\(log: (\S+)\); correct what it says and run `samoyeds env --build`\. It ends:",
        first,
    )
    assert match is not None, first
    assert 1 < len(end) <= 15
    assert any("a reason" in line for line in end)
    log = Path(match[1])
    assert "a reason" in log.read_text()
    assert [path.name for path in log.parent.iterdir() if path.is_dir()] == []
    assert len(capfd.readouterr().err.splitlines()) == 1  # not a stream of compiler output

    with pytest.raises(BuildError, match=rf"tried before \(log: {log}\)"):
        make(find_toolchain(), "90a")
    with pytest.raises(BuildError, match="exit code"):
        build.build(find_toolchain(), ("90a",), Path.is_file, retry=True)
    # the log goes once it works; here the failure was not in the sources' content
    moved = log.rename(tmp_path / "failed.log")
    lists.write_text(good)
    write_sources(tmp_path / "again")
    (sources / "src" / "stub.cpp").write_text((tmp_path / "again/src/stub.cpp").read_text())
    library = make(find_toolchain(), "90a")
    moved.rename(library.parent / "failed.log")
    library.unlink()
    assert build.build(find_toolchain(), ("90a",), Path.is_file, retry=True) == library
    assert not (library.parent / "failed.log").exists()


@needs_cmake
def test_library_that_is_no_good_is_built_again(sources: Path) -> None:
    tools = find_toolchain()
    library = make(tools, "80")
    library.write_bytes(b"short")
    assert build.build(tools, ("80",), lambda path: path.stat().st_size > 5) == library
    assert library.stat().st_size > 5
    assert len(builds_of(sources)) == 2


def test_cache_that_cannot_be_written(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAMOYEDS_HF_CACHE", str(tmp_path / "file" / "cache"))
    tools = Toolchain(Path("nvcc"), "13.0", Path("cmake"), "Ninja")
    message = r"cache that can be written, found .*file.*; name another folder by SAMOYEDS_HF_CACHE"
    with pytest.raises(BuildError, match=message):
        make(tools, "90a")
    assert build.find_built((), None) is None


# A process that builds from the sources in argv[1].
BUILDER = """\
import signal
import sys
from pathlib import Path
from samoyeds_hf import build, toolchain
# whoever started the tests in the background may have had Ctrl-C ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
build.kernels_dir = lambda: Path(sys.argv[1])
print(build.build(toolchain.find_toolchain(), ("90a",), Path.is_file))
"""


def start_builder(sources: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(sources)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_builds(sources: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(builds_of(sources)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@needs_cmake
def test_two_processes_build_once(sources: Path) -> None:
    (sources / "slow").touch()
    first = start_builder(sources)
    wait_for_builds(sources, 1)
    second = start_builder(sources)
    (out, _), (out_2, err_2) = first.communicate(timeout=60), second.communicate(timeout=60)
    assert first.returncode == second.returncode == 0, err_2
    assert out == out_2
    assert Path(out.strip()).is_file()
    assert (
        err_2 == "samoyeds_hf: another process is building the CUDA kernels; waiting for it ...\n"
    )
    assert len(builds_of(sources)) == 1


@needs_cmake
@pytest.mark.parametrize("whole_group", [True, False], ids=["with-compilers", "alone"])
def test_killed_build(whole_group: bool, sources: Path) -> None:
    """SIGKILL in the middle; compilers that survive go on in a folder that nobody wants."""
    (sources / "slow").touch()
    process = start_builder(sources)
    wait_for_builds(sources, 1)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    folder = build._folder_of(find_toolchain(), ("90a",))
    assert len(list(folder.glob("build-*"))) == 1
    assert not (folder / "libsamoyeds.so").exists()
    (sources / "slow").unlink()
    library = make(find_toolchain(), "90a")
    assert library.is_file()
    assert not (folder / "failed.log").exists()
    assert len(builds_of(sources)) == 2
    process.communicate()  # of the compilers, too
    again = make(find_toolchain(), "90a")
    assert again == library
    assert library.stat().st_size > 1000


@needs_cmake
def test_interrupted_build(sources: Path) -> None:
    """Ctrl-C reaches the compilers as well and leaves nothing behind."""
    (sources / "slow").touch()
    process = start_builder(sources)
    wait_for_builds(sources, 1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    folder = build._folder_of(find_toolchain(), ("90a",))
    assert [path.name for path in folder.iterdir()] == ["lock"]
