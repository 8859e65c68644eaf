# make demo: from nothing to a circuit in the browser.  make test: the whole suite.
# make bridge: a dense model, steered by what a circuit of a sparse one says.
# make figures: the paper's figures on small models, docs/figures.md; make figures ONLY=fig2,fig10.
# make bench: every ratio of speeds in docs/speed.md.
# All make .venv first. Each target is redone only when something that it is made from is missing:
# data that were prepared anew do not make a finished run train on.
PYTHON ?= python3
PY := .venv/bin/python
DATA := data/tinypython
OUT := out/demo
DENSE := out/demo_dense
BRIDGE := out/demo_bridge
TASK := single_double_quote
STEERED := single_double_quote while_return_true
# at 0.15 this circuit can leave out what marks a return
TARGET_while_return_true := 0.05

.PHONY: demo bridge bench figures test half-1 half-2 clean
.PRECIOUS: $(BRIDGE)/%/circuit.json

demo: $(OUT)/$(TASK)/circuit.json
	@echo "== 4/4 measure how far to trust it (beside nonsense, a quarter of an hour: $(PY) validate.py --circuit=$< --level=nonsense --control_seeds=1), write it down, draw it"
	@$(PY) validate.py --circuit=$< --controls=false
	@$(PY) -m tools.program $<
	@$(PY) view.py $<
	@echo "Open the page above in a browser: the circuit, and beside it the same as a program, which runs by itself."

bench: $(DATA)/meta.json
	$(PY) -m tools.bench --config=configs/demo.toml

figures: $(DATA)/meta.json | .venv/matplotlib
	$(PY) -m tools.figures $(ONLY:%=--only=%)

# Two processes of one thread, which take the files of tests in turn; their dots mix.
test: .venv/ready
	@share=$$(mktemp -d) && trap 'rm -r $$share' EXIT && \
	$(MAKE) --no-print-directory -k -j2 SHARE=$$share half-1 half-2

half-1 half-2:
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -o console_output_style=classic --share=$(SHARE) tests

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
$(OUT)/finished: | $(DATA)/meta.json
	@echo "== 2/4 train configs/demo.toml (5 to 10 minutes on 2 cores; Ctrl-C saves, make demo goes on)"
	$(PY) train.py --config=configs/demo.toml --out_dir=$(OUT) --resume=true
	@touch $@

$(OUT)/$(TASK)/circuit.json: $(OUT)/finished
	@echo "== 3/4 prune to the circuit of $(TASK) (two to nine minutes on 2 cores; three starts at once, which are then joined)"
	$(PY) prune.py --config=configs/demo_prune.toml --model=$(OUT) --task=$(TASK)

bridge: $(STEERED:%=$(BRIDGE)/steer/%/steer.json)
	@ls $(BRIDGE)/steer/*/steer.*

$(DENSE)/finished: | $(DATA)/meta.json
	@echo "== 2/5 train configs/demo_dense.toml (about 3 minutes on 2 cores; Ctrl-C saves, make bridge goes on)"
	$(PY) train.py --config=configs/demo_dense.toml --out_dir=$(DENSE) --resume=true
	@touch $@

$(BRIDGE)/finished: $(DENSE)/finished
	@echo "== 3/5 train configs/demo_bridge.toml, a sparse model bridged to it (about 18 minutes on 2 cores; Ctrl-C saves)"
	$(PY) bridge.py --config=configs/demo_bridge.toml --out_dir=$(BRIDGE) --dense=$(DENSE) --resume=true
	@touch $@

$(BRIDGE)/%/circuit.json: $(BRIDGE)/finished
	@echo "== 4/5 prune the sparse model to the circuit of $* (half a minute)"
	$(PY) prune.py --model=$(BRIDGE) --task=$* $(TARGET_$*:%=--target_loss=%)

$(BRIDGE)/steer/%/steer.json: $(BRIDGE)/%/circuit.json | .venv/matplotlib
	@echo "== 5/5 steer the dense model by that circuit's nodes (a minute)"
	$(PY) steer.py --run=$(BRIDGE) --dense=$(DENSE) --task=$*

.venv/matplotlib: requirements-extra.txt .venv/ready
	-$(PY) -m pip install -q --disable-pip-version-check $(shell grep -o '^matplotlib[^ ]*' requirements-extra.txt) && touch $@

clean:
	rm -rf out .venv $(DATA)/*.bin $(DATA)/meta.json $(DATA)/bigrams.npy $(DATA)/.unfinished
