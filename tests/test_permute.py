"""Orders of the intermediate dimension: the function stays, and what is kept grows."""

import copy
import re
from pathlib import Path

import pytest
import torch
from checkpoints import save_dense
from helpers import silu_gate
from tiny_models import BY_NAME, PATTERN, logits, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from samoyeds_hf import SamoyedsConfig, SparsityPattern
from samoyeds_hf.convert import convert_checkpoint
from samoyeds_hf.errors import PatternError
from samoyeds_hf.pruning import Pruned, SecondMoments, permute, prune_experts
from samoyeds_hf.pruning.calibration import CalibrationData
from samoyeds_hf.pruning.layer import PruneSettings
from samoyeds_hf.pruning.permute import Down, pairing, permute_intermediate, search_of
from samoyeds_hf.pruning.projection import project
from samoyeds_hf.pruning.walk import prune_model
from samoyeds_hf.selection import select


def example(experts=2, neurons=32, k=32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(experts, 2 * neurons, k, generator=rng).exp()
    down = torch.randn(experts, k, neurons, generator=rng).exp()
    moments = SecondMoments(experts, k)
    for expert in range(experts):
        moments.add(expert, torch.randn(100, k, generator=rng).exp())
    squares = torch.rand(experts, neurons, generator=rng)
    return gate_up, down, moments.shrunk(), squares


def share_kept(weight, squares, pattern):
    """What Wanda's mask keeps of ``W^2 H_jj``, from the definition, ``[E]``."""
    scores = weight * squares.sqrt().unsqueeze(1)
    masks = torch.stack([project(score, pattern) for score in scores])
    return (scores.square() * masks).sum((1, 2)) / scores.square().sum((1, 2))


def kept_in_order(order, gate_up, down, hessian, squares, pattern, down_pattern):
    ordered, columns = permute_intermediate(gate_up, down, order)
    found = share_kept(ordered, hessian.diagonal, pattern)
    return found + share_kept(columns, squares.gather(1, order), down_pattern)


@pytest.mark.parametrize(
    ("text", "down_text"),
    [
        ("1:2:8", "1:2:8"),
        ("2:4", "2:4"),
        ("1:2:8", "2:4"),
        ("2:4", "1:2:16"),
        ("4:8:4", "2:4"),  # a block of rows is longer than a group of columns
        ("3:4:16", "2:4:8"),
    ],
)
def test_more_is_kept_by_exactly_what_the_search_counted(text, down_text, monkeypatch):
    pattern, down_pattern = SparsityPattern.parse(text), SparsityPattern.parse(down_text)
    gate_up, down, hessian, squares = example()
    copies = [tensor.clone() for tensor in (gate_up, down, hessian.matrix, squares)]
    counted = torch.zeros(2)
    search = permute._search

    def counting(order, sides, region, tries, seed):
        take = sides[-1].take

        def remember(accepted):
            pairs = accepted[:, : accepted.shape[1] // 2]  # both neurons of each
            counted.add_((last["gain"] * pairs).sum(dim=1))
            take(accepted)

        last = {}
        gains = [side.gain for side in sides]

        def first(*args):
            last["gain"] = gains[0](*args)
            return last["gain"]

        def others(gain):
            def call(*args):
                found = gain(*args)
                last["gain"] = last["gain"] + found
                return found

            return call

        sides[0].gain = first
        for side, gain in zip(sides[1:], gains[1:], strict=True):
            side.gain = others(gain)
        sides[-1].take = remember
        search(order, sides, region, tries, seed)

    monkeypatch.setattr(permute, "_search", counting)
    order = pairing(gate_up, pattern, hessian, down=Down(down, down_pattern, squares), tries=8)
    identity = torch.arange(32).repeat(2, 1)
    before, after = (
        kept_in_order(o, gate_up, down, hessian, squares, pattern, down_pattern)
        for o in (identity, order)
    )
    assert (after > before).all()
    torch.testing.assert_close(after - before, counted, rtol=1e-3, atol=1e-5)
    for tensor, before_it in zip((gate_up, down, hessian.matrix, squares), copies, strict=True):
        assert torch.equal(tensor, before_it)


def test_complementary_rows_become_neighbours():
    """Neurons need the left or the right half; neighbours that need the same one are bad."""
    gate_up = torch.full((1, 32, 16), 0.01)
    gate_up[:, :8, :8] = gate_up[:, 16:24, :8] = 1  # gate and up of the first 8 neurons
    gate_up[:, 8:16, 8:] = gate_up[:, 24:, 8:] = 1
    moments = SecondMoments(1, 16)
    moments.add(0, torch.eye(16))
    order = pairing(gate_up, SparsityPattern(1, 2, 8), moments.shrunk())
    halves = (order.view(8, 2) // 8).sort(dim=1).values
    assert torch.equal(halves, torch.tensor([[0, 1]]).expand(8, -1))
    pruned = [
        prune_experts(w, SparsityPattern(1, 2, 8), None, method="magnitude")
        for w in (gate_up, permute_intermediate(gate_up, torch.zeros(1, 8, 16), order)[0])
    ]
    assert float(pruned[0].error) == pytest.approx(0.75, abs=0.01)
    assert float(pruned[1].error) == pytest.approx(0.5, abs=0.01)


def expert(x, gate_up, down, gate):
    return gate(x @ gate_up.mT) @ down.mT


def relu_gate(both):
    gate, up = both.chunk(2, dim=-1)
    return gate.relu() * up


def test_the_expert_computes_the_same():
    """To the bit where sums are exact, which those of small integers are in any order."""
    rng = torch.Generator().manual_seed(0)
    gate_up, down, _, _ = example()
    order = torch.stack([torch.randperm(32, generator=rng) for _ in range(2)])
    x = torch.randn(2, 5, 32, generator=rng).double()
    for dtype in (torch.float32, torch.bfloat16):
        moved = permute_intermediate(gate_up.to(dtype), down.to(dtype), order)
        before, after = (
            expert(x, *(w.double() for w in weights), silu_gate)
            for weights in ((gate_up.to(dtype), down.to(dtype)), moved)
        )
        torch.testing.assert_close(after, before)
    integers = [tensor.mul(4).round().double() for tensor in (gate_up, down)]
    moved = permute_intermediate(*integers, order)
    assert not torch.equal(moved[1], integers[1])
    whole = x.mul(4).round()
    assert torch.equal(expert(whole, *moved, relu_gate), expert(whole, *integers, relu_gate))


def test_orders_that_change_nothing():
    gate_up, down, hessian, squares = example()
    identity = torch.arange(32).repeat(2, 1)
    two_of_four = SparsityPattern(1, 1)
    assert torch.equal(pairing(gate_up, two_of_four, hessian), identity)
    one_block = SparsityPattern(1, 16, 8)
    assert not torch.equal(pairing(gate_up, one_block, hessian), identity)
    assert torch.equal(pairing(gate_up[:, :32], one_block, hessian), identity[:, :16])
    # of 24 rows in blocks of 8, the second lies over the border of gate and up
    over = pairing(gate_up[:, :24], SparsityPattern(1, 8, 8), hessian)
    assert torch.equal(over, identity[:, :12])
    whole = Down(down, SparsityPattern(1, 2, 32), squares)  # a single Sub-Row
    assert torch.equal(pairing(gate_up, two_of_four, hessian, down=whole), identity)
    assert torch.equal(pairing(gate_up, SparsityPattern(1, 2, 8), hessian, tries=0), identity)


def test_the_same_order_every_time():
    gate_up, down, hessian, squares = example()
    pattern = SparsityPattern(1, 2, 8)
    rest = Down(down, pattern, squares)
    first, second, other = (
        pairing(gate_up, pattern, hessian, down=rest, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_refusals():
    gate_up, down, hessian, squares = example()
    pattern = SparsityPattern(1, 2, 8)
    with pytest.raises(PatternError, match=r"down must be \[2, H, 32\], found \[2, 32, 16\]"):
        pairing(gate_up, pattern, hessian, down=Down(down[..., :16], pattern, squares))
    with pytest.raises(PatternError, match="V must divide"):
        pairing(gate_up, SparsityPattern(1, 2, 12), hessian)
    with pytest.raises(PatternError, match=r"needs gate_up \[2, 64, H\]"):
        permute_intermediate(gate_up[:, :32], down, torch.arange(32).repeat(2, 1))
    with pytest.raises(PatternError, match="must name each once"):
        permute_intermediate(gate_up, down, torch.zeros(2, 32, dtype=torch.int64))


# --- in a model ------------------------------------------------------------------------------


def whole(weight: torch.Tensor, *_: object, **__: object) -> Pruned:
    """Prunes nothing."""
    everything = torch.ones_like(weight, dtype=torch.bool)
    zeros = torch.zeros(len(weight), dtype=torch.float64)
    return Pruned(weight, everything, zeros, ((),) * len(weight))


class Counting(TorchDispatchMode):
    """Operations, without views, and the elements that they read or write."""

    VIEWS = re.compile("view|_unsafe_view|expand|unsqueeze|unbind|t|transpose|slice|select")

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self.VIEWS.fullmatch(name):
            # of what is looked up, or replaced in place, only as much as there is of it
            touched = {"index_select": (out, out), "index_copy_": args[-1:] * 2}.get(
                name, (args, out)
            )
            tensors = [leaf for leaf in tree_leaves(touched) if isinstance(leaf, torch.Tensor)]
            self.calls += 1
            self.elements += sum(tensor.numel() for tensor in tensors)
        return out


@pytest.mark.parametrize(
    ("experts", "neurons", "hidden", "pattern", "of_down"),
    [
        (4, 256, 128, "1:2:64", "1:2:64"),
        (4, 256, 128, "2:4", "2:4"),  # gate and up have no say
        (8, 128, 256, "1:2:32", "2:4"),
        (4, 96, 64, "8:16:32", "8:16:32"),
    ],
)
def test_what_a_search_takes_is_known_from_shapes(
    experts: int, neurons: int, hidden: int, pattern: str, of_down: str
) -> None:
    gate_up, weight, hessian, squares = example(experts, neurons, hidden)
    kinds = SparsityPattern.parse(pattern), SparsityPattern.parse(of_down)
    found = []
    for tries in (1, 2):
        with Counting() as counting:
            down = Down(weight, kinds[1], squares)
            pairing(gate_up, kinds[0], hessian, down=down, tries=tries)
        found.append(counting)
    expected = search_of(experts, neurons, hidden, *kinds)
    calls = permute.TRIES * (found[1].calls - found[0].calls)
    elements = permute.TRIES * (found[1].elements - found[0].elements)
    assert calls == pytest.approx(expected.calls, rel=0.3)
    assert elements == pytest.approx(expected.elements, rel=0.3)


def test_where_no_order_is_better_nothing_is_searched() -> None:
    kinds = SparsityPattern.parse("2:4"), SparsityPattern.parse("1:2:128")
    assert search_of(4, 128, 64, *kinds).calls == 0  # a single region of down


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("moments_bytes", [1, 10**9])  # expert by expert, all at once
def test_a_walk_reorders_and_the_model_does_what_it_did(
    asymmetric: bool, moments_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samoyeds_hf.pruning.layer.prune_experts", whole)
    model = BY_NAME["qwen2_moe"].make()
    dense = copy.deepcopy(model)
    patterns = select(model, SamoyedsConfig(PATTERN)).targets
    settings = PruneSettings(
        "wanda", asymmetric=asymmetric, permute=True, moments_bytes=moments_bytes
    )
    prune_model(model, patterns, tokens(6, 17), settings)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    for name in patterns:
        assert not torch.equal(model.get_parameter(name), dense.get_parameter(name)), name


def test_a_permuted_conversion_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_dense(BY_NAME["mixtral"], tmp_path / "dense")
    data = CalibrationData(tokens(6, 17), "0" * 64, "a test")
    monkeypatch.setattr("samoyeds_hf.convert_layers.read_calibration", lambda *_: data)
    config = SamoyedsConfig(
        PATTERN, "wanda", refine=True, permute=True, calibration={"data": "x", "samples": 6}
    )
    report = convert_checkpoint(source, tmp_path / "out", config, progress=False)
    assert "neurons reordered" in str(report)
    assert "in another order" in (tmp_path / "out" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bool(logits(model).isfinite().all())
