"Writers: the files they leave are those of the public sets, and no half-written folder is ever seen."
import csv, io, os
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image

from radclip.layouts import LAYOUTS, image_bytes, openi_studies, pair_rows, write_layout
from radclip.phantom import phantom_pairs

DATA = os.environ.get("RADCLIP_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="RADCLIP_DATA is not set: the real files aren't at hand")


@pytest.fixture(scope="module")
def pairs(): return phantom_pairs(40, seed=3, size=64)


@pytest.fixture(scope="module")
def written(pairs, tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    return {kind: write_layout(pairs, root / kind, kind) for kind in [*LAYOUTS, "disk"]}


def tree(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("kind, files", [
    ("roco", ["captions.txt", "cuis.txt", "images/ROCO_00001.jpg", "keywords.txt", "licences.txt"]),
    ("roco-csv", ["captions.txt", "cuis.txt", "keywords.txt", "licences.txt", "traindata.csv"])])
def test_roco_tree(written, kind, files):
    base = written[kind] / ("all_data/train/radiology" if kind == "roco-csv" else "train/radiology")
    assert all((base / name).is_file() for name in files)


def test_other_trees(written):
    assert {"train_captions.csv", "valid_concepts.csv", "license_information.csv", "test/ROCOv2_2023_test_000001.jpg"} <= set(tree(written["rocov2"]))
    assert {"indiana_reports.csv", "indiana_projections.csv"} <= set(tree(written["openi"])) and any(f.startswith("images/images_normalized/1_IM-0001-") for f in tree(written["openi"]))
    assert {"captions.txt", "Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt"} <= set(tree(written["flickr8k"]))
    assert "data/train-00000-of-00001.parquet" in tree(written["openi-hub"])


def test_every_image_file_opens(written):
    for folder in written.values():
        for path in (p for p in folder.rglob("*") if p.suffix in (".jpg", ".png")):
            with Image.open(path) as image:
                image.load()
                assert image.format == {".jpg": "JPEG", ".png": "PNG"}[path.suffix] and image.size == (64, 64)


@pytest.mark.parametrize("kind, columns", [
    ("rocov2-hub", {"image", "image_id", "caption", "cui"}), ("flickr8k-hub", {"image", *(f"caption_{k}" for k in range(5))}),
    ("openi-hub", {"uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression", "img_frontal", "img_lateral"})])
def test_hub_schema(written, kind, columns, tmp_path):
    ds = load_dataset("parquet", data_files={"train": str(written[kind] / "data" / "train-00000-of-00001.parquet")}, cache_dir=str(tmp_path))["train"]
    assert set(ds.column_names) == columns
    if kind == "openi-hub":
        assert ds[0]["img_frontal"][:3] == b"\xff\xd8\xff" and ds.features["uid"].dtype == "int64"
    else:
        assert type(ds.features["image"]).__name__ == "Image"


def head(path, n=1): return path.read_bytes().split(b"\n")[:n]


@needs_data
@pytest.mark.parametrize("kind, mine, real", [
    ("roco", "test/radiology/licences.txt", "roco/test/radiology/licences.txt"), ("flickr8k", "captions.txt", "flickr8k/captions.txt"),
    ("openi", "indiana_reports.csv", "openi/indiana_reports.csv"), ("openi", "indiana_projections.csv", "openi/indiana_projections.csv")])
def test_headers_are_the_real_ones_to_the_byte(written, kind, mine, real):
    assert head(written[kind] / mine) == head(Path(DATA) / real)


@needs_data
@pytest.mark.parametrize("name", ["captions.txt", "cuis.txt", "keywords.txt"])
def test_roco_lines_have_the_real_shape(written, name):
    import re
    shape = {"captions.txt": rb"ROCO_\d{5}\t +\S[^\t\n]*", "cuis.txt": rb"ROCO_\d{5}\t(\tC\d{7}[^\t]*)*", "keywords.txt": rb"ROCO_\d{5}\t(\t[^\t]+)*"}[name]
    for folder in (written["roco"], Path(DATA) / "roco"):
        lines = (folder / "test" / "radiology" / name).read_bytes().splitlines()
        assert lines and sum(bool(re.fullmatch(shape, line)) for line in lines) / len(lines) > 0.999


@needs_data
def test_roco_licence_rows_have_the_real_shape(written):
    import re
    for folder in (written["roco"], Path(DATA) / "roco"):
        rows = list(csv.reader((folder / "test/radiology/licences.txt").open()))[1:]
        assert all(re.fullmatch(r"ROCO_\d{5}", key) and re.match(r"PMC\d+_.+\.(jpg|gif|png|tif)", name) and licence.startswith(("CC", "NO-CC")) for key, name, licence in rows)


def test_an_image_already_in_the_format_is_not_encoded_again(tmp_path):
    out = io.BytesIO()
    Image.new("L", (8, 8), 77).save(out, "JPEG", quality=60)
    assert image_bytes({"bytes": out.getvalue(), "path": None}, "JPEG") == out.getvalue()
    (tmp_path / "x.jpg").write_bytes(out.getvalue())
    assert image_bytes({"bytes": None, "path": str(tmp_path / "x.jpg")}, "JPEG") == out.getvalue()
    assert image_bytes({"bytes": out.getvalue(), "path": None}, "PNG").startswith(b"\x89PNG")
    transparent = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(transparent, "PNG")
    assert Image.open(io.BytesIO(image_bytes({"bytes": transparent.getvalue(), "path": None}, "JPEG"))).mode == "RGB"


def test_openi_takes_one_study_a_patient(pairs):
    rows = pair_rows(pairs)
    studies = openi_studies(rows)
    patients = [row["group"] for row in rows if row["view"] in ("frontal", "lateral")]
    assert len(studies) == len(set(patients))
    for report, views in studies:
        assert len({row["study"] for row in views.values()}) == 1 and all(row["view"] == view for view, row in views.items())
        assert report["findings"] == next(iter(views.values()))["report_findings"]


def test_openi_refuses_a_table_without_chest_views(pairs):
    other = pairs.filter(lambda view: view not in ("frontal", "lateral"), input_columns="view")
    with pytest.raises(ValueError, match="frontal or lateral"): openi_studies(pair_rows(other))


def test_unknown_layout_and_folder_in_use(pairs, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'rocov2'"): write_layout(pairs, tmp_path / "x", "rocv2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not empty"): write_layout(pairs, tmp_path / "full", "jsonl")
    assert (tmp_path / "full" / "precious.txt").read_text() == "keep me"


def test_a_failed_write_leaves_nothing(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("radclip.layouts.json.dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError): write_layout(pairs, tmp_path / "x", "jsonl")
    assert list(tmp_path.iterdir()) == []
