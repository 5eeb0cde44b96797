"""Every command in README.md runs, in the order in which it stands there; the demo elsewhere."""

from __future__ import annotations

import csv
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from test_demo import SHORT

from samoyeds_hf import build, cli, library
from samoyeds_hf.autoload import OPT_OUT

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S))

# They build an environment; what they run in it, tests/test_demo.py and all tests cover.
SCRIPTS = ("scripts/demo.sh", "scripts/test.sh")
DEMO = "samoyeds demo "  # tests/test_demo.py runs it, and reads what it prints
# How good the model is, nobody asks here; tests/test_calibrated.py prunes by the best method.
QUICKER = {
    "--pattern 1:2:64 --method best": "--pattern 1:2:64 --method wanda",
    "--samples 16": "--samples 4",
    "--tasks python_cloze": "--limit 8 --tasks python_cloze",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One working directory for all blocks, which sees the checkout as a user in a clone does."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("tests", "configs", "scripts"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The running Python's ``samoyeds``, wherever its scripts are."""
    shim = tmp_path_factory.mktemp("bin") / "samoyeds"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m samoyeds_hf.cli "$@"\n')
    shim.chmod(0o755)
    return {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


def run_block(language: str, code: str, folder: Path, environment: dict[str, str]) -> str:
    interpreters = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    done = subprocess.run(
        [*interpreters[language], code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_all_blocks_run_in_order(folder: Path, environment: dict[str, str]) -> None:
    pytest.importorskip("lm_eval", reason="the README evaluates, which needs the extra eval")
    out = []
    assert all(README.count(slow) == 1 for slow in QUICKER)
    for language, code in BLOCKS:
        for slow, quick in QUICKER.items():
            code = code.replace(slow, quick)
        lines = [line for line in code.splitlines() if not line.startswith((*SCRIPTS, DEMO))]
        out.append(run_block(language, "\n".join(lines), folder, environment))
    made = {path.name for path in folder.iterdir()} - {"tests", "configs", "scripts"}
    assert made == {"tiny-sparse", "tiny-pruned", "tiny-again", "errors.csv"}
    everything = "\n".join(out)
    for said in (
        "12 sparse weights are valid",
        "and equal the source's",
        "acc_norm",
        "experts run in",
    ):
        assert said in everything


def test_the_demo_is_what_its_tests_run() -> None:
    (line,) = [line for _, code in BLOCKS for line in code.splitlines() if line.startswith(DEMO)]
    assert shlex.split(line, comments=True) == ["samoyeds", *SHORT]


def test_only_known_languages() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    assert len(BLOCKS) == README.count("\n```") / 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name: str) -> None:
    script = REPOSITORY / name
    assert any(line.startswith(name) for _, code in BLOCKS for line in code.splitlines())
    assert script.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text(encoding="utf-8")
    assert {"scripts/demo.sh": 'samoyeds" demo "$@"', "scripts/test.sh": "-m pytest"}[name] in text


def test_the_lm_eval_command_has_its_test() -> None:
    assert "`lm_eval --model hf --model_args pretrained=tiny-sparse ...`" in README
    tests = (REPOSITORY / "tests" / "test_evaluate.py").read_text(encoding="utf-8")
    assert "def test_the_unmodified_lm_eval_command_gives_the_same_numbers(" in tests
    assert '["--model_args", f"pretrained={sparse_dir}"' in tests


# Of the accuracy tables: the results that a table is made from, its models there, and how many
# numbers it shows; then the patterns of its columns.
METHODS, LAYERS = "accuracy_lab_methods_h200.csv", "accuracy_lab_layers_h200.csv"
MIXTRAL, QWEN = "mixtral", "qwen2_moe"
TABLES = {
    "One-shot, one model": (METHODS, ((MIXTRAL, "12"),), 90),
    "What goes further, two models": (METHODS, ((MIXTRAL, "9"), (MIXTRAL, "11")), 53),
    "Whole layers, two models": (LAYERS, ((MIXTRAL, "13"), (QWEN, "13")), 34),
    "A third, Mixtral class": (LAYERS, ((MIXTRAL, "14"),), 10),
}
OTHER_MODEL = (MIXTRAL, "9")  # of what is marked
NOT_MEASURED = "\N{EN DASH}"
PATTERNS = {"VENOM": "venom:64:2:8", "unstructured": "unstructured:0.75", "mixed,": "1:2:32"}


def measured(command: str, column: str) -> tuple[str, ...]:
    """Pattern, method, recovery and ideas of a table's cell."""
    command, _, then = command.lstrip("`").partition("`")
    method, *options = command.split(" --")
    ideas = [option for option in options if option == "permute"]
    ideas += ["uneven"] if column.startswith("mixed") else []
    recovery = [option.split()[1] for option in options if option.startswith("recover ")]
    recovery += {", then distilled": ["+distill"], ", on the same text twice": ["-twice"]}.get(
        then, []
    )
    methods = [method, *(option for option in options if option in ("refine", "asymmetric"))]
    return (
        PATTERNS.get(column.split(" ")[0], column),
        "+".join(methods),
        "".join(recovery) or "none",
        "+".join(ideas) or "none",
    )


@pytest.mark.parametrize("title", TABLES)
def test_accuracy_is_that_of_the_results(title: str) -> None:
    name, models, numbers = TABLES[title]
    results = REPOSITORY / "scripts" / "bench" / "results" / name
    with results.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["path"] == "masked"]
    names = ("family", "seed", "pattern", "method", "recovery", "ideas")
    ratios = {tuple(row[name] for name in names): row["ratio"] for row in rows}
    table = re.search(rf"^{title}.*?\n\n((?:\|[^\n]*\n)+)", README, re.M | re.S)
    assert table
    head, _, *lines = table[1].splitlines()
    columns = [cell.strip() for cell in head.split("|")[2:-1]]
    checked = 0
    for line in lines:
        command, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        for column, cell in zip(columns, cells, strict=True):
            if not command.startswith("`") or not cell:
                continue
            for model, number in zip(models, cell.split(" / "), strict=True):
                shown = number.rstrip("*† ")
                key = (*(OTHER_MODEL if "†" in number else model), *measured(command, column))
                if shown == NOT_MEASURED:
                    assert key not in ratios, key
                    continue
                digits = len(shown.partition(".")[2])
                assert float(shown) == pytest.approx(float(ratios[key]), abs=0.501 * 10**-digits), (
                    key
                )
                checked += 1
    assert checked == numbers


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README


def test_paths_exist() -> None:
    paths = {text for text in INLINE if re.fullmatch(r"[\w.-]+(/[\w.-]+)*(/|\.\w+)", text)}
    paths = {text for text in paths if text.endswith(("/", ".py", ".sh", ".md", ".yaml", ".json"))}
    paths |= set(re.findall(r"\]\((?!http)([^)#]+)", README))
    assert "samoyeds_hf/format.py" in paths
    roots = (REPOSITORY, REPOSITORY / "samoyeds_hf")  # a table names siblings without the folder
    missing = [path for path in paths if not any((root / path).exists() for root in roots)]
    assert missing == []


def test_options_and_variables_exist(capsys: pytest.CaptureFixture[str]) -> None:
    options = {option for text in INLINE for option in re.findall(r"(?<!\S)--[a-z-]+", text)}
    for command in ("plan", "convert", "recover", "check", "export-dense", "eval", "demo", "env"):
        with pytest.raises(SystemExit):
            cli.app([command, "--help"])
        options -= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert options - {"--model", "--model_args", "--model_"} == set()  # of lm_eval
    variables = {OPT_OUT, build.CACHE_VARIABLE, library.KERNELS_VARIABLE, library.LIBRARY_VARIABLE}
    assert set(re.findall(r"SAMOYEDS_\w+", README)) == variables | {"SAMOYEDS_HF_BUILD_KERNELS"}
