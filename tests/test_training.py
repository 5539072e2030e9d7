"`fit`: resuming after SIGKILL, determinism, zero-shot runs, frozen towers, refusals, stopping."
import json
import math
import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from radclip import training
from radclip.contrastive import build_contrastive, encode_by_length, padding_id
from radclip.data import prepare_pairs
from radclip.recipe import Recipe, find_run
from radclip.training import MetricsFile, fit, pick_precision, rate_factor, save_checkpoint

MODEL = dict(kind="phantom", image_size=32, embed_dim=16, text_width=32, text_layers=1, text_heads=2, vocab_size=300, context_length=24,
             text_pool="mean", text_dropout=0.2)  # mean: a BERT, which has dropout


def tiny(n=120, model=None, loss="clip", name="tiny", **train):
    return Recipe(name=name, data=dict(source=f"phantom:{n}"), model=MODEL | (model or {}), loss=dict(name=loss),
                  train=dict(epochs=2, batch_size=16, lr=1e-3) | train)


def losses(run): return {int(r["step"]): r["loss"] for r in run.metrics() if "loss" in r}


def figures(run): return [{k: v for k, v in r.items() if k != "seconds"} for r in run.metrics()]


def weights(run): return torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)["model"]


CHILD = """
import sys, time
from radclip import training
from radclip.recipe import Recipe
step = training.take_step
def slow(engine): step(engine); time.sleep(0.15)  # so that the kill comes in the middle
training.take_step = slow
training.fit(Recipe(**eval(sys.argv[1])), out=sys.argv[2], quiet=True)
"""


@pytest.mark.parametrize("more", [dict(checkpoint_every=2), dict(checkpoint_every=3, micro_batch=5, accumulate=2, ema=0.9)])
def test_resume_after_sigkill_equals_an_uninterrupted_run(tmp_path, more):
    recipe = tiny(epochs=3, augment={}, **more)
    whole = fit(recipe, out=tmp_path / "whole", quiet=True)
    child = subprocess.Popen([sys.executable, "-c", CHILD, repr(recipe.model_dump()), str(tmp_path / "killed")])
    def rows():
        files = list((tmp_path / "killed").glob("tiny/*/metrics.csv"))
        return len(files[0].read_text().splitlines()) - 2 if files else -1
    try:
        end = time.time() + 900  # only a hang reaches this
        while rows() < 5 and child.poll() is None and time.time() < end: time.sleep(0.02)
    finally: child.send_signal(signal.SIGKILL); child.wait()
    killed = find_run(out=tmp_path / "killed")
    assert not killed.finished and 5 <= rows() < len(losses(whole))
    resumed = fit(recipe, out=tmp_path / "killed", resume=True, quiet=True)
    assert resumed.folder == killed.folder and resumed.finished
    assert "goes on at step" in (resumed.folder / "log.txt").read_text()
    assert figures(resumed) == figures(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed).values(), weights(whole).values()))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    "Losses of ten steps in two epochs."
    return losses(fit(tiny(checkpoint_every=1), out=tmp_path_factory.mktemp("whole"), quiet=True))


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 9, 10])
def test_resume_from_any_step(tmp_path, monkeypatch, uninterrupted, stop):
    "Five steps an epoch: interrupted within one, at its end and right after."
    class Stop(Exception): pass
    save = training.Book.save
    def save_and_stop(book):
        save(book)
        if book.engine.step == stop: raise Stop
    monkeypatch.setattr(training.Book, "save", save_and_stop)
    with pytest.raises(Stop): fit(tiny(checkpoint_every=1), out=tmp_path, quiet=True)
    monkeypatch.setattr(training.Book, "save", save)
    (half := find_run(out=tmp_path).folder / ".run.json.41-7").write_text("{")  # as a kill in the middle of a write leaves it
    assert len(uninterrupted) == 10 and losses(fit(tiny(checkpoint_every=1), out=tmp_path, resume=True, quiet=True)) == uninterrupted
    assert not half.exists()


def test_ctrl_c_stops_and_the_next_one_is_heard(tmp_path, monkeypatch, uninterrupted):
    step, handler = training.take_step, signal.getsignal(signal.SIGINT)
    def press(engine):
        step(engine)
        if engine.step == 7: raise KeyboardInterrupt
    monkeypatch.setattr(training, "take_step", press)
    with pytest.raises(KeyboardInterrupt): fit(tiny(checkpoint_every=1), out=tmp_path, quiet=True)
    assert signal.getsignal(signal.SIGINT) == handler and "interrupted at step 7 of 10" in (find_run(out=tmp_path).folder / "log.txt").read_text()
    monkeypatch.setattr(training, "take_step", step)
    assert losses(fit(tiny(checkpoint_every=1), out=tmp_path, resume=True, quiet=True)) == uninterrupted


def test_a_changed_recipe_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_finish", lambda book: book.run)  # a run that never ends well
    fit(tiny(epochs=1), out=tmp_path, quiet=True)
    with pytest.raises(ValueError, match=r"train\.lr was 0\.001 and is 0\.01.*train\.lr=0\.001"): fit(tiny(epochs=1, lr=0.01), out=tmp_path, resume=True, quiet=True)
    with pytest.raises(ValueError, match="data.source"): fit(tiny(n=130, epochs=1), out=tmp_path, resume=True, quiet=True)
    with pytest.raises(FileNotFoundError, match="no unfinished run of other"): fit(tiny(name="other"), out=tmp_path, resume=True, quiet=True)


def test_other_pairs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_finish", lambda book: book.run)
    run = fit(tiny(epochs=1), out=tmp_path, quiet=True)
    run.update(split_hash="0" * 16)
    with pytest.raises(ValueError, match="other pairs"): fit(tiny(epochs=1), out=tmp_path, resume=True, quiet=True)


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(tmp_path):
    a, b = (fit(tiny(augment={}), out=tmp_path, quiet=True) for _ in range(2))
    assert a.folder != b.folder and figures(a) == figures(b)
    assert losses(fit(tiny(augment={}, seed=1), out=tmp_path, quiet=True)) != losses(a)


def test_the_gradient_cache_changes_no_loss(tmp_path):
    "Without dropout and with BatchNorm at rest the pieces make no difference: the whole run is that of the big batch."
    still = dict(model=dict(text_dropout=0.0), freeze=dict(image="projection"), cache_frozen=False)
    a, b = (losses(fit(tiny(**still, micro_batch=m), out=tmp_path, quiet=True)) for m in (None, 5))
    assert len(a) == 10 and all(math.isclose(a[s], b[s], rel_tol=1e-4) for s in a)


def test_the_gradient_cache_warns_of_batchnorm(tmp_path):
    run = fit(tiny(epochs=1, micro_batch=5), out=tmp_path, quiet=True)
    assert "BatchNorm sees micro-batches" in (run.folder / "log.txt").read_text()


@pytest.mark.parametrize("pool", ["eos", "mean", "cls"])
def test_leaving_padding_out_changes_no_embedding(pool):
    _, task, data = build_contrastive(tiny(model=dict(text_pool=pool, context_length=96)), say=lambda line: None)
    tokens = data.train.tokens[:64]
    assert padding_id(task.model) == 0 and (tokens == 0).any()
    task.model.eval()
    with torch.no_grad(): short, long = encode_by_length(task.model, tokens), task.model.encode_text(tokens)
    assert torch.allclose(short, long, atol=1e-5)


def test_zero_epochs_is_the_untrained_model(tmp_path):
    run = fit(tiny(epochs=0), out=tmp_path, quiet=True)
    trained = fit(tiny(epochs=1), out=tmp_path, quiet=True)
    assert run.finished and len(run.metrics()) == 1 and run.info["steps"] == 0
    assert figures(run)[0].items() <= figures(trained)[0].items() | {("epoch", 0.0)}
    assert (run.model_folder / "open_clip_config.json").exists()


def test_run_directory_is_complete(tmp_path):
    run = fit(tiny(), out=tmp_path, quiet=True)
    assert {"recipe.yaml", "run.json", "metrics.csv", "log.txt", "checkpoints", "model", "embeddings", "evaluations", "figures"} <= set(os.listdir(run.folder))
    info = json.loads((run.folder / "run.json").read_text())
    assert info["finished"] and info["seed"] == 0 and len(info["split_hash"]) == 16 and info["stand_ins"] == []
    assert info["parameters"]["total"] >= info["parameters"]["training"] > 0 and info["seconds"] > 0 and "torch" in info["versions"]
    assert find_run(out=tmp_path).folder == run.folder.resolve()
    assert not [f for f in run.folder.rglob("*") if f.name.startswith(".")]  # nothing half-written left behind


def test_model_folder_is_the_best_epoch(tmp_path):
    "A report that likes the second validation best."
    from radclip.model import load_model
    seen = []
    def report(*_):
        value = [0.1, 0.9, 0.5][len(seen)]
        seen.append(value)
        return {side: {"R@1": value} for side in ("image_to_text", "text_to_image")}
    run = fit(tiny(), report=report, out=tmp_path, quiet=True)
    assert run.info["best"] == {"step": 5, "figure": "recall", "value": 0.9} and run.info["steps"] == 10
    best = torch.load(run.folder / "checkpoints" / "best.ckpt", weights_only=True)["model"]
    saved = load_model(run.model_folder).model.state_dict()
    assert all(torch.equal(saved[k], best[k]) for k in best) and not all(torch.equal(best[k], v) for k, v in weights(run).items())


def test_early_stopping_and_time_budget(tmp_path):
    same = lambda *_: {side: {"R@1": 0.5} for side in ("image_to_text", "text_to_image")}
    assert fit(tiny(epochs=9, patience=2), report=same, out=tmp_path, quiet=True).info["steps"] == 10
    run = fit(tiny(epochs=9, max_minutes=1e-6), out=tmp_path, quiet=True)
    assert run.info["steps"] == 1 and run.finished and "minutes are over" in (run.folder / "log.txt").read_text()
    with pytest.raises(ValueError, match="no figure 'recal'.*recall"): fit(tiny(monitor="recal"), out=tmp_path, quiet=True)


def test_accumulation_steps_once_for_several_batches(tmp_path):
    run = fit(tiny(epochs=2, accumulate=2), out=tmp_path, quiet=True)  # 5 batches an epoch: 2 + 2 + 1
    assert run.info["steps"] == 6


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path, monkeypatch):
    step = training.take_step
    def spoil(engine):
        step(engine)
        if engine.step == 3:
            with torch.no_grad(): engine.model.logit_scale.fill_(math.nan)
    monkeypatch.setattr(training, "take_step", spoil)
    with pytest.raises(ValueError, match=r"step 4: the loss is nan.*nonfinite.ckpt"): fit(tiny(), out=tmp_path, quiet=True)
    run = find_run(out=tmp_path)
    assert not run.finished and torch.load(run.folder / "checkpoints" / "nonfinite.ckpt", weights_only=True)["step"] == 3


def test_the_temperature_is_clamped(tmp_path):
    run = fit(tiny(model=dict(init_logit_scale=6.0)), out=tmp_path, quiet=True)
    assert all(r["logit_scale"] <= 100.001 for r in run.metrics() if "loss" in r)


def test_a_handful_of_pairs_is_learnt_by_heart(tmp_path):
    recipe = tiny(n=40, epochs=150, batch_size=64, lr=3e-3, model=dict(text_dropout=0.0), validate_every=150, loss="multi_positive")
    assert losses(fit(recipe, out=tmp_path, quiet=True))[150] < 0.1


@pytest.mark.parametrize("freeze", [dict(image="projection"), dict(text="projection"), dict(image="all", text="projection"), dict(image=0.3)])
def test_frozen_towers_encoded_once_give_the_same_losses(tmp_path, freeze):
    "Stored in 16 bits, so equal to three digits; with as many views as epochs the augmentation is the same too."
    make = lambda kept: fit(tiny(freeze=freeze, augment={}, views=2, cache_frozen=kept), out=tmp_path, quiet=True)
    stored, run = make(True), make(False)
    assert "ran once" in (stored.folder / "log.txt").read_text() and "ran once" not in (run.folder / "log.txt").read_text()
    a, b = losses(stored), losses(run)
    assert a.keys() == b.keys() and all(math.isclose(a[s], b[s], rel_tol=5e-3) for s in a)
    first, again = (r.metrics()[0]["val_recall"] for r in (stored, run))
    assert abs(first - again) < 0.1


def test_mined_negatives_join_the_batch(tmp_path):
    plain = tiny()
    pairs = prepare_pairs(plain.data)
    ids = [i for i, s in zip(pairs["image_id"], pairs["split"]) if s == "train"]
    pq.write_table(pa.table({"image_id": ids[:50], "negatives": [[ids[(i + 1) % 50], "elsewhere"] for i in range(50)]}), tmp_path / "mined.parquet")
    recipe = tiny(negatives=str(tmp_path / "mined.parquet"), negatives_per_image=2)
    _, _, data = build_contrastive(recipe, say=lambda line: None)
    batch = next(iter(data.loader(0)))
    assert len(batch["extra_text"]) == 32 and batch["extra_tokens"].shape[0] == 32
    texts = [data.train.texts[i] for i in batch["extra_text"].tolist()]
    train = [c for c, s in zip(pairs["captions"], pairs["split"]) if s == "train"]
    for row, drawn in zip(batch["row"].tolist(), zip(texts[::2], texts[1::2])):
        if row < 50: assert all(t in train[(row + 1) % 50] for t in drawn)
    assert losses(fit(recipe, out=tmp_path, quiet=True))[1] > losses(fit(plain, out=tmp_path, quiet=True))[1]  # more wrong answers to choose from
    with pytest.raises(ValueError, match="names none"):
        pq.write_table(pa.table({"image_id": ["x"], "negatives": [["y"]]}), tmp_path / "mined.parquet")
        build_contrastive(recipe, say=lambda line: None)


def test_other_texts_take_the_place_of_some_captions_in_training_only():
    recipe = tiny(n=300, also={"short_caption": 0.3, "report_impression": 0.2})
    pairs = prepare_pairs(recipe.data)
    rows = [i for i, split in enumerate(pairs["split"]) if split == "train"]
    said = {name: [pairs[name][i] for i in rows] for name in ("captions", "short_caption", "report_impression")}
    _, _, data = build_contrastive(recipe, say=lambda line: None)
    seen, first = {"captions": 0, "short_caption": 0, "report_impression": 0}, []
    for epoch in range(20):
        for batch in data.loader(epoch):
            for row, text in zip(batch["row"].tolist(), batch["text"].tolist()):
                text = data.train.texts[text]
                seen[next(name for name in seen if text in said[name][row])] += 1  # its own row's, whatever the column
            assert torch.equal(batch["tokens"], data.train.tokens[batch["text"]])
            first.append(batch["text"]) if epoch == 0 else None
    shares = {name: count / sum(seen.values()) for name, count in seen.items()}
    assert abs(shares["short_caption"] - 0.3) < 0.03 and abs(shares["report_impression"] - 0.2) < 0.03
    assert all(torch.equal(a, b["text"]) for a, b in zip(first, data.loader(0)))  # seed, epoch and row decide
    texts, _ = data.validation.all_texts()
    assert {data.validation.texts[i] for i in texts.tolist()} == {c for c, s in zip(pairs["captions"], pairs["split"]) if s == "validation" for c in c}


@pytest.mark.parametrize("also, why", [({"titel": 0.1}, "no column 'titel'"), ({"short_caption": 0.6, "modality": 0.5}, "more than 1")])
def test_other_texts_that_are_not_there_or_too_many_are_refused(also, why):
    with pytest.raises(ValueError, match=why):
        build_contrastive(tiny(also=also), say=lambda line: None)


def test_a_model_that_learns_nothing_is_told(tmp_path):
    run = fit(tiny(lr=1e-12, model=dict(init_logit_scale=0.0, text_dropout=0.0)), out=tmp_path, quiet=True)
    assert "sits at ln(batch) = 2.773" in (run.folder / "log.txt").read_text()


def test_every_validation_but_the_first_says_the_mean_loss_of_its_epoch(tmp_path):
    "One step an epoch too: there the loss is not yet in metrics.csv when the line is written."
    for size, steps in ((64, 1), (16, 5)):
        run = fit(tiny(epochs=3, batch_size=size), out=tmp_path, quiet=True)
        lines = [line.split(" · ") for line in (run.folder / "log.txt").read_text().splitlines() if " · " in line]
        lost = losses(run)
        assert len(lost) == 3 * steps and lines[0][1] == "untrained"
        means = [sum(lost[s] for s in range(k - steps + 1, k + 1)) / steps for k in (steps, 2 * steps, 3 * steps)]
        assert [float(line[1].removeprefix("loss ")) for line in lines[1:]] == pytest.approx(means, abs=1e-4)


def test_a_resumed_run_never_calls_a_trained_model_untrained(tmp_path, monkeypatch):
    save = training.Book.save
    def save_and_stop(book):
        save(book)
        if book.engine.step == 1: raise KeyboardInterrupt
    monkeypatch.setattr(training.Book, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt): fit(tiny(batch_size=64), out=tmp_path, quiet=True)
    monkeypatch.setattr(training.Book, "save", save)
    run = fit(tiny(batch_size=64), out=tmp_path, resume=True, quiet=True)
    assert (run.folder / "log.txt").read_text().count("untrained") == 1


def test_a_validation_of_a_few_images_is_told(tmp_path):
    few = tiny(epochs=1)
    few.data.official, few.data.sizes = False, dict(train=64, validation=3)
    assert "validation has only 3 images, less than one batch of 32: guessing alone finds 1 in 3" in (fit(few, out=tmp_path, quiet=True).folder / "log.txt").read_text()
    enough = tiny(epochs=1)
    enough.data.official, enough.data.sizes = False, dict(train=64, validation=32)
    assert "validation has only" not in (fit(enough, out=tmp_path, quiet=True).folder / "log.txt").read_text()


def test_learning_rate_goes_up_and_down():
    rates = [rate_factor(s, 100, 0.1) for s in range(100)]
    assert max(rates) == pytest.approx(1, abs=0.01) and rates[0] < 0.2 and rates[-1] < 0.01
    assert all(a < b for a, b in zip(rates[:10], rates[1:10])) and all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert [rate_factor(s, 100, 10) for s in range(100)] == rates
    assert rate_factor(99, 100, 0.1, "constant") == 1
    assert rate_factor(10, 110, 10, "linear") == 1 and abs(rate_factor(60, 110, 10, "linear") - 0.5) < 1e-9 and rate_factor(110, 110, 10, "linear") == 0


def test_a_checkpoint_that_fails_half_way_leaves_the_one_before(tmp_path, monkeypatch):
    file = tmp_path / "last.ckpt"
    save_checkpoint(dict(step=1), file)
    def half(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError): save_checkpoint(dict(step=2), file)
    assert torch.load(file, weights_only=True) == dict(step=1)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv", ["step", "loss"])
    for step in range(4): file.add(dict(step=step, loss=step / 3))
    with open(tmp_path / "metrics.csv", "a") as out: out.write("4")  # killed while writing
    MetricsFile(tmp_path / "metrics.csv", ["step", "loss"], upto=2).add(dict(step=3, loss=9.0))
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n0,0\n1,0.3333333\n2,0.6666667\n3,9\n"


def test_precision_falls_back_and_says_so():
    said = []
    assert pick_precision("fp16", torch.device("cpu"), said.append) == "32-true" and "no fp16" in said[0]
    assert pick_precision("bf16", torch.device("cpu"), said.append) == "bf16-mixed" and len(said) == 1


def test_bf16_gives_nearly_the_same_losses(tmp_path):
    still = dict(text_dropout=0.0)
    a, b = (losses(fit(tiny(epochs=1, model=still, precision=p), out=tmp_path, quiet=True)) for p in ("fp32", "bf16"))
    assert a != b and all(math.isclose(a[s], b[s], rel_tol=0.05) for s in a)


def test_an_error_before_training_leaves_no_run(tmp_path):
    with pytest.raises(ValueError): fit(tiny(freeze=dict(image=2.5), n=8), out=tmp_path / "runs", quiet=True)
    with pytest.raises(ValueError, match="no recipe"): fit("phantm", out=tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs").exists()
