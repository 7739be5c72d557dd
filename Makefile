# Two commands do all the set-up: `make demo` and `make test`. Both skip what is done.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := build/demo
EVAL   := --text demo --windows 16 --dtype bfloat16

.PHONY: demo test slow format clean
.DELETE_ON_ERROR:
.SECONDARY:

test: $(VENV)/installed
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy --no-error-summary
	$(BIN)/pytest -m "not slow" --numprocesses auto --dist loadfile

slow: $(VENV)/installed
	$(BIN)/pytest -m slow

demo: $(DEMO)/dense.json $(DEMO)/cospadi.json
	@$(BIN)/lexigram inspect $(DEMO)/cospadi
	@$(BIN)/lexigram report $^
	@for model in demo $(DEMO)/cospadi; do \
	  echo "$$model, asked for the capital of France:"; \
	  $(BIN)/lexigram generate $$model "What is the capital of France?" --chat --tokens 24 --dtype bfloat16; \
	done

$(DEMO)/dense.json: $(VENV)/installed
	$(BIN)/lexigram eval demo $(EVAL) --label dense --json $@

$(DEMO)/%.json: $(DEMO)/%/run.json
	$(BIN)/lexigram eval $(DEMO)/$* $(EVAL) --reference demo --label $* --json $@

$(DEMO)/%/run.json: $(VENV)/installed
	$(BIN)/lexigram compress demo --method $* --ratio 0.5 --calibration demo --sequences 32 --out $(DEMO)/$* --overwrite --resume

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

format: $(VENV)/installed
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

clean:
	rm -rf build $(VENV)
