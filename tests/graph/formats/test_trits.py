import pytest
import torch

from graph.formats.trits import PACKINGS, Packing, pack_trits, trit_bytes, unpack_trits

COLUMNS = (1, 4, 5, 9, 64, 127, 1000)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_what_is_packed_comes_back(packing: Packing, columns: int) -> None:
    trits = torch.randint(0, 3, (7, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(columns))
    packed = pack_trits(trits, packing)
    assert packed.shape == (7, trit_bytes(columns, packing))
    assert unpack_trits(packed, packing, columns).equal(trits)
    assert unpack_trits(packed[2:5], packing, columns).equal(trits[2:5])


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_byte_that_can_be_packed_is_packed_from_what_it_unpacks_to(packing: Packing) -> None:
    per_byte = {"2bit": 4, "trit5": 5}[packing]
    numbers = torch.arange(3**per_byte)
    trits = torch.stack([numbers // 3**place % 3 for place in range(per_byte)], dim=1).to(torch.uint8)
    packed = pack_trits(trits, packing)
    assert packed.unique().numel() == 3**per_byte
    assert unpack_trits(packed, packing, per_byte).equal(trits)


def test_the_first_trit_is_in_the_low_end_of_a_byte() -> None:
    trits = torch.tensor([[2, 1, 0, 0, 0, 2]], dtype=torch.uint8)
    assert pack_trits(trits, "2bit").tolist() == [[0b0110, 0b1000]]
    assert pack_trits(trits, "trit5").tolist() == [[2 + 3, 2]]


def test_the_sizes_are_two_bits_and_one_point_six() -> None:
    assert 8 * trit_bytes(1000, "2bit") == 2000
    assert 8 * trit_bytes(1000, "trit5") == 1600


@pytest.mark.parametrize("packing", PACKINGS)
def test_shapes_are_known_without_values(packing: Packing) -> None:
    packed = pack_trits(torch.empty((6, 11), dtype=torch.uint8, device="meta"), packing)
    assert unpack_trits(packed, packing, 11).shape == (6, 11)


def test_a_row_of_another_width_is_refused() -> None:
    with pytest.raises(AssertionError, match="a row of 11 trits in trit5 has 3 bytes, not 2"):
        unpack_trits(torch.zeros((1, 2), dtype=torch.uint8), "trit5", 11)
