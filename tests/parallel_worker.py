"""One rank of tests/test_roundtrip.py's parallel tests; started by torch.distributed.run.

    parallel_worker.py MODE RESULT.json DIRECTORY...

Loads each directory split over the ranks and writes, for each: the logits' bits as a list, or the
error; and how many experts this rank held. In mode "packed", emulated kernels serve the CPU; then
also whether every module was packed, and whether its state is that of the checkpoint.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from typing import Any

import emulated_kernels
import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from tiny_models import PATTERN, tokens
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from samoyeds_hf import SamoyedsConfig, SamoyedsExperts
from samoyeds_hf.experts import SparseModule


def settings_for(mode: str, ranks: int) -> dict[str, Any]:
    if mode == "prune":
        return {**settings_for("expert", ranks), "quantization_config": SamoyedsConfig(PATTERN)}
    if mode == "packed":
        return settings_for("expert", ranks)
    if mode == "expert":
        known = inspect.signature(DistributedConfig).parameters  # grew with the releases
        parallel = {"ep_size": ranks} if "ep_size" in known else {"enable_expert_parallel": True}
        sizes = {"tp_size": ranks} if "tp_size" in known else {}
        return {"distributed_config": DistributedConfig(**sizes, **parallel)}
    if mode == "tensor":
        return {"distributed_config": DistributedConfig(tp_size=ranks)}
    return {"tp_plan": "auto"}


def look_inside(model: Any, directory: str) -> dict[str, bool]:
    saved = load_file(f"{directory}/model.safetensors")
    state = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
    split = [name for name, tensor in model.state_dict().items() if isinstance(tensor, DTensor)]
    modules = [module for module in model.modules() if isinstance(module, SparseModule)]
    experts = [module for module in modules if isinstance(module, SamoyedsExperts)]
    return {
        "packed": all(module.is_packed for module in modules),
        "split": sum(".experts." in name for name in split) == 6 * len(experts),
        "same state": all(torch.equal(state[name], saved[name]) for name in saved),
    }


def main(mode: str, result: str, *directories: str) -> None:
    torch.distributed.init_process_group("gloo")
    if mode == "packed":
        emulated_kernels.install(pytest.MonkeyPatch())
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = {}
    for directory in directories:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                directory, **settings_for(mode, ranks)
            ).eval()
            with torch.no_grad():
                logits = model(tokens(), use_cache=False).logits
            held = [m.num_experts for m in model.modules() if isinstance(m, SamoyedsExperts)]
            results[directory] = {"logits": logits.tolist(), "experts": held}
            if mode == "packed":
                results[directory] |= look_inside(model, directory)
        except Exception as error:
            results[directory] = {"error": f"{type(error).__name__}: {error}"}
    if (
        rank == ranks - 1
    ):  # not the first rank, which holds the experts that are easiest to get right
        with open(result, "w", encoding="utf-8") as file:
            json.dump(results, file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # NOTE: not through the interpreter's end. Threads of torch's that still run there abort the
    # process now and then ("terminate called without an active exception"), all work being done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
