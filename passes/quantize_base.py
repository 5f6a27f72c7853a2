"""Hold the base weights in 8 bits or fewer.

    before    y = linear(x, W)
    after     W/dequantize = qc.dequantize_4bit(W.indices, W.absmax, nf4, model)
              y = linear(x, W/dequantize)

For GPU servers, a weight is codes times scales (fp8, nvfp4, mxfp8, mxfp4, int4):

    packed    W/dequantize = qc.dequantize_scaled(W.indices, W.scale, nvfp4, model, global_scale=W.global_scale)
    latent    W/fake_quantize = qc.fake_quantize_scaled(W.latent, nvfp4, 1, 16, model, fused=[V.latent])

With the scheme lut, a weight is a few levels times scales, and levels and scales are parameters:

    factored  W/dequantize = qc.dequantize_lut(W.indices, W.lut, 1024, model, scale_a=…, scale_b=…, scale_g=…)
    latent    W/fake_quantize = qc.fake_quantize_lut(W.latent, W.lut, model, scale_a=…, scale_b=…, floor=1e-08)

With ``lut.vector`` an index stands for the weights of several rows at once:

    vectors   W/dequantize = qc.dequantize_vector_lut(W.indices, W.lut, 1024, model, scale=…)

Levels that train follow from ``theta``, whatever it becomes in order, symmetric, fp16 numbers and never zero:

    levels    W/levels = qc.monotone_levels(W.theta, 1.0)
              W/dequantize = qc.dequantize_lut(W.indices, W/levels, 1024, model, scale_a=…, scale_b=…, scale_g=…)

With ``keep``, the linears that would lose most of what they compute stay as they are, within a budget; a pass behind
this one may pack them in another format.

Integers do not train, and where they are all that is left of a weight it is frozen; latent weights train. Embeddings
and head stay as they are unless ``select`` names them by role or name; norms always do. Of tied weights there is one,
so selecting one reader packs the weight of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from math import isfinite, prod
from typing import Literal, NamedTuple

import torch

from graph import Graph, QcError, Selector, Site
from graph.apart import Parcel, divided
from graph.formats import (
    Fidelity,
    Format,
    Lut,
    LutOptions,
    Scaled,
    Tally,
    VectorLut,
    fidelity,
    fused_weights,
    link_fused,
    make_format,
    packed_sites,
    release_freed,
    shared_largest,
    store_packed,
)
from graph.formats.lut_levels import derive_levels
from graph.formats.measured import pack_measured
from graph.moments import COVARIANCE, take_moments, unused_covariance
from passes.base import BLOCK_WEIGHTS, Lossy, Pass, Report
from passes.keeping import Keep, problems, weighed
from passes.keeping import figures as importance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCALES = {"lut": "has scales of its own (lut.scale)"} | dict.fromkeys(("int4", "int8"), "has one scale a block")
"""Why a scheme has no use for an option."""

RELEASE_EVERY = 64 << 20
"""Bytes of float weights after which what they took is given back to the system."""


class Chosen(NamedTuple):
    """One weight, and what ``calibrate`` left of its input."""

    name: str
    site: Site
    moments: torch.Tensor | None
    covariance: torch.Tensor | None
    largest: float | None
    """The largest magnitude of all weights that share the number which scales it as a whole."""


@dataclass(frozen=True, kw_only=True)
class QuantizeBase(Pass):
    """Pack the weight of every selected linear and embedding, in the format that ``scheme`` names."""

    contract = Lossy(min_psnr_db=10.0)  # deep random models amplify noise; ``fidelity`` bounds every weight by itself
    ops = ("aten.linear", "aten.embedding")

    select: Selector = BLOCK_WEIGHTS
    """Which weights. Without a role or a name in it, embeddings and head are left out."""

    scheme: Literal["nf4", "fp4", "int8", "fp8", "nvfp4", "mxfp8", "mxfp4", "int4", "lut"] = "nf4"
    """nf4 (4 bits, for bell-shaped weights), fp4 (4 bits), int8 (8 bits), fp8 (e4m3), nvfp4 (e2m1, 16 a scale), mxfp8,
    mxfp4 (32 a scale), int4 or lut (1 to 8 bits)."""

    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] | None = None
    """Weights of a row that share one scale; it must divide the rows. For nf4, fp4 and int4, without it 64, and int8,
    without it a row, as LLM.int8 has it."""

    share: Literal["row", "weight", "block"] = "row"
    """What shares one scale: a row, the whole weight, or 128 rows and 128 columns. For fp8. Weights that servers
    multiply as one, q, k and v, gate and up, are one weight in this."""

    scale_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Numbers of the scales. For fp8, int4 and int8 with a block; GGUF has fp16."""

    double_quant: bool = False
    """Store those scales in 8 bits too: 4.13 instead of 4.5 bits per weight at block 64. For nf4 and fp4."""

    form: Literal["packed", "latent"] = "packed"
    """Packed weights that stay as they are, or float weights that are packed anew at every step and train, as the
    group ``weights``, until ``freeze-q`` packs them. For fp8, nvfp4, mxfp8, mxfp4, int4 and int8 with a block; lut
    has lut.form."""

    lut: LutOptions | None = None
    """Levels, scales and training of the scheme lut."""

    keep: Keep | None = None
    """How much of the selected weights stays as it is: those that cost most, by what `calibrate` measured."""

    compute_dtype: Literal["model", "fp32", "bf16", "fp16"] = "model"
    """The dtype in which weights are unpacked: the model's own, or always this one, then cast to the model's."""

    def __post_init__(self) -> None:
        if self.select.role is None and self.select.name is None:
            given = self.select.exclude or ()
            kept = (*((given,) if isinstance(given, str) else given), "embed", "head")
            object.__setattr__(self, "select", replace(self.select, exclude=kept))
        if self.scheme in ("int8", "fp8", "mxfp8"):
            object.__setattr__(self, "contract", Lossy(min_psnr_db=25.0, min_weight_snr_db=8.0))
        if self.scheme == "lut":
            weights = 0.0 if self.tables.fit == "mse" else -10.0  # one bit and absmax scales lose more than is there
            object.__setattr__(self, "contract", Lossy(min_psnr_db=0.0, min_weight_snr_db=weights))

    @property
    def tables(self) -> LutOptions:
        """What holds for LUT weights."""
        return self.lut or LutOptions()

    @property
    def format(self) -> Format:
        """The format of all weights, for the schemes that have but one."""
        assert self.scheme != "lut", "see form_for()"
        return make_format(
            self.scheme,
            block=self.block,
            double_quant=self.double_quant,
            share=self.share,
            latent=self.form == "latent",
            scale_dtype=DTYPES[self.scale_dtype],
        )

    def form_for(self, role: str, shape: tuple[int, ...]) -> Format:
        """The format of a weight of this role and shape [out, in]."""
        return self.tables.form_for(role, shape) if self.scheme == "lut" else self.format

    def _form_of(self, site: Site, shape: tuple[int, ...]) -> Format:
        return self.form_for(site.role, shape)

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Every selected weight that the format cannot hold, and every selected site without a stored weight."""
        found = list(self._mistakes())
        if found and self.scheme == "lut":
            return found  # of options that do not go together, none says what a weight becomes
        try:
            sites = self.select.pick(graph.sites(*self.ops), graph.blocks)
        except QcError as error:
            return [*found, error]
        packed = {tensor for site in packed_sites(graph) for tensor in site.tensors()}
        for site in sites:
            weight = site.weight()
            if weight is not None:
                problem = self._problem(weight, site.role, graph.shape(weight)) or self._unused(graph, weight)
            elif packed.isdisjoint(site.tensors()):
                problem = QcError("the weight is computed in the graph, not stored", fix="exclude it from select")
            else:
                problem = None  # packed already
            if problem is not None:
                problem.site = site.name
                found.append(problem)
        if not found and self.keep is not None:
            found += problems(graph, self.keep, sites, self._form_of)
        return found

    def _mistakes(self) -> Iterator[QcError]:
        """Options that do not go together, whatever the model."""
        yield from self.keep.mistakes() if self.keep is not None else ()
        blocks, doubled = self.scheme in ("nf4", "fp4", "int4", "int8"), self.scheme in ("nf4", "fp4")
        by_row = self.scheme == "int8" and self.block is None
        if (self.double_quant and not doubled) or (self.block is not None and not blocks):
            unused = "double_quant" if self.double_quant and not doubled else "block"
            scales = "has one scale a row" if by_row else _SCALES.get(self.scheme, "has scales of a fixed kind")
            yield QcError(f"{self.scheme} {scales} and no {unused}", fix=f"take {unused} out, or use nf4")
        if self.scale_dtype != "fp32" and (by_row or self.scheme not in ("fp8", "int4", "int8")):
            fix = "give block" if by_row else "use fp8, int4, or int8 with a block"
            yield QcError(f"{self.scheme} has scales of a fixed dtype", fix=f"take scale_dtype out, or {fix}")
        if self.share != "row" and self.scheme != "fp8":
            yield QcError(f"share is given, and scheme is {self.scheme}", fix="set scheme to fp8, or take share out")
        if self.form == "latent" and (by_row or self.scheme in ("nf4", "fp4", "lut")):
            fix = "set lut.form to latent" if self.scheme == "lut" else "use int4, fp8, nvfp4, mxfp8 or mxfp4"
            yield QcError(f"form is latent, and {self.scheme} weights do not train through it", fix=fix)
        if self.lut is not None and self.scheme != "lut":
            yield QcError(f"lut is given, and scheme is {self.scheme}", fix="set scheme to lut, or take lut out")
        if self.scheme == "lut":
            yield from self.tables.mistakes()

    def _problem(self, weight: str, role: str, shape: tuple[int, ...]) -> QcError | None:
        if self.scheme == "lut" and self.tables.size(role) is None:
            return self.tables.no_size(role)
        return self.form_for(role, shape).problem(weight, shape)

    def _unused(self, graph: Graph, weight: str) -> QcError | None:
        """A covariance that would change nothing."""
        if self.scheme in ("nf4", "fp4") or (self.scheme == "int8" and self.block is None):
            return unused_covariance(
                graph, weight, f"{self.scheme} rounds each value to its nearest, as bitsandbytes does"
            )
        if "latent" in (self.form, self.tables.form):
            return unused_covariance(graph, weight, "a latent weight is rounded to the nearest at every step")
        return None

    def run(self, graph: Graph) -> Report:
        """Pack as many weights at once as there are threads; each is read, packed, compared and then let go."""
        figures, changed = Tally(), []
        chosen: dict[str, Site] = {}
        sites = self.select.pick(graph.sites(*self.ops), graph.blocks)
        tried = weighed(graph, self.keep, sites, self._form_of) if self.keep is not None else ()
        stay = {one.weight for one in tried if one.kept}
        for site in sites:
            weight = site.weight()
            if weight is not None and weight not in chosen and weight not in stay:
                chosen[weight] = site
                changed += [reader.name for reader in graph.sites(*self.ops) if reader.weight() == weight]
        fused = fused_weights(chosen)
        whole = self.scheme != "lut" and isinstance(self.format, Scaled) and self.format.whole
        shared = shared_largest(graph, chosen) if whole else {}
        weights = ((self._chosen(graph, n, site, shared.get(n)), prod(graph.shape(n))) for n, site in chosen.items())
        on_host = graph.device.type == "cpu"
        for one, parcel in divided("pack", partial(self._packing, graph), weights, None if on_host else 1):
            earlier = figures.bytes_before // RELEASE_EVERY
            self._store(graph, one, parcel, figures)
            del parcel
            if figures.bytes_before // RELEASE_EVERY > earlier:
                release_freed()
        if whole and self.form == "latent":
            link_fused(graph, fused)
        return Report(tuple(changed), figures.summary() | importance(tried), tried)

    def _chosen(self, graph: Graph, name: str, site: Site, largest: float | None) -> Chosen:
        return Chosen(name, site, take_moments(graph, name), take_moments(graph, name, COVARIANCE), largest)

    def _form(self, one: Chosen, shape: tuple[int, ...]) -> Format:
        form = self.form_for(one.site.role, shape)
        return replace(form, largest=one.largest) if isinstance(form, Scaled) else form

    def _packing(self, graph: Graph, one: Chosen) -> Parcel:
        """Pack one weight, and compare it with what it unpacks to; of a plan there is nothing to compare."""
        weight, site, moments, covariance, _ = one
        w = graph.tensor(weight).detach()
        form = self._form(one, tuple(w.shape))
        if not w.is_meta and not all(isfinite(end) for end in w.aminmax()):
            fix = "repair the model, or exclude this weight from select"
            raise QcError(f"{weight} holds NaN or infinity", fix=fix, site=site.name)
        packed = pack_measured(form, w, moments, covariance)
        found = None if w.is_meta else fidelity(form, w, packed)
        nearest = found is None or found.faithful or covariance is not None
        assert nearest, f"{weight} at {site}: further off than {form.name} allows, a bug"
        below = form.scales_below(packed) if isinstance(form, (Lut, VectorLut)) else 0
        return Parcel(packed, (None if found is None else astuple(found), below))

    def _store(self, graph: Graph, one: Chosen, parcel: Parcel, figures: Tally) -> None:
        weight, (found, scales_below) = one.name, parcel.said
        w = torch.empty(graph.shape(weight), dtype=graph.dtype_of(weight), device="meta")
        form, packed = self._form(one, tuple(w.shape)), parcel.on(graph.device)
        figures.add(weight, w, packed, None if found is None else Fidelity(*found))
        stored = store_packed(graph, weight, form, packed, DTYPES.get(self.compute_dtype))
        if isinstance(form, Scaled) and form.latent:
            graph.set_info(f"{weight}.latent", trainable=True, group="weights")
        if isinstance(form, Lut) and form.theta:
            derive_levels(graph, stored)
        if isinstance(form, (Lut, VectorLut)):
            figures.add_scales(form.once_baked(packed), w.numel(), scales_below)
            for suffix, group in self.tables.trained().items():
                if f"{weight}.{suffix}" in graph.tensors():
                    graph.set_info(f"{weight}.{suffix}", trainable=True, group=group)
