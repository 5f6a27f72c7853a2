"""Compute nothing for padding: between attentions, rows of tokens without the padding among them.

    before    y = linear(x, W)                                      x: [D, S, in]
    after     y = linear(drop_padding(x, kept), W)                  [N, in] -> [N, out], N tokens that are no padding
              y/padded = pad_again(y, kept, mask)                   [D, S, out], zeros at padding, for what needs rows

Linears, norms and activations work on each token by itself, and take as long for padding as for text. The training
runtime rewrites its copy so; artifacts stay as they are. Values at tokens are the same bits, and so are gradients but
for the order of sums. Whoever reads the result has to ignore padding, which has zeros and not what was computed of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from graph.core import Graph
from graph.ops import op, op_name
from graph.shapes import dims_of
from graph.sites import node_name, set_tag, tag

TOKENWISE = (
    "aten.linear", "aten.layer_norm", "aten.add.Tensor", "aten.mul.Tensor", "aten.silu", "aten.gelu", "aten.relu",
    "aten.sigmoid", "aten.tanh", "aten.to.dtype", "qc.rms_norm", "qc.lora", "qc.lora_in_place", "qc.dora", "qc.dropout",
    "qc.linear_4bit", "qc.linear_int8", "qc.linear_scaled", "qc.linear_affine", "qc.linear_lut",
    "qc.linear_vector_lut",
)  # fmt: skip
"""Ops that give each token what follows from that token alone, whatever the dimensions before the last."""


@op
def token_index(mask: Tensor) -> Tensor:
    """Where the tokens are among all places of ``mask`` [D, S], in order: i64 [N]."""
    if mask.is_meta or isinstance(mask, FakeTensor):
        return torch.arange(mask.numel(), device=mask.device)
    return torch.nonzero(mask.flatten()).flatten()


@op
def drop_padding(x: Tensor, index: Tensor) -> Tensor:
    """The rows of ``x`` [D, S, d] at ``index`` [N]  ->  [N, d]."""
    flat = x.flatten(0, 1)
    return flat if len(index) == len(flat) else _Taken.apply(flat, index)


@op
def pad_again(x: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """The rows of ``x`` [N, d] at ``index`` of ``mask`` [D, S], zeros elsewhere  ->  [D, S, d]."""
    wide = x if len(index) == mask.numel() else _Put.apply(x, index, mask.numel())
    return wide.view(*mask.shape, x.shape[-1])


@op
def left_of_padding(mask: Tensor) -> Tensor:
    """``mask`` [D, S] as if nothing were padding, where padding is on the right of every row; otherwise ``mask``.

    Under causal attention no token sees what is behind it, so padding there needs no mask, and attention is faster.
    Numbers above 1, of documents in a row, hide more than padding, and stay.
    """
    if mask.is_meta or isinstance(mask, FakeTensor):
        return mask
    alone = bool((mask <= 1).all()) and bool((mask[:, 1:] <= mask[:, :-1]).all())
    return torch.ones_like(mask) if alone else mask


class _Taken(torch.autograd.Function):
    """Rows at an index; each is taken once, so that the backward puts and adds nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _put(grad, index, ctx.rows), None


class _Put(torch.autograd.Function):
    """The other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return _put(x, index, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


def _put(x: Tensor, index: Tensor, rows: int) -> Tensor:
    return x.new_zeros(rows, x.shape[1]).index_copy_(0, index, x)


def without_padding(graph: Graph, mask: fx.Node) -> int:
    """Let the ops on the rows of ``mask`` [D, S] that go by token compute for tokens alone; return how many do."""
    dims = dims_of(mask)
    chosen = [node for node in graph.module.graph.nodes if _by_token(node, dims)]
    if not chosen:
        return 0
    kept = graph.insert("qc.token_index", mask, name=f"{node_name(mask)}/tokens", before=mask.next)
    edges = _Edges(graph, mask, kept, frozenset(chosen))
    for node in chosen:
        edges.enter(node)
    for node in chosen:
        edges.leave(node)
    _hide_less(graph, mask)
    graph.propagate()
    graph.verify()
    return len(chosen)


def _by_token(node: fx.Node, dims: tuple[str, ...]) -> bool:
    """Whether a node goes by token over rows of these sizes, and reads nothing else but what has no rows."""
    if node.op != "call_function" or op_name(node.target) not in TOKENWISE or not _is_rows(node, dims):
        return False
    others = [arg for arg in node.all_input_nodes if not _is_rows(arg, dims)]
    return len(others) < len(node.all_input_nodes) and not any(_has_rows(arg) for arg in others)


def _is_rows(node: fx.Node, dims: tuple[str, ...]) -> bool:
    if not isinstance(node.meta["val"], Tensor) or node.meta["val"].dim() != 3:
        return False
    return dims_of(node)[:2] == dims


def _has_rows(node: fx.Node) -> bool:
    """Whether any of its sizes moves with those of the inputs."""
    return isinstance(node.meta["val"], Tensor) and any(not size.isdigit() for size in dims_of(node))


def _hide_less(graph: Graph, mask: fx.Node) -> None:
    """Leave the padding on the right to what is causal anyway."""
    for user in list(mask.users):
        if op_name(user.target) == "qc.attention_mask" and _causal(user):
            shown = graph.insert("qc.left_of_padding", mask, name=f"{node_name(user)}/shown", before=user)
            user.args = (shown, *user.args[1:])


def _causal(node: fx.Node) -> bool:
    said = dict(zip(("kind", "window"), node.args[1:], strict=False)) | dict(node.kwargs)
    readers = [user for user in node.users if op_name(user.target) == "qc.attention"]
    shown = all(user.args[5] if len(user.args) > 5 else True for user in readers)
    plain = said.get("kind", "causal") == "causal" and said.get("window") is None
    return plain and len(readers) == len(node.users) and shown


class _Edges:
    """The nodes between what goes by token and what does not, one for each value and direction."""

    def __init__(self, graph: Graph, mask: fx.Node, kept: fx.Node, chosen: frozenset[fx.Node]):
        self.graph, self.mask, self.kept, self.chosen = graph, mask, kept, chosen
        self.dropped: dict[fx.Node, fx.Node] = {}

    def enter(self, node: fx.Node) -> None:
        """Give a chosen node its rows without padding."""
        for arg in node.all_input_nodes:
            if arg in self.chosen or not _is_rows(arg, dims_of(self.mask)):
                continue
            if arg not in self.dropped:
                name = f"{node_name(arg)}/tokens"
                self.dropped[arg] = self.graph.insert("qc.drop_padding", arg, self.kept, name=name, before=node)
            node.replace_input_with(arg, self.dropped[arg])

    def leave(self, node: fx.Node) -> None:
        """Give the readers of a chosen node that need rows what it computes with padding."""
        readers = [user for user in node.users if user not in self.chosen]
        if not readers:
            return
        args = (node, self.kept, self.mask)
        wide = self.graph.insert("qc.pad_again", *args, name=f"{node_name(node)}/padded", before=node.next)
        set_tag(wide, **{key: tag(node, key) for key in ("block", "stack", "path")})
        for reader in readers:
            reader.replace_input_with(node, wide)
