"""Verifying an export of two models that were joined: transformers loads both, a reader puts what is between there."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph import Graph
from graph.joint import take_apart
from graph.probe import psnr_db, vocabulary
from runtimes.verify.findings import Finding, hashes, read_about, read_afresh
from runtimes.verify.weights import DTYPES, ROUNDED_DB, WRITTEN_DB, Rounded, Verification, texts_found, unread


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
    if not isinstance(logits, Tensor):
        return unread((files, Finding("transformers loads it", False, logits)))
    loaded = Finding("transformers loads it", True, str(facts["model"]))
    texts = texts_found(facts, "causal-lm", tokenizer)
    chunks = texts_found({"tokenizer": facts["encoder"]}, "encoder", None)
    texts += [replace(one, what=f"{one.what} of the encoder") for one in chunks]
    return _compared((files, loaded), graph, probe, logits, about["dtype"], tuple(texts))


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
    from safetensors import safe_open
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="qc-verify-") as temporary:
        inputs, outputs = Path(temporary) / "inputs.safetensors", Path(temporary) / "outputs.safetensors"
        save_file(probe, inputs)
        failed = read_afresh("runtimes.verify.joint_worker", folder, inputs, outputs, timeout)
        if failed is not None:
            return failed, {}
        with safe_open(outputs, framework="pt") as file:
            return file.get_tensor("logits"), json.loads(file.metadata()["facts"])


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
    ours, exact, theirs = ours[at], exact[at], logits[at]
    written_db, rounded_db = psnr_db(exact, theirs), psnr_db(ours, theirs)
    difference = (theirs.double() - ours.double()).abs().max().item()
    top1 = (theirs.argmax(-1) == ours.argmax(-1)).double().mean().item()
    floor = ROUNDED_DB[dtype]
    price = f"{rounded_db:.1f} dB PSNR of {floor:g} dB, max |Δ| {difference:.2g}, top-1 agreement {top1:.1%}"
    numbers = (
        Finding("written right", written_db >= WRITTEN_DB, f"{written_db:.1f} dB PSNR of {WRITTEN_DB:g} dB"),
        Finding(f"rounded to {dtype}", rounded_db >= floor, price),
    )
    return Verification((*before, *numbers, *after), written_db, rounded_db, difference, top1)
