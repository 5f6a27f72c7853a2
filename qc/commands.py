"""What each command does: find the inputs, call the runtimes, say the result."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graph.errors import QcError, QcErrors, raise_all
from qc.console import explained, result, size, table, tell
from qc.runs import find_artifact, find_run, open_run


def compile_command(source: str, overrides: list[str], runs: Path, check: bool, processes: int, as_json: bool) -> None:
    """``qc compile``."""
    with explained(as_json):
        from recipes.load import load

        recipe = load(source, overrides)
        from qc.compiling import compile_stage

        run = open_run(recipe, overrides, runs)
        folder = compile_stage(run, recipe, recipe.plan()[0], None, check=check, tell=tell, processes=processes)
        tell(f"run: {run.folder}")
        result({"run": str(run.folder), "artifact": str(folder)}, as_json, lambda: str(folder))


def train_command(given: str | None, runs: Path, as_json: bool) -> None:
    """``qc train``."""
    with explained(as_json):
        from qc.training import train_stage

        run = find_run(given, runs)
        recipe = run.recipe()
        stage = next(
            (s for s in reversed(recipe.plan()) if (run.stage(s.name) / "compiled").is_dir()), recipe.plan()[0]
        )
        folder = train_stage(run, recipe, stage, tell=tell)
        result({"run": str(run.folder), "artifact": str(folder)}, as_json, lambda: str(folder))


def export_command(
    given: str | None,
    target: str,
    dtype: str | None,
    out: Path | None,
    verify: bool,
    force: bool,
    runs: Path,
    as_json: bool,
    options: Mapping[str, Any],
) -> None:
    """``qc export``."""
    with explained(as_json):
        from qc.exporting import export_newest

        found = export_newest(given, target, dtype, out, verify, force, runs, tell, options)
        result(found, as_json, lambda: str(found["folder"]))


def run_command(source: str, overrides: list[str], runs: Path, processes: int, as_json: bool) -> None:
    """``qc run``."""
    with explained(as_json):
        from recipes.load import load

        recipe = load(source, overrides)
        from qc.running import run_recipe, summary

        run = open_run(recipe, overrides, runs)
        try:
            run_recipe(run, recipe, tell, processes)
        except QcError:
            if run.measured():
                tell(summary(run))  # on stderr: with --json, stdout is for the error alone
            raise
        result({"run": str(run.folder), "steps": run.measured()}, as_json, lambda: summary(run))


def check_command(source: str, overrides: list[str], server: str | None, as_json: bool) -> None:
    """``qc check``."""
    with explained(as_json):
        recipe, graph = _checked(source, overrides, as_json, server)
        counts = {"sites": len(graph.sites()), "tensors": len(graph.tensors()), "blocks": graph.blocks}
        stored = size(stored_bytes(graph))
        text = f"{recipe.file.name} is fine: {counts['sites']} ops, {counts['blocks']} blocks, {stored} when compiled"
        chosen = [s.name for stage in recipe.plan() for s in stage.passes if getattr(s.step, "keep", None) is not None]
        later = f"; which weights {' and '.join(chosen)} leaves as they are is decided in the compile" if chosen else ""
        found = {"ok": True, **counts, "bytes": stored_bytes(graph), **({"decided_later": chosen} if chosen else {})}
        result(found, as_json, lambda: text + later)


def _checked(source: str, overrides: list[str], each: bool, server: str | None = None) -> tuple[Any, Any]:
    """A recipe and the graph that it would give. Raises all its mistakes, those of the text and those of shapes.

    Unless ``each`` is asked for, a mistake that many sites share is told once.
    """
    from recipes.load import draft

    recipe, errors = draft(source, overrides)
    graph = None
    if recipe is not None and (recipe.model is not None or not errors):
        from qc.compiling import plan

        try:
            graph, more = plan(recipe, server=server)
            errors += more
        except QcError as error:  # the model itself; what the passes would meet is not known
            errors += error.errors if isinstance(error, QcErrors) else [error]
    raise_all(sorted(errors if each else _alike(errors), key=_written))
    return recipe, graph


def _alike(errors: list[QcError]) -> list[QcError]:
    """Of errors that are the same but for the site, only the first, and how many there are."""
    groups: dict[tuple[str, str, str | None], list[QcError]] = {}
    for error in errors:
        what = error.what.replace(error.site, "") if error.site else error.what
        groups.setdefault((what, error.fix, error.line), []).append(error)
    for first, *others in groups.values():
        if others:
            first.what += f", and the same at {len(others)} more, the last of them {others[-1].site}"
    return [group[0] for group in groups.values()]


def _written(error: QcError) -> tuple[bool, int, int]:
    """Where in the recipe an error is: what is on the command line, or about no line, comes last."""
    line, _, column = (error.line or "").rpartition(":")
    number = line.rpartition(":")[2]
    return (False, int(number), int(column)) if number.isdigit() and column.isdigit() else (True, 0, 0)


def stored_bytes(graph: Any) -> int:
    """The bytes of all tensors of a graph."""
    total = 0
    for name in graph.tensors():
        count = 1
        for length in graph.shape(name):
            count *= length
        total += count * graph.dtype_of(name).itemsize
    return total


def show_command(what: str, text: bool, stage: str | None, overrides: list[str], as_json: bool) -> None:
    """``qc show``."""
    with explained(as_json):
        from qc.showing import site_rows

        graph = graph_of(what, overrides, stage)
        rows = site_rows(graph)
        head = ["site", "role", "shape", "format", "bytes"]
        cells = [[r["site"], r["role"], r["shape"], r["format"], size(r["bytes"])] for r in rows]
        total = f"\n\n{len(graph.sites())} ops, {graph.blocks} blocks, {size(stored_bytes(graph))} of tensors"
        result(
            {"sites": rows, "bytes": stored_bytes(graph), "graph": str(graph)},
            as_json,
            lambda: str(graph) if text else table(cells, head) + total,
        )


def graph_of(what: str, overrides: list[str] | None = None, stage: str | None = None) -> Any:
    """The graph of an artifact or run, or the one that a recipe would give, after ``stage`` or all of it."""
    folder = Path(what)
    if (folder / "manifest.json").is_file() or (folder / "run.json").is_file():
        from graph.artifact import load

        if stage or overrides:
            raise QcError(f"{what} is compiled already", fix="--stage and --set go with a recipe")
        return load(find_artifact(what), check_hashes=False).graph
    if folder.is_dir():
        raise QcError(
            f"{what} is neither an artifact nor a run nor a recipe",
            fix="give a folder that qc compile wrote, or a recipe",
        )
    from qc.compiling import plan
    from recipes.load import load as load_recipe

    graph, errors = plan(load_recipe(what, overrides or []), stage)
    raise_all(errors)
    return graph


def diff_command(a: str, b: str, as_json: bool) -> None:
    """``qc diff``."""
    with explained(as_json):
        from qc.showing import difference

        found = difference(graph_of(a), graph_of(b), (a, b))
        result(
            found,
            as_json,
            lambda: (
                found["text"] + ("\n\n" if found["text"] and found["tensors"] else "") + "\n".join(found["tensors"])
                or "no difference"
            ),
        )


def generate_command(
    prompt: str | None,
    interactive: bool,
    given: str | None,
    settings: dict[str, Any],
    chat: bool,
    mode: str | None,
    runs: Path,
    as_json: bool,
    context: Sequence[Path] = (),
) -> None:
    """``qc generate``."""
    with explained(as_json):
        if prompt is None and not interactive:
            raise QcError("there is no prompt", fix='give --prompt "def main(" or --interactive')
        from qc.speaking import open_speaker
        from runtimes.sampling import Sampling

        speaker = open_speaker(given, runs, mode, Sampling(**settings), chat, context)
        if prompt is not None:
            if not as_json:
                sys.stdout.write(prompt)
            found = speaker.say(prompt, stream=not as_json)
            result(found, as_json, lambda: "")
            if not as_json:
                tell(f"{found['tokens']} tokens, {found['tokens_per_second']} tokens/s")
        while interactive and (line := _ask()):
            speaker.say(line, stream=True)
            sys.stdout.write("\n")


def _ask() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


def evaluate_command(
    given: str | None,
    reference: str | None,
    data: str | None,
    batches: int,
    batch: int,
    length: int,
    runs: Path,
    as_json: bool,
) -> None:
    """``qc eval``."""
    with explained(as_json):
        from qc.evaluating import evaluate_artifact

        found = evaluate_artifact(find_artifact(given, runs), reference, data, batches, batch, length, runs)
        rows = [[k, f"{v:.4f}" if v % 1 else f"{v:.0f}"] for k, v in found.items()]
        result(found, as_json, lambda: table(rows, ["metric", "value"]))


def verify_command(exported: Path, artifact: str | None, runs: Path, as_json: bool) -> None:
    """``qc verify``."""
    with explained(as_json):
        from qc.exporting import verify_export

        found = verify_export(exported, artifact, runs)
        result(found, as_json, lambda: str(found["text"]))


def lint_command(exported: Path, chip: str | None, run: bool, as_json: bool) -> None:
    """``qc lint``."""
    with explained(as_json):
        from runtimes.lint.report import lint

        report = lint(exported, chip, run)
        head = ["rule", "severity", "op", "found", "source", "what to do"]
        rows = report.rows()
        result(
            report.as_dict(),
            as_json,
            lambda: (table(rows, head) + "\n\n" if rows else "") + report.summary(),
        )
        if not report.passed:
            raise SystemExit(1)


def cache_teacher_command(source: str, overrides: list[str], force: bool, runs: Path, as_json: bool) -> None:
    """``qc cache teacher``."""
    with explained(as_json):
        from recipes.load import load

        recipe = load(source, overrides)
        from qc.caching import make_cache, said

        made = make_cache(recipe, runs, force=force, tell=tell)
        result(said(made), as_json, lambda: str(made.folder))
