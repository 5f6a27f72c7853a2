import pytest
import torch
from torch import Tensor

from graph.formats.bits import BITS, bits_for, look_up, pack_bits, packed_columns, unpack_bits
from tests.timing import least_times

SHAPES = [(1, 1), (3, 7), (2, 24), (5, 33), (4, 100), (600, 2048)]


def random_indices(bits: int, shape: tuple[int, int]) -> Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


@pytest.mark.parametrize("bits", BITS)
def test_packing_loses_nothing(bits: int) -> None:
    for shape in SHAPES:
        indices = random_indices(bits, shape)
        packed = pack_bits(indices, bits)
        assert packed.shape == (shape[0], packed_columns(shape[1], bits))
        assert unpack_bits(packed, bits, shape[1]).equal(indices)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_is_a_little_endian_stream_with_zeros_behind_it(bits: int) -> None:
    indices = random_indices(bits, (3, 37))
    for row, stream in zip(indices.tolist(), pack_bits(indices, bits), strict=True):
        number = int.from_bytes(bytes(stream.tolist()), "little")
        assert [number >> bits * j & (1 << bits) - 1 for j in range(37)] == row
        assert number >> bits * 37 == 0


def test_the_first_index_lies_in_the_low_bits() -> None:
    assert pack_bits(torch.tensor([[1, 2, 3, 0, 1]], dtype=torch.uint8), 2).tolist() == [[0b00_11_10_01, 1]]
    assert pack_bits(torch.tensor([[7, 0, 1]], dtype=torch.uint8), 3).tolist() == [[0b01_000_111, 0]]
    assert pack_bits(torch.tensor([[63, 1]], dtype=torch.uint8), 6).tolist() == [[0b01_111111, 0]]


def test_any_rows_of_a_packed_matrix_are_a_packed_matrix() -> None:
    indices = random_indices(3, (6, 13))
    assert pack_bits(indices, 3)[2:5].equal(pack_bits(indices[2:5], 3))


@pytest.mark.parametrize("bits", BITS)
def test_looking_up_gives_the_level_of_every_index(bits: int) -> None:
    levels = torch.randn(1 << bits).sort().values
    for shape in SHAPES:
        indices = random_indices(bits, shape)
        assert look_up(pack_bits(indices, bits), levels, shape[1]).equal(levels[indices.long()])


@pytest.mark.parametrize("bits", BITS)
def test_groups_of_rows_have_levels_of_their_own(bits: int) -> None:
    levels, indices = torch.randn(3, 1 << bits), random_indices(bits, (6, 21))
    wanted = levels.repeat_interleave(2, dim=0).gather(1, indices.long())
    assert look_up(pack_bits(indices, bits), levels, 21).equal(wanted)


def test_an_index_has_the_fewest_bits_that_reach_all_levels() -> None:
    assert [bits_for(n) for n in (2, 3, 4, 5, 8, 9, 16, 17, 64, 65, 256)] == [1, 2, 2, 3, 3, 4, 4, 6, 6, 8, 8]
    ternary = random_indices(2, (4, 9)).clamp_(max=2)
    levels = torch.tensor([-1.0, 0.0, 1.0])
    assert look_up(pack_bits(ternary, 2), levels, 9).equal(levels[ternary.long()])


def test_a_plan_gets_the_shapes() -> None:
    indices = torch.empty(4, 10, dtype=torch.uint8, device="meta")
    packed = pack_bits(indices, 3)
    assert (packed.shape, packed.dtype) == ((4, 4), torch.uint8)
    assert unpack_bits(packed, 3, 10).shape == (4, 10)
    values = look_up(packed, torch.empty(8, device="meta"), 10)
    assert (values.shape, values.dtype, values.is_meta) == ((4, 10), torch.float32, True)


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(AssertionError, match="a row of 9 2-bit indices has 3 bytes, not 2"):
        unpack_bits(torch.zeros(1, 2, dtype=torch.uint8), 2, 9)


@pytest.mark.parametrize("bits", [2, 4])
def test_looking_up_costs_less_than_half_of_doing_it_with_shifts(bits: int) -> None:
    indices, levels = random_indices(bits, (1536, 512)), torch.randn(1 << bits)
    packed = pack_bits(indices, bits)

    def shifted() -> Tensor:
        parts = [packed >> bits * k & (1 << bits) - 1 for k in range(8 // bits)]
        return levels.index_select(0, torch.stack(parts, dim=-1).flatten().int()).view(1536, 512)

    assert look_up(packed, levels, 512).equal(shifted())
    steps = {"ours": lambda: look_up(packed, levels, 512), "plain": shifted}
    least = least_times(steps, lambda found: found["ours"] <= found["plain"] / 2)
    assert least["ours"] <= least["plain"] / 2
