"""Search: filters, hits and batches against a plain loop; mining against brute force; tuning against its own table."""
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pil

from radclip.model import build_model, encode_images, encode_texts
from radclip.search import SearchIndex, like, matching_rows, mine_hard_negatives, show_hits, tune

COUNT = 300  # more than one row group


def unit(count, seed, width=16):
    made = np.random.default_rng(seed).standard_normal((count, width)).astype("float32")
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def make_pairs(count=COUNT):
    "Noise pictures with one to three captions, patients of three images, and columns of each kind."
    draw = np.random.default_rng(0)
    text, rows = Value("string"), []
    for row in range(count):
        captions = [f"finding {row % 90}", f"detail {row}", "common words"][: 1 + row % 3]
        rows.append({"image": Pil.fromarray(draw.integers(0, 255, (32, 32), dtype=np.uint8)), "captions": captions,
                     "image_id": f"im{row}", "group": f"g{row // 3}", "split": ("train", "validation", "test")[row // 3 % 3],
                     "concepts": ["C0032285"] * (row % 4 == 0) + ["C0032326"] * (row % 5 == 0), "view": "frontal" if row % 2 else None,
                     "age": row % 80, "dose": row / 4, "urgent": row % 7 == 0,
                     "boxes": [{"cui": "C0032285", "box": [0.0, 0.0, 1.0, 1.0]}], "nothing": None})
    kinds = {"image": Image(), "captions": List(text), "image_id": text, "group": text, "split": text, "concepts": List(text),
             "view": text, "age": Value("int32"), "dose": Value("float32"), "urgent": Value("bool"),
             "boxes": List({"cui": text, "box": List(Value("float32"))}), "nothing": Value("null")}
    return Dataset.from_list(rows, Features(kinds))


@pytest.fixture(scope="module")
def pairs():
    return make_pairs()


@pytest.fixture(scope="module")
def encoder(pairs):
    torch.manual_seed(0)
    return build_model({"kind": "phantom", "embed_dim": 16}, captions=[text for row in pairs["captions"] for text in row])


@pytest.fixture(scope="module")
def index(encoder, pairs):
    return SearchIndex.build(encoder, pairs)


FILTERS = [
    ({"split": "test"}, lambda row: row["split"] == "test"),
    ({"split": ["test", "train"]}, lambda row: row["split"] in ("test", "train")),
    ({"concepts": "C0032285"}, lambda row: "C0032285" in row["concepts"]),
    ({"concepts": ["C0032285", "C0032326"], "split": "test"}, lambda row: row["concepts"] and row["split"] == "test"),
    ({"view": "frontal", "age": 7}, lambda row: row["view"] == "frontal" and row["age"] == 7),
    ({"age": "7"}, lambda row: row["age"] == 7),  # as the command line gives it
    ({"dose": 0.25}, lambda row: row["dose"] == 0.25),
    ({"urgent": True}, lambda row: row["urgent"]),
    ({"urgent": "false"}, lambda row: not row["urgent"]),
    ({"captions": "common words"}, lambda row: "common words" in row["captions"]),
    ({"group": "g4", "split": "train"}, lambda row: False),  # each value is there, together they are not
]


@pytest.mark.parametrize("filters, keeps", FILTERS)
def test_filters_equal_a_plain_loop(index, pairs, filters, keeps):
    rows = [number for number, row in enumerate(pairs.remove_columns("image")) if keeps(row)]
    assert matching_rows(index.rows.table, filters).tolist() == rows
    query = unit(1, 5)
    found = index.search_vectors(query, k=COUNT, filters=filters)[0]
    scores = index.sides["images"].vectors[rows] @ query[0]
    assert [hit.image_id for hit in found] == [f"im{rows[place]}" for place in np.argsort(-scores, kind="stable")]


@pytest.mark.parametrize("filters, keeps", FILTERS)
def test_filters_on_texts_keep_captions_of_kept_images(index, pairs, filters, keeps):
    rows = [row for row in pairs.remove_columns("image") if keeps(row)]
    found = index.search_vectors(unit(1, 6), k=10**6, to="texts", filters=filters)[0]
    assert sorted(hit.text for hit in found) == sorted({text for row in rows for text in row["captions"]})
    first = {text: row["image_id"] for row in reversed(rows) for text in row["captions"]}
    assert all(hit.image_id == first[hit.text] and hit.text in hit.captions for hit in found)


@pytest.mark.parametrize("filters, words", [
    ({"splitt": "test"}, "no column 'splitt'.*did you mean 'split'"), ({"split": "tets"}, "split = 'tets'.*did you mean 'test'"),
    ({"concepts": "C003228"}, "did you mean 'C0032285'"), ({"age": "old"}, "'old' is no value for column 'age'"),
    ({"boxes": "C0032285"}, "'boxes' can't be filtered"), ({"nothing": "x"}, "nothing"), ({"age": 1000}, "no row has age = 1000"),
])
def test_a_mistyped_filter_is_one_line(index, filters, words):
    with pytest.raises(ValueError, match=words) as caught:
        index.search("finding", filters=filters)
    assert "\n" not in str(caught.value)


def test_an_empty_value_is_named_among_those_present():
    import pyarrow as pa
    table = pa.table({"view": ["", "frontal", "", "lateral"], "sex": pa.array([None] * 4, pa.string())})
    with pytest.raises(ValueError, match=r"no row has view = 'oblique'; there are \(empty\), frontal, lateral$"): matching_rows(table, {"view": "oblique"})
    with pytest.raises(ValueError, match="there are no values at all"): matching_rows(table, {"sex": "woman"})
    assert matching_rows(table, {"view": ""}).tolist() == [0, 2]


def test_text_to_images_equals_brute_force(index, encoder, pairs):
    images = encode_images(encoder, pairs).numpy()
    queries = ["finding 3", "detail 17"]
    for query, hits in zip(queries, index.search(text=queries, k=7)):
        scores = images @ encode_texts(encoder, [query]).numpy()[0]
        assert np.allclose([hit.score for hit in hits], np.sort(scores)[::-1][:7], atol=1e-5)
        assert [hit.rank for hit in hits] == list(range(1, 8))


def test_image_to_texts_gives_distinct_captions(index, encoder, pairs):
    hits = index.search(image=pairs[8]["image"], to="texts", k=20)
    texts = list(dict.fromkeys(text for row in pairs["captions"] for text in row))
    scores = encode_texts(encoder, texts).numpy() @ encode_images(encoder, [pairs[8]["image"]]).numpy()[0]
    assert [hit.text for hit in hits] == [texts[place] for place in np.argsort(-scores, kind="stable")[:20]]


def test_image_to_images_finds_itself_by_picture_and_by_path(index, pairs, tmp_path):
    pairs[42]["image"].save(tmp_path / "query.png")
    for query in (pairs[42]["image"], str(tmp_path / "query.png"), tmp_path / "query.png"):
        best = index.search(image=query, k=3)[0]
        assert best.image_id == "im42" and best.score == pytest.approx(1, abs=1e-4)


def test_like_gives_the_neighbours_without_the_image(index):
    hits = like(index, "im42", k=5)
    vectors = index.sides["images"].vectors
    order = [row for row in np.argsort(-(vectors @ vectors[42]), kind="stable") if row != 42]
    assert [hit.image_id for hit in hits] == [f"im{row}" for row in order[:5]] and [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
    assert len(like(index, "im42", k=1000)) == COUNT - 1
    with pytest.raises(ValueError, match="no image 'img42'.*did you mean"):
        like(index, "img42")


def test_one_query_gives_a_list_and_a_batch_gives_lists(index, pairs):
    one, batch = index.search("finding 3", k=4), index.search(["finding 3"], k=4)
    assert [hit.to_dict() for hit in one] == [hit.to_dict() for hit in batch[0]]
    assert [len(row) for row in index.search(image=[pairs[0]["image"], pairs[1]["image"]], k=2)] == [2, 2]


def test_k_larger_than_the_pool(index):
    assert len(index.search("finding", k=10_000)) == COUNT
    assert len(index.search("finding", k=10_000, filters={"group": "g4"})) == 3


@pytest.mark.parametrize("asked, words", [
    ({"text": ""}, "query is empty"), ({"text": "  \n"}, "query is empty"), ({"text": []}, "query is empty"),
    ({"text": ["finding", " "]}, "query is empty"), ({}, "nothing to search for"), ({"text": "a", "image": "b.png"}, "give one of the two"),
    ({"text": "a", "k": 0}, "k is 0"), ({"text": "a", "to": "reports"}, "images or texts"), ({"image": []}, "query is empty"),
])
def test_questions_that_make_no_sense(index, asked, words):
    with pytest.raises(ValueError, match=words):
        index.search(**asked)


def test_a_missing_or_broken_query_image(index, tmp_path):
    with pytest.raises(FileNotFoundError):
        index.search(image=tmp_path / "none.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="broken.png"):
        index.search(image=tmp_path / "broken.png")


def test_hits_are_json_and_carry_their_picture(index, pairs):
    hit = index.search("finding 3", filters={"image_id": "im280"})[0]
    told = json.loads(json.dumps(hit.to_dict()))
    assert told["image_id"] == "im280" and told["captions"] == pairs.select_columns("captions")[280]["captions"]
    assert told["columns"]["split"] == "train" and told["text"] is None
    difference = np.asarray(hit.thumbnail(), dtype=float) - np.asarray(pairs[280]["image"], dtype=float)
    assert abs(difference).mean() < 12  # JPEG of noise


@pytest.mark.parametrize("kind", ["hnsw", "compressed"])
def test_every_kind_as_an_index(encoder, pairs, kind, tmp_path):
    texts = sum(len(row) for row in pairs["captions"])
    made = SearchIndex.build(encoder, pairs, kind=kind, embeddings=(unit(COUNT, 1), unit(texts, 2)))
    again = SearchIndex.load(made.save(tmp_path / "index"))
    found = again.search_vectors(unit(5, 3), k=5)
    truth = np.argsort(-(unit(5, 3) @ unit(COUNT, 1).T), axis=1)[:, :5]
    kept = np.mean([len({hit.image_id for hit in hits} & {f"im{row}" for row in rows}) / 5 for hits, rows in zip(found, truth)])
    assert kept > 0.6 and again.info["kinds"] == {"images": kind, "texts": kind}
    assert [[h.to_dict() for h in hits] for hits in found] == [[h.to_dict() for h in hits] for hits in made.search_vectors(unit(5, 3), k=5)]


def test_given_embeddings_of_captions_are_matched_to_texts(encoder, pairs):
    texts = [text for row in pairs["captions"] for text in row]
    of_text = {text: vector for text, vector in zip(dict.fromkeys(texts), unit(len(set(texts)), 4))}
    made = SearchIndex.build(encoder, pairs, embeddings=(unit(COUNT, 1), np.stack([of_text[text] for text in texts])))
    for text in ("finding 3", "detail 17", "common words"):
        assert made.search_vectors(of_text[text][None], k=1, to="texts")[0][0].text == text


def test_an_empty_table_and_a_wrong_kind(encoder, pairs):
    with pytest.raises(ValueError, match="nothing to index"):
        SearchIndex.build(encoder, pairs.select([]))
    with pytest.raises(ValueError, match="unknown index kind"):
        SearchIndex.build(encoder, pairs, kind="fast")


def test_an_unfinished_run_can_not_be_searched_with(tmp_path, pairs):
    from radclip.recipe import load_recipe, new_run
    with pytest.raises(FileNotFoundError, match="its training did not end"): SearchIndex.build(new_run(load_recipe("phantom"), tmp_path), pairs)


def test_tune_keeps_the_cheapest_above_the_target(encoder, pairs, tmp_path):
    texts = sum(len(row) for row in pairs["captions"])
    made = SearchIndex.build(encoder, pairs, kind="hnsw", embeddings=(unit(COUNT, 1), unit(texts, 2)))
    table = tune(made, target=0.9, grid=[{"efSearch": ef} for ef in (10, 40, 300)])
    picked = [row for row in table if row["picked"]]
    enough = [row for row in table if row["recall"] >= 0.9]
    assert len(picked) == 1 and picked[0]["ms"] == min(row["ms"] for row in enough)
    again = SearchIndex.load(made.save(tmp_path / "index"))
    assert again.sides["images"].settings == picked[0]["settings"] == again.info["settings"]["images"]
    assert again.info["tuned"]["images"]["target"] == 0.9


def test_the_figure_of_results(index, pairs):
    figure = show_hits(index.search("finding 3", k=3), "finding 3; pool of 300 noise images", query=pairs[3]["image"])
    assert [axes.get_title()[:2] for axes in figure.axes] == ["qu", "1.", "2.", "3."]


def brute_force_negatives(pairs, images, texts, n):
    "One image at a time, with sets."
    rows = list(pairs.remove_columns("image"))
    start, spans = 0, []
    for row in rows:
        spans.append(texts[start : start + len(row["captions"])])
        start += len(row["captions"])
    for i, own in enumerate(rows):
        scored = [(-max(float(images[i] @ text) for text in spans[j]), j) for j, other in enumerate(rows)
                  if other["group"] != own["group"] and not set(other["captions"]) & set(own["captions"])]
        yield [rows[j]["image_id"] for _, j in sorted(scored)[:n]]


@pytest.mark.parametrize("captions", ["several", "one"])
def test_mining_equals_brute_force(encoder, pairs, captions):
    table = pairs if captions == "several" else pairs.map(lambda row: {"captions": row["captions"][:1]}, remove_columns="image").add_column("image", [None] * COUNT)
    images, texts = unit(COUNT, 1), unit(sum(len(row) for row in table["captions"]), 2)
    mined = mine_hard_negatives(encoder, table, n=6, embeddings=(images, texts))
    assert list(mined["image_id"]) == list(pairs["image_id"])
    assert list(mined["negatives"]) == list(brute_force_negatives(table, images, texts, 6))


def test_equal_negatives_come_in_the_order_of_their_rows(encoder, pairs):
    texts = sum(len(row) for row in pairs["captions"])
    same = np.tile(unit(1, 1), (max(texts, COUNT), 1))
    mined = mine_hard_negatives(encoder, pairs, n=4, embeddings=(same[:COUNT], same[:texts]))
    assert list(mined["negatives"])[0] == ["im3", "im4", "im5", "im6"]  # im0 to im2 are one patient


def test_a_row_may_have_fewer_negatives_than_asked(encoder, pairs):
    few = pairs.select([0, 1, 2, 3])  # one patient, and im3
    texts = sum(len(row) for row in few["captions"])
    mined = mine_hard_negatives(encoder, few, n=8, embeddings=(unit(4, 1), unit(texts, 2)))
    assert list(mined["negatives"])[:3] == [["im3"]] * 3 and set(mined["negatives"][3]) == {"im0", "im1", "im2"}


def test_unreadable_images_are_no_negatives(encoder, tmp_path):
    paths = [tmp_path / f"{row}.png" for row in range(12)]
    for row, path in enumerate(paths): Pil.fromarray(np.random.default_rng(row).integers(0, 255, (32, 32), dtype=np.uint8)).save(path)
    text = Value("string")
    table = Dataset.from_dict({"image": list(map(str, paths)), "captions": [[f"finding {row}", "a detail"][: 1 + (row == 2)] for row in range(12)],
                               "image_id": [f"im{row}" for row in range(12)], "group": [f"g{row}" for row in range(12)]},
                              Features({"image": Image(), "captions": List(text), "image_id": text, "group": text}))
    left = [row for row in range(12) if row not in (2, 7)]
    wanted = mine_hard_negatives(encoder, table.select(left), n=3)
    paths[2].write_bytes(paths[2].read_bytes()[:80]), paths[7].unlink()
    with pytest.warns(UserWarning, match=r"2 of 12 images can't be read and are left out: row 2 \(im2\)"): mined = mine_hard_negatives(encoder, table, n=3)
    assert mined["image_id"][:] == [f"im{row}" for row in left] and mined["negatives"][:] == wanted["negatives"][:]


def test_mined_file_is_what_training_reads(encoder, pairs, tmp_path):
    few = pairs.select(range(30))
    mined = mine_hard_negatives(encoder, few, n=3, out=tmp_path / "negatives.parquet")
    read = pq.read_table(tmp_path / "negatives.parquet")
    assert read.column_names == ["image_id", "negatives"] and read["negatives"].to_pylist() == list(mined["negatives"])
    assert str(read.schema.field("image_id").type) == "string" and str(read.schema.field("negatives").type).startswith("list<")
    assert [path.name for path in tmp_path.iterdir()] == ["negatives.parquet"]
