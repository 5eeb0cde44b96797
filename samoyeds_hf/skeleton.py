"""A model directory's configuration, and the model that it describes without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from samoyeds_hf.config import QUANT_METHOD
from samoyeds_hf.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load_config(source: Path, *, sparse: bool = False) -> PreTrainedConfig:
    """The configuration of a dense model, or of one that is known to be ``sparse``.

    Raises:
        CheckpointError: none there, unreadable, or of a model that is already quantised.
        UnsupportedModelError: a model type that transformers does not know.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    content = read_config(source)
    quantization = content.get("quantization_config")
    if quantization is None:
        quantization = (content.get("text_config") or {}).get("quantization_config")
    if quantization is not None and not sparse:
        method = quantization.get("quant_method")
        way_out = (
            "use its dense original, or 'samoyeds export-dense'"
            if method == QUANT_METHOD
            else "dequantise it first (load it with dequantize=True, save it in bf16)"
        )
        raise CheckpointError(
            f"The source must be dense, found one quantised with {method!r} in {source}; {way_out}."
        )
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"The model type must be known to transformers, found "
            f"{content.get('model_type')!r} ({str(error).splitlines()[0]})."
        ) from error
    except StrictDataclassError as error:
        raise CheckpointError(
            f"{source / 'config.json'} must fit its model type, found: "
            f"{' '.join(str(error).split())}; download it again."
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """The ``config.json`` of a model directory, as it is.

    Raises:
        CheckpointError: none there, or no JSON object.
    """
    path = directory / "config.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"A model directory needs a readable config.json, found none in {directory} "
            f"({getattr(error, 'strerror', None) or error}); check the path."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"A config.json must be a JSON object, found {content!r} in {path}.")
    return content


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model that a configuration describes, without weights.

    Raises:
        UnsupportedModelError: transformers has no class for it.
    """
    with torch.device("meta"):
        return _build(config, dtype)


def hollow_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The same with buffers in memory: what is computed from the configuration, not loaded.

    Raises:
        UnsupportedModelError: transformers has no class for it.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return _build(config, dtype).eval()


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    import transformers

    architecture = (config.architectures or [None])[0]
    model_class = getattr(transformers, architecture or "", None)
    if model_class is None:
        mapping = transformers.AutoModelForCausalLM._model_mapping
        if type(config) not in mapping:
            raise UnsupportedModelError(
                f"The architecture must be one of transformers', found {architecture!r}; custom "
                "code is not run."
            )
        model_class = mapping[type(config)]
    model: PreTrainedModel = model_class._from_config(config, dtype=dtype)
    return model
