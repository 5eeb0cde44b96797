"""For the GPU tests: random layers, guarded buffers, references and calls of the C library.

Every tensor that the library writes lies inside a larger buffer: filled with NaN itself, with a
border of sentinels on both sides. Every tensor that it reads has NaN around it, so that a value
read outside shows in the result. No buffer is aligned better than the 16 bytes that api.h asks for.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any, NamedTuple

import pytest
import torch
from helpers import silu_gate
from hypothesis import HealthCheck, settings
from plans import PlanNumbers
from torch.nn import functional

from samoyeds_hf import SparsityPattern, decode, library
from samoyeds_hf.format import VALID_NIBBLES, SparseWeight, stored_shapes

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
OK, INVALID_ARGUMENT, UNSUPPORTED, CUDA_ERROR = range(4)  # SamoyedsStatus
DTYPE_NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # SamoyedsDtype
HALF_DTYPES = (torch.bfloat16, torch.float16)
NAN_BYTE, SENTINEL_BYTE = 0xFF, 0xA5  # 0xFFFF is a NaN in bf16 and fp16, 0xFFFFFFFF in fp32
BORDER = 4096 + 16  # bytes
# Experts that are not here. 1 << 32 is a valid one for who looks at 32 bits only.
SENTINELS = (-1, -(1 << 40), -(1 << 63), 1 << 32, 1 << 40, (1 << 63) - 1)


def random_seed() -> int:
    """Fresh, and shown with a failure; SAMOYEDS_TEST_SEED=number makes a run again."""
    seed = int(os.environ.get("SAMOYEDS_TEST_SEED") or secrets.randbits(31))
    print(f"SAMOYEDS_TEST_SEED={seed}")
    return seed


def fresh_examples(number: int) -> settings:
    """Hypothesis with other examples in each run; a failure prints how to make it again."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=False,
        print_blob=True,
        suppress_health_check=slow,
    )


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


# --- the library -----------------------------------------------------------------------------


@lru_cache(maxsize=1)
def kernels() -> Any:
    """The loaded library, ready on the current GPU; a GPU without it fails the test."""
    loaded = library.load()
    if loaded is None:
        pytest.fail(f"a GPU is here but no kernel library: {library.unavailable_reason()}")
    assert loaded.handle.samoyeds_prepare(0) == OK, last_error()
    return loaded


def functions() -> Any:
    """The C functions; those of status return an int."""
    return kernels().handle


def last_error() -> str:
    text: bytes = library.load().handle.samoyeds_last_error()
    return text.decode()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def stream_handle() -> int:
    return torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0


def make_launch(
    workspace: Guarded | None = None, plan: Any = None, down_plan: Any = None
) -> library.Launch:
    """On the current stream of device 0; the plans are library.Plan or None."""
    launch = library.Launch()
    launch.device, launch.stream = 0, stream_handle()
    if workspace is not None:
        launch.workspace, launch.workspace_bytes = workspace.pointer, workspace.num_bytes
    for name, value in (("plan", plan), ("down_plan", down_plan)):
        if value is not None:
            setattr(launch, name, ctypes.pointer(value))
    return launch


def make_routing(
    top_k_index: torch.Tensor, top_k_weights: torch.Tensor | None = None
) -> library.Routing:
    """Of contiguous tensors, which must outlive the call."""
    routing = library.Routing()
    routing.top_k_index = _pointer(top_k_index)
    routing.num_tokens, routing.top_k = top_k_index.shape
    if top_k_weights is not None:
        routing.top_k_weights = _pointer(top_k_weights)
        routing.weights_dtype = DTYPE_NUMBERS[top_k_weights.dtype]
    return routing


def _pointer(tensor: torch.Tensor) -> int:
    """Never null, which torch says of an empty tensor."""
    return tensor.data_ptr() or _somewhere().data_ptr()


@lru_cache(maxsize=1)
def _somewhere() -> torch.Tensor:
    return torch.zeros(16, dtype=torch.uint8, device=DEVICE)


def make_plan(**numbers: int) -> library.Plan:
    plan = library.Plan()
    for name, value in numbers.items():
        setattr(plan, name, value)
    return plan


# --- buffers ---------------------------------------------------------------------------------


class Guarded:
    """A tensor of NaN inside a larger buffer, whose border nobody may write."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, border: int = SENTINEL_BYTE):
        self.border = border
        self.num_bytes = prod(shape) * torch.empty(0, dtype=dtype).element_size()
        total = self.num_bytes + 2 * BORDER
        self.buffer = torch.full((total,), border, dtype=torch.uint8, device=DEVICE)
        self.bytes = self.buffer[BORDER : BORDER + self.num_bytes]
        self.bytes.fill_(NAN_BYTE)
        self.tensor = self.bytes.view(dtype).view(shape)
        self.pointer = self.buffer.data_ptr() + BORDER  # also where the tensor is empty

    @classmethod
    def around(cls, tensor: torch.Tensor) -> Guarded:
        """A copy of an input with NaN on both sides."""
        guarded = cls(tuple(tensor.shape), tensor.dtype, border=NAN_BYTE)
        guarded.tensor.copy_(tensor)
        return guarded

    def check_border(self, what: str = "") -> None:
        sides = self.buffer[:BORDER], self.buffer[BORDER + self.num_bytes :]
        for name, side in zip(("before", "after"), sides, strict=True):
            bad = (side != self.border).nonzero()
            assert not len(bad), f"{len(bad)} bytes written {name} the buffer {what}"

    def is_untouched(self) -> bool:
        """Whether not even the inside was written."""
        return bool((self.bytes == NAN_BYTE).all())


def workspace_for(
    routing: library.Routing,
    gate_up: library.Weight | None,
    down: library.Weight | None,
    plan: Any = None,
    down_plan: Any = None,
) -> Guarded:
    """Exactly as large as the library asks for, and poisoned."""
    launch = make_launch(None, plan, down_plan)
    num_bytes = functions().samoyeds_workspace_bytes(
        ctypes.byref(launch), ctypes.byref(routing), _byref(gate_up), _byref(down)
    )
    if num_bytes < 0:
        raise refusal(-num_bytes, "workspace_bytes")
    return Guarded((num_bytes,), torch.uint8)


class LibraryRefusal(Exception):
    """A status that says that the arguments cannot be served."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status


def refusal(status: int, what: str) -> LibraryRefusal:
    """Checks that a refusal is one of the arguments, and has a text."""
    text = last_error()
    assert status in (INVALID_ARGUMENT, UNSUPPORTED), f"{what}: status {status}, {text!r}"
    assert text, f"{what}: status {status} without a text"
    return LibraryRefusal(f"{what}: {text}", status)


def _byref(structure: ctypes.Structure | None) -> Any:
    return None if structure is None else ctypes.byref(structure)


# --- random weights and layers ---------------------------------------------------------------


def random_stored(
    shape: tuple[int, int, int],  # [E, m, k]
    pattern: SparsityPattern,
    dtype: torch.dtype,
    rng: torch.Generator,
) -> SparseWeight:
    """Canonical tensors of a random mask, made directly; products with it have variance one."""
    experts, rows, k = shape
    v = pattern.sub_row(k)
    values_shape, meta_shape, index_shape = stored_shapes(shape, pattern)
    scale = (k * pattern.density) ** -0.5
    values = torch.randn(values_shape, generator=rng, device=DEVICE) * scale
    nibbles = torch.tensor(VALID_NIBBLES, dtype=torch.uint8, device=DEVICE)
    low, high = nibbles[
        torch.randint(0, len(VALID_NIBBLES), (2, *meta_shape), generator=rng, device=DEVICE)
    ]
    # The first N of a random order, sorted, are a random choice of N rows.
    blocks = (experts, rows // pattern.m, k // v, pattern.m)
    order = torch.rand(blocks, generator=rng, device=DEVICE).argsort(dim=-1)
    index = order[..., : pattern.n].sort(dim=-1).values.transpose(-1, -2).reshape(index_shape)
    return SparseWeight(values.to(dtype), low | high << 4, index.to(torch.uint8))


def pattern_number(pattern: SparsityPattern, k: int) -> tuple[int, int, int]:
    return pattern.n, pattern.m, pattern.sub_row(k)


@dataclass(frozen=True)
class Weight:
    """A sparse weight ``[E, m, k]`` on the GPU in canonical tensors; packed when asked for."""

    stored: SparseWeight
    pattern: SparsityPattern
    rows: int
    is_gate_up: bool = False

    @property
    def experts(self) -> int:
        return int(self.stored.values.shape[0])

    @property
    def cols(self) -> int:
        return int(self.stored.values.shape[2]) * 2

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.values.dtype

    @cached_property
    def dense(self) -> torch.Tensor:
        """``[E, m, k]``"""
        return decode(self.stored, self.pattern)

    @cached_property
    def packed(self) -> Guarded:
        """The packed bytes, between NaN."""
        packed = pack(self.stored, self)
        packed.check_border("of samoyeds_pack")
        return Guarded.around(packed.tensor)

    def structure(self, packed: Guarded | None = None, **changes: Any) -> library.Weight:
        """The C structure, of this weight's packed bytes or of others."""
        weight = library.Weight()
        weight.num_experts, weight.rows, weight.cols = self.experts, self.rows, self.cols
        weight.n, weight.m, weight.v = pattern_number(self.pattern, self.cols)
        weight.dtype, weight.is_gate_up = DTYPE_NUMBERS[self.dtype], int(self.is_gate_up)
        if packed is not None:
            weight.packed, weight.num_bytes = packed.pointer, packed.num_bytes
        for name, value in changes.items():
            setattr(weight, name, value)
        return weight

    @property
    def ready(self) -> library.Weight:
        """The C structure of the packed weight."""
        return self.structure(self.packed)


def packed_bytes(weight: Weight) -> int:
    num_bytes: int = functions().samoyeds_packed_bytes(ctypes.byref(weight.structure()))
    assert num_bytes > 0, last_error()
    return num_bytes


def pack(stored: SparseWeight, weight: Weight) -> Guarded:
    """The packed bytes of canonical tensors, which may break the format, with sentinels around."""
    packed = Guarded((packed_bytes(weight),), torch.uint8)
    inputs = [Guarded.around(tensor) for tensor in stored]
    status = functions().samoyeds_pack(
        ctypes.byref(make_launch()),
        ctypes.byref(weight.structure(packed)),
        *(tensor.pointer for tensor in inputs),
    )
    assert status == OK, last_error()
    synchronize()
    packed.check_border("of samoyeds_pack")
    return packed


def unpack(packed: Guarded, weight: Weight) -> SparseWeight:
    """Canonical tensors of packed bytes; checks the borders."""
    outputs = [Guarded(tuple(tensor.shape), tensor.dtype) for tensor in weight.stored]
    status = functions().samoyeds_unpack(
        ctypes.byref(make_launch()),
        ctypes.byref(weight.structure(packed)),
        *(tensor.pointer for tensor in outputs),
    )
    assert status == OK, last_error()
    synchronize()
    for tensor in outputs:
        tensor.check_border("of samoyeds_unpack")
    return SparseWeight(*(tensor.tensor for tensor in outputs))


class Shape(NamedTuple):
    """T tokens, E experts, K choices, H hidden, I inner, and what else a layer has."""

    tokens: int
    experts: int = 5
    top_k: int = 2
    hidden: int = 128
    inner: int = 96
    up: str = "1:2:32"
    down: str = "1:2:32"
    routing: str = "any"
    weights_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        """What differs from the default: a short test id."""
        changed = [
            f"{name}={value}"
            for name, value in self._asdict().items()
            if value != self._field_defaults.get(name)
        ]
        return " ".join(changed).replace("torch.", "")


ROUTINGS = ("any", "distinct", "one", "few", "sentinels", "nobody")


def random_index(shape: Shape, rng: torch.Generator) -> torch.Tensor:
    """``[T, K]`` experts: any (also twice in a token), or what the name says."""
    size = (shape.tokens, shape.top_k)

    def integers(high: int) -> torch.Tensor:
        return torch.randint(0, high, size, generator=rng, device=DEVICE)

    if shape.routing == "distinct":
        assert shape.top_k <= shape.experts
        scores = torch.rand(shape.tokens, shape.experts, generator=rng, device=DEVICE)
        return scores.argsort(dim=-1)[:, : shape.top_k].contiguous()
    if shape.routing == "one":
        return torch.full(size, shape.experts - 1, dtype=torch.int64, device=DEVICE)
    if shape.routing == "few":  # the first and the last; all others are idle
        return integers(2) * (shape.experts - 1)
    elsewhere = torch.tensor((*SENTINELS, shape.experts, shape.experts + 7), device=DEVICE)
    sentinels = elsewhere[integers(len(elsewhere))]
    if shape.routing == "nobody":
        return sentinels
    index = integers(shape.experts)
    return (
        torch.where(integers(3) == 0, sentinels, index) if shape.routing == "sentinels" else index
    )


@dataclass(frozen=True)
class Layer:
    """A random expert layer on the GPU."""

    shape: Shape
    hidden: torch.Tensor  # [T, H]
    top_k_index: torch.Tensor  # [T, K] int64
    top_k_weights: torch.Tensor  # [T, K]; NaN where the choice belongs to no expert here
    gate_up: Weight  # of [E, 2I, H]
    down: Weight  # of [E, H, I]

    @property
    def is_mine(self) -> torch.Tensor:
        """``[T, K]``: the choice belongs to an expert here."""
        return (self.top_k_index >= 0) & (self.top_k_index < self.shape.experts)

    def reference(self, dtype: torch.dtype) -> torch.Tensor:
        """The layer ``[T, H]`` on dense weights, everything in dtype."""
        both = grouped(self.hidden, self.top_k_index, self.gate_up.dense, dtype)
        rows = grouped(silu_gate(both), self.top_k_index, self.down.dense, dtype)
        return self.combine(rows, dtype)

    def combine(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``[T, H]``: the weighted sum over K of rows ``[T*K, H]``."""
        weights = torch.where(self.is_mine, self.top_k_weights.to(dtype), 0)
        out = torch.zeros(self.shape.tokens, rows.shape[1], dtype=dtype, device=DEVICE)
        for choice in range(self.shape.top_k):
            out += rows[choice :: self.shape.top_k] * weights[:, choice, None]
        return out


def grouped(
    x: torch.Tensor,  # [T, k], or [T*K, k] with a row for each choice
    top_k_index: torch.Tensor,  # [T, K]
    dense: torch.Tensor,  # [E, m, k]
    dtype: torch.dtype,
) -> torch.Tensor:
    """Row t*K + j of ``[T*K, m]``: x's row times the weight of token t's expert j, or zeros."""
    expert_of_row = top_k_index.reshape(-1)
    rows_per_token = expert_of_row.shape[0] // max(x.shape[0], 1)
    x = x.to(dtype)
    out = torch.zeros(expert_of_row.shape[0], dense.shape[1], dtype=dtype, device=x.device)
    for expert in expert_of_row.unique().tolist():
        if 0 <= expert < dense.shape[0]:
            hit = (expert_of_row == expert).nonzero().squeeze(1)
            out[hit] = functional.linear(x[hit // rows_per_token], dense[expert].to(dtype))
    return out


def random_weight(
    shape: tuple[int, int, int],
    text: str,
    dtype: torch.dtype,
    rng: torch.Generator,
    is_gate_up: bool = False,
) -> Weight:
    pattern = SparsityPattern.parse(text)
    pattern.check_fits(shape[1], shape[2])
    return Weight(random_stored(shape, pattern, dtype, rng), pattern, shape[1], is_gate_up)


def random_layer(shape: Shape, dtype: torch.dtype, seed: int) -> Layer:
    rng = generator(seed)
    tokens, experts, top_k, hidden, inner = shape[:5]
    gate_up = random_weight((experts, 2 * inner, hidden), shape.up, dtype, rng, is_gate_up=True)
    down = random_weight((experts, hidden, inner), shape.down, dtype, rng)
    x = torch.randn(tokens, hidden, generator=rng, device=DEVICE).to(dtype)
    index = random_index(shape, rng)
    scores = torch.rand(tokens, top_k, generator=rng, device=DEVICE)
    weights = (scores / scores.sum(dim=-1, keepdim=True)).to(shape.weights_dtype)
    is_mine = (index >= 0) & (index < experts)
    weights.masked_fill_(~is_mine, float("nan"))  # nobody may read these
    guarded = (Guarded.around(tensor).tensor for tensor in (index, weights))
    return Layer(shape, x, *guarded, gate_up, down)


# --- calls -----------------------------------------------------------------------------------


def moe_mlp(layer: Layer, plan: Any = None, down_plan: Any = None) -> torch.Tensor:
    """samoyeds_moe_mlp with guards around everything; raises LibraryRefusal."""
    gate_up, down = layer.gate_up.ready, layer.down.ready
    routing = make_routing(layer.top_k_index, layer.top_k_weights)
    workspace = workspace_for(routing, gate_up, down, plan, down_plan)
    return _run(
        "moe_mlp",
        make_launch(workspace, plan, down_plan),
        [routing, gate_up, down],
        layer.hidden,
        (layer.shape.tokens, layer.down.rows),
        workspace,
    )


def moe_up(layer: Layer, plan: Any = None, weight: Weight | None = None) -> torch.Tensor:
    """samoyeds_moe_up: ``[T*K, m]``."""
    weight = weight or layer.gate_up
    routing, ready = make_routing(layer.top_k_index), weight.ready
    workspace = workspace_for(routing, ready, None, plan)
    shape = (layer.top_k_index.numel(), weight.rows)
    launch = make_launch(workspace, plan)
    return _run("moe_up", launch, [routing, ready], layer.hidden, shape, workspace)


def moe_down(layer: Layer, inner: torch.Tensor, plan: Any = None) -> torch.Tensor:
    """samoyeds_moe_down: ``[T, H]`` of rows ``[T*K, I]``."""
    routing, ready = make_routing(layer.top_k_index, layer.top_k_weights), layer.down.ready
    workspace = workspace_for(routing, None, ready, plan)
    shape = (layer.shape.tokens, layer.down.rows)
    launch = make_launch(workspace, plan)
    return _run("moe_down", launch, [routing, ready], inner, shape, workspace)


def linear(weight: Weight, x: torch.Tensor, plan: Any = None) -> torch.Tensor:
    """samoyeds_linear: ``[rows of x, m]``, with exactly the workspace that it asks for."""
    out = Guarded((x.shape[0], weight.rows), x.dtype)
    source, ready = Guarded.around(x), weight.ready
    num_bytes = linear_workspace_bytes(ready, x.shape[0], plan)
    workspace = Guarded((num_bytes,), torch.uint8) if num_bytes > 0 else None
    status = functions().samoyeds_linear(
        ctypes.byref(make_launch(workspace, plan)),
        ctypes.byref(ready),
        source.pointer,
        x.shape[0],
        out.pointer,
    )
    assert status == max(-num_bytes, 0), f"{num_bytes} bytes, then status {status}: {last_error()}"
    result = _result("linear", status, out)
    if workspace is not None:
        workspace.check_border("(workspace of linear)")
    return result


def linear_workspace_bytes(weight: library.Weight, num_rows: int, plan: Any = None) -> int:
    """Or a negative status."""
    launch = make_launch(None, plan)
    num_bytes: int = functions().samoyeds_linear_workspace_bytes(
        ctypes.byref(launch), ctypes.byref(weight), num_rows
    )
    return num_bytes


def _run(
    name: str,
    launch: library.Launch,
    structures: list[ctypes.Structure],
    source: torch.Tensor,
    out_shape: tuple[int, ...],
    workspace: Guarded,
) -> torch.Tensor:
    out = Guarded(out_shape, source.dtype)
    guarded = Guarded.around(source)
    status = getattr(functions(), f"samoyeds_{name}")(
        ctypes.byref(launch), *map(ctypes.byref, structures), guarded.pointer, out.pointer
    )
    result = _result(name, status, out)
    workspace.check_border(f"(workspace of {name})")
    return result


def _result(name: str, status: int, out: Guarded) -> torch.Tensor:
    error = refusal(status, name) if status != OK else None
    synchronize()
    out.check_border(f"of {name}")
    if error is not None:
        assert out.is_untouched(), f"written all the same: {error}"
        raise error
    return out.tensor


# --- plans -----------------------------------------------------------------------------------


def chosen_plan(weight: Weight, tokens: int, top_k: int, is_down: bool) -> library.Plan:
    """What the heuristics choose."""
    plan = library.Plan()
    status = functions().samoyeds_choose_plan(
        0, ctypes.byref(weight.structure()), tokens, top_k, int(is_down), ctypes.byref(plan)
    )
    assert status == OK, last_error()
    return plan


def refused(plan: PlanNumbers, layer: Layer, is_down: bool) -> str | None:
    """What the library says against a plan; None: it would run. Nothing is queued."""
    routing = make_routing(layer.top_k_index, layer.top_k_weights)
    weight = layer.down if is_down else layer.gate_up
    pointer = ctypes.byref(weight.structure())
    launch = make_launch(plan=library.Plan(*plan))
    arguments = ctypes.byref(launch), ctypes.byref(routing)
    products = (None, pointer) if is_down else (pointer, None)
    num_bytes = functions().samoyeds_workspace_bytes(*arguments, *products)
    return str(refusal(-num_bytes, "workspace_bytes")) if num_bytes < 0 else None
