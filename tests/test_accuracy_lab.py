"""The accuracy laboratory: its parts against plain definitions, and all of it on a tiny model."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import re
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from samoyeds_hf import SparsityPattern
from samoyeds_hf.corpus import perplexity, token_stream
from samoyeds_hf.errors import EvaluationError, PatternError

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
TINY_MOE = ROOT / "tests" / "assets" / "tiny-moe"
SPLITS = {"heldout": 0, "validation": 1, "train": 7}  # crc32 % 20 of names that belong to them


@pytest.fixture(scope="module")
def lab() -> Iterator[type]:
    """Imports from scripts, as accuracy_lab.py does; afterwards no short name is left behind."""
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))

    class Lab:
        def __getattr__(self, name: str) -> ModuleType:
            return importlib.import_module("accuracy_lab" if name == "script" else f"lab.{name}")

    yield Lab()  # type: ignore[misc]
    sys.path.remove(str(SCRIPTS))
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("lab", "bench", "accuracy_lab", "train_tiny_moe"):
            del sys.modules[name]


def name_in(split: str, suffix: str = ".txt") -> Iterator[str]:
    """File names that belong to a split."""
    for number in itertools.count():
        name = f"text{number}{suffix}"
        if zlib.crc32(name.encode()) % 20 == SPLITS[split]:
            yield name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives and tasks of the laboratory's layout; the text is this package's own."""
    root = tmp_path_factory.mktemp("data")
    (root / "train_text").mkdir()
    (root / "eval").mkdir()
    sources = sorted((ROOT / "samoyeds_hf").glob("*.py"))
    names = {split: name_in(split) for split in SPLITS}
    with tarfile.open(root / "train_text" / "sources.tar.xz", "w:xz", preset=0) as archive:
        for number, source in enumerate(sources):
            split = {0: "heldout", 1: "validation"}.get(number % 8, "train")
            content = source.read_bytes().replace(b"\n", b"\r\n")
            info = tarfile.TarInfo(f"sources/{next(names[split])}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        archive.addfile(tarfile.TarInfo("sources/notes.bin"), io.BytesIO())
    for task, choices in (("arc_easy", ["def", "class", "raise", "x"]), ("piqa", ["True", "no"])):
        lines = [
            json.dumps({"query": f"Question: {n}\n", "choices": choices, "gold": n % len(choices)})
            for n in range(6)
        ]
        (root / "eval" / f"{task}.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()


# --- text -----------------------------------------------------------------------------------------


def test_documents(lab: ModuleType, data: Path) -> None:
    texts = lab.corpus.read_documents(data, 1 << 30)
    originals = {path.read_text() for path in (ROOT / "samoyeds_hf").glob("*.py")}
    found = [text for split in SPLITS for text in texts[split]]
    assert len(found) == len(originals)
    assert set(found) == originals  # each once, with plain line ends
    assert len(texts["train"]) > len(texts["heldout"]) > 0
    cut = lab.corpus.read_documents(data, 1000)
    assert all(sum(map(len, cut[split])) <= 1000 for split in SPLITS)
    assert texts["train"][0].startswith(cut["train"][0].rstrip("\r"))


def test_documents_of_every_split_are_needed(lab: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"train_text/\*\.tar\.xz, found none"):
        lab.corpus.read_documents(tmp_path, 100)
    (tmp_path / "train_text").mkdir()
    with tarfile.open(tmp_path / "train_text" / "a.tar.xz", "w:xz") as archive:
        info = tarfile.TarInfo(next(name_in("train")))
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(EvaluationError, match="every split, found none for validation"):
        lab.corpus.read_documents(tmp_path, 100)


def test_encode_is_token_stream(lab: ModuleType) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    texts = ["import os\n", "", "def f(x):\n    return x\n"] * 30
    assert lab.corpus.encode(tokenizer, texts).equal(token_stream(tokenizer, texts))


def test_the_first_to_make_a_folder_stays(lab: type, tmp_path: Path) -> None:
    """Two at once; one that fails leaves nothing."""
    folder = tmp_path / "work" / "corpus"
    with lab.folder.made_once(folder) as late:
        with lab.folder.made_once(folder) as early:
            (early / "name").write_text("early")
        (late / "name").write_text("late")
    assert (folder / "name").read_text() == "early"
    with pytest.raises(KeyboardInterrupt), lab.folder.made_once(tmp_path / "other"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["work", "corpus", "name"]


def test_a_folder_that_cannot_be_made(lab: type, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.write_text("a file")
    with pytest.raises(NotADirectoryError), lab.folder.made_once(folder):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_windows(lab: ModuleType) -> None:
    streams = {"train": torch.arange(1003), "heldout": torch.arange(100)}
    corpus = lab.corpus.Corpus(None, streams, "")
    assert corpus.windows("heldout", 3, 10)[:, 0].tolist() == [0, 30, 60]
    assert corpus.windows("heldout", 99, 30).shape == (3, 30)
    with pytest.raises(EvaluationError, match="window of 101 tokens, found 100"):
        corpus.windows("heldout", 1, 101)
    epochs = corpus.epochs(100, seed=0)
    first, second = next(epochs), next(epochs)
    assert first.shape == second.shape == (10, 100)
    assert first.unique().numel() == 1000  # nothing twice
    assert not first.equal(second)
    assert (first.diff() == 1).all()
    taken = corpus.shuffled(13, 100, seed=0)
    assert taken[:10].equal(first)
    assert taken[10:].equal(second[:3])
    assert not corpus.shuffled(13, 100, seed=1).equal(taken)
    with pytest.raises(EvaluationError, match="longer than a window of 1003"):
        next(corpus.epochs(1003, seed=0))


# --- measures -------------------------------------------------------------------------------------


def test_perplexity_is_the_packages(lab: ModuleType, tiny: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    texts = [(ROOT / "samoyeds_hf" / "corpus.py").read_text()]
    expected = perplexity(tiny, tokenizer, texts, window=128, max_tokens=1024)
    streams = {"heldout": token_stream(tokenizer, texts)}
    windows = lab.corpus.Corpus(tokenizer, streams, "").windows("heldout", 8, 128)
    assert lab.measure.perplexity(tiny.train(), windows) == pytest.approx(expected, rel=1e-5)
    assert tiny.training  # as it was
    tiny.eval()


def test_accuracy_is_a_plain_loop(
    lab: ModuleType, tiny: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    questions = [
        {"query": "import os\nprint(", "choices": ["os.path", "lambda: None", "x"], "gold": 0},
        {"query": "for x in", "choices": ["range(10):", "a much longer choice"], "gold": 1},
        {"query": "class A", "choices": ["(B):", "=", "self.x = self.y = 1"], "gold": 2},
    ]
    path = tmp_path / "code.jsonl"
    path.write_text("\n".join(map(json.dumps, questions)))
    plain, normalised = [], []
    for question in questions:
        prompt = question["query"].strip() + "\nAnswer:"
        scores = [_loglikelihood(tiny, tokenizer, prompt, " " + c) for c in question["choices"]]
        plain.append(scores.index(max(scores)) == question["gold"])
        by_length = [s / len(c) for s, c in zip(scores, question["choices"], strict=True)]
        normalised.append(by_length.index(max(by_length)) == question["gold"])
    task = lab.measure.load_task(path, tokenizer, 1024, 10)
    monkeypatch.setattr(lab.measure, "_BATCH_TOKENS", 40)  # some batches of several rows
    found = lab.measure.accuracy(tiny, task)
    assert found.plain == pytest.approx(sum(plain) / 3)
    assert found.normalised == pytest.approx(sum(normalised) / 3)
    assert task.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)
    assert len(lab.measure.load_task(path, tokenizer, 1024, 2)) == 2


def _loglikelihood(model: PreTrainedModel, tokenizer, prompt: str, continuation: str) -> float:
    """One row, one token at a time."""
    before = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + continuation)["input_ids"]
    total = 0.0
    for place in range(len(before), len(ids)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
        total += logits.double().log_softmax(dim=-1)[ids[place]].item()
    return total


# --- training -------------------------------------------------------------------------------------


def test_balance_loss(lab: ModuleType) -> None:
    one_hot = 30 * torch.eye(4).repeat(8, 1).unsqueeze(0)  # [1, 32, 4] each expert first in turn
    even = one_hot + 15 * torch.eye(4).roll(1, dims=1).repeat(8, 1)
    assert lab.training.balance_loss(even, 2).item() == pytest.approx(2, rel=1e-4)
    skewed = torch.tensor([30.0, 15, 0, 0]).expand(1, 32, 4)  # the first expert has all the weight
    assert lab.training.balance_loss(skewed, 2).item() == pytest.approx(4, rel=1e-4)
    both = torch.cat([even, skewed])  # not the balance of the layers together
    assert lab.training.balance_loss(both, 2).item() == pytest.approx(3, rel=1e-4)


def test_loss_is_the_models_and_the_balance(lab: ModuleType, tiny: PreTrainedModel) -> None:
    ids = torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    output = tiny(input_ids=ids, labels=ids, output_router_logits=True)
    model_loss = output.loss - tiny.config.router_aux_loss_coef * output.aux_loss
    balance = lab.training.balance_loss(torch.stack(output.router_logits), 2)
    expected = model_loss + lab.training.BALANCE * balance
    assert lab.training.loss_of(tiny, ids).item() == pytest.approx(expected.item(), rel=1e-5)


# --- budgets --------------------------------------------------------------------------------------


def test_allocation_of_convex_losses_is_optimal(lab: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    options = {}
    for name in "abcd":
        steps = torch.rand(4, generator=generator).sort(descending=True).values.cumsum(0).tolist()
        losses = [5.0, *(5 - saved for saved in steps)]
        options[name] = [
            lab.allocation.Option(f"{name}{n}", 8 + 2 * n, loss) for n, loss in enumerate(losses)
        ]
        options[name].append(lab.allocation.Option("dominated", 10, 6.0))
    every = list(itertools.product(*options.values()))
    for num_bytes in range(32, 66):
        chosen = list(lab.allocation.allocate(options, num_bytes).values())
        assert sum(option.num_bytes for option in chosen) <= num_bytes
        best = min(
            sum(option.loss for option in found)
            for found in every
            if sum(option.num_bytes for option in found) <= num_bytes
        )
        assert sum(option.loss for option in chosen) == pytest.approx(best)
    with pytest.raises(PatternError, match="must fit into 31 bytes, found 32"):
        lab.allocation.allocate(options, 31)


def test_allocation_goes_on_with_what_fits(lab: ModuleType) -> None:
    option = lab.allocation.Option
    options = {
        "large": [option("sparse", 10, 9.0), option("dense", 20, 0.0)],
        "small": [option("sparse", 10, 1.0), option("dense", 12, 0.0)],
        "bent": [option("low", 1, 9.0), option("useless", 2, 8.9), option("high", 3, 0.0)],
    }
    chosen = lab.allocation.allocate(options, 26)
    assert {name: found.pattern for name, found in chosen.items()} == {
        "large": "sparse",  # 10 bytes more do not fit
        "small": "dense",
        "bent": "high",
    }


def test_venom_at_once_is_venom(lab: ModuleType) -> None:
    x = torch.randn(128, 32, generator=torch.Generator().manual_seed(0))
    for columns in (4, 8, 12):
        fast = lab.patterns.pattern_of(f"venom:64:2:{columns}")
        slow = lab.mask_patterns.Venom(64, 2, columns)
        width = 32 // columns * columns
        mask = fast.project(x[:, :width])
        assert mask.equal(slow.project(x[:, :width]))
        assert mask.float().mean() == 2 / columns
    assert str(lab.patterns.pattern_of("unstructured:0.75")) == "unstructured:0.75"


def test_columns(lab: ModuleType) -> None:
    rows, k, pattern = 16, 64, SparsityPattern(1, 2, 32)
    columns = lab.patterns.Columns(pattern, 4, rows)
    x = torch.randn(3 * rows, k, generator=torch.Generator().manual_seed(0))
    loud = torch.tensor([[3, 17, 40, 41], [0, 8, 9, 63], [5, 6, 7, 33]])  # of each expert
    for expert, chosen in enumerate(loud):
        x[expert * rows : (expert + 1) * rows, chosen] *= 20
    mask = columns.project(x).view(3, rows, k)
    for expert, chosen in enumerate(loud.tolist()):
        assert mask[expert][:, chosen].all()
        rest = mask[expert].clone()
        rest[:, chosen] = False
        kept = rest.view(rows // 2, 2, k // 32, 32 // 4, 4).sum(dim=-1)
        assert kept.max() <= 2
        assert ((kept.sum(dim=-1) > 0).sum(dim=1) <= 1).all()  # one Sub-Row of two
    assert columns.num_bytes(rows, k, 2) == (
        pattern.num_bytes(rows, k, 2) + rows * (4 * 2 + 1 + 1) + 4 * 4
    )
    columns.check_fits(rows, k)
    with pytest.raises(PatternError, match=r"needs 16 rows .* found a weight \[32, 64\]"):
        columns.check_fits(32, k)


def test_filled_columns_take_the_bytes_that_are_left(lab: ModuleType) -> None:
    rows, k = 2048, 512
    limit = SparsityPattern.parse("1:2:32").num_bytes(rows, k, 2)
    found = lab.patterns.filled(SparsityPattern.parse("3:8:32"), rows, k, limit)
    assert found.num_bytes(rows, k, 2) <= limit
    more = lab.patterns.Columns(found.base, found.columns + 4, rows)
    assert more.num_bytes(rows, k, 2) > limit
    assert lab.patterns.filled(SparsityPattern.parse("1:2:32"), rows, k, limit) is None


# --- cells and tables -----------------------------------------------------------------------------


def test_cells(lab: ModuleType) -> None:
    module = lab.cells
    every = module.cells(module.Choice())
    assert len(set(every)) == len(every)
    one_shot = {(c.pattern, c.method) for c in every if c == module.Cell(c.pattern, c.method)}
    assert one_shot == set(itertools.product(module.PATTERNS, module.METHODS))
    for pattern in module.PATTERNS:
        assert module.Cell(pattern, recovery=module.DISTILL) in every
    for ideas in module.IDEAS:
        assert any(cell.ideas == ideas for cell in every)
    few = module.cells(module.Choice(patterns=("2:4",), recoveries=("none", "distill")))
    assert few[:2] == [module.Cell("2:4"), module.Cell("2:4", recovery="distill")]
    assert {cell.pattern for cell in few} == {"2:4"}


def row_of(ratio: float, cell: object, seed: int = 0, **more: object) -> dict[str, str]:
    """A row as the CSV file has it."""
    about = {"family": "mixtral", "size": "1x2", "seed": seed, "weights": seed, **asdict(cell)}
    about |= {"ratio": ratio, "perplexity": 10 * ratio, "bytes": "", "parameters": 10**8}
    about |= {"trained_tokens": 10**8, "epochs": 3, "validation": 9, "seconds": 1}
    about |= dict.fromkeys(("gpu", "cuda", "torch", "transformers", "commit"), "x")
    about |= {"arc_easy_norm": 0.25, "arc_easy_error": 0.01, "arc_easy_chance": 0.25}
    return {name: str(value) for name, value in {**about, **more}.items()}


def test_table(lab: ModuleType) -> None:
    cell = lab.cells.Cell
    rows = [
        row_of(1, cell("dense", "dense")),
        row_of(1.12, cell("1:2:32"), bytes=0.28906),
        row_of(1.08, cell("1:2:32"), seed=1, bytes=0.28906),
        row_of(1.30, cell("1:2:32", "wanda+refine"), bytes=0.28906),
        row_of(1.10, cell("venom:64:2:8")),
        row_of(1.09, cell("venom:64:2:8", "admm+refine")),
        row_of(1.085, cell("1:2:32", "admm+refine", ideas="uneven"), bytes=0.289),
        row_of(1.01, cell("1:2:32", "admm+refine", ideas="columns"), bytes=0.29),
        row_of(1.05, cell("1:2:32", recovery="distill"), bytes=0.28906),
        row_of(1.07, cell("1:2:32", ideas="permute"), seed=1, bytes=0.29),
        row_of(1.04, cell("1:2:32", recovery="distill", ideas="permute"), seed=1, bytes=0.29),
        row_of(1.0802, cell("1:2:32", path="samoyeds"), seed=1),
        row_of(1.06, cell("1:2:128", recovery="distill")),
        row_of(1.045, cell("1:2:128", recovery="block+distill")),
    ]
    lines = lab.table.markdown(rows).splitlines()
    assert "| 1:2:32 | one-shot | 1.110 | 1.090 | 1.100 (2 seeds) | best | must |" in lines
    assert "| 1:2:32 | distilled | 1.035 | 1.025 | 1.050 (1 seed) | best | missed |" in lines
    assert "| 2:4 | one-shot | 1.015 | 1.010 | - | - | - |" in lines
    blocks_first = "1.045 (1 seed) | best, after block recovery | must |"
    assert f"| 1:2:128 | distilled | 1.050 | 1.035 | {blocks_first}" in lines
    recipe = next(line for line in lines if "best recipe" in line and "one-shot" in line)
    # columns has more bytes; the bound is VENOM by the same method
    assert "| 1.090 (VENOM) | 1.070 | 1.085 (1 seed) | 1:2:32 admm+refine, uneven |" in recipe
    assert recipe.endswith("| must |")
    # best, admm+refine, wanda+refine: of one model, not the mean over both
    assert "| 1:2:32 | 1.120 |  | 1.300 |" in lines[lines.index("Seed 0:") : lines.index("Seed 1:")]
    assert "| 1:2:32 | 1.080 |" in lines[lines.index("Seed 1:") :]
    # beside its masks of the same seed, not the mean
    encoded = next(line for line in lines if "(samoyeds)" in line)
    assert encoded.startswith("| 1:2:32 best (samoyeds) | 1 | 1.08020 | 1.08000 |")
    # beside the plain cell of the seeds that have the idea
    assert "| 1:2:32 | admm+refine | uneven | 1.085 |  |  |  |" in lines
    assert "| 1:2:32 | best | permute | 1.070 | 1.080 | 1.040 |  |" in lines


# --- all of it ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def call(lab: ModuleType, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Runs the script on a tiny model that all calls share; returns its status and the rows."""
    work = tmp_path_factory.mktemp("work")

    def run(csv_file: Path, more: str, family: str = "mixtral") -> tuple[int, list[dict[str, str]]]:
        args = (
            f"run --data {data} --work {work} --csv {csv_file} --family {family} --device cpu "
            "--vocab 320 --layers 2 --hidden 128 --intermediate 128 --experts 4 --top-k 2 "
            "--context 64 --steps 4 --batch 4 --validation-tokens 256 --eval-tokens 512 "
            f"--probe-tokens 128 --samples 8 --prune-batch 4 --distill-batch 2 --share 0.5 {more}"
        )
        status = lab.script.main(args.split())
        return status, lab.results.read_rows(csv_file)

    return run


@pytest.mark.slow
def test_pipeline(
    call: Callable, lab: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "results.csv"
    chosen = "--patterns 1:2:32 venom:64:2:8 unstructured:0.75 --methods best --ideas none"
    status, rows = call(path, f"{chosen} --recoveries none distill block distill-twice")
    assert status == 0
    found = {(row["pattern"], row["recovery"], row["path"]): row for row in rows}
    # and one by block, one distilled twice, one encoded
    assert len(found) == len(rows) == 1 + 3 * 2 + 3
    dense = found["dense", "none", "masked"]
    assert float(dense["ratio"]) == 1
    for (pattern, recovery, _), row in found.items():
        ratio = float(row["perplexity"]) / float(dense["perplexity"])
        assert float(row["ratio"]) == pytest.approx(ratio, rel=1e-4)
        if pattern != "dense" and row["path"] == "masked":
            assert 0.2 < float(row["kept"]) <= 0.25
            assert (row["recover_tokens"] != "") == recovery.startswith("distill")
    assert found["1:2:32", "block", "masked"]["block"] == "14 passes, all"
    assert found["1:2:32", "distill", "masked"]["block"] == ""
    once, twice = (found["1:2:32", name, "masked"] for name in ("distill", "distill-twice"))
    assert once["recover_tokens"] == twice["recover_tokens"]
    steps = [int(row["distill"].partition(" ")[0]) for row in (once, twice)]
    assert steps[1] == 2 * steps[0]
    encoded, masked = (found["1:2:32", "none", path] for path in lab.cells.PATHS[::-1])
    assert float(encoded["ratio"]) == pytest.approx(float(masked["ratio"]), rel=1e-4)
    assert float(masked["bytes"]) == pytest.approx(0.28906, abs=1e-5)
    assert "step      4" in capsys.readouterr().out

    before = path.read_bytes()
    status, _ = call(path, f"{chosen} --recoveries none distill block")
    assert status == 0
    assert path.read_bytes() == before
    assert "step" not in capsys.readouterr().out  # nothing trained, nothing measured again

    if find_spec("matplotlib") is None:  # an extra; all before has been tested
        return
    assert lab.script.main(["report", str(path)]) == 0
    assert "### Targets" in capsys.readouterr().out
    assert set(lab.plot._PATTERNS) == set(lab.cells.PATTERNS)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_processes_share_all_cells(lab: ModuleType, workers: int) -> None:
    cells = lab.cells.cells(lab.cells.Choice())
    shares = [lab.cells.share_of(cells, worker, workers) for worker in range(workers)]
    assert sorted(map(str, cells)) == sorted(str(cell) for share in shares for cell in share)
    for share in shares:
        assert share == [cell for cell in cells if cell in share]  # the most important first
    probing = [any("probed" in c.ideas or "columns" in c.ideas for c in share) for share in shares]
    assert probing == [False] * (workers - 1) + [True]
    distilled = lab.cells.Cell("2:4", recovery=lab.cells.DISTILL)
    assert any(lab.cells.Cell("2:4") in share and distilled in share for share in shares)


@pytest.mark.slow
def test_processes_measure_what_one_does(call: Callable, tmp_path: Path) -> None:
    chosen = "--patterns 2:4 1:2:32 --methods wanda magnitude --ideas none --paths masked"
    _, alone = call(tmp_path / "alone.csv", chosen)
    status, rows = call(tmp_path / "together.csv", f"{chosen} --workers 2")
    assert status == 0
    same = ("pattern", "method", "recovery", "perplexity", "kept", "weights")
    found = [sorted(tuple(row[name] for name in same) for row in each) for each in (alone, rows)]
    assert found[0] == found[1]


def test_a_row_names_the_learning_rate_that_was_used(call: Callable, tmp_path: Path) -> None:
    chosen = "--patterns 2:4 --methods best --ideas none --recoveries distill --paths masked"
    _, rows = call(tmp_path / "results.csv", f"{chosen} --distill-lr 0.5")
    (found,) = (row["distill"] for row in rows if row["recovery"] == "distill")
    assert re.match(r"\d x 2, lr 0\.5 -> 0\.(125|03125), all, hidden states x 30", found), found


@pytest.mark.slow
def test_ideas_keep_their_bytes(call: Callable, tmp_path: Path) -> None:
    chosen = (
        "--patterns 1:2:32 --methods best --recoveries none --paths masked "
        "--ideas none uneven probed columns columns+probed"
    )
    status, rows = call(tmp_path / "results.csv", chosen)
    assert status == 0
    sizes = {row["ideas"]: float(row["bytes"]) for row in rows if row["bytes"]}
    assert sizes["uneven"] <= sizes["none"]
    assert sizes["probed"] <= sizes["none"]
    assert sizes["columns"] <= sizes["none"]
    assert sizes["columns+probed"] <= sizes["none"]
    kept = {row["ideas"]: float(row["kept"]) for row in rows if row["kept"]}
    assert all(0.18 < share <= 0.27 for share in kept.values())


@pytest.mark.slow
def test_a_run_stops_and_goes_on(
    call: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "results.csv"
    chosen = "--patterns 2:4 --methods magnitude wanda --family qwen2_moe --tasks arc_easy"
    status, rows = call(path, f"{chosen} --seconds 0")
    assert (status, rows) == (0, [])
    assert "no time for 3 cells, the first: dense" in capsys.readouterr().out
    status, rows = call(path, f"{chosen} --methods magnitude")
    assert (status, len(rows)) == (0, 2)
    first = path.read_text().splitlines()
    status, rows = call(path, chosen)
    assert (status, [row["method"] for row in rows][-1]) == (0, "wanda")
    assert set(first) <= set(path.read_text().splitlines())
    assert {row["family"] for row in rows} == {"qwen2_moe"}


def test_a_cell_that_fails_is_told_and_the_next_is_measured(
    call: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    chosen = "--patterns 2:4 1:2:128 --methods magnitude --intermediate 64 --tasks"
    status, rows = call(tmp_path / "results.csv", chosen)
    assert status == 1
    assert [row["pattern"] for row in rows if row["pattern"] != "dense"] == ["2:4"]
    out = capsys.readouterr().out
    assert "FAILED 1:2:128 magnitude: PatternError: " in out
    assert "1 cells failed, the first: 1:2:128 magnitude" in out
    assert "None were given." in out
