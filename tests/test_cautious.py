"""Cautious Adam: against a loop over numbers, its state saved and loaded, what it leaves out."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from memory_meter import MemoryMeter
from torch import nn

from samoyeds_hf.pruning import cautious
from samoyeds_hf.pruning.cautious import CautiousAdam

SHAPES = ((5, 3), (7,), (1,))
RATES = (1e-2, 3e-3)  # of the first weight, and of the others


def make(device: str = "cpu") -> tuple[list[nn.Parameter], CautiousAdam]:
    rng = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(s, generator=rng).to(device)) for s in SHAPES]
    groups = [
        {"params": group, "lr": rate}
        for group, rate in zip((weights[:1], weights[1:]), RATES, strict=True)
    ]
    return weights, CautiousAdam(groups)


def gradients(step: int) -> list[torch.Tensor]:
    """Some are zero, and so is all that the second weight has in the first step."""
    rng = torch.Generator().manual_seed(step)
    found = [torch.randn(s, generator=rng) for s in SHAPES]
    found[0][1] = 0
    found[1] *= step > 0
    return found


def move(weights: list[nn.Parameter], optimizer: CautiousAdam, steps: range) -> None:
    for step in steps:
        for weight, grad in zip(weights, gradients(step), strict=True):
            weight.grad = grad.to(weight.device)
        optimizer.step()


def loop(values: list[float], grads: list[list[float]], rate: float) -> list[float]:
    """One weight, number by number."""
    means, squares = [0.0] * len(values), [0.0] * len(values)
    for count, step in enumerate(grads, 1):
        changes = []
        for i, g in enumerate(step):
            means[i] = 0.9 * means[i] + 0.1 * g
            squares[i] = 0.95 * squares[i] + 0.05 * g * g
            size = math.sqrt(squares[i] / (1 - 0.95**count)) + 1e-8
            change = means[i] / (1 - 0.9**count) / size
            changes.append(change if change * g > 0 else 0.0)
        share = sum(change != 0 for change in changes) / len(changes)
        for i, change in enumerate(changes):
            values[i] -= rate * change / max(share, 1e-3)
    return values


def test_steps_are_those_of_a_loop_over_numbers() -> None:
    weights, optimizer = make()
    starts = [weight.detach().flatten().tolist() for weight in weights]
    move(weights, optimizer, range(9))
    for number, (weight, start) in enumerate(zip(weights, starts, strict=True)):
        grads = [gradients(step)[number].flatten().tolist() for step in range(9)]
        expected = loop(start, grads, RATES[number > 0])
        torch.testing.assert_close(weight.detach().flatten(), torch.tensor(expected))


def saved(optimizer: CautiousAdam) -> dict[str, Any]:
    """Its state, as a file gives it back."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


@pytest.mark.parametrize("stop", [1, 4])
def test_a_loaded_state_goes_on_to_equal_bits(stop: int) -> None:
    straight, optimizer = make()
    move(straight, optimizer, range(7))
    before, optimizer = make()
    move(before, optimizer, range(stop))
    after, fresh = make()
    for new, old in zip(after, before, strict=True):
        new.data = old.detach().clone()
    fresh.load_state_dict(saved(optimizer))
    move(after, fresh, range(stop, 7))
    assert all(torch.equal(one, other) for one, other in zip(after, straight, strict=True))
    assert saved(fresh)["state"][0]["steps"] == 7


def test_no_step_goes_against_the_gradient() -> None:
    """Where the mean does, nothing moves; everything else does."""
    weights, optimizer = make()
    left_out = 0
    for step in range(9):
        before = [weight.detach().clone() for weight in weights]
        move(weights, optimizer, range(step, step + 1))
        for old, weight, grad in zip(before, weights, gradients(step), strict=True):
            moved = weight.detach() - old
            agrees = optimizer.state[weight]["mean"] * grad > 0
            assert torch.equal(moved.sign(), -grad.sign() * agrees)
            left_out += int((~agrees & (grad != 0)).sum())
    assert left_out > 20  # of 9 x 23


def test_what_is_left_grows_by_what_was_left_out() -> None:
    """A thousandfold at most. All but the last of the gradients turn around."""
    for size, factor in ((4, 4), (5000, 1000)):
        weight = nn.Parameter(torch.zeros(size))
        optimizer = CautiousAdam([{"params": [weight], "lr": 1.0}])
        weight.grad = torch.ones(size)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), -torch.ones(size))
        weight.grad = torch.full((size,), -0.1)
        weight.grad[-1] = 1
        before = weight.detach().clone()
        optimizer.step()
        assert torch.equal(weight.detach()[:-1], before[:-1])
        assert float(before[-1] - weight.detach()[-1]) == pytest.approx(factor, rel=1e-3)


def test_a_weight_without_gradient_stays() -> None:
    weights, optimizer = make()
    before = [weight.detach().clone() for weight in weights]
    weights[1].grad = gradients(1)[1]
    optimizer.step()
    same = [torch.equal(one, other) for one, other in zip(weights, before, strict=True)]
    assert same == [True, False, True]


def test_a_step_needs_the_memory_of_one_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or of several, as long as they are small."""
    monkeypatch.setattr(cautious, "_AT_ONCE", 5000)
    weights = [nn.Parameter(torch.zeros(size)) for size in (2000, 2500, 5000, 4000)]
    optimizer = CautiousAdam([{"params": weights, "lr": 1e-3}])
    for step in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        with MemoryMeter() as meter:
            optimizer.step()
        moments = 2 * 4 * 13500 * (step == 0)
        assert meter.peak <= moments + 4 * 5000 + 100  # and a few numbers
    assert optimizer.state[weights[0]].keys() == {"steps", "mean", "square"}


@pytest.mark.parametrize("limit", [1, 8, 22])
def test_together_or_one_by_one_is_the_same(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    together, optimizer = make()
    move(together, optimizer, range(3))
    monkeypatch.setattr(cautious, "_AT_ONCE", limit)
    apart, optimizer = make()
    move(apart, optimizer, range(3))
    assert all(torch.equal(one, other) for one, other in zip(apart, together, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_waits_for_nothing() -> None:
    """Also after a state was loaded from the host."""
    expected, optimizer = make()
    move(expected, optimizer, range(6))
    weights, optimizer = make("cuda")
    move(weights, optimizer, range(3))
    optimizer.load_state_dict(saved(optimizer))
    for step in range(3, 6):
        for weight, grad in zip(weights, gradients(step), strict=True):
            weight.grad = grad.to("cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for weight, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.cpu(), other)
