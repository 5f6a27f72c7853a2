"""Whether the packages beside this one are qc's own: another distribution may have a ``graph`` too."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

OWN = ("graph", "passes", "runtimes", "recipes")
HOME = Path(__file__).resolve().parent.parent


def expect_own_packages() -> None:
    """Raise ImportError, worded for the user, if importing one of qc's packages would find another's. Imports none."""
    for name in OWN:
        found = _found(name)
        if found != HOME / name:
            what = f"package {name!r} is {found or 'missing'}, not qc's own"
            raise ImportError(f"{what}\n  fix    give qc an environment of its own")


def _found(name: str) -> Path | None:
    """The folder of a package; of a module or a folder that is no package, what was found instead."""
    spec = find_spec(name)
    if spec is None:
        return None
    if spec.origin is None:  # a folder without __init__.py; ours all have one
        return Path(*spec.submodule_search_locations or (), "(no __init__.py)")
    file = Path(spec.origin).resolve()
    return file.parent if file.name == "__init__.py" else file
