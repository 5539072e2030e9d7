"""Building from a config, and encoding whatever form images come in."""
import copy
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from encoders import CAPTIONS, pixels
from radclip.model import DualEncoder, ModelConfig, as_config, build_model, encode_images, encode_texts, is_read


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


def broken_table(folder):
    "Five pictures of which the second is cut short and the fourth is not there."
    from datasets import Dataset, Features, Image as ImageFeature, Value
    paths = [folder / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths): Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40), dtype=np.uint8)).save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:500]), paths[3].unlink()
    return paths, Dataset.from_dict({"image": [str(p) for p in paths], "image_id": list("abcde")},
                                    features=Features({"image": ImageFeature(), "image_id": Value("string")}))


def test_an_unreadable_image_is_named(phantom, tmp_path):
    paths, table = broken_table(tmp_path)
    with pytest.raises(ValueError, match=r"^image 1 \(b\) can't be read: OSError: .*truncated"): encode_images(phantom, table)
    with pytest.raises(ValueError, match=rf"^image 1 \({re.escape(str(paths[1]))}\) can't be read: OSError"): encode_images(phantom, paths)
    with pytest.raises(ValueError, match=rf"^image 0 \(.*\) can't be read: FileNotFoundError: no file {re.escape(str(paths[3]))}"): encode_images(phantom, [paths[3]])


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_unreadable_images_can_be_left_out(phantom, tmp_path, batch_size):
    from radclip.loading import PixelCache
    paths, table = broken_table(tmp_path)
    expected = encode_images(phantom, table.select([0, 2, 4]))
    with pytest.warns(UserWarning, match=r"2 of 5 .*row 1 \(b\)"): cache = PixelCache.build(table, phantom.preprocess, tmp_path / "cache")
    for images in (table, paths, cache):
        found = encode_images(phantom, images, batch_size=batch_size, bad=(bad := {}))
        assert torch.allclose(found, expected, atol=1e-5) and list(bad) == [1, 3] and "truncated" in bad[1]
    with pytest.raises(ValueError, match="image 1 can't be read: OSError"): encode_images(phantom, cache)  # its pixels are all zero
    assert encode_images(phantom, table.select([1, 3]), batch_size=batch_size, bad={}).shape == (0, 128)


def test_the_row_of_a_nan_counts_the_images_left_out(phantom, tmp_path):
    _, table = broken_table(tmp_path)
    steps = phantom.preprocess
    shown = DualEncoder(phantom.model, phantom.tokenizer, lambda image: steps(image) + (float("nan") if image.getpixel((0, 0)) == nan else 0))
    nan = table[2]["image"].getpixel((0, 0))
    with pytest.raises(ValueError, match="images row 2 is not finite"): encode_images(shown, table, bad={})


def test_the_pixel_cache_gives_what_the_pictures_give(phantom, tmp_path):
    from datasets import Dataset, Features, Image as ImageFeature

    from radclip.loading import PixelCache
    for i, x in enumerate(np.random.default_rng(1).integers(0, 256, (4, 90, 150, 3), dtype=np.uint8)):
        Image.fromarray(x).save(tmp_path / f"{i}.png")
    table = Dataset.from_dict({"image": [str(tmp_path / f"{i}.png") for i in range(4)]}, features=Features({"image": ImageFeature()}))
    cache = PixelCache.build(table, phantom.preprocess, tmp_path / "cache")
    assert torch.allclose(encode_images(phantom, cache, batch_size=3), encode_images(phantom, table), atol=1e-4)


def test_deep_grey_images_are_stretched_not_clipped(phantom):
    ramp = np.arange(128 * 128, dtype=np.uint16).reshape(128, 128)
    shown = Image.fromarray(np.uint8(np.round(ramp * (255 / ramp.max()))))
    assert torch.allclose(encode_images(phantom, [Image.fromarray(ramp)]), encode_images(phantom, [shown]), atol=1e-3)


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
    assert encode_texts(phantom, []).shape == (0, 128)


def test_one_image_and_no_images(phantom, tmp_path):
    picture = Image.fromarray(pixels(phantom)[0])
    picture.save(tmp_path / "a.png")
    for one in (picture, tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.allclose(encode_images(phantom, one), encode_images(phantom, [picture]), atol=1e-5)
    assert encode_images(phantom, []).shape == (0, 128)


@pytest.mark.parametrize("images, kind", [(None, "NoneType"), (7, "int"), ([None], "NoneType"), ([np.zeros((128, 128), np.uint8)], "ndarray")])
def test_what_is_no_image_is_refused_in_one_line(phantom, images, kind):
    with pytest.raises(ValueError, match=rf"^images are a pairs table, PIL images, paths, .*; here is a {kind}$"): encode_images(phantom, images)


@pytest.mark.parametrize("texts, kind", [(None, "NoneType"), (["a", None], "NoneType"), ([b"a"], "bytes")])
def test_what_is_no_text_is_refused_in_one_line(phantom, texts, kind):
    with pytest.raises(ValueError, match=f"^texts are strings; here is a {kind}$"): encode_texts(phantom, texts)


# --- config ---------------------------------------------------------------------------------------------------------

def test_a_dumped_config_builds_the_same_model():
    config = as_config({"kind": "phantom", "embed_dim": 64})
    again = as_config(json.loads(config.model_dump_json()))
    assert again == config and config.image_size == 128
    with pytest.raises(ValueError, match="did you mean .image_size"):
        as_config({"imge_size": 3})
    with pytest.raises(ValueError, match="imge_size"):
        ModelConfig(imge_size=3)


@pytest.mark.parametrize("config, said", [
    ({"kind": "phantom", "name": "ViT-B-32"}, "name is not read by kind phantom .by open_clip, transformers."),
    ({"kind": "timm", "pretrained": "openai"}, "pretrained is not read by kind timm .by open_clip."),
    ({"kind": "open_clip", "name": "ViT-B-32", "embed_dim": 64}, "embed_dim is not read by kind open_clip .by phantom, timm."),
    ({"kind": "open_clip", "name": "ViT-B-32", "text_dropout": 0.5}, "text_dropout"),
    ({"kind": "transformers", "name": "x", "image_size": 64}, "image_size is not read by kind transformers .by phantom, open_clip, timm."),
    ({"kind": "fantom"}, "kind: Input should be 'phantom'"),
])
def test_a_field_that_would_be_ignored_is_refused(config, said):
    with pytest.raises(ValueError, match=f"^model: {said}") as e: as_config(config)
    assert "\n" not in str(e.value)


def test_a_config_written_out_in_full_is_taken_back():
    for config in ("phantom", "ViT-B-32", {"kind": "transformers", "name": "x"}, {"kind": "timm", "text_dropout": 0.3}):
        config = as_config(config)
        assert as_config(config.model_dump()) == config and set(config.model_dump()) == set(ModelConfig.model_fields)


def test_what_a_kind_is_said_to_read_it_reads():
    "Against the builders themselves: which fields of the config each looks at."
    import inspect
    import radclip.model as model
    shared = [model._logit_options]
    builders = {"open_clip": [model._build_open_clip, model._named_cfg], "transformers": [model._build_transformers],
                "timm": [model._build_towers, model._tokenizer, model._text_cfg]}
    for kind, functions in builders.items():
        src = "\n".join(inspect.getsource(f) for f in [*functions, *shared])
        read = set(re.findall(r"config\.(\w+)", src)) | set(re.findall(r'"(init_\w+)"', src))
        assert {f for f in ModelConfig.model_fields if is_read(f, kind)} == read & set(ModelConfig.model_fields) | {"kind"}, kind
    assert all(is_read(f, "phantom") == is_read(f, "timm") for f in ModelConfig.model_fields)


def test_importing_the_config_loads_no_open_clip():
    code = "import sys, radclip.model; sys.exit(any(m in sys.modules for m in ('open_clip', 'timm', 'transformers', 'datasets')))"
    subprocess.run([sys.executable, "-c", code], check=True)
