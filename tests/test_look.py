"""Heat maps: attention by hand is the kernel's, and maps are what the rows read.

A trained model looks where it should.
"""

import functools
import json

import pytest
import torch
from PIL import Image

import weights
from layers import Attention
from tokenizer import BPE
from tools import look as looking
from tools import plot, probe, toy
from conftest import TINY_VILT, TOL, WORDS, picture, tiny, trained_toy, vilt_model

TEXT = "a red dog on a <mask> car"


@functools.cache
def tok():
    return BPE.train([" ".join(WORDS)] * 3, 300)


def special_ids():
    return dict(vocab_size=len(tok()), cls_id=tok().cls_id, pad_id=tok().pad_id,
                sep_id=tok().sep_id, mask_id=tok().mask_id)


def model_of(name):
    """A tiny model with a tokenizer.

    FLM's reconstructor stands beside the last of two fusion layers.
    """
    if name == "vilt":
        model = vilt_model(looking.vilt.Config(**{**vars(TINY_VILT), **special_ids()}))
    else:
        model = tiny(objective=name, reconstructor_fusion_layers=1, image_size=32, **special_ids())
    model.tokenizer = tok()
    return model


@pytest.fixture
def photo(tmp_path):
    """48 pixels wide, 32 high: ViLT keeps the shape, FLM makes it square."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(picture(5, (48, 32)))
    return path


# -- by hand ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["flm", "mlm", "ar", "vilt"])
def test_attention_by_hand_times_values_is_what_each_layer_outputs(name, photo):
    model, outputs, inputs = model_of(name), {}, {}
    for layer, module in model.named_modules():
        if isinstance(module, Attention):
            def keep(module, args, output, layer=layer):
                inputs[layer], outputs[layer] = args, output
            module.register_forward_hook(keep)
    ids, image = looking.blanked_ids(model, TEXT), looking.open_picture(photo, model.config)
    with looking.watched(model) as found, torch.no_grad():
        batch = looking.picture_batch(model.config, [image], ids.device)
        model.fuse(looking.encode_batch_images(model, batch), model.encode_text(ids))
    layers = {layer: module for layer, module in model.named_modules()
              if isinstance(module, Attention)}
    assert found.keys() == outputs.keys() == layers.keys()
    for layer, module in layers.items():
        _, v = module.keys_and_values(inputs[layer][1])                         # (B, heads, K, d)
        y = found[layer] @ v                                                    # (B, heads, Q, d)
        torch.testing.assert_close(module.out(y.transpose(1, 2).flatten(2)), outputs[layer], **TOL)


def test_a_fully_masked_row_has_no_weights_and_all_others_add_up_to_one():
    attention = Attention(8, 2)
    may_look = torch.tensor([[[True, False, True], [False, False, False]]])
    x = torch.randn(1, 2, 8)
    weights_ = looking.attention_weights(attention, x, torch.randn(1, 3, 8),
                                         looking.Mask.of(may_look))
    assert not weights_[:, :, 1].any() and not weights_[:, :, 0, 1].any()
    torch.testing.assert_close(weights_[:, :, 0].sum(-1), torch.ones(1, 2))


def test_a_model_is_watched_during_the_block_alone(photo):
    model = model_of("flm")
    with looking.watched(model):
        pass
    looking.look(model, photo, TEXT)
    assert not any(module._forward_hooks for module in model.modules())


# -- maps ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, layers, grid", [
    ("flm", {"reconstructed": 1, "left_to_right": 2, "right_to_left": 2}, (4, 4)),
    ("mlm", {"reconstructed": 2}, (4, 4)), ("ar", {"left_to_right": 2}, (4, 4)),
                                                ("prefix", {"left_to_right": 2}, (4, 4)),
    ("vilt", {"reconstructed": 2}, (3, 4))])
def test_each_output_has_a_map_for_every_layer_and_token(name, layers, grid, photo):
    model = model_of(name)
    found = looking.look(model, photo, TEXT)
    n = len(found.tokens)
    assert found.tokens[0] == "<s>" and found.tokens[-1] == "</s>" and "<mask>" in found.tokens
    assert {output: len(maps.layers) for output, maps in found.maps.items()} == layers
    for map_of in found.named_maps().values():
        assert map_of.shape == (n, *grid) and (map_of >= 0).all()
        assert (map_of.flatten(1).sum(1) <= 1 + 1e-5).all() and map_of.sum() > 0
    assert (found.may_read is not None) == (name == "flm")
    assert (found.transport is not None) == (name == "vilt")
    if name == "vilt":
        torch.testing.assert_close(found.transport[1:-1].sum((1, 2)), torch.ones(n - 2))
        assert not found.transport[[0, -1]].any()


def test_what_a_query_may_read_leaves_out_its_own_word_and_nothing_else(photo):
    found = looking.look(model_of("flm"), photo, TEXT)
    n = len(found.tokens)
    for i in range(1, n):
        left, right = found.may_read[i].split(n)
        assert (left | right).tolist() == [0 < j != i for j in range(n)]
        assert not left[i:].any() and not right[:i + 1].any()


def test_a_query_looks_where_the_rows_that_it_reads_look(photo):
    """The first word's query reads the right-to-left stream alone.

    The last token's reads the left-to-right one.
    """
    model = model_of("flm")
    found = looking.look(model, photo, TEXT)
    last = {output: maps.layers[-1].flatten(1) for output, maps in found.maps.items()}
    for query, stream in ((1, "right_to_left"), (-1, "left_to_right")):
        read = last[stream][2:] if query == 1 else last[stream][1:-1]
        low, high = read.amin(0), read.amax(0)                  # a mean of these rows lies between
        looked = last["reconstructed"][query]
        assert ((low - 1e-6 <= looked) & (looked <= high + 1e-6)).all()


@pytest.mark.parametrize("name", ["flm", "vilt"])
def test_rollout_of_a_model_that_looks_at_one_patch_alone_arrives_there(name, photo, monkeypatch):
    """Every attention that can see patch 6 gives it all.

    Then no share may come from another patch.
    """
    model = model_of(name)
    n = len(looking.blanked_ids(model, TEXT)[0])

    def to_patch_6(attention, x, memory, mask=None):
        K = memory.shape[1]
        # FLM: 1 + 4 x 4 tokens; ViLT: text, 1 + 3 x 4
        patches = {17: 0, 13 + n: n}.get(K)
        shares = torch.full((x.shape[0], 1, x.shape[1], K), 1 / K)
        if patches is not None:
            shares = torch.eye(K)[[patches + 1 + 6]].expand(x.shape[0], 1, x.shape[1], K)
        return shares

    monkeypatch.setattr(looking, "attention_weights", to_patch_6)
    for maps in looking.look(model, photo, TEXT).maps.values():
        shares = maps.rolled_out.flatten(1)
        assert (shares[:, 6] > 0.2).all() and torch.equal(shares.argmax(1), torch.full((n,), 6))
        assert not torch.cat([shares[:, :6], shares[:, 7:]], dim=1).any()


def test_roll_out_is_the_product_of_the_halves_that_stay_and_the_halves_that_are_read():
    first, second = torch.rand(2, 1, 5, 5).softmax(-1)
    eye = torch.eye(5)
    expected = (eye + second[0]) / 2 @ (eye + first[0]) / 2
    torch.testing.assert_close(looking.roll_out([first, second], 5), expected)


# -- commands --------------------------------------------------------------------------------------

def save(path, model):
    weights.save(path, model.state_dict(), model.config, "pretrain",
                 weights.pack_tokenizer(model.tokenizer))


@pytest.mark.slow
@pytest.mark.parametrize("name, output",
                         [("flm", "reconstructed"), ("flm", "left_to_right"),
                          ("vilt", "reconstructed")])
def test_plot_look_writes_a_picture(name, output, photo, tmp_path):
    save(tmp_path / "x.pt", model_of(name))
    plot.main(["look", str(tmp_path / "x.pt"), str(photo), TEXT, "--of", output, "--out",
               str(tmp_path / "x.png")])
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "PNG" and image.width == 1500


def test_plot_look_refuses_in_one_sentence(photo, tmp_path):
    save(tmp_path / "x.pt", model_of("ar"))
    for part, *arguments in (
            ("--of reconstructed: this model has left_to_right", photo, TEXT, "--of",
             "reconstructed"),
            ("at least one word", photo, ""), ("this model reads at most", photo, "dog " * 500),
            ("x.pt: not a picture", tmp_path / "x.pt", TEXT),
                             ("no such picture", tmp_path / "y.jpg", TEXT)):
        with pytest.raises(SystemExit) as error:
            plot.main(["look", str(tmp_path / "x.pt"), *map(str, arguments), "--out",
                       str(tmp_path / "x.png")])
        message = str(error.value)
        assert message.startswith("plot.py: ") and part in message and "\n" not in message
    assert not (tmp_path / "x.png").exists()


@pytest.mark.slow
def test_a_trained_model_looks_at_the_shape_that_a_word_names(tmp_path):
    """Chance is the share of the patches that would have been right, about 7 %.

    A query does not read its own word.
    """
    checkpoint = trained_toy()
    toy.make(tmp_path, images=1, eval_images=60, workers=1)
    probe.main(["look", str(checkpoint), "--data", str(tmp_path), "--captions", "60", "--device",
                "cpu",
                "--out", str(tmp_path / "look.json")])
    names = list(json.loads((tmp_path / "look.json").read_text())[0]["maps"])
    last = [name for name in names if name.startswith("reconstructed, layer")][-1]
    for group, found in toy.pointing(tmp_path / "look.json", tmp_path)[last].items():
        assert found["words"] > 80 and found["chance"] < 0.1, group
        assert found["right"] > 0.75, (group, found)
