"""Prompts for replay that the model writes itself: no data of anybody's is needed.

    python experiments/prompts.py --model DIR --out prompts.jsonl --count 2048

The model is asked for something that a person might ask it, about a topic, and what it says is
kept if it looks like a request. (Asking a chat model for its own data: Magpie, Xu et al. 2024.)
"""

import argparse
import itertools
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import arms  # noqa: E402
import world  # noqa: E402

import data  # noqa: E402
import generate  # noqa: E402

TOPICS = """cooking gardening music painting cities rivers mountains oceans weather history
    medicine health sleep sport chess football cycling swimming travel trains ships aeroplanes
    space stars physics chemistry biology insects birds dogs cats horses farming bread coffee
    clothes houses furniture money banks shops work meetings letters email books poems novels
    films theatre photography languages grammar spelling teaching children families friendship
    birthdays holidays politics law elections cities maps computers programming websites
    telephones robots electricity engines bridges tools glass paper colours numbers geometry
    probability time calendars clocks energy forests deserts islands volcanoes dinosaurs myths
    religion philosophy dreams memory fear humour""".split()
KINDS = [
    "a question about {} that a curious person might ask",
    "a question about {} that has a short answer",
    "a request for practical advice on {}",
    "a request to explain something about {} to a beginner",
    "a request to write something short about {}",
    "a request to compare two things to do with {}",
    "a request for a list of things to do with {}",
    "a problem about {} that can be solved step by step",
]
ASK = "Write {}. Give only the request itself, in one or two sentences."
LETTERS = (20, 300)  # least and most of a request


def requests(count: int, seed: int) -> list[dict]:
    """What the model is asked, a mixture of kinds and topics."""
    topics = dict.fromkeys(TOPICS)
    all_of = [ASK.format(kind.format(topic)) for topic, kind in itertools.product(topics, KINDS)]
    random.Random(seed).shuffle(all_of)
    rows = []
    for i in range(count):
        rows.append({"id": i, "prompt": all_of[i % len(all_of)]})
    return rows


def clean(text: str) -> str | None:
    """The request in what the model has said, or None."""
    first = text.strip().split("\n")[0]
    first = re.sub(r"^(request|question|problem|prompt)\s*:\s*", "", first, flags=re.IGNORECASE)
    first = first.strip().strip('"“”*').strip()
    fits = LETTERS[0] <= len(first) <= LETTERS[1] and first[-1] in ".?!"
    about_itself = re.match(r"(here|sure|i'm|i am|as an|certainly)\b", first, re.IGNORECASE)
    return first if fits and not about_itself else None


def main(args: argparse.Namespace):
    asked = args.out.with_suffix(".asked.jsonl")
    ledger = args.out.with_suffix(".ledger.jsonl")
    # some are thrown away: ask for half as many more
    world.write(asked, requests(args.count + args.count // 2, args.seed))
    words = ["--model", args.model, "--data", asked, "--task", "answer", "--out", ledger]
    words += ["--seed", args.seed, "--max-new-tokens", 80, "--batch-size", args.batch_size]
    arms.call(generate, words, args.out.with_suffix(".log"))
    rows = arms.read_ledger(ledger)
    found = {}
    for row in rows:
        text = clean(row["rationale"]) if row["status"] == "ok" else None
        if text:
            found.setdefault(text)
    kept = [{"id": i, "prompt": text} for i, text in enumerate(found)][: args.count]
    world.write(args.out, kept)
    print(f"{args.out}: {len(kept)} prompts of {len(rows)} that were asked for")


def parser() -> argparse.ArgumentParser:
    p = data.Arguments(description="Prompts for replay that the model writes itself.")
    add = p.add_argument
    add("--model", required=True, help="model folder")
    add("--out", type=Path, required=True, help="file to write (JSON lines)")
    add("--count", type=data.COUNT, default=1024, help="at most so many (default 1024)")
    add("--seed", type=data.COUNT_OR_ZERO, default=0, help="of the samples (default 0)")
    add("--batch-size", type=data.COUNT, default=64, help="rows at a time (default 64)")
    return p


if __name__ == "__main__":
    data.cli(main, parser())
