"""The verifier sees what no random token shows: rows that none reads, ends of windows, names, sizes, configurations.

And it fails no export that is right: of models with few positions, with counts of tokens, without a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper

from graph import Graph, QcError, capture
from passes.freeze_ternary import FreezeTernary
from passes.runner import apply
from passes.ste_fp16 import SteFp16
from passes.ternary_ste import TernarySte
from runtimes.export import ABOUT
from runtimes.onnx.file import MODEL
from runtimes.verify import onnx_worker as worker
from runtimes.verify import verify
from runtimes.verify.onnx_probes import probes_of
from tests.architectures import config
from tests.runtimes.ane.models import quantized, random
from tests.runtimes.onnx.running import written
from tests.runtimes.readers import read_here, verified_spoiled

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 999,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", SIZES),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 999, "n_positions": 256}),
    "gemma3": ("Gemma3TextConfig", {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 100}),
    "qwen3": ("Qwen3Config", {**SIZES, "num_key_value_heads": 2, "head_dim": 16}),
}


def made(configuration: Any) -> Graph:
    """A model of random weights, none of them zero or one."""
    torch.manual_seed(0)
    encoder = configuration.model_type in ("bert", "layoutlm")
    auto = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    model: Any = auto.from_config(configuration).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return capture(model)


@cache
def graph_of(name: str) -> Graph:
    kind, arguments = MODELS[name]
    graph = made(getattr(transformers, kind)(**arguments))
    return quantized(graph, "nf4", block=32) if name == "qwen3" else graph


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the export of a model, which lies in one file."""
    root = tmp_path_factory.mktemp("sound")

    def export(name: str) -> Path:
        if not (root / name).is_dir():
            graph = graph_of(name)
            written(graph, root / name, inline=10**9, kv=graph.kind == "causal-lm")
        return root / name

    return export


@pytest.fixture(autouse=True)
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    read_here(monkeypatch, worker)


# -- faults -----------------------------------------------------------------------------------------------------------


def rewriting(change: Callable[[Any], None]) -> Callable[[Path], None]:
    """A fault of the model itself."""

    def damage(folder: Path) -> None:
        model = onnx.load(str(folder / MODEL))
        change(model.graph)
        (folder / MODEL).write_bytes(model.SerializeToString())

    return damage


def scaled(name: str, row: int, by: float) -> Callable[[Path], None]:
    """A row of a table, times something."""

    def change(graph: Any) -> None:
        tensor = next(t for t in graph.initializer if t.name == name)
        values = numpy_helper.to_array(tensor).copy()
        values[row] *= np.float32(by)
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return rewriting(change)


def window(graph: Any) -> None:
    """A query sees one key more."""
    ends = [
        t
        for t in graph.initializer
        if t.data_type == onnx.TensorProto.INT64 and (numpy_helper.to_array(t) == 100).all()
    ]
    assert len(ends) == 1
    ends[0].CopyFrom(numpy_helper.from_array(np.array([101]), ends[0].name))


def one_index(graph: Any) -> None:
    """One of 2048 four-bit indices is the next one."""
    codes = next(t for t in graph.initializer if t.name == "model.layers.1.mlp.up_proj.weight.codes")
    codes.raw_data = bytes([codes.raw_data[0] ^ 1]) + codes.raw_data[1:]


def larger_scores(graph: Any) -> None:
    """Scores are a tenth larger."""
    scale = next(t for t in graph.initializer if not t.dims and t.data_type == 1 and numpy_helper.to_array(t) == 0.25)
    scale.CopyFrom(numpy_helper.from_array(np.array(0.275, dtype=np.float32), scale.name))


def fixed_sizes(graph: Any) -> None:
    """The model says that its results are of one batch and length."""
    for size, value in zip(graph.output[0].type.tensor_type.shape.dim, (2, 24), strict=False):
        size.dim_value = value


def other_output(graph: Any) -> None:
    last = next(node for node in graph.node if node.output[0] == "logits")
    last.output[0] = graph.output[0].name = "output"


def without_the_last_past(graph: Any) -> None:
    del graph.output[-1]


def past_of_another_name(graph: Any) -> None:
    for node in graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = name.replace("past_key_values.0.key", "past.0.key")
    for port in graph.input:
        port.name = port.name.replace("past_key_values.0.key", "past.0.key")


def json_of(name: str, **changed: Any) -> Callable[[Path], None]:
    """A fault of what the export says of itself, or of the model."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return damage


FAULTS: list[tuple[str, Callable[[Path], None], str, str]] = [
    ("bert", scaled("embeddings.word_embeddings.weight", 777, 0.5), "values",
     "embeddings.word_embeddings.weight is not embeddings.word_embeddings.weight of the graph: row 777 has"),
    ("bert", scaled("embeddings.position_embeddings.weight", 200, 0.5), "values", "row 200 has"),
    ("bert", scaled("embeddings.word_embeddings.weight", 778, float("nan")), "values", "row 778 has nan and not"),
    ("gpt2", scaled("transformer.wpe.weight", 200, 1.001), "values", "row 200 has"),
    ("gpt2", scaled("transformer.h.0.attn.c_attn.weight.turned", 5, 1.0001), "values",
     "transformer.h.0.attn.c_attn.weight.turned is not transformer.h.0.attn.c_attn.weight of the graph: row 0 has"),
    ("gemma3", scaled("model.norm.weight.plus_one", 0, 1.0001), "values", "model.norm.weight.plus_one is not"),
    ("gemma3", rewriting(window), "on random tokens", "max |Δ|"),
    ("qwen3", rewriting(one_index), "values", "is not model.layers.1.mlp.up_proj.weight of the graph"),
    ("gpt2", rewriting(fixed_sizes), "inputs and outputs",
     "output logits is FLOAT [2, 24, 999] and not FLOAT [batch, sequence, 999]"),
    ("gpt2", rewriting(other_output), "inputs and outputs", "output logits is missing and not"),
    ("qwen3", rewriting(without_the_last_past), "inputs and outputs",
     "output present.1.value is missing and not FLOAT [batch, 2, past_and_sequence, 16]"),
    ("qwen3", rewriting(past_of_another_name), "inputs and outputs", "input past_key_values.0.key is missing"),
    ("qwen3", json_of(ABOUT, kv=False), "inputs and outputs",
     "input attention_mask is INT64 [batch, past_and_sequence] and not INT64 [batch, sequence]"),
    ("bert", json_of("config.json", vocab_size=12), "configuration",
     "config.json has vocab_size 12 where the model has 999"),
    ("gpt2", json_of("config.json", eos_token_id=7), "configuration", "config.json has eos_token_id 7 where"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "what", "found"), FAULTS)
def test_a_fault_that_no_token_shows_is_found(
    name: str, damage: Callable[[Path], None], what: str, found: str, sound: Callable[[str], Path], tmp_path: Path
) -> None:
    report = verified_spoiled(sound(name), tmp_path / "out", damage, graph_of(name))
    failed = {finding.what: finding.found for finding in report.findings if not finding.passed}
    assert found in failed.get(what, ""), report.table()


def test_what_an_export_cannot_be_is_one_error(sound: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(QcError) as caught:
        verified_spoiled(sound("gpt2"), tmp_path / "out", json_of(ABOUT, dtype="bf16"), graph_of("gpt2"))
    assert str(caught.value) == f"{tmp_path / 'out' / ABOUT} is damaged\n  fix    export again"


# -- exports that are right -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_sound_exports_pass(name: str, sound: Callable[[str], Path]) -> None:
    report = verify(sound(name), graph_of(name))
    assert report.passed, report.table()


@pytest.mark.parametrize(
    ("shared", "dtype"), [({"granularity": "channel"}, "fp32"), ({"granularity": "group", "group": 16}, "fp16")]
)
def test_ternary_exports_pass(shared: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    graph = random("qwen3")
    apply(TernarySte(**shared), graph, check=False)
    apply(FreezeTernary(), graph, check=False)
    report = verify(written(graph, tmp_path / "out", dtype=dtype, kv=True), graph)
    assert report.passed, report.table()


def test_what_a_graph_rounds_to_fp16_may_be_rounded_apart(tmp_path: Path) -> None:
    graph = quantized(random("qwen3"), "lut", rank=2, group=8)
    apply(SteFp16(), graph, check=False)
    report = verify(written(graph, tmp_path / "out"), graph)
    assert report.passed, report.table()
    assert report.figures()["max_difference"] > 1e-4  # which is too much where nothing is rounded
    spoiled = verified_spoiled(tmp_path / "out", tmp_path / "spoiled", rewriting(larger_scores), graph)
    assert "on random tokens" in [finding.what for finding in spoiled.findings if not finding.passed]


@pytest.mark.parametrize("name", ["opt", "layoutlm"])
def test_a_model_that_counts_its_mask_is_asked_for_no_documents(name: str, tmp_path: Path) -> None:
    graph = random(name)
    assert all(int(probe.mask.max()) == 1 for probe in probes_of(graph, False, None))
    report = verify(written(graph, tmp_path / "out"), graph)
    assert report.passed, report.table()


def test_no_probe_is_longer_than_the_positions_of_the_model(tmp_path: Path) -> None:
    graph = made(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=99, n_positions=7))
    report = verify(written(graph, tmp_path / "out", kv=True), graph)
    assert report.passed, report.table()


def test_how_to_generate_is_no_tokenizer(tmp_path: Path) -> None:
    graph = random("llama")
    folder = written(graph, tmp_path / "out")
    assert (folder / "generation_config.json").is_file()
    report = verify(folder, graph)
    assert report.passed, report.table()
    assert (report.findings[-1].what, report.findings[-1].found) == ("tokenizer", "none")


def test_a_sliding_window_is_read_beyond_its_end_where_that_is_not_far() -> None:
    lengths = [probe.ids.shape[1] for probe in probes_of(graph_of("gemma3"), True, None)]
    assert 109 in lengths
    far = capture(
        transformers.MistralConfig(
            **{**SIZES, "max_position_embeddings": 9000, "num_key_value_heads": 4}, sliding_window=4096
        )
    )
    assert max(probe.ids.shape[1] for probe in probes_of(far, False, None)) == 41


@pytest.mark.parametrize(("scheme", "dtype"), [("int8", "fp16"), ("fp8", "fp32"), ("int4", "fp16"), ("lut", "fp32")])
def test_packed_values_are_those_of_the_graph_in_either_dtype(scheme: str, dtype: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lut": {"rank": 2, "group": 8}, "int4": {"block": 32}}.get(scheme, {})
    graph = quantized(made(config("qwen3")), scheme, **options)
    report = verify(written(graph, tmp_path / "out", dtype=dtype), graph)
    found = {finding.what: finding for finding in report.findings}["values"]
    assert found.passed, found.found
