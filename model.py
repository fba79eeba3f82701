"""The transformer of Llama and Mistral (Touvron et al. 2023, Jiang et al. 2023), with Hugging Face's names and files.

    model = Transformer.from_pretrained("Mistral-7B-Instruct-v0.2", dtype=torch.bfloat16)
    logits = model(tokens)                                    # [B, T] -> [B, T, V]

Dimensions: B batch, T new tokens, S cached tokens, C width, H heads, K key/value heads, D head size, V vocabulary.
Every module has the name that it has in a checkpoint, so loading and saving need no table of names.
"""

import copy
import json
import math
import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
MAX_FILE_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says about the mathematics; `raw` is the file itself, handed on at export."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: dict  # rope_type, rope_theta, and what the type needs
    sliding_window: int | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    raw: dict = field(repr=False, compare=False)

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Reads config.json in all its spellings; an absent field means what transformers takes for it.

        ValueError names a field that is missing or wrong, or that asks for mathematics not implemented here.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8")) | {}
        except OSError:
            raise ValueError(f"{path}: no such file; a model folder needs a config.json") from None
        except (ValueError, TypeError) as e:
            raise ValueError(f"{path}:{getattr(e, 'lineno', 1)}: not a JSON object ({e}); download it again") from None

        def number(name: str, default=None, fields: dict = raw, kind: type = int):
            value = default if fields.get(name) is None else fields[name]
            require(
                type(value) in (int, kind) and 0 < value < math.inf, path, name, value, f"a positive {kind.__name__}"
            )
            return value

        mistral = is_mistral(raw, path)
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = {name: number(name) for name in names}
        heads = sizes["num_attention_heads"]
        kv_heads = number("num_key_value_heads", 8 if mistral and "num_key_value_heads" not in raw else heads)
        require(heads % kv_heads == 0, path, "num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
        head_dim = number("head_dim", sizes["hidden_size"] // heads)
        require(head_dim % 2 == 0, path, "head_dim", head_dim, "an even number")
        windowed = mistral and raw.get("sliding_window", 4096) is not None  # Llama ignores the field
        flags = {name: raw.get(name) or False for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")}
        for name, value in flags.items():
            require(value in (False, True), path, name, value, "true or false")
        return cls(
            **sizes,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=number("max_position_embeddings", 131072 if mistral else 2048),
            rms_norm_eps=number("rms_norm_eps", 1e-6, kind=float),
            rope=read_rope(raw, number, path),
            sliding_window=number("sliding_window", 4096) if windowed else None,
            tie_word_embeddings=flags["tie_word_embeddings"],
            attention_bias=flags["attention_bias"] and not mistral,
            mlp_bias=flags["mlp_bias"] and not mistral,
            raw=raw,
        )


def require(fits: bool, path, name: str, value, wanted: str) -> None:
    """ValueError `PATH: NAME is VALUE, wanted WANTED` unless it fits."""
    if not fits:
        raise ValueError(f"{path}: {name} is {json.dumps(value)}, wanted {wanted}")


def is_mistral(raw: dict, path) -> bool:
    """Mistral or Llama? Refuses another architecture, and what would change the mathematics of these."""
    name = "architectures" if raw.get("architectures") else "model_type"
    family = raw[name][0] if isinstance(raw.get(name), list) else raw.get(name)
    known = {"LlamaForCausalLM": False, "llama": False, "MistralForCausalLM": True, "mistral": True}
    require(family in known, path, name, family, "LlamaForCausalLM or MistralForCausalLM: no other is implemented")
    for name, wanted in {"hidden_act": "silu", "attention_dropout": 0, "quantization_config": None}.items():
        require(raw.get(name) in (wanted, None), path, name, raw.get(name), f"{wanted}: no other is implemented")
    return known[family]


def read_rope(raw: dict, number, path) -> dict:
    """Llama-2 gives no rotary settings, transformers 4 rope_theta and rope_scaling, transformers 5 rope_parameters."""
    rope = {"original_max_position_embeddings": raw.get("max_position_embeddings")}
    for name in ("rope_scaling", "rope_parameters"):
        given = raw.get(name) or {}
        plain = isinstance(given, dict) and not any(isinstance(value, (dict, list)) for value in given.values())
        require(plain, path, name, given, "an object of plain values")
        rope |= given
    rope["rope_type"] = kind = rope.get("rope_type") or rope.get("type") or "default"
    require(kind in ROPE_NEEDS, path, "rope_type", kind, f"one of {', '.join(ROPE_NEEDS)}: no other is implemented")
    part = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    require(part in (None, 1), path, "partial_rotary_factor", part, "1: no other is implemented")
    rope["rope_theta"] = number("rope_theta", raw.get("rope_theta") or 10000.0, rope, float)
    rope |= {name: number(name, None, rope, float) for name in ROPE_NEEDS[kind]}
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        require(low < high, path, "high_freq_factor", high, f"more than low_freq_factor, {low}")
    return rope


class KVCache:
    """Keys and values of `batch` rows: slot s of a row holds its token at position s, so rows may differ in length."""

    def __init__(self, config: ModelConfig, batch: int, length: int, dtype: torch.dtype, device="cpu"):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [layer, B, K, S, D]
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v [B, K, T, D] at `positions` [B, T] and returns all of the layer's keys and values."""
        slots = positions[:, None, :, None].expand_as(k)
        keys, values = self.keys[layer], self.values[layer]
        return keys.scatter_(2, slots, k), values.scatter_(2, slots, v)

    def first(self, length: int) -> "KVCache":
        """A view of the first `length` slots: attention need not look at slots that no row has reached."""
        view = copy.copy(self)
        view.keys, view.values = self.keys[:, :, :, :length], self.values[:, :, :, :length]
        return view


def rotary(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, D] for `positions` [B, T]. Always float32: bfloat16 has too few digits for large positions."""
    rope, half = config.rope, torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequencies = 1.0 / rope["rope_theta"] ** (half / config.head_dim)  # [D/2], radians per position
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    elif rope["rope_type"] == "llama3":
        # long waves are slowed by `factor`, short ones kept, those between blended
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / rope["factor"]
    angles = positions[..., None].float() * frequencies  # [B, T, D/2]
    angles = torch.cat([angles, angles], dim=-1)  # [B, T, D]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (i, i + D/2) of x [B, heads, T, D]; Hugging Face checkpoints are permuted for these halves."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos[:, None] + turned * sin[:, None]).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        # cast back before the weight, as Llama does: in bfloat16 the order changes a quarter of the values
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        C, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=bias)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=bias)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=bias)

    def forward(self, x, cos, sin, mask=None, cache: KVCache | None = None, positions=None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.view(B, T, -1, self.config.head_dim).transpose(1, 2) for y in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # [B, H, T, D], [B, K, T, D]
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)  # [B, K, S, D]
        if mask is None:
            # without a cache pads stand to the right of every real token: causality alone keeps them out
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        else:
            # heads that share a key/value head become more queries of it: no copy of the cache on any backend
            group = q.shape[1] // k.shape[1]
            q = q.reshape(B, k.shape[1], group * T, -1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, 1, group, 1))
            y = y.view(B, -1, T, self.config.head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask=None, cache=None, positions=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.activation_checkpointing = config, False
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model["layers"] = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model["norm"] = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, select: Tensor | None = None, cache=None, positions=None) -> Tensor:
        """tokens [B, T] -> logits [B, T, V], or [N, V] at `select` [N], places in the flattened [B * T].

        Without a cache the attention is causal and pads belong on the right. With one, `positions` [B, T] gives each
        token its slot, and it sees the slots up to its own: what lies beyond, pads included, is overwritten in time.
        """
        mask, window = None, self.config.sliding_window
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # [1, T]
        if cache is not None or (window and tokens.shape[1] > window):
            slots = positions[0] if cache is None else torch.arange(cache.keys.shape[3], device=tokens.device)
            distance = positions[:, None, :, None] - slots  # [B, 1, T, S]
            mask = (distance >= 0) & (distance < window) if window else distance >= 0
        cos, sin = rotary(self.config, positions)
        x = self.model["embed_tokens"](tokens)  # [B, T, C]
        for layer in self.model["layers"]:
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache, positions)
        if select is not None:
            x = x.flatten(0, 1)[select]  # [N, C]
        x = self.model["norm"](x)
        return F.linear(x, self.model["embed_tokens"].weight) if self.config.tie_word_embeddings else self.lm_head(x)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype=torch.float32, device="cpu") -> "Transformer":
        """Loads a Hugging Face folder. ValueError names the file and each missing, surplus or misshapen tensor."""
        config = ModelConfig.from_file(Path(folder) / "config.json")
        with torch.device("meta"):
            model = cls(config).to(dtype)
        index = read_index(folder, {name: p.shape for name, p in model.named_parameters()})
        model.to_empty(device=device)
        load_weights(dict(model.named_parameters()), index)
        return model.eval()

    def initialize(self, seed: int) -> None:
        """Random weights, the same on any number of ranks: matrices N(0, 0.02), norms 1, biases 0."""
        for i, (name, p) in enumerate(self.named_parameters()):
            full = torch.zeros(p.shape) if name.endswith("bias") else torch.ones(p.shape)
            if p.dim() > 1:
                full.normal_(
                    0, self.config.raw.get("initializer_range", 0.02), generator=torch.Generator().manual_seed(seed + i)
                )
            local, start = local_rows(p)
            local.copy_(full[start : start + local.shape[0]])

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes config.json and safetensors as Hugging Face does, in `dtype` (the parameters' own by default).

        Every rank calls it, rank 0 writes. OSError where the disk is full or the folder cannot be written.
        """
        dtype = dtype or next(self.parameters()).dtype
        save_weights(dict(self.named_parameters()), folder, dtype)
        if is_first_rank():
            key = "torch_dtype" if "torch_dtype" in self.config.raw else "dtype"
            raw = self.config.raw | {key: str(dtype).removeprefix("torch.")}
            (Path(folder) / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def start_processes() -> tuple[int, int, torch.device]:
    """-> rank, world size, device. One process is a group of one, so that there is one code path."""
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        launched = "RANK" in os.environ  # by torchrun
        alone = {} if launched else dict(store=dist.HashStore(), rank=0, world_size=1)
        # a rank may wait long for one that has more to write; one that dies is noticed at once
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=1), **alone)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def is_first_rank() -> bool:
    """Whether this process writes: rank 0, or one without a process group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def local_rows(p: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of a parameter and the index of the first; `fully_shard` deals rows as torch.chunk does."""
    if not isinstance(p, DTensor):
        return p.detach(), 0
    return p.to_local().detach(), p.device_mesh.get_local_rank() * -(-p.shape[0] // p.device_mesh.size())


def read_index(folder: str | Path, shapes: dict[str, torch.Size]) -> dict[str, Path]:
    """Reads only headers; returns tensor name -> file once names, shapes and number types are known to fit."""
    folder, found, wrong = Path(folder), {}, []
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    try:
        if index.exists():
            names = set(json.loads(index.read_text())["weight_map"].values())
            files = [folder / Path(name).name for name in sorted(names)]
        elif not files[0].exists():
            files = sorted(folder.glob("*.safetensors"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: not a safetensors index; download it again") from None
    if not files:
        raise ValueError(f"{folder}: no *.safetensors file; weights are read from safetensors alone")
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                parts = {name: f.get_slice(name) for name in f.keys()}
                parts = {name: (list(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{file}: not a whole safetensors file ({e}); download it again") from None
        for name, (shape, dtype) in parts.items():
            if name not in shapes:
                # buffers of old checkpoints, and the copy of the embedding that a tied head is
                if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
                    wrong.append(f"surplus {name}")
            elif shape != list(shapes[name]):
                wrong.append(f"{name} has shape {shape}, config.json wants {list(shapes[name])}")
            elif dtype not in ("F64", "F32", "F16", "BF16"):
                wrong.append(f"{name} has type {dtype}, which is no float that is read here")
            elif name in found:
                wrong.append(f"{name} stands in {found[name].name} and in {file.name}")
            found[name] = file
    wrong += [f"missing {name}" for name in shapes if name not in found]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{folder}: weights do not fit config.json: {'; '.join(wrong[:8])}{more}")
    return {name: found[name] for name in shapes}


def load_weights(parameters: dict[str, Tensor], index: dict[str, Path]) -> None:
    """Copies tensors into `parameters` in place, one at a time; of a sharded one each rank reads its own rows."""
    for file in sorted(set(index.values())):
        with safe_open(file, "pt") as f:
            for name in [n for n in parameters if index[n] == file]:
                local, start = local_rows(parameters[name])
                if local.numel():
                    local.copy_(f.get_slice(name)[start : start + local.shape[0]])


def save_weights(parameters: dict[str, Tensor], folder: str | Path, dtype: torch.dtype) -> None:
    """Writes files of at most 5 GB, with an index if there are several. Gathers one tensor at a time; rank 0 writes."""
    folder, error, shards, room = Path(folder), None, [[]], MAX_FILE_BYTES
    sizes = {name: p.numel() * dtype.itemsize for name, p in parameters.items()}
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = MAX_FILE_BYTES
        shards[-1].append(name)
        room -= size
    places = {}
    for i, names in enumerate(shards, 1):
        file, part = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors", {}
        for name in names:
            p = parameters[name]
            full = p.full_tensor() if isinstance(p, DTensor) else p  # collective: on every rank, also after an error
            places[name] = file
            if is_first_rank():
                part[name] = full.detach().to("cpu", dtype).contiguous()
        try:
            if is_first_rank() and not error:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(part, folder / file, metadata={"format": "pt"})
        except (SafetensorError, OSError) as e:
            error = OSError(f"{folder / file}: cannot be written ({e}); free space or choose another folder")
    if error:
        raise error
    if is_first_rank():
        index = folder / "model.safetensors.index.json"
        for old in [*folder.glob("model*.safetensors"), index]:  # of an earlier export with another number of files
            if old.name not in places.values():
                old.unlink(missing_ok=True)
        if len(shards) > 1:
            content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
            index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
