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

CHUNK_MASK = f"{BETWEEN}/chunk_mask"
"""The site that gives the mask of the encoder's rows."""


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
    found, wanted = widths(encoder, decoder)
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


def widths(encoder: Graph, decoder: Graph) -> tuple[list[str], list[str]]:
    """How wide each value is that the encoder gives, and each memory that the decoder reads."""
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


def take_apart(graph: Graph) -> tuple[Graph, Graph]:
    """The encoder and the decoder of a joint graph, under their own names, over the same tensors."""
    names, about = names_of(graph), graph.config["joint"]
    between = {node_name(n): n for n in graph.module.graph.nodes if node_name(n).startswith(f"{BETWEEN}/")}
    joins = [node for name, node in between.items() if name in ("memory/joined", "memory/joined_values")]
    own = {key: value for key, value in graph.config.items() if key != "joint"}
    reads = {between["memory/chunk_ids"]: "input_ids", between[CHUNK_MASK]: "attention_mask"}
    first = 1 + max((s.block for s in graph.sites() if s.stack == 0 and s.block is not None), default=-1)
    encoder = _Part(graph, names.encoder, 0, first).made(reads, [n.all_input_nodes[0] for n in joins])
    encoder.config, encoder.kind = dict(about["encoder"]), "encoder"
    reads = dict(zip(joins, (MEMORY, VALUE), strict=False)) | {between["memory/joined_mask"]: MASK}
    decoder = _Part(graph, names.decoder, first, graph.blocks - first).made(reads, graph.output_nodes())
    decoder.config, decoder.kind = own, graph.kind
    return encoder, decoder


class _Part:
    """Takes one model out of a joint graph."""

    def __init__(self, joint: Graph, name: str, first: int, blocks: int):
        self.joint, self.name, self.first, self.blocks = joint, name, first, blocks
        self.nodes = fx.Graph()
        self.copied: dict[fx.Node, fx.Node] = {}

    def made(self, reads: dict[fx.Node, str], outputs: list[fx.Node]) -> Graph:
        """The graph of this model, which reads its inputs where the joint one has ``reads``."""
        inputs = list(reads.items())
        used = {arg for node in self._mine() for arg in node.all_input_nodes}
        given = [n for n in self.joint.module.graph.nodes if n.op == "placeholder" and n in used and n not in reads]
        order = sorted(given, key=lambda n: n.target not in ("input_ids", "attention_mask"))
        types: list[tuple[fx.Node, fx.Node]] = []
        for source, name in [*((n, str(n.target)) for n in order), *inputs]:
            optional = (None,) if name in (MEMORY, VALUE, MASK) else source.args if source.op == "placeholder" else ()
            default = optional[0] if optional else inspect.Signature.empty
            self.copied[source] = self.nodes.placeholder(name, default_value=default)
            self.copied[source].target = name
            types.append((self.copied[source], source))
        for node in self._mine():
            self.copied[node] = self._copy(node)
        found = [self.copied[node] for node in outputs]
        self.nodes.output(found[0] if len(found) == 1 else tuple(found))
        return self._graph(types)

    def _mine(self) -> list[fx.Node]:
        prefix = f"{self.name}."
        return [n for n in self.joint.module.graph.nodes if n.op != "placeholder" and node_name(n).startswith(prefix)]

    def _copy(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr":
            return self.nodes.create_node("get_attr", str(node.target).removeprefix(f"{self.name}."))
        made = self.nodes.node_copy(node, self.copied.__getitem__)
        tags = dict(node.meta.get("custom", {}))
        block = tags.get("block")
        tags |= {"stack": None, "block": None if block is None else block - self.first}
        tags |= {key: str(tags[key]).removeprefix(f"{self.name}.") for key in ("site", "path") if tags.get(key)}
        made.meta["custom"] = {key: value for key, value in tags.items() if value is not None}
        return made

    def _graph(self, types: list[tuple[fx.Node, fx.Node]]) -> Graph:
        joint, prefix = self.joint, f"{self.name}."
        tensors, infos = {}, {}
        for name, info in joint.tensors().items():
            if name.startswith(prefix):
                short = name.removeprefix(prefix)
                block = None if info.block is None else info.block - self.first
                aliases = tuple(alias.removeprefix(prefix) for alias in info.aliases)
                tensors[short], infos[short] = (
                    joint._value(name),
                    replace(info, stack=None, block=block, aliases=aliases),
                )
        stored = {n.removeprefix(prefix): place for n, place in joint.stored.items() if n.startswith(prefix)}
        made = Graph(self.nodes, tensors, infos, dtype=joint.dtype, stored=stored, blocks=self.blocks)
        made.device = joint.device
        inputs = [n for n in made.module.graph.nodes if n.op == "placeholder"]
        for node, (_, source) in zip(inputs, types, strict=True):
            node.target = str(node.target)
            _type(made, node, source)
        made.propagate()
        made.verify()
        return made


def _type(graph: Graph, node: fx.Node, source: fx.Node) -> None:
    """Type an input of a part: tokens as [B, T], a memory as [B, M, d]; any other as it was."""
    value = source.meta["val"]
    if not isinstance(value, Tensor):
        graph.shapes.type_constant(node, value)
        return
    dims: tuple[str | int, ...] = ("B", "M") if node.target in (MEMORY, VALUE, MASK) else ("B", "T")
    graph.shapes.type_input(node, value.dtype, (*dims, *value.shape[2:]))
