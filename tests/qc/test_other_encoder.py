"""A run whose encoder is another kind of model than its decoder: wider, of other tokens, with a table of positions."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

import qc
from graph.artifact import load
from graph.errors import QcError
from qc.exporting import export_newest
from runtimes.context import with_context
from runtimes.generate import Generator
from runtimes.retrieval.questions import fits
from runtimes.sampling import Sampling
from runtimes.settings import Retrieval
from tests.graph.tiny import qwen
from tests.qc.wordpiece import POSITIONS, WIDTH, bert

DATA = (
    "{{retrieval: lookup, chunks: 2, entries: 1, filler: 0, key: 1, value: 1, chunk_length: {chunk_length}, "
    'forms: ["{{key}}:{{value}}"], ask: "{{key}}:"}}'
)

RECIPE = f"""
models:
  encoder: {{{{model: {{encoder}}, kind: encoder}}}}
  decoder: {{{{model: {{decoder}}}}}}
stages:
  - name: learn
    passes:
      - quantize-base: {{{{scheme: nf4}}}}
        on: "*"
      - add-lora: {{{{set: encoder, rank: 2}}}}
        on: encoder
      - insert-gca: {{{{start: 0, every_n: 1}}}}
        on: decoder
      - attach-memory: {{{{}}}}
    train:
      data: {DATA}
      steps: 3
      batch: 4
      length: 16
      packing: false
      lr: 1.0e-3
      plot: false
  - name: dequantized
    passes: [{{{{swap-base: {{{{}}}}}}}}, {{{{merge-lora: {{{{}}}}}}}}]
    evaluate:
      data: {DATA}
      metrics: [retrieval, top1]
      batches: 1
      batch: 4
      length: 16
"""


def recipe(where: Path, decoder: Path) -> Path:
    encoder = where / "bert"
    bert(encoder)
    path = where / "other.yaml"
    path.write_text(RECIPE.format(encoder=encoder, decoder=decoder, chunk_length=POSITIONS))
    return path


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages."""
    where = tmp_path_factory.mktemp("other")
    qc.run(recipe(where, folder / "tiny"), runs=where / "runs")
    (found,) = (where / "runs" / "other").iterdir()
    return found


def test_it_trains_with_a_projection_between_the_two_widths(run: Path) -> None:
    before, after = (load(run / "learn" / what).graph for what in ("compiled", "trained"))
    name = "encoder.memory.weight"
    assert after.shape(name) == (64, WIDTH)
    assert torch.equal(before.tensor(name), torch.eye(64, WIDTH))
    trained = {n for n, info in after.tensors().items() if info.trainable}
    assert trained == {n for n in after.tensors() if not torch.equal(before.tensor(n), after.tensor(n))}
    assert {after.info(n).group for n in trained} == {"gca", "lora.encoder", "encoder.memory"}
    packed = {n for n in after.tensors() if n.startswith("encoder.encoder.layer.0") and n.endswith(".indices")}
    assert len(packed) == 6, "all linears of a block of BERT are packed"
    lora = {n for n in trained if n.startswith("encoder.encoder.layer.0") and "lora_A" in n}
    assert len(lora) == 6, "and all of them have LoRA"
    with open(run / "learn" / "train" / "metrics.csv", newline="") as file:
        assert all(float(row["loss"]) > 0 for row in csv.DictReader(file))


def test_each_model_reads_with_its_own_tokenizer(run: Path) -> None:
    artifact = load(run / "learn" / "trained")
    tokenizer, of_chunks = artifact.load_tokenizer(), artifact.load_memory_tokenizer()
    assert of_chunks("a:b")["input_ids"] == [2, 5, 4, 6, 3]
    assert tokenizer("a:b")["input_ids"] == [ord(letter) - 33 for letter in "a:b"]
    model = with_context(artifact.graph, of_chunks, ["a:b " * 20])
    assert Generator(model, tokenizer, eos=[])([[3, 1, 4]], Sampling(max_tokens=2)).rows[0].ids


def test_deployed_with_floats_it_computes_what_was_trained(run: Path) -> None:
    (found,) = [one for one in json.loads((run / "measured.json").read_text()) if "top1" in one]
    assert found["step"] == "dequantized/compiled"
    assert found["top1"] == 1.0


def test_exported_it_comes_back_from_transformers(run: Path, tmp_path: Path) -> None:
    compiled = str(run / "dequantized" / "compiled")
    found = export_newest(compiled, "safetensors", "fp32", tmp_path / "out", True, False, run, print)
    assert found["export/psnr_db"] > 70


def test_chunks_longer_than_its_positions_are_refused(run: Path) -> None:
    graph = load(run / "learn" / "trained").graph
    with pytest.raises(QcError) as caught:
        fits(graph, Retrieval(retrieval="lookup", chunk_length=POSITIONS + 1))
    assert str(caught.value) == (
        "chunk_length is 65, and the encoder has positions for 64 tokens\n"
        "  fix    set chunk_length to 64; a chunk that is longer is an error then"
    )
    fits(graph, Retrieval(retrieval="lookup", chunk_length=POSITIONS))
    fits(qwen(), Retrieval(retrieval="lookup", chunk_length=10**6))
