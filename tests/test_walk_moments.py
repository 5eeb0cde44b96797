"""Second moments of what experts are given, against plain loops."""

from __future__ import annotations

import pytest
import torch
from helpers import silu_gate
from torch import nn
from walking import CPU, Batch, loop_moments

from samoyeds_hf.pruning.inputs import (
    LinearInputs,
    Routed,
    down_moments,
    gate_up_moments,
    layer_moments,
)

E, K, H, INNER = 5, 2, 8, 4
IDLE = 3  # an expert that no token goes to


def routed_batches(seed: int = 0) -> list[Batch]:
    """Two batches of different length; one expert is idle, router weights are of both signs."""
    rng = torch.Generator().manual_seed(seed)
    batches = []
    for length in (7, 4):
        order = torch.rand(length, E, generator=rng)
        order[:, IDLE] = -1
        hidden = torch.randn(length, H, generator=rng)
        batches.append((hidden, order.topk(K).indices, torch.randn(length, K, generator=rng)))
    return batches


def catch(batches: list[Batch]) -> Routed:
    """Hand them over as experts are called: by position and by name."""
    routed = Routed()
    names = ("hidden_states", "top_k_index", "top_k_weights")
    for given, batch in enumerate(batches):
        named = dict(zip(names[given:], batch[given:], strict=True))
        routed.catch(nn.Identity(), batch[:given], named)
    return routed


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str
)
@pytest.mark.parametrize("experts", [range(E), range(1, 4), range(3, 4), range(4, 5)], ids=str)
def test_moments_of_gate_and_up(experts: range, dtype: torch.dtype, allowed: float) -> None:
    batches = routed_batches()
    sums, count = loop_moments(batches, E)
    found = gate_up_moments(catch(batches), experts, H, CPU, dtype)
    part = slice(experts.start, experts.stop)
    assert found.sums.dtype == dtype
    assert found.tokens.tolist() == count[part].tolist()
    assert count[IDLE] == 0
    assert torch.allclose(found.sums.double(), sums[part], rtol=allowed, atol=allowed)


def test_moments_of_a_layer() -> None:
    """As if all experts were one: it serves groups of experts where the others are not at hand."""
    batches = routed_batches()
    sums, count = loop_moments(batches, E)
    found = layer_moments(catch(batches), H, CPU, torch.float64)
    assert torch.allclose(found, sums.sum(dim=0) / count.sum(), rtol=1e-6, atol=1e-6)
    both = gate_up_moments(catch(batches), range(E), H, CPU).layer().double()
    assert torch.allclose(found, both, rtol=1e-5, atol=1e-6)


class Experts(nn.Module):
    """What a fused module has that moments need."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * INNER, H, generator=rng))

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        return silu_gate(both)


@pytest.mark.parametrize("experts", [range(E), range(2, 5)], ids=str)
def test_moments_of_down(experts: range) -> None:
    batches, module = routed_batches(), Experts()
    weight = module.gate_up_proj.detach().double()
    sums, count = loop_moments(batches, E, lambda e, x: silu_gate(weight[e] @ x.double()))
    with torch.no_grad():
        found = down_moments(catch(batches), module, experts, torch.float64)
    part = slice(experts.start, experts.stop)
    assert found.tokens.tolist() == count[part].tolist()
    assert torch.allclose(found.sums, sums[part], rtol=1e-4, atol=1e-5)  # inner products in fp32
    assert not found.shared_inputs  # channels of one expert mean nothing in another


@pytest.mark.parametrize("part", [slice(None), slice(2, 4)], ids=str)
def test_shrinkage(part: slice) -> None:
    """``sum / n + 0.05 max(1, K / n) target``: the layer for gate and up, the diagonal for down."""
    batches = routed_batches()
    sums, count = loop_moments(batches, E)
    routed = catch(batches)
    experts = range(E)[part]
    layer = layer_moments(routed, H, CPU, torch.float64)
    gate_up = gate_up_moments(routed, experts, H, CPU, torch.float64).shrunk(layer=layer)
    down = down_moments(routed, Experts(), experts, torch.float64)
    shrunk = down.shrunk()
    for place, expert in enumerate(experts):
        n = int(count[expert])
        share = 0.05 * max(1, H / max(n, 1))
        expected = sums[expert] / n + share * layer if n else layer
        assert torch.allclose(gate_up.matrix[place], expected, rtol=1e-6)
        own = down.sums[place] / max(n, 1)
        share = 0.05 * max(1, INNER / max(n, 1))
        expected = own + share * own.diagonal().diag() if n else torch.eye(INNER).double()
        assert torch.allclose(shrunk.matrix[place], expected)
    idle = IDLE - experts.start
    assert gate_up.notes[idle] == (
        "no calibration token reached this expert: it uses the moments of its layer",
    )
    assert shrunk.notes[idle] == (
        "no calibration token reached this expert: it is pruned by magnitude",
    )


def test_moments_of_a_linear() -> None:
    rng = torch.Generator().manual_seed(0)
    linear = nn.Linear(H, 3, bias=False)
    inputs = LinearInputs.of(linear, torch.float64)
    handle = linear.register_forward_pre_hook(inputs.catch)
    batches = [torch.randn(2, 3, H, generator=rng), torch.randn(1, 4, H, generator=rng)]
    for batch in batches:
        linear(batch)
    handle.remove()
    expected = torch.zeros(H, H).double()
    for x in torch.cat([batch.view(-1, H) for batch in batches]).double():
        expected += torch.outer(x, x)
    assert inputs.moments.tokens.tolist() == [10]
    assert torch.allclose(inputs.moments.sums[0], expected)


def test_what_is_caught_is_a_copy() -> None:
    """A layer may go on in place with what it gave its experts."""
    batches = routed_batches()
    expected = gate_up_moments(catch(routed_batches()), range(E), H, CPU)
    routed = catch(batches)
    for hidden, index, weights in batches:
        hidden.zero_(), index.zero_(), weights.zero_()
    assert torch.equal(gate_up_moments(routed, range(E), H, CPU).sums, expected.sums)
