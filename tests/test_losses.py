"""The losses against open_clip, against loops, under gradcheck, and at the extremes."""
import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

from radclip.losses import (LossConfig, clip_loss, make_loss, margin_ranking_loss, multi_positive_clip_loss,
                            siglip_loss)

NAMES = ("clip", "multi_positive", "siglip", "margin")


def unit(n, d=16, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1).to(dtype)


def same_of(labels):
    labels = torch.tensor(labels)
    return labels[:, None] == labels[None]


@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("scale", [0.01, 1.0, 14.3, 100.0])
def test_clip_equals_open_clip_with_gradients(n, scale):
    x, y, s = unit(n).requires_grad_(), unit(n, seed=1).requires_grad_(), torch.tensor(scale, requires_grad=True)
    ours, theirs = clip_loss(x, y, s), ClipLoss()(x, y, s)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(ours, (x, y, s)), torch.autograd.grad(theirs, (x, y, s))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 5, 64])
def test_siglip_equals_open_clip_with_gradients(n):
    x, y = unit(n).requires_grad_(), unit(n, seed=1).requires_grad_()
    s, b = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    ours, theirs = siglip_loss(x, y, s, b), SigLipLoss()(x, y, s, b)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, c in zip(torch.autograd.grad(ours, (x, y, s, b)), torch.autograd.grad(theirs, (x, y, s, b))):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


def loop_loss(kind, x, y, scale, same, masked=False):
    "Softmax losses written out pair by pair in Python numbers."
    n, logits = len(x), [[scale * float(a @ b) for b in y] for a in x]
    rows = []
    for way in ("images", "texts"):
        for i in range(n):
            others = range(len(y)) if way == "images" else range(n)
            score = {j: logits[i][j] if way == "images" else logits[j][i] for j in others}
            match = [j for j in others if j == i or (j < n and (same[i][j] if way == "images" else same[j][i]))]
            if masked: score, match = {j: s for j, s in score.items() if j == i or j not in match}, [i]
            top = max(score.values())
            total = top + math.log(sum(math.exp(s - top) for s in score.values()))
            rows.append(sum(total - score[j] for j in match) / len(match))
    return sum(rows) / len(rows)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("extra", [0, 3])
def test_multi_positive_equals_the_loop(masked, extra):
    x, y, same = unit(6), unit(6 + extra, seed=1), same_of([0, 1, 0, 2, 1, 0])
    ours = multi_positive_clip_loss(x, y, 20.0, same, masked)
    assert ours.item() == pytest.approx(loop_loss("multi", x, y, 20.0, same, masked), rel=1e-5)


@pytest.mark.parametrize("extra", [0, 4])
def test_clip_equals_the_loop_with_extra_negatives(extra):
    x, y = unit(5), unit(5 + extra, seed=1)
    none = torch.zeros(5, 5, dtype=torch.bool)
    assert clip_loss(x, y, 9.0).item() == pytest.approx(loop_loss("clip", x, y, 9.0, none), rel=1e-5)


def test_extra_negatives_touch_only_the_images_question():
    x, y = unit(5), unit(5, seed=1)
    far = torch.cat([y, -x[:1]])            # points away from the first image: nearly no rival of it
    near = torch.cat([y, x[:1]])            # the hardest negative there can be for it
    assert clip_loss(x, near, 20.0) > clip_loss(x, far, 20.0) >= clip_loss(x, y, 20.0)
    for name in NAMES:
        if name != "margin": assert make_loss(name)(x, near, 20.0, -10.0) > make_loss(name)(x, y, 20.0, -10.0)


def test_a_shuffled_mask_moves_with_its_batch():
    x, y, same = unit(8), unit(8, seed=1), same_of([0, 0, 1, 2, 3, 3, 3, 4])
    p = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    for name in NAMES:
        for how in ("positive", "mask"):
            loss = make_loss({"name": name, "same": how})
            torch.testing.assert_close(loss(x, y, 10.0, -5.0, same), loss(x[p], y[p], 10.0, -5.0, same[p][:, p]))


def margin_by_loop(x, y, margin, hardest, same):
    n, s, total = len(x), x @ y.T, 0.0
    for i in range(n):
        rows = [max(0.0, margin + float(s[i, j] - s[i, i])) for j in range(len(y)) if j != i and not (j < n and same[i, j])]
        cols = [max(0.0, margin + float(s[j, i] - s[i, i])) for j in range(n) if j != i and not same[j, i]]
        total += (max(rows, default=0) + max(cols, default=0)) if hardest else sum(rows) + sum(cols)
    return total / n


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("extra", [0, 2])
def test_margin_equals_the_loop(hardest, extra):
    x, y, same = unit(7), unit(7 + extra, seed=1), same_of([0, 1, 0, 2, 3, 4, 1])
    ours = margin_ranking_loss(x, y, 0.3, hardest, same)
    assert ours.item() == pytest.approx(margin_by_loop(x, y, 0.3, hardest, same), rel=1e-5)


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("config", [{"name": n} for n in NAMES] + [{"name": "multi_positive", "same": "mask"}, {"name": "margin", "hardest": False}])
def test_gradients_match_finite_differences(config, extra):
    x, y = unit(4, 5, 0, torch.float64).requires_grad_(), unit(4 + extra, 5, 1, torch.float64).requires_grad_()
    s, b = torch.tensor(3.0, dtype=torch.float64, requires_grad=True), torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    loss = make_loss(config)
    assert torch.autograd.gradcheck(lambda *a: loss(*a, same_of([0, 1, 0, 2])), (x, y, s, b))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0, 1e5])
def test_finite_at_the_extremes(name, dtype, scale):
    for x, y in [(unit(16), unit(16, seed=1)), (unit(16), unit(16)), (unit(16), -unit(16)), (unit(1).expand(16, -1), unit(1).expand(16, -1))]:
        x, y = x.to(dtype).clone().requires_grad_(), y.to(dtype).clone().requires_grad_()
        value = make_loss(name)(x, y, scale, -10.0, torch.eye(16, dtype=torch.bool))
        value.backward()
        assert value.dtype == torch.float32 and value.isfinite()
        assert x.grad.isfinite().all() and y.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision():
    x, y = unit(32, 64), unit(32, 64, seed=1)
    for name in NAMES:
        loss = make_loss(name)
        outside = loss(x, y, 100.0, -10.0)
        with torch.autocast("cpu", dtype=torch.bfloat16): inside = loss(x, y, 100.0, -10.0)
        assert torch.equal(outside, inside)


def test_a_model_that_knows_nothing_pays_ln_batch():
    same = unit(1).expand(50, -1)
    for name in ("clip", "multi_positive"):
        assert make_loss(name)(same, same, 30.0).item() == pytest.approx(math.log(50), abs=1e-4)


def test_every_pair_the_same_costs_what_it_must():
    x, y, all_same = unit(6), unit(6, seed=1), torch.ones(6, 6, dtype=torch.bool)
    assert multi_positive_clip_loss(x, y, 20.0, all_same, masked=True).item() == 0
    assert margin_ranking_loss(x, y, positives=all_same).item() == 0
    equal = unit(1).expand(6, -1)
    assert multi_positive_clip_loss(equal, equal, 20.0, all_same).item() == pytest.approx(math.log(6), rel=1e-5)


def test_a_mask_that_leaves_out_the_diagonal_is_completed():
    x, y = unit(5), unit(5, seed=1)
    none = torch.zeros(5, 5, dtype=torch.bool)
    torch.testing.assert_close(multi_positive_clip_loss(x, y, 7.0, none), clip_loss(x, y, 7.0))
    torch.testing.assert_close(multi_positive_clip_loss(x, y, 7.0, none, masked=True), clip_loss(x, y, 7.0))


def test_config_refuses_what_it_does_not_know_and_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'siglip'"): LossConfig(name="siglp")
    with pytest.raises(ValueError, match="did you mean 'mask'"): LossConfig(same="masked")
    with pytest.raises(ValueError): LossConfig(temperature=1)
    assert make_loss("clip")(unit(3), unit(3), 1.0) == make_loss(LossConfig())(unit(3), unit(3), 1.0)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\[4, 16\]"): clip_loss(unit(4), unit(4, 8), 1.0)
    with pytest.raises(ValueError, match="4 images need a caption each"): clip_loss(unit(4), unit(3), 1.0)
    with pytest.raises(ValueError, match=r"\[3, 3\]"): multi_positive_clip_loss(unit(4), unit(4), 1.0, torch.ones(3, 3, dtype=torch.bool))
