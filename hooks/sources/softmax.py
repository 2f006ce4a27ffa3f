"""Source: softmax attention written by hand: `torch.softmax`, `F.softmax`, `nn.Softmax` and other spellings.

A softmax is taken for attention when its logits come from a product of two activations (`q @ k.mT`, `bmm`,
`baddbmm`, `einsum`) and it runs over what only one of them has: routers, gates and vocabularies do not, for
their logits come from a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from entropy_monitor.hooks.arrangement import Arrangement
from entropy_monitor.hooks.calls import Inputs, Seen
from entropy_monitor.hooks.logits import Logits
from entropy_monitor.hooks.site import Site
from entropy_monitor.hooks.unread import UnreadError

NAME = "softmax"
GIVES_WEIGHTS = True
FUNCTIONS = (
    F.softmax,
    torch.softmax,
    Tensor.softmax,
    torch.special.softmax,
    torch._softmax,
    torch.ops.aten.softmax,
    torch.ops.aten.softmax.int,
    torch.ops.aten._softmax,
    torch.ops.aten._softmax.default,
)


def logits_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int] | None:
    """The tensor that a softmax call normalises, and along which dimension, counted from 0."""
    tensor = args[0] if args else kwargs.get("input", kwargs.get("self"))
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(tensor, Tensor) or not isinstance(dim, int) or tensor.dim() < 2:
        return None
    return tensor, dim % tensor.dim()


def is_over_keys(dim: int, known: Logits) -> bool:
    """Whether a dimension of logits can be the keys: not one that both operands of their product have."""
    name = known.names[dim]
    return not name or known.contraction.operand(name) is not None


def read_by_hand(logits: Tensor, dim: int, heads: int | None) -> Seen:
    """A softmax of which nothing but its logits is known."""
    logits = logits.movedim(dim, -1)
    n = logits.dim() - 2
    swapped = n == 2 and heads is not None and heads > 1 and logits.shape[1] != heads == logits.shape[2]
    if swapped:
        return Seen(NAME, None, logits=logits.transpose(1, 2))
    plain = Arrangement((0,), ()) if n == 1 else Arrangement(tuple(range(n - 1)), (n - 1,) if n else ())
    return Seen(NAME, None, logits=plain.apply(logits))


def read(args: tuple[Any, ...], kwargs: dict[str, Any], site: Site) -> Seen | None:
    """A softmax over a product of two activations, or in a module named by hand; see `sources.Source`."""
    found = logits_of(args, kwargs)
    if found is None:
        return None
    logits, dim = found
    known = site.logits_of(logits)
    if known is not None and is_over_keys(dim, known):
        return read_product(logits, dim, known, site)
    if site.by_hand:
        return read_by_hand(logits, dim, site.heads)
    why = (
        "its logits are no product of two activations"
        if known is None
        else "that dimension is neither the queries' nor the keys' of the product behind its logits"
    )
    raise UnreadError(f"softmax of shape {list(logits.shape)} over dimension {dim}: {why}")


def read_product(logits: Tensor, dim: int, known: Logits, site: Site) -> Seen:
    """Logits, or what was made of them element by element, as `[B, H, T, S]`, and the q and k behind them.

    Args:
        logits: of any arrangement.
        dim: which dimension runs over keys.
        known: how they were made.
        site: where they are used.
    """
    product = known.contraction
    key_name = known.names[dim]
    side = product.operand(key_name) if key_name else None
    if side is None:
        return read_by_hand(logits, dim, site.heads)
    keys, key_names = side
    from_left = keys is product.left and key_names == product.left_names
    queries, query_names = (
        (product.right, product.right_names) if from_left else (product.left, product.left_names)
    )
    key_origin, query_origin = known.origins if from_left else known.origins[::-1]
    alone = [n for n in query_names if n in known.names and product.operand(n) is not None]
    rows_over = [n for n in alone if not site.is_inner(queries, query_names.index(n))] or alone
    if not rows_over:
        return read_by_hand(logits, dim, site.heads)
    row_name = max(rows_over, key=known.names.index)
    ends = row_name + key_name
    whole = "" not in known.names
    lead = [n for n in (known.names if whole else product.out) if n not in ends]
    q = _permuted(queries, query_names, [*lead, row_name, product.contracted])
    k = _permuted(keys, key_names, [*lead, key_name, product.contracted])
    sizes = [max(a, b) for a, b in zip(q.shape[:-2], k.shape[:-2], strict=True)]
    q = q.expand(*sizes, *q.shape[-2:])
    places = [known.names.index(n) for n in ends]
    logits = logits.permute(*(i for i in range(logits.dim()) if i not in places), *places)
    arrangement = site.arrange(q, query_origin)
    if not whole:
        regrouped = _regrouped(logits, q, arrangement)
        if regrouped is None:
            return read_by_hand(logits, logits.dim() - 1, site.heads)
        arrangement, logits = regrouped
    shaped = arrangement.apply(logits.expand(*sizes, *logits.shape[-2:]))
    query, key = arrangement.apply(q), arrangement.apply_to_keys(k, q)
    explains = query.shape[2] == shaped.shape[2] and key.shape[2] == shaped.shape[3]
    return Seen(
        NAME,
        Inputs(query, key, scale=known.scale, inner=known.inner) if explains else None,
        logits=shaped,
        tensors={"query": query, "key": key},
        origins={"query": query_origin, "key": key_origin},
        extra_keys=not explains,
    )


def _permuted(tensor: Tensor, names: str, wanted: list[str]) -> Tensor:
    """`tensor` with its dimensions in the wanted order, and size 1 for those that it lacks."""
    for missing in (n for n in wanted if n not in names):
        tensor, names = tensor.unsqueeze(-1), names + missing
    return tensor.permute([names.index(n) for n in wanted])


def _regrouped(logits: Tensor, q: Tensor, arrangement: Arrangement) -> tuple[Arrangement, Tensor] | None:
    """Logits whose leading dimensions were split or joined since the product, grouped as the query's are."""
    lead = logits.shape[:-2]
    if lead.numel() != q.shape[:-2].numel():
        return None
    if q.dim() == 3 and len(lead) == 2 and not arrangement.folded:
        arrangement = Arrangement((), (), folded=lead[1])
    return arrangement, logits.reshape(*q.shape[:-2], *logits.shape[-2:])
