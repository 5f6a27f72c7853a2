"""Tokens per second of the teacher's cache beside a plain loop with the same answers.

python tools/bench/kd_cache.py [--model seedling|wide] [--texts rows|documents] [--sequences 64] [--rounds 3] [--check]

The plain loop is transformers' model in the same dtype, ``batch`` rows at a time: the logits of the whole batch,
torch.topk, torch.logsumexp, rounded as a cache stores them; nothing is written. Ours writes the cache, hashes and all.
With ``rows`` both read the same full rows of 128 tokens. With ``documents`` the texts are between 16 and 128 tokens
long and the plain loop pads them to the longest of its batch, as ours would without packing. Both sides take their
turns in one process, one after the other, so that a busy machine slows both; the ratios of CPU seconds, which others
do not disturb, stand beside those of the clock. Only tokens of the text count.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
BATCHES = (1, 4, 8)
LENGTH, TOPK, GOAL = 128, 64, 1.5


def write_texts(work: Path, kind: str, sequences: int, tokenizer: Any) -> None:
    """Text that fills about ``sequences`` rows, as JSON lines: long, or cut into documents of 16 to 128 tokens."""
    from runtimes import stdlib_text

    text = "".join(stdlib_text.read_text(path) for path in stdlib_text.stdlib_files("train")[:40])
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    chance, at, rows = random.Random(0), 0, []
    while at < min(len(ids), sequences * LENGTH * 1.2):
        size = chance.randint(16, 128) if kind == "documents" else 4 * LENGTH
        rows.append(json.dumps({"text": tokenizer.decode(ids[at : at + size])}))
        at += size
    (work / "texts.jsonl").write_text("\n".join(rows))


def load(kind: str) -> tuple[Any, Any, Any]:
    """The model of transformers, the same as a graph, and the tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from graph import capture
    from graph.checkpoint import locate
    from graph.tokenizer import load_tokenizer

    folder = locate("seedling")
    model: Any
    if kind == "seedling":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        config = Qwen3Config(
            hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
            intermediate_size=1536, vocab_size=151936, tie_word_embeddings=True,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config)
    return model.eval(), capture(model), load_tokenizer(folder, str(folder))


@torch.inference_mode()
def plain(model: Any, texts: list[Tensor], batch: int) -> tuple[float, float]:
    """The loop that anybody would write: tokens per second, by the clock and of CPU time."""
    start, cpu, kept = time.perf_counter(), time.process_time(), []
    for at in range(0, len(texts), batch):
        some = texts[at : at + batch]
        ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in some], batch_first=True)
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
        values, likeliest = torch.topk(logits, TOPK)
        kept.append((values.half(), likeliest.int(), torch.logsumexp(logits, -1)))
    tokens = sum(one.numel() for one in texts)
    return tokens / (time.perf_counter() - start), tokens / (time.process_time() - cpu)


def ours(graph: Any, tokenizer: Any, work: Path, sequences: int, number: int) -> tuple[float, float]:
    """The writer, likewise, from the moment at which it says how large the cache will be."""
    from runtimes.distill.writer import Source, make
    from runtimes.settings import Cache, JsonLines

    settings = Cache(data=JsonLines(jsonl=str(work / "texts.jsonl")), sequences=sequences, heldout=0, topk=TOPK)
    source = Source(
        graph=lambda: graph, tokenizer=tokenizer, model="bench", teacher="", dtype="fp32", root=work,
        tokens=work / "tokens",
    )  # fmt: skip
    said: list[float] = []
    folder = work / f"cache-{number}"
    made = make(settings, source, folder, seed=0, force=False, tell=lambda text: said.append(time.process_time()))
    return made.tokens_per_second, made.tokens / (time.process_time() - said[0])


def rows_of(work: Path, kind: str, tokenizer: Any, sequences: int) -> list[Tensor]:
    """What the plain loop reads: the same rows, or the documents one by one."""
    from runtimes.data import Corpus
    from runtimes.settings import JsonLines

    if kind == "documents":
        lines = (work / "texts.jsonl").read_text().splitlines()
        found = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]
        return [torch.tensor([*ids, tokenizer.eos_token_id][:LENGTH]) for ids in found]
    rows = Corpus(JsonLines(jsonl=str(work / "texts.jsonl"))).rows(
        "train", tokenizer=tokenizer, length=LENGTH, cache=work / "tokens"
    )
    return list(rows.batch(range(sequences)).input_ids)


def compare(said: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All sides in turn, ``rounds`` times behind one that warms up."""
    model, graph, tokenizer = load(said.model)
    write_texts(work, said.texts, said.sequences, tokenizer)
    texts = rows_of(work, said.texts, tokenizer, said.sequences)
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in ("ours", *(f"plain {b}" for b in BATCHES))}
    for number in range(said.rounds + 1):
        taken = {"ours": ours(graph, tokenizer, work, said.sequences, number)}
        taken |= {f"plain {batch}": plain(model, texts, batch) for batch in BATCHES}
        for name, speed in taken.items():
            speeds[name] += [speed] if number else []
    found: dict[str, Any] = {}
    for kind, nth in (("tokens_per_second", 0), ("tokens_per_cpu_second", 1)):
        medians = {name: statistics.median(speed[nth] for speed in taken) for name, taken in speeds.items()}
        found[kind] = {name: round(value, 1) for name, value in medians.items()}
    for kind, nth in (("ratio", 0), ("cpu_ratio", 1)):
        found[kind] = {}
        for name in list(speeds)[1:]:
            pairs = zip(speeds["ours"], speeds[name], strict=True)
            found[kind][name] = round(statistics.median(one[nth] / other[nth] for one, other in pairs), 3)
    return found


def main() -> None:
    """Run and print; with --check, fail where the goal is missed at any batch size of the plain loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("seedling", "wide"), default="seedling")
    parser.add_argument("--texts", choices=("rows", "documents"), default="documents")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help=f"exit 1 unless every ratio is at least {GOAL}")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(said, Path(folder))
    print(json.dumps(found, indent=1))
    if said.check and min(found["ratio"].values()) < GOAL:
        raise SystemExit(f"below {GOAL}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
