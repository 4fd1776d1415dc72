"""What transformers opens of an FLM, with equal features.

Its ViT opens as CLIP's, its text layers as RoBERTa's.
"""

import pytest
import torch
from conftest import TOL, WORDS, caption, tiny

import weights
from masks import left_to_right_mask, right_to_left_mask
from tokenizer import BPE

transformers = pytest.importorskip("transformers")


def opened(kind, folder, **how):
    """A model of transformers; all its tensors come from the file, and the file has no other."""
    model, found = getattr(transformers, kind).from_pretrained(
        folder, output_loading_info=True, **how)
    assert not any(found[what]
                   for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    return model.eval()


def exported_text(model, folder):
    weights.export(model, folder)
    return opened("RobertaModel", folder / "text", add_pooling_layer=False)


@torch.no_grad()
def test_the_vit_is_a_clip_vision_model(tmp_path):
    model = tiny()
    weights.export(model, tmp_path)
    theirs, images = opened("CLIPVisionModel", tmp_path / "vision"), torch.randn(3, 3, 24, 24)
    found, ours = theirs(pixel_values=images), model.vit(images)                    # (B, P, D)
    inner = getattr(theirs, "vision_model", theirs)
    torch.testing.assert_close(inner.post_layernorm(found.last_hidden_state), ours, **TOL)
    torch.testing.assert_close(found.pooler_output, ours[:, 0], **TOL)


@torch.no_grad()
def test_both_streams_of_the_text_layers_are_a_roberta_model_with_flms_masks(tmp_path):
    model = tiny()
    theirs = exported_text(model, tmp_path)
    ids = torch.cat([caption(n, 11, seed=n) for n in (11, 7, 4)])                   # two are padded
    real = ids != 1
    streams = model.encode_text(ids).streams                                        # (B, 2, L, D)
    for stream, mask_of in enumerate((left_to_right_mask, right_to_left_mask)):
        found = theirs(input_ids=ids, attention_mask=mask_of(real)[:, None]).last_hidden_state
        torch.testing.assert_close(found[real], streams[:, stream][real], **TOL)
    # which is not FLM's reading
    plain = theirs(input_ids=ids, attention_mask=real.long()).last_hidden_state
    assert (plain[real] - streams[:, 0][real]).abs().max() > 0.1


@torch.no_grad()
def test_the_text_layers_of_mlm_are_a_roberta_model_as_it_stands(tmp_path):
    model = tiny(objective="mlm")
    theirs = exported_text(model, tmp_path)
    ids = torch.cat([caption(n, 11, seed=n) for n in (11, 6)])
    real = ids != 1
    found = theirs(input_ids=ids, attention_mask=real.long()).last_hidden_state
    torch.testing.assert_close(found[real], model.encode_text(ids).streams[:, 0][real], **TOL)


def test_flm_begins_again_from_the_text_that_it_exported(tmp_path):
    model, fresh = tiny(), tiny(seed=5)
    weights.export(model, tmp_path)
    weights.start(fresh, text=tmp_path / "text")
    for name, tensor in model.state_dict().items():
        if name.startswith(("embed.", "text_layers.")):
            assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_convert_writes_both_folders_and_says_what_stays_behind(tmp_path, capsys):
    tok = BPE.train([" ".join(WORDS)] * 3, 300)
    model = tiny(vocab_size=len(tok), mask_id=tok.mask_id, itm=True)
    weights.save(tmp_path / "x.pt", model.state_dict(), model.config, "pretrain",
                 weights.pack_tokenizer(tok))
    weights.main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "out"), "--to", "transformers"])
    said = capsys.readouterr().out
    assert f"wrote {tmp_path}/out\n" in said and (tmp_path / "out/vision/config.json").is_file()
    for module in ("fusion_layers", "text_reconstructor", "vocab_head", "itm_head", "pooler"):
        assert module in said.split("transformers goes without ")[1]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out/text").vocab_size == len(tok)
    theirs = transformers.RobertaTokenizerFast.from_pretrained(tmp_path / "out/text")
    assert theirs("a red cat").input_ids == [tok.cls_id, *tok.encode("a red cat"), tok.sep_id]


def test_a_model_whose_padding_roberta_cannot_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="padding has id 3, but RoBERTa counts positions"):
        weights.export(tiny(pad_id=3), tmp_path)
