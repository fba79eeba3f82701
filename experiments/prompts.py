"""Prompts for replay, made of topics and templates. Replay needs no answers: the model writes them.

    python experiments/prompts.py --out prompts.jsonl --count 2048

The topics and templates of prompts.txt were written before any test was looked at.
"""

import argparse
import itertools
import random
from pathlib import Path

from world import write_jsonl

# topics, an empty line, and templates for one topic or for two
topics, templates = Path(__file__).with_name("prompts.txt").read_text("utf-8").split("\n\n")
TOPICS = topics.split()
ONE = [line for line in templates.splitlines() if line.count("{}") == 1]
TWO = [line for line in templates.splitlines() if line.count("{}") == 2]


def requests(count: int, seed: int) -> list[str]:
    """Different prompts; half of them are about two topics."""
    rng = random.Random(seed)
    pairs = [*itertools.permutations(TOPICS, 2)]
    one = [template.format(topic) for template, topic in itertools.product(ONE, TOPICS)]
    two = [template.format(*pair) for template, pair in itertools.product(TWO, pairs)]
    mixed = rng.sample(one, len(one))[: count - count // 2]
    mixed += rng.sample(two, count - len(mixed))
    return rng.sample(mixed, count)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Writes prompts for replay.")
    p.add_argument("--out", type=Path, required=True, help="file to write (JSON lines)")
    p.add_argument("--count", type=int, default=1024, help="up to 30,000 (default 1024)")
    p.add_argument("--seed", type=int, default=0, help="which prompts (default 0)")
    args = p.parse_args()
    texts = requests(args.count, args.seed)
    write_jsonl(args.out, [{"id": i, "prompt": text} for i, text in enumerate(texts)])
