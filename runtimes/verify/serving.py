"""Verifying an export for GPU servers: transformers loads it, and unpacks and rounds through the format's own library.

The reference is the graph packed anew from what the export says was asked for, never from its files. Then nothing is
left to differ: weights are compared bit for bit, logits to the last digit.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from graph import Graph, QcError
from graph.formats.format import unpack
from graph.probe import psnr_db
from graph.weights import read_header
from runtimes.export import ABOUT
from runtimes.serving import config, layout
from runtimes.serving.caches import caches_of
from runtimes.serving.plan import Plan, make_plan
from runtimes.serving.reference import served
from runtimes.serving.settings import Dialect, KvCache, Scheme, Serving
from runtimes.verify import caches
from runtimes.verify.findings import Finding, hashes, read_about
from runtimes.verify.modelopt import readable
from runtimes.verify.weights import (
    Probe,
    Rounded,
    Verification,
    as_it_is,
    at_tokens,
    loaded,
    probe_batches,
    read_export,
    texts_found,
    unread,
)

PRICE_DB = 8.0
"""Least PSNR of the export against the graph as it is: what 4-bit weights and inputs leave of a small model."""

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def verify_serving(folder: Path, graph: Graph, *, tokenizer: Any = None, timeout: float = 3600.0) -> Verification:
    """Check the export in ``folder`` against the graph; ``runtimes.verify.verify`` says the rest."""
    about = read_about(folder)
    settings, dtype = _asked(folder, about)
    plan, errors = make_plan(graph, settings, dtype)
    if errors:
        return unread((hashes(folder, about), Finding("fits its graph", False, errors[0].what)))
    if settings.kv_cache is not None and {one.attention for one in caches_of(graph)[0]} != set(about["kept"]):
        what = "they are not those of the attentions of this graph"
        return unread((hashes(folder, about), Finding("scales of the cache", False, what)))
    files = (hashes(folder, about), _tensors(folder, plan, about, dtype), _config(folder, plan, dtype))
    if not all(finding.passed for finding in files):
        return unread(files)
    compute = torch.bfloat16 if plan.bf16_only or settings.bf16_only else torch.float32
    if settings.dialect == "hf":  # without a GPU transformers unpacks the weights, and leaves inputs as they are
        plan = _weight_only(plan)
    kept = _kept(about) if settings.kv_cache is not None else None
    scales = torch.float32 if settings.dialect == "modelopt" else dtype
    twin, probes = served(plan, about["inputs"], compute, kept, scales), probe_batches(graph)
    modules = [part.module for part in plan.parts]
    with readable(folder, settings.dialect) as view:
        read, facts = read_export(view, graph, probes, timeout, str(compute).removeprefix("torch."), modules)
    found = (*files, _read(loaded(read, facts), settings))
    if isinstance(read, str):
        return unread(found)
    before, theirs = (*found, _weights(plan, facts["weights"], compute)), at_tokens(read, probes)
    names = frozenset(part.name for part in plan.parts)
    rounded = Rounded(twin, dtype, compute, names)
    after = texts_found(facts, graph.kind, tokenizer)
    if kept is not None:
        plain = Rounded(served(plan, about["inputs"], compute), dtype, compute, names)
        after = [*caches.findings(plain, theirs, probes, kept, scales), *after]
    return _compared(before, graph, rounded, theirs, probes, after)


def _read(finding: Finding, settings: Serving) -> Finding:
    """Under the name of what was read: of ModelOpt's dialect transformers reads a translation."""
    return replace(finding, what="reads back translated") if settings.dialect == "modelopt" else finding


def _weight_only(plan: Plan) -> Plan:
    parts = tuple(replace(part, settings=replace(part.settings, weight_only=True)) for part in plan.parts)
    return replace(plan, parts=parts)


def _kept(about: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """The largest keys and values that the export was made for."""
    return {name: (float(k), float(v)) for name, (k, v) in about["kept"].items()}


def _asked(folder: Path, about: dict[str, Any]) -> tuple[Serving, torch.dtype]:
    """What was asked for, and the dtype of what is not packed."""
    try:
        settings = Serving(target=about["target"], **about["serving"])
        if not _known(settings) or not all(isinstance(seen, float) for seen in about["inputs"].values()):
            raise ValueError("serving")
        if settings.kv_cache is not None:
            _kept(about)
        return settings, _DTYPES[about["dtype"]]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise QcError(f"{folder / ABOUT} is damaged", fix="export again") from None


def _known(settings: Serving) -> bool:
    """Whether every option has a value that it can have; a file may say anything."""
    chosen = ((settings.scheme, Scheme), (settings.dialect, Dialect), (settings.kv_cache, KvCache))
    whole = settings.group is None or isinstance(settings.group, int)
    return whole and all(value is None or value in get_args(kind) for value, kind in chosen)


def _compared(
    before: tuple[Finding, ...],
    graph: Graph,
    rounded: Rounded,
    theirs: Tensor,
    probes: list[Probe],
    after: list[Finding],
) -> Verification:
    """The numbers, at all tokens that are not padding."""
    exact = at_tokens([rounded.run_on(*probe) for probe in probes], probes)
    ours = at_tokens([as_it_is(graph, *probe) for probe in probes], probes)
    off = (theirs.double() - exact.double()).abs().max().item()
    same = (theirs.argmax(-1) == exact.argmax(-1)).double().mean().item()
    price_db, difference = psnr_db(ours, theirs), (theirs.double() - ours.double()).abs().max().item()
    top1 = (theirs.argmax(-1) == ours.argmax(-1)).double().mean().item()
    price = f"{price_db:.1f} dB PSNR of {PRICE_DB:g} dB, max |Δ| {difference:.2g}, top-1 agreement {top1:.1%}"
    numbers = (
        Finding("computes as served", off == 0.0, f"max |Δ| {off:.2g} of 0, top-1 agreement {same:.1%}"),
        Finding("price of the format", price_db >= PRICE_DB, price),
    )
    return Verification((*before, *numbers, *after), psnr_db(exact, theirs), price_db, off, top1)


def _tensors(folder: Path, plan: Plan, about: dict[str, Any], dtype: torch.dtype) -> Finding:
    """Every tensor is there under its name, with its dtype and shape, and nothing else is."""
    try:
        stored = {name: s for path in sorted(folder.glob("*.safetensors")) for name, s in read_header(path).items()}
    except QcError as error:
        return Finding("tensors", False, error.what)
    wanted: dict[str, Tensor] = {}
    for part in plan.parts:
        inputs = layout.input_tensors(part.settings, about["inputs"].get(part.module, 0.0))
        made = layout.checkpoint_tensors(part.form, plan.planned(part), plan.shape(part), part.settings, dtype)
        wanted |= {f"{part.module}.{suffix}": value for suffix, value in {**made, **inputs}.items()}
    for attention, largest in _kept(about).items() if plan.settings.kv_cache is not None else ():
        wanted |= layout.cache_tensors(attention, largest, plan.settings, dtype)
    for name, value in wanted.items():
        found = stored.pop(name, None)
        if found is None:
            return Finding("tensors", False, f"{name} is missing")
        if (found.shape, found.dtype) != (tuple(value.shape), value.dtype):
            said = f"{value.dtype} {list(value.shape)}"
            return Finding("tensors", False, f"{name} is {found.dtype} {list(found.shape)}, not {said}")
    packed = {part.module for part in plan.parts}
    for name, s in stored.items():
        if name.rpartition(".")[0] in packed and not name.endswith(".bias"):
            return Finding("tensors", False, f"{name} belongs to no {plan.settings.target} weight")
        if s.dtype.is_floating_point and s.dtype is not dtype:
            return Finding("tensors", False, f"{name} is not {about['dtype']}")
    return Finding(
        "tensors", True, f"{len(plan.parts)} weights in {plan.settings.target}, {len(stored)} tensors beside"
    )


def _config(folder: Path, plan: Plan, dtype: torch.dtype) -> Finding:
    """What ``config.json`` says is what such weights need."""
    wanted = json.loads(json.dumps(config.quantization_config(plan, dtype)))
    try:
        found = json.loads((folder / "config.json").read_text()).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return Finding("configuration", False, "config.json cannot be read")
    if not isinstance(found, dict):
        return Finding("configuration", False, "config.json has no quantization_config")
    if plan.settings.dialect == "modelopt" and not _says(folder / "hf_quant_config.json", config.hf_quant_config(plan)):
        return Finding("configuration", False, "hf_quant_config.json is not that of these weights")
    wrong = next((key for key in {**wanted, **found} if wanted.get(key) != found.get(key)), None)
    if wrong is not None:
        return Finding("configuration", False, f"quantization_config.{wrong} is not that of these weights")
    return Finding("configuration", True, f"{wanted['quant_method']}, as these weights need it")


def _says(path: Path, wanted: Any) -> bool:
    try:
        return bool(json.loads(path.read_text()) == json.loads(json.dumps(wanted)))
    except (OSError, ValueError):
        return False


def _weights(plan: Plan, found: dict[str, str], compute: torch.dtype) -> Finding:
    """Every weight as transformers unpacks it is the graph's own, bit for bit."""
    for part in plan.parts:
        ours = unpack(part.form, plan.sides(part), compute).float().contiguous()
        if hashlib.sha256(ours.numpy().tobytes()).hexdigest() != found[part.module]:
            return Finding("weights", False, f"{part.name} unpacks to something else")
    return Finding("weights", True, f"{len(plan.parts)} unpack to the same bits")
