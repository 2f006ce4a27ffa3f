from __future__ import annotations

import math

import numpy as np
import pytest

from entropy_monitor.dashboards.colour_scale import ColourScale
from entropy_monitor.dashboards.head_pictures import HeadPictures, histogram
from entropy_monitor.dashboards.heatmap import heatmap
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import HEADS
from tests.dashboards.records_factory import bare, head_row, record


def tags(pictures: HeadPictures, step: int, in_full: bool = True) -> tuple[list[str], list[str]]:
    heads = record(step).heads
    drawn = [tag for tag, _ in pictures.heatmaps(heads, in_full)]
    return drawn, [tag for tag, _ in pictures.histograms(heads, in_full)]


def test_three_figures_are_drawn_each_at_its_own_cadence() -> None:
    pictures = HeadPictures(heatmap_every=2, histogram_every=1)
    names = ["entropy_share", "max_logit", "sigma_qk"]
    drawn, counted = tags(pictures, 0)
    assert drawn == [f"attention/{name}" for name in names]
    assert counted == [f"attention/heads/{name}" for name in names]
    assert tags(pictures, 10, in_full=False) == ([], counted[:2])
    assert tags(pictures, 20, in_full=False) == (drawn[:2], counted[:2])
    assert tags(pictures, 30) == ([], counted)  # the second record with norms
    assert tags(pictures, 40)[0] == [drawn[0], drawn[1], drawn[2]]


def test_none_where_none_are_wanted_or_nothing_is_there() -> None:
    assert tags(HeadPictures(0, 0), 0) == ([], [])
    pictures = HeadPictures(1, 1)
    assert not [*pictures.heatmaps(HEADS.empty(), True), *pictures.histograms(HEADS.empty(), True)]
    heads = record(0, max_logit=math.nan, sigma_qk=math.nan).heads
    assert [tag for tag, _ in pictures.heatmaps(heads, True)] == ["attention/entropy_share"]


def test_logits_are_drawn_by_their_logarithm() -> None:
    heads = bare(0, [head_row(0, 0, 0, max_logit=10.0), head_row(0, 0, 1, max_logit=math.inf)]).heads
    drawn = dict(HeadPictures(1, 0).heatmaps(heads, False))
    expected = heatmap(np.array([[10.0, np.inf]]), [0], ColourScale(1.0, 100.0, log=True))
    np.testing.assert_array_equal(drawn["attention/max_logit"], expected)


def test_the_scale_knows_records_that_were_not_drawn() -> None:
    pictures = HeadPictures(2, 0)
    pictures_of = [dict(pictures.heatmaps(record(0, max_logit=x).heads, False)) for x in (5.0, 5e4, 5.0)]
    first, _, last = (drawn.get("attention/max_logit") for drawn in pictures_of)
    assert first is not None
    assert last is not None
    assert first.shape != last.shape or not np.array_equal(first, last)


def test_a_histogram_counts_every_finite_head() -> None:
    rng = np.random.default_rng(0)
    values = np.append(rng.normal(5, 2, 500), [math.nan, math.inf])
    counted = histogram(values)
    finite = values[:500]
    assert counted.counts.sum() == 500
    assert counted.total == pytest.approx(finite.sum())
    assert counted.squares == pytest.approx((finite**2).sum())
    for count, low, high in zip(counted.counts, counted.edges, counted.edges[1:], strict=False):
        inside = ((finite >= low) & (finite < high)).sum()
        assert abs(int(count) - int(inside)) <= (high == counted.edges[-1])


def test_shares_have_the_same_bins_in_every_record() -> None:
    pictures = HeadPictures(0, 1)
    counted = [
        dict(pictures.histograms(record(0, entropy=entropy).heads, False))["attention/heads/entropy_share"]
        for entropy in (0.01, 2.0, 9.0)  # the last one above its maximum by rounding errors made large
    ]
    np.testing.assert_array_equal(counted[0].edges, counted[1].edges)
    assert [int(each.counts.argmax()) for each in counted] == [0, 36, 49]
    assert all(each.counts.sum() == 8 for each in counted)


@pytest.mark.parametrize("option", ["heatmap_every", "histogram_every"])
def test_refuses_an_interval_that_is_none(option: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{option} is -1; give a whole number of records"):
        HeadPictures(**{"heatmap_every": 1, "histogram_every": 1, option: -1})
