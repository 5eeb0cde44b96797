"""The models of the laboratory: which class, and how large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers import PreTrainedTokenizerFast as Tokenizer

FAMILIES = ("mixtral", "qwen2_moe")
_HEAD = 64  # of attention


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the defaults of ``make`` have 100 M parameters or more."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    context: int

    @classmethod
    def make(cls, family: str, **sizes: int | None) -> Shape:
        """The sizes given, and the family's own for those that are None.

        mixtral: 8 large experts, of which 2 run. qwen2_moe: 16 small ones, of which 4 run, and a
        shared expert that is as wide as those 4, as in Qwen1.5-MoE and Qwen2-57B-A14B.
        """
        own = {"layers": 8, "hidden": 512, "context": 1024}
        own |= {
            "mixtral": {"intermediate": 1024, "experts": 8, "top_k": 2},
            "qwen2_moe": {"intermediate": 384, "experts": 16, "top_k": 4},
        }[family]
        return cls(family, **(own | {name: n for name, n in sizes.items() if n is not None}))

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, H={self.hidden} I={self.intermediate} E={self.experts} "
            f"top-{self.top_k}, context {self.context}"
        )

    def config(self, tokenizer: Tokenizer) -> PreTrainedConfig:
        """Two query heads for each key head, tied embeddings."""
        heads = max(1, self.hidden // _HEAD)
        shape: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "num_experts_per_tok": self.top_k,
            "max_position_embeddings": self.context,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "tie_word_embeddings": True,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if self.family == "mixtral":
            shape |= {"num_local_experts": self.experts, "intermediate_size": self.intermediate}
            shape |= {"head_dim": self.hidden // heads}
        else:
            shape |= {"num_experts": self.experts, "moe_intermediate_size": self.intermediate}
            shape |= {"shared_expert_intermediate_size": self.top_k * self.intermediate}
            shape |= {"norm_topk_prob": True}
        return AutoConfig.for_model(self.family, **shape)
