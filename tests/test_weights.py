"""Pretrained weights of other libraries: the same numbers as there, or refused in one line."""
import json
import os

import pytest
import torch

from encoders import CAPTIONS, SMALL_TEXT, embeddings
from radclip.folder import load_model, save_model
from radclip.model import build_model, encode_texts

WEIGHTS = os.environ.get("RADCLIP_WEIGHTS")


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


def test_a_local_file_of_unknown_origin_runs_on_gelu_and_says_so(tiny_names):
    encoder = build_model("Tiny-T-16")
    torch.save(encoder.model.state_dict(), tiny_names / "w.pt")
    with pytest.warns(UserWarning, match="does not say which activation"):
        loaded = build_model({"kind": "open_clip", "name": "Tiny-T-16", "pretrained": str(tiny_names / "w.pt")})
    assert all(torch.equal(a, b) for a, b in zip(embeddings(encoder), embeddings(loaded)))


@pytest.mark.filterwarnings("ignore:w.pt does not say")
def test_a_local_file_that_does_not_fit_says_so(tiny_names):
    torch.save({"a": torch.zeros(1)}, tiny_names / "w.pt")
    with pytest.raises(ValueError, match="do not fit"):
        build_model({"kind": "open_clip", "name": "Tiny-T-16", "pretrained": str(tiny_names / "w.pt")})


@pytest.mark.filterwarnings("ignore:w.pt does not say")
def test_local_file_with_bias_and_temperature_asked_for(tiny_names):
    torch.save(build_model("Tiny-T-16").model.state_dict(), tiny_names / "w.pt")
    encoder = build_model({"kind": "open_clip", "name": "Tiny-T-16", "pretrained": str(tiny_names / "w.pt"),
                           "init_logit_scale": 2.0, "init_logit_bias": -10.0})
    assert (encoder.model.logit_scale.item(), encoder.model.logit_bias.item()) == (2.0, -10.0)
