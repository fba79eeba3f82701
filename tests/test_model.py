"""The model computes what transformers computes; files that ask for anything else are refused."""

import dataclasses
import inspect
import json
import os
import random
import re
import shutil

import pytest
import torch
from conftest import CONFIG, ODD, write_config, write_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import model as model_module
from data import share
from model import (
    SUPPORTED,
    KVCache,
    ModelConfig,
    Shared,
    Transformer,
    UserError,
    flush_to_disk,
    hash_model,
    parse_json,
    read_field,
    read_object,
    read_text,
    save_weights,
    write_text,
    writing,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.layers.1.input_layernorm.weight"
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
WINDOWS = {"llama": {}, "mistral window": MISTRAL | {"sliding_window": 4}}
# float32 sums in another order than transformers'; logits here are of size 1 to 10
CLOSE = {"atol": 1e-4, "rtol": 0}


def load_theirs(folder):
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32).eval()


def random_tokens(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 480, shape, generator=generator)


# 1. The mathematics

VARIANTS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "tie_word_embeddings absent": {"tie_word_embeddings": ...},
    "head_dim given": {"head_dim": 32},
    "one kv head": {"num_key_value_heads": 1},
    "kv heads absent": {"num_key_value_heads": ...},
    "eps absent": {"rms_norm_eps": ...},
    "rope_theta": {"rope_theta": 500.0, "rope_scaling": None},
    "rope_theta absent": {"rope_theta": ...},
    "rope_parameters": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rope_theta": ...,
    },
    "rope_theta twice": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500},
        "rope_theta": 500.0,
    },
    "rope_scaling": {"rope_scaling": {"type": "default"}},
    "dtype": {"torch_dtype": ..., "dtype": "float32"},
    "architectures absent": {"architectures": ...},
    "llama ignores window": {"sliding_window": 5},
    "layer_types": {"layer_types": ["full_attention"] * 2},
    "pretraining_tp": {"pretraining_tp": 2},
    "of other families": {
        "attention_multiplier": 3.0,
        "attn_logit_softcapping": 1.0,
        "embedding_multiplier": 12.0,
        "final_logit_softcapping": 3.0,
        "logit_scale": 0.5,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.1,
        "use_qk_norm": True,
    },
    "mistral": MISTRAL | {"sliding_window": 5},
    "mistral, window null": MISTRAL | {"sliding_window": None},
    "mistral, all absent": MISTRAL
    | {
        "num_attention_heads": 8,
        "num_key_value_heads": ...,
        "max_position_embeddings": ...,
    },
    "mistral, of qwen": MISTRAL
    | {
        "sliding_window": 5,
        "use_sliding_window": False,
        "max_window_layers": 1,
    },
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_equal_transformers_with_and_without_cache(tmp_path, name):
    folder = write_model(tmp_path, **VARIANTS[name])
    tokens = random_tokens(2, 24)
    model = Transformer.from_pretrained(folder)
    theirs = load_theirs(folder)
    for field in ("max_position_embeddings", "tie_word_embeddings"):
        assert getattr(theirs.config, field) == getattr(model.config, field)
    if theirs.config.model_type == "mistral":
        assert theirs.config.sliding_window == model.config.sliding_window
    expected = theirs(tokens).logits
    assert_close(model(tokens), expected, **CLOSE)
    cache = KVCache.empty(model, 2, 24)
    steps = [model(tokens[:, :9], cache=cache)]
    for part in torch.arange(9, 24).split([1, 6, *[1] * 8]):
        positions = part.expand(2, -1)
        steps.append(model(tokens[:, part], cache=cache, positions=positions))
    assert_close(torch.cat(steps, 1), expected, **CLOSE)


@pytest.mark.parametrize("name", WINDOWS)
@torch.no_grad()
def test_rows_at_different_positions_of_the_cache_equal_the_full_forward(tmp_path, name):
    model = Transformer.from_pretrained(write_model(tmp_path, **WINDOWS[name]))
    tokens = random_tokens(3, 20)
    full = model(tokens)
    rows = torch.arange(3)
    lengths = torch.tensor([3, 11, 7])
    cache = KVCache.empty(model, 3, 20)
    padding = torch.arange(11) >= lengths[:, None]
    padded = tokens[:, :11].masked_fill(padding, 0)
    logits = model(padded, cache=cache.view(slice(3), 11))
    at = lengths - 1
    assert_close(logits[rows, at], full[rows, at], **CLOSE)
    for _ in range(9):
        at = at + 1
        new = tokens[rows, at][:, None]
        step = model(new, cache=cache, positions=at[:, None])
        assert_close(step[:, 0], full[rows, at], **CLOSE)


@torch.no_grad()
def test_prefill_builds_no_mask_where_no_window_ends(folder, tmp_path, monkeypatch):
    masks = []
    mask_of = Transformer.attention_mask

    def counted(*args):
        masks.append(mask_of(*args))
        return masks[-1]

    monkeypatch.setattr(Transformer, "attention_mask", counted)
    window = write_model(tmp_path, **WINDOWS["mistral window"])
    for path, lengths in ((folder, [9, 1]), (window, [4, 1])):
        model = Transformer.from_pretrained(path)
        for length in lengths:
            tokens = random_tokens(2, length)
            model(tokens, cache=KVCache.empty(model, 2, 9))
            model(tokens)
    assert masks == []
    model(random_tokens(2, 5), cache=KVCache.empty(model, 2, 9))
    assert masks[0].shape == (1, 1, 2 * 5, 9)


@torch.no_grad()
def test_a_row_that_moves_in_the_cache_takes_its_keys_and_values_along(folder):
    model = Transformer.from_pretrained(folder)
    tokens = random_tokens(2, 6)
    cache = KVCache.empty(model, 2, 6)
    model(tokens[:, :5], cache=cache)
    cache.copy_row(1, 1)
    cache.copy_row(1, 0)
    step = model(tokens[1:, 5:], cache=cache.view(slice(1), 6), positions=torch.tensor([[5]]))
    assert_close(step[0, 0], model(tokens)[1, 5], **CLOSE)


@pytest.mark.parametrize("name", WINDOWS)
@torch.no_grad()
def test_greedy_tokens_of_rows_of_different_lengths_equal_transformers(tmp_path, name):
    folder = write_model(tmp_path, **WINDOWS[name])
    theirs = load_theirs(folder)
    model = Transformer.from_pretrained(folder)
    prompts = [random_tokens(n, seed=n).tolist() for n in (1, 13, 5, 8)]
    tokens, shared = share(prompts)
    cache = KVCache.empty(model, 4, 28)
    rows = torch.arange(4)
    at = torch.tensor([len(prompt) for prompt in prompts]) - 1
    logits = model(tokens, at + 13 * rows, cache.view(slice(4), 13), shared=shared)
    new = [logits.argmax(-1)]
    for _ in range(14):
        at = at + 1
        logits = model(new[-1][:, None], cache=cache, positions=at[:, None])
        new.append(logits[:, 0].argmax(-1))
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt, ids in zip(prompts, torch.stack(new, 1), strict=True):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=15, **settings)
        assert ids.tolist() == out[0, len(prompt) :].tolist()


@torch.no_grad()
def test_selected_logits_are_the_full_ones_and_padding_on_the_right_changes_none(folder):
    model = Transformer.from_pretrained(folder)
    tokens = random_tokens(3, 10)
    places = torch.tensor([29, 0, 7, 7, 12])
    full = model(tokens)
    assert_close(model(tokens, places), full.flatten(0, 1)[places], **CLOSE)
    padded = tokens * (torch.arange(10) < 6)
    assert_close(model(padded)[:, :6], full[:, :6], **CLOSE)
    assert model(tokens, places[:0]).shape == (0, 480)


# five rows of a common beginning, two of them of one longer, one of another, one twice
FAMILY = [
    [7, 8, 9, 10, 11, 12],
    [7, 8, 9, 10, 13],
    [7, 8, 20, 21, 22, 23, 24, 25, 26],
    [30, 8, 9, 10],
    [7, 8, 20, 21, 22, 23, 24, 25, 26],
]


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_tokens_give_the_logits_and_gradients_of_separate_rows(
    tmp_path, name, checkpointing
):
    folder = write_model(tmp_path, **WINDOWS[name])
    model = Transformer.from_pretrained(folder).double()
    tokens, shared = share(FAMILY)
    assert tokens.shape == (1, 6 + 1 + 7 + 4)
    expected = torch.cat([model(torch.tensor([row]))[0] for row in FAMILY])
    (expected * expected.detach().sin()).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing = checkpointing
    places = []
    for b, row in enumerate(FAMILY):
        places += range(b * 9, b * 9 + len(row))
    logits = model(tokens, torch.tensor(places), shared=shared)
    assert_close(logits, expected, atol=1e-10, rtol=0)
    (logits * logits.detach().sin()).sum().backward()
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert_close(p.grad, gradient, atol=1e-10, rtol=1e-8)


def test_shared_tokens_are_spread_over_rows_and_collected_again():
    shared = Shared(torch.tensor([[0, 1, 2], [0, 1, 3]]), torch.tensor([0, 1, 2, 5]))
    x = torch.arange(8.0).view(1, 4, 2)
    rows = shared.to_rows(x)
    assert rows[:, :, 0].tolist() == [[0, 2, 4], [0, 2, 6]]
    assert shared.to_tokens(rows).equal(x)


def test_gradients_of_shared_tokens_are_the_same_bits_on_two_threads(folder):
    model = Transformer.from_pretrained(folder)
    common = random_tokens(40, seed=1).tolist()
    rows = [common + random_tokens(24, seed=n).tolist() for n in range(16)]
    tokens, shared = share(rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    gradients = []
    for _ in range(3):
        model.zero_grad()
        model(tokens, shared=shared).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.set_num_threads(threads)
    assert all(map(torch.equal, gradients[0], gradients[1]))
    assert all(map(torch.equal, gradients[0], gradients[2]))


def test_activation_checkpointing_computes_layers_twice_and_gives_the_same_gradients(folder):
    tokens = random_tokens(2, 12)
    gradients = []
    calls = []
    for flag in (False, True):
        model = Transformer.from_pretrained(folder)
        model.activation_checkpointing = flag
        count = []
        norm = model.get_submodule("model.layers.0.input_layernorm")
        norm.register_forward_hook(lambda *_, count=count: count.append(1))
        model(tokens).logsumexp(-1).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        calls.append(len(count))
    assert calls == [1, 2]
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        # the same operations, run again
        assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


# 2. Loading and saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_load_and_save_keep_every_bit(tmp_path, dtype, tied):
    write_model(tmp_path / "a", tie_word_embeddings=tied)
    Transformer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", dtype)
    Transformer.from_pretrained(tmp_path / "b", dtype).save_pretrained(tmp_path / "c")
    b = load_file(tmp_path / "b" / SINGLE)
    c = load_file(tmp_path / "c" / SINGLE)
    assert b.keys() == c.keys()
    for name, tensor in b.items():
        assert tensor.dtype == c[name].dtype == dtype
        assert tensor.equal(c[name])
    config = read_object(tmp_path / "c/config.json")
    assert config.pop("dtype") == str(dtype).removeprefix("torch.")
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    original = read_object(tmp_path / "a/config.json")
    original.pop("dtype")
    assert config | {"torch_dtype": "float32"} == original


@pytest.mark.parametrize("name", ["llama", "tied", "rope_parameters", "mistral"])
@torch.no_grad()
def test_transformers_reads_what_we_write_and_we_what_it_writes(tmp_path, name):
    mine = Transformer.from_pretrained(write_model(tmp_path / "a", **VARIANTS[name]))
    tokens = random_tokens(1, 12)
    mine.save_pretrained(tmp_path / "b", torch.bfloat16)
    theirs = load_theirs(tmp_path / "b")
    mine = Transformer.from_pretrained(tmp_path / "b")
    assert_close(theirs(tokens).logits, mine(tokens), **CLOSE)
    theirs.save_pretrained(tmp_path / "c")
    again = Transformer.from_pretrained(tmp_path / "c")
    assert_close(again(tokens), mine(tokens), **CLOSE)


ONE_FILE = 10**10
SIZES = [[150_000], [150_000, ONE_FILE], [ONE_FILE, 150_000], [300_000, 150_000]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@torch.no_grad()
def test_export_in_several_files_or_over_an_older_one_is_the_same_model(
    tmp_path, monkeypatch, sizes
):
    for seed, size in enumerate(sizes):
        monkeypatch.setattr(model_module, "MAX_FILE_BYTES", size)
        write_model(tmp_path / "a", seed=seed)
    index = tmp_path / "a" / INDEX
    assert index.exists() == (size < ONE_FILE)
    if index.exists():
        content = read_object(index)
        files = content["weight_map"]
        assert len(set(files.values())) > 2
        tensors = {name: load_file(tmp_path / "a" / file)[name] for name, file in files.items()}
        assert content["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    expected = Transformer.from_pretrained(write_model(tmp_path / "fresh", seed=seed))
    mine = Transformer.from_pretrained(tmp_path / "a").state_dict()
    for name, tensor in expected.state_dict().items():
        assert mine[name].equal(tensor)
    tokens = random_tokens(1, 12)
    assert_close(load_theirs(tmp_path / "a")(tokens).logits, expected(tokens), **CLOSE)


def test_each_rank_writes_a_share_of_the_files(folder, tmp_path, monkeypatch):
    parameters = dict(Transformer.from_pretrained(folder).named_parameters())
    monkeypatch.setattr(model_module, "MAX_FILE_BYTES", 70_000)
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    before = set()
    for rank in (2, 1, 0):
        monkeypatch.setattr(model_module, "start_processes", lambda rank=rank: (rank, 3, "cpu"))
        save_weights(parameters, tmp_path, torch.float32)
        files = set(tmp_path.glob("*.safetensors"))
        numbers = [int(file.name[6:11]) for file in files - before]
        assert len(numbers) > 1
        assert {number % 3 for number in numbers} == {(rank + 1) % 3}
        assert (tmp_path / INDEX).exists() == (rank == 0)
        before = files
    shutil.copy(folder / "config.json", tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    for name, p in parameters.items():
        assert loaded.get_parameter(name).equal(p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_any_float_type_load_and_rotary_buffers_are_ignored(tmp_path, dtype):
    file = write_model(tmp_path) / SINGLE
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors | buffer, file)
    loaded = Transformer.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].equal(tensor.float())


@pytest.mark.parametrize("names", [[HEAD], [EMBEDDING], [HEAD, EMBEDDING]], ids=str)
@torch.no_grad()
def test_tied_weights_load_under_either_name(tmp_path, names):
    file = write_model(tmp_path, tie_word_embeddings=True) / SINGLE
    expected = Transformer.from_pretrained(tmp_path)
    tensors = load_file(file)
    embedding = tensors.pop(EMBEDDING)
    save_file(tensors | {name: embedding.clone() for name in names}, file)
    loaded = Transformer.from_pretrained(tmp_path)
    tokens = random_tokens(1, 12)
    assert loaded(tokens).equal(expected(tokens))
    assert_close(load_theirs(tmp_path)(tokens).logits, loaded(tokens), **CLOSE)
    loaded.save_pretrained(tmp_path)
    assert load_file(file).keys() == tensors.keys() | {EMBEDDING}


def test_files_that_are_not_the_model_are_neither_read_nor_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "MAX_FILE_BYTES", 150_000)
    write_model(tmp_path)
    before = hash_model(tmp_path)
    expected = Transformer.from_pretrained(tmp_path).state_dict()
    (tmp_path / "consolidated.safetensors").write_text("of Mistral's own library")
    (tmp_path / "pytorch_model.bin").write_text("of old versions of transformers")
    assert hash_model(tmp_path) == before
    loaded = Transformer.from_pretrained(tmp_path).state_dict()
    assert all(map(torch.equal, loaded.values(), expected.values()))


def test_hash_is_that_of_configuration_and_weights(tmp_path):
    write_model(tmp_path / "a")
    a = hash_model(tmp_path / "a")
    assert re.fullmatch("[0-9a-f]{16}", a)
    assert hash_model(write_model(tmp_path / "b")) == a
    assert hash_model(write_model(tmp_path / "b", seed=1)) != a
    write_config(tmp_path / "a", rope_theta=500.0)
    assert hash_model(tmp_path / "a") != a
    file = hash_model(tmp_path / "a/config.json")
    assert file not in (a, hash_model(tmp_path / "b/config.json"))


@pytest.mark.parametrize("bad", ["nan", "inf", "1e39"])
def test_weights_that_are_not_finite_are_refused_by_name_at_save(tmp_path, bad):
    model = Transformer.from_pretrained(write_model(tmp_path))
    before = (tmp_path / SINGLE).read_bytes()
    norm = model.get_parameter(NORM).data.double()  # 1e39 is finite, and no float32
    norm[3] = float(bad)
    parameters = dict(model.named_parameters()) | {NORM: norm}
    with pytest.raises(UserError, match=f"{SINGLE}: {NORM} has NaN"):
        save_weights(parameters, tmp_path, torch.float32)
    assert (tmp_path / SINGLE).read_bytes() == before


# 3. Weights that are refused

UP = "model.layers.2.mlp.up_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


def stored(change):
    """Changes the tensors of model.safetensors."""

    def spoil(folder):
        content = load_file(folder / SINGLE)
        change(content)
        save_file(content, folder / SINGLE)

    return spoil


def value(name, x, at=3):
    def change(tensors):
        tensors[name][at] = x

    return stored(change)


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def gone(name):
    return lambda folder: (folder / name).unlink()


def truncated(size):
    return lambda folder: os.truncate(folder / SINGLE, size)


def sharded(change=None, file="model-00001-of-00002.safetensors"):
    """Moves half of the tensors to another file, and changes the index."""

    def spoil(folder):
        tensors = load_file(folder / SINGLE)
        first = {name: tensors.pop(name) for name in sorted(tensors)[:9]}
        other = "model-00002-of-00002.safetensors"
        (folder / SINGLE).unlink()
        save_file(first, folder / file)
        save_file(tensors, folder / other)
        files = dict.fromkeys(first, file) | dict.fromkeys(tensors, other)
        if change is not None:
            change(files, folder)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))

    return spoil


def second_copy(files, folder):
    name = folder / "model-00001-of-00002.safetensors"
    save_file(load_file(name) | {NORM: torch.ones(64)}, name)


def absent_file(files, folder):
    (folder / files[NORM]).unlink()


def single_file(files, folder):
    save_file({NORM: torch.ones(64)}, folder / SINGLE)


def outside(name):
    def change(files, folder):
        save_file({NORM: torch.ones(64)}, folder.parent / "x.safetensors")
        files[NORM] = name

    return sharded(change)


def tied(change):
    def spoil(folder):
        tensors = load_file(folder / SINGLE)
        tensors[HEAD] = change(tensors[EMBEDDING].clone())
        save_file(tensors, folder / SINGLE)
        write_config(folder, tie_word_embeddings=True)

    return spoil


def with_nan(x):
    x[479, 63] = float("nan")
    return x


WRONG_FILES = {
    "missing norm": (
        stored(lambda t: t.pop(NORM)),
        rf"{NORM}: found nothing, expected \[64\]",
    ),
    "missing head": (
        stored(lambda t: t.pop(HEAD)),
        f"{HEAD}: found nothing",
    ),
    "unexpected layer": (
        stored(lambda t: t.update({UP: t[HEAD].clone()})),
        rf"{UP}: found \[480, 64\], expected nothing",
    ),
    "unexpected bias": (stored(lambda t: t.update({BIAS: t[NORM].clone()})), BIAS),
    "wrong shape": (
        stored(lambda t: t.update({HEAD: t[HEAD][:9].clone()})),
        rf"{HEAD}: found \[9, 64\], expected \[480, 64\]",
    ),
    "integer": (
        stored(lambda t: t.update({NORM: t[NORM].to(torch.int8)})),
        f"{SINGLE}: {NORM} .*must hold finite",
    ),
    "nan": (
        value(NORM, float("nan")),
        f"{SINGLE}: {NORM} .*must hold finite",
    ),
    "inf": (
        value(NORM, float("-inf")),
        f"{SINGLE}: {NORM} .*must hold finite",
    ),
    "no config": (
        gone("config.json"),
        "config.json: cannot be read",
    ),
    "broken config": (
        text("config.json", '{"eos": 2,\n\n"bos" 1}'),
        r"config\.json:3: ",
    ),
    "config is a list": (
        text("config.json", "[]"),
        "config.json: must hold a JSON object",
    ),
    "no weights": (
        gone(SINGLE),
        f"{SINGLE}: is missing",
    ),
    "truncated weights": (
        truncated(99_000),
        f"{SINGLE}: is not a complete",
    ),
    "truncated header": (
        truncated(40),
        f"{SINGLE}: is not a complete",
    ),
    "empty weights": (
        truncated(0),
        f"{SINGLE}: is not a complete",
    ),
    "broken index": (
        text(INDEX, '{"weight_map"'),
        f"{INDEX}:1: not valid JSON",
    ),
    "index without map": (text(INDEX, "{}"), f'{INDEX}: "weight_map" is missing'),
    "index of numbers": (
        text(INDEX, '{"weight_map": {"x": 3}}'),
        f"{INDEX}: .* found 3",
    ),
    "empty map": (
        text(INDEX, '{"weight_map": {}}'),
        f"{SINGLE}: is not one of.*{INDEX}",
    ),
    "index and single file": (
        sharded(single_file),
        f"{SINGLE}: is not one of.*{INDEX}",
    ),
    "missing file": (
        sharded(absent_file),
        f"00002.safetensors: is missing, but {INDEX} names",
    ),
    "two copies": (
        sharded(second_copy),
        f"{NORM}: in model-00002.* and model-00001",
    ),
    "folder in the index": (outside("../x.safetensors"), f'{INDEX}: .* "../x.safetensors"'),
    "folder above": (outside(".."), f'{INDEX}: .* ".."'),
    "adapter": (
        text("adapter_config.json", "{}"),
        "adapter_config.json: an adapter is not",
    ),
    "adapter weights": (
        text("adapter_model.safetensors", ""),
        "adapter_model.safetensors: ",
    ),
    "tied, other values": (
        tied(torch.neg),
        f"{HEAD} differs from {EMBEDDING}; set tie_word_embeddings",
    ),
    "tied, one NaN": (
        tied(with_nan),
        f"{HEAD} ",
    ),
    "tied, integers": (
        tied(lambda x: x.to(torch.int8)),
        f"{HEAD} .*must hold finite",
    ),
    "tied, other vocabulary": (
        tied(lambda x: x[:300].clone()),
        rf"{HEAD}: found \[300, 64\]",
    ),
    "tied, larger vocabulary": (
        tied(lambda x: torch.cat([x, x])),
        f"{HEAD}: found",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_weights_that_do_not_match_are_refused_by_file_or_tensor(tmp_path, name):
    spoil, message = WRONG_FILES[name]
    spoil(write_model(tmp_path / "model"))
    with pytest.raises(UserError, match=message) as caught:
        Transformer.from_pretrained(tmp_path / "model")
    assert str(caught.value).startswith(str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", SINGLE])
def test_files_that_the_index_names_load(tmp_path, file):
    expected = Transformer.from_pretrained(write_model(tmp_path)).state_dict()
    sharded(file=file)(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path).state_dict()
    assert all(map(torch.equal, loaded.values(), expected.values()))


# 4. Configurations that are refused

YARN = {"rope_type": "yarn", "factor": 4.0}
WRONG_CONFIGS = {
    '"hidden_act": "gelu" is not supported': {"hidden_act": "gelu"},
    '"rope_scaling": .*yarn.* is not supported': {"rope_scaling": YARN},
    '"rope_scaling": .*linear': {"rope_scaling": {"type": "linear", "factor": 2.0}},
    '"rope_scaling": .*factor': {"rope_scaling": {"factor": 2.0}},
    '"rope_scaling" must be an object': {"rope_scaling": "linear"},
    '"rope_parameters": .*yarn': {"rope_parameters": YARN},
    '"rope_parameters": .*layer': {"rope_parameters": {"layer": {"rope_type": "default"}}},
    '"rope_theta": 10000.0 contradicts 500.0 in "rope_parameters"': {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}
    },
    '"rope_theta": 10000.0 contradicts 500.0 in "rope_scaling"': {
        "rope_scaling": {"rope_type": "default", "rope_theta": 500.0}
    },
    '"rope_theta" must be above 0': {"rope_theta": -1.0},
    '"partial_rotary_factor": 0.5': {"partial_rotary_factor": 0.5},
    '"partial_rotary_factor": 0.25': {"rope_parameters": {"partial_rotary_factor": 0.25}},
    '"attention_bias": true': {"attention_bias": True},
    '"mlp_bias": true': {"mlp_bias": True},
    '"is_causal": false': {"is_causal": False},
    '"per_layer_config"': {"per_layer_config": {"1": {"num_attention_heads": 2}}},
    '"transformers_weights": "x.safetensors"': {"transformers_weights": "x.safetensors"},
    '"quantization_config"': {"quantization_config": {"quant_method": "awq", "bits": 4}},
    '"layer_types": .*is not supported': {"layer_types": ["full_attention", "sliding_attention"]},
    r'"layer_types": \["full_attention"\] is': {"layer_types": ["full_attention"]},
    '"layer_types": .*full.*(only .*sliding': MISTRAL
    | {"sliding_window": 4, "layer_types": ["full_attention"] * 2},
    '"layer_types": .*sliding.*(only .*full': MISTRAL
    | {"sliding_window": None, "layer_types": ["sliding_attention"] * 2},
    '"architectures": .*Qwen2ForCausalLM': {"architectures": ["Qwen2ForCausalLM"]},
    '"architectures": .*only .*Llama': {"architectures": MISTRAL["architectures"]},
    '"architectures": .*only .*Mistral': {"model_type": "mistral"},
    '"model_type": "qwen2" is not supported': {"model_type": "qwen2"},
    '"model_type" is missing': {"model_type": ...},
    '"vocab_size" is missing; it must be a whole number': {"vocab_size": ...},
    '"num_hidden_layers" must be a whole number, found "two"': {"num_hidden_layers": "two"},
    '"num_key_value_heads" must divide': {"num_key_value_heads": 3},
    '"num_attention_heads" must be above 0': {"num_attention_heads": 0},
    '"hidden_size" must be above 0 and at most 1048576': {"hidden_size": 10**30},
    '"hidden_size" must be a whole number': {"hidden_size": 1e30},
    '"rope_theta" must be above 0 and.*1000': {"rope_theta": 10**400},
    '"rms_norm_eps" must be above 0.*NaN': {"rms_norm_eps": float("nan")},
    '"head_dim" must be even, found 15': {"head_dim": 15},
    '"head_dim" must be above 0': {"num_attention_heads": 128},
    '"tie_word_embeddings" must be true or false': {"tie_word_embeddings": 2},
}


@pytest.mark.parametrize("message", WRONG_CONFIGS)
def test_config_that_is_not_supported_is_refused_by_name(tmp_path, message):
    write_config(tmp_path, **WRONG_CONFIGS[message])
    with pytest.raises(UserError, match=message.replace("(only", r"\(only")) as caught:
        Transformer.from_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json: "))


# what transformers reads for these families that changes neither logits nor gradients here
WITHOUT_EFFECT = """
    _attn_implementation _commit_hash _experts_implementation attn_implementation
    attention_chunk_size bos_token_id compile_config
    chunk_size_feed_forward distributed_config dtype eos_token_id experts_implementation
    fusion_config gradient_checkpointing id2label init_std initializer_factor is_encoder_decoder
    kv_sharing_modes label2id mlp_layer_types name_or_path num_labels number_of_conv_states
    output_attentions output_hidden_states pad_token_id pretraining_tp problem_type return_dict
    sep_token_id torch_dtype transformers_version use_cache
    first_k_dense_replace mtp_layer_types mtp_mlp_layer_types mtp_per_layer_config num_mtp_layers
""".split()
READ_ELSEWHERE = {"architectures", "layer_types", "model_type", "rope_parameters", "rope_scaling"}


def fields_of_transformers():
    """Names of all fields of config.json that transformers reads for Llama and Mistral."""
    transformers = pytest.importorskip("transformers")
    llama = transformers.models.llama
    mistral = transformers.models.mistral
    names = set()
    for config in (transformers.LlamaConfig, transformers.MistralConfig):
        names |= {field.name for field in dataclasses.fields(config)}
    base = transformers.PreTrainedConfig
    for function in (base.__post_init__, base.convert_rope_params_to_dict):
        source = inspect.getsource(function)
        names |= set(re.findall(r'kwargs\.(?:pop|get)\("(\w+)"', source))
    names |= set(re.findall(r'"(\w+)" in (?:config_dict|self)\b', inspect.getsource(base)))
    for module in (
        base,
        llama.modeling_llama,
        mistral.modeling_mistral,
        transformers.cache_utils,
        transformers.masking_utils,
        transformers.modeling_utils,
    ):
        source = inspect.getsource(module)
        names |= set(re.findall(r'(?:get|has)attr\([a-z_.]*config, "(\w+)"', source))
        if "models" in module.__name__:
            names |= set(re.findall(r"\bconfig\.(\w+)", source))
    return names


def test_each_field_that_transformers_reads_is_implemented_without_effect_or_refused():
    implemented = ModelConfig.__annotations__.keys()
    known = {*implemented, *SUPPORTED, *READ_ELSEWHERE, *WITHOUT_EFFECT}
    names = fields_of_transformers()
    assert len(names) > 50
    assert names - known == set()
    assert not {*implemented, *SUPPORTED} & {*WITHOUT_EFFECT}


def test_fields_without_effect_have_none(tmp_path):
    write_config(tmp_path)
    expected = ModelConfig.from_file(tmp_path)
    for name in [*WITHOUT_EFFECT, "nobody_knows_it"]:
        write_config(tmp_path, **{name: {"odd": [1, None]}})
        assert ModelConfig.from_file(tmp_path) == expected


def test_fields_that_are_not_supported_are_refused_with_any_other_value(tmp_path):
    for name, supported in SUPPORTED.items():
        write_config(tmp_path, **{name: supported})
        ModelConfig.from_file(tmp_path)
        write_config(tmp_path, **{name: ["other"]})
        with pytest.raises(UserError, match=rf'"{name}": \["other"\] is not supported'):
            ModelConfig.from_file(tmp_path)


NUMBERS = [*CONFIG, "head_dim", "sliding_window", "rope_scaling", "rope_parameters", "mlp_bias"]


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_value_in_any_field_of_the_config_is_one_line_or_the_same_model(tmp_path, odd):
    write_config(tmp_path)
    expected = ModelConfig.from_file(tmp_path)
    refused = 0
    for name in NUMBERS:
        fields = dict(CONFIG)
        fields.pop(name, None)
        rest = json.dumps(fields)[1:]
        (tmp_path / "config.json").write_text(f'{{"{name}": {ODD[odd]}, {rest}')
        try:
            config = ModelConfig.from_file(tmp_path)
        except UserError as e:
            refused += 1
            assert str(e).startswith(str(tmp_path))
            assert "\n" not in str(e)
            assert len(str(e)) < 600
        else:
            # true is the other value of tie_word_embeddings, and null stands for a default
            if odd != "null" and (name, odd) != ("tie_word_embeddings", "true"):
                assert config == expected
    assert refused >= (6 if odd == "null" else 12)


DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}


def test_fields_that_are_null_or_absent_have_the_defaults_of_transformers(tmp_path):
    for value in (None, ...):
        write_config(tmp_path, **dict.fromkeys(DEFAULTS, value))
        config = ModelConfig.from_file(tmp_path)
        for name, default in DEFAULTS.items():
            assert getattr(config, name) == default


LARGE = [2**20, 2**29, 2**30, 2**31 - 2]


@pytest.mark.parametrize("seed", range(20))
def test_sizes_that_no_machine_holds_are_one_line(tmp_path, seed):
    r = random.Random(seed)
    names = [name for name in CONFIG if name.endswith("_size")]
    names += ["num_attention_heads", "head_dim"]
    changes = {name: r.choice(LARGE) for name in r.sample(names, 3)}
    if r.random() < 0.5:
        changes["num_key_value_heads"] = 2**29
    folder = write_model(tmp_path)
    write_config(folder, **changes)
    with pytest.raises(UserError, match="config.json|tensors do not match"):
        Transformer.from_pretrained(folder)


# 5. Errors and files

FIELDS = {"text": "x", "count": 3, "share": 0.5, "flag": True, "null": None, "many": [1]}
WRONG_FIELDS = {
    ("text", int): '"text" must be a whole number, found "x"',
    ("share", int): '"share" must be a whole number, found 0.5',
    ("flag", int): '"flag" must be a whole number, found true',
    ("flag", float): '"flag" must be a number, found true',
    ("count", bool): '"count" must be true or false, found 3',
    ("many", dict): r'"many" must be an object, found \[1\]',
    ("null", str): '"null" is missing; it must be text',
    ("none", list): '"none" is missing; it must be a list',
}


def test_a_field_is_read_if_it_is_of_its_type():
    for name, value in FIELDS.items():
        if value is not None:
            assert read_field(FIELDS, name, type(value), "x:1") is value
    assert read_field(FIELDS, "count", float, "x:1") == 3
    assert read_field(FIELDS, "null", str, "x:1", "default") == "default"
    assert read_field(FIELDS, "none", list, "x:1", None) is None
    for (name, kind), message in WRONG_FIELDS.items():
        with pytest.raises(UserError, match=f"^x:1: {message}$"):
            read_field(FIELDS, name, kind, "x:1")


WRONG_TEXTS = {
    b"": "the file is empty",
    b" \n": "the file is empty",
    b"a\nb\nc\xe9": "byte 0xe9 is not UTF-8; convert the file to UTF-8",
}


def test_text_is_utf8_with_or_without_a_mark_and_in_lines_of_any_system(tmp_path):
    file = tmp_path / "x"
    file.write_bytes("\ufeffGröße\r\nx".encode())
    assert read_text(file) == "Größe\nx"
    for content, message in WRONG_TEXTS.items():
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"x(:3)?: {message}"):
            read_text(file)
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be read .Is a directory"):
        read_text(tmp_path)


def test_json_that_is_broken_is_refused_with_its_line():
    assert parse_json('{"a": [1]}', "x") == {"a": [1]}
    for text in ('{"a": 1,\n"b" 2}', '\n"\\ud800" 1', "1\n2"):
        with pytest.raises(UserError, match=r"^x:6: not valid JSON \(.*\); fix it$"):
            parse_json(text, "x", line=5)
    with pytest.raises(UserError, match="^x:5: not valid JSON"):
        parse_json('"\\ud800"', "x", line=5)


def test_a_file_is_written_whole_with_its_folder(tmp_path):
    file = tmp_path / "a/b/x.json"
    for content in ("first", '{"a": "ä"}'):
        write_text(file, content)
        assert file.read_text("utf-8") == content + "\n"
    assert read_object(file) == {"a": "ä"}
    assert os.listdir(file.parent) == ["x.json"]


def test_a_path_that_is_not_utf8_is_one_line_or_written(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(UserError, match="cannot be read"):
        ModelConfig.from_file(folder)
    write_text(folder / "x", f"read from {folder}")
    assert read_text(folder / "x").endswith("caf?\n")
    write_config(folder)
    with pytest.raises(UserError, match=f"{SINGLE}: is missing"):
        Transformer.from_pretrained(folder)


def test_a_full_disk_names_the_file(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs Linux")
    (tmp_path / "x.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/x'"):
        write_text(tmp_path / "x", "content")
    with pytest.raises(OSError, match="No space left on device: 'ledger'"):
        with writing("ledger"), open("/dev/full", "w") as f:
            f.write("row")
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}/none'"):
        flush_to_disk(tmp_path / "none")
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(OSError, match=f"^{tmp_path}/{SINGLE}: .*Is a directory"):
        save_weights({"x": torch.ones(2)}, tmp_path, torch.float32)
