"""Rationale generation (RaDis, step 1): the model goes on where the reference ends.

    python generate.py --model DIR --data train.de-en.json --direction de-en \\
                       --out rationales.jsonl --cue '\\n'

The reference is forced as the beginning of the model's answer, and what the model adds is kept:
its own words, in its own distribution. A row depends on the seed and its id alone, not on the
batch, the number of ranks or how often the run was stopped; run again, it finishes what is missing.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, also while torch is imported

import hashlib
import json
import math
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import sentencepiece
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
from data import Encoder, Tokenizer
from model import KVCache, ModelConfig, Transformer, hash_model, require, start_processes

# SDFT (Yang et al. 2024) in our own words: the reference as a guide, and phrases that betray it
GUIDE = (
    "{instruction}\n\nBelow is a reference answer. "
    "Write your own answer to the request, guided by it.\n{reference}"
)
LEAKS = ("reference answer", "your response", "my response", "now it's your turn")
# a CJK character is a word
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


# 1. The method: what the model reads, and what becomes of a row


def request(row, task, encoder, cue):
    """What the model reads before it goes on: the prompt, the forced reference, the cue."""
    tokenizer = encoder.tokenizer
    prompt = encoder.prompt(row)
    forced = []
    if task == "rationale":
        forced = tokenizer.answer(row["reference"])
    if task == "paraphrase":
        *before, last = encoder.messages(row)
        text = GUIDE.format(instruction=last["content"], reference=row["reference"])
        guided = {"messages": [*before, {"role": "user", "content": text}]}
        prompt = encoder.prompt(row | guided)
    cue_ids = tokenizer.continuation(row["reference"], forced, cue or "")
    return {"ids": prompt + forced + cue_ids, "forced": forced, "cue": cue_ids}


def ledger_row(row, task, tokenizer, sequence):
    """The pair as it came, and what the model made of it."""
    reference = row["reference"]
    if task in ("translation", "paraphrase"):
        new = write_reference(row, task, tokenizer, sequence)
        reference = new.pop("reference")
    else:
        new = write_rationale(row, tokenizer, sequence)
    if "messages" not in row:
        pair = {name: row[name] for name in ("source", "source_lang", "target_lang")}
        return {"id": row["id"]} | pair | {"reference": reference} | new
    chat = row["messages"]
    pair = {"prompt": chat[0]["content"], "response": reference}
    if len(chat) > 1:
        pair = {"messages": [*chat, {"role": "assistant", "content": reference}]}
    return {"id": row["id"]} | pair | new


def write_rationale(row, tokenizer, sequence):
    """What the model said after the reference that was forced."""
    forced = row["forced"]
    ids = row["cue"] + sequence.ids
    given = [m["content"] for m in row["messages"]] if "messages" in row else [row["source"]]
    own = tokenizer.decode_after(forced + row["cue"], sequence.ids)
    return {
        "rationale": tokenizer.decode_after(forced, ids),
        "reference_ids": forced,
        "rationale_ids": ids,
        "finish": sequence.finish,
        "status": status_of(own, [*given, row["reference"]]),
        "logprob": sequence.mean_logprob(),
    }


def write_reference(row, task, tokenizer, sequence):
    """The model's own translation or paraphrase in place of the reference, where it is sound."""
    text = tokenizer.decode(sequence.ids)
    if task == "translation":  # one line is the translation; what follows is not wanted here
        text = text.strip().split("\n")[0]
    fault = "empty"
    if text.strip():
        leak = task == "paraphrase" and any(phrase in text.casefold() for phrase in LEAKS)
        fault = "leak" if leak else "cut" if sequence.finish == "length" else None
    chosen = row["reference"] if fault else text
    same = tokenizer.decode(sequence.ids) == chosen
    return {
        "reference": chosen,
        "original": row["reference"],
        "fallback": fault,  # why the original stands, if it does
        "rationale": "",
        "reference_ids": sequence.ids if same else tokenizer.answer(chosen),
        "rationale_ids": [],
        "finish": "eos",
        "status": "ok",
        "logprob": None if fault else sequence.mean_logprob(),
    }


def status_of(text, given):
    """What is wrong with a text that follows `given`, or "ok".

    empty: nothing visible. repetitive: 20 or more words, and over half of the word 4-grams repeat.
    copy: over 80 % of the word 3-grams stand in one of `given`. wrong_script: over 20 % of the
    letters are of a script neither Latin nor used in `given`. The thresholds are ours; measured
    on rationales of a 135M model, they stand in gaps.
    """
    words = WORD.findall(text.casefold())
    fours = ngrams(words, 4)
    if not text.strip():
        return "empty"
    if len(words) >= 20 and len(set(fours)) < len(fours) / 2:
        return "repetitive"
    n = min(3, len(words))
    for other in given if words else []:
        known = set(ngrams(WORD.findall(other.casefold()), n))
        copied = sum(gram in known for gram in ngrams(words, n))
        if copied > 0.8 * (len(words) - n + 1):
            return "copy"
    usual = {"LATIN", *scripts(" ".join(given))}
    letters = scripts(text)
    foreign = [script for script in letters if script not in usual]
    return "wrong_script" if len(foreign) > 0.2 * len(letters) else "ok"


def ngrams(words, n):
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def scripts(text):
    """The script of each letter, by the first word of its Unicode name."""
    return [unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha()]


# 2. The sampler: a full batch, each row at its own place in the cache


@dataclass
class Sampling:
    """How a model goes on. `stop(ids)`, asked after each token, ends a row as EOS would."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    eos_ids: Collection[int] = ()
    seed: int = 0
    batch_size: int = 32
    vocab_size: int | None = None  # where the model has more rows than the tokenizer has ids
    stop: Callable[[list[int]], bool] | None = None


def sampling(tokenizer, **settings):
    """How a model of this tokenizer goes on."""
    return Sampling(eos_ids=tokenizer.eos_ids, vocab_size=tokenizer.vocab_size, **settings)


@dataclass
class Sequence:
    """A row in flight: what the model reads, and what it has said so far."""

    id: int | str
    prompt: list[int]
    where: str = ""  # FILE:LINE
    ids: list[int] = field(default_factory=list)  # without EOS
    logprobs: list[float] = field(default_factory=list)  # of all that was chosen, EOS included
    finish: str = ""  # "eos" or "length", once it has ended

    def add(self, token, logprob, how):
        if not math.isfinite(logprob):
            fault = "the model's logits are not finite; look at its weights"
            raise FloatingPointError(f"row {self.id}: {fault}")
        self.logprobs.append(logprob)
        if token in how.eos_ids:
            self.finish = "eos"
            return
        self.ids.append(token)
        if how.stop is not None and how.stop(self.ids):
            self.finish = "eos"
        elif len(self.ids) == how.max_new_tokens:
            self.finish = "length"

    def noise_key(self, seed):
        """32 bits, for the next token of this row."""
        digest = hashlib.sha256(json.dumps([seed, self.id, len(self.ids)]).encode()).digest()
        return int.from_bytes(digest[:4], signed=True)

    def mean_logprob(self):
        # rounded: the digits after these depend on the batch that the row was computed in
        return round(sum(self.logprobs) / len(self.logprobs), 3)


@torch.inference_mode()
def sample(model: Transformer, sequences: list[Sequence], how: Sampling) -> Iterator[Sequence]:
    """Goes on from each prompt, and yields the sequences as they end.

    The batch stays full: a sequence that ends leaves its row of the cache to the next one.
    ValueError where a prompt and the new tokens do not fit the model's context.
    """
    counts = (how.max_new_tokens, how.batch_size)
    require(min(counts) > 0, "sampling", f"max_new_tokens and batch_size are {counts}")
    require_room(sequences, how.max_new_tokens, model.config)
    waiting = deque(sorted(sequences, key=lambda sequence: len(sequence.prompt)))
    rows = min(how.batch_size, len(sequences))
    longest = len(waiting[-1].prompt) if waiting else 0
    cache = KVCache.empty(model, rows, longest + how.max_new_tokens)
    graphs = {}
    running = []  # running[b] has row b of the cache
    while waiting or running:
        first = 0
        new = take_next(waiting, rows - len(running), cache)
        if new:
            first = len(running)
            running += new
            prompts = [sequence.prompt for sequence in new]
            logits = read(model, cache, slice(first, len(running)), prompts)
            keys = [sequence.noise_key(how.seed) for sequence in new]
            chosen = as_pairs(choose(logits, torch.tensor(keys, device=model.device), how))
        else:
            chosen = decode(model, cache, running, how, graphs)
        for b in reversed(range(first, len(running))):
            sequence = running[b]
            sequence.add(*chosen[b - first], how)
            if sequence.finish:
                yield sequence
                running[b] = running[-1]  # the last one takes its row
                running.pop()
                cache.move(len(running), b)


def require_room(sequences, new, config):
    """ValueError names a prompt that is empty, or leaves no room for `new` tokens."""
    room = config.max_position_embeddings
    for sequence in sequences:
        n = len(sequence.prompt)
        where = sequence.where or f"row {sequence.id}"
        fault = f"{n} tokens and {new} new ones do not fit the context of {room}"
        require(n + new <= room, where, f"{fault}; lower --max-new-tokens, or take it out")
        known = n > 0 and 0 <= min(sequence.prompt) and max(sequence.prompt) < config.vocab_size
        require(known, where, f"its ids are not of the model's vocabulary, {config.vocab_size}")


def take_next(waiting, free, cache):
    """The next prompts to read; none while few rows are free: several are read faster."""
    rows = cache.keys.shape[1]
    if free < min(len(waiting), math.ceil(rows / 8)):
        return []
    budget = 2**15 if cache.keys.is_cuda else 2**12  # places that are read at a time
    taken = []
    while waiting and len(taken) < free:
        if taken and (len(taken) + 1) * len(waiting[0].prompt) > budget:
            break
        taken.append(waiting.popleft())
    return taken


def read(model, cache, rows, prompts):
    """Reads prompts into these rows of the cache -> logits [N, V] after each."""
    tokens, shared = data.share(prompts, model.device)
    N, T = shared[1].shape
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    places = torch.arange(N * T, device=model.device).view(N, T)
    return model(tokens, places[:, 0] + lengths - 1, cache.view(rows, T), places % T, shared)


def decode(model, cache, running, how, graphs):
    """One token of each row is read -> the next, and its log-probability.

    On a GPU a step is a CUDA graph, replayed: Python alone would take longer to launch its kernels
    than they run. Rows and length are rounded up, so that a few graphs serve; rows that are not
    there write at the last position, which is overwritten before anything reads it.
    """
    inputs = []
    for sequence in running:
        position = len(sequence.prompt) + len(sequence.ids) - 1
        inputs.append((sequence.ids[-1], position, sequence.noise_key(how.seed)))
    length = max(position for _, position, _ in inputs) + 1
    if not cache.keys.is_cuda:
        return as_pairs(decode_step(model, cache, how, length, torch.tensor(inputs)))
    _, rows, _, room, _ = cache.keys.shape
    size = min(4 ** math.ceil(math.log(len(running), 4)), rows)
    length = min(math.ceil(length / 64) * 64, room)
    inputs += [(0, length - 1, 0)] * (size - len(running))
    inputs = torch.tensor(inputs, device=model.device)
    if (size, length) not in graphs:
        step = partial(decode_step, model, cache, how, length)
        pool = graphs.setdefault("pool", torch.cuda.graph_pool_handle())  # memory that all share
        graphs[size, length] = torch.cuda.make_graphed_callables(step, (inputs,), 1, pool=pool)
    return as_pairs(graphs[size, length](inputs))


def decode_step(model, cache, how, length, inputs):
    """inputs [B, 3]: token, position, noise key -> [2, B]: token, log-probability."""
    tokens, positions, keys = inputs.split(1, dim=1)  # [B, 1] each
    part = cache.view(slice(len(inputs)), length)
    logits = model(tokens, cache=part, positions=positions)[:, 0]  # [B, V]
    return choose(logits, keys[:, 0], how)


def as_pairs(chosen):
    tokens, logprobs = chosen.tolist()
    return [(int(token), logprob) for token, logprob in zip(tokens, logprobs)]


def choose(logits: Tensor, keys: Tensor, how: Sampling) -> Tensor:
    """logits [N, V], noise keys [N] -> [2, N]: tokens, their log-probabilities under the model.

    Gumbel-max: a token of p and noise E from Exponential(1) wins with the largest p / E, which is
    argmax(log p + Gumbel noise). Rounding in the logits flips a draw only where two nearly tie.
    """
    logits = logits.float()
    allowed = logits[:, : how.vocab_size]
    if how.temperature == 0:
        tokens = allowed.argmax(-1)
    else:
        above = allowed - allowed.amax(-1, keepdim=True)
        probs = (above / max(how.temperature, 1e-6)).softmax(-1)
        if how.top_p < 1:
            probs = nucleus(probs, how.top_p)
        tokens = (probs / exponential_noise(keys, probs.shape[-1])).argmax(-1)
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return torch.stack([tokens.double(), logprobs.double()])


def nucleus(probs, top_p):
    """probs [N, V], without those outside the smallest set of most probable tokens that has the
    mass top_p (Holtzman et al. 2020); what ties with its last token stays.
    """
    # all tokens below this share together have less than what a nucleus leaves out: none of them
    # is in it. A GPU sorts them all sooner than it would wait for their number
    count = vocab = probs.shape[-1]
    if not probs.is_cuda:
        count = (probs >= (1 - top_p) / vocab).sum(-1).max().clamp_min(1)
    head = probs.topk(count).values
    inside = (head.cumsum(-1) - head < top_p).sum(-1, keepdim=True).clamp_min(1)
    return probs.masked_fill(probs < head.gather(-1, inside - 1), 0)


def exponential_noise(keys, size):
    """keys [N] -> [N, size] of Exponential(1), a hash of key and token: the same everywhere."""
    tokens = torch.arange(size, device=keys.device, dtype=torch.int32)
    x = tokens * -1640531535 + keys.int()[:, None]
    for factor in (739982445, 695872825):  # of Wellons' hash-prospector
        x ^= (x >> 15) & 0x1FFFF  # the mask makes the shift a logical one
        x *= factor
    uniform = ((x >> 1) & 0x7FFFFFFF).float().add_(0.5).mul_(2**-31)  # 2^-32 and up
    return uniform.neg_().log1p_().neg_()  # by log1p, so that the smallest are exact


def generate(model: Transformer, prompts: list[list[int]], **how) -> list[list[int]]:
    """The new ids of each prompt, EOS not included. ValueError where a prompt has no room.

    how: fields of Sampling; max_new_tokens=256, temperature=0.0, top_p=1.0, eos_ids=(), seed=0.
    """
    sequences = [Sequence(i, prompt) for i, prompt in enumerate(prompts)]
    for _ in sample(model, sequences, Sampling(**how)):
        pass
    return [sequence.ids for sequence in sequences]


# 3. From data to ledger


def read_requests(args, encoder):
    """The rows of the data, each with what the model will read."""
    require(args.task == "rationale" or not args.cue, "--cue", "goes with --task rationale alone")
    rows = data.read_rows(args.data, args.direction, prompts=args.task == "answer")
    for row in rows[: args.limit]:
        row["meta"] = {}  # what is written answers this run's prompts, whatever a ledger had
        if args.task == "answer":  # a rationale after an empty reference
            row["reference"] = ""
        fits = args.task != "translation" or "messages" not in row
        require(fits, row["where"], "--task translation needs a source")
        row |= request(row, args.task, encoder, args.cue)
        pair = [row.get("source_lang"), row.get("target_lang"), row["reference"]]
        row["input_hash"] = data.short_hash([row["ids"], pair])
    return rows[: args.limit]


def make_sequences(rows):
    return [Sequence(row["id"], row["ids"], row["where"]) for row in rows]


def write_rows(rows, args, model, tokenizer):
    """Ledger rows as they end."""
    names = ("max_new_tokens", "temperature", "top_p", "seed", "batch_size")
    how = sampling(tokenizer, **{name: getattr(args, name) for name in names})
    if args.task == "translation":
        how.stop = tokenizer.first_line_ends
    by_id = {row["id"]: row for row in rows}
    ended = sample(model, make_sequences(rows), how)
    for sequence in tqdm(ended, total=len(rows), unit="row", disable=dist.get_rank() > 0):
        yield ledger_row(by_id[sequence.id], args.task, tokenizer, sequence)


def main(args):
    # 1. the data, before any weight is read
    require(args.model and args.data and args.out, "generate.py", "give --model, --data and --out")
    rank, _, device = start_processes()
    tokenizer = Tokenizer(args.model, args.chat)
    config = ModelConfig.from_file(args.model)
    encoder = Encoder(tokenizer, data.read_template(args.template), args.system)
    rows = read_requests(args, encoder)
    require_room(make_sequences(rows), args.max_new_tokens, config)

    # 2. all that a row depends on, besides what the model reads
    names = ("task", "model", "max_new_tokens", "temperature", "top_p", "seed", "dtype")
    settings = {name: getattr(args, name) for name in names} | encoder.settings()
    settings["cue"] = args.cue or ""
    settings["model_hash"] = hash_model(args.model)
    settings["versions"] = {"torch": torch.__version__, "sentencepiece": sentencepiece.__version__}

    # 3. the rows
    def produce(missing):
        model = Transformer.from_pretrained(args.model, getattr(torch, args.dtype), device)
        if args.compile:
            # products of one row become sums, fused with the rest
            model.compile_layers(coordinate_descent_tuning=True)
        return write_rows(missing, args, model, tokenizer)

    with data.lock(args.out):
        data.complete(Path(args.out), settings, rows, produce)
    if rank == 0:
        print(f"{args.out}: {len(rows)} rows")


OPTIONS = """
--model DIR             model folder
--data FILE...          pairs; for --task answer prompts
--out LEDGER            ledger to write, or to finish: JSON lines
--task rationale|translation|paraphrase|answer   what the model writes
--cue TEXT              forced after the reference, such as '\\n'
--max-new-tokens COUNT=256   tokens of a row, at most
--temperature NUMBER=1.0     0 is greedy
--top-p SHARE=1.0       nucleus, a share of the probability; 1: the whole vocabulary
--seed N=0              of the samples
--batch-size COUNT=64   rows at a time
--limit COUNT           the first rows only
--compile               compile the layers: for long runs on a GPU
--dtype float32|bfloat16   what is computed in
"""


def parser():
    purpose = "Lets a model write rationales, translations, paraphrases or answers."
    return data.make_parser(purpose, OPTIONS + data.PROMPT_OPTIONS)


if __name__ == "__main__":
    data.cli(main, parser())
