# make demo and make test do all their set-up: a virtual environment in the checkout, made once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test test-all lint docs models bench bench-quick bench-more bench-scale gpu dist dist-check clean

$(READY): pyproject.toml constraints.txt $(wildcard examples/*/pyproject.toml)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[cpu,eval,nncf,train,test]'
	$(BIN)/pip install -q -c constraints.txt ./examples/plugin ./examples/terrain
	touch $@

demo: $(READY)
	$(BIN)/diffprune demo --overwrite

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Measuring coverage makes the tests half as slow again: here, and not in make test.
test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term --cov-fail-under=90

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests/test_static.py

# The pages of docs/ as a site: site/index.html.
docs: $(READY)
	$(BIN)/mkdocs build --strict

# The tables of the README and docs/figures.md; interrupted, it goes on where it was.
bench: $(READY)
	$(BIN)/pip install -q -c constraints.txt mlxtend
	$(BIN)/python benchmarks/bench.py readme

bench-quick: $(READY)
	$(BIN)/pip install -q -c constraints.txt mlxtend
	$(BIN)/python benchmarks/bench.py readme --quick

# The models that the further tables need and the package does not hold: three hours or more; needs npm.
models: $(READY)
	$(BIN)/python benchmarks/making/train_emoji.py
	$(BIN)/python benchmarks/making/train_classifier.py emoji
	$(BIN)/python benchmarks/making/train_captions.py
	$(BIN)/python benchmarks/making/train_transformer.py dit
	$(BIN)/python benchmarks/making/train_transformer.py sd3

# The further tables of docs/figures.md; interrupted, it goes on where it was.
bench-more: $(READY) models
	$(BIN)/pip install -q -c constraints.txt mlxtend
	$(BIN)/pip install -q --no-deps onnxsim==0.8.1 adaptive-terrain-diffusion==0.4.2
	$(BIN)/python benchmarks/bench.py more

# Real sizes, random weights: Stable Diffusion and others.
bench-scale: $(READY)
	$(BIN)/python benchmarks/bench.py sizes

# On an NVIDIA GPU: the tests that need one, then proofs and latency in at most 8 minutes; without one: exit code 3.
gpu: .venv-gpu/ready
	-.venv-gpu/bin/python -m pytest -q -n 2 -m gpu tests/test_gpu.py
	.venv-gpu/bin/python benchmarks/bench.py gpu

# What was tried together was tried on CPUs: torch and ONNX Runtime are free here.
.venv-gpu/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu
	grep -vE '^(torch|onnxruntime)==' constraints.txt > .venv-gpu/constraints.txt
	.venv-gpu/bin/pip install -q -c .venv-gpu/constraints.txt -e '.[gpu,eval,nncf,train,test]'
	touch $@

# What a release uploads, checked as the index does.
dist: $(READY)
	rm -rf dist
	$(BIN)/pip install -q build twine
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# The wheel alone, in a fresh environment for each extra, prunes the embedded model: minutes and gigabytes each.
EXTRAS := none cpu eval nncf train text
dist-check: dist
	for extra in $(EXTRAS); do $(PYTHON) tests/fresh_install.py dist/*.whl $$extra || exit 1; done

clean:
	rm -rf .venv build dist site diffprune-demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage*
