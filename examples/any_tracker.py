"""Any tracker in three lines: a function of metrics and step is a logger.

`python examples/any_tracker.py` writes each measured step as a line of JSON. With a tracker it reads:

    # MLflow finds its run by thread, and loggers have one of their own: say which run it is.
    run = mlflow.start_run()
    loggers = [lambda metrics, step: mlflow.log_metrics(metrics, step, run_id=run.info.run_id)]

    # Aim
    run = aim.Run()
    loggers = [lambda metrics, step: [run.track(x, name=name, step=step) for name, x in metrics.items()]]

    # Neptune
    run = neptune_scale.Run()
    loggers = [lambda metrics, step: run.log_metrics(metrics, step=step)]

    # ClearML: a plot for each layer, a line for each metric
    def log(metrics, step):
        for name, value in metrics.items():
            task.get_logger().report_scalar(*name.rsplit("/", 1), value, step)
    loggers = [log]

    # Comet
    loggers = [lambda metrics, step: experiment.log_metrics(metrics, step=step)]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

import entropy_monitor as em


def main() -> None:
    """Train a little, with a function as logger."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/any-tracker"))
    options = parser.parse_args()
    metrics_file = options.run_dir / "metrics.jsonl"

    def log(metrics: dict[str, float], step: int) -> None:
        with metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with em.EntropyMonitor(
        model, optimizer=optimizer, run_dir=options.run_dir, every=10, loggers=[log]
    ) as monitor:
        for _ in range(options.steps):
            x = torch.randn(8, 16, 32)
            loss = (model(x) - x.flip(1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss)

    last = json.loads(metrics_file.read_text("utf-8").splitlines()[-1])
    share = last["attention/all/entropy_mean"] / last["attention/layer_00/max_entropy"]
    print(f"{len(last) - 1} metrics a step; entropy at step {last['step']} is {share:.0%} of its maximum")
    print(f"all of them: {metrics_file}")


if __name__ == "__main__":
    main()
