"""The files a recipe names: made absolute, each from the folder of the file that names it, and looked up."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from recipes import files
from recipes.document import Node
from recipes.mistakes import Mistakes, nearest
from recipes.shorthand import data_nodes, workers

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
SHIPPED_MODEL = "seedling"
MODEL_FILES = ("config.json", "manifest.json")
"""A model folder has one of these: the first is Hugging Face's, the second an artifact's."""


def resolve(root: Node, mistakes: Mistakes) -> None:
    """Replace every relative path in the tree by an absolute one; tell those that lead nowhere."""
    models = [root.map["model"]] if "model" in root.map else []
    if "models" in root.map:
        models += [one.map["model"] for one in root.map["models"].map.values() if "model" in one.map]
    for node in models:
        _model(node, mistakes)
    for named, data in data_nodes(root):
        resolve_data(data, named, mistakes)
    for work in workers(root):
        train = work.map.get("train")
        if train is not None and "objective" in train.map and "cache" in train.map["objective"].map:
            _cache(train.map["objective"].map["cache"], mistakes)


def resolve_data(data: Node, named: str, mistakes: Mistakes) -> None:
    """The same for one source of data."""
    for key in ("text", "jsonl"):
        if key in data.map and (key == "jsonl" or not {"jsonl", "hf"} & set(data.map)):
            for node in data.map[key].list or [data.map[key]]:
                _glob(node, f"{named}.{key}", mistakes)
    if "wikitext" in data.map:
        _folder(data.map["wikitext"], f"{named}.wikitext", mistakes)
    if "hf" in data.map:
        _dataset(data.map["hf"], f"{named}.hf", mistakes)


def resolve_option(node: Node, named: str, mistakes: Mistakes) -> None:
    """The same for an option of a pass, a field with ``metadata={"path": True}``."""
    text = node.value
    if isinstance(text, str) and text:
        path = _absolute(text, node)
        node.value = str(path)
        if not path.exists():
            mistakes.add(node.place, f"{named}: there is no {text!r}", _near(text, path, node, hub=False))


def _model(node: Node, mistakes: Mistakes) -> None:
    text = node.value
    if not isinstance(text, str) or not text or text == SHIPPED_MODEL:
        return
    if text.startswith("hf:"):
        if not HUB_NAME.fullmatch(text[3:]):
            mistakes.add(node.place, f"{text!r} names no model of the Hugging Face hub", "write hf:org/name")
        return
    path = _absolute(text, node)
    node.value = str(path)
    if path.is_dir():
        if not any((path / name).exists() for name in MODEL_FILES):
            fix = f"a model folder holds {' or '.join(MODEL_FILES)}"
            mistakes.add(node.place, f"the folder {text!r} is no model", fix)
    elif path.exists():
        mistakes.add(node.place, f"the model {text!r} is a file", "name the folder that holds config.json")
    else:
        mistakes.add(node.place, f"there is no model folder {text!r}", _near(text, path, node, hub=True))


def _glob(node: Node, named: str, mistakes: Mistakes) -> None:
    text = node.value
    if not isinstance(text, str) or not text:
        return
    home = os.path.expanduser(text)
    full = home if os.path.isabs(home) else os.path.join(glob.escape(os.path.abspath(node.place.folder)), home)
    node.value = os.path.normpath(full)
    if not any(os.path.isfile(found) for found in glob.iglob(full, recursive=True)):
        if os.path.isdir(full):
            mistakes.add(node.place, f"{named}: {text!r} is a folder", f"name its files: {text.rstrip('/')}/**/*.txt")
            return
        fix = (
            "name files, such as corpus/**/*.txt" if glob.has_magic(text) else _near(text, Path(full), node, hub=False)
        )
        mistakes.add(node.place, f"{named}: no file fits {text!r}", fix)


def _dataset(node: Node, named: str, mistakes: Mistakes) -> None:
    text = node.value
    if not isinstance(text, str) or not text:
        return
    path = _absolute(text, node)
    if path.is_dir():
        node.value = str(path)
    elif text[0] in "./~" or not HUB_NAME.fullmatch(text):
        node.value = str(path)
        mistakes.add(node.place, f"{named}: there is no folder {text!r}", _near(text, path, node, hub=False))


def _folder(node: Node, named: str, mistakes: Mistakes) -> None:
    text = node.value
    if not isinstance(text, str) or not text:
        return
    path = _absolute(text, node)
    node.value = str(path)
    if not path.is_dir():
        what = f"{named}: {text!r} is a file" if path.exists() else f"{named}: there is no folder {text!r}"
        fix = "name the folder that it is in" if path.exists() else _near(text, path, node, hub=False)
        mistakes.add(node.place, what, fix)


def _cache(node: Node, mistakes: Mistakes) -> None:
    """A folder that ``qc cache teacher`` wrote, or the recipe of one, which may be a shipped one."""
    text = node.value
    if not isinstance(text, str) or not text:
        return
    path, _ = files.find(text, node.place.folder)
    path = Path(os.path.abspath(path))
    node.value = str(path)
    if not path.exists():
        near = _near(text, path, node, hub=False)
        fix = f"{near} Or run" if near.endswith("?") else f"{near}, or run"
        what = f"train.objective.kd-cache.cache: there is no {text!r}"
        mistakes.add(node.place, what, f"{fix} qc cache teacher first")
    elif path.is_dir() and not (path / "meta.json").is_file():
        what = f"train.objective.kd-cache.cache: the folder {text!r} is no cache"
        mistakes.add(node.place, what, "name a folder that qc cache teacher wrote, or the recipe that makes it")


def _absolute(text: str, node: Node) -> Path:
    return Path(os.path.abspath(node.place.folder / os.path.expanduser(text)))


def _near(text: str, path: Path, node: Node, *, hub: bool) -> str:
    """The name beside ``path`` that was most likely meant, as the user would write it."""
    try:
        beside = os.listdir(path.parent)
    except (OSError, ValueError):
        beside = []
        existing = next((one for one in path.parents if one.is_dir()), path)
        missing = f"{existing.name}/ is there, {path.relative_to(existing).parts[0]!r} in it is not"
    near = nearest(path.name, beside)
    if near:
        return f"did you mean {os.path.join(os.path.dirname(text), near)!r}?"
    if hub and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        return f"write hf:{text} for a model of the Hugging Face hub, or the path of a folder"
    fix = f"write a path relative to the {'recipe' if node.place.line else 'current folder'}"
    return fix if beside else f"{fix}; {missing}"
