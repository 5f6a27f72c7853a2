"""What a recipe is once it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graph.errors import QcError
from recipes.lock import digest, explicit
from recipes.numbers import Seed, Text
from recipes.settings import Export, Gate, Probe
from runtimes.assess_settings import Assess, Audit
from runtimes.settings import Cache, Evaluate, Train

if TYPE_CHECKING:
    from passes.base import Pass


@dataclass(frozen=True, kw_only=True)
class Model:
    """One of several models."""

    model: Text
    """A folder relative to the recipe, hf:org/name, or seedling for the model that comes with qc."""

    kind: Literal["causal-lm", "encoder"] | None = None
    """What it is taken as: of a language model, an encoder is all but the head. Without it, what it was made for."""

    attention: Literal["causal", "bidirectional"] | None = None
    """Whether a token sees those behind it; without it, as the model was trained."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What holds for the whole recipe."""

    model: Text | None = None
    """A folder relative to the recipe, hf:org/name, or seedling for the model that comes with qc."""

    models: dict[str, Model] | None = None
    """Several models by name, instead of ``model``; passes say which with ``on:``."""

    name: Text | None = None
    """What runs are called; without it, the recipe's file name."""

    seed: Seed = 0
    """Seed of everything random."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype of the floating tensors of the compiled graph."""

    probe: Probe = field(default_factory=Probe)
    """Size of the inputs on which passes are held to their contracts."""


@dataclass(frozen=True, kw_only=True)
class PassStep:
    """A pass of the recipe, ready to run."""

    step: Pass
    """The pass with its options."""

    kind: str
    """The name of the pass: ``add-lora``."""

    name: str
    """What this step is called: its ``name:``, or the pass and, from the second on, a number."""

    on: str | None = None
    """The model it rewrites; ``*`` for all of them."""

    line: str = field(default="", compare=False)
    """Where it is written, ``file:line:column``."""

    options_lines: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where each option is written."""

    def line_of(self, error: QcError) -> str:
        """The place of the first option that ``error`` speaks of, or else of the step."""
        said = re.findall(r"[\w-]+", f"{error.what} {error.fix}")
        return next((self.options_lines[word] for word in said if word in self.options_lines), self.line)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is done, in this order."""

    passes: tuple[PassStep, ...] = ()
    """Rewrites of the graph, in order."""

    audit: Audit | None = None
    """Whether gradients reach all that trains."""

    assess: Assess | None = None
    """How hard text is for what the passes made."""

    train: Train | None = None
    """How what the passes left trainable is trained."""

    evaluate: Evaluate | None = None
    """What is measured then."""

    require: tuple[Gate, ...] = ()
    """Gates: conditions that stop the run where they do not hold."""

    export: tuple[Export, ...] = ()
    """What is written for other runtimes."""


@dataclass(frozen=True, kw_only=True)
class Stage(Work):
    """A step of a pipeline; it starts from the artifact of the stage before it."""

    name: Text
    """What the stage is called."""

    start: Text | None = None
    """The stage whose artifact it starts from; without it, the one before."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Work, Header):
    """From a model to its artifacts: what to capture, rewrite, train, measure and write."""

    name: str
    """What runs are called."""

    cache: Cache | None = None
    """What the model says of some text, for the objective kd-cache; ``qc cache teacher`` writes it."""

    stages: tuple[Stage, ...] = ()
    """Several steps one after the other, instead of passes, train, evaluate, require and export."""

    file: Path = field(compare=False)
    """The file it was read from."""

    def plan(self) -> tuple[Stage, ...]:
        """The stages; a recipe without any is one stage, called ``main``."""
        flat = {key: getattr(self, key) for key in Work.__dataclass_fields__}
        return self.stages or (Stage(name="main", **flat),)

    def resolved(self) -> dict[str, Any]:
        """All of it with every default written out, as plain values; itself a recipe. For recipe.lock.yaml."""
        return explicit(self)

    def digest(self) -> str:
        """The sha256 of what is resolved, the name left out: the same for recipes that do the same."""
        return digest(self)
