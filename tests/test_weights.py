"""Opening checkpoints, ours and others', against the original FLM's numbers and transformers."""

import json
import pickle
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import flm
import layers
import tokenizer
import vilt
import weights
from conftest import TOL, tiny
from released import models, names

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def recorded():
    """task -> what was recorded of it: config, state_dict, inputs, outputs."""
    tasks = torch.load(FIXTURES / "seed3_downstream.pt", weights_only=True)["tasks"]
    return tasks | {"flm": torch.load(FIXTURES / "seed0_flm.pt", weights_only=True)}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def lightning(path, state, config=None, **more):
    """A file as Lightning wrote it."""
    torch.save({"epoch": 3, "global_step": 1234, "pytorch-lightning_version": "1.3.2",
                "state_dict": state, "callbacks": {},
                **({"hyper_parameters": {"config": config}} if config else {}), **more}, path)
    return path


def open_recorded(recorded, task, folder, **overrides):
    """The checkpoint of a recorded task. Its ViT has heads of 16, where CLIP's always have 64."""
    path = lightning(folder / f"{task}.ckpt", recorded[task]["state_dict"],
                     recorded[task]["config"])
    return weights.load(path, vit_heads=2, **overrides)


def randomise(model, scale=0.2):
    """Every parameter, biases and norms included, gets a value that cannot be missing unseen."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


# -- released FLM checkpoints: the original's recorded numbers -------------------------------------

@torch.no_grad()
def test_a_pretrained_flm_file_gives_the_recorded_features(recorded, tmp_path):
    model = open_recorded(recorded, "flm", tmp_path)
    inputs, out = recorded["flm"]["inputs"], recorded["flm"]["outputs"]
    assert (model.task, model.step) == ("pretrain", 1234)
    assert model.tokenizer is None and model.answer_list is None
    assert not model.training
    assert model.config.objective == "flm" and model.config.mask_id == recorded["flm"]["mask_id"]
    real = inputs["text_masks"].bool()
    fused = model.fuse(model.encode_image(inputs["image"][0]),
                       model.encode_text(inputs["text_ids"], queries=inputs["text_all_masks_ids"]))
    torch.testing.assert_close(model.vit(inputs["image"][0]), out["image_embeds"], **TOL)
    for ours, theirs in ((fused.left_to_right, "text_feats1"), (fused.right_to_left, "text_feats2"),
                         (fused.reconstructed, "text_feats")):
        torch.testing.assert_close(ours[real], out[theirs][real], **TOL)
    torch.testing.assert_close(fused.pooled, out["cls_feats"], **TOL)
    for rows, x, theirs in ((slice(1, None), fused.reconstructed, "flm_logits"),
                            (slice(1, -1), fused.left_to_right, "l2r_logits"),
                            (slice(2, None), fused.right_to_left, "r2l_logits")):
        mask = real[:, rows]
        torch.testing.assert_close(model.vocab_logits(x[:, rows])[mask], out[theirs][mask], **TOL)


@pytest.mark.parametrize("task", ["mlm", "ar"])
@torch.no_grad()
def test_a_single_stream_file_gives_the_recorded_logits(recorded, tmp_path, task):
    model = open_recorded(recorded, task, tmp_path)
    inputs, out = recorded[task]["inputs"], recorded[task]["outputs"]
    assert model.task == "pretrain" and model.config.objective == task
    ids = inputs["text_ids_mlm"] if task == "mlm" else inputs["text_ids"]
    fused = model.fuse(model.encode_image(inputs["image"][0]), model.encode_text(ids))
    real = inputs["text_masks"].bool()
    x = fused.reconstructed if task == "mlm" else fused.left_to_right
    torch.testing.assert_close(x[real], out["text_feats"][real], **TOL)
    # there, the class vector comes twice
    torch.testing.assert_close(fused.pooled, out["cls_feats"][:, :32], **TOL)
    rows = slice(None) if task == "mlm" else slice(1, -1)
    torch.testing.assert_close(model.vocab_logits(x[:, rows])[real[:, rows]],
                               out[f"{task}_logits"][real[:, rows]], **TOL)


@torch.no_grad()
def test_a_vqa_file_gives_the_recorded_logits(recorded, tmp_path):
    model = open_recorded(recorded, "vqa", tmp_path)
    inputs, out = recorded["vqa"]["inputs"], recorded["vqa"]["outputs"]
    assert (model.task, model.config.answers, model.answer_list) == ("vqa", 11, None)
    pooled = model.fuse(model.encode_image(inputs["image"][0]),
                        model.encode_text(inputs["text_ids"]).class_query()).pooled
    torch.testing.assert_close(pooled, out["cls_feats"], **TOL)
    torch.testing.assert_close(model.head(pooled), out["vqa_logits"], **TOL)
    loss = F.binary_cross_entropy_with_logits(model.head(pooled), out["vqa_targets"]) * 11
    torch.testing.assert_close(loss, out["vqa_loss"], **TOL)


@torch.no_grad()
def test_an_nlvr2_file_gives_the_recorded_logits(recorded, tmp_path):
    model = open_recorded(recorded, "nlvr2", tmp_path)
    inputs, out = recorded["nlvr2"]["inputs"], recorded["nlvr2"]["outputs"]
    assert model.task == "nlvr2"
    text = model.encode_text(inputs["text_ids"]).class_query()
    pooled = [model.fuse(model.encode_image(inputs[f"image_{i}"][0], which=i), text).pooled
              for i in (0, 1)]
    for ours, theirs in zip(pooled, ("cls_feats_1", "cls_feats_2"), strict=True):
        torch.testing.assert_close(ours, out[theirs], **TOL)
    torch.testing.assert_close(model.head(torch.cat(pooled, dim=-1)), out["nlvr2_logits"], **TOL)


@torch.no_grad()
def test_a_retrieval_file_gives_the_recorded_scores(recorded, tmp_path):
    model = open_recorded(recorded, "irtr", tmp_path)
    inputs, out = recorded["irtr"]["inputs"], recorded["irtr"]["outputs"]
    assert model.task == "retrieval"
    visual = model.encode_image(inputs["image"][0])
    # The false texts are padded with 0, <s>, there, under a mask that hides it; here <pad> itself
    # says what is padding.
    texts = [inputs[f"{text}_ids"].masked_fill(inputs[f"{text}_masks"] == 0, 1)
             for text in ("text", "false_text_0", "false_text_1", "false_text_2")]
    scores = torch.cat([model.head(model.fuse(visual, model.encode_text(ids)).pooled)
                        for ids in texts], dim=1)
    torch.testing.assert_close(scores, out["scores"], **TOL)
    every = out["recall_texts"]
    ids = every["text_ids"].masked_fill(every["text_masks"] == 0, 1)
    every = model.encode_text(ids).class_query()
    scores = torch.stack([model.head(model.fuse(visual[i:i + 1], every).pooled)[:, 0]
                          for i in range(4)])
    torch.testing.assert_close(scores, out["recall_scores"], **TOL)


@torch.no_grad()
def test_a_captioning_file_gives_the_recorded_captions(recorded, tmp_path):
    """`<s> <bos>`, then a word at a time: the last row predicts the next; </s> or <eos> stops."""
    model, r = open_recorded(recorded, "caption", tmp_path), recorded["caption"]
    c = model.config
    assert (model.task, c.objective, c.vocab_size, c.mask_id) == ("caption", "ar", 99, 96)
    out, visual = r["outputs"], model.encode_image(r["inputs"]["image"][0])
    ids, step = torch.tensor([[0, *r["prompt_ids"]]] * 4), 0
    stopped = torch.zeros(4, dtype=torch.bool)
    while not stopped.all():
        logits = model.vocab_logits(model.fuse(visual, model.encode_text(ids)).left_to_right[:, -1])
        if step < 12:
            torch.testing.assert_close(logits[~stopped], out["step_logits"][~stopped, step], **TOL)
            assert torch.equal(logits.argmax(-1)[~stopped], out["pred_ids"][~stopped, step + 1])
        ids = torch.cat([ids, logits.argmax(-1)[:, None]], dim=1)
        if step == 11:      # how many words are kept where at most 12 are allowed
            assert [len(words(row, r["stop_ids"])) for row in ids] == out["ava_len"].tolist()
        stopped |= torch.isin(ids[:, -1], torch.tensor(r["stop_ids"]))
        step += 1
    assert [words(row, r["stop_ids"]) for row in ids] == out["captions_max30"]


def words(row, stops):
    row = row[2:].tolist()
    return row[:min([row.index(stop) for stop in stops if stop in row], default=len(row))]


def test_every_tensor_of_every_recorded_file_is_accounted_for_once(recorded, tmp_path):
    for task in ("flm", "mlm", "ar", "caption", "vqa", "nlvr2", "irtr"):
        report = open_recorded(recorded, task, tmp_path).report
        accounted = [name for kind in ("taken", "interpolated", "grown", "ignored")
                     for name in report.names(kind)]
        assert sorted(accounted) == sorted(recorded[task]["state_dict"]), task
        assert not report.names("fresh") and all(report.reasons("ignored")), task
    copies = report.reasons("ignored")["the same tensors as cross_modal_text_layers"]
    assert "cross_modal_text_layers_r.0.output.dense.bias" in copies
    assert str(report).startswith("taken          194\nignored")


@pytest.mark.parametrize("stored", [
    {"vit_config": {"heads": 2}}, {"vit_config": {"head_dim": 16}}, {"vit_heads": 2}])
def test_the_vits_heads_are_read_beside_the_config_and_never_guessed(stored, recorded, tmp_path):
    state, config = recorded["vqa"]["state_dict"], recorded["vqa"]["config"]
    path = lightning(tmp_path / "x.ckpt", state, hyper_parameters={"config": config} | stored)
    assert (weights.load(path).config.vit_heads,
            weights.load(path, vit_heads=4).config.vit_heads) == (2, 4)
    path = lightning(tmp_path / "x.ckpt", state, config)
    sentence = r"x.ckpt: .* layers of width 32 have; weights.load\(path, vit_heads=N\) tells"
    with pytest.raises(ValueError, match=sentence):
        weights.load(path)
    with pytest.raises(ValueError, match=r"weights.load\(path, heads=N\) tells it"):
        weights.load(lightning(tmp_path / "x.ckpt", state), vit_heads=2)
    assert weights.load(path := lightning(tmp_path / "x.ckpt", state), vit_heads=2,
                        heads=4).config.text_heads == 4


def as_released(state):
    """Ours under the released names."""
    released, theirs = {ours: theirs for theirs, ours in names.FLM_NAMES.items()}, {}
    for name, tensor in state.items():
        pieces = {name: tensor}
        if name.startswith("vit.") and ".q." in name:
            pieces = {name.replace(".q.", ".qkv."):
                      torch.cat([tensor, state[name.replace(".q.", ".kv.")]])}
        elif name.startswith("vit.") and ".kv." in name:
            continue
        elif ".kv." in name:
            key, value = tensor.chunk(2)
            pieces = {name.replace(".kv.", ".key."): key, name.replace(".kv.", ".value."): value}
        for piece, values in pieces.items():
            theirs[names.rename(piece, released)] = values
    return theirs


BASE = flm.PRESETS["base-b32"]
SINGLE = replace(BASE, objective="ar", reconstructor_text_layers=0, reconstructor_fusion_layers=0)


@pytest.mark.parametrize("kind, task, config", [
    ("pretraining", "pretrain", BASE),
    ("ft_vqa", "vqa", replace(BASE, image_size=576, head="vqa", answers=3129)),
    ("ft_nlvr2", "nlvr2", replace(BASE, head="nlvr2")),
    ("ft_cap_coco", "caption", replace(SINGLE, vocab_size=50267, pooler=False)),
    ("ft_irtr_f30k", "retrieval", replace(BASE, image_size=384, head="retrieval")),
    ("mlm", "pretrain", replace(SINGLE, objective="mlm")), ("ar", "pretrain", SINGLE)])
def test_released_files_of_base_size_open_by_their_names_and_shapes_alone(kind, task, config):
    """From the original: names and shapes of a base-size file of each kind, no settings."""
    text = (FIXTURES / "keys_base.txt").read_text()
    state = {}

    def add(line):
        key, shape = line.split(" | ")
        for i in range(int(key.split("..")[1].split("}")[0]) + 1) if "{" in key else [0]:
            name = key
            if "{" in key:
                name = key.replace(key[key.index("{"):key.index("}") + 1], str(i))
            state[name] = torch.empty(json.loads(shape.split(" (was")[0]), device="meta")

    for line in text.split("## distinct tensors")[1].split("## keys added")[0].splitlines():
        if " | " in line:
            add(line)
    assert len(state) == 613
    lines = []
    if kind != "pretraining":
        lines = text.split(f"\n# {kind} ")[1].split("\n#")[0].splitlines()
    for line in lines:
        if line.startswith(("  + ", "  ~ ")):
            add(line[4:])
        elif "absent modules" in line:
            for module in json.loads(line.split(": ")[1].replace("'", '"')):
                for key in [key for key in state if key.startswith(module + ".")]:
                    del state[key]
    source = models.Source(Path("x"), names.family_of(state), state, {}, {}, Path("."), [])
    found_config, found, _, found_task = models.flm_parts(source, names.Report())
    assert (found_task, found_config) == (task, config)
    with torch.device("meta"), weights.Undrawn():
        expected = weights.model_of(config).state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}


# -- transformers' ViLT, and ViLT's own files ------------------------------------------------------

SHAPES = [dict(hidden_size=36, num_attention_heads=3, num_hidden_layers=2, intermediate_size=52,
               image_size=48, patch_size=16),
          dict(hidden_size=40, num_attention_heads=5, num_hidden_layers=3, intermediate_size=24,
               image_size=28, patch_size=7,
               layer_norm_eps=1e-6, type_vocab_size=1)]


def transformers_vilt(kind, shape, **more):
    import transformers
    torch.manual_seed(0)
    config = transformers.ViltConfig(vocab_size=53, max_position_embeddings=19, pad_token_id=0,
                                     **shape, **more)
    return randomise(getattr(transformers, kind)(config))


def batch(patch, seed=0, pictures=((4, 3), (2, 5), (4, 5), (1, 1))):
    """Pictures of mixed shapes, captions of mixed lengths -> transformers' inputs, ours"""
    rng = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(pictures)
    H, W = (sizes.amax(0) * patch).tolist()
    images, mask = torch.zeros(len(sizes), 3, H, W), torch.zeros(len(sizes), H, W, dtype=torch.long)
    ids = torch.zeros(len(sizes), 11, dtype=torch.long)
    for b, (h, w) in enumerate(pictures):
        images[b, :, :h * patch, :w * patch] = torch.randn(3, h * patch, w * patch, generator=rng)
        mask[b, :h * patch, :w * patch] = 1
        n = (11, 3, 7, 5)[b]
        ids[b, :n] = torch.randint(1, 53, (n,), generator=rng)
    return (dict(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=images,
                 pixel_mask=mask), (images, sizes, ids))


@pytest.fixture
def in_order(monkeypatch):
    """transformers shuffles the patches of pictures without padding; here they stay in order."""
    def in_order(odds, count, replacement=False):
        return torch.arange(int(count)) % len(odds)
    monkeypatch.setattr(torch, "multinomial", in_order)


def compare(ours, theirs, patch, head=None, tol=1e-5):
    """Equal outputs: words, patches, class vector, and the logits of our head and of theirs."""
    inputs, (images, sizes, ids) = batch(patch)
    base = getattr(theirs, "vilt", theirs)
    with torch.no_grad():
        expected = base(**inputs)
        visual, text = ours.encode_image(images, sizes), ours.encode_text(ids)
        fused = ours.fuse(visual, text)
        L, real = ids.shape[1], ids != 0
        torch.testing.assert_close(fused.reconstructed[real],
                                   expected.last_hidden_state[:, :L][real], atol=tol, rtol=0)
        torch.testing.assert_close(fused.image[visual.mask],
                                   expected.last_hidden_state[:, L:][visual.mask], atol=tol, rtol=0)
        torch.testing.assert_close(fused.pooled, expected.pooler_output, atol=tol, rtol=0)
        if head:
            logits, expected = head(fused), theirs(**inputs).logits
            keep = real if logits.dim() == 3 else slice(None)
            torch.testing.assert_close(logits[keep], expected[keep], atol=tol, rtol=0)


HEADS = {"ViltModel": ("pretrain", "none"), "ViltForMaskedLM": ("pretrain", "vocab"),
         "ViltForQuestionAnswering": ("vqa", "vqa"),
         "ViltForImageAndTextRetrieval": ("retrieval", "retrieval")}


def head_of(model):
    return {"none": None, "vocab": lambda fused: model.vocab_logits(fused.reconstructed)}.get(
        model.config.head, lambda fused: model.head(fused.pooled))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", HEADS)
def test_a_folder_of_transformers_gives_the_same_outputs(kind, shape, tmp_path, in_order):
    answers = [f"answer {i}" for i in range(6)]
    more = {"id2label": dict(enumerate(answers))} if "Question" in kind else {}
    theirs = transformers_vilt(kind, shape, **more)
    theirs.save_pretrained(tmp_path)
    ours = weights.load(tmp_path)
    assert (ours.task, ours.config.head) == HEADS[kind]
    assert ours.answer_list == (answers if more else None)
    compare(ours, theirs, shape["patch_size"], head_of(ours))


@pytest.mark.parametrize("shape", SHAPES)
def test_two_pictures_and_a_sentence_as_transformers(shape, tmp_path, in_order):
    theirs = transformers_vilt("ViltForImagesAndTextClassification", shape, num_images=2,
                               modality_type_vocab_size=3)
    theirs.save_pretrained(tmp_path)
    for ours in (weights.load(tmp_path),
                 weights.load(exported(weights.load(tmp_path), tmp_path / "again"))):
        assert ours.task == "nlvr2"
        inputs, (images, sizes, ids) = batch(shape["patch_size"])
        with torch.no_grad():
            text, both = ours.encode_text(ids), [images, images.roll(3, dims=1).flip(-3)]
            pooled = [ours.fuse(ours.encode_image(x, sizes, which=i), text).pooled
                      for i, x in enumerate(both)]
            expected = theirs(input_ids=ids, attention_mask=inputs["attention_mask"],
                              pixel_values=torch.stack(both, 1),
                              pixel_mask=inputs["pixel_mask"][:, None].expand(-1, 2, -1, -1)).logits
        torch.testing.assert_close(ours.head(torch.cat(pooled, -1)), expected, **TOL)


def exported(model, folder):
    weights.export(model, folder)
    return folder


@pytest.mark.parametrize("form", ["bin", "legacy", "bare", "wrapped"])
def test_other_forms_of_a_transformers_file_open_too(form, tmp_path, in_order):
    """.bin of both layouts, without config.json (heads of 64), and with wrappers' prefixes."""
    shape = dict(hidden_size=64, num_attention_heads=1, num_hidden_layers=1, intermediate_size=52,
                 image_size=48, patch_size=16)
    theirs = transformers_vilt("ViltForMaskedLM", shape)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state, path = theirs.state_dict(), tmp_path / "pytorch_model.bin"
    if form == "wrapped":
        state = {"module._orig_mod." + key: value for key, value in state.items()}
    if form == "bare":
        (tmp_path / "config.json").unlink()
    torch.save(state, path, _use_new_zipfile_serialization=form != "legacy")
    compare(ours := weights.load(path if form == "bare" else tmp_path), theirs, 16, head_of(ours))


def original_vilt(state, classifier=""):
    """transformers' tensors under the names of ViLT's own files, spelt out by hand."""
    result = {}
    for key, tensor in state.items():
        key = key.removeprefix("vilt.")
        for old, new in (("embeddings.text_embeddings.", "text_embeddings."),
                         ("embeddings.cls_token", "transformer.cls_token"),
                         ("embeddings.position_embeddings", "transformer.pos_embed"),
                         ("embeddings.patch_embeddings.projection", "transformer.patch_embed.proj"),
                         ("embeddings.token_type_embeddings", "token_type_embeddings"),
                         ("encoder.layer.", "transformer.blocks."),
                         ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
                         ("attention.output.dense", "attn.proj"),
                         ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
                         ("mlm_score.decoder.bias", "mlm_score.bias")):
            key = key if key.startswith("text_embeddings") else key.replace(old, new)
        if key.startswith("layernorm."):
            key = "transformer.norm." + key.removeprefix("layernorm.")
        result[key.replace("classifier.", classifier)] = tensor
    for key in [key for key in result if ".attention.attention.query." in key]:
        result[key.replace("attention.attention.query", "attn.qkv")] = torch.cat(
            [result.pop(key.replace("query", part)) for part in ("query", "key", "value")])
    return result | {"text_embeddings.position_ids": torch.arange(19)[None],
                     "itm_score.fc.weight": torch.randn(2, 36),
                     "itm_score.fc.bias": torch.randn(2)}


@pytest.mark.parametrize("kind", [*HEADS, "ViltForImagesAndTextClassification"])
def test_vilts_own_files_give_the_same_outputs(kind, tmp_path, in_order):
    more = dict(num_images=2, modality_type_vocab_size=3) if "Images" in kind else {}
    theirs = transformers_vilt(kind, SHAPES[0], **more)
    state = original_vilt(theirs.state_dict(),
                          classifier="nlvr2_classifier." if more else "vqa_classifier.")
    path = lightning(tmp_path / "vilt.ckpt", state,
                     {"num_heads": 3, "max_image_len": 7, "image_size": 384})
    ours = weights.load(path, eps=1e-12)            # transformers' eps; the original's is 1e-6
    assert weights.load(path).config.eps == 1e-6 and ours.config.max_patches == 7
    assert ours.task == HEADS.get(kind, ("nlvr2",))[0]
    assert ours.config.itm == (ours.task == "pretrain")
    if ours.config.itm:
        assert torch.equal(ours.itm_head.weight, state["itm_score.fc.weight"])
    if not more:
        compare(ours, theirs, 16, head_of(ours))
    assert sorted(ours.report.names("taken") + ours.report.names("ignored")) == sorted(state)


def test_masked_patch_prediction_opens_with_its_head(tmp_path):
    state = original_vilt(transformers_vilt("ViltForMaskedLM", SHAPES[0]).state_dict())
    state |= {"mpp_score.transform.dense.weight": torch.randn(36, 36),
              "mpp_score.transform.dense.bias": torch.randn(36),
              "mpp_score.transform.LayerNorm.weight": torch.randn(36),
              "mpp_score.transform.LayerNorm.bias": torch.randn(36),
              "mpp_score.decoder.weight": torch.randn(768, 36), "mpp_score.bias": torch.randn(768)}
    ours = weights.load(lightning(tmp_path / "mpp.ckpt", state), heads=3)
    assert ours.config.mpp and torch.equal(ours.patch_head.decoder.bias, state["mpp_score.bias"])
    assert ours.report.names("fresh") == ["mask_token"]


# -- export ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", HEADS)
def test_export_and_reimport_is_the_identity(kind, tmp_path, in_order):
    import transformers
    transformers_vilt(kind, SHAPES[0]).save_pretrained(tmp_path / "a")
    ours = weights.load(tmp_path / "a")
    assert weights.export(ours, tmp_path / "b") == []
    again = weights.load(tmp_path / "b")
    assert again.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    compare(ours, getattr(transformers, kind).from_pretrained(tmp_path / "b").eval(), 16,
            head_of(ours))


@pytest.mark.parametrize("head", ["vocab", "vqa", "retrieval"])
def test_a_model_of_ours_runs_in_transformers(head, tmp_path, in_order):
    """Trained here: two kinds of eps, a vocabulary head that is not tied to the embeddings."""
    import transformers
    torch.manual_seed(0)
    config = replace(vilt.PRESETS["vilt-toy"], image_size=48, vocab_size=53, max_positions=19,
                     pad_id=0, init_std=0.06, head=head,
                     answers=6 if head == "vqa" else 0, itm=head == "vocab", layers=2)
    ours = weights.model_of(config).eval()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog"]
    ours.tokenizer = tokenizer.WordPiece({piece: i for i, piece in enumerate(pieces)})
    ours.answer_list = list("abcdef") if head == "vqa" else None
    weights.export(ours, tmp_path)
    theirs = getattr(transformers, weights.ARCHITECTURES[head]).from_pretrained(tmp_path).eval()
    compare(ours, theirs, 16, head_of(ours), tol=1e-4)
    for module in ours.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = theirs.config.layer_norm_eps if module.eps == config.eps else module.eps
    compare(ours, theirs, 16, head_of(ours))        # eps is all that differs
    again = weights.load(tmp_path)
    assert again.tokenizer.encode("dog") == [5] and again.answer_list == ours.answer_list
    assert (again.config.itm, again.config.mask_id) == (config.itm, 4)


def test_what_transformers_cannot_express_is_said(tmp_path):
    model = weights.model_of(replace(vilt.PRESETS["vilt-toy"], mpp=True))
    model.tokenizer = tokenizer.BPE.train(["a dog"], 261)
    left_out = weights.export(model, tmp_path)
    assert {"patch_head.decoder.bias", "itm_head.weight",
            "vocab.txt (the tokenizer is byte-level BPE)"} < set(left_out)
    assert not (tmp_path / "vocab.txt").exists()


@pytest.mark.parametrize("changes", [
    dict(mpp=True, max_patches=0), dict(head="vqa", answers=3, text_eps=1e-9),
    dict(head="nlvr2", itm=False), dict(head="none", itm=False, mask_id=7)])
@torch.no_grad()
def test_a_model_of_ours_comes_back_from_its_export_as_it_was(changes, tmp_path):
    """transformers has no place for two eps, patch prediction, the rates and special tokens."""
    import transformers
    ours = randomise(weights.model_of(replace(vilt.PRESETS["vilt-toy"], layers=1, **changes)))
    weights.export(ours, tmp_path)
    again = weights.load(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())
    images, ids = torch.randn(1, 3, 64, 64), torch.tensor([[0, 9, 2]])
    one, two = (model.fuse(model.encode_image(images), model.encode_text(ids)).reconstructed
                for model in (ours, again))
    assert torch.equal(one, two)
    kind = getattr(transformers, weights.ARCHITECTURES[ours.config.head])
    theirs = kind.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    # one eps for all there
    assert weights.load(tmp_path / "theirs").config.text_eps == ours.config.text_eps
    assert weights.load(tmp_path / "theirs").config.eps == theirs.config.layer_norm_eps


# -- beginning from CLIP, RoBERTa, BERT, ViT -------------------------------------------------------

def tiny_flm(**changes):
    return tiny(3, **{"reconstructor_text_layers": 1} | changes)


def clip_vision(kind="CLIPVisionModel", image=24, patch=8, width=32, heads=2, layers=3, **more):
    import transformers
    torch.manual_seed(0)
    vision = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                  num_attention_heads=heads, image_size=image, patch_size=patch) | more
    if kind == "CLIPModel":
        text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                    num_attention_heads=2, vocab_size=50, bos_token_id=0, eos_token_id=1)
        config = transformers.CLIPConfig(vision_config=vision, text_config=text)
        return randomise(transformers.CLIPModel(config))
    return randomise(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)))


def vit_output(theirs, images):
    """All tokens before the last block, through the last norm: what FLM reads of CLIP."""
    inner = getattr(theirs, "vision_model", theirs)
    with torch.no_grad():
        states = inner(pixel_values=images, output_hidden_states=True).hidden_states
        return inner.post_layernorm(states[-2])


@pytest.mark.parametrize("kind, image, patch, width, heads, layers", [
    ("CLIPVisionModel", 24, 8, 32, 2, 3), ("CLIPModel", 35, 7, 48, 3, 2),
    ("CLIPVisionModel", 64, 16, 24, 4, 4)])
def test_the_vit_begins_as_transformers_clip(kind, image, patch, width, heads, layers, tmp_path):
    theirs = clip_vision(kind, image, patch, width, heads, layers)
    theirs.save_pretrained(tmp_path)
    model = tiny_flm(image_size=image, patch_size=patch, vit_width=width, vit_heads=heads,
                     vit_layers=layers - 1)
    before = model.fusion_layers[0].mlp[0].weight.clone()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        report = weights.start(model, vit=path)
        images = torch.randn(2, 3, image, image)
        with torch.no_grad():
            torch.testing.assert_close(model.vit(images), vit_output(theirs, images), **TOL)
    assert len(report.names("taken")) + len(report.names("ignored")) == len(theirs.state_dict())
    assert set(report.names("fresh")) == {name for name in model.state_dict()
                                          if not name.startswith("vit.")}
    assert torch.equal(model.fusion_layers[0].mlp[0].weight, before)


def openai_clip(theirs):
    """transformers' CLIP as OpenAI's module: plain modules, OpenAI's names, half precision."""
    root = torch.nn.Module()
    state = {key.removeprefix("vision_model."): value.half()
             for key, value in theirs.state_dict().items()}
    renamed = {"positional_embedding": torch.randn(7, 16).half(),
               "ln_final.weight": torch.randn(16).half(),
               "visual.proj": torch.randn(32, 16).half(), "logit_scale": torch.tensor(1.0).half()}
    for key, tensor in state.items():
        for old, new in (("embeddings.class_embedding", "class_embedding"),
                         ("embeddings.patch_embedding", "conv1"),
                         ("embeddings.position_embedding.weight", "positional_embedding"),
                         ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post"),
                         ("encoder.layers", "transformer.resblocks"), ("layer_norm", "ln_"),
                         ("self_attn.out_proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"),
                         ("mlp.fc2", "mlp.c_proj")):
            key = key.replace(old, new)
        if "q_proj" in key:
            layer, kind = key.split(".")[2], key.split(".")[-1]
            tensor = torch.cat([state[f"encoder.layers.{layer}.self_attn.{part}_proj.{kind}"]
                                for part in "qkv"])
            key = key.replace("self_attn.q_proj.", "attn.in_proj_")
        if "_proj." not in key or "out_proj" in key or "c_proj" in key:
            renamed["visual." + key] = tensor
    for key, tensor in renamed.items():
        *parents, last = key.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.register_parameter(last, torch.nn.Parameter(tensor))
    return root


def timm_clip(openai):
    """OpenAI's tensors of CLIP's ViT as timm converts them."""
    state = {}
    for key, tensor in openai.items():
        if not key.startswith("visual."):
            continue
        key = key.removeprefix("visual.")
        for old, new in (("conv1", "patch_embed.proj"), ("positional_embedding", "pos_embed"),
                         ("transformer.resblocks", "blocks"), ("ln_pre", "norm_pre"),
                         ("ln_post", "norm"), ("ln_", "norm"), ("in_proj_", "qkv."),
                         ("out_proj", "proj"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
            key = key.replace(old, new)
        if key == "proj":
            state |= {"head.weight": tensor.T, "head.bias": torch.zeros(tensor.shape[1])}
        elif key == "class_embedding":
            state["cls_token"] = tensor[None, None]
        else:
            state[key] = tensor[None] if key == "pos_embed" else tensor
    return {key: tensor.contiguous() for key, tensor in state.items()}


@pytest.mark.parametrize("form", ["script", "state dict", "open_clip", "timm"])
def test_the_vit_begins_as_openai_clip(form, tmp_path):
    theirs = clip_vision()
    root, path = openai_clip(theirs), tmp_path / "ViT-B-32.pt"
    state = root.state_dict()
    if form == "timm":
        state, path = timm_clip(state), tmp_path / "model.safetensors"
        save_file(state, path)
    elif form == "open_clip":               # OpenAI's names in a folder of the Hub
        save_file(state, tmp_path / "open_clip_model.safetensors")
        path = tmp_path
    elif form == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # torch.jit is deprecated
            torch.jit.script(root).save(str(path))
    else:
        torch.save(state, path)
    theirs.half().float()                                   # what half precision keeps of it
    model, images = tiny_flm(), torch.randn(2, 3, 24, 24)
    if form == "script":
        with pytest.raises(ValueError, match="ViT-B-32.pt: a TorchScript archive, .* --trust"):
            weights.start(model, vit=path)
    report = weights.start(model, vit=path, trust=form == "script")
    with torch.no_grad():
        torch.testing.assert_close(model.vit(images), vit_output(theirs, images), **TOL)
    assert len(report.reasons("ignored")["CLIP's last block, which FLM does without"]) == 12
    assert sorted(report.names("taken") + report.names("ignored")) == sorted(state)


def test_the_position_grid_is_interpolated_to_the_runs_resolution_and_that_is_said(tmp_path):
    theirs = clip_vision()
    theirs.save_pretrained(tmp_path)
    model = tiny_flm(image_size=40)
    report = weights.start(model, vit=tmp_path)
    position = getattr(theirs, "vision_model", theirs).embeddings.position_embedding.weight
    assert torch.equal(model.vit.position, layers.resize_positions(position, (5, 5)))
    assert "interpolated     1  position grid, 3 x 3 -> 5 x 5, bicubic" in str(report)


def text_model(kind, width=32, heads=4, layers=3, **more):
    import transformers
    torch.manual_seed(0)
    roberta = kind.startswith("Roberta")
    config = transformers.RobertaConfig if roberta else transformers.BertConfig
    more = dict(intermediate_size=4 * width, type_vocab_size=1 if roberta else 2,
                pad_token_id=1 if roberta else 0,
                max_position_embeddings=40 if roberta else 38) | more
    return randomise(getattr(transformers, kind)(config(
        vocab_size=97, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        layer_norm_eps=1e-5, **more)))


@pytest.mark.parametrize("kind, form, width, heads, layers", [
    ("RobertaModel", "folder", 32, 4, 3), ("RobertaForMaskedLM", "bin", 24, 3, 2),
    ("BertModel", "legacy", 40, 5, 3), ("BertForMaskedLM", "folder", 32, 4, 2)])
def test_the_text_transformer_begins_as_transformers(kind, form, width, heads, layers, tmp_path):
    theirs = text_model(kind, width, heads, layers)
    theirs.save_pretrained(tmp_path)
    if form != "folder":
        (tmp_path / "model.safetensors").unlink()
        state = theirs.state_dict()
        if form == "legacy":        # BERT's first files call the norm's weights gamma and beta
            state = {k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
                     for k, v in state.items()}
        torch.save(state, tmp_path / "pytorch_model.bin",
                   _use_new_zipfile_serialization=form != "legacy")
    pad = theirs.config.pad_token_id
    model = tiny_flm(text_width=width, text_heads=heads, text_layers=2, objective="mlm",
                     pad_id=pad, vocab_size=99)
    fresh = model.embed.word.weight[97:].clone()
    report = weights.start(model, text=tmp_path)
    ids = torch.randint(4, 97, (2, 9))
    ids[1, 5:] = pad
    with torch.no_grad():
        expected = getattr(theirs, "roberta", getattr(theirs, "bert", theirs))(
            input_ids=ids, attention_mask=(ids != pad).long(),
            output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(model.encode_text(ids).streams[:, 0][ids != pad],
                                   expected[ids != pad], **TOL)
    assert torch.equal(model.embed.word.weight[97:], fresh)
    assert "2 rows beside the 97: drawn at random" in str(report)
    deeper = [name for name in report.names("ignored") if ".layer.2." in name]
    assert len(deeper) == (16 if layers == 3 else 0)


@pytest.mark.parametrize("kind", ["transformers", "timm"])
def test_vilt_begins_as_a_vit_and_berts_embeddings(kind, tmp_path):
    import transformers
    torch.manual_seed(0)
    theirs = randomise(transformers.ViTModel(transformers.ViTConfig(
        hidden_size=32, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4,
        image_size=48, patch_size=16)))
    bert = text_model("BertForMaskedLM")
    bert.save_pretrained(tmp_path / "bert")
    theirs.save_pretrained(path := tmp_path / "vit")
    if kind == "timm":
        state = load_file(tmp_path / "vit/model.safetensors")
        state = original_vilt({k: v for k, v in state.items() if "pooler" not in k})
        state = {k.removeprefix("transformer."): v for k, v in state.items()
                 if not k.startswith(("itm", "text"))}
        torch.save(state | {"head.weight": torch.randn(5, 32)}, tmp_path / "vit.pth")
        path = tmp_path / "vit.pth"
    config = replace(vilt.PRESETS["vilt-toy"], image_size=48, width=32, heads=4, layers=2,
                     mlp_width=52, vocab_size=97, eps=1e-12, text_eps=1e-5, max_positions=20,
                     pad_id=0)
    model = weights.model_of(config).eval()
    report = weights.start(model, vit=path, text=tmp_path / "bert")
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        x = model.encode_image(images).tokens - model.token_type[1]
        for block in model.blocks:
            x = block(x)
        torch.testing.assert_close(model.norm(x), theirs(images).last_hidden_state, **TOL)
        ids = torch.randint(1, 97, (2, 9))
        torch.testing.assert_close(model.encode_text(ids).tokens - model.token_type[0],
                                   bert.bert.embeddings(ids), **TOL)
    own = ("token_type", "pooler", "vocab", "itm")
    assert set(report.names("fresh")) == {name for name in model.state_dict()
                                          if name.startswith(own)}


@pytest.mark.parametrize("change, message", [
    (dict(patch_size=12), r"patch_embedding.weight \(32, 3, 8, 8\), expected \(32, 3, 12, 12\)"),
    (dict(vit_width=64), r"class_embedding \(32,\), expected \(64,\)"),
    (dict(vit_heads=4), "heads 2, but the model's has 4"),
    (dict(vit_layers=1), r"encoder.layers.1.* \(32,\), for which the model has no place"),
    (dict(vit_layers=3), "lacks vit.blocks.2.norm1.weight"),
    (dict(text_width=64), r"embeddings.LayerNorm.bias \(32,\), expected \(64,\)"),
    (dict(text_layers=4), "lacks text_layers.3"),
    (dict(text_heads=2), "heads 4, but the model's has 2"),
    (dict(vocab_size=90, mask_id=4), r"\(97, 32\), expected \(90, 32\)")])
def test_parts_of_another_size_are_refused_in_a_sentence(change, message, tmp_path):
    text = not any("vit" in key or "patch" in key for key in change)
    (text_model("RobertaModel") if text else clip_vision()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        weights.start(tiny_flm(**change), **{"text" if text else "vit": tmp_path})


def test_a_feed_forward_of_another_width_and_another_activation_are_refused(tmp_path):
    text_model("RobertaModel", intermediate_size=64).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"intermediate.dense.bias \(64,\), expected \(128,\)"):
        weights.start(tiny_flm(), text=tmp_path / "a")
    clip_vision(hidden_act="gelu").save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="with gelu; OpenAI's, with quick_gelu"):
        weights.start(tiny_flm(), vit=tmp_path / "b")
    with pytest.raises(ValueError,
                       match="CLIP, as transformers writes it; RoBERTa or BERT is expected here"):
        weights.start(tiny_flm(), text=tmp_path / "b")


# -- beginning from a checkpoint -------------------------------------------------------------------

def saved(model, path, task="pretrain", **more):
    weights.save(path, model.state_dict(), model.config, task, None, **{"step": 5} | more)
    return path


def test_captioning_begins_from_flm_with_two_words_more(tmp_path):
    source, model = tiny_flm(), tiny_flm(objective="ar", vocab_size=99)
    fresh = {name: model.state_dict()[name][97:].clone()
             for name in ("embed.word.weight", "vocab_head.decoder.weight")}
    # A flag that is not given is "".
    report = weights.start(model, "", "", saved(source, tmp_path / "a.pt"))
    state = model.state_dict()
    for name, tensor in source.state_dict().items():
        if name in state and name != "stream_type":
            assert torch.equal(state[name][:len(tensor)], tensor), name
    for name, rows in fresh.items():
        assert torch.equal(state[name][97:], rows)
    assert sorted(report.names("grown")) == ["embed.word.weight", "vocab_head.decoder.bias",
                                             "vocab_head.decoder.weight"]
    assert "stream_type" in report.names("ignored") and not report.names("fresh")


def test_nlvr2_begins_with_the_second_image_as_the_first_at_another_resolution(tmp_path):
    source = tiny_flm(image_positions=1.0)
    model = tiny_flm(head="nlvr2", image_size=32, image_positions=1.0)
    report = weights.start(model, checkpoint=saved(source, tmp_path / "a.pt"))
    assert torch.equal(model.token_type, source.token_type[[0, 1, 1]])
    assert torch.equal(model.vit.position, layers.resize_positions(source.vit.position, (4, 4)))
    assert torch.equal(model.image_position, layers.resize_positions(source.image_position, (4, 4)))
    assert set(report.names("fresh")) == {name for name in model.state_dict()
                                          if name.startswith("head.")}
    assert sorted(report.names("interpolated")) == ["image_position", "vit.position"]
    assert report.names("grown") == ["token_type"]
    assert {name.split(".")[0] for name in report.names("ignored")} == {"vocab_head"}


def test_retrieval_begins_from_image_text_matching(tmp_path):
    source = tiny_flm(itm=True)
    model = tiny_flm(head="retrieval")
    report = weights.start(model, checkpoint=saved(source, tmp_path / "a.pt"))
    assert sorted(report.names("grown")) == ["itm_head.bias", "itm_head.weight"]
    assert not report.names("fresh")
    assert torch.equal(model.head.weight, source.itm_head.weight[1:])
    assert torch.equal(model.head.bias, source.itm_head.bias[1:])


def test_vilt_is_fine_tuned_at_another_resolution_with_the_same_positions(tmp_path):
    """The grid is stretched as the model does it: corners keep their positions."""
    source = randomise(weights.model_of(replace(vilt.PRESETS["vilt-toy"], layers=1)))
    model = weights.model_of(replace(source.config, image_size=112, head="vqa", answers=4,
                                     itm=False))
    report = weights.start(model, checkpoint=saved(source, tmp_path / "a.pt"))
    grid, old = model.position[1:].view(7, 7, -1), source.position[1:].view(4, 4, -1)
    torch.testing.assert_close(grid[::2, ::2], old, **TOL)
    assert "4 x 4 -> 7 x 7, bilinear" in str(report)


def test_a_released_file_begins_a_fine_tuning(recorded, tmp_path):
    path = lightning(tmp_path / "flm.ckpt", recorded["flm"]["state_dict"],
                     recorded["flm"]["config"])
    source = weights.load(path, vit_heads=2)
    model = tiny_flm(head="vqa", answers=3, reconstructor_text_layers=2)
    report = weights.start(model, checkpoint=path)
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in source.state_dict().items()
               if not k.startswith("vocab_head."))
    assert set(report.names("fresh")) == {name for name in model.state_dict()
                                          if name.startswith("head.")}
    accounted = sum((report.names(kind) for kind in ("taken", "interpolated", "grown", "ignored")),
                    [])
    assert sorted(accounted) == sorted(recorded["flm"]["state_dict"])


@pytest.mark.parametrize("change, message", [
    (dict(fusion_layers=3), "lacks fusion_layers.2"),
    (dict(heads=8), "heads 4, but the model has 8"),
    (dict(reconstructor_fusion_layers=1), "reconstructor_fusion_layers 2, but the model has 1"),
    (dict(text_layers=1), "text_layers.1.*for which the model has no place"),
    (dict(width=64), r"token_type \(2, 32\), expected \(2, 64\)"),
    (dict(vocab_size=90, mask_id=4), r"\(97, 32\), expected \(90, 32\)")])
def test_checkpoints_of_other_sizes_are_refused(change, message, tmp_path):
    path = saved(tiny_flm(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        weights.start(tiny_flm(**change), checkpoint=path)
    with pytest.raises(ValueError, match="a checkpoint of flm, but the model is vilt"):
        weights.start(weights.model_of(vilt.PRESETS["vilt-toy"]), checkpoint=path)


# -- ours ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [
    flm.PRESETS["toy"],
    replace(vilt.PRESETS["vilt-toy"], head="vqa", answers=3, itm=False, mpp=True)])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_what_is_saved_is_loaded(config, kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    model = randomise(weights.model_of(config))
    tok = tokenizer.BPE.train(["a red dog"], 261)
    answers = ["yes", "no", "2"] if config.head == "vqa" else None
    weights.save(path, model.state_dict(), config, "vqa", weights.pack_tokenizer(tok), step=9,
                 answers=answers, settings={"recipe": "mine", "datasets": ("a", "b")})
    contents = weights.read(path)
    assert weights.config_of(contents) == config and contents["model"].keys() == set(
        model.state_dict())
    again = weights.load(path)
    assert (again.about["recipe"], again.about["datasets"]) == ("mine", ["a", "b"])
    assert (again.config, again.task, again.step, again.answer_list) == (config, "vqa", 9, answers)
    assert again.tokenizer.encode("a red dog") == tok.encode("a red dog") and not again.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    compiled = {("_orig_mod." + k).replace("blocks.0.", "blocks.0._orig_mod."): v
                for k, v in model.state_dict().items()}
    weights.save(path, compiled, config, "vqa", None)
    again = weights.load(path, dropout=0.3)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert (again.config.dropout, again.tokenizer, again.step) == (0.3, None, 0)


# The settings that the checkpoints of the first version hold.
FIRST_SETTINGS = {
    "flm": """objective image_size patch_size vit_width vit_layers vit_heads vocab_size text_width
        text_layers text_heads max_positions cls_id pad_id sep_id mask_id width heads fusion_layers
        reconstructor_text_layers reconstructor_fusion_layers dropout init_std left_to_right_weight
        right_to_left_weight corruption_rate prediction_rate mask_rate head answers pooler itm""",
    "vilt": """image_size patch_size max_patches vocab_size max_positions cls_id pad_id sep_id
        mask_id width layers heads mlp_width eps text_eps dropout init_std mask_rate wpa_weight mpp
        patch_mask_rate head answers pooler itm"""}


@pytest.mark.parametrize("backbone", FIRST_SETTINGS)
def test_a_checkpoint_without_the_settings_that_came_later_opens(backbone):
    config = {"flm": flm.Config(), "vilt": vilt.Config()}[backbone]
    values = {name: getattr(config, name) for name in FIRST_SETTINGS[backbone].split()}
    assert weights.config_of({"backbone": backbone, "config": values}) == config


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_training_a_loaded_model_does_not_change_its_file(name, tmp_path):
    path = saved(tiny_flm(), tmp_path / name)
    before, model = path.read_bytes(), weights.load(path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    model.vocab_logits(model.encode_image(torch.randn(1, 3, 24, 24))).sum().backward()
    optimizer.step()
    assert path.read_bytes() == before
    assert not torch.equal(model.vit.cls, weights.load(path).vit.cls)


# -- files that are refused ------------------------------------------------------------------------

def change(state, key, value):
    return {k: v for k, v in (state | {key: value}).items() if v is not None}


FIRST = "cross_modal_text_layers.0."


@pytest.mark.parametrize("key, value, message", [
    ("cross_modal_image_layers.0.output.dense.bias", torch.zeros(32),
     "unknown tensor cross_modal_image_layers.0.output"),
    (FIRST + "output.dense.bias", torch.zeros(31), "should be the same tensor and differ"),
    ("fusion_layers_top.0.output.dense.bias", torch.zeros(31),
     r"_top.0.output.dense.bias \(31,\), expected \(32,\)"),
    ("fusion_layers_top.1.output.dense.bias", None, "lacks fusion_reconstructor.1.mlp.2.bias"),
    ("fusion_layers_top.1.crossattention.self.key.bias", None,
     "lacks fusion_reconstructor.1.cross_attention.kv.bias, has .*value.bias"),
    ("vit_model.visual.conv1.weight", None, "no model .*vit.patch.weight"),
    ("vit_model.visual.positional_embedding", torch.zeros(9, 32),
     r"positional_embedding \(9, 32\), expected \(5, 32\)"),
    ("lm_score_r.bias", torch.ones(97),
     "lm_score_r.bias and lm_score.bias should be the same tensor and differ"),
    ("lm_score.bias", torch.ones(97, dtype=torch.int8), "differ|expected floating-point"),
    ("cross_modal_text_pooler_f.dense.weight", torch.ones(32, 32, dtype=torch.int8),
     "holds torch.int8, expected floating-point")])
def test_a_tensor_that_does_not_fit_is_named(recorded, tmp_path, key, value, message):
    path = lightning(tmp_path / "x.ckpt", change(recorded["flm"]["state_dict"], key, value),
                     recorded["flm"]["config"])
    with pytest.raises(ValueError, match=message) as error:
        weights.load(path, vit_heads=2)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_files_of_other_kinds_are_refused_in_a_sentence(tmp_path):
    files = {}
    clip_vision().save_pretrained(tmp_path / "clip")
    files[tmp_path / "clip"] = (
        "CLIP, as transformers writes it, a part of a model: train.py --vit begins from it")
    text_model("RobertaModel").save_pretrained(tmp_path / "roberta")
    files[tmp_path / "roberta"] = "train.py --text begins from it"
    transformers_vilt("ViltForTokenClassification", SHAPES[0]).save_pretrained(tmp_path / "tc")
    files[tmp_path / "tc"] = "describes no model"
    transformers_vilt("ViltForImagesAndTextClassification", SHAPES[0], num_images=3,
                      modality_type_vocab_size=4).save_pretrained(tmp_path / "three")
    files[tmp_path / "three"] = r"classifier.0.bias \(108,\), expected \(72,\)"
    transformers_vilt("ViltModel",
                      SHAPES[0] | {"hidden_act": "relu"}).save_pretrained(tmp_path / "relu")
    files[tmp_path / "relu"] = "hidden_act 'relu'; this ViLT has 'gelu'"
    save_file({"wte.weight": torch.zeros(3, 2)}, tmp_path / "gpt.safetensors")
    files[tmp_path / "gpt.safetensors"] = (
        r"not a checkpoint of this project nor of another .* 1 tensors \(wte.weight")
    other = lightning(tmp_path / "other.ckpt", {"encoder.weight": torch.zeros(2)})
    files[other] = r"it holds 1 tensors \(encoder.weight"
    torch.save({"a": 1}, tmp_path / "a.pt")
    files[tmp_path / "a.pt"] = "it holds 0 tensors"
    torch.save([1, 2], tmp_path / "list.pt")
    files[tmp_path / "list.pt"] = "not a checkpoint of this project"
    (tmp_path / "hello.pt").write_bytes(b"hello")
    files[tmp_path / "hello.pt"] = "neither a torch nor a safetensors file"
    (tmp_path / "empty").mkdir()
    files[tmp_path / "empty"] = "neither model.safetensors nor pytorch_model.bin"
    files[tmp_path / "nowhere.pt"] = "no such checkpoint"
    torch.save({"format": weights.FORMAT, "model": {}}, tmp_path / "half.pt")
    files[tmp_path / "half.pt"] = "a damaged checkpoint of this project, without backbone"
    good = saved(tiny_flm(), tmp_path / "good.pt")
    for name, wrong, message in (("config", {"objective": "flm", "colour": 1}, "'colour'"),
                                 ("backbone", "resnet", "'resnet'")):
        torch.save(torch.load(good) | {name: wrong}, tmp_path / f"{name}.pt")
        files[tmp_path / f"{name}.pt"] = message
    for path, message in files.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            weights.load(path)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="has no field 'colour'"):
        weights.load(good, colour=1)


def test_odd_contents_of_our_files_are_a_sentence(tmp_path):
    good = torch.load(saved(tiny_flm(), tmp_path / "good.pt"))
    sizes = ({"width": "x"}, {"width": 2**50, "heads": 1}, {"image_size": 30}, {"dropout": None},
             {"head": 5})
    for odd in (dict(config=[1]), dict(model=[1]), dict(backbone=[1]), dict(tokenizer=[1]),
                dict(tokenizer={"vocab.json": "x", "merges.txt": ""}),
                dict(model=good["model"] | {"vit.cls": torch.ones(1).expand(2**20, 2**20)}),
                *(dict(config=good["config"] | size) for size in sizes)):
        torch.save(good | odd, tmp_path / "x.pt")
        with pytest.raises(ValueError) as error:
            weights.load(tmp_path / "x.pt")
        sentence = str(error.value)
        assert sentence.startswith(f"{tmp_path / 'x.pt'}: ") and "\n" not in sentence
    doubles = {name: tensor.double() for name, tensor in good["model"].items()}
    torch.save(good | {"model": doubles}, tmp_path / "x.pt")
    assert weights.load(tmp_path / "x.pt").vit.cls.dtype == torch.float32


@pytest.mark.parametrize("settings, message", [
    ({"id2label": {"x": "y"}}, "id2label of its config.json is no table"),
    ({"num_attention_heads": "three"}, "heads: a value of type int is expected, not str"),
    ({"max_image_length": "long"}, "describes no model")])
def test_an_odd_config_json_is_a_sentence(settings, message, tmp_path):
    theirs = transformers_vilt("ViltForQuestionAnswering", SHAPES[0])
    theirs.save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text()) | {"max_image_length": None}
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert weights.load(tmp_path).config.max_patches == vilt.Config.max_patches
    (tmp_path / "config.json").write_text(json.dumps(table | settings))
    with pytest.raises(ValueError, match=message) as error:
        weights.load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ") and "\n" not in str(error.value)


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    path = saved(tiny_flm(), tmp_path / "good.pt")
    (tmp_path / "folder").mkdir()
    for output, message in (("folder", ".*folder: Is a directory; a folder stands"),
                            ("good.pt/below.pt",
                             ".*good.pt.*: (File exists|Not a directory); a file stands")):
        with pytest.raises(SystemExit, match=f"weights.py: .*{message}"):
            weights.main(["convert", str(path), str(tmp_path / output)])
    config = tiny_flm().config
    with pytest.raises((AttributeError, pickle.PicklingError)):
        weights.save(tmp_path / "x.pt", {}, config, "pretrain", None, more=lambda: None)
    with pytest.raises(TypeError, match="not JSON serializable"):
        weights.save(tmp_path / "x.safetensors", {}, config, "pretrain", None,
                     optimizer={"step": torch.ones(1)})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "good.pt"]


# -- commands --------------------------------------------------------------------------------------

def test_info_says_what_a_file_is(recorded, tmp_path, capsys):
    vqa = lightning(tmp_path / "vqa.ckpt", recorded["vqa"]["state_dict"],
                    hyper_parameters=recorded["vqa"]["config"] | {"vit_heads": 2})
    clip_vision().save_pretrained(tmp_path / "clip")
    toy = weights.model_of(flm.PRESETS["toy"])
    tok = tokenizer.BPE.train(["a red dog"], 261)
    weights.save(tmp_path / "toy.pt", toy.state_dict(), toy.config, "pretrain",
                 weights.pack_tokenizer(tok), step=2000,
                 settings={"recipe": "toy", "data": "data/toy", "datasets": ()})
    for path, lines in ((vqa, ["whose        FLM", "task         vqa", "step         1,234",
                               "recipe       finetune_vqa",
                               "answers      11, of which the file has no list",
                               "taken          198"]),
                        (tmp_path / "clip",
                         ["whose        CLIP, as transformers", "train.py --vit"]),
                        (tmp_path / "toy.pt",
                         ["whose        this project's", "recipe       toy",
                          "data         data/toy", "step         2,000",
                          "tokenizer    BPE, 261 tokens", "patch_size=16"])):
        weights.main(["info", str(path)])
        out = capsys.readouterr().out
        assert all(line in out for line in lines), out
    with pytest.raises(SystemExit, match="weights.py: .*nowhere.pt: there is no such checkpoint"):
        weights.main(["info", "nowhere.pt"])


@pytest.mark.parametrize("output, written", [
    ("ours.pt", "ours.pt"), ("ours.safetensors", "ours.safetensors"), ("ours", "ours.safetensors")])
def test_convert_writes_one_of_ours_with_tokenizer_and_answers(
        output, written, recorded, tmp_path, capsys):
    path = lightning(tmp_path / "vqa.ckpt", recorded["vqa"]["state_dict"],
                     recorded["vqa"]["config"] | {"vit_heads": 2})
    tokenizer.BPE.train(["a red dog"], 261).save(tmp_path / "tok")
    (tmp_path / "answers.json").write_text(json.dumps({str(i): f"answer {i}" for i in range(11)}))
    weights.main(["convert", str(path), str(tmp_path / output),
                  "--tokenizer", str(tmp_path / "tok"),
                  "--answers", str(tmp_path / "answers.json")])
    assert f"wrote {tmp_path / written}" in capsys.readouterr().out
    model, again = weights.load(path), weights.load(tmp_path / written)
    assert (again.config, again.task, again.step) == (model.config, "vqa", 1234)
    assert again.answer_list[10] == "answer 10" and len(again.tokenizer) == 261
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    assert (tmp_path / written).stat().st_size < 1.1 * 4 * numbers + 200_000
    assert (written == "ours.pt") == zipfile.is_zipfile(tmp_path / written)
    (tmp_path / "answers.json").write_text('["yes"]')
    with pytest.raises(SystemExit, match="1 answers, but the model has 11"):
        weights.main(["convert", str(path), str(tmp_path / "x.pt"), "--answers",
                      str(tmp_path / "answers.json")])


def test_convert_writes_a_vilt_for_transformers(tmp_path, capsys, in_order):
    import transformers
    answers = {0: "yes", 1: "no", 2: "2"}
    transformers_vilt("ViltForQuestionAnswering", SHAPES[0],
                      id2label=answers).save_pretrained(tmp_path / "a")
    weights.main(["convert", str(tmp_path / "a"), str(tmp_path / "ours.pt")])
    weights.main(["convert", str(tmp_path / "ours.pt"), str(tmp_path / "b"), "--to",
                  "transformers"])
    assert "all LayerNorms with eps 1e-12" in capsys.readouterr().out
    theirs = transformers.ViltForQuestionAnswering.from_pretrained(tmp_path / "b").eval()
    compare(ours := weights.load(tmp_path / "ours.pt"), theirs, 16, head_of(ours))
    assert ours.answer_list == ["yes", "no", "2"] and theirs.config.id2label == answers


def test_download_lists_what_there_is(capsys):
    weights.main(["download"])
    assert "clip-b32" in capsys.readouterr().out


# -- memory ----------------------------------------------------------------------------------------

OPEN = """
import re, sys, threading, time, torch, weights
def memory(what):       # of this process alone; getrusage begins with the peak of its parent
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def watch():
    while True:
        own.append(memory("RssAnon"))
        time.sleep(0.002)
torch.set_num_threads(1)
own, before = [], memory("VmHWM")
threading.Thread(target=watch, daemon=True).start()
model = weights.load(sys.argv[1])
opened = max(own) - own[0]
sum(float(parameter.detach().sum()) for parameter in model.parameters())
print(opened, memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(),
                    reason="peak memory is read from Linux's /proc")
def test_opening_a_file_takes_far_less_than_its_size_and_using_it_little_more(tmp_path):
    """Ours and a released one of 500 MB, in a process of its own: opened, then every weight read.

    Opening reads every byte, for its checksum and for NaN: pages of the file, which the system
    takes back when it likes. Counted here is what it cannot take back. Only keys and values of a
    released file are copied, because two of its tensors are one of ours.
    """
    config = replace(flm.PRESETS["base-b32"], text_layers=2, fusion_layers=2, vit_layers=4,
                     reconstructor_text_layers=2, reconstructor_fusion_layers=2)
    state = weights.model_of(config).state_dict()
    files = {tmp_path / "ours.pt": 0.05, tmp_path / "ours.safetensors": 0.05,
             lightning(tmp_path / "flm.ckpt", as_released(state)): 0.25}
    weights.save(tmp_path / "ours.pt", state, config, "pretrain", None)
    weights.save(tmp_path / "ours.safetensors", state, config, "pretrain", None)
    for path, limit in files.items():
        size = path.stat().st_size
        assert size > 450e6
        out = subprocess.run([sys.executable, "-c", OPEN, path], cwd=Path(weights.__file__).parent,
                             check=True, capture_output=True, text=True).stdout
        opened, used = (int(number) / size for number in out.split())
        assert opened < limit and used < 1.1, (path.name, opened, used)


def test_a_checkpoint_with_the_names_of_an_earlier_version_opens(tmp_path):
    model = flm.FLM(flm.PRESETS["toy"])
    weights.save(tmp_path / "now.pt", model.state_dict(), model.config, "pretrain", None,
                 settings={"fusion_lr_scale": 3.0})
    contents = torch.load(tmp_path / "now.pt", weights_only=True)
    contents["config"]["forward_weight"] = contents["config"].pop("left_to_right_weight")
    contents["settings"] = {"fusion_lr": 3.0}
    torch.save(contents, tmp_path / "then.pt")
    assert weights.load(tmp_path / "then.pt").config == model.config
    assert weights.read(tmp_path / "then.pt")["settings"] == {"fusion_lr_scale": 3.0}
