"""Answers about single pictures, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import ExifTags, Image
from conftest import ANSWERS, caption, finetune, picture, tiny, write_world

import predict
import retrieval
import weights


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = write_world(tmp_path_factory.mktemp("predict"))
    finetune(root, "retrieval", "flm", root / "retrieval", "--false-captions", 2)
    finetune(root, "caption", "flm", root / "caption")
    finetune(root, "vqa", "flm", root / "vqa")
    finetune(root, "nlvr2", "vilt", root / "nlvr2")
    return root


@pytest.fixture(scope="module")
def photo(world):
    (world / "photo.jpg").write_bytes(picture(1))
    (world / "other.png").write_bytes(picture(2, (30, 50), "PNG"))
    return world / "photo.jpg"


# -- a model ---------------------------------------------------------------------------------------

def test_a_model_that_cannot_do_the_task_or_lacks_its_words_is_refused(world, photo):
    with pytest.raises(ValueError, match="vqa/last.pt: a model of task vqa with head vqa; needed "
                                         "is what train.py --task nlvr2 --load .*last.pt makes"):
        predict.open_model(world / "vqa/last.pt", "nlvr2")
    model = predict.open_model(world / "vqa/last.pt", "vqa")
    assert len(predict.ask(model, photo, "is it red?", k=3)) == 3
    model.answer_list = None
    with pytest.raises(ValueError, match="carries no answer list"):
        predict.ask(model, photo, "is it red?")
    model.answer_list, model.tokenizer = ANSWERS, None
    with pytest.raises(ValueError, match="carries no tokenizer"):
        predict.ask(model, photo, "is it red?")
    pretrained = weights.load(world / "flm.pt")
    for function, arguments in ((predict.ask, (photo, "why?")), (predict.describe, (photo,)),
                                (predict.compare, (photo, photo, "a dog"))):
        with pytest.raises(ValueError, match="a model of task pretrain with head vocab; needed"):
            function(pretrained, *arguments)


def test_a_model_of_nan_answers_nothing(world, photo):
    broken = []
    for name in ("vqa/last.pt", "nlvr2/last.pt", "retrieval/last.pt", "caption/last.pt", "flm.pt"):
        model = weights.load(world / name)
        with torch.no_grad():
            model.embed.word.weight.fill_(math.nan)
        broken.append(model)
    vqa, nlvr2, retrieval, caption, pretrained = broken
    for call in (lambda: predict.ask(vqa, photo, "is it red?"),
                 lambda: predict.compare(nlvr2, photo, photo, "a dog"),
                 lambda: predict.search(retrieval, "a dog", [photo]),
                 lambda: predict.describe(caption, photo),
                 lambda: predict.describe(caption, photo, beams=2),
                 lambda: predict.fill(pretrained, photo, "a <mask> dog")):
        with pytest.raises(ValueError, match="the model's scores are not .*NaN"):
            call()


# -- single pictures -------------------------------------------------------------------------------

@torch.no_grad()
def test_search_orders_pictures_by_the_score_of_the_pair(world, photo):
    model = weights.load(world / "vilt.pt")
    found = predict.search(model, "a red dog", [photo, world / "other.png"])
    scores = {}
    for path, score in found:
        text = model.encode_text(predict.token_ids(model, "a red dog"))
        visual = predict.encode_pictures(model, [path])
        logits = model.itm_head(model.fuse(visual, text).pooled)[0]
        scores[path] = score
        assert score == pytest.approx(math.log(torch.softmax(logits, -1)[1]), abs=1e-5)
    assert [path for path, _ in found] == sorted(scores, key=lambda p: -scores[p])
    assert len(found) == 2


@pytest.mark.parametrize("kind", ["flm", "vilt"])
def test_rank_orders_texts_by_the_same_score_as_search(world, photo, kind):
    model, texts = weights.load(world / f"{kind}.pt"), ["a red dog", "two",
                                                        "a big house near a tree"]
    ranked = predict.rank(model, photo, texts)
    scores = {text: predict.search(model, text, [photo])[0][1] for text in texts}
    assert dict(ranked) == scores and len(set(scores.values())) == 3
    assert [text for text, _ in ranked] == sorted(texts, key=lambda text: -scores[text])
    assert predict.rank(model, photo, []) == []


def test_a_picture_in_memory_is_seen_as_its_file_is(world, photo, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(photo).save(tmp_path / "turned.png", exif=exif)
    Image.open(photo).convert("L").save(tmp_path / "grey.png")
    for kind in ("flm", "vilt"):
        config = weights.load(world / f"{kind}.pt").config
        for path in (photo, tmp_path / "turned.png", tmp_path / "grey.png"):
            assert torch.equal(predict.open_picture(Image.open(path), config),
                               predict.open_picture(str(path), config))
        with pytest.raises(ValueError,
                           match="the picture: not a picture that can be read .3000 x 2 pixels"):
            predict.open_picture(Image.new("RGB", (3000, 2)), config)
    model = weights.load(world / "vqa/last.pt")
    answered = predict.ask(model, Image.open(photo), "is it red?")
    assert answered == predict.ask(model, photo, "is it red?")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["flm", "mlm", "vilt"])
def test_fill_puts_the_likeliest_word_into_every_blank(world, photo, kind):
    model = weights.load(world / f"{kind}.pt")
    tok = model.tokenizer
    text, words = predict.fill(model, photo, "a red <mask> on a car")
    (word, share), = words
    ids = torch.tensor([[0, *tok.encode("a red <mask> on a car", specials=True), 2]])
    place = ids[0].tolist().index(tok.mask_id)
    fused = model.fuse(predict.encode_pictures(model, [photo]), model.encode_text(ids))
    logits = model.vocab_logits(fused.reconstructed[0, place])
    shares = logits.softmax(-1)
    logits[[0, 1, 2, 3, 4]] = -math.inf
    best = int(logits.argmax())
    assert word == tok.decode([best]).strip()
    assert share == pytest.approx(shares[best].item(), abs=1e-5)
    filled = [*ids[0, 1:place].tolist(), best, *ids[0, place + 1:-1].tolist()]
    assert text == tok.decode(filled)
    text, words = predict.fill(model, photo, "<mask> red <mask> <mask> car")
    assert len(words) == 3 and all(0 < share <= 1 for _, share in words)
    assert "<mask>" not in text and text.endswith(" car")
    with pytest.raises(ValueError, match="a text of .* tokens; this model reads at most"):
        predict.fill(model, photo, "<mask> " + "red " * 50)


@torch.no_grad()
def test_several_blanks_are_read_again_with_the_guesses_in_them(world, photo, monkeypatch):
    model, reads = weights.load(world / "flm.pt"), []
    tok, encode_text = model.tokenizer, model.encode_text
    visual = predict.encode_pictures(model, [photo])
    monkeypatch.setattr(model, "encode_text", lambda ids: reads.append(ids) or encode_text(ids))
    text, words = predict.fill(model, photo, "<mask> red <mask> <mask> car", rounds=50)
    blanks = (reads[0][0] == tok.mask_id).nonzero()[:, 0].tolist()
    assert len(blanks) == 3 <= len(reads)
    for read, then in zip(reads, reads[1:] + reads[-1:], strict=True):  # the last one gives itself
        fused = model.fuse(visual, encode_text(read))
        shares = model.vocab_logits(fused.reconstructed[0, blanks]).softmax(-1)
        shares[:, :5] = 0
        assert torch.equal(then[0, blanks], shares.argmax(-1))
        assert then[0, 1:blanks[0]].tolist() == read[0, 1:blanks[0]].tolist()
        assert then.shape == read.shape
    assert text == tok.decode(reads[-1][0, 1:-1].tolist())
    assert [share for _, share in words] == pytest.approx(shares.amax(-1).tolist(), abs=1e-6)
    reads.clear()
    predict.fill(model, photo, "<mask> red <mask> <mask> car", rounds=2)
    assert len(reads) == 2


@torch.no_grad()
@pytest.mark.parametrize("name", ["<eos>", "</s>"])
def test_a_caption_ends_at_eos_or_at_the_end_of_the_text(world, photo, name):
    model = weights.load(world / "caption/last.pt")
    visual = predict.encode_pictures(model, [photo])
    assert predict.write_captions(model, visual, max_tokens=6)[0]
    model.vocab_head.decoder.bias[model.tokenizer.ids[name]] += 1000
    assert predict.write_captions(model, visual, max_tokens=6, no_repeat=1) == [""]     # not twice


def test_a_sampled_description_depends_on_its_seed_alone(world, photo):
    model = weights.load(world / "caption/last.pt")
    said = [predict.describe(model, photo, 8, top_p=1.0, seed=seed) for seed in (0, 1, 0)]
    assert said[0] == said[2] != said[1]


# -- retrieval in halves, and as much of it at a time as fits --------------------------------------

@pytest.mark.parametrize("objective", ["flm", "mlm"])
@torch.no_grad()
def test_captions_kept_in_halves_are_fused_as_autocast_fuses_them(objective):
    model = tiny(objective=objective, itm=True)
    ids = torch.cat([caption(n, 9, seed=n) for n in (5, 9, 7)])
    with torch.autocast("cpu", torch.bfloat16):
        visual = model.encode_image(torch.rand(1, 3, 24, 24))
        text = model.encode_text(ids, class_only=True)
        kept = retrieval.Gallery.encode_texts(SimpleNamespace(model=model),
                                              [row[row != 1].tolist() for row in ids])
        assert kept.streams.dtype == torch.bfloat16 and text.streams.dtype == torch.float32
        assert torch.equal(predict.match_score(model, visual, kept),
                           predict.match_score(model, visual, text))
    whole = retrieval.Gallery.encode_texts(SimpleNamespace(model=model), [ids[1].tolist()])
    assert whole.streams.dtype == torch.float32             # nothing is rounded in float32


@pytest.mark.parametrize("room, expected", [(3, 1), (7, 2), (8, 4), (15, 4), (16, 16)])
def test_captions_at_a_time_double_as_long_as_twice_as_many_fit(monkeypatch, room, expected):
    def score(model, visual, texts):
        assert texts == sorted(texts, key=len, reverse=True)
        if len(texts) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    gallery = SimpleNamespace(model=None, tokens=lambda: [[0] * n for n in range(16)],
                              encode_image=lambda i: None, encode_texts=list)
    monkeypatch.setattr(retrieval, "device_of", lambda model: torch.device("cuda"))
    monkeypatch.setattr(retrieval, "match_score", score)
    assert retrieval.texts_that_fit(gallery, 1) == expected


def test_a_cpu_scores_as_many_captions_at_a_time_as_it_was_told():
    gallery = SimpleNamespace(model=tiny(itm=True), tokens=lambda: [[0]] * 99)
    assert retrieval.texts_that_fit(gallery, 7) == 7
