"""Overlays, grids, words and the explorer: what is drawn is what was computed."""
import json

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from radclip import saliency
from radclip.gradcam import explain
from radclip.model import encode_images, encode_texts, load_model
from radclip.phantom import phantom_pairs
from radclip.saliency import (HeatExplorer, blend, draw_boxes, heat_grid, layer_choices, overlay, word_figure, word_saliency, write_heatmap)

matplotlib.use("Agg")
TEXT, AGAINST = "Right pleural effusion.", "No pleural effusion."


@pytest.fixture(scope="module")
def encoder(): return load_model("phantom")


@pytest.fixture(scope="module")
def image(): return phantom_pairs(2, 1)[0]["image"]


def test_the_picture_shines_through_where_the_map_is_zero_and_the_colour_where_it_is_one():
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    heat = np.zeros((3, 4), np.float32)
    heat[1, 2] = 1
    mixed = np.asarray(blend(picture, heat, strength=1)).astype(int)
    assert (mixed[heat == 0] == np.asarray(picture)[heat == 0][:, None]).all()
    assert mixed[1, 2].tolist() == [round(255 * c) for c in matplotlib.colormaps[saliency.COLOURS](1.0)[:3]]
    with pytest.raises(ValueError, match="does not lie on a picture"): blend(picture, heat.T)


def test_the_colours_are_perceptually_uniform():
    "Lightness (CIE L*) grows steadily: that is what makes equal steps look equal, and the map readable in grey."
    rgb = matplotlib.colormaps[saliency.COLOURS](np.linspace(0, 1, 64))[:, :3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)
    assert (np.diff(lightness) > 0.25).all() and np.diff(lightness).max() < 2.5
    jet = matplotlib.colormaps["jet"](np.linspace(0, 1, 64))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(jet) < 0).any(), "what this keeps out"


def test_boxes_are_drawn_in_pixels():
    fig, ax = plt.subplots()
    draw_boxes(ax, [(0.25, 0.5, 0.75, 1.0)], (200, 100))
    box, = ax.patches
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (50, 50, 100, 50)
    plt.close(fig)


def test_an_overlay_has_its_words_and_its_scale(image):
    fig = overlay(image, np.zeros(image.size[::-1], np.float32), "left effusion", [(0, 0, 0.5, 0.5)])
    ax, bar = fig.axes
    assert ax.get_xlabel() == "left effusion" and len(ax.patches) == 1 and "maximum" in bar.get_ylabel()
    fig.canvas.draw(); plt.close(fig)


def test_a_grid_has_a_row_a_picture_and_a_column_a_text(encoder, image):
    texts = [TEXT, "Cardiomegaly."]
    fig = heat_grid(encoder, [image, image.resize((90, 60))], texts, [AGAINST, None], boxes=[[(0, 0, 1, 1)]])
    cells = fig.axes[:6]
    close = (encode_images(encoder, [image]) @ encode_texts(encoder, texts).T)[0].tolist()
    assert [c.get_xlabel().replace("\n", " ") for c in cells[:3]] == ["the picture", *(f"{t} {v:.2f}" for t, v in zip(texts, close))]
    drawn = cells[1].get_images()[0].get_array()
    assert np.array_equal(drawn, np.asarray(blend(image, explain(encoder, image, TEXT, minus=AGAINST))))
    assert [len(c.patches) for c in cells] == [1, 1, 1, 0, 0, 0] and cells[4].get_images()[0].get_array().shape == (60, 90, 3)
    fig.canvas.draw(); plt.close(fig)
    one = heat_grid(encoder, image, TEXT)
    assert len(one.axes) == 3
    plt.close(one)
    for wrong in (dict(texts=[]), dict(images=[]), dict(minus=["a"], texts=texts)):
        with pytest.raises(ValueError, match="give at least one"): heat_grid(**dict(model=encoder, images=image, texts=TEXT) | wrong)


def test_each_word_is_left_out_in_turn(encoder, image):
    text = "Frontal chest radiograph shows cardiomegaly."
    rows = word_saliency(encoder, image, f"  {text}  ")
    assert [r["word"] for r in rows] == text.split()
    picture = encode_images(encoder, [image])[0]
    whole = float(encode_texts(encoder, [text])[0] @ picture)
    for without, i in (("chest radiograph shows cardiomegaly.", 0), ("Frontal chest radiograph shows", 4)):
        assert rows[i]["drop"] == pytest.approx(whole - float(encode_texts(encoder, [without])[0] @ picture), abs=1e-5)
    for few in ("", "cardiomegaly"):
        with pytest.raises(ValueError, match="takes two"): word_saliency(encoder, image, few)


def test_words_stand_in_reading_order_and_signs_differ_in_more_than_colour():
    fig = word_figure([{"word": "no", "drop": 0.2}, {"word": "effusion", "drop": -0.1}], "title")
    ax, = fig.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["no", "effusion"] and ax.get_ylim()[0] > ax.get_ylim()[1]
    assert [b.get_width() for b in ax.patches] == [0.2, -0.1] and ax.patches[0].get_hatch() != ax.patches[1].get_hatch()
    fig.canvas.draw(); plt.close(fig)


class Tower(torch.nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items(): setattr(self, name, part)


@pytest.mark.parametrize("visual, want", [
    (Tower(layer1=torch.nn.Sequential(*[torch.nn.ReLU()] * 2), layer4=torch.nn.Sequential(torch.nn.ReLU())), ["layer1.0", "layer4.0"]),
    (Tower(trunk=Tower(blocks=torch.nn.ModuleList([Tower(norm1=torch.nn.ReLU()) for _ in range(11)]), norm1=torch.nn.ReLU())),
     [f"trunk.blocks.{i}.norm1" for i in range(11)]),
])
def test_the_layers_to_slide_through_are_those_like_the_last(visual, want): assert layer_choices(visual) == want


def test_the_explorer_draws_what_its_controls_say(encoder, image):
    explorer = HeatExplorer(encoder, [image, image.resize((64, 64))], TEXT, AGAINST, size=100)
    first = explorer.page.value
    assert 'width="100"' in first and f"{TEXT} minus {AGAINST}" in first and "trunk.blocks.2" in first
    seen = {first}
    for control, value in (("layer", "trunk.blocks.0"), ("method", "eigencam"), ("image", 1), ("text", "<b>Cardiomegaly</b>"), ("minus", "")):
        getattr(explorer, control).value = value
        assert explorer.page.value not in seen, control
        seen.add(explorer.page.value)
    assert "<b>" not in explorer.page.value and "&lt;b&gt;" in explorer.page.value and " minus " not in explorer.page.value
    explorer.text.value = " "
    assert "the text is empty" in explorer.page.value and "<img" not in explorer.page.value
    explorer.method.value = "rollout"
    explorer.text.value = TEXT
    assert "needs a vision transformer" in explorer.page.value
    explorer.method.value = "gradcam"
    assert "<img" in explorer.page.value, "it goes on after an error"


def test_a_written_map_tells_what_it_shows(encoder, image, tmp_path):
    plt.close("all")
    told = write_heatmap(encoder, image, TEXT, tmp_path / "new" / "heat.png", minus=AGAINST)
    json.dumps(told)
    heat = explain(encoder, image, TEXT, minus=AGAINST)
    y, x = (int(told["peak"][1] * heat.shape[0]), int(told["peak"][0] * heat.shape[1]))
    assert heat[y, x] == heat.max() and told["half"] == pytest.approx((heat > 0.5).mean())
    texts = encode_texts(encoder, [TEXT, AGAINST])
    assert told["similarity"] == pytest.approx(float(encode_images(encoder, [image])[0] @ (texts[0] - texts[1])), abs=1e-5)
    assert (told["method"], told["layer"], told["minus"]) == ("gradcam", ["trunk.blocks.2"], AGAINST)
    written = Image.open(told["out"])
    assert written.format == "PNG" and min(written.size) > 200
    assert write_heatmap(encoder, image, TEXT, tmp_path / "heat.pdf", "layercam", layer=["trunk.stem.1", "trunk.blocks.2"])["layer"] == ["trunk.stem.1", "trunk.blocks.2"]
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["heat.pdf", "heat.png"] and not plt.get_fignums()


@pytest.mark.parametrize("name", ["heat.txt", "heat", "heat.npy"])
def test_what_is_no_picture_file_is_refused_and_nothing_is_left(encoder, image, tmp_path, name):
    plt.close("all")
    with pytest.raises(ValueError, match="use .png") as error: write_heatmap(encoder, image, TEXT, tmp_path / name)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir()) and not plt.get_fignums()
