"""What a linear reads, rounded on the way in, as GPU servers do: FP8, MXFP8, MXFP4, NVFP4 and INT8 activations.

    x = code * scale              a scale for each token, each group of a token's values, or one known beforehand
    x = code * scale / global     NVFP4

Every step is in the order and the dtype in which compressed-tensors takes it, so that the values are the same.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from graph.formats.elements import E2M1, E4M3, Element, decode_e4m3, nearest_e2m1
from graph.formats.format import has_data
from graph.formats.scales_of import E4M3_ZERO, e8m0_scales, float_scales, read_scales
from graph.formats.scales_of import global_scale as divisor_for
from graph.ops import op

InputKind: TypeAlias = Literal["fp8", "mxfp8", "mxfp4", "nvfp4", "int8"]

GROUPS: dict[str, int] = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16}
"""The values that share a scale, of the kinds that leave no choice."""


@op
def fake_quantize_input(
    x: Tensor,
    kind: InputKind,
    columns: int = 0,
    scale: Tensor | None = None,
    global_scale: Tensor | None = None,
    seen: float | None = None,
) -> Tensor:
    """``x`` in the numbers of ``kind``. The gradient is 1 everywhere, where a given scale saturates too.

    ``columns`` values of a token share a scale, all of them if it is 0; ``scale`` is known beforehand, of all. Where
    neither that nor a global scale is given they follow from ``seen``, the largest magnitude seen on some text.

    x: [..., in]    scale, global_scale: f32 [1]  ->  like x
    """
    if seen is not None and kind == "nvfp4":
        global_scale = divisor_for(torch.tensor(seen, device=x.device))
    elif seen is not None:
        scale = float_scales(torch.tensor([seen], device=x.device), E4M3, torch.float32)
    return _FakeQuantizeInput.apply(x, kind, columns, scale, global_scale)


class _FakeQuantizeInput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kind: str, columns: int, scale: Tensor | None, global_scale: Tensor | None
    ) -> Tensor:
        if not has_data(x) or not x.numel():
            return torch.empty_like(x)
        wide = x.float() if x.dtype == torch.float16 and kind.startswith("mx") else x  # fp16 has no 2^-127
        groups = wide.unflatten(-1, (-1, columns or x.shape[-1]))
        by = scales_of_input(groups, kind, global_scale) if scale is None else scale.to(x.dtype)
        values = _rounded(groups / by, kind)
        return values.to(by.dtype).mul_(by).flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None


def scales_of_input(groups: Tensor, kind: str, global_scale: Tensor | None) -> Tensor:
    """What each group of values is divided by.

    groups: [..., groups, columns]    global_scale: f32 [1]  ->  [..., groups, 1], of NVFP4 f32
    """
    largest = groups.abs().amax(-1, keepdim=True)
    if kind in ("mxfp8", "mxfp4"):
        return read_scales(e8m0_scales(largest.float(), _element(kind)), None).to(groups.dtype)
    if kind == "nvfp4":
        assert global_scale is not None, "NVFP4 has a global scale"
        codes = (global_scale * (largest / 6.0)).clamp_(-448.0, 448.0).to(torch.float8_e4m3fn)
        found = decode_e4m3(codes.view(torch.uint8))
        return found.masked_fill_(found == 0, E4M3_ZERO) / global_scale
    found = largest / (448.0 if kind == "fp8" else 127.5)
    return found.masked_fill_(found == 0, torch.finfo(found.dtype).eps)


def _element(kind: str) -> Element:
    return E4M3 if kind in ("fp8", "mxfp8") else E2M1


def _rounded(x: Tensor, kind: str) -> Tensor:
    """The nearest number of the kind; ``x`` may be written to."""
    if kind == "int8":
        return x.clamp_(-128.0, 127.0).round_()
    if kind in ("fp8", "mxfp8"):
        return x.clamp_(-448.0, 448.0).to(torch.float8_e4m3fn).to(x.dtype)
    return nearest_e2m1(x.float()).to(x.dtype)
