"""The transformer of Llama and Mistral (Touvron et al. 2023, Jiang et al. 2023), with Hugging Face's names and files.

    model = Transformer.from_pretrained("Mistral-7B-Instruct-v0.2", dtype=torch.bfloat16)
    logits = model(tokens)                                    # [B, T] -> [B, T, V]

Dimensions: B batch, T new tokens, S cached tokens, C width, H heads, K key/value heads, D head size, V vocabulary.
Every module has the name that it has in a checkpoint, so loading and saving need no table of names.
"""

import copy
import dataclasses
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

# what transformers takes for a field that config.json leaves out
DEFAULTS = dict(max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=False)
MISTRAL_DEFAULTS = dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096)
# fields that change the mathematics, each with the one value that is implemented
IMPLEMENTED = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, attention_dropout=0)
IMPLEMENTED |= dict(partial_rotary_factor=1, quantization_config=None)
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
    rope_theta: float
    sliding_window: int | None
    tie_word_embeddings: bool
    raw: dict = field(repr=False, compare=False)

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """ValueError names a field that is missing or senseless, or that asks for mathematics not implemented here."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8")) | {}
        except OSError:
            raise ValueError(f"{path}: no such file; a model folder needs a config.json") from None
        except (ValueError, TypeError) as e:
            raise ValueError(f"{path}:{getattr(e, 'lineno', 1)}: not a JSON object ({e}); download it again") from None
        mistral = raw.get("model_type") == "mistral"
        given = DEFAULTS | (MISTRAL_DEFAULTS if mistral else {}) | raw

        def check(fits: bool, name: str, wanted: str) -> None:
            if not fits:
                raise ValueError(f"{path}: {name} is {json.dumps(given.get(name))}, wanted {wanted}")

        def number(name: str, kind: type = int) -> int | float:
            value = given.get(name)
            check(type(value) in (int, kind) and 0 < value < math.inf, name, f"a positive {kind.__name__}")
            return value

        check(mistral or raw.get("model_type") == "llama", "model_type", "llama or mistral: no other is implemented")
        for name in ("rope_scaling", "rope_parameters"):  # transformers 5 has rope_theta in the latter
            rope = raw.get(name) or {}
            flat = isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values())
            scaling = flat and (rope.get("rope_type") or rope.get("type") or "default")
            check(scaling == "default", name, 'null or an object of rope_type "default": no other is implemented')
            given |= rope
        architecture = ["MistralForCausalLM" if mistral else "LlamaForCausalLM"]
        for name, value in (IMPLEMENTED | {"architectures": architecture}).items():
            check(given.get(name) in (value, None), name, f"{json.dumps(value)}: no other is implemented")
        heads, width = number("num_attention_heads"), number("hidden_size")
        for name, default in {"num_key_value_heads": heads, "head_dim": width // heads}.items():
            given[name] = default if given.get(name) is None else given[name]
        check(heads % number("num_key_value_heads") == 0, "num_key_value_heads", f"a divisor of the {heads} heads")
        check(number("head_dim") % 2 == 0, "head_dim", "an even number")
        check(given["tie_word_embeddings"] in (True, False), "tie_word_embeddings", "true or false")
        windowed = mistral and given["sliding_window"] is not None  # Llama ignores the field
        return cls(
            **{f.name: number(f.name, f.type) for f in dataclasses.fields(cls) if f.type in (int, float)},
            sliding_window=number("sliding_window") if windowed else None,
            tie_word_embeddings=given["tie_word_embeddings"],
            raw=raw,
        )


class KVCache:
    """Keys and values of `batch` rows: slot s of a row holds its token at position s, so rows may differ in length."""

    def __init__(self, config: ModelConfig, batch: int, length: int, dtype: torch.dtype, device="cpu"):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [layer, B, K, S, D]
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def part(self, rows: slice, length: int) -> "KVCache":
        """A view of some rows and the first `length` slots: attention need not see what no row has reached."""
        view = copy.copy(self)
        view.keys, view.values = self.keys[:, rows, :, :length], self.values[:, rows, :, :length]
        return view


def rotary(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, T, D] for `positions` [B, T]. Always float32: bfloat16 cannot tell large positions apart."""
    even = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequencies = 1.0 / config.rope_theta ** (even.float() / config.head_dim)  # [D/2], radians per position
    angles = positions[:, None, :, None].float() * frequencies  # [B, 1, T, D/2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (i, i + D/2) of x [B, heads, T, D]; Hugging Face checkpoints are permuted for these halves."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        # float32 inside; the weight after the cast back, as in Llama: in bfloat16 the order changes a quarter of values
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        C, D = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x, cos, sin, mask=None, cache: tuple[Tensor, Tensor] | None = None, positions=None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.view(B, T, -1, self.config.head_dim).transpose(1, 2) for y in (q, k, v))
        # [B, H, T, D] and [B, K, T, D], turned together: half as many kernels
        q, k = rotate(torch.cat([q, k], dim=1), cos, sin).split([q.shape[1], k.shape[1]], dim=1)
        if cache is not None:
            rows = torch.arange(B, device=x.device)[:, None]
            for slots, new in zip(cache, (k, v)):
                slots[rows, :, positions] = new.transpose(1, 2)
            k, v = cache  # [B, K, S, D]
        if mask is None:
            # without a cache pads stand to the right of every real token: causality alone keeps them out
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        else:
            # heads that share a key/value head become more queries of it: no copy of the cache on any backend
            y = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, q.shape[3]), k, v, attn_mask=mask)
            y = y.reshape(q.shape)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


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

    def forward(self, x, cos, sin, mask=None, cache=None, positions=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.activation_checkpointing = config, False
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model["layers"] = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model["norm"] = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, select: Tensor | None = None, cache=None, positions=None) -> Tensor:
        """tokens [B, T] -> logits [B, T, V], or [N, V] at `select` [N], places in the flattened [B * T].

        Without a cache the attention is causal and pads belong on the right. With one, `positions` [B, T] gives each
        token its slot, and it sees the slots up to its own: what lies beyond, pads included, is overwritten in time.
        """
        config, mask, window = self.config, None, self.config.sliding_window
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # [1, T]
        positions = positions.contiguous()  # a compiled layer would have a program for every stride
        cos, sin = rotary(config, positions)
        x = self.model["embed_tokens"](tokens)  # [B, T, C]
        if cache is not None or (window and tokens.shape[1] > window):
            slots = positions[0] if cache is None else torch.arange(cache.keys.shape[3], device=tokens.device)
            distance = positions[:, None, :, None] - slots  # [B, 1, T, S]
            seen = (distance >= 0) & (distance < window) if window else distance >= 0
            # as a sum, and once for each of the heads that share a key/value head, so that no layer need make it
            mask = torch.where(seen, 0.0, -math.inf).to(x.dtype)
            mask = mask.repeat(1, 1, config.num_attention_heads // config.num_key_value_heads, 1)
        for i, layer in enumerate(self.model["layers"]):
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache and (cache.keys[i], cache.values[i]), positions)
        if select is not None:
            x = x.flatten(0, 1)[select]  # [N, C]
        x = self.model["norm"](x)
        return F.linear(x, self.model["embed_tokens"].weight) if config.tie_word_embeddings else self.lm_head(x)

    def compile_layers(self, **options) -> None:
        """Makes one program of a layer, the same for all layers and lengths, with `options` of torch.compile."""
        for layer in self.model["layers"]:
            layer.forward = torch.compile(layer.forward, dynamic=True, options=options or None)

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
        """Random weights, the same on any number of ranks of a kind of device: matrices N(0, 0.02), norms 1."""
        std = self.config.raw.get("initializer_range", 0.02)
        for i, p in enumerate(self.parameters()):
            local, start = local_rows(p)
            full = torch.ones(p.shape, device=local.device)
            if p.dim() > 1:
                full.normal_(0, std, generator=torch.Generator(local.device).manual_seed(seed + i))
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
        torch.backends.cuda.enable_cudnn_sdp(False)  # it may make a plan for every new length
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
    if index.exists():
        try:
            files = sorted({folder / Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index}: not a safetensors index; download it again") from None
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                slices = {name: f.get_slice(name) for name in f.keys()}
                parts = {name: (list(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{file}: not a whole safetensors file, and no other kind is read ({e})") from None
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
        wrong[8:] = [f"and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise ValueError(f"{folder}: weights do not fit config.json: {'; '.join(wrong)}")
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
    folder, shards, error = Path(folder), [[]], None
    sizes = {name: p.numel() * dtype.itemsize for name, p in parameters.items()}
    for name in sizes:
        if shards[-1] and sum(sizes[other] for other in [*shards[-1], name]) > MAX_FILE_BYTES:
            shards.append([])
        shards[-1].append(name)
    n = len(shards)
    files = [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)] if n > 1 else ["model.safetensors"]
    for file, names in zip(files, shards):
        part = {}
        for name in names:
            p = parameters[name].detach()
            full = p.full_tensor() if isinstance(p, DTensor) else p  # collective: on every rank, also after an error
            if is_first_rank():
                part[name] = full.to("cpu", dtype).contiguous()
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
        for old in {index, *folder.glob("model*.safetensors")} - {folder / file for file in files}:
            old.unlink(missing_ok=True)  # of an earlier export with another number of files
        if n > 1:
            places = {name: file for file, names in zip(files, shards) for name in names}
            content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
            index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
