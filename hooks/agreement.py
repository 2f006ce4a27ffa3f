"""Whether queries or keys are what a projection makes, up to rotary embeddings and norms: told from values.

Of a sample of tokens the vectors that entered attention are compared with those that the projection makes.
They agree where they are the same up to one factor and a vector added to each head's; where the norm of every
vector is, up to a factor of each head, for rotary embeddings keep norms; or where they are the same after a
norm (of root mean square, or LayerNorm, over each head or over all of them) with a gain and an offset of each
feature, and rotary embeddings after it. These turn two features i and i + o into each other:
`s_i² + s_{i+o}²` is linear in the squares and products of gains and offsets, a least-squares fit with many
more numbers than unknowns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ENOUGH = 16  # numbers that have to agree up to one factor
_NORMS = 4  # norms of each head
_SPARE = 3  # numbers more than unknowns, in a fit of each of many features
_ROWS = 512  # of a fit, at most
_SMALL_HEAD = 32  # features of a head up to which every distance between turned features is tried
_EPSILONS = (1e-6, 1e-5)  # of norms


def agree_up_to_factor(seen: Tensor, made: Tensor, tolerance: float) -> bool:
    """Whether `seen` is c times `made`: relative error over all of both."""
    ratio = (seen * made).sum() / made.square().sum()
    return bool((seen - ratio * made).norm() <= tolerance * seen.norm())


@torch.no_grad()
def agree(seen: Tensor, made: Tensor, tolerance: float) -> bool | None:
    """Whether `seen` comes from `made` by no more than a factor, rotary embeddings and norms. Waits.

    Args:
        seen: `[B, H, T, D]`, what entered attention.
        made: `[B, H, T, D]`, what the projection makes of the same tokens.
        tolerance: relative.

    Returns:
        None where there are too few numbers to tell, or none to compare.
    """
    seen, made = seen.cpu().double(), made.cpu().double()
    nothing = not bool(made.any()) or not bool(seen.any())
    if seen.numel() < _ENOUGH or nothing or not bool(seen.isfinite().all() & made.isfinite().all()):
        return None
    if agree_up_to_factor(seen, made, tolerance):
        return True
    tokens = seen.shape[0] * seen.shape[2]
    if tokens < _NORMS:
        return None
    ratio = (seen * seen).sum(-1).sqrt(), (made * made).sum(-1).sqrt()
    if _proportional(*ratio, tolerance):
        return True
    if agree_up_to_factor(_centred(seen), _centred(made), tolerance):  # a learned vector was added
        return True
    if _partly_scaled(seen, made, tolerance):
        return True
    enough = True
    for normed, offset, of_each_head in _normed(made):
        verdict = _fits(seen, normed, offset, of_each_head, tolerance)
        if verdict:
            return True
        enough &= verdict is not None
    return False if enough else None


def _centred(x: Tensor) -> Tensor:
    return x - x.mean((0, 2), keepdim=True)


def _proportional(seen: Tensor, made: Tensor, tolerance: float) -> bool:
    """Whether `[B, H, T]` agree up to a factor of each head."""
    power = made.square().sum((0, 2), keepdim=True)
    ratio = (seen * made).sum((0, 2), keepdim=True) / power.clamp(min=1e-300)
    return bool((seen - ratio * made).norm() <= tolerance * seen.norm())


def _partly_scaled(seen: Tensor, made: Tensor, tolerance: float) -> bool:
    """Whether some features are as they were made and the others were turned and scaled together."""
    error = (seen - made).square().sum((0, 1, 2)).sqrt()
    same = error <= tolerance * seen.square().sum((0, 1, 2)).sqrt()
    if not same.any() or same.all():
        return False
    return _proportional(seen[..., ~same].norm(dim=-1), made[..., ~same].norm(dim=-1), tolerance)


def _normed(made: Tensor) -> Iterator[tuple[Tensor, bool, bool]]:
    """Vectors after each kind of norm; whether it may have offsets; whether gains may differ among heads."""
    for centre in (False, True):
        for dims in ((-1,), (1, -1)):
            x = made - made.mean(dims, keepdim=True) if centre else made
            power = x.square().mean(dims, keepdim=True)
            for epsilon in _EPSILONS:
                normed = x * (power + epsilon).rsqrt()
                if dims == (-1,):
                    yield normed, centre, False
                yield normed, centre, True


def _fits(seen: Tensor, made: Tensor, offset: bool, of_each_head: bool, tolerance: float) -> bool | None:
    """Whether gains (and offsets) of each feature, and turns of pairs of features, explain `seen`."""
    s, u = (_samples(x, of_each_head) for x in (seen, made))  # [N, groups, D]
    if s.shape[0] < (5 if offset else 2) + _SPARE:
        return None
    size = s.square().sum(0).sqrt()
    columns = [u, torch.ones_like(u)] if offset else [u]
    alone = _residual(torch.stack(columns, -1), s) <= tolerance * size  # [groups, D]
    if alone.all():
        return True
    for o in _offsets(s.shape[-1]):
        a, b = u[..., :-o], u[..., o:]
        energy = s[..., :-o].square() + s[..., o:].square()
        columns = [a.square(), b.square()]
        if offset:
            columns += [a, b, torch.ones_like(a)]
        turned = _residual(torch.stack(columns, -1), energy) <= 4 * tolerance * energy.square().sum(0).sqrt()
        explained = alone.clone()
        explained[..., :-o] |= turned
        explained[..., o:] |= turned
        if explained.all():
            return True
    return False


def _samples(x: Tensor, of_each_head: bool) -> Tensor:
    """`[B, H, T, D]` as `[N, groups, D]`, groups being the heads or a single one; at most so many rows."""
    x = x.transpose(1, 2).flatten(0, 1)
    x = x if of_each_head else x.flatten(0, 1).unsqueeze(1)
    return x[:: max(1, x.shape[0] // _ROWS)]


def _residual(design: Tensor, goal: Tensor) -> Tensor:
    """What a least-squares fit leaves of `goal` `[N, …]` by `design` `[N, …, unknowns]`: its norm, `[…]`."""
    scale = design.square().sum(0).sqrt().clamp(min=1e-300)
    a = (design / scale).movedim(0, -2)
    y = goal.movedim(0, -1).unsqueeze(-1)
    gram = a.mT @ a + 1e-12 * torch.eye(a.shape[-1], dtype=a.dtype)
    left = y - a @ torch.linalg.solve(gram, a.mT @ y)
    norm: Tensor = torch.linalg.vector_norm(left, dim=(-2, -1))
    return norm


def _offsets(d: int) -> list[int]:
    """Distances of two features that rotary embeddings turn into each other, the likeliest first."""
    likely = [d // 2, 1, d // 4, d // 8, 3 * d // 8, d // 3, d // 6, 8, 16, 24, 32, 48, 64]
    if d <= _SMALL_HEAD:
        likely += range(1, d // 2 + 1)
    return list(dict.fromkeys(o for o in likely if 1 <= o <= d // 2))
