"""The transformer of Llama and Mistral (Touvron et al. 2023, Jiang et al. 2023).

    model = Transformer.from_pretrained("Mistral-7B-Instruct-v0.2", dtype=torch.bfloat16)
    logits = model(tokens)                                    # [B, T] -> [B, T, V]

Dimensions: B batch, T new tokens, S cache slots, U tokens with common prefixes merged, N selected
tokens, C width, H heads, K key/value heads, D head size, V vocabulary. Modules are named as in
Hugging Face checkpoints, so loading and saving need no mapping.
"""

import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

# transformers' defaults by model_type, where they differ from ModelConfig's
FAMILIES = {
    "llama": {},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
# other fields that change the result, each with the one value that is supported (besides null)
SUPPORTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "is_causal": True,
    "partial_rotary_factor": 1,
    "per_layer_config": {},
    "quantization_config": None,
    "configuration_files": None,  # names a file to read in place of config.json
    "transformers_weights": None,  # names a file to read in place of model.safetensors
}
LIMITS = {"num_hidden_layers": 1000, "rope_theta": 2**40}
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
MAX_FILE_BYTES = 2_000_000_000
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names


@dataclass(frozen=True)
class ModelConfig:
    """The fields of config.json that are implemented, with their types and Llama's defaults."""

    raw: dict = field(compare=False)  # the whole file, for exports
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # null: num_attention_heads
    head_dim: int  # null: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    sliding_window: int = None  # null: a token attends to all before it
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    @classmethod
    def from_file(cls, path) -> "ModelConfig":
        """Reads a config.json, or that of a folder.

        Raises UserError for a field that is missing, of the wrong type, out of range, not
        supported or that contradicts another.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        raw = read_object(path)
        family = read_field(raw, "model_type", str, path)
        fault = f'"model_type": {quote(family)} is not supported (only {", ".join(FAMILIES)})'
        require(family in FAMILIES, path, fault)
        given = FAMILIES[family] | raw | {"raw": raw}
        add_rope(given, path)
        if family == "llama":
            given["sliding_window"] = None  # LlamaForCausalLM ignores it
        values = {}
        for name, kind in cls.__annotations__.items():
            default = getattr(cls, name, ...)
            if name == "num_key_value_heads":
                default = values["num_attention_heads"]
            if name == "head_dim":
                default = values["hidden_size"] // values["num_attention_heads"]
            value = read_field(given, name, kind, path, default)
            if type(value) in (int, float):
                limit = LIMITS.get(name, 2**20)
                fault = f'"{name}" must be above 0 and at most {limit}, found {quote(value)}'
                require(0 < value <= limit, path, fault)
            values[name] = value
        config = cls(**values)
        divides = config.num_attention_heads % config.num_key_value_heads == 0
        require(divides, path, '"num_key_value_heads" must divide "num_attention_heads"')
        fault = f'"head_dim" must be even, found {config.head_dim}'
        require(config.head_dim % 2 == 0, path, fault)
        attention = "full_attention" if config.sliding_window is None else "sliding_attention"
        supported = SUPPORTED | {
            "architectures": [f"{family.title()}ForCausalLM"],
            "layer_types": [attention] * config.num_hidden_layers,
        }
        for name, value in supported.items():
            fault = f'"{name}": {quote(given.get(name))} is not supported (only {quote(value)})'
            require(given.get(name) in (None, value), path, fault)
        return config


def add_rope(given, path):
    """Adds the fields in "rope_parameters" to `given` (transformers 4: "rope_scaling")."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = read_field(given, key, dict, path, {})
        for name, value in rope.items():
            known = name in ("rope_theta", "partial_rotary_factor") or value == "default"
            fault = f'"{key}": {quote({name: value})} is not supported (only rope_type "default")'
            require(known, path, fault)
            fault = f'"{name}": {quote(given.get(name))} contradicts {quote(value)} in "{key}"'
            require(given.get(name) in (None, value), path, f"{fault}; remove the wrong one")
            given[name] = value


class KVCache(NamedTuple):
    """Keys and values of B rows [layer, B, K, S, D]; slot s of a row holds position s."""

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, model, batch, length):
        config = model.config
        shape = (
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            length,
            config.head_dim,
        )
        keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        return cls(keys, torch.zeros_like(keys))

    def view(self, rows: slice, length):
        """The first `length` slots of some rows: attention skips slots that no row has reached."""
        return KVCache(*(x[:, rows, :, :length] for x in self))

    def copy_row(self, row, to):
        for x in self:
            x[:, to] = x[:, row]


class Shared(NamedTuple):
    """Maps rows to tokens in which every common prefix is stored once.

    Of the rows A B C and A B D the tokens are A B C D, `token_at` is 0 1 2 and 0 1 3, and
    `first_at` 0 1 2 5. What layers compute at a token depends only on it and the tokens before it,
    so it is the same in all rows that begin alike. In training this saves 21 to 26% of the tokens
    (benchmarks/README.md).
    """

    token_at: Tensor  # [B, T], index of the token (0 to U - 1) at each position
    first_at: Tensor  # [U], index b * T + t where each token occurs first

    def to_rows(self, x):
        """[1, U, C] -> [B, T, C]"""
        # unlike x[0][token_at], its backward pass sums in one order on any number of threads
        return F.embedding(self.token_at, x.flatten(0, 1))

    def to_tokens(self, x):
        """[B, T, C] -> [1, U, C]"""
        return x.flatten(0, 1)[self.first_at][None]


class Inputs(NamedTuple):
    """Inputs of one forward pass that all layers share; B is 1 where `positions` were not given."""

    cos: Tensor  # [B, 1, T, D]
    sin: Tensor
    positions: Tensor  # [B, T], slots of the cache
    mask: Tensor | None  # [B, 1, H/K * T, S], added to the scores; None: causal, among new tokens
    shared: Shared | None


def rotary(config, positions):
    """Returns cos and sin [B, 1, T, D] for `positions` [B, T].

    Always float32: bfloat16 cannot tell large positions apart. The first half of sin is negated, as
    `rotate` needs it.
    """
    even = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequency = 1.0 / config.rope_theta ** (even.float() / config.head_dim)  # [D/2]
    frequencies = torch.cat([-frequency, frequency])
    angles = positions[:, None, :, None].float() * frequencies  # [B, 1, T, D], radians
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotates each pair (i, i + D/2) of x [B, heads, T, D], as Hugging Face orders them."""
    half = x.shape[-1] // 2
    return (x * cos + x.roll(half, dims=-1) * sin).type_as(x)


def attend(q, k, v, mask):
    """Attention of queries [B, H, T, D] to keys and values [B, K, S, D] -> [B, H, T, D]."""
    B, K, _, D = k.shape
    if mask is not None:
        # GQA: the heads of a group become one with H/K * T queries (index h * T + t): no repeat_kv
        y = F.scaled_dot_product_attention(q.reshape(B, K, -1, D), k, v, attn_mask=mask)
        return y.reshape(q.shape)
    dtype = q.dtype
    if q.device.type == "cpu":  # where the backward pass in bfloat16 takes twice as long
        dtype = torch.promote_types(dtype, torch.float32)
    new = (q.to(dtype), k.to(dtype), v.to(dtype))
    # padding is on the right of every real token: causal attention alone hides it
    y = F.scaled_dot_product_attention(*new, is_causal=True, enable_gqa=q.shape[1] > K)
    return y.to(q.dtype)


# no linear layer of these models has a bias
linear = partial(nn.Linear, bias=False)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        # multiply after the cast back from float32, as Llama does: in bfloat16 the other order
        # changes a quarter of the values
        return self.weight * F.rms_norm(x, self.normalized_shape, eps=self.eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        D = self.head_dim = config.head_dim
        self.q_proj = linear(C, config.num_attention_heads * D)
        self.k_proj = linear(C, config.num_key_value_heads * D)
        self.v_proj = linear(C, config.num_key_value_heads * D)
        self.o_proj = linear(config.num_attention_heads * D, C)

    def forward(self, x, inputs: Inputs, cache: KVCache | None):
        """x [B, T, C], or [1, U, C] with shared tokens -> the same shape.

        cache: that of this layer, [B, K, S, D], which stores the keys and values of x.
        """
        cos, sin, positions, mask, shared = inputs

        def heads(z):  # -> [B, heads, T, D]
            if shared is not None:
                z = shared.to_rows(z)
            return z.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

        q = rotate(heads(self.q_proj(x)), cos, sin)
        k = rotate(heads(self.k_proj(x)), cos, sin)
        v = heads(self.v_proj(x))
        if cache is not None:
            rows = torch.arange(len(k), device=k.device)[:, None]
            cache.keys[rows, :, positions] = k.transpose(1, 2)  # [B, T, K, D]
            cache.values[rows, :, positions] = v.transpose(1, 2)
            if mask is not None:  # without one, the new keys are all that there are
                k, v = cache  # [B, K, S, D]
        y = attend(q, k, v, mask).transpose(1, 2).flatten(2)  # [B, T, H * D]
        if shared is not None:
            y = shared.to_tokens(y)
        return self.o_proj(y)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, inputs: Inputs, cache: KVCache | None):
        x = x + self.self_attn(self.input_layernorm(x), inputs, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size)

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.model.embed_tokens.weight.dtype

    def forward(self, tokens, places=None, cache=None, positions=None, shared=None) -> Tensor:
        """tokens [B, T] -> logits [B, T, V], or [N, V] at `places` [N], indices b * T + t.

        Attention is causal, and padding belongs on the right. Keys and values are stored in the
        cache. Without `positions`, rows begin: their tokens have positions 0 to T - 1. With
        `positions` [B, T] and a cache, rows continue: a token attends to the slots up to its own,
        within the sliding window. Slots after it, such as those of padding, are overwritten before
        a token attends to them.

        With `shared` (from `data.share`) tokens are [1, U]; B and T are those of the rows.
        """
        T = tokens.shape[1] if shared is None else shared.token_at.shape[1]
        S = T if cache is None else cache.keys.shape[3]
        window = self.config.sliding_window or S
        masked = positions is not None or T > window
        if positions is None:
            positions = torch.arange(T, device=tokens.device)[None]  # [1, T]
        mask = self.attention_mask(positions, S, window) if masked else None
        inputs = Inputs(*rotary(self.config, positions), positions, mask, shared)
        x = self.model.embed_tokens(tokens)  # [B, T, C], or [1, U, C]
        for i, layer in enumerate(self.model.layers):
            if self.activation_checkpointing:
                layer = partial(checkpoint, layer, use_reentrant=False)
            x = layer(x, inputs, None if cache is None else KVCache(cache.keys[i], cache.values[i]))
        if shared is not None:
            x = shared.to_rows(x)  # [B, T, C]
        if places is not None:
            x = x.flatten(0, 1)[places]  # [N, C]
        x = self.model.norm(x)
        if self.config.tie_word_embeddings:
            return F.linear(x, self.model.embed_tokens.weight)
        return self.lm_head(x)

    def attention_mask(self, positions, length, window):
        """Returns the additive attention mask of `positions` [B, T] and `length` slots.

        [B, 1, H/K * T, S]: 0 where a token attends to a slot, minus infinity elsewhere.
        """
        slots = torch.arange(length, device=positions.device)
        distance = positions[:, None, :, None] - slots  # [B, 1, T, S]
        visible = (distance >= 0) & (distance < window)
        mask = torch.where(visible, 0.0, -torch.inf).to(self.dtype)
        # repeated for the heads of a group, as `attend` orders their queries: once for all layers
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        return mask.repeat(1, 1, group, 1)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu") -> "Transformer":
        """Loads a Hugging Face folder. Raises UserError for missing or unexpected content."""
        with torch.device("meta"):
            model = cls(ModelConfig.from_file(folder)).to(dtype)
        model.to_empty(device=device)
        load_weights(dict(model.named_parameters()), folder)
        return model

    def initialize(self, seed):
        """Initializes the weights, identically on any number of ranks: norms to 1, matrices from a
        normal distribution with standard deviation `initializer_range`.
        """
        for i, p in enumerate(self.parameters()):
            local, rows = local_rows(p)
            full = torch.ones(p.shape, device=local.device)
            if p.dim() > 1:
                generator = torch.Generator(local.device).manual_seed(seed * 1_000_003 + i)
                full.normal_(0, self.config.initializer_range, generator=generator)
            local.copy_(full[rows])

    def save_pretrained(self, folder, dtype=None):
        """Writes config.json and safetensors as Hugging Face does. All ranks call it.

        dtype: of the files, by default that of the parameters. Raises UserError if a weight is not
        finite.
        """
        dtype = dtype or self.dtype
        save_weights(dict(self.named_parameters()), folder, dtype)
        if is_first_rank():
            names = dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
            write_text(Path(folder) / "config.json", json.dumps(self.config.raw | names, indent=2))
        dist.barrier()  # when a rank returns, the folder is complete


# Processes


def start_processes():
    """Sets up torch.distributed on the first call; returns rank, world size and device.

    A single process is a group of one, so all scripts have one code path.
    """
    backend = "gloo"
    device = torch.device("cpu")
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.cuda.set_device(device)
        # cuDNN's attention may build a plan for every new length, which is slow
        torch.backends.cuda.enable_cudnn_sdp(False)
    if not dist.is_initialized():
        alone = {}
        if "RANK" not in os.environ:  # not started by torchrun
            alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        # a rank may wait for long, such as while rank 0 hashes a model
        dist.init_process_group(backend, timeout=timedelta(days=1), **alone)
    return dist.get_rank(), dist.get_world_size(), device


def is_first_rank():
    """Whether this is rank 0. Needs start_processes()."""
    return dist.get_rank() == 0


def from_first_rank(value):
    """Returns the value of rank 0; all ranks call it. They may see a shared folder differently."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def local_rows(p):
    """Returns the rows of a parameter that this rank holds, and which of all rows they are."""
    if not isinstance(p, DTensor):
        return p.detach(), slice(None)
    count = -(-p.shape[0] // p.device_mesh.size())  # distributed as torch.chunk does
    start = p.device_mesh.get_local_rank() * count
    return p.to_local().detach(), slice(start, start + count)


# Weights


def hash_model(path) -> str:
    """Returns a hash of a model folder's config.json and weights, or of one file.

    All ranks call it; rank 0 reads the files.
    """
    path = Path(path)
    start_processes()
    digests = b""
    if is_first_rank():
        files = [path]
        if path.is_dir():
            files = [path / "config.json", *list_weights(path)]
        for file in files:
            with open(file, "rb") as f:
                digests += hashlib.file_digest(f, "sha256").digest()
    return from_first_rank(hashlib.sha256(digests).hexdigest()[:16])


def list_weights(folder):
    """Returns the safetensors files of a folder.

    Raises UserError for missing or outdated files, and for adapters.
    """
    for file in folder.glob("adapter_*"):
        raise UserError(
            f"{file}: an adapter is not supported; merge it into the weights or remove it"
        )
    single = folder / "model.safetensors"
    index = folder / INDEX
    if not index.exists():
        fault = f"is missing, and so is {INDEX}; download one, or convert *.bin with transformers"
        require(single.exists(), single, fault)
        return [single]
    files = set()
    for name in read_field(read_object(index), "weight_map", dict, index).values():
        valid = type(name) is str and name.endswith(".safetensors") and "/" not in name
        require(valid, index, f"expected the name of a safetensors file, found {quote(name)}")
        file = folder / name
        require(file.exists(), file, f"is missing, but {INDEX} names it; download it")
        files.add(file)
    fault = f"is not one of the files that {INDEX} names; remove the outdated one"
    require(single in files or not single.exists(), single, fault)
    return sorted(files)


def load_weights(parameters, folder):
    """Copies a folder's tensors into `parameters`; each rank reads its own rows only.

    Raises UserError for tensors that are missing, unexpected, stored twice or of another shape (the
    message has the first eight), for values that are not finite floats, and for a tied head that
    differs from the embedding.
    """
    stored = {}  # by name: the file, and the tensor, which is not read yet
    faults = []
    for file in list_weights(Path(folder)):
        try:
            content = safe_open(file, "pt")
        except (SafetensorError, OSError) as e:
            raise UserError(
                f"{file}: is not a complete safetensors file ({e}); download it again"
            ) from None
        for name in content.keys():
            if name in stored:
                faults.append(f"{name}: in {file.name} and {stored[name][0].name}")
            stored[name] = file, content.get_slice(name)
    expected = dict(parameters)
    if HEAD in stored and HEAD not in parameters:  # tied: stored as head, as embedding, or as both
        expected[HEAD] = parameters[EMBEDDING]
        stored.setdefault(EMBEDDING, stored[HEAD])
    for name in sorted(expected | stored):
        shape = list(expected[name].shape) if name in expected else "nothing"
        found = stored[name][1].get_shape() if name in stored else "nothing"
        if found != shape and not name.endswith("rotary_emb.inv_freq"):  # of old checkpoints
            faults.append(f"{name}: found {found}, expected {shape}")
    if faults:
        raise UserError(
            f"{folder}: {len(faults)} tensors do not match the model: {'; '.join(faults[:8])}"
        )
    for name, p in expected.items():
        file, tensor = stored[name]
        local, rows = local_rows(p)
        new = tensor[rows].to(local)
        kind = tensor.get_dtype()
        finite = kind in FLOATS and new.isfinite().all()
        fault = f"{name} ({kind}) must hold finite numbers, of type {' or '.join(FLOATS)}"
        require(finite, file, fault)
        fault = f"{name} differs from {EMBEDDING}; set tie_word_embeddings to false in config.json"
        require(name in parameters or new.equal(local), file, fault)
        local.copy_(new)


def save_weights(parameters, folder, dtype):
    """Writes safetensors files of about 2 GB, and an index if there are several.

    All ranks call it, and each writes a share of the files. Raises UserError if a weight is not
    finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups = {}  # the names of the tensors in each file
    total = 0
    for name, p in parameters.items():
        groups.setdefault(total // MAX_FILE_BYTES, []).append(name)
        total += p.numel() * dtype.itemsize
    count = len(groups)
    rank, world_size, _ = start_processes()
    weight_map = {}
    mine = {}
    for i, names in enumerate(groups.values()):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(names, file)
        turn = i % world_size  # the rank that writes this file
        for name in names:
            full = parameters[name].detach().to(dtype)
            if isinstance(full, DTensor):
                full = full.full_tensor()  # collective: all ranks take part
            if rank == turn:
                my_file = folder / file
                fault = f"{name} has NaN or infinite values; lower --learning-rate"
                require(full.isfinite().all(), my_file, fault)
                mine[name] = full.cpu()
        # when each rank has the tensors of a file, all write at the same time
        if mine and (turn == world_size - 1 or i == count - 1):
            with writing(my_file):
                save_file(mine, my_file, metadata={"format": "pt"})
                flush_to_disk(my_file)
            mine = {}
    dist.barrier()
    if rank == 0:
        outdated = INDEX  # of an earlier model
        if count > 1:
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_text(folder / INDEX, json.dumps(content, indent=2))
            outdated = "model.safetensors"
        (folder / outdated).unlink(missing_ok=True)


# Errors and files, for all scripts


class UserError(ValueError):
    """A user's mistake, as one line: `WHERE: what is wrong, what was expected, how to fix it`."""


KINDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def require(condition, where, fault):
    """Raises UserError `WHERE: FAULT` unless the condition holds."""
    if not condition:
        raise UserError(f"{where}: {fault}")


def read_field(fields: dict, name: str, kind: type, where, default=...):
    """Returns fields[name], or the default if that is missing or null.

    kind: a key of KINDS; float accepts int, int rejects bool. Raises UserError for another type, or
    if there is neither a value nor a default.
    """
    value = fields.get(name)
    if value is None:
        require(default is not ..., where, f'"{name}" is missing; it must be {KINDS[kind]}')
        return default
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    raise UserError(f'{where}: "{name}" must be {KINDS[kind]}, found {quote(value)}')


def quote(value):
    """Returns a value as JSON, truncated for a message."""
    return json.dumps(value, ensure_ascii=False)[:60]


def read_text(path) -> str:
    """Returns the text of a UTF-8 file. Raises UserError if it can't be read or is blank."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check the path") from None
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise UserError(
            f"{path}:{line}: byte 0x{e.object[e.start]:02x} is not UTF-8; convert the file to UTF-8"
        ) from None
    require(text.strip(), path, "the file is empty or blank")
    return text


def parse_json(text: str, path, line=1):
    """Returns the value of a JSON text. Raises UserError with its `path` and `line` if invalid."""
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # fails on half of a surrogate pair
        return value
    except (ValueError, RecursionError) as e:
        line += getattr(e, "lineno", 1) - 1
        fault = str(getattr(e, "msg", e))[:60]  # without its line, which is that within `text`
        raise UserError(f"{path}:{line}: not valid JSON ({fault}); fix it") from None


def read_object(path) -> dict:
    """Returns the JSON object that a whole file holds."""
    value = parse_json(read_text(path), path)
    require(isinstance(value, dict), path, 'must hold a JSON object, {"name": value, ...}')
    return value


def write_text(path: Path, text: str):
    """Writes a UTF-8 file that appears whole or not at all, and creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        # a path that is not UTF-8, quoted in the text, gets question marks
        temporary.write_text(text + "\n", "utf-8", "replace")
        flush_to_disk(temporary)
    temporary.replace(path)


def flush_to_disk(file):
    """Returns once the file's content is on the disk, so that a rename cannot happen before."""
    with writing(file), open(file, "rb+") as f:
        os.fsync(f.fileno())


@contextmanager
def writing(path):
    """Context manager: names the file in an OSError that has no file name, such as of a full disk.

    A SafetensorError becomes an OSError.
    """
    try:
        yield
    except SafetensorError as e:
        raise OSError(f"{path}: {e}") from None
    except OSError as e:
        e.filename = e.filename or str(path)
        raise
