"""VENOM and unstructured masks against plain loops, and through every method."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from samoyeds_hf.errors import PatternError
from samoyeds_hf.pruning import METHODS, SecondMoments, admm, prune_experts

_FILE = Path(__file__).parents[1] / "scripts" / "lab" / "mask_patterns.py"


@pytest.fixture(scope="module")
def patterns() -> Any:
    """The module, by its path: scripts are no package."""
    spec = importlib.util.spec_from_file_location("mask_patterns_under_test", _FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def loop_venom(x, v, columns):
    """The best mask ``[rows, k]`` by trying all choices of 4 columns for a block."""
    rows, k = x.shape
    mask = torch.zeros(rows, k, dtype=torch.bool)
    for top, left in itertools.product(range(0, rows, v), range(0, k, columns)):
        best = None
        for chosen in itertools.combinations(range(left, left + columns), 4):
            kept = {
                row: sorted(chosen, key=lambda c: (-abs(float(x[row, c])), c))[:2]
                for row in range(top, top + v)
            }
            energy = sum(float(x[row, c]) ** 2 for row, cs in kept.items() for c in cs)
            if best is None or energy > best[0]:
                best = energy, kept
        for row, chosen in best[1].items():
            mask[row, chosen] = True
    return mask


@pytest.mark.parametrize(("v", "columns"), [(4, 8), (1, 8), (6, 4), (2, 12)])
@pytest.mark.parametrize("high", [2, 1000])  # many ties, none
def test_venom_is_the_best_of_all_masks(patterns, v, columns, high):
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(-high, high + 1, (12, 24), generator=rng).float()
    found = patterns.Venom(v, 2, columns).project(x)
    assert torch.equal(found, loop_venom(x, v, columns))


@pytest.mark.parametrize("high", [2, 1000])
def test_unstructured_keeps_the_largest_of_each_row(patterns, high):
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(-high, high + 1, (12, 24), generator=rng).float()
    found = patterns.Unstructured(0.75).project(x)
    for row in range(12):
        largest = sorted(range(24), key=lambda c: (-abs(float(x[row, c])), c))[:6]
        assert sorted(largest) == found[row].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("text", ["venom", "unstructured"])
def test_every_method_prunes_to_them(patterns, name, text):
    pattern = patterns.Venom(8, 2, 8) if text == "venom" else patterns.Unstructured(0.75)
    rng = torch.Generator().manual_seed(0)
    moments = SecondMoments(2, 32, dtype=torch.float64)
    for expert in range(2):
        mix = torch.randn(32, 32, generator=rng)
        moments.add(expert, torch.randn(200, 32, generator=rng) @ mix)
    weight = torch.randn(2, 16, 32, generator=rng)
    with mock.patch.multiple(admm, STEPS=30, HOLD=6):
        plain, refined = (
            prune_experts(weight, pattern, moments.shrunk(), method=name, refine=refine)
            for refine in (False, True)
        )
    assert (refined.error <= plain.error).all()
    assert (refined.error < plain.error).any() or name == "best"
    for result in (plain, refined):
        assert not result.weight[~result.mask].any()
        assert (result.mask.sum(dim=-1) == 8).all()
        if text == "venom":
            blocks = result.mask.view(2, 2, 8, 4, 8)
            assert (blocks.any(dim=2).sum(dim=-1) <= 4).all()
            assert (blocks.sum(dim=-1) == 2).all()


def test_names_and_refusals(patterns):
    assert str(patterns.Venom(64, 2, 8)) == "venom:64:2:8"
    assert str(patterns.Unstructured(0.75)) == "unstructured:0.75"
    assert patterns.Venom().density == patterns.Unstructured().density == 0.25
    for arguments in ((64, 3, 8), (64, 2, 6), (0, 2, 8)):
        with pytest.raises(PatternError, match="VENOM here needs"):
            patterns.Venom(*arguments)
    with pytest.raises(PatternError, match="above 0 and below 1"):
        patterns.Unstructured(1.0)
    with pytest.raises(PatternError, match=r"multiple of 64 and columns of 8, found \[32, 64\]"):
        patterns.Venom().check_fits(32, 64)
    with pytest.raises(PatternError, match="in fours"):
        patterns.Unstructured().check_fits(32, 63)
