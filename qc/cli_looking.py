"""The commands that look at an artifact: ``qc assess`` and ``qc quality``."""

from __future__ import annotations

from typing import Annotated

import typer

from qc.cli_options import RUNS, ArtifactArg, Batch, Batches, Json, Length, Runs, Text


def assess(
    artifact: ArtifactArg = None,
    levels: Annotated[int, typer.Option(help="How many levels, the easiest first.")] = 10,
    by: Annotated[str, typer.Option(help="corruption: of what is read; loss: to the model before the passes.")] = (
        "corruption"
    ),
    target: Annotated[float, typer.Option(help="The accuracy to look for, from 0 to 1.")] = 0.75,
    tolerance: Annotated[float, typer.Option(help="How far from the target is near it.")] = 0.05,
    data: Text = None,
    batches: Batches = 2,
    batch: Batch = 8,
    length: Length = 128,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """How hard text is for an artifact, level by level, and at which its accuracy crosses a target, if at any.

    Beside that, how much gradients differ from batch to batch at each level, and whether they reach all that trains.
    A picture and all figures go into the folder assess beside the artifact.
    """
    from qc.looking import assess_command

    options = {"levels": levels, "by": by, "target": target, "tolerance": tolerance}
    options |= {"batches": batches, "batch": batch, "length": length}
    assess_command(artifact, data, options, runs, json)


def quality(
    artifact: ArtifactArg = None,
    data: Text = None,
    batches: Batches = 16,
    batch: Batch = 8,
    length: Length = 128,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """What compression did: the ten worst weights, perplexity before and after, and a verdict in plain words.

    A picture and the figures of all weights go into the folder quality beside the artifact.
    """
    from qc.looking import quality_command

    quality_command(artifact, data, batches, batch, length, runs, json)
