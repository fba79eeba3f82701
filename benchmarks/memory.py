"""Estimates a training run before it starts: tokens, steps, and the memory of each rank in GiB.

    python benchmarks/memory.py --model DIR --data rationales.jsonl --micro-batch-size 8
    python benchmarks/memory.py --config benchmarks/llama-7b.json --dtype bfloat16
    python benchmarks/memory.py            a table of Llama 2's sizes on 1 to 64 GPUs

It takes the arguments of train.py and needs only those that matter here. Computed, not measured:
the forward pass runs on tensors that take no memory. Without --data a micro-batch is full: rows of
--max-length tokens, half of them supervised, three quarters of those in the rationale. The estimate
is for GPUs, except in float32 on a machine without one.
"""

import json
import math
import sys
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import train  # noqa: E402
from data import Example  # noqa: E402
from model import ModelConfig, Transformer, require, start_processes  # noqa: E402

# hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size
SHAPES = {
    "7B": (4096, 32, 32, 32, 11008),
    "13B": (5120, 40, 40, 40, 13824),
    "70B": (8192, 80, 64, 8, 28672),
}
FIELDS = """hidden_size num_hidden_layers num_attention_heads num_key_value_heads
    intermediate_size""".split()
# typical, not measured here: CUDA with its libraries, and the buffers of NCCL on several ranks
CONTEXT = 0.6 * 2**30
NCCL = 0.8 * 2**30
RANKS = [1, 2, 4, 8, 16, 32, 64]
ROOM_GIB = 80e9 / 2**30  # of a GPU of 80 GB


# 1. Bytes


def kept_bytes(config: ModelConfig, part: list[Example], dtype, recompute: bool) -> tuple[int, int]:
    """Bytes of the activations that a forward pass over `part` keeps: all, and one layer."""
    one = kept_by_layers(replace(config, num_hidden_layers=1), part, dtype, recompute)
    two = kept_by_layers(replace(config, num_hidden_layers=2), part, dtype, recompute)
    layer = two - one  # every layer keeps the same
    return one + (config.num_hidden_layers - 1) * layer, layer


def kept_by_layers(config: ModelConfig, part: list[Example], dtype, recompute: bool) -> int:
    """Bytes that autograd keeps, except for the weights."""
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        size = storage.nbytes()
        heads = x.dim() == 4 and x.shape[1] > 1
        if x.dtype == torch.float32 and (heads or x.shape[-1] == config.hidden_size):
            # RMSNorm and attention keep their inputs in float32, on a GPU as they are
            size = x.numel() * dtype.itemsize
        kept[storage._cdata] = size
        return x

    with torch.device("meta"):
        model = Transformer(config)
    model.activation_checkpointing = recompute
    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        weights = {}
        for name, p in model.named_parameters():
            weights[name] = torch.empty(p.shape, dtype=dtype, requires_grad=True)
        batch = data.collate(part)
        inputs = (batch.tokens, batch.places)
        logits = functional_call(model, weights, inputs, {"shared": batch.shared})
    own = {p.untyped_storage()._cdata for p in weights.values()}
    total = sum(size for storage, size in kept.items() if storage not in own)
    del logits  # which held all that was kept: no storage could take another's place
    return total


def parameter_counts(config: ModelConfig) -> tuple[int, int, list[torch.Size]]:
    """Parameters of one layer; of embedding, head and norm; and all shapes."""
    with torch.device("meta"):
        model = Transformer(config)
    layer = sum(p.numel() for p in model.model["layers"][0].parameters())
    rest = sum(p.numel() for name, p in model.named_parameters() if "layers" not in name)
    return layer, rest, [p.shape for p in model.parameters()]


def shard_size(shapes: list[torch.Size], ranks: int) -> int:
    """Numbers of the largest shard: whole rows are dealt out."""
    return sum(-(-shape[0] // ranks) * math.prod(shape[1:]) for shape in shapes)


def base_bytes(dtype, ranks: int) -> float:
    """What a rank takes before any tensor: on a GPU CUDA and NCCL, on a CPU the process."""
    if dtype == torch.float32 and not torch.cuda.is_available():
        return train.memory_gib() * 2**30
    return CONTEXT + (NCCL if ranks > 1 else 0)


def loss_bytes(config: ModelConfig, part: list[Example], dtype, soft: bool) -> int:
    """Logits of the model and of a teacher, and the float32 tensors of the loss's chunks."""
    rationale = sum(len(example.rationale) for example in part)
    supervised = sum(len(example.reference) for example in part) + rationale
    rows = supervised + (rationale if soft else 0)
    chunk = 4 * config.vocab_size * min(train.CHUNK, supervised)
    return dtype.itemsize * config.vocab_size * rows + chunk * (6 if soft else 3)


def memory_table(config, teacher, part: list[Example], dtype, ranks: list[int]) -> list[dict]:
    """Bytes of a rank, by part, as the backward pass of a micro-batch like `part` begins."""
    layer, rest, shapes = parameter_counts(config)
    kept, one = kept_bytes(config, part, dtype, recompute=False)
    inputs, _ = kept_bytes(config, part, dtype, recompute=True)
    table = []
    for n in ranks:
        shard = 4 * shard_size(shapes, n)  # float32
        line = {"base": base_bytes(dtype, n), "weights": shard, "gradients": shard}
        line["optimizer"] = 2 * shard
        # two layers, one gathered while the other computes; embedding and head, their gradients
        # (a tied head has two, yet to be added), and the float32 copy that the reduction reads
        gathered = 2 * (rest + layer) + rest * config.tie_word_embeddings
        line["unsharded"] = gathered * dtype.itemsize + 4 * rest
        if teacher:
            its_layer, its_rest, its_shapes = parameter_counts(teacher)
            its_size = shard_size(its_shapes, n) + 2 * its_layer + its_rest
            line["teacher"] = dtype.itemsize * its_size
        line["logits"] = loss_bytes(config, part, dtype, soft=bool(teacher))
        line["activations"] = kept
        line["total"] = sum(line.values())
        # a layer at a time, once the logits are gone
        line["recomputed"] = inputs + max(0, one - line["logits"])
        line["total'"] = line["total"] - kept + line["recomputed"]
        table.append({"ranks": n} | line)
    return table


# 2. What is printed


def full_part(rows: int, length: int) -> list[Example]:
    """Rows of one length: half prompt, an eighth reference, the rest rationale."""
    reference = length // 8
    prompt = length - length // 2
    rationale = length - prompt - reference
    rest = ([1] * reference, [1] * rationale)
    # they begin apart, so that nothing is shared
    return [Example(i, [i] + [1] * (prompt - 1), *rest) for i in range(rows)]


def read_parts(args: Namespace, config: ModelConfig) -> list[Example]:
    """Prints what the data is -> its largest micro-batch, as one rank would cut it."""
    source = args.tokenizer or args.model
    require(source, "memory.py", "--data needs --model, or --config with --tokenizer")
    args.tokenizer = source
    _, examples, _ = train.read_data(args, config)
    in_epoch = math.ceil(len(examples) / args.batch_size)
    parts = []
    for step in range(in_epoch):
        batch = train.batch_of(examples, step, args.batch_size, args.seed)
        parts += train.micro_batches(batch, args.micro_batch_size)
    tokens = sum(map(len, examples))
    computed = [data.collate(part).tokens.numel() for part in parts]
    supervised = sum(len(example.reference) + len(example.rationale) for example in examples)
    steps = args.max_steps or math.ceil(args.epochs * in_epoch)
    print(
        f"{tokens:,} tokens an epoch, {supervised:,} of them supervised; {sum(computed):,} are "
        f"computed ({1 - sum(computed) / tokens:.1%} fewer: what rows share counts once); "
        f"{steps:,} steps"
    )
    return parts[computed.index(max(computed))]


def print_table(table: list[dict]):
    print("  ".join(table[0]))
    for line in table:
        cells = [f"{line['ranks']:5}"]
        for name, size in line.items():
            if name != "ranks":
                cells.append(f"{size / 2**30:{len(name)}.2f}")
        print("  ".join(cells))


def print_sizes():
    """A Markdown table of Llama 2's sizes."""
    print("| GiB a rank on ... GPUs |", *(f"{n} |" for n in RANKS))
    print("|---|" + "---:|" * len(RANKS))
    for name, shape in SHAPES.items():
        raw = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
        raw |= dict(zip(FIELDS, shape))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "config.json"
            file.write_text(json.dumps(raw))
            config = ModelConfig.from_file(file)
        table = memory_table(config, None, full_part(8, 1024), torch.bfloat16, RANKS)
        for title, column in (("", "total"), (", activations recomputed", "total'")):
            cells = []
            for line in table:
                gib = line[column] / 2**30
                cells.append(f"**{gib:.0f}**" if gib < 0.95 * ROOM_GIB else f"{gib:.0f}")
            print(f"| {name}{title} | {' | '.join(cells)} |")
    print(f"\nbfloat16, 8 rows of 1,024 tokens at a time. Bold: below 95% of {ROOM_GIB:.1f} GiB.")


def main(args: Namespace):
    if not args.model and not args.config:
        return print_sizes()
    start_processes()
    config = ModelConfig.from_file(args.config or Path(args.model) / "config.json")
    teacher = None
    if args.teacher:
        teacher = ModelConfig.from_file(Path(args.teacher) / "config.json")
    if args.data:
        part = read_parts(args, config)
    else:
        length = min(args.max_length, config.max_position_embeddings)
        part = full_part(args.micro_batch_size, length)
    longest = max(map(len, part))
    print(f"GiB a rank, {args.dtype}, micro-batches up to {len(part)} x {longest} tokens; the last")
    print("two columns: with --activation-checkpointing")
    table = memory_table(config, teacher, part, getattr(torch, args.dtype), RANKS)
    print_table(table)


def parser():
    p = train.parser()
    p.description = "Estimates the memory of a training run; the arguments are those of train.py."
    for action in p._actions:
        action.required = False
    return p


if __name__ == "__main__":
    data.cli(main, parser())
