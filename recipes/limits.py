"""What the options of the runtimes may be, beyond their types: ranges, and how to tell the kinds of data apart.

The runtimes own their options (``runtimes.settings``) as plain dataclasses. Here each gets a stricter twin that
validates; ``loose`` turns what was read back into the runtimes' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from dataclasses import Field as OptionField
from types import GenericAlias
from typing import Annotated, Any, Union

from pydantic import Discriminator, Field, Tag

from graph.select import Selector
from recipes.kinds import hints
from recipes.numbers import Below1, Count, Globs, Natural, NotNegative, Positive, Ratio, Seed, Text
from runtimes import assess_settings, settings

SOURCES: dict[str, type[Any]] = {
    "hf": settings.HubDataset,
    "jsonl": settings.JsonLines,
    "text": settings.TextFiles,
    "texts": settings.Texts,
    "wikitext": settings.Wikitext,
    "retrieval": settings.Retrieval,
    "source": settings.PythonStdlib,
}
"""The key that tells a source of data from the others; the first of them that is there decides."""

OBJECTIVES: dict[str, type[Any]] = {
    "causal-lm": settings.CausalLm, "kd": settings.Kd, "kd-cache": settings.KdCache, "embedding": settings.Embedding,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TensorSelector(Selector):
    """A selector of trained tensors."""

    group: str | tuple[str, ...] | None = None
    """Groups that passes put tensors in, globs allowed: ``lora.*``."""


def _source_of(value: Any) -> str | None:
    keys = value if isinstance(value, Mapping) else ()
    return next((kind.__name__ for key, kind in SOURCES.items() if key in keys), None)


def _objective_of(value: Any) -> str | None:
    kind = OBJECTIVES.get(str(value.get("name"))) if isinstance(value, Mapping) else None
    return kind.__name__ if kind else None


_TWINS: dict[type[Any], type[Any]] = {}


def _twin(kind: type[Any], **limits: Any) -> type[Any]:
    """A subclass of ``kind`` that is called the same, with ``limits`` for the types of some fields."""
    types = {**hints(kind), **limits}
    made = [
        (one.name, types[one.name], field(default_factory=one.default_factory))
        if one.default_factory is not MISSING
        else (one.name, types[one.name], field(default=one.default))
        for one in fields(kind)
    ]
    twin = make_dataclass(
        kind.__name__, made, bases=(kind,), frozen=True, kw_only=True, namespace={"__doc__": kind.__doc__}
    )
    _TWINS[kind] = twin
    return twin


def _any_of(kinds: Mapping[str, type[Any]], which: Any) -> Any:
    tagged = tuple(Annotated[_TWINS[kind], Tag(kind.__name__)] for kind in kinds.values())
    return Annotated[Union[tagged], Discriminator(which)]  # noqa: UP007 - of a tuple


_COLUMNS = dict.fromkeys(("text", "prompt", "response", "messages", "config"), Text | None)

_twin(settings.PythonStdlib)
_twin(settings.TextFiles, text=Globs)
_twin(settings.Texts)
_twin(settings.Wikitext, wikitext=Text)
_twin(settings.JsonLines, jsonl=Globs, **_COLUMNS)
_twin(settings.HubDataset, hf=Text, split=Text, **_COLUMNS)
_twin(
    settings.Retrieval,
    retrieval=settings.RetrievalTask | dict[str, float],
    ask=Text,
    hard=Ratio,
    vocabulary=Count | None,
    forms=tuple[Text, ...],
    **dict.fromkeys(("chunks", "asks", "first_chunks", "entries", "key", "value", "chunk_length"), Count),
    **dict.fromkeys(("first_questions", "curriculum", "filler"), Natural),
)
_twin(settings.CausalLm)
_twin(settings.Kd, temperature=Positive, alpha=Ratio)
_twin(
    settings.KdCache,
    cache=Text | None,
    temperature=Positive,
    **dict.fromkeys(("hard_top1", "hard_full", "hard_text", "anneal"), NotNegative),
)
_twin(settings.Embedding, states=NotNegative, relations=NotNegative)
_GROUP = _twin(
    settings.Group,
    select=TensorSelector | None,
    lr=Positive,
    weight_decay=NotNegative,
    betas=tuple[Below1, Below1],
    eps=Positive,
    warmup=NotNegative,
    start_step=Natural,
    min_lr_ratio=Ratio,
)
_DATA = _any_of(SOURCES, _source_of)
_AUTO_SNAP = _twin(
    settings.AutoSnap,
    select=TensorSelector | None,
    threshold=Positive,
    start=Natural,
    **dict.fromkeys(("every", "patience"), Count),
)
_BACKTRACK = _twin(settings.Backtrack, ratio=Positive, limit=Count)
_LAYERWISE = _twin(
    settings.Layerwise,
    steps_per_layer=Count,
    backtrack=_BACKTRACK | None,
    **dict.fromkeys(("local", "kd"), NotNegative),
)
_GROKFAST = _twin(settings.Grokfast, decay=Below1, strength=NotNegative)
_ROUTING = _twin(settings.Routing, sparsity=NotNegative, balance=NotNegative)
_DIVERGENCE = _twin(settings.Divergence, ratio=Annotated[float, Field(gt=1)], window=Count)
_twin(
    settings.Train,
    objective=_any_of(OBJECTIVES, _objective_of),
    data=_DATA | None,
    eval_data=_DATA | None,
    lr=Positive | None,
    groups=GenericAlias(dict, (str, _GROUP)) | None,
    clip=Positive | None,
    ema=Below1 | None,
    auto_snap=_AUTO_SNAP | None,
    layerwise=_LAYERWISE | None,
    grokfast=_GROKFAST | None,
    routing=_ROUTING | None,
    divergence=_DIVERGENCE | None,
    when=Text | None,
    memory=Text | None,
    seed=Seed | None,
    **dict.fromkeys(("steps", "batch", "length", "accumulate", "eval_batches", "keep"), Count),
    **dict.fromkeys(("eval_every", "save_every"), Natural),
)
_twin(
    settings.Cache,
    data=_DATA,
    length=Annotated[int, Field(ge=2, le=2**31 - 1)],
    seed=Seed | None,
    out=Text | None,
    **dict.fromkeys(("sequences", "topk", "batch", "shard"), Count),
    **dict.fromkeys(("heldout", "negatives"), Natural),
)
_twin(assess_settings.Audit, data=_DATA | None, **dict.fromkeys(("spots", "batch", "length"), Count))
_twin(
    assess_settings.Assess,
    data=_DATA | None,
    target=Ratio,
    tolerance=Ratio,
    micro_batches=Annotated[int, Field(ge=8, le=2**31 - 1)],
    **dict.fromkeys(("levels", "batches", "batch", "length"), Count),
)
_twin(
    settings.Evaluate,
    data=_DATA | None,
    tokens=Count | None,
    **dict.fromkeys(("batches", "batch", "length"), Count),
)


def is_data(option: OptionField[Any]) -> bool:
    """Whether an option of a pass is a source of data."""
    return bool(option.metadata.get("data"))


def strict(kind: type[Any]) -> type[Any]:
    """The twin of ``kind`` that validates; ``kind`` itself, where it has none.

    A pass has one if some of its options are data, which is read as all data is.
    """
    if kind not in _TWINS and is_dataclass(kind) and (data := [one.name for one in fields(kind) if is_data(one)]):
        _twin(kind, **dict.fromkeys(data, _DATA))
    return _TWINS.get(kind, kind)


def loose(value: Any) -> Any:
    """Twins turned back into what they are twins of, at any depth."""
    if isinstance(value, tuple):
        return tuple(loose(one) for one in value)
    if isinstance(value, dict):
        return {key: loose(one) for key, one in value.items()}
    if isinstance(value, TensorSelector):
        options = {one.name: getattr(value, one.name) for one in fields(value)}
        said = {key: option for key, option in options.items() if option is not None}
        return said if "group" in said else Selector(**said)
    base = type(value).__mro__[1]
    if is_dataclass(value) and _TWINS.get(base) is type(value):
        return base(**{one.name: loose(getattr(value, one.name)) for one in fields(value)})
    return value
