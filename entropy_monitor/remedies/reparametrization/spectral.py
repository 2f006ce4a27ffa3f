"""The parametrization `Ŵ = (γ / σ(W)) W` of one weight (Zhai et al. 2023, section 3.2).

σ(W) = uᵀWv. u and v are buffers that follow the weight by power iteration, once an optimizer step
(`stepping`), so that forwards only read them. The gradient goes through σ with u and v held fixed, which is
the exact gradient of ‖W‖₂ where they are its singular vectors.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo as _never_traced

from entropy_monitor.hooks.sharding import is_sharded
from entropy_monitor.measures._precision import working_dtype
from entropy_monitor.measures.singular import top_singular_vectors
from entropy_monitor.remedies.reparametrization import stepping
from entropy_monitor.remedies.reparametrization.power_iteration import iterate
from entropy_monitor.remedies.reparametrization.scaling import copied_beside, scaled_weight, sigma_of

MARK = "entropy_monitor_gamma"
"""Attribute of every γ, and key of the parameter groups that hold γ and nothing else."""

_MOVES_IN_A_STEP = 2  # forwards in training at new weights, before somebody else must be moving them


class SpectralScale(nn.Module):
    """Holds γ, u and v of a weight, and scales it.

    The weight is taken as a matrix of its first dimension by all others, as it is stored. Its *lines* are
    rows, or columns where it is stored transposed; a fused projection may have groups of lines, each with a σ
    and γ of its own.

    Args:
        weight: of the layer.
        preserve: γ = σ(W), so that Ŵ = W; otherwise γ = 1.
        learn: whether γ is a parameter.
        group: which group each line belongs to, `[rows, 1]` for rows or `[1, columns]` for columns; None for
            one.

    Attributes:
        gamma: `[groups]`, float32 (float64 for float64 weights); a DTensor where the weight is one, so that
            an optimizer may treat them together.
        u: left singular vector `[rows]`; `[groups, rows]` where columns are grouped.
        v: right singular vector `[columns]`; `[groups, columns]` where rows are grouped.
        norms: spectral norms that the groups had when this was made.
        stepped: when an optimizer's step was last followed, -1 for never; see `stepping`.
        serial: place in the order in which they were made.
        waits: whether the next forward in training has to follow the weight.
    """

    gamma: Tensor
    u: Tensor
    v: Tensor
    group: Tensor | None

    def __init__(
        self, weight: Tensor, *, preserve: bool, learn: bool = True, group: Tensor | None = None
    ) -> None:
        super().__init__()
        u, sigma, v = singular_vectors(weight.detach(), group)
        self.register_buffer("u", u)
        self.register_buffer("v", v)
        self.register_buffer("group", group)
        self.norms = tuple(sigma.tolist())
        gamma = sigma if preserve else torch.ones_like(sigma)
        if learn:
            gamma = copied_beside(weight, gamma) if is_sharded(weight) else gamma
            self.gamma = nn.Parameter(gamma, requires_grad=weight.requires_grad)
            setattr(self.gamma, MARK, True)
        else:
            self.register_buffer("gamma", gamma)
        self._home: tuple[weakref.ref[nn.Module], str] | None = None
        self._seen: tuple[weakref.ref[Tensor], int] | None = None
        self._fresh: tuple[int, Tensor, Tensor] | None = None
        self._moved = (-1, 0)  # last version seen behind, and how many since u and v last followed
        self.stepped = -1
        self.serial = 0
        self.waits = False

    @property
    def is_learned(self) -> bool:
        """Whether γ is a parameter."""
        return "gamma" in self._parameters

    @property
    def weight(self) -> Tensor | None:
        """W of the layer that this is part of; None where that is gone."""
        holder = self.holder
        return None if holder is None else holder.original

    @property
    def holder(self) -> Any:
        """The module whose parameter W is, `layer.parametrizations.…`; None where that is gone."""
        layer = None if self._home is None else self._home[0]()
        if layer is None or self._home is None:
            return None
        lists = getattr(layer, "parametrizations", {})
        if self._home[1] not in lists:
            return None
        return lists[self._home[1]]

    def settle(self, layer: nn.Module, tensor: str) -> None:
        """Become part of a layer: from here on u and v follow its weight."""
        self._home = (weakref.ref(layer), tensor)
        self.note_weight()
        stepping.follow(self)

    def note_weight(self) -> None:
        """Take the weight, as it is now, for the one that u and v belong to."""
        weight = self.weight
        if weight is not None:
            self._seen = (weakref.ref(weight), _version(weight))
        self._fresh = None
        self._moved = (-1, 0)

    def forward(self, weight: Tensor) -> Tensor:
        """Ŵ of W."""
        u, v = self.u, self.v
        if torch.compiler.is_compiling():
            if self.waits and self.training and torch.is_grad_enabled():
                self._catch_up(weight)
        elif self.waits or self._is_behind(weight):
            if self.training and torch.is_grad_enabled():
                if self.waits or self._is_stepped_by_others(weight):
                    self._catch_up(weight)
            else:
                u, v = self._fresh_vectors(weight)
        return scaled_weight(weight, self.gamma, u, v, self.group)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take another weight, as `layer.weight = …` does; γ = σ, so that the layer computes with it."""
        if self._home is not None:
            u, sigma, v = singular_vectors(weight.detach(), self.group)
            self.u.copy_(u)
            self.v.copy_(v)
            if self.is_learned:
                self.gamma.copy_(laid_out_as(sigma, self.gamma))
        return weight

    def extra_repr(self) -> str:
        """Groups and whether γ is learned."""
        groups = "" if self.group is None else f"groups={self.gamma.shape[0]}, "
        return f"{groups}gamma={'learned' if self.is_learned else 'fixed'}"

    @_never_traced
    def _catch_up(self, weight: Tensor) -> None:
        """Follow the weight now; breaks compiled code in two, but only where FSDP1 leaves no other time."""
        iterate([(self, weight)])
        self.note_weight()
        self.waits = False

    def _is_behind(self, weight: Tensor) -> bool:
        """Whether the weight was changed since u and v last followed it, as far as its version tells.

        Not known of a stand-in for it: FSDP's gathered one, one that `functional_call` puts in.
        """
        if self._seen is None or self._seen[0]() is not weight:
            return False
        return _version(weight) != self._seen[1]

    def _is_stepped_by_others(self, weight: Tensor) -> bool:
        """Whether no optimizer of torch's says when a step was made, never or no longer.

        Within its step one may move a weight there and back, as sharpness-aware ones do.
        """
        if _version(weight) != self._moved[0]:
            self._moved = (_version(weight), self._moved[1] + 1)
        if self._moved[1] > _MOVES_IN_A_STEP:
            self.stepped = -1
        return self.stepped < 0

    def _fresh_vectors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of a weight that was changed outside training, as an average is; buffers stay."""
        version = _version(weight)
        if self._fresh is None or self._fresh[0] != version:
            if not torch.isfinite(whole(weight.detach())).all():
                return self.u, self.v  # NaN comes out, as of a plain layer
            u, _, v = singular_vectors(weight.detach(), self.group)
            self._fresh = (version, u, v)
        return self._fresh[1], self._fresh[2]

    def _buffers_of_now(self) -> dict[str, Tensor | None]:
        """Buffers that belong to the weight as it is, for whoever gets both: an average left them behind."""
        weight = self.weight
        if weight is None or not self._is_behind(weight):
            return self._buffers
        u, v = self._fresh_vectors(weight)
        return {**self._buffers, "u": u, "v": v}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        of_now = self._buffers_of_now()
        if of_now is not self._buffers:
            destination.update({f"{prefix}{name}": of_now[name] for name in ("u", "v")})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        weight = self.weight
        if f"{prefix}u" not in state_dict and weight is not None and self._is_behind(weight):
            u, v = self._fresh_vectors(weight)  # only parameters were kept
            self.u.copy_(u)
            self.v.copy_(v)
        self.note_weight()  # the weight came just before, and u and v belong to it

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralScale:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__getstate__(), memo)
        layer = None if self._home is None else memo.get(id(self._home[0]()))
        weight = memo.get(id(self.weight))
        if layer is not None and self._home is not None:
            made._home = (weakref.ref(layer), self._home[1])
            made._seen = None if weight is None else (weakref.ref(weight), _version(weight))
            stepping.follow(made)
        made.stepped = -1
        if made.is_learned:
            setattr(made.gamma, MARK, True)
        return made

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.update(_home=None, _seen=None, _fresh=None, _buffers=self._buffers_of_now())
        return state


@torch.no_grad()
def singular_vectors(weight: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """u, σ `[groups]` and v of a weight, as `SpectralScale` keeps them; plain tensors for a DTensor too."""
    matrix = whole(weight).flatten(1)
    if group is None:
        u, _, v = top_singular_vectors(matrix)
    else:
        by_rows = group.shape[1] == 1
        lines = matrix if by_rows else matrix.t()
        index = group.flatten()
        along = lines.new_zeros(lines.shape[0], dtype=working_dtype(lines))
        across = []
        for g in range(int(index.max()) + 1):
            left, _, right = top_singular_vectors(lines[index == g])
            along[index == g] = left
            across.append(right)
        u, v = (along, torch.stack(across)) if by_rows else (torch.stack(across), along)
    sigma, _, _ = sigma_of(matrix, u, v, group)
    return u, sigma.reshape(-1), v


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


def whole(tensor: Tensor) -> Tensor:
    """A tensor as a plain one; gathered where processes have parts of it."""
    full: Any = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def laid_out_as(x: Tensor, other: Any) -> Tensor:
    """A whole tensor in the layout of another one: plain, or what this process holds of it as a DTensor.

    Nothing is exchanged: every process has the whole already.
    """
    if not is_sharded(other):
        return x
    laid: Tensor = copied_beside(other, x).redistribute(placements=other.placements)
    return laid
