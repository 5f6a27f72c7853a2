"""Generation: the tokens transformers finds, streamed as whole characters, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import Graph, QcError, capture
from runtimes.detokenize import HALF
from runtimes.generate import Generator, ends, generate
from runtimes.sampling import Sampling
from tests.architectures import config

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@cache
def tokenizer() -> Any:
    """Bytes as tokens, two of them merged, and four special ones: 0 the end of a text, 1 padding, 2 and 3 of a turn."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<end>", "<pad>", "<s>", "<e>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*special, *letters, "de"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("d", "e")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in special])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>", padding_side="left")
    wrapped.chat_template = TEMPLATE
    return wrapped


@cache
def model(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = config(name)
    settings.vocab_size, settings.pad_token_id, settings.eos_token_id = len(tokenizer()), 1, 0
    settings.bos_token_id = None
    made = AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


@cache
def graph(name: str) -> Graph:
    return capture(model(name), kind="causal-lm")


def scripted(text: str, tail: Sequence[int] = ()) -> Graph:
    """A graph that says ``text`` whatever it is asked: its logits are a table over positions."""
    said = [*tokenizer()(text)["input_ids"], *tail]
    table = torch.zeros(64, len(tokenizer()))
    for at in range(64):
        table[at, said[min(at, len(said) - 1)]] = 1.0
    return _positional(table)


def _positional(table: torch.Tensor) -> Graph:
    from graph.core import TensorInfo

    made = graph("gpt2").copy()
    lookup = made.site("transformer.wpe").node.args[1]
    assert isinstance(lookup, torch.fx.Node)
    end = made.module.graph.output_node()
    weight = made.add_tensor("script", table, before=end, info=TensorInfo())
    said = made.insert("aten.embedding", weight, lookup, name="said", before=end)
    zero = made.insert("aten.mul.Tensor", made.output_nodes()[0], 0.0, name="nothing", before=end)
    made.set_outputs([made.insert("aten.add.Tensor", said, zero, name="script_logits", before=end)])
    made.verify()
    return made


PROMPTS = ["def main(", "x", "import os\nimport sys"]


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_those_of_transformers_in_a_padded_batch(name: str, penalty: float) -> None:
    found = generate(graph(name), tokenizer(), PROMPTS, Sampling(max_tokens=16, repetition_penalty=penalty))
    for prompt, row in zip(PROMPTS, found.rows, strict=True):
        asked = tokenizer()(prompt, return_tensors="pt")["input_ids"]
        theirs = model(name).generate(
            asked, attention_mask=torch.ones_like(asked), max_new_tokens=16, do_sample=False, repetition_penalty=penalty
        )
        assert list(row.ids) == theirs[0, asked.shape[1] :].tolist()
        assert row.prompt_tokens == asked.shape[1]
    assert found.uncached is None


def test_a_batch_of_transformers_agrees_too() -> None:
    asked = tokenizer()(PROMPTS, return_tensors="pt", padding=True)
    mask = asked["attention_mask"]
    theirs = model("qwen3").generate(asked["input_ids"], attention_mask=mask, max_new_tokens=12, do_sample=False)
    found = generate(graph("qwen3"), tokenizer(), PROMPTS, Sampling(max_tokens=12))
    for row, ids in zip(found.rows, theirs[:, mask.shape[1] :].tolist(), strict=True):
        assert list(row.ids) == ids[: len(row.ids)]


def test_without_a_cache_the_tokens_are_the_same_and_the_result_says_so() -> None:
    blocked = graph("qwen3").copy()
    site = blocked.site("model.norm")
    total = blocked.insert("aten.cumsum", site.input(0), 1, name="running", before=site.node)
    nothing = blocked.insert("aten.mul.Tensor", total, 0.0, name="nothing", before=site.node)
    site.set_input(0, blocked.insert("aten.add.Tensor", site.input(0), nothing, name="same", before=site.node))
    blocked.verify()
    slow = generate(blocked, tokenizer(), PROMPTS, Sampling(max_tokens=8))
    fast = generate(graph("qwen3"), tokenizer(), PROMPTS, Sampling(max_tokens=8))
    assert [row.ids for row in slow.rows] == [row.ids for row in fast.rows]
    assert slow.uncached == "running runs along the tokens (aten.cumsum)"


def test_a_long_prompt_is_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "for i in range(10): print"
    whole = generate(graph("qwen3"), tokenizer(), prompt, Sampling(max_tokens=8))
    monkeypatch.setattr("runtimes.reading.CHUNK", 7)
    assert generate(graph("qwen3"), tokenizer(), prompt, Sampling(max_tokens=8)).rows == whole.rows


def test_sampling_repeats_with_its_seed_and_does_not_depend_on_the_batch() -> None:
    wild = Sampling(max_tokens=12, temperature=1.0, top_p=0.9, top_k=40, seed=3)
    make = Generator(graph("qwen3"), tokenizer())
    first = make(PROMPTS, wild)
    assert make(PROMPTS, wild).rows == first.rows
    assert make(PROMPTS[:1], wild).rows == first.rows[:1]
    other = Sampling(max_tokens=12, temperature=1.0, top_p=0.9, top_k=40, seed=4)
    assert make(PROMPTS[:1], other).rows != first.rows[:1]


def test_text_streams_in_whole_characters_and_joins_to_the_text() -> None:
    text = "de é 東京 🙂!"
    pieces: list[str] = []
    found = generate(
        scripted(text, tail=[0]), tokenizer(), "?", Sampling(max_tokens=40),
        stream=lambda _, piece: pieces.append(piece),
    )  # fmt: skip
    assert (found.text, found.rows[0].finish) == (text, "eos")
    assert "".join(pieces) == text
    assert len(pieces) == len(text) - 1  # each character on its own, but "de" is one token
    assert all(HALF not in piece for piece in pieces)


def test_a_stop_text_ends_the_generation_and_is_never_shown() -> None:
    pieces: list[str] = []
    found = generate(
        scripted("a = 1\n\nb = 2"), tokenizer(), "?", Sampling(max_tokens=30, stop=("\n\n",)),
        stream=lambda _, piece: pieces.append(piece),
    )  # fmt: skip
    assert (found.text, found.rows[0].finish) == ("a = 1", "stop")
    assert "".join(pieces) == "a = 1"


def test_a_chat_is_put_into_the_template_and_ends_with_the_turn() -> None:
    make = Generator(graph("qwen3"), tokenizer())
    wanted = tokenizer()("<s>user\nhi<e>\n<s>assistant\n")["input_ids"]
    assert make.encode("hi", chat=True) == wanted
    assert make.encode([{"role": "user", "content": "hi"}]) == wanted
    said = scripted("." * (len(wanted) - 1) + "yes", tail=[3])
    found = generate(said, tokenizer(), "hi", Sampling(max_tokens=20), chat=True)
    assert (found.text, found.rows[0].finish) == ("yes", "eos")


def test_ends_that_only_the_generation_configuration_names_end_a_text(tmp_path: Path) -> None:
    small = graph("qwen3")
    assert ends(small.config, tokenizer(), tmp_path) == [0]
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": [3, 0]}')
    assert ends(small.config, tokenizer(), tmp_path) == [0, 3]
    path.write_text("[]")
    with pytest.raises(QcError) as caught:
        ends(small.config, tokenizer(), tmp_path)
    assert str(caught.value) == f"{path} is not a generation configuration\n  fix    repair it, or remove it"


def test_a_quantized_graph_generates() -> None:
    from passes.quantize_base import QuantizeBase

    small = graph("qwen3").copy()
    QuantizeBase(scheme="int8").run(small)
    small.verify()
    found = generate(small, tokenizer(), "def", Sampling(max_tokens=6))
    assert len(found.rows[0].ids) <= 6
    assert found.tokens_per_second > 0


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "more", "text"),
    [
        ("", 1, "the prompt is empty\n  fix    give a text to go on from"),
        ([], 1, "there is no prompt\n  fix    give a text to go on from"),
        (
            [9999],
            1,
            "the prompt has token 9999, the model knows 261\n  fix    use the tokenizer that belongs to the model",
        ),
        (
            "x" * 60,
            10,
            "a prompt of 60 tokens and 10 more exceed the model's 64 positions\n  fix    lower max_tokens to 4",
        ),
        ("x" * 70, 1, "a prompt of 70 tokens and 1 more exceed the model's 64 positions\n  fix    shorten the prompt"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_an_error(prompt: Any, more: int, text: str) -> None:
    with pytest.raises(QcError) as caught:
        generate(graph("qwen3"), tokenizer(), prompt, Sampling(max_tokens=more))
    assert str(caught.value) == text


def test_a_chat_without_a_template_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer(), "chat_template", None)
    with pytest.raises(QcError) as caught:
        generate(graph("qwen3"), tokenizer(), "hi", chat=True)
    assert str(caught.value) == (
        "the tokenizer has no chat template\n"
        "  fix    generate without chat, or put chat_template.jinja beside the model"
    )


def test_a_plan_and_an_encoder_generate_nothing() -> None:
    with pytest.raises(QcError) as caught:
        generate(capture(config("qwen3"), kind="causal-lm"), tokenizer(), "x")
    assert str(caught.value) == "the graph has no weights\n  fix    capture a model folder, not a configuration"
    encoder = graph("qwen3").copy()
    encoder.kind = "encoder"
    with pytest.raises(QcError) as caught:
        generate(encoder, tokenizer(), "x")
    assert str(caught.value) == "an encoder generates no text\n  fix    give a causal language model"
