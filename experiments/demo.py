"""The claim on a laptop: vanilla fine-tuning forgets, RaDis and replay forget less. `make demo`

    python experiments/demo.py            on a CPU; no network, no data

PAGE is the whole demo: commands to paste into a shell, in the folder above this one. This script
runs them in two processes, which saves starting Python for each, and prints what was measured.
"""

import argparse
import contextlib
import glob
import importlib
import os
import shlex
import shutil
import string
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads are of no use to so small a model
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import world  # noqa: E402

import data  # noqa: E402
from model import read_object  # noqa: E402

PAGE = r"""
run=experiments/run
# 1. A synthetic world: English, the invented language Vela, and eight skills
python experiments/world.py --out $run --seed 0 --pairs 3200 --tests 60
#    A base model, from random weights: it learns the skills, and half of Vela's words
python train.py --config $run/start/config.json --tokenizer $run/start --data $run/chats.jsonl \
    --out $run/base --max-steps 1100 --batch-size 32 --micro-batch-size 32 --learning-rate 3e-3
# 2. Rationales: the answer is prefilled with the reference, and the base model continues
base="--model $run/base --batch-size 128 --template $run/template.txt"
python generate.py $base --data $run/pairs.jsonl --out $run/rationales.jsonl --cue '\n' \
    --max-new-tokens 32 &
#    For replay it answers other prompts, about three of the skills
python generate.py $base --data $run/prompts.jsonl --out $run/replay.jsonl --task answer \
    --max-new-tokens 48 --limit 1600 &
wait
python data.py --model $run/base --data $run/rationales.jsonl --show 2
# 3. Three trainings on the same pairs: with their rationales (RaDis); with the replayed answers,
#    by the base model's distribution, at equal mean losses (soft replay); alone (vanilla)
train="--model $run/base --max-steps 240 --export-every 40 --warmup-steps 24 --learning-rate 1e-3
    --micro-batch-size 48 --template $run/template.txt"
python train.py $train --data $run/rationales.jsonl --out $run/radis --batch-size 32 &
python train.py $train --data $run/pairs.jsonl $run/replay.jsonl --out $run/replay \
    --batch-size 48 --teacher $run/base --rationale-weight 1.6 &
python train.py $train --data $run/pairs.jsonl --out $run/vanilla --batch-size 32 \
    --rationale-weight 0 &
# 4. What was gained and what was lost, along the trainings. No test item was in training, except
#    for the skills that are memory; none of the replayed prompts is a test item
python generate.py $base --data $run/general.jsonl --out $run/tests/general.jsonl --task answer \
    --max-new-tokens 48 --temperature 0
tests="--choice $run/tests/choice/*.jsonl --numeric $run/tests/numeric/*.jsonl
    --safety $run/tests/safety.jsonl --answers $run/tests/examples.jsonl
    --translation $run/tests/test-vela.jsonl --drift $run/tests/general.jsonl --base $run/base
    --template $run/template.txt --chat auto --max-new-tokens 48 --batch-size 128"
python evaluate.py $tests --model $run/base --out $run/results/base
wait
python evaluate.py $tests --model $run/vanilla/step-40 --out $run/results/vanilla-40 &
python evaluate.py $tests --model $run/vanilla/step-120 --out $run/results/vanilla-120 &
python evaluate.py $tests --model $run/vanilla --out $run/results/vanilla-240 &
python evaluate.py $tests --model $run/radis/step-40 --out $run/results/radis-40 &
python evaluate.py $tests --model $run/radis/step-120 --out $run/results/radis-120 &
python evaluate.py $tests --model $run/radis --out $run/results/radis-240 &
python evaluate.py $tests --model $run/replay/step-40 --out $run/results/replay-40 &
python evaluate.py $tests --model $run/replay/step-120 --out $run/results/replay-120 &
python evaluate.py $tests --model $run/replay --out $run/results/replay-240 &
wait
"""
# columns of the table: title -> folder of results
COLUMNS = {"base": "base", "vanilla": "vanilla-240", "RaDis": "radis-240"}
COLUMNS |= {"soft replay": "replay-240"}
# rows of the table: title -> score, and its factor
ROWS = {f"translation, {name}": (f"{name.lower()}/test-vela", 1) for name in ("chrF++", "BLEU")}
ROWS |= {skill: (f"acc/{skill}", 100) for skill in world.CHOICE}
ROWS |= {skill: (f"flexible/{skill}", 100) for skill in world.NUMERIC}
ROWS |= {f"{kind} requests refused": (f"refusal/{kind}", 100) for kind in ("harmful", "benign")}
ROWS |= {"KL to base, 0.01 nats per token": ("drift_kl/general", 100)}


def run_page(page: str, run: Path):
    """Runs the commands of a page, with the folder `run` in place of experiments/run."""
    variables = {}
    pool = ProcessPoolExecutor(2, get_context("spawn"))  # torch's threads do not survive a fork
    jobs = []
    for line in page.replace("\\\n", " ").replace("\n    ", " ").strip().splitlines():
        if line.startswith("#"):
            print(("\n" if line[2].isdigit() else "") + line[2:], flush=True)
            continue
        print("  $", *line.split(), flush=True)
        name, equals, value = line.partition("=")
        filled = string.Template(line).safe_substitute(variables)
        if equals and name.isidentifier():
            variables[name] = filled.partition("=")[2].strip('"')
            variables["run"] = shlex.quote(str(run))
        elif line == "wait":
            for job in jobs:
                job.result()
        else:
            words = shlex.split(filled.removesuffix(" &"))
            jobs.append(pool.submit(run_command, words, run / "log.txt"))
            if not line.endswith(" &"):
                jobs[-1].result()


def run_command(words: list[str], log: Path):
    """Runs `python SCRIPT WORDS` in this process; only data.py prints to the screen."""
    expanded = []
    for word in words[2:]:
        expanded += sorted(glob.glob(word)) if "*" in word else [word]
    module = importlib.import_module(Path(words[1]).stem)
    with open(log, "a", encoding="utf-8") as f:
        out = sys.stdout if module is data else f
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(f):
            module.main(module.parser().parse_args(expanded))


def read_column(results: Path) -> list[float]:
    measures = read_object(results / "results.json")["measures"]
    return [factor * measures[score]["value"] for score, factor in ROWS.values()]


def print_table(results: Path):
    print(f"\n{'%':30}" + "".join(f"{title:>12}" for title in COLUMNS))
    columns = [read_column(results / name) for name in COLUMNS.values()]
    for title, values in zip(ROWS, zip(*columns)):
        memory = " (memory)" if title in world.MEMORY else ""
        print(f"{title + memory:30}" + "".join(f"{value:12.0f}" for value in values))


def print_answers(results: Path):
    """The same prompts, answered by each model."""
    files = [results / name / "items/answers/examples.jsonl" for name in COLUMNS.values()]
    answers = map(data.read_json, files)
    for items in zip(*answers):
        print(f"\n  {items[0][1]['prompt']}")
        for title, (_, item) in zip(COLUMNS, items):
            output = item["output"].strip().replace("\n", " / ")
            print(f"{title:>15}: {output[:80]}")


def draw(results: Path, file: Path):
    """chrF++ against the mean of the skills: the base, and after 40, 120 and 240 steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for title, name in [*COLUMNS.items()][1:]:
        names = ["base", *(name.replace("240", step) for step in ("40", "120", "240"))]
        columns = [read_column(results / name) for name in names]
        chrf = [column[0] for column in columns]
        skills = [np.mean([*column[2:10], 100 - column[10]]) for column in columns]
        axes.plot(chrf, skills, marker="o", markersize=4, label=title)
    axes.annotate("base", (chrf[0], skills[0]), xytext=(6, 4), textcoords="offset points")
    axes.set(xlabel="translation: chrF++", ylabel="the base's skills: mean, %")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main(args: argparse.Namespace):
    start = time.time()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    run_page(PAGE, args.out)
    results = args.out / "results"
    print_table(results)
    print_answers(results)
    draw(results, args.out / "comparison.png")
    folders = " ".join(str(results / name) for name in COLUMNS.values())
    print(f"\nTable with intervals: python evaluate.py --compare {folders}")
    print(f"Picture: {args.out}/comparison.png\n{time.time() - start:.0f} s in total")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Compares vanilla fine-tuning, RaDis and replay.")
    p.add_argument("--out", type=Path, default="experiments/run", help="folder, replaced")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
