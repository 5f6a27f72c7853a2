"""Text as its tokens come: whole characters, nothing lost, nothing held back for ever."""

from __future__ import annotations

import pytest

from runtimes.detokenize import HALF, StopFinder, TextStream
from tests.runtimes.test_generate import tokenizer


@pytest.mark.parametrize("text", ["plain", "naïve — 東京", "🙂🙃", "a\N{REPLACEMENT CHARACTER}b"])
def test_a_stream_never_shows_half_a_character(text: str) -> None:
    stream = TextStream(tokenizer())
    pieces = [stream.push(token) for token in tokenizer()(text)["input_ids"]]
    assert "".join([*pieces, stream.flush()]) == text
    assert all(HALF not in piece for piece in pieces) or HALF in text


def test_bytes_that_never_become_a_character_do_not_stall_the_stream() -> None:
    (broken,) = tokenizer().convert_tokens_to_ids(["ÿ"])  # the byte 0xFF, which no character holds
    stream = TextStream(tokenizer())
    shown = "".join(stream.push(broken) for _ in range(40))
    assert 0 < len(shown) < 40
    assert len(shown + stream.flush()) == 40


def test_a_stop_that_turns_out_to_be_none_is_shown_after_all() -> None:
    stops = StopFinder(("END",))
    assert [stops.push(piece) for piece in ("a E", "N", "Z", "EN")] == ["a ", "", "ENZ", ""]
    assert stops.flush() == "EN"
    assert not stops.found
