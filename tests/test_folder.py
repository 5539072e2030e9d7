"""Saving and loading: bit-equal, readable without radclip, whole or not at all."""
import copy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from encoders import CAPTIONS, SMALL_TEXT, embeddings
from radclip.folder import DualEncoder, fingerprint, load_model, save_model
from radclip.model import build_model, encode_images, encode_texts

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
    "counted-words": {"kind": "timm", "image_tower": "test_resnet", "image_size": 160, "text_tower": "ngrams", "text_width": 16,
                      "text_proj": "mlp"},
    "siglip": {"kind": "phantom", "init_logit_scale": 2.3, "init_logit_bias": -10.0},
}


@pytest.fixture(scope="module")
def phantom():
    torch.manual_seed(0)
    return build_model("phantom", CAPTIONS)


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


def test_stock_open_clip_loads_the_phantom_model_where_radclip_was_imported(phantom, tmp_path):
    import open_clip
    folder = save_model(phantom, tmp_path / "m")
    stock = open_clip.create_model(f"local-dir:{folder}").eval()
    with torch.no_grad():
        theirs = stock.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS[:4]), normalize=True)
    assert torch.allclose(theirs, encode_texts(phantom, CAPTIONS[:4]), atol=1e-6)
    assert torch.equal(encode_texts(build_model(str(folder)), CAPTIONS), encode_texts(phantom, CAPTIONS))


def test_saving_over_a_folder_replaces_it_whole(phantom, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "leftover.bin").write_text("old")
    save_model(phantom, tmp_path / "m")
    save_model(phantom, tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert not (tmp_path / "m" / "leftover.bin").exists()


def test_who_may_read_the_config_may_read_the_weights(phantom, tmp_path):
    "A server runs as another user than the one that trained."
    save_model(phantom, tmp_path / "model")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == {0o666 & ~current_umask()}


def current_umask():
    import os
    old = os.umask(0)
    os.umask(old)
    return old


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
    other = DualEncoder(copy.deepcopy(phantom.model), *phantom[1:])
    assert fingerprint(other) == fingerprint(phantom)
    with torch.no_grad():
        other.model.logit_scale += 1e-6
    assert fingerprint(other) != fingerprint(phantom)
