"""Calibration data: every source, exact windows, and refusals that name what is wrong."""

from __future__ import annotations

import builtins
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from samoyeds_hf.corpus import python_files, read_texts, token_stream
from samoyeds_hf.errors import CalibrationError, ConfigError
from samoyeds_hf.pruning import calibration as module
from samoyeds_hf.pruning import calibration_sources
from samoyeds_hf.pruning.calibration import Calibration, load_calibration
from samoyeds_hf.pruning.calibration_sources import read_documents, seeded_order

TINY_MOE = Path(__file__).parent / "assets" / "tiny-moe"
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if messages[0]['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
)
PROSE = "The quick brown fox jumps over the lazy dog and says nothing about it.\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_MOE)


class Letters:
    """A token a character: what the windows hold can be read off."""

    chat_template = None

    def __init__(self, bos: int | None = 1, eos: int | None = 2) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def documents(path: str | Path, seed: int = 0, max_bytes: int = 1 << 30) -> list[Any]:
    return read_documents(str(path), max_bytes=max_bytes, seed=seed)


# --- the settings --------------------------------------------------------------------------------


def test_settings_survive_json() -> None:
    calibration = Calibration("a.txt", 3, 64, 7, "0" * 64)
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
    assert Calibration.from_dict({"data": "a.txt"}) == Calibration("a.txt", 128, 2048, 0, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": ""}, "calibration data must be a file"),
        ({"data": Path("a.txt")}, "found PosixPath"),
        ({"data": "a", "samples": 0}, "samples must be a whole number, 1 or more, found 0"),
        ({"data": "a", "samples": 2.0}, "samples must be a whole number"),
        ({"data": "a", "samples": True}, "found True"),
        ({"data": "a", "sequence_length": 1}, "sequence_length must be a whole number, 2 or more"),
        ({"data": "a", "seed": -1}, "seed must be a whole number, 0 or more"),
        ({"data": "a", "seed": 2**63}, "seed must be"),
        ({"data": "a", "sha256": "abc"}, "sha256 must be 64 hexadecimal digits"),
        ({"data": "a", "sha256": 5}, "sha256 must be 64"),
        ({"samples": 4}, "found no key 'data'"),
        ({"data": "a", "sample": 4}, "found 'sample' .did you mean 'samples'"),
        ({"data": "a", 3: 4}, "found 3"),
        ("a.txt", "must be a mapping with the key 'data'"),
    ],
)
def test_bad_settings_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Calibration.from_dict(values)


def test_what_is_stored_holds_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "novels").write_text(PROSE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "texts"))
    names = {
        str(tmp_path / "a.txt"): "a.txt",  # whether it exists or not
        "sub/a.jsonl": "a.jsonl",
        "~": "texts",
        str(tmp_path / "texts") + "/": "texts",
        "texts/..": tmp_path.name,
        "texts/../novels": "novels",
        "./novels": "novels",
        "python-stdlib": "python-stdlib",
        "org/name": "org/name",
        "org/name:config@train[:10]#text": "org/name:config@train[:10]#text",
    }
    for data, name in names.items():
        stored = Calibration(data, 4, 8, 2, "1" * 64).without_path()
        assert stored == Calibration(name, 4, 8, 2, "1" * 64)
        assert stored.without_path() == stored


# --- the windows ---------------------------------------------------------------------------------


def plain_windows(texts: list[str], tokenizer: Any, samples: int, length: int, seed: int) -> Any:
    """The definition, for texts that are not cut."""
    keys = {i: hashlib.sha256(f"{seed}:{i}".encode()).hexdigest() for i in range(len(texts))}
    stream: list[int] = []
    for index in sorted(keys, key=keys.__getitem__):
        stream += [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        stream += [ord(letter) for letter in texts[index]]
        stream += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return [stream[i * length : (i + 1) * length] for i in range(samples)]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    texts=st.lists(st.text("abc \n", max_size=40).filter(str.strip), min_size=1, max_size=40),
    samples=st.integers(1, 6),
    length=st.integers(2, 12),
    seed=st.integers(0, 5),
    special=st.sampled_from([(1, 2), (None, 2), (1, None), (None, None)]),
)
def test_windows_are_the_first_of_the_shuffled_documents(
    tmp_path: Path, texts: list[str], samples: int, length: int, seed: int, special: Any
) -> None:
    path = write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    letters = Letters(*special)
    num_tokens = sum(len(text) + 2 - special.count(None) for text in texts)
    calibration = Calibration(str(path), samples, length, seed)
    if num_tokens < samples * length:
        with pytest.raises(
            CalibrationError, match=f"{samples * length} tokens, found {num_tokens}"
        ):
            load_calibration(calibration, letters)
        return
    data = load_calibration(calibration, letters)
    assert data.tokens.dtype == torch.int64
    assert data.tokens.tolist() == plain_windows(texts, letters, samples, length, seed)


def test_a_long_text_is_cut_at_line_ends_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MIN_PASSAGE", 16)
    text = "one\n\ntwo words\n" + "x" * 50 + "\n" + "y\n" * 40
    path = tmp_path / "a.txt"
    path.write_text(text)
    whole = len(text) + 16  # more than the passages cost in bos and eos would leave room for
    with pytest.raises(CalibrationError) as error:
        load_calibration(Calibration(str(path), 1, 4 * whole), Letters())
    assert "tokens, found" in str(error.value)
    tokens = load_calibration(Calibration(str(path), len(text) // 2, 2), Letters()).tokens.flatten()
    assert {1, 2, ord("x"), ord("y")} <= set(tokens.tolist())
    passages = module._passages([text], 16)
    assert "".join(passages) == text
    assert all(len(passage) <= 16 for passage in passages)
    assert passages[0] == "one\n\ntwo words\n"
    assert passages[1:4] == ["x" * 16] * 3
    # Seeds see different parts of one long text.
    others = [load_calibration(Calibration(str(path), 1, 8, seed), Letters()) for seed in range(5)]
    assert len({data.sha256 for data in others}) > 1


def test_the_real_tokenizer_gives_the_stream_of_the_corpus(tmp_path: Path, tokenizer: Any) -> None:
    texts = [f"def f{i}(x):\n    return x + {i}\n" * 3 for i in range(40)]
    path = write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    data = load_calibration(Calibration(str(path), 5, 32, 3), tokenizer)
    stream = token_stream(tokenizer, [texts[i] for i in seeded_order(len(texts), 3)])
    assert torch.equal(data.tokens, stream[: 5 * 32].view(5, 32))
    expected = hashlib.sha256(b"".join(int(t).to_bytes(8, "little") for t in stream[: 5 * 32]))
    assert data.sha256 == expected.hexdigest()
    assert data.description == "5 x 32 tokens of a.jsonl (40 documents read), seed 3"


def test_the_order_is_that_of_every_python_version() -> None:
    assert seeded_order(8, 0) == [7, 4, 3, 2, 6, 0, 5, 1]
    assert seeded_order(0, 0) == []


def test_seeds_and_checksums(tmp_path: Path, tokenizer: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", *({"text": PROSE + str(i)} for i in range(60)))
    calibration = Calibration(str(path), 4, 64)
    data = load_calibration(calibration, tokenizer)
    again = load_calibration(calibration, tokenizer)
    assert torch.equal(data.tokens, again.tokens)
    assert data.sha256 == again.sha256
    other = load_calibration(Calibration(str(path), 4, 64, seed=1), tokenizer)
    assert not torch.equal(data.tokens, other.tokens)
    assert other.sha256 != data.sha256
    sealed = Calibration(str(path), 4, 64, sha256=data.sha256)
    assert torch.equal(load_calibration(sealed, tokenizer).tokens, data.tokens)
    path.write_text(path.read_text().replace("fox", "dog"))
    with pytest.raises(CalibrationError, match=f"must have the sha256 {data.sha256}, found"):
        load_calibration(sealed, tokenizer)


def test_too_little_text_says_how_much(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(CalibrationError, match=r"2 windows of 8 tokens needs 16 tokens, found 5"):
        load_calibration(Calibration(str(tmp_path / "a.txt"), 2, 8), Letters())
    (tmp_path / "a.txt").write_text(" \n\t\n")
    with pytest.raises(CalibrationError, match="found 0 in"):
        load_calibration(Calibration(str(tmp_path / "a.txt"), 2, 8), Letters())


def test_windows_beyond_the_models_context_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 100)
    calibration = Calibration(str(tmp_path / "a.txt"), 2, 9)
    with pytest.raises(CalibrationError, match=r"max_position_embeddings, 8 tokens, found a .* 9;"):
        load_calibration(calibration, Letters(), max_position_embeddings=8)
    assert load_calibration(calibration, Letters(), max_position_embeddings=9).tokens.shape == (
        2,
        9,
    )


# --- files ---------------------------------------------------------------------------------------


def test_text_is_the_same_with_every_line_end_and_byte_order_mark(tmp_path: Path) -> None:
    contents = [
        b"a\nb\n\xc3\xa9",
        b"a\r\nb\r\n\xc3\xa9",
        b"a\rb\r\xc3\xa9",
        b"\xef\xbb\xbfa\nb\n\xc3\xa9",
    ]
    for content in contents:
        (tmp_path / "a.txt").write_bytes(content)
        assert documents(tmp_path / "a.txt") == ["a\nb\né"]


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x\xe9 au lait")
    with pytest.raises(CalibrationError, match=r"UTF-8, found byte 0xe9 at position 1 of .*a\.txt"):
        documents(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"t\xc3")
    with pytest.raises(CalibrationError, match="found byte 0xc3"):
        documents(tmp_path / "a.txt")


def test_of_a_large_file_only_the_beginning_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcé" * 100, encoding="utf-8")
    assert documents(tmp_path / "a.txt", max_bytes=9) == ["abcéabc"]  # not half an é
    path = write_lines(tmp_path / "a.jsonl", {"text": "abcd"}, {"text": "efgh"}, {"text": "ijkl"})
    assert documents(path, max_bytes=5) == ["abcd", "efgh"]
    path.write_text(path.read_text() + "not read")
    assert documents(path, max_bytes=12) == ["abcd", "efgh", "ijkl"]


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"text": "a", "prompt": "b", "completion": "c"}, "a"),
        ({"content": "a", "id": "b"}, "a"),
        ({"prompt": "a", "completion": " b"}, "a b"),
        ({"prompt": "a ", "completion": "b"}, "a b"),
        ({"prompt": "a", "response": "b"}, "a\nb"),
        ({"query": "a", "response": "b", "score": 3}, "a\nb"),
        ({"query": "a", "answer": "b"}, "a\nb"),
        ({"question": "a", "answer": "b", "text": None}, "a\nb"),
        ({"instruction": "a", "input": "b", "output": "c"}, "a\nb\nc"),
        ({"instruction": "a", "input": "", "output": "c"}, "a\nc"),
        ({"instruction": "a", "context": "b", "response": "c"}, "a\nb\nc"),
        ({"instruction": "a", "output": "c"}, "a\nc"),
    ],
)
def test_layouts_of_a_row(row: dict[str, Any], document: str, tmp_path: Path) -> None:
    assert documents(write_lines(tmp_path / "a.jsonl", row)) == [document]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "b", "tags": []}', r"found the fields \['body', 'tags'\] in line 4 of"),
        ('{"prompt": "b"}', r"found the fields \['prompt'\] in line 4 of"),
        ('{"text": 3}', r"found the fields \['text'\] in line 4 of"),
        ('{"messages": []}', r"found the fields \['messages'\] in line 4 of"),
        ('{"messages": ["hi"]}', "in line 4 of"),
        ('["b"]', "must be a JSON object, found list in line 4 of"),
        ("null", "must be a JSON object, found NoneType in line 4 of"),
        ('{"text": "b"', r"in line 4 of .*a\.jsonl \(Expecting ',' delimiter at column 13\)"),
        ("{'text': 'b'}", "in line 4 of"),
        ('{"text": "\\ud83d"}', "in line 4 of .*surrogates not allowed"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n   \n' + line + '\n{"text": "c"}\n', encoding="utf-8")
    with pytest.raises(CalibrationError, match=message):
        documents(path)


def test_empty_lines_and_a_missing_last_line_end_are_fine(tmp_path: Path) -> None:
    content = '\ufeff{"text": "a"}\r\n\n  \n{"text": "\\ud83d\\ude00"}'
    for suffix in ("jsonl", "ndjson", "json", "JSONL"):
        (tmp_path / f"a.{suffix}").write_bytes(content.encode())
        assert documents(tmp_path / f"a.{suffix}") == ["a", "😀"]


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "t\xe9l\xe9"}\n')
    with pytest.raises(CalibrationError, match=r"in line 2 of .* \(UnicodeDecodeError"):
        documents(tmp_path / "a.jsonl")


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path, "a b", "~nobody/a", "a/b.txt"):
        with pytest.raises(CalibrationError) as error:
            documents(data)
        assert str(data) in str(error.value)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CalibrationError, match=r"readable, found Permission denied for .*a\.txt"):
        documents(tmp_path / "a.txt")


# --- chats ---------------------------------------------------------------------------------------


@pytest.fixture
def chatting(tokenizer: Any) -> Any:
    other = AutoTokenizer.from_pretrained(TINY_MOE)
    other.chat_template = CHATML
    return other


def chat(role: str, content: str) -> dict[str, Any]:
    return {
        "messages": [{"role": role, "content": content}, {"role": "assistant", "content": "ok"}]
    }


def test_a_chat_is_what_the_template_makes_of_it(tmp_path: Path, chatting: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", chat("user", "a question"))
    ids = chatting("<|user|>a question\n<|assistant|>ok\n", add_special_tokens=False)["input_ids"]
    data = load_calibration(Calibration(str(path), 1, len(ids)), chatting)
    assert data.tokens.tolist() == [ids]
    with pytest.raises(CalibrationError, match=f"found {len(ids)} in"):  # no bos, no eos
        load_calibration(Calibration(str(path), 1, len(ids) + 1), chatting)


def test_a_chat_is_never_cut_and_texts_keep_their_ends(
    tmp_path: Path, chatting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MIN_PASSAGE", 16)
    path = write_lines(tmp_path / "a.jsonl", chat("user", "a\n" * 100), {"text": "b\n" * 20})
    data = load_calibration(Calibration(str(path), 8, 2), chatting)
    assert data.description.endswith("(2 documents read), seed 0")
    chats = [d for d in module._passages(documents(path), 16) if not isinstance(d, str)]
    assert len(chats) == 1


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", chat("user", "a"))
    with pytest.raises(CalibrationError, match=r"must have a chat template .* line 1 of"):
        load_calibration(Calibration(str(path), 1, 2), tokenizer)


def test_messages_that_the_template_refuses_are_named(tmp_path: Path, chatting: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", chat("robot", "beep"))
    with pytest.raises(CalibrationError, match=r"line 1 of .*\(TemplateError: no robots\)"):
        load_calibration(Calibration(str(path), 1, 2), chatting)


# --- directories and the standard library --------------------------------------------------------


def test_a_directory_is_read_in_an_order_of_its_own(tmp_path: Path) -> None:
    names = ["b.txt", "sub/a.py", "a.md", "sub/deep/c.rst", "z.TXT"]
    left_out = ["d.json", ".git/e.txt", "sub/.f.txt", "g", "h.bin"]
    for number, root in enumerate((tmp_path / "one", tmp_path / "two")):
        for name in (names + left_out)[:: 1 if number else -1]:  # created in another order
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
    found = documents(tmp_path / "one")
    assert sorted(found) == sorted(names)
    assert found == documents(tmp_path / "two")
    assert found == [sorted(names)[i] for i in seeded_order(len(names), 0)]
    assert documents(tmp_path / "one", seed=1) != found
    assert documents(tmp_path / "one", max_bytes=len(found[0])) == found[:1]


def test_the_file_systems_order_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(name)
    expected = documents(tmp_path)
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda *args: reversed(list(rglob(*args))))
    assert documents(tmp_path) == expected


def test_a_directory_with_a_file_in_another_encoding_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CalibrationError, match=r"found byte 0xff at position 0 of .*b\.txt"):
        documents(tmp_path)


def test_the_standard_library_is_the_training_split(tokenizer: Any) -> None:
    texts = read_texts(python_files("train"))
    assert sorted(documents("python-stdlib")) == sorted(texts)
    held_out = set(read_texts(python_files("heldout")))
    assert not held_out.intersection(documents("python-stdlib"))
    data = load_calibration(Calibration("python-stdlib", 4, 128), tokenizer)
    assert data.tokens.shape == (4, 128)
    assert tokenizer.bos_token_id is None or data.tokens[0, 0] == tokenizer.bos_token_id


def test_a_machine_without_sources_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/nowhere")
    with pytest.raises(CalibrationError, match="must find the sources of this Python's library"):
        documents("python-stdlib")


# --- the Hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``datasets`` itself on files here, in place of the repositories that are asked for."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    load = datasets.load_dataset
    asked: list[tuple[Any, ...]] = []
    files: dict[str, str] = {}

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        return load("json", data_files=files, split=split, streaming=streaming)

    def add(split: str, *rows: Any) -> None:
        files[split] = str(write_lines(tmp_path / f"{split}.jsonl", *rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return SimpleNamespace(asked=asked, add=add)


def test_rows_of_a_data_set(hub: Any) -> None:
    hub.add("train", *({"text": text, "body": "no"} for text in ("abc", "", "def")))
    hub.add("test", *({"text": "no", "body": text} for text in ("ghi", "jkl")))
    assert documents("org/name") == ["abc", "", "def"]
    assert documents("name:config@test#body") == ["ghi", "jkl"]
    assert documents("org/name", max_bytes=3) == ["abc"]
    assert hub.asked == [
        ("org/name", None, "train", True),
        ("name", "config", "test", True),
        ("org/name", None, "train", True),
    ]
    data = load_calibration(Calibration("org/name", 2, 4), Letters())
    rows = [[1, *map(ord, "abc")], [2, 1, *map(ord, "de")]]
    other = [[1, *map(ord, "def")], [2, 1, *map(ord, "ab")]]
    assert data.tokens.tolist() in (rows, other)
    assert data.description.startswith("2 x 4 tokens of org/name ")


def test_chats_of_a_data_set(hub: Any, chatting: Any) -> None:
    hub.add("train", {"prompt": "a", "prompt_id": "x", **chat("user", "a")})
    ids = chatting("<|user|>a\n<|assistant|>ok\n", add_special_tokens=False)["input_ids"]
    data = load_calibration(Calibration("org/chats", 1, len(ids)), chatting)
    assert data.tokens.tolist() == [ids]
    assert len(documents("org/chats#messages")) == 1


def test_a_data_set_whose_text_has_to_be_named(hub: Any) -> None:
    hub.add("train", {"text": "a", "body": "b"}, {"text": None, "body": "c"})
    with pytest.raises(CalibrationError, match=r"\['body', 'text'\] in row 2 of org/name"):
        documents("org/name")
    assert documents("org/name#body") == ["b", "c"]
    with pytest.raises(CalibrationError, match="must have text or messages in 'title', found"):
        documents("org/name#title")


def test_what_datasets_complains_about_is_passed_on(hub: Any) -> None:
    hub.add("train", {"text": "a"})
    with pytest.raises(CalibrationError, match=r"after 0 rows \(ValueError: Bad split: test"):
        documents("org/name@test")


def test_a_data_set_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CalibrationError, match=r"no file 'org/nothing' .*Couldn't reach 'org/nothi"
    ):
        documents("org/nothing")


def test_a_machine_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    import_module = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'")
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(CalibrationError, match=r"no 'org/name' here .*samoyeds-hf\[calibration\]"):
        documents("org/name")


def test_a_local_source_comes_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "a.txt").write_text("here")
    assert documents("org/name") == ["here"]
    assert Calibration("org/name").without_path().data == "name"
    assert calibration_sources.is_hub_id("org/name")
