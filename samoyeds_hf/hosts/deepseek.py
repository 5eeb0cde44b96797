"""DeepSeek-MoE-16B (`model_type: deepseek`) without its remote code, which no transformers 5 runs.

The text model of DeepSeek-OCR-2 is the same architecture: rotary multi-head attention, leading
dense layers, then softmax top-k routing over fused experts beside shared ones.
"""

from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import (
    DeepseekOcr2TextModel,
    DeepseekOcr2TextMoe,
    DeepseekOcr2TextPreTrainedModel,
    DeepseekOcr2TextTopkRouter,
)
from transformers.utils.generic import can_return_tuple

from samoyeds_hf.hosts.deepseek_config import DeepseekConfig


class NormalisedTopkRouter(DeepseekOcr2TextTopkRouter):
    """The router with `norm_topk_prob`: the K weights of a token sum to one."""

    def forward(
        self,
        hidden_states: torch.Tensor,  # [..., H]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return router logits [T, E], weights [T, K] and expert indices [T, K]."""
        logits, weights, indices = super().forward(hidden_states)
        return logits, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20), indices


class _SelectableExperts:
    """Lets `experts_implementation` be chosen, grouped products on GPU being the default.

    transformers looks for the decorator in the source of a model's own module; here it is on the
    base classes.
    """

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True


class DeepseekModel(_SelectableExperts, DeepseekOcr2TextModel):
    """DeepSeek-MoE without a head."""

    config: DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        # The original normalises only where there is more than one weight.
        if config.norm_topk_prob and (config.num_experts_per_tok or 0) > 1:
            for layer in self.layers:
                if isinstance(layer.mlp, DeepseekOcr2TextMoe):
                    router = NormalisedTopkRouter(config)
                    router.weight = layer.mlp.gate.weight  # keeps its initialisation
                    layer.mlp.gate = router


class DeepseekForCausalLM(_SelectableExperts, DeepseekOcr2TextPreTrainedModel, GenerationMixin):
    """DeepSeek-MoE with the language-model head."""

    config: DeepseekConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,  # [B, S]
        attention_mask: torch.Tensor | None = None,  # [B, S]
        position_ids: torch.Tensor | None = None,  # [B, S]
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,  # [B, S, H]
        labels: torch.Tensor | None = None,  # [B, S], -100 is ignored
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,  # last so many positions, or which ones; 0 is all
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits [B, S, vocab], and the loss where `labels` are given."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=getattr(outputs, "router_logits", None),  # newer releases record them
        )


# The Hub's key names, one tensor per expert, are those of Qwen2-MoE. Registered beside the classes,
# since transformers skips the conversion of custom code that did not ask for it.
if get_checkpoint_conversion_mapping("deepseek") is None:
    register_checkpoint_conversion_mapping(
        "deepseek", get_checkpoint_conversion_mapping("qwen2_moe")
    )
