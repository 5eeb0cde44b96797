"""Configuration of DeepSeek-MoE (`model_type: deepseek`), read from the Hub's own config.json."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig

from samoyeds_hf.errors import UnsupportedModelError

# What DeepSeek-MoE's own code computes. Other values mean another model.
_ONLY: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("softmax",),
    "topk_method": ("greedy", "gready", None),  # the second is DeepSeek's own spelling
    "routed_scaling_factor": (1.0,),
    "mlp_bias": (False,),
}
# JSON files may write 0 or 1 for these, which a strict float field refuses.
_FLOATS = ("aux_loss_alpha", "initializer_range", "rms_norm_eps", "routed_scaling_factor")
_ROPE_TYPES = ("default", "linear", "dynamic")


@strict
class DeepseekConfig(DeepseekOcr2TextConfig):
    """DeepSeek-MoE's configuration with its original defaults.

    Raises `UnsupportedModelError` for a value that the host would not compute as the original does.
    `aux_loss_alpha` and `seq_aux` are kept but unused: no load-balancing loss is added in training.
    """

    model_type = "deepseek"
    base_config_key = ""

    vocab_size: int = 102400
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    mlp_layer_types: list[str] | None = None
    scoring_func: str = "softmax"
    seq_aux: bool = True
    rope_parameters: dict[str, Any] | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    aux_loss_alpha: float | int = 0.001
    attention_dropout: float | int | None = 0.0
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    routed_scaling_factor: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        # The code that auto_map names is neither run here nor saved with the model.
        kwargs.pop("auto_map", None)
        for name in _FLOATS:
            setattr(self, name, float(getattr(self, name)))
        self.attention_dropout = float(self.attention_dropout or 0.0)
        self._set_rope(kwargs)
        for name, allowed in _ONLY.items():
            if getattr(self, name) not in allowed:
                raise _refusal(name, f"{allowed[0]!r}", getattr(self, name))
        self.topk_method = "greedy"
        if self.moe_layer_freq < 1:
            raise _refusal("moe_layer_freq", "1 or more", self.moe_layer_freq)
        if self.mlp_layer_types is None:
            self.mlp_layer_types = [self._layer_type(i) for i in range(self.num_hidden_layers)]
        if "sparse" in self.mlp_layer_types:
            self._check_experts()
        super().__post_init__(**kwargs)

    def _layer_type(self, layer: int) -> str:
        is_sparse = (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )
        return "sparse" if is_sparse else "dense"

    def _check_experts(self) -> None:
        if not self.n_shared_experts or self.n_shared_experts < 1:
            raise _refusal("n_shared_experts", "1 or more", self.n_shared_experts)
        experts = self.n_routed_experts or 0
        if not 1 <= (self.num_experts_per_tok or 0) <= experts:
            raise _refusal("num_experts_per_tok", f"1 to {experts}", self.num_experts_per_tok)

    def _set_rope(self, kwargs: dict[str, Any]) -> None:
        """Make the rotary numbers floats and refuse a scaling that the original does not define."""
        scaling = dict(kwargs.pop("rope_scaling", None) or self.rope_parameters or {})
        if "rope_theta" in kwargs:
            kwargs["rope_theta"] = float(kwargs["rope_theta"])
        for key in ("rope_theta", "factor"):
            if key in scaling:
                scaling[key] = float(scaling[key])
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        if rope_type not in _ROPE_TYPES:
            raise _refusal("rope_scaling type", ", ".join(_ROPE_TYPES), rope_type)
        self.rope_parameters = scaling or None


def _refusal(name: str, allowed: str, found: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model type 'deepseek' is hosted with {name} {allowed}, found {found!r}: correct "
        "config.json if it is wrong, otherwise this model cannot run here"
    )
