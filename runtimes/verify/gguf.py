"""Verifying a GGUF file: transformers reads it, unpacks it with the package ``gguf``, and computes in fp32.

The reference is the graph with its weights as the file should hold them, rounded anew from the graph and never from the
file. Nothing is left to differ: weights are compared bit for bit, logits to the last digit. Where the graph rounds the
tokens that its linears read, that is left out on both sides: no GGUF file says it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph import Graph
from graph.formats import Ternary
from graph.formats.format import unpack
from graph.formats.tokens import with_plain_tokens
from graph.probe import psnr_db
from runtimes.export._gguf import name_map, package
from runtimes.export.gguf import FILE
from runtimes.serving.gguf import Plan, make_plan, packed_copy
from runtimes.verify.findings import Finding, hashes, read_about
from runtimes.verify.weights import (
    ROUNDED_DB,
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
"""Least PSNR against the graph as it is, where its weights were rounded on the way out."""


def verify_gguf(folder: Path, graph: Graph, *, tokenizer: Any = None, timeout: float = 3600.0) -> Verification:
    """Check the export in ``folder`` against the graph; ``runtimes.verify.verify`` says the rest."""
    about = read_about(folder)
    graph = with_plain_tokens(graph)
    plan, errors = make_plan(graph, about.get("encoding"))
    if errors:
        return unread((hashes(folder, about), Finding("fits its graph", False, errors[0].what)))
    files = [hashes(folder, about)]
    files += [_tensors(folder / FILE, graph, plan)] if files[0].passed else []
    if not all(finding.passed for finding in files):
        return unread(tuple(files))
    probes = probe_batches(graph)
    read, facts = read_export(folder, graph, probes, timeout, modules=[one.module for one in plan.packed])
    files.append(loaded(read, facts))
    if isinstance(read, str):
        return unread(tuple(files))
    before = (*files, _weights(graph, plan, facts["weights"]))
    return _compared(before, graph, plan, at_tokens(read, probes), probes, texts_found(facts, graph.kind, tokenizer))


def _tensors(file: Path, graph: Graph, plan: Plan) -> Finding:
    """Every tensor is there under its name, in its shape and encoding, and nothing else is."""
    names = name_map(graph.config)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {names[one.name]: (one.encoding, one.shape) for one in plan.packed}
    wanted |= {names[one.name]: ("F16" if len(one.shape) > 1 else "F32", one.shape) for one in plan.kept}
    try:
        read = package().GGUFReader(file).tensors
    except (OSError, ValueError, IndexError, KeyError) as error:
        return Finding("tensors", False, f"the package gguf cannot read {file.name}: {error}")
    found = {one.name: (one.tensor_type.name, tuple(map(int, reversed(one.shape)))) for one in read}
    for name in {**wanted, **found}:
        if name not in found or name not in wanted:
            return Finding("tensors", False, f"{name} is {'missing' if name in wanted else 'of no weight'}")
        if found[name] != wanted[name]:
            (encoding, shape), (other, there) = wanted[name], found[name]
            return Finding("tensors", False, f"{name} is {other} {list(there)}, not {encoding} {list(shape)}")
    kinds = sorted({one.encoding for one in plan.packed})
    return Finding("tensors", True, f"{len(plan.packed)} weights in {' and '.join(kinds)}, {len(plan.kept)} beside")


def _weights(graph: Graph, plan: Plan, found: dict[str, str]) -> Finding:
    """Every weight as transformers unpacks it is the graph's own, bit for bit."""
    for one in plan.packed:
        ours = unpack(one.form, one.sides(graph), torch.float32).cpu()
        if isinstance(one.form, Ternary):
            ours = ours.half().float()  # that of its scale
        elif one.encoding == "MXFP4":
            ours = ours.add_(0.0)  # in its table a zero has no sign
        if hashlib.sha256(ours.contiguous().numpy().tobytes()).hexdigest() != found[one.module]:
            return Finding("weights", False, f"{one.name} unpacks to something else")
    return Finding("weights", True, f"{len(plan.packed)} unpack to the same bits")


def _compared(
    before: tuple[Finding, ...], graph: Graph, plan: Plan, theirs: Tensor, probes: list[Probe], after: list[Finding]
) -> Verification:
    """The numbers, at all tokens that are not padding."""
    integers = frozenset(one.name for one in plan.packed if not isinstance(one.form, Ternary))
    rounded = Rounded(packed_copy(graph, plan), torch.float16, packed=integers)
    exact = at_tokens([rounded.run_on(*probe) for probe in probes], probes)
    ours = at_tokens([as_it_is(graph, *probe) for probe in probes], probes)
    off = (theirs.double() - exact.double()).abs().max().item()
    price_db, difference = psnr_db(ours, theirs), (theirs.double() - ours.double()).abs().max().item()
    top1 = (theirs.argmax(-1) == ours.argmax(-1)).double().mean().item()
    floor = ROUNDED_DB["fp16"] if all(one.held for one in plan.packed) else PRICE_DB
    price = f"{price_db:.1f} dB PSNR of {floor:g} dB, max |Δ| {difference:.2g}, top-1 agreement {top1:.1%}"
    numbers = (
        Finding("computes as written", off == 0.0, f"max |Δ| {off:.2g} of 0"),
        Finding("price of the format", price_db >= floor, price),
    )
    return Verification((*before, *numbers, *after), psnr_db(exact, theirs), price_db, off, top1)
