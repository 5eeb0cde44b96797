"""The Hopper kernel: sparse products of warpgroups, on panels of tokens. Asked for by its plan.

Needs a GPU of compute capability 9.0. Outputs and workspaces are poisoned and guarded, see
cuda_helpers.py.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import plans
import pytest
import torch
from cuda_checks import both_dtypes, check_down, check_linear, check_mlp, check_up
from cuda_helpers import (
    DEVICE,
    INVALID_ARGUMENT,
    OK,
    ROUTINGS,
    UNSUPPORTED,
    Guarded,
    Layer,
    LibraryRefusal,
    Shape,
    Weight,
    chosen_plan,
    functions,
    generator,
    grouped,
    last_error,
    linear,
    linear_workspace_bytes,
    make_launch,
    make_routing,
    moe_mlp,
    random_layer,
    random_weight,
    refused,
    synchronize,
    workspace_for,
)
from helpers import assert_as_good_as_dense, assert_same_bits
from hopper_checks import (
    MIDDLE,
    NEEDS_HOPPER,
    PATTERNS,
    check_isolation,
    check_layer,
    each_pattern,
    hopper_plan,
    instance_of,
    layer_plans,
    layer_with,
    product_of,
)
from plans import HOPPER, SHORT, Gpu, Instance, broken_rules

from samoyeds_hf import library

pytestmark = NEEDS_HOPPER

MOST_TOKENS = {text: 208 if text == "2:4" else 192 for text in PATTERNS}  # of a tile
OTHER_INSTANCE = Instance(2, 4, 4, 2, 1)


# --- patterns, tokens, sizes -----------------------------------------------------------------

RARE = [
    ("1:2:96", "1:2:96"),  # Sub-Rows across blocks
    ("1:2:256", "1:2:384"),  # of several blocks; the whole row
    ("4:4:8", "16:16:64"),  # N = M with V, as 2:4
]


@both_dtypes
@pytest.mark.parametrize(("up", "down"), [*itertools.product(PATTERNS, repeat=2), *RARE])
def test_patterns(up: str, down: str, dtype: torch.dtype, seed: int) -> None:
    sizes = MIDDLE if up in PATTERNS else MIDDLE._replace(hidden=768, inner=384)
    check_layer(random_layer(sizes._replace(up=up, down=down), dtype, seed), seed)


TOKENS = {
    1: "seven of the eight places are empty",
    7: "one place is empty",
    8: "none is empty, and one block of a cluster loads them all",
    9: "eight places for each block of a cluster to load, seven of them empty",
    16: "the smallest instruction",
    17: "one more than it multiplies",
    191: "a tile but for one",
    192: "a full tile",
    193: "two tiles, of 104 and of 89",
    207: "N = M: a tile but for one",
    208: "N = M: a full tile",
    209: "N = M: two tiles, of 112 and of 97",
    385: "three tiles of about the same size",
    577: "four tiles",
    1537: "nine tiles: a full group, and one of a single tile",
    4417: "24 tiles, of which the last has one token",
}


@both_dtypes
@pytest.mark.parametrize("text", ["1:2:128", "1:2:64", "2:4"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens_of_an_expert(tokens: int, text: str, dtype: torch.dtype, seed: int) -> None:
    """Beside an expert without tokens, and one that begins behind the empty places."""
    sizes = MIDDLE._replace(up=text, down=text)
    check_layer(layer_with([tokens, 0, 5], dtype, seed, sizes), seed)


@both_dtypes
@each_pattern
def test_every_size_of_the_instruction(text: str, dtype: torch.dtype, seed: int) -> None:
    """16 to as many tokens as there may be, in steps of 16; each expert's are a few less."""
    most = MOST_TOKENS[text]
    counts = [size - 3 for size in {*range(16, most, 16), most}]
    check_layer(layer_with(counts, dtype, seed, MIDDLE._replace(up=text, down=text)), seed)


@both_dtypes
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing: str, dtype: torch.dtype, seed: int) -> None:
    """Idle experts, one that gets everything, choices of nobody (-1, E and others), no choice."""
    shape = MIDDLE._replace(tokens=230, experts=5, top_k=3, routing=routing)
    check_layer(random_layer(shape, dtype, seed), seed)


# 8: as many as the sum looks up at once
@pytest.mark.parametrize("top_k", [*range(1, 9), 9, 17])
def test_choices_of_a_token(top_k: int, seed: int) -> None:
    """Also twice the same expert, and some without any."""
    shape = MIDDLE._replace(tokens=131, experts=4, top_k=top_k, routing="sentinels")
    for weights_dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = random_layer(shape._replace(weights_dtype=weights_dtype), torch.bfloat16, seed)
        check_layer(layer, seed)


# hidden, inner. A cluster has four warpgroups, of two thread blocks; a slab is 128 rows.
LAYER_SIZES = {
    "one slab of down: one warpgroup of four works; one block of k": (128, 128),
    "three slabs of down: the last warpgroup has none": (384, 128),
    "five slabs of down: four, then one": (640, 256),
    "six slabs of up: four, then one for each thread block": (256, 384),
    "long k of up": (4096, 128),
    "long k of down": (128, 4096),
    "22 slabs of up, 11 blocks of down": (2048, 1408),
}


@both_dtypes
@pytest.mark.parametrize("text", ["1:2:64", "2:4"])
@pytest.mark.parametrize("reason", LAYER_SIZES)
def test_sizes_of_a_layer(reason: str, text: str, dtype: torch.dtype, seed: int) -> None:
    hidden, inner = LAYER_SIZES[reason]
    check_layer(random_layer(Shape(260, 2, 2, hidden, inner, text, text), dtype, seed), seed)


@pytest.mark.parametrize(
    "shape",
    [
        # the most pairs that routing counts as it places them, and one more
        Shape(4096, 61, 1, hidden=128, inner=128, routing="sentinels"),
        Shape(4097, 61, 1, hidden=128, inner=128, routing="sentinels"),
        # many rounds of every thread block
        Shape(16384, 8, 8, hidden=256, inner=128, up="1:2:128", down="1:2:128"),
        Shape(4096, 256, 8, hidden=128, inner=128, up="1:2:64", routing="distinct"),
        Shape(20000, experts=64, top_k=2, hidden=128, inner=256, routing="few"),
        Shape(50000, experts=3, top_k=1, hidden=128, inner=128, up="2:4", routing="one"),
        # up of six slabs: those beyond four of two tiles are one item; down of five
        Shape(8192, 32, 8, hidden=640, inner=384, up="1:2:128", down="2:4", routing="distinct"),
        Shape(1, experts=256, top_k=8, hidden=256, inner=128, routing="distinct"),
        Shape(0, experts=3, hidden=256, inner=128),
    ],
    ids=str,
)
def test_many_and_few(shape: Shape, seed: int) -> None:
    check_layer(random_layer(shape, torch.bfloat16, seed), seed)


@both_dtypes
def test_large_activations(dtype: torch.dtype, seed: int) -> None:
    """Gates far from zero, where SiLU is x or nothing."""
    layer = random_layer(MIDDLE, dtype, seed)
    layer.hidden.mul_(16)
    check_mlp(layer, **layer_plans(layer))


@both_dtypes
@each_pattern
@pytest.mark.parametrize("is_gate_up", [False, True], ids=["plain", "gate_up"])
def test_up_of_any_weight(is_gate_up: bool, text: str, dtype: torch.dtype, seed: int) -> None:
    """Rows in their own order whether or not tiles interleave gate and up."""
    layer = random_layer(MIDDLE, dtype, seed)
    for rows in (128, 384, 640):
        shape = (MIDDLE.experts, rows, MIDDLE.hidden)
        weight = random_weight(shape, text, dtype, generator(seed), is_gate_up)
        check_up(layer, hopper_plan(weight), weight)


@each_pattern
def test_down_of_a_gate_up_weight(text: str, seed: int) -> None:
    """Nobody has one, but the interface does not forbid it; whichever kernel serves it."""
    layer = random_layer(Shape(600, 3, 2, hidden=256, inner=128, down=text), torch.bfloat16, seed)
    down = Weight(layer.down.stored, layer.down.pattern, layer.down.rows, is_gate_up=True)
    inner = torch.randn(1200, 128, generator=generator(seed), device=DEVICE).bfloat16()
    routing = make_routing(layer.top_k_index, layer.top_k_weights)
    workspace, out = workspace_for(routing, None, down.ready), Guarded((600, 256), torch.bfloat16)
    structures = map(ctypes.byref, (make_launch(workspace), routing, down.ready))
    assert functions().samoyeds_moe_down(*structures, inner.data_ptr(), out.pointer) == OK
    synchronize()
    dense, exact = (
        layer.combine(grouped(inner, layer.top_k_index, down.dense, dtype), dtype)
        for dtype in (torch.bfloat16, torch.float64)
    )
    assert_as_good_as_dense(out.tensor, dense, exact, text)


# --- linear ----------------------------------------------------------------------------------

ROWS = (1, 7, 8, 97, 192, 193, 200, 201, 208, 209, 385, 1000, 3001)  # tails, tiles of any size


@both_dtypes
@each_pattern
@pytest.mark.parametrize("is_gate_up", [False, True], ids=["plain", "gate_up"])
@pytest.mark.parametrize(("m", "k"), [(128, 128), (384, 256), (640, 1408), (128, 8192)])
def test_linear(m: int, k: int, is_gate_up: bool, text: str, dtype: torch.dtype, seed: int) -> None:
    rng = generator(seed)
    weight = random_weight((1, m, k), text, dtype, rng, is_gate_up)
    for rows in ROWS:
        x = torch.randn(rows, k, generator=rng, device=DEVICE).to(dtype)
        check_linear(weight, x, hopper_plan(weight))


# [m, k] and rows: so many that results go out through a tensor map.
MANY_ROUNDS = {
    (640, 256): (17003, 33 * 1024),  # 5 slabs: the last part has one; a box is cut off, or none
    (768, 256): (17003, 33 * 1024),  # 6 slabs: half parts of two tiles are one item
    (7168, 128): (5000,),  # 1:2:V on 66 clusters: 23 tiles of 192 rows, four of 128, and 72
    (14336, 128): (1001, 1024, 2003),  # one of 192 and six of 144, or two and five of 128
}


@both_dtypes
@each_pattern
@pytest.mark.parametrize("is_gate_up", [False, True], ids=["plain", "gate_up"])
@pytest.mark.parametrize(("m", "k"), MANY_ROUNDS)
def test_linear_of_many_rounds(
    m: int, k: int, is_gate_up: bool, text: str, dtype: torch.dtype, seed: int
) -> None:
    """Clusters claim items; without routing, tiles are of two sizes, which depend on the GPU."""
    rng = generator(seed)
    weight = random_weight((1, m, k), text, dtype, rng, is_gate_up)
    for rows in MANY_ROUNDS[m, k]:
        x = torch.randn(rows, k, generator=rng, device=DEVICE).to(dtype)
        check_linear(weight, x, hopper_plan(weight))


def test_linear_of_no_rows() -> None:
    weight = random_weight((1, 128, 256), "2:4", torch.bfloat16, generator(0))
    x = torch.zeros(0, 256, dtype=torch.bfloat16, device=DEVICE)
    assert linear(weight, x, hopper_plan(weight)).shape == (0, 128)


# --- nothing foreign is read -----------------------------------------------------------------


@both_dtypes
@each_pattern
def test_tokens_do_not_see_each_other(text: str, dtype: torch.dtype, seed: int) -> None:
    sizes = MIDDLE._replace(up=text, down=text)
    check_isolation(layer_with([200, 0, 150], dtype, seed, sizes), seed)


@both_dtypes
@each_pattern
def test_rows_of_a_linear_do_not_see_each_other(text: str, dtype: torch.dtype, seed: int) -> None:
    rng = generator(seed)
    weight = random_weight((1, 384, 256), text, dtype, rng)
    x = torch.randn(500, 256, generator=rng, device=DEVICE).to(dtype)
    clean = linear(weight, x, hopper_plan(weight))
    is_bad = torch.zeros(500, dtype=torch.bool, device=DEVICE)
    is_bad[[0, 9, 190, 250, 499]] = True
    x[is_bad] = float("nan")
    found = linear(weight, x, hopper_plan(weight))
    assert_same_bits(found[~is_bad], clean[~is_bad])
    assert found[is_bad].isnan().any(dim=1).all()


@each_pattern
def test_weights_of_other_experts_do_not_show(text: str, seed: int) -> None:
    """NaN where nobody is, random bytes where somebody else is."""
    sizes = MIDDLE._replace(up=text, down=text)
    layer = layer_with([200, 0, 150, 0], torch.bfloat16, seed, sizes)
    clean = moe_mlp(layer, **layer_plans(layer))
    for weight in (layer.gate_up, layer.down):
        packed = weight.packed.tensor.view(4, -1)
        packed[[1, 3]] = 0xFF
        packed[2].random_(0, 256, generator=generator(seed))
    found = moe_mlp(layer, **layer_plans(layer))
    others = layer.top_k_index[:, 0] != 2
    assert_same_bits(found[others], clean[others])


def queue_mlp(layer: Layer, workspace: Guarded, out: Guarded) -> None:
    """On the current stream, without waiting for it."""
    launch = make_launch(workspace, **layer_plans(layer))
    routing = make_routing(layer.top_k_index, layer.top_k_weights)
    structures = (launch, routing, layer.gate_up.ready, layer.down.ready)
    pointers = layer.hidden.data_ptr(), out.pointer
    status = functions().samoyeds_moe_mlp(*map(ctypes.byref, structures), *pointers)
    assert status == OK, last_error()


def buffers_of(layer: Layer) -> tuple[Guarded, Guarded]:
    """A workspace and a result."""
    routing = make_routing(layer.top_k_index, layer.top_k_weights)
    weights = layer.gate_up.ready, layer.down.ready
    workspace = workspace_for(routing, *weights, *layer_plans(layer).values())
    return workspace, Guarded((layer.shape.tokens, layer.shape.hidden), layer.hidden.dtype)


@both_dtypes
def test_what_the_workspace_held_before(dtype: torch.dtype, seed: int) -> None:
    """0xFF is NaN, but also the mark of an empty place; other bytes are tokens far away."""
    layer = random_layer(MIDDLE._replace(routing="sentinels"), dtype, seed)
    expected = moe_mlp(layer, **layer_plans(layer))
    workspace, out = buffers_of(layer)
    for byte in (0x00, 0x01, 0x7F, 0x80, 0xFF):
        workspace.bytes.fill_(byte)
        out.bytes.fill_(0xFF)
        queue_mlp(layer, workspace, out)
        assert_same_bits(out.tensor, expected)


def test_layers_follow_each_other_in_one_workspace(seed: int) -> None:
    """Each begins while the one before is still at work."""
    shapes = (
        MIDDLE._replace(tokens=2000, up="2:4"),
        MIDDLE._replace(routing="sentinels"),
        Shape(500, experts=60, top_k=4, hidden=128, inner=512),
    )
    layers = [random_layer(shape, torch.bfloat16, seed) for shape in shapes]
    expected = [moe_mlp(layer, **layer_plans(layer)) for layer in layers]
    workspace = max((buffers_of(layer)[0] for layer in layers), key=lambda w: w.num_bytes)
    outs = [[buffers_of(layer)[1] for layer in layers] for _ in range(50)]
    synchronize()
    for each in outs:
        for layer, out in zip(layers, each, strict=True):
            queue_mlp(layer, workspace, out)
    synchronize()
    workspace.check_border("workspace")
    for each in outs:
        for out, right in zip(each, expected, strict=True):
            assert_same_bits(out.tensor, right)


@both_dtypes
def test_a_graph_follows_its_inputs(dtype: torch.dtype, seed: int) -> None:
    """How many tokens an expert gets, and so the places of all, is decided in each replay."""
    layer = random_layer(MIDDLE._replace(tokens=450, experts=4, top_k=3), dtype, seed)
    workspace, out = buffers_of(layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        queue_mlp(layer, workspace, out)
    for step in range(4 * len(ROUTINGS)):
        shape = layer.shape._replace(routing=ROUTINGS[step % len(ROUTINGS)])
        other = random_layer(shape, dtype, seed + step)
        for name in ("hidden", "top_k_index", "top_k_weights"):
            getattr(layer, name).copy_(getattr(other, name))
        expected = moe_mlp(layer, **layer_plans(layer))
        for byte in (0x7F, 0xFF):
            workspace.bytes.fill_(byte)
            out.bytes.fill_(0xFF)
            graph.replay()
            assert_same_bits(out.tensor, expected)


# --- what is refused -------------------------------------------------------------------------


@each_pattern
@pytest.mark.parametrize("instance", [HOPPER, SHORT], ids=["full", "short"])
def test_there_is_one_plan(instance: Instance, text: str) -> None:
    layer = random_layer(MIDDLE._replace(tokens=3, up=text, down=text), torch.bfloat16, 0)
    for is_down, weight in ((False, layer.gate_up), (True, layer.down)):
        product, taken = product_of(weight, may_split=is_down), []
        for plan in plans.plans_of(instance, product.blocks):
            found = refused(plan, layer, is_down)
            if found is None:
                taken.append(plan)
            else:
                broken = broken_rules(plan, product, Gpu.current())
                assert any(words in found for words in broken), f"{plan}: {found}, but {broken}"
        is_served = instance == HOPPER or text == "1:2:128"
        assert taken == [instance.plan(stages=2 if text == "2:4" else 3)] * is_served


def check_refusal(status: int, words: str, call: Any, *arguments: Any) -> None:
    with pytest.raises(LibraryRefusal, match=words) as found:
        call(*arguments)
    assert found.value.status == status


def test_other_numbers_are_invalid() -> None:
    x = torch.zeros(9, 256, dtype=torch.bfloat16, device=DEVICE)
    for text, stages in (("1:2:64", 3), ("2:4", 2)):
        weight = random_weight((1, 128, 256), text, torch.bfloat16, generator(0))
        for splits, found in ((2, stages), (1, 4), (1, 1), (0, stages)):
            plan = hopper_plan(weight, splits=splits, stages=found)
            words = f"must have 1 split and {stages} stages, found {splits} and {found}$"
            check_refusal(INVALID_ARGUMENT, words, linear, weight, x, plan)


@pytest.mark.parametrize(("m", "k"), [(128, 192), (192, 128), (64, 128), (128, 64), (136, 648)])
def test_sizes_must_be_multiples_of_128(m: int, k: int, seed: int) -> None:
    rng = generator(seed)
    weight = random_weight((1, m, k), "2:4", torch.bfloat16, rng)
    x = torch.randn(3000, k, generator=rng, device=DEVICE).bfloat16()
    plan, words = hopper_plan(weight), f"multiples of 128, found {m} x {k}$"
    check_refusal(UNSUPPORTED, words, linear, weight, x, plan)
    # Without a plan another kernel serves it, which needs no workspace.
    assert instance_of(chosen_plan(weight, 3000, 1, False)) != HOPPER
    assert linear_workspace_bytes(weight.ready, 3000) == 0
    check_linear(weight, x)


def test_both_products_have_it_or_none() -> None:
    layer = random_layer(MIDDLE._replace(tokens=9), torch.bfloat16, 0)
    ours, other = layer_plans(layer), library.Plan(*OTHER_INSTANCE.plan(stages=2))
    for plan, down_plan in (
        (ours["plan"], other),
        (other, ours["down_plan"]),
        (ours["plan"], None),  # for 9 tokens the heuristics choose another one
        (None, ours["down_plan"]),
    ):
        words = "both products of a layer must have the plan of the Hopper kernel, or none"
        check_refusal(INVALID_ARGUMENT, words, moe_mlp, layer, plan, down_plan)


def test_workspace_that_is_too_small() -> None:
    layer = random_layer(MIDDLE, torch.bfloat16, 0)
    workspace, out = buffers_of(layer)
    launch = make_launch(workspace, **layer_plans(layer))
    launch.workspace_bytes -= 1
    routing = make_routing(layer.top_k_index, layer.top_k_weights)
    structures = map(ctypes.byref, (launch, routing, layer.gate_up.ready, layer.down.ready))
    pointers = layer.hidden.data_ptr(), out.pointer
    assert functions().samoyeds_moe_mlp(*structures, *pointers) == INVALID_ARGUMENT
    words = f"workspace must have {workspace.num_bytes} bytes, found {workspace.num_bytes - 1}"
    assert words in last_error()
    synchronize()
    assert out.is_untouched()
    assert workspace.is_untouched()


def test_workspace_of_a_linear() -> None:
    """It holds the panels; kernels without panels need none."""
    weight = random_weight((1, 128, 256), "1:2:64", torch.bfloat16, generator(0))
    x = torch.zeros(200, 256, dtype=torch.bfloat16, device=DEVICE)
    other = library.Plan(*OTHER_INSTANCE.plan(stages=2))
    assert linear_workspace_bytes(weight.ready, 200, other) == 0
    plan = hopper_plan(weight)
    num_bytes = linear_workspace_bytes(weight.ready, 200, plan)
    assert num_bytes >= x.numel() * 2
    workspace, out = Guarded((num_bytes,), torch.uint8), Guarded((200, 128), torch.bfloat16)
    for member, value, words in (
        ("workspace", None, "workspace must not be null"),
        ("workspace", workspace.pointer + 8, "workspace must be 16-byte aligned"),
        ("workspace_bytes", 0, f"workspace must have {num_bytes} bytes, found 0"),
        ("workspace_bytes", num_bytes - 1, f"{num_bytes} bytes, found {num_bytes - 1}"),
    ):
        launch = make_launch(workspace, plan)
        setattr(launch, member, value)
        structures = map(ctypes.byref, (launch, weight.ready))
        status = functions().samoyeds_linear(*structures, x.data_ptr(), 200, out.pointer)
        assert status == INVALID_ARGUMENT
        assert words in last_error()
    synchronize()
    assert out.is_untouched()
    assert workspace.is_untouched()


# --- when it is chosen -----------------------------------------------------------------------


@each_pattern
def test_many_tokens_choose_it(text: str, seed: int) -> None:
    layer = random_layer(Shape(4096, 4, 2, 2048, 1408, text, text), torch.bfloat16, seed)
    for is_down, weight in ((False, layer.gate_up), (True, layer.down)):
        for tokens, is_ours in ((4096, True), (1, False), (8, False)):
            plan = chosen_plan(weight, tokens, 2, is_down)
            assert (instance_of(plan) == HOPPER) == is_ours
            assert not is_ours or bytes(plan) == bytes(hopper_plan(weight))
    assert_same_bits(moe_mlp(layer), moe_mlp(layer, **layer_plans(layer)))


def test_many_rows_choose_it(seed: int) -> None:
    rng = generator(seed)
    weight = random_weight((1, 1408, 2048), "1:2:128", torch.float16, rng)
    x = torch.randn(4096, 2048, generator=rng, device=DEVICE).half()
    assert linear_workspace_bytes(weight.ready, 4096) > 0
    assert linear_workspace_bytes(weight.ready, 8) == 0
    assert_same_bits(linear(weight, x), linear(weight, x, hopper_plan(weight)))
    check_linear(weight, x)
    check_linear(weight, x[:8])


FALLBACKS = {  # and whether it is the down product that could have it
    "k of down is no multiple of 128": (Shape(2000, 3, 2, 512, 704, "1:2:64", "1:2:64"), False),
    "down is 3 of 4": (Shape(2000, 3, 2, 512, 640, "1:2:64", "3:4:64"), False),
    "down is general": (Shape(2000, 3, 2, 512, 640, "1:2:64", "4:8:32"), False),
    "up is general": (Shape(2000, 3, 2, 512, 640, "4:8:32", "1:2:64"), True),
}


@both_dtypes
@pytest.mark.parametrize("reason", FALLBACKS)
def test_a_layer_falls_back(reason: str, dtype: torch.dtype, seed: int) -> None:
    """One product alone is of no use to a layer, whose other one could not read panels."""
    shape, is_down = FALLBACKS[reason]
    layer = random_layer(shape, dtype, seed)
    weight = layer.down if is_down else layer.gate_up
    assert instance_of(chosen_plan(weight, shape.tokens, shape.top_k, is_down)) == HOPPER
    check_mlp(layer)
    check_up(layer)
    check_down(layer, seed)
    given = {"down_plan" if is_down else "plan": hopper_plan(weight)}
    with pytest.raises(LibraryRefusal, match="both products of a layer"):
        moe_mlp(layer, **given)
