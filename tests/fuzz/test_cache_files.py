"""Files of compressed images that somebody has changed: refused in a sentence, or read as what was written."""

import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from voco_llama_hf import VoCoCache
from voco_llama_hf.modeling.cache_voco_llama import digest_file


MEMORY = 200_000_000  # bytes, beyond what the process took before
FINGERPRINT = {"version": "2", "text_model": "llama", "layers": "2", "weights": "float32:0 bfloat16:1"}
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "C64", "F4", "X", "", None, 3)
NESTED = "[" * 100_000, '{"a":' * 50_000, "[[1]]", "[" + "1," * 200_000 + "1]"
VALUES = (None, True, 0, -1, 1.5, 1e400, float("nan"), 2**63, "1", "", [], [1], [[2]], {}, {"a": {"b": 1}}, [True, 3])


def make_cache() -> VoCoCache:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(6, 2, 2, 4, generator=generator) for _ in range(2))
    return VoCoCache(keys, values, [1, 2, 3], FINGERPRINT)


def whole_file(folder: Path) -> bytes:
    make_cache().save(folder / "whole.safetensors")
    return (folder / "whole.safetensors").read_bytes()


def split(content: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    start, end = sorted(rng.choices(range(len(content) + 1), k=2))
    return rng.choice((content[:start], content[end:], content[:start] + content[end:], content + content[start:end]))


def change_header(content: bytes, rng: random.Random) -> bytes:
    header, body = split(content)
    name = rng.choice(("keys", "values"))
    entry = header[name]
    kind = rng.randrange(7)
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 1:
        entry["shape"] = rng.choice(([], [6], [96], [6, 2, 2, 4, 1], [0, 2, 2, 4], [6, 4, 2, 2], [2**62, 4], [-6], 3))
    elif kind == 2:
        entry["data_offsets"] = rng.choice(([0, 0], [0, 2**63], [4, 388], [0, 384], [384, 768], [768, 384], [0], "a"))
    elif kind == 3:
        header[rng.choice(("other", "key_scales", "__metadata__", "values"))] = header.pop(name)
    elif kind == 4:
        for each in (header["keys"], header["values"]):
            each["shape"], each["dtype"] = rng.choice(([6, 2, 2, 4], [3, 4, 2, 4], [96], [])), rng.choice(DTYPES)
    elif kind == 5:
        header["keys"], header["values"] = header["values"], header["keys"]
    else:
        header = rng.choice(([], {}, None, "a", b"{" * 1000, b"", {"__metadata__": header["__metadata__"]}))
    return join(header, body)


def change_metadata(content: bytes, rng: random.Random) -> bytes:
    header, body = split(content)
    metadata = header["__metadata__"]
    name = rng.choice([*metadata, "other"])
    kind = rng.randrange(4)
    if kind == 0:
        metadata.pop(name, None)
    elif kind == 1:
        metadata[name] = rng.choice((*NESTED, "", "\ud800", "NaN", "1", "2", "3", *map(json.dumps, VALUES)))
    elif kind == 2:
        metadata[name] = rng.choice(VALUES)
    else:
        text = metadata.get(name, "")
        place = rng.randrange(len(text) + 1)
        metadata[name] = text[:place] + rng.choice('0123456789[]," {}:ae\u0000é') + text[place + rng.randrange(2) :]
    return join(header, body)


def forge(content: bytes, rng: random.Random) -> bytes:
    """A file with a right checksum over what no cache holds."""
    cache = make_cache()
    tensors = {"keys": cache.keys.clone(), "values": cache.values.clone()}
    counts: object = cache.token_counts
    fingerprint: object = dict(cache.fingerprint)
    kind = rng.randrange(6)
    if kind == 0:
        counts = rng.choice((*VALUES, [6.0], ["1", 2, 3], [True, 2, 3], [0, 6], [-1, 7], [6, 0], [[1], 2, 3]))
    elif kind == 1:
        fingerprint = rng.choice(
            (
                *(value for value in VALUES if value != {}),
                {"a": 1},
                {"a": ["b"]},
                {"a": "b" * 100_000},
                {"a": {"b": "c"}},
            )
        )
    elif kind == 2:
        tensors[rng.choice(("keys", "values"))].view(-1)[rng.randrange(96)] = rng.choice((float("nan"), float("inf")))
    elif kind == 3:
        dtype = rng.choice((torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn))
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    elif kind == 4:
        shape = rng.choice(((), (1,), (6, 16), (6, 2, 8), (6, 2, 2, 2, 2), (0, 2, 2, 4), (6, 0, 2, 4)))
        tensors = {name: torch.zeros(shape) for name in tensors}
    else:
        tensors, counts = {name: torch.zeros(600, 1, 1, 1) for name in tensors}, [600]
    metadata = {"format": "voco_cache", "version": "2", "num_voco_tokens": json.dumps(counts)}
    is_nested = kind == 1 and rng.randrange(2) == 0
    metadata["fingerprint"] = rng.choice(NESTED) if is_nested else json.dumps(fingerprint)
    metadata["sha256"] = digest_file(tensors, metadata) if tensors["keys"].ndim else "0"
    return save(tensors, metadata)


MUTATIONS = (flip_bits, cut, change_header, change_metadata, forge)


def is_as_written(cache: VoCoCache, expected: VoCoCache) -> bool:
    return (
        cache.token_counts == expected.token_counts
        and dict(cache.fingerprint) == dict(expected.fingerprint)
        and cache.dtype == expected.dtype
        and torch.equal(cache.keys, expected.keys)
        and torch.equal(cache.values, expected.values)
    )


def attack(folder: Path, number: int, seed: int) -> dict[str, int]:
    """Counts of what became of mutated files; raises what escapes."""
    whole, expected, path = whole_file(folder), make_cache(), folder / "mutated.safetensors"
    rng, counts = random.Random(seed), {"refused": 0, "unchanged": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(number):
        path.write_bytes(MUTATIONS[i % len(MUTATIONS)](whole, rng))
        try:
            cache = VoCoCache.load(path)
        except (ValueError, OSError) as error:
            assert len(str(error)) < 2_000
            counts["refused"] += 1
        else:
            assert is_as_written(cache, expected), f"file {i} of seed {seed} was accepted"
            counts["unchanged"] += 1
    counts["bytes"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return counts


@pytest.mark.parametrize("number", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_changed_files_are_refused(number, tmp_path):
    counts = attack(tmp_path, number, seed=number)
    print(counts)
    assert counts["refused"] + counts["unchanged"] == number and counts["unchanged"] < number // 10
    assert counts["bytes"] < MEMORY


SAVE = """
import sys, torch
from voco_llama_hf import VoCoCache
cache = VoCoCache(torch.zeros(200_000, 2, 2, 16), torch.ones(200_000, 2, 2, 16), [1] * 200_000, {})
print("ready", flush=True)
while True:
    cache.save(sys.argv[1])
"""


@pytest.mark.parametrize("number", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_nothing_behind_the_next(number, tmp_path):
    path, rng = tmp_path / "cache.safetensors", random.Random(0)
    make_cache().save(path)
    for _ in range(number):
        process = subprocess.Popen([sys.executable, "-c", SAVE, str(path)], stdout=subprocess.PIPE, env=os.environ)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.wait()
        process.stdout.close()
        VoCoCache.load(path)
        other = tmp_path / ".cache.safetensors.of-somebody"
        other.touch()
        make_cache().save(path)
        assert sorted(os.listdir(tmp_path)) == [other.name, path.name]
        assert is_as_written(VoCoCache.load(path), make_cache())
