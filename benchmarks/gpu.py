r"""Every check that needs a GPU, in one command: correctness, training, sampling, and transformers beside them.

    python benchmarks/gpu.py              one card of 80 GB, at most 8 minutes; writes benchmarks-gpu.md
    python benchmarks/gpu.py --smoke      rehearses all of it on a CPU with tiny sizes; its figures mean nothing

Weights are random, the text is made up on the spot, nothing is downloaded. Each part runs in a process of its own,
which gives all its memory back; what fails is a row of the table, and the rest goes on.
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
sys.path.insert(0, str(ROOT))

from data import Encoder, Tokenizer, collate, read_rows  # noqa: E402
from generate import sample  # noqa: E402
from model import ModelConfig, Transformer, start_processes  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# dense bfloat16 operations and bytes a second, from the makers' data sheets
SHEETS = {"H200": (989e12, 4.8e12), "H100 80GB HBM3": (989e12, 3.35e12), "A100-SXM4-80GB": (312e12, 2.04e12)}
GOALS = dict(train=0.5, sample=0.75, ratio=2)  # share of the peak; of the bandwidth at batch 1; of transformers' speed
REAL = dict(seconds=465, rows=512, words=(48, 144), batch=128, micro=32, steps=8, skip=3, dtype=torch.bfloat16, n=8192)
REAL |= dict(copy=2**31, length=512, batches=(1, 8, 64, 256), prompt=128, new=64, shape={})
TINY = dict(seconds=120, rows=16, words=(2, 6), batch=4, micro=2, steps=3, skip=1, dtype=torch.float32, n=256)
TINY |= dict(copy=2**20, length=40, batches=(1, 8), prompt=8, new=8)
TINY |= dict(shape=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=800))
MODELS = {  # name in the table -> file beside this one, and what is changed
    "1B": ("llama-1b.json", {}),
    "7B": ("llama-7b.json", {}),
    "7B, 8 layers": ("llama-7b.json", dict(num_hidden_layers=8)),  # what one card trains with AdamW in float32
    "small": ("llama-1b.json", dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=4)),
}
PARTS = [  # what, model, seconds at most, flags of train.py; the most telling first, since the time may run out
    ("card", "small", 60, []),
    ("train", "1B", 60, []),
    ("sample", "1B", 90, []),
    ("transformers", "1B", 60, []),
    ("train", "1B", 100, ["--compile"]),
    ("sample", "7B", 100, []),
    ("transformers", "7B", 60, []),
    ("train", "1B", 60, ["--activation-checkpointing"]),
    ("train", "7B, 8 layers", 100, ["--compile"]),
    ("transformers, compiled", "1B", 90, []),
    ("train", "1B", 100, ["--compile", "--activation-checkpointing"]),
    ("train", "7B, 8 layers", 60, []),
]


def measure(work, repeats: int = 2, warm: int = 1) -> list[tuple[float, object]]:
    """(seconds, result) of each call of `work` after those that warm up; the device is idle at both ends."""
    found, settle = [], torch.cuda.synchronize if CUDA else lambda: None
    for _ in range(warm + repeats):
        settle()
        start = time.perf_counter()
        result = work()
        settle()
        found.append((time.perf_counter() - start, result))
    return found[warm:]


def emit(what: str, model: str, setting: str, **figures) -> None:
    """Hands a row of the table, with the peak of memory, to the process that writes it."""
    memory = torch.cuda.max_memory_allocated() if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = dict(what=what, model=model, setting=setting, memory_gib=memory / 2**30) | figures
    print("ROW " + json.dumps(row), flush=True)


@contextmanager
def attempt(what: str, model: str, setting: str):
    """What fails within becomes a row. Frees memory first, and counts its peak anew."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    except Exception as e:
        emit(what, model, setting, note=f"failed: {type(e).__name__}: {' '.join(str(e).split())[:200]}")


def random_model(config: ModelConfig, device, dtype, scale: float = 0.02) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, scale) if p.dim() > 1 else p.fill_(1)
    return model.eval()


def random_tokens(config: ModelConfig, batch: int, length: int) -> list[list[int]]:
    return torch.randint(1, config.vocab_size, (batch, length)).tolist()


def weights(config: ModelConfig) -> tuple[int, int]:
    """Weights that a token is multiplied by: of the layers, and of the head."""
    attention = 2 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = config.hidden_size * (attention + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer, config.vocab_size * config.hidden_size


def operations(config: ModelConfig, tokens: int, loss_tokens: int, examples: int) -> float:
    """Of a step: 6 a weight and token, the head's where there is loss, and causal attention; no recomputing."""
    layers, head = weights(config)
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6 * (layers * tokens + head * loss_tokens + width * tokens**2 / examples)  # as if of one length: 0.1 % off


def write_inputs(s) -> None:
    """Configurations, a tokenizer, and pairs with rationales of unequal lengths, as a user has them."""
    for name, (file, changes) in MODELS.items():
        raw = json.loads((ROOT / "benchmarks" / file).read_text()) | changes | s.shape
        (s.folder / f"{name}.json").write_text(json.dumps(raw))
    rng = random.Random(0)
    words = ["".join(rng.choices("ba de fi go ku la me ni so tu".split(), k=rng.randint(1, 4))) for _ in range(900)]
    lines = []
    for _ in range(s.rows):
        texts = [" ".join(rng.choices(words, k=k * rng.randint(*s.words))) for k in (1, 1, 2)]
        row = dict(zip(("source", "reference", "rationale"), texts), source_lang="de", target_lang="en")
        lines.append(json.dumps(row) + "\n")
    (s.folder / "data.jsonl").write_text("".join(lines))
    options = dict(model_type="bpe", vocab_size=700, byte_fallback=True, minloglevel=2, num_threads=1)
    SentencePieceTrainer.train(sentence_iterator=iter(words * 3), model_prefix=str(s.folder / "tokenizer"), **options)


def card(s, name: str, config: ModelConfig) -> None:
    """What the card reaches, and whether the model computes on it what it computes on a CPU."""
    with attempt("card", "", "peaks"):
        a, b = (torch.randn(s.n, s.n, dtype=s.dtype, device=DEVICE) for _ in "ab")
        matmul = 20 * s.n**3 / min(t for t, _ in measure(lambda: [a @ b for _ in range(10)], 5))
        x, y = (torch.ones(s.copy, dtype=torch.uint8, device=DEVICE) for _ in "xy")
        copy = 20 * s.copy / min(t for t, _ in measure(lambda: [x.copy_(y) for _ in range(10)], 5))
        text = f"matrix product {matmul / 1e12:.4g} Tflop/s in {s.dtype}, copy {copy / 1e12:.4g} TB/s, read and written"
        memory = torch.cuda.get_device_properties(0).total_memory if CUDA else 0
        device = torch.cuda.get_device_name() if CUDA else "a CPU, tiny sizes: a rehearsal"
        emit("card", "", "peaks", note=text, card=dict(device=device, memory=memory, matmul=matmul, copy=copy))
    torch.manual_seed(0)
    reference = random_model(config, "cpu", torch.float32, 0.05)
    prompts = [random_tokens(config, 1, s.length // k)[0] for k in (1, 2, 3, 5)]
    wanted = reference(torch.tensor(prompts[:1])).detach()
    for dtype, tolerance in (torch.float32, 1e-4), (torch.bfloat16, 0.1):
        model = Transformer(config).to(DEVICE, dtype).eval()
        model.load_state_dict(reference.state_dict())
        with attempt("card", name, f"logits, {dtype}"), torch.no_grad():
            gap = (model(torch.tensor(prompts[:1], device=DEVICE)).float().cpu() - wanted).abs().max()
            text = f"at most {gap:.2g} from a CPU's in float32, which reach {wanted.abs().max():.3g}"
            assert gap < tolerance * wanted.abs().max(), text
            emit("card", name, f"logits, {dtype}", note=text)
        with attempt("card", name, f"sampler, {dtype}"), torch.no_grad():
            gap = 0.0
            for i, ids, logprobs, _ in sample(model, prompts, 16, batch_size=3):  # the fourth takes a slot that is free
                logits = model(torch.tensor([prompts[i] + ids], device=DEVICE))[0, len(prompts[i]) - 1 : -1].float()
                scores = logits.log_softmax(-1)[range(len(ids)), ids].cpu()
                gap = max(gap, (scores - torch.tensor(logprobs)).abs().max().item())
                assert dtype != torch.float32 or logits.argmax(-1).tolist() == ids, f"prompt {i}: other tokens"
            text = f"log-probabilities at most {gap:.2g} from a full forward pass without a cache"
            assert gap < tolerance * wanted.abs().max(), text
            emit("card", name, f"sampler, {dtype}", note=text)


def decoding(s, what: str, model: str, setting: str, config: ModelConfig, batch: int, run) -> None:
    """A row for `run(n)`, the seconds in which `batch` prompts are read and n tokens sampled after each."""
    with attempt(what, model, setting):
        first, all = run(1), run(1 + s.new)
        step = max(all - first, 1e-9) / s.new
        slots = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # numbers cached a token
        read = s.dtype.itemsize * (sum(weights(config)) + batch * slots * (s.prompt + s.new / 2))
        text = f"{1e3 * step:.2f} ms a step, {1e3 * first:.0f} ms to the first token"
        emit(what, model, setting, batch=batch, tokens_s=batch / step, bytes_s=read / step, note=text)


def ours(s, name: str, config: ModelConfig) -> None:
    """Sampling as generate.py does it: temperature 1, prompts of one length, no EOS; compiled, at two sizes."""
    model, prompts = random_model(config, DEVICE, s.dtype), random_tokens(config, 3 * max(s.batches), s.prompt)
    for compiled in (False, True):
        if compiled:
            model.compile_layers(coordinate_descent_tuning=True)
        for batch in s.batches[::2] if compiled else s.batches:
            setting = f"batch {batch}" + ", compiled" * compiled
            work = partial(waves, model, prompts[: 3 * batch], batch)
            decoding(s, "sample", name, setting, config, batch, work)


def waves(model: Transformer, prompts: list[list[int]], batch: int, n: int) -> float:
    """Seconds of a wave of `batch` rows, the first of three left out: in it CUDA graphs are made, once for a run."""
    options = dict(max_new_tokens=n, temperature=1.0, batch_size=batch)
    ends = [time.perf_counter() for _ in sample(model, prompts, **options)]
    return (ends[-1] - ends[batch - 1]) / 2


def their_model(s, name: str, dtype):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**json.loads((s.folder / f"{name}.json").read_text()))
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def their_sampling(s, name: str, config: ModelConfig, compiled: bool) -> None:
    model = their_model(s, name, s.dtype).eval()
    model.generation_config.eos_token_id = None
    options = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
    options |= dict(cache_implementation="static") if compiled else {}  # which makes it compile the step on a GPU

    def generate(ids: torch.Tensor, n: int) -> None:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, **options)
        assert out.shape[1] == s.prompt + n, "ended early"

    def run(ids: torch.Tensor, n: int) -> float:
        return median(t for t, _ in measure(partial(generate, ids, n)))

    for batch in [b for b in (1, 8, 64) if b in s.batches]:
        ids = torch.tensor(random_tokens(config, batch, s.prompt), device=DEVICE)
        setting = f"batch {batch}" + ", compiled" * compiled
        decoding(s, "transformers", name, setting, config, batch, partial(run, ids))


def their_training(s, name: str, config: ModelConfig, compiled: bool) -> None:
    """As the libraries advise: float32 weights, autocast, sdpa, fused AdamW, labels."""
    model = their_model(s, name, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
    forward, encoder = torch.compile(model, dynamic=True) if compiled else model, Encoder(Tokenizer(s.folder))
    examples = [encoder.example(row) for row in read_rows([str(s.folder / "data.jsonl")])]
    batches = iter([random.sample(examples, s.batch) for _ in range(s.steps)])

    def step() -> tuple[int, float]:
        batch = sorted(next(batches), key=len, reverse=True)
        for part in [batch[i : i + s.micro // 2] for i in range(0, len(batch), s.micro // 2)]:  # more: no room
            tokens, select, targets, _ = collate(part, DEVICE)
            labels = torch.full_like(tokens, -100)
            labels.view(-1)[select] = targets
            # pads stand on the right, so causality keeps them out: an attention mask would only cost time
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=s.dtype == torch.bfloat16):
                loss = forward(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False).loss
            (loss * len(part) / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(map(len, batch))
        return tokens, operations(config, tokens, tokens - sum(len(e.prompt) for e in batch), len(batch))

    with attempt("transformers", name, "training" + ", compiled" * compiled):
        found = measure(step, s.steps - s.skip, s.skip)
        tokens_s, operations_s = (median(result[i] / t for t, result in found) for i in (0, 1))
        emit("transformers", name, "training" + ", compiled" * compiled, tokens_s=tokens_s, operations_s=operations_s)


def theirs(s, name: str, config: ModelConfig, compiled: bool = False) -> None:
    their_sampling(s, name, config, compiled)
    label = name.replace("7B", "7B, 8 layers")
    their_training(s, label, ModelConfig.from_file(s.folder / f"{label}.json"), compiled)


def launch(command: list[str], limit: float, heard) -> tuple[int, str]:
    """Runs a command for at most `limit` seconds, its lines going to `heard` -> status, and why it failed if it did."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    p = subprocess.Popen([sys.executable, *command], cwd=ROOT, start_new_session=True, **pipes)
    timer, lines = threading.Timer(limit, os.killpg, (p.pid, signal.SIGKILL)), [""]
    timer.start()
    try:
        for line in map(str.strip, p.stdout):
            lines.append(line)
            heard(line)
        status = p.wait()
    finally:  # also where this process is told to stop
        timer.cancel()
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
    reason = next((line for line in reversed(lines) if "rror" in line), lines[-1])
    return status, f"stopped after {limit:.0f} s" if status == -signal.SIGKILL else reason[:200]


def train(s, name: str, flags: list[str], limit: float, known: str) -> dict:
    """Trains by the command line -> the figures that it wrote, and beside them what --dry-run foretold."""
    if any(flag not in known for flag in flags):
        return dict(note="n/a: train.py has no such flag")
    config, out = ModelConfig.from_file(s.folder / f"{name}.json"), s.folder / "out"
    options = {"--config": s.folder / f"{name}.json", "--tokenizer": s.folder, "--data": s.folder / "data.jsonl"}
    options |= {"--out": out, "--dtype": str(s.dtype).removeprefix("torch."), "--batch-size": s.batch}
    options |= {"--micro-batch-size": s.micro, "--max-steps": s.steps, "--save-every": 0}
    command, said = ["train.py", *(str(x) for pair in options.items() for x in pair), *flags], []
    if "--dry-run" in known:
        launch([*command, "--dry-run"], limit, said.append)
    status, reason = launch(command, limit, print)
    if status:
        return dict(note=f"failed: {reason}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][s.skip :]
    shutil.rmtree(out)
    loss_tokens = [x["reference_tokens"] + x["rationale_tokens"] for x in lines]
    done = [operations(config, x["tokens"], n, s.batch) / x["seconds"] for x, n in zip(lines, loss_tokens)]
    text = f"train.py says mfu {median(x['mfu'] for x in lines):.1%}; --dry-run: {foretold(said, flags)}"
    figures = dict(operations_s=median(done), memory_gib=max(x["memory_gib"] for x in lines), note=text)
    return figures | dict(tokens_s=median(x["tokens"] / x["seconds"] for x in lines))


def foretold(said: list[str], flags: list[str]) -> str:
    """Of the table that --dry-run prints, the memory of one rank."""
    cells = [line.split() for line in said]
    header = next((row for row in cells if "ranks" in row[:1]), [])
    row = dict(zip(header, next((row for row in cells if row[:1] == ["1"]), [])))
    total = row.get("total'" if "--activation-checkpointing" in flags else "total")
    return f"{total} GiB" if total else (said or ["n/a"])[-1]


class Table:
    """The rows, printed as they come and written anew after each, so that nothing is lost where the time runs out."""

    def __init__(self, out: Path):
        self.out, self.rows, self.lines, self.card = out, [], [], {}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split() if shutil.which(query[0]) else []
        self.title = f"torch {torch.__version__}; driver {' '.join(driver[:1]) or 'none'}; {time.strftime('%Y-%m-%d')}"

    def add(self, what: str, model: str, setting: str, note: str = "", **row) -> None:
        self.card |= row.get("card", {})
        device = self.card.get("device", "no card was measured")
        sheet, shares = next((rates for name, rates in SHEETS.items() if name in device), (0, 0)), ["", ""]
        for i, (rate, peak) in enumerate([("operations_s", "matmul"), ("bytes_s", "copy")]):
            if rate in row:
                peaks = self.card.get(peak), sheet[i]
                shares = [f"{row[rate] / p:.1%}" if p else "n/a" for p in peaks]
                if what in GOALS and peaks[0] and row.get("batch", 1) == 1:
                    verdict = "reached" if row[rate] / peaks[0] >= GOALS[what] else "not reached"
                    note = f"goal {GOALS[what]:.0%}: {verdict}; {note}"
        speed, memory = (
            f"{row[name]:,.{d}f}" if name in row else "" for name, d in (("tokens_s", 0), ("memory_gib", 1))
        )
        cells = [cell.replace("|", "/") for cell in (what, model, setting, speed, *shares, memory, note)]
        self.rows.append(dict(what=what, model=model, setting=setting, note=note) | row)
        self.lines.append(f"| {' | '.join(cells)} |")
        print(self.lines[-1], flush=True)
        head = [
            "what",
            "model",
            "setting",
            "tokens/s",
            "of measured peak",
            "of data sheet",
            "GiB",
            "what else was seen",
        ]
        text = "Shares are of operations in training and of bytes read in sampling; goals are for the measured peak."
        intro = [f"# {device}; {self.title}", "", f"`python benchmarks/gpu.py`, random weights. {text}", ""]
        lines = [*intro, f"| {' | '.join(head)} |", "|---" * len(head) + "|", *self.lines]
        self.out.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def compare(self) -> None:
        """Rows for our fastest setting beside transformers' fastest."""
        fastest = {}
        for row in sorted((row for row in self.rows if "tokens_s" in row), key=lambda row: row["tokens_s"]):
            theirs = row["what"].startswith("transformers")
            fastest.setdefault((row["model"], row.get("batch")), {})[theirs] = row
        for (model, _), pair in fastest.items():
            if len(pair) == 2:
                ratio, settings = (
                    pair[False]["tokens_s"] / pair[True]["tokens_s"],
                    (pair[k]["setting"] for k in (False, True)),
                )
                verdict = "reached" if ratio >= GOALS["ratio"] else "not reached"
                text = f"goal {GOALS['ratio']}: {verdict}; {ratio:.2f} times as fast as transformers"
                self.add("ratio", model, " / ".join(settings), text)


def main(args: argparse.Namespace) -> int:
    s = SimpleNamespace(**(TINY if args.smoke else REAL), folder=args.folder)
    if args.part:
        if "transformers" not in args.part:
            start_processes()  # as our scripts do
        work = {"card": card, "sample": ours, "transformers": theirs}
        work["transformers, compiled"] = partial(theirs, compiled=True)
        work[args.part](s, args.model, ModelConfig.from_file(s.folder / f"{args.model}.json"))
        return 0
    if not CUDA and not args.smoke:
        sys.stderr.write("error: no CUDA device here; run this on a machine with a GPU, or rehearse with --smoke\n")
        return 2
    os.environ["PYTHONUNBUFFERED"] = "1"
    if args.smoke:  # the flags are rehearsed, not the compiler
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end, table, known = time.monotonic() + s.seconds, Table(args.out.resolve()), []
    launch(["train.py", "--help"], 60, known.append)

    def heard(line: str) -> None:
        table.add(**json.loads(line[4:])) if line.startswith("ROW ") else print(line, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        s.folder = Path(folder)
        write_inputs(s)
        for what, name, limit, flags in PARTS:
            limit, row = (
                min(limit, end - time.monotonic()),
                dict(what=what, model=name, setting=" ".join(flags) or "plain"),
            )
            if args.smoke and ("7B" in name or what.endswith("compiled") or (what == "train" and len(flags) < 2)):
                continue  # of the same tiny shape; the flags are rehearsed together, the compiler not at all
            if limit < 10:
                table.add(**row, note="n/a: no time left")
            elif "transformers" in what and not find_spec("transformers"):
                table.add(**row, note="n/a: transformers is not installed")
            elif what == "train":
                table.add(**row, **train(s, name, flags, limit, " ".join(known)))
            else:
                command = [__file__, "--part", what, "--model", name, "--folder", folder]
                status, reason = launch(command + ["--smoke"] * args.smoke, limit, heard)
                if status:
                    table.add(**row, note=f"failed: {reason}")
        if not args.smoke:
            layers, head = weights(ModelConfig.from_file(s.folder / "7B.json"))
            need = 16 * (layers + 2 * head) / 1e9  # weights, gradients and two moments in float32
            text = f"n/a: AdamW in float32 needs {need:.3g} GB, the card has {table.card.get('memory', 0) / 1e9:.3g}"
            table.add("train", "7B", "plain", text)
    table.compare()
    print(f"wrote {table.out}")
    return int(any(row["note"].startswith("failed") for row in table.rows))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Checks and measures everything that needs a GPU, in at most 8 minutes.")
    p.add_argument("--out", type=Path, default=Path("benchmarks-gpu.md"), help="Markdown table (benchmarks-gpu.md)")
    p.add_argument("--smoke", action="store_true", help="rehearse on a CPU with tiny sizes")
    p.add_argument("--part", help=argparse.SUPPRESS)  # these three: what a process of its own does
    p.add_argument("--model", help=argparse.SUPPRESS)
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    sys.exit(main(p.parse_args()))
