"""What a linear or an embedding multiplies with, as packed in the file as ONNX can hold it.

    int8, int2 … int6, fp8   DequantizeLinear(codes, scale), by row or by block; ternary too, as integers of 2 bits
    nf4, fp4, lut, nvfp4, …  Gather(levels, codes), times scales by block or of low rank; levels may be vectors

A linear reads its weight [in, out]: so it lies in the file, unless something else reads it too. ONNX has integers of 2,
4 and 8 bits; others lie in the next wider ones. ``DequantizeLinear`` computes in the dtype of its scales,
which is the model's; all other scales are fp32, as in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graph.errors import QcError
from graph.formats.bits import bits_for, unpack_bits
from graph.formats.elements import decode_e2m1
from graph.formats.four_bit import block_scales, dequantize_4bit
from graph.formats.lut_scales import scale_factors
from graph.formats.scaled import ELEMENTS
from graph.formats.scales_of import read_scales
from graph.formats.ste import to_fp16
from graph.formats.stored import DEQUANTIZE, arguments, packed_tensors, weight_name
from graph.formats.trits import unpack_trits
from graph.ops import op_name
from graph.sites import Site, node_name
from runtimes.onnx.lowering import Lowering, dtype_of, lowers, tensor_of, type_of
from runtimes.onnx.program import TYPES, Array, joined, plain

_THROUGH = frozenset({"aten.to.dtype", "qc.cast_like", "aten.contiguous", "aten.clone"})
"""Ops on a weight that do not depend on how it lies."""


def source_of(node: fx.Node) -> fx.Node:
    """Where a weight comes from, casts apart: a tensor, an op that unpacks, or any other op."""
    while node.op == "call_function" and op_name(node.target) in _THROUGH:
        node = node.all_input_nodes[0]
    return node


def name_of(graph: Any, node: fx.Node) -> str:
    """The name of the weight that comes from ``node``."""
    packed = node.op == "call_function" and op_name(node.target) in DEQUANTIZE
    return weight_name(Site(graph, node)) if packed else node_name(node)


def turned_weight(low: Lowering, node: fx.Node) -> str:
    """A weight [out, in] of the graph as [in, out]."""
    source = source_of(node)
    if name_of(low.graph, source) in low.straight or not (low.is_stored(source) or _unpacks(source)):
        return low.transpose(low.value(node), (1, 0))
    found = _Weight(low, source, turned=True).value() if _unpacks(source) else _dense(low, source)
    return low.cast(found, dtype_of(source), dtype_of(node))


def _unpacks(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node.target) in DEQUANTIZE


def _dense(low: Lowering, node: fx.Node) -> str:
    """A float weight, turned."""
    value, name = tensor_of(node), node_name(node)
    return low.program.hold(
        f"{name}.turned",
        type_of(value.dtype),
        tuple(reversed(value.shape)),
        lambda: plain(low.evaluate(node).t(), name),
    )


@lowers(*DEQUANTIZE)
def unpack(low: Lowering, node: fx.Node) -> str:
    """A packed weight as it is, [out, in]."""
    return _Weight(low, node, turned=False).value()


class _Weight:
    """A packed weight on its way into the model."""

    def __init__(self, low: Lowering, node: fx.Node, turned: bool):
        self.low, self.site, self.turned = low, Site(low.graph, node), turned
        self.name = weight_name(self.site)
        self.rows, self.columns = map(int, tensor_of(node).shape)
        self.dtype = dtype_of(node)
        self.given = arguments(self.site)
        if self.dtype not in TYPES:
            kind = str(self.dtype).removeprefix("torch.")
            what = f"{self.name} is unpacked in {kind}, in which ONNX Runtime does not compute"
            raise QcError(what, site=self.site.name, fix="pack it with compute_dtype model, fp32 or fp16")

    def value(self) -> str:
        """The weight, of floats."""
        op = self.site.op
        if op == "qc.dequantize_int8":
            codes = self.codes("INT8", lambda: self.sides()["indices"])
            return self.scaled(codes, self.held("scale", *self.scale_type((self.rows,)), self._int8_scale), columns=0)
        if op == "qc.dequantize_scaled":
            return self._of_kind(self.given["kind"])
        if op == "qc.dequantize_4bit":
            return self._four_bit()
        if op == "qc.dequantize_lut":
            return self._lut()
        if op == "qc.dequantize_vector_lut":
            return self._vectors()
        if op == "qc.dequantize_ternary":
            return self._ternary()
        if op == "qc.dequantize_affine":
            what = f"{self.name} holds integers with zero points, which are not written packed yet"
            raise QcError(what, site=self.site.name, fix="add the pass dequantize before the export")
        what = f"{self.name} is still a float weight that is packed anew each time it is read"
        raise QcError(what, site=self.site.name, fix="run freeze-q before the export")

    # -- pieces -----------------------------------------------------------------------------------------------------

    def sides(self) -> dict[str, Tensor]:
        """The side tensors; read when the file is written."""
        return {suffix: side.detach() for suffix, side in packed_tensors(self.low.graph, self.site).items()}

    def held(self, suffix: str, kind: str, shape: tuple[int, ...], load: Callable[[], bytes | Array]) -> str:
        """A stored tensor that belongs to this weight."""
        return self.low.program.hold(f"{self.name}.{suffix}", kind, shape, load)

    def lying(self, value: Tensor) -> Tensor:
        """[out, …] as the weight lies: turned, or as it is."""
        return value.t().contiguous() if self.turned else value

    def shape(self, columns: int, rows: int | None = None) -> tuple[int, int]:
        """Of something with so many numbers a row, and perhaps other rows."""
        rows = rows or self.rows
        return (columns, rows) if self.turned else (rows, columns)

    def codes(self, kind: str, load: Callable[[], Tensor], rows: int | None = None) -> str:
        """Integers [out, in], or of so many rows; ``load`` gives one a byte."""
        bits = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}.get(kind, 8)

        def data() -> bytes | Array:
            codes = self.lying(load())
            return codes.contiguous().view(torch.uint8).numpy() if bits == 8 else joined(codes & (1 << bits) - 1, bits)

        return self.held("codes", kind, self.shape(self.columns, rows), data)

    def scales(self, count: int, load: Callable[[], Tensor]) -> str:
        """fp32 scales, so many a row; ``load`` gives [out, count]."""
        return self.held("scale", "FLOAT", self.shape(count), lambda: plain(self.lying(load().float()), self.name))

    def scale_type(self, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """Of the scales of ``DequantizeLinear``, whose result has their type: that of the model."""
        return type_of(self.dtype), shape

    def as_scales(self, value: Tensor) -> Array:
        """Scales in the dtype of the model; a QcError where it does not hold them."""
        held = value.to(self.dtype)
        lost = ((held == 0) & (value != 0)) | held.isinf()
        if bool(lost.any()):
            worst, name = value[lost][0].item(), str(self.dtype).removeprefix("torch.")
            what = f"{self.name} has a scale of {worst:g}, which {name} does not hold"
            raise QcError(what, site=self.name, fix="export with dtype fp32")
        return plain(held, self.name)

    def scaled(self, codes: str, scale: str, columns: int) -> str:
        """Codes times a scale a row (``columns`` 0) or one of so many columns."""
        axis, blocks = 0 if self.turned == bool(columns) else 1, {"block_size": columns} if columns else {}
        return self.low.op("DequantizeLinear", codes, scale, axis=axis, **blocks)

    def looked_up(self, codes: str, levels: str) -> str:
        """The level of each code, fp32. Codes below 32 bits are no indices in ONNX."""
        return self.low.op("Gather", levels, self.low.op("Cast", codes, to="INT32"))

    def by_block(self, q: str, scale: str, count: int) -> str:
        """Rows times ``count`` scales each, every one of as many columns; all in fp32, then rounded."""
        if count in (1, self.columns):
            return self.low.op("Mul", q, scale)
        width = self.columns // count
        shape, one = ((count, width, self.rows), 1) if self.turned else ((self.rows, count, width), 2)
        wide = self.low.op("Mul", self.low.reshape(q, shape), self.low.op("Unsqueeze", scale, self.low.numbers(one)))
        return self.low.reshape(wide, self.shape(self.columns))

    def rounded(self, value: str) -> str:
        """From fp32 to what the graph computes in."""
        return self.low.cast(value, torch.float32, self.dtype)

    # -- formats ----------------------------------------------------------------------------------------------------

    def _int8_scale(self) -> Array:
        return self.as_scales(self.sides()["scale"] * torch.tensor(1 / 127, dtype=torch.float32))

    def _of_kind(self, kind: str) -> str:
        """Codes and scales of ``graph.formats.scaled``."""
        count = int(self.given["scale"].meta["val"].shape[1])
        if ELEMENTS[kind].bits == 4 and not kind.startswith("int"):
            low_first = decode_e2m1(torch.arange(8, dtype=torch.uint8)[:, None] * 34 + 16).reshape(-1)
            levels = self.low.program.constant(low_first.numpy())
            codes = self.codes("UINT4", lambda: unpack_bits(self.sides()["indices"], 4, self.columns))
            q = self.looked_up(codes, levels)
            return self.rounded(self.by_block(q, self.scales(count, self._read_scales), count))
        if kind in ("fp8", "mxfp8"):
            codes = self.codes("FLOAT8E4M3FN", lambda: self.sides()["indices"])
        else:
            bits = ELEMENTS[kind].bits
            codes = self.codes(f"INT{self._width(bits)}", lambda: self._signed(bits))
        return self.dequantized(codes, count, self._read_scales)

    def _ternary(self) -> str:
        """Trits times scales: rounding the scale to the dtype of the model rounds the product."""
        count, packing = int(self.given["scale"].meta["val"].shape[1]), self.given["packing"]
        codes = self.codes(
            f"INT{self._width(2)}", lambda: unpack_trits(self.sides()["indices"], packing, self.columns) - 1
        )
        return self.dequantized(codes, count, lambda: self.sides()["scale"].float().expand(self.rows, -1).contiguous())

    def _width(self, bits: int) -> int:
        """The bits of the narrowest integers that hold so many, and that ONNX Runtime multiplies rightly.

        It miscomputes with 2 bits where the outputs are no multiple of 4 (1.31, DequantizeLinear before MatMul).
        """
        least = 2 if self.rows % 4 == 0 else 4
        return next(width for width in (2, 4, 8) if width >= max(bits, least))

    def dequantized(self, codes: str, count: int, load: Callable[[], Tensor]) -> str:
        """Codes times ``count`` scales a row; ``load`` gives those, f32 [out, count]."""
        if count == 1:
            scale = self.held("scale", *self.scale_type((self.rows,)), lambda: self.as_scales(load()[:, 0]))
            return self.scaled(codes, scale, columns=0)
        scale = self.held("scale", *self.scale_type(self.shape(count)), lambda: self.as_scales(self.lying(load())))
        return self.scaled(codes, scale, columns=self.columns // count)

    def _read_scales(self) -> Tensor:
        """What codes are multiplied by, f32 [out, count]."""
        sides = self.sides()
        scale = read_scales(sides["scale"], sides.get("global_scale"))
        return scale.repeat_interleave(self.rows // scale.shape[0], dim=0).contiguous()

    def _signed(self, bits: int) -> Tensor:
        """Integers of so many bits, as bytes in two's complement."""
        codes = unpack_bits(self.sides()["indices"], bits, self.columns)
        return codes - (1 << bits - 1)  # bytes go around

    def _four_bit(self) -> str:
        """Levels of bitsandbytes, times a scale a block."""
        count, kind = int(self.given["absmax"].meta["val"].shape[1]), self.given["kind"]
        every = torch.arange(8, dtype=torch.uint8)[:, None] * 34 + 1  # 0x01, 0x23 …: all 16 codes in order
        levels = dequantize_4bit(every.view(1, 8).repeat(1, 4), torch.ones(1, 1), kind, torch.float32)[0, :16]

        def codes() -> Tensor:
            held = self.sides()["indices"]
            return torch.stack((held >> 4, held & 15), dim=-1).flatten(1)

        def scales() -> Tensor:
            sides = self.sides()
            return block_scales(sides["absmax"], sides.get("absmax_scale"), sides.get("absmax_offset"))

        q = self.looked_up(self.codes("UINT4", codes), self.low.program.constant(levels.contiguous().numpy()))
        return self.rounded(self.by_block(q, self.scales(count, scales), count))

    def _lut(self) -> str:
        """Levels of the weight's own, times scales."""
        lut = self.given["lut"].meta["val"]
        half, codes = bool(self.given.get("fp16")), self._indices(bits_for(lut.shape[-1]))
        levels = self.held("lut", "FLOAT", (lut.numel(),), lambda: self._table(half).reshape(-1))
        q = self.looked_up(codes, levels) if lut.dim() == 1 else self._of_tables(codes, levels, *lut.shape)
        return self.rounded(self._with_scales(q, half))

    def _table(self, half: bool) -> Array:
        lut = self.sides()["lut"].float()
        return plain(to_fp16(lut) if half else lut, self.name)

    def _indices(self, bits: int, rows: int | None = None) -> str:
        wide = next(width for width in (2, 4, 8) if width >= bits)
        return self.codes(f"UINT{wide}", lambda: unpack_bits(self.sides()["indices"], bits, self.columns), rows)

    def _of_tables(self, codes: str, levels: str, tables: int, count: int) -> str:
        """The level of each code, where rows have tables of their own."""
        starts = (torch.arange(self.rows, dtype=torch.int32) // (self.rows // tables) * count)[:, None]
        start = self.held("starts", "INT32", self.shape(1), lambda: self.lying(starts).numpy())
        return self.low.op("Gather", levels, self.low.op("Add", self.low.op("Cast", codes, to="INT32"), start))

    def _vectors(self) -> str:
        """Vectors of the weight's own, each for several outputs, times scales."""
        levels, width = map(int, self.given["lut"].meta["val"].shape)
        half, codes = bool(self.given.get("fp16")), self._indices(bits_for(levels), self.rows // width)
        table = self.held("lut", "FLOAT", (levels, width), lambda: self._table(half))
        q = self.looked_up(codes, table)
        q = q if self.turned else self.low.transpose(q, (0, 2, 1))  # else [groups, in, width]
        return self.rounded(self._with_scales(self.low.reshape(q, self.shape(self.columns)), half))

    def _with_scales(self, q: str, half: bool) -> str:
        """Times nothing, scales by block, or a product of low rank with perhaps a floor."""
        given = self.given
        if "scale" in given:
            count = int(given["scale"].meta["val"].shape[1])
            return self.by_block(q, self.scales(count, lambda: self._factors(half)[0]), count)
        if "scale_a" not in given:
            return q
        rank = int(given["scale_a"].meta["val"].shape[1])
        a = self.held(
            "scale_a", "FLOAT", self.shape(rank), lambda: plain(self.lying(self._factors(half)[0]), self.name)
        )
        shape = (self.columns, rank) if self.turned else (rank, self.columns)
        b = self.held("scale_b", "FLOAT", shape, lambda: plain(self.lying(self._factors(half)[1]), self.name))
        scale = self.low.op("MatMul", b, a) if self.turned else self.low.op("MatMul", a, b)
        if given.get("floor") is not None:
            scale = self.low.op("Max", scale, self.low.number(given["floor"], torch.float32))
        return self.low.op("Mul", q, scale)

    def _factors(self, half: bool) -> tuple[Tensor, ...]:
        sides = self.sides()
        named = {key: sides.get(key) for key in ("scale", "scale_a", "scale_b", "scale_g")}
        return scale_factors(**named, floor=self.given.get("floor"), fp16=half)
