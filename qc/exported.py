"""Exports that are there already: what they were made of, and whether they are what is asked for now.

``qc-export.json`` keeps both under ``asked``. An artifact is known there by the content that decides about an export,
its graph, weights and tokenizer, so that a recipe that was only worded otherwise leads to the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graph.artifact import read_manifest
from graph.errors import QcError
from qc.runs import find_artifact, run_around
from recipes.settings import Export

_CONTENT = ("graph.json", "weights", "tokenizer/", "memory_tokenizer/")
"""How the names of the files begin that decide about an export."""


def asked(manifest: Mapping[str, Any], wanted: Export) -> dict[str, Any]:
    """What an export keeps of how it came about: the artifact by its content, and what was asked for."""
    return {"artifact": content_of(manifest), **_options(wanted)}


def content_of(manifest: Mapping[str, Any]) -> str:
    """What an artifact holds, whatever its recipe is worded like."""
    files = {name: entry for name, entry in manifest["files"].items() if name.startswith(_CONTENT)}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _options(wanted: Export) -> dict[str, Any]:
    said = {"target": wanted.target, "dtype": wanted.numbers, "max_shard_size": wanted.max_shard_size}
    options: dict[str, Any] = json.loads(json.dumps(wanted.options()))  # as they come back from a file
    return {**said, **options}


def expect_same(folder: Path, about: Mapping[str, Any], manifest: Mapping[str, Any], wanted: Export) -> None:
    """See that the export in ``folder``, which says ``about`` of itself, is what is asked for now."""
    fix = "give another folder with --out, or --force to replace it"
    now = _options(wanted)
    was = about.get("asked") or {**now, "target": about["target"], "dtype": about.get("dtype", now["dtype"])}
    for key in {**now, **was}:
        if key != "artifact" and was.get(key) != now.get(key):
            then, means = (f"with {key} {one[key]}" if key in one else f"without {key}" for one in (was, now))
            raise QcError(f"{folder} was exported {then}, and now {means} is asked for", fix=fix)
    content = content_of(manifest)
    if was.get("artifact", content) != content:
        raise QcError(f"{folder} is an export of another artifact", fix=fix)


def artifact_of(exported: Path, about: Mapping[str, Any], runs: Path) -> Path:
    """The artifact that an export was made of: in the run that it lies in, or else in any.

    One that does not say is taken to be of the newest artifact of the run that it lies in, or of the latest run.
    """
    near = run_around(exported)
    wanted = (about.get("asked") or {}).get("artifact")
    if wanted is None:
        return find_artifact(None if near is None else str(near.folder), runs)
    for artifact, manifest in _artifacts([near.folder] if near else [], runs):
        if content_of(manifest) == wanted:
            return artifact
    what = f"{exported} was made of an artifact that is not in {runs}/"
    raise QcError(what, fix="give its folder with --artifact, or the folder of all runs with --runs")


def _artifacts(first: list[Path], runs: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The artifacts of the runs in ``first``, then of all runs, each with its manifest; one that is damaged is none."""
    for run in (*first, *sorted(runs.glob("*/*"))):
        for name in ("trained", "compiled", "*/trained", "*/compiled"):
            for path in sorted(run.glob(f"{name}/manifest.json")):
                try:
                    yield path.parent, read_manifest(path.parent)
                except QcError:
                    continue
