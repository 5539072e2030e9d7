"""The command line: every command's good path on tiny phantoms, every error in one line."""
import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radclip import cli, terminal

TINY = ["data.source=phantom:150", "data.sizes=null", "train.epochs=1", "train.batch_size=16"]
PROGRAM = [sys.executable, "-c", "import sys; from radclip.cli import main; sys.exit(main())"]


def radclip(*words, cwd, **more):
    "The command in a process of its own: (exit code, stdout, stderr)."
    done = subprocess.run([*PROGRAM, *map(str, words)], cwd=cwd, capture_output=True, text=True, encoding="utf-8", **more)
    return done.returncode, done.stdout, done.stderr


def strict(text):
    "Parse exactly one JSON document; NaN and Infinity are no JSON."
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty working folder."
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A working folder in which `radclip train` has been run once, and what it printed."
    folder = tmp_path_factory.mktemp("work")
    code, out, err = radclip("train", *TINY, cwd=folder)
    assert code == 0, err
    return folder, out, err


@pytest.fixture(scope="module")
def indexed(trained):
    "The same folder after `radclip index`."
    folder = trained[0]
    before, page = os.getcwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(page): assert cli.main(["index", "--out", "found"]) == 0
    finally: os.chdir(before)
    assert "found" in page.getvalue() and (folder / "found" / "index.json").is_file()
    return folder


@pytest.fixture
def within(trained, monkeypatch):
    "Work in the folder with the run."
    monkeypatch.chdir(trained[0])
    return trained[0]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    "One phantom as a file."
    from radclip.phantom import phantom_pairs
    path = tmp_path_factory.mktemp("image") / "chest.png"
    phantom_pairs(1)[0]["image"].save(path)
    return path


def one_line(capsys):
    "What came out is nothing on stdout and one line on stderr; that line."
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1 and "Traceback" not in err, (out, err)
    return err.strip()


# ---- answers

@pytest.mark.parametrize("value, want", [
    ({"a": np.float32(0.5), 1: (1, 2)}, {"a": 0.5, "1": [1, 2]}),
    ([math.nan, math.inf, -math.inf, 0.25], [None, None, None, 0.25]),
    (np.arange(3), [0, 1, 2]),
    (Path("a") / "b", str(Path("a") / "b")),
    ({"x": None, "y": True, "z": "é"}, {"x": None, "y": True, "z": "é"}),
    (np.array([math.nan]), [None]),
])
def test_plain_makes_strict_json(value, want):
    made = terminal.plain(value)
    assert made == want and strict(json.dumps(made)) == want


def test_a_table_keeps_brackets_and_long_cells():
    text = cli.as_table(["a", ">b"], [["[bold] is no markup", 1.0], ["x" * 300, 2]], "title")
    assert text.startswith("title\n") and "[bold] is no markup" in text and text.count("x") == 300
    assert max(map(len, text.splitlines())) <= 120


def test_answers_only_moves_prints_and_child_processes_aside(tmp_path):
    code = ("import subprocess, sys; from radclip.cli import answers_only\n"
            "with answers_only(): print('noise'); subprocess.run([sys.executable, '-c', 'print(\"child\")'])\n"
            "print('answer')")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "answer\n" and sorted(done.stderr.split()) == ["child", "noise"]


def test_stdout_is_back_after_an_error():
    before = sys.stdout
    with pytest.raises(ValueError):
        with cli.answers_only(): raise ValueError
    assert sys.stdout is before


# ---- help, version, and what is imported for them

@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["search", "-h"]])
def test_help_imports_nothing_heavy(words, tmp_path):
    heavy = "{'torch', 'numpy', 'datasets', 'transformers', 'open_clip', 'lightning', 'faiss', 'matplotlib', 'rich'}"
    code = f"import sys; from radclip.cli import main; code = main({words!r}); print(sorted({heavy} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr
    assert done.stdout.strip()


def test_every_command_of_the_readme_exists(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"^radclip (\w+)|&& radclip (\w+)", readme, re.M))
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    names = {"recipes", "data", "train", "evaluate", "index", "search", "classify", "explain", "caption", "quickstart"}
    assert {a or b for a, b in used} == names and all(re.search(rf"^  {n}\b", listed, re.M) for n in names)


def test_no_words_show_the_help(capsys):
    assert cli.main([]) == 0
    assert "Usage: radclip" in capsys.readouterr().out


# ---- errors

@pytest.mark.parametrize("words, said", [
    (["trian"], "train"),
    (["train", "--bogus"], "--bogus"),
    (["train", "fantom"], "phantom"),
    (["train", "phantom", "epochs"], "key=value"),
    (["train", "phantom", "train.epoch=3"], "train.epochs"),
    (["train", "phantom", "train.epochs=many"], "epochs"),
    (["train", "no/such/file.yaml"], "no/such/file.yaml"),
    (["train", "--resume"], "--resume"),
    (["evaluate"], "radclip train"),
    (["evaluate", "nowhere"], "nowhere"),
    (["evaluate", ""], "the run has an empty name"),
    (["index", ""], "the run has an empty name"),
    (["evaluate", "phantom", "--source", ""], "no source ''"),
    (["data", "medpx"], "medpix"),
    (["data", "xyzzy"], "roco-csv"),
    (["train", "xyzzy"], "the recipes there are: biomedclip-zeroshot"),
    (["train", "phantom", "model.name=ViT-B-32"], "name is not read by kind phantom"),
    (["index"], "radclip train"),
    (["search"], "INDEX"),
    (["search", "nowhere", "words"], "nowhere"),
    (["search", "nowhere"], "nothing to search for: radclip search nowhere"),
    (["search", "nowhere", "words", "--image", "x.png"], "both TEXT and --image are given, give one of the two"),
    (["search", "nowhere", "--image", "missing.png"], "missing.png"),
    (["search", "nowhere", "words", "-k", "0"], "-k"),
    (["search", "nowhere", "words", "-k", "many"], "-k"),
    (["classify", "missing.png", "--label", "a", "--label", "b"], "missing.png"),
    (["classify", "missing.png"], "--label"),
    (["classify", "missing.png", "--label", "a"], "two"),
    (["explain", "missing.png", "--text", "effusion"], "missing.png"),
    (["explain", "missing.png"], "--text"),
    (["data", "fantom"], "phantom"),
    (["data", "jsonl:nowhere.jsonl"], "nowhere.jsonl"),
    (["data"], "RECIPE|SOURCE"),
])
def test_an_error_is_one_line_that_says_what_to_do(words, said, here, capsys):
    assert cli.main(words) == 2
    line = one_line(capsys)
    assert line.startswith("radclip") and said in line, line


def test_an_unset_variable_is_named(here, capsys, monkeypatch):
    monkeypatch.delenv("RADCLIP_NOWHERE", raising=False)
    Path("mine.yaml").write_text("data: {source: 'jsonl:$RADCLIP_NOWHERE/pairs.jsonl'}\n")
    assert cli.main(["train", "mine.yaml"]) == 2
    assert "RADCLIP_NOWHERE" in one_line(capsys)


def test_a_file_that_is_no_image(here, capsys):
    Path("words.png").write_text("not a picture")
    assert cli.main(["classify", "words.png", "--label", "a", "--label", "b"]) == 2
    assert "words.png" in one_line(capsys)


def test_a_truncated_image(here, capsys, picture):
    Path("half.png").write_bytes(picture.read_bytes()[:2000])
    assert cli.main(["search", "nowhere", "--image", "half.png"]) == 2
    assert "half.png" in one_line(capsys)


def test_an_unexpected_error_is_named_and_debug_shows_it(capsys, monkeypatch):
    def broken(): raise ZeroDivisionError("division by zero")
    monkeypatch.setattr(cli, "recipe_table", broken)
    assert cli.main(["recipes"]) == 2
    line = one_line(capsys)
    assert "ZeroDivisionError" in line and "--debug" in line
    with pytest.raises(ZeroDivisionError): cli.main(["--debug", "recipes"])
    with pytest.raises(ZeroDivisionError): cli.main(["recipes", "--debug"])


def test_errors_in_a_process_of_their_own(tmp_path):
    words = ("classify", "x.png", "--label", "one label alone")
    code, out, err = radclip(*words, cwd=tmp_path)
    assert (code, out) == (2, "") and err.count("\n") == 1
    code, out, err = radclip(*words, "--debug", cwd=tmp_path)
    assert code not in (0, 2) and "Traceback" in err and out == ""


@pytest.mark.parametrize("error, said", [
    (ValueError("one\n  two"), "radclip: one two"),
    (FileNotFoundError(2, "No such file or directory", "a.txt"), "a.txt"),
    (KeyError("x"), "KeyError"),
    (RuntimeError(), "RuntimeError"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "UnicodeDecodeError"),
])
def test_error_line_is_one_line(error, said):
    line = cli.error_line(error)
    assert said in line and "\n" not in line


# ---- recipes and data

def test_recipes(capsys, monkeypatch):
    for name in ("RADCLIP_DATA", "RADCLIP_WEIGHTS"): monkeypatch.delenv(name, raising=False)
    assert cli.main(["recipes", "--json"]) == 0
    rows = {r["name"]: r for r in strict(capsys.readouterr().out)}
    packaged = {p.stem for p in (Path(cli.__file__).parent / "recipes").glob("*.yaml")}
    assert set(rows) == packaged and all(r["description"] for r in rows.values())
    assert rows["phantom"]["needs"] == rows["phantom"]["stand_ins"] == []
    assert rows["medpix"]["needs"] == ["$RADCLIP_DATA (not set)", "$RADCLIP_WEIGHTS (not set)"] and rows["medpix"]["stand_ins"]
    assert rows["roco-vitb32-v1"]["needs"] == ["data from the hub", "weights from the hub"]
    for name in ("RADCLIP_DATA", "RADCLIP_WEIGHTS"): monkeypatch.setenv(name, "/somewhere")
    assert cli.main(["recipes", "--json"]) == 0
    assert not {r["name"]: r for r in strict(capsys.readouterr().out)}["medpix"]["needs"]


def test_recipes_for_a_person(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "recipe" and any(line.startswith("phantom ") and line.endswith("nothing") for line in lines)


def test_data_audits_a_source(here, capsys):
    assert cli.main(["data", "phantom:60", "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert isinstance(found, dict) and "60" in json.dumps(found)
    assert cli.main(["data", "phantom:60"]) == 0
    assert "60" in capsys.readouterr().out


def test_data_audits_a_recipe_file(here, capsys):
    Path("mine.yaml").write_text("data: {source: 'phantom:70'}\n")
    assert cli.main(["data", "mine.yaml", "--json"]) == 0
    assert "70" in json.dumps(strict(capsys.readouterr().out))


# ---- train, evaluate

def test_split_words():
    assert cli.split_words(["a.yaml", "x=1"]) == ("a.yaml", ["x=1"])
    assert cli.split_words(["x=1", "y=2"]) == ("phantom", ["x=1", "y=2"])
    with pytest.raises(ValueError, match="key=value"): cli.split_words(["x=1", "medpix"])


def test_train_writes_a_run_and_ends_with_validation(trained):
    folder, out, err = trained
    run = Path((folder / "runs" / "latest.txt").read_text().strip())
    assert run.parent == (folder / "runs" / "phantom").resolve() or run.parent.name == "phantom"
    assert "split validation" in out and "image to text" in out and out.strip().splitlines()[-1].startswith("run: ")
    assert (folder / "runs" / "phantom" / run.name / "model" / "open_clip_config.json").is_file()
    assert list((run / "evaluations").glob("*validation.json"))
    assert not (run / "metrics.json").exists(), "metrics.json is for the test split"


def test_evaluate_prints_one_document(trained):
    folder = trained[0]
    code, out, err = radclip("evaluate", "--json", cwd=folder)
    report = strict(out)
    assert code == 0 and report["pool"]["split"] == "test" and report["pool"]["split_hash"]
    assert set(report) >= {"pool", "image_to_text", "text_to_image", "strict", "batchwise"}
    run = Path((folder / "runs" / "latest.txt").read_text().strip())
    assert json.loads((run / "metrics.json").read_text()) == report


def test_evaluate_other_pairs_and_name_the_run(within, capsys):
    run = next((within / "runs" / "phantom").glob("*/model")).parent
    assert cli.main(["evaluate", str(run), "--source", "phantom:40:5", "--split", "train", "--json"]) == 0
    first = strict(capsys.readouterr().out)
    assert first["pool"]["split"] == "train" and first["pool"]["images"] < 40
    assert cli.main(["evaluate", "--source", "phantom:40:5", "--split", "train"]) == 0
    text = capsys.readouterr().out
    assert f"{first['pool']['images']} images" in text and f"{first['image_to_text']['R@1']:.4f}" in text


def test_evaluate_a_split_that_is_not_there(within, capsys):
    assert cli.main(["evaluate", "--split", "dress rehearsal"]) == 2
    assert "test" in one_line(capsys).split("dress rehearsal")[-1]


def test_interrupt_leaves_a_run_that_resumes(tmp_path, monkeypatch, capsys):
    words = ["data.source=phantom:150", "data.sizes=null", "train.batch_size=8", "train.epochs=12", "train.checkpoint_every=2"]
    process = subprocess.Popen([*PROGRAM, "train", *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a background job starts deaf to Ctrl-C
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/phantom/*/checkpoints/last.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-2000:]
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 130 and out == "", err[-2000:]
    last = err.strip().splitlines()[-1]
    assert last.startswith("radclip: stopped") and last.endswith("--resume goes on") and "Traceback" not in err
    assert json.loads(next(tmp_path.glob("runs/phantom/*/run.json")).read_text())["finished"] is False
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *words, "train.epochs=1", "--resume"]) == 2, "another recipe may not go on with the run"
    assert "train.epochs" in capsys.readouterr().err.strip().splitlines()[-1]
    assert cli.main(["train", *words, "--resume"]) == 0
    run, = tmp_path.glob("runs/phantom/*/run.json")
    assert json.loads(run.read_text())["finished"] is True and str(Path("runs") / "phantom" / run.parent.name) in capsys.readouterr().out


def write_pairs(folder):
    "Sixty phantoms as JSONL; three pictures, one of each split, broke off while they were copied. Gives their image_ids."
    from radclip.layouts import write_layout
    from radclip.phantom import phantom_pairs
    write_layout(phantom_pairs(60, seed=3), folder, "jsonl")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    lost = [next(row for row in rows if row["split"] == split) for split in ("train", "validation", "test")]
    for row in lost: (folder / row["image"]).write_bytes((folder / row["image"]).read_bytes()[:300])
    return [row["image_id"] for row in lost]


def test_broken_pictures_stop_no_command(here, capsys):
    train, validation, test = write_pairs(here / "set")
    tiny = ["data.source=jsonl:set", "data.sizes=null", "train.epochs=1", "train.batch_size=16"]
    assert cli.main(["train", "phantom", *tiny, "data.official=true"]) == 0
    out, err = capsys.readouterr()
    assert f"({train}): OSError: image file is truncated" in err and f"({validation}): OSError" in err and "1 more can't be read" in out
    assert cli.main(["evaluate", "--json"]) == 0
    out, err = capsys.readouterr()
    assert strict(out)["pool"]["unreadable"] == 1 and re.search(rf"^radclip: 1 of \d+ images can't be read and are left out: row \d+ \({test}\): OSError", err, re.M)
    assert cli.main(["index", "--source", "jsonl:set", "--out", "found"]) == 0
    out, err = capsys.readouterr()
    assert "found: 57 images of jsonl:set, split all; 3 more can't be read" in out and all(name in err for name in (train, validation, test))
    assert cli.main(["search", "found", "left pleural effusion", "-k", "57", "--json"]) == 0
    assert not {train, validation, test} & {hit["image_id"] for hit in strict(capsys.readouterr().out)}


# ---- index, search, classify

def test_search_by_words(indexed):
    code, out, err = radclip("search", "found", "left pleural effusion", "-k", 3, "--json", cwd=indexed)
    hits = strict(out)
    assert code == 0, err
    assert [h["rank"] for h in hits] == [1, 2, 3] and all(h["captions"] and h["image_id"] for h in hits)
    assert [h["score"] for h in hits] == sorted((h["score"] for h in hits), reverse=True)


def test_search_for_a_person_and_with_a_filter(indexed, monkeypatch, capsys):
    monkeypatch.chdir(indexed)
    assert cli.main(["search", "found", "effusion", "-k", "2"]) == 0
    assert "caption" in capsys.readouterr().out.splitlines()[0]
    assert cli.main(["search", "found", "effusion", "--filter", "split=test", "--json"]) == 0
    hits = strict(capsys.readouterr().out)
    assert hits and all(h["columns"]["split"] == "test" for h in hits)


@pytest.mark.parametrize("words, said", [
    (["--filter", "colour=red"], "colour"),
    (["--filter", "split"], "column=value"),
    (["--to", "sounds"], "texts"),
])
def test_search_with_a_bad_option(words, said, indexed, monkeypatch, capsys):
    monkeypatch.chdir(indexed)
    assert cli.main(["search", "found", "effusion", *words]) == 2
    assert said in one_line(capsys)


def test_search_by_picture_finds_texts_and_images(indexed, picture, monkeypatch, capsys):
    monkeypatch.chdir(indexed)
    assert cli.main(["search", "found", "--image", str(picture), "--to", "texts", "-k", "2", "--json"]) == 0
    assert all(h["text"] for h in strict(capsys.readouterr().out))
    assert cli.main(["search", "found", "--image", str(picture), "-k", "2", "--json"]) == 0
    assert len(strict(capsys.readouterr().out)) == 2


def test_index_of_another_source(within, capsys):
    assert cli.main(["index", "--source", "phantom:30:9", "--out", "other"]) == 0
    assert "30 images" in capsys.readouterr().out
    rows = json.loads(Path("other/index.json").read_text())["sizes"]["images"]
    assert rows == 30


def test_a_model_without_a_run_has_no_pairs_of_its_own(within, capsys):
    folder = next((within / "runs" / "phantom").glob("*/model"))
    assert cli.main(["index", str(folder)]) == 2
    assert "source" in one_line(capsys)


def test_a_closed_pipe_is_no_error(indexed):
    line = " ".join(f"'{w}'" for w in [*PROGRAM, "search", "found", "effusion", "--to", "texts", "-k", "50", "--json"])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line} | true"], cwd=indexed, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("run", [None, "folder", "model"])
def test_classify(run, within, picture, capsys):
    folder = next((within / "runs" / "phantom").glob("*/model")).parent
    which = {None: [], "folder": ["--run", str(folder)], "model": ["--run", str(folder / "model")]}[run]
    labels = ["chest radiograph", "head CT"]
    assert cli.main(["classify", str(picture), str(picture), "--label", labels[0], "--label", labels[1], *which, "--json"]) == 0
    rows = strict(capsys.readouterr().out)
    assert [r["image"] for r in rows] == [str(picture)] * 2 and rows[0]["probabilities"] == rows[1]["probabilities"]
    chances = rows[0]["probabilities"]
    assert set(chances) == set(labels) and abs(sum(chances.values()) - 1) < 1e-5
    assert rows[0]["label"] == max(chances, key=chances.get)


def test_classify_names_the_picture_that_is_broken(here, picture, capsys):
    Path("half.png").write_bytes(picture.read_bytes()[:2000])
    assert cli.main(["classify", "half.png", str(picture), "--run", "phantom", "--label", "a", "--label", "b"]) == 2
    assert one_line(capsys).startswith("radclip: half.png can't be read as an image")


EXPLAIN = ["--run", "phantom", "--text", "Right pleural effusion."]


def test_explain_writes_the_picture_and_says_where(here, picture, capsys):
    from radclip.gradcam import explain
    assert cli.main(["explain", str(picture), *EXPLAIN]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("heat.png: strongest at ") and "trunk.blocks.2" in out and err == "" and Image.open("heat.png").format == "PNG"
    options = ["--minus", "No pleural effusion.", "--method", "layercam", "--layer", "trunk.stem.1", "--layer", "trunk.blocks.2", "--out", "new/map.png", "--json"]
    assert cli.main(["explain", str(picture), *EXPLAIN, *options]) == 0
    told = strict(capsys.readouterr().out)
    assert told["image"] == str(picture) and told["out"] == "new/map.png" and told["layer"] == ["trunk.stem.1", "trunk.blocks.2"] and Path("new/map.png").is_file()
    heat = explain("phantom", picture, "Right pleural effusion.", "layercam", "No pleural effusion.", told["layer"])
    x, y = told["peak"]
    assert heat[int(y * len(heat)), int(x * heat.shape[1])] == heat.max()


@pytest.mark.parametrize("words, said", [
    (["--text", " "], "the text is empty"), (["--method", "gradcamm"], "did you mean 'gradcam'"), (["--method", "rollout"], "vision transformer"),
    (["--layer", "trunk.block"], "trunk.blocks"), (["--out", "heat.txt"], "use .png"), (["--run", "nowhere"], "nowhere"), (["--minus", "Right pleural effusion."], "the same"),
])
def test_explain_says_what_is_wrong_in_one_line_and_writes_nothing(words, said, here, picture, capsys):
    assert cli.main(["explain", str(picture), *EXPLAIN, *words]) == 2
    assert said in one_line(capsys) and not list(here.iterdir())


def test_explain_without_a_run_takes_the_newest(within, picture, capsys):
    assert cli.main(["explain", str(picture), "--text", "effusion", "--out", "newest.png"]) == 0
    assert "newest.png" in capsys.readouterr().out


def test_classify_with_the_packaged_model(here, picture, capsys):
    if not (Path(cli.__file__).parent / "phantom_model").is_dir(): pytest.fail("the packaged model is missing")
    assert cli.main(["classify", str(picture), "--run", "phantom", "--label", "chest radiograph", "--label", "head CT"]) == 0
    assert "chest radiograph" in capsys.readouterr().out
