"""The experiment on the models and languages of the paper: two 7B models, de cs zh ru, both ways.

    python experiments/prompts.py --out prompts.jsonl --count 30000
    python experiments/seven_b.py --models Llama-2-7b-chat-hf Mistral-7B-Instruct-v0.2 \\
        --alma ALMA/human_written_data --out 7b --ranks 8 --prompts prompts.jsonl \\
        --drift vicuna.jsonl --human human.jsonl --choice blimp.jsonl piqa.jsonl bbh.jsonl
    python experiments/seven_b.py ... --forecast         only says what it will take

`--alma` has ALMA's layout: deen/train.de-en.json, valid.de-en.json, test.de-en.json and
test.en-de.json, and so on. All other arguments are those of arms.py, which runs it all.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import arms  # noqa: E402
import torch  # noqa: E402
import world  # noqa: E402

import data  # noqa: E402
from data import Encoder, Tokenizer, require  # noqa: E402
from model import ModelConfig, Transformer, read_object  # noqa: E402

LANGUAGES = ("de", "cs", "zh", "ru")
# peak learning rates that vanilla is tried at; Mistral wants smaller ones
RATES = {"llama": ["1e-5", "2e-5"], "mistral": ["5e-6", "1e-5"]}
PLAN = """--points 220 440 880 --batch-size 128 --answers 16 --micro-batch-size 8 --tests 512
    --new-tokens 128 --answer-tokens 256 --rows 128 --dtype bfloat16""".split()
# of one H100. The share of its peak that training gets is assumed, the rate of sampling was
# measured with random weights (benchmarks/README.md)
PEAK_FLOPS = 989e12
TRAINING_SHARE = 0.4
READING_SHARE = 0.5
SAMPLED_TOKENS_S = 8900
LOADING_S = 120  # to read a model and start, on all GPUs at once; assumed


def write_pairs(alma: Path, out: Path) -> dict[str, list[Path]]:
    """ALMA's files as pairs with their languages -> files by the arguments of arms.py."""
    files = {"pairs": [], "valid": [], "test": []}
    for language in LANGUAGES:
        folder = alma / f"{language}en"
        if not folder.exists():
            continue
        both = [f"{language}-en", f"en-{language}"]
        for kind, name in (("pairs", "train"), ("valid", "valid")):
            files[kind].append(copy_pairs(folder / f"{name}.{language}-en.json", both, out))
        for way in both:
            files["test"].append(copy_pairs(folder / f"test.{way}.json", [way], out))
    require(files["pairs"], alma, "holds none of " + ", ".join(f"{x}en/" for x in LANGUAGES))
    return files


def copy_pairs(file: Path, ways: list, out: Path) -> Path:
    """One file, each pair once for each way."""
    names = ("source", "reference", "source_lang", "target_lang")
    rows = []
    for row in data.read_rows([file], ways):
        rows.append({name: row[name] for name in names})
    copy = out / f"{file.stem}.jsonl"
    world.write(copy, rows)
    return copy


def forecast(args: argparse.Namespace):
    """Prints what the runs of one model take, computed from its size and the data."""
    config = ModelConfig.from_file(args.model / "config.json")
    with torch.device("meta"):
        weights = sum(p.numel() for p in Transformer(config).parameters())
    tokenizer = Tokenizer(args.model, args.chat or "auto")
    rows = data.read_rows(args.pairs)
    sample = rows[:: max(1, len(rows) // 200)]
    lengths = [len(Encoder(tokenizer).example(row)) for row in sample]
    count = arms.steps(args) * args.batch_size
    pair = sum(lengths) / len(lengths)
    hours = {}
    for name in args.arms:
        arm = arms.ARMS[name]
        rationale = args.new_tokens if arm.data not in ("pairs", "bare") else 0
        replayed = arms.rows_replayed(args, arm.replay, count)
        tokens = count * (pair + rationale) + replayed * 1.2 * args.answer_tokens
        # backward and forward, and the forward once more for the activations
        seconds = 8 * weights * tokens / (TRAINING_SHARE * PEAK_FLOPS)
        if arm.soft:
            seconds += 2 * weights * tokens / (READING_SHARE * PEAK_FLOPS)
        hours[name] = seconds / 3600
    most = max(arms.ARMS[name].replay for name in args.arms)
    written = count * args.new_tokens
    written += arms.rows_replayed(args, most, count) * args.answer_tokens
    translated = args.tests * len(args.test) + args.tests / 2 * len(args.test)
    general = args.general * (len(args.drift) + 1)
    seconds = (translated * pair + general * args.answer_tokens) / SAMPLED_TOKENS_S
    measured = (seconds + LOADING_S * max(args.ranks, 1)) / 3600
    points = len(args.points) + len(args.parts)
    runs = len(args.seeds) * len(args.rates)
    print(f"{args.model.name}: {weights / 1e9:.2f} B parameters, {count:,} pairs a run, computed:")
    for name, value in hours.items():
        print(f"  {name:26} {value:6.1f} GPU hours of training, {points * measured:.1f} measuring")
    total = runs * (sum(hours.values()) + len(hours) * points * measured)
    total += len(args.seeds) * written / SAMPLED_TOKENS_S / 3600
    ranks = max(args.ranks, 1)
    # weights, gradients and both moments in float32; the teacher in bfloat16
    memory = (16 + 2) * weights / ranks / 2**30
    print(f"  all: {total:.0f} GPU hours, {total / ranks:.0f} hours on {ranks} GPUs")
    print(f"  memory: {memory:.0f} GiB a GPU besides activations (see benchmarks/memory.py)")


def settings_of(model: Path, files: dict, out: Path, rest: list) -> argparse.Namespace:
    """The arguments of arms.py for one model."""
    kind = read_object(model / "config.json").get("model_type", "llama")
    words = [*PLAN, "--rates", *RATES.get(kind, RATES["llama"]), "--model", model]
    for name, paths in files.items():
        words += [f"--{name}", *paths]
    words += [*rest, "--out", out / model.name, "--train-flags", "--activation-checkpointing"]
    return arms.parser().parse_args([str(word) for word in words])


def main(args: argparse.Namespace):
    files = write_pairs(args.alma, args.out / "pairs")
    for model in args.models:
        settings = settings_of(model.resolve(), files, args.out, args.rest)
        if args.forecast:
            forecast(arms.settle(settings))
        else:
            arms.main(settings)


def parser() -> argparse.ArgumentParser:
    p = data.Arguments(description="The experiment on two 7B models; the rest goes to arms.py.")
    p.add_argument("--models", type=Path, nargs="+", required=True, help="model folders")
    p.add_argument("--alma", type=Path, required=True, help="folder of deen/, csen/, ...")
    p.add_argument("--out", type=Path, required=True, help="folder for everything")
    p.add_argument("--forecast", action="store_true", help="only say what it will take")
    return p


def parse(words: list | None = None) -> argparse.Namespace:
    args, rest = parser().parse_known_args(words)
    args.rest = rest
    return args


class Words:
    """What data.cli asks for arguments: known ones, and those of arms.py."""

    parse_args = staticmethod(parse)


if __name__ == "__main__":
    data.cli(main, Words)
