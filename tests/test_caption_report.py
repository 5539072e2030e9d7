"""The report of captions: figures by hand, intervals against plain resampling, planted contradictions, bases, the table, words in colour."""
import html
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radclip.caption_report import MARKS, WORD_SCORES, _draws, caption_report, colour_words, concept_rows, format_caption_report, set_scores
from radclip.caption_scores import bleu_counts, bleu_of, cider_rows, normalise_caption, rouge_rows
from radclip.concepts import MODALITIES, affirmed, find_concepts
from radclip.findings import caption, concepts, pictures

TRUTHS = pictures(150, seed=5)
TEXTS, KNOWN = [caption(p) for p in TRUTHS], [set(concepts(p)) for p in TRUTHS]
REFERENCES, SHIFTED = [[text] for text in TEXTS], TEXTS[1:] + TEXTS[:1]


def swap(text): return re.sub(r"\b(left|right)\b", lambda m: {"left": "right", "right": "left"}[m[0].lower()], text, flags=re.I)


def deny(text):
    for m in reversed(find_concepts(text)):
        if not m.negated and m.cui not in MODALITIES: text = f"{text[:m.start]}no {text[m.start:]}"
    return text


@pytest.fixture(scope="module")
def shifted(): return caption_report(SHIFTED, REFERENCES, KNOWN, resamples=200)


def test_perfect_captions():
    report = caption_report(TEXTS, REFERENCES, KNOWN, resamples=50)
    assert all(report[name] == pytest.approx(1) for name in ("ROUGE-1", "ROUGE-L", "BLEU-1", "BLEU-4", "concept_F1", "concept_F1_micro", "concept_F1_text", "concept_coverage", "length_ratio"))
    assert report["CIDEr"] == pytest.approx(10) and report["METEOR_stem"] > 0.99 and report["laterality_error"] == report["laterality_differs"] == report["negation_error"] == 0
    assert report["rows"] == len(TEXTS) and report["concept_F1_ci95"] == [1, 1] and report["laterality_rows"] > 50


def test_word_scores_are_the_means_of_the_chapter_before(shifted):
    plain = [normalise_caption(t) for t in SHIFTED], [[normalise_caption(r[0])] for r in REFERENCES]
    for part, (c, r) in ((shifted, plain), (shifted["raw"], (SHIFTED, REFERENCES))):
        expected = {name: values.mean() for name, values in rouge_rows(c, r).items()} | {"CIDEr": cider_rows(c, r).mean()} | bleu_of(bleu_counts(c, r).sum(0))
        for name, value in expected.items(): assert part[name] == pytest.approx(value), name
    assert set(shifted["raw"]) == set(WORD_SCORES)


def test_concept_scores_by_scikit_learn(shifted):
    from sklearn.metrics import f1_score, precision_score, recall_score
    said = [affirmed(t) for t in SHIFTED]
    cuis = sorted(set().union(*said, *KNOWN))
    table = [np.array([[cui in found for cui in cuis] for found in rows], int) for rows in (KNOWN, said)]
    for name, score in (("precision", precision_score), ("recall", recall_score), ("F1", f1_score)):
        assert shifted[f"concept_{name}"] == pytest.approx(score(*table, average="samples", zero_division=0))
        assert shifted[f"concept_{name}_micro"] == pytest.approx(score(*table, average="micro", zero_division=0))


@given(st.sets(st.integers(0, 6)), st.sets(st.integers(0, 6)))
def test_set_scores(said, true):
    p, r, f = set_scores(said, true)
    assert set_scores(true, said)[:2] == (r, p) and 0 <= f <= 1 and (f == 1) == (said == true)
    if p + r: assert f == pytest.approx(2 * p * r / (p + r))


# ---- intervals

def test_intervals_are_those_of_plain_resampling(shifted):
    plain = [normalise_caption(t) for t in SHIFTED], [[normalise_caption(r[0])] for r in REFERENCES]
    rng, rows, counts = np.random.default_rng(0), rouge_rows(*plain)["ROUGE-L"], bleu_counts(*plain)
    sided = concept_rows(SHIFTED, REFERENCES)["laterality_error"]
    rouge, bleu, side = [], [], []
    for _ in range(200):
        at = rng.integers(len(rows), size=len(rows))
        rouge.append(rows[at].mean()); bleu.append(bleu_of(counts[at].sum(0))["BLEU-2"])
        above, below = sided[at].sum(0)
        if below: side.append(above / below)
    for name, values in (("ROUGE-L", rouge), ("BLEU-2", bleu), ("laterality_error", side)):
        assert shifted[f"{name}_ci95"] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=1e-5), name
        assert shifted[f"{name}_ci95"][0] <= shifted[name] <= shifted[f"{name}_ci95"][1]


def test_every_draw_has_as_many_rows_and_the_seed_decides():
    draws = _draws(40, 30, 1)
    assert draws.shape == (30, 40) and (draws.sum(1) == 40).all() and (draws == _draws(40, 30, 1)).all() and (draws != _draws(40, 30, 2)).any()
    one, same, other = (caption_report(SHIFTED[:30], REFERENCES[:30], resamples=50, seed=seed) for seed in (0, 0, 1))
    assert one == same and one["ROUGE-L"] == other["ROUGE-L"] and one["ROUGE-L_ci95"] != other["ROUGE-L_ci95"]


def test_the_order_of_rows_changes_no_figure(shifted):
    turned = caption_report(SHIFTED[::-1], REFERENCES[::-1], KNOWN[::-1], resamples=1)
    for name, value in shifted.items():
        if isinstance(value, (int, float)): assert turned[name] == pytest.approx(value), name


# ---- contradictions

def test_planted_wrong_sides_are_all_found():
    rows = [t for t in TEXTS if any(m.side in ("left", "right") and not m.negated for m in find_concepts(t)) and not any(m.side == "bilateral" for m in find_concepts(t))]
    report = caption_report([swap(t) for t in rows], rows, resamples=20)
    assert len(rows) > 40 and report["laterality_rows"] == len(rows) and report["laterality_error"] == report["laterality_differs"] == 1 and report["negation_error"] == 0
    assert report["ROUGE-L"] > 0.9, "and the words see next to nothing"


def test_planted_denials_are_all_found():
    rows = [t for t in TEXTS if affirmed(t) - set(MODALITIES)]
    report = caption_report([deny(t) for t in rows], rows, resamples=20)
    assert len(rows) > 100 and report["negation_rows"] == len(rows) and report["negation_error"] == 1 and report["laterality_error"] is None
    assert report["laterality_error_ci95"] is None and report["concept_F1_text"] < 0.7


def test_always_bilateral_is_no_error_but_does_not_go_unseen():
    rows = [t for t in TEXTS if any(m.side in ("left", "right") and not m.negated for m in find_concepts(t))]
    report = caption_report([re.sub(r"\b(left|right)(-sided)?\b", "bilateral", t) for t in rows], rows, resamples=20)
    assert report["laterality_error"] == 0 and report["laterality_differs"] > 0.9


def test_the_base_is_what_both_speak_of():
    report = caption_report(["left pleural effusion", "pleural effusion", "glioma", ""], ["right pleural effusion", "left pleural effusion", "left pleural effusion", "No glioma"], resamples=20)
    assert (report["laterality_rows"], report["laterality_error"], report["negation_rows"], report["negation_error"]) == (1, 1, 2, 0)


def test_several_references_are_pooled():
    report = caption_report(["left pleural effusion"], [["a glioma", "left pleural effusion and cardiomegaly"]], [{"C0032227"}], resamples=5)
    assert report["references"] == 2 and report["laterality_error"] == 0 and report["concept_F1"] == 1 and report["concept_F1_text"] == pytest.approx(2 / 4) and report["ROUGE-1"] > 0.7


def test_concepts_without_a_term_bound_the_recall():
    report = caption_report(["pleural effusion"], ["pleural effusion"], [["C0032227", "C9999999"]], resamples=5)
    assert report["concept_recall"] == report["concept_coverage"] == 0.5 and report["concept_precision"] == 1


def test_an_own_dictionary():
    report = caption_report(["left wug", "no wug"], ["right wug", "wug"], dictionary={"C1": ["wug"]}, resamples=5)
    assert report["laterality_error"] == 1 and report["negation_error"] == 0.5


# ---- bad input, plain numbers

def test_plain_json_even_of_empty_captions():
    report = caption_report(["", ""], [["a mass"], [""]], resamples=5)
    back = json.loads(json.dumps(report, allow_nan=False))
    assert back == report and report["ROUGE-L"] == report["BLEU-4"] == report["CIDEr"] == 0 and report["most_frequent_share"] == 1


@pytest.mark.parametrize("arguments, said", [
    (dict(candidates=["a"], references=[["a"]], concepts=[]), "1 candidates for 0 sets"), (dict(candidates=["a"], references=[]), "1 candidates for 0"),
    (dict(candidates=["a"], references=["a"], resamples=0), "resamples"), (dict(candidates="a", references=["a"]), "lists")])
def test_bad_input_ends_in_one_line(arguments, said):
    with pytest.raises(ValueError, match=said) as e: caption_report(**arguments)
    assert "\n" not in str(e.value)


def test_the_table_has_every_captioner_and_the_pool(shifted):
    none = caption_report(["a"] * 150, REFERENCES, resamples=5)
    lines = format_caption_report(shifted, {"most frequent": none}, name="blip").splitlines()
    assert "150 captions" in lines[0] and lines[1].split() == ["blip", "most", "frequent"]
    rows = {line.split()[0]: line for line in lines[2:]}
    assert f"{shifted['ROUGE-L']:.4f}" in rows["ROUGE-L"] and f"{none['ROUGE-L']:.4f}" in rows["ROUGE-L"] and f"{shifted['ROUGE-L_ci95'][1]:.4f}]" in rows["ROUGE-L"]
    assert rows["laterality_error"].count("–") == 1 and rows["concept_F1"].count("–") == 1
    assert len(format_caption_report(none).splitlines()) < len(lines), "a figure that nobody has is left out"


# ---- words in colour

def marks(text): return re.findall(r'<span title="([^"]*)"[^>]*>([^<]*)</span>', text)


def test_what_is_marked():
    said = {kind: title for kind, (title, _) in MARKS.items()}
    assert marks(colour_words("Left pneumothorax, cardiomegaly", "right pneumothorax")) == [(said["side"], "Left"), (said["side"], "pneumothorax"), (said["extra"], "cardiomegaly")]
    assert marks(colour_words("No pneumothorax", "a pneumothorax here")) == [(said["negation"], "No"), (said["negation"], "pneumothorax")]
    assert marks(colour_words("a pneumothorax here", "No pneumothorax")) == [(said["negation"], "pneumothorax")]
    assert marks(colour_words("An Opacity, old.", ["no word", "opacities"])) == [(said["agree"], "Opacity")]
    assert marks(colour_words("", "a mass")) == []


def test_marks_differ_without_colour(): assert len({re.sub(r"color:[^;]*;", "", style) for _, style in MARKS.values()}) == len(MARKS)


@given(st.text(max_size=60), st.sampled_from(["left pneumothorax <b>", "no pneumothorax & glioma", ""]))
@settings(deadline=None)
def test_nothing_gets_lost_and_everything_is_escaped(text, other):
    candidate = f"{text} pneumothorax {text}"
    marked = colour_words(candidate, other)
    inside = re.sub(r'</?span[^>]*>', "", re.fullmatch(r'<div style="[^"]*">(.*)</div>', marked, re.S)[1])
    assert html.unescape(inside) == html.unescape(html.escape(candidate)) and "<" not in inside and ">" not in inside
