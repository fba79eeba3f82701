"""Choices by evaluate.py against each (prompt, choice) pair alone, as most scripts do it.

    python benchmarks/evaluate.py --model DIR --choice piqa.jsonl bbh.jsonl --limit 60

Prints the seconds of both in float32 on the CPU, how many times as fast evaluate.py is, and the
largest difference of a log-likelihood. The pairs alone go through transformers.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate  # noqa: E402
from data import Encoder, Tokenizer  # noqa: E402
from model import Transformer, start_processes  # noqa: E402


def score_alone(model, row: dict) -> list[float]:
    """log P of each ending of `row`, each with a forward pass of its own."""
    found = []
    for ending in row["endings"]:
        ids = torch.tensor([row["ids"] + ending])
        logits = model(ids[:, :-1]).logits[0, -len(ending) :]
        logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(ending)[:, None])
        found.append(logprobs.sum().item())
    return found


def score_together(model: Transformer, row: dict) -> list[float]:
    return evaluate.score_choices(model, row["ids"], row["endings"])


def timed(score, model, rows: list[dict]) -> tuple[float, list[float]]:
    """Seconds, and all log-likelihoods in their order."""
    start = time.perf_counter()
    found = []
    for row in rows:
        found += score(model, row)
    return time.perf_counter() - start, found


@torch.inference_mode()
def main(args: argparse.Namespace):
    start_processes()
    options = ["--model", args.model, "--out", "unused", "--choice", *args.choice]
    if args.limit:
        options += ["--limit", str(args.limit)]
    options = evaluate.parser().parse_args(options)
    tests = evaluate.read_tests(options, Encoder(Tokenizer(args.model)))
    ours = Transformer.from_pretrained(args.model)
    theirs = AutoModelForCausalLM.from_pretrained(args.model).float()
    totals = [0.0, 0.0]
    largest = 0.0
    for key, rows in tests.items():
        timed(score_together, ours, rows[:1])  # once, unmeasured: the first call of either is slow
        timed(score_alone, theirs, rows[:1])
        together, found = timed(score_together, ours, rows)
        alone, wanted = timed(score_alone, theirs, rows)
        largest = max([largest, *(abs(a - b) for a, b in zip(found, wanted))])
        times = f"{together:.1f} s; alone {alone:.1f} s: {alone / together:.2f} times"
        print(f"{key}: {len(rows)} questions, {times}", flush=True)
        totals[0] += together
        totals[1] += alone
    print(f"all: {totals[1] / totals[0]:.2f} times as fast, largest difference {largest:.1e}")


if __name__ == "__main__":
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument("--model", required=True)
    p.add_argument("--choice", required=True, nargs="+", metavar="FILE")
    p.add_argument("--limit", type=int, help="the first N questions of each file")
    main(p.parse_args())
