"""Training from a teacher's cache: its text, its targets, its figures."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from graph import Graph, QcError
from graph.hashes import tensor_sha256
from runtimes.distill.reader import TeacherCache
from runtimes.settings import Data, KdCache, TextFiles, Train
from runtimes.train.cached import CachedDistillation
from runtimes.train.metrics import read
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
from tests.runtimes.distill import tiny
from tests.runtimes.train.test_resume import Stop, StopAt
from tests.runtimes.train.tiny import run, tiny_graph


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return tiny.texts(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, data: Data) -> Path:
    folder = tmp_path_factory.mktemp("made") / "cache"
    tiny.write(folder, tiny.settings(data, heldout=5, negatives=3))
    return folder


def settings(cache: Path, data: Data | None = None, **changes: Any) -> Train:
    objective = KdCache(cache=str(cache), **{k: changes.pop(k) for k in list(changes) if hasattr(KdCache, k)})
    chosen: dict[str, Any] = {"steps": 6, "batch": 4, "lr": 3e-3, "plot": False, "eval_batches": 2, "eval_every": 3}
    return Train(objective=objective, data=data, **(chosen | changes))


def hashes(graph: Graph) -> dict[str, str]:
    return {name: tensor_sha256(graph.tensor(name)) for name in graph.tensors()}


def held_out(graph: Graph, cache: Path) -> tuple[float, float]:
    """T² KL over the candidates and the cross entropy of the text on all held-out sequences, from whole logits."""
    rows = TeacherCache(cache).rows("heldout")
    batch = rows.batch(range(len(rows)))
    with torch.no_grad():
        logits = graph(input_ids=batch.input_ids, attention_mask=batch.attention_mask).flatten(0, 1)
    t = batch.targets
    q, p = (F.log_softmax(z / 2.0, 1) for z in (logits[t.rows].gather(1, t.ids), t.logits.float()))
    kl = 4 * F.kl_div(q, p, log_target=True, reduction="sum") / len(t.rows)
    return float(kl), float(F.cross_entropy(logits[t.rows], t.labels))


def test_a_student_comes_closer_to_the_teacher_and_the_figures_are_those_of_the_formulas(
    cache: Path, tmp_path: Path
) -> None:
    graph = tiny.other_graph()
    before = held_out(graph, cache)
    report = run(graph, settings(cache, steps=30, eval_every=0), tmp_path)
    kl, text = held_out(graph, cache)
    assert kl < 0.5 * before[0]
    assert report.eval_loss == pytest.approx(kl, rel=1e-4)
    assert report.eval_perplexity == pytest.approx(torch.tensor(text).exp().item(), rel=1e-4)
    rows = read(tmp_path)
    assert all(row["loss"] == pytest.approx(row["loss/kl"], rel=1e-6) for row in rows)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


def test_the_first_loss_is_the_mean_over_the_labels_of_the_first_batch(cache: Path, tmp_path: Path) -> None:
    graph = tiny.other_graph()
    batch = TeacherCache(cache).rows("train", seed=7).shuffled(0, 8)
    loss = CachedDistillation(KdCache(), 1)
    from runtimes.train.losses import Features

    with torch.no_grad():
        logits = graph(input_ids=batch.input_ids, attention_mask=batch.attention_mask).flatten(0, 1)
    total, _ = loss(Features(logits), batch, 0)
    run(graph, settings(cache, steps=1, batch=4, accumulate=2), tmp_path, seed=7)
    assert read(tmp_path)[0]["loss"] == pytest.approx(total.item() / int((batch.labels >= 0).sum()), rel=1e-5)


def test_every_term_is_logged_by_its_name_before_its_weight_until_it_has_faded(cache: Path, tmp_path: Path) -> None:
    chosen = settings(cache, hard_top1=0.5, hard_full=0.25, hard_text=0.125, anneal=4, eval_every=0)
    run(tiny.other_graph(), chosen, tmp_path)
    rows, left = read(tmp_path), (1.0, 0.75, 0.5, 0.25, 0.0, 0.0)
    for row, part in zip(rows, left, strict=True):
        hard = [row.get(f"loss/{name}", 0.0) for name in ("hard_top1", "hard_full", "hard_text")]
        assert row["loss"] == pytest.approx(row["loss/kl"] + part * (0.5 * hard[0] + 0.25 * hard[1] + 0.125 * hard[2]))
        assert all(hard) == (part > 0), "what has faded is not worked out"
        assert hard[0] < hard[1] or not part, "among fewer tokens the likeliest one is likelier"
    with open(tmp_path / "metrics.csv", newline="") as file:
        columns = csv.DictReader(file).fieldnames
    assert [one for one in columns or () if one.startswith("loss/")] == [
        "loss/kl", "loss/hard_top1", "loss/hard_full", "loss/hard_text"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("anneal", "wanted"), [(0, (1.0, 1.0, 1.0)), (20, (1.0, 0.5, 0.0)), (0.5, (1.0, 0.8, 0.2)), (1, (1.0, 0.0, 0.0))]
)
def test_hard_weights_fall_in_a_line(anneal: float, wanted: tuple[float, ...]) -> None:
    loss = CachedDistillation(KdCache(hard_top1=1.0, anneal=anneal), 100)
    at = (0, 10, 20) if anneal != 0.5 else (0, 10, 40)
    assert tuple(loss.left(step) for step in at) == pytest.approx(wanted)


def test_a_resumed_training_ends_in_the_bytes_of_the_undisturbed_one(cache: Path, tmp_path: Path) -> None:
    from runtimes.train import train

    chosen = settings(cache, hard_top1=0.1, tail=True, save_every=2, steps=8, batch=3)  # more than an epoch
    calm, rough = tiny.other_graph(), tiny.other_graph()
    run(calm, chosen, tmp_path / "calm")
    with pytest.raises(Stop):
        train(rough, chosen, tokenizer=byte_tokenizer(), folder=tmp_path / "rough", progress=StopAt(5))
    (tmp_path / "elsewhere").symlink_to(cache)  # where the cache lies does not matter
    moved = settings(tmp_path / "elsewhere", hard_top1=0.1, tail=True, save_every=2, steps=8, batch=3)
    again = tiny.other_graph()
    report = run(again, moved, tmp_path / "rough")
    assert report.resumed_from == 4
    assert hashes(again) == hashes(calm)


def test_a_training_is_not_gone_on_with_on_another_cache(cache: Path, tmp_path: Path, data: Data) -> None:
    tiny.write(tmp_path / "other", tiny.settings(data, heldout=5, topk=3))
    run(tiny.other_graph(), settings(cache, steps=2), tmp_path / "run")
    with pytest.raises(QcError, match="holds a training with another data"):
        run(tiny.other_graph(), settings(tmp_path / "other", steps=2), tmp_path / "run")


def test_the_head_learns_too_where_it_is_trained(cache: Path, tmp_path: Path) -> None:
    graph = tiny_graph("embed_tokens")
    weight = graph.tensor("model.embed_tokens.weight").clone()
    graph.set_tensor("model.embed_tokens.weight", weight + 0.02 * torch.randn_like(weight))
    before = held_out(graph, cache)[0]
    run(graph, settings(cache, steps=20, eval_every=0), tmp_path)
    assert held_out(graph, cache)[0] < 0.7 * before


# -- what does not fit together -------------------------------------------------------------------------------------


def refused(chosen: Train, folder: Path, **options: Any) -> str:
    with pytest.raises(QcError) as caught:
        run(tiny.other_graph(), chosen, folder, **options)
    return str(caught.value)


def test_a_cache_of_another_tokenizer_is_refused(tmp_path: Path, data: Data) -> None:
    other = byte_tokenizer()
    other.add_tokens(["<|other|>"])
    tiny.write(tmp_path / "cache", tiny.settings(data), tokenizer=other)
    assert refused(settings(tmp_path / "cache"), tmp_path / "run") == (
        f"the cache {tmp_path / 'cache'} was made with another tokenizer than the model's\n"
        "  fix    distil from a teacher with the same tokenizer"
    )


def test_a_teacher_with_another_vocabulary_is_refused(cache: Path) -> None:
    from runtimes.train.losses import Features

    batch = TeacherCache(cache).rows("train").batch([0])
    with pytest.raises(QcError) as caught:
        CachedDistillation(KdCache(), 1)(Features(torch.zeros(24, 100)), batch, 0)
    assert str(caught.value) == (
        "the teacher of the cache has 264 tokens and the student 100\n"
        "  fix    distil from a teacher with the same tokenizer"
    )


def test_data_beside_the_cache_must_be_what_it_was_made_of(cache: Path, tmp_path: Path, data: Data) -> None:
    run(tiny.other_graph(), settings(cache, data, steps=1), tmp_path / "same")
    (tmp_path / "a.txt").write_text("another text")
    other = TextFiles(text=str(tmp_path / "a.txt"))
    assert refused(settings(cache, other), tmp_path / "run") == (
        f"train.data is not what the cache {cache} was made of\n  fix    take data out of train: the cache has the text"
    )


def test_without_a_cache_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    assert refused(Train(objective=KdCache(), steps=1, lr=1.0), tmp_path / "run") == (
        "the objective kd-cache has no cache\n"
        "  fix    give cache: the folder that qc cache teacher wrote, or the recipe that makes it"
    )
    assert refused(settings(tmp_path / "nothing"), tmp_path / "run") == (
        f"there is no cache in {tmp_path / 'nothing'}\n  fix    make it: qc cache teacher RECIPE"
    )


def test_any_other_objective_needs_data(tmp_path: Path) -> None:
    assert refused(Train(steps=1, lr=1.0), tmp_path / "run") == (
        "the training has no data\n  fix    give data: python-stdlib, text:, jsonl: or hf:"
    )
