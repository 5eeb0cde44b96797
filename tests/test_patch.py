"""patch_model and unpatch_model on loaded models: right results, true reports, no half measures."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers import relative
from safetensors.torch import load_file
from tiny_models import (
    BY_NAME,
    FAMILIES,
    MIXTRAL,
    PATTERN,
    Family,
    logits,
    make_toy,
    make_without_experts,
    masked_twin,
    same_state,
    to_dtype,
    tokens,
)
from torch import nn
from transformers import PreTrainedModel, QuantoConfig

import samoyeds_hf
from samoyeds_hf import SamoyedsConfig, SamoyedsExperts, SparsityPattern
from samoyeds_hf.errors import (
    ConfigError,
    PatternError,
    SamoyedsError,
    UnsupportedModelError,
)
from samoyeds_hf.experts import SparseModule

by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def experts_of(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if name.endswith(".experts") and hasattr(module, "down_proj"):
            yield name, module


# --- results ---------------------------------------------------------------------------------


@by_family
@pytest.mark.parametrize("pattern", [PATTERN, "2:4", "4:8:16"])
def test_fp32_logits_equal_the_masked_dense_model(family: Family, pattern: str) -> None:
    dense, sparse = family.make(), family.make()
    samoyeds_hf.patch_model(sparse, pattern)
    expected = logits(masked_twin(dense, sparse))
    assert relative(logits(sparse), expected) < 1e-5
    assert relative(logits(dense), expected) > 1e-2  # pruning does show in the logits


@by_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_exact_as_dense(family: Family, dtype: torch.dtype) -> None:
    """Layer by layer with the same routing: a router that flips would measure chance."""
    dense, sparse = family.make(dtype), family.make(dtype)
    samoyeds_hf.patch_model(sparse, PATTERN)
    twin = masked_twin(dense, sparse)
    exact = copy.deepcopy(twin).float()
    for seed, (name, module) in enumerate(experts_of(sparse)):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(17, 64, generator=generator).to(dtype)
        index = torch.rand(17, module.num_experts, generator=generator).topk(2).indices
        weights = torch.rand(17, 2, generator=generator)
        for routing in (weights, weights.to(dtype)):  # fp32 in Mixtral and DeepSeek, else as hidden
            with torch.no_grad():
                expected = exact.get_submodule(name)(hidden.float(), index, routing.float())
                theirs = relative(twin.get_submodule(name)(hidden, index, routing), expected)
                found = module(hidden, index, routing)
            assert found.dtype == dtype
            assert 0 < relative(found, expected) <= 2 * theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_half_precision_logits(name: str, dtype: torch.dtype) -> None:
    dense, sparse = BY_NAME[name].make(dtype), BY_NAME[name].make(dtype)
    samoyeds_hf.patch_model(sparse, PATTERN)
    twin = masked_twin(dense, sparse)
    expected = logits(copy.deepcopy(twin).float())
    # The median token: where a router decides otherwise in half precision, all is different.
    ours, theirs = (
        (logits(model).float() - expected).norm(dim=-1).median() for model in (sparse, twin)
    )
    assert ours <= 2 * theirs


def test_tokens_alone_or_in_a_batch() -> None:
    model = MIXTRAL.make()
    samoyeds_hf.patch_model(model, PATTERN)
    together = logits(model)
    one = logits(model, torch.as_tensor([[5]]))
    assert one.shape == (1, 1, 128)
    assert relative(logits(model)[:1], together[:1]) == 0


# --- the report ------------------------------------------------------------------------------


def test_report() -> None:
    dense, sparse = BY_NAME["qwen3_moe"].make(), BY_NAME["qwen3_moe"].make()
    config = SamoyedsConfig(
        PATTERN,
        overrides={r".*layers\.0\..*": "dense", r".*down_proj": "2:4"},
    )
    report = samoyeds_hf.patch_model(sparse, config=config)
    gate_up, down = report.weights
    name = "model.layers.1.mlp.experts"
    assert (gate_up.name, down.name) == (f"{name}.gate_up_proj", f"{name}.down_proj")
    assert (gate_up.shape, down.shape) == ((8, 192, 64), (8, 64, 96))
    assert (gate_up.pattern, down.pattern) == (PATTERN, "2:4")
    twin = masked_twin(dense, sparse)
    for row in report.weights:
        before, after = dense.get_parameter(row.name), twin.get_parameter(row.name)
        assert row.error == pytest.approx(relative(after, before), rel=1e-6)
        assert row.bytes_before == before.numel() * 4
        parts = [sparse.get_parameter(row.name + suffix) for suffix in ("", "_meta", "_index")]
        assert row.bytes_after == sum(part.numel() * part.element_size() for part in parts)
        assert row.bytes_after == 8 * SparsityPattern.parse(row.pattern).num_bytes(
            *row.shape[1:], 4
        )
    (skipped,) = report.skipped
    assert (skipped.name, skipped.reason) == ("model.layers.0.mlp.experts", "dense by override")
    assert report.bytes_before == sum(row.bytes_before for row in report.weights)
    assert report.bytes_after < report.bytes_before
    assert json.loads(json.dumps(report.to_dict()))["method"] == "magnitude"


def test_report_is_a_table() -> None:
    report = samoyeds_hf.patch_model(
        MIXTRAL.make(), config=SamoyedsConfig(PATTERN, overrides={r".*\.0\..*": "dense"})
    )
    lines = str(report).splitlines()
    head, first, second, total = lines[:4]
    assert head.split() == [
        "weight",
        "dense",
        "shape",
        "pattern",
        "before",
        "after",
        "rel.",
        "error",
    ]
    assert first.split()[:3] == ["model.layers.1.mlp.experts.gate_up_proj", "4x256x64", PATTERN]
    assert second.split()[:3] == ["model.layers.1.mlp.experts.down_proj", "4x64x128", PATTERN]
    assert total.startswith("total: 2 weights")
    assert len({len(line) for line in (head, first, second, total)}) == 1  # aligned to the right
    assert lines[-1] == "left dense: model.layers.0.mlp.experts: dense by override"


# --- configuration ---------------------------------------------------------------------------


def patterns_in(model: PreTrainedModel) -> dict[str, str]:
    return {
        f"{name}.{weight}": str(pattern)
        for name, module in model.named_modules()
        if isinstance(module, SparseModule)
        for weight, pattern in module.patterns.items()
    }


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, [PATTERN] * 4),
        ({r".*layers\.1\..*": "2:4"}, [PATTERN, PATTERN, "2:4", "2:4"]),
        ({r".*down_proj": "1:4:16"}, [PATTERN, "1:4:16", PATTERN, "1:4:16"]),
        ({r"model\.layers\.0\.mlp\.experts": "dense"}, [None, None, PATTERN, PATTERN]),
        # The first regex wins, whether it matches the weight's name or its module's.
        (
            {r".*\.1\..*down_proj": "1:4:16", r".*\.1\.mlp\.experts": "2:4"},
            [PATTERN, PATTERN, "2:4", "1:4:16"],
        ),
        (
            {r".*\.1\.mlp\.experts": "2:4", r".*down_proj": "1:4:16"},
            [PATTERN, "1:4:16", "2:4", "2:4"],
        ),
    ],
    ids=["none", "a layer", "a projection", "a dense layer", "projection first", "module first"],
)
def test_overrides(overrides: dict[str, str], expected: list[str | None]) -> None:
    model = MIXTRAL.make()
    samoyeds_hf.patch_model(model, config=SamoyedsConfig(PATTERN, overrides=overrides))
    names = [
        f"model.layers.{layer}.mlp.experts.{weight}"
        for layer in (0, 1)
        for weight in ("gate_up_proj", "down_proj")
    ]
    found = patterns_in(model)
    assert [found.get(name) for name in names] == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({r".*layers\.7\..*": "dense"}, r"found '\.\*layers\\\\\.7.*matches none"),
        ({r"mlp\.experts": "2:4"}, "names are matched whole and look like 'model.layers.0.mlp"),
        ({r".*down_proj": "dense"}, "'dense' goes with a whole module"),
    ],
    ids=["no such layer", "a part of the name", "half a module dense"],
)
def test_overrides_that_do_not_fit(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        samoyeds_hf.patch_model(MIXTRAL.make(), config=SamoyedsConfig(PATTERN, overrides=overrides))


def test_all_dense_is_an_error() -> None:
    with pytest.raises(UnsupportedModelError, match="found all dense by overrides"):
        samoyeds_hf.patch_model(
            MIXTRAL.make(), config=SamoyedsConfig(PATTERN, overrides={".*": "dense"})
        )


def test_recipe_and_pattern(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pattern: '1:2:32'\noverrides:\n  '.*down_proj': '2:4'\n")
    from_recipe, from_config = MIXTRAL.make(), MIXTRAL.make()
    samoyeds_hf.patch_model(from_recipe, config=recipe)
    config = SamoyedsConfig(PATTERN, overrides={".*down_proj": "2:4"})
    samoyeds_hf.patch_model(from_config, config=config)
    assert same_state(from_recipe, from_config)
    assert from_recipe.config.quantization_config == config
    with pytest.raises(ConfigError, match="pattern or config, found both"):
        samoyeds_hf.patch_model(MIXTRAL.make(), PATTERN, config=recipe)


# --- what the model is afterwards ------------------------------------------------------------


def test_print_tells_the_truth() -> None:
    model = MIXTRAL.make()
    samoyeds_hf.patch_model(
        model, config=SamoyedsConfig(PATTERN, overrides={r".*\.1\..*down_proj": "2:4"})
    )
    text = str(model)
    assert "SamoyedsExperts(4 experts, H=64, I=128, 1:2 × V=32)" in text
    assert "SamoyedsExperts(4 experts, H=64, I=128, gate_up 1:2 × V=32, down 2:4)" in text
    assert "MixtralExperts" not in text
    toy = make_toy()
    samoyeds_hf.patch_model(toy, PATTERN, strict=False)
    assert "SamoyedsLinear(in_features=32, out_features=64, 1:2 × V=32)" in str(toy)


def test_sparse_weights_are_parameters_that_never_train() -> None:
    model = MIXTRAL.make()
    samoyeds_hf.patch_model(model, PATTERN)
    for _, module in experts_of(model):
        parameters = dict(module.named_parameters())
        assert sorted(parameters) == sorted(
            name + suffix
            for name in ("gate_up_proj", "down_proj")
            for suffix in ("", "_meta", "_index")
        )
        assert not any(parameter.requires_grad for parameter in parameters.values())
        assert all(parameter.shape[0] == 4 for parameter in parameters.values())
        assert not dict(module.named_buffers())


@by_family
def test_unpatch(family: Family, tmp_path: Path) -> None:
    dense, model = family.make(), family.make()
    classes = [type(module) for module in model.modules()]
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    samoyeds_hf.patch_model(model, PATTERN)
    twin = masked_twin(dense, model)
    samoyeds_hf.unpatch_model(model)
    assert [type(module) for module in model.modules()] == classes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trainable
    assert same_state(model, twin)
    assert torch.equal(logits(model), logits(twin))
    assert getattr(model, "hf_quantizer", None) is None
    # It saves as the dense model does: the Hub's names, and no trace of us in config.json.
    model.save_pretrained(tmp_path / "unpatched")
    twin.save_pretrained(tmp_path / "dense")
    saved, expected = (
        load_file(tmp_path / name / "model.safetensors") for name in ("unpatched", "dense")
    )
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    configs = [(tmp_path / name / "config.json").read_text() for name in ("unpatched", "dense")]
    assert configs[0] == configs[1]


def test_unpatched_model_needs_no_package(tmp_path: Path) -> None:
    model = MIXTRAL.make()
    samoyeds_hf.patch_model(model, PATTERN)
    samoyeds_hf.unpatch_model(model)
    model.save_pretrained(tmp_path / "dense")
    torch.save(logits(model), tmp_path / "logits.pt")
    code = (
        "import sys, torch; sys.modules['samoyeds_hf'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('dense')\n"
        "ids = torch.load('ids.pt')\n"
        "assert torch.equal(model(ids, use_cache=False).logits, torch.load('logits.pt'))\n"
    )

    torch.save(tokens(), tmp_path / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_patch_again_after_unpatch() -> None:
    once, twice = MIXTRAL.make(), MIXTRAL.make()
    samoyeds_hf.patch_model(once, PATTERN)
    samoyeds_hf.patch_model(twice, PATTERN)
    samoyeds_hf.unpatch_model(twice)
    report = samoyeds_hf.patch_model(twice, PATTERN)
    assert same_state(once, twice)
    assert report.error == 0  # what is pruned already stays as it is


def test_training_mode_is_kept() -> None:
    model = MIXTRAL.make().train()
    samoyeds_hf.patch_model(model, PATTERN)
    assert all(module.training for module in model.modules())
    samoyeds_hf.unpatch_model(model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["mixtral", "minimax_m3"])
def test_deepcopy_and_pickle(name: str) -> None:
    model = BY_NAME[name].make()
    samoyeds_hf.patch_model(model, PATTERN)
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        samoyeds_hf.unpatch_model(twin)  # the copy only
    assert torch.equal(logits(model), expected)
    assert any(isinstance(module, SamoyedsExperts) for module in model.modules())


def test_cast_after_patching() -> None:
    model, patched_in_bf16 = MIXTRAL.make(), to_dtype(MIXTRAL.make(), torch.bfloat16)
    samoyeds_hf.patch_model(model, PATTERN)
    model.to(torch.bfloat16)
    samoyeds_hf.patch_model(patched_in_bf16, PATTERN)
    experts = dict(experts_of(model))["model.layers.0.mlp.experts"]
    assert experts.down_proj.dtype == torch.bfloat16
    assert experts.down_proj_meta.dtype == experts.down_proj_index.dtype == torch.uint8
    assert logits(model).isfinite().all()


def test_accelerate_hook_is_kept() -> None:
    model, plain = MIXTRAL.make(), MIXTRAL.make()
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    experts = model.model.layers[0].mlp.experts
    hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
    add_hook_to_module(experts, hook)
    seen = []
    original = hook.pre_forward
    hook.pre_forward = lambda module, *args, **kwargs: (  # type: ignore[method-assign]
        seen.append(type(module)) or original(module, *args, **kwargs)
    )
    for model_to_patch in (model, plain):
        samoyeds_hf.patch_model(model_to_patch, PATTERN)
    replaced = model.model.layers[0].mlp.experts
    assert replaced._hf_hook is hook
    assert torch.equal(logits(model), logits(plain))
    assert seen == [SamoyedsExperts]
    samoyeds_hf.unpatch_model(model)
    samoyeds_hf.unpatch_model(plain)
    assert model.model.layers[0].mlp.experts._hf_hook is hook
    assert torch.equal(logits(model), logits(plain))
    assert len(seen) == 2


def test_hooks_of_the_user_move_to_the_new_module() -> None:
    model = MIXTRAL.make()
    experts = model.model.layers[0].mlp.experts
    seen: list[type] = []
    before = experts.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(type(module)), with_kwargs=True
    )
    after = experts.register_forward_hook(lambda module, args, out: out * 0)
    samoyeds_hf.patch_model(model, PATTERN)
    logits(model)
    assert seen == [SamoyedsExperts]
    assert not model.model.layers[0].mlp.experts(torch.ones(1, 64), *routed()).any()
    after.remove()
    assert model.model.layers[0].mlp.experts(torch.ones(1, 64), *routed()).any()
    samoyeds_hf.unpatch_model(model)
    seen.clear()
    logits(model)
    assert seen == [type(experts)]
    before.remove()
    logits(model)
    assert len(seen) == 1


def routed() -> tuple[torch.Tensor, torch.Tensor]:
    """One token to the first expert."""
    return torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)


# --- refusals change nothing -----------------------------------------------------------------


def _on_meta(model: Any) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to("meta"))


def _not_finite(value: float) -> Any:
    def spoil(model: Any) -> None:
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[3, 5, 7] = value

    return spoil


def _other_quantizer(model: Any) -> None:
    class Other:
        quantization_config = QuantoConfig("int8")

    model.hf_quantizer = Other()


def _has_bias(model: Any) -> None:
    model.model.layers[1].mlp.experts.has_bias = True


def _fp64(model: Any) -> None:
    model.model.layers[1].mlp.experts.double()


@pytest.mark.parametrize(
    ("spoil", "arguments", "error", "message"),
    [
        (None, {"pattern": "1:2:48"}, PatternError, "found V=48 and 64; the V that divide 64 are"),
        (None, {"pattern": "1:3:16"}, PatternError, "M must divide the out features, found M=3"),
        (None, {"pattern": "half"}, PatternError, "found 'half'"),
        (
            None,
            {"config": SamoyedsConfig(PATTERN, overrides={".*layers.9.*": "2:4"})},
            ConfigError,
            "matches none",
        ),
        (
            _on_meta,
            {},
            UnsupportedModelError,
            "layers.1.mlp.experts.down_proj offloaded or on meta",
        ),
        (_not_finite(math.nan), {}, SamoyedsError, "layers.1.mlp.experts.down_proj must be finite"),
        (_not_finite(math.inf), {}, SamoyedsError, "layers.1.mlp.experts.down_proj must be finite"),
        (
            _other_quantizer,
            {},
            UnsupportedModelError,
            "one quantised with 'quanto'; load its dense original",
        ),
        (_has_bias, {}, UnsupportedModelError, "layers.1.mlp.experts: MixtralExperts: .* bias"),
        (_fp64, {}, UnsupportedModelError, "must be bf16, fp16 or fp32, found torch.float64"),
    ],
    ids=["V", "M", "text", "override", "meta", "nan", "inf", "quantised", "unsupported", "fp64"],
)
def test_refusal_changes_nothing(
    spoil: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = MIXTRAL.make()
    if spoil is not None:
        spoil(model)
    modules = dict(model.named_modules())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, marks = model.config.to_dict(), set(vars(model))
    with pytest.raises(error, match=message):
        samoyeds_hf.patch_model(model, **(arguments or {"pattern": PATTERN}))
    after = model.state_dict()
    assert dict(model.named_modules()) == modules  # the same objects
    assert after.keys() == before.keys()
    assert all(
        after[name].is_meta or torch.equal(after[name].nan_to_num(9), before[name].nan_to_num(9))
        for name in after
    )
    assert model.config.to_dict() == config
    assert set(vars(model)) == marks


def test_already_patched() -> None:
    model = MIXTRAL.make()
    samoyeds_hf.patch_model(model, PATTERN)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UnsupportedModelError, match="quantised with 'samoyeds'; call unpatch_model first"
    ):
        samoyeds_hf.patch_model(model, "2:4")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_unpatch_needs_a_sparse_model() -> None:
    with pytest.raises(UnsupportedModelError, match="found no Samoyeds module"):
        samoyeds_hf.unpatch_model(MIXTRAL.make())


def test_not_a_model_of_transformers() -> None:
    with pytest.raises(UnsupportedModelError, match="needs a model of transformers, found Linear"):
        samoyeds_hf.patch_model(nn.Linear(8, 8))  # type: ignore[arg-type]


def test_dense_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="found none in LlamaForCausalLM"):
        samoyeds_hf.patch_model(make_without_experts())
