"""What the experiment says: tables and a picture of what arms.py has measured.

    python experiments/readings.py --out DIR --screen 0 1 2 --confirm 10 11 12 --plot arms.png

Every reading is paired: an arm is compared with vanilla and base of the same seed, on the same
items. It has two intervals of 95 %: over seeds (Student's t), and over test items (a bootstrap,
with the same items drawn for all arms). Vanilla is vanilla at its best learning rate.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import world  # noqa: E402

GAIN = 0.95  # the moonshot: this share of vanilla's gain in chrF++ ...
DRIFT = 0.10  # ... at this share of its drift
SCREENED_GAIN = 0.98  # what an arm needs on the screening seeds to be chosen there
# what should be kept. How much worse than the base's may be what no arm trains on, at the
# interval's end; what some arms train on has no margin
MARGINS = {"human": 0.02, "choice": 3.0, "margin": 0.1, "skills/neither": 3.0}
TRAINED = ("skills/rationales", "skills/replay")
LEVELS = (0.25, 0.5, 0.75, 0.9, 1.0)  # shares of vanilla's gain at which curves are read
TESTED_LEVEL = 0.75
CONTROLS = ("no EOS", "rationales alone", "soft rationales alone")
TITLES = {
    "chrf++": "chrF++",
    "bleu": "BLEU",
    "kl": "KL",
    "kl task": "KL, task",
    "kl reverse": "KL, other direction",
    "length": "own answers, tokens",
    "human": "NLL, people's answers",
    "skills/rationales": "skills that rationales touch, %",
    "skills/replay": "skills that replay touches, %",
    "skills/neither": "other skills, %",
}
# what a point's headline is the mean of: names of measures begin so
MEANS = {
    "chrf++": "chrf++/test",
    "bleu": "bleu/test",
    "valid": "chrf++/valid",
    "kl": "drift_kl/general",
    "kl task": "drift_kl/task",
    "kl reverse": "drift_kl/reverse",
    "length": "drift_length/general",
    "human": "drift_nll/human",
}


# 1. What was measured


@dataclass
class Point:
    """A model's measures, each with its bootstrap draws [1 + draws], and what the arm cost."""

    values: dict[str, np.ndarray]
    cost: dict


@dataclass(frozen=True)
class Key:
    """Which model: an arm at a rate, at its end or after `step`, `part` of the way from base."""

    rate: str
    arm: str
    part: float = 1.0
    step: int = 0  # 0 is the end

    @property
    def title(self) -> str:
        return self.arm if self.part == 1 else f"{self.arm}, at {self.part:g}"


@dataclass
class Study:
    """points[key][seed]; the base is a key, too."""

    points: dict[Key, dict[int, Point]]

    BASE = Key("", "base")

    def end_keys(self) -> list[Key]:
        return [key for key in self.points if key.step == 0 and key != self.BASE]

    def seeds_of(self, *keys: Key) -> list[int]:
        """The seeds that have all of these."""
        common = set(self.points[self.BASE])
        for key in keys:
            common &= set(self.points.get(key, ()))
        return sorted(common)

    def stack(self, key: Key, name: str, seeds: list[int]) -> np.ndarray:
        """[seeds, 1 + draws]"""
        return np.stack([self.points[key][seed].values[name] for seed in seeds])

    def only(self, seeds: list[int]) -> "Study":
        points = {}
        for key, by_seed in self.points.items():
            kept = {seed: point for seed, point in by_seed.items() if seed in seeds}
            if kept:
                points[key] = kept
        return Study(points)

    def measures(self) -> list[str]:
        first = self.points[self.BASE]
        return list(first[min(first)].values)


def read_study(out: Path) -> Study:
    """All points of an experiment; the last step of an arm is its end."""
    settings = json.loads((out / "settings.json").read_text())
    if not settings.get("lengths", True):  # its points say that every answer is one token long
        sys.exit(f"error: {out}: written by an earlier state of arms.py; measure it anew")
    arms = known_arms()
    points = {}
    for file in sorted(out.glob("points/seed-*/**/*.npz")):
        seed, *rest = file.relative_to(out / "points").with_suffix("").parts
        seed = int(seed.removeprefix("seed-"))
        key = Study.BASE
        if rest != ["base"]:
            rate, arm, point = rest
            step, _, part = point.removeprefix("step-").partition("-at-")
            step = int(step)
            last = step == settings["points"][-1]
            key = Key(rate, arms.get(arm, arm), float(part or 1), 0 if last else step)
        points.setdefault(key, {})[seed] = read_point(file)
    shared = out / "points/base.npz"
    if shared.exists():
        seeds = {seed for by_seed in points.values() for seed in by_seed}
        points[Study.BASE] = dict.fromkeys(seeds, read_point(shared))
    if not points.get(Study.BASE):
        sys.exit(f"error: {out}: nothing measured yet; run arms.py")
    order = [*arms.values()]

    def place(key: Key) -> tuple:
        arm = order.index(key.arm) if key.arm in order else -1
        return float(key.rate or 0), arm, key.step or float("inf"), -key.part

    return Study({key: points[key] for key in sorted(points, key=place)})


def known_arms() -> dict[str, str]:
    """Names of arms by how their files are called."""
    import arms

    return {arms.slug(name): name for name in arms.ARMS}


def read_point(file: Path) -> Point:
    content = np.load(file)
    if "draws" not in content:
        sys.exit(f"error: {file}: written by an earlier state of arms.py; measure it anew")
    value = content["values"][:, None]
    table = np.concatenate([value, value + content["draws"]], 1)
    values = zip(content["names"].tolist(), table)
    return Point(headline(dict(values)), json.loads(str(content["cost"])))


def headline(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The measures that are read: means over files, and shares in percent."""
    values = {}
    for name, start in MEANS.items():
        parts = [value for key, value in found.items() if key.startswith(start)]
        if parts:
            values[name] = np.mean(parts, axis=0)
    skills = {}
    for key, value in found.items():
        kind, _, name = key.partition("/")
        if kind in ("choice", "flexible", "refusal"):
            skills[name] = 100 * value
        if kind == "choice":
            values[key] = 100 * value
        elif kind == "margin":
            values[key] = value
    if "backwards" in skills:  # the small world: its skills by what trains on them
        return {name: value for name, value in values.items() if "/" not in name} | group(skills)
    return values


def group(skills: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Means of the small world's skills that rationales touch, that replay touches, and neither."""
    skills = dict(skills)
    skills["benign"] = 100 - skills["benign"]
    replayed = ["format", "arithmetic", "harmful", "benign"]
    others = [name for name in skills if name not in (*replayed, *world.TOUCHED)]
    groups = {"rationales": world.TOUCHED, "replay": replayed, "neither": others}
    found = {"skills": np.mean([*skills.values()], axis=0)}
    for title, names in groups.items():
        found[f"skills/{title}"] = np.mean([skills[name] for name in names], axis=0)
    return found


# 2. Statistics


@dataclass
class Interval:
    mean: float
    low: float
    high: float
    p: float = float("nan")

    def text(self, digits: int) -> str:
        if np.isnan(self.mean):
            return "-"
        if np.isnan(self.low):  # of one seed there is none
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def over_seeds(values) -> Interval:
    """Mean and 95 % interval by Student's t; p of the mean being 0, two-sided."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    mean = float(values.mean())
    if n < 2:
        return Interval(mean, float("nan"), float("nan"))
    error = float(values.std(ddof=1)) / n**0.5
    half = student_quantile(n - 1) * error
    p = 1 - student_mass(abs(mean) / error, n - 1) if error else float(mean == 0)
    return Interval(mean, mean - half, mean + half, p)


def over_items(table: np.ndarray) -> Interval:
    """Mean over seeds of [seeds, 1 + draws], and its 95 % bootstrap interval over items."""
    draws = table.mean(0)
    low, high = np.percentile(draws[1:], [2.5, 97.5])
    return Interval(float(draws[0]), float(low), float(high))


def student_mass(t: float, df: int) -> float:
    """P(-t < T < t) for Student's t: with T = sqrt(df) tan(u) its density is cos(u)^(df - 1)."""
    areas = []
    for end in (np.arctan(t / df**0.5), np.pi / 2):
        u = np.linspace(0, end, 20001)
        density = np.cos(u).clip(0) ** (df - 1)
        areas.append(np.trapezoid(density, u))
    return float(areas[0] / areas[1])


def student_quantile(df: int, mass: float = 0.95) -> float:
    """t with P(-t < T < t) = mass, by bisection."""
    low = 0.0
    high = 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        if student_mass(middle, df) < mass:
            low = middle
        else:
            high = middle
    return high


def holm(p_values: list[float]) -> list[float]:
    """p adjusted for the number of tests (Holm 1979), in the order given; NaN stays."""
    order = np.argsort(p_values)
    count = int(np.sum(~np.isnan(p_values)))
    adjusted = [float("nan")] * len(p_values)
    largest = 0.0
    for place, i in enumerate(order[:count]):
        largest = max(largest, min(1.0, p_values[i] * (count - place)))
        adjusted[i] = largest
    return adjusted


def monotone(y: np.ndarray) -> np.ndarray:
    """The closest sequence that never falls (least squares, pool adjacent violators)."""
    blocks = []  # sum and count
    for value in y:
        blocks.append([float(value), 1])
        while len(blocks) > 1:
            before = blocks[-2][0] / blocks[-2][1]
            last = blocks[-1][0] / blocks[-1][1]
            if before <= last:
                break
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    return np.concatenate([np.full(count, total / count) for total, count in blocks])


def read_curve(x: np.ndarray, y: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """y of a curve at the levels of x, by a monotone fit; NaN where the curve does not come."""
    order = np.argsort(x, kind="stable")
    x = x[order]
    return np.interp(levels, x, monotone(y[order]), left=np.nan, right=np.nan)


# 3. Readings


@dataclass
class Moonshot:
    """a = gain - 0.95 of vanilla's, b = KL - 0.10 of vanilla's: over seeds and over items."""

    gain_share: float
    drift_share: float
    a: tuple[Interval, Interval]
    b: tuple[Interval, Interval]

    @property
    def reached(self) -> bool:
        """A bound that is NaN, as with one seed, reaches nothing."""
        return all(x.low >= 0 for x in self.a) and all(x.high <= 0 for x in self.b)


def moonshot(gain, vanilla_gain, kl, vanilla_kl) -> Moonshot:
    """All [seeds, 1 + draws]."""
    a = gain - GAIN * vanilla_gain
    b = kl - DRIFT * vanilla_kl
    return Moonshot(
        gain_share=float((gain[:, 0] / vanilla_gain[:, 0]).mean()),
        drift_share=float((kl[:, 0] / vanilla_kl[:, 0]).mean()),
        a=(over_seeds(a[:, 0]), over_items(a)),
        b=(over_seeds(b[:, 0]), over_items(b)),
    )


def read_moonshot(study: Study, key: Key, vanilla: Key) -> Moonshot:
    seeds = study.seeds_of(key, vanilla)
    base = study.stack(study.BASE, "chrf++", seeds)
    gain = study.stack(key, "chrf++", seeds) - base
    vanilla_gain = study.stack(vanilla, "chrf++", seeds) - base
    return moonshot(
        gain, vanilla_gain, study.stack(key, "kl", seeds), study.stack(vanilla, "kl", seeds)
    )


def margin_of(name: str) -> float | None:
    """None for what is not asked to be kept."""
    return MARGINS.get(name, MARGINS.get(name.split("/")[0]))


def kept_measures(study: Study) -> list[str]:
    names = study.measures()
    return [name for name in names if name in TRAINED or margin_of(name) is not None]


def losses(study: Study, key: Key) -> dict[str, tuple[Interval, Interval]]:
    """How much worse than the base's each of these measures is: over seeds and over items."""
    seeds = study.seeds_of(key)
    found = {}
    for name in kept_measures(study):
        change = study.stack(key, name, seeds) - study.stack(study.BASE, name, seeds)
        loss = change if name == "human" else -change
        found[name] = (over_seeds(loss[:, 0]), over_items(loss))
    return found


def beyond_margin(found: dict[str, tuple[Interval, Interval]]) -> list[str]:
    """The measures that may be worse than the base's by more than the margin."""
    names = []
    for name, intervals in found.items():
        worst = max(x.mean if np.isnan(x.high) else x.high for x in intervals)
        margin = margin_of(name)
        if margin is not None and worst > margin:
            names.append(name)
    return names


def best_vanilla(study: Study) -> Key:
    """Vanilla at the rate with the best validation chrF++, the mean over seeds."""
    keys = [key for key in study.end_keys() if key.arm == "vanilla" and key.part == 1]
    if not keys:
        sys.exit("error: vanilla is not measured yet")
    if len(keys) == 1:
        return keys[0]
    return max(keys, key=lambda key: study.stack(key, "valid", study.seeds_of(key)).mean(0)[0])


def choose(study: Study, vanilla: Key) -> Key | None:
    """The arm that drifts least among those with enough of the gain."""
    fit = {}
    for key in study.end_keys():
        plain = key.arm == "vanilla" and key.part == 1
        if not plain and key.arm not in CONTROLS and study.seeds_of(key, vanilla):
            found = read_moonshot(study, key, vanilla)
            if found.gain_share >= SCREENED_GAIN:
                fit[key] = found.drift_share
    return min(fit, key=fit.get) if fit else None


def curve(study: Study, key: Key, along: str) -> list[Key]:
    """The points of an arm's curve, the base first.

    along "training": its exports. along "weights": its end, and between it and the base.
    """
    keys = [study.BASE]
    for other in study.points:
        same = (other.rate, other.arm) == (key.rate, key.arm)
        wanted = other.part == 1 if along == "training" else other.step == 0
        if same and wanted:
            keys.append(other)
    return keys


def path(study: Study, key: Key, seed: int, along: str, name: str) -> tuple:
    """-> chrF++ and another measure [points] along an arm's curve."""
    keys = curve(study, key, along)
    points = [study.points[k][seed].values for k in keys if seed in study.points[k]]
    return tuple(np.array([values[n][0] for values in points]) for n in ("chrf++", name))


def beyond_the_line(study: Study, key: Key, vanilla: Key, name: str) -> np.ndarray:
    """A measure of an arm less vanilla's at equal drift, on vanilla's way back to the base.

    [seeds, 1 + draws], of the seeds that have all these points; NaN where vanilla is not measured
    on both sides of that drift. Between two points the measure is taken to be linear in the root
    of the drift, which is about linear in the way.
    """
    keys = sorted(curve(study, vanilla, "weights")[1:], key=lambda point: point.part)
    seeds = study.seeds_of(key, *keys)
    x = np.stack([study.stack(point, "kl", seeds) ** 0.5 for point in keys])
    y = np.stack([study.stack(point, name, seeds) for point in keys])
    drift = study.stack(key, "kl", seeds) ** 0.5
    own = study.stack(key, name, seeds)
    expected = np.empty_like(own)
    for seed, draw in np.ndindex(own.shape):
        ends = {"left": np.nan, "right": np.nan}
        at = drift[seed, draw]
        expected[seed, draw] = np.interp(at, x[:, seed, draw], y[:, seed, draw], **ends)
    return own - expected


def level_grid(study: Study, vanilla: Key) -> np.ndarray:
    """Levels of chrF++, the same for all arms and seeds."""
    seeds = study.seeds_of(vanilla)
    start = study.stack(study.BASE, "chrf++", seeds).mean(0)[0]
    end = study.stack(vanilla, "chrf++", seeds).mean(0)[0]
    return start + np.array(LEVELS) * (end - start)


# 4. Tables


def print_table(title: str, header: list[str], rows: list[list[str]]):
    print(f"\n### {title}\n")
    print(f"| {' | '.join(header)} |")
    print("|" + "---|" * len(header))
    for row in rows:
        print(f"| {' | '.join(row)} |")


def digits_of(name: str) -> int:
    """Nats have three digits after the point."""
    return 3 if name.startswith(("kl", "human", "margin")) else 1


def moonshot_row(study: Study, key: Key, vanilla: Key) -> list[str]:
    found = read_moonshot(study, key, vanilla)
    kept = losses(study, key)
    worse = beyond_margin(kept)
    cells = [key.rate, key.title, str(len(study.seeds_of(key, vanilla)))]
    cells += [f"{100 * found.gain_share:.0f} %", f"{100 * found.drift_share:.0f} %"]
    cells += [interval.text(2) for interval in found.a]
    cells += [interval.text(3) for interval in found.b]
    cells.append(", ".join(worse) or ("none" if kept else "not measured"))
    reached = "no"
    if found.reached and not worse:
        reached = "yes" if kept else "but for what was not measured"
    return [*cells, reached]


def print_moonshot(title: str, study: Study, vanilla: Key, keys: list[Key]):
    header = ["rate", "arm", "seeds", "share of gain", "share of drift"]
    header += ["a, over seeds", "a, over items", "b, over seeds", "b, over items"]
    header += ["beyond margin", "reached"]
    rows = [moonshot_row(study, key, vanilla) for key in keys if study.seeds_of(key, vanilla)]
    print_table(title, header, rows)


def print_ends(study: Study):
    """Every arm at its end: values, and what it cost."""
    names = [name for name in TITLES if name in study.measures()]
    header = ["rate", "arm", "seeds", *(TITLES[name] for name in names)]
    header += ["trained tokens", "read by the teacher", "sampled"]
    rows = []
    for key in [study.BASE, *study.end_keys()]:
        seeds = study.seeds_of(key)
        cells = [key.rate, key.title, str(len(seeds))]
        for name in names:
            cells.append(over_items(study.stack(key, name, seeds)).text(digits_of(name)))
        for name in ("trained", "taught", "sampled"):
            cost = [study.points[key][seed].cost.get(name, 0) for seed in seeds]
            cells.append(f"{np.mean(cost):,.0f}")
        rows.append(cells)
    print_table("At the end of training (intervals over items)", header, rows)


def print_seeds(study: Study):
    """What the intervals over seeds are made of."""
    seeds = study.seeds_of()
    rows = []
    for key in [study.BASE, *study.end_keys()]:
        cells = [key.rate, key.title]
        for seed in seeds:
            point = study.points[key].get(seed)
            values = [point.values[name][0] for name in ("chrf++", "kl")] if point else []
            cells.append(", ".join(f"{x:.{n}f}" for x, n in zip(values, (1, 3))))
        rows.append(cells)
    header = ["rate", "arm", *(f"seed {seed}" for seed in seeds)]
    print_table("Seed by seed at the end of training: chrF++, KL", header, rows)


def print_difference(study: Study, vanilla: Key, titles: list[str]):
    """One arm less another, at their ends: over the seeds and the items that both have."""
    pair = []
    for title in titles:
        found = [key for key in study.end_keys() if key.title == title and key.rate == vanilla.rate]
        if not found:
            sys.exit(f"error: --less: nothing is called {title!r} at the rate {vanilla.rate}")
        pair += found
    arm, other = pair
    seeds = study.seeds_of(arm, other)
    if not seeds:
        sys.exit(f"error: --less: {arm.title} and {other.title} have no seed in common")
    rows = []
    for name in TITLES:
        if name in study.measures():
            change = study.stack(arm, name, seeds) - study.stack(other, name, seeds)
            intervals = (over_seeds(change[:, 0]), over_items(change))
            rows.append([TITLES[name], *(x.text(3) for x in intervals)])
    title = f"{arm.title} less {other.title}, seeds {' '.join(map(str, seeds))}"
    print_table(title, ["measure", "over seeds", "over items"], rows)


def print_line(study: Study, vanilla: Key):
    """What an arm gives beyond a step back, which costs nothing; Holm over all that is printed."""
    names = {"chrf++": 2, "kl task": 3, "length": 1}  # digits
    names = {name: digits for name, digits in names.items() if name in study.measures()}
    rows = []
    tests = []
    for key in study.end_keys():
        seeds = study.seeds_of(key, *curve(study, vanilla, "weights"))
        if key.arm == "vanilla" or not seeds:
            continue
        found = {name: beyond_the_line(study, key, vanilla, name) for name in names}
        if np.isnan(found["chrf++"][:, 0]).any():
            continue
        cells = [key.rate, key.title, str(len(seeds))]
        for name, digits in names.items():
            intervals = (over_seeds(found[name][:, 0]), over_items(found[name]))
            cells += [interval.text(digits) for interval in intervals]
            if name == "chrf++":
                tests.append(intervals[0].p)
        rows.append(cells)
    for row, p in zip(rows, holm(tests)):
        row.append("" if np.isnan(p) else f"{p:.3f}")
    if rows:
        header = ["rate", "arm", "seeds"]
        for name in names:
            header += [f"{TITLES[name]}, over seeds", "over items"]
        header.append("p of chrF++ (Holm)")
        print_table("Less vanilla on its way back to the base, at equal drift", header, rows)


def print_kept(study: Study):
    """Losses against the base. No arm trains on these, but where the name says so."""
    names = kept_measures(study)
    if not names:
        return
    header = ["rate", "arm", "seeds"]
    rows = []
    for key in study.end_keys():
        found = losses(study, key)
        cells = [key.rate, key.title, str(len(study.seeds_of(key)))]
        for name in names:
            cells += [interval.text(digits_of(name)) for interval in found[name]]
        rows.append(cells)
    for name in names:
        title = TITLES.get(name, name)
        header += [f"{title}, over seeds", "over items"]
    print_table("Worse than the base by", header, rows)


def print_curves(study: Study, vanilla: Key, name: str, along: str):
    """A measure at the fixed levels of chrF++, and the difference to vanilla at one of them."""
    levels = level_grid(study, vanilla)
    tested = LEVELS.index(TESTED_LEVEL)
    sign = -1 if name.startswith("skills") else 1  # skills fall where translation gains
    rows = []
    tests = []
    for key in study.end_keys():
        seeds = study.seeds_of(key, vanilla)
        points = min(len(curve(study, k, along)) for k in (key, vanilla))
        if key.part != 1 or not seeds or points < 4:
            continue  # one point between base and end makes no curve
        both = []
        for k in (key, vanilla):
            curves = [path(study, k, seed, along, name) for seed in seeds]
            both.append([sign * read_curve(x, sign * y, levels) for x, y in curves])
        read, other = np.array(both)  # [seeds, levels] each
        difference = read[:, tested] - other[:, tested]
        difference = difference[~np.isnan(difference)]
        test = over_seeds(difference) if len(difference) else Interval(*[float("nan")] * 3)
        tests.append(float("nan") if key == vanilla else test.p)
        cells = [key.rate, key.title, str(len(seeds))]
        for column in read.T:
            reached = column[~np.isnan(column)]
            text = f"{reached.mean():.{digits_of(name)}f}" if len(reached) else "-"
            cells.append(text + (f" ({len(reached)})" if 0 < len(reached) < len(seeds) else ""))
        rows.append([*cells, "" if key == vanilla else test.text(digits_of(name))])
    for row, p in zip(rows, holm(tests)):
        row.append("" if np.isnan(p) else f"{p:.3f}")
    header = ["rate", "arm", "seeds"]
    header += [f"{100 * share:.0f} % ({x:.1f})" for share, x in zip(LEVELS, levels)]
    header += [f"less vanilla's at {100 * TESTED_LEVEL:.0f} %", "p (Holm)"]
    title = f"{TITLES.get(name, name)} at equal chrF++, along {along}"
    if len(rows) > 1:
        print_table(f"{title} (shares of vanilla's gain)", header, rows)


# 5. The picture


def draw(study: Study, file: Path, name: str, title: str):
    """A panel a rate: chrF++ against another measure, a path an arm, the mean over its seeds."""
    from matplotlib.figure import Figure

    rates = sorted({key.rate for key in study.end_keys()}, key=float)
    figure = Figure(figsize=(6 * len(rates) + 2, 5), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(rates), sharey=True))
    arms = list(dict.fromkeys(key.arm for key in study.end_keys()))
    for rate, axes in zip(rates, panels):
        for i, arm in enumerate(arms):
            key = Key(rate, arm)
            seeds = study.seeds_of(key)
            if seeds:
                paths = [path(study, key, seed, "training", name) for seed in seeds]
                x, y = np.mean(paths, axis=0)
                order = [0, *(1 + np.argsort(steps_of(study, key)))]
                style = "-" if i < 10 else "--"
                axes.plot(x[order], y[order], style, marker="o", markersize=4, label=arm)
        start = [study.points[study.BASE][seed].values for seed in study.seeds_of()]
        x = np.mean([values["chrf++"][0] for values in start])
        y = np.mean([values[name][0] for values in start])
        axes.plot([x], [y], "ko", markersize=7)
        beyond = -18 if name == "kl" else 10  # points; the paths go the other way
        place = {"xytext": (0, beyond), "textcoords": "offset points", "ha": "center"}
        axes.annotate("base", (x, y), **place)
        axes.margins(0.12)
        axes.set(xlabel="translation: chrF++", title=f"learning rate {rate}")
    panels[0].set_ylabel(title)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(file, dpi=120)


def steps_of(study: Study, key: Key) -> list[float]:
    """The steps of an arm's exports in the order of `path`; its end is the last."""
    same = [k for k in study.points if (k.rate, k.arm, k.part) == (key.rate, key.arm, 1.0)]
    return [k.step or float("inf") for k in same]


# 6. Everything


def print_all(study: Study, screen: list[int], confirm: list[int]):
    screened = study.only(screen)
    vanilla = best_vanilla(screened)
    seeds = " ".join(map(str, screened.seeds_of()))
    print(f"Vanilla at its best: rate {vanilla.rate}. Seeds: {seeds}.")
    chosen = choose(screened, vanilla)
    confirmed = study.only(confirm)
    if confirm and chosen and confirmed.points and confirmed.seeds_of(chosen, vanilla):
        print_moonshot("The arm that was chosen, on other seeds", confirmed, vanilla, [chosen])
    candidates = screened.end_keys()
    print_moonshot(f"Every arm, on seeds {seeds}", screened, vanilla, candidates)
    if chosen:
        print(f"\nChosen there: {chosen.title}, rate {chosen.rate}.")
    print_ends(screened)
    print_seeds(screened)
    print_line(screened, vanilla)
    print_kept(screened)
    for along in ("training", "weights"):
        for name in ("kl", *TRAINED, "skills/neither"):
            if name in study.measures():
                print_curves(screened, vanilla, name, along)


def main(args: argparse.Namespace):
    study = read_study(args.out)
    screen = args.screen or [s for s in study.seeds_of() if s not in args.confirm]
    print_all(study, screen, args.confirm)
    for titles in args.less:
        print_difference(study, best_vanilla(study.only(screen)), titles)
    if args.plot:
        draw(study.only(screen), args.plot, "kl", "drift: KL(base || model), nats a token")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Tables and a picture of what arms.py has measured.")
    add = p.add_argument
    add("--out", type=Path, required=True, help="the folder of arms.py")
    add("--screen", type=int, nargs="+", default=[], help="seeds to choose on (default: all)")
    add("--confirm", type=int, nargs="+", default=[], help="seeds to test what was chosen on")
    less = {"nargs": 2, "metavar": ("ARM", "OTHER"), "action": "append", "default": []}
    add("--less", **less, help="their paired difference, too; may be given several times")
    add("--plot", type=Path, metavar="FILE.png", help="chrF++ against drift (matplotlib)")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
