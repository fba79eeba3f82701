"""train.py against a training loop with transformers, on the same model, rows and machine, in turn.

    python benchmarks/train.py --model DIR --data rationales.jsonl

Every side of every round is a process of its own, so its peak memory is its own. The peer is transformers as it is
fastest: float32 weights, autocast where bfloat16 is faster, rows of like length together, pads on the right (no mask
is needed then), labels -100, the loss over all supervised tokens of the step, SDPA, fused AdamW. Nothing is compiled
unless --compile asks for it on our side. Both start from the same weights on the same batches: first losses must agree.
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


def peer(args: argparse.Namespace) -> dict:
    """Trains with transformers on the batches of --batches -> first loss, seconds of each step, peak GiB."""
    from transformers import AutoModelForCausalLM

    from train import peak_memory

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
    model = model.to(device).train()
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
    losses, seconds = [], []
    for rows in json.loads(Path(args.batches).read_text()):
        start, total = time.perf_counter(), 0.0
        rows.sort(key=lambda row: len(row[0]), reverse=True)
        count = sum(len(ids) - prompt for ids, prompt in rows)
        for part in (rows[i : i + args.micro_batch_size] for i in range(0, len(rows), args.micro_batch_size)):
            tokens = torch.zeros(len(part), len(part[0][0]), dtype=torch.long)
            labels = torch.full_like(tokens, -100)
            for b, (ids, prompt) in enumerate(part):
                tokens[b, : len(ids)] = torch.tensor(ids)
                labels[b, prompt : len(ids)] = torch.tensor(ids[prompt:])
            with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                inputs = dict(input_ids=tokens.to(device), labels=labels.to(device), use_cache=False)
                loss = model(**inputs, num_items_in_batch=count).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        seconds.append(time.perf_counter() - start)
    return dict(loss=losses[0], seconds=seconds, memory=peak_memory() / 2**30)


def measure(side: str, args: argparse.Namespace, place: Path, batches: Path) -> dict:
    """Runs one side in a process of its own."""
    common = ["--model", args.model, "--data", args.data, "--micro-batch-size", args.micro_batch_size]
    common += ["--batch-size", args.batch_size, "--dtype", args.dtype]
    if side == "peer":
        command = [__file__, *common, "--batches", batches, *["--checkpointing"] * args.checkpointing]
    else:
        out = tempfile.mkdtemp(dir=place)
        command = [ROOT / "train.py", *common, "--max-steps", args.steps, "--out", out, "--save-every", 0]
        command += ["--activation-checkpointing"] * args.checkpointing + ["--compile"] * args.compile
        command += ["--schedule", "constant", "--warmup-steps", 0]
    process = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(f"error: {side} ended with status {process.returncode}")
    if side == "peer":
        return json.loads(process.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    (Path(out) / "model.safetensors").unlink()
    seconds = [line["seconds"] for line in lines]
    return dict(loss=lines[0]["loss"], seconds=seconds, memory=max(line["memory_gib"] for line in lines))


def smoke(args: argparse.Namespace, place: Path) -> None:
    """A tiny model from random weights and a few pairs, in place of --model and --data."""
    from conftest import PAIRS, write_jsonl, write_model, write_tokenizer

    args.model, args.data = write_tokenizer(write_model(place / "model")), write_jsonl(place / "pairs.jsonl", PAIRS)
    args.rounds, args.batch_size, args.micro_batch_size, args.steps = 1, 7, 4, 2


def compare(args: argparse.Namespace, place: Path) -> None:
    if args.smoke:
        smoke(args, place)
    import train
    from data import Tokenizer
    from model import ModelConfig, Transformer

    _, _, device = train.start_processes()
    rates = {
        name: train.matmul_rate(getattr(torch, name), device) for name in ("float32", "bfloat16")[: 2 - args.smoke]
    }
    print("matrix products:", ", ".join(f"{name} {rate / 1e9:.0f} Gflop/s" for name, rate in rates.items()), flush=True)
    args.dtype = args.dtype or max(rates, key=rates.get)
    config = ModelConfig.from_file(Path(args.model) / "config.json")
    given = ["--model", str(args.model), "--data", str(args.data), "--out", str(place), "--dtype", args.dtype]
    settings = train.parser().parse_args([*given, "--batch-size", str(args.batch_size)])
    examples = train.read_examples(settings.data, settings, Tokenizer(args.model), config)
    batches = [train.batch_of(examples, step, settings) for step in range(args.steps)]
    file = place / "batches.json"
    file.write_text(json.dumps([[(e.tokens, len(e.prompt)) for e in batch] for batch in batches]))
    with torch.device("meta"):
        model = Transformer(config)

    found = {"ours": [], "peer": []}
    for i in range(args.rounds):
        for side in list(found)[:: 1 if i % 2 == 0 else -1]:  # in turn
            line = measure(side, args, place, file)
            # the first step warms up
            tokens, seconds = sum(map(len, sum(batches[1:], []))), sum(line["seconds"][1:])
            share = sum(train.costs(model, batch, 1, 1)["mfu"] for batch in batches[1:]) / seconds / rates[args.dtype]
            found[side].append(line | dict(speed=tokens / seconds, share=share))
            text = "round {}  {}  {:,.0f} tokens/s, {:.0%} of {:.0f} Gflop/s  {:.2f} GiB  first loss {:.5f}"
            speed, memory, peak = tokens / seconds, line["memory"], rates[args.dtype] / 1e9
            print(text.format(i + 1, side, speed, share, peak, memory, line["loss"]), flush=True)
    pairs = list(zip(found["ours"], found["peer"]))
    worst = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    if worst > 1e-3 * (30 if args.dtype == "bfloat16" else 1):  # bfloat16 has eight bits
        sys.exit(f"error: the first losses differ by {worst:.1e}: the sides don't do the same work")
    print(f"first losses agree to {worst:.1e}; {args.dtype}, batches of {args.batch_size}, at most", end=" ")
    print(f"{args.micro_batch_size} at a time, {args.rounds} rounds of {args.steps} steps, the first one not timed")
    for name, goal in (("speed", "at least 1.6"), ("memory", "at most 0.75")):
        ratios = [a[name] / b[name] for a, b in pairs]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name}: ours / peer {statistics.median(ratios):.2f} ({spread}); goal {goal}")


def main() -> None:
    p = argparse.ArgumentParser(description="Speed and memory of train.py against transformers.")
    p.add_argument("--model", help="model folder")
    p.add_argument("--data", help="ledger or pairs")
    p.add_argument("--rounds", type=int, default=3, help="of both sides, in turn (default 3)")
    p.add_argument("--batch-size", type=int, default=16, help="examples of a step (default 16)")
    p.add_argument("--micro-batch-size", type=int, default=8, help="examples at a time, at most (default 8)")
    p.add_argument("--steps", type=int, default=2, help="of a round; the first warms up (default 2)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute (default: what multiplies faster here)")
    p.add_argument("--checkpointing", action="store_true", help="recompute activations, both sides")
    p.add_argument("--compile", action="store_true", help="compile our layers")
    p.add_argument("--smoke", action="store_true", help="a tiny model made on the spot: seconds, figures mean nothing")
    p.add_argument("--batches", help=argparse.SUPPRESS)  # the peer's process
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
