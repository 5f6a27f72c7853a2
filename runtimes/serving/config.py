"""What ``config.json`` says of packed weights, through the libraries whose formats they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from graph import Graph, QcError
from graph.dense import model_config
from graph.formats import FourBit, Scaled, Ternary
from graph.tracing import on_meta
from runtimes.serving import ternary
from runtimes.serving.held import form_of
from runtimes.serving.plan import Part, Plan
from runtimes.serving.settings import Serving

LAYOUTS = {
    "fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized", "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized", "int2": "pack-quantized", "int4": "pack-quantized", "int8": "int-quantized",
}  # fmt: skip
"""What compressed-tensors calls each layout."""

_ALGORITHMS = {"channel": "FP8_PER_CHANNEL_PER_TOKEN", "static": "FP8", "block": "fp8_pb_wo"}
"""What ModelOpt calls the schemes of FP8; TensorRT-LLM knows the last in small letters only."""


def library(settings: Serving) -> None:
    """See that the library is there whose format is asked for."""
    if settings.target == "nf4":
        return
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        what = f"{settings.target} is written through compressed-tensors, which is not installed"
        raise QcError(what, fix="pip install 'qc-compiler[serving]'") from None


def quantization_config(plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """The section of that name; ``dtype`` is that of what is not packed."""
    settings, chosen = plan.settings, [part.module for part in plan.parts]
    ignored = others(plan.graph, chosen)
    if settings.target == "nf4":
        return _bitsandbytes(plan, ignored, dtype)
    if settings.dialect == "hf":
        return _fine_grained(settings, ignored)
    return _modelopt(plan, ignored) if settings.dialect == "modelopt" else _compressed(plan, ignored)


def others(graph: Graph, chosen: Iterable[str]) -> list[str]:
    """The linears of the architecture that are left as they are, the head among them."""
    model = on_meta(model_config(graph), "causal-lm" if graph.kind == "causal-lm" else "encoder", torch.float32)
    taken = set(chosen)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in linears if name not in taken]


def patterns(names: Iterable[str]) -> list[str]:
    """Names of linears as ``re:`` targets, one for those that differ in the number of their block only."""
    found: dict[str, list[str]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        bare = (
            re.escape(name)
            if number is None
            else rf"{re.escape(name[: number.start()])}#{re.escape(name[number.end() :])}"
        )
        found.setdefault(bare, []).extend([number.group()] if number else [])
    shown = {
        bare: numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
        for bare, numbers in found.items()
        if numbers
    }
    return [f"re:^{bare.replace('#', shown.get(bare, '#'))}$" for bare in found]


def _compressed(plan: Plan, ignored: list[str]) -> dict[str, Any]:
    """Through the library's own classes, which say no to what they do not know."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

    groups: dict[str, QuantizationScheme] = {}
    for part in plan.parts:
        weights, inputs = arguments(part)
        scheme = QuantizationScheme(
            targets=[part.module], weights=weights, input_activations=inputs, format=layout_of(part.settings)
        )
        alike = scheme.model_dump_json(exclude={"targets"})
        groups.setdefault(alike, scheme.model_copy(update={"targets": []})).targets.append(part.module)
    for scheme in groups.values():
        scheme.targets[:] = patterns(scheme.targets)
    layouts = {scheme.format for scheme in groups.values()}
    config = QuantizationConfig(
        config_groups={f"group_{number}": scheme for number, scheme in enumerate(groups.values())},
        format=layouts.pop() if len(layouts) == 1 else "mixed-precision", ignore=ignored,
        quantization_status=QuantizationStatus.COMPRESSED, kv_cache_scheme=_kept(plan.settings),
    )  # fmt: skip
    found: dict[str, Any] = json.loads(config.model_dump_json())
    return found


def _kept(settings: Serving) -> Any:
    """The library's QuantizationArgs of keys and values; None where they stay as they are."""
    from compressed_tensors.quantization import QuantizationArgs

    if settings.kv_cache is None:
        return None
    return QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=False)


def layout_of(settings: Serving) -> str:
    """The library's name of the layout. Without activations int8 is a stream of bits, as int4 is."""
    if settings.target == "int8" and settings.inputs is None:
        return "pack-quantized"
    return LAYOUTS[settings.target]


def arguments(part: Part) -> tuple[Any, Any]:
    """The library's QuantizationArgs of a weight and of inputs; None for inputs that stay as they are."""
    from compressed_tensors.quantization import QuantizationArgs

    if isinstance(part.form, Ternary):
        return QuantizationArgs(num_bits=2, type="int", **ternary.strategy(part.form)), None
    settings, form = part.settings, form_of(part.settings)
    assert isinstance(form, Scaled)
    kind: dict[str, Any] = {"num_bits": form.element.bits, "type": "int" if form.kind.startswith("int") else "float"}
    weights = QuantizationArgs(**kind, **_strategy(form))
    if settings.inputs is None:
        return weights, None
    _, columns = settings.inputs
    if settings.scheme == "static":
        return weights, QuantizationArgs(**kind, strategy="tensor", dynamic=False)
    if form.kind in ("nvfp4", "mxfp8", "mxfp4"):
        dynamic = "local" if form.kind == "nvfp4" else True
        return weights, QuantizationArgs(**kind, **_strategy(form), dynamic=dynamic)
    if columns:
        return weights, QuantizationArgs(**kind, strategy="group", group_size=columns, dynamic=True)
    return weights, QuantizationArgs(**kind, strategy="token", dynamic=True)


def _strategy(form: Scaled) -> dict[str, Any]:
    if form.kind == "nvfp4":
        return {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
    if form.kind in ("mxfp8", "mxfp4"):
        return {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    if form.rows > 1:
        return {"strategy": "block", "block_structure": [form.rows, form.columns]}
    if form.columns:
        return {"strategy": "group", "group_size": form.columns}
    return {"strategy": "channel" if form.rows else "tensor"}


def _fine_grained(settings: Serving, ignored: list[str]) -> dict[str, Any]:
    """Of the dialect ``hf``, where MXFP8 is a method of its own; some readers of that know ``ignored_layers`` alone."""
    said: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    if settings.target == "mxfp8":
        said |= {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0", "ignored_layers": ignored}
    return {**said, "fmt": "e4m3", "modules_to_not_convert": ignored}


_KEPT = {"dynamic": False, "num_bits": 8, "type": "float"}
"""What ``config.json`` says of keys and values in ModelOpt's dialect."""

_PRODUCER = {"name": "qc", "version": "1"}


def _modelopt(plan: Plan, ignored: list[str]) -> dict[str, Any]:
    """The section in ModelOpt's words: what vLLM and SGLang read of its checkpoints, instead of the file of its own."""
    settings, weights = plan.settings, _modelopt_weights(plan.settings)
    group = {"weights": weights, "targets": ["Linear"]}
    if settings.inputs is not None:
        rounded: dict[str, Any] = {"num_bits": weights["num_bits"], "type": "float", "dynamic": not settings.calibrated}
        sizes = {"group_size": settings.inputs[1]} if settings.inputs[1] else {}
        group["input_activations"] = rounded | sizes
    kept = {} if settings.kv_cache is None else {"kv_cache_scheme": _KEPT}
    return {
        "quant_method": "modelopt", "quant_algo": _algorithm(settings), "ignore": ignored,
        "config_groups": {"group_0": group}, **_group_size(settings), **kept, "producer": _PRODUCER,
    }  # fmt: skip


def _modelopt_weights(settings: Serving) -> dict[str, Any]:
    found: dict[str, Any] = {"num_bits": 4 if settings.target == "nvfp4" else 8, "type": "float", "dynamic": False}
    shared: dict[str, dict[str, Any]] = {
        "channel": {"strategy": "channel"},
        "block": {"strategy": "block", "block_structure": [128, 128]},
    }
    of_fp8 = shared.get(settings.scheme or "channel", {}) if settings.target == "fp8" else {}
    return found | of_fp8 | _group_size(settings)


def _group_size(settings: Serving) -> dict[str, int]:
    sizes = {"nvfp4": 16, "mxfp8": 32}
    return {"group_size": sizes[settings.target]} if settings.target in sizes else {}


def _algorithm(settings: Serving) -> str:
    if settings.target == "nvfp4":
        return "NVFP4" if settings.inputs else "W4A16_NVFP4"
    return "MXFP8" if settings.target == "mxfp8" else _ALGORITHMS[settings.scheme or "channel"]


def hf_quant_config(plan: Plan) -> Mapping[str, Any]:
    """The file of that name, which TensorRT-LLM reads."""
    settings = plan.settings
    said: dict[str, Any] = {
        "quant_algo": _algorithm(settings),
        "kv_cache_quant_algo": None if settings.kv_cache is None else settings.kv_cache.upper(),
        "exclude_modules": others(plan.graph, (part.module for part in plan.parts)),
    }
    return {"producer": _PRODUCER, "quantization": said | _group_size(settings)}


def _bitsandbytes(plan: Plan, ignored: list[str], dtype: torch.dtype) -> dict[str, Any]:
    import transformers

    library: Any = transformers  # BitsAndBytesConfig has no types
    form = plan.parts[0].form
    assert isinstance(form, FourBit)
    config = library.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=form.double_quant,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=ignored,
    )  # fmt: skip
    found: dict[str, Any] = config.to_dict()
    return found
