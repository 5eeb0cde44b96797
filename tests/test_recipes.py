"""Every shipped recipe loads, and its pattern fits the model that it is for."""

import re
from pathlib import Path

import pytest
import yaml

from samoyeds_hf import SamoyedsConfig

RECIPES = sorted((Path(__file__).parents[1] / "configs" / "recipes").glob("*.yaml"))


def test_one_for_each_model():
    assert [path.stem for path in RECIPES] == [
        "deepseek-moe-16b",
        "deepseek-v2-lite",
        "deepseek-v3",
        "minicpm-moe-8x2b",
        "mixtral-8x22b",
        "mixtral-8x7b",
        "openmoe-34b",
        "qwen1.5-moe-a2.7b",
        "qwen2-57b-a14b",
        "qwen3-30b-a3b",
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    config = SamoyedsConfig.from_recipe(path)
    text = path.read_text()
    assert yaml.safe_load(text)["pattern"] == str(config.pattern)
    assert config.method == "best"
    assert config.calibration is None  # whose text it is to be good at, its user knows

    # the arithmetic of the comment: shapes that the pattern divides, bytes that it gives
    shapes = re.search(r"hidden (\d+), expert (\d+), (\d+) experts, .* MoE in (\d+) of", text)
    sizes = re.search(r"experts ([\d.]+) GB -> ([\d.]+) GB", text)
    hidden, expert, num_experts, layers = map(int, shapes.groups())
    projections = [(2 * expert, hidden), (hidden, expert)]
    dense_bytes, stored_bytes = 0, 0
    for rows, k in projections:
        config.pattern.check_fits(rows, k)
        dense_bytes += layers * num_experts * rows * k * 2
        stored_bytes += layers * num_experts * config.pattern.num_bytes(rows, k, element_size=2)
    assert float(sizes[1]) == pytest.approx(dense_bytes / 1e9, abs=0.5)
    assert float(sizes[2]) == pytest.approx(stored_bytes / 1e9, abs=0.5)
