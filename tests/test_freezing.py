"""What trains, at which rate, and that a stored trunk changes nothing."""
import copy

import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP

from radclip.freezing import (FreezeConfig, blocks_of, freeze, interpolate, parameter_groups, place, train_mode,
                              trainable_table)
from radclip.model import DualEncoder, build_model, save_model
from radclip.trunks import frozen_trunk

CAPTIONS = ["Large right pleural effusion.", "Small left subdural hematoma.", "No pneumothorax."] * 3
VIT = {"image_size": 32, "layers": 6, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 6}
TIMM = {"kind": "timm", "image_size": 64, "text_width": 32, "text_layers": 4, "text_heads": 2, "context_length": 12}


def vit(cls=CLIP, vision=(), **text):
    return cls(embed_dim=24, vision_cfg={**VIT, **dict(vision)}, text_cfg={**TEXT, **text})


MAKE = {
    "clip": vit,
    "custom-eos": lambda: vit(CustomTextCLIP, pool_type="eos", eos_id=3),
    "two-way": lambda: vit(CustomTextCLIP, pool_type="first", no_causal_mask=True),
    "vit-average": lambda: vit(vision={"pool_type": "avg", "final_ln_after_pool": True}, pool_type="last"),
    "vit-attention": lambda: vit(vision={"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}),
    "phantom": lambda: build_model("phantom", CAPTIONS).model,
    "resnet-bert": lambda: build_model({**TIMM, "image_tower": "resnet18", "text_pool": "mean"}, CAPTIONS).model,
    "mobilenet": lambda: build_model({**TIMM, "image_tower": "mobilenetv2_035", "text_pool": "cls"}, CAPTIONS).model,
    "attention-head": lambda: build_model({**TIMM, "image_tower": "test_efficientnet", "timm_pool": "rot_attn",
                                           "timm_proj": "", "text_pool": "cls"}, CAPTIONS).model,
    "timm-vit": lambda: build_model({**TIMM, "image_tower": "test_vit", "image_size": 160}, CAPTIONS).model,
    "resnet-clip": lambda: vit(vision={"layers": [1, 2, 1, 1], "width": 16, "head_width": 32}),
}
SETTINGS = [{"last": 0.3}, {"image": "projection", "text": "projection"}, {"image": "all", "text": "all"},
            {"image": "all", "text": 0.5}, {"image": 0.5, "text": "projection"}, {}]


@pytest.fixture(scope="module", params=MAKE)
def case(request):
    torch.manual_seed(0)
    model = MAKE[request.param]()
    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    tokens = torch.randint(5, 14, (4, 12 if request.param != "phantom" else 48))
    for i, end in enumerate((3, 5, 8, 11)):
        tokens[i, end], tokens[i, end + 1:] = 3, 0
    return request.param, model, torch.randn(4, 3, size, size), tokens


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_gradients_reach_what_trains_and_nothing_else(case, setting):
    _, model, images, tokens = case
    train_mode(freeze(model, setting))
    model.zero_grad(set_to_none=True)
    a, b = model.encode_image(images), model.encode_text(tokens)
    ((a @ b.T).square().sum() * model.logit_scale.exp()).backward()
    for name, p in model.named_parameters():
        assert p.requires_grad or p.grad is None, name
        idle = name.endswith("position_embeddings.weight") or "cls_token" in name
        assert not p.requires_grad or p.grad is not None or idle, name
    table = trainable_table(model)
    assert table.total.parameters == sum(p.numel() for p in model.parameters())
    assert table.total.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.eval()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_head_of_trunk_equals_the_towers_own_features(case, setting):
    kind, model, images, tokens = case
    train_mode(freeze(model, setting))
    modes = [m.training for m in model.modules()]
    for side, x, encode in (("image", images, model.encode_image), ("text", tokens, model.encode_text)):
        choice = setting.get("last", setting.get(side, "none"))
        split = frozen_trunk(model, side)
        if split is None:
            assert choice == "none" or (side == "image" and kind == "resnet-clip")
            continue
        trunk, head = split
        stored = trunk(x)
        assert not stored.requires_grad and [m.training for m in model.modules()] == modes
        model.eval()
        assert torch.equal(head(stored), encode(x))
        assert torch.allclose(head(stored[1:3]), encode(x)[1:3], atol=1e-5)  # rows can be drawn in any order
        train_mode(model)
        if choice != "all":
            assert head(stored).requires_grad


def test_a_stored_trunk_gives_the_same_gradients(case):
    _, model, images, tokens = case
    freeze(model, {"image": "projection", "text": 0.5})
    model.eval()
    split = frozen_trunk(model, "text")
    grads = []
    for features in (lambda: model.encode_text(tokens), lambda: split[1](split[0](tokens))):
        model.zero_grad(set_to_none=True)
        features().square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    assert all(torch.allclose(grads[0][n], grads[1][n], rtol=1e-4, atol=1e-6) for n in grads[0])


@pytest.mark.parametrize("kind", ["phantom", "resnet-bert", "mobilenet", "timm-vit"])
def test_a_stored_part_of_a_timm_trunk_gives_the_same_gradients(kind):
    model = MAKE[kind]()
    size = model.visual.image_size
    images = torch.randn(3, 3, *size)
    train_mode(freeze(model, {"image": 0.4}))
    trunk, head = frozen_trunk(model, "image")
    stored, grads = trunk(images), []
    assert stored.shape != head(stored).shape and any(p.requires_grad for p in model.visual.trunk.parameters())
    for features in (lambda: model.encode_image(images), lambda: head(stored)):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)  # the same dropout
        features().square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    assert all(torch.allclose(grads[0][n], grads[1][n], rtol=1e-3, atol=1e-5) for n in grads[0])


def test_a_trunk_whose_last_block_looks_back_past_the_first_trained_one_is_not_split():
    model = MAKE["resnet-bert"]()
    inner = model.visual.trunk.forward_features
    model.visual.trunk.forward_features = lambda x: inner(x) + x.mean()
    freeze(model, {"image": 0.3})
    assert frozen_trunk(model, "image") is None


def test_last_third_of_twelve_blocks_is_four_with_norm_and_projection():
    model = freeze(CLIP(24, {**VIT, "layers": 12}, {**TEXT, "layers": 12}), {"last": 0.3})
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for prefix in ("visual.transformer", "transformer"):
        assert {int(n.removeprefix(prefix).split(".")[2]) for n in trained if n.startswith(prefix + ".")} == {8, 9, 10, 11}
    assert {"visual.ln_post.weight", "visual.proj", "ln_final.bias", "text_projection", "logit_scale"} <= trained
    assert not {"visual.conv1.weight", "visual.class_embedding", "visual.positional_embedding", "visual.ln_pre.weight",
                "token_embedding.weight", "positional_embedding"} & trained


def test_freezing_again_starts_anew():
    model = freeze(freeze(vit(), {"image": "all", "text": "all"}), {"image": "all"})
    assert all(p.requires_grad for n, p in model.named_parameters() if place(n).side == "text")


@pytest.mark.parametrize("name, expected", [
    ("visual.trunk.blocks.3.1.conv_pw.weight", ("image", "block", (3, 1))), ("visual.trunk.bn2.weight", ("image", "top", ())),
    ("visual.bn2.weight", ("image", "stem", ())), ("visual.trunk.layer4.1.bn2.bias", ("image", "block", (4, 1))),
    ("visual.trunk.stages.2.blocks.5.mlp.fc1.weight", ("image", "block", (2, 5))),
    ("visual.head.proj.weight", ("image", "projection", ())), ("visual.attnpool.c_proj.weight", ("image", "projection", ())),
    ("visual.trunk.patch_embed.proj.weight", ("image", "stem", ())), ("visual.trunk.norm.weight", ("image", "top", ())),
    ("visual.trunk.norm_pre.weight", ("image", "stem", ())), ("visual.transformer.resblocks.11.attn.out_proj.bias", ("image", "block", (11,))),
    ("text.transformer.encoder.layer.2.output.LayerNorm.bias", ("text", "block", (2,))),
    ("text.transformer.embeddings.LayerNorm.weight", ("text", "stem", ())), ("text.proj.0.weight", ("text", "projection", ())),
    ("text_projection", ("text", "projection", ())), ("logit_bias", ("temperature", "top", ()))])
def test_places(name, expected):
    assert place(name) == expected


def test_errors_say_what_is_wrong():
    model = vit()
    model.text_projection = None
    with pytest.raises(ValueError, match="freeze.text: projection"):
        freeze(model, {"text": "projection"})
    assert blocks_of(torch.nn.Linear(2, 2), "image") == []
    with pytest.raises(ValueError, match="text tower's parameter names show no blocks"):
        freeze(build_model({**TIMM, "image_tower": "mobilenetv2_035", "text_pool": "mean", "text_layers": 0}, CAPTIONS).model, {"last": 0.3})
    with pytest.raises(ValueError, match="lst"):
        FreezeConfig(lst=0.3)
    with pytest.raises(ValueError):
        FreezeConfig(image=1.5)


# --- parameter groups -----------------------------------------------------------------------------------------------

def test_groups_hold_each_trained_parameter_once(case):
    _, model, _, _ = case
    for setting in SETTINGS:
        freeze(model, setting)
        groups = parameter_groups(model, 1e-3, 0.1, 0.7)
        ids = [id(p) for g in groups for p in g["params"]]
        assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
        for group in groups:
            assert group["weight_decay"] == 0 or all(p.ndim > 1 for p in group["params"])


def test_rates_shrink_by_the_factor_from_block_to_block():
    model = freeze(vit())
    rate = {id(p): g["lr"] for g in parameter_groups(model, 1.0, 0.1, 0.5) for p in g["params"]}
    of = {n: rate[id(p)] for n, p in model.named_parameters()}
    assert of["visual.proj"] == of["visual.ln_post.weight"] == of["logit_scale"] == 1.0
    assert [of[f"visual.transformer.resblocks.{i}.ln_1.weight"] for i in range(6)] == [0.5 ** (6 - i) for i in range(6)]
    assert of["visual.conv1.weight"] == of["token_embedding.weight"] == 0.5 ** 7


def test_without_layer_decay_there_is_one_rate_and_no_decay_on_norms():
    groups = parameter_groups(vit(), 1e-3, 0.2)
    assert {g["lr"] for g in groups} == {1e-3} and {g["weight_decay"] for g in groups} == {0.0, 0.2}
    spared = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    model = vit()
    groups = parameter_groups(model, 1e-3, 0.2)
    spared = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in spared}
    assert {"logit_scale", "positional_embedding", "visual.positional_embedding", "visual.ln_post.bias"} <= names
    assert not {"visual.proj", "text_projection", "token_embedding.weight", "visual.conv1.weight"} & names


# --- modes and interpolation ----------------------------------------------------------------------------------------

def test_frozen_batch_norm_keeps_its_statistics_where_plain_train_moves_them():
    model = freeze(MAKE["phantom"](), {"image": "projection"})
    before = copy.deepcopy(model.visual.trunk.state_dict())
    train_mode(model)
    model.encode_image(torch.randn(4, 3, 128, 128))
    assert all(torch.equal(v, before[k]) for k, v in model.visual.trunk.state_dict().items())
    assert model.visual.head.training and model.text.training and not model.visual.trunk.training
    model.train()
    model.encode_image(torch.randn(4, 3, 128, 128))
    assert any(not torch.equal(v, before[k]) for k, v in model.visual.trunk.state_dict().items())


def test_dropout_of_a_frozen_tower_sleeps():
    model = train_mode(freeze(MAKE["resnet-bert"](), {"text": "projection"}))
    tokens = torch.randint(5, 14, (2, 12))
    assert torch.equal(model.encode_text(tokens), model.encode_text(tokens))
    train_mode(freeze(model))
    assert not torch.equal(model.encode_text(tokens), model.encode_text(tokens))


def test_interpolation_meets_both_ends_and_the_middle(tmp_path):
    torch.manual_seed(0)
    start = build_model("phantom", CAPTIONS)
    end = DualEncoder(copy.deepcopy(start.model), *start[1:])
    with torch.no_grad():
        for p in end.model.parameters():
            p.add_(torch.randn_like(p))
        end.model.visual.trunk.stem[0][1].num_batches_tracked += 7
    a, b = start.model.state_dict(), end.model.state_dict()
    assert all(torch.equal(v, a[k]) for k, v in interpolate(start, end, 0.0).model.state_dict().items())
    assert all(torch.allclose(v, b[k]) for k, v in interpolate(start, end, 1.0).model.state_dict().items())
    middle = interpolate(a, b, 0.5)
    assert torch.allclose(middle["text.text_projection"], (a["text.text_projection"] + b["text.text_projection"]) / 2)
    folders = [save_model(e, tmp_path / n) for e, n in ((start, "a"), (end, "b"))]
    assert torch.allclose(interpolate(*folders, 0.25).model.text.text_projection, torch.lerp(a["text.text_projection"], b["text.text_projection"], 0.25))
    assert all(torch.equal(v, a[k]) for k, v in start.model.state_dict().items())


def test_interpolation_refuses_different_architectures():
    with pytest.raises(ValueError, match="architectures"):
        interpolate(vit().state_dict(), vit(width=64).state_dict(), 0.5)
    with pytest.raises(ValueError, match="architectures"):
        interpolate(vit().state_dict(), vit(CustomTextCLIP).state_dict(), 0.5)


def test_table_prints_ranges_of_blocks():
    text = str(trainable_table(freeze(vit(), {"last": 0.3})))
    assert "image blocks 0-3" in text and "image blocks 4-5" in text and "total" in text


def test_layer_decay_of_a_bag_of_words_beside_a_deep_tower():
    model = build_model({**TIMM, "image_tower": "mobilenetv2_035", "text_pool": "mean", "text_layers": 0}, CAPTIONS).model
    rates = {id(p): group["lr"] for group in parameter_groups(freeze(model), 1.0, 0.1, layer_decay=0.5) for p in group["params"]}
    of = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert of["text.proj.weight"] == of["visual.head.proj.weight"] == 1 and of["visual.trunk.blocks.6.0.conv_pw.weight"] == 0.5
    assert of["text.transformer.embeddings.word_embeddings.weight"] == 0.5


def test_a_frozen_bag_of_words_is_stored_whole():
    for text in ({"text_pool": "mean", "text_layers": 0, "text_width": 32, "text_heads": 2}, {"text_tower": "ngrams", "text_width": 8}):
        stored_whole(build_model({"kind": "timm", "image_size": 64, "context_length": 12, "image_tower": "regnetx_002", **text},
                                 [*CAPTIONS, "Large left hematoma.", "No pleural effusion."]).model.eval())


def stored_whole(model):
    "Both sides of a model of which the projections alone train."
    freeze(model, {"image": "projection", "text": "projection"})
    images, tokens = torch.randn(2, 3, 64, 64), torch.randint(1, 9, (2, 12))
    for side, x, encode in (("image", images, model.encode_image), ("text", tokens, model.encode_text)):
        trunk, head = frozen_trunk(model, side)
        assert trunk(x).ndim == 2 and torch.equal(head(trunk(x)), encode(x))
