"""encode, decode and validate against plain loops, bit for bit, and what they refuse."""

import math
import re
from unittest import mock

import pytest
import torch
from helpers import assert_same_bits, bits, loop_decode, loop_encode, random_mask
from hypothesis import example, given, settings
from hypothesis import strategies as st

from samoyeds_hf import SparsityPattern, chunks, decode, encode, validate
from samoyeds_hf.errors import FormatError, PatternError
from samoyeds_hf.format import VALUE_DTYPES, SparseWeight, stored_shapes

SPECIAL = {  # bits of what a copy through arithmetic would change
    torch.bfloat16: [0x8000, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFA5],
    torch.float16: [0x8000, 0x0001, 0x83FF, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFDA5],
    torch.float32: [1 << 31, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001],
}
LAYOUTS = ("contiguous", "transposed", "every other", "odd offset", "lead reversed")

patterns = st.integers(1, 16).flatmap(
    lambda m: st.builds(
        SparsityPattern,
        n=st.integers(1, m),
        m=st.just(m),
        v=st.sampled_from([4, 8, 12, 16, 20, 64]),
    )
) | st.builds(SparsityPattern, n=st.just(1), m=st.just(1), v=st.none())


@st.composite
def shapes(draw, pattern: SparsityPattern) -> tuple[int, ...]:
    lead = draw(st.sampled_from([(), (2,), (3, 1), (2, 1, 2), (1, 2, 2), (0,), (2, 0, 1)]))
    rows = pattern.m * draw(st.integers(1, 2))
    step = math.lcm(pattern.v or 4, 8)
    return (*lead, rows, step * draw(st.integers(1, max(1, 48 // step))))


def special_weight(
    shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator
) -> torch.Tensor:
    """Random bits, a quarter of them replaced by the special ones."""
    width = 8 * dtype.itemsize
    random = torch.randint(0, 1 << width, shape, generator=rng)
    special = torch.tensor(SPECIAL[dtype])[
        torch.randint(0, len(SPECIAL[dtype]), shape, generator=rng)
    ]
    chosen = torch.where(torch.rand(shape, generator=rng) < 0.25, special, random)
    signed = torch.where(chosen >= 1 << (width - 1), chosen - (1 << width), chosen)
    return signed.to(torch.int16 if width == 16 else torch.int32).view(dtype)


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same elements in memory in another way."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "every other":
        return torch.stack((tensor, tensor), dim=-1)[..., 0]
    if layout == "odd offset":
        longer = torch.cat((tensor.new_zeros(1), tensor.reshape(-1)))
        return longer[1:].view(tensor.shape)
    if layout == "lead reversed":
        order = (*reversed(range(tensor.dim() - 2)), tensor.dim() - 2, tensor.dim() - 1)
        return tensor.permute(order).contiguous().permute(order)
    return tensor


def example_weight(
    pattern: SparsityPattern, shape: tuple[int, ...] = (2, 32, 128)
) -> tuple[torch.Tensor, torch.Tensor, SparseWeight]:
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=rng).bfloat16()
    mask = random_mask(shape, pattern, rng)
    return weight, mask, encode(weight, mask, pattern)


@given(
    st.data(),
    patterns,
    st.sampled_from(VALUE_DTYPES),
    st.sampled_from(LAYOUTS),
    st.sampled_from([1, 300, 1 << 18]),  # elements a chunk: less than a block, a few, everything
    st.integers(0, 1 << 30),
)
@settings(max_examples=200)
def test_round_trip(data, pattern, dtype, layout, chunk, seed):
    rng = torch.Generator().manual_seed(seed)
    shape = data.draw(shapes(pattern))
    weight, mask = special_weight(shape, dtype, rng), random_mask(shape, pattern, rng)
    with mock.patch.object(chunks, "_ON_CPU", chunk):
        stored = encode(laid_out(weight, layout), laid_out(mask, layout), pattern)
    validate(stored, pattern, shape)
    validate(stored, pattern)
    assert tuple(tuple(tensor.shape) for tensor in stored) == stored_shapes(shape, pattern)

    expected = loop_encode(weight, mask, pattern)
    assert_same_bits(stored.values, expected.values)
    assert torch.equal(stored.meta, expected.meta)
    assert torch.equal(stored.index, expected.index)

    masked = torch.where(mask, weight, torch.zeros((), dtype=dtype))
    assert_same_bits(decode(stored, pattern), masked)
    assert_same_bits(loop_decode(stored, pattern), masked)
    elsewhere = SparseWeight(*(laid_out(tensor, layout) for tensor in stored))
    validate(elsewhere, pattern, shape)
    assert_same_bits(decode(elsewhere, pattern), masked)


@given(st.data(), patterns, st.integers(0, 1 << 30))
@settings(max_examples=30)
def test_counts(data, pattern, seed):
    """What is decoded keeps N of M Sub-Rows and 2 of every 4; no weight here is zero."""
    rng = torch.Generator().manual_seed(seed)
    *lead, rows, k = shape = data.draw(shapes(pattern))
    mask = random_mask(shape, pattern, rng)
    kept = decode(encode(torch.ones(shape), mask, pattern), pattern) != 0
    v = pattern.sub_row(k)
    sub_rows = kept.view(*lead, rows // pattern.m, pattern.m, k // v, v)
    assert (sub_rows.any(dim=-1).sum(dim=-2) == pattern.n).all()
    in_group = kept.view(*lead, rows, k // 4, 4).sum(dim=-1)
    assert ((in_group == 2) | (in_group == 0)).all()
    assert kept.sum().item() == math.prod(shape) * pattern.density


def test_drawing_of_the_docstring():
    letters = torch.tensor([[0.0] * 8, [1.0, 2, 3, 4, 5, 6, 7, 8]])  # a b c d e f g h
    mask = torch.tensor([[0] * 8, [0, 1, 1, 0, 1, 0, 0, 1]]).bool()
    stored = encode(letters, mask, SparsityPattern(1, 2, 8))
    assert stored.values.tolist() == [[2, 3, 5, 8]]  # b c e h
    assert stored.meta.tolist() == [[0b1100_1001]]
    assert stored.index.tolist() == [[1]]


def test_positions_are_stored_where_values_are_zero():
    pattern = SparsityPattern(1, 2, 4)
    mask = random_mask((4, 16), pattern, torch.Generator().manual_seed(0))
    zero = encode(torch.zeros(4, 16), mask, pattern)
    one = encode(torch.ones(4, 16), mask, pattern)
    assert torch.equal(zero.meta, one.meta)
    assert torch.equal(zero.index, one.index)


@pytest.mark.parametrize("text", ["1:2:128", "4:8:32", "2:4", "3:4:64"])
def test_sizes(text):
    pattern = SparsityPattern.parse(text)
    weight, _, stored = example_weight(pattern, (3, 32, 128))
    assert stored.num_bytes == 3 * pattern.num_bytes(32, 128, element_size=2)
    if text == "1:2:128":  # the arithmetic of the format's description: 4.53 bits a weight
        assert 8 * stored.num_bytes / weight.numel() == 4 + 0.5 + 0.03125


def test_inputs_are_left_alone():
    pattern = SparsityPattern(1, 2, 64)
    weight, mask, stored = example_weight(pattern)
    copies = [tensor.clone() for tensor in (weight, mask, *stored)]
    encode(torch.nn.Parameter(weight), mask, pattern)  # autograd does not mind
    validate(stored, pattern)
    dense = decode(stored, pattern)
    dense.fill_(1)
    for tensor, copy in zip((weight, mask, *stored), copies, strict=True):
        assert torch.equal(tensor, copy)


# -- what encode refuses


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_encode_refuses_dtype(dtype):
    mask = torch.zeros(2, 8, dtype=torch.bool)
    with pytest.raises(FormatError, match=rf"^w must be one of .*bfloat16.*, found {dtype};"):
        encode(torch.zeros(2, 8).to(dtype), mask, SparsityPattern(1, 2, 8), "w")


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (torch.zeros(2, 8), "torch.float32 of [2, 8]"),
        (torch.zeros(2, 4, dtype=torch.bool), "torch.bool of [2, 4]"),
        (torch.zeros(1, 2, 8, dtype=torch.bool), "torch.bool of [1, 2, 8]"),
    ],
)
def test_encode_refuses_mask_of_other_shape(mask, found):
    with pytest.raises(FormatError, match=re.escape(f"bool of shape [2, 8], found {found}")):
        encode(torch.zeros(2, 8), mask, SparsityPattern(1, 2, 8))


@pytest.mark.parametrize("shape", [(), (8,)])
def test_encode_refuses_what_is_no_matrix(shape):
    weight = torch.zeros(shape)
    with pytest.raises(FormatError, match=re.escape(f"[..., m, k], found {list(shape)}")):
        encode(weight, weight.bool(), SparsityPattern(1, 1, 4))


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("1:2:64", (3, 64), r"found M=2 and 3 rows; use an M among \[1, 3\]"),
        ("1:2:4", (2, 12), r"multiple of 8, found 12; leave this layer dense with .*'w': 'dense'"),
        # k and the V that do divide it: 1408 = 11 x 128
        ("1:2:256", (2, 1408), r"found V=256 and 1408; .* are \[4, 8, 16, 32, 44, 64, 88, 128, "),
        ("1:2:64", (0, 64), r"must have elements, found shape \[0, 64\]"),
        ("2:4", (4, 0), r"must have elements, found shape \[4, 0\]"),
    ],
)
def test_pattern_that_does_not_divide(text, shape, message):
    pattern = SparsityPattern.parse(text)
    with pytest.raises(PatternError, match=message):
        encode(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), pattern, "w")
    if all(shape):
        stored = SparseWeight(*(torch.zeros(s) for s in stored_shapes(shape, pattern)))
        with pytest.raises(PatternError, match=message):
            validate(stored, pattern, shape, "w")


def test_no_experts_are_legal():
    """A rank of expert parallel may own none."""
    pattern = SparsityPattern(1, 2, 8)
    stored = encode(torch.zeros(0, 4, 16), torch.zeros(0, 4, 16, dtype=torch.bool), pattern)
    validate(stored, pattern, (0, 4, 16))
    assert decode(stored, pattern).shape == (0, 4, 16)


def bad_masks():
    """A change to a mask of (2, 4, 8) on [2, 8, 16], all of it in matrix 1, and what is found."""

    def keep_row(mask):
        mask[1, 7, 8:] = torch.tensor([1, 1, 0, 0] * 2).bool()

    def drop_row(mask):
        mask[1, 4, 8:] = False

    def stray_bit(mask):
        mask[1, 7, 11] = True

    def three_of_4(mask):
        mask[1, 5, 14] = True

    def one_of_4(mask):
        mask[1, 5, 12] = False

    def none_of_4(mask):
        mask[1, 5, 12:] = False

    def four_of_4(mask):
        mask[1, 5, 12:] = True

    def three_and_one(mask):  # as many elements as there should be
        mask[1, 5, 8:] = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0]).bool()

    rows = "2 of 4 Sub-Rows in each block, found {} in matrix 1, rows from 4, columns from 8;"
    group = "2 of every 4 elements of a kept Sub-Row, found {} in matrix 1, row 5, columns from {};"
    yield keep_row, rows.format(3)
    yield drop_row, rows.format(1)
    yield stray_bit, rows.format(3)
    yield three_of_4, group.format(3, 12)
    yield one_of_4, group.format(1, 12)
    yield none_of_4, group.format(0, 12)
    yield four_of_4, group.format(4, 12)
    yield three_and_one, group.format(3, 8)


@pytest.mark.parametrize(
    ("change", "message"), list(bad_masks()), ids=lambda x: getattr(x, "__name__", "")
)
@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_encode_refuses_bad_mask(change, message, chunk):
    mask = torch.zeros(2, 8, 16, dtype=torch.bool)
    mask.view(2, 2, 4, 4, 4)[:, :, :2, :, :2] = True  # rows 0, 1 of each block, positions 0, 1
    pattern = SparsityPattern(2, 4, 8)
    encode(torch.zeros(2, 8, 16), mask, pattern)
    change(mask)
    with (
        mock.patch.object(chunks, "_ON_CPU", chunk),
        pytest.raises(FormatError, match=re.escape(message)) as error,
    ):
        encode(torch.zeros(2, 8, 16), mask, pattern, "down_proj")
    assert str(error.value).startswith("The mask of down_proj must keep ")
    assert str(error.value).endswith("project the mask to 2:4:8 first.")


def test_encode_refuses_counts_that_only_cancel():
    """As many elements as there should be, and a first group that looks right."""
    mask = torch.tensor([[0] * 16, [1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 1, 0, 1]]).bool()
    message = "found 3 in matrix 0, row 1, columns from 4;"
    with pytest.raises(FormatError, match=message):
        encode(torch.zeros(2, 16), mask, SparsityPattern(1, 2, 16))


@given(st.integers(0, 2 * 8 * 16 - 1), st.integers(0, 1 << 30))
@settings(max_examples=50)
def test_encode_refuses_any_flipped_bit(place, seed):
    pattern = SparsityPattern(2, 4, 8)
    mask = random_mask((2, 8, 16), pattern, torch.Generator().manual_seed(seed))
    mask.view(-1)[place] ^= True
    with pytest.raises(FormatError, match=f"in matrix {place // 128}, row"):
        encode(torch.zeros(2, 8, 16), mask, pattern)


# -- what validate refuses


@pytest.mark.parametrize("byte", range(256))
def test_meta_byte(byte):
    pattern = SparsityPattern(1, 2, 64)
    _, _, stored = example_weight(pattern)
    stored.meta[1, 9, 5] = byte
    # the two positions of a nibble must ascend
    if all((nibble & 3) < (nibble >> 2) for nibble in (byte & 15, byte >> 4)):
        validate(stored, pattern, (2, 32, 128), "w")
        return
    message = rf"^w_meta\[1, 9, 5\] must hold two nibbles of .*, found {byte:#04x};"
    with pytest.raises(FormatError, match=message):
        validate(stored, pattern, (2, 32, 128), "w")


@pytest.mark.parametrize(
    "pattern", [SparsityPattern(1, 2, 64), SparsityPattern(2, 16, 64)], ids=str
)
def test_index_too_large(pattern):
    for value in (pattern.m, pattern.m + 1, 127, 128, 255):
        _, _, stored = example_weight(pattern)
        stored.index[1, 3, 1] = value
        message = rf"^w_index\[1, 3, 1\] must be below M={pattern.m}, found {value};"
        with pytest.raises(FormatError, match=message):
            validate(stored, pattern, (2, 32, 128), "w")


@pytest.mark.parametrize(("before", "after"), [(5, 5), (5, 4), (7, 0)])
def test_index_not_ascending(before, after):
    pattern = SparsityPattern(3, 8, 64)
    _, _, stored = example_weight(pattern)
    stored.index[1, 3:6, 1] = torch.tensor([0, before, after])  # the three slots of block 1
    message = (
        rf"^w_index\[1, 5, 1\] must be above the slot before it, found {after} after {before};"
    )
    with pytest.raises(FormatError, match=message):
        validate(stored, pattern, (2, 32, 128), "w")


def test_index_may_fall_from_block_to_block():
    pattern = SparsityPattern(2, 4, 64)
    _, _, stored = example_weight(pattern)
    stored.index[:, 0::2], stored.index[:, 1::2] = 2, 3
    stored.index[:, 2], stored.index[:, 3] = 0, 1
    validate(stored, pattern)


@given(st.sampled_from([(0, 2), (1, 4), (3, 2)]), st.integers(0, 255))
@example((1, 4), 3)
@settings(max_examples=60)
def test_index_value(place, value):
    """Whatever is written at one place, validate says what a loop says."""
    pattern = SparsityPattern(2, 4, 16)
    rng = torch.Generator().manual_seed(3)
    stored = encode(torch.ones(8, 128), random_mask((8, 128), pattern, rng), pattern)
    stored.index[place] = value
    row, column = place
    slots = stored.index[row // 2 * 2 : row // 2 * 2 + 2, column].tolist()
    if slots[0] < slots[1] < pattern.m:
        validate(stored, pattern)
    else:
        with pytest.raises(FormatError, match=r"weight_index\[\d, \d\] must be .*, found \d+"):
            validate(stored, pattern)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(
    "cut",
    [
        lambda tensor: tensor[..., :-1],
        lambda tensor: tensor[:, :-2],
        lambda tensor: tensor[:1],
        lambda tensor: tensor[0],
        lambda tensor: tensor.unsqueeze(0),
        lambda tensor: tensor.mT,
    ],
    ids=["short row", "fewer rows", "fewer experts", "one expert", "extra dimension", "transposed"],
)
def test_wrong_shape(which, cut):
    pattern, shape = SparsityPattern(2, 4, 64), (2, 48, 128)
    _, _, stored = example_weight(pattern, shape)
    tensors = list(stored)
    tensors[which] = cut(tensors[which])
    name = "w" + ("", "_meta", "_index")[which]
    expected, found = list(stored[which].shape), list(tensors[which].shape)
    message = rf"^{name} must have shape {re.escape(str(expected))} .*{re.escape(str(found))};"
    with pytest.raises(FormatError, match=message):
        validate(SparseWeight(*tensors), pattern, shape, "w")
    with pytest.raises((FormatError, PatternError), match=r"^w"):  # without knowing the shape
        validate(SparseWeight(*tensors), pattern, name="w")


@pytest.mark.parametrize(
    ("which", "dtype"),
    [(0, torch.float64), (0, torch.uint8), (1, torch.int8), (1, torch.int32), (2, torch.int64)],
)
def test_wrong_dtype(which, dtype):
    pattern = SparsityPattern(1, 2, 64)
    _, _, stored = example_weight(pattern)
    tensors = list(stored)
    tensors[which] = tensors[which].to(dtype)
    name = "w" + ("", "_meta", "_index")[which]
    with pytest.raises(FormatError, match=rf"^{name} must have dtype .*, found {dtype}\.$"):
        validate(SparseWeight(*tensors), pattern, (2, 32, 128), "w")


@pytest.mark.parametrize(
    ("shape", "message"),
    [((), "must have shape"), ((8,), "must have shape"), ((3, 8), "multiple of N=2, found 3")],
)
def test_values_that_no_weight_has(shape, message):
    stored = SparseWeight(*(torch.zeros(shape) for _ in range(3)))
    with pytest.raises(FormatError, match=f"^w.*{message}"):
        validate(stored, SparsityPattern(2, 4, 8), name="w")


def test_another_pattern_is_noticed():
    """The pattern in config.json was edited: the tensors no longer fit it."""
    _, _, stored = example_weight(SparsityPattern(1, 2, 64))
    for text in ("1:2:32", "1:2:128", "2:4", "1:4:64", "2:2:64"):
        with pytest.raises((FormatError, PatternError), match=r"^weight"):
            validate(stored, SparsityPattern.parse(text), (2, 32, 128))


def test_bits_helper_tells_zeros_apart():
    """The comparison of these tests is stricter than torch.equal."""
    assert torch.equal(torch.tensor([-0.0]), torch.tensor([0.0]))
    assert not torch.equal(bits(torch.tensor([-0.0])), bits(torch.tensor([0.0])))
