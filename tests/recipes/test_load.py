import os
import socket
from pathlib import Path

import pytest

from graph.errors import QcError
from graph.select import Selector
from recipes.load import load
from recipes.settings import Export, Gate, Probe
from runtimes import settings
from tests.recipes.plugin import Adapt, Seal, Squeeze
from tests.recipes.reading import TRAIN, complaints, mistakes, read, write

pytestmark = pytest.mark.usefixtures("folder")


def test_options_become_the_fields_of_the_pass() -> None:
    recipe = read("""
        model: seedling
        passes:
          - squeeze: {bits: 3, scale: 2, select: {role: [attn.*, mlp.down], block: 0-3}, keep: []}
          - adapt: {rank: 4, alpha: 1e-4, pattern: {"*.0.*": 8}}
          - seal
    """)
    select = Selector(role=("attn.*", "mlp.down"), block="0-3")
    assert [step.step for step in recipe.passes] == [
        Squeeze(bits=3, scale=2.0, select=select, keep=()),
        Adapt(rank=4, alpha=1e-4, pattern={"*.0.*": 8}),
        Seal(),
    ]


def test_steps_are_called_by_their_name_or_their_pass_and_a_number() -> None:
    recipe = read("""
        model: seedling
        passes:
          - squeeze
          - squeeze: {bits: 3}
            name: again
          - squeeze:
          - {adapt: {rank: 4}, name: squeeze-2}
    """)
    assert [step.name for step in recipe.passes] == ["squeeze", "again", "squeeze-3", "squeeze-2"]
    assert [step.kind for step in recipe.passes] == ["squeeze", "squeeze", "squeeze", "adapt"]


def test_a_step_knows_the_lines_of_its_options() -> None:
    (step,) = read("""
        model: seedling
        passes:
          - squeeze:
              bits: 3
              block: 48
    """).passes
    assert step.line == "recipe.yaml:3:5"
    assert step.line_of(QcError("block 48 does not divide 100", fix="set block to 50")) == "recipe.yaml:5:7"
    assert step.line_of(QcError("no such site", fix="look again")) == "recipe.yaml:3:5"


def test_what_is_read_is_what_the_runtimes_own() -> None:
    recipe = read("""
        model: seedling
        train:
          objective: {kd: {temperature: 2}}
          data: {jsonl: corpus/*.jsonl, prompt: q, response: a}
          eval_data: {text: [corpus/a.txt]}
          steps: 10
          groups: {head: {lr: 1, warmup: 3, betas: [0, 0.5], select: {role: head}}, rest: {lr: 2, select: {group: x}}}
          trackers: [wandb]
        evaluate: {data: {hf: org/name, split: "test[:1%]"}}
    """)
    here = Path.cwd()
    assert recipe.train == settings.Train(
        objective=settings.Kd(temperature=2.0),
        data=settings.JsonLines(jsonl=str(here / "corpus/*.jsonl"), prompt="q", response="a"),
        eval_data=settings.TextFiles(text=(str(here / "corpus/a.txt"),)),
        steps=10,
        groups={
            "head": settings.Group(lr=1.0, warmup=3.0, betas=(0.0, 0.5), select=Selector(role="head")),
            "rest": settings.Group(lr=2.0, select={"group": "x", "allow_empty": False}),
        },
        trackers=("wandb",),
    )
    assert recipe.evaluate == settings.Evaluate(data=settings.HubDataset(hf="org/name", split="test[:1%]"))


def test_short_forms_are_the_same_as_long_ones() -> None:
    assert (
        read(f"model: seedling{TRAIN}  objective: kd").train
        == read(f"model: seedling{TRAIN}  objective: {{kd: }}").train
    )
    short = read(f"model: seedling{TRAIN}")
    assert short.train
    assert short.train.data == settings.PythonStdlib()
    assert short.train.objective == settings.CausalLm()
    assert dict(short.train.all_groups()) == {"all": settings.Group(lr=1e-3)}


def test_defaults() -> None:
    recipe = read("model: ./qwen3-tiny\nexport: [{target: safetensors}]\n")
    assert recipe.model == str(Path.cwd() / "qwen3-tiny")
    assert (recipe.name, recipe.seed, recipe.dtype, recipe.probe) == ("recipe", 0, "fp32", Probe(batch=2, length=16))
    assert recipe.export == (Export(target="safetensors", dtype=None, max_shard_size="5GB", out=None),)
    assert recipe.export[0].numbers == "fp16"
    assert (recipe.passes, recipe.train, recipe.evaluate, recipe.require, recipe.stages) == ((), None, None, (), ())


def test_yaml_is_that_of_version_1_2() -> None:
    train = "train: {data: python-stdlib, steps: 0o17, lr: 1e-4, clip: ~}"
    recipe = read(f"model: seedling\nseed: 0x10\nname: on\n{train}\n")
    assert recipe.train
    assert (recipe.seed, recipe.name) == (16, "on")
    assert (recipe.train.steps, recipe.train.lr, recipe.train.clip) == (15, 1e-4, None)


def test_a_recipe_without_stages_is_one_stage() -> None:
    recipe = read(f"model: seedling\npasses: [squeeze]{TRAIN}require: [{{metric: train/loss, op: decreased}}]")
    (stage,) = recipe.plan()
    assert (stage.name, stage.passes, stage.train) == ("main", recipe.passes, recipe.train)
    assert stage.require == (Gate(metric="train/loss", op="decreased"),)


def test_stages_have_their_own_work() -> None:
    recipe = read("""
        model: seedling
        stages:
          - {name: first, passes: [squeeze], train: {data: python-stdlib, steps: 3, lr: 1.0}}
          - {name: second, passes: [squeeze, adapt: {rank: 3}], evaluate: {data: python-stdlib}}
    """)
    assert [stage.name for stage in recipe.plan()] == ["first", "second"]
    assert [step.name for stage in recipe.stages for step in stage.passes] == ["squeeze", "squeeze-2", "adapt"]


def test_several_models() -> None:
    recipe = read("""
        models: {encoder: {model: seedling}, decoder: {model: hf:org/name}}
        passes:
          - {adapt: {rank: 4}, on: encoder}
          - {squeeze: {bits: 4}, on: decoder}
          - {seal: , on: "*"}
    """)
    assert recipe.models
    assert {name: one.model for name, one in recipe.models.items()} == {"encoder": "seedling", "decoder": "hf:org/name"}
    assert [step.on for step in recipe.passes] == ["encoder", "decoder", "*"]


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    write("recipe.yml", "model: seedling")
    (folder / "binary.yaml").write_bytes(b"model: \0\1\2")
    (folder / "latin.yaml").write_bytes("# café\nname: café\nmodel: naïve".encode("latin-1"))
    (folder / "control.yaml").write_bytes(b"model: seed\x01ling")
    (folder / "large.yaml").write_bytes(b"# comment\n" * 200_000)
    (folder / "bom.yaml").write_bytes(b"\xef\xbb\xbfmodel: seedling\r\nsead: 3\r\n")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.yaml")
        assert mistakes("socket.yaml") == ["None | socket.yaml is not a regular file, not a recipe | name a YAML file"]
    assert mistakes("recipe.yaml") == ["None | there is no recipe 'recipe.yaml' | did you mean 'recipe.yml'?"]
    assert mistakes("quickstrat")[0].endswith("| did you mean 'quickstart'?")
    assert mistakes(".")[0].startswith("None | . is a folder, not a recipe | name a file in it: binary.yaml")
    assert mistakes("binary.yaml") == ["binary.yaml:1:8 | binary.yaml is not text | a recipe is a YAML file"]
    assert mistakes("latin.yaml") == ["latin.yaml:1:6 | byte 0xe9 is not UTF-8 | save the file as UTF-8"]
    assert "is not YAML" in mistakes("control.yaml")[0]
    assert "is larger than" in mistakes("large.yaml")[0]
    assert mistakes("bom.yaml") == ["bom.yaml:2:1 | the recipe has no 'sead' | did you mean 'seed'?"]
    assert "there is no recipe" in mistakes("nul\0.yaml")[0]
    assert "cannot be read" in mistakes("x" * 5000)[0]


def test_a_folder_with_glob_characters_is_taken_literally(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "[a]" / "corpus").mkdir(parents=True)
    (folder / "[a]" / "corpus" / "x.txt").write_text("x")
    monkeypatch.chdir(folder / "[a]")
    assert not complaints("model: seedling\ntrain: {data: {text: corpus/*.txt}, steps: 3, lr: 1.0}")


def test_the_error_of_a_recipe_reads_as_it_should() -> None:
    write("r.yaml", "model: seedling\npasses:\n  - squeeze: {bits: '4'}\n")
    with pytest.raises(QcError) as caught:
        load("r.yaml")
    assert str(caught.value) == (
        "squeeze.bits needs a whole number, not '4'\n  recipe r.yaml:3:21\n  fix    write 4, without quotes"
    )


def test_paths_start_where_the_recipe_is(folder: Path) -> None:
    train = "train: {data: {text: ../../corpus/*.txt}, steps: 3, lr: 1.0}"
    write("deep/er/recipe.yaml", f"model: ../../qwen3-tiny\n{train}")
    recipe = load("deep/er/recipe.yaml")
    assert recipe.model == str(folder / "qwen3-tiny")
    assert recipe.train
    assert recipe.train.data == settings.TextFiles(text=str(folder / "corpus" / "*.txt"))
    assert load(os.path.join("deep", "..", "deep", "er", "recipe.yaml")).model == recipe.model
