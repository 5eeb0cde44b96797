"""Recovery of one layer, by its dense original: against plain loops, and what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from checkpoints import refused
from plain_adam import PlainCautiousAdam
from tiny_models import BY_NAME, PATTERN, same_state, tokens
from torch import nn

from samoyeds_hf import SamoyedsConfig, patch_model, unpatch_model
from samoyeds_hf.errors import CalibrationError, ConfigError
from samoyeds_hf.pruning.decoder import Decoder, run_layer
from samoyeds_hf.pruning.masks import kept_masks
from samoyeds_hf.pruning.recover import BlockReport, BlockSettings, recover_block
from samoyeds_hf.pruning.training import pick, schedule

BOTH = SamoyedsConfig(PATTERN, modules=("experts", "shared_experts"))


class Layer:
    """The second layer of a tiny model, pruned, beside its dense original."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        dense = BY_NAME[name].make(dtype)
        student = copy.deepcopy(dense)
        patch_model(student, config=BOTH)
        masks = kept_masks(student)
        unpatch_model(student)
        found = [name for name in masks if name.startswith("model.layers.1.")]
        decoder = Decoder.find(dense, found)
        batches = tokens(batch=96, length=16).split(16)
        with torch.no_grad():
            recorded = [decoder.record(batch) for batch in batches]
            call = recorded[0][1][1]
            self.inputs = [run_layer(decoder.layers[0], x, calls[0]) for x, calls in recorded]
            self.targets = [run_layer(decoder.layers[1], x, call) for x in self.inputs]
        self.layer = student.get_submodule("model.layers.1")
        self.weights = {name: (student.get_parameter(name), masks[name]) for name in found}
        self.call = call

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        return run_layer(self.layer, hidden, self.call)

    def recover(self, settings: BlockSettings, **settings_of_call: Any) -> BlockReport:
        return recover_block(
            self.layer,
            self.run,
            self.inputs,
            self.targets,
            self.weights,
            settings,
            **settings_of_call,
        )

    def loss(self, number: int) -> torch.Tensor:
        """The error of one batch, token by token."""
        out, target = self.run(self.inputs[number]), self.targets[number]
        pairs = list(zip(out.flatten(0, 1).double(), target.flatten(0, 1).double(), strict=True))
        return sum((a - b).square().sum() / b.square().sum() for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_layer_comes_nearer_to_the_dense_one(name: str, dtype: torch.dtype) -> None:
    case = Layer(name, dtype)
    before, original = float(case.loss(5).detach()), copy.deepcopy(case.layer)
    with torch.no_grad():  # as the walk calls it
        report = case.recover(BlockSettings(steps=40, learning_rate=3e-4))
    assert report.kept
    assert report.last < 0.98 * report.first
    # The last batch was held back, so that this is no memory of it.
    assert (report.first, report.last) == pytest.approx(
        (before, float(case.loss(5).detach())), rel=1e-3
    )
    trained = {id(weight) for weight, _ in case.weights.values()}
    for n, parameter in case.layer.named_parameters():
        same = torch.equal(parameter, original.get_parameter(n))
        assert same == (id(parameter) not in trained), n
        assert parameter.grad is None
    for weight, mask in case.weights.values():
        assert weight.dtype == dtype
        assert not weight[~mask].count_nonzero()


def test_recovery_is_the_plain_loop() -> None:
    """Dense masters, a mask on each gradient and step, and the loss written out."""
    case, twin = Layer("mixtral"), Layer("mixtral")
    settings = BlockSettings(steps=5, learning_rate=1e-4)
    rows: list[Mapping[str, float]] = []
    assert case.recover(settings, log=rows.append).kept
    weights = {name: weight for name, (weight, _) in twin.weights.items()}
    masks = {name: mask for name, (_, mask) in twin.weights.items()}
    optimizer = PlainCautiousAdam(weights, masks)
    losses = []
    for step in range(5):
        number = int(pick(step, 1, 5, seed=0))  # of six batches the last is held back
        loss = twin.loss(number)
        loss.backward()
        for name, weight in weights.items():
            weight.grad *= masks[name]
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        rate = 1e-4 * schedule(step, 5, settings.warmup)
        optimizer.step({name: rate * 1024 / w.shape[-1] for name, w in weights.items()})
        losses.append(float(loss.detach()))
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-4)
    for name, weight in weights.items():
        found = case.weights[name][0]
        torch.testing.assert_close(found, weight, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_what_has_no_mask_is_trained_too(name: str) -> None:
    """All of the layer, at a tenth of the rate, by the plain loop."""
    case, twin = Layer(name), Layer(name)
    for layer in (case, twin):
        for n, parameter in layer.layer.named_parameters(prefix="model.layers.1"):
            layer.weights.setdefault(n, (parameter, None))
    original = copy.deepcopy(case.layer)
    settings = BlockSettings(steps=3, learning_rate=1e-3, held_back=0.5)
    report = case.recover(settings)
    assert report.kept
    weights = {name: weight for name, (weight, _) in twin.weights.items()}
    masks = {name: mask for name, (_, mask) in twin.weights.items() if mask is not None}
    widest = max(weight.shape[-1] for weight in weights.values())
    for weight in weights.values():
        weight.requires_grad_(True)
    optimizer = PlainCautiousAdam(weights, masks)
    for step in range(3):
        twin.loss(int(pick(step, 1, 3, seed=0))).backward()
        for n, weight in weights.items():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad *= masks.get(n, torch.ones_like(weight, dtype=torch.bool))
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        rate = 1e-3 * schedule(step, 3, settings.warmup)
        widths = {n: w.shape[-1] if w.ndim > 1 else widest for n, w in weights.items()}
        shares = {n: 1.0 if n in masks else 0.1 for n in weights}
        optimizer.step({n: rate * shares[n] * 1024 / widths[n] for n in weights})
    for n, weight in weights.items():
        torch.testing.assert_close(case.weights[n][0], weight, atol=2e-4, rtol=0)
    changed = [
        n for n, p in case.layer.named_parameters() if not torch.equal(p, original.get_parameter(n))
    ]
    assert any("attn" in n for n in changed)
    assert any("norm" in n for n in changed)
    assert any("gate.weight" in n for n in changed)
    assert not any(parameter.grad is not None for parameter in case.layer.parameters())


def test_what_got_worse_is_thrown_away() -> None:
    case = Layer("mixtral")
    original = copy.deepcopy(case.layer)
    report = case.recover(BlockSettings(steps=5, learning_rate=0.9))
    assert not report.kept
    assert report.last == report.first
    assert same_state(case.layer, original)


def test_steps_are_logged_and_the_same_again() -> None:
    settings = BlockSettings(steps=7, seed=3)
    rows: list[Mapping[str, float]] = []
    one, other = Layer("mixtral"), Layer("mixtral")
    one.recover(settings, log=rows.append)
    other.recover(settings)
    assert same_state(one.layer, other.layer)
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[0].keys() == {"step", "loss", "learning_rate"}
    third = Layer("mixtral")
    third.recover(BlockSettings(steps=7, seed=4))
    assert not same_state(one.layer, third.layer)


@pytest.mark.parametrize(
    ("settings", "batches", "trained", "steps"),
    [
        ({}, 2, 1, 14),
        ({}, 8, 7, 98),
        ({}, 32, 28, 392),
        ({"held_back": 0.5}, 32, 16, 224),
        ({"held_back": 0.9}, 2, 1, 14),  # one is left, whatever is asked for
        ({"steps": 5}, 32, 28, 5),
    ],
)
def test_every_batch_is_seen_14_times(
    settings: dict[str, Any], batches: int, trained: int, steps: int
) -> None:
    found = BlockSettings(**settings)
    assert (found.num_trained(batches), found.num_steps(batches)) == (trained, steps)


def test_steps_without_a_number_are_those_of_the_batches() -> None:
    rows: list[Mapping[str, float]] = []
    Layer("mixtral").recover(BlockSettings(learning_rate=1e-5), log=rows.append)
    assert [row["step"] for row in rows] == list(range(14 * 5))  # the sixth batch is held back


def test_tokens_count_by_their_own_size() -> None:
    """One token with a huge target does not drown the others."""
    case = Layer("mixtral")
    for target in case.targets:
        target[0, 0] *= 1e4
    report = case.recover(BlockSettings(steps=40, learning_rate=3e-4))
    case_without = Layer("mixtral")
    case_without.recover(BlockSettings(steps=40, learning_rate=3e-4))
    assert report.kept
    rest = slice(1, None)

    @torch.no_grad()
    def error_of_the_rest(layer: Layer) -> float:
        out, target = layer.run(layer.inputs[5])[rest], layer.targets[5][rest]
        return float((out - target).square().sum() / target.square().sum())

    assert error_of_the_rest(case) < 1.1 * error_of_the_rest(case_without)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"steps": 0}, "steps"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"warmup": -0.1}, "warmup"),
        ({"held_back": 1.0}, "held_back"),
        ({"held_back": "some"}, "held_back"),
        ({"seed": 0.5}, "seed"),
        ({"train": "router"}, "train"),
    ],
)
def test_layer_settings_that_cannot_be(settings: dict[str, Any], part: str) -> None:
    refused(ConfigError, part, call=lambda: BlockSettings(**settings))


def test_layers_that_cannot_be_recovered() -> None:
    case = Layer("mixtral")

    def attempt(**changes: Any) -> Callable[[], object]:
        given = {"inputs": case.inputs, "targets": case.targets, "weights": case.weights}
        return lambda: recover_block(case.layer, case.run, **{**given, **changes})

    original = copy.deepcopy(case.layer)
    refused(
        CalibrationError,
        "1 batches",
        call=attempt(inputs=case.inputs[:1], targets=case.targets[:1]),
    )
    refused(CalibrationError, "5 targets", call=attempt(targets=case.targets[1:]))
    refused(CalibrationError, "0 weights", call=attempt(weights={}))
    (name, (weight, mask)), *_ = case.weights.items()
    refused(CalibrationError, name, "mask", call=attempt(weights={name: (weight, mask[0])}))
    assert same_state(case.layer, original)
    case.targets[0][0, 0, 0] = math.inf
    refused(CalibrationError, "finite", call=attempt())
