"""The recipes: settings that are published, and our own.

`RECIPES[task][name]` is what `train.py --task TASK --recipe NAME` uses. A row holds settings of
train.py and fields of the model's Config. What it does not name keeps its default; a flag overrides
both. `MODELS[name]` is a model's Config. `train.py --list-recipes` prints the rows.
"""

import flm
import vilt

MODELS = flm.PRESETS | vilt.PRESETS

FOUR = ("coco", "vg", "sbu", "gcc")     # the four million images of the papers

# The drawn world. Muon teaches it in a fifth of AdamW's steps (docs/RECORDS.md).
TOY = dict(model="toy", bucket=16, clip=1.0, warmup=0.03, log_every=50, save_every=400,
           eval_samples=1000, global_batch=32, micro_batch=32, head_lr_scale=1.0,
           fusion_lr_scale=1.0)
# For photographs of one's own. `small` starts from scratch on a CPU; docs/DATA.md says what to
# expect. `medium` is for a GPU of 8 GB and starts from CLIP's and RoBERTa's files. It was never
# run: its sizes come from --dry-run, its rates are the published ones, guessed for captions and
# retrieval.
SMALL = dict(model="small", bucket=16, clip=1.0, head_lr_scale=1.0, fusion_lr_scale=1.0,
             eval_every=200, eval_samples=1000, log_every=20, save_every=200)
MEDIUM = dict(model="medium", clip=1.0, head_lr_scale=5.0, fusion_lr_scale=5.0,
              eval_every=500, eval_samples=2000, log_every=20, save_every=500)
MEDIUM_TASK = MEDIUM | dict(augment=True, epochs=10)

RECIPES = {
    "pretrain": {
        "toy": TOY | dict(steps=2000, eval_every=500, lr=2e-3, muon_lr=0.01, decay=0.4),
        # More of it, with image-text matching: that trains the class vector, which tasks read.
        "toy-itm": TOY | dict(itm=True, steps=400, eval_every=400, lr=5e-4, muon_lr=0.005),
        "small": SMALL | dict(steps=1600, global_batch=32, lr=1e-3),
        "small-itm": SMALL | dict(itm=True, steps=400, global_batch=32, lr=5e-4),
        "medium": MEDIUM | dict(itm=True, steps=10_000, global_batch=256, micro_batch=32, lr=8e-5),
        # The paper's pretraining, and the objectives it compares with under the same recipe.
        "flm-b32": dict(
            model="base-b32", objective="flm", image_size=288, max_tokens=50, datasets=FOUR,
            steps=30_000, global_batch=4096, micro_batch=64,
            lr=8e-5, warmup=0.05, head_lr_scale=5.0, fusion_lr_scale=5.0),
        "mlm-b32": dict(
            model="base-b32", objective="mlm", image_size=288, max_tokens=50, datasets=FOUR,
            steps=30_000, global_batch=4096, micro_batch=64,
            lr=8e-5, warmup=0.05, head_lr_scale=5.0, fusion_lr_scale=5.0),
        "ar-b32": dict(
            model="base-b32", objective="ar", image_size=288, max_tokens=50, datasets=FOUR,
            steps=30_000, global_batch=4096, micro_batch=64,
            lr=8e-5, warmup=0.05, head_lr_scale=5.0, fusion_lr_scale=5.0),
        "prefix-b32": dict(
            model="base-b32", objective="prefix", image_size=288, max_tokens=50, datasets=FOUR,
            steps=30_000, global_batch=4096, micro_batch=64,
            lr=8e-5, warmup=0.05, head_lr_scale=5.0, fusion_lr_scale=5.0),
        # ViLT's paper: 2,500 steps of warm-up, whatever the length of the run.
        "vilt-25k": dict(
            model="vilt", max_tokens=40, datasets=FOUR, steps=25_000, global_batch=4096,
            micro_batch=64, lr=1e-4, warmup=2500 / 25_000, head_lr_scale=1.0),
        "vilt-50k": dict(
            model="vilt", max_tokens=40, datasets=FOUR, steps=50_000, global_batch=4096,
            micro_batch=64, lr=1e-4, warmup=2500 / 50_000, head_lr_scale=1.0),
        "vilt-100k": dict(
            model="vilt", max_tokens=40, datasets=FOUR, steps=100_000, global_batch=4096,
            micro_batch=64, lr=1e-4, warmup=2500 / 100_000, head_lr_scale=1.0),
        "vilt-200k": dict(
            model="vilt", max_tokens=40, datasets=FOUR, steps=200_000, global_batch=4096,
            micro_batch=64, lr=1e-4, warmup=2500 / 200_000, head_lr_scale=1.0),
        # COCO alone, as ColossalAI's example trains it: 16 accumulated batches of 256, Adam without
        # decay. (That example has masked words only: `--no-itm`.)
        "vilt-coco": dict(
            model="vilt", max_tokens=40, datasets=("coco",), steps=25_000, global_batch=4096,
            micro_batch=256, lr=1e-3, warmup=2500 / 25_000, head_lr_scale=1.0, beta2=0.99,
            weight_decay=0.0, clip=1.0),
        "vilt-toy": TOY | dict(
            model="vilt-toy", max_tokens=40, steps=1400, eval_every=700, lr=1e-3, muon_lr=0.01),
        "vilt-small": dict(
            model="vilt-small", max_tokens=40, steps=2000, global_batch=64, micro_batch=32,
            clip=1.0, lr=5e-4, warmup=0.05, head_lr_scale=1.0, eval_every=250, log_every=20),
    },
    # Fine-tuning: --load names the model that it starts from. hold_out=False: the validation split
    # is trained on too, as published (FLM's VQAv2, everybody's Flickr30k).
    "vqa": {
        "flm-b32": dict(
            model="base-b32", image_size=576, max_tokens=50, datasets=("vqav2",), hold_out=False,
            augment=True, epochs=10, global_batch=512,
            lr=5e-6, warmup=0.1, head_lr_scale=50.0, fusion_lr_scale=5.0),
        "vilt": dict(
            model="vilt", max_tokens=40, datasets=("vqav2",), augment=True, epochs=10,
            global_batch=256, lr=1e-4, warmup=0.1, head_lr_scale=10.0),
        "toy": TOY | dict(
            steps=1500, global_batch=64, micro_batch=64, eval_every=500, lr=5e-4,
            head_lr_scale=2.0, muon_lr=0.005, decay=0.4),
        "small": SMALL | dict(steps=400, global_batch=32, lr=3e-4, head_lr_scale=3.0),
        "medium": MEDIUM_TASK | dict(global_batch=256, micro_batch=32, lr=5e-6, head_lr_scale=50.0),
    },
    "nlvr2": {
        "flm-b32": dict(
            model="base-b32", image_size=288, max_tokens=50, datasets=("nlvr2",), augment=True,
            epochs=10, global_batch=256,
            lr=1e-5, warmup=0.1, head_lr_scale=10.0, fusion_lr_scale=5.0),
        "vilt": dict(
            model="vilt", max_tokens=40, datasets=("nlvr2",), augment=True, epochs=10,
            global_batch=128, lr=1e-4, warmup=0.1, head_lr_scale=1.0),
        "toy": TOY | dict(
            steps=1400, eval_every=700, lr=1e-4, head_lr_scale=5.0, muon_lr=0.003, decay=0.4),
        "small": SMALL | dict(steps=400, global_batch=32, lr=1e-4, head_lr_scale=10.0),
        "medium": MEDIUM_TASK | dict(global_batch=128, micro_batch=16, lr=1e-5, head_lr_scale=10.0),
    },
    "caption": {
        "flm-b32": dict(
            model="base-b32", image_size=288, max_tokens=50, datasets=("coco",), augment=True,
            epochs=20, global_batch=256,
            lr=3e-6, warmup=0.1, head_lr_scale=5.0, fusion_lr_scale=5.0),
        "toy": TOY | dict(steps=700, eval_every=350, lr=5e-4, muon_lr=0.005),
        "small": SMALL | dict(steps=600, global_batch=32, lr=5e-4),
        "medium": MEDIUM_TASK | dict(global_batch=256, micro_batch=32, lr=1e-5),
    },
    # The head that ranks learns at the base rate, as in the original (but not in the toy world).
    "retrieval": {
        "flm-b32": dict(
            model="base-b32", image_size=384, max_tokens=50, datasets=("f30k",), hold_out=False,
            augment=True, epochs=10, global_batch=512,
            lr=5e-6, warmup=0.1, head_lr_scale=1.0, fusion_lr_scale=5.0),
        "flm-b32-coco": dict(
            model="base-b32", image_size=384, max_tokens=50, datasets=("coco",), augment=True,
            epochs=10, global_batch=512,
            lr=5e-6, warmup=0.1, head_lr_scale=1.0, fusion_lr_scale=5.0),
        "vilt": dict(
            model="vilt", max_tokens=40, datasets=("f30k",), hold_out=False, augment=True,
            epochs=10, global_batch=256, lr=1e-4, warmup=0.1, head_lr_scale=1.0),
        "vilt-coco": dict(
            model="vilt", max_tokens=40, datasets=("coco",), augment=True, epochs=10,
            global_batch=256, lr=1e-4, warmup=0.1, head_lr_scale=1.0),
        "toy": TOY | dict(
            steps=240, global_batch=16, micro_batch=16, eval_every=120, eval_samples=500,
            false_captions=7, lr=1e-4, head_lr_scale=5.0, muon_lr=0.002),
        "small": SMALL | dict(steps=160, global_batch=16, false_captions=7, lr=1e-4),
        "medium": MEDIUM_TASK | dict(global_batch=128, micro_batch=8, lr=1e-5, head_lr_scale=1.0),
    },
}
