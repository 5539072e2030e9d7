"Sources end in one checked table, and the audit finds what was planted, on phantoms and in the real ROCO files."
import io, json, os, warnings

import numpy as np
import pytest
from PIL import Image as PIL, ImageEnhance

from datasets import Dataset
from radclip.data import Audit, DataConfig, audit, clean_split, load_pairs, near_duplicates, perceptual_hash, prepare_pairs, token_lengths
from radclip.pairs import pairs_features
from radclip.sources import read_roco_metadata
from radclip.splits import apply_split, load_split, save_split, split_hash, straddling_groups

real = pytest.mark.skipif(not os.environ.get("RADCLIP_DATA"), reason="needs RADCLIP_DATA (real data)")
DATA = os.environ.get("RADCLIP_DATA", "")


def picture(seed, size=96):
    "A smooth random picture: unrelated ones differ in their low frequencies."
    small = np.random.default_rng(seed).integers(0, 256, (12, 12), dtype=np.uint8)
    return PIL.fromarray(small).resize((size, size), PIL.Resampling.BICUBIC)


def jpeg(image, quality=60):
    buffer = io.BytesIO(); image.save(buffer, "JPEG", quality=quality); return buffer.getvalue()


def table(images, splits, groups=None, captions=None, concepts=None):
    n = len(splits)
    data = dict(captions=captions or [[f"caption {i}"] for i in range(n)], image_id=[f"i{i}" for i in range(n)], group=groups or [f"g{i}" for i in range(n)],
                split=splits, concepts=concepts or [[]] * n, view=[None] * n, boxes=[[]] * n)
    if images is not None: data["image"] = images
    return Dataset.from_dict(data, features=pairs_features(image=images is not None))


@pytest.fixture
def folder(tmp_path):
    "A JSONL source with the usual faults in it."
    for i in range(8): picture(i).save(tmp_path / f"{i}.png")
    rows = [dict(image=f"{i}.png", caption=f"left lung {i}", split=["train", "train", "dev", "test"][i % 4], case_id=f"c{i % 4}", usable=i != 7) for i in range(8)]
    rows += [dict(image="gone.png", caption="x", split="train", case_id="c9"), dict(image="0.png", caption="", split="train", case_id="c0")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_bad_rows_are_counted_and_listed(folder):
    with pytest.warns(UserWarning, match="3 rows left out.*audit"): pairs = load_pairs(f"jsonl:{folder}")
    skipped = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_pairs(f"jsonl:{folder}", skipped=skipped)) == len(pairs) == 7
    assert [s["where"] for s in skipped] == ["pairs.jsonl:8", "pairs.jsonl:9", "pairs.jsonl:10"] and "missing" in skipped[1]["why"] and "empty caption" in skipped[2]["why"]
    assert audit(f"jsonl:{folder}").skipped == skipped


def test_missing_groups_and_splits_are_said_and_not_taken_for_clean():
    n = 8
    bare = table(None, ["train"] * n, groups=[f"i{k}" for k in range(n)])
    found = audit(bare); page = str(found)
    assert not found.groups_given and not found.split_given and found.to_dict()["groups_given"] is found.to_dict()["split_given"] is False
    assert "each image is taken as its own patient (no group column was found)" in page and "data.columns: {group: case_id}" in page
    assert "nothing is split yet" in page and "70/15/15 by group" in page and "none" not in page
    named = audit(table(None, ["train"] * n)); page = str(named)  # its groups are not the image_ids
    assert named.groups_given and not named.split_given and "own patient" not in page and "nothing is split yet" in page
    split = audit(table(None, ["train", "test"] * 4, groups=[f"i{k}" for k in range(n)])); page = str(split)
    assert not split.groups_given and split.split_given and "nothing is split" not in page
    assert [line.split()[1:] for line in page.splitlines() if line.startswith("  groups ")] == [["not", "known"]]
    both = str(audit(table(None, ["train", "test"] * 4)))
    assert "own patient" not in both and "nothing is split" not in both and [line.split() for line in both.splitlines() if line.startswith("  groups ")] == [["groups", "none"]]


@pytest.mark.filterwarnings("ignore:.*rows left out")
def test_a_source_without_a_group_column_is_audited_as_such(folder):
    assert not audit(f"jsonl:{folder}").groups_given and audit(f"jsonl:{folder}").split_given
    assert audit(prepare_pairs(DataConfig(source=f"jsonl:{folder}", columns={"group": "case_id"}))).groups_given
    with_groups = audit("phantom:40", images=False)
    assert with_groups.groups_given and with_groups.split_given


@pytest.mark.filterwarnings("ignore:.*rows left out")
def test_columns_are_mapped_and_mistyped_ones_named(folder):
    pairs = load_pairs(f"jsonl:{folder}", "dev", columns={"group": "case_id"})
    assert pairs["group"] == ["c2", "c2"] and pairs["split"] == ["validation"] * 2
    with pytest.raises(ValueError, match="case_id"): load_pairs(f"jsonl:{folder}", columns={"group": "caseid"})
    with pytest.raises(ValueError, match="did you mean 'group'"): load_pairs(f"jsonl:{folder}", columns={"grup": "case_id"})
    with pytest.raises(ValueError, match=r"no split 'tets' \(did you mean 'test'\?\); it has train \(4\), validation \(2\), test \(1\)"): load_pairs(f"jsonl:{folder}", "tets")


def test_columns_of_phantoms_are_mapped_too():
    pairs = load_pairs("phantom:40:3", columns={"group": "study", "captions": "report_findings"})
    assert pairs["group"] == pairs["study"] and pairs["captions"][0] == [pairs["report_findings"][0]]
    with pytest.raises(ValueError, match="study"): load_pairs("phantom:40:3", columns={"group": "studdy"})


def test_official_splits_stay_and_others_are_made(folder):
    official = prepare_pairs(DataConfig(source="phantom:120"))
    assert split_hash(official) == split_hash(load_pairs("phantom:120"))
    ours = prepare_pairs(DataConfig(source="phantom:120", official=False, sizes=dict(train=60, validation=20, test=21), seed=4))
    assert [ours["split"].count(s) for s in ("train", "validation", "test")] == [60, 20, 21] and not straddling_groups(ours)
    assert split_hash(ours) == split_hash(prepare_pairs(DataConfig(source="phantom:120", official=False, sizes=dict(train=60, validation=20, test=21), seed=4)))
    assert split_hash(ours) != split_hash(prepare_pairs(DataConfig(source="phantom:120", official=False, sizes=dict(train=60, validation=20, test=21), seed=5)))
    cut = prepare_pairs(DataConfig(source="phantom:120", sizes=dict(test=10)))
    was = dict(zip(official["image_id"], official["split"]))
    assert cut["split"].count("test") == 10 and all(was[i] == s for i, s in zip(cut["image_id"], cut["split"]))
    assert len(set(prepare_pairs(DataConfig(source="phantom:120", max_groups=7))["group"])) == 7


def test_what_is_in_no_split_is_counted_in_the_log(caplog):
    with caplog.at_level("INFO", "radclip"): pairs = prepare_pairs(DataConfig(source="phantom:120", sizes=dict(test=10)))
    assert f"{120 - len(pairs)} of 120 images are in no split" in caplog.text


def test_a_source_without_splits_gets_ours(tmp_path):
    for i in range(40): picture(i, 8).save(tmp_path / f"{i}.png")
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(dict(image=f"{i}.png", caption=f"c {i}", group=str(i // 2))) for i in range(40)))
    pairs = prepare_pairs(DataConfig(source=f"jsonl:{tmp_path}"))
    assert [pairs["split"].count(s) for s in ("train", "validation", "test")] == [28, 6, 6] and not straddling_groups(pairs)
    assert set(load_pairs(f"jsonl:{tmp_path}")["split"]) == {"train"}


@pytest.mark.filterwarnings("ignore:.*rows left out")
def test_a_leaking_official_split_is_an_error_until_somebody_chooses(folder):
    leak = {"group": "usable"}  # one group for all
    with pytest.raises(ValueError, match="straddle=clean"): prepare_pairs(DataConfig(source=f"jsonl:{folder}", columns=leak))
    with pytest.warns(UserWarning, match="1 groups lie in more than one split"): kept = prepare_pairs(DataConfig(source=f"jsonl:{folder}", columns=leak, straddle="warn"))
    assert len(kept) == 7
    clean = prepare_pairs(DataConfig(source=f"jsonl:{folder}", columns=leak, straddle="clean"))
    assert set(clean["split"]) == {"test"} and not straddling_groups(clean)


def test_a_saved_split_is_used(tmp_path):
    pairs = load_pairs("phantom:60")
    save_split(prepare_pairs(DataConfig(source="phantom:60", official=False, seed=9)), tmp_path / "s.json")
    again = prepare_pairs(DataConfig(source="phantom:60", split_file=str(tmp_path / "s.json")))
    assert split_hash(again) == split_hash(load_split(tmp_path / "s.json")) != split_hash(pairs)


def test_a_config_knows_its_keys():
    with pytest.raises(ValueError, match="sorce"): DataConfig(sorce="phantom")


def altered(image): return [jpeg(image), image.resize((70, 70)), ImageEnhance.Brightness(image).enhance(1.1), ImageEnhance.Contrast(image).enhance(0.85), image.convert("RGB")]


def png(image): buffer = io.BytesIO(); image.save(buffer, "PNG"); return buffer.getvalue()


def test_planted_copies_are_found_and_nothing_else():
    images = [picture(i) for i in range(60)]
    copies = altered(images[3]) + [images[9]]
    rows = [png(i) for i in images] + [c if isinstance(c, bytes) else png(c) for c in copies]
    pairs = table([dict(bytes=r, path=None) for r in rows], ["train"] * 60 + ["test"] * 5 + ["validation"])
    found = audit(pairs)
    assert found.share("near_images", "test", "train") == 1 and found.share("near_images", "validation", "train") == 1
    assert found.straddling["near_images"]["train"] == dict(validation=1, test=1)
    assert found.straddling["identical_images"] == dict(train=dict(validation=1), validation=dict(train=1))
    assert found.images["identical"] == 1 and found.images["checked"] == 66
    named = {name for pair in found.images["examples"] for name in pair}
    assert named == {"i3", *(f"i{k}" for k in range(60, 65))}


def test_an_identical_copy_of_a_near_copy_counts_too():
    image = picture(1); near = png(image.resize((70, 70)))
    pairs = table([dict(bytes=b, path=None) for b in (png(image), near, near)], ["train", "validation", "test"])
    assert audit(pairs).straddling["near_images"]["test"] == dict(train=1, validation=1)


def test_near_duplicates_equal_a_comparison_of_all_with_all():
    rng = np.random.default_rng(0)
    base = np.stack([np.asarray(picture(i, 32), np.float32) for i in range(150)])
    thumbs = np.concatenate([base, base[:40] + rng.normal(0, 4, (40, 32, 32)), base[:20] + rng.normal(0, 25, (20, 32, 32))]).astype(np.float32)
    bits = np.unpackbits(perceptual_hash(thumbs), axis=1).astype(int)
    for allowed, least in [(6, 0.98), (20, 0.5), (0, 0.9)]:
        expected = {(a, b) for a in range(len(thumbs)) for b in range(a + 1, len(thumbs))
                    if (bits[a] != bits[b]).sum() <= allowed and np.corrcoef(thumbs[a].ravel(), thumbs[b].ravel())[0, 1] >= least}
        assert {tuple(p) for p in near_duplicates(thumbs, allowed, least).tolist()} == expected
    assert len(near_duplicates(thumbs)) >= 40


def test_flat_images_are_nobodys_duplicates():
    assert len(near_duplicates(np.zeros((5, 32, 32), np.float32))) == 0


def test_the_perceptual_hash_agrees_with_scipys_cosine_transform():
    fft = pytest.importorskip("scipy.fft")
    thumbs = np.stack([np.asarray(picture(i, 32), np.float64) for i in range(20)])
    low = fft.dctn(thumbs, axes=(1, 2))[:, 1:9, 1:9].reshape(20, 64)
    assert np.array_equal(np.unpackbits(perceptual_hash(thumbs), axis=1), low > np.median(low, axis=1, keepdims=True))


def test_unreadable_images_are_listed_and_the_rest_is_counted():
    whole = jpeg(picture(1))
    rows = [whole, whole[:len(whole) // 2], b"no image", png(PIL.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)))]
    found = audit(table([dict(bytes=r, path=None) for r in rows], ["train"] * 4))
    assert [u["image_id"] for u in found.unreadable] == ["i1", "i2"] and "truncated" in found.unreadable[0]["why"]
    assert "unreadable: i1" in str(found)


def test_captions_are_measured():
    captions = [["Left lung.", "two words"], ["LEFT  lung."], ["bilateral nodes seen here"], ["brightness cleft"]]
    found = audit(table(None, ["train", "test", "test", "validation"], captions=captions, concepts=[["C1"], [], ["C2"], []]))
    assert found.straddling["captions"] == dict(train=dict(test=1), test=dict(train=1)) and found.share("captions") == 0.5
    assert found.captions["count"] == 5 and found.captions["distinct"] == 4 and found.captions["with_side"] == pytest.approx(3 / 5)
    assert found.captions["words"]["max"] == 4 and found.with_concepts == 2 and found.images == {} and "images: not looked at" in str(found)


def test_tokens_that_are_cut_off_are_counted():
    open_clip = pytest.importorskip("open_clip")
    texts = ["lung " * 100, "a lung", "lung " * 75, "lung " * 76]
    lengths, room = token_lengths(texts, open_clip.SimpleTokenizer())
    assert room == 77 and lengths.tolist() == [102, 4, 77, 78]
    found = audit(table(None, ["train"] * 4, captions=[[t] for t in texts]), open_clip.SimpleTokenizer())
    assert found.captions["tokens"]["truncated"] == 0.5 and found.captions["tokens"]["room"] == 77


def test_a_tokenizer_without_room_to_give_counts_what_fills_it():
    plain = lambda texts: np.array([[1 + len(w) for w in t.split()][:4] + [0] * (4 - len(t.split())) for t in texts])
    lengths, room = token_lengths(["a b", "a b c d e", "a b c"], plain)
    assert room == 4 and lengths.tolist() == [2, 5, 3]


def test_groups_that_straddle_are_counted_by_image():
    found = audit(table(None, ["train", "train", "test", "test", "validation"], groups=["a", "b", "a", "a", "b"]))
    assert found.straddling["groups"] == dict(train=dict(validation=1, test=1), validation=dict(train=1), test=dict(train=2))
    assert found.share() == 1 and found.share("groups", "train", "test") == 0.5 and "100.0% of test (2) in train" in str(found)


def test_an_audit_fits_in_json():
    found = audit("phantom:30")
    assert Audit(**json.loads(json.dumps(found.to_dict()))) == found
    assert found.split_hash == split_hash(load_pairs("phantom:30"))


def test_double_ids_end_an_audit():
    pairs = table(None, ["train"] * 2)
    with pytest.raises(ValueError, match="occur more than once"): audit(pairs.select([0, 0]))


@pytest.fixture
def roco(tmp_path):
    "ROCO v1 without images: five figures, two of them of one article in two splits."
    for split, rows in dict(train=[("R1", "PMC1_a-g1.jpg"), ("R2", "PMC2_b.jpg")], validation=[("R3", "PMC3_c.jpg")], test=[("R4", "PMC1_a-g2.jpg"), ("R5", "PMC4_d.jpg")]).items():
        at = tmp_path / split / "radiology"; at.mkdir(parents=True)
        (at / "licences.txt").write_text("ROCO_ID,PMC_ID,CC\n" + "".join(f"{i},{name},CC BY\n" for i, name in rows))
        (at / "captions.txt").write_text("".join(f"{i}\t caption of {i}\n" for i, _ in rows))
    return tmp_path


def test_roco_is_audited_without_images(roco):
    found = audit(f"roco:{roco}")
    assert found.share() == 0.5 and found.splits["test"] == dict(images=2, groups=2, captions=2) and found.images == {}
    assert clean_split(f"roco:{roco}") == dict(train=["R2"], validation=["R3"], test=["R4", "R5"])
    assert clean_split(f"roco:{roco}", keep=("train", "validation", "test")) == dict(train=["R1", "R2"], validation=["R3"], test=["R5"])


@real
def test_two_thirds_of_rocos_test_figures_come_from_articles_seen_in_training(tmp_path):
    found = audit(f"roco:{DATA}/roco")
    assert found.splits["test"]["images"] == 8179 and found.straddling["groups"]["test"]["train"] == 5386
    assert round(100 * found.share(), 1) == 65.9
    figures = read_roco_metadata(f"{DATA}/roco")
    ids = load_split(save_split(clean_split(figures), tmp_path / "roco.json"))
    assert {s: len(i) for s, i in ids.items()} == dict(train=45807, validation=6750, test=8179)
    assert not straddling_groups(apply_split(figures, ids))


@real
@pytest.mark.filterwarnings("ignore:.*rows left out")
def test_medpix_cases_do_not_straddle():
    pairs = prepare_pairs(DataConfig(source=f"jsonl:{DATA}/medpix2", columns={"group": "case_id"}))
    assert [pairs["split"].count(s) for s in ("train", "validation", "test")] == [1536, 184, 0] and not straddling_groups(pairs)


@real
def test_flickr8k_keeps_its_official_lists():
    pairs = prepare_pairs(DataConfig(source=f"flickr8k:{DATA}/flickr8k"))
    assert [pairs["split"].count(s) for s in ("train", "validation")] == [6000, 1000] and {len(c) for c in pairs["captions"]} <= {4, 5}
