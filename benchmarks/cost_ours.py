"""`EntropyMonitor` as a way to watch attention entropy in training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from cost_plain import Plain, Setting
from torch import Tensor

import entropy_monitor as em


class Ours(Plain):
    """`EntropyMonitor` in the training itself."""

    beginning = 8  # are in full

    def __init__(self, setting: Setting, rows: int | str) -> None:
        super().__init__(setting)
        self._folder = tempfile.TemporaryDirectory()
        self._run_dir = f"{self._folder.name}/run"
        self._alone: list[int] = []  # measured steps that were to read rows alone
        self.monitor = em.EntropyMonitor(
            self.run, optimizer=self.optimizer, run_dir=self._run_dir, every=setting.every, rows=rows
        )

    @property
    def in_full(self) -> bool | None:
        return self.monitor._schedule.in_full

    def train(self, before_update: Callable[[Tensor], None] | None = None) -> Tensor:
        loss = super().train(before_update)
        self._report = self.monitor.step(loss)
        return loss

    def measured(self) -> None:
        if not self.in_full:
            self._alone.append(self.steps)
        self.train()
        if not self._report.measured:
            raise RuntimeError(f"step {self._report.step} was to be measured: {self.monitor.faults}")

    def between(self) -> None:
        self.train()
        if self._report.measured:
            raise RuntimeError(f"step {self._report.step} was not to be measured")

    def account(self) -> tuple[str, str]:
        if self.monitor.faults:
            raise RuntimeError(f"the monitor failed: {self.monitor.faults}")
        self.monitor.close()
        run = em.load_run(self._run_dir)
        rows = run.heads.loc[run.heads["step"] >= self.settled, "rows_read"] // self.setting.shape.batch
        alone = [step for step in self._alone if step >= self.settled]
        sigmas = run.layers.loc[run.layers["step"].isin(alone), ["step", "sigma_q"]].dropna()
        mixed = sigmas["step"].nunique()
        remark = (
            f"{mixed} of {len(alone)} steps with rows alone read suspected layers in full" if mixed else ""
        )
        return " … ".join(f"{n:.0f}" for n in sorted({rows.min(), rows.max()})), remark

    def entropies(self) -> Tensor:
        self.monitor.close()
        heads = em.load_run(self._run_dir).heads.sort_values(["step", "layer_index", "head"])
        shape = self.setting.shape
        self.rows_read = int(heads["rows_read"].max()) // shape.batch
        return torch.from_numpy(heads["entropy"].to_numpy("float64")).view(-1, shape.layers, shape.heads)

    def close(self) -> None:
        self.monitor.close()
        self._folder.cleanup()


class Ours32(Ours):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, 32)


class OursAuto(Ours):
    beginning = 32  # by then the rows have followed the tolerance

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, "auto")


class OursAll(Ours):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, "all")
