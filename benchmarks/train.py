"""train.py against a training loop with transformers: same model, rows and machine, in turn.

    python benchmarks/train.py --model DIR --data rationales.jsonl

Every side of every round is a process of its own, so its peak memory is its own. The peer is
transformers as it is fastest: float32 weights, autocast where bfloat16 is faster, rows of like
length together, pads on the right (no mask is needed then), labels -100, the loss over all
supervised tokens of the step, SDPA, fused AdamW. Nothing is compiled. Both start from the same
weights on the same batches: first losses must agree. The bound is the time of the matrix products
alone: three for every weight and computed token, of the head only where there is loss.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bounds  # noqa: E402

import train  # noqa: E402
from data import collate  # noqa: E402
from model import ModelConfig, start_processes  # noqa: E402


def padded(part: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (ids, prompt length), the longest first -> tokens and labels [B, T]."""
    tokens = torch.zeros(len(part), len(part[0][0]), dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for b, (ids, prompt) in enumerate(part):
        tokens[b, : len(ids)] = torch.tensor(ids)
        labels[b, prompt : len(ids)] = torch.tensor(ids[prompt:])
    return tokens, labels


def peer(args: argparse.Namespace) -> dict:
    """Trains with transformers on the batches -> first loss, seconds of each step, peak GiB."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(args.model, **options).to(device).train()
    if args.checkpointing:
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
    half = args.dtype == "bfloat16"
    losses = []
    seconds = []
    for rows in json.loads(Path(args.batches).read_text()):
        start = time.perf_counter()
        total = 0.0
        rows.sort(key=lambda row: len(row[0]), reverse=True)
        count = sum(len(ids) - prompt for ids, prompt in rows)
        for first in range(0, len(rows), args.micro_batch_size):
            tokens, labels = padded(rows[first : first + args.micro_batch_size])
            inputs = {"input_ids": tokens.to(device), "labels": labels.to(device)}
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = model(**inputs, use_cache=False, num_items_in_batch=count).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        seconds.append(time.perf_counter() - start)
    return {"loss": losses[0], "seconds": seconds, "memory": train.memory_gib()}


def measure(side: str, args: argparse.Namespace, place: Path, batches: Path) -> dict:
    """Runs one side in a process of its own."""
    common = ["--model", args.model, "--data", args.data, "--dtype", args.dtype]
    common += ["--micro-batch-size", args.micro_batch_size, "--batch-size", args.batch_size]
    if side == "peer":
        command = [__file__, *common, "--batches", batches]
        command += ["--checkpointing"] * args.checkpointing
    else:
        out = Path(tempfile.mkdtemp(dir=place))
        command = [ROOT / "train.py", *common, "--max-steps", args.steps, "--out", out]
        command += ["--schedule", "constant", "--warmup-steps", 0, "--save-every", 0]
        command += ["--activation-checkpointing"] * args.checkpointing
    command = [sys.executable, *map(str, command)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(f"error: {side} ended with status {process.returncode}")
    if side == "peer":
        return json.loads(process.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (out / "model.safetensors").unlink()
    return {
        "loss": lines[0]["loss"],
        "seconds": [line["seconds"] for line in lines],
        "memory": max(line["memory_gib"] for line in lines),
    }


def use_tiny_model(args: argparse.Namespace, place: Path):
    """A tiny model of random weights and a few pairs, in place of --model and --data."""
    from conftest import PAIRS, write_jsonl, write_model, write_tokenizer

    args.model = write_tokenizer(write_model(place / "model"))
    args.data = write_jsonl(place / "pairs.jsonl", PAIRS)
    args.rounds = 1
    args.batch_size = 7
    args.micro_batch_size = 4
    args.steps = 2


def read_batches(args: argparse.Namespace, place: Path) -> list[list]:
    """The batches that train.py takes."""
    given = ["--model", str(args.model), "--data", str(args.data), "--out", str(place)]
    settings = train.parser().parse_args([*given, "--batch-size", str(args.batch_size)])
    config = ModelConfig.from_file(Path(args.model) / "config.json")
    settings.tokenizer = settings.model
    _, examples, _ = train.read_data(settings, config)
    size = settings.batch_size
    return [train.batch_of(examples, step, size, settings.seed) for step in range(args.steps)]


def count_work(config: ModelConfig, batches: list[list]) -> tuple[int, float]:
    """Tokens and operations of these steps."""
    tokens = 0
    operations = 0.0
    for batch in batches:
        lengths = [len(example) for example in batch]
        supervised = sum(len(e.reference) + len(e.rationale) for e in batch)
        tokens += sum(lengths)
        operations += bounds.training_operations(config, lengths, supervised)
    return tokens, operations


def count_products(config: ModelConfig, batches: list[list], size: int) -> float:
    """Operations of the matrix products that our side can't do without."""
    layers, head = bounds.matrix_weights(config)
    operations = 0.0
    for batch in batches:
        for part in train.micro_batches(batch, size):
            made = collate(part)  # a prefix that rows share counts once
            operations += 6 * (layers * made.tokens.numel() + head * len(made.targets))
    return operations


def compare(args: argparse.Namespace, place: Path):
    """Measures both sides in turn and prints each round, then the ratios."""
    _, _, device = start_processes()
    if args.smoke:
        use_tiny_model(args, place)
    rates = bounds.describe_machine(device)
    args.dtype = args.dtype or max(rates, key=rates.get)
    peak = rates[args.dtype]
    batches = read_batches(args, place)
    rows = [[(example.tokens, len(example.prompt)) for example in batch] for batch in batches]
    file = place / "batches.json"
    file.write_text(json.dumps(rows))
    config = ModelConfig.from_file(Path(args.model) / "config.json")
    timed = batches[1:]  # the first step warms up
    tokens, operations = count_work(config, timed)
    products = count_products(config, timed, args.micro_batch_size) / peak
    found = {"ours": [], "peer": []}
    for i in range(args.rounds):
        order = ["ours", "peer"] if i % 2 == 0 else ["peer", "ours"]
        for side in order:
            line = measure(side, args, place, file)
            seconds = sum(line["seconds"][1:])
            line["speed"] = tokens / seconds
            found[side].append(line)
            print(
                f"round {i + 1}  {side}  {line['speed']:,.0f} tokens/s, "
                f"{operations / seconds / peak:.0%} of {peak / 1e9:.0f} Gflop/s  "
                f"{line['memory']:.2f} GiB  first loss {line['loss']:.5f}",
                flush=True,
            )
    fastest = min(sum(line["seconds"][1:]) for line in found["ours"])
    print(f"ours, the fastest round: {bounds.distance(products, fastest)}")
    print_ratios(args, list(zip(found["ours"], found["peer"])))


def print_ratios(args: argparse.Namespace, pairs: list[tuple[dict, dict]]):
    worst = max(abs(ours["loss"] - its["loss"]) for ours, its in pairs)
    tolerance = 0.03 if args.dtype == "bfloat16" else 1e-3  # bfloat16 has eight bits
    if worst > tolerance:
        sys.exit(f"error: first losses differ by {worst:.1e}: not the same work")
    print(f"first losses agree to {worst:.1e}; {args.dtype}, batches of {args.batch_size},")
    print(f"at most {args.micro_batch_size} at a time, {args.rounds} rounds of {args.steps} steps,")
    print("of which the first is not timed")
    for name in ("speed", "memory"):
        ratios = [ours[name] / its[name] for ours, its in pairs]
        low = min(ratios)
        high = max(ratios)
        print(f"{name}: ours / peer {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")


def main():
    p = argparse.ArgumentParser(description="Speed and memory of train.py against transformers.")
    add = p.add_argument
    add("--model", help="model folder")
    add("--data", help="ledger or pairs")
    add("--rounds", type=int, default=3, help="of both sides, in turn (default 3)")
    add("--batch-size", type=int, default=16, help="examples of a step (default 16)")
    add("--micro-batch-size", type=int, default=8, help="examples at a time (default 8)")
    add("--steps", type=int, default=2, help="of a round; the first warms up (default 2)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: what multiplies faster here")
    add("--checkpointing", action="store_true", help="recompute activations, both sides")
    add("--smoke", action="store_true", help="a tiny model: seconds, figures mean nothing")
    add("--batches", help=argparse.SUPPRESS)  # the peer's process
    args = p.parse_args()
    if args.batches:
        print(json.dumps(peer(args)))
    elif args.smoke or (args.model and args.data):
        with tempfile.TemporaryDirectory() as place:
            compare(args, Path(place))
    else:
        p.error("give --model and --data, or --smoke")


if __name__ == "__main__":
    main()
