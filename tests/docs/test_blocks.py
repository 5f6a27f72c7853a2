import pytest

from tests.docs.blocks import Block, alike, shown_in


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("perplexity 316.30", "perplexity 4,129.1"),
        ("run: runs/qlora/3c44b9acb6c7", "run: runs/qlora/0123456789ab"),
        ("loss 5.2  950 tokens/s", "loss 4.8  12,345 tokens/s"),
        ("name   value", "name          value"),
        ("def main(…", "def main(self):"),
        ("inf dB", "86.6 dB"),
    ],
)
def test_what_may_differ_does_not_count(shown: str, printed: str) -> None:
    assert alike(shown, printed)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("21 sites", "20 sites"),
        ("model.layers.0.mlp", "model.layers.1.mlp"),
        ("perplexity 3.1", "perplexity nan"),
        ("a b", "a  b"),
        ("error: no run", "no run"),
    ],
)
def test_what_may_not_differ_counts(shown: str, printed: str) -> None:
    assert not alike(shown, printed)


def test_lines_must_follow_each_other_unless_the_document_says_otherwise() -> None:
    assert shown_in(["a", "b"], "a\nb\n") is None
    assert shown_in(["a", "c"], "a\nb\nc\n") == "c"
    assert shown_in(["a", "...", "c"], "a\nb\nc\n") is None
    assert shown_in(["b"], "a\nb\n") == "b"
    assert shown_in(["a"], "a\nb\n") == "the end; 'b' follows"
    assert shown_in(["a", "..."], "a\nb\n") is None


def test_a_command_reaches_over_lines_and_its_output_begins_below() -> None:
    lines = ("$ cat > x <<END", "text", "END", "$ qc train \\", "    --json", "{}", "$ ls")
    assert list(Block("console", lines, "x:1").commands()) == [
        ("cat > x <<END\ntext\nEND", ()),
        ("qc train \\\n    --json", ("{}",)),
        ("ls", ()),
    ]
