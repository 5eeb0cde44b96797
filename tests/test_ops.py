"""torch.ops.samoyeds.* against plain loops on dense weights, in shapes that are easily wrong."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from helpers import assert_as_good_as_dense, assert_same_bits, loop_experts, random_mask, silu_gate
from torch.nn import functional

from samoyeds_hf import SparsityPattern, encode, ops
from samoyeds_hf.errors import SamoyedsError
from samoyeds_hf.format import VALUE_DTYPES, SparseWeight
from samoyeds_hf.pruning.magnitude import magnitude_mask


class Sizes(NamedTuple):
    """T tokens, E experts, K choices, H hidden, I inner, and both patterns."""

    tokens: int
    experts: int = 7
    top_k: int = 2
    hidden: int = 64
    inner: int = 96
    up: str = "1:2:32"
    down: str = "1:2:32"


SIZES = [
    Sizes(0),  # no token at all
    Sizes(1),
    Sizes(3),  # fewer tokens than experts: most are idle
    Sizes(65),  # one more than a tile
    Sizes(9, experts=7, top_k=7),  # every token asks every expert
    Sizes(9, experts=1, top_k=1),
    Sizes(5, experts=13, top_k=3),  # a prime number of experts
    Sizes(5, hidden=88, inner=24, up="1:2:8", down="1:2:24"),  # 88 = 11 x 8: no power of two
    Sizes(5, up="2:4", down="2:4"),
    Sizes(5, up="3:4:16", down="2:4"),  # each projection has a pattern of its own
    Sizes(5, up="2:4", down="3:4:48"),
    Sizes(5, up="8:16:64", down="4:8:4"),
    Sizes(5, up="2:2:32", down="1:16:32"),
]


class Layer(NamedTuple):
    """A random expert layer: arguments of the ops, and the masked weights dense."""

    hidden: torch.Tensor  # [T, H]
    top_k_index: torch.Tensor  # [T, K]
    top_k_weights: torch.Tensor  # [T, K]
    gate_up: SparseWeight
    down: SparseWeight
    dense_gate_up: torch.Tensor  # [E, 2I, H]
    dense_down: torch.Tensor  # [E, H, I]
    sizes: Sizes

    def mlp(self, **changes: Any) -> torch.Tensor:
        layer = self._replace(**changes)
        return ops.moe_mlp(*layer.mlp_arguments())

    def mlp_arguments(self) -> tuple[Any, ...]:
        patterns = (self.sizes.up, self.sizes.down)
        return (*self[:3], *self.gate_up, *self.down, *patterns)

    def loops(self, dtype: torch.dtype, **changes: Any) -> torch.Tensor:
        layer = self._replace(**changes)
        return loop_experts(*layer[:3], layer.dense_gate_up, layer.dense_down, dtype)


def sparse(
    shape: tuple[int, ...], text: str, dtype: torch.dtype, rng: torch.Generator
) -> tuple[SparseWeight, torch.Tensor]:
    pattern = SparsityPattern.parse(text)
    weight = (torch.randn(shape, generator=rng) / shape[-1] ** 0.5).to(dtype)
    mask = random_mask(shape, pattern, rng)
    return encode(weight, mask, pattern), weight * mask


def make_layer(sizes: Sizes, dtype: torch.dtype = torch.float32, seed: int = 0) -> Layer:
    rng = torch.Generator().manual_seed(seed)
    t, e, k, h, i = sizes[:5]
    gate_up, dense_gate_up = sparse((e, 2 * i, h), sizes.up, dtype, rng)
    down, dense_down = sparse((e, h, i), sizes.down, dtype, rng)
    logits = torch.randn(t, e, generator=rng)
    top_k_weights, top_k_index = logits.softmax(dim=-1).topk(k, dim=-1)
    hidden = torch.randn(t, h, generator=rng).to(dtype)
    weights = top_k_weights.to(dtype)
    return Layer(hidden, top_k_index, weights, gate_up, down, dense_gate_up, dense_down, sizes)


def calls(layer: Layer) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every op with arguments that fit the layer."""
    sizes = layer.sizes
    inner = layer.hidden.new_ones(sizes.tokens * sizes.top_k, sizes.inner)
    one = SparseWeight(*(tensor[0] for tensor in layer.down))
    down = (inner, layer.top_k_index, layer.top_k_weights, *layer.down, sizes.down)
    batch = layer.hidden.new_ones(2, sizes.tokens, sizes.inner)
    return {
        "moe_mlp": (torch.ops.samoyeds.moe_mlp, layer.mlp_arguments()),
        "moe_up": (torch.ops.samoyeds.moe_up, (*layer[:2], *layer.gate_up, sizes.up)),
        "moe_down": (torch.ops.samoyeds.moe_down, down),
        "linear": (torch.ops.samoyeds.linear, (batch, *one, sizes.down)),
    }


OPS = ["moe_mlp", "moe_up", "moe_down", "linear"]


@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[1], SIZES[3], SIZES[4], SIZES[9]], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, sizes):
    """Schema, no hidden mutation, and fakes that agree with the op for fixed and dynamic shapes."""
    op, arguments = calls(make_layer(sizes))[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", OPS)
def test_opcheck_of_inputs_that_are_not_contiguous(name):
    op, arguments = calls(make_layer(SIZES[2], torch.bfloat16))[name]
    turned = [
        value.mT.contiguous().mT if torch.is_tensor(value) and value.dim() > 1 else value
        for value in arguments
    ]
    torch.library.opcheck(op, turned)
    assert_same_bits(op(*turned), op(*arguments))


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_moe_mlp(sizes, dtype):
    layer = make_layer(sizes, dtype)
    exact = layer.loops(torch.float64)
    ours = layer.mlp()
    assert_as_good_as_dense(ours, layer.loops(dtype), exact, str(sizes))
    if dtype == torch.float32 and exact.numel():
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert_same_bits(layer.mlp(), ours)  # bitwise equal on repeat


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gate_of_its_own(sizes, dtype):
    """moe_up, a gate in between and moe_down are the same layer."""
    layer = make_layer(sizes, dtype)
    both = ops.moe_up(layer.hidden, layer.top_k_index, *layer.gate_up, sizes.up)
    assert both.shape == (sizes.tokens * sizes.top_k, 2 * sizes.inner)
    routing = (layer.top_k_index, layer.top_k_weights)
    ours = ops.moe_down(silu_gate(both), *routing, *layer.down, sizes.down)
    assert_same_bits(ours, layer.mlp())

    def swapped_gelu(x: torch.Tensor) -> torch.Tensor:
        up, gate = x.chunk(2, dim=-1)
        return functional.gelu(gate) * (up + 1)

    ours = ops.moe_down(swapped_gelu(both), *routing, *layer.down, sizes.down)
    dense, exact = (
        loop_experts(*layer[:3], layer.dense_gate_up, layer.dense_down, kind, swapped_gelu)
        for kind in (dtype, torch.float64)
    )
    assert_as_good_as_dense(ours, dense, exact, str(sizes))


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (65,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("text", ["1:2:32", "2:4", "3:4:16", "8:16:96"])
def test_linear(text, lead, dtype):
    rng = torch.Generator().manual_seed(0)
    stored, dense = sparse((48, 96), text, dtype, rng)
    x = torch.randn(*lead, 96, generator=rng).to(dtype)
    ours = ops.linear(x, *stored, text)
    assert ours.shape == (*lead, 48)
    expected = functional.linear(x, dense)
    assert_as_good_as_dense(ours, expected, functional.linear(x.double(), dense.double()))
    assert_same_bits(ops.linear(x, *stored, text), ours)


def test_moe_up_rows():
    """Row t*K + j is token t with its choice j."""
    layer = make_layer(Sizes(4, experts=5, top_k=3))
    both = ops.moe_up(layer.hidden, layer.top_k_index, *layer.gate_up, layer.sizes.up)
    for token in range(4):
        for choice in range(3):
            expert = layer.top_k_index[token, choice]
            expected = layer.dense_gate_up[expert] @ layer.hidden[token]
            torch.testing.assert_close(both[token * 3 + choice], expected)


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_same_expert_twice(dtype):
    layer = make_layer(Sizes(5, experts=3, top_k=2), dtype)
    twice = torch.full_like(layer.top_k_index, 1)
    twice[0] = torch.tensor([2, 0])
    ours = layer.mlp(top_k_index=twice)
    dense, exact = (layer.loops(kind, top_k_index=twice) for kind in (dtype, torch.float64))
    assert_as_good_as_dense(ours, dense, exact)


@pytest.mark.parametrize("sentinel", [7, -1, 8, -8, 1 << 40, -(1 << 40)])
def test_sentinel_belongs_to_no_expert(sentinel):
    """Expert parallel marks so what other ranks own: no weight is read, nothing is added."""
    layer = make_layer(Sizes(6, experts=7, top_k=2))
    index = torch.tensor([[0, 1], [sentinel, 1], [1, sentinel], [sentinel] * 2, [3, 0], [0, 0]])
    # weights of experts that no token asks for, the last one among them, would show
    stored = [SparseWeight(w.values.clone(), *w[1:]) for w in (layer.gate_up, layer.down)]
    for weight in stored:
        weight.values[[2, 4, 5, 6]] = float("nan")
    changed = {"top_k_index": index, "gate_up": stored[0], "down": stored[1]}
    ours = layer.mlp(**changed)
    exact = layer.loops(torch.float64, top_k_index=index)
    assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert_same_bits(ours[3], torch.zeros(64))
    # not even a routing weight that is no number
    unread = layer.top_k_weights.masked_fill(index == sentinel, float("nan"))
    assert_same_bits(layer.mlp(**changed, top_k_weights=unread), ours)

    # the same as a weight of zero for an expert that is here, but for what its product rounds
    # otherwise with more rows
    weights = layer.top_k_weights.masked_fill(index == sentinel, 0)
    here = index.masked_fill(index == sentinel, 0)
    with_zeros = layer.mlp(top_k_index=here, top_k_weights=weights)
    assert (ours - with_zeros).abs().max() <= 1e-6 * exact.abs().max()

    both = ops.moe_up(layer.hidden, index, *stored[0], layer.sizes.up)
    assert (both.view(6, 2, -1)[index == sentinel] == 0).all()
    down = ops.moe_down(silu_gate(both), index, layer.top_k_weights, *stored[1], layer.sizes.down)
    assert_same_bits(down, ours)


def test_all_experts_elsewhere():
    layer = make_layer(Sizes(3))
    ours = layer.mlp(top_k_index=torch.full((3, 2), 7))
    assert_same_bits(ours, torch.zeros(3, 64))


def test_tokens_do_not_see_each_other():
    """A token that overflowed stays alone with it."""
    layer = make_layer(Sizes(5, experts=3, top_k=2))
    hidden = layer.hidden.clone()
    hidden[2] = float("nan")
    ours = layer.mlp(hidden=hidden)
    assert ours[2].isnan().all()
    others = [0, 1, 3, 4]
    exact = layer.loops(torch.float64)
    assert (ours - exact)[others].abs().max() <= 1e-5 * exact.abs().max()


def test_sum_over_choices_is_in_fp32():
    """Large terms that cancel in fp32 would leave nothing of the small one in bf16."""
    rows = torch.tensor([[256.0], [1.0], [-256.0]]).bfloat16().expand(3, 8).contiguous()
    identity = torch.eye(8).bfloat16()[None]
    stored = encode(
        identity, magnitude_mask(identity, SparsityPattern(1, 1)), SparsityPattern(1, 1)
    )
    out = ops.moe_down(rows, torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3), *stored, "2:4")
    assert out.tolist() == [[1.0] * 8]


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_routing_weights_in_another_dtype(weights_dtype):
    """Routers often stay in fp32 beside bf16 experts; the result has the dtype of the input."""
    layer = make_layer(Sizes(5), torch.bfloat16)
    weights = layer.top_k_weights.to(weights_dtype)
    ours = layer.mlp(top_k_weights=weights)
    assert ours.dtype == torch.bfloat16
    assert_same_bits(ours, layer.mlp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_autocast_changes_nothing(name, other, dtype):
    op, arguments = calls(make_layer(Sizes(3), dtype))[name]
    expected = op(*arguments)
    with torch.autocast("cpu", other):
        assert_same_bits(op(*arguments), expected)


@pytest.mark.parametrize("name", OPS)
def test_backward_is_refused(name):
    op, (x, *others) = calls(make_layer(Sizes(3)))[name]
    out = op(x.requires_grad_(), *others)
    with pytest.raises(SamoyedsError, match=r"are for inference, found a backward .*no_grad"):
        out.sum().backward()


@pytest.mark.parametrize("name", OPS)
def test_inputs_are_left_alone_and_not_returned(name):
    op, arguments = calls(make_layer(Sizes(3)))[name]
    copies = [value.clone() if torch.is_tensor(value) else value for value in arguments]
    op(*arguments).fill_(7)
    for value, copy in zip(arguments, copies, strict=True):
        assert torch.equal(value, copy) if torch.is_tensor(value) else value == copy


@pytest.mark.parametrize("name", OPS)
def test_fake_knows_shape_for_any_number_of_tokens(name):
    """One graph serves prefill and decode."""
    op, _ = calls(make_layer(Sizes(3)))[name]
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (3, 5, 4):
        arguments = calls(make_layer(Sizes(tokens)))[name][1]
        assert_same_bits(compiled(*arguments), op(*arguments))
        meta = [value.to("meta") if torch.is_tensor(value) else value for value in arguments]
        assert op(*meta).shape == op(*arguments).shape


def bad_calls():
    """(op, position of the argument, change, what the message says)."""

    def longer(x):
        return torch.cat((x, x))

    def wider(x):
        return torch.cat((x, x), dim=-1)

    def flat(x):
        return x.flatten()

    def extra(x):
        return x.unsqueeze(1)

    mlp, up, down, single = OPS
    yield mlp, 0, longer, "top_k_index and hidden must have as many tokens, found 3 and 6"
    yield mlp, 0, wider, "must have 64 features, found 128"
    yield mlp, 0, extra, "input must have 2 dimensions"
    yield mlp, 0, torch.Tensor.half, "share one dtype .* found torch.float16 and torch.float32"
    yield mlp, 0, torch.Tensor.double, "share one dtype .* found torch.float64"
    yield mlp, 1, torch.Tensor.int, "top_k_index must be int64"
    yield mlp, 1, flat, "top_k_index must be int64 .T, K., found torch.int64 .6."
    yield mlp, 1, longer, "must have as many tokens, found 6 and 3"
    yield mlp, 2, wider, "shape of top_k_index .3, 2., found torch.float32 .3, 4."
    yield mlp, 2, torch.Tensor.long, "top_k_weights must be floating"
    yield mlp, 3, torch.Tensor.bfloat16, "share one dtype"
    yield mlp, 3, wider, "values, meta and index must have the shapes"
    yield mlp, 4, wider, "values, meta and index must have the shapes"
    yield mlp, 4, torch.Tensor.char, "meta, index must be uint8, found torch.int8"
    yield mlp, 5, longer, "values, meta and index must have the shapes"
    yield mlp, 5, torch.Tensor.long, "meta, index must be uint8, found torch.uint8, torch.int64"
    yield mlp, 6, torch.Tensor.half, "share one dtype"
    yield mlp, 7, torch.Tensor.float, "meta, index must be uint8"
    yield mlp, 8, wider, "values, meta and index must have the shapes"
    yield mlp, 9, lambda _: "1:2:64", "values, meta and index must have the shapes"
    yield mlp, 9, lambda _: "1:2", "A pattern is written"
    yield mlp, 10, lambda _: "2:4", "values, meta and index must have the shapes"
    yield up, 0, wider, "must have 64 features, found 128"
    yield up, 0, extra, "input must have 2 dimensions"
    yield up, 1, longer, "top_k_index and hidden must have as many tokens"
    yield up, 2, lambda x: x[0], "values 3, found"
    yield down, 0, longer, "a row for each .token, choice., 6, found 12"
    yield down, 0, wider, "must have 96 features, found 192"
    yield down, 1, longer, "top_k_index and top_k_weights must have as many tokens"
    yield down, 2, wider, "top_k_weights must be floating with the shape"
    yield single, 0, wider, "must have 96 features, found 192"
    yield single, 0, torch.Tensor.half, "share one dtype"
    yield single, 1, extra, "values 2, found"


@pytest.mark.parametrize(("name", "position", "change", "message"), list(bad_calls()))
@pytest.mark.parametrize("device", ["cpu", "meta"])  # the fake refuses what the op refuses
def test_refuses(name, position, change, message, device):
    op, arguments = calls(make_layer(Sizes(3)))[name]
    changed = [value.to(device) if torch.is_tensor(value) else value for value in arguments]
    changed[position] = change(changed[position])
    with pytest.raises((RuntimeError, ValueError), match=message):
        op(*changed)


def test_refuses_projections_that_do_not_fit():
    layer = make_layer(Sizes(3))
    fewer = SparseWeight(*(tensor[:6] for tensor in layer.down))
    with pytest.raises(RuntimeError, match="must have as many experts, found 7 and 6"):
        layer.mlp(down=fewer)
    other = make_layer(Sizes(3, inner=32))
    with pytest.raises(RuntimeError, match=r"\[192, 64\] and down_proj \[64, 32\] do not form an"):
        layer.mlp(down=other.down)
