from __future__ import annotations

import re

from entropy_monitor.dashboards.tensorboard_layout import GROUP, layout
from entropy_monitor.trackers.aggregates import layer_tag


def test_each_call_has_a_margin_chart_and_one_of_floors() -> None:
    charts = layout(["attention/layer_00", "attention/layer_00/call_1"])
    margin = charts["Entropy: mean, least and largest head, layer_00 to layer_00 call_1"]
    assert margin["layer_00 call_1"] == (
        "Margin",
        [f"attention/layer_00/call_1/entropy_{part}" for part in ("mean", "min", "max")],
    )
    kind, tags = charts["Entropy and its floors, layer_00 to layer_00 call_1"]["layer_00"]
    assert kind == "Multiline"
    assert re.match(tags[0], "attention/layer_00/entropy_min")
    assert not any(re.match(tag, "attention/layer_00/call_1/entropy_min") for tag in tags)


def test_one_chart_holds_all_layers() -> None:
    _, (tag,) = layout(["attention/layer_00"])["What drives entropy, all layers"]["largest logit"]
    for name in ("attention/layer_07/max_logit", "attention/layer_107/call_2/max_logit"):
        assert re.match(tag, name)
    for name in ("attention/all/max_logit", "attention/layer_07/max_logit_x"):
        assert not re.match(tag, name)


def test_deep_models_are_split_into_groups() -> None:
    charts = layout([layer_tag(index) for index in range(2 * GROUP + 1)])
    sizes = [len(c) for title, c in charts.items() if title.startswith("Entropy: ")]
    assert sizes == [GROUP, GROUP, 1]
    assert "Entropy: mean, least and largest head, layer_32" in charts


def test_layers_with_an_alert_come_before_the_groups() -> None:
    charts = layout([layer_tag(index) for index in range(20)], [layer_tag(7), layer_tag(18)])
    titles = list(charts)
    place = titles.index("Layers with an alert, entropy: mean, least and largest head")
    assert all(title.startswith("Entropy") for title in titles[place + 1 :])
    assert list(charts[titles[place]]) == ["layer_18", "layer_07"]  # shown from its end
    assert charts[titles[place]]["layer_18"][0] == "Margin"
