"""Recipes are tested with passes of a pretended distribution, so that the shipped ones can change freely."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from passes import registry

POINTS = [
    EntryPoint(name=name, value=f"tests.recipes.plugin:{name.title()}", group=registry.GROUP)
    for name in ("squeeze", "adapt", "seal")
]


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """No passes but those of the pretended distribution."""
    monkeypatch.setattr(registry, "_plugins", lambda: POINTS)
    monkeypatch.setattr(registry, "shipped", list)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins: None) -> Path:
    """The current folder: a model, a corpus and a teacher's cache."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "meta.json").write_text("{}")
    (tmp_path / "qwen3-tiny").mkdir()
    (tmp_path / "qwen3-tiny" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("text")
    (tmp_path / "corpus" / "b.jsonl").write_text('{"text": "text"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path
