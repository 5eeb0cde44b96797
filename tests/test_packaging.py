"""The wheel and the sdist carry what they should, and the wheel works by itself."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from stub_kernels import builds_of, needs_cmake, write_nvcc, write_sources

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel built from it: what an index would serve."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    environment = {**os.environ, "SAMOYEDS_HF_BUILD_KERNELS": "0"}  # they would take minutes
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The wheel, installed to a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", target, next(built.glob("*.whl"))], check=True)
    return target


def files_of(folder: str) -> set[str]:
    """Paths below the project's folder that belong in a release."""
    return {
        path.relative_to(ROOT / folder).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }


def test_wheel_contents(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    package = {f"samoyeds_hf/{name}" for name in files_of("samoyeds_hf")}
    kernels = {f"samoyeds_hf/_kernels/{name}" for name in files_of("kernels")}
    configs = {f"samoyeds_hf/_configs/{name}" for name in files_of("configs")}
    assert "samoyeds_hf/py.typed" in package
    assert "samoyeds_hf/_kernels/include/samoyeds/format.cuh" in kernels
    assert "samoyeds_hf/_configs/recipes/mixtral-8x7b.yaml" in configs
    # nothing missing and nothing else: tests and their assets stay out
    assert {name for name in names if ".dist-info/" not in name} == package | kernels | configs


def test_sdist_contents(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames()}
    for folder in ("samoyeds_hf", "kernels", "configs"):
        assert {f"{folder}/{name}" for name in files_of(folder)} <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "scripts/hatch_build.py"} <= names
    assert not any(name.startswith("tests/") or name.endswith(".so") for name in names)


# --- a wheel with kernels --------------------------------------------------------------------


@pytest.fixture
def project(tmp_path) -> Path:
    """The project with kernels that compile in a second, and a compiler cache of no one else."""
    copy = tmp_path / "project"
    for folder in ("samoyeds_hf", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "scripts/hatch_build.py"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    write_sources(copy / "kernels")
    return copy


def build_wheel(
    project: Path, kind: str = "wheel", **variables: str
) -> subprocess.CompletedProcess:
    """Call the build backend as pip does, in a process that cannot import torch."""
    code = f"""
import sys
sys.modules["torch"] = None
from hatchling.build import build_{kind}
print(build_{kind}("dist"))
"""
    write_nvcc(project.parent / "cuda")
    environment = {**os.environ, "CUDA_HOME": str(project.parent / "cuda"), **variables}
    if "SAMOYEDS_HF_BUILD_KERNELS" not in variables:
        environment.pop("SAMOYEDS_HF_BUILD_KERNELS", None)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as file:
        return file.namelist()


@needs_cmake
@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux")
def test_wheel_with_kernels(project, tmp_path):
    done = build_wheel(project)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = project / "dist" / done.stdout.splitlines()[-1]
    platform = sysconfig.get_platform().replace("-", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    assert names_in(wheel).count("samoyeds_hf/_lib/libsamoyeds.so") == 1
    assert builds_of(project / "kernels") == [""]  # all architectures, GPU or not
    assert not (project / "samoyeds_hf" / "_lib").exists()

    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", target, wheel], check=True)
    code = """
from samoyeds_hf import library
found = library.load(without_gpu=True)
print(found.path, found.layout)
print(library.build_ahead().path)
"""
    expected = target / "samoyeds_hf" / "_lib" / "libsamoyeds.so"
    assert run_installed(target, code).splitlines() == [f"{expected} stub.v1", str(expected)]


@needs_cmake
@pytest.mark.parametrize(
    ("kind", "variables"),
    [
        ("wheel", {"SAMOYEDS_HF_BUILD_KERNELS": "0"}),
        ("wheel", {"CUDA_HOME": "", "PATH": ""}),
        ("editable", {}),
        ("sdist", {}),
    ],
    ids=["turned-off", "no-toolchain", "editable", "sdist"],
)
def test_wheel_without_kernels(project, kind, variables):
    done = build_wheel(project, kind, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    made = project / "dist" / done.stdout.splitlines()[-1]
    assert builds_of(project / "kernels") == []
    if kind != "sdist":
        assert made.name.endswith("-py3-none-any.whl")
        assert not any(name.endswith(".so") for name in names_in(made))


@needs_cmake
def test_wheel_whose_kernels_fail(project):
    (project / "kernels" / "src" / "stub.cpp").write_text("#error a reason\n")
    done = build_wheel(project)
    assert done.returncode != 0
    assert "or set SAMOYEDS_HF_BUILD_KERNELS=0 for a wheel without kernels" in done.stderr
    assert "#error a reason" in done.stderr
    done = build_wheel(project, SAMOYEDS_HF_BUILD_KERNELS="1", CUDA_HOME="", PATH="")
    assert done.returncode != 0
    assert "Building the kernels needs" in done.stderr


def run_installed(installed: Path, code: str) -> str:
    """Output of ``code`` with only the installed wheel as samoyeds_hf, and an empty PATH."""
    code = f"import sys; sys.path.insert(0, {str(installed)!r})\n{code}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        env={**environment, "PATH": ""},  # no nvcc, no compiler
        cwd=installed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_is_light_and_silent(installed):
    code = f"""
import samoyeds_hf
assert samoyeds_hf.__file__.startswith({str(installed)!r}), samoyeds_hf.__file__
heavy = sorted({{"torch", "transformers", "numpy", "yaml"}} & set(sys.modules))
assert not heavy, heavy
"""
    assert run_installed(installed, code) == ""


def test_works_without_compiler_or_gpu(installed):
    code = """
import torch
from samoyeds_hf import SparsityPattern, decode, encode
weight = torch.randn(4, 16)
mask = torch.zeros(4, 16, dtype=torch.bool)
mask[::2, ::2] = True
pattern = SparsityPattern.parse("1:2:8")
assert torch.equal(decode(encode(weight, mask, pattern), pattern), weight * mask)
assert not torch.cuda.is_initialized()
"""
    assert run_installed(installed, code) == ""


def test_metadata(installed):
    code = """
from importlib.metadata import distribution
from pathlib import Path
import samoyeds_hf
found = distribution("samoyeds-hf")
assert Path(found.locate_file("")).samefile(sys.path[0])
assert found.version == samoyeds_hf.__version__
print(found.metadata["License-Expression"])
for entry in sorted(found.entry_points, key=lambda entry: entry.group):
    print(entry.group, entry.name, entry.value)
"""
    assert run_installed(installed, code).splitlines() == [
        "Apache-2.0",
        "console_scripts samoyeds samoyeds_hf.cli:main",
        "torch.backends samoyeds_hf samoyeds_hf.autoload:autoload",
    ]
