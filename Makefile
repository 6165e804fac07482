# The book and its library. "make book" and "make test" set everything up by themselves;
# all they need is Python 3.11-3.13 and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
CACHE := _build/.jupyter_cache
NB ?= book
PAGES := $(filter-out %/_template.ipynb,$(wildcard book/*.ipynb))

# Chapters are committed without outputs, ids kept.
STRIP := $(BIN)/nbstripout --keep-id --extra-keys "metadata.language_info metadata.widgets"

# What a chapter's outputs depend on besides its own code cells. The cache knows only the
# cells, so a change in any of these empties it.
SOURCES := $(sort $(wildcard ssdlib/*.py ssdlib/*/*.py ssdlib/tiny/* tests/golden/*) requirements.txt \
  $(wildcard book/results/*.* book/results/*/*))

.NOTPARALLEL:
.PHONY: help book serve lab site pdf test lint pytest notebooks extras format bench \
  elsewhere rehearse newest oldest readme repository lock clean FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

book: $(READY) _build/sources ## run the chapters that changed and build the book
	@test -d $(CACHE) || { echo "The first time, every chapter runs: 10 to 15 minutes ..."; \
	  $(MAKE) --no-print-directory notebooks NB="$(PAGES)"; }
	$(BIN)/jupyter-book build . -W --keep-going -n
	@echo "Open _build/html/index.html, or run: make serve"

serve: ## serve the built book on http://127.0.0.1:8000
	@test -d _build/html || { echo "No book yet. Run: make book"; exit 1; }
	$(PYTHON) -m http.server 8000 --bind 127.0.0.1 --directory _build/html

lab: $(READY) ## open the chapters in JupyterLab, to change and run them
	$(BIN)/python -m pip install --quiet -c requirements.txt jupyterlab
	$(BIN)/jupyter lab book

site: $(READY) ## test the built book in Chromium (after make extras, make book)
	@test -d _build/html || { echo "No book yet. Run: make book"; exit 1; }
	$(BIN)/pytest tests/site -n 2 --dist loadgroup -rs -p no:cacheprovider --durations=5

pdf: $(READY) ## print the built book to _build/book.pdf (after make extras, make book)
	@test -d _build/html || { echo "No book yet. Run: make book"; exit 1; }
	$(BIN)/python tools/print_book.py

test: lint pytest notebooks ## lint, then the tests, then every chapter

lint: $(READY) ## check style, formatting and that chapters hold no outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(STRIP) --verify book/*.ipynb || { echo "Run: make format"; exit 1; }

pytest: $(READY) ## the tests in tests/
	$(BIN)/pytest -n 2 --dist loadfile --durations=10

# The book reads what these runs leave in the cache, so nothing is run twice. Warnings are
# errors in tests/ only: here they would come from Jupyter's own parts. A chapter that reads
# the clock before its exercises has the machine to itself, unless TIMED is set to nothing;
# of the others, two run at a time.
CHAPTER_FILES = $(filter %.ipynb,$(NB) $(wildcard $(NB:%=%/*.ipynb)))
TIMED ?= $(shell awk '/\#\# Exercises/ { nextfile } \
  /perf_counter|bench\.bench/ { print FILENAME; nextfile }' $(CHAPTER_FILES) /dev/null)
UNTIMED = $(filter-out $(TIMED),$(CHAPTER_FILES))
RUN_CHAPTERS := $(BIN)/pytest --nbmake --nbmake-timeout=300 --nb-cache $(CACHE) \
  -p no:cacheprovider -W default -v --durations=0
notebooks: $(READY) _build/sources ## run every chapter, or one: NB=book/02_duality.ipynb
	$(if $(UNTIMED),$(RUN_CHAPTERS) -n 2 --dist worksteal $(UNTIMED))
	$(if $(TIMED),$(RUN_CHAPTERS) $(TIMED))

extras: $(READY) ## add torch, transformers and the compilers for TPU and NVIDIA
	$(BIN)/python -m pip install --quiet --no-compile -c requirements.txt \
	  -r requirements-extras.txt

format: $(READY) ## format code and chapters, drop the chapters' outputs
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(STRIP) book/*.ipynb

# benchmarks/compare.py says what else there is: all of it takes much longer.
BENCH ?= --what peers,limits --peers mamba2-jax,transformers,llama.cpp --dtype float32 \
  --repeats 3
bench: $(READY) ## time ssdlib beside what is installed: BENCH="--peers transformers"
	$(BIN)/python benchmarks/compare.py --out _build/compare $(BENCH)

# IMAGE=cpu or gpu: the other lists in tools/colab. CHAPTERS=book/*.ipynb: all, in an hour.
IMAGE ?= tpu
CHAPTERS ?= book/intro.ipynb book/01_recurrence.ipynb book/09_roofline.ipynb
elsewhere: $(READY) ## run three chapters with the versions of Colab's TPU image
	$(BIN)/python tools/imitate_colab.py --image $(IMAGE) $(CHAPTERS)

HOW ?= --tpu
rehearse: $(READY) ## run chapters on a CPU as on a TPU: NB=book/06_generation.ipynb
	$(BIN)/python tools/rehearse.py $(HOW) $(filter %.ipynb,$(NB))

newest: $(READY) ## replace jax and what depends on it by the newest, ahead of the pins
	$(BIN)/python -m pip install --quiet --upgrade jax jaxlib jaxtyping optax
	$(BIN)/python -c "import jax; print('jax', jax.__version__)"

CORE = forms quadratic misuse model generate speculate int8 checkpoints weights \
  recurrences sharding arguments evaluate mistakes
oldest: $(READY) ## replace jax by the oldest version allowed, and test what computes
	$(BIN)/python -m pip install --quiet $$(sed -n 's/.*"jax>=\([0-9.]*\)".*/jax==\1 jaxlib==\1/p' pyproject.toml)
	$(BIN)/python -c "import jax; print('jax', jax.__version__)"
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(CORE:%=tests/test_%.py)

readme: $(READY) ## rewrite README.md's table and figure from the records
	$(BIN)/python tools/readme.py

repository: ## tell the book its address: URL=https://github.com/OWNER/NAME (or none)
	@$(PYTHON) tools/repository.py "$(URL)"

lock: ## rewrite requirements.txt from pyproject.toml (all newest: delete it first)
	$(PYTHON) -m venv _build/uv
	_build/uv/bin/pip install -q uv
	_build/uv/bin/uv pip compile --quiet --universal --python-version 3.11 \
	  --fork-strategy fewest --extra book --extra test --extra train \
	  --no-config --no-emit-index-url --annotation-style line \
	  --custom-compile-command "make lock" --output-file requirements.txt pyproject.toml

clean: ## remove everything that make has made
	rm -rf .venv _build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# The chapters' results in CI are those of the CPU; set JAX_PLATFORMS to run elsewhere.
book site test pytest notebooks: export JAX_PLATFORMS ?= cpu

# Python compiles a module when it is first imported: of torch and its like most never are.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("This needs Python 3.11, 3.12 or 3.13; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12 ..." % v)'
	@echo "Setting up .venv (once, a minute or two) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@mkdir -p .venv/etc/ipython # else each kernel warns that it talks over plain TCP
	@echo 'c.IPKernelApp.log_level = "ERROR"' > .venv/etc/ipython/ipython_kernel_config.py
	@touch $@

_build/sources: FORCE
	@new=$$(echo "JAX_PLATFORMS=$$JAX_PLATFORMS"; cksum $(SOURCES)); \
	if [ "$$new" != "$$(cat $@ 2>/dev/null)" ]; then \
	  rm -rf _build; mkdir _build; echo "$$new" > $@; fi
