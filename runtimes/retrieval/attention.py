"""Where cross-attention looks while it answers.

attention/right_chunk      share of the attention that is on tokens of the chunk which answers
attention/top5             share on the five tokens that get most
attention/entropy          entropy of the attention, nats
attention/right_chunk/N    the first, of the N-th block of cross-attention alone

Means over heads, blocks, and the places from which tokens of answers are said.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from graph import Graph, QcError, Site
from graph.memory import memory_weights
from runtimes.data.batches import IGNORED
from runtimes.retrieval.questions import AskedBatch, Questions


def attention(graph: Graph, questions: Questions, *, batches: int, batch: int) -> dict[str, float]:
    """What ``graph`` looks at, on the first ``batches`` times ``batch`` examples."""
    probe = _probe(graph)
    rows = [
        torch.stack([_figures(weights, one) for weights in _weights(probe, one)])
        for one in (questions.batch(range(at * batch, (at + 1) * batch)) for at in range(batches))
    ]
    blocks = torch.stack(rows).mean(0)  # [blocks, figures]
    names = ("attention/right_chunk", "attention/top5", "attention/entropy")
    found = dict(zip(names, blocks.mean(0).tolist(), strict=True))
    return found | {f"attention/right_chunk/{n}": value for n, value in enumerate(blocks[:, 0].tolist())}


def _probe(graph: Graph) -> Graph:
    """The graph, returning queries, keys and masks of its attention to a memory instead of logits."""
    sites = graph.sites("qc.memory_attention")
    if not sites or "memory_ids" not in graph.inputs:
        raise QcError(
            "the model reads no memory, so it looks at nothing",
            fix="join an encoder and a decoder with attach-memory",
        )
    probe = graph.copy()
    cores = [probe.site(site.name) for site in sites]
    probe.set_outputs([node for core in cores for node in _reads(core)])
    probe.verify()
    return probe


def _reads(core: Site) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
    """Its queries, keys and mask, and what it knows beforehand of the tokens; the mask again where that is nothing."""
    prior = core.node.kwargs.get("prior")
    return core.input(0), core.input(1), core.input(3), prior if isinstance(prior, fx.Node) else core.input(3)


def _weights(probe: Graph, batch: AskedBatch) -> Iterator[Tensor]:
    """Of each block in turn, fp32 [B, heads, T, M]."""
    with torch.inference_mode():
        outputs = probe(**{name: value.to(probe.device) for name, value in batch.inputs().items()})
        for at in range(0, len(outputs), 4):
            q, k, seen, prior = outputs[at : at + 4]
            yield memory_weights(q, k, seen, None if prior.dtype == torch.bool else prior).cpu()


def _figures(weights: Tensor, batch: AskedBatch) -> Tensor:
    """The three figures of one block, [3]."""
    right = _right(batch, weights.shape[-1])
    rows, columns = torch.nonzero(batch.labels != IGNORED, as_tuple=True)
    looked = weights[rows, :, columns]  # [places, heads, M]
    share = (looked * right[rows, columns][:, None]).sum(-1).mean()
    top = looked.topk(min(5, looked.shape[-1]), dim=-1).values.sum(-1).mean()
    entropy = -torch.xlogy(looked, looked).sum(-1).mean()
    return torch.stack([share, top, entropy])


def _right(batch: AskedBatch, tokens: int) -> Tensor:
    """Which tokens of the memory answer what is asked at a place: fp32 [B, T, M].

    The chunks of a row stand one behind the other without their padding.
    """
    assert batch.memory_mask is not None
    found = torch.zeros(*batch.input_ids.shape, tokens)
    ends = batch.memory_mask.sum(2).cumsum(1)
    for row, example in enumerate(batch.examples):
        for number, asked in enumerate(example.asked, 1):
            first = int(ends[row, asked.chunk - 1]) if asked.chunk else 0
            found[row, batch.attention_mask[row] == number, first : int(ends[row, asked.chunk])] = 1
    return found
