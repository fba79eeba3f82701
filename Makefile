# make test: its own environment, then the tests. make demo: the claim on a tiny model, in two minutes.
PYTHON ?= python3
ACTIVE = .venv/bin/python

.PHONY: test demo chaos clean

test: .venv/installed
	$(ACTIVE) -m pytest -q -n 2 --dist loadfile tests

demo: .venv/demo
	rm -rf experiments/run
	$(ACTIVE) experiments/demo.py --out experiments/run

chaos: .venv/installed
	$(ACTIVE) tests/chaos.py

.venv/installed: requirements.txt experiments/requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	$(ACTIVE) -m pip install -q -r tests/requirements.txt
	touch $@

.venv/demo: requirements.txt experiments/requirements.txt
	test -x $(ACTIVE) || $(PYTHON) -m venv .venv
	$(ACTIVE) -m pip install -q -r experiments/requirements.txt
	touch $@

clean:
	rm -rf .venv experiments/run
