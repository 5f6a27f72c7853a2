from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from graph import QcError
from runtimes.settings import Kd, TextFiles
from runtimes.train import metrics, plot, progress
from runtimes.train.metrics import Metrics, read
from tests.runtimes.train.tiny import corpus, run, settings, tiny_graph

ROW = {"step": 1, "loss": 2.5, "tokens": 10, "tokens_per_second": 5.0, "seconds": 2.0, "grad_norm": 1.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextFiles:
    return corpus(tmp_path_factory.mktemp("text"))


def rows(*steps: int) -> list[dict[str, float]]:
    return [{**ROW, "step": step} for step in steps]


def test_rows_behind_the_checkpoint_are_dropped_and_a_cut_line_is_no_row(tmp_path: Path) -> None:
    first = Metrics(tmp_path, ["all"])
    first.open(0)
    for row in rows(1, 2, 3):
        first.write(row)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert read(tmp_path) == rows(1, 2, 3)
    again = Metrics(tmp_path, ["all"])
    again.open(2)
    again.write(rows(3)[0])
    again.close()
    assert read(tmp_path) == rows(1, 2, 3)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1:] == [f"{n},2.5,10,5.0,2.0,1.0,,,," for n in (1, 2, 3)]


def test_tensorboard_and_wandb_get_the_rows_and_the_recipe(
    tmp_path: Path, data: TextFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    chosen = settings(data, trackers=("tensorboard", "wandb"), steps=2)
    run(tiny_graph(), chosen, tmp_path, resolved={"name": "tiny", "lora": {"rank": 8}, "roles": ["a", "b"]})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = tmp_path / "trackers"
    events = EventAccumulator(str(trackers / "qc"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in read(tmp_path)])
    assert "lora.rank: 8" in next((trackers / "qc").rglob("hparams.yml")).read_text()
    assert list(trackers.glob("wandb/offline-run-*/*.wandb"))


def test_a_tracker_that_is_not_installed_is_an_error(
    tmp_path: Path, data: TextFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_installed", lambda name: False)
    with pytest.raises(QcError) as caught:
        run(tiny_graph(), settings(data, trackers=("wandb",)), tmp_path)
    assert str(caught.value) == ("the tracker wandb is not installed\n  fix    pip install 'qc-compiler[trackers]'")


def test_without_matplotlib_there_is_a_note_and_no_plot(
    tmp_path: Path, data: TextFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plot.draw(rows(1), tmp_path / "loss.png", "title") == (
        "no loss.png: matplotlib is not installed; pip install 'qc-compiler[plots]'"
    )
    assert not (tmp_path / "loss.png").exists()


def test_a_picture_of_a_distillation_says_that_held_out_text_is_measured_by_itself(
    tmp_path: Path, data: TextFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[str] = []
    monkeypatch.setattr(plot, "draw", lambda rows, path, title, heldout: labels.append(heldout))
    run(tiny_graph(), settings(data, steps=1, plot=True), tmp_path / "text")
    taught = settings(data, steps=1, plot=True, objective=Kd())
    run(tiny_graph(), taught, tmp_path / "taught", teacher=tiny_graph("nothing"))
    assert labels == ["held-out text", "held-out text: the next token"]


def test_lines_say_what_is_evaluated_and_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    lines = progress.Lines(every=1000)
    lines.begin(3, 0)
    lines.note("worth knowing")
    for row in rows(1, 2, 3):
        lines.step({**row, "eval_loss": 2.0, "eval_perplexity": 7.389} if row["step"] == 2 else row)
    lines.end()
    assert capsys.readouterr().err.splitlines() == [
        "training, step 0 of 3",
        "worth knowing",
        "step 2/3  loss 2.5000  5 tokens/s  held-out 2.0000 (perplexity 7.39)",
        "step 3/3  loss 2.5000  5 tokens/s",
    ]


def test_the_bar_counts_steps_and_shows_the_loss() -> None:
    bar = progress.Bar()
    shown = bar.bar.live.console.file = io.StringIO()
    bar.begin(3, 1)
    bar.step(rows(2)[0])
    bar.end()
    assert "2/3" in shown.getvalue()
    assert "loss 2.5000" in shown.getvalue()


def test_settings_and_the_words_of_a_recipe_need_no_torch() -> None:
    code = "import sys, json, runtimes.settings; print(json.dumps(sorted(m for m in sys.modules if m in ('torch', 'numpy', 'pydantic'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
