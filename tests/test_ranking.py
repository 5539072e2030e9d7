"""Ranks and figures against brute force, exact enumeration of ties, random orders, ranx, scikit-learn and open_clip."""
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from radclip.counting import RightPairs, count_levels
from radclip.ranking import EvaluateConfig, _at_most, _interval, batch_recall, first_ranks, pool_curve, retrieval_report

KEYS = ("R@1", "R@5", "R@10", "MedR", "MeanR", "MRR", "nDCG@10")
WAYS = ("image_to_text", "text_to_image")
DISCOUNT = 1 / np.log2(np.arange(2, 12))


# --- oracles: N × N matrices, loops, enumeration; nothing of radclip's in them

def truth_of(text_image, n, texts=None):
    "[N, M] bool twice: identical texts count, own captions only."
    own = np.asarray(text_image)[None] == np.arange(n)[:, None]
    if texts is None: return own, own
    ids = np.unique(texts, return_inverse=True)[1]
    held = np.zeros((n, ids.max() + 1), bool)
    held[text_image, ids] = True
    return held[:, ids], own


def rank_chances(scores, right):
    "{rank of the first right item: chance}, by listing where the right ones can fall among their ties."
    best = scores[right].max()
    above, tied, p = (scores > best).sum(), (scores == best).sum(), (right & (scores == best)).sum()
    places = [min(c) for c in itertools.combinations(range(tied), p)]
    return {int(above + 1 + i): places.count(i) / len(places) for i in set(places)}


def expected_median(chances):
    "The median's expectation over all combinations of independent ranks."
    total = 0.0
    for combination in itertools.product(*(c.items() for c in chances)):
        total += np.prod([p for _, p in combination]) * np.median([r for r, _ in combination])
    return total


def ndcg10(scores, right):
    "Each right item is worth the mean discount of the places its ties share."
    gain = 0.0
    for s in scores[right]:
        above, tied = (scores > s).sum(), (scores == s).sum()
        gain += sum(DISCOUNT[r] for r in range(above, min(above + tied, 10))) / tied
    return gain / DISCOUNT[:right.sum()].sum()


def oracle(scores, right, median=True):
    asked = np.flatnonzero(right.any(1))
    chances = [rank_chances(scores[q], right[q]) for q in asked]
    mean = lambda f: np.mean([sum(p * f(r) for r, p in c.items()) for c in chances])
    out = {f"R@{k}": mean(lambda r: r <= k) for k in (1, 5, 10)}
    return out | {"MeanR": mean(lambda r: r), "MRR": mean(lambda r: 1 / r), "nDCG@10": np.mean([ndcg10(scores[q], right[q]) for q in asked])} \
        | ({"MedR": expected_median(chances)} if median else {})


def check(report, scores, text_image, texts=None, median=True, tol=1e-9):
    n = len(scores)
    for part, right in zip((report, report["strict"]), truth_of(text_image, n, texts)):
        for way, s, r in ((WAYS[0], scores, right), (WAYS[1], scores.T, right.T)):
            for key, value in oracle(s, r, median).items():
                assert part[way][key] == pytest.approx(value, abs=tol), (way, key)


def noisy(n, m, d=32, captions=1, noise=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(n, d, generator=g), dim=1)
    owner = np.arange(m) // captions
    return images, F.normalize(images[owner] + noise * torch.randn(m, d, generator=g) / d ** .5, dim=1), owner


# --- exact on ties and several captions

@settings(max_examples=120, deadline=None)
@given(st.data())
def test_every_figure_is_the_exact_expectation(data):
    n, m = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    values = st.lists(st.integers(-2, 2), min_size=2, max_size=2)
    images = np.array(data.draw(st.lists(values, min_size=n, max_size=n)), np.float32)
    captions = np.array(data.draw(st.lists(values, min_size=m, max_size=m)), np.float32)
    owner = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=m, max_size=m)))
    texts = data.draw(st.one_of(st.none(), st.lists(st.sampled_from("abcd"), min_size=m, max_size=m)))
    check(retrieval_report(images, captions, owner, texts), images @ captions.T, owner, texts)


@pytest.mark.parametrize("seed", range(6))
def test_figures_are_the_mean_over_random_orders(seed):
    rng = np.random.default_rng(seed)
    n, m = 25, 60
    images, captions = rng.integers(-1, 2, (n, 3)).astype(np.float32), rng.integers(-1, 2, (m, 3)).astype(np.float32)
    owner, texts = rng.integers(0, n, m), [str(t) for t in rng.integers(0, 30, m)]
    report, scores = retrieval_report(images, captions, owner, texts), images @ captions.T
    right = truth_of(owner, n, texts)[0]
    for way, s, r in ((WAYS[0], scores, right), (WAYS[1], scores.T, right.T)):
        s, r = s[r.any(1)], r[r.any(1)]
        draws = []
        for _ in range(600):
            order = np.lexsort((rng.random(s.shape), -s), axis=1)
            hits = np.take_along_axis(r, order, 1)
            rank = hits.argmax(1) + 1
            gain = (hits[:, :10] * DISCOUNT).sum(1) / np.array([DISCOUNT[:k].sum() for k in r.sum(1)])
            draws.append([(rank <= 1).mean(), (rank <= 5).mean(), (rank <= 10).mean(), np.median(rank), rank.mean(), (1 / rank).mean(), gain.mean()])
        mean, error = np.mean(draws, 0), np.std(draws, 0) / 600 ** .5
        assert (abs(np.array([report[way][k] for k in KEYS]) - mean) <= 5 * error + 1e-9).all()


@pytest.mark.parametrize("n", [1, 2, 31, 33, 100, 700])
@pytest.mark.parametrize("captions", [1, 3])
def test_a_collapsed_model_scores_chance(n, captions):
    m, g = n * captions, torch.Generator().manual_seed(n)
    one = torch.randn(1, 37, generator=g)
    report = retrieval_report(one.expand(n, -1).clone(), one.expand(m, -1).clone(), np.arange(m) // captions)
    for k in (1, 5, 10):
        miss = np.prod([max(m - captions - i, 0) / (m - i) for i in range(min(k, m))])
        assert report["image_to_text"][f"R@{k}"] == pytest.approx(1 - miss)
        assert report["text_to_image"][f"R@{k}"] == pytest.approx(min(1, k / n))
    assert report["text_to_image"]["MeanR"] == pytest.approx((n + 1) / 2)
    assert report["text_to_image"]["MedR"] == pytest.approx((n + 1) / 2, rel=2e-3)
    assert report["batchwise"]["text_to_image"]["R@1"] == pytest.approx(1 / min(32, n))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n,captions,dim", [(50, 1, 3), (130, 5, 64), (257, 2, 17), (65, 9, 512)])
def test_tie_free_pools_equal_the_full_sort(n, captions, dim, dtype):
    images, captions_emb, owner = (np.asarray(x) for x in noisy(n, n * captions, dim, captions))
    images, captions_emb = images.astype(dtype), captions_emb.astype(dtype)
    scores = images @ captions_emb.T
    report = retrieval_report(images, captions_emb, owner)
    for way, s, r in ((WAYS[0], scores, owner[None] == np.arange(n)[:, None]), (WAYS[1], scores.T, owner[:, None] == np.arange(n))):
        rank = np.take_along_axis(r, (-s).argsort(1, kind="stable"), 1).argmax(1) + 1
        mine = report[way]
        assert (mine["MedR"], mine["MeanR"]) == pytest.approx((np.median(rank), rank.mean()))
        assert [mine[f"R@{k}"] for k in (1, 5, 10)] == pytest.approx([(rank <= k).mean() for k in (1, 5, 10)])
        assert mine["MRR"] == pytest.approx((1 / rank).mean())


# --- independent implementations

def test_agrees_with_open_clip():
    metrics = pytest.importorskip("open_clip_train.train").get_clip_metrics
    images, captions, owner = noisy(300, 300, noise=3.0)
    theirs, ours = metrics(images, captions, torch.tensor(100.0)), retrieval_report(images, captions, owner)
    for way in WAYS:
        for k in (1, 5, 10): assert ours[way][f"R@{k}"] == pytest.approx(theirs[f"{way}_R@{k}"])
        assert ours[way]["MeanR"] == pytest.approx(theirs[f"{way}_mean_rank"])
        assert np.floor(ours[way]["MedR"]) == theirs[f"{way}_median_rank"]  # theirs is rounded down


RANX = """
import json, sys, ranx
qrels, run = json.load(sys.stdin)
print(json.dumps(ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), ["hit_rate@1", "hit_rate@5", "hit_rate@10", "mrr", "ndcg@10"])))
"""


def test_agrees_with_ranx():
    pytest.importorskip("ranx")
    images, captions, owner = noisy(30, 90, captions=3, noise=3.0)
    texts = [f"text {i % 70}" for i in range(90)]
    scores, right = (images @ captions.T).numpy().astype(float), truth_of(owner, 30, texts)[0]
    report = retrieval_report(images, captions, owner, texts)
    for way, s, r in ((WAYS[0], scores, right), (WAYS[1], scores.T, right.T)):
        qrels = {f"q{i:03}": {f"d{j:03}": 1 for j in np.flatnonzero(row)} for i, row in enumerate(r)}
        run = {f"q{i:03}": {f"d{j:03}": float(v) for j, v in enumerate(row)} for i, row in enumerate(s)}
        out = subprocess.run([sys.executable, "-W", "ignore", "-c", RANX], input=json.dumps([qrels, run]), capture_output=True, text=True,
                             check=True, env=os.environ | {"NUMBA_DISABLE_JIT": "1"})  # compiling takes it two minutes
        for a, b in zip(("R@1", "R@5", "R@10", "MRR", "nDCG@10"), json.loads(out.stdout).values()): assert report[way][a] == pytest.approx(b), a


def test_ndcg_agrees_with_scikit_learn_on_ties():
    ndcg_score = pytest.importorskip("sklearn.metrics").ndcg_score
    rng = np.random.default_rng(0)
    images, captions = rng.integers(-1, 2, (40, 3)).astype(np.float32), rng.integers(-1, 2, (90, 3)).astype(np.float32)
    owner, texts = rng.integers(0, 40, 90), [str(t) for t in rng.integers(0, 50, 90)]
    right, scores = truth_of(owner, 40, texts)[0], images @ captions.T
    report = retrieval_report(images, captions, owner, texts)
    for way, s, r in ((WAYS[0], scores, right), (WAYS[1], scores.T, right.T)):
        asked = r.any(1)
        assert report[way]["nDCG@10"] == pytest.approx(ndcg_score(r[asked], s[asked], k=10), abs=1e-6)


# --- the counting itself

@pytest.mark.parametrize("case", range(12))
def test_counts_equal_brute_force_across_tiles(case):
    rng = np.random.default_rng(case)
    n, m = int(rng.integers(1, 300)), int(rng.integers(1, 400))
    images, captions = (torch.from_numpy(rng.integers(-2, 3, (k, 4)).astype(np.float32)) for k in (n, m))
    owner = rng.integers(0, n, m)
    texts = [str(t) for t in rng.integers(0, rng.integers(1, 80), m)] if case % 3 else None
    rights, scores = truth_of(owner, n, texts), (images @ captions.T).numpy()
    for side, levels in enumerate(count_levels(images, captions, RightPairs(owner, n, texts), tile=64)):
        s, right, own = (x.T if side else x for x in (scores, *rights))
        for q, score, r, o, above, tied in zip(*levels):
            assert above == (s[q] > score).sum() and tied == (s[q] == score).sum()
            assert o == (own[q] & (s[q] == score)).sum()
            if above < 10: assert r == (right[q] & (s[q] == score)).sum()
        for q in range(len(s)):  # the ten best distinct scores of right and of own items are all there
            held = levels.score[levels.query == q]
            for mask in (right, own): assert np.isin(np.unique(s[q][mask[q]])[::-1][:10], held).all()


@pytest.mark.parametrize("dim", [1, 3, 64, 100, 511, 513, 1000])
def test_no_right_item_beats_itself(dim):
    images, captions, owner = noisy(600, 600, dim, noise=0.01, seed=dim)
    for levels in count_levels(images, captions, RightPairs(owner, 600)):
        assert (levels.tied >= 1).all()
        assert (levels.above + levels.tied <= 600).all()
    twice = torch.cat([images, images])  # every image in two rows: two exact ties at least, wherever they lie in a tile
    for levels in count_levels(twice, torch.cat([captions, captions]), RightPairs(np.arange(1200), 1200)):
        assert (levels.tied >= 2).all()


@pytest.mark.parametrize("group,kinds", [(3000, 1), (2000, 1001), (10, 300)])
def test_crowds_of_identical_captions(group, kinds):
    n = 3000
    images, captions, owner = noisy(n, n, noise=2.0)
    ids = np.arange(n) % kinds if kinds < 1001 else np.where(np.arange(n) < group, 0, np.arange(n))
    scores, right = (images @ captions.T).numpy(), ids[:, None] == ids[None]
    ranks = first_ranks(images, captions, owner, [str(i) for i in ids])
    for s, mine in ((scores, ranks[0]), (scores.T, ranks[1])):
        best = np.where(right, s, -np.inf).max(1)
        assert np.abs(mine - 1 - (s > best[:, None]).sum(1)).max() <= 1  # one product against another: a rounding apart
        assert (mine == 1 + (s > best[:, None]).sum(1)).mean() > 0.99


def test_order_of_rows_does_not_matter():
    rng = np.random.default_rng(0)
    images, captions, owner = noisy(90, 270, captions=3, noise=3.0)
    texts = [f"text {i % 200}" for i in range(270)]
    a, b = rng.permutation(90), rng.permutation(270)
    before = retrieval_report(images, captions, owner, texts)
    after = retrieval_report(images[a], captions[b], np.argsort(a)[owner[b]], [texts[i] for i in b])
    for part in (lambda r: r, lambda r: r["strict"]):
        for way in WAYS:
            for key in KEYS: assert part(before)[way][key] == pytest.approx(part(after)[way][key])


def test_memory_stays_far_below_the_matrix():
    code = """
import resource, torch, numpy as np
from radclip.ranking import retrieval_report
x = torch.randn(600, 128); retrieval_report(x, x, np.arange(600))  # libraries and their buffers
x, y = torch.randn(6000, 128), torch.randn(6000, 128)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
retrieval_report(x, y, np.arange(6000))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 40 * 1024  # kB; the scores alone would take 144 MB


# --- the rest of the report

def test_schema_and_plain_numbers():
    images, captions, owner = noisy(50, 100, captions=2)
    report = json.loads(json.dumps(retrieval_report(images, captions, owner, [f"t{i}" for i in range(100)], seed=7)))
    assert set(report) == {"pool", *WAYS, "strict", "batchwise"} and report["pool"].items() >= {"images": 50, "texts": 100, "seed": 7}.items()
    for part in (report, report["strict"]):
        for way in WAYS:
            assert set(part[way]) == {*KEYS, "R@1_ci95"}
            low, high = part[way]["R@1_ci95"]
            assert low <= part[way]["R@1"] <= high
    assert report["batchwise"]["size"] == 32 and set(report["batchwise"]) == {"size", *WAYS}
    for way in WAYS: assert set(report["batchwise"][way]) == {"R@1", "R@5"}


def test_strict_never_beats_counting_identical_texts():
    images, captions, owner = noisy(80, 80, noise=3.0)
    report = retrieval_report(images, captions, owner, [f"t{i % 20}" for i in range(80)])
    for way in WAYS:
        for k in (1, 5, 10): assert report["strict"][way][f"R@{k}"] <= report[way][f"R@{k}"]
        assert report["strict"][way]["MeanR"] > report[way]["MeanR"]


def test_images_without_a_caption_are_rivals_that_never_ask():
    images, captions, _ = noisy(40, 40, noise=3.0)
    owner = np.arange(0, 40, 2)
    report, ranks = retrieval_report(images, captions[::2], owner), first_ranks(images, captions[::2], owner)
    check(report, (images @ captions[::2].T).numpy(), owner, median=False, tol=1e-6)
    assert np.isnan(ranks[0][1::2]).all() and np.nanmean(ranks[0]) == pytest.approx(report["image_to_text"]["MeanR"])


def test_numpy_half_precision_and_scale():
    images, captions, owner = noisy(64, 64, noise=3.0)
    reference = retrieval_report(images, captions, owner)
    assert retrieval_report(images.numpy(), captions.numpy(), owner.tolist()) == reference
    assert retrieval_report(images.half(), captions.half(), owner) == retrieval_report(images.half().float(), captions.half().float(), owner)
    assert retrieval_report(images * 8, captions, torch.from_numpy(owner)) == reference  # a factor of two of all scores changes no order


def test_seeds():
    images, captions, owner = noisy(200, 400, captions=2, noise=4.0)
    assert retrieval_report(images, captions, owner, seed=1) == retrieval_report(images, captions, owner, seed=1)
    a, b = (batch_recall(images, captions, owner, seed=s) for s in (0, 1))
    assert a != b and a == batch_recall(images, captions, owner, seed=0)


def test_one_batch_is_the_whole_pool():
    images, captions, owner = noisy(32, 32, noise=4.0)
    report = retrieval_report(images, captions, owner)
    for way in WAYS:
        for k in ("R@1", "R@5"): assert report["batchwise"][way][k] == pytest.approx(report[way][k])


def test_batches_drop_the_short_rest_and_take_one_caption_an_image():
    images, captions, owner = noisy(40, 120, captions=3, noise=0.01)
    assert batch_recall(images, captions, owner) == {way: {"R@1": 1.0, "R@5": 1.0} for way in WAYS}
    flat = batch_recall(torch.ones(40, 4), torch.ones(120, 4), owner)
    assert flat["image_to_text"] == {"R@1": pytest.approx(1 / 32), "R@5": pytest.approx(5 / 32)}
    assert batch_recall(torch.ones(3, 4), torch.ones(3, 4), [0, 1, 2])["image_to_text"]["R@5"] == 1


def test_interval_is_the_bootstrap_one():
    rng = np.random.default_rng(0)
    hits = rng.random(400) < 0.25
    naive = [hits[rng.integers(0, 400, 400)].mean() for _ in range(4000)]
    assert _interval(hits, 4000, 0) == pytest.approx(np.percentile(naive, [2.5, 97.5]), abs=0.006)


def test_pool_curve_ends_at_the_report_and_falls():
    images, captions, owner = noisy(300, 600, captions=2, noise=4.0)
    texts = [f"t{i % 550}" for i in range(600)]
    curve, report = pool_curve(images, captions, owner, texts, sizes=(32, 100, 1000)), retrieval_report(images, captions, owner, texts)
    assert [c["images"] for c in curve] == [32, 100, 300]
    for way in WAYS:
        assert curve[-1][way] == pytest.approx({k: report[way][k] for k in ("R@1", "R@5", "R@10")})
        assert curve[0][way]["R@1"] > curve[1][way]["R@1"] > curve[2][way]["R@1"]


def test_normal_approximation_of_the_median_is_close():
    rng = np.random.default_rng(0)
    chance, times = rng.random((40, 60)), np.full(60, 5)
    exact = np.array([_at_most(chance, times, n) for n in range(120, 190, 10)])
    twice = np.array([_at_most(np.repeat(chance, 5, 1), np.ones(300, int), n) for n in range(120, 190, 10)])
    close = np.array([_at_most(np.concatenate([chance, np.zeros((40, 1))], 1), np.append(times, 1), n) for n in range(120, 190, 10)])  # 301 events, one impossible
    assert np.allclose(exact, twice) and np.abs(exact - close).max() < 1e-3


# --- input that can't be measured

@pytest.mark.parametrize("change,message", [
    (dict(image_emb=torch.full((5, 4), float("nan"))), "5 of 5 rows of image_emb hold NaN"),
    (dict(text_emb=torch.tensor([[1., 2, 3, float("inf")]] + [[1.] * 4] * 4)), "1 of 5 rows of text_emb hold NaN"),
    (dict(image_emb=torch.ones(5)), r"image_emb must be a floating-point matrix"),
    (dict(image_emb=torch.ones(5, 4, dtype=torch.long)), "floating-point"),
    (dict(text_emb=torch.ones(5, 3)), "4 dimensions and text_emb 3"),
    (dict(text_image=[0, 1, 2]), "one whole number for each of the 5 texts"),
    (dict(text_image=[0., 1, 2, 3, 4]), "one whole number"),
    (dict(text_image=[0, 1, 2, 3, 5]), "rows 0 to 5, but image_emb has rows 0 to 4"),
    (dict(text_image=[-1, 1, 2, 3, 4]), "rows -1 to 4"),
    (dict(text_emb=torch.ones(0, 4), text_image=np.zeros(0, int)), "at least one"),
    (dict(texts=["a"]), "1 captions for 5 rows"),
])
def test_errors_say_what_is_wrong(change, message):
    arguments = dict(image_emb=torch.eye(5, 4), text_emb=torch.eye(5, 4), text_image=list(range(5)), texts=None) | change
    with pytest.raises(ValueError, match=message): retrieval_report(**arguments)
    if "texts" not in change:
        with pytest.raises(ValueError, match=message): batch_recall(*list(arguments.values())[:3])


def test_config_is_closed():
    with pytest.raises(ValueError): EvaluateConfig(batchsize=32)
    images, captions, owner = noisy(64, 64)
    assert retrieval_report(images, captions, owner, config=EvaluateConfig(batch_size=16))["batchwise"]["size"] == 16
