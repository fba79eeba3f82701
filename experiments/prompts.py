"""Prompts for replay, made of topics and ways to ask: no data of anybody's is needed.

    python experiments/prompts.py --out prompts.jsonl --count 2048

Replay needs prompts alone, since the model answers them itself. These were written down without a
look at any test; arms.py refuses a prompt that is measured, too.
"""

import argparse
import itertools
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import world  # noqa: E402

TOPICS = """cooking gardening music painting cities rivers mountains oceans weather history
    medicine sleep sport chess football cycling swimming travel trains ships aeroplanes space
    stars physics chemistry biology insects birds dogs cats horses farming bread coffee clothes
    houses furniture money shopping work meetings letters email books poetry novels films theatre
    photography languages grammar spelling teaching childhood families friendship birthdays
    holidays politics law elections maps computers programming websites telephones robots
    electricity engines bridges tools glass paper colours numbers geometry probability calendars
    clocks energy forests deserts islands volcanoes dinosaurs myths philosophy dreams memory fear
    humour""".split()
ONE = [
    "What should everybody know about {}?",
    "Explain {} to a child of ten.",
    "Give me three tips on {} for beginners.",
    "Write a short story in which {} matter.",
    "What is a common misunderstanding about {}?",
    "Write four lines of verse about {}.",
    "I know little about {}. Where do I start?",
    "Which words does one need to talk about {}? Explain each in a sentence.",
    "How did people think about {} a hundred years ago?",
    "Ask me five questions about {}, with answers.",
    "Tell me something surprising about {}.",
    "Write a polite message to a friend who is fond of {}.",
    "What can go wrong with {}, and what helps?",
    "Make a plan for a week in which I learn about {}.",
    "Argue for spending more time on {}. Then argue against it.",
    "Summarise what matters about {} in two sentences.",
]
TWO = [
    "What do {} and {} have in common?",
    "Which is harder to learn about, {} or {}, and why?",
    "Write a conversation between two people, one fond of {}, the other of {}.",
    "Invent a game about {} and {}.",
]


def requests(count: int, seed: int) -> list[str]:
    """Different ones; half of them are about two topics."""
    rng = random.Random(seed)
    pairs = [*itertools.permutations(TOPICS, 2)]
    one = [way.format(topic) for way, topic in itertools.product(ONE, TOPICS)]
    two = [way.format(*pair) for way, pair in itertools.product(TWO, pairs)]
    mixed = rng.sample(one, len(one))[: count - count // 2]
    mixed += rng.sample(two, count - len(mixed))
    return rng.sample(mixed, count)


def main(args: argparse.Namespace):
    rows = [{"id": i, "prompt": text} for i, text in enumerate(requests(args.count, args.seed))]
    world.write(args.out, rows)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Prompts for replay, of topics and ways to ask.")
    p.add_argument("--out", type=Path, required=True, help="file to write (JSON lines)")
    p.add_argument("--count", type=int, default=1024, help="up to 30,000 (default 1024)")
    p.add_argument("--seed", type=int, default=0, help="which (default 0)")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
