"""Whole models with random weights, made on the device: dense, sparse, and a sparse checkpoint.

Only the shapes are a real model's. Sparse weights are random canonical tensors, so that the dense
ones never exist.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from layers import DTYPE, WEIGHT_STD, random_stored
from safetensors.torch import save_file
from torch import nn
from transformers import MixtralConfig, PreTrainedConfig, PreTrainedModel, Qwen2MoeConfig

from samoyeds_hf import SamoyedsConfig
from samoyeds_hf.experts import SparseModule, build_sparse
from samoyeds_hf.format import SUFFIXES
from samoyeds_hf.selection import select
from samoyeds_hf.skeleton import meta_model
from samoyeds_hf.stored import INDEX_FILE

# Of mistralai/Mixtral-8x7B-v0.1 and Qwen/Qwen1.5-MoE-A2.7B; no end of sequence, so that generate
# runs to its limit.
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mixtral-8x7b": (
        MixtralConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
        },
    ),
    "qwen1.5-moe": (
        Qwen2MoeConfig,
        {
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "vocab_size": 151936,
            "max_position_embeddings": 8192,
        },
    ),
}


def make_config(model: str, num_layers: int | None = None) -> PreTrainedConfig:
    """A model's configuration, with other than its own number of layers if given."""
    config_class, sizes = CONFIGS[model]
    if num_layers:
        sizes = {**sizes, "num_hidden_layers": num_layers}
    return config_class(**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=0)


def dense_model(config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    return _materialise(meta_model(config, DTYPE), device)


def sparse_model(
    config: PreTrainedConfig, sparsity: SamoyedsConfig, device: torch.device
) -> PreTrainedModel:
    """Packed on CUDA."""
    return _materialise(sparse_skeleton(config, sparsity), device)


def sparse_skeleton(config: PreTrainedConfig, sparsity: SamoyedsConfig) -> PreTrainedModel:
    """On meta."""
    model = meta_model(config, DTYPE)
    for assignment in select(model, sparsity).assignments:
        dense = model.get_submodule(assignment.site.name)
        model.set_submodule(assignment.site.name, build_sparse(dense, assignment.patterns))
    return model


def _materialise(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseModule):
            for weight, pattern in module.patterns.items():
                stored = random_stored(tuple(module.dense_shape(weight)), pattern, device)
                module.store(weight, stored)
            reason = module.pack_()
            if reason and device.type == "cuda":
                raise SystemExit(f"The sparse model needs the kernels, found none: {reason}")
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # Rotary embeddings compute their buffers when they are made.
            model.set_submodule(name, type(module)(model.config).to(device))
        else:
            for weight, parameter in module.named_parameters(recurse=False):
                tensor = random_parameter(weight, parameter, device)
                module.register_parameter(weight, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    return model.eval()


def random_parameter(name: str, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Ones for the weight of a norm, zeros for a bias, else random."""
    tensor = torch.empty(like.shape, dtype=like.dtype, device=device)
    if like.dim() > 1:
        return tensor.normal_(std=WEIGHT_STD)
    return tensor.fill_(1 if name.endswith("weight") else 0)


# --- a checkpoint ---------------------------------------------------------------------------------


def write_sparse_checkpoint(
    config: PreTrainedConfig, sparsity: SamoyedsConfig, directory: Path, device: torch.device
) -> int:
    """As ``samoyeds convert`` leaves it, a file a layer; returns the bytes of its tensors."""
    model = sparse_skeleton(config, sparsity)
    directory.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(_by_layer(model)):
        file = f"model-{number:05d}.safetensors"
        tensors = {}
        for name in names:
            tensors |= {key: tensor.cpu() for key, tensor in _random_tensors(model, name, device)}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    config.architectures = [type(model).__name__]
    config.dtype = DTYPE
    config.quantization_config = sparsity.to_dict()
    config.save_pretrained(directory)
    return total


def _by_layer(model: PreTrainedModel) -> list[list[str]]:
    """Names of the modules with parameters of their own: of each layer, and the rest."""
    layers: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            layer = re.match(r".*\.layers\.\d+", name)
            layers.setdefault(layer[0] if layer else "", []).append(name)
    return list(layers.values())


def _random_tensors(
    model: PreTrainedModel, name: str, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one module under their names in a checkpoint."""
    module = model.get_submodule(name)
    if isinstance(module, SparseModule):
        for weight, pattern in module.patterns.items():
            stored = random_stored(tuple(module.dense_shape(weight)), pattern, device)
            for suffix, tensor in zip(SUFFIXES, stored, strict=True):
                yield f"{name}.{weight}{suffix}", tensor
    else:
        for weight, parameter in module.named_parameters(recurse=False):
            yield f"{name}.{weight}", random_parameter(weight, parameter, device)
