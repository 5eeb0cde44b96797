"""Distillation: against plain loops, masks held, killed and resumed, refused with a sentence."""

from __future__ import annotations

import copy
import math
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from helpers import random_mask
from plain_adam import PlainCautiousAdam
from tiny_models import (
    BY_NAME,
    MIXTRAL,
    PATTERN,
    VOCAB,
    Family,
    make_toy,
    masked_twin,
    same_state,
    tokens,
)
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from samoyeds_hf import SamoyedsConfig, SparsityPattern, encode, patch_model, unpatch_model
from samoyeds_hf.errors import CalibrationError, CheckpointError, ConfigError
from samoyeds_hf.pruning import losses as losses_module
from samoyeds_hf.pruning import masters as masters_module
from samoyeds_hf.pruning import training as training_module
from samoyeds_hf.pruning.distill import distill
from samoyeds_hf.pruning.distill_settings import DistillReport, DistillSettings
from samoyeds_hf.pruning.losses import divergence
from samoyeds_hf.pruning.masks import kept_mask, kept_masks
from samoyeds_hf.pruning.masters import UNPRUNED, WIDTH, Masters, make_optimizer
from samoyeds_hf.pruning.training import CsvLog, pick, schedule

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


# --- masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1:2:8", "4:8:16", "3:4:8", "2:4"])
@pytest.mark.parametrize("shape", [(3, 16, 32), (16, 32)], ids=["experts", "matrix"])
def test_masks_are_those_that_were_encoded(text: str, shape: tuple[int, ...]) -> None:
    """Also where kept values are 0, of which half are here."""
    pattern, rng = SparsityPattern.parse(text), torch.Generator().manual_seed(0)
    mask = random_mask(shape, pattern, rng)
    weight = torch.randn(shape, generator=rng).relu()
    assert (weight[mask] == 0).any()
    assert torch.equal(kept_mask(encode(weight, mask, pattern), pattern), mask)


def test_masks_of_a_model_have_the_names_of_dense_weights() -> None:
    dense = BY_NAME["qwen2_moe"].make()
    student, masks = pruned(dense)
    shared = "model.layers.0.mlp.shared_expert.down_proj.weight"
    assert {"model.layers.1.mlp.experts.gate_up_proj", shared} <= set(masks)
    for name, mask in masks.items():
        expected = torch.where(mask, dense.get_parameter(name), 0)
        assert torch.equal(student.get_parameter(name), expected)


# --- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])  # a position, some, all
def test_divergence_and_its_gradient(
    monkeypatch: pytest.MonkeyPatch, temperature: float, chunk: int
) -> None:
    monkeypatch.setattr(losses_module, "_CHUNK", chunk)
    torch.manual_seed(0)
    student = (3 * torch.randn(2, 5, 17)).requires_grad_()
    teacher = 3 * torch.randn(2, 5, 17)
    (3 * divergence(student, teacher, temperature)).backward()
    twin = student.detach().double().requires_grad_()
    log_q, log_p = ((logits / temperature).log_softmax(-1) for logits in (twin, teacher.double()))
    expected = functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    (3 * temperature**2 * expected).backward()
    found = divergence(student, teacher, temperature)
    torch.testing.assert_close(found, (expected * temperature**2).float())
    torch.testing.assert_close(student.grad, twin.grad.float(), atol=1e-5, rtol=1e-4)


def test_divergence_of_equal_logits_is_zero() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    loss = divergence(logits, logits)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.count_nonzero()


# --- schedule, order, log -----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 300])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.9])
def test_schedule_rises_and_falls(steps: int, warmup: float) -> None:
    rates = [schedule(step, steps, warmup) for step in range(steps)]
    top = rates.index(max(rates))
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    middles = [(step + 0.5) / steps for step in range(steps)]
    falling = [(1 - middle) / (1 - warmup) for middle in middles]  # to zero at the end
    rising = [middle / warmup if warmup else 1.0 for middle in middles]
    assert rates == pytest.approx([min(pair) for pair in zip(rising, falling, strict=True)])
    if steps == 300:
        assert max(rates) > 0.99
        assert abs(top / steps - warmup) < 0.01


def test_every_epoch_takes_each_row_once() -> None:
    taken = torch.cat([pick(step, 4, 10, seed=3) for step in range(5)]).view(2, 10)
    assert taken.sort(dim=1).values.tolist() == [list(range(10))] * 2
    assert taken[0].tolist() != taken[1].tolist()
    assert pick(0, 10, 10, seed=4).tolist() != taken[0].tolist()
    assert pick(1, 25, 10, seed=3).shape == (25,)  # a batch of more than two epochs


def test_a_log_goes_on_before_the_step_that_comes_again(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "log.csv")
    for step in range(4):
        log({"step": step, "loss": 1 / (step + 1)})
    CsvLog(tmp_path / "log.csv")({"step": 2, "loss": 0.5})
    expected = "step,loss\n0,1\n1,0.5\n2,0.5\n"
    assert (tmp_path / "log.csv").read_text() == expected
    CsvLog(tmp_path / "log.csv")({"step": 0, "loss": 2.0})
    assert (tmp_path / "log.csv").read_text() == "step,loss\n0,2\n"


# --- masters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 1 << 28])
def test_masters_take_the_gradients_of_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(masters_module, "_CHUNK", chunk)
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    mask = torch.rand(8, 16) < 0.5
    masters = Masters({"weight": layer.weight}, {"weight": mask})
    assert_held(layer, {"weight": mask})
    twin = copy.deepcopy(layer)
    layer.bias.requires_grad_(False)
    layer.weight.requires_grad_(False)
    with torch.no_grad(), masters.attached(layer):
        for _ in range(2):  # two parts of a batch
            layer(torch.ones(3, 16)).square().sum().backward()
            twin(torch.ones(3, 16)).square().sum().backward()
    torch.testing.assert_close(masters.values["weight"].grad, twin.weight.grad[mask])
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    assert not layer.weight.requires_grad


def test_masters_keep_what_bf16_would_lose() -> None:
    weight = nn.Parameter(torch.ones(1, 8, dtype=torch.bfloat16))
    mask = torch.arange(8).view(1, 8) % 2 == 0
    layer = nn.ParameterDict({"weight": weight})
    masters = Masters({"weight": weight}, {"weight": mask})
    optimizer = make_optimizer(masters)
    with masters.attached(layer):
        for _ in range(100):
            weight.float().sum().backward()
            # A step of 1e-4 at 8 inputs is below half a unit of bf16 at 1.
            masters.step(optimizer, 1e-4 * 8 / WIDTH, max_norm=10.0)
    torch.testing.assert_close(masters.values["weight"], torch.full((4,), 0.99))
    assert weight.tolist() == [[0.98828125, 0.0] * 4]  # the nearest in bf16


def test_wider_and_unpruned_weights_take_smaller_steps() -> None:
    weights = {str(width): nn.Parameter(torch.ones(4, width)) for width in (8, 32)}
    weights |= {"bias": nn.Parameter(torch.ones(4)), "whole": nn.Parameter(torch.ones(4, 8))}
    masks = {name: torch.ones(4, int(name), dtype=torch.bool) for name in ("8", "32")}
    masters = Masters(weights, masks)
    optimizer = make_optimizer(masters)
    with masters.attached(nn.ParameterDict(weights)):
        sum(weight.sum() for weight in weights.values()).backward()
        norm = masters.step(optimizer, 1e-3, max_norm=1.0)
    assert norm == pytest.approx(math.sqrt(4 * 8 + 4 * 32 + 4 + 4 * 8))
    steps = {name: float(1 - weight.detach().mean()) for name, weight in weights.items()}
    narrow, wide = 1e-3 * WIDTH / 8, 1e-3 * WIDTH / 32
    expected = {"8": narrow, "32": wide, "bias": wide * UNPRUNED, "whole": narrow * UNPRUNED}
    assert steps == pytest.approx(expected, rel=1e-3)


# --- distillation -------------------------------------------------------------------------------


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


@pytest.mark.parametrize("train", ["experts", "all"])
@pytest.mark.parametrize(("micro_batch_size", "hidden_weight"), [(None, 0.0), (3, 0.0), (3, 2.0)])
def test_distill_is_the_plain_loop(
    micro_batch_size: int | None, hidden_weight: float, train: str
) -> None:
    student, teacher, masks = mixtral()
    twin = copy.deepcopy(student)
    rows: list[Mapping[str, float]] = []
    settings = DistillSettings(
        steps=5,
        batch_size=4,
        learning_rate=3e-4,
        micro_batch_size=micro_batch_size,
        hidden_weight=hidden_weight,
        held_back=0.0,
        train=train,
    )
    report = distill(student, teacher, TEXT, masks, settings, log=rows.append)
    assert (report.before, report.after, report.kept) == (None, None, True)
    losses = loop_distill(twin, teacher, masks, settings)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-4)
    assert (report.first, report.last) == pytest.approx((losses[0], losses[-1]), rel=1e-4)
    assert [row["step"] for row in rows] == list(range(5))
    for name in masks:
        found, expected = student.get_parameter(name), twin.get_parameter(name)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("train", ["experts", "all"])
def test_families(name: str, dtype: torch.dtype, train: str) -> None:
    """The loss falls, the masks hold, and nothing else moves: not the teacher, not a flag."""
    teacher = BY_NAME[name].make(dtype)
    student, masks = pruned(teacher)
    before, original = copy.deepcopy(student), copy.deepcopy(teacher)
    student.train()
    flags = {n: p.requires_grad for n, p in student.named_parameters()}
    # hidden states of a model that was never trained say little about its logits
    settings = DistillSettings(
        steps=12,
        batch_size=10,
        learning_rate=1e-3,
        hidden_weight=1,
        held_back=0.0,
        train=train,
    )
    report = distill(student, teacher, TEXT, masks, settings)
    assert report.last < 0.8 * report.first
    assert_held(student, masks)
    assert same_state(teacher, original)
    assert student.training
    assert not teacher.training
    assert flags == {n: p.requires_grad for n, p in student.named_parameters()}
    assert all(p.grad is None for model in (student, teacher) for p in model.parameters())
    for n, parameter in student.named_parameters():
        assert parameter.dtype == before.get_parameter(n).dtype
        if train == "experts" or n in masks:
            assert torch.equal(parameter, before.get_parameter(n)) == (n not in masks), n
    if train == "all":
        assert not torch.equal(student.lm_head.weight, before.lm_head.weight)


def loop_divergence(student: nn.Module, teacher: nn.Module, ids: torch.Tensor) -> float:
    """KL of the teacher to the student, a mean over positions."""
    with torch.no_grad():
        log_q, log_p = (m(ids).logits.log_softmax(-1).flatten(0, 1) for m in (student, teacher))
    return float(functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True))


@pytest.mark.parametrize(("share", "held"), [(0.01, 1), (0.3, 3), (0.99, 9)])
def test_sequences_held_back_only_measure(share: float, held: int) -> None:
    """One at least; and one at least to train on."""
    student, teacher, masks = mixtral()
    before, twin = copy.deepcopy(student), copy.deepcopy(student)
    settings = DistillSettings(steps=8, batch_size=4, learning_rate=3e-4, held_back=share)
    report = distill(student, teacher, TEXT, masks, settings)
    rest, held_text = TEXT[: len(TEXT) - held], TEXT[len(TEXT) - held :]
    distill(twin, teacher, rest, masks, replace(settings, held_back=0.0))
    assert report.before == pytest.approx(loop_divergence(before, teacher, held_text), rel=1e-4)
    assert report.after == pytest.approx(loop_divergence(twin, teacher, held_text), rel=1e-4)
    assert report.kept == (report.after < report.before)
    assert same_state(student, twin if report.kept else before)
    meanwhile = ", ".join(f"{kl:.4f}" for kl in report.trials)
    assert len(report.trials) == 2
    said = f"{report.before:.4f} before, {meanwhile} meanwhile, {report.after:.4f} after"
    assert f"on sequences held back {said}" in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("train", ["experts", "all"])
def test_a_rate_that_is_too_high_leaves_the_pruned_weights(train: str, dtype: torch.dtype) -> None:
    teacher = MIXTRAL.make(dtype)
    student, masks = pruned(teacher)
    before = copy.deepcopy(student)
    settings = DistillSettings(
        steps=4, batch_size=4, learning_rate=0.5, train=train, backtrack=False
    )
    report = distill(student, teacher, TEXT, masks, settings)
    assert not report.kept
    assert report.learning_rate == 0.5
    assert report.before < report.after
    assert "lower learning rate" in str(report)
    assert same_state(student, before)


# the last rate of the second is checked once: a quarter and half of three steps are one
@pytest.mark.parametrize(("rate", "starts"), [(5e-2, [0, 2, 5]), (0.2, [0, 2, 3, 6])])
def test_a_rate_that_is_too_high_is_lowered(rate: float, starts: list[int]) -> None:
    """Each time from the pruned weights, with a new optimizer and the sequences that come next."""
    student, teacher, masks = mixtral()
    before = copy.deepcopy(student)
    settings = DistillSettings(
        steps=9,
        batch_size=4,
        learning_rate=rate,
        hidden_weight=10.0,
        held_back=0.2,
        train="experts",
    )
    rows: list[Mapping[str, float]] = []
    report = distill(student, teacher, TEXT, masks, settings, log=rows.append)
    text, held_text, stops = TEXT[:8], TEXT[8:], [*starts[1:], None]
    nearness, losses, trials = loop_divergence(before, teacher, held_text), [], []
    for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        lower = replace(settings, learning_rate=rate / 4**number)
        rest = settings.steps - start
        checks = {start + max(1, rest // 4): 1.5, start + max(1, rest // 2): 1.25}
        for end, times in checks.items():
            trial = copy.deepcopy(before)
            loop_distill(trial, teacher, masks, lower, text, start, end)
            trials.append(loop_divergence(trial, teacher, held_text))
            assert (trials[-1] < times * nearness) == (end != stop)
            if end == stop:
                break
        twin = copy.deepcopy(before)
        losses += loop_distill(twin, teacher, masks, lower, text, start, stop)
    assert report.learning_rate == lower.learning_rate
    assert report.kept
    assert report.before == pytest.approx(nearness, rel=1e-4)
    assert report.trials == pytest.approx(trials, rel=5e-3)  # a rate of 0.2 magnifies rounding
    assert report.after == pytest.approx(loop_divergence(twin, teacher, held_text), rel=1e-4)
    assert report.after == pytest.approx(loop_divergence(student, teacher, held_text), rel=1e-4)
    assert [row["step"] for row in rows] == list(range(settings.steps))
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-4)
    assert f"s, learning rate lowered to {lower.learning_rate:g}: KL" in str(report)
    assert report.rates == f"{rate:g} -> {lower.learning_rate:g}"
    assert_held(student, masks)
    twin = copy.deepcopy(before)
    assert not distill(twin, teacher, TEXT, masks, replace(settings, backtrack=False)).kept


def test_a_rate_that_does_good_is_only_looked_at() -> None:
    """The same bits with and without the check, which draws nothing at random."""
    results = []
    for backtrack in (True, False):
        student, teacher, masks = mixtral()
        settings = replace(FAST, steps=9, held_back=0.2, backtrack=backtrack)
        rows: list[Mapping[str, float]] = []
        state = torch.get_rng_state()
        report = distill(student, teacher, TEXT, masks, settings, log=rows.append)
        assert torch.equal(torch.get_rng_state(), state)
        assert report.kept
        assert "lowered" not in str(report)
        assert report.rates == "0.001"
        for row in rows:
            row.pop("seconds")  # type: ignore[attr-defined]
        assert len(report.trials) == (2 if backtrack else 0)
        results.append((student, replace(report, seconds=0.0, trials=()), rows))
    (student, *found), (twin, *expected) = results
    assert found == expected
    assert same_state(student, twin)


def test_a_rate_is_lowered_a_few_times_at_most() -> None:
    """NaN is no nearer than NaN: a token of the sequences held back has no finite embedding."""
    student, teacher, masks = mixtral()
    text = torch.where(TEXT == VOCAB - 1, 5, TEXT)
    text[8:, 3] = VOCAB - 1
    for model in (student, teacher):
        with torch.no_grad():
            model.get_input_embeddings().weight[VOCAB - 1] = math.nan
    before = copy.deepcopy(student)
    settings = replace(FAST, steps=12, held_back=0.2)
    rows: list[Mapping[str, float]] = []
    report = distill(student, teacher, text, masks, settings, log=rows.append)
    assert math.isnan(report.before)
    assert not report.kept
    assert report.learning_rate == FAST.learning_rate / 4**4
    starts = [0, 3, 5, 6, 7]
    for start, end in zip(starts, [*starts[1:], 12], strict=True):
        peak = FAST.learning_rate / 4 ** starts.index(start)
        expected = [peak * schedule(n - start, 12 - start, FAST.warmup) for n in range(start, end)]
        assert [row["learning_rate"] for row in rows[start:end]] == expected
    for name in masks:
        assert torch.equal(student.get_parameter(name), before.get_parameter(name))


def test_without_sequences_held_back_no_rate_is_lowered() -> None:
    student, teacher, masks = mixtral()
    settings = replace(FAST, learning_rate=0.5, held_back=0.0)
    report = distill(student, teacher, TEXT, masks, settings)
    assert report.last > report.first
    assert report.learning_rate == 0.5


def test_a_single_sequence_is_trained_on() -> None:
    student, teacher, masks = mixtral()
    report = distill(student, teacher, TEXT[:1], masks, FAST)
    assert report.before is None
    assert report.kept


def test_experts_in_a_list() -> None:
    teacher = make_toy()
    config = SamoyedsConfig(PATTERN, modules=("experts", "shared_experts"), strict=False)
    student, masks = pruned(teacher, config)
    alone = DistillSettings(steps=6, batch_size=4, hidden_weight=0)
    report = distill(student, teacher, TEXT, masks, alone)
    assert len(masks) == 2 * 3 * 4
    assert report.last < report.first
    assert_held(student, masks)
    call = lambda: distill(student, teacher, TEXT, masks, FAST)  # noqa: E731
    refused(CalibrationError, "hidden states", "ToyModel", call=call)


def test_training_all_weights_keeps_ties_and_masks() -> None:
    settings = {**MIXTRAL.settings, "tie_word_embeddings": True}
    teacher = Family("tied", "Mixtral", settings).make()
    student, masks = pruned(teacher)
    before = copy.deepcopy(student)
    report = distill(student, teacher, TEXT, masks, DistillSettings(steps=6, train="all"))
    assert report.last < report.first
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert_held(student, masks)
    same = [n for n, p in student.named_parameters() if torch.equal(p, before.get_parameter(n))]
    assert same == []


def test_values_that_are_zero_inside_a_mask_are_trained() -> None:
    student, teacher, masks = mixtral()
    name = "model.layers.0.mlp.experts.down_proj"
    with torch.no_grad():
        student.get_parameter(name).zero_()
    distill(student, teacher, TEXT, masks, FAST)
    weight, mask = student.get_parameter(name), masks[name]
    assert weight[mask].count_nonzero() > mask.sum() / 2  # but for experts that no token reaches
    assert not weight[~mask].count_nonzero()


def test_what_lies_outside_a_mask_is_dropped_first() -> None:
    """A dense student with masks is a pruned one."""
    teacher = MIXTRAL.make()
    one, masks = pruned(teacher)
    other = copy.deepcopy(teacher)
    for student in (one, other):
        distill(student, teacher, TEXT, masks, FAST)
    assert same_state(one, other)


# --- killed -------------------------------------------------------------------------------------


def run_until(
    state: Path,
    step: int | None,
    save_minutes: float = 0.0,
    settings: DistillSettings = FAST,
    late: bool = False,
) -> bool:
    """Distill in a child that is killed after a step, or ``late``, when it computes what follows.

    Returns whether it was.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    try:
        student, teacher, masks = mixtral()

        def die(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def log(row: Mapping[str, float]) -> None:
            CsvLog(state.with_suffix(".csv"))(row)
            if row["step"] == step:
                student.register_forward_pre_hook(die) if late else die()

        distill(
            student, teacher, TEXT, masks, settings, state=state, log=log, save_minutes=save_minutes
        )
        torch.save(student.state_dict(), state.with_suffix(".result"))
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.fixture(scope="module")
def finished() -> tuple[PreTrainedModel, DistillReport]:
    student, teacher, masks = mixtral()
    return student, distill(student, teacher, TEXT, masks, FAST)


@pytest.mark.parametrize(
    ("kills", "save_minutes"),
    [
        ((0,), 0.0),  # before there is a state
        ((3,), 0.0),
        ((2, 3, 5), 0.0),  # again and again
        ((4,), 60.0),  # long after the last state: from the beginning
    ],
)
def test_killed_and_resumed_to_equal_bits(
    tmp_path: Path,
    finished: tuple[PreTrainedModel, DistillReport],
    kills: tuple[int, ...],
    save_minutes: float,
) -> None:
    state = tmp_path / "run.pt"
    for step in kills:
        assert run_until(state, step, save_minutes)
    assert not run_until(state, None, save_minutes)
    found = torch.load(state.with_suffix(".result"), weights_only=True)
    expected = finished[0].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    rows = state.with_suffix(".csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", *map(str, range(FAST.steps))]
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt", ".csv", ".result"}


LOWERED = DistillSettings(steps=9, batch_size=4, learning_rate=5e-2, held_back=0.2)


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, DistillReport, str]:
    """A run that starts again after 2 and 5 steps, and its log without times."""
    student, teacher, masks = mixtral()
    path = tmp_path_factory.mktemp("lowered") / "run.csv"
    report = distill(student, teacher, TEXT, masks, LOWERED, log=CsvLog(path))
    assert report.learning_rate == LOWERED.learning_rate / 4**2
    return student, report, without_seconds(path)


def without_seconds(path: Path) -> str:
    return "\n".join(row.rsplit(",", 1)[0] for row in path.read_text().splitlines())


@pytest.mark.parametrize(
    ("kills", "late"),
    [
        ((1,), False),  # before the rate is checked for the first time
        ((2,), False),  # after the first step with a lower rate, before that is checked
        ((1, 2), True),  # while it is checked
        ((3,), False),  # between two checks of a rate
        ((4,), True),  # while the second check ends it
        ((5,), False),  # after the last start
        ((0, 1, 2, 3, 4, 5, 6, 7, 8), False),
    ],
)
def test_killed_around_a_new_start_and_resumed_to_equal_bits(
    tmp_path: Path,
    lowered: tuple[PreTrainedModel, DistillReport, str],
    kills: tuple[int, ...],
    late: bool,
) -> None:
    state, (student, report, log) = tmp_path / "run.pt", lowered
    for step in kills:
        assert run_until(state, step, settings=LOWERED, late=late)
    assert not run_until(state, None, settings=LOWERED)
    found = torch.load(state.with_suffix(".result"), weights_only=True)
    expected = student.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert without_seconds(state.with_suffix(".csv")) == log
    fresh, teacher, masks = mixtral()
    again = distill(fresh, teacher, TEXT, masks, LOWERED, state=state)
    assert replace(again, seconds=report.seconds) == report


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    student, teacher, masks = mixtral()
    fresh = copy.deepcopy(student)
    first = distill(student, teacher, TEXT, masks, FAST, state=tmp_path / "run.pt")
    rows: list[Mapping[str, float]] = []
    again = distill(fresh, teacher, TEXT, masks, FAST, state=tmp_path / "run.pt", log=rows.append)
    assert again == first
    assert rows == []
    assert same_state(fresh, student)


def change_settings(work: dict[str, Any]) -> None:
    work["settings"] = DistillSettings(steps=6, batch_size=4, learning_rate=2e-3)


def change_tokens(work: dict[str, Any]) -> None:
    work["tokens"] = tokens(batch=10, length=12, seed=1)


def change_teacher(work: dict[str, Any]) -> None:
    work["teacher"] = MIXTRAL.make(seed=1)


def change_student(work: dict[str, Any]) -> None:
    with torch.no_grad():
        next(work["student"].parameters()).mul_(1.5)


def change_masks(work: dict[str, Any]) -> None:
    name = next(iter(work["masks"]))
    work["masks"] = {**work["masks"], name: ~work["masks"][name]}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (change_settings, "settings"),
        (change_tokens, "tokens"),
        (change_teacher, "teacher"),
        (change_student, "student"),
        (change_masks, "student"),
    ],
)
def test_another_run_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], what: str
) -> None:
    state = tmp_path / "run.pt"
    student, teacher, masks = mixtral()
    work = {"student": student, "teacher": teacher, "tokens": TEXT, "masks": masks}
    short = {**work, "student": copy.deepcopy(student), "settings": FAST}
    with pytest.raises(KeyboardInterrupt):
        distill(**short, state=state, log=stop_at(1), save_minutes=0)
    work["settings"] = FAST
    change(work)
    refused(
        CheckpointError,
        f"found another {what}",
        "--overwrite",
        call=lambda: distill(**work, state=state),
        kept=tmp_path,
    )


def stop_at(step: int) -> Callable[[Mapping[str, float]], None]:
    def log(row: Mapping[str, float]) -> None:
        if row["step"] == step:
            raise KeyboardInterrupt

    return log


@pytest.mark.parametrize("key", ["starts", "masters"])
def test_a_state_of_other_code_is_refused(tmp_path: Path, key: str) -> None:
    state = tmp_path / "run.pt"
    assert run_until(state, 1)
    student, teacher, masks = mixtral()
    content = torch.load(state, weights_only=True)
    del content[key]
    torch.save(content, state)
    refused(
        CheckpointError,
        "run.pt",
        "unreadable (KeyError)",
        "--overwrite",
        call=lambda: distill(student, teacher, TEXT, masks, FAST, state=state),
        kept=tmp_path,
    )


def test_a_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    """As versions left it that said nothing of the optimizer, which was torch's."""
    state = tmp_path / "run.pt"
    assert run_until(state, 1)
    student, teacher, masks = mixtral()
    content = torch.load(state, weights_only=True)
    del content["fingerprint"]["optimizer"]
    torch.save(content, state)
    refused(
        CheckpointError,
        "run.pt",
        "found another optimizer",
        "to the same version",
        "--overwrite",
        call=lambda: distill(student, teacher, TEXT, masks, FAST, state=state),
        kept=tmp_path,
    )


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_state_is_refused(tmp_path: Path, content: bytes | None) -> None:
    state = tmp_path / "run.pt"
    if content is None:
        torch.save(["another", "thing"], state)
    else:
        state.write_bytes(content)
    student, teacher, masks = mixtral()
    refused(
        CheckpointError,
        "run.pt",
        "unreadable",
        call=lambda: distill(student, teacher, TEXT, masks, FAST, state=state),
        kept=tmp_path,
    )


def test_a_state_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **settings: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file: file write failed\nat ...")

    monkeypatch.setattr(training_module.torch, "save", full)
    student, teacher, masks = mixtral()
    refused(
        CheckpointError,
        "room",
        call=lambda: distill(
            student, teacher, TEXT, masks, FAST, state=tmp_path / "a.pt", save_minutes=0
        ),
    )


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": "1e-3"}, "learning_rate"),
        ({"warmup": 1.0}, "warmup"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"hidden_weight": -0.1}, "hidden_weight"),
        ({"held_back": 1.0}, "held_back"),
        ({"held_back": -0.1}, "held_back"),
        ({"backtrack": 1}, "backtrack"),
        ({"backtrack": None}, "backtrack"),
        ({"hidden_weight": math.inf}, "hidden_weight"),
        ({"train": "router"}, "train"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], part: str) -> None:
    refused(ConfigError, part, call=lambda: DistillSettings(**settings))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (TEXT[0], "[12]"),
        (TEXT.int(), "int32"),
        (TEXT[:0], "[0, 12]"),
        (TEXT + VOCAB, f"0..{VOCAB - 1}"),
        (TEXT - VOCAB, f"0..{VOCAB - 1}"),
    ],
)
def test_tokens_that_cannot_be(text: torch.Tensor, part: str) -> None:
    student, teacher, masks = mixtral()
    refused(CalibrationError, part, call=lambda: distill(student, teacher, text, masks, FAST))
    assert not student.training


def test_masks_and_weights_that_cannot_be() -> None:
    student, teacher, masks = mixtral()
    before = copy.deepcopy(student)
    name = "model.layers.0.mlp.experts.down_proj"

    def attempt(**changed: Any) -> Callable[[], object]:
        return lambda: distill(student, teacher, TEXT, {**masks, **changed}, FAST)

    refused(CalibrationError, "found one of nowhere", call=attempt(nowhere=masks[name]))
    refused(CalibrationError, name, "bool", call=attempt(**{name: masks[name].float()}))
    refused(CalibrationError, name, "shape", call=attempt(**{name: masks[name][:1]}))
    refused(CalibrationError, "no mask", call=lambda: distill(student, teacher, TEXT, {}, FAST))
    assert same_state(student, before)
    student.get_parameter(name).data = student.get_parameter(name).data.half()
    refused(CalibrationError, name, "torch.float16", call=attempt())


def test_a_loss_that_is_not_finite() -> None:
    student, teacher, masks = mixtral()
    with torch.no_grad():
        teacher.lm_head.weight[0, 0] = math.nan
    message = refused(
        CalibrationError, "finite", call=lambda: distill(student, teacher, TEXT, masks, FAST)
    )
    assert "step 0" in message


def test_the_distilled_model_becomes_the_same_sparse_model() -> None:
    """Encoded again with its masks it computes what the dense modules do."""
    student, teacher, masks = mixtral()
    distill(student, teacher, TEXT, masks, FAST)
    sparse = copy.deepcopy(student)
    patch_model(sparse, config=BOTH)  # magnitude keeps what is not 0
    assert all(torch.equal(mask, masks[name]) for name, mask in kept_masks(sparse).items())
    assert same_state(masked_twin(student, sparse), student)
