"""How good a pretrained model is: the words that it knows, and what it scores after fine-tuning.

    cloze(model, tok, table, quality)       # {"both sides": {"colours": {"right": 0.97, …}, …}, …}
    task_scores("vqa", "toy", "runs/x/moment_2.pt", …)          # {"overall": 0.63}

*Cloze* asks for every word of captions that were never trained on, with their own picture and with
another one. What is right only with the right picture was seen, not guessed. There are two ways of
asking, which are never mixed, since one of them says more to the model:

    both sides      the word is hidden alone: FLM's reconstructor; MLM, one word masked at a time
    from the left   the next word: AR, PrefixLM; and FLM's own left-to-right stream

*Tasks* are asked of all objectives alike: train.py and eval.py, as everybody runs them.
"""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from batches import evaluation_batches
from data import CaptionDataset, Captions, pad_texts, token_lengths
from layers import encode_batch_images
from predict import device_of, finite, picture_batch
from storage import disk
from storage.files import find_files
from tasks import shape_of
from tools.probe import reconstruct, spread, words_of
from tools.toy import SCENES, judge

ROOT = Path(__file__).resolve().parents[1]
BOTH, LEFT = "both sides", "from the left"
ALL = "all words"                       # the group of every word
OWN_WORDS = Path(__file__).with_name("words_en.json")       # for data that bring no groups
TOY_WORDS = "toy_words.json"


@dataclass(frozen=True)
class Quality:
    """What is asked of a model."""
    groups: dict                        # {group: [words]}
    split: str                          # test, or val where there is no test
    captions: int = 400                 # at most this many, evenly spread over the split

    def table(self, run) -> Captions:
        """The captions of the split, of the datasets that a run is trained on."""
        return run.task.table(run.settings, self.split)


def open_quality(data: str, groups: str, captions: int) -> Quality:
    """The questions for a folder of data. groups: a JSON file {group: [words]}, or "".

    ValueError or FileNotFoundError in a sentence.
    """
    path = Path(groups) if groups else Path(data) / TOY_WORDS
    if not groups and not path.is_file():
        path = OWN_WORDS
    found = disk.read_json(path)
    if not isinstance(found, dict) or not found or not all(
            isinstance(words, list) and all(isinstance(word, str) for word in words)
            for words in found.values()):
        raise ValueError(f"{path}: a JSON file {{group: [words]}} is expected")
    if captions < 1:
        raise ValueError(f"--captions {captions}: at least 1 is expected")
    for split in ("test", "val"):
        if find_files(data, (), split):
            return Quality(found, split, captions)
    raise FileNotFoundError(f"{data}: no captions of split test or val to ask for words of")


# -------------------------------------------------------------------------------------------------
# Cloze.

def ways_of_asking(config) -> list[str]:
    """How a model can be asked for words. Only what it was trained to tell is asked."""
    if config.objective == "mlm":
        return [BOTH]
    if config.objective == "flm":
        return [BOTH, LEFT] if "left_to_right" in config.loss_weights else [BOTH]
    return [LEFT]


def guesses(model, visual, ids: Tensor) -> dict[str, Tensor]:
    """{way: the model's guess for every token}; from the left, the first word has none, but <pad>.

    visual of B images, ids (B, L) -> int64 (B, L) each. ValueError for scores that are not finite.
    """
    if model.config.objective == "mlm":
        return {BOTH: reconstruct(model, visual, ids)}      # a pass for each position
    fused, found = model.fuse(visual, model.encode_text(ids)), {}
    for way in ways_of_asking(model.config):
        if way == BOTH:
            found[way] = finite(model.vocab_logits(fused.reconstructed)).argmax(-1)
        else:
            found[way] = torch.full_like(ids, model.config.pad_id)
            next_words = finite(model.vocab_logits(fused.left_to_right[:, 1:-1])).argmax(-1)
            found[way][:, 2:] = next_words
    return found


@torch.no_grad()
def cloze(model, tok, table: Captions, quality: Quality, batch: int = 100) -> dict:
    """The share of words that a model knows, for each way of asking and each group of words.

    A word of several tokens is known if all of them are. The first word of a caption is not asked
    from the left, where nothing stands. batch: number of captions asked at once.
    -> {way: {group: {"right": share, "another": share (with another picture), "words": count}}}
    """
    c, device = model.config, device_of(model)
    groups_of = {}
    for group, words in quality.groups.items():
        for word in words:
            groups_of.setdefault(word, [ALL]).append(group)
    dataset = CaptionDataset(table, tok, shape_of(c), c.max_tokens, train=False)
    numbers = spread(len(dataset), quality.captions)
    asked, hits = Counter(), Counter()
    for keys in evaluation_batches(token_lengths(table, tok, numbers), numbers, batch):
        samples = [dataset[key] for key in keys]
        # The other picture is that of the row half the table away.
        other_rows = [(sample["row"] + len(table) // 2) % len(table) for sample in samples]
        others = [dataset[0, table.first_of(row)] for row in other_rows]
        ids = pad_texts([sample["ids"] for sample in samples], c.pad_id).to(device)     # (B, L)
        for picture, shown in (("right", samples), ("another", others)):
            pictures = picture_batch(c, [sample["image"] for sample in shown], device)
            visual = encode_batch_images(model, pictures)
            for way, guess in guesses(model, visual, ids).items():
                right = (guess == ids).tolist()                                         # (B, L)
                for known, sample in zip(right, samples, strict=True):
                    for word, positions in words_of(sample["ids"], tok):
                        if way == LEFT and positions[0] < 2:
                            continue
                        for group in groups_of.get(word, [ALL]):
                            asked[way, group, picture] += 1
                            hits[way, group, picture] += all(known[i] for i in positions)

    def share(way, group, picture):
        return hits[way, group, picture] / max(1, asked[way, group, picture])

    return {way: {group: {"right": share(way, group, "right"),
                          "another": share(way, group, "another"),
                          "words": asked[way, group, "right"]}
                  for group in [*quality.groups, ALL]}
            for way in ways_of_asking(c)}


# -------------------------------------------------------------------------------------------------
# Tasks.

# What eval.py is asked beside its defaults: enough for a score, in seconds.
EVALUATION = {"vqa": [], "nlvr2": [], "caption": ["--images", "500"],
              "retrieval": ["--images", "200", "--captions", "1"]}


def task_scores(task: str, load: str, out: str, steps: int, seed: int, data: str, recipe: str,
                split: str, device: str) -> dict[str, float]:
    """Fine-tunes a checkpoint for a task, for so many steps, and scores it -> {score: share of 1}.

    By the commands that everybody runs. Of what they write, only the weights are removed. On the
    toy world, captions have one more score: `true`, the share that is true of its scene.
    split: of captions and retrieval. Questions and statements are those of val, which is not
    trained on: their test split may have no answers.
    """
    if task in ("vqa", "nlvr2"):
        split = "val"
    where = ["--device", device] if device else []
    trained = Path(out) / "last.pt"
    command(out, "train.py", "--task", task, "--recipe", recipe, "--load", load, "--data", data,
            "--out", out, "--steps", str(steps), "--eval-every", "0", "--seed", str(seed),
            "--resume", *where)
    results = Path(out) / "results"
    command(out, "eval.py", task, str(trained), "--data", data, "--split", split,
            "--out", str(results), *EVALUATION[task], *where)
    [path] = results.glob("*_scores.json")
    [scores] = disk.read_json(path).values()
    if task == "caption" and (Path(data) / SCENES).is_file():
        [captions] = results.glob("captions_*_results.json")
        scores["true"] = judge(captions, data)["share"]
    for checkpoint in (trained, Path(out) / "previous.pt"):
        checkpoint.unlink(missing_ok=True)
    return scores


def command(out: str, script: str, *arguments: str):
    """Runs a script of the project; what it says goes to OUT/log.txt. ValueError if it fails."""
    Path(out).mkdir(parents=True, exist_ok=True)
    log = Path(out) / "log.txt"
    with open(log, "a", encoding="utf-8") as file:
        file.write(json.dumps([script, *arguments]) + "\n")
        file.flush()
        done = subprocess.run([sys.executable, str(ROOT / script), *arguments], stdout=file,
                              stderr=subprocess.STDOUT)
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        raise ValueError(f"{last} ({log} has all of it)")
