"""A valid recipe, damaged at many places: it loads, or says what is wrong; nothing else."""

import random

import pytest

from tests.recipes.reading import complaints, read

pytestmark = pytest.mark.usefixtures("folder")

VALID = """\
# A recipe with something of everything.
model: ./qwen3-tiny
name: "full"
seed: 7
passes:
  - squeeze: {scheme: nf4, bits: 3, select: {role: [attn.*, mlp.down], block: [0-3, -1]}}
    name: base
  - adapt:
      rank: 4
      pattern: {"*.0.*": 8}
train:
  objective: {kd: {temperature: 2.0, alpha: 0.5}}
  data: {text: [corpus/*.txt]}
  eval_data: {jsonl: corpus/b.jsonl, messages: chat}
  steps: 100
  groups:
    lora: {lr: 1e-4, warmup: 0.1, betas: [0.9, 0.95], select: {role: 'lora.*'}}
    rest: {lr: 1e-5, start_step: 50}
  trackers: [wandb]
evaluate: {metrics: [perplexity, kl]}
require:
  - {metric: perplexity_ratio, op: "<=", value: 1.1}
  - {metric: train/loss, op: decreased, window: 5}
export:
  - {target: safetensors, dtype: bf16, max_shard_size: 2GB}
"""

MARKS = ("{", "}", "[", "]", ":", ": ", "- ", "? ", "\t", "\n", " ", "'", '"', "\\", "&a ", "*a", "|", ">", "#", "<<: ")
WORDS = ("null", "~", "0", "-1", "1e400", ".nan", "9" * 400, "true", "{a: {a: {a: ", "[[[[[[", "é", "extends: x\n")
ODD = ("\x00", "\x85", "\u2028", '"\\U99999999"', '"\\ud800"', "!!set ", "%YAML 1.1\n", "---\n", "...\n")


def test_the_recipe_is_valid() -> None:
    assert read(VALID).train


@pytest.mark.parametrize("part", range(10))
def test_a_recipe_that_ends_anywhere_is_read_or_refused(part: int) -> None:
    for end in range(part, len(VALID), 10):
        complaints(VALID[:end])


@pytest.mark.parametrize("seed", range(20))
def test_a_recipe_with_scraps_in_it_is_read_or_refused(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(20):
        at, cut = draw.randrange(len(VALID)), draw.choice([0, 0, 1, 5, 40])
        text = VALID[:at] + draw.choice((*MARKS, *WORDS, *ODD)) + VALID[at + cut :]
        for line in complaints(text):
            assert line.startswith("recipe.yaml:"), (line, text)


@pytest.mark.parametrize("scrap", ["null", "3", "text", "[]", "{}", "[a, b]", "{a: {b: c}}", "[[1]]", "[{}]", "true"])
def test_any_value_anywhere_is_read_or_refused(scrap: str) -> None:
    for key in ("model", "models", "name", "seed", "dtype", "probe", "passes", "train", "evaluate", "require", "export",
                "stages", "extends", "include", "train.objective", "train.data", "train.groups", "train.groups.a",
                "train.include", "evaluate.data", "evaluate.metrics"):  # fmt: skip
        *parents, last = key.split(".")
        inner = f"{last}: {scrap}"
        for parent in reversed(parents):
            inner = f"{parent}: {{{inner}}}"
        complaints(f"model: seedling\n{inner}\n")
        complaints(f"model: seedling\nstages:\n  - {{name: a, {inner}}}\n")
        steps = f"  - squeeze: {scrap}\n  - {scrap}\n  - {{seal: {scrap}, name: {scrap}, on: {scrap}}}"
        complaints(f"model: seedling\npasses:\n{steps}\n")
