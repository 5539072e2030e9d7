"""Counted words: against scikit-learn, at the edges, and as a tower of open_clip."""
import copy
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders import CAPTIONS, embeddings
from radclip import ngrams
from radclip.model import as_config, build_model, encode_texts, fingerprint, load_model, save_model
from radclip.phantom import phantom_pairs

MODEL = {"kind": "timm", "image_tower": "test_resnet", "image_size": 160, "text_tower": "ngrams", "text_width": 16, "context_length": 48}


@pytest.fixture(scope="module")
def captions(): return ngrams.distinct(texts[0] for texts in phantom_pairs(300, seed=3, size=32)["captions"])


@pytest.fixture(scope="module")
def words(captions): return ngrams.train_words(captions)


@pytest.fixture(scope="module")
def tokens(words, captions): return read(words, captions)


@pytest.fixture(scope="module")
def tower(words, captions): return ngrams.fit_ngrams(words, captions, 20)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return build_model(MODEL, CAPTIONS)


def read(words, captions, length=64):
    return words(list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


@torch.no_grad()
def vectors(tower, tokens): return tower(tokens).last_hidden_state[:, 0]


def grams(words):
    "The same words and pairs by plain Python, for scikit-learn."
    def split(caption):
        said = words.convert_ids_to_tokens(words(caption).input_ids)
        return [w for w in said if w != "[UNK]"] + [f"{a} {b}" for a, b in zip(said, said[1:]) if "[UNK]" not in (a, b)]
    return split


# ---- against scikit-learn

def sklearn_rows(words, captions):
    from sklearn.feature_extraction.text import TfidfVectorizer
    vectorizer = TfidfVectorizer(analyzer=grams(words), sublinear_tf=True, min_df=2)
    return vectorizer, vectorizer.fit_transform(captions)


def test_weights_are_those_of_scikit_learn(words, captions, tokens, tower):
    vectorizer, theirs = sklearn_rows(words, captions)
    row, column, count = ngrams.count_ngrams(tokens, tower.pairs, len(words))
    weight = ngrams.tfidf(row, column, count, tower.idf)
    names = words.convert_ids_to_tokens(list(range(len(words))))
    names += [f"{names[code // len(words)]} {names[code % len(words)]}" for code in tower.pairs.tolist()]
    assert set(vectorizer.vocabulary_) == set(names[len(ngrams.SPECIAL):])
    ours = np.zeros(theirs.shape)
    ours[row, [vectorizer.vocabulary_[names[c]] for c in column]] = weight
    np.testing.assert_allclose(ours, theirs.toarray(), atol=1e-6)


def test_directions_span_what_scikit_learns_do(words, captions, tokens, tower):
    from sklearn.decomposition import TruncatedSVD
    theirs = TruncatedSVD(20, algorithm="arpack", random_state=0).fit_transform(sklearn_rows(words, captions)[1])
    ours = (vectors(tower, tokens) + tower.centre).double().numpy()
    ours *= np.linalg.norm(theirs) / np.linalg.norm(ours)  # the tower's are scaled
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=2e-3)  # no sign or turn of the directions matters
    assert np.abs(theirs @ theirs.T).max() > 0.3


def test_vectors_of_the_training_captions_are_centred_and_of_unit_size(tower, tokens):
    z = vectors(tower, tokens)
    assert z.mean(0).abs().max() < 1e-4 and 0.8 < z.std() < 1.1


# ---- the edges

@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), min_size=12, max_size=12), min_size=1, max_size=6))
def test_counts_are_those_of_plain_python(rows):
    ids, vocab = torch.tensor(rows), 31
    pairs = torch.tensor(sorted({a * vocab + b for a in range(5, 31, 3) for b in range(5, 31, 2)}))
    want = {}
    for i, said in enumerate(rows):
        for w in said:
            if w >= 5: want[i, w] = want.get((i, w), 0) + 1
        for a, b in zip(said, said[1:]):
            if a >= 5 and b >= 5 and a * vocab + b in pairs.tolist():
                key = i, vocab + pairs.tolist().index(a * vocab + b)
                want[key] = want.get(key, 0) + 1
    row, column, count = ngrams.count_ngrams(ids, pairs, vocab)
    assert {(int(r), int(c)): int(n) for r, c, n in zip(row, column, count)} == want and (row.diff() >= 0).all()


def test_a_caption_without_a_known_word_is_the_centre_and_disturbs_no_other(words, tower, captions):
    some = ["", captions[0], "zzz qqq", "?!", captions[1], ""]
    z = vectors(tower, read(words, some))
    assert z.isfinite().all() and all(torch.equal(z[i], -tower.centre) for i in (0, 2, 3, 5))
    assert torch.allclose(z[[1, 4]], vectors(tower, read(words, captions[:2])), atol=1e-6)
    assert torch.equal(vectors(tower, read(words, ["", "zzz"])), -tower.centre.expand(2, -1))  # not one entry in the batch


def test_padding_changes_nothing_and_what_is_beyond_the_context_is_not_read(words, tower, captions):
    assert torch.allclose(vectors(tower, read(words, captions[:9], 64)), vectors(tower, read(words, captions[:9], 200)), atol=1e-6)
    long = captions[0] + " unheard" * 80 + " " + captions[1]
    assert torch.equal(vectors(tower, read(words, [long])), vectors(tower, read(words, [captions[0]])))


def test_order_within_pairs_counts(words, tower):
    a, b = vectors(tower, read(words, ["no pleural effusion left lung", "left pleural effusion no lung"]))
    assert (a - b).norm() > 0.01


def test_words_of_one_caption_and_punctuation_are_unknown_and_case_and_accents_do_not_count():
    words = ngrams.train_words(["A cyst, a cyst.", "No CYST!", "Café no.", "cafe 3 mm", "3 mm once"])
    known = set(words.get_vocab()) - set(ngrams.SPECIAL.values())
    assert known == {"cyst", "no", "cafe", "3", "mm"}  # "a" twice, but in one caption
    assert words("Cyst, CAFÉ").input_ids == words.convert_tokens_to_ids(["cyst", "[UNK]", "cafe"])
    assert len(ngrams.train_words(["a b c", "a b c d"], vocab_size=7)) == 7


@pytest.mark.parametrize("captions", [[], ["", "  "]])
def test_no_captions_are_refused(captions):
    with pytest.raises(ValueError, match="no captions"): ngrams.train_words(captions)


def test_repeats_do_not_count(words, captions):
    again = ngrams.train_words([*captions, *captions[:50] * 3])
    assert again.get_vocab() == words.get_vocab()


@pytest.mark.parametrize("few", [["one caption"], ["no word", "in common"]])
def test_captions_that_share_no_word_are_refused(few):
    with pytest.raises(ValueError, match="no word is in 2 captions"): ngrams.train_words(few)


def test_a_vocabulary_or_a_vector_of_no_size_is_refused(captions, words):
    with pytest.raises(ValueError, match="vocab_size 5 leaves no room"): ngrams.train_words(captions, vocab_size=5)
    with pytest.raises(ValueError, match="text_width 0"): ngrams.fit_ngrams(words, captions, 0)


@pytest.mark.parametrize("few", [["a cyst", "a mass"], ["a cyst", "a cyst.", "cyst"]])
def test_hardly_any_captions_make_a_tower_too(few):
    words = ngrams.train_words(few)
    tower = ngrams.fit_ngrams(words, few, 8)
    assert vectors(tower, read(words, [*few, "", "a cyst"])).isfinite().all()
    assert tower.table.shape == (len(words) + len(tower.pairs), 8)


def test_fitting_again_gives_the_same_whatever_the_random_state(captions, words, tower):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    again = ngrams.fit_ngrams(words, captions, 20)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(tower.state_dict().values(), again.state_dict().values()))


def test_the_commonest_pairs_are_kept(tokens, words):
    every, some = (ngrams.known_pairs(tokens, len(words), most) for most in (20000, 40))
    assert len(some) == 40 and set(some.tolist()) < set(every.tolist()) and (some.diff() > 0).all()
    held = lambda code: (ngrams.pair_codes(tokens, len(words)) == code).any(1).sum()
    assert min(held(c) for c in some) >= max(held(c) for c in set(every.tolist()) - set(some.tolist()))


# ---- as a tower of open_clip

def test_only_the_projection_trains(encoder):
    assert [n for n, _ in encoder.model.text.named_parameters()] == ["proj.weight"]
    before = copy.deepcopy(encoder.model.text.transformer.state_dict())
    encoder.model.encode_text(encoder.tokenizer(CAPTIONS[:4])).square().sum().backward()
    assert encoder.model.text.proj.weight.grad.abs().sum() > 0
    encoder.model.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), encoder.model.text.transformer.state_dict().values()))


def test_a_moved_folder_gives_the_same_embeddings_and_fingerprint(encoder, tmp_path):
    save_model(encoder, tmp_path / "m")
    shutil.move(tmp_path / "m", tmp_path / "moved")
    again = load_model(tmp_path / "moved")
    assert all(torch.equal(a, b) for a, b in zip(embeddings(encoder), embeddings(again)))
    assert fingerprint(encoder) == fingerprint(again) == fingerprint(tmp_path / "moved")
    assert json.loads((tmp_path / "moved" / "config.json").read_text())["model_type"] == "radclip_ngrams"
    other = build_model(MODEL, [*CAPTIONS, "One pleural stone more."])
    other.model.visual.load_state_dict(encoder.model.visual.state_dict())
    assert fingerprint(other) != fingerprint(encoder)


def test_embeddings_of_empty_and_unknown_captions_are_equal_and_finite(encoder):
    z = encode_texts(encoder, ["", "zebra", "zebra " * 300])
    assert z.isfinite().all() and torch.equal(z[0], z[1]) and torch.equal(z[0], z[2])


@pytest.mark.parametrize("field, value", [("text_layers", 2), ("text_heads", 4), ("text_pool", "mean"), ("text_dropout", 0.5), ("text_pretrained", False)])
def test_fields_that_counted_words_do_not_have_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^model: {field} is not read by text_tower ngrams") as error: as_config({**MODEL, field: value})
    assert "\n" not in str(error.value)


def test_a_config_written_out_in_full_is_taken_back():
    config = as_config(MODEL)
    assert as_config(config.model_dump()) == config and config.text_layers is None


def test_building_without_captions_is_refused():
    with pytest.raises(ValueError, match="captions of the training split"): build_model(MODEL)


def test_the_phantom_kind_can_have_it_too():
    encoder = build_model({"kind": "phantom", "text_tower": "ngrams"}, CAPTIONS)
    assert encode_texts(encoder, CAPTIONS[:2]).shape == (2, 128)
