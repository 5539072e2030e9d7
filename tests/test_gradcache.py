"The gradient cache against one backward pass through the whole batch."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from radclip.gradcache import GradCache, RandomState
from radclip.losses import clip_loss, siglip_loss


class Towers(nn.Module):
    "Two small towers with a temperature and a bias, all of which train."

    def __init__(self, dropout=0.0, norm=False):
        super().__init__()
        torch.manual_seed(0)
        tower = lambda: nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24) if norm else nn.Identity(), nn.GELU(), nn.Dropout(dropout), nn.Linear(24, 8))
        self.image, self.text = tower(), tower()
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-1.0))

    def embed_image(self, x): return F.normalize(self.image(x), dim=-1)

    def embed_text(self, x): return F.normalize(self.text(x), dim=-1)

    def clip(self, a, b): return clip_loss(a, b, self.logit_scale.exp())

    def siglip(self, a, b): return siglip_loss(a, b, self.logit_scale.exp(), self.logit_bias)


def gradients(model): return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def inputs(n=13, extra=0, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(n, 12, dtype=dtype), torch.randn(n + extra, 12, dtype=dtype)


def whole_batch(model, loss, x, y, micro):
    "The reference: one graph over everything; dropout drawn piece by piece in the cache's order."
    torch.manual_seed(2)
    a = torch.cat([model.embed_image(p) for p in x.split(micro)])
    b = torch.cat([model.embed_text(p) for p in y.split(micro)])
    value = loss(a, b)
    value.backward()
    return value.detach(), gradients(model)


def cached(model, loss, x, y, micro):
    model.zero_grad()
    torch.manual_seed(2)
    return GradCache([model.embed_image, model.embed_text], loss, micro)(x, y), gradients(model)


def assert_equal_gradients(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name in wanted: assert (found[name] - wanted[name]).norm() <= tolerance * wanted[name].norm(), name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("micro", [1, 4, 13, 50])
def test_gradients_equal_the_whole_batch(dtype, tolerance, dropout, kind, micro):
    model = Towers(dropout).to(dtype)
    loss = getattr(model, kind)
    x, y = inputs(dtype=dtype)
    value, wanted = whole_batch(model, loss, x, y, micro)
    again, found = cached(model, loss, x, y, micro)
    assert torch.allclose(value, again, rtol=1e-6)
    assert "logit_scale" in found and ("logit_bias" in found) == (kind == "siglip")
    assert_equal_gradients(found, wanted, tolerance)


def test_without_the_random_state_dropout_would_give_other_gradients(monkeypatch):
    "The planted fault: what the cache would do if it did not draw the same masks again."
    from contextlib import nullcontext
    monkeypatch.setattr(RandomState, "again", lambda self: nullcontext())
    model = Towers(0.4)
    x, y = inputs()
    _, wanted = whole_batch(model, model.clip, x, y, 4)
    _, found = cached(model, model.clip, x, y, 4)
    off = max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted if n.startswith(("image", "text")))
    assert off > 0.1


def test_batchnorm_in_eval_mode_is_exact():
    model = Towers(norm=True)
    model.eval()
    x, y = inputs()
    _, wanted = whole_batch(model, model.clip, x, y, 4)
    _, found = cached(model, model.clip, x, y, 4)
    assert_equal_gradients(found, wanted, 1e-5)


def test_extra_negative_texts_and_a_frozen_tower():
    model = Towers()
    for p in model.image.parameters(): p.requires_grad_(False)
    x, y = inputs(extra=5)
    _, wanted = whole_batch(model, model.clip, x, y, 4)
    model.zero_grad()
    calls = []
    encode = lambda piece: calls.append(len(piece)) or model.embed_image(piece)
    GradCache([encode, model.embed_text], model.clip, 4, trains=[False, True])(x, y)
    assert_equal_gradients(gradients(model), wanted, 1e-5)
    assert calls == [4, 4, 4, 1]  # the frozen tower ran once


def test_gradients_add_up_over_calls_and_scale_with_backward():
    "Accumulation on top of the cache, and a scaled backward as fp16 needs it."
    model = Towers()
    x, y = inputs()
    _, once = cached(model, model.clip, x, y, 4)
    GradCache([model.embed_image, model.embed_text], model.clip, 4)(x, y, backward=lambda loss: (loss * 8).backward())
    assert_equal_gradients(gradients(model), {n: 9 * g for n, g in once.items()}, 1e-5)


def test_the_random_stream_goes_on_as_after_one_forward_pass():
    model = Towers(0.4)
    x, y = inputs()
    whole_batch(model, model.clip, x, y, 4)
    after = torch.rand(3)
    cached(model, model.clip, x, y, 4)
    assert torch.equal(torch.rand(3), after)


def test_no_graph_spans_more_than_a_micro_batch():
    model = Towers()
    sizes = []
    def encode(piece):
        if torch.is_grad_enabled(): sizes.append(len(piece))
        return model.embed_image(piece)
    GradCache([encode, model.embed_text], model.clip, 3)(*inputs())
    assert sizes == [3, 3, 3, 3, 1]
