"""A captioner as a task of `fit`: its losses against transformers' own, its recipes, its runs."""
import math

import numpy as np
import pytest
import torch

from radclip.blip import build_captioner, caption_batch, caption_ids, load_captioner
from radclip.captioning import (CaptionRecipe, CaptionTask, build_captioning, caption_loss, choose_concepts, concept_loss, concept_targets,
                                start_at_frequency, word_losses)
from radclip.data import load_pairs
from radclip.generation import caption_images
from radclip.loading import PairsDataset, PixelCache
from radclip.recipe import list_recipes, load_recipe
from radclip.training import fit

TINY = {"vision_from": "phantom", "freeze_vision": "trunk", "vision_width": 32, "vision_heads": 2, "text_width": 32, "text_heads": 2,
        "vision_layers": 1, "text_layers": 1, "max_length": 40}
quiet = pytest.mark.filterwarnings("ignore:validation has only")


def recipe(train=None, **more):
    train = {"epochs": 2, "batch_size": 10, "lr": 3e-3, "schedule": "linear"} | (train or {})
    return CaptionRecipe(**{"name": "tiny", "data": {"source": "phantom:60"}, "model": TINY, "train": train, "caption": {"concept_weight": 0.1, "concept_min": 2}} | more)


def losses(run): return [row["loss"] for row in run.metrics() if "loss" in row]


@pytest.fixture(scope="module")
def small():
    "A captioner of random weights, and pixels and ids of twelve pairs."
    pairs = load_pairs("phantom:60", "train").select(range(12))
    torch.manual_seed(0)
    captions = [texts[0] for texts in pairs["captions"]]
    captioner = build_captioner(TINY | {"concepts": ["a", "b", "c"]}, captions)
    captioner.model.eval()
    return captioner, pairs, captions


# ---- losses

@torch.no_grad()
def test_loss_per_word_is_that_of_transformers(small):
    captioner, pairs, captions = small
    pixels, ids = torch.stack([captioner.preprocess(image) for image in pairs["image"]]), caption_ids(captioner, captions)
    embeds = captioner.model.vision_model(pixel_values=pixels).last_hidden_state
    ours = word_losses(captioner.model, embeds, ids, captioner.tokenizer.pad_token_id)
    for row in range(12):
        batch = caption_batch(ids[row:row + 1], captioner.tokenizer.pad_token_id)
        logits = captioner.model.text_decoder(input_ids=batch["input_ids"], encoder_hidden_states=embeds[row:row + 1]).logits[0, :-1]
        theirs = -logits.log_softmax(-1).gather(1, batch["labels"][0, 1:, None]).sum()
        assert ours[row].item() == pytest.approx(theirs.item(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 5, 40])
def test_reading_captions_of_like_length_together_changes_nothing(small, groups):
    captioner, pairs, captions = small
    ids, pad = caption_ids(captioner, captions), captioner.tokenizer.pad_token_id
    embeds = torch.randn(12, 65, 32)
    assert torch.allclose(word_losses(captioner.model, embeds, ids, pad, groups), word_losses(captioner.model, embeds, ids, pad, 1), rtol=1e-5)


def test_loss_of_a_set_is_over_words_and_not_over_batches(small, tmp_path):
    captioner, pairs, captions = small
    data = PairsDataset(pairs, PixelCache.build(pairs, captioner.preprocess, tmp_path), lambda texts: caption_ids(captioner, texts), train=False)
    whole, parts = caption_loss(captioner, data), caption_loss(captioner, data, batch_size=5)
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-5) and whole["perplexity"] == pytest.approx(math.exp(whole["loss"]))
    batches = [data.__getitems__(list(range(start, min(start + 5, 12)))) for start in (0, 5, 10)]
    with torch.no_grad():
        each = [(word_losses(captioner.model, captioner.model.vision_model(pixel_values=b["pixels"]).last_hidden_state, b["tokens"], 0).sum().item(),
                 int((b["tokens"][:, 1:] != 0).sum())) for b in batches]
    assert whole["loss"] == pytest.approx(sum(n for n, _ in each) / sum(w for _, w in each), rel=1e-5)
    assert abs(whole["loss"] - np.mean([n / w for n, w in each])) > 1e-6  # the naive mean is another number


def test_concept_loss_is_binary_cross_entropy_of_the_strongest_cell(small):
    captioner = small[0]
    embeds, targets = torch.randn(4, 65, 32), torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]])
    head = captioner.model.concept_head
    logits = torch.stack([head(embeds[:, cell]) for cell in range(1, 65)]).max(0).values
    want = -(targets * logits.sigmoid().log() + (1 - targets) * (1 - logits.sigmoid()).log()).sum()
    assert concept_loss(captioner.model, embeds, targets).item() == pytest.approx(want.item(), rel=1e-4)


def test_concepts_are_those_that_are_frequent_enough():
    rows = [["b", "a"], ["b", "b"], ["c"], []]
    assert choose_concepts(rows, 1, "x") == ["a", "b", "c"] and choose_concepts(rows, 2, "x") == ["b"]
    with pytest.raises(ValueError, match="no concept has 3 training images in x"): choose_concepts(rows, 3, "x")
    targets = concept_targets(rows, ["a", "b"])
    assert targets.tolist() == [[1, 1], [0, 1], [0, 0], [0, 0]]
    head = torch.nn.Linear(2, 2)
    start_at_frequency(head, targets)
    assert torch.allclose(head.bias.sigmoid(), torch.tensor([0.25, 0.5]))


def test_pieces_of_a_batch_have_the_gradients_of_the_whole():
    gradients = []
    for piece in (None, 3):
        config = recipe({"micro_batch": piece})
        _, task, data = build_captioning(config, print)
        task.prepare(data, "cpu", lambda line: None)
        task.model.eval()
        total = task.backward(next(iter(data.loader(0))), lambda loss: loss.backward())
        gradients.append((total, {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}))
    (a, whole), (b, parts) = gradients
    assert a == pytest.approx(b, rel=1e-5) and whole.keys() == parts.keys() and "concept_head.weight" in whole
    assert all(torch.allclose(whole[name], parts[name], rtol=1e-3, atol=1e-6) for name in whole)


# ---- recipes

@pytest.mark.parametrize("name", [name for name in list_recipes() if load_recipe(name, stand_in=None).task == "caption"])
def test_packaged_recipe_takes_a_step_with_its_stand_in(name):
    wanted = load_recipe(name, "data.source=phantom:60", "data.sizes=null", "data.columns={}", "train.batch_size=6", "caption.concept_min=2",
                         stand_in=True if name != "phantom-blip" else None)
    wanted, task, data = build_captioning(wanted)
    task.prepare(data, "cpu", lambda line: None)
    assert 5 < task.backward(next(iter(data.loader(0))), lambda loss: loss.backward()) < 9  # about ln(vocabulary)


@pytest.mark.parametrize("settings, why", [
    ({"train": {"freeze": {"image": "all"}}}, "train.freeze is for dual encoders.*model.freeze_vision"),
    ({"train": {"also": {"title": 0.5}}}, "train.also is for dual encoders"),
    ({"train": {"layer_decay": 0.5}}, "train.layer_decay is for dual encoders"),
    ({"loss": {"name": "siglip"}}, "loss is for dual encoders"),
    ({"model": {"kind": "auto", "name": "x/y"}}, "kind auto only writes"),
])
def test_settings_that_a_captioner_ignores_are_refused(tmp_path, settings, why):
    import yaml
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"task": "caption", "data": "phantom:60", **settings}))
    with pytest.raises(ValueError, match=why) as error: load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(error.value)


def test_a_mistyped_key_of_a_caption_recipe_is_named():
    with pytest.raises(ValueError, match="did you mean caption.concept_weight"): load_recipe("phantom-blip", "caption.concept_wieght=1")
    with pytest.raises(ValueError, match="did you mean generate.beams"): load_recipe("phantom-blip", "generate.beam=2")


def test_no_frequent_concept_is_told():
    with pytest.raises(ValueError, match="concept_weight: no concept has 1000"): build_captioning(recipe(caption={"concept_weight": 0.1, "concept_min": 1000}))


# ---- runs

@quiet
def test_a_run_is_complete_and_its_model_is_the_best(tmp_path):
    run = fit(recipe(), out=tmp_path, quiet=True)
    assert run.info["finished"] and run.info["parameters"]["training"] < run.info["parameters"]["total"]  # the CNN stays as it is
    rows = run.metrics()
    assert {"val_loss", "val_perplexity"} < set(rows[0]) and losses(run)[-1] < losses(run)[0]
    assert run.info["best"]["figure"] == "loss" and run.info["best"]["value"] == pytest.approx(min(row["val_loss"] for row in rows if "val_loss" in row), rel=1e-6)
    captioner = load_captioner(run.trained_model)
    assert len(captioner.config.concepts) == captioner.model.concept_head.out_features
    assert len(caption_images(captioner, load_pairs("phantom:60", "test"), {"beams": 1, "max_new_tokens": 5})) > 0


@quiet
@pytest.mark.parametrize("more", [{}, {"ema": 0.9, "micro_batch": 4}])
def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path, monkeypatch, more):
    config = recipe({"epochs": 2, "checkpoint_every": 1} | more)
    whole = fit(config, out=tmp_path / "a", quiet=True)
    step = CaptionTask.after_step
    seen = []
    def stop(task):
        seen.append(step(task))
        if len(seen) == 6: raise RuntimeError("pulled the plug")
    monkeypatch.setattr(CaptionTask, "after_step", stop)
    with pytest.raises(RuntimeError, match="plug"): fit(config, out=tmp_path / "b", quiet=True)
    monkeypatch.setattr(CaptionTask, "after_step", step)
    again = fit(config, out=tmp_path / "b", resume=True, quiet=True)
    assert losses(again) == losses(whole)


@quiet
def test_stored_maps_give_the_same_losses_as_running_the_cnn(tmp_path):
    runs = [fit(recipe({"cache_frozen": stored}), out=tmp_path / str(stored), quiet=True) for stored in (True, False)]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=5e-3)  # stored in half precision
    assert "the frozen CNN ran once" in (runs[0].folder / "log.txt").read_text() and "ran once" not in (runs[1].folder / "log.txt").read_text()


@quiet
def test_a_cnn_that_trains_is_not_stored(tmp_path):
    run = fit(recipe({"epochs": 1}, model=TINY | {"freeze_vision": "none"}), out=tmp_path, quiet=True)
    assert "ran once" not in (run.folder / "log.txt").read_text() and run.info["parameters"]["training"] == run.info["parameters"]["total"]


def test_pairs_from_a_folder_of_save_to_disk(tmp_path):
    load_pairs("phantom:60").save_to_disk(tmp_path / "pairs")
    _, task, data = build_captioning(recipe(data={"source": f"disk:{tmp_path / 'pairs'}"}))
    assert len(data.train) == len(load_pairs("phantom:60", "train")) and data.validation is not None
