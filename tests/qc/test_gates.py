"""Gates on what a training shows of itself: which held, and by what, stands in a file beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graph.artifact import sealed
from qc.console import GateFailed
from qc.measuring import check_gates
from qc.runs import Run
from recipes.schema import Stage
from recipes.settings import Gate

METRICS = """step,loss,grad_norm/encoder,grad_norm/gca,gate_moved,eval_exact_match
1,4.0,0.5,1.0,0.01,
2,3.0,0.25,1.0,0.02,0.125
3,2.0,0.5,nan,0.03,
4,1.0,0.125,1.0,0.04,0.5
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metrics.csv").write_text(METRICS)
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "manifest.json").write_bytes(sealed({"format": "qc-artifact", "version": 1, "reports": []}))
    run.measure("trained", **{"exact_match": 0.5, "exact_match/no_memory": 0.0})
    return run


def check(run: Run, *gates: Gate) -> list[str]:
    told: list[str] = []
    check_gates(run, Stage(name="main"), gates, run.folder / "trained", told.append)
    return told


def written(run: Run) -> list[dict[str, object]]:
    return list(json.loads((run.folder / "gates.json").read_text()))


def test_gates_that_hold_are_told_and_written_down(run: Run) -> None:
    gates = (
        Gate(metric="train/loss", op="decreased", window=2),
        Gate(metric="train/encoder_grad_norm", op=">", value=0),
        Gate(metric="train/encoder_grad_norm", op="finite"),
        Gate(metric="train/gate_moved", op=">", value=0),
        Gate(metric="eval/exact_match", op=">=", value=0.5),
        Gate(metric="exact_match/no_memory", op="<=", value=0.05),
    )
    assert check(run, *gates) == [
        "gate train/loss decreased : from 3.5 to 1.5",
        "gate train/encoder_grad_norm > 0: it is 0.125",
        "gate train/encoder_grad_norm finite : all finite",
        "gate train/gate_moved > 0: it is 0.04",
        "gate eval/exact_match >= 0.5: it is 0.5",
        "gate exact_match/no_memory <= 0.05: it is 0",
    ]
    first = {"metric": "train/loss", "op": "decreased", "value": None, "window": 2, "held": True}
    assert written(run)[0] == first | {"why": "from 3.5 to 1.5", "steps": 4, "first": 3.5, "last": 1.5, "finite": 4}
    assert written(run)[-1] == {
        "metric": "exact_match/no_memory", "op": "<=", "value": 0.05, "window": None, "held": True, "why": "it is 0",
    }  # fmt: skip


def test_gates_that_fail_end_the_run_and_are_written_down_too(run: Run) -> None:
    gates = (
        Gate(metric="exact_match", op=">=", value=0.9),
        Gate(metric="train/gca_grad_norm", op="finite"),
        Gate(metric="train/loss", op="decreased"),
    )
    with pytest.raises(GateFailed) as caught:
        check(run, *gates)
    assert (
        caught.value.what == "exact_match >= 0.9 fails: it is 0.5; train/gca_grad_norm finite fails: 1 values are not"
    )
    assert [one["held"] for one in written(run)] == [False, False, True]
    assert (written(run)[1]["first"], written(run)[1]["finite"]) == (1.0, 3)
    assert written(run)[1]["last"] is None
    check(run, Gate(metric="exact_match", op=">=", value=0.4))
    kept = [(one["metric"], one["held"]) for one in written(run)]
    assert kept == [("train/gca_grad_norm", False), ("train/loss", True), ("exact_match", True)]
