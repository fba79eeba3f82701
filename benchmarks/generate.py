r"""How fast rationales are sampled: by this project, by transformers, and the upper bound.

    python benchmarks/generate.py --model DIR --data train.jsonl --direction de-en

Both continue the same prompts and prefilled references (cue "\n") at temperature 1. The
transformers baseline reads them sorted by length and padded on the left, at two batch sizes, of
which the better counts. Each measurement is a process of its own. Useful tokens are those of the
rationales, without padding and EOS. The bound is the time of the matrix products alone: of the
decoding steps with every row in use, and of the prompts at the rate of a large product.
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

import bounds  # noqa: E402

import data  # noqa: E402
import generate  # noqa: E402
from model import Transformer  # noqa: E402


def read_prompts(args: argparse.Namespace) -> tuple[data.Tokenizer, list[list[int]]]:
    tokenizer = data.Tokenizer(args.model)
    encoder = data.Encoder(tokenizer)
    prompts = []
    for row in data.read_rows(args.data, args.direction)[: args.rows]:
        prompts.append(generate.make_sequence(row, encoder, "rationale", "\n").prefix)
    return tokenizer, prompts


def count_time(name: str, spent: Counter):
    """Adds the seconds of each call of a function of the sampler to `spent`."""
    function = getattr(generate, name)

    def counted(*arguments, **options):
        start = time.perf_counter()
        result = function(*arguments, **options)
        spent[name] += time.perf_counter() - start
        return result

    setattr(generate, name, counted)


def measure_ours(args: argparse.Namespace, batch_size: int, count: int) -> dict:
    """Useful tokens, seconds, and how many of these the steps and the noise take."""
    tokenizer, prompts = read_prompts(args)
    model = Transformer.from_pretrained(args.model, getattr(torch, args.dtype))
    spent = Counter()
    for name in ("decode", "choose", "exponential_noise"):
        count_time(name, spent)
    operations = bounds.record_operations(model)
    sequences = [generate.Sequence(i, prompt) for i, prompt in enumerate(prompts[:count])]
    start = time.perf_counter()
    for _ in generate.sample(
        model,
        sequences,
        generate.Sampling(args.max_new_tokens, temperature=1.0),
        tokenizer.eos_ids,
        tokenizer.vocab_size,
        batch_size,
    ):
        pass
    seconds = time.perf_counter() - start
    chosen = sum(len(sequence.logprobs) for sequence in sequences)
    decoded = chosen - count  # the first token of each comes from its prompt
    prompts = sum(operations) - 2 * sum(bounds.matrix_weights(model.config)) * decoded
    bound = batch_size / bounds.matrix_seconds(model, batch_size)
    return {
        "tokens": sum(len(sequence.ids) for sequence in sequences),
        "seconds": seconds,
        "memory": memory_gib(),
        "bound": bound,
        "decoded": decoded,
        "products": decoded / bound + prompts / bounds.matrix_rate(model.dtype, model.device),
        "spent": spent,
    }


@torch.inference_mode()
def measure_transformers(args: argparse.Namespace, batch_size: int, count: int) -> dict:
    from transformers import AutoModelForCausalLM

    tokenizer, prompts = read_prompts(args)
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    eos = tokenizer.eos_ids
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    settings |= {"eos_token_id": eos, "pad_token_id": eos[0]}
    settings["max_new_tokens"] = args.max_new_tokens
    tokens = 0
    start = time.perf_counter()
    prompts = sorted(prompts[:count], key=len)
    for first in range(0, count, batch_size):
        batch = prompts[first : first + batch_size]
        T = max(map(len, batch))
        ids = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in batch])
        outputs = model.generate(ids, attention_mask=mask, **settings)
        for row in outputs[:, T:].tolist():
            ends = [i for i, token in enumerate(row) if token in eos]
            tokens += ends[0] if ends else len(row)
    return {"tokens": tokens, "seconds": time.perf_counter() - start, "memory": memory_gib()}


MEASURES = {"ours": measure_ours, "transformers": measure_transformers}


def memory_gib() -> float:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(name: str, batch_size: int, count: int) -> dict:
    """One measurement in a fresh process."""
    only = ["--only", name, str(batch_size), str(count)]
    command = [sys.executable, __file__, *sys.argv[1:], *only]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    result["rate"] = result["tokens"] / result["seconds"]
    text = (
        f"{result['tokens']:6,} tokens {result['rate']:7.1f} tokens/s {result['memory']:5.2f} GiB"
    )
    print(f"{name:>12} batch {batch_size:>3} {count:>4} rows {text}", flush=True)
    return result


def spread(values: list[float], form: str) -> str:
    """The smallest and the largest."""
    low = format(min(values), form)
    high = format(max(values), form)
    return low if low == high else f"{low} to {high}"


def compare(args: argparse.Namespace, batch_size: int, count: int):
    """Measures both in turn; prints the ratio of each round, our share of the bound, the memory."""
    ours = []
    theirs = []
    sizes = sorted({batch_size, -(-batch_size // 2)})
    for _ in range(args.rounds):
        ours.append(measure("ours", batch_size, count))
        tried = {size: measure("transformers", size, count) for size in sizes}
        sizes = [max(tried, key=lambda size: tried[size]["rate"])]
        theirs.append(tried[sizes[0]])
    ratios = [a["rate"] / b["rate"] for a, b in zip(ours, theirs)]
    shares = [a["rate"] / a["bound"] for a in ours]
    decoding = [a["decoded"] / a["spent"]["decode"] / a["bound"] for a in ours]
    noise = [a["spent"]["exponential_noise"] / a["seconds"] for a in ours]
    choosing = [a["spent"]["choose"] / a["seconds"] for a in ours]
    print(f"batch {batch_size}: {spread([a['rate'] for a in ours], '.1f')} tokens/s; ", end="")
    print(f"transformers, batch {sizes[0]}: {spread([a['rate'] for a in theirs], '.1f')}")
    print(f"  ratio {spread(ratios, '.2f')}; bound {ours[0]['bound']:.0f} tokens/s, of it ", end="")
    print(f"{spread(shares, '.0%')} with prefill, {spread(decoding, '.0%')} while decoding")
    print(f"  {bounds.distance(ours[-1]['products'], ours[-1]['seconds'])}")
    print(f"  of the time, choosing tokens {spread(choosing, '.1%')}, ", end="")
    print(f"its Gumbel noise {spread(noise, '.1%')}")
    print(f"  peak memory {max(a['memory'] for a in ours):.2f} GiB, ", end="")
    print(f"transformers {max(a['memory'] for a in theirs):.2f}")


def rehearse():
    """Runs everything on a tiny random model."""
    from conftest import PAIRS, write_jsonl, write_model, write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(write_model(Path(folder)))
        pairs = write_jsonl(Path(folder) / "pairs.jsonl", PAIRS)
        small = ["--max-new-tokens", "4", "--rows", "2", "--rounds", "1", "--batch-size", "1"]
        sys.argv[1:] = ["--model", folder, "--data", str(pairs), *small]
        main(parser().parse_args())


def main(args: argparse.Namespace):
    if args.only:
        name, batch_size, count = args.only
        print(json.dumps(MEASURES[name](args, int(batch_size), int(count))))
    elif args.smoke:
        rehearse()
    else:
        bounds.describe_machine(torch.device("cpu"))
        if args.batch_size > 1:
            compare(args, 1, min(args.rows, max(4, args.rows // 32)))
        compare(args, args.batch_size, args.rows)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Sampling speed next to transformers, and its bound.")
    add = p.add_argument
    add("--model", help="model folder")
    add("--data", nargs="+", help="pairs")
    add("--direction", nargs="+", default=[])
    add("--rows", type=int, default=256, help="at batch 1 a 32nd, at least 4 (default 256)")
    add("--rounds", type=int, default=1, help="(default 1)")
    add("--batch-size", type=int, default=64, help="(default 64)")
    add("--max-new-tokens", type=int, default=96, help="(default 96)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--smoke", action="store_true", help="a tiny random model, seconds")
    add("--only", nargs=3, help=argparse.SUPPRESS)
    return p


if __name__ == "__main__":
    main(parser().parse_args())
