"""Zero-shot classification: AUROC against scikit-learn, prompts against a hand-made encoder."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import radclip.zeroshot as zeroshot
from radclip.zeroshot import ABSENT, TEMPLATES, auroc, concept_report, label_embeddings, zero_shot, zero_shot_report

WORDS = {"pneumothorax": 0, "effusion": 1, "mass": 2, "no": 3}


@pytest.fixture
def encoder(monkeypatch):
    "A text encoder that knows four words, and a scale of 10."
    def encode(encoder, texts, **kwargs):
        rows = torch.zeros(len(texts), 5)
        for row, text in zip(rows, texts):
            row[4] = 0.1 * len(text.split())
            for word, at in WORDS.items(): row[at] = float(word in text.lower().strip(".").split())
        return F.normalize(rows, dim=1)
    monkeypatch.setattr(zeroshot, "encode_texts", encode)
    return SimpleNamespace(model=SimpleNamespace(logit_scale=torch.tensor(10.0).log()))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auroc_equals_scikit_learn_with_ties(rows):
    roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score
    scores, truth = np.array([s for s, _ in rows], float), np.array([t for _, t in rows])
    if truth.all() or not truth.any(): assert auroc(scores, truth) is None
    else: assert auroc(scores, truth) == pytest.approx(roc_auc_score(truth, scores))


def test_auroc_refuses_what_it_cannot_rank():
    with pytest.raises(ValueError, match="NaN"): auroc([0.1, float("nan")], [True, False])
    with pytest.raises(ValueError, match="one length"): auroc([0.1, 0.2], [True])


def test_labels_are_averaged_over_templates_and_have_length_one(encoder):
    emb = label_embeddings(encoder, ["mass", "effusion"])
    assert emb.shape == (2, 5) and torch.allclose(emb.norm(dim=1), torch.ones(2))
    each = torch.stack([zeroshot.encode_texts(encoder, [t.replace("{}", "mass")])[0] for t in TEMPLATES])
    assert torch.allclose(emb[0], F.normalize(each.mean(0), dim=0))
    assert torch.equal(label_embeddings(encoder, "mass"), label_embeddings(encoder, ["mass"]))


def test_chances_are_a_softmax_at_the_models_scale(encoder):
    images = torch.eye(5)[:3]
    chances = zero_shot(encoder, images, ["pneumothorax", "effusion", "mass"])
    expected = (10 * images @ label_embeddings(encoder, ["pneumothorax", "effusion", "mass"]).T).softmax(1)
    assert torch.allclose(chances, expected) and chances.argmax(1).tolist() == [0, 1, 2]
    assert zero_shot(encoder, images, ["mass"]).tolist() == [[1.0]] * 3


def test_braces_in_a_label_are_only_text(encoder):
    assert label_embeddings(encoder, ["mass {0} {x}"]).isfinite().all()
    with pytest.raises(ValueError, match="no {}"): label_embeddings(encoder, ["mass"], ["a picture"])
    with pytest.raises(ValueError, match="at least one label"): label_embeddings(encoder, [])


def test_report_counts_right_first_choices():
    chances = torch.tensor([[.9, .1, 0], [.2, .7, .1], [.6, .3, .1], [.1, .8, .1]])
    report = json.loads(json.dumps(zero_shot_report(chances, [0, 1, 1, 1], ["a", "b", "c"])))
    assert report["images"] == 4 and report["accuracy"] == 0.75
    assert report["AUROC"] == {"a": 1.0, "b": 1.0, "c": None} and report["macro_AUROC"] == 1.0
    with pytest.raises(ValueError, match="do not fit"): zero_shot_report(chances, [0, 1], ["a", "b", "c"])


def test_concepts_of_unreadable_images_do_not_count():
    from datasets import Image
    from radclip.folder import load_model
    from radclip.phantom import phantom_pairs
    encoder, pairs = load_model("phantom"), phantom_pairs(40)
    names = {cui: "pleural effusion" for cui in {c for row in pairs["concepts"][:] for c in row}}
    stored = pairs.select_columns(["image"]).cast_column("image", Image(decode=False))["image"][:]
    for row in (1, 30): stored[row] = {"bytes": stored[row]["bytes"][:60], "path": None}
    broken = pairs.remove_columns("image").add_column("image", stored, feature=Image(decode=False)).cast_column("image", Image())
    with pytest.warns(UserWarning, match=r"2 of 40 images can't be read and are left out: row 1 \(.*row 30 \("): rows = concept_report(encoder, broken, names, least=3)
    assert rows == concept_report(encoder, pairs.select([row for row in range(40) if row not in (1, 30)]), names, least=3)
    with pytest.raises(ValueError, match="image 1 .* can't be read"): zero_shot(encoder, broken, ["mass", "effusion"])  # a row for each image


def test_concepts_are_asked_one_by_one(encoder):
    names = {"C0032326": "pneumothorax", "C0032227": "effusion", "C0577559": "mass"}
    held = [["C0032326"], ["C0032326", "C0032227"], [], ["C0032227"], [], []]
    images = torch.stack([sum((torch.eye(5)[i] for i, cui in enumerate(names) if cui in row), 0.1 * torch.ones(5)) for row in held])
    rows = concept_report(encoder, {"concepts": held}, names, F.normalize(images, dim=1), least=2)
    assert {r["name"]: (r["images"], r["AUROC"]) for r in rows} == {"pneumothorax": (2, 1.0), "effusion": (2, 1.0)}
    assert concept_report(encoder, {"concepts": held}, names, images, least=2, absent=ABSENT)
    with pytest.raises(ValueError, match="none of the 3 concepts"): concept_report(encoder, {"concepts": held}, names, images)
