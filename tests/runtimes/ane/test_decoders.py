"""Decoders taken apart and run as a host would: prefill, then token by token, over each kind of cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers

from graph import capture
from graph.probe import psnr_db
from runtimes.ane.profile import load_profile
from tests.architectures import CAUSAL
from tests.runtimes.ane.hosted import Decoder
from tests.runtimes.ane.models import quantized, random, tokens

IDS = tokens(19)


def expected(name: str) -> torch.Tensor:
    return random(name)(input_ids=torch.tensor([IDS]))[0].detach()


QUICK = ["qwen3", "gemma2", "phi", "gpt2"]
"""Norms of heads and grouped queries; windows, caps and scales; half a rotation and biases; learned positions."""

OTHERS = [
    "llama", "mistral", "qwen2", "gemma", "gemma3_text", "phi3", "gpt_neox", "gpt_bigcode", "opt", "starcoder2",
    "olmo", "olmo2", "granite", "smollm3", "exaone4", "seed_oss", "hunyuan_v1_dense", "nemotron", "arcee", "persimmon",
]  # fmt: skip


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_decoder_computes_what_its_graph_does(name: str) -> None:
    found = Decoder(random(name), context=32, prefill=8).logits(IDS)
    reference = expected(name)
    assert psnr_db(reference, found) > 60
    assert torch.equal(reference.argmax(-1), found.argmax(-1))


@pytest.mark.parametrize("kv", ["state_slice", "state_blend", "io"])
def test_every_kind_of_cache_gives_the_same(kv: str) -> None:
    decoder = Decoder(random("mistral"), context=32, prefill=4, kv=kv)
    assert psnr_db(expected("mistral"), decoder.logits(IDS)) > 65
    assert ("kv_cache" in decoder.states[1]) is (kv != "io")


def test_without_a_prefill_function_every_token_is_one_call() -> None:
    decoder = Decoder(random("qwen3"), context=32, prefill=None)
    assert [list(part) for part in decoder.parts] == [["infer"]] * 3
    assert psnr_db(expected("qwen3"), decoder.logits(IDS)) > 65


def test_chunks_compute_what_one_does() -> None:
    one, two = (Decoder(random("qwen3"), context=32, prefill=8, chunks=n) for n in (1, 2))
    assert [part.role for part in two.plan.parts] == ["embed", "chunk", "chunk", "head"]
    assert [part.blocks for part in two.plan.parts[1:3]] == [[0], [1]]
    assert torch.equal(one.logits(IDS), two.logits(IDS))


def test_a_limit_on_bytes_makes_as_many_chunks_as_it_takes() -> None:
    graph = random("qwen3")
    whole = Decoder(graph, context=32, prefill=8).plan
    limit = whole.weight_bytes(whole.parts[1]) - 1
    plan = Decoder(graph, context=32, prefill=8, profile=replace(load_profile(), part_bytes=limit)).plan
    assert [part.blocks for part in plan.parts] == [[], [0], [1], []]


def test_a_wide_vocabulary_is_split_into_pieces_that_follow_one_another() -> None:
    decoder = Decoder(random("gemma2"), context=32, prefill=8, profile=replace(load_profile(), head_rows=40))
    assert decoder.meta["parts"][-1]["logits"] == [40, 40, 19]
    assert psnr_db(expected("gemma2"), decoder.logits(IDS)) > 60


def test_a_block_of_qwen3_is_these_ops() -> None:
    decoder = Decoder(random("qwen3"), context=32, prefill=8)
    decoder.logits(IDS[:9])
    infer, prefill = (Counter(decoder.ops[1, name]) for name in ("infer", "prefill"))
    shared = {"add": 1, "mul": 1}  # the end of the block's slots, the signs of the sines
    assert {kind: (n - shared.get(kind, 0)) / 2 for kind, n in infer.items()} == {
        "mul": 15, "concat": 10, "slice_by_index": 10, "conv": 7, "reshape": 6, "add": 6, "layer_norm": 4,
        "slice_update": 2, "coreml_update_state": 2, "matmul": 2, "softmax": 1, "tanh": 1,
    }  # fmt: skip
    assert {kind: (n - shared.get(kind, 0)) / 2 for kind, n in prefill.items()} == {
        "mul": 15, "concat": 10, "slice_by_index": 10, "conv": 7, "reshape": 8, "add": 6, "layer_norm": 4,
        "slice_update": 2, "coreml_update_state": 2, "matmul": 2, "softmax": 1, "tanh": 1, "transpose": 4,
    }  # fmt: skip
    assert infer.total() / 2 <= 75 and prefill.total() / 2 <= 75


def test_the_first_ops_of_a_block_norm_project_and_turn() -> None:
    decoder = Decoder(random("qwen3"), context=32, prefill=8)
    decoder.logits(IDS[:1])
    assert decoder.ops[1, "infer"][:18] == [
        "add", "mul", "concat", "layer_norm", "slice_by_index", "mul", "conv",
        "reshape", "mul", "concat", "layer_norm", "slice_by_index", "mul",
        "conv", "reshape", "mul", "concat", "layer_norm",
    ]  # fmt: skip


def test_a_quantized_decoder_reads_each_palette_once_and_nothing_is_dense() -> None:
    graph = quantized(random("qwen3"), "lut", bits=2, rank=4, group=8)
    decoder = Decoder(graph, context=32, prefill=8)
    reference = graph(input_ids=torch.tensor([IDS]))[0].detach()
    assert psnr_db(reference, decoder.logits(IDS)) > 60
    assert Counter(decoder.ops[1, "infer"])["constexpr_lut_to_dense"] == 14
    assert Counter(decoder.ops[1, "infer"])["conv"] == 28


def test_a_dense_prefill_multiplies_scales_out_where_many_tokens_are_read() -> None:
    graph = quantized(random("qwen3"), "lut", bits=2, rank=4, group=8)
    decoder = Decoder(graph, context=32, prefill=8, dense_prefill=True)
    reference = graph(input_ids=torch.tensor([IDS]))[0].detach()
    assert psnr_db(reference, decoder.logits(IDS)) > 60
    assert "constexpr_lut_to_dense" not in decoder.ops[1, "prefill"]
    assert "constexpr_lut_to_dense" in decoder.ops[1, "infer"]


def test_two_kinds_of_rotation_are_two_tables_and_equal_ones_are_one() -> None:
    layers = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**{**CAUSAL["gemma3_text"][1], "layer_types": layers})
    graph = capture(transformers.AutoModelForCausalLM.from_config(config).eval())
    both = Decoder(graph, context=32, prefill=8).meta["rope"]
    assert [(kind["cos"], kind["sin"]) for kind in both] == [("cos", "sin"), ("cos_2", "sin_2")]
    assert len(Decoder(random("qwen3"), context=32, prefill=8).meta["rope"]) == 1
