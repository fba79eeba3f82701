r"""How fast rationales are sampled: this project and transformers in turn, and the bound that the matrix products set.

    python benchmarks/generate.py --model DIR --data train.jsonl --direction de-en

Both go on from the same prompts and forced references (cue "\n") at temperature 1. The peer reads them sorted by length
and padded on the left, at two batch sizes, of which the better counts. Each measurement is a process of its own. Useful
tokens are those of the rationales, without padding and EOS.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import data  # noqa: E402
from generate import matrix_seconds, request, sample  # noqa: E402
from model import Transformer  # noqa: E402


def read_prompts(args: argparse.Namespace) -> tuple[data.Tokenizer, list[list[int]]]:
    tokenizer = data.Tokenizer(args.model)
    rows = data.read_rows(args.data, args.direction)[: args.rows]
    return tokenizer, [sum(request(row, "rationale", data.Encoder(tokenizer), "\n"), []) for row in rows]


def ours(args: argparse.Namespace, batch_size: int, count: int) -> dict:
    """Useful tokens, seconds, and what the matrix products alone would take for a step of decoding."""
    tokenizer, prompts = read_prompts(args)
    model, spent = Transformer.from_pretrained(args.model, getattr(torch, args.dtype)), Counter()
    start, settings = time.perf_counter(), dict(eos_ids=tokenizer.eos_ids, limit=tokenizer.vocab_size)
    outputs = sample(model, prompts[:count], args.max_new_tokens, 1.0, batch_size=batch_size, spent=spent, **settings)
    tokens = sum(len(ids) for _, ids, _, _ in outputs)
    found = dict(tokens=tokens, seconds=time.perf_counter() - start, memory=memory())
    return found | dict(bound=batch_size / matrix_seconds(model, batch_size), spent=spent)


@torch.inference_mode()
def peer(args: argparse.Namespace, batch_size: int, count: int) -> dict:
    from transformers import AutoModelForCausalLM

    tokenizer, prompts = read_prompts(args)
    model, tokens = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)), 0
    start, prompts, eos = time.perf_counter(), sorted(prompts[:count], key=len), tokenizer.eos_ids
    settings = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=eos, pad_token_id=eos[0])
    for part in (prompts[i : i + batch_size] for i in range(0, count, batch_size)):
        T = max(map(len, part))
        ids = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in part])
        mask = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in part])
        outputs = model.generate(ids, attention_mask=mask, max_new_tokens=args.max_new_tokens, **settings)
        for row in outputs[:, T:].tolist():
            ends = [i for i, token in enumerate(row) if token in eos]
            tokens += ends[0] if ends else len(row)
    return dict(tokens=tokens, seconds=time.perf_counter() - start, memory=memory())


def memory() -> float:
    """Peak memory of this process, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(name: str, batch_size: int, count: int) -> dict:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, str(batch_size), str(count)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    found["rate"] = found["tokens"] / found["seconds"]
    text = f"{found['tokens']:6,} tokens {found['rate']:7.1f} tokens/s {found['memory']:5.2f} GiB"
    print(f"{name:>5} batch {batch_size:>3} {count:>4} rows {text}", flush=True)
    return found


def best(found: list[dict]) -> str:
    rates = [f["rate"] for f in found]
    return f"{min(rates):.1f} to {max(rates):.1f}" if len(rates) > 1 else f"{rates[0]:.1f}"


def compare(args: argparse.Namespace, batch_size: int, count: int) -> None:
    """Measures both in turn and prints the ratio of each round, our share of the bound, and the memory."""
    mine, its, sizes = [], [], sorted({batch_size, -(-batch_size // 2)})
    for _ in range(args.rounds):
        mine.append(measure("ours", batch_size, count))
        tried = {size: measure("peer", size, count) for size in sizes}
        sizes = [max(tried, key=lambda size: tried[size]["rate"])]
        its.append(tried[sizes[0]])
    ratios = [a["rate"] / b["rate"] for a, b in zip(mine, its)]
    shares = [a["rate"] / a["bound"] for a in mine]
    decode = [a["spent"]["decode tokens"] / a["spent"]["decode seconds"] / a["bound"] for a in mine]
    print(f"batch {batch_size}: {best(mine)} tokens/s; transformers, batch {sizes[0]}: {best(its)}")
    print(f"  ratio {min(ratios):.2f} to {max(ratios):.2f}; bound {mine[0]['bound']:.0f} tokens/s, of which")
    print(
        f"  {min(shares):.0%} to {max(shares):.0%} with prefill, {min(decode):.0%} to {max(decode):.0%} while decoding"
    )
    print(f"  peak memory {max(a['memory'] for a in mine):.2f} GiB, transformers {max(a['memory'] for a in its):.2f}")


def main(args: argparse.Namespace) -> None:
    if args.only:
        name, batch_size, count = args.only[0], *map(int, args.only[1:])
        with_stdout = dict(ours=ours, peer=peer)[name](args, batch_size, count)
        print(json.dumps(with_stdout))
    elif args.smoke:
        from conftest import PAIRS, write_jsonl, write_model, write_tokenizer

        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(write_model(Path(folder)))
            pairs = write_jsonl(Path(folder) / "pairs.jsonl", PAIRS)
            small = ["--max-new-tokens", "8", "--rows", "4", "--rounds", "1", "--batch-size", "1"]
            sys.argv[1:] = ["--model", folder, "--data", str(pairs), *small]
            main(parser().parse_args())
    else:
        if args.batch_size > 1:
            compare(args, 1, max(1, args.rows // 32))
        compare(args, args.batch_size, args.rows)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Sampling speed of this project and of transformers, and its bound.")
    p.add_argument("--model", help="model folder")
    p.add_argument("--data", nargs="+", help="pairs")
    p.add_argument("--direction", nargs="+", default=[])
    p.add_argument(
        "--rows", type=int, default=256, help="rows at --batch-size; a 32nd of them at batch 1 (default 256)"
    )
    p.add_argument("--rounds", type=int, default=1, help="(default 1)")
    p.add_argument("--batch-size", type=int, default=64, help="(default 64)")
    p.add_argument("--max-new-tokens", type=int, default=96, help="(default 96)")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    p.add_argument("--smoke", action="store_true", help="a tiny random model, seconds")
    p.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    return p


if __name__ == "__main__":
    main(parser().parse_args())
