"Loading: bytes equal to the model's own preprocess, a cache that survives what happens to files, sides kept, order that can be resumed."
import io, os, pickle, subprocess, sys

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given, settings, strategies as st
from open_clip.transform import image_transform
from PIL import Image as PIL
from torchvision.transforms import Compose, Resize, ToTensor

import radclip.loading as loading
from radclip.loading import (AugmentConfig, EpochBatches, PairsDataset, PixelCache, augment, collate, draw_caption, eight_bit, place_uniform,
                             resize_image, split_preprocess)

FEATURES = Features(image=Image(), captions=List(Value("string")), image_id=Value("string"), group=Value("string"), split=Value("string"),
                    concepts=List(Value("string")))


def table(images, captions=None):
    n = len(images)
    return Dataset.from_dict(dict(image=images, captions=captions or [[f"caption {i}"] for i in range(n)], image_id=[str(i) for i in range(n)],
                                  group=[f"g{i // 2}" for i in range(n)], split=["train"] * n, concepts=[[]] * n), features=FEATURES)


def noise(h, w, mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    if mode == "I;16": return PIL.fromarray(rng.integers(0, 4096, (h, w)).astype(np.uint16))
    return PIL.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).convert(mode)


def jpeg(seed, h=40, w=50):
    buffer = io.BytesIO(); noise(h, w, seed=seed).save(buffer, "JPEG"); return buffer.getvalue()


def word_lengths(texts): return torch.tensor([[len(t), sum(map(ord, t)) % 997] for t in texts])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_pixels_equal_the_models_own_preprocess(mode, resize_mode, tmp_path):
    preprocess = image_transform(32, is_train=False, resize_mode=resize_mode, fill_color=7)
    images = [noise(h, w, mode, seed=h) for h, w in [(32, 32), (47, 33), (20, 90), (101, 17), (6, 64)]]
    if mode == "CMYK":  # PNG has no CMYK: through files, as it would arrive
        for i, image in enumerate(images): image.save(tmp_path / f"{i}.tif")
        pairs = table([str(tmp_path / f"{i}.tif") for i in range(len(images))])
    else: pairs = table(images)
    cache = PixelCache.build(pairs, preprocess, tmp_path)
    expected = torch.stack([preprocess(image) for image in pairs["image"]])
    assert not cache.bad and torch.equal(cache.to_float(range(len(images))), expected)


def test_a_target_that_is_not_square(tmp_path):
    preprocess = image_transform((24, 40), is_train=False)
    pairs = table([noise(50, 61), noise(30, 90)])
    cache = PixelCache.build(pairs, preprocess, tmp_path)
    assert cache.pixels.shape == (2, 24, 40, 3)
    assert torch.equal(cache.to_float([0, 1]), torch.stack([preprocess(i) for i in pairs["image"]]))


def test_a_twelve_bit_image_is_not_clipped_to_white(tmp_path):
    preprocess, image = image_transform(32, is_train=False), noise(40, 40, "I;16")
    pairs = table([image])
    assert pairs[0]["image"].mode == "I;16"
    cache = PixelCache.build(pairs, preprocess, tmp_path)
    assert torch.equal(cache.to_float([0])[0], preprocess(eight_bit(image)))
    assert 100 < cache.pixels.mean() < 155
    plain = noise(9, 9, "L")
    assert eight_bit(plain) is plain


def test_exif_rotation_is_applied_as_datasets_does(tmp_path):
    exif = PIL.Exif(); exif[0x0112] = 6
    noise(20, 60).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pairs, preprocess = table([str(tmp_path / "turned.jpg")]), image_transform(32, is_train=False, resize_mode="longest")
    assert pairs[0]["image"].size == (20, 60)  # upright: 20 wide
    assert torch.equal(PixelCache.build(pairs, preprocess, tmp_path).to_float([0])[0], preprocess(pairs[0]["image"]))


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="can't be cached"): split_preprocess(lambda x: x)
    with pytest.raises(ValueError, match="can't be cached"): split_preprocess(image_transform(32, is_train=False).transforms[0])


def counted(monkeypatch):
    calls, real = [], loading.resize_image
    monkeypatch.setattr(loading, "resize_image", lambda *a: calls.append(1) or real(*a))
    return calls


def test_the_second_build_decodes_nothing(tmp_path, monkeypatch):
    calls, pairs, preprocess = counted(monkeypatch), table([noise(20, 20, seed=i) for i in range(6)]), image_transform(16, is_train=False)
    PixelCache.build(pairs, preprocess, tmp_path); first = len(calls)
    assert first >= 6
    again = PixelCache.build(pairs, preprocess, tmp_path)
    assert len(calls) == first and len(again) == 6
    PixelCache.build(pairs, image_transform(16, is_train=False, interpolation="bilinear"), tmp_path)
    assert len(calls) > first


def test_mean_and_std_come_from_the_preprocess_at_hand(tmp_path):
    pairs = table([noise(20, 20)])
    PixelCache.build(pairs, image_transform(16, is_train=False), tmp_path)
    other = image_transform(16, is_train=False, mean=(.5,) * 3, std=(.5,) * 3)
    assert torch.equal(PixelCache.build(pairs, other, tmp_path).to_float([0])[0], other(pairs[0]["image"]))


def test_a_changed_file_is_decoded_again(tmp_path):
    file, preprocess = tmp_path / "a.png", image_transform(16, is_train=False)
    noise(16, 16, seed=1).save(file); pairs = table([str(file)])
    before = PixelCache.build(pairs, preprocess, tmp_path).pixels[0].copy()
    noise(16, 16, seed=2).save(file); os.utime(file, (1, 1))
    after = PixelCache.build(table([str(file)]), preprocess, tmp_path).pixels[0]
    assert np.array_equal(after, np.asarray(noise(16, 16, seed=2))) and not np.array_equal(before, after)


def test_an_interrupted_build_goes_on_and_is_never_half_read(tmp_path, monkeypatch):
    images, preprocess = [noise(20, 20, seed=i) for i in range(40)], image_transform(16, is_train=False)
    pairs, real, calls = table(images), loading.resize_image, []
    monkeypatch.setattr(loading._fill, "__defaults__", (8,))
    def dies(*a):
        calls.append(1)
        if len(calls) > 20: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(loading, "resize_image", dies)
    with pytest.raises(KeyboardInterrupt): PixelCache.build(pairs, preprocess, tmp_path, workers=1)
    assert len(list((tmp_path / "pixels").glob("*.partial"))) == 1
    calls = counted(monkeypatch); monkeypatch.setattr(loading, "resize_image", lambda *a: calls.append(1) or real(*a))
    cache = PixelCache.build(pairs, preprocess, tmp_path, workers=1)
    assert len(calls) < 40, "it began again"
    assert all(np.array_equal(cache.pixels[i], resize_image(image, split_preprocess(preprocess)[0])) for i, image in enumerate(images))
    assert not list((tmp_path / "pixels").glob("*.partial"))


BUILD = """
import os, time
import datasets, numpy as np
from PIL import Image
from torchvision.transforms import Compose, Resize, ToTensor
import radclip.loading as loading
real, calls = loading.resize_image, []
def slow(*a):
    calls.append(1)
    if len(calls) > {most}: os._exit(9)
    time.sleep(0.01)
    return real(*a)
loading.resize_image, loading._fill.__defaults__ = slow, (8,)
images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)) for i in range(40)]
table = datasets.Dataset.from_dict(dict(image=images), features=datasets.Features(image=datasets.Image()))
cache = loading.PixelCache.build(table, Compose([Resize(16), ToTensor()]), {folder!r}, workers=1)
print(len(calls), int(cache.pixels[:].astype(int).sum()))
"""


def run_build(folder, most=10**6):
    code = BUILD.format(folder=str(folder), most=most)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))


def test_a_process_that_died_is_continued_and_two_at_once_share_the_work(tmp_path):
    dead = run_build(tmp_path / "a", most=20); dead.communicate()
    assert dead.returncode == 9 and list((tmp_path / "a" / "pixels").glob("*.partial"))
    two = [run_build(tmp_path / "a"), run_build(tmp_path / "a")]
    (decoded, total), (others, same) = sorted(([int(x) for x in p.communicate()[0].split()] for p in two), reverse=True)
    assert (decoded, others) == (24, 0)  # two chunks of 8 were done already; who came second decoded nothing
    geometry = split_preprocess(Compose([Resize(16), ToTensor()]))[0]
    assert total == same == sum(int(resize_image(noise(20, 20, seed=i), geometry).astype(int).sum()) for i in range(40))


def test_a_damaged_cache_is_rebuilt(tmp_path):
    pairs, preprocess = table([noise(20, 20, seed=i) for i in range(3)]), image_transform(16, is_train=False)
    cache = PixelCache.build(pairs, preprocess, tmp_path); good = cache.pixels[:].copy()
    for name, text in [("pixels.npy", b"short"), ("cache.json", b"{")]:
        (cache.folder / name).write_bytes(text)
        assert np.array_equal(PixelCache.build(pairs, preprocess, tmp_path).pixels, good)
    part = cache.folder.with_name(cache.folder.name + ".partial"); cache.folder.rename(part)
    (part / "pixels.npy").write_bytes(b"short")
    assert np.array_equal(PixelCache.build(pairs, preprocess, tmp_path).pixels, good)


def broken_pairs(tmp_path):
    whole = jpeg(2)
    (tmp_path / "whole.jpg").write_bytes(whole); (tmp_path / "text.png").write_text("not an image"); (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    names = ["whole", "cut", "whole", "missing", "empty", "whole", "text"]
    return table([str(tmp_path / (n + (".png" if n == "text" else ".jpg"))) for n in names])


def test_unreadable_images_are_counted_listed_and_left_out(tmp_path):
    pairs, preprocess = broken_pairs(tmp_path), image_transform(16, is_train=False)
    with pytest.warns(UserWarning, match="4 of 7 images can't be read.*row 1 .*truncated"): cache = PixelCache.build(pairs, preprocess, tmp_path)
    assert list(cache.bad) == [1, 3, 4, 6] and "truncated" in cache.bad[1] and "missing.jpg" in cache.bad[3]
    with pytest.warns(UserWarning, match="4 of 7"): cache = PixelCache.build(pairs, preprocess, tmp_path)  # said again when reopened
    data = PairsDataset(pairs, cache, word_lengths)
    loader = torch.utils.data.DataLoader(data, batch_sampler=EpochBatches(len(data), 2, drop_last=False), collate_fn=collate)
    assert sorted(r for batch in loader for r in batch["row"].tolist()) == [0, 2, 5]


def test_a_table_without_one_readable_image_is_an_error(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no")
    with pytest.raises(ValueError, match="none of the 1 images"): PixelCache.build(table([str(tmp_path / "a.jpg")]), image_transform(16, is_train=False), tmp_path)


def test_a_disk_without_room_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda p: type("U", (), dict(free=10))())
    with pytest.raises(ValueError, match="RADCLIP_CACHE"): PixelCache.build(table([noise(9, 9)]), image_transform(16, is_train=False), tmp_path)


def test_the_cache_folder_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("RADCLIP_CACHE", str(tmp_path / "here"))
    assert tmp_path / "here" in PixelCache.build(table([noise(9, 9)]), image_transform(16, is_train=False)).folder.parents


def test_a_pickled_cache_holds_no_pixels(tmp_path):
    cache = PixelCache.build(table([noise(64, 64, seed=i) for i in range(8)]), image_transform(64, is_train=False), tmp_path)
    data = pickle.dumps(cache)
    assert len(data) < 2000 and np.array_equal(pickle.loads(data).pixels, cache.pixels)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 500), st.lists(st.integers(0, 10**7), min_size=1, max_size=9, unique=True))
def test_random_numbers_depend_on_the_row_alone(seed, epoch, rows):
    together = place_uniform(seed, epoch, rows, 3)
    assert ((0 <= together) & (together < 1)).all()
    for i, row in enumerate(rows): assert np.array_equal(together[i:i + 1], place_uniform(seed, epoch, [row], 3))
    assert not np.array_equal(together, place_uniform(seed, epoch + 1, rows, 3))
    assert not np.array_equal(together, place_uniform(seed + 1, epoch, rows, 3))


def test_random_numbers_are_uniform_and_uncorrelated():
    u = place_uniform(3, 7, np.arange(40_000), 3)
    for column in u.T:
        counts = np.histogram(column, 20, (0, 1))[0]
        assert ((counts - 2000) ** 2 / 2000).sum() < 50  # chi-squared with 19 degrees of freedom: beyond 50 once in 10,000
    assert abs(np.corrcoef(np.vstack([u.T, place_uniform(3, 8, np.arange(40_000), 3).T])) - np.eye(6)).max() < 0.025
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.025


def test_random_numbers_equal_splitmix64_in_whole_numbers():
    mask, gold = 2**64 - 1, 0x9E3779B97F4A7C15
    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31
    def number(seed, epoch, row, j, stream):
        key = 0
        for part in (seed, stream, epoch): key = mix(key + gold + part & mask)
        return (mix(mix(row * gold + key & mask) + gold * (j + 1) & mask) >> 11) / 2**53
    expected = [[number(11, 2, row, j, 1) for j in range(3)] for row in (0, 3, 10**9)]
    assert place_uniform(11, 2, [0, 3, 10**9], 3, stream=1).tolist() == expected


def test_augmentation_is_the_same_in_any_batch():
    pixels = np.stack([np.asarray(noise(48, 48, seed=i)) for i in range(70)])
    rows = np.arange(100, 170)
    whole = augment(pixels, rows, seed=5, epoch=3)
    order = np.random.default_rng(0).permutation(70)
    assert torch.equal(augment(pixels[order], rows[order], seed=5, epoch=3), whole[order])
    assert torch.equal(augment(pixels[9:10], rows[9:10], seed=5, epoch=3)[0], whole[9])
    assert not torch.equal(augment(pixels, rows, seed=5, epoch=4), whole)
    assert not torch.equal(augment(pixels, rows, seed=6, epoch=3), whole)


def test_left_stays_left():
    pixels = np.zeros((400, 64, 64, 3), np.uint8)
    pixels[:, 26:38, 10:20] = 255
    out = augment(pixels, np.arange(400), config=AugmentConfig(brightness=0, contrast=0))[:, 0]
    across, down = out.sum(1), out.sum(2)
    grid = torch.arange(64.) + 0.5
    x, y = (across * grid).sum(1) / across.sum(1), (down * grid).sum(1) / down.sum(1)
    assert (x < 32).all() and (y - 32).abs().max() < 12  # on the left in every one of 400 draws
    assert x.std() > 0.5 and y.std() > 0.5  # and it does move


def test_augmentation_that_does_nothing_gives_the_images():
    pixels = np.stack([np.asarray(noise(32, 32, seed=i)) for i in range(3)])
    still = AugmentConfig(scale=(1, 1), rotate=0, brightness=0, contrast=0)
    mean, std = (.5, .4, .3), (.2, .3, .4)
    expected = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(augment(pixels, [0, 1, 2], config=still, mean=mean, std=std), expected, atol=1e-4)


def test_brightness_and_contrast_stay_in_their_ranges():
    pixels = np.full((500, 8, 8, 3), 128, np.uint8)
    out = augment(pixels, np.arange(500), config=AugmentConfig(scale=(1, 1), rotate=0, brightness=0.1, contrast=0.5))
    grey = out[:, 0, 4, 4] * 255
    assert 128 - 25.6 < grey.min() < 128 - 23 and 128 + 23 < grey.max() < 128 + 25.6
    assert augment(np.full((50, 8, 8, 3), 250, np.uint8), np.arange(50)).max() <= 1


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="flip"): AugmentConfig(flip=True)


def data_of(tmp_path, n=11, **kwargs):
    captions = [[f"text {i % 4}", f"only {i}", "shared"] if i % 3 else [f"text {i % 4}"] for i in range(n)]
    pairs = table([noise(20, 20, seed=i) for i in range(n)], captions)
    return pairs, PairsDataset(pairs, PixelCache.build(pairs, image_transform(16, is_train=False), tmp_path), word_lengths, **kwargs)


def test_a_batch_holds_what_the_table_says(tmp_path):
    pairs, data = data_of(tmp_path, augment=AugmentConfig())
    for epoch in range(4):
        data.epoch = epoch
        batch = data.__getitems__([7, 2, 3])
        assert batch["row"].tolist() == [7, 2, 3] and batch["pixels"].shape == (3, 3, 16, 16) and batch["pixels"].dtype == torch.float32
        drawn = [draw_caption(pairs["captions"][r], r, 0, epoch) for r in (7, 2, 3)]
        assert [data.texts[t] for t in batch["text"]] == drawn and torch.equal(batch["tokens"], word_lengths(drawn))
        assert {k: v.dtype for k, v in batch.items() if k != "pixels"} == dict.fromkeys(["row", "text", "group", "tokens"], torch.int64)
        one = data[2]
        assert all(torch.equal(one[k], batch[k][1]) for k in batch)
    assert data.__getitems__([2, 3])["group"].unique().numel() == 1 and data.__getitems__([3, 4])["group"].unique().numel() == 2


def test_every_caption_is_drawn_in_time():
    seen = [draw_caption(["a", "b", "c"], row=5, seed=1, epoch=e) for e in range(300)]
    assert all(70 < seen.count(t) < 130 for t in "abc") and draw_caption(["a"], 0) == "a"


def test_evaluation_sees_every_caption_and_the_plain_image(tmp_path):
    pairs, data = data_of(tmp_path, train=False, augment=AugmentConfig())
    batch = data.__getitems__([4, 1])
    assert torch.equal(batch["pixels"], data.cache.to_float([4, 1])) and [data.texts[t] for t in batch["text"]] == [pairs["captions"][r][0] for r in (4, 1)]
    texts, image = data.all_texts()
    assert [(data.texts[t], i) for t, i in zip(texts, image.tolist())] == [(c, i) for i, captions in enumerate(pairs["captions"]) for c in captions]
    assert len(data.texts) == len(set(data.texts))


def test_a_cache_of_another_table_is_refused(tmp_path):
    pairs, data = data_of(tmp_path)
    with pytest.raises(ValueError, match="build the cache from this table"): PairsDataset(pairs.select(range(3)), data.cache)


def test_a_row_without_captions_is_refused(tmp_path):
    pairs = table([noise(9, 9)] * 2, [["a"], []])
    with pytest.raises(ValueError, match="row 1"): PairsDataset(pairs, PixelCache.build(pairs, image_transform(16, is_train=False), tmp_path))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 99), st.integers(0, 9), st.booleans(), st.booleans())
def test_batches_cover_an_epoch_once_and_can_start_anywhere(n, size, seed, epoch, shuffle, drop_last):
    if drop_last and n < size:
        with pytest.raises(ValueError, match="lower the batch size"): EpochBatches(n, size)
        return
    make = lambda start=0: EpochBatches(n, size, seed, epoch, start, shuffle, drop_last)
    batches = list(make())
    flat = [i for b in batches for i in b]
    assert len(batches) == len(make(1)) and len(set(flat)) == len(flat) == (n - n % size if drop_last else n)
    for start in range(len(batches) + 1): assert list(make(start)) == batches[start:]
    if not shuffle: assert flat == list(range(len(flat)))


def test_each_epoch_has_its_own_order():
    orders = {tuple(i for b in EpochBatches(50, 5, seed, epoch) for i in b) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_loader_with_workers_gives_the_same_batches(tmp_path):
    _, data = data_of(tmp_path, augment=AugmentConfig())
    make = lambda workers: torch.utils.data.DataLoader(data, batch_sampler=EpochBatches(len(data), 4, epoch=2), collate_fn=collate, num_workers=workers)
    for a, b in zip(make(0), make(1), strict=True): assert all(torch.equal(a[k], b[k]) for k in a)
