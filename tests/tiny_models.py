"""Tiny random models of the families that are tested: two layers, made in milliseconds.

Every family is a configuration and the class that transformers builds from it. Sizes are chosen to
catch mistakes: an inner size of 96, a prime number of experts, hidden and inner sizes that differ.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from samoyeds_hf import decode
from samoyeds_hf.experts import SparseModule

VOCAB = 128
PATTERN = "1:2:32"  # 32 divides every hidden and inner size below

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """One architecture; ``name`` is its test id."""

    name: str
    architecture: str  # transformers.<architecture>{Config,ForCausalLM}
    settings: Mapping[str, Any] = field(repr=False)
    experts: str = "mlp.experts"  # path of the experts in a decoder layer
    config: str = ""  # configuration class where it is not <architecture>Config
    has_own_gate: bool = False
    is_compilable: bool = True  # the dense model traces as one graph

    def make_config(self) -> Any:
        """The configuration; skips the test where transformers does not have it yet."""
        name = self.config or f"{self.architecture}Config"
        config_class = getattr(transformers, name, None)
        if config_class is None:
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
        return config_class(**{**_COMMON, **self.settings})

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        """A model with random weights, in eval mode."""
        config = self.make_config()
        torch.manual_seed(seed)
        with torch.device("cpu"):
            model = getattr(transformers, f"{self.architecture}ForCausalLM")(config)
        _spread(model, seed)
        return to_dtype(model, dtype).eval()


def to_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast a model as ``from_pretrained(dtype=...)`` does: what must be fp32 stays fp32."""
    stays = list(model._get_dtype_plan(dtype) or {})
    stored = model.state_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        is_kept = name not in stored or any(part in name for part in stays)
        if tensor.is_floating_point() and not is_kept:
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    return model


def _spread(model: PreTrainedModel, seed: int) -> None:
    """Weights large enough that a wrong expert shows in the logits, and no parameter constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() >= 2 and tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise * 1.5 / tensor.shape[-1] ** 0.5)


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Token ids ``[batch, length]`` without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "intermediate_size": 128,
    "moe_intermediate_size": 96,
    "n_shared_experts": 2,
}

SIX_FAMILIES = (
    Family(
        "mixtral",
        "Mixtral",
        {"intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Family(
        "qwen2_moe",
        "Qwen2Moe",
        {
            "intermediate_size": 128,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 128,
            "num_experts": 5,  # prime
            "num_experts_per_tok": 2,
        },
    ),
    Family(
        "qwen3_moe",
        "Qwen3Moe",
        {
            "intermediate_size": 128,
            "moe_intermediate_size": 96,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
    ),
    Family(
        "olmoe",
        "Olmoe",
        {"intermediate_size": 64, "num_experts": 7, "num_experts_per_tok": 4},  # prime
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2",
        {**_MLA, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3",
        {**_MLA, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    ),
)

OTHER_FAMILIES = (
    Family(
        "glm4_moe",
        "Glm4Moe",
        {
            "intermediate_size": 128,
            "moe_intermediate_size": 96,
            "n_routed_experts": 5,  # prime
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 16,
        },
    ),
    Family(
        "granitemoe",  # multipliers on embedding, residual and logits
        "GraniteMoe",
        {
            "intermediate_size": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        experts="block_sparse_moe.experts",
    ),
    Family(
        "phimoe",
        "Phimoe",
        {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Family(
        "gemma4",  # GELU gate, experts beside a dense MLP
        "Gemma4",
        {
            "intermediate_size": 128,
            "moe_intermediate_size": 96,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "head_dim": 16,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCAB,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        config="Gemma4TextConfig",
        experts="experts",
    ),
    Family(
        "minimax_m3",  # a clamped gate of its own
        "MiniMaxM3VL",
        {
            "intermediate_size": 96,
            "dense_intermediate_size": 128,
            "shared_intermediate_size": 64,
            "num_local_experts": 5,  # prime
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "rotary_dim": 8,
            "swiglu_limit": 0.5,  # low, so that the clamp shows
        },
        config="MiniMaxM3VLTextConfig",
        has_own_gate=True,
    ),
    Family(
        "hy_v4",  # from transformers 5.17: a clamped SwiGLU
        "HYV4",
        {
            "intermediate_size": 128,
            "moe_intermediate_size": 96,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "hc_mult": 2,
            "swiglu_limit": 0.5,
        },
        has_own_gate=True,
    ),
)

FAMILIES = (*SIX_FAMILIES, *OTHER_FAMILIES)
BY_NAME = {family.name: family for family in FAMILIES}
MIXTRAL = BY_NAME["mixtral"]


def masked_twin(dense: PreTrainedModel, sparse: PreTrainedModel) -> PreTrainedModel:
    """A copy of the dense model with zeros where the sparse one dropped a weight.

    The mask comes from the decoded weights, the values from the dense model.
    """
    twin = copy.deepcopy(dense)
    for name, module in sparse.named_modules():
        if isinstance(module, SparseModule):
            for weight, pattern in module.patterns.items():
                decoded = decode(module.stored(weight), pattern)
                parameter = twin.get_parameter(f"{name}.{weight}")
                pruned = torch.where(decoded != 0, parameter.data, 0)
                assert torch.equal(pruned, decoded), f"{name}.{weight} is not the masked weight"
                assert decoded.count_nonzero() == decoded.numel() * pattern.density
                parameter.data = pruned
    return twin


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same tensors, bit for bit, with the same names and dtypes."""
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of one forward pass without cache."""
    out: torch.Tensor = model(tokens() if ids is None else ids, use_cache=False).logits
    return out


class ToyConfig(PreTrainedConfig):
    model_type = "samoyeds_toy"

    def __init__(
        self,
        layout: tuple[str, str, str] | list[str] = ("gate_proj", "up_proj", "down_proj"),
        inner_size: int = 64,
        num_experts: int = 3,
        has_bias: bool = False,
        hidden_size: int = 32,
        vocab_size: int = VOCAB,
        **kwargs: Any,
    ) -> None:
        self.layout = list(layout)
        self.inner_size, self.num_experts, self.has_bias = inner_size, num_experts, has_bias
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        super().__init__(**kwargs)


class ToyExpert(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.names = tuple(config.layout)
        hidden, inner = config.hidden_size, config.inner_size
        for name, size in zip(
            self.names, ((hidden, inner), (hidden, inner), (inner, hidden)), strict=True
        ):
            self.add_module(name, nn.Linear(*size, bias=config.has_bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(nn.functional.silu(gate(x)) * up(x))


class ToyBlock(nn.Module):
    """Experts in a ModuleList, with the routing written inside the block."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(ToyExpert(config) for _ in range(config.num_experts))
        self.shared_expert = ToyExpert(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x).softmax(-1)  # every token goes to every expert
        routed = sum(weights[..., e, None] * expert(x) for e, expert in enumerate(self.experts))
        return x + routed + self.shared_expert(x)


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "model"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ToyBlock(config) for _ in range(2))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> CausalLMOutput:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))


def make_without_experts() -> PreTrainedModel:
    """A dense Llama."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def make_toy(**settings: Any) -> ToyModel:
    torch.manual_seed(0)
    model = ToyModel(ToyConfig(**settings))
    _spread(model, 0)
    return model.eval()
