from __future__ import annotations

import numpy as np
import pytest
import torch

from runtimes.data import Batch, Rows
from runtimes.data.batches import IGNORED
from runtimes.data.tokens import Tokens


def tokens(*sizes: int, prompts: tuple[int, ...] = ()) -> Tokens:
    """Documents of these sizes, whose tokens count up; the first ``prompts`` of each are not trained on."""
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    trained = None
    if prompts:
        trained = np.concatenate([np.arange(size) >= prompt for size, prompt in zip(sizes, prompts, strict=True)])
    return Tokens(np.arange(int(starts[-1]), dtype=np.uint16), trained, starts, "key")


def rows(source: Tokens, length: int, packing: bool = True, seed: int = 0) -> Rows:
    return Rows(source, length=length, packing=packing, seed=seed, padding=999)


def test_plain_text_is_packed_without_gaps_and_every_token_stands_in_one_row() -> None:
    packed = rows(tokens(5, 9, 3, 4), length=8)
    batch = packed.batch(range(len(packed)))
    assert batch.input_ids.shape == (3, 8)
    assert sorted(batch.input_ids[batch.attention_mask > 0].tolist()) == list(range(21))
    assert (batch.attention_mask[:2] > 0).all()
    assert batch.input_ids[batch.attention_mask == 0].unique().tolist() == [999]


def test_labels_are_the_next_token_of_the_same_document() -> None:
    packed = rows(tokens(5, 9, 3, 4), length=8)
    batch = packed.batch(range(len(packed)))
    ids, mask, labels = batch.input_ids, batch.attention_mask, batch.labels
    same = (mask[:, 1:] == mask[:, :-1]) & (mask[:, 1:] > 0)
    assert torch.equal(labels[:, :-1], torch.where(same, ids[:, 1:], IGNORED))
    assert (labels[:, -1] == IGNORED).all()


def test_documents_of_a_row_are_numbered_from_one() -> None:
    packed = rows(tokens(3, 3, 3), length=9)
    assert packed.batch([0]).attention_mask.tolist() == [[1, 1, 1, 2, 2, 2, 3, 3, 3]]


def test_answers_are_packed_whole_and_cut_only_where_one_is_longer_than_a_row() -> None:
    packed = rows(tokens(5, 5, 12, prompts=(2, 2, 2)), length=8)
    batch = packed.batch(range(len(packed)))
    assert sorted((batch.attention_mask > 0).sum(1).tolist()) == [5, 5, 8]
    firsts = sorted(batch.input_ids[:, 0].tolist())
    assert firsts == [0, 5, 10]


def test_prompts_are_not_labels() -> None:
    packed = rows(tokens(4, prompts=(2,)), length=8)
    assert packed.batch([0]).labels.tolist() == [[IGNORED, 2, 3, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED]]


def test_a_document_whose_answer_lies_beyond_the_row_is_dropped_and_counted() -> None:
    packed = rows(tokens(12, 4, prompts=(9, 2)), length=8)
    assert len(packed) == 1
    assert packed.layout.dropped == 1


def test_without_packing_each_row_is_one_document_and_a_long_one_takes_several() -> None:
    padded = rows(tokens(3, 11), length=8, packing=False)
    batch = padded.batch(range(len(padded)))
    assert sorted((batch.attention_mask == 1).sum(1).tolist()) == [3, 3, 8]
    assert batch.attention_mask.max() == 1


def test_without_packing_a_batch_is_as_wide_as_its_longest_row_in_eights() -> None:
    padded = rows(tokens(3, 11), length=32, packing=False)
    widths = {padded.batch([row]).input_ids.shape[1] for row in range(2)}
    assert widths == {8, 16}


def test_an_epoch_has_every_row_once_and_the_next_another_order() -> None:
    packed = rows(tokens(*[4] * 64), length=4)
    first, second = (packed.shuffled(start, 64).input_ids[:, 0].tolist() for start in (0, 64))
    assert sorted(first) == sorted(second) == list(range(0, 256, 4))
    assert first != second


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_global_batch_is_the_same_for_any_number_of_processes(processes: int) -> None:
    packed, again = rows(tokens(*[4] * 10), length=4), rows(tokens(*[4] * 10), length=4)
    whole = packed.shuffled(24, 8).input_ids
    size = 8 // processes
    parts = [again.shuffled(24 + rank * size, size).input_ids for rank in reversed(range(processes))]
    assert torch.equal(torch.cat(parts[::-1]), whole)


def test_another_seed_is_another_order() -> None:
    first, second = (rows(tokens(*[4] * 64), length=4, seed=seed).shuffled(0, 64).input_ids for seed in (0, 1))
    assert not torch.equal(first, second)


def remembering() -> Batch:
    """Three rows of one token, with two chunks of two tokens each."""
    ids = torch.arange(3).reshape(3, 1)
    memory = torch.arange(12).reshape(3, 2, 2)
    return Batch(ids, torch.ones_like(ids), ids, memory_ids=memory, memory_mask=torch.ones_like(memory))


def test_memory_of_the_next_row_leaves_no_row_its_own() -> None:
    batch = remembering()
    shuffled = batch.with_memory_of_the_next_row()
    assert shuffled.memory_ids is not None
    assert batch.memory_ids is not None
    assert shuffled.memory_ids.tolist() == [batch.memory_ids[at].tolist() for at in (1, 2, 0)]
    assert torch.equal(shuffled.input_ids, batch.input_ids)


def test_a_batch_moves_with_its_memory_and_without_any() -> None:
    moved = remembering().to("meta")
    assert all(tensor.is_meta for tensor in moved.tensors().values())
    assert set(moved.tensors()) == {"input_ids", "attention_mask", "labels", "memory_ids", "memory_mask"}
    assert set(remembering().without_memory().to("meta").tensors()) == {"input_ids", "attention_mask", "labels"}
