"""4-bit codes go into half as many bytes and come back; groups keep their order."""

import pytest
import torch

from refimpl.packing import from_groups, pack_4bit, to_groups, unpack_4bit


@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (3, 5), (2, 3, 64), (1, 1)])
def test_codes_come_back_from_half_as_many_bytes(shape):
    codes = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack_4bit(codes)
    assert packed.untyped_storage().nbytes() == (codes.numel() + 1) // 2
    assert torch.equal(unpack_4bit(packed, shape), codes)


def test_first_code_is_the_high_half_of_the_byte():
    assert pack_4bit(torch.tensor([10, 11], dtype=torch.uint8)).item() == 0xAB


def test_a_transposed_view_is_packed_in_its_own_order():
    codes = torch.arange(12, dtype=torch.uint8).view(3, 4).T
    assert torch.equal(unpack_4bit(pack_4bit(codes), (4, 3)), codes)


@pytest.mark.parametrize(("shape", "size"), [((10,), 4), ((3, 5), 5), ((2, 3), 1), ((2, 3), 100)])
def test_groups_cut_and_joined_are_the_tensor(shape, size):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    groups = to_groups(x, size)
    assert groups.shape == (-(-x.numel() // size), size)
    assert torch.equal(from_groups(groups, shape), x)
    assert groups.flatten()[x.numel() :].count_nonzero() == 0


def test_bad_input_is_refused():
    codes = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(TypeError, match="codes must be uint8"):
        pack_4bit(codes.int())
    with pytest.raises(ValueError, match="0 to 15, got a code 16"):
        pack_4bit(codes + 16)
    with pytest.raises(ValueError, match="got none"):
        pack_4bit(codes[:0])
    with pytest.raises(TypeError, match="packed must be uint8"):
        unpack_4bit(codes.float(), (8,))
    with pytest.raises(ValueError, match=r"packed must be \[5\]"):
        unpack_4bit(codes, (10,))
    with pytest.raises(ValueError, match="size"):
        to_groups(codes, 0)
    with pytest.raises(ValueError, match=r"groups of shape \[2, 2\]"):
        from_groups(to_groups(codes, 2), (5,))
