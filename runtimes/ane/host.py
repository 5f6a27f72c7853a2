"""What of a graph depends on positions and padding alone: the host computes it, or it becomes a constant.

rotations      tables of cosines and sines by position, for the host
masks          one input each; windows and position biases of an encoder become constants that are added
positions      rows added to embeddings: a constant of an encoder, a table looked up by position of a decoder
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graph import Graph, QcError
from graph.ops import op_name
from graph.probe import evaluate, padding_tokens, vocabulary
from graph.shapes import dims_of
from graph.sites import is_constant, node_name

HIDDEN = -10000.0
"""What is added to the score of a key that may not be seen: far below any score, and no infinity (rule N9)."""

SHORT = 7
"""A length at which values must be what they are at any other."""

FIX = "this model cannot be exported to ane as it is"


def by_position(graph: Graph, nodes: Sequence[fx.Node], length: int) -> tuple[list[Tensor], list[QcError]]:
    """The values of these nodes for a full row of ``length`` tokens, and what is wrong with them.

    They must not depend on which tokens there are, nor, up to each position, on how many follow.
    """
    found = evaluate(graph, nodes, _row(graph, length, seed=0))
    others = evaluate(graph, nodes, _row(graph, length, seed=1))
    shorter = evaluate(graph, nodes, _row(graph, min(SHORT, length), seed=2))
    errors = []
    for node, value, other, short in zip(nodes, found, others, shorter, strict=True):
        if not torch.equal(value, other):
            what = f"{node_name(node)} depends on more than the positions of tokens"
            errors.append(QcError(what, site=node_name(node), fix=FIX))
        elif not torch.equal(_up_to(node, value, short), short):
            what = f"{node_name(node)} depends on how many tokens there are"
            errors.append(QcError(what, site=node_name(node), fix=FIX))
    return found, errors


def _up_to(node: fx.Node, value: Tensor, short: Tensor) -> Tensor:
    """The first of its tokens, as many as another has."""
    at = next((i for i, size in enumerate(dims_of(node)) if size == "T"), None)
    return value if at is None else value.narrow(at, 0, short.shape[at])


def mask_bias(graph: Graph, node: fx.Node, length: int) -> tuple[Tensor, bool]:
    """What an encoder's mask adds to scores where no token is padding; and whether it hides what is.

    ->  [1, heads or 1, length, length]

    Raises QcError if padding at the end does something else.
    """
    row = _row(graph, length, seed=0)
    row["attention_mask"] *= 2  # one document: of ones the mask may be left out
    full = _bias(evaluate(graph, [node], row)[0])
    cut = max(1, length // 2)
    padded = {**row, "attention_mask": row["attention_mask"].clone()}
    padded["attention_mask"][:, cut:] = 0
    partly = _bias(evaluate(graph, [node], padded)[0])
    hidden = partly[:, :, :cut, cut:]
    hides = not bool((hidden > HIDDEN / 2).any())
    same = partly[:, :, :cut, :cut] if hides else partly[:, :, :cut]
    if not torch.equal(same, full[:, :, :cut, : same.shape[3]]):
        raise QcError(f"{node_name(node)} does more with padding than to hide it", site=node_name(node), fix=FIX)
    return full, hides


def _bias(mask: Any) -> Tensor:
    """A mask as what is added to scores."""
    assert isinstance(mask, Tensor)
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    added = torch.zeros(mask.shape).masked_fill(~mask, HIDDEN) if mask.dtype == torch.bool else mask.float()
    return added.clamp(min=HIDDEN)


def _row(graph: Graph, length: int, seed: int) -> dict[str, Any]:
    """A row of random tokens, none of them one for padding."""
    generator = torch.Generator().manual_seed(seed)
    padding = padding_tokens(graph)
    tokens = torch.tensor([i for i in range(vocabulary(graph)) if i not in padding])
    ids = tokens[torch.randint(0, len(tokens), (1, length), generator=generator)]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def takes_tokens(node: fx.Node) -> bool:
    """Whether an index is the tokens themselves, over casts and views."""
    while node.op == "call_function" and op_name(node.target) in ("aten.view", "aten.to.dtype", "aten.reshape"):
        first = node.args[0]
        assert isinstance(first, fx.Node)
        node = first
    return node.op == "placeholder" and node.target == "input_ids"


def over_pairs(node: fx.Node) -> bool:
    """Whether a value has a number for every two tokens."""
    return isinstance(node.meta.get("val"), Tensor) and sum("T" in size for size in dims_of(node)) == 2


def positional(node: fx.Node) -> bool:
    """Whether a value is a tensor that something but stored tensors decides."""
    return isinstance(node.meta.get("val"), Tensor) and not is_constant(node)
