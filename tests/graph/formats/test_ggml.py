"""Groups of 32 as llama.cpp rounds them: integers and scales are those of the package ``gguf``, to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graph.formats.format import unpack
from graph.formats.ggml import form_of, rounded_groups
from runtimes.export._gguf_blocks import q4_0, q8_0

gguf = pytest.importorskip("gguf")

BYTES = {"q8_0": q8_0, "q4_0": q4_0}


def weights() -> dict[str, Tensor]:
    noise = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    steps = torch.arange(-48, 48).float().repeat(4, 1) / 2  # halves, and ties between -8 and 8
    tied = torch.zeros(3, 64)
    tied[0, 5], tied[0, 9] = 4.0, -4.0
    tied[1, 5], tied[1, 9] = -4.0, 4.0
    return {
        "noise": noise * 0.02, "large": noise * 1e4, "small": noise * 1e-7, "steps": steps, "tied": tied,
        "below what has an inverse": noise * 1e-42, "fp16": noise.half(), "bf16": noise.bfloat16(),
    }  # fmt: skip


@pytest.mark.parametrize("encoding", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", weights())
def test_the_bytes_are_those_of_the_package(encoding: Any, name: str) -> None:
    w = weights()[name]
    kind = getattr(gguf.GGMLQuantizationType, encoding.upper())
    sides = rounded_groups(encoding, w)
    found = BYTES[encoding](sides["indices"].numpy(), sides["scale"].numpy())
    if name != "below what has an inverse":  # where the package multiplies by infinity
        assert np.array_equal(found, gguf.quants.quantize(w.float().numpy(), kind))
    dense = unpack(form_of(encoding), sides, torch.float32).numpy()
    assert np.array_equal(gguf.quants.dequantize(found, kind), dense)


@pytest.mark.parametrize(("encoding", "codes"), [("q8_0", [7, 96]), ("q4_0", [7, 48])])
def test_a_plan_has_the_same_types(encoding: Any, codes: list[int]) -> None:
    sides = rounded_groups(encoding, torch.empty(7, 96, device="meta"))
    assert {key: (list(side.shape), side.dtype) for key, side in sides.items()} == {
        "indices": (codes, torch.uint8), "scale": ([7, 3], torch.float16),
    }  # fmt: skip


def test_the_scale_of_four_bits_has_the_sign_that_makes_the_largest_value_its_least_code() -> None:
    sides = rounded_groups("q4_0", torch.tensor([[3.0, -4.0] * 16, [3.0, 4.0] * 16]))
    assert sides["scale"].tolist() == [[0.5], [-0.5]]
    assert sides["indices"][:, 0].tolist() == [0x0E, 0x02], "6 and -8, -6 and -8, with 8 added"
