"""The text of the laboratory: read from its archives, split by file, as tokens.

``DATA/train_text/*.tar.xz`` holds the documents, ``DATA/eval/*.jsonl`` the multiple-choice tasks.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lab.folder import made_once
from train_tiny_moe import train_tokenizer
from transformers import PreTrainedTokenizerFast as Tokenizer

from samoyeds_hf.corpus import SPLITS
from samoyeds_hf.errors import EvaluationError

_SUFFIXES = (".txt", ".rst")
_SAMPLE = 1 << 18  # characters of a document that the tokenizer is trained on
_BATCH = 64  # documents that are encoded in parallel


@dataclass(frozen=True)
class Corpus:
    """One stream of tokens ``[n]`` int64 for each split."""

    tokenizer: Tokenizer
    streams: dict[str, torch.Tensor]
    fingerprint: str

    def windows(self, split: str, count: int, length: int) -> torch.Tensor:
        """At most ``count`` windows ``[count, length]`` int64, evenly spaced over a split.

        Raises:
            EvaluationError: the split is shorter than one window.
        """
        stream = self.streams[split]
        total = len(stream) // length
        if not total:
            raise EvaluationError(
                f"the {split} text must hold a window of {length} tokens, found {len(stream)}; "
                "give more text or a shorter --context"
            )
        count = min(count, total)
        return stream[: total * length].view(total, length)[torch.arange(count) * total // count]

    def shuffled(self, count: int, length: int, seed: int) -> torch.Tensor:
        """``[count, length]`` windows of the training text, none twice before all were taken."""
        epochs = self.epochs(length, seed)
        taken = [next(epochs)]
        while sum(map(len, taken)) < count:
            taken.append(next(epochs))
        return torch.cat(taken)[:count]

    def epochs(self, length: int, seed: int) -> Iterator[torch.Tensor]:
        """All windows of the training text ``[n, length]`` in random order, without end.

        Each epoch cuts at other places.

        Raises:
            EvaluationError: the text is no longer than one window.
        """
        stream = self.streams["train"]
        total = (len(stream) - 1) // length
        if total < 1:
            raise EvaluationError(
                f"the training text must be longer than a window of {length} tokens, found "
                f"{len(stream)}; give more text or a shorter --context"
            )
        generator = torch.Generator().manual_seed(seed)
        while True:
            slack = min(length, len(stream) - total * length)
            first = int(torch.randint(slack, (), generator=generator))
            windows = stream[first : first + total * length].view(total, length)
            yield windows[torch.randperm(total, generator=generator)]


def split_of(name: str) -> str:
    """Split of a document by the name of its file: 5 % heldout, 5 % validation, the rest train."""
    return {0: "heldout", 1: "validation"}.get(zlib.crc32(name.encode()) % 20, "train")


def read_documents(data: Path, max_bytes: int) -> dict[str, list[str]]:
    """The texts of each split, in the order of the archives; no files are written.

    Of each split at most ``max_bytes`` are taken.

    Raises:
        EvaluationError: no archives, or a split without text.
    """
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    left = dict.fromkeys(SPLITS, max_bytes)
    for archive in _archives(data):
        with tarfile.open(archive, "r:xz") as files:
            for member in files:
                name = Path(member.name).name
                split = split_of(name)
                if not member.isfile() or not name.endswith(_SUFFIXES) or not left[split]:
                    continue
                # bytes of that file, never None; the limit may cut a character in two
                content = files.extractfile(member).read()[: left[split]]  # type: ignore[union-attr]
                left[split] -= len(content)
                text = content.decode("utf-8-sig", errors="ignore").replace("\r\n", "\n")
                texts[split].append(text)
    if empty := [split for split in SPLITS if not any(texts[split])]:
        raise EvaluationError(
            f"{data}/train_text must hold documents of every split, found none for {empty[0]}; "
            "a file belongs to a split by the checksum of its name"
        )
    return texts


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Stream ``[n]`` int64 as ``samoyeds_hf.corpus.token_stream`` makes it, in parallel."""
    parts = []
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
            parts.append(torch.tensor(row, dtype=torch.int64))
    return torch.cat(parts)


def load_corpus(data: Path, work: Path, *, vocab: int, max_bytes: int) -> Corpus:
    """Tokenizer and tokens; made once, then read from ``work``."""
    fingerprint = _fingerprint(data, vocab, max_bytes)
    folder = work / f"corpus-{fingerprint}"
    if not folder.exists():
        texts = read_documents(data, max_bytes)
        tokenizer = train_tokenizer([text[:_SAMPLE] for text in texts["train"]], vocab)
        streams = {split: encode(tokenizer, texts[split]).to(torch.int32) for split in SPLITS}
        with made_once(folder) as partial:
            tokenizer.save_pretrained(partial)
            torch.save(streams, partial / "tokens.pt")
    stored = torch.load(folder / "tokens.pt", weights_only=True)
    streams = {split: stream.to(torch.int64) for split, stream in stored.items()}
    return Corpus(Tokenizer.from_pretrained(folder), streams, fingerprint)


def _archives(data: Path) -> list[Path]:
    found = sorted((data / "train_text").glob("*.tar.xz"))
    if not found:
        raise EvaluationError(
            f"--data must be a folder with train_text/*.tar.xz, found none in {data}"
        )
    return found


def _fingerprint(data: Path, vocab: int, max_bytes: int) -> str:
    """Of all that tokens depend on."""
    sums = [hashlib.sha256(archive.read_bytes()).hexdigest() for archive in _archives(data)]
    text = json.dumps([*sums, vocab, max_bytes, _SAMPLE])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
