"""How exact a contender's entropies are, against float64, and what it does to the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from cost_contenders import BASE, CONTENDERS, Plain, Setting
from models import ByteModel, Shape, batch_of_text
from torch import Tensor, nn

COLLAPSED = 0.1  # share of its maximum below which a head's entropy counts as collapsed
TRAINING_RATE = 3e-2  # some thirty times too high
_LOOK_EVERY = 5
_PROBE = Shape(layers=2, width=64, heads=4, tokens=32, batch=4)
_PROBE_DROPOUT = 0.1


class Oracle:
    """Keeps q and k of the training's forwards, and takes entropies from them in float64."""

    def __init__(self, model: ByteModel) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._layers = len(model.blocks)
        for block in model.blocks:
            block.attn.observers.append(partial(self._keep, block.attn))

    def _keep(self, module: nn.Module, q: Tensor, k: Tensor, *_: Tensor) -> None:
        if module.training:
            self._kept.append((q.detach(), k.detach()))

    def entropies(self) -> Tensor:
        """`[forwards, layers, heads]`: mean over sequences and query rows, nats."""
        values = torch.stack([_entropy(q, k) for q, k in self._kept])
        return values.view(-1, self._layers, values.shape[-1])


def _entropy(q: Tensor, k: Tensor) -> Tensor:
    unseen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    means = []
    for head in range(q.shape[1]):  # a head at a time: its maps alone are large
        logits = q[:, head].double() @ k[:, head].double().mT * q.shape[-1] ** -0.5
        a = logits.masked_fill(unseen, -torch.inf).softmax(-1)
        means.append(torch.special.entr(a).sum(-1).mean())
    return torch.stack(means).cpu()


def errors(name: str, setting: Setting, steps: int) -> tuple[Tensor, int]:
    """Reported minus true entropies at learning rate 0, `[steps, layers, heads]`, nats; and the rows read."""
    setting = replace(setting, rate=0.0, batches=steps, every=1, compiled=False)
    contender = CONTENDERS[name](setting)
    oracle = Oracle(contender.model)
    try:
        for _ in range(steps):
            contender.measured()
        return contender.entropies() - oracle.entropies(), contender.rows_read
    finally:
        contender.close()


@dataclass(frozen=True)
class Effects:
    """What watching does to the training, measured on a small model with and without dropout of 0.1."""

    weights_differ: bool
    differ_with_dropout: bool
    random_state_moved: bool
    dropout_error: float  # nats, largest over heads, all rows of the training's own forward as truth

    def __str__(self) -> str:
        found = []
        if self.weights_differ:
            found.append("training not bit-identical")
        elif self.differ_with_dropout:
            found.append("training with dropout not bit-identical")
        if self.random_state_moved:
            found.append("moves the random state")
        found.append(f"off by up to {self.dropout_error:.1g} nats with dropout {_PROBE_DROPOUT}")
        return "; ".join(found)


def effects(name: str, device: str) -> Effects:
    """Three measured steps from one seed, beside the plain ones."""
    setting = Setting(_PROBE, device=device, batches=3, every=1, weights=_sharp())
    differ = []
    for dropout in (0.0, _PROBE_DROPOUT):
        pair, states = [], []
        for which in (BASE, name):
            contender = CONTENDERS[which](replace(setting, dropout=dropout))
            oracle = Oracle(contender.model)
            torch.manual_seed(1)
            for _ in range(3):
                contender.measured()
            states.append(torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state())
            pair.append([p.detach().clone() for p in contender.model.parameters()])
            off = (contender.entropies() - oracle.entropies()).abs().max() if which != BASE else None
            contender.close()
        differ.append(not all(torch.equal(a, b) for a, b in zip(*pair, strict=True)))
        moved = not torch.equal(*states)
    return Effects(*differ, moved, float(off))


def _sharp() -> Mapping[str, Tensor]:
    """Weights with larger logits than at initialisation, where no head tells one key from another."""
    torch.manual_seed(0)
    weights = ByteModel(_PROBE).state_dict()
    return {name: t * (6 if "qkv.weight" in name else 1) for name, t in weights.items()}


def collapsed(setting: Setting, most_steps: int) -> tuple[Mapping[str, Tensor], str]:
    """Weights of a model trained at a far too high rate until half its heads have collapsed, and a remark."""
    training = Plain(replace(setting, rate=TRAINING_RATE, batches=1, compiled=False))
    shape = setting.shape
    places = torch.arange(1, shape.tokens + 1, dtype=torch.float64)
    most = places.log().mean()
    share = torch.ones(shape.layers, shape.heads)
    for step in range(1, most_steps + 1):
        x, y = batch_of_text(shape, 1000 + step)
        training.batches = [(x.to(setting.device), y.to(setting.device))]
        look = step % _LOOK_EVERY == 0 or step == most_steps
        oracle = Oracle(training.model) if look else None
        training.measured()
        if oracle is not None:
            share = oracle.entropies()[0] / most
            for block in training.model.blocks:
                block.attn.observers.clear()
            if (share < COLLAPSED).float().mean() >= 0.5:
                break
    few = int((share < COLLAPSED).sum())
    remark = (
        f"{step} steps at learning rate {TRAINING_RATE:g}: {few} of {share.numel()} heads below "
        f"{COLLAPSED:.0%} of their largest entropy, the lowest at {share.min():.1%}"
    )
    return {name: t.detach().cpu().clone() for name, t in training.model.state_dict().items()}, remark
