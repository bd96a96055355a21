"""A store that is small enough to be broken a thousand times, and what is right about it."""

import sqlite3
from pathlib import Path

import torch

from voco_llama_hf import VoCoCache
from voco_llama_hf.store import Content, VoCoStore


FINGERPRINT = {"text_model": "llama", "weights": "abc"}
NEW = 99  # the seed of an entry that is added later
REMOVED = 8  # of one that may come back from its shard when the index is lost


def make_cache(seed: int, num_images: int = 1, k: int = 2) -> VoCoCache:
    states = torch.randn(2, num_images * k, 2, 1, 4, generator=torch.Generator().manual_seed(seed))
    return VoCoCache(states[0], states[1], [k] * num_images, FINGERPRINT)


def make_content(seed: int, **options) -> Content:
    return Content(f"{seed:064x}", source=f"/photos/{seed}.png", metadata={"number": seed}, **options)


def originals() -> dict[int, VoCoCache]:
    return {seed: make_cache(seed, 3 if seed == 5 else 1) for seed in (*range(6), REMOVED, NEW)}


def make_store(path: Path) -> Path:
    """Images 0 to 4 and a video, 5, in two shards, the second with a removed entry; a failure, and a second source."""
    made = originals()
    with VoCoStore(path, FINGERPRINT) as store:
        store.add([make_content(i) for i in range(3)], [made[i] for i in range(3)])
        film = make_content(5, sampling="num_frames=3")
        seeds = 3, 4, REMOVED
        store.add([*map(make_content, seeds), film], [*map(made.get, seeds), made[5]])
        store.remove(make_content(REMOVED).content_hash)
        store.record([Content(make_content(1).content_hash, source="/photos/also 1.png")])
        store.record_failures({"/photos/broken.png": "is damaged"})
    return path


def same(first: VoCoCache, second: VoCoCache) -> bool:
    return (
        torch.equal(first.keys, second.keys)
        and torch.equal(first.values, second.values)
        and first.token_counts == second.token_counts
        and dict(first.fingerprint) == dict(second.fingerprint)
    )


def check_content(store: VoCoStore, lies: bool = False) -> int:
    """
    Whatever the store gives out is what was put in, under the names it had, unless somebody wrote lies with checksums
    that fit; returns how many entries it gave.
    """
    made, given = originals(), 0
    entries = list(store)
    for seed in made:
        entries += store.find(f"/photos/{seed}.png")
    for entry in entries:
        try:
            cache = store.get(entry.content_hash, entry.num_voco_tokens, entry.sampling)
        except (ValueError, OSError, KeyError):
            continue
        given += 1
        if lies:
            continue
        seed = int(entry.content_hash, 16)
        assert same(cache, made[seed]), f"{seed} is another"
        assert entry.metadata == {"number": seed} and entry.sampling == ("num_frames=3" if seed == 5 else "")
        sources = {f"/photos/{seed}.png"} | ({"/photos/also 1.png"} if seed == 1 else set())
        assert set(entry.sources) <= sources, entry.sources
    for seed in () if lies else made:
        assert {entry.content_hash for entry in store.find(f"/photos/{seed}.png")} <= {f"{seed:064x}"}
    return given


def check_whole(path: Path, seeds: set[int]) -> None:
    """All entries are there, and nothing but the index and its shards."""
    with VoCoStore(path, FINGERPRINT) as store:
        assert {int(entry.content_hash, 16) for entry in store} == seeds
        check_content(store)
        assert all(problem is None for _, problem in store.verify())
        assert store.left_out == {}
        known = store._index.shard_names()
    assert {file.name for file in path.iterdir()} == {"index.sqlite", "shards"}
    assert {file.name for file in (path / "shards").iterdir()} == known


def use(path: Path, lies: bool = False) -> int:
    """Everything that can be done with a store."""
    with VoCoStore(path) as store:
        given = check_content(store, lies)
        list(store.verify())
        repr(store), store.failures(), store.nbytes, store.left_out
    with VoCoStore(path, FINGERPRINT) as store:
        store.add([make_content(NEW)], [originals()[NEW]])
        store.add([make_content(2)], [originals()[2]], replace=True)
        store.remove(make_content(4).content_hash)
        store.record_failures({"/photos/broken.png": "is damaged still"})
        store.compact()
        assert same(store.get(make_content(NEW).content_hash), originals()[NEW])
        return given + check_content(store, lies)


def write_index(path: Path, *statements: tuple[str, tuple]) -> None:
    """What somebody with an SQLite of his own makes of an index."""
    db = sqlite3.connect(path / "index.sqlite")
    with db:
        for statement, values in statements:
            db.execute(statement, values)
    db.close()
