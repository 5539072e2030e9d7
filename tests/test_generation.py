"""Captions with a known answer: a captioner that learnt eight pairs by heart says them, however it is asked."""
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from radclip.blip import build_captioner, encode_captions
from radclip.data import load_pairs
from radclip.generation import GenerateConfig, caption_images, generate_options, tidy_caption
from radclip.loading import PixelCache


@pytest.fixture(scope="module")
def known():
    "A captioner and the eight pairs it was overfitted on."
    pairs = load_pairs("phantom:60", "train").select(range(8))
    captions = [texts[0] for texts in pairs["captions"]]
    torch.manual_seed(0)
    captioner = build_captioner({"vision_width": 64, "vision_layers": 2, "text_width": 64, "text_layers": 2, "text_heads": 2}, captions)
    pixels = torch.stack([captioner.preprocess(image) for image in pairs["image"]])
    batch, optimizer = encode_captions(captioner, captions), torch.optim.AdamW(captioner.model.train().parameters(), lr=2e-3)
    for _ in range(130):
        captioner.model(pixel_values=pixels, **batch).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    captioner.model.eval()
    return captioner, pairs, [text.lower() for text in captions]


@pytest.fixture(scope="module")
def unsure(known):
    "The same captioner with some noise on its decoder: it hesitates, and still says the same each time."
    captioner = known[0]._replace(model=copy.deepcopy(known[0].model))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in captioner.model.text_decoder.parameters(): p.add_(torch.randn_like(p) * 0.02)
    return captioner


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_eight_captions_come_back_letter_for_letter(known, beams, batch_size):
    captioner, pairs, expected = known
    assert caption_images(captioner, pairs, {"beams": beams}, batch_size) == expected


def test_the_order_of_images_is_the_order_of_captions(known):
    captioner, pairs, expected = known
    assert caption_images(captioner, pairs.select([5, 0, 3]), {"beams": 1}) == [expected[i] for i in (5, 0, 3)]


@pytest.mark.parametrize("beams", [1, 4])
def test_batched_and_one_by_one_agree_where_the_model_hesitates(unsure, beams):
    images = list(load_pairs("phantom:60", "train").select(range(8, 20))["image"])
    together = caption_images(unsure, images, {"beams": beams, "max_new_tokens": 30}, 12)
    assert together == caption_images(unsure, images, {"beams": beams, "max_new_tokens": 30}, 1)
    assert together == caption_images(unsure, images, {"beams": beams, "max_new_tokens": 30}, 5)
    assert len(set(together)) > 2


def test_wrong_first_token_is_noticed(known):
    "The planted fault of the chapter: decoding that starts elsewhere than training did says something else."
    captioner, pairs, expected = known
    broken = captioner._replace(model=copy.deepcopy(captioner.model))
    broken.model.config.text_config.bos_token_id = captioner.tokenizer.pad_token_id
    assert caption_images(broken, pairs, {"beams": 1}) != expected


def test_every_form_of_images_gives_the_same_captions(known, tmp_path):
    captioner, pairs, expected = known
    pictures = [image.convert("RGB") for image in pairs["image"]]
    paths = [tmp_path / f"{i}.png" for i in range(8)]
    for path, picture in zip(paths, pictures): picture.save(path)
    cache = PixelCache.build(pairs, captioner.preprocess, tmp_path / "cache")
    for images in (pictures, paths, [str(p) for p in paths], cache, np.array(cache.pixels), torch.from_numpy(np.array(cache.pixels))):
        assert caption_images(captioner, images, {"beams": 1}) == expected
    assert caption_images(captioner, []) == []


def test_each_image_is_encoded_once_whatever_the_beams(known):
    captioner, pairs, _ = known
    seen, keys = [], []
    cross = captioner.model.text_decoder.bert.encoder.layer[0].crossattention.self
    hooks = [captioner.model.vision_model.register_forward_hook(lambda m, i, output: seen.append(len(output[0]))),
             cross.key.register_forward_hook(lambda m, i, output: keys.append(len(output)))]
    try:
        for beams in (1, 3, 5):
            seen.clear(), keys.clear()
            caption_images(captioner, pairs, {"beams": beams}, batch_size=5)
            assert seen == [5, 3] and keys == [5 * beams, 3 * beams]  # states are copied for each beam, keys computed once
    finally:
        for hook in hooks: hook.remove()


def test_the_mode_is_put_back_and_nothing_is_learnt(known):
    captioner, pairs, expected = known
    before = {k: v.clone() for k, v in captioner.model.state_dict().items()}
    captioner.model.train()
    assert caption_images(captioner, pairs, {"beams": 1}) == expected and captioner.model.training
    captioner.model.eval()
    assert all(torch.equal(v, before[k]) for k, v in captioner.model.state_dict().items())


# --- settings

def generated(captioner, pairs, config):
    "Token ids, caught where they become text."
    caught = []
    decode = captioner.tokenizer.batch_decode
    captioner.tokenizer.batch_decode = lambda ids, **options: caught.extend(ids.tolist()) or decode(ids, **options)
    try: caption_images(captioner, pairs, config)
    finally: del captioner.tokenizer.batch_decode
    return caught


def test_lengths_are_obeyed(known):
    captioner, pairs, _ = known
    end = captioner.tokenizer.sep_token_id
    for beams in (1, 3):
        assert {len(ids) for ids in generated(captioner, pairs, {"beams": beams, "max_new_tokens": 7})} == {7}
        assert min(ids.index(end) for ids in generated(captioner, pairs, {"beams": beams})) < 50
        assert all(end not in ids[:50] for ids in generated(captioner, pairs, {"beams": beams, "min_new_tokens": 50}))


def test_no_ngram_occurs_twice(known):
    captioner, pairs, _ = known
    def repeats(ids, n):
        runs = [run for run in (tuple(ids[i:i + n]) for i in range(len(ids) - n + 1)) if captioner.tokenizer.pad_token_id not in run]
        return len(runs) - len(set(runs))  # what fills up a caption that ended before the others is no part of it

    forced = {"beams": 1, "min_new_tokens": 60}
    assert max(repeats(ids, 2) for ids in generated(captioner, pairs, forced)) > 0
    assert max(repeats(ids, 2) for ids in generated(captioner, pairs, forced | {"no_repeat_ngram": 2})) == 0
    assert min(map(len, generated(captioner, pairs, forced))) >= 60


def test_length_penalty_moves_the_length(unsure):
    images = list(load_pairs("phantom:60", "train").select(range(8, 20))["image"])
    short, long = (sum(map(len, caption_images(unsure, images, {"length_penalty": p, "beams": 4}))) for p in (-4.0, 4.0))
    assert short < long


def test_settings_that_contradict_each_other():
    with pytest.raises(ValueError, match="min_new_tokens 9 is more than max_new_tokens allows .8."):
        generate_options(GenerateConfig(max_new_tokens=8, min_new_tokens=9))
    with pytest.raises(ValueError, match="positions"): generate_options(GenerateConfig(min_new_tokens=40), room=30)
    assert generate_options(GenerateConfig(), room=30)["max_new_tokens"] == 30  # the decoder has no position after that
    assert "length_penalty" not in generate_options(GenerateConfig(beams=1))
    with pytest.raises(ValueError): GenerateConfig(beams=0)
    with pytest.raises(ValueError): GenerateConfig(beam=3)


# --- refusals

def test_unreadable_images_are_named_in_one_line(known, tmp_path):
    captioner, pairs, _ = known
    good = tmp_path / "good.png"
    pairs[0]["image"].save(good)
    (tmp_path / "broken.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "text.png").write_text("not an image")
    for name, error in (("broken.png", ValueError), ("text.png", ValueError), ("absent.png", ValueError)):
        with pytest.raises(error, match=f"image 1 .*{name}") as caught: caption_images(captioner, [good, tmp_path / name], {"beams": 1})
        assert "\n" not in str(caught.value)
    from datasets import Dataset, Features, Image as ImageFeature
    table = Dataset.from_dict({"image": [str(good), str(tmp_path / "text.png")]}, features=Features({"image": ImageFeature()}))
    with pytest.raises(ValueError, match="image 1 can't be read"): caption_images(captioner, table)
    with pytest.warns(UserWarning, match="can't be read"): cache = PixelCache.build(table, captioner.preprocess, tmp_path / "cache")
    with pytest.raises(ValueError, match="image 1 can't be read"): caption_images(captioner, cache)
    assert len(caption_images(captioner, cache.pixels[cache.good], {"beams": 1})) == 1


def test_wrong_arrays_and_nan_weights(known):
    captioner, pairs, _ = known
    with pytest.raises(ValueError, match="uint8"): caption_images(captioner, np.zeros((2, 64, 64, 3), np.uint8))
    broken = captioner._replace(model=copy.deepcopy(captioner.model))
    with torch.no_grad(): broken.model.vision_model.post_layernorm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"): caption_images(broken, pairs)


# --- text

@pytest.mark.parametrize("decoded, tidy", [
    ("portal - phase ct ( arrow ) , left .", "portal-phase ct (arrow), left."), ("a 2 . 5 x 1 , 5 cm cyst", "a 2.5 x 1,5 cm cyst"),
    ("crohn ' s disease ; t2 / flair", "crohn's disease; t2/flair"), (" no  effusion. no stone . ", "no effusion. no stone."), ("", ""),
])
def test_tidy(decoded, tidy): assert tidy_caption(decoded) == tidy


@given(st.text(alphabet="ab1 .,-()/'", max_size=40))
@settings(max_examples=200, deadline=None)
def test_tidy_takes_out_spaces_only_and_is_done_at_once(text):
    tidy = tidy_caption(text)
    assert tidy.replace(" ", "") == text.replace(" ", "") and tidy_caption(tidy) == tidy


# --- any image-to-text model of transformers

def words_of(*special):
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[BOS]", "[EOS]", *special, "USER:", "ASSISTANT:", "describe", "a", "stone"])}
    words = tk.Tokenizer(tk.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]",
                                   additional_special_tokens=list(special))


def llava(folder):
    "A LLaVA of a few thousand weights, saved as one from the hub is."
    from transformers import (CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor)
    tokenizer, size = words_of("<image>"), {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=28, patch_size=14), image_token_index=4, image_token_id=4,
        text_config=LlamaConfig(**size, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=3)))
    template = "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
    processor = LlavaProcessor(CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), tokenizer, patch_size=14,
                               vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token="<image>", chat_template=template)
    model.save_pretrained(folder), processor.save_pretrained(folder)


def test_a_llava_answers_without_repeating_the_question(tmp_path):
    llava(tmp_path / "llava")
    captioner = build_captioner({"kind": "auto", "name": str(tmp_path / "llava"), "prompt": "describe a stone"})
    pictures = [Image.fromarray(x) for x in np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)]
    written = caption_images(captioner, pictures, {"beams": 2, "max_new_tokens": 6})
    assert len(written) == 3 and not any("USER" in text or len(text.split()) > 6 for text in written)
    assert written == caption_images(captioner, pictures, {"beams": 2, "max_new_tokens": 6}, batch_size=1)
    assert written == caption_images(captioner, np.stack([np.asarray(p) for p in pictures]), {"beams": 2, "max_new_tokens": 6})


def test_a_blip_gives_the_same_by_either_kind(tmp_path):
    from test_blip import stock_folder
    stock_folder(tmp_path / "stock")
    picture = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))]
    one, other = (build_captioner({"kind": kind, "name": str(tmp_path / "stock")}) for kind in ("blip", "auto"))
    assert caption_images(one, picture, {"max_new_tokens": 8}) == caption_images(other, picture, {"max_new_tokens": 8})


def test_a_model_that_cannot_write_is_refused(tmp_path):
    from transformers import BertConfig, BertModel
    BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).save_pretrained(tmp_path / "bert")
    words_of().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="image-to-text") as caught: build_captioner({"kind": "auto", "name": str(tmp_path / "bert")})
    assert "\n" not in str(caught.value)
