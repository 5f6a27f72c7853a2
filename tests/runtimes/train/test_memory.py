"""memory: what does not fit is computed again, blocks first, then MLPs some tokens at a time; nothing else changes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graph import Graph, QcError, Selector, capture
from graph.formats.memory import release_freed
from passes.add_lora import AddLora
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from passes.ternary_ste import TernarySte
from recipes.load import load
from runtimes.data import Batch
from runtimes.settings import PythonStdlib, Train
from runtimes.train.distribute import Processes
from runtimes.train.objectives import next_token
from runtimes.train.student import Student
from tests.runtimes.train.tiny import corpus, run, settings, tiny_graph
from tools.bench.resident import kibibytes, mark_here

ROWS, LENGTH = 2, 256
ROOT = Path(__file__).parents[3]


@cache
def _wide() -> Graph:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = Qwen3Config(
        hidden_size=32, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=4096, vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    return capture(Qwen3ForCausalLM(config))


def plain() -> Graph:
    graph = _wide().copy()
    for name, info in graph.tensors().items():
        if info.kind == "parameter":
            graph.set_info(name, trainable=True)
    return graph


def ternary() -> Graph:
    graph = _wide().copy()
    apply(TernarySte(tau=0.7), graph, check=False)
    return graph


def adapted() -> Graph:
    graph = _wide().copy()
    apply(QuantizeBase(scheme="nf4", block=32), graph, check=False)
    apply(AddLora(rank=2, alpha=4, select=Selector(role="mlp.*")), graph, check=False)
    for name in graph.tensors():
        if ".lora_B" in name:
            graph.set_tensor(name, torch.randn(graph.shape(name), generator=torch.Generator().manual_seed(3)) / 10)
    return graph


def student(graph: Graph, memory: str | None, folder: Path, **changes: Any) -> Student:
    chosen = Train(data=PythonStdlib(), steps=1, lr=1.0, batch=ROWS, length=LENGTH, memory=memory, **changes)
    return Student(graph, chosen, Processes(folder, ()))


def step(made: Student) -> tuple[float, dict[str, Tensor]]:
    """The loss of a batch, and its gradients."""
    ids = torch.randint(0, 64, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    batch = Batch(ids, torch.ones_like(ids), ids.roll(-1, 1))
    loss = next_token(made(batch, training=True), batch) / ids.numel()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in made.parameters.items() if p.grad is not None}
    for p in made.parameters.values():
        p.grad = None
    return loss.item(), gradients


@pytest.mark.parametrize("model", [plain, ternary, adapted])
def test_loss_and_gradients_are_those_of_a_step_that_keeps_everything(model: Any, tmp_path: Path) -> None:
    loss, gradients = step(student(model(), None, tmp_path))
    short = student(model(), "1MB", tmp_path)
    again, found = step(short)
    assert ", and MLPs 32 tokens at a time" in short.notes[0]
    assert again == pytest.approx(loss, rel=1e-6)
    assert found.keys() == gradients.keys() and gradients
    for name, wanted in gradients.items():
        # the order of 512 fp32 summands alone makes up to 2e-6, by the number of threads
        assert (found[name] - wanted).norm() <= 1e-5 * wanted.norm() + 1e-12, name


def peak(made: Student) -> int:
    """Bytes that a step takes at its highest beyond what is held before it."""
    step(made)
    release_freed()
    mark_here()
    before = kibibytes("VmRSS")
    step(made)
    return 1024 * (kibibytes("VmHWM") - before)


PEAKS = """
import sys
from pathlib import Path
from tests.runtimes.train.test_memory import peak, plain, student
for memory, options in ((None, {}), (None, {"checkpointing": True}), ("1MB", {})):
    print(peak(student(plain(), memory, Path(sys.argv[1]), **options)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_a_step_takes_less_memory_where_blocks_and_parts_of_mlps_are_computed_again(tmp_path: Path) -> None:
    """In a process whose tensors are mapped one by one, as large ones always are.

    The holes that others leave in the heap hide what a step takes.
    """
    fixed = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAKS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=fixed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, blocks, chunks = (int(line) for line in done.stdout.split())
    assert blocks < 0.4 * whole
    assert chunks < 0.5 * blocks


def test_no_more_is_computed_again_than_the_memory_asks_for(tmp_path: Path) -> None:
    def said(memory: str) -> str:
        (note,) = student(plain(), memory, tmp_path).notes
        return note

    enough = said("20GiB")
    whole = int(re.search(r"^memory: a step takes about (\d+) MiB of the 20.00 GiB that there are$", enough)[1])  # type: ignore[index]
    assert "computed again" not in said("auto")
    blocks = re.fullmatch(
        r"memory: a step takes about \d+ MiB of the \d+ MiB that there are; "
        r"blocks are computed again in the backward, which takes (\d+) MiB",
        said(f"{whole - 2}MiB"),
    )
    assert blocks is not None
    less = said(f"{int(blocks[1]) - 2}MiB")
    assert "and MLPs 128 tokens at a time, which takes" in less and "still too much" not in less


def test_what_cannot_be_enough_is_said(tmp_path: Path) -> None:
    assert (
        student(plain(), "1MB", tmp_path).notes[0].endswith("That is still too much: lower batch, and raise accumulate")
    )


def test_an_mlp_that_drops_values_stays_whole_and_says_so(tmp_path: Path) -> None:
    graph = _wide().copy()
    apply(AddLora(rank=2, alpha=4, dropout=0.1, select=Selector(role="mlp.*")), graph, check=False)
    (said,) = student(graph, "1MB", tmp_path).notes
    assert "blocks are computed again in the backward, which" in said
    assert said.endswith("; of MLPs, mlp.0 drops values at random")


def test_a_training_says_what_it_turned_on_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    data, found = corpus(tmp_path / "text"), []
    for memory in (None, "1MB"):
        graph = tiny_graph("layers")
        report = run(graph, settings(data, memory=memory, length=64), tmp_path / str(memory))
        found.append({name: graph.tensor(name) for name, info in graph.tensors().items() if info.trainable})
    assert any("MLPs 32 tokens at a time" in note for note in report.notes)
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-3, atol=1e-4)


def test_a_size_that_cannot_be_read_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model: seedling\ntrain:\n  data: python-stdlib\n  steps: 1\n  lr: 1.0e-3\n  memory: 8 gigs\n"
    )
    with pytest.raises(QcError) as caught:
        load(str(tmp_path / "recipe.yaml"))
    assert str(caught.value) == (
        f"train.memory cannot be '8 gigs'\n  recipe {tmp_path}/recipe.yaml:6:11\n"
        "  fix    write memory: auto, or a size such as memory: 8GiB"
    )


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 << 30), ("1.5 MB", 1500000), ("auto", 0), ("0MB", None)])
def test_sizes_are_read(text: str, size: int | None) -> None:
    assert replace(settings(PythonStdlib()), memory=text).memory_bytes() == size
