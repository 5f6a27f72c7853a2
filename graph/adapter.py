"""PEFT's adapter folders, both ways: ``adapter_model.safetensors`` beside ``adapter_config.json``.

What ``save_adapter`` writes, ``peft.PeftModel.from_pretrained(model, folder)`` loads; what PEFT saves of LoRA, rsLoRA
and DoRA on linear layers, ``load_adapter`` puts into a graph. Strictly: every key used, every shape right.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph.artifact import appearing
from graph.core import Graph
from graph.errors import QcError, raise_all
from graph.lora_base import has_values, in_out
from graph.lora_sets import Shape, Update, attach, conflicts, module_path, set_names, updates
from graph.sites import Site
from graph.weights import Entry, Stored, read_header, write

PREFIX = "base_model.model."
SUFFIXES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
"""The parts of an update, as the keys of PEFT's files end."""

TASKS = {"causal-lm": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION"}

READ = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
IGNORED = (
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "fan_in_fan_out", "megatron_core",
    "qalora_group_size", "ensure_weight_tying",
)  # fmt: skip
"""Settings that say where updates sit or how they began: the keys and values of the weight file say both."""


# -- writing --------------------------------------------------------------------------------------------------------


def save_adapter(graph: Graph, folder: Path, set: str = "default", base_model: str | None = None) -> Path:
    """Write the set as an adapter that PEFT loads; ``base_model`` is the name under which PEFT looks for its model."""
    found = updates(graph, [set])
    if not found:
        raise QcError(
            f"the graph has no LoRA set {set!r}",
            fix=f"its sets are {', '.join(set_names(graph)) or 'none: run add-lora first'}",
        )
    config = _config(graph, found, base_model)
    parts = {f"{PREFIX}{u.module}.{SUFFIXES[k]}": n for u in found for k, n in _parts(u).items() if n is not None}
    with appearing(folder) as new:
        entries = (Entry(key, graph.shape(n), graph.dtype_of(n), _loader(graph, n)) for key, n in parts.items())
        write(new, entries, stem="adapter_model")
        (new / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def _parts(update: Update) -> dict[str, str | None]:
    return {"a": update.a, "b": update.b, "m": update.magnitude}


def _loader(graph: Graph, name: str) -> Callable[[], Tensor]:
    return lambda: graph.tensor(name)


def _config(graph: Graph, found: Sequence[Update], base_model: str | None) -> dict[str, Any]:
    """PEFT's configuration of these updates; one rank and alpha for most, patterns for the others."""
    name, shapes = found[0].set, {u.module: u.shape for u in found}
    nowhere = [u.site.name for u in found if "/" in u.site.name]
    if nowhere:
        raise QcError(f"PEFT has no module {nowhere[0]}", fix="leave it out of add-lora's select", site=nowhere[0])
    for what in ("dora", "dropout"):
        values = sorted({getattr(shape, what) for shape in shapes.values()})
        if len(values) > 1:
            said = " and ".join(map(str, values))
            raise QcError(f"set {name!r} has {what} {said}, a PEFT adapter has one for all", fix="make it two sets")
    rslora = all(s.rslora for s in shapes.values())
    ranks = {module: s.rank for module, s in shapes.items()}
    alphas = {module: _number(s.alpha if rslora or not s.rslora else s.scale * s.rank) for module, s in shapes.items()}
    rank, alpha = _most(ranks.values()), _most(alphas.values())
    weights = [name for u in found for name in u.site.tensors()]
    return {
        "peft_type": "LORA", "task_type": TASKS.get(graph.kind), "bias": "none", "inference_mode": True,
        "base_model_name_or_path": base_model, "target_modules": _targets(graph, list(shapes)),
        "r": rank, "lora_alpha": alpha, "lora_dropout": found[0].shape.dropout, "use_rslora": rslora,
        "rank_pattern": _pattern(ranks, rank), "alpha_pattern": _pattern(alphas, alpha),
        "use_dora": found[0].shape.dora, "init_lora_weights": True,
        "fan_in_fan_out": any(graph.info(name).transposed for name in weights),
    }  # fmt: skip


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _most(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """The modules that differ from the default. PEFT takes the first key that ends a path, so longer ones go first."""
    return {
        re.escape(module): values[module]
        for module in sorted(values, key=len, reverse=True)
        if values[module] != default
    }


def _targets(graph: Graph, modules: list[str]) -> list[str] | str:
    """What makes PEFT choose exactly ``modules``: their last names, their paths, or a regular expression of these."""
    known = {name.rpartition(".")[0] for name in graph.tensors()} | {
        site.name for site in graph.sites() if "/" not in site.name
    }
    for targets in (sorted({m.rpartition(".")[2] for m in modules}), sorted(modules)):
        chosen = {path for path in known if any(path == t or path.endswith(f".{t}") for t in targets)}
        if chosen <= set(modules):
            return targets
    return "|".join(f"({re.escape(module)})" for module in sorted(modules))


# -- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """One update of an adapter folder, and the linear it belongs to. Its values have not been read."""

    site: Site
    shape: Shape
    stored: dict[str, Stored]


def load_adapter(
    graph: Graph, folder: Path, set: str = "default", *, dtype: torch.dtype = torch.float32, pinned: bool = True
) -> list[str]:
    """Add the adapter in ``folder`` as a set; return the linears it sits at. ``dtype`` is that of A and B."""
    planned = plan_adapter(graph, folder)
    raise_all(conflicts(graph, set, [(plan.site, plan.shape) for plan in planned]))
    for plan in planned:
        values = {
            key: _value(stored, graph, plan.site, torch.float32 if key == "m" else dtype)
            for key, stored in plan.stored.items()
        }
        attach(graph, plan.site, set, plan.shape, values, pinned=pinned)
    return [plan.site.name for plan in planned]


def _value(stored: Stored, graph: Graph, site: Site, dtype: torch.dtype) -> Tensor:
    if not has_values(graph, site):
        return torch.empty(stored.shape, dtype=dtype, device="meta")
    value = stored.load()
    if not bool(torch.isfinite(value).all()):
        raise QcError(
            f"{stored.key} in {stored.file} holds NaN or infinity", fix="train the adapter again, or fetch it again"
        )
    return value.to(graph.device, dtype)


def plan_adapter(graph: Graph, folder: Path) -> list[Planned]:
    """Which linear gets which update; everything that does not fit is an error, all of them at once."""
    config, parts = read_adapter_config(folder), _read_parts(folder)
    linears = {module_path(site): site for site in graph.sites("aten.linear")}
    planned, errors = [], []
    for module, stored in parts.items():
        if module not in linears:
            near = get_close_matches(module, list(linears), n=1)
            fix = f"the nearest linear is {near[0]}" if near else "the adapter belongs to another model"
            errors.append(
                QcError(f"the adapter in {folder} updates {module}, which is no linear of the model", fix=fix)
            )
            continue
        plan = Planned(linears[module], _shape(config, module, folder), stored)
        errors += _misfits(plan, module, folder)
        planned.append(plan)
    raise_all(errors)
    order = {site.name: i for i, site in enumerate(graph.sites("aten.linear"))}
    return sorted(planned, key=lambda plan: order[plan.site.name])


def _misfits(plan: Planned, module: str, folder: Path) -> Iterator[QcError]:
    (inputs, out), r = in_out(plan.site), plan.shape.rank
    wanted = {"a": (r, inputs), "b": (out, r)} | ({"m": (out,)} if plan.shape.dora else {})
    for key in sorted(wanted.keys() | plan.stored.keys()):
        name = f"{PREFIX}{module}.{SUFFIXES[key]}"
        if key not in plan.stored:
            yield QcError(f"the adapter in {folder} lacks {name}", fix="save the adapter again; this one is incomplete")
        elif key not in wanted:
            yield QcError(
                f"the adapter in {folder} has {name}, but its config does not say use_dora",
                fix="repair adapter_config.json",
            )
        elif plan.stored[key].shape != wanted[key]:
            shape = list(plan.stored[key].shape)
            yield QcError(
                f"{name} is {shape}, the model and rank {r} want {list(wanted[key])}",
                fix="the adapter belongs to another model",
            )


def _shape(config: dict[str, Any], module: str, folder: Path) -> Shape:
    rank = _by_pattern(config.get("rank_pattern") or {}, module, config.get("r", 8), folder)
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8), folder)
    dropout, rslora, dora = (
        config.get("lora_dropout", 0.0),
        config.get("use_rslora", False),
        config.get("use_dora", False),
    )
    sound = (
        isinstance(rank, int)
        and rank > 0
        and isinstance(alpha, (int, float))
        and isinstance(dropout, (int, float))
        and 0 <= dropout < 1
    )
    if not sound:
        raise QcError(
            f"{folder / CONFIG}: r={rank!r}, lora_alpha={alpha!r}, lora_dropout={dropout!r} make no adapter",
            fix=f"repair {CONFIG}",
        )
    return Shape(rank=rank, alpha=alpha, dropout=float(dropout), rslora=bool(rslora), dora=bool(dora))


def _by_pattern(patterns: dict[str, Any], module: str, default: Any, folder: Path) -> Any:
    """The value of the first pattern, a regular expression, that fits the end of the module's path, as PEFT has it."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise QcError(
                f"{folder / CONFIG} has the pattern {pattern!r}, which is no regular expression", fix=f"repair {CONFIG}"
            ) from None
    return default


CONFIG = "adapter_config.json"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's configuration of an adapter, if it asks for nothing that a graph's LoRA does not have."""
    path = folder / CONFIG
    if not path.is_file():
        raise QcError(
            f"{folder} is no adapter: it has no {CONFIG}", fix="give a folder that PEFT or qc saved an adapter to"
        )
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        raise QcError(f"{path} is damaged", fix="save or fetch the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise QcError(f"{path} describes {kind or 'no'} adapter, not LORA", fix="only LoRA adapters can be added")
    strange = {k: v for k, v in config.items() if k not in READ + IGNORED and v not in (None, False, {}, [], "none")}
    if strange:
        key, value = next(iter(strange.items()))
        raise QcError(
            f"{path} asks for {key}={json.dumps(value)}, which qc's LoRA does not have",
            fix="train the adapter without it",
        )
    return config


def _read_parts(folder: Path) -> dict[str, dict[str, Stored]]:
    """Module -> its stored tensors; an unknown key is an error."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise QcError(
            f"{folder} has its adapter only as a pickle, which qc never reads",
            fix="save it with PEFT's safe_serialization=True",
        )
    parts: dict[str, dict[str, Stored]] = {}
    for key, stored in read_header(path).items():
        suffix = next((s for s in SUFFIXES if key.startswith(PREFIX) and key.endswith(f".{SUFFIXES[s]}")), None)
        if suffix is None:
            raise QcError(
                f"{path} holds {key}, which is no part of LoRA on a linear",
                fix="train the adapter on linear layers only",
            )
        parts.setdefault(key[len(PREFIX) : -len(SUFFIXES[suffix]) - 1], {})[suffix] = stored
    if not parts:
        raise QcError(f"{path} holds no tensors", fix="save the adapter again")
    return parts
