"""What packed weights of a graph can be written as: they stay as they are, so it is for the settings to fit them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast, get_args

import torch
from torch import fx

from graph import QcError, Site
from graph.formats import Format, FourBit, Int8, Scaled, Ternary, format_of, weight_name
from graph.formats.scaled import Kind
from graph.ops import op_name
from runtimes.serving.settings import BLOCK, OPTIONS, Scheme, Serving, Target

_SHARED = {"block": (BLOCK, BLOCK), "tensor": (0, 0), "static": (0, 0)}
"""The rows and columns that share a scale in each scheme of fp8; in the others it is a row."""

_SCHEMES: tuple[Scheme, ...] = ("channel", "tensor", "block")
"""Those of fp8 that say nothing of inputs."""

_OWN: tuple[Target, ...] = ("fp8", "nvfp4", "mxfp8", "mxfp4", "int4", "int8", "int2")
"""The targets that a checkpoint may hold side by side."""


def form_of(settings: Serving, scale_dtype: torch.dtype = torch.float32) -> Format:
    """The format in which weights are packed that are not yet."""
    if settings.target == "nf4":
        return FourBit("nf4")
    if settings.target == "fp8":
        rows, columns = _SHARED.get(settings.scheme or "", (1, 0))
        return Scaled("fp8", rows, columns, torch.float32 if settings.dialect != "compressed-tensors" else scale_dtype)
    if settings.target in ("int4", "int8"):
        group = settings.group or (BLOCK if settings.target == "int4" else 0)
        return Scaled(cast(Kind, settings.target), 1, group, scale_dtype)
    return Scaled(cast(Kind, settings.target), scale_dtype=scale_dtype)


def settings_held(settings: Serving, held: Sequence[Site]) -> list[Serving | None]:
    """What is asked for of each of these packed weights; None where no target of a mixture holds it.

    A small weight may be held in several ways at once, its only block being the whole of it: then in that of most.
    """
    if settings.target != "mixed":
        return [_as_held(settings, format_of(held[0]), held[0].value.shape)] * len(held)
    each = [list(_own(settings, format_of(site), site.value.shape)) for site in held]
    votes = Counter(one for candidates in each for one in candidates)
    return [max(candidates, key=lambda one: votes[one], default=None) for candidates in each]


def _own(settings: Serving, form: Format, shape: Sequence[int]) -> Iterator[Serving]:
    """The targets that have this format."""
    for target in _OWN:
        one = Serving(target=target, weight_only=settings.weight_only and "weight_only" in OPTIONS[target])
        candidates = [one]
        if target == "fp8":
            candidates = [replace(one, scheme=scheme) for scheme in _SCHEMES]
        elif target in ("int4", "int8") and isinstance(form, Scaled):
            grouped = replace(one, group=form.columns or int(shape[1]))
            candidates = [grouped] if target == "int4" else [one, grouped]
        yield from (candidate for candidate in candidates if fits(candidate, form, shape))


def _as_held(settings: Serving, form: Format, shape: Sequence[int]) -> Serving:
    """The scheme of fp8 and the group of integers are those of the graph, where none is asked for."""
    if not isinstance(form, Scaled):
        return settings
    if settings.target == "fp8" and settings.scheme is None:
        found = next((one for one in _SCHEMES if fits(replace(settings, scheme=one), form, shape)), None)
        return replace(settings, scheme=found)
    if settings.target in ("int4", "int8") and settings.group is None:
        row = int(shape[1]) if settings.target == "int4" else None  # int8 with a scale a row has no groups
        return replace(settings, group=form.columns or row)
    return settings


def fits(settings: Serving, form: Format, shape: Sequence[int]) -> bool:
    """Whether a checkpoint of this kind holds weights [out, in] of this format."""
    if settings.target == "nf4":
        return isinstance(form, FourBit) and form.kind == "nf4"
    if settings.target == "int2":
        return isinstance(form, Ternary) and not form.latent
    wanted = form_of(settings)
    if not isinstance(form, Scaled) or not isinstance(wanted, Scaled) or form.kind != wanted.kind:
        return False
    return _sharing(form, shape) == _sharing(wanted, shape)


def _sharing(form: Scaled, shape: Sequence[int]) -> tuple[int, int]:
    """The rows and columns of such a weight that share a scale."""
    return form.rows or shape[0], form.columns or shape[1]


def readers(node: fx.Node) -> list[fx.Node]:
    """What reads a value, behind a cast or not."""
    found: list[fx.Node] = []
    for user in node.users:
        cast_ = user.op == "call_function" and op_name(user.target) == "aten.to.dtype"
        found += readers(user) if cast_ else [user]
    return found


def unfit(settings: Serving, held: Sequence[Site], each: Sequence[Serving | None]) -> Iterator[QcError]:
    """Packed weights of another format: written as this one they would lose twice."""
    for site in held:
        ops = {Site(site.graph, reader).op for reader in readers(site.node)}
        if ops != {"aten.linear"}:
            what = f"{weight_name(site)} is packed, and {' and '.join(sorted(ops))} reads it: servers read floats"
            yield QcError(what, site=site.name, fix="exclude embed and head from the select of quantize-base")
            return
    latent = [site for site in held if site.op.startswith("qc.fake_quantize")]
    if latent:
        what = f"{weight_name(latent[0])} is a float weight that is packed anew each time it is read"
        freeze = "freeze-ternary" if latent[0].op.endswith("_ternary") else "freeze-q"
        yield QcError(what, site=latent[0].name, fix=f"add the pass {freeze} before the export")
        return
    pairs = [(site, one, format_of(site)) for site, one in zip(held, each, strict=True)]
    wrong = [(site, one, form) for site, one, form in pairs if one is None or not fits(one, form, site.value.shape)]
    if not wrong:
        return
    site, asked, form = wrong[0]
    more = f", and so do {len(wrong) - 1} more" if len(wrong) > 1 else ""
    if asked is None:
        what = f"{weight_name(site)} holds {form.name}{more}, which compressed-tensors has no form of"
        yield QcError(what, site=site.name, fix="pack it in another format, or leave it as floats")
        return
    scheme = f" with scheme {asked.scheme}" if asked.scheme else ""
    what = f"{weight_name(site)} holds {form.name}{more}: as {settings.target}{scheme} it would be rounded twice"
    same = isinstance(form, Scaled) and form.kind == settings.target
    fix = "export without the option that differs" if same else instead_of(form, settings.target)
    yield QcError(what, site=site.name, fix=fix)


def instead_of(form: Format, target: str) -> str:
    """What a graph that holds this format can be written as, where it cannot be as ``target``."""
    own = "nf4" if isinstance(form, FourBit) and form.kind == "nf4" else None
    own = form.kind if isinstance(form, Scaled) else "int2" if isinstance(form, Ternary) else own
    instead = f"export to {own}" if own in get_args(Target) else ""
    again = f"add the pass dequantize before the export, which then rounds to {target}"
    if target == "int2":
        return instead or "export to int4 after the pass dequantize"
    if instead:
        return f"{instead}, or {again}"
    return f"export to safetensors, or {again}" if not isinstance(form, Int8) else again
