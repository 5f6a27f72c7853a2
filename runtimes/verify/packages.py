"""Verifying Core ML packages: the interpreter reads what was saved and computes with it, in each of its modes.

The reference is the graph in fp32 with its weights as they are. What fp32 mode differs by is what the packages hold
otherwise than the graph, scales rounded to fp16 for the most part; what fp16 and ane mode differ by is what a device
may add to that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph import Graph
from graph.probe import padding_tokens, psnr_db
from runtimes.coreml.encoder import pooling, pools
from runtimes.coreml.meta import Meta, read_meta
from runtimes.generate import Generator
from runtimes.mil import MODES
from runtimes.sampling import Sampling
from runtimes.verify.findings import Finding, Report, exchanged, hashes, read_about, same_tokens
from runtimes.verify.probes import Row, decoder_rows, encoder_rows, greedy_prompts, greedy_tokens, memory_probe
from runtimes.verify.similarities import ranked, sentence_rows, similarities

LEAST_DB = {"fp32": 60.0, "fp16": 40.0, "ane": 40.0}
"""PSNR against the graph, by mode."""

_TIE = 4.0
"""Two tokens whose logits differ by less than so many times the largest error of fp32 mode are as likely."""


@dataclass(frozen=True)
class PackageVerification(Report):
    """What was found of an export."""

    numbers: dict[str, float] = field(default_factory=dict)
    """``fp32/psnr_db``, ``fp32/top1``, ``fp32/max_difference`` and so on for each mode."""

    def figures(self) -> dict[str, Any]:
        """For a report or ``--json``. ``export/psnr_db`` is that of fp16 mode, what a device computes at best."""
        psnr, top1 = self.numbers.get("fp16/psnr_db", -math.inf), self.numbers.get("fp16/top1", 0.0)
        return {"passed": self.passed, "export/psnr_db": psnr, "top1": top1, **self.numbers}


def verify_packages(
    folder: Path, graph: Graph, *, tokenizer: Any = None, timeout: float = 3600.0
) -> PackageVerification:
    """Check the packages in ``folder`` against the graph; ``runtimes.verify.verify`` says the rest."""
    files = hashes(folder, read_about(folder))
    if not files.passed:
        return PackageVerification((files,))
    meta = read_meta(folder)
    rows = decoder_rows(meta) if meta.kind == "causal-lm" else encoder_rows(meta, padding_tokens(graph))
    prompts = greedy_prompts(meta, tokenizer) if meta.kind == "causal-lm" else []
    sentences = _sentences(meta, tokenizer)
    read = _read(folder, meta, rows, {"prompt": prompts, "sentence": sentences}, timeout)
    if isinstance(read, str):
        return PackageVerification((files, Finding("the interpreter reads it", False, read)))
    exact = _in_fp32(graph)
    findings = [files, Finding("the interpreter reads it", True, str(read.facts["packages"]))]
    numbers: dict[str, float] = {}
    memory = memory_of(memory_probe(meta))
    wanted = [_hidden(exact, row.ids, memory if row.memory else {})[row.seen :] for row in rows]
    for mode in MODES:
        findings.append(_compared(mode, rows, wanted, read, numbers))
    if prompts:
        findings.append(_greedy(exact, prompts, read, numbers))
    if sentences:
        alike = similarities(partial(_hidden, exact), pooling(folder), sentences)
        findings.append(ranked(alike, {mode: read.values[f"{mode}_similarities"] for mode in MODES}, numbers))
    findings.append(same_tokens((read.facts["tokenizer"] or {}).get("ids"), tokenizer))
    return PackageVerification(tuple(findings), numbers)


@dataclass(frozen=True)
class _Read:
    values: dict[str, Tensor]
    facts: dict[str, Any]


def _sentences(meta: Meta, tokenizer: Any) -> list[list[int]]:
    """The sentences whose similarities are looked at: none of a model whose hidden states are no embeddings."""
    if meta.kind != "encoder" or tokenizer is None or not pools(meta.folder):
        return []
    return sentence_rows(tokenizer, max(meta.parts[0].functions.values()))


def _read(
    folder: Path, meta: Meta, rows: list[Row], texts: Mapping[str, list[list[int]]], timeout: float
) -> _Read | str:
    """What the packages compute, in a process of its own; or why it does not."""
    given = {f"row_{i}": torch.tensor(row.ids) for i, row in enumerate(rows)}
    given |= memory_probe(meta)
    given |= {f"{kind}_{i}": torch.tensor(ids) for kind, of in texts.items() for i, ids in enumerate(of)}
    asked = {
        "rows": [{"pieces": row.pieces, "modes": row.modes, "seen": row.seen, "memory": row.memory} for row in rows],
        "tokens": greedy_tokens(meta),
        "kind": meta.kind,
    }
    read = exchanged("packages_worker", folder, given, {"asked": json.dumps(asked)}, timeout)
    return read if isinstance(read, str) else _Read(*read)


def _in_fp32(graph: Graph) -> Graph:
    exact = graph.copy()
    if exact.dtype is not torch.float32:
        exact.to(torch.float32)
    return exact


def memory_of(probe: dict[str, Tensor]) -> dict[str, Tensor]:
    """A memory as inputs of a graph: keys, values, and a mask that hides none of them."""
    tokens = next((value.shape[2] for value in probe.values()), 0)
    return probe | ({"memory_mask": torch.ones(1, tokens, dtype=torch.int64)} if probe else {})


def _hidden(exact: Graph, row: Sequence[int], memory: Mapping[str, Tensor] | None = None) -> Tensor:
    """What the graph gives behind each token, [tokens, V or C]."""
    ids = torch.tensor([list(row)], device=exact.device)
    with torch.no_grad():
        found: Tensor = exact(input_ids=ids, attention_mask=torch.ones_like(ids), **(memory or {}))
    return found[0].float().cpu()


def _compared(mode: str, rows: list[Row], wanted: list[Tensor], read: _Read, numbers: dict[str, float]) -> Finding:
    """The numbers of one mode, over all tokens that it was asked for."""
    asked = [i for i, row in enumerate(rows) if mode in row.modes]
    theirs = torch.cat([read.values[f"{mode}_{i}"] for i in asked])
    ours = torch.cat([wanted[i] for i in asked])
    numbers[f"{mode}/psnr_db"] = found = psnr_db(ours, theirs)
    numbers[f"{mode}/top1"] = top1 = (theirs.argmax(-1) == ours.argmax(-1)).double().mean().item()
    numbers[f"{mode}/max_difference"] = difference = (theirs.double() - ours.double()).abs().max().item()
    least = LEAST_DB[mode]
    told = f"{found:.1f} dB PSNR of {least:g} dB, max |Δ| {difference:.2g}, top-1 agreement {top1:.1%}"
    where = read.facts["infinite"].get(mode)
    if where is not None:
        told = f"values are not finite from {where} on"
    return Finding(f"in {mode} arithmetic", found >= least and where is None, told)


def _greedy(exact: Graph, prompts: list[list[int]], read: _Read, numbers: dict[str, float]) -> Finding:
    """The likeliest tokens behind some prompts, over prefill and decode, are those that the graph generates."""
    count = read.values["greedy"].shape[1]
    generator = Generator(exact, _NoText(), eos=())
    found = [generator([ids], Sampling(max_tokens=count)).rows[0].ids for ids in prompts]
    ties = 0
    for number, (ids, ours) in enumerate(zip(prompts, found, strict=True)):
        theirs = read.values["greedy"][number].tolist()
        step = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if step is None:
            continue
        logits = _hidden(exact, [*ids, *ours[:step]])[-1]
        gap = float(logits[ours[step]] - logits[theirs[step]])
        if gap > _TIE * numbers["fp32/max_difference"]:
            what = f"prompt {number + 1} gives {theirs[step]} and not {ours[step]} as token {step + 1}"
            return Finding("greedy tokens", False, f"{what}, {gap:.2g} less likely in logits")
        ties += 1
    numbers |= {"greedy/prompts": len(prompts), "greedy/same": len(prompts) - ties, "greedy/tokens": count}
    same = f"{len(prompts)} prompts, {count} tokens each, the same as the graph's"
    return Finding("greedy tokens", True, same + (f"; {ties} leave at a tie" if ties else ""))


class _NoText:
    """Stands in for a tokenizer where only tokens count."""

    pad_token_id = 0

    def decode(self, ids: Sequence[int], **_: object) -> str:
        """No text at all."""
        return ""
