"""What was gained and what was lost: translation, and drift from the base model's own answers (RaDis, step 3).

    python evaluate.py --model DIR --out results/base --translation test.de-en.json --direction de-en --drift answers.jsonl
    python evaluate.py --compare results/base results/vanilla results/radis

Every measure is written with a 95 % bootstrap interval, and every item with what was asked and answered, so that anyone can
count again. A run that was interrupted goes on from the items that are finished.
"""

import argparse
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
from data import Encoder, Tokenizer, collate, read_rows
from generate import complete, model_hash, sample
from model import Transformer, start_processes

RESAMPLES, WHOLE = 1000, 32  # bootstrap draws; rows that are generated past their first line, to count what the stop saves


def bootstrap(stats: np.ndarray, score: Callable[[np.ndarray], float]) -> dict:
    """value = score(column sums of stats [n, k]) and the 2.5 and 97.5 percentiles of it over items drawn with replacement.

    Efron 1979; for BLEU and chrF as Koehn 2004. The draws are seeded: the same items give the same interval.
    """
    rng, n = np.random.default_rng(12345), len(stats)
    scores = [score(stats[rng.integers(0, n, n)].sum(0)) for _ in range(RESAMPLES)]
    low, high = np.percentile(scores, [2.5, 97.5])
    return dict(value=score(stats.sum(0)), low=float(low), high=float(high), n=n)


def ratio(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1]) if sums[1] else 0.0


def share(values: list[float]) -> dict:
    """The mean of one value an item, with its interval."""
    return bootstrap(np.array([[v, 1.0] for v in values]), ratio)


def bleu_for(language: str) -> BLEU:
    """BLEU with sacreBLEU's tokenizer for the target language; `char` where the extra package for ja or ko is missing."""
    try:
        return BLEU(tokenize={"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}.get(language, "13a"))
    except (ImportError, RuntimeError):
        print(f"no sacrebleu[{language}] installed: BLEU for {language} is over characters (tok:char)")
        return BLEU(tokenize="char")


def translate(model, encoder: Encoder, rows: list[dict], args: argparse.Namespace) -> Iterator[dict]:
    """Greedy translations, cut at the first line: a RaDis model goes on to explain. The first rows run on, to see how far."""
    tokenizer = encoder.tokenizer
    with tqdm(total=len(rows), unit="sentence", disable=dist.get_rank() > 0) as bar:
        whole = [row for row in rows if row["place"] < WHOLE]
        for part, stop in [(whole, None), (rows[len(whole) :], tokenizer.first_line_ends)]:
            prompts = [encoder.prompt(row) for row in part]
            out = sample(model, prompts, args.max_new_tokens, 0.0, 1.0, tokenizer.eos_ids, 0, args.batch_size,
                         [row["id"] for row in part], stop=stop)  # fmt: skip
            for i, ids, _, finish in out:
                row, text = part[i], tokenizer.decode(ids)
                line = next((n for n in range(1, len(ids) + 1) if tokenizer.first_line_ends(ids[:n])), len(ids))
                yield dict(
                    id=row["id"], source=row["source"], reference=row["reference"],
                    prompt=encoder.messages(row)[-1]["content"], output=text, hypothesis=text.strip("\n").split("\n")[0].strip(),
                    cut=line < len(ids) or tokenizer.first_line_ends(ids), tokens=line,
                    tokens_after=None if stop else len(ids) - line, finish=finish,
                )  # fmt: skip
                bar.update()


def translation_measures(items: list[dict], target: str) -> tuple[dict, dict]:
    """-> measures and sacreBLEU signatures of one test set."""
    hypotheses, references = [i["hypothesis"] for i in items], [[i["reference"] for i in items]]
    measures, signatures = {}, {}
    for name, metric in [("bleu", bleu_for(target)), ("chrf++", CHRF(word_order=2))]:
        exact = metric.corpus_score(hypotheses, references)
        stats = np.array(metric._extract_corpus_statistics(hypotheses, references))
        found = bootstrap(stats, lambda sums: metric._compute_score_from_stats(sums.tolist()).score)
        measures[name] = found | {"value": exact.score}
        signatures[name] = str(metric.get_signature())
    measures["cut"] = share([i["cut"] for i in items])
    measures["empty"] = share([not i["hypothesis"] for i in items])
    ran_on = [i["tokens_after"] for i in items if i["tokens_after"] is not None]
    if ran_on:
        measures["tokens_after_cut"] = share(ran_on)
    return measures, signatures


@torch.inference_mode()
def likelihoods(model, encoder: Encoder, rows: list[dict], args: argparse.Namespace) -> Iterator[dict]:
    """-log P of the base model's own answers under this model, EOS included where the answer ended by itself."""
    device = next(model.parameters()).device
    order = sorted(rows, key=lambda row: len(row.get("reference_ids") or row["reference"]))
    for start in tqdm(range(0, len(order), args.batch_size), unit="batch", disable=dist.get_rank() > 0):
        part = order[start : start + args.batch_size]
        examples = [encoder.example(row) for row in part]
        tokens, select, targets, _ = collate(examples, device)
        losses = F.cross_entropy(model(tokens, select).float(), targets, reduction="none").double().cpu()
        for row, example, nll in zip(part, examples, losses.split([len(e.reference) for e in examples])):
            sampled = len(row["reference_ids"])  # without EOS, which the ledger's log-probability leaves out
            own = row["logprob"] * sampled if row.get("logprob") is not None else None
            yield dict(
                id=row["id"], prompt=encoder.messages(row)[-1]["content"], answer=row["reference"],
                nll=nll.sum().item(), tokens=len(nll), sampled=sampled,
                logprob=-nll[:sampled].sum().item(), base_logprob=own,
            )  # fmt: skip


def answers(model, encoder: Encoder, rows: list[dict], args: argparse.Namespace) -> Iterator[dict]:
    """This model's own answers to the same prompts, sampled as the base model's were."""
    tokenizer, meta = encoder.tokenizer, rows[0]["meta"] if rows else {}
    with tqdm(total=len(rows), unit="answer", disable=dist.get_rank() > 0) as bar:
        prompts, keys = [encoder.prompt(row) for row in rows], [row["id"] for row in rows]
        settings = (meta["max_new_tokens"], meta["temperature"], meta["top_p"]) if rows else (1, 0.0, 1.0)
        for i, ids, _, finish in sample(
            model, prompts, *settings, tokenizer.eos_ids, meta.get("seed", 0), args.batch_size, keys
        ):
            text = tokenizer.decode(ids)
            yield dict(id=keys[i], prompt=encoder.messages(rows[i])[-1]["content"], answer=text, tokens=len(ids), finish=finish)
            bar.update()


def drift_measures(items: list[dict], own: list[dict], meta: dict) -> dict:
    """NLL a token; forward KL(base || this) a token, estimated on the base model's samples; mean length of own answers.

    The estimate of KL, the mean of log P_base - log P_this, is unbiased where the ledger was sampled from the base model's
    distribution as it is (temperature 1, top-p 1); otherwise it is left out.
    """
    measures = {"drift_nll": bootstrap(np.array([[i["nll"], i["tokens"]] for i in items]), ratio)}
    if meta.get("temperature") == 1 and meta.get("top_p") == 1:
        gaps = [[i["base_logprob"] - i["logprob"], i["sampled"]] for i in items if i["base_logprob"] is not None]
        measures["drift_kl"] = bootstrap(np.array(gaps), ratio)
    return measures | {"drift_length": share([i["tokens"] for i in own])}


def file_hash(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def run_items(name: str, stem: str, rows: list[dict], produce, settings: dict, args: argparse.Namespace) -> list[dict]:
    """Writes items/NAME/STEM.jsonl, or finishes it, and reads it back."""
    path = Path(args.out) / "items" / name / f"{stem}.jsonl"
    complete(path, settings, rows, produce)
    items = {item["id"]: item for _, item in data.read_json(path)}
    return [items[row["id"]] for row in rows]


def main(args: argparse.Namespace) -> None:
    if args.compare:
        return compare(args.compare)
    # 1. everything that can be wrong with the files, before any weight is read
    if not args.model or not args.out or not (args.translation or args.drift):
        raise ValueError("give --model, --out and what to measure (--translation, --drift), or --compare")
    rank, _, device = start_processes()
    tokenizer = Tokenizer(args.model, args.chat)
    encoder = Encoder(tokenizer, data.read_template(args.template), args.system)
    directions = args.direction * len(args.translation) if len(args.direction) == 1 else args.direction
    if directions and args.translation and len(directions) != len(args.translation):
        raise ValueError("give --direction once, or once for each --translation file")
    tests, drifts = {}, {}
    for i, file in enumerate(args.translation):
        tests[Path(file).stem] = file, read_rows([file], directions[i : i + 1])[: args.limit]
    for file in args.drift:
        rows = read_rows([file])[: args.limit]
        if not rows[0].get("meta"):
            raise ValueError(f"{file}: not a ledger; write one with generate.py --task answer and the base model")
        drifts[Path(file).stem] = file, [row | {"meta": rows[0]["meta"]} for row in rows]
    if len(tests) < len(args.translation) or len(drifts) < len(args.drift):
        raise ValueError("two files have the same name without ending, and results are named by it; rename one")
    # 2. the settings that results depend on, and the model
    settings = dict(
        chat=tokenizer.chat_name, system=args.system, template=encoder.template or data.TEMPLATE,
        max_new_tokens=args.max_new_tokens, limit=args.limit, dtype=args.dtype, model=str(args.model),
        model_hash=model_hash(args.model), files={name: file_hash(f) for name, (f, _) in (tests | drifts).items()},
        versions={"torch": torch.__version__, "sacrebleu": sacrebleu.__version__},
    )  # fmt: skip
    same = {k: v for k, v in settings.items() if k not in ("files", "limit")}
    model = Transformer.from_pretrained(args.model, getattr(torch, args.dtype), device)
    # 3. the measures
    measures, signatures = {}, {}
    for stem, (file, rows) in tests.items():
        if any("source" not in row for row in rows):
            raise ValueError(f"{file}: --translation needs pairs with a source and a reference")
        rows = [row | {"place": i} for i, row in enumerate(rows)]
        items = run_items("bleu", stem, rows, lambda todo: translate(model, encoder, todo, args),
                          same | {"file": file_hash(file)}, args)  # fmt: skip
        found, signed = translation_measures(items, rows[0]["target_lang"])
        measures |= {f"{name}/{stem}": m for name, m in found.items()}
        signatures |= {f"{name}/{stem}": s for name, s in signed.items()}
    for stem, (file, rows) in drifts.items():
        here = same | {"file": file_hash(file)}
        items = run_items("drift_nll", stem, rows, lambda todo: likelihoods(model, encoder, todo, args), here, args)
        own = run_items("drift_length", stem, rows, lambda todo: answers(model, encoder, todo, args), here, args)
        measures |= {f"{name}/{stem}": m for name, m in drift_measures(items, own, rows[0]["meta"]).items()}
    # 4. the results
    if rank == 0:
        file = Path(args.out) / "results.json"
        text = json.dumps({"settings": settings | {"signatures": signatures}, "measures": measures}, indent=2, ensure_ascii=False)
        file.with_suffix(".tmp").write_text(text + "\n", "utf-8")
        file.with_suffix(".tmp").replace(file)
        for name, m in measures.items():
            print(f"{name:30} {m['value']:8.3f}  [{m['low']:.3f}, {m['high']:.3f}]  n {m['n']}  {signatures.get(name, '')}")


def compare(folders: list[str]) -> None:
    """One table of several runs, a column each, after a check that they were measured alike."""
    runs = []
    for folder in folders:
        path = Path(folder) / "results.json"
        run = json.loads(data.read_text(path)) if path.exists() else None
        if not isinstance(run, dict) or not {"settings", "measures"} <= set(run):
            raise ValueError(f"{path}: no results there; run evaluate.py --model ... --out {folder} first")
        runs.append(run)
    for folder, run in zip(folders[1:], runs[1:]):
        for name in ("files", "limit", "max_new_tokens", "template", "system", "chat", "signatures"):
            if run["settings"].get(name) != runs[0]["settings"].get(name):
                raise ValueError(
                    f"{folder}: measured with {name} {run['settings'].get(name)}, {folders[0]} with "
                    f"{runs[0]['settings'].get(name)}; measure both alike"
                )
    cell = lambda m: f"{m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]" if m else "-"  # noqa: E731
    table = [["measure", *(Path(f).name for f in folders), "n"]]
    for name in runs[0]["measures"]:
        ms = [run["measures"].get(name) for run in runs]
        table.append([name, *map(cell, ms), str(ms[0]["n"])])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(text.ljust(w) for text, w in zip(row, widths)).rstrip())
    print("\n95 % bootstrap intervals over items, each run by itself")
    for name, signature in (runs[0]["settings"].get("signatures") or {}).items():
        print(f"{name}: {signature}")


def parser() -> argparse.ArgumentParser:
    number = data.number
    p = data.Arguments(description="Measures what a model gained (translation) and lost (drift), or compares such results.")
    p.add_argument("--model", help="model folder")
    p.add_argument("--out", help="folder for results.json and items")
    p.add_argument("--translation", nargs="+", default=[], metavar="FILE", help="test pairs: BLEU, chrF++")
    p.add_argument("--drift", nargs="+", default=[], metavar="LEDGER", help="the base model's answers (generate.py --task answer)")
    p.add_argument("--compare", nargs="+", metavar="OUT", help="prints one table of finished results, the base first")
    data.common_arguments(p)
    p.add_argument("--max-new-tokens", type=number(1, kind=int), default=256, help="tokens of a translation (default 256)")
    p.add_argument("--limit", type=number(1, kind=int), metavar="N", help="the first N items of each file")
    p.add_argument("--batch-size", type=number(1, kind=int), default=64, help="rows at a time (default 64)")
    p.add_argument("--dtype", default=data.default_dtype(), choices=("float32", "bfloat16"), help="default %(default)s here")
    return p


if __name__ == "__main__":
    data.cli(main, parser())
