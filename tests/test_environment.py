"""What ``samoyeds env`` says is true, and a process hears once which path runs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from checkpoints import convert, save_dense
from stub_kernels import (
    builds_of,
    compile_stub,
    needs_cmake,
    needs_compiler,
    write_nvcc,
    write_sources,
)
from tiny_models import MIXTRAL

import samoyeds_hf
from samoyeds_hf import cli, environment, library
from samoyeds_hf.errors import ConfigError, KernelError
from samoyeds_hf.format import FORMAT_VERSION


def described() -> dict[str, str]:
    """The rows of the table."""
    head, *rows = environment.describe().splitlines()
    column = head.index("found")
    return {row[:column].strip(): row[column:].strip() for row in rows}


def test_table() -> None:
    rows = described()
    assert rows["samoyeds-hf"] == samoyeds_hf.__version__
    assert rows["format version"] == str(FORMAT_VERSION)
    assert rows["Python"] == f"{platform.python_version()} ({sys.executable})"
    assert rows["torch"] == torch.__version__
    assert rows["transformers"] == transformers.__version__
    for name in ("safetensors", "huggingface_hub", "accelerate", "tokenizers"):
        assert rows[name] == metadata.version(name)
    assert rows["experts run in"] == environment.execution_path()
    assert "autoload" in rows


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    why = library.Decision(None, "The compiler failed (log: x.log).\n  the log's last line")
    monkeypatch.setattr(library, "_decision", why)
    monkeypatch.setattr(library, "load", lambda **_: None)
    rows = described()
    assert rows["kernel library"] == "none: The compiler failed (log: x.log)"
    assert rows["experts run in"] == (
        "plain torch, one expert at a time: right on every device, slower than dense "
        "(The compiler failed (log: x.log))"
    )
    with pytest.raises(KernelError, match="found none here; `samoyeds env --build` makes one"):
        environment.heuristics()


@needs_compiler
def test_with_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compile_stub(tmp_path / "libsamoyeds.so", '-DINFO="sm_90a, CUDA 13.0"')
    monkeypatch.setenv("SAMOYEDS_HF_LIBRARY", str(path))
    monkeypatch.delenv("SAMOYEDS_HF_KERNELS", raising=False)
    found = library.load(without_gpu=True)
    assert described()["kernel library"] == f"{path} (sm_90a, CUDA 13.0; layout stub.v1)"
    assert environment.heuristics().startswith("rule")
    monkeypatch.setattr(library, "_decision", library.Decision(found))
    kernels = "CUDA kernels (bf16, fp16); plain torch for fp32 and on the CPU"
    assert described()["experts run in"] == kernels
    monkeypatch.setattr(library, "_decision", library.Decision(None, "No GPU."))
    monkeypatch.setenv("SAMOYEDS_HF_LIBRARY", str(tmp_path / "nowhere.so"))
    assert described()["kernel library"].startswith("none: A kernel library must be a file")


def test_the_table_survives_a_library_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: bool) -> library.Decision:
        raise KernelError("A kernel library must be a file.\nMore.")

    monkeypatch.setattr(library, "decide", refuse)
    rows = described()
    assert rows["kernel library"] == "none: A kernel library must be a file"
    assert rows["experts run in"] == "nothing: A kernel library must be a file"


@needs_cmake
def test_build_command(tmp_path: Path) -> None:
    """``samoyeds env --build`` and ``--heuristics``, each in a process of its own."""
    sources = write_sources(tmp_path / "kernels")
    code = (
        "import sys; from pathlib import Path; from samoyeds_hf import build, cli\n"
        f"build.kernels_dir = lambda: Path({str(sources)!r})\n"
        "cli.main()"
    )
    variables = {
        "SAMOYEDS_HF_CACHE": str(tmp_path / "cache"),
        "CUDA_HOME": str(write_nvcc(tmp_path / "cuda")),
    }
    command = ("env", "--build", "--arch", "90a", "--arch", "80")
    done = run_python(code, *command, **variables)
    assert "(80-real 90a-real, CUDA 13.0; layout stub.v1)" in done.stdout
    assert "building the CUDA kernels for 80, 90a" in done.stderr
    again = run_python(code, *command, **variables)
    assert (again.stdout, again.stderr) == (done.stdout, "")
    assert builds_of(sources) == ["80-real;90a-real"]
    table = run_python(code, "env", "--heuristics", **variables).stdout
    assert table == "rule  measured\nnone  never\n"


def test_architectures_without_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["samoyeds", "env", "--arch", "90a"])
    with pytest.raises(ConfigError, match="found no --build; add it"):
        cli.app(standalone_mode=False)


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "lm_eval":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(environment.metadata, "version", version)
    assert described()["lm_eval"] == "not installed"


def test_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert described()["GPU"] == "none"
    one = SimpleNamespace(name="GPU X", major=9, minor=0, total_memory=80_000_000_000)
    monkeypatch.setattr(library, "_decision", library.Decision(None, "a test"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: one)
    assert described()["GPU"] == "GPU X (sm_90, 80 GB), GPU X (sm_90, 80 GB)"


@pytest.mark.parametrize(
    ("installed", "variable", "line"),
    [
        (True, None, "on (SAMOYEDS_HF_AUTOLOAD=0 turns it off)"),
        (True, "1", "on (SAMOYEDS_HF_AUTOLOAD=0 turns it off)"),
        (True, "0", "off by SAMOYEDS_HF_AUTOLOAD=0"),
        (False, None, "off: samoyeds-hf is not installed here, so it must be imported"),
    ],
)
def test_autoload(
    installed: bool, variable: str | None, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["torch_npu", *(["samoyeds_hf"] if installed else [])]
    entries = [SimpleNamespace(name=name) for name in names]
    monkeypatch.setattr(environment.metadata, "entry_points", lambda group: entries)
    monkeypatch.delenv("SAMOYEDS_HF_AUTOLOAD", raising=False)
    if variable is not None:
        monkeypatch.setenv("SAMOYEDS_HF_AUTOLOAD", variable)
    assert described()["autoload"] == line


def test_autoload_line_is_what_happens() -> None:
    """In a fresh process: does ``import torch`` arm the registration?"""
    code = (
        "import sys, torch\n"
        "print(any(type(f).__module__ == 'samoyeds_hf.autoload' for f in sys.meta_path))\n"
        "import samoyeds_hf\n"
        "print(any(type(f).__module__ == 'samoyeds_hf.autoload' for f in sys.meta_path))\n"
        "from samoyeds_hf.environment import describe\n"
        "print([line for line in describe().splitlines() if 'autoload' in line][0])"
    )
    for variable in ("0", "1"):
        out = run_python(code, SAMOYEDS_HF_AUTOLOAD=variable).stdout
        by_torch, by_import, line = out.splitlines()
        assert by_torch == str("  on (" in line)
        assert by_import == "True"  # of the user's own
        if variable == "0":
            assert by_torch == "False"


# A user's program that makes and loads sparse models several times.
PROGRAM = """\
import sys
import samoyeds_hf
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:] * 2:
    AutoModelForCausalLM.from_pretrained(directory)
"""


def test_the_path_is_announced_once_a_process(tmp_path: Path) -> None:
    dense = save_dense(MIXTRAL, tmp_path / "dense")
    convert(dense, tmp_path / "sparse")
    done = run_python(PROGRAM, str(tmp_path / "sparse"))
    message = f"samoyeds_hf: experts run in {environment.execution_path()}."
    assert done.stderr.count(message) == 1
    assert done.stdout == ""
    done = run_python(PROGRAM, str(dense))
    assert "samoyeds_hf" not in done.stderr  # a dense model is none of our business


def run_python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done
