"""What the commands do that look at an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qc.console import explained, result
from qc.runs import find_artifact


def assess_command(given: str | None, data: str | None, options: dict[str, Any], runs: Path, as_json: bool) -> None:
    """``qc assess``."""
    with explained(as_json):
        from qc.assessing import asked, assess_artifact
        from qc.evaluating import source_of

        source = None if data is None else source_of(data)
        found = assess_artifact(find_artifact(given, runs), source, asked(options), runs)
        result(found, as_json, lambda: f"{found['text']}\n\n{found['said']}")


def quality_command(
    given: str | None, data: str | None, batches: int, batch: int, length: int, runs: Path, as_json: bool
) -> None:
    """``qc quality``."""
    with explained(as_json):
        from qc.evaluating import source_of
        from qc.judging import judge_artifact

        source = None if data is None else source_of(data)
        found = judge_artifact(find_artifact(given, runs), source, batches, batch, length, runs)
        result(found, as_json, lambda: str(found["text"]))
