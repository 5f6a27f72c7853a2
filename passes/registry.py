"""Which passes there are: the files beside this one, and what other distributions add through entry points."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from graph.errors import QcError

if TYPE_CHECKING:
    from passes.base import Pass

GROUP = "qc.passes"
"""The entry-point group of third-party passes: ``my-pass = "my_package.my_pass:MyPass"``."""


def shipped() -> list[str]:
    """The passes that come with qc: the files of this folder that hold the class of their name; none is imported."""
    files = Path(__file__).parent.glob("[!_]*.py")
    return sorted(
        file.stem.replace("_", "-") for file in files if f"\nclass {_title(file.stem)}(" in file.read_text("utf-8")
    )


def names() -> list[str]:
    """All names a recipe may use, those of other distributions included."""
    return sorted({*shipped(), *(point.name for point in _plugins())})


def find(name: str) -> type[Pass]:
    """``quantize-base`` -> ``passes.quantize_base.QuantizeBase``. Only the module of that pass is imported."""
    ours = name in shipped()
    theirs = _distinct(point for point in _plugins() if point.name == name)
    if ours + len(theirs) > 1:
        owners = [*(["qc itself"] if ours else []), *map(_owner, theirs)]
        raise QcError(f"pass {name!r} comes from {' and from '.join(owners)}", fix="uninstall all but one of them")
    if theirs:
        return _load(theirs[0])
    if not ours:
        raise QcError(f"no pass is called {name!r}", fix=_nearest(name))
    module = importlib.import_module(f"passes.{name.replace('-', '_')}")
    found: type[Pass] = getattr(module, _title(name))
    return found


def _title(name: str) -> str:
    """``quantize-base`` or ``quantize_base`` -> ``QuantizeBase``."""
    return name.replace("_", "-").title().replace("-", "")


def _plugins() -> Iterable[EntryPoint]:
    return entry_points(group=GROUP)


def _distinct(points: Iterable[EntryPoint]) -> list[EntryPoint]:
    """Without the second listing of a distribution that is found twice on the path."""
    return list({(_owner(point), point.value): point for point in points}.values())


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


def _load(point: EntryPoint) -> type[Pass]:
    from passes.base import Pass

    try:
        found = point.load()
    except (ImportError, AttributeError, SyntaxError) as error:
        raise QcError(
            f"pass {point.name!r} of {_owner(point)} cannot be imported: {error}",
            fix=f"reinstall or update {_owner(point)}",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise QcError(
            f"{point.value} of {_owner(point)} is not a pass",
            fix=f"{point.name!r} in the entry points {GROUP} must name a subclass of Pass",
        )
    return found


def _nearest(name: str) -> str:
    known = names()
    near = get_close_matches(name.lower().replace("_", "-"), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"use one of: {', '.join(known)}"
