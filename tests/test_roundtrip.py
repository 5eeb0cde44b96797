"""Save, load, generate: every family through transformers' own paths."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import load
from packaging import version
from safetensors.torch import load_file, save_file
from tiny_models import (
    BY_NAME,
    FAMILIES,
    MIXTRAL,
    PATTERN,
    Family,
    ToyModel,
    logits,
    make_toy,
    masked_twin,
    same_state,
    to_dtype,
    tokens,
)
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import samoyeds_hf
from samoyeds_hf import SamoyedsConfig, SamoyedsExperts
from samoyeds_hf.errors import CheckpointError, UnsupportedModelError

pytestmark = pytest.mark.roundtrip

by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
CONFIG = SamoyedsConfig(PATTERN)


def files_in(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


# --- save and load ---------------------------------------------------------------------------


@by_family
def test_load_is_bit_identical_and_saves_the_same_files(
    family: Family, saved: Any, tmp_path: Path
) -> None:
    case = saved(family)
    loaded = load(case.sparse_dir)
    assert same_state(loaded, case.sparse)
    assert torch.equal(logits(loaded), logits(case.sparse))
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if ".experts." in n)
    loaded.save_pretrained(tmp_path / "again")
    assert files_in(tmp_path / "again") == files_in(case.sparse_dir)


@by_family
def test_pruning_while_loading_equals_patch_model(
    family: Family, saved: Any, tmp_path: Path
) -> None:
    case = saved(family)
    loaded = load(case.dense_dir, quantization_config=CONFIG)
    assert same_state(loaded, case.sparse)
    assert torch.equal(logits(loaded), logits(case.sparse))
    patched = copy.deepcopy(case.dense)
    report = samoyeds_hf.patch_model(patched, PATTERN)
    assert sorted(loaded.hf_quantizer.report.weights, key=str) == sorted(report.weights, key=str)
    loaded.save_pretrained(tmp_path / "pruned")
    assert files_in(tmp_path / "pruned") == files_in(case.sparse_dir)


@by_family
def test_names_guard_against_plain_transformers(family: Family, saved: Any) -> None:
    """The values have the dense name and another shape; see test_autoload.py for the effect."""
    case = saved(family)
    stored = load_file(case.sparse_dir / "model.safetensors")
    dense = case.dense.state_dict()
    assert (
        stored.keys() == case.sparse.state_dict().keys() - case.sparse.all_tied_weights_keys.keys()
    )
    packed = [
        name for name in dense if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    ]
    assert packed
    assert all(stored[name].shape != dense[name].shape for name in packed)


@pytest.mark.parametrize("dtype", ["auto", torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("stored_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_dtype(name: str, stored_dtype: torch.dtype, dtype: Any, tmp_path: Path) -> None:
    family = BY_NAME[name]
    dense = family.make(stored_dtype)
    dense.save_pretrained(tmp_path / "dense")
    sparse = copy.deepcopy(dense)
    samoyeds_hf.patch_model(sparse, PATTERN)
    sparse.save_pretrained(tmp_path / "sparse")
    wanted = stored_dtype if dtype == "auto" else dtype

    loaded = load(tmp_path / "sparse", dtype=dtype)
    expected = to_dtype(copy.deepcopy(sparse), wanted)
    assert loaded.dtype == wanted
    assert same_state(loaded, expected)
    assert torch.equal(logits(loaded), logits(expected))
    # Pruned while loading, the mask is chosen from the weights in the dtype asked for.
    pruned = load(tmp_path / "dense", dtype=dtype, quantization_config=CONFIG)
    patched = to_dtype(copy.deepcopy(dense), wanted)
    samoyeds_hf.patch_model(patched, PATTERN)
    assert same_state(pruned, patched)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "minimax_m3"])
def test_sharded(name: str, saved: Any, tmp_path: Path) -> None:
    case = saved(BY_NAME[name])
    case.sparse.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    loaded = load(tmp_path / "sharded")
    assert same_state(loaded, case.sparse)
    case.dense.save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    assert same_state(load(tmp_path / "dense", quantization_config=CONFIG), case.sparse)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v2"])
def test_shared_experts_and_dense_layers(name: str, saved: Any, tmp_path: Path) -> None:
    case = saved(BY_NAME[name])
    config = SamoyedsConfig(
        "2:4",
        modules=["experts", "shared_experts"],
        overrides={
            r"model\.layers\.1\.mlp\.experts\.down_proj": "4:8:32",
            r".*layers\.0\..*": "dense",
        }
        if name != "deepseek_v2"  # its layer 0 has no experts
        else {r".*shared_experts\.up_proj": "dense"},
    )
    sparse = copy.deepcopy(case.dense)
    report = samoyeds_hf.patch_model(sparse, config=config)
    assert report.skipped
    sparse.save_pretrained(tmp_path / "sparse")
    loaded = load(tmp_path / "sparse")
    assert loaded.config.quantization_config == config
    assert same_state(loaded, sparse)
    assert same_state(load(case.dense_dir, quantization_config=config), sparse)
    expected = logits(masked_twin(case.dense, sparse))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_module_list_fallback(tmp_path: Path) -> None:
    dense, sparse = make_toy(), make_toy()
    dense.save_pretrained(tmp_path / "dense")
    config = SamoyedsConfig(PATTERN, strict=False)
    samoyeds_hf.patch_model(sparse, config=config)
    sparse.save_pretrained(tmp_path / "sparse")
    for loaded in (
        ToyModel.from_pretrained(tmp_path / "sparse"),
        ToyModel.from_pretrained(tmp_path / "dense", quantization_config=config),
    ):
        assert same_state(loaded, sparse)
        assert torch.equal(logits(loaded), logits(sparse))
    with pytest.raises(UnsupportedModelError, match="one Linear at a time"):
        ToyModel.from_pretrained(tmp_path / "dense", quantization_config=CONFIG)


def test_base_model_of_a_checkpoint(saved: Any) -> None:
    """AutoModel leaves the language-model head of a whole checkpoint unused."""
    from transformers import AutoModel

    case = saved(MIXTRAL)
    base = AutoModel.from_pretrained(case.sparse_dir).eval()
    assert same_state(base, case.sparse.model)


def test_conversion_that_looks_at_the_parameter(tmp_path: Path) -> None:
    """Qwen3-VL-MoE: transformers transposes unless the shapes of file and parameter agree."""
    text = {
        **{"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "head_dim": 16},
        **{"intermediate_size": 64, "moe_intermediate_size": 64, "num_experts": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2},
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [4, 2, 2]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "dense")
    samoyeds_hf.patch_model(model, PATTERN)
    model.save_pretrained(tmp_path / "sparse")
    auto = transformers.AutoModelForImageTextToText
    assert same_state(auto.from_pretrained(tmp_path / "sparse"), model)
    with pytest.raises(
        CheckpointError, match=r"gate_up_proj must have shape \[4, 128, 64\], found"
    ):
        auto.from_pretrained(tmp_path / "dense", quantization_config=CONFIG)
    # As the Hub stores it, transposed, it is turned the right way.
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    for name in [name for name in tensors if ".mlp.experts." in name]:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    loaded = auto.from_pretrained(tmp_path / "dense", quantization_config=CONFIG)
    experts = loaded.model.language_model.layers[0].mlp.experts
    assert torch.equal(
        experts.gate_up_proj, model.model.language_model.layers[0].mlp.experts.gate_up_proj
    )


# --- offload ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "minimax_m3"])
@pytest.mark.parametrize("source", ["sparse", "dense"])
def test_device_map_cpu(name: str, source: str, saved: Any) -> None:
    case = saved(BY_NAME[name])
    if source == "sparse":
        loaded = load(case.sparse_dir, device_map={"": "cpu"})
    else:
        loaded = load(case.dense_dir, device_map={"": "cpu"}, quantization_config=CONFIG)
    assert same_state(loaded, case.sparse)
    assert torch.equal(logits(loaded), logits(case.sparse))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_disk_offload(name: str, saved: Any, tmp_path: Path) -> None:
    case = saved(BY_NAME[name])
    device_map = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
    }
    loaded = load(case.sparse_dir, device_map=device_map, offload_folder=tmp_path / "offload")
    offloaded = loaded.model.layers[1].mlp.experts
    assert isinstance(offloaded, SamoyedsExperts)
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert torch.equal(logits(loaded), logits(case.sparse))
    assert torch.equal(logits(loaded), logits(case.sparse))  # weights come back a second time
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.experts offloaded"):
        samoyeds_hf.unpatch_model(loaded)


def test_pruning_while_offloading_to_disk_is_refused(saved: Any, tmp_path: Path) -> None:
    case = saved(MIXTRAL)
    device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(UnsupportedModelError, match="found a device_map with 'disk'"):
        load(
            case.dense_dir,
            device_map=device_map,
            offload_folder=tmp_path,
            quantization_config=CONFIG,
        )


# --- generate and compile --------------------------------------------------------------------

GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
}


@by_family
@pytest.mark.parametrize("mode", GENERATE)
def test_generate(family: Family, mode: str, saved: Any) -> None:
    case = saved(family)
    ids = tokens(batch=2, length=7)
    settings = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        **GENERATE[mode],
    }
    results = []
    for model in (load(case.sparse_dir), case.twin):
        torch.manual_seed(0)
        results.append(model.generate(ids, **settings))
    assert results[0].shape == (2, 13)
    assert torch.equal(*results)


@by_family
def test_compile_without_graph_break(family: Family, saved: Any) -> None:
    case = saved(family)
    torch._dynamo.reset()
    compiled = torch.compile(case.sparse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(case.sparse), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compile_with_inductor(saved: Any) -> None:
    layer = copy.deepcopy(saved(MIXTRAL).sparse.model.layers[0].mlp)  # a router and its experts
    torch._dynamo.reset()
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = torch.compile(layer, fullgraph=True)(hidden)
        torch.testing.assert_close(found, layer(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_continuous_batching(name: str, saved: Any) -> None:
    case = saved(BY_NAME[name])
    prompts = [tokens(1, 7)[0].tolist(), tokens(1, 5, seed=1)[0].tolist()]
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1)
    # The default takes most of the machine's memory for its cache.
    small = ContinuousBatchingConfig(num_blocks=8, block_size=16, max_batch_tokens=32)
    batched = load(case.sparse_dir).generate_batch(
        prompts, settings, continuous_batching_config=small, progress_bar=False
    )
    assert len(batched) == 2
    for prompt, result in zip(prompts, batched.values(), strict=True):
        alone = case.twin.generate(torch.as_tensor([prompt]), max_new_tokens=5, eos_token_id=-1)
        assert result.generated_tokens == alone[0, len(prompt) :].tolist()


# --- more than one process -------------------------------------------------------------------


def run_ranks(mode: str, folder: Path, directories: dict[str, Path]) -> dict[str, Any]:
    """What the last of two ranks reports for each directory, by name; see parallel_worker.py."""
    worker = Path(__file__).with_name("parallel_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = folder / f"{mode}.json"
    done = subprocess.run(
        [*command, str(worker), mode, str(result), *map(str, directories.values())],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports: dict[str, Any] = json.loads(result.read_text())
    return {name: reports[str(directory)] for name, directory in directories.items()}


# Those whose number of experts two divides; GraniteMoe has no plan for it in older releases.
SPLIT = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "phimoe", "gemma4")


@pytest.mark.slow
def test_expert_parallel_equals_one_process(saved: Any, tmp_path: Path) -> None:
    if version.parse(transformers.__version__) < version.parse("5.16"):
        pytest.skip("DistributedConfig shards experts from transformers 5.16 on")
    cases = {name: saved(BY_NAME[name]) for name in SPLIT}
    with_shared = copy.deepcopy(cases["deepseek_v3"].dense)
    config = SamoyedsConfig(PATTERN, modules=["experts", "shared_experts"])
    samoyeds_hf.patch_model(with_shared, config=config)
    with_shared.save_pretrained(tmp_path / "with_shared" / "sparse")
    expected = {name: case.sparse for name, case in cases.items()} | {"with_shared": with_shared}
    directories = {name: case.sparse_dir for name, case in cases.items()}
    directories["with_shared"] = tmp_path / "with_shared" / "sparse"
    reports = run_ranks("expert", tmp_path, directories)
    for name, report in reports.items():
        assert "error" not in report, f"{name}: {report['error']}"
        whole = [m.num_experts for m in expected[name].modules() if isinstance(m, SamoyedsExperts)]
        assert report["experts"] == [number // 2 for number in whole]
        found = torch.tensor(report["logits"])
        torch.testing.assert_close(found, logits(expected[name]), rtol=1e-5, atol=1e-5)
    # Each rank prunes its own experts, to the same result.
    (report,) = run_ranks("prune", tmp_path, {"mixtral": cases["mixtral"].dense_dir}).values()
    assert report["experts"] == [2, 2]
    found = torch.tensor(report["logits"])
    torch.testing.assert_close(found, logits(cases["mixtral"].sparse), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_tensor_parallel_is_refused(saved: Any, tmp_path: Path) -> None:
    # tp_plan="auto" is the way of older releases, and one that newer ones still take
    (report,) = run_ranks("tp_plan", tmp_path, {"mixtral": saved(MIXTRAL).sparse_dir}).values()
    assert "UnsupportedModelError: Sparse experts are split by expert" in report["error"]
