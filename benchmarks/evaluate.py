"""Multiple choice by evaluate.py against each (prompt, choice) pair alone through transformers, as most scripts do it.

    python benchmarks/evaluate.py --model DIR --choice piqa.jsonl bbh.jsonl --limit 60

Prints seconds of both in float32 on the CPU, how many times as fast evaluate.py is, and the largest difference of a
log-likelihood, over all tasks.
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


def alone(model, row: dict) -> list[float]:
    """log P of each ending of `row`, each with a forward pass of its own."""
    found = []
    for ending in row["endings"]:
        ids = torch.tensor([row["ids"] + ending])
        logprobs = model(ids[:, :-1]).logits[0, -len(ending) :].log_softmax(-1)
        found.append(logprobs.gather(-1, ids[0, -len(ending) :, None]).sum().item())
    return found


@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    start_processes()
    options = ["--model", args.model, "--out", "unused", "--choice", *args.choice, "--batch-size", str(args.batch_size)]
    options = evaluate.parser().parse_args(options + ["--limit", str(args.limit)] * bool(args.limit))
    encoder = Encoder(Tokenizer(args.model))
    tests, _ = evaluate.read_tests(options, encoder)
    ours, theirs = Transformer.from_pretrained(args.model), AutoModelForCausalLM.from_pretrained(args.model).float()
    for rows in tests.values():  # once, unmeasured: the first call of either is slow
        list(evaluate.choose(ours, encoder, rows[:4], options)), [alone(theirs, row) for row in rows[:1]]
    seconds, differences = [0.0, 0.0], []
    for key, rows in tests.items():
        start = time.perf_counter()
        found = {item["id"]: item["logprobs"] for item in evaluate.choose(ours, encoder, rows, options)}
        middle = time.perf_counter()
        wanted = {row["id"]: alone(theirs, row) for row in rows}
        spent = [middle - start, time.perf_counter() - middle]
        differences += [abs(a - b) for id in wanted for a, b in zip(found[id], wanted[id])]
        print(
            f"{key}: {len(rows)} questions, {spent[0]:.1f} s; alone {spent[1]:.1f} s: {spent[1] / spent[0]:.2f} times"
        )
        seconds = [a + b for a, b in zip(seconds, spent)]
    print(f"all: {seconds[1] / seconds[0]:.2f} times as fast, largest difference {max(differences):.1e}")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--choice", required=True, nargs="+", metavar="FILE")
    p.add_argument("--limit", type=int, help="the first N questions of each file")
    p.add_argument("--batch-size", type=int, default=64)
    main(p.parse_args())
