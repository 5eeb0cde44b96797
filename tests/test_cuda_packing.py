"""Packing into fragment order is exact, and undone by unpacking.

Needs a CUDA device.
"""

from __future__ import annotations

import pytest
import torch
from cuda_helpers import (
    DEVICE,
    GPU,
    HALF_DTYPES,
    Guarded,
    generator,
    pack,
    random_seed,
    random_weight,
    unpack,
)
from fragment_emulation import pack as emulated_pack
from helpers import assert_same_bits

from samoyeds_hf.format import SparseWeight

pytestmark = GPU

# (pattern, E, m, k): every kind of layout, tails in rows and columns
PACKED = [
    ("2:4", 1, 16, 128),
    ("2:4", 3, 40, 8),  # one column of blocks, mostly empty
    ("2:4", 2, 72, 136),
    ("4:4:32", 2, 24, 160),
    ("16:16:8", 2, 48, 64),  # a block across gate and up
    ("1:2:32", 3, 64, 160),
    ("1:2:32", 2, 16, 32),
    ("1:2:64", 2, 80, 192),
    ("1:2:96", 2, 64, 288),  # Sub-Rows across blocks
    ("1:2:128", 5, 144, 384),
    ("1:2:160", 2, 48, 160),  # Sub-Row = row
    ("1:2:256", 2, 32, 512),
    ("3:4:32", 3, 72, 160),  # 9 blocks of rows of gate, 18 in all
    ("3:4:32", 1, 8, 32),
    ("3:4:64", 2, 68, 192),  # a block across gate and up
    ("3:4:96", 2, 128, 288),
    ("3:4:128", 5, 144, 384),
    ("3:4:16", 2, 48, 144),
    ("1:2:4", 2, 48, 136),
    ("1:2:24", 2, 24, 24),
    ("4:8:32", 3, 48, 160),
    ("8:16:64", 2, 96, 64),
    ("3:5:8", 2, 40, 136),
    ("1:16:32", 2, 64, 64),
    ("15:16:40", 2, 48, 40),
    ("7:9:4", 2, 18, 136),
]


@pytest.mark.parametrize("is_gate_up", [False, True], ids=["plain", "gate_up"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize(("text", "experts", "m", "k"), PACKED)
def test_packing_is_exact(
    text: str, experts: int, m: int, k: int, dtype: torch.dtype, is_gate_up: bool
) -> None:
    """Byte for byte what the layout's description says, and back again: any 16 bits survive."""
    rng = generator(random_seed())
    weight = random_weight((experts, m, k), text, dtype, rng, is_gate_up)
    # NaN with payloads, infinities, denormals and -0.0 among them
    bits = weight.stored.values.view(torch.int16)
    bits.copy_(torch.randint(-(1 << 15), 1 << 15, bits.shape, generator=rng, device=DEVICE))
    packed = pack(weight.stored, weight)
    on_cpu = SparseWeight(*(tensor.cpu() for tensor in weight.stored))
    expected = emulated_pack(on_cpu, weight.pattern, m, is_gate_up)
    assert torch.equal(packed.tensor.cpu(), expected.view(torch.uint8).flatten())
    again = unpack(Guarded.around(packed.tensor), weight)
    assert_same_bits(again.values, weight.stored.values)
    assert torch.equal(again.meta, weight.stored.meta)
    assert torch.equal(again.index, weight.stored.index)


def test_packing_of_many_experts() -> None:
    rng = generator(random_seed())
    weight = random_weight((256, 64, 128), "1:2:64", torch.bfloat16, rng, is_gate_up=True)
    for ours, theirs in zip(
        unpack(pack(weight.stored, weight), weight), weight.stored, strict=True
    ):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
