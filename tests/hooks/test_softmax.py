"""Which softmaxes are attention and which are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import entropy_monitor as em


class Net(nn.Module):
    def __init__(self, run: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.run, self.line, self.gate = run, nn.Linear(16, 16), nn.Linear(16, 4)
        self.experts = nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


OTHERS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "router": lambda m, x: F.softmax(m.gate(x), -1),
    "router of matrices": lambda m, x: torch.einsum("btd,edh->beth", x, m.experts).softmax(-1),
    "experts": lambda m, x: torch.einsum("bte,beto->bto", m.gate(x).softmax(-1), x[:, None] @ m.experts),
    "vocabulary": lambda m, x: (m.line(x) @ m.line.weight.t()).softmax(-1),
    "channel gate": lambda m, x: x * F.softmax(m.line(x.mean(1)), -1)[:, None],
    "linear attention": lambda m, x: m.line(x).softmax(-1) @ (m.line(x).softmax(1).mT @ x),
    "pooling": lambda m, x: (F.softmax(m.gate(x)[..., :1], 1) * x).sum(1),
    "batch of a product": lambda m, x: (x @ m.line(x).mT).softmax(0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_softmaxes_are_left_out(name: str) -> None:
    with pytest.raises(em.AttentionNotFoundError):
        em.measure(Net(OTHERS[name]), torch.randn(3, 7, 16))


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": lambda s: torch.softmax(s, -1),
    "torch by name": lambda s: torch.softmax(input=s, dim=-1),
    "F": lambda s: F.softmax(s, dim=-1),
    "method": lambda s: s.softmax(-1),
    "module": nn.Softmax(dim=-1),
    "special": lambda s: torch.special.softmax(s, -1),
    "aten": lambda s: torch.ops.aten.softmax(s, -1),
    "aten overload": lambda s: torch.ops.aten._softmax.default(s, -1, False),
    "float32": lambda s: F.softmax(s, dim=-1, dtype=torch.float32),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_counts_once(name: str) -> None:
    x = torch.randn(3, 7, 16)
    table = em.measure(Net(lambda m, x: SPELLINGS[name](m.line(x) @ x.mT) @ x), x)
    assert table.call.tolist() == [0]
    assert table.rows_read.tolist() == [21]


def test_owners_name_attention_that_is_no_product() -> None:
    def additive(m: Net, x: Tensor) -> Tensor:
        scores = m.gate(torch.tanh(m.line(x)[:, :, None] + x[:, None])).permute(0, 3, 1, 2)
        return F.softmax(scores, -1) @ x[:, None]

    model, x = Net(additive), torch.randn(3, 7, 16)
    with pytest.raises(em.AttentionNotFoundError) as caught:
        em.measure(model, x)
    text = str(caught.value)
    assert "No attention was found in Net" in text
    assert "Net: softmax of shape [3, 4, 7, 7] over dimension 3" in text
    assert "owners=['blocks.*.attn']" in text
    table = em.measure(model, x, owners=["Net"])
    scores = model.gate(torch.tanh(model.line(x)[:, :, None] + x[:, None])).permute(0, 3, 1, 2).double()
    entropy = torch.special.entr(scores.softmax(-1)).sum(-1).mean((0, 2))
    assert table.entropy.tolist() == pytest.approx(entropy.tolist(), abs=1e-6)
    assert table[["sigma_q", "floor_activation", "floor_weights"]].isna().all(axis=None)
