"""The monitor in the shape that each training framework expects.

Each has a module of its own, imported by name, so that only the framework in use is loaded:

- `entropy_monitor.callbacks.huggingface.EntropyMonitorCallback` for `transformers.Trainer`,
- `entropy_monitor.callbacks.lightning.EntropyMonitorCallback` for `lightning` and `pytorch_lightning`,
- `entropy_monitor.callbacks.accelerate.attach` for a loop with `accelerate.Accelerator`.
"""
