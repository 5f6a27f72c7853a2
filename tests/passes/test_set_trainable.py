from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from graph import Graph, QcError, QcErrors, Selector, capture, capture_module
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from passes.set_trainable import SetTrainable


@cache
def captured() -> Graph:
    config = Qwen3Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                         intermediate_size=128, vocab_size=100, tie_word_embeddings=True)  # fmt: skip
    return capture(Qwen3ForCausalLM(config).eval())


def qwen() -> Graph:
    return captured().copy()


def trained(graph: Graph) -> dict[str, str | None]:
    return {name: info.group for name, info in graph.tensors().items() if info.trainable}


def test_the_graph_looks_as_before_and_the_selected_tensors_train() -> None:
    graph = qwen()
    text = str(graph)
    report = apply(SetTrainable(select=Selector(role="norm", block=1)), graph)
    assert str(graph) == text
    names = [f"model.layers.1.{n}.weight" for n in
             ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm")]  # fmt: skip
    assert sorted(trained(graph)) == sorted(report.changed) == sorted(names)
    assert report.figures == {"trainable_tensors": 4, "trainable_values": 16 + 16 + 64 + 64}
    graph(input_ids=torch.randint(0, 100, (2, 5))).sum().backward()
    values = dict(graph.module.named_parameters())
    assert {n for n, p in values.items() if p.grad is not None} == set(names)


def test_a_second_run_finds_nothing() -> None:
    graph = qwen()
    step = SetTrainable(groups={"norms": Selector(role="norm"), "top": Selector(role="mlp.*", block=-1)})
    assert len(apply(step, graph).changed) == 9 + 3
    before = graph.tensors()
    assert apply(step, graph).changed == ()
    assert graph.tensors() == before


def test_groups_name_what_they_train_and_the_rest_is_frozen() -> None:
    graph = qwen()
    apply(SetTrainable(select=Selector(role="mlp.*")), graph)
    apply(SetTrainable(groups={"a": Selector(name="*.q_proj.weight"), "b": Selector(role="embed")}), graph)
    assert trained(graph) == {
        "model.embed_tokens.weight": "b",
        "model.layers.0.self_attn.q_proj.weight": "a",
        "model.layers.1.self_attn.q_proj.weight": "a",
    }
    apply(SetTrainable(select=Selector(name="*.0.*.q_proj.weight")), graph)
    assert trained(graph) == {"model.layers.0.self_attn.q_proj.weight": "a"}
    assert graph.info("model.layers.1.self_attn.q_proj.weight").group is None


def test_without_freezing_the_rest_goes_on_training() -> None:
    graph = qwen()
    apply(SetTrainable(groups={"embedding": Selector(role="embed")}), graph)
    apply(SetTrainable(select=Selector(name="model.norm.weight"), freeze_rest=False), graph)
    assert trained(graph) == {"model.embed_tokens.weight": "embedding", "model.norm.weight": None}


def test_with_nothing_selected_nothing_trains() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x)

    graph = capture_module(Mlp(), torch.randn(3, 4))
    assert apply(SetTrainable(), graph).changed == ("up.weight", "up.bias")
    assert trained(graph) == {}
    assert not any(p.requires_grad for p in graph.module.parameters())


def test_everything_means_every_parameter_and_not_the_tables_that_are_computed() -> None:
    graph = qwen()
    apply(SetTrainable(select=Selector()), graph)
    assert set(trained(graph)) == {n for n, info in graph.tensors().items() if info.kind == "parameter"}
    assert not graph.info("model.rotary_emb.inv_freq").trainable


def test_packed_integers_do_not_train() -> None:
    graph = qwen()
    apply(QuantizeBase(), graph)
    with pytest.raises(QcError) as caught:
        apply(SetTrainable(select=Selector(role="attn.q")), graph, line="r.yaml:9:5")
    assert str(caught.value) == (
        "model.layers.0.self_attn.q_proj.weight.indices and 3 more are part of a packed weight, which cannot train\n"
        "  recipe r.yaml:9:5\n"
        "  fix    run dequantize first, or exclude '*.weight.*'"
    )
    assert trained(graph) == {}
    apply(SetTrainable(select=Selector(exclude=("*.weight.*", "norm"))), graph)
    assert trained(graph) == {"model.embed_tokens.weight": None}


def test_all_mistakes_are_reported_at_once() -> None:
    groups = {"a": Selector(role="norm"), "b": Selector(name="model.norm.*"), "c": Selector(role="nrm")}
    graph = qwen()
    before = graph.tensors()
    with pytest.raises(QcErrors) as caught:
        apply(SetTrainable(groups=groups), graph)
    assert str(caught.value) == (
        "model.norm.weight is in the groups 'a' and 'b'\n"
        "  fix    let one of them exclude it\n\n"
        "group 'c': select {role: nrm} matches no tensor\n"
        "  fix    did you mean role 'norm'?"
    )
    assert graph.tensors() == before


def test_a_plan_without_weights_is_marked_the_same() -> None:
    config = Qwen3Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                         intermediate_size=128, vocab_size=100)  # fmt: skip
    graph = capture(config)
    apply(SetTrainable(groups={"norms": Selector(role="norm")}), graph)
    assert len(trained(graph)) == 5
    assert set(trained(graph).values()) == {"norms"}
