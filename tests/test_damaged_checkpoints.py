"""What each damage of a checkpoint says when it is loaded, and what does not belong together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load
from safetensors.torch import load_file, save_file
from tiny_models import MIXTRAL, PATTERN, make_without_experts, same_state

import samoyeds_hf
from samoyeds_hf import SamoyedsConfig
from samoyeds_hf.errors import CheckpointError, ConfigError, FormatError, UnsupportedModelError

pytestmark = pytest.mark.roundtrip

CONFIG = SamoyedsConfig(PATTERN)
EXPERTS = "model.layers.1.mlp.experts"
Tensors = dict[str, torch.Tensor]


def _drop(name: str) -> Callable[[Tensors], None]:
    def drop(tensors: Tensors) -> None:
        del tensors[name]

    return drop


def _change(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def _put(name: str, place: tuple[int, ...], value: int) -> Callable[[Tensors], None]:
    def put(tensors: Tensors) -> None:
        tensors[name][place] = value

    return put


@pytest.fixture(scope="module")
def four_of_eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse Mixtral with N > 1, so that an index has an order."""
    model = MIXTRAL.make()
    samoyeds_hf.patch_model(model, "4:8:32")
    folder = tmp_path_factory.mktemp("four_of_eight")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_drop(f"{EXPERTS}.down_proj"), CheckpointError, f"{EXPERTS}.down_proj missing"),
        (_drop(f"{EXPERTS}.down_proj_meta"), CheckpointError, f"{EXPERTS}.down_proj_meta missing"),
        (_drop(f"{EXPERTS}.gate_up_proj_index"), CheckpointError, "gate_up_proj_index missing"),
        (_drop("model.norm.weight"), CheckpointError, "model.norm.weight missing"),
        (_drop("lm_head.weight"), CheckpointError, "lm_head.weight missing"),
        (
            _change(f"{EXPERTS}.down_proj", lambda t: t[:, :-8]),
            FormatError,
            rf"{EXPERTS}.down_proj must have shape \[4, 32, 64\].*found \[4, 24, 64\]",
        ),
        (
            _change(f"{EXPERTS}.down_proj", lambda t: t[:-1]),
            FormatError,
            rf"{EXPERTS}.down_proj must have shape \[4, 32, 64\].*found \[3, 32, 64\]",
        ),
        (
            _change(f"{EXPERTS}.gate_up_proj_meta", lambda t: t[..., :-1]),
            FormatError,
            rf"{EXPERTS}.gate_up_proj_meta must have shape",
        ),
        (
            _change("model.layers.0.self_attn.q_proj.weight", lambda t: t[:32]),
            CheckpointError,
            r"layers.0.self_attn.q_proj.weight must have shape \[64, 64\], found \[32, 64\]",
        ),
        (
            _change(f"{EXPERTS}.down_proj", lambda t: t.double()),
            FormatError,
            f"{EXPERTS}.down_proj must have dtype .*found torch.float64",
        ),
        (
            _change(f"{EXPERTS}.down_proj_meta", lambda t: t.to(torch.int16)),
            FormatError,
            f"{EXPERTS}.down_proj_meta must have dtype .*uint8.*found torch.int16",
        ),
        (
            _put(f"{EXPERTS}.down_proj_index", (3, 5, 1), 8),
            FormatError,
            rf"{EXPERTS}.down_proj_index\[3, 5, 1\] must be below M=8, found 8",
        ),
        (
            _put(f"{EXPERTS}.down_proj_index", (3, 4, 1), 7),
            FormatError,
            rf"{EXPERTS}.down_proj_index\[3, 5, 1\] must be above the slot before it",
        ),
        (
            _put(f"{EXPERTS}.gate_up_proj_meta", (0, 9, 2), 0x44 - 4),
            FormatError,
            rf"{EXPERTS}.gate_up_proj_meta\[0, 9, 2\] must hold two nibbles .*found 0x40",
        ),
    ],
    ids=[
        "values missing",
        "meta missing",
        "index missing",
        "norm missing",
        "head missing",
        "rows missing",
        "an expert missing",
        "meta short",
        "attention short",
        "values fp64",
        "meta int16",
        "index too large",
        "index not ascending",
        "no nibble",
    ],
)
@pytest.mark.parametrize("ignore", [False, True], ids=["", "ignore_mismatched_sizes"])
def test_damaged_tensors(
    damage: Any,
    error: type[Exception],
    message: str,
    ignore: bool,
    four_of_eight: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(four_of_eight, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=message):
        load(tmp_path, ignore_mismatched_sizes=ignore)


@pytest.mark.parametrize("source", ["sparse", "dense"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
def test_damaged_shards(damage: str, source: str, saved: Any, tmp_path: Path) -> None:
    case = saved(MIXTRAL)
    model = case.sparse if source == "sparse" else case.dense
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1000])
    elif damage == "empty":
        shard.write_bytes(b"")
    else:
        shard.unlink()
    settings = {"quantization_config": CONFIG} if source == "dense" else {}
    with pytest.raises(CheckpointError, match=shard.name):
        load(tmp_path, **settings)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w2.weight"),
            r"layers.1.mlp.experts.down_proj must have shape \[4, 64, 128\], found \[3, 64, 128\]",
        ),
        (
            lambda tensors: [
                tensors.pop(name) for name in list(tensors) if ".1.block_sparse_moe.experts" in name
            ],
            r"found model.layers.1.mlp.experts.gate_up_proj missing \(2 in all\)",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if ".3.w3." in name],
            r"model.layers.0.mlp.experts.gate_up_proj",
        ),
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight missing"),
        (
            _change("lm_head.weight", lambda t: t[:, :32]),
            r"lm_head.weight must have shape \[128, 64\], found \[128, 32\]",
        ),
        (
            _change(
                "model.layers.1.block_sparse_moe.experts.2.w2.weight",
                lambda t: torch.full_like(t, torch.nan),
            ),
            r"model.layers.1.mlp.experts.down_proj must be finite",
        ),
    ],
    ids=["an expert's down", "a layer's experts", "an expert's up", "norm", "head short", "nan"],
)
def test_damaged_dense_checkpoint(damage: Any, message: str, saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved(MIXTRAL).dense_dir, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, quantization_config=CONFIG)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, quantization_config=CONFIG, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format_version": 2}, ConfigError, "found version 2; upgrade samoyeds-hf"),
        ({"format_version": "1"}, ConfigError, "format_version must be a positive integer"),
        ({"patern": "2:4"}, ConfigError, r"'patern' \(did you mean 'pattern'\?\)"),
        ({"method": "magic"}, ConfigError, "method must be one of"),
        ({"pattern": "1:2:16"}, FormatError, "must have shape .* for pattern 1:2:16"),
        ({"pattern": "2:4"}, FormatError, "must have shape .* for pattern 2:4"),
        ({"overrides": {".*layers.0.*": "dense"}}, CheckpointError, "layers.0.mlp.experts"),
    ],
    ids=[
        "newer",
        "text version",
        "unknown key",
        "method",
        "other V",
        "other pattern",
        "dense by override",
    ],
)
def test_config_that_does_not_fit(
    change: dict[str, Any], error: type[Exception], message: str, saved: Any, tmp_path: Path
) -> None:
    shutil.copytree(saved(MIXTRAL).sparse_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for ignore in (False, True):
        with pytest.raises(error, match=message):
            load(tmp_path, ignore_mismatched_sizes=ignore)


def test_source_that_is_already_quantised(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved(MIXTRAL).dense_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    # transformers itself says it; both classes are named
    with pytest.raises(
        ValueError, match=r"quantized with FineGrainedFP8Config .* a SamoyedsConfig"
    ):
        load(tmp_path, quantization_config=CONFIG)


def test_pattern_for_a_sparse_checkpoint_is_not_taken(saved: Any) -> None:
    case = saved(MIXTRAL)
    with pytest.warns(UserWarning, match="quantization_config` from the model will be used"):
        loaded = load(case.sparse_dir, quantization_config=SamoyedsConfig("2:4"))
    assert same_state(loaded, case.sparse)


def test_model_without_experts(tmp_path: Path) -> None:
    make_without_experts().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="found none in LlamaForCausalLM"):
        load(tmp_path, quantization_config=CONFIG)


def test_weights_that_are_no_safetensors(saved: Any, tmp_path: Path) -> None:
    case = saved(MIXTRAL)
    case.dense.config.save_pretrained(tmp_path)
    torch.save(case.dense.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin; save the model with"):
        load(tmp_path, quantization_config=CONFIG)
