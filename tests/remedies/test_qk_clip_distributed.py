"""QK-clip on two processes that train the same weights."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.remedies.qk_clip.clip import QKClip

D, HD = 16, 8


class Grouped(nn.Module):
    """Two query heads that share a key head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, HD), nn.Linear(D, HD)
        self.norm: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, HD)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


def x_of(seed: int) -> Tensor:
    return torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def train_together(rank: int, case: str) -> list:
    """On one of several processes: what was clipped, and the weights after it; or the error."""
    torch.manual_seed(0)
    model = Grouped().double()
    if case == "refused" and rank == 1:
        model.norm = nn.RMSNorm(HD, dtype=torch.float64)
    trained = nn.parallel.DistributedDataParallel(model) if case == "wrapped" else model
    with QKClip(trained, threshold=1e-3) as clip:
        for step in range(2):
            trained(x_of(10 * step + rank))
            try:
                clipped = clip.step()
            except ConfigurationError as error:
                return [str(error)]
    return [[(c.layer, c.head, c.max_logit) for c in clipped], [p.tolist() for p in model.parameters()]]


def serve(rank: int, meeting: str, answers) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    answers.put((rank, [train_together(rank, case) for case in CASES]))
    distributed.destroy_process_group()


CASES = ("plain", "wrapped", "refused")


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> dict[str, list]:
    """What two processes answered, by case."""
    context = multiprocessing.get_context("fork")  # torch is imported there; nothing runs backward
    answers = context.Queue()
    meeting = str(tmp_path_factory.mktemp("pair") / "meeting")
    processes = [context.Process(target=serve, args=(r, meeting, answers), daemon=True) for r in range(2)]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return {case: [found[rank][i] for rank in range(2)] for i, case in enumerate(CASES)}


@pytest.mark.parametrize("case", ["plain", "wrapped"])
def test_processes_clip_alike_by_the_largest_of_all(together, case: str) -> None:
    one, other = together[case]
    assert one == other
    torch.manual_seed(0)
    model = Grouped().double()
    with QKClip(model, threshold=1e-3) as clip:
        for step in range(2):
            for rank in range(2):
                model(x_of(10 * step + rank))
            clipped = clip.step()
    assert [(c.layer, c.head, c.max_logit) for c in clipped] == one[0]
    assert [p.tolist() for p in model.parameters()] == one[1]


def test_what_is_wrong_on_one_process_is_raised_on_all(together) -> None:
    one, other = together["refused"]
    assert one == other
    assert "are normalised (QK-norm)" in one[0]
