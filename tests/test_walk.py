"""Calibrated pruning of a model in memory, against plain loops that follow the data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import loop_mask, silu_gate
from tiny_models import (
    BY_NAME,
    MIXTRAL,
    Family,
    ToyModel,
    logits,
    make_toy,
    same_state,
    tokens,
)
from torch import nn
from transformers import PreTrainedModel
from walking import IDS, SMALL_MIXTRAL, Batch, experts_in, inputs_of_experts, loop_moments, prune

from samoyeds_hf import SparsityPattern, encode
from samoyeds_hf.errors import CalibrationError
from samoyeds_hf.pruning import METHODS
from samoyeds_hf.pruning.walk import LayerResult


def loop_hessian(sums: torch.Tensor, count: torch.Tensor, *, shared: bool) -> torch.Tensor:
    """The shrunk moments ``[E, K, K]`` of a layer, written from their formula."""
    k, layer = sums.shape[-1], sums.sum(dim=0) / max(1, int(count.sum()))
    rows = []
    for total, n in zip(sums, count.tolist(), strict=True):
        if n == 0:
            rows.append(layer if shared else torch.eye(k).double())
            continue
        own = total / n
        rows.append(own + 0.05 * max(1, k / n) * (layer if shared else own.diagonal().diag()))
    return torch.stack(rows)


def loop_cross(
    batches: list[Batch],
    dense: list[Batch],
    here: Callable[[int, torch.Tensor], torch.Tensor],
    there: Callable[[int, torch.Tensor], torch.Tensor],
    experts: int,
) -> torch.Tensor:
    """Means of ``g^2 (z - x) x^T`` with z of the dense model, routed as the pruned one does."""
    means = []
    for expert in range(experts):
        found, count = torch.zeros(()).double(), 0
        for (hidden, index, weights), (other, *_) in zip(batches, dense, strict=True):
            for token, choice in (index == expert).nonzero().tolist():
                x = here(expert, hidden[token]).double()
                z = there(expert, other[token]).double()
                found = found + weights[token, choice].double() ** 2 * torch.outer(z - x, x)
                count += 1
        means.append(found / count)
    return torch.stack(means)


Step = Callable[[str, nn.Parameter, torch.Tensor, torch.Tensor], None]


def in_true_order(model: PreTrainedModel, dense: PreTrainedModel, step: Step) -> None:
    """Call ``step(name, weight, H, C)`` for each weight, when all before it are changed.

    H are the moments of what it gets in this model, C those of how that differs in the dense one.
    """
    for name in list(experts_in(model)):
        gate_up, down = (getattr(model.get_submodule(name), f"{w}_proj") for w in WEIGHTS)
        before = dense.get_submodule(name).gate_up_proj
        batches, others = (inputs_of_experts(m, name, IDS) for m in (model, dense))

        def same(expert: int, x: torch.Tensor) -> torch.Tensor:
            return x

        def inner(expert: int, x: torch.Tensor, weight: torch.Tensor = gate_up) -> torch.Tensor:
            return silu_gate(weight[expert] @ x)

        first, second = ((same, same), (inner, partial(inner, weight=before)))
        for path, weight, pair in (("gate_up", gate_up, first), ("down", down, second)):
            sums, count = loop_moments(batches, gate_up.shape[0], pair[0])
            hessian = loop_hessian(sums, count, shared=path == "gate_up")
            cross = loop_cross(batches, others, *pair, experts=gate_up.shape[0])
            step(f"{name}.{path}_proj", weight, hessian, cross)


WEIGHTS = ("gate_up", "down")


@torch.no_grad()
def test_wanda_against_a_walk_in_plain_loops() -> None:
    """Wanda changes no weight, so that the result is equal and not just close."""
    found, expected = SMALL_MIXTRAL.make(), SMALL_MIXTRAL.make()
    pattern = SparsityPattern.parse("1:2:16")
    wanted: dict[str, torch.Tensor] = {}

    def step(name: str, weight: nn.Parameter, hessian: torch.Tensor, _: torch.Tensor) -> None:
        norm = hessian.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-2)  # [E, 1, K]
        scores = weight.double() * norm
        wanted[name] = torch.stack([loop_mask(score, pattern) for score in scores])
        # where a row of gate or up lost everything, down's input is always 0
        weight.data = weight.data.masked_fill(~wanted[name] | (norm == 0), 0)

    in_true_order(expected, found, step)
    pruned = prune(found, config={"pattern": "1:2:16"}, batch_size=4)
    assert [weight.name for weight in pruned] == list(wanted)
    for weight in pruned:
        assert torch.equal(weight.mask, wanted[weight.name]), weight.name
    assert same_state(found, expected)


FIRST = "model.layers.0.mlp.experts.gate_up_proj"


def loss(delta: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """What rows lose on average over the tokens, ``[E]``."""
    return ((delta.double() @ hessian) * delta.double()).sum(dim=(1, 2))


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("magnitude", {"refine": True}),
        ("wanda", {}),
        ("sparsegpt", {"refine": True}),
        ("admm", {}),
        ("wanda", {"asymmetric": True}),
        ("sparsegpt", {"asymmetric": True, "refine": True}),
        ("best", {}),
    ],
    ids=str,
)
def test_errors_are_those_of_the_inputs_that_pruned_weights_get(
    method: str, settings: dict[str, bool]
) -> None:
    """Each reported error, again in plain loops: with the inputs of any other order it differs.

    Asymmetric, it is that against what the dense model makes of its own inputs.
    """
    dense, found = SMALL_MIXTRAL.make(), SMALL_MIXTRAL.make()
    config = {"pattern": "1:2:16"}
    pruned = {w.name: w for w in prune(found, method, config=config, **settings)}
    mixed, untouched = copy.deepcopy(dense), {}
    follows = method == "best" or "asymmetric" in settings

    def keep(name: str, _: nn.Parameter, hessian: torch.Tensor, cross: torch.Tensor) -> None:
        untouched[name] = hessian
        assert not cross.any()

    def check(name: str, weight: nn.Parameter, hessian: torch.Tensor, cross: torch.Tensor) -> None:
        new = found.get_parameter(name)
        target = weight.double()
        assert cross.any() == (name != FIRST)
        if follows:
            damped = hessian + 0.01 * hessian.diagonal(dim1=-2, dim2=-1).diag_embed()
            dead = (hessian.diagonal(dim1=-2, dim2=-1) == 0).double().diag_embed()
            target = target + target @ cross @ torch.linalg.inv(damped + dead)
        errors = loss(target - new, hessian) / loss(target, hessian)
        assert pruned[name].errors == pytest.approx(errors.tolist(), rel=2e-3)
        other = loss(weight - new, untouched[name]) / loss(weight, untouched[name])
        same = other.tolist() == pytest.approx(errors.tolist(), rel=1e-2)
        assert same == (name == FIRST)
        change = (weight - new).double().norm() / weight.double().norm()
        assert pruned[name].change == pytest.approx(float(change), rel=1e-6)
        weight.data = new.data

    in_true_order(dense, dense, keep)
    in_true_order(mixed, dense, check)
    assert same_state(mixed, found)


@torch.no_grad()
def test_following_the_dense_model_brings_outputs_nearer_to_it() -> None:
    dense = MIXTRAL.make()
    distances = []
    for asymmetric in (False, True):
        model = MIXTRAL.make()
        prune(model, "sparsegpt", tokens(12, 24), refine=True, asymmetric=asymmetric)
        ids = tokens(12, 24)
        distances.append(float((logits(model, ids) - logits(dense, ids)).norm()))
    assert distances[1] < distances[0]


def test_refined_weights_lose_less() -> None:
    """In the first weight, whose inputs no pruning has changed."""
    plain, refined = SMALL_MIXTRAL.make(), SMALL_MIXTRAL.make()
    config = {"pattern": "1:2:16"}
    first, better = prune(plain, config=config)[0], prune(refined, config=config, refine=True)[0]
    assert all(b < a for a, b in zip(first.errors, better.errors, strict=True))


@torch.no_grad()
def test_experts_in_a_list_and_shared_ones() -> None:
    """Linears: down sees what the pruned gate and up give, the next layer the pruned output."""
    config = {"pattern": "1:2:16", "modules": ["experts", "shared_experts"]}
    found, expected = make_toy(), make_toy()
    pruned = {weight.name: weight for weight in prune(found, config=config, batch_size=4)}
    assert isinstance(expected, ToyModel)
    pattern = SparsityPattern.parse("1:2:16")

    def shrink(linear: nn.Linear, x: torch.Tensor, name: str) -> None:
        x = x.reshape(-1, x.shape[-1]).double()
        norm = torch.stack([row.square() for row in x]).mean(dim=0)
        mask = loop_mask(linear.weight.double() * norm.sqrt(), pattern)
        assert torch.equal(pruned[name].mask, mask), name
        assert pruned[name].tokens == (IDS.numel(),)
        linear.weight.data = linear.weight.data.masked_fill(~mask | (norm == 0), 0)

    x = expected.embed(IDS)
    for number, layer in enumerate(expected.layers):
        experts = {f"experts.{i}": expert for i, expert in enumerate(layer.experts)}
        for path, expert in {**experts, "shared_expert": layer.shared_expert}.items():
            shrink(expert.gate_proj, x, f"layers.{number}.{path}.gate_proj.weight")
            shrink(expert.up_proj, x, f"layers.{number}.{path}.up_proj.weight")
            inner = nn.functional.silu(expert.gate_proj(x)) * expert.up_proj(x)
            shrink(expert.down_proj, inner, f"layers.{number}.{path}.down_proj.weight")
        x = layer(x)
    assert len(pruned) == 2 * 4 * 3
    assert same_state(found, expected)


@torch.no_grad()
def test_shared_experts_beside_fused_ones() -> None:
    """The second pass, for their down, does not count the tokens of the experts again."""
    model, alone = BY_NAME["qwen2_moe"].make(), BY_NAME["qwen2_moe"].make()
    both = {w.name: w for w in prune(model, config={"modules": ["experts", "shared_experts"]})}
    only = {w.name: w for w in prune(alone)}
    assert len(both) == 2 * 5
    name = "model.layers.0.mlp.experts."
    for weight in (f"{name}gate_up_proj", f"{name}down_proj"):
        assert both[weight].tokens == only[weight].tokens
        assert torch.equal(both[weight].mask, only[weight].mask)
    # the next layer sees the output of pruned shared experts
    later = "model.layers.1.mlp.experts.gate_up_proj"
    assert both[later].errors != only[later].errors


# --- masks and reports --------------------------------------------------------------------------


def assert_is_pattern(mask: torch.Tensor, pattern: SparsityPattern) -> None:
    """By count: two of every four, in exactly N of every M Sub-Rows."""
    *lead, rows, k = mask.shape
    v = pattern.sub_row(k)
    assert mask.dtype == torch.bool
    assert set(mask.view(*lead, rows, k // 4, 4).sum(dim=-1).unique().tolist()) <= {0, 2}
    kept = mask.view(*lead, rows, k // v, v).sum(dim=-1)
    assert set(kept.unique().tolist()) <= {0, v // 2}
    blocks = (kept > 0).view(*lead, rows // pattern.m, pattern.m, k // v).sum(dim=-2)
    assert blocks.unique().tolist() == [pattern.n]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", ["1:2:32", "2:4", "4:8:16"])
def test_weights_are_zero_outside_masks_of_the_pattern(method: str, text: str) -> None:
    model, dense = SMALL_MIXTRAL.make(torch.bfloat16), SMALL_MIXTRAL.make(torch.bfloat16)
    pattern = SparsityPattern.parse(text)
    pruned = prune(model, method, config={"pattern": text})
    for weight in pruned:
        parameter = model.get_parameter(weight.name)
        assert weight.mask.shape == parameter.shape
        assert_is_pattern(weight.mask, pattern)
        assert not parameter[~weight.mask].any()
        assert parameter.dtype == torch.bfloat16
        encode(parameter, weight.mask, pattern)
    changed = {name for name in dense.state_dict() if not same_tensor(model, dense, name)}
    assert changed == {weight.name for weight in pruned}


def same_tensor(one: nn.Module, other: nn.Module, name: str) -> bool:
    return torch.equal(one.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_reports(name: str) -> None:
    family = BY_NAME[name]
    model = family.make()
    top_k = model.config.num_experts_per_tok
    for weight in prune(model):
        experts = model.get_parameter(weight.name).shape[0]
        assert len(weight.tokens) == len(weight.errors) == experts
        assert sum(weight.tokens) == IDS.numel() * top_k
        assert all(0 < error < 1 for error in weight.errors)
        assert weight.error == pytest.approx(sum(weight.errors) / experts)
        assert weight.seconds > 0
        assert [note.split(":")[0] for note in weight.notes] == [
            f"expert {e}" for e in range(experts)
        ]
        for expert, tokens_seen in enumerate(weight.tokens):
            assert f"only {tokens_seen} calibration tokens" in weight.notes[expert] or (
                tokens_seen == 0
            )


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("wanda", {"refine": True}),
        ("wanda", {"asymmetric": True}),
        ("sparsegpt", {"refine": True}),
        ("admm", {}),
    ],
    ids=str,
)
def test_groups_of_experts_change_nothing(method: str, settings: dict[str, bool]) -> None:
    """With memory for the moments of one expert, two, or all at a time."""
    results = []
    for memory in (1, 2 * 4 * 96 * 96, 10**9):
        model = BY_NAME["qwen3_moe"].make()
        results.append((model, prune(model, method, moments_bytes=memory, **settings)))
    for model, pruned in results[:-1]:
        for weight, expected in zip(pruned, results[-1][1], strict=True):
            assert weight.tokens == expected.tokens
            assert weight.notes == expected.notes
            assert weight.errors == pytest.approx(expected.errors, rel=1e-4)
            assert torch.equal(weight.mask, expected.mask)
            found = model.get_parameter(weight.name)
            wanted = results[-1][0].get_parameter(weight.name)
            assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("per_layer", [0, 16], ids=["plain", "inputs per layer"])
def test_the_size_of_batches_changes_nothing(per_layer: int) -> None:
    """Not even where layers are told the tokens, so that their calls differ by batch."""
    gemma = BY_NAME["gemma4"]
    settings = {**gemma.settings, "hidden_size_per_layer_input": per_layer}
    family = Family("gemma", "Gemma4", settings, config=gemma.config, experts="experts")
    whole, *parts = (prune(family.make(), batch_size=size) for size in (6, 1, 2, 4))
    for pruned in parts:
        for weight, expected in zip(pruned, whole, strict=True):
            assert weight.tokens == expected.tokens
            assert weight.errors == pytest.approx(expected.errors, rel=1e-4)
            assert torch.equal(weight.mask, expected.mask)


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_the_same_twice(method: str) -> None:
    one, other = MIXTRAL.make(torch.bfloat16), MIXTRAL.make(torch.bfloat16)
    first, second = (prune(model, method, refine=True) for model in (one, other))
    assert same_state(one, other)
    for a, b in zip(first, second, strict=True):
        assert (a.name, a.errors, a.tokens, a.notes) == (b.name, b.errors, b.tokens, b.notes)


def test_every_layer_is_told_when_it_is_done() -> None:
    model, seen = MIXTRAL.make(), []

    def note(result: LayerResult) -> None:
        assert result.layer is model.model.layers[result.index]
        seen.append((result.index, result.path, [weight.name for weight in result.weights]))

    pruned = prune(model, on_layer=note)
    assert [index for index, _, _ in seen] == [0, 1]
    assert [path for _, path, _ in seen] == ["model.layers.0", "model.layers.1"]
    assert [name for _, _, names in seen for name in names] == [weight.name for weight in pruned]


def test_layers_without_a_pattern_are_only_run() -> None:
    """Those before the last pruned one, so that it gets its inputs; those behind it not at all."""
    settings = {**MIXTRAL.settings, "num_hidden_layers": 4}
    model = Family("four", "Mixtral", settings).make()
    overrides = {r"model\.layers\.[013]\..*": "dense"}
    ran: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    done: list[tuple[int, int]] = []
    pruned = prune(
        model,
        config={"overrides": overrides},
        on_layer=lambda result: done.append((result.index, len(result.weights))),
    )
    assert done == [(0, 0), (1, 0), (2, 2)]
    assert {weight.name.split(".")[2] for weight in pruned} == {"2"}
    assert ran == [0, 1, 2]  # a batch each


# --- the model afterwards -----------------------------------------------------------------------


def hooks_of(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_hooks_are_as_before(training: bool) -> None:
    model = BY_NAME["qwen2_moe"].make().train(training)
    before, parameters = hooks_of(model), [id(parameter) for parameter in model.parameters()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    prune(model, config={"modules": ["experts", "shared_experts"]})
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert hooks_of(model) == before
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    logits(model)


def test_training_mode_and_hooks_after_an_error() -> None:
    model = MIXTRAL.make().train()
    before = hooks_of(model)

    def stop(result: LayerResult) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        prune(model, on_layer=stop)
    assert model.training
    assert hooks_of(model) == before
    model.get_parameter("model.layers.0.self_attn.v_proj.weight").data.fill_(float("inf"))
    with pytest.raises(CalibrationError):
        prune(model)
    assert model.training
    assert hooks_of(model) == before


def test_dropout_is_off_while_the_data_is_seen() -> None:
    settings = {**MIXTRAL.settings, "attention_dropout": 0.5, "router_jitter_noise": 0.5}
    family = Family("noisy", "Mixtral", settings)
    one, other = family.make().train(), family.make().eval()
    prune(one), prune(other)
    assert same_state(one, other)
