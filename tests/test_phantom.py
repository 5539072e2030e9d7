"Phantoms: pixels as stored, boxes that hold what was painted, a pairs table that keeps its promises."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radclip.anatomy import Frame, atlas_index, frame_of
from radclip.atlas import atlas, curve, signed_distance, soft
from radclip.findings import SCALE, Finding, caption, concepts, pictures, vocabulary
from radclip.lesions import PAINT, WIRES, painter_of
from radclip.phantom import boxes, contact_sheet, draw, phantom_concepts, phantom_pairs

REFERENCE = Path(__file__).parent / "data" / "phantom_reference.png"
CHANGES_ANATOMY = {"heart", "ventricles", "sulci", "spleen", "emphysema", "fatty", "wall", "lobes"}


def one_of_each():
    "Two pictures with findings of each kind, in a fixed order."
    chosen = {}
    for p in pictures(300, seed=9):
        if len(p.findings) > 0 and len(chosen.setdefault(p.kind, [])) < 2:
            chosen[p.kind].append(p)
    return [p for kind in sorted(chosen) for p in chosen[kind]]


def test_pixels_are_the_stored_ones_within_one_grey_level():
    drawn = np.asarray(contact_sheet(draw(one_of_each(), 64), columns=4, gap=0)).astype(int)
    stored = np.asarray(Image.open(REFERENCE)).astype(int)
    assert drawn.shape == stored.shape
    assert np.abs(drawn - stored).max() <= 1


def test_drawing_depends_on_the_truth_alone():
    truths = pictures(60, seed=2)
    images = draw(truths, 64)
    assert images.dtype == np.uint8 and images.shape == (60, 64, 64)
    assert np.array_equal(images, draw(truths, 64, batch_size=3))
    assert np.array_equal(images[::-1], draw(truths[::-1], 64))
    assert np.array_equal(images[17], draw([truths[17]], 64)[0])


@pytest.mark.parametrize("size", [32, 96, 224])
def test_other_sizes_show_the_same_picture(size):
    truths = pictures(12, seed=3)
    small, large = draw(truths, 32).astype(float), draw(truths, size)
    again = np.stack([np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BOX), float) for x in large])
    for a, b in zip(small, again):
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.7


def every_finding():
    "A picture for each finding in each kind and size, on a plain patient of seed 4 whose facts allow it."
    plain = {}
    for p in pictures(1500, seed=4):
        plain.setdefault((p.kind, *p.facts.values()), replace(p, findings=(), mark=""))
    for entry in vocabulary()["findings"]:
        for kind, place in entry["in"].items():
            fits = [p for p in plain.values() if p.kind == kind and all(p.facts[k] in v for k, v in place.get("when", {}).items())]
            for i, size in enumerate(place.get("sizes", SCALE)):
                p = fits[i % len(fits)]
                side = "" if not place.get("sides") else ("left", "right")[i % 2]
                zone = list(place["at"])[i % len(place["at"])]
                yield p, Finding(entry["name"], entry["cui"], side, zone, size, (500, 500, 500, 100 * i + 99, 640))


CASES = list(every_finding())


@pytest.mark.parametrize("p, f", CASES, ids=[f"{p.kind}-{f.name}-{f.size}".replace(" ", "_") for p, f in CASES])
def test_boxes_hold_what_is_painted_and_it_can_be_seen(p, f):
    "Draw with and without the finding: what changes lies in the box, and it is no faint change."
    ill = replace(p, findings=(f,))
    difference = np.abs(draw([ill], 128)[0].astype(int) - draw([p], 128)[0].astype(int))
    if painter_of(f, p.kind) in ("usstone", "uscyst"):  # the shadow or the brightness behind it is no part of it
        difference[round(max(b["box"][3] for b in boxes(ill)) * 128):] = 0
    inside = np.zeros((128, 128), bool)
    for b in boxes(ill):
        x0, y0, x1, y1 = b["box"]
        assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
        inside[max(0, int(y0 * 128) - 1):int(np.ceil(y1 * 128)) + 1, max(0, int(x0 * 128) - 1):int(np.ceil(x1 * 128)) + 1] = True
    assert difference[~inside].sum() <= 0.02 * difference.sum(), "something is painted outside the box"
    assert (difference > 20).sum() >= 12, "nobody could see this finding"


def test_every_finding_has_somebody_who_draws_it():
    drawn_by = {place["draw"] for f in vocabulary()["findings"] for place in f["in"].values()}
    assert drawn_by == set(PAINT) | set(WIRES) | CHANGES_ANATOMY


def test_left_is_on_the_right_of_a_frontal_picture():
    p = next(replace(p, findings=(), mark="") for p in pictures(300) if p.kind == "chest_frontal")
    for side, half in (("left", slice(64, None)), ("right", slice(None, 64))):
        ill = replace(p, findings=(Finding("Lung mass", "C0149726", side, "mid", "moderate", (500,) * 5),))
        changed = draw([ill])[0].astype(int) - draw([p])[0]
        assert (changed[:, half] > 20).sum() > 50 and boxes(ill)[0]["side"] == side
        other = changed.copy()
        other[:, half] = 0
        assert np.abs(other).max() == 0


def test_marks_are_drawn():
    p = next(p for p in pictures(300) if p.mark == "arrow")
    plain = draw([replace(p, mark="")])[0].astype(int)
    masks = [np.abs(draw([replace(p, mark=m)])[0] - plain) > 0 for m in ("arrow", "asterisk", "circle")]
    assert all(m.sum() > 10 for m in masks)
    assert not np.array_equal(masks[0], masks[1]) and not np.array_equal(masks[1], masks[2])


def test_frame_is_undone_by_the_grid():
    f = Frame(1.1, 0.9, 0.05, 0.02, -0.04)
    x, y = f.to_picture(0.3, -0.2)
    u = (x - f.tx) * (f.keep / f.sx) + (y - f.ty) * (f.turn / f.sx)
    v = (y - f.ty) * (f.keep / f.sy) - (x - f.tx) * (f.turn / f.sy)
    assert (u, v) == (pytest.approx(0.3), pytest.approx(-0.2))
    x0, y0, x1, y1 = f.rectangle((-0.1, -0.1, 0.1, 0.1), margin=0)
    assert (x1 - x0, y1 - y0) == (pytest.approx((0.2 * 1.1 * f.keep + 0.2 * 0.9 * 0.05) / 2, abs=1e-3), pytest.approx((0.2 * 0.9 * f.keep + 0.2 * 1.1 * 0.05) / 2, abs=1e-3))
    assert max(frame_of(p).rectangle((-3, -3, 3, 3)) for p in pictures(20)) == (0.0, 0.0, 1.0, 1.0)


def test_signed_distance_of_a_square():
    square = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    x, y = np.meshgrid(*[np.linspace(-0.98, 0.98, 50)] * 2)
    found = signed_distance(square, x, y)
    inner = 0.5 - np.maximum(np.abs(x), np.abs(y))
    assert np.allclose(found[inner > 0], inner[inner > 0])
    assert np.all(found[inner < 0] < 0)
    corner = (np.abs(x) > 0.5) & (np.abs(y) > 0.5)
    assert np.allclose(-found[corner], np.hypot(np.abs(x) - 0.5, np.abs(y) - 0.5)[corner])
    assert soft(np.array([-1.0, 0.0, 1.0])).tolist() == [0, 0.5, 1]
    assert len(curve([[0, 0], [1, 0], [0, 1]], 4)) == 12


def test_atlas_index_reads_the_pixel_under_a_point():
    side = 2 * 64
    at = (np.arange(side) + 0.5) / side * 2.5 - 1.25
    u, v = np.meshgrid(at, at)
    assert np.array_equal(atlas_index(u.astype(np.float32), v.astype(np.float32), 64).ravel(), np.arange(side * side))
    assert all(np.isfinite(layer).all() for name in ("chest_frontal", "chest_lateral", "head", "abdomen", "ultrasound") for layer in atlas(name, 64).values())


def test_pairs_table_keeps_its_promises():
    from datasets import Image as ImageFeature

    pairs, truths = phantom_pairs(120, seed=5, size=64), pictures(120, seed=5)
    assert len(pairs) == 120 and isinstance(pairs.features["image"], ImageFeature)
    assert pairs["captions"][:] == [[caption(p)] for p in truths]
    assert pairs["concepts"][:] == [concepts(p) for p in truths]
    assert pairs["group"][:] == [p.patient for p in truths] and len(set(pairs["image_id"])) == 120
    assert set(pairs["split"]) == {"train", "validation", "test"}
    assert {v for v, p in zip(pairs["view"], truths) if p.kind == "chest_lateral"} <= {"lateral"}
    images = np.stack([np.asarray(x) for x in pairs["image"]])
    assert np.array_equal(images, draw(truths, 64))  # lossless
    for stored, p in zip(pairs["boxes"], truths):
        assert [(b["cui"], b["finding"], b["side"]) for b in stored] == [(b["cui"], b["finding"], b["side"]) for b in boxes(p)]
        assert np.allclose([b["box"] for b in stored], [b["box"] for b in boxes(p)]) if stored else not p.findings
    studies = {}
    for study, text in zip(pairs["study"], zip(pairs["report_findings"], pairs["report_impression"])):
        assert studies.setdefault(study, text) == text and all(text)
    sexes = {}
    for g, s, a in zip(pairs["group"], pairs["sex"], pairs["age"]):
        assert sexes.setdefault(g, (s, a)) == (s, a) and s in "MF" and 3 <= a < 100


def test_long_tables_are_kept_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("RADCLIP_CACHE", str(tmp_path))
    first = phantom_pairs(2000, size=32)
    (kept,) = tmp_path.iterdir()
    made = kept.stat().st_mtime_ns
    again = phantom_pairs(2000, size=32)
    assert kept.stat().st_mtime_ns == made and again["captions"][:] == first["captions"][:]
    assert phantom_pairs(30, size=32)["image_id"][:] == first["image_id"][:30]
    assert np.array_equal(np.asarray(again[1999]["image"]), np.asarray(first[1999]["image"]))
    assert first.features == phantom_pairs(1, size=32).features


@pytest.mark.parametrize("wrong", [dict(n=0), dict(n=-3), dict(n=5, size=8)])
def test_impossible_requests_are_named(wrong):
    with pytest.raises(ValueError, match="phantom_pairs needs"):
        phantom_pairs(**wrong)


def test_concepts_have_names():
    assert phantom_concepts()["C0032227"] == "Pleural effusion" and phantom_concepts()["C1306645"] == "X-ray"
