# make demo: from nothing to a circuit in the browser.  make test: the whole suite.
# Both make .venv first. Each target is redone only when something that it is made from is missing.
PYTHON ?= python3
PY := .venv/bin/python
DATA := data/tinypython
OUT := out/demo
TASK := single_double_quote

.PHONY: demo test clean

demo: $(OUT)/$(TASK)/circuit.json
	@echo "== 4/4 measure how far to trust it (the two controls, minutes each: $(PY) validate.py --circuit=$<), draw it"
	@$(PY) validate.py --circuit=$< --controls=false
	@$(PY) view.py $<
	@echo "Open the page above in a browser."

test: .venv/ready
	$(PY) -m pytest -q tests

.venv/ready: requirements.txt
	@echo "== set-up: .venv and requirements.txt (a few minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11; use make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

$(DATA)/meta.json: | .venv/ready
	@echo "== 1/4 data: idioms and the standard library (under a minute)"
	$(PY) $(DATA)/prepare.py

# state.pt exists long before training is done: --resume goes on where it stopped, and `finished` marks the end
$(OUT)/finished: $(DATA)/meta.json
	@echo "== 2/4 train configs/demo.toml (about 8 minutes on 2 cores; Ctrl-C saves, make demo goes on)"
	$(PY) train.py --config=configs/demo.toml --out_dir=$(OUT) --resume=true
	@touch $@

$(OUT)/$(TASK)/circuit.json: $(OUT)/finished
	@echo "== 3/4 prune to the circuit of $(TASK) (about 3 minutes)"
	$(PY) prune.py --config=configs/demo_prune.toml --model=$(OUT) --task=$(TASK)

clean:
	rm -rf out .venv $(DATA)/*.bin $(DATA)/meta.json
