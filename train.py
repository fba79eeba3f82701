"""Training with the joint loss of RaDis (step 2), sharded over any number of processes.

    python train.py --model DIR --data rationales.jsonl --out tuned
    torchrun --nproc-per-node 8 train.py --model DIR --data rationales.jsonl --out tuned

Over all examples of an optimizer step, whichever rank and micro-batch they fall on, with weight w on the rationales,

    loss = (sum of -log P(y_t | y_<t, I, x)  +  w * sum of -log P(r_t | r_<t, y, I, x)) / (reference + rationale tokens)

Weight 0, or data without rationales, is vanilla fine-tuning. The order of the data is a function of seed and step, so a
run that is stopped goes on (--resume) and ends in the same weights.
"""

import hashlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.func import functional_call
from torch.utils.benchmark import Timer

import data
from data import Encoder, Example, Tokenizer
from model import ModelConfig, Transformer, load_weights, read_index, save_weights, start_processes

# arguments that change speed, memory or what is written, never the update
FREE = "resume out micro_batch_size save_every export_every valid valid_every activation_checkpointing compile dry_run"
TOKENIZER_FILES = ("tokenizer.model", "*token*.json", "chat_template.jinja", "generation_config.json")
SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt")
PART_COST = 2000 if torch.cuda.is_available() else 80  # what a micro-batch costs besides its tokens, in tokens
STEP = (
    "{step:6d}/{steps}  loss {loss:.4f}  reference {reference_loss:.4f}  rationale {rationale_loss:.4f}  "
    "lr {learning_rate:.2e}  norm {grad_norm:6.2f}  {speed:7,.0f} tokens/s  mfu {mfu:4.0%}  {memory_gib:5.2f} GiB"
)


def say(text: str) -> None:
    """Prints from rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def read_examples(files: list[str], args: Namespace, tokenizer: Tokenizer, config: ModelConfig) -> list[Example]:
    """Encodes the rows of `files`. Rows that are too long are left out whole; rank 0 says how many."""
    # weight 0 is vanilla: the reference ends the answer, so it gets the EOS
    coverage = args.rationale_coverage if args.rationale_weight else 0
    encoder = Encoder(tokenizer, data.read_template(args.template), args.system, coverage, args.keep_all)
    rows = data.read_rows(files, args.direction)
    examples = [encoder.example(row) for row in rows]
    length = min(args.max_length, config.max_position_embeddings)
    long = [str(e.id) for e in examples if len(e) > length]
    examples = [e for e in examples if len(e) <= length]
    text = f"{' '.join(files)}: {len(examples)} examples, {len(long)} longer than {length} tokens left out"
    text += f" (first {', '.join(long[:5])})" if long else ""
    notes = Counter(e.note if args.rationale_weight else "weight 0" for e in examples if e.note)
    say(text + data.without_meta(rows) + "".join(f", {n} rationales left out ({note})" for note, n in notes.items()))
    if not examples:
        raise ValueError(f"{files[0]}: no row fits --max-length {length}; raise it")
    if max(max(e.tokens) for e in examples) >= config.vocab_size:
        raise ValueError(f"{tokenizer.folder}: has ids beyond the model's vocabulary, {config.vocab_size}; use its own")
    return examples


def batch_of(examples: list[Example], step: int, args: Namespace) -> list[Example]:
    """The examples of `step` (from 0): each once an epoch, in an order that hangs on (seed, epoch) alone."""
    epoch, i = divmod(step, math.ceil(len(examples) / args.batch_size))
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
    order = torch.randperm(len(examples), generator=generator)
    return [examples[j] for j in order[i * args.batch_size : (i + 1) * args.batch_size].tolist()]


def micro_batches(examples: list[Example], size: int, world_size: int) -> list[list[Example]]:
    """Splits a batch into parts of like lengths, at most `size` each; rank r takes [r::world_size], as many as any.

    Of all cuts of the rows, in order of length, into rounds of a part a rank, the one that costs the fewest tokens.
    """
    rows, best = sorted(examples, key=len, reverse=True), [(0, [])]  # the cost, and the cuts, of the first rows
    starts = range(0, len(rows), world_size)
    for end in range(1, len(starts) + 1):
        options = range(max(0, end - size), end)
        costs = [best[i][0] + PART_COST + (end - i) * len(rows[starts[i]]) for i in options]
        i = options[costs.index(min(costs))]
        best.append((min(costs), [*best[i][1], rows[starts[i] : end * world_size]]))
    # with few rows some parts are empty: no loss, but every rank must take part in every reduction
    n = world_size
    return [r[len(r) * i // n : len(r) * (i + 1) // n] for r in best[-1][1] for i in range(n)]


def learning_rate(step: int, steps: int, args: Namespace) -> float:
    """Rate at `step` (from 0) of `steps`: linear warm-up, then one of four schedules."""
    warmup = args.warmup_steps if args.warmup_steps is not None else math.ceil(0.03 * steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)  # 0 to just under 1
    shapes = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    shapes["inverse_sqrt"] = math.sqrt(max(warmup, 1) / (max(warmup, 1) + step - warmup))
    return args.learning_rate * shapes[args.schedule]


class CrossEntropy(torch.autograd.Function):
    """-log P [N] of targets [N] under logits [N, V], in float32, some rows at a time.

    The gradient takes the place of the logits in memory, where nothing else of a step is as large.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.save_for_backward(logits, targets)
        size = ctx.size = max(64, 2**27 // logits.shape[1]) if logits.is_cuda else 64  # a GPU wants more: half a GiB
        rows = zip(logits.split(size), targets.split(size))
        return torch.cat([F.cross_entropy(x.float(), t, reduction="none") for x, t in rows])

    @staticmethod
    def backward(ctx, gradient):
        logits, targets = ctx.saved_tensors
        for x, t, g in zip(*(y.split(ctx.size) for y in (logits, targets[:, None], gradient[:, None]))):
            p = x.float().softmax(-1)
            x.copy_(p.scatter_add_(1, t, -torch.ones_like(g)).mul_(g))
        return logits.detach(), None


def run(model: Transformer, examples: list[Example], args: Namespace, learn: bool) -> dict:
    """Forward over `examples`, shared out among the ranks, and backward if `learn` -> the losses over all ranks."""
    world_size, device = dist.get_world_size(), next(model.parameters()).device
    # every rank knows the whole step, so the number of its supervised tokens needs no communication
    reference_tokens = sum(len(e.reference) for e in examples)
    rationale_tokens = sum(len(e.rationale) for e in examples)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    parts = micro_batches(examples, args.micro_batch_size, world_size)
    for part in parts[dist.get_rank() :: world_size]:
        tokens, select, targets, is_rationale = data.collate(part, device)
        # logits [N, V]: none where there is no loss
        losses = CrossEntropy.apply(model(tokens, select), targets).double()  # [N]
        reference, rationale = losses.where(~is_rationale, 0).sum(), losses.where(is_rationale, 0).sum()
        loss = (reference + args.rationale_weight * rationale) / (reference_tokens + rationale_tokens)
        if learn:
            (loss * world_size).backward()  # fully_shard averages gradients over ranks: multiply by their number
        sums += torch.stack([loss, reference, rationale]).detach()
    sums = sums.cpu()  # once: a GPU would wait for it at every micro-batch
    dist.all_reduce(sums)
    loss, reference, rationale = sums.tolist()
    return dict(
        loss=loss,
        reference_loss=reference / reference_tokens if reference_tokens else None,  # means over their own tokens
        rationale_loss=rationale / rationale_tokens if rationale_tokens else None,
        reference_tokens=reference_tokens,
        rationale_tokens=rationale_tokens,
        tokens=sum(map(len, examples)),
        padded_tokens=sum(len(part) * len(part[0]) for part in parts if part),
    )


def train_step(model, optimizer, examples: list[Example], step: int, rate: float, args: Namespace) -> dict:
    """One optimizer step. ValueError, before the weights are touched, where the loss or the gradient is not finite."""
    line = run(model, examples, args, learn=True)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf).full_tensor().item()
    if not math.isfinite(line["loss"]) or not math.isfinite(norm):
        found = f"step {step}: loss {line['loss']}, gradient norm {norm}; the weights are as they were"
        ids = ", ".join(str(e.id) for e in examples)
        raise ValueError(f"{found}: lower --learning-rate, or look at the rows of this step, ids {ids}")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return {"step": step} | line | {"grad_norm": norm, "learning_rate": rate}


@torch.no_grad()
def validate(model, valid: dict[str, list[Example]], step: int, args: Namespace) -> None:
    """Measures the loss on each set of `valid`, as one line of metrics each."""
    model.eval()
    for name, examples in valid.items():
        line = run(model, examples, args, learn=False)
        line = {"step": step, "valid": name, "valid_loss": line.pop("loss")} | line
        report(line, "{step:6d}  valid {valid}  loss {valid_loss:.4f}", args)
    model.reshard()  # without a backward pass the root stays whole, and its parameters are other tensors
    model.train()


def report(line: dict, text: str, args: Namespace, **more) -> None:
    """Appends a line to metrics.jsonl and prints it, and `more`, as `text` says; from rank 0."""
    with together(args.out) as first:
        if first:
            with open(Path(args.out) / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
    say(text.format(**{name: x or 0 for name, x in line.items()}, **more))


def costs(model: Transformer, examples: list[Example], seconds: float, peak: float) -> dict:
    """Time, memory, and the share of `peak` (operations a second) that a step of `seconds` on `examples` used."""
    config, layers = model.config, sum(p.numel() for p in model.model["layers"].parameters())
    head = config.vocab_size * config.hidden_size * sum(len(e.reference) + len(e.rationale) for e in examples)
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    # 6 operations a weight and token, of the head only where there is loss, and 6 * width * T^2 of causal attention
    operations = 6 * (head + sum(layers * len(e) + width * len(e) ** 2 for e in examples))
    return dict(seconds=seconds, mfu=operations / seconds / peak, memory_gib=peak_memory() / 2**30)


def peak_memory() -> int:
    """Bytes at the most so far: on a GPU of tensors, on a CPU of the process, Python and PyTorch included."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_rate(dtype: torch.dtype, device) -> float:
    """Operations a second that a plain matrix product of `dtype` reaches here: the peak that mfu refers to."""
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(n, n, dtype=dtype, device=device)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=0.1).median


def kept_bytes(config: ModelConfig, part: list[Example], dtype: torch.dtype, recompute: bool) -> tuple[int, int]:
    """What a forward pass over `part` keeps for the backward pass, all and a layer, on tensors that take no memory."""
    kept, totals = {}, []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    for layers in (1, 2):  # every layer keeps the same
        with torch.device("meta"):
            model = Transformer(replace(config, num_hidden_layers=layers))
        model.activation_checkpointing = recompute
        with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            weights = {n: torch.empty(p.shape, dtype=dtype, requires_grad=True) for n, p in model.named_parameters()}
            tokens, select, targets, _ = data.collate(part)
            losses = CrossEntropy.apply(functional_call(model, weights, (tokens, select)), targets)
        own = {p.untyped_storage()._cdata for p in weights.values()}
        totals.append(sum(size for storage, size in kept.items() if storage not in own))
        kept.clear()
        del losses  # which held all that was kept: no storage could take another's place
    layer = totals[1] - totals[0]
    return totals[0] + (config.num_hidden_layers - 1) * layer, layer


def memory(config: ModelConfig, part: list[Example], dtype: torch.dtype, base: int, ranks: list[int]) -> list[dict]:
    """Bytes of a rank, by part, at the peak of a step with micro-batches like `part`: as the backward pass begins."""
    with torch.device("meta"):
        model = Transformer(config)
    layer = sum(p.numel() for p in model.model["layers"][0].parameters())
    rest = sum(p.numel() for name, p in model.named_parameters() if "layers" not in name)
    logits = dtype.itemsize * config.vocab_size * sum(len(e.reference) + len(e.rationale) for e in part)
    (kept, one), (inputs, _) = (kept_bytes(config, part, dtype, recompute) for recompute in (False, True))
    table = []
    for n in ranks:
        shard = 4 * sum(-(-p.shape[0] // n) * p[0].numel() for p in model.parameters())  # whole rows, in float32
        line = dict(base=base, weights=shard, gradients=shard, optimizer=2 * shard)
        # two layers, one gathered while the other computes; embedding and head, their gradients (a tied head has two,
        # yet to be added), and the copy in float32 that the reduction over ranks reads
        gathered = 2 * (rest + layer) + rest * config.tie_word_embeddings
        line |= dict(unsharded=gathered * dtype.itemsize + 4 * rest, activations=kept)
        line["total"] = sum(line.values())
        line["recomputed"] = inputs + max(0, one - logits)  # a layer at a time, once the logits are gone
        table.append({"ranks": n} | line | {"total'": line["total"] - kept + line["recomputed"]})
    return table


def dry_run(config: ModelConfig, examples: list[Example], steps: int, args: Namespace) -> None:
    """Prints what a run would take; writes nothing."""
    batches = [batch_of(examples, step, args) for step in range(math.ceil(len(examples) / args.batch_size))]
    parts = [p for b in batches for p in micro_batches(b, args.micro_batch_size, dist.get_world_size()) if p]
    tokens, padded = sum(map(len, examples)), sum(len(part) * len(part[0]) for part in parts)
    supervised = sum(len(e.reference) + len(e.rationale) for e in examples)
    text = f"{len(examples):,} examples, {tokens:,} tokens, {supervised:,} of them supervised; "
    say(f"{text}{padded:,} with padding ({padded / tokens - 1:.1%} more); {steps:,} steps")
    largest = max(parts, key=lambda part: len(part) * len(part[0]))
    say(f"GiB a rank, micro-batches up to {len(largest)} x {len(largest[0])} tokens; last two columns: recomputed")
    ranks = sorted({dist.get_world_size(), *(2**i for i in range(7))})
    table = memory(config, largest, getattr(torch, args.dtype), peak_memory(), ranks)
    say("  ".join(table[0]))
    for line in table:
        sizes = (f"{x / 2**30:{len(name)}.2f}" for name, x in line.items() if name != "ranks")
        say("  ".join([f"{line['ranks']:5}", *sizes]))


def shard(model: Transformer, args: Namespace, device, index: dict | None) -> None:
    """Fills a model on `meta` in shards, none of them whole: float32 weights and reduction, compute in --dtype."""
    compute = torch.bfloat16 if args.dtype == "bfloat16" else None
    # by default the float32 cos and sin would be cast at every block
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = torch.distributed.init_device_mesh(device.type, (dist.get_world_size(),))
    if args.compile:
        model.compile_layers()
    for module in [*model.model["layers"], model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    model.activation_checkpointing = args.activation_checkpointing
    if index:
        load_weights(dict(model.named_parameters()), index)
    else:
        model.initialize(args.seed)


@contextmanager
def together(out: str | Path):
    """Writes below `out`; what fails on one rank raises on all, so that none waits for others. -> whether rank 0."""
    error, errors = None, [None] * dist.get_world_size()
    try:
        yield dist.get_rank() == 0
    except OSError as e:
        error = str(e)
    dist.all_gather_object(errors, error)
    if any(errors):
        raise OSError(f"{out}: {next(filter(None, errors))}; free space, then go on with --resume")


def state(model, optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint holds, by folder and name: weights and both moments of Adam."""
    named = dict(model.named_parameters())
    moments = {m: {name: optimizer.state[p][m] for name, p in named.items()} for m in ("exp_avg", "exp_avg_sq")}
    return {"weights": named} | moments


def save_checkpoint(model, optimizer, out: Path, step: int) -> None:
    """Writes `state` as safetensors, readable on any number of ranks; appears whole or not at all."""
    folder = out / "checkpoint" / f"step-{step}"
    temporary = folder.with_suffix(".tmp")
    for name, tensors in state(model, optimizer).items():
        with together(out):
            save_weights(tensors, temporary / name, torch.float32)
    with together(out) as first:
        if first:
            temporary.rename(folder)
            for old in set(folder.parent.iterdir()) - {folder}:
                shutil.rmtree(old)


def load_checkpoint(model, optimizer, out: Path) -> int:
    """Restores the newest complete checkpoint -> steps done; 0 where there is none. Cuts the metrics back to it."""
    done = max((int(f.name[5:]) for f in (out / "checkpoint").glob("step-*[0-9]")), default=0)
    if done:
        for p in model.parameters():
            step = torch.tensor(float(done), device=p.device)
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for name, tensors in state(model, optimizer).items():
            shapes = {name: t.shape for name, t in tensors.items()}
            load_weights(tensors, read_index(out / "checkpoint" / f"step-{done}" / name, shapes))
    metrics = out / "metrics.jsonl"
    if dist.get_rank() == 0 and metrics.exists():
        # without a torn last line; the lines are ASCII and in the order of the steps
        lines = metrics.read_text("utf-8").split("\n")[:-1]
        os.truncate(metrics, sum(len(line) + 1 for line in lines if json.loads(line)["step"] <= (done or -1)))
    return done


def export(model: Transformer, folder: Path, source: str, dtype: str) -> None:
    """Writes a model folder in the compute type, the very weights of the forward pass, with its tokenizer files."""
    temporary = folder / "export.tmp"  # within, so on the same file system
    with together(folder) as first:
        model.save_pretrained(temporary, getattr(torch, dtype))
        if first:
            for file in [f for pattern in TOKENIZER_FILES for f in Path(source).glob(pattern) if f.is_file()]:
                shutil.copyfile(file, temporary / file.name)
            for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
                file.replace(folder / file.name)  # config.json last: it says that all is there
            temporary.rmdir()


def open_run(args: Namespace, examples: list[Example]) -> bool:
    """Prepares --out, or checks that it is the same run -> whether that is finished. Nothing there is overwritten."""
    out, file, digest = Path(args.out), Path(args.out) / "args.json", hashlib.sha256()
    for e in examples:
        digest.update(f"{e.id} {e.prompt} {e.reference} {e.rationale}\n".encode())
    mine = vars(args) | {"data_hash": digest.hexdigest()[:16]}
    if file.exists() and args.resume:
        old = json.loads(data.read_text(file))
        for name in mine:
            if name not in FREE.split() and old.get(name) != mine[name]:
                raise ValueError(f"{file}: {name} was {old.get(name)}, now {mine[name]}; --resume needs the same run")
    elif out.exists() and any(out.iterdir()):
        way = "go on with --resume, or" if file.exists() else "and holds no run to go on with;"
        raise ValueError(f"{out}: is not empty; {way} choose another --out")
    dist.barrier()  # until all have looked
    with together(out) as first:
        if first and not file.exists():
            data.write_text(file, json.dumps(mine, indent=2, ensure_ascii=False))
    return (out / "config.json").exists()


def heed_signals() -> list[int]:
    """SIGTERM and Ctrl-C enter the returned list, which ends the run after its step; a second one ends it at once."""
    received = []

    def heed(number: int, _) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heed)
    return received


def main(args: Namespace) -> None:
    # 1. processes
    rank, world_size, device = start_processes()
    out = Path(args.out)

    # 2. headers and data: what can be wrong is found before any weight is read
    source = args.tokenizer or args.model
    if not source or bool(args.model) == bool(args.config):
        raise ValueError("give --model, or --config with --tokenizer")
    config = ModelConfig.from_file(args.config or Path(args.model) / "config.json")
    with torch.device("meta"):
        model = Transformer(config)
    index = read_index(args.model, {name: p.shape for name, p in model.named_parameters()}) if args.model else None
    tokenizer, sets = Tokenizer(source, args.chat), data.named_files(args.valid)
    examples = read_examples(args.data, args, tokenizer, config)
    valid = {name: read_examples(files, args, tokenizer, config) for name, files in sets.items()}
    steps = args.max_steps or math.ceil(args.epochs * math.ceil(len(examples) / args.batch_size))
    if args.dry_run:
        return dry_run(config, examples, steps, args)
    if open_run(args, examples):
        return say(f"{out}: this run is finished")

    # 3. model and optimizer; norms and biases are not decayed
    shard(model, args, device, index)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)

    # 4. where we are
    done = load_checkpoint(model, optimizer, out) if args.resume else 0
    peak = matmul_rate(getattr(torch, args.dtype), device) * world_size
    count = sum(p.numel() for p in model.parameters())
    say(f"{count:,} parameters, {world_size} x {device.type}, {peak / 1e12:.3g} Tflop/s; steps {done} to {steps}")
    if done == 0:
        validate(model, valid, 0, args)

    # 5. the loop
    signals = heed_signals()
    for step in range(done + 1, steps + 1):
        start = time.perf_counter()
        batch, rate = batch_of(examples, step - 1, args), learning_rate(step - 1, steps, args)
        line = train_step(model, optimizer, batch, step, rate, args)
        line |= costs(model, batch, time.perf_counter() - start, peak)
        report(line, STEP, args, steps=steps, speed=line["tokens"] / line["seconds"])
        if step == steps or (args.valid_every and step % args.valid_every == 0):
            validate(model, valid, step, args)
        if args.export_every and step % args.export_every == 0:
            export(model, out / f"step-{step}", source, args.dtype)
        stop = torch.tensor(float(bool(signals)))
        dist.all_reduce(stop)  # one rank that is told to stop stops all
        if step < steps and (stop or (args.save_every and step % args.save_every == 0)):
            save_checkpoint(model, optimizer, out, step)
        if step < steps and stop:
            say(f"stopped by a signal after step {step}; --resume goes on from here")
            sys.exit(128 + (signals or [signal.SIGTERM])[0])

    # 6. the model
    export(model, out, source, args.dtype)
    if rank == 0:
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
    say(f"wrote {out}")


def parser() -> data.Arguments:
    count, whole, real = data.number(1, kind=int), data.number(0, kind=int), data.number(0)
    p = data.Arguments(description="Fine-tunes a model on references and rationales with one joint loss.")
    p.add_argument("--model", help="model folder to start from")
    p.add_argument("--config", help="config.json of a model to start from random weights; goes with --tokenizer")
    p.add_argument("--tokenizer", metavar="DIR", help="folder with tokenizer.model (default: --model)")
    p.add_argument("--data", required=True, nargs="+", help="ledgers, pairs, conversations, in any mixture")
    p.add_argument("--valid", nargs="+", default=[], metavar="[NAME=]FILE", help="validation sets")
    p.add_argument("--out", required=True, help="folder for model, metrics and checkpoint")
    data.common_arguments(p)
    p.add_argument("--rationale-weight", type=real, default=1.0, help="w in the loss; 0 is vanilla (default 1)")
    p.add_argument("--rationale-coverage", type=data.number(0, 1), default=1.0, help="share of rationales kept (1)")
    p.add_argument("--keep-all", action="store_true", help="keep rationales of rows whose status is not ok")
    p.add_argument("--epochs", type=data.number(1e-6), default=1.0, help="passes over the data (default 1)")
    p.add_argument("--max-steps", type=count, metavar="N", help="optimizer steps, instead of --epochs")
    p.add_argument("--batch-size", type=count, default=128, help="examples of a step, over all ranks (default 128)")
    p.add_argument("--micro-batch-size", type=count, default=8, help="examples of a rank at a time (default 8)")
    p.add_argument("--max-length", type=data.number(2, kind=int), default=1024, help="tokens; longer rows go (1024)")
    p.add_argument("--learning-rate", type=real, default=2e-5, help="peak (default 2e-5)")
    p.add_argument("--schedule", default="cosine", choices=SCHEDULES, help="after warm-up (default cosine)")
    p.add_argument("--warmup-steps", type=whole, metavar="N", help="linear warm-up (default 3 %% of the steps)")
    p.add_argument("--weight-decay", type=real, default=0.0, help="of matrices, decoupled (default 0)")
    p.add_argument("--max-grad-norm", type=real, default=1.0, help="0 switches clipping off (default 1)")
    p.add_argument(
        "--dtype", default=data.default_dtype(), choices=("float32", "bfloat16"), help="compute (here %(default)s)"
    )
    p.add_argument("--seed", type=whole, default=0, help="order of the data, random weights (default 0)")
    p.add_argument("--save-every", type=whole, default=500, help="steps between checkpoints, 0: none (default 500)")
    p.add_argument("--export-every", type=whole, default=0, help="steps between model folders step-N (0: none)")
    p.add_argument("--valid-every", type=whole, default=0, help="steps between validations (0: first and last)")
    p.add_argument("--activation-checkpointing", action="store_true", help="recompute activations: less memory, slower")
    p.add_argument("--compile", action="store_true", help="compile the layers: a slow first step, faster later ones")
    p.add_argument("--dry-run", action="store_true", help="only say what the run would take, memory by part included")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return p


if __name__ == "__main__":
    data.cli(main, parser())
