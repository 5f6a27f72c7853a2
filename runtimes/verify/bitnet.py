"""Verifying an export in BitNet's packing: transformers loads it, and rounds its tokens itself.

Where a value lies half-way between two steps of a token's scale, two ways to round it part; so the goal is that of an
8-bit computation, not that of a file that is read back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graph import Graph
from graph.probe import psnr_db
from runtimes.verify.findings import Finding, hashes, read_about
from runtimes.verify.weights import (
    Verification,
    as_it_is,
    at_tokens,
    loaded,
    probe_batches,
    read_export,
    texts_found,
    unread,
)

GOAL_DB, AGREEMENT = 35.0, 0.97
"""The least PSNR, and the least share of tokens at which both find the same one likeliest."""


def verify_bitnet(folder: Path, graph: Graph, *, tokenizer: Any = None, timeout: float = 3600.0) -> Verification:
    """Check the export in ``folder`` against the ``graph`` it was made of; arguments as of ``verify_weights``."""
    files = (hashes(folder, read_about(folder)),)
    if not files[0].passed:
        return unread(files)
    probes = probe_batches(graph)
    read, facts = read_export(folder, graph, probes, timeout)
    before = (*files, loaded(read, facts))
    if isinstance(read, str):
        return unread(before)
    ours, theirs = at_tokens([as_it_is(graph, *probe) for probe in probes], probes), at_tokens(read, probes)
    decibels, top1 = psnr_db(ours, theirs), float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    found = (
        *before,
        Finding("computes the same", decibels >= GOAL_DB, f"{decibels:.1f} dB PSNR of {GOAL_DB:g} dB"),
        Finding("likeliest tokens", top1 >= AGREEMENT, f"the same at {top1:.1%}, of {AGREEMENT:.0%}"),
        *texts_found(facts, graph.kind, tokenizer),
    )
    return Verification(found, decibels, decibels, float((ours - theirs).abs().max()), top1)
