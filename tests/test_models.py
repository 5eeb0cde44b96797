"""Which modules are taken for experts, and what a refusal says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_models import BY_NAME, FAMILIES, MIXTRAL, PATTERN, Family, logits, make_toy, masked_twin
from torch import nn

import samoyeds_hf
from samoyeds_hf import SamoyedsConfig, SamoyedsExperts, SamoyedsLinear
from samoyeds_hf.errors import PatternError, UnsupportedModelError
from samoyeds_hf.models import FUSED, LISTED, SHARED, survey
from samoyeds_hf.selection import select

_SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_FOUR_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def on_meta(model: str, config: str, **settings: Any) -> nn.Module:
    """A model of transformers without weights; skips where it does not exist yet."""
    if not hasattr(transformers, model):
        pytest.skip(f"transformers {transformers.__version__} has no {model}")
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(**settings))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family_is_recognised(family: Family) -> None:
    model = family.make()
    found = survey(model)
    assert found.refusals == [refusal for refusal in found.refusals if refusal.kind == SHARED]
    sites = [site for site in found.sites if site.kind == FUSED]
    assert sites
    assert all(site.name.endswith(f".{family.experts}") for site in sites)
    assert all(site.weights == ("gate_up_proj", "down_proj") for site in sites)
    has_experts = [
        name for name, _ in model.named_parameters() if name.endswith("experts.down_proj")
    ]
    assert [f"{site.name}.down_proj" for site in sites] == has_experts


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_gate_of_the_model_is_used(family: Family) -> None:
    model = family.make()
    samoyeds_hf.patch_model(model, PATTERN)
    experts = [module for module in model.modules() if isinstance(module, SamoyedsExperts)]
    is_plain = not family.has_own_gate and family.name != "gemma4"  # gemma4: GELU
    assert all(module.has_fused_gate == is_plain for module in experts)


@pytest.mark.parametrize(
    ("model", "config", "settings", "place", "reason"),
    [
        pytest.param(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            {**_SMALL, "intermediate_size_mlp": 64, "num_local_experts": 4, "head_dim": 16},
            "model.layers.0.feed_forward.experts",
            "not declared with use_experts_implementation",
            id="llama4: looks fused, is transposed",
        ),
        pytest.param(
            "GptOssForCausalLM",
            "GptOssConfig",
            {**_SMALL, **_FOUR_EXPERTS, "head_dim": 16},
            "model.layers.0.mlp.experts",
            "its gate and up rows are interleaved",
            id="gpt-oss: interleaved, transposed, biased",
        ),
        pytest.param(
            "NemotronHForCausalLM",
            "NemotronHConfig",
            {
                **_SMALL,
                "layers_block_type": ["moe", "attention"],
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "head_dim": 16,
            },
            "model.layers.0.mixer.experts",
            "its experts have no gate",
            id="nemotron-h: no gate",
        ),
        pytest.param(
            "MuseSparkForConditionalGeneration",
            "MuseSparkConfig",
            {},
            "model.language_model.layers.0.mlp.experts",
            "has_post_expert_norm=True, which is not known here",
            id="muse-spark: a flag that appeared in transformers 5.20",
        ),
        pytest.param(
            "JetMoeForCausalLM",
            "JetMoeConfig",
            {**_SMALL, **_FOUR_EXPERTS, "kv_channels": 16},
            "model.layers.0.mlp.input_linear",
            "not declared with use_experts_implementation",
            id="jetmoe",
        ),
        pytest.param(
            "AriaTextForCausalLM",
            "AriaTextConfig",
            {**_SMALL, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
            "model.layers.0.mlp.experts",
            "",  # transposed in new releases, undeclared in older ones
            id="aria",
        ),
        pytest.param(
            "LongcatFlashForCausalLM",
            "LongcatFlashConfig",
            {
                "vocab_size": 128,
                "hidden_size": 64,
                "ffn_hidden_size": 64,
                "expert_ffn_hidden_size": 32,
                "n_routed_experts": 4,
                "zero_expert_num": 2,
                "moe_topk": 2,
                "num_layers": 1,
            },
            "model.layers.0.mlp.experts",
            "not declared with use_experts_implementation",
            id="longcat: zero experts",
        ),
        pytest.param(
            "SwitchTransformersForConditionalGeneration",
            "SwitchTransformersConfig",
            {
                "vocab_size": 128,
                "d_model": 32,
                "d_kv": 8,
                "d_ff": 32,
                "num_layers": 2,
                "num_sparse_encoder_layers": 1,
                "num_heads": 2,
                "num_experts": 4,
            },
            "encoder.block.1.layer.1.mlp.experts",
            "experts without gate_proj/up_proj/down_proj or w1/w3/w2",
            id="switch: a ModuleDict of experts without a gate",
        ),
    ],
)
def test_refused(
    model: str, config: str, settings: dict[str, Any], place: str, reason: str
) -> None:
    refused = on_meta(model, config, **settings)
    with pytest.raises(UnsupportedModelError) as error:
        select(refused, SamoyedsConfig(PATTERN))
    assert place in str(error.value)
    assert reason in str(error.value)
    # With strict=False nothing is left to do here, which is an error as well.
    with pytest.raises(UnsupportedModelError, match="found none in"):
        select(refused, SamoyedsConfig(PATTERN, strict=False))


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("has_bias", True, "its experts have a bias"),
        ("is_transposed", True, "its weights are stored transposed"),
        ("is_concatenated", False, "interleaved"),
        ("has_gate", False, "no gate"),
        ("has_router_scale", True, "has_router_scale=True, which is not known here"),
        ("is_doubled", 2, "is_doubled=2, which is not known here"),
    ],
)
def test_refused_by_flag(flag: str, value: object, reason: str) -> None:
    model = MIXTRAL.make()
    setattr(model.model.layers[1].mlp.experts, flag, value)
    (refusal,) = survey(model).refusals
    assert refusal.name == "model.layers.1.mlp.experts"
    assert reason in refusal.reason
    with pytest.raises(
        UnsupportedModelError, match=r"first model\.layers\.1\.mlp\.experts: Mixtral"
    ):
        select(model, SamoyedsConfig(PATTERN))
    plan = select(model, SamoyedsConfig(PATTERN, strict=False))
    assert [assignment.site.name for assignment in plan.assignments] == [
        "model.layers.0.mlp.experts"
    ]
    assert [skip.name for skip in plan.skipped] == ["model.layers.1.mlp.experts"]


def test_unknown_flag_that_is_off_is_no_obstacle() -> None:
    model = MIXTRAL.make()
    for layer in model.model.layers:
        layer.mlp.experts.has_something_new = False
    assert not survey(model).refusals


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda experts: experts.register_parameter("scale", nn.Parameter(torch.ones(4))),
            "'scale'",
        ),
        (lambda experts: experts.register_buffer("shift", torch.ones(4)), "holds"),
        (lambda experts: experts.add_module("norm", nn.LayerNorm(64)), "norm.bias"),
        (
            lambda experts: experts.register_parameter(
                "down_proj", nn.Parameter(torch.zeros(4, 128, 64))
            ),
            r"down_proj \[4, 128, 64\] are not \[E,2I,H\] and \[E,H,I\]",
        ),
    ],
    ids=["parameter", "buffer", "child with weights", "transposed shape"],
)
def test_refused_by_contents(change: Any, reason: str) -> None:
    model = MIXTRAL.make()
    change(model.model.layers[0].mlp.experts)
    with pytest.raises(UnsupportedModelError, match=reason):
        select(model, SamoyedsConfig(PATTERN))


def test_dense_model_is_an_error() -> None:
    model = on_meta("LlamaForCausalLM", "LlamaConfig", **_SMALL)
    with pytest.raises(UnsupportedModelError, match="found none in LlamaForCausalLM"):
        select(model, SamoyedsConfig(PATTERN))


def test_convolutions_are_not_experts() -> None:
    # Conv1d weights have three dimensions too; Qwen3-Next has them beside experts.
    mamba = on_meta(
        "MambaForCausalLM", "MambaConfig", vocab_size=128, hidden_size=64, num_hidden_layers=2
    )
    assert any(parameter.dim() == 3 for parameter in mamba.parameters())
    found = survey(mamba)
    assert not found.sites
    assert not found.refusals
    hybrid = on_meta(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        **_SMALL,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    found = survey(hybrid)
    assert [site.name for site in found.sites if site.kind == FUSED] == [
        f"model.layers.{n}.mlp.experts" for n in (0, 1)
    ]
    assert not found.refusals


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_shared_experts(name: str) -> None:
    dense, sparse = BY_NAME[name].make(), BY_NAME[name].make()
    config = SamoyedsConfig(PATTERN, modules=["experts", "shared_experts"])
    report = samoyeds_hf.patch_model(sparse, config=config)
    shared = [name for name, module in sparse.named_modules() if isinstance(module, SamoyedsLinear)]
    routed = [
        name for name, module in sparse.named_modules() if isinstance(module, SamoyedsExperts)
    ]
    assert len(shared) == 3 * len(routed)
    assert all(".shared_expert" in name for name in shared)
    assert len(report.weights) == len(shared) + 2 * len(routed)
    expected = logits(masked_twin(dense, sparse))
    torch.testing.assert_close(logits(sparse), expected, rtol=1e-5, atol=1e-5)


def test_shared_experts_alone() -> None:
    model = BY_NAME["qwen2_moe"].make()
    samoyeds_hf.patch_model(model, config=SamoyedsConfig(PATTERN, modules=["shared_experts"]))
    kinds = {type(module) for module in model.modules()}
    assert SamoyedsLinear in kinds
    assert SamoyedsExperts not in kinds


def test_model_without_shared_experts() -> None:
    with pytest.raises(UnsupportedModelError, match="with shared_experts, found none in Mixtral"):
        select(MIXTRAL.make(), SamoyedsConfig(PATTERN, modules=["shared_experts"]))


def test_unknown_shared_expert_is_refused_by_name() -> None:
    model = BY_NAME["minimax_m3"].make()  # its gate and up are one Linear
    config = SamoyedsConfig(PATTERN, modules=["experts", "shared_experts"])
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.shared_experts: MiniMaxM3"):
        select(model, config)
    plan = select(model, SamoyedsConfig(PATTERN, modules=config.modules, strict=False))
    assert len(plan.assignments) == 2
    assert [skip.name for skip in plan.skipped] == [
        f"model.layers.{layer}.mlp.shared_experts" for layer in (0, 1)
    ]


_LAYOUTS = [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")]


@pytest.mark.parametrize("layout", _LAYOUTS, ids="/".join)
def test_module_list_falls_back_to_single_linears(layout: tuple[str, str, str]) -> None:
    dense, sparse = make_toy(layout=layout), make_toy(layout=layout)
    report = samoyeds_hf.patch_model(sparse, PATTERN, strict=False)
    assert len(report.weights) == 2 * 3 * 3  # layers, experts, Linears
    assert not report.skipped
    assert all(".experts." in weight.name for weight in report.weights)
    assert isinstance(sparse.layers[0].shared_expert.get_submodule(layout[0]), nn.Linear)
    expected = logits(masked_twin(dense, sparse))
    torch.testing.assert_close(logits(sparse), expected, rtol=1e-5, atol=1e-5)


def test_module_list_with_shared_expert() -> None:
    sparse = make_toy()
    config = SamoyedsConfig(PATTERN, modules=["experts", "shared_experts"], strict=False)
    report = samoyeds_hf.patch_model(sparse, config=config)
    assert len(report.weights) == 2 * (3 + 1) * 3


def test_module_list_is_refused_by_default() -> None:
    model = make_toy()
    with pytest.raises(
        UnsupportedModelError,
        match=r"layers\.0\.experts: a ModuleList of experts runs one Linear at a time, which is "
        "slow; strict=False",
    ):
        samoyeds_hf.patch_model(model, PATTERN)
    kinds = {site.kind for site in survey(model).sites}
    assert kinds == {LISTED, SHARED}


def test_module_list_with_bias_is_refused() -> None:
    model = make_toy(has_bias=True)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.experts: ToyExpert"):
        samoyeds_hf.patch_model(model, PATTERN)
    with pytest.raises(UnsupportedModelError, match="found none in ToyModel"):
        samoyeds_hf.patch_model(model, PATTERN, strict=False)


def test_pattern_that_does_not_divide_names_weight_and_remedy() -> None:
    model = BY_NAME["qwen3_moe"].make()  # inner size 96
    with pytest.raises(
        PatternError,
        match=r"model\.layers\.0\.mlp\.experts\.down_proj: .*found V=64 and 96; the V that divide",
    ):
        samoyeds_hf.patch_model(model, "1:2:64")
