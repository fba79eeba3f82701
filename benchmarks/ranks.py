"""Compares N ranks with one on your own machine: rationales, updates, a checkpoint, a resumed run.

    torchrun --nproc-per-node N benchmarks/ranks.py                        a tiny random model
    torchrun --nproc-per-node N benchmarks/ranks.py --model DIR --dtype bfloat16

The runs: `many` on N ranks; `one` on rank 0 alone, so the model must fit one GPU; `resumed`, which
was stopped and resumed on N ranks; `moved`, resumed on one. Losses and gradient norms must be equal
up to rounding, and so must rationales: else the exit status is 1.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from sentencepiece import SentencePieceTrainer
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import generate  # noqa: E402
import train  # noqa: E402
from model import ModelConfig, Transformer, start_processes  # noqa: E402

WORDS = "a boat waits in the harbor until wind turns and train to mountains leaves at seven".split()
CONFIG = """{"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "initializer_range": 0.1}"""
TEMPLATE = r'{"chat_template": "{{ bos_token }}{{ messages[0].content }}\n"}'
# of losses and norms, relative; share of equal rationales
TOLERANCES = {"float32": (1e-4, 1.0), "bfloat16": (0.02, 0.9)}


def write_inputs(folder: Path):
    """A tiny tokenizer, and pairs of unequal lengths: ranks get unequal numbers of tokens."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(CONFIG)
    (model / "tokenizer_config.json").write_text(TEMPLATE)
    (folder / "words").write_text("\n".join(WORDS * 9))
    SentencePieceTrainer.train(
        f"--input={folder}/words --model_prefix={model}/tokenizer --model_type=bpe "
        "--vocab_size=300 --byte_fallback=true --minloglevel=2"
    )
    rows = []
    for i in range(24):
        words = (WORDS[i % 7 :] * 3)[: 3 + i]
        texts = {"source": " ".join(words), "reference": " ".join(reversed(words))}
        rows.append(json.dumps(texts | {"source_lang": "de", "target_lang": "en"}))
    (folder / "pairs.jsonl").write_text("\n".join(rows))


def run(script, command: str):
    script.main(script.parser().parse_args(command.split()))


def run_until(step: int, command: str):
    """Trains until the last rank gets a SIGTERM after a step, which stops all ranks."""
    done = []

    def hook(*_):
        done.append(1)
        if len(done) == step and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    handle = register_optimizer_step_post_hook(hook)
    try:
        run(train, command)
    except SystemExit as ended:
        assert ended.code == 128 + signal.SIGTERM
    finally:
        handle.remove()


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def compare(out: Path, expected: Path) -> float:
    """Prints how far a run is from another, and its cost -> the largest relative difference."""
    lines = read_lines(out / "metrics.jsonl")
    difference = 0.0
    for line, other in zip(lines, read_lines(expected / "metrics.jsonl"), strict=True):
        for name in ("loss", "grad_norm"):
            difference = max(difference, abs(line[name] / other[name] - 1))
    speed = sum(x["tokens"] for x in lines[1:]) / sum(x["seconds"] for x in lines[1:])
    cost = f"{speed:,.0f} tokens/s, {lines[-1]['memory_gib']:.2f} GiB a rank"
    print(f"{out.name:8} {cost}; differs from `{expected.name}` by {difference:.0e}")
    return difference


def main(args):
    rank, _, _ = start_processes()
    place = Path(train.from_first_rank(tempfile.mkdtemp(dir=args.shared) if rank == 0 else ""))
    if rank == 0:
        write_inputs(place)
    dist.barrier()
    learner = Transformer(ModelConfig.from_file(place / "model"))
    learner.initialize(0)
    learner.save_pretrained(place / "model")
    model = args.model or place / "model"
    common = f"--model {model} --dtype {args.dtype} --batch-size 8"
    sampling = f"{common} --data {place}/pairs.jsonl --max-new-tokens 24"
    training = f"{common} --data {place}/many.jsonl --micro-batch-size 2 --max-steps 6"
    training += " --warmup-steps 0 --learning-rate 1e-4"
    run(generate, f"{sampling} --out {place}/many.jsonl")
    run(train, f"{training} --out {place}/many")
    run_until(3, f"{training} --out {place}/resumed")
    if rank == 0:
        shutil.copytree(place / "resumed", place / "moved")
    dist.barrier()
    run(train, f"{training} --out {place}/resumed --resume")
    dist.destroy_process_group()
    if rank > 0:
        return

    os.environ.pop("RANK", None)  # from here on a group of one
    run(generate, f"{sampling} --out {place}/one.jsonl")
    run(train, f"{training} --out {place}/one")
    run(train, f"{training} --out {place}/moved --resume")
    pairs = (("many", "one"), ("resumed", "many"), ("moved", "one"))
    worst = max(compare(place / name, place / other) for name, other in pairs)
    rows = zip(read_lines(place / "many.jsonl"), read_lines(place / "one.jsonl"), strict=True)
    same = [row["rationale_ids"] == other["rationale_ids"] for row, other in rows]
    print(f"generate.py: {sum(same)} of {len(same)} rationales are equal")
    shutil.rmtree(place)
    tolerance, share = TOLERANCES[args.dtype]
    if worst > tolerance or sum(same) < share * len(same):
        sys.exit("error: these are not equal up to rounding")


OPTIONS = """
--model DIR      model folder (default: a tiny one with random weights)
--shared DIR     folder for temporary files, which all ranks see (default: that of the system)
--dtype float32|bfloat16   type of the computation
"""


def parser():
    return data.make_parser("Compares N ranks with one.", OPTIONS)


if __name__ == "__main__":
    data.cli(main, parser())
