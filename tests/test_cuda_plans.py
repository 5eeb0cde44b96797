"""Every way to run a product: each legal SamoyedsPlan is right, and an illegal one is refused.

Needs a CUDA device. Which plans are legal is worked out in plans.py.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import plans
import pytest
import torch
from cuda_helpers import (
    GPU,
    Layer,
    LibraryRefusal,
    Shape,
    chosen_plan,
    generator,
    grouped,
    kernels,
    linear,
    moe_down,
    moe_mlp,
    moe_up,
    random_layer,
    random_seed,
    random_weight,
    refused,
)
from helpers import assert_as_good_as_dense, assert_same_bits, silu_gate
from plans import (
    HOPPER,
    INSTANCES,
    SHORT,
    Gpu,
    Instance,
    PlanNumbers,
    Product,
    broken_rules,
    legal_plans,
)
from torch.nn import functional

from samoyeds_hf import SparsityPattern, library

pytestmark = GPU

# Parts of k that do not divide by the warps along k, and tails where they may be.
SIZES = {
    "1:2:32": (672, 416),
    "1:2:64": (704, 448),
    "1:2:96": (672, 288),  # Sub-Rows across blocks
    "1:2:128": (640, 384),  # the only one that the Hopper kernel serves
    "3:4:32": (672, 416),  # the last tiles of down hold 8 blocks of rows
    "3:4:64": (704, 448),
    "3:4:128": (640, 384),
    "2:4": (648, 392),
}
each_instance = pytest.mark.parametrize(
    "instance", INSTANCES, ids=lambda instance: "x".join(map(str, instance))
)


class Reference(NamedTuple):
    """A layer, and what its products should be: in its own dtype on dense weights, and in fp64."""

    layer: Layer
    inner: torch.Tensor  # [T*K, I]  input of the down product
    up: tuple[torch.Tensor, torch.Tensor]  # [T*K, 2I]
    down: tuple[torch.Tensor, torch.Tensor]  # [T, H]
    mlp: tuple[torch.Tensor, torch.Tensor]  # [T, H]


def products_of(text: str) -> tuple[Product, Product]:
    """Of a layer of SIZES: up and down."""
    hidden, inner = SIZES[text]
    pattern = SparsityPattern.parse(text)
    v = 0 if pattern.n == pattern.m else pattern.sub_row(hidden)
    return (
        Product(v, 2 * inner, hidden, slots=pattern.n),
        Product(v, hidden, inner, may_split=True, slots=pattern.n),
    )


def make_reference(tokens: int, text: str, dtype: torch.dtype, seed: int) -> Reference:
    hidden, inner = SIZES[text]
    shape = Shape(tokens, experts=2, top_k=2, hidden=hidden, inner=inner, up=text, down=text)
    layer = random_layer(shape, dtype, seed)
    both = (dtype, torch.float64)
    up = tuple(grouped(layer.hidden, layer.top_k_index, layer.gate_up.dense, d) for d in both)
    gated = silu_gate(up[0])
    down = tuple(
        layer.combine(grouped(gated, layer.top_k_index, layer.down.dense, d), d) for d in both
    )
    mlp = tuple(layer.reference(d) for d in both)
    return Reference(layer, gated, up, down, mlp)  # type: ignore[arg-type]


def check(
    call: Callable[[], torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], what: str
) -> None:
    """Right, and bitwise equal on repeat."""
    ours = call()
    assert_same_bits(call(), ours)
    assert_as_good_as_dense(ours, *expected, what)


@pytest.mark.parametrize("text", SIZES)
def test_what_the_rules_allow_is_taken_and_nothing_else(text: str) -> None:
    gpu = Gpu.current()
    layer = make_reference(3, text, torch.bfloat16, 0).layer
    wrong: list[str] = []
    taken: Counter[Instance] = Counter()
    for is_down, product in enumerate(products_of(text)):
        for instance in INSTANCES:
            for plan in plans.plans_of(instance, product.blocks):
                broken = broken_rules(plan, product, gpu)
                found = refused(plan, layer, bool(is_down))
                taken[instance] += found is None
                says_why = found is not None and any(words in found for words in broken)
                if not (says_why if broken else found is None):
                    wrong.append(f"{plan}: {found!r}, but {broken}")
    assert not wrong, "\n".join(wrong[:20])
    is_stepped = products_of(text)[0].is_stepped
    ours = [instance for instance in INSTANCES if instance.is_stepped == is_stepped]
    assert all(taken[instance] for instance in ours if not instance.needs_sm90a)
    for instance in (HOPPER, SHORT):
        assert gpu.capability != 90 or taken[instance] == (2 if text == "1:2:128" else 0)


def test_no_kernel_but_the_compiled_ones() -> None:
    layer = make_reference(3, "1:2:64", torch.bfloat16, 0).layer
    sizes = (1, 2, 4, 8)
    others = {
        Instance(*frags, *warps, cluster)
        for frags in itertools.product(
            (*sizes, 3, 6), (*sizes, 3, 6, SHORT.n_frags, HOPPER.n_frags)
        )
        for warps in itertools.product(sizes, repeat=3)
        for cluster in (0, 1, 2, 4)
    } - set(INSTANCES)
    for instance in sorted(others):
        for is_down in (False, True):
            found = refused(instance.plan(stages=2), layer, is_down)
            assert found is not None, instance
            assert "compiled kernel" in found


def run_each_plan(
    instance: Instance, case: Reference, products: tuple[Product, Product], gpu: Gpu
) -> None:
    """Of both products of a layer, alone and together."""
    layer = case.layer
    for numbers in legal_plans(instance, products[0], gpu):
        plan, what = library.Plan(*numbers), f"{numbers}, {layer.shape}"
        check(lambda: moe_up(layer, plan), case.up, what)  # noqa: B023
    for numbers in legal_plans(instance, products[1], gpu):
        plan, what = library.Plan(*numbers), f"{numbers}, {layer.shape}"
        whole = library.Plan(*numbers._replace(splits=1))
        check(lambda: moe_down(layer, case.inner, plan), case.down, what)  # noqa: B023
        check(lambda: moe_mlp(layer, whole, plan), case.mlp, what)  # noqa: B023


def check_that_nobody_takes(numbers: PlanNumbers, case: Reference) -> None:
    plan = library.Plan(*numbers)
    for call in (
        lambda: moe_mlp(case.layer, plan),
        lambda: moe_mlp(case.layer, None, plan),
        lambda: moe_up(case.layer, plan),
        lambda: moe_down(case.layer, case.inner, plan),
    ):
        with pytest.raises(LibraryRefusal):
            call()


@pytest.mark.parametrize("text", SIZES)
@each_instance
def test_each_legal_plan_is_right(instance: Instance, text: str) -> None:
    """Where an instance has no plan for the pattern, every function says so."""
    seed, gpu = random_seed(), Gpu.current()
    dtype = torch.bfloat16 if seed % 2 else torch.float16
    products, tile = products_of(text), instance.tokens
    case = make_reference(tile, text, dtype, seed)
    stages = max(instance.stages(products[0])[0], 2)
    check_that_nobody_takes(instance.plan(stages, instance.most_blocks_per_sm + 1), case)
    if not legal_plans(instance, products[0], gpu):
        return check_that_nobody_takes(instance.plan(stages), case)
    many = plans.tokens_for_three_rounds(instance, products[1], gpu)
    # 2 experts and 2 choices: about as many pairs an expert as there are tokens
    for tokens in dict.fromkeys((1, tile // 2, tile + 1, 3 * tile - 5, many // 2)):
        run_each_plan(instance, make_reference(tokens, text, dtype, seed), products, gpu)


@pytest.mark.parametrize(
    ("m", "k"),
    [(136, 648), (384, 640)],
    ids=["tails", "what the Hopper kernel serves too"],
)
@each_instance
def test_each_legal_plan_of_a_linear(instance: Instance, m: int, k: int) -> None:
    rng, gpu = generator(random_seed()), Gpu.current()
    text, product = "2:4", Product(0, m, k)
    if instance.is_stepped:
        k = k // 32 * 32
        text, product = "3:4:32", Product(32, m, k, slots=3)
    weight = random_weight((1, m, k), text, torch.bfloat16, rng)
    many = plans.tokens_for_three_rounds(instance, product, gpu)
    for rows in (2 * instance.tokens + 3, many):
        x = torch.randn(rows, k, generator=rng, device=rng.device).bfloat16()
        dense = functional.linear(x, weight.dense[0])
        expected = dense, functional.linear(x.double(), weight.dense[0].double())
        for numbers in legal_plans(instance, product, gpu):
            plan = library.Plan(*numbers)
            check(lambda: linear(weight, x, plan), expected, str(numbers))  # noqa: B023
    for numbers in plans.plans_of(instance, product.blocks):
        if broken_rules(numbers, product, gpu):
            with pytest.raises(LibraryRefusal):
                linear(weight, x[:3], library.Plan(*numbers))


@pytest.mark.parametrize("text", SIZES)
@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 256, 1024, 4096])
def test_the_heuristics_choose_a_legal_plan(tokens: int, text: str) -> None:
    hidden, inner = SIZES[text]
    shape = Shape(tokens, 4, 2, hidden, inner, text, text)
    layer = random_layer(shape, torch.bfloat16, random_seed())
    plan = chosen_plan(layer.gate_up, tokens, 2, False)
    down_plan = chosen_plan(layer.down, tokens, 2, True)
    products, gpu = products_of(text), Gpu.current()
    for chosen, product in ((plan, products[0]), (down_plan, products[1])):
        numbers = PlanNumbers(*(getattr(chosen, name) for name in PlanNumbers._fields))
        assert not broken_rules(numbers, product, gpu), numbers
    # The same that runs where no plan is given.
    assert_same_bits(moe_mlp(layer, plan, down_plan), moe_mlp(layer))


def test_the_heuristics_are_printable() -> None:
    assert len(kernels().heuristics.splitlines()) > 1


BAD_NUMBERS = {
    "m_frags": (0, -1, 3, 8, 1 << 40),  # 3: of instances for (3, 4, V)
    "n_frags": (0, -1, 3, 16, HOPPER.n_frags, 1 << 32 | 1),
    "warps_m": (0, -1, 3, 16),
    "warps_n": (0, -1, 3, 16),
    "warps_k": (0, -1, 3, 16),
    "stages": (0, -1, 9, 1 << 32 | 3),
    "blocks_per_sm": (0, -1, 3, 1 << 40),
    "splits": (0, -1, 5, 1 << 40),
    "cluster": (0, -1, 2, 3, 1 << 32 | 1),
}


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_illegal_plans_are_refused(name: str) -> None:
    case = make_reference(9, "1:2:64", torch.bfloat16, random_seed())
    layer = case.layer
    for value in BAD_NUMBERS[name]:
        for is_down in (False, True):
            weight = layer.down if is_down else layer.gate_up
            plan = chosen_plan(weight, 9, 2, is_down)
            setattr(plan, name, value)
            calls: list[Callable[[], torch.Tensor]] = (
                [lambda: moe_mlp(layer, None, plan), lambda: moe_down(layer, case.inner, plan)]  # noqa: B023
                if is_down
                else [lambda: moe_mlp(layer, plan), lambda: moe_up(layer, plan)]  # noqa: B023
            )
            for call in calls:
                with pytest.raises(LibraryRefusal):
                    call()
    assert_as_good_as_dense(moe_mlp(layer), *case.mlp)  # nothing bad stays behind


def test_only_the_down_product_is_split() -> None:
    layer = make_reference(9, "1:2:64", torch.bfloat16, random_seed()).layer
    plan = chosen_plan(layer.gate_up, 9, 2, False)
    plan.splits = 2
    for call in (lambda: moe_mlp(layer, plan), lambda: moe_up(layer, plan)):
        with pytest.raises(LibraryRefusal):
            call()
