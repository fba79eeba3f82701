r"""What was gained and what was lost: translation, and drift from the base model's own answers (RaDis, step 3).

    python evaluate.py --model DIR --out results/base --translation test.de-en.json --direction de-en \
                       --drift answers.jsonl
    python evaluate.py --compare results/base results/vanilla results/radis

Every measure has a 95 % bootstrap interval, and every item is written with what was asked and answered, so that anyone
can count again. A run that was interrupted goes on from the items that are finished.
"""

import argparse
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import sacrebleu
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sacrebleu.metrics import BLEU, CHRF
from tqdm import tqdm

import data
from data import Encoder, Tokenizer
from generate import check_length, complete, model_hash, sample
from model import ModelConfig, Transformer, start_processes

RESAMPLES = 1000
RUN_ON = 32  # the first sentences are generated past their first line, to see what stopping there saves


def bootstrap(stats: np.ndarray, score: Callable[[np.ndarray], float]) -> dict:
    """score of the column sums of `stats` [n, k], and its 2.5 and 97.5 percentiles over items drawn with replacement.

    Efron 1979; for BLEU and chrF as Koehn 2004. The draws are seeded: the same items give the same interval.
    """
    rng, n = np.random.default_rng(12345), len(stats)
    scores = [score(stats[rng.integers(0, n, n)].sum(0)) for _ in range(RESAMPLES)]
    low, high = np.percentile(scores, [2.5, 97.5])
    return dict(value=score(stats.sum(0)), low=float(low), high=float(high), n=n)


def mean(values: list[float], weights: list[float] | None = None) -> dict:
    """Sum of the values over the sum of the weights (by default the mean), with its interval."""
    stats = np.array([values, weights or [1.0] * len(values)], dtype=float).T
    return bootstrap(stats, lambda sums: float(sums[0] / max(sums[1], 1e-9)))


def progress(steps, **options):
    """A progress bar over `steps` on rank 0."""
    return tqdm(steps, disable=dist.get_rank() > 0, **options)


def asked(encoder: Encoder, row: dict) -> str:
    """The last user turn, as the model was asked it."""
    return encoder.messages(row)[-1]["content"]


def translate(model, encoder: Encoder, rows: list[dict], args: argparse.Namespace) -> Iterator[dict]:
    """Greedy translations, cut at the first line that is not empty: a RaDis model goes on to explain."""
    tokenizer = encoder.tokenizer
    for part in ([r for r in rows if r["place"] < RUN_ON], [r for r in rows if r["place"] >= RUN_ON]):
        stop = tokenizer.first_line_ends if part and part[0]["place"] >= RUN_ON else None
        prompts, eos = [encoder.prompt(row) for row in part], tokenizer.eos_ids
        limits = dict(eos_ids=eos, stop=stop, limit=tokenizer.vocab_size)
        outputs = sample(model, prompts, args.max_new_tokens, batch_size=args.batch_size, **limits)
        for i, ids, _, finish in progress(outputs, total=len(part), unit="sentence"):
            row, text = part[i], tokenizer.decode(ids)
            end = next((n for n in range(1, len(ids) + 1) if tokenizer.first_line_ends(ids[:n])), None)
            item = {name: row[name] for name in ("id", "source", "reference")}
            item |= dict(prompt=asked(encoder, row), output=text, hypothesis=text.strip().split("\n")[0].strip())
            after = None if stop else len(ids) - (end or len(ids))
            yield item | dict(cut=end is not None, tokens=end or len(ids), tokens_after_cut=after, finish=finish)


def bleu_for(language: str) -> BLEU:
    """BLEU with sacreBLEU's tokenizer for the target language; `char` where the extra package for it is missing."""
    try:
        return BLEU(tokenize={"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}.get(language, "13a"))
    except (ImportError, RuntimeError):
        print(f"sacrebleu[{language}] is not installed: BLEU is over characters (tok:char)")
        return BLEU(tokenize="char")


def translation_measures(items: list[dict], target: str) -> tuple[dict, dict]:
    """-> measures and sacreBLEU's signatures of one test set."""
    hypotheses, references = [i["hypothesis"] for i in items], [[i["reference"] for i in items]]
    measures, signatures = {}, {}
    for name, metric in [("bleu", bleu_for(target)), ("chrf++", CHRF(word_order=2))]:
        value = metric.corpus_score(hypotheses, references).score
        stats = np.array(metric._extract_corpus_statistics(hypotheses, references))
        measures[name] = bootstrap(stats, lambda sums: metric._compute_score_from_stats(sums.tolist()).score)  # noqa: B023
        measures[name]["value"] = value
        signatures[name] = str(metric.get_signature())
    measures["cut"] = mean([i["cut"] for i in items])  # share of outputs with a line break after the first line
    measures["empty"] = mean([not i["hypothesis"] for i in items])
    measures["tokens_after_cut"] = mean([i["tokens_after_cut"] for i in items if i["tokens_after_cut"] is not None])
    return measures, signatures


@torch.inference_mode()
def likelihoods(model, encoder: Encoder, rows: list[dict], args: argparse.Namespace) -> Iterator[dict]:
    """-log P of the base model's answers under this model; EOS counts where an answer ended by itself."""
    device = next(model.parameters()).device
    pairs = sorted(((encoder.example(row), row) for row in rows), key=lambda pair: len(pair[0]))
    for start in progress(range(0, len(pairs), args.batch_size), unit="batch"):
        part = pairs[start : start + args.batch_size]
        tokens, select, targets, _ = data.collate([example for example, _ in part], device)
        losses = F.cross_entropy(model(tokens, select).float(), targets, reduction="none").double().cpu()
        for (_, row), nll in zip(part, losses.split([len(e.reference) for e, _ in part])):
            sampled = len(row["reference_ids"])  # without EOS, which the ledger's log-probability leaves out
            item = dict(id=row["id"], prompt=asked(encoder, row), answer=row["reference"], nll=nll.sum().item())
            item |= dict(tokens=len(nll), sampled=sampled, logprob=-nll[:sampled].sum().item())
            yield item | {"base_logprob": (row.get("logprob") or 0.0) * sampled}


def answers(model, encoder: Encoder, rows: list[dict], args: argparse.Namespace) -> Iterator[dict]:
    """This model's own answers to the same prompts, sampled as the base model's were."""
    if not rows:
        return
    tokenizer, prompts, keys = encoder.tokenizer, [encoder.prompt(row) for row in rows], [row["id"] for row in rows]
    settings = {name: rows[0]["meta"][name] for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    settings |= dict(keys=keys, eos_ids=tokenizer.eos_ids, limit=tokenizer.vocab_size)
    outputs = sample(model, prompts, batch_size=args.batch_size, **settings)
    for i, ids, _, finish in progress(outputs, total=len(rows), unit="answer"):
        answer = tokenizer.decode(ids)
        yield dict(id=keys[i], prompt=asked(encoder, rows[i]), answer=answer, tokens=len(ids), finish=finish)


def drift_measures(items: list[dict], own: list[dict], meta: dict, tokenizer: Tokenizer) -> dict:
    """NLL a token; forward KL(base || this) a token, estimated on the base model's samples; mean length of own answers.

    KL is estimated as the mean of log P_base - log P_this over the sampled tokens, EOS not included; only where the
    ledger was sampled from the base model's distribution as it is (temperature 1, top-p 1), in the same tokens.
    """
    measures = {"drift_nll": mean([i["nll"] for i in items], [i["tokens"] for i in items])}
    if meta.get("temperature") == 1 and meta.get("top_p") == 1 and meta["tokenizer_hash"] == tokenizer.hash:
        gaps = [i["base_logprob"] - i["logprob"] for i in items]
        measures["drift_kl"] = mean(gaps, [i["sampled"] for i in items])
    return measures | {"drift_length": mean([i["tokens"] for i in own])}


def read_tests(args: argparse.Namespace) -> tuple[dict, dict, dict]:
    """-> translation rows, drift rows, and the hash of the data, each by stem: the file's name without ending."""
    groups = data.group_files(args.translation)
    directions = args.direction * len(groups) if len(args.direction) == 1 else args.direction
    if directions and groups and len(directions) != len(groups):
        raise ValueError("give --direction once, or once for each --translation file")
    tests, drifts, hashes = {}, {}, {}
    for group in [*groups, *((file,) for file in args.drift)]:
        stem, drift = Path(group[0]).stem, group[0] in args.drift
        if stem in hashes:
            raise ValueError(f"{group[0]}: same name without ending as another file, and results go by it; rename one")
        rows = data.read_rows(group, [] if drift else directions[len(tests) : len(tests) + 1])[: args.limit]
        (drifts if drift else tests)[stem] = [row | {"place": i} for i, row in enumerate(rows)]
        hashes[stem] = hashlib.sha256(b"".join(Path(file).read_bytes() for file in group)).hexdigest()[:16]
        if drift and any(row.get("meta", {}).get("task") != "answer" for row in rows):
            raise ValueError(f"{group[0]}: not the base model's answers; write them with generate.py --task answer")
        if not drift and any("source" not in row for row in rows):
            raise ValueError(f"{group[0]}: --translation needs pairs with a source and a reference")
    return tests, drifts, hashes


def main(args: argparse.Namespace) -> None:
    if args.compare:
        return compare(args.compare)
    # 1. everything that can be wrong with the files, before any weight is read
    if not args.model or not args.out or not args.translation + args.drift:
        raise ValueError("give --model, --out and what to measure (--translation, --drift), or --compare")
    rank, _, device = start_processes()
    tokenizer, config = Tokenizer(args.model, args.chat), ModelConfig.from_file(Path(args.model) / "config.json")
    encoder = Encoder(tokenizer, data.read_template(args.template), args.system)
    as_written = Encoder(tokenizer)  # a ledger brings the settings of its prompts
    tests, drifts, hashes = read_tests(args)
    for row in sum(tests.values(), []):
        check_length(row, len(encoder.prompt(row)), args.max_new_tokens, config)
    for row in sum(drifts.values(), []):
        check_length(row, len(as_written.prompt(row)), row["meta"]["max_new_tokens"], config)
    # 2. the settings that results depend on, and the model, read once it is needed
    settings = dict(model=str(args.model), model_hash=model_hash(args.model), chat=tokenizer.chat_name)
    settings |= dict(system=args.system, template=encoder.template or data.TEMPLATE, dtype=args.dtype)
    settings |= dict(max_new_tokens=args.max_new_tokens)
    settings |= dict(versions={"torch": torch.__version__, "sacrebleu": sacrebleu.__version__})
    file = Path(args.out) / "results.json"
    old = data.read_object(file) or {"settings": settings | {"limit": args.limit}, "measures": {}}
    for name, value in (settings | {"limit": args.limit}).items():
        if name not in ("model", "versions") and old["settings"].get(name) != value:
            raise ValueError(f"{file}: {name} was {old['settings'].get(name)}, now {value}; choose another --out")
    load = functools.cache(lambda: Transformer.from_pretrained(args.model, getattr(torch, args.dtype), device))

    def items(name: str, stem: str, rows: list[dict], produce, encoder: Encoder) -> list[dict]:
        path = Path(args.out) / "items" / name / f"{stem}.jsonl"
        complete(path, settings | {"file": hashes[stem]}, rows, lambda todo: produce(load(), encoder, todo, args))
        by_id = {item["id"]: item for _, item in data.read_json(path)}
        return [by_id[row["id"]] for row in rows]

    # 3. the measures
    measures, signatures = old["measures"], old["settings"].get("signatures", {})
    for stem, rows in tests.items():
        found, signed = translation_measures(items("bleu", stem, rows, translate, encoder), rows[0]["target_lang"])
        measures |= {f"{name}/{stem}": m for name, m in found.items()}
        signatures |= {f"{name}/{stem}": s for name, s in signed.items()}
    for stem, rows in drifts.items():
        scored = items("drift_nll", stem, rows, likelihoods, as_written)
        found = drift_measures(
            scored, items("drift_length", stem, rows, answers, as_written), rows[0]["meta"], tokenizer
        )
        measures |= {f"{name}/{stem}": m for name, m in found.items()}
    # 4. the results, beside those of an earlier run into the same folder
    if rank == 0:
        settings |= {"files": old["settings"].get("files", {}) | hashes, "limit": args.limit, "signatures": signatures}
        text = json.dumps({"settings": settings, "measures": measures}, indent=2, ensure_ascii=False)
        file.with_suffix(".tmp").write_text(text + "\n", "utf-8")
        file.with_suffix(".tmp").replace(file)
        compare([args.out])


def compare(folders: list[str]) -> None:
    """Prints one table of several runs, a column each, once it is sure that they were measured alike."""
    runs = []
    for folder in folders:
        path = Path(folder) / "results.json"
        if not path.exists():
            raise ValueError(f"{path}: no results there; run evaluate.py --model ... --out {folder} first")
        runs.append(data.read_object(path))
        data.check({"settings", "measures"} <= set(runs[-1]), path, "not written by evaluate.py; choose another folder")
        for name in ("files", "limit", "max_new_tokens", "template", "system", "chat", "dtype", "signatures"):
            mine, first = (run["settings"].get(name) for run in (runs[-1], runs[0]))
            if mine != first:
                raise ValueError(f"{path}: {name} was {mine}, in {folders[0]} {first}; measure both alike")
    table = [["measure", *(Path(folder).name for folder in folders), "n"]]
    for name, base in runs[0]["measures"].items():
        cells = [run["measures"].get(name) for run in runs]
        data.check(all(cells), name, f"not measured in every one of {', '.join(folders)}; measure all alike")
        table.append([name, *(f"{m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]" for m in cells), str(base["n"])])
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print("\n95 % bootstrap intervals over items, each run by itself")
    for name, signature in runs[0]["settings"]["signatures"].items():
        print(f"{name}: {signature}")


def parser() -> argparse.ArgumentParser:
    number = data.number
    p = data.Arguments(description="Measures what a model gained (translation) and lost (drift), or compares results.")
    p.add_argument("--model", help="model folder")
    p.add_argument("--out", help="folder for results.json and items")
    p.add_argument("--translation", nargs="+", default=[], metavar="FILE", help="test pairs: BLEU, chrF++")
    p.add_argument("--drift", nargs="+", default=[], metavar="LEDGER", help="the base model's answers (--task answer)")
    p.add_argument("--compare", nargs="+", metavar="OUT", help="prints one table of finished results, the base first")
    data.common_arguments(p)
    p.add_argument("--max-new-tokens", type=number(1, kind=int), default=256, help="of a translation (default 256)")
    p.add_argument("--limit", type=number(1, kind=int), metavar="N", help="the first N items of each file")
    p.add_argument("--batch-size", type=number(1, kind=int), default=64, help="rows at a time (default 64)")
    p.add_argument("--dtype", default=data.default_dtype(), choices=("float32", "bfloat16"), help="here %(default)s")
    return p


if __name__ == "__main__":
    data.cli(main, parser())
