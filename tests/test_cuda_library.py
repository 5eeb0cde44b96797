"""The C interface: refusals that write nothing, calls that only queue work.

Needs a CUDA device.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cuda_helpers import (
    BORDER,
    DEVICE,
    GPU,
    INVALID_ARGUMENT,
    OK,
    UNSUPPORTED,
    Guarded,
    Layer,
    Shape,
    Weight,
    functions,
    generator,
    kernels,
    last_error,
    linear,
    linear_workspace_bytes,
    make_launch,
    make_plan,
    make_routing,
    moe_down,
    moe_mlp,
    moe_up,
    pack,
    packed_bytes,
    random_layer,
    random_weight,
    stream_handle,
    synchronize,
    unpack,
    workspace_for,
)
from helpers import assert_same_bits

from samoyeds_hf import interface, library
from samoyeds_hf.errors import KernelError

pytestmark = GPU


# --- arguments -------------------------------------------------------------------------------

Arguments = dict[str, Any]
FUNCTIONS = {
    "moe_mlp": ("launch", "routing", "gate_up", "down", "x", "out"),
    "moe_up": ("launch", "routing", "gate_up", "x", "out"),
    "moe_down": ("launch", "routing", "down", "inner", "out"),
    "linear": ("launch", "single", "x", "num_rows", "out"),
    "pack": ("launch", "gate_up", "values", "meta", "index"),
    "unpack": ("launch", "gate_up", "values", "meta", "index"),
    "route": ("launch", "routing", "num_experts", "tile_tokens", "pairs", "tiles", "num_tiles"),
}
WRITTEN = {  # besides the workspace
    **dict.fromkeys(("moe_mlp", "moe_up", "moe_down", "linear"), ("out",)),
    "pack": ("packed",),
    "unpack": ("values", "meta", "index"),
    "route": ("pairs", "tiles", "num_tiles"),
}
Change = Callable[[Arguments], None]


def good_arguments(function: str) -> tuple[Arguments, dict[str, Guarded]]:
    """Arguments that a function takes, and the poisoned buffers that it would write."""
    layer = random_layer(Shape(12, experts=3), torch.bfloat16, 0)
    single = random_weight((1, 64, 128), "1:2:32", torch.bfloat16, generator(0))
    routing = make_routing(layer.top_k_index, layer.top_k_weights)
    gate_up, down = layer.gate_up.ready, layer.down.ready
    workspace = Guarded((1 << 22,), torch.uint8)
    outputs = {
        "workspace": workspace,
        "out": Guarded((12 * 2, 192), torch.bfloat16),  # large enough for every function
        "packed": Guarded((packed_bytes(layer.gate_up),), torch.uint8),
        "pairs": Guarded((24,), torch.int32),
        "tiles": Guarded((64, 4), torch.int32),
        "num_tiles": Guarded((1,), torch.int32),
    }
    stored = layer.gate_up.stored
    if function == "pack":
        gate_up = layer.gate_up.structure(outputs["packed"])
        inputs = {name: Guarded.around(getattr(stored, name)) for name in stored._fields}
    else:
        inputs = {
            name: Guarded(tuple(tensor.shape), tensor.dtype)
            for name, tensor in zip(stored._fields, stored, strict=True)
        }
        outputs |= inputs
    inner = torch.randn(24, 96, device=DEVICE).bfloat16()
    arguments: Arguments = {
        "launch": make_launch(workspace),
        "routing": routing,
        "gate_up": gate_up,
        "down": down,
        "single": single.ready,
        "x": layer.hidden.data_ptr(),
        "inner": inner.data_ptr(),
        "num_rows": 12,
        "num_experts": 3,
        "tile_tokens": 16,
        "keep_alive": (layer, single, inner, inputs),
    }
    return {
        **arguments,
        **{name: out.pointer for name, out in outputs.items()},
        **{name: tensor.pointer for name, tensor in inputs.items()},
    }, outputs


def call(function: str, arguments: Arguments) -> int:
    values = [arguments[name] for name in FUNCTIONS[function]]
    passed = [ctypes.byref(v) if isinstance(v, ctypes.Structure) else v for v in values]
    status: int = getattr(functions(), f"samoyeds_{function}")(*passed)
    return status


def put(name: str, value: Any) -> Change:
    """Argument ``name``, or member ``argument.member``, becomes value."""

    def change(arguments: Arguments) -> None:
        argument, _, member = name.partition(".")
        if member:
            setattr(arguments[argument], member, value)
        else:
            arguments[argument] = value

    return change


def add(name: str, amount: int) -> Change:
    def change(arguments: Arguments) -> None:
        argument, _, member = name.partition(".")
        old = getattr(arguments[argument], member) if member else arguments[argument]
        put(name, old + amount)(arguments)

    return change


HUGE = (1 << 31) + 8, 1 << 40, (1 << 63) - 8


def bad_weights(name: str) -> Iterator[tuple[str, Change]]:
    yield f"{name}: null", put(name, None)
    yield f"{name}: no packed", put(f"{name}.packed", None)
    yield f"{name}: misaligned packed", add(f"{name}.packed", 8)
    for amount in (-1, -16, -(1 << 40)):
        yield f"{name}: num_bytes {amount:+}", add(f"{name}.num_bytes", amount)
    for member, values in {
        "num_experts": (-1, 1 << 16, *HUGE),
        "rows": (0, -2, 63, *HUGE),
        "cols": (0, -8, 4, 12, 100, *HUGE),  # 100 is no multiple of 8
        "n": (0, -1, 3, *HUGE),
        "m": (0, -1, 17, *HUGE),
        "v": (0, -4, 6, 20, 1 << 20, *HUGE),  # 6 is no multiple of 4, 20 divides no row here
        "dtype": (-1, 2, 3, 1 << 32),
    }.items():
        for value in values:
            yield f"{name}: {member} = {value}", put(f"{name}.{member}", value)


def bad_routing(with_weights: bool) -> Iterator[tuple[str, Change]]:
    yield "routing: null", put("routing", None)
    yield "routing: no top_k_index", put("routing.top_k_index", None)
    yield "routing: misaligned top_k_index", add("routing.top_k_index", 4)
    for member in ("num_tokens", "top_k"):
        for value in (-1, *HUGE):
            yield f"routing: {member} = {value}", put(f"routing.{member}", value)
    yield "routing: no choice", put("routing.top_k", 0)
    if with_weights:
        yield "routing: no top_k_weights", put("routing.top_k_weights", None)
        yield "routing: misaligned top_k_weights", add("routing.top_k_weights", 2)
        for value in (-1, 3, 1 << 32):
            yield f"routing: weights_dtype = {value}", put("routing.weights_dtype", value)


def bad_launches(has_workspace: bool) -> Iterator[tuple[str, Change]]:
    yield "launch: null", put("launch", None)
    for device in (-1, 1000, 1 << 32):
        yield f"launch: device {device}", put("launch.device", device)
    if has_workspace:
        yield "launch: no workspace", put("launch.workspace", None)
        yield "launch: misaligned workspace", add("launch.workspace", 8)
        for size in (0, -1, 16):
            yield f"launch: workspace of {size}", put("launch.workspace_bytes", size)


def bad_pointers(*names: str) -> Iterator[tuple[str, Change]]:
    for name in names:
        yield f"{name}: null", put(name, None)
        yield f"{name}: misaligned", add(name, 1)


def bad_calls(function: str) -> Iterator[tuple[str, Change]]:
    """What may be wrong with the arguments of a function, one at a time."""
    names = FUNCTIONS[function]
    has_workspace = function.startswith("moe_")
    yield from bad_launches(has_workspace)
    for weight in sorted({"gate_up", "down", "single"} & set(names)):
        yield from bad_weights(weight)
    if "routing" in names:
        yield from bad_routing(with_weights=function in ("moe_mlp", "moe_down"))
    read_or_written = {"x", "inner", "out", "values", "pairs", "tiles", "num_tiles"}
    yield from bad_pointers(*sorted(read_or_written & set(names)))
    if function == "moe_mlp":
        yield "gate_up that is none", put("gate_up.is_gate_up", 0)
        yield "down of another dtype", put("down.dtype", 1)
        yield "gate_up of another dtype", put("gate_up.dtype", 1)
    if function in ("pack", "unpack"):
        yield "no meta", put("meta", None)
        yield "no index", put("index", None)
    if function == "linear":
        for value in (-1, *HUGE):
            yield f"num_rows = {value}", put("num_rows", value)
    if function == "route":
        for argument in ("num_experts", "tile_tokens"):
            for value in (0, -1, *HUGE):
                yield f"{argument} = {value}", put(argument, value)


def accepted(function: str, arguments: Arguments) -> list[str]:
    """The bad calls that a function takes, or refuses without a text."""
    found = []
    for what, change in bad_calls(function):
        structures = [
            (value, bytes(value))
            for value in arguments.values()
            if isinstance(value, ctypes.Structure)
        ]
        bad = dict(arguments)
        change(bad)
        status = call(function, bad)
        for value, before in structures:
            ctypes.memmove(ctypes.byref(value), before, len(before))
        if status not in (INVALID_ARGUMENT, UNSUPPORTED):
            found.append(f"{what}: status {status}")
        elif not last_error():
            found.append(f"{what}: no text")
    return found


@pytest.mark.parametrize("function", FUNCTIONS)
def test_good_arguments_are_taken(function: str) -> None:
    """Else the next test would show nothing."""
    arguments, outputs = good_arguments(function)
    assert call(function, arguments) == OK, last_error()
    synchronize()
    assert not any(outputs[name].is_untouched() for name in WRITTEN[function])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bad_arguments_are_refused(function: str) -> None:
    """With a status and a text, nothing written, and no CUDA error left behind."""
    arguments, outputs = good_arguments(function)
    with captured():  # what is taken by mistake must not run: it would end the process
        arguments["launch"].stream = stream_handle()
        assert accepted(function, arguments) == []
    arguments["launch"].stream = stream_handle()
    assert accepted(function, arguments) == []
    synchronize()
    for name, buffer in outputs.items():
        assert buffer.is_untouched(), f"{name} was written"
        buffer.check_border(name)
    assert call(function, arguments) == OK, last_error()
    synchronize()


@contextmanager
def captured() -> Iterator[torch.cuda.CUDAGraph]:
    """Nothing runs on the current stream: all of it goes into a graph that nobody replays."""
    stream = torch.cuda.Stream()
    synchronize()
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        graph.capture_begin()
        try:
            yield graph
        finally:
            graph.capture_end()


def test_a_device_that_is_not_there() -> None:
    """CUDA's own refusal comes as a status, and is not found again by who comes next."""
    arguments, outputs = good_arguments("moe_mlp")
    arguments["launch"].device = 63
    assert call("moe_mlp", arguments) != OK
    assert last_error()
    assert functions().samoyeds_prepare(63) != OK
    assert outputs["out"].is_untouched()
    arguments["launch"].device = 0
    assert call("moe_mlp", arguments) == OK, last_error()
    synchronize()


def test_products_that_do_not_fit() -> None:
    """gate_up [2I, H] and down [H, I] of one number of experts."""
    arguments, outputs = good_arguments("moe_mlp")
    others = {
        "down has other inner": ("down", (3, 128, 64)),
        "down has other rows": ("down", (3, 64, 96)),
        "down has more experts": ("down", (4, 128, 96)),
        "gate_up has fewer experts": ("gate_up", (2, 192, 128)),
        "gate_up has other inner": ("gate_up", (3, 128, 128)),
    }
    for what, (name, shape) in others.items():
        other = random_weight(shape, "1:2:32", torch.bfloat16, generator(0), name == "gate_up")
        assert call("moe_mlp", {**arguments, name: other.ready}) == INVALID_ARGUMENT, what
        assert last_error(), what
    three = random_weight((3, 64, 128), "1:2:32", torch.bfloat16, generator(0))
    assert call("linear", {**good_arguments("linear")[0], "single": three.ready}) != OK
    assert outputs["out"].is_untouched()


def test_workspace_one_byte_too_small() -> None:
    layer = random_layer(Shape(40, experts=3), torch.bfloat16, 0)
    routing = make_routing(layer.top_k_index, layer.top_k_weights)
    gate_up, down = layer.gate_up.ready, layer.down.ready
    workspace = workspace_for(routing, gate_up, down)
    out = Guarded((40, 128), torch.bfloat16)
    launch = make_launch(workspace)
    launch.workspace_bytes -= 1
    structures = map(ctypes.byref, (launch, routing, gate_up, down))
    x = layer.hidden.data_ptr()
    assert functions().samoyeds_moe_mlp(*structures, x, out.pointer) == INVALID_ARGUMENT
    assert str(workspace.num_bytes) in last_error()
    synchronize()
    assert out.is_untouched()


def test_sizes_of_bad_arguments_are_negative() -> None:
    """Functions that return a size return a status with its sign turned."""
    two, one = (
        random_weight((experts, 64, 64), "1:2:32", torch.bfloat16, generator(0))
        for experts in (2, 1)
    )
    for member, value in (
        ("rows", -2),
        ("cols", 100),
        ("m", 17),
        ("dtype", 2),
        ("num_experts", -1),
    ):
        bad = two.structure(**{member: value})
        assert functions().samoyeds_packed_bytes(ctypes.byref(bad)) < 0, member
        assert last_error()
        routing = make_routing(torch.zeros(4, 2, dtype=torch.int64, device=DEVICE))
        launch = ctypes.byref(make_launch())
        sizes = launch, ctypes.byref(routing), ctypes.byref(bad), None
        assert functions().samoyeds_workspace_bytes(*sizes) < 0, member
        assert last_error()
        assert linear_workspace_bytes(one.structure(**{member: value}), 4) < 0, member
        assert last_error()
    for num_rows in (-1, *HUGE):
        assert linear_workspace_bytes(one.structure(), num_rows) == -INVALID_ARGUMENT
        assert "num_rows" in last_error()
    assert linear_workspace_bytes(two.structure(), 4) == -INVALID_ARGUMENT
    assert "one expert" in last_error()


def test_text_of_an_error_belongs_to_its_thread() -> None:
    """Two threads fail in different ways again and again; each reads its own text."""
    arguments, _ = good_arguments("moe_mlp")
    wrong: list[str] = []
    barrier = threading.Barrier(2)

    def fail(member: str) -> None:
        mine = good_arguments("moe_mlp")[0]
        setattr(mine["routing"], member, -1)
        assert call("moe_mlp", mine) != OK
        expected = last_error()
        for _ in range(200):
            barrier.wait()
            call("moe_mlp", mine)
            barrier.wait()
            if last_error() != expected:
                wrong.append(last_error())

    threads = [threading.Thread(target=fail, args=(name,)) for name in ("num_tokens", "top_k")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert call("moe_mlp", arguments) == OK


# --- what the library says of itself ---------------------------------------------------------


def test_names_and_versions() -> None:
    loaded = kernels()
    assert loaded.layout == "m16k128.v4"
    assert "sm_" in loaded.build_info
    assert functions().samoyeds_abi_version() == interface.ABI_VERSION
    bad = make_launch()
    bad.device = -1
    status = call("moe_mlp", {**good_arguments("moe_mlp")[0], "launch": bad})
    with pytest.raises(KernelError, match="device"):
        loaded.check(status)
    loaded.check(OK)


# --- no allocation, no waiting, the caller's device ------------------------------------------


FOR_HOPPER = Shape(600, experts=2, inner=128)  # its kernel, on a GPU that has it


def all_calls(layer: Layer, weight: Weight) -> None:
    inner = torch.zeros(layer.top_k_index.numel(), layer.shape.inner, device=DEVICE)
    moe_mlp(layer)
    moe_up(layer)
    moe_down(layer, inner.to(layer.hidden.dtype))
    linear(weight, layer.hidden)
    unpack(pack(weight.stored, weight), weight)


KERNEL, MEMCPY, MEMSET = range(3)  # CUgraphNodeType


def node_types(graph: torch.cuda.CUDAGraph) -> list[int]:
    driver, handle = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph.raw_cuda_graph())
    count, kind = ctypes.c_size_t(), ctypes.c_int()
    assert driver.cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    nodes = (ctypes.c_void_p * count.value)()
    assert driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count)) == 0
    types = []
    for node in nodes:
        assert driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        types.append(kind.value)
    return types


@pytest.mark.parametrize("function", FUNCTIONS)
def test_calls_only_queue_work(function: str) -> None:
    """No memory is allocated and nothing waits: a capture fails at either.

    An allocation in the order of the stream would be a node of its own.
    """
    arguments, _ = good_arguments(function)
    with captured() as graph:
        arguments["launch"].stream = stream_handle()
        status = call(function, arguments)
    assert status == OK, last_error()
    types = node_types(graph)
    assert KERNEL in types
    assert set(types) <= {KERNEL, MEMCPY, MEMSET}


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ,
    reason="the memory in use is that of all processes: run it without -n",
)
def test_nothing_is_allocated_on_the_device() -> None:
    kernels()
    layer = random_layer(Shape(300, experts=6), torch.bfloat16, 0)
    general = random_layer(Shape(300, experts=6, up="4:8:32", down="4:8:32"), torch.bfloat16, 0)
    many = random_layer(FOR_HOPPER, torch.bfloat16, 0)
    weight = random_weight((1, 128, 128), "1:2:32", torch.bfloat16, generator(0))
    for each in (layer, general, many):
        all_calls(each, weight)  # torch allocates its buffers, and loads its own kernels

    def foreign_bytes() -> int:
        """Memory in use on the device that is not torch's."""
        synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    before = foreign_bytes()
    for _ in range(100):  # CUDA takes 2 MiB at a time: little that is lost would not show at once
        for each in (layer, general, many):
            all_calls(each, weight)
    assert foreign_bytes() == before


def test_calls_do_not_wait_for_the_device() -> None:
    """Everything returns while the stream is still busy with something else."""
    patterns = ("1:2:32", "3:4:32", "2:4", "4:8:32")
    for shape in (*(Shape(100, experts=4, up=text, down=text) for text in patterns), FOR_HOPPER):
        layer = random_layer(shape, torch.bfloat16, 0)
        routing = make_routing(layer.top_k_index, layer.top_k_weights)
        gate_up, down = layer.gate_up.ready, layer.down.ready
        workspace = workspace_for(routing, gate_up, down)
        expected = moe_mlp(layer)
        out = Guarded((shape.tokens, 128), torch.bfloat16)
        synchronize()
        begin = time.monotonic()
        torch.cuda._sleep(2_000_000_000)  # clock cycles: about a second
        busy = torch.cuda.Event()
        busy.record()
        structures = map(ctypes.byref, (make_launch(workspace), routing, gate_up, down))
        x = layer.hidden.data_ptr()
        status = functions().samoyeds_moe_mlp(*structures, x, out.pointer)
        is_busy = not busy.query()
        assert status == OK, last_error()
        assert is_busy, f"the call took {time.monotonic() - begin:.2f} s"
        synchronize()
        assert_same_bits(out.tensor, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_callers_device_is_left_as_it_was() -> None:
    layer = random_layer(Shape(9), torch.bfloat16, 0)
    expected = moe_mlp(layer)
    torch.cuda.set_device(1)
    try:
        assert functions().samoyeds_prepare(1) == OK, last_error()
        assert functions().samoyeds_prepare(0) == OK, last_error()
        assert torch.cuda.current_device() == 1
        # The tensors lie on device 0, and so does the launch.
        with torch.cuda.device(0):
            routing = make_routing(layer.top_k_index, layer.top_k_weights)
            gate_up, down = layer.gate_up.ready, layer.down.ready
            workspace = workspace_for(routing, gate_up, down)
            launch = make_launch(workspace)
            out = Guarded((9, 128), torch.bfloat16)
            torch.cuda.synchronize(0)
        structures = map(ctypes.byref, (launch, routing, gate_up, down))
        x = layer.hidden.data_ptr()
        assert functions().samoyeds_moe_mlp(*structures, x, out.pointer) == OK, last_error()
        assert torch.cuda.current_device() == 1
        torch.cuda.synchronize(0)
        assert_same_bits(out.tensor, expected)
    finally:
        torch.cuda.set_device(0)


def test_buffers_are_aligned_as_the_interface_asks_and_no_better() -> None:
    guarded = Guarded((64,), torch.bfloat16)
    assert guarded.pointer % 32 == 16
    assert BORDER % 32 == 16
    assert make_plan(stages=3).stages == 3
    assert isinstance(make_launch(), library.Launch)
