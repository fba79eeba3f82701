"""The study's tables and picture, from the points that methods.py keeps. Nothing is run.

    python experiments/report.py --out experiments/smollm2 --plot experiments/results.png

Comparisons are paired: same seed, same items. They have two 95% CIs: over seeds (Student's t) and
over items (a bootstrap that draws the same items for all models).
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
from methods import METHODS, slug

import data
from model import require

# the goal: this share of vanilla's gain in chrF++, at this share of its KL to base
GAIN = 0.95
KL = 0.10
# measure -> digits, and the beginnings of the scores that it is the mean of
MEASURES = {
    "chrF++": (1, "chrf++/test"),
    "BLEU": (1, "bleu/test"),
    "KL": (3, "drift_kl/general"),
    "KL, task prompts": (3, "drift_kl/task"),
    "KL, opposite direction": (3, "drift_kl/reverse"),
    "answer length": (1, "drift_length/general"),
    "IFEval": (3, "ifeval_loose/all"),
    "IFEval, built": (3, "ifeval_loose/built"),
    "IFEval, other": (3, "ifeval_loose/other"),
    "IFEval, answer length": (1, "length/ifeval"),
    "BLiMP": (3, "acc/blimp"),
    "PIQA": (3, "acc/piqa"),
    # of the synthetic world
    "skills in rationales": (3, "acc/facts", "acc/meaning"),
    "replayed skills": (3, "acc/format", "flexible/arithmetic", "refusal/harmful"),
    "other skills": (3, "acc/spelling", "flexible/backwards", "flexible/ages"),
}
COSTS = {"trained": "tokens trained on", "taught": "by the teacher", "sampled": "sampled"}


def read_points(folders: list[str], rate: str, seeds: list[int]) -> dict[str, dict]:
    """-> points[title][seed][measure], a mean over items and over bootstrap draws [1 + draws]."""
    points = {"base": {}, "vanilla": {}}
    for name in METHODS:
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
    """The measures, and what the training cost."""
    content = np.load(file)
    point = json.loads(str(content["cost"]))
    values = content["values"][:, None]
    table = np.concatenate([values, values + content["draws"]], axis=1)
    scores = dict(zip(content["names"].tolist(), table))
    for measure, (_, *starts) in MEASURES.items():
        parts = [scores[name] for name in scores if name.startswith(tuple(starts))]
        if parts:
            point[measure] = np.mean(parts, axis=0)
    return point


def compare_with_goal(points):
    """Adds shares of vanilla's gain and KL, and a and b: the distances from the goal."""
    for seed, vanilla in points["vanilla"].items():
        base = points["base"][seed]["chrF++"]
        full = vanilla["chrF++"] - base
        for point in [by_seed[seed] for by_seed in points.values() if seed in by_seed]:
            gain = point["chrF++"] - base
            point["gain, %"] = 100 * gain[0] / full[0]
            point["KL, %"] = 100 * point["KL"][0] / vanilla["KL"][0]
            point["a"] = gain - GAIN * full
            point["b"] = point["KL"] - KL * vanilla["KL"]


def compare_with_interpolated(points, measure: str, name: str) -> dict[str, dict]:
    """-> the points, with a measure minus that of interpolated vanilla at the same KL.

    The measure is taken to be linear in the root of the KL, which is about linear in the weight.
    Models with a KL outside of vanilla's range are left out.
    """
    models = [title for title in reversed(points) if title.startswith("vanilla")]
    compared = {}
    for title in [*points][1 + len(models) :]:
        by_seed = points[title]
        for seed in common_seeds(points, title, *models):
            vanilla = [points[model][seed] for model in models]
            x = np.stack([point["KL"] ** 0.5 for point in vanilla])
            y = np.stack([point[measure] for point in vanilla])
            at = by_seed[seed]["KL"] ** 0.5
            expected = [np.interp(*each, np.nan, np.nan) for each in zip(at, x.T, y.T)]
            by_seed[seed][name] = by_seed[seed][measure] - expected
        found = {seed: point for seed, point in by_seed.items() if name in point}
        if found and not any(np.isnan(point[name][0]) for point in found.values()):
            compared[title] = found
    return compared


def common_seeds(points, *titles: str) -> list[int]:
    return sorted(set.intersection(*(set(points[title]) for title in titles)))


def over_items(table: np.ndarray) -> list[float]:
    """Mean, low and high of [seeds, 1 + draws], by the bootstrap over items."""
    draws = table.mean(0)
    return [draws[0], *np.percentile(draws[1:], [2.5, 97.5])]


def over_seeds(table: np.ndarray) -> list[float]:
    """Mean, low and high by Student's t, and p, two-sided, of the mean being 0."""
    values = table[:, 0]
    mean = values.mean()
    n = len(values)
    if n == 1:
        return [mean, np.nan, np.nan, np.nan]
    error = values.std(ddof=1) / n**0.5
    # P(-t < T < t): with T = sqrt(n - 1) tan(u) the density of T is cos(u)^(n - 2)
    u = np.linspace(0, np.pi / 2, 200001)
    density = np.cos(u) ** (n - 2)
    mass = np.cumsum(density) - (density[0] + density) / 2  # by trapezoids
    mass = mass / mass[-1]
    t = (n - 1) ** 0.5 * np.tan(u)
    half = error * np.interp(0.95, mass, t)
    p = 1 - np.interp(abs(mean) / error, t, mass) if error else float(mean == 0)
    return [mean, mean - half, mean + half, p]


def holm(p_values: list[float]) -> list[float]:
    """p adjusted for the number of tests (Holm 1979); NaN is not a test."""
    count = int(np.sum(~np.isnan(p_values)))
    adjusted = [np.nan] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(np.argsort(p_values)[:count]):
        largest = max(largest, min(1.0, p_values[i] * (count - rank)))
        adjusted[i] = largest
    return adjusted


def stack(by_seed: dict, measure: str) -> np.ndarray:
    """[seeds, 1 + draws]"""
    return np.stack([point[measure] for point in by_seed.values()])


def show_interval(interval, measure: str, digits: int, by_seed: dict) -> str:
    if any(measure not in point for point in by_seed.values()):
        return "not measured"
    numbers = interval(stack(by_seed, measure))[:3]
    mean, low, high = (f"{x:.{digits}f}" for x in numbers)
    return mean if low == "nan" else f"{mean} [{low}, {high}]"


def show_mean(measure: str, style: str, by_seed: dict) -> str:
    return format(np.mean([point.get(measure, 0) for point in by_seed.values()]), style)


def show_seed(seed: int, by_seed: dict) -> str:
    point = by_seed.get(seed)
    return f"{point['chrF++'][0]:.1f}, {point['KL'][0]:.3f}" if point else ""


def both(measure: str, digits: int) -> dict:
    """The columns of a measure's two intervals."""
    return {
        f"{measure}, over seeds": partial(show_interval, over_seeds, measure, digits),
        f"{measure}, over items": partial(show_interval, over_items, measure, digits),
    }


def print_table(title: str, points, columns: dict):
    """columns: header -> the function that makes the cell of a model."""
    print(f"\n### {title}\n")
    print("| model | seeds |", " | ".join(columns), "|")
    print("|---|---|" + "---|" * len(columns))
    for name, by_seed in points.items():
        cells = [cell(by_seed) for cell in columns.values()]
        print(f"| {name} | {len(by_seed)} |", " | ".join(cells), "|")


def print_values(points, measures: list[str]):
    columns = {name: partial(show_mean, name, ".0f") for name in ("gain, %", "KL, %")}
    columns |= both("a", 2) | both("b", 3)
    title = "Shares of vanilla's gain and KL; the goal is a >= 0 and b <= 0"
    tuned = {title: by_seed for title, by_seed in points.items() if title != "base"}
    print_table(title, tuned, columns)
    columns = {}
    for name in measures:
        columns[name] = partial(show_interval, over_items, name, MEASURES[name][0])
    for cost, title in COSTS.items():
        columns[title] = partial(show_mean, cost, ",.0f")
    print_table("Values at the end of training, with intervals over items", points, columns)
    columns = {f"seed {seed}": partial(show_seed, seed) for seed in sorted(points["base"])}
    print_table("Each seed: chrF++, KL", points, columns)


def print_equal_kl(points):
    columns = {}
    for measure, digits in {"chrF++": 2, "KL, task prompts": 3, "answer length": 1}.items():
        compared = compare_with_interpolated(points, measure, f"{measure} (difference)")
        columns |= both(f"{measure} (difference)", digits)
    p_values = []
    for by_seed in compared.values():
        p_values.append(over_seeds(stack(by_seed, "chrF++ (difference)"))[3])
    for by_seed, p in zip(compared.values(), holm(p_values)):
        for point in by_seed.values():
            point["p of chrF++ (Holm)"] = p
    columns["p of chrF++ (Holm)"] = partial(show_mean, "p of chrF++ (Holm)", ".3f")
    print_table("Minus interpolated vanilla at the same KL", compared, columns)


def print_difference(points, measures: list[str], one: str, other: str):
    differences = {}
    for measure in measures:
        by_seed = differences.setdefault(measure, {})
        for seed in common_seeds(points, one, other):
            change = points[one][seed][measure] - points[other][seed][measure]
            by_seed[seed] = {"difference": change}
    print_table(f"{one} minus {other}", differences, both("difference", 3))


def draw(points, file: str):
    """Gain, and the length of answers, against KL; bars span the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    ticks = [0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1]
    for axes, name in zip(panels, ("gain, %", "answer length")):
        path = []  # interpolated vanilla
        for title, by_seed in points.items():
            x = np.mean([point["KL, %"] for point in by_seed.values()]) ** 0.5 / 10
            y = np.array([np.ravel(point[name])[0] for point in by_seed.values()])
            if title.startswith(("base", "vanilla")):
                path.append((x, y.mean()))
            else:
                bars = [[y.mean() - y.min()], [y.max() - y.mean()]]
                axes.errorbar([x], [y.mean()], bars, fmt="o", capsize=3, label=title)
        axes.plot(*zip(*sorted(path)), "k-o", markersize=3, label="base to vanilla, interpolated")
        axes.set_xticks(np.sqrt(ticks), [f"{100 * tick:.0f}" for tick in ticks])
        axes.set(xlabel="KL to base, % of vanilla's", ylabel=name)
    panels[0].fill_between([0, KL**0.5], 100 * GAIN, 108, color="0.9", label="goal")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=100)


def main(args: argparse.Namespace):
    points = read_points(args.out, args.rate, args.seeds)
    measures = [name for name in MEASURES if name in [*points["base"].values()][0]]
    compare_with_goal(points)
    print_values(points, measures)
    print_equal_kl(points)
    for one, other in zip(args.minus[::2], args.minus[1::2]):
        for title in (one, other):
            require(title in points, f"--minus {title}", f"must be one of {', '.join(points)}")
        print_difference(points, measures, one, other)
    if args.plot:
        draw(points, args.plot)


OPTIONS = """
--out! DIR...           folders of methods.py
--rate RATE=1e-4        learning rate
--seeds N...            default: all
--minus METHOD...       print the difference of two methods; of several pairs
--plot FILE             picture of gain and answer length against KL (PNG)
"""


def parser() -> argparse.ArgumentParser:
    return data.make_parser("Prints tables of what methods.py has measured.", OPTIONS)


if __name__ == "__main__":
    data.cli(main, parser())
