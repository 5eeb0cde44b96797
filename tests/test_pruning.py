"""The magnitude mask against an exhaustive search and plain loops."""

import itertools
import math
import re
from unittest import mock

import pytest
import torch
from helpers import loop_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from samoyeds_hf import SparsityPattern, chunks, encode
from samoyeds_hf.errors import CheckpointError, PatternError
from samoyeds_hf.format import VALUE_DTYPES
from samoyeds_hf.pruning.magnitude import magnitude_mask
from samoyeds_hf.pruning.projection import project

PAIRS = list(itertools.combinations(range(4), 2))


def every_mask(pattern: SparsityPattern, k: int) -> torch.Tensor:
    """All masks of one block ``[M, k]``, k = V, by brute force. bool ``[masks, M, k]``."""
    rows = []  # all ways to keep 2 of every 4 in a row
    for choice in itertools.product(PAIRS, repeat=k // 4):
        row = torch.zeros(k, dtype=torch.bool)
        row[[group * 4 + place for group, pair in enumerate(choice) for place in pair]] = True
        rows.append(row)
    masks = []
    for kept in itertools.combinations(range(pattern.m), pattern.n):
        for choice in itertools.product(rows, repeat=pattern.n):
            mask = torch.zeros(pattern.m, k, dtype=torch.bool)
            mask[list(kept)] = torch.stack(choice)
            masks.append(mask)
    return torch.stack(masks)


@pytest.mark.parametrize("text", ["1:2:8", "2:3:4", "1:4:8", "2:3:8", "2:4", "3:3:4"])
def test_is_the_best_of_all_masks(text):
    pattern = SparsityPattern.parse(text)
    k = 8 if pattern.v is None else pattern.v
    masks = every_mask(pattern, k)
    rng = torch.Generator().manual_seed(0)
    for high in (2, 4, 100):  # small integers: sums are exact, and ties are frequent
        for _ in range(20):
            # two blocks side by side when V = 4, because k is a multiple of 8
            weight = torch.randint(-high, high + 1, (pattern.m, 2 * k), generator=rng).float()
            found = magnitude_mask(weight, pattern)
            for half in (slice(0, k), slice(k, 2 * k)):
                energy = (weight[:, half].square() * masks).sum(dim=(1, 2))
                assert (weight[:, half].square() * found[:, half]).sum() == energy.max()
                assert (masks == found[:, half]).all(dim=(1, 2)).any()  # it is of the pattern


@given(
    st.sampled_from(["1:2:4", "1:2:16", "4:8:8", "3:4:12", "2:4", "5:16:8", "2:2:8", "1:3:20"]),
    st.sampled_from(VALUE_DTYPES),
    st.sampled_from([1, 3, 1000]),
    st.integers(0, 1 << 30),
)
@settings(max_examples=60)
def test_equals_plain_loops(text, dtype, high, seed):
    """Integers from a small range: of equals the earlier is kept, of rows as of elements."""
    pattern = SparsityPattern.parse(text)
    rng = torch.Generator().manual_seed(seed)
    shape = (2 * pattern.m, 2 * math.lcm(pattern.v or 8, 8))
    weight = torch.randint(-high, high + 1, shape, generator=rng).to(dtype)
    mask = magnitude_mask(weight, pattern)
    assert torch.equal(mask, loop_mask(weight, pattern))
    encode(weight, mask, pattern)  # refuses what is not exactly the pattern


def test_ties_go_to_the_lower_position():
    mask = magnitude_mask(torch.tensor([[-1.0, 1, 1, -1] * 2] * 4), SparsityPattern(1, 2, 8))
    assert mask.int().tolist() == [[1, 1, 0, 0] * 2, [0] * 8] * 2


def test_negative_zero_ties_with_zero():
    mask = magnitude_mask(torch.tensor([[0.0, -0.0, 0.0, -0.0] * 2]), SparsityPattern(1, 1))
    assert mask.int().tolist() == [[1, 1, 0, 0] * 2]


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("scale", ["largest", "smallest"])
def test_values_whose_squares_leave_fp32(dtype, scale):
    """1e38 squared is infinite in fp32, and 1e-40 squared is zero: neither may decide."""
    info = torch.finfo(dtype)
    rng = torch.Generator().manual_seed(0)
    if scale == "largest":
        weight = torch.rand(8, 64, generator=rng) * info.max
    else:
        weight = torch.randint(1, 200, (8, 64), generator=rng) * info.smallest_normal * info.eps
    weight = weight.to(dtype)
    assert weight.float().square().isinf().any() or scale == "smallest" or dtype == torch.float16
    for text in ("1:2:16", "4:8:32", "2:4"):
        pattern = SparsityPattern.parse(text)
        assert torch.equal(magnitude_mask(weight, pattern), loop_mask(weight, pattern))


def test_a_small_difference_between_large_rows_decides():
    """In fp32 the sums of both rows would be equal."""
    weight = torch.full((2, 4096), 1000.0)
    weight[1, 7] = 1000.001
    mask = magnitude_mask(weight, SparsityPattern(1, 2, 4096))
    assert mask.any(dim=1).tolist() == [False, True]


@pytest.mark.parametrize("text", ["1:2:96", "1:2:12", "8:16:32", "2:4"])
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_batching_changes_nothing(text, dtype):
    pattern = SparsityPattern.parse(text)
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 32, 96, generator=rng).to(dtype)
    mask = magnitude_mask(weight, pattern)
    assert torch.equal(torch.stack([magnitude_mask(expert, pattern) for expert in weight]), mask)
    assert torch.equal(magnitude_mask(weight.mT.contiguous().mT, pattern), mask)
    assert torch.equal(magnitude_mask(weight.view(5, 1, 32, 96), pattern).squeeze(1), mask)
    every_other = torch.stack((weight, weight), dim=1)[:, 0]
    assert torch.equal(magnitude_mask(every_other, pattern), mask)
    for chunk in (1, 96 * 16, 96 * 48, 1 << 30):
        with mock.patch.object(chunks, "_ON_CPU", chunk):
            assert torch.equal(magnitude_mask(weight, pattern), mask)


def test_threads_change_nothing():
    pattern = SparsityPattern(1, 2, 4096)
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    mask = magnitude_mask(weight, pattern)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 2)
        assert torch.equal(magnitude_mask(weight, pattern), mask)
    finally:
        torch.set_num_threads(threads)


def test_project_takes_any_root_of_a_score():
    """Wanda's score W² diag(H) is the square of W sqrt(diag(H)); the layout does not matter."""
    pattern = SparsityPattern(1, 2, 16)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(16, 64, generator=rng).double() * torch.rand(64, generator=rng)
    assert torch.equal(project(x, pattern), loop_mask(x, pattern))
    assert torch.equal(project(x.t().contiguous().t(), pattern), loop_mask(x, pattern))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_refuses_what_is_not_finite(value, dtype, chunk):
    weight = torch.zeros(2, 3, 8, 16, dtype=dtype)
    weight[1, 2, 5, 11] = value
    message = (
        f"experts.w must be finite to be pruned, found {value} in row 5 of matrix 5, column 11;"
    )
    with (
        mock.patch.object(chunks, "_ON_CPU", chunk),
        pytest.raises(CheckpointError, match=re.escape(message)),
    ):
        magnitude_mask(weight, SparsityPattern(1, 2, 8), "experts.w")


def test_refuses_shape_that_the_pattern_does_not_divide():
    with pytest.raises(PatternError, match=r"^w: V must divide .*\[4, 8, 12, 24\]\.$"):
        magnitude_mask(torch.zeros(4, 24), SparsityPattern(1, 2, 16), "w")


def test_no_experts_are_legal():
    assert magnitude_mask(torch.zeros(0, 4, 16), SparsityPattern(1, 2, 8)).shape == (0, 4, 16)


def test_gives_a_mask_of_the_pattern():
    weight = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for text in ("1:2:32", "3:4:16", "2:4"):
        pattern = SparsityPattern.parse(text)
        encode(weight, magnitude_mask(weight, pattern, "w"), pattern)
