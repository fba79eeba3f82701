"""The transformer of Llama and Mistral (Touvron et al. 2023, Jiang et al. 2023).

    model = Transformer.from_pretrained("Mistral-7B-Instruct-v0.2", dtype=torch.bfloat16)
    logits = model(tokens)                                    # [B, T] -> [B, T, V]

Dimensions: B batch, T new tokens, S cached tokens, C width, H heads, K key/value heads, D head
size, V vocabulary. Every module is called what it is called in a Hugging Face checkpoint, so
loading and saving need no table of names.
"""

import hashlib
import json
import math
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

# what transformers takes for a field that config.json leaves out
DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
MISTRAL_DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
# fields that change the mathematics, each with the one value that is implemented here
IMPLEMENTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "quantization_config": None,
}
MAX_FILE_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says about the mathematics; `raw` is the file, handed on at export."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    tie_word_embeddings: bool
    raw: dict = field(repr=False, compare=False)

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Reads a config.json, or that of a folder.

        ValueError names a field that is missing, senseless, or asks for other mathematics.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        with blaming(path):
            return cls.from_fields(read_object(path), path)

    @classmethod
    def from_fields(cls, raw, path):
        mistral = raw.get("model_type") == "mistral"
        given = DEFAULTS | (MISTRAL_DEFAULTS if mistral else {}) | raw
        for name in ("rope_scaling", "rope_parameters"):  # the latter is of transformers 5
            rope = raw.get(name) or {}
            fits = isinstance(rope, dict) and not any(isinstance(x, dict) for x in rope.values())
            kind = fits and rope.get("rope_type", rope.get("type"))
            require(kind in ("default", None), path, f"{name}: no rotary scaling is implemented")
            given |= rope  # rope_theta may stand there
        wanted = IMPLEMENTED | {"model_type": "mistral" if mistral else "llama"}
        wanted["architectures"] = ["MistralForCausalLM" if mistral else "LlamaForCausalLM"]
        for name, value in wanted.items():
            found = given.get(name, value)
            fault = f"{name} is {json.dumps(found)[:60]}; implemented is {json.dumps(value)}"
            require(found in (value, None), path, fault)

        heads = positive(given, "num_attention_heads", int, path)
        if given.get("num_key_value_heads") is None:
            given["num_key_value_heads"] = heads
        if given.get("head_dim") is None:
            given["head_dim"] = positive(given, "hidden_size", int, path) // heads
        values = {"raw": raw, "tie_word_embeddings": given["tie_word_embeddings"]}
        fits = type(values["tie_word_embeddings"]) is bool
        require(fits, path, "tie_word_embeddings must be true or false")
        for name in sorted(cls.__dataclass_fields__.keys() - values.keys()):
            kind = float if name in ("rms_norm_eps", "rope_theta") else int
            values[name] = positive(given, name, kind, path)
        if not mistral:
            values["sliding_window"] = None  # Llama ignores the field
        config = cls(**values)
        fits = heads % config.num_key_value_heads == 0 and config.head_dim % 2 == 0
        require(fits, path, f"num_key_value_heads must divide {heads}, and head_dim be even")
        return config


def positive(given, name, kind, path):
    """A number of the configuration, in the range that any real model has."""
    value = given.get(name)
    if name == "sliding_window" and value is None:
        return None
    most = 2**20 if kind is int else 2**40
    if name == "num_hidden_layers":
        most = 1000
    fits = type(value) in (int, kind) and 0 < value <= most
    require(fits, path, f"{name} is {json.dumps(value)[:40]}, wanted a number up to {most}")
    return value


@dataclass
class KVCache:
    """Keys and values of B rows [layer, B, K, S, D]: slot s of a row holds its token at s."""

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, model: "Transformer", batch: int, length: int):
        config = model.config
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, batch, heads, length, config.head_dim)
        keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        return cls(keys, torch.zeros_like(keys))

    def view(self, rows: slice, length: int):
        """Some rows and the first `length` slots: attention need not see what no row reached."""
        return KVCache(self.keys[:, rows, :, :length], self.values[:, rows, :, :length])

    def move(self, row: int, to: int):
        for x in (self.keys, self.values):
            x[:, to] = x[:, row]


class Shared(NamedTuple):
    token_at: Tensor
    first_at: Tensor


class Layout(NamedTuple):
    """How the tokens of one pass lie, the same for every layer."""

    cos: Tensor  # [B, 1, T, D]
    sin: Tensor
    mask: Tensor | None  # [B, 1, H/K * T, S], added to the scores; None: causality alone
    positions: Tensor  # [B, T], slots of the cache
    shared: tuple | None  # `new` and `same` of `data.share`


def rotary(config: ModelConfig, positions: Tensor):
    """cos and sin [B, 1, T, D] for `positions` [B, T].

    Always float32: bfloat16 cannot tell large positions apart.
    """
    even = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequencies = 1.0 / config.rope_theta ** (even.float() / config.head_dim)  # [D/2]
    angles = positions[:, None, :, None].float() * frequencies  # [B, 1, T, D/2], radians
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Turns each pair (i, i + D/2) of x [B, heads, T, D], the halves of Hugging Face's files."""
    half = x.shape[-1] // 2
    return (x * cos + x.roll(half, dims=-1) * sin).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # the weight after the cast back from float32, as in Llama: in bfloat16 the other order
        # changes a quarter of the values
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C = config.hidden_size
        D = self.head_dim = config.head_dim
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x: Tensor, layout: Layout, cache=None) -> Tensor:
        """cache: this layer's keys and values, which take the new ones in.

        x is [B, T, C]; or [1, U, C] where tokens are shared, and is then unrolled to rows.
        """
        cos, sin, mask, positions, shared = layout
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        if shared:
            same, new = shared
            # unlike z[0][same], its backward pass sums in one order on any number of threads
            q, k, v = (F.embedding(same, z[0]) for z in (q, k, v))  # [B, T, heads * D]
        shape = (*q.shape[:2], -1, self.head_dim)
        q = rotate(q.view(shape).transpose(1, 2), cos, sin)  # [B, H, T, D]
        k = rotate(k.view(shape).transpose(1, 2), cos, sin)  # [B, K, T, D]
        v = v.view(shape).transpose(1, 2)
        if cache is not None:
            keys, values = cache
            rows = torch.arange(len(k), device=x.device)[:, None]
            keys[rows, :, positions] = k.transpose(1, 2)  # [B, T, K, D]
            values[rows, :, positions] = v.transpose(1, 2)
            k = keys  # [B, K, S, D]
            v = values
        if mask is None:
            # pads stand to the right of every real token: causality alone keeps them out
            grouped = q.shape[1] != k.shape[1]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            # heads that share a key/value head become more queries of it: no copy of the cache
            queries = q.reshape(len(q), k.shape[1], -1, self.head_dim)  # [B, K, H/K * T, D]
            y = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask).reshape(q.shape)
        y = y.transpose(1, 2).flatten(2)  # [B, T, H * D]
        if shared:
            y = y.flatten(0, 1)[new][None]
        return self.o_proj(y)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layout: Layout, cache=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layout, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config) for _ in range(config.num_hidden_layers)]
        self.model["layers"] = nn.ModuleList(blocks)
        self.model["norm"] = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.model["embed_tokens"].weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model["embed_tokens"].weight.dtype

    def forward(self, tokens, places=None, cache=None, positions=None, shared=None) -> Tensor:
        """tokens [B, T] -> logits [B, T, V], or [N, V] at `places` [N] in B * T.

        Without a cache the attention is causal, and pads belong on the right. With one,
        `positions` [B, T] gives each token its slot, and it sees the slots up to its own: what
        lies beyond, pads included, is overwritten in time.

        With `shared`, of `data.share`, tokens [1, U] are read once for all rows that begin with
        them; attention alone sees the rows, and its `same` [B, T] has their shape.
        """
        same = shared.token_at if shared else tokens  # [B, T]
        if positions is None:
            positions = torch.arange(same.shape[1], device=tokens.device)[None]  # [1, T]
        positions = positions.contiguous()  # a compiled layer has a program for every stride
        cos, sin = rotary(self.config, positions)
        layout = Layout(cos, sin, self.attention_mask(positions, cache), positions, shared)
        x = self.model["embed_tokens"](tokens)  # [B, T, C], or [1, U, C]
        for i, layer in enumerate(self.model["layers"]):
            run = layer
            if self.activation_checkpointing:
                run = partial(checkpoint, layer, use_reentrant=False)
            x = run(x, layout, cache and (cache.keys[i], cache.values[i]))
        if shared:
            x = F.embedding(same, x[0])  # [B, T, C]
        if places is not None:
            x = x.flatten(0, 1)[places]  # [N, C]
        x = self.model["norm"](x)
        if self.config.tie_word_embeddings:
            return F.linear(x, self.model["embed_tokens"].weight)
        return self.lm_head(x)

    def attention_mask(self, positions, cache):
        """What is added to the scores; None where causality alone will do."""
        config = self.config
        window = config.sliding_window
        if cache is not None:
            slots = torch.arange(cache.keys.shape[3], device=positions.device)
        elif window and positions.shape[1] > window:
            slots = positions[0]
        else:
            return None
        distance = positions[:, None, :, None] - slots  # [B, 1, T, S]
        seen = distance >= 0
        if window:
            seen = seen & (distance < window)
        mask = torch.where(seen, 0.0, -math.inf).to(self.dtype)
        # once for each of the heads that share a key/value head, so that no layer need do it
        return mask.repeat(1, 1, config.num_attention_heads // config.num_key_value_heads, 1)

    def compile_layers(self, **options):
        """One program for all layers and lengths, with `options` of torch.compile."""
        for layer in self.model["layers"]:
            layer.forward = torch.compile(layer.forward, dynamic=True, options=options or None)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu") -> "Transformer":
        """Loads a Hugging Face folder. ValueError names each missing, surplus or bad tensor."""
        config = ModelConfig.from_file(folder)
        with torch.device("meta"):
            model = cls(config).to(dtype)
        model.to_empty(device=device)
        load_weights(dict(model.named_parameters()), folder)
        return model

    def initialize(self, seed):
        """Random weights, the same on any number of ranks: matrices N(0, 0.02), norms 1."""
        std = self.config.raw.get("initializer_range", 0.02)
        for i, p in enumerate(self.parameters()):
            local, start = local_rows(p)
            full = torch.ones(p.shape, device=local.device)
            if p.dim() > 1:
                generator = torch.Generator(local.device).manual_seed(seed + i)
                full.normal_(0, std, generator=generator)
            local.copy_(full[start : start + local.shape[0]])

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None):
        """Writes config.json and safetensors as Hugging Face does; every rank calls it.

        dtype: of the file, by default the parameters' own. OSError where it can't be written,
        FloatingPointError where a weight is not finite.
        """
        dtype = dtype or self.dtype
        save_weights(dict(self.named_parameters()), folder, dtype)
        if is_first_rank():
            key = "torch_dtype" if "torch_dtype" in self.config.raw else "dtype"
            content = self.config.raw | {key: str(dtype).removeprefix("torch.")}
            write_text(Path(folder) / "config.json", json.dumps(content, indent=2))


def start_processes(timeout=timedelta(days=1)):
    """-> rank, world size, device. One process is a group of one: there is one code path.

    timeout: how long a rank waits for the others; one that waits for whole files needs long.
    """
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        if "RANK" in os.environ:  # launched by torchrun
            alone = {}
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timeout, **alone)
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it may make a plan for every new length
    return dist.get_rank(), dist.get_world_size(), device


def is_first_rank():
    """Whether this process writes: rank 0, or one without a process group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def local_rows(p):
    """This rank's rows of a parameter, and the index of the first of them."""
    if not isinstance(p, DTensor):
        return p.detach(), 0
    rows = -(-p.shape[0] // p.device_mesh.size())  # dealt as torch.chunk deals them
    return p.to_local().detach(), p.device_mesh.get_local_rank() * rows


def hash_model(folder):
    """sha256 over configuration and weights, or over one file."""
    folder = Path(folder)
    digest = hashlib.sha256()
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    for file in [folder] if folder.is_file() else files:
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


def find_weights(folder, parameters):
    """Tensor name -> file, once the files' headers are known to fit. Reads no weights."""
    found = {}
    wrong = []
    for file in weight_files(Path(folder)):
        for name, shape, dtype in read_header(file):
            if name not in parameters:
                # buffers of old checkpoints, and the copy of the embedding that a tied head is
                if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
                    wrong.append(f"surplus {name}")
                continue
            wanted = list(parameters[name].shape)
            if shape != wanted:
                wrong.append(f"{name} has shape {shape}, not {wanted}")
            if dtype not in ("F64", "F32", "F16", "BF16"):
                wrong.append(f"{name} has type {dtype}, which is no float that is read here")
            if name in found:
                wrong.append(f"{name} stands in {found[name].name} and in {file.name}")
            found[name] = file
    wrong += [f"missing {name}" for name in parameters if name not in found]
    first = "; ".join(wrong[:8])
    fault = f"{len(wrong)} tensors do not fit the model: {first}"
    require(not wrong, folder, fault)
    return found


def weight_files(folder):
    """The safetensors files of a model: those of its index, or the only one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    with blaming(index):
        places = read_object(index)["weight_map"]
        return sorted({folder / Path(name).name for name in places.values()})


def read_header(file):
    """Name, shape and type of each tensor of a safetensors file."""
    header = []
    try:
        with safe_open(file, "pt") as f:
            for name in f.keys():
                part = f.get_slice(name)
                header.append((name, list(part.get_shape()), part.get_dtype()))
    except (SafetensorError, OSError) as e:
        text = f"{file}: not a whole safetensors file, and no other kind is read"
        raise UserError(f"{text} ({e})") from None
    return header


def load_weights(parameters, folder):
    """Copies a folder's tensors into `parameters`; of sharded ones each rank reads its own rows.

    ValueError names what is missing, surplus, misshapen, or not finite.
    """
    files = find_weights(folder, parameters)
    for file in sorted(set(files.values())):
        with safe_open(file, "pt") as f:
            for name, p in parameters.items():
                if files[name] != file:
                    continue
                local, start = local_rows(p)
                if local.numel():
                    local.copy_(f.get_slice(name)[start : start + local.shape[0]])
                fault = f"{name} holds NaN or infinity; get the file anew"
                require(local.isfinite().all(), file, fault)


def save_weights(parameters, folder, dtype):
    """Writes files of at most 5 GB, with an index if there are several. Rank 0 writes.

    Every rank calls it: tensors are gathered one at a time, and only rank 0 keeps them.
    """
    folder = Path(folder)
    shares = [[]]  # the names in each file
    size = 0
    for name, p in parameters.items():
        size += p.numel() * dtype.itemsize
        if shares[-1] and size > MAX_FILE_BYTES:
            shares.append([])
            size = p.numel() * dtype.itemsize
        shares[-1].append(name)
    weight_map = {}
    for i, names in enumerate(shares):
        file = "model.safetensors"
        if len(shares) > 1:
            file = f"model-{i + 1:05}-of-{len(shares):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        write_weights({name: parameters[name] for name in names}, folder / file, dtype)
    index = folder / "model.safetensors.index.json"
    if is_first_rank() and len(shares) > 1:
        total = sum(p.numel() for p in parameters.values()) * dtype.itemsize
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(index, json.dumps(content, indent=2))
    if is_first_rank():  # what an earlier model has left here
        stale = index if len(shares) == 1 else folder / "model.safetensors"
        stale.unlink(missing_ok=True)


def write_weights(parameters, file, dtype):
    """One safetensors file. FloatingPointError names a weight that is not finite."""
    tensors = {}
    for name, p in parameters.items():
        full = p.detach()
        if isinstance(p, DTensor):
            full = full.full_tensor()  # collective: every rank takes part
        if is_first_rank():
            tensors[name] = full.to("cpu", dtype).contiguous()
            if not tensors[name].isfinite().all():
                raise FloatingPointError(f"{file}: {name} is not finite, so it is not written")
    if not is_first_rank():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(f"{file}: cannot be written ({e}); free space, then run it again") from None
    flush_to_disk(file)


# Files, for all scripts


class UserError(ValueError):
    """A user's mistake: one line, `WHERE: what is wrong, what to do`."""


def require(condition, where, fault):
    """Raises UserError `WHERE: FAULT` unless the condition holds."""
    if not condition:
        raise UserError(f"{where}: {fault}")


KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


def read_field(fields, name, kind, where, default=...):
    value = fields.get(name)
    if value is None:
        require(default is not ..., where, f'"{name}" is missing; it must be {KINDS[kind]}')
        return default
    kinds = (int, float) if kind is float else (kind,)
    require(type(value) in kinds, where, f'"{name}" must be {KINDS[kind]}, found {json.dumps(value)[:40]}')
    return value


@contextmanager
def blaming(where):
    """Turns errors that a file's content causes into one ValueError that names the place."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, OverflowError) as e:
        fault = f"not understood ({type(e).__name__}: {e}); the README has the forms of files"
        raise UserError(f"{where}: {fault}") from None


def read_text(path):
    """Text of a UTF-8 file. ValueError if it can't be read or is blank."""
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; give a file that can be read") from None
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        fault = f"not UTF-8 (byte 0x{content[e.start]:02x}); convert the file"
        raise UserError(f"{path}:{line}: {fault}") from None
    require(text.strip(), path, "the file is empty")
    return text


def parse_json(text, path, line=1):
    """The value that `text`, which begins in this line of the file, holds."""
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # refuses half of a surrogate pair
        return value
    except (ValueError, RecursionError) as e:
        line += getattr(e, "lineno", 1) - 1
        raise UserError(f"{path}:{line}: broken JSON ({str(e)[:60]}); mend it") from None


def read_object(path):
    """The JSON object that is the whole file."""
    value = parse_json(read_text(path), path)
    require(isinstance(value, dict), f"{path}:1", "wanted a JSON object")
    return value


def write_text(path, text):
    """Writes a line-ended UTF-8 file that appears whole or not at all, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    flush_to_disk(temporary)
    temporary.replace(path)


def flush_to_disk(file):
    """Returns once the file's content is on the disk: a rename must not overtake it."""
    with open(file, "rb+") as f:
        os.fsync(f.fileno())
