"""The gallery on four hand-made pairs: who is framed, what is listed first, what the browser shows."""
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from radclip.gallery import FailureBrowser, answers, failures, retrieval_grid

matplotlib.use("Agg")


@pytest.fixture
def found():
    "Four images, five captions; image 3 and its caption miss each other, captions 1 and 2 are the same text."
    captions = [["round", "disc"], ["line <b>"], ["line <b>"], ["star & moon"]]
    texts = [c for row in captions for c in row]
    pairs = Dataset.from_dict({"image": [PILImage.new(mode, (20, 20), 9) for mode in ("L", "RGB", "I;16", "L")], "captions": captions},
                              features=Features({"image": Image(), "captions": List(Value("string"))}))
    image_emb = torch.tensor([[1., 0, 0], [0, 1, 0], [0, .9, .1], [0, 0, 1]])
    text_emb = torch.tensor([[1., 0, 0], [.9, 0, .1], [0, .8, .1], [0, 1, 0], [.6, .5, .05]])
    return SimpleNamespace(image_emb=image_emb, text_emb=text_emb, text_image=torch.tensor([0, 0, 1, 2, 3]), texts=texts,
                           pairs=pairs, pool={"source": "made up", "split": "test"})


def test_answers_mark_own_and_identical_texts(found):
    row, same = answers(found, [4, 3])
    assert row["query"] == 4 and row["answers"] == [0, 1, 2, 3] and row["right"] == [False] * 3 + [True] and row["own"] == [3] and row["rank"] == 4
    assert same["answers"][:2] == [1, 2] and same["right"][:2] == [True, True] and same["rank"] == 1
    image, = answers(found, [2], "image_to_text", k=2)
    assert image["answers"] == [3, 2] and image["right"] == [True, True] and image["own"] == [3]
    with pytest.raises(ValueError, match="direction"): answers(found, [0], "sideways")


def test_failures_come_worst_first_and_only_failures(found):
    rows = failures(found)
    assert [r["query"] for r in rows] == [4] and rows[0]["rank"] == 4
    assert [r["query"] for r in failures(found, "image_to_text")] == [3]
    perfect = SimpleNamespace(**vars(found) | {"text_emb": found.image_emb[found.text_image]})
    assert failures(perfect) == []


def test_the_grid_frames_the_right_image_and_appends_a_late_one(found):
    fig = retrieval_grid(found, answers(found, [4, 0], k=3), k=3)
    late, hit = fig.axes[:5], fig.axes[5:]
    framed = lambda ax: any(s.get_visible() for s in ax.spines.values()) and ax.axison
    assert [framed(ax) for ax in late] == [False] * 4 + [True] and late[4].get_title() == "right one: rank 4"
    assert [framed(ax) for ax in hit] == [False, True, False, False, False]
    assert "made up, test split, 4 images, 5 captions: text to image" in fig.get_suptitle()
    fig.canvas.draw(); plt.close(fig)
    fig = retrieval_grid(found, answers(found, [3, 1], "image_to_text", k=2), "image_to_text", k=2)
    fig.canvas.draw(); plt.close(fig)
    with pytest.raises(ValueError, match="nothing to draw"): retrieval_grid(found, [])


@pytest.mark.parametrize("direction,rank", [("text_to_image", 4), ("image_to_text", 3)])
def test_the_browser_shows_what_the_slider_says(found, direction, rank):
    browser = FailureBrowser(found, direction)
    assert browser.slider.max == len(browser.rows) == 1 and "star &amp; moon" in browser.page.value
    assert browser.rows[0]["rank"] >= rank and f"rank of the first right one {browser.rows[0]['rank']:.0f}" in browser.page.value
    browser.rows = browser.rows + answers(found, [1], direction)
    browser.slider.max = 2
    before = browser.page.value
    browser.slider.value = 2
    assert browser.page.value != before and browser.page.value == browser.show(1)
    assert "<b>" not in browser.page.value and browser.widget.children[0] is browser.slider


def test_a_browser_without_failures_says_so(found):
    perfect = SimpleNamespace(**vars(found) | {"text_emb": found.image_emb[found.text_image]})
    assert "No query failed" in FailureBrowser(perfect).page.value


def test_an_image_without_a_caption_is_no_failure(found):
    fewer = SimpleNamespace(**vars(found) | {"text_emb": found.text_emb[:4], "text_image": found.text_image[:4], "texts": found.texts[:4]})
    assert all(r["query"] != 3 for r in failures(fewer, "image_to_text"))
    assert np.isfinite([r["rank"] for r in failures(fewer, "image_to_text")]).all()
