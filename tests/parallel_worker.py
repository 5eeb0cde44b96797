"""One rank of tests/test_roundtrip.py's parallel tests; started by torch.distributed.run.

    parallel_worker.py MODE RESULT.json DIRECTORY...

Loads each directory split over the ranks and writes, for each: the logits' bits as a list, or the
error; and how many experts this rank held.
"""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

import torch
import torch.distributed
from tiny_models import PATTERN, tokens
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from samoyeds_hf import SamoyedsConfig, SamoyedsExperts


def settings_for(mode: str, ranks: int) -> dict[str, Any]:
    if mode == "prune":
        return {**settings_for("expert", ranks), "quantization_config": SamoyedsConfig(PATTERN)}
    if mode == "expert":
        known = inspect.signature(DistributedConfig).parameters  # grew with the releases
        parallel = {"ep_size": ranks} if "ep_size" in known else {"enable_expert_parallel": True}
        sizes = {"tp_size": ranks} if "tp_size" in known else {}
        return {"distributed_config": DistributedConfig(**sizes, **parallel)}
    if mode == "tensor":
        return {"distributed_config": DistributedConfig(tp_size=ranks)}
    return {"tp_plan": "auto"}


def main(mode: str, result: str, *directories: str) -> None:
    torch.distributed.init_process_group("gloo")
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
        except Exception as error:
            results[directory] = {"error": f"{type(error).__name__}: {error}"}
    if (
        rank == ranks - 1
    ):  # not the first rank, which holds the experts that are easiest to get right
        with open(result, "w", encoding="utf-8") as file:
            json.dump(results, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
