"""What distillation is made of, against plain loops: masks, loss, schedule, order, log, masters."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from distillation import assert_held, pruned
from helpers import random_mask
from tiny_models import BY_NAME
from torch import nn
from torch.nn import functional

from samoyeds_hf import SparsityPattern, encode
from samoyeds_hf.pruning import losses as losses_module
from samoyeds_hf.pruning import masters as masters_module
from samoyeds_hf.pruning.losses import divergence
from samoyeds_hf.pruning.masks import kept_mask
from samoyeds_hf.pruning.masters import UNPRUNED, WIDTH, Masters, make_optimizer
from samoyeds_hf.pruning.training import CsvLog, pick, schedule

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
