"""Choices scored by evaluate.py, compared with one forward pass per (prompt, choice) pair.

    python benchmarks/evaluate.py --model DIR --choice piqa.jsonl bbh.jsonl --limit 60

Prints the seconds of both in float32 on the CPU, their ratio, the bound of ours, and the largest
difference of a log-likelihood. The single passes are those of transformers.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import bounds  # noqa: E402

import evaluate  # noqa: E402
from data import Encoder, Tokenizer  # noqa: E402
from model import Transformer  # noqa: E402


def score_alone(model, question) -> list[float]:
    """log P of each ending, by one forward pass each."""
    scores = []
    for ending in question.endings:
        ids = torch.tensor([question.prefix + ending])
        logits = model(ids[:, :-1]).logits[0, -len(ending) :]
        logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(ending)[:, None])
        scores.append(logprobs.sum().item())
    return scores


def score_together(model: Transformer, question) -> list[float]:
    _, scores = evaluate.score_endings(model, question)
    return scores


def timed(score, model, questions) -> tuple[float, list[float]]:
    """Seconds, and all log-likelihoods in their order."""
    start = time.perf_counter()
    scores = []
    for question in questions:
        scores += score(model, question)
    return time.perf_counter() - start, scores


@torch.inference_mode()
def main(args: argparse.Namespace):
    from transformers import AutoModelForCausalLM

    rates = bounds.describe_machine(torch.device("cpu"))
    words = ["--model", args.model, "--choice", *args.choice]
    options = evaluate.parser().parse_args(words)
    options.limit = args.limit
    ours = Transformer.from_pretrained(args.model)
    tests = evaluate.read_tests(Encoder(Tokenizer(args.model)), ours.config, options)
    theirs = AutoModelForCausalLM.from_pretrained(args.model).float()
    totals = [0.0, 0.0]
    operations = bounds.record_operations(ours)
    products = 0.0
    largest = 0.0
    for (_, test), questions in tests.items():
        if not questions:  # the rows of this file name other tests
            continue
        timed(score_together, ours, questions[:1])  # the first call of either is slow
        timed(score_alone, theirs, questions[:1])
        operations.clear()
        together, scores = timed(score_together, ours, questions)
        products += sum(operations) / rates["float32"]
        alone, expected = timed(score_alone, theirs, questions)
        differences = [abs(a - b) for a, b in zip(scores, expected)]
        largest = max(largest, *differences)
        times = f"{together:.1f} s together, {alone:.1f} s alone, ratio {alone / together:.2f}"
        print(f"{test}: {len(questions)} questions, {times}", flush=True)
        totals[0] += together
        totals[1] += alone
    print(bounds.distance(products, totals[0]))
    print(f"all: ratio {totals[1] / totals[0]:.2f}, largest difference {largest:.1e}")


if __name__ == "__main__":
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument("--model", required=True)
    p.add_argument("--choice", required=True, nargs="+", metavar="FILE")
    p.add_argument("--limit", type=int, help="the first N questions of each file")
    main(p.parse_args())
