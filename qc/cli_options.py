"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")]
RunArg = Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run's folder; without it, the latest run.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value: --set train.steps=100 --set add-lora.rank=8."),
]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")]
Processes = Annotated[
    int, typer.Option(min=1, help="Processes that divide the work on weights; the artifact has the same bytes.")
]
Runs = Annotated[Path, typer.Option("--runs", help="The folder of all runs.")]
RUNS = Path("runs")
ArtifactArg = Annotated[str | None, typer.Argument(metavar="[ARTIFACT]", help="An artifact or a run.")]
Text = Annotated[str | None, typer.Option(help="python-stdlib, or a glob of text files; without it, the recipe's.")]
Batches = Annotated[int, typer.Option(help="Batches to read.")]
Batch = Annotated[int, typer.Option(help="Sequences per batch.")]
Length = Annotated[int, typer.Option(help="Tokens per sequence.")]
