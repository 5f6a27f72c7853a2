"""Scales of keys and values that an export holds, against the keys and values of its graph, and what they cost.

That a server's numbers are those of the graph says nothing of a scale that both were told. So the graph computes keys
and values of its own, and a scale must reach about as far as they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from graph.formats.scaled import ELEMENTS
from graph.probe import psnr_db
from runtimes.serving.caches import largest_kept
from runtimes.serving.layout import cache_scale
from runtimes.verify.findings import Finding
from runtimes.verify.weights import Probe, Rounded, at_tokens

REACH = 8.0
"""How many times as far as the keys or values of the probes a scale may reach, or as they may reach beyond it."""

PRICE_DB = 20.0
"""Least PSNR of the logits against those with keys and values as they are."""


def findings(
    plain: Rounded, theirs: Tensor, probes: list[Probe], kept: Mapping[str, tuple[float, float]], dtype: torch.dtype
) -> Iterator[Finding]:
    """What is found of an export whose logits are ``theirs`` [tokens, d]; ``plain`` keeps keys and values as they are.

    kept: what the export was made for    dtype: that of its scales
    """
    yield _reach(largest_kept(plain.source, [ids for ids, _ in probes]), kept, dtype)
    ours = at_tokens([plain.run_on(*probe) for probe in probes], probes)
    found, top1 = psnr_db(ours, theirs), (theirs.argmax(-1) == ours.argmax(-1)).double().mean().item()
    said = f"{found:.1f} dB PSNR of {PRICE_DB:g} dB, top-1 agreement {top1:.1%}, against keys and values as they are"
    yield Finding("price of the cache", found >= PRICE_DB, said)


def _reach(
    seen: Mapping[str, tuple[float, float]], kept: Mapping[str, tuple[float, float]], dtype: torch.dtype
) -> Finding:
    """Each scale against the keys or values of the probes."""
    if set(seen) != set(kept):
        return Finding("scales of the cache", False, "they are not those of the attentions of this graph")
    for attention, largest in seen.items():
        for which, here, told in zip(("keys", "values"), largest, kept[attention], strict=True):
            reach = float(cache_scale(told, dtype)) * ELEMENTS["fp8"].largest
            if not here / REACH <= reach <= here * REACH:
                what = f"the scale of the {which} of {attention} reaches {reach:.3g}, and {which} here {here:.3g}"
                return Finding("scales of the cache", False, what)
    return Finding(
        "scales of the cache", True, f"of {len(kept)} attentions, each within {REACH:g} times of what is seen"
    )
