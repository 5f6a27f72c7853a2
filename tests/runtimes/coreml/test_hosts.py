"""Exports run as an app runs them give what their graphs give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graph import Graph, QcError
from graph.probe import psnr_db
from graph.tokenizer import load_tokenizer
from runtimes.coreml.decoder import Decoder, Session
from runtimes.coreml.encoder import Encoder
from runtimes.coreml.inputs import HIDDEN, decoder_mask
from runtimes.coreml.meta import Mask, is_export, read_meta
from runtimes.generate import Generator
from runtimes.sampling import Sampling
from tests.runtimes.coreml.exports import decoder_graph, encoder_graph, write

IDS = torch.randint(0, 100, (30,), generator=torch.Generator().manual_seed(1)).tolist()


def logits(graph: Graph, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = graph(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64))
    return found[0].float()


@pytest.fixture(scope="module")
def graph() -> Graph:
    return decoder_graph()


@pytest.fixture(scope="module")
def one_block() -> Graph:
    return decoder_graph(num_hidden_layers=1)


@pytest.fixture(scope="module")
def exports(graph: Graph, one_block: Graph, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    options: dict[str, dict[str, Any]] = {
        "state_slice": {"chunks": 2}, "state_blend": {"kv": "state_blend"}, "io": {"kv": "io", "prefill": 0},
    }  # fmt: skip
    graphs = {name: graph if "chunks" in given else one_block for name, given in options.items()}
    return {name: write(graphs[name], tmp_path_factory.mktemp(name), **given) for name, given in options.items()}


@pytest.mark.parametrize("kind", ["state_slice", "state_blend", "io"])
def test_a_prompt_in_blocks_and_then_single_tokens_give_the_graphs_logits(
    kind: str, graph: Graph, one_block: Graph, exports: dict[str, Path]
) -> None:
    wanted = logits(graph if kind == "state_slice" else one_block, IDS)
    for mode, least in (("fp32", 60), ("fp16", 40), ("ane", 40)):
        session = Session(Decoder(exports[kind], mode))
        pieces = [session.read_all(IDS[:13]), session.read_all(IDS[13:14]), session.read_all(IDS[14:19])]
        pieces += [session.read([token])[None] for token in IDS[19:]]  # 8 more do not fit behind token 24
        assert psnr_db(wanted, torch.cat(pieces)) >= least, mode


def test_a_text_longer_than_the_context_is_refused(exports: dict[str, Path]) -> None:
    session = Session(Decoder(exports["state_slice"]))
    session.read(IDS)
    with pytest.raises(QcError) as caught:
        session.read(IDS[:3])
    what = "30 tokens and 3 more exceed the 32 of the export's context"
    assert str(caught.value) == f"{what}\n  fix    read less, or export with a larger --context"


def test_a_generator_takes_an_export_and_gives_what_the_graph_gives(graph: Graph, exports: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(exports["state_slice"], "it")
    prompts = [IDS[:11], IDS[4:7]]
    for sampling in (Sampling(max_tokens=16), Sampling(max_tokens=8, temperature=0.8, top_k=5, seed=3)):
        ours = Generator(Decoder(exports["state_slice"]), tokenizer, eos=())(prompts, sampling)
        theirs = Generator(graph, tokenizer, eos=())(prompts, sampling)
        assert [row.ids for row in ours.rows] == [row.ids for row in theirs.rows]
        assert ours.uncached is None
    with pytest.raises(QcError, match="a prompt of 11 tokens and 40 more exceed the model's 32 positions"):
        Generator(Decoder(exports["io"]), tokenizer, eos=())(prompts, Sampling(max_tokens=40))


def test_masks_hide_what_comes_later_and_what_lies_before_the_window(exports: dict[str, Path]) -> None:
    meta = read_meta(exports["state_slice"])
    seen = decoder_mask(meta, Mask("mask", 3), 4, 2)[0, 0]
    assert [row.nonzero().flatten().tolist() for row in seen == 0] == [[2, 3, 4], [3, 4, 5]]
    assert set(seen.flatten().tolist()) == {0.0, HIDDEN}
    meta = read_meta(exports["io"])
    seen = decoder_mask(meta, Mask("mask", None), 2, 2)[0, 0]
    assert [row.nonzero().flatten().tolist() for row in seen == 0] == [[0, 1, 32], [0, 1, 32, 33]]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Path]:
    made = encoder_graph()
    return made, write(made, tmp_path_factory.mktemp("encoder"))


def test_an_encoder_gives_the_graphs_hidden_states_at_every_length(encoder: tuple[Graph, Path]) -> None:
    for mode, least in (("fp32", 60), ("fp16", 40), ("ane", 40)):
        model = Encoder(encoder[1], mode)
        for count in (3, 8, 9, 16):
            assert psnr_db(logits(encoder[0], IDS[:count]), model.hidden(IDS[:count])) >= least
    with pytest.raises(QcError) as caught:
        Encoder(encoder[1]).hidden(IDS[:17])
    assert str(caught.value) == (
        "a text has 17 tokens, the export takes 16\n  fix    shorten it, or export with lengths that hold it"
    )


def test_embeddings_are_pooled_as_the_model_says(encoder: tuple[Graph, Path]) -> None:
    folder, texts = encoder[1], ["def main", "import os"]
    tokenizer = load_tokenizer(folder, "it")
    hidden = [logits(encoder[0], list(tokenizer(text)["input_ids"])) for text in texts]
    model = Encoder(folder)
    mean = torch.nn.functional.normalize(torch.stack([h.mean(0) for h in hidden]), dim=-1)
    torch.testing.assert_close(model.encode(texts, tokenizer), mean, atol=2e-3, rtol=0)
    config = folder / "1_Pooling" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": True}))
    first = torch.nn.functional.normalize(torch.stack([h[0] for h in hidden]), dim=-1)
    torch.testing.assert_close(model.encode(texts, tokenizer), first, atol=2e-3, rtol=0)
    config.write_text(json.dumps({"pooling_mode_weightedmean_tokens": True}))
    with pytest.raises(QcError, match="pools by pooling_mode_weightedmean_tokens"):
        model.encode(texts, tokenizer)


def test_a_folder_that_is_no_export_is_told(
    tmp_path: Path, exports: dict[str, Path], encoder: tuple[Graph, Path]
) -> None:
    assert not is_export(tmp_path)
    with pytest.raises(QcError) as caught:
        Decoder(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is no export for the Neural Engine: it has no meta.json\n"
        "  fix    give the folder that qc export --target ane wrote"
    )
    with pytest.raises(QcError, match="is an encoder, which generates no text"):
        Decoder(encoder[1])
    with pytest.raises(QcError, match="is a language model, not an encoder"):
        Encoder(exports["io"])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: m.pop("parts"), "meta.json is damaged"),
        (lambda m: m.update(kv="paged"), "meta.json is damaged"),
        (lambda m: m["parts"][1].update(file="../chunk_1.mlpackage"), "meta.json is damaged"),
        (lambda m: m["parts"][1].update(file="chunk_9.mlpackage"), "chunk_9.mlpackage is missing"),
        (lambda m: m["parts"].pop(), "meta.json names no embeddings, chunks and head"),
        (lambda m: m["parts"][1]["functions"].update(decode={"tokens": 1}), "has no function decode"),
    ],
)
def test_a_damaged_meta_is_told(change: Any, what: str, exports: dict[str, Path], tmp_path: Path) -> None:
    for item in exports["io"].iterdir():
        (tmp_path / item.name).symlink_to(item)
    path = tmp_path / "meta.json"
    data = json.loads(path.read_text())
    change(data)
    path.unlink()
    path.write_text(json.dumps(data))
    with pytest.raises(QcError, match=what.replace(".", r"\.")):
        Decoder(tmp_path)


def test_damaged_rotations_are_told(exports: dict[str, Path], tmp_path: Path) -> None:
    for item in exports["io"].iterdir():
        if item.name != "rope.safetensors":
            (tmp_path / item.name).symlink_to(item)
    with pytest.raises(QcError, match=r"rope\.safetensors is missing"):
        Decoder(tmp_path)
    (tmp_path / "rope.safetensors").write_bytes(b"nothing")
    with pytest.raises(QcError, match=r"rope\.safetensors is damaged"):
        Decoder(tmp_path)
