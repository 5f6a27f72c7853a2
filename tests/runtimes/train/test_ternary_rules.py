"""The seedling by the rule of BitNet, in groups: training brings back what rounding alone has cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from graph import Graph, capture
from graph.checkpoint import locate
from graph.tokenizer import load_tokenizer
from passes.runner import apply
from passes.ternary_ste import TernarySte
from runtimes.data.corpus import Corpus
from runtimes.evaluate import evaluate
from runtimes.settings import Group, Kd, PythonStdlib, Train
from runtimes.train import Silent, train

STEPS, BATCH, LENGTH, HELDOUT = 150, 8, 128, 16


def perplexity(graph: Graph, cache: Path) -> float:
    rows = Corpus(PythonStdlib()).rows(
        "heldout", tokenizer=load_tokenizer(locate("seedling"), "seedling"), length=LENGTH, cache=cache, seed=0,
        enough=HELDOUT * BATCH * LENGTH,
    )  # fmt: skip
    batches = (rows.batch(range(at, at + BATCH)) for at in range(0, HELDOUT * BATCH, BATCH))
    return float(evaluate(graph, batches, metrics=["perplexity"])["perplexity"])


@pytest.mark.slow
def test_training_is_near_the_float_model_and_far_from_what_is_only_rounded(tmp_path: Path) -> None:
    teacher, graph = (capture("seedling").materialize() for _ in range(2))
    full = perplexity(teacher, tmp_path)
    apply(TernarySte(rule="round-clip", granularity="group", group=64), graph, check=False)
    rounded = perplexity(graph, tmp_path)
    chosen = Train(
        data=PythonStdlib(), objective=Kd(temperature=2.0), steps=STEPS, batch=BATCH, length=LENGTH, eval_batches=1,
        groups={"weights": Group(lr=2e-3, warmup=0.1, min_lr_ratio=0.05)}, plot=False,
    )  # fmt: skip
    tokenizer = load_tokenizer(locate("seedling"), "seedling")
    train(
        graph, chosen, tokenizer=tokenizer, folder=tmp_path / "run", cache=tmp_path, teacher=teacher, progress=Silent()
    )
    trained = perplexity(graph, tmp_path)
    said = f"{full:.2f} in full, {rounded:.2f} rounded, {trained:.2f} trained"
    assert trained <= 1.2 * full, said
    assert trained <= 0.5 * rounded, said
