"""Every number that decides whether an alert opens, how severe it is and when it closes, in one place.

What is wrong without a matter of degree, NaN and a broken theorem, opens with the first record. When an
alert that is open has changed enough to be told again is the business of `lifecycle` and of the scores that
the detectors give; what a message calls large or grown, that of `wording`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from entropy_monitor.errors import ConfigurationError


@dataclass(frozen=True)
class Thresholds:
    """What counts as ill. Shares are entropy / max_entropy, in [0, 1]; a *record* is one measured step.

    The defaults were set on Vision Transformers trained on handwritten digits (6 layers, 4 heads,
    measured every 10 steps), on runs sound and ill, and checked on other seeds. Counts of records
    scale with the monitor's `every`: a detector that waits 2 records waits 20 steps at `every=10`.

    Raises:
        ConfigurationError: a value lies outside its range, or two values contradict each other.
    """

    open_after: int = 2
    """Consecutive records a head must look ill before it counts: one odd batch raises nothing."""

    close_after: int = 3
    """Consecutive records a head must look well again before it no longer counts."""

    min_max_entropy: float = 0.5
    """Nats. Heads whose rows see fewer keys than this allows (exp(0.5) = 1.6) are not judged: with one key
    the entropy is 0 by definition."""

    collapse_share: float = 0.08
    """At or below this share of its maximum a head's entropy counts as low. Of sound runs, whole layers were
    seen at .15, half a layer at .07 and single heads at .03; layers of ill runs pass .08 on their
    way to .01."""

    collapse_drop: float = 3.0
    """How many times lower than its own recent high a head must be. Heads that were always sharp, such as
    pretrained ones that look at the previous token, never fell and stay silent."""

    collapse_memory: int = 50
    """Records over which the recent high is forgotten: what sharpens much more slowly than this counts as
    learning, until it reaches `collapse_bottom`."""

    collapse_bottom: float = 0.02
    """At or below this share a head that was ever above `collapse_share * collapse_drop` counts as collapsed
    however slowly it came there: attention is all but one-hot."""

    collapse_layer_fraction: float = 0.6
    """Fraction of a layer's heads that must be low. Sharp heads are common in sound models, up to half of a
    layer; most of a layer is not. An open alert closes once every head has recovered."""

    collapse_early_share: float = 0.30
    """Share that is low enough when, besides, the logits are past `collapse_early_logit` and the loss has not
    improved: the same fall with a falling loss is how sound runs learn."""

    collapse_early_logit: float = 50.0
    """Largest logit that makes an early collapse credible. At 50 a lead of one logit in ten decides a row."""

    collapse_release_share: float = 0.35
    """Above this share a head counts as recovered."""

    stalled_loss: float = 0.05
    """The loss counts as not improved while it has lost less than this fraction of its first value."""

    loss_smoothing: float = 0.3
    """Weight of a record's mean loss in the smoothed loss, which `stalled_loss` and `uniform_loss_gain`
    judge: the noise of single batches falls by a factor of 2.4. At 1 nothing is smoothed."""

    logit_level: float = 256.0
    """Largest logit that counts as exploded. From here on neighbouring bfloat16 numbers lie 2 apart, so that
    attention weights may be off by a factor e. Of 25 sound runs one passed it, at 447; the others
    stayed at 220 or below. Ill ones reach 500 to 10^5."""

    logit_growth: float = 10.0
    """How many times the head's own first value the largest logit must be: models with large biases start
    high and are sound."""

    logit_least_start: float = 1.0
    """First values below this count as this: growth from next to nothing, or from below 0, is no growth."""

    logit_trend: float = 0.1
    """Weight of a new record in the running mean that the largest logit must lie above: a spike that dies
    away is no explosion."""

    logit_release: float = 0.5
    """Fraction of `logit_level` below which a head counts as recovered."""

    logit_severe: float = 1000.0
    """Largest logit from which the alert is severe: softmax is one-hot, its gradient vanishes, and bfloat16
    steps are 8 apart."""

    uniform_share: float = 0.98
    """At or above this share attention counts as uniform: a plain average of the values."""

    uniform_layer_fraction: float = 0.5
    """Fraction of the layers whose every head must be uniform."""

    uniform_records: int = 30
    """Records that attention must be uniform and the loss flat. All attention starts uniform: a sound run was
    seen to stay so for 20 records before it learnt."""

    uniform_steps: int = 300
    """Training steps that must pass besides, so that measuring every step does not shorten the patience."""

    uniform_stalled_loss: float = 0.1
    """Attention is stuck only while the loss has lost less than this fraction of its first value: a sound run
    whose task needs no attention ended at three quarters of it."""

    uniform_loss_gain: float = 0.02
    """A fall of the smoothed loss by this fraction counts as movement and starts the count afresh."""

    fault_tolerance: float = 1e-3
    """Fraction of max_entropy, and nats, by which entropy may lie below a true floor before the capture is
    called wrong: float32 rounding of both comes to 5e-5 nats at most."""

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigurationError(f"Thresholds.{name} must lie in [{low:g}, {high:g}], not {value!r}")
        for lower, upper in _ORDER:
            if not getattr(self, lower) < getattr(self, upper):
                raise ConfigurationError(
                    f"Thresholds.{lower} ({getattr(self, lower)!r}) must be below "
                    f"Thresholds.{upper} ({getattr(self, upper)!r})"
                )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not isinstance(value, int):
                raise ConfigurationError(f"Thresholds.{field.name} must be a whole number, not {value!r}")


_INF = float("inf")
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("open_after", 1, _INF),
    ("close_after", 1, _INF),
    ("min_max_entropy", 0.0, _INF),
    ("collapse_share", 0.0, 1.0),
    ("collapse_drop", 1.0, _INF),
    ("collapse_memory", 1, _INF),
    ("collapse_bottom", 0.0, 1.0),
    ("collapse_layer_fraction", 0.0, 1.0),
    ("collapse_early_share", 0.0, 1.0),
    ("collapse_early_logit", 0.0, _INF),
    ("collapse_release_share", 0.0, 1.0),
    ("stalled_loss", 0.0, 1.0),
    ("loss_smoothing", 0.0, 1.0),
    ("logit_level", 0.0, _INF),
    ("logit_growth", 1.0, _INF),
    ("logit_least_start", 0.0, _INF),
    ("logit_trend", 0.0, 1.0),
    ("logit_release", 0.0, 1.0),
    ("logit_severe", 0.0, _INF),
    ("uniform_share", 0.0, 1.0),
    ("uniform_layer_fraction", 0.0, 1.0),
    ("uniform_records", 1, _INF),
    ("uniform_steps", 0, _INF),
    ("uniform_stalled_loss", 0.0, 1.0),
    ("uniform_loss_gain", 0.0, 1.0),
    ("fault_tolerance", 0.0, 1.0),
)
_ORDER = (
    ("collapse_bottom", "collapse_share"),
    ("collapse_share", "collapse_early_share"),
    ("collapse_early_share", "collapse_release_share"),
    ("collapse_release_share", "uniform_share"),
    ("logit_level", "logit_severe"),
)
