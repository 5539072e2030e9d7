"""A CNN before the transformer: the grid, its positions, where it starts from, and folders that come back."""
import numpy as np
import pytest
import timm
import torch
from transformers import BlipVisionConfig, BlipVisionModel

from radclip.blip import build_captioner, load_captioner, save_captioner
from radclip.folder import load_model
from radclip.model import build_model, save_model
from radclip.stem import POSITION, add_overview, add_stem, grid_positions, linear_head, read_body, timm_body

CAPTIONS = ["Frontal chest radiograph shows a large right pleural effusion.", "Axial CT of the head.", "Ultrasound of the kidney."] * 3
SMALL = {"vision_width": 16, "vision_layers": 1, "vision_heads": 2, "text_width": 16, "text_layers": 1, "text_heads": 2, "max_length": 24}


def vision(size=128, patch=16, width=16):
    torch.manual_seed(0)
    return BlipVisionModel(BlipVisionConfig(hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                            image_size=size, patch_size=patch, initializer_range=0.2)).eval()


@pytest.mark.parametrize("name, size, patch, side", [("radclip_phantom_cnn", 128, 16, 8), ("radclip_phantom_cnn", 128, 8, 16),
                                                     ("resnet18", 64, 32, 2), ("mobilenetv2_100", 96, 32, 3)])
def test_a_cell_holds_what_the_map_holds_there(name, size, patch, side):
    model, body = vision(size, patch), timm_body(name).eval()
    add_stem(model, body, name)
    x = torch.randn(2, 3, size, size)
    stem = model.embeddings.patch_embedding
    with torch.no_grad():
        cells, made = stem(x), body.forward_features(x)
        kernel = stem.weight.shape[-1]
        for row, column in ((0, 0), (side - 1, 0), (0, side - 1)):
            part = made[:, :, row * kernel:(row + 1) * kernel, column * kernel:(column + 1) * kernel]
            by_hand = torch.einsum("bchw,ochw->bo", part, stem.weight) + stem.bias
            assert torch.allclose(cells[:, :, row, column], by_hand, atol=1e-4)
        assert list(model(x).last_hidden_state.shape) == [2, side ** 2 + 1, 16]
        assert torch.equal(model(stem.features(x)).last_hidden_state, model(x).last_hidden_state)  # a stored map is as good as the pixels


def test_the_encoder_is_a_blip_like_any_other_to_what_asks_it():
    model = vision()
    add_stem(model, timm_body("radclip_phantom_cnn"))
    assert model.embeddings.patch_embedding.weight.dtype == torch.float32
    assert model(torch.randn(1, 3, 128, 128)).pooler_output.shape == (1, 16)


@pytest.mark.parametrize("grid, width", [(8, 128), (7, 64), (2, 16)])
def test_neighbouring_places_are_more_alike_than_distant_ones(grid, width):
    vectors = grid_positions(grid, width)
    assert vectors.shape == (grid ** 2, width) and abs(float(vectors.std()) - POSITION) < 1e-4
    assert len(vectors.unique(dim=0)) == grid ** 2
    place = np.stack(np.divmod(np.arange(grid ** 2), grid), 1)
    apart = np.abs(place[:, None] - place[None]).sum(-1)
    distance = torch.cdist(vectors, vectors).numpy()
    means = [distance[apart == n].mean() for n in range(1, 3)]
    assert means[0] < means[1]


def test_left_and_right_are_one_direction():
    vectors, column = grid_positions(8, 128).numpy(), np.tile(np.arange(8), 8)
    train, rest = np.flatnonzero(np.arange(64) // 8 % 2 == 0), np.flatnonzero(np.arange(64) // 8 % 2 == 1)
    way = np.linalg.lstsq(vectors[train], np.sign(column[train] - 3.5), rcond=1e-3)[0]
    assert (np.sign(vectors[rest] @ way) == np.sign(column[rest] - 3.5)).all()  # learnt on even rows, true of odd ones


def test_a_map_that_is_no_multiple_of_the_grid_is_refused():
    with pytest.raises(ValueError, match="last map of mobilenetv2_100 at 128 pixels is 4 x 4: use patch_size 32"):
        add_stem(vision(), timm_body("mobilenetv2_100"), "mobilenetv2_100")
    with pytest.raises(ValueError, match="gives no feature map: a stem is a CNN"):
        add_stem(vision(224, 16), timm.create_model("vit_tiny_patch16_224", num_classes=0), "a ViT")


def test_names_and_files_that_are_not_there():
    with pytest.raises(ValueError, match="timm has no 'mobilenet_v9'"): timm_body("mobilenet_v9")
    with pytest.raises(FileNotFoundError, match="image_weights: no file /nowhere"): timm_body("resnet18", "/nowhere")


def test_weights_come_from_a_file(tmp_path):
    from safetensors.torch import save_file
    torch.manual_seed(3)
    source = timm.create_model("resnet18")
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "w.safetensors")
    body = timm_body("resnet18", tmp_path / "w.safetensors")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in body.state_dict().items())


# --- the class token begins with the dual encoder's embedding

def dual(**more):
    return build_model({"kind": "timm", "image_tower": "resnet18", "image_size": 64, "text_width": 16, "text_layers": 1, "text_heads": 2, "embed_dim": 24, **more}, CAPTIONS)


@pytest.mark.parametrize("make", [lambda: load_model("phantom"), dual], ids=["grid", "average"])
def test_the_overview_is_the_embedding(make):
    visual = make().model.visual.eval()
    size = 128 if visual.trunk.default_cfg.get("pool_size") == (16, 16) else 64
    head = linear_head(visual, size)
    model = vision(size, 32 if size == 64 else 16)
    add_stem(model, visual.trunk)
    add_overview(model, head)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        made, parts = visual.trunk.forward_features(x), model.embeddings
        grid = parts.overview.grid
        assert torch.allclose(parts.overview.embed(torch.nn.functional.adaptive_avg_pool2d(made, grid).flatten(1)), visual(x), atol=1e-4)
        with_it, cells = model.embeddings(x), parts.patch_embedding(x).flatten(2).transpose(1, 2)
        parts.overview = None
        without = model.embeddings(x)
    assert torch.equal(with_it[:, 1:], without[:, 1:]) and not torch.allclose(with_it[:, 0], without[:, 0])
    assert torch.allclose(without[:, 1:], cells + parts.position_embedding[:, 1:])


@pytest.mark.parametrize("more", [{"timm_proj": "mlp"}, {"timm_pool": "abs_attn", "timm_proj": "linear"}, {"timm_proj_bias": True}])
def test_a_head_that_is_no_single_projection_is_left_out(more):
    encoder = dual(**more)
    if more.get("timm_proj_bias"): torch.nn.init.ones_(encoder.model.visual.head.proj.bias)
    assert linear_head(encoder.model.visual, 64) is None


# --- in a captioner

def test_the_packaged_model_is_a_start():
    captioner = build_captioner({**SMALL, "vision_from": "phantom"}, CAPTIONS)
    body, trunk = captioner.model.vision_model.embeddings.patch_embedding.body, load_model("phantom").model.visual.trunk
    assert captioner.config.image_tower == "radclip_phantom_cnn" and captioner.config.image_size == 128
    assert all(torch.equal(a, b) for a, b in zip(body.state_dict().values(), trunk.state_dict().values()))


def test_a_dual_encoder_with_another_cnn_is_a_start(tmp_path):
    encoder = build_model({"kind": "timm", "image_tower": "resnet18", "image_size": 64, "text_width": 16, "text_layers": 1, "text_heads": 2,
                           "image_mean": (0.1, 0.2, 0.3)}, CAPTIONS)
    save_model(encoder, tmp_path / "dual")
    captioner = build_captioner({**SMALL, "vision_from": str(tmp_path / "dual"), "patch_size": 32}, CAPTIONS)
    assert captioner.config.image_size == 64 and tuple(captioner.config.image_mean) == (0.1, 0.2, 0.3)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(captioner.model.eval().vision_model.embeddings.patch_embedding.features(x),
                           encoder.model.eval().visual.trunk.forward_features(x))


@pytest.mark.parametrize("start", [{"image_tower": "radclip_phantom_cnn"}, {"vision_from": "phantom"}], ids=["tower", "dual encoder"])
@pytest.mark.parametrize("freeze", ["none", "trunk", "all"])
def test_a_captioner_with_a_stem_comes_back_bit_for_bit(tmp_path, freeze, start):
    torch.manual_seed(1)
    captioner = build_captioner({**SMALL, **start, "freeze_vision": freeze, "concepts": ["C1", "C2"]}, CAPTIONS)
    again = load_captioner(save_captioner(captioner, tmp_path / "model"))
    ours, theirs = captioner.model.state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert (captioner.model.vision_model.embeddings.overview is None) == ("vision_from" not in start)
    trains = {name.partition("body.")[0] for name, p in again.model.named_parameters() if not p.requires_grad}
    assert (not trains) == (freeze == "none") and all(name.startswith("vision_model") for name in trains)
    assert all(("body." in name) for name, p in again.model.named_parameters() if not p.requires_grad) or freeze == "all"


def test_a_captioner_with_a_stem_is_trained_on_and_comes_back(tmp_path):
    first = build_captioner({**SMALL, "vision_from": "phantom", "freeze_vision": "trunk", "concepts": ["C1"]}, CAPTIONS)
    save_captioner(first, tmp_path / "a")
    again = build_captioner({"kind": "blip", "name": str(tmp_path / "a"), "freeze_vision": "trunk"})
    back = load_captioner(save_captioner(again, tmp_path / "b"))
    ours, theirs = first.model.state_dict(), back.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours) and back.config == again.config
    with pytest.raises(ValueError, match="image_size: the captioner in .* brings its own"): build_captioner({"kind": "blip", "name": str(tmp_path / "a"), "image_size": 160})
    with pytest.raises(ValueError, match="captioner that radclip saved"): build_captioner({"kind": "auto", "name": str(tmp_path / "a")})


@pytest.mark.parametrize("sizes, why", [({"vision_width": 18}, "vision_width 18"), ({"patch_size": 300}, "patch_size is 300")])
def test_sizes_that_make_no_grid_are_refused(sizes, why):
    with pytest.raises(ValueError, match=why): build_captioner({**SMALL, "image_tower": "radclip_phantom_cnn", **sizes}, CAPTIONS)


def test_a_lost_weight_is_named(tmp_path):
    from safetensors.torch import load_file, save_file
    folder = save_captioner(build_captioner({**SMALL, "image_tower": "radclip_phantom_cnn"}, CAPTIONS), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(k for k in weights if "body.stem" in k and k.endswith(".weight"))
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is missing"): load_captioner(folder)


@pytest.mark.parametrize("config, said", [
    ({"freeze_vision": "trunk"}, "there is no CNN before this transformer"),
    ({"vision_from": "phantom", "image_tower": "resnet18"}, "brings radclip_phantom_cnn: leave image_tower resnet18 out"),
    ({"image_tower": "mobilenetv2_100"}, "use patch_size 32"), ({"kind": "blip", "image_tower": "resnet18"}, "image_tower is for a phantom"),
])
def test_settings_that_do_not_fit(config, said):
    with pytest.raises(ValueError, match=said): build_captioner(config, CAPTIONS)


def test_only_cnns_of_timm_are_bodies(tmp_path):
    vit = build_model({"kind": "timm", "image_tower": "vit_tiny_patch16_224", "image_size": 32, "text_width": 16, "text_layers": 1,
                       "text_heads": 2}, CAPTIONS)
    save_model(vit, tmp_path / "vit")
    assert read_body(tmp_path / "vit") is None
