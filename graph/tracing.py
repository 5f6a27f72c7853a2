"""From a model to its graph: trace on ``meta``, clean up, name, bind the weights."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from graph.binding import bind_live, bind_packed, fill_in_computed
from graph.canonical import clean
from graph.checkpoint import open_checkpoint
from graph.core import Graph, TensorInfo
from graph.encoder import has_encoder_alone
from graph.errors import QcError
from graph.leaves import kept_whole, supports_hooks
from graph.repeat import repeat, shorter
from graph.shapes import HINTS
from graph.sites import NORMS, Malformed, annotate

Kind = Literal["causal-lm", "encoder"]
M = TypeVar("M", bound=nn.Module)

TRACE_DTYPE = torch.bfloat16
"""Tracing in bf16 tells the casts to fp32, which stay, from those to the model's own dtype, which follow it."""


def capture(
    model: nn.Module | str | Any,
    *,
    dtype: torch.dtype | None = None,
    kind: Kind | None = None,
    canonical: bool = True,
    weights: bool = True,
) -> Graph:
    """Capture a transformers model, a folder with one, ``hf:org/name``, or a configuration, as a graph.

    ``graph(input_ids=[B, T], attention_mask=[B, T])`` gives the logits [B, T, vocabulary] of a causal language model
    or the last hidden state [B, T, d] of an encoder, for any batch and length. Of a folder nothing but config and
    file headers is read; the weights follow when they are asked for. Of a configuration there are no weights: the
    graph is a plan (``graph.lazy()`` is empty, all tensors ``meta``). With ``canonical=False`` no norm, rotary
    embedding or attention is recognised: the graph is what the model's own code does, op by op.

    Weights that a folder holds packed stay packed, and are read. Without ``weights``, of a folder too there is no more
    than a plan.
    """
    from transformers import PreTrainedConfig, PreTrainedModel

    if isinstance(model, PreTrainedModel):
        with _told():
            return bind_live(_trace(model.config, kind or _kind_of(model), canonical)[0], model, dtype)
    if isinstance(model, PreTrainedConfig):
        if getattr(model, "quantization_config", None):
            what = "the configuration is of packed weights, and without them nobody knows how they are packed"
            raise QcError(what, fix="give the folder with the weights, or take quantization_config out of config.json")
        graph, empty = _trace(model, kind or _kind_of_config(model), canonical)
        return fill_in_computed(_typed(graph, dtype or torch.float32), empty)
    if isinstance(model, nn.Module):
        raise QcError(
            f"{type(model).__name__} is not a transformers model",
            fix="capture a plain module with qc.capture_module(module, *example)",
        )
    checkpoint = open_checkpoint(str(model), packed=True)
    own = checkpoint.dtype  # tracing changes what the configuration says
    graph, empty = _trace(checkpoint.config, kind or _kind_of_config(checkpoint.config), canonical)
    if checkpoint.packed:
        return bind_packed(_typed(graph, dtype or own), checkpoint, empty, weights)
    if not weights:
        return fill_in_computed(_typed(graph, dtype or torch.float32), empty)
    if checkpoint.is_converted(empty):  # a tensor of the graph is no tensor of the files: transformers makes it
        loaded = type(empty).from_pretrained(checkpoint.folder, dtype=checkpoint.dtype, local_files_only=True)
        with _told():
            return bind_live(graph, loaded.eval(), dtype)
    _typed(graph, dtype or own)
    graph.stored = checkpoint.bind(graph, empty)
    fill_in_computed(graph, empty)
    graph.verify()
    return graph


def capture_module(module: nn.Module, *example: Tensor) -> Graph:
    """Capture any module of fixed shapes, weights and all, on ``example`` inputs."""
    exported = torch.export.export(module.eval(), example, strict=False).module(check_guards=False)
    assert isinstance(exported, fx.GraphModule)
    clean(exported, prefix="", trace_dtype=None)
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    infos = {
        name: TensorInfo(
            kind="parameter" if isinstance(value, nn.Parameter) else "buffer", trainable=value.requires_grad
        )
        for name, value in named.items()
    }
    graph = Graph(exported.graph, dict(named), infos, blocks=annotate(exported.graph))
    _tag_tensors(graph)
    for node, value in zip([n for n in graph.module.graph.nodes if n.op == "placeholder"], example, strict=True):
        graph.shapes.type_constant(node, value)
    graph.propagate()
    graph.verify()
    return graph


# -- tracing --------------------------------------------------------------------------------------------------------


class _Wrapped(nn.Module):
    """The model behind the two inputs and the one output of a graph."""

    def __init__(self, model: nn.Module, output: str):
        super().__init__()
        self.model, self.output = model, output

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return getattr(self.model(input_ids=input_ids, attention_mask=attention_mask, **self.extra()), self.output)

    def extra(self) -> dict[str, Any]:
        return {"use_cache": False} if self.output == "logits" else {}


class _NumbersOnCpu(TorchFunctionMode):
    """A tensor made out of a number keeps its value: it is made on the CPU, where one number may meet any device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and args and isinstance(args[0], (int, float)):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _trace(config: Any, kind: Kind, canonical: bool) -> tuple[Graph, Any]:
    model = on_meta(config, kind, TRACE_DTYPE)
    tensors, infos = _meta_tensors(model)
    short = shorter(config, model)
    exported = None if short is None else _exported(on_meta(short[0], kind, TRACE_DTYPE), kind, canonical)
    if exported is None or short is None or not repeat(exported.graph, short[1], config.num_hidden_layers, tensors):
        exported = _exported(model, kind, canonical)
    _merge_tied(exported.graph, infos)
    _adopt_constants(exported, tensors, infos)
    if canonical:
        _turn_upright(exported.graph, tensors, infos)
    graph = Graph(
        exported.graph,
        tensors,
        infos,
        dtype=TRACE_DTYPE,
        config=_plain(config),
        kind=kind,
        blocks=annotate(exported.graph),
    )
    _tag_tensors(graph)
    for node in graph.module.graph.nodes:
        if node.op == "placeholder":
            graph.shapes.type_input(node, torch.long, ("B", "T"))
    return graph, model


def _exported(model: Any, kind: Kind, canonical: bool) -> fx.GraphModule:
    """What torch.export makes of a model, cleaned up."""
    wrapped = _Wrapped(model, "logits" if kind == "causal-lm" else "last_hidden_state").eval()
    ids = torch.ones(HINTS, dtype=torch.long, device="meta")
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    hooks = kept_whole(model) if canonical and supports_hooks(model) else contextlib.nullcontext()
    with hooks, _NumbersOnCpu(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                wrapped,
                (ids, ids.clone()),
                dynamic_shapes={"input_ids": dynamic, "attention_mask": dynamic},
                strict=False,
            )
        except Exception as error:  # torch.export raises dozens of types; the user sees one
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise QcError(
                f"{type(model).__name__} cannot be captured: {first[:200]}",
                fix="its forward decides by values, not shapes; see docs/models.md for the architectures that work",
            ) from error
    exported = program.module(check_guards=False)
    assert isinstance(exported, fx.GraphModule)
    clean(exported, prefix="model.", trace_dtype=TRACE_DTYPE)
    return exported


def _typed(graph: Graph, dtype: torch.dtype) -> Graph:
    """The graph in ``dtype``."""
    with _told():
        return graph.to(dtype)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Inside, a configuration whose sizes contradict each other is an error, and so is an op that this torch lacks."""
    log = logging.getLogger("torch._subclasses.fake_tensor")  # which writes the traceback of every such op
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except Malformed as error:
        said = str(error).splitlines()[0]
        if "not implemented for" in said:
            fix = "see docs/models.md for the architectures that work"
            raise QcError(f"the model cannot be captured: {said}", fix=fix, site=error.site) from None
        what = f"the sizes in config.json do not go together: {said}"
        raise QcError(what, fix="repair config.json, or fetch it again", site=error.site) from None
    finally:
        log.setLevel(level)


def _plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON has it, without where it came from and how this process runs it."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in found.items() if not key.startswith("_")}


def on_meta(config: Any, kind: Kind, dtype: torch.dtype) -> Any:
    """The model of ``config`` without weights."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTextEncoding

    maker: Any = AutoModelForCausalLM if kind == "causal-lm" else AutoModel
    if kind == "encoder" and has_encoder_alone(config):
        maker = AutoModelForTextEncoding
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = maker.from_config(config, dtype=dtype)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QcError(
            f"transformers cannot build a {kind} of {type(config).__name__}: {first[:300]}", fix="check config.json"
        ) from error
    return model.eval().requires_grad_(False)


def _kind_of(model: nn.Module) -> Kind:
    return (
        "causal-lm"
        if hasattr(model, "lm_head") or type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        else "encoder"
    )


def _kind_of_config(config: Any) -> Kind:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    named = config.architectures or []
    if named:
        return "causal-lm" if any(n in CAUSAL.values() and not n.startswith("Bert") for n in named) else "encoder"
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    return "causal-lm" if config.model_type in CAUSAL and config.model_type not in MASKED else "encoder"


def _meta_tensors(model: Any) -> tuple[dict[str, Tensor], dict[str, TensorInfo]]:
    """Every tensor of the model once, under the name that checkpoints use."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    names: dict[int, list[str]] = {}
    values: dict[int, Tensor] = {}
    for name, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(value), []).append(name)
        values[id(value)] = value
    unsaved = {
        f"{path}.{leaf}" if path else leaf
        for path, m in model.named_modules()
        for leaf in m._non_persistent_buffers_set
    }
    tensors, infos = {}, {}
    for key, all_names in names.items():
        kept = next((n for n in all_names if n not in tied), all_names[0])
        value = values[key]
        kind: Literal["parameter", "buffer"] = "parameter" if isinstance(value, nn.Parameter) else "buffer"
        tensors[kept] = value
        infos[kept] = TensorInfo(
            kind=kind,
            aliases=tuple(n for n in all_names if n != kept),
            saved=kept not in unsaved,
            pinned=kind == "buffer" and value.dtype != TRACE_DTYPE,
        )
    return tensors, infos


def _merge_tied(nodes: fx.Graph, infos: dict[str, TensorInfo]) -> None:
    kept = {alias: name for name, info in infos.items() for alias in info.aliases}
    for node in nodes.nodes:
        if node.op == "get_attr" and node.target in kept:
            node.target = kept[node.target]


def _tag_tensors(graph: Graph) -> None:
    """Each tensor takes role and block from the op that reads it; a tied one from its first reader."""
    for site in reversed(graph.sites()):
        for arg in site.node.all_input_nodes:
            if arg.op == "get_attr":
                role = "norm" if site.op in NORMS else site.role  # a norm may be its block's output too
                graph.set_info(str(arg.target), role=role, block=site.block)


def _turn_upright(nodes: fx.Graph, tensors: dict[str, Tensor], infos: dict[str, TensorInfo]) -> None:
    """``addmm(b, x, W)`` over a weight stored [in, out] becomes ``linear(x, W, b)`` over the same weight [out, in]."""
    products = [n for n in nodes.nodes if n.op == "call_function" and n.target is torch.ops.aten.addmm.default]
    for node in products:
        bias, x, weight = node.args[:3]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(node.args) > 3 or node.kwargs:
            continue
        name = str(weight.target)
        readers = [user for n in nodes.nodes if n.op == "get_attr" and n.target == name for user in n.users]
        if infos[name].transposed or infos[name].aliases or readers != [node]:
            continue
        node.target, node.args = torch.ops.aten.linear.default, (x, weight, bias)
        tensors[name] = nn.Parameter(tensors[name].t(), requires_grad=False)
        infos[name] = replace(infos[name], transposed=True)


def _adopt_constants(exported: fx.GraphModule, tensors: dict[str, Tensor], infos: dict[str, TensorInfo]) -> None:
    """Tensors that the model's code makes out of plain numbers become buffers of the graph."""
    for node in exported.graph.nodes:
        if node.op == "get_attr" and node.target not in tensors:
            owner, _, leaf = f"model.{node.target}".rpartition(".")
            value = getattr(exported.get_submodule(owner), leaf)
            assert isinstance(value, Tensor), f"the constant {node.target} is no tensor"
            if value.is_meta:
                raise QcError(
                    f"the model's code makes a tensor out of numbers at {node.target}; without weights they are lost",
                    fix="this architecture cannot be captured; see docs/models.md for those that can",
                )
            tensors[str(node.target)] = value
            infos[str(node.target)] = TensorInfo(kind="buffer", saved=False, pinned=value.dtype != TRACE_DTYPE)
