r"""Every check that needs a GPU, in one command: correctness, training, sampling, and transformers.

    python benchmarks/gpu.py              one card of 80 GB, 8 minutes; writes benchmarks-gpu.md
    python benchmarks/gpu.py --smoke      rehearses it on a CPU with tiny sizes; figures say nothing

Weights are random, the text is made up on the spot, nothing is downloaded. Each part runs in a
process of its own, which gives all its memory back; what fails is a row of the table, and the rest
goes on.
"""

import argparse
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from sentencepiece import SentencePieceTrainer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import bounds  # noqa: E402

from data import Encoder, Example, Tokenizer, collate, read_rows  # noqa: E402
from generate import Sampling, Sequence, sample  # noqa: E402
from model import ModelConfig, Transformer, start_processes  # noqa: E402

# dense bfloat16 operations and bytes a second, from the makers' data sheets
SHEETS = {
    "H200": (989e12, 4.8e12),
    "H100 80GB HBM3": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.04e12),
}
# of the measured peak; of the measured bandwidth at batch 1; of transformers' speed
GOALS = {"train": 0.5, "sample": 0.75, "ratio": 2}
REAL = {
    "seconds": 465,
    "rows": 512,  # of the data
    "words": (48, 144),
    "batch": 128,  # of training
    "micro": 32,
    "steps": 8,
    "skip": 3,
    "dtype": torch.bfloat16,
    "matrix": 8192,
    "copy": 2**31,
    "length": 512,  # where the card is compared with a CPU
    "batches": (1, 8, 64, 256),  # of sampling
    "prompt": 128,
    "new": 64,
    "shape": {},
}
TINY = REAL | {
    "seconds": 120,
    "rows": 16,
    "words": (2, 6),
    "batch": 4,
    "micro": 2,
    "steps": 3,
    "skip": 1,
    "dtype": torch.float32,
    "matrix": 256,
    "copy": 2**20,
    "length": 40,
    "batches": (1, 8),
    "prompt": 8,
    "new": 8,
    "shape": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "vocab_size": 800,
    },
}
SMALL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
MODELS = {  # name in the table -> file beside this one, and what is changed
    "1B": ("llama-1b.json", {}),
    "7B": ("llama-7b.json", {}),
    "7B, 8 layers": ("llama-7b.json", {"num_hidden_layers": 8}),  # what AdamW leaves room for
    "small": ("llama-1b.json", SMALL),
}
PARTS = [  # what, model, seconds at most, flags of train.py; the most telling first
    ("card", "small", 60, []),
    ("train", "1B", 60, []),
    ("sample", "1B", 90, []),
    ("transformers", "1B", 60, []),
    ("sample", "7B", 100, []),
    ("transformers", "7B", 60, []),
    ("train", "1B", 60, ["--activation-checkpointing"]),
    ("transformers, compiled", "1B", 90, []),
    ("train", "7B, 8 layers", 60, []),
]
HEAD = "what, model, setting, tokens/s, of measured peak, of data sheet, GiB, what else was seen"


# 1. What a process of its own measures


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settle():
    """Returns once the device has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(work, repeats: int = 2, warm: int = 1) -> list[tuple[float, object]]:
    """(seconds, result) of each call of `work` after those that warm up."""
    found = []
    for _ in range(warm + repeats):
        settle()
        start = time.perf_counter()
        result = work()
        settle()
        found.append((time.perf_counter() - start, result))
    return found[warm:]


def emit(what: str, model: str, setting: str, **figures):
    """Hands a row of the table, with the peak of memory, to the process that writes it."""
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = {"what": what, "model": model, "setting": setting, "memory_gib": memory / 2**30}
    print("ROW " + json.dumps(row | figures), flush=True)


@contextmanager
def attempt(what: str, model: str, setting: str):
    """What fails within becomes a row. Frees memory first, and counts its peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    except Exception as e:
        text = " ".join(str(e).split())[:200]
        emit(what, model, setting, note=f"failed: {type(e).__name__}: {text}")


@torch.no_grad()
def random_model(config: ModelConfig, place, dtype, scale: float = 0.02) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=place)
    for p in model.parameters():
        if p.dim() > 1:
            p.normal_(0, scale)
        else:
            p.fill_(1)
    return model.eval()


def random_tokens(config: ModelConfig, batch: int, length: int) -> list[list[int]]:
    return torch.randint(1, config.vocab_size, (batch, length)).tolist()


def measure_card(s, name: str, config: ModelConfig):
    """What the card reaches, and whether the model computes on it what it computes on a CPU."""
    with attempt("card", "", "peaks"):
        measure_peaks(s)
    torch.manual_seed(0)
    reference = random_model(config, "cpu", torch.float32, 0.05)
    prompts = [random_tokens(config, 1, s.length // k)[0] for k in (1, 2, 3, 5)]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        model = Transformer(config).to(device(), dtype).eval()
        model.load_state_dict(reference.state_dict())
        with torch.no_grad():
            wanted = reference(torch.tensor(prompts[:1]))
            most = tolerance * wanted.abs().max()
            with attempt("card", name, f"logits, {dtype}"):
                found = model(torch.tensor(prompts[:1], device=device())).float().cpu()
                gap = (found - wanted).abs().max()
                largest = f"the largest is {wanted.abs().max():.3g}"
                text = f"differ from a CPU's in float32 by at most {gap:.2g}; {largest}"
                assert gap < most, text
                emit("card", name, f"logits, {dtype}", note=text)
            with attempt("card", name, f"sampler, {dtype}"):
                gap = sampler_gap(model, prompts)
                text = f"log-probabilities at most {gap:.2g} from a full forward pass, no cache"
                assert gap < most, text
                emit("card", name, f"sampler, {dtype}", note=text)


def measure_peaks(s):
    """A row with the rates of a matrix product and of a copy: what shares refer to."""
    a = torch.randn(s.matrix, s.matrix, dtype=s.dtype, device=device())
    b = torch.randn_like(a)
    seconds = min(t for t, _ in measure(lambda: [a @ b for _ in range(10)], 5))
    matmul = 20 * s.matrix**3 / seconds
    x = torch.ones(s.copy, dtype=torch.uint8, device=device())
    y = torch.ones_like(x)
    seconds = min(t for t, _ in measure(lambda: [x.copy_(y) for _ in range(10)], 5))
    copy = 20 * s.copy / seconds
    card = {"device": "a CPU, tiny sizes: a rehearsal", "memory": 0, "matmul": matmul, "copy": copy}
    if torch.cuda.is_available():
        card["device"] = torch.cuda.get_device_name()
        card["memory"] = torch.cuda.get_device_properties(0).total_memory
    rate = f"matrix product {matmul / 1e12:.4g} Tflop/s in {s.dtype}"
    text = f"{rate}, copy {copy / 1e12:.4g} TB/s, read and written"
    emit("card", "", "peaks", note=text, card=card)


def sampler_gap(model: Transformer, prompts: list[list[int]]) -> float:
    """How far the sampler's log-probabilities are from those of a pass without a cache, at most."""
    gap = 0.0
    sequences = [Sequence(i, prompt) for i, prompt in enumerate(prompts)]
    # the fourth takes a slot that is free
    for sequence in sample(model, sequences, Sampling(16), batch_size=3):
        ids = sequence.ids
        tokens = torch.tensor([sequence.prefix + ids], device=device())
        logits = model(tokens)[0, len(sequence.prefix) - 1 : -1].float()
        scores = logits.log_softmax(-1)[range(len(ids)), ids].cpu()
        gap = max(gap, (scores - torch.tensor(sequence.logprobs)).abs().max().item())
        same = logits.argmax(-1).tolist() == ids
        assert model.dtype != torch.float32 or same, f"prompt {sequence.id}: other tokens"
    return gap


def report_decoding(s, what: str, model: str, setting: str, config, batch: int, run):
    """A row for `run(n)`: the seconds in which `batch` prompts are read and n tokens sampled."""
    with attempt(what, model, setting):
        first = run(1)
        step = max(run(1 + s.new) - first, 1e-9) / s.new
        heads = config.num_key_value_heads * config.head_dim
        cached = 2 * config.num_hidden_layers * heads * (s.prompt + s.new / 2)  # numbers a row
        read = s.dtype.itemsize * (sum(bounds.matrix_weights(config)) + batch * cached)
        text = f"{1e3 * step:.2f} ms a step, {1e3 * first:.0f} ms to the first token"
        rates = {"tokens_s": batch / step, "bytes_s": read / step}
        emit(what, model, setting, batch=batch, note=text, **rates)


def measure_sampling(s, name: str, config: ModelConfig):
    """As generate.py samples: temperature 1, prompts of one length, no EOS."""
    model = random_model(config, device(), s.dtype)
    prompts = random_tokens(config, 3 * max(s.batches), s.prompt)
    for batch in s.batches:
        work = partial(seconds_of_wave, model, prompts[: 3 * batch], batch)
        report_decoding(s, "sample", name, f"batch {batch}", config, batch, work)


def seconds_of_wave(model: Transformer, prompts: list[list[int]], batch: int, n: int) -> float:
    """Seconds of `batch` rows. The first of three waves is left out: it makes the CUDA graphs."""
    sequences = [Sequence(i, prompt) for i, prompt in enumerate(prompts)]
    sampling = Sampling(n, temperature=1.0)
    ends = [time.perf_counter() for _ in sample(model, sequences, sampling, batch_size=batch)]
    return (ends[-1] - ends[batch - 1]) / 2


# 2. transformers


def their_model(s, name: str, dtype):
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = json.loads((s.folder / f"{name}.json").read_text())
    config = AutoConfig.for_model(**raw)
    with torch.device(device()):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def measure_their_sampling(s, name: str, config: ModelConfig, compiled: bool):
    model = their_model(s, name, s.dtype).eval()
    model.generation_config.eos_token_id = None
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    if compiled:
        options["cache_implementation"] = "static"  # which makes it compile the step on a GPU

    def generate(ids: torch.Tensor, n: int):
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=n, **options)
        assert out.shape[1] == s.prompt + n, "ended early"

    def run(ids: torch.Tensor, n: int) -> float:
        return median(t for t, _ in measure(partial(generate, ids, n)))

    for batch in [b for b in (1, 8, 64) if b in s.batches]:
        ids = torch.tensor(random_tokens(config, batch, s.prompt), device=device())
        setting = f"batch {batch}" + ", compiled" * compiled
        work = partial(run, ids)
        report_decoding(s, "transformers", name, setting, config, batch, work)


def their_step(s, model, forward, optimizer, batch: list[Example]) -> list[Example]:
    """As the libraries advise: float32 weights, autocast, sdpa, fused AdamW, labels."""
    batch = sorted(batch, key=len, reverse=True)
    size = s.micro // 2  # more: no room
    for first in range(0, len(batch), size):
        part = batch[first : first + size]
        made = collate(part, device())
        tokens = made.tokens[0][made.shared.token_at]  # [B, T]
        labels = torch.full_like(tokens, -100)
        labels.view(-1)[made.places] = made.targets
        # pads stand on the right, so causality keeps them out: a mask would only cost time
        inputs = {"input_ids": tokens, "labels": labels, "shift_labels": labels}
        half = s.dtype == torch.bfloat16
        with torch.autocast(device().type, torch.bfloat16, enabled=half):
            loss = forward(**inputs, use_cache=False).loss
        (loss * len(part) / len(batch)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return batch


def measure_their_training(s, name: str, config: ModelConfig, compiled: bool):
    setting = "training" + ", compiled" * compiled
    with attempt("transformers", name, setting):
        model = their_model(s, name, torch.float32).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
        forward = torch.compile(model, dynamic=True) if compiled else model
        encoder = Encoder(Tokenizer(s.folder, "plain"))
        rows = read_rows([str(s.folder / "data.jsonl")])
        examples = [encoder.example(row) for row in rows]

        def step() -> list[Example]:
            batch = random.sample(examples, s.batch)
            return their_step(s, model, forward, optimizer, batch)

        speeds = []
        for seconds, batch in measure(step, s.steps - s.skip, s.skip):
            lengths = [len(example) for example in batch]
            supervised = sum(lengths) - sum(len(example.prompt) for example in batch)
            operations = bounds.training_operations(config, lengths, supervised)
            speeds.append((sum(lengths) / seconds, operations / seconds))
        tokens_s, operations_s = map(median, zip(*speeds))
        emit("transformers", name, setting, tokens_s=tokens_s, operations_s=operations_s)


def measure_transformers(s, name: str, config: ModelConfig, compiled: bool = False):
    measure_their_sampling(s, name, config, compiled)
    trained = name.replace("7B", "7B, 8 layers")
    config = ModelConfig.from_file(s.folder / f"{trained}.json")
    measure_their_training(s, trained, config, compiled)


# 3. The process that starts the others and writes the table


def write_inputs(s):
    """Configurations, a tokenizer, and pairs with rationales of unequal lengths."""
    for name, (file, changes) in MODELS.items():
        raw = json.loads((ROOT / "benchmarks" / file).read_text())
        (s.folder / f"{name}.json").write_text(json.dumps(raw | changes | s.shape))
    rng = random.Random(0)
    syllables = "ba de fi go ku la me ni so tu".split()
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(900)]
    lines = []
    for _ in range(s.rows):
        row = {"source_lang": "de", "target_lang": "en"}
        for name, factor in (("source", 1), ("reference", 1), ("rationale", 2)):
            row[name] = " ".join(rng.choices(words, k=factor * rng.randint(*s.words)))
        lines.append(json.dumps(row) + "\n")
    (s.folder / "data.jsonl").write_text("".join(lines))
    SentencePieceTrainer.train(
        sentence_iterator=iter(words * 3),
        model_prefix=str(s.folder / "tokenizer"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )


def launch(command: list[str], limit: float, heard) -> tuple[int, str]:
    """Runs a command, its lines going to `heard` -> status, and why it failed if it did."""
    p = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    timer = threading.Timer(limit, os.killpg, (p.pid, signal.SIGKILL))
    timer.start()
    reason = ""
    try:
        for line in p.stdout:
            line = line.strip()
            if "rror" in line or "rror" not in reason:
                reason = line
            heard(line)
        status = p.wait()
    finally:  # also where this process is told to stop
        timer.cancel()
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
    if status == -signal.SIGKILL:
        reason = f"stopped after {limit:.0f} s"
    return status, reason[:200]


def measure_training(s, name: str, flags: list[str], limit: float) -> dict:
    """Trains by the command line -> what it wrote, and what memory.py foretold."""
    out = s.folder / "out"
    options = {
        "--config": s.folder / f"{name}.json",
        "--tokenizer": s.folder,
        "--chat": "plain",
        "--data": s.folder / "data.jsonl",
        "--out": out,
        "--dtype": str(s.dtype).removeprefix("torch."),
        "--batch-size": s.batch,
        "--micro-batch-size": s.micro,
        "--max-steps": s.steps,
        "--save-every": 0,
    }
    command = [x for pair in options.items() for x in pair] + flags
    said = []
    launch([ROOT / "benchmarks" / "memory.py", *command], limit, said.append)
    status, reason = launch([ROOT / "train.py", *command], limit, print)
    if status:
        return {"note": f"failed: {reason}"}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out)
    config = ModelConfig.from_file(s.folder / f"{name}.json")
    speeds = []
    for line in lines[s.skip :]:
        lengths = [line["tokens"] / s.batch] * s.batch  # as if of one length: 0.1 % off
        supervised = line["reference_tokens"] + line["rationale_tokens"]
        operations = bounds.training_operations(config, lengths, supervised)
        speeds.append((line["tokens"] / line["seconds"], operations / line["seconds"]))
    tokens_s, operations_s = map(median, zip(*speeds))
    return {
        "tokens_s": tokens_s,
        "operations_s": operations_s,
        "memory_gib": max(line["memory_gib"] for line in lines),
        "note": f"memory.py: {foretold(said, flags)}",
    }


def foretold(said: list[str], flags: list[str]) -> str:
    """Of the table that memory.py prints, the memory of one rank."""
    column = "total'" if "--activation-checkpointing" in flags else "total"
    names = []
    for line in said:
        cells = line.split()
        if cells[:1] == ["ranks"]:
            names = cells
        elif cells[:1] == ["1"] and names:
            return f"{dict(zip(names, cells))[column]} GiB"
    return (said or ["n/a"])[-1]


class Table:
    """The rows, written anew after each, so that nothing is lost where the time runs out."""

    def __init__(self, out: Path):
        self.out = out
        self.rows = []
        self.lines = []
        self.card = {}
        driver = "none"
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            said = subprocess.run(query, capture_output=True, text=True).stdout.split()
            driver = " ".join(said[:1])
        date = time.strftime("%Y-%m-%d")
        self.title = f"torch {torch.__version__}; driver {driver}; {date}"

    def add(self, what: str, model: str, setting: str, note: str = "", **row):
        self.card |= row.get("card", {})
        shares, goal = self.shares(what, row)
        note = "; ".join(text for text in (goal, note) if text)
        speed = f"{row['tokens_s']:,.0f}" if "tokens_s" in row else ""
        memory = f"{row['memory_gib']:,.1f}" if "memory_gib" in row else ""
        cells = [what, model, setting, speed, *shares, memory, note]
        cells = [cell.replace("|", "/") for cell in cells]
        self.rows.append({"what": what, "model": model, "setting": setting, "note": note} | row)
        self.lines.append(f"| {' | '.join(cells)} |")
        print(self.lines[-1], flush=True)
        self.write()

    def shares(self, what: str, row: dict) -> tuple[list[str], str]:
        """Of the measured peak and of the data sheet, and whether the goal is reached."""
        name = self.card.get("device", "")
        sheet = next((rates for card, rates in SHEETS.items() if card in name), (0, 0))
        for i, (rate, peak) in enumerate((("operations_s", "matmul"), ("bytes_s", "copy"))):
            if rate not in row:
                continue
            measured = self.card.get(peak, 0)
            told = [f"{row[rate] / x:.1%}" if x else "n/a" for x in (measured, sheet[i])]
            goal = ""
            if what in GOALS and measured and row.get("batch", 1) == 1:
                reached = row[rate] / measured >= GOALS[what]
                goal = f"goal {GOALS[what]:.0%}: {'reached' if reached else 'not reached'}"
            return told, goal
        return ["", ""], ""

    def write(self):
        device = self.card.get("device", "no card was measured")
        about = "Shares are of operations in training and of bytes read in sampling"
        head = HEAD.split(", ")
        lines = [
            f"# {device}; {self.title}",
            "",
            f"`python benchmarks/gpu.py`, random weights. {about}; goals are of the measured peak.",
            "",
            f"| {' | '.join(head)} |",
            "|---" * len(head) + "|",
            *self.lines,
        ]
        self.out.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def compare(self):
        """Rows for our fastest setting beside transformers' fastest."""
        fastest = {}
        rows = [row for row in self.rows if "tokens_s" in row]
        for row in sorted(rows, key=lambda row: row["tokens_s"]):
            side = "its" if row["what"].startswith("transformers") else "ours"
            fastest.setdefault((row["model"], row.get("batch")), {})[side] = row
        for (model, _), pair in fastest.items():
            if len(pair) < 2:
                continue
            ratio = pair["ours"]["tokens_s"] / pair["its"]["tokens_s"]
            settings = f"{pair['ours']['setting']} / {pair['its']['setting']}"
            verdict = "reached" if ratio >= GOALS["ratio"] else "not reached"
            text = f"goal {GOALS['ratio']}: {verdict}; {ratio:.2f} times as fast as transformers"
            self.add("ratio", model, settings, text)


WORK = {
    "card": measure_card,
    "sample": measure_sampling,
    "transformers": measure_transformers,
    "transformers, compiled": partial(measure_transformers, compiled=True),
}


def run_part(s, table: Table, part: tuple, end: float, smoke: bool):
    """One part in a process of its own; its rows go into the table."""
    what, name, limit, flags = part
    limit = min(limit, end - time.monotonic())
    row = {"what": what, "model": name, "setting": " ".join(flags) or "plain"}

    def heard(line: str):
        if line.startswith("ROW "):
            table.add(**json.loads(line[4:]))
        else:
            print(line, flush=True)

    if limit < 10:
        table.add(**row, note="n/a: no time left")
    elif "transformers" in what and not find_spec("transformers"):
        table.add(**row, note="n/a: transformers is not installed")
    elif what == "train":
        table.add(**row, **measure_training(s, name, flags, limit))
    else:
        command = [__file__, "--part", what, "--model", name, "--folder", s.folder]
        status, reason = launch(command + ["--smoke"] * smoke, limit, heard)
        if status:
            table.add(**row, note=f"failed: {reason}")


def is_rehearsed(what: str, name: str, flags: list[str]) -> bool:
    """A rehearsal has one shape, tries the flags, and does not compile."""
    if "7B" in name or what.endswith("compiled"):
        return False
    return what != "train" or bool(flags)


def main(args: argparse.Namespace) -> int:
    s = SimpleNamespace(**(TINY if args.smoke else REAL), folder=args.folder)
    if args.part:
        if "transformers" not in args.part:
            start_processes()  # as our scripts do
        config = ModelConfig.from_file(s.folder / f"{args.model}.json")
        WORK[args.part](s, args.model, config)
        return 0
    if not torch.cuda.is_available() and not args.smoke:
        told = "no CUDA device here; run this on a machine with a GPU, or rehearse with --smoke"
        sys.stderr.write(f"error: {told}\n")
        return 2
    os.environ["PYTHONUNBUFFERED"] = "1"
    if args.smoke:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end = time.monotonic() + s.seconds
    table = Table(args.out.resolve())
    with tempfile.TemporaryDirectory() as folder:
        s.folder = Path(folder)
        write_inputs(s)
        for part in PARTS:
            what, name, _, flags = part
            if not args.smoke or is_rehearsed(what, name, flags):
                run_part(s, table, part, end, args.smoke)
        if not args.smoke:
            layers, head = bounds.matrix_weights(ModelConfig.from_file(s.folder / "7B.json"))
            need = 16 * (layers + 2 * head) / 1e9  # weights, gradients, two moments in float32
            room = table.card.get("memory", 0) / 1e9
            text = f"n/a: AdamW in float32 needs {need:.3g} GB, the card has {room:.3g}"
            table.add("train", "7B", "plain", text)
    table.compare()
    print(f"wrote {table.out}")
    return int(any(row["note"].startswith("failed") for row in table.rows))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Checks and measures what needs a GPU, in 8 minutes.")
    add = p.add_argument
    add("--out", type=Path, default=Path("benchmarks-gpu.md"), help="table (benchmarks-gpu.md)")
    add("--smoke", action="store_true", help="rehearse on a CPU with tiny sizes")
    add("--part", help=argparse.SUPPRESS)  # these three: what a process of its own does
    add("--model", help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    return p


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
