"""What several test files need.

Where the shared material lies, and small Arrow files made on the spot.
"""

import functools
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import flm
import prepare
import tasks
import train
import vilt
import weights
from sources.shards import Writer
from storage.files import CAPTIONS, NLVR2, VQA
from tokenizer import BPE
from tools import toy
from training import flops
from training.settings import Settings

# tiny models: a second thread only waits, and on a busy machine it waits long
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("FLM_SHARED") or ROOT.parent / "shared")


@pytest.fixture(scope="session")
def shared():
    """Real photographs, captions and tokenizer tables, which are not ours to ship."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: "
                    "real photographs, captions and tokenizer tables are needed")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def counted_once():
    """FLOPs are counted once for each model and each shape of a batch, and a peak by few products.

    Else every run of six tiny steps would spend half of its time on its utilization.
    """
    count, known = flops.count_flops, {}

    def count_once(model, batch, forward=None):
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in batch.items())
        key = model.config, shapes, forward
        if key not in known:
            known[key] = count(model, batch, forward)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "count_flops", count_once)
        patch.setattr(flops, "SECONDS", 0.005)
        yield


def free_port():
    """A port that nobody listens on, for processes that a test starts without torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def picture(seed, size=(40, 32), format="JPEG"):
    """A smooth random picture, encoded."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(out, format, quality=95)
    return out.getvalue()


WORDS = ("a red blue green small big dog cat house tree car on under near the with two three old "
         "new white black running sitting sleeping").split()


def write_captions(path, rows, seed=0, captions=2, broken=(), batch_rows=7, sizes=((40, 32),)):
    """A caption file of `rows` random pictures, of these sizes in turn.

    Rows in `broken` hold bytes that are no picture.
    """
    rng = np.random.default_rng(seed)
    with Writer(path, CAPTIONS, batch_rows=batch_rows) as out:
        for row in range(rows):
            texts = [" ".join(rng.choice(WORDS, rng.integers(2, 12))) for _ in range(captions)]
            size = sizes[row % len(sizes)]
            image = b"not a picture" if row in broken else picture([seed, row], size)
            out.write({"image": image, "caption": texts, "image_id": str(row), "split": "train"})
    return path


def trained_toy():
    """A trained model of the toy world: the released one, or the one that `make` trained."""
    for path in (ROOT / "models" / "toy.safetensors", ROOT / "runs" / "toy" / "last.pt"):
        if path.is_file():
            return path
    pytest.skip("no trained model: neither models/toy.safetensors nor runs/toy/last.pt "
                "(made by `make`)")


# -- tiny models -----------------------------------------------------------------------------------

TINY = flm.Config(image_size=24, patch_size=8, vit_width=32, vit_layers=2, vit_heads=2,
                  vocab_size=97, text_width=32,
                  text_layers=2, text_heads=4, max_positions=40, mask_id=96, width=32, heads=4,
                  fusion_layers=2,
                  reconstructor_text_layers=2, reconstructor_fusion_layers=2, dropout=0.0)


def tiny(seed=0, **changes):
    """A tiny model whose every parameter has a non-trivial value.

    So no term can be missing unseen.
    """
    torch.manual_seed(seed)
    model = flm.FLM(replace(TINY, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def caption(n, length, seed=0):
    ids = torch.full((1, length), 1)
    ids[0, :n] = torch.randint(4, 96, (n,), generator=torch.Generator().manual_seed(seed))
    ids[0, 0], ids[0, n - 1] = 0, 2
    return ids


TINY_VILT = vilt.Config(image_size=48, patch_size=16, vocab_size=300, max_positions=24, cls_id=0,
                        pad_id=1, sep_id=2, mask_id=4,
                        width=24, layers=2, heads=3, mlp_width=40, dropout=0.0, init_std=0.2,
                        max_patches=7)


def vilt_model(config, seed=0):
    torch.manual_seed(seed)
    model = vilt.ViLT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


# -- a small world, and models pretrained on nothing -----------------------------------------------

TOL = dict(atol=1e-5, rtol=0)
DOWNSTREAM = Path(__file__).parent / "fixtures" / "seed3_downstream.pt"
ANSWERS = ["yes", "no", "red", "blue", "2", "dog"]
SIZES = ((40, 32), (24, 48), (30, 30))


def write_questions(path, rows, seed, broken=()):
    """A VQA file: up to three questions to a picture -> {question id: labels}.

    Some questions have no answer in the list.
    """
    rng, labels_of = np.random.default_rng(seed), {}
    with Writer(path, VQA, batch_rows=3) as out:
        for row in range(rows):
            count = 1 + row % 3
            labels = [rng.choice(len(ANSWERS), rng.integers(0, 4), replace=False).tolist()
                      for _ in range(count)]
            scores = [rng.choice([0.3, 0.6, 0.9, 1.0], len(some)).tolist() for some in labels]
            ids = [1000 * seed + 10 * row + k for k in range(count)]
            size = SIZES[row % len(SIZES)]
            image = b"no picture" if row in broken else picture([seed, row], size)
            out.write({"image": image,
                       "questions": [" ".join(rng.choice(WORDS, rng.integers(1, 9))) + "?"
                                     for _ in ids],
                       "answers": [[ANSWERS[k] for k in some] for some in labels],
                       "answer_labels": labels,
                       "answer_scores": scores, "image_id": row, "question_id": ids,
                       "split": "train"})
            labels_of |= dict(zip(ids, labels))
    return labels_of


def write_statements(path, rows, seed, broken=()):
    """An NLVR2 file, every second sentence about two pairs of pictures -> {identifier: label}."""
    rng, truth = np.random.default_rng(seed), {}
    with Writer(path, NLVR2, batch_rows=4) as out:
        for row in range(rows):
            identifier, answer = f"dev-{row // 2}-{row % 2}-0", str(bool(rng.integers(2)))
            images = [picture([seed, row, k], SIZES[(row + k) % len(SIZES)]) for k in range(2)]
            if row in broken:
                images[1] = b"no picture"
            out.write({"image_0": images[0], "image_1": images[1], "answers": [answer],
                       "identifier": identifier.removesuffix("-0"), "identifiers": [identifier],
                       "questions": [" ".join(rng.choice(WORDS, rng.integers(2, 9)))]})
            truth[identifier] = answer
    return truth


def write_world(root):
    """Captions, questions and statements (dataset "mine"), a tokenizer, and checkpoints.

    There is a checkpoint of each kind of pretrained model.
    """
    write_captions(root / "mine_caption_train.arrow", 12, sizes=SIZES)
    write_captions(root / "mine_caption_val.arrow", 5, seed=1, sizes=SIZES)
    write_captions(root / "mine_caption_test.arrow", 7, seed=2, broken=(4,), batch_rows=3,
                   sizes=SIZES)
    write_questions(root / "mine_vqa_train.arrow", 9, 1)
    asked = write_questions(root / "mine_vqa_val.arrow", 11, 2, broken=(3, 7))
    (root / "mine_vqa_answers.json").write_text(json.dumps(ANSWERS))
    people = lambda labels: [{"answer": ANSWERS[labels[k % len(labels)]] if labels else "kite"}
                             for k in range(10)]
    (root / "mine_vqa_annotations_val.json").write_text(json.dumps({"annotations": [
        {"question_id": q, "answers": people(labels), "answer_type": ("other", "yes/no")[q % 2]}
        for q, labels in asked.items()]}))
    write_statements(root / "mine_nlvr2_train.arrow", 12, 3)
    stated = write_statements(root / "mine_nlvr2_dev.arrow", 10, 4, broken=(6,))
    (root / "nlvr2_balanced_dev.json").write_text(json.dumps(list(stated)[:6]))
    tok = BPE.train([" ".join(WORDS)] * 3, 300)
    tok.save(root / "tok")
    special = dict(vocab_size=len(tok), cls_id=tok.cls_id, pad_id=tok.pad_id, sep_id=tok.sep_id,
                   mask_id=tok.mask_id)
    models = {name: tiny(objective=name, itm=True, **special) for name in ("flm", "mlm", "ar")}
    models["vilt"] = vilt_model(replace(TINY_VILT, **special, mpp=True))
    for name, model in models.items():
        weights.save(root / f"{name}.pt", model.state_dict(), model.config, "pretrain",
                     weights.pack_tokenizer(tok))
    return root


def finetune(world, task, kind, out, *more):
    """One step of a task from a pretrained model -> the checkpoint."""
    train.main(["--task", task, "--load", str(world / f"{kind}.pt"), "--data", str(world), "--out",
                str(out), *map(str, (
"--device", "cpu", "--workers", 0, "--steps", 1, "--global-batch", 4, "--lr", 1e-3, "--eval-every",
                                     0,
"--max-unreadable", 1, *more))])
    return out / "last.pt"


def task_on(world, name, kind="flm", **settings):
    """A task as the loop would make it for a pretrained model -> task"""
    source = weights.load(world / f"{kind}.pt")
    settings = Settings(task=name, data=str(world), **{"max_tokens": 24, "pad_to": 1} | settings)
    task_class = tasks.task_of(name, source.config)
    tok = task_class.add_special_tokens(source.tokenizer)
    config = task_class.adapt(replace(source.config, vocab_size=len(tok)), settings)
    return task_class(settings, config, tok)


def original(name, folder):
    """A recorded task's Lightning file, opened -> (model, inputs, outputs)."""
    recorded = torch.load(DOWNSTREAM, weights_only=True)["tasks"][name]
    torch.save({"state_dict": recorded["state_dict"],
                "hyper_parameters": {"config": recorded["config"]}}, folder / "x.ckpt")
    return weights.load(folder / "x.ckpt", vit_heads=2), recorded["inputs"], recorded["outputs"]


def write_page_models(root):
    """Untrained models of all tasks, for the demo page -> their paths.

    They know the toy world's words.
    """
    captions = [text for index in range(60)
                for text in toy.picture_rows(0, 32, "train", index)[0]["caption"]]
    tok, paths = BPE.train(captions, 330), []
    for task, changes in (("pretrain", {}), ("vqa", {"head": "vqa", "answers": len(ANSWERS)}),
                          ("nlvr2", {"head": "nlvr2"}),
                          ("retrieval", {"head": "retrieval"}),
                          ("caption", {"objective": "ar", "pooler": False})):
        if task == "caption":
            tasks.Caption.add_special_tokens(tok)
        model = tiny(vocab_size=len(tok), cls_id=tok.cls_id, pad_id=tok.pad_id, sep_id=tok.sep_id,
                     mask_id=tok.mask_id,
                     max_positions=90, **changes)
        paths.append(root / f"{task}.pt")
        answers = {"answers": ANSWERS} if task == "vqa" else {}
        weights.save(paths[-1], model.state_dict(), model.config, task, weights.pack_tokenizer(tok),
                     **answers)
    return paths


# -- runs of train.py ------------------------------------------------------------------------------

TRAIN_FLM = ("--image-size 16 --patch-size 8 --vit-width 16 --vit-layers 1 --vit-heads 2 "
             "--text-width 16 --text-layers 1 --text-heads 2 --width 16 --heads 2 "
             "--fusion-layers 2 --reconstructor-text-layers 1 --max-positions 66 "
             "--reconstructor-fusion-layers 2 --model toy --no-silent-attention "
             "--precision fp32 --device cpu --workers 0").split()
TRAIN_VILT = ("--model vilt-toy --image-size 16 --patch-size 8 --width 16 --layers 2 --heads 2 "
              "--mlp-width 40 --max-positions 40 --max-patches 5 --mpp "
              "--precision fp32 --device cpu --workers 0").split()


def write_caption_world(root):
    """A folder of caption files and a tokenizer."""
    write_captions(root / "mine_caption_train.arrow", 60, sizes=((40, 32), (24, 48), (30, 30)))
    write_captions(root / "mine_caption_val.arrow", 13, seed=1)
    BPE.train([" ".join(WORDS)] * 3, 330).save(root / "tok")
    return root


def train_command(world, out, *more, sizes=TRAIN_FLM):
    return [*sizes, "--data", str(world), "--tokenizer", str(world / "tok"), "--out", str(out),
            *map(str, more)]


TRAIN = ("--global-batch 16 --steps 6 --lr 1e-2 --warmup 0.2 --log-every 1 --eval-every 3 "
         "--save-every 2 --clip 1.0").split()


def train_outcome(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    losses = [{k: v for k, v in line.items()
               if k.endswith(("loss", "accuracy", "step", "norm", "lr"))} for line in lines]
    return losses, weights.read(Path(out) / "last.pt")["model"]


def assert_same(a, b, tolerance):
    (losses_a, model_a), (losses_b, model_b) = a, b
    assert len(losses_a) == len(losses_b) and model_a.keys() == model_b.keys()
    for x, y in zip(losses_a, losses_b):
        assert x == pytest.approx(y, abs=tolerance)
    for name, ours in model_a.items():
        theirs = model_b[name]
        # a softmax ignores the keys' bias: its gradient is pure rounding
        if name.endswith("kv.bias") and tolerance:
            ours, theirs = ours.chunk(2)[1], theirs.chunk(2)[1]
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0, msg=name)


def torchrun(processes, arguments):
    """Runs train.py to its end as the README does; `together` takes a quarter of the time."""
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node", str(processes), str(ROOT / "train.py"), *arguments],
                         env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, timeout=240)
    assert run.returncode == 0, run.stdout


@functools.cache
def launcher():
    """The process that starts processes (together.py), one for each of pytest's own."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen([sys.executable, str(ROOT / "tests/together.py")], cwd=ROOT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def together(processes, arguments, script="train", seconds=500):
    """Runs a script on several processes, as mpirun starts them, to its end -> what was printed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        job = {"processes": processes, "port": free_port(), "log": str(log),
               "script": script, "arguments": list(map(str, arguments))}
        process = launcher()
        late = threading.Timer(seconds, process.kill)
        late.start()
        try:
            print(json.dumps(job), file=process.stdin, flush=True)
            code = process.stdout.readline()
        finally:
            late.cancel()
        printed = log.read_text() if log.exists() else ""
    if not code:
        launcher.cache_clear()
    assert code == "0\n", printed
    return printed


# -- raw downloads for prepare.py ------------------------------------------------------------------

def noise_picture(seed=0, size=(40, 30), mode="RGB", format="JPEG", **options):
    """Bytes of a picture of coloured noise, different for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.NEAREST).convert(mode)
    image.save(out := io.BytesIO(), format, **options)
    return out.getvalue()


def put(path, data):
    """Writes bytes, text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data if isinstance(data, (bytes, str)) else json.dumps(data)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def jsonl(path, *lines):
    put(path, "".join(json.dumps(line) + "\n" for line in lines))


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def prepare_main(*arguments):
    prepare.main([str(argument) for argument in arguments])


def rows(path, schema=CAPTIONS):
    """The rows of a finished file, which must have exactly this schema."""
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    assert table.schema.equals(schema)
    return table.to_pylist()


def texts(path):
    return {row["image_id"]: row["caption"] for row in rows(path)}


def skipped(path):
    return {entry["key"]: entry["reason"]
            for entry in map(json.loads, path.read_text().splitlines())}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def sentence(capsys, *arguments):
    """Runs a command that must be refused, and returns its one sentence."""
    with pytest.raises(SystemExit) as stop:
        prepare_main(*arguments)
    message = str(stop.value.code)
    assert message.startswith("prepare.py: ") and "\n" not in message, message
    return message


def checked(capsys, *arguments):
    """(exit status, what was printed)"""
    try:
        prepare_main("check", *arguments)
        status = 0
    except SystemExit as stop:
        status = 1 if isinstance(stop.code, str) else stop.code
    return status, capsys.readouterr().out


def arrow(path, columns):
    table = pa.table(columns)
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)
