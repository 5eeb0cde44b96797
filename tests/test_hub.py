"""Sources on the Hub: a plan reads headers, a conversion refuses before it downloads."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from checkpoints import assert_same_checkpoint, convert, edit_json, refused, save_dense
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError
from tiny_models import BY_NAME, MIXTRAL, PATTERN

from samoyeds_hf import SamoyedsConfig
from samoyeds_hf.convert import convert_checkpoint
from samoyeds_hf.errors import CheckpointError, PatternError
from samoyeds_hf.plan import plan_conversion

NAME = "org/tiny-mixtral"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = SamoyedsConfig(PATTERN)
SIZE = 10**9


class FakeHub:
    """One repository, served from a directory; remembers what was asked for."""

    def __init__(self, directory: Path, cache: Path) -> None:
        self.directory = directory
        self.snapshot = cache / "snapshots" / COMMIT
        self.downloaded: list[str] = []
        self.num_header_requests = 0

    def snapshot_download(
        self,
        name: str,
        allow_patterns: Sequence[str] = ("*",),
        ignore_patterns: Sequence[str] = (),
    ) -> str:
        assert name == NAME
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.directory.iterdir()):
            wanted = any(fnmatch(file.name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch(file.name, pattern) for pattern in ignore_patterns):
                shutil.copy2(file, self.snapshot)
                self.downloaded.append(file.name)
        return str(self.snapshot)

    def get_safetensors_metadata(self, name: str, *, revision: str) -> SimpleNamespace:
        assert (name, revision) == (NAME, COMMIT)
        self.num_header_requests += 1
        files = {}
        for file in self.directory.glob("*.safetensors"):
            data = file.read_bytes()
            (size,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + size])
            header.pop("__metadata__", None)
            tensors = {
                tensor: SimpleNamespace(dtype=entry["dtype"], shape=entry["shape"])
                for tensor, entry in header.items()
            }
            files[file.name] = SimpleNamespace(tensors=tensors)
        return SimpleNamespace(files_metadata=files)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A repository of three shards, with weights in another format beside them."""
    source = save_dense(MIXTRAL, tmp_path / "remote", max_shard_size="150KB")
    (source / "pytorch_model.bin").write_bytes(b"the same once more")
    (source / "modeling_custom.py").write_text("raise SystemExit")
    fake = FakeHub(source, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", fake.get_safetensors_metadata)
    monkeypatch.chdir(tmp_path)
    return fake


def test_the_functions_of_the_hub_have_these_parameters() -> None:
    """What the fake stands for."""
    from inspect import signature

    from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo

    download = signature(huggingface_hub.snapshot_download).parameters
    assert {"allow_patterns", "ignore_patterns"} <= set(download)
    assert "revision" in signature(huggingface_hub.get_safetensors_metadata).parameters
    info = TensorInfo(dtype="BF16", shape=[2, 3], data_offsets=(0, 12))
    content = SafetensorsFileMetadata(metadata={}, tensors={"weight": info})
    assert content.tensors["weight"].shape == [2, 3]


def test_a_plan_downloads_no_weights(hub: FakeHub) -> None:
    plan = plan_conversion(NAME, CONFIG, SIZE)
    assert hub.downloaded == ["config.json", "model.safetensors.index.json"]
    assert str(plan) == str(plan_conversion(hub.directory, CONFIG, SIZE))
    assert plan.shards == plan_conversion(hub.directory, CONFIG, SIZE).shards


def test_a_plan_of_one_file(hub: FakeHub) -> None:
    shutil.rmtree(hub.directory)
    save_dense(MIXTRAL, hub.directory)
    plan = plan_conversion(NAME, CONFIG, SIZE)
    assert hub.downloaded == ["config.json"]
    assert str(plan) == str(plan_conversion(hub.directory, CONFIG, SIZE))


def test_a_plan_of_tied_embeddings(hub: FakeHub) -> None:
    """Whether both stored copies are equal shows only in the data; they are taken to be."""
    shutil.rmtree(hub.directory)
    family = BY_NAME["mixtral"]
    settings = {**family.settings, "tie_word_embeddings": True}
    save_dense(type(family)("tied", "Mixtral", settings), hub.directory)
    assert str(plan_conversion(NAME, CONFIG, SIZE)) == str(
        plan_conversion(hub.directory, CONFIG, SIZE)
    )


def test_an_earlier_download_is_used(hub: FakeHub) -> None:
    hub.snapshot_download(NAME)
    assert plan_conversion(NAME, CONFIG, SIZE).source == hub.snapshot
    assert hub.num_header_requests == 0


def test_convert_downloads_what_it_needs(hub: FakeHub, tmp_path: Path) -> None:
    convert_checkpoint(NAME, tmp_path / "new", CONFIG, progress=False)
    assert not {"pytorch_model.bin", "modeling_custom.py"} & set(hub.downloaded)
    convert(hub.directory, tmp_path / "expected")
    assert_same_checkpoint(tmp_path / "new", tmp_path / "expected")
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert f"base_model: {NAME}" in card


def test_what_must_be_refused_is_refused_before_the_download(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(config: SamoyedsConfig = CONFIG) -> None:
        convert_checkpoint(NAME, tmp_path / "new", config, progress=False)

    refused(PatternError, "V must divide", call=lambda: attempt(SamoyedsConfig("1:2:48")))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    refused(CheckpointError, "must be new", call=attempt)
    shutil.rmtree(tmp_path / "new")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(CheckpointError, "1.00 kB free", call=attempt)
    edit_json(hub.directory / "config.json", quantization_config={"quant_method": "gptq"})
    refused(CheckpointError, "'gptq'", call=attempt)
    assert not any(name.endswith(".safetensors") for name in hub.downloaded)


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OSError("401 Client Error.\nmore"), ("neither (OSError: 401 Client Error)", "auth login")),
        (HfHubHTTPError.__bases__[0]("no route"), ("no route", "check the name, the network")),
        (NotASafetensorsRepoError("none"), ("must hold safetensors", "save_pretrained first")),
        (OSError(), ("neither (OSError: )",)),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("function", ["snapshot_download", "get_safetensors_metadata"])
def test_errors_of_the_hub_are_sentences(
    function: str,
    error: Exception,
    parts: tuple[str, ...],
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, function, fail)
    refused(CheckpointError, NAME, *parts, call=lambda: plan_conversion(NAME, CONFIG, SIZE))


def test_an_unknown_dtype_is_named(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def metadata(name: str, *, revision: str) -> SimpleNamespace:
        tensor = SimpleNamespace(dtype="F4", shape=[2])
        return SimpleNamespace(files_metadata={"x": SimpleNamespace(tensors={"w": tensor})})

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    refused(
        CheckpointError,
        "w must have a known dtype, found F4",
        call=lambda: plan_conversion(NAME, CONFIG, SIZE),
    )


def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real library, without a network and an earlier download."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    refused(
        CheckpointError,
        "'org/nothing-of-that-name' must be a directory or a reachable repository",
        "auth login",
        call=lambda: plan_conversion("org/nothing-of-that-name", CONFIG, SIZE),
    )


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "~/model", "a/b/c", "../a"])
def test_a_path_is_never_looked_up_on_the_hub(name: str, hub: FakeHub) -> None:
    refused(
        CheckpointError,
        f"found no {name!r}; check the path",
        call=lambda: plan_conversion(name, CONFIG, SIZE),
    )
    assert hub.downloaded == []
