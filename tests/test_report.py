"""The report: one file that needs nothing else, whatever the captions say."""

from __future__ import annotations

import base64
import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from nd_jax.data import judge
from nd_jax.data.source import ShapesSource, prompts
from nd_jax.data.video_out import contact_sheet, write_video
from nd_jax.data.world import world_named
from nd_jax.evaluate import ACCURACY_COLUMNS, Judged, accuracy_row, bootstrap_interval, judge_videos
from nd_jax.evaluation_report import accuracy_table, write_evaluation
from nd_jax.report import Bars, Curves, Gallery, Pictures, Table, write_report

EVIL = "<script>alert('x')</script> \"quoted\" & 'so' {{ 7 * 7 }} {% raw %}"
WORLD = world_named("64x64")


class Seen(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    frames = np.arange(3 * 32 * 32 * 3, dtype=np.uint8).reshape(3, 32, 32, 3)
    return write_video(folder / "clip.mp4", frames), contact_sheet(folder / "sheet.png", [frames])


def every_kind(media) -> list:
    video, picture = media
    return [
        Table(EVIL, ["what", EVIL], [[EVIL, 1.5], ["plain", None]], note=EVIL),
        Gallery(EVIL, ["one", EVIL], [(EVIL, [video, None])], note=EVIL),
        Curves(EVIL, {"panel <b>": {"line <i>": ([1, 2, 3], [1.0, 0.5, 0.25])}, "empty": {}}),
        Bars(EVIL, {"image <b>": {"0": 0.1, "1": 0.3}, "text": {"0": 0.2, "1": 0.1}}, "block", "1 - cos"),
        Pictures(EVIL, [(EVIL, picture)]),
    ]


@pytest.fixture(scope="module")
def page(media, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    assert write_report(path, EVIL, EVIL, every_kind(media), footer=EVIL) == path
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_what_came_from_outside_stays_text(page):
    assert "<script" not in page
    seen = Seen(page)
    assert not {tag for tag, _ in seen.tags} & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert not [name for _, attrs in seen.tags for name in attrs if name.startswith("on")]
    told = html.unescape("".join(seen.text))
    assert told.count(EVIL) >= 12, "a title, note, cell or caption is missing or was evaluated"
    assert "49" not in "".join(seen.text)


def test_the_page_needs_no_network(page):
    assert not re.search(r"https?:", page)
    assert "url(" not in page
    assert "@import" not in page
    sources = [attrs[name] for _, attrs in Seen(page).tags for name in ("src", "href") if name in attrs]
    assert sources
    assert all(source.startswith("data:") for source in sources)


def test_every_kind_of_section_is_there(page, media):
    tags = Seen(page).tags
    videos, pictures = ([attrs["src"] for tag, attrs in tags if tag == wanted] for wanted in ("video", "img"))
    assert len(videos) == 1
    assert base64.b64decode(videos[0].split(",")[1]) == media[0].read_bytes()
    kinds = [source.split(";")[0] for source in pictures]
    assert kinds == ["data:image/svg+xml", "data:image/svg+xml", "data:image/png"]
    assert base64.b64decode(pictures[2].split(",")[1]) == media[1].read_bytes()
    for source in pictures[:2]:
        drawing = base64.b64decode(source.split(",")[1]).decode()
        assert "<svg" in drawing
        assert "<script" not in drawing
    assert page.count("<h2>") == 5
    assert sum(tag == "td" for tag, _ in tags) == 4 + 3


def test_the_same_numbers_give_the_same_page(media, page, tmp_path):
    again = write_report(tmp_path / "report.html", EVIL, EVIL, every_kind(media), footer=EVIL)
    assert again.read_text(encoding="utf-8") == page


def test_a_failure_leaves_the_old_report(tmp_path):
    path = write_report(tmp_path / "report.html", "old", "", [])
    before = path.read_bytes()
    with pytest.raises(FileNotFoundError):
        write_report(path, "new", "", [Pictures("gone", [("x", tmp_path / "missing.png")])])
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


# ---- the evaluation's own report


@pytest.fixture(scope="module")
def judged():
    """The truth as one system's videos, and the same videos with the prompts of others as another's."""
    source = ShapesSource(WORLD, "seen", 12, 1)
    videos = np.stack([source.video(n) for n in range(len(source))])
    right, wrong = (Judged(v, *judge_videos(v, source.labels, WORLD), 0.5, 10**6) for v in (videos, videos[::-1]))
    return {"right": right, "wrong": wrong}


def test_accuracy_is_the_judges(judged):
    right, wrong = judged["right"], judged["wrong"]
    assert right.scores.mean > 0.98
    assert wrong.scores.mean < 0.8
    low, high = wrong.interval
    assert low < wrong.scores.mean < high
    read = judge.read_labels(wrong.videos, WORLD)
    _, labels = prompts(WORLD, "seen", 12, seed=1)
    np.testing.assert_allclose(wrong.scores.mean, (read == labels).mean())


def test_intervals_need_something_to_vary():
    for right in ([0.5], [0.5, 0.5, 0.5]):
        assert bootstrap_interval(np.array(right)) == (0.5, 0.5)
    low, high = bootstrap_interval(np.linspace(0, 1, 21))
    assert 0.3 < low < 0.5 < high < 0.7
    assert bootstrap_interval(np.linspace(0, 1, 21)) == (low, high)


def test_the_table_tells_what_was_kept_and_what_chance_is(judged):
    table = accuracy_table(judged, "right", title="accuracy")
    names = [row[0] for row in table.rows]
    assert names == ["right", "wrong", "captions shuffled"]
    assert all(len(row) == len(ACCURACY_COLUMNS) for row in table.rows)
    kept = judged["wrong"].scores.mean / judged["right"].scores.mean
    assert f"{kept:.1%}" in table.rows[1]
    assert accuracy_row("alone", judged["right"])[-2] == ""


def test_write_evaluation(judged, tmp_path):
    path = write_evaluation(tmp_path / "out", WORLD, "seen", 0, judged)
    page = path.read_text()
    captions, _ = prompts(WORLD, "seen", 12, seed=1)
    assert captions[0] in html.unescape(page)
    assert page.count("<video") == 8 * 2
    summary = json.loads((path.parent / "summary.json").read_text())
    assert summary["right"]["mean"] > summary["wrong"]["mean"]
    assert summary["right"]["denoiser_parameters"] == 10**6
