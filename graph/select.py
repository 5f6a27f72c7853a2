"""Selectors: which sites or tensors an option is about, by role, block, stack or glob, never by substring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

from graph.errors import QcError

ROLES = (
    "attn.q", "attn.k", "attn.v", "attn.o", "attn.qkv", "attn.kv", "attn.core", "attn.mask", "attn.rope",
    "mlp.gate", "mlp.up", "mlp.gate_up", "mlp.down", "mlp.act",
    "norm", "embed", "head", "block_out", "gca.*", "lora.*", "other",
)  # fmt: skip
"""The roles a site can have; ``gca.*`` and ``lora.*`` stand for the parts those passes insert."""


class Selectable(Protocol):
    """What a selector reads of a site or tensor."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def block(self) -> int | None: ...
    @property
    def stack(self) -> int | None: ...
    @property
    def trainable(self) -> bool: ...


T = TypeVar("T")
Item = TypeVar("Item", bound=Selectable)


@dataclass(frozen=True, kw_only=True)
class Selector:
    """All conditions must hold; one left out holds for everything; several values of one are alternatives."""

    role: str | tuple[str, ...] | None = None
    """Roles, globs allowed: ``attn.*``, ``mlp.down``, ``norm``, ``embed``, ``head``."""

    block: int | str | tuple[int | str, ...] | None = None
    """Block numbers or ranges with both ends: ``3``, ``0-5``, ``-1`` (the last block)."""

    stack: int | tuple[int, ...] | None = None
    """Stack numbers."""

    trainable: bool | None = None
    """Only what is (or is not) trained."""

    name: str | tuple[str, ...] | None = None
    """Globs over site or tensor names; a ``*`` also crosses dots."""

    exclude: str | tuple[str, ...] | None = None
    """Globs over roles and names that are left out again."""

    allow_empty: bool = False
    """Let the selection be empty; without it, an empty selection is an error."""

    def accepts(self, item: Selectable, blocks: int) -> bool:
        """Whether ``item`` is selected in a model of ``blocks`` blocks."""
        return (
            _fits(self.role, item.role)
            and _fits(self.name, item.name)
            and (self.block is None or item.block in _numbers(self.block, blocks))
            and (self.stack is None or item.stack in _many(self.stack))
            and (self.trainable is None or item.trainable == self.trainable)
            and not (self.exclude is not None and (_fits(self.exclude, item.role) or _fits(self.exclude, item.name)))
        )

    def pick(self, items: Iterable[Item], blocks: int, what: str = "site") -> list[Item]:
        """The selected ``items``; none at all is an error that lists the nearest names."""
        offered = list(items)
        picked = [item for item in offered if self.accepts(item, blocks)]
        if not picked and not self.allow_empty:
            raise QcError(f"select {self} matches no {what}", fix=self._nearest(offered, blocks))
        return picked

    def _nearest(self, offered: Sequence[Selectable], blocks: int) -> str:
        if not offered:
            return "the graph has none at this point; take the pass out or move it"
        if self.role is not None and not any(_fits(self.role, item.role) for item in offered):
            roles = sorted({item.role for item in offered})
            near = [m for r in _many(self.role) for m in get_close_matches(str(r), roles, n=1)]
            return f"did you mean role {near[0]!r}?" if near else f"the roles here are {', '.join(roles)}"
        if self.name is not None and not any(_fits(self.name, item.name) for item in offered):
            names = [item.name for item in offered]
            near = get_close_matches(str(_many(self.name)[0]).replace("*", ""), names, n=3, cutoff=0.3) or names[:3]
            return f"the nearest names are {', '.join(near)}"
        if self.block is not None and not any(item.block in _numbers(self.block, blocks) for item in offered):
            return f"the blocks are 0 to {blocks - 1}" if blocks else "the model has no blocks"
        return "each condition matches something, but no item matches all; take one away"

    def __str__(self) -> str:
        fields = {k: getattr(self, k) for k in ("role", "block", "stack", "trainable", "name", "exclude")}
        said = ", ".join(f"{k}: {_yaml(v)}" for k, v in fields.items() if v is not None)
        return f"{{{said}}}"


def _many(value: T | tuple[T, ...]) -> tuple[T, ...]:
    return value if isinstance(value, tuple) else (value,)


def _fits(globs: str | tuple[str, ...] | None, text: str) -> bool:
    return globs is None or any(fnmatchcase(text, glob) for glob in _many(globs))


def _numbers(block: int | str | tuple[int | str, ...], blocks: int) -> set[int]:
    found: set[int] = set()
    for one in _many(block):
        low, _, high = str(one).partition("-") if not str(one).startswith("-") else (str(one), "", "")
        if not (low.lstrip("-").isdigit() and (not high or high.isdigit())):
            raise QcError(f"block {one!r} is neither a number nor a range", fix="write 3, -1 or 0-5")
        first = int(low) + blocks if low.startswith("-") else int(low)
        found |= set(range(first, (int(high) if high else first) + 1))
    return found


def _yaml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
