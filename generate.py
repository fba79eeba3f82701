r"""RaDis, step 1: the model generates rationales for the pairs that it will be trained on.

    python generate.py --model DIR --data train.de-en.json --direction de-en \
                       --out rationales.jsonl --cue '\n'

The answer to "translate x" is prefilled with the reference y, and the model continues: the
continuation is the rationale r (Wu et al. 2024). train.py then trains on y and r together. The
sampling noise of a row depends only on the seed and the row's id, not on batch size, ranks or
interruptions. The same command resumes a stopped run.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C also ends it while torch is imported

import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import sentencepiece
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from data import Encoder, Row, Tokenizer
from model import (
    KVCache,
    ModelConfig,
    Transformer,
    UserError,
    from_first_rank,
    hash_model,
    parse_json,
    read_object,
    read_text,
    require,
    start_processes,
    write_text,
    writing,
)

# a Chinese or Japanese character counts as a word
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
# SDFT (Yang et al. 2024), our wording: the prompt, and phrases that show that an answer saw the
# reference
GUIDE = "{}\n\nBelow is a reference answer. Write your own answer to the request, guided by it.\n{}"
LEAKS = re.compile("reference answer|your response|my response|now it's your turn")
GRAPH_DEVICES = ("cuda",)  # where decoding steps are CUDA graphs
CACHED_ROWS = 16  # rows of logits that fit in a CPU's cache: choosing makes twenty passes over them


# 1. The method: what the model reads, and what its continuation becomes


def prefill_reference(row: Row, tokenizer: Tokenizer, cue: str) -> list[int]:
    """Returns prompt, reference and cue as ids; sets row.rationale_ids to the cue's."""
    row.rationale_ids = tokenizer.continuation(row.reference, row.reference_ids, cue)
    fault = f"{cue!r} has no tokens in this vocabulary; leave it out, or give another"
    require(row.rationale_ids or not cue, "--cue", fault)
    return row.prompt_ids + row.reference_ids + row.rationale_ids


def with_rationale(sequence: "Sequence", tokenizer: Tokenizer) -> Row:
    """Returns the row with its rationale: the cue and the model's continuation."""
    row = sequence.row
    rationale = row.rationale_ids + sequence.ids
    return replace(
        row,
        rationale=tokenizer.decode_after(row.reference_ids, rationale),
        rationale_ids=rationale,
        finish=sequence.finish,
        status=status_of(tokenizer.decode(sequence.ids)),
    )


def status_of(text: str) -> str:
    """empty: blank text. repetitive: 20 or more words, and most of the word 4-grams repeat an
    earlier one. Else ok. The thresholds are ours.
    """
    words = WORD.findall(text.casefold())
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    if len(words) >= 20 and len(set(grams)) < len(grams) / 2:
        return "repetitive"
    return "ok" if text.strip() else "empty"


# The paper's baselines: the model's own text takes the place of the reference


def with_rewrite(sequence, tokenizer, task):
    """Returns the row with the model's text as reference, unless blank, truncated or leaking."""
    text = tokenizer.decode(sequence.ids)
    ids = sequence.ids
    if task == "translation" and "\n" in text:  # an explanation may follow
        text = text.strip().split("\n")[0]
        ids = tokenizer.answer(text)
    leaks = task == "paraphrase" and LEAKS.search(text.casefold())
    if leaks or sequence.finish == "length" or not text.strip():
        return sequence.row
    return replace(sequence.row, reference=text, reference_ids=ids)


def make_sequence(row, encoder, task, cue):
    """Returns a row's Sequence. Of a ledger's row only the pair or conversation is used."""
    tokenizer = encoder.tokenizer
    reference = "" if task == "answer" else row.reference  # --task answer prefills nothing
    row = replace(
        row,
        reference=reference,
        rationale="",
        prompt_ids=None,
        prompt_hash=None,
        reference_ids=tokenizer.answer(reference),
        rationale_ids=[],
        tokenizer=tokenizer.hash,
        finish="eos",
        status="ok",
        chat=tokenizer.chat_option,
        system=encoder.system,
        template=encoder.template,
    )
    row.prompt_ids = encoder.prompt(row)
    row.prompt_hash = data.short_hash(encoder.messages(row))
    if task == "translation":  # SeqKD
        require(row.messages is None, row.where, "--task translation needs rows with a source")
        prompt = row.prompt_ids
    elif task == "paraphrase":  # SDFT
        *before, turn = encoder.messages(row)
        text = GUIDE.format(turn["content"], reference)
        prompt = tokenizer.chat([*before, {"role": "user", "content": text}], where=row.where)
    else:
        prompt = prefill_reference(row, tokenizer, cue)
    return Sequence(row.id, prompt, row.where, row=row)


def ledger_row(sequence, tokenizer, task):
    """Returns a ledger row as a dict. `logprob`: mean over all sampled tokens, used or not."""
    if task in ("translation", "paraphrase"):
        row = with_rewrite(sequence, tokenizer, task)
    else:
        row = with_rationale(sequence, tokenizer)
    fields = {name: value for name, value in vars(row).items() if value is not None}
    del fields["where"]
    if row.messages is not None:
        messages = fields.pop("messages")
        answer = fields.pop("reference")
        if len(messages) == 1:
            fields |= {"prompt": messages[0]["content"], "response": answer}
        else:
            fields["messages"] = [*messages, {"role": "assistant", "content": answer}]
    logprob = sum(sequence.logprobs) / len(sequence.logprobs)
    # further digits depend on the batch in which the row was computed
    return fields | {"logprob": round(logprob, 3)}


# 2. The sampler


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Each field is an option of generate.py, recorded in the meta file of a
    ledger and compared when a run is resumed. If a meta file lacks a field, the default is used.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # 1 is the whole vocabulary
    seed: int = 0

    def __post_init__(self):
        valid = self.max_new_tokens > 0 and 0 <= self.temperature < math.inf
        require(valid and 0 < self.top_p <= 1, "sampling", f"a value is out of range in {self}")


DEFAULTS = vars(Sampling())


@dataclass
class Sequence:
    """A prompt and its sampled continuation."""

    id: int | str
    prefix: list[int]  # all that the model reads
    where: str = ""  # FILE:LINE
    ids: list[int] = field(default_factory=list)  # sampled, without EOS
    logprobs: list[float] = field(default_factory=list)  # of all sampled tokens, EOS included
    finish: str = ""  # "eos" or "length", once it has ended
    key: int = 0  # its noise_key
    row: Row | None = None  # of the data

    @property
    def input_hash(self):
        """Hash of what a ledger row depends on besides its id and the settings."""
        row = self.row
        return data.short_hash([self.prefix, row.source_lang, row.target_lang, row.reference])

    def add(self, token, logprob, eos_ids, max_new_tokens, stop):
        require(
            math.isfinite(logprob), self.where, "the logits are NaN or infinite; check the weights"
        )
        self.logprobs.append(logprob)
        if token in eos_ids:
            self.finish = "eos"
            return
        self.ids.append(token)
        if stop is not None and stop(self.ids):
            self.finish = "eos"
        elif len(self.ids) == max_new_tokens:
            self.finish = "length"


@torch.inference_mode()
def sample(model, sequences, sampling, eos_ids=(), vocab_size=None, batch_size=32, stop=None):
    """Continues each of the sequences, and yields them as they end.

    Continuous batching: a finished sequence frees its cache row for the next one. vocab_size: ids
    from it on (padding of the embedding) are not sampled. stop(ids): called after each token; if
    True, the sequence ends with this token.
    """
    require_room(sequences, sampling.max_new_tokens, model.config)
    waiting = sorted(sequences, key=lambda sequence: len(sequence.prefix))
    if not waiting:
        return
    for sequence in waiting:
        sequence.key = noise_key(sampling.seed, sequence.id)
    rows = min(batch_size, len(waiting))
    cache = KVCache.empty(model, rows, len(waiting[-1].prefix) + sampling.max_new_tokens)
    # how many tokens of prompts are read at once, with padding
    budget = 2**15 if model.device.type == "cuda" else 2**12
    pick = partial(choose, sampling=sampling, vocab_size=vocab_size)
    graphs = {}
    running = []  # running[b] has row b of the cache
    while waiting or running:
        free = rows - len(running)
        if waiting and free >= rows / 8:  # batched prompts are faster
            batch = waiting[:free]
            batch = batch[: max(budget // len(batch[-1].prefix), 1)]
            del waiting[: len(batch)]
            picked = prefill(model, cache, len(running), batch, pick)
            running += batch
        else:
            picked = decode(model, cache, running, pick, graphs)
            batch = running
        for sequence, token, logprob in zip(batch, *picked.tolist()):
            sequence.add(int(token), logprob, eos_ids, sampling.max_new_tokens, stop)
        for b in reversed(range(len(running))):
            if running[b].finish:
                yield running[b]
                running[b] = running[-1]  # the last one takes its row
                running.pop()
                cache.copy_row(len(running), b)


def require_room(sequences, max_new_tokens, config, folder="the model"):
    """Raises UserError if a prompt is empty or too long, or has ids that the model lacks."""
    room = config.max_position_embeddings - max_new_tokens
    for sequence in sequences:
        n = len(sequence.prefix)
        require(
            0 < n <= room,
            sequence.where,
            f"{n} tokens to read and {max_new_tokens} to generate; the model reads 1 to {room}; "
            "shorten or remove the row, or lower --max-new-tokens",
        )
        known = max(sequence.prefix) < config.vocab_size
        fault = f"has no embedding for an id of {sequence.where}; give this model its own tokenizer"
        require(known, folder, fault)


def prefill(model, cache, first, new, pick):
    """Prefills prompts into the cache rows from `first`; returns what `pick` samples, [2, N]."""
    tokens, shared = data.share([sequence.prefix for sequence in new], model.device)
    B, T = shared.token_at.shape
    # flat index (of B * T) of each last token, and key
    inputs = [(b * T + len(sequence.prefix) - 1, sequence.key) for b, sequence in enumerate(new)]
    last, keys = torch.tensor(inputs, device=model.device).unbind(1)
    logits = model(tokens, last, cache.view(slice(first, first + B), T), shared=shared)  # [B, V]
    return pick(logits, keys, torch.zeros_like(keys))


def decode(model, cache, running, pick, graphs):
    """Reads the last token of every row, and picks the next.

    On a GPU each step is a CUDA graph: Python takes longer to launch the kernels one by one than
    the GPU to run them. Its shapes are fixed, with all cache rows and slots in multiples of 64, so
    a few graphs serve all steps.
    """
    inputs = [[s.ids[-1], len(s.prefix) + len(s.ids) - 1, s.key, len(s.ids)] for s in running]
    length = max(position for _, position, _, _ in inputs) + 1
    graphed = model.device.type in GRAPH_DEVICES
    if graphed:
        _, rows, _, room, _ = cache.keys.shape
        length = min(length + -length % 64, room)
        # an unused row writes to the last slot, which its next sequence overwrites before use
        inputs += [[0, length - 1, 0, 0]] * (rows - len(inputs))
    inputs = torch.tensor(inputs, device=model.device)  # [B, 4]

    def step(inputs):
        tokens, positions, keys, counts = inputs.unbind(1)  # [B] each
        part = cache.view(slice(len(inputs)), length)
        logits = model(tokens[:, None], cache=part, positions=positions[:, None])  # [B, 1, V]
        return pick(logits[:, 0], keys, counts)

    if not graphed:
        return step(inputs)
    if length not in graphs:
        graphs[length] = capture(step, inputs, [*graphs.values()])
    graph, graph_inputs, output = graphs[length]
    graph_inputs.copy_(inputs)
    graph.replay()
    return output


def capture(step, inputs, others):
    """Captures step(inputs); returns the CUDA graph, its inputs and its output."""
    step(inputs)  # warm-up: lazy loading can't be captured
    graph = torch.cuda.CUDAGraph()
    pool = others[0][0].pool() if others else None  # they share memory
    with torch.cuda.graph(graph, pool):
        output = step(inputs)
    return graph, inputs, output


def choose(logits, keys, counts, sampling, vocab_size=None):
    """logits [N, V], noise keys and counts [N] -> [2, N]: tokens, and their log-probabilities.

    The Gumbel-max trick: with E from Exponential(1), argmax(logits / T - log E) is a sample from
    softmax(logits / T). Rounding in the logits changes it only where two tokens nearly tie.
    """
    if logits.device.type == "cpu" and len(logits) > CACHED_ROWS:
        parts = zip(*(x.split(CACHED_ROWS) for x in (logits, keys, counts)))
        return torch.cat([choose(*part, sampling, vocab_size) for part in parts], 1)
    logits = logits.float()
    scores = logits[:, :vocab_size]
    if sampling.temperature > 1e-6:  # smaller values are greedy
        scores = scores / sampling.temperature
        if sampling.top_p < 1:
            inside = nucleus(scores.softmax(-1), sampling.top_p)
            scores = scores.masked_fill(~inside, -math.inf)
        scores -= exponential_noise(keys, counts, scores.shape[-1]).log_()
    tokens = scores.argmax(-1)
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return torch.stack([tokens.double(), logprobs])  # one tensor: one copy from the GPU


def nucleus(probs, top_p):
    """Returns the mask [N, V] of the smallest set of top tokens with total probability >= top_p
    (Holtzman et al. 2020). A token that ties with the last of them is in it, too.

    Of 0.5, 0.3, 0.1, 0.1 with top_p 0.75, the mass before each is 0, 0.5, 0.8, 0.9: the first two
    are in it, and the last of them has 0.3.
    """
    count = probs.shape[-1]
    if probs.device.type == "cpu":  # on a GPU, sorting all is faster than a sync for `count`
        # tokens below (1 - top_p) / V have less than 1 - top_p together, so all are outside
        count = (probs >= (1 - top_p) / count).sum(-1).max().clamp_min(1)
    ordered = probs.topk(count).values
    mass_before = ordered.cumsum(-1) - ordered
    last = ordered.masked_fill(mass_before >= top_p, 1).amin(-1, keepdim=True)
    return probs >= last


def noise_key(seed, id):
    """Returns a row's noise key, 64 bits of a hash of seed and id."""
    return int.from_bytes(bytes.fromhex(data.short_hash([seed, id])), signed=True)


def exponential_noise(keys, counts, size):
    """Samples of Exponential(1) [N, size], the same on every device: a hash of the row's key, of
    the number of tokens that were sampled before in this row, and of the token.
    """
    rows = mix(keys.int() + counts.int() * -1640531535)
    rows = mix(rows + (keys >> 32).int())
    tokens = torch.arange(size, device=keys.device, dtype=torch.int32)
    x = mix(tokens * -1640531535 + rows[:, None])  # [N, size], contiguous in this order
    uniform = (x >> 1).bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2**-31)  # from 2^-32 on
    return uniform.neg_().log1p_().neg_()  # accurate near 0


def mix(x):
    """Hashes int32 numbers in place: a product carries bits up, a shift brings them down.

    The factors are of Wellons' hash-prospector. Its shifts are 15, 12 and 15; here two of 15 do.
    """
    for factor in (739982445, 695872825):
        x ^= (x >> 15).bitwise_and_(0x1FFFF)  # the mask makes the shift a logical one
        x *= factor
    return x


def generate(
    model: Transformer,
    prompts: list[list[int]],
    eos_ids=(),
    batch_size: int = 32,
    **settings,
) -> list[list[int]]:
    """The ids that continue each prompt, without EOS. settings: fields of Sampling."""
    sequences = [Sequence(i, prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
    list(sample(model, sequences, Sampling(**settings), eos_ids, batch_size=batch_size))
    return [sequence.ids for sequence in sequences]


# 3. The ledger: a JSON lines file of generated rows; writing can resume


def complete(path, rows, produce):
    """Writes the JSON lines file `path`, one line per row of `rows`, in their order.

    Every rank calls it, in a run that `data.claim` has locked. rows: objects with `id`, `where`
    (FILE:LINE) and `input_hash`, a hash of what their outcome depends on besides id and settings.
    produce(missing) yields a dict with "id" for each of the rows that it is given, in any order.
    Rows are kept in PATH.parts/ until all exist; then `path` is written atomically. A line belongs
    to the row that has its id and input_hash. Lines of an existing `path` are kept; one that
    belongs to no row raises UserError.
    """
    rank = dist.get_rank()
    by_id = {}
    for row in rows:
        require(row.id not in by_id, row.where, f"duplicate id {row.id!r} in the data; change it")
        by_id[row.id] = row
    missing = None
    if rank == 0:
        finished = read_finished(path, by_id)
        missing = [id for id in by_id if id not in finished]
    mine = [by_id[id] for id in from_first_rank(missing)[rank :: dist.get_world_size()]]
    part = parts_folder(path) / f"rank{rank}.jsonl"
    for row in produce(mine) if mine else []:
        known = by_id[row["id"]]
        line = data.finite_json(row | {"input_hash": known.input_hash}, known.where)
        part.parent.mkdir(parents=True, exist_ok=True)
        with writing(part), open(part, "a", encoding="utf-8") as f:
            f.write(f"\n{line}\n")  # the line before may be torn
    dist.barrier()  # until all have written their part
    if rank == 0:
        publish(path, by_id)
    dist.barrier()


def read_finished(path, by_id):
    """Lines of finished rows by id. Raises UserError if a line of `path` is not one of them."""
    texts = {}
    for part in parts_folder(path).glob("rank*.jsonl"):
        texts[part] = part.read_text("utf-8", "replace")
    if os.path.lexists(path):
        texts[path] = read_text(path)  # last, so that edits in it win
    ids = {(id, row.input_hash): id for id, row in by_id.items()}
    finished = {}
    for file, text in texts.items():
        for n, line in enumerate(text.split("\n"), 1):
            try:
                row = parse_json(line, file)
                finished[ids[row["id"], row["input_hash"]]] = line
            except (UserError, KeyError, TypeError):  # a part may have torn or old lines
                fault = "matches no row of the data; remove the line, or choose another --out"
                require(file != path or not line, f"{file}:{n}", fault)
    return finished


def publish(path, by_id):
    """Moves all rows from the parts to `path`."""
    parts = parts_folder(path)
    finished = read_finished(path, by_id)
    require(finished.keys() == by_id.keys(), parts, "lacks rows; all ranks must share this folder")
    files = [*parts.glob("rank*.jsonl")]
    if files:
        # in the parts folder: a file PATH.tmp may be the user's
        write_text(parts / "whole", "\n".join(finished[id] for id in by_id))
        os.replace(parts / "whole", path)
    for file in files:
        file.unlink()
    with suppress(OSError):  # it is missing, or holds somebody else's file
        parts.rmdir()


def parts_folder(path):
    return path.with_name(f"{path.name}.parts")


def meta_path(ledger):
    return ledger.with_suffix(".meta.json")


def read_meta(ledger):
    """The settings that a ledger was written with; {} if its meta file is not next to it."""
    meta = meta_path(ledger)
    return read_object(meta) if data.is_own(meta) else {}


# 4. From data to ledger


def main(args):
    # 1. the options and the data, before any weight is read
    sampling = Sampling(**{name: getattr(args, name) for name in DEFAULTS})
    cue = args.cue or ""
    require(args.task == "rationale" or not cue, "--cue", "is for --task rationale only")
    out = Path(os.path.realpath(args.out))
    require(out.suffix == ".jsonl", f"--out {args.out}", "must end in .jsonl, such as rows.jsonl")
    rank, _, device = start_processes()
    tokenizer = Tokenizer(args.model, args.chat)
    encoder = Encoder(tokenizer, data.read_template(args.template), args.system)
    rows = data.read_rows(args.data, args.direction, prompts=args.task == "answer")
    sequences = [make_sequence(row, encoder, args.task, cue) for row in rows[: args.limit]]
    require_room(sequences, args.max_new_tokens, ModelConfig.from_file(args.model), args.model)

    # 2. all that a row depends on, besides what the model reads
    settings = {
        "task": args.task,
        "model": args.model,
        "model_hash": hash_model(args.model),
        "dtype": args.dtype,
        "cue": cue,
        "versions": {"torch": torch.__version__, "sentencepiece": sentencepiece.__version__},
    }
    settings |= vars(sampling) | encoder.settings()

    # 3. the rows
    def produce(missing):
        model = Transformer.from_pretrained(args.model, data.torch_dtype(args.dtype), device)
        ended = sample(
            model,
            missing,
            sampling,
            tokenizer.eos_ids,
            tokenizer.vocab_size,
            args.batch_size,
            stop=tokenizer.first_line_ends if args.task == "translation" else None,
        )
        for sequence in tqdm(ended, total=len(missing), unit="row", disable=rank > 0):
            yield ledger_row(sequence, tokenizer, args.task)

    with data.claim(meta_path(out), settings, [out, parts_folder(out)], DEFAULTS):
        complete(out, sequences, produce)
    if rank == 0:
        print(f"{out}: {len(sequences)} rows")


OPTIONS = """
--model! DIR            model folder
--data! FILE...         pairs or conversations; --task answer: also prompts
--out! LEDGER           JSON lines file to write, or to finish; its name ends in .jsonl
--task rationale|translation|paraphrase|answer   for RaDis, SeqKD, SDFT, or plain answers
--cue TEXT              text that is prefilled after the reference, such as '\\n'
--max-new-tokens COUNT=256   tokens per row, at most
--temperature NUMBER=1.0     sampling temperature; 0 is greedy
--top-p P=1.0           nucleus sampling: cumulative probability; 1 is the whole vocabulary
--seed N=0              sampling seed
--batch-size COUNT=64   rows at a time
--limit COUNT           the first rows only
--dtype float32|bfloat16   type of the weights; bfloat16 is slower on most CPUs
"""


def parser():
    purpose = "Generates rationales, translations, paraphrases or answers with a model."
    return data.make_parser(purpose, OPTIONS + data.PROMPT_OPTIONS)


if __name__ == "__main__":
    data.cli(main, parser())
