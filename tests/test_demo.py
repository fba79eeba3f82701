"""The demo's world: every test can be read, and what is not memory was not in training."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import read_jsonl

from data import Encoder, Tokenizer
from evaluate import read_choice, read_numeric, read_safety

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))

from world import MEMORY, write_world  # noqa: E402

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
