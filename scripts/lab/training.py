"""Trains a model of the laboratory, or takes the one that was trained before.

Forward and backward run in bf16 on a GPU, with fp32 master weights; the router is balanced layer by
layer. Validation chooses the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lab.corpus import Corpus
from lab.folder import made_once
from lab.measure import perplexity
from lab.shape import Shape
from torch import nn
from train_tiny_moe import add_dropout, learning_rate, make_optimizer
from transformers import AutoModelForCausalLM, PreTrainedModel

NUM_EVALS = 20  # looks at the validation split, spread evenly over the run
BALANCE = 0.01  # weight of the router's balance loss
_RECORD = "trained.json"


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained; the schedule ends with the steps or the minutes, what is first."""

    steps: int
    minutes: float
    batch: int  # windows of the model's context
    lr: float
    weight_decay: float
    dropout: float
    validation_tokens: int
    seed: int


@dataclass(frozen=True)
class Trained:
    """A model in eval mode, and what is known of its training."""

    model: PreTrainedModel
    folder: Path
    steps: int
    tokens: int  # until the checkpoint that validation chose
    epochs: float
    validation: float
    minutes: float
    parameters: int
    sha256: str  # of the weights

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_or_train(
    shape: Shape, corpus: Corpus, settings: TrainSettings, work: Path, device: torch.device
) -> Trained:
    """The model that ``work`` holds for these settings, trained now if there is none."""
    # a GPU computes in bf16, and so does what it trained
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    recipe = {**asdict(shape), **asdict(settings), "text": corpus.fingerprint, "dtype": str(dtype)}
    text = json.dumps(recipe, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = work / f"{shape.family}-{settings.seed}-{name}"
    if not folder.exists():
        _train_into(folder, shape, corpus, settings, dtype, device)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    record = json.loads((folder / _RECORD).read_text())
    return Trained(model=model, folder=folder, **record)


def _train_into(
    folder: Path,
    shape: Shape,
    corpus: Corpus,
    settings: TrainSettings,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    torch.manual_seed(settings.seed)
    config = shape.config(corpus.tokenizer)
    master = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).train()
    if settings.dropout:
        add_dropout(model, settings.dropout)
    print(f"{shape.family}: {shape}; {model.num_parameters():,} parameters", flush=True)
    run = _Run(master, model, corpus, settings, shape.context)
    record = run.train()
    record["parameters"] = model.num_parameters()
    record["sha256"] = _digest(model)
    with made_once(folder) as partial:
        model.save_pretrained(partial)
        corpus.tokenizer.save_pretrained(partial)
        (partial / _RECORD).write_text(json.dumps(record, indent=1))


class _Run:
    """One training run. ``model`` computes, ``master`` holds the weights that are optimised."""

    def __init__(
        self,
        master: PreTrainedModel,
        model: PreTrainedModel,
        corpus: Corpus,
        settings: TrainSettings,
        context: int,
    ) -> None:
        self.master, self.model, self.settings = master, model, settings
        self.corpus, self.context = corpus, context
        self.optimizer = make_optimizer(master, settings)  # reads lr and weight_decay
        self.masters, self.weights = list(master.parameters()), list(model.parameters())
        for parameter in self.masters:
            parameter.grad = torch.zeros_like(parameter)
        self._write()
        count = max(1, settings.validation_tokens // context)
        self.validation = corpus.windows("validation", count, context).to(model.device)
        self.best, self.best_step = math.inf, 0
        self.best_weights: list[torch.Tensor] = []

    def train(self) -> dict[str, Any]:
        """Train; leaves the best validated weights in ``model``. Returns what a record holds."""
        settings, start, looks = self.settings, time.monotonic(), 0
        step_tokens = settings.batch * self.context
        for step, ids in enumerate(self._batches(), 1):
            seconds = time.monotonic() - start
            progress = min(1.0, max(step / settings.steps, seconds / 60 / settings.minutes))
            loss = self._step(ids, settings.lr * learning_rate(progress))
            if progress * NUM_EVALS >= looks + 1 or progress == 1:
                looks = int(progress * NUM_EVALS)
                value = self._look(step)
                seconds = time.monotonic() - start
                print(
                    f"step {step:6d}  {seconds:5.0f} s  {step * step_tokens / seconds:9,.0f} "
                    f"tokens/s  loss {loss.item():.3f}  validation {value:.2f}",
                    flush=True,
                )
            if progress == 1:
                break
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.best_weights)
        tokens = self.best_step * step_tokens
        return {
            "steps": step,
            "tokens": tokens,
            "epochs": tokens / len(self.corpus.streams["train"]),
            "validation": self.best,
            "minutes": (time.monotonic() - start) / 60,
        }

    def _step(self, ids: torch.Tensor, rate: float) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(self.model, ids)
        loss.backward()
        grads = [weight.grad for weight in self.weights]
        torch._foreach_copy_([parameter.grad for parameter in self.masters], grads)
        self.model.zero_grad(set_to_none=True)
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self._write()
        return loss.detach()

    @torch.no_grad()
    def _write(self) -> None:
        torch._foreach_copy_(self.weights, self.masters)

    def _look(self, step: int) -> float:
        value = perplexity(self.model, self.validation)
        if value < self.best or not self.best_weights:
            self.best, self.best_step = value, step
            self.best_weights = [weight.detach().clone() for weight in self.weights]
        return value

    def _batches(self) -> Iterator[torch.Tensor]:
        """``[batch, context]`` on the device, without end; an epoch's last batch may be short."""
        for windows in self.corpus.epochs(self.context, self.settings.seed):
            yield from windows.to(self.model.device).split(self.settings.batch)


def loss_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of ``ids`` [B, S] in fp32, and the balance of the router.

    Not the model's own ``labels=``: its balance loss waits for the GPU, and counts the experts of
    all layers together.
    """
    output = model.model(input_ids=ids, use_cache=False, output_router_logits=True)
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    logits = model.lm_head(output.last_hidden_state).flatten(0, 1).float()
    balance = balance_loss(torch.stack(output.router_logits), model.config.num_experts_per_tok)
    return F.cross_entropy(logits, targets.flatten()) + BALANCE * balance


def balance_loss(
    logits: torch.Tensor,  # [L, T, E]
    top_k: int,
) -> torch.Tensor:
    """Mean over layers of ``E * sum_e share_e * probability_e``: k if balanced.

    Switch Transformer (Fedus et al. 2021, equations 4 to 6), for top-k.
    """
    probabilities = logits.float().softmax(dim=-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    taken = torch.zeros_like(probabilities).scatter_(-1, chosen, 1.0)
    return logits.shape[-1] * (taken.mean(dim=1) * probabilities.mean(dim=1)).sum(dim=-1).mean()


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
