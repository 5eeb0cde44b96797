"""The wheel and the sdist carry what they should, and the wheel works by itself."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel built from it: what an index would serve."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not any(name.startswith("tests/") for name in names)


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
