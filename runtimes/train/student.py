"""The graph as it is trained: a copy, cut before its head, with fused ops, in the dtype of the training.

The copy shares the trained tensors with the graph where they are fp32 on the same device; ``give_back`` writes the
result into the graph in any case.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graph import Graph, QcError
from graph.formats.fuse import fuse_dequantize, unnest_scales
from graph.joint import CHUNK_MASK, is_joint
from graph.lora import write_in_place
from graph.nest import nest
from graph.unpadded import without_padding
from runtimes.data import Batch
from runtimes.retrieval.questions import fits
from runtimes.settings import Retrieval, Train
from runtimes.train.chunked import chunkable, run_in_chunks
from runtimes.train.distribute import Processes, fill
from runtimes.train.layerwise import layers_of
from runtimes.train.losses import Features
from runtimes.train.memory import plan
from runtimes.train.objectives import cut_head, features
from runtimes.train.routing import weights_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Student:
    """What the loop trains."""

    def __init__(self, graph: Graph, settings: Train, processes: Processes, beside: int = 0):
        """``beside`` are the bytes that are needed for a teacher."""
        check(graph, settings)
        self.graph, self.processes = graph, processes
        self.dtype = DTYPES[settings.precision]
        self.has_mode = "training" in graph.inputs
        self.notes: tuple[str, ...] = ()
        work = graph.materialize().copy()
        self.cut = cut_head(work)
        self.layers = [] if settings.layerwise is None else layers_of(work, settings.layerwise)
        ends = [node for layer in self.layers for node in (layer.x, layer.y)]
        routed = [] if settings.routing is None else weights_of(work)
        self.watched = (len(ends), len(routed))
        if any(self.watched):
            work.set_outputs([*work.output_nodes(), *ends, *routed])
        work.verify()
        fuse_dequantize(work)
        unnest_scales(work)
        write_in_place(work)
        if is_joint(work) and not self.layers:
            without_padding(work, work.site(CHUNK_MASK).node)
        if work.dtype != self.dtype or work.device != processes.device:
            work.to(self.dtype, processes.device)
        names = [name for name, info in graph.tensors().items() if info.trainable]
        for name in names:
            work.set_tensor(name, graph.tensor(name).to(processes.device, torch.float32))
        again = settings.checkpointing
        if settings.memory is not None:
            again = self._fit(work, settings, names, beside)
        module: nn.Module = work.module
        blocks: tuple[str, ...] = ()
        if again or processes.sharded:
            nested = nest(work)
            module, blocks = nested, nested.qc_blocks
        if again:
            for block in blocks:
                _recompute(module.get_submodule(block))
        self.module = processes.wrap(module, blocks)
        inner = self.module.module if isinstance(self.module, nn.parallel.DistributedDataParallel) else self.module
        everything = dict(inner.named_parameters())
        self.parameters: Mapping[str, Tensor] = {name: everything[name] for name in names}

    def _fit(self, work: Graph, settings: Train, trained: Sequence[str], beside: int) -> bool:
        """Find what has to be computed again for a step to fit the memory; whether blocks do. MLPs are cut at once."""
        mlps, refused = chunkable(work)
        found = plan(work, settings, trained, mlps, beside, self.dtype)
        if found.chunk is not None:
            run_in_chunks(work, mlps, found.chunk)
        whole = f"; of MLPs, {refused[0]}" if refused and found.blocks else ""
        self.notes = (f"{found.said}{whole}",)
        return found.blocks

    def __call__(self, batch: Batch, training: bool, progress: float = 1.0) -> Features:
        """Run it; under bf16 the trained fp32 tensors are cast as they are used.

        ``progress`` is the share of the training that is done: what fades goes by it.
        """
        mode: dict[str, Any] = {"training": training} if self.has_mode else {}
        if "progress" in self.graph.inputs:
            mode["progress"] = progress
        bf16 = (
            torch.autocast(self.processes.device.type, torch.bfloat16)
            if self.dtype == torch.bfloat16
            else nullcontext()
        )
        with bf16:
            outputs: Any = self.module(**batch.inputs(), **mode)
        outputs, ends, routed = self._parted(outputs)
        pairs = tuple(zip(ends[::2], ends[1::2], strict=True))
        return replace(features(outputs, self.cut), layers=pairs, routing=tuple(routed))

    def _parted(self, outputs: Any) -> tuple[Any, Sequence[Tensor], Sequence[Tensor]]:
        """What a graph returned: its features, the ends of layers, and what it looked at."""
        if not any(self.watched):
            return outputs, (), ()
        first = len(outputs) - sum(self.watched)
        behind = first + self.watched[0]
        return outputs[:first] if self.cut else outputs[0], outputs[first:behind], outputs[behind:]

    def rest(self, names: Collection[str]) -> None:
        """Compute no gradients of these trained tensors from now on, and those of all others."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name not in names)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Give the trained tensors these values."""
        for name, parameter in self.parameters.items():
            fill(parameter, values[name])

    def give_back(self, values: Mapping[str, Tensor]) -> None:
        """Put the trained values into the graph, in the dtype they had there."""
        for name, value in values.items():
            self.graph.set_tensor(name, value.to(self.graph.device, self.graph.dtype_of(name), copy=True))


def check(graph: Graph, settings: Train) -> None:
    """Refuse what cannot be trained, or not in this way."""
    if settings.memory is not None and (is_joint(graph) or settings.layerwise is not None):
        what = "memory is planned for one model that trains as a whole"
        raise QcError(what, fix="take memory out, and set checkpointing")
    encodes = settings.objective.name == "embedding"
    if encodes and graph.kind != "encoder":
        what = f"this graph is of kind {graph.kind}; embedding trains encoders"
        raise QcError(what, fix="use kd, or give the model kind: encoder under models:")
    if graph.kind != "causal-lm" and not encodes:
        raise QcError(
            f"this graph is of kind {graph.kind}; causal-lm and kd train causal language models",
            fix="train with objective: embedding",
        )
    if isinstance(settings.data, Retrieval) and "memory_ids" not in graph.inputs:
        raise QcError(
            "the data asks questions about chunks, and the model reads no memory",
            fix="join an encoder and a decoder with attach-memory, or train on text",
        )
    for data in (settings.data, settings.eval_data):
        if isinstance(data, Retrieval):
            fits(graph, data)
    bare = [n for n in graph.tensors() if n not in graph.stored and graph.tensor(n).is_meta]
    if bare:
        raise QcError(
            f"the graph is a plan without weights: {bare[0]} has no value",
            fix="capture a folder with weights, not a configuration",
        )


def _recompute(block: nn.Module) -> None:
    """Make ``block`` keep its inputs only, and run again in the backward."""
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)
