"""graph.json: a graph as plain data, with a version of its own. Ops come from the allow-list, nothing is executed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, fx

from graph.core import Graph, TensorInfo
from graph.errors import QcError
from graph.ops import find_op, op_name
from graph.sites import Malformed, set_tag, tag
from graph.weights import Stored

FORMAT, VERSION = "qc-graph", 1

_KEYS = ("format", "version", "kind", "dtype", "blocks", "config", "inputs", "nodes", "outputs", "tensors")
_TAGS = ("site", "role", "block", "stack", "path", "model_dtype")


def to_json(graph: Graph) -> dict[str, Any]:
    """Everything of a graph but the values of its tensors."""
    nodes = list(graph.module.graph.nodes)
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": graph.kind,
        "dtype": _dtype_name(graph.dtype),
        "blocks": graph.blocks,
        "config": graph.config,
        "inputs": [_input(n) for n in nodes if n.op == "placeholder"],
        "nodes": [_node(n) for n in nodes if n.op == "call_function"],
        "outputs": [n.name for n in graph.output_nodes()],
        "tensors": {
            name: {"shape": list(graph.shape(name)), "dtype": _dtype_name(graph.dtype_of(name)), **_said(info)}
            for name, info in graph.tensors().items()
        },
    }


def from_json(data: Any, stored: dict[str, Stored], where: str) -> Graph:
    """The graph that ``to_json`` described, over tensors that lie in files; ``where`` names the file in errors."""
    reader = _Reader(where)
    reader.expect(isinstance(data, dict) and data.get("format") == FORMAT, "it is not a graph of qc")
    reader.expect(data.get("version") == VERSION, f"it has version {data.get('version')}, this qc reads {VERSION}")
    try:
        return reader.graph(data, stored)
    except Malformed as error:
        raise QcError(f"{where} is damaged: {str(error).splitlines()[0]}", fix=_FIX, site=error.site) from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[:1]
        raise QcError(f"{where} is damaged: {' '.join([type(error).__name__, *first])}", fix=_FIX) from None


_FIX = "compile the recipe again; artifacts are not edited by hand"


def _said(info: TensorInfo) -> dict[str, Any]:
    """The fields that are not at their defaults."""
    defaults = TensorInfo()
    return {k: v for k, v in asdict(info).items() if v != getattr(defaults, k)}


def _input(node: fx.Node) -> dict[str, Any]:
    value = node.meta["val"]
    found: dict[str, Any] = {"name": str(node.target), "node": node.name}
    if node.args:
        found["default"] = node.args[0]
    if isinstance(value, Tensor):
        return found | {"dtype": _dtype_name(value.dtype), "dims": list(node.meta.get("dims", value.shape))}
    return found | {"value": value}


def _node(node: fx.Node) -> dict[str, Any]:
    tags = {key: tag(node, key) for key in _TAGS if tag(node, key) is not None}
    found = {"name": node.name, "op": op_name(node.target), "args": [_encode(a) for a in node.args], **tags}
    return found | ({"kwargs": {k: _encode(v) for k, v in node.kwargs.items()}} if node.kwargs else {})


def _encode(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        return {"tensor": str(arg.target)} if arg.op == "get_attr" else {"node": arg.name}
    if isinstance(arg, (list, tuple)):
        return [_encode(a) for a in arg]
    if isinstance(arg, torch.dtype):
        return {"dtype": _dtype_name(arg)}
    if isinstance(arg, torch.device):
        return {"device": "graph"}
    if isinstance(arg, (torch.layout, torch.memory_format)):
        return {"torch": str(arg).removeprefix("torch.")}
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": str(arg)}
    assert arg is None or isinstance(arg, (bool, int, float, str)), f"{arg!r} cannot be an argument of a graph"
    return arg


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Reader:
    def __init__(self, where: str):
        self.where = where
        self.nodes: dict[str, fx.Node] = {}
        self.fx = fx.Graph()

    def expect(self, condition: bool, what: str) -> None:
        if not condition:
            raise QcError(f"{self.where}: {what}", fix=_FIX)

    def only(self, entry: dict[str, Any], keys: Collection[str], what: str) -> None:
        """Every key means something."""
        unknown = sorted(entry.keys() - set(keys))
        self.expect(not unknown, f"{what} has the unknown key {unknown[0] if unknown else ''}")

    def graph(self, data: dict[str, Any], stored: dict[str, Stored]) -> Graph:
        self.only(data, _KEYS, "the file")
        tensors, infos = self.tensors(data["tensors"], stored)
        for entry in data["inputs"]:
            self.only(entry, ("name", "node", "default", "dtype", "dims", "value"), f"the input {entry['name']}")
            self.nodes[entry["node"]] = self.fx.placeholder(entry["name"], default_value=entry.get("default", _EMPTY))
            self.nodes[entry["node"]].target = entry["name"]
        for entry in data["nodes"]:
            self.nodes[entry["name"]] = self.node(entry, infos)
        outputs = [self.nodes[n] for n in data["outputs"]]
        self.fx.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        graph = Graph(
            self.fx, tensors, infos, dtype=self.dtype(data["dtype"]), stored=stored,
            config=data["config"], kind=data["kind"], blocks=data["blocks"],
        )  # fmt: skip
        inputs = [n for n in graph.module.graph.nodes if n.op == "placeholder"]
        for entry, node in zip(data["inputs"], inputs, strict=True):
            if "value" in entry:
                graph.shapes.type_constant(node, entry["value"])
            else:
                graph.shapes.type_input(node, self.dtype(entry["dtype"]), tuple(entry["dims"]))
        graph.propagate()
        graph.verify()
        return graph

    def tensors(
        self, entries: dict[str, Any], stored: dict[str, Stored]
    ) -> tuple[dict[str, Tensor], dict[str, TensorInfo]]:
        """A place for each tensor, which must lie in a weight file as the graph wants it."""
        places, infos = {}, {}
        flags = [f.name for f in fields(TensorInfo)]
        for name, entry in entries.items():
            self.only(entry, ("shape", "dtype", *flags), name)
            said = {k: v for k, v in entry.items() if k in flags}
            shape, dtype = tuple(entry["shape"]), self.dtype(entry["dtype"])
            self.expect(name in stored, f"{name} is in no weight file")
            if (stored[name].shape, stored[name].dtype) != (shape, dtype):
                has = f"{_dtype_name(stored[name].dtype)} {list(stored[name].shape)}"
                self.expect(False, f"{name} is {entry['dtype']} {list(shape)}, and {stored[name].file} holds {has}")
            infos[name] = TensorInfo(**{**said, "aliases": tuple(said.get("aliases", ()))})
            places[name] = torch.empty(shape, dtype=dtype, device="meta")
        for name in sorted(stored.keys() - infos.keys()):
            self.expect(False, f"{stored[name].file} holds {name}, which the graph does not know")
        return places, infos

    def node(self, entry: dict[str, Any], infos: dict[str, TensorInfo]) -> fx.Node:
        self.only(entry, ("name", "op", "args", "kwargs", *_TAGS), f"the op {entry.get('site')}")
        target = find_op(entry["op"])
        self.expect(target is not None, f"the op {entry['op']!r} at {entry.get('site')} is not allowed in a graph")
        assert target is not None
        args = tuple(self.decode(a, infos) for a in entry["args"])
        kwargs = {k: self.decode(v, infos) for k, v in entry.get("kwargs", {}).items()}
        node = self.fx.create_node("call_function", target, args, kwargs, name=entry["name"])
        set_tag(node, **{key: entry[key] for key in _TAGS if key in entry})
        return node

    def decode(self, arg: Any, infos: dict[str, TensorInfo]) -> Any:
        if isinstance(arg, list):
            return [self.decode(a, infos) for a in arg]
        if not isinstance(arg, dict):
            return arg
        ((kind, value),) = arg.items()
        if kind == "node":
            return self.nodes[value]
        if kind == "tensor":
            self.expect(value in infos, f"the tensor {value} is read and not declared")
            if f"\0{value}" not in self.nodes:
                self.nodes[f"\0{value}"] = self.fx.create_node("get_attr", value)
            return self.nodes[f"\0{value}"]
        if kind == "dtype":
            return self.dtype(value)
        if kind == "device":
            return torch.device("cpu")
        if kind == "float":
            return float(value)
        self.expect(kind == "torch" and value in _TORCH, f"{arg} is no argument of a graph")
        return _TORCH[value]

    def dtype(self, name: str) -> torch.dtype:
        found = getattr(torch, name, None)
        self.expect(isinstance(found, torch.dtype), f"{name!r} is not a dtype")
        assert isinstance(found, torch.dtype)
        return found


_EMPTY = inspect.Signature.empty
_TORCH: dict[str, Any] = {
    "strided": torch.strided,
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
}
