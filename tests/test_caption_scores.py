"""Scores of captions against the packages they are named after, on the same strings; properties; faults of the input."""
import math
import string

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from radclip.caption_scores import (bert_score_rows, bleu_counts, bleu_of, check_captions, cider_rows, diversity, greedy_match, meteor_rows, normalise_caption,
                                    rouge_rows)
from radclip.findings import caption, pictures

PHANTOMS = [caption(p) for p in pictures(120, seed=3)]
HARD = [("", ["a mass"]), ("a mass", [""]), ("", [""]), ("a mass", ["a mass"]), ("a a a a a a a a", ["a mass", "a a"]), ("mass", ["a mass in the lung", "mass", ""]),
        ("Left > right: 2.5 cm, T2-weighted (arrow).", ["Right > left; 2.5cm T2 weighted"]), ("œdème à gauche", ["œdème à droite"]), (" two   blanks ", ["two blanks"]),
        ("a b c d e f", ["f e d c b a", "a b c x d e f"]), ("x", ["y"])]
SETS = {"phantoms": (PHANTOMS[1:] + PHANTOMS[:1], [[text] for text in PHANTOMS]),
        "several": (PHANTOMS[2:] + PHANTOMS[:2], [[a, b] if n % 3 else [a] for n, (a, b) in enumerate(zip(PHANTOMS, PHANTOMS[1:] + PHANTOMS[:1]))]),
        "same": (PHANTOMS, [[text] for text in PHANTOMS]), "hard": ([c for c, _ in HARD], [r for _, r in HARD]), "one": (["a mass"], [["a mass"]])}
by_set = pytest.mark.parametrize("candidates, references", SETS.values(), ids=SETS)
words = st.lists(st.sampled_from("a mass in the left right lung no effusion , . 5".split()), max_size=7).map(" ".join)
sets = st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=5)


# ---- equal to the packages

@by_set
def test_rouge_is_the_packages(candidates, references):
    from rouge_score import rouge_scorer
    ours = rouge_rows(candidates, references)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"])
    for n, (candidate, row) in enumerate(zip(candidates, references)):
        for name, key in (("ROUGE-1", "rouge1"), ("ROUGE-L", "rougeL")): assert ours[name][n] == max(scorer.score(r, candidate)[key].fmeasure for r in row)


@by_set
def test_bleu_is_sacrebleus(candidates, references):
    from sacrebleu.metrics import BLEU
    most = max(map(len, references))
    streams = [[row[i] if i < len(row) else None for row in references] for i in range(most)]  # as the package takes several references
    ours = bleu_of(bleu_counts(candidates, references).sum(0))
    for n in range(1, 5): assert ours[f"BLEU-{n}"] == pytest.approx(BLEU(max_ngram_order=n).corpus_score(candidates, streams).score / 100, abs=1e-12)


@by_set
def test_cider_is_pycocoevalcaps(candidates, references):
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    with np.errstate(all="ignore"):
        mean, rows = cider.Cider().compute_score(dict(enumerate(references)), {n: [c] for n, c in enumerate(candidates)})
    ours = cider_rows(candidates, references)
    np.testing.assert_allclose(ours, rows, atol=1e-9)
    assert ours.mean() == pytest.approx(mean)


@given(sets)
@settings(max_examples=60, deadline=None)
def test_cider_is_pycocoevalcaps_on_anything(rows):
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    candidates, references = zip(*rows)
    assume(any(r.strip() for row in references for r in row))  # the package fails where no reference has a word
    _, theirs = cider.Cider().compute_score(dict(enumerate(references)), {n: [c] for n, c in enumerate(candidates)})
    np.testing.assert_allclose(cider_rows(candidates, references), theirs, atol=1e-9)


def test_meteor_by_hand():
    "The formula of 2007: F = 10PR / (R + 9P), less 0.5 · (chunks / matches)³."
    candidate, reference = "two masses of left lung".split(), "a mass of the left lung".split()  # matched: masses~mass, of, left, lung, in two… three pieces
    matches, chunks = 4, 2  # "masses of" and "left lung"
    p, r = matches / len(candidate), matches / len(reference)
    expected = 10 * p * r / (r + 9 * p) * (1 - 0.5 * (chunks / matches) ** 3)
    assert meteor_rows([" ".join(candidate)], [[" ".join(reference)]])[0] == pytest.approx(expected)
    assert meteor_rows(["x", "", "a"], [["y"], ["a"], ["b", "a"]])[0] == 0


# ---- what has to hold of every score

def every(candidates, references):
    return rouge_rows(candidates, references) | {"CIDEr": cider_rows(candidates, references), "METEOR": meteor_rows(candidates, references)}


@given(sets)
@settings(max_examples=60, deadline=None)
def test_identical_is_the_most_there_can_be_and_order_does_not_matter(rows):
    candidates, references = map(list, zip(*rows))
    scores, ideal = every(candidates, references), every([row[0] for row in references], [[row[0]] for row in references])
    for name, values in scores.items():
        top = 10 if name == "CIDEr" else 1
        assert (values >= 0).all() and (values <= top + 1e-9).all(), name
        if name == "CIDEr": continue  # a caption of words that every image has scores 0, however identical
        for value, row in zip(ideal[name], references):
            if any(c.isalnum() for c in row[0]): assert value > 0.99 if name != "METEOR" else value >= 0.5
    turned = every(candidates[::-1], references[::-1])
    for name, values in scores.items(): np.testing.assert_allclose(turned[name][::-1], values, atol=1e-12)
    assert bleu_of(bleu_counts(candidates, references).sum(0)) == bleu_of(bleu_counts(candidates[::-1], references[::-1]).sum(0))


def test_identical_phantoms_score_full_and_a_worse_caption_less():
    references = [[text] for text in PHANTOMS]
    full, less = every(PHANTOMS, references), every([text.rsplit(" ", 2)[0] for text in PHANTOMS], references)
    assert (full["ROUGE-1"] == 1).all() and (full["ROUGE-L"] == 1).all() and full["CIDEr"].min() > 9.99
    for name in full: assert (less[name] < full[name]).all(), name
    assert bleu_of(bleu_counts(PHANTOMS, references).sum(0))["BLEU-4"] == pytest.approx(1)


# ---- the rest

def test_normalised_as_imageclef():
    assert normalise_caption("A 20 mm X-ray-dense nodule, 2.5 cm (T2).") == "a number mm xraydense nodule numbernumber cm tnumber"
    assert normalise_caption("") == "" and normalise_caption(" ., ") == ""


@given(st.text(max_size=60))
def test_normalising_leaves_no_digit_capital_or_mark(text):
    plain = normalise_caption(text)
    assert not set(plain) & set(string.punctuation + string.ascii_uppercase + "0123456789") and plain == " ".join(plain.split()) and normalise_caption(plain) == plain


def test_diversity_by_hand():
    assert diversity(["a b", "a b", "c"]) == {"distinct_1": 3 / 5, "distinct_2": 1 / 2, "most_frequent_share": 2 / 3}
    assert diversity([""]) == {"distinct_1": 0, "distinct_2": 0, "most_frequent_share": 1}


@pytest.mark.parametrize("candidates, references, said", [
    ("a mass", ["a mass"], "lists"), (["a"], "a", "lists"), (["a"], [["a"], ["b"]], "1 candidates for 2"), ([], [], "no captions"), ([None], [["a"]], "candidate 0"),
    (["a"], [[]], "row 0"), (["a", "b"], [["a"], [None]], "row 1")])
def test_bad_input_ends_in_one_line(candidates, references, said):
    with pytest.raises(ValueError, match=said) as e: check_captions(candidates, references)
    assert "\n" not in str(e.value)


def test_single_references_may_be_plain_texts(): assert check_captions(("a",), ("b",)) == (["a"], [["b"]])


# ---- BERTScore

@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    "A BERT of random weights: whatever it says, both implementations must agree."
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging
    logging.disable_progress_bar()
    vocabulary = {w: i for i, w in enumerate("[PAD] [UNK] [CLS] [SEP] a mass in the left right lung no effusion of large".split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    folder = tmp_path_factory.mktemp("bert")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, initializer_range=0.5)).save_pretrained(folder)
    return folder


CANDIDATES = ["a mass in the left lung", "no effusion", "large mass", "a"]
REFERENCES = [["a mass in the right lung"], ["effusion", "no large effusion"], ["large mass"], ["the lung of a left mass"]]


@pytest.mark.parametrize("layer", [2, 3])
def test_bert_score_is_the_packages(language_model, layer):
    package = pytest.importorskip("bert_score")
    theirs = package.score(CANDIDATES, REFERENCES, model_type=str(language_model), num_layers=layer)[2]
    ours = bert_score_rows(CANDIDATES, REFERENCES, language_model, layer=layer, batch_size=3)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
    assert ours[2] == pytest.approx(1, abs=1e-5) and ours[0] < 0.999


def test_bert_score_of_nothing_and_of_no_model(language_model, tmp_path):
    assert bert_score_rows(["", "a"], [["a"], [""]], language_model).tolist() == [0, 0]
    with pytest.raises(FileNotFoundError, match="no language model"): bert_score_rows(["a"], [["a"]], tmp_path)


def test_greedy_match_by_hand():
    import torch
    one, other = torch.eye(2), torch.tensor([[1, 0], [math.sqrt(0.5), math.sqrt(0.5)]])
    yes = torch.ones(2, dtype=torch.bool)
    p, r, f = greedy_match(one, other, yes, yes)
    assert (p, r) == (pytest.approx((1 + math.sqrt(0.5)) / 2), pytest.approx((1 + math.sqrt(0.5)) / 2)) and f == pytest.approx(p)
    assert greedy_match(one, other, torch.tensor([True, False]), yes)[0] == 1, "what does not count can still be matched"
