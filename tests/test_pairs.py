"The pairs table: what goes in, what is refused, and that nothing vanishes unreported."
import io, json

import pytest
from datasets import Image as HubImage
from hypothesis import given, settings, strategies as st
from PIL import Image

from radclip.pairs import as_list, check_image, clean_rows, guess_columns, make_table, map_columns, need_columns, pairs_features, read_csv, read_lines, skip_summary


def png(grey=0, kind="PNG", size=(16, 16)):
    out = io.BytesIO()
    Image.new("L", size, grey).save(out, kind)
    return out.getvalue()


def noise_jpeg():
    import numpy as np
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def row(**kw): return {"image": png(), "caption": "a chest", "image_id": "a", "_where": "f:1"} | kw


def one(**kw):
    skipped = []
    return clean_rows([row(**kw)], skipped), skipped


def test_the_smallest_row_gets_every_column():
    rows, skipped = one()
    table = make_table(rows)
    assert table.features == pairs_features() and not skipped
    assert {k: table[0][k] for k in table.column_names if k != "image"} == {
        "captions": ["a chest"], "image_id": "a", "group": "a", "split": "train", "concepts": [], "view": None, "boxes": []}


def test_features_have_no_null_type_even_without_concepts():
    table = make_table(one()[0])
    assert "null" not in str(table.data.schema) and table.features["concepts"].feature.dtype == "string"


@pytest.mark.parametrize("said, read", [("dev", "validation"), ("val", "validation"), ("valid", "validation"), ("Validation", "validation"), (" TEST ", "test"), ("training", "train"), (None, "train"), ("", "train")])
def test_split_names(said, read): assert one(split=said)[0][0]["split"] == read


@pytest.mark.parametrize("fault, why", [
    ({"caption": ""}, "empty caption"), ({"caption": " \n\t"}, "empty caption"), ({"caption": None}, "empty caption"), ({"captions": [], "caption": None}, "empty caption"),
    ({"image": None}, "no image given"), ({"image": ""}, "no image given"), ({"image": "/nowhere/x.png"}, "image file is missing: /nowhere/x.png"), ({"split": "holdout"}, "unknown split: 'holdout'"),
    ({"usable": False}, "marked unusable"), ({"usable": "false"}, "marked unusable"), ({"caption": "caf\udce9"}, "not UTF-8"), ({"note": ["caf\udce9"]}, "not UTF-8"), ({"caf\udce9": 1}, "not UTF-8"),
    ({"boxes": [{"box": [0.5, 0, 0.1, 1]}]}, "not boxes"), ({"boxes": [{"box": "left"}]}, "not boxes"), ({"boxes": 3}, "not boxes"), ({"_why": "malformed JSON"}, "malformed JSON")])
def test_each_fault_is_listed_with_its_place(fault, why):
    rows, skipped = one(**fault)
    assert rows == [] and len(skipped) == 1 and skipped[0]["where"] == "f:1" and skipped[0]["why"].startswith(why)


def test_same_image_twice_becomes_one_row_with_captions_in_order(tmp_path):
    (tmp_path / "x.png").write_bytes(png())
    lines = [("b", "C1", None), ("a", "C2;C1", "P1"), ("b", "", None)]
    rows = clean_rows([row(image_id=None, image="x.png", caption=c, concepts=k, group=g) for c, k, g in lines], skipped := [], root=str(tmp_path))
    assert len(rows) == 1 and rows[0]["captions"] == ["b", "a"] and rows[0]["concepts"] == ["C1", "C2"] and rows[0]["group"] == "P1" and skipped == []


def test_equal_pixels_under_two_ids_stay_two_rows():
    assert len(clean_rows([row(), row(image_id="b", group="other")], skipped := [])) == 2 and skipped == []


def test_merging_refuses_lines_that_disagree():
    rows = clean_rows([row(group="G"), row(split="test", group="G", _where="f:2"), row(group="other", _where="f:3")], skipped := [])
    assert len(rows) == 1 and [s["where"] for s in skipped] == ["f:2", "f:3"]
    assert "split differs" in skipped[0]["why"] and "group differs" in skipped[1]["why"]


def test_one_id_for_two_images_is_listed():
    rows = clean_rows([row(), row(image=png(9), _where="f:2")], skipped := [])
    assert len(rows) == 1 and skipped == [{"where": "f:2", "why": "duplicate image_id with another image: a"}]


def test_every_row_is_in_the_table_merged_or_listed():
    raws = [row(image_id=str(i), image=png(i), caption="" if i % 3 == 0 else "x", _where=f"f:{i}") for i in range(30)]
    rows = clean_rows(raws, skipped := [])
    assert len(rows) + len(skipped) == 30 and {r["image_id"] for r in rows} | {s["where"][2:] for s in skipped} == {str(i) for i in range(30)}
    assert skip_summary(skipped) == "10 × empty caption (first: f:0)"


def test_further_columns_keep_their_type():
    raws = [row(image_id=str(i), image=png(i), age=a, score=s, flag=f, tags=t, odd=o) for i, (a, s, f, t, o) in enumerate([(60, 1, True, ["x"], {"k": 1}), (None, 0.5, None, [], "text")])]
    table = make_table(clean_rows(raws, []))
    big = make_table(clean_rows([row(n=2**70)], []))
    assert big["n"][:] == [str(2**70)]
    assert {n: str(table.features[n]) for n in ("age", "score", "flag", "tags", "odd")} == {
        "age": "Value('int64')", "score": "Value('float64')", "flag": "Value('bool')", "tags": "List(Value('string'))", "odd": "Value('string')"}
    assert table["age"][:] == [60, None] and json.loads(table["odd"][0]) == {"k": 1}


def test_images_are_paths_on_disk_and_not_decoded(tmp_path):
    (tmp_path / "x.png").write_bytes(png(5))
    (tmp_path / "broken.png").write_bytes(png(5)[:40])
    rows = clean_rows([row(image="x.png", image_id="x"), row(image="broken.png", image_id="y")], [], root=str(tmp_path))
    table = make_table(rows).cast_column("image", HubImage(decode=False))
    assert table[0]["image"] == {"bytes": None, "path": str(tmp_path / "x.png")} and len(table) == 2


def test_check_image(tmp_path):
    whole = noise_jpeg()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    assert check_image(whole) is None and check_image(png()) is None
    assert "truncated" in check_image(tmp_path / "cut.jpg") and "truncated" in check_image(whole[:-200])
    assert "can't be decoded" in check_image(tmp_path / "text.jpg") and check_image(tmp_path / "none.jpg") == "image file is missing" and check_image(b"") is not None


def test_missing_column_names_those_present_and_the_nearest():
    with pytest.raises(ValueError, match=r"^x\.csv: no column 'caption' \(did you mean 'captoin'\?\); it has image, captoin$"): need_columns(["image", "captoin"], [("caption", "captions")], "x.csv")
    need_columns(["captions"], [("caption", "captions")], "x.csv")


def test_a_borrowed_mapping_is_dropped_where_it_does_not_fit():
    columns, there = {"captions": "text", "group": "case_id"}, ["image", "captions", "case_id"]
    assert map_columns(None, there, "x") == {} and map_columns({"group": "case_id"}, there, "x") == {"group": "case_id"}
    with pytest.raises(ValueError, match=r"^x: no column 'text', which .* names as captions; it has image, captions, case_id$"): map_columns(columns, there, "x", there, "jsonl")
    assert map_columns(columns, there, "x", there, "jsonl", "jsonl") == {"group": "case_id"}
    with pytest.raises(ValueError, match="'text'"): map_columns(columns, ["image", "words"], "x", ["image", "words"], "jsonl", "jsonl")
    assert map_columns(columns, ["image", "words"], "x", ["image", "words"], "openi", "jsonl") == {}  # its reader knows its own columns


texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1).map(str.strip).filter(bool)


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=5))
def test_csv_captions_survive_quoting(tmp_path_factory, captions):
    from radclip.layouts import write_csv
    path = tmp_path_factory.mktemp("csv") / "captions.csv"
    write_csv(path, ["image", "caption"], [(f"{i}.jpg", c) for i, c in enumerate(captions)])
    rows = read_csv(path, ["image", "caption"], bad := [])
    assert [r["caption"] for r in rows] == captions and bad == []


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, max_size=4), st.lists(st.sampled_from(["C0000001", "C0000002", "C9"]), max_size=4))
def test_any_captions_and_concepts_reach_the_table(captions, concepts):
    rows = clean_rows([row(caption=None, captions=captions, concepts=concepts)], skipped := [])
    if not captions: assert skipped[0]["why"] == "empty caption"
    else: assert make_table(rows)["captions"][0] == captions and make_table(rows)["concepts"][0] == list(dict.fromkeys(concepts))


def test_broken_csv_records_are_listed_and_the_rest_is_read(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('image,caption\na.jpg,fine\nb.jpg,a dog, running\nc.jpg,"never closed\nd.jpg,fine too\n\ne.jpg,"two\nlines"\nf.jpg\ng.jpg,odd "quote" inside,\n')
    rows = read_csv(path, ["image", "caption"], bad := [])
    assert [(r["image"], r["caption"]) for r in rows] == [("a.jpg", "fine"), ("d.jpg", "fine too"), ("e.jpg", "two\nlines"), ("f.jpg", None), ("g.jpg", 'odd "quote" inside')]
    assert [r["_where"] for r in rows] == [f"x.csv:{n}" for n in (2, 5, 7, 9, 10)]
    assert [(b["_where"], b["_why"].split(":")[0]) for b in bad] == [("x.csv:3", "more fields than columns"), ("x.csv:4", "broken quoting")]


def test_csv_headers(tmp_path):
    for text, says in (("", "it has none"), ("file,text\n", "it has file, text")):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ValueError, match=f"no column 'image'.*{says}"): read_csv(tmp_path / "x.csv", ["image"], [])
    with pytest.raises(FileNotFoundError, match="missing"): read_csv(tmp_path / "none.csv", [], [])
    (tmp_path / "x.csv").write_bytes("\ufeff image ,caption\r\na.jpg,b\r\n".encode())
    assert read_csv(tmp_path / "x.csv", ["image"], [])[0]["image"] == "a.jpg"
    (tmp_path / "x.csv").write_text("image\tcaption\na.jpg\tb, c\n")
    assert read_csv(tmp_path / "x.csv", ["image"], [])[0]["caption"] == "b, c"


def test_lines_end_at_line_feeds_only(tmp_path):
    (tmp_path / "x.txt").write_bytes("\ufeffa\u2028b\r\n\nc\x85d\x0ce".encode("utf-8"))
    assert read_lines(tmp_path / "x.txt") == [(1, "a\u2028b"), (3, "c\x85d\x0ce")]


@pytest.mark.parametrize("value, items", [(None, []), ("", []), (float("nan"), []), ("a", ["a"]), (["a", "", None, " b "], ["a", "b"]), (5, ["5"]), ("C1;C2, C3", ["C1;C2, C3"])])
def test_as_list(value, items): assert as_list(value) == items


def test_concepts_in_any_spelling():
    for said in ("C1;C2", "C1, C2", "\tC1\tC2", "['C1', 'C2']", ["C1", "C2"], "C1 C2"): assert one(concepts=said)[0][0]["concepts"] == ["C1", "C2"]


def test_guess_columns():
    assert guess_columns(["File", "Report", "Patient_ID", "x"]) == {"image": "File", "caption": "Report", "group": "Patient_ID"}
    assert guess_columns(["image", "findings", "impression"], {"caption": "impression"})["caption"] == "impression"
