# The commands of the README. Every target sets up what it needs in .venv; `make help` lists them.
#
#     make                                    pretrain on the toy world, and show what was learned
#     make vqa                                fine-tune that model, and score it; also the other tasks
#     make vqa RECIPE=flm-b32 DATA=DIR LOAD=pretrain_4m.ckpt FLAGS='--tokenizer DIR'
#                                             the same on real data with a published recipe
#     make RUN=runs/long FLAGS='--steps 12000'

PYTHON    ?= python3
PY        := .venv/bin/python
DATA      ?= data/toy
RUN       ?= runs/toy
RECIPE    ?= toy
LOAD      ?=
FLAGS     ?=
PROCESSES ?= 1
PINS      ?= constraints.txt

.DEFAULT_GOAL := all
.PHONY: all demo vqa nlvr2 caption retrieval models vilt pictures masks compare speedrun test quick faults lint notebook bench clean help

all: $(RUN)/words.json pictures  ## set up, draw the toy world, pretrain FLM on it, show what it learned
	@echo "pictures: docs/masks.png, $(RUN)/curves.png, $(RUN)/words.png"

# ---------------------------------------------------------------------------------------------------
# Set-up and the toy world. A marker is written last: what was interrupted is done again.

# PINS: the versions that the tests passed with. `make PINS=` takes the newest that are allowed.
.venv/.installed: pyproject.toml $(PINS)
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --editable '.[dev]' $(if $(PINS),--constraint $(PINS))
	@touch $@

$(DATA)/toy_words.json: | .venv/.installed
	$(PY) -m tools.toy make --out $(DATA)

# ---------------------------------------------------------------------------------------------------
# Pretraining. last.pt is there long before the end; an interrupted run goes on from it.

$(RUN)/.trained: | $(DATA)/toy_words.json
	$(PY) train.py --task pretrain --recipe toy --data $(DATA) --out $(RUN) --workers 1 --resume $(FLAGS)
	@touch $@

# Image-text matching trains the class vector, which VQA and retrieval read. Half of its wrong captions have one word exchanged.
$(RUN)-itm/.trained: | $(RUN)/.trained
	$(PY) train.py --task pretrain --recipe toy-itm --load $(RUN)/last.pt --data $(DATA) --out $(RUN)-itm \
	    --exchange $(DATA)/toy_exchange.json --resume
	@touch $@

$(RUN)/words.json: $(RUN)/.trained
	$(PY) -m tools.probe words $(RUN)/last.pt --data $(DATA)

pictures: $(RUN)/words.json masks  ## the masks, and the loss curves and word table of RUN
	$(PY) -m tools.plot curves $(RUN) --out $(RUN)/curves.png
	$(PY) -m tools.plot words $(RUN)/words.json --out $(RUN)/words.png

masks: | .venv/.installed  ## the picture of the objectives' masks alone
	$(PY) -m tools.plot masks --out docs/masks.png

runs/vilt/.trained: | $(DATA)/toy_words.json
	$(PY) train.py --task pretrain --recipe vilt-toy --data $(DATA) --out runs/vilt --resume $(FLAGS)
	@touch $@

vilt: runs/vilt/.trained  ## pretrain ViLT on the toy world; which patches is each word carried to? (in runs/vilt)
	$(PY) -m tools.probe words runs/vilt/last.pt --data $(DATA)
	$(PY) -m tools.probe align runs/vilt/last.pt --data $(DATA)
	$(PY) -m tools.toy pointed runs/vilt/align.json --data $(DATA)
	$(PY) -m tools.plot curves runs/vilt --out runs/vilt/curves.png
	$(PY) -m tools.plot words runs/vilt/words.json --out runs/vilt/words.png
	$(PY) -m tools.plot align runs/vilt/align.json --out runs/vilt/align.png

# ---------------------------------------------------------------------------------------------------
# A page to try models on: those of models/, or what the targets here trained; FLAGS='runs/mine/last.pt …' names others.

.venv/.demo: pyproject.toml $(PINS) | .venv/.installed
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --editable '.[demo]' $(if $(PINS),--constraint $(PINS))
	@touch $@

demo: .venv/.demo  ## a web page to try models on: fill in words, ask, describe, compare, search, see the masks
	$(PY) -m tools.demo $(FLAGS)

# ---------------------------------------------------------------------------------------------------
# Tasks. On the toy world they are scored on new scenes (test) and on colour-shape pairs that were
# never trained on (holdout), with the right images and with black ones.

ifeq ($(RECIPE),toy)

$(RUN)-vqa/.trained: | $(RUN)-itm/.trained
	$(PY) train.py --task vqa --recipe toy --load $(RUN)-itm/last.pt --data $(DATA) --out $(RUN)-vqa --resume $(FLAGS)
	@touch $@

vqa: $(RUN)-vqa/.trained  ## fine-tune for visual question answering, score it, show examples
	$(PY) eval.py vqa $(RUN)-vqa/last.pt --data $(DATA) --split holdout --blank
	$(PY) eval.py vqa $(RUN)-vqa/last.pt --data $(DATA) --split test --blank
	$(PY) -m tools.plot sheet $(RUN)-vqa/vqa/examples.json --out $(RUN)-vqa/examples.png

# Statements about two pictures are learned from a model that answers questions (docs/LOG.md).
$(RUN)-nlvr2/.trained: | $(RUN)-vqa/.trained
	$(PY) train.py --task nlvr2 --recipe toy --load $(RUN)-vqa/last.pt --data $(DATA) --out $(RUN)-nlvr2 --resume $(FLAGS)
	@touch $@

nlvr2: $(RUN)-nlvr2/.trained  ## the same for statements about two images
	$(PY) eval.py nlvr2 $(RUN)-nlvr2/last.pt --data $(DATA) --split holdout --blank
	$(PY) eval.py nlvr2 $(RUN)-nlvr2/last.pt --data $(DATA) --split test --blank
	$(PY) -m tools.plot sheet $(RUN)-nlvr2/nlvr2/examples.json --out $(RUN)-nlvr2/examples.png

# Captions need no class vector. How many are true of their scene is known on the toy world alone.
$(RUN)-caption/.trained: | $(RUN)/.trained
	$(PY) train.py --task caption --recipe toy --load $(RUN)/last.pt --data $(DATA) --out $(RUN)-caption --resume $(FLAGS)
	@touch $@

caption: $(RUN)-caption/.trained  ## the same for captioning
	$(PY) eval.py caption $(RUN)-caption/last.pt --data $(DATA) --split holdout --blank
	$(PY) eval.py caption $(RUN)-caption/last.pt --data $(DATA) --split test --blank
	for name in holdout holdout_black test test_black; do \
	    $(PY) -m tools.toy true $(RUN)-caption/caption/captions_$${name}_results.json --data $(DATA) || exit 1; done
	$(PY) -m tools.plot sheet $(RUN)-caption/caption/examples.json --out $(RUN)-caption/examples.png

$(RUN)-retrieval/.trained: | $(RUN)-itm/.trained
	$(PY) train.py --task retrieval --recipe toy --load $(RUN)-itm/last.pt --data $(DATA) --out $(RUN)-retrieval --resume $(FLAGS)
	@touch $@

retrieval: $(RUN)-retrieval/.trained  ## the same for finding images by text and texts by image
	$(PY) eval.py retrieval $(RUN)-retrieval/last.pt --data $(DATA) --split test --images 300 --captions 1
	$(PY) -m tools.plot sheet $(RUN)-retrieval/retrieval/examples.json --out $(RUN)-retrieval/examples.png

# Weights in half precision and a card of measured scores for each; every command knows them by name.
models: $(foreach run,$(RUN) $(RUN)-vqa $(RUN)-caption $(RUN)-retrieval runs/vilt,$(run)/.trained)  ## models/: train what is missing, write weights and cards
	$(PY) -m tools.cards make $(RUN) toy --data $(DATA)
	$(PY) -m tools.cards make $(RUN)-vqa toy-vqa --data $(DATA)
	$(PY) -m tools.cards make $(RUN)-caption toy-caption --data $(DATA)
	$(PY) -m tools.cards make $(RUN)-retrieval toy-retrieval --data $(DATA)
	$(PY) -m tools.cards make runs/vilt vilt-toy --data $(DATA)

else    # real data, a published recipe

vqa nlvr2 caption retrieval: | .venv/.installed
	$(PY) -m torch.distributed.run --standalone --nproc_per_node $(PROCESSES) train.py --task $@ --recipe $(RECIPE) \
	    --load $(LOAD) --data $(DATA) --out runs/$(RECIPE)-$@ --resume $(FLAGS)
	$(PY) -m torch.distributed.run --standalone --nproc_per_node $(PROCESSES) eval.py $@ runs/$(RECIPE)-$@/last.pt \
	    --data $(DATA)

endif

# ---------------------------------------------------------------------------------------------------
# How fast it learns, and the claim.

speedrun: | $(DATA)/toy_words.json  ## time until colours and shapes are both at 95 %, median of three seeds (docs/RECORDS.md)
	OMP_NUM_THREADS=1 $(PY) -m tools.speedrun --data $(DATA) --out runs/speedrun --flags '--steps 700 --decay 1 $(FLAGS)'

# What was interrupted goes on; FLAGS='--minutes 1 --seeds 1' is a rough picture.

compare: | $(if $(filter toy,$(RECIPE)),$(DATA)/toy_words.json,.venv/.installed)  ## quality against training time: FLM beside its rivals (an hour)
	$(PY) -m tools.compare --data $(DATA) --recipe $(RECIPE) --out runs/compare $(FLAGS)

# ---------------------------------------------------------------------------------------------------
# For those who change the code.

test: .venv/.installed  ## set up, run all the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8

quick: .venv/.installed  ## the tests that are not marked slow
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 -m "not slow"

faults: .venv/.installed  ## damage files, kill runs, and look what the commands do (10 minutes)
	$(PY) -m tools.faults $(FLAGS)

lint: .venv/.installed  ## what ruff says (pyproject.toml tells the rules)
	$(PY) -m ruff check

notebook: .venv/.installed  ## run docs/tour.ipynb from top to bottom, and keep what it shows (3 minutes)
	$(PY) -m pip install --quiet --editable '.[notebook]' $(if $(PINS),--constraint $(PINS))
	$(PY) -m tools.notebook docs/tour.ipynb

bench: .venv/.installed  ## how fast each part is, side by side
	for command in step parts loader vilt retrieval captions tune; do $(PY) -m tools.bench $$command || exit 1; done

clean:  ## remove the toy world and its run
	rm -rf $(DATA) $(RUN)

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */\1\t/' | expand -t 12
