"""Training with the joint loss of RaDis (step 2), sharded over any number of processes.

    python train.py --model DIR --data rationales.jsonl --out tuned
    torchrun --nproc-per-node 8 train.py --model DIR --data rationales.jsonl --out tuned

Over all examples of a step, whichever rank and micro-batch they fall on, with weight w,

    loss = (sum of -log P(y_t | y_<t, I, x)  +  w * sum of -log P(r_t | r_<t, y, I, x)) / tokens

where tokens counts those of all references y and rationales r. With --teacher the second term is
KL(teacher || model) at each token of r, of which -log P is a sample. Weight 0 is vanilla
fine-tuning. A run that was stopped is resumed by --resume and ends in the same weights (to
rounding, where the ranks or micro-batches are others).
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, also while torch is imported

import json
import math
import os
import re
import resource
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import data
from data import Encoder, Tokenizer
from model import (
    ModelConfig,
    Transformer,
    blaming,
    find_weights,
    flush_to_disk,
    hash_model,
    is_first_rank,
    load_weights,
    parse_json,
    read_object,
    require,
    save_weights,
    start_processes,
    write_text,
)

# arguments that change speed, memory or what is written, and paths, whose content is compared
FREE = """resume out micro_batch_size save_every export_every valid valid_every compile
    activation_checkpointing model teacher config tokenizer data versions""".split()
TOKENIZER_FILES = """tokenizer.model tokenizer_config.json tokenizer.json added_tokens.json
    special_tokens_map.json generation_config.json chat_template.jinja""".split()
REPEAT_S = 2  # torchrun passes a Ctrl-C on that the terminal has sent us already


# 1. The joint loss and the step


def joint_loss(model, teacher, examples, args, learn):
    """The loss over `examples`, shared out among the ranks, and its gradient if `learn`."""
    world_size = dist.get_world_size()
    # every rank knows the whole step, so counting needs no communication
    references = sum(len(example.reference) for example in examples)
    rationales = sum(len(example.rationale) for example in examples)
    sums = torch.zeros(4, dtype=torch.float64, device=model.device)
    for part in micro_batches(examples, args.micro_batch_size):
        tokens, shared, places, targets = data.collate(part, model.device)
        sums[3] += shared[1].numel() if part else 0  # places that attention sees, pads included
        border = sum(len(example.reference) for example in part)  # rationales come after it
        logits = model(tokens, places, shared=shared)  # [N, V]: none where there is no loss
        soft = logits.new_empty(0, logits.shape[1])
        if teacher:
            with torch.no_grad():
                soft = teacher(tokens, places[border:], shared=shared)
        losses = TokenLosses.apply(logits, targets, soft).double()  # [N]
        reference = losses[:border].sum()
        rationale = losses[border:].sum()
        loss = (reference + args.rationale_weight * rationale) / (references + rationales)
        if learn:
            # fully_shard averages gradients over the ranks: multiply by their number
            (loss * world_size).backward()
        sums[:3] += torch.stack([loss, reference, rationale]).detach()
    sums = sums.cpu()
    dist.all_reduce(sums)
    loss, reference, rationale, padded = sums.tolist()
    return {
        "loss": loss,
        "reference_loss": reference / references if references else None,
        "rationale_loss": rationale / rationales if rationales else None,
        "reference_tokens": references,
        "rationale_tokens": rationales,
        "tokens": sum(len(example) for example in examples),
        "padded_tokens": int(padded),
    }


class TokenLosses(torch.autograd.Function):
    """The loss of each supervised token [N], from logits [N, V], in float32.

    targets [N] are the tokens. Where soft [M, V], a teacher's logits, has rows, the last M of the
    N losses are KL(teacher || model) instead. A few rows are computed at a time, and the gradient
    takes the place of the logits at once: nothing else of a step is as large. Autograd allows
    that, since the linear layer keeps no output and nothing else reads the logits.
    """

    @staticmethod
    def forward(ctx, logits, targets, soft):
        hard = len(logits) - len(soft)
        losses = []
        for x, target in in_chunks(logits[:hard], targets[:hard, None]):
            log_probs = x.float().log_softmax(-1)
            losses.append(-log_probs.gather(-1, target)[:, 0])
            probs = log_probs.exp_()
            # d loss / d logits = p - onehot(target)
            x.copy_(probs.scatter_add_(1, target, -torch.ones_like(probs[:, :1])))
        for x, teacher in in_chunks(logits[hard:], soft):
            log_probs = x.float().log_softmax(-1)
            wanted = teacher.float().log_softmax(-1)
            losses.append((wanted.exp() * (wanted - log_probs)).sum(-1))
            x.copy_(log_probs.exp_() - wanted.exp_())  # d loss / d logits = p - p of the teacher
        ctx.save_for_backward(logits)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, gradient):
        (slopes,) = ctx.saved_tensors
        return slopes.mul_(gradient[:, None]), None, None


def in_chunks(*tensors):
    """The same rows of each tensor, a few at a time: 64, or half a GiB in float32 on a GPU."""
    first = tensors[0]
    size = max(64, 2**27 // first.shape[1]) if first.is_cuda else 64
    return zip(*(tensor.split(size) for tensor in tensors))


def train_step(model, teacher, optimizer, examples, step, rate, args):
    """One optimizer step. FloatingPointError, before it changes a weight, if it would be NaN."""
    line = joint_loss(model, teacher, examples, args, learn=True)
    most = args.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most).full_tensor().item()
    if not math.isfinite(line["loss"]) or not math.isfinite(norm):
        found = f"step {step}: loss {line['loss']}, gradient norm {norm}, so it is not taken"
        ids = [example.id for example in examples]
        raise FloatingPointError(f"{found}; lower --learning-rate, or look at its rows, {ids}")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return {"step": step} | line | {"learning_rate": rate, "grad_norm": norm}


@torch.no_grad()
def validate(model, teacher, valid, step, args):
    """The loss on each set of `valid`, as one line of metrics each."""
    for name, examples in valid.items():
        line = joint_loss(model, teacher, examples, args, learn=False)
        line = {"step": step, "valid": name, "valid_loss": line.pop("loss")} | line
        record(line, args.out)
        say(f"{step:6}  valid {name}  loss {line['valid_loss']:.4f}")
    model.reshard()  # without a backward pass the root stays whole, and has other parameters


# 2. Which examples, and how fast


def batch_of(examples, step, args):
    """The examples of `step` (from 0): each once an epoch, in an order by (seed, epoch) alone."""
    epoch, i = divmod(step, math.ceil(len(examples) / args.batch_size))
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
    order = torch.randperm(len(examples), generator=generator)
    start = i * args.batch_size
    return [examples[j] for j in order[start : start + args.batch_size].tolist()]


def micro_batches(examples, size):
    """This rank's parts of a batch, at most `size` rows of like lengths each.

    Every rank has as many parts, since all take part in every reduction; some may be empty.
    """
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    rows = sorted(examples, key=len, reverse=True)
    parts = []
    for start in range(0, len(rows), size * world_size):
        together = rows[start : start + size * world_size]
        parts.append(together[rank::world_size])
    return parts


def learning_rate(step, steps, args):
    """Rate at `step` (from 0) of `steps`: linear warm-up, then one of four schedules."""
    warmup = args.warmup_steps
    if warmup is None:
        warmup = math.ceil(0.03 * steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)  # 0 to just under 1
    knee = max(warmup, 1)
    shapes = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "inverse_sqrt": math.sqrt(knee / (knee + step - warmup)),
    }
    return args.learning_rate * shapes[args.schedule]


def read_examples(files, args, tokenizer, config):
    """Encodes the rows of `files`; those that are too long are left out whole, and told."""
    # weight 0 is vanilla: the reference ends the answer, so it gets the EOS
    coverage = args.rationale_coverage if args.rationale_weight else 0
    template = data.read_template(args.template)
    encoder = Encoder(tokenizer, template, args.system, coverage, args.only_ok)
    length = min(args.max_length, config.max_position_embeddings)
    examples = []
    left_out = Counter()
    for row in data.read_rows(files, args.direction):
        example = encoder.example(row)
        if example.left_out:
            left_out[f"rationales ({example.left_out})"] += 1
        if not example.reference and not example.rationale:
            left_out["rows with nothing to learn"] += 1
        elif len(example) > length:
            left_out[f"rows longer than {length} tokens"] += 1
        else:
            examples.append(example)
    told = ", ".join(f"{n} {what}" for what, n in left_out.items()) or "nothing"
    say(f"{' '.join(files)}: {len(examples)} examples; left out: {told}")
    require(examples, files[0], f"no row to learn from fits --max-length {length}")
    most = max(max(example.tokens) for example in examples)
    fault = f"has ids beyond the model's vocabulary of {config.vocab_size}; use the model's own"
    require(most < config.vocab_size, tokenizer.folder, fault)
    return examples


def named_files(items):
    """`[NAME=]FILE ...` -> files by name; a file without a name goes by its own."""
    named = {}
    for item in items:
        name, _, file = item.partition("=")
        if not file or Path(item).exists():  # a path may hold "="
            name = Path(item).stem
            file = item
        named.setdefault(name, []).append(file)
    return named


# 3. The model, in shards


def load_sharded(folder, args, device, frozen=False):
    """The model in shards, none of them whole; `frozen`: a teacher, in the compute type.

    What learns has float32 weights and reductions, and computes in --dtype.
    """
    compute = getattr(torch, args.dtype)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_file(folder or args.config))
    if frozen:
        model = model.to(compute).requires_grad_(False)
    if args.compile:
        model.compile_layers()
    # by default the float32 cos and sin would be cast at every block
    policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for module in [*model.model["layers"], model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=frozen or None)
    model.to_empty(device=device)
    model.activation_checkpointing = args.activation_checkpointing
    parameters = dict(model.named_parameters())
    if folder:
        load_weights(parameters, folder)
    else:
        model.initialize(args.seed)
    return model


def make_optimizer(model, args):
    """AdamW; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)


# 4. What a run leaves on disk


def say(text):
    """Prints from rank 0."""
    if is_first_rank():
        print(text, flush=True)


def record(line, out):
    """Appends a line to metrics.jsonl. FloatingPointError if a number is not finite."""
    if is_first_rank():
        with open(Path(out) / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(data.finite_json(line, f"step {line['step']}") + "\n")


def checkpoint_tensors(model, optimizer):
    """What a checkpoint holds: the weights, and both moments of Adam."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[name] = p
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[p][moment]
    return tensors


def save_checkpoint(model, optimizer, out, step):
    """Writes a checkpoint, readable on any number of ranks; it appears whole or not at all."""
    folder = out / "checkpoint" / f"step-{step}"
    temporary = folder.with_suffix(".tmp")
    tensors = checkpoint_tensors(model, optimizer)
    save_weights(tensors, temporary, torch.float32)
    if is_first_rank():
        find_weights(temporary, tensors)  # it can be read
        temporary.rename(folder)
        remove_checkpoints(out, folder)
    dist.barrier()


def remove_checkpoints(out, kept=None):
    """Removes all that this script has written to checkpoint/, but for one; nothing else."""
    for folder in out.glob("checkpoint/step-*"):
        if folder != kept and re.fullmatch(r"step-\d+(\.tmp)?", folder.name):
            shutil.rmtree(folder)
    if not any(out.glob("checkpoint/*")):
        shutil.rmtree(out / "checkpoint", ignore_errors=True)


def load_checkpoint(model, optimizer, out):
    """Restores the newest complete checkpoint -> the steps that are done, 0 where there is none."""
    names = [folder.name for folder in out.glob("checkpoint/step-*")]
    done = max((int(name[5:]) for name in names if name[5:].isdecimal()), default=0)
    if done:
        for p in model.parameters():
            step = torch.tensor(float(done), device=p.device)
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": step} | moments
        tensors = checkpoint_tensors(model, optimizer)
        load_weights(tensors, out / "checkpoint" / f"step-{done}")
    metrics = out / "metrics.jsonl"
    if is_first_rank() and metrics.exists():
        cut_metrics(metrics, done)
    return done


def cut_metrics(file, done):
    """Cuts metrics.jsonl back to the steps that are done."""
    lines = file.read_text("utf-8").split("\n")[:-1]  # without what a kill has torn
    with blaming(file):
        kept = [line for line in lines if done and parse_json(line, file)["step"] <= done]
    if kept:
        write_text(file, "\n".join(kept))
    else:
        file.unlink()


def export(model, folder, args):
    """Writes a model folder in the compute type, with the tokenizer's own files.

    Each file appears whole, config.json last: it says that all is there.
    """
    temporary = folder / "export.tmp"  # within, so on the same file system
    model.save_pretrained(temporary, getattr(torch, args.dtype))
    if is_first_rank():
        for name in TOKENIZER_FILES:
            copy_own_file(Path(args.tokenizer) / name, temporary / name)
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)
        temporary.rmdir()
    dist.barrier()


def copy_own_file(file, copy):
    """Copies a file of a model folder; of a link only what lies in Hugging Face's own cache."""
    target = file.resolve()
    own = (file.parent.resolve(), (file.parent / "../../blobs").resolve())
    if target.is_file() and target.parent in own:
        shutil.copyfile(target, copy)
        flush_to_disk(copy)


def open_run(args, examples):
    """Prepares --out, or checks that it has the same run -> whether that is finished."""
    out = Path(args.out)
    file = out / "args.json"
    rows = [[e.id, e.prompt, e.reference, e.rationale] for e in examples]
    data_hash = data.short_hash(rows)
    hashes = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, data_hash)
    require(set(hashes) == {data_hash}, args.data[0], "is not the same on all ranks")
    if is_first_rank():
        mine = vars(args) | {"data_hash": data_hash, "versions": {"torch": torch.__version__}}
        mine["start_hash"] = hash_model(args.model or args.config)
        mine["teacher_hash"] = args.teacher and hash_model(args.teacher)
        if file.exists() and args.resume:
            data.require_same(file, read_object(file), mine, FREE)
        else:
            there = set(os.listdir(out)) if out.exists() else set()
            way = "resume it with --resume" if file.exists() else "it holds no run"
            fault = f"is not empty; {way}, or choose another --out"
            require(there <= {"args.json.tmp"}, out, fault)
            write_text(file, json.dumps(mine, indent=2, ensure_ascii=False))
    dist.barrier()
    return (out / "config.json").exists()


# 5. The run


@contextmanager
def signals_heard():
    """SIGTERM and Ctrl-C are noted, which ends the run after its step.

    They may come twice, from a scheduler or a terminal and from torchrun. A later Ctrl-C ends the
    run at once.
    """
    heard = {}  # number -> when it came first

    def hear(number, _):
        since = heard.setdefault(number, time.monotonic())
        if number == signal.SIGINT and time.monotonic() - since > REPEAT_S:
            os._exit(128 + number)

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def memory_gib():
    """The most so far: on a GPU of tensors, on a CPU of the process, PyTorch included."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, else KiB


def print_step(line, steps):
    losses = f"loss {line['loss']:.4f}"
    for name in ("reference", "rationale"):
        loss = line[f"{name}_loss"]
        losses += f"  {name} {'-':>6}" if loss is None else f"  {name} {loss:.4f}"
    speed = line["tokens"] / line["seconds"]
    how = f"lr {line['learning_rate']:.2e}  norm {line['grad_norm']:6.2f}"
    cost = f"{speed:7,.0f} tokens/s  {line['memory_gib']:5.2f} GiB"
    say(f"{line['step']:6}/{steps}  {losses}  {how}  {cost}")


def run_steps(model, teacher, optimizer, examples, valid, steps, args, heard):
    """Trains from the newest checkpoint to the end, or to a signal."""
    out = Path(args.out)
    done = load_checkpoint(model, optimizer, out) if args.resume else 0
    if done == 0:
        validate(model, teacher, valid, 0, args)
    for step in range(done + 1, steps + 1):
        start = time.perf_counter()
        batch = batch_of(examples, step - 1, args)
        rate = learning_rate(step - 1, steps, args)
        line = train_step(model, teacher, optimizer, batch, step, rate, args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        line["seconds"] = time.perf_counter() - start
        line["memory_gib"] = memory_gib()
        record(line, out)
        print_step(line, steps)
        if step == steps or (args.valid_every and step % args.valid_every == 0):
            validate(model, teacher, valid, step, args)
        if args.export_every and step % args.export_every == 0:
            export(model, out / f"step-{step}", args)
        stop = torch.tensor(max(heard, default=0))  # the signal's number
        dist.all_reduce(stop, dist.ReduceOp.MAX)  # one rank that is told to stop stops all
        due = args.save_every and step % args.save_every == 0
        if step < steps and (stop or due):
            save_checkpoint(model, optimizer, out, step)
        if step < steps and stop:
            say(f"stopped by a signal after step {step}; resume it with --resume")
            sys.exit(128 + stop.item())
    export(model, out, args)


def main(args):
    # 1. processes; a rank waits for the others as long as one file takes to be written
    _, world_size, device = start_processes(timedelta(minutes=15))

    # 2. the data and the headers: what can be wrong is found before any weight is read
    args.tokenizer = args.tokenizer or args.model
    one = bool(args.model) != bool(args.config)
    wanted = "give --data, --out, and --model or --config with --tokenizer"
    require(args.data and args.out and args.tokenizer and one, "train.py", wanted)
    config = ModelConfig.from_file(args.config or args.model)
    tokenizer = Tokenizer(args.tokenizer, args.chat)
    if args.teacher:
        data.require_vocabulary(args.teacher, tokenizer, config)
    examples = read_examples(args.data, args, tokenizer, config)
    valid = {}
    for name, files in named_files(args.valid).items():
        valid[name] = read_examples(files, args, tokenizer, config)
    steps = args.max_steps or math.ceil(args.epochs * math.ceil(len(examples) / args.batch_size))

    with data.lock(args.out), signals_heard() as heard:
        # 3. where the run stands
        if open_run(args, examples):
            shutil.rmtree(Path(args.out) / "export.tmp", ignore_errors=True)
            say(f"{args.out}: this run is finished")
        else:
            # 4. model, teacher and optimizer
            model = load_sharded(args.model, args, device)
            teacher = None
            if args.teacher:
                teacher = load_sharded(args.teacher, args, device, frozen=True)
            count = sum(p.numel() for p in model.parameters())
            say(f"{count:,} parameters on {world_size} x {device.type}, {steps} steps")
            # 5. the steps, and the model
            optimizer = make_optimizer(model, args)
            run_steps(model, teacher, optimizer, examples, valid, steps, args, heard)
            say(f"wrote {args.out}")
        if is_first_rank():
            remove_checkpoints(Path(args.out))


OPTIONS = """
--model DIR              model folder to start from
--config FILE            config.json of a model with random weights; goes with --tokenizer
--tokenizer DIR          folder with tokenizer.model (default: --model)
--teacher DIR            on rationales learn its distribution, instead of the sampled tokens
--data FILE...           ledgers, pairs, conversations, in any mixture
--valid FILE...          validation sets; NAME=FILE names one
--out DIR                folder for the model, its metrics and checkpoints
--resume                 resume the run in --out
--rationale-weight NUMBER=1.0    w in the loss; 0 is vanilla fine-tuning
--rationale-coverage SHARE=1.0   share of the rationales that is used
--only-ok                leave out rationales of another status than ok
--epochs NUMBER=1.0      passes over the data
--max-steps COUNT        optimizer steps, instead of --epochs
--batch-size COUNT=128   examples of a step, over all ranks
--micro-batch-size COUNT=8       examples of a rank at a time
--max-length COUNT=1024  tokens; longer rows are left out
--learning-rate NUMBER=2e-5      at its peak
--schedule cosine|linear|constant|inverse_sqrt   of the learning rate, after warm-up
--warmup-steps N         linear warm-up (default 3 % of the steps)
--weight-decay NUMBER=0.0        of matrices, decoupled
--max-grad-norm NUMBER=1.0       0 switches clipping off
--seed N=0               order of the data, random weights
--save-every N=500       steps between checkpoints; 0: none
--export-every N=0       steps between model folders OUT/step-N; 0: none
--valid-every N=0        steps; 0: at the start and the end
--activation-checkpointing       less memory, slower
--compile                compile the layers: a slow start, then faster
--dtype float32|bfloat16   what is computed in
"""


def parser():
    purpose = "Fine-tunes a model on references and rationales."
    return data.make_parser(purpose, OPTIONS + data.PROMPT_OPTIONS)


if __name__ == "__main__":
    data.cli(main, parser())
