"""The weight beneath LoRA sets: its shape, its value, and the hash by which it is known again."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from graph.core import Graph
from graph.errors import QcError
from graph.hashes import tensor_sha256
from graph.probe import evaluate_constant
from graph.sites import Site, is_constant, node_name


def in_out(site: Site) -> tuple[int, int]:
    """Inputs and outputs of a linear."""
    out, inputs = site.input(1).meta["val"].shape
    return int(inputs), int(out)


def has_values(graph: Graph, site: Site) -> bool:
    """Whether a linear's weight has values; in a plan it has none."""
    return not any(name not in graph.stored and graph.tensor(name).is_meta for name in weight_tensors(graph, site))


def base_weight(graph: Graph, site: Site) -> Tensor:
    """The dense weight that a linear computes with."""
    return evaluate_constant(graph, site.input(1))


def fingerprint(graph: Graph, site: Site) -> Tensor:
    """The sha256, u8 [32], of what a linear's weight is stored as.

    Of packed weights all tensors count. Floats are rounded to bf16 first, so that the same weight in another dtype is
    the same weight. Each tensor is read and let go again.
    """
    if not has_values(graph, site):
        return torch.empty(32, dtype=torch.uint8, device="meta")
    digest = hashlib.sha256()
    for name in weight_tensors(graph, site):
        value = graph.tensor(name)
        value = value.to(torch.bfloat16) if value.is_floating_point() else value
        digest.update(f"{list(value.shape)} {tensor_sha256(value)}\n".encode())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def weight_tensors(graph: Graph, site: Site) -> list[str]:
    """The stored tensors that a linear's weight is made of."""
    weight = site.input(1)
    if not is_constant(weight):
        raise QcError(
            "the weight is computed from an input, not stored", fix="leave this site out of select", site=site.name
        )
    return [node_name(weight)] if weight.op == "get_attr" else Site(graph, weight).tensors()
