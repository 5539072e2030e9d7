"""Quickstart: one tiny run, and the page it writes held against the run's own figures."""
import json
import re
from html.parser import HTMLParser

import pytest

from radclip import quickstart as chapter
from radclip.quickstart import as_card, as_image, as_table, quickstart
from radclip.recipe import find_run
from radclip.search import SearchIndex

TINY = ("data.source=phantom:260", "data.sizes=null", "train.epochs=1", "train.batch_size=32")


class Seen(HTMLParser):
    "Tags with their attributes, and the text."

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("quick") / "start"
    page = quickstart(out, TINY, quiet=True)
    return out, page, Seen(page.read_text(encoding="utf-8"))


def test_the_page_asks_no_other_host(made):
    _, page, seen = made
    for tag, attributes in seen.tags:
        assert tag not in ("script", "iframe", "object", "embed")
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert "@import" not in page.read_text() and "url(" not in page.read_text()


def test_figures_on_the_page_are_the_runs(made):
    out, _, seen = made
    report = json.loads((find_run(out=out / "runs").folder / "metrics.json").read_text())
    text = " ".join(seen.words)
    for side in ("image_to_text", "text_to_image"):
        assert side.replace("_", " ") in text
        for value in (report[side]["R@5"], report[side]["R@10"], report["batchwise"][side]["R@1"], report["batchwise"][side]["R@5"]):
            assert f"{value:.3f}" in text
    assert f"{report['pool']['images']:,} images with {report['pool']['texts']:,} captions, split test" in text


def test_the_index_holds_the_held_out_patients(made):
    out, _, _ = made
    index = SearchIndex.load(out / "index")
    assert set(index.rows.table["split"].to_pylist()) == {"test"} and index.info["split"] == "test"
    assert index.info["source"] == "phantom:260" and len(index.rows) > 20
    assert len(index.search("left pleural effusion", k=3)) == 3


def test_three_searches_are_shown_with_their_results(made):
    _, page, seen = made
    parts = re.split(r"<h3>", page.read_text())[1:]
    assert [part.split("</h3>")[0].split(":")[0] for part in parts] == ["Words to images", "Image to captions", "Image to images"]
    for part, query in zip(parts, (0, 1, 1)):
        grid = part.split('<div class="grid">')[1].split("</section>")[0]
        assert grid.count("<figure") == 5 + query and grid.count('class="query"') == query
        told, right = re.search(r"(\d) of 5 results show", part).group(1), grid.count('<figure class="right"')
        assert int(told) == right


def test_every_picture_has_a_text_for_it_or_a_caption(made):
    _, _, seen = made
    images = [attributes for tag, attributes in seen.tags if tag == "img"]
    assert len(images) >= 12 + 2 + 16 and all("alt" in attributes for attributes in images)


def test_it_says_what_it_does_and_where_the_page_is(tmp_path, monkeypatch, capsys, made):
    out, page, _ = made
    run, index = find_run(out=out / "runs"), SearchIndex.load(out / "index")
    report = json.loads((run.folder / "metrics.json").read_text())
    monkeypatch.setattr(chapter, "fit", lambda recipe, out, quiet: run)
    monkeypatch.setattr(chapter, "evaluate", lambda run, split: report)
    monkeypatch.setattr(chapter.SearchIndex, "build", classmethod(lambda cls, *given, **more: index))
    again = quickstart(tmp_path / "new", TINY, quiet=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" …")[0] for line in lines if line.endswith("…")] == [
        "making synthetic patients", "training", "evaluating on held-out patients", "indexing the held-out patients",
        "searching and writing the page"]
    assert lines[-1].endswith(str(again)) and again.is_file()


def test_a_mistyped_setting_stops_at_once(tmp_path):
    with pytest.raises(ValueError, match="epochs"):
        quickstart(tmp_path / "out", ("train.epoch=1",))
    assert not (tmp_path / "out").exists()


def test_words_are_escaped():
    bad = "<script>alert('x')</script> & more"
    for made in (as_card(b"", bad, bad), as_table([bad], [[bad]], bad)):
        assert "<script>" not in made and "&lt;script&gt;" in made


def test_a_figure_becomes_a_png_with_its_words():
    import matplotlib.pyplot as plt
    figure, _ = plt.subplots()
    made = as_image(figure, "a line")
    assert 'alt="a line"' in made and "data:image/png;base64,iVBOR" in made and not plt.fignum_exists(figure.number)
