"""qc from Python: the same steps as the commands, with values instead of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graph.artifact import Artifact, load
from graph.errors import QcError
from qc.compiling import compile_stage
from qc.runs import DEFAULT, Run, find_artifact, open_run

Overrides = Mapping[str, object] | Sequence[str]


def _silent(message: str) -> None:
    """Say nothing."""


def compile(
    recipe: str | Path,
    *,
    set: Overrides = (),
    runs: str | Path = DEFAULT,
    check: bool = True,
    tell: Callable[[str], None] = _silent,
    processes: int = 1,
) -> Artifact:
    """Compile the first stage of a recipe (a file, or the name of a shipped one) and open the artifact.

    ``set`` overrides values by path or by pass name: ``{"lora.rank": 8, "train.steps": 100}``. The artifact lies in a
    run folder under ``runs``; work on weights is divided among ``processes``, which gives the same bytes. Raises
    QcError with everything that is wrong with the recipe.
    """
    from recipes.load import load as load_recipe

    read = load_recipe(recipe, set)
    run = open_run(read, set, Path(runs))
    return load(compile_stage(run, read, read.plan()[0], None, check=check, tell=tell, processes=processes))


def train(artifact: Artifact, *, tell: Callable[[str], None] = _silent) -> Artifact:
    """Train an artifact as the recipe of its run says, and open the trained one."""
    from qc.training import train_stage

    run = _run_of(artifact)
    recipe = run.recipe()
    stage = next(s for s in recipe.plan() if s.name == artifact.manifest["stage"])
    return load(train_stage(run, recipe, stage, tell=tell))


def export(
    artifact: Artifact | str | Path,
    *,
    target: str,
    out: str | Path,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool = True,
    **options: Any,
) -> Path:
    """Write an artifact for another runtime, load it back in a fresh process and compare; the folder written.

    ``options`` are those that the target has in a recipe: scheme of ``fp8``, chip of ``ane``. Without a ``dtype`` it is
    the target's own, as in a recipe.

    Raises QcError where the target cannot take the graph, and VerificationFailed where the export computes otherwise.
    """
    from qc.exporting import export_artifact
    from recipes.settings import Export

    folder = artifact.folder if isinstance(artifact, Artifact) else find_artifact(str(artifact))
    wanted = Export(target=target, dtype=dtype, max_shard_size=max_shard_size, **options)  # type: ignore[arg-type]
    export_artifact(folder, wanted, Path(out), _silent, verify)
    return Path(out)


def run(
    recipe: str | Path, *, set: Overrides = (), runs: str | Path = DEFAULT, tell: Callable[[str], None] = _silent
) -> list[dict[str, Any]]:
    """Do all of a recipe; the figures of every step."""
    from qc.running import run_recipe
    from recipes.load import load as load_recipe

    read = load_recipe(recipe, set)
    opened = open_run(read, set, Path(runs))
    run_recipe(opened, read, tell)
    return opened.measured()


def generate(
    artifact: Artifact | str | Path,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """What the model goes on with after ``prompt``."""
    from qc.speaking import open_speaker
    from runtimes.sampling import Sampling

    given = str(artifact.folder if isinstance(artifact, Artifact) else artifact)
    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
    )
    return str(open_speaker(given, DEFAULT, None, sampling, chat).say(prompt, stream=False)["text"])


def evaluate(
    artifact: Artifact | str | Path, *, data: str | None = None, reference: str | None = None, batches: int = 16
) -> dict[str, float]:
    """Perplexity on held-out text; KL divergence and top-1 agreement with ``reference`` (the model it was made of)."""
    from qc.evaluating import evaluate_artifact

    folder = artifact.folder if isinstance(artifact, Artifact) else find_artifact(str(artifact))
    return evaluate_artifact(folder, reference, data, batches, 8, 128, DEFAULT)


def _run_of(artifact: Artifact) -> Run:
    for folder in artifact.folder.resolve().parents:
        if (folder / "run.json").is_file():
            return Run(folder)
    raise QcError(f"{artifact.folder} lies in no run", fix="compile the recipe with qc.compile, which makes one")
