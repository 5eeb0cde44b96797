"""The documents of calibration data: files, directories, the standard library, the Hub."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from samoyeds_hf.errors import CalibrationError, EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PYTHON_STDLIB = "python-stdlib"
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")

# Fields of a row that make one document, in this order; the first line that a row has counts.
_LAYOUTS = (
    ("text",),
    ("content",),
    ("messages",),
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("question", "answer"),
)
_HUB_ID = re.compile(
    r"(?P<id>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<config>[^:@#]+))?(@(?P<split>[^@#]+))?"
    r"(#(?P<column>.+))?"
)


@dataclass(frozen=True)
class Chat:
    """A conversation; which tokens it is made of is up to the tokenizer's chat template."""

    messages: tuple[Mapping[str, Any], ...]
    place: str  # for errors

    def render(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text of the conversation, special tokens included.

        Raises:
            CalibrationError: the tokenizer has no chat template, or it refuses these messages.
        """
        if not tokenizer.chat_template:
            raise CalibrationError(
                f"A tokenizer must have a chat template to read 'messages', found none for "
                f"{self.place}; calibrate with rows of 'text', or use the instruction-tuned "
                "model's tokenizer."
            )
        try:
            return str(tokenizer.apply_chat_template(list(self.messages), tokenize=False))
        except Exception as error:  # a template is a program: it raises what it likes
            raise CalibrationError(
                f"'messages' must suit the tokenizer's chat template, found otherwise in "
                f"{self.place} ({_summary(error)}); change or remove the row."
            ) from error


Document: TypeAlias = str | Chat


def is_hub_id(data: str) -> bool:
    """Whether a name has the form ``id[:config][@split][#column]`` and not the suffix of a file."""
    return _parse_hub_id(data) is not None


def _parse_hub_id(data: str) -> re.Match[str] | None:
    is_file = data.lower().endswith(JSON_SUFFIXES + TEXT_SUFFIXES)
    return None if is_file else _HUB_ID.fullmatch(data)


def seeded_order(count: int, seed: int) -> list[int]:
    """A random order of ``range(count)``: the same on every platform and Python version."""
    return sorted(range(count), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())


def read_documents(data: str, *, max_bytes: int, seed: int) -> list[Document]:
    """The documents of a source, in an order that does not depend on the machine.

    Reading stops when ``max_bytes`` of text are found.

    Raises:
        CalibrationError: no such source, or one that cannot be read; names the line where the
            source has lines.
    """
    if data == PYTHON_STDLIB:
        return _from_stdlib(max_bytes, seed)
    path = Path(os.path.expanduser(data))
    try:
        if path.is_dir():
            return _from_directory(path, max_bytes, seed)
        if path.exists() and path.name.lower().endswith(JSON_SUFFIXES):
            with path.open("rb") as file:
                return list(_bounded(_from_json_lines(file, path), max_bytes))
        if path.exists():
            return [_read_text(path, max_bytes)]
    except OSError as error:
        raise CalibrationError(
            f"Calibration data must be readable, found {error.strerror or error} for {data}; check "
            "the path and its permissions."
        ) from error
    hub_id = _parse_hub_id(data)
    if hub_id is not None:
        return list(_bounded(_from_hub(hub_id), max_bytes))
    raise CalibrationError(
        f"Calibration data must be a file, a directory, {PYTHON_STDLIB!r} or a data set's "
        f"id[:config][@split][#column], found no {data!r}; check the path."
    )


def _bounded(documents: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    """Documents until their text is ``max_bytes`` long, the last one whole."""
    found = 0
    for document in documents:
        yield document
        found += len(document if isinstance(document, str) else repr(document.messages))
        if found >= max_bytes:
            return


def _read_text(path: Path, max_bytes: int) -> str:
    """The first ``max_bytes`` of a UTF-8 file, without a byte order mark, with ``\\n`` only."""
    with path.open("rb") as file:
        content = file.read(max_bytes)
        is_whole = not file.read(1)
    try:
        # A character that max_bytes cuts in two is left out.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=is_whole)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"Calibration text must be UTF-8, found byte {content[error.start]:#04x} at position "
            f"{error.start} of {path}; convert the file, or name text, {JSON_SUFFIXES[0]} or a "
            "directory."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _from_directory(root: Path, max_bytes: int, seed: int) -> list[Document]:
    """Files with text suffixes in and below a directory, hidden ones left out."""
    files = {
        relative.as_posix(): file
        for file in root.rglob("*")
        for relative in [file.relative_to(root)]
        if file.suffix.lower() in TEXT_SUFFIXES
        and not any(part.startswith(".") for part in relative.parts)
        and file.is_file()
    }
    if not files:
        raise CalibrationError(
            f"A directory of calibration data must hold {', '.join(TEXT_SUFFIXES)} files, found "
            f"none in {root}; name another directory or a file."
        )
    paths = [files[name] for name in sorted(files)]
    order = seeded_order(len(paths), seed)
    return list(_bounded((_read_text(paths[i], max_bytes) for i in order), max_bytes))


def _from_stdlib(max_bytes: int, seed: int) -> list[Document]:
    """The training files of :mod:`samoyeds_hf.corpus`."""
    from samoyeds_hf.corpus import python_files, read_texts

    try:
        texts = read_texts(python_files("train"))
    except (EvaluationError, OSError) as error:
        raise CalibrationError(
            f"{PYTHON_STDLIB!r} must find the sources of this Python's library, found none "
            f"({_summary(error)}); name a file or a directory."
        ) from error
    return list(_bounded((texts[i] for i in seeded_order(len(texts), seed)), max_bytes))


def _from_json_lines(file: BinaryIO, path: Path) -> Iterator[Document]:
    """A document for each line that is not empty."""
    for number, line in enumerate(file, 1):
        place = f"line {number} of {path}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            row = json.loads(text) if text else None
            if "\\u" in text:  # an escaped half of a character, which no tokenizer takes
                json.dumps(row, ensure_ascii=False).encode()
        except ValueError as error:
            reason = _summary(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg} at column {error.colno}"
            raise CalibrationError(
                f"Each line must be a JSON object in UTF-8, found otherwise in {place} "
                f"({reason}); mend or remove it."
            ) from error
        if text:
            yield _document(row, place)


def _document(row: Any, place: str, column: str | None = None) -> Document:
    """The document in a row of JSON or of a data set."""
    if not isinstance(row, Mapping):
        raise CalibrationError(
            f"Each line must be a JSON object, found {type(row).__name__} in {place}; mend or "
            "remove it."
        )
    layouts = _LAYOUTS if column is None else ((column,),)
    for layout in layouts:
        parts = [row.get(field) for field in layout]
        if all(isinstance(part, str) for part in parts):
            return _join([str(part) for part in parts])
        messages = parts[0]
        if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
            return Chat(tuple(messages), place)
    wanted = ", ".join(" with ".join(map(repr, layout)) for layout in layouts)
    raise CalibrationError(
        f"A row must have text or messages in {wanted}, found the fields "
        f"{sorted(map(str, row))} in {place}; rename the fields or remove the row."
    )


def _join(parts: list[str]) -> str:
    """Prompt and answer, on lines of their own unless they bring white space."""
    text = ""
    for part in filter(None, parts):
        has_space = text[-1:].isspace() or part[0].isspace()
        text += part if has_space or not text else f"\n{part}"
    return text


def _from_hub(hub_id: re.Match[str]) -> Iterator[Document]:
    """Rows of a data set in its order; streamed, so that no more is fetched than is read."""
    name, config, split, column = hub_id.group("id", "config", "split", "column")
    data = hub_id.string
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"Calibration data must be a file or directory, or a data set of the Hub by the "
            f"package datasets, found no {data!r} here and no such package ({error}); check the "
            "path, or pip install 'samoyeds-hf[calibration]'."
        ) from error
    number = 0
    try:
        # Offline this reads the cache of datasets, if the data set is in it.
        rows = datasets.load_dataset(name, config, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield _document(row, f"row {number} of {data}", column)
    except CalibrationError:
        raise
    except Exception as error:  # of the network, of parsers, of datasets itself: no common base
        raise CalibrationError(
            f"Calibration data must be a file or directory, or a data set of the Hub that can be "
            f"read, found no file {data!r} and failed as a data set after {number} rows "
            f"({_summary(error)}); check the name, its ':config' and '@split', and the network."
        ) from error


def _summary(error: BaseException) -> str:
    """An exception in a line of bounded length."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
