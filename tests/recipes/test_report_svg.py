"""The charts' arithmetic, and that any finite values make a drawing."""

import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recipes.report.charts import Chart, Line, moving_average, thin
from recipes.report.svg import draw, load_class, tag, ticks
from recipes.results.columns import sample_size, wilson
from recipes.results.words import short

FINITE = st.floats(min_value=-1e299, max_value=1e299)


@settings(max_examples=60, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=40), st.booleans())
@example([-5e-324], False)
@example([5e-324, 0.0], True)
@example([-7.0, -7.0], False)
def test_any_finite_values_make_a_chart_inside_its_frame(values: list[float], log_ok: bool) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    drawing = draw(Chart("t", "u", (Line("l", points), Line("m", points[:1])), log_ok)).drawing
    assert "nan" not in drawing and "inf" not in drawing
    heights = [float(y) for y in re.findall(r"M[\d.-]+ ([\d.-]+)h0", drawing)]
    assert heights and all(24 - 1 <= y <= 232 - 36 + 1 for y in heights)


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 8))
def test_ticks_are_round_and_inside(low: float, width: float, most: int) -> None:
    found = ticks(low, low + width, most)
    assert 1 <= len(found) <= most + 1
    assert all(low - width * 1e-6 <= tick <= low + width * (1 + 1e-6) for tick in found)


@given(st.lists(FINITE, min_size=1, max_size=700))
@settings(max_examples=30, deadline=None)
def test_thinning_keeps_order_and_extremes(values: list[float]) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    kept = thin(points, 100)
    assert len(kept) <= 100
    assert kept == sorted(kept) and set(kept) <= set(points)
    assert {min(values), max(values)} <= {value for _, value in kept}


def test_moving_average_is_centred_and_exact_on_a_line() -> None:
    line = [(float(step), 2.0 * step) for step in range(20)]
    assert moving_average(line, 5)[:18] == line[:18]
    assert moving_average(line, 5)[-1] == (19.0, pytest.approx((34 + 36 + 38) / 3))


def test_elements_escape_text_and_attributes() -> None:
    assert tag("text", "<b>&", class_='"<') == '<text class="&#34;&lt;">&lt;b&gt;&amp;</text>'


def test_a_log_scale_where_values_span_decades() -> None:
    points = [(1.0, 0.01), (2.0, 1.0), (3.0, 100.0)]
    assert "log scale" in draw(Chart("t", "u", [Line("l", points)], log_ok=True)).drawing
    assert "log scale" not in draw(Chart("t", "u", [Line("l", points)])).drawing


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1.23456, "1.235"), (12500, "12.5k"), (3e-5, "3e-5"), (2e6, "2e6"), (-0.5, "-0.5")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_load_classes_have_dead_even_and_hot() -> None:
    assert [load_class(v) for v in (0, 0.1, 1, 1.5, 3, 99)] == ["dead", "cold3", "even", "hot1", "hot2", "hot3"]


@given(st.integers(1, 5000), st.data())
def test_wilson_holds_the_share_and_stays_in_range(n: int, data: st.DataObject) -> None:
    share = data.draw(st.integers(0, n)) / n
    low, high = wilson(share, n)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1


def test_wilson_as_published() -> None:
    # Agresti and Coull 1998, 95 % of 0 out of 10: upper end z^2 / (n + z^2).
    assert wilson(0, 10)[0] == 0 and wilson(1, 10)[1] == 1, "exactly"
    assert wilson(0, 10) == (0, pytest.approx(1.959964**2 / (10 + 1.959964**2)))
    assert wilson(0.612, 1000) == (pytest.approx(0.5814, abs=1e-4), pytest.approx(0.6417, abs=1e-4))


def test_sample_sizes_belong_to_their_task() -> None:
    entry = {"exact_match": 0.5, "exact_match_t1": 0.4, "n": 100, "refusal_unsafe_t1": 1.0, "refusal_safe": 0.0}
    assert sample_size(entry, "exact_match_t1") == 100
    assert sample_size(entry, "refusal_unsafe_t1") is None, "n is that of the first task"
    assert sample_size({**entry, "refusal_safe_n": 7}, "refusal_safe") == 7
    assert sample_size({"n": math.nan, "x": 1}, "x") is None
