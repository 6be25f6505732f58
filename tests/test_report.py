"""The report: complete, self-contained, escaped, and honest about what it does not know."""

import base64
import io
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from metacanvas_jax.report import charts
from metacanvas_jax.report.charts import Chart
from metacanvas_jax.report.page import (
    Answer,
    Fact,
    ReportData,
    Sample,
    ScoreRow,
    Understanding,
    duration,
    percent,
    render,
    write_report,
)

VOID = {"meta", "img", "br", "link", "hr", "circle", "path"}
EVIL = '<script>alert("1")</script> & a "red" $title \'cat\''


class Page(HTMLParser):
    """Tags, attributes and text of a page; raises when tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if not {"style"} & set(self.open):
            self.text.append(data)

    def all(self, tag, **attributes):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in attributes.items())]

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


def picture(shade):
    return np.random.default_rng(shade).integers(0, 256, (6, 7, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def data():
    return ReportData(
        title=f"Run {EVIL}",
        summary="What was trained.",
        facts=[Fact("Held out", "41 %", EVIL)],
        scores=[
            ScoreRow(
                "color_attr",
                {"seen": 0.5, "held-out": 0.15, "shuffled": 0.3},
                {"seen": 100, "held-out": 20},
                bars={"seen": 0.5, "held-out": 0.2},
                limits={"shuffled": 0.02},
            ),
            ScoreRow("counting", {"seen": None, "held-out": 0.04}),
        ],
        charts=[Chart(f"Loss {EVIL}", "step", "flow loss", {"train": ([0, 1, 2], [3.0, 2.0, 1.0])})],
        pictures=[
            Sample(EVIL, picture(0), True, category="counting"),
            Sample("a blue car", picture(1), False, held_out=True, category="counting", note=EVIL),
            Sample("a green tree", picture(2), category="colors"),
        ],
        canvas=[Sample("two red cats", picture(0), True, maps=[picture(3), picture(4)])],
        mllm=Understanding(
            {"picture: how many": (0.875, 16)},
            [Answer(EVIL, "two", "two", picture(5)), Answer("which colour ?", EVIL, "red")],
        ),
        timings=[("Training", 90.0, ""), ("Drawing", 30.4, EVIL)],
        config='{"prompt": "<b>"}',
        versions={"jax": "0.10"},
    )


@pytest.fixture(scope="module")
def page(data):
    return Page(render(data))


def test_texts_are_escaped_wherever_they_stand(data, page):
    assert not page.all("script") and not page.all("b", style=None)
    assert page.words.count('<script>alert("1")</script> & a "red" $title') >= 7
    assert any(image["alt"] == EVIL for image in page.all("img"))
    assert "alert" not in "".join(
        value or "" for _, a in page.tags for name, value in a.items() if name.startswith("on")
    )


def test_page_fetches_nothing(data):
    text = render(data)
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    sources = [a[name] for _, a in page.tags for name in ("src", "href") if name in a]
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert not re.search(r"url\(|@import|https?://", text)


def test_pictures_are_inside_bit_for_bit(data, page):
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))) for image in page.all("img")
    ]
    expected = [0, 1, 2, 0, 3, 4, 5]
    assert len(shown) == len(expected)
    for image, shade in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(image, picture(shade))


def test_links_lead_to_sections(page):
    targets = {a["id"] for a in page.all("section")}
    assert {a["href"][1:] for a in page.all("a")} == targets
    assert targets == {"scores", "training", "pictures", "canvas", "mllm", "timings", "setup"}


def test_scores_say_whether_bars_are_met(page):
    words = page.words.replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert "50 % ± 5 , n = 100 ✓ ≥ 50 %" in words
    assert "15 % ± 8 , n = 20 ✗ ≥ 20 %" in words
    assert "30 % ✗ ≤ 2 %" in words
    assert "color attr" in words and "–" in words


def test_pictures_are_marked_in_words_and_counted_by_category(page):
    assert "counting 1 of 2 right" in page.words
    assert len(page.all("figure", **{"class": "right"})) == 1
    assert len(page.all("figure", **{"class": "wrong"})) == 1
    words = page.words
    assert "✓ right" in words and "✗ wrong held out a blue car" in words
    assert "keyframe 1" in words and "keyframe 2" in words
    assert "expected: red" in words


def test_empty_parts_are_left_out():
    page = Page(render(ReportData("Nothing yet", "Stopped early.")))
    assert not page.all("section") and not page.all("nav") and not page.all("img")


def test_file_is_whole_or_the_old_one(tmp_path, data, monkeypatch):
    path = write_report(tmp_path / "report.html", data)
    assert path.read_text(encoding="utf-8") == render(data)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(path, ReportData("Another", "run"))
    assert path.read_text(encoding="utf-8") == render(data)


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match=r"'counting'.*'seen'.*44"):
        ScoreRow("counting", {"seen": 44.0})


def points(svg, kind="line s0"):
    path = re.search(rf'<path class="{kind}" d="M([^"]+)"', svg)[1]
    return np.array([[float(v) for v in pair.split(",")] for pair in path.split("L")])


def test_chart_places_points_in_proportion():
    svg = charts.line_chart(Chart("t", "x", "y", {"a": ([0, 5, 10], [0.0, 1.0, 0.5])}, y_range=(0, 1)))
    xy = points(svg)
    assert xy[1, 0] == pytest.approx((xy[0, 0] + xy[2, 0]) / 2, abs=0.1)
    assert xy[1, 1] < xy[2, 1] < xy[0, 1]  # up is more
    assert xy[2, 1] == pytest.approx((xy[0, 1] + xy[1, 1]) / 2, abs=0.1)


def test_logarithmic_chart_spaces_factors_evenly():
    svg = charts.line_chart(Chart("t", "x", "y", {"a": ([0, 1, 2, 3], [1.0, 10.0, -1.0, 100.0])}, log=True))
    xy = points(svg)
    assert len(xy) == 3
    assert xy[0, 1] - xy[1, 1] == pytest.approx(xy[1, 1] - xy[2, 1], abs=0.2)
    assert ">10</text>" in svg and ">100</text>" in svg


def test_smoothing_takes_the_noise_out_and_does_not_lag():
    x = np.arange(1000)
    noisy = x + 200 * (-1.0) ** x
    svg = charts.line_chart(Chart("t", "x", "y", {"a": (x, noisy)}, smooth=True))
    xy = points(svg)
    straight = np.interp(xy[:, 0], xy[[5, -6], 0], xy[[5, -6], 1])
    assert np.abs(xy[5:-5, 1] - straight[5:-5]).max() < 3
    assert 'class="line faint s0"' in svg


def test_one_spike_does_not_flatten_a_loss_curve():
    loss = np.full(500, 1.0)
    loss[::2] = 2.0
    loss[7] = 1e6
    svg = charts.line_chart(Chart("t", "x", "y", {"a": (range(500), loss)}, smooth=True))
    assert ">2</text>" in svg


def test_points_that_are_not_finite_are_left_out_and_none_at_all_is_said():
    svg = charts.line_chart(Chart("t", "x", "y", {"a": ([0, 1, 2, 3], [1.0, float("nan"), float("inf"), 2.0])}))
    assert len(points(svg)) == 2
    assert "No values" in charts.line_chart(Chart("t", "x", "y", {"a": ([0], [float("nan")])}))
    assert "NaN" not in charts.line_chart(Chart("t", "x", "y", {"a": ([3], [1.0])})).replace("nan", "NaN")


def test_chart_refuses_unequal_lines_and_too_many():
    with pytest.raises(ValueError, match=r"'loss'.*2 x values and 1 y"):
        Chart("c", "x", "y", {"loss": ([0, 1], [1.0])})
    with pytest.raises(ValueError, match="7 lines"):
        Chart("c", "x", "y", {str(i): ([0], [0]) for i in range(7)})


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 2400, [0, 500, 1000, 1500, 2000]),
        (-3e-4, 2e-4, [-3e-4, -2e-4, -1e-4, 0, 1e-4, 2e-4]),
    ],
)
def test_ticks_are_round_numbers_inside(low, high, expected):
    np.testing.assert_allclose(charts.ticks(low, high), expected, atol=1e-12)


def test_shares_and_seconds_are_said_as_people_do():
    said = [percent(x) for x in (0, 0.004, 0.02, 0.094, 0.444, 1)]
    assert [s.replace("\N{NARROW NO-BREAK SPACE}", " ") for s in said] == [
        "0 %",
        "0.4 %",
        "2 %",
        "9.4 %",
        "44 %",
        "100 %",
    ]
    said = [duration(x) for x in (0.042, 8.34, 9.96, 59.7, 125.2, 3600, 12_000)]
    assert [s.replace("\N{NARROW NO-BREAK SPACE}", " ") for s in said] == [
        "0.042 s",
        "8.3 s",
        "10 s",
        "1 min 00 s",
        "2 min 05 s",
        "1 h 00 min",
        "3 h 20 min",
    ]
