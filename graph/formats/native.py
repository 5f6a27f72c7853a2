"""Packing in C, where the machine has a compiler: one pass over a weight instead of a dozen, to the same bytes.

``packing.c``, ``ternary.c`` and ``fitting.c`` are built once for a machine and kept in the user's cache. Without a
compiler, on other devices and for weights that are not fp32, bf16 or fp16, the torch ops do the work:
docs/decisions/0009-packing-in-c.md.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from graph.formats.memory import scratch

SOURCES = tuple(Path(__file__).with_name(name) for name in ("packing.c", "ternary.c", "fitting.c"))
HEADERS = (Path(__file__).with_name("reading.h"),)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of weights that are packed as they are, as ``reading.h`` numbers them. Of all else they are f32."""

ENCODED = ("e4m3", "e2m1", "int2", "int4", "int8")
"""The elements whose codes it makes."""

NEAREST = (*ENCODED, "int3", "int6")
"""The elements that it rounds to."""

_FLAGS = ("-O3", "-std=c11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
"""Without contraction ``a * b + c`` rounds twice, as torch does."""

_SECONDS = 60
"""After which a compiler is given up."""

_LOADING = Lock()
_left = False

_RULES = (*FLOATS, torch.float8_e8m0fnu, torch.float8_e4m3fn)
"""The dtypes of scales, as ``reading.h`` numbers them."""


class Scales(NamedTuple):
    """How weights find their scales: see scales_of.py."""

    dtype: torch.dtype
    """What they are stored as: f32, bf16, fp16, e4m3 or e8m0."""

    largest: float
    """What the largest magnitude under a scale becomes."""

    divisor: float
    """The global scale of NVFP4, else 1."""


def reads(w: Tensor) -> bool:
    """Whether it works on weights like this one."""
    return _fits(FLOATS, w) and _library() is not None


def magnitudes(w: Tensor, columns: int, out: Tensor) -> bool:
    """Write the largest magnitude of every ``columns`` columns; False where that is left to torch.

    w: float [out, in]    out: f32 [out, in / columns]
    """
    return _packed("magnitudes", (w, out), out.numel(), columns, at(out))


def encode(element: str, w: Tensor, scale: Tensor, out: Tensor) -> bool:
    """Write the codes of ``w / scale``; False where that is left to torch.

    w: float [rows, columns]    scale: f32 [rows, groups]    out: u8 [rows, columns * bits / 8]
    """
    return element in ENCODED and _under(f"encode_{element}", w, scale, out)


def nearest(element: str, w: Tensor, scale: Tensor, out: Tensor) -> bool:
    """Write what the codes of ``w / scale`` stand for; False where that is left to torch.

    w: float [rows, columns]    scale: f32 [rows, groups]    out: f32 [rows, columns]
    """
    fits = element in NEAREST and out.dtype == torch.float32
    return fits and _under(f"nearest_{element}", w, scale, out)


def _under(name: str, w: Tensor, scale: Tensor, out: Tensor) -> bool:
    groups = scale.numel()
    return _packed(name, (w, scale, out), at(scale), groups, w.numel() // groups, at(out))


def pack(element: str, w: Tensor, by: Scales, scale: Tensor, out: Tensor) -> bool:
    """Find scales, write them as they are stored, and the codes under them; False where that is left to torch.

    w: float [rows, columns]    scale: f32 [rows, groups]    out: u8 [rows, columns * bits / 8]
    """
    return element in ENCODED and _found(f"pack_{element}", w, by, scale, out)


def round_(element: str, w: Tensor, by: Scales, columns: int, out: Tensor) -> bool:
    """Write what ``pack`` makes codes of, where every ``columns`` columns share a scale.

    w: float [rows, columns]    out: f32 [rows, columns]
    """
    if element not in NEAREST or out.dtype != torch.float32:
        return False
    scale = scratch("native.scale", (w.numel() // columns,), torch.float32, w.device)
    return _found(f"round_{element}", w, by, scale, out)


def _found(name: str, w: Tensor, by: Scales, scale: Tensor, out: Tensor) -> bool:
    read = scratch("native.read", tuple(scale.shape), torch.float32, w.device)
    groups, columns = scale.numel(), w.numel() // scale.numel()
    rule = _RULES.index(by.dtype), by.largest, by.divisor
    return _packed(name, (w, scale, out), groups, columns, *rule, at(scale), at(read), at(out))


def encode_levels(w: Tensor, bounds: Tensor, absmax: Tensor, out: Tensor) -> bool:
    """Write which of 16 ascending levels is nearest to each weight over its block's largest magnitude, and that one.

    w: float [rows, columns]    bounds: f32 [15]    absmax: f32 [rows, blocks]    out: u8 [rows, columns / 2], the
    earlier of two in the high half. False where that is left to torch.
    """
    blocks = absmax.numel()
    given = at(bounds), blocks, w.numel() // blocks, at(absmax), at(out)
    return _packed("encode_levels", (w, bounds, absmax, out), *given)


def ternary_fitted(
    w: Tensor, tau: float | None, squares: bool, threshold: Tensor, scale: Tensor, out: Tensor | None
) -> bool:
    """Find the thresholds and scales of ternary weights, and what they become; False where that is left to torch.

    w, out: f32 [rows, columns], or no out    threshold, scale: f32 [rows, groups]    tau: None for round-clip
    """
    groups = scale.numel()
    given = at(w), groups, w.numel() // groups, -1.0 if tau is None else tau, int(squares)
    written = w if out is None else out
    return _call("ternary_fitted", (w, threshold, scale, written), *given, *map(at, (threshold, scale, out)))


def ternary_dense(w: Tensor, threshold: Tensor, scale: Tensor, out: Tensor) -> bool:
    """Write what weights become under these thresholds and scales; False where that is left to torch.

    w, out: f32 [rows, columns]    threshold, scale: f32 [rows, groups]
    """
    groups = scale.numel()
    return _call(
        "ternary_dense",
        (w, threshold, scale, out),
        at(w),
        groups,
        w.numel() // groups,
        *map(at, (threshold, scale, out)),
    )


def _packed(name: str, tensors: tuple[Tensor, ...], *given: float | ctypes.c_void_p) -> bool:
    """Call what reads weights, the first of the tensors, as they are."""
    found, w = _library() if _fits(FLOATS, *tensors) else None, tensors[0]
    if found is None:
        return False
    getattr(found, name)(at(w), FLOATS.index(w.dtype), *given)
    return True


def _call(name: str, tensors: tuple[Tensor, ...], *given: float | ctypes.c_void_p) -> bool:
    found = function(name, *tensors)
    if found is None:
        return False
    found(*given)
    return True


def function(name: str, *tensors: Tensor) -> Callable[..., Any] | None:
    """The C function of that name, where it can read and write these tensors, the first of them f32."""
    found = _library() if _fits(FLOATS[:1], *tensors) else None
    return None if found is None else cast("Callable[..., Any]", getattr(found, name))


def _fits(dtypes: tuple[torch.dtype, ...], w: Tensor, *others: Tensor) -> bool:
    """Whether it can read and write these."""
    plain = w.dtype in dtypes and w.numel() > 0
    return plain and all(x.device.type == "cpu" and x.is_contiguous() for x in (w, *others))


def at(x: Tensor | None) -> ctypes.c_void_p:
    """Where its values begin; nowhere where there is none."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def leave_to_torch() -> None:
    """From now on this process does without: to compare, and to see what other machines do."""
    global _left
    _left = True


def _library() -> ctypes.CDLL | None:
    with _LOADING:
        return None if _left else _loaded()


@cache
def _loaded() -> ctypes.CDLL | None:
    """The library, built if it is not there; None where it cannot be."""
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if (found := _which(name))), None)
    if compiler is None:
        return None
    try:
        kept = _folder() / f"packing-{_key(compiler)}.so"
        if not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            _build(compiler, kept)
        return _opened(kept)
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None  # no home, no room to build in, or a compiler that does not: torch packs


def _which(name: str | None) -> str | None:
    return shutil.which(name) if name else None


def _folder() -> Path:
    """The user's own cache: what is loaded from there is run."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qc"


def _key(compiler: str) -> str:
    """What the library depends on: the source, how it is built, and the processor that it is built for."""
    processor = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        processor += "".join(line for line in text.splitlines() if line.startswith(("model name", "flags", "Features")))
    built = Path(compiler).stat()
    parts = (
        *(source.read_text() for source in (*SOURCES, *HEADERS)),
        *_FLAGS,
        compiler,
        str(built.st_size),
        str(built.st_mtime_ns),
        processor,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _build(compiler: str, kept: Path) -> None:
    """Compile beside ``kept``, for this processor if the compiler can, and put it there when it is whole and right."""
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        made = Path(folder) / kept.name
        for own in (("-march=native",), ("-mcpu=native",), ()):
            read = f"-I{HEADERS[0].parent}"
            command = [compiler, *_FLAGS, *own, read, "-o", str(made), *map(str, SOURCES), "-lm"]
            nowhere = subprocess.DEVNULL
            if subprocess.call(command, stdout=nowhere, stderr=nowhere, timeout=_SECONDS) == 0:
                os.replace(made, kept)
                return
    raise OSError(f"{compiler} compiles nothing")


def _opened(kept: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(kept))
    pointer, count, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    weights = [pointer, integer]
    given = [*weights, pointer, count, count, pointer]
    finding = [*weights, count, count, integer, real, real, pointer, pointer, pointer]
    signatures: dict[str, list[Any]] = {"magnitudes": [*weights, count, count, pointer]}
    signatures |= {f"encode_{name}": given for name in ENCODED} | {f"pack_{name}": finding for name in ENCODED}
    signatures |= {f"nearest_{name}": given for name in NEAREST} | {f"round_{name}": finding for name in NEAREST}
    signatures["ternary_fitted"] = [pointer, count, count, real, integer, pointer, pointer, pointer]
    signatures["ternary_dense"] = [pointer, count, count, pointer, pointer, pointer]
    signatures["encode_levels"] = [*weights, pointer, count, count, pointer, pointer]
    signatures["lut_assign"] = [pointer, pointer, count, count, pointer, pointer, count, pointer, pointer]
    signatures["lut_nearest"] = signatures["lut_assign"]
    signatures["lut_products"] = [pointer, count, pointer, count, count, count, pointer, pointer, pointer, pointer]
    signatures["vector_nearest"] = [pointer, pointer, pointer, pointer, count, count, count, count, pointer]
    signatures["lut_sums"] = [pointer, pointer, pointer, count, count, pointer, pointer, pointer]
    for name, types in signatures.items():
        made: Any = getattr(found, name)
        made.argtypes, made.restype = types, ctypes.c_double if name == "lut_assign" else None
    return found
