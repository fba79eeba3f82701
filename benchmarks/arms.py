"""Ways of fine-tuning compared as curves: what is kept, read where the translations are equally good.

    python benchmarks/arms.py --model DIR --pairs train.jsonl --test test.jsonl --general prompts.jsonl \
                              --drift vicuna.jsonl --choice piqa.jsonl bbh.jsonl --out DIR --seeds 0 1 --rates 3e-5 1e-4
    python benchmarks/arms.py --out DIR --table --plot arms.png

For each seed the model writes its rationales, translations, paraphrases and answers; each arm starts from the model
with the same steps, batch and rate, and is measured at several steps. The same command goes on with what is missing.
"""

import argparse
import multiprocessing
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from study import call, shuffle  # noqa: E402

import evaluate  # noqa: E402
import generate  # noqa: E402
import train  # noqa: E402

# arm -> its data and flags of train.py
ARMS = {
    "vanilla": ("rationales", "--rationale-weight 0"),
    "RaDis": ("rationales", ""),
    "vanilla + replay": ("rationales replay", "--rationale-weight 0"),
    "RaDis + replay": ("rationales replay", ""),
    "SeqKD": ("translation", ""),
    "SDFT": ("paraphrase", ""),
    "shuffled rationales": ("shuffled", ""),
    "coverage 0.5": ("rationales", "--rationale-coverage 0.5"),
    "coverage 0.25": ("rationales", "--rationale-coverage 0.25"),
    "weight 0.33": ("rationales", "--rationale-weight 0.33"),
    "weight 2": ("rationales", "--rationale-weight 2"),
}
STEPS, EVERY, POINTS = 128, 16, (16, 32, 64, 96, 128)
# measures of evaluate.py, averaged over files and tasks: factor, digits
MEASURES = {"chrf++": (1, 1), "bleu": (1, 1), "drift_kl": (1, 3), "drift_nll": (1, 3), "drift_length": (1, 0)}
MEASURES |= {"acc": (100, 1)}
TUNE = f"--batch-size 16 --micro-batch-size 16 --schedule constant --warmup-steps 2 --max-steps {STEPS} --save-every 0"
DIRECTION = "--direction de-en"


def ledger(args, seed: int, task: str) -> None:
    """A ledger that `generate.py` writes, into DIR/SEED; `drift` and `replay` are answers."""
    folder, options = args.out / str(seed), f"--seed {seed} --batch-size {args.rows} --dtype float32"
    if task in ("drift", "replay"):
        file = args.drift if task == "drift" else args.general
        options += " --task answer --max-new-tokens 128"
        folder = args.out if task == "drift" else folder  # one for all seeds: the tests are the same
    else:
        file, options = args.pairs, f"{options} {DIRECTION} --max-new-tokens 64 --top-p 0.95"
        options += " --task " + ("rationale" if task == "rationales" else task)
    cue = ["--cue", "\\n"] if task == "rationales" else []
    words = ["--model", args.model, "--data", file, "--out", folder / f"{task}.jsonl", *cue]
    call(generate, args.out / "logs" / f"{task}-{seed}.log", *options.split(), *words)
    if task == "rationales":
        shuffle(folder, random.Random(seed))


def measure(args, model: Path, name: str) -> np.ndarray:
    """[measures, 1 + resamples]: the value of each of MEASURES, and its bootstrap draws over the test items."""
    out = args.out / "results" / name
    words = ["--model", model, "--out", out, "--translation", args.test, "--drift", args.out / "drift.jsonl"]
    options = f"{DIRECTION} --max-new-tokens 128 --batch-size {args.rows} --dtype float32"
    call(evaluate, args.out / "logs" / f"{name.split('/')[0]}.log", *options.split(), *words, "--choice", *args.choice)
    found = {}
    for key, statistic in evaluate.Run(str(out), name).statistics.items():
        found.setdefault(key.split("/")[0], []).append(np.array([statistic.value, *statistic.draws]))
    return np.stack([k * np.mean(found[name], axis=0) for name, (k, _) in MEASURES.items()]).astype(np.float32)


def curve_file(args, seed: int, rate: str, arm: str) -> Path:
    return args.out / "curves" / (f"{seed} {rate} {arm}".replace(" ", "_") + ".npy")


def run(args, seed: int, rate: str, arm: str) -> None:
    """Trains an arm and measures its exports, the base model first -> DIR/curves/SEED RATE ARM.npy."""
    name, (files, flags) = curve_file(args, seed, rate, arm).stem, ARMS[arm]
    out = args.out / "models" / name
    for started in (out, args.out / "results" / name):  # on a GPU two trainings differ in their last bits
        shutil.rmtree(started, ignore_errors=True)
    rows = [args.out / str(seed) / f"{file}.jsonl" for file in files.split()]
    words = f"{TUNE} {flags} --seed {seed} --learning-rate {rate} --export-every {EVERY} {DIRECTION}"
    call(train, args.out / "logs" / f"{name}.log", *words.split(), "--model", args.model, "--out", out, "--data", *rows)
    curve = [np.load(args.out / "base.npy")]
    curve += [measure(args, out / f"step-{step}", f"{name}/step-{step}") for step in POINTS]
    shutil.rmtree(out)
    with open(args.out / "curves" / f"{name}.tmp", "wb") as f:
        np.save(f, np.stack(curve))  # [points, measures, draws]
    Path(f.name).rename(Path(f.name).with_suffix(".npy"))


def work(task: tuple) -> str:
    """One task in a process of the pool -> how it went."""
    what, *words = task
    start = time.time()
    try:
        what(*words)
        return f"{' '.join(map(str, words[1:]))}: {time.time() - start:.0f} s"
    except Exception:
        return f"{' '.join(map(str, words[1:]))}: failed\n{traceback.format_exc()}"
    finally:
        # train.py heeds SIGTERM in its own way; the pool ends its processes by it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(args) -> None:
    (args.out / "curves").mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    ledgers, runs, failed = [(ledger, args, 0, "drift")], [], 0
    for seed in args.seeds:
        (args.out / str(seed)).mkdir(exist_ok=True)
        kinds = {word for arm in args.arms for word in ARMS[arm][0].split()} | {"rationales"}
        ledgers += [(ledger, args, seed, task) for task in sorted(kinds - {"shuffled"})]
        todo = [(seed, rate, arm) for rate in args.rates for arm in args.arms]
        runs += [(run, args, *key) for key in todo if not curve_file(args, *key).exists()]
    with context.Pool(args.workers) as pool:
        for stage in (ledgers, [(base, args)], runs):
            for line in pool.imap_unordered(work, stage):
                print(f"[{time.time() - START:.0f} s] {line}", flush=True)
                failed += "failed" in line
    if failed:
        sys.exit(f"{failed} of these failed; the same command tries them again")
    table(args)


def base(args) -> None:
    np.save(args.out / "base.npy", measure(args, args.model, "base"))


def read_at(curve: np.ndarray, x: np.ndarray) -> np.ndarray:
    """curve [points, measures, draws], x [draws] -> the measures [measures, draws] where chrF++ first comes to x."""
    found = np.full(curve.shape[1:], np.nan)
    for a, b in zip(curve, curve[1:]):
        part = (x - a[0]) / np.where(b[0] == a[0], 1, b[0] - a[0])
        here = np.isnan(found[0]) & (part >= -1e-6) & (part <= 1 + 1e-6)
        found[:, here] = (a + part * (b - a))[:, here]
    return found


def span(draws: np.ndarray, digits: int) -> str:
    """Value and 95 % interval of [1 + resamples]."""
    low, high = np.nanpercentile(draws[1:], [2.5, 97.5])
    return f"{draws[0]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(args) -> None:
    """Each arm where it ends, and against vanilla at the best translation that both reach.

    The last column reads arm, RaDis and vanilla at the best translation that all three reach.
    """
    files = sorted((args.out / "curves").glob("*.npy"))
    curves = {tuple(file.stem.split("_", 2)): np.load(file).astype(float) for file in files}
    digits, start = [d for _, d in MEASURES.values()], np.load(args.out / "base.npy").astype(float)
    arms = [(r, a) for r in sorted({r for _, r, _ in curves}, key=float) for a in ARMS]
    seeds = {(r, a): [s for s, *rest in curves if rest == [r, a.replace(" ", "_")]] for r, a in arms}
    print("| rate | arm | seeds | chrF++ | BLEU | KL | NLL | length | choice, % |\n|---|---|---:" + "|---" * 6 + "|")
    print("| | base | | " + " | ".join(map(span, start, digits)) + " |")
    for rate, arm in arms:
        ends = [curves[seed, rate, arm.replace(" ", "_")][-1] for seed in seeds[rate, arm]]
        if ends:
            print(f"| {rate} | {arm} | {len(ends)} | " + " | ".join(map(span, np.mean(ends, axis=0), digits)) + " |")
    names = ["rate", "arm", "seeds", "at chrF++", "vanilla's KL", "KL", "NLL", "length", "choice, points"]
    print("\n| " + " | ".join([*names, "of RaDis' gain in KL, %"]) + " |\n|---|---|---:" + "|---" * 7 + "|")
    for rate, arm in arms:
        gaps, levels, gains, drifts = [], [], [], []
        for seed in seeds[rate, arm] if arm != "vanilla" else ():
            own, vanilla, radis = (curves.get((seed, rate, a)) for a in (arm.replace(" ", "_"), "vanilla", "RaDis"))
            if vanilla is not None:
                x = np.minimum(own[:, 0].max(0), vanilla[:, 0].max(0))
                gaps.append(read_at(own, x) - read_at(vanilla, x))
                levels.append(x[0])
                drifts.append(read_at(vanilla, x)[2, 0])
                if radis is not None:
                    x = np.minimum(x, radis[:, 0].max(0))
                    gains.append([(read_at(vanilla, x) - read_at(curve, x))[2] for curve in (own, radis)])
        if gaps:
            cells = list(map(span, np.nanmean(gaps, axis=0), digits))[2:]
            learnt = np.mean(levels) > start[0, 0] + 1  # else nothing is gained over vanilla, by any arm
            share = span(100 * np.divide(*np.mean(gains, axis=0)), 0) if gains and learnt and arm != "RaDis" else ""
            cells = [f"{np.mean(levels):.1f}", f"{np.mean(drifts):.3f}", *cells, share]
            print(f"| {rate} | {arm} | {len(gaps)} | {' | '.join(cells)} |")
    if args.plot:
        draw(curves, args.plot)


def draw(curves: dict, path: Path) -> None:
    """Translation against drift: a panel a rate, a path an arm, the mean of its seeds."""
    from matplotlib.figure import Figure

    rates = sorted({rate for _, rate, _ in curves}, key=float)
    panels = np.atleast_1d(Figure(figsize=(6 * len(rates), 5), layout="constrained").subplots(1, len(rates)))
    for rate, axes in zip(rates, panels):
        for i, arm in enumerate(ARMS):
            found = [c[..., 0] for (_, r, a), c in curves.items() if (r, a) == (rate, arm.replace(" ", "_"))]
            if found:
                x, y = np.mean(found, axis=0)[:, [0, 2]].T
                axes.plot(x, y, marker="o", markersize=3, color=f"C{i}" if i < 10 else "black", label=arm)
        axes.set(
            title=f"learning rate {rate}", xlabel="translation: chrF++", ylabel="drift: KL(base || model), nats a token"
        )
        axes.legend(fontsize=8)
    panels[0].figure.savefig(path, dpi=90)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Ways of fine-tuning compared as curves, read at equal translation.")
    p.add_argument("--model", type=Path, help="model folder")
    p.add_argument("--pairs", type=Path, help="what is learnt, German to English")
    p.add_argument("--test", type=Path, help="pairs to translate")
    p.add_argument("--general", type=Path, help="prompts whose answers are replayed")
    p.add_argument("--drift", type=Path, help="prompts on which drift is measured")
    p.add_argument("--choice", type=Path, nargs="+", help="choice tasks")
    p.add_argument("--out", type=Path, required=True, help="folder for everything")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    p.add_argument("--rates", nargs="+", default=["3e-5", "1e-4"], help="learning rates (default 3e-5 1e-4)")
    p.add_argument("--arms", nargs="+", default=[*ARMS], choices=ARMS, help="default: all")
    p.add_argument("--workers", type=int, default=1, help="processes beside each other on one device (default 1)")
    p.add_argument("--rows", type=int, default=64, help="rows at a time in sampling (default 64)")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="with --table: translation against drift (matplotlib)")
    p.add_argument("--table", action="store_true", help="only print the table of what is there")
    return p


START = time.time()

if __name__ == "__main__":
    options = parser().parse_args()
    for name in ("model", "pairs", "test", "general", "drift", "out"):
        if getattr(options, name):
            setattr(options, name, getattr(options, name).resolve())
    options.choice = options.choice and [file.resolve() for file in options.choice]
    table(options) if options.table else main(options)
