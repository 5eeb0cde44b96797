"""Expert layers of real shapes with random weights, made on the device, and tokens for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from timing import Run
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from samoyeds_hf import SparsityPattern
from samoyeds_hf.format import VALID_NIBBLES, SparseWeight, decode, stored_shapes
from samoyeds_hf.ops import moe_mlp
from samoyeds_hf.packed import PackedSpec, pack, why_not
from samoyeds_hf.packed_ops import packed_mlp

DTYPE = torch.bfloat16
WEIGHT_STD = 0.02
COLD_BYTES = 240e6  # of weights that one replay reads: four times the L2 of an H200
FLOOR_BYTES_PER_S = 4.3e12  # device copy on an H200, read and written


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer of experts."""

    hidden: int  # H
    inner: int  # I
    experts: int  # E
    top_k: int  # K

    @property
    def gate_up(self) -> tuple[int, int, int]:
        return self.experts, 2 * self.inner, self.hidden

    @property
    def down(self) -> tuple[int, int, int]:
        return self.experts, self.hidden, self.inner

    def expert_bytes(self, pattern: SparsityPattern | None) -> int:
        """Bytes of one expert's weights: canonical tensors, or dense without a pattern."""
        matrices = (self.gate_up[1:], self.down[1:])
        if pattern is None:
            return sum(2 * rows * cols for rows, cols in matrices)
        return sum(pattern.num_bytes(rows, cols, DTYPE.itemsize) for rows, cols in matrices)


SHAPES = {
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "mixtral-8x22b": Shape(6144, 16384, 8, 2),
    "qwen2-57b-a14b": Shape(3584, 2560, 64, 8),
    "qwen1.5-moe": Shape(2048, 1408, 60, 4),
    "deepseek-moe-16b": Shape(2048, 1408, 64, 6),
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
}


@dataclass(frozen=True)
class Tokens:
    """What a router hands to the experts, and the same sorted by expert for bare products."""

    hidden: torch.Tensor  # [T, H]
    top_k_index: torch.Tensor  # [T, K] int64, distinct experts, all equally likely
    top_k_weights: torch.Tensor  # [T, K]
    counts: list[int]  # pairs of each expert
    offsets: torch.Tensor  # [E] int32: cumulative counts

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden, self.top_k_index, self.top_k_weights

    @property
    def num_hit(self) -> int:
        """Experts with tokens."""
        return sum(count > 0 for count in self.counts)

    def sorted_by_expert(self) -> torch.Tensor:
        """``[T*K, H]``: the hidden state of each pair, in the order of experts."""
        order = self.top_k_index.flatten().argsort(stable=True)
        return self.hidden[order // self.top_k_index.shape[1]]


def num_runs(shape: Shape, num_tokens: int, pattern: SparsityPattern) -> int:
    """How many copies of a layer to time together, so that none finds its weights in the L2.

    The experts hit are those expected, so that the copies can be made before the tokens.
    """
    missed = (1 - shape.top_k / shape.experts) ** num_tokens
    return copies_of(shape.experts * (1 - missed) * shape.expert_bytes(pattern))


def copies_of(num_bytes: float) -> int:
    """How many weights of so many bytes one replay has to read."""
    return max(1, math.ceil(COLD_BYTES / num_bytes))


def random_tokens(shape: Shape, num_tokens: int, device: torch.device) -> Tokens:
    hidden = torch.randn(num_tokens, shape.hidden, device=device, dtype=DTYPE)
    scores = torch.rand(num_tokens, shape.experts, device=device)
    top_k_weights, top_k_index = scores.topk(shape.top_k, dim=-1)
    counts = torch.bincount(top_k_index.flatten(), minlength=shape.experts)
    return Tokens(
        hidden,
        top_k_index,
        top_k_weights.softmax(dim=-1).to(DTYPE),  # as most models hand them over
        counts.tolist(),
        counts.cumsum(0).to(torch.int32),
    )


def random_stored(
    dense_shape: tuple[int, ...], pattern: SparsityPattern, device: torch.device
) -> SparseWeight:
    """Random canonical tensors of a weight ``[..., m, k]``, without a dense weight in between."""
    values, meta, index = stored_shapes(dense_shape, pattern)
    nibbles = torch.tensor(VALID_NIBBLES, dtype=torch.uint8, device=device)
    both = (nibbles[:, None] | nibbles << 4).flatten()  # the bytes that meta may hold
    return SparseWeight(
        torch.empty(values, dtype=DTYPE, device=device).normal_(std=WEIGHT_STD),
        both[torch.randint(len(both), meta, dtype=torch.int32, device=device)],
        _random_index(index, pattern, device),
    )


def _random_index(
    shape: tuple[int, ...], pattern: SparsityPattern, device: torch.device
) -> torch.Tensor:
    if pattern.n == 1:
        return torch.randint(pattern.m, shape, dtype=torch.uint8, device=device)
    *lead, kept, per_row = shape
    blocks = kept // pattern.n
    order = torch.rand(*lead, blocks, pattern.m, per_row, device=device).argsort(dim=-2)
    slots = order[..., : pattern.n, :].sort(dim=-2).values
    return slots.reshape(shape).to(torch.uint8)


def empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- dense ----------------------------------------------------------------------------------------


def dense_layer(
    shape: Shape, device: torch.device, weights: tuple[torch.Tensor, torch.Tensor] | None = None
) -> MixtralExperts:
    """Transformers' experts, with random weights or the given gate_up and down."""
    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    with torch.device("meta"):
        layer = MixtralExperts(config).to(DTYPE).eval().requires_grad_(False)
    if weights is None:
        weights = tuple(
            torch.empty(size, dtype=DTYPE, device=device).normal_(std=WEIGHT_STD)
            for size in (shape.gate_up, shape.down)
        )
    layer.gate_up_proj, layer.down_proj = (torch.nn.Parameter(w, False) for w in weights)
    return layer


def grouped_alone(layer: MixtralExperts, tokens: Tokens) -> Run:
    """Both products and the gate on sorted tokens, with ``F.grouped_mm``."""
    x, offsets = tokens.sorted_by_expert(), tokens.offsets
    gate_up, down = layer.gate_up_proj.transpose(1, 2), layer.down_proj.transpose(1, 2)
    product = torch.nn.functional.grouped_mm

    def run() -> torch.Tensor:
        gate, up = product(x, gate_up, offs=offsets).chunk(2, dim=-1)
        return product(torch.nn.functional.silu(gate) * up, down, offs=offsets)

    return run


def cublas_loop(layer: MixtralExperts, tokens: Tokens) -> Run:
    """The same with one cuBLAS product an expert: what a loop reaches that knows the counts."""
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    parts = tokens.sorted_by_expert().split(tokens.counts)
    work = [
        (x, layer.gate_up_proj[expert], layer.down_proj[expert])
        for expert, x in enumerate(parts)
        if len(x)
    ]

    def run() -> list[torch.Tensor]:
        out = []
        for x, gate_up, down in work:
            gate, up = linear(x, gate_up).chunk(2, dim=-1)
            out.append(linear(silu(gate) * up, down))
        return out

    return run


# --- sparse ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseLayer:
    """Random sparse weights, as the path under test holds them."""

    pattern: SparsityPattern
    inner: int
    weights: tuple[torch.Tensor, ...]  # packed gate_up and down; canonical without kernels

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.weights)

    @property
    def is_packed(self) -> bool:
        return len(self.weights) == 2

    def __call__(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The whole expert forward ``[T, H]``."""
        routed, text = (hidden, top_k_index, top_k_weights), str(self.pattern)
        if self.is_packed:
            return packed_mlp(*routed, *self.weights, self.inner, text, text)
        return moe_mlp(*routed, *self.weights, text, text)


def sparse_layer(
    shape: Shape, pattern: SparsityPattern, stored: tuple[SparseWeight, SparseWeight]
) -> SparseLayer:
    """Pack canonical gate_up and down where the kernels can take them (on CUDA)."""
    if stored[0].values.is_cuda:
        return SparseLayer(pattern, shape.inner, pack_layer(shape, pattern, stored))
    return SparseLayer(pattern, shape.inner, (*stored[0], *stored[1]))


def random_layer(
    shape: Shape, pattern: SparsityPattern, device: torch.device
) -> tuple[SparseWeight, SparseWeight]:
    """Canonical gate_up and down."""
    return (
        random_stored(shape.gate_up, pattern, device),
        random_stored(shape.down, pattern, device),
    )


def pack_layer(
    shape: Shape, pattern: SparsityPattern, stored: tuple[SparseWeight, SparseWeight]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed gate_up and down; ends the program where the kernels cannot take them."""
    specs = layer_specs(shape, pattern)
    gate_up, down = (pack_or_exit(*pair) for pair in zip(stored, specs, strict=True))
    return gate_up, down


def pack_or_exit(stored: SparseWeight, spec: PackedSpec) -> torch.Tensor:
    """The packed weight; ends the program where the kernels cannot take it."""
    if reason := why_not(spec, stored.values.device):
        raise SystemExit(f"Sparse weights need the kernels, found none that run: {reason}")
    return pack(stored, spec)


def layer_specs(shape: Shape, pattern: SparsityPattern) -> tuple[PackedSpec, PackedSpec]:
    """What packed gate_up and down stand for."""
    return (
        PackedSpec(*shape.gate_up, pattern, DTYPE, is_gate_up=True),
        PackedSpec(*shape.down, pattern, DTYPE, is_gate_up=False),
    )


def relative_error(
    shape: Shape, sparse: SparseLayer, stored: tuple[SparseWeight, SparseWeight], tokens: Tokens
) -> float:
    """Of the sparse layer against Transformers' experts with the decoded weights."""
    gate_up, down = (decode(weight, sparse.pattern) for weight in stored)
    dense = dense_layer(shape, tokens.hidden.device, (gate_up, down))
    dense.config._experts_implementation = "grouped_mm"
    expected, found = dense(*tokens.inputs).float(), sparse(*tokens.inputs).float()
    return float((found - expected).norm() / expected.norm())
