"""How exact a contender's entropies are, against float64, and what it does to the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from cost_contenders import BASE, CONTENDERS
from cost_plain import Plain, Setting
from models import ByteModel, Shape, batch_of_text
from torch import Tensor, nn

COLLAPSED = 0.1  # share of its maximum below which a head's entropy counts as collapsed
TRAINING_RATE = 3e-2  # some thirty times too high
SOUND_RATE = 1e-3
_FIRST_SEED = 1000  # of batches that nothing else uses
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


def trained(setting: Setting, steps: int) -> Mapping[str, Tensor]:
    """Weights after some steps at a sound rate, each on another batch."""
    training = Plain(replace(setting, rate=SOUND_RATE, batches=1, compiled=False))
    for step in range(steps):
        _train(training, step)
    return _weights(training)


def collapsed(setting: Setting, most_steps: int) -> tuple[Mapping[str, Tensor], int, str]:
    """Train at a far too high rate until half of the heads have collapsed, or the steps are over.

    Returns:
        The weights, how many heads have collapsed, and a remark that says so.
    """
    training = Plain(replace(setting, rate=TRAINING_RATE, batches=1, compiled=False))
    shape = setting.shape
    places = torch.arange(1, shape.tokens + 1, dtype=torch.float64)
    most = places.log().mean()
    step = few = 0
    while True:
        share = _entropies(training, step) / most
        few = int((share < COLLAPSED).sum())
        if 2 * few >= share.numel() or step >= most_steps:
            break
        _train(training, step)
        step += 1
    remark = (
        f"{few} of {share.numel()} heads are below {COLLAPSED:.0%} of their largest entropy after {step} "
        f"steps at learning rate {TRAINING_RATE:g}; the lowest at {share.min():.1%}"
    )
    return _weights(training), few, remark


def _train(training: Plain, step: int) -> None:
    x, y = batch_of_text(training.setting.shape, _FIRST_SEED + step)
    training.batches = [(x.to(training.setting.device), y.to(training.setting.device))]
    training.train()


def _entropies(training: Plain, step: int) -> Tensor:
    """Of the batch that comes next, `[layers, heads]`."""
    oracle = Oracle(training.model)
    x, _ = batch_of_text(training.setting.shape, _FIRST_SEED + step)
    with torch.no_grad(), training.precision():
        training.model(x.to(training.setting.device))
    for block in training.model.blocks:
        block.attn.observers.clear()
    return oracle.entropies()[0]


def _weights(training: Plain) -> Mapping[str, Tensor]:
    return {name: t.detach().cpu().clone() for name, t in training.model.state_dict().items()}
