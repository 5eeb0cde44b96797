"""samoyeds_route against plain loops: pairs by expert, tiles, sentinels. Needs a CUDA device."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest
import torch
from cuda_helpers import (
    DEVICE,
    GPU,
    NAN_BYTE,
    OK,
    ROUTINGS,
    Guarded,
    Shape,
    fresh_examples,
    functions,
    generator,
    last_error,
    make_launch,
    make_routing,
    random_index,
    random_seed,
    synchronize,
)
from hypothesis import given
from hypothesis import strategies as st

pytestmark = GPU

WORKSPACE_BYTES = 1 << 20  # more than routing may want


class Route(NamedTuple):
    pairs: list[int]
    tiles: list[list[int]]  # expert, first, tokens, group


def route(top_k_index: torch.Tensor, experts: int, tile_tokens: int) -> Route:
    """Calls samoyeds_route with guards around everything; checks what was left out."""
    routing = make_routing(top_k_index)
    most = functions().samoyeds_max_tiles(ctypes.byref(routing), experts, tile_tokens)
    assert most >= 0, last_error()
    num_pairs = top_k_index.numel()
    pairs, tiles = Guarded((num_pairs,), torch.int32), Guarded((most, 4), torch.int32)
    num_tiles, workspace = Guarded((1,), torch.int32), Guarded((WORKSPACE_BYTES,), torch.uint8)
    status = functions().samoyeds_route(
        ctypes.byref(make_launch(workspace)),
        ctypes.byref(routing),
        experts,
        tile_tokens,
        pairs.pointer,
        tiles.pointer,
        num_tiles.pointer,
    )
    assert status == OK, last_error()
    synchronize()
    for name, buffer in (("pairs", pairs), ("tiles", tiles), ("num_tiles", num_tiles)):
        buffer.check_border(name)
    workspace.check_border("workspace of route")
    count = int(num_tiles.tensor)
    assert 0 <= count <= most
    kept = int(((top_k_index >= 0) & (top_k_index < experts)).sum())
    assert (pairs.tensor[kept:].view(torch.uint8) == NAN_BYTE).all(), "pairs has too many entries"
    return Route(pairs.tensor[:kept].tolist(), tiles.tensor[:count].tolist())


def loop_route(top_k_index: torch.Tensor, experts: int) -> list[list[int]]:
    """The pairs of each expert, in order."""
    by_expert: list[list[int]] = [[] for _ in range(experts)]
    for pair, expert in enumerate(top_k_index.flatten().tolist()):
        if 0 <= expert < experts:
            by_expert[expert].append(pair)
    return by_expert


def check_route(top_k_index: torch.Tensor, experts: int, tile_tokens: int) -> None:
    found = route(top_k_index, experts, tile_tokens)
    by_expert = loop_route(top_k_index, experts)
    assert found.pairs == [pair for pairs in by_expert for pair in pairs]
    expected, first = [], 0
    for expert, pairs in enumerate(by_expert):
        for start in range(0, len(pairs), tile_tokens):
            expected.append([expert, first + start, min(tile_tokens, len(pairs) - start)])
        first += len(pairs)
    assert [tile[:3] for tile in found.tiles] == expected
    for number, (expert, _, _, group) in enumerate(found.tiles):
        begin, size = group >> 8, group & 255
        assert begin <= number < begin + size <= len(found.tiles), (number, begin, size)
        members = found.tiles[begin : begin + size]
        assert all(tile[0] == expert and tile[3] == group for tile in members)
    assert route(top_k_index, experts, tile_tokens) == found  # the same on repeat


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    experts, top_k = draw(st.integers(1, 256)), draw(st.integers(1, 8))
    routings = [name for name in ROUTINGS if name != "distinct" or top_k <= experts]
    tokens = draw(st.one_of(st.integers(0, 40), st.integers(0, 700), st.just(4096)))
    return Shape(tokens, experts, top_k, routing=draw(st.sampled_from(routings)))


@fresh_examples(60)
@given(shapes(), st.sampled_from([8, 16, 32, 64, 128]), st.integers(0, 2**31 - 1))
def test_any_routing(shape: Shape, tile_tokens: int, seed: int) -> None:
    check_route(random_index(shape, generator(seed)), shape.experts, tile_tokens)


@pytest.mark.parametrize(
    ("shape", "tile_tokens"),
    [
        (Shape(0), 8),
        (Shape(1, experts=1, top_k=1), 8),
        (Shape(8, experts=1, top_k=1), 8),  # exactly a tile
        (Shape(9, experts=1, top_k=1), 8),
        (Shape(1025, experts=256, top_k=8, routing="distinct"), 128),
        (Shape(33, experts=3, top_k=4, routing="nobody"), 16),
        (Shape(65536, experts=256, top_k=8), 128),  # 2^19 pairs
        (Shape(65536, experts=256, top_k=8, routing="one"), 8),  # 2^16 tiles of one expert
        (Shape(65536, experts=64, top_k=8, routing="sentinels"), 64),
        (Shape(65536, experts=2, top_k=1, routing="few"), 8),
        (Shape(65535, experts=61, top_k=7), 32),
    ],
    ids=str,
)
def test_routing_of_every_size(shape: Shape, tile_tokens: int) -> None:
    index = random_index(shape, generator(random_seed()))
    check_route(index, shape.experts, tile_tokens)


def test_sorted_and_reversed_experts() -> None:
    """Nothing depends on the order in which experts appear."""
    ascending = torch.arange(256, device=DEVICE).repeat_interleave(17).view(-1, 1).contiguous()
    for index in (ascending, ascending.flip(0).contiguous()):
        check_route(index, 256, 16)
