"""Neighbours: every kind against a brute-force oracle, ties, filters, files, and the choice of settings."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radclip.neighbours import (BUILDERS, EXACT_UP_TO, VectorIndex, choose_kind, exact_search, measure, pick_setting,
                                plot_tuning, read_vectors, top_rows, write_vectors)


def clumps(count, width=32, seed=0):
    "Unit vectors in clumps, as a model's are."
    draw = np.random.default_rng(seed)
    made = draw.standard_normal((40, width))[draw.integers(0, 40, count)] + 0.6 * draw.standard_normal((count, width))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype("float32")


def oracle(vectors, queries, k, rows=None):
    "Full sort in double precision; equals in the order of their rows."
    rows = np.arange(len(vectors)) if rows is None else rows
    scores = queries.astype("float64") @ vectors[rows].astype("float64").T
    return rows[np.argsort(-scores, axis=1, kind="stable")[:, :k]]


@pytest.fixture(scope="module")
def built():
    vectors = clumps(3000)
    return vectors, clumps(50, seed=1), {kind: VectorIndex.build(vectors, kind) for kind in BUILDERS}


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_top_rows_is_a_stable_sort(seed, k, levels):
    scores = torch.from_numpy(np.random.default_rng(seed).integers(0, levels, (3, 12)).astype("float32"))
    values, columns = top_rows(scores, k)
    expected = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :k]
    assert (columns.numpy() == expected).all()
    assert (values == scores.gather(1, columns)).all()


@pytest.mark.parametrize("count", [1, 1023, 1024, 16384, 40000])  # around the tile's edges
def test_exact_search_equals_a_full_sort(count):
    vectors, queries = clumps(count, 8), clumps(3, 8, seed=2)
    k = min(7, count)
    scores, found = exact_search(vectors, queries, k)
    expected = np.take_along_axis(queries @ vectors.T, oracle(vectors, queries, k), 1)
    assert np.allclose(scores, expected, atol=1e-6)
    assert np.allclose(np.take_along_axis(queries @ vectors.T, found, 1), scores, atol=1e-6)


def test_exact_search_ties_go_to_the_lower_row_across_tiles():
    vectors = np.tile(clumps(1, 8), (40_000, 1))
    for rows in (None, np.arange(5, 40_000, 3)):
        _, found = exact_search(vectors, vectors[:2], 4, rows)
        assert found.tolist() == [(np.arange(4) if rows is None else rows[:4]).tolist()] * 2


def test_exact_kind_equals_brute_force(built):
    vectors, queries, made = built
    assert (made["exact"].search(queries, 10)[1] == oracle(vectors, queries, 10)).all()


@pytest.mark.parametrize("kind, least", [("hnsw", 0.99), ("compressed", 0.95)])
def test_shortcuts_find_nearly_all(built, kind, least):
    vectors, queries, made = built
    found, truth = made[kind].search(queries, 10)[1], oracle(vectors, queries, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth)]) >= least


@pytest.mark.parametrize("kind", BUILDERS)
def test_scores_are_true_cosines_in_falling_order(built, kind):
    vectors, queries, made = built
    scores, found = made[kind].search(queries, 10)
    assert np.allclose(scores, (queries[:, None] * vectors[found]).sum(2), atol=1e-5)
    assert (np.diff(scores) <= 0).all()
    assert all(len(set(row)) == 10 for row in found.tolist())


@pytest.mark.parametrize("kind", BUILDERS)
def test_filter_equals_brute_force_over_the_rows(built, kind):
    vectors, queries, made = built
    for rows in (np.arange(7, 3000, 11), np.array([5]), np.arange(2990)):
        k = min(10, len(rows))
        assert (made[kind].search(queries, k, rows=rows)[1] == oracle(vectors, queries, k, rows)).all()
    assert made[kind].search(queries, 5, rows=np.array([], dtype=int))[1].shape == (50, 0)


@pytest.mark.parametrize("kind", BUILDERS)
def test_more_asked_for_than_there_is(built, kind):
    vectors, queries, made = built
    found = made[kind].search(queries[:2], 10_000)[1]
    assert found.shape == (2, 3000) and sorted(found[0].tolist()) == list(range(3000))


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("count", [1, 2, 30, 400])
def test_small_collections_work_in_every_kind(kind, count):
    vectors = clumps(count, 6)
    found = VectorIndex.build(vectors, kind).search(vectors[:1], 1)[1]
    assert np.isclose(vectors[found[0, 0]] @ vectors[0], 1, atol=1e-5)


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_build_is_the_same_each_time(built, kind, tmp_path):
    vectors, queries, made = built
    again = VectorIndex.build(vectors, kind)
    for name, index in {"one": made[kind], "two": again}.items():
        write_vectors(index, tmp_path, name)
    assert (tmp_path / "one.faiss").read_bytes() == (tmp_path / "two.faiss").read_bytes()


@pytest.mark.parametrize("kind", BUILDERS)
def test_files_bring_the_same_answers(built, kind, tmp_path):
    vectors, queries, made = built
    write_vectors(made[kind], tmp_path, "images")
    again = read_vectors(tmp_path, "images", kind, made[kind].settings)
    for one, two in zip(made[kind].search(queries, 10), again.search(queries, 10)):
        assert (one == two).all()
    assert np.array_equal(again.vectors, vectors)


def test_compressed_vectors_stay_on_disk(built, tmp_path):
    _, _, made = built
    write_vectors(made["compressed"], tmp_path, "images")
    assert isinstance(read_vectors(tmp_path, "images", "compressed", {}).vectors, np.memmap)


def test_a_file_that_is_no_index(tmp_path):
    (tmp_path / "images.faiss").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="images.faiss is no FAISS file"):
        read_vectors(tmp_path, "images", "exact", {})


@pytest.mark.parametrize("spoil", [lambda v: v * 2, lambda v: v * np.nan, lambda v: v * 0, lambda v: v[:0]])
def test_vectors_that_are_no_unit_vectors_are_refused(spoil):
    with pytest.raises(ValueError, match="unit vector|nothing to index"):
        VectorIndex.build(spoil(clumps(10)))


def test_the_choice_of_kind():
    assert choose_kind(EXACT_UP_TO)[0] == "exact"
    assert choose_kind(EXACT_UP_TO + 1)[0] == "compressed"
    assert choose_kind(10**6, "hnsw")[0] == "hnsw"
    with pytest.raises(ValueError, match="unknown index kind 'hsnw'.*hnsw"):
        choose_kind(10, "hsnw")


def test_measure_agrees_with_a_recall_by_hand(built):
    vectors, queries, made = built
    grid = [{"efSearch": 10}, {"efSearch": 200}]
    rows = measure(made["hnsw"], queries, 10, grid)
    truth = oracle(vectors, queries, 10)
    for row, one in zip(rows, grid):
        found = np.concatenate([made["hnsw"].search(query[None], 10, settings=one)[1] for query in queries])
        by_hand = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth)])
        assert row["recall"] == pytest.approx(by_hand) and row["settings"] == one and row["ms"] > 0
    assert measure(made["exact"], queries)[0]["recall"] == 1


def test_measure_counts_either_of_two_equal_vectors():
    vectors = np.concatenate([clumps(100), clumps(100)])  # each vector twice: ten places, eleven or twelve equals
    assert measure(VectorIndex.build(vectors, "exact"), clumps(20, seed=3), k=9)[0]["recall"] == 1


def test_pick_setting_takes_the_quickest_above_the_target():
    table = [{"recall": r, "ms": ms} for r, ms in [(0.5, 0.1), (0.99, 0.4), (0.995, 0.3), (1.0, 2.0)]]
    assert pick_setting(table, 0.99) is table[2]
    assert pick_setting(table, 0.999) is table[3]
    assert pick_setting(table[:2], 0.999) is table[1]


def test_the_figure_shows_every_setting(built):
    import matplotlib
    matplotlib.use("Agg")
    _, queries, made = built
    rows = measure(made["hnsw"], queries[:3]) + measure(made["exact"], queries[:3])
    axes = plot_tuning(rows, title="made-up vectors").axes[0]
    assert axes.get_title() == "made-up vectors" and {t.get_text() for t in axes.get_legend().get_texts()} >= {"exact", "hnsw"}
