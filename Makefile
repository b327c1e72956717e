# `make demo` and `make test` set everything up themselves; any Python from 3.11 will do.
PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest
RUN := $(VENV)/bin/python
# uv takes seconds where pip takes minutes. constraints.txt holds the versions that everything was tested with.
INSTALL = $(VENV)/bin/uv pip install --quiet --python $(RUN) --constraint constraints.txt
SEEDS ?= 0 1 2
SEEDS_3D ?= 0 1
SEEDS_TEXT ?= 0
PROMPTS_3D ?= "a red mug" "a blue chair" "a green cone" "a yellow torus" "a purple letter L" "an orange cube"
# The networks here are tiny. One thread is enough for them, and two runs with two threads each on two cores crawl.
export OMP_NUM_THREADS ?= 1
# Tests start many processes, and each of them would compile again what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-long demo-3d demo-control demo-circles demo-text test test-slow test-lowest \
	lint docs package constraints clean

demo: $(VENV)/demo
	$(VENV)/bin/scorefield demo --out runs/demo

demo-long: $(VENV)/demo
	for seed in $(SEEDS); do $(VENV)/bin/scorefield demo --long --seed $$seed --out runs/demo-long/$$seed || exit 1; done

demo-text: $(VENV)/demo
	for seed in $(SEEDS_TEXT); do $(VENV)/bin/scorefield distill toyworld-1step --seed $$seed --out runs/demo-text/1step-$$seed || exit 1; done
	$(VENV)/bin/scorefield toyworld students --students $(SEEDS_TEXT:%=runs/demo-text/1step-%/student) --out runs/demo-text/figures

demo-3d: $(VENV)/nerf
	runs=; for seed in $(SEEDS_3D); do for prompt in $(PROMPTS_3D); do \
		out="runs/demo-3d/$$(echo $$prompt | tr ' ' '-')-$$seed"; runs="$$runs $$out"; \
		$(VENV)/bin/scorefield sds toyworld "$$prompt" --seed $$seed --out "$$out" || exit 1; \
	done; done; $(RUN) benchmarks/scenes_from_prompts.py --runs $$runs

# Figures in runs/demo-control/*/report.json, hints above truth above samples in samples.png beside it.
demo-control: $(VENV)/demo
	for seed in $(SEEDS); do $(VENV)/bin/scorefield control toyworld-canny --seed $$seed --out runs/demo-control/$$seed || exit 1; done

demo-circles: $(VENV)/demo
	$(RUN) train_scripts/train_circles.py --out runs/circles
	for seed in $(SEEDS); do $(VENV)/bin/scorefield control circles --seed $$seed --out runs/demo-circles/$$seed || exit 1; done

test: $(VENV)/dev
	$(RUN) -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(VENV)/dev
	$(RUN) -m pytest -m slow

# The oldest versions that setup.cfg allows, in an environment of their own.
test-lowest: $(LOWEST)/ready
	$(LOWEST)/bin/python -m pytest -m "not slow" -n 2 --dist loadfile

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site, in site/; it is built from docs/ and docstrings, without the network.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# The wheel and the source archive, in dist/.
package: $(VENV)/python-ready
	$(VENV)/bin/uv build --quiet

# The newest versions that setup.cfg allows; run `make test` before you commit them.
constraints: $(VENV)/python-ready
	$(VENV)/bin/uv pip compile --quiet --upgrade --all-extras --python-version 3.11 --no-annotate \
		--custom-compile-command "make constraints" pyproject.toml --output-file constraints.txt

clean:
	rm -rf $(VENV) $(LOWEST) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(VENV)/python-ready:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet uv
	touch $@

$(VENV)/demo: $(VENV)/python-ready setup.cfg constraints.txt
	$(INSTALL) -e ".[demo]"
	touch $@

$(VENV)/nerf: $(VENV)/python-ready setup.cfg constraints.txt
	$(INSTALL) -e ".[nerf]"
	touch $@

$(VENV)/docs: $(VENV)/python-ready setup.cfg constraints.txt
	$(INSTALL) -e ".[docs]"
	touch $@

$(VENV)/dev: $(VENV)/python-ready setup.cfg constraints.txt
	$(INSTALL) -e ".[demo,nerf,play,docs,dev]"
	touch $@

$(LOWEST)/ready: $(VENV)/python-ready setup.cfg
	$(VENV)/bin/uv venv --quiet --python $(RUN) $(LOWEST)
	$(VENV)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e ".[demo,nerf,dev]"
	touch $@
