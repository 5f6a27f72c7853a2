"""The command ``qc``. Every command imports what it needs when it runs, so ``qc --help`` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qc import cli_looking
from qc.cli_options import (
    RUNS,
    ArtifactArg,
    Batch,
    Batches,
    Json,
    Length,
    Processes,
    RecipeArg,
    RunArg,
    Runs,
    Set,
    Text,
)
from qc.packages import expect_own_packages

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Compile a Hugging Face model by recipe into a low-bit model that runs.

    The short way: qc run quickstart. Step by step: qc compile RECIPE, qc train, qc export --target safetensors,
    qc generate --prompt "...". Every command after compile takes the latest run unless it is given another.
    """,
    epilog="Exit codes: 0 done, 1 a mistake to fix, 2 a wrong call, 3 a gate failed, 4 an export is not its graph.",
)
recipes_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="The recipes that come with qc.")
app.add_typer(recipes_app, name="recipes")
cache_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="What is worked out once and kept on disk.")
app.add_typer(cache_app, name="cache")


@app.command()
def compile(
    recipe: RecipeArg,
    set: Set = None,
    runs: Runs = RUNS,
    check: Annotated[bool, typer.Option(help="Hold every pass to its contract on probe inputs.")] = True,
    processes: Processes = 1,
    json: Json = False,
) -> None:
    """Capture the model, run the passes, write the artifact into a run folder.

    The same recipe on the same model is the same run: what was compiled before is taken as it is. On several machines
    that share the folder: accelerate launch -m qc compile RECIPE.
    """
    from qc.commands import compile_command

    compile_command(recipe, set or [], runs, check, processes, json)


@app.command()
def train(run: RunArg = None, runs: Runs = RUNS, json: Json = False) -> None:
    """Train what the passes left trainable, as the recipe says. A killed training goes on where it was.

    On several devices: accelerate launch -m qc train.
    """
    from qc.commands import train_command

    train_command(run, runs, json)


@app.command()
def export(
    run: RunArg = None,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            "-t",
            help="safetensors, ane, onnx, gguf, bitnet, ternary, or for GPU servers fp8, nvfp4, mxfp8, mxfp4, int2, "
            "int4, int8, nf4, mixed.",
        ),
    ] = "safetensors",
    dtype: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32; without it, what the recipe says.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write; without it, one in the run.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Load the export back in a fresh process and compare.")] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what was exported before, once the new is whole.")
    ] = False,
    chip: Annotated[str | None, typer.Option(help="ane: chips and system, as m1-macos15.")] = None,
    context: Annotated[int | None, typer.Option(help="ane: tokens that the cache holds.")] = None,
    prefill: Annotated[int | None, typer.Option(help="ane: tokens read at once from a prompt; 0: one.")] = None,
    kv: Annotated[str | None, typer.Option(help="ane: cache as state_slice, state_blend or io; onnx: true.")] = None,
    chunks: Annotated[int | None, typer.Option(help="ane: packages the blocks are spread over.")] = None,
    scheme: Annotated[str | None, typer.Option(help="fp8: channel, tensor, block or static.")] = None,
    weight_only: Annotated[
        bool | None,
        typer.Option("--weight-only", help="fp8, nvfp4, mxfp8, mxfp4, int8, mixed: leave inputs as they are."),
    ] = None,
    dialect: Annotated[str | None, typer.Option(help="fp8, nvfp4, mxfp8: compressed-tensors, modelopt or hf.")] = None,
    group: Annotated[int | None, typer.Option(help="int4, int8: weights that share a scale, 32, 64 or 128.")] = None,
    kv_cache: Annotated[str | None, typer.Option(help="Of GPU servers but nf4: fp8, for keys and values.")] = None,
    encoding: Annotated[str | None, typer.Option(help="gguf: q8_0 or q4_0, of float weights.")] = None,
    calibration: Annotated[
        int | None, typer.Option(help="fp8 static, nvfp4, kv-cache: tokens to find ranges on.")
    ] = None,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Write the newest artifact of a run (or any artifact) for another runtime, load it back and compare."""
    from qc.commands import export_command

    options = {"chip": chip, "context": context, "prefill": prefill, "kv": kv, "chunks": chunks}
    options |= {"scheme": scheme, "weight_only": weight_only, "dialect": dialect, "group": group}
    options |= {"encoding": encoding, "kv_cache": kv_cache, "calibration": calibration}
    export_command(run, target, dtype, out, verify, force, runs, json, options)


@app.command()
def run(recipe: RecipeArg, set: Set = None, runs: Runs = RUNS, processes: Processes = 1, json: Json = False) -> None:
    """Do all of a recipe: compile, train, evaluate, check the gates, export, verify; print one table."""
    from qc.commands import run_command

    run_command(recipe, set or [], runs, processes, json)


@app.command()
def check(
    recipe: RecipeArg,
    set: Set = None,
    server: Annotated[
        str | None, typer.Option(help="What shall load the exports: transformers, vllm, sglang or tensorrt-llm.")
    ] = None,
    json: Json = False,
) -> None:
    """Find every mistake of a recipe at once, in seconds. The model is captured without weights; none are read."""
    from qc.commands import check_command

    check_command(recipe, set or [], server, json)


@app.command()
def show(
    what: Annotated[str, typer.Argument(metavar="ARTIFACT|RECIPE", help="An artifact, a run, or a recipe.")],
    graph: Annotated[bool, typer.Option("--graph", help="The text of the graph, one line an op.")] = False,
    stage: Annotated[str | None, typer.Option(help="Of a recipe: after this stage, not after the last.")] = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """The sites with role, shape, bytes and format: as they are (artifact) or as they would be (recipe)."""
    from qc.commands import show_command

    show_command(what, graph, stage, set or [], json)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="An artifact, a run, or a recipe.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    json: Json = False,
) -> None:
    """What differs between two graphs: ops as a text diff, then tensors. Exit code 0 even where they differ."""
    from qc.commands import diff_command

    diff_command(a, b, json)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to go on from.")] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Ask for prompts until an empty line.")
    ] = False,
    artifact: Annotated[
        str | None,
        typer.Option(
            help="An artifact, a run, or an export for the Neural Engine or ONNX Runtime; without it, the latest run."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens that hold this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among this many tokens; 0 among all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens seen before become less likely.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    mode: Annotated[
        str | None, typer.Option(help="Of an export: the arithmetic, fp32, fp16 or ane; without it, fp32.")
    ] = None,
    context: Annotated[
        list[Path] | None,
        typer.Option(help="Text files that a model with an encoder may look things up in; several with several."),
    ] = None,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Generate text with a KV cache, streamed as it comes.

    An export for the Neural Engine answers itself: its packages are read and computed as an app would use them. So does
    one for ONNX Runtime that was made with --kv true.
    """
    from qc.commands import generate_command

    settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty}
    settings |= {"max_tokens": max_tokens, "seed": seed}
    generate_command(prompt, interactive, artifact, settings, chat, mode, runs, json, context or ())


@app.command(name="eval")
def evaluate(
    artifact: ArtifactArg = None,
    reference: Annotated[
        str | None,
        typer.Option(help="A model folder or artifact to compare with; without it, the model it was made of."),
    ] = None,
    data: Text = None,
    batches: Batches = 16,
    batch: Batch = 8,
    length: Length = 128,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Perplexity on held-out text, and KL divergence and top-1 agreement against a reference."""
    from qc.commands import evaluate_command

    evaluate_command(artifact, reference, data, batches, batch, length, runs, json)


@app.command()
def verify(
    exported: Annotated[Path, typer.Argument(metavar="EXPORT", help="The folder of an export.")],
    artifact: Annotated[
        str | None, typer.Option(help="The artifact it was made of; without it, found in the folder of runs.")
    ] = None,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Load an export in a fresh process with an independent reader and compare it with its graph."""
    from qc.commands import verify_command

    verify_command(exported, artifact, runs, json)


@app.command()
def lint(
    exported: Annotated[Path, typer.Argument(metavar="EXPORT", help="An export for ane, or one .mlpackage.")],
    chip: Annotated[
        str | None, typer.Option(help="Chips and system, as m1-macos15; without it, those it was made for.")
    ] = None,
    run: Annotated[bool, typer.Option(help="Run it, for the rules that look at values.")] = True,
    json: Json = False,
) -> None:
    """Say what of an export the Neural Engine is known not to take, or to compute wrongly, and what to do.

    Exit code 1 if anything is an error.
    """
    from qc.commands import lint_command

    lint_command(exported, chip, run, json)


@app.command()
def schema() -> None:
    """The JSON Schema of recipes, for editors: put `# yaml-language-server: $schema=FILE` into a recipe."""
    from recipes.shipped import FOLDER

    sys.stdout.write((FOLDER / "schema.json").read_text())


@cache_app.command(name="teacher")
def cache_teacher(
    recipe: RecipeArg,
    set: Set = None,
    force: Annotated[
        bool, typer.Option("--force", help="Remove what the folder's cache holds and begin anew.")
    ] = False,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Write what the model says of some text, for students that train with the objective kd-cache.

    The section cache: of the recipe says of what text, and how many of the likeliest tokens are kept of every
    position. The size is told before it begins. What was killed goes on where it was; what is whole is checked and
    stays. The folder it prints is what kd-cache: {cache: FOLDER} takes; the recipe itself will do as well.
    """
    from qc.commands import cache_teacher_command

    cache_teacher_command(recipe, set or [], force, runs, json)


@recipes_app.command(name="list")
def list_recipes(json: Json = False) -> None:
    """The shipped recipes and what each does."""
    from qc.console import result, table
    from recipes.shipped import shipped

    found = shipped()
    result(
        [{"name": n, "about": a} for n, a in found], json, lambda: table([list(r) for r in found], ["recipe", "about"])
    )


@recipes_app.command(name="copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="The name of a shipped recipe.")],
    to: Annotated[Path | None, typer.Option("--to", help="The file to write; without it, NAME.yaml here.")] = None,
) -> None:
    """Write a shipped recipe to a file of your own, to change it."""
    from qc.console import explained
    from qc.copying import copy

    with explained():
        print(copy(name, to))


for _looks in (cli_looking.assess, cli_looking.quality):
    app.command()(_looks)


def main() -> None:
    """Run the command line."""
    try:
        expect_own_packages()
    except ImportError as error:
        raise SystemExit(f"error: {error}") from None
    app(prog_name="qc")


if __name__ == "__main__":
    main()
