"""Building, saving, loading and encoding: equal to transformers and to stock open_clip, or refused in one line."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from radclip.model import (DualEncoder, ModelConfig, as_config, build_model, encode_images, encode_texts, fingerprint,
                           load_model, save_model)

CAPTIONS = ["Frontal chest radiograph shows a large right pleural effusion.",
            "Axial CT of the head with a small left subdural hematoma.",
            "No pleural effusion or pneumothorax.", "Ultrasound of the kidney with a stone."] * 3
WEIGHTS = os.environ.get("RADCLIP_WEIGHTS")
SMALL_TEXT = {"text_width": 32, "text_layers": 2, "text_heads": 2, "context_length": 24}
KINDS = {
    "phantom": {"kind": "phantom"},
    "timm-eos": {"kind": "timm", "image_tower": "resnet18", "image_size": 64, **SMALL_TEXT},
    "timm-first": {"kind": "timm", "image_tower": "test_vit", "image_size": 160, "text_pool": "first", **SMALL_TEXT},
    "timm-attention": {"kind": "timm", "image_tower": "test_efficientnet", "image_size": 160, "timm_pool": "rot_attn",
                       "timm_proj": "", **SMALL_TEXT},
    "timm-mlp-mean": {"kind": "timm", "image_tower": "test_resnet", "image_size": 160, "timm_proj": "mlp",
                      "text_pool": "mean", "text_proj": "mlp", **SMALL_TEXT},
    "bag-of-words": {"kind": "timm", "image_tower": "test_resnet", "image_size": 160, "text_pool": "mean",
                     **SMALL_TEXT, "text_layers": 0},
    "siglip": {"kind": "phantom", "init_logit_scale": 2.3, "init_logit_bias": -10.0},
}


def pixels(encoder, n=3, seed=0):
    size = encoder.model.visual.preprocess_cfg["size"]
    size = (size, size) if isinstance(size, int) else size
    return np.random.default_rng(seed).integers(0, 256, (n, *size, 3), dtype=np.uint8)


def embeddings(encoder):
    return encode_images(encoder, pixels(encoder)), encode_texts(encoder, CAPTIONS[:4])


@pytest.fixture(scope="module")
def phantom():
    torch.manual_seed(0)
    return build_model("phantom", CAPTIONS)


def test_phantom_fits_its_budget_with_a_full_vocabulary():
    words = [f"{a}{b}{c}" for a in "bcdfghjklm" for b in "aeiou" for c in "npqrstvwxz"]
    captions = [" ".join(words[i:i + 12]) for i in range(0, 500, 3)] * 3
    model = build_model({"kind": "phantom", "vocab_size": 2000}, captions).model
    vocabulary = model.text.token_embedding.num_embeddings
    count = sum(p.numel() for p in model.parameters()) + (2000 - vocabulary) * model.text.token_embedding.embedding_dim
    assert count <= 1_000_000 and count * 4 < 5e6


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bit_equal(kind, tmp_path):
    torch.manual_seed(1)
    encoder = build_model(KINDS[kind], CAPTIONS)
    images, texts = embeddings(encoder)
    save_model(encoder, tmp_path / "model")
    shutil.move(tmp_path / "model", tmp_path / "moved")
    again = load_model(tmp_path / "moved")
    for a, b in zip((images, texts), embeddings(again)):
        assert torch.equal(a, b)
    assert torch.equal(encoder.model.logit_scale, again.model.logit_scale)
    assert fingerprint(encoder) == fingerprint(tmp_path / "moved") == fingerprint(again)
    ours, theirs = encoder.model.visual.preprocess_cfg, again.model.visual.preprocess_cfg
    assert all(list(ours[k]) == list(theirs[k]) for k in ("mean", "std"))
    assert all(ours[k] == theirs[k] for k in ("resize_mode", "interpolation"))
    if kind == "siglip":
        assert again.model.logit_bias.item() == -10 and again.model.logit_scale.item() == pytest.approx(2.3)


STOCK = """
import sys, logging; logging.disable(logging.WARNING)
import numpy as np, open_clip, torch
from PIL import Image
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 260, 3), dtype=np.uint8))
for folder in sys.argv[1:]:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["Large RIGHT pleural effusion.", "a stone"])
    model.eval()
    with torch.no_grad():
        image_emb = model.encode_image(preprocess(image)[None], normalize=True)
        np.savez(folder + ".npz", i=image_emb, t=model.encode_text(tokens, normalize=True))
assert not any(name.split(".")[0] == "radclip" for name in sys.modules)
"""


def test_stock_open_clip_loads_the_folder_alone(tmp_path):
    kinds = ("timm-eos", "timm-mlp-mean")
    encoders = {kind: build_model(KINDS[kind], CAPTIONS) for kind in kinds}
    folders = [save_model(encoders[kind], tmp_path / kind) for kind in kinds]
    subprocess.run([sys.executable, "-c", STOCK, *map(str, folders)], check=True, cwd=tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 260, 3), dtype=np.uint8))
    for kind, encoder in encoders.items():
        stock = np.load(tmp_path / f"{kind}.npz")
        np.testing.assert_allclose(encode_images(encoder, [image]), stock["i"], atol=1e-6)
        np.testing.assert_allclose(encode_texts(encoder, ["Large RIGHT pleural effusion.", "a stone"]), stock["t"], atol=1e-6)


def test_saving_over_a_folder_replaces_it_whole(phantom, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "leftover.bin").write_text("old")
    save_model(phantom, tmp_path / "m")
    save_model(phantom, tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert not (tmp_path / "m" / "leftover.bin").exists()


def test_failed_save_leaves_the_old_model(phantom, tmp_path, monkeypatch):
    save_model(phantom, tmp_path / "m")
    before = fingerprint(tmp_path / "m")
    import safetensors.torch

    def full(*_):
        raise OSError("no space left on device")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_model(phantom, tmp_path / "m")
    assert fingerprint(tmp_path / "m") == before and [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("fault, error, words", [
    ("nothing", FileNotFoundError, "open_clip_config.json"), ("no weights", FileNotFoundError, "weights"),
    ("truncated", ValueError, "cannot be read"), ("config", ValueError, "cannot be read"),
    ("other weights", ValueError, "cannot be read")])
def test_broken_folders_are_refused_in_one_line(phantom, tmp_path, fault, error, words):
    folder = save_model(phantom, tmp_path / "m")
    weights = folder / "open_clip_model.safetensors"
    if fault == "nothing":
        shutil.rmtree(folder)
    elif fault == "no weights":
        weights.unlink()
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif fault == "config":
        (folder / "open_clip_config.json").write_text("{")
    else:
        from safetensors.torch import save_file
        save_file({"a": torch.zeros(1)}, weights)
    with pytest.raises(error, match=words) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_fingerprint_changes_with_one_weight(phantom):
    import copy
    other = DualEncoder(copy.deepcopy(phantom.model), *phantom[1:])
    assert fingerprint(other) == fingerprint(phantom)
    with torch.no_grad():
        other.model.logit_scale += 1e-6
    assert fingerprint(other) != fingerprint(phantom)


# --- transformers' CLIP ---------------------------------------------------------------------------------------------

def clip_folder(folder, act="quick_gelu", eos=2, eps=1e-5, seed=0):
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(seed)
    blocks = {"num_hidden_layers": 3, "hidden_act": act, "layer_norm_eps": eps}
    config = CLIPConfig(
        text_config={**blocks, "hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4, "vocab_size": 49408,
                     "max_position_embeddings": 77, "eos_token_id": eos, "bos_token_id": 49406, "pad_token_id": 1},
        vision_config={**blocks, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "image_size": 64,
                       "patch_size": 16}, projection_dim=24)
    model = CLIPModel(config).eval()
    with torch.no_grad():  # fresh models are almost linear: larger weights make the activation matter
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.05)) if name != "logit_scale" else p.fill_(3.3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(
        {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "resample": 2, "size": {"shortest_edge": 64}}))
    return model


def features(output):
    return output.pooler_output if hasattr(output, "pooler_output") else output


@pytest.mark.parametrize("act, eos, eps", [("quick_gelu", 2, 1e-5), ("gelu", 49407, 1e-5), ("quick_gelu", 49407, 1e-3)])
def test_converted_clip_equals_transformers(tmp_path, act, eos, eps):
    source = clip_folder(tmp_path, act, eos, eps)
    encoder = build_model({"kind": "transformers", "name": str(tmp_path)})
    tokens = encoder.tokenizer(CAPTIONS[:4])
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        theirs = [features(source.get_image_features(pixel_values=images)), features(source.get_text_features(input_ids=tokens))]
        ours = [encoder.model.eval().encode_image(images), encoder.model.encode_text(tokens)]
    for a, b in zip(ours, theirs):
        a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
        assert (a - b).abs().max() < 1e-5
        assert a.std(0).mean() > 0.02  # the rows differ, so equality says something
    assert encoder.model.logit_scale.item() == pytest.approx(source.logit_scale.item())
    cfg = encoder.model.visual.preprocess_cfg
    assert list(cfg["mean"]) == [0.4, 0.5, 0.6] and list(cfg["std"]) == [0.2, 0.3, 0.25] and cfg["interpolation"] == "bilinear"
    save_model(encoder, tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(embeddings(encoder), embeddings(load_model(tmp_path / "out"))))


def test_the_wrong_activation_would_be_seen(tmp_path):
    source = clip_folder(tmp_path, "quick_gelu")
    config = json.loads((tmp_path / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = build_model({"kind": "transformers", "name": str(tmp_path)})
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        gap = encoder.model.eval().encode_image(images) - features(source.get_image_features(pixel_values=images))
    assert gap.abs().max() > 1e-3


# --- DistilBERT -----------------------------------------------------------------------------------------------------

def distilbert_folder(folder, vocab):
    from transformers import DistilBertConfig, DistilBertModel

    from radclip.towers import save_tokenizer, train_word_pieces
    torch.manual_seed(0)
    words = train_word_pieces(CAPTIONS, vocab)
    model = DistilBertModel(DistilBertConfig(vocab_size=len(words), dim=32, n_layers=3, n_heads=4, hidden_dim=64,
                                             max_position_embeddings=40)).eval()
    model.save_pretrained(folder)
    save_tokenizer(words, folder)
    return model


def test_distilbert_runs_as_bert_with_the_same_numbers(tmp_path):
    source = distilbert_folder(tmp_path, 300)
    encoder = build_model({"kind": "timm", "image_tower": "test_resnet", "image_size": 160, "text_tower": str(tmp_path),
                           "text_pool": "mean", "embed_dim": 16, "context_length": 24})
    tokens = encoder.tokenizer(CAPTIONS[:4])
    mask = (tokens != 0).long()
    with torch.no_grad():
        hidden = source(input_ids=tokens, attention_mask=mask).last_hidden_state
        expected = encoder.model.text.proj((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        assert (encoder.model.eval().encode_text(tokens) - expected).abs().max() < 1e-6
    folder = save_model(encoder, tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(embeddings(encoder), embeddings(load_model(folder))))


def test_text_config_alone_gives_random_weights(tmp_path):
    distilbert_folder(tmp_path, 300)
    (tmp_path / "model.safetensors").unlink()
    config = {"kind": "timm", "image_tower": "test_resnet", "image_size": 160, "text_tower": str(tmp_path), "context_length": 24}
    with pytest.raises(FileNotFoundError, match="text_tower"):
        build_model(config)
    assert encode_texts(build_model(config | {"text_pretrained": False}), ["a stone"]).shape == (1, 256)


# --- local weights --------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not WEIGHTS, reason="RADCLIP_WEIGHTS is not set: no pretrained image tower here")
def test_local_timm_weights_reach_the_trunk():
    import timm
    from safetensors.torch import load_file
    path = f"{WEIGHTS}/mobilenetv2_100.imagenet.safetensors"
    config = {"kind": "timm", "image_tower": "mobilenetv2_100", "image_weights": path, "image_mean": (0.5,) * 3,
              "image_std": (0.5,) * 3, **SMALL_TEXT}
    model = build_model(config, CAPTIONS).model.eval()
    reference = timm.create_model("mobilenetv2_100", num_classes=0).eval()
    reference.load_state_dict({k: v for k, v in load_file(path).items() if not k.startswith("classifier")}, strict=True)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model.visual.trunk(x), reference(x))


def test_wrong_weights_for_the_trunk_are_refused(tmp_path):
    import timm
    from safetensors.torch import save_file
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
    config = {"kind": "timm", "image_tower": "resnet18", "image_size": 64, **SMALL_TEXT}
    with pytest.raises(ValueError, match="does not fit"):
        build_model(config | {"image_weights": str(tmp_path / "w.safetensors")}, CAPTIONS)
    with pytest.raises(FileNotFoundError, match="image_weights"):
        build_model(config | {"image_weights": str(tmp_path / "absent.safetensors")}, CAPTIONS)


# --- open_clip names ------------------------------------------------------------------------------------------------

def test_mistyped_names_get_neighbours():
    with pytest.raises(ValueError, match="ViT-B-32"):
        build_model("ViT-B-33")
    with pytest.raises(ValueError, match="openai"):
        build_model({"kind": "open_clip", "name": "ViT-B-32", "pretrained": "opanai"})
    with pytest.raises(ValueError, match="captions"):
        build_model("phantom")


def test_unreachable_hub_gives_one_line(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="attach") as caught:
        build_model("hf-hub:radclip-nobody/nothing")
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__


@pytest.fixture
def tiny_names(tmp_path):
    """A pair of open_clip names, one with quick_gelu, small enough for a test."""
    import open_clip
    from open_clip import factory
    cfg = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
           "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}}
    paths, configs = list(factory._MODEL_CONFIG_PATHS), dict(factory._MODEL_CONFIGS)
    for name, extra in (("Tiny-T-16", {}), ("Tiny-T-16-quickgelu", {"quick_gelu": True})):
        (tmp_path / f"{name}.json").write_text(json.dumps(cfg | extra))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    yield tmp_path
    factory._MODEL_CONFIG_PATHS[:] = paths
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(configs)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", ["name", "torchscript", "folder"])
def test_local_openai_checkpoints_run_on_quick_gelu(tiny_names, form):
    encoder = build_model("Tiny-T-16-quickgelu")
    state = encoder.model.state_dict()
    path = tiny_names / ("Tiny.openai.pt" if form == "name" else "weights.pt")
    if form == "torchscript":
        with torch.no_grad():
            torch.jit.trace(encoder.model.eval(), (torch.randn(1, 3, 32, 32), torch.zeros(1, 16, dtype=torch.long))).save(path)
    else:
        torch.save(state, path)
    if form == "folder":
        (tiny_names / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    with pytest.warns(UserWarning, match="quickgelu"):
        loaded = build_model({"kind": "open_clip", "name": "Tiny-T-16", "pretrained": str(path)})
    assert all(torch.equal(a, b) for a, b in zip(embeddings(encoder), embeddings(loaded)))
    save_model(loaded, tiny_names / "saved")  # and the folder remembers it
    assert all(torch.equal(a, b) for a, b in zip(embeddings(encoder), embeddings(load_model(tiny_names / "saved"))))


def test_a_local_file_that_does_not_fit_says_so(tiny_names):
    torch.save({"a": torch.zeros(1)}, tiny_names / "w.pt")
    with pytest.raises(ValueError, match="do not fit"):
        build_model({"kind": "open_clip", "name": "Tiny-T-16", "pretrained": str(tiny_names / "w.pt")})


def test_local_file_with_bias_and_temperature_asked_for(tiny_names):
    torch.save(build_model("Tiny-T-16").model.state_dict(), tiny_names / "w.pt")
    encoder = build_model({"kind": "open_clip", "name": "Tiny-T-16", "pretrained": str(tiny_names / "w.pt"),
                           "init_logit_scale": 2.0, "init_logit_bias": -10.0})
    assert (encoder.model.logit_scale.item(), encoder.model.logit_bias.item()) == (2.0, -10.0)


# --- encoding -------------------------------------------------------------------------------------------------------

def test_every_form_of_images_gives_the_same_embeddings(phantom, tmp_path):
    array = pixels(phantom, 5)
    pictures = [Image.fromarray(x) for x in array]
    paths = []
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    from datasets import Dataset, Features, Image as ImageFeature, Value
    table = Dataset.from_dict({"image": [str(p) for p in paths], "image_id": list("abcde")},
                              features=Features({"image": ImageFeature(), "image_id": Value("string")}))
    expected = encode_images(phantom, array, batch_size=2)
    assert expected.shape == (5, 128) and expected.dtype == torch.float32
    assert torch.allclose(expected.norm(dim=1), torch.ones(5), atol=1e-6)
    for images in (pictures, paths, [str(p) for p in paths], table, torch.from_numpy(array)):
        assert torch.allclose(encode_images(phantom, images), expected, atol=1e-5)


def test_encoding_leaves_the_training_mode_as_it_was(phantom):
    phantom.model.train()
    phantom.model.visual.trunk.stem.eval()
    before = [m.training for m in phantom.model.modules()]
    statistics = phantom.model.visual.trunk.blocks[0].look[1].running_mean.clone()
    encode_images(phantom, pixels(phantom))
    encode_texts(phantom, CAPTIONS[:2])
    assert [m.training for m in phantom.model.modules()] == before
    assert torch.equal(phantom.model.visual.trunk.blocks[0].look[1].running_mean, statistics)
    phantom.model.eval()


@pytest.mark.parametrize("array", [np.zeros((2, 64, 64, 3), np.uint8), np.zeros((2, 128, 128, 3), np.float32),
                                   np.zeros((2, 3, 128, 128), np.uint8)])
def test_arrays_of_the_wrong_shape_are_refused(phantom, array):
    with pytest.raises(ValueError, match="uint8"):
        encode_images(phantom, array)


def test_nan_weights_are_named_instead_of_scored(phantom):
    import copy
    broken = DualEncoder(copy.deepcopy(phantom.model), *phantom[1:])
    with torch.no_grad():
        broken.model.visual.head.proj.weight[0, 0] = float("nan")
        broken.model.text.text_projection[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        encode_images(broken, pixels(phantom))
    with pytest.raises(ValueError, match="not finite"):
        encode_texts(broken, CAPTIONS)


def test_one_text_and_no_texts(phantom):
    assert torch.equal(encode_texts(phantom, "a stone"), encode_texts(phantom, ["a stone"]))
    assert len(encode_texts(phantom, [])) == 0


# --- config ---------------------------------------------------------------------------------------------------------

def test_a_dumped_config_builds_the_same_model():
    config = as_config({"kind": "phantom", "embed_dim": 64})
    again = as_config(json.loads(config.model_dump_json()))
    assert again == config and config.image_size == 128
    with pytest.raises(ValueError, match="imge_size"):
        ModelConfig(imge_size=3)


def test_importing_the_config_loads_no_open_clip():
    code = "import sys, radclip.model; sys.exit(any(m in sys.modules for m in ('open_clip', 'timm', 'transformers', 'datasets')))"
    subprocess.run([sys.executable, "-c", code], check=True)
