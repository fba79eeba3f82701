"""Training with the joint loss of RaDis (step 2), sharded over any number of processes.

    python train.py --model DIR --data rationales.jsonl --out tuned
    torchrun --nproc-per-node 8 train.py --model DIR --data rationales.jsonl --out tuned

Over all examples of an optimizer step, whichever rank and micro-batch they fall on, with weight w on the rationales,

    loss = ( sum of -log P(y_t | y_<t, I, x)  +  w * sum of -log P(r_t | r_<t, y, I, x) ) / (reference + rationale tokens)

Weight 0, or data without rationales, is vanilla fine-tuning. The order of the data is a function of seed and step, so a run
that is stopped goes on (--resume) and ends in the same weights.
"""

import argparse
import hashlib
import json
import math
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import data
from data import Encoder, Example, Tokenizer, collate, fit, read_rows
from model import ModelConfig, Transformer, load_weights, read_index, save_weights, start_processes

# arguments that change speed, memory or what is written, never the update
FREE = ("resume", "out", "micro_batch_size", "save_every", "export_every", "valid", "valid_every", "activation_checkpointing")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
                   "chat_template.jinja", "generation_config.json")  # fmt: skip


def read_examples(files: list[str], args: argparse.Namespace, tokenizer: Tokenizer, config: ModelConfig) -> list[Example]:
    """Encodes the rows of `files`. Rows that are too long are left out whole; rank 0 says how many."""
    encoder = Encoder(tokenizer, data.read_template(args.template), args.system, args.rationale_coverage)
    rows = read_rows(files, args.direction)
    if args.rationale_weight == 0:  # vanilla: the reference ends the answer, so it gets its EOS
        encoder.coverage = 0
    length = min(args.max_length, config.max_position_embeddings)
    examples, long = fit([encoder.example(row) for row in rows], length)
    notes = [e.note for e in examples if e.note]
    if dist.get_rank() == 0:
        without = "".join(f", {notes.count(n)} rationales left out ({n})" for n in sorted(set(notes)))
        some = f" (ids {', '.join(str(e.id) for e in long[:5])}{', ...' if len(long) > 5 else ''})" if long else ""
        print(f"{' '.join(files)}: {len(examples)} examples, {len(long)} longer than {length} tokens left out{some}{without}")
    if not examples:
        raise ValueError(f"{files[0]}: no row fits --max-length {length}; raise it")
    top = max(max(e.tokens) for e in examples)
    if top >= config.vocab_size:
        raise ValueError(f"{tokenizer.folder}: its tokenizer gives id {top}, the model's vocabulary is {config.vocab_size}")
    return examples


def batch_of(examples: list[Example], step: int, args: argparse.Namespace) -> list[Example]:
    """The examples of `step` (from 0): each once an epoch, in an order that hangs on (seed, epoch) alone."""
    epoch, i = divmod(step, steps_per_epoch(examples, args))
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
    order = torch.randperm(len(examples), generator=generator)
    return [examples[j] for j in order[i * args.batch_size : (i + 1) * args.batch_size].tolist()]


def steps_per_epoch(examples: list[Example], args: argparse.Namespace) -> int:
    return math.ceil(len(examples) / args.batch_size)


def micro_batches(examples: list[Example], size: int, world_size: int) -> list[list[Example]]:
    """Splits a batch into parts of like lengths, at most `size` each, as many for each rank; rank r takes [r::world_size].

    With few examples some parts are empty: they carry no loss, but every rank must take part in every reduction.
    """
    examples = sorted(examples, key=len, reverse=True)
    n = world_size * math.ceil(len(examples) / (size * world_size))
    cuts = [round(i * len(examples) / n) for i in range(n + 1)]
    return [examples[a:b] for a, b in zip(cuts, cuts[1:])]


def learning_rate(step: int, steps: int, args: argparse.Namespace) -> float:
    """Rate at `step` (from 0) of `steps`: linear warm-up, then one of four schedules."""
    warmup = args.warmup_steps if args.warmup_steps is not None else math.ceil(0.03 * steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)  # 0 to just under 1
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "inverse_sqrt": math.sqrt(max(warmup, 1) / (max(warmup, 1) + step - warmup)),
    }
    return args.learning_rate * factor[args.schedule]


def token_losses(model: Transformer, examples: list[Example], device) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (-log P of each supervised token [N], which of them belong to a rationale [N])."""
    tokens, select, targets, is_rationale = collate(examples, device)
    logits = model(tokens, select)  # [N, V]: no logits where there is no loss
    return F.cross_entropy(logits.float(), targets, reduction="none"), is_rationale


def train_step(model, optimizer, examples: list[Example], args: argparse.Namespace, device, stop: bool) -> dict:
    """One optimizer step on `examples`, the whole step's, of which this rank takes its parts."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    counts = sum(len(e.reference) for e in examples), sum(len(e.rationale) for e in examples)
    parts = micro_batches(examples, args.micro_batch_size, world_size)
    sums = torch.zeros(3, dtype=torch.float64)  # reference, rationale, ranks that were told to stop
    sums[2] = float(stop)
    for part in parts[rank::world_size]:
        losses, is_rationale = token_losses(model, part, device)
        weighted = torch.where(is_rationale, args.rationale_weight * losses, losses).sum()
        # divided by the tokens of the whole step; fully_shard averages gradients over ranks, so multiply by their number
        (weighted * world_size / sum(counts)).backward()
        sums[0] += losses.detach()[~is_rationale].double().sum().cpu()
        sums[1] += losses.detach()[is_rationale].double().sum().cpu()
    dist.all_reduce(sums)
    reference, rationale, stopped = sums.tolist()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf).full_tensor().item()
    loss = (reference + args.rationale_weight * rationale) / sum(counts)
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise ValueError(
            f"loss {loss}, gradient norm {norm}: stopped before the weights were touched; lower --learning-rate or look at "
            f"the rows of this step, ids {', '.join(str(e.id) for e in examples)}"
        )
    optimizer.step()
    optimizer.zero_grad()
    return dict(
        loss=loss,
        **means((reference, rationale), counts),
        tokens=sum(map(len, examples)),
        padded_tokens=sum(len(part) * len(part[0]) for part in parts if part),
        grad_norm=norm,
        stopped=stopped > 0,
    )


def means(sums, counts) -> dict:
    """Losses over their own tokens; EOS counts with the segment it ends. No token, no mean."""
    mean = [s / n if n else None for s, n in zip(sums, counts)]
    return dict(reference_loss=mean[0], rationale_loss=mean[1], reference_tokens=counts[0], rationale_tokens=counts[1])


@torch.no_grad()
def validate(model, examples: list[Example], args: argparse.Namespace, device) -> dict:
    """The loss on `examples`, as in training, over all ranks."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    counts = sum(len(e.reference) for e in examples), sum(len(e.rationale) for e in examples)
    for part in micro_batches(examples, args.micro_batch_size, dist.get_world_size())[dist.get_rank() :: dist.get_world_size()]:
        losses, is_rationale = token_losses(model, part, device)
        sums += torch.stack([losses[~is_rationale].double().sum(), losses[is_rationale].double().sum()]).cpu()
    dist.all_reduce(sums)
    model.train()
    reference, rationale = sums.tolist()
    loss = (reference + args.rationale_weight * rationale) / sum(counts)
    return dict(valid_loss=loss, **means((reference, rationale), counts))


def flops(config: ModelConfig, examples: list[Example]) -> float:
    """Floating-point operations of forward and backward on `examples`: 6 a parameter and token, and causal attention's."""
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + 2 * kv + 3 * config.intermediate_size)
    tokens, supervised = sum(map(len, examples)), sum(len(e.reference) + len(e.rationale) for e in examples)
    attention = 6 * heads * sum(len(e) ** 2 for e in examples)
    layers = config.num_hidden_layers * (6 * layer * tokens + attention)
    return layers + 6 * config.hidden_size * config.vocab_size * supervised


def matmul_rate(dtype: torch.dtype, device) -> float:
    """Floating-point operations a second that a plain matrix product of `dtype` reaches here: the peak that mfu refers to."""
    n = 8192 if device.type == "cuda" else 1024
    a, best = torch.randn(n, n, dtype=dtype, device=device), math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def shard(config: ModelConfig, args: argparse.Namespace, device, index: dict | None) -> Transformer:
    """Builds the model in shards: float32 master weights, compute in --dtype, float32 reduction; no rank holds all of it."""
    with torch.device("meta"):
        model = Transformer(config)
    compute = torch.bfloat16 if args.dtype == "bfloat16" else None
    # by default the float32 cos and sin would be cast at every block
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = torch.distributed.init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model["layers"]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    model.activation_checkpointing = args.activation_checkpointing
    if index:
        load_weights(dict(model.named_parameters()), index)
    else:
        model.initialize(args.seed)
    return model.train()


def together(action) -> None:
    """Runs `action` on every rank; if it fails on one, all of them raise, so that none waits for the others."""
    error = None
    try:
        action()
    except OSError as e:
        error = str(e)
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if any(errors):
        raise OSError(next(e for e in errors if e))


def save_checkpoint(model, optimizer, out: Path, step: int) -> None:
    """Writes weights and both moments as safetensors, readable on any number of ranks; appears whole or not at all."""
    folder = out / "checkpoint" / f"step-{step}"
    temporary, state = folder.with_name(folder.name + ".tmp"), optimizer.state
    named = dict(model.named_parameters())

    def write():
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        save_weights(named, temporary / "weights", torch.float32)
        for moment in ("exp_avg", "exp_avg_sq"):
            save_weights({name: state[p][moment] for name, p in named.items()}, temporary / moment, torch.float32)
        if dist.get_rank() == 0:
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
            for old in folder.parent.iterdir():
                if old != folder:
                    shutil.rmtree(old)

    together(write)


def load_checkpoint(model, optimizer, out: Path) -> int:
    """Restores the newest complete checkpoint -> steps done; 0 where there is none."""
    steps = [int(f.name[5:]) for f in (out / "checkpoint").glob("step-*") if f.name[5:].isdigit()]
    if not steps:
        return 0
    folder, named = out / "checkpoint" / f"step-{max(steps)}", dict(model.named_parameters())
    shapes = {name: p.shape for name, p in named.items()}
    load_weights(named, read_index(folder / "weights", shapes))
    for p in named.values():
        step = torch.tensor(float(max(steps)), device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    for moment in ("exp_avg", "exp_avg_sq"):
        tensors = {name: optimizer.state[p][moment] for name, p in named.items()}
        load_weights(tensors, read_index(folder / moment, shapes))
    return max(steps)


def export(model: Transformer, folder: Path, source: str, dtype: str) -> None:
    """Writes a model folder in the compute type, the very weights that the forward pass used, with its tokenizer files."""
    temporary = folder.with_name(folder.name + ".tmp") if not folder.exists() else folder / "model.tmp"

    def write():
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name in TOKENIZER_FILES:
                if (Path(source) / name).exists():
                    shutil.copyfile(Path(source) / name, temporary / name)
        model.save_pretrained(temporary, getattr(torch, dtype))
        if dist.get_rank() == 0 and not folder.exists():
            temporary.rename(folder)
        elif dist.get_rank() == 0:  # into a folder that is there: config.json comes last and says that all is
            for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
                file.replace(folder / file.name)
            temporary.rmdir()

    together(write)


def open_run(args: argparse.Namespace, examples: list[Example]) -> bool:
    """Prepares --out, or checks that it is the same run -> whether that is finished. Nothing there is overwritten."""
    out, digest = Path(args.out), hashlib.sha256()
    for e in examples:
        digest.update(f"{e.id} {e.prompt} {e.reference} {e.rationale}\n".encode())
    mine = vars(args) | {"data_hash": digest.hexdigest()[:16]}
    file = out / "args.json"
    if file.exists() and args.resume:
        old = json.loads(file.read_text("utf-8"))
        for name, value in mine.items():
            if name not in FREE and old.get(name) != value:
                raise ValueError(f"{file}: {name} was {old.get(name)}, now it is {value}; --resume goes on with the same run")
        return (out / "config.json").exists()
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty; go on with --resume, or choose another --out")
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(mine, indent=2, ensure_ascii=False) + "\n", "utf-8")
        temporary.replace(file)
    return False


def keep_metrics(file: Path, step: int) -> None:
    """Drops the lines after `step`, and a torn last one: those steps are done again."""
    if file.exists():
        lines = [line for line in file.read_text("utf-8").split("\n")[:-1] if json.loads(line)["step"] <= step]
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in lines), "utf-8")
        temporary.replace(file)


def main(args: argparse.Namespace) -> None:
    # 1. processes
    rank, world_size, device = start_processes()
    signalled = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signalled.append(number))

    # 2. data and headers: what can be wrong is found before any weight is read
    folder = args.tokenizer or args.model
    if not folder:
        raise ValueError("give --model, or --config with --tokenizer")
    config = ModelConfig.from_file(args.config or Path(args.model) / "config.json")
    index = None
    if not args.config:
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}
        index = read_index(args.model, shapes)
    tokenizer = Tokenizer(folder, args.chat)
    examples = read_examples(args.data, args, tokenizer, config)
    valid = {name: read_examples(files, args, tokenizer, config) for name, files in data.named_files(args.valid).items()}
    steps = args.max_steps or math.ceil(args.epochs * steps_per_epoch(examples, args))
    out = Path(args.out)
    together(lambda: None)  # every rank has read its arguments before rank 0 makes the folder
    if open_run(args, examples):
        print(f"{out}: this run is finished") if rank == 0 else None
        return
    dist.barrier()

    # 3. model and optimizer
    model = shard(config, args, device, index)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]  # norms and biases are not decayed
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=args.learning_rate, fused=True)

    # 4. where we are
    done = load_checkpoint(model, optimizer, out) if args.resume else 0
    rate = matmul_rate(getattr(torch, args.dtype), device)
    metrics = out / "metrics.jsonl"
    if rank == 0:
        keep_metrics(metrics, done)
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,} parameters, {world_size} x {device.type}, {rate * world_size / 1e12:.3g} Tflop/s; steps {done} to {steps}")

    def log(line: dict) -> None:
        if rank == 0:
            with open(metrics, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")

    def check(step: int) -> None:
        for name, examples in valid.items():
            line = dict(step=step, valid=name, **validate(model, examples, args, device))
            log(line)
            if rank == 0:
                print(f"{step:6d} valid {name}: loss {line['valid_loss']:.4f}", flush=True)

    # 5. the loop
    if done == 0:
        check(0)
    for step in range(done, steps):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args)
        batch = batch_of(examples, step, args)
        try:
            line = train_step(model, optimizer, batch, args, device, bool(signalled))
        except ValueError as e:
            raise ValueError(f"step {step + 1}: {e}") from None
        seconds, stopped = time.perf_counter() - start, line.pop("stopped")
        cuda = device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        line = dict(step=step + 1, **line, learning_rate=group["lr"], seconds=seconds)
        line |= dict(mfu=flops(config, batch) / seconds / (rate * world_size), memory_gib=memory / 2**30)
        log(line)
        if rank == 0:
            rationale = f"{line['rationale_loss']:.4f}" if line["rationale_tokens"] else "     -"
            print(
                f"{step + 1:6d}/{steps}  loss {line['loss']:.4f}  reference {line['reference_loss']:.4f}  rationale {rationale}  "
                f"lr {group['lr']:.2e}  norm {line['grad_norm']:6.2f}  {line['tokens'] / seconds:7,.0f} tokens/s  "
                f"mfu {line['mfu']:4.0%}  {line['memory_gib']:5.2f} GiB", flush=True)  # fmt: skip
        last = step + 1 == steps
        if args.valid_every and (step + 1) % args.valid_every == 0 or last:
            check(step + 1)
        if args.export_every and (step + 1) % args.export_every == 0:
            export(model, out / f"step-{step + 1}", folder, args.dtype)
        if stopped or (args.save_every and (step + 1) % args.save_every == 0 and not last):
            save_checkpoint(model, optimizer, out, step + 1)
        if stopped:
            print(f"stopped by a signal after step {step + 1}; --resume goes on from here") if rank == 0 else None
            sys.exit(143)

    # 6. the model
    export(model, out, folder, args.dtype)
    if rank == 0:
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
        print(f"wrote {out}")


def parser() -> argparse.ArgumentParser:
    number = data.number
    p = data.Arguments(description="Fine-tunes a model on references and rationales with one joint loss.")
    p.add_argument("--model", help="model folder to start from")
    p.add_argument("--config", help="config.json of a model to start from random weights instead; goes with --tokenizer")
    p.add_argument("--tokenizer", metavar="DIR", help="folder with tokenizer.model (default: --model)")
    p.add_argument("--data", required=True, nargs="+", help="ledgers, pairs, conversations, in any mixture")
    p.add_argument("--valid", nargs="+", default=[], metavar="[NAME=]FILE", help="validation sets")
    p.add_argument("--out", required=True, help="folder for model, metrics and checkpoint")
    data.common_arguments(p)
    p.add_argument("--rationale-weight", type=number(0), default=1.0, help="w in the loss; 0 is vanilla (default 1)")
    p.add_argument("--rationale-coverage", type=number(0, 1), default=1.0, help="share of rows that keep theirs (default 1)")
    p.add_argument("--epochs", type=number(1e-6), default=1.0, help="passes over the data (default 1)")
    p.add_argument("--max-steps", type=number(1, kind=int), metavar="N", help="optimizer steps, instead of --epochs")
    p.add_argument("--batch-size", type=number(1, kind=int), default=128, help="examples of a step, over all ranks (128)")
    p.add_argument("--micro-batch-size", type=number(1, kind=int), default=8, help="examples of a rank at a time (8)")
    p.add_argument("--max-length", type=number(2, kind=int), default=1024, help="tokens; longer rows are left out (1024)")
    p.add_argument("--learning-rate", type=number(0), default=2e-5, help="peak (default 2e-5)")
    p.add_argument("--schedule", default="cosine", choices=("cosine", "linear", "constant", "inverse_sqrt"))
    p.add_argument("--warmup-steps", type=number(0, kind=int), metavar="N", help="linear warm-up (default 3 %% of the steps)")
    p.add_argument("--weight-decay", type=number(0), default=0.0, help="of matrices, decoupled (default 0)")
    p.add_argument("--max-grad-norm", type=number(0), default=1.0, help="0 switches clipping off (default 1)")
    p.add_argument("--dtype", default=data.default_dtype(), choices=("float32", "bfloat16"), help="compute (%(default)s here)")
    p.add_argument("--seed", type=number(0, kind=int), default=0, help="order of the data (default 0)")
    p.add_argument("--save-every", type=number(0, kind=int), default=500, help="steps between checkpoints, 0: none (500)")
    p.add_argument("--export-every", type=number(0, kind=int), default=0, help="steps between model folders step-N (0: none)")
    p.add_argument("--valid-every", type=number(0, kind=int), default=0, help="steps between validations (0: first and last)")
    p.add_argument("--activation-checkpointing", action="store_true", help="recompute activations: less memory, slower")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return p


if __name__ == "__main__":
    data.cli(main, parser())
