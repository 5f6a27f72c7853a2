"""What each mode rounds, and every quirk of the Neural Engine that ``ane`` puts in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtimes.mil import MODES, Interpreter, Trace
from tests.runtimes.mil.building import FP16, FP32, mb, one


def in_modes(folder: Path, **inputs: Tensor) -> dict[str, Tensor]:
    """The only output of a package in each mode."""
    return {mode: next(iter(Interpreter(folder, mode).run(inputs).values())) for mode in MODES}


def half(*shape: int) -> Any:
    return mb.TensorSpec(shape, FP16)


def test_fp32_rounds_nothing_and_fp16_rounds_to_the_declared_type(tmp_path: Path) -> None:
    folder = one(
        tmp_path / "a.mlpackage", {"x": half(1)}, lambda x: mb.mul(x=mb.add(x=x, y=np.float16(1)), y=np.float16(3))
    )
    x = torch.tensor([2.0**-9 * 1.3])
    found = in_modes(folder, x=x)
    assert found["fp32"] == (x + 1) * 3
    rounded = (((x.half().float() + 1).half().float()) * 3).half().float()
    assert found["fp16"] == rounded == found["ane"]
    assert found["fp16"] != found["fp32"]
    folder = one(tmp_path / "b.mlpackage", {"x": mb.TensorSpec((1,), FP32)}, lambda x: mb.add(x=x, y=np.float32(1)))
    assert in_modes(folder, x=x)["fp16"] == x + 1


def test_n2_a_product_that_reaches_two_to_the_fifteen_is_infinite(tmp_path: Path) -> None:
    weight = np.full((1, 4, 1, 1), 100, np.float16)
    folder = one(tmp_path / "c.mlpackage", {"x": half(1, 4, 1, 2)}, lambda x: mb.conv(x=x, weight=weight))
    x = torch.tensor([[80.0, 82], [80, 82], [80, 82], [80, 82]]).reshape(1, 4, 1, 2)
    found = in_modes(folder, x=x)
    assert found["fp16"].flatten().tolist() == [32000, 32800]
    assert found["ane"].flatten().tolist() == [32000, torch.inf]
    folder = one(tmp_path / "m.mlpackage", {"x": half(1, 4), "y": half(4, 1)}, lambda x, y: mb.matmul(x=x, y=y))
    found = in_modes(folder, x=torch.full((1, 4), -100.0), y=torch.full((4, 1), 82.0))
    assert (found["fp16"].item(), found["ane"].item()) == (-32800, -torch.inf)


def test_n2_holds_for_partial_sums_too(tmp_path: Path) -> None:
    """The result is 0, but half of its terms alone are out of range."""
    weight = np.concatenate([np.full((1, 128), 10), np.full((1, 128), -10)], 1).astype(np.float16)
    folder = one(tmp_path / "l.mlpackage", {"x": half(1, 256)}, lambda x: mb.linear(x=x, weight=weight))
    assert {m: v.item() for m, v in in_modes(folder, x=torch.full((1, 256), 25.0)).items()} == dict.fromkeys(MODES, 0)
    found = in_modes(folder, x=torch.full((1, 256), 26.0))
    assert (found["fp16"].item(), found["ane"].item()) == (0, torch.inf)


def test_n4_silu_is_off_near_zero(tmp_path: Path) -> None:
    folder = one(tmp_path / "s.mlpackage", {"x": half(3)}, lambda x: mb.silu(x=x))
    found = in_modes(folder, x=torch.tensor([0.0, 2, -5]))
    assert found["fp16"][0] == 0
    torch.testing.assert_close(found["ane"][0], torch.tensor(-0.00126), atol=1e-6, rtol=0)
    assert found["ane"][1:].tolist() == found["fp16"][1:].tolist()


def test_n5_subnormal_numbers_are_lost_as_results_and_as_constants(tmp_path: Path) -> None:
    weight = np.array([[[[3e-5]]], [[[1]]]], np.float16)
    folder = one(tmp_path / "n.mlpackage", {"x": half(1, 1, 1, 2)}, lambda x: mb.conv(x=x, weight=weight))
    found = in_modes(folder, x=torch.tensor([16.0, 5e-5]).reshape(1, 1, 1, 2))
    assert bool((found["fp16"] != 0).sum() == 3)
    assert found["ane"].flatten().tolist() == [0, 0, 16, 0]
    tiny = np.float16(1e-6)
    folder = one(tmp_path / "e.mlpackage", {"x": half(1)}, lambda x: mb.rsqrt(x=mb.mul(x=x, y=x), epsilon=tiny))
    found = in_modes(folder, x=torch.tensor([0.0]))
    assert found["fp16"].isfinite().all() and found["ane"].isinf().all()


def test_n6_a_slice_that_begins_inside_the_last_axis_loses_large_values(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        parts = [
            mb.slice_by_index(x=x, begin=[0, 2], end=[1, 4]),
            mb.slice_by_index(x=x, begin=[0, 0], end=[1, 2]),
            mb.slice_by_size(x=x, begin=[0, 2], size=[1, 2]),
            *mb.split(x=x, num_splits=2, axis=1),
        ]
        return mb.concat(values=parts, axis=0)

    folder = one(tmp_path / "i.mlpackage", {"x": half(1, 4)}, body)
    found = in_modes(folder, x=torch.tensor([[5000.0, 1, 5000, 1]]))
    assert found["fp16"].tolist() == [[5000.0, 1]] * 5
    assert found["ane"].tolist() == [[torch.inf, 1], [5000, 1], [torch.inf, 1], [5000, 1], [torch.inf, 1]]


def test_n7_reductions_add_in_fp16(tmp_path: Path) -> None:
    folder = one(tmp_path / "r.mlpackage", {"x": half(1, 3000)}, lambda x: mb.reduce_sum(x=x, axes=[1]))
    found = in_modes(folder, x=torch.ones(1, 3000))
    assert (found["fp16"].item(), found["ane"].item()) == (3000, 2048)  # 2048 + 1 is 2048 in fp16
    folder = one(tmp_path / "q.mlpackage", {"x": half(1, 3000)}, lambda x: mb.reduce_mean(x=x, axes=[1]))
    found = in_modes(folder, x=torch.ones(1, 3000))
    assert found["fp16"].item() == 1 and abs(found["ane"].item() - 2048 / 3000) < 1e-3


def test_n9_what_is_not_a_number_becomes_infinite(tmp_path: Path) -> None:
    folder = one(tmp_path / "z.mlpackage", {"x": half(1)}, lambda x: mb.sqrt(x=x))
    found = in_modes(folder, x=torch.tensor([-1.0]))
    assert found["fp16"].isnan().all() and found["ane"].item() == torch.inf


def test_a_trace_has_the_extremes_of_all_its_runs(tmp_path: Path) -> None:
    read = Interpreter(
        one(tmp_path / "t.mlpackage", {"x": half(4)}, lambda x: mb.mul(x=x, y=np.float16(2), name="y")), "fp16"
    )
    trace = Trace()
    for x in ([1.0, -3, 0, 2e-5], [40000.0, 1, 1, 1]):
        read.run({"x": torch.tensor(x)}, trace=trace)
    seen = trace.seen["y"]
    assert (seen.largest, seen.infinite, seen.count, seen.subnormal_share) == (6.0, 1, 8, 1 / 8)
