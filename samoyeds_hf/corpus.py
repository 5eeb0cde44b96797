"""Real text that every machine has, the Python standard library, and perplexity measured on it."""

from __future__ import annotations

import math
import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from samoyeds_hf.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPLITS = ("train", "validation", "heldout")

# Not part of the library, or tables of characters rather than code.
_EXCLUDED_DIRS = {"site-packages", "dist-packages", "__pycache__", "encodings"}
# Written by whoever built or packaged this Python, with that machine's paths in them.
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
_TEST_DIRS = {"test", "tests", "idle_test"}


def python_files(split: str, root: str | Path | None = None) -> list[Path]:
    """List one split of the standard library's `.py` files, sorted by path.

    A file belongs to a split by `zlib.crc32(path relative to root) % 20`: 0 is heldout, 1 is
    validation, the rest is train. Held out therefore means *held out by file*: the split depends on
    the path alone, so a model trained on one Python version has not seen the held-out files of
    another one either, unless a file was moved.

    The library's own tests are never heldout or validation, because many installations come
    without them and the numbers would not compare. Where they are installed they belong to train:
    the library without them is 9 MB, too little for ten million parameters.

    `root` defaults to the running Python's library. Raises EvaluationError for an unknown split and
    for a root without any file of that split.
    """
    if split not in SPLITS:
        raise EvaluationError(f"split must be one of {', '.join(SPLITS)}, found {split!r}")
    root = Path(sysconfig.get_path("stdlib") if root is None else root)
    files = {file.relative_to(root).as_posix(): file for file in root.rglob("*.py")}
    chosen = [file for name, file in sorted(files.items()) if _split_of(name) == split]
    if not chosen:
        raise EvaluationError(
            f"the {split} text is .py files of the Python standard library, found none in {root}; "
            "pass root=, a directory that holds the library's sources"
        )
    return chosen


def _split_of(name: str) -> str | None:
    """Split of a file by its posix path relative to the root; None for what is left out."""
    parts = name.split("/")
    if _EXCLUDED_DIRS.intersection(parts[:-1]) or parts[0].startswith(_EXCLUDED_PREFIXES):
        return None
    if _TEST_DIRS.intersection(parts[:-1]):
        return "train"
    return {0: "heldout", 1: "validation"}.get(zlib.crc32(name.encode()) % 20, "train")


def read_texts(files: Iterable[Path]) -> list[str]:
    """Read files as UTF-8; leaves out empty ones and those in another encoding."""
    texts = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            texts.append(text)
    return texts


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """Join texts into one stream of tokens `[n]` int64: bos, text, eos, bos, text, eos...

    A tokenizer without bos or eos leaves that token out.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # verbose=False: texts longer than the model's context are expected here, they get cut up.
    stream: list[int] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        stream += [*bos, *ids, *eos]
    return torch.tensor(stream, dtype=torch.int64)


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    window: int = 512,
    max_tokens: int = 32_768,
    batch_size: int = 8,
) -> float:
    """Token-level perplexity in non-overlapping windows.

    `exp(-mean log p(token | the tokens before it in its window))` over every token of every window
    except each window's first. The stream of `token_stream` is cut into windows of `window` tokens
    (a shorter rest is dropped, unless it is all there is); if they hold more than `max_tokens`,
    evenly spaced ones are taken, so a short run still sees all of the text. Deterministic; the
    batch size does not change which tokens are scored. Log-softmax in fp32 whatever the model's
    dtype, sum in fp64.

    Args:
        model: a causal language model on any device; its training mode is left as it was.
        tokenizer: the model's tokenizer.
        texts: documents, usually `read_texts(python_files("heldout"))`.
        window: tokens per window, at most the model's context length.
        max_tokens: upper bound of tokens read, rounded down to whole windows, at least one window.
        batch_size: windows per forward pass.

    Raises:
        EvaluationError: a window or a text of fewer than two tokens: there is nothing to predict.
    """
    windows = _windows(token_stream(tokenizer, texts), window, max_tokens)
    was_training = model.training
    model.eval()
    nll = 0.0
    try:
        with torch.no_grad():
            for ids in windows.split(batch_size):
                ids = ids.to(model.device)
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
                nll += loss.double().sum().item()
    finally:
        model.train(was_training)
    return math.exp(nll / windows[:, 1:].numel())


def _windows(stream: torch.Tensor, window: int, max_tokens: int) -> torch.Tensor:
    """Cut a stream [n] into evenly spaced windows [count, window]."""
    window = min(window, len(stream))
    if window < 2:
        raise EvaluationError(
            "perplexity needs a window and a text of two tokens or more, found a window of "
            f"{window}; pass longer texts or a larger window"
        )
    total = len(stream) // window
    count = min(total, max(1, max_tokens // window))
    return stream[: total * window].view(total, window)[torch.arange(count) * total // count]
