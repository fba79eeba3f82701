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
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import data
from data import Encoder, Example, Tokenizer, read_rows
from model import ModelConfig, Transformer, load_weights, read_index, save_weights, start_processes

# arguments that change speed, memory or what is written, never the update
FREE = ("resume", "out", "micro_batch_size", "save_every", "export_every", "valid", "valid_every", "activation_checkpointing")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
                   "chat_template.jinja", "generation_config.json")  # fmt: skip


def read_examples(files: list[str], args: argparse.Namespace, tokenizer: Tokenizer, config: ModelConfig) -> list[Example]:
    """Encodes the rows of `files`. Rows that are too long are left out whole; rank 0 says how many."""
    # weight 0 is vanilla: the reference ends the answer, so it gets the EOS
    coverage = args.rationale_coverage if args.rationale_weight else 0
    encoder = Encoder(tokenizer, data.read_template(args.template), args.system, coverage)
    every, length = [encoder.example(r) for r in read_rows(files, args.direction)], args.max_length
    length = min(length, config.max_position_embeddings)
    examples, long = [e for e in every if len(e) <= length], [e.id for e in every if len(e) > length]
    if dist.get_rank() == 0:
        notes = [f", {n} rationales left out ({note})" for note, n in Counter(e.note for e in examples if e.note).items()]
        some = f" (ids {', '.join(map(str, long[:5]))}{', ...' if len(long) > 5 else ''})" if long else ""
        print(f"{' '.join(files)}: {len(examples)} examples, {len(long)} longer than {length} tokens left out{some}", *notes, sep="")
    if not examples:
        raise ValueError(f"{files[0]}: no row fits --max-length {length}; raise it")
    if max(max(e.tokens) for e in examples) >= config.vocab_size:
        raise ValueError(f"{tokenizer.folder}: its ids go beyond the model's vocabulary of {config.vocab_size}; use its own")
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


def run(model: Transformer, examples: list[Example], args: argparse.Namespace, device, learn: bool) -> dict:
    """Forward over `examples`, of which this rank takes its parts, and backward if `learn` -> the losses of all ranks."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    # every rank knows the whole step, so the number of its supervised tokens needs no communication
    counts = sum(len(e.reference) for e in examples), sum(len(e.rationale) for e in examples)
    sums, w = torch.zeros(2, dtype=torch.float64), args.rationale_weight
    parts = micro_batches(examples, args.micro_batch_size, world_size)
    for part in parts[rank::world_size]:
        tokens, select, targets, is_rationale = data.collate(part, device)
        logits = model(tokens, select)  # [N, V]: no logits where there is no loss
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        if learn:  # fully_shard averages gradients over ranks: multiply by their number
            (torch.where(is_rationale, w * losses, losses).sum() * world_size / sum(counts)).backward()
        losses = losses.detach().double()
        sums += torch.stack([losses[~is_rationale].sum(), losses[is_rationale].sum()]).cpu()
    dist.all_reduce(sums)
    reference, rationale = sums.tolist()
    return dict(
        loss=(reference + w * rationale) / sum(counts),
        reference_loss=reference / counts[0] if counts[0] else None,  # means over their own tokens
        rationale_loss=rationale / counts[1] if counts[1] else None,
        reference_tokens=counts[0],
        rationale_tokens=counts[1],
        tokens=sum(map(len, examples)),
        padded_tokens=sum(len(part) * len(part[0]) for part in parts if part),
    )


def train_step(model, optimizer, examples: list[Example], args: argparse.Namespace, device) -> dict:
    """One optimizer step on `examples`. ValueError, before the weights are touched, where loss or gradient is not finite."""
    line = run(model, examples, args, device, learn=True)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf).full_tensor().item()
    if not math.isfinite(line["loss"]) or not math.isfinite(norm):
        raise ValueError(
            f"loss {line['loss']}, gradient norm {norm}; the weights are as they were: lower --learning-rate, or look at the "
            f"rows of this step, ids {', '.join(str(e.id) for e in examples)}"
        )
    optimizer.step()
    optimizer.zero_grad()
    return line | {"grad_norm": norm}


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
    a, times = torch.randn(n, n, dtype=dtype, device=device), []
    while not times or (len(times) < 8 and sum(times) < 0.5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def shard(model: Transformer, args: argparse.Namespace, device, index: dict | None) -> None:
    """Fills a model on `meta` in shards: float32 weights, compute in --dtype, float32 reduction; no rank holds all of it."""
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
    model.train()


def together(action, first_rank_only: bool = False) -> None:
    """Runs `action` and lets the ranks agree: if it fails on one, all of them raise, so that none waits for the others."""
    error = None
    try:
        if dist.get_rank() == 0 or not first_rank_only:
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

    def replace_old():
        temporary.rename(folder)
        for old in folder.parent.iterdir():
            if old != folder:
                shutil.rmtree(old)

    together(lambda: shutil.rmtree(temporary, ignore_errors=True), first_rank_only=True)
    for moment in ("weights", "exp_avg", "exp_avg_sq"):
        tensors = named if moment == "weights" else {name: state[p][moment] for name, p in named.items()}
        together(lambda: save_weights(tensors, temporary / moment, torch.float32))  # noqa: B023
    together(replace_old, first_rank_only=True)


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
    temporary = folder.with_name(folder.name + ".tmp")

    def begin():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name in TOKENIZER_FILES:
            if (Path(source) / name).exists():
                shutil.copyfile(Path(source) / name, temporary / name)

    def finish():
        folder.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):  # last: it says that all is there
            file.replace(folder / file.name)
        temporary.rmdir()

    together(begin, first_rank_only=True)
    together(lambda: model.save_pretrained(temporary, getattr(torch, dtype)))
    together(finish, first_rank_only=True)


def open_run(args: argparse.Namespace, examples: list[Example]) -> bool:
    """Prepares --out, or checks that it is the same run -> whether that is finished. Nothing there is overwritten."""
    out, file, digest = Path(args.out), Path(args.out) / "args.json", hashlib.sha256()
    for e in examples:
        digest.update(f"{e.id} {e.prompt} {e.reference} {e.rationale}\n".encode())
    mine = vars(args) | {"data_hash": digest.hexdigest()[:16]}
    if file.exists() and args.resume:
        old = json.loads(data.read_text(file))
        for name, value in mine.items():
            if name not in FREE and old.get(name) != value:
                raise ValueError(f"{file}: {name} was {old.get(name)}, now it is {value}; --resume goes on with the same run")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty; go on with --resume, or choose another --out")

    def write():
        out.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".tmp").write_text(json.dumps(mine, indent=2, ensure_ascii=False) + "\n", "utf-8")
        file.with_suffix(".tmp").replace(file)

    new = not file.exists()
    dist.barrier()  # until all have looked
    if new:
        together(write, first_rank_only=True)
    return (out / "config.json").exists()


def keep_metrics(file: Path, step: int) -> None:
    """Drops the lines after `step`, and a torn last one: those steps are done again."""
    if file.exists():
        lines = [line for line in file.read_text("utf-8").split("\n")[:-1] if json.loads(line)["step"] <= step]
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in lines), "utf-8")
        temporary.replace(file)


def report(line: dict, out: Path, text: str) -> None:
    """A line of metrics.jsonl and one on the terminal, from rank 0."""
    if dist.get_rank() == 0:
        with open(out / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        print(text, flush=True)


@torch.no_grad()
def validate(model, valid: dict[str, list[Example]], step: int, args: argparse.Namespace, device, out: Path) -> None:
    model.eval()
    for name, examples in valid.items():
        line = run(model, examples, args, device, learn=False)
        line = {"step": step, "valid": name, "valid_loss": line.pop("loss")} | line
        report(line, out, f"{step:6d}  valid {name}  loss {line['valid_loss']:.4f}")
    model.reshard()  # without a backward pass the root stays whole, and its parameters are other tensors
    model.train()


def main(args: argparse.Namespace) -> None:
    # 1. processes, and a signal that ends the run after the step it falls in
    rank, world_size, device = start_processes()
    out, signals = Path(args.out), []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))

    # 2. headers and data: what can be wrong is found before any weight is read
    folder = args.tokenizer or args.model
    if not folder or bool(args.model) == bool(args.config):
        raise ValueError("give --model, or --config with --tokenizer")
    config = ModelConfig.from_file(args.config or Path(args.model) / "config.json")
    with torch.device("meta"):
        model = Transformer(config)
    index = read_index(args.model, {name: p.shape for name, p in model.named_parameters()}) if args.model else None
    tokenizer = Tokenizer(folder, args.chat)
    examples = read_examples(args.data, args, tokenizer, config)
    valid = {name: read_examples(files, args, tokenizer, config) for name, files in data.named_files(args.valid).items()}
    if open_run(args, examples):
        print(f"{out}: this run is finished") if rank == 0 else None
        return

    # 3. model and optimizer; norms and biases are not decayed
    shard(model, args, device, index)
    groups = [[p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
    groups = [{"params": ps, "weight_decay": decay} for ps, decay in zip(groups, (args.weight_decay, 0.0))]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)

    # 4. where we are
    steps = args.max_steps or math.ceil(args.epochs * steps_per_epoch(examples, args))
    done = load_checkpoint(model, optimizer, out) if args.resume else 0
    peak = matmul_rate(getattr(torch, args.dtype), device) * world_size
    if rank == 0:
        keep_metrics(out / "metrics.jsonl", done or -1)
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,} parameters, {world_size} x {device.type}, {peak / 1e12:.3g} Tflop/s; steps {done} to {steps}")
    if done == 0:
        validate(model, valid, 0, args, device, out)

    # 5. the loop
    for step in range(done, steps):
        start, batch, rate = time.perf_counter(), batch_of(examples, step, args), learning_rate(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        try:
            line = {"step": step + 1} | train_step(model, optimizer, batch, args, device)
        except ValueError as e:
            raise ValueError(f"step {step + 1}: {e}") from None
        seconds, cuda = time.perf_counter() - start, device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        line |= dict(learning_rate=rate, seconds=seconds, mfu=flops(config, batch) / seconds / peak, memory_gib=memory / 2**30)
        parts = [line[f"{name}_loss"] for name in ("reference", "rationale")]
        parts = "reference {}  rationale {}".format(*("-" if x is None else f"{x:.4f}" for x in parts))
        report(line, out, f"{step + 1:6d}/{steps}  loss {line['loss']:.4f}  {parts}  lr {rate:.2e}  norm {line['grad_norm']:6.2f}  "
               f"{line['tokens'] / seconds:7,.0f} tokens/s  mfu {line['mfu']:4.0%}  {line['memory_gib']:5.2f} GiB")  # fmt: skip
        last, due = step + 1 == steps, lambda every: every and (step + 1) % every == 0  # noqa: B023
        if last or due(args.valid_every):
            validate(model, valid, step + 1, args, device, out)
        if due(args.export_every):
            export(model, out / f"step-{step + 1}", folder, args.dtype)
        stop = torch.tensor(float(bool(signals)))
        dist.all_reduce(stop)  # one rank that is told to stop stops all
        if (stop or due(args.save_every)) and not last:
            save_checkpoint(model, optimizer, out, step + 1)
        if stop and not last:
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
