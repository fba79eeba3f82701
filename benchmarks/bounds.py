"""What a machine and a model allow: the other benchmarks measure speeds against these.

The bound of a command is the time of its matrix products alone, at the rate that this machine
reaches in them. Attention, noise, the optimizer and Python are what it takes beyond that.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

FLAGS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # they decide which products are fast


def matrix_weights(config) -> tuple[int, int]:
    """Weights that a token is multiplied by: of all layers, and of the head."""
    heads = config.num_attention_heads + config.num_key_value_heads
    attention = 2 * config.head_dim * heads
    mlp = 3 * config.intermediate_size
    layers = config.num_hidden_layers * config.hidden_size * (attention + mlp)
    head = config.vocab_size * config.hidden_size
    return layers, head


def training_operations(config, lengths: list[int], loss_tokens: int) -> float:
    """Operations of a step on examples of these lengths, without any that are repeated.

    6 a weight and token, of the head only where there is loss, and 6 * width * T^2 of causal
    attention.
    """
    layers, head = matrix_weights(config)
    width = config.num_attention_heads * config.head_dim
    squares = sum(T**2 for T in lengths)
    products = layers * sum(lengths) + head * loss_tokens
    attention = config.num_hidden_layers * width * squares
    return 6 * (products + attention)


def record_operations(model) -> list[int]:
    """A list to which each forward pass from now on adds the operations of its matrix products."""
    operations = []
    layers, head = matrix_weights(model.config)

    def count(_, inputs, logits):
        predicted = logits.numel() // model.config.vocab_size
        operations.append(2 * (layers * inputs[0].numel() + head * predicted))

    model.register_forward_hook(count)
    return operations


def distance(products: float, seconds: float) -> str:
    """How long a command takes, next to its matrix products alone."""
    times = seconds / products
    return f"matmuls alone: {products:.3g} of {seconds:.3g} s; ratio {times:.2f}"


def describe_machine(device: torch.device) -> dict[str, float]:
    """Prints the processor's flags and its rates of matrix products in a line -> the rates."""
    flags = []
    file = Path("/proc/cpuinfo")
    if file.exists():
        words = set(file.read_text().split())
        flags = [name for name in FLAGS if name in words]
    rates = {}
    for name in ("float32", "bfloat16"):
        rates[name] = matrix_rate(getattr(torch, name), device)
    texts = [f"{name} {rate / 1e9:.3g} Gflop/s" for name, rate in rates.items()]
    threads = torch.get_num_threads()
    print(f"processor: {' '.join(flags) or 'flags unknown'}; threads: {threads};", end=" ")
    print(f"matrix products on {device.type}: {', '.join(texts)}", flush=True)
    return rates


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second that a plain matrix product reaches: the peak that shares refer to."""
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(n, n, dtype=dtype, device=device)
    if device.type == "cpu":
        a @ a
        start = time.perf_counter()
        a @ a
        once = time.perf_counter() - start
        if once > 0.1:  # bfloat16 without instructions for it: exact enough
            return 2 * n**3 / once
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=0.1).median


def matrix_seconds(model, rows: int) -> float:
    """Seconds that the products of all weight matrices with `rows` vectors take by themselves."""
    weights = []
    inputs = {}
    for name, p in model.named_parameters():
        looked_up = "embed_tokens" in name and not model.config.tie_word_embeddings
        if p.dim() == 2 and not looked_up:
            weights.append(p)
            size = p.shape[1]
            inputs[size] = torch.ones(rows, size, dtype=p.dtype, device=p.device)
    names = {"weights": weights, "inputs": inputs, "linear": F.linear}
    step = "for w in weights: linear(inputs[w.shape[1]], w)"
    timer = Timer(step, globals=names, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median
