"""Captioners: configs, captions as tensors, folders that come back bit for bit, refusals in one line."""
import json
import os
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

from radclip.blip import (CaptionerConfig, as_captioner_config, build_captioner, caption_batch, caption_ids, concept_logits,
                          encode_captions, load_captioner, save_captioner)
from radclip.loading import split_preprocess
from radclip.model import build_model, save_model
from radclip.vision import add_pre_norm

CAPTIONS = ["Frontal chest radiograph shows a large right pleural effusion.", "Axial CT of the head.",
            "No pleural effusion or pneumothorax.", "Ultrasound of the kidney with a stone."] * 3
SMALL = {"image_size": 32, "vision_width": 16, "vision_layers": 1, "vision_heads": 2, "text_width": 16, "text_layers": 1,
         "text_heads": 2, "max_length": 24}


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    captioner = build_captioner({**SMALL, "concepts": ["C1", "C2", "C3"]}, CAPTIONS)
    captioner.model.eval()
    return captioner


def logits(captioner, seed=0):
    torch.manual_seed(seed)
    size = captioner.config.image_size
    with torch.no_grad():
        return captioner.model(pixel_values=torch.randn(2, 3, size, size), **encode_captions(captioner, CAPTIONS[:2])).logits


def test_the_default_fits_its_budget():
    words = [f"{a}{b}{c}" for a in "bcdfghjklm" for b in "aeiou" for c in "npqrstvwxz"]
    model = build_captioner("phantom", [" ".join(words[i:i + 12]) for i in range(0, 500, 3)] * 3).model
    entries, width = model.text_decoder.bert.embeddings.word_embeddings.weight.shape
    assert sum(p.numel() for p in model.parameters()) + (2000 - entries) * (width + 1) <= 3_000_000
    assert model.vision_model.encoder.layers[0].mlp.fc1.weight.std() > 0.01  # transformers' own default is 1e-10


# --- config

def test_a_dumped_config_reads_back():
    config = as_captioner_config({"kind": "phantom", "text_width": 64})
    assert as_captioner_config(json.loads(config.model_dump_json())) == config
    assert as_captioner_config("blip") == CaptionerConfig(kind="blip", name="blip")
    assert as_captioner_config({"kind": "blip"}).name == "Salesforce/blip-image-captioning-base"


@pytest.mark.parametrize("config, said", [
    ({"text_witdh": 3}, "did you mean 'text_width'"), ({"kind": "blip", "vision_layers": 3}, "vision_layers is for a phantom"),
    ({"kind": "auto"}, "needs the hub ID"), ({"kind": "auto", "name": "a/b", "vocab_size": 900}, "vocab_size is for a phantom"),
    ({"vocab_size": 9}, "captioner: vocab_size: Input should be greater"), ({"max_length": 2}, "captioner: max_length"), ({"patch_size": 0}, "captioner: patch_size"),
])
def test_wrong_configs_are_one_line(config, said):
    with pytest.raises(ValueError, match=said) as caught: as_captioner_config(config)
    assert "\n" not in str(caught.value)


# --- captions as tensors

def test_captions_start_and_end_as_generation_does(small):
    batch, text = encode_captions(small, CAPTIONS[:4]), small.model.config.text_config
    ids, mask, labels = (batch[k] for k in ("input_ids", "attention_mask", "labels"))
    assert (ids[:, 0] == text.bos_token_id).all() and set(batch) == {"input_ids", "attention_mask", "labels"}
    last = mask.sum(1) - 1
    assert (ids[torch.arange(4), last] == text.sep_token_id).all() and mask.sum(1).max() == ids.shape[1]
    assert (labels[mask == 0] == -100).all() and torch.equal(labels[mask == 1], ids[mask == 1]) and (mask == 0).any()


def test_a_batch_is_cut_to_what_it_needs(small):
    ids = caption_ids(small, CAPTIONS[:4])
    short = caption_batch(ids[1:2], small.tokenizer.pad_token_id)["input_ids"]
    assert short.shape[1] < ids.shape[1] and torch.equal(short, encode_captions(small, [CAPTIONS[1]])["input_ids"])


def test_padding_does_not_change_the_loss(small):
    "The mean over real tokens: as if each caption had been alone."
    pixels, each = torch.randn(2, 3, 32, 32), []
    with torch.no_grad():
        both = small.model(pixel_values=pixels, **encode_captions(small, CAPTIONS[:2])).loss
        for i in range(2):
            alone = encode_captions(small, [CAPTIONS[i]])
            n = alone["input_ids"].shape[1] - 1
            each.append((small.model(pixel_values=pixels[i:i + 1], **alone).loss * n, n))
    assert torch.allclose(both, sum(l for l, _ in each) / sum(n for _, n in each), atol=1e-5)


def test_long_and_empty_captions(small):
    assert caption_ids(small, ["stone " * 100]).shape == (1, 24)
    with pytest.raises(ValueError, match="caption 1 is empty"): caption_ids(small, ["a stone", "  "])


# --- folders

def test_round_trip_is_bit_equal(small, tmp_path):
    save_captioner(small, tmp_path / "one")
    shutil.move(tmp_path / "one", tmp_path / "moved")
    again = load_captioner(tmp_path / "moved")
    assert torch.equal(logits(again), logits(small)) and again.config == small.config and not again.model.training
    states = torch.randn(2, 5, 16)
    assert torch.equal(concept_logits(again.model, states), concept_logits(small.model, states))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    assert torch.equal(again.preprocess(image), small.preprocess(image))
    assert not [p.name for p in (tmp_path / "moved").iterdir() if p.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_who_may_read_a_new_file_may_read_every_file_of_the_folder(small, tmp_path):
    (tmp_path / "new").touch()
    folder = save_captioner(small, tmp_path / "model")
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_a_killed_save_leaves_the_old_folder(small, tmp_path):
    save_captioner(small, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with mock.patch("radclip.blip.write_json", side_effect=OSError("disk full")), pytest.raises(OSError):
        save_captioner(small, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before and os.listdir(tmp_path) == ["model"]


def test_stock_transformers_reads_the_folder(tmp_path):
    torch.manual_seed(1)
    captioner = build_captioner(SMALL, CAPTIONS)
    captioner.model.eval()
    save_captioner(captioner, tmp_path / "model")
    stock = BlipForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    with torch.no_grad():
        pixels = captioner.preprocess(image)[None]
        assert torch.equal(stock.generate(pixels, max_new_tokens=9), captioner.model.generate(pixels, max_new_tokens=9))
    theirs = BlipImageProcessor.from_pretrained(tmp_path / "model")(image, return_tensors="pt").pixel_values
    assert (theirs - pixels).abs().max() < 0.05  # one grey level is 1/255/0.25


def stock_folder(folder):
    "A BLIP as transformers' save_pretrained leaves it: BERT's tokenizer, a first token of its own behind the vocabulary."
    torch.manual_seed(2)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "large", "right", "effusion"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(pieces))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BlipForConditionalGeneration(BlipConfig(
        text_config=size | {"vocab_size": len(pieces) + 2, "bos_token_id": len(pieces), "sep_token_id": 3, "max_position_embeddings": 40},
        vision_config=size | {"image_size": 48, "patch_size": 16, "initializer_range": 0.02})).eval()
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 48, "width": 48}), tokenizer).save_pretrained(folder)
    return model


def test_a_stock_folder_loads(tmp_path):
    model = stock_folder(tmp_path / "stock")
    captioner = load_captioner(tmp_path / "stock")
    pixels = torch.randn(2, 3, 48, 48)
    batch = encode_captions(captioner, ["large right", "effusion"])
    assert (batch["input_ids"][:, 0] == model.config.text_config.bos_token_id).all()
    with torch.no_grad():
        assert torch.equal(captioner.model(pixel_values=pixels, **batch).logits, model(pixel_values=pixels, **batch).logits)
    assert captioner.config.image_size == 48 and captioner.config.image_resize == "squash"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    theirs = BlipProcessor.from_pretrained(tmp_path / "stock")(images=image, return_tensors="pt").pixel_values[0]
    assert (theirs - captioner.preprocess(image)).abs().max() < 0.05
    save_captioner(captioner, tmp_path / "ours")
    again = load_captioner(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again.model(pixel_values=pixels, **batch).logits, model(pixel_values=pixels, **batch).logits)


def test_a_stock_blip_at_another_size_with_a_head(tmp_path):
    stock_folder(tmp_path / "stock")
    captioner = build_captioner({"kind": "blip", "name": str(tmp_path / "stock"), "image_size": 64, "concepts": ["C1"], "freeze_vision": "all"})
    captioner.model.eval()
    save_captioner(captioner, tmp_path / "ours")
    again = load_captioner(tmp_path / "ours")
    with torch.no_grad():
        states = again.model(pixel_values=torch.randn(1, 3, 64, 64), **encode_captions(again, ["effusion"])).image_embeds
    assert concept_logits(again.model, states).shape == (1, 1) and states.shape[1] == 17
    frozen = {name.split(".")[0] for name, p in again.model.named_parameters() if not p.requires_grad}
    assert frozen == {"vision_model"} and all(not p.requires_grad for p in again.model.vision_model.parameters())
    assert split_preprocess(again.preprocess)[1] == pytest.approx(again.config.image_mean)  # the pixel cache knows it


# --- a trained tower

@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(4)
    encoder = build_model({"kind": "timm", "image_tower": "test_vit", "image_size": 160, "image_mean": (0.3,) * 3, "text_width": 32,
                           "text_layers": 1, "text_heads": 2}, CAPTIONS)
    return encoder.model.visual.trunk.eval(), save_model(encoder, tmp_path_factory.mktemp("vit") / "model")


def test_a_captioner_starts_from_a_trained_tower(vit, tmp_path):
    trunk, folder = vit
    captioner = build_captioner({"vision_from": str(folder), "text_width": 16, "text_layers": 1, "text_heads": 2}, CAPTIONS)
    captioner.model.eval()
    assert captioner.config.vision_width == 64 and captioner.config.image_size == 160 and captioner.config.image_mean == (0.3,) * 3
    save_captioner(captioner, tmp_path / "model")
    pixels = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = trunk.forward_features(pixels)
        for model in (captioner.model, load_captioner(tmp_path / "model").model):
            assert torch.allclose(model.vision_model(pixel_values=pixels).last_hidden_state, expected, atol=1e-5)


def test_clips_first_norm_comes_back(small, tmp_path):
    captioner = build_captioner(SMALL, CAPTIONS)
    add_pre_norm(captioner.model.vision_model)
    with torch.no_grad(): captioner.model.vision_model.embeddings.pre_norm.weight.normal_()
    captioner.model.eval()
    save_captioner(captioner, tmp_path / "model")
    assert torch.equal(logits(load_captioner(tmp_path / "model")), logits(captioner))


def test_other_shapes_than_the_towers_are_refused(vit, tmp_path):
    with pytest.raises(ValueError, match="vision_layers 6, the captioner 9"):
        build_captioner({"vision_from": str(vit[1]), "vision_layers": 9}, CAPTIONS)
    stock_folder(tmp_path / "stock")
    with pytest.raises(ValueError, match="the shapes must be the same"):
        build_captioner({"kind": "blip", "name": str(tmp_path / "stock"), "vision_from": str(vit[1])})
    with pytest.raises(ValueError, match="vision_from phantom: .*no plain ViT"):
        build_captioner({"kind": "blip", "name": str(tmp_path / "stock"), "vision_from": "phantom"})


# --- refusals

def one_line(error, call, *said):
    with pytest.raises(error) as caught: call()
    assert "\n" not in str(caught.value)
    for word in said: assert word in str(caught.value)


def test_what_is_no_captioner_is_said_in_a_line(small, tmp_path):
    save_model(build_model("phantom", CAPTIONS), tmp_path / "dual")
    (tmp_path / "empty").mkdir()
    one_line(FileNotFoundError, lambda: load_captioner(tmp_path / "absent"), "no such folder")
    one_line(FileNotFoundError, lambda: load_captioner(tmp_path / "empty"), "config.json is missing")
    one_line(ValueError, lambda: load_captioner(tmp_path / "dual"), "dual encoder", "radclip search")
    one_line(ValueError, lambda: build_captioner(str(tmp_path / "dual")), "dual encoder")
    one_line(FileNotFoundError, lambda: build_captioner(str(tmp_path / "absent")), "no such folder")
    one_line(FileNotFoundError, lambda: build_captioner("some-organisation/some-blip"), "some-organisation/some-blip", "network")
    one_line(FileNotFoundError, lambda: build_captioner({"kind": "auto", "name": "some-organisation/some-model"}), "network")
    one_line(ValueError, lambda: build_captioner("phantom"), "captions=[...]")


def test_damaged_folders_are_said_in_a_line(small, tmp_path):
    folder = save_captioner(small, tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:3000])
    one_line(ValueError, lambda: load_captioner(folder), str(folder), "cannot be read")
    (folder / "model.safetensors").unlink()
    one_line(FileNotFoundError, lambda: load_captioner(folder), "no weights")
    from safetensors.torch import load, save_file
    weights = load(whole)
    del weights["text_decoder.cls.predictions.transform.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    one_line(ValueError, lambda: load_captioner(folder), "text_decoder.cls.predictions.transform.dense.weight")
