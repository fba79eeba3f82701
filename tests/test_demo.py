"""The demo: its world can be read, what is not memory was not in training, and its claim shows in a shortened run."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import read_jsonl

from data import Encoder, Tokenizer
from evaluate import read_choice, read_numeric, read_safety

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))

import study  # noqa: E402
from world import MEMORY, write_world  # noqa: E402

import demo  # noqa: E402

READERS = {"choices": read_choice, "question": read_numeric, "harmful": read_safety}


@pytest.mark.parametrize("seed", [0, 7])
def test_every_task_of_the_demo_is_read_and_only_memory_was_in_training(seed, folder, tmp_path):
    write_world(tmp_path, seed, chats=20000, pairs=400, tests=60)
    args, encoder = SimpleNamespace(chat="llama2", shots=[]), Encoder(Tokenizer(folder))
    trained = {row["prompt"] for row in read_jsonl(tmp_path / "chats.jsonl")}
    tasks = sorted((tmp_path / "tasks").glob("*.jsonl"))
    assert len(tasks) == 9
    for file in tasks:
        rows = read_jsonl(file)
        if file.stem == "translation":
            known = {row["source"] for row in read_jsonl(tmp_path / "pairs.jsonl")}
            assert len(rows) == 60 and not known & {row["source"] for row in rows}
            continue
        for row in rows:
            (read,) = (reader for field, reader in READERS.items() if field in row)
            assert read(row, str(file), args, encoder)["ids"]
        if file.stem not in MEMORY:
            assert not trained & {row.get("prompt") or row["question"] for row in rows}, file.stem


def test_a_shortened_demo_shows_forgetting_and_that_radis_forgets_less(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the study works in its folder
    monkeypatch.setattr(demo, "SIZES", dict(chats=3000, pairs=1000, tests=40))
    monkeypatch.setattr(demo, "BASE_STEPS", 420)
    monkeypatch.setattr(demo, "EXPORTS", (90,))
    study.run(SimpleNamespace(out=tmp_path, seeds=[0], rates=["1e-3"], arms=["vanilla", "radis"]))
    curves = {}
    for row in study.lines(tmp_path / "results.jsonl"):
        curves.setdefault(row["arm"], []).append(row["measures"])
    ends = {"base": curves["vanilla"][0], "vanilla": curves["vanilla"][-1], "radis": curves["radis"][-1]}
    skill = {name: end["bleu/translation"] for name, end in ends.items()}
    kept = {name: study.ability(end, True) + study.ability(end, False) for name, end in ends.items()}  # of 200
    assert min(skill["vanilla"], skill["radis"]) > skill["base"] + 1, skill
    assert kept["base"] > 120 and kept["vanilla"] < kept["base"] - 15 and kept["radis"] > kept["vanilla"] + 6, kept
