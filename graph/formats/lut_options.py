"""What a recipe says of LUT weights, what of it does not go together, and the presets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from graph.errors import QcError
from graph.formats.bits import BITS as BITS_OF_INDICES
from graph.formats.lut_format import FLOOR, Lut, Scale
from graph.formats.vector_format import LARGEST_TABLE, VectorLut

BITS, RANK, GROUP = 4, 32, 32


class Size(NamedTuple):
    """How finely weights are held."""

    bits: int
    rank: int


PRESETS: dict[str, dict[str, Size]] = {
    "q2a4": {"mlp": Size(2, 32), "attn": Size(4, 8)},
    "q4a4": {"mlp": Size(4, 4), "attn": Size(4, 4)},
    "q4_r32": {"mlp": Size(4, 32), "attn": Size(4, 32)},
    "q2a2": {"mlp": Size(2, 32), "attn": Size(2, 32)},
}
"""Bits and ranks of the MLP and of attention."""


@dataclass(frozen=True, kw_only=True)
class LutOptions:
    """Levels, scales and training of LUT weights."""

    preset: Literal["q2a4", "q4a4", "q4_r32", "q2a2"] | None = None
    """Bits and ranks for MLP and attention, in the place of ``bits`` and ``rank``: q2a4 is 2 bits and rank 32 in the
    MLP, 4 bits and rank 8 in attention; q4a4 4 bits and rank 4; q4_r32 4 bits and rank 32; q2a2 2 bits and rank 32."""

    bits: Literal[1, 2, 3, 4, 6, 8] | None = None
    """Bits of an index: 2 are 4 levels, 4 are 16. Without it 4."""

    vector: Literal[2, 4, 8, 16] | None = None
    """Rows that share an index, which then stands for a vector: 2 with 4 bits are 2 bits a weight, on 16 pairs. One
    table serves the whole weight, of at most 256 numbers. For ``scale`` channel or none."""

    levels: Literal["fitted", "uniform"] = "fitted"
    """Levels fitted to each weight, or evenly spaced from -1 to 1."""

    scale: Scale = "low-rank"
    """What levels are multiplied by: a product of rank ``rank``, one number a group or row, or nothing."""

    rank: int | None = None
    """Rank of low-rank scales; without it 32."""

    group: int | None = None
    """Columns that share a scale, or a start of low-rank scales; without it 32. It must divide the rows."""

    fit: Literal["mse", "absmax"] = "mse"
    """Scales and levels of least squared error together, or scales from the largest magnitude of each group."""

    zero_free: bool = True
    """Let no fitted level be zero."""

    symmetric: bool = False
    """Let fitted levels come in pairs of both signs; levels that train then stay so, in order, and fp16 numbers."""

    rows_per_lut: int | None = None
    """Rows that share their levels; without it one table serves the whole weight."""

    form: Literal["factored", "latent"] = "factored"
    """Packed indices that stay as they are (V2), or float weights that are packed anew at every step (V1)."""

    train: Literal["scales", "levels", "scales+levels", "weights", "none"] = "scales"
    """What trains, as the groups of these names: scales, levels, both, latent float weights, or nothing."""

    def mistakes(self) -> Iterator[QcError]:
        """Options that do not go together, whatever the model."""
        yield from self._mistakes_of_size()
        yield from self._mistakes_of_vectors()
        if self.rank is not None and self.scale != "low-rank":
            what = f"lut.rank belongs to low-rank scales, and lut.scale is {self.scale}"
            yield QcError(what, fix="take lut.rank out")
        if self.group is not None and self.scale in ("channel", "none"):
            what = f"lut.group belongs to group and low-rank scales, and lut.scale is {self.scale}"
            yield QcError(what, fix="take lut.group out")
        if self.levels == "uniform" and self.fit == "mse" and self.scale != "none":
            what = "lut.fit mse fits levels and scales together, and lut.levels is uniform"
            yield QcError(what, fix="set lut.fit to absmax, or lut.levels to fitted")
        if self.train == "weights" and self.form != "latent":
            what = "lut.train is weights, and packed indices do not train"
            yield QcError(what, fix="set lut.form to latent, or lut.train to scales")
        if "scales" in self.train and self.scale == "none":
            what = f"lut.train is {self.train}, and lut.scale none leaves no scales to train"
            yield QcError(what, fix="set lut.train to none, or lut.scale to low-rank")
        if "levels" in self.train:
            yield from self._mistakes_of_levels()

    def _mistakes_of_levels(self) -> Iterator[QcError]:
        """What levels cannot train with."""
        if self.bits == 1 and self.symmetric:
            what = f"lut.train is {self.train}, and of two symmetric levels none can move"
            yield QcError(what, fix="train the scales, or take lut.symmetric out")
        if self.form == "latent" and not self.symmetric and self.vector is None:
            what = f"lut.train is {self.train}, and latent weights are sorted by levels that stay in order"
            yield QcError(what, fix="set lut.symmetric to true")
        if self.rows_per_lut is not None and self.symmetric and (self.scale == "none" or self.fit == "absmax"):
            what = f"lut.train is {self.train}, and the tables of lut.rows_per_lut do not end at one largest level"
            yield QcError(what, fix="take lut.rows_per_lut or lut.symmetric out, or fit scales: lut.fit mse")

    def _mistakes_of_vectors(self) -> Iterator[QcError]:
        """What belongs to single levels."""
        if self.vector is None:
            return
        if self.preset is None and self.scale not in ("channel", "none"):
            what = (
                f"lut.vector is {self.vector}, and lut.scale is {self.scale}: rows of vectors have one scale, or none"
            )
            yield QcError(what, fix="set lut.scale to channel or none, or take lut.vector out")
        if self.preset is not None:
            what = f"lut.vector is {self.vector}, and lut.preset {self.preset} has low-rank scales"
            yield QcError(what, fix="give lut.bits and lut.scale: channel in the place of lut.preset")
        for key, given, why in (
            ("levels", self.levels == "uniform", "vectors are fitted"),
            ("fit", self.fit == "absmax", "scales of vectors are those of least squared error"),
            ("symmetric", self.symmetric, "vectors do not come in pairs of both signs"),
            ("rows_per_lut", self.rows_per_lut is not None, "of vectors there is one table for the whole weight"),
        ):
            if given:
                what = f"lut.{key} is {str(getattr(self, key)).lower()}, and {why}"
                yield QcError(what, fix=f"take lut.{key} out, or lut.vector")
        numbers, bits = self.vector << (self.bits or BITS), (LARGEST_TABLE // self.vector).bit_length() - 1
        if numbers > LARGEST_TABLE:
            table = f"lut.vector {self.vector} with {self.bits} bits is a table of {numbers} numbers"
            yield QcError(
                f"{table}, and {LARGEST_TABLE} fit",
                fix=f"set lut.bits to at most {max(b for b in BITS_OF_INDICES if b <= bits)}",
            )

    def _mistakes_of_size(self) -> Iterator[QcError]:
        for key, least in (("rank", 1), ("group", 1), ("rows_per_lut", 1)):
            given = getattr(self, key)
            if given is not None and given < least:
                instead = ", or set lut.scale to group" if key == "rank" else ""
                yield QcError(f"lut.{key} is {given}", fix=f"give a number from {least}{instead}")
        if self.preset is None:
            return
        given = [key for key in ("bits", "rank") if getattr(self, key) is not None]
        if given:
            said = " and ".join(f"lut.{key}" for key in given)
            what = f"{said} beside lut.preset {self.preset}, which says bits and rank itself"
            yield QcError(what, fix=f"take {said} out, or lut.preset")
        if self.scale != "low-rank":
            what = f"lut.preset {self.preset} has low-rank scales, and lut.scale is {self.scale}"
            yield QcError(what, fix="take lut.scale out, or give lut.bits in the place of lut.preset")

    def size(self, role: str) -> Size | None:
        """Bits and rank of a weight of this role; None where the preset has none for it."""
        if self.preset is None:
            return Size(self.bits or BITS, self.rank or RANK)
        return PRESETS[self.preset].get(role.partition(".")[0])

    def no_size(self, role: str) -> QcError:
        """Why a weight of this role cannot be packed with this preset."""
        what = f"lut.preset {self.preset} is for MLP and attention, and says nothing of {role}"
        return QcError(what, fix="exclude it from select, or give lut.bits and lut.rank in the place of lut.preset")

    def form_for(self, role: str, shape: tuple[int, ...]) -> Lut | VectorLut:
        """The format of a weight of this role and shape [out, in]."""
        size = self.size(role)
        assert size is not None, "see no_size()"
        latent = self.form == "latent"
        if self.vector is not None:
            return VectorLut(
                columns=shape[1],
                levels=1 << size.bits,
                vector=self.vector,
                scale="channel" if self.scale == "channel" else "none",
                zero_free=self.zero_free,
                latent=latent,
            )
        return Lut(
            columns=shape[1],
            levels=1 << size.bits,
            scale=self.scale,
            rank=size.rank,
            group=self.group or GROUP,
            uniform=self.levels == "uniform",
            fit=self.fit,
            symmetric=self.symmetric,
            zero_free=self.zero_free,
            latent=latent,
            magnitudes=not latent,
            floor=FLOOR if latent and self.scale == "low-rank" else None,
            rows_per_lut=self.rows_per_lut,
            theta="levels" in self.train and self.symmetric,
        )

    def trained(self) -> dict[str, str]:
        """The suffixes of what trains, and the group that each is in."""
        suffixes = {"scales": ("scale", "scale_a", "scale_b", "scale_g"), "levels": ("lut", "theta")}
        suffixes["weights"] = ("latent",)
        return {suffix: group for group in self.train.split("+") for suffix in suffixes.get(group, ())}
