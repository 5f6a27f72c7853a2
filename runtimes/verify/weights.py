"""Verifying an export of weights: transformers loads it and computes with it.

Two references, because two things can go wrong. *Written right*: the graph in fp32 with every weight rounded to the
export's dtype; transformers must agree to 70 dB, for nothing is left but the order of additions. *Rounded well*: the
graph as it is; what is lost there is the price of the dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from graph import Graph, QcError
from graph.core import Streaming
from graph.dense import constant_nodes
from graph.probe import psnr_db, vocabulary
from graph.sites import Site
from graph.weights import read_header
from runtimes.export import ABOUT
from runtimes.verify.findings import PROBE_TEXTS, Finding, Report, exchanged, hashes, read_about

Probe: TypeAlias = tuple[Tensor, Tensor]
"""Tokens and mask, [B, T] each."""

WRITTEN_DB = 70.0
"""PSNR of the export against the graph with rounded weights."""

ROUNDED_DB = {"fp32": 70.0, "fp16": 45.0, "bf16": 25.0}
"""PSNR of the export against the graph as it is, by the export's dtype."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The dtypes of exports."""


@dataclass(frozen=True)
class Verification(Report):
    """What was found of an export."""

    psnr_db: float
    """Against the graph with rounded weights: ``export/psnr_db``."""

    rounded_db: float
    """Against the graph as it is."""

    max_difference: float
    """Largest |export - graph| over all logits, the graph as it is."""

    top1: float
    """Share of positions where both find the same token likeliest; of encoders the same largest component."""

    def figures(self) -> dict[str, float | bool]:
        """For a report or ``--json``."""
        return {
            "passed": self.passed, "export/psnr_db": self.psnr_db, "rounded_db": self.rounded_db,
            "max_difference": self.max_difference, "top1": self.top1,
        }  # fmt: skip


def verify_weights(
    folder: Path,
    graph: Graph,
    *,
    tokenizer: Any = None,
    timeout: float = 3600.0,
    probes: list[Probe] | None = None,
) -> Verification:
    """Check the export in ``folder`` against the ``graph`` it was made of; it may lie on disk still.

    ``tokenizer`` is that of the model, to compare the export's with; without it, the export's must agree with itself.
    ``timeout`` in seconds is for the process that reads the export. Without ``probes`` they are a few fixed batches.
    """
    about = _about(folder)
    files = (hashes(folder, about), _headers(folder, about))
    if not all(finding.passed for finding in files):
        return unread(files)
    probes = probe_batches(graph) if probes is None else probes
    read, facts = read_export(folder, graph, probes, timeout)
    before = (*files, loaded(read, facts))
    if isinstance(read, str):
        return unread(before)
    return _compared(before, graph, probes, read, about["dtype"], texts_found(facts, graph.kind, tokenizer))


def loaded(read: Any, facts: dict[str, Any]) -> Finding:
    """Whether transformers loads an export: which model it is, or why not."""
    failed = isinstance(read, str)
    return Finding("transformers loads it", not failed, str(read if failed else facts["model"]))


def unread(findings: tuple[Finding, ...]) -> Verification:
    return Verification(findings, -math.inf, -math.inf, math.inf, 0.0)


def _compared(
    before: tuple[Finding, ...], graph: Graph, probes: list[Probe], read: list[Tensor], dtype: str, after: list[Finding]
) -> Verification:
    """The numbers, at all tokens that are not padding."""
    rounded = Rounded(graph, DTYPES[dtype])
    ours = at_tokens([as_it_is(graph, *probe) for probe in probes], probes)
    exact = at_tokens([rounded.run_on(*probe) for probe in probes], probes)
    return compared(before, exact, ours, at_tokens(read, probes), dtype, after)


def compared(
    before: Sequence[Finding], exact: Tensor, ours: Tensor, theirs: Tensor, dtype: str, after: Sequence[Finding]
) -> Verification:
    """What an export computes, against its graph and against that with weights rounded to ``dtype``.

    exact, ours, theirs: [tokens, d], of the rounded graph, of the graph and of the export
    """
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


def at_tokens(values: list[Tensor], probes: list[Probe]) -> Tensor:
    """[B, T, d] of every probe  ->  [tokens, d]."""
    return torch.cat([value[mask.bool()] for value, (_, mask) in zip(values, probes, strict=True)])


# -- the files ------------------------------------------------------------------------------------------------------


def _about(folder: Path) -> dict[str, Any]:
    about = read_about(folder)
    if about.get("dtype") not in DTYPES:
        raise QcError(f"{folder / ABOUT} is damaged", fix="export again")
    return about


def _headers(folder: Path, about: dict[str, Any]) -> Finding:
    """The safetensors files as their own headers describe them."""
    count = 0
    dtype = DTYPES[about["dtype"]]
    for path in sorted(folder.glob("*.safetensors")):
        try:
            stored = read_header(path)
        except QcError as error:
            return Finding("tensors", False, error.what)
        wrong = next((n for n, s in stored.items() if s.dtype.is_floating_point and s.dtype is not dtype), None)
        if wrong is not None:
            return Finding("tensors", False, f"{wrong} is not {about['dtype']}")
        count += len(stored)
    return Finding("tensors", count > 0, f"{count} in {about['dtype']}")


# -- the reader -----------------------------------------------------------------------------------------------------


def probe_batches(graph: Graph) -> list[Probe]:
    """Fixed tokens and masks [B, T]: a batch without padding, one padded on the right, one on the left; two lengths."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for batch, length, side in ((2, 24, None), (3, 17, "right"), (3, 17, "left")):
        ids = torch.randint(0, vocabulary(graph), (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        if side == "right":
            mask[1, -5:] = 0
        elif side == "left":
            mask[1, :5] = 0
        found.append((ids, mask))
    return found


def read_export(
    folder: Path,
    graph: Graph,
    probes: list[Probe],
    timeout: float,
    compute: str = "float32",
    modules: Collection[str] = (),
) -> tuple[list[Tensor] | str, dict[str, Any]]:
    """What transformers computes on the probes, in a process of its own, and its facts; or why it does not.

    It loads the export in the dtype ``compute``, and tells the sha256 of the weights of ``modules`` as it unpacks them.
    """
    named = {f"ids_{i}": ids for i, (ids, _) in enumerate(probes)} | {
        f"mask_{i}": mask for i, (_, mask) in enumerate(probes)
    }
    asked = {"kind": graph.kind, "dtype": compute, "modules": json.dumps(list(modules))}
    read = exchanged("weights_worker", folder, named, asked, timeout)
    if isinstance(read, str):
        return read, {}
    tensors, facts = read
    return [tensors[f"out_{i}"] for i in range(len(probes))], facts


def texts_found(facts: dict[str, Any], kind: str, tokenizer: Any) -> list[Finding]:
    """What the reader found of tokenizer and generation settings."""
    said, found = facts["tokenizer"], []
    if said is None:
        found.append(Finding("tokenizer", tokenizer is None, "none" if tokenizer is None else "missing"))
    else:
        wanted = said["ids"] if tokenizer is None else [tokenizer(text)["input_ids"] for text in PROBE_TEXTS]
        same = said["ids"] == wanted and said["again"] == said["ids"]
        good = f"round trip of {len(PROBE_TEXTS)} texts" + (", with a chat template" if said["chat"] else "")
        found.append(Finding("tokenizer", same, good if same else "a round trip gives other tokens"))
    if kind == "causal-lm":
        there = facts["generation"]
        found.append(Finding("generation settings", there, "there" if there else "generation_config.json is missing"))
    return found


# -- the references -------------------------------------------------------------------------------------------------


def as_it_is(graph: Graph, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = graph(input_ids=ids.to(graph.device), attention_mask=mask.to(graph.device))
    return out.float().cpu()


class Rounded(Streaming):
    """Runs a graph with its weights as an export holds them: rounded to ``dtype`` where an op reads them.

    It computes in fp32, if nothing else is asked for. It works on the values alone, whatever their names and packing,
    so it shares nothing with the exporter.
    """

    def __init__(
        self,
        graph: Graph,
        dtype: torch.dtype,
        compute: torch.dtype = torch.float32,
        packed: Collection[str] = (),
    ):
        """The weights named ``packed`` are left as the graph, in ``compute``, unpacks them."""
        source = graph.copy()
        was = {node: node.meta["val"] for node in constant_nodes(source)}
        if source.dtype is not compute:
            source.to(compute)
        super().__init__(source)
        self.compute = compute
        floats = {
            node: val
            for node, val in was.items()
            if isinstance(val, Tensor) and val.is_floating_point() and not _is_of(source, node, packed)
        }
        self.steps = {node: (val.dtype, dtype) for node, val in floats.items()}

    def run_on(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The output for tokens and mask [B, T], in fp32."""
        device = self.source.device
        out: Tensor = self.run_with({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
        return out.float().cpu()

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """The arguments of an op, its weights rounded; an expression on nothing but weights is rounded at its end."""
        if n in self.steps:
            return super().fetch_args_kwargs_from_env(n)
        kept = {arg: self.env[arg] for arg in n.all_input_nodes if arg in self.steps and self._written(arg)}
        for arg, value in kept.items():
            for dtype in self.steps[arg]:  # that of the graph first, in which it unpacks what is packed
                value = value.to(dtype)
            self.env[arg] = value.to(self.compute)
        result = super().fetch_args_kwargs_from_env(n)
        self.env.update(kept)
        return result

    def _written(self, node: fx.Node) -> bool:
        names = [str(node.target)] if node.op == "get_attr" else Site(self.source, node).tensors()
        return any(self.source.info(name).saved for name in names)


def _is_of(graph: Graph, node: fx.Node, weights: Collection[str]) -> bool:
    """Whether a value is made of the side tensors of one of these weights."""
    names = [str(node.target)] if node.op == "get_attr" else Site(graph, node).tensors()
    return any(name.rpartition(".")[0] in weights for name in names)
