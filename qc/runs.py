"""Where runs lie: ``runs/<recipe>/<key>/``. The key is a hash of all that goes in, so the same work is the same folder.

compiled/            the artifact after the passes
train/               checkpoints, metrics and plot of the training
trained/             the artifact after the training
export-<target>/     what was exported
measured.json        every figure measured, by step
gates.json           every gate: what it asked, whether it held, how its series began and ended
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graph.errors import QcError
from graph.hashes import blake3_of

if TYPE_CHECKING:
    from recipes.schema import Recipe, Stage

DEFAULT = Path("runs")


@dataclass(frozen=True)
class Run:
    """One folder of one recipe with one content."""

    folder: Path

    def stage(self, name: str) -> Path:
        """The folder of a stage; a recipe without stages has one, the run's own."""
        return self.folder if name == "main" else self.folder / name

    @property
    def about(self) -> dict[str, Any]:
        """What it was started from: recipe, overrides, digest."""
        path = self.folder / "run.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            raise QcError(
                f"{self.folder} is not a run of qc", fix="run qc compile RECIPE first, or give the folder of a run"
            ) from None
        return found

    def recipe(self) -> Recipe:
        """Its recipe, read again; if that has changed since, it is an error."""
        from recipes.load import load

        about = self.about
        recipe = load(about["recipe"], about["set"])
        if recipe.digest() != about["digest"]:
            raise QcError(
                f"{about['recipe']} has changed since {self.folder} was compiled",
                fix=f"run qc compile {about['recipe']} again",
            )
        return recipe

    def measured(self) -> list[dict[str, Any]]:
        """The figures measured so far, one entry a step."""
        path = self.folder / "measured.json"
        return list(json.loads(path.read_text())) if path.is_file() else []

    def measure(self, step: str, **figures: Any) -> None:
        """Add figures to a step's entry."""
        entries = self.measured()
        entry = next((e for e in entries if e["step"] == step), None)
        if entry is None:
            entries.append(entry := {"step": step})
        entry.update(figures)
        write_text(self.folder / "measured.json", json.dumps(entries, indent=1) + "\n")


def open_run(recipe: Recipe, overrides: Mapping[str, object] | Sequence[str], root: Path = DEFAULT) -> Run:
    """The run folder of a recipe, made if it is new, and from now on the latest."""
    from qc.models import source_of

    content = [recipe.digest(), source_of(recipe), code_digest(), *texts(recipe, recipe.plan())]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    run = Run(root / recipe.name / key[:12])
    about = {
        "recipe": str(recipe.file), "digest": recipe.digest(), "key": key,
        "set": list(overrides) if not isinstance(overrides, Mapping) else _as_text(overrides),
    }  # fmt: skip
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_text(run.folder / "run.json", json.dumps(about, indent=1) + "\n")
        write_text(run.folder / "recipe.yaml", recipe.file.read_text())
        write_text(root / "latest", f"{run.folder.relative_to(root)}\n")
    except OSError as error:
        from graph.artifact import disk_error

        raise disk_error(error, run.folder) from None
    return run


def _as_text(overrides: Mapping[str, object]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def latest(root: Path = DEFAULT) -> Run:
    """The run that was compiled last."""
    path = root / "latest"
    if not path.is_file():
        raise QcError(f"there is no run in {root}/", fix="run qc compile RECIPE first")
    return Run(root / path.read_text().strip())


def find_run(given: str | None, root: Path = DEFAULT) -> Run:
    """The run of a folder, or the latest."""
    if given is None:
        return latest(root)
    folder = Path(given)
    if not (folder / "run.json").is_file():
        fix = f"give a folder under {root}/, or leave it out for the latest run"
        if (folder / "config.json").is_file():  # a model, or an export
            fix = f"compile it first: qc compile fp16 --set model={given}"
        raise QcError(f"{given} is not a run of qc", fix=fix)
    return Run(folder)


def run_around(path: Path) -> Run | None:
    """The run that something lies in."""
    folder = next((p for p in path.resolve().parents if (p / "run.json").is_file()), None)
    return None if folder is None else Run(folder)


def newest_artifact(run: Run) -> Path:
    """The last artifact that the run has written."""
    recipe = run.recipe()
    for stage in reversed(recipe.plan()):
        for name in ("trained", "compiled"):
            folder = run.stage(stage.name) / name
            if (folder / "manifest.json").is_file():
                return folder
    raise QcError(f"{run.folder} has no artifact yet", fix=f"run qc compile {run.about['recipe']}")


def find_artifact(given: str | None, root: Path = DEFAULT) -> Path:
    """An artifact's folder: given itself, the newest of a given run, or the newest of the latest run."""
    if given is not None and (Path(given) / "manifest.json").is_file():
        return Path(given)
    if given is not None and not (Path(given) / "run.json").is_file():
        raise QcError(
            f"{given} is neither an artifact nor a run", fix="give a folder that qc compile, qc train or qc run wrote"
        )
    return newest_artifact(find_run(given, root))


# -- content --------------------------------------------------------------------------------------------------------


def identity(model: str) -> str:
    """A hash of all files of a model that matter. File hashes are remembered by path, size and time."""
    from graph.checkpoint import locate

    folder = locate(model)
    wanted = sorted(
        p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt") and p.is_file()
    )
    remembered = _Remembered()
    lines = [f"{p.name} {remembered.blake3(p)}" for p in wanted]
    remembered.keep()
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def texts(recipe: Recipe, stages: Sequence[Stage]) -> Iterator[str]:
    """What the passes of these stages read besides the model: a hash of each text, as its files are now."""
    for step in (step.step for stage in stages for step in stage.passes):
        for option in fields(step):
            if option.metadata.get("data"):
                from runtimes.data.corpus import Corpus

                yield Corpus(getattr(step, option.name), recipe.file.parent).digest()


class _Remembered:
    """File hashes kept between calls."""

    def __init__(self) -> None:
        home = Path(
            os.environ.get("QC_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qc"
        )
        self.path = home / "hashes.json"
        try:
            self.known: dict[str, str] = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.known = {}
        self.before = len(self.known)

    def blake3(self, path: Path) -> str:
        status = path.stat()
        key = f"blake3 {path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
        if key not in self.known:
            try:
                self.known[key] = blake3_of(path)
            except OSError as error:
                raise QcError(
                    f"cannot read {path}: {error.strerror}", fix="check the permissions of the model folder"
                ) from None
        return self.known[key]

    def keep(self) -> None:
        if len(self.known) == self.before:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(self.known))
        except OSError:
            return  # a cache that cannot be kept costs time, nothing else


def code_digest() -> str:
    """A hash of the sources that decide what a compile gives: another qc is another compile."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in ("graph", "passes"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def write_text(path: Path, content: str) -> None:
    """Write a small file so that it is never half there."""
    new = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    new.write_text(content)
    os.replace(new, path)


def link_tree(source: Path, target: Path) -> None:
    """The same files again under another folder, without their bytes where the disk can share them."""
    from graph.artifact import appearing

    with appearing(target) as new:
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            copy = new / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, copy)
            except OSError:
                shutil.copyfile(path, copy)
