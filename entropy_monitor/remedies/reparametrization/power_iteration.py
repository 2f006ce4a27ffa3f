"""One step of power iteration for many weights: `u ← Wv / ‖Wv‖`, `v ← Wᵀu / ‖Wᵀu‖` (Miyato et al. 2018).

Small weights of one shape on an accelerator go together, since there each launch costs more than the product;
weights that are split over processes as DTensors exchange two sums of vectors, all of them in one message.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_monitor.hooks.sharding import held, is_sharded
from entropy_monitor.measures._precision import MAX_BYTES, exact, working_dtype

if TYPE_CHECKING:
    from entropy_monitor.remedies.reparametrization.spectral import SpectralScale

    Pair = tuple[SpectralScale, Tensor]

_CHUNKS = {"Shard": 0, "_StridedShard": 1}  # placements, in the order in which they divide a weight
_SMALL = 4 * 2**20  # bytes of a weight below which copying it costs less than a launch of its own


@torch.no_grad()
def iterate(pairs: Sequence[Pair]) -> None:
    """Move u and v of each by one step towards the singular vectors of its weight.

    Vectors whose image is zero or not finite stay as they are, so that a zero weight keeps a start to go on
    from.

    Args:
        pairs: each with its weight; DTensors in the same order on every process.
    """
    split: list[Pair] = []
    here: list[Pair] = []
    alike: dict[Any, list[Pair]] = {}
    for scale, weight in pairs:
        if is_sharded(weight):
            split.append((scale, weight))
        elif scale.group is not None:
            _step_groups(scale, weight, scale.group)
        elif weight.device.type == "cpu":
            here.append((scale, weight))
        elif weight.nbytes <= _SMALL:
            alike.setdefault((weight.shape, weight.dtype, weight.device), []).append((scale, weight))
        else:
            _step(scale, weight)
    if here:
        _step_here(here)
    for together in alike.values():
        for chunk in _chunks(together):
            _step_stacked(chunk)
    if split:
        _step_split(split)


def _step_here(pairs: Sequence[Pair]) -> None:
    """On the CPU: both products while the weight is in the cache, and norms that can be looked at."""
    us, vs = [], []
    with exact(pairs[0][1].device):
        for scale, weight in pairs:
            w = weight.flatten(1).to(working_dtype(weight))
            us.append(torch.mv(w, scale.v.to(w.dtype)))
            vs.append(torch.mv(w.t(), us[-1]))
    norms = torch._foreach_norm(us + vs)
    if all(0 < float(norm) < math.inf for norm in norms):
        buffers = [s.u for s, _ in pairs] + [s.v for s, _ in pairs]
        torch._foreach_copy_(buffers, torch._foreach_div(us + vs, norms))
    else:
        for scale, weight in pairs:
            _step(scale, weight)


def _step(scale: SpectralScale, weight: Tensor) -> None:
    with exact(weight.device):
        w = weight.flatten(1).to(working_dtype(weight))
        u = _normalised(torch.mv(w, scale.v.to(w.dtype)), scale.u.to(w.dtype))
        v = _normalised(torch.mv(w.t(), u), scale.v.to(w.dtype))
        scale.u.copy_(u)
        scale.v.copy_(v)


def _step_stacked(pairs: Sequence[Pair]) -> None:
    scales = [scale for scale, _ in pairs]
    with exact(pairs[0][1].device):
        w = torch.stack([weight.flatten(1) for _, weight in pairs])
        w = w.to(working_dtype(w))
        u, v = (torch.stack([getattr(s, name).to(w.dtype) for s in scales]) for name in ("u", "v"))
        u = _normalised(torch.bmm(w, v[..., None])[..., 0], u)
        v = _normalised(torch.bmm(w.mT, u[..., None])[..., 0], v)
    torch._foreach_copy_([s.u for s in scales] + [s.v for s in scales], [*u.unbind(), *v.unbind()])


def _step_groups(scale: SpectralScale, weight: Tensor, group: Tensor) -> None:
    by_rows = group.shape[1] == 1
    index = group.flatten()
    with exact(weight.device):
        w = weight.flatten(1).to(working_dtype(weight))
        lines = w if by_rows else w.t()
        along, across = (x.to(w.dtype) for x in ((scale.u, scale.v) if by_rows else (scale.v, scale.u)))
        images = (lines @ across.t()).gather(1, index[:, None])[:, 0]
        squares = images.new_zeros(len(across)).index_add(0, index, images * images)
        norms = squares.sqrt()[index]
        along = torch.where(_usable(norms), images / norms, along)
        parts = images.new_zeros(across.shape[1], len(across)).index_add(
            1, index, (lines * along[:, None]).t()
        )
        across = _normalised(parts.t(), across)
        scale.u.copy_(along if by_rows else across)
        scale.v.copy_(across if by_rows else along)


def _step_split(pairs: Sequence[Pair]) -> None:
    """Products with local parts, summed over the processes that hold the others."""
    together: dict[Any, list[Pair]] = {}
    for scale, weight in pairs:
        dims = _split_dims(weight)
        if scale.group is not None or dims is None:
            _step_whole(scale, weight)
        else:
            mesh: Any = getattr(weight, "device_mesh", None)
            together.setdefault((mesh, dims), []).append((scale, weight))
    for (mesh, dims), those in together.items():
        scales = [scale for scale, _ in those]
        parts = [_Part(weight) for _, weight in those]
        us, vs = ([getattr(s, n) for s in scales] for n in ("u", "v"))
        with exact(parts[0].w.device):
            images = _summed([p.image(v) for p, v in zip(parts, vs, strict=True)], mesh, dims)
            us = [_normalised(y, u.to(y.dtype)) for y, u in zip(images, us, strict=True)]
            images = _summed([p.image_back(u) for p, u in zip(parts, us, strict=True)], mesh, dims)
            vs = [_normalised(z, v.to(z.dtype)) for z, v in zip(images, vs, strict=True)]
        for scale, u, v in zip(scales, us, vs, strict=True):
            scale.u.copy_(u)
            scale.v.copy_(v)


def _step_whole(scale: SpectralScale, weight: Any) -> None:
    """Gather a weight that is split in a way of its own, or has groups of lines."""
    whole = weight.full_tensor()
    if scale.group is None:
        _step(scale, whole)
    else:
        _step_groups(scale, whole, scale.group)


class _Part:
    """The part of a weight that this process holds, and where it lies in the whole matrix."""

    def __init__(self, weight: Tensor) -> None:
        first = _first_held(weight)
        local = held(weight)
        inner = weight.shape[1:].numel()
        self.shape = (weight.shape[0], inner)
        self.w = local.reshape(local.shape[0], local.shape[1:].numel()).to(working_dtype(local))
        self.rows = slice(first[0], first[0] + local.shape[0])
        start = first[1] * (inner // weight.shape[1])
        self.columns = slice(start, start + self.w.shape[1])

    def image(self, v: Tensor) -> Tensor:
        """This part's share of Wv."""
        out = self.w.new_zeros(self.shape[0])
        out[self.rows] = torch.mv(self.w, v[self.columns].to(self.w.dtype))
        return out

    def image_back(self, u: Tensor) -> Tensor:
        """This part's share of Wᵀu."""
        out = self.w.new_zeros(self.shape[1])
        out[self.columns] = torch.mv(self.w.t(), u[self.rows])
        return out


def _split_dims(weight: Any) -> tuple[int, ...] | None:
    """Mesh dimensions over which a weight is split by rows or columns; None where it is split otherwise."""
    split = [(i, p) for i, p in enumerate(weight.placements) if not p.is_replicate()]
    if all(type(p).__name__ in _CHUNKS and p.dim % weight.dim() < 2 for _, p in split):
        return tuple(i for i, _ in split)
    return None


def _first_held(weight: Any) -> tuple[int, int]:
    """Where the part of a weight that this process holds begins: row, and index in the second dimension.

    Each split is one of `torch.chunk`; those of tensor parallel come before those of FSDP, though a mesh
    names them after (`_StridedShard`).
    """
    offset, size = [0, 0], list(weight.shape[:2])
    split = [(i, p) for i, p in enumerate(weight.placements) if not p.is_replicate()]
    for i, placement in sorted(split, key=lambda found: _CHUNKS[type(found[1]).__name__]):
        dim = placement.dim % weight.dim()
        part = -(-size[dim] // weight.device_mesh.size(i))
        before = min(weight.device_mesh.get_local_rank(i) * part, size[dim])
        offset[dim] += before
        size[dim] = min(part, size[dim] - before)
    return offset[0], offset[1]


def _summed(vectors: Sequence[Tensor], mesh: Any, dims: Iterable[int]) -> list[Tensor]:
    """Each vector summed over the processes of some mesh dimensions, in one message a dimension and dtype."""
    out = list(vectors)
    for dtype in sorted({v.dtype for v in vectors}, key=str):
        at = [i for i, v in enumerate(vectors) if v.dtype == dtype]
        flat = torch.cat([vectors[i] for i in at])
        for dim in dims:
            torch.distributed.all_reduce(flat, group=mesh.get_group(dim))
        for i, piece in zip(at, torch.split(flat, [len(vectors[i]) for i in at]), strict=True):
            out[i] = piece
    return out


def _normalised(x: Tensor, instead: Tensor) -> Tensor:
    """Vectors `[..., n]` of norm 1; those of `instead` where that cannot be."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(_usable(norm), x / norm, instead)


def _usable(norm: Tensor) -> Tensor:
    return (norm > 0) & (norm < torch.inf)


def _chunks(pairs: Sequence[Pair]) -> Iterable[Sequence[Pair]]:
    size = max(1, MAX_BYTES // max(1, pairs[0][1].nbytes))
    return (pairs[i : i + size] for i in range(0, len(pairs), size))
