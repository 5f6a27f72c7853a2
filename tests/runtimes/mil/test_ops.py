"""The operations that coremltools does not infer, against torch: convolutions, pools, scatters, norms, states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil.mil import Operation
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
from torch import Tensor

from runtimes.mil import Interpreter
from runtimes.mil.ops import KERNELS
from tests.runtimes.mil.building import FP16, ct, function, mb, one, save, spec, state
from tests.runtimes.mil.test_values import CASES

RNG = np.random.default_rng(1)
IMAGE = RNG.standard_normal((2, 4, 9, 8)).astype(np.float32)
X = torch.from_numpy(IMAGE)
PADDINGS = ("valid", "same", "same_lower", "custom")
CONVS = [
    (kernel, strides, dilations, groups, pad_type)
    for kernel, strides, dilations, groups in (
        ((1, 1), (1, 1), (1, 1), 1), ((3, 3), (1, 1), (1, 1), 1), ((3, 2), (2, 1), (1, 2), 1),
        ((2, 4), (3, 2), (1, 1), 2), ((1, 3), (1, 1), (1, 1), 4), ((1, 1), (2, 2), (1, 1), 1),
    )
    for pad_type in PADDINGS
]  # fmt: skip
CUSTOM = [1, 0, 2, 1]


def _padded(x: Tensor, pad_type: str, kernel: Any, strides: Any, dilations: Any = (1, 1)) -> Tensor:
    """TensorFlow's own rule for ``same``, written down here once more."""
    if pad_type == "valid":
        return x
    if pad_type == "custom":
        return F.pad(x, [CUSTOM[2], CUSTOM[3], CUSTOM[0], CUSTOM[1]])
    flat = []
    for axis in (1, 0):
        length, reach = x.shape[2 + axis], (kernel[axis] - 1) * dilations[axis] + 1
        results = -(-length // strides[axis])
        total = max((results - 1) * strides[axis] + reach - length, 0)
        flat += [total // 2, total - total // 2] if pad_type == "same" else [total - total // 2, total // 2]
    return F.pad(x, flat)


def test_a_convolution_pads_strides_dilates_and_groups_as_torch_does(tmp_path: Path) -> None:
    weights = [RNG.standard_normal((8, 4 // g, *k)).astype(np.float32) for k, _, _, g, _ in CONVS]
    bias = RNG.standard_normal(8).astype(np.float32)

    def body(x: Any) -> list[Any]:
        return [
            mb.conv(x=x, weight=w, bias=bias, strides=s, dilations=d, groups=g, pad_type=p, pad=CUSTOM)
            if p == "custom"
            else mb.conv(x=x, weight=w, bias=bias, strides=s, dilations=d, groups=g, pad_type=p)
            for w, (_, s, d, g, p) in zip(weights, CONVS, strict=True)
        ]

    found = Interpreter(one(tmp_path / "conv.mlpackage", {"x": spec(IMAGE)}, body)).run({"x": X})
    for w, (k, s, d, g, p), ours in zip(weights, CONVS, found.values(), strict=True):
        theirs = F.conv2d(_padded(X, p, k, s, d), torch.from_numpy(w), torch.from_numpy(bias), s, 0, d, g)
        torch.testing.assert_close(ours, theirs, msg=f"{k} {s} {d} {g} {p}")


def test_convolutions_of_one_and_three_axes_and_transposed_ones_agree(tmp_path: Path) -> None:
    shapes = (1, 3, 7), (1, 2, 4, 5, 6), (5, 3, 3), (3, 2, 2, 2, 2), (4, 2, 3, 3)
    line, cube, w1, w3, wt = (RNG.standard_normal(shape).astype(np.float32) for shape in shapes)

    def body(line: Any, cube: Any, x: Any) -> list[Any]:
        return [
            mb.conv(x=line, weight=w1, pad_type="same"),
            mb.conv(x=cube, weight=w3),
            mb.conv_transpose(x=x, weight=wt, strides=[2, 1], groups=2, pad_type="valid"),
            mb.conv_transpose(x=x, weight=wt, strides=[2, 2], pad_type="custom", pad=[1, 1, 0, 1]),
        ]

    folder = one(tmp_path / "c.mlpackage", {"line": spec(line), "cube": spec(cube), "x": spec(IMAGE)}, body)
    given = {"line": torch.from_numpy(line), "cube": torch.from_numpy(cube), "x": X}
    ours = list(Interpreter(folder).run(given).values())
    torch.testing.assert_close(ours[0], F.conv1d(given["line"], torch.from_numpy(w1), padding=1))
    torch.testing.assert_close(ours[1], F.conv3d(given["cube"], torch.from_numpy(w3)))
    torch.testing.assert_close(ours[2], F.conv_transpose2d(X, torch.from_numpy(wt), stride=(2, 1), groups=2))
    full = F.conv_transpose2d(X, torch.from_numpy(wt), stride=(2, 2))
    torch.testing.assert_close(ours[3], full[:, :, 1:-1, :-1])


def test_pools_agree_with_torch(tmp_path: Path) -> None:
    def body(x: Any) -> list[Any]:
        size = {"x": x, "kernel_sizes": [3, 2], "strides": [2, 2]}
        padded = {"pad_type": "custom", "pad": [1, 1, 1, 1]}
        return [
            mb.max_pool(**size, pad_type="valid"),
            mb.max_pool(**size, **padded),
            mb.avg_pool(**size, **padded, exclude_padding_from_average=True),
            mb.avg_pool(**size, **padded, exclude_padding_from_average=False),
            mb.max_pool(**size, pad_type="valid", ceil_mode=True),
            mb.avg_pool(**size, pad_type="valid", ceil_mode=True),
        ]

    ours = list(Interpreter(one(tmp_path / "p.mlpackage", {"x": spec(IMAGE)}, body)).run({"x": X}).values())
    size = ((3, 2), (2, 2))
    torch.testing.assert_close(ours[0], F.max_pool2d(X, *size))
    torch.testing.assert_close(ours[1], F.max_pool2d(X, *size, 1))
    torch.testing.assert_close(ours[2], F.avg_pool2d(X, *size, 1, count_include_pad=False))
    torch.testing.assert_close(ours[3], F.avg_pool2d(X, *size, 1))
    torch.testing.assert_close(ours[4], F.max_pool2d(X, *size, ceil_mode=True))
    torch.testing.assert_close(ours[5], F.avg_pool2d(X, *size, ceil_mode=True))


def test_norms_and_silu_agree_with_torch(tmp_path: Path) -> None:
    vectors = [RNG.random(4).astype(np.float32) + 0.5 for _ in range(4)]
    mean, variance, gain, shift = (torch.from_numpy(v) for v in vectors)

    def body(x: Any) -> list[Any]:
        rest = {"gamma": vectors[2], "beta": vectors[3], "epsilon": np.float32(0.01)}
        return [
            mb.batch_norm(x=x, mean=vectors[0], variance=vectors[1], **rest),
            mb.instance_norm(x=x, **rest),
            mb.silu(x=x),
        ]

    ours = list(Interpreter(one(tmp_path / "n.mlpackage", {"x": spec(IMAGE)}, body)).run({"x": X}).values())
    torch.testing.assert_close(ours[0], F.batch_norm(X, mean, variance, gain, shift, eps=0.01))
    torch.testing.assert_close(ours[1], F.instance_norm(X, weight=gain, bias=shift, eps=0.01))
    torch.testing.assert_close(ours[2], F.silu(X))


def test_scatters_agree_with_a_loop(tmp_path: Path) -> None:
    data = RNG.random((4, 3)).astype(np.float32) + 1
    updates = RNG.random((3, 3)).astype(np.float32) + 1
    rows = np.array([2, 0, 2], np.int32)
    cells = np.array([[0, 1], [3, 2], [0, 1]], np.int32)
    steps = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum}

    def body(d: Any, u: Any) -> list[Any]:
        made = [mb.scatter(data=d, indices=rows, updates=u, axis=0, mode=m) for m in steps]
        made += [mb.scatter_nd(data=d, indices=cells, updates=updates[:, 0], mode=m) for m in steps]
        return [*made, mb.scatter_along_axis(data=d, indices=np.stack([rows] * 3, 1), updates=u, axis=0, mode="add")]

    folder = one(tmp_path / "s.mlpackage", {"d": spec(data), "u": spec(updates)}, body)
    ours = list(Interpreter(folder).run({"d": torch.from_numpy(data), "u": torch.from_numpy(updates)}).values())
    for number, combine in enumerate(steps.values()):
        by_row, by_cell = data.copy(), data.copy()
        for i, row in enumerate(rows):
            by_row[row] = combine(by_row[row], updates[i])
            by_cell[tuple(cells[i])] = combine(by_cell[tuple(cells[i])], updates[i, 0])
        np.testing.assert_allclose(ours[number], by_row, rtol=1e-6)
        np.testing.assert_allclose(ours[number + len(steps)], by_cell, rtol=1e-6)
    np.testing.assert_allclose(ours[-1], ours[0])


def test_what_coremltools_infers_wrongly_agrees_with_torch(tmp_path: Path) -> None:
    other = IMAGE + 1

    def body(x: Any, y: Any) -> list[Any]:
        return [
            mb.cumsum(x=x, axis=2, exclusive=True),
            mb.concat(values=[x, y], axis=1, interleave=True),
            mb.gather_nd(x=x, indices=np.array([[0, 3], [1, 2]], np.int32)),
            mb.one_hot(indices=np.array([2, 0], np.int32), one_hot_vector_size=3, on_value=2.0, off_value=-1.0),
        ]

    folder = one(tmp_path / "w.mlpackage", {"x": spec(IMAGE), "y": spec(other)}, body)
    ours = list(Interpreter(folder).run({"x": X, "y": X + 1}).values())
    torch.testing.assert_close(ours[0], X.cumsum(2) - X)
    torch.testing.assert_close(ours[1], torch.stack([X, X + 1], 2).reshape(2, 8, 9, 8))
    torch.testing.assert_close(ours[2], torch.stack([X[0, 3], X[1, 2]]))
    torch.testing.assert_close(ours[3], torch.tensor([[-1.0, -1, 2], [2, -1, -1]]))


def test_blocks_and_pixels_move_as_in_torch(tmp_path: Path) -> None:
    image = IMAGE[:, :, :8]

    def body(x: Any) -> list[Any]:
        return [
            mb.pixel_shuffle(x=x, upscale_factor=2),
            mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
            mb.space_to_depth(x=x, block_size=2),
            mb.depth_to_space(x=mb.space_to_depth(x=x, block_size=2), block_size=2),
            mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
        ]

    folder = one(tmp_path / "b.mlpackage", {"x": spec(image)}, body)
    x = torch.from_numpy(image)
    ours = list(Interpreter(folder).run({"x": x}).values())
    torch.testing.assert_close(ours[0], F.pixel_shuffle(x, 2))
    torch.testing.assert_close(ours[1], F.pixel_unshuffle(x, 2))
    torch.testing.assert_close(ours[2][:, :4], x[:, :, ::2, ::2])  # the first cells of all blocks come first
    torch.testing.assert_close(ours[2][:, 4:8], x[:, :, ::2, 1::2])
    torch.testing.assert_close(ours[3], x)
    torch.testing.assert_close(ours[4], F.interpolate(x, scale_factor=(2, 3)))


def _two_reads(x: Any, s: Any) -> Any:
    first = mb.read_state(input=s)
    mb.coreml_update_state(state=s, value=mb.add(x=first, y=x))
    return mb.add(x=first, y=mb.read_state(input=s))


def test_a_read_behind_a_write_sees_what_was_written(tmp_path: Path) -> None:
    inputs = {"x": mb.TensorSpec((1, 4), FP16), "s": state(1, 4)}
    read = Interpreter(one(tmp_path / "e.mlpackage", inputs, _two_reads))
    cells = read.state()
    assert [float(v) for v in next(iter(read.run({"x": torch.ones(1, 4)}, cells).values()))[0]] == [1.0] * 4
    assert [float(v) for v in next(iter(read.run({"x": torch.ones(1, 4)}, cells).values()))[0]] == [3.0] * 4


def test_the_default_pipeline_of_coremltools_loses_that_read(tmp_path: Path) -> None:
    """The reason for rule T1. When this fails, coremltools has repaired it."""
    inputs = {"x": mb.TensorSpec((1, 4), FP16), "s": state(1, 4)}
    folder = one(tmp_path / "d.mlpackage", inputs, _two_reads, pipeline=ct.PassPipeline.DEFAULT)
    read = Interpreter(folder)
    assert [float(v) for v in next(iter(read.run({"x": torch.ones(1, 4)}, read.state()).values()))[0]] == [0.0] * 4


def test_functions_of_a_package_share_a_state(tmp_path: Path) -> None:
    def store(position: Any, s: Any, rows: int) -> Any:
        begin = mb.concat(values=[position, np.array([0], np.int32)], axis=0)
        end = mb.concat(values=[mb.add(x=position, y=np.array([rows], np.int32)), np.array([2], np.int32)], axis=0)
        part = np.full((rows, 2), rows, np.float16)
        new = mb.slice_update(x=mb.read_state(input=s), update=part, begin=begin, end=end)
        return mb.identity(x=mb.coreml_update_state(state=s, value=new), name="kept")

    inputs = {"position": mb.TensorSpec((1,), ct.converters.mil.mil.types.int32), "s": state(5, 2)}
    functions = {
        "infer": function(inputs, lambda position, s: store(position, s, 1)),
        "prefill": function(inputs, lambda position, s: store(position, s, 3)),
    }
    read = Interpreter(save(tmp_path / "m.mlpackage", functions))
    cells = read.state("prefill")
    read.run({"position": torch.tensor([0])}, cells, function="prefill")
    found = read.run({"position": torch.tensor([3])}, cells, function="infer")["kept"]
    assert found[:, 0].tolist() == [3, 3, 3, 1, 0]
    with pytest.raises(Exception, match="cannot be computed: the part is"):
        read.run({"position": torch.tensor([4])}, cells, function="prefill")


def test_casts_levels_and_shapes_that_are_taken_from_others_agree(tmp_path: Path) -> None:
    levels = RNG.integers(-128, 128, (4, 6)).astype(np.int8)
    scale, zero = np.array([0.5, 0.25, 1, 2], np.float32), np.array([3, -1, 0, 7], np.int8)
    stored = RNG.standard_normal((3, 2)).astype(np.float16)

    def body(x: Any) -> list[Any]:
        flat = mb.reshape(x=x, shape=[-1])
        likes = [np.zeros((2, 4, 1), np.float32), np.zeros((1, 9, 8), np.float32)]
        return [
            mb.dequantize(input=levels, scale=scale, zero_point=zero, axis=0),
            mb.dequantize(input=levels, scale=np.float32(0.1)),
            mb.constexpr_cast(source_val=stored, output_dtype="fp32"),
            mb.reshape_like(x=flat, ref_tensors=likes, begins=[0, 1], ends=[2, 0], end_masks=[False, True]),
        ]

    read = Interpreter(one(tmp_path / "t.mlpackage", {"x": spec(IMAGE)}, body))
    ours = list(read.run({"x": X}).values())
    np.testing.assert_allclose(ours[0], (levels.astype(np.float32) - zero[:, None]) * scale[:, None])
    np.testing.assert_allclose(ours[1], levels * np.float32(0.1), rtol=1e-6)
    np.testing.assert_array_equal(ours[2], stored.astype(np.float32))
    torch.testing.assert_close(ours[3], X)


# -- nothing is left out --------------------------------------------------------------------------------------------

OWN = {"write_state", "coreml_update_state"}
"""The first exists in saved programs alone, the other in built ones."""

INFERRED_WRONGLY = {"cumsum", "concat", "scatter_along_axis"}
"""With some of their options; ``test_what_coremltools_infers_wrongly_agrees_with_torch`` and the scatters have those."""


def test_every_op_of_the_table_is_known_to_coremltools() -> None:
    assert set(KERNELS) - OWN <= set(SSAOpRegistry.core_ops)
    assert len(KERNELS) > 130


def test_every_op_that_coremltools_infers_is_held_against_what_it_infers() -> None:
    inferred = {name for name in set(KERNELS) - OWN if _infers(name)}
    assert len(inferred) > 100
    assert inferred - {name for name, _, _ in CASES} == set()
    assert inferred >= INFERRED_WRONGLY


def test_every_other_op_is_computed_by_a_test_of_its_own() -> None:
    text = "".join((Path(__file__).with_name(f"{name}.py")).read_text() for name in ("test_ops", "test_compressed"))
    others = [name for name in sorted(set(KERNELS) - {"write_state"}) if name in OWN or not _infers(name)]
    assert [name for name in others if f"mb.{name}(" not in text] == []


def _infers(name: str) -> bool:
    """Whether any version of an op computes its value from constant arguments."""
    versions = SSAOpRegistry.core_ops[name].values()
    return any(version.value_inference is not Operation.value_inference for version in versions)
