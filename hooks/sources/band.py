"""What kernels do to logits by position alone: diagonals, windows, lengths, ALiBi; and packed sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Band:
    """Row i of T sees the keys j of S with `i + shift - left ≤ j ≤ i + shift + right`.

    Attributes:
        shift: where the diagonal starts: 0 at the upper left, `S - T` at the lower right; `[B]` on the device
            where sequences differ.
        left: keys to see before the diagonal; None for all.
        right: keys to see behind it; None for all.
        rows: length of each sequence of queries, `[B]`; None where all are whole.
        keys: likewise of keys.
        slopes: of ALiBi, `[H]` or `[B, H]`: `-slope · |i + shift - j|` is added.
    """

    shift: int | Tensor = 0
    left: int | None = None
    right: int | None = None
    rows: Tensor | None = None
    keys: Tensor | None = None
    slopes: Tensor | None = None

    def __call__(
        self, logits: Tensor, batch: slice, heads: slice, rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits `[b, h, r, S]` of some sequences, heads and rows, ALiBi added; and which keys are hidden."""
        i = rows[:, None]
        j = torch.arange(logits.shape[-1], device=logits.device)
        shift = self.shift if isinstance(self.shift, int) else self.shift[batch, None, None, None]
        distance = j - i - shift  # [b or none, 1 or none, r, S]
        hidden: list[Tensor] = []
        if self.left is not None:
            hidden.append(distance < -self.left)
        if self.right is not None:
            hidden.append(distance > self.right)
        if self.keys is not None:
            hidden.append(j >= self.keys[batch, None, None, None])
        if self.rows is not None:
            hidden.append((i >= self.rows[batch, None, None, None]).expand(-1, -1, -1, len(j)))
        if self.slopes is not None:
            slopes = self.slopes if self.slopes.dim() == 2 else self.slopes[None]
            slopes = slopes[batch if len(slopes) > 1 else slice(None), heads, None, None].to(logits.dtype)
            logits = logits - slopes * distance.abs()
        together = None
        for part in hidden:
            part = part.expand((1,) * (4 - part.dim()) + part.shape)
            together = part if together is None else together | part
        return logits, together


def unpacked(packed: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Packed sequences `[total, H, D]` as `[B, H, longest, D]`, 0 behind the end of each; and lengths, `[B]`.

    Args:
        packed: sequences one after the other.
        starts: where each starts, and the last ends, `[B + 1]`.
        longest: at least the length of the longest.
    """
    starts = starts.to(packed.device, torch.int64)
    lengths = starts.diff()
    place = torch.arange(longest, device=packed.device)
    inside = place < lengths[:, None]
    index = (starts[:-1, None] + place).where(inside, torch.zeros_like(place))
    if not len(packed):
        return packed.new_zeros(len(lengths), packed.shape[1], longest, packed.shape[2]), lengths
    whole = packed.detach()[index].where(
        inside[..., None, None], torch.zeros((), dtype=packed.dtype, device=packed.device)
    )
    return whole.transpose(1, 2), lengths
