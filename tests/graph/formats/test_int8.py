import pytest
import torch
from bitsandbytes import functional

from graph.formats import Int8, fidelity
from graph.formats.format import unpack

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_bytes_are_those_of_bitsandbytes_and_of_the_definition(dtype: torch.dtype) -> None:
    w = (torch.randn(24, 100) * 0.05).to(dtype)
    packed = Int8().pack(w)
    theirs, scale, _ = functional.int8_vectorwise_quant(w)
    assert packed["indices"].equal(theirs)
    assert packed["scale"].equal(scale)
    absmax = w.float().abs().amax(1)
    assert packed["scale"].equal(absmax)
    assert packed["indices"].equal((w.float() * (127 / absmax)[:, None]).round().to(torch.int8))
    for out in FLOATS:
        assert unpack(Int8(), packed, out).equal(functional.int8_vectorwise_dequant(theirs, scale).to(out))


def test_each_row_keeps_its_largest_value_and_the_others_within_half_a_step() -> None:
    w = torch.randn(16, 300) * torch.logspace(-6, 6, 16)[:, None]
    packed = Int8().pack(w)
    dense = unpack(Int8(), packed, torch.float32)
    step = w.abs().amax(1, keepdim=True) / 127
    assert ((dense - w).abs() <= step / 2 * 1.001).all()
    assert fidelity(Int8(), w, packed).faithful
    assert not fidelity(Int8(), w, packed | {"scale": packed["scale"].roll(1)}).faithful


def test_rows_of_zeros_and_of_tiny_numbers_are_zeros() -> None:
    w = torch.zeros(3, 8)
    w[1] = 1e-38
    w[2] = 1.0
    packed = Int8().pack(w)
    assert packed["indices"][:2].equal(torch.zeros(2, 8, dtype=torch.int8))
    assert unpack(Int8(), packed, torch.float32)[:2].equal(torch.zeros(2, 8))
    assert fidelity(Int8(), w, packed).faithful


def test_without_values_shapes_and_dtypes_are_the_same() -> None:
    w = torch.randn(48, 96)
    real, planned = Int8().pack(w), Int8().pack(w.to("meta"))
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in planned.items()}
    dense = unpack(Int8(), planned, torch.float16)
    assert (dense.shape, dense.dtype, dense.is_meta) == (w.shape, torch.float16, True)


def test_a_shape_that_cannot_be_packed_is_explained() -> None:
    assert str(Int8().problem("conv.weight", (8, 64, 3))) == (
        "conv.weight has the shape [8, 64, 3]; int8 packs weights of two dimensions\n  fix    exclude it from select"
    )
