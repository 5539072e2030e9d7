"Synthetic patients: the same on every machine, and captions that say what the truth says."
import hashlib
import re

import numpy as np
import pytest

from radclip.findings import (SCALE, Dice, absent, caption, concepts, fact_key, outlines, patient_pictures,
                              phantom_concepts, phrase, pictures, recall_ceiling, report, shape, short_caption, side_in, split_of, vocabulary)

POOL = 8176


@pytest.fixture(scope="module")
def truths():
    return pictures(POOL)


@pytest.fixture(scope="module")
def captions(truths):
    return [caption(p) for p in truths]


def affirmed(text: str) -> str:
    "A caption without its sentence about what is absent."
    return re.split(r"\b(?:No evidence of|No sign of|No) ", text)[0]


def studies(truths):
    found = {}
    for p in truths:
        found.setdefault(p.study, []).append(p)
    return found


def test_dice_are_the_raw_bits_of_a_numbered_generator():
    raw = np.random.Philox(key=[7, 3]).random_raw(64).tolist()[::-1]
    dice = Dice(3, 7)
    assert [dice.below(1000) for _ in range(64)] == [(r >> 16) % 1000 for r in raw]
    assert [Dice(0, 0).below(10**6), Dice(0, 1).below(10**6), Dice(1, 0).below(10**6)] == [263251, 607660, 124805]


def test_truth_is_the_stored_one(truths):
    "Whole numbers and texts: no tolerance. A new hash is a new data set, and needs a newly trained phantom model."
    said = [(p.image_id, p.study, p.kind, sorted(p.facts.items()), [(f.name, f.cui, f.side, f.zone, f.size, f.jitter) for f in p.findings],
             p.mark, p.body, p.shot, caption(p), split_of(p), [outlines(f, p.kind) for f in p.findings]) for p in truths[:500]]
    said.append([report(s) for s in studies(truths[:500]).values()])
    assert hashlib.sha256(repr(said).encode()).hexdigest()[:16] == "2a188382f4cf1f45"


def test_sets_of_any_length_agree_and_seeds_differ(truths):
    assert pictures(50) == pictures(400)[:50] == truths[:50]
    assert [p.findings for p in pictures(50, seed=1)] != [p.findings for p in truths[:50]]
    assert patient_pictures(11, seed=5) == [p for p in pictures(60, seed=5) if p.patient.endswith("000011")]


def test_vocabulary_is_complete():
    words = vocabulary()
    kinds = {"chest_frontal", "chest_lateral", "head_ct", "abdomen_ct", "brain_mri", "ultrasound"}
    assert set(words["kinds"]) == kinds
    assert len({f["cui"] for f in words["findings"]}) >= 45
    assert all(re.fullmatch(r"C\d{7}", cui) and name for cui, name in phantom_concepts().items())
    assert len({f["name"] for f in words["findings"]}) == len(words["findings"])
    for f in words["findings"]:
        assert set(f["in"]) <= kinds and f["terms"] and f["say"] and f["weight"] > 0
        for kind, place in f["in"].items():
            assert set(place.get("sizes", SCALE)) <= set(SCALE)
            assert all(zone in words["words"] for zone in place["at"] if zone)
            for fact, values in place.get("when", {}).items():
                assert set(values) <= set(words["kinds"][kind]["facts"][fact])


def test_every_finding_and_every_fact_occurs(truths):
    assert {f.name for p in truths for f in p.findings} == {f["name"] for f in vocabulary()["findings"]}
    for kind, entry in vocabulary()["kinds"].items():
        for fact, values in entry["facts"].items():
            assert {p.facts[fact] for p in truths if p.kind == kind} == set(values)
    assert {p.mark for p in truths} == set(vocabulary()["marks"])


def test_patients_have_one_to_three_pictures_and_one_split(truths):
    groups, splits = {}, {}
    for p in truths[:-3]:
        groups.setdefault(p.patient, []).append(p)
        splits.setdefault(p.patient, set()).add(split_of(p))
    assert {len(v) for v in groups.values()} == {1, 2, 3}
    assert all(len(s) == 1 for s in splits.values())
    share = [sum(s == {name} for s in splits.values()) / len(splits) for name in ("train", "validation", "test")]
    assert np.abs(np.array(share) - [0.7, 0.15, 0.15]).max() < 0.02
    for v in groups.values():
        assert len({(p.facts.get("person"), p.facts.get("build"), p.facts.get("organ"), p.body) for p in v}) == 1
    assert any({p.kind for p in s} == {"chest_frontal", "chest_lateral"} for s in studies(truths[:500]).values())
    assert any(len({p.study for p in v}) > 1 and v[0].findings != v[-1].findings for v in groups.values())


def test_a_finding_is_the_same_in_every_picture_of_a_study(truths):
    seen = {}
    for p in truths:
        for f in p.findings:
            seen.setdefault((p.study, f.name, p.facts.get("level")), set()).add(f)
    assert all(len(v) == 1 for v in seen.values())


def test_follow_ups_differ_from_what_came_before(truths):
    "Findings stay, go, come, and change their size; the patient's body stays."
    fates = {"stays": 0, "goes": 0, "comes": 0, "changes size": 0}
    for a, b in zip(truths, truths[1:]):
        if a.patient == b.patient and a.study != b.study and a.kind == b.kind:
            before, after = ({f.name: f for f in p.findings} for p in (a, b))
            fates["goes"] += len(before.keys() - after.keys())
            fates["comes"] += len(after.keys() - before.keys())
            for name in before.keys() & after.keys():
                fates["stays"] += before[name] == after[name]
                fates["changes size"] += before[name].size != after[name].size
    assert min(fates.values()) > 50


def test_concepts_are_the_affirmed_ones_only(truths, captions):
    by_term = {}
    for f in vocabulary()["findings"]:
        by_term.setdefault(f["terms"][0], set()).add(f["cui"])
    negated = 0
    for p, text in zip(truths, captions):
        cuis = concepts(p)
        assert len(set(cuis)) == len(cuis) and set(cuis) <= set(phantom_concepts())
        assert set(cuis[1:]) == {f.cui for f in p.findings}
        gone = re.search(r"\b(?:No evidence of|No sign of|No) (.+)\.$", text)
        if gone:
            negated += 1
            assert not by_term[gone[1]] & set(cuis), text
    assert 0.25 < negated / len(truths) < 0.5


def test_captions_name_what_is_there_and_nothing_else(truths, captions):
    terms = {f["name"]: f["terms"] for f in vocabulary()["findings"]}
    singular = lambda t: re.sub(r"(?:es|is|s|e)\b", "", t.lower())
    for p, text in list(zip(truths, captions))[:2500]:
        said = singular(affirmed(text))
        for f in p.findings:
            assert any(singular(t) in said for t in terms[f.name]), (f.name, text)
        own = " ".join(singular(t) for f in p.findings for t in terms[f.name])
        for f in absent(p):
            for t in f["terms"]:
                assert singular(t) not in said or singular(t) in own or any(t in x for x in terms[p.findings[0].name]), (t, text)


def test_sides_zones_and_sizes_agree_with_the_truth(truths):
    words = vocabulary()["words"]
    for p in truths[:2500]:
        for f in p.findings:
            text = phrase(f, p.kind, Dice(p.words, 9))
            sides = set(re.findall(r"\b(left|right|bilateral)\b", text))
            assert sides == ({side_in(f, p.kind)} - {""}), text
            if f.zone:
                assert any(w in text for w in words[f.zone]), text
            for size in SCALE:
                named = any(re.search(rf"\b{w}\b", text) for w in words["size"][size] + words["degree"][size])
                assert not named or size == f.size, text
            for x, *_ in shape(f, p.kind):
                if side_in(f, p.kind) in ("left", "right"):
                    assert (x > 0) == (f.side == "left")


def test_a_lateral_view_names_no_side(truths, captions):
    lateral = [affirmed(c) for p, c in zip(truths, captions) if p.kind == "chest_lateral"]
    assert len(lateral) > 200 and not any(re.search(r"\b(left|right|bilateral)", c) for c in lateral)


def test_short_captions_are_true(truths):
    "Each names a term of a finding that is there, or says no to one that is not; and its own kind of picture."
    terms = {t.lower(): f["cui"] for f in vocabulary()["findings"] for t in f["terms"]}
    views = {k: [v.split("{")[0].strip().lower() for v in kind["short"]] for k, kind in vocabulary()["kinds"].items()}
    for p in truths[:3000]:
        text, there = short_caption(p).lower(), {f.cui for f in p.findings}
        assert short_caption(p) == short_caption(p) and "{" not in text and len(text) < 150
        denied = re.search(r"(?:^no|without) (.+)$", text)
        if denied and denied[1] in terms:
            assert terms[denied[1]] not in there, text
            text = text[:denied.start()]
        named = {terms[t] for t in terms if re.search(rf"\b{re.escape(t)}\b", text)}
        assert not named or named & there, (text, p.findings)
        sides = {word for word in ("left", "right") if re.search(rf"\b{word}\b", text)}
        assert sides <= {side_in(f, p.kind) for f in p.findings}, text
        others = [v for kind, said in views.items() if kind.split("_")[0] != p.kind.split("_")[0] for v in said if len(v.split()) > 1]
        assert not any(v in text for v in others if not any(v in own for own in views[p.kind])), text


def test_outlines_lie_within_reach_and_findings_do_not_hide_each_other(truths):
    devices = {f["name"] for f in vocabulary()["findings"] if f.get("device")}
    fixed = {f["name"] for f in vocabulary()["findings"] if any(p.get("fixed") for p in f["in"].values())}
    for p in (p for p in truths[:5000] if p.image_id.endswith("-0")):  # later ones may have grown
        flat = [(f.name, box) for f in p.findings for box in outlines(f, p.kind)]
        assert all(-1250 <= c <= 1250 for _, box in flat for c in box)
        small = [(n, b) for n, b in flat if n not in devices | fixed]
        for i, (n, (x0, y0, x1, y1)) in enumerate(small):
            for m, (u0, v0, u1, v1) in small[i + 1:]:
                w, h = min(x1, u1) - max(x0, u0), min(y1, v1) - max(y0, v0)
                assert n == m or w <= 0 or h <= 0 or 5 * w * h <= min((x1 - x0) * (y1 - y0), (u1 - u0) * (v1 - v0)), (p.image_id, n, m)


def test_reports_name_all_findings_of_the_study(truths):
    terms = {f["name"]: f["terms"] for f in vocabulary()["findings"]}
    stem = lambda t: re.sub(r"(?:es|is|s|e)\b", "", t.lower())
    for study in list(studies(truths[:800]).values()):
        findings, impression = report(study)
        for f in {f.name: f for p in study for f in p.findings}.values():
            assert any(stem(t) in stem(impression) for t in terms[f.name]), (f.name, impression)
            assert any(stem(t) in stem(findings) for t in terms[f.name])
        assert impression.endswith(".") and "No " not in impression.replace("No abnormality", "")


def test_captions_are_distinct_and_well_formed(captions):
    assert len(set(captions)) >= 0.7 * POOL
    for text in captions:
        assert text[0].isupper() and text[-1] == "." and "  " not in text and "{" not in text and " ," not in text
        assert not re.search(r"\b[Aa] [aeio]", text) and not re.search(r"\b[Aa]n [^aeiouAEIONE]", text), text
    assert np.percentile([len(c.split()) for c in captions], 99) < 45


def test_ceiling_counts_pictures_that_share_their_facts():
    assert recall_ceiling(["a", "a", "b"], (1, 2)) == {"R@1": pytest.approx(2 / 3), "R@2": 1.0}
    rng = np.random.default_rng(0)
    keys = [str(k) for k in rng.integers(0, 12, 40)]
    hits = []  # oracle: shuffle the pool many times, rank by equal key
    for _ in range(3000):
        order = rng.permutation(40)
        i = rng.integers(40)
        hits.append([j for j in order if keys[j] == keys[i]].index(i))
    assert recall_ceiling(keys, (1, 3))["R@1"] == pytest.approx(np.mean(np.array(hits) < 1), abs=0.04)
    assert recall_ceiling(keys, (1, 3))["R@3"] == pytest.approx(np.mean(np.array(hits) < 3), abs=0.04)


def test_facts_suffice_for_the_figures_the_phantom_recipe_must_reach(truths):
    keys = [fact_key(p) for p in truths]
    whole = recall_ceiling(keys)
    assert whole["R@1"] > 0.4 and whole["R@5"] > 0.6
    spread = np.random.default_rng(0).permutation(POOL)
    batches = [recall_ceiling([keys[i] for i in spread[s:s + 32]]) for s in range(0, POOL - 32, 32)]
    assert np.mean([b["R@5"] for b in batches]) >= 0.995 and np.mean([b["R@1"] for b in batches]) > 0.95
