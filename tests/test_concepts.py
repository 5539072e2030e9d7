"""Reading a caption: forms of words, the longest term, negation and sides by hand-written sentences, phantom truth, real reports."""
import csv
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radclip import concepts
from radclip.concepts import MODALITIES, Phrases, affirmed, compare_mentions, contradictions, find_concepts, load_dictionary, phantom_dictionary, plain_word, split_words
from radclip.findings import caption, pictures, report, side_in, vocabulary
from radclip.findings import concepts as true_concepts

OWN = Phrases({name: [name] for name in ("effusion", "pneumothorax", "mass", "nodule", "consolidation", "edema", "fracture", "hemorrhage", "mass effect", "cyst", "kidney stone")})


def read(text, dictionary=OWN): return [f"{'no ' * m.negated}{m.term.lower()}{m.side and ' ' + m.side}" for m in find_concepts(text, dictionary)]


# ---- words and terms

def test_plain_forms():
    pairs = {"Tumours": "tumor", "oedema": "edema", "haemorrhages": "hemorrhage", "metastases": "metastasis", "Masses": "mass", "atelectases": "atelectasis", "stenoses": "stenosis",
             "opacities": "opacity", "calculi": "calculus", "pneumothoraces": "pneumothorax", "goitre": "goiter", "pelvis": "pelvis", "abscesses": "abscess", "thrombus": "thrombus",
             "as": "as", "is": "is", "T2": "t2", "CTs": "cts", "four": "four", "fractures": "fracture", "caecum": "cecum"}
    assert {word: plain_word(word) for word in pairs} == pairs


def test_plural_and_singular_of_bilateral_terms_meet():
    from radclip.findings import _plural
    terms = [t for f in vocabulary()["findings"] if any(place.get("sides") == 3 for place in f["in"].values()) for t in f["terms"] if not t.endswith("s")]
    assert len(terms) > 8
    for term in terms: assert [w.plain for w in split_words(term)] == [w.plain for w in split_words(_plural(term))], term


@given(st.text(max_size=80))
def test_words_are_slices_in_order(text):
    words = split_words(text)
    assert all(w.plain and w.start < w.end for w in words)
    assert all(a.end <= b.start for a, b in zip(words, words[1:]))


def test_longest_term_wins_and_a_term_may_belong_to_two():
    both = Phrases({"A": ["cyst"], "B": ["liver cyst"], "C": ["Liver-cyst"]})
    assert [(m.cui, m.term) for m in find_concepts("A liver cyst, and a cyst.", both)] == [("B", "liver cyst"), ("C", "liver cyst"), ("A", "cyst")]


def test_a_term_is_whole_words_and_never_crosses_a_full_stop():
    assert read("Cystic massive effusions") == ["effusions"]
    assert read("The kidney. Stone found.") == [] and read("kidney\nstone") == [] and read("Kidney-stones, kidney/stone") == ["kidney-stones", "kidney/stone"]


def test_a_plain_dict_is_taken_too():
    assert affirmed("a mass", {"C1": ["mass"]}) == {"C1"} and find_concepts("", OWN) == [] and affirmed("a mass", {}) == set()


@given(st.lists(st.sampled_from("no not seen effusion mass left right , . and or with a the but is L both lateral view absent : shift to".split(" ")), max_size=14))
def test_any_word_salad_is_read(words):
    text = " ".join(words)
    for m in find_concepts(text, OWN):
        assert text[m.start:m.end] == m.term and m.negated == bool(m.cue) and bool(m.side) == bool(m.side_words)
        assert m.side in ("", "left", "right", "bilateral")


# ---- a dictionary from a file

def test_dictionaries_from_files(tmp_path):
    (tmp_path / "a.yaml").write_text("C0032227: [pleural effusion, pleural fluid]\nC1: mass\n")
    (tmp_path / "b.csv").write_text("cui,term\nC0032227,pleural effusion\nC0032227,pleural fluid\nC1,mass\n")
    (tmp_path / "c.csv").write_text("CUI,Canonical name\nC0032227,Pleural effusion\nC1,Mass\n")
    assert load_dictionary(tmp_path / "a.yaml") == load_dictionary(tmp_path / "b.csv") == {"C0032227": ["pleural effusion", "pleural fluid"], "C1": ["mass"]}
    assert affirmed("Small pleural effusions.", load_dictionary(tmp_path / "c.csv")) == {"C0032227"}


@pytest.mark.parametrize("name, text, said", [
    ("a.yaml", "C1: [", "not YAML"), ("a.yaml", "- mass", "needs entries"), ("a.yaml", "", "needs entries"), ("a.yaml", "C1: ['%']", "without a word"),
    ("a.yaml", "C1: 5", "C1"), ("a.yaml", "C1: [5]", "list of texts"), ("a.csv", "cui\nC1\n", "no column 'term'"), ("a.csv", "term\nmass\n", "no column"),
    ("a.csv", "cui,term\nC1,\n", "a.csv:2"), ("a.csv", "cui,term\n", "no term"), ("a.csv", 'cui,term\nC1,"mass\n', "broken quoting"), ("b.csv", None, "no such dictionary")])
def test_bad_dictionaries_end_in_one_line(tmp_path, name, text, said):
    if text is not None: (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError)) as e: load_dictionary(tmp_path / name)
    assert said in str(e.value) and name in str(e.value) and "\n" not in str(e.value)


# ---- negation, sentence by sentence

@pytest.mark.parametrize("text, said", [
    ("No pleural effusion.", ["no effusion"]),
    ("There is no effusion, pneumothorax or consolidation.", ["no effusion", "no pneumothorax", "no consolidation"]),
    ("No focal consolidation, large effusion, or pneumothorax is identified.", ["no consolidation", "no effusion", "no pneumothorax"]),
    ("Without effusion or pneumothorax.", ["no effusion", "no pneumothorax"]),
    ("No evidence of a mass.", ["no mass"]),
    ("Negative for fracture or pneumothorax.", ["no fracture", "no pneumothorax"]),
    ("Absence of mass effect.", ["no mass effect"]),
    ("The lungs are free of consolidation.", ["no consolidation"]),
    ("Lungs clear of nodules.", ["no nodules"]),
    ("Fracture was ruled out.", ["no fracture"]),
    ("Effusion and pneumothorax are not seen.", ["no effusion", "no pneumothorax"]),
    ("Mass, nodule and effusion are not identified.", ["no mass", "no nodule", "no effusion"]),
    ("The effusion is absent.", ["no effusion"]),
    ("Pneumothorax: none. Effusion: absent. Mass: present.", ["no pneumothorax", "no effusion", "mass"]),
    ("The effusion is no longer seen.", ["no effusion"]),
    ("The pneumothorax has completely resolved.", ["no pneumothorax"]),
    ("Interval resolution of the effusion.", ["no effusion"]),
    ("Neither effusion nor pneumothorax.", ["no effusion", "no pneumothorax"]),
    ("No mass effect, nor edema.", ["no mass effect", "no edema"]),
    ("The study does not show a fracture.", ["no fracture"]),
    ("CT fails to demonstrate hemorrhage.", ["no hemorrhage"]),
    ("CT excludes hemorrhage.", ["no hemorrhage"]),
    ("Hemorrhage is unlikely.", ["no hemorrhage"]),
    ("Cyst rather than mass.", ["cyst", "no mass"]),
    ("This does not represent a mass.", ["no mass"]),
    ("no pneumothorax . large effusion", ["no pneumothorax", "effusion"]),
    ("No fracture is seen, left effusion.", ["no fracture", "effusion left"]),
    ("No effusion, but a mass.", ["no effusion", "mass"]),
    ("No effusion; mass in the lung.", ["no effusion", "mass"]),
    ("No effusion however there is consolidation.", ["no effusion", "consolidation"]),
    ("No effusion except for a mass.", ["no effusion", "mass"]),
    ("No effusion, a mass is present.", ["no effusion", "mass"]),
    ("No effusion and a mass.", ["no effusion", "mass"]),
    ("No effusion - mass in the left lung.", ["no effusion", "mass left"]),
    ("Mass without edema.", ["mass", "no edema"]),
    ("Mass without edema with hemorrhage.", ["mass", "no edema", "hemorrhage"]),
    ("A mass is seen. No effusion.", ["mass", "no effusion"]),
    ("Large mass, effusion not seen.", ["mass", "no effusion"]),
    ("There is a mass; effusion is not identified.", ["mass", "no effusion"]),
    ("A mass is seen and effusion is not identified.", ["mass", "no effusion"]),
    ("No change in the effusion.", ["effusion"]),
    ("No significant interval change in effusion.", ["effusion"]),
    ("Without interval increase of the nodule.", ["nodule"]),
    ("Not only effusion but also consolidation.", ["effusion", "consolidation"]),
    ("Pneumothorax cannot be excluded.", ["pneumothorax"]),
    ("Cannot rule out fracture.", ["fracture"]),
    ("Mass is not entirely excluded.", ["mass"]),
    ("Large if not massive effusion.", ["effusion"]),
    ("CT without contrast shows hemorrhage.", ["hemorrhage"]),
    ("CT W/O contrast: hemorrhage.", ["hemorrhage"]),
    ("No enhancement of the mass.", ["mass"]),
    ("No evidence of fat within the mass or fracture.", ["mass", "no fracture"]),
    ("No evidence of the mass.", ["no mass"]),
    ("A mass that was not seen on CT.", ["mass"]),
    ("A mass not seen on the prior study.", ["mass"]),
    ("Hemorrhage, absent kidney.", ["hemorrhage"]),
    ("The effusion is not resolved.", ["effusion"]),
    ("No findings consistent with hemorrhage.", ["no hemorrhage"]),
    ("CT excluded a fracture and edema.", ["no fracture", "no edema"]),
    ("Fracture (not seen here) and mass.", ["no fracture", "mass"]),
    ("Effusion after drainage (tube not shown).", ["effusion"]),
    ("The effusion (resolved) and a mass (no edema) with cyst.", ["no effusion", "mass", "no edema", "cyst"]),
    ("The effusion was not seen on earlier imaging.", ["effusion"]),
    ("MASS. NO EFFUSION.", ["mass", "no effusion"]),
    ("Notable mass, nocturnal effusion, noted nodule.", ["mass", "effusion", "nodule"]),
])
def test_negation(text, said): assert read(text) == said


@pytest.mark.parametrize("text, said", [
    ("Left pleural effusion.", ["effusion left"]),
    ("Left-sided effusion.", ["effusion left"]),
    ("Effusion on the right.", ["effusion right"]),
    ("Effusion, right.", ["effusion right"]),
    ("Bilateral effusions, left greater than right.", ["effusions bilateral"]),
    ("Right and left effusions.", ["effusions bilateral"]),
    ("Consolidation in the right and left lower lobes.", ["consolidation bilateral"]),
    ("Effusions on both sides.", ["effusions bilateral"]),
    ("No effusion on either side.", ["no effusion bilateral"]),
    ("A mass in the left upper zone and a right effusion.", ["mass left", "effusion right"]),
    ("A mass in the left lung and consolidation.", ["mass left", "consolidation"]),
    ("Consolidation and mass in the left lung.", ["consolidation", "mass left"]),
    ("Right effusion, left pneumothorax.", ["effusion right", "pneumothorax left"]),
    ("Right effusion with left pneumothorax.", ["effusion right", "pneumothorax left"]),
    ("Effusion on the left and pneumothorax on the right.", ["effusion left", "pneumothorax right"]),
    ("No effusion on the right, small effusion on the left.", ["no effusion right", "effusion left"]),
    ("In the left lung, there is consolidation.", ["consolidation left"]),
    ("The left lung shows consolidation.", ["consolidation left"]),
    ("RLL consolidation, LUL nodule.", ["consolidation right", "nodule left"]),
    ("Small R effusion; L pneumothorax.", ["effusion right", "pneumothorax left"]),
    ("Nodule at L5, fracture at L 4.", ["nodule", "fracture"]),
    ("L-spine fracture.", ["fracture"]),
    ("Left lateral view shows effusion.", ["effusion"]),
    ("The left ventricle is large, effusion.", ["effusion"]),
    ("Mass with midline shift to the left.", ["mass"]),
    ("Mediastinum displaced to the right by a mass.", ["mass"]),
    ("Midline shift from left to right by a mass.", ["mass"]),
    ("Large mass compared to the right.", ["mass"]),
    ("A displaced left fracture.", ["fracture left"]),
    ("Both a mass and a nodule.", ["mass", "nodule"]),
    ("The right lung is clear. Effusion.", ["effusion"]),
    ("Edema in the right femoral head and low signal in the left.", ["edema right"]),
    ("Effusion. Right mass.", ["effusion", "mass right"]),
])
def test_sides(text, said): assert read(text) == said


def test_places_of_cue_and_side():
    text = "No left effusion."
    mention, = find_concepts(text, OWN)
    assert text[slice(*mention.cue)] == "No" and [text[a:b] for a, b in mention.side_words] == ["left"] and text[mention.start:mention.end] == "effusion"


# ---- the phantoms' own truth, another world than the notebook's

@pytest.fixture(scope="module")
def truths(): return pictures(2500, seed=7)


def test_phantom_captions_are_read_without_error(truths):
    for p in truths:
        text = caption(p)
        mentions = find_concepts(text)
        assert {m.cui for m in mentions if not m.negated} == set(true_concepts(p)), text
        for f in p.findings: assert {m.side for m in mentions if m.cui == f.cui and not m.negated} == {side_in(f, p.kind)}, text


def test_phantom_reports_are_read_without_error(truths):
    studies = {}
    for p in truths: studies.setdefault(p.study, []).append(p)
    for study in studies.values():
        for text in report(study): assert affirmed(text) == {f.cui for p in study for f in p.findings}, text


def test_every_phantom_concept_has_terms(): assert set(concepts.phantom_dictionary()) == {k["modality"]["cui"] for k in vocabulary()["kinds"].values()} | {f["cui"] for f in vocabulary()["findings"]}


# ---- contradictions

@pytest.mark.parametrize("candidate, reference, kinds", [
    ("left effusion", "right effusion", {"laterality"}),
    ("left effusion", "left effusion", set()),
    ("left effusion", "bilateral effusions", {"partial"}),
    ("bilateral effusions", "effusion on the right", {"partial"}),
    ("effusion", "left effusion", set()),
    ("effusion", "no effusion", {"negation"}),
    ("no effusion", "effusion", {"negation"}),
    ("no effusion", "no effusion", set()),
    ("no left effusion", "right effusion", set()),
    ("no left effusion", "left effusion", {"negation"}),
    ("no effusion", "left effusion", {"negation"}),
    ("left effusion", "no left effusion, right effusion", {"laterality"}),
    ("no left effusion. right effusion", "right effusion", set()),
    ("mass", "no effusion", set()),
    ("no mass, left effusion", "mass, a right effusion", {"negation", "laterality"}),
    ("effusion", ["no effusion", "effusion"], set()),
    ("left effusion", ["right effusion", "left mass"], {"laterality"}),
    ("", "effusion", set()),
])
def test_contradictions(candidate, reference, kinds):
    found = contradictions(candidate, reference, OWN)
    assert {kind for kind in ("negation", "laterality", "partial") if getattr(found, kind)} == kinds
    for kind in kinds:
        for ours, theirs in getattr(found, kind): assert ours.term in candidate and ours.cui == theirs.cui and any(theirs.term in r for r in ([reference] if isinstance(reference, str) else reference))


def test_bases_of_the_shares():
    found = contradictions("CT: no mass, left effusion, a cyst", "CT: mass, effusion", OWN | MODALITIES)
    assert found.shared == {"mass", "effusion"} and found.sided == set(), "an error needs both to speak, and a modality is no finding"
    assert contradictions("no CT", "CT", MODALITIES).negation == []


def test_swapped_sides_and_denied_findings_are_found(truths):
    swap = lambda text: re.sub(r"\b(left|right)\b", lambda m: {"left": "right", "right": "left"}[m[0].lower()], text, flags=re.I)
    for text in map(caption, truths):
        mentions = find_concepts(text)
        one_sided = {m.cui for m in mentions if m.side in ("left", "right") and not m.negated}
        found = contradictions(swap(text), text)
        assert {a.cui for a, _ in found.laterality} == one_sided and not found.negation and not found.partial
        there = [m for m in mentions if not m.negated and m.cui not in MODALITIES]
        denied = text
        for m in reversed(there): denied = f"{denied[:m.start]}no {denied[m.start:]}"
        found = contradictions(denied, text)
        assert {a.cui for a, _ in found.negation} == {m.cui for m in there} and not found.laterality
        assert not any(contradictions(text, text)[:3])


@given(st.lists(st.sampled_from(["no effusion", "left effusion", "right mass", "mass", "no left mass", "bilateral effusions"]), max_size=4),
       st.lists(st.sampled_from(["no effusion", "left effusion", "right mass", "mass", "no left mass", "bilateral effusions"]), max_size=4))
def test_contradicting_is_mutual(one, other):
    a, b = (find_concepts(". ".join(parts), OWN) for parts in (one, other))
    there, back = compare_mentions(a, b), compare_mentions(b, a)
    for kind in ("negation", "laterality", "partial"): assert {(y, x) for x, y in getattr(there, kind)} == set(getattr(back, kind))
    assert there.shared == back.shared and there.sided == back.sided and not any(compare_mentions(a, a)[:3])


# ---- real text (none of it is copied here)

DATA = os.environ.get("RADCLIP_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="RADCLIP_DATA is not set")
CHEST = {"Pleural Effusion": ["pleural effusion", "effusion", "pleural fluid"], "Pneumothorax": ["pneumothorax"], "Consolidation": ["consolidation"], "Pulmonary Atelectasis": ["atelectasis"],
         "Cardiomegaly": ["cardiomegaly", "enlarged heart", "cardiac enlargement", "heart is enlarged"], "Hernia, Hiatal": ["hiatal hernia", "hiatus hernia"]}


def reports():
    with open(Path(DATA) / "openi" / "indiana_reports.csv", encoding="utf-8", newline="") as f: return list(csv.DictReader(f))


@needs_data
def test_open_i_reports_agree_with_their_coders():
    dictionary, count = Phrases(CHEST), {name: [0, 0, 0, 0] for name in CHEST}  # mentioned, affirmed, both affirmed and coded, coded
    for row in reports():
        mentions = find_concepts(f"{row['findings']}\n{row['impression']}", dictionary)
        coded = {name.strip() for name in row["Problems"].split(";")} | {name.strip().split("/")[0] for name in row["MeSH"].split(";")}
        for name in CHEST:
            there = any(m.cui == name and not m.negated for m in mentions)
            for i, hit in enumerate([any(m.cui == name for m in mentions), there, there and name in coded, name in coded]): count[name][i] += hit
    precision, recall = ({name: c[2] / c[i] for name, c in count.items()} for i in (1, 3))
    print({name: (c, round(precision[name], 2), round(recall[name], 2)) for name, c in count.items()})
    mentioned, there, right, coded = count["Pleural Effusion"]
    assert coded / mentioned < 0.06 and precision["Pleural Effusion"] > 0.75 and recall["Pleural Effusion"] > 0.97
    assert precision["Consolidation"] > 0.7 and recall["Consolidation"] > 0.95 and precision["Pneumothorax"] > 0.8 and recall["Pneumothorax"] > 0.9
    assert precision["Pulmonary Atelectasis"] > 0.8 and recall["Pulmonary Atelectasis"] > 0.95 and precision["Hernia, Hiatal"] > 0.85 and precision["Cardiomegaly"] > 0.95


# what 45 captions say, drawn at random among those of 30 to 260 characters that state a side or negate, and read by eye
EVERYDAY = Phrases({term: [term] for term in (
    "mass,lesion,nodule,effusion,pneumothorax,consolidation,hemorrhage,hematoma,infarct,edema,fracture,cyst,tumor,metastasis,hydrocephalus,midline shift,calcification,hydronephrosis,"
    "calculus,thrombus,aneurysm,abscess,herniation,lymphadenopathy,opacity,atrophy,ascites,mass effect,hernia,dissection").split(",")})
MEDPIX = {
    "MPX1251_synpic27554": "lesion right",
    "MPX1851_synpic27497": "mass left",
    "MPX1007_synpic46722": "no lesions",
    "MPX1338_synpic27420": "no lesions",
    "MPX2607_synpic52590": "mass right, lesion",
    "MPX1609_synpic19719": "lesion left",
    "MPX1996_synpic16444": "cysts bilateral",
    "MPX1756_synpic41199": "calculi right",
    "MPX1746_synpic51005": "cysts right, calcifications, cysts",
    "MPX1609_synpic19720": "lesion left",
    "MPX1417_synpic24443": "hemorrhage left",
    "MPX2367_synpic24363": "lesion right",
    "MPX2097_synpic19229": "edema bilateral, fracture, edema",
    "MPX2518_synpic39510": "mass effect, herniation left",
    "MPX1375_synpic41148": "masses left",
    "MPX1251_synpic27553": "lesion right, lesion",
    "MPX2345_synpic36477": "mass right",
    "MPX1657_synpic24451": "calcifications bilateral",
    "MPX1366_synpic22186": "no mass",
    "MPX1782_synpic50978": "no hydrocephalus, no mass, no lesion",
    "MPX1009_synpic46283": "calcifications, no mass",
    "MPX2367_synpic24364": "lesion right",
    "MPX1154_synpic53549": "lesion right, calcification",
    "MPX1996_synpic16446": "cysts bilateral",
    "MPX2610_synpic45673": "mass left, mass",
    "MPX2388_synpic34946": "infarcts left",
    "MPX2425_synpic50895": "mass right, nodule",
    "MPX2258_synpic42061": "fracture right, mass",
    "MPX2407_synpic48722": "infarct left",
    "MPX1689_synpic48730": "hydronephrosis left, atrophy left",
    "MPX2301_synpic45808": "mass right",
    "MPX1058_synpic17148": "effusion right",
    "MPX1754_synpic51422": "hemorrhage left, hemorrhage",
    "MPX1254_synpic21659": "opacities right, opacities right",
    "MPX1254_synpic21658": "opacity right, opacity right",
    "MPX1108_synpic16234": "mass left, nodules bilateral",
    "MPX1980_synpic34841": "mass right, mass, mass",
    "MPX2073_synpic12218": "mass right",
    "MPX2043_synpic17064": "lesion right",
    "MPX1086_synpic25218": "mass, edema",
    "MPX1284_synpic35434": "cyst, nodule, lesion left",
    "MPX2433_synpic48297": "calcification right",
    "MPX1124_synpic50747": "lesion left",
    "MPX1996_synpic16445": "cysts bilateral",
    "MPX1755_synpic17666": "calcification, no effusions",
}


@needs_data
def test_medpix_captions_are_read_as_a_person_reads_them():
    with open(Path(DATA) / "medpix2" / "pairs.jsonl", encoding="utf-8") as f: rows = {Path(row["image"]).stem: row["caption"] for row in map(json.loads, f)}
    assert {name: ", ".join(read(rows[name], EVERYDAY)) for name in MEDPIX} == MEDPIX
