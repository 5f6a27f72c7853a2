from itertools import product
from typing import Any, Literal

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor

from graph.formats import BLOCKS, FourBit, fidelity, format
from graph.formats.format import unpack
from graph.formats.four_bit import dequantize_4bit

NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
FP4 = [s * v / 12 for s, v in product((1, -1), (0, 0.0625, 8, 12, 4, 6, 2, 3))]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def plain_pack(w: Tensor, levels: list[float], block: int) -> tuple[Tensor, Tensor]:
    """Quantization as its definition says: each value to the nearest level of its block."""
    blocks = w.float().reshape(w.shape[0], -1, block)
    absmax = blocks.abs().amax(-1)
    code, order = torch.tensor(levels).sort(stable=True)
    between = (code[:-1] + code[1:]) / 2
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[..., None]
    index = order[(scaled[..., None] > between).sum(-1)].reshape(w.shape)
    return (index[:, ::2] * 16 + index[:, 1::2]).to(torch.uint8), absmax


def plain_unpack(indices: Tensor, absmax: Tensor, levels: list[float], dtype: torch.dtype) -> Tensor:
    index = torch.stack((indices >> 4, indices & 15), -1).reshape(indices.shape[0], -1).long()
    dense = torch.tensor(levels)[index].reshape(*absmax.shape, -1) * absmax[..., None]
    return dense.reshape(index.shape).to(dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_bytes_are_those_of_bitsandbytes_and_of_the_definition(kind: Any, block: int) -> None:
    levels = NF4 if kind == "nf4" else FP4
    for dtype in FLOATS:
        w = (torch.randn(6, 4096) * 0.02).to(dtype)
        packed = FourBit(kind, block).pack(w)
        theirs, state = functional.quantize_4bit(w, blocksize=block, quant_type=kind)
        assert packed["indices"].flatten().equal(theirs.flatten())
        assert packed["absmax"].flatten().equal(state.absmax)
        indices, absmax = plain_pack(w, levels, block)
        assert packed["indices"].equal(indices)
        assert packed["absmax"].equal(absmax)
        for out in FLOATS:
            assert unpack(FourBit(kind, block), packed, out).equal(plain_unpack(indices, absmax, levels, out))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_layer_that_bitsandbytes_saves_has_the_same_bytes_and_the_same_weight(kind: Any, dtype: torch.dtype) -> None:
    w = torch.randn(96, 192, dtype=torch.float32).mul(0.05).to(dtype)
    layer = Linear4bit(192, 96, bias=False, quant_type=kind, compress_statistics=True, compute_dtype=dtype)
    layer.weight = Params4bit(w, requires_grad=False, quant_type=kind, compress_statistics=True)
    saved = layer.to("cpu").state_dict()
    form = FourBit(kind, 64, double_quant=True)
    packed = form.pack(w)
    state = layer.weight.quant_state
    assert packed["indices"].flatten().equal(saved["weight"].flatten())
    assert packed["absmax"].flatten().equal(saved["weight.absmax"])
    assert packed["absmax_scale"].equal(saved["weight.nested_absmax"])
    assert packed["absmax_offset"].equal(state.offset)
    assert unpack(form, packed, dtype).equal(functional.dequantize_4bit(layer.weight.data, state))


def test_double_quantization_is_the_distance_from_the_mean_in_blocks_of_256() -> None:
    w = torch.randn(40, 1024)
    single, double = FourBit("nf4", 64).pack(w), FourBit("nf4", 64, double_quant=True).pack(w)
    distance = (single["absmax"] - single["absmax"].mean()).flatten()
    groups = torch.nn.functional.pad(distance, (0, -len(distance) % 256)).view(-1, 256)
    code = functional.create_dynamic_map()
    scale = groups.abs().amax(1)
    scaled = (groups / scale[:, None]).flatten()[: len(distance)]
    nearest = (scaled[:, None] - code).abs().amin(1)
    chosen = code[double["absmax"].flatten().long()]
    assert double["absmax_scale"].equal(scale)
    assert ((scaled - chosen).abs() <= 1.01 * nearest + 1e-6).all()  # bitsandbytes' table is not exact half way
    decoded = chosen * scale.repeat_interleave(256)[: len(distance)] + double["absmax_offset"]
    assert FourBit("nf4", 64).by_row(double)(slice(None))["absmax"].flatten().equal(decoded)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_packing_again_what_was_unpacked_changes_nothing(kind: Any) -> None:
    form = FourBit(kind, 32)
    dense = unpack(form, form.pack(torch.randn(16, 256)), torch.float32)
    assert unpack(form, form.pack(dense), torch.float32).equal(dense)


def test_the_weight_is_worked_on_in_chunks_of_sixteen_rows_or_more(monkeypatch: pytest.MonkeyPatch) -> None:
    w, form = torch.randn(40, 256), FourBit("nf4", 64, double_quant=True)
    whole, seen = form.pack(w), fidelity(form, w, form.pack(w))
    monkeypatch.setattr(format, "CHUNK", 30 * 256)
    assert [part.stop - part.start for part in format.chunks(w)] == [16, 16, 8]
    assert all(side.equal(whole[key]) for key, side in form.pack(w).items())
    assert fidelity(form, w, whole).snr_db == pytest.approx(seen.snr_db, abs=1e-9)


@pytest.mark.parametrize("double_quant", [False, True])
def test_without_values_shapes_and_dtypes_are_the_same(double_quant: bool) -> None:
    form, w = FourBit("nf4", 32, double_quant), torch.randn(48, 96)
    real, planned = form.pack(w), form.pack(w.to("meta"))
    assert list(real) == list(planned)
    for key in real:
        assert (real[key].shape, real[key].dtype, planned[key].is_meta) == (
            planned[key].shape,
            planned[key].dtype,
            True,
        )
    dense = unpack(form, planned, torch.bfloat16)
    assert (dense.shape, dense.dtype, dense.is_meta) == (w.shape, torch.bfloat16, True)


def test_blocks_of_zeros_and_of_tiny_numbers_stay_finite() -> None:
    w = torch.zeros(4, 64)
    w[1] = 1e-42
    w[2, 0] = 3e38
    for kind in ("nf4", "fp4"):
        packed = FourBit(kind, 64).pack(w)
        dense = unpack(FourBit(kind, 64), packed, torch.float32)
        assert dense.isfinite().all()
        assert dense[0].equal(torch.zeros(64))
        assert dense[2].equal(w[2])
        assert fidelity(FourBit(kind, 64), w, packed).faithful


def test_a_double_precision_graph_gets_the_fp32_weight() -> None:
    packed = FourBit("nf4", 64).pack(torch.randn(4, 64))
    dense = dequantize_4bit(packed["indices"], packed["absmax"], "nf4", torch.float64)
    assert dense.equal(dequantize_4bit(packed["indices"], packed["absmax"], "nf4", torch.float32).double())


def test_no_weight_however_odd_is_further_off_than_the_levels_allow() -> None:
    shapes = {
        "normal": torch.randn(32, 512),
        "heavy-tailed": torch.distributions.StudentT(torch.tensor(1.5)).sample((32, 512)),
        "one outlier": torch.randn(32, 512).index_put((torch.tensor(3), torch.tensor(7)), torch.tensor(1e4)),
        "ternary": torch.randint(-1, 2, (32, 512)).float(),
        "constant": torch.full((32, 512), -0.3),
        "half way": torch.full((32, 512), 0.8615).index_fill(1, torch.arange(0, 512, 32), 1.0),
    }
    kinds: tuple[Literal["nf4", "fp4"], ...] = ("nf4", "fp4")
    for (name, w), kind, block, double in product(shapes.items(), kinds, (32, 512), (False, True)):
        form = FourBit(kind, block, double)
        assert fidelity(form, w, form.pack(w)).faithful, (name, form.name)


def test_swapped_scales_shifted_indices_and_nan_are_further_off_than_the_levels_allow() -> None:
    w, form = torch.randn(32, 512), FourBit("nf4", 64)
    good = form.pack(w)
    bad = {
        "scales of another block": good | {"absmax": good["absmax"].roll(1, dims=1)},
        "scales of another row": good | {"absmax": good["absmax"].roll(1, dims=0)},
        "a scale too small by a fifth": good | {"absmax": good["absmax"] * 0.8},
        "halves of a byte swapped": good | {"indices": (good["indices"] >> 4) | (good["indices"] << 4)},
        "packed along the other axis": form.pack(w.t().reshape(32, 512)),
        "a scale that is not a number": good
        | {"absmax": good["absmax"].clone().index_fill_(0, torch.tensor(5), torch.nan)},
    }
    for what, packed in bad.items():
        assert not fidelity(form, w, packed).faithful, what


def test_a_shape_that_cannot_be_packed_is_explained() -> None:
    assert str(FourBit("nf4", 64).problem("up.weight", (8, 96))) == (
        "block 64 does not divide the 96 input columns of up.weight\n"
        "  fix    set block to 32, or exclude it from select"
    )
    assert str(FourBit("nf4", 64).problem("up.weight", (8, 31))) == (
        "block 64 does not divide the 31 input columns of up.weight\n"
        "  fix    no block size does; exclude it from select"
    )
    assert str(FourBit("fp4", 64).problem("conv.weight", (8, 64, 3))) == (
        "conv.weight has the shape [8, 64, 3]; fp4 packs weights of two dimensions\n  fix    exclude it from select"
    )
    assert str(FourBit("nf4", 48).problem("up.weight", (8, 96))) == (
        "block 48 is not a block size of nf4\n  fix    set block to one of 32, 64, 128, 256, 512, 1024, 2048, 4096"
    )
    assert FourBit("nf4", 32).problem("up.weight", (8, 96)) is None
