"""A small GPT-2 on Python's own sources with Hugging Face's `Trainer`, watched by a callback.

`python examples/huggingface_trainer.py --steps 200`, then `tensorboard --logdir runs/huggingface`; with
`--resume` it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import entropy_monitor as em
from entropy_monitor.callbacks.huggingface import EntropyMonitorCallback

CONTEXT = 64


def stretches(count: int) -> list[dict[str, torch.Tensor]]:
    """Pieces of the standard library's source, `[CONTEXT]` bytes each."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:40]
    data = torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in sources)), dtype=torch.uint8).long()
    rows = data[: count * CONTEXT].reshape(-1, CONTEXT)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    """Train, and show what the run left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/huggingface"))
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4))
    data = stretches(4_000)
    args = TrainingArguments(
        output_dir=str(options.output_dir),
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=50,
        save_steps=50,
        report_to=["tensorboard"],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=data[:-100],
        eval_dataset=data[-100:],
        callbacks=[EntropyMonitorCallback(every=10, on_alert=print)],
    )
    trainer.train(resume_from_checkpoint=options.resume)

    last = [entry for entry in trainer.state.log_history if "attention/all/entropy_mean" in entry][-1]
    print(f"step {last['attention/step']}: mean entropy {last['attention/all/entropy_mean']:.3f} nats")
    print(em.load_run(options.output_dir / "entropy_monitor"))


if __name__ == "__main__":
    main()
