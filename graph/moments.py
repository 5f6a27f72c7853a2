"""The second moments of what linears read: ``E[x_i^2]`` of every input column, over the tokens of some text.

They say how much an error in a column of the weight costs, and lie beside the weight, as ``W_moments`` f32 [in], until
a pass that packs the weight has used them. So does ``W_covariance`` f32 [in, in], ``E[x_i x_j]``, where it is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from graph.apart import Parcel, divided
from graph.core import Graph, TensorInfo
from graph.errors import QcError
from graph.formats.format import has_data
from graph.ops import op
from graph.sites import Site, node_name
from graph.weights import all_finite

SUFFIX = "_moments"
COVARIANCE = "_covariance"


@op
def sum_of_squares(x: Tensor, attention_mask: Tensor) -> Tensor:
    """The sum of the squares of every column of x over the positions that are no padding.

    x: [B, T, d]    attention_mask: [B, T], 0 where there is padding  ->  f64 [d]
    """
    counted = x.double().square() * (attention_mask > 0)[..., None]
    return counted.flatten(0, -2).sum(0)


@op
def sum_of_products(x: Tensor, attention_mask: Tensor) -> Tensor:
    """The sum of ``x xᵀ`` over the positions that are no padding.

    x: [B, T, d]    attention_mask: [B, T], 0 where there is padding  ->  f32 [d, d]
    """
    counted = (x.float() * (attention_mask > 0)[..., None]).flatten(0, -2)
    return counted.t() @ counted


def second_moments(
    graph: Graph, linears: Sequence[Site], batches: Iterable[Mapping[str, Tensor]], covariance: bool = False
) -> tuple[dict[str, Tensor], int]:
    """``E[x_i^2]`` of what each linear reads, f32 [in], or ``E[x_i x_j]``, f32 [in, in], by the linear's name.

    Beside them over how many tokens that is.

    ``batches`` are inputs of the graph, ``input_ids`` and ``attention_mask``. A graph whose weights lie on disk streams
    them; of the activations no more than these are kept, once for linears that read the same.
    """
    twin = graph.copy()
    mask = next(n for n in twin.module.graph.nodes if n.op == "placeholder" and n.target == "attention_mask")
    own = {site.name: site for site in twin.sites("aten.linear")}
    reads = {linear.name: own[linear.name].input(0) for linear in linears}
    sums: dict[fx.Node, fx.Node] = {}
    for linear, x in reads.items():
        if x not in sums:
            summed = sum_of_products if covariance else sum_of_squares
            name = f"{node_name(x)}/{summed.__name__}"
            sums[x] = twin.insert(summed, x, mask, name=name, before=own[linear].node)
    twin.set_outputs(list(sums.values()))
    twin.verify()
    totals, tokens = [torch.zeros(()) for _ in sums], 0

    def measured(batch: Mapping[str, Tensor]) -> Parcel:
        with torch.no_grad():
            found = twin(**batch)
        return Parcel({str(n): one for n, one in enumerate(found if len(sums) > 1 else [found])})

    items = ((batch, batch["input_ids"].numel()) for batch in batches)
    # matrices are many times what a batch is: to measure them again in each process costs less than to hand them over
    seen = ((batch, measured(batch)) for batch, _ in items) if covariance else divided("moments", measured, items, 1)
    for batch, parcel in seen:
        totals = [one.add_(total) for total, one in zip(totals, parcel.on(graph.device).values(), strict=True)]
        tokens += int((batch["attention_mask"] > 0).sum())
    means = {x: total.div_(max(tokens, 1)).float() for x, total in zip(sums, totals, strict=True)}
    return {linear: means[x] for linear, x in reads.items()}, tokens


def keep_moments(graph: Graph, weight: str, linear: Site, moments: Tensor, suffix: str = SUFFIX) -> str:
    """Put moments beside the weight of a linear; the name of their tensor. Those that are there give way."""
    name = f"{weight}{suffix}"
    if has_data(moments) and not all_finite(moments):
        fix = "repair the model, or exclude this linear from select"
        raise QcError(f"what {linear.name} reads is not all finite", fix=fix, site=linear.name)
    if name in graph.tensors():
        graph.set_tensor(name, moments)
        return name
    info = TensorInfo(kind="buffer", role=linear.role, block=linear.block, stack=linear.stack, pinned=True, saved=False)
    graph.add_tensor(name, moments, before=linear.node, info=info)
    return name


def take_moments(graph: Graph, weight: str, suffix: str = SUFFIX) -> Tensor | None:
    """The moments beside a weight, which are taken away; None where there are none."""
    name = f"{weight}{suffix}"
    if name not in graph.tensors():
        return None
    found = graph.tensor(name)
    graph.module.graph.eliminate_dead_code()
    graph.remove_tensor(name)
    return found


def unused_covariance(graph: Graph, weight: str, why: str) -> QcError | None:
    """The user's mistake where there is a covariance beside a weight that whoever packs it has no use for."""
    if f"{weight}{COVARIANCE}" not in graph.tensors():
        return None
    what = f"calibrate measured the covariance of what reads {weight}, and {why}"
    return QcError(what, fix="take covariance out of this calibrate")
