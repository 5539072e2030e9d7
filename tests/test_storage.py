"""Storage: the folder moved, spoiled in every way, and saved while something goes wrong."""
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pil

from radclip.model import build_model, encode_images, encode_texts, save_model
from radclip.search import SearchIndex
from radclip.storage import ROW_GROUP, Captions, shrink, write_rows


def pairs(count=40, seed=0):
    "Small noise pictures; every third image shares its caption with the one before."
    draw = np.random.default_rng(seed)
    rows = {"image": [Pil.fromarray(draw.integers(0, 255, (40, 30), dtype=np.uint8)) for _ in range(count)],
            "captions": [[f"finding {row - (row % 3 == 2)}"] + ["a second caption"] * (row % 2) for row in range(count)],
            "image_id": [f"im{row}" for row in range(count)], "group": [f"g{row // 2}" for row in range(count)],
            "split": ["test"] * count, "concepts": [["C01"] * (row % 4 == 0) + ["C02"] * (row % 5 == 0) for row in range(count)],
            "age": list(range(count))}
    text = Value("string")
    kinds = {"image": Image(), "captions": List(text), "image_id": text, "group": text, "split": text,
             "concepts": List(text), "age": Value("int32")}
    return Dataset.from_dict(rows, Features(kinds))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return build_model({"kind": "phantom", "embed_dim": 16}, captions=[f"finding {n} a second caption" for n in range(50)])


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    return SearchIndex.build(encoder, pairs()).save(tmp_path_factory.mktemp("index") / "index")


@pytest.fixture
def index_folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "moved" / "index")


def test_a_moved_folder_answers_as_before(saved, index_folder):
    one, two = SearchIndex.load(saved), SearchIndex.load(index_folder)
    for to in ("images", "texts"):
        assert [hit.to_dict() for hit in one.search("finding 3", to=to)] == [hit.to_dict() for hit in two.search("finding 3", to=to)]


def test_the_folder_holds_what_it_says(saved):
    info = json.loads((saved / "index.json").read_text())
    assert sorted(path.name for path in saved.iterdir()) == ["images.faiss", "index.json", "model", "rows.parquet", "texts.faiss"]
    assert info["sizes"] == {"images": 40, "texts": 28} and info["dim"] == 16  # 27 findings, one second caption
    assert info["kinds"] == {"images": "exact", "texts": "exact"} and len(info["model"]) == 16
    assert set(info["files"]) == {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()} - {"index.json"}


@pytest.mark.parametrize("name", ["index.json", "images.faiss", "texts.faiss", "rows.parquet", "model/open_clip_model.safetensors",
                                  "model/open_clip_config.json"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "empty", "changed"])
def test_each_spoiled_file_is_one_clear_error(index_folder, name, fault):
    path = index_folder / name
    content = path.read_bytes()
    if fault == "missing":
        path.unlink()
    else:
        flipped = content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 255]) + content[len(content) // 2 + 1 :]
        path.write_bytes({"truncated": content[:-10], "empty": b"", "changed": flipped}[fault])
    with pytest.raises(FileNotFoundError if fault == "missing" else ValueError) as caught:
        SearchIndex.load(index_folder)
    assert name.split("/")[-1] in str(caught.value) and "\n" not in str(caught.value) and "radclip index" in str(caught.value)


@pytest.mark.parametrize("spoil, words", [
    (lambda info: info | {"format": 99}, "format 99"),
    (lambda info: {key: info[key] for key in info if key != "kinds"}, "lacks kinds"),
    (lambda info: [info], "damaged"),
])
def test_an_index_json_from_elsewhere(index_folder, spoil, words):
    path = index_folder / "index.json"
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=words):
        SearchIndex.load(index_folder)


def test_another_model_in_the_folder_is_refused(index_folder, encoder):
    torch.manual_seed(1)
    other = build_model({"kind": "phantom", "embed_dim": 16}, captions=[f"finding {n} a second caption" for n in range(50)])
    save_model(other, index_folder / "model")
    with pytest.raises(ValueError, match="model.*is not the file that this index was built with"):
        SearchIndex.load(index_folder)


def test_a_stranger_beside_the_model_is_refused(index_folder):
    (index_folder / "model" / "pytorch_model.bin").write_bytes(b"code")
    with pytest.raises(ValueError, match="pytorch_model.bin does not belong"):
        SearchIndex.load(index_folder)


def test_a_wrong_fingerprint_is_refused_when_the_model_is_needed(index_folder):
    path = index_folder / "index.json"
    path.write_text(path.read_text().replace(json.loads(path.read_text())["model"], "0" * 16))
    with pytest.raises(ValueError, match="not the model that this index was built with"):
        SearchIndex.load(index_folder).search("finding 1")


def test_no_index_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no search index.*radclip index"):
        SearchIndex.load(tmp_path / "nothing")


@pytest.mark.parametrize("step", ["copytree", "first rename", "second rename"])
def test_an_interrupted_save_keeps_the_old_index(index_folder, encoder, monkeypatch, step):
    import radclip.storage as storage
    before, fresh, calls = (index_folder / "index.json").read_bytes(), SearchIndex.build(encoder, pairs(20)), []
    copy, rename = shutil.copytree, storage.os.rename

    def broken_copy(source, target):
        monkeypatch.undo()  # copytree calls itself
        copy(source, target)
        raise KeyboardInterrupt

    def broken_rename(source, target):
        calls.append(source)
        if len(calls) == (1 if step == "first rename" else 2):
            raise KeyboardInterrupt
        rename(source, target)

    if step == "copytree":
        monkeypatch.setattr(storage.shutil, "copytree", broken_copy)
    else:
        monkeypatch.setattr(storage.os, "rename", broken_rename)
    with pytest.raises(KeyboardInterrupt):
        fresh.save(index_folder)
    monkeypatch.undo()
    assert (index_folder / "index.json").read_bytes() == before and len(SearchIndex.load(index_folder).rows) == 40
    assert [path.name for path in index_folder.parent.iterdir()] == ["index"]  # nothing left lying about
    fresh.save(index_folder)
    assert len(SearchIndex.load(index_folder).rows) == 20


def test_only_an_index_is_ever_replaced(saved, tmp_path):
    index = SearchIndex.load(saved)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for target in ("thesis", "file"):
        with pytest.raises(ValueError, match="is no search index"):
            index.save(tmp_path / target)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert len(SearchIndex.load(index.save(tmp_path / "empty")).rows) == 40


def test_an_index_can_be_saved_over_itself(index_folder):
    SearchIndex.load(index_folder).save(index_folder)
    assert len(SearchIndex.load(index_folder).rows) == 40


def test_rows_are_written_in_batches_and_thumbnails_come_back(tmp_path):
    count, sizes = ROW_GROUP + 44, []
    table = pairs(count)
    write_rows(table, tmp_path / "rows.parquet", lambda images: sizes.append(len(images)) or np.zeros((len(images), 2)))
    assert sizes == [ROW_GROUP, 44]
    read = pq.read_table(tmp_path / "rows.parquet")
    assert read["image_id"].to_pylist() == list(table["image_id"]) and read["captions"].to_pylist() == list(table["captions"])


def test_thumbnail_of_a_row_is_that_rows_image(encoder):
    table = pairs(ROW_GROUP + 44)
    same = [table[row]["image"] for row in range(len(table))]
    vectors = np.eye(16, dtype="float32")[np.arange(len(table)) % 16], np.eye(16, dtype="float32")[np.zeros(sum(map(len, table["captions"])), int)]
    index = SearchIndex.build(encoder, table, embeddings=vectors)
    for row in (0, 5, ROW_GROUP - 1, ROW_GROUP, ROW_GROUP + 43):
        assert index.rows.thumbnail(index.rows.find(f"im{row}")) == shrink(same[row])
    with pytest.raises(ValueError, match="no image 'im9999' in the index.*did you mean"):
        index.rows.find("im9999")


def spoilt(table, rows):
    "The table with the bytes of some images cut short."
    stored = table.cast_column("image", Image(decode=False))["image"][:]
    for row in rows: stored[row] = {"bytes": stored[row]["bytes"][:80], "path": None}
    feature = Features({"image": Image(decode=False)})
    return table.remove_columns("image").add_column("image", stored, feature=feature["image"]).cast_column("image", Image())


@pytest.mark.parametrize("given", [False, True])
def test_unreadable_images_are_left_out_of_an_index(encoder, given, monkeypatch):
    monkeypatch.setattr("radclip.storage.ROW_GROUP", 8)
    lost, count = [0, 5, 11, *range(16, 24)], 26  # the third group has nothing left
    table = spoilt(pairs(count), lost)
    kept = table.select([row for row in range(count) if row not in lost])
    embeddings = None
    if given:  # of the whole table: the images were readable when they were embedded
        whole = pairs(count)
        embeddings = encode_images(encoder, whole), encode_texts(encoder, [text for row in whole["captions"] for text in row])
    with pytest.warns(UserWarning, match=r"11 of 26 images can't be read and are left out: row 0 \(im0\): .*row 5 \(im5\).*; and 6 more"):
        index = SearchIndex.build(encoder, table, embeddings=embeddings)
    clean = SearchIndex.build(encoder, kept)
    assert index.rows.table.equals(clean.rows.table) and index.info["split_hash"] == clean.info["split_hash"] and index.info["sizes"] == clean.info["sizes"]
    for side in ("images", "texts"): assert np.allclose(index.sides[side].vectors, clean.sides[side].vectors, atol=1e-5)
    for row in range(len(kept)):
        assert index.rows.thumbnail(row) == shrink(kept[row]["image"])


def test_an_index_of_unreadable_images_is_one_error(encoder):
    with pytest.raises(ValueError, match=r"none of the 4 images can be read; row 0 \(im0\)"): SearchIndex.build(encoder, spoilt(pairs(4), range(4)))


@pytest.mark.parametrize("mode, expected", [("L", "L"), ("RGB", "RGB"), ("RGBA", "RGB"), ("I;16", "L"), ("I", "L"), ("F", "L"), ("1", "L"), ("P", "RGB")])
def test_thumbnails_of_every_kind_of_image(mode, expected):
    import io
    grey = Pil.fromarray(np.tile(np.linspace(0, 255, 600).astype("uint8"), (300, 1)))
    image = Pil.fromarray(np.tile(np.linspace(0, 60000, 600).astype("uint16"), (300, 1))) if mode == "I;16" else grey.convert(mode)
    small = Pil.open(io.BytesIO(shrink(image)))
    assert small.size == (256, 128) and small.mode == expected and small.format == "JPEG"
    values = np.asarray(small.convert("L"), dtype=float)
    assert values[:, :20].mean() < 40 and values[:, -20:].mean() > 210  # dark left, bright right: nothing was clipped


def test_small_images_are_not_enlarged():
    import io
    assert Pil.open(io.BytesIO(shrink(Pil.new("L", (30, 40))))).size == (30, 40)


def test_captions_know_their_images():
    table = pairs()
    captions = Captions(table.with_format("arrow")[:]["captions"])
    listed = list(table["captions"])
    assert captions.texts == list(dict.fromkeys(text for row in listed for text in row))
    for number, text in enumerate(captions.texts):
        assert captions.images_of(number).tolist() == [row for row, texts in enumerate(listed) if text in texts]
    some = np.array([3, 8, 11])
    assert captions.texts_of(some, len(table)).tolist() == sorted({captions.texts.index(text) for row in some for text in listed[row]})


def test_vectors_in_the_index_are_the_models(encoder, saved):
    index, table = SearchIndex.load(saved), pairs()
    assert np.allclose(index.sides["images"].vectors, encode_images(encoder, table).numpy(), atol=1e-5)
    assert np.allclose(index.sides["texts"].vectors, encode_texts(encoder, index.rows.captions.texts).numpy(), atol=1e-5)
