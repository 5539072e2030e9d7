"""Runs measured on their own split and on others: what is cached, what is written, what is refused."""
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from radclip.data import load_pairs, prepare_pairs
from radclip.evaluation import embed_split, evaluate, format_report, source_slug
from radclip.evaluation import retrieval_report  # noqa: F401 (a name that stays)
from radclip.model import build_model, load_model, save_model
from radclip.ranking import retrieval_report as ranking_report
from radclip.recipe import Run, load_recipe, new_run
from radclip.splits import split_hash

SOURCE = "phantom:90"


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return build_model({"kind": "phantom", "text_layers": 1, "vocab_size": 300}, captions=load_captions())


def load_captions(): return [c for row in load_pairs(SOURCE)["captions"][:] for c in row]


@pytest.fixture
def run(tmp_path, encoder):
    run = new_run(load_recipe("phantom", f"data.source={SOURCE}", "data.sizes=null", "evaluate.bootstrap=50", "evaluate.pools=[4]"), tmp_path / "runs")
    save_model(encoder, run.model_folder)
    return run


@pytest.fixture
def encoded(monkeypatch):
    "Counts how often images are encoded."
    import radclip.evaluation as evaluation
    calls, encode = [], evaluation.encode_images
    monkeypatch.setattr(evaluation, "encode_images", lambda *a, **k: calls.append(1) or encode(*a, **k))
    return calls


def test_own_test_split_goes_to_metrics_and_evaluations(run):
    report = evaluate(run)
    written = json.loads((run.folder / "evaluations" / "phantom-90-test.json").read_text())
    assert written == report == json.loads((run.folder / "metrics.json").read_text())
    pairs = prepare_pairs(run.recipe.data)
    assert report["pool"]["split"] == "test" and report["pool"]["split_hash"] == split_hash(pairs) and report["pool"]["source"] == SOURCE
    assert report["pool"]["images"] == pairs["split"][:].count("test")
    assert [c["images"] for c in report["pool_curve"]] == [4, report["pool"]["images"]]


def test_the_report_is_that_of_the_embeddings(run):
    report, found = evaluate(run), embed_split(run)
    owner = [i for i, held in enumerate(found.pairs["captions"][:]) for _ in held]
    assert found.text_image.tolist() == owner and found.texts == [c for row in found.pairs["captions"][:] for c in row]
    again = ranking_report(found.image_emb, found.text_emb, owner, found.texts, config=run.recipe.evaluate)
    for part in ("image_to_text", "text_to_image", "strict", "batchwise"): assert report[part] == again[part]


def test_another_split_leaves_metrics_alone(run):
    evaluate(run, split="validation")
    assert not (run.folder / "metrics.json").exists() and (run.folder / "evaluations" / "phantom-90-validation.json").exists()
    assert evaluate(run, split="dev")["pool"]["images"] == evaluate(run, split="validation")["pool"]["images"]


def test_embeddings_are_reused_until_rows_or_weights_change(run, encoder, encoded):
    first = embed_split(run)
    assert torch.equal(first.image_emb, embed_split(run).image_emb) and len(encoded) == 1
    with torch.no_grad(): encoder.model.logit_scale.add_(0.1)
    save_model(encoder, run.model_folder)
    embed_split(run)
    assert len(encoded) == 2
    embed_split(run, split="validation")
    assert len(encoded) == 3
    evaluate(run, "phantom:90:5"); evaluate(run, "phantom:90:5")
    assert len(encoded) == 4


@pytest.mark.parametrize("spoil", [lambda b: b[:-100], lambda b: b"", lambda b: b"\xff" * 64 + b[64:]])
def test_a_damaged_file_is_computed_again(run, encoded, spoil):
    embed_split(run)
    file = run.folder / "embeddings" / "test.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    embed_split(run)
    assert len(encoded) == 2
    with safe_open(file, "pt") as stored: assert set(stored.keys()) == {"image_emb", "text_emb", "text_image"}


def test_nothing_is_left_beside_the_files(run):
    evaluate(run)
    left = [f.name for f in run.folder.rglob("*") if f.name.startswith(".")]
    assert not left


def test_an_absent_split_lists_those_present(run, tmp_path):
    with pytest.raises(ValueError, match=r"no split 'tset'.*did you mean 'test'.*train \(\d+\), validation \(\d+\), test \(\d+\)"): evaluate(run, split="tset")
    write_pairs(tmp_path, split="train")
    with pytest.raises(ValueError, match=r"no split 'test'.*it has train \(12\)"): evaluate(run, f"jsonl:{tmp_path}/pairs.jsonl")
    assert evaluate(run, f"jsonl:{tmp_path}/pairs.jsonl", split="all")["pool"]["images"] == 12


def write_pairs(folder, split="test", **extra):
    "Twelve grey squares with captions, as JSONL."
    rows = []
    for i in range(12):
        Image.new("L", (40, 40), 20 * i).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "captions": [f"square {i}", f"grey {i % 3}"], "split": split} | {k: f"{v}{i // 2}" for k, v in extra.items()})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_another_source_takes_the_recipes_columns_along(tmp_path, encoder):
    for name in ("own", "other"): (tmp_path / name).mkdir()
    write_pairs(tmp_path / "own", case_id="a")
    write_pairs(tmp_path / "other", case_id="b")
    recipe = load_recipe("phantom", f"data.source=jsonl:{tmp_path}/own/pairs.jsonl", "data.sizes=null", "data.columns={group: case_id}")
    run = new_run(recipe, tmp_path / "runs")
    save_model(encoder, run.model_folder)
    found = embed_split(run, f"jsonl:{tmp_path}/other/pairs.jsonl")
    assert found.pairs["group"][:4] == ["b0", "b0", "b1", "b1"]
    assert len(found.texts) == 24 and len(found.image_emb) == 12
    assert embed_split(run, SOURCE).pool["source"] == SOURCE  # a layout without that column: the mapping is dropped
    write_pairs(tmp_path / "other")
    with pytest.raises(ValueError, match="case_id"): embed_split(run, f"jsonl:{tmp_path}/other/pairs.jsonl")


def test_a_source_with_the_usual_columns_needs_no_mapping(tmp_path, encoder, monkeypatch):
    "The recipe maps `captions: text`; other pairs spell the column as everybody does."
    import radclip.data as data
    for name in ("own", "other"): (tmp_path / name).mkdir()
    write_pairs(tmp_path / "other", case_id="b")
    write_pairs(tmp_path / "own", case_id="a")
    own = tmp_path / "own" / "pairs.jsonl"
    own.write_text(own.read_text().replace('"captions"', '"text"'))
    recipe = load_recipe("phantom", f"data.source=jsonl:{own}", "data.sizes=null", "data.columns={captions: text, group: case_id}")
    run = new_run(recipe, tmp_path / "runs")
    save_model(encoder, run.model_folder)
    shutil.rmtree(tmp_path / "own")  # what the run was trained on is not asked for
    read, calls = data.read_source, []
    monkeypatch.setattr(data, "read_source", lambda *a, **k: calls.append(a) or read(*a, **k))
    found = embed_split(run, f"jsonl:{tmp_path}/other/pairs.jsonl")
    assert found.pairs["captions"][0] == ["square 0", "grey 0"] and found.pairs["group"][:4] == ["b0", "b0", "b1", "b1"] and len(calls) == 1
    (tmp_path / "other" / "pairs.csv").write_text("image,caption,patient_id\n" + "".join(f"{i}.png,square {i},p{i // 3}\n" for i in range(12)))
    found = embed_split(run, f"images:{tmp_path}/other/pairs.csv", split="all")
    assert found.texts[0] == "square 0" and found.pairs["group"][:4] == ["p0", "p0", "p0", "p1"] and len(calls) == 2
    other = tmp_path / "other" / "pairs.jsonl"
    other.write_text(other.read_text().replace('"captions"', '"words"'))
    with pytest.raises(ValueError, match=r"no column 'text', which .*data.columns of the recipe.* names as captions; it has image, words"): embed_split(run, f"jsonl:{other}")


@pytest.mark.parametrize("source", ["", " "])
def test_an_empty_source_is_not_the_runs_own(run, source):
    with pytest.raises(ValueError, match="no source"): evaluate(run, source)


def spoil(folder, *numbers):
    "Cut some of the pictures short, and take the last one away."
    for i in numbers: (folder / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes()[:60])
    (folder / f"{numbers[-1]}.png").unlink()


def without(folder, *numbers):
    "The table of `write_pairs` without some rows."
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    (folder / "less.jsonl").write_text("\n".join(line for i, line in enumerate(lines) if i not in numbers))
    return f"jsonl:{folder}/less.jsonl"


def load_then_lose(monkeypatch, folder, *numbers):
    "Pairs whose images break between the reading of the table and their use, as a file on a network drive may."
    import radclip.evaluation as evaluation
    load = evaluation.load_pairs

    def load_pairs(*a, **k):
        pairs = load(*a, **k)
        if (folder / f"{numbers[-1]}.png").exists(): spoil(folder, *numbers)
        return pairs
    monkeypatch.setattr(evaluation, "load_pairs", load_pairs)


def test_unreadable_images_are_left_out_counted_and_named(run, tmp_path, encoded, monkeypatch):
    write_pairs(tmp_path)
    source = f"jsonl:{tmp_path}/pairs.jsonl"
    wanted = embed_split(run, without(tmp_path, 2, 7))
    load_then_lose(monkeypatch, tmp_path, 2, 7)
    with pytest.warns(UserWarning, match=r"2 of 12 images can't be read and are left out: row 2 \(2.png\): .*truncated.*; row 7 \(7.png\): .*no file .*7.png"): found = embed_split(run, source)
    assert found.pairs["image_id"][:] == [f"{i}.png" for i in range(12) if i not in (2, 7)] == wanted.pairs["image_id"][:]
    for part in ("image_emb", "text_emb", "text_image"): assert torch.allclose(getattr(found, part), getattr(wanted, part), atol=1e-6)
    assert found.texts == wanted.texts and found.pool["unreadable"] == 2 and wanted.pool["unreadable"] == 0
    assert len(encoded) == 2, "each image is decoded and encoded once"


def test_rows_left_out_stay_out_of_stored_embeddings_until_the_file_is_mended(run, tmp_path, encoded):
    write_pairs(tmp_path)
    source, whole = f"jsonl:{tmp_path}/pairs.jsonl", (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[:60])
    with pytest.warns(UserWarning, match="1 of 12 images"): first = embed_split(run, source)
    with pytest.warns(UserWarning, match="1 of 12 images"): again = embed_split(run, source)
    assert len(encoded) == 1 and torch.equal(first.image_emb, again.image_emb) and first.pairs["image_id"][:] == again.pairs["image_id"][:]
    with pytest.warns(UserWarning, match="1 of 12 images"): report = evaluate(run, source)
    assert (report["pool"]["images"], report["pool"]["texts"], report["pool"]["unreadable"]) == (11, 22, 1)
    assert "pool of 11 images, 22 captions (14 distinct); 1 more can't be read" in format_report(report)
    (tmp_path / "3.png").write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(embed_split(run, source).image_emb) == 12 and len(encoded) == 2


def test_a_picture_that_was_replaced_is_embedded_anew(run, tmp_path, encoded):
    write_pairs(tmp_path)
    first = embed_split(run, f"jsonl:{tmp_path}/pairs.jsonl")
    Image.effect_noise((40, 40), 90).save(tmp_path / "3.png")
    second = embed_split(run, f"jsonl:{tmp_path}/pairs.jsonl")
    changed = (first.image_emb - second.image_emb).abs().amax(1) > 1e-6
    assert len(encoded) == 2 and changed.nonzero().flatten().tolist() == [3]


def test_a_split_without_one_readable_image_is_one_error(run, tmp_path):
    write_pairs(tmp_path)
    for i in range(12): (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 12 images can be read; row 0 \(0.png\): .*; and 11 more"): embed_split(run, f"jsonl:{tmp_path}/pairs.jsonl")
    assert not list((run.folder / "embeddings").iterdir())


def test_pairs_that_changed_since_training_are_refused(run):
    run.update(split_hash="0" * 16)
    with pytest.raises(ValueError, match="have changed since"): evaluate(run)
    assert evaluate(run, SOURCE)["pool"]["source"] == SOURCE


def test_a_tiny_pool_is_warned_about(run):
    with pytest.warns(UserWarning, match="too few to measure search"): evaluate(run, "phantom:40")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(run)


def test_model_folders_and_missing_runs(run, tmp_path):
    report = evaluate(run.model_folder, SOURCE)
    assert report["image_to_text"] == evaluate(run, SOURCE)["image_to_text"]
    with pytest.raises(ValueError, match="name a source"): evaluate(run.model_folder)
    with pytest.raises(FileNotFoundError): evaluate("no-such-run")


def test_an_unfinished_run_has_no_model_yet(tmp_path):
    run = new_run(load_recipe("phantom", f"data.source={SOURCE}", "data.sizes=null"), tmp_path / "runs")
    for source in (None, SOURCE):
        with pytest.raises(FileNotFoundError, match="its training did not end. Go on with it by --resume"): evaluate(run, source)


def test_slugs_are_file_names():
    assert source_slug("phantom") == "phantom" and source_slug("phantom:600:2") == "phantom-600-2"
    assert source_slug("jsonl:/a/b/medpix2/pairs.jsonl") == "jsonl-medpix2-pairs" and source_slug("flickr8k:../data/Flickr 8k") == "flickr8k-data-Flickr-8k"
    assert "/" not in source_slug("roco:/x/../y/")


def test_the_table_names_pool_split_and_direction(run):
    text = format_report(evaluate(run))
    for part in ("phantom:90", "split test", "image to text", "text to image", "own captions only", "within batches of"): assert part in text
    assert "given embeddings" in format_report(ranking_report(torch.eye(40), torch.eye(40), list(range(40))))


def test_the_mean_of_views_is_that_of_embeddings_made_one_by_one(tmp_path):
    from radclip.evaluation import encode_views
    from radclip.loading import AugmentConfig, PixelCache, augment
    pairs, encoder, config = load_pairs("phantom:12"), load_model(), AugmentConfig(scale=(0.6, 1.0))
    cache = PixelCache.build(pairs, encoder.preprocess, tmp_path)
    rows = np.arange(12)
    with torch.no_grad():
        each = [encoder.model.encode_image(x, normalize=True) for x in (cache.to_float(rows), *(augment(cache.pixels[rows], rows, 3, v, config, cache.mean, cache.std) for v in range(2)))]
    want = torch.nn.functional.normalize(sum(each), dim=1)
    got = encode_views(encoder, pairs, 2, config, seed=3)
    assert torch.allclose(got, want, atol=1e-5) and not torch.allclose(got, each[0], atol=1e-3)
    assert torch.allclose(encode_views(encoder, pairs, 0), each[0], atol=1e-5)


@pytest.mark.filterwarnings("ignore:9 images are too few")
def test_views_are_told_and_are_part_of_what_stored_embeddings_depend_on(tmp_path):
    run = new_run(load_recipe("phantom", "data.source=phantom:60", "data.sizes=null", "data.official=true", "evaluate.views=2"), tmp_path)
    save_model(load_model(), run.model_folder)
    report, averaged = evaluate(run), embed_split(run).image_emb
    assert report["pool"]["views"] == 2 and "the mean of itself and 2 augmented views" in format_report(report)
    file = run.folder / "recipe.yaml"
    assert file.read_text().count("views: 2") == 1
    file.write_text(file.read_text().replace("views: 2", "views: 0"))
    plain = embed_split(Run(run.folder))
    assert "views" not in plain.pool and not torch.allclose(plain.image_emb, averaged, atol=1e-3)
