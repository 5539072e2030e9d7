"""Captions of a whole split beside their baselines, and the commands that use them."""
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from radclip import cli
from radclip.blip import build_captioner, load_captioner, save_captioner
from radclip.caption_evaluation import (baseline_captions, captions_page, evaluate_captions, find_captioner, format_evaluation, nearest_rows, newest_captioner,
                                        open_captioner, pick_examples)
from radclip.caption_report import caption_report
from radclip.captioning import CaptionRecipe, build_captioning, caption_loss
from radclip.data import load_pairs, prepare_pairs
from radclip.evaluation import evaluate
from radclip.generation import caption_images
from radclip.model import encode_images, load_model
from radclip.recipe import Run, load_recipe
from radclip.training import fit

pytestmark = pytest.mark.filterwarnings("ignore:validation has only")
MODEL = {"vision_from": "phantom", "freeze_vision": "trunk", "vision_width": 32, "vision_heads": 2, "text_width": 32, "text_heads": 2,
         "vision_layers": 1, "text_layers": 1, "max_length": 40}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A folder with a run of a captioner, and a newer one of a dual encoder."
    out = tmp_path_factory.mktemp("runs")
    recipe = CaptionRecipe(name="tiny-blip", data={"source": "phantom:80"}, model=MODEL, generate={"beams": 1, "max_new_tokens": 12},
                           caption={"neighbour": "phantom"}, train={"epochs": 3, "batch_size": 14, "lr": 3e-3})
    fit(recipe, out=out, quiet=True)
    fit(load_recipe("phantom", "data.source=phantom:60", "data.sizes=null", "data.official=true", "train.epochs=0"), out=out, quiet=True)
    return out


@pytest.fixture(scope="module")
def run(runs): return newest_captioner(runs)


@pytest.fixture(scope="module")
def found(run): return evaluate_captions(run)


@pytest.fixture
def within(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs, tmp_path / "runs")
    Image.new("L", (90, 60), 40).save("a.png")
    return tmp_path


def call(capsys, *words):
    "Exit code, stdout and stderr of a command."
    code = cli.main(list(words))
    caught = capsys.readouterr()
    return code, caught.out, caught.err


# ---- which captioner

def test_the_newest_captioner_is_found_though_a_dual_encoder_is_newer(runs, run):
    assert run.folder.parent.name == "tiny-blip" and find_captioner(None, runs)[0].folder == run.folder
    assert find_captioner("tiny-blip", runs)[1] == run.model_folder == find_captioner(run)[1]
    assert find_captioner(run.model_folder) == (None, run.model_folder)
    assert open_captioner(None, None, runs)[1].beams == 1 and open_captioner(run.model_folder)[1].beams == 3


@pytest.mark.parametrize("name, why", [("phantom", "is a dual encoder"), ("nothing", "no run at nothing")])
def test_what_is_no_captioner_is_told(runs, name, why):
    with pytest.raises((ValueError, FileNotFoundError), match=why) as error: find_captioner(name, runs)
    assert "\n" not in str(error.value)


def test_what_somebody_else_left_among_the_runs_is_passed_over(runs, run, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    for name, text in {"a": "", "b": "- x", "c": "{", "d": "task: caption\nname: d"}.items():
        (tmp_path / "runs" / "foreign" / name).mkdir(parents=True)
        (tmp_path / "runs" / "foreign" / name / "recipe.yaml").write_text(text)
    (tmp_path / "runs" / "foreign" / "d" / "run.json").write_text('{"finished": true}')  # but no model
    assert newest_captioner(tmp_path / "runs").folder.name == run.folder.name


def test_training_pairs_that_are_gone_cost_the_baselines_only(run, tmp_path):
    copy = tmp_path / "tiny-blip" / run.folder.name
    shutil.copytree(run.folder, copy)
    (copy / "recipe.yaml").write_text((copy / "recipe.yaml").read_text().replace("source: phantom:80", "source: jsonl:gone.jsonl"))
    with pytest.warns(UserWarning, match="no baselines: the pairs .* can't be had"): report = evaluate_captions(Run(copy), "phantom:20", "test")
    assert report["baselines"] == {} and report["pool"]["neighbour"] is None and report["caption"]["ROUGE-L"] >= 0
    (copy / "recipe.yaml").write_text((run.folder / "recipe.yaml").read_text().replace("source: phantom:80", "source: phantom:70"))
    with pytest.warns(UserWarning, match="no baselines: the training pairs have changed"): evaluate_captions(Run(copy), "phantom:20", "test")


def test_names_with_dots_keep_their_files_apart(run, tmp_path):
    (tmp_path / "set.v1").mkdir()
    lines = []
    for row, example in enumerate(load_pairs("phantom:20", "test")):
        example["image"].save(tmp_path / "set.v1" / f"{row}.png")
        lines.append(json.dumps({"image": f"{row}.png", "caption": example["captions"][0], "group": str(row)}))
    (tmp_path / "set.v1" / "pairs.jsonl").write_text("\n".join(lines))
    pool = evaluate_captions(run, f"jsonl:{tmp_path / 'set.v1' / 'pairs.jsonl'}", "all")["pool"]
    from radclip.evaluation import report_stem
    assert "v1" in report_stem(pool)
    for end in ("json", "parquet", "html"): assert (run.folder / "evaluations" / f"{report_stem(pool)}.{end}").is_file()


def test_no_run_at_all_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="radclip train phantom-blip"): find_captioner(None, tmp_path)


def test_a_run_of_a_dual_encoder_is_refused_and_a_captioner_by_those(runs, run):
    with pytest.raises(ValueError, match="dual encoder, which writes no captions"): evaluate_captions(Run(next((runs / "phantom").iterdir())))
    with pytest.raises(ValueError, match="is a captioner, which writes captions"): evaluate(run)
    with pytest.raises(ValueError, match="is a captioner, which writes captions"): load_model(run.model_folder)


# ---- baselines

def test_the_nearest_row_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    train, queries = rng.normal(3, 1, (50, 7)), rng.normal(3, 1, (20, 7))
    centre = train.mean(0)
    cosine = [[(q - centre) @ (t - centre) / np.linalg.norm(q - centre) / np.linalg.norm(t - centre) for t in train] for q in queries]
    assert nearest_rows(train, queries).tolist() == np.argmax(cosine, 1).tolist()
    assert nearest_rows(train, train).tolist() == list(range(50))


def test_baselines_say_training_captions_only():
    train = load_pairs("phantom:60", "train")
    nearest = np.array([3, 0, 0, 5])
    said = baseline_captions(train, nearest, seed=1)
    own = [texts[0] for texts in train["captions"]]
    assert said["nearest image"] == [own[3], own[0], own[0], own[5]] and set(said["random"]) <= set(own) and len(set(said["most frequent"])) == 1
    assert said == baseline_captions(train, nearest, seed=1) != baseline_captions(train, nearest, seed=2)
    table = train.select(range(3)).remove_columns("captions").add_column("captions", [["x"], ["y", "x"], ["z"]])
    assert baseline_captions(table, np.array([1]))["most frequent"] == ["x"]


def test_the_baseline_by_the_packaged_model_is_what_its_embeddings_say(run, found):
    pairs = prepare_pairs(run.recipe.data)
    splits = np.asarray(pairs["split"])
    train, test = (pairs.select(np.flatnonzero(splits == name)) for name in ("train", "test"))
    encoder = load_model()
    a, b = (np.asarray(encode_images(encoder, table)) for table in (train, test))
    a, b = a - a.mean(0), b - a.mean(0)
    rows = (b / np.linalg.norm(b, axis=1, keepdims=True) @ (a / np.linalg.norm(a, axis=1, keepdims=True)).T).argmax(1)
    want = caption_report([train["captions"][r][0] for r in rows], test["captions"][:], test["concepts"][:])
    assert found["baselines"]["nearest image"]["CIDEr"] == pytest.approx(want["CIDEr"]) and found["pool"]["neighbour"] == "phantom"


# ---- the evaluation

def test_figures_are_those_of_the_report_on_captions_written_by_hand(run, found):
    test = load_pairs("phantom:80", "test")
    captioner = load_captioner(run.model_folder)
    captions = caption_images(captioner, test, {"beams": 1, "max_new_tokens": 12}, batch_size=3)
    want = caption_report(captions, test["captions"][:], test["concepts"][:])
    assert {k: found["caption"][k] for k in want} == want and list(found["baselines"]) == ["most frequent", "random", "nearest image"]
    _, task, data = build_captioning(run.recipe)
    assert found["caption"]["perplexity"] == pytest.approx(np.exp(found["caption"]["loss"]))
    assert found["pool"] == {"source": "phantom:80", "split": "test", "split_hash": run.info["split_hash"], "images": len(test), "unreadable": 0,
                             "generate": run.recipe.generate.model_dump(), "neighbour": "phantom", "seed": 0}


def test_loss_of_validation_is_what_training_said(run):
    report = evaluate_captions(run, split="validation")
    assert report["caption"]["loss"] == pytest.approx(run.info["best"]["value"], rel=1e-3)  # training read maps in half precision
    assert (run.folder / "evaluations" / "phantom-80-validation.html").is_file()


def test_what_is_written(run, found):
    assert json.loads((run.folder / "metrics.json").read_text()) == json.loads(json.dumps(found))
    assert json.loads((run.folder / "evaluations" / "phantom-80-test.json").read_text())["pool"]["split"] == "test"
    table = pq.read_table(run.folder / "captions.parquet").to_pydict()
    test = load_pairs("phantom:80", "test")
    assert table["image_id"] == test["image_id"][:] and table["references"] == test["captions"][:]
    assert sum(table["laterality_error"]) == round((found["caption"]["laterality_error"] or 0) * found["caption"]["laterality_rows"])
    page = (run.folder / "captions.html").read_text(encoding="utf-8")
    assert page.count("<figure>") >= min(24, len(test)) and "Reference" in page and "nearest image" in page and str(run.folder) not in page
    assert not list(run.folder.glob(".*.parquet"))


def test_the_text_names_pool_split_search_and_baselines(found):
    text = format_evaluation(found)
    assert "phantom:80, split test" in text and "greedy, at most 12 word pieces" in text and "nearest image" in text and "perplexity" in text


def test_another_source_and_unreadable_images(run, tmp_path):
    pairs = load_pairs("phantom:20", "test")
    for row, example in enumerate(pairs): example["image"].save(tmp_path / f"{row}.png")
    (tmp_path / "0.png").write_bytes(b"no image")
    lines = [{"image": f"{row}.png", "caption": example["captions"][0], "case_id": str(row)} for row, example in enumerate(pairs)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.warns(UserWarning, match="1 of .* can't be read"): report = evaluate_captions(run, f"jsonl:{tmp_path / 'pairs.jsonl'}", "all")
    assert report["pool"]["unreadable"] == 1 and report["pool"]["images"] == len(lines) - 1
    assert report["caption"]["concept_F1"] is None and report["caption"]["concept_F1_text"] is not None  # no known concepts there
    assert not (run.folder / "metrics.json").read_text().count("pairs.jsonl")


def test_without_a_dual_encoder_the_captioner_compares_images_itself(run, tmp_path):
    copy = tmp_path / "runs" / "tiny-blip" / run.folder.name
    shutil.copytree(run.folder, copy)
    text = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(text.replace("neighbour: phantom", "neighbour: medpix"))
    with pytest.warns(UserWarning, match="nearest training image: no finished run of medpix.*own vision encoder"): report = evaluate_captions(Run(copy))
    assert report["pool"]["neighbour"] == "own vision encoder" and "nearest image" in report["baselines"]


def test_a_captioner_without_a_run_is_measured_on_a_source_alone(run):
    report = evaluate_captions(run.model_folder, "phantom:20", "test")
    assert report["baselines"] == {} and report["pool"]["generate"]["beams"] == 3
    with pytest.raises(ValueError, match="name a source"): evaluate_captions(run.model_folder)


def test_an_absent_split_lists_those_that_are_there(run):
    with pytest.raises(ValueError, match="train.*validation.*test|test.*train.*validation"): evaluate_captions(run, split="tset")


def test_examples_are_a_fair_draw_and_then_wrong_ones():
    shown = pick_examples(100, [5, 6, 7], most=10)
    assert len(set(shown)) == len(shown) and {5, 6, 7} <= set(shown) and shown[:10] == pick_examples(100, [], most=10)
    assert pick_examples(3, [], most=10) and sorted(pick_examples(3, [])) == [0, 1, 2]


def test_the_page_escapes_what_captions_hold(found):
    pairs = load_pairs("phantom:20", "test").select(range(1))
    page = captions_page(["<script>x</script> nodule"], pairs, found, [0])
    assert "<script>x" not in page and "&lt;script&gt;" in page


# ---- commands

def test_caption_prints_the_caption_alone(within, capsys):
    code, out, _ = call(capsys, "caption", "a.png")
    assert code == 0 and len(out.splitlines()) == 1
    code, rows, _ = call(capsys, "caption", "a.png", "a.png", "--json", "--run", "tiny-blip")
    assert code == 0 and json.loads(rows) == [{"image": "a.png", "caption": out.strip()}] * 2


def test_any_image_to_text_model_can_caption(within, capsys):
    torch.manual_seed(0)
    captioner = build_captioner({"vision_width": 16, "vision_layers": 1, "vision_heads": 2, "text_width": 16, "text_layers": 1, "text_heads": 2}, ["a small nodule"])
    save_captioner(captioner, within / "other")
    code, out, error = call(capsys, "caption", "a.png", "--model", "other")
    assert code == 0 and out.strip(), error


@pytest.mark.parametrize("words, why", [
    (["caption", "b.png"], "no such image: b.png"),
    (["caption", "a.png", "--run", "phantom"], "dual encoder"),
    (["caption", "a.png", "--run", "none"], "no run at none"),
    (["caption", "a.png", "--run", "x", "--model", "y"], "both name a captioner"),
    (["index", "tiny-blip"], "is a captioner"),
    (["classify", "a.png", "--label", "x", "--label", "y", "--run", "tiny-blip"], "is a captioner"),
    (["explain", "a.png", "--text", "x", "--run", "tiny-blip"], "is a captioner"),
])
def test_errors_are_one_line(within, capsys, words, why):
    code, out, error = call(capsys, *words)
    assert code == 2 and not out and len(error.strip().splitlines()) == 1 and why in error


def test_what_needs_a_dual_encoder_passes_over_a_newer_captioner(within, capsys):
    newest = max((within / "runs" / "tiny-blip").iterdir())
    newest.rename(newest.with_name("29991231-000000"))
    (within / "runs" / "latest.txt").write_text(str(newest.with_name("29991231-000000")))
    code, out, error = call(capsys, "classify", "a.png", "--label", "x", "--label", "y")
    assert code == 0, error
    code, out, error = call(capsys, "index")
    assert code == 0 and out.startswith("runs/phantom/"), error


def test_phantom_is_told_to_be_the_packaged_model_where_a_run_has_that_name(within, capsys):
    code, out, error = call(capsys, "classify", "a.png", "--label", "x", "--label", "y", "--run", "phantom", "--json")
    assert code == 0 and json.loads(out) and "phantom is the packaged model" in error


def test_evaluate_and_train_know_a_captioner_by_its_recipe(within, capsys):
    code, out, error = call(capsys, "evaluate", "tiny-blip", "--json")
    report = json.loads(out)
    assert code == 0 and {"ROUGE-1", "ROUGE-L", "BLEU-4", "CIDEr", "concept_F1", "laterality_error", "negation_error", "loss", "perplexity"} <= report["caption"].keys()
    code, out, error = call(capsys, "train", "phantom-blip", "data.source=phantom:60", "data.sizes=null", "train.epochs=1", "train.batch_size=10",
                            "caption.concept_min=2", "model.text_layers=1")
    assert code == 0 and "split validation" in out and "nearest image" in out and "run: runs/phantom-blip/" in out, error
