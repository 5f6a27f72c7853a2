"""Writing artifacts for other runtimes, and checking what was written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from graph.artifact import Artifact, load
from graph.errors import QcError
from qc.compiling import compile_stage, stage_name, step_name
from qc.console import VerificationFailed, size
from qc.exported import artifact_of, asked, expect_same
from qc.measuring import folder_bytes
from qc.reading import text_reader
from qc.runs import Run, find_artifact, find_run, run_around
from recipes.schema import Recipe, Stage
from recipes.settings import Export
from runtimes.export import homes_of, options_of

Tell = Callable[[str], None]

Text = Callable[[Any, int], Iterator[dict[str, Any]]]
"""Batches of so many tokens of a text, for a tokenizer."""

CALIBRATION = 1024
"""Tokens on which ranges of inputs are found, where nothing is said."""


def export_stage(
    run: Run, stage: Stage, wanted: Export, artifact: Path, tell: Tell, verify: bool = True
) -> dict[str, Any]:
    """Export an artifact, load that back in a fresh process, compare; what was exported before is checked again."""
    folder = Path(wanted.out) if wanted.out else run.stage(stage.name) / folder_name(wanted)
    found = export_artifact(artifact, wanted, folder, tell, verify, text=_text(run, stage))
    run.measure(step_name(stage, " ".join(["export", *wanted.words])), **found)
    return found


def _text(run: Run, stage: Stage) -> Text | None:
    """The text that the recipe trains or evaluates on, of this stage or of the last one before it that has any."""
    recipe, found = run.recipe(), None
    for one in recipe.plan():
        for part in (one.train, one.evaluate):
            found = part.data if part is not None and part.data is not None else found
        if one.name == stage.name:
            break
    if found is None:
        return None
    cache = run.folder.parent.parent / ".cache" / "tokens"
    return lambda tokenizer, tokens: text_reader(recipe, cache, lambda: tokenizer)(found, tokens, 128, 8)


def _text_of(artifact: Path) -> Text | None:
    """That of the run which an artifact lies in; without a run, or once its recipe has changed, there is none."""
    run = run_around(artifact)
    if run is None:
        return None
    try:
        stages = run.recipe().plan()
    except QcError:
        return None
    stage = next((one for one in stages if run.stage(one.name) == artifact.resolve().parent), None)
    return None if stage is None else _text(run, stage)


def _calibrated(wanted: Export, loaded: Artifact, text: Text | None) -> dict[str, Any]:
    """Rows of tokens of the recipe's own text, for a target whose inputs have ranges; it has others without them."""
    if text is None or not loaded.reads_text or "calibration" not in options_of(wanted.target):
        return {}
    from runtimes.export._serving import settings_of

    options = wanted.options()
    tokens = options.pop("calibration", CALIBRATION)
    if not settings_of(wanted.target, **options).reads_text:  # type: ignore[arg-type]
        return {}
    return {"rows": [batch["input_ids"] for batch in text(loaded.load_tokenizer(), tokens)]}


def _for_chunks(wanted: Export, loaded: Artifact) -> dict[str, Any]:
    """The tokenizer of an encoder that was joined to a decoder, for the target that writes the two apart."""
    own = wanted.target == "safetensors" and loaded.memory_tokenizer is not None
    return {"memory_tokenizer": loaded.memory_tokenizer} if own else {}


def folder_name(wanted: Export) -> str:
    """The folder of an export where none is given; two formats have two."""
    return "-".join(["export", *wanted.words])


def export_artifact(
    artifact: Path,
    wanted: Export,
    folder: Path,
    tell: Tell,
    verify: bool = True,
    force: bool = False,
    text: Text | None = None,
) -> dict[str, Any]:
    """Write an artifact for another runtime; what was exported before stays, unless ``force`` replaces it.

    ``text`` is what ranges of inputs are found on, where there is any of the recipe's own.
    """
    from runtimes.export import ABOUT, find
    from runtimes.verify.findings import read_about

    start = time.perf_counter()
    if force and folder.is_dir() and any(folder.iterdir()) and not (folder / ABOUT).is_file():
        raise QcError(f"{folder} is no export of qc, and --force replaces nothing else", fix="give another folder")
    loaded = load(artifact)
    if (folder / ABOUT).is_file() and not force:
        expect_same(folder, read_about(folder), loaded.manifest, wanted)
        tell(f"exported before: {folder}")
    else:
        about: dict[str, Any] = {"asked": asked(loaded.manifest, wanted)}
        if wanted.target == "ternary":
            about["reports"] = loaded.manifest["reports"]
        report = find(wanted.target)(
            loaded.graph,
            folder,
            dtype=wanted.numbers,
            max_shard=_bytes_of(wanted.max_shard_size),
            tokenizer=loaded.tokenizer,
            force=force,
            **_for_chunks(wanted, loaded),
            **_calibrated(wanted, loaded, text),
            **wanted.options(),
            about=about,
        )
        tell(f"wrote {report.folder}: {size(report.bytes)}")
    found: dict[str, Any] = {"folder": str(folder), "bytes": folder_bytes(folder)}
    if verify:
        found |= _verified(loaded, folder, tell)
    return found | {"seconds": time.perf_counter() - start}


def _bytes_of(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    return int(float(text[:-2]) * units[text[-2:]])


def _verified(loaded: Artifact, folder: Path, tell: Tell) -> dict[str, Any]:
    from runtimes.verify import verify

    report = verify(folder, loaded.graph, tokenizer=loaded.load_tokenizer() if loaded.reads_text else None)
    tell(report.table())
    if not report.passed:
        raise VerificationFailed(
            f"{folder} does not compute what {loaded.folder} computes",
            fix="see the table; remove the export and export again",
        )
    kept = ("export/psnr_db", "top1", "dequant_fidelity")
    return {key: value for key, value in report.figures().items() if key in kept}


def export_newest(
    given: str | None,
    target: str,
    dtype: str | None,
    out: Path | None,
    verify: bool,
    force: bool,
    runs: Path,
    tell: Tell,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``qc export``: of an artifact as it is, or of a run, whose remaining passes are run first.

    ``options`` are those of the target; they go before what the recipe says.
    """
    from runtimes.export import find

    find(target)
    _check(target, dtype, options or {})
    asked: dict[str, Any] = {
        key: _SAID.get(value, value) for key, value in (options or {}).items() if value is not None
    }
    if given is not None and (Path(given) / "manifest.json").is_file():
        wanted = Export(target=target, dtype=dtype, **asked)  # type: ignore[arg-type]
        folder = out or Path(given).parent / folder_name(wanted)
        return export_artifact(Path(given), wanted, folder, tell, verify, force, _text_of(Path(given)))
    run = find_run(given, runs)
    recipe = run.recipe()
    stage, artifact = finish_passes(run, recipe, tell)
    said = next((e for s in recipe.plan() for e in s.export if e.target == target and dtype in (None, e.numbers)), None)
    wanted = replace(said or Export(target=target, dtype=dtype), **asked)  # type: ignore[arg-type]
    folder = out or run.stage(stage.name) / folder_name(wanted)
    found = export_artifact(artifact, wanted, folder, tell, verify, force, _text(run, stage))
    run.measure(step_name(stage, " ".join(["export", *wanted.words])), **found)
    return found


_SAID: dict[Any, Any] = {"true": True, "false": False}
"""Values as the command line gives them -> as a recipe has them."""


def _check(target: str, dtype: str | None, options: Mapping[str, Any]) -> None:
    """Values that no recipe could hold."""
    if dtype is not None and dtype not in ("fp16", "bf16", "fp32"):
        raise QcError(f"{dtype!r} is no dtype to export", fix="use fp16, bf16 or fp32")
    given = [key for key, value in options.items() if value is not None]
    foreign = next((key for key in given if key not in options_of(target)), None)
    if foreign is not None:
        flag, homes = foreign.replace("_", "-"), homes_of(foreign)
        fix = f"take --{flag} out" + (f", or add --target {homes.split()[1]}" if homes.startswith("target ") else "")
        raise QcError(f"--{flag} belongs to the {homes}", fix=fix)
    for key, least in (("context", 1), ("prefill", 0), ("chunks", 1), ("calibration", 1)):
        value = options.get(key)
        if value is not None and value < least:
            raise QcError(f"--{key} is {value}", fix=f"give a number from {least}")
    for key in given:
        value, choices = _SAID.get(options[key], options[key]), _choices(key)
        if choices and not isinstance(value, bool) and value not in choices:
            what = f"--{key.replace('_', '-')} is {value}"
            raise QcError(what, fix=f"use one of {', '.join(map(str, choices))}")


def _choices(option: str) -> list[Any]:
    """The values that an option of a recipe's export is one of; nothing where it is a number or a text."""
    hint = get_type_hints(Export)[option]
    return [choice for part in get_args(hint) if get_origin(part) is Literal for choice in get_args(part)]


def finish_passes(run: Run, recipe: Recipe, tell: Tell) -> tuple[Stage, Path]:
    """Compile the stages that are left and need no training; the last stage and its artifact."""
    newest: Path | None = None
    done: dict[str, Path] = {}
    for stage in recipe.plan():
        folder = run.stage(stage.name)
        compiled = compile_stage(run, recipe, stage, newest if stage.start is None else done[stage.start], tell=tell)
        newest = folder / "trained" if stage.train is not None else compiled
        done[stage.name] = newest
        if not (newest / "manifest.json").is_file():
            raise QcError(f"{stage_name(stage) or recipe.name + ' '}is not trained yet", fix="run qc train first")
    assert newest is not None
    return stage, newest


def verify_export(exported: Path, artifact: str | None, runs: Path) -> dict[str, Any]:
    """``qc verify``: the artifact is the given one, or that which the export was made of."""
    from runtimes.verify import verify
    from runtimes.verify.findings import read_about

    if not exported.is_dir():
        raise QcError(f"there is no folder {exported}", fix="give the folder that qc export wrote")
    about = read_about(exported)
    made_of = artifact_of(exported, about, runs) if artifact is None else find_artifact(artifact, runs)
    loaded = load(made_of)
    report = verify(exported, loaded.graph, tokenizer=loaded.load_tokenizer() if loaded.reads_text else None)
    if not report.passed:
        raise VerificationFailed(
            f"{exported} does not compute what {loaded.folder} computes:\n{report.table()}", fix="export it again"
        )
    return {"ok": True, "text": report.table(), **report.figures()}
