"""``samoyeds demo``: it runs as it stands, and every number that it prints is measured."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import convert
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from samoyeds_hf import SamoyedsConfig, demo, resources
from samoyeds_hf.cli import app
from samoyeds_hf.corpus import perplexity, python_files, read_texts
from samoyeds_hf.report import format_bytes

REPOSITORY = Path(__file__).parent.parent
TINY_MOE = REPOSITORY / "tests" / "assets" / "tiny-moe"
TOKENS = 1024
SAMPLES = 4
METHOD = "wanda"  # the default takes minutes on one core
# As README.md has it.
SHORT = ["demo", "--tokens", str(TOKENS), "--samples", str(SAMPLES), "--method", METHOD]
PROMPTS = ("def __init__(self", "import os\n")


def run_demo(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "samoyeds_hf.cli", "demo", *map(str, arguments)]
    temporary = {"TMPDIR": str(cwd)}
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | temporary,
        capture_output=True,
        text=True,
        check=False,
    )


def table(out: str) -> dict[str, tuple[str, float, int, float]]:
    """Size, ratio, sparse layers and perplexity by model, from the last lines."""
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("model "))
    assert lines[head].split("  ")[-1].strip() == "held-out perplexity"
    rows = {}
    for line in lines[head + 1 :]:
        name, size, ratio, layers, value = re.split(r"\s{2,}", line)
        rows[name] = (size, float(ratio), int(layers), float(value))
    return rows


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("demo")
    done = run_demo(*SHORT[1:], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []  # it cleans up
    return done.stdout


def size_and_ratio(directory: Path) -> tuple[str, float]:
    size, dense_size = (
        sum(file.stat().st_size for file in path.glob("*.safetensors"))
        for path in (directory, TINY_MOE)
    )
    return format_bytes(size), round(size / dense_size, 2)


def sizes(pattern: str, directory: Path) -> tuple[str, float]:
    """Of a conversion to a pattern: a quick one, as every method makes the same."""
    convert(TINY_MOE, directory, SamoyedsConfig(pattern))
    return size_and_ratio(directory)


def measured(pattern: str | None, folder: Path) -> tuple[str, float, int, float]:
    """What the demo's row must say, from a conversion and a load of our own."""
    directory = TINY_MOE
    if pattern is not None:
        directory = folder / pattern.replace(":", "-")
        convert(TINY_MOE, directory, demo.demo_config(pattern, METHOD, SAMPLES))
    model = AutoModelForCausalLM.from_pretrained(directory)
    texts = read_texts(python_files("heldout"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    value = perplexity(model, tokenizer, texts, max_tokens=TOKENS)
    num_sparse = 0 if pattern is None else model.config.num_hidden_layers
    return *size_and_ratio(directory), num_sparse, round(value, 2)


def test_the_table_is_measured(printed: str, tmp_path: Path) -> None:
    rows = table(printed)
    assert list(rows) == ["dense", "2:4", "1:2:64"]
    assert rows["2:4"][:3] == (*sizes("2:4", tmp_path / "any"), rows["1:2:64"][2])
    for name in ("dense", "1:2:64"):
        row, expected = rows[name], measured(None if name == "dense" else name, tmp_path)
        assert row[:3] == expected[:3]
        # Another process may round otherwise in the last bits of bf16.
        assert row[3] == pytest.approx(expected[3], rel=0.01)
    assert rows["dense"][3] < rows["2:4"][3] < rows["1:2:64"][3]


def test_it_shows_the_best_method() -> None:
    config = demo.demo_config("2:4")
    assert (config.method, config.permute, config.calibration.samples) == ("best", True, 64)


def test_text_before_and_after(printed: str) -> None:
    for prompt in PROMPTS:
        for name in ("dense", "2:4", "1:2:64"):
            sample = printed.split(f"--- {name} continues {prompt!r}\n")[1].split("\n---")[0]
            assert sample.startswith(prompt.rstrip("\n"))
            assert len(sample) > len(prompt) + 20
    assert [line for line in printed.splitlines() if line.startswith("loading")] == [
        f"loading {name} in a fresh process" for name in ("dense", "2:4", "1:2:64")
    ]


def test_the_dense_text_is_what_the_model_says(printed: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    first = model.generate(**inputs, max_new_tokens=6, do_sample=False, repetition_penalty=1.15)
    text = tokenizer.decode(first[0], skip_special_tokens=True)
    assert f"--- dense continues {PROMPTS[0]!r}\n{text}" in printed


def test_another_pattern_gives_other_numbers(
    printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_fresh_process, convert_checkpoint = demo._in_fresh_process, demo.convert_checkpoint

    def only_the_pattern(directory: Path, max_tokens: int) -> dict[str, Any]:
        """The other two have been measured, and each takes seconds."""
        if directory.name == "1-4-32":
            return in_fresh_process(directory, max_tokens)
        return {"perplexity": 1.0, "samples": ["", ""], "sparse_modules": 0}

    def convert_the_pattern(source: Path, directory: Path, *more: Any, **options: Any) -> None:
        if directory.name == "1-4-32":
            convert_checkpoint(source, directory, *more, **options)

    monkeypatch.setattr(demo, "_in_fresh_process", only_the_pattern)
    monkeypatch.setattr(demo, "convert_checkpoint", convert_the_pattern)
    done = CliRunner().invoke(app, [*SHORT, "--pattern", "1:4:32"])
    assert done.exit_code == 0, done.output
    before, rows = table(printed), table(done.stdout)
    assert list(rows) == ["dense", "2:4", "1:4:32"]
    size, ratio, layers, value = rows["1:4:32"]
    assert (size, ratio) == sizes("1:4:32", tmp_path / "any")
    assert layers == before["1:2:64"][2]
    assert ratio < before["1:2:64"][1]
    assert value > before["dense"][3]
    assert value != before["1:2:64"][3]


def test_a_process_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails in the fresh process is reported as a sentence, not as a traceback."""
    monkeypatch.setattr(demo, "_FRESH_PROCESS", "raise RuntimeError('no such thing.')")
    monkeypatch.setattr(demo, "convert_checkpoint", lambda *_, **__: None)
    with pytest.raises(demo.SamoyedsError, match="must load in a fresh process") as info:
        demo.run_demo("2:4", TINY_MOE, max_tokens=TOKENS)
    assert "\n" not in str(info.value)
    assert "Traceback" not in str(info.value)
    assert "RuntimeError: no such thing;" in str(info.value)
    assert "loading dense" in capsys.readouterr().out


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    for file in TINY_MOE.iterdir():
        if not file.name.startswith("tokenizer"):
            shutil.copy(file, tmp_path)
    with pytest.raises(demo.SamoyedsError, match="Calibration needs the model's tokenizer"):
        demo.run_demo("2:4", tmp_path, max_tokens=TOKENS)


def test_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resources, "_CHECKOUT", tmp_path)
    with pytest.raises(demo.SamoyedsError, match=r"run it in a clone, or name .* --model"):
        demo.run_demo("1:2:64")
