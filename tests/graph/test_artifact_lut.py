"""Artifacts of LUT weights: opened in another process they compute the same bits, and no form passes for another."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graph import Graph, QcError, Selector
from graph.artifact import load, save
from graph.formats import LutOptions
from graph.probe import probe_inputs
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from passes.snap import Snap
from passes.ste_fp16 import SteFp16
from tests.graph.test_artifact import reseal
from tests.graph.tiny import qwen

WEIGHTS = Selector(name="*_proj.weight.*")
ELSEWHERE = """
import sys
from pathlib import Path
import torch
from graph.artifact import load
for name in sys.argv[2:]:
    graph = load(Path(sys.argv[1]) / name).graph.materialize()
    inputs = torch.load(Path(sys.argv[1]) / "inputs.pt")
    torch.save(graph(**inputs), Path(sys.argv[1]) / f"{name}.pt")
"""


def lut(form: str, *, rank: int = 4, rounded: bool = False) -> Graph:
    """2-bit weights of a model of two blocks."""
    graph = qwen().copy()
    for name in graph.tensors():
        graph.set_tensor(name, graph.tensor(name).detach().clone())
    options = LutOptions(bits=2, rank=rank, group=4, form=form)  # type: ignore[arg-type]
    apply(QuantizeBase(scheme="lut", lut=options), graph, check=False)
    if rounded:
        apply(SteFp16(), graph, check=False)
    return graph


def baked() -> Graph:
    graph = lut("factored", rounded=True)
    apply(Snap(select=WEIGHTS), graph, check=False)
    return graph


def vectors(rounded: bool = False) -> Graph:
    graph = qwen().copy()
    options = LutOptions(bits=4, vector=2, scale="channel")
    apply(QuantizeBase(scheme="lut", lut=options), graph, check=False)
    if rounded:
        apply(Snap(select=WEIGHTS), graph, check=False)
    return graph


GRAPHS = {"latent": lambda: lut("latent"), "factored": lambda: lut("factored", rounded=True), "baked": baked,
          "rank-3": lambda: lut("factored", rank=3), "vectors": vectors, "vectors-baked": lambda: vectors(rounded=True)}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact of each form."""
    folder = tmp_path_factory.mktemp("artifacts")
    for name, make in GRAPHS.items():
        save(folder / name, make())
    return folder


def test_another_process_computes_the_same_bits(written: Path) -> None:
    inputs = probe_inputs(lut("factored"))
    torch.save(inputs, written / "inputs.pt")
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(written), *GRAPHS], check=True)
    for name, make in GRAPHS.items():
        assert torch.equal(torch.load(written / f"{name}.pt"), make()(**inputs)), name


@pytest.mark.parametrize(
    ("graph", "weights", "expected"),
    [
        ("factored", "baked", "q_proj.weight.lut is float32"),
        ("baked", "factored", "q_proj.weight.lut is float16"),
        ("factored", "latent", "indices"),
        ("latent", "factored", "latent"),
        ("factored", "rank-3", "scale_a"),
        ("vectors", "vectors-baked", "q_proj.weight.lut is float32"),
    ],
)
def test_the_weights_of_one_form_are_refused_by_the_graph_of_another(
    graph: str, weights: str, expected: str, written: Path, tmp_path: Path
) -> None:
    mixed = Path(shutil.copytree(written / graph, tmp_path / "mixed"))
    shutil.copy(written / weights / "weights.safetensors", mixed / "weights.safetensors")
    with pytest.raises(QcError, match=r"weights\.safetensors (has|is not what was written)"):
        load(mixed)
    reseal(mixed)
    with pytest.raises(QcError, match=expected) as caught:
        load(mixed)
    assert caught.value.fix == "compile the recipe again; artifacts are not edited by hand"


def test_the_two_readings_of_the_same_scales_are_far_apart(written: Path) -> None:
    kept, other = load(written / "factored").graph.materialize(), load(written / "factored").graph.materialize()
    for site in other.sites("qc.dequantize_lut"):
        site.node.kwargs = {key: value for key, value in site.node.kwargs.items() if key != "scale_g"}
    other.module.recompile()
    inputs = probe_inputs(kept)
    right, wrong = kept(**inputs), other(**inputs)
    assert (right - wrong).norm() > 0.1 * right.norm(), "read as baked, magnitudes are lost: that must never be silent"
