"Splits: no group on two sides, exact sizes, the same under a seed, and files that can't be changed unnoticed."
import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import assume, given, settings, strategies as st

from radclip.splits import (SPLITS, apply_split, assign_splits, check_groups, check_ids, cut_splits, group_order, load_split, only_split, save_split, some_groups,
                            split_hash, split_pairs, without_straddling)

GROUPS = st.lists(st.integers(0, 40).map(str), min_size=1, max_size=120)


def table(groups, splits=None):
    n = len(groups)
    return Dataset.from_dict(dict(image_id=[f"i{k}" for k in range(n)], group=list(groups), split=list(splits or ["train"] * n), captions=[["a"]] * n))


def sides(groups, splits):
    seen = defaultdict(set)
    for group, split in zip(groups, splits): seen[group].add(split)
    return seen


@settings(max_examples=150, deadline=None)
@given(GROUPS, st.integers(0, 5), st.tuples(*[st.integers(0, 10)] * 3))
def test_fractions_never_break_a_group_and_use_every_row(groups, seed, parts):
    assume(sum(parts))
    fractions = {s: p / sum(parts) for s, p in zip(SPLITS, parts)}
    splits = assign_splits(groups, fractions, seed=seed)
    assert all(len(s) == 1 for s in sides(groups, splits).values()) and "" not in splits
    assert {s for s in splits} <= {s for s in SPLITS if fractions[s] > 0}
    largest = max(Counter(groups).values())
    for split in SPLITS: assert abs((splits == split).sum() - fractions[split] * len(groups)) <= largest  # half a group at either end


@settings(max_examples=150, deadline=None)
@given(GROUPS, st.integers(0, 5), st.data())
def test_sizes_are_exact_and_break_no_group(groups, seed, data):
    names = data.draw(st.sets(st.sampled_from(SPLITS), min_size=1))
    sizes = {s: data.draw(st.integers(1, 30)) for s in names}
    try: splits = assign_splits(groups, {"train": 0.7, "validation": 0.15, "test": 0.15}, sizes, seed)
    except ValueError as error:
        assert "lower the sizes" in str(error) and sum(sizes.values()) + len(sizes) * max(Counter(groups).values()) > len(groups)
        return
    for split, size in sizes.items(): assert (splits == split).sum() == size
    assert all(len(s - {""}) <= 1 for s in sides(groups, splits).values())
    trimmed = [g for g, s in sides(groups, splits).items() if len(s) == 2]
    assert len(trimmed) <= len(sizes)  # only the last group of a split loses images


def test_the_same_seed_gives_the_same_split_whatever_the_order_of_rows():
    groups = [str(k // 2) for k in range(200)]
    split = lambda g, seed: dict(zip(g, assign_splits(g, {"train": 0.7, "validation": 0.15, "test": 0.15}, seed=seed)))
    assert split(groups, 1) == split(groups[::-1], 1) != split(groups, 2)


def test_the_test_set_stays_when_training_grows_and_groups_keep_their_order():
    groups = [str(k // 3) for k in range(300)]
    small, large = (assign_splits(groups, {"train": 0.7, "validation": 0.15, "test": 0.15}, {"train": n, "test": 50}) for n in (60, 150))
    assert np.array_equal(small == "test", large == "test") and (large[small == "train"] == "train").all()
    order = group_order(groups)
    assert [g for g in group_order([*groups, "new"]) if g != "new"] == order and set(order) == set(groups)


def test_fractions_of_many_groups_come_out_close():
    splits = assign_splits([str(k) for k in range(10_000)], {"train": 0.7, "validation": 0.15, "test": 0.15})
    assert Counter(splits.tolist()) == dict(train=7000, validation=1500, test=1500)


@pytest.mark.parametrize("kwargs, words", [(dict(fractions={"train": 0.5}), "add up to 1"), (dict(fractions={"train": 1.5, "test": -0.5}), "add up to 1"),
                                           (dict(fractions={"trian": 1.0}), "did you mean 'train'"), (dict(sizes={"tset": 3}), "did you mean 'test'"),
                                           (dict(sizes={"test": 0}), "at least 1"), (dict(sizes={"test": 99}), "asks for 99 test images, and 6 are left")])
def test_a_split_that_cannot_be_is_one_clear_error(kwargs, words):
    with pytest.raises(ValueError, match=words): split_pairs(table("aabbcc"), **kwargs)


def test_split_pairs_leaves_out_what_has_no_split_and_keeps_the_rest_of_the_row():
    pairs = split_pairs(table([str(k // 2) for k in range(20)]).add_column("age", list(range(20))), sizes=dict(train=7, validation=3, test=3))
    assert Counter(pairs["split"]) == dict(train=7, validation=3, test=3)
    assert all(name == f"i{age}" for name, age in zip(pairs["image_id"], pairs["age"]))
    check_groups(pairs)


def test_official_splits_are_cut_without_mixing():
    groups = [str(k // 3) for k in range(60)]
    official = ["test" if int(g) < 8 else "train" for g in groups]
    pairs = table(groups, official)
    cut = cut_splits(pairs, dict(test=10))
    assert Counter(cut["split"]) == dict(test=10, train=36)
    was = dict(zip(pairs["image_id"], pairs["split"]))
    assert all(was[name] == split for name, split in zip(cut["image_id"], cut["split"]))
    with pytest.raises(ValueError, match="asks for 5 validation images, and 0"): cut_splits(pairs, dict(validation=5))


def test_groups_that_straddle_are_named():
    with pytest.raises(ValueError, match=r"2 groups lie in more than one split \(a, c\)"): check_groups(table("aabcc", ["train", "test", "test", "train", "validation"]))
    check_groups(table("aabcc", ["train", "train", "test", "test", "test"]))


def test_double_ids_are_named():
    pairs = Dataset.from_dict(dict(image_id=["x", "y", "x"]))
    with pytest.raises(ValueError, match="'x'"): check_ids(pairs)


def test_an_absent_split_lists_those_present():
    pairs = table("abc", ["train", "train", "validation"])
    with pytest.raises(ValueError, match=r"no split 'test'.*train \(2\), validation \(1\)"): only_split(pairs, "test")
    assert only_split(pairs, "dev")["image_id"] == ["i2"]


def test_a_small_start_takes_whole_groups():
    pairs = table([str(k // 4) for k in range(40)])
    some = some_groups(pairs, 3, seed=1)
    assert len(some) == 12 and len(set(some["group"])) == 3 and len(some_groups(pairs, 99, 1)) == 40
    assert set(some["group"]) < set(some_groups(pairs, 5, 1)["group"])
    with pytest.raises(ValueError, match="at least 1"): some_groups(pairs, 0, 1)


def test_a_split_survives_its_file_and_a_changed_file_is_refused(tmp_path):
    pairs = split_pairs(table([str(k // 2) for k in range(20)]))
    path = save_split(pairs, tmp_path / "deep" / "split.json")
    ids = load_split(path)
    assert split_hash(ids) == split_hash(pairs) and len(split_hash(pairs)) == 16
    again = apply_split(table([str(k // 2) for k in range(20)]), ids)
    assert split_hash(again) == split_hash(pairs) and again["split"] == pairs["split"]
    data = json.loads(path.read_text()); data["splits"]["train"].append(data["splits"]["test"].pop())
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="changed after it was saved"): load_split(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="no split file"): load_split(path)
    with pytest.raises(FileNotFoundError, match="no split file"): load_split(tmp_path / "none.json")
    assert [p.name for p in path.parent.iterdir()] == ["split.json"]


def test_the_hash_knows_who_is_where_and_nothing_else():
    pairs = table("aabb", ["train", "train", "test", "test"])
    assert split_hash(pairs) == split_hash(pairs.select([3, 1, 0, 2]))
    assert split_hash(pairs) != split_hash(table("aabb", ["train", "test", "test", "test"])) and split_hash(pairs) != split_hash(pairs.select([0, 1, 2]))


def test_a_split_of_another_source_is_refused_and_missing_images_are_counted():
    pairs = table("aab")
    with pytest.raises(ValueError, match="another source"): apply_split(pairs, dict(train=["x"]))
    with pytest.warns(UserWarning, match="1 of the split's 3 images are not in the table"): apply_split(pairs, dict(train=["i0", "i1"], test=["elsewhere"]))
    with pytest.raises(ValueError, match="lie in more than one split"): apply_split(pairs, dict(train=["i0"], test=["i1"]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15).map(str), st.sampled_from(SPLITS)), min_size=1, max_size=60), st.permutations(SPLITS))
def test_a_cleaned_split_has_no_group_on_two_sides(rows, keep):
    pairs = table(*zip(*rows))
    ids = without_straddling(pairs, keep)
    group = dict(zip(pairs["image_id"], pairs["group"]))
    groups = {split: {group[name] for name in names} for split, names in ids.items()}
    for a in groups:
        for b in groups: assert a == b or not groups[a] & groups[b]
    assert set().union(*groups.values()) == set(pairs["group"])  # no group is lost
    was = {split: set(only_split(pairs, split)["image_id"]) for split in set(pairs["split"])}
    assert all(set(names) <= was[split] for split, names in ids.items())
    if keep[0] in was: assert set(ids[keep[0]]) == was[keep[0]]  # the first keeps all


def test_cleaning_wants_an_order_of_all_splits():
    with pytest.raises(ValueError, match="keep must order"): without_straddling(table("ab"), ("test", "train"))
