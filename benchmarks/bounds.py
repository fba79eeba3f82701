"""What a machine and a model allow: the other benchmarks measure speeds against these."""

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer


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


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second that a plain matrix product reaches: the peak that shares refer to."""
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(n, n, dtype=dtype, device=device)
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
