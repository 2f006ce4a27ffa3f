"""A watched training equals the same training unwatched, to the bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from entropy_monitor import EntropyMonitor
from tests.training import (
    ATTENTIONS,
    WIDTH,
    FusedAttention,
    SeparateAttention,
    Tiny,
    TorchAttention,
    batches,
    tiny,
)

STEPS = 7
Optimizers = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Mode:
    """How a training is run."""

    attention: type[nn.Module] = SeparateAttention
    dropout: float = 0.1
    optimizer: Optimizers = lambda p: torch.optim.AdamW(p, 0.01)
    autocast: torch.dtype | None = None
    scaler: bool = False
    accumulate: int = 1
    checkpointing: Literal["no", "reentrant", "plain"] = "no"
    evaluate: bool = False
    clip: bool = False
    lengths: bool = False
    model: Callable[[], nn.Module] | None = None


class Checkpointed(nn.Module):
    """A block that is computed again in the backward pass."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor) -> Tensor:
        out = checkpoint(self.block, x, use_reentrant=self.reentrant)
        assert isinstance(out, Tensor)
        return out


class Encoder(nn.Module):
    """`nn.TransformerEncoder`, which has a fast path of its own in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, -2:] = True
        return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])


class Seq2Seq(nn.Module):
    """`nn.Transformer`: self and cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(WIDTH, 2, 1, 1, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.net(x, x, tgt_mask=mask, tgt_is_causal=True).mean(1))


class Language(nn.Module):
    """A language model of `transformers`, which also generates: with a cache, and drawing tokens."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            vocab_size=11,
            n_positions=32,
            n_embd=WIDTH,
            n_layer=2,
            n_head=2,
            bos_token_id=1,
            eos_token_id=None,
        )
        self.lm = transformers.GPT2LMHeadModel(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm(inputs_embeds=x).logits[:, -1, :3]

    def continued(self, x: Tensor) -> Tensor:
        """Tokens that follow."""
        options = {"max_new_tokens": 4, "do_sample": True, "pad_token_id": 0}
        return self.lm.generate(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]), **options)


def adapted() -> nn.Module:
    """LoRA adapters, and the model behind them frozen."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q", "k", "v"], lora_dropout=0.1)
    return peft.get_peft_model(Tiny(SeparateAttention, 0.1), config)


def frozen() -> nn.Module:
    """The first attention does not learn, nor do the keys of the second."""
    model = Tiny(SeparateAttention, 0.1)
    model.blocks[0].requires_grad_(False)
    model.blocks[1].k.requires_grad_(False)
    return model


def tied() -> nn.Module:
    """Layers that share the weights of q and k."""
    model = Tiny(SeparateAttention, 0.1)
    model.blocks[1].q.weight, model.blocks[1].k.weight = model.blocks[0].q.weight, model.blocks[0].k.weight
    return model


def shared() -> nn.Module:
    """One attention that runs as every layer."""
    model = Tiny(SeparateAttention, 0.1)
    model.blocks[1] = model.blocks[0]
    return model


class Normed(nn.Module):
    """Batch norm, whose buffers every forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.net = nn.BatchNorm1d(WIDTH), Tiny(FusedAttention, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.bn(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return build()

    return make


MODES = {
    "plain": Mode(dropout=0.0),
    **{f"dropout in {a.__name__}": Mode(attention=a) for a in ATTENTIONS},
    "bf16 autocast": Mode(autocast=torch.bfloat16),
    "fp16 autocast, scaler": Mode(autocast=torch.float16, scaler=True),
    "scaler": Mode(scaler=True),
    "scaler, fused": Mode(scaler=True, optimizer=lambda p: torch.optim.AdamW(p, 0.01, fused=True)),
    "accumulation": Mode(accumulate=3),
    "checkpointing, reentrant": Mode(checkpointing="reentrant"),
    "checkpointing": Mode(checkpointing="plain"),
    "evaluation between steps": Mode(evaluate=True, accumulate=2),
    "clipping": Mode(clip=True),
    "SGD": Mode(optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "foreach": Mode(optimizer=lambda p: torch.optim.AdamW(p, 0.01, foreach=True)),
    "fused": Mode(optimizer=lambda p: torch.optim.AdamW(p, 0.01, fused=True)),
    "TransformerEncoder": Mode(model=seeded(Encoder), evaluate=True),
    "Transformer": Mode(model=seeded(Seq2Seq), evaluate=True),
    "LoRA": Mode(model=seeded(adapted), evaluate=True),
    "frozen parts": Mode(model=seeded(frozen)),
    "tied weights": Mode(model=seeded(tied)),
    "shared layers": Mode(model=seeded(shared), evaluate=True),
    "lengths change": Mode(lengths=True, accumulate=2),
    "batch norm": Mode(model=seeded(Normed), evaluate=True),
    "generation": Mode(model=seeded(Language), evaluate=True),
    "nn.MultiheadAttention, evaluated": Mode(attention=TorchAttention, evaluate=True),
}


@dataclass
class Trace:
    """All that a training leaves."""

    losses: list[float]
    gradients: list[Tensor]
    evaluations: list[Tensor]
    parameters: list[Tensor]
    buffers: list[Tensor]
    optimizer: dict[str, Any]
    random: tuple[Any, ...]


def build(mode: Mode) -> nn.Module:
    if mode.model is not None:
        return mode.model()
    model = tiny(mode.attention, mode.dropout)
    if mode.checkpointing != "no":
        model.blocks = nn.ModuleList(Checkpointed(b, mode.checkpointing == "reentrant") for b in model.blocks)
    return model


def run(mode: Mode, watch: dict[str, Any] | None) -> Trace:
    model = build(mode)
    optimizer = mode.optimizer([p for p in model.parameters() if p.requires_grad])
    scaler = torch.amp.GradScaler("cpu", enabled=mode.scaler, init_scale=64.0)
    monitor = None if watch is None else EntropyMonitor(model, optimizer=optimizer, **watch)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002  the global state is what is compared
    torch.manual_seed(3)
    data, losses, gradients, evaluations = batches(), [], [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(mode.accumulate):
            x, y = next(data)
            if mode.lengths:
                x = x[:, : 2 + len(losses) % 4]
            noise = random.random() + np.random.rand()  # noqa: NPY002
            with torch.autocast("cpu", mode.autocast, enabled=mode.autocast is not None):
                loss = F.cross_entropy(model(x + noise), y)
            scaler.scale(loss).backward()
            total += loss.item()
        if mode.clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        scaler.step(optimizer)
        scaler.update()
        if mode.evaluate:
            model.eval()
            with torch.no_grad():
                evaluations.append(model(x))
            evaluations.append(model(x).detach())
            if isinstance(model, Language):
                evaluations.append(model.continued(x))
            model.train()
        if monitor is not None:
            report = monitor.step(loss, scalars={"total": total})
            assert report.measured == (report.step % monitor._schedule.every == 0)
        losses.append(total)
    if monitor is not None:
        monitor.close()
        assert monitor.faults == {}
        assert monitor.dropped == {}
    return Trace(
        losses,
        gradients,
        evaluations,
        [p.detach().clone() for p in model.parameters()],
        [b.clone() for b in model.buffers()],
        copy.deepcopy(optimizer.state_dict()),
        (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),  # noqa: NPY002
    )


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


@pytest.mark.parametrize("rows", [4, "all"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
def test_on_equals_off(mode: Mode, every: int, rows: int | str, tmp_path: Path) -> None:
    off = run(mode, None)
    on = run(mode, {"run_dir": tmp_path / "run", "every": every, "rows": rows})
    for name, value in vars(off).items():
        assert same(value, getattr(on, name)), name


def test_the_comparison_sees_a_changed_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw from the global random state inside the monitor is enough."""
    off = run(MODES["plain"], None)
    step = EntropyMonitor.step

    def careless(self: EntropyMonitor, *args: Any, **kwargs: Any) -> Any:
        torch.rand(1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(EntropyMonitor, "step", careless)
    on = run(MODES["plain"], {"run_dir": tmp_path / "run", "every": 1})
    assert same(off.parameters, on.parameters)
    assert not same(off.random, on.random)
    parameter = on.parameters[0].view(-1)
    parameter[0] = torch.nextafter(parameter[0], torch.tensor(9.0))
    assert not same(off.parameters, on.parameters)
