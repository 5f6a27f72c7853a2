"""divergence: a training that runs away ends early, with its best checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from graph import QcError
from graph.weights import read_header
from runtimes.settings import Divergence, TextFiles
from runtimes.train.divergence import Watch
from tests.runtimes.train.tiny import corpus, run, settings, tiny_graph


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextFiles:
    return corpus(tmp_path_factory.mktemp("text"))


def test_it_runs_away_when_the_last_mean_is_so_many_times_the_lowest() -> None:
    settled = [4.0, 3.0, 2.0, 2.0]
    assert not Watch(Divergence(ratio=1.5, window=2), [*settled, 3.0, 3.0]).runs_away
    assert Watch(Divergence(ratio=1.5, window=2), [*settled, 3.0, 3.1]).runs_away
    assert not Watch(Divergence(ratio=1.5, window=7), [*settled, 9.0, 9.0]).runs_away  # no mean of seven yet
    assert not Watch(None, [1.0, 100.0, 1e9]).runs_away


WILD = {"lr": 10.0, "steps": 20, "clip": None, "divergence": Divergence(ratio=1.3, window=3)}


def test_a_training_that_runs_away_ends_and_gives_the_best_checkpoint(tmp_path: Path, data: TextFiles) -> None:
    graph = tiny_graph("embed")
    report = run(graph, settings(data, eval_every=1, save_every=1, **WILD), tmp_path)
    assert report.steps < 20
    assert report.checkpoint.name == f"step-{report.best_step}"
    said = "the loss runs away: a mean of "
    assert [note for note in report.notes if note.startswith(said) and note.endswith("of the checkpoints")]
    best = read_header(report.checkpoint / "trained.safetensors")
    for name, stored in best.items():
        assert graph.tensor(name).equal(stored.load())


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path: Path, data: TextFiles) -> None:
    with pytest.raises(QcError) as caught:
        run(tiny_graph("embed"), settings(data, **WILD), tmp_path)
    assert "and there is no checkpoint to go back to" in caught.value.what
    assert caught.value.fix == "lower the learning rate, or set save_every or eval_every below that step"
