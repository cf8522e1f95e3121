"""The bit format: order, padding, signs of zero, awkward widths, errors, and the popcount identity kernels rest on."""

import numpy as np
import pytest
import torch

from rebnn_hf.packing import has_clean_padding, pack_signs, packed_width, unpack_signs

WIDTHS = [1, 3, 7, 8, 31, 32, 33, 63, 64, 65, 127, 128, 129, 767, 768]


def rows(width, count=5):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(width))


def bytes_of(text):
    """Bytes from signs in reading order, worked out by hand rather than by the code under test."""
    text = text.replace(" ", "")
    octets = [text[start : start + 8] for start in range(0, len(text), 8)]
    return [sum(2**place for place, char in enumerate(octet) if char == "+") for octet in octets]


# Bit order


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        ([1, -1, -1, -1, -1, -1, -1, -1], [1]),
        ([-1, -1, -1, -1, -1, -1, -1, 1], [128]),
        ([1, 1, 1, 1, 1, 1, 1, 1], [255]),
        ([-1, -1, -1, -1, -1, -1, -1, -1], [0]),
        ([1, -1, 1, 1, -1, -1, 1, -1, 1], [0b01001101, 0b1]),
        ([-1] * 8 + [-1, -1, 1], [0, 4]),
        ([1], [1]),
        ([-1], [0]),
    ],
)
def test_first_element_is_the_lowest_bit_of_the_first_byte(signs, expected):
    packed = pack_signs(torch.tensor(signs, dtype=torch.float32))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected


def test_rows_follow_each_other_and_do_not_share_bytes():
    signs = torch.tensor([[1.0, 1, -1], [-1, -1, 1]])
    assert pack_signs(signs).tolist() == [[0b011], [0b100]]


def test_hand_written_row_over_three_bytes():
    text = "+-++--+- -----+++ +-+"
    signs = torch.tensor([1.0 if char == "+" else -1.0 for char in text.replace(" ", "")])
    assert bytes_of(text) == [0x4D, 0xE0, 0x05]
    assert pack_signs(signs).tolist() == [0x4D, 0xE0, 0x05]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_zero_of_either_sign_is_plus_one(dtype):
    weight = torch.tensor([0.0, -0.0, -1.0, 1.0], dtype=dtype)
    assert pack_signs(weight).tolist() == [0b1011]


def test_smallest_negative_number_is_minus_one():
    tiny = torch.tensor([-torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).smallest_normal])
    assert pack_signs(tiny).tolist() == [0b10]


# Widths


@pytest.mark.parametrize("width", WIDTHS)
def test_round_trip(width):
    weight = rows(width)
    signs = unpack_signs(pack_signs(weight), width)
    assert signs.shape == weight.shape
    assert torch.equal(signs, torch.where(weight >= 0, 1.0, -1.0))


@pytest.mark.parametrize("width", WIDTHS)
def test_equals_numpy_packbits_little(width):
    weight = rows(width)
    expected = np.packbits(weight.numpy() >= 0, axis=-1, bitorder="little")
    assert packed_width(width) == expected.shape[-1] == -(-width // 8)
    np.testing.assert_array_equal(pack_signs(weight).numpy(), expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_padding_is_zero_and_every_set_padding_bit_is_noticed(width):
    packed = pack_signs(torch.ones(3, width))
    spare = packed_width(width) * 8 - width
    assert packed[:, -1].tolist() == [2 ** (8 - spare) - 1] * 3
    assert has_clean_padding(packed, width)
    for bit in range(8 - spare, 8):
        dirty = packed.clone()
        dirty[1, -1] |= 1 << bit
        assert not has_clean_padding(dirty, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_dot_product_is_width_minus_twice_the_differing_bits(width):
    a, b = rows(width), rows(width).flip(0) * 1.5 - 0.2
    signs_a, signs_b = (torch.where(x >= 0, 1, -1) for x in (a, b))
    differing = np.bitwise_xor(pack_signs(a).numpy(), pack_signs(b).numpy())
    popcount = np.unpackbits(differing, axis=-1).sum(-1).astype(np.int64)
    np.testing.assert_array_equal(width - 2 * popcount, (signs_a * signs_b).sum(-1).numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unpacks_to_the_type_asked_for(dtype):
    signs = unpack_signs(torch.tensor([0b101], dtype=torch.uint8), 3, dtype)
    assert signs.dtype == dtype
    assert signs.tolist() == [1.0, -1.0, 1.0]


def test_leading_dimensions_are_kept():
    weight = rows(11, 24).reshape(2, 3, 4, 11)
    packed = pack_signs(weight)
    assert packed.shape == (2, 3, 4, 2)
    assert torch.equal(packed.reshape(24, 2), pack_signs(weight.reshape(24, 11)))
    assert torch.equal(unpack_signs(packed, 11), torch.where(weight >= 0, 1.0, -1.0))


def test_booleans_are_signs():
    weight = rows(33)
    assert torch.equal(pack_signs(weight >= 0), pack_signs(weight))


def test_non_contiguous_rows():
    weight = rows(17, 9).T
    assert torch.equal(pack_signs(weight), pack_signs(weight.contiguous()))


def test_packing_reads_its_argument_only():
    weight = rows(9)
    before = weight.clone()
    packed = pack_signs(weight)
    kept = packed.clone()
    unpack_signs(packed, 9)
    assert torch.equal(weight, before)
    assert torch.equal(packed, kept)


# Errors


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integers_are_refused(dtype):
    with pytest.raises(TypeError, match="floating point or boolean"):
        pack_signs(torch.ones(2, 8, dtype=dtype))


def test_scalar_is_refused():
    with pytest.raises(ValueError, match="scalar"):
        pack_signs(torch.tensor(1.0))


@pytest.mark.parametrize("read", [unpack_signs, has_clean_padding])
def test_other_types_than_uint8_are_refused(read):
    with pytest.raises(TypeError, match=r"uint8, got torch\.int32"):
        read(torch.ones(2, 1, dtype=torch.int32), 8)


@pytest.mark.parametrize("read", [unpack_signs, has_clean_padding])
@pytest.mark.parametrize(("shape", "width"), [((2, 2), 8), ((2, 1), 9), ((), 1)])
def test_rows_of_another_length_are_refused(read, shape, width):
    with pytest.raises(ValueError, match=rf"rows of {width} signs take {-(-width // 8)} bytes"):
        read(torch.zeros(shape, dtype=torch.uint8), width)
