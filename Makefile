# make test: its own environment, then the tests. make demo: the claim on a tiny model, in five minutes.
PYTHON ?= python3
ACTIVE = .venv/bin/python

.PHONY: test demo clean

test: .venv/installed
	$(ACTIVE) -m pytest -q -n 2 --dist loadfile tests

demo: .venv/demo
	rm -rf demo/run
	$(ACTIVE) demo/demo.py --out demo/run

.venv/installed: requirements.txt demo/requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	$(ACTIVE) -m pip install -q -r tests/requirements.txt
	touch $@

.venv/demo: requirements.txt demo/requirements.txt
	test -x $(ACTIVE) || $(PYTHON) -m venv .venv
	$(ACTIVE) -m pip install -q -r demo/requirements.txt
	touch $@

clean:
	rm -rf .venv demo/run
