"Readers: what the writers wrote comes back, the real files load, and each planted fault is one clear line."
import io, json, os, re

import numpy as np
import pytest
from datasets import Dataset, Features, Image as HubImage, Value
from hypothesis import given, settings, strategies as st
from PIL import Image

import radclip.readers as readers
import radclip.sources as sources
from radclip.layouts import one_line, openi_studies, pair_rows, write_layout
from radclip.pairs import clean_rows, make_table, pairs_features, skip_summary
from radclip.phantom import phantom_pairs
from radclip.readers import clean_report, report_text
from radclip.sources import HUB, SOURCES, first_rows, read_roco_metadata, read_source, split_source, stream_source

DATA = os.environ.get("RADCLIP_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="RADCLIP_DATA is not set: the real files aren't at hand")


@pytest.fixture(scope="module")
def pairs(): return phantom_pairs(40, seed=5, size=64)


@pytest.fixture(scope="module")
def written(pairs, tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return lambda kind: root / kind if (root / kind).exists() else write_layout(pairs, root / kind, kind)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory): monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def texts(table): return [dict(row) for row in table.remove_columns("image")] if "image" in table.column_names else [dict(row) for row in table]


def grouping(rows): return sorted(sorted(r["captions"][0] for r in rows if r["group"] == g) for g in {r["group"] for r in rows})


SINGLE = ["roco:roco", "roco-csv:roco-csv", "roco:roco-csv", "rocov2:rocov2", "rocov2:rocov2-hub", "radiology_mini:rocov2-hub", "flickr8k:flickr8k", "flickr8k:flickr8k-hub", "jsonl:jsonl", "disk:disk"]


@pytest.mark.parametrize("case", SINGLE)
def test_round_trip(case, pairs, written):
    kind, layout = case.split(":")
    table = read_source(f"{kind}:{written(layout)}", skipped := [])
    mine = sorted(texts(pairs), key=lambda r: (r["split"], r["captions"]))
    back = sorted(texts(table), key=lambda r: (r["split"], r["captions"]))
    assert skipped == [] and table.features["concepts"] == pairs_features()["concepts"]
    assert [(r["split"], [one_line(c) for c in r["captions"]]) for r in back] == [(r["split"], [one_line(c) for c in r["captions"]]) for r in mine]
    if "flickr" not in kind: assert sorted((r["captions"][0], r["concepts"]) for r in back) == sorted((r["captions"][0], r["concepts"]) for r in mine)
    if layout in ("roco", "roco-csv", "rocov2", "jsonl", "disk"): assert grouping(back) == grouping(mine)
    assert len(set(table["image_id"])) == len(table)


@pytest.mark.parametrize("case", ["roco:roco", "rocov2:rocov2-hub", "flickr8k:flickr8k", "jsonl:jsonl", "disk:disk"])
def test_pixels_belong_to_their_captions(case, pairs, written):
    kind, layout = case.split(":")
    want = {row["captions"][0]: np.asarray(row["image"].convert("L"), float) for row in pairs}
    for row in read_source(f"{kind}:{written(layout)}").select(range(8)):
        assert np.abs(np.asarray(row["image"].convert("L"), float) - want[row["captions"][0]]).mean() < 4  # JPEG's own error


def test_jsonl_and_disk_keep_every_column(pairs, written):
    for kind in ("jsonl", "disk"):
        table = read_source(f"{kind}:{written(kind)}")
        assert [{k: v for k, v in r.items()} for r in texts(table)] == [r | {"view": r["view"] or None} for r in texts(pairs)]


@pytest.mark.parametrize("case", ["openi:openi", "openi:openi-hub"])
def test_openi_two_views_one_report_one_group(case, pairs, written):
    kind, layout = case.split(":")
    table = read_source(f"{kind}:{written(layout)}", skipped := [])
    studies = openi_studies(pair_rows(pairs))
    assert skipped == [] and len(table) == sum(len(views) for _, views in studies)
    for report, views in studies:
        mine = [r for r in texts(table) if r["group"] == str(report["uid"])]
        assert sorted(r["view"] for r in mine) == sorted(views) and all(r["captions"] == [report["findings"]] for r in mine)


def test_the_same_code_streams(written):
    for kind, layout in (("rocov2", "rocov2-hub"), ("openi", "openi-hub"), ("flickr8k", "flickr8k-hub")):
        table, stream = read_source(f"{kind}:{written(layout)}"), list(stream_source(f"{kind}:{written(layout)}"))
        want = {r["image_id"]: r["captions"] for r in texts(table) if r["split"] == "train"}
        assert {r["image_id"]: r["captions"] for r in stream} == want and all(isinstance(r["image"], Image.Image) for r in stream)
    few = first_rows(f"rocov2:{written('rocov2-hub')}", 3, "validation")
    assert len(few) == 3 and few.features == pairs_features() and set(few["split"]) == {"validation"} and few[0]["image"].size == (64, 64)


def test_streaming_errors(written):
    with pytest.raises(ValueError, match="can't be streamed"): stream_source(f"jsonl:{written('jsonl')}")
    with pytest.raises(ValueError, match="no split 'dev'; it has"): stream_source(f"rocov2:{written('rocov2-hub')}", "dev")


def test_hub_images_stay_where_they_are(written):
    "Pixels stay in the file: the table holds on to the arrow files that `datasets` mapped, also where rows are left out."
    splits = sources.load_folder(written("rocov2-hub"))
    table = read_source(f"rocov2:{written('rocov2-hub')}")
    assert {f["filename"] for f in table.cache_files} == {f["filename"] for ds in splits.values() for f in ds.cache_files} != set()
    raws, store = sources.hub_store(splits, HUB["rocov2"][1])
    raws[3]["caption"] = ""
    rows = clean_rows(raws, skipped := [])
    fewer = make_table(rows, store)
    assert len(fewer) == len(table) - 1 and len(skipped) == 1 and fewer["image_id"][3] == table["image_id"][4] and {f["filename"] for f in fewer.cache_files} >= {f["filename"] for f in table.cache_files}
    assert np.array_equal(np.asarray(fewer[3]["image"]), np.asarray(table[4]["image"]))


def test_no_network_is_one_line(monkeypatch):
    monkeypatch.setattr(sources, "reachable", lambda host="": False)
    for name, (repo, _) in HUB.items():
        with pytest.raises(FileNotFoundError, match=re.escape(f"{repo} can't be had")) as e: read_source(name)
        assert f"{name}:FOLDER" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("source, error, says", [
    ("rocv2", ValueError, "did you mean 'rocov2'"), ("jsonl", ValueError, "needs a path"), ("jsonl:/no/such", FileNotFoundError, "/no/such"), ("nothing-like-it", ValueError, "known: phantom"),
    ("phantom:many", ValueError, "whole numbers"), ("disk:{tmp}", FileNotFoundError, "parquet"), ("roco:{tmp}", FileNotFoundError, "train/radiology"), ("rocov2:{tmp}", FileNotFoundError, "captions.csv"),
    ("openi:{tmp}", FileNotFoundError, "indiana_reports.csv"), ("flickr8k:{tmp}", FileNotFoundError, "captions.txt"), ("images:{tmp}", ValueError, "no csv"), ("jsonl:{tmp}", FileNotFoundError, "pairs.jsonl"),
    ("{tmp}", ValueError, "a path needs its kind"), ("radiology_mini:{tmp}", FileNotFoundError, "parquet"), ("dicom:{tmp}", FileNotFoundError, "no DICOM files here")])
def test_wrong_sources(source, error, says, tmp_path):
    with pytest.raises(error, match=re.escape(says)) as e: read_source(source.format(tmp=tmp_path))
    assert "\n" not in str(e.value)


def test_every_kind_has_a_line_of_help():
    for kind, reader in SOURCES.items(): assert reader.__doc__ and split_source(f"{kind}:{os.sep}") == (kind, os.sep)


def jsonl(tmp_path, *lines):
    for name in ("a.png", "b.png", "c.png"): Image.new("L", (8, 8), ord(name[0])).save(tmp_path / name)
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return f"jsonl:{tmp_path}"


GOOD = {"image": "a.png", "caption": "chest", "split": "dev", "case_id": "P1"}


def test_one_image_has_one_name(tmp_path):
    lines = [GOOD, {"image": "./a.png", "caption": "lungs", "split": "dev", "case_id": "P1"}, {"image": ".//b.png", "caption": "x"}, {"image": str(tmp_path / "c.png"), "caption": "y"}]
    table = read_source(jsonl(tmp_path, *lines), skipped := [])
    assert table["captions"][:] == [["chest", "lungs"], ["x"], ["y"]] and table["image_id"][:] == ["a.png", "b.png", str(tmp_path / "c.png")] and skipped == []
    mapped = read_source(jsonl(tmp_path, *({"file": line["image"], "caption": line["caption"]} for line in lines)), columns={"image": "file"})
    assert mapped["image_id"][:] == table["image_id"][:] and mapped["captions"][:] == table["captions"][:]
    read_source(jsonl(tmp_path, GOOD, {"image": "http://a.org/b.png", "caption": "x"}, {"image": "", "caption": "x"}), skipped)
    assert [s["why"] for s in skipped] == [f"image file is missing: {tmp_path}/http://a.org/b.png", "no image given"]


def test_jsonl_faults_are_counted_with_line_numbers(tmp_path):
    source = jsonl(tmp_path, GOOD, b'{"image": "b.png", "capt', b'["not", "an object"]', {"image": 3, "caption": "x"}, {"image": "gone.png", "caption": "x"}, {"image": "b.png", "caption": " "},
                   b'{"image": "b.png", "caption": "caf\xe9"}', GOOD | {"usable": False}, GOOD | {"caption": "lungs"}, GOOD | {"split": "test"}, {"image": "c.png", "captions": ["heart"]})
    table = read_source(source, skipped := [])
    assert table["captions"][:] == [["chest", "lungs"], ["heart"]] and table["split"][:] == ["validation", "train"] and table["case_id"][:] == ["P1", None]
    assert [(s["where"], s["why"].split(":")[0]) for s in skipped] == [
        ("pairs.jsonl:2", "malformed JSON"), ("pairs.jsonl:3", "malformed JSON"), ("pairs.jsonl:4", "image is not a path"), ("pairs.jsonl:5", "image file is missing"), ("pairs.jsonl:6", "empty caption"),
        ("pairs.jsonl:7", "not UTF-8"), ("pairs.jsonl:8", "marked unusable"), ("pairs.jsonl:10", "split differs from an earlier line with the same image")]


def test_without_a_list_the_skips_are_a_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"1 of 2 rows left out: 1 × empty caption \(first: pairs.jsonl:2\)"): read_source(jsonl(tmp_path, GOOD, {"image": "b.png", "caption": ""}))


def test_columns_can_be_mapped(tmp_path):
    source = jsonl(tmp_path, {"file": "a.png", "text": "chest", "case_id": "P1"}, {"file": "b.png", "text": "skull", "case_id": "P2"})
    table = read_source(source, columns={"image": "file", "caption": "text", "group": "case_id"})
    assert table["group"][:] == ["P1", "P2"] and table["captions"][:] == [["chest"], ["skull"]]
    with pytest.raises(ValueError, match="no column 'image'.*it has file, text, case_id"): read_source(source)
    with pytest.raises(ValueError, match=r"no column 'caseid' \(did you mean 'case_id'\?\)"): read_source(source, columns={"group": "caseid"})


def test_nothing_usable_is_an_error_that_counts(tmp_path):
    with pytest.raises(ValueError, match=r"none of 2 rows can be used: 2 × empty caption"): read_source(jsonl(tmp_path, GOOD | {"caption": ""}, GOOD | {"caption": ""}))
    with pytest.raises(ValueError, match="none of 0 rows"): read_source(jsonl(tmp_path))


def test_roco_faults(written, tmp_path):
    import shutil
    folder = tmp_path / "roco"
    shutil.copytree(written("roco"), folder)
    at = folder / "train" / "radiology"
    (at / "images" / "ROCO_00002.jpg").unlink()
    lines = (at / "captions.txt").read_bytes().split(b"\n")
    lines[0], lines[2] = lines[0].split(b"\t")[0] + b"\t", lines[2] + b" caf\xe9"
    (at / "captions.txt").write_bytes(b"\n".join(lines))
    whole = read_source(f"roco:{written('roco')}")
    table = read_source(f"roco:{folder}", skipped := [])
    assert len(table) == len(whole) - 3
    assert [(s["where"], s["why"].split(":")[0]) for s in skipped] == [("train/captions.txt:1", "empty caption"), ("train/captions.txt:2", "image file is missing"), ("train/captions.txt:3", "not UTF-8")]
    (at / "licences.txt").write_text("ROCO_ID,PMCID,CC\n")
    with pytest.raises(ValueError, match=r"no column 'PMC_ID' \(did you mean 'PMCID'"): read_source(f"roco:{folder}")


def test_flickr8k_lists(written, tmp_path):
    import shutil
    folder = tmp_path / "flickr"
    shutil.copytree(written("flickr8k"), folder)
    (folder / "Flickr_8k.testImages.txt").unlink()
    n = sum(split == "test" for split in read_source(f"flickr8k:{written('flickr8k')}")["split"])
    table = read_source(f"flickr8k:{folder}", skipped := [])
    assert len(skipped) == n and "test" not in table["split"][:] and all("none of the official lists" in s["why"] for s in skipped)
    for p in folder.glob("Flickr_8k*"): p.unlink()
    assert set(read_source(f"flickr8k:{folder}", skipped := [])["split"]) == {"train"} and skipped == []


def test_side_tables_and_double_lines(written, tmp_path):
    import shutil
    folder = tmp_path / "roco"
    shutil.copytree(written("roco"), folder)
    at = folder / "test" / "radiology"
    with open(at / "captions.txt", "a") as f: f.write((at / "captions.txt").read_text().splitlines()[0] + " again\n")
    with open(at / "licences.txt", "a") as f: f.write('"ROCO_99999,never closed\n')
    table = read_source(f"roco:{folder}", skipped := [])
    assert len(table) == len(read_source(f"roco:{written('roco')}")) and not any("again" in c[0] for c in table["captions"][:])
    assert {(s["where"].split(":")[0], s["why"].split(":")[0]) for s in skipped} == {("captions.txt", "duplicate id in one list"), ("licences.txt", "broken quoting")}


def test_openi_faults(written, tmp_path):
    import shutil
    folder = tmp_path / "openi"
    shutil.copytree(written("openi"), folder)
    with open(folder / "indiana_projections.csv", "a") as f: f.write("77777,x.png,Frontal\n1,gone.png,Lateral\n1\n")
    table = read_source(f"openi:{folder}", skipped := [])
    assert len(table) == len(read_source(f"openi:{written('openi')}")) and [s["why"].split(":")[0] for s in skipped] == ["no report with this uid", "image file is missing", "image file is missing"]


def test_flickr8k_faults_hit_one_caption_not_the_image(tmp_path):
    (tmp_path / "Images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "Images" / "1_a.jpg")
    (tmp_path / "captions.txt").write_text("image,caption\n1_a.jpg,good\n1_a.jpg,a dog, running\n1_a.jpg, \n1_a.jpg,good too\n")
    assert read_source(f"flickr8k:{tmp_path}", skipped := [])["captions"][:] == [["good", "good too"]]
    assert sorted(s["where"] for s in skipped) == ["captions.txt:3", "captions.txt:4"]


def test_relative_paths_work_from_anywhere(written, monkeypatch, tmp_path):
    for kind in ("roco", "jsonl", "flickr8k"):
        monkeypatch.chdir(written(kind).parent)
        table = read_source(f"{kind}:{kind}")
        monkeypatch.chdir(tmp_path)
        assert table[0]["image"].size == (64, 64)


def test_two_files_of_one_name_are_not_guessed_between(tmp_path):
    for sub in ("left", "right"):
        (tmp_path / sub).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / sub / "x.png")
    (tmp_path / "m.csv").write_text("image,caption\nx.png,which?\nleft/x.png,this\n")
    assert read_source(f"images:{tmp_path}", skipped := [])["captions"][:] == [["this"]] and skipped[0]["why"].startswith("several files have this name")


def test_mapping_captions_replaces_them(tmp_path):
    assert read_source(jsonl(tmp_path, GOOD | {"title": "better"}), columns={"captions": "title"})["captions"][:] == [["better"]]


def test_flickr8k_keeps_five_captions_even_equal_ones(tmp_path):
    (tmp_path / "Images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "Images" / "1_a.jpg")
    (tmp_path / "captions.txt").write_text("image,caption\n" + "".join(f"1_a.jpg,{c}\n" for c in ("x", '"y, z"', "x", "w", "v")))
    table = read_source(f"flickr8k:{tmp_path}")
    assert table["captions"][0] == ["x", "y, z", "x", "w", "v"] and table["group"][0] == "1_a"


words = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=30).map(str.strip).filter(bool)


@settings(max_examples=20, deadline=None)
@given(st.lists(words, min_size=1, max_size=4))
def test_captions_with_commas_quotes_and_newlines_round_trip(tmp_path_factory, captions):
    features = pairs_features()
    out = io.BytesIO()
    Image.new("L", (8, 8)).save(out, "JPEG")
    rows = [{"image": {"bytes": out.getvalue(), "path": None}, "captions": [c], "image_id": str(i), "group": str(i), "split": "train", "concepts": [], "view": None, "boxes": []} for i, c in enumerate(captions)]
    table, root = Dataset.from_list(rows, features=features), tmp_path_factory.mktemp("hyp")
    for kind in ("flickr8k", "rocov2", "jsonl"):
        assert read_source(f"{kind}:{write_layout(table, root / kind, kind)}")["captions"][:] == [[c] for c in captions]
    assert read_source(f"roco:{write_layout(table, root / 'roco', 'roco')}", [])["captions"][:] == [[one_line(c)] for c in captions if one_line(c)]


@pytest.mark.parametrize("said, clean", [
    ("Normal chest x-XXXX.", "Normal chest x-ray."), ("There are no XXXX of a pleural effusion.", "There are no of a pleural effusion."), ("Clear lungs. XXXX XXXX.", "Clear lungs."),
    ("Inferior XXXX XXXX XXXX. Heart normal.", "Inferior. Heart normal."), ("calcified XXXX/granulomas.", "calcified granulomas."), ("dual-XXXX pacemaker", "dual pacemaker"), ("XXXX.", ""), (" XXXX XXXX ", ""),
    ("Comparison (XXXX), XXXX, XXXX. Stable", "Comparison. Stable"), (None, ""), ("No change.", "No change."), ("T5XXXX level", "level"), ("1. Clear. 2. XXXX.", "1. Clear. 2.")])
def test_clean_report(said, clean): assert clean_report(said) == clean


@given(st.text(st.sampled_from("aX. ,;-/()x"), max_size=40))
def test_no_mask_survives(text):
    assert "XXX" not in clean_report(text) and clean_report(clean_report(text)) == clean_report(text)


def test_text_priority():
    row = {"Findings": "XXXX.", "impression": "Clear.", "report": "r", "text": "t"}
    assert report_text(row) == "Clear." and report_text(row | {"findings": "Heart normal."}) == "Heart normal." and report_text({"TEXT": "t"}) == "t" and report_text({}) == ""


def image_folder(tmp_path, header, *rows, name="meta.csv"):
    (tmp_path / "sub").mkdir(exist_ok=True)
    for i in range(3): Image.new("L", (8, 8), i).save(tmp_path / "sub" / f"x{i}.png")
    (tmp_path / name).write_text("\n".join([header, *rows]))


def test_image_folder_with_guessed_columns(tmp_path):
    image_folder(tmp_path, "Filename,Report,Patient_ID,ward", "sub/x0.png,chest,P1,A", "x1.png,skull,P1,A", "x2,knee,P2,B")
    table = read_source(f"images:{tmp_path}")
    assert table["captions"][:] == [["chest"], ["skull"], ["knee"]] and table["group"][:] == ["P1", "P1", "P2"] and table["ward"][:] == ["A", "A", "B"]
    assert len(set(table["image_id"])) == 3 and [row["image"].size for row in table] == [(8, 8)] * 3


def test_image_folder_with_given_columns(tmp_path):
    image_folder(tmp_path, "pic;x\tbefund\tcaption", "x0.png\tThorax\tignored", name="meta.tsv")
    assert read_source(f"images:{tmp_path / 'meta.tsv'}", columns={"image": "pic;x", "caption": "befund"})["captions"][:] == [["Thorax"]]
    with pytest.raises(ValueError, match=r"no column 'befun' \(did you mean 'befund'"): read_source(f"images:{tmp_path}", columns={"caption": "befun"})
    with pytest.raises(ValueError, match="no column 'image'"): read_source(f"images:{tmp_path}")


def test_two_csv_files_must_be_chosen_between(tmp_path):
    image_folder(tmp_path, "image,caption", "x0.png,a", name="one.csv")
    image_folder(tmp_path, "image,caption", "x0.png,b", name="two.csv")
    with pytest.raises(ValueError, match="several csv files: one.csv, two.csv"): read_source(f"images:{tmp_path}")
    assert read_source(f"images:{tmp_path / 'two.csv'}")["captions"][:] == [["b"]]


def test_saved_set_with_other_column_names(tmp_path):
    out = io.BytesIO()
    Image.new("L", (8, 8)).save(out, "PNG")
    Dataset.from_list([{"scan": {"bytes": out.getvalue(), "path": None}, "text": "chest", "patient": "P1", "id": 7}], features=Features({"scan": HubImage(), "text": Value("string"), "patient": Value("string"), "id": Value("int64")})).save_to_disk(str(tmp_path / "d"))
    table = read_source(f"disk:{tmp_path / 'd'}")
    assert (table["captions"][0], table["group"][0], table["image_id"][0]) == (["chest"], "P1", "7") and table[0]["image"].size == (8, 8)
    Dataset.from_list([{"text": "x"}]).save_to_disk(str(tmp_path / "t"))
    with pytest.raises(ValueError, match="no column of images; it has text"): read_source(f"disk:{tmp_path / 't'}")


@pytest.mark.parametrize("kind, seed", [(kind, seed) for kind in ("roco", "roco-csv", "rocov2", "openi", "flickr8k", "jsonl") for seed in range(6)])
def test_damaged_text_files_never_crash(kind, seed, written, tmp_path):
    "Random damage to one text file: a table whose rows are sound, or one line of error."
    import random, shutil
    rng, folder = random.Random(f"{kind}{seed}"), tmp_path / "w"
    shutil.copytree(written(kind), folder)
    file = rng.choice(sorted(p for p in folder.rglob("*") if p.suffix in (".txt", ".csv", ".jsonl")))
    data = bytearray(file.read_bytes())
    for _ in range(1 + 8 * (seed % 3)):
        at = rng.randrange(len(data))
        data[at:at + rng.choice([0, 1, 5, 40])] = rng.choice([b"", b'"', b",", b"\n", b"\t", b"\xff\xfe", b"\0", b"null", b"\\ud800", b"{"])
    file.write_bytes(data)
    try: table = read_source(f"{kind}:{folder}", skipped := [])
    except (ValueError, FileNotFoundError) as e:
        assert "\n" not in str(e) and ("rows can be used" in str(e) or "no column" in str(e))
        return
    assert len(set(table["image_id"][:])) == len(table) and all(table["captions"][:]) and set(table["split"][:]) <= {"train", "validation", "test"} and table[0]["image"].size == (64, 64)
    assert all(item["why"] and item["where"] for item in skipped)


def dicom(path, pixels, photometric="MONOCHROME2", **tags):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileMetaDataset
    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", pydicom.uid.generate_uid()
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *pixels.shape, 1, photometric
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = pixels.astype("<u2").tobytes()
    for name, value in tags.items(): setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)


def test_dicom_window_then_inversion(tmp_path):
    ramp = np.linspace(0, 4095, 64).round().astype(np.uint16).reshape(8, 8)
    dicom(tmp_path / "plain.dcm", ramp)
    dicom(tmp_path / "window.dcm", ramp, WindowCenter=1000, WindowWidth=500)
    dicom(tmp_path / "inverse.dcm", ramp, "MONOCHROME1", WindowCenter=1000, WindowWidth=500)
    read = lambda name: np.asarray(readers.dicom_image(tmp_path / name)[0]).astype(int).ravel()
    plain, window, inverse = read("plain.dcm"), read("window.dcm"), read("inverse.dcm")
    assert np.abs(plain - ramp.ravel() / 4095 * 255).max() <= 0.51
    law = np.clip((ramp.ravel() - (1000 - 0.5)) / (500 - 1) + 0.5, 0, 1) * 255  # PS3.3 C.11.2.1.2.1
    assert np.abs(window - law).max() <= 0.51 and 0 < (window == 0).sum() < 64 and (window == 255).sum() > 0
    assert (inverse == 255 - window).all()


def test_dicom_rescale_goes_before_the_window(tmp_path):
    stored = np.full((8, 8), 1024 + 40, np.uint16)
    stored[0] = 0
    dicom(tmp_path / "ct.dcm", stored, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    grey = np.asarray(readers.dicom_image(tmp_path / "ct.dcm")[0])
    assert grey[0, 0] == 0 and abs(int(grey[4, 4]) - 128) <= 1  # 40 HU is the middle of the window


def test_a_folder_without_dicom_files_says_so(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="no DICOM files here; dicom: wants the folder"): read_source(f"dicom:{tmp_path}")
    dicom(tmp_path / "a.dcm", np.zeros((8, 8)), ImageComments="x")
    with pytest.raises(FileNotFoundError, match="a.dcm: no DICOM files here"): read_source(f"dicom:{tmp_path / 'a.dcm'}")


def test_dicom_folder(tmp_path):
    ramp = np.arange(64).reshape(8, 8)
    dicom(tmp_path / "a.dcm", ramp, ImageComments="Left effusion", PatientID="P1", ViewPosition="PA", Modality="DX")
    dicom(tmp_path / "b.dcm", ramp, PatientID="P2", ViewPosition="LL")
    (tmp_path / "c.dcm").write_bytes(b"no dicom")
    table = read_source(f"dicom:{tmp_path}", skipped := [])
    assert (table["captions"][:], table["group"][:], table["view"][:]) == ([["Left effusion"]], ["P1"], ["frontal"]) and table[0]["image"].size == (8, 8)
    assert [(s["where"], s["why"].split(":")[0]) for s in skipped] == [("b.dcm", "empty caption"), ("c.dcm", "DICOM can't be read")]
    (tmp_path / "captions.csv").write_text("image,caption\na.dcm,from the csv\nb.dcm,second\ngone.dcm,third\n")
    table = read_source(f"dicom:{tmp_path}", skipped := [])
    assert any("gone.dcm" in s["why"] for s in skipped)
    assert table["captions"][:] == [["from the csv"], ["second"]] and table["group"][:] == ["P1", "P2"]


@needs_data
def test_real_medpix():
    table = read_source(f"jsonl:{DATA}/medpix2", skipped := [], columns={"group": "case_id"})
    assert (table["split"][:].count("train"), table["split"][:].count("validation")) == (1536, 184) and skip_summary(skipped).startswith("130 × marked unusable")
    assert table["group"][0].startswith("MPX") and max(table[0]["image"].size) <= 320


@needs_data
def test_real_flickr8k():
    table = read_source(f"flickr8k:{DATA}/flickr8k", skipped := [])
    assert len(table) == 7000 and {len(c) for c in table["captions"][:]} == {5} and (table["split"][:].count("train"), table["split"][:].count("validation")) == (6000, 1000) and skipped == []


@needs_data
def test_real_roco_without_images():
    table = read_roco_metadata(f"{DATA}/roco")
    rows = {s: [(g, c) for g, c, t in zip(table["group"][:], table["captions"][:], table["split"][:]) if t == s] for s in ("train", "validation", "test")}
    assert {s: len(r) for s, r in rows.items()} == {"train": 65448, "validation": 8180, "test": 8179} and all(c for _, c in rows["test"]) and not any(c for _, c in rows["train"])
    train = {g for g, _ in rows["train"]}
    assert round(100 * np.mean([g in train for g, _ in rows["test"]]), 1) == 65.9


@needs_data
def test_real_openi_reports_without_images():
    with pytest.raises(ValueError, match=r"none of 7,466 rows can be used: 7,426 × image file is missing .*40 × empty caption"): read_source(f"openi:{DATA}/openi")
    table = read_source(f"openi:{DATA}/openi", skipped := [], images=False)
    assert len(table) == 7426 and len(skipped) == 40 and "image" not in table.column_names and set(table["view"][:]) == {"frontal", "lateral"}
    assert not any("XXX" in c[0] for c in table["captions"][:]) and min(len(c[0]) for c in table["captions"][:]) > 8
