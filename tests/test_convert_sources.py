"""Damaged and unsuitable sources: one sentence each, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import (
    CONFIG,
    INDEX,
    SINGLE,
    assert_same_checkpoint,
    convert,
    edit_json,
    edit_tensors,
    headers,
    refused,
    save_dense,
)
from safetensors.torch import load_file, save_file
from tiny_models import MIXTRAL, Family

from samoyeds_hf import SamoyedsConfig
from samoyeds_hf import convert as module
from samoyeds_hf.convert import resolve_source
from samoyeds_hf.errors import CheckpointError, PatternError, SamoyedsError, UnsupportedModelError
from samoyeds_hf.plan import plan_conversion

SHARD_SIZE = 50_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint in several shards; nobody changes it."""
    return save_dense(MIXTRAL, tmp_path_factory.mktemp("shared") / "dense", max_shard_size="100KB")


@pytest.fixture
def own(source: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "own"))


def one_file(directory: Path) -> None:
    """Put a sharded checkpoint into a single file."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(file))
        file.unlink()
    (directory / INDEX).unlink()
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


# --- the source ---------------------------------------------------------------------------------


def drop(directory: Path, name: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop(name))


def put(directory: Path, name: str, tensor: torch.Tensor) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({name: tensor}))


EXPERT = "model.layers.1.block_sparse_moe.experts.2"
NORM = "model.norm.weight"
IN_ONE_FILE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a tensor is missing": (lambda d: drop(d, NORM), [NORM, "missing"]),
    "a matrix of an expert is missing": (
        lambda d: drop(d, f"{EXPERT}.w1.weight"),
        ["model.layers.1.mlp.experts.gate_up_proj", "3 x", "4 x"],
    ),
    "an expert is missing": (
        lambda d: [drop(d, f"{EXPERT}.{w}.weight") for w in ("w1", "w2", "w3")],
        ["model.layers.1.mlp.experts", "[4, ", "[3, "],
    ),
    "all experts are missing": (
        lambda d: edit_tensors(
            d, lambda t: [t.pop(name) for name in list(t) if "layers.1.block" in name]
        ),
        ["model.layers.1.mlp", "missing"],
    ),
    "a wrong shape": (lambda d: put(d, NORM, torch.ones(65)), [NORM, "[64]", "[65]"]),
    "an expert of a wrong shape": (
        lambda d: put(d, f"{EXPERT}.w2.weight", torch.ones(64, 96)),
        ["model.layers.1.mlp.experts.down_proj", "go together"],
    ),
    "experts of another size": (
        lambda d: edit_json(d / "config.json", intermediate_size=96),
        ["mlp.experts.", "configuration and the weights"],
    ),
    "an fp8 tensor": (
        lambda d: put(d, NORM, torch.ones(64).to(torch.float8_e4m3fn)),
        [NORM, "float8_e4m3fn", "dequantise"],
    ),
    "not a number": (
        lambda d: put(d, f"{EXPERT}.w2.weight", torch.full((64, 128), float("nan"))),
        ["model.layers.1.mlp.experts.down_proj", "finite", "nan"],
    ),
    "not safetensors": (
        lambda d: (d / SINGLE).write_bytes(b"version https://git-lfs"),
        [SINGLE, "23 bytes"],
    ),
    "an empty file": (lambda d: (d / SINGLE).write_bytes(b""), [SINGLE, "0 bytes"]),
    "no weights": (lambda d: (d / SINGLE).unlink(), [SINGLE, "found neither"]),
    "no configuration": (lambda d: (d / "config.json").unlink(), ["config.json", "found none"]),
    "a broken configuration": (
        lambda d: (d / "config.json").write_text('{"model_type": '),
        ["config.json"],
    ),
    "a configuration of another kind": (lambda d: (d / "config.json").write_text("[]"), ["object"]),
    "a value of a wrong type": (
        lambda d: edit_json(d / "config.json", num_local_experts="eight"),
        ["config.json", "num_local_experts"],
    ),
    "quantised to fp8": (
        lambda d: edit_json(d / "config.json", quantization_config={"quant_method": "fp8"}),
        ["must be dense", "'fp8'", "dequantise"],
    ),
    "unknown to transformers": (
        lambda d: edit_json(d / "config.json", model_type="nonesuch", architectures=["Nonesuch"]),
        ["nonesuch"],
    ),
    "custom code": (
        lambda d: edit_json(
            d / "config.json", model_type="nonesuch", auto_map={"AutoConfig": "code.Config"}
        ),
        ["nonesuch"],
    ),
}


@pytest.mark.parametrize("case", IN_ONE_FILE.values(), ids=IN_ONE_FILE)
def test_damaged_source(case: Any, own: Path, tmp_path: Path) -> None:
    damage, parts = case
    one_file(own)
    damage(own)
    refused(SamoyedsError, *parts, call=lambda: convert(own, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    # Everything but the values is known from the headers, before anything is written.
    assert (tmp_path / "out.partial").exists() == ("finite" in parts)


def second_shard(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[1]


def name_a_wrong_shard(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][NORM] = second_shard(directory).name
    (directory / INDEX).write_text(json.dumps(index))


IN_SHARDS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a shard is missing": (lambda d: second_shard(d).unlink(), ["-00002-of-", "missing"]),
    "a shard is cut short": (
        lambda d: os.truncate(second_shard(d), second_shard(d).stat().st_size // 2),
        ["-00002-of-", "download it again"],
    ),
    "a shard lacks its last byte": (
        lambda d: os.truncate(second_shard(d), second_shard(d).stat().st_size - 1),
        ["-00002-of-", "download it again"],
    ),
    "the index names a wrong shard": (name_a_wrong_shard, [NORM, "-00002-of-", "index"]),
    "a broken index": (lambda d: (d / INDEX).write_text("{"), [INDEX]),
    "an index without a map": (lambda d: (d / INDEX).write_text("{}"), [INDEX, "weight_map"]),
}


@pytest.mark.parametrize("case", IN_SHARDS.values(), ids=IN_SHARDS)
def test_damaged_shards(case: Any, own: Path, tmp_path: Path) -> None:
    damage, parts = case
    assert len(list(own.glob("*.safetensors"))) > 2
    damage(own)
    refused(CheckpointError, *parts, call=lambda: convert(own, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_sparse_source(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "sparse")
    refused(
        CheckpointError,
        "must be dense",
        "'samoyeds'",
        "export-dense",
        call=lambda: convert(tmp_path / "sparse", tmp_path / "out"),
        kept=tmp_path,
    )


def test_a_model_without_experts(tmp_path: Path) -> None:
    dense = Family("llama", "Llama", {"intermediate_size": 128})
    save_dense(dense, tmp_path / "dense")
    refused(
        UnsupportedModelError,
        "MoE layers",
        "LlamaForCausalLM",
        call=lambda: convert(tmp_path / "dense", tmp_path / "out"),
        kept=tmp_path,
    )


def test_v_that_does_not_divide(source: Path, tmp_path: Path) -> None:
    config = SamoyedsConfig("1:2:128")  # divides the inner size and not the hidden size
    refused(
        PatternError,
        "gate_up_proj",
        "V=128",
        "[4, 8, 16, 32, 64]",
        call=lambda: convert(source, tmp_path / "out", config),
        kept=tmp_path,
    )


def test_not_a_number_is_found_before_dst_exists(own: Path, tmp_path: Path) -> None:
    """And the place is told, with the expert."""
    one_file(own)

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}.w3.weight"][5, 7] = float("inf")

    edit_tensors(own, damage)
    message = refused(CheckpointError, "finite", "inf", call=lambda: convert(own, tmp_path / "out"))
    # gate rows, then up rows: row 5 of w3 is row 128 + 5.
    assert "model.layers.1.mlp.experts.gate_up_proj[2]" in message
    assert "133" in message
    assert "column 7" in message


# --- a repository of the Hub --------------------------------------------------------------------


def only_headers(source: Path, directory: Path) -> Any:
    """What of a repository is known without downloading weights."""
    directory.mkdir()
    for name in ("config.json", INDEX):
        shutil.copyfile(source / name, directory / name)
    files: dict[str, SimpleNamespace] = {}
    for name, tensor in headers(source).items():
        file = files.setdefault(tensor.file.name, SimpleNamespace(tensors={}))
        file.tensors[name] = SimpleNamespace(dtype=tensor.dtype, shape=list(tensor.shape))
    return SimpleNamespace(files_metadata=files)


def test_source_of_the_hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    snapshot = tmp_path / "1234abcd"
    metadata = only_headers(source, snapshot)
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: Any = None, ignore_patterns: Any = None) -> str:
        assert name == "some/model"
        if allow_patterns:
            return str(snapshot)
        asked.append(ignore_patterns)
        return str(shutil.copytree(source, snapshot, dirs_exist_ok=True))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(
        huggingface_hub, "get_safetensors_metadata", lambda name, revision: metadata
    )
    plan = plan_conversion("some/model", CONFIG, SHARD_SIZE)
    assert str(plan) == str(plan_conversion(source, CONFIG, SHARD_SIZE))
    settings: dict[str, Any] = {"shard_size": SHARD_SIZE, "progress": False}
    refused(
        PatternError,
        "V=128",
        call=lambda: module.convert_checkpoint(
            "some/model", tmp_path / "out", SamoyedsConfig("1:2:128"), **settings
        ),
    )
    assert asked == []  # neither needed the weights
    module.convert_checkpoint("some/model", tmp_path / "out", CONFIG, **settings)
    (ignored,) = asked
    assert {"*.bin", "*.py", "consolidated*"} <= set(ignored)
    assert "base_model: some/model" in (tmp_path / "out" / "README.md").read_text()
    convert(source, tmp_path / "local" / "out", shard_size=SHARD_SIZE)
    assert_same_checkpoint(tmp_path / "out", tmp_path / "local" / "out")


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused(
        CheckpointError,
        "'some/model'",
        "reachable repository",
        call=lambda: resolve_source("some/model"),
    )


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c", "bad name/m o"])
def test_source_that_does_not_exist(name: str, tmp_path: Path) -> None:
    refused(
        CheckpointError,
        repr(name),
        call=lambda: module.convert_checkpoint(name, tmp_path / "out", CONFIG),
    )
