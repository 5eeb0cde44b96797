"""Calibrated pruning against plain loops, exact least squares, and inputs that go wrong."""

import dataclasses
import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_meter import MemoryMeter

from samoyeds_hf import SparsityPattern, encode
from samoyeds_hf.errors import CalibrationError, CheckpointError, PatternError
from samoyeds_hf.pruning import METHODS, Hessian, SecondMoments, admm, groups, prune_experts
from samoyeds_hf.pruning.factor import DAMPINGS, inverse_factor
from samoyeds_hf.pruning.memory import experts_at_once, peak_memory
from samoyeds_hf.pruning.problem import Problem
from samoyeds_hf.pruning.projection import project
from samoyeds_hf.pruning.refine import refine
from samoyeds_hf.pruning.result import better, row_losses, settle
from samoyeds_hf.pruning.sparsegpt import sparsegpt
from samoyeds_hf.pruning.swap import swap
from samoyeds_hf.pruning.wanda import wanda

PATTERNS = ["1:2:8", "1:2:32", "2:3:16", "3:4:4", "2:4", "2:2:16"]
CALIBRATED = [name for name, method in METHODS.items() if method.needs_calibration]
EVERY = [(name, refined) for name in METHODS for refined in (False, True) if name != "best"]
EVERY.append(("best", True))
one_of_each = pytest.mark.parametrize(("name", "refined"), EVERY)


def inputs(tokens, k, seed):
    """Correlated tokens ``[T, K]`` fp64 with a few loud channels."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=rng).double() * torch.arange(1, k + 1).pow(-0.7)
    loud = torch.randn(k, generator=rng).double().mul(0.7).exp()
    x = torch.randn(tokens, k, generator=rng).double() @ mix.T
    return (x + 0.1 * torch.randn(tokens, k, generator=rng)) * loud


def example(experts=2, rows=12, k=32, tokens=256, seed=0, dtype=torch.float64):
    moments = SecondMoments(experts, k, dtype=dtype)
    for expert in range(experts):
        moments.add(expert, inputs(tokens, k, 100 * seed + expert))
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(experts, rows, k, generator=rng), moments.shrunk()


def plain(matrix):
    """A Hessian from a matrix ``[E, K, K]`` as it is."""
    experts, k = matrix.shape[:2]
    dead = torch.zeros(experts, k, dtype=torch.bool)
    return Hessian(matrix, dead, torch.full((experts,), 9999), ((),) * experts)


def relative_error(weight, pruned, hessian):
    """``tr((W-Q) H (W-Q)^T) / tr(W H W^T)`` of each expert, from the definition."""
    h, dense, lost = hessian.matrix.double(), weight.double(), weight.double() - pruned.double()
    return (lost @ h * lost).sum((1, 2)) / (dense @ h * dense).sum((1, 2))


def assert_of_pattern(result, pattern):
    for expert in range(len(result.weight)):
        encode(result.weight[expert], result.mask[expert], pattern)  # refuses all else
    assert not result.weight[~result.mask].any()


# --- all methods


@pytest.mark.parametrize("text", PATTERNS)
@one_of_each
def test_result_is_of_the_pattern_and_its_error_true(name, refined, text):
    pattern = SparsityPattern.parse(text)
    weight, hessian = example()
    result = prune_experts(weight, pattern, hessian, method=name, refine=refined)
    assert_of_pattern(result, pattern)
    torch.testing.assert_close(result.error, relative_error(weight, result.weight, hessian))


@settings(max_examples=25)
@given(data=st.data())
def test_whatever_the_shape_and_the_data(data):
    """Few tokens, dead inputs, outliers, all dtypes: exactly the pattern, and refining helps."""
    m = data.draw(st.integers(1, 5))
    pattern = SparsityPattern(
        data.draw(st.integers(1, m)), m, data.draw(st.sampled_from((4, 8, 24)))
    )
    name = data.draw(st.sampled_from([name for name in METHODS if name != "best"]))
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    moments = SecondMoments(2, 24, shared_inputs=data.draw(st.booleans()))
    for expert in range(2):
        x = torch.randn(data.draw(st.integers(0, 40)), 24, generator=rng)
        x[:, data.draw(st.integers(0, 23))] *= data.draw(st.sampled_from((0, 1, 100)))
        moments.add(expert, x)
    weight = torch.randn(2, 2 * m, 24, generator=rng).to(dtype)
    hessian = moments.shrunk()
    with mock.patch.multiple(admm, STEPS=12, HOLD=4):
        result, better = (
            prune_experts(weight, pattern, hessian, method=name, refine=refined)
            for refined in (False, True)
        )
    for found in (result, better):
        assert_of_pattern(found, pattern)
        assert found.weight.dtype == dtype
        assert found.weight.isfinite().all()
    assert (better.error <= result.error).all()


@pytest.mark.parametrize("text", ["1:2:8", "1:2:32", "2:4"])
def test_errors_fall_with_the_effort(text):
    """In the mean over six experts; refinement helps each of them."""
    pattern = SparsityPattern.parse(text)
    totals = dict.fromkeys(EVERY, 0.0)
    for seed in range(3):
        weight, hessian = example(rows=16, k=64, seed=seed)
        errors = {
            (name, refined): prune_experts(
                weight, pattern, hessian, method=name, refine=refined
            ).error
            for name, refined in EVERY
        }
        for name in ("magnitude", "wanda", "sparsegpt", "admm"):
            assert (errors[name, True] < errors[name, False]).all()
        for name in ("sparsegpt", "admm"):  # best takes the better of them, block by block
            assert (errors["best", True] <= errors[name, True]).all()
        assert (errors["admm", False] < errors["wanda", False]).all()
        for key, error in errors.items():
            totals[key] += float(error.mean())
    order = [("magnitude", False), ("wanda", False), ("sparsegpt", False), ("admm", False)]
    for worse, good in itertools.pairwise((*order, ("admm", True), ("best", True))):
        assert totals[worse] > totals[good]
    assert totals["wanda", True] > totals["admm", True]


@one_of_each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_no_more_than_rounding(name, refined, dtype):
    pattern = SparsityPattern(1, 2, 16)
    weight, hessian = example(dtype=torch.float32)
    weight = weight.to(dtype)
    result, exact = (
        prune_experts(w, pattern, hessian, method=name, refine=refined)
        for w in (weight, weight.float())
    )
    assert result.weight.dtype == dtype
    assert (result.error <= exact.error * 1.05 + 1e-3).all()


@one_of_each
def test_repeats_to_the_bit_and_leaves_its_inputs_alone(name, refined):
    weight, hessian = example(dtype=torch.float32)
    before, moments = weight.clone(), hessian.matrix.clone()
    first, second = (
        prune_experts(weight, SparsityPattern(1, 2, 8), hessian, method=name, refine=refined)
        for _ in range(2)
    )
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(first.error, second.error)
    assert torch.equal(weight, before)
    assert torch.equal(hessian.matrix, moments)


@one_of_each
@pytest.mark.parametrize("text", ["1:2:32", "2:4"])
def test_chunks_of_experts_change_nothing(name, refined, text):
    pattern = SparsityPattern.parse(text)
    weight, hessian = example(experts=5, rows=32, k=64, dtype=torch.float32)
    weight = weight.bfloat16()
    hessian.matrix[3] -= 5 * hessian.diagonal[3].diag()  # nothing can factor it
    hessian.matrix[3].diagonal().neg_()
    results = [
        prune_experts(weight, pattern, hessian, method=name, refine=refined, memory=memory)
        for memory in (1, 3 * peak_memory(1, 32, 64, name, refined), 1 << 40)
    ]
    for other in results[1:]:
        assert torch.equal(results[0].weight, other.weight)
        assert torch.equal(results[0].mask, other.mask)
        assert torch.equal(results[0].error, other.error)
        assert results[0].notes == other.notes


def test_chunks_are_of_nearly_equal_size():
    assert experts_at_once(64, 100, 10, 20) == 10
    assert experts_at_once(64, 100, 60, 64) == 11  # 11 fit: six chunks
    assert experts_at_once(8, 10, 20, 30) == 1  # one does not fit, yet must be done
    assert experts_at_once(8, 1000, 20, 30) == 8
    assert experts_at_once(9, 85, 10, 20) == 5  # 8 fit: two chunks


@pytest.mark.parametrize("text", ["1:2:32", "1:2:256", "2:4"])
@one_of_each
def test_peak_memory_is_an_upper_bound(name, refined, text):
    weight, hessian = example(2, 384, 256, dtype=torch.float32)
    pattern = SparsityPattern.parse(text)
    v = 1 if pattern.v is None else pattern.v
    with mock.patch.multiple(admm, STEPS=2, HOLD=1), MemoryMeter() as meter:
        result = prune_experts(weight, pattern, hessian, method=name, refine=refined)
    found = meter.peak - 5 * result.weight.numel()  # the result, fp32 and a mask
    bound = peak_memory(2, 384, 256, name, refined, sub_row=v)
    assert found < bound < 3.5 * found


@pytest.mark.parametrize("name", CALIBRATED)
def test_dead_inputs_lose_their_weights(name):
    moments = SecondMoments(1, 32)
    x = inputs(100, 32, 0)
    x[:, [2, 9, 10, 11, 20]] = 0
    moments.add(0, x)
    weight = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    pattern = SparsityPattern(1, 2, 8)
    result = prune_experts(weight, pattern, moments.shrunk(), method=name)
    assert not result.weight[..., [2, 9, 10, 11, 20]].any()
    assert_of_pattern(result, pattern)
    lost = (weight - result.weight)[0].double() @ x.T  # what the tokens see
    seen = (weight[0].double() @ x.T).square().sum()
    # the diagonal is a little larger than the tokens': moments are shrunk towards the layer's
    assert float(result.error[0]) == pytest.approx(float(lost.square().sum() / seen), rel=1e-3)


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("shared", [True, False])  # gate and up, down
def test_starved_experts_are_pruned_and_noted(name, tokens, shared):
    moments = SecondMoments(2, 32, shared_inputs=shared)
    moments.add(0, inputs(400, 32, 0))
    moments.add(1, inputs(tokens, 32, 1))
    weight = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    pattern = SparsityPattern(1, 2, 8)
    result = prune_experts(weight, pattern, moments.shrunk(), method=name, refine=True)
    assert result.weight.isfinite().all()
    assert (result.error < 1).all()
    assert len(result.notes[1]) >= 1
    assert_of_pattern(result, pattern)


@one_of_each
def test_without_any_token_it_is_magnitude(name, refined):
    weight = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    pattern = SparsityPattern(1, 2, 8)
    moments = SecondMoments(2, 32).shrunk()
    result = prune_experts(weight, pattern, moments, method=name, refine=refined)
    magnitude = prune_experts(weight, pattern, None, method="magnitude")
    # all inputs are dead to the moments, yet the weights must stay
    assert torch.equal(result.mask, magnitude.mask)
    torch.testing.assert_close(result.weight, magnitude.weight)
    torch.testing.assert_close(result.error, magnitude.error)


@one_of_each
def test_singular_moments(name, refined):
    """Rank 2 of 32, and no shrinkage: damping and rho make it solvable."""
    x = inputs(2, 32, 0)
    hessian = plain((x.T @ x).expand(2, 32, 32).float().contiguous())
    weight = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    pattern = SparsityPattern(1, 2, 8)
    result = prune_experts(weight, pattern, hessian, method=name, refine=refined)
    assert result.weight.isfinite().all()
    assert (result.error >= 0).all()
    assert (result.error < 1).all()


@one_of_each
def test_zero_weights_have_no_error(name, refined):
    _, hessian = example()
    pattern = SparsityPattern(1, 2, 8)
    result = prune_experts(torch.zeros(2, 12, 32), pattern, hessian, method=name, refine=refined)
    assert result.error.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", CALIBRATED)
def test_refused_inputs(name):
    weight, hessian = example()
    pattern = SparsityPattern(1, 2, 8)
    with pytest.raises(CalibrationError, match=r"needs calibration data for gate.*'magnitude'"):
        prune_experts(weight, pattern, None, method=name, name="gate")
    with pytest.raises(CalibrationError, match=r"\[2, 24, 24\], found \[2, 32, 32\]"):
        prune_experts(weight[..., :24], pattern, hessian, method=name)
    with pytest.raises(CalibrationError, match=r"\[E, O, K\], found \[12, 32\]"):
        prune_experts(weight[0], pattern, hessian, method=name)
    with pytest.raises(PatternError, match="M must divide"):
        prune_experts(weight[:, :11], pattern, hessian, method=name)
    weight[1, 2, 3] = float("inf")
    with pytest.raises(CheckpointError, match="found inf in row 2 of matrix 1, column 3"):
        prune_experts(weight, pattern, hessian, method=name, memory=1)


def test_magnitude_needs_data_only_to_be_refined():
    weight, hessian = example()
    pattern = SparsityPattern(1, 2, 8)
    alone = prune_experts(weight, pattern, None, method="magnitude")
    assert torch.equal(alone.mask, prune_experts(weight, pattern, hessian, method="magnitude").mask)
    eye = plain(torch.eye(32).expand(2, 32, 32))
    torch.testing.assert_close(alone.error, relative_error(weight, alone.weight, eye))
    with pytest.raises(CalibrationError, match="'magnitude' with refine needs calibration data"):
        prune_experts(weight, pattern, None, method="magnitude", refine=True)


# --- wanda, the factor, the sweep


def test_wanda_equals_a_plain_score():
    weight, hessian = example()
    pattern = SparsityPattern(1, 2, 8)
    result = prune_experts(weight, pattern, hessian, method="wanda")
    for expert in range(2):
        norms = torch.tensor([float(hessian.matrix[expert, j, j]) ** 0.5 for j in range(32)])
        assert torch.equal(result.mask[expert], project(weight[expert].abs() * norms, pattern))
    assert torch.equal(result.weight, weight * result.mask)  # not even rounded


def test_factor_of_the_inverse():
    weight, hessian = example(experts=3)
    problem = Problem.of(weight, SparsityPattern(1, 2, 8), hessian)
    matrix, root = problem.matrix, problem.root
    torch.testing.assert_close(matrix.diagonal(dim1=1, dim2=2), torch.ones(3, 32).double())
    torch.testing.assert_close(matrix * root * root.mT, hessian.matrix)
    torch.testing.assert_close(problem.weight, weight * root)
    factor, used = inverse_factor(matrix)
    assert used == [DAMPINGS[0]] * 3
    assert not factor.tril(-1).any()
    inverse = torch.linalg.inv(matrix + DAMPINGS[0] * torch.eye(32))
    torch.testing.assert_close(factor.mT @ factor, inverse)


def loop_sweep(weight, matrix, pattern):
    """The sweep of one matrix ``[O, K]``: inverse by inverse, pair by pair, row by row."""
    rows, k = weight.shape
    v = pattern.sub_row(k)
    root = matrix.diagonal().sqrt()
    h = matrix / root[:, None] / root[None, :] + 0.01 * torch.eye(k).double()
    w, mask = weight.double() * root, torch.zeros(rows, k, dtype=torch.bool)
    # removing one weight now: the corner of the inverse of what is left
    cost = torch.tensor([float(torch.linalg.inv(h[j:, j:])[0, 0]) for j in range(k)])
    kept = {}
    for j in range(0, k, 4):
        if j % v == 0:
            score = w.square() / cost
            for top in range(0, rows, pattern.m):
                sums = {
                    row: sum(
                        sum(sorted(score[row, c : c + 4].tolist())[2:]) for c in range(j, j + v, 4)
                    )
                    for row in range(top, top + pattern.m)
                }
                for row in sums:
                    kept[row] = row in sorted(sums, key=lambda r: -sums[r])[: pattern.n]
        inverse = torch.linalg.inv(h[j:, j:])  # of what is left, this group first
        for row in range(rows):
            best = None
            for removed in itertools.combinations(range(4), 2) if kept[row] else [(0, 1, 2, 3)]:
                some = list(removed)
                values = torch.linalg.solve(inverse[some][:, some], w[row, [j + c for c in some]])
                loss = float(values @ w[row, [j + c for c in some]])
                if best is None or loss < best[0]:
                    best = loss, some, values
            _, some, values = best
            w[row, j:] -= values @ inverse[some]
            mask[row, j : j + 4] = True
            mask[row, [j + c for c in some]] = False
    return w / root, mask


@pytest.mark.parametrize("text", ["1:2:8", "1:2:32", "2:3:16", "2:4", "1:4:4"])
@pytest.mark.parametrize("block", [128, 8])
def test_sweep_equals_plain_loops(text, block):
    pattern = SparsityPattern.parse(text)
    weight, hessian = example()
    weight = weight.double()
    with mock.patch.object(groups, "BLOCK", block):
        result = prune_experts(weight, pattern, hessian, method="sparsegpt")
    for expert in range(2):
        expected, mask = loop_sweep(weight[expert], hessian.matrix[expert], pattern)
        assert torch.equal(result.mask[expert], mask)
        torch.testing.assert_close(result.weight[expert], expected * mask)


def test_damping_rises_and_then_wanda_takes_over():
    """Expert 1 is a little indefinite, expert 2 beyond all damping."""
    weight, hessian = example(experts=3)
    matrix = hessian.matrix.clone()
    eye, ones = torch.eye(32).double(), torch.ones(32, 32).double()
    values, vectors = torch.linalg.eigh(0.5 * eye + 0.5 * ones)
    values[0] = -0.05
    matrix[1] = vectors @ values.diag() @ vectors.T
    matrix[2] = -3 * ones + 4 * eye
    broken, pattern = plain(matrix), SparsityPattern(1, 2, 8)
    result = prune_experts(weight, pattern, broken, method="sparsegpt")
    assert result.notes[0] == ()
    assert "damping raised to 0.1" in result.notes[1][0]
    assert "sparsegpt could not factor the moments: pruned by wanda" in result.notes[2][0]
    fallback = prune_experts(weight, pattern, broken, method="wanda")
    torch.testing.assert_close(result.weight[2], fallback.weight[2])
    alone = prune_experts(weight, pattern, hessian, method="sparsegpt")
    assert torch.equal(result.weight[0], alone.weight[0])


# --- ADMM


def test_admm_equals_plain_loops():
    weight, hessian = example(experts=1, seed=3)
    pattern = SparsityPattern(1, 2, 8)
    root = hessian.matrix[0].diagonal().sqrt()
    h = hessian.matrix[0] / root[:, None] / root[None, :]
    w = weight[0].double() * root
    mask, u = project(w, pattern), torch.zeros_like(w)
    z = w * mask
    for step in range(admm.STEPS):
        if step % admm.HOLD == 0:
            rho = admm.RHO * admm.GROWTH**step
            u = u / admm.GROWTH**admm.HOLD if step else u
        x = (w @ h + rho * (z - u)) @ torch.linalg.inv(h + rho * torch.eye(32).double())
        mask = project(x + u, pattern)
        z = (x + u) * mask
        u = u + x - z
    problem = Problem.of(weight.double(), pattern, hessian)
    found = admm.admm(problem)
    # the first projection was worse everywhere, so that nothing of it is here
    assert torch.equal(found.mask[0], mask)
    torch.testing.assert_close(found.weight[0], z)


def test_admm_falls_back_for_the_broken_expert_alone():
    weight, hessian = example()
    matrix = hessian.matrix.clone()
    matrix[1, 0, 1] = matrix[1, 1, 0] = float("nan")
    pattern = SparsityPattern(1, 2, 8)
    broken = Problem.of(weight, pattern, plain(matrix))
    found = admm.admm(broken)
    assert "admm could not factor the moments: pruned by wanda" in found.notes[1][-1]
    assert torch.equal(found.mask[1], wanda(broken).mask[1])
    alone = admm.admm(Problem.of(weight[:1], pattern, hessian.select(slice(1))))
    assert torch.equal(found.weight[0], alone.weight[0])


# --- refinement


@pytest.mark.parametrize("text", ["1:2:8", "2:4"])
def test_refinement_reaches_least_squares_on_the_mask(text):
    pattern = SparsityPattern.parse(text)
    x = inputs(200, 32, 0)
    hessian = plain((x.T @ x).unsqueeze(0) / 200)
    weight = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0)).double()
    problem = Problem.of(weight, pattern, hessian)
    start = wanda(problem)
    result = settle(problem, refine(problem, start, steps=100, rounds=0))
    assert torch.equal(result.mask, start.mask)
    for row in range(8):
        kept = start.mask[0, row]
        exact = torch.linalg.lstsq(x[:, kept], (x @ weight[0, row]).unsqueeze(1)).solution[:, 0]
        torch.testing.assert_close(result.weight[0, row, kept], exact, rtol=1e-6, atol=1e-8)


def loop_swap(w, h, pattern, q):
    """One pass of local search over one matrix ``[O, K]`` in scaled coordinates."""
    rows, k = w.shape
    v = pattern.sub_row(k) if pattern.n < pattern.m else 8
    q = q.clone()

    def loss(row, new):
        lost = w[row] - new
        return float(lost @ h @ lost)

    def best_group(row, new, left):
        found = None
        for pair in itertools.combinations(range(left, left + 4), 2):
            kept = list(pair)
            tried = new.clone()
            tried[left : left + 4] = 0
            some = h[kept][:, kept] + 1e-5 * torch.eye(2)
            tried[kept] = torch.linalg.solve(some, ((w[row] - tried) @ h)[kept])
            if found is None or loss(row, tried) < found[0]:
                found = loss(row, tried), tried
        return found[1]

    for start in range(0, k, v):
        tried, saved = q.clone(), {}
        for row in range(rows):
            for _ in range(2):
                for left in range(start, start + v, 4):
                    tried[row] = best_group(row, tried[row], left)
            without = tried[row].clone()
            without[start : start + v] = 0
            saved[row] = loss(row, without) - loss(row, tried[row])
        for top in range(0, rows, pattern.m):
            block = range(top, top + pattern.m)
            stays = sorted(block, key=lambda row: -saved[row])[: pattern.n]
            for row in block:
                q[row, start : start + v] = tried[row, start : start + v] * (row in stays)
    return q


@pytest.mark.parametrize("text", ["1:2:8", "2:3:16", "2:2:8"])
def test_local_search_equals_plain_loops(text):
    pattern = SparsityPattern.parse(text)
    weight, hessian = example(rows=6)
    problem = Problem.of(weight.double(), pattern, hessian)
    found = sparsegpt(problem)
    q, mask = found.scaled(problem), found.mask.clone()
    before = row_losses(problem, q)
    swap(problem, pattern, q, mask)
    assert not torch.equal(mask, found.mask)
    for expert in range(2):
        start = found.scaled(problem)[expert]
        expected = loop_swap(problem.weight[expert], problem.matrix[expert], pattern, start)
        torch.testing.assert_close(q[expert], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(mask[expert], expected != 0)
    blocks = (2, -1, pattern.m)
    lost = row_losses(problem, q).view(blocks).sum(-1)
    assert (lost <= before.view(blocks).sum(-1) * (1 + 1e-9)).all()


def test_choice_of_the_better_result_for_each_block():
    weight, hessian = example()
    pattern = SparsityPattern(1, 2, 8)
    problem = Problem.of(weight, pattern, hessian)
    poor, good = (settle(problem, find(problem)) for find in (wanda, sparsegpt))
    poor = dataclasses.replace(poor, notes=((), ()))
    nobody = good.lost.clone().fill_(float("nan"))
    mixed = good.lost.clone()
    mixed[0, :2] = 1e9  # the first block of the first expert
    chosen = better(problem, poor, dataclasses.replace(good, lost=mixed, notes=(("a",), ("b",))))
    assert torch.equal(chosen.weight[0, :2], poor.weight[0, :2])
    assert chosen.notes == (("a",), ("b",))
    for first, second in ((poor, good), (good, poor)):
        best = better(problem, first, second)
        lost = best.lost.view(2, 6, 2).sum(-1)
        for other in (poor, good):
            assert (lost <= other.lost.view(2, 6, 2).sum(-1)).all()
        torch.testing.assert_close(best.lost, row_losses(problem, best.weight * problem.root))
    kept = better(problem, poor, dataclasses.replace(good, lost=nobody))
    assert torch.equal(kept.weight, poor.weight)
