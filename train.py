"""Trains a model with the joint loss of RaDis (step 2), sharded over any number of GPUs.

    python train.py --model DIR --data rationales.jsonl --out tuned
    torchrun --nproc-per-node 8 train.py --model DIR --data rationales.jsonl --out tuned

The loss of a step, over its examples on all ranks and in all micro-batches, with weight w:

    loss = (sum of -log P(y_t | y_<t, I, x)  +  w * sum of -log P(r_t | r_<t, y, I, x)) / n

n is the number of tokens in all references y and rationales r (`reference_tokens` plus
`rationale_tokens` in metrics.jsonl). Weight 0 is vanilla fine-tuning.
-log P(r_t) is a one-sample estimate of KL(base || model) plus a constant; --teacher replaces it
with the KL to the teacher.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C also ends it while torch is imported

import math
import os
import re
import resource
import shutil
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import data
from model import (
    ModelConfig,
    Transformer,
    flush_to_disk,
    from_first_rank,
    hash_model,
    is_first_rank,
    load_weights,
    require,
    save_weights,
    start_processes,
)

# 1. The joint loss and the step


def joint_loss(model, teacher, losses, micro_batch_size, weight, examples):
    """Returns the joint loss of `examples` (equal on all ranks) in a dict.

    losses: the loss functions of references and of rationales. The gradient is added to that of the
    parameters, except under torch.no_grad.
    """
    # every rank knows the whole step, so counting needs no communication
    references = sum(len(example.reference) for example in examples)
    rationales = sum(len(example.rationale) for example in examples)
    sums = torch.zeros(3, dtype=torch.float64, device=model.device)
    for part in micro_batches(examples, micro_batch_size):
        batch = data.collate(part, model.device)
        reference, rationale = loss_sums(model, teacher, losses, batch)
        loss = (reference + weight * rationale) / (references + rationales)
        if torch.is_grad_enabled():
            # fully_shard averages gradients over the ranks: multiply by their number
            (loss * dist.get_world_size()).backward()
        sums[0] += reference.detach()
        sums[1] += rationale.detach()
        sums[2] += batch.shared.token_at.numel()  # attention computes pads, too
    sums = sums.cpu()
    dist.all_reduce(sums)
    reference, rationale, padded_tokens = sums.tolist()
    return {
        "loss": (reference + weight * rationale) / (references + rationales),
        "reference_loss": reference / references if references else None,
        "rationale_loss": rationale / rationales if rationales else None,
        "reference_tokens": references,
        "rationale_tokens": rationales,
        "tokens": sum(len(example) for example in examples),
        "padded_tokens": int(padded_tokens),
    }


def loss_sums(model, teacher, losses, batch):
    """Returns the losses of a batch, summed over the references y and over the rationales r."""
    y = batch.reference_count
    # [N, V], only where there is loss: first the references, then the rationales
    logits = model(batch.tokens, batch.places, shared=batch.shared)
    rationales = batch.targets[y:]
    if teacher:
        rationales = teacher(batch.tokens, batch.places[y:], shared=batch.shared)
    values = TokenLosses.apply(losses, logits, batch.targets[:y], rationales).double()  # [N]
    return values[:y].sum(), values[y:].sum()


def train_step(compute_loss, model, optimizer, examples, rate, max_grad_norm):
    """Takes an optimizer step and returns its metrics.

    Raises UserError before any weight changes if the loss or its gradient is not finite.
    """
    start = time.perf_counter()
    line = compute_loss(examples)
    limit = max_grad_norm or math.inf
    # foreach: by default DTensors are scaled one by one
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit, foreach=True)
    norm = norm.full_tensor().item()
    fault = f"found {line['loss']} and {norm}, expected finite numbers; lower --learning-rate"
    require(math.isfinite(line["loss"] + norm), "loss and gradient norm", fault)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return line | {
        "learning_rate": rate,
        "grad_norm": norm,
        "seconds": time.perf_counter() - start,
        "memory_gib": memory_gib(),
    }


def cross_entropy(logits, targets):
    """Returns -log P of each target [n] under logits [n, V]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def kl_divergence(logits, teacher_logits):
    """Returns KL(teacher || model) for each row of logits [n, V]."""
    log_probs = logits.float().log_softmax(-1)
    teacher_log_probs = teacher_logits.float().log_softmax(-1)
    return (teacher_log_probs.exp() * (teacher_log_probs - log_probs)).sum(-1)


CHUNK = 128  # rows of logits whose loss is computed at a time


class TokenLosses(torch.autograd.Function):
    """The loss of each supervised token [N], from logits [N, V], in float32.

    losses: the functions of references and of rationales, from logits [n, V] and targets (token ids
    [n], or a teacher's logits [n, V]) to the losses [n]. The gradient overwrites the logits, the
    largest tensor of a step, a chunk at a time. Autograd allows it: the linear layer keeps no
    output, and nothing else reads the logits.
    """

    @staticmethod
    def forward(ctx, losses, logits, references, rationales):
        values = []
        rest = logits
        for loss, targets in zip(losses, (references, rationales)):
            for chunk in targets.split(CHUNK):
                x, rest = rest.tensor_split([len(chunk)])
                with torch.enable_grad():
                    leaf = x.detach().requires_grad_()
                    value = loss(leaf, chunk)
                    (gradient,) = torch.autograd.grad(value.sum(), leaf)
                values.append(value.detach())
                x.copy_(gradient)
        ctx.save_for_backward(logits)
        return torch.cat(values)

    @staticmethod
    def backward(ctx, gradient):
        (slopes,) = ctx.saved_tensors
        return None, slopes.mul_(gradient[:, None]), None, None


@torch.no_grad()
def validate(compute_loss, valid, step, out):
    """Records the loss on each validation set."""
    for name, examples in valid.items():
        line = compute_loss(examples)
        loss = line.pop("loss")
        record({"step": step, "valid": name, "valid_loss": loss} | line, out)


# 2. The order of the examples, and the learning rate


def batch_of(examples, step, batch_size, seed):
    """Returns the examples of `step` (from 0), in an order that depends on seed and epoch alone."""
    epoch, i = divmod(step, math.ceil(len(examples) / batch_size))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(examples), generator=generator)
    batch = order.split(batch_size)[i]
    return [examples[j] for j in batch.tolist()]


def micro_batches(examples, size):
    """Returns this rank's micro-batches: at most `size` rows of similar length each.

    Every rank has the same number, since all take part in every reduction; some may be empty.
    """
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    back = 2 * world_size - 1 - rank
    count = size * world_size
    rows = sorted(examples, key=len, reverse=True)
    parts = []
    for start in range(0, len(rows), count):
        part = rows[start : start + count]
        # dealt back and forth, 0 1 2 2 1 0 0 1 2: no rank gets the longest row of every round
        parts.append(part[rank :: 2 * world_size] + part[back :: 2 * world_size])
    return parts


def learning_rate(step, steps, peak, warmup_steps, schedule):
    """Returns the rate of `step` (from 0): linear warm-up to `peak`, then the schedule."""
    if warmup_steps is None:
        warmup_steps = math.ceil(0.03 * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    after = step - warmup_steps
    progress = after / (steps - warmup_steps)  # from 0 to just under 1
    timescale = warmup_steps or 10_000  # as in transformers' get_inverse_sqrt_schedule
    factors = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "inverse_sqrt": math.sqrt(timescale / (timescale + after)),
    }
    return peak * factors[schedule]


def is_due(step, every):
    """Returns whether `step` is a multiple of `every` (0: never)."""
    return every > 0 and step % every == 0


def read_data(args, config):
    """Returns the tokenizer, the examples of --data, and those of each set of --valid."""
    rows = data.read_rows(args.data, args.direction)
    tokenizer = data.Tokenizer(args.tokenizer, args.chat).with_chat_of(rows)
    # at weight 0 the reference ends the answer, so it gets the EOS
    coverage = args.rationale_coverage if args.rationale_weight else 0
    template = data.read_template(args.template)
    encoder = data.Encoder(tokenizer, template, args.system, coverage, args.only_ok)
    length = min(args.max_length, config.max_position_embeddings)
    examples = make_examples(rows, "--data", encoder, config, length)
    valid = {}
    for item in args.valid:
        name, named, file = item.partition("=")
        if not named:
            name = Path(item).stem
            file = item
        fault = f"two sets are called {name}; rename one, as in NAME={file}"
        require(name not in valid, "--valid", fault)
        rows = data.read_rows([file], args.direction)
        valid[name] = make_examples(rows, name, encoder, config, length)
    return tokenizer, examples, valid


def make_examples(rows, name, encoder, config, max_length):
    """Returns the examples of the rows of `name`, without those that are too long or empty."""
    examples = []
    unused = 0
    for row in rows:
        example = encoder.example(row)
        unused += bool(example.dropped)
        if len(example.prompt) < len(example) <= max_length:
            examples.append(example)
    dropped = len(rows) - len(examples)
    counts = f"{dropped} of {len(rows)} rows dropped (no target, or over {max_length} tokens)"
    say(f"{name}: {counts}; {unused} rationales not used")
    fault = f"{counts}; check the data, or raise --max-length (at most the model's positions)"
    require(examples, name, fault)
    largest = max(max(example.tokens) for example in examples)
    fault = f"id {largest} is not below vocab_size {config.vocab_size}; check --tokenizer"
    require(largest < config.vocab_size, encoder.tokenizer.folder, fault)
    return examples


# 3. The model, in shards


def load_sharded(source, dtype, seed=None, frozen=False):
    """Returns a sharded model: pretrained, or random if `seed` is given.

    It computes in `dtype`. Parameters and gradients are float32, those of a frozen model `dtype`.
    """
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_file(source))
    if frozen:
        model = model.to(dtype).requires_grad_(False)
    # keep cos and sin in float32: FSDP casts the inputs of every layer by default
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    _, world_size, device = start_processes()
    mesh = dist.init_device_mesh(device.type, (world_size,))
    for module in [*model.model["layers"], model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model.to_empty(device=device)
    if seed is None:
        load_weights(dict(model.named_parameters()), source)
    else:
        model.initialize(seed)
    return model


def make_optimizer(model, weight_decay):
    """Returns AdamW without weight decay for the norms."""
    groups = [
        {"params": [p], "weight_decay": weight_decay if p.dim() > 1 else 0.0}
        for p in model.parameters()
    ]
    return torch.optim.AdamW(groups, fused=True)


# 4. What a run writes

# settings that may change on --resume; of model, teacher and data the hashes are compared
FREE = """resume out micro_batch_size save_every export_every valid valid_every
    activation_checkpointing model teacher config tokenizer data""".split()
SHOWN = """step loss valid_loss reference_loss rationale_loss learning_rate grad_norm tokens seconds
    memory_gib""".split()
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


def say(text):
    """Prints from rank 0."""
    if is_first_rank():
        print(text, flush=True)


def record(line, out):
    """Appends a line to metrics.jsonl, and prints its main numbers."""
    if is_first_rank():
        text = data.finite_json(line, f"step {line['step']}")
        with open(out / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(text + "\n")
        shown = [f"{name} {line[name]:<9.4g}" for name in SHOWN if line.get(name) is not None]
        print(line.get("valid", ""), "  ".join(shown), flush=True)


def checkpoint_tensors(model, optimizer):
    """Returns the tensors of a checkpoint: the weights, and both moments of Adam."""
    tensors = dict(model.named_parameters())
    for moment in MOMENTS:
        for name, p in model.named_parameters():
            tensors[f"{moment}.{name}"] = optimizer.state[p][moment]
    return tensors


def save_checkpoint(model, optimizer, out, step):
    """Writes a checkpoint, with the metrics so far, whole or not at all; removes the previous one.

    Any number of ranks can load it.
    """
    folder = out / f"checkpoint/step-{step}"
    temporary = folder.with_suffix(".tmp")
    save_weights(checkpoint_tensors(model, optimizer), temporary, torch.float32)
    if is_first_rank():
        shutil.copyfile(out / "metrics.jsonl", temporary / "metrics.jsonl")
        flush_to_disk(temporary / "metrics.jsonl")
        temporary.rename(folder)
        remove_checkpoints(out, folder)
    dist.barrier()


def remove_checkpoints(out, kept=None):
    """Removes all checkpoints except `kept`, and nothing else that is in their folder."""
    for folder in out.glob("checkpoint/step-*"):
        if folder != kept and re.fullmatch(r"step-\d+(\.tmp)?", folder.name):
            shutil.rmtree(folder)
    with suppress(OSError):  # there is none, or it is not empty
        (out / "checkpoint").rmdir()


def load_checkpoint(model, optimizer, out):
    """Loads the newest checkpoint and its metrics; returns its step, or 0."""
    steps = [0]
    for folder in out.glob("checkpoint/step-*"):
        number = folder.name.removeprefix("step-")
        if number.isdecimal():
            steps.append(int(number))
    step = from_first_rank(max(steps))
    folder = out / f"checkpoint/step-{step}"
    metrics = b""
    if step:
        metrics = (folder / "metrics.jsonl").read_bytes()
        for p in model.parameters():
            state = {moment: torch.zeros_like(p) for moment in MOMENTS}
            optimizer.state[p] = state | {"step": torch.tensor(float(step), device=p.device)}
        load_weights(checkpoint_tensors(model, optimizer), folder)
    if is_first_rank():
        (out / "metrics.jsonl").write_bytes(metrics)
    return step


def export(model, tokenizer, folder, dtype):
    """Writes a model folder with the tokenizer's files; config.json, the last one, completes it."""
    if is_first_rank():
        (folder / "config.json").unlink(missing_ok=True)  # of a stopped run
        for name, content in tokenizer.files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            flush_to_disk(file)
    model.save_pretrained(folder, dtype)


# 5. The run


def note_signals():
    """Handles SIGTERM and Ctrl-C: returns a list that collects them, for `run` to check."""
    noted = []

    def note(number, _):
        noted.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another Ctrl-C ends it at once

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return noted


def memory_gib():
    """Returns the peak memory so far in GiB: of PyTorch on a GPU, else of the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, else KiB


def run(args, out, tokenizer, examples, valid):
    """Trains from the newest checkpoint in `out`, and exports; on a signal it saves and exits."""
    # 1. model, teacher and optimizer
    dtype = data.torch_dtype(args.dtype)
    if args.model:
        model = load_sharded(args.model, dtype)
    else:
        model = load_sharded(args.config, dtype, args.seed)
    model.activation_checkpointing = args.activation_checkpointing
    teacher = load_sharded(args.teacher, dtype, frozen=True) if args.teacher else None
    optimizer = make_optimizer(model, args.weight_decay)
    losses = (cross_entropy, kl_divergence if teacher else cross_entropy)
    compute_loss = partial(
        joint_loss, model, teacher, losses, args.micro_batch_size, args.rationale_weight
    )

    # 2. the steps
    noted = note_signals()
    in_epoch = math.ceil(len(examples) / args.batch_size)
    steps = args.max_steps or math.ceil(args.epochs * in_epoch)
    done = load_checkpoint(model, optimizer, out)
    if done == 0:
        validate(compute_loss, valid, 0, out)
    for step in range(done + 1, steps + 1):
        batch = batch_of(examples, step - 1, args.batch_size, args.seed)
        rate = learning_rate(step - 1, steps, args.learning_rate, args.warmup_steps, args.schedule)
        line = train_step(compute_loss, model, optimizer, batch, rate, args.max_grad_norm)
        record({"step": step} | line, out)
        if step == steps or is_due(step, args.valid_every):
            validate(compute_loss, valid, step, out)
        if is_due(step, args.export_every):
            export(model, tokenizer, out / f"step-{step}", dtype)
        stop = torch.tensor(max(noted, default=0))  # the signal's number
        dist.all_reduce(stop, dist.ReduceOp.MAX)  # a signal to one rank stops all
        if stop or is_due(step, args.save_every):
            save_checkpoint(model, optimizer, out, step)
        if stop:
            say(f"stopped by a signal after step {step}; continue it with --resume")
            sys.exit(128 + stop.item())
    if is_first_rank():
        flush_to_disk(out / "metrics.jsonl")
    export(model, tokenizer, out, dtype)
    say(f"wrote {out}")


def main(args):
    # 1. processes
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # lengths vary
    start_processes()

    # 2. the data: mistakes are found before any weight is read
    args.tokenizer = args.tokenizer or args.model
    one_source = bool(args.model) != bool(args.config)
    require(
        one_source and args.tokenizer,
        "train.py",
        "give either --model, or --config and --tokenizer",
    )
    start = args.model or args.config
    config = ModelConfig.from_file(start)
    tokenizer, examples, valid = read_data(args, config)
    if args.teacher:
        data.require_vocabulary(args.teacher, tokenizer, config)
    data_hash = data.short_hash([vars(example) for example in examples])
    hashes = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, data_hash)
    fault = "examples differ between the ranks; give all of them the same files"
    require(set(hashes) == {data_hash}, "--data", fault)

    # 3. the output folder, locked for this run
    out = Path(args.out).resolve()
    settings = vars(args) | {
        "data_hash": data_hash,
        "start_hash": hash_model(start),
        "teacher_hash": args.teacher and hash_model(args.teacher),
    }
    # args.json of an older version lacks newer options: they had their defaults
    defaults = vars(parser().parse_args(["--data", "", "--out", ""]))
    with data.claim(out / "args.json", settings, defaults=defaults, free=FREE) as known:
        fault = "holds a run; continue it with --resume, or choose another --out"
        require(args.resume or not known, out, fault)
        if from_first_rank((out / "config.json").exists()):
            say(f"{out}: this run is finished")
        else:
            run(args, out, tokenizer, examples, valid)
        if is_first_rank():
            remove_checkpoints(out)


OPTIONS = """
--model DIR              model folder to start from
--config FILE            config.json of a model with random weights; needs --tokenizer
--tokenizer DIR          folder with tokenizer.model (default: --model)
--teacher DIR            model folder; its distribution is the target of rationale tokens
--data! FILE...          pairs, conversations, or ledgers of generate.py
--valid FILE...          validation sets; NAME=FILE gives one a name
--out! DIR               folder for the model, its metrics and checkpoints
--resume                 continue the run in --out
--rationale-weight NUMBER=1.0    weight of the rationale loss; 0 is vanilla fine-tuning
--rationale-coverage SHARE=1.0   share of the rationales that is used
--only-ok                drop rationales whose status is not ok
--epochs NUMBER=1.0      passes over the data
--max-steps COUNT        optimizer steps; replaces --epochs
--batch-size COUNT=128   examples of a step, over all ranks
--micro-batch-size COUNT=8       examples that a rank processes at a time
--max-length COUNT=1024  tokens; longer rows are dropped
--learning-rate NUMBER=2e-5      peak learning rate
--schedule cosine|linear|constant|inverse_sqrt   learning-rate schedule after warm-up
--warmup-steps N         linear warm-up (default: 3% of the steps)
--weight-decay NUMBER=0.0        AdamW weight decay; norms are excluded
--max-grad-norm NUMBER=1.0       gradient clipping; 0: none
--seed N=0               seed of the order of the data, and of random weights
--save-every N=500       steps between checkpoints; 0: only when a signal stops the run
--export-every N=0       steps between model folders OUT/step-N; 0: none
--valid-every N=0        steps between validations; 0: only at start and end
--activation-checkpointing       recompute activations: less memory, slower
--dtype float32|bfloat16   type of the computation; bfloat16 is slower on most CPUs
"""


def parser():
    purpose = "Fine-tunes a model on references and rationales."
    return data.make_parser(purpose, OPTIONS + data.PROMPT_OPTIONS)


if __name__ == "__main__":
    data.cli(main, parser())
