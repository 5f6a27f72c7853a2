"""Graph: a torch.fx graph that always runs, whose ops are named sites and whose tensors are all its own."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from graph import text
from graph.errors import QcError
from graph.ops import find_op, op_name
from graph.pages import room
from graph.shapes import Dims, Shapes
from graph.sites import Malformed, Site, node_name, set_tag, tag
from graph.weights import Stored, all_finite


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a graph knows of one of its tensors beside its value."""

    kind: Literal["parameter", "buffer"] = "parameter"
    trainable: bool = False
    group: str | None = None
    """The parameter group that trains it, ``lora.default``."""

    role: str = "other"
    """The role of the op that reads it."""

    block: int | None = None
    stack: int | None = None
    aliases: tuple[str, ...] = ()
    """Other names of the same tensor (tied weights)."""

    pinned: bool = False
    """``Graph.to`` leaves its dtype alone."""

    saved: bool = True
    """Whether checkpoints of the model hold it; rotary tables are not held."""

    transposed: bool = False
    """Checkpoints hold it [in, out], the graph [out, in]."""


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor under its name, as a selector sees it."""

    name: str
    info: TensorInfo

    @property
    def role(self) -> str:
        return self.info.role

    @property
    def block(self) -> int | None:
        return self.info.block

    @property
    def stack(self) -> int | None:
        return self.info.stack

    @property
    def trainable(self) -> bool:
        return self.info.trainable


class Graph:
    """A captured model.

    ``graph(input_ids=…, attention_mask=…)`` runs it, before and after any pass. ``str(graph)`` is a stable text, one
    typed line an op. Tensors may still lie in a checkpoint (``stored``); they are read when asked for.
    """

    def __init__(
        self,
        nodes: fx.Graph,
        tensors: dict[str, Tensor],
        infos: dict[str, TensorInfo],
        *,
        dtype: torch.dtype = torch.float32,
        stored: dict[str, Stored] | None = None,
        config: dict[str, Any] | None = None,
        kind: Literal["causal-lm", "encoder", "module"] = "module",
        blocks: int = 0,
    ):
        assert tensors.keys() == infos.keys(), "every tensor has its info"
        read = _read(nodes)
        self.module = fx.GraphModule({n: t for n, t in tensors.items() if n in read}, nodes)
        self._infos = dict(infos)
        for name, value in tensors.items():
            self._register(name, value)
        self.dtype, self.device = dtype, torch.device("cpu")
        self.stored = dict(stored or {})
        self.config: dict[str, Any] = json.loads(json.dumps(config or {}))  # plain data, as a saved graph has it
        self.kind = kind
        self.blocks = blocks
        self.shapes = Shapes()

    # -- running ----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Run it. A missing ``attention_mask`` is all ones; other missing inputs take their defaults."""
        given = dict(zip(self.inputs, args, strict=False)) | inputs
        unknown = [name for name in given if name not in self.inputs]
        if unknown:
            raise QcError(f"the graph has no input {unknown[0]!r}", fix=f"its inputs are {', '.join(self.inputs)}")
        if "attention_mask" in self.inputs and given.get("attention_mask") is None and "input_ids" in given:
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        if self.lazy():
            return Streaming(self).run_with(given)
        return self.module(**given)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of its inputs, in order."""
        return tuple(str(n.target) for n in self.module.graph.nodes if n.op == "placeholder")

    def lazy(self) -> list[str]:
        """The tensors whose values still lie in a checkpoint."""
        return [name for name in self.stored if self._value(name).is_meta]

    def materialize(self) -> Graph:
        """Read every tensor that still lies in a checkpoint; return the graph itself."""
        for name in self.lazy():
            self._register(name, self.tensor(name))
        return self

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Graph:
        """Change the dtype of all floating tensors but the pinned, and the device of all; return the graph itself."""
        old, self.dtype = self.dtype, dtype or self.dtype
        self.device = torch.device(device) if device is not None else self.device
        for node in self.module.graph.nodes:
            _retarget(node, old, self.dtype, self.device)
        self.module.recompile()
        for name, info in self._infos.items():
            value = self._value(name)
            if not value.is_meta:
                self._register(name, value.to(self.device, self.dtype if _floats(value, info) else None))
            elif _floats(value, info):
                self._register(name, value.to(self.dtype))
        self.propagate(afresh=True)
        return self

    # -- reading ----------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return text.render(self)

    def sites(self, *ops: str) -> list[Site]:
        """The sites in order, of the given ops (``aten.linear``) or all."""
        nodes = (n for n in self.module.graph.nodes if n.op == "call_function")
        return [Site(self, n) for n in nodes if not ops or op_name(n.target) in ops]

    def site(self, name: str) -> Site:
        """The site of that name."""
        found = next((s for s in self.sites() if s.name == name), None)
        assert found is not None, f"no site is called {name}"
        return found

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by its name."""
        return dict(self._infos)

    def named_tensors(self) -> list[NamedTensor]:
        """Every tensor, as a selector wants it."""
        return [NamedTensor(name, info) for name, info in self._infos.items()]

    def info(self, name: str) -> TensorInfo:
        """What is known of the tensor ``name``."""
        return self._infos[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape; the value is not read."""
        return tuple(self._value(name).shape)

    def dtype_of(self, name: str) -> torch.dtype:
        """Its dtype in this graph; the value is not read."""
        return self._value(name).dtype

    def tensor(self, name: str, place: Callable[[int], Tensor] = room) -> Tensor:
        """Its value: read from the checkpoint if it still lies there, ``meta`` if the graph has no weights at all.

        What is read lies in bytes that ``place`` gives: pages.py.
        """
        value = self._value(name)
        source = self.stored.get(name)
        if not value.is_meta or source is None:
            return value
        read = source.load(place)
        if tuple(read.shape) != tuple(value.shape):
            raise QcError(
                f"{source.file} holds {source.key} as {list(read.shape)}, the model wants {list(value.shape)}",
                fix="the checkpoint and its config.json do not belong together; fetch both again",
            )
        value = read.to(self.device, value.dtype)
        if not all_finite(value):
            raise _not_finite(source, read, value.dtype)
        return value

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor; of one that still lies in a checkpoint no more than those are read."""
        value, source = self._value(name), self.stored.get(name)
        if value.is_meta and source is not None and not source.transposed and source.shape == tuple(value.shape):
            found = source.rows(start, stop).load().to(self.device, value.dtype)
            if all_finite(found):
                return found
        return self.tensor(name)[start:stop]  # which says what is wrong with it, if there is something

    def output_nodes(self) -> list[fx.Node]:
        """The values it returns."""
        return list(self.module.graph.output_node().all_input_nodes)

    # -- editing ----------------------------------------------------------------------------------------------------

    def add_tensor(self, name: str, value: Tensor, *, before: fx.Node, info: TensorInfo) -> fx.Node:
        """Add a tensor under the dotted ``name`` and return the node that reads it."""
        assert name not in self._infos, f"{name} is there already"
        self._infos[name] = info
        self._register(name, value)
        return self.read_node(name, before=before)

    def read_node(self, name: str, *, before: fx.Node) -> fx.Node:
        """A node that reads the tensor ``name`` ahead of ``before``."""
        with self.module.graph.inserting_before(before):
            node = self.module.graph.create_node("get_attr", name)
        self.shapes.type_constant(node, self._value(name))
        return node

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Give the tensor ``name`` another value (and shape, and dtype)."""
        self._register(name, value)
        self.stored.pop(name, None)
        for node in self.module.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                self.shapes.type_constant(node, value)

    def remove_tensor(self, name: str) -> None:
        """Take a tensor away; nothing may read it any more."""
        assert not self.module.graph.find_nodes(op="get_attr", target=name), f"{name} still has a reader"
        owner, leaf = self._owner(name)
        delattr(owner, leaf)
        del self._infos[name]
        self.stored.pop(name, None)

    def set_info(self, name: str, **changes: Any) -> None:
        """Change what is known of a tensor: ``trainable``, ``group``, ``pinned`` and so on."""
        self._infos[name] = replace(self._infos[name], **changes)
        value = self._value(name)
        if isinstance(value, nn.Parameter):
            value.requires_grad_(self._infos[name].trainable)
        else:
            assert not self._infos[name].trainable, f"{name} is a buffer and cannot train"

    def insert(
        self,
        op: str | Callable[..., Any],
        *args: Any,
        name: str,
        before: fx.Node,
        role: str | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Insert ``op(*args)`` ahead of ``before``, in its block; the result's type follows from the op itself."""
        target = find_op(op) if isinstance(op, str) else op
        assert target is not None, f"no op is called {op}"
        with self.module.graph.inserting_before(before):
            node = self.module.graph.call_function(target, args, kwargs)
        set_tag(
            node,
            site=name,
            role=role or "other",
            block=tag(before, "block"),
            stack=tag(before, "stack"),
            path=tag(before, "path"),
        )
        self.shapes.type_call(node)
        return node

    def add_input(self, name: str, example: Any, default: Any = None, dims: Dims | None = None) -> fx.Node:
        """Add an input behind the others.

        ``example`` is a plain value, or a tensor; ``dims`` then are its sizes, as numbers or symbols (``B``, ``T``).
        """
        last = [n for n in self.module.graph.nodes if n.op == "placeholder"][-1]
        with self.module.graph.inserting_after(last):
            node = self.module.graph.placeholder(name, default_value=default)
        node.target = name
        if dims is not None:
            self.shapes.type_input(node, example.dtype, dims)
        else:
            self.shapes.type_constant(node, example)
        return node

    def set_outputs(self, nodes: list[fx.Node]) -> None:
        """Return these values: the one, or a tuple of several."""
        output = self.module.graph.output_node()
        output.args = (nodes[0] if len(nodes) == 1 else tuple(nodes),)

    def copy(self) -> Graph:
        """Another graph of the same nodes over the same tensors."""
        nodes = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        nodes.output(nodes.graph_copy(self.module.graph, copied))
        values = {name: self._value(name) for name in self._infos}
        twin = Graph(
            nodes,
            values,
            self._infos,
            dtype=self.dtype,
            stored=self.stored,
            config=self.config,
            kind=self.kind,
            blocks=self.blocks,
        )
        twin.device, twin.shapes = self.device, self.shapes
        return twin

    def propagate(self, afresh: bool = False) -> None:
        """Give every value its type."""
        if afresh:
            self.shapes = Shapes()
        self.shapes.propagate(self.module, self._value)

    def verify(self) -> None:
        """See that the graph is well formed: typed, uniquely named, every tensor with the flags of its info.

        Raises Malformed, which names the site or tensor that is not.
        """
        for name, info in self._infos.items():
            _expect_kept(self._find(name), info, name)
        seen: set[fx.Node] = set()
        for node in self.module.graph.nodes:
            for arg in node.all_input_nodes:
                if arg not in seen:
                    raise Malformed(f"{node_name(node)} reads {node_name(arg)}, which comes later", node_name(node))
            if node.op == "get_attr" and node.target not in self._infos:
                raise Malformed(f"{node.target} is read and is no tensor of the graph", str(node.target))
            seen.add(node)
        self.module.graph.eliminate_dead_code()
        names = Counter(node_name(n) for n in self.module.graph.nodes if n.op == "call_function")
        for node in self.module.graph.nodes:
            name = node_name(node)
            if names[name] > 1:
                raise Malformed(f"{names[name]} ops are called {name}", name)
            if node.op != "output" and "vals" not in node.meta:
                raise Malformed(f"{name} has no type", name)
        self.module.graph.lint()
        self.module.recompile()

    # -- the tensors' places ----------------------------------------------------------------------------------------

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        owner: nn.Module = self.module
        for part in filter(None, path.split(".")):
            child = owner._modules.get(part)
            if child is None:
                child = nn.Module()
                owner.add_module(part, child)
            owner = child
        return owner, leaf

    def _value(self, name: str) -> Tensor:
        value = self._find(name)
        assert value is not None, f"{name} is no tensor of the graph"
        return value

    def _find(self, name: str) -> Tensor | None:
        owner: nn.Module | None = self.module
        *path, leaf = name.split(".")
        for part in path:
            owner = owner._modules.get(part) if owner is not None else None
        if owner is None:
            return None
        found = owner._parameters.get(leaf)
        return found if found is not None else owner._buffers.get(leaf)

    def _register(self, name: str, value: Tensor) -> None:
        info = self._infos[name]
        owner, leaf = self._owner(name)
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)
        if info.kind == "buffer":
            owner.register_buffer(leaf, value.detach())
        elif isinstance(value, nn.Parameter):
            value.requires_grad_(info.trainable)
            owner.register_parameter(leaf, value)
        else:
            owner.register_parameter(leaf, nn.Parameter(value.detach(), requires_grad=info.trainable))


class Streaming(fx.Interpreter):
    """Runs a graph whose tensors lie in a checkpoint: each is read when its reader runs, and dropped behind it."""

    def __init__(self, graph: Graph):
        super().__init__(graph.module)
        self.source = graph

    def run_with(self, inputs: dict[str, Any]) -> Any:
        nodes = [n for n in self.module.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
        args = [inputs[n.target] if n.target in inputs else n.args[0] for n in nodes]
        with torch.no_grad():
            return self.run(*args)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.source.tensor(str(target))

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":  # read when its reader runs, not when its own turn comes
            return None
        for arg in n.all_input_nodes:
            if arg.op == "get_attr":
                self.env[arg] = self.source.tensor(str(arg.target))
        result = super().run_node(n)
        for arg in n.all_input_nodes:
            if arg.op == "get_attr":
                self.env[arg] = None
        return result


def _not_finite(source: Stored, read: Tensor, dtype: torch.dtype) -> QcError:
    where = f"{source.key} in {source.file} holds"
    if not all_finite(read):
        return QcError(f"{where} NaN or infinity", fix="fetch the checkpoint again, or repair the model")
    largest, limit = read.abs().max().item(), torch.finfo(dtype).max
    what = f"{where} {largest:g}, and the largest {text.DTYPES[dtype]} number is {limit:g}"
    return QcError(what, fix="set dtype to bf16 or fp32")


def _expect_kept(value: Tensor | None, info: TensorInfo, name: str) -> None:
    if value is None:
        raise Malformed(f"{name} is gone, and the graph still lists it", name)
    if isinstance(value, nn.Parameter) != (info.kind == "parameter"):
        raise Malformed(f"{name} is not a {info.kind}", name)
    if value.requires_grad != info.trainable:
        raise Malformed(f"{name} says trainable={info.trainable} and requires_grad={value.requires_grad}", name)


def _read(nodes: fx.Graph) -> set[str]:
    return {str(n.target) for n in nodes.nodes if n.op == "get_attr"}


def _floats(value: Tensor, info: TensorInfo) -> bool:
    return value.is_floating_point() and not info.pinned


def _retarget(node: fx.Node, old: torch.dtype, new: torch.dtype, device: torch.device) -> None:
    if node.op != "call_function":
        return
    model = tag(node, "model_dtype", False)

    def swap(value: Any) -> Any:
        if isinstance(value, torch.device):
            return device
        if model and value is old:
            return new
        if model and isinstance(value, float) and math.isclose(value, torch.finfo(old).min):
            return torch.finfo(new).min
        return type(value)(swap(v) for v in value) if isinstance(value, (list, tuple)) else value

    node.args = tuple(swap(a) for a in node.args)
    node.kwargs = {k: swap(v) for k, v in node.kwargs.items()}


def iterate_blocks(graph: Graph) -> Iterator[list[Site]]:
    """The sites of each block, in order."""
    for block in range(graph.blocks):
        yield [site for site in graph.sites() if site.block == block]
