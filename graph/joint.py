"""Two graphs as one: an encoder that makes the memory which a decoder reads.

    encoder   model.norm(input_ids)                       decoder   lm_head(input_ids, memory)
    joint     encoder.model.norm(chunks of memory_ids)  ->  join_chunks  ->  decoder.lm_head(input_ids, ·)

Sites and tensors take the name of their model in front. The encoder is stack 0 with the first blocks, the decoder
stack 1 with those behind them. ``take_apart`` goes the other way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from graph.core import Graph, TensorInfo
from graph.errors import QcError
from graph.gca import MASK, MEMORY, VALUE, has_memory
from graph.ops import find_op
from graph.shapes import dims_of
from graph.sites import node_name, set_tag
from graph.weights import Stored

IDS, ATTENTION = "memory_ids", "memory_attention"
"""The inputs of a joint graph that the encoder reads."""

BETWEEN = "memory"
"""What the sites between the two are called after."""


@dataclass(frozen=True)
class Names:
    """What the two models of a joint graph are called."""

    encoder: str = "encoder"
    decoder: str = "decoder"


def is_joint(graph: Graph) -> bool:
    """Whether the graph makes its own memory."""
    return IDS in graph.inputs


def names_of(graph: Graph) -> Names:
    """The names that the parts of a joint graph have."""
    return Names(**graph.config["joint"]["names"])


def home_of(graph: Graph, tensor: str) -> tuple[str, str]:
    """The model that a tensor belongs to, and its name there; of a graph that is not joint, no name and its own."""
    if is_joint(graph):
        for name in vars(names_of(graph)).values():
            if tensor.startswith(f"{name}."):
                return name, tensor.removeprefix(f"{name}.")
    return "", tensor


def obstacles(encoder: Graph, decoder: Graph) -> list[QcError]:
    """Why these two cannot be joined."""
    if not has_memory(decoder):
        return [QcError("the decoder reads no memory", fix="run insert-gca on it first")]
    if encoder.kind == "causal-lm" or {"input_ids", "attention_mask"} - set(encoder.inputs):
        fix = "give the model kind: encoder under models:"
        return [QcError(f"the encoder is a graph of kind {encoder.kind}, and gives no states", fix=fix)]
    found, wanted = _widths(encoder, decoder)
    if len(found) != len(wanted):
        gives, fix = len(found), "set separate_values in insert-gca where insert-kv-projection is used, and only there"
        return [QcError(f"the encoder gives {gives} values, and the decoder reads {len(wanted)} memories", fix=fix)]
    if found != wanted:
        what = f"the encoder gives states of width {found[0]}, and the decoder reads a memory of width {wanted[0]}"
        fix = f"set width: {found[0]} in insert-gca, or add insert-kv-projection with width: {wanted[0]}"
        return [QcError(what, fix=fix)]
    if encoder.dtype != decoder.dtype or encoder.device != decoder.device:
        return [QcError("the two models have different dtypes", fix="give the recipe one dtype")]
    return []


def _widths(encoder: Graph, decoder: Graph) -> tuple[list[str], list[str]]:
    memories = [n for n in decoder.module.graph.nodes if n.op == "placeholder" and n.target in (MEMORY, VALUE)]
    return [dims_of(n)[-1] for n in encoder.output_nodes()], [dims_of(n)[-1] for n in memories]


def join(encoder: Graph, decoder: Graph, names: Names, most: int | None = None) -> Graph:
    """The joint graph, over the same tensors; ``most`` is the longest memory in tokens."""
    for error in obstacles(encoder, decoder):
        raise error
    return _Joiner(encoder, decoder, names, most).graph()


class _Joiner:
    def __init__(self, encoder: Graph, decoder: Graph, names: Names, most: int | None):
        self.encoder, self.decoder, self.names, self.most = encoder, decoder, names, most
        self.nodes = fx.Graph()
        self.inputs: dict[str, fx.Node] = {}

    def graph(self) -> Graph:
        encoder, decoder = self.encoder, self.decoder
        for source in (decoder, encoder):
            self._add_inputs(source)
        for name in (IDS, ATTENTION):
            self.inputs[name] = self.nodes.placeholder(name, default_value=None)
        batch = self._between(torch.ops.aten.sym_size.int, self.inputs["input_ids"], 0, name="batch")
        ids = self._between("chunk_ids", self.inputs[IDS], encoder.device, name="chunk_ids")
        mask = self._between("chunk_mask", self.inputs[ATTENTION], ids, name="chunk_mask")
        given = self.inputs | {"input_ids": ids, "attention_mask": mask}
        states = self._copy(encoder, self.names.encoder, given, stack=0, first=0)
        read, chunks = dict(self.inputs), (self.inputs[IDS], self.inputs[ATTENTION])
        for name, value, short in zip((MEMORY, VALUE), states, ("joined", "joined_values"), strict=False):
            read[name] = self._between("join_chunks", value, *chunks, batch, self.most, name=short)
        read[MASK] = self._between("joined_mask", *chunks, ids, batch, self.most, name="joined_mask")
        outputs = self._copy(decoder, self.names.decoder, read, stack=1, first=encoder.blocks)
        self.nodes.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        return self._made()

    def _add_inputs(self, source: Graph) -> None:
        """The inputs of both: those of the decoder but for the memory, and what the encoder has beside its text."""
        for node in source.module.graph.nodes:
            if node.op != "placeholder" or node.target in (MEMORY, VALUE, MASK, *self.inputs):
                continue
            copied = self.nodes.placeholder(
                str(node.target), default_value=node.args[0] if node.args else inspect.Signature.empty
            )
            copied.target, copied.meta = node.target, dict(node.meta)
            self.inputs[str(node.target)] = copied

    def _between(self, op: str | Callable[..., Any], *args: Any, name: str) -> fx.Node:
        target = find_op(f"qc.{op}") if isinstance(op, str) else op
        assert target is not None
        node = self.nodes.call_function(target, args)
        set_tag(node, site=f"{BETWEEN}/{name}", role="gca.memory")
        return node

    def _copy(self, source: Graph, name: str, given: dict[str, fx.Node], *, stack: int, first: int) -> list[fx.Node]:
        """Put the nodes of ``source`` in, reading ``given`` for its inputs; what it returns."""
        copied: dict[fx.Node, fx.Node] = {}
        for node in source.module.graph.nodes:
            if node.op == "placeholder":
                copied[node] = given[str(node.target)]
            elif node.op == "get_attr":
                copied[node] = self.nodes.create_node("get_attr", f"{name}.{node.target}")
            elif node.op == "call_function":
                copied[node] = self.nodes.node_copy(node, copied.__getitem__)
                copied[node].meta["custom"] = _renamed(node, name, stack, first)
        return [copied[node] for node in source.output_nodes()]

    def _made(self) -> Graph:
        tensors: dict[str, Tensor] = {}
        infos: dict[str, TensorInfo] = {}
        stored: dict[str, Stored] = {}
        parts = ((self.encoder, self.names.encoder, 0), (self.decoder, self.names.decoder, self.encoder.blocks))
        for stack, (source, name, first) in enumerate(parts):
            for tensor, info in source.tensors().items():
                tensors[f"{name}.{tensor}"] = source._value(tensor)
                infos[f"{name}.{tensor}"] = _moved(info, name, stack, first)
            stored |= {f"{name}.{tensor}": place for tensor, place in source.stored.items()}
        about = {"names": vars(self.names), "encoder": self.encoder.config, "most": self.most}
        graph = Graph(
            self.nodes, tensors, infos, dtype=self.decoder.dtype, stored=stored,
            config=self.decoder.config | {"joint": about}, kind=self.decoder.kind,
            blocks=self.encoder.blocks + self.decoder.blocks,
        )  # fmt: skip
        graph.device = self.decoder.device
        for node in graph.module.graph.nodes:
            if node.op == "placeholder" and node.target in (IDS, ATTENTION):
                node.target = str(node.target)
                graph.shapes.type_input(node, torch.long, ("B", "C", "S"))
        graph.propagate()
        graph.verify()
        return graph


def _renamed(node: fx.Node, name: str, stack: int, first: int) -> dict[str, Any]:
    tags = dict(node.meta.get("custom", {}))
    block = tags.get("block")
    tags |= {"site": f"{name}.{node_name(node)}", "path": f"{name}.{tags['path']}" if tags.get("path") else name}
    return tags | {"stack": stack, "block": None if block is None else block + first}


def _moved(info: TensorInfo, name: str, stack: int, first: int) -> TensorInfo:
    block = None if info.block is None else info.block + first
    return replace(info, stack=stack, block=block, aliases=tuple(f"{name}.{alias}" for alias in info.aliases))
