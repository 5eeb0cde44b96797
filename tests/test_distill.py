"""Distillation: against plain loops, masks held, refused with a sentence."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import refused
from distillation import (
    BOTH,
    FAST,
    TEXT,
    assert_held,
    loop_distill,
    loop_divergence,
    mixtral,
    pruned,
)
from tiny_models import BY_NAME, MIXTRAL, PATTERN, VOCAB, Family, make_toy, masked_twin, same_state

from samoyeds_hf import SamoyedsConfig, patch_model
from samoyeds_hf.errors import CalibrationError, ConfigError
from samoyeds_hf.pruning import recorded as recorded_module
from samoyeds_hf.pruning.distill import distill
from samoyeds_hf.pruning.distill_settings import DistillSettings
from samoyeds_hf.pruning.masks import kept_masks
from samoyeds_hf.pruning.masters import Masters
from samoyeds_hf.pruning.recorded import RecordedPasses, check_recordable
from samoyeds_hf.pruning.training import schedule


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


def test_passes_that_cannot_be_recorded() -> None:
    _, teacher, masks = mixtral()
    student = copy.deepcopy(teacher)  # dense: not even pruned before it is refused
    untrained = copy.deepcopy(student)
    with pytest.raises(CalibrationError, match=r"all that is trained on one GPU, found it on cpu"):
        distill(student, teacher, TEXT, masks, FAST, cuda_graph=True)
    assert same_state(student, untrained)
    gpu, other = torch.device("cuda", 0), torch.device("cuda", 1)
    for parts in (None, 4):
        check_recordable([gpu, gpu], replace(FAST, micro_batch_size=parts))
    with pytest.raises(CalibrationError, match="found it on cuda:0, cuda:1"):
        check_recordable([other, gpu], FAST)
    with pytest.raises(ConfigError, match="found micro_batch_size 2 of 4"):
        check_recordable([gpu], replace(FAST, micro_batch_size=2))


@pytest.mark.parametrize(
    ("raised", "error", "said"),
    [
        (
            RuntimeError("not while recording\nMore advice"),
            CalibrationError,
            r"they cannot be recorded \(not while recording\); leave cuda_graph out\.$",
        ),
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError, "^full$"),
    ],
)
def test_a_recording_that_fails(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, error: type[Exception], said: str
) -> None:
    class Recording:
        """As torch's, which fails once more at its end."""

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None:
            raise RuntimeError("failed because of an error before")

    for name in ("Stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, Recording)
    monkeypatch.setattr(recorded_module, "_EAGER", 0)

    def passes(_: torch.Tensor) -> torch.Tensor:
        raise raised

    masters = Masters({"w": torch.nn.Parameter(torch.ones(1))}, {})
    with pytest.raises(error, match=said):
        RecordedPasses(passes, masters, torch.device("cpu"))(TEXT)


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
