"""Capture: the graph computes what transformers computes, for many architectures, lengths and dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graph import Graph, QcError, capture
from tests.architectures import CAUSAL, ENCODERS, REFUSED, config, maker

QUICK = ("qwen3", "gpt2", "gemma2", "mistral", "bert", "modernbert")
EVERY = [
    pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in (*CAUSAL, *ENCODERS) if n not in REFUSED
]


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = maker(name).from_config(config(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that start at 0 or 1 would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def saved(name: str, folder: Path) -> tuple[Any, Path]:
    model = model_of(name)
    model.save_pretrained(folder)
    return model, folder


def expected(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask)
    found: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found


def padded(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 99, shape, generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, -2:] = 0
    return ids, mask


SHAPES = ((2, 9), (5, 33))
"""Neither is a shape that capture looks at."""


def kind(name: str) -> Any:
    return "causal-lm" if name in CAUSAL else "encoder"


@pytest.mark.parametrize("name", EVERY)
def test_the_graph_of_a_folder_is_bit_identical_to_transformers(name: str, tmp_path: Path) -> None:
    model, folder = saved(name, tmp_path)
    raw = capture(str(folder), kind=kind(name), canonical=False).materialize()
    for shape in SHAPES:
        ids, mask = padded(shape)
        assert torch.equal(raw(input_ids=ids, attention_mask=mask), expected(model, ids, mask))


@pytest.mark.parametrize("name", EVERY)
def test_the_canonical_graph_agrees_in_fp32_and_bf16(name: str, tmp_path: Path) -> None:
    model, folder = saved(name, tmp_path)
    graph = capture(str(folder), kind=kind(name)).materialize()
    for shape in SHAPES:
        ids, mask = padded(shape)
        for given in (mask, torch.ones_like(mask)):
            torch.testing.assert_close(
                graph(input_ids=ids, attention_mask=given), expected(model, ids, given), atol=1e-5, rtol=1e-5
            )
    ids, mask = padded(SHAPES[0])
    exact = expected(model, ids, mask)[mask.bool()]
    low = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()
    noise = (expected(low, ids, mask)[mask.bool()].float() - exact).abs().max()
    graph.to(torch.bfloat16)
    ours = (graph(input_ids=ids, attention_mask=mask)[mask.bool()].float() - exact).abs().max()
    assert ours <= 1.5 * noise + 1e-6


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_is_in_the_graph_and_read_or_carried(name: str) -> None:
    model = model_of(name)
    graph = capture(model, kind=kind(name))
    known = {n for name, info in graph.tensors().items() for n in (name, *info.aliases)}
    assert {n for n, _ in model.named_parameters(remove_duplicate=False)} <= known
    unread = [n for n, i in graph.tensors().items() if i.kind == "parameter" and n not in read_tensors(graph)]
    others = ("pooler.", "contact_head.", "embeddings.word_embeddings")  # for other outputs than a graph has
    assert all(n.startswith(others) for n in unread), unread


def read_tensors(graph: Graph) -> set[str]:
    return {name for site in graph.sites() for name in site.tensors()}


def test_attention_is_one_op_and_keys_are_never_repeated() -> None:
    graph = capture(config("qwen3"))
    (attention, _) = graph.sites("qc.attention")
    assert [str(n.meta["val"].shape[1]) for n in attention.node.all_input_nodes[:3]] == ["4", "2", "2"]
    assert not [s for s in graph.sites() if "repeat" in s.op or s.op == "aten.expand"]


def test_roles_follow_from_what_flows_where() -> None:
    graph = capture(config("qwen3"))
    block = [s.role for s in graph.sites("aten.linear") if s.block == 1]
    assert block == ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    assert graph.sites("aten.linear")[-1].role == "head"
    assert [s.name for s in graph.sites() if s.role == "block_out"] == ["model.layers.0/add.2", "model.layers.1/add.2"]


def test_a_tied_head_is_one_tensor_with_two_readers() -> None:
    graph = capture(config("qwen3"))
    assert graph.info("model.embed_tokens.weight").aliases == ("lm_head.weight",)
    readers = [s.name for s in graph.sites() if "model.embed_tokens.weight" in s.tensors()]
    assert readers == ["model.embed_tokens", "lm_head"]


def test_documents_packed_into_a_row_do_not_see_each_other() -> None:
    graph = capture(model_of("qwen3"))
    first, second = torch.randint(5, 99, (1, 6)), torch.randint(5, 99, (1, 7))
    packed = graph(input_ids=torch.cat((first, second), 1), attention_mask=torch.tensor([[1] * 6 + [2] * 7]))
    torch.testing.assert_close(packed[:, :6], graph(input_ids=first), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 6:], graph(input_ids=second), atol=1e-5, rtol=1e-5)


def test_a_model_in_memory_shares_its_weights_with_the_graph() -> None:
    model = model_of("qwen3")
    graph = capture(model)
    assert graph.tensor("model.norm.weight").data_ptr() == model.model.norm.weight.data_ptr()


def test_a_configuration_gives_a_plan_without_weights() -> None:
    graph = capture(config("qwen3"), dtype=torch.bfloat16)
    assert graph.tensor("model.norm.weight").is_meta and not graph.lazy()
    assert graph.dtype_of("model.norm.weight") == torch.bfloat16


def test_what_is_no_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(QcError) as caught:
        capture(torch.nn.Linear(2, 2))
    assert str(caught.value) == (
        "Linear is not a transformers model\n  fix    capture a plain module with qc.capture_module(module, *example)"
    )
    with pytest.raises(QcError, match=r"has no config\.json"):
        capture(str(tmp_path))


@pytest.mark.slow
def test_an_8b_configuration_is_captured_in_half_a_minute_and_two_gigabytes() -> None:
    import subprocess
    import sys

    code = (
        "import resource, time, torch; from transformers import Qwen3Config; from graph import capture\n"
        "start = time.process_time()\n"
        "capture(Qwen3Config(hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,"
        " head_dim=128, intermediate_size=12288, vocab_size=151936), dtype=torch.bfloat16)\n"
        "print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    seconds, gigabytes = map(float, done.stdout.split()[-2:])
    assert seconds < 30
    assert gigabytes < 2
