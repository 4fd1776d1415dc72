# The commands of the README. Every target sets up what it needs in .venv; `make help` lists them.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
DATA   ?= data/toy
RUN    ?= runs/toy
RECIPE ?= toy
FLAGS  ?=
# more flags for train.py, for example: make RUN=runs/long FLAGS='--steps 7200'
LOAD   ?=
# what the tasks are fine-tuned from; by default RUN after some steps with image-text matching, both made if they are not there
TUNED  ?= $(if $(TOY),$(RUN)-,runs/$(RECIPE)-)
PROCESSES ?= 1
# where: TUNED followed by the task's name; on so many processes of this machine

.DEFAULT_GOAL := all
RUNNER  = $(PY) $(if $(filter-out 1,$(PROCESSES)),-m torch.distributed.run --nproc_per_node $(PROCESSES))
TASKS  := vqa nlvr2 caption retrieval
TOY    := $(filter toy vilt-toy,$(RECIPE))
SPLITS ?= $(if $(TOY),holdout test,$(if $(filter vqa nlvr2,$@),val,test))
# of the data, that a tuned model is scored on

.PHONY: all $(TASKS) vilt help test quick pictures masks bench clean

all: $(RUN)/words.json pictures  ## set up, draw the toy world, pretrain FLM on it, show what it learned (a quarter of an hour)
	@echo "pictures: docs/masks.png, $(RUN)/curves.png, $(RUN)/words.png"

vqa:        ## fine-tune for visual question answering, score, show examples (minutes on the toy world)
nlvr2:      ## the same for statements about two pictures
caption:    ## the same for captioning
retrieval:  ## the same for finding images by text and texts by image

$(RUN)-itm/.trained: | $(RUN)/.trained
	$(PY) train.py --task pretrain --recipe toy-itm --load $(RUN)/last.pt --data $(DATA) --out $(RUN)-itm --resume
	@touch $@

# What each task starts from. Captions need no class vector, so no image-text matching; statements about two pictures are learned
# from a model that answers questions, not from one that has only been pretrained (docs/LOG.md).
FROM_caption := $(RUN)
FROM_nlvr2   := $(TUNED)vqa
FROM = $(or $(LOAD),$(or $(FROM_$@),$(RUN)-itm)/last.pt)

vqa retrieval: | $(if $(LOAD),$(VENV)/.installed,$(RUN)-itm/.trained)
caption:       | $(if $(LOAD),$(VENV)/.installed,$(RUN)/.trained)
nlvr2:         | $(if $(LOAD),$(VENV)/.installed,$(TUNED)vqa/.trained)
$(TASKS):      | $(if $(TOY),$(DATA)/toy_words.json)

$(TUNED)vqa/.trained:
	$(MAKE) vqa

# Retrieval on the toy: among 1,000 scenes by the longest caption of each; of the million pairs those that a cheap score finds likely
# (all of them would take about twenty minutes). Black pictures tell what the text alone gives away.
$(TASKS):
	$(RUNNER) train.py --task $@ --recipe $(RECIPE) --load $(FROM) --data $(DATA) --out $(TUNED)$@ --resume $(FLAGS)
	@touch $(TUNED)$@/.trained
	for split in $(SPLITS); do $(RUNNER) eval.py $@ $(TUNED)$@/last.pt --data $(DATA) --split $$split \
	    $(if $(TOY),$(if $(filter retrieval,$@),--captions 1 --top 64,--blank)) || exit 1; done
	$(PY) plot.py sheet $(TUNED)$@/$@/examples.json --out $(TUNED)$@/examples.png

vilt:  ## the same with ViLT, and which patches each word was carried to (in runs/vilt)
	$(MAKE) RUN=runs/vilt RECIPE=vilt-toy runs/vilt/align.png

$(RUN)/align.png: $(RUN)/words.json
	$(PY) plot.py curves $(RUN) --out $(RUN)/curves.png
	$(PY) plot.py words $(RUN)/words.json --out $(RUN)/words.png
	$(PY) eval.py align $(RUN)/last.pt --data $(DATA)
	$(PY) plot.py align $(RUN)/align.json --out $@

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */\1\t/' | expand -t 12

# The marker is written last: an interrupted installation is done again.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --editable '.[test]'
	@touch $@

$(DATA)/toy_words.json: | $(VENV)/.installed
	$(PY) toy.py --out $(DATA)

# last.pt is there long before the end; an interrupted run goes on from it.
$(RUN)/.trained: | $(DATA)/toy_words.json
	$(PY) train.py --task pretrain --recipe $(RECIPE) --data $(DATA) --out $(RUN) --resume $(FLAGS)
	@touch $@

$(RUN)/words.json: $(RUN)/.trained
	$(PY) eval.py words $(RUN)/last.pt --data $(DATA)

pictures: $(RUN)/words.json masks  ## the masks, and the loss curves and word table of RUN
	$(PY) plot.py curves $(RUN) --out $(RUN)/curves.png
	$(PY) plot.py words $(RUN)/words.json --out $(RUN)/words.png

masks: | $(VENV)/.installed  ## the picture of the objectives' masks alone
	$(PY) plot.py masks --out docs/masks.png

test: $(VENV)/.installed  ## set up, run all the tests
	$(PY) -m pytest

quick: $(VENV)/.installed  ## the part of the tests that takes under a minute
	$(PY) -m pytest -m "not slow"

bench: $(VENV)/.installed  ## how fast each part is, side by side
	$(PY) bench.py step
	$(PY) bench.py parts
	$(PY) bench.py loader
	$(PY) bench.py vilt
	$(PY) bench.py retrieval
	$(PY) bench.py captions
	$(PY) bench.py tune

clean:  ## remove the toy world and its run
	rm -rf $(DATA) $(RUN)
