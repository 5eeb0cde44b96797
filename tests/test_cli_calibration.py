"""``samoyeds convert`` and ``plan`` with calibration: what they print, write, and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from calibrated import LENGTH, SAMPLES, calibrated, save_source, write_text
from checkpoints import contents, files_in, save_dense
from checkpoints import convert as convert_directly
from command import STOPPED, Run, in_subprocess, refusal
from tiny_models import MIXTRAL, PATTERN


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with a tokenizer."""
    return save_source(MIXTRAL, tmp_path_factory.mktemp("readable") / "tiny-mixtral")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "letters.txt")


WINDOWS = ("--samples", SAMPLES, "--sequence-length", LENGTH)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--method", "wanda"], {"method": "wanda"}),
        (["--method", "sparsegpt", "--refine"], {"method": "sparsegpt", "refine": True}),
        (["--method", "wanda", "--no-refine"], {"method": "wanda", "refine": False}),
        (["--refine", "--device", "cpu"], {"method": "magnitude", "refine": True}),
        (["--method", "wanda", "--asymmetric"], {"method": "wanda", "asymmetric": True}),
        (["--method", "wanda", "--symmetric"], {"method": "wanda"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_convert_with_calibration(
    options: list[str],
    settings: dict[str, Any],
    run: Run,
    readable: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    arguments = ("convert", readable, tmp_path / "new", "--pattern", PATTERN)
    done = run(*arguments, *options, "--calibration", text, *WINDOWS)
    assert done.code == 0, done.err
    convert_directly(readable, tmp_path / "expected", calibrated(text, **settings))
    assert contents(tmp_path / "new") == contents(tmp_path / "expected")
    name = settings["method"] + ", refined" * settings.get("refine", False)
    name += ", asymmetric" * settings.get("asymmetric", False)
    assert f"\nmethod: {name}\n" in done.out
    assert f"\ncalibration: {SAMPLES} x {LENGTH} tokens of letters.txt, seed 0\n" in done.out
    assert str(text.parent) not in done.out
    assert run("check", tmp_path / "new", "--against", readable).code == 0


def test_a_seed_is_another_calibration(
    run: Run, readable: Path, text: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts"  # the order of several documents depends on the seed
    texts.mkdir()
    for seed in range(4):
        write_text(texts / f"{seed}.txt", seed)
    arguments = ("--method", "wanda", "--pattern", PATTERN, "--calibration", texts, *WINDOWS)
    for seed in ("0", "1"):
        done = run("convert", readable, tmp_path / seed, *arguments, "--seed", seed)
        assert f"tokens of texts, seed {seed}\n" in done.out
    assert contents(tmp_path / "0") != contents(tmp_path / "1")


def test_calibration_of_a_recipe(run: Run, readable: Path, text: Path, tmp_path: Path) -> None:
    """Its data can be exchanged on the command line, for what its user has."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"pattern: {PATTERN}\nmethod: wanda\ncalibration:\n  data: {text}\n"
        f"  samples: {SAMPLES}\n  sequence_length: {LENGTH}\n"
    )
    expected = convert_directly(readable, tmp_path / "expected", calibrated(text))
    done = run("convert", readable, tmp_path / "as it is", "--recipe", recipe)
    assert done.code == 0, done.err
    assert contents(tmp_path / "as it is") == contents(tmp_path / "expected")

    content = recipe.read_text()
    assert expected.calibration is not None
    recipe.write_text(f"{content}  sha256: {expected.calibration['sha256']}\n")
    other = write_text(tmp_path / "other.txt", seed=1)
    for name, options, shown in (
        ("same", (), f"{SAMPLES} x {LENGTH} tokens of letters.txt"),
        ("data", ("--calibration", other), f"{SAMPLES} x {LENGTH} tokens of other.txt"),
        ("fewer", ("--samples", 4), f"4 x {LENGTH} tokens of letters.txt"),
        ("short", ("--sequence-length", 8), f"{SAMPLES} x 8 tokens of letters.txt"),
    ):
        done = run("convert", readable, tmp_path / name, "--recipe", recipe, *options)
        assert done.code == 0, done.err
        assert f"\ncalibration: {shown}, seed 0\n" in done.out
    recipe.write_text(f"{content}  sha256: {'f' * 64}\n")
    message = refusal(run("convert", readable, tmp_path / "new", "--recipe", recipe))
    assert f"must have the sha256 {'f' * 64}, found" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "wanda"], "Method 'wanda' needs calibration data, found none"),
        (["--refine"], "needs calibration data, found none"),
        (["--samples", "3"], "--samples goes with --calibration, found none; name the text"),
        (["--sequence-length", "3"], "--sequence-length goes with --calibration, found none"),
        (["--seed", "3"], "--seed goes with --calibration, found none"),
        (
            ["--method", "wanda", "--calibration", "nowhere.txt", "--sequence-length", "64"],
            "found no 'nowhere.txt'; check the path",
        ),
        (  # 2048 tokens by default
            ["--method", "wanda", "--calibration", "nowhere.txt"],
            "max_position_embeddings, 128 tokens, found a sequence length of 2048; use a shorter",
        ),
        (["--method", "wanda", "--calibration", ""], "calibration data must be a file"),
        (["--recover", "blocks"], "one of ['block', 'distill'] or null, found 'blocks'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_calibration_that_is_wrong(
    options: list[str], message: str, run: Run, readable: Path, tmp_path: Path
) -> None:
    arguments = ("convert", readable, tmp_path / "new", "--pattern", PATTERN, *options)
    assert message in refusal(run(*arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"), [("--samples", "0"), ("--sequence-length", "1"), ("--seed", "-1")]
)
def test_numbers_of_calibration_that_are_none(
    option: str, value: str, run: Run, readable: Path, text: Path, tmp_path: Path
) -> None:
    arguments = ("convert", readable, tmp_path / "new", "--calibration", text)
    done = run(*arguments, option, value)
    assert done.code == 2
    assert f"Invalid value for '{option}'" in done.err


def test_calibration_beside_a_model_without_tokenizer(run: Run, text: Path, tmp_path: Path) -> None:
    dense = save_dense(MIXTRAL, tmp_path / "tiny-mixtral")
    arguments = ("convert", dense, tmp_path / "new", "--pattern", PATTERN, "--method", "wanda")
    message = refusal(run(*arguments, "--calibration", text, *WINDOWS))
    assert f"needs the model's tokenizer, found none in {dense}" in message
    assert list(tmp_path.iterdir()) == [dense]


@pytest.mark.parametrize("option", [("--refine",), ("--no-refine",), ("--recover", "block")])
def test_a_recipe_beside_a_setting_of_calibration(
    option: tuple[str, ...], run: Run, readable: Path, tmp_path: Path
) -> None:
    arguments = ("convert", readable, tmp_path / "new", "--recipe", "qwen3-30b-a3b", *option)
    named = option[0].replace("no-", "")
    assert f"found both --recipe and {named}; put the setting into" in refusal(run(*arguments))


def test_plan_and_dry_run_with_calibration(
    run: Run, readable: Path, text: Path, tmp_path: Path
) -> None:
    settings = ("--pattern", PATTERN, "--method", "best", "--calibration", text, *WINDOWS)
    done = run("plan", readable, *settings)
    assert done.code == 0, done.err
    assert f"pattern {PATTERN}, method best: 4 weights become sparse, 3 shard(s)" in done.out
    dry = run("convert", readable, tmp_path / "new", *settings, "--dry-run")
    assert dry.code == 0, dry.err
    shown, again = (
        [line for line in out.splitlines() if not line.startswith("calibration: about ")]
        for out in (done.out, dry.out)
    )
    assert shown == again
    assert len(done.out.splitlines()) == len(shown) + 1  # its time is measured anew
    message = refusal(
        run("convert", readable, tmp_path / "new", "--method", "best", "--dry-run", *settings[:2])
    )
    assert "needs calibration data, found none" in message
    assert list(tmp_path.iterdir()) == []


def test_control_c_and_resume_with_calibration(
    run: Run, readable: Path, text: Path, tmp_path: Path
) -> None:
    arguments = ("convert", readable, tmp_path / "new", "--pattern", PATTERN, "--method", "wanda")
    arguments += ("--calibration", text, *WINDOWS)
    done = in_subprocess("-c", STOPPED.format(signal="SIGINT"), *arguments)
    assert done.code == 130
    assert done.err.splitlines()[-1] == "stopped; the same command with --resume continues."
    assert "Traceback" not in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["new.partial"]
    half = files_in(tmp_path / "new.partial") or {}
    assert "hidden-before-00001.bin" in half

    message = run(*arguments, "--resume", "--seed", "1")
    assert message.code == 1
    assert "found another recipe than in" in message.err.splitlines()[-1]
    assert files_in(tmp_path / "new.partial") == half

    done = run(*arguments, "--resume")
    assert done.code == 0, done.err
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert not list((tmp_path / "new").glob("hidden*"))
    convert_directly(readable, tmp_path / "expected", calibrated(text))
    assert contents(tmp_path / "new") == contents(tmp_path / "expected")
