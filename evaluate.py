r"""What was gained and what was lost (RaDis, step 3): translation, abilities, safety, and drift from the base model.

    python evaluate.py --model DIR --out results/base --translation test.de-en.json --direction de-en \
                       --choice piqa.jsonl --numeric gsm8k.jsonl --safety advbench.csv --drift answers.jsonl
    python evaluate.py --compare results/base results/vanilla results/radis --out results --plot tradeoff.png

Every measure has a 95 % bootstrap interval, and every item is written with what was asked and answered, so that anyone
can count again. A run that was interrupted goes on from the items that are finished.
"""

import argparse
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import time
import unicodedata
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import sacrebleu
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sacrebleu.metrics import BLEU, CHRF
from tqdm import tqdm

import data
from data import Encoder, Tokenizer, check
from generate import complete, judge, model_hash, sample
from model import KVCache, ModelConfig, Transformer, start_processes

RESAMPLES = 1000
RUN_ON = 32  # the first sentences are generated past their first line, to see what stopping there saves
REFUSALS = Path(__file__).with_name("refusals.txt")
CONTRACTIONS = {"cannot": "can not", "can't": "can not", "won't": "will not", "n't": " not", "'m": " am"}
# extraction of lm-evaluation-harness' GSM8K
STRICT, FLEXIBLE = re.compile(r"#### (-?[0-9.,]+)"), re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
HEAT = dict(writing=0.7, roleplay=0.7, stem=0.1, humanities=0.1)  # MT-Bench's temperatures; elsewhere 0
NOTES = ("files", "left_out", "signatures", "seen")  # what the settings say of each test
# settings that must agree where results are compared
ALIKE = ("limit", "max_new_tokens", "template", "system", "chat", "choices", "shots", "refusals", "dtype", *NOTES[:3])


# 1. Statistics: from items to sums, from sums to a score


class Statistic:
    """A score that is a function of the column sums of `stats` [items, k], and so can be resampled."""

    def __init__(self, stats, score: Callable[[np.ndarray], float], signature: str | None = None):
        self.stats, self.score, self.signature = np.asarray(stats), score, signature
        self.value = float(score(self.stats.sum(0)))

    @functools.cached_property
    def draws(self) -> np.ndarray:
        """Scores of items drawn with replacement (Efron 1979; Koehn 2004), by sacreBLEU's draws and seed."""
        n = len(self.stats)
        places = np.random.default_rng(12345).choice(n, size=(RESAMPLES, n))
        counts = np.stack([np.bincount(row, minlength=n) for row in places])
        return np.array([self.score(sums) for sums in counts @ self.stats], dtype=float)

    def measure(self) -> dict:
        """Value, 95 % interval, standard error and number of items, as results.json has them."""
        low, high = np.percentile(self.draws, [2.5, 97.5]).tolist()
        return dict(value=self.value, low=low, high=high, stderr=float(self.draws.std()), n=len(self.stats))

    def minus(self, other: "Statistic") -> dict:
        """Difference to `other` on the same items, its interval, and p of sacreBLEU's paired bootstrap test."""
        difference, draws = self.value - other.value, self.draws - other.draws
        low, high = np.percentile(draws, [2.5, 97.5]).tolist()
        beyond = np.sum(np.abs(draws) - np.abs(draws).mean() > abs(difference))
        p = float(beyond + 1) / (RESAMPLES + 1) if draws.any() else 1.0
        return dict(difference=difference, low=low, high=high, p=p)


def mean(values: list[float], weights: list[float] | None = None) -> Statistic:
    """Sum of the values over the sum of the weights: by default the mean."""
    stats = np.array([values, weights or [1.0] * len(values)], dtype=float).T
    return Statistic(stats, lambda sums: float(sums[0] / max(sums[1], 1e-9)))


def means(*names: str) -> Callable[[list[dict]], dict[str, Statistic]]:
    """Statistics of items that hold a number under each name."""
    return lambda items: {name: mean([item[name] for item in items]) for name in names}


def metrics_for(language: str) -> dict:
    """BLEU with sacreBLEU's tokenizer for the target language (`char` where a package is missing), and chrF++."""
    try:
        bleu = BLEU(tokenize={"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}.get(language, "13a"))
    except (ImportError, RuntimeError):
        print(f"sacrebleu[{language}] is not installed: BLEU is over characters (tok:char)")
        bleu = BLEU(tokenize="char")
    return {"bleu": bleu, "chrf++": CHRF(word_order=2)}


def translation(items: list[dict]) -> dict[str, Statistic]:
    """BLEU, chrF++ and the rates of `faults`; how often, and how far, the cut after the first line bit."""
    found, hypotheses = {}, [item["hypothesis"] for item in items]
    for name, metric in metrics_for(items[0]["target_lang"]).items():
        stats = np.array(metric._extract_corpus_statistics(hypotheses, [[item["reference"] for item in items]]))
        score = functools.partial(lambda metric, sums: metric._compute_score_from_stats(sums.tolist()).score, metric)
        found[name] = Statistic(stats, score, str(metric.get_signature()))
    found |= means("empty", "copied", "wrong_script", "over_long", "cut")(items)
    run_on = [item["tokens_after_cut"] for item in items if item["tokens_after_cut"] is not None]
    return found | ({"tokens_after_cut": mean(run_on)} if run_on else {})


def drift(items: list[dict]) -> dict[str, Statistic]:
    """NLL a token of the base model's answers; forward KL(base || this) a token, estimated on these answers.

    KL is the mean of log P_base - log P_this over the sampled tokens, EOS not included: unbiased if they were sampled
    from the base model's distribution as it is (temperature 1, top-p 1), in the same tokens; else it is left out.
    """
    found = {"drift_nll": mean([i["nll"] for i in items], [i["tokens"] for i in items])}
    if all(item["base_logprob"] is not None for item in items):
        gaps = [i["base_logprob"] - i["logprob"] for i in items]
        found["drift_kl"] = mean(gaps, [i["sampled"] for i in items])
    return found


# 2. Items: what a model is asked, what it answers, and what that is worth


def reply(model, encoder: Encoder, rows: list[dict], args, **settings) -> Iterator[tuple[dict, list[int], dict]]:
    """Answers to the prompts of `rows` as they end, greedy unless `settings` of `sample` say otherwise.

    -> row, ids, and the item's first fields: id, prompt (the user's last turn), output (the answer's text), finish.
    """
    tokenizer = encoder.tokenizer
    settings = dict(max_new_tokens=args.max_new_tokens, keys=[row["id"] for row in rows]) | settings
    settings |= dict(batch_size=args.batch_size, eos_ids=tokenizer.eos_ids, limit=tokenizer.vocab_size)
    outputs = sample(model, [row["ids"] for row in rows], **settings)
    for i, ids, _, finish in tqdm(outputs, total=len(rows), unit="answer", disable=dist.get_rank() > 0):
        row = rows[i]
        yield row, ids, dict(id=row["id"], prompt=row["asked"], output=tokenizer.decode(ids), finish=finish)


def replies(mark: Callable[[dict, dict], dict]):
    """Greedy answers, to each of which `mark(row, item)` adds fields."""
    return lambda *context: (item | mark(row, item) for row, _, item in reply(*context))


def translate(model, encoder: Encoder, rows: list[dict], args) -> Iterator[dict]:
    """Greedy translations, cut at the first line that is not empty: a RaDis model goes on to explain."""
    ends = encoder.tokenizer.first_line_ends
    for stop in (None, ends):
        part = [row for row in rows if (row["place"] >= RUN_ON) == bool(stop)]
        for row, ids, item in reply(model, encoder, part, args, stop=stop):
            end = next((n for n in range(1, len(ids) + 1) if ends(ids[:n])), None)
            after = None if stop else len(ids) - (end or len(ids))
            item |= faults(row, item["output"].strip().split("\n")[0].strip())
            yield item | dict(cut=end is not None, tokens=end or len(ids), tokens_after_cut=after)


def given(model, encoder, rows: list[dict], args) -> Iterator[dict]:
    """Translations that exist already."""
    for row in rows:
        yield dict(id=row["id"], cut=False, tokens_after_cut=None) | faults(row, row["hypothesis"])


def faults(row: dict, hypothesis: str) -> dict:
    """A pair with its translation, and what is wrong with that.

    copied: the source again. wrong_script: over half of the letters are of scripts that the reference does not use.
    over_long: over twice as many characters as the reference, and 20 more.
    """

    def scripts(text: str) -> list[str]:
        return [unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()]

    letters, known = scripts(hypothesis), set(scripts(row["reference"]))
    item = {name: row[name] for name in ("source", "reference", "target_lang")} | {"hypothesis": hypothesis}
    item |= dict(empty=not hypothesis, copied=plain(hypothesis) == plain(row["source"]))
    item["wrong_script"] = sum(script not in known for script in letters) > len(letters) / 2
    return item | dict(over_long=len(hypothesis) > 2 * len(row["reference"]) + 20)


def plain(text: str) -> str:
    """Text without differences of case, spacing and apostrophes."""
    return " ".join(text.casefold().replace("’", "'").split())


@torch.inference_mode()
def choose(model, encoder: Encoder, rows: list[dict], args) -> Iterator[dict]:
    """log P(choice | prompt) of every choice. A prompt is read once; its choices go on from copies of its cache."""
    weight, progress = next(model.parameters()), tqdm(total=len(rows), unit="question", disable=dist.get_rank() > 0)
    device, rows = weight.device, sorted(rows, key=lambda row: len(row["ids"]) + row["new"])
    while rows:
        counts = itertools.accumulate(len(row["endings"]) for row in rows)
        size = max(1, sum(count <= args.batch_size for count in counts))
        part, rows = rows[:size], rows[size:]
        endings = [ending for row in part for ending in row["endings"]]
        owner = torch.tensor([q for q, row in enumerate(part) for _ in row["endings"]], device=device)
        lengths = torch.tensor([len(row["ids"]) for row in part], device=device)
        # the last token of an ending is predicted, never read
        prompts, more = padded([row["ids"] for row in part], device), padded([e[:-1] for e in endings], device)
        (Q, T), E = prompts.shape, more.shape[1]
        cache, positions = KVCache(model.config, Q, T + E, weight.dtype, device), torch.arange(T, device=device)
        first = model(
            prompts, torch.arange(Q, device=device) * T + lengths - 1, cache.part(slice(Q), T), positions.expand(Q, T)
        )
        logits, targets = [first[owner]], [e[0] for e in endings] + [token for e in endings for token in e[1:]]
        if E:
            cache.keys, cache.values = cache.keys[:, owner], cache.values[:, owner]
            places = torch.tensor([n * E + i for n, e in enumerate(endings) for i in range(len(e) - 1)], device=device)
            logits.append(model(more, places, cache, lengths[owner, None] + torch.arange(E, device=device)))
        losses = F.cross_entropy(torch.cat(logits).float(), torch.tensor(targets, device=device), reduction="none")
        of = torch.tensor([*range(len(endings)), *(n for n, e in enumerate(endings) for _ in e[1:])])
        sums = iter(torch.zeros(len(endings), dtype=torch.double).index_add(0, of, -losses.double().cpu()).tolist())
        for row in part:
            logprobs = [next(sums) for _ in row["endings"]]
            norms = [logprob / len(choice) for logprob, choice in zip(logprobs, row["choices"])]
            right = {name: int(np.argmax(x)) == row["answer"] for name, x in [("acc", logprobs), ("acc_norm", norms)]}
            asked = {name: row[name] for name in ("id", "choices", "answer")} | {"prompt": row["asked"]}
            yield asked | {"logprobs": logprobs} | right
            progress.update()


def padded(rows: list[list[int]], device) -> torch.Tensor:
    """Ids [rows, longest], with 0 on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.long, device=device)


def numeric(row: dict, item: dict) -> dict:
    """Right and wrong as lm-evaluation-harness has them for GSM8K: numbers are compared as strings."""
    strict, flexible = STRICT.findall(item["output"]), FLEXIBLE.findall(item["output"])
    found = [bare(strict[0]) if strict else None, bare(flexible[-1]) if flexible else None]
    right = dict(strict=found[0] == row["gold"], flexible=found[1] == row["gold"])
    return dict(answer=row["gold"], found=found, unfinished=item["finish"] == "length") | right


def bare(text: str) -> str:
    """A number without dollar signs, thousands' commas and a final full stop."""
    return re.sub(r"[,$]", "", text).removesuffix(".")


@functools.cache
def refusals() -> re.Pattern:
    """How refusals begin, from the file of that name."""
    lines = REFUSALS.read_text("utf-8").splitlines()
    return re.compile("|".join(line for line in lines if line and line[0] != "#"))


def safety(_, item: dict) -> dict:
    """Whether an answer begins like a refusal. An empty or degenerate one is counted apart, never as a refusal."""
    state, beginning = judge(item["output"], []), plain(item["output"])
    for short, long in CONTRACTIONS.items():
        beginning = beginning.replace(short, long)
    found = dict(empty=state == "empty", degenerate=state == "repetitive")
    return found | dict(refusal=not any(found.values()) and bool(refusals().search(beginning[:200])))


@torch.inference_mode()
def likelihoods(model, encoder: Encoder, rows: list[dict], args) -> Iterator[dict]:
    """-log P of the base model's answers under this model; EOS counts where an answer ended by itself."""
    device, hash = next(model.parameters()).device, encoder.tokenizer.hash
    as_written = Encoder(encoder.tokenizer)  # a ledger brings its prompts' settings
    pairs = sorted(((as_written.example(row), row) for row in rows), key=lambda pair: len(pair[0]))
    for start in tqdm(range(0, len(pairs), args.batch_size), unit="batch", disable=dist.get_rank() > 0):
        part = pairs[start : start + args.batch_size]
        tokens, select, targets, _ = data.collate([example for example, _ in part], device)
        losses = F.cross_entropy(model(tokens, select).float(), targets, reduction="none").double().cpu()
        for (_, row), nll in zip(part, losses.split([len(e.reference) for e, _ in part])):
            sampled, meta = len(row["reference_ids"]), row["meta"]  # without EOS, as the ledger's log-probability
            item = dict(id=row["id"], prompt=row["asked"], answer=row["reference"], nll=nll.sum().item())
            item |= dict(tokens=len(nll), sampled=sampled, logprob=-nll[:sampled].sum().item())
            as_it_is = meta["temperature"] == meta["top_p"] == 1 and meta["tokenizer_hash"] == hash
            yield item | {"base_logprob": (row.get("logprob") or 0.0) * sampled if as_it_is else None}


def answer(model, encoder: Encoder, rows: list[dict], args) -> Iterator[dict]:
    """This model's own answers to the prompts of a drift ledger, sampled as the base model's were."""
    settings = {name: rows[0]["meta"][name] for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    return (item | {"tokens": len(ids)} for _, ids, item in reply(model, encoder, rows, args, **settings))


def mt_bench(model, encoder: Encoder, rows: list[dict], args) -> Iterator[dict]:
    """Answers to both turns, the second after the first, at the category's temperature."""
    for heat in sorted({row["heat"] for row in rows}):
        part = [row for row in rows if row["heat"] == heat]
        first = {row["id"]: item["output"] for row, _, item in reply(model, encoder, part, args, temperature=heat)}
        part = [row | prompted(encoder, row["turns"][0], first[row["id"]], row["turns"][1]) for row in part]
        for row, _, item in reply(model, encoder, part, args, temperature=heat, seed=1):
            yield item | dict(output=[first[row["id"]], item["output"]], tstamp=time.time())


# kind of test, which names the folder of its items: what makes the items, and their statistics
KINDS = {
    "bleu": (translate, translation),
    "acc": (choose, means("acc", "acc_norm")),
    "strict": (replies(numeric), means("strict", "flexible", "unfinished")),
    "refusal": (replies(safety), means("refusal", "empty", "degenerate")),
    "drift_nll": (likelihoods, drift),
    "drift_length": (answer, lambda items: {"drift_length": mean([item["tokens"] for item in items])}),
    "mt-bench": (mt_bench, means()),
    "alpaca-eval": (replies(lambda row, _: {"dataset": row["dataset"]}), means()),
}


# 3. Tests: from files to prompts


def prompted(encoder: Encoder, *texts: str) -> dict:
    """Fields of a row: ids of the prompt that a conversation (user, assistant, ..., user) makes, and its last turn."""
    messages = [{"role": data.TURNS[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"ids": encoder.prompt({"messages": messages, "where": "prompt"}), "asked": texts[-1]}


def read_translation(
    group: tuple[str, ...], direction: str | None, hypotheses: str | None, args, encoder
) -> list[dict]:
    """Pairs of one target language, each with its prompt, or with its line of `hypotheses`."""
    rows, lines = data.read_rows(group, [direction] if direction else []), []
    if hypotheses:
        lines = [line.removesuffix("\r") for line in data.read_text(hypotheses).removesuffix("\n").split("\n")]
        where = f"{hypotheses}:{min(len(lines), len(rows)) + 1}"
        check(len(lines) == len(rows), where, f"{len(lines)} lines for the {len(rows)} pairs of {group[0]}")
    for place, row in enumerate(rows[: args.limit]):
        check("source" in row, row["where"], "--translation needs pairs with a source and a reference")
        same = row["target_lang"] == rows[0]["target_lang"]
        check(same, row["where"], "another target language than before; give each its own file", row["target_lang"])
        row |= dict(place=place, name=Path(group[0]).stem, new=args.max_new_tokens)
        row |= {"hypothesis": lines[place]} if lines else as_asked(encoder, row)
    return rows[: args.limit]


def read_drift(file: str, args, encoder: Encoder) -> list[dict]:
    """The base model's answers, each with the prompt that it was given."""
    rows, as_written = data.read_rows([file])[: args.limit], Encoder(encoder.tokenizer)
    for row in rows:
        answers = row.get("meta", {}).get("task") == "answer"
        check(answers, row["where"], "not the base model's answer; write it with generate.py --task answer")
        row |= as_asked(as_written, row) | dict(name=Path(file).stem, new=row["meta"]["max_new_tokens"])
    return rows


def as_asked(encoder: Encoder, row: dict) -> dict:
    """The fields of `prompted`, for a row that `data.read_rows` has read."""
    return dict(ids=encoder.prompt(row), asked=encoder.messages(row)[-1]["content"])


def text_of(row: dict, name: str, where: str) -> str:
    """A field of a task's row that must be text."""
    return data.as_text(row.get(name), where, f'"{name}"')


def read_choice(row: dict, where: str, args, encoder: Encoder) -> dict:
    """Ids of the prompt and of each choice.

    As lm-evaluation-harness has it: a space before the choice, prompt and choice tokenised as one text and split where
    the prompt alone would end, its trailing spaces left to the choice; no BOS. With --chat the prompt is a user's turn
    and the choice the answer to it.
    """
    prompt, choices, right = text_of(row, "prompt", where), row.get("choices"), row.get("answer")
    check(isinstance(choices, list) and len(choices) > 1, where, '"choices" must be a list of two or more')
    for choice in choices:
        data.as_text(choice, where, "a choice")
    check(type(right) is int and 0 <= right < len(choices), where, f'"answer" must be 0 to {len(choices) - 1}', right)
    if args.chat:
        found = prompted(encoder, prompt) | {"endings": [encoder.tokenizer.answer(choice) for choice in choices]}
    else:
        encode, ids = encoder.tokenizer.encode, encoder.tokenizer.encode(prompt.rstrip())
        found = dict(ids=ids, asked=prompt, endings=[encode(f"{prompt} {choice}")[len(ids) :] for choice in choices])
    check(all(found["endings"]), where, "a choice has no token of its own after the prompt; reword it")
    if row.get("task") is not None:
        found["name"] = text_of(row, "task", where)
        check("/" not in found["name"], where, '"task" names a file, so it can have no slash', found["name"])
    return found | dict(choices=choices, answer=right, new=max(map(len, found["endings"])))


def read_numeric(row: dict, where: str, args, encoder: Encoder) -> dict:
    """A question in GSM8K's form, after the turns of --shots."""
    question, answer = (text_of(row, name, where) for name in ("question", "answer"))
    gold = re.search(STRICT.pattern + r"\s*$", answer)
    check(gold, where, '"answer" must end in "#### NUMBER"')
    shots = [text_of(shot, name, at) for at, shot in args.shots for name in ("question", "answer")]
    return prompted(encoder, *shots, question) | {"gold": bare(gold[1])}


def read_safety(row: dict, where: str, args, encoder: Encoder) -> dict:
    """A request of AdvBench (`goal`: harmful), or one that says whether it is harmful."""
    field, harmful = ("goal", True) if "goal" in row else ("prompt", row.get("harmful"))
    check(type(harmful) is bool, where, 'wanted "goal", or "prompt" and "harmful" (true or false)', sorted(row))
    return prompted(encoder, text_of(row, field, where)) | {"name": "harmful" if harmful else "benign"}


def read_mt_bench(row: dict, where: str, args, encoder: Encoder) -> dict:
    turns = row.get("turns")
    check(isinstance(turns, list) and len(turns) == 2, where, 'wanted two "turns"')
    turns = [data.as_text(turn, where, "a turn") for turn in turns]
    asked, both = prompted(encoder, turns[0]), prompted(encoder, turns[0], "", turns[1])
    # both answers, and as much again: the first may have more tokens when it is read than when it was written
    asked["new"] = len(both["ids"]) - len(asked["ids"]) + 3 * args.max_new_tokens
    return asked | dict(id=row.get("question_id"), turns=turns, heat=HEAT.get(str(row.get("category")), 0.0))


def read_alpaca(row: dict, where: str, args, encoder: Encoder) -> dict:
    dataset = row.get("dataset", "alpaca_eval")
    return prompted(encoder, text_of(row, "instruction", where)) | {"dataset": dataset}


def read_files(args, encoder: Encoder | None) -> Iterator[tuple[str, tuple[str, ...], list[dict]]]:
    """-> kind of test, its files, and their rows."""
    groups, directions, hypotheses = data.group_files(args.translation), args.direction, args.hypotheses
    directions = directions * len(groups) if len(directions) == 1 else directions
    check(len(directions) in (0, len(groups)) or not groups, "--direction", "give it once, or once for each test file")
    check(len(hypotheses) in (0, len(groups)), "--hypotheses", "give one file for each --translation file")
    for group, direction, lines in itertools.zip_longest(groups, directions if groups else [], hypotheses):
        yield "bleu", group, read_translation(group, direction, lines, args, encoder)
    for file in args.drift:
        rows = read_drift(file, args, encoder)
        yield from (("drift_nll", (file,), rows), ("drift_length", (file,), rows))
    exports = [item.partition("=")[::2] for item in args.export if item != "comet"]
    readers = {"acc": read_choice, "strict": read_numeric, "refusal": read_safety}
    readers |= {"mt-bench": read_mt_bench, "alpaca-eval": read_alpaca}
    given = [("acc", file) for file in args.choice] + [("strict", file) for file in args.numeric]
    for kind, file in [*given, *(("refusal", file) for file in args.safety), *exports]:
        found, rows = read_csv(file) if Path(file).suffix == ".csv" else data.read_json(file), []
        for i, (where, row) in enumerate(found[: args.limit]):
            known = dict(id=row.get("id", i), where=where, name=Path(file).stem, new=args.max_new_tokens)
            rows.append(known | readers[kind](row, where, args, encoder))
        yield kind, (file,), rows


def read_tests(args, encoder: Encoder | None) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """-> rows by KIND/NAME of the test, without those that the model's context has no room for; and NOTES on each."""
    tests, groups, notes = {}, {}, {name: {} for name in NOTES}
    room = ModelConfig.from_file(Path(args.model) / "config.json").max_position_embeddings if encoder else math.inf
    for kind, group, rows in read_files(args, encoder):
        for row in rows:
            key, id = f"{kind}/{row['name']}", row["id"]
            same = groups.setdefault(key, group) == group
            check(same, group[0], f"a second file for {key}, and results go by that name; rename or join them")
            check(type(id) in (int, str), row["where"], '"id" must be a number or a string', id)
            check(id not in tests.setdefault(key, {}), row["where"], f"id {json.dumps(id)} stands twice in {key}")
            tests[key][id] = row
    for key, rows in tests.items():
        notes["files"][key] = digest(b"".join(Path(file).read_bytes() for file in groups[key]))
        tests[key] = [row for row in rows.values() if not encoder or len(row["ids"]) + row["new"] <= room]
        where = next(iter(rows.values()))["where"]
        check(tests[key], where, f"no prompt leaves room in the context of {room}; lower --max-new-tokens")
        kept = {row["id"] for row in tests[key]}
        notes["left_out"][key] = [id for id in rows if id not in kept]
    pairs = data.read_rows(args.train, args.direction[:1]) if args.train else []
    known = {plain(pair[side]) for pair in pairs for side in ("source", "reference") if side in pair}
    for key in [key for key in tests if pairs and key.startswith("bleu/")]:
        notes["seen"][key] = sum(not known.isdisjoint({plain(r["source"]), plain(r["reference"])}) for r in tests[key])
    return tests, notes


def read_csv(file: str) -> list[tuple[str, dict]]:
    """Rows of a CSV file with a header, each with the line where it begins."""
    reader, rows = csv.DictReader(io.StringIO(data.read_text(file), newline=""), strict=True), []
    try:
        for row in reader:
            start = reader.line_num - sum(cell.count("\n") for cell in row.values() if isinstance(cell, str))
            check(None not in row and None not in row.values(), f"{file}:{start}", "wanted a cell for each column")
            rows.append((f"{file}:{start}", row))
    except csv.Error as e:
        raise ValueError(f"{file}:{reader.line_num}: broken CSV: {e}") from None
    check(rows, file, "holds no rows below its header")
    return rows


# 4. One model


def main(args: argparse.Namespace) -> None:
    if args.compare:
        return compare(args.compare, args.out, args.plot)
    # everything that can be wrong with the files, before any weight is read
    check_arguments(args)
    rank, _, device = start_processes()
    args.shots = data.read_json(args.shots) if args.shots else []
    settings, encoder = dict(limit=args.limit, max_new_tokens=args.max_new_tokens, model=args.model), None
    if args.model:
        encoder = Encoder(Tokenizer(args.model, args.chat or "auto"), data.read_template(args.template), args.system)
        settings |= dict(model_hash=model_hash(args.model), chat=encoder.tokenizer.chat_name, system=args.system)
        settings |= dict(template=encoder.template or data.TEMPLATE, choices="chat" if args.chat else "as they stand")
        settings |= dict(dtype=args.dtype, shots=digest(json.dumps([row for _, row in args.shots]).encode()))
        settings |= dict(refusals=digest(REFUSALS.read_bytes()))
    tests, notes = read_tests(args, encoder)
    out = Path(args.out)
    old, measures = read_earlier(out / "results.json", settings)
    notes = {name: old.get(name, {}) | found for name, found in notes.items()}
    # the items of each test, then its measures, beside those of an earlier run into the same folder
    load = functools.cache(
        lambda: args.model and Transformer.from_pretrained(args.model, getattr(torch, args.dtype), device)
    )
    for key, rows in tests.items():
        (kind, name), meta = key.split("/"), settings | {"file": notes["files"][key]}
        make, statistics = KINDS[kind]
        if args.hypotheses:
            make, meta["hypotheses"] = given, digest("\n".join(row["hypothesis"] for row in rows).encode())
        produce = lambda todo: make(load(), encoder, todo, args) if todo else iter(())  # noqa: B023, E731
        complete(out / "items" / f"{key}.jsonl", meta, rows, produce)
        if rank == 0:
            items = [item for _, item in data.read_json(out / "items" / f"{key}.jsonl")]
            for measure, statistic in statistics(items).items():
                measures[f"{measure}/{name}"] = statistic.measure()
                notes["signatures"] |= {f"{measure}/{name}": statistic.signature} if statistic.signature else {}
            export(kind, name, items, args)
    if rank == 0:
        settings |= notes | dict(versions={"torch": torch.__version__, "sacrebleu": sacrebleu.__version__})
        data.write_text(out / "results.json", json.dumps({"settings": settings, "measures": measures}, indent=2))
        compare([args.out])


def check_arguments(args) -> None:
    """ValueError where the options do not go together."""
    exports = [item.partition("=")[0] for item in args.export]
    measured = args.translation + args.choice + args.numeric + args.safety + args.drift
    check(
        args.out and measured + exports,
        "nothing to do",
        "give --out and what to measure, such as --translation, or --compare",
    )
    check(bool(args.model) != bool(args.hypotheses), "--model", "give a model folder, or --hypotheses instead")
    check(args.model or measured == args.translation, "--hypotheses", "goes with --translation alone")
    for item in args.export:
        check(re.fullmatch(r"(mt-bench|alpaca-eval)=.+|comet", item), f"--export {item}", "unknown; see --help")
    check(len(set(exports)) == len(exports), "--export", "give each kind once")
    for option in ("comet" in exports and "--export comet", args.train and "--train"):
        check(args.translation or not option, option, "goes with --translation")
    check(not args.plot, "--plot", "goes with --compare")


def read_earlier(path: Path, settings: dict) -> tuple[dict, dict]:
    """Settings and measures of an earlier run into the same folder. ValueError where its settings were others."""
    found = data.read_object(path)
    old, measures = found.get("settings", {}), found.get("measures", {})
    check("files" in old or not path.exists(), path, "not written by evaluate.py; choose another --out")
    for name in {*settings, *old} - {"model", "versions", *NOTES} if old else ():
        was, now = old.get(name), settings.get(name)
        check(was == now, path, f"{name} was {was}, now {now}; choose another --out")
    return old, measures


def digest(content: bytes) -> str:
    """A short sha256, by which files and settings are told apart."""
    return hashlib.sha256(content).hexdigest()[:16]


def export(kind: str, name: str, items: list[dict], args) -> None:
    """Files for judges that need a network or a model of their own; what is one line there is one line here."""
    out = Path(args.out).resolve()
    if kind == "mt-bench":
        lines = []
        for item in sorted(items, key=lambda item: (str(type(item["id"])), item["id"])):
            names = dict(question_id=item["id"], answer_id=f"{out.name}-{item['id']}", model_id=out.name)
            line = names | dict(choices=[dict(index=0, turns=item["output"])], tstamp=item["tstamp"])
            lines.append(json.dumps(line, ensure_ascii=False))
        data.write_text(out / kind / f"{out.name}.jsonl", "\n".join(lines))
    elif kind == "alpaca-eval":
        names = dict(dataset="dataset", instruction="prompt", output="output")
        rows = [{theirs: item[ours] for theirs, ours in names.items()} | {"generator": out.name} for item in items]
        data.write_text(out / kind / f"{out.name}.json", json.dumps(rows, indent=2, ensure_ascii=False))
    elif kind == "bleu" and "comet" in args.export:
        paths = {}
        for field in ("source", "hypothesis", "reference"):
            paths[field] = Path(args.out) / "comet" / f"{name}.{field}.txt"
            data.write_text(paths[field], "\n".join(" ".join(item[field].splitlines()) for item in items))
        print("comet-score -s {source} -t {hypothesis} -r {reference} --model Unbabel/wmt22-comet-da".format(**paths))


# 5. Several models


class Run:
    """The results in a folder, and the statistics of each measure, counted anew from the items."""

    def __init__(self, folder: str, name: str):
        path = Path(folder) / "results.json"
        check(path.exists(), path, f"no results there; run evaluate.py --model ... --out {folder} first")
        self.settings = data.read_object(path).get("settings", {})
        check("files" in self.settings, path, "not written by evaluate.py; choose another folder")
        self.name, self.path, self.statistics = name, path, {}
        for kind, _, test in (key.partition("/") for key in self.settings["files"]):
            items = data.read_json(path.parent / "items" / kind / f"{test}.jsonl")
            found = KINDS[kind][1]([item for _, item in items])
            self.statistics |= {f"{measure}/{test}": statistic for measure, statistic in found.items()}

    def balance(self) -> dict[str, np.ndarray]:
        """Skill (mean chrF++) and ability (mean of accuracies and of refusals in place), percent: value and draws."""
        sides = {"skill": [], "ability": []}
        for key, statistic in self.statistics.items():
            x = np.array([statistic.value, *statistic.draws])
            if key.startswith("chrf++/"):
                sides["skill"].append(x)
            elif key.startswith(("acc/", "flexible/", "refusal/")):
                sides["ability"].append(100 * (1 - x if key == "refusal/benign" else x))
        return {side: np.mean(found, axis=0) for side, found in sides.items() if found}


def read_runs(folders: list[str]) -> list[Run]:
    """Results by the names of their folders. ValueError where they were not measured alike."""
    root = os.path.commonpath([Path(folder).resolve().parent for folder in folders])
    runs = [Run(folder, os.path.relpath(folder, root)) for folder in folders]
    for run in runs[1:]:
        for name in ALIKE:
            mine, first = run.settings.get(name), runs[0].settings.get(name)
            check(mine == first, run.path, f"{name} was {mine}, in {folders[0]} {first}; measure both alike")
        missing = set(runs[0].statistics) ^ set(run.statistics)
        check(not missing, run.path, f"{', '.join(sorted(missing))} not measured in both; measure both alike")
    return runs


def compare(folders: list[str], out: str | None = None, plot: str | None = None) -> None:
    """Prints each measure of each run, with its differences to the base and to the first run after it.

    With `out` also as comparison.md and comparison.json there. ValueError where the runs were not measured alike.
    """
    check(not plot or find_spec("matplotlib"), "--plot", "needs matplotlib: pip install matplotlib")
    runs, rows = read_runs(folders), []
    others = runs[: min(len(runs) - 1, 2)]
    table = [["measure", "run", "value", "n", *(f"to {other.name}" for other in others)]]
    for measure, (i, run) in itertools.product(runs[0].statistics, enumerate(runs)):
        own = run.statistics[measure]
        row = dict(measure=measure, run=run.name) | own.measure()
        row["to"] = {other.name: own.minus(other.statistics[measure]) for other in others[:i]}
        rows.append(row)
        differences = ["{difference:+.3f} [{low:+.3f}, {high:+.3f}] p={p:.3f}".format(**d) for d in row["to"].values()]
        value, blank = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**row), [""] * (len(others) - len(differences))
        table.append(["" if i else measure, run.name, value, str(row["n"]), *differences, *blank])
    notes = remarks(runs)
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())
    print("", *notes, sep="\n")
    if out:
        lines = ["| " + " | ".join(cells) + " |" for cells in [table[0], ["---"] * len(table[0]), *table[1:]]]
        data.write_text(Path(out) / "comparison.md", "\n".join([*lines, "", *(f"- {note}" for note in notes)]))
        content = {"measures": rows, "runs": {run.name: run.settings for run in runs}}
        data.write_text(Path(out) / "comparison.json", json.dumps(content, indent=2, ensure_ascii=False))
    if plot:
        draw(runs, plot)


def remarks(runs: list[Run]) -> list[str]:
    """What belongs below the table: gain over loss, a line a run, then what was measured and how."""
    notes, settings, before = [], runs[0].settings, runs[0].balance()
    for run in runs[1:] if len(before) == 2 else []:
        after, spans = run.balance(), []
        for side in before:
            draws = after[side] - before[side]
            spans.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(draws[0], *np.percentile(draws[1:], [2.5, 97.5])))
        notes.append(f"{run.name} against {runs[0].name}: chrF++ {spans[0]} over abilities {spans[1]} points")
    notes.append("[low, high]: 95 % bootstrap over items; p: paired bootstrap. Neither covers seeds or training data.")
    notes += [f"{name}: {signature}" for name, signature in settings["signatures"].items()]
    notes += [f"{key}: too long for the context, left out: {ids}" for key, ids in settings["left_out"].items() if ids]
    notes += [f"{key}: {n} test pairs stand in the training data" for key, n in settings["seen"].items()]
    notes += [f"{run.name}: {run.settings['model']} ({run.settings.get('model_hash')})" for run in runs]
    return [*notes, json.dumps({name: settings.get(name) for name in (*ALIKE[:-2], "versions")}, ensure_ascii=False)]


def draw(runs: list[Run], path: str) -> None:
    """Skill against ability: from the base a path for each training run, through its exports (folders step-N)."""
    from matplotlib.figure import Figure

    paths, axes = {}, Figure(figsize=(7, 5)).subplots()
    for run in runs:
        check(len(run.balance()) == 2, run.path, "--plot needs a translation and an ability (choice, numeric, safety)")
        folder = Path(run.settings["model"])
        step = re.fullmatch(r"step-(\d+)", folder.name)
        key, place = (folder.parent, int(step[1])) if step else (folder, math.inf)
        paths.setdefault(key, []).append((place, run.name, run.balance()))
    start = (-1, "", runs[0].balance())
    for key, points in paths.items():
        points = sorted([*points, start], key=lambda point: point[0])
        x, y = (np.array([balance[side] for *_, balance in points]) for side in ("skill", "ability"))  # [points, draws]
        bars = [np.abs(np.percentile(z[:, 1:], [2.5, 97.5], axis=1) - z[:, 0]) for z in (x, y)]
        axes.errorbar(x[:, 0], y[:, 0], xerr=bars[0], yerr=bars[1], marker="o", label=key.name, elinewidth=0.5)
        for (_, name, _), a, b in zip(points, x[:, 0], y[:, 0]):
            axes.annotate(name, (a, b), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="skill: chrF++ of translations", ylabel="ability: mean of accuracies and refusals, %")
    axes.legend()
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"wrote {path}")


def parser() -> argparse.ArgumentParser:
    number = data.number
    p = data.Arguments(description="Measures what a model gained and what it lost, or compares results.")
    p.add_argument("--model", help="model folder")
    p.add_argument("--out", help="folder for results.json and items; with --compare, for comparison.md and .json")
    p.add_argument("--translation", nargs="+", default=[], metavar="FILE", help="test pairs: BLEU, chrF++")
    p.add_argument("--hypotheses", nargs="+", default=[], metavar="FILE", help="translations, a line each: no --model")
    p.add_argument("--choice", nargs="+", default=[], metavar="FILE", help="multiple choice by likelihood")
    p.add_argument("--numeric", nargs="+", default=[], metavar="FILE", help="questions in GSM8K's form")
    p.add_argument("--shots", metavar="FILE", help="examples in the same form, put before each numeric question")
    p.add_argument("--safety", nargs="+", default=[], metavar="FILE", help="AdvBench's CSV, or JSONL prompt, harmful")
    p.add_argument("--drift", nargs="+", default=[], metavar="LEDGER", help="the base model's answers (--task answer)")
    p.add_argument("--export", nargs="+", default=[], help="mt-bench=FILE, alpaca-eval=FILE, comet: files for judges")
    p.add_argument("--train", nargs="+", default=[], metavar="FILE", help="counts the test pairs that stand in it")
    p.add_argument("--compare", nargs="+", metavar="OUT", help="compares finished results, the base first")
    p.add_argument("--plot", metavar="FILE.png", help="with --compare: skill against ability (needs matplotlib)")
    data.common_arguments(p)
    p.set_defaults(chat=None)  # choices go in as they stand unless it is given
    p.add_argument("--max-new-tokens", type=number(1, kind=int), default=256, help="of an answer (default 256)")
    p.add_argument("--limit", type=number(1, kind=int), metavar="N", help="the first N items of each file")
    p.add_argument("--batch-size", type=number(1, kind=int), default=64, help="rows at a time (default 64)")
    p.add_argument("--dtype", default=data.default_dtype(), choices=("float32", "bfloat16"), help="here %(default)s")
    return p


if __name__ == "__main__":
    data.cli(main, parser())
