"""The phases batch and load of scripts/bench/bench_model.py."""

from __future__ import annotations

import gc
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from random_models import write_sparse_checkpoint
from session import GROUPED, Session
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, StaticCache

from samoyeds_hf.experts import SparseModule
from samoyeds_hf.skeleton import meta_model

CONTEXT = 4096


def bench_batch(session: Session, model: PreTrainedModel) -> None:
    path = session.use_experts(model, GROUPED)
    most = session.args.most or free_bytes(session) // cache_bytes(session.config, 1)
    fits, fails = 0, int(most) + 1
    trial = max(1, int(most * 0.95))  # the rest is for activations
    while fails - fits > 1:
        if decodes(session, model, trial):
            fits = trial
        else:
            fails = trial
        trial = (fits + fails) // 2
    session.report(
        "batch", path, largest_batch=fits, cache_gb=cache_bytes(session.config, fits) / 1e9
    )


def cache_bytes(config: PreTrainedConfig, batch: int) -> int:
    """Keys and values of CONTEXT positions in all layers."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config)
    return per_token * 2 * CONTEXT * batch


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def decodes(session: Session, model: PreTrainedModel, batch: int) -> bool:
    """Whether the last position of so many sequences can be decoded."""
    config = session.config
    cache = StaticCache(config=config, max_cache_len=CONTEXT)
    try:
        cache.early_initialization(
            batch_size=batch,
            num_heads=config.num_key_value_heads,
            head_dim=head_dim(config),
            dtype=model.dtype,
            device=session.device,
        )
        for layer in cache.layers:
            layer.cumulative_length.fill_(CONTEXT - 1)
        logits = model(session.random_ids(batch, 1), past_key_values=cache, use_cache=True).logits
        session.synchronize()
        return logits.shape[0] == batch
    except RuntimeError as error:  # cuBLAS and others have errors of their own for it
        if not re.search("out of memory|ALLOC_FAILED", str(error)):
            raise
        return False
    finally:
        del cache
        collect()


def collect() -> None:
    """Give back what nobody uses; an exception's frames may lie in a cycle."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without CUDA


def free_bytes(session: Session) -> int:
    collect()
    return torch.cuda.mem_get_info(session.device)[0] if session.is_cuda else 0


# --- loading --------------------------------------------------------------------------------------


def bench_load(session: Session) -> None:
    """Write, load, pack again."""
    with tempfile.TemporaryDirectory(dir=session.args.temporary) as folder:
        directory = Path(folder) / "model"
        seconds = session.stopwatch()
        size = write_sparse_checkpoint(session.config, session.sparsity, directory, session.device)
        write_s = seconds()
        collect()
        if session.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = session.stopwatch()
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", device_map=str(session.device)
        )
        load_s = seconds()
    peak = torch.cuda.max_memory_allocated() if session.is_cuda else 0
    held = torch.cuda.memory_allocated() if session.is_cuda else 0
    pack_s = sum(repack_seconds(session, model))
    session.report(
        "load",
        "from_pretrained",
        load_s=load_s,
        pack_s=pack_s,
        write_s=write_s,
        checkpoint_gb=size / 1e9,
        gpu_gb=held / 1e9,
        peak_gpu_gb=peak / 1e9,
        parameters_b=dense_parameters(session) / 1e9,
    )


def repack_seconds(session: Session, model: PreTrainedModel) -> Iterator[float]:
    """Packing of each module of a loaded model, from canonical tensors on the GPU."""
    for module in model.modules():
        if isinstance(module, SparseModule):
            for name in module.patterns:
                module.store(name, module.stored(name))
            seconds = session.stopwatch()
            module.pack_()
            yield seconds()


def dense_parameters(session: Session) -> int:
    return sum(p.numel() for p in meta_model(session.config, torch.bfloat16).parameters())
