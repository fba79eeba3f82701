"""The experiments: a shortened demo, the synthetic world, a study in miniature, and its report."""

import copy
import dataclasses
import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PAIRS, read_jsonl, write_jsonl

import evaluate
from data import Encoder, Tokenizer, read_rows
from model import Transformer, UserError

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import demo  # noqa: E402
import interpolate  # noqa: E402
import methods  # noqa: E402
import prompts  # noqa: E402
import report  # noqa: E402
import world  # noqa: E402


def call(script, words: str):
    """Runs a script as its command line does."""
    args = script.parser().parse_args(shlex.split(words))
    script.main(args)


def read_text(name: str) -> str:
    return (EXPERIMENTS / name).read_text("utf-8")


# the lesson

SHORTER = {
    "--pairs 3200 --tests 60": "--pairs 192 --tests 8 --chats 3000",
    "--max-steps 1100 --batch-size 32": "--max-steps 80 --batch-size 16",
    "--limit 1600": "--limit 96",
    "--max-steps 240": "--max-steps 12",
    "--warmup-steps 24": "--warmup-steps 2",
    "--learning-rate 1e-3": "--learning-rate 2e-3",
}


def test_in_a_shortened_demo_radis_and_replay_stay_closer_to_the_base(
    tmp_path, monkeypatch, capsys
):
    page = demo.PAGE
    for text, shorter in SHORTER.items():
        assert text in page
        page = page.replace(text, shorter)
    lines = page.split("\n")
    at_the_end = [line for line in lines if "/step-" not in line]
    monkeypatch.setattr(demo, "PAGE", "\n".join(at_the_end))
    monkeypatch.setattr(demo, "draw", lambda *_: None)

    call(demo, f"--out {tmp_path}/run")
    printed = capsys.readouterr().out
    assert "$ python generate.py $base" in printed
    assert "How old is" in printed
    values = {}
    for title in demo.ROWS:
        row = re.search(rf"^{re.escape(title)}.*", printed, re.MULTILINE)
        values[title] = [float(cell) for cell in row[0].split()[-4:]]
    base, vanilla, *_ = values["translation, chrF++"]
    assert vanilla > base
    base, vanilla, radis, replay = values["KL to base, 0.01 nats per token"]
    assert base == 0
    assert radis < 0.8 * vanilla
    assert replay < 0.8 * vanilla


def test_the_picture_of_the_demo_is_drawn(tmp_path):
    measures = {}
    for score, factor in demo.ROWS.values():
        measures[score] = {"value": 50 / factor}
    content = json.dumps({"measures": measures})
    folders = ["base"]
    for column in list(demo.COLUMNS.values())[1:]:
        for step in ("40", "120", "240"):
            folders.append(column.replace("240", step))
    for name in folders:
        results = tmp_path / name / "results.json"
        results.parent.mkdir()
        results.write_text(content)
    picture = tmp_path / "picture.png"
    demo.draw(tmp_path, picture)
    assert picture.stat().st_size > 10_000


def test_only_what_is_memory_was_in_training_and_no_replayed_prompt_is_tested(tmp_path):
    world.write_world(tmp_path, seed=7, chats=6000, pairs=200, tests=60)

    def asked(name):
        rows = read_jsonl(tmp_path / name)
        return {row.get("prompt") or row.get("question") for row in rows}

    trained = asked("chats.jsonl")
    replayed = asked("prompts.jsonl")
    general = asked("general.jsonl")
    assert len(general) == 80
    assert replayed.isdisjoint(general)
    for skill in world.SKILLS:
        (file,) = tmp_path.glob(f"tests/**/{skill}.jsonl")
        tested = asked(file)
        assert tested.isdisjoint(replayed), skill
        if skill in world.MEMORY:
            assert tested <= trained, skill
        else:
            assert tested.isdisjoint(trained), skill


def test_no_sentence_of_the_world_is_in_two_sets(tmp_path):
    world.write_world(tmp_path, seed=7, chats=500, pairs=200, tests=60)
    sources = []
    for name in ("pairs", "tests/test-vela", "task"):
        rows = read_jsonl(tmp_path / f"{name}.jsonl")
        sources += [row["source"] for row in rows]
    assert len(sources) == 320
    assert len(set(sources)) == 320


def test_the_exercises_name_lines_that_are_in_the_sources():
    text = read_text("README.md")
    blocks = re.findall(r"```diff\n--- (\S+)\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 8
    for name, block in blocks:
        source = (ROOT / name).read_text("utf-8")
        lines = source.split("\n")
        removed = re.findall(r"^-(.*)", block, re.MULTILINE)
        assert removed, block
        for line in removed:
            assert lines.count(line) == 1, line


def test_prompts_for_replay_differ_and_depend_on_their_seed():
    texts = prompts.requests(3000, seed=0)
    assert len(set(texts)) == 3000
    assert texts == prompts.requests(3000, seed=0)
    assert texts != prompts.requests(3000, seed=1)


# the study


@pytest.fixture(scope="module")
def study(folder, tmp_path_factory):
    """Three methods with a tiny model and two steps -> the folder, and the command."""
    here = tmp_path_factory.mktemp("study")
    write_jsonl(here / "pairs.jsonl", PAIRS + PAIRS[:5])
    write_jsonl(here / "test.jsonl", PAIRS[:3])
    write_jsonl(here / "task.jsonl", PAIRS[3:5])
    question = {"question_id": 1, "turns": ["Who is it?", "And now?"]}
    write_jsonl(here / "general.jsonl", [question])
    rows = []
    for kind in ("punctuation:no_comma", "detectable_format:title"):
        row = {"prompt": f"Write {kind}"}
        row["instruction_id_list"] = [kind]
        row["kwargs"] = [{}]
        rows.append(row)
    write_jsonl(here / "ifeval.jsonl", rows)
    rows = [{"prompt": f"What is {i}?"} for i in range(3)]
    write_jsonl(here / "prompts.jsonl", rows)
    command = f"""
        --model {folder} --out {here}/out --pairs {here}/pairs.jsonl --test {here}/test.jsonl
        --drift {here}/general.jsonl {here}/task.jsonl --prompts {here}/prompts.jsonl
        --seeds 0 --rate 1e-3 --steps 2 --batch-size 4 --weights 0.5
        --rationale-flags="--max-new-tokens 6 --cue '\\n'" --answer-flags="--max-new-tokens 8"
        --only vanilla "soft replay 3" EAFT --ifeval {here}/ifeval.jsonl
        """
    call(methods, command)
    return here, command


@pytest.fixture
def points(study):
    here, _ = study
    return report.read_points([here / "out"], "1e-3", [])


def test_a_study_measures_methods_and_models_between_them_and_the_base(points):
    kl = {title: by_seed[0]["KL"] for title, by_seed in points.items()}
    assert kl.pop("base") == 0
    assert list(kl)[::2] == ["vanilla", "soft replay 3", "EAFT"]
    for method in list(kl)[::2]:
        between = kl[f"{method}, interpolated 0.5"]
        assert 0 < between < kl[method]
    base = points["base"][0]
    assert base["answer length"] > 1
    assert 0 <= base["IFEval"] <= 100
    assert base["IFEval"] == (base["IFEval built"] + base["IFEval other"]) / 2


def test_a_study_keeps_no_models(study):
    here, _ = study
    models = here.glob("out/models/**/*.safetensors")
    assert not list(models)


def test_the_report_prints_what_was_measured(points, study, capsys):
    here, _ = study
    call(report, f"--out {here}/out --rate 1e-3 --minus vanilla base")
    printed = capsys.readouterr().out
    vanilla = points["vanilla"][0]
    chrf = vanilla["chrF++"]
    kl = vanilla["KL"]
    assert f"| vanilla | 1 | {chrf:.1f} | {kl:.3f} |" in printed
    cells = ["100.0", "100.0"]
    for name in report.RESULT[2:]:
        cells.append(f"{vanilla[name]:.1f}")
    row = " | ".join(cells)
    assert f"| vanilla | 1 | {row} |" in printed
    assert printed.count("| vanilla minus base | 1 |") == 2
    assert "Rank correlation with IFEval minus base, over 6 models" in printed
    with pytest.raises(UserError, match="no point of vanilla at the rate 2e-3"):
        call(report, f"--out {here}/out --rate 2e-3")
    with pytest.raises(UserError, match="--minus SDFT: must be one of base, vanilla"):
        call(report, f"--out {here}/out --rate 1e-3 --minus SDFT base")


def test_the_same_command_runs_what_is_missing(study, capsys):
    here, command = study
    files = list(here.glob("out/points/**/*.npz"))
    times = {file: file.stat().st_mtime_ns for file in files}
    removed = here / "out/points/seed-0/1e-3/vanilla/step-2-at-0.5.npz"
    removed.unlink()
    call(methods, command)
    assert removed.exists()
    del times[removed]
    for file, time in times.items():
        assert file.stat().st_mtime_ns == time
    scripts = re.findall(r"\$ python (\w+)\.py", capsys.readouterr().out)
    assert scripts.count("train") == 1
    assert scripts.count("evaluate") == 1


@pytest.mark.parametrize(
    "words, fault",
    [
        ("--steps 3", "steps was 2, now 3"),
        ("--pairs {here}/more.jsonl", "pairs was .*pairs.jsonl.*now .*more.jsonl"),
        ("--only RaDiS", "--only RaDiS: must be one of vanilla, RaDis"),
    ],
)
def test_other_settings_are_refused(words, fault, study):
    here, command = study
    write_jsonl(here / "more.jsonl", PAIRS)
    with pytest.raises(UserError, match=fault):
        call(methods, command + words.format(here=here))


CHANGED = ["vanilla, middle frozen", "soft RaDis, middle frozen", "repair", "EAFT", "DFT"]


def test_methods_that_change_the_loss_or_freeze_layers_run_and_say_so(study, points, folder):
    here, command = study
    call(methods, f'{command} --keep --only "{CHANGED[0]}" "{CHANGED[1]}" repair DFT')
    kl = {}
    for name in CHANGED:
        file = here / f"out/points/seed-0/1e-3/{methods.slug(name)}/step-2.npz"
        kl[name] = report.read_point(file)["KL"]
    vanilla = points["vanilla"][0]["KL"]
    assert len({0, vanilla, *kl.values()}) == 7
    start = Transformer.from_pretrained(folder).model
    for name in CHANGED[:2]:
        model = here / f"out/models/seed-0/1e-3/{methods.slug(name)}/step-2"
        end = Transformer.from_pretrained(model).model
        assert torch.equal(start["embed_tokens"].weight, end["embed_tokens"].weight)
    answers = read_jsonl(here / "out/models/seed-0/1e-3/repair/answers.jsonl")
    assert len(answers) == 4, "a quarter of the steps, at least one"
    log = (here / "out/logs/train.txt").read_text("utf-8")
    assert log.count("# with {'changed_loss': 'DFT', 'layers_at_ends': None}") == 1
    tuned = here / "out/models/seed-0/1e-3/DFT/step-2"
    assert json.loads((tuned / "args.json").read_text())["changed_loss"] == "DFT"


def test_a_run_is_not_resumed_with_another_loss(study, monkeypatch):
    _, command = study
    options = methods.parser().parse_args(shlex.split(command))
    options.out = Path(options.out).resolve()
    other = dataclasses.replace(methods.METHODS["DFT"], loss="EAFT")
    monkeypatch.setitem(methods.METHODS, "DFT", other)
    with pytest.raises(UserError, match="changed_loss was .DFT., now .EAFT."):
        methods.train_method(options, 0, "DFT")
    tuned = options.out / "models/seed-0/1e-3/DFT/step-2"
    (tuned / "config.json").unlink()  # as of a run that was stopped
    with pytest.raises(UserError, match="changed_loss was .DFT., now .EAFT."):
        methods.train_method(options, 0, "DFT")


def test_only_the_layers_at_both_ends_are_trained(folder):
    model = Transformer.from_pretrained(folder)
    layers = model.model["layers"]
    layers.extend(copy.deepcopy(layers[:1]))  # three layers
    optimizer = methods.train_ends(1 / 6, model, 0.0)
    for name, p in model.named_parameters():
        assert p.requires_grad == name.startswith(("model.layers.0.", "model.layers.2."))
    for p in layers[1].parameters():
        assert optimizer.state[p]["exp_avg"].shape == p.shape


@pytest.mark.parametrize("name", ["EAFT", "DFT"])
def test_the_weight_of_a_weighted_loss_has_no_gradient(name):
    torch.manual_seed(0)
    logits = (3 * torch.randn(8, 50)).requires_grad_()
    targets = torch.arange(8)
    losses = methods.LOSSES[name](logits, targets)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    probs = logits.softmax(-1)
    expected = -probs.log()[targets, targets]
    if name == "DFT":
        weights = probs[targets, targets]
    else:
        top, _ = probs.topk(20)
        top = top / top.sum(1, keepdim=True)
        entropy = -(top * top.log()).sum(1)
        weights = entropy / math.log(20)
    expected = expected * weights.detach()
    assert torch.allclose(losses, expected, atol=1e-6)
    expected.sum().backward()
    assert torch.allclose(gradient, logits.grad, atol=1e-6)


def test_points_of_an_earlier_study_get_the_answers_that_are_there(study, capsys):
    here, command = study
    file = here / "out/points/base.npz"
    content = dict(np.load(file))
    names = content["names"]
    old = np.char.find(names, "ifeval") < 0
    assert len(names) - old.sum() == 11
    for name in ("names", "values", "draws"):
        content[name] = content[name][old]
    np.savez(file, **content)
    call(methods, command)
    printed = capsys.readouterr().out
    assert "$ python" not in printed
    found = np.load(file)["names"]
    assert sorted(found) == sorted(names)


def test_the_weight_of_replay_compares_means_and_not_tokens(study, folder):
    here, _ = study
    encoder = Encoder(Tokenizer(folder))
    references = 0
    answers = 0
    for name in ("pairs", "answers-1"):
        for row in read_rows([here / f"out/seed-0/{name}.jsonl"]):
            example = encoder.example(row)
            references += len(example.reference)
            answers += len(example.rationale)
    log = (here / "out/logs/train.txt").read_text("utf-8")
    weight = re.search(r"answers-1.*--rationale-weight (\S+)", log)[1]
    assert float(weight) * answers == pytest.approx(3 * references, rel=1e-3)


def test_a_prompt_that_is_measured_is_not_replayed(study):
    here, command = study
    write_jsonl(here / "replayed.jsonl", [{"prompt": "Who is it? "}])
    options = methods.parser().parse_args(shlex.split(command))
    options.prompts = [here / "replayed.jsonl"]
    with pytest.raises(UserError, match="replayed.jsonl:1: this prompt is also in --drift"):
        methods.write_prompts(options, 0, 3, here / "written.jsonl")


@pytest.fixture
def tuned(folder, tmp_path):
    """A model whose weights are larger by 1, in bfloat16."""
    out = shutil.copytree(folder, tmp_path / "tuned")
    model = Transformer.from_pretrained(folder)
    for p in model.parameters():
        p.data += 1
    model.save_pretrained(out, torch.bfloat16)
    return out


def test_interpolation_is_between_base_and_tuned(folder, tuned, tmp_path):
    out = tmp_path / "out"
    call(interpolate, f"{folder} {tuned} 0.25 {out}")
    base = Transformer.from_pretrained(folder)
    between = Transformer.from_pretrained(out)
    for p, q in zip(base.parameters(), between.parameters()):
        error = (q - p - 0.25).abs().max()
        assert error < 2**-6  # twice the spacing of bfloat16 below 2
    assert Tokenizer(out).hash == Tokenizer(folder).hash
    config = json.loads((out / "config.json").read_text())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


def test_interpolation_overwrites_nothing_and_needs_the_same_tensors(folder, tuned, tmp_path):
    with pytest.raises(UserError, match="tuned: exists"):
        call(interpolate, f"{folder} {tuned} 0.25 {tuned}")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty: has no .*; give the base of"):
        call(interpolate, f"{empty} {tuned} 0.25 {tmp_path}/out")


# the report


def point(chrf: float, kl: float) -> dict:
    return {"chrF++": chrf, "KL": kl, "KL, task prompts": kl, "answer length": 9 - kl**0.5}


GAINS = {0: 9.0, 1: 10.0, 2: 11.0}  # of vanilla, by seed


def between(weight: float, kl: float) -> dict:
    """Points by seed, with shares of vanilla's gain and KL."""
    by_seed = {}
    for seed, gain in GAINS.items():
        by_seed[seed] = point(10 + weight * gain, kl * 0.02 * gain)
    return by_seed


def rows_of(printed: str) -> dict[str, list[str]]:
    """The cells of each row of the tables, by the first cell."""
    rows = {}
    for line in printed.split("\n"):
        name, *cells = line.strip("| ").split(" | ")
        rows[name] = cells
    return rows


def test_shares_of_gain_and_kl_and_the_seeds_that_have_a_value(capsys):
    points = {"base": between(0, 0), "vanilla": between(1, 1)}
    method = between(0.99, 0.04)
    method[1]["answer length"] += 2
    del method[2]
    points["soft RaDis"] = method
    report.add_comparisons(points)
    method[0]["IFEval"] = 30
    columns = ["gain, %", "KL, %", "answer length", "IFEval"]
    report.print_table("", points, dict.fromkeys(columns, 1))
    printed = capsys.readouterr().out
    cells = rows_of(printed)["soft RaDis"]
    # the lengths are 8.9 and 10.9; t of two seeds is 12.7
    assert cells == ["2", "99.0", "4.0", "9.9 [-2.8, 22.6]", "30.0 (1 seeds)"]


def test_p_values_of_the_questions_are_corrected_together():
    points = {}
    for title, change in {"base": 0, "vanilla": -5, "RaDis": 2}.items():
        points[title] = {}
        for seed in range(3):
            value = 30 + change * (1 + seed / 10)
            points[title][seed] = {"IFEval": value}
    pairs = [("vanilla", "base"), ("RaDis", "vanilla")]
    rows = report.compare(points, pairs, ["IFEval"])
    first = rows["vanilla minus base"]
    second = rows["RaDis minus vanilla"]
    # both t are 11 sqrt(3) = 19.05, with 2 degrees of freedom; Holm doubles p
    p = pytest.approx(2 * 0.00274, rel=1e-2)
    assert first[2]["IFEval"] == pytest.approx(-6)
    for seed in range(3):
        assert first[seed]["p, IFEval"] == p
        assert second[seed]["p, IFEval"] == p


def test_the_rank_correlation_is_spearmans(capsys):
    by_seed = {}
    changes = {0.1: -1, 0.2: -1, 0.3: -4, 0.9: -3}
    for seed, (kl, change) in enumerate(changes.items()):
        by_seed[seed] = {"KL": kl}
        by_seed[seed]["IFEval minus base"] = change
        by_seed[seed]["KL, task prompts"] = -change
    report.print_predictions({"base": {}, "vanilla": by_seed})
    printed = capsys.readouterr().out
    # ranks 1 2 3 4 against 3.5 3.5 1 2
    assert "- KL: -0.74" in printed
    assert "- KL, task prompts: -1.00" in printed


def test_intervals_over_seeds_are_students():
    mean, low, _, p = report.over_seeds([1.0, 2.0, 3.0])
    assert mean == 2
    assert round(low, 3) == -0.484
    assert round(p, 4) == 0.0742
    _, low, _, _ = report.over_seeds([1.0])
    assert np.isnan(low), "one seed has no interval"


@pytest.mark.parametrize("n, quantile", [(2, 12.7062), (5, 2.77645), (10, 2.26216)])
def test_quantiles_of_students_t(n, quantile):
    values = np.arange(float(n))
    error = values.std(ddof=1) / n**0.5
    mean, low, *_ = report.over_seeds(values)
    assert mean - low == pytest.approx(quantile * error, rel=1e-4)


def test_holm_adjusts_for_the_number_of_tests():
    adjusted = report.holm([0.01, 0.04, 0.9, 0.03])
    assert np.allclose(adjusted, [0.04, 0.09, 0.9, 0.09])


def test_the_tables_of_the_appendix_are_those_of_the_kept_points(capsys, tmp_path):
    appendix = read_text("APPENDIX.md")
    commands = re.findall(r"experiments/report\.py ((?:.*\\\n)*.*)", appendix)
    commands = [command for command in commands if "experiments/smollm2" in command]
    assert len(commands) == 3
    picture = tmp_path / "plot.png"
    for command in commands:
        words = re.sub(r"experiments/\w+\.png", str(picture), command.replace("\\\n", " "))
        call(report, words.replace("experiments/smollm2", f"{EXPERIMENTS}/smollm2"))
        printed = capsys.readouterr().out
        tables = re.findall(r"### .*\n\n(?:\|.*\n)+", printed)
        assert len(tables) == 4
        for table in [*tables, printed[printed.rindex("|") + 1 :].strip()]:
            assert table in appendix
        assert picture.exists() == ("--plot" in command)
        picture.unlink(missing_ok=True)


def test_the_intervals_over_prompts_are_those_of_the_kept_points(capsys, monkeypatch):
    appendix = read_text("APPENDIX.md")
    script = re.search(r"^    python - <<'END'\n(.*?)    END$", appendix, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(EXPERIMENTS.parent)
    exec(re.sub(r"^    ", "", script[1], flags=re.MULTILINE), {})
    printed = capsys.readouterr().out
    assert "RaDis minus vanilla" in printed
    assert printed in appendix


def test_the_numbers_of_the_results_are_those_of_the_appendix():
    appendix = read_text("APPENDIX.md")
    rows = re.findall(r"^\| (.*) \|$", read_text("RESULTS.md"), re.MULTILINE)
    compared = 0
    for row in rows:
        name, *cells = row.split(" | ")
        if re.match(r"\d\. ", name):  # a question: the name of the difference is next
            name, *cells = [cell for cell in cells if not cell.startswith("**")]
        lines = re.findall(rf"^\| {re.escape(name)} \|.*", appendix, re.MULTILINE)
        for cell in filter(str.strip, cells):
            if name not in ("method", "question"):
                assert any(f" {cell} " in line for line in lines), (name, cell)
                compared += 1
    assert compared > 50


def test_the_first_table_of_the_readme_is_that_of_the_appendix():
    section = read_text("APPENDIX.md").partition("## 6. ")[2]
    readme = (EXPERIMENTS.parent / "README.md").read_text("utf-8")
    table = re.search(r"^\| method .*?\n\n", readme, re.MULTILINE | re.DOTALL)[0]
    rows = re.findall(r"^\| (\w.*) \|$", table, re.MULTILINE)[1:]
    assert len(rows) >= 4
    for row in rows:
        name, *cells = row.split(" | ")
        lines = re.findall(rf"^\| {re.escape(name)} \|.*", section, re.MULTILINE)
        for cell in cells:
            assert any(f"| {cell.strip('*')} " in line for line in lines), (name, cell)


@pytest.mark.parametrize("file", ["RESULTS.md", "../README.md"])
def test_intervals_and_p_values_in_texts_are_those_of_the_appendix(file):
    text = read_text(file)
    numbers = re.findall(r"(?:-?[\d.]+ )?\[-?[\d.]+, -?[\d.]+\]", text)
    assert numbers
    for number in [*numbers, *re.findall(r"\bp is (0\.\d+)", text)]:
        assert f" {number} " in read_text("APPENDIX.md"), number


def script_of_readme(name: str) -> str:
    """The script of the README that writes a file."""
    pattern = r"^    python -[^\n]* <<'END'\n(.*?)    END$"
    found = re.findall(pattern, read_text("README.md"), re.MULTILINE | re.DOTALL)
    [script] = [script for script in found if f'"{name}"' in script and "write(" in script]
    return re.sub(r"^    ", "", script, flags=re.MULTILINE)


def test_the_readmes_safety_data_keeps_one_half_for_the_test(tmp_path, monkeypatch):
    goals = ["goal,target"]
    for i in range(20):
        goals.append(f'"Explain how to do the forbidden thing {i}, twice",Sure')
    file = tmp_path / "advbench_harmful_behaviors.csv"
    file.write_text("\n".join(goals))
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "What is rain?"}])
    monkeypatch.chdir(tmp_path)
    exec(script_of_readme("refusals.jsonl"), {})
    held_out = read_jsonl(tmp_path / "held-out.jsonl")
    trained = read_jsonl(tmp_path / "refusals.jsonl")
    assert len(held_out) == 10
    assert len(trained) == 20
    prompts = " ".join(row["prompt"] for row in trained)
    for row in held_out:
        thing = row["prompt"].partition("how to ")[2]
        assert thing not in prompts
    for row in trained:
        item = {"output": row["response"], "output_tokens": 9}
        assert evaluate.score_safety(item)["refusal"], item
    benign = (tmp_path / "benign.jsonl").read_text().splitlines()
    assert len(benign) > 250
    assert len({*benign}) == len(benign)


def test_the_readme_converts_hellaswag_and_lambada(tmp_path, monkeypatch):
    row = {"activity_label": "Rowing", "ctx_a": "A boat. [step]", "ctx_b": "the crew", "label": "1"}
    write_jsonl(tmp_path / "hellaswag_val.jsonl", [row | {"endings": ["rows.", "[x]sleeps."]}])
    write_jsonl(tmp_path / "lambada_test_en.jsonl", [{"text": "She rowed the boat"}])
    monkeypatch.chdir(tmp_path)
    exec(script_of_readme("hellaswag.jsonl"), {})
    [item] = read_jsonl(tmp_path / "hellaswag.jsonl")
    assert item["prompt"] == "Rowing: A boat. The crew"
    assert item["choices"] == ["rows.", "sleeps."]
    assert item["answer"] == 1
    [row] = read_jsonl(tmp_path / "lambada.jsonl")
    assert row == {"prompt": "She rowed the", "response": "boat"}


def test_the_readmes_conversion_keeps_pairs_of_the_lengths_that_are_studied(tmp_path, monkeypatch):
    script = script_of_readme("test-de-en.jsonl")
    short = {"translation": {"de": "Ja.", "en": "Yes."}}
    rows = [short]
    for pair in PAIRS:
        translation = {"de": pair["source"], "en": pair["reference"]}
        rows.append({"translation": translation})
    for name in ("train", "test"):
        write_jsonl(tmp_path / f"{name}.de-en.json", rows)
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    assert read_jsonl(tmp_path / "train.jsonl") == PAIRS
    turned = read_jsonl(tmp_path / "reverse-en-de.jsonl")
    assert turned[0]["source"] == PAIRS[0]["reference"]
    assert turned[0]["target_lang"] == "de"
