"""Rationale generation: the model goes on where the reference ends (RaDis, step 1), and what it says is kept.

    python generate.py --model DIR --data train.de-en.json --direction de-en --out rationales.jsonl --cue '\\n'
    python generate.py --report rationales.jsonl

The sampler keeps a batch full: rows that end are replaced by the next prompts, each row at its own position of a shared
key/value cache. A row's random numbers hang on (seed, id) alone, so batch size, order, ranks and restarts change only
the rounding of sums. The ledger grows in the order of the data; the same command finishes what is missing.
"""

import argparse
import glob
import hashlib
import json
import math
import os
import random
import re
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

import data
from data import Encoder, Tokenizer, number
from model import KVCache, ModelConfig, Transformer, start_processes

# SDFT (Yang et al. 2024) in our own words: the reference as a guide, and phrases that give it away
GUIDE = "{instruction}\n\nBelow is a reference answer. Write your own answer to the request, guided by it.\n{reference}"
LEAKS = ("reference answer", "your response", "my response", "now it's your turn")

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")  # of CJK a character, else \w+
BLOCK = 256  # of the vocabulary, as sampling walks it
READ = 2**15 if torch.cuda.is_available() else 2**10  # tokens of prompts that are read at a time, at most


@dataclass
class Row:
    """A row in flight: what it reads, its random numbers, and what it has become so far."""

    index: int
    prompt: list[int]
    scored: int  # tokens at the end of the prompt whose log-probabilities count
    noise: list[float]
    ids: list[int]
    logprobs: list[float]


def choose(logits: Tensor, u: Tensor, temperature: float, top_p: float, limit: int | None = None):
    """logits [N, V], uniform numbers u [N] in [0, 1) -> tokens [N], their log-probabilities [N] (temperature 1, uncut).

    limit: only ids below it are chosen, where the tokenizer knows fewer than the padded vocabulary of the model.

    Inverse of the cumulative distribution, so that one number a token decides. top_p keeps the smallest set of most
    probable tokens whose mass reaches it (nucleus, Holtzman et al. 2020), and those tied with the last of them.
    """
    logits = logits.float()
    allowed = logits[:, :limit]
    if temperature == 0:
        tokens = allowed.argmax(-1)
    else:
        probs = ((allowed - allowed.amax(-1, keepdim=True)) / temperature).softmax(-1)
        if top_p < 1:
            # all tokens below this share together have less than what a nucleus leaves out: none of them is in it.
            # A GPU sorts them all sooner than it would wait for their number
            most = probs.shape[-1]
            count = most if probs.is_cuda else (probs >= (1 - top_p) / most).sum(-1).max().clamp_min(1)
            head = probs.topk(count).values
            last = (head.cumsum(-1) - head >= top_p).logical_not().sum(-1, keepdim=True) - 1  # its least probable token
            probs = probs.masked_fill(probs < head.gather(-1, last), 0)
        # first a block of the vocabulary, then a token in it: no cumulative sum over the whole
        blocks = F.pad(probs, (0, -probs.shape[-1] % BLOCK)).view(len(probs), -1, BLOCK)
        block, u = draw(blocks.sum(-1), u)
        tokens = block * BLOCK + draw(blocks[torch.arange(len(blocks), device=block.device), block], u)[0]
    return tokens, logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def draw(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """weights [N, K], u [N] in [0, 1] -> the index [N] where the share u of their sum is passed, what is left of u."""
    mass = weights.double().cumsum(-1)
    total = mass[:, -1:]
    wanted = (u[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))  # or rounding goes past the last
    index = torch.searchsorted(mass, wanted, right=True).clamp_max(mass.shape[-1] - 1)
    left = 1 - (mass.gather(-1, index) - wanted) / weights.gather(-1, index)
    return index[:, 0], left[:, 0].clamp(0, 1)


def uniforms(seed: int, key: int | str, count: int) -> list[float]:
    """The random numbers of the row `key`."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    return torch.rand(count, dtype=torch.float64, generator=generator).tolist()


@torch.inference_mode()
def sample(model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0,
           top_p: float = 1.0, eos_ids: Iterable[int] = (), seed: int = 0, batch_size: int = 32,
           keys: list | None = None, scored: list[int] | None = None, stop: Callable[[list[int]], bool] | None = None,
           limit: int | None = None, spent: Counter | None = None,
           ) -> Iterator[tuple[int, list[int], list[float], str]]:  # fmt: skip
    """Yields (index of the prompt, new ids without EOS, log-probabilities, "eos" or "length") as rows end.

    keys: names of the rows for their random numbers (default: the index). scored: how many tokens at the end of each
    prompt have their log-probability put before those of the new ids. stop(ids) ends a row as EOS would. limit: no id
    from there on is chosen. spent: counts seconds and tokens of "prefill" and of "decode".
    ValueError where a prompt is empty or does not leave `max_new_tokens` of the model's context.
    """
    config, weight, eos = model.config, next(model.parameters()), set(eos_ids)
    spent = Counter() if spent is None else spent
    keys, scored, room = keys or range(len(prompts)), scored or [0] * len(prompts), config.max_position_embeddings
    counts = f"batch_size {batch_size}, max_new_tokens {max_new_tokens}"
    data.check(min(batch_size, max_new_tokens) > 0, counts, "wanted at least 1")
    for key, prompt in zip(keys, prompts):
        fault = f"{len(prompt)} tokens and {max_new_tokens} new ones do not fit the model's context of {room}"
        data.check(0 < len(prompt) <= room - max_new_tokens, f"row {key}", f"{fault}; lower --max-new-tokens")
        fault = f"token id outside the model's vocabulary of {config.vocab_size}"
        data.check(0 <= min(prompt) <= max(prompt) < config.vocab_size, f"row {key}", fault)
    # prompts of like length are read together; only near each other, so that rows end about in their order
    waiting = deque(sorted(range(len(prompts)), key=lambda i: (i // (4 * batch_size), len(prompts[i]))))
    batch_size, length = min(batch_size, len(prompts)), max(map(len, prompts), default=0) + max_new_tokens
    cache, rows = KVCache(config, batch_size, length, weight.dtype, weight.device), []  # row b in slot b of the cache
    # what all prompts begin with (the system prompt, the instruction) is read once, for every slot
    shared = min([len(os.path.commonprefix(prompts)), *(len(p) - n - 1 for p, n in zip(prompts, scored))])
    if shared > 0:
        prefill(model, cache.part(slice(1), shared), [Row(0, prompts[0][:shared], 0, [], [], [])], 0)
        for x in (cache.keys, cache.values):
            x[:, 1:, :, :shared] = x[:, :1, :, :shared]
    pick = partial(choose, temperature=temperature, top_p=top_p, limit=limit)
    step = Step(model, cache, pick)
    while waiting or rows:
        start, first, room = time.perf_counter(), 0, min(len(waiting), batch_size - len(rows))
        if room and room >= min(len(waiting), -(-batch_size // 8)):  # slots wait for others: several are read faster
            longest = max(len(prompts[waiting[i]]) for i in range(room))
            first, new = len(rows), [waiting.popleft() for _ in range(min(room, max(1, READ // longest)))]
            rows += [Row(i, prompts[i], scored[i], uniforms(seed, keys[i], max_new_tokens), [], []) for i in new]
            logits = prefill(model, cache.part(slice(first, len(rows)), length), rows[first:], shared)
            stage, count = "prefill", sum(len(prompts[i]) - shared for i in new)
            u = torch.tensor([row.noise[0] for row in rows[first:]], dtype=torch.float64, device=weight.device)
            tokens, logprobs = (x.tolist() for x in pick(logits, u))
        else:
            tokens, logprobs = step(rows)
            stage, count = "decode", len(rows)
        spent.update({f"{stage} seconds": time.perf_counter() - start, f"{stage} tokens": count})
        for b in reversed(range(first, len(rows))):
            row, token, logprob = rows[b], tokens[b - first], logprobs[b - first]
            if not math.isfinite(logprob):
                raise FloatingPointError(f"row {keys[row.index]}: logits are not finite; look at the model's weights")
            if token not in eos:
                row.ids.append(token)
                row.logprobs.append(logprob)
            ended = token in eos or (stop is not None and stop(row.ids))
            if ended or len(row.ids) == max_new_tokens:
                yield row.index, row.ids, row.logprobs, "eos" if ended else "length"
                rows[b] = rows[-1]  # the last row takes its place
                rows.pop()
                cache.keys[:, b], cache.values[:, b] = cache.keys[:, len(rows)], cache.values[:, len(rows)]


class Step:
    """Decoding: one token of each row is read, the next is chosen.

    On a GPU a step is one CUDA graph, replayed: Python alone would take longer to launch its kernels than they run.
    Rows and slots are rounded up, so that a few graphs serve: to a power of four, to a multiple of 64. Rows that are
    not there write where nothing is read before it is overwritten.
    """

    def __init__(self, model: Transformer, cache: KVCache, choose: Callable):
        self.model, self.cache, self.choose, self.graphs = model, cache, choose, {}
        self.pool = torch.cuda.graph_pool_handle() if cache.keys.is_cuda else None

    def __call__(self, rows: list[Row]) -> tuple[list[int], list[float]]:
        """-> a token and its log-probability for each row."""
        found = [(row.ids[-1], len(row.prompt) + len(row.ids) - 1, row.noise[len(row.ids)]) for row in rows]
        size, length, device = len(rows), max(at for _, at, _ in found) + 1, self.cache.keys.device
        if device.type == "cuda":
            _, slots, _, most, _ = self.cache.keys.shape
            size, length = min(4 ** -(-(size - 1).bit_length() // 2), slots), min(-(-length // 64) * 64, most)
        found += [(0, length - 1, 0)] * (size - len(rows))
        inputs = torch.tensor(found, dtype=torch.float64, device=device)  # [B, 3]: float64 holds all ids
        if device.type == "cuda":
            if (size, length) not in self.graphs:
                work = partial(self.compute, length=length)
                self.graphs[size, length] = torch.cuda.make_graphed_callables(work, (inputs,), 1, pool=self.pool)
            outputs = self.graphs[size, length](inputs)
        else:
            outputs = self.compute(inputs, length)
        tokens, logprobs = outputs[:, : len(rows)].tolist()
        return [int(token) for token in tokens], logprobs

    def compute(self, inputs: Tensor, length: int) -> Tensor:
        """inputs [B, 3] of id, position, uniform number -> [2, B] of id, log-probability."""
        tokens, positions = inputs[:, :2].long().split(1, dim=1)  # [B, 1] each
        logits = self.model(tokens, cache=self.cache.part(slice(len(inputs)), length), positions=positions)[:, 0]
        return torch.stack([x.double() for x in self.choose(logits, inputs[:, 2])])


def prefill(model: Transformer, cache: KVCache, rows: list[Row], start: int) -> Tensor:
    """Reads prompts from `start` on into the cache -> logits [N, V] after each. Scores their last tokens."""
    device, lengths = cache.keys.device, [len(row.prompt) - start for row in rows]
    T = max(lengths)
    tokens = torch.tensor([row.prompt[start:] + [0] * (T - n) for row, n in zip(rows, lengths)], device=device)
    places = [b * T + n - 1 - back for b, n in enumerate(lengths) for back in range(rows[b].scored, -1, -1)]
    places, positions = torch.tensor(places, device=device), torch.arange(start, start + T, device=device)
    logits = model(tokens, places, cache.part(slice(len(rows)), start + T), positions.expand(len(rows), T))
    following = tokens.flatten().roll(-1)[places, None]  # after a prompt comes nothing: that score is dropped
    scores, counts = logits.float().log_softmax(-1).gather(-1, following)[:, 0], [row.scored + 1 for row in rows]
    for row, own in zip(rows, scores.split(counts)):
        row.logprobs += own[:-1].tolist()
    return torch.stack([own[-1] for own in logits.split(counts)])


@torch.inference_mode()
def matrix_seconds(model: Transformer, rows: int) -> float:
    """Seconds that the products of the weight matrices with `rows` vectors take by themselves."""
    tied, named = model.config.tie_word_embeddings, model.named_parameters()
    weights = [p for name, p in named if p.dim() == 2 and (tied or "embed_tokens" not in name)]
    x = {size: torch.ones(rows, size, dtype=p.dtype, device=p.device) for p in weights for size in p.shape[1:]}
    names = dict(weights=weights, x=x, linear=F.linear)
    timer = Timer("for w in weights: linear(x[w.shape[1]], w)", globals=names, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median


def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int = 256, temperature: float = 0.0,
             top_p: float = 1.0, eos_ids: Iterable[int] = (), seed: int = 0, batch_size: int = 32,
             ) -> list[list[int]]:  # fmt: skip
    """New ids of each prompt, in the order of the prompts, EOS not included; see `sample`."""
    rows = sample(model, prompts, max_new_tokens, temperature, top_p, eos_ids, seed, batch_size)
    return [ids for _, ids, _, _ in sorted(rows)]


def judge(text: str, given: list[str]) -> str:
    """Status of a rationale; `given` are the texts it follows (source, reference, or prompt and response).

    empty: no visible character. repetitive: 20 or more words, over half of the word 4-grams repeats. copy: over 80 % of
    the word 3-grams (of the words, if fewer than 3) stand in one of `given`. wrong_script: over 20 % of the letters of
    a script neither Latin nor used in `given`.

    The thresholds are ours and stand in gaps. Of 1,024 sampled rationales of a 135M model none repeats over 26 %, of 64
    greedy ones two do so over 41 % (58 and 92 %); loops repeat 67 % and more. References copied bare, quoted, labelled
    score 80 % and more, and so do two of the 1,024 (90 %), the others up to 79 %. The three rows of a wrong script have
    24 % and more of such letters, the others up to 19 %.
    """

    def grams(text: str, n: int) -> list[tuple[str, ...]]:
        words = WORD.findall(text.casefold())
        return list(zip(*(words[i:] for i in range(n))))

    def scripts(text: str) -> list[str]:
        return [unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()]

    length, fours = len(grams(text, 1)), grams(text, 4)
    if not text.strip():
        return "empty"
    if length >= 20 and len(set(fours)) < len(fours) / 2:
        return "repetitive"
    n = min(3, length)
    for known in (set(grams(other, n)) for other in given):
        if sum(gram in known for gram in grams(text, n)) > 0.8 * (length - n + 1):
            return "copy"
    known, letters = {"LATIN", *scripts(" ".join(given))}, scripts(text)
    return "wrong_script" if sum(script not in known for script in letters) > 0.2 * len(letters) else "ok"


def check_settings(path: Path, meta: dict) -> None:
    """ValueError where the ledger `path` was written under other settings than `meta`."""
    file = data.meta_path(path)
    if path.exists() and not file.exists():
        raise ValueError(f"{path}: exists and has no {file.name}, so it can't be gone on with; choose another --out")
    old = data.read_meta(path) or meta
    for name in meta:
        if name not in ("versions", "model") and old.get(name) != meta[name]:
            was, now = json.dumps(old.get(name)), json.dumps(meta[name])
            raise ValueError(f"{file}: {name} was {was}, this command has {now}; give the old value or another --out")


def read_finished(files: list[Path], by_id: dict[int | str, dict]) -> dict[int | str, bytes]:
    """Finished rows by id, as the bytes they are; ValueError where a row answers another row than the data's."""
    finished = {}
    for file in files:
        for line in mend(file.read_bytes()).split(b"\n")[:-1]:
            try:
                old = json.loads(line)
                finished[old["id"]] = line
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file}: not written by this script; choose another --out") from None
            row = by_id.get(old["id"], {})
            was = {name: old.get(name) for name in ("source", "source_lang", "target_lang", "prompt")}
            *was["messages"], answer = old.get("messages") or [{"content": old.get("response")}]
            was["reference"] = old.get("original", old.get("reference", answer["content"]))
            now = row | ({"prompt": row["messages"][-1]["content"]} if "messages" in row else {})
            for name, value in was.items():
                if value and now.get(name) is not None and value != now[name]:
                    raise ValueError(f"{row['where']}: another {name} than row {row['id']} of {file}; change --out")
    return finished


def mend(content: bytes) -> bytes:
    """A ledger's bytes without a last line that a kill has torn; one that is whole gets its line break."""
    tail = content[content.rfind(b"\n") + 1 :]
    try:
        json.loads(tail)
    except ValueError:
        return content[: len(content) - len(tail)]
    return content + b"\n"


def parts(path: Path) -> list[Path]:
    """What several ranks have written towards the ledger `path`."""
    return sorted(path.parent.glob(glob.escape(path.name) + ".rank*"))


def append(file: Path, order: list[int | str], ready: dict[int | str, bytes], produced: Iterator[dict]) -> None:
    """Appends the rows named in `order`, each as soon as it is there; rows that overtake others wait in `ready`."""
    with open(file, "ab") as f:
        content = file.read_bytes()
        whole = mend(content)
        f.truncate(min(len(whole), len(content)))
        f.write(whole[len(content) :])
        for id in order:
            while id not in ready:
                row = next(produced)
                ready[row["id"]] = json.dumps(row, ensure_ascii=False).encode()
            f.write(ready.pop(id) + b"\n")
            f.flush()
    next(produced, None)  # there is none left: its progress bar ends


def complete(path: Path, meta: dict, rows: list[dict], produce: Callable[[list[dict]], Iterator[dict]]) -> None:
    """Brings the ledger `path` to hold one line a row of `rows`, in their order. Every rank calls it.

    `produce` yields finished rows in any order. The ledger only grows, and is at all times the beginning of what it
    will be. Several ranks fill a file each, which rank 0 appends in order at the end.
    """
    rank, world_size, file, by_id = dist.get_rank(), dist.get_world_size(), data.meta_path(path), {}
    for row in rows:
        fault = f"id {json.dumps(row['id'])} stands twice in the data; ids must differ"
        data.check(by_id.setdefault(row["id"], row) is row, row["where"], fault)
    check_settings(path, meta)
    done = read_finished([path] if path.exists() else [], by_id)
    ready = read_finished(parts(path), by_id)
    missing = [id for id in by_id if id not in done]
    todo = [by_id[id] for id in missing if id not in ready]
    if rank == 0 and not file.exists():
        data.write_text(file, json.dumps(meta, ensure_ascii=False))
    dist.barrier()  # until all have read what is finished
    if world_size > 1:
        mine = todo[rank::world_size]
        append(path.with_name(f"{path.name}.rank{rank}"), [row["id"] for row in mine], ready, produce(mine))
        dist.barrier()  # until all have written their part
        todo = []
    if rank == 0:
        append(path, missing, ready | read_finished(parts(path), by_id), produce(todo) if todo else iter(()))
        for part in parts(path):
            part.unlink()
    dist.barrier()


def request(row: dict, task: str, encoder: Encoder, cue: str) -> tuple[list[int], list[int], list[int]]:
    """-> ids of the prompt, of the forced reference, and of the cue, which the model reads in this order."""
    tokenizer, text = encoder.tokenizer, row["reference"]
    if task == "rationale":
        reference = tokenizer.answer(text)
        return encoder.prompt(row), reference, tokenizer.continuation(text, reference, cue)
    if task == "paraphrase":
        *before, last = encoder.messages(row)
        guided = GUIDE.format(instruction=last["content"], reference=text)
        row = row | {"messages": [*before, {"role": "user", "content": guided}]}
    return encoder.prompt(row), [], []


def outcome(row: dict, task: str, tokenizer: Tokenizer, ids: list[int], finish: str) -> dict:
    """The ledger's row: the pair as it came, and what the model made of it."""
    pair = {name: row[name] for name in ("id", "source", "reference", "source_lang", "target_lang") if name in row}
    (_, forced, cue), original, status = row["request"], row["reference"], "ok"
    text = tokenizer.decode_after(forced, cue + ids)
    if task == "rationale":
        given = [row["source"]] if "source" in row else [m["content"] for m in row["messages"]]
        status = judge(tokenizer.decode_after(forced + cue, ids), [*given, original])
        new = dict(rationale=text, reference_ids=forced, rationale_ids=cue + ids)
    else:
        if task == "translation":  # one line is the translation; a rationale that follows is not wanted here
            text = text.strip().split("\n")[0]
            ids = ids if tokenizer.decode(ids) == text else tokenizer.answer(text)
        leak = task == "paraphrase" and any(phrase in text.casefold() for phrase in LEAKS)
        fault = "leak" if leak else "empty" if not text.strip() else "cut" if finish == "length" else ""
        if task == "answer":
            status = "empty" if fault == "empty" else "ok"
        elif fault:
            # the model's answer fails: back to the original
            pair["fallback"], text, ids, finish = fault, original, tokenizer.answer(original), "eos"
        pair |= {"reference": text} | ({"original": original} if original else {})
        new = dict(rationale="", reference_ids=ids, rationale_ids=[])
    if "messages" in row:
        chat, answer = row["messages"], pair.pop("reference")
        turn = {"prompt": chat[0]["content"], "response": answer}
        pair |= turn if len(chat) == 1 else {"messages": [*chat, {"role": "assistant", "content": answer}]}
    return pair | new | dict(finish=finish, status=status)


def write_rows(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, rows: list[dict]) -> Iterator[dict]:
    """Samples `rows`, yields their ledger rows as they end, and says how fast that was."""
    settings = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "seed", "batch_size")}
    settings |= dict(keys=[row["id"] for row in rows], scored=[len(row["request"][2]) for row in rows])
    settings |= dict(stop=tokenizer.first_line_ends if args.task == "translation" else None, eos_ids=tokenizer.eos_ids)
    spent, start, new, first = Counter(), time.perf_counter(), 0, dist.get_rank() == 0
    settings |= dict(limit=tokenizer.vocab_size, spent=spent)
    outputs = sample(model, [sum(row["request"], []) for row in rows], **settings)
    for i, ids, logprobs, finish in tqdm(outputs, total=len(rows), unit="row", disable=not first):
        # rounded: the last digits hang on the batch that the row was computed in
        mean = round(sum(logprobs) / len(logprobs), 4) if logprobs else None
        new += len(ids)
        yield outcome(rows[i], args.task, tokenizer, ids, finish) | {"logprob": mean}
    if first and spent["decode tokens"]:
        read, step = (spent[f"{stage} tokens"] / spent[f"{stage} seconds"] for stage in ("prefill", "decode"))
        share = step * matrix_seconds(model, args.batch_size) / args.batch_size
        speed = f"{new / (time.perf_counter() - start):,.0f} new tokens/s; prompts are read at {read:,.0f} tokens/s"
        print(f"{speed}, decoding makes {step:,.0f}, {share:.0%} of what the matrix products alone would allow")


def report(path: str, seed: int, as_json: bool) -> None:
    """Prints what a ledger of any task holds: shares, lengths, how its texts begin, and twelve rows drawn by `seed`."""
    rows, found = data.read_rows([path]), {}
    for row in rows:
        data.check("reference_ids" in row, row["where"], "not a row that generate.py wrote; give a ledger")
    for name in ("status", "finish"):
        counts = Counter(str(row.get(name)) for row in rows).most_common()
        found[name] = {value: round(n / len(rows), 4) for value, n in counts}
    for name in ("reference", "rationale"):
        n = sorted(len(row[f"{name}_ids"]) for row in rows)
        places = dict(median=n[len(n) // 2], p95=n[int(0.95 * (len(n) - 1))])
        found[f"{name} tokens"] = dict(mean=round(sum(n) / len(n), 1), **places)
    scores = [row["logprob"] for row in rows if row.get("logprob") is not None]
    found["log-probability of a token"] = dict(mean=round(sum(scores) / max(len(scores), 1), 4), rows=len(scores))
    written = "rationale" if any(row["rationale_ids"] for row in rows) else "reference"
    openings = Counter(" ".join(WORD.findall(row[written])[:4]) for row in rows).most_common(10)
    found["openings"] = {text: n for text, n in openings if n > 1}
    shown = sorted(random.Random(seed).sample(range(len(rows)), min(12, len(rows))))
    names = ("id", "status", "finish", "logprob", "source", "messages", "reference", "rationale")
    examples = [{name: rows[i][name] for name in names if rows[i].get(name) not in (None, "")} for i in shown]
    if as_json:
        print(json.dumps(dict(ledger=path, rows=len(rows), **found, examples=examples), ensure_ascii=False, indent=2))
        return
    print(f"{path}: {len(rows):,} rows")
    for part in [found, *examples]:
        for name, value in part.items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            print(f"{name:>26}  " + text.strip().replace("\n", "\n" + " " * 28))
        print()


def main(args: argparse.Namespace) -> None:
    if args.report:
        return report(args.report, args.seed, args.json)
    if not (args.model and args.data and args.out):
        raise ValueError("give --model, --data and --out, or --report LEDGER")
    # 1. the data, before any weight is read
    rank, _, device = start_processes()
    tokenizer, config = Tokenizer(args.model, args.chat), ModelConfig.from_file(Path(args.model) / "config.json")
    encoder = Encoder(tokenizer, data.read_template(args.template), args.system)
    rows = data.read_rows(args.data, args.direction, prompts=args.task == "answer")[: args.limit]
    if args.cue and args.task != "rationale":
        raise ValueError("--cue follows a forced reference; it goes with --task rationale alone")
    for row in rows:
        fits = args.task != "translation" or "source" in row
        data.check(fits, row["where"], "--task translation needs pairs with a source; use --task answer")
        row["request"] = request(row, args.task, encoder, args.cue)
        check_length(row, sum(map(len, row["request"])), args.max_new_tokens, config)
    # 2. the settings that a row depends on, and the model
    names = ("task", "model", "system", "cue", "max_new_tokens", "temperature", "top_p", "seed", "dtype")
    meta = {name: getattr(args, name) for name in names}
    meta |= dict(chat=tokenizer.chat_name, template=encoder.template or data.TEMPLATE)
    meta |= dict(model_hash=model_hash(args.model), tokenizer_hash=tokenizer.hash)
    meta |= dict(versions={"torch": torch.__version__, "sentencepiece": sentencepiece.__version__})

    def produce(todo: list[dict]) -> Iterator[dict]:  # the weights are read once it is sure that they are needed
        model = Transformer.from_pretrained(args.model, getattr(torch, args.dtype), device)
        if args.compile:
            model.compile_layers(coordinate_descent_tuning=True)  # products of one row become sums, fused with the rest
        return write_rows(args, model, tokenizer, todo)

    # 3. the rows
    complete(Path(args.out), meta, rows, produce)
    if rank == 0:
        print(f"{args.out}: {len(rows)} rows")


def check_length(row: dict, prompt: int, new: int, config: ModelConfig) -> None:
    """ValueError where a prompt of that many tokens, and the new ones, are more than the model's context."""
    fault = f"{prompt} tokens and {new} new ones do not fit the context of {config.max_position_embeddings}"
    fits = prompt + new <= config.max_position_embeddings
    data.check(fits, row["where"], f"{fault}; lower --max-new-tokens, or take the row out")


def model_hash(folder: str | Path) -> str:
    """sha256 over config and weights, so that two models of one name are told apart."""
    digest = hashlib.sha256()
    for file in [Path(folder) / "config.json", *sorted(Path(folder).glob("*.safetensors"))]:
        data.check(file.exists(), file, "no such file; a model folder needs a config.json")
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


def parser() -> argparse.ArgumentParser:
    p = data.Arguments(description="Lets a model write rationales (or translations, paraphrases, answers) for pairs.")
    p.add_argument("--model", help="model folder")
    p.add_argument("--data", nargs="+", help="pairs; for --task answer prompts")
    p.add_argument("--out", help="ledger to write or to finish, JSONL")
    tasks = ("rationale", "translation", "paraphrase", "answer")
    p.add_argument("--task", default="rationale", choices=tasks, help="what the model writes (default rationale)")
    data.common_arguments(p)
    p.add_argument("--cue", default="", type=data.unescape, help="forced after the reference, such as '\\n' (none)")
    p.add_argument("--max-new-tokens", type=number(1, kind=int), default=256, help="tokens of a row (default 256)")
    p.add_argument("--temperature", type=number(0), default=1.0, help="0 is greedy (default 1: the model as it is)")
    p.add_argument("--top-p", type=number(1e-6, 1), default=1.0, help="nucleus, a share of the mass (default 1: all)")
    p.add_argument("--seed", type=number(0, kind=int), default=0, help="of a row's randomness, with its id (default 0)")
    p.add_argument("--batch-size", type=number(1, kind=int), default=64, help="rows at a time (default 64)")
    p.add_argument("--limit", type=number(1, kind=int), metavar="N", help="the first N rows only")
    p.add_argument("--dtype", default=data.default_dtype(), choices=("float32", "bfloat16"), help="here %(default)s")
    p.add_argument("--compile", action="store_true", help="compile the layers: for long runs on a GPU")
    p.add_argument("--report", metavar="LEDGER", help="reads a ledger, says what is in it, and shows twelve rows")
    p.add_argument("--json", action="store_true", help="the report as JSON")
    return p


if __name__ == "__main__":
    data.cli(main, parser())
