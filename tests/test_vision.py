"""A ViT dual encoder's image tower as the start of BLIP's vision encoder: the same features, or a refusal."""
import copy

import open_clip
import pytest
import torch
from transformers import BlipVisionConfig, BlipVisionModel

from radclip.model import build_model, save_model
from radclip.vision import VISION, Tower, check_tower, fill_vision, read_tower, resize_positions, vit_config, vit_weights

CAPTIONS = ["Frontal chest radiograph shows a large right pleural effusion.", "Ultrasound of the kidney with a stone."] * 3


def open_clip_vit(quick_gelu=False, **options):
    "An open_clip ViT of random weights, norms and biases included (fresh ones are all ones and zeros)."
    torch.manual_seed(3)
    vision = {"image_size": 48, "patch_size": 8, "width": 32, "head_width": 8, "layers": 3, "mlp_ratio": 3.0, **options}
    model = open_clip.CLIP(embed_dim=16, quick_gelu=quick_gelu, vision_cfg=vision,
                           text_cfg={"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1})
    with torch.no_grad():
        for p in model.visual.parameters(): p.add_(torch.randn_like(p) * 0.05)
    return model.visual.eval()


def as_blip(visual):
    weights = vit_weights(visual)
    vision = BlipVisionModel(BlipVisionConfig(**vit_config(visual, weights))).eval()
    fill_vision(vision, Tower(vit_config(visual, weights), weights, {}))
    return vision


@pytest.mark.parametrize("options", [{}, {"quick_gelu": True}, {"no_ln_pre": True}])
def test_open_clip_features_agree(options):
    visual, pixels = open_clip_vit(**options), torch.randn(2, 3, 48, 48)
    visual.output_tokens = True
    vision = as_blip(visual)
    with torch.no_grad():
        pooled, patches = visual(pixels)
        states = vision(pixel_values=pixels).last_hidden_state
    assert torch.allclose(states[:, 0] @ visual.proj, pooled, atol=1e-5)
    assert torch.allclose(states[:, 1:], patches, atol=1e-5)
    assert hasattr(vision.embeddings, "pre_norm") == ("no_ln_pre" not in options)


def test_the_comparison_can_fail():
    "Without CLIP's first norm, or with the other activation, the features differ by far more than the tolerance."
    visual, pixels = open_clip_vit(), torch.randn(2, 3, 48, 48)
    right = as_blip(visual)
    bare = copy.deepcopy(right)
    bare.embeddings.pre_norm = torch.nn.Identity()
    quick = BlipVisionModel(BlipVisionConfig(**vit_config(visual, vit_weights(visual)) | {"hidden_act": "quick_gelu"})).eval()
    fill_vision(quick, Tower({}, vit_weights(visual), {}))
    with torch.no_grad():
        expected = right(pixel_values=pixels).last_hidden_state
        for other in (bare, quick):
            assert (other(pixel_values=pixels).last_hidden_state - expected).abs().max() > 1e-3


def test_timm_features_agree(tmp_path):
    torch.manual_seed(0)
    encoder = build_model({"kind": "timm", "image_tower": "test_vit", "image_size": 160, "text_width": 32, "text_layers": 1,
                           "text_heads": 2, "image_mean": (0.4, 0.5, 0.6)}, CAPTIONS)
    save_model(encoder, tmp_path / "vit")
    tower = read_tower(tmp_path / "vit")
    vision = BlipVisionModel(BlipVisionConfig(**tower.vision)).eval()
    fill_vision(vision, tower)
    pixels = torch.randn(2, 3, 160, 160)
    encoder.model.eval()
    with torch.no_grad():
        assert torch.allclose(vision(pixel_values=pixels).last_hidden_state, encoder.model.visual.trunk.forward_features(pixels), atol=1e-5)
    assert list(tower.pixels["image_mean"]) == [0.4, 0.5, 0.6] and tower.pixels["image_resize"] == "shortest"


@pytest.mark.parametrize("visual", [
    lambda: open_clip_vit(ls_init_value=0.1),                    # layer scale: BLIP has none
    lambda: open_clip_vit(attentional_pool=True, attn_pooler_heads=4),
    lambda: open_clip_vit(final_ln_after_pool=True),
    lambda: build_model("phantom", CAPTIONS).model.visual,       # a CNN
    lambda: build_model({"kind": "timm", "image_tower": "resnet18", "image_size": 64}, CAPTIONS).model.visual,
])
def test_a_tower_that_blip_cannot_compute_is_refused(visual):
    with pytest.raises(ValueError, match="no plain ViT"): vit_weights(visual())


@pytest.mark.parametrize("ours", VISION)
def test_each_size_is_compared(ours):
    visual = open_clip_vit()
    tower = Tower(vit_config(visual, vit_weights(visual)), {}, {})
    right = {name: tower.vision[theirs] for name, theirs in VISION.items()}
    check_tower(tower, right, "here")
    with pytest.raises(ValueError, match=f"here.*{ours}"): check_tower(tower, right | {ours: right[ours] + 1}, "here")


def test_positions_of_another_size():
    vision = as_blip(open_clip_vit())
    pixels = torch.randn(1, 3, 72, 72)
    with torch.no_grad():
        expected = vision(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        resize_positions(vision, 72)
        assert torch.allclose(vision(pixel_values=pixels).last_hidden_state, expected, atol=1e-6)
    assert vision.config.image_size == 72
    with pytest.raises(ValueError, match="multiple of .* 8 pixels"): resize_positions(vision, 70)
