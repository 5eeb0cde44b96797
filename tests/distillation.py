"""Models to distill, and distillation in plain loops."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from plain_adam import PlainCautiousAdam
from tiny_models import MIXTRAL, PATTERN, tokens
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from samoyeds_hf import SamoyedsConfig, patch_model, unpatch_model
from samoyeds_hf.pruning.distill_settings import DistillSettings
from samoyeds_hf.pruning.masks import kept_masks
from samoyeds_hf.pruning.training import pick, schedule

TEXT = tokens(batch=10, length=12)
FAST = DistillSettings(steps=6, batch_size=4, learning_rate=1e-3, train="experts")
BOTH = SamoyedsConfig(PATTERN, modules=("experts", "shared_experts"))


def pruned(
    dense: PreTrainedModel, config: SamoyedsConfig = BOTH
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A pruned copy of dense modules, and its masks as stored."""
    student = copy.deepcopy(dense)
    patch_model(student, config=config)
    masks = kept_masks(student)
    unpatch_model(student)
    return student, masks


def mixtral() -> tuple[PreTrainedModel, PreTrainedModel, dict[str, torch.Tensor]]:
    """Student, teacher, masks."""
    dense = MIXTRAL.make()
    return pruned(dense)[0], dense, pruned(dense)[1]


def assert_held(student: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    for name, mask in masks.items():
        weight = student.get_parameter(name)
        assert not weight[~mask].count_nonzero(), name
        assert weight[mask].count_nonzero() == mask.sum(), name


def loop_distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    masks: Mapping[str, torch.Tensor],
    settings: DistillSettings,
    text: torch.Tensor = TEXT,
    start: int = 0,
    stop: int | None = None,
) -> list[float]:
    """The same with dense masters, a mask on each gradient and step, and torch's own loss."""
    student.requires_grad_(False)
    everything = dict(student.named_parameters())
    names = everything if settings.train == "all" else masks
    weights = {name: everything[name].requires_grad_() for name in names}
    widest = max(w.shape[-1] for w in weights.values())
    scales = {
        name: (1.0 if name in masks else 0.1) * 1024 / (w.shape[-1] if w.ndim > 1 else widest)
        for name, w in weights.items()
    }
    optimizer = PlainCautiousAdam(weights, masks)
    losses = []
    for step in range(start, stop or settings.steps):
        ids = text[pick(step, settings.batch_size, len(text), settings.seed)]
        with torch.no_grad():
            dense = teacher(ids, use_cache=False, output_hidden_states=True)
        sparse = student(ids, use_cache=False, output_hidden_states=True)
        log_q, log_p = (out.logits.log_softmax(-1).flatten(0, 1) for out in (sparse, dense))
        loss = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        errors = [
            ((q - p).square().sum(-1) / p.square().sum(-1)).mean()
            for q, p in list(zip(sparse.hidden_states, dense.hidden_states, strict=True))[1:]
        ]
        (loss + settings.hidden_weight * sum(errors) / 2).backward()  # two layers
        for name in masks:
            weights[name].grad *= masks[name]
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        factor = schedule(step - start, settings.steps - start, settings.warmup)
        rate = settings.learning_rate * factor
        optimizer.step({name: rate * scale for name, scale in scales.items()})
        losses.append(float(loss.detach()))
    return losses


def loop_divergence(student: nn.Module, teacher: nn.Module, ids: torch.Tensor) -> float:
    """KL of the teacher to the student, a mean over positions."""
    with torch.no_grad():
        log_q, log_p = (m(ids).logits.log_softmax(-1).flatten(0, 1) for m in (student, teacher))
    return float(functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True))
