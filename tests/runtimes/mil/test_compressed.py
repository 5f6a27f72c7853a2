"""Compressed constants: what is decoded from the file is what coremltools says they mean."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtimes.mil import Interpreter
from runtimes.mil.blob import unpack
from runtimes.mil.types import DTYPES
from tests.runtimes.mil.building import ct, mb, one, types

RNG = np.random.default_rng(2)
NARROW = {n: getattr(types, f"np_uint{n}_dtype") for n in (1, 2, 3, 4, 6)} | {8: np.uint8}
PASSES = ct.converters.mil.mil.ops.defs.iOS18.compression


def lut(shape: tuple[int, ...], bits: int, groups: tuple[int, ...], width: int = 1) -> tuple[Any, Any]:
    indices = RNG.integers(0, 2**bits, shape).astype(NARROW[bits])
    return indices, RNG.standard_normal((*groups, 2**bits, width)).astype(np.float16)


LUTS = [
    *[((24, 40, 1, 1), bits, (1, 1, 1, 1), 1, None) for bits in NARROW],
    ((24, 40, 1, 1), 4, (3, 1, 1, 1), 1, None),
    ((24, 40, 1, 1), 2, (24, 1, 1, 1), 1, None),
    ((24, 40, 1, 1), 3, (2, 5, 1, 1), 1, None),
    ((12, 40, 1, 1), 4, (1, 1, 1, 1), 2, 0),
    ((24, 10, 1, 1), 4, (1, 1, 1, 1), 4, 1),
    ((12, 40), 6, (3, 1), 2, 0),
]


@pytest.mark.parametrize(("shape", "bits", "groups", "width", "axis"), LUTS)
def test_a_lookup_table_gives_what_coremltools_gives(
    tmp_path: Path, shape: Any, bits: int, groups: Any, width: int, axis: Any
) -> None:
    indices, table = lut(shape, bits, groups, width)
    wanted = PASSES.constexpr_lut_to_dense.decompress(indices, table, None if axis is None else np.int32(axis))
    extra = {} if axis is None else {"vector_axis": axis}

    def body(x: Any) -> Any:
        dense = mb.constexpr_lut_to_dense(indices=indices, lut=table, **extra)
        return mb.add(x=mb.cast(x=x, dtype="fp16"), y=dense)

    inputs = {"x": mb.TensorSpec((1,) * len(shape), types.fp32)}
    found = Interpreter(one(tmp_path / "l.mlpackage", inputs, body)).run({"x": torch.zeros([1] * len(shape))})
    np.testing.assert_array_equal(next(iter(found.values())).numpy(), wanted.astype(np.float32))


def test_every_other_constexpr_gives_what_coremltools_gives(tmp_path: Path) -> None:
    eight = RNG.integers(-128, 128, (16, 32)).astype(np.int8)
    four = RNG.integers(-8, 8, (16, 32)).astype(types.np_int4_dtype)
    plus = RNG.integers(0, 16, (16, 32)).astype(types.np_uint4_dtype)
    floats = RNG.standard_normal((16, 32)).astype(np.float16)
    row, block = (RNG.random(s).astype(np.float16) + 0.5 for s in ((16, 1), (16, 4)))
    zero = RNG.integers(0, 16, (16, 4)).astype(types.np_uint4_dtype)
    mask = (RNG.random((16, 32)) < 0.4).astype(types.np_uint1_dtype)
    kept = floats[mask != 0]
    numbers = RNG.integers(0, 4, len(kept)).astype(types.np_uint2_dtype)
    small = RNG.integers(-128, 128, len(kept)).astype(np.int8)
    table = RNG.standard_normal((1, 1, 4, 1)).astype(np.float16)

    def body(x: Any) -> list[Any]:
        by_table = mb.constexpr_lut_to_sparse(indices_mask=mask, indices_nonzero_data=numbers, lut=table)
        by_scale = mb.constexpr_sparse_blockwise_shift_scale(data_mask=mask, nonzero_data=small, scale=row)
        return [
            mb.mul(x=x, y=weight)
            for weight in (
                mb.constexpr_blockwise_shift_scale(data=eight, scale=row),
                mb.constexpr_blockwise_shift_scale(data=four, scale=block),
                mb.constexpr_blockwise_shift_scale(data=plus, scale=block, offset=zero),
                mb.constexpr_blockwise_shift_scale(data=floats, scale=block),
                mb.constexpr_sparse_to_dense(nonzero_data=kept, mask=mask),
                mb.constexpr_sparse_to_dense(nonzero_data=by_table[1], mask=by_table[0]),
                mb.constexpr_sparse_to_dense(nonzero_data=by_scale[1], mask=by_scale[0]),
            )
        ]

    folder = one(tmp_path / "c.mlpackage", {"x": mb.TensorSpec((1, 32), types.fp16)}, body)
    ours = [v.numpy() for v in Interpreter(folder).run({"x": torch.ones(1, 32)}).values()]
    shift, sparse = PASSES.constexpr_blockwise_shift_scale, PASSES.constexpr_sparse_to_dense
    by_table = PASSES.constexpr_lut_to_sparse.decompress(mask, numbers, table, None)
    by_scale = PASSES.constexpr_sparse_blockwise_shift_scale.decompress(mask, small, row, None)
    wanted = [
        shift.decompress(eight, row, None),
        shift.decompress(four, block, None),
        shift.decompress(plus, block, zero.astype(np.float16)),
        shift.decompress(floats, block, None),
        sparse.decompress(kept, mask),
        sparse.decompress(by_table[1], mask),
        sparse.decompress(by_scale[1], mask),
    ]
    for found, expected in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(found, expected.astype(np.float32), rtol=1e-3)  # theirs rounds to fp16 on the way


def test_the_packed_forms_of_older_opsets_are_read(tmp_path: Path) -> None:
    numbers = RNG.integers(0, 4, (8, 6))
    table = np.array([-1, 0.5, 1, 2], np.float16)
    bits = ((numbers.reshape(-1, 1) >> np.arange(2)) & 1).reshape(-1)
    packed = np.packbits(bits.astype(np.uint8), bitorder="little")
    eight = RNG.integers(-128, 128, (8, 6)).astype(np.int8)
    scale = RNG.random(8).astype(np.float16) + np.float16(0.5)
    mask = RNG.random((8, 6)) < 0.5
    kept = np.arange(1, int(mask.sum()) + 1).astype(np.float16)

    def body(x: Any) -> list[Any]:
        return [
            mb.mul(x=x, y=mb.constexpr_lut_to_dense(indices=packed, lut=table, shape=np.array([8, 6], np.uint32))),
            mb.mul(
                x=x, y=mb.constexpr_affine_dequantize(quantized_data=eight, zero_point=np.int8(3), scale=scale, axis=0)
            ),
            mb.mul(
                x=x,
                y=mb.constexpr_sparse_to_dense(
                    nonzero_data=kept,
                    mask=np.packbits(mask.reshape(-1), bitorder="little"),
                    shape=np.array([8, 6], np.uint32),
                ),
            ),
        ]

    target = ct.target.iOS16
    folder = one(tmp_path / "o.mlpackage", {"x": mb.TensorSpec((1, 6), types.fp16)}, body, target=target)
    ours = list(Interpreter(folder).run({"x": torch.ones(1, 6)}).values())
    np.testing.assert_array_equal(ours[0], table[numbers].astype(np.float32))
    wanted = (eight.astype(np.float32) - 3) * scale.astype(np.float32)[:, None]
    np.testing.assert_allclose(ours[1], wanted, rtol=1e-6)
    dense = np.zeros((8, 6), np.float32)
    dense[mask] = kept
    np.testing.assert_array_equal(ours[2], dense)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_packed_elements_come_back_at_any_count(bits: int) -> None:
    for count in (1, 5, 8, 13, 64, 67):
        values = RNG.integers(0, 2**bits, count)
        stream = ((values[:, None] >> np.arange(bits)) & 1).reshape(-1).astype(np.uint8)
        packed = np.packbits(stream, bitorder="little")
        assert unpack(packed, DTYPES[f"uint{bits}"], count).tolist() == values.tolist()


def test_a_weight_is_decoded_once_for_all_functions(tmp_path: Path) -> None:
    indices, table = lut((32, 16, 1, 1), 2, (1, 1, 1, 1))

    def body(x: Any) -> Any:
        return mb.conv(x=x, weight=mb.constexpr_lut_to_dense(indices=indices, lut=table))

    functions = ct.utils.MultiFunctionDescriptor()
    for name, tokens in (("infer", 1), ("prefill", 4)):
        folder = one(tmp_path / f"{name}.mlpackage", {"x": mb.TensorSpec((1, 16, 1, tokens), types.fp16)}, body)
        functions.add_function(str(folder), src_function_name="main", target_function_name=name)
    functions.default_function_name = "infer"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ct.utils.save_multifunction(functions, str(tmp_path / "both.mlpackage"))
    read = Interpreter(tmp_path / "both.mlpackage")
    infer, prefill = (read.plan(name).steps[0].constants["weight"] for name in ("infer", "prefill"))
    assert infer.shape == (32, 16, 1, 1)
    assert infer is prefill
