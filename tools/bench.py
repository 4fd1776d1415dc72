"""How fast each part is, side by side.

    python bench.py step --preset base-b32 --precision fp32 bf16      # a step, beside the original's way
    python bench.py parts --preset base-b32                           # where our step spends its time
    python bench.py vilt --shapes mixed                               # ViLT's step, beside transformers'
    python bench.py loader                                            # pictures/s of one core, on pictures drawn here …
    python bench.py loader data/coco --tokenizer DIR                  # … or on the Arrow files of a directory
    python bench.py padding data/coco/*.arrow --tokenizer DIR         # the padding in real captions' batches
    python bench.py gpu --preset base-b32 --batch 64 128 256 512      # pairs/s, memory and utilisation of a GPU
    python bench.py captions --images 4 --tokens 20                   # captions word by word, beside the original's way
    python bench.py retrieval --captions 64                           # an image against captions, beside the original's
    python bench.py tune --batch 1                                    # a step of fine-tuning for it

What is compared is measured in one process in turns (A B A B …), so that noise hits all alike, and of each the shortest
time counts. Ratios hold on a busy machine too (there with `--threads 1`: two threads that share cores with other programs
wait for each other); read absolute times beside the load average. `--json FILE` keeps the numbers.

Letters: B batch, L text length (padded), n real tokens of a caption, P image tokens, V vocabulary.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from tools import bench_tasks
import data
import flm
import tokenizer
import machine
import train
import vilt
import weights
from tools.measure import (HEAD, OPTIMIZER, REST, Rig, Way, adamw, compare, draw, in_turns, now,
                           padding_multiple, print_table, shares, text_lengths)
from tasks import PretrainFLM, PretrainViLT, shape_of

# ---------------------------------------------------------------------------------------------------------------------
# A training step, ours and as the original takes it.

def make_batch(config, B, n, L):
    """A batch as tasks.PretrainFLM.collate makes it: B captions of n real tokens, padded to L, every word predicted."""
    rows = {f"{name}_rows": (torch.arange(B)[:, None] * L + torch.tensor(positions)).flatten()
            for name, positions in flm.predicting_rows("flm", n).items()}
    return draw(config, B, B, n, L) | rows


def ours(model, batch):
    return model.forward(batch)


def everywhere(model, batch):
    """The losses of FLM.forward in the original's way: the head on all L positions of all three outputs.

    Positions that predict nothing are scored too and then ignored, with no weight in the loss.
    """
    ids, results = batch["ids"], {}
    fused = model.fuse(model.encode_image(batch["image"]), model.encode_text(ids))
    for name, shift in flm.SHIFT.items():
        rows = batch[f"{name}_rows"]
        targets = torch.full_like(ids, -100).flatten()                                      # (B L)
        targets[rows] = ids.flatten()[rows + shift]
        logits = model.vocab_logits(getattr(fused, name)).flatten(0, 1)                     # (B L, V)
        loss = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
        results[name] = loss, (logits.argmax(-1) == targets).sum()
    return results


class FLMRig(Rig):
    """FLM's ways to take a step, "ours" and the "original"'s: the same weights, batches of other lengths."""

    def __init__(self, args, B):
        super().__init__(args, PretrainFLM.adapt(flm.PRESETS[args.preset]))
        torch.manual_seed(0)
        self.model = flm.FLM(self.config).to(self.device)
        optimizer = adamw(self.model)
        self.lengths = text_lengths(args, self.device)
        self.ways = {name: Way(self.model, optimizer, forward, parts=PARTS)
                     for name, forward in (("ours", ours), ("original", everywhere))}
        self.tokens = args.tokens
        self.set_batch(B)

    def set_batch(self, B):
        self.B = B
        for name, L in self.lengths.items():
            batch = make_batch(self.config, B, self.tokens, L)
            self.ways[name].counts = {output: len(batch[f"{output}_rows"]) for output in flm.SHIFT}
            self.ways[name].batch = self.pinned(batch)

    def describe(self):
        c = self.config
        parameters = sum(p.numel() for p in self.model.parameters())
        cost = {"ours": flops(c, self.tokens), "original": flops(c, self.lengths["original"], 3 * self.lengths["original"])}
        print(f"{parameters / 1e6:.1f} M parameters | batches of {self.B} | captions of {self.tokens} tokens, ours "
              f"padded to {self.lengths['ours']}, the original's to {self.lengths['original']} with its head everywhere")
        print(f"forward FLOPs of a pair: {cost['ours'] / 1e9:.4g} G on real tokens, {cost['original'] / 1e9:.4g} G as the "
              f"original, a ratio of {cost['original'] / cost['ours']:.2f}\n")


def step(args):
    """A training step of ours beside the original's, per precision -> rows of the table."""
    rig = FLMRig(args, args.batch)
    rig.describe()
    functions = {}
    for precision in args.precision:
        for name in rig.ways:
            functions[precision, name] = lambda n=name, p=precision: rig.step(n, p)
        if args.compile:
            compiled = torch.compile(ours)
            functions[precision, "ours, compiled"] = lambda p=precision, f=compiled: rig.step("ours", p, f)
    return compare(in_turns(functions, args.rounds), rig.B,
                   dict.fromkeys(["ours", "original", "ours, compiled"], "original"))


def flops(config, n, targets=None):
    """FLOPs of the forward pass of one pair with a caption of n tokens: 2 per multiply-add of every matrix product.

    targets: rows that the vocabulary head scores; None: one per predicted token, 3n - 5. Attention counts its whole
    square, whatever the mask; elementwise work and norms, a few percent of the time, count nothing.

    >>> f"{flops(flm.PRESETS['base-b32'], 13) / 1e9:.1f} G"
    '24.8 G'
    """
    c, P = config, 1 + (config.image_size // config.patch_size) ** 2
    targets = sum(map(len, flm.predicting_rows("flm", n).values())) if targets is None else targets

    def attention(q, k, width):                 # q, out: 2 q w²; k and v: 2 k w²; scores and their mixture: 2 q k w
        return 2 * (2 * q * width ** 2 + 2 * k * width ** 2 + 2 * q * k * width)

    def mlp(rows, width):
        return 2 * rows * 8 * width ** 2

    vit = 2 * (P - 1) * 3 * c.patch_size ** 2 * c.vit_width \
        + c.vit_layers * (attention(P, P, c.vit_width) + mlp(P, c.vit_width))
    text = c.text_layers * 2 * (attention(n, n, c.text_width) + mlp(n, c.text_width))
    text += c.reconstructor_text_layers * (attention(n, 2 * n, c.text_width) + mlp(n, c.text_width))
    bridges = 2 * c.width * (P * c.vit_width + 3 * n * c.text_width)
    fusion = c.fusion_layers * (2 * attention(n, n, c.width) + attention(2 * n, P, c.width) + mlp(2 * n, c.width))
    fusion += c.reconstructor_fusion_layers * (attention(n, 2 * n, c.width) + mlp(n, c.width))
    head = 2 * targets * c.width * (c.width + c.vocab_size)
    return vit + text + bridges + fusion + head


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a step, clocked while a real step runs.

# part -> the names of its modules
PARTS = {"ViT": "vit|image_to_fusion", "embeddings": "embed", "text layers": r"text_layers\.\d+",
         "reconstructor, text side": r"text_reconstructor\.\d+", "fusion layers": r"text_to_fusion|fusion_layers\.\d+",
         "reconstructor, fusion side": r"fusion_reconstructor\.\d+", HEAD: "vocab_head"}


def parts(args):
    """The share of each part of a step -> rows of the tables."""
    rig = FLMRig(args, args.batch)
    rig.describe()
    functions = {}
    for key in ((name, precision) for precision in args.precision for name in args.variant):
        functions[*key, "clocked"] = lambda k=key: rig.clocked(*k)
        functions[*key, "whole"] = lambda k=key: rig.step(*k)[1]
    measured = in_turns(functions, args.rounds)
    tables = []
    for precision in args.precision:
        for name in args.variant:
            whole = min(measured[name, precision, "whole"])
            best = min(measured[name, precision, "clocked"], key=lambda seconds: sum(seconds.values()))
            total = sum(best.values())
            print(f"{name}, {precision}")
            rows = shares(best, [*PARTS, OPTIMIZER, REST])
            print(f"the parts add up to {total:.4g} s; the same step without the stopwatch: {whole:.4g} s\n")
            tables.append({"variant": name, "precision": precision, "sum s": total, "whole s": whole, "rows": rows})
    return tables


# ---------------------------------------------------------------------------------------------------------------------
# ViLT's step, beside transformers'.

ALL_LOSSES = "ours, all losses"
VILT_PARTS = {"embeddings": "embed|patch", "attention": r"blocks\.\d+\.attention", "feed-forward": r"blocks\.\d+\.mlp",
              HEAD: "vocab_head"}
TRANSFORMERS_PARTS = {
    "embeddings": r"vilt\.embeddings\.(text|patch)_embeddings", "attention": r"vilt\.encoder\.layer\.\d+\.attention",
    "feed-forward": r"vilt\.encoder\.layer\.\d+\.(intermediate|output)", HEAD: "mlm_score"}

# Width and height of photographs as COCO's are: 12 x 16, 16 x 12, 12 x 18, 18 x 12, 12 x 12, 12 x 19 patches of 32 pixels.
PHOTOS = {"mixed": [(640, 480), (480, 640), (640, 427), (427, 640), (500, 500), (640, 400)], "square": [(500, 500)]}


def make_vilt_batch(config, tok, B, n, shapes, training, pad_to, seed=0):
    """A batch of B captions of n tokens, some a little shorter, and pictures of `shapes`, as the loader makes it.

    training: a picture shows at most config.max_patches patches. -> (batch, the number of targets of each loss)
    """
    task = PretrainViLT(train.Settings(max_tokens=config.max_tokens, pad_to=pad_to), config, tok)
    samples = []
    for b in range(B):
        rng = np.random.default_rng([seed, b])
        words = rng.integers(5, len(tok), max(1, n - 2 - (0, 0, 1, 3)[b % 4]))              # past the special tokens
        (width, height), _ = shape_of(config)(*PHOTOS[shapes][b % len(PHOTOS[shapes])])
        image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
        samples.append({"ids": [tok.cls_id, *words.tolist(), tok.sep_id], "image": image, "rng": rng, "row": b,
                        "train": training, "cut": False, "unreadable": []})
    batch, notes = task.collate(samples)
    return batch, notes["counts"]


def for_transformers(config, batch):
    """The same batch in the words of `transformers`: masks of real pixels and tokens, a label everywhere."""
    B, _, H, W = batch["image"].shape
    h, w = (batch["sizes"] * config.patch_size).T[:, :, None]                               # (B, 1)
    pixels = (torch.arange(H) < h)[:, :, None] & (torch.arange(W) < w)[:, None]             # (B, H, W)
    labels = torch.full_like(batch["ids"], -100).flatten()
    labels[batch["mlm_rows"]] = batch["ids"].flatten()[batch["mlm_rows"]]
    words = (batch["ids"] != config.pad_id).long()
    return {"image": batch["image"], "pixel_mask": pixels.long(), "input_ids": batch["masked_ids"], "attention_mask": words,
            "labels": labels.view_as(batch["ids"])}


def masked_words(model, batch):
    """ViLT's loss of masked words alone, without dropout: what ViltForMaskedLM computes."""
    model.eval().config = replace(model.config, itm=False)
    return model(batch)


def all_losses(model, batch):
    """All that ViLT is pretrained with."""
    model.train().config = replace(model.config, itm=True)
    return model(batch)


def masked_words_by_transformers(model, batch, limit):
    model.config.max_image_length = limit           # patches of a picture, drawn in the forward pass; -1: all
    inputs = {name: tensor for name, tensor in batch.items() if name != "image"}
    loss = model.eval()(pixel_values=batch["image"], **inputs).loss
    return {"mlm": (loss * (batch["labels"] >= 0).sum(), None)}


def transformers_copy(model, tok):
    """`transformers`' ViltForMaskedLM of a vilt.ViLT's sizes and weights."""
    try:
        from transformers import ViltForMaskedLM
        from transformers.utils import logging
    except ImportError:
        raise ValueError("vilt measures ours beside the package transformers, which is not installed: "
                         "pip install transformers") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model.tokenizer, model.answer_list = tok, None          # as weights.load sets them
    with tempfile.TemporaryDirectory() as folder:
        weights.export(model, folder)
        return ViltForMaskedLM.from_pretrained(folder)


class ViLTRig(Rig):
    """ViLT's ways to take a step, ours and transformers', showing all patches and, as in training, only so many."""

    def __init__(self, args):
        preset = vilt.PRESETS[args.preset]
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tok = tokenizer.WordPiece({w: i for i, w in enumerate([*special, *map(str, range(5, preset.vocab_size))])})
        # transformers has one eps for all LayerNorms.
        c = replace(preset, eps=preset.text_eps, cls_id=tok.cls_id, pad_id=tok.pad_id, sep_id=tok.sep_id,
                    mask_id=tok.mask_id)
        super().__init__(args, c)
        torch.manual_seed(0)
        model = vilt.ViLT(c).to(self.device)
        copy = transformers_copy(model, tok).to(self.device)
        mine, theirs = adamw(model), adamw(copy)
        self.references = {}
        for training in (False, True):
            batch, counts = make_vilt_batch(c, tok, args.batch, args.tokens, args.shapes, training,
                                            padding_multiple(self.device))
            if training:
                self.ways[ALL_LOSSES] = Way(model, mine, all_losses, batch, counts, VILT_PARTS,
                                            {"optimal transport": "align"} if c.wpa_weight else {})
                if not c.max_patches or int(batch["sizes"].prod(1).max()) <= c.max_patches:
                    continue                        # all patches are shown anyway
            limit = f", at most {c.max_patches} patches" if training else ""
            self.ways["ours" + limit] = Way(model, mine, masked_words, batch, counts, VILT_PARTS)
            self.ways["transformers" + limit] = Way(
                copy, theirs, lambda m, b, k=c.max_patches if training else -1: masked_words_by_transformers(m, b, k),
                for_transformers(c, batch), counts, TRANSFORMERS_PARTS)
            self.references |= dict.fromkeys(["ours" + limit, "transformers" + limit], "transformers" + limit)
        for way in self.ways.values():
            way.batch = self.pinned(way.batch)

    def describe(self):
        batch, c = self.ways["ours"].batch, self.config
        (B, L), (_, K) = batch["ids"].shape, batch["patches"].shape
        rows, columns = (side // c.patch_size for side in batch["image"].shape[2:])
        real = int((batch["patches"] >= 0).sum()), int((batch["ids"] != c.pad_id).sum())
        parameters = sum(p.numel() for p in self.ways["ours"].model.parameters())
        print(f"{parameters / 1e6:.1f} M parameters | batches of {B}: {real[1]} tokens padded to {B} x {L}; pictures of "
              + ", ".join(f"{h} x {w}" for h, w in batch["sizes"].tolist()) + " patches")
        print(f"{real[0]} patches, packed by both to {B} x {K} (the padded grid has {B} x {rows * columns}); vocabulary head "
              f"on {len(batch['mlm_rows'])} rows, transformers' on {B * L}")


def vilt_step(args):
    """A step of ViLT's masked words beside transformers' ViltForMaskedLM; a whole step of ours -> the tables."""
    rig = ViLTRig(args)
    rig.describe()
    print("the loss of masked words in float32: {:.6f} and {:.6f}\n".format(*rig.check("mlm", "ours", "transformers")))
    steps, clocked = {}, {}
    for precision in args.precision:
        for name in rig.ways:
            steps[precision, name] = lambda n=name, p=precision: rig.step(n, p)
        for name in ("ours", "transformers", ALL_LOSSES):
            clocked[precision, name] = lambda n=name, p=precision: rig.clocked(n, p)
    results = {"steps": compare(in_turns(steps, args.rounds), args.batch, rig.references), "parts": []}
    for (precision, name), runs in in_turns(clocked, 1, warmup=0).items():
        print(f"\n{name}, {precision}: the parts of one step")
        way = rig.ways[name]
        rows = shares(runs[0], [*way.parts, *way.methods, OPTIMIZER, REST])
        results["parts"].append({"variant": name, "precision": precision, "rows": rows})
    return results


# ---------------------------------------------------------------------------------------------------------------------
# The loader.

WORDS = ("a the man woman dog cat child street table kitchen train bus red white small large standing sitting riding "
         "holding on in near with of two people while walking down next to").split()


def make_photos(path, count, size=(640, 480)):
    """Draws `count` pictures of smooth noise, as JPEGs that cost about what a photograph costs, with 5 captions each."""
    with data.Writer(path, data.CAPTIONS) as out:
        for i in range(count):
            rng = np.random.default_rng(i)
            picture = np.zeros((size[1], size[0], 3))
            for side, weight in ((4, 0.55), (16, 0.2), (64, 0.1), (size[0], 0.15)):
                noise = Image.fromarray(rng.integers(0, 256, (side * size[1] // size[0], side, 3), dtype=np.uint8))
                picture += weight * np.asarray(noise.resize(size, Image.Resampling.BICUBIC))
            encoded = io.BytesIO()
            Image.fromarray(picture.astype(np.uint8)).save(encoded, "JPEG", quality=90)
            captions = [" ".join(rng.choice(WORDS, rng.integers(8, 13))) for _ in range(5)]
            out.write({"image": encoded.getvalue(), "caption": captions, "image_id": str(i), "split": "train"})


def loader(args):
    """Pictures/s of one core: decoding in three ways, the whole loader; captions/s of the tokenizer -> rows."""
    from torchvision import transforms as T         # slow to import, and only this wants it
    with tempfile.TemporaryDirectory() as scratch:
        files = [f for path in args.files for f in (data.find_files(path, (), "train") if path.is_dir() else [path])]
        if not files:
            files = [Path(scratch) / "drawn.arrow"]
            make_photos(files[0], args.photos)
        table, directory = data.Captions(files), args.tokenizer or Path(scratch) / "tokenizer"
        if not args.tokenizer:
            tokenizer.BPE.train(table.texts(), 400).save(directory)
        return measure_loader(args, table, directory, T)


def measure_loader(args, table, directory, T):
    tok = tokenizer.load(directory)
    photos = [table.image(row).to_pybytes() for row in range(min(len(table), args.photos))]
    print(f"{len(photos)} pictures of {sum(map(len, photos)) / len(photos) / 1000:.0f} kB to {args.size} pixels | "
          f"one core\n")
    originals = T.Compose([T.Resize(args.size, T.InterpolationMode.BICUBIC), T.CenterCrop(args.size), T.ToTensor(),
                           T.Normalize(data.CLIP_MEAN, data.CLIP_STD)])
    settings = train.Settings(max_tokens=50, pad_to=1)
    task = PretrainFLM(settings, flm.replace(flm.PRESETS["base-b32"], image_size=args.size, pooler=False), tok)
    dataset = task.dataset(table, train=True)
    first = np.unique(table.row_of, return_index=True)[1][:len(photos)]                     # a caption of each picture
    keys = [(epoch, int(i)) for epoch in range(args.passes) for i in first]
    batches = [keys[i:i + args.batch] for i in range(0, len(keys), args.batch)]

    def each(function):
        def run():
            began = time.perf_counter()
            for photo in photos:
                function(photo)
            return len(photos) / (time.perf_counter() - began)
        return run

    def whole(workers):
        """Pictures/s of the DataLoader; a worker's start is not counted: the clock starts with its first batch."""
        batch_loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=task.collate,
                                                   num_workers=workers)
        began, count = time.perf_counter(), 0
        for i, (batch, _) in enumerate(batch_loader):
            if i == 0 and workers:
                began = time.perf_counter()
            else:
                count += len(batch["ids"])
        return count / (time.perf_counter() - began)

    def encode(fresh):
        texts, words = list(table.texts()), tokenizer.load(directory) if fresh else tok
        began = time.perf_counter()
        for text in texts:
            words.encode(text)
        return len(texts) / (time.perf_counter() - began)

    functions = {
        "Pillow, full resolution, to float (the originals)":
            each(lambda photo: originals(Image.open(io.BytesIO(photo)).convert("RGB"))),
        "data.decode, exact": each(lambda photo: data.decode(photo, data.Square(args.size))),
        "data.decode, fast": each(lambda photo: data.decode(photo, data.Square(args.size), fast=True)),
        "whole loader, in the process": lambda: whole(0)}
    if len(batches) > 1:
        functions["whole loader, one worker"] = lambda: whole(1)
    functions |= {"tokenizer, just opened": lambda: encode(True), "tokenizer, warm": lambda: encode(False)}
    best = {name: max(rates) for name, rates in in_turns(functions, args.rounds).items()}
    plain = best["Pillow, full resolution, to float (the originals)"]
    rows = [{"what": name, "per second": rate, "of": "captions" if "tokenizer" in name else "pictures",
             "against the originals": "" if "tokenizer" in name else f"{rate / plain:.2f}x"} for name, rate in best.items()]
    shares = {name: rate / best["data.decode, fast"] for name, rate in best.items() if name.startswith("whole")}
    print_table(rows)
    print("\nshare of a core's time that is spent in decode: " +
          ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items()))
    return {"rows": rows, "decoding shares": shares}


# ---------------------------------------------------------------------------------------------------------------------
# Padding.

def padding(args):
    """The share of pads among the tokens of the micro-batches of real captions -> rows of the table."""
    tok, table = tokenizer.load(args.tokenizer), data.Captions(args.files)
    lengths = data.token_lengths(table, tok).clip(max=args.max_tokens)
    print(f"{len(lengths):,} captions of {lengths.mean():.2f} tokens on average (at most {lengths.max()}), micro-batches of "
          f"{args.micro_batch}; padding in % of the tokens that are computed")
    rng = np.random.default_rng(0)
    # A large batch of a small file would repeat the file: captions are drawn from it, as from a larger one like it.
    drawn = rng.choice(lengths, args.batches * max(args.global_batch))
    rows = []
    for size in args.global_batch:
        sampler = data.GlobalBatches(drawn, size, seed=0)
        for order in ("sorted", "as drawn"):
            longest, real = [], 0
            for k in range(sampler.steps_per_epoch):
                numbers = sampler.batch(k) if order == "sorted" else rng.permutation(sampler.batch(k))
                real += drawn[numbers].sum()
                longest += [(len(some), drawn[some].max()) for some in np.split(numbers, range(args.micro_batch, size,
                                                                                               args.micro_batch))]
            count, longest = np.array(longest).T
            row = {"global batch": size, "order": order}
            for multiple in args.pad_to:
                row[f"to {multiple}"] = f"{100 * (1 - real / (count * (-(-longest // multiple) * multiple)).sum()):.1f}"
            rows.append(row | {f"all to {args.max_tokens}": f"{100 * (1 - real / (count.sum() * args.max_tokens)):.1f}"})
    print_table(rows)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# A GPU.

def matmul_peak(device, size, rounds=5, repeats=10):
    """FLOP/s of a large square bfloat16 matrix product, the best of some rounds: what this device gives at most."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(rounds + 1):
        began = now(device)
        for _ in range(repeats):
            a @ b
        best = min(best, (now(device) - began) / repeats)
    return 2 * size ** 3 / best


def gpu(args):
    """Pairs/s, memory and utilisation of a training step in bfloat16 per batch size, as it is and compiled -> rows."""
    args.device = args.device or "cuda"
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("bench.py gpu: there is no CUDA device here, so there is nothing to measure; `bench.py step` runs on the CPU")
        return None
    rig = FLMRig(args, args.batch[0])
    device, cuda = rig.device, rig.device.type == "cuda"
    rig.describe()
    peak = matmul_peak(device, args.matmul)
    name = torch.cuda.get_device_name(device) if cuda else "cpu"
    print(f"{name}: a bf16 matrix product of {args.matmul} runs at {peak / 1e12:.4g} TFLOP/s\n")
    cost = 3 * flops(rig.config, args.tokens)           # forward and backward; pads count as waste, not as work
    variants = {"ours": None, "original": None} | ({"ours, compiled": torch.compile(ours)} if args.compile else {})

    def run(name, steps):
        """Seconds a step. The clock stands outside: as in train.py, nothing waits for the device in between."""
        began = now(device)
        for _ in range(steps):
            rig.step(name.split(",")[0], "bf16", variants[name], now=lambda _: time.perf_counter())
        return (now(device) - began) / steps

    rows = []
    for B in args.batch:
        rig.set_batch(B)
        memory = {}
        for name in variants:
            try:
                run(name, 2)                            # compiles, fills the allocator
                if cuda:
                    torch.cuda.reset_peak_memory_stats(device)
                run(name, 1)
                memory[name] = machine.memory_gb(device)
            except torch.OutOfMemoryError:
                rig.ways["ours"].optimizer.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.empty_cache()
        seconds = in_turns({name: lambda n=name: run(n, args.steps) for name in memory}, args.rounds)
        best = {name: min(times) for name, times in seconds.items()}
        for name in variants:
            fits = name in best
            rows.append({"variant": name, "batch": B, "pairs/s": B / best[name] if fits else "out of memory",
                         "ms a step": 1000 * best[name] if fits else "", "peak GB": memory[name] if fits else "",
                         "MFU %": 100 * cost * B / best[name] / peak if fits else "",
                         "speed-up": best["original"] / best[name] if fits and "original" in best else ""})
    print_table(rows)
    return {"device": name, "matmul FLOP/s": peak, "rows": rows}


# ---------------------------------------------------------------------------------------------------------------------

def parse(argv):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, name="", presets=None, default="base-b32", rounds=3, tokens=13, pad=True):
        p = commands.add_parser(name or function.__name__, help=function.__doc__.split(" -> ")[0], description=function.__doc__)
        p.set_defaults(function=function)
        p.add_argument("--json", type=Path, metavar="FILE", help="keep the numbers in this file")
        p.add_argument("--rounds", type=int, default=rounds, help="how often each thing is measured (default %(default)s)")
        if presets:
            p.add_argument("--threads", type=int, help="of the CPU; 1 is the steadiest where other programs run")
            p.add_argument("--preset", choices=presets, default=default, help="default %(default)s")
            p.add_argument("--tokens", type=int, default=tokens, help="of a caption (default %(default)s; COCO's mean is 13)")
            p.add_argument("--device", default="", help="cpu or cuda; default: cuda where there is one")
        if presets is flm.PRESETS and pad:
            p.add_argument("--pad", type=int, default=50, help="length that the original pads to (default %(default)s)")
        return p

    p = command(step, presets=flm.PRESETS)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    p.add_argument("--compile", action="store_true", help="measure our step under torch.compile too")
    p = command(parts, presets=flm.PRESETS)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    p.add_argument("--variant", nargs="+", choices=["ours", "original"], default=["ours"])
    p = command(vilt_step, "vilt", presets=vilt.PRESETS, default="vilt")
    p.add_argument("--batch", "--batch-size", type=int, default=4)
    p.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    p.add_argument("--shapes", choices=PHOTOS, default="mixed", help="of the pictures (default %(default)s)")
    p = command(loader)
    p.add_argument("files", nargs="*", type=Path, help="Arrow files or directories of them; none: pictures drawn here")
    p.add_argument("--photos", type=int, default=128, help="how many pictures (default %(default)s)")
    p.add_argument("--size", type=int, default=288, help="pixels of the shorter side (default %(default)s)")
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: one trained on the captions")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--passes", type=int, default=2, help="passes of the whole loader over the pictures in a round")
    p = command(padding)
    p.add_argument("files", nargs="+", type=Path, help="Arrow files of captions")
    p.add_argument("--tokenizer", type=Path, metavar="DIR", required=True)
    p.add_argument("--global-batch", nargs="+", type=int, default=[4096, 1024, 256, 64], metavar="N")
    p.add_argument("--micro-batch", type=int, default=64)
    p.add_argument("--pad-to", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N")
    p.add_argument("--max-tokens", type=int, default=50)
    p.add_argument("--batches", type=int, default=16, help="global batches of the largest size (default %(default)s)")
    p = command(gpu, presets=flm.PRESETS)
    p.add_argument("--batch", nargs="+", type=int, default=[64, 128, 256, 512])
    p.add_argument("--steps", type=int, default=10, help="steps between two looks at the clock (default %(default)s)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--matmul", type=int, default=8192, help="side of the matrices of the peak (default %(default)s)")
    p = command(bench_tasks.captions, presets=flm.PRESETS, tokens=20, pad=False)
    p.add_argument("--images", type=int, default=4, help="default %(default)s")
    p.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    p = command(bench_tasks.image_and_captions, "retrieval", presets=flm.PRESETS)
    p.add_argument("--captions", type=int, default=64, help="default %(default)s")
    p.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    p = command(bench_tasks.tune, presets=flm.PRESETS)
    p.add_argument("--batch", type=int, default=1, help="images (default %(default)s)")
    p.add_argument("--false-captions", type=int, default=15, help="beside each image's own (default %(default)s)")
    p.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    load = lambda: f"{os.getloadavg()[0]:.2f}"
    before = load()
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if args.function is loader else getattr(args, "threads", None) or threads)
    print(f"torch {torch.__version__} | {torch.get_num_threads()} threads on {os.cpu_count()} cores | load average {before}")
    try:
        results = args.function(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"bench.py: {error}")
    finally:
        used = torch.get_num_threads()
        torch.set_num_threads(threads)
    print(f"load average at the end {load()}")
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv if argv is None else argv, "torch": torch.__version__,
                                         "threads": used, "load average": [before, load()],
                                         "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
