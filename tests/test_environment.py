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
from tiny_models import MIXTRAL

import samoyeds_hf
from samoyeds_hf import environment
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
    assert rows["kernel library"].startswith("none")
    assert rows["experts run in"] == environment.execution_path()
    assert "slower than dense" in rows["experts run in"]
    assert "autoload" in rows


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
