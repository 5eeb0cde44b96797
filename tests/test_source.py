"""What is read of a checkpoint is what ``from_pretrained`` would load: names, values, dtypes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import INDEX, SINGLE, edit_json, edit_tensors, headers, load_as_auto, save_dense
from safetensors.torch import load_file, save_file
from tiny_models import BY_NAME, FAMILIES, MIXTRAL, Family
from transformers import AutoConfig, PreTrainedModel

from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.skeleton import meta_model
from samoyeds_hf.source import SourcePlan, loaded_dtypes, plan_sources, tied_names
from samoyeds_hf.stored import first_floating_dtype, read_checkpoint

pytestmark = pytest.mark.roundtrip

by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
by_layout = pytest.mark.parametrize("by_expert", [True, False], ids=["hub", "fused"])
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def skeleton(directory: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return meta_model(AutoConfig.from_pretrained(directory), dtype)


def sources_of(directory: Path) -> tuple[PreTrainedModel, SourcePlan]:
    model = skeleton(directory)
    return model, plan_sources(model, read_checkpoint(directory))


def assert_plan_loads(directory: Path) -> None:
    """Every tensor made by the plan equals the one that from_pretrained loads."""
    expected = load_as_auto(directory).state_dict()
    config = AutoConfig.from_pretrained(directory)
    tensors = read_checkpoint(directory)
    dtype = config.dtype or first_floating_dtype(list(tensors.values()))
    model = meta_model(config, dtype)
    sources = plan_sources(model, tensors)
    assert sources.missing == []
    dtypes = loaded_dtypes(model, dtype)
    made: dict[str, torch.Tensor] = {}
    for target in sources.targets.values():
        made.update(target.load(model))
    assert set(made) | tied_names(model, sources.targets) == set(expected)
    assert {name: dtypes[name] for name in made} == {name: expected[name].dtype for name in made}
    wrong = [name for name in made if not torch.equal(made[name].to(dtypes[name]), expected[name])]
    assert wrong == []


# --- names and values -------------------------------------------------------------------------


@by_family
@by_layout
def test_whole_conversion(family: Family, by_expert: bool, tmp_path: Path) -> None:
    save_dense(family, tmp_path, max_shard_size="100KB", save_original_format=by_expert)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_plan_loads(tmp_path)


@by_family
@by_layout
def test_by_expert_equals_whole(family: Family, by_expert: bool, tmp_path: Path) -> None:
    save_dense(family, tmp_path, save_original_format=by_expert)
    model, sources = sources_of(tmp_path)
    experts = [name for name in sources.targets if name.endswith(("gate_up_proj", "down_proj"))]
    assert experts
    for name in experts:
        target = sources.targets[name]
        whole = target.load(model)[name]
        assert whole.shape == model.get_parameter(name).shape == target.on_meta(model)[name].shape
        assert target.is_by_expert
        parts = [target.load_matrix(model, expert) for expert in range(len(whole))]
        assert torch.equal(torch.stack(parts), whole)


def test_hub_layouts_differ_as_they_should(tmp_path: Path) -> None:
    """The tests above would prove nothing if both layouts were the same."""
    hub, fused = save_dense(MIXTRAL, tmp_path / "hub"), tmp_path / "fused"
    save_dense(MIXTRAL, fused, save_original_format=False)
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in headers(hub)
    assert "model.layers.0.mlp.experts.gate_up_proj" in headers(fused)
    assert not set(headers(hub)) & {name for name in headers(fused) if "experts" in name}


def test_many_experts_are_in_natural_order(tmp_path: Path) -> None:
    """Expert 10 comes after expert 9, not after expert 1."""
    family = Family("wide", "Mixtral", {**MIXTRAL.settings, "num_local_experts": 12})
    save_dense(family, tmp_path, max_shard_size="100KB")
    assert_plan_loads(tmp_path)


def test_experts_in_any_order_of_shards(tmp_path: Path) -> None:
    save_dense(MIXTRAL, tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    (tmp_path / SINGLE).unlink()
    names = sorted(tensors, key=lambda name: name[::-1])
    weight_map = {}
    for number in range(3):
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, tmp_path / f"part-{number}.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, f"part-{number}.safetensors"))
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_plan_loads(tmp_path)


# --- what is not there, what is too much --------------------------------------------------------


def test_keys_the_model_does_not_have_are_unused(tmp_path: Path) -> None:
    save_dense(BY_NAME["deepseek_v3"], tmp_path)
    extra = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.2.eh_proj.weight",  # multi-token prediction: a layer after the last
        "model.layers.2.mlp.experts.0.gate_proj.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
    ]
    edit_tensors(tmp_path, lambda t: t.update({name: torch.ones(4) for name in extra}))
    _, sources = sources_of(tmp_path)
    assert sorted(sources.unused) == sorted(extra)
    assert_plan_loads(tmp_path)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    save_dense(MIXTRAL, tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop("model.norm.weight"))
    _, sources = sources_of(tmp_path)
    assert sources.missing == ["model.norm.weight"]


@pytest.mark.parametrize("weights", [("w1",), ("w1", "w3"), ("w2",)])
def test_missing_expert(weights: tuple[str, ...], tmp_path: Path) -> None:
    save_dense(MIXTRAL, tmp_path)
    for weight in weights:
        name = f"model.layers.1.block_sparse_moe.experts.2.{weight}.weight"
        edit_tensors(tmp_path, lambda t, name=name: t.pop(name))
    model, sources = sources_of(tmp_path)
    projection = "down_proj" if weights == ("w2",) else "gate_up_proj"
    target = sources.targets[f"model.layers.1.mlp.experts.{projection}"]
    if weights == ("w1",):
        with pytest.raises(CheckpointError, match=r"gate_up_proj must .* 3 x .*w1.* 4 x .*w3"):
            target.on_meta(model)
    else:
        assert target.on_meta(model)[target.name].shape[0] == 3


# --- dtypes -----------------------------------------------------------------------------------


@by_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_loaded_dtypes(family: Family, dtype: torch.dtype, tmp_path: Path) -> None:
    save_dense(family, tmp_path, dtype)
    expected = {name: tensor.dtype for name, tensor in load_as_auto(tmp_path).state_dict().items()}
    assert loaded_dtypes(skeleton(tmp_path, dtype), dtype) == expected
    if family.name == "deepseek_v3" and dtype == torch.bfloat16:
        assert expected["model.layers.1.mlp.gate.e_score_correction_bias"] == torch.float32


def test_source_of_mixed_dtypes(tmp_path: Path) -> None:
    """One dtype is loaded, the configured one; without one, the first that is stored."""
    save_dense(BY_NAME["deepseek_v3"], tmp_path)

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for number, (name, tensor) in enumerate(sorted(tensors.items())):
            tensors[name] = tensor.to((torch.float16, torch.float32, torch.bfloat16)[number % 3])

    edit_tensors(tmp_path, mix)
    assert_plan_loads(tmp_path)
    edit_json(tmp_path / "config.json", dtype=None)
    assert_plan_loads(tmp_path)


@pytest.mark.parametrize("first", [torch.float16, torch.float32], ids=str)
def test_without_a_configured_dtype_the_first_stored_counts(
    first: torch.dtype, tmp_path: Path
) -> None:
    save_dense(MIXTRAL, tmp_path)
    edit_json(tmp_path / "config.json", dtype=None)
    edit_tensors(tmp_path, lambda t: t.update({LM_HEAD: t[LM_HEAD].to(first)}))
    assert_plan_loads(tmp_path)


# --- tied embeddings --------------------------------------------------------------------------


def save_tied(directory: Path) -> None:
    settings = {**MIXTRAL.settings, "tie_word_embeddings": True}
    save_dense(Family("tied", "Mixtral", settings), directory)
    assert LM_HEAD not in headers(directory)


def store_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LM_HEAD] = tensors[EMBEDDING].clone()


@pytest.mark.parametrize("stored", ["embedding", "both", "head"])
def test_tied_weights_are_one(stored: str, tmp_path: Path) -> None:
    save_tied(tmp_path)
    if stored != "embedding":
        edit_tensors(tmp_path, store_head)
    if stored == "head":
        edit_tensors(tmp_path, lambda t: t.pop(EMBEDDING))
    model, sources = sources_of(tmp_path)
    assert sources.missing == []
    assert tied_names(model, sources.targets) == {LM_HEAD}
    assert EMBEDDING in sources.targets
    assert_plan_loads(tmp_path)


def test_tied_weights_that_differ_are_two(tmp_path: Path) -> None:
    """As in transformers: what the files say counts for more than the configuration."""
    save_tied(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({LM_HEAD: t[EMBEDDING] + 1}))
    model, sources = sources_of(tmp_path)
    assert tied_names(model, sources.targets) == set()
    assert_plan_loads(tmp_path)


def test_tied_weights_both_missing(tmp_path: Path) -> None:
    save_tied(tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop(EMBEDDING))
    _, sources = sources_of(tmp_path)
    assert sources.missing == [EMBEDDING]
