"""Verifying an export of two models that were joined: transformers loads both, a reader puts what is between there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph import Graph
from graph.joint import take_apart
from graph.probe import vocabulary
from runtimes.verify.findings import Finding, exchanged, hashes, read_about
from runtimes.verify.weights import DTYPES, Rounded, Verification, compared, loaded, texts_found, unread


def verify_joint(folder: Path, graph: Graph, *, tokenizer: Any = None, timeout: float = 3600.0) -> Verification:
    """Check the export in ``folder`` against the joint ``graph`` of it, as ``verify_weights`` does for one model.

    The probe has a row whose chunks are padded, one with a single chunk, and one with nothing to look up.
    """
    about = read_about(folder)
    files = hashes(folder, about)
    if not files.passed:
        return unread((files,))
    probe = probe_of(graph)
    logits, facts = _read(folder, probe, timeout)
    before = (files, loaded(logits, facts))
    if isinstance(logits, str):
        return unread(before)
    texts = texts_found(facts, "causal-lm", tokenizer)
    chunks = texts_found({"tokenizer": facts["encoder"]}, "encoder", None)
    texts += [replace(one, what=f"{one.what} of the encoder") for one in chunks]
    return _compared(before, graph, probe, logits, about["dtype"], tuple(texts))


def probe_of(graph: Graph) -> dict[str, Tensor]:
    """Fixed tokens for decoder and encoder."""
    encoder, decoder = take_apart(graph)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary(decoder), (4, 13), generator=generator)
    chunks = torch.randint(0, vocabulary(encoder), (4, 2, 7), generator=generator)
    mask, kept = torch.ones_like(ids), torch.ones_like(chunks)
    mask[1, -4:] = 0
    kept[1, 0, 4:], kept[2, 1], kept[3] = 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask, "memory_ids": chunks, "memory_attention": kept}


def _read(folder: Path, probe: dict[str, Tensor], timeout: float) -> tuple[Tensor | str, dict[str, Any]]:
    """The logits of the reader and its facts, or why there are none."""
    read = exchanged("joint_worker", folder, probe, None, timeout)
    return (read, {}) if isinstance(read, str) else (read[0]["logits"], read[1])


def _compared(
    before: tuple[Finding, ...],
    graph: Graph,
    probe: dict[str, Tensor],
    logits: Tensor,
    dtype: str,
    after: tuple[Finding, ...],
) -> Verification:
    """The numbers, at all tokens that are not padding."""
    inputs = {name: value.to(graph.device) for name, value in probe.items()}
    kept = [n for n, info in graph.tensors().items() if info.role.startswith("gca.") and len(graph.shape(n)) == 1]
    with torch.no_grad():
        ours = graph(**inputs).float().cpu()
        rounded = Rounded(graph, DTYPES[dtype], packed=[name.rpartition(".")[0] for name in kept])
        exact = rounded.run_with(inputs).float().cpu()
    at = probe["attention_mask"].bool()
    return compared(before, exact[at], ours[at], logits[at], dtype, after)
