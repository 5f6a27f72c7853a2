from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from graph.formats import Scaled, fidelity
from graph.formats.elements import decode_e2m1, decode_integers, encode_e2m1, encode_integers
from graph.formats.format import unpack
from graph.formats.scaled import format_of_scaled

FLOAT4 = {"num_bits": 4, "type": "float"}
FLOAT8 = {"num_bits": 8, "type": "float"}
MX = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
PEERS: list[tuple[Scaled, str, dict[str, Any]]] = [
    (Scaled("fp8"), "float-quantized", {**FLOAT8, "strategy": "channel"}),
    (Scaled("fp8", 0), "float-quantized", {**FLOAT8, "strategy": "tensor"}),
    (Scaled("fp8", 128, 128), "float-quantized", {**FLOAT8, "strategy": "block", "block_structure": [128, 128]}),
    (Scaled("nvfp4"), "nvfp4-pack-quantized",
     {**FLOAT4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}),
    (Scaled("mxfp8"), "mxfp8-quantized", {**FLOAT8, **MX}),
    (Scaled("mxfp4"), "mxfp4-pack-quantized", {**FLOAT4, **MX}),
    *((Scaled(f"int{bits}", 1, 32), "pack-quantized",  # type: ignore[arg-type]
       {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32}) for bits in (2, 3, 4, 6, 8)),
    (Scaled("int4"), "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
]  # fmt: skip
IDS = [form.name for form, _, _ in PEERS]


def weight() -> Tensor:
    """Rows of several sizes, with zeros of both signs, a row and a block of nothing else, and an outlier."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(256, 384, generator=generator) * torch.logspace(-3, 1, 256)[:, None]
    w[5] = 0.0
    w[7, :64] = 0.0
    w[8, ::3] = -0.0
    w[9, 100] = 400.0
    return w


def reference(form: Scaled, layout: str, args: dict[str, Any], w: Tensor) -> tuple[Any, dict[str, Tensor], Any]:
    """The library's compressor, what it makes of ``w`` and the scales that it finds, and its scheme."""
    rows, columns = form.rows or w.shape[0], form.columns or w.shape[1]
    blocks = w.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    said = QuantizationArgs(**args)
    state = {"weight": w}
    if form.kind == "nvfp4":
        state["weight_global_scale"] = generate_gparam(w.min(), w.max())
    scale, _ = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), said, state.get("weight_global_scale"))
    state["weight_scale"] = scale
    peer, scheme = BaseCompressor.get_value_from_registry(layout), QuantizationScheme(targets=["Linear"], weights=said)
    return peer, peer.compress(state, scheme), scheme


@pytest.mark.peer
@pytest.mark.parametrize(("form", "layout", "args"), PEERS, ids=IDS)
def test_the_bytes_and_the_weight_are_those_of_compressed_tensors(
    form: Scaled, layout: str, args: dict[str, Any]
) -> None:
    w = weight()
    peer, theirs, scheme = reference(form, layout, args, w)
    packed = form.pack(w)
    codes = theirs["weight_packed"] if "weight_packed" in theirs else theirs["weight"]
    assert packed["indices"].equal(codes.contiguous().view(torch.uint8))
    assert packed["scale"].view(torch.uint8).equal(theirs["weight_scale"].contiguous().view(torch.uint8))
    if form.kind == "nvfp4":
        assert packed["global_scale"].equal(theirs["weight_global_scale"])
    dense = peer.decompress(theirs, scheme)["weight"]
    assert unpack(form, packed, dense.dtype).equal(dense)
    assert fidelity(form, w, packed).faithful


def test_e2m1_is_the_nearest_level_and_ties_go_to_the_even_code() -> None:
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    ties = (levels[1:] + levels[:-1]) / 2
    near = torch.cat([ties.nextafter(torch.tensor(end)) for end in (0.0, 9.0)])
    x = torch.cat((levels, ties, near, torch.linspace(0, 9, 9999), torch.tensor([1e-30, 1e30])))
    for sign in (1.0, -1.0):
        found = decode_e2m1(encode_e2m1((sign * x)[None].clone()))[0]
        distances = ((found * sign)[:, None] - levels).abs()
        assert distances.amin(1).equal(torch.zeros(len(x)))
        assert ((found * sign - x.clamp(max=6)).abs() == (x.clamp(max=6)[:, None] - levels).abs().amin(1)).all()
        assert (found[8:15] * sign).equal(torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]))
    assert encode_e2m1(torch.tensor([[0.0, -0.0, -0.1, 0.1]]))[0].tolist() == [0x00, 0x08]
    assert encode_e2m1(torch.tensor([[0.5, -6.0]]))[0].tolist() == [0xF1], "the first is in the low half"


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_integers_come_back_from_the_stream_and_saturate(bits: int) -> None:
    half = 1 << bits - 1
    x = torch.randint(-half, half, (5, 48)).float()
    assert decode_integers(encode_integers(x.clone(), bits), bits).equal(x)
    ends = decode_integers(encode_integers(torch.tensor([[-1e9, 1e9, 0.5, 1.5, -0.4, 0.0, 0.0, 0.0]]), bits), bits)[0]
    assert ends[:5].tolist() == [-half, half - 1, 0, min(2, half - 1), 0]


@pytest.mark.parametrize("form", [form for form, _, _ in PEERS], ids=IDS)
def test_what_is_wrong_with_packed_bytes_shows(form: Scaled) -> None:
    w = torch.randn(256, 384, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 1, 256)[:, None]
    packed = form.pack(w)
    assert fidelity(form, w, packed).faithful
    wrong = {"indices rolled": packed | {"indices": packed["indices"].roll(1, 1)}}
    if form.element.bits == 4:
        wrong["halves swapped"] = packed | {"indices": packed["indices"] << 4 | packed["indices"] >> 4}
    if packed["scale"].numel() > 1:
        wrong["scales rolled"] = packed | {"scale": packed["scale"].flip(0)}
    if form.kind == "nvfp4":
        wrong["reciprocal"] = packed | {"global_scale": 1 / packed["global_scale"]}
    for what, broken in wrong.items():
        assert not fidelity(form, w, broken).faithful, what


@pytest.mark.parametrize("form", [form for form, _, _ in PEERS], ids=IDS)
def test_without_values_shapes_dtypes_and_the_format_are_the_same(form: Scaled) -> None:
    w = torch.randn(256, 384)
    real, planned = form.pack(w), form.pack(w.to("meta"))
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in planned.items()}
    dense = unpack(form, planned, torch.float16)
    assert (dense.shape, dense.dtype, dense.is_meta) == (w.shape, torch.float16, True)
    assert format_of_scaled(form.kind, real["indices"], real["scale"]) == form
    part = slice(100, 140)
    assert unpack(form, form.by_row(real)(part), torch.bfloat16).equal(unpack(form, real, torch.bfloat16)[part])


def test_codes_belong_to_the_scale_as_it_is_rounded() -> None:
    w = torch.randn(64, 256)
    for form in (Scaled("fp8", scale_dtype=torch.bfloat16), Scaled("int4", 1, 32, torch.bfloat16)):
        packed = form.pack(w)
        assert packed["scale"].dtype == torch.bfloat16
        assert fidelity(form, w, packed).faithful
        as_f32 = packed | {"scale": packed["scale"].float()}
        assert unpack(form, packed, torch.float32).equal(unpack(form, as_f32, torch.float32))


@pytest.mark.parametrize(
    ("form", "shape", "text"),
    [
        (Scaled("fp8"), (8, 64, 3), "up.weight has the shape [8, 64, 3]; fp8 packs weights of two dimensions\n  fix    exclude it from select"),
        (Scaled("nvfp4"), (8, 72), "nvfp4: 16 does not divide the 72 input columns of up.weight\n  fix    exclude it from select"),
        (Scaled("fp8", 128, 128), (192, 256), "fp8, blocks of 128x128: 128 does not divide the 192 output rows of up.weight\n  fix    exclude it from select, or take another block"),
        (Scaled("int3"), (8, 12), "a row of up.weight has 12 weights, which in int3 fill no whole number of bytes\n  fix    exclude it from select"),
    ],
)  # fmt: skip
def test_a_shape_that_cannot_be_packed_is_explained(form: Scaled, shape: tuple[int, ...], text: str) -> None:
    assert str(form.problem("up.weight", shape)) == text
