"""Calibration data: which text, how much of it, and the windows of tokens made from it."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from samoyeds_hf.errors import CalibrationError, ConfigError
from samoyeds_hf.pruning.calibration_sources import (
    PYTHON_STDLIB,
    Chat,
    Document,
    is_hub_id,
    read_documents,
    seeded_order,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_BATCH = 16  # texts for the tokenizer at once
_MIN_READ = 128 << 20  # bytes
_MIN_PASSAGE = 32_768  # characters: some four windows of 2048 tokens of English


@dataclass(frozen=True)
class Calibration:
    """Which text a method sees, and how much of it.

    Attributes:
        data: a text file, a ``.jsonl`` file, a directory of texts, ``"python-stdlib"``, or a data
            set of the Hub as ``id[:config][@split][#column]``.
        samples: windows of tokens, N.
        sequence_length: tokens of a window, S.
        seed: order of the documents.
        sha256: of the tokens. If given, other tokens are refused when the data is loaded.

    Raises:
        ConfigError: a value that cannot be.
    """

    data: str
    samples: int = 128
    sequence_length: int = 2048
    seed: int = 0
    sha256: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.data, str) or not self.data.strip():
            raise ConfigError(
                f"calibration data must be a file, a directory, 'python-stdlib' or the id of a "
                f"data set, found {self.data!r}; name one."
            )
        _check_count("samples", self.samples, 1)
        _check_count("sequence_length", self.sequence_length, 2)
        _check_count("seed", self.seed, 0)
        is_digest = isinstance(self.sha256, str) and re.fullmatch("[0-9a-f]{64}", self.sha256)
        if self.sha256 is not None and not is_digest:
            raise ConfigError(
                f"sha256 must be 64 hexadecimal digits in lower case, found {self.sha256!r}; leave "
                "it out to accept any data."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; :meth:`from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Calibration:
        """The calibration in a recipe or a ``config.json``.

        Raises:
            ConfigError: no mapping, no ``data``, an unknown key or a bad value.
        """
        if not isinstance(mapping, Mapping):
            raise ConfigError(
                f"calibration must be a mapping with the key 'data', found {mapping!r}; write it "
                "as {data: FILE, samples: 128}."
            )
        known = [field.name for field in fields(cls)]
        for key in mapping:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ConfigError(
                    f"calibration knows the keys {known}, found {key!r}{hint}; remove it."
                )
        if "data" not in mapping:
            raise ConfigError("calibration must say which data to read, found no key 'data'.")
        return cls(**mapping)

    def without_path(self) -> Calibration:
        """The same with a file's or directory's name for its path: what a checkpoint stores."""
        if self.data == PYTHON_STDLIB or (
            is_hub_id(self.data) and not os.path.exists(os.path.expanduser(self.data))
        ):
            return self
        name = os.path.basename(os.path.abspath(os.path.expanduser(self.data)))
        return replace(self, data=name or "/")


@dataclass(frozen=True)
class CalibrationData:
    """Tokens to calibrate with."""

    tokens: torch.Tensor  # [N, S] int64
    sha256: str  # of the tokens as little-endian int64, row by row
    description: str  # for a log: where they come from, with no path


def load_calibration(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_position_embeddings: int | None = None,
) -> CalibrationData:
    """Read, order, tokenize and cut the data into windows without padding.

    The documents come in a random order that depends on the seed and their number alone; one much
    longer than a window is cut at line ends into several first. They are joined as
    :func:`samoyeds_hf.corpus.token_stream` does (bos, text, eos), except that a chat is exactly
    what the tokenizer's chat template makes of it. The windows are the first ``samples`` of that
    stream. The same data, tokenizer and settings give the same tokens on every machine;
    ``python-stdlib`` depends on the Python that runs.

    Of a large source only a part is read: 128 MiB of text, or 16 bytes for each token asked for if
    that is more. Of a file and a Hub data set that is the beginning, of a directory files in
    random order.

    Args:
        calibration: what to read.
        tokenizer: the model's tokenizer.
        max_position_embeddings: the model's context; longer windows are refused.

    Raises:
        CalibrationError: no such source, one that cannot be read, too little text for the windows,
            or tokens other than those of ``calibration.sha256``.
    """
    length, samples = calibration.sequence_length, calibration.samples
    if max_position_embeddings is not None and length > max_position_embeddings:
        raise CalibrationError(
            f"A window must fit the model's max_position_embeddings, {max_position_embeddings} "
            f"tokens, found a sequence length of {length}; use a shorter one."
        )
    max_bytes = max(_MIN_READ, 16 * samples * length)
    documents = read_documents(calibration.data, max_bytes=max_bytes, seed=calibration.seed)
    passages = _passages(documents, max(_MIN_PASSAGE, 8 * length))
    order = seeded_order(len(passages), calibration.seed)
    stream = _token_stream([passages[i] for i in order], tokenizer, samples * length)
    if len(stream) < samples * length:
        raise CalibrationError(
            f"Calibration with {samples} windows of {length} tokens needs {samples * length} "
            f"tokens, found {len(stream)} in {calibration.data}; use more text, fewer samples or a "
            "shorter sequence length."
        )
    tokens = _to_tensor(stream[: samples * length]).view(samples, length)
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    if calibration.sha256 not in (None, digest):
        raise CalibrationError(
            f"The tokens of {calibration.data} must have the sha256 {calibration.sha256}, found "
            f"{digest}: other data, another tokenizer or other settings; leave sha256 out to use "
            "them all the same."
        )
    name = calibration.without_path().data
    description = (
        f"{samples} x {length} tokens of {name} ({len(documents)} documents read), "
        f"seed {calibration.seed}"
    )
    return CalibrationData(tokens, digest, description)


def _check_count(name: str, value: Any, least: int) -> None:
    if type(value) is not int or not least <= value < 2**63:
        raise ConfigError(f"{name} must be a whole number, {least} or more, found {value!r}.")


def _passages(documents: Sequence[Document], size: int) -> list[Document]:
    """Texts of at most about ``size`` characters, cut after a line end where there is one."""
    passages: list[Document] = []
    for document in documents:
        if isinstance(document, Chat):
            passages.append(document)
            continue
        start = 0
        while len(document) - start > size:
            end = document.rfind("\n", start, start + size) + 1 or start + size
            passages.append(document[start:end])
            start = end
        passages.append(document[start:])
    return [passage for passage in passages if isinstance(passage, Chat) or passage.strip()]


def _token_stream(
    passages: Sequence[Document], tokenizer: PreTrainedTokenizerBase, needed: int
) -> list[int]:
    """Tokens of the passages, joined, until there are as many as needed."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for first in range(0, len(passages), _BATCH):
        if len(stream) >= needed:
            break
        batch = passages[first : first + _BATCH]
        texts = [p.render(tokenizer) if isinstance(p, Chat) else p for p in batch]
        # verbose=False: texts longer than the model's context are expected, they get cut up.
        found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for passage, ids in zip(batch, found, strict=True):
            stream += ids if isinstance(passage, Chat) else [*bos, *ids, *eos]
    return stream


def _to_tensor(stream: list[int]) -> torch.Tensor:
    import torch  # here, because the configuration imports this module

    return torch.tensor(stream, dtype=torch.int64)
