from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graph import Graph, QcError
from graph.weights import read_header
from runtimes.data import Corpus, Rows
from runtimes.settings import Group, JsonLines, Kd, TextFiles
from runtimes.train.checkpoints import load
from runtimes.train.corpus import Text, open_text
from runtimes.train.metrics import read
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
from tests.runtimes.train.tiny import corpus, run, settings, tiny_graph


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextFiles:
    return corpus(tmp_path_factory.mktemp("text"))


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read(folder)]


def trained(graph: Graph) -> dict[str, Tensor]:
    return {name: graph.tensor(name).detach().clone() for name, info in graph.tensors().items() if info.trainable}


def by_hand(graph: Graph, data: TextFiles, cache: Path, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """The plainest training there is: whole logits, torch's own loss, optimizer and clipping."""
    rows = Corpus(data).rows("train", tokenizer=byte_tokenizer(), length=32, cache=cache, enough=steps * 4 * 32)
    parameters = [graph.module.get_parameter(name) for name in trained(graph)]
    optimizer, found = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0), []
    for step in range(steps):
        batch = rows.shuffled(4 * step, 4)
        logits = graph(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, trained(graph)


@pytest.mark.parametrize("trainable", ["mlp", "model"])
def test_it_is_the_training_one_would_write_by_hand(tmp_path: Path, data: TextFiles, trainable: str) -> None:
    graph = tiny_graph(trainable)
    report = run(graph, settings(data), tmp_path)
    wanted_losses, wanted = by_hand(tiny_graph(trainable), data, tmp_path / "data", steps=6)
    assert losses(tmp_path) == pytest.approx(wanted_losses, abs=1e-5)
    assert report.last_loss < report.first_loss
    for name, value in trained(graph).items():
        torch.testing.assert_close(value, wanted[name], atol=1e-4, rtol=1e-3)


def test_what_is_not_trainable_keeps_every_bit(tmp_path: Path, data: TextFiles) -> None:
    graph, before = tiny_graph(), tiny_graph()
    run(graph, settings(data), tmp_path)
    changed = {name for name in graph.tensors() if not torch.equal(graph.tensor(name), before.tensor(name))}
    assert changed == set(trained(graph))
    graph.verify()


def test_packed_rows_see_their_own_document_only(tmp_path: Path, data: TextFiles) -> None:
    graph = tiny_graph()
    rows = Corpus(data).rows("train", tokenizer=byte_tokenizer(), length=64, cache=tmp_path)
    batch = next(b for b in (rows.batch([n]) for n in range(len(rows))) if b.attention_mask.max() > 1)
    first = int((batch.attention_mask == 1).sum())
    second = batch.attention_mask[0] == 2
    together = graph(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0, second]
    alone = graph(input_ids=batch.input_ids[:, second], attention_mask=torch.ones_like(batch.input_ids[:, second]))[0]
    assert first > 0
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_accumulating_equals_the_large_batch(tmp_path: Path, data: TextFiles) -> None:
    large, small = tiny_graph(), tiny_graph()
    run(large, settings(data, batch=8), tmp_path / "large")
    run(small, settings(data, batch=2, accumulate=4), tmp_path / "small")
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "large"), abs=1e-6)


def test_accumulating_answers_of_unlike_length_equals_the_large_batch(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}:", "response": "x" * (n % 17 + 1)} for n in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = JsonLines(jsonl=str(tmp_path / "a.jsonl"))
    for packing in (True, False):
        for name, shape in {"large": {"batch": 8}, "small": {"batch": 2, "accumulate": 4}}.items():
            run(tiny_graph(), settings(data, packing=packing, steps=3, **shape), tmp_path / f"{name} {packing}")
        large, small = (losses(tmp_path / f"{name} {packing}") for name in ("large", "small"))
        assert small == pytest.approx(large, abs=1e-6)


def test_checkpointing_gives_the_same_bits(tmp_path: Path, data: TextFiles) -> None:
    plain, again = (
        run(tiny_graph("layers"), settings(data, checkpointing=checkpointing), tmp_path / str(checkpointing))
        for checkpointing in (False, True)
    )
    assert losses(tmp_path / "True") == losses(tmp_path / "False")
    assert plain.sha256 == again.sha256


def test_bf16_keeps_what_is_trained_in_fp32_and_learns_the_same(tmp_path: Path, data: TextFiles) -> None:
    low = tiny_graph()
    run(low, settings(data, precision="bf16"), tmp_path / "bf16")
    run(tiny_graph(), settings(data), tmp_path / "fp32")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), abs=0.02)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
    assert {v.dtype for v in trained(low).values()} == {torch.float32}
    stored = read_header(tmp_path / "bf16" / "checkpoints" / "last" / "trained.safetensors")
    assert {s.dtype for s in stored.values()} == {torch.float32}


def test_a_graph_in_fp16_is_trained_in_fp32_and_gets_its_dtype_back(tmp_path: Path, data: TextFiles) -> None:
    graph = tiny_graph().to(torch.float16)
    report = run(graph, settings(data), tmp_path)
    assert {v.dtype for v in trained(graph).values()} == {torch.float16}
    stored = load(report.checkpoint, "trained")
    for name, value in trained(graph).items():
        assert torch.equal(value, stored[name].half())


def test_the_average_follows_the_trained_tensors_and_is_the_result(tmp_path: Path, data: TextFiles) -> None:
    graph, start = tiny_graph(), trained(tiny_graph())
    report = run(graph, settings(data, ema=0.5, save_every=1, keep=9), tmp_path)
    average = start
    for step in range(1, 7):
        values = load(tmp_path / "checkpoints" / f"step-{step}", "trained")
        average = {name: 0.5 * average[name] + 0.5 * values[name] for name in average}
    for name, value in trained(graph).items():
        torch.testing.assert_close(value, average[name])
        assert torch.equal(value, load(report.checkpoint, "average")[name])
    assert report.eval_loss != run(tiny_graph(), settings(data), tmp_path / "without").eval_loss


def test_a_group_rests_until_its_start_and_rates_and_norms_are_logged_by_group(tmp_path: Path, data: TextFiles) -> None:
    late = Group(lr=1e-2, select={"role": "mlp.down"}, start_step=3, schedule="constant")
    groups = {"early": Group(lr=1e-3, schedule="linear"), "late": late}
    run(tiny_graph(), settings(data, lr=None, groups=groups, save_every=1, keep=9), tmp_path)
    start = trained(tiny_graph())
    for step in range(1, 7):
        values = load(tmp_path / "checkpoints" / f"step-{step}", "trained")
        moved = {name for name in values if not torch.equal(values[name], start[name])}
        assert {name for name in start if "down" in name} <= moved if step > 3 else not any("down" in n for n in moved)
        assert any("up" in name for name in moved)
    rows = read(tmp_path)
    assert [row["lr/late"] for row in rows] == [0, 0, 0, 1e-2, 1e-2, 1e-2]
    assert [row["grad_norm/late"] > 0 for row in rows] == [False] * 3 + [True] * 3
    assert rows[5]["grad_norm"] == pytest.approx(math.hypot(rows[5]["grad_norm/early"], rows[5]["grad_norm/late"]))


def test_clipping_holds_the_gradient_down(tmp_path: Path, data: TextFiles) -> None:
    moved = []
    for clip in (None, 1e-4):
        graph = tiny_graph()
        sgd = Group(lr=1.0, betas=(0.0, 0.0), schedule="constant")
        run(
            graph,
            settings(data, lr=None, groups={"all": sgd}, optimizer="sgd", steps=1, clip=clip),
            tmp_path / str(clip),
        )
        changes = [value - trained(tiny_graph())[name] for name, value in trained(graph).items()]
        moved.append(math.sqrt(sum(float(c.square().sum()) for c in changes)))
    assert moved[0] == pytest.approx(read(tmp_path / "None")[0]["grad_norm"], rel=1e-4)
    assert moved[1] == pytest.approx(1e-4, rel=0.01)


def test_a_student_learns_from_the_teacher_it_is_given(tmp_path: Path, data: TextFiles) -> None:
    teacher = tiny_graph("no such tensor")
    for name in teacher.tensors():
        if "mlp" in name:
            teacher.set_tensor(name, teacher.tensor(name) * 1.5)
    report = run(
        tiny_graph(), settings(data, objective=Kd(temperature=2.0), steps=12), tmp_path / "other", teacher=teacher
    )
    assert report.last_loss < 0.7 * report.first_loss
    same = run(tiny_graph(), settings(data, objective=Kd(), steps=1), tmp_path / "same", teacher=tiny_graph("no such"))
    assert same.first_loss == pytest.approx(0, abs=1e-5)
    mixed = run(tiny_graph(), settings(data, objective=Kd(alpha=0.0), steps=2), tmp_path / "ce", teacher=teacher)
    assert mixed.first_loss == pytest.approx(
        run(tiny_graph(), settings(data, steps=2), tmp_path / "plain").first_loss, abs=1e-5
    )


def test_a_student_needs_a_teacher(tmp_path: Path, data: TextFiles) -> None:
    with pytest.raises(QcError) as caught:
        run(tiny_graph(), settings(data, objective=Kd()), tmp_path)
    assert str(caught.value) == (
        "the objective kd needs a teacher, and none was given\n  fix    give the graph before the passes as the teacher"
    )


def test_an_untied_head_trains_too(tmp_path: Path, data: TextFiles) -> None:
    graph = tiny_graph("lm_head", tied=False)
    report = run(graph, settings(data), tmp_path)
    assert list(trained(graph)) == ["lm_head.weight"]
    assert report.last_loss < report.first_loss


def test_rows_go_to_csv_and_json_lines_and_the_held_out_loss_to_the_report(tmp_path: Path, data: TextFiles) -> None:
    report = run(tiny_graph(), settings(data, eval_every=4, plot=True), tmp_path)
    rows = read(tmp_path)
    header, *table = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == (
        "step,loss,tokens,tokens_per_second,seconds,grad_norm,eval_loss,eval_perplexity,lr/all,grad_norm/all"
    )
    assert [line.split(",")[0] for line in table] == ["1", "2", "3", "4", "5", "6"]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 6]
    assert report.eval_loss == rows[-1]["eval_loss"]
    assert report.eval_perplexity == pytest.approx(math.exp(report.eval_loss or 0))
    assert (report.first_loss, report.last_loss) == (rows[0]["loss"], rows[-1]["loss"])
    assert report.best_step == min((r for r in rows if "eval_loss" in r), key=lambda r: r["eval_loss"])["step"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_and_the_last_stay_and_periodic_ones_as_many_as_asked_for(tmp_path: Path, data: TextFiles) -> None:
    run(tiny_graph(), settings(data, save_every=1, keep=2, eval_every=2), tmp_path)
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best", "last", "step-5", "step-6"]
    assert (os.readlink(folder / "best"), os.readlink(folder / "last")) == ("step-6", "step-6")


def test_one_document_cannot_be_held_out_and_that_is_said(tmp_path: Path) -> None:
    report = run(tiny_graph(), settings(corpus(tmp_path / "text", files=1)), tmp_path)
    assert report.eval_loss is None
    assert report.notes == ("not evaluated: the data is a single document, so none can be held out; give eval_data",)


def test_evaluation_text_is_never_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Text] = []

    def watched(*args: Any, **options: Any) -> Text:
        opened.append(open_text(*args, **options))
        return opened[-1]

    monkeypatch.setattr("runtimes.train.loop.open_text", watched)
    data = corpus(tmp_path / "text")
    copied = corpus(tmp_path / "other", files=3)
    for chosen in (settings(data, steps=1), settings(data, steps=1, eval_data=copied)):
        run(tiny_graph(), chosen, tmp_path / str(len(opened)))
        text = opened[-1]
        assert isinstance(text.training, Rows) and isinstance(text.evaluation, Rows)
        train_text, eval_text = (
            {bytes(t.ids[a:b].tobytes()) for a, b in zip(t.starts[:-1], t.starts[1:], strict=True)}
            for t in (text.training.tokens, text.evaluation.tokens)
        )
        assert eval_text
        assert not train_text & eval_text


def test_only_a_language_model_with_weights_can_be_trained(tmp_path: Path, data: TextFiles) -> None:
    from transformers import Qwen3Config

    from graph import capture

    plan = capture(Qwen3Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
                               intermediate_size=32, vocab_size=264, architectures=["Qwen3ForCausalLM"]))  # fmt: skip
    with pytest.raises(QcError) as caught:
        run(plan, settings(data), tmp_path)
    assert caught.value.fix == "capture a folder with weights, not a configuration"
    encoder = tiny_graph()
    encoder.kind = "encoder"
    with pytest.raises(QcError) as caught:
        run(encoder, settings(data), tmp_path)
    assert str(caught.value) == (
        "this graph is of kind encoder; causal-lm and kd train causal language models\n"
        "  fix    train with objective: embedding"
    )


def test_a_loss_that_explodes_stops_and_keeps_the_last_checkpoint(tmp_path: Path, data: TextFiles) -> None:
    wild = {"all": Group(lr=1e30, schedule="constant")}
    with pytest.raises(QcError, match=r"at step [23]"):
        run(tiny_graph(), settings(data, lr=None, groups=wild, clip=None, save_every=1), tmp_path)
    assert (tmp_path / "checkpoints" / "last" / "state.json").is_file()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, data: TextFiles) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(QcError) as caught:
        run(tiny_graph(), settings(data), tmp_path / "file")
    assert str(caught.value) == (
        f"cannot write the tokens of the data to {tmp_path / 'file' / 'data'}: Not a directory\n"
        "  fix    choose a folder you may write to"
    )
