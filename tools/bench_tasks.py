"""How fast captions, retrieval and fine-tuning for it are, beside the original's way. (Commands of bench.py.)

The original computes everything again for every word of a caption, and for every pair of an image and a caption. All ways
have the same weights, drawn at random, and say the same, which each command checks.

Letters: B images, N pairs, L text length (padded), n words so far.
"""

from dataclasses import replace
from functools import partial

import torch

import flm
import layers
from generate import generate, uncached_logits
from tools.measure import Rig, Way, adamw, autocast, compare, device_of, draw, in_turns, now, print_table, text_lengths
from predict import match_score
from tasks import Caption, Retrieval
from train import to_device


def clock(ways, args, device):
    """{name: function of the precision} -> two dicts of (precision, name): seconds of its rounds, what it returned."""
    returned = {}

    @torch.no_grad()
    def run(precision, name):
        began = now(device)
        with autocast(device, precision):
            returned[precision, name] = ways[name](precision)
        return now(device) - began

    keys = [(precision, name) for precision in args.precision for name in ways]
    return in_turns({key: lambda k=key: run(*k) for key in keys}, args.rounds), returned


def table(seconds, amount, unit, references):
    """Prints and returns a row per way: the shortest of its rounds, and its speed beside each of the references'."""
    best, rows = {key: min(times) for key, times in seconds.items()}, []
    for (precision, name), time in best.items():
        row = {"precision": precision, "variant": name, "seconds": time, f"{unit}/s": amount / time}
        rows.append(row | {f"against {other}": best[precision, other] / time for other in references})
    print_table(rows)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Captions.

def everything_again(model, images, prompt, max_tokens):
    """Greedy captions, the picture and all words so far computed again for every word -> B lists of ids."""
    ids = torch.tensor([prompt] * len(images), device=images.device)                                # (B, n)
    for _ in range(max_tokens):
        logits = uncached_logits(model, model.encode_image(images), ids)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, len(prompt):].tolist()


def original_captions(whole, images, prompt, max_tokens):
    """The same by a whole FLM: with the reverse stream, the reconstructor, and the head on all words, of which the last
    of the forward stream is looked at."""
    ids = torch.tensor([[whole.config.cls_id, *prompt]] * len(images), device=images.device)        # (B, 1 + n)
    for _ in range(max_tokens):
        logits = whole.vocab_logits(whole.fuse(whole.encode_image(images), whole.encode_text(ids)).left_to_right)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, 1 + len(prompt):].tolist()


def captions(args):
    """Greedy captions with all that can be kept, beside computing everything again for every word -> the table."""
    device, preset = device_of(args), flm.PRESETS[args.preset]
    bos = preset.vocab_size                                                 # and after it <eos>, which ends nothing here
    config = replace(Caption.adapt(preset), vocab_size=preset.vocab_size + 2)
    torch.manual_seed(0)
    model = flm.FLM(config).to(device).eval()
    whole = flm.FLM(replace(config, objective="flm")).to(device).eval()
    whole.load_state_dict(model.state_dict(), strict=False, assign=True)    # its forward stream is the model's
    images = to_device(draw(config, args.images, 1, 2, 2), device, config)["image"]
    print(f"greedy captions of {args.images} pictures, {args.tokens} tokens each\n")

    def generated(cache):
        return generate(model, model.encode_image(images), [bos], [], args.tokens, cache=cache)[0]

    seconds, said = clock({"all kept": lambda _: generated(True), "picture kept": lambda _: generated(False),
                           "everything again": lambda _: everything_again(model, images, [bos], args.tokens),
                           "original": lambda _: original_captions(whole, images, [bos], args.tokens)}, args, device)
    rows = table(seconds, args.images, "captions", ["everything again", "original"])
    print()
    for row in rows:
        row["same captions"] = said[row["precision"], row["variant"]] == said[row["precision"], "original"]
    for precision in args.precision:
        others = [row["variant"] for row in rows if row["precision"] == precision and not row["same captions"]]
        print(f"{precision}: " + (f"not the original's captions: {', '.join(others)}" if others else
                                  "all ways write the same captions"))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval, and fine-tuning for it.

def original_scores(model, images, ids, class_only=False):
    """Every pair for itself: images (N, 3, H, W), of which most are the same, and captions (N, L) -> (N,)

    class_only: of the reconstructor the class query alone.
    """
    text = model.encode_text(ids, class_only=class_only)
    return model.head(model.fuse(model.encode_image(images), text).pooled)[:, 0].float()


def image_and_captions(args):
    """An image against many captions, all that is not pairwise computed once, beside the original's way -> the table."""
    device, config = device_of(args), Retrieval.adapt(flm.PRESETS[args.preset])
    torch.manual_seed(0)
    model = flm.FLM(config).to(device).eval()
    batches = {name: to_device(draw(config, 1, args.captions, args.tokens, L), device, config)
               for name, L in text_lengths(args, device).items()}
    image, short, long = batches["ours"]["image"], batches["ours"]["ids"], batches["original"]["ids"]
    print(f"an image against {args.captions} captions of {args.tokens} tokens, for the original padded to "
          f"{long.shape[1]}\n")
    kept = {}                                                   # what is computed once for all images of an evaluation
    for precision in args.precision:
        with torch.no_grad(), autocast(device, precision):
            kept[precision] = model.encode_text(short, class_only=True)
    seconds, scores = clock({
        "ours, captions encoded before": lambda precision: match_score(model, model.encode_image(image), kept[precision]),
        "ours": lambda _: match_score(model, model.encode_image(image), model.encode_text(short, class_only=True)),
        "original": lambda _: original_scores(model, image.expand(len(long), -1, -1, -1), long)}, args, device)
    rows = table(seconds, args.captions, "pairs", ["original"])
    print()
    for row in rows:
        precision, name = row["precision"], row["variant"]
        expected = scores[precision, "original"]
        row["difference"] = (scores[precision, name] - expected).abs().max().item()
        if precision == "fp32" and not row["difference"] <= 1e-4:
            raise ValueError(f"{name} and original do not compute the same: scores differ by {row['difference']}")
        if name != "original":
            print(f"{precision}, {name}: scores differ from the original's by at most {row['difference']:.2g} "
                  f"(their standard deviation is {expected.std().item():.2g})")
    return rows


def pair_by_pair(model, batch, class_only):
    """The loss of layers.task_loss with the image encoded for each of its captions."""
    B, N = len(batch["image"]), len(batch["ids"])
    images = batch["image"].repeat_interleave(N // B, dim=0)                                        # (N, 3, H, W)
    logits = original_scores(model, images, batch["ids"], class_only).view(B, -1)
    return {"retrieval": layers.loss_and_hits(logits, torch.zeros(B, dtype=torch.int64, device=logits.device))}


class TuneRig(Rig):
    """Fine-tuning for retrieval: each image encoded once, once for each of its captions, and all as the original."""

    def __init__(self, args):
        super().__init__(args, Retrieval.adapt(flm.PRESETS[args.preset]))
        torch.manual_seed(0)
        model = flm.FLM(self.config).to(self.device)
        optimizer, counts = adamw(model), {"retrieval": args.batch}
        captions = args.batch * (1 + args.false_captions)
        short, long = (self.pinned(draw(self.config, args.batch, captions, args.tokens, L))
                       for L in text_lengths(args, self.device).values())
        for name, forward, batch in (("ours", layers.task_loss, short),
                                     ("image for each caption", partial(pair_by_pair, class_only=True), short),
                                     ("original", partial(pair_by_pair, class_only=False), long)):
            self.ways[name] = Way(model, optimizer, forward, batch, counts)


def tune(args):
    """A step of fine-tuning for retrieval, images encoded once, beside once for each of their captions -> the table."""
    rig = TuneRig(args)
    ours, original = (rig.ways[name].batch["ids"] for name in ("ours", "original"))
    print(f"{args.batch} x {1 + args.false_captions} captions, padded to {ours.shape[1]}, for the original to "
          f"{original.shape[1]}")
    losses = rig.check("retrieval", *rig.ways)
    print(f"the loss in float32 is {losses[0]:.6f}, the largest difference {max(losses) - min(losses):.2g}\n")
    for way in rig.ways.values():
        way.model.train()
    steps = {(p, name): lambda p=p, n=name: rig.step(n, p) for p in args.precision for name in rig.ways}
    return compare(in_turns(steps, args.rounds), len(ours), dict.fromkeys(rig.ways, "original"))
