"""Down makes up for what the residual stream lacks beside the errors of the experts."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from helpers import silu_gate
from tiny_models import BY_NAME, MIXTRAL, PATTERN, make_toy, same_state, tokens
from torch import nn
from walking import SMALL_MIXTRAL, inputs_of_experts, prune

from samoyeds_hf import SamoyedsConfig
from samoyeds_hf.pruning import prune_experts
from samoyeds_hf.pruning.decoder import Decoder, run_layer
from samoyeds_hf.pruning.follow import DAMPING
from samoyeds_hf.pruning.inputs import Routed
from samoyeds_hf.pruning.recover import BlockSettings
from samoyeds_hf.pruning.residual import MissingMoments, beyond_chance, gain_of
from samoyeds_hf.selection import select

CPU = torch.device("cpu")
ROWS, K = 5, 8


def factor_of(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    rows = (x * g.unsqueeze(1)).double()
    return torch.linalg.cholesky(rows.T @ rows / len(x)).float()


def draw(count: int) -> tuple[torch.Tensor, ...]:
    """x, R, g and share of some tokens."""
    generator = torch.Generator().manual_seed(count)
    x, missing = (torch.randn(count, n, generator=generator) for n in (K, ROWS))
    g, share = (torch.rand(count, generator=generator) + 0.1 for _ in range(2))
    return x, missing, g, share


def test_the_fit_is_least_squares_times_what_is_not_chance() -> None:
    moments, counts = MissingMoments(2, ROWS, K, CPU), (300, 40)
    for expert, count in enumerate(counts):
        x, missing, g, share = draw(count)
        missing += x @ torch.ones(K, ROWS)
        for part in (slice(0, 7), slice(7, count)):
            moments.add(expert, x[part], missing[part], g[part], share[part])
        rows, wanted = torch.zeros(count, K).double(), torch.zeros(count, ROWS).double()
        for t in range(count):
            rows[t], wanted[t] = g[t] * x[t], share[t] * missing[t]
        exact = torch.linalg.lstsq(rows, wanted).solution  # [K, O]
        total = wanted.square().sum()
        left = (wanted - rows @ exact).square().sum()
        adjusted = 1 - float(left / total) * count / (count - K)
        expected = exact.T * adjusted / float(1 - left / total)
        found = moments.fit(expert, factor_of(x, g), K)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_what_weights_can_make_up_for_they_do() -> None:
    """Where what is missing is linear in the inputs, the fit is exact."""
    x, _, g, share = draw(50)
    change = torch.randn(ROWS, K, generator=torch.Generator().manual_seed(1))
    missing = (x * g.unsqueeze(1)) @ change.T / share.unsqueeze(1)
    moments = MissingMoments(1, ROWS, K, CPU)
    moments.add(0, x, missing, g, share)
    torch.testing.assert_close(moments.fit(0, factor_of(x, g), K), change, rtol=1e-4, atol=1e-4)


def test_noise_is_hardly_followed() -> None:
    x, missing, g, share = draw(60)
    moments = MissingMoments(1, ROWS, K, CPU)
    moments.add(0, x, missing, g, share)
    factor = factor_of(x, g)
    plain = torch.cholesky_solve(moments.sums[0].T / 60, factor).T
    assert moments.fit(0, factor, K).norm() < 0.5 * plain.norm()


@pytest.mark.parametrize(
    ("explained", "total", "count", "share"),
    [
        (1.0, 1.0, 100, 1.0),
        (0.1, 1.0, 100, 0.0),  # 10 inputs explain a tenth of 100 tokens' noise
        (0.05, 1.0, 100, 0.0),
        (0.55, 1.0, 100, 1 - 0.45 / 0.55 / 9),
        (1.0, 0.999, 100, 1.0),  # rounding
        (1.0, 1.0, 10, 0.0),  # as many tokens as inputs explain anything
        (0.0, 0.0, 100, 0.0),
        (0.0, 0.0, 0, 0.0),
        (float("nan"), 1.0, 100, 0.0),
    ],
)
def test_what_is_beyond_chance(explained: float, total: float, count: int, share: float) -> None:
    assert beyond_chance(explained, total, count, 10) == pytest.approx(share)


def test_an_expert_without_tokens_has_no_fit() -> None:
    found = MissingMoments(1, ROWS, K, CPU).fit(0, torch.eye(K), K)
    assert torch.equal(found, torch.zeros(ROWS, K))


GAINS = {
    "mixtral": 1.0,
    "qwen2_moe": 1.0,  # beside shared experts
    "deepseek_v3": 1.0,
    "granitemoe": 0.5,  # its residual_multiplier
    "gemma4": None,  # a norm after the experts
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GAINS)
def test_how_a_layer_adds_its_experts(name: str, dtype: torch.dtype) -> None:
    family = BY_NAME[name]
    model = family.make(dtype)
    decoder = Decoder.find(model, select(model, SamoyedsConfig(PATTERN)).targets)
    hidden, calls = decoder.record(tokens(6, 17))
    layer = decoder.layers[-1]
    module = layer.get_submodule(family.experts)
    found = gain_of(module, partial(run_layer, layer, hidden, calls[-1]))
    assert found == (GAINS[name] and pytest.approx(GAINS[name], rel=1e-2))
    assert not module._forward_hooks


@torch.no_grad()
@pytest.mark.parametrize("experts", ["unused", "zero"])
def test_experts_that_add_nothing_are_not_counted_on(experts: str) -> None:
    linear = nn.Linear(4, 4, bias=False)
    x = torch.ones(3, 4)
    if experts == "zero":
        linear.weight.zero_()
        assert gain_of(linear, lambda: x + linear(x)) is None
    else:
        assert gain_of(linear, lambda: x) is None


def captured(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What each weight is pruned towards, by name, from now on."""
    targets: dict[str, torch.Tensor] = {}

    def keep(target: torch.Tensor, *args: Any, **settings: Any) -> Any:
        targets[settings["name"]] = target.clone()
        return prune_experts(target, *args, **settings)

    monkeypatch.setattr("samoyeds_hf.pruning.layer.prune_experts", keep)
    return targets


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [4, 12])
def test_the_target_of_down_against_plain_loops(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, name = tokens(12, 30), "model.layers.1.mlp.experts"
    dense, model = SMALL_MIXTRAL.make(), SMALL_MIXTRAL.make()
    targets = captured(monkeypatch)
    prune(model, ids=ids, config={"pattern": "1:2:16"}, asymmetric=True, batch_size=batch_size)

    ((x, index, weights),) = inputs_of_experts(model, name, ids)
    ((z, *_),) = inputs_of_experts(dense, name, ids)
    old, new = (m.get_submodule(name) for m in (dense, model))
    last: list[torch.Tensor] = []
    for m in (dense, model):
        handle = m.model.layers[1].register_forward_hook(lambda *a: last.append(a[-1]))
        m.model(ids)
        handle.remove()
    wanted, found = (hidden.reshape(-1, hidden.shape[-1]).double() for hidden in last)
    rest = found - new(x, index, weights)  # the residual stream before the experts

    width = old.down_proj.shape[-1]
    kinds = [(expert, *torch.where(index == expert)) for expert in range(len(old.down_proj))]
    for expert, chosen, choice in kinds:
        rows, towards, beside = [], [], []
        for t, k in zip(chosen.tolist(), choice.tolist(), strict=True):
            missing = wanted[t] - rest[t]
            for e, g in zip(index[t].tolist(), weights[t].double(), strict=True):
                missing -= g * (old.down_proj[e] @ silu_gate(old.gate_up_proj[e] @ z[t]))
            g = weights[t, k].double()
            inner, before = (
                silu_gate(m.gate_up_proj[expert] @ v[t]).double() for m, v in ((new, x), (old, z))
            )
            rows.append(g * inner)
            towards.append(g * (old.down_proj[expert].double() @ (before - inner)))
            beside.append(missing * g**2 / weights[t].double().square().sum())
        a, count = torch.stack(rows), len(rows)
        assert count > width
        h = a.T @ a / count
        h += 0.05 * h.diag().diag()  # the shrinkage of down's moments
        dead = h.diag() == 0
        h += DAMPING * h.diag().diag() + dead.double().diag()
        solved = [torch.stack(b).T @ a / count @ torch.linalg.inv(h) for b in (towards, beside)]
        explained = (solved[1] * (torch.stack(beside).T @ a / count)).sum()
        total = torch.stack(beside).square().sum() / count
        alive = int((~dead).sum())
        share = beyond_chance(float(explained), float(total), count, alive)
        assert share > 0.1
        expected = old.down_proj[expert] + solved[0] + share * solved[1]
        torch.testing.assert_close(
            targets[f"{name}.down_proj"][expert].double(), expected, rtol=1e-3, atol=1e-3
        )


def test_nothing_is_missing_before_anything_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = MIXTRAL.make(torch.bfloat16), MIXTRAL.make(torch.bfloat16)
    monkeypatch.setattr("samoyeds_hf.pruning.residual.beyond_chance", lambda *_: 1e9)
    caught: list[torch.Tensor] = []
    add = MissingMoments.add

    def note(self: MissingMoments, expert: int, x: torch.Tensor, *rest: torch.Tensor) -> None:
        caught.append(rest[0])
        add(self, expert, x, *rest)

    monkeypatch.setattr(MissingMoments, "add", note)
    overrides = {r"model\.layers\.1\..*": "dense"}
    prune(found, ids=tokens(6, 30), config={"overrides": overrides}, asymmetric=True)
    assert caught
    assert not any(missing.any() for missing in caught)
    monkeypatch.setattr("samoyeds_hf.pruning.follow.gain_of", lambda *_: None)
    prune(expected, ids=tokens(6, 30), config={"overrides": overrides}, asymmetric=True)
    assert same_state(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("method", ["wanda", "best"])
def test_it_brings_outputs_nearer(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(24, 40)
    dense, distances = MIXTRAL.make(), []
    for known in (False, True):
        with monkeypatch.context() as patch:
            if not known:
                patch.setattr("samoyeds_hf.pruning.follow.gain_of", lambda *_: None)
            model = MIXTRAL.make()
            prune(model, method, ids, asymmetric=True)
        difference = model.model(ids).last_hidden_state - dense.model(ids).last_hidden_state
        distances.append(float(difference.norm()))
    assert distances[1] < distances[0]


@torch.no_grad()
def test_where_the_output_is_no_sum_experts_are_followed_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, expected = (BY_NAME["gemma4"].make() for _ in range(2))
    ids = tokens(12, 30)
    prune(found, ids=ids, asymmetric=True)
    monkeypatch.setattr("samoyeds_hf.pruning.follow.gain_of", lambda *_: None)
    prune(expected, ids=ids, asymmetric=True)
    assert same_state(found, expected)


@torch.no_grad()
def test_before_recovery_experts_are_followed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training fits the layer's output itself, and ends better from weights that did not."""
    asked: list[object] = []
    monkeypatch.setattr("samoyeds_hf.pruning.follow.gain_of", lambda *args: asked.append(args))
    settings = {"asymmetric": True, "batch_size": 4}
    prune(MIXTRAL.make(), ids=tokens(8, 12), block=BlockSettings(steps=1), **settings)
    assert not asked
    prune(MIXTRAL.make(), ids=tokens(8, 12), **settings)
    assert asked


def test_experts_in_a_list_have_no_dense_twin_to_follow() -> None:
    found, expected = make_toy(), make_toy()
    config = {"pattern": "1:2:16", "modules": ["experts", "shared_experts"]}
    prune(found, config=config, asymmetric=True)
    prune(expected, config=config)
    assert same_state(found, expected)


@torch.no_grad()
def test_shared_experts_count_each_token_once() -> None:
    ids = tokens(12, 30)
    config = {"modules": ["experts", "shared_experts"]}
    model = BY_NAME["qwen2_moe"].make()
    pruned = prune(model, ids=ids, config=config, asymmetric=True)
    shared = [weight for weight in pruned if "shared_expert" in weight.name]
    assert shared
    assert all(weight.tokens == (ids.numel(),) for weight in shared)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_streams_beside_the_tokens_go_with_them() -> None:
    """By a second stream that holds each token's number, and shares that sum up to 1."""
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(t, 3, generator=generator) for t in (7, 4)]
    index = [torch.stack([torch.randperm(5, generator=generator)[:2] for _ in h]) for h in hidden]
    weights = [torch.rand(i.shape, generator=generator) for i in index]
    weights[1][2] = 0  # a token that no expert counts for
    number = [torch.arange(float(len(h))).unsqueeze(1) for h in hidden]
    routed = Routed(copy.copy(hidden), index, weights)
    sums = [torch.zeros(len(h)) for h in hidden]
    whole = [{tuple(row.tolist()): i for i, row in enumerate(h)} for h in hidden]
    for expert, (x, n), g, share in routed.beside([number], range(5), CPU):
        for row, at, weight, part in zip(x, n, g, share, strict=True):
            batch = 0 if tuple(row.tolist()) in whole[0] else 1
            token = whole[batch][tuple(row.tolist())]
            assert token == int(at)
            choice = index[batch][token].tolist().index(expert)
            assert weight == weights[batch][token, choice]
            sums[batch][token] += part
    torch.testing.assert_close(sums[0], torch.ones(7))
    torch.testing.assert_close(sums[1], torch.tensor([1.0, 1, 0, 1]))
