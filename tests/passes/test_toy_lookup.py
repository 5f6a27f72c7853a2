"""A decoder of random weights learns to look up, and only from its memory: check A12 of the chapter on awareness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graph import Graph, capture
from passes.insert_gca import InsertGca
from passes.runner import apply

WIDTH, KEYS, VALUES, ENTRIES, BATCH = 48, 16, 16, 4, 48


def decoder() -> Graph:
    """Three blocks of random weights, with cross-attention behind two of them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    config = Qwen3Config(
        **sizes, intermediate_size=96, num_hidden_layers=3, vocab_size=KEYS + VALUES, tie_word_embeddings=True
    )
    model: Any = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
    graph = capture(model)
    apply(InsertGca(layers=(1, 2)), graph)
    return graph


class Encoder(nn.Module):
    """Two blocks over entries, each the sum of the embeddings of its key and its value."""

    def __init__(self, embedding: Tensor):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(embedding.detach().clone())
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 96, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        found: Tensor = self.blocks(self.embedding(keys) + self.embedding(values))
        return found


def asked(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values [count, 4] of each row's memory, a question that ends in one of its keys, and the answer."""
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :ENTRIES]
    values = KEYS + torch.rand(count, VALUES, generator=generator).argsort(1)[:, :ENTRIES]
    which = torch.randint(0, ENTRIES, (count, 1), generator=generator)
    text = torch.randint(0, KEYS + VALUES, (count, 3), generator=generator)
    return keys, values, torch.cat((text, keys.gather(1, which)), dim=1), values.gather(1, which)[:, 0]


@pytest.mark.slow
def test_it_is_looked_up_with_the_right_memory_and_with_no_other() -> None:
    graph, generator = decoder(), torch.Generator().manual_seed(0)
    encoder = Encoder(graph.tensor("model.embed_tokens.weight"))
    trained = [p for module in (encoder, graph.module) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
    for _ in range(1200):
        keys, values, text, answers = asked(BATCH, generator)
        memory = encoder(keys, values)
        logits: Any = graph.module(input_ids=text, attention_mask=torch.ones_like(text), memory=memory)
        nn.functional.cross_entropy(logits[:, -1], answers).backward()
        optimizer.step()
        optimizer.zero_grad()
    keys, values, text, answers = asked(512, generator)
    with torch.no_grad():
        memory = encoder.eval()(keys, values)
        given = {"right": {"memory": memory}, "none": {}, "shuffled": {"memory": memory.roll(1, 0)}}
        shares = {
            name: (graph(input_ids=text, **inputs)[:, -1].argmax(-1) == answers).float().mean().item()
            for name, inputs in given.items()
        }
    assert shares["right"] >= 0.95
    assert shares["none"] <= 0.05
    assert shares["shuffled"] <= 0.12
