"""Rationale generation: the model goes on where the reference ends (RaDis, step 1), and what it says is kept.

    python generate.py --model DIR --data train.de-en.json --direction de-en --out rationales.jsonl --cue '\\n'

The sampler keeps a batch full: a row that ends is replaced at once by the next prompt, each row at its own position of
a shared key/value cache. A row's random numbers hang on (seed, id) alone, so batch size, order, ranks and restarts do
not change it. The ledger grows in the order of the data, a line at a time, and the same command finishes what is missing.
"""

import argparse
import hashlib
import json
import math
import os
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import sentencepiece
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
from data import Encoder, Tokenizer, read_rows
from model import KVCache, ModelConfig, Transformer, start_processes

# SDFT (Yang et al. 2024) in our own words: the reference as a guide, and phrases that give it away
PARAPHRASE = "{instruction}\n\nBelow is a reference answer. Write your own answer to the request, guided by it.\n{reference}"
LEAKS = ("reference answer", "your response", "my response", "now it's your turn")


def choose(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """logits [N, V], uniform numbers u [N] in [0, 1) -> tokens [N], log-probabilities [N] (at temperature 1, untruncated).

    Inverse of the cumulative distribution, so that one number a token decides. top_p keeps the smallest set of most
    probable tokens whose mass reaches it (nucleus sampling, Holtzman et al. 2020), and those tied with the last of them.
    """
    logprobs = logits.float().log_softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        probs = ((logprobs - logprobs.amax(-1, keepdim=True)) / temperature).softmax(-1)
        if top_p < 1:  # sorting a whole vocabulary costs more than a small model: try its head first
            head = probs.topk(min(256, probs.shape[-1])).values
            if (head.sum(-1) < top_p).any():
                head = probs.sort(descending=True).values
            last = (head.cumsum(-1) - head < top_p).sum(-1, keepdim=True) - 1  # the nucleus' least probable token
            probs = probs.masked_fill(probs < head.gather(-1, last), 0)
        mass = probs.double().cumsum(-1)
        tokens = torch.searchsorted(mass, u[:, None] * mass[:, -1:], right=True).clamp_max(mass.shape[-1] - 1)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


def uniforms(seed: int, key: str, count: int) -> Tensor:
    """The random numbers [count] of the row `key`."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    return torch.rand(count, dtype=torch.float64, generator=generator)


@torch.inference_mode()
def sample(model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0,
           top_p: float = 1.0, eos_ids: Iterable[int] = (), seed: int = 0, batch_size: int = 32,
           keys: list | None = None, scored: list[int] | None = None,
           stop: Callable[[list[int]], bool] | None = None) -> Iterator[tuple[int, list[int], list[float], str]]:  # fmt: skip
    """Yields (index of the prompt, new ids without EOS, log-probabilities, "eos" or "length") as rows end.

    keys: names of the rows for their random numbers (default: the index). scored: how many tokens at the end of each
    prompt have their log-probability put before those of the new ids. stop(ids) ends a row as EOS would.
    ValueError where a prompt is empty or does not leave `max_new_tokens` of the model's context.
    """
    config, device = model.config, next(model.parameters()).device
    keys, scored = keys or list(range(len(prompts))), scored or [0] * len(prompts)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, wanted at least 1")
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= config.max_position_embeddings - max_new_tokens:
            raise ValueError(
                f"row {keys[i]}: {len(prompt)} tokens and {max_new_tokens} new ones do not fit the model's context of "
                f"{config.max_position_embeddings}; leave the row out or lower --max-new-tokens"
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"row {keys[i]}: token id outside the model's vocabulary of {config.vocab_size}")
    if not prompts:
        return
    eos, waiting = set(eos_ids), list(range(len(prompts)))[::-1]
    batch_size = min(batch_size, len(prompts))
    length, dtype = max(map(len, prompts)) + max_new_tokens, next(model.parameters()).dtype
    cache = KVCache(config, batch_size, length, dtype, device)
    # per slot of the batch: index of its prompt (None: free), new ids, their log-probabilities, its random numbers
    owner, ids, logprobs = [None] * batch_size, [[]] * batch_size, [[]] * batch_size
    noise = torch.zeros(batch_size, max_new_tokens, dtype=torch.float64)

    def accept(slots: list[int], logits: Tensor) -> list[int]:
        """Chooses a token for each of `slots` and returns the slots whose rows have ended, with why."""
        u = noise[slots, [len(ids[b]) for b in slots]].to(device)
        tokens, scores = (x.tolist() for x in choose(logits, u, temperature, top_p))
        ended = []
        for b, token, score in zip(slots, tokens, scores):
            if not math.isfinite(score):
                raise FloatingPointError(f"row {keys[owner[b]]}: the model's logits are not finite; look at its weights")
            if token in eos:
                ended.append((b, "eos"))
                continue
            ids[b].append(token)
            logprobs[b].append(score)
            if stop and stop(ids[b]):
                ended.append((b, "eos"))
            elif len(ids[b]) == max_new_tokens:
                ended.append((b, "length"))
        return ended

    while True:
        ended, new = [], [b for b in range(len(owner)) if owner[b] is None][: len(waiting)]
        for b in new:
            owner[b], ids[b], logprobs[b] = waiting.pop(), [], []
            noise[b] = uniforms(seed, str(keys[owner[b]]), max_new_tokens)
        if new:
            logits, before = prefill(model, cache, new, [prompts[owner[b]] for b in new], [scored[owner[b]] for b in new])
            for b, scores in zip(new, before):
                logprobs[b] += scores
            ended = accept(new, logits) if max_new_tokens else [(b, "length") for b in new]
        else:
            active = [b for b in range(len(owner)) if owner[b] is not None]
            if not active:
                return
            if len(active) <= len(owner) // 2:  # the end is near: a smaller batch is faster
                cache.keys, cache.values = cache.keys[:, active], cache.values[:, active]
                owner, ids, logprobs = ([x[b] for b in active] for x in (owner, ids, logprobs))
                noise, active = noise[active], list(range(len(active)))
            # a free slot reads token 0 at position 0, and nobody looks
            at = [len(prompts[i]) + len(ids[b]) - 1 if i is not None else 0 for b, i in enumerate(owner)]
            tokens = torch.tensor([[ids[b][-1] if owner[b] is not None else 0] for b in range(len(owner))], device=device)
            logits = model(tokens, cache=cache.first(max(at) + 1), positions=torch.tensor(at, device=device)[:, None])
            ended = accept(active, logits[active, 0])
        for b, why in ended:
            yield owner[b], ids[b], logprobs[b], why
            owner[b] = None


def prefill(model, cache: KVCache, slots: list[int], prompts: list[list[int]], scored: list[int]):
    """Runs `prompts` into `slots` of the cache -> logits [n, V] after each, log-probabilities of its last `scored` tokens."""
    device, T = cache.keys.device, max(map(len, prompts))
    tokens = torch.tensor([p + [0] * (T - len(p)) for p in prompts], device=device)
    own = KVCache(model.config, len(prompts), T, cache.keys.dtype, device)
    places = [i * T + len(p) - 1 - back for i, p in enumerate(prompts) for back in range(scored[i], -1, -1)]
    positions = torch.arange(T, device=device).expand(len(prompts), T)
    logits = model(tokens, torch.tensor(places, device=device), own, positions)
    cache.keys[:, slots, :, :T], cache.values[:, slots, :, :T] = own.keys, own.values
    parts = logits.split([n + 1 for n in scored])
    before = [
        part[:-1].float().log_softmax(-1).gather(-1, torch.tensor(p[-n:], device=device)[:, None])[:, 0].tolist() if n else []
        for part, p, n in zip(parts, prompts, scored)
    ]
    return torch.stack([part[-1] for part in parts]), before


def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int = 256, temperature: float = 0.0,
             top_p: float = 1.0, eos_ids: Iterable[int] = (), seed: int = 0, batch_size: int = 32) -> list[list[int]]:  # fmt: skip
    """New ids of each prompt, in the order of the prompts, EOS not included. temperature 0 is argmax."""
    out = sorted(sample(model, prompts, max_new_tokens, temperature, top_p, eos_ids, seed, batch_size))
    return [ids for _, ids, _, _ in out]


def judge(text: str, given: list[str]) -> str:
    """Status of a rationale; `given` are the texts it follows (source, reference, or prompt and response).

    empty: no visible character. repetitive: of 20 or more words (between spaces), over half of the word 4-grams are repeats. copy: over 80 %
    of the word 3-grams (of the words, if fewer than 3) stand in one of `given`. wrong_script: over 20 % of the letters are of
    a script that is neither Latin nor used in `given`. The thresholds are ours; they are not yet measured.
    """

    def grams(t: str, n: int) -> list[tuple[str, ...]]:
        words = t.casefold().split()
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    def scripts(t: str) -> list[str]:
        return [unicodedata.name(c, "?").split()[0] for c in t if c.isalpha()]

    words = text.split()
    if not words:
        return "empty"
    fours = grams(text, 4)
    if len(words) >= 20 and len(set(fours)) < len(fours) / 2:
        return "repetitive"
    n = min(3, len(words))
    for other in given:
        known = set(grams(other, n))
        if sum(g in known for g in grams(text, n)) > 0.8 * len(grams(text, n)):
            return "copy"
    known, letters = {"LATIN", *scripts(" ".join(given))}, scripts(text)
    return "wrong_script" if sum(s not in known for s in letters) > 0.2 * len(letters) else "ok"


def read_finished(path: Path) -> dict[int | str, bytes]:
    """Finished rows by id, as the bytes they are. A last line that a kill has torn is left out."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        return {json.loads(line)["id"]: line for line in lines}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not written by this script; choose another --out") from None


def prepare(path: Path, meta: dict, rows: list[dict], files: list[Path]) -> None:
    """Rank 0, before a row is written: refuses a ledger of other settings or data, and cuts torn lines off."""
    file = data.meta_path(path)
    if path.exists() and not file.exists():
        raise ValueError(f"{path}: exists and has no {file.name}, so it can't be gone on with; choose another --out")
    old = data.read_meta(path) or meta
    for name in meta:
        if name not in ("versions", "model") and old.get(name) != meta[name]:
            was, now = json.dumps(old.get(name)), json.dumps(meta[name])
            raise ValueError(f"{file}: {name} was {was}, this command has {now}; give the old value or another --out")
    by_id = {row["id"]: row for row in rows}
    for part in files:
        for id, line in read_finished(part).items():
            done, row = json.loads(line), by_id.get(id, {})
            done["reference"] = done.get("original", done.get("reference"))
            for name in ("source", "reference"):
                if name in row and done[name] not in (None, row[name]):
                    raise ValueError(f"{row['where']}: row {id} of {path} has another {name}; choose another --out")
        whole = part.read_bytes().rfind(b"\n") + 1 if part.exists() else None
        if whole is not None and whole < part.stat().st_size:
            os.truncate(part, whole)
    if not file.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".tmp").write_text(json.dumps(meta, ensure_ascii=False) + "\n", "utf-8")
        file.with_suffix(".tmp").replace(file)


def complete(path: Path, meta: dict, rows: list[dict], produce: Callable[[list[dict]], Iterator[dict]]) -> None:
    """Brings the ledger `path` to hold one line a row of `rows`, in their order. Every rank calls it.

    `produce` yields finished rows in any order. The ledger only grows, and is at all times the beginning of what it will be:
    rows that overtake others wait in memory. Several ranks fill a file each, which rank 0 appends in order at the end.
    """
    rank, world_size, ids = dist.get_rank(), dist.get_world_size(), [row["id"] for row in rows]
    for id, n in Counter(ids).items():
        if n > 1:
            row = [row for row in rows if row["id"] == id][1]
            raise ValueError(f"{row['where']}: id {json.dumps(id)} stands twice in the data; ids must differ")
    parts = sorted(path.parent.glob(path.name + ".rank*"))
    if rank == 0:
        prepare(path, meta, rows, [path, *parts])
    dist.barrier()
    done, ready = read_finished(path), {}
    for part in parts:
        ready |= read_finished(part)

    def append(file: Path, order: list, produced: Iterator[dict]) -> None:
        waiting = deque(id for id in order if id not in done)
        with open(file, "ab") as f:
            for row in produced:
                ready[row["id"]] = json.dumps(row, ensure_ascii=False).encode()
                while waiting and waiting[0] in ready:
                    f.write(ready.pop(waiting.popleft()) + b"\n")
                f.flush()
            f.writelines(ready[id] + b"\n" for id in waiting)

    todo = [row for row in rows if row["id"] not in done and row["id"] not in ready]
    dist.barrier()  # until all have read what is finished
    if world_size > 1:
        mine, own = todo[rank::world_size], path.with_name(f"{path.name}.rank{rank}")
        append(own, [row["id"] for row in mine], produce(mine))
        dist.barrier()
        todo = []
    if rank == 0:
        parts = sorted(path.parent.glob(path.name + ".rank*"))
        for part in parts:
            ready |= read_finished(part)
        append(path, ids, produce(todo) if todo else ())
        for part in parts:
            part.unlink()
    dist.barrier()


def request(row: dict, task: str, encoder: Encoder, cue: str) -> tuple[list[int], list[int], list[int]]:
    """-> ids of the prompt, of the forced reference, and of the cue, which the model reads in this order."""
    if task == "rationale":
        reference = encoder.tokenizer.answer(row["reference"])
        return encoder.prompt(row), reference, encoder.tokenizer.continuation(row["reference"], reference, cue) if cue else []
    if task == "paraphrase":
        *before, last = encoder.messages(row)
        content = PARAPHRASE.format(instruction=last["content"], reference=row["reference"])
        row = row | {"messages": [*before, {"role": "user", "content": content}]}
    return encoder.prompt(row), [], []


def outcome(row: dict, task: str, tokenizer: Tokenizer, forced: list[int], cue: list[int], ids: list[int], finish: str) -> dict:
    """The ledger's row: the pair as it came, and what the model made of it."""
    pair = {name: row[name] for name in ("id", "source", "reference", "source_lang", "target_lang") if name in row}
    if task == "rationale":
        text = tokenizer.decode_after(forced, cue + ids)
        given = [row["source"]] if "source" in row else [m["content"] for m in row["messages"]]
        status = judge(tokenizer.decode_after(forced + cue, ids), [*given, row["reference"]])
        new = dict(rationale=text, reference_ids=forced, rationale_ids=cue + ids, finish=finish, status=status)
    else:
        answer, original = tokenizer.decode(ids), row["reference"]
        if task == "translation":  # one line is the translation; a rationale that follows is not wanted here
            answer = answer.strip().split("\n")[0]
            ids = ids if tokenizer.decode(ids) == answer else tokenizer.answer(answer)
        why = "empty" if not answer.strip() else "cut" if finish == "length" else ""
        why = "leak" if task == "paraphrase" and any(p in answer.casefold() for p in LEAKS) else why
        if why and task != "answer":
            pair["fallback"] = why  # to the original
            answer, ids, finish = original, tokenizer.answer(original), "eos"
        pair |= {"reference": answer} | ({"original": original} if original else {})
        status = "empty" if task == "answer" and not answer.strip() else "ok"
        new = dict(rationale="", reference_ids=ids, rationale_ids=[], finish=finish, status=status)
    if "messages" in row:
        chat, answer = row["messages"], pair.pop("reference")
        single = len(chat) == 1
        pair |= {"prompt": chat[0]["content"], "response": answer} if single else {
            "messages": [*chat, {"role": "assistant", "content": answer}]}  # fmt: skip
    return pair | new


def write_rows(args: argparse.Namespace, model: Transformer, encoder: Encoder, rows: list[dict]) -> Iterator[dict]:
    """Samples `rows` and yields their ledger rows as they end."""
    tokenizer, start, count = encoder.tokenizer, time.time(), 0
    asked = [request(row, args.task, encoder, args.cue) for row in rows]
    samples = sample(
        model, [sum(parts, []) for parts in asked], args.max_new_tokens, args.temperature, args.top_p, tokenizer.eos_ids,
        args.seed, args.batch_size, keys=[row["id"] for row in rows], scored=[len(cue) for _, _, cue in asked],
        stop=tokenizer.first_line_ends if args.task == "translation" else None,
    )  # fmt: skip
    with tqdm(total=len(rows), unit="row", disable=dist.get_rank() > 0) as bar:
        for i, ids, logprobs, finish in samples:
            row = outcome(rows[i], args.task, tokenizer, *asked[i][1:], ids, finish)
            # rounded: the last digits hang on the batch that the row was computed in
            yield row | {"logprob": round(sum(logprobs) / len(logprobs), 4) if logprobs else None}
            count += len(ids)
            bar.update()
            bar.set_postfix_str(f"{count / (time.time() - start):,.0f} tokens/s")


def main(args: argparse.Namespace) -> None:
    # 1. the data, before any weight is read
    rank, _, device = start_processes()
    tokenizer, context = Tokenizer(args.model, args.chat), ModelConfig.from_file(Path(args.model) / "config.json")
    encoder = Encoder(tokenizer, data.read_template(args.template), args.system)
    args.cue = data.unescape(args.cue)
    rows = read_rows(args.data, args.direction, prompts=args.task == "answer")[: args.limit]
    if args.cue and args.task != "rationale":
        raise ValueError("--cue follows a forced reference; it goes with --task rationale alone")
    if args.task == "translation" and any("source" not in row for row in rows):
        raise ValueError(f"{args.data[0]}: --task translation needs pairs with a source; use --task answer")
    for row in rows:
        length = sum(map(len, request(row, args.task, encoder, args.cue))) + args.max_new_tokens
        if length > context.max_position_embeddings:
            raise ValueError(f"{row['where']}: {length} tokens with --max-new-tokens do not fit the context of "
                             f"{context.max_position_embeddings}; lower it, or take the row out")  # fmt: skip
    # 2. the settings that a row depends on, and the model
    meta = dict(
        task=args.task, model=str(args.model), model_hash=model_hash(args.model), tokenizer_hash=tokenizer.hash,
        chat=tokenizer.chat_name, system=args.system, template=encoder.template or data.TEMPLATE, cue=args.cue,
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
        dtype=args.dtype, versions={"torch": torch.__version__, "sentencepiece": sentencepiece.__version__},
    )  # fmt: skip
    model = Transformer.from_pretrained(args.model, getattr(torch, args.dtype), device)
    # 3. the rows
    complete(Path(args.out), meta, rows, lambda todo: write_rows(args, model, encoder, todo))
    if rank == 0:
        print(f"{args.out}: {len(rows)} rows")


def model_hash(folder: str | Path) -> str:
    """sha256 over config and weights, so that two models of one name are told apart."""
    digest = hashlib.sha256()
    for file in [Path(folder) / "config.json", *sorted(Path(folder).glob("*.safetensors"))]:
        if not file.exists():
            raise ValueError(f"{file}: no such file; a model folder needs a config.json")
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


def parser() -> argparse.ArgumentParser:
    number = data.number
    p = data.Arguments(description="Lets a model write rationales (or translations, paraphrases, answers) for pairs.")
    p.add_argument("--model", required=True, help="model folder")
    p.add_argument("--data", required=True, nargs="+", help="pairs; for --task answer prompts")
    p.add_argument("--out", required=True, help="ledger to write or to finish, JSONL")
    p.add_argument("--task", default="rationale", choices=("rationale", "translation", "paraphrase", "answer"))
    data.common_arguments(p)
    p.add_argument("--cue", default="", help="text forced between reference and rationale, such as '\\n' (default: none)")
    p.add_argument("--max-new-tokens", type=number(1, kind=int), default=256, help="tokens of a row (default 256)")
    p.add_argument("--temperature", type=number(0), default=1.0, help="0 is greedy (default 1: the model's own distribution)")
    p.add_argument("--top-p", type=number(1e-6, 1), default=1.0, help="nucleus, a share of the mass (default 1: all)")
    p.add_argument("--seed", type=number(0, kind=int), default=0, help="with the row's id, all its randomness (default 0)")
    p.add_argument("--batch-size", type=number(1, kind=int), default=64, help="rows at a time (default 64)")
    p.add_argument("--limit", type=number(1, kind=int), metavar="N", help="the first N rows only")
    p.add_argument("--dtype", default=data.default_dtype(), choices=("float32", "bfloat16"), help="default %(default)s here")
    return p


if __name__ == "__main__":
    data.cli(main, parser())
