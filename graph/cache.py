"""A key/value cache in a decoder's graph: what it reads of the past, and the buffers that hold the past.

Inputs that the rewrite adds, all of which may be left out (then there is no past, and the graph is the one before):

past_mask         int [B, N]   the past's attention mask: N slots are filled, 0 is padding
first_position    int [B]      the position of each row's first new token; without it N, padding counted. A batch
                               padded on the left subtracts its padding here: learned positions then start at 0
past_key_i, past_value_i   [B, kv_heads, S, d]   room for S >= N + T slots at the i-th attention

``qc.update_cache`` writes the new keys into the buffer it is given and returns a view of the filled part. It is the
one op that changes an argument: a pure one would copy the whole cache at each token. The buffer is an input that
nothing else reads, so no other value of the graph depends on when that happens.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graph.core import Graph
from graph.errors import QcError
from graph.ops import attention_mask as mask_of
from graph.ops import op, op_name
from graph.shapes import dims_of
from graph.sites import Site, node_name
from graph.tokenwise import FIX, from_mask_alone, mixing, refuse, sizes_of

# -- the ops --------------------------------------------------------------------------------------------------------


@op
def update_cache(new: Tensor, cache: Tensor | None, past_mask: Tensor | None) -> Tensor:
    """Write ``new`` behind the N filled slots of ``cache``, in place, and return all that is filled.

    new: [B, kv_heads, T, d]    cache: [B, kv_heads, S, d] or None    past_mask: [B, N] or None
    ->  [B, kv_heads, N + T, d] in the dtype of ``new``; ``new`` itself where there is no cache
    """
    past = 0 if past_mask is None else past_mask.shape[1]
    if cache is None:
        assert past == 0, "a past without its keys"
        return new
    end = past + new.shape[2]
    assert end <= cache.shape[2], f"a cache of {cache.shape[2]} slots cannot hold {end}"
    cache[:, :, past:end] = new
    return cache[:, :, :end].to(new.dtype)


@op
def positions(input_ids: Tensor, past_mask: Tensor | None, first_position: Tensor | None) -> Tensor:
    """The position of every new token.

    input_ids: [B, T]    past_mask: [B, N] or None    first_position: [B] or None  ->  int64 [B or 1, T]
    """
    past = 0 if past_mask is None else past_mask.shape[1]
    steps = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if first_position is None:
        return steps + past
    return (first_position[:, None] + steps).clamp(min=0)  # padding on the left lies before position 0


@op
def running_sum(x: Tensor, past_mask: Tensor | None) -> Tensor:
    """The sums of a mask up to each new token, those of the past included.

    x: [B, T]    past_mask: [B, N] or None  ->  int64 [B, T]
    """
    sums = x.cumsum(1)
    return sums if past_mask is None else sums + past_mask.sum(1, keepdim=True).to(sums.dtype)


@op
def cached_attention_mask(
    attention_mask: Tensor, past_mask: Tensor | None, kind: str = "causal", window: int | None = None
) -> Tensor | None:
    """Which keys of past and present each new query may look at; as ``attention_mask``, whose last rows it is.

    attention_mask: int or bool [B, T]    past_mask: [B, N] or None  ->  bool [B, 1, T, N + T]

    None, the fast path, where nothing but the future is hidden and there is no past, or there is but one query.
    """
    assert kind == "causal", "only a decoder has a past"
    if past_mask is None or past_mask.shape[1] == 0:
        return mask_of(attention_mask, kind, window)
    past, length = past_mask.shape[1], attention_mask.shape[1]
    keys = torch.cat((past_mask.to(attention_mask.dtype), attention_mask), dim=1)
    reached = window is None or past < window
    if length == 1 and reached and keys.device.type == "cpu" and type(keys) is Tensor and bool((keys == 1).all()):
        return None
    q = torch.arange(past, past + length, device=keys.device)[:, None]
    k = torch.arange(past + length, device=keys.device)[None, :]
    near = k <= q if window is None else (k <= q) & (k > q - window)
    seen = near[None, None] & keys.bool()[:, None, None, :]
    if keys.dtype == torch.bool:
        return seen
    queries = attention_mask[:, None, :, None]
    return seen & ((queries == keys[:, None, None, :]) | (queries == 0))


# -- the rewrite ----------------------------------------------------------------------------------------------------


def has_cache(graph: Graph) -> bool:
    """Whether the graph reads a past."""
    return "past_mask" in graph.inputs


def obstacles(graph: Graph) -> list[QcError]:
    """Why the graph cannot be given a past; nothing where it can."""
    attentions = graph.sites("qc.attention")
    if graph.kind == "encoder" or {"input_ids", "attention_mask"} - set(graph.inputs):
        return [QcError("only a decoder of tokens can have a key/value cache", fix="leave insert-kv-cache out")]
    if not attentions:
        return [QcError("the attention of this model is not one op, so its keys cannot be cached", fix=FIX)]
    found = [error for site in attentions if (error := _unlike_attention(site))]
    handled = {site.name for site in attentions} | {node_name(n) for n in _masks(attentions)}
    handled |= {node_name(n) for pair in _position_pairs(graph) for n in pair} | {node_name(n) for n in _sums(graph)}
    return found + [error for site in graph.sites() if site.name not in handled and (error := mixing(site))]


def insert_cache(graph: Graph) -> list[str]:
    """Let every attention read and write a cache; return their sites, none if they do so already.

    Raises QcError with the first site, where a value would differ with the past not there.
    """
    if has_cache(graph):
        return []
    for error in obstacles(graph):
        raise error
    past_mask = graph.add_input("past_mask", torch.empty(0, dtype=torch.long), dims=("B", "N"))
    first = graph.add_input("first_position", torch.empty(0, dtype=torch.long), dims=(1,))
    ids = _input(graph, "input_ids")
    for arange, row in _position_pairs(graph):
        shifted = graph.insert(positions, ids, past_mask, first, name=f"{_owner(arange)}positions", before=arange)
        row.replace_all_uses_with(shifted)
    for node in _sums(graph):
        node.replace_all_uses_with(
            graph.insert(running_sum, node.args[0], past_mask, name=f"{_owner(node)}running_sum", before=node)
        )
    attentions = graph.sites("qc.attention")
    for mask in _masks(attentions):
        _widen(graph, mask, past_mask)
    for i, site in enumerate(attentions):
        for at, what in ((1, "key"), (2, "value")):
            _cache(graph, site, at, f"past_{what}_{i}", what, past_mask)
    graph.module.graph.eliminate_dead_code()
    _broadcast_positions(graph, first)
    graph.verify()
    return [site.name for site in attentions]


def _widen(graph: Graph, mask: fx.Node, past_mask: fx.Node) -> None:
    source, *kind = mask.args
    name = node_name(mask).replace("attention_mask", "cached_attention_mask")
    wide = graph.insert(cached_attention_mask, source, past_mask, *kind, name=name, before=mask, role="attn.mask")
    mask.replace_all_uses_with(wide)


def _cache(graph: Graph, site: Site, at: int, name: str, what: str, past_mask: fx.Node) -> None:
    new = site.input(at)
    value = new.meta["val"]
    buffer = graph.add_input(name, torch.empty(0, dtype=value.dtype), dims=("B", value.shape[1], "S", value.shape[3]))
    label = f"{site.name}.{what}"
    filled = graph.insert(update_cache, new, buffer, past_mask, name=label, before=site.node, role="attn.core")
    site.set_input(at, filled)


def _broadcast_positions(graph: Graph, first: fx.Node) -> None:
    """See that positions may differ from row to row, then type them as one row for all, as they were."""
    graph.shapes.type_input(first, torch.long, ("B",))
    for node in _moved(graph, first):
        if op_name(node.target) in ("qc.attention", "qc.update_cache"):
            raise refuse(Site(graph, node), "changes its shape when positions differ from row to row")
    graph.shapes.type_input(first, torch.long, (1,))
    _moved(graph, first)


def _moved(graph: Graph, start: fx.Node) -> list[fx.Node]:
    """Type anew what reads ``start``; return the nodes whose type that changed."""
    changed, waiting = [], {user for user in start.users}
    for node in graph.module.graph.nodes:
        if node not in waiting or node.op != "call_function":
            continue
        before = sizes_of(node)
        try:
            graph.shapes.type_call(node)
        except RuntimeError as error:  # what torch raises of shapes that do not go together
            why = f"fails when positions differ from row to row ({str(error).splitlines()[0]})"
            raise refuse(Site(graph, node), why) from None
        if sizes_of(node) != before:
            changed.append(node)
            waiting |= set(node.users)
    return changed


# -- finding the places ---------------------------------------------------------------------------------------------


def _unlike_attention(site: Site) -> QcError | None:
    """Why this attention cannot have a past."""
    args = [*site.node.args, *[None] * 7][:7]
    q, k, mask, causal = args[0], args[1], args[3], args[5]
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    if causal is False:
        return refuse(site, "looks at the future, so a token's keys change with what follows")
    if dims_of(q)[2] != "T" or dims_of(k)[2] != "T" or dims_of(k)[0] != "B":
        return refuse(site, f"has keys of the shape [{', '.join(dims_of(k))}], not [B, heads, T, d]")
    if mask is None:
        return refuse(site, "has no mask that could be widened to the past")
    assert isinstance(mask, fx.Node)
    kind = mask.args[1] if len(mask.args) > 1 else "causal"
    if not _is_mask(mask) or kind != "causal" or not from_mask_alone(mask.args[0]):
        return refuse(site, f"has a mask of its own making, {node_name(mask)}")
    return None


def _is_mask(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and op_name(node.target) == "qc.attention_mask"


def _masks(attentions: list[Site]) -> list[fx.Node]:
    found = [arg for site in attentions for arg in site.node.args[3:4]]
    return list(dict.fromkeys(arg for arg in found if isinstance(arg, fx.Node) and _is_mask(arg)))


def _position_pairs(graph: Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Each ``arange(T)`` whose only use is a row ``unsqueeze(…, 0)``, and that row."""
    found = []
    for site in graph.sites("aten.arange"):
        users = list(site.node.users)
        plain = len(site.node.args) == 1 and site.value.dtype == torch.long and dims_of(site.node) == ("T",)
        if plain and len(users) == 1 and op_name(users[0].target) == "aten.unsqueeze" and users[0].args[1] in (0, -2):
            found.append((site.node, users[0]))
    return found


def _sums(graph: Graph) -> list[fx.Node]:
    """Each ``cumsum`` of the attention mask along the tokens."""
    sums = [s.node for s in graph.sites("aten.cumsum")]
    return [n for n in sums if n.args[1] in (1, -1) and dims_of(n) == ("B", "T") and from_mask_alone(n.args[0])]


def _input(graph: Graph, name: str) -> fx.Node:
    return next(n for n in graph.module.graph.nodes if n.op == "placeholder" and n.target == name)


def _owner(node: fx.Node) -> str:
    owner, slash, _ = node_name(node).rpartition("/")
    return owner + slash


# -- the buffers ----------------------------------------------------------------------------------------------------


class Cache:
    """The buffers of a graph that ``insert_cache`` rewrote, and how much of them is filled."""

    def __init__(self, graph: Graph, batch: int, slots: int):
        self.graph, self.filled = graph, 0
        self.mask = torch.zeros(batch, slots, dtype=torch.long, device=graph.device)
        self.buffers: dict[str, Tensor] = {}
        for site in graph.sites("qc.update_cache"):
            new, buffer = site.input(0).meta["val"], site.input(1)
            shape = (batch, new.shape[1], slots, new.shape[3])
            self.buffers[str(buffer.target)] = torch.empty(shape, dtype=new.dtype, device=graph.device)

    def run(
        self, input_ids: Tensor, attention_mask: Tensor, first_position: Tensor | None = None, **memory: Tensor
    ) -> Tensor:
        """The logits [B, T, V] of new tokens [B, T] behind those that went before, whose keys and values are kept.

        ``memory`` are further inputs of the graph, the same at every call.
        """
        past = self.mask[:, : self.filled]
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "first_position": first_position}
        logits: Tensor = self.graph(**given, past_mask=past, **self.buffers, **memory)
        end = self.filled + input_ids.shape[1]
        self.mask[:, self.filled : end] = attention_mask
        self.filled = end
        return logits
