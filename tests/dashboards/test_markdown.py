from __future__ import annotations

import pytest
from tensorboard.plugin_util import markdown_to_safe_html

from entropy_monitor.dashboards.markdown import MOST_ALERTS, alert_table, escape, layer_table
from tests.dashboards.html_cells import TABLE_TAGS, Cells
from tests.dashboards.records_factory import event

HOSTILE = "a|b `c` **d** __e__ <script>f</script> [g](javascript:h) \\| &amp; # ~~i~~\nnext ![j](k)"


@pytest.mark.parametrize("name", [HOSTILE, "h.0.attn_q", "<b>", "| |", "---", "1. x", "- x", "σ × ‖W‖"])
def test_renders_as_the_text_it_is(name: str) -> None:
    cells = Cells(markdown_to_safe_html(layer_table({0: name}, {0})))
    assert cells.rows == [["0", " ".join(name.split()), "yes"]]
    assert cells.tags == TABLE_TAGS


def test_the_legend_says_which_layers_have_charts() -> None:
    cells = Cells(markdown_to_safe_html(layer_table({0: "a", 1: "b", 12: "c"}, {0, 12})))
    assert cells.rows == [["0", "a", "yes"], ["1", "b", "no"], ["12", "c", "yes"]]


def test_plain_names_stay_readable_in_the_source() -> None:
    assert escape("encoder.layers.3") == "encoder.layers.3"


def test_alert_table_lists_the_newest_first_and_what_is_open() -> None:
    alerts = [event().alert, event("closed", 70, "a2", opened=60, layer="").alert]
    lines = alert_table(alerts).splitlines()
    assert len(lines) == 4
    assert " - warning, opened at step 60, closed at step 70 | " in lines[2].replace("&#45;", "-")
    assert " - warning, open since step 10 | " in lines[3].replace("&#45;", "-")
    assert lines[3].endswith("| Lower the learning rate. |")


def test_alert_table_stays_bounded() -> None:
    alerts = [event(alert_id=str(n), opened=n).alert for n in range(MOST_ALERTS + 5)]
    text = alert_table(alerts)
    assert text.endswith("\n\nand 5 older alerts")
    assert text.count("\n") == MOST_ALERTS + 1 + 2
