"""Writing a graph for another runtime: each module beside this one is a target, under its own name.

The formats of GPU servers share one, ``_serving``.

Nothing but the standard library is imported here, so that listing the targets does not load torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from graph.errors import QcError
from runtimes.serving.settings import BF16, OPTIONS
from runtimes.serving.settings import TARGETS as SERVING

ABOUT = "qc-export.json"
"""The file of an export that says what it is: target, dtype, and the hash of every other file."""


ANE_OPTIONS = ("chip", "context", "prefill", "kv", "chunks", "lengths", "dense_prefill", "memory")
"""The options of the target ane."""

ONNX_OPTIONS = ("kv",)
"""The options of the target onnx."""

GGUF_OPTIONS = ("encoding",)
"""The options of the target gguf."""


_NAMED: Mapping[str, str] = {
    "scheme": "{}", "weight_only": "weight-only", "dialect": "{}", "group": "group-{}", "kv_cache": "kv-{}",
    "encoding": "{}",
}  # fmt: skip
"""The options that make one target into several formats, and how the name of a folder tells them."""


JOINT = ("safetensors",)
"""The targets that hold two models that were joined."""


def default_dtype(target: str) -> str:
    """The dtype of floating tensors where none is given."""
    return "bf16" if target in BF16 else "fp16"


def options_of(target: str) -> tuple[str, ...]:
    """The options that a target has beside those of all."""
    return {"ane": ANE_OPTIONS, "onnx": ONNX_OPTIONS, "gguf": GGUF_OPTIONS, **OPTIONS}.get(target, ())


def homes_of(option: str) -> str:
    """The targets that have an option, as a text names them: ``target ane``, ``targets fp8 and nvfp4``."""
    found = [target for target in ("ane", "onnx", "gguf", *SERVING) if option in options_of(target)]
    return f"target {found[0]}" if len(found) == 1 else f"targets {', '.join(found[:-1])} and {found[-1]}"


def words_of(target: str, dtype: str, options: Mapping[str, Any]) -> list[str]:
    """What an export is called: ``fp8 block weight-only bf16``; its folder has the same words."""
    told = [words.format(options[key]) for key, words in _NAMED.items() if options.get(key)]
    return [target, *told, dtype]


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    folder: Path
    target: str
    dtype: str
    files: Mapping[str, int]
    """Name -> bytes."""

    figures: Mapping[str, float | int | str] = field(default_factory=dict)
    """What was counted on the way, under names a reader understands."""

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def targets() -> list[str]:
    """The names of all targets."""
    return sorted([*SERVING, *(file.stem for file in Path(__file__).parent.glob("[!_]*.py"))])


def find(target: str) -> Callable[..., ExportReport]:
    """``safetensors`` -> ``runtimes.export.safetensors.export``. Only that module is imported."""
    known = targets()
    if target not in known:
        near = get_close_matches(target, known, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"use one of: {', '.join(known)}"
        raise QcError(f"no export target is called {target!r}", fix=fix)
    found: Callable[..., ExportReport] = _module(target).export
    if target in JOINT:
        return found
    return partial(_export, partial(found, target=target) if target in SERVING else found, target)


def _export(export: Callable[..., ExportReport], name: str, graph: Any, *args: Any, **options: Any) -> ExportReport:
    """Export a graph of one model."""
    for error in (*_joined(name, graph), *_rounding(name, graph)):
        raise error
    return export(graph, *args, **options)


def _joined(target: str, graph: Any) -> list[QcError]:
    """Two models in one are no model that anything else reads."""
    from graph.joint import is_joint, names_of

    if target in JOINT or not is_joint(graph):
        return []
    what = f"the graph joins {' and '.join(vars(names_of(graph)).values())}, and {target} holds one model"
    fix = "export a stage from before attach-memory; qc generate --context runs both"
    return [QcError(what, fix=fix)]


def _rounding(target: str, graph: Any) -> list[QcError]:
    """Inputs that are rounded as GPU servers round them, which nothing else does."""
    sites = [] if target in SERVING else graph.sites("qc.fake_quantize_input")
    if not sites:
        return []
    kind = sites[0].node.args[1]
    what = f"inputs are rounded to {kind} at {len(sites)} sites, which {target} has no form of"
    return [QcError(what, site=sites[0].name, fix=f"export to {kind}, or take quantize-inputs out")]


def _module(target: str) -> Any:
    return import_module(f"runtimes.export.{'_serving' if target in SERVING else target}")


def obstacles(target: str, graph: Any, dtype: str, options: Mapping[str, Any]) -> list[QcError]:
    """What stands in the way of an export, as far as shapes tell; only some targets can say."""
    general = [*_joined(target, graph), *_rounding(target, graph)]
    if general:
        return general
    check = getattr(_module(target), "check", None)
    own = {"target": target, "dtype": dtype} if target in SERVING else {}
    return [] if check is None else list(check(graph, **own, **options))
