"""torch.ops.samoyeds.* on a GPU: schemas, graphs, streams, compilation. Needs a CUDA device."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from cuda_helpers import (
    GPU,
    HALF_DTYPES,
    SENTINELS,
    Layer,
    Shape,
    Weight,
    generator,
    grouped,
    kernels,
    linear,
    moe_down,
    moe_mlp,
    moe_up,
    random_layer,
    random_seed,
    random_stored,
    random_weight,
)
from helpers import assert_as_good_as_dense, assert_same_bits, bits, silu_gate
from torch.nn import functional

from samoyeds_hf import SparsityPattern, ops, packed_ops
from samoyeds_hf.packed import PackedSpec, pack

pytestmark = GPU
OPS = ["mlp", "up", "down", "linear"]
MANY = 500  # tokens: where sizes allow it, the Hopper kernel's


@pytest.fixture(autouse=True)
def _ready() -> None:
    kernels()


def packed_tensor(weight: Weight) -> torch.Tensor:
    """``[E, P]`` in the values' dtype, as the modules hold it."""
    size = (weight.experts, weight.rows, weight.cols)
    spec = PackedSpec(*size, weight.pattern, weight.dtype, weight.is_gate_up)
    packed = pack(weight.stored, spec)
    assert packed.dtype == weight.dtype
    assert packed.shape[0] == weight.experts
    return packed


class Call(NamedTuple):
    """An operator on packed weights with arguments, and the same on canonical tensors."""

    packed: Any
    packed_arguments: tuple[Any, ...]
    canonical: Any
    canonical_arguments: tuple[Any, ...]


def calls(layer: Layer, seed: int = 0) -> dict[str, Call]:
    shape, routing = layer.shape, (layer.top_k_index, layer.top_k_weights)
    gate_up, down = packed_tensor(layer.gate_up), packed_tensor(layer.down)
    rng = generator(seed)
    dtype = layer.hidden.dtype
    rows = torch.randn(layer.top_k_index.numel(), shape.inner, generator=rng, device="cuda")
    inner = rows.to(dtype)
    out_features = 384 if shape.tokens >= MANY else 72  # the Hopper kernel's, or a tail
    single = random_weight((1, out_features, shape.hidden), shape.up, dtype, rng)
    one = tuple(tensor[0] for tensor in single.stored)
    batch = torch.randn(2, shape.tokens, shape.hidden, generator=rng, device="cuda").to(dtype)
    two_inner, patterns = 2 * shape.inner, (shape.up, shape.down)
    canonical_up, canonical_down = tuple(layer.gate_up.stored), tuple(layer.down.stored)
    return {
        "mlp": Call(
            torch.ops.samoyeds.packed_mlp,
            (layer.hidden, *routing, gate_up, down, shape.inner, *patterns),
            torch.ops.samoyeds.moe_mlp,
            (layer.hidden, *routing, *canonical_up, *canonical_down, *patterns),
        ),
        "up": Call(
            torch.ops.samoyeds.packed_up,
            (layer.hidden, routing[0], gate_up, two_inner, shape.up),
            torch.ops.samoyeds.moe_up,
            (layer.hidden, routing[0], *canonical_up, shape.up),
        ),
        "down": Call(
            torch.ops.samoyeds.packed_down,
            (inner, *routing, down, shape.hidden, shape.down),
            torch.ops.samoyeds.moe_down,
            (inner, *routing, *canonical_down, shape.down),
        ),
        "linear": Call(
            torch.ops.samoyeds.packed_linear,
            (batch, packed_tensor(single), out_features, shape.up),
            torch.ops.samoyeds.linear,
            (batch, *one, shape.up),
        ),
    }


SHAPES = [
    Shape(0),
    Shape(1),
    Shape(33, experts=7, top_k=3, routing="sentinels"),
    Shape(19, hidden=136, inner=40, up="2:4", down="4:8:8"),
    Shape(MANY, experts=3, inner=128, up="2:4", down="1:2:128", routing="sentinels"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, shape: Shape) -> None:
    """Schema, no hidden mutation, and fakes that agree with the op for fixed and dynamic shapes."""
    call = calls(without_nan(random_layer(shape, torch.bfloat16, random_seed())))[name]
    torch.library.opcheck(call.packed, call.packed_arguments)
    torch.library.opcheck(call.canonical, call.canonical_arguments)


def without_nan(layer: Layer) -> Layer:
    """opcheck compares its arguments with their copies, and NaN differs from itself."""
    layer.top_k_weights.nan_to_num_(0.5)
    return layer


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ops_run_the_kernels(shape: Shape, dtype: torch.dtype) -> None:
    """Packed weights, canonical ones and the C interface: one result, bit for bit."""
    layer = random_layer(shape, dtype, random_seed())
    found = calls(layer)
    expected = {"mlp": moe_mlp(layer), "up": moe_up(layer)}
    expected["down"] = moe_down(layer, found["down"].packed_arguments[0])
    for name, call in found.items():
        ours = call.packed(*call.packed_arguments)
        assert_same_bits(ours.view(-1), call.canonical(*call.canonical_arguments).view(-1))
        if name in expected:
            assert_same_bits(ours, expected[name])
    assert_as_good_as_dense(
        expected["mlp"], layer.reference(dtype), layer.reference(torch.float64), str(shape)
    )


def test_linear_of_any_lead() -> None:
    rng = generator(random_seed())
    weight = random_weight((1, 96, 160), "1:2:32", torch.float16, rng)
    packed = packed_tensor(weight)
    for lead in ((), (0,), (1,), (5,), (2, 3, 4), (3, 0, 2)):
        x = torch.randn(*lead, 160, generator=rng, device="cuda").half()
        ours = packed_ops.packed_linear(x, packed, 96, "1:2:32")
        assert ours.shape == (*lead, 96)
        exact = functional.linear(x.double(), weight.dense[0].double())
        assert_as_good_as_dense(ours, functional.linear(x, weight.dense[0]), exact, str(lead))
        if x.numel():
            assert_same_bits(ours.view(-1, 96), linear(weight, x.reshape(-1, 160)))


def test_fp32_takes_the_plain_path() -> None:
    """Kernels are for bf16 and fp16; the canonical ops also serve fp32, exactly as before."""
    seed = random_seed()
    layer = random_layer(Shape(40), torch.float32, seed)
    arguments = (*layer.gate_up.stored, *layer.down.stored, "1:2:32", "1:2:32")
    ours = ops.moe_mlp(layer.hidden, layer.top_k_index, layer.top_k_weights, *arguments)
    exact = layer.reference(torch.float64)
    assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("name", OPS)
def test_inputs_that_are_not_contiguous(name: str) -> None:
    call = calls(random_layer(SHAPES[2], torch.bfloat16, random_seed()))[name]
    turned = [
        value.mT.contiguous().mT if _is_activation(value, call) and value.dim() > 1 else value
        for value in call.packed_arguments
    ]
    assert not all(value.is_contiguous() for value in turned if torch.is_tensor(value))
    assert_same_bits(call.packed(*turned), call.packed(*call.packed_arguments))


@pytest.mark.parametrize("name", OPS)
def test_inputs_at_odd_addresses(name: str) -> None:
    """A view into a larger tensor may begin anywhere; kernels want multiples of 16 bytes."""
    call = calls(random_layer(SHAPES[2], torch.bfloat16, random_seed()))[name]
    moved = [
        torch.cat((value.new_zeros(1), value.flatten()))[1:].view(value.shape)
        if _is_activation(value, call)
        else value
        for value in call.packed_arguments
    ]
    assert any(torch.is_tensor(value) and value.data_ptr() % 16 for value in moved)
    assert_same_bits(call.packed(*moved), call.packed(*call.packed_arguments))


def _is_activation(value: Any, call: Call) -> bool:
    """A tensor that the canonical op takes too; packed weights are as pack() made them."""
    return torch.is_tensor(value) and any(value is other for other in call.canonical_arguments)


def test_routing_weights_of_any_floating_dtype() -> None:
    layer = random_layer(Shape(40, weights_dtype=torch.float16), torch.bfloat16, random_seed())
    call = calls(layer)["mlp"]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        weights = layer.top_k_weights.to(dtype)
        arguments = [*call.packed_arguments[:2], weights, *call.packed_arguments[3:]]
        changed = replace(layer, top_k_weights=weights)
        dense, exact = (changed.reference(kind) for kind in (torch.bfloat16, torch.float64))
        assert_as_good_as_dense(call.packed(*arguments), dense, exact, str(dtype))


def test_a_weight_of_another_size_is_refused() -> None:
    """The bytes do not tell what they hold, but their number does."""
    layer = random_layer(Shape(5), torch.bfloat16, 0)
    call = calls(layer)["mlp"]
    arguments = list(call.packed_arguments)
    shorter = arguments[3][:, :-8].contiguous()
    for place, value in ((3, shorter), (5, 104), (6, "2:4"), (7, "2:4")):
        bad = list(arguments)
        bad[place] = value
        with pytest.raises((RuntimeError, ValueError)):
            call.packed(*bad)
    torch.cuda.synchronize()


# --- CUDA graphs, streams, no waiting --------------------------------------------------------


def capture(call: Call) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.packed(*call.packed_arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call.packed(*call.packed_arguments)
    return graph, out


def refill(layer: Layer, seed: int) -> None:
    """Other tokens, other experts and other weights of them, in the same tensors."""
    other = random_layer(layer.shape, layer.hidden.dtype, seed)
    for name in ("hidden", "top_k_index", "top_k_weights"):
        getattr(layer, name).copy_(getattr(other, name))


GRAPHS = [
    Shape(1, experts=8, top_k=2, hidden=256, inner=192),
    Shape(64, experts=8, top_k=4, hidden=256, inner=192, routing="sentinels"),
    Shape(700, experts=5, top_k=2, hidden=256, inner=192, up="1:2:64", down="2:4"),
    Shape(40, experts=3, top_k=2, hidden=64, inner=64, up="4:8:32", down="8:16:32"),
    Shape(2000, experts=4, top_k=2, hidden=256, inner=384, up="1:2:128", down="1:2:64"),
]


@pytest.mark.parametrize("shape", GRAPHS, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_a_graph_repeats_a_thousand_times(name: str, shape: Shape) -> None:
    layer = random_layer(shape, torch.bfloat16, random_seed())
    call = calls(layer)[name]
    expected = call.packed(*call.packed_arguments)
    graph, out = capture(call)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        out.fill_(float("nan"))
        graph.replay()
        wrong += (bits(out) != bits(expected)).sum()
    assert wrong.item() == 0


@pytest.mark.parametrize("shape", GRAPHS, ids=str)
def test_a_graph_follows_its_inputs(shape: Shape) -> None:
    """The number of tokens an expert gets is decided on the device, in each replay."""
    seed = random_seed()
    layer = random_layer(shape, torch.float16, seed)
    call = calls(layer)["mlp"]
    graph, out = capture(call)
    for step in range(20):
        routing = ("any", "one", "few", "nobody", "sentinels")[step % 5]
        refill(replace(layer, shape=shape._replace(routing=routing)), seed + step)
        out.fill_(float("nan"))
        graph.replay()
        assert_same_bits(out, call.packed(*call.packed_arguments))


def test_two_streams_at_once() -> None:
    """Different layers on two streams, many times: each result is that of running alone."""
    shapes = (Shape(64, experts=8, hidden=512, inner=512), Shape(50, experts=5, up="2:4", top_k=3))
    found = [calls(random_layer(shape, torch.bfloat16, random_seed()))["mlp"] for shape in shapes]
    alone = [call.packed(*call.packed_arguments) for call in found]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    for _ in range(500):
        for stream, call, expected, bad in zip(streams, found, alone, wrong, strict=True):
            with torch.cuda.stream(stream):
                bad += (bits(call.packed(*call.packed_arguments)) != bits(expected)).sum()
    torch.cuda.synchronize()
    assert [bad.item() for bad in wrong] == [0, 0]


def test_two_threads_at_once() -> None:
    shapes = (Shape(64, experts=8, hidden=512, inner=512), Shape(50, experts=5, up="2:4", top_k=3))
    found = [calls(random_layer(shape, torch.bfloat16, random_seed()))["mlp"] for shape in shapes]
    alone = [call.packed(*call.packed_arguments) for call in found]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(call: Call, expected: torch.Tensor) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            bad = torch.zeros((), dtype=torch.int64, device="cuda")
            for _ in range(300):
                bad += (bits(call.packed(*call.packed_arguments)) != bits(expected)).sum()
            wrong.append(int(bad))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(found, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == [0, 0]


@pytest.mark.parametrize("name", OPS)
def test_nothing_waits_for_the_device(name: str) -> None:
    found = calls(random_layer(GRAPHS[1], torch.bfloat16, random_seed()))[name]
    found.packed(*found.packed_arguments)
    found.canonical(*found.canonical_arguments)
    torch.cuda.synchronize()
    one = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):  # what the mode does to who waits
            one.item()
        found.packed(*found.packed_arguments)
        found.canonical(*found.canonical_arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", GRAPHS, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_workspace_is_given_back(name: str, shape: Shape) -> None:
    """A call holds its workspace while it runs and no longer."""
    call = calls(random_layer(shape, torch.bfloat16, random_seed()))[name]
    out = call.packed(*call.packed_arguments)
    gc.collect()  # what earlier tests left
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        out = call.packed(*call.packed_arguments)
    assert torch.cuda.memory_allocated() == before
    del out


# --- torch.compile ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "linear"])
def test_compiled_with_graphs(name: str) -> None:
    """mode="reduce-overhead" records CUDA graphs; inputs change under them."""
    layer = random_layer(GRAPHS[1], torch.bfloat16, random_seed())
    call = calls(layer)[name]
    torch._dynamo.reset()

    def double(*arguments: Any) -> torch.Tensor:
        return call.packed(*arguments) * 2  # something around the op

    compiled = torch.compile(double, fullgraph=True, mode="reduce-overhead")
    for seed in range(5):  # the first ones warm up, the next record, then replay
        refill(layer, seed)
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(*call.packed_arguments).clone()
        assert_same_bits(found, double(*call.packed_arguments))


@pytest.mark.parametrize("name", OPS)
def test_compiled_for_any_number_of_tokens(name: str) -> None:
    torch._dynamo.reset()
    op = calls(random_layer(Shape(3), torch.bfloat16, 0))[name].packed
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 65, 17):
        layer = random_layer(Shape(tokens), torch.bfloat16, random_seed())
        arguments = calls(layer)[name].packed_arguments
        assert_same_bits(compiled(*arguments), op(*arguments))


# --- behaviour that test_ops.py asks of every backend -----------------------------------------


@pytest.mark.parametrize("sentinel", [5, 12, *SENTINELS])
def test_sentinel_belongs_to_no_expert(sentinel: int) -> None:
    """Expert parallel marks so what other ranks own: no weight is read, nothing is added."""
    layer = random_layer(Shape(6, experts=5), torch.bfloat16, random_seed())
    place = torch.tensor([[0, 1], [sentinel, 1], [1, sentinel], [sentinel] * 2, [3, 0], [0, 0]])
    layer.top_k_index.copy_(place)
    for weight in (layer.gate_up, layer.down):
        weight.stored.values[[2, 4]] = float("nan")
    call = calls(layer)["mlp"]
    ours = call.packed(*call.packed_arguments)
    assert ours.isfinite().all()
    assert_same_bits(ours[3], torch.zeros_like(ours[3]))
    # The same as a weight of zero for an expert that is here.
    is_mine = layer.is_mine
    layer.top_k_weights.masked_fill_(~is_mine, 0)
    layer.top_k_index.masked_fill_(~is_mine, 0)
    assert torch.equal(call.packed(*call.packed_arguments), ours)


def test_gate_between_the_products() -> None:
    """A gate in torch, between packed_up and packed_down, on rows that nobody owns too."""
    layer = random_layer(Shape(64, experts=4, routing="sentinels"), torch.bfloat16, random_seed())
    found = calls(layer)
    both = found["up"].packed(*found["up"].packed_arguments)
    arguments = list(found["down"].packed_arguments)
    arguments[0] = functional.gelu(both[:, : layer.shape.inner]) * both[:, layer.shape.inner :]
    ours = found["down"].packed(*arguments)

    def reference(dtype: torch.dtype) -> torch.Tensor:
        rows = grouped(layer.hidden, layer.top_k_index, layer.gate_up.dense, dtype)
        inner = functional.gelu(rows[:, : layer.shape.inner]) * rows[:, layer.shape.inner :]
        rows = grouped(inner, layer.top_k_index, layer.down.dense, dtype)
        return layer.combine(rows, dtype)

    assert_as_good_as_dense(ours, reference(torch.bfloat16), reference(torch.float64))
    assert silu_gate(both).shape == arguments[0].shape


def test_helpers_make_valid_tensors() -> None:
    """What these tests feed to the kernels obeys the format."""
    from samoyeds_hf.format import validate

    for text in ("2:4", "1:2:32", "3:4:32", "4:8:8", "3:5:8", "15:16:40", "1:16:4"):
        pattern = SparsityPattern.parse(text)
        shape = (2, 5 * 16 * 9, 160)
        validate(random_stored(shape, pattern, torch.bfloat16, generator(0)), pattern, shape)
