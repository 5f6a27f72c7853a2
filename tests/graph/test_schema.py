"""graph.json: a graph as plain data and back, with every key known and every op allowed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import QcError
from graph.artifact import entries
from graph.ops import find_op
from graph.schema import from_json, to_json
from graph.weights import Stored, read_header, write
from tests.graph.tiny import qwen

FIX = "\n  fix    compile the recipe again; artifacts are not edited by hand"
EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    folder = tmp_path_factory.mktemp("weights")
    write(folder, entries(qwen(1)), stem="w")
    return read_header(folder / "w.safetensors")


@pytest.fixture(scope="module")
def whole() -> str:
    return json.dumps(to_json(qwen(1)))


@pytest.fixture
def data(whole: str) -> dict[str, Any]:
    """A graph as data, which a test may change."""
    found: dict[str, Any] = json.loads(whole)
    return found


def message(data: Any, stored: dict[str, Stored]) -> str:
    with pytest.raises(QcError) as caught:
        from_json(data, stored, "graph.json")
    return str(caught.value)


def op(data: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in data["nodes"] if entry["op"] == name)


def test_a_graph_is_the_same_after_a_round_trip(data: dict[str, Any], stored: dict[str, Stored]) -> None:
    graph = qwen(1)
    back = from_json(data, stored, "graph.json")
    assert str(back) == str(graph)
    assert back.tensors() == graph.tensors()
    assert json.dumps(to_json(back)) == json.dumps(data)
    for one, other in zip(graph.sites(), back.sites(), strict=True):
        assert (one.name, one.role, one.block, one.op) == (other.name, other.role, other.block, other.op)


def test_infinities_and_inputs_with_defaults_come_back(stored: dict[str, Stored]) -> None:
    graph = qwen(1)
    late = graph.module.graph.output_node()
    graph.add_input("training", False, default=False)
    graph.add_input("memory", torch.empty(0, dtype=torch.long), default=None, dims=("B", 2, "S"))
    node = graph.insert("aten.clamp", graph.site("lm_head").node, float("-inf"), 5.0, name="clamp", before=late)
    graph.set_outputs([node, graph.site("model.norm").node])
    graph.verify()
    back = from_json(json.loads(json.dumps(to_json(graph))), stored, "graph.json")
    assert str(back) == str(graph)
    assert back.inputs == ("input_ids", "attention_mask", "training", "memory")
    ids = torch.ones(2, 3, dtype=torch.long)
    assert [tuple(out.shape) for out in back(input_ids=ids)] == [(2, 3, 50), (2, 3, 32)]


CHANGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d.update(format="onnx"), "graph.json: it is not a graph of qc"),
    (lambda d: d.update(version=2), "graph.json: it has version 2, this qc reads 1"),
    (lambda d: d.update(extra=1), "graph.json: the file has the unknown key extra"),
    (lambda d: d["inputs"][0].update(extra=1), "graph.json: the input input_ids has the unknown key extra"),
    (lambda d: d["nodes"][-1].update(extra=1), "graph.json: the op lm_head has the unknown key extra"),
    (lambda d: d["tensors"][EMBED].update(extra=1), f"graph.json: {EMBED} has the unknown key extra"),
    (lambda d: d["tensors"].pop(EMBED), "graph.json: {file} holds " + EMBED + ", which the graph does not know"),
    (lambda d: d["tensors"].update({"new": d["tensors"][EMBED]}), "graph.json: new is in no weight file"),
    (lambda d: d["tensors"][EMBED].update(dtype="float16"), f"graph.json: {EMBED} is float16 [50, 32], and {{file}} holds float32 [50, 32]"),
    (lambda d: d["tensors"][EMBED].update(shape=[32, 50]), f"graph.json: {EMBED} is float32 [32, 50], and {{file}} holds float32 [50, 32]"),
    (lambda d: d["tensors"][EMBED].update(dtype="nn"), "graph.json: 'nn' is not a dtype"),
    (lambda d: d["nodes"][-1].update(op="os.system"), "graph.json: the op 'os.system' at lm_head is not allowed in a graph"),
    (lambda d: d["nodes"][-1].update(op="aten.save"), "graph.json: the op 'aten.save' at lm_head is not allowed in a graph"),
    (lambda d: d["nodes"][-1].update(op="aten.from_file"), "graph.json: the op 'aten.from_file' at lm_head is not allowed in a graph"),
    (lambda d: d["nodes"][-1].update(op="aten.relu_"), "graph.json: the op 'aten.relu_' at lm_head is not allowed in a graph"),
    (lambda d: d["nodes"][-1].update(op="qc.nothing"), "graph.json: the op 'qc.nothing' at lm_head is not allowed in a graph"),
    (lambda d: d["nodes"][-1]["args"][1].update(tensor="gone"), "graph.json: the tensor gone is read and not declared"),
    (lambda d: op(d, "qc.rms_norm")["args"].append({"torch": "os"}), "graph.json: {'torch': 'os'} is no argument of a graph"),
    (lambda d: d.pop("blocks"), "graph.json is damaged: KeyError 'blocks'"),
    (lambda d: d["nodes"][0]["args"][0].update(node="gone"), "graph.json is damaged: KeyError 'gone'"),
    (lambda d: d["nodes"][0]["args"][0].update(more=1), "graph.json is damaged: ValueError too many values to unpack (expected 1)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "what"), CHANGES)
def test_a_changed_graph_is_refused_with_its_reason(
    change: Callable[[dict[str, Any]], Any], what: str, data: dict[str, Any], stored: dict[str, Stored]
) -> None:
    change(data)
    assert message(data, stored) == what.replace("{file}", stored[EMBED].file) + FIX


def test_an_op_that_cannot_take_its_arguments_is_named(data: dict[str, Any], stored: dict[str, Stored]) -> None:
    data["nodes"][-1]["args"][0] = {"node": data["inputs"][0]["node"]}
    assert message(data, stored).splitlines()[1:] == ["  site   lm_head", FIX.lstrip("\n")]


def test_an_empty_or_foreign_file_is_no_graph(stored: dict[str, Stored]) -> None:
    nothings: tuple[Any, ...] = ({}, [], None, 3, "graph")
    for nothing in nothings:
        assert message(nothing, stored) == f"graph.json: it is not a graph of qc{FIX}"


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in nested data."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def test_nonsense_anywhere_is_an_error_and_never_a_traceback(data: dict[str, Any], stored: dict[str, Stored]) -> None:
    generator = random.Random(0)
    ways = [place for place in places(data) if place and place[0] != "config"]
    refused = 0
    for place in generator.sample(ways, 40):
        changed = copy.deepcopy(data)
        owner = changed
        for key in place[:-1]:
            owner = owner[key]
        owner[place[-1]] = generator.choice([None, -1, 1e300, "x", [], {}, [[None]], {"node": "input_ids"}, 10**30])
        try:
            from_json(changed, stored, "graph.json")
        except QcError:
            refused += 1
    assert refused >= 20


# -- the allow-list -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aten.linear", "aten.add.Tensor", "aten.arange", "aten.sym_size.int", "py.getitem", "qc.rope"])  # fmt: skip
def test_ops_that_only_compute_are_allowed(name: str) -> None:
    assert find_op(name) is not None


@pytest.mark.parametrize(
    "name",
    ["aten.save", "aten.from_file", "aten.add_.Tensor", "aten.warn", "aten._print", "aten.manual_seed", "aten.set_",
     "aten.__class__", "aten", "", "os.system", "builtins.eval", "prim.device", "c10d.allreduce_", "qc.op", "py.eval"],
)  # fmt: skip
def test_ops_that_do_anything_else_are_not(name: str) -> None:
    assert find_op(name) is None


def test_every_aten_op_without_a_tensor_makes_one_from_numbers() -> None:
    """What such an op could do besides is name a file; nothing of that kind is on the list."""
    for schema in torch._C._jit_get_all_schemas():
        name = f"aten.{schema.name.removeprefix('aten::')}" + (
            f".{schema.overload_name}" if schema.overload_name else ""
        )
        if schema.name.startswith("aten::") and find_op(name) is not None:
            kinds = {str(argument.type) for argument in schema.arguments}
            assert any("Tensor" in kind for kind in kinds) or "str" not in kinds, name


def test_a_saved_graph_reads_no_file_but_its_weights(
    data: dict[str, Any], stored: dict[str, Stored], tmp_path: Path
) -> None:
    data["nodes"].append({"name": "x", "op": "aten.from_file", "args": [str(tmp_path / "made"), True, 8], "site": "x"})
    assert message(data, stored) == f"graph.json: the op 'aten.from_file' at x is not allowed in a graph{FIX}"
    assert not (tmp_path / "made").exists()
