"""A vision Transformer's attention on handwritten digits, trained with Accelerate and watched.

`python examples/accelerate_loop.py --steps 200`, or `accelerate launch examples/accelerate_loop.py`.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from entropy_monitor import load_run
from entropy_monitor.callbacks.accelerate import attach


class Reader(nn.Module):
    """Reads an 8 × 8 image as its eight rows."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.rows, self.places = nn.Linear(8, width), nn.Embedding(8, width)
        layer = nn.TransformerEncoderLayer(width, 4, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.logits = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 8, 8]` images to logits `[B, 10]`."""
        return self.logits(self.encoder(self.rows(images) + self.places.weight).mean(1))


def main() -> None:
    """Train, and show what the run left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="batches")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/accelerate"))
    options = parser.parse_args()
    set_seed(0)
    out = options.output_dir
    accelerator = Accelerator(gradient_accumulation_steps=2, log_with="tensorboard", project_dir=out)
    accelerator.init_trackers("board")
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    digits = TensorDataset(images.float().reshape(-1, 8, 8) / 16, labels)
    model, data = Reader(), DataLoader(digits, batch_size=32, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    monitor = attach(accelerator, model, optimizer, every=10, on_alert=print)
    batches = itertools.chain.from_iterable(itertools.repeat(data))
    for x, y in itertools.islice(batches, options.steps):
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss)
    accelerator.save_state(str(out / "checkpoint"))
    monitor.close()
    accelerator.end_training()
    print(load_run(monitor.run_dir))


if __name__ == "__main__":
    main()
