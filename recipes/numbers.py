"""Kinds of numbers and texts that options can be."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

Count: TypeAlias = Annotated[int, Field(ge=1, le=2**31 - 1)]
Natural: TypeAlias = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed: TypeAlias = Annotated[int, Field(ge=0, le=2**63 - 1)]
Positive: TypeAlias = Annotated[float, Field(gt=0)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0)]
Ratio: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Below1: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Text: TypeAlias = Annotated[str, Field(min_length=1)]
Globs: TypeAlias = Text | tuple[Text, ...]
