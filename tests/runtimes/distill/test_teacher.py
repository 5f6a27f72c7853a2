from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graph import QcError
from runtimes.data import Batch
from runtimes.distill import teacher
from runtimes.distill.teacher import Said, Teacher, largest
from tests.runtimes.distill.tiny import VOCABULARY
from tests.runtimes.train.test_objectives import scaled
from tests.runtimes.train.tiny import tiny_graph

CPU = torch.device("cpu")


def batch() -> Batch:
    """Two rows: one of two documents, one that is padded."""
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 9:], mask[1, 11:] = 2, 0
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    labels[0, 8] = -100
    labels[1, 10:] = -100
    return Batch(ids, mask, labels)


def ask(count: int = 0, topk: int = 6, is_scaled: bool = False) -> tuple[Said, Tensor]:
    """What the teacher says, and the whole logits of the positions that have a label."""
    graph, given = scaled(tiny_graph()) if is_scaled else tiny_graph(), batch()
    asked = Teacher(graph, topk=topk, negatives=count, seed=0, device=CPU)
    said = asked(given, torch.arange(32).view(2, 16))
    with torch.no_grad():
        logits: Tensor = graph(input_ids=given.input_ids, attention_mask=given.attention_mask)
    return said, logits[given.labels >= 0]


@pytest.mark.parametrize("is_scaled", [False, True], ids=["cut before its head", "not cut"])
@pytest.mark.parametrize("at_once", [1 << 24, 16 * VOCABULARY])
def test_the_likeliest_tokens_are_those_of_the_whole_logits(
    is_scaled: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "LOGITS_AT_ONCE", at_once)
    said, logits = ask(is_scaled=is_scaled)
    wanted = torch.topk(logits, 6)
    ids, stored = said.topk
    assert torch.equal(said.at, torch.nonzero(batch().labels.flatten() >= 0).squeeze(1))
    assert torch.equal(ids[:, 0], logits.argmax(1))
    assert torch.equal(ids, wanted.indices)
    assert stored.dtype == torch.float16
    torch.testing.assert_close(stored.float(), wanted.values, atol=1e-3, rtol=1e-3)
    assert (stored.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("count", [0, 7])
def test_the_logsumexp_is_that_of_the_vocabulary_with_what_is_stored_as_it_is_stored(count: int) -> None:
    said, logits = ask(count)
    torch.testing.assert_close(said.logsumexp, logits.logsumexp(1), atol=2e-3, rtol=0)
    ids, stored = (torch.cat(pair, 1) for pair in zip(said.topk, said.negatives, strict=True))
    rest = logits.scatter(1, ids, -torch.inf).double().logsumexp(1)
    share = 1 - (stored.double().logsumexp(1) - said.logsumexp.double()).exp()
    torch.testing.assert_close(share, (rest - said.logsumexp).exp(), atol=1e-6, rtol=1e-4)


def test_negatives_come_with_their_logits_and_are_none_of_the_likeliest() -> None:
    said, logits = ask(9)
    ids, stored = said.negatives
    torch.testing.assert_close(stored.float(), logits.gather(1, ids), atol=1e-3, rtol=1e-3)
    assert not (ids[:, :, None] == said.topk[0][:, None, :]).any()


@pytest.mark.parametrize(
    ("rows", "vocabulary", "count"), [(5, 4096, 64), (3, 5003, 7), (2, 264, 264), (4, 90, 60), (0, 500, 3)]
)
def test_the_largest_by_halves_are_the_largest(rows: int, vocabulary: int, count: int) -> None:
    logits = torch.randn(rows, vocabulary)
    values, ids = largest(logits, count)
    assert torch.equal(values, torch.topk(logits, count).values)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == count for row in ids.tolist())


def test_the_logits_are_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    largest_seen = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest_seen
            result = func(*args, **(kwargs or {}))
            made = [r for r in torch.utils._pytree.tree_leaves(result) if isinstance(r, Tensor)]
            largest_seen = max([largest_seen, *(r.numel() for r in made if r.shape[-1:] == (VOCABULARY,))])
            return result

    asked = Teacher(tiny_graph(), topk=6, negatives=0, seed=0, device=CPU)
    monkeypatch.setattr(teacher, "LOGITS_AT_ONCE", 16 * VOCABULARY)
    with Watch():
        asked(batch(), torch.arange(32).view(2, 16))
    assert largest_seen == 16 * VOCABULARY


def test_the_graph_that_is_asked_stays_as_it_was() -> None:
    graph = tiny_graph()
    before = str(graph)
    Teacher(graph, topk=6, negatives=0, seed=0, device=CPU)
    assert str(graph) == before


@pytest.mark.parametrize(
    ("topk", "count", "said"),
    [
        (300, 0, "topk 300 is more than the 264 tokens of the teacher\n  fix    set topk to at most 264"),
        (
            64,
            201,
            "topk 64 and negatives 201 are more than the 264 tokens of the teacher\n  fix    set topk to at most 63",
        ),
        (
            64,
            264,
            "topk 64 and negatives 264 are more than the 264 tokens of the teacher\n"
            "  fix    set negatives to at most 200",
        ),
    ],
)
def test_more_tokens_than_there_are_cannot_be_asked_for(topk: int, count: int, said: str) -> None:
    with pytest.raises(QcError) as caught:
        Teacher(tiny_graph(), topk=topk, negatives=count, seed=0, device=CPU)
    assert str(caught.value) == said


def test_logits_beyond_fp16_are_refused() -> None:
    graph = tiny_graph(tied=False)
    graph.set_tensor("lm_head.weight", graph.tensor("lm_head.weight") * 1e7)
    asked = Teacher(graph, topk=6, negatives=0, seed=0, device=CPU)
    with pytest.raises(QcError) as caught:
        asked(batch(), torch.arange(32).view(2, 16))
    assert str(caught.value) == (
        "the teacher's logits are not finite, or too large for fp16\n  fix    run it in fp32: dtype: fp32"
    )
