"""What a chip and its system take: a file each under ``profiles/``, with the sources of its numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from graph.errors import QcError

FOLDER = Path(__file__).with_name("profiles")
DEFAULT = "m4-macos15"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The limits of one family of chips under one system."""

    name: str
    chips: tuple[str, ...]
    """The chips of the family, as they are sold."""

    system: str
    """The oldest system."""

    target: str
    """coremltools' name of the oldest system whose ops are used."""

    max_dim: int
    """The largest height, width or depth of a tensor (rule S2)."""

    max_channels: int
    """The largest number of channels (rule S2)."""

    max_rank: int
    """The most axes of a tensor (rule S1)."""

    part_bytes: int
    """The most bytes of weights of a function (rule W1)."""

    tensor_bytes: int
    """The most bytes of one weight on the engine (rule W1)."""

    head_rows: int
    """The most logits of one convolution (rule S9)."""

    lut_bits: tuple[int, ...]
    """Widths of palette indices that are streamed as they are (rules W5, W6)."""

    kernel_width: int
    """The widest kernel of a convolution (rule S6)."""

    resident_bytes: int
    """The largest operand that stays on the chip (rule S7)."""

    softmax_keys: int
    """The most keys of one softmax (rule S11)."""

    max_states: int
    """The most states of a function (rule T3)."""

    state_multiple: int
    """What the last axes of a state must be multiples of (rule T2)."""

    def holding(self, part_bytes: int) -> Profile:
        """The same with parts of at most so many bytes."""
        return replace(self, part_bytes=min(self.part_bytes, part_bytes))

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for meta.json."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def profiles() -> list[str]:
    """The names of all profiles."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_profile(name: str = DEFAULT) -> Profile:
    """The profile of that name."""
    known = profiles()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
        raise QcError(f"no chip is called {name!r}", fix=fix)
    return read_profile((FOLDER / f"{name}.yaml").read_text(), name)


def read_profile(text: str, name: str) -> Profile:
    """A profile from the text of its file."""
    data: dict[str, Any] = YAML(typ="safe").load(text)
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return Profile(name=name, **plain)
