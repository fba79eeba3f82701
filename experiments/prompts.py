"""Prompts for replay, made of topics and templates. Replay needs no answers: the model writes them.

    python experiments/prompts.py --out prompts.jsonl --count 2048

They were written before any test was looked at.
"""

import argparse
import itertools
import random
from pathlib import Path

from world import write_jsonl

TOPICS = """cooking gardening music painting cities rivers mountains oceans weather history
    medicine sleep sport chess football cycling swimming travel trains ships aeroplanes space stars
    physics chemistry biology insects birds dogs cats horses farming bread coffee clothes houses
    furniture money shopping work meetings letters email books poetry novels films theatre
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
