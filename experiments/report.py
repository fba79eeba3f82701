"""The study's tables and picture, from the points that methods.py keeps. Nothing is run.

    python experiments/report.py --out experiments/smollm2 --plot experiments/results.png

Brackets are 95% CIs over seeds (Student's t), of models paired by seed. The CIs over items are in
results.json of each model, and in the tables of `evaluate.py --compare` and ifeval.py.
"""

from pathlib import Path

import numpy as np
from methods import METHODS, slug

import data
from model import require

# measure -> digits, and the beginnings of the scores that it is the mean of
MEASURES = {
    "gain, %": (1,),
    "KL, %": (1,),
    "IFEval": (1, "ifeval_loose/all"),
    "IFEval built": (1, "ifeval_loose/built"),
    "IFEval other": (1, "ifeval_loose/other"),
    "answer length": (1, "drift_length/general"),
    "chrF++": (1, "chrf++/test"),
    "KL": (3, "drift_kl/general"),
    "KL, task prompts": (3, "drift_kl/task"),
    "KL, opposite direction": (3, "drift_kl/reverse"),
    "BLEU": (1, "bleu/test"),
    "IFEval strict": (1, "ifeval_strict/all"),
    "IFEval, prompts": (1, "ifeval_prompt_loose/all"),
    "IFEval, answer length": (0, "length/ifeval"),
    "refused, harmful": (3, "refusal/harmful"),
    "refused, safe": (3, "refusal/benign"),
    "BLiMP": (3, "acc/blimp"),
    "PIQA": (3, "acc/piqa"),
    "HellaSwag": (3, "acc_norm/hellaswag"),
    "ARC-easy": (3, "acc/arc_easy"),
    "skills in rationales": (3, "acc/facts", "acc/meaning"),
    "replayed skills": (3, "acc/format", "flexible/arithmetic", "refusal/harmful"),
    "other skills": (3, "acc/spelling", "flexible/backwards", "flexible/ages"),
}
RESULT = [*MEASURES][:6]  # the first table
COMPARED = [*MEASURES][2:8]  # in the table of differences
TESTED = ["IFEval", "IFEval built"]  # the p-values are corrected together


def read_points(folders: list[str], rate: str, seeds: list[int]) -> dict[str, dict]:
    """-> points[title][seed][measure]"""
    points = {"base": {}, "vanilla": {}}
    for name in (*METHODS, "no EOS"):  # an earlier control: the answer continues without an end
        for folder in map(Path, folders):
            files = folder.glob(f"points/seed-*/{rate}/{slug(name)}/*.npz")
            for file in sorted(files, reverse=True):
                seed = int(file.parts[-4].removeprefix("seed-"))
                weight = file.stem.partition("-at-")[2]
                title = f"{name}, interpolated {weight}" if weight else name
                # all comparisons are with vanilla, which comes first
                comparable = title == "vanilla" or seed in points["vanilla"]
                if comparable and (not seeds or seed in seeds):
                    points.setdefault(title, {})[seed] = read_point(file)
                    points["base"][seed] = read_point(folder / "points/base.npz")
    require(points["vanilla"], folders[0], f"has no point of vanilla at the rate {rate}")
    return points


def read_point(file: Path) -> dict:
    content = np.load(file)
    point = {}
    scores = dict(zip(content["names"].tolist(), content["values"].tolist()))
    for measure, (_, *starts) in MEASURES.items():
        parts = [scores[name] for name in scores if name.startswith(tuple(starts))]
        if parts:
            point[measure] = np.mean(parts) * (100 if starts[0].startswith("ifeval") else 1)
    return point


def add_comparisons(points):
    """Adds shares of vanilla's gain and KL, and IFEval minus the base's."""
    for seed, vanilla in points["vanilla"].items():
        base = points["base"][seed]
        full = vanilla["chrF++"] - base["chrF++"]
        for point in [by_seed[seed] for by_seed in points.values() if seed in by_seed]:
            point["gain, %"] = 100 * (point["chrF++"] - base["chrF++"]) / full
            point["KL, %"] = 100 * point["KL"] / vanilla["KL"]
            if "IFEval" in point and "IFEval" in base:
                point["IFEval minus base"] = point["IFEval"] - base["IFEval"]


def over_seeds(values: list[float]) -> list[float]:
    """Mean, low and high by Student's t, and p, two-sided, of the mean being 0."""
    mean = np.mean(values)
    n = len(values)
    if n == 1:
        return [mean, np.nan, np.nan, np.nan]
    error = np.std(values, ddof=1) / n**0.5
    # P(-t < T < t): with T = sqrt(n - 1) tan(u) the density of T is cos(u)^(n - 2)
    u = np.linspace(0, np.pi / 2, 200001)
    density = np.cos(u) ** (n - 2)
    mass = np.cumsum(density) - (density[0] + density) / 2  # by trapezoids
    mass = mass / mass[-1]
    t = (n - 1) ** 0.5 * np.tan(u)
    half = error * np.interp(0.95, mass, t)
    p = 1 - np.interp(abs(mean) / error, t, mass) if error else float(mean == 0)
    return [mean, mean - half, mean + half, p]


def holm(p_values: list[float]) -> np.ndarray:
    """p adjusted for the number of tests (Holm 1979)."""
    order = np.argsort(p_values)
    factors = np.arange(len(order), 0, -1)
    adjusted = np.maximum.accumulate(factors * np.array(p_values)[order])
    return np.minimum(1, adjusted)[np.argsort(order)]


def values_of(by_seed: dict, measure: str) -> list[float]:
    return [point[measure] for point in by_seed.values() if measure in point]


def show(measure: str, digits: int, by_seed: dict) -> str:
    """Mean and interval, and the number of seeds if some have no value."""
    values = values_of(by_seed, measure)
    if not values:
        return ""
    mean, low, high = (f"{x:.{digits}f}" for x in over_seeds(values)[:3])
    cell = mean if low in (mean, "nan") else f"{mean} [{low}, {high}]"
    return cell if len(values) == len(by_seed) else f"{cell} ({len(values)} seeds)"


def print_table(title: str, points, digits: dict):
    """digits: of each measure that a column shows."""
    print(f"\n### {title}\n")
    print("| model | seeds |", " | ".join(digits), "|")
    print("|---|---|" + "---|" * len(digits))
    for name, by_seed in points.items():
        cells = [show(measure, n, by_seed) for measure, n in digits.items()]
        seeds = "" if name == "base" else len(by_seed)  # the base is not trained
        print(f"| {name} | {seeds} |", " | ".join(cells), "|")


def compare(points, pairs: list[tuple], measures: list[str]) -> dict[str, dict]:
    """-> of each pair one minus the other, by seed, with p-values that are corrected together."""
    rows = {}
    tests = []
    for one, other in pairs:
        title = f"{one} minus {other}"
        rows[title] = {}
        for seed in sorted(points[one].keys() & points[other].keys()):
            new, old = points[one][seed], points[other][seed]
            shared = [name for name in measures if name in new and name in old]
            rows[title][seed] = {name: new[name] - old[name] for name in shared}
        for name in TESTED:
            values = values_of(rows[title], name)
            if len(values) > 1:
                tests.append((title, name, over_seeds(values)[3]))
    for (title, name, _), p in zip(tests, holm([p for *_, p in tests])):
        for change in rows[title].values():
            change[f"p, {name}"] = p
    return rows


def print_predictions(points):
    """Which KL goes along with what is lost: Spearman's correlation over all models and seeds."""
    measured = []
    for by_seed in [*points.values()][1:]:
        measured += [point for point in by_seed.values() if "IFEval minus base" in point]
    if len(measured) < 3:
        return
    print(f"\nRank correlation with IFEval minus base, over {len(measured)} models:")
    for name in ("KL", "KL, task prompts"):
        x = np.array([[point[name], point["IFEval minus base"]] for point in measured])
        ranks = np.sign(x[:, None] - x).sum(1)  # equal values have one rank
        print(f"- {name}: {np.corrcoef(ranks.T)[0, 1]:.2f}")


def draw(points, file: str):
    """Dots are means over seeds, bars span the seeds; the x axes have the scale of a root."""
    from matplotlib.figure import Figure

    panels = [("KL, %", "gain, %"), ("KL, %", "answer length")]
    if values_of(points["vanilla"], "IFEval minus base"):
        panels += [("KL", "IFEval minus base"), ("KL, task prompts", "IFEval minus base")]
    figure = Figure(figsize=(11, 2.25 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels) // 2, 2, squeeze=False)
    for axes, (x, y) in zip(grid.flat, panels):
        axes.set_xscale("function", functions=(lambda v: np.maximum(v, 0) ** 0.5, np.square))
        path = []
        for title, by_seed in points.items():
            found = [(point[x], point[y]) for point in by_seed.values() if y in point]
            if not found:
                continue
            across, up = np.array(found).T
            if title in ("base", "vanilla") or title.startswith("vanilla, interpolated"):
                path.append((across.mean(), up.mean()))
            else:
                bars = [[up.mean() - up.min()], [up.max() - up.mean()]]
                axes.errorbar(across.mean(), up.mean(), bars, fmt="o", capsize=3, label=title)
        axes.plot(*zip(*sorted(path)), "k-o", markersize=3, label="base to vanilla, interpolated")
        axes.set(xlabel=f"{x} to base" if x == "KL" else x, ylabel=y, xlim=(0, None))
    grid[0, 0].fill_between([0, 10], 95, 108, color="0.9", label="goal")
    grid[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=100)


def main(args):
    points = read_points(args.out, args.rate, args.seeds)
    add_comparisons(points)
    measured = {name for point in points["vanilla"].values() for name in point}
    digits = {name: n for name, (n, *_) in MEASURES.items() if name in measured}
    for title, chosen in (("The result", True), ("Other values", False)):
        columns = {name: n for name, n in digits.items() if (name in RESULT) == chosen}
        print_table(title, points, columns)
    pairs = [("vanilla", "base")]
    for title in [title for title in points if title not in ("base", "vanilla")]:
        pairs += [(title, "base"), (title, "vanilla")]
    columns = {name: n for name, n in digits.items() if name in COMPARED}
    print_table("Minus base, minus vanilla", compare(points, pairs, [*columns]), columns)
    if args.minus:
        for title in args.minus:
            require(title in points, f"--minus {title}", f"must be one of {', '.join(points)}")
        pairs = [*zip(args.minus[::2], args.minus[1::2])]
        tested = {f"p, {name}": 4 for name in TESTED if name in digits}
        title = "Chosen differences" + "; p by Holm's method" * bool(tested)
        print_table(title, compare(points, pairs, [*digits]), columns | tested)
    print_predictions(points)
    if args.plot:
        draw(points, args.plot)


OPTIONS = """
--out! DIR...           folders of methods.py
--rate RATE=1e-4        learning rate
--seeds N...            default: all
--minus METHOD...       pairs of methods to compare, with p-values that are corrected together
--plot FILE             picture of gain, answer length and IFEval against KL (PNG)
"""


def parser():
    return data.make_parser("Prints tables of what methods.py has measured.", OPTIONS)


if __name__ == "__main__":
    data.cli(main, parser())
