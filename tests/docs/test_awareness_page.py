"""The loader that the page on awareness shows loads what qc exports, with transformers alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import Graph
from graph.encoder import as_encoder, set_attention
from graph.gca import GcaGate
from passes.attach_memory import AttachMemory
from passes.insert_gca import InsertGca
from passes.insert_kv_projection import InsertKvProjection
from passes.runner import apply, link
from runtimes.export.safetensors import export
from tests.docs.blocks import ROOT
from tests.graph.tiny import qwen
from tests.passes.memories import tokens


def loader() -> Any:
    page = (ROOT / "docs/awareness.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    shown: dict[str, Any] = {}
    exec(compile(found[1], "docs/awareness.md", "exec"), shown)
    body = found[1].partition("def load")[2].split("\n")
    assert sum(bool(line.strip()) for line in body) <= 20
    return shown["load"]


def joined(projected: bool, attention: str) -> Graph:
    encoder, decoder = as_encoder(qwen()), qwen()
    if attention == "bidirectional":
        set_attention(encoder, "bidirectional")
    gate = GcaGate(function="tanh", init=0.7) if projected else GcaGate()
    apply(
        InsertGca(
            layers=(1,) if projected else (0, 1), gate=gate, separate_values=projected, width=24 if projected else None
        ),
        decoder,
    )
    if projected:
        apply(InsertKvProjection(width=24), encoder)
    return link(AttachMemory(), {"encoder": encoder, "decoder": decoder})[0]


@pytest.mark.parametrize(("projected", "attention"), [(False, "causal"), (True, "causal"), (False, "bidirectional")])
def test_the_loader_of_the_page_computes_what_the_graph_computes(
    projected: bool, attention: str, tmp_path: Path
) -> None:
    graph = joined(projected, attention)
    export(graph, tmp_path / "out", dtype="fp32")
    encoder, decoder, weights = loader()(tmp_path / "out")
    chunks = tokens(2, 6, seed=5)
    mask = {} if attention == "causal" else {"attention_mask": torch.zeros(1, 1, 6, 6)}
    with torch.no_grad():
        states = torch.cat([encoder(input_ids=chunk[None], **mask).last_hidden_state for chunk in chunks], dim=1)
        keys, values = (weights.get(f"memory_{what}.weight") for what in ("key", "value"))
        assert (keys is not None) == projected
        decoder.keys = states if keys is None else states @ keys.T
        decoder.values = states if values is None else states @ values.T
        theirs = decoder(input_ids=tokens(1)).logits
        ours = graph(input_ids=tokens(1), memory_ids=chunks[None])
        assert (theirs - ours).abs().max() <= 1e-5
        assert (ours - qwen()(input_ids=tokens(1))).abs().max() > 0.01
