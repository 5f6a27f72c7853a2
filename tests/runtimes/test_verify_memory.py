"""A decoder that looks things up in a memory: its keys and values are inputs of the packages."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from graph import Graph, QcError
from graph.prepared import prepare
from graph.probe import evaluate_constant, psnr_db
from passes.hoist_memory_kv import HoistMemoryKv
from passes.insert_gca import InsertGca
from passes.runner import apply
from runtimes.ane import memory as emitter
from runtimes.coreml.decoder import Decoder, Session
from runtimes.coreml.meta import read_meta
from runtimes.export.ane import check
from runtimes.mil import Package
from runtimes.verify import verify
from tests.runtimes.coreml.exports import decoder_graph, write
from tests.runtimes.test_verify_packages import same_process  # noqa: F401  a fixture

TOKENS = 8


def reading(hoisted: bool = True) -> Graph:
    graph = decoder_graph(num_hidden_layers=2)
    apply(InsertGca(layers=(0, 1), width=24), graph, check=False)
    if hoisted:
        apply(HoistMemoryKv(), graph, check=False)
    return graph


@pytest.fixture(scope="module")
def graph() -> Graph:
    return reading()


@pytest.fixture(scope="module")
def exported(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(graph, tmp_path_factory.mktemp("memory"), memory=TOKENS)


def test_an_unhoisted_memory_is_refused() -> None:
    assert [str(error) for error in check(reading(hoisted=False), context=32, prefill=8)] == [
        "the decoder works the keys and values of its memory out itself\n  fix    run hoist-memory-kv before the export"
    ]


def test_chunks_take_keys_and_values_and_hold_no_projection_of_the_memory(exported: Path) -> None:
    meta = read_meta(exported)
    keys = {f"memory_{what}_{i}": (1, 2, TOKENS, 16) for i in (0, 1) for what in ("key", "value")}
    assert meta.memory == {**keys, "memory_mask": (1, 1, 1, TOKENS)}
    function = Package(exported / "chunk_1.mlpackage").function("infer")
    assert set(meta.memory) <= {v.name for v in function.inputs}
    kinds = Counter(op.type for op in function.operations)
    assert (kinds["softmax"], kinds["conv"]) == (4, 2 * (7 + 2))  # q and o of each memory, beside seven of a block
    assert not [op.name for op in function.operations if "gca_k_proj" in op.name or "gca_v_proj" in op.name]


@pytest.mark.usefixtures("same_process")
def test_an_export_that_reads_a_memory_is_verified_with_one_and_without(graph: Graph, exported: Path) -> None:
    found = verify(exported, graph)
    assert found.passed, found.table()


def test_a_memory_of_few_tokens_and_none_give_what_the_graph_gives(graph: Graph, exported: Path) -> None:
    ids = torch.randint(0, 100, (13,), generator=torch.Generator().manual_seed(1))
    states = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(2))
    made = prepare(graph, {"memory": states, "memory_mask": torch.ones(1, 5, dtype=torch.long)})
    given = {name: value for name, value in made.items() if name != "memory_mask"}
    with torch.no_grad():
        wanted = graph(input_ids=ids[None], memory=states)[0]
        without = graph(input_ids=ids[None])[0]
    decoder = Decoder(exported)
    assert psnr_db(wanted, Session(decoder, given).read_all(ids.tolist())) > 60
    assert psnr_db(without, Session(decoder).read_all(ids.tolist())) > 60
    assert psnr_db(wanted, without) < 40
    with pytest.raises(QcError, match=f"the memory has 9 tokens, the export takes {TOKENS}"):
        Session(decoder, {name: torch.zeros(1, 2, 9, 16) for name in given})
    with pytest.raises(QcError, match="the memory is memory_key_0"):
        Session(decoder, {"memory_key_0": given["memory_key_0"]})


@pytest.mark.slow
@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("fault", ["the gate is open", "keys and values change places", "padding is seen"])
def test_a_fault_is_found(fault: str, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = emitter._inputs
    if fault == "the gate is open":
        opened = partial(torch.ones_like, dtype=torch.float32)
        monkeypatch.setattr(
            emitter, "evaluate_constant", lambda graph, node: 20 * opened(evaluate_constant(graph, node))
        )
    elif fault == "padding is seen":
        monkeypatch.setattr(emitter, "_inputs", lambda low, node: (*inputs(low, node)[:3], np.float16(0)))
    else:
        monkeypatch.setattr(emitter, "_inputs", lambda low, node: tuple(inputs(low, node)[i] for i in (0, 2, 1, 3)))
    found = verify(write(graph, tmp_path, memory=TOKENS), graph)
    assert "in fp32 arithmetic" in [f.what for f in found.findings if not f.passed], found.table()
