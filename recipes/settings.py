"""The sections of a recipe that no runtime owns: gates, exports, the probe inputs.

The fields are the keys of a recipe; their docstrings become the descriptions of the JSON Schema.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from recipes.metrics import MetricName
from recipes.numbers import Count, Natural, Text
from runtimes.export import ANE_OPTIONS, GGUF_OPTIONS, default_dtype, options_of, words_of
from runtimes.serving.settings import OPTIONS


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A condition; if it does not hold, the run stops with a report and a non-zero exit."""

    metric: MetricName
    """What is compared."""

    op: Literal["<", "<=", ">", ">=", "==", "finite", "decreased"]
    """How; finite and decreased need no value."""

    value: float | None = None
    """What it is compared with, in the unit of the metric."""

    window: Count | None = None
    """Values averaged at both ends of the series, for decreased; without it, 10."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Something to write for another runtime."""

    target: Literal[
        "safetensors",
        "ane",
        "onnx",
        "fp8",
        "nvfp4",
        "mxfp8",
        "mxfp4",
        "int2",
        "int4",
        "int8",
        "nf4",
        "mixed",
        "gguf",
        "bitnet",
        "ternary",
    ]
    """The runtime's format: a folder for transformers, Core ML packages for the Apple Neural Engine, a model for ONNX
    Runtime, packed weights for GPU servers, a GGUF file, ternary weights in BitNet's packing, or packed and as floats
    for transformers."""

    dtype: Literal["fp16", "bf16", "fp32"] | None = None
    """Dtype of the floating tensors; without it, bf16 for fp8, nvfp4, mxfp8, mxfp4 and mixed, fp16 for the others."""

    max_shard_size: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(KB|MB|GB)$")] = "5GB"
    """Size of the largest file, in KB, MB or GB (powers of 10): 500MB."""

    out: Text | None = None
    """Folder to write, relative to the current one; without it, one in the run's folder."""

    chip: Text | None = None
    """For ane: the chips and system to write for, m1-macos15 or a17-ios18; without it, m4-macos15."""

    context: Count | None = None
    """For ane: tokens that the cache of a decoder holds; without it, 512."""

    prefill: Natural | None = None
    """For ane: tokens of the function that reads a prompt; without it 64, and 0 for none."""

    kv: Literal["state_slice", "state_blend", "io"] | bool | None = None
    """For ane: keys and values in a state written by slices or blended in, or as inputs and outputs; without it,
    state_slice. For onnx: true makes them inputs and outputs; without it, there is no past."""

    chunks: Count | None = None
    """For ane: packages that the blocks are spread over; without it, as few as the chip takes."""

    lengths: tuple[Count, ...] | None = None
    """For ane: lengths of the functions of an encoder; without it, 128."""

    dense_prefill: bool | None = None
    """For ane: multiply low-rank scales out in the function that reads a prompt: faster, and larger. Without it, no."""

    memory: Count | None = None
    """For ane: tokens of the memory that a decoder with gated cross-attention reads; without it, 64."""

    scheme: Literal["channel", "tensor", "block", "static"] | None = None
    """For fp8: what shares a scale of weights, a row, the weight, or 128 rows and columns; static: the weight, and
    inputs have scales found on text. Without it, channel."""

    weight_only: bool | None = None
    """For fp8, nvfp4, mxfp8, mxfp4, int8 and mixed: leave what linears read as it is. Without it, that is rounded
    too."""

    dialect: Literal["compressed-tensors", "modelopt", "hf"] | None = None
    """For fp8, nvfp4 and mxfp8: the names and the configuration, those of compressed-tensors, of ModelOpt, or (not
    nvfp4) of transformers' own. Without it, compressed-tensors."""

    group: Literal[32, 64, 128] | None = None
    """For int4: weights of a row that share a scale; without it, 128. For int8, whose inputs then stay as they are;
    without it, a row."""

    kv_cache: Literal["fp8"] | None = None
    """For those of GPU servers but nf4: keep keys and values in FP8, under scales found on text. Without it, nothing is
    said of them."""

    encoding: Literal["q8_0", "q4_0"] | None = None
    """For gguf: what float weights become, 8 or 4 bits with a scale for 32; without it, q8_0. Packed ones stay."""

    calibration: Count | None = None
    """For fp8 (static), nvfp4, and where kv_cache is given: tokens of text on which ranges are found; without it,
    1024."""

    @property
    def numbers(self) -> str:
        """Dtype of the floating tensors."""
        return self.dtype or default_dtype(self.target)

    @property
    def words(self) -> list[str]:
        """What it is called: the target, the options that make another format of it, the dtype."""
        return words_of(self.target, self.numbers, self.options())

    def options(self) -> dict[str, Any]:
        """What is said of the target alone, by the names of its options."""
        return {key: getattr(self, key) for key in options_of(self.target) if getattr(self, key) is not None}


EXPORT_OPTIONS = tuple(sorted({*ANE_OPTIONS, *GGUF_OPTIONS, *(option for own in OPTIONS.values() for option in own)}))
"""The fields of an export that belong to some target."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The inputs on which a pass is held to its contract."""

    batch: Count = 2
    """Sequences."""

    length: Count = 16
    """Tokens per sequence."""
