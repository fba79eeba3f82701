"""The whole way of RaDis with the five scripts on a tiny model, from random weights to the comparison: `make demo`.

It shows the commands and the files, not the claim: a model this small, trained for seconds, has no abilities to lose.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import LINES, PAIRS, write_config, write_jsonl, write_tokenizer

ROOT = Path(__file__).parent.parent


def as_a_user(command: list[str], folder: Path) -> str:
    """Runs a script in a process of its own -> what it printed."""
    arguments = [sys.executable, ROOT / command[0], *command[1:]]
    return subprocess.run(arguments, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def walk(folder: Path, run=as_a_user) -> str:
    """Takes every stage in `folder` -> what the comparison printed. CalledProcessError if a stage fails."""
    write_tokenizer(folder)
    write_config(folder)
    chats = [dict(prompt=f"Say: {line}", response=f"{line}\nI have said what I was told to say.") for line in LINES]
    chats += [
        dict(prompt=f"Translate: {p['source']}", response=f"{p['reference']}\nThis is what it means.") for p in PAIRS
    ]
    write_jsonl(folder / "chats.jsonl", chats)
    write_jsonl(folder / "prompts.jsonl", [dict(prompt=chat["prompt"]) for chat in chats[::2]])
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    start = "--epochs 40 --batch-size 8 --learning-rate 3e-3"
    tune = "--data rationales.jsonl --batch-size 7 --epochs 6 --learning-rate 1e-3"
    test = "--translation pairs.jsonl --drift answers.jsonl --max-new-tokens 32"
    for command in [
        "data.py --model . --data pairs.jsonl",
        f"train.py --config config.json --tokenizer . --data chats.jsonl --out base {start}",
        "generate.py --model base --data pairs.jsonl --out rationales.jsonl --cue \\n --max-new-tokens 24",
        "generate.py --model base --data prompts.jsonl --out answers.jsonl --task answer --max-new-tokens 24",
        f"train.py --model base {tune} --out vanilla --rationale-weight 0",
        f"train.py --model base {tune} --out radis",
        *(f"evaluate.py --model {arm} --out results/{arm} {test}" for arm in ("base", "vanilla", "radis")),
        "evaluate.py --compare results/base results/vanilla results/radis",
    ]:
        print(f"\n$ python {command}", flush=True)
        printed = run(command.split(" "), folder)
        lines = printed.splitlines()
        print("\n".join(lines if len(lines) < 25 else [*lines[:4], "...", *lines[-4:]]), flush=True)
    return printed


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp())
    walk(place)
    shutil.rmtree(place)
