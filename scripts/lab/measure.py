"""What a model can do: perplexity on windows of tokens, and multiple-choice tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

_BATCH_TOKENS = 1 << 15  # of a forward pass


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,  # [n, S]  int64
) -> float:
    """``exp`` of the mean loss of every token of every window but each window's first.

    The definition of ``samoyeds_hf.corpus.perplexity``, on tokens that lie ready. Log-softmax in
    fp32, sum in fp64.
    """
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    with _evaluating(model):
        for ids in windows.split(max(1, _BATCH_TOKENS // windows.shape[1])):
            ids = ids.to(model.device)
            total -= token_logprobs(model, ids).double().sum()
    return math.exp(total.item() / windows[:, 1:].numel())


def token_logprobs(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """``log p`` of each token of ``ids`` [B, S] after those before it, ``[B, S-1]`` fp32."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return -loss.view(len(ids), -1)


@dataclass(frozen=True)
class Task:
    """A multiple-choice task: every choice of every question as a row of tokens."""

    name: str
    rows: tuple[tuple[int, ...], ...]  # context and choice
    lengths: tuple[int, ...]  # tokens of the choice, at the row's end
    characters: tuple[int, ...]  # of the choice
    questions: tuple[tuple[int, int, int], ...]  # first row, end, gold row

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return sum(1 / (end - first) for first, end, _ in self.questions) / len(self)


@dataclass(frozen=True)
class Accuracy:
    """Of a task: by the likeliest choice, and by the likeliest for its length in characters."""

    plain: float
    normalised: float
    error: float  # standard error of the second


def load_task(path: Path, tokenizer: Tokenizer, context: int, limit: int) -> Task:
    """The first ``limit`` questions of ``{"query", "choices", "gold"}`` lines.

    Laid out as lm-eval's arc_easy and piqa: the query, a line with "Answer:", a blank and the
    choice. What does not fit into the context is cut at its beginning.
    """
    rows, lengths, characters, questions = [], [], [], []
    for line in path.read_text(encoding="utf-8").splitlines()[:limit]:
        item = json.loads(line)
        prompt = item["query"].strip() + "\nAnswer:"
        first = len(rows)
        before = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        for choice in item["choices"]:
            ids = tokenizer(f"{prompt} {choice}", add_special_tokens=False)["input_ids"]
            rows.append(tuple(ids[-context:]))
            lengths.append(min(len(ids) - before, context - 1))
            characters.append(max(1, len(choice)))
        questions.append((first, len(rows), first + item["gold"]))
    return Task(path.stem, tuple(rows), tuple(lengths), tuple(characters), tuple(questions))


@torch.no_grad()
def accuracy(model: PreTrainedModel, task: Task) -> Accuracy:
    """Zero-shot, by log-likelihood, as lm-eval's ``acc`` and ``acc_norm``."""
    scores = torch.empty(len(task.rows), dtype=torch.float64)
    order = sorted(range(len(task.rows)), key=lambda row: len(task.rows[row]))
    with _evaluating(model):
        for batch in _batches(order, task):
            width = len(task.rows[batch[-1]])
            # a causal model does not see what is padded behind
            padded = [[*task.rows[row], *[0] * (width - len(task.rows[row]))] for row in batch]
            values = token_logprobs(model, torch.tensor(padded, device=model.device))
            end = torch.tensor([len(task.rows[row]) - 1 for row in batch]).unsqueeze(1)
            start = end - torch.tensor([task.lengths[row] for row in batch]).unsqueeze(1)
            places = torch.arange(width - 1).unsqueeze(0)
            inside = (places >= start) & (places < end)
            scores[batch] = (values.double().cpu() * inside).sum(dim=1)
    normalised = scores / torch.tensor(task.characters)
    plain, right = _share_right(scores, task), _share_right(normalised, task)
    return Accuracy(plain, right, math.sqrt(right * (1 - right) / len(task)))


def _batches(order: list[int], task: Task) -> Iterator[list[int]]:
    """Rows of about the same length; the longest is last."""
    batch: list[int] = []
    for row in order:
        if batch and len(task.rows[row]) * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _share_right(scores: torch.Tensor, task: Task) -> float:
    right = [int(scores[a:b].argmax()) + a == gold for a, b, gold in task.questions]
    return sum(right) / len(right)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
