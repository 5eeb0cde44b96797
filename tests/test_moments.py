"""Second moments against plain loops, and data that cannot be used."""

import pytest
import torch

from samoyeds_hf.errors import CalibrationError
from samoyeds_hf.pruning.moments import SecondMoments


def inputs(tokens, k, seed):
    """Correlated tokens ``[T, K]`` fp64."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=rng).double() * torch.arange(1, k + 1).pow(-0.7)
    return torch.randn(tokens, k, generator=rng).double() @ mix.T


def test_moments_equal_plain_loops():
    """One expert with more tokens than inputs, one with fewer, one with none."""
    k, counts = 4, (9, 2, 0)
    moments = SecondMoments(3, k, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    sums, layer = torch.zeros(3, k, k).double(), torch.zeros(k, k).double()
    for expert, count in enumerate(counts):
        x, g = torch.randn(count, k, generator=rng), torch.rand(count, generator=rng)
        for half in (slice(0, 1), slice(1, None)):
            moments.add(expert, x[half], g[half])
        for token in range(count):
            for i in range(k):
                for j in range(k):
                    scale = float(g[token]) ** 2
                    sums[expert, i, j] += scale * float(x[token, i]) * float(x[token, j])
        layer += sums[expert] / 11
    hessian = moments.shrunk()
    assert moments.tokens.tolist() == list(counts)
    torch.testing.assert_close(hessian.matrix[0], sums[0] / 9 + 0.05 * layer)
    torch.testing.assert_close(hessian.matrix[1], sums[1] / 2 + 0.05 * (4 / 2) * layer)
    torch.testing.assert_close(hessian.matrix[2], layer)
    assert "uses the moments of its layer" in hessian.notes[2][0]
    assert "only 9 calibration tokens" in hessian.notes[0][0]
    torch.testing.assert_close(moments.shrunk(1).matrix, hessian.matrix[1:2])


def test_dead_inputs_get_the_identity():
    moments = SecondMoments(2, 8, dtype=torch.float64)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0
    moments.add(0, x)
    x[:, 5] = 0
    moments.add(1, x)
    hessian = moments.shrunk()
    # 5 is dead for expert 1 alone, and alive through its layer
    assert hessian.dead.nonzero().tolist() == [[0, 3], [1, 3]]
    assert hessian.matrix[:, 3].tolist() == [[0.0] * 3 + [1.0] + [0.0] * 4] * 2


def test_inputs_whose_square_underflows_are_dead():
    """In fp32 (1e-30)^2 is 0, yet its products with other inputs are not."""
    moments = SecondMoments(1, 8)
    x = torch.ones(20, 8)
    x[:, 3] = 1e-30
    moments.add(0, x)
    hessian = moments.shrunk()
    assert hessian.dead.nonzero().tolist() == [[0, 3]]
    assert torch.equal(hessian.matrix[0, 3], torch.eye(8)[3])
    assert torch.equal(hessian.matrix[0, :, 3], torch.eye(8)[3])


def test_inputs_of_down_are_each_experts_own():
    moments = SecondMoments(2, 8, shared_inputs=False, dtype=torch.float64)
    x = inputs(40, 8, 0)
    moments.add(0, x)
    hessian, own = moments.shrunk(), x.T @ x / 40
    torch.testing.assert_close(hessian.matrix[0], own + 0.05 * own.diagonal().diag())
    assert torch.equal(hessian.matrix[1], torch.eye(8).double())
    assert "is pruned by magnitude" in hessian.notes[1][0]
    own = moments.shrunk(layer=torch.full((8, 8), 7.0))  # it has no layer to be given
    assert torch.equal(own.matrix, hessian.matrix)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.add(2, torch.zeros(1, 8)), "0..1, found 2"),
        (lambda m: m.add(0, torch.zeros(1, 4)), r"\[tokens, 8\], found \[1, 4\]"),
        (lambda m: m.add(0, torch.zeros(3, 8), torch.ones(2)), r"\[3\].*found \[2\]"),
        (lambda m: SecondMoments(0, 8), "E=0"),
        (lambda m: SecondMoments(1, 8, dtype=torch.bfloat16), "bfloat16"),
    ],
)
def test_refused_calibration_data(call, message):
    moments = SecondMoments(2, 8)
    with pytest.raises(CalibrationError, match=message):
        call(moments)
    assert not moments.tokens.any()
    assert not moments.sums.any()


@pytest.mark.parametrize("value", [1e25, float("nan"), float("-inf")])  # its square overflows
def test_what_is_not_finite_is_refused(value):
    moments = SecondMoments(3, 8)
    for expert in range(3):
        moments.add(expert, torch.ones(2, 8))
    x = torch.ones(1, 8)
    x[0, 5] = value
    moments.add(1, x)
    with pytest.raises(CalibrationError, match=r"in torch\.float32, found NaN or.* in expert 1;"):
        moments.shrunk()
    with pytest.raises(CalibrationError, match=r"in expert 1;"):
        moments.shrunk(slice(1, 3))
    assert moments.shrunk(0, layer=torch.eye(8)).matrix.isfinite().all()


def test_groups_of_experts_with_the_moments_of_their_layer():
    """What a layer gives that is counted a few experts at a time."""
    whole = SecondMoments(3, 8, dtype=torch.float64)
    for expert in range(3):
        whole.add(expert, inputs(5 * expert, 8, expert))  # the first saw nothing
    part = SecondMoments(2, 8, dtype=torch.float64)
    part.sums, part.tokens = whole.sums[:2].clone(), whole.tokens[:2]
    expected, found = whole.shrunk(slice(0, 2)), part.shrunk(layer=whole.layer(), consume=True)
    assert torch.equal(found.matrix, expected.matrix)
    assert found.notes == expected.notes
    assert found.matrix.data_ptr() == part.sums.data_ptr()
    assert torch.equal(whole.shrunk().select(slice(1, 2)).matrix, expected.matrix[1:])
