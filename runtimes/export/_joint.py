"""Two models that were joined, as transformers loads each, and what goes between them in a file of its own.

encoder/               a folder that ``AutoModel.from_pretrained`` loads, with the tokenizer of the chunks
decoder/               one that ``AutoModelForCausalLM.from_pretrained`` loads, with the tokenizer of the text
memory.safetensors     cross-attention under the decoder's names, ``model.layers.0.gca.q_proj.weight``, and, where the
                       encoder has them, its projections: ``memory.weight`` of keys and values alike, or
                       ``memory_key.weight`` and ``memory_value.weight``
memory.json            by layer: heads, kv_heads, eps and gate; and how the encoder looks

Gates and norms stay in fp32 whatever the export's dtype. ``docs/awareness.md`` has a loader.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graph import Graph, QcError
from graph.dense import Dense, checkpoint_tensors
from graph.joint import take_apart
from graph.ops import op_name
from graph.sites import Site, tag
from graph.weights import Entry

ENCODER, DECODER, MEMORY = "encoder", "decoder", "memory"
"""The folders of the two models, and the name of the two files beside them."""


class Parts:
    """The two models of a joint graph, and what is in neither."""

    def __init__(self, graph: Graph):
        self.encoder, self.decoder = take_apart(graph)
        self.most: int | None = graph.config["joint"]["most"]

    @property
    def models(self) -> dict[str, Graph]:
        """Both, by the names of their folders."""
        return {ENCODER: self.encoder, DECODER: self.decoder}

    def checkpoints(self) -> tuple[dict[str, list[Dense]], list[QcError]]:
        """The tensors of each model's checkpoint, and all that stands in the way of writing any of it."""
        found, errors = {}, list(self._errors())
        for name, graph in self.models.items():
            found[name], more = checkpoint_tensors(graph, beside=self._beside(graph))
            errors += more
        return found, errors

    def _beside(self, graph: Graph) -> set[str]:
        return {name for name, info in graph.tensors().items() if info.role.startswith("gca.")}

    def _errors(self) -> Iterator[QcError]:
        if self.decoder.sites("qc.document_weights"):
            fix = "export the artifact itself, or train with insert-gca"
            yield QcError("there is no loader of staged cross-attention", fix=fix)
        for site in self._added():
            if tag(_undisturbed(site.input(0)), "role") != "block_out":
                what = f"{_layer(site)} has cross-attention inside, and a loader adds it behind the layer"
                yield QcError(what, fix="train with point: block_out in insert-gca")

    def _added(self) -> list[Site]:
        return self.decoder.sites("qc.add_gated")

    def entries(self, dtype: torch.dtype) -> list[Entry]:
        """The tensors between the two: vectors in fp32, projections in ``dtype``."""
        return [
            Entry(name, graph.shape(name), _kept(graph, name, dtype), _Loader(graph, name, _kept(graph, name, dtype)))
            for graph in self.models.values()
            for name in sorted(self._beside(graph))
        ]

    def about(self) -> dict[str, Any]:
        """memory.json."""
        masks = self.encoder.sites("qc.attention_mask")
        said = {site.node.args[1] if len(site.node.args) > 1 else "causal" for site in masks}
        return {
            "encoder": {"attention": "bidirectional" if "bidirectional" in said else "causal"},
            "max_tokens": self.most,
            "layers": {_layer(site): self._form(site) for site in self._added()},
        }

    def _form(self, added: Site) -> dict[str, Any]:
        """What the cross-attention of a layer is."""
        core, norm = (self.decoder.site(f"{_layer(added)}.gca.{what}") for what in ("attention", "norm"))
        heads, kv_heads = (int(core.input(at).meta["val"].shape[1]) for at in (0, 1))
        function = added.node.args[4] if len(added.node.args) > 4 else "sigmoid"
        return {"heads": heads, "kv_heads": kv_heads, "eps": norm.node.args[2], "gate": function}


class _Loader:
    """One tensor, in the dtype that it is written in."""

    def __init__(self, graph: Graph, name: str, dtype: torch.dtype):
        self.graph, self.name, self.dtype = graph, name, dtype

    def __call__(self) -> torch.Tensor:
        return self.graph.tensor(self.name).detach().to(self.dtype)


def _kept(graph: Graph, name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if len(graph.shape(name)) == 1 else dtype


def _undisturbed(node: fx.Node) -> fx.Node:
    """A value before the noise of a training, of which there is none afterwards."""
    while node.op == "call_function" and op_name(node.target) == "qc.degrade":
        node = node.all_input_nodes[0]
    return node


def _layer(added: Site) -> str:
    """The module of transformers behind which it is added."""
    return added.name.partition(".gca.")[0]
