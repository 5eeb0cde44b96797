"""What a plan says of time and memory: from shapes, and from a product timed now."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import save_dense
from tiny_models import BY_NAME, PATTERN

from samoyeds_hf import SamoyedsConfig, SparsityPattern
from samoyeds_hf.plan import ConversionPlan, plan_conversion
from samoyeds_hf.pruning import METHODS, cost
from samoyeds_hf.pruning.cost import (
    Cost,
    estimate,
    estimate_distillation,
    measure_rate,
    measure_search,
)
from samoyeds_hf.pruning.distill_settings import DistillSettings
from samoyeds_hf.pruning.layer import PruneSettings
from samoyeds_hf.pruning.permute import search_of
from samoyeds_hf.pruning.recover import BlockSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ConversionPlan:
    source = save_dense(BY_NAME["mixtral"], tmp_path_factory.mktemp("cost") / "dense")
    return plan_conversion(source, SamoyedsConfig(PATTERN, "wanda"), 10**9)


@pytest.fixture(autouse=True)
def fixed_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "measure_rate", lambda _: 1e9)


def cost_of(plan: ConversionPlan, num_tokens: int = 1000, **settings: object) -> Cost:
    return estimate(plan, PruneSettings(**{"method": "wanda", **settings}), num_tokens, CPU)  # type: ignore[arg-type]


def test_forward_and_moments_are_counted_from_shapes(plan: ConversionPlan) -> None:
    # per layer: q 64x64, k and v 32x64, o 64x64; router 4x64; experts 2 of 4, 256x64 and 64x128
    dense = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 4 * 64
    experts = 2 * (256 * 64 + 64 * 128)
    moments = 2 * (64**2 + 128**2)
    found = cost_of(plan, 1000, method="magnitude").operations
    more = cost_of(plan, 2000, method="magnitude").operations
    assert more - found == 2 * 1000 * 2 * (3 * (dense + experts) + moments)


def test_better_methods_cost_more(plan: ConversionPlan) -> None:
    costs = [cost_of(plan, method=method).operations for method in METHODS]
    assert costs == sorted(costs)
    assert cost_of(plan, refine=True).operations > cost_of(plan).operations
    assert cost_of(plan, asymmetric=True).operations > cost_of(plan).operations


def test_following_the_dense_model_is_counted_from_shapes(plan: ConversionPlan) -> None:
    # a pass and moments of the dense tokens, and one more pass where the pruned model routes them
    dense = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 4 * 64
    experts = 2 * (256 * 64 + 64 * 128)
    beside = 2 * 64 * 128  # of down's sums with what is missing
    moments = 2 * (64**2 + 128**2)
    plain, followed = (
        cost_of(plan, 2000, asymmetric=a).operations - cost_of(plan, 1000, asymmetric=a).operations
        for a in (False, True)
    )
    found = followed - plain
    assert found == 2 * 1000 * 2 * (dense + 2 * experts + moments + beside)


def test_the_search_for_orders_of_neurons_takes_its_time(
    plan: ConversionPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "measure_search", lambda _: (1.0, 0.0))
    calls = search_of(4, 128, 64, SparsityPattern.parse(PATTERN), SparsityPattern.parse(PATTERN))
    plain, searched = cost_of(plan), cost_of(plan, permute=True)
    assert plain.search_seconds == 0 < calls.calls
    assert searched.search_seconds == 2 * calls.calls  # layers
    assert searched.seconds == plain.seconds + 2 * calls.calls
    # experts one after the other
    apart = cost_of(plan, permute=True, moments_bytes=1)
    assert apart.search_seconds == 4 * searched.search_seconds
    # every element counts, of all experts together or not
    monkeypatch.setattr(cost, "measure_search", lambda _: (0.0, 1.0))
    assert cost_of(plan, permute=True).search_seconds == 2 * calls.elements
    assert cost_of(plan, permute=True, moments_bytes=1).search_seconds == 2 * calls.elements
    assert " of it for the order of neurons, " in str(searched)
    assert "neurons" not in str(plain)


def test_hidden_states_of_every_token_are_in_memory(plan: ConversionPlan) -> None:
    # twice 64 values of bf16 (the layer's input, the experts'), and 2 choices of int64 and bf16
    assert cost_of(plan, 1000).host_bytes == 1000 * (2 * 64 * 2 + 2 * (8 + 2))
    # followed: those of the dense model too, and what the layer's output lacks
    assert cost_of(plan, 1000, asymmetric=True).host_bytes == 1000 * (5 * 64 * 2 + 2 * (8 + 2))


def test_before_recovery_no_output_is_followed(plan: ConversionPlan) -> None:
    both = {"asymmetric": True, "block": BlockSettings()}
    assert cost_of(plan, 1000, **both).host_bytes == 1000 * (4 * 64 * 2 + 2 * (8 + 2))


def test_recovery_by_layers_is_counted_from_shapes(plan: ConversionPlan) -> None:
    # 14 passes over seven eighths of the tokens, forward and back
    dense = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 4 * 64
    experts = 2 * (256 * 64 + 64 * 128)
    plain, recovered = (cost_of(plan, 1000, block=b) for b in (None, BlockSettings()))
    found = recovered.operations - plain.operations
    assert found == 2 * 1000 * 2 * (14 * 7 / 8) * 3 * (dense + experts)
    # a layer and its masks in bf16 and bool; then 20 bytes for what is trained whole, 24 for a
    # quarter of the experts, and the gradient of gate and up
    held = 2 * dense + (2 + 1) * 2 * experts
    training = 20 * dense + 24 * 2 * experts // 4 + 2 * 4 * 256 * 64
    assert recovered.device_bytes == held + training > plain.device_bytes
    few = cost_of(plan, 1000, block=BlockSettings(train="experts"))
    assert few.device_bytes == held + training - 20 * dense


def test_distillation_is_counted_from_shapes(plan: ConversionPlan) -> None:
    # attention, router and experts of two layers as above, and the head; 2 of 4 experts are met
    dense = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 4 * 64)
    experts = 2 * 4 * (256 * 64 + 64 * 128)
    vocabulary = plan.model_config.vocab_size * 64
    norms = (2 * 2 + 1) * 64
    settings = DistillSettings(steps=10, batch_size=3, held_back=0.25, backtrack=False)
    found = estimate_distillation(plan, settings, 16, 50, CPU)
    # a step's tokens: forward through both, back through one; 4 sequences before and after
    passes = 10 * 3 * 4 + 4 * 2 * 2
    assert found.operations == 2 * (dense + experts // 2 + vocabulary) * passes * 50
    checked = estimate_distillation(plan, replace(settings, backtrack=True), 16, 50, CPU)
    assert checked.operations == found.operations * (10 * 3 * 4 + 4 * 2 * 4) / passes
    # both models in fp32 and a gradient of gate and up, which is the largest
    whole = dense + 2 * vocabulary + norms
    models = 2 * 4 * (whole + experts) + 4 * 4 * 256 * 64
    assert found.device_bytes == models + 16 * whole + 20 * experts // 4
    assert found.host_bytes == 4 * (whole + experts // 4)
    assert found.disk_bytes == plan.disk_need + 2 * 12 * (whole + experts // 4)
    few = estimate_distillation(plan, replace(settings, train="experts"), 16, 50, CPU)
    assert few.device_bytes == found.device_bytes - 16 * whole
    assert few.host_bytes == 4 * experts // 4


def test_a_layer_fits(plan: ConversionPlan) -> None:
    layer = max(
        sum(unit.num_bytes for unit in plan.units if f"layers.{i}." in unit.target.name)
        for i in range(2)
    )
    assert cost_of(plan).device_bytes > layer
    assert cost_of(plan, asymmetric=True).device_bytes > cost_of(plan).device_bytes


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (99, "99 s"), (600, "10 min"), (7200, "2.0 h")]
)
def test_it_reads(seconds: float, text: str) -> None:
    line = str(Cost(CPU, seconds * 2e12, 2e12, 10**9, 2 * 10**9))
    assert line.startswith(f"calibration: about {text} on the CPU")
    assert "1.00 GB there, and 2.00 GB of hidden states" in line


def test_rates_are_measured() -> None:
    assert 1e8 < measure_rate(CPU) < 1e14
    call, element = measure_search(CPU)
    assert 1e-8 < call < 1e-2
    assert 0 <= element < 1e-6
