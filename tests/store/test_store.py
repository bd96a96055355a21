"""VoCoStore: what is put in comes out, once, whole, and by nobody else's model."""

import os
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modeling.helpers import random_inputs, random_pixels, tiny_model
from PIL import Image

from voco_llama_hf import VoCoCache
from voco_llama_hf.store import Content, VoCoStore, hash_file, hash_pixels
from voco_llama_hf.store import store as store_module
from voco_llama_hf.store.shards import dequantize, quantize, write_shard


FINGERPRINT = {"weights": "abc", "layers": "2"}


def cache(seed: int, num_images: int = 1, k: int = 2, dtype: torch.dtype = torch.float32) -> VoCoCache:
    states = torch.randn(2, num_images * k, 2, 3, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return VoCoCache(states[0], states[1], [k] * num_images, FINGERPRINT)


def content(seed: int, **options) -> Content:
    return Content(f"{seed:064x}", source=f"/photos/{seed}.png", **options)


def same(first: VoCoCache, second: VoCoCache) -> bool:
    return (
        torch.equal(first.keys, second.keys)
        and torch.equal(first.values, second.values)
        and first.token_counts == second.token_counts
        and first.fingerprint == second.fingerprint
    )


@pytest.fixture
def store(tmp_path):
    with VoCoStore(tmp_path / "store", FINGERPRINT) as opened:
        yield opened


@pytest.fixture
def filled(store):
    """Images 0 to 5 and a video, 6, in two shards."""
    store.add([content(i, metadata={"number": i}) for i in range(3)], [cache(i) for i in range(3)])
    film = content(6, sampling="num_frames=4", size=99)
    store.add([*map(content, range(3, 6)), film], [*map(cache, range(3, 6)), cache(6, num_images=4)])
    return store


def test_what_is_put_in_comes_out(filled):
    assert len(filled) == 7
    for entry in filled:
        seed = int(entry.content_hash, 16)
        assert same(filled.get(entry.content_hash), cache(seed, entry.num_images))
        assert entry.sources == (f"/photos/{seed}.png",)
        assert entry.is_video == (seed == 6)
    first, *_, film = filled
    assert first.metadata == {"number": 0} and (film.num_images, film.size) == (4, 99)
    reopened = VoCoStore(filled.path)
    assert list(reopened) == list(filled) and reopened.fingerprint == FINGERPRINT


def test_an_entry_answers_as_the_image_does(tmp_path):
    model = tiny_model()
    inputs = random_inputs(model, [["text:2", "image:2", "text:3"]])
    expected = model.generate(**inputs, max_new_tokens=5)
    with VoCoStore(tmp_path / "store", model.fingerprint()) as store:
        pixels = inputs.pop("pixel_values")
        store.add([Content.of_pixels(pixels)], [model.compress(pixels, 2)])
        stored = store.get(hash_pixels(pixels))
    assert torch.equal(model.generate(**inputs, voco_cache=stored, max_new_tokens=5), expected)


@pytest.mark.skipif(os.name == "nt", reason="permissions of Windows are others")
def test_others_can_read_what_they_could_read_of_any_file(filled, tmp_path):
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in filled.shards.iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_a_content_is_stored_once_at_every_k(store):
    assert store.add([content(1), content(1)], [cache(1), cache(7)]) == 1
    assert store.add([content(1)], [cache(8)]) == 0
    assert same(store.get(content(1).content_hash), cache(1))
    assert store.add([content(1)], [cache(1, k=3)]) == 1
    with pytest.raises(ValueError, match="say which of k=2, k=3"):
        store.get(content(1).content_hash)
    assert store.get(content(1).content_hash, 3).token_counts == [3]
    assert store.contains(content(1).content_hash, 2) and not store.contains(content(1).content_hash, 4)
    assert content(1).content_hash in store and content(2).content_hash not in store
    with pytest.raises(KeyError, match="is not in the store"):
        store.get(content(2).content_hash)


def test_files_and_pixels_are_known_by_what_is_in_them(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(array).save(tmp_path / name)
    assert hash_file(tmp_path / "a.png") == hash_file(tmp_path / "b.png")
    assert hash_pixels(array) == hash_pixels(Image.fromarray(array)) == hash_pixels(torch.from_numpy(array))
    assert len({hash_pixels(array), hash_pixels(array.reshape(6, 4, 3)), hash_pixels(array.astype("int16"))}) == 3
    found = Content.of_file(tmp_path / "a.png")
    assert (found.source, found.size) == (str(tmp_path / "a.png"), os.path.getsize(tmp_path / "a.png"))


def test_images_of_the_same_numbers_and_other_colours_are_others():
    numbers = np.random.default_rng(0).integers(0, 4, (4, 6), dtype=np.uint8)
    images = [Image.fromarray(numbers)]
    for palette in (range(12), range(100, 112)):
        images.append(Image.fromarray(numbers))
        images[-1].putpalette(list(palette))
    images.append(images[-1].copy())
    images[-1].info["transparency"] = 2
    for mode in ("RGB", "YCbCr", "HSV", "LAB", "RGBA", "CMYK", "RGBX"):
        images.append(Image.frombytes(mode, (2, 6), (numbers.tobytes() * 2)[: 12 * len(mode.replace("YCbCr", "RGB"))]))
    assert len({hash_pixels(image) for image in images}) == len(images)
    assert hash_pixels(images[1]) == hash_pixels(images[1].convert("RGB"))


def test_find(filled):
    filled.record([Content(content(2).content_hash, source="/old/2.png")])
    (by_path,), (by_name,), (by_hash,) = map(filled.find, ("/photos/3.png", "3.png", content(3).content_hash))
    assert by_path == by_name == by_hash
    assert [entry.sources for entry in filled.find("2.png")] == [("/old/2.png", "/photos/2.png")]
    filled.record_failures({"/photos/broken.png": "is damaged"})
    for name in (".png", "%.png", "missing", "broken.png", "/photos/broken.png"):
        assert filled.find(name) == []
    assert len(filled.find("0" * 8)) == 7


def test_another_model_is_refused_with_the_difference(filled):
    with pytest.raises(ValueError, match=r"the store .* was made by another model .*: layers is 2, not 3"):
        VoCoStore(filled.path, {**FINGERPRINT, "layers": "3"})
    foreign = cache(9)
    foreign.fingerprint["weights"] = "xyz"
    with pytest.raises(ValueError, match="weights is xyz, not abc"):
        filled.add([content(9)], [foreign])
    assert len(filled) == 7


def test_what_does_not_fit_is_an_error(filled, tmp_path):
    with pytest.raises(FileNotFoundError, match="no VoCoStore at"):
        VoCoStore(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    with pytest.raises(ValueError, match="keeps keys and values as they were computed"):
        VoCoStore(filled.path, eight_bit=True)
    mixed = VoCoCache.cat([cache(1, k=1), cache(1, k=2)])
    with pytest.raises(ValueError, match=r"one number of VoCo tokens for all its images, got \[1, 2\]"):
        filled.add([content(9)], [mixed])
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "index.sqlite").write_text("not a database at all" * 100)
    with pytest.raises(ValueError, match="is damaged"):
        VoCoStore(tmp_path / "garbage")


def test_remove_and_compact(filled):
    before = filled.nbytes
    assert filled.remove(content(1).content_hash) == 1 and filled.remove(content(1).content_hash) == 0
    assert not filled.find("1.png") and filled.nbytes == before
    entries = set(map(str, filled))
    assert filled.compact() > 0
    assert len(list(filled.shards.iterdir())) == 1
    assert set(map(str, filled)) == entries
    for entry in filled:
        assert same(filled.get(entry.content_hash), cache(int(entry.content_hash, 16), entry.num_images))
    names = [path.name for path in filled.shards.iterdir()]
    assert filled.compact() == 0 and [path.name for path in filled.shards.iterdir()] == names
    for entry in list(filled):
        filled.remove(entry.content_hash)
    assert len(filled) == 0 and filled.nbytes == 0


def test_compact_does_not_mix_precisions(store):
    store.add([content(1)], [cache(1)])
    store.add([content(2)], [cache(2, dtype=torch.bfloat16)])
    store.add([content(3)], [cache(3)])
    store.compact()
    assert same(store.get(content(2).content_hash), cache(2, dtype=torch.bfloat16))
    assert same(store.get(content(3).content_hash), cache(3))
    assert len(list(store.shards.iterdir())) == 2


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "compact", "reopen"]), st.integers(0, 5)), max_size=12))
def test_it_is_a_dictionary(tmp_path_factory, steps):
    """Whatever is done in whatever order, it holds what a dictionary would."""
    path, expected = tmp_path_factory.mktemp("store") / "store", {}
    store = VoCoStore(path, FINGERPRINT)
    for step, seed in steps:
        if step == "add":
            store.add([content(seed), content(seed + 1)], [cache(seed), cache(seed + 1)])
            expected |= {seed: cache(seed), seed + 1: cache(seed + 1)}
        elif step == "remove":
            assert store.remove(content(seed).content_hash) == (expected.pop(seed, None) is not None)
        elif step == "compact":
            store.compact()
        else:
            store.close()
            store = VoCoStore(path)
    assert {int(entry.content_hash, 16) for entry in store} == expected.keys()
    assert all(same(store.get(content(seed).content_hash), entry) for seed, entry in expected.items())
    store.close()


def test_a_writer_killed_between_shard_and_index_loses_nothing(filled, monkeypatch):
    """The shard is on the disk, its rows are not: the next one to open the store takes it in, once."""
    write_shard(filled.shards, [content(0), content(8)], [cache(0), cache(8)], eight_bit=False)
    with VoCoStore(filled.path) as reopened:
        assert len(reopened) == 8
        assert same(reopened.get(content(8).content_hash), cache(8)) and reopened.find("8.png")
    with VoCoStore(filled.path) as reopened:
        assert len(reopened) == 8
    # A part of a shard is none
    (filled.shards / ".shard.01234567.part").mkdir()
    (filled.shards / ".shard.01234567.part" / "a.safetensors").write_bytes(b"half")
    for old in (f"{'0' * 32}.part", ".tmpAb12Cd"):
        (filled.shards / old).write_bytes(b"half")
    with VoCoStore(filled.path) as reopened:
        assert len(reopened) == 8
        assert reopened.nbytes == sum(path.stat().st_size for path in filled.shards.rglob("*") if path.is_file())
    assert len(list(filled.shards.iterdir())) == 6  # reading removes nothing
    monkeypatch.setattr(store_module, "PART_SECONDS", -1)
    filled.record([])
    assert {path.suffix for path in filled.shards.iterdir()} == {".safetensors"}


def test_removed_entries_do_not_come_back(filled, monkeypatch):
    """Killed after the shard was dropped from the index, before its file was gone."""
    monkeypatch.setattr(VoCoStore, "_clean", lambda self: None)
    for seed in range(3):
        filled.remove(content(seed).content_hash)
    monkeypatch.undo()
    assert len(list(filled.shards.iterdir())) == 2
    with VoCoStore(filled.path) as reopened:
        assert len(reopened) == 4
        reopened.compact()
        assert len(reopened) == 4 and len(list(reopened.shards.iterdir())) == 1


def test_an_index_that_was_lost_is_made_from_the_shards(filled):
    entries = set(map(str, filled))
    filled.close()
    for path in filled.path.glob("index.sqlite*"):
        path.unlink()
    with VoCoStore(filled.path, FINGERPRINT) as reopened:
        assert set(map(str, reopened)) == entries


def test_an_add_that_fails_changes_nothing(filled, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("voco_llama_hf.store.shards.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        filled.add([content(9)], [cache(9)])
    monkeypatch.undo()
    assert len(filled) == 7 and len(list(filled.shards.iterdir())) == 2
    assert filled.add([content(9)], [cache(9)]) == 1


def test_damage_is_found(filled):
    shard = min(filled.shards.iterdir(), key=lambda path: path.stat().st_size)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    problems = [(int(entry.content_hash, 16), problem) for entry, problem in filled.verify()]
    assert [seed for seed, problem in problems if problem] == [2]
    with pytest.raises(ValueError, match="does not match its checksum"):
        filled.get(content(2).content_hash)
    assert same(filled.get(content(1).content_hash), cache(1))
    shard.write_bytes(whole[:-1])
    assert sum(problem is not None for _, problem in filled.verify()) == 3
    shard.unlink()
    with pytest.raises(ValueError, match="is missing"):
        filled.get(content(1).content_hash)


def test_many_readers_while_one_writes(store):
    store.add([content(0)], [cache(0)])
    stop, problems = threading.Event(), []

    def read() -> None:
        with VoCoStore(store.path) as reader:
            while not stop.is_set():
                for entry in reader:
                    try:
                        if not same(reader.get(entry.content_hash), cache(int(entry.content_hash, 16))):
                            problems.append("differs")
                    except KeyError:
                        pass  # removed since
                    except Exception as error:
                        problems.append(repr(error))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for seed in range(1, 9):
        store.add([content(seed)], [cache(seed)])
        if seed % 3 == 0:
            store.remove(content(seed).content_hash)
            store.compact()
        time.sleep(0.01)
    stop.set()
    for reader in readers:
        reader.join()
    assert problems == [] and len(store) == 7


def test_a_second_writer_waits(store):
    with VoCoStore(store.path) as other, store._write():
        other._index._db.execute("PRAGMA busy_timeout=50")
        assert len(other) == 0
        with pytest.raises(TimeoutError, match="another process is writing the store"):
            other.add([content(1)], [cache(1)])
    assert store.add([content(1)], [cache(1)]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_8_bits_are_half_a_scale_off_at_most(dtype):
    states = (torch.randn(5, 2, 3, 16) * torch.logspace(-4, 2, 5)[:, None, None, None]).to(dtype)
    states[0, 0, 0] = 0
    rounded, scales = quantize(states)
    error = (dequantize(rounded, scales, torch.float32) - states.float()).abs()
    assert rounded.dtype == torch.int8 and scales.shape == (5, 2, 3)
    assert (error <= 0.5001 * scales.float()[..., None]).all()
    assert (scales.float() <= 1.01 * states.float().abs().amax(-1) / 127 + 2e-20).all()


def test_8_bit_store(tmp_path):
    model = tiny_model()
    caches = list(model.compress(random_pixels(model, 6).bfloat16().float(), 2).to(torch.bfloat16))
    contents = [content(i) for i in range(6)]
    sizes = {}
    for eight_bit in (False, True):
        with VoCoStore(tmp_path / str(eight_bit), model.fingerprint(), eight_bit) as store:
            store.add(contents, caches)
            (shard,) = store.shards.iterdir()
            from safetensors.torch import load_file

            sizes[eight_bit] = sum(tensor.nbytes for tensor in load_file(shard).values())
            stored = store.get(contents[3].content_hash)
            assert stored.dtype == torch.bfloat16 and store.eight_bit == eight_bit
            torch.testing.assert_close(stored.keys, caches[3].keys, atol=0.03 * eight_bit, rtol=0.02 * eight_bit)
            store.remove(contents[0].content_hash)
            store.compact()
            assert same(store.get(contents[3].content_hash), stored)
        assert VoCoStore(tmp_path / str(eight_bit)).eight_bit == eight_bit
    # Heads of 16 numbers: 16 bytes and a scale of 2 instead of 32
    assert sizes[True] / sizes[False] == 18 / 32
