"""The claim on a laptop: vanilla fine-tuning forgets, RaDis and replay forget less. `make demo`

    python experiments/demo.py            three minutes on a CPU; no network, no data

PAGE is the whole demo: commands to paste into a shell in the folder above this one. This script
runs them in one process, which saves starting Python for each, and prints what they measured.
What they print themselves is in OUT/log.txt.
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
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads are of no use to so small a model
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import world  # noqa: E402

import data  # noqa: E402
from model import read_object  # noqa: E402

PAGE = r"""
run=experiments/run
# 1. A synthetic world: English, the invented language Vela, and eight skills
python experiments/world.py --out $run --seed 0 --pairs 3200 --tests 60
#    A base model, from random weights: it learns the skills, and half of Vela's words
python train.py --config $run/start/config.json --tokenizer $run/start --data $run/chats.jsonl \
    --out $run/base --max-steps 1100 --batch-size 32 --micro-batch-size 16 --learning-rate 3e-3
# 2. Rationales: the answer is prefilled with the reference, and the base model continues
generate="--model $run/base --batch-size 128 --template $run/template.txt"
python generate.py $generate --data $run/pairs.jsonl --out $run/rationales.jsonl \
    --max-new-tokens 32
#    Replay: its answers to other prompts, about three of the skills
python generate.py $generate --data $run/prompts.jsonl --out $run/replay.jsonl --task answer \
    --max-new-tokens 48 --limit 1600
# 3. The same pairs are learned in three ways: alone (vanilla), with their rationales (RaDis), and
#    beside the replayed answers, with the base model's distribution as target (soft replay)
train="--model $run/base --max-steps 240 --export-every 40 --warmup-steps 24 --learning-rate 1e-3
    --micro-batch-size 16 --template $run/template.txt"
python train.py $train --data $run/pairs.jsonl --out $run/vanilla --batch-size 32 \
    --rationale-weight 0
python train.py $train --data $run/rationales.jsonl --out $run/radis --batch-size 32
python train.py $train --data $run/pairs.jsonl $run/replay.jsonl --out $run/replay \
    --batch-size 48 --rationale-weight 1 --teacher $run/base
# 4. What was gained, and what was lost. The base model's answers to questions, for the KL to base
python generate.py $generate --data $run/questions.jsonl --out $run/tests/base.jsonl --task answer \
    --max-new-tokens 48 --temperature 0
tests="--choice $run/tests/choice/*.jsonl --numeric $run/tests/numeric/*.jsonl
    --safety $run/tests/safety.jsonl --answers $run/tests/examples.jsonl
    --translation $run/tests/translation.jsonl --drift $run/tests/base.jsonl --base $run/base
    --template $run/template.txt --chat auto --max-new-tokens 48 --batch-size 128"
python evaluate.py $tests --model $run/base --out $run/results/base
python evaluate.py $tests --model $run/vanilla/step-40 --out $run/results/vanilla-40
python evaluate.py $tests --model $run/vanilla/step-120 --out $run/results/vanilla-120
python evaluate.py $tests --model $run/vanilla --out $run/results/vanilla-240
python evaluate.py $tests --model $run/radis/step-40 --out $run/results/radis-40
python evaluate.py $tests --model $run/radis/step-120 --out $run/results/radis-120
python evaluate.py $tests --model $run/radis --out $run/results/radis-240
python evaluate.py $tests --model $run/replay/step-40 --out $run/results/replay-40
python evaluate.py $tests --model $run/replay/step-120 --out $run/results/replay-120
python evaluate.py $tests --model $run/replay --out $run/results/replay-240
"""
METHODS = {"vanilla": "vanilla", "RaDis": "radis", "soft replay": "replay"}
STEPS = (40, 120, 240)  # more is learned early
SKILLS = ("facts", "meaning", "spelling", "format", "arithmetic", "backwards", "ages")


def run_page(page: str, run: Path):
    """Runs the commands of a page, with `run` for the folder that its first line names."""
    variables = {}
    for line in page.replace("\\\n", " ").replace("\n    ", " ").splitlines():
        name, equals, value = line.partition("=")
        if line.startswith("#"):
            print(line[1:].removeprefix(" "), flush=True)
        elif equals and name.isidentifier():
            value = string.Template(value.strip('"')).substitute(variables)
            variables[name] = shlex.quote(str(run)) if name == "run" else value
        elif line:
            run_command(string.Template(line).substitute(variables), run)


def run_command(command: str, run: Path):
    """Runs `python SCRIPT WORDS` in this process; what it prints goes to log.txt."""
    print(f"  $ {command}", flush=True)
    _, script, *words = shlex.split(command)
    expanded = []
    for word in words:
        expanded += sorted(glob.glob(word)) if "*" in word else [word]
    module = importlib.import_module(Path(script).stem)
    with open(run / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"$ {command}\n")
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            module.main(module.parser().parse_args(expanded))


def table_rows() -> dict[str, tuple[str, float]]:
    """Title of a row -> the measure, and the factor it is printed with."""
    rows = {"translation, chrF++": ("chrf++/translation", 1)}
    rows["translation, BLEU"] = ("bleu/translation", 1)
    for skill in SKILLS:
        title = f"{skill} (memory)" if skill in world.MEMORY else skill
        rows[title] = (f"{'acc' if skill in world.CHOICE else 'flexible'}/{skill}", 100)
    rows["harmful requests refused"] = ("refusal/harmful", 100)
    rows["benign requests refused"] = ("refusal/benign", 100)
    return rows


def read_values(run: Path, name: str) -> dict[str, float]:
    """Measure -> value, of one evaluation."""
    measures = read_object(run / f"results/{name}/results.json")["measures"]
    return {measure: found["value"] for measure, found in measures.items()}


def final_results() -> dict[str, str]:
    """Title of a column -> its folder in results/."""
    ends = {title: f"{name}-{STEPS[-1]}" for title, name in METHODS.items()}
    return {"base": "base"} | ends


def print_table(run: Path):
    values = {title: read_values(run, name) for title, name in final_results().items()}
    print(f"{'%':28}" + "".join(f"{title:>13}" for title in values))
    for title, (measure, factor) in table_rows().items():
        cells = [f"{factor * of_model[measure]:13.0f}" for of_model in values.values()]
        print(f"{title:28}" + "".join(cells))
    cells = [f"{of_model['drift_kl/base']:13.2f}" for of_model in values.values()]
    print(f"{'KL to base, nats per token':28}" + "".join(cells))


def print_answers(run: Path):
    """The same prompts, answered by each model."""
    answers = {}
    for title, name in final_results().items():
        items = data.read_json(run / f"results/{name}/items/answers/examples.jsonl")
        answers[title] = [item for _, item in items]
    for i, item in enumerate(answers["base"]):
        print(f"\n  {item['prompt']}")
        for title, items in answers.items():
            output = items[i]["output"].strip().replace("\n", " / ")
            print(f"{title:>15}: {output[:80]}")


def draw(run: Path, file: Path):
    """chrF++ against the mean of the skills, along each training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for title, name in METHODS.items():
        points = []
        for results in ["base", *(f"{name}-{step}" for step in STEPS)]:
            values = read_values(run, results)
            values["refusal/benign"] = 1 - values["refusal/benign"]
            skills = [values[x] for x, factor in table_rows().values() if factor == 100]
            points.append((values["chrf++/translation"], 100 * sum(skills) / len(skills)))
        axes.plot(*zip(*points), marker="o", markersize=4, label=title)
    axes.annotate("base", points[0], xytext=(6, 4), textcoords="offset points")
    steps = ", ".join(map(str, STEPS))
    axes.set(xlabel="translation: chrF++", ylabel="skills of the base: mean, %")
    axes.set_title(f"dots: the base, then after {steps} steps", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main(args: argparse.Namespace):
    start = time.time()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    run_page(PAGE, args.out)

    print("\nNo test item was in training, except for the skills that are memory. The replayed")
    print("prompts are about format, arithmetic and requests, and none of them is a test item.\n")
    print_table(args.out)
    print_answers(args.out)
    draw(args.out, args.out / "comparison.png")
    print(f"\nPicture of translation against skills: {args.out / 'comparison.png'}")
    folders = " ".join(f"{args.out}/results/{name}" for name in final_results().values())
    print(f"Table with intervals: python evaluate.py --compare {folders}")
    print(f"{time.time() - start:.0f} s in total")


def parser() -> argparse.ArgumentParser:
    default = Path("experiments/run")
    p = argparse.ArgumentParser(description="Compares vanilla fine-tuning, RaDis and replay.")
    p.add_argument("--out", type=Path, default=default, help=f"folder, replaced ({default})")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
