"""Distillation: a pruned model learns the logits of its dense original, its masks held.

KL divergence to the teacher on every position of every sequence (Hinton et al. 2015, arXiv
1503.02531); cautious Adam on fp32 masters of the surviving weights, linear warmup, then linear to
zero. Each model computes in its own dtype: load both in bf16 for a GPU, in fp32 for a CPU.

Bytes a weight, in bf16 with a share d kept: 2 for the teacher, 2 for the student and 20 d for what
is trained (see :mod:`samoyeds_hf.pruning.masters`), so 9 at d = 1/4; what is frozen takes 4, what
is trained whole (``train="all"``) 20. On top come the dense gradient of one weight, and for
``micro_batch_size`` sequences the activations, the hidden states after each layer twice and the
logits three times. Host memory: 4 d for the weights as they were, should they be better.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import samoyeds_hf
from samoyeds_hf.errors import CalibrationError
from samoyeds_hf.pruning.distill_settings import DistillReport, DistillSettings, is_better
from samoyeds_hf.pruning.losses import divergence, hidden_error
from samoyeds_hf.pruning.masters import OPTIMIZER, Masters, make_optimizer
from samoyeds_hf.pruning.rate import CHECKS, Rate
from samoyeds_hf.pruning.recorded import Passes, RecordedPasses, check_recordable
from samoyeds_hf.pruning.training import Log, check_tokens, digest, load_state, pick, save_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_NORM = 1.0  # of a step's gradient


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokens: torch.Tensor,  # [N, S] int64
    masks: Mapping[str, torch.Tensor],  # bool, of the shapes of the student's weights of that name
    settings: DistillSettings | None = None,
    *,
    state: Path | None = None,
    log: Log | None = None,
    save_minutes: float = 5.0,
    progress: bool = False,
    cuda_graph: bool = False,
) -> DistillReport:
    """Train a pruned model in place towards its dense original.

    Both run in eval mode, without dropout. Epochs over the sequences are in fresh random order.
    Where after a quarter, or half, of them the student is much further from the teacher than it was
    on the sequences held back, the learning rate is too high: the pruned weights come back, and the
    steps that are left have a lower one, with a schedule of their own; so a few times, unless the
    settings say otherwise.
    Afterwards the student holds the masters, rounded to its dtype, or what it held before where
    that is nearer to the teacher on the sequences held back; outside the masks it is 0.

    Args:
        student: dense modules with pruned weights, bf16 or fp32.
        teacher: the dense model; it is not changed.
        tokens: sequences without padding.
        masks: of the weights that stay pruned, by full name.
        settings: how; None is the default.
        state: file from which an interrupted run goes on and in which it is kept. On a CPU a run
            that goes on gives the same bits as one that was not interrupted.
        log: is told of each step: step, loss (KL a position), hidden_error, learning_rate,
            gradient_norm, seconds.
        save_minutes: between two states.
        progress: show a progress bar on stderr.
        cuda_graph: record the passes of a step and launch them together, see
            :mod:`samoyeds_hf.pruning.recorded`; both models on one GPU. For small models, which
            would leave the GPU idle.

    Raises:
        CalibrationError: tokens, masks or models that do not go together, a loss that is not
            finite, or passes that cannot be recorded.
        ConfigError: cuda_graph with steps of several micro-batches.
        CheckpointError: a state of another run, or one that cannot be read or written.
    """
    settings = settings or DistillSettings()
    check_tokens(tokens, student.config.get_text_config().vocab_size)
    modes = [(model, model.training) for model in (student, teacher)]
    try:
        for model, _ in modes:
            model.eval()
        run = _Run(student, teacher, tokens, masks, settings, cuda_graph)
        run.train(state, log, save_minutes, progress)
    finally:
        for model, mode in modes:
            model.train(mode)
    tenth = max(1, settings.steps // 10)
    first, last = (sum(part) / tenth for part in (run.losses[:tenth], run.losses[-tenth:]))
    return DistillReport(
        steps=settings.steps,
        first=first,
        last=last,
        seconds=run.seconds,
        asked_rate=settings.learning_rate,
        learning_rate=run.rate.peak,
        before=run.before,
        after=run.after,
        trials=tuple(run.rate.trials),
    )


class _Run:
    """One distillation: models, masters, optimizer, and the losses of the steps done."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        tokens: torch.Tensor,
        masks: Mapping[str, torch.Tensor],
        settings: DistillSettings,
        cuda_graph: bool = False,
    ) -> None:
        if cuda_graph:
            devices = [p.device for model in (student, teacher) for p in model.parameters()]
            check_recordable(devices, settings)
        self.student, self.teacher, self.tokens = student, teacher, tokens
        self.settings = settings
        self.held = settings.num_held_back(len(tokens))
        self.before: float | None = None
        self.after: float | None = None
        weights = {
            name: weight
            for name, weight in student.named_parameters()
            if name in masks or (settings.train == "all" and weight.is_floating_point())
        }
        if unknown := sorted(set(masks) - set(weights)):
            raise CalibrationError(
                f"Every mask must be of a weight of the student, found one of {unknown[0]}; take "
                "the names of the dense model's parameters."
            )
        if not weights:
            raise CalibrationError(
                "Distillation needs weights to train, found no mask; pass masks."
            )
        self.masters = Masters(weights, masks)
        self.passes: Passes = self._passes
        if cuda_graph:
            self.passes = RecordedPasses(self._passes, self.masters, student.device)
        self.optimizer = make_optimizer(self.masters)
        self.losses: list[float] = []
        self.rate = Rate(settings)
        self.seconds = 0.0

    def train(
        self, state: Path | None, log: Log | None, save_minutes: float, progress: bool
    ) -> None:
        """Do the steps that are left; the better of before and after stays in the student."""
        fingerprint = {} if state is None else self._fingerprint()
        self.before = self._measure()
        untrained = {
            name: master.detach().to("cpu", copy=True)
            for name, master in self.masters.values.items()
        }
        if state is not None:
            self._load(load_state(state, fingerprint, self._content()))
        steps, saved = self.settings.steps, time.monotonic()
        with (
            self.masters.attached(self.student),
            tqdm(
                total=steps, initial=len(self.losses), desc="distilling", disable=not progress
            ) as bar,
        ):
            while len(self.losses) < steps:
                row = self._step()
                if log is not None:
                    log(row)
                bar.set_postfix_str(f"KL {row['loss']:.4f}", refresh=False)
                bar.update()
                if self._did_harm():
                    self._start_again(untrained)
                is_due = time.monotonic() - saved >= 60 * save_minutes
                if state is not None and (is_due or len(self.losses) == steps):
                    save_state(state, {"fingerprint": fingerprint, **self._content()})
                    saved = time.monotonic()
        self.after = self._measure()
        if not is_better(self.before, self.after):
            self.masters.load(untrained)

    def _did_harm(self) -> bool:
        """Whether a check is due and says that the learning rate is too high; so does NaN."""
        times = self.rate.limit(len(self.losses))
        kl = None if times is None else self._measure()
        if times is None or kl is None or self.before is None:
            return False
        self.rate.trials.append(kl)
        return not kl < times * self.before

    def _start_again(self, untrained: Mapping[str, torch.Tensor]) -> None:
        """Go on from the pruned weights with a lower learning rate."""
        self.masters.load(untrained)
        self.optimizer = make_optimizer(self.masters)
        self.rate.starts.append(len(self.losses))

    @torch.no_grad()
    def _measure(self) -> float | None:
        """KL a position on the sequences held back; None if there are none."""
        held = self.tokens[len(self.tokens) - self.held :]
        if not len(held):
            return None
        total = 0.0
        for part in held.split(self.settings.micro_batch_size or self.settings.batch_size):
            pruned, dense = (
                model(input_ids=part.to(model.device), use_cache=False).logits
                for model in (self.student, self.teacher)
            )
            target = dense.to(pruned.device)
            total += float(divergence(pruned, target, self.settings.temperature))
        return total / held.numel()

    def _step(self) -> dict[str, float]:
        settings, number, start = self.settings, len(self.losses), time.monotonic()
        rate = self.rate.of(number)
        count = len(self.tokens) - self.held
        rows = pick(number, settings.batch_size, count, settings.seed)
        parts = rows.split(settings.micro_batch_size or settings.batch_size)
        losses = [self.passes(self.tokens[part]) for part in parts]
        loss, hidden = torch.stack(losses).sum(dim=0).tolist()
        norm = self.masters.step(self.optimizer, rate, _MAX_NORM)
        if not math.isfinite(loss + hidden + norm):
            raise CalibrationError(
                f"The loss of distillation must be finite, found {loss} with a gradient of {norm} "
                f"in step {number}; lower the learning rate."
            )
        self.losses.append(loss)
        self.seconds += time.monotonic() - start
        return {
            "step": number,
            "loss": loss,
            "hidden_error": hidden,
            "learning_rate": rate,
            "gradient_norm": norm,
            "seconds": self.seconds,
        }

    def _passes(self, tokens: torch.Tensor) -> torch.Tensor:
        """Add the gradients of some sequences ``[B, S]``; their part of the step's losses ``[2]``.

        NOTE: nothing here may wait for the GPU, see :class:`RecordedPasses`.
        """
        positions = self.settings.batch_size * tokens.shape[1]
        weight = self.settings.hidden_weight
        with torch.no_grad():
            dense = self._outputs(self.teacher, tokens)
        pruned = self._outputs(self.student, tokens)
        logits = pruned.logits  # [B, S, vocabulary]
        target = dense.logits.to(logits.device)
        loss = divergence(logits, target, self.settings.temperature) / positions
        hidden = torch.zeros_like(loss)
        if weight:  # the first is the embedding
            hidden = hidden_error(pruned.hidden_states[1:], dense.hidden_states[1:]) / positions
        (loss + weight * hidden).backward()
        return torch.stack([loss.detach(), hidden.detach()])

    def _outputs(self, model: PreTrainedModel, tokens: torch.Tensor) -> Any:
        has_states = self.settings.hidden_weight > 0
        outputs = model(
            input_ids=tokens.to(model.device), use_cache=False, output_hidden_states=has_states
        )
        if has_states and not getattr(outputs, "hidden_states", None):
            raise CalibrationError(
                "hidden_weight needs a model that gives its hidden states, found none from "
                f"{type(model).__name__}; set it to 0."
            )
        return outputs

    def _fingerprint(self) -> dict[str, Any]:
        """What the result depends on."""
        return {
            "settings": asdict(self.settings),
            "optimizer": OPTIMIZER,
            "checks of the learning rate": CHECKS,
            "tokens": digest({"tokens": self.tokens}),
            "student": digest(dict(self.student.named_parameters())),
            "masks": self.masters.digest_places(),
            "teacher": digest(dict(self.teacher.named_parameters())),
            "version of samoyeds-hf": samoyeds_hf.__version__,
        }

    def _content(self) -> dict[str, Any]:
        """What a run goes on from."""
        return {
            "masters": {name: master.detach() for name, master in self.masters.values.items()},
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "starts": self.rate.starts,
            "trials": self.rate.trials,
            "seconds": self.seconds,
        }

    def _load(self, content: Mapping[str, Any] | None) -> None:
        if content is not None:
            self.masters.load(content["masters"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.losses = list(content["losses"])
            self.rate.starts, self.rate.trials = list(content["starts"]), list(content["trials"])
            self.seconds = float(content["seconds"])
