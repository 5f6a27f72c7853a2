"""The loader that the page on awareness shows loads what qc saves, with transformers alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from graph.artifact import save
from graph.encoder import as_encoder
from passes.attach_memory import AttachMemory
from passes.runner import link
from tests.docs.blocks import ROOT
from tests.graph.tiny import qwen
from tests.passes.memories import decoder, tokens


def test_the_loader_of_the_page_computes_what_the_graph_computes(tmp_path: Path) -> None:
    page = (ROOT / "docs/awareness.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    shown: dict[str, Any] = {}
    exec(compile(found[1], "docs/awareness.md", "exec"), shown)
    graph, _ = link(AttachMemory(), {"encoder": as_encoder(qwen()), "decoder": decoder()})
    encoder, reader = shown["load"](save(tmp_path / "artifact", graph).folder)
    chunks = tokens(2, 6, seed=5)
    with torch.no_grad():
        reader.memory = torch.cat([encoder(input_ids=chunk[None]).last_hidden_state for chunk in chunks], dim=1)
        theirs = reader(input_ids=tokens(1)).logits
        ours = graph(input_ids=tokens(1), memory_ids=chunks[None])
        assert (theirs - ours).abs().max() <= 1e-5
        assert (ours - qwen()(input_ids=tokens(1))).abs().max() > 0.01
