"""Heat maps against pytorch-grad-cam's own and against planted truth; a model that is explained stays as it was."""
import copy

import numpy as np
import open_clip
import pytest
import pytorch_grad_cam
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from radclip import gradcam
from radclip.folder import DualEncoder
from radclip.gradcam import (METHODS, as_map, attention_of, attention_rollout, explain, find_layer, heat_maps, onto_image, open_image,
                             per_cell, pick_layers, text_direction, undisturbed)
from radclip.model import build_model, encode_texts, load_model

CAPTIONS = ["a chest radiograph with a large effusion", "no effusion on the left", "head CT", "normal chest"]
WORDS = "a large effusion"


def tower(name, size, **more):
    torch.manual_seed(0)
    return build_model({"kind": "timm", "image_tower": name, "image_size": size, "text_width": 32, "text_heads": 2, "embed_dim": 32, **more}, CAPTIONS)


def clip(**vision):
    "A small open_clip model with random weights and a stand-in for the tokenizer."
    torch.manual_seed(0)
    size = vision.pop("image_size", 64)
    text = dict(context_length=16, vocab_size=64, width=32, heads=2, layers=1)
    model = open_clip.CLIP(32, dict(image_size=size, **vision), text).eval()
    model.visual.preprocess_cfg = {"size": size, "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    from open_clip.transform import PreprocessCfg, image_transform_v2
    tokens = lambda texts: torch.tensor([[(hash_of(t) + i) % 62 + 1 for i in range(15)] + [63] for t in texts])
    return DualEncoder(model, tokens, image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False))


def hash_of(text): return sum(ord(c) * (i + 1) for i, c in enumerate(text))


ENCODERS = {
    "phantom": lambda: load_model("phantom"),
    "resnet18": lambda: tower("resnet18", 64),
    "mobilenetv2": lambda: tower("mobilenetv2_100", 160),
    "convnext": lambda: tower("test_convnext", 160),
    "timm-vit": lambda: tower("test_vit", 160, timm_pool=""),  # its own pooling, the class token
    "timm-vit-average": lambda: tower("test_vit", 160),
    "open_clip-vit": lambda: clip(layers=2, width=48, patch_size=16, head_width=24),
    "open_clip-vit-average": lambda: clip(layers=2, width=48, patch_size=16, head_width=24, pool_type="avg", final_ln_after_pool=True),
    "open_clip-resnet": lambda: clip(layers=[1, 1, 1, 1], width=16, head_width=32),
}
LAST = {"phantom": "trunk.blocks.2", "resnet18": "trunk.layer4.1", "mobilenetv2": "trunk.blocks.6", "convnext": "trunk.stages.3", "timm-vit": "trunk.blocks.5.norm1", "timm-vit-average": "trunk.blocks.5.norm1",
        "open_clip-vit": "transformer.resblocks.1.ln_1", "open_clip-vit-average": "transformer.resblocks.1.ln_1", "open_clip-resnet": "layer4.0"}
_made = {}


@pytest.fixture(params=ENCODERS)
def named(request):
    "A name and its encoder, made once."
    if request.param not in _made: _made[request.param] = ENCODERS[request.param]()
    return request.param, _made[request.param]


def noise(width=90, height=70, seed=0, mode="RGB"):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


class Embeds(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x): return self.model.encode_image(x, normalize=True)


def reference(encoder, cls, image, reshape=None, names=None, text=WORDS, minus=None):
    "pytorch-grad-cam by its own documentation, on the named layers, or the one that LAST names."
    model = copy.deepcopy(encoder.model)
    target = encode_texts(encoder, [text])[0].clone()
    if minus: target = target - encode_texts(encoder, [minus])[0]
    cam = cls(Embeds(model), [model.visual.get_submodule(name) for name in names or [find_layer(model.visual)]], reshape)
    return cam(encoder.preprocess(image)[None], [lambda out: out @ target])[0]


def test_the_last_layer_with_places_is_found(named):
    name, encoder = named
    assert find_layer(encoder.model.visual) == LAST[name]
    assert list(pick_layers(encoder.model.visual)) == [LAST[name]]
    assert list(pick_layers(encoder.model.visual, f"visual.{LAST[name]}")) == [LAST[name]]


@pytest.mark.filterwarnings("ignore:the heat map is the same everywhere")
@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "hirescam", "layercam", "eigencam", "scorecam"])
def test_maps_equal_pytorch_grad_cams_own(named, method):
    name, encoder = named
    size = encoder.model.visual.preprocess_cfg["size"]
    image = noise(*(size if isinstance(size, (tuple, list)) else (size, size)))
    fold = None
    if "vit" in name:  # the documentation's own reshape_transform, for the grid that we know
        side, first = (10, 1) if "timm" in name else (4, 1)
        fold = lambda x: x[:, first:].reshape(len(x), side, side, -1).permute(0, 3, 1, 2)
    cls = {"gradcam": pytorch_grad_cam.GradCAM, "gradcam++": pytorch_grad_cam.GradCAMPlusPlus, "hirescam": pytorch_grad_cam.HiResCAM,
           "layercam": pytorch_grad_cam.LayerCAM, "eigencam": pytorch_grad_cam.EigenCAM, "scorecam": pytorch_grad_cam.ScoreCAM}[method]
    if method == "scorecam" and name not in ("phantom", "open_clip-vit"): pytest.skip("one forward pass a channel: slow, and the same code")
    strongest = 0
    for text, minus in ((WORDS, "no effusion"), ("no effusion", WORDS)):  # with random weights one of the two may speak against every place
        want = reference(encoder, cls, image, fold, text=text, minus=minus)
        got = explain(encoder, image, text, method, minus, cells=False)
        assert got.shape == want.shape and np.abs(got - want).max() < 1e-4
        strongest = max(strongest, want.max())
    assert strongest > 0.5, "two flat maps prove nothing"


def test_cell_by_cell_is_hirescam_at_the_last_layer_of_the_phantom_tower():
    encoder, image = load_model("phantom"), noise(128, 128)
    want = reference(encoder, pytorch_grad_cam.HiResCAM, image)
    assert np.abs(explain(encoder, image, WORDS) - want).max() < 1e-3
    assert np.abs(explain(encoder, image, WORDS, cells=False) - want).max() > 0.1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 5))
def test_cells_part_the_map_and_pool_as_the_tower_does(batch, channels, grid, more):
    maps = torch.rand(batch, channels, grid * 4, grid * (more + 1))
    parts = per_cell(maps, grid)
    assert torch.equal(parts.unflatten(1, (channels, grid * grid)).sum(2), maps)
    area = maps.shape[2] * maps.shape[3] / grid ** 2
    assert torch.allclose(parts.sum((2, 3)) / area, F.adaptive_avg_pool2d(maps, grid).flatten(1), atol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 3, 7, 14])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_tokens_fold_into_the_grid_that_their_number_tells(side, first):
    patches = torch.rand(2, side * side, 5)
    folded = as_map(torch.cat([torch.full((2, first, 5), 9.), patches], 1))
    assert folded.shape == (2, 5, side, side)
    for i in range(side * side): assert torch.equal(folded[:, :, i // side, i % side], patches[:, i])


# ---- planted truth

class Patch(torch.nn.Module):
    "An image tower whose embedding depends on one patch of the picture, and on nothing else."

    def __init__(self, row, column):
        super().__init__()
        self.layer4 = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8, bias=False))
        self.place, self.image_size = (row, column), 64
        torch.nn.init.constant_(self.layer4[0].weight, 1 / 192)
        self.preprocess_cfg = {"size": 64, "mean": (0.,) * 3, "std": (1.,) * 3, "interpolation": "bilinear", "resize_mode": "squash"}

    def forward(self, x):
        here = self.layer4(x)[:, :, self.place[0], self.place[1]].mean(1)
        return torch.stack([here, torch.ones_like(here)], 1)


class Planted(torch.nn.Module):
    def __init__(self, row, column):
        super().__init__()
        self.visual = Patch(row, column)

    def encode_image(self, x, normalize=False): return F.normalize(self.visual(x), dim=1) if normalize else self.visual(x)

    def encode_text(self, tokens, normalize=False): return torch.tensor([[1., 0.]]).repeat(len(tokens), 1)


@pytest.mark.parametrize("row, column", [(0, 0), (2, 5), (7, 7)])
@pytest.mark.parametrize("method", ["hirescam", "layercam"])
def test_the_map_peaks_where_the_similarity_comes_from(row, column, method):
    from torchvision.transforms import ToTensor
    encoder = DualEncoder(Planted(row, column), lambda texts: torch.zeros(len(texts), 4, dtype=torch.long), ToTensor())
    heat = explain(encoder, noise(64, 64), "the patch", method)
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert (y // 8, x // 8) == (row, column)
    mask = np.zeros((64, 64), bool)
    mask[max(0, 8 * row - 8):8 * row + 16, max(0, 8 * column - 8):8 * column + 16] = True  # bilinear upsampling spreads by a cell
    assert heat[~mask].max() == 0


@pytest.mark.parametrize("size, mode, seen", [((200, 100), "shortest", (50, 0, 150, 100)), ((100, 200), "shortest", (0, 50, 100, 150)),
                                              ((200, 100), "longest", (0, -50, 200, 150)), ((60, 90), "squash", (0, 0, 60, 90))])
def test_the_map_lies_where_the_model_saw_it(size, mode, seen):
    heat = np.zeros((8, 8), np.float32)
    heat[2, 6] = 1  # x 0.8125, y 0.3125 of the square
    laid = onto_image(heat, size, mode)
    assert laid.shape == size[::-1] and laid.dtype == np.float32
    x, y = seen[0] + 0.8125 * (seen[2] - seen[0]), seen[1] + 0.3125 * (seen[3] - seen[1])
    if 0 <= y < size[1]:
        top = np.argwhere(laid == laid.max()) + 0.5
        assert np.abs(top.mean(0) - (y, x)).max() <= 1.01
    unseen = onto_image(np.ones((8, 8), np.float32), size, mode)
    if mode == "shortest":
        inside = np.zeros(size[::-1], bool)
        inside[seen[1]:seen[3], seen[0]:seen[2]] = True
        assert np.array_equal(unseen > 0, inside)
    else: assert np.allclose(unseen, 1)


def test_a_map_of_the_models_own_size_stays_as_it_is():
    heat = np.random.default_rng(0).random((128, 128), np.float32)
    assert np.allclose(onto_image(heat, (128, 128)), heat, atol=1e-5)


# ---- nothing is disturbed

@pytest.mark.filterwarnings("ignore:the heat map is the same everywhere")
def test_a_model_is_left_as_it_was(named):
    name, encoder = named
    model = copy.deepcopy(encoder.model)
    model.train()
    model.visual.requires_grad_(False)
    first = next(model.parameters())
    for p in model.parameters(): p.grad = torch.full_like(p, 3.)
    before = ({k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    explain(encoder._replace(model=model), noise(), WORDS)
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == before[1] and [p.requires_grad for p in model.parameters()] == before[2]
    assert all((p.grad == 3).all() for p in model.parameters()) and first is next(model.parameters())
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    with pytest.raises(ValueError), undisturbed(model): raise ValueError("in the middle")
    assert [m.training for m in model.modules()] == before[1] and all((p.grad == 3).all() for p in model.parameters())


def test_callers_without_gradients_and_models_loaded_in_inference_mode_get_the_same_map():
    encoder, image = load_model("phantom"), noise(seed=3)
    want = explain(encoder, image, WORDS)
    with torch.no_grad(): assert np.array_equal(explain(encoder, image, WORDS), want)
    with torch.inference_mode():
        assert np.array_equal(explain(encoder, image, WORDS), want)
        made = load_model("phantom")
        assert next(made.model.parameters()).is_inference(), "or this shows nothing"
        assert np.array_equal(explain(made, image, WORDS), want)
        assert not torch.is_grad_enabled()


def test_a_text_alone_and_against_another_differ_and_swapping_them_turns_the_map():
    encoder, image = load_model("phantom"), noise(128, 128, 1)
    one, other = "Large right pleural effusion.", "No pleural effusion."
    direction = text_direction(encoder, one, other)
    assert torch.allclose(direction, -text_direction(encoder, other, one), atol=1e-6)
    ways = [explain(encoder, image, one), explain(encoder, image, one, minus=other), explain(encoder, image, other, minus=one)]
    assert all(np.abs(a - b).max() > 0.05 for i, a in enumerate(ways) for b in ways[:i])
    assert np.minimum(ways[1], ways[2]).max() < 0.9, "what speaks for a text speaks against its opposite"
    several = text_direction(encoder, [one, "Right pleural effusion."])
    assert several.norm() == pytest.approx(1, abs=1e-5)


# ---- rollout

def test_rollout_is_what_the_weights_say():
    encoder = clip(layers=2, width=48, patch_size=16, head_width=24)
    visual, pixels = encoder.model.visual, encoder.preprocess(noise(64, 64))[None]
    with torch.no_grad():
        x, joint = visual._embeds(pixels), torch.eye(17)
        for block in visual.transformer.resblocks:
            normed, attn = block.ln_1(x), block.attn
            q, k, _ = F.linear(normed, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
            heads = [(q[0, :, s] @ k[0, :, s].T / 24 ** 0.5).softmax(-1) for s in (slice(0, 24), slice(24, 48))]
            joint = (sum(heads) / 2 / 2 + torch.eye(17) / 2) @ joint
            x = block(x)
        want = joint[0, 1:].view(4, 4).numpy()
    got = attention_rollout(visual, pixels)[0]
    want = (want - want.min()) / (want.max() - want.min())
    corner = got[8::16, 8::16] * 0.25 + got[7::16, 7::16] * 0.25 + got[8::16, 7::16] * 0.25 + got[7::16, 8::16] * 0.25
    assert got.shape == (64, 64) and np.abs(corner - want).max() < 0.1 and np.corrcoef(corner.ravel(), want.ravel())[0, 1] > 0.99


def test_timms_attention_is_recomputed_as_its_own_forward_pass_uses_it():
    block = tower("test_vit", 160).model.visual.trunk.blocks[1]
    tokens = torch.randn(2, 101, block.norm1.normalized_shape[0])
    weights = attention_of(block, tokens)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 101), atol=1e-5)
    values = block.attn.qkv(tokens).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    per_head = (values[0] @ values[1].transpose(-2, -1) * block.attn.scale).softmax(-1)
    assert torch.allclose(per_head.mean(1), weights, atol=1e-5)
    assert torch.allclose(block.attn.proj((per_head @ values[2]).transpose(1, 2).flatten(2)), block.attn(tokens), atol=1e-4)


def test_rollout_reads_transformers_and_refuses_cnns(named):
    name, encoder = named
    if "vit" in name:
        one, other = (explain(encoder, noise(), text, "rollout") for text in (WORDS, "no effusion"))
        assert np.array_equal(one, other) and one.max() > 0.9 and one.std() > 0.01
    else:
        with pytest.raises(ValueError, match="needs a vision transformer.*gradcam"): explain(encoder, noise(), WORDS, "rollout")


# ---- any picture, one line for what is wrong

@pytest.mark.filterwarnings("ignore:the heat map is the same everywhere")
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("rollout", "scorecam")])
def test_any_picture_gives_a_finite_map_of_its_size(named, method):
    name, encoder = named
    pictures = [Image.new("L", (50, 80), 0), Image.new("RGB", (33, 20), (255, 255, 255)), noise(20, 300, mode="L"), noise(1, 1),
                Image.fromarray(np.random.default_rng(0).integers(0, 4000, (40, 30), np.uint16))]
    for picture in pictures[:5 if name == "phantom" else 2]:
        heat = explain(encoder, picture, WORDS, method)
        assert heat.shape == picture.size[::-1] and heat.dtype == np.float32 and np.isfinite(heat).all() and 0 <= heat.min() <= heat.max() <= 1


def test_a_map_that_is_the_same_everywhere_is_zero_and_said():
    from torchvision.transforms import ToTensor

    class Blind(Planted):
        def encode_image(self, x, normalize=False):
            maps = self.visual.layer4(x)
            return F.normalize(torch.stack([maps.mean((1, 2, 3)), torch.ones(len(x))], 1), dim=1)

    encoder = DualEncoder(Blind(0, 0), lambda texts: torch.zeros(len(texts), 4, dtype=torch.long), ToTensor())
    with pytest.warns(UserWarning, match="same everywhere"): heat = explain(encoder, Image.new("RGB", (64, 64), (9, 9, 9)), "grey")
    assert heat.shape == (64, 64) and not heat.any()


@pytest.mark.parametrize("array", [np.zeros((5, 7)), np.zeros((5, 7, 1), np.uint8), np.zeros((5, 7, 3)), np.zeros((1, 5, 7), np.float32), np.zeros((3, 5, 7), np.uint8)])
def test_arrays_are_pictures(array): assert open_image(array).size == (7, 5)


def test_a_grey_float_array_keeps_its_order(tmp_path):
    ramp = np.linspace(-3, 4, 256).reshape(16, 16)
    assert (np.diff(np.asarray(open_image(ramp)).astype(int).ravel()) >= 0).all() and np.asarray(open_image(ramp)).max() == 255
    colour = np.zeros((4, 4, 3))
    colour[..., 0] = 0.5
    assert np.asarray(open_image(colour))[0, 0].tolist() == [127, 0, 0]


@pytest.mark.parametrize("given, said", [
    (dict(text=" "), "the text is empty"), (dict(text=[]), "the text is empty"), (dict(text=["a", ""]), "the text is empty"),
    (dict(minus=""), "the text to subtract is empty"), (dict(minus=WORDS), "the same to this model"),
    (dict(method="gradcamm"), "did you mean 'gradcam'"), (dict(method="nonsense"), "there are gradcam"),
    (dict(layer="trunk.block.2"), "did you mean 'trunk.blocks.2'"), (dict(layer=[]), "layer is empty"), (dict(layer="trunk"), "heat map needs maps"),
    (dict(image=np.zeros((2, 3, 4, 5))), r"\[2, 3, 4, 5\] is no picture"), (dict(image=np.zeros((4, 5, 7))), "is no picture"),
])
def test_errors_are_one_line(given, said):
    call = dict(model=load_model("phantom"), image=noise(), text=WORDS) | given
    with pytest.raises(ValueError, match=said) as error: explain(**call)
    assert "\n" not in str(error.value)


def test_missing_and_broken_files_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such image"): explain("phantom", tmp_path / "none.png", WORDS)
    broken = tmp_path / "broken.png"
    noise().save(broken)
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(ValueError, match="can't be read as an image"): explain("phantom", broken, WORDS)
    with pytest.raises(FileNotFoundError, match="no model in"): explain(tmp_path, noise(), WORDS)


@pytest.mark.parametrize("name, layer", [("open_clip-vit", "transformer.resblocks.1.ln_2"), ("open_clip-vit", "transformer.resblocks.1"), ("timm-vit", "trunk.blocks.5.norm2")])
def test_a_layer_behind_the_last_attention_is_refused_not_silently_zero(name, layer):
    encoder = ENCODERS[name]()
    with pytest.raises(ValueError, match="no say in the embedding"): explain(encoder, noise(), WORDS, layer=layer)


def test_several_layers_are_added_up_as_the_library_does():
    encoder, image, names = load_model("phantom"), noise(128, 128, 2), ["trunk.stem.1", "trunk.blocks.2"]
    want = reference(encoder, pytorch_grad_cam.LayerCAM, image, names=names)
    for order in (names, names[::-1]): assert np.abs(explain(encoder, image, WORDS, "layercam", layer=order) - want).max() < 1e-4
    assert np.abs(explain(encoder, image, WORDS, "layercam") - want).max() > 0.1


def test_weights_that_are_no_numbers_are_said():
    encoder = load_model("phantom")
    with torch.no_grad(): encoder.model.visual.trunk.blocks[0].narrow[0].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"): heat_maps(encoder, encoder.preprocess(noise())[None], torch.ones(1, 128))


def test_every_method_is_one_of_the_librarys():
    assert all(hasattr(pytorch_grad_cam, cls) for cls in METHODS.values() if cls)
    assert set(METHODS) >= {"gradcam", "gradcam++", "layercam", "scorecam", "eigencam", "rollout"} and gradcam.METHODS["rollout"] is None
