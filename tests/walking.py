"""Models pruned in memory, and what their experts are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from tiny_models import (
    MIXTRAL,
    PATTERN,
    Family,
    logits,
    tokens,
)
from torch import nn
from transformers import PreTrainedModel

from samoyeds_hf import SamoyedsConfig
from samoyeds_hf.pruning.layer import PrunedWeight, PruneSettings
from samoyeds_hf.pruning.walk import LayerResult, prune_model
from samoyeds_hf.selection import select

CPU = torch.device("cpu")
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens [T, H], experts and weights [T, K]
IDS = tokens(6, 9)
SMALL = {"num_local_experts": 3, "intermediate_size": 64, "hidden_size": 32, "head_dim": 8}
SMALL_MIXTRAL = Family("small", "Mixtral", {**MIXTRAL.settings, **SMALL})


def prune(
    model: PreTrainedModel,
    method: str = "wanda",
    ids: torch.Tensor = IDS,
    config: dict[str, Any] | None = None,
    on_layer: Callable[[LayerResult], None] | None = None,
    **settings: Any,
) -> list[PrunedWeight]:
    """Prune a model in place."""
    chosen = SamoyedsConfig(**{"pattern": PATTERN, "strict": False, **(config or {})})
    targets = select(model, chosen).targets
    return prune_model(model, targets, ids, PruneSettings(method, **settings), on_layer=on_layer)


@torch.no_grad()
def inputs_of_experts(model: PreTrainedModel, name: str, ids: torch.Tensor) -> list[Batch]:
    """What the model's own forward gives an experts module."""
    seen: list[Batch] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden, index, weights = (*args, *kwargs.values())
        seen.append((hidden.reshape(-1, hidden.shape[-1]), index, weights))

    handle = model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
    logits(model, ids)
    handle.remove()
    return seen


def experts_in(model: PreTrainedModel) -> Iterator[str]:
    """Fused experts modules, in the order of the layers."""
    for name, module in model.named_modules():
        if name.endswith("experts") and hasattr(module, "gate_up_proj"):
            yield name


def loop_moments(
    batches: list[Batch],
    experts: int,
    inner: Callable[[int, torch.Tensor], torch.Tensor] = lambda expert, x: x,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of ``g^2 x x^T`` and tokens of each expert, one token and choice at a time, in fp64."""
    sums, count = [], torch.zeros(experts, dtype=torch.int64)
    for expert in range(experts):
        found = None
        for hidden, index, weights in batches:
            for token in range(hidden.shape[0]):
                for choice in range(index.shape[1]):
                    x = inner(expert, hidden[token]).double()
                    found = torch.zeros(len(x), len(x)).double() if found is None else found
                    if index[token, choice] == expert:
                        found += weights[token, choice].double() ** 2 * torch.outer(x, x)
                        count[expert] += 1
        sums.append(found)
    return torch.stack([found for found in sums if found is not None]), count
