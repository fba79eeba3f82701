"""The study behind the demo: seeds x learning rates x arms, each arm a curve of exports.

    python demo/study.py --out DIR --seeds 0 1 2 --rates 1e-3 2e-3      the same command goes on where it was stopped
    python demo/study.py --out DIR --table                              the table of what is there

A seed is a world, a base model and its rationales; the arms start from that base with the same steps, batch and rate.
The commands are those of the demo, run one after another in this process, which spares the start of each. Finished
results are appended to DIR/results.jsonl, a line an export.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import os
import random
import statistics
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

import world  # noqa: E402

import demo  # noqa: E402
import evaluate  # noqa: E402
import generate  # noqa: E402
import train  # noqa: E402

# arm -> its data and flags of train.py. Replay sees what nobody has outside of an experiment: the base model's own data
ARMS = {
    "vanilla": ("rationales", "--rationale-weight 0"),
    "radis": ("rationales", ""),
    "shuffled": ("shuffled", ""),
    "replay": ("rationales replay", "--rationale-weight 0"),
    "interpolation": None,
    "weight 0.33": ("rationales", "--rationale-weight 0.33"),
    "weight 2": ("rationales", "--rationale-weight 2"),
    "coverage 0.5": ("rationales", "--rationale-coverage 0.5"),
    "coverage 0.25": ("rationales", "--rationale-coverage 0.25"),
    "seqkd": ("seqkd", ""),
}
TOUCHED = ("acc/facts", "acc/meaning")  # what the rationales of this world speak of
T95 = [math.nan, math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # Student's t by number of seeds


def call(script, log: Path, *words) -> None:
    """What `python SCRIPT WORDS` does, in this process."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        script.main(script.parser().parse_args([str(word) for word in words]))
    gc.collect()  # models hold themselves in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def prepare(args, seed: int) -> Path:
    """World, base model, rationales, and what some arms need besides, in DIR/SEED, which becomes the working folder."""
    folder = args.out / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    if not Path("start").exists():
        world.write_world(Path("."), seed, **demo.SIZES)
    if not Path("base/config.json").exists():
        words = [*demo.BASE, "--max-steps", demo.BASE_STEPS, "--seed", seed, "--save-every", 200] + ["--resume"] * Path(
            "base"
        ).exists()
        call(train, Path("logs/base.log"), *words)
    call(generate, Path("logs/rationales.log"), *demo.RATIONALES, "--seed", seed)
    if "seqkd" in args.arms:
        words = [*demo.RATIONALES, "--out", "seqkd.jsonl", "--seed", seed, "--task", "translation"]
        call(generate, Path("logs/seqkd.log"), *words)
    rows, rng = lines(Path("rationales.jsonl")), random.Random(seed)
    shuffle(Path("."), rng)
    world.write(Path("replay.jsonl"), rng.sample(lines(Path("chats.jsonl")), len(rows) // 10))
    return folder


def shuffle(folder: Path, rng: random.Random) -> None:
    """rationales.jsonl with the rationales of other rows -> shuffled.jsonl"""
    rows, names = lines(folder / "rationales.jsonl"), ("rationale", "rationale_ids", "finish", "status")
    others = rng.sample(rows, len(rows))
    world.write(folder / "shuffled.jsonl", [row | {n: other[n] for n in names} for row, other in zip(rows, others)])
    (folder / "shuffled.meta.json").write_text((folder / "rationales.meta.json").read_text())


def models(arm: str, rate: str, seed: int) -> list[tuple[float, Path]]:
    """Trains an arm, unless that is done -> its exports, by how much of the way they have gone."""
    out = Path(f"{arm} {rate}".replace(" ", "-"))
    if ARMS[arm] is None:
        return [(part, interpolate(Path(f"vanilla-{rate}"), out / f"step-{part}", part)) for part in (0.25, 0.5, 0.75)]
    files, flags = ARMS[arm]
    if not (out / "config.json").exists():
        rows = [f"{name}.jsonl" for name in files.split()]
        words = ["--data", *rows, *flags.split(), "--out", out, "--seed", seed, "--learning-rate", rate]
        words += ["--max-steps", demo.EXPORTS[-1], "--export-every", demo.EXPORTS[0]] + ["--resume"] * out.exists()
        call(train, Path(f"logs/{out}.log"), *demo.TUNE, *words)
    return [(step / demo.EXPORTS[-1], out / f"step-{step}") for step in demo.EXPORTS]


def interpolate(tuned: Path, out: Path, part: float) -> Path:
    """A model whose weights lie between base and `tuned` (WiSE-FT, Wortsman et al. 2022)."""
    out.mkdir(parents=True, exist_ok=True)
    for file in tuned.glob("*token*"):
        (out / file.name).write_bytes(file.read_bytes())
    (out / "config.json").write_text((tuned / "config.json").read_text())
    a, b = (load_file(folder / "model.safetensors") for folder in (Path("base"), tuned))
    save_file({name: torch.lerp(a[name], b[name], part) for name in a}, out / "model.safetensors", {"format": "pt"})
    return out


def measure(model: Path) -> dict[str, float]:
    """Values of all measures, in percent and so that more is better."""
    call(evaluate, Path("logs/evaluate.log"), "--model", model, "--out", f"results/{model}", *demo.TESTS)
    found = json.loads(Path(f"results/{model}/results.json").read_text())["measures"]
    values = {name: found[name]["value"] for name in found if name.split("/")[0] in ("bleu", "chrf++")}
    abilities = [name for name in found if name.split("/")[0] in ("acc", "flexible", "refusal")]
    return values | {
        n: 100 * (1 - found[n]["value"] if n == "refusal/benign" else found[n]["value"]) for n in abilities
    }


def run(args) -> None:
    """Everything that is missing, in an order in which the first half of the time gives the main comparison."""
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    done = {(row["seed"], row["rate"], row["arm"]) for row in lines(results)}
    for group in (args.arms[:4], args.arms[4:]):
        for rate in args.rates:
            for seed in args.seeds:
                todo = [arm for arm in group if (seed, rate, arm) not in done]
                if not todo:
                    continue
                prepare(args, seed)
                base = measure(Path("base"))
                for arm in todo:
                    points = [(0.0, base)] + [(part, measure(model)) for part, model in models(arm, rate, seed)]
                    rows = [dict(seed=seed, rate=rate, arm=arm, part=part, measures=values) for part, values in points]
                    with open(results, "a") as f:
                        f.writelines(json.dumps(row) + "\n" for row in rows)
                    print(f"seed {seed}, rate {rate}, {arm}: done", flush=True)


def ability(measures: dict, touched: bool) -> float:
    """Mean of the skills that the rationales speak of, or of the others."""
    skills = [m for m in measures if not m.startswith(("bleu", "chrf"))]
    return statistics.mean(measures[m] for m in skills if (m in TOUCHED) == touched)


def read_at(path: list[tuple[float, float]], x: float) -> float:
    """Ability where a path of (translation, ability), base first, first comes to the translation x; NaN if nowhere."""
    for (x0, y0), (x1, y1) in zip(path, path[1:]):
        if min(x0, x1) <= x <= max(x0, x1):
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0 or 1)
    return math.nan


def interval(by_seed: dict) -> str:
    """Mean over seeds and its 95 % interval (Student's t)."""
    values = [statistics.mean(v) for v in by_seed.values() if not any(map(math.isnan, v))]
    if not values:
        return "-"
    half = T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.1f} ± {half:.1f}" + f" ({len(values)})" * (len(values) < len(by_seed))


def table(args) -> None:
    """Each arm at its end, and its advantage over vanilla where vanilla translates equally well.

    Vanilla of the same rate, and of the rate that keeps most there: a choice after the fact, which favours vanilla.
    """
    curves = {}
    for row in lines(args.out / "results.jsonl"):
        curves.setdefault((row["seed"], row["rate"], row["arm"]), []).append(row["measures"])
    skills = ("touched", "untouched")
    names = ["BLEU", *skills, *(f"{s}, over {kind}" for kind in ("vanilla", "best vanilla") for s in skills)]
    print(f"| rate | arm | seeds | {' | '.join(names)} |\n|---|---|" + "---:|" * 8)
    arms = [("base", "base")] + [(rate, arm) for rate in args.rates for arm in ARMS]
    for rate, arm in arms:
        columns = [{} for _ in names]
        for (seed, r, a), curve in curves.items():
            if (r, a) != (rate, arm) and (arm != "base" or a != "vanilla"):
                continue
            end = curve[0] if arm == "base" else curve[-1]
            found, reached = [end["bleu/translation"], ability(end, True), ability(end, False)], end["bleu/translation"]
            for rates, touched in itertools.product([[r], args.rates], (True, False)):
                vanilla = [curves.get((seed, rate, "vanilla"), []) for rate in rates]
                paths = [[(m["bleu/translation"], ability(m, touched)) for m in curve] for curve in vanilla]
                kept = [y for y in (read_at(path, reached) for path in paths) if not math.isnan(y)]
                found.append(ability(end, touched) - max(kept, default=math.nan))
            for column, x in zip(columns, found):
                column.setdefault(seed, []).append(x)
        if columns[0]:
            print(f"| {rate} | {arm} | {len(columns[0])} | " + " | ".join(map(interval, columns)) + " |")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Seeds x learning rates x arms of the demo, and the table of the results.")
    p.add_argument("--out", type=Path, required=True, help="folder for everything")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    p.add_argument("--rates", nargs="+", default=["1e-3"], help="learning rates (default 1e-3)")
    p.add_argument("--arms", nargs="+", default=[*ARMS], choices=ARMS, help="default: all")
    p.add_argument("--table", action="store_true", help="only print the table of what is there")
    return p


if __name__ == "__main__":
    args = parser().parse_args()
    args.out = args.out.resolve()
    if not args.table:
        run(args)
    table(args)
