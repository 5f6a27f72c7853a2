"""Verifying an ONNX model: ONNX Runtime reads what was saved and computes with it.

The reference is the graph in fp32 with its weights as they are. A model in fp32 differs from it by the order of
additions alone, however its weights are packed; what one in fp16 differs by is the price of the dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph import Graph, QcError
from graph.probe import psnr_db
from graph.sites import is_constant
from runtimes.export import ABOUT
from runtimes.export.onnx import DTYPES
from runtimes.verify.findings import Finding, Report, exchanged, hashes, read_about, same_tokens
from runtimes.verify.onnx_file import configuration, ports, weights_lie, weights_size
from runtimes.verify.onnx_probes import Probe, probes_of
from runtimes.verify.onnx_values import values_hold

MOST = 1e-4
"""Largest difference in fp32, for values of up to 10; where they are larger, this in their proportion."""

LEAST_DB = {"fp32": 90.0, "fp16": 40.0, "rounded": 60.0, "loose": 30.0}
"""PSNR against the graph: by dtype, and as ONNX Runtime sets itself, with 8 bits for what weights multiply.

``rounded`` is of a graph in fp32 that rounds what it computes to fp16: what is all but equal may be rounded apart.
"""


@dataclass(frozen=True)
class OnnxVerification(Report):
    """What was found of an export."""

    numbers: dict[str, float] = field(default_factory=dict)
    """``max_difference``, ``export/psnr_db`` and ``top1``, ``size_off``, and ``loose/psnr_db`` of packed weights."""

    def figures(self) -> dict[str, Any]:
        """For a report or ``--json``."""
        return {"passed": self.passed, "export/psnr_db": -math.inf, "top1": 0.0, **self.numbers}


def verify_onnx(folder: Path, graph: Graph, *, tokenizer: Any = None, timeout: float = 3600.0) -> OnnxVerification:
    """Check the model in ``folder`` against the graph; ``runtimes.verify.verify`` says the rest."""
    about = _about(folder)
    dtype, kv = about["dtype"], about["kv"]
    findings = [hashes(folder, about)]
    if findings[0].passed:
        findings.append(weights_lie(folder))
    if not all(finding.passed for finding in findings):
        return OnnxVerification(tuple(findings))
    exact = graph.copy().to(torch.float32)
    size, packed, numbers = weights_size(folder, exact, 2 if dtype == "fp16" else 4)
    findings += [size, configuration(folder, exact, dtype), ports(folder, exact, kv, DTYPES[dtype])]
    if not findings[-1].passed:
        return OnnxVerification(tuple(findings), numbers)
    findings.append(values_hold(folder, exact, DTYPES[dtype]))
    probes = probes_of(exact, kv, tokenizer)
    read = _read(folder, probes, packed, timeout)
    if isinstance(read, str):
        return OnnxVerification((*findings, Finding("ONNX Runtime reads it", False, read)), numbers)
    found, facts = read
    findings.append(Finding("ONNX Runtime reads it", True, ", ".join(facts["outputs"][:3])))
    ours, limit = [_of_graph(exact, probe) for probe in probes], "rounded" if _rounds(exact) else "fp32"
    for text, what in ((False, "on random tokens"), (True, "on text")):
        findings += _compared(
            what, limit if dtype == "fp32" else dtype, probes, ours, found, [p.text == text for p in probes], numbers
        )
    if packed:
        findings.append(_loose(probes, ours, found, numbers))
    findings.append(same_tokens(facts["tokenizer"], tokenizer))
    return OnnxVerification(tuple(findings), numbers)


def _about(folder: Path) -> dict[str, Any]:
    about = read_about(folder)
    if about.get("dtype") not in DTYPES or not isinstance(about.get("kv"), bool):
        raise QcError(f"{folder / ABOUT} is damaged", fix="export again")
    return about


def _read(
    folder: Path, probes: Sequence[Probe], loose: bool, timeout: float
) -> tuple[dict[str, Tensor], dict[str, Any]] | str:
    """What ONNX Runtime computes, in a process of its own; or why it does not."""
    given = {f"ids_{i}": probe.ids for i, probe in enumerate(probes)}
    given |= {f"mask_{i}": probe.mask for i, probe in enumerate(probes)}
    asked = {"pieces": [probe.pieces for probe in probes], "loose": loose}
    return exchanged("onnx_worker", folder, given, {"asked": json.dumps(asked)}, timeout)


def _of_graph(exact: Graph, probe: Probe) -> Tensor:
    with torch.no_grad():
        out: Tensor = exact(input_ids=probe.ids.to(exact.device), attention_mask=probe.mask.to(exact.device))
    return out.float().cpu()


def _tokens(values: Sequence[Tensor], probes: Sequence[Probe]) -> Tensor:
    """[B, T, d] of every probe  ->  [tokens, d], padding left out."""
    return torch.cat([value[probe.mask.bool()] for value, probe in zip(values, probes, strict=True)])


def _rounds(exact: Graph) -> bool:
    """Whether the graph rounds to fp16 what depends on its inputs."""
    return any(not is_constant(site.node) for site in exact.sites("qc.ste_fp16"))


def _compared(
    what: str,
    kind: str,
    probes: Sequence[Probe],
    ours: Sequence[Tensor],
    found: dict[str, Tensor],
    chosen: Sequence[bool],
    numbers: dict[str, float],
) -> list[Finding]:
    """The numbers of some probes, and whether they are within the limits of ``kind``."""
    those = [i for i, yes in enumerate(chosen) if yes]
    if not those:
        return []
    a = _tokens([ours[i] for i in those], [probes[i] for i in those])
    b = _tokens([found[f"out_{i}"] for i in those], [probes[i] for i in those])
    difference = (b.double() - a.double()).abs().max().item()
    psnr, top1 = psnr_db(a, b), (a.argmax(-1) == b.argmax(-1)).double().mean().item()
    most = MOST * max(1.0, a.abs().max().item() / 10)
    passed = psnr >= LEAST_DB[kind] and (kind != "fp32" or difference <= most)
    limit = f" of {most:.2g}" if kind == "fp32" else ""
    told = f"max |Δ| {difference:.2g}{limit}, {psnr:.1f} dB PSNR of {LEAST_DB[kind]:g} dB, top-1 agreement {top1:.1%}"
    if what == "on text":
        numbers |= {"text/max_difference": difference, "text/psnr_db": psnr, "text/top1": top1}
    else:
        numbers |= {"max_difference": difference, "export/psnr_db": psnr, "top1": top1}
    return [Finding(what, passed, told)]


def _loose(
    probes: Sequence[Probe], ours: Sequence[Tensor], found: dict[str, Tensor], numbers: dict[str, float]
) -> Finding:
    """As ONNX Runtime computes where nobody tells it how exactly."""
    a = _tokens(ours, probes)
    b = _tokens([found[f"loose_{i}"] for i in range(len(probes))], probes)
    numbers["loose/psnr_db"] = psnr = psnr_db(a, b)
    numbers["loose/top1"] = top1 = (a.argmax(-1) == b.argmax(-1)).double().mean().item()
    told = f"{psnr:.1f} dB PSNR of {LEAST_DB['loose']:g} dB, top-1 agreement {top1:.1%}"
    return Finding("as ONNX Runtime sets itself", psnr >= LEAST_DB["loose"], told)
