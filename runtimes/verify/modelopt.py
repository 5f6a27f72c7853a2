"""A checkpoint in ModelOpt's dialect, which transformers does not read, as one of compressed-tensors, which it does.

Only names, shapes and the way round of factors change. What the configuration of compressed-tensors says comes from
that library's own presets, by the algorithm that ``hf_quant_config.json`` names; what is left as it is, and whether
keys and values are rounded, comes from the section of ``config.json``, where vLLM and SGLang look for it. Nothing is
shared with the exporter.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

_PRESETS = {
    "NVFP4": ("NVFP4", "nvfp4-pack-quantized"),
    "W4A16_NVFP4": ("NVFP4A16", "nvfp4-pack-quantized"),
    "FP8": ("FP8", "float-quantized"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("FP8_DYNAMIC", "float-quantized"),
    "FP8_PB_WO": ("FP8_BLOCK", "float-quantized"),
    "MXFP8": ("MXFP8", "mxfp8-quantized"),
}

_NVFP4 = {
    "weight": "weight_packed",
    "weight_scale": "weight_scale",
    "weight_scale_2": "weight_global_scale",
    "input_scale": "input_global_scale",
}


@contextmanager
def readable(folder: Path, dialect: str) -> Iterator[Path]:
    """The folder itself, or, of one in ModelOpt's dialect, another of the same weights that transformers reads."""
    if dialect != "modelopt":
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="qc-verify-") as temporary:
        view = Path(temporary) / "view"
        shutil.copytree(folder, view, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        algorithm = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]["quant_algo"]
        _translate(folder, view, algorithm.upper())
        yield view


def _translate(folder: Path, view: Path, algorithm: str) -> None:
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    said = config["quantization_config"]
    config["quantization_config"] = _config(algorithm, said["ignore"], said.get("kv_cache_scheme"))
    (view / "config.json").write_text(json.dumps(config))
    where: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        given = load_file(path)
        found = dict(pair for name, value in given.items() for pair in _renamed(name, value, given, algorithm))
        save_file({name: value.contiguous() for name, value in found.items()}, view / path.name)
        where |= dict.fromkeys(found, path.name)
    index = {"metadata": {}, "weight_map": where}
    if len(set(where.values())) > 1:
        (view / "model.safetensors.index.json").write_text(json.dumps(index))


def _config(algorithm: str, ignored: list[str], kept: dict[str, Any] | None) -> dict[str, Any]:
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationStatus,
        preset_name_to_scheme,
    )

    preset, layout = _PRESETS[algorithm]
    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.format = layout
    if algorithm == "FP8_PB_WO":
        scheme.input_activations = None
    cache = None if kept is None else QuantizationArgs(**kept, strategy="tensor")
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=layout, ignore=ignored, kv_cache_scheme=cache,
        quantization_status=QuantizationStatus.COMPRESSED,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(config.model_dump_json())
    return found


def _renamed(name: str, value: Tensor, given: dict[str, Tensor], algorithm: str) -> Iterator[tuple[str, Tensor]]:
    """One tensor under the name, in the shape and the way round of compressed-tensors."""
    module, _, suffix = name.rpartition(".")
    if suffix in ("k_scale", "v_scale"):
        yield f"{module.rpartition('.')[0]}.{suffix}", value.reshape(1)
    elif f"{module}.weight_scale" not in given:
        yield name, value
    elif algorithm in ("NVFP4", "W4A16_NVFP4"):
        factor = suffix in ("weight_scale_2", "input_scale")
        yield f"{module}.{_NVFP4[suffix]}", 1.0 / value[None] if factor else value
    elif suffix == "weight_scale":
        shapes = {0: (1,), 1: (-1, 1), 4: (value.shape[0], value.shape[2]) if value.ndim == 4 else ()}
        yield name, value if value.ndim == 2 else value.reshape(shapes[value.ndim])
    else:
        yield name, value.reshape(1) if suffix == "input_scale" else value
