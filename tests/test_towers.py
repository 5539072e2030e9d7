"""The towers of our own: shapes, sizes, sides, word pieces."""
import json

import pytest
import torch

from radclip import towers

CAPTIONS = ["Frontal chest radiograph shows a large right pleural effusion.",
            "Axial CT of the head with a small left subdural hematoma.",
            "Café-au-lait: No pleural effusion or pneumothorax."] * 4


def test_phantom_tower_has_16_by_16_cells_and_is_small():
    cnn = towers.PhantomCNN().eval()
    with torch.no_grad():
        maps = cnn.forward_features(torch.randn(2, 3, 128, 128))
    assert maps.shape == (2, cnn.width, 16, 16)
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cnn(torch.randn(1, 3, 128, 128))
    assert counter.get_total_flops() / 2 <= 26e6  # multiply-adds of one image: what two CPU cores can afford


def test_pooled_vector_knows_sides_where_average_pooling_forgets_them():
    torch.manual_seed(0)
    cnn = towers.PhantomCNN().eval()
    left = torch.zeros(1, 3, 128, 128)
    left[..., 48:80, 16:48] = 1.0
    with torch.no_grad():
        features = [cnn.forward_features(x) for x in (left, left.flip(3))]
        pooled = [cnn.forward_head(f) for f in features]
        average = [f.mean((2, 3)) for f in features]

    def gap(a, b):
        return ((a - b).norm() / a.norm()).item()
    assert gap(*pooled) > 0.3 and gap(*average) < gap(*pooled) / 2


def test_phantom_tower_speaks_timms_interface():
    import timm
    assert "radclip_phantom_cnn" in timm.list_models("radclip*")
    trunk = timm.create_model("radclip_phantom_cnn", num_classes=7)
    assert trunk(torch.randn(1, 3, 128, 128)).shape == (1, 7)
    trunk.reset_classifier(0, global_pool="")
    assert trunk.num_features == trunk.width and trunk(torch.randn(1, 3, 64, 64)).shape == (1, trunk.width, 8, 8)


def test_every_part_of_the_phantom_tower_gets_a_gradient():
    cnn = towers.PhantomCNN(num_classes=3)
    for block in cnn.blocks:  # the zero that makes a new block the identity also stops its gradient for one step
        torch.nn.init.ones_(block.widen[1].weight)
    cnn(torch.randn(4, 3, 128, 128)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in cnn.named_parameters())


def test_word_pieces_lower_case_mark_both_ends_and_keep_unknown_apart():
    words = towers.train_word_pieces(CAPTIONS, 300)
    ids = words("PLEURAL effusion").input_ids
    assert ids == words("pleural EFFUSION").input_ids
    assert ids[0] == words.cls_token_id and ids[-1] == words.sep_token_id
    assert words.decode(ids, skip_special_tokens=True) == "pleural effusion"
    assert words.unk_token_id in words("漢").input_ids
    assert [words.convert_tokens_to_ids(t) for t in towers.SPECIAL.values()] == [0, 1, 2, 3, 4]


def test_word_pieces_are_the_same_at_every_training():
    a, b = (towers.train_word_pieces(CAPTIONS, 200).get_vocab() for _ in range(2))
    assert a == b and len(a) <= 200


@pytest.mark.parametrize("captions", [[], ["", "  "]])
def test_word_pieces_without_captions_are_refused(captions):
    with pytest.raises(ValueError, match="captions"):
        towers.train_word_pieces(captions)


def test_saved_tokenizer_names_a_class_that_old_and_new_transformers_know(tmp_path):
    from transformers import AutoTokenizer
    words = towers.train_word_pieces(CAPTIONS, 300)
    towers.save_tokenizer(words, tmp_path, 16)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert all(again(c).input_ids == words(c).input_ids for c in CAPTIONS)


def test_scratch_text_pools_at_the_end_token_and_not_at_the_largest_id():
    words = towers.train_word_pieces(CAPTIONS, 300)
    cfg = towers.scratch_text(words, context_length=16)
    assert (cfg["pool_type"], cfg["eos_id"], cfg["pad_id"]) == ("eos", words.sep_token_id, words.pad_token_id)
    assert cfg["vocab_size"] == len(words)


def test_mistyped_timm_name_gets_neighbours():
    with pytest.raises(ValueError, match="resnet18"):
        towers.timm_image("resnt18")
