"""A cache on disk: what is in it, how large it is, and that neither kills nor damage go unnoticed."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import QcError
from graph.weights import read_header
from runtimes.data import Batch, Corpus
from runtimes.distill.layout import SPLITS, Split
from runtimes.distill.reader import TeacherCache
from runtimes.distill.shards import alone
from runtimes.distill.targets import TaughtBatch
from runtimes.settings import Data, TextFiles
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
from tests.runtimes.distill.tiny import VOCABULARY, settings, texts, write
from tests.runtimes.train.tiny import tiny_graph


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return texts(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, data: Data) -> Path:
    """A cache with negatives."""
    folder = tmp_path_factory.mktemp("made") / "cache"
    write(folder, settings(data, negatives=4))
    return folder


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(made, tmp_path / "cache")
    return tmp_path / "cache"


def content(folder: Path) -> dict[str, bytes]:
    """All files but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def everything(folder: Path, split: Split) -> TaughtBatch:
    rows = TeacherCache(folder).rows(split)
    return rows.batch(range(len(rows)))


def logits(batch: Batch) -> torch.Tensor:
    """What the teacher says of every position that has a label, in one forward pass."""
    with torch.no_grad():
        whole = tiny_graph()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return whole[batch.labels >= 0]


# -- what is in it --------------------------------------------------------------------------------------------------


def test_a_shard_holds_what_the_format_says(made: Path) -> None:
    n, length, k, r = 8, 24, 5, 4
    shard = read_header(made / "train-00000.safetensors")
    assert {name: (one.shape, one.dtype) for name, one in shard.items()} == {
        "input_ids": ((n, length), torch.int32),
        "attention_mask": ((n, length), torch.int32),
        "labels": ((n, length), torch.int32),
        "topk_ids": ((n, length - 1, k), torch.int32),
        "topk_logits": ((n, length - 1, k), torch.float16),
        "negative_ids": ((n, length - 1, r), torch.int32),
        "negative_logits": ((n, length - 1, r), torch.float16),
        "logsumexp": ((n, length - 1), torch.float32),
    }
    names = sorted(content(made))
    assert names == ["heldout-00000.safetensors", "index.json", "meta.json",
                     "train-00000.safetensors", "train-00001.safetensors", "train-00002.safetensors"]  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
def test_targets_are_the_teachers_logits_at_the_positions_that_have_a_next_token(made: Path, split: Split) -> None:
    batch = everything(made, split)
    whole, targets = logits(batch), batch.targets
    assert torch.equal(targets.rows, torch.nonzero(batch.labels.flatten() >= 0).squeeze(1))
    assert torch.equal(targets.ids[:, 0], whole.argmax(1))
    assert torch.equal(targets.ids[:, :5].sort(1).values, torch.topk(whole, 5).indices.sort(1).values)
    assert (targets.logits[:, :5].diff(dim=1) <= 0).all()
    torch.testing.assert_close(targets.logits.float(), whole.gather(1, targets.ids), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(targets.logsumexp, whole.logsumexp(1), atol=2e-3, rtol=0)
    assert all(len(set(row)) == 9 for row in targets.ids.tolist()), "no negative is among the likeliest or there twice"


def test_borders_of_documents_are_kept(made: Path) -> None:
    batch = everything(made, "train")
    same = batch.attention_mask[:, 1:] == batch.attention_mask[:, :-1]
    assert int(batch.attention_mask.max()) > 1, "some row has two documents"
    assert torch.equal(batch.labels[:, :-1] >= 0, same & (batch.attention_mask[:, :-1] > 0))
    assert (batch.labels[:, -1] == -100).all()


def test_padding_is_neither_asked_nor_learned(tmp_path: Path, data: Data) -> None:
    chosen = settings(data, packing=False, length=40)
    write(tmp_path / "cache", chosen)
    rows = TeacherCache(tmp_path / "cache").rows("train")
    padded = next(n for n in range(len(rows)) if (rows.batch([n]).attention_mask == 0).any())
    batch = rows.batch([padded])
    real = int((batch.attention_mask > 0).sum())
    assert batch.input_ids.shape[1] == min(-(-real // 8) * 8, 40)
    assert (batch.input_ids[0, real:] == byte_tokenizer().pad_token_id).all()
    assert int(batch.targets.rows.max()) == real - 2
    torch.testing.assert_close(batch.targets.logits.float(), logits(batch).topk(5).values, atol=2e-3, rtol=1e-3)
    assert rows.cache.shards.tensors("train-00000.safetensors", rows.cache.meta)["topk_ids"][padded, real:].max() == 0


def test_held_out_sequences_come_from_documents_that_training_never_sees(made: Path, data: Data) -> None:
    decode = byte_tokenizer().decode
    assert isinstance(data, TextFiles)
    corpus = Corpus(data)
    from runtimes.data.sources import documents

    held = [d.text for d in documents(data, Path()) if d.digest() in corpus.held_out]
    used = [d.text for d in documents(data, Path()) if d.digest() not in corpus.held_out]

    def pieces(split: Split) -> list[str]:
        batch = everything(made, split)
        numbered = zip(batch.input_ids, batch.attention_mask, strict=True)
        return [
            decode(ids[mask == n], skip_special_tokens=True)
            for ids, mask in numbered
            for n in range(1, int(mask.max()) + 1)
        ]

    assert all(any(piece in text for text in held) for piece in pieces("heldout"))
    assert all(any(piece in text for text in used) for piece in pieces("train"))


def test_no_sequence_is_there_twice(made: Path) -> None:
    rows = everything(made, "train").input_ids.tolist()
    assert len({tuple(row) for row in rows}) == len(rows) == 21


# -- its size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", [0, 4])
def test_the_size_that_is_told_before_is_the_size_of_the_tensors(tmp_path: Path, data: Data, negatives: int) -> None:
    told: list[str] = []
    found = write(tmp_path / "cache", settings(data, negatives=negatives), tell=told.append)
    a_sequence = 12 * 24 + 23 * (6 * (5 + negatives) + 4)
    assert found.bytes == 24 * a_sequence
    assert told[0] == (
        f"21 sequences and 3 held out, 24 tokens each: {a_sequence / 24:.1f} bytes a token, "
        f"{24 * a_sequence / 1e6:,.1f} MB in 4 shards"
    )
    files = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    assert found.file_bytes == files
    assert 0 < files - found.bytes < 4 * 800, "the headers"


def test_a_cache_that_does_not_fit_is_not_begun(tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**10, 10**10, 1000))
    with pytest.raises(QcError) as caught:
        write(tmp_path / "cache", settings(data))
    assert str(caught.value) == (
        f"the cache needs 0.0 GB more, and the disk of {tmp_path / 'cache'} has 0.0 GB\n"
        "  fix    lower cache.sequences, topk or negatives, or set cache.out to a folder on another disk"
    )
    assert not list((tmp_path / "cache").glob("*.safetensors"))


# -- kills ----------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """The power goes out."""


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_what_was_stopped_goes_on_without_asking_twice_and_ends_in_the_same_bytes(
    made: Path, tmp_path: Path, data: Data, shards: int
) -> None:
    told: list[str] = []

    def stop(text: str) -> None:
        told.append(text)
        if len(told) > shards:
            raise Stop

    chosen = settings(data, negatives=4)
    with pytest.raises(Stop):
        write(tmp_path / "cache", chosen, tell=stop)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == shards
    found = write(tmp_path / "cache", chosen)
    assert (found.written, found.shards) == (4 - shards, 4)
    assert found.tokens == 24 * sum((8, 8, 5, 3)[shards:])
    assert content(tmp_path / "cache") == content(made)


def test_after_a_kill_every_byte_is_that_of_the_undisturbed_cache(made: Path, tmp_path: Path) -> None:
    texts(tmp_path / "text")
    command = [sys.executable, "-m", "tests.runtimes.distill.killed", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    while "2 of 4" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    half = tmp_path / "killed"
    assert 2 <= len(list(half.glob("train-*"))) < 4
    (half / ".train-00002.safetensors.1.tmp").mkdir(exist_ok=True)  # a shard that was half-written
    (half / ".train-00002.safetensors.1.tmp" / "x").write_text("half")
    found = write(half, settings(TextFiles(text=str(tmp_path / "text" / "*.txt")), negatives=4))
    assert found.written <= 2
    assert content(half) == content(made)


def test_a_shard_whose_name_the_index_lacks_is_made_again(cache: Path, made: Path, data: Data) -> None:
    index = json.loads((cache / "index.json").read_text())
    del index["shards"]["train-00001.safetensors"]
    (cache / "index.json").write_text(json.dumps(index))
    (cache / "train-00001.safetensors").write_text("killed between the file and the index")
    assert write(cache, settings(data, negatives=4)).written == 1
    assert content(cache) == content(made)


def test_batches_and_shards_do_not_change_what_is_said(tmp_path: Path, made: Path, data: Data) -> None:
    write(tmp_path / "cache", settings(data, negatives=4, batch=8, shard=100))
    one, other = everything(made, "train"), everything(tmp_path / "cache", "train")
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.targets.ids, other.targets.ids)
    torch.testing.assert_close(one.targets.logits, other.targets.logits, atol=1e-3, rtol=1e-3)


def test_two_processes_do_not_write_one_cache(tmp_path: Path, data: Data) -> None:
    with alone(tmp_path / "cache"), pytest.raises(QcError) as caught:
        write(tmp_path / "cache", settings(data))
    assert str(caught.value) == (
        f"another process is writing the cache {tmp_path / 'cache'}\n  fix    wait until it is done"
    )


# -- damage ---------------------------------------------------------------------------------------------------------

AGAIN = "delete it and run qc cache teacher RECIPE again: only this shard is made anew"


def flipped(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[-5] ^= 1
    path.write_bytes(held)


def test_a_damaged_shard_is_named_when_it_is_read_and_when_the_cache_is_made_again(cache: Path, data: Data) -> None:
    path = cache / "train-00001.safetensors"
    flipped(path)
    rows = TeacherCache(cache).rows("train")
    rows.batch([0])
    for act in (lambda: rows.batch([8]), lambda: write(cache, settings(data, negatives=4))):
        with pytest.raises(QcError) as caught:
            act()
        assert str(caught.value) == (
            f"the shard {path} is damaged: its sha256 is not the one in index.json\n  fix    {AGAIN}"
        )


@pytest.mark.parametrize(("change", "how"), [(-7, "cut short"), (7, "too long")])
def test_a_shard_of_another_length_is_named_at_once(cache: Path, change: int, how: str) -> None:
    path = cache / "train-00002.safetensors"
    held = path.read_bytes()
    path.write_bytes(held[:change] if change < 0 else held + b"\0" * change)
    with pytest.raises(QcError) as caught:
        TeacherCache(cache)
    assert str(caught.value) == (
        f"the shard {path} is {how}: {len(held) + change} bytes, not {len(held)}\n  fix    {AGAIN}"
    )


def test_a_shard_that_was_deleted_is_missed_and_made_again(cache: Path, made: Path, data: Data) -> None:
    path = cache / "train-00000.safetensors"
    path.unlink()
    with pytest.raises(QcError) as caught:
        TeacherCache(cache)
    assert str(caught.value) == (
        f"the shard {path} is missing\n  fix    run qc cache teacher RECIPE again: it is made anew"
    )
    assert write(cache, settings(data, negatives=4)).written == 1
    assert content(cache) == content(made)


def test_a_cache_that_is_not_whole_is_not_read(cache: Path) -> None:
    index = json.loads((cache / "index.json").read_text())
    del index["shards"]["heldout-00000.safetensors"]
    (cache / "index.json").write_text(json.dumps(index))
    with pytest.raises(QcError) as caught:
        TeacherCache(cache)
    assert str(caught.value) == (
        f"the cache {cache} is not whole: 1 of its 4 shards are not written yet\n"
        "  fix    run qc cache teacher RECIPE again: it goes on where it was"
    )


@pytest.mark.parametrize("name", ["meta.json", "index.json"])
@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}'])
def test_damaged_descriptions_are_named(cache: Path, name: str, text: str) -> None:
    (cache / name).write_text(text)
    with pytest.raises(QcError) as caught:
        TeacherCache(cache)
    assert str(caught.value) == (
        f"{cache / name} is damaged\n  fix    make the cache again: qc cache teacher RECIPE --force"
    )


def test_a_later_format_is_refused(cache: Path) -> None:
    said = json.loads((cache / "meta.json").read_text()) | {"format": 2}
    (cache / "meta.json").write_text(json.dumps(said))
    with pytest.raises(QcError) as caught:
        TeacherCache(cache)
    assert str(caught.value) == (
        f"{cache / 'meta.json'} is of format 2, and this qc reads 1\n"
        "  fix    make the cache again: qc cache teacher RECIPE --force"
    )


# -- another cache --------------------------------------------------------------------------------------------------


def test_another_cache_is_not_gone_on_with_but_replaced_by_force(cache: Path, data: Data) -> None:
    with pytest.raises(QcError) as caught:
        write(cache, settings(data, negatives=4, topk=7))
    assert str(caught.value) == (
        f"{cache} holds another cache: its topk is 5, not 7\n"
        "  fix    write to another folder (cache.out), or make it anew with --force"
    )
    write(cache, settings(data, topk=7), force=True)
    assert everything(cache, "train").targets.ids.shape[1] == 7


def test_a_folder_in_which_nothing_came_to_be_can_be_used(tmp_path: Path, data: Data) -> None:
    for force in (False, True):
        with pytest.raises(QcError, match="topk 300 is more than the 264 tokens"):
            write(tmp_path / "cache", settings(data, topk=300), force=force)
    assert write(tmp_path / "cache", settings(data), force=True).written == 4


def test_force_replaces_nothing_but_caches(tmp_path: Path, data: Data) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("years of work")
    for force, said in (
        (True, "is no cache, and --force replaces nothing else\n  fix    give another folder: cache.out"),
        (False, "holds something else than a cache\n  fix    give another folder: cache.out"),
    ):
        with pytest.raises(QcError) as caught:
            write(tmp_path / "cache", settings(data), force=force)
        assert str(caught.value) == f"{tmp_path / 'cache'} {said}"
    assert (tmp_path / "cache" / "thesis.txt").read_text() == "years of work"


def test_more_sequences_than_there_are_cannot_be_had(tmp_path: Path, data: Data) -> None:
    with pytest.raises(QcError) as caught:
        write(tmp_path / "cache", settings(data, sequences=100_000))
    found = int(str(caught.value).split()[3])
    assert str(caught.value) == (
        f"the data has {found} sequences of 24 tokens, not 100000\n"
        f"  fix    set cache.sequences to at most {found}, or give more data"
    )
    write(tmp_path / "cache", settings(data, sequences=found))


def test_fewer_held_out_sequences_are_told(tmp_path: Path, data: Data) -> None:
    told: list[str] = []
    found = write(tmp_path / "cache", settings(data, heldout=1000), tell=told.append)
    assert 0 < found.heldout < 1000
    assert f"{found.heldout} held-out sequences, not 1000: the data has no more" in told


def test_a_single_document_is_not_held_out_and_that_is_told(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one text, and no other\n" * 40)
    told: list[str] = []
    found = write(tmp_path / "cache", settings(TextFiles(text=str(tmp_path / "one.txt"))), tell=told.append)
    assert found.heldout == 0
    assert "nothing is held out: the data is a single document" in told


# -- the order of batches -------------------------------------------------------------------------------------------


def test_an_epoch_reads_every_sequence_once_in_an_order_of_its_own(made: Path) -> None:
    rows = TeacherCache(made).rows("train", seed=5)

    def epoch(number: int) -> list[tuple[int, ...]]:
        found: list[Any] = []
        for first in range(21 * number, 21 * (number + 1), 7):
            found += rows.shuffled(first, 7).input_ids.tolist()
        return [tuple(row) for row in found]

    first, second = epoch(0), epoch(1)
    assert len(set(first)) == 21 and set(first) == set(second)
    assert first != second
    again = TeacherCache(made).rows("train", seed=5).shuffled(7, 7).input_ids.tolist()
    assert [tuple(row) for row in again] == first[7:14]


def test_a_batch_moves_with_its_targets(made: Path) -> None:
    batch = TeacherCache(made).rows("train").batch([0, 1])
    moved = batch.to("meta")
    assert {moved.input_ids.device.type, moved.targets.ids.device.type, moved.targets.logsumexp.device.type} == {"meta"}
    assert moved.targets.vocabulary == VOCABULARY
    assert math.isfinite(float(batch.targets.logsumexp.sum()))
