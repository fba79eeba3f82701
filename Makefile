# make test: its own environment, then the tests. make demo: the five scripts on a tiny model, start to end.
PYTHON ?= python3
ACTIVE = .venv/bin/python

.PHONY: test demo clean

test: .venv/installed
	$(ACTIVE) -m pytest -q tests

demo: .venv/installed
	$(ACTIVE) tests/walk.py

.venv/installed: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	$(ACTIVE) -m pip install -q -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv
