"""Uneven budgets: the choice against an exhaustive search, the losses against whole models."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from calibrated import calibrated, save_source, tokens_of, write_text
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import BY_NAME, MIXTRAL, PATTERN, Family, make_toy, same_state, tokens
from transformers import PreTrainedModel

from samoyeds_hf import SamoyedsConfig, SparsityPattern
from samoyeds_hf.errors import CalibrationError, ConfigError, PatternError
from samoyeds_hf.plan import plan_conversion
from samoyeds_hf.pruning import budget as budgets
from samoyeds_hf.pruning.budget import budget_overrides, choose_patterns, default_candidates
from samoyeds_hf.pruning.decoder import Decoder
from samoyeds_hf.pruning.layer import PruneSettings
from samoyeds_hf.pruning.sensitivity import Measured, measure_errors
from samoyeds_hf.pruning.streamed import StreamedLayers
from samoyeds_hf.pruning.team import Team
from samoyeds_hf.pruning.walk import InMemory, prune_model
from samoyeds_hf.selection import select

WANDA = PruneSettings("wanda")
IDS = tokens(6, 9)
TEXTS = ("1:4:32", "3:8:32", "1:2:32", "3:4:32", "2:4")
CANDIDATES = [SparsityPattern.parse(text) for text in TEXTS]
Table = dict[str, dict[str, Measured]]


# --- the choice ---------------------------------------------------------------------------------


def dropped(table: Mapping[str, Mapping[str, Measured]], chosen: Mapping[str, object]) -> Fraction:
    """Share of all elements that a choice drops."""
    total = kept = Fraction(0)
    for name, pattern in chosen.items():
        found = SparsityPattern.parse(str(pattern))
        elements = table[name][str(pattern)].elements
        total += elements
        kept += Fraction(elements * found.n, 2 * found.m)
    return 1 - kept / total


def loss_of(table: Mapping[str, Mapping[str, Measured]], chosen: Mapping[str, object]) -> float:
    return math.fsum(table[name][str(pattern)].loss for name, pattern in chosen.items())


def all_choices(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table, texts, strict=True)) for texts in itertools.product(*table.values())]


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """One to five weights, of sizes that have little in common, some with few candidates."""
    table: Table = {}
    for weight in range(draw(st.integers(1, 5))):
        elements = 64 * draw(st.sampled_from([1, 2, 3, 7, 97, 1009]))
        texts = draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=5, unique=True))
        # small integers: sums are exact and ties frequent
        table[f"weight {weight}"] = {
            text: Measured(float(draw(st.integers(0, 9))), elements) for text in texts
        }
    return table


@settings(deadline=None)
@given(tables(), st.sampled_from([0.5, 0.6, 0.625, 0.7, 0.75, 0.8, 0.875]))
def test_is_the_best_of_all_choices(table: Table, budget: float) -> None:
    share = Fraction(str(budget))
    enough = [choice for choice in all_choices(table) if dropped(table, choice) >= share]
    if not enough:
        with pytest.raises(ConfigError, match="within reach"):
            choose_patterns(table, budget)
        return
    chosen = choose_patterns(table, budget)
    assert list(chosen) == list(table)
    assert dropped(table, chosen) >= share
    least = min(loss_of(table, choice) for choice in enough)
    assert loss_of(table, chosen) == least
    # of equal ones that which keeps least
    equal = [choice for choice in enough if loss_of(table, choice) == least]
    assert dropped(table, chosen) == max(dropped(table, choice) for choice in equal)


@settings(deadline=None)
@given(tables(), st.sampled_from([0.625, 0.75, 0.8]), st.integers(2, 6))
def test_thinned_states_still_hold_the_budget(table: Table, budget: float, states: int) -> None:
    share = Fraction(str(budget))
    is_within_reach = any(dropped(table, choice) >= share for choice in all_choices(table))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budgets, "_MAX_STATES", states)
        if is_within_reach:
            assert dropped(table, choose_patterns(table, budget)) >= share
        else:
            with pytest.raises(ConfigError, match="within reach"):
                choose_patterns(table, budget)


def test_thinned_states_are_few_and_span_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "_MAX_STATES", 8)
    kept = torch.arange(1000) ** 2
    chosen = budgets._thinned(kept).tolist()
    assert len(chosen) <= 8 + 1
    assert chosen[0] == 0
    assert chosen[-1] == 999
    assert chosen == sorted(set(chosen))


def test_many_weights_of_few_sizes_are_exact() -> None:
    """More choices than a search could go through: against convex losses, where greedy is exact."""
    rng = torch.Generator().manual_seed(0)
    scales = torch.rand(96, generator=rng).tolist()
    density = {text: SparsityPattern.parse(text).density for text in ("1:4:32", "1:2:32")}
    table = {
        f"{i}": {text: Measured(scale * (1 - d), 1 << 20) for text, d in density.items()}
        for i, scale in enumerate(scales)
    }
    chosen = choose_patterns(table, 0.8125)  # half of them
    denser = {name for name, pattern in chosen.items() if str(pattern) == "1:2:32"}
    ranked = sorted(table, key=lambda name: -scales[int(name)])
    assert denser == set(ranked[:48])


@pytest.mark.parametrize("budget", [0, 1, -0.5, 75, float("nan"), True, "0.75", None])
def test_a_budget_is_a_share(budget: float) -> None:
    with pytest.raises(ConfigError, match=r"between 0 and 1, found .*; use e\.g\. 0\.75"):
        choose_patterns({"weight": {"1:2:32": Measured(1.0, 64)}}, budget)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_losses_must_be_finite(loss: float) -> None:
    with pytest.raises(CalibrationError, match="weight with 1:2:32"):
        choose_patterns({"weight": {"1:2:32": Measured(loss, 64)}}, 0.75)


def test_out_of_reach_says_what_is_within() -> None:
    table = {"a": {"1:2:32": Measured(1.0, 64)}, "b": {"3:4:32": Measured(1.0, 64)}}
    with pytest.raises(ConfigError, match=r"0\.75 .* found 0\.6875 .*add sparser candidates"):
        choose_patterns(table, 0.75)
    assert set(map(str, choose_patterns(table, 0.6875).values())) == {"1:2:32", "3:4:32"}


def test_default_candidates() -> None:
    found = default_candidates(SparsityPattern(1, 2, 32))
    assert [str(pattern) for pattern in found] == list(TEXTS)
    assert [p.v for p in default_candidates(SparsityPattern.parse("2:4"))] == [64] * 4 + [None]


# --- the losses ---------------------------------------------------------------------------------


def targets(model: PreTrainedModel, **config: object) -> dict[str, SparsityPattern]:
    chosen = {"pattern": PATTERN, "strict": False, **config}
    return select(model, SamoyedsConfig(**chosen)).targets  # type: ignore[arg-type]


def measure(
    model: PreTrainedModel, budget: float = 0.75, team: Team | None = None, **config: object
) -> Table:
    patterns = targets(model, **config)
    layers = InMemory(Decoder.find(model, patterns))
    return measure_errors(layers, patterns, IDS, WANDA, budget, CANDIDATES, team=team)


@torch.no_grad()
def outputs_of_layers(model: PreTrainedModel) -> list[torch.Tensor]:
    """What each layer gives for the sample, in the model's own forward."""
    caught: list[torch.Tensor] = []
    decoder = Decoder.find(model, targets(model))
    hooks = [
        layer.register_forward_hook(
            lambda _module, _args, out: caught.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in decoder.layers
    ]
    model(IDS[: WANDA.batch_size], use_cache=False)
    for hook in hooks:
        hook.remove()
    return caught


def change(changed: torch.Tensor, dense: torch.Tensor) -> float:
    """Token by token."""
    ratios = [
        float((new - old).double().norm() ** 2 / old.double().norm() ** 2)
        for new, old in zip(changed.flatten(0, 1), dense.flatten(0, 1), strict=True)
    ]
    return sum(ratios) / len(ratios)


THREE = Family(
    "three", "Mixtral", {**MIXTRAL.settings, "num_hidden_layers": 3, "num_local_experts": 3}
)


@pytest.mark.parametrize("family", [THREE, BY_NAME["qwen2_moe"]], ids=str)
def test_losses_are_those_of_whole_models(family: Family) -> None:
    # Pruned alone, a weight sees dense inputs: then prune_model is the reference.
    dense = family.make()
    shared = {"modules": ["experts", "shared_experts"]}
    found = measure(dense, **shared)
    at_dense = outputs_of_layers(dense)
    patterns = targets(dense, **shared)
    decoder = Decoder.find(dense, patterns)
    assert list(found) == list(patterns)
    for name in patterns:
        index = decoder.layer_of(name)
        assert index is not None
        here, end = {}, {}
        for text in found[name]:
            pruned = copy.deepcopy(dense)
            prune_model(pruned, {name: SparsityPattern.parse(text)}, IDS, WANDA)
            changed = outputs_of_layers(pruned)
            here[text] = change(changed[index], at_dense[index])
            end[text] = change(changed[-1], at_dense[-1])
        assert len(here) >= 3
        assert len(set(here.values())) == len(here)
        gain = end[PATTERN] / here[PATTERN]
        for text, loss in here.items():
            assert found[name][text].loss == pytest.approx(gain * loss, rel=1e-3)
        assert {row.elements for row in found[name].values()} == {dense.get_parameter(name).numel()}


def test_the_pattern_nearest_to_the_budget_is_exact() -> None:
    dense = THREE.make()
    at_end = outputs_of_layers(dense)[-1]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for budget, text in ((0.5, "2:4"), (0.65, "3:4:32"), (0.9, "1:4:32")):
        pruned = copy.deepcopy(dense)
        prune_model(pruned, {name: SparsityPattern.parse(text)}, IDS, WANDA)
        expected = change(outputs_of_layers(pruned)[-1], at_end)
        assert measure(dense, budget)[name][text].loss == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = MIXTRAL.make(torch.bfloat16).train(training)
    before = copy.deepcopy(model)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    measure(model)
    assert same_state(model, before)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert model.training == training


def test_the_model_is_left_as_it_was_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MIXTRAL.make()
    before = copy.deepcopy(model)

    def fail(*_: object) -> float:
        raise RuntimeError("in the middle of a trial")

    monkeypatch.setattr("samoyeds_hf.pruning.sensitivity._change", fail)
    with pytest.raises(RuntimeError, match="middle"):
        measure(model)
    assert same_state(model, before)


def test_a_stand_in_for_slow_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    from samoyeds_hf.pruning import sensitivity

    used = set()
    prune = sensitivity.prune_experts

    def noting(*args: object, method: str, refine: bool, **rest: object) -> object:
        used.add((method, refine))
        return prune(*args, method=method, refine=refine, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sensitivity, "prune_experts", noting)
    model = MIXTRAL.make()
    patterns = targets(model)
    layers = InMemory(Decoder.find(model, patterns))
    for method in ("best", "sparsegpt"):
        measure_errors(layers, patterns, IDS, PruneSettings(method), 0.75, CANDIDATES[:1])
    assert used == {("sparsegpt", True), ("sparsegpt", False)}


def test_two_processes_measure_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each process prunes half of the experts. Here one runs after the other.
    model = BY_NAME["qwen2_moe"].make()
    alone = measure(model, modules=["experts", "shared_experts"])
    handed: list[torch.Tensor] = []
    monkeypatch.setattr(Team, "follow", lambda _self, value: value)
    monkeypatch.setattr(Team, "exchange", lambda _self, stacked: handed.append(stacked.clone()))
    measure(model, team=Team(0, 2), modules=["experts", "shared_experts"])
    halves = iter(handed)

    def fill_in(team: Team, stacked: torch.Tensor) -> None:
        share = team.share(len(stacked), 0)
        assert not stacked[share.start : share.stop].any()
        stacked[share.start : share.stop] = next(halves)[share.start : share.stop]

    monkeypatch.setattr(Team, "exchange", fill_in)
    together = measure(model, team=Team(1, 2), modules=["experts", "shared_experts"])
    assert next(halves, None) is None
    for name, rows in alone.items():
        for text, row in rows.items():
            assert together[name][text].loss == pytest.approx(row.loss, rel=1e-4)


# --- overrides ----------------------------------------------------------------------------------


def overrides(model: PreTrainedModel, budget: float, **config: object) -> dict[str, str]:
    patterns = targets(model, **config)
    layers = InMemory(Decoder.find(model, patterns))
    return budget_overrides(layers, patterns, IDS, WANDA, budget, CANDIDATES)


@pytest.mark.parametrize("budget", [0.625, 0.75, 0.8])
def test_a_model_pruned_by_overrides_has_the_sparsity(budget: float) -> None:
    model = THREE.make()
    found = overrides(model, budget)
    patterns = targets(model, overrides=found)
    assert len(found) == len(patterns)
    assert [str(pattern) for pattern in patterns.values()] == list(found.values())
    prune_model(model, patterns, IDS, WANDA)
    weights = [model.get_parameter(name) for name in patterns]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros / sum(weight.numel() for weight in weights) >= budget


def test_weights_that_matter_less_get_sparser_patterns() -> None:
    model = THREE.make()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("model.layers.1.") and name.endswith("experts.down_proj"):
                weight.mul_(1e-3)
    chosen = overrides(model, 0.75)
    middle = [text for name, text in chosen.items() if "1" in name.split(r"\.")]
    assert middle == ["1:4:32", "1:4:32"]  # gate and up are no use without down
    others = [SparsityPattern.parse(text) for name, text in chosen.items()]
    assert max(pattern.density for pattern in others) > 0.25


def test_the_experts_of_a_list_share_a_pattern() -> None:
    model = make_toy(inner_size=64)
    names = targets(model, modules=["experts", "shared_experts"])
    found = measure(model, modules=["experts", "shared_experts"])
    key = "layers.1.experts.*.down_proj.weight"
    assert len(names) == 2 * (3 * 3 + 3)
    assert len(found) == 2 * (3 + 3)
    assert found[key]["2:4"].elements == 3 * 64 * 32
    chosen = overrides(model, 0.75, modules=["experts", "shared_experts"])
    patterns = targets(model, modules=["experts", "shared_experts"], overrides=chosen)
    assert len(patterns) == len(names)
    for layer, weight in itertools.product((0, 1), ("gate_proj", "up_proj", "down_proj")):
        same = {
            str(patterns[f"layers.{layer}.experts.{expert}.{weight}.weight"]) for expert in range(3)
        }
        assert same == {chosen[rf"layers\.{layer}\.experts\.[0-9]+\.{weight}\.weight"]}
    kept = sum(model.get_parameter(n).numel() * p.density for n, p in patterns.items())
    assert kept <= 0.25 * sum(model.get_parameter(n).numel() for n in patterns)


def test_weights_try_only_what_divides_them() -> None:
    # an inner size of 96: with V = 64 only gate and up, with 64 inputs, can be (1,2,64)
    model = BY_NAME["qwen3_moe"].make()
    patterns = targets(model)
    layers = InMemory(Decoder.find(model, patterns))
    tried = [SparsityPattern.parse(text) for text in ("1:2:64", "1:2:32", "2:4")]
    found = measure_errors(layers, patterns, IDS, WANDA, 0.75, tried)
    for name, rows in found.items():
        is_down = name.endswith("down_proj")
        assert list(rows) == (["1:2:32", "2:4"] if is_down else ["1:2:64", "1:2:32", "2:4"])
    with pytest.raises(PatternError, match=r"candidate that divides it.*down_proj"):
        measure_errors(layers, patterns, IDS, WANDA, 0.75, tried[:1])


def test_a_weight_that_does_nothing() -> None:
    model = MIXTRAL.make()
    torch.nn.init.zeros_(model.get_parameter("model.layers.1.mlp.experts.down_proj"))
    found = measure(model)
    for weight in ("gate_up_proj", "down_proj"):
        rows = found[f"model.layers.1.mlp.experts.{weight}"].values()
        assert [row.loss for row in rows] == [0.0] * len(CANDIDATES)
    assert overrides(model, 0.75)[r"model\.layers\.1\.mlp\.experts\.down_proj"] == "1:4:32"


def test_streamed_layers_give_the_same(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    source = save_source(BY_NAME["qwen2_moe"], tmp_path / "dense")
    plan = plan_conversion(source, calibrated(text), 30_000)
    layers = StreamedLayers(plan, torch.device("cpu"))
    seen: list[int] = []
    streamed = budget_overrides(
        layers, plan.patterns, tokens_of(text), WANDA, 0.75, CANDIDATES, on_layer=seen.append
    )
    assert seen == [0, 1]
    assert all(p.is_meta for p in layers.decoder.model.parameters())
    model = BY_NAME["qwen2_moe"].make(torch.bfloat16)
    memory = InMemory(Decoder.find(model, plan.patterns))
    expected = budget_overrides(memory, plan.patterns, tokens_of(text), WANDA, 0.75, CANDIDATES)
    assert streamed == expected


def test_nothing_to_share_a_budget() -> None:
    model = MIXTRAL.make()
    layers = InMemory(Decoder.find(model, targets(model)))
    with pytest.raises(ConfigError, match="needs weights to share it"):
        budget_overrides(layers, {}, IDS, WANDA, 0.75)


def test_refused_before_anything_is_measured() -> None:
    model = MIXTRAL.make()
    patterns = targets(model)
    layers = InMemory(Decoder.find(model, patterns))
    seen: list[int] = []
    with pytest.raises(ConfigError, match="between 0 and 1"):
        budget_overrides(layers, patterns, IDS, WANDA, 75, on_layer=seen.append)
    with pytest.raises(ConfigError, match="within reach"):
        budget_overrides(layers, patterns, IDS, WANDA, 0.95, CANDIDATES, on_layer=seen.append)
    assert seen == []
