"""What can be wrong with asking questions: metrics of retrieval where the data asks nothing."""

from __future__ import annotations

from recipes.document import Node
from recipes.mistakes import Mistakes

ASKED = ("eval/exact_match",)
"""Metrics of a training that asks questions."""


def check_questions(work: Node, mistakes: Mistakes) -> None:
    """Who wants to know what is looked up has data that asks."""
    evaluate, train = work.map.get("evaluate"), work.map.get("train")
    trained = [] if train is None else [train.map[key] for key in ("eval_data", "data") if key in train.map]
    own = [] if evaluate is None else [evaluate.map[key] for key in ("data",) if key in evaluate.map]
    metrics = [] if evaluate is None or "metrics" not in evaluate.map else evaluate.map["metrics"].list
    for metric in metrics:
        if metric.value == "retrieval" and not _asks([*own, *trained]):
            what = "evaluate.metrics asks for retrieval, but the data asks no questions"
            mistakes.add(metric.place, what, "give evaluate data: {retrieval: lookup}, or take retrieval out")
    for gate in work.map["require"].list if "require" in work.map else ():
        metric = gate.map.get("metric", gate)
        if metric.value in ASKED and train is not None and not _asks(trained):
            what = f"nothing here produces {metric.value}: the training asks no questions"
            mistakes.add(metric.place, what, "give train data: {retrieval: lookup}, or take the gate out")


def _asks(data: list[Node]) -> bool:
    """Whether the first of some sources that is given asks questions; what is mistaken is told elsewhere."""
    given = [node for node in data if node.value is not None or node.bad]
    return bool(given) and (given[0].bad or "retrieval" in given[0].map)
