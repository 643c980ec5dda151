"""Codes of b bits fill b/8 bytes each and come back; four bits are those of refimpl.packing."""

import pytest
import torch

from refimpl.packing import pack_4bit
from refimpl.quantization.packing import pack_codes, packed_bytes, unpack_codes


def draw(bits, *shape):
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits)).to(torch.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 64), (13, 17)])
def test_codes_come_back(bits, shape):
    codes = draw(bits, *shape)
    packed = pack_codes(codes, bits)
    assert packed.dtype is torch.uint8 and packed.nbytes == packed_bytes(codes.numel(), bits)
    assert torch.equal(unpack_codes(packed, bits, shape), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_bit_is_lost_to_padding(bits):
    assert packed_bytes(64 * 96, bits) == 64 * 96 * bits // 8
    numel = 64 * 96 + 1
    assert numel * bits / 8 <= packed_bytes(numel, bits) <= numel * bits / 8 + bits


def test_the_bits_are_one_string_with_the_highest_first():
    for bits in (2, 3, 5, 8):
        codes = draw(bits, 8)
        string = "".join(f"{code:0{bits}b}" for code in codes.tolist())
        assert "".join(f"{byte:08b}" for byte in pack_codes(codes, bits).tolist()) == string


def test_four_bits_are_those_of_the_ground_floor():
    codes = draw(4, 7, 9)
    assert torch.equal(pack_codes(codes, 4), pack_4bit(codes))


def test_a_transposed_view_is_packed_in_its_own_order():
    codes = draw(3, 8, 5).T
    assert torch.equal(unpack_codes(pack_codes(codes, 3), 3, (5, 8)), codes)


def test_bad_input_is_refused():
    codes = draw(3, 4)
    for call, error, message in [
        (lambda: pack_codes(codes.int(), 3), TypeError, "codes must be uint8"),
        (lambda: pack_codes(codes + 8, 3), ValueError, "0 to 7, got a code"),
        (lambda: pack_codes(codes[:0], 3), ValueError, "got none"),
        (lambda: pack_codes(codes, 9), ValueError, "bits must be an integer from 1 to 8"),
        (lambda: pack_codes(codes, True), ValueError, "bits must be an integer from 1 to 8"),
        (lambda: unpack_codes(codes.int(), 3, (4,)), TypeError, "packed must be uint8"),
        (lambda: unpack_codes(codes, 3, (4,)), ValueError, r"packed must be \[3\]"),
        (lambda: packed_bytes(0, 3), ValueError, "numel must be an integer >= 1"),
    ]:
        with pytest.raises(error, match=message):
            call()
