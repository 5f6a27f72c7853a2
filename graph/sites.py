"""Sites: every op of a graph under a readable, unique name, with its role and its block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from graph.ops import op_name

if TYPE_CHECKING:
    from graph.core import Graph

ACTIVATIONS = frozenset(
    f"aten.{name}" for name in ("silu", "gelu", "relu", "tanh", "sigmoid", "elu", "leaky_relu", "hardtanh", "hardswish",
                                "relu6", "mish", "softplus")
)  # fmt: skip
NORMS = frozenset({"qc.rms_norm", "aten.layer_norm", "aten.rms_norm", "aten.group_norm"})

_PASSTHROUGH = frozenset({
    "aten.cat", "aten.chunk", "aten.clamp", "aten.clone", "aten.contiguous", "aten.div.Tensor", "aten.dropout",
    "aten.expand", "aten.flatten.using_ints", "aten.index_select", "aten.movedim.int", "aten.mul.Tensor", "aten.neg",
    "aten.numpy_T", "aten.permute", "aten.pow.Tensor_Scalar", "aten.repeat", "aten.repeat_interleave.self_int",
    "aten.reshape", "aten.select.int", "aten.slice.Tensor", "aten.split.Tensor", "aten.split_with_sizes",
    "aten.square", "aten.squeeze.dim", "aten.swapaxes", "aten.t", "aten.to.dtype", "aten.transpose.int",
    "aten.unbind.int", "aten.unflatten.int", "aten.unsqueeze", "aten.view", "py.getitem", "qc.cast_like",
    "qc.dropout", "qc.rope",
})  # fmt: skip


class Malformed(RuntimeError):
    """A graph that cannot be, and the site at which it cannot: always a bug of what built or rewrote it."""

    def __init__(self, what: str, site: str):
        super().__init__(what)
        self.site = site


@dataclass(frozen=True, slots=True)
class Site:
    """One op of the model, under the name recipes select and errors point at.

    An op that is a module's only op takes the module's path, ``model.layers.0.mlp.up_proj``; any other takes its
    owner's path and its own name, ``model.layers.0/add``.
    """

    graph: Graph
    node: fx.Node

    @property
    def name(self) -> str:
        return node_name(self.node)

    @property
    def op(self) -> str:
        return op_name(self.node.target)

    @property
    def role(self) -> str:
        return str(tag(self.node, "role", "other"))

    @property
    def block(self) -> int | None:
        found: int | None = tag(self.node, "block", None)
        return found

    @property
    def stack(self) -> int | None:
        found: int | None = tag(self.node, "stack", None)
        return found

    @property
    def trainable(self) -> bool:
        """Whether one of the tensors it reads is trained."""
        return any(self.graph.info(n).trainable for n in self.tensors())

    @property
    def value(self) -> Tensor:
        """A stand-in without data for what the op returns: its shape and dtype."""
        val: Tensor = self.node.meta["val"]
        return val

    def __str__(self) -> str:
        return self.name

    def input(self, i: int) -> fx.Node:
        """The op's ``i``-th argument, which must be a value of the graph."""
        arg = self.node.args[i]
        assert isinstance(arg, fx.Node), f"argument {i} of {self.name} is the constant {arg!r}"
        return arg

    def set_input(self, i: int, value: fx.Node) -> None:
        """Make ``value`` the op's ``i``-th argument."""
        self.node.update_arg(i, value)

    def tensors(self) -> list[str]:
        """The stored tensors it reads, directly or through ops on nothing but stored tensors."""
        found: dict[str, None] = {}
        pending = list(self.node.all_input_nodes)
        while pending:
            node = pending.pop(0)
            if node.op == "get_attr":
                found[str(node.target)] = None
            elif is_constant(node):
                pending += node.all_input_nodes
        return list(found)

    def weight(self) -> str | None:
        """The stored float tensor that a linear or embedding reads as its weight; None if it is computed."""
        at = {"aten.linear": 1, "aten.embedding": 0}.get(self.op)
        arg = None if at is None else self.node.args[at]
        return str(arg.target) if isinstance(arg, fx.Node) and arg.op == "get_attr" else None


def node_name(node: fx.Node) -> str:
    """The site of an op, the dotted path of a tensor, the name of an input."""
    if node.op in ("get_attr", "placeholder"):
        return str(node.target)
    return str(tag(node, "site", node.name))


def tag(node: fx.Node, key: str, default: Any = None) -> Any:
    """What a node is tagged with. The tags sit under the one meta key that ``torch.export`` keeps."""
    return node.meta.get("custom", {}).get(key, default)


def set_tag(node: fx.Node, **tags: Any) -> None:
    """Tag a node: ``site``, ``role``, ``block``, ``stack``, ``path`` (its module), ``model_dtype``."""
    node.meta["custom"] = {**node.meta.get("custom", {}), **tags}


def is_constant(node: fx.Node) -> bool:
    """Whether a value depends on stored tensors only, not on an input."""
    if node.op == "get_attr":
        return True
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(is_constant, node.all_input_nodes))


def annotate(graph: fx.Graph) -> int:
    """Name every op, give it its role and its block; return the number of blocks."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    _name(nodes)
    blocks = _number_blocks(nodes)
    for node, role in _roles(graph, nodes).items():
        set_tag(node, role=role)
    return blocks


def _name(nodes: list[fx.Node]) -> None:
    path = {n: str(tag(n, "path", "")) for n in nodes}
    alone = Counter(path.values())
    used: Counter[str] = Counter()
    for node in nodes:
        owner = path[node]
        short = op_name(node.target).split(".")[1]
        name = owner if owner and alone[owner] == 1 else f"{owner}/{short}" if owner else short
        used[name] += 1
        set_tag(node, site=name if used[name] == 1 else f"{name}.{used[name]}")


def _number_blocks(nodes: list[fx.Node]) -> int:
    """Blocks are the children of the module list that holds the attention (or, without attention, the most ops)."""
    lists: Counter[str] = Counter()
    for node in nodes:
        parts = str(tag(node, "path", "")).split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is not None:
            lists[".".join(parts[:at])] += 1000 if op_name(node.target) in _ATTENTION | {"aten.softmax.int"} else 1
    if not lists:
        return 0
    prefix = lists.most_common(1)[0][0] + "."
    seen: set[int] = set()
    for node in nodes:
        path = str(tag(node, "path", ""))
        if path.startswith(prefix) and (number := path[len(prefix) :].split(".")[0]).isdigit():
            set_tag(node, block=int(number))
            seen.add(int(number))
    return max(seen, default=-1) + 1


_ATTENTION = frozenset({"qc.attention", "aten.scaled_dot_product_attention"})


def _roles(graph: fx.Graph, nodes: list[fx.Node]) -> dict[fx.Node, str]:
    """The role of each op, from what flows where: no name is looked at."""
    roles: dict[fx.Node, str] = {}
    linears = [n for n in nodes if op_name(n.target) == "aten.linear"]
    for node in nodes:
        op = op_name(node.target)
        fixed = {"aten.embedding": "embed", "qc.rope": "attn.rope", "qc.attention_mask": "attn.mask"}.get(op)
        if fixed or op in NORMS:
            roles[node] = fixed or "norm"
    for core, sources in _attentions(nodes):
        roles[core] = "attn.core"
        _name_projections(core, sources, roles)
    ends = set(graph.output_node().all_input_nodes)
    for node in linears:
        if node not in roles and tag(node, "block") is None and _flows_to(node, ends):
            roles[node] = "head"
    for node in linears:
        if node not in roles:
            _name_mlp(node, roles)
    for node, last in _block_outputs(nodes).items():
        if last:
            roles[node] = "block_out"
    return roles


def _attentions(nodes: list[fx.Node]) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Each attention, as the op that mixes the values, and what it takes as queries, keys and values.

    Besides the ops for it, ``matmul(softmax(matmul(q, k)), v)`` with anything elementwise between is one.
    """
    for node in nodes:
        op = op_name(node.target)
        if op in _ATTENTION:
            yield node, [a for a in node.args[:3] if isinstance(a, fx.Node)]
        elif op in ("aten.softmax.int", "aten._softmax"):
            mixes = [n for n in _reach([node], lambda n: list(n.users)) if op_name(n.target) in _MATMUL]
            scores = [
                n for n in _reach(node.all_input_nodes, lambda n: n.all_input_nodes) if op_name(n.target) in _MATMUL
            ]
            if mixes and scores:
                q, k = [a for a in scores[0].args if isinstance(a, fx.Node)][-2:]
                yield mixes[0], [q, k, [a for a in mixes[0].args if isinstance(a, fx.Node)][-1]]


_WHOLE = frozenset({
    "aten.clone", "aten.contiguous", "aten.dropout", "aten.flatten.using_ints", "aten.reshape", "aten.to.dtype",
    "aten.view", "qc.cast_like", "qc.dropout",
})  # fmt: skip
"""Ops that leave every value as it is."""

_STRAIGHT = frozenset({"aten.add.Tensor", "aten.div.Tensor", "aten.mul.Tensor", "aten.neg", "aten.sub.Tensor"})

_MATMUL = frozenset({"aten.matmul", "aten.bmm", "aten.baddbmm"})
_BETWEEN = frozenset({
    "aten.add.Tensor", "aten.clamp_min", "aten.masked_fill.Scalar", "aten.masked_fill.Tensor", "aten.max.other",
    "aten.maximum", "aten.softmax.int", "aten.sub.Tensor", "aten.tanh", "aten.type_as", "aten.where.ScalarOther",
    "aten.where.ScalarSelf", "aten.where.self",
})  # fmt: skip


def _reach(start: list[fx.Node], step: Callable[[fx.Node], list[fx.Node]]) -> list[fx.Node]:
    """The first matrix products that can be reached over elementwise ops and reshapes."""

    def onwards(here: fx.Node) -> Iterable[fx.Node]:
        op = op_name(here.target)
        return step(here) if op not in _MATMUL and (here in start or op in _PASSTHROUGH | _BETWEEN) else ()

    return [here for here in _walk(start, onwards) if op_name(here.target) in _MATMUL]


def _walk(start: Iterable[fx.Node], onwards: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """The ops that are reached, each once, the nearest first."""
    pending, seen = list(start), set[fx.Node]()
    while pending:
        here = pending.pop(0)
        if here not in seen and here.op == "call_function":
            seen.add(here)
            yield here
            pending += onwards(here)


def _name_projections(core: fx.Node, inputs: list[fx.Node], roles: dict[fx.Node, str]) -> None:
    readers: dict[fx.Node, str] = {}
    for letter, source in zip("qkv", inputs, strict=True):
        for linear in _linears_behind(source):
            readers[linear] = readers.get(linear, "") + letter
    for linear, letters in readers.items():
        roles.setdefault(linear, f"attn.{letters}")
    for linear in _linears_ahead(core):
        roles.setdefault(linear, "attn.o")


def _name_mlp(down: fx.Node, roles: dict[fx.Node, str]) -> None:
    """If what ``down`` reads went through an activation, it is a down projection and its sources gate and up."""
    source = down.args[0]
    if not isinstance(source, fx.Node):
        return
    up = _bent(source)
    if up is not None and up not in roles:
        roles[down], roles[up] = "mlp.down", "mlp.up"
        return
    behind = {
        linear: through for linear, through in _linears_behind(source, activations=True).items() if linear not in roles
    }
    if not any(True in through for through in behind.values()):
        return
    roles[down] = "mlp.down"
    for linear, through in behind.items():
        both = through == {True, False}
        roles[linear] = "mlp.gate_up" if both else "mlp.gate" if True in through and len(behind) > 1 else "mlp.up"


def _bent(node: fx.Node) -> fx.Node | None:
    """The linear that a value is an elementwise function of, and of no other, if it is not a sum and product of that.

    Some models write out their activation: GELU with tanh or erf is seven ops that read the linear three times.
    """

    def onwards(here: fx.Node) -> list[fx.Node]:
        op = op_name(here.target)
        return [] if op == "aten.linear" else here.all_input_nodes[:1] if op in _WHOLE else here.all_input_nodes

    found, bends = list[fx.Node](), False
    for here in _walk([node], onwards):
        op = op_name(here.target)
        if op == "aten.linear":
            found.append(here)
        elif op not in _WHOLE:
            if torch.Tag.pointwise not in getattr(here.target, "tags", ()):
                return None
            bends = bends or op not in _STRAIGHT
    return found[0] if bends and len(found) == 1 else None


def _linears_behind(node: fx.Node, activations: bool = False) -> dict[fx.Node, set[bool]]:
    """The linears a value comes from over reshapes and elementwise ops, and whether an activation lies between."""
    found: dict[fx.Node, set[bool]] = {}
    pending, seen = [(node, False)], set()
    while pending:
        here, through = pending.pop()
        if (here, through) in seen or here.op != "call_function":
            continue
        seen.add((here, through))
        op = op_name(here.target)
        if op == "aten.linear":
            found.setdefault(here, set()).add(through)
        elif op in _PASSTHROUGH or (activations and op in ACTIVATIONS) or _is_small_step(here, activations, through):
            pending += [(n, through or op in ACTIVATIONS) for n in here.all_input_nodes]
    return found


def _is_small_step(node: fx.Node, activations: bool, through: bool) -> bool:
    """Norms and sums on the way to a linear: before attention all, in an MLP a number added, or a norm behind it."""
    op = op_name(node.target)
    if not activations:
        return op in NORMS | {"aten.add.Tensor"}
    return (op in NORMS and through) or (op == "aten.add.Tensor" and len(node.all_input_nodes) == 1)


def _linears_ahead(node: fx.Node) -> Iterator[fx.Node]:
    def onwards(here: fx.Node) -> Iterable[fx.Node]:
        return here.users if op_name(here.target) in _PASSTHROUGH | NORMS else ()

    return (here for here in _walk(node.users, onwards) if op_name(here.target) == "aten.linear")


def _flows_to(node: fx.Node, ends: set[fx.Node]) -> bool:
    pending, seen = [node], set()
    while pending:
        here = pending.pop()
        if here in ends:
            return True
        if here not in seen:
            seen.add(here)
            elementwise = (u for u in here.users if u.op == "call_function" and op_name(u.target) != "aten.linear")
            pending += [u for u in elementwise if op_name(u.target) in _PASSTHROUGH | ACTIVATIONS | {"aten.add.Tensor"}]
    return False


def _block_outputs(nodes: list[fx.Node]) -> dict[fx.Node, bool]:
    """The values that leave each block; True for a block's only or last one."""
    leaving: dict[int, list[fx.Node]] = {}
    for node in nodes:
        block = tag(node, "block")
        if block is not None and any(tag(user, "block") != block for user in node.users):
            leaving.setdefault(block, []).append(node)
    return {node: node is values[-1] for values in leaving.values() for node in values}
