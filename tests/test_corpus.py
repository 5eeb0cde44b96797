"""The standard library as text, perplexity, and the script that trains the shipped model."""

import importlib.util
import json
import math
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from samoyeds_hf.corpus import SPLITS, perplexity, python_files, read_texts, token_stream
from samoyeds_hf.errors import EvaluationError

ROOT = Path(__file__).parent.parent
STDLIB = Path(sysconfig.get_path("stdlib"))
TINY_MOE = ROOT / "tests" / "assets" / "tiny-moe"
# One file of each split at least, small, in every supported Python.
SAMPLE = ("bisect.py", "heapq.py", "json/decoder.py", "code.py", "glob.py")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "train_tiny_moe", ROOT / "scripts" / "train_tiny_moe.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A standard library of a few files."""
    root = tmp_path_factory.mktemp("library")
    for name in SAMPLE:
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(STDLIB / name, root / name)
    return root


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def trained(request, script, library, tmp_path_factory):
    """A directory written by two steps of the training script."""
    out = tmp_path_factory.mktemp(request.param)
    script.main(
        f"{out} --family {request.param} --root {library} --device cpu --steps 2 --batch 1 "
        "--layers 1 --hidden 128 --vocab 320 --dropout 0.1 --eval-tokens 1024".split()
    )
    return out


def plain_perplexity(model, stream, starts, window):
    """The definition, one token at a time."""
    losses = []
    for start in starts:
        ids = stream[start : start + window]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        for position in range(1, window):
            p = torch.softmax(logits[position - 1], dim=-1)[ids[position]]
            losses.append(-math.log(p))
    return math.exp(sum(losses) / len(losses))


def test_splits_are_disjoint_and_cover_what_is_not_left_out():
    splits = {split: set(python_files(split)) for split in SPLITS}
    union = set().union(*splits.values())
    assert sum(map(len, splits.values())) == len(union)
    left_out = {file.relative_to(STDLIB) for file in set(STDLIB.rglob("*.py")) - union}
    assert all(
        {"site-packages", "dist-packages", "encodings"} & set(file.parts)
        or file.parts[0].startswith(("_sysconfigdata", "config-", "sitecustomize"))
        for file in left_out
    )
    assert len(splits["heldout"]) > 10
    assert len(splits["validation"]) > 10


def test_a_split_is_sorted_and_fixed_by_the_path_alone(library):
    names = {
        split: [file.relative_to(library).as_posix() for file in python_files(split, library)]
        for split in SPLITS
    }
    assert names == {
        "train": ["bisect.py", "heapq.py", "json/decoder.py"],
        "validation": ["code.py"],
        "heldout": ["glob.py"],
    }


def test_the_library_own_tests_are_training_text_only(tmp_path):
    # glob.py, the held-out name, decides nothing below a test directory.
    for name in ("glob.py", "code.py", "test/glob.py", "idlelib/idle_test/glob.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    for name in ("encodings/cp1.py", "site-packages/a.py", "_sysconfigdata_x.py", "config-3/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    train = [file.relative_to(tmp_path).as_posix() for file in python_files("train", tmp_path)]
    assert train == ["idlelib/idle_test/glob.py", "test/glob.py"]
    assert python_files("heldout", tmp_path) == [tmp_path / "glob.py"]


def test_unknown_split_and_missing_sources_say_the_way_out(tmp_path):
    with pytest.raises(EvaluationError, match=r"one of train, validation, heldout, found 'test'"):
        python_files("test")
    with pytest.raises(EvaluationError, match=r"found none in .*; pass root="):
        python_files("train", tmp_path)


def test_texts_in_other_encodings_and_empty_ones_are_left_out(tmp_path):
    contents = {"a.py": "x = 'é'\n".encode(), "b.py": "x = 'é'\n".encode("latin-1"), "c.py": b"\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert read_texts(tmp_path / name for name in sorted(contents)) == ["x = 'é'\n"]


def test_perplexity_is_the_definition_in_plain_loops(trained, library):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).train()
    texts = read_texts(python_files("train", library))
    stream = token_stream(tokenizer, texts)
    total = len(stream) // 20
    assert total > 100
    # 3 windows of 20 at even distance; a batch of 2 leaves a batch of 1.
    starts = [20 * (i * total // 3) for i in range(3)]
    found = perplexity(model, tokenizer, texts, window=20, max_tokens=79, batch_size=2)
    assert model.training
    assert found == pytest.approx(plain_perplexity(model.eval(), stream, starts, 20), rel=1e-5)
    assert found == perplexity(model, tokenizer, texts, window=20, max_tokens=79, batch_size=2)
    # Shorter than a window: all there is, once.
    tokens = token_stream(tokenizer, ["import os\n"])
    found = perplexity(model, tokenizer, ["import os\n"])
    assert found == pytest.approx(plain_perplexity(model, tokens, [0], len(tokens)), rel=1e-5)


def test_perplexity_of_nothing_is_refused(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = AutoModelForCausalLM.from_pretrained(trained)
    with pytest.raises(EvaluationError, match="two tokens or more"):
        perplexity(model, tokenizer, [])
    with pytest.raises(EvaluationError, match="a window of 1"):
        perplexity(model, tokenizer, ["import os\n"], window=1)


def test_a_trained_directory_loads_and_generates(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = AutoModelForCausalLM.from_pretrained(trained)
    text = "def naïve(x):\n\treturn  x ** 2  # 二\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.dtype == torch.bfloat16
    prompt = tokenizer("import ", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (1, prompt["input_ids"].shape[1] + 4)
    card = (trained / "README.md").read_text(encoding="utf-8")
    assert f"--family {model.config.model_type} " in card
    assert "2 steps of 1 x 1024 tokens" in card


def test_the_shipped_model_is_what_its_card_says():
    config = json.loads((TINY_MOE / "config.json").read_text())
    assert config["model_type"] == "mixtral"
    assert config["num_local_experts"] == 8
    assert config["num_experts_per_tok"] == 2
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
    assert all(file.stat().st_size < 16e6 for file in TINY_MOE.iterdir())
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE)
    texts = read_texts(python_files("heldout"))
    # 10.6 over all held-out files of Python 3.11; other versions have other files.
    assert 5 < perplexity(model, tokenizer, texts, max_tokens=4096) < 16
