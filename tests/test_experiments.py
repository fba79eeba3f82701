"""The experiments: the small world, a shortened demo, the harness, and how its curves are read."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import LINES, read_jsonl, write_jsonl

from data import Encoder, Tokenizer, read_rows
from model import Transformer

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import arms  # noqa: E402
import demo  # noqa: E402
import judges  # noqa: E402
import prompts  # noqa: E402
import readings  # noqa: E402
import seven_b  # noqa: E402
from readings import Key, Point, Study  # noqa: E402
from world import CHOICE, MEMORY, NUMERIC, REPLAYED, write_world  # noqa: E402

import evaluate  # noqa: E402

DRAWS = 50
GAINS = [(0, 9.0), (1, 10.0), (2, 11.0)]  # vanilla's in chrF++, by seed


# the small world


@pytest.mark.parametrize("seed", [0, 7])
def test_every_task_of_the_world_is_read_and_only_memory_was_in_training(seed, folder, tmp_path):
    write_world(tmp_path, seed, chats=20000, pairs=400, tests=60)
    tasks = tmp_path / "tasks"
    words = ["--model", folder, "--out", tmp_path, "--chat", "llama2", "--safety"]
    words += [tasks / "safety.jsonl", "--translation", tasks / "translation.jsonl"]
    words += ["--choice", *(tasks / f"{name}.jsonl" for name in CHOICE)]
    words += ["--numeric", *(tasks / f"{name}.jsonl" for name in NUMERIC)]
    args = evaluate.parser().parse_args([str(word) for word in words])
    tests = evaluate.read_tests(args, Encoder(Tokenizer(folder, "llama2")))
    assert len(tests) == 10  # requests are two: harmful and benign
    trained = {row["prompt"] for row in read_jsonl(tmp_path / "chats.jsonl")}
    for key, rows in tests.items():
        if key.split("/")[1] not in MEMORY:
            assert not trained & {row["asked"] for row in rows}, key
    known = {row["source"] for row in read_jsonl(tmp_path / "pairs.jsonl")}
    for name in ("tasks/translation.jsonl", "valid.jsonl"):
        rows = read_jsonl(tmp_path / name)
        assert len(rows) == 60 and not known & {row["source"] for row in rows}


def test_what_is_replayed_in_the_world_is_not_measured_there(tmp_path):
    write_world(tmp_path, 0, chats=2000, pairs=100, tests=60)
    replayed = {row["prompt"] for row in read_jsonl(tmp_path / "replay.jsonl")}
    assert replayed and not replayed & {
        r["prompt"] for r in read_jsonl(tmp_path / "questions.jsonl")
    }
    for skill in (*CHOICE, *NUMERIC, "safety"):
        rows = read_jsonl(tmp_path / f"tasks/{skill}.jsonl")
        asked = {row.get("prompt") or row["question"] for row in rows}
        assert not replayed & asked, skill
    first = {text.split()[0] for text in replayed}
    assert {"Say", "Spell"}.isdisjoint(first), f"only {REPLAYED}"


def test_a_shortened_demo_shows_forgetting_and_that_radis_and_replay_forget_less(
    tmp_path, monkeypatch, capsys
):
    sizes = "--chats 3000 --world-pairs 640 --base-steps 320 --tests 20 --general 16"
    monkeypatch.setattr(demo, "SIZES", sizes)
    monkeypatch.setattr(demo, "POINTS", (40,))
    monkeypatch.setattr(demo, "RATE", "2e-3")
    monkeypatch.setattr(demo, "WORKERS", 1)
    out = tmp_path / "run"
    demo.main(demo.parser().parse_args(["--out", str(out)]))
    said = capsys.readouterr().out
    assert "$ python generate.py" in said and "How old is" in said
    assert (out / "comparison.png").exists()
    study = readings.read_study(out)
    ends = {key.arm: study.points[key][0].values for key in study.points}
    skill = {arm: values["chrf++"][0] for arm, values in ends.items()}
    kept = {arm: values["skills"][0] for arm, values in ends.items()}
    drift = {arm: values["kl"][0] for arm, values in ends.items()}
    assert min(skill[arm] for arm in demo.ARMS) > skill["base"] + 2, skill
    assert kept["vanilla"] < kept["base"] - 10 and drift["base"] == 0, kept
    for arm in ("RaDis", "soft replay 1"):
        assert kept[arm] > kept["vanilla"] + 6, kept
        assert drift[arm] < 0.8 * drift["vanilla"], drift


# the harness on a real model's files


def write_alma(folder: Path) -> Path:
    """One language in ALMA's layout, of the sentences of these tests."""
    rows = []
    for english, german in zip(LINES[::2], LINES[1::2]):
        rows.append({"translation": {"de": german, "en": english}})
    rows += rows  # enough for two steps
    (folder / "deen").mkdir(parents=True)
    for name in ("train.de-en", "valid.de-en", "test.de-en", "test.en-de"):
        (folder / f"deen/{name}.json").write_text(json.dumps(rows), "utf-8")
    return folder


@pytest.fixture(scope="module")
def rehearsal(folder, tmp_path_factory):
    """seven_b.py with a tiny model, two arms and two steps -> its arguments and the study."""
    here = tmp_path_factory.mktemp("seven")
    write_jsonl(here / "prompts.jsonl", [{"prompt": f"What is {i}?"} for i in range(3)])
    write_jsonl(here / "drift.jsonl", [{"question_id": 1, "turns": ["Who is it?", "And now?"]}])
    write_jsonl(here / "human.jsonl", [{"prompt": "Where?", "response": "At the harbour."}])
    rows = []
    for i in range(12):
        choices = ["waits.", "wait."]
        rows.append({"prompt": f"The boat {i}", "choices": choices, "answer": i % 2, "uid": "a"})
    write_jsonl(here / "choice.jsonl", rows)
    shutil.copytree(folder, here / "tiny")
    words = ["--models", here / "tiny", "--alma", write_alma(here / "alma"), "--out", here / "out"]
    words += "--points 1 2 --batch-size 8 --tests 3 --rates 1e-3 --seeds 0 --parts 0.4 0.6".split()
    words += "--new-tokens 6 --answer-tokens 8 --rows 8 --dtype float32 --general 2".split()
    words += ["--prompts", here / "prompts.jsonl", "--drift", here / "drift.jsonl"]
    words += ["--human", here / "human.jsonl", "--choice", here / "choice.jsonl"]
    words += ["--arms", "vanilla", "soft replay 3", "no EOS"]
    words = [str(word) for word in words]
    seven_b.main(seven_b.parse(words))
    return here, words


def test_the_7b_experiment_is_rehearsed_on_a_tiny_model(rehearsal, capsys):
    here, words = rehearsal
    study = readings.read_study(here / "out/tiny")
    ends = {key.title for key in study.end_keys()}
    assert ends >= {
        "vanilla",
        "vanilla, at 0.6",
        "soft replay 3",
        "soft replay 3, at 0.6",
        "no EOS",
    }
    base = study.points[Study.BASE][0].values
    assert {"chrf++", "kl", "kl task", "human", "choice/choice"} <= base.keys()
    assert base["length"][0] > 1, "general prompts were answered anew"
    assert base["kl"][0] == 0 and base["human"][0] > 0
    assert "kl reverse" not in base, "both ways are learnt"
    for key in study.end_keys():
        assert study.points[key][0].values["kl"][0] > 0, key
    with_valid = {key.title for key in study.end_keys() if "valid" in study.points[key][0].values}
    assert with_valid == {"vanilla"}, "the rate is vanilla's best"
    cost = {key.title: study.points[key][0].cost for key in study.end_keys()}
    assert cost["soft replay 3"]["taught"] > cost["vanilla"]["trained"] > 0
    assert cost["vanilla"]["sampled"] == 0
    assert cost["soft replay 3"]["sampled"] > 0
    assert not [*(here / "out/tiny/models").rglob("*.safetensors")], "models are not kept"
    readings.print_all(study, [0], [])
    printed = capsys.readouterr().out
    vanilla = study.points[readings.best_vanilla(study)][0].values
    assert f"| vanilla | {vanilla['chrf++'][0]:.1f}, {vanilla['kl'][0]:.3f} |" in printed
    assert "along weights" in printed
    best = readings.best_vanilla(study)
    readings.print_difference(study, best, ["vanilla", "vanilla, at 0.6"])
    nearer = study.points[Key(best.rate, "vanilla", 0.6)][0].values
    assert f"| KL | {vanilla['kl'][0] - nearer['kl'][0]:.3f} | " in capsys.readouterr().out
    seven_b.main(seven_b.parse([*words, "--forecast"]))
    assert "GPU hours" in capsys.readouterr().out


def test_what_is_finished_is_kept_and_another_experiment_is_refused(rehearsal):
    here, words = rehearsal
    points = {file: file.stat().st_mtime_ns for file in here.glob("out/tiny/points/**/*.npz")}
    next(iter(points)).unlink()
    seven_b.main(seven_b.parse(words))
    again = {file: file.stat().st_mtime_ns for file in here.glob("out/tiny/points/**/*.npz")}
    assert again.keys() == points.keys()
    assert sum(again[file] != points[file] for file in points) == 1
    with pytest.raises(ValueError, match="tests was 3, now 4"):
        seven_b.main(seven_b.parse([*words, "--tests", "4"]))


def test_files_of_an_experiment_may_lie_elsewhere_but_not_hold_something_else(rehearsal, tmp_path):
    here, words = rehearsal
    files = seven_b.write_pairs(here / "alma", here / "out/pairs")
    moved = Path(shutil.copy(here / "drift.jsonl", tmp_path))
    rest = [*seven_b.parse(words).rest, "--drift", str(moved)]
    model = shutil.copytree(here / "tiny", tmp_path / "tiny")

    def check():
        args = arms.settle(seven_b.settings_of(model, files, here / "out", rest))
        arms.check_settings(args)
        return args

    args = check()
    arms.check_texts(args)
    measured = here / "out/tiny/tests/drift/general-drift.jsonl"
    before = measured.read_text("utf-8")
    rows = read_jsonl(measured)
    write_jsonl(measured, [rows[0] | {"rationale": "another sample"}, *rows[1:]])
    with pytest.raises(ValueError, match=r"texts.json: tests/drift/general-drift.jsonl was"):
        arms.check_texts(args)
    measured.write_text(before, "utf-8")
    write_jsonl(moved, [{"prompt": "Who is she?"}])
    with pytest.raises(ValueError, match="drift was .*drift.jsonl"):
        check()
    shutil.copy(here / "drift.jsonl", tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 12345.0}))
    with pytest.raises(ValueError, match="model was"):
        check()


def test_the_control_without_eos_ends_in_reference_and_cue(rehearsal):
    here, _ = rehearsal
    file = here / "out/tiny/seed-0/drawn/bare.jsonl"
    tokenizer = Tokenizer(here / "tiny")
    for row in read_rows([file]):
        example = Encoder(tokenizer).example(row)
        ids = example.reference + example.rationale
        assert tokenizer.end_id not in ids and tokenizer.decode(ids) == row["reference"] + "\n"


def test_without_a_cue_the_control_goes_on_with_the_first_token_and_does_not_end(folder):
    tokenizer = Tokenizer(folder)
    reference = tokenizer.answer("a b")
    whole = tokenizer.answer("a b\nand so on")
    rationale = whole[len(reference) :]
    row = {"id": 0, "source": "x", "source_lang": "de", "target_lang": "en", "reference": "a b"}
    row |= {"reference_ids": reference, "rationale": "", "rationale_ids": [], "finish": "eos"}
    meta = {"tokenizer_hash": tokenizer.hash, "chat": tokenizer.chat_name}
    row |= {"meta": meta, "where": "", "status": "empty"}
    ended = Encoder(tokenizer).example(arms.bare(row, tokenizer, ""))
    assert ended.reference == [*reference, tokenizer.end_id] and not ended.rationale
    row |= {"rationale": "\nand so on", "rationale_ids": rationale, "status": "ok"}
    cut = Encoder(tokenizer).example(arms.bare(row, tokenizer, ""))
    assert (cut.reference, cut.rationale) == (reference, rationale[:1])


def test_weights_of_replay_compare_means_not_tokens(rehearsal):
    here, words = rehearsal
    args = seven_b.parse(words)
    files = seven_b.write_pairs(here / "alma", here / "again")
    args = arms.settle(seven_b.settings_of(here / "tiny", files | {}, here / "other", args.rest))
    args.out = here / "out/tiny"
    arm = arms.ARMS["soft replay 3"]
    tokens = {"reference": 0, "rationale": 0}
    for row in read_rows(arms.data_files(args, 0, arm)):
        example = Encoder(Tokenizer(here / "tiny")).example(row)
        for name in tokens:
            tokens[name] += len(getattr(example, name))
    weight = arms.joint_weight(args, 0, arm)
    assert weight * tokens["rationale"] == pytest.approx(3 * tokens["reference"])
    assert arms.joint_weight(args, 0, arms.ARMS["RaDis"]) == 1


def test_a_prompt_that_is_measured_is_not_replayed(tmp_path):
    asked = write_jsonl(tmp_path / "drift.jsonl", [{"question_id": 1, "turns": ["Who is it? "]}])
    words = ["--out", tmp_path, "--drift", asked]
    args = arms.parser().parse_args([str(word) for word in words])
    row = {"messages": [{"role": "user", "content": "Who is it?"}], "where": "prompts.jsonl:1"}
    with pytest.raises(ValueError, match="which is measured"):
        arms.require_disjoint(args, [row])


def test_interpolation_goes_from_base_to_tuned(folder, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(folder, tuned)
    model = Transformer.from_pretrained(folder)
    for p in model.parameters():
        p.data += 1
    model.save_pretrained(tuned)
    arms.interpolate(folder, tuned, tmp_path / "between", 0.25, "float32")
    base = Transformer.from_pretrained(folder)
    between = Transformer.from_pretrained(tmp_path / "between")
    for p, q in zip(base.parameters(), between.parameters()):
        assert (q - p - 0.25).abs().max() < 1e-6
    assert Tokenizer(tmp_path / "between").hash == Tokenizer(folder).hash


def test_margins_are_of_what_the_base_can_do_measured_on_other_items(tmp_path):
    rows = []
    for uid in ("known", "guessed"):
        rows += [{"prompt": uid, "choices": ["a", "b"], "answer": 0, "uid": uid}] * 8
    file = write_jsonl(tmp_path / "choices.jsonl", rows)
    right = {"base": [1] * 8 + [1, 0] * 4, "tuned": [0] * 16}
    for name, found in right.items():
        items = []
        for i, acc in enumerate(found):
            margin = 2.0 if name == "base" else float(i)
            items.append({"id": i, "choices": ["a", "b"], "acc": acc, "margin": margin})
        (tmp_path / name / "items/choice").mkdir(parents=True)
        write_jsonl(tmp_path / name / "items/choice/choices.jsonl", items)
    found = arms.measure_choice_file(file, tmp_path / "tuned", tmp_path / "base")
    # of "guessed" the screening half is all right by chance: its other half is measured, too
    assert found["margin/choices"].value == np.mean([1, 3, 5, 7, 9, 11, 13, 15])
    write_jsonl(
        tmp_path / "base/items/choice/choices.jsonl",
        [{"id": i, "choices": ["a", "b"], "acc": i < 8} for i in range(16)],
    )
    found = arms.measure_choice_file(file, tmp_path / "tuned", tmp_path / "base")
    assert found["margin/choices"].value == np.mean([1, 3, 5, 7])
    assert found["choice/choices"].value == 0


# how it is read


def point(chrf: float, kl: float, human: float = 3.0, noise: float = 0.0) -> Point:
    rng = np.random.default_rng(0)
    values = {}
    found = {"chrf++": chrf, "kl": kl, "human": human, "valid": chrf, "length": 9 - kl**0.5}
    for name, value in found.items():
        values[name] = np.concatenate([[value], value + noise * rng.standard_normal(DRAWS)])
    return Point(values, {})


def made_up(share: float, drift: float, human: float, noise: float = 0.0) -> Study:
    """Three seeds: base at 10, vanilla at 20 +- 1 and KL 0.2; an arm with shares of these."""
    base = Study.BASE
    vanilla = Key("1e-4", "vanilla")
    arm = Key("1e-4", "soft replay 3")
    points = {base: {}, vanilla: {}, arm: {}}
    for seed, gain in GAINS:
        points[base][seed] = point(10, 0, 3.0, noise)
        points[vanilla][seed] = point(10 + gain, 0.02 * gain, 3.0, noise)
        points[arm][seed] = point(10 + share * gain, drift * 0.02 * gain, human, noise)
    return Study(points)


@pytest.mark.parametrize(
    "share, drift, human, reached",
    [
        (0.98, 0.05, 3.0, True),
        (0.94, 0.05, 3.0, False),
        (0.98, 0.11, 3.0, False),
        (0.98, 0.05, 3.1, False),  # an independent measure has suffered
    ],
)
def test_the_moonshot_needs_gain_little_drift_and_nothing_else_lost(share, drift, human, reached):
    study = made_up(share, drift, human)
    vanilla = readings.best_vanilla(study)
    row = readings.moonshot_row(study, Key("1e-4", "soft replay 3"), vanilla)
    assert row[3:5] == [f"{100 * share:.0f} %", f"{100 * drift:.0f} %"]
    assert row[-1] == ("yes" if reached else "no"), row
    assert (row[-2] == "human") == (human > 3.02)


def test_one_seed_reaches_nothing_and_seeds_that_disagree_neither():
    study = made_up(0.98, 0.05, 3.0)
    arm = Key("1e-4", "soft replay 3")
    vanilla = Key("1e-4", "vanilla")
    assert readings.read_moonshot(study, arm, vanilla).reached
    assert not readings.read_moonshot(study.only([0]), arm, vanilla).reached
    study.points[arm][2] = point(12, 0.01)
    assert not readings.read_moonshot(study, arm, vanilla).reached


def test_the_arm_is_chosen_among_those_with_enough_of_the_gain():
    study = made_up(0.98, 0.05, 3.0)
    gentle = Key("1e-4", "soft replay 3", 0.4)
    study.points[gentle] = {seed: point(16, 0.001) for seed in range(3)}
    vanilla = readings.best_vanilla(study)
    assert readings.choose(study, vanilla) == Key("1e-4", "soft replay 3")
    hot = Key("3e-4", "vanilla")
    study.points[hot] = {seed: point(25, 0.5) for seed in range(3)}
    assert readings.best_vanilla(study) == hot, "by validation"


def test_curves_are_read_at_levels_by_a_monotone_fit():
    x = np.array([10.0, 30.0, 20.0, 40.0])
    y = np.array([0.0, 0.2, 0.4, 0.6])
    levels = np.array([10, 15, 25, 40, 45])
    found = readings.read_curve(x, y, levels)
    assert np.allclose(found[:4], [0, 0.15, 0.3, 0.6]) and np.isnan(found[4])
    assert readings.monotone([3, 1, 2, 5]).tolist() == [2, 2, 2, 5]


def test_arms_are_compared_with_vanillas_way_back_at_equal_drift(capsys):
    study = made_up(0.98, 0.36, 3.0)  # of drift as much as vanilla at 0.6
    arm, vanilla = Key("1e-4", "soft replay 3"), Key("1e-4", "vanilla")
    for part in (0.2, 0.4, 0.8):
        points = {seed: point(10 + part * gain, part**2 * 0.02 * gain) for seed, gain in GAINS}
        study.points[Key("1e-4", "vanilla", part)] = points
    for by_seed in study.points.values():  # items that are drawn are the same for all
        for values in by_seed.values():
            values.values["chrf++"][1:] += np.arange(DRAWS)
    for values in study.points[arm].values():
        values.values["length"] += 24
    found = readings.beyond_the_line(study, arm, vanilla, "chrf++")
    assert np.allclose(found, [[0.38 * gain] * (1 + DRAWS) for _, gain in GAINS])
    readings.print_line(study, vanilla)
    row = (
        "| 3.80 [2.86, 4.74] | 3.80 [3.80, 3.80] | 24.0 [24.0, 24.0] | 24.0 [24.0, 24.0] | 0.003 |"
    )
    assert row in capsys.readouterr().out
    for drift in (0.03, 1.1):  # nothing is known of vanilla there
        study.points[arm] = made_up(0.98, drift, 3.0).points[arm]
        assert np.isnan(readings.beyond_the_line(study, arm, vanilla, "chrf++")).all()
    readings.print_line(study, vanilla)
    assert not capsys.readouterr().out


def test_points_without_the_lengths_of_answers_are_refused(tmp_path):
    old = {"points": [64], "lengths": False}
    (tmp_path / "settings.json").write_text(json.dumps(old))
    with pytest.raises(SystemExit, match="earlier state of arms.py"):
        readings.read_study(tmp_path)


def test_what_was_not_measured_is_not_called_kept():
    study = made_up(0.98, 0.05, 3.0)
    for by_seed in study.points.values():
        for values in by_seed.values():
            del values.values["human"]
    row = readings.moonshot_row(study, Key("1e-4", "soft replay 3"), readings.best_vanilla(study))
    assert row[-2:] == ["not measured", "but for what was not measured"]


def test_two_points_beside_base_and_end_make_a_curve(capsys):
    study = made_up(0.98, 0.5, 3.0)
    arm, vanilla = Key("1e-4", "soft replay 3"), Key("1e-4", "vanilla")
    for step in (1, 2):
        for key in (arm, vanilla):
            readings.print_curves(study, vanilla, "kl", "training")
            assert not capsys.readouterr().out, "of one point, or of one arm"
            way = step / 3
            points = {seed: point(10 + way * gain, way**2 * 0.01 * gain) for seed, gain in GAINS}
            study.points[Key("1e-4", key.arm, 1.0, step)] = points
    readings.print_curves(study, vanilla, "kl", "training")
    assert capsys.readouterr().out.count("| 1e-4 |") == 2


def test_intervals_over_seeds_are_students_and_holm_adjusts():
    quantiles = [readings.student_quantile(df) for df in (1, 2, 4, 9)]
    assert np.allclose(quantiles, [12.706, 4.303, 2.776, 2.262], atol=1e-3)
    found = readings.over_seeds([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert round(found.low, 3) == -0.484
    assert round(found.p, 4) == 0.0742
    assert np.allclose(readings.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])


def test_tables_of_the_results_are_what_readings_prints_of_the_points_that_are_kept(capsys):
    section = (EXPERIMENTS / "RESULTS.md").read_text("utf-8").split("\n## ")[1]
    command = re.search(r"readings\.py (--out experiments/smollm2(?:.*\\\n)*.*)", section)[1]
    words = command.replace("\\\n", " ").replace("experiments/", f"{EXPERIMENTS}/")
    readings.main(readings.parser().parse_args(shlex.split(words)))
    printed = []
    for text in (capsys.readouterr().out, section):
        printed.append([x.strip() for x in text.split("\n\n") if x.startswith("|")])
    assert printed[0] == printed[1] and len(printed[0]) > 3


# files for others


def test_the_second_turn_of_mt_bench_sees_the_first(folder, tmp_path):
    rows = [
        {"question_id": 9, "category": "math", "turns": ["What is it?", "Why?"]},
        {"question_id": 3, "category": "writing", "turns": ["Who?", "When?"]},
    ]
    questions = write_jsonl(tmp_path / "question.jsonl", rows)
    out = tmp_path / "answers.jsonl"
    words = ["mt-bench", "--model", folder, "--data", questions, "--out", out]
    words += ["--max-new-tokens", 6]
    judges.main(judges.parser().parse_args([str(word) for word in words]))
    lines = read_jsonl(out)
    assert [line["question_id"] for line in lines] == [3, 9]
    first = lines[1]["choices"][0]["turns"][0]
    asked = read_jsonl(tmp_path / "answers.parts/0.0-second.asked.jsonl")
    assert [turn["content"] for turn in asked[0]["messages"]] == ["What is it?", first, "Why?"]
    meta = json.loads((tmp_path / "answers.parts/0.7-first.meta.json").read_text())
    assert meta["temperature"] == 0.7


def test_comet_gets_a_line_a_segment(tmp_path, capsys):
    item = {"source": "a\nb", "hypothesis": "c", "reference": "d\u2028e"}
    items = write_jsonl(tmp_path / "test.jsonl", [item, item])
    words = ["comet", "--data", str(items), "--out", str(tmp_path / "comet")]
    judges.main(judges.parser().parse_args(words))
    assert "comet-score -s" in capsys.readouterr().out
    for name in ("source", "hypothesis", "reference"):
        assert len((tmp_path / f"comet/test.{name}.txt").read_text("utf-8").splitlines()) == 2


def test_prompts_for_replay_differ_and_depend_on_their_seed():
    texts = prompts.requests(3000, 0)
    assert len(set(texts)) == 3000 and texts == prompts.requests(3000, 0)
    assert texts != prompts.requests(3000, 1)
