"""A Transformer that sorts digits, fitted with Lightning and watched by a callback.

`python examples/lightning_fit.py --steps 200`, then `tensorboard --logdir runs/lightning`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import entropy_monitor as em
from entropy_monitor.callbacks.lightning import EntropyMonitorCallback

LENGTH, WIDTH = 12, 32


class Sorter(lightning.LightningModule):
    """Says which digit stands at each place once all are sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(10, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.logits = nn.Linear(WIDTH, 10)

    def forward(self, digits: Tensor) -> Tensor:
        """`[B, T]` digits to logits `[B, T, 10]`."""
        return self.logits(self.encoder(self.tokens(digits) + self.places.weight))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:  # noqa: ARG002
        """The loss of a batch."""
        (digits,) = batch
        loss = F.cross_entropy(self(digits).flatten(0, 1), digits.sort().values.flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Fit, and show what the run left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", type=Path, help="a checkpoint of an earlier fit")
    options = parser.parse_args()

    lightning.seed_everything(0)
    data = DataLoader(TensorDataset(torch.randint(0, 10, (2_048, LENGTH))), batch_size=32)
    watch = EntropyMonitorCallback(every=10, on_alert=print)
    board = TensorBoardLogger(options.output_dir, name="board")
    trainer = lightning.Trainer(max_steps=options.steps, callbacks=[watch], logger=board, accelerator="cpu")
    trainer.fit(Sorter(), data, ckpt_path=options.resume)
    print(em.load_run(watch.monitor.run_dir))


if __name__ == "__main__":
    main()
