"""What capture keeps whole: norms, rotary embeddings, attention and its mask are traced as one op each.

Nothing is recognised by its name. A norm or a rotary function is run beside our op on random numbers, in fp32 and
bf16; where all bits agree it is traced as that op, and where they do not it is traced as it is written. Attention
and masks come through the hooks that transformers offers for them.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from graph import ops

NAME = "qc_trace"
"""The attention implementation, and the namespace of the markers that stand for our ops during a trace."""


@torch.library.custom_op(f"{NAME}::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, scale_in_fp32: bool) -> Tensor:
    raise AssertionError("a marker is never run")


@torch.library.custom_op(f"{NAME}::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    raise AssertionError("a marker is never run")


@torch.library.custom_op(f"{NAME}::attention_mask", mutates_args=())
def _attention_mask(attention_mask: Tensor, kind: str, window: int | None) -> Tensor:
    raise AssertionError("a marker is never run")


@torch.library.custom_op(f"{NAME}::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool, softcap: float | None
) -> Tensor:
    raise AssertionError("a marker is never run")


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, scale_in_fp32: bool) -> Tensor:
    return torch.empty_like(x)


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.empty_like(x)


@_attention_mask.register_fake
def _(attention_mask: Tensor, kind: str, window: int | None) -> Tensor:
    batch, length = attention_mask.shape
    return attention_mask.new_empty((batch, 1, length, length), dtype=torch.bool)


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool, softcap: float | None
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


MARKERS: dict[Any, Callable[..., Any]] = {
    getattr(torch.ops.qc_trace, name).default: ops.OPS[f"qc.{name}"]
    for name in ("rms_norm", "rope", "attention_mask", "attention")
}
"""Marker -> the op it stands for."""


@contextmanager
def kept_whole(model: nn.Module) -> Iterator[None]:
    """Trace ``model`` inside of this, and its norms, rotary embeddings, attention and masks come out as markers."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention_hook)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask_hook)
    found = [getattr(m, "config", None) for m in model.modules()]
    configs: list[Any] = [c for c in found if hasattr(c, "_attn_implementation")]
    before = [(config, config._attn_implementation) for config in configs]
    with ExitStack() as stack:
        for module in _norms(model):
            stack.enter_context(mock.patch.object(module, "forward", _norm_marker(module)))
        for module in _tanh_gelus(model):
            stack.enter_context(mock.patch.object(module, "forward", _tanh_gelu))
        for owner, name, function in _rotary_functions(model):
            stack.enter_context(mock.patch.object(owner, name, _rope_marker(function)))
        for config in configs:
            config._attn_implementation = NAME
        try:
            yield
        finally:
            for config, implementation in before:
                config._attn_implementation = implementation


def supports_hooks(model: nn.Module) -> bool:
    """Whether this architecture calls its attention through the table of transformers."""
    return bool(getattr(model, "_supports_attention_backend", False))


# -- norms ----------------------------------------------------------------------------------------------------------


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    known: dict[tuple[Any, ...], tuple[bool, bool] | None] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        eps = _eps(module)
        parameters = list(module.parameters(recurse=False))
        if eps is None or isinstance(module, nn.LayerNorm) or any(module.children()) or len(parameters) > 1:
            continue
        if len(parameters) == 1 and (parameters[0] is not weight or weight.dim() != 1):
            continue
        key = (type(module), eps, None if weight is None else tuple(weight.shape))
        if key not in known:
            known[key] = _probe_norm(module, eps)
        if known[key] is not None:
            module._qc_norm = known[key]  # type: ignore[assignment]
            yield module


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon", "norm_eps"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    return None


def _probe_norm(module: nn.Module, eps: float) -> tuple[bool, bool] | None:
    """The flags of ``rms_norm`` under which it equals ``module`` to the bit, or None."""
    weight = getattr(module, "weight", None)
    width = weight.shape[0] if weight is not None else 24
    generator = torch.Generator().manual_seed(0)
    real = copy.deepcopy(module).to_empty(device="cpu")
    values = torch.randn(width, generator=generator)
    for flags in ((False, False), (False, True), (True, False)):
        agree = True
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(3, 2, width, generator=generator).to(dtype)
            w = None if weight is None else values.to(dtype)
            if w is not None:
                real.weight = nn.Parameter(w)
            try:
                theirs = real(x)
            except (RuntimeError, TypeError, ValueError):
                return None
            if not isinstance(theirs, Tensor):
                return None
            ours = ops.rms_norm(x, w, eps, *flags)
            agree = agree and ours.dtype == theirs.dtype and torch.equal(ours, theirs.detach())
        if agree:
            return flags
    return None


def _norm_marker(module: nn.Module) -> Callable[[Tensor], Tensor]:
    eps, flags = _eps(module), module._qc_norm
    assert eps is not None and isinstance(flags, tuple)

    def forward(x: Tensor) -> Tensor:
        return _rms_norm(x, getattr(module, "weight", None), eps, *flags)

    return forward


# -- activations ----------------------------------------------------------------------------------------------------


def _tanh_gelus(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that spell out the tanh form of GELU (arXiv:1606.08415), which torch has as one op."""
    known: dict[type, bool] = {}
    x = torch.linspace(-6, 6, 241)
    for module in model.modules():
        if type(module).__module__ != "transformers.activations" or any(True for _ in module.parameters()):
            continue
        if type(module) not in known:
            theirs = copy.deepcopy(module)(x)
            ours = torch.nn.functional.gelu(x, approximate="tanh")
            known[type(module)] = torch.allclose(theirs, ours, atol=2e-6, rtol=1e-6)
        if known[type(module)]:
            yield module


def _tanh_gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


# -- rotary embeddings ----------------------------------------------------------------------------------------------


def _rotary_functions(model: nn.Module) -> Iterator[tuple[Any, str, bool]]:
    """The functions ``(q, k, cos, sin) -> (q, k)`` of the model's source modules, and whether they interleave."""
    for name in sorted({type(m).__module__ for m in model.modules()}):
        if "transformers" not in name:
            continue
        owner = importlib.import_module(name)
        function = getattr(owner, "apply_rotary_pos_emb", None)
        if function is None:
            continue
        interleaved = _probe_rope(function)
        if interleaved is not None:
            yield owner, "apply_rotary_pos_emb", interleaved


def _probe_rope(function: Callable[..., Any]) -> bool | None:
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(1, 5, 4, generator=generator)
    for interleaved in (False, True):
        table = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
        agree = True
        for dtype in (torch.float32, torch.bfloat16):
            cos, sin = table.cos().to(dtype), table.sin().to(dtype)
            q = torch.randn(2, 4, 5, 8, generator=generator).to(dtype)
            k = torch.randn(2, 2, 5, 8, generator=generator).to(dtype)
            try:
                theirs = function(q, k, cos, sin)
            except (RuntimeError, TypeError, ValueError, IndexError):
                return None
            ours = (ops.rope(q, cos, sin, interleaved), ops.rope(k, cos, sin, interleaved))
            agree = agree and all(
                a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
                for a, b in zip(theirs, ours, strict=True)
            )
        if agree:
            return interleaved
    return None


def _rope_marker(interleaved: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert not args and kwargs.get("unsqueeze_dim", 1) == 1, "a rotary layout that was not probed"
        return _rope(q, cos, sin, interleaved), _rope(k, cos, sin, interleaved)

    return apply


# -- attention and its mask -----------------------------------------------------------------------------------------


def _attention_hook(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if kwargs.get("position_bias") is not None or kwargs.get("s_aux") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    return _attention(query, key, value, attention_mask, scaling, causal, softcap), None


def _mask_hook(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    kind = None if attention_mask is None or mask_function is None else _kind_of(mask_function, local_size)
    if kind is None or q_offset or kv_offset:
        rule: dict[str, Any] = {} if mask_function is None else {"mask_function": mask_function}
        said = {
            **kwargs,
            **rule,
            "attention_mask": attention_mask,
            "local_size": local_size,
            "allow_is_causal_skip": False,
        }
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **said)
    assert attention_mask is not None
    return _attention_mask(attention_mask, *kind)


def _kind_of(mask_function: Callable[..., Any], local_size: int | None) -> tuple[str, int | None] | None:
    """The ``kind`` and ``window`` of our mask that equals ``mask_function``, or None."""
    size = 2 * (local_size or 24) + 5
    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        rows = torch.tensor(sorted({0, 1, 2, size // 4, size // 2 - 1, size // 2, size // 2 + 1, size - 3, size - 1}))
        try:
            q, k = rows[:, None], torch.arange(size)[None, :]
            zero = torch.zeros((), dtype=torch.long)
            theirs = mask_function(zero, zero, q, k).expand(len(rows), size)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return None
        twos = torch.full((1, size), 2)  # one whole document, but not all ones: for all ones there is no mask
        for kind in ("causal", "bidirectional"):
            for window in dict.fromkeys((None, local_size, _reach(theirs, rows))):
                ours = ops.attention_mask(twos, kind, window)
                assert ours is not None
                if torch.equal(theirs, ours[0, 0][rows]):
                    return kind, window
    return None


def _reach(mask: Tensor, rows: Tensor) -> int | None:
    """How far back the last row looks, as a window."""
    seen = mask[-1].nonzero()
    return int(rows[-1] - seen.min()) + 1 if len(seen) else None
