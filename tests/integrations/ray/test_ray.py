"""Ray for real: two workers on this machine, one of which is killed; sources of every kind; pipelines of others."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest


ray = pytest.importorskip("ray", reason="needs the extra ray")

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from cli.conftest import save_checkpoint  # noqa: E402
from modeling.helpers import TILED, build_processor, tiny_model  # noqa: E402
from modeling.test_large_processing import picture  # noqa: E402
from PIL import Image  # noqa: E402
from store.test_indexing import archive as make_archive  # noqa: E402, F401
from store.test_indexing import check_every_entry  # noqa: E402

from voco_llama_hf import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor  # noqa: E402
from voco_llama_hf.integrations.ray import ClusterIndexer  # noqa: E402
from voco_llama_hf.store import VoCoCompressor, VoCoStore, cache_from_row, hash_file  # noqa: E402
from voco_llama_hf.store.archives import find_archive  # noqa: E402
from voco_llama_hf.store.content import TILES  # noqa: E402
from voco_llama_hf.store.indexing import Indexer, Sampling, find_files  # noqa: E402
from voco_llama_hf.store.parquet import import_parquet  # noqa: E402


OPTIONS = {"num_voco_tokens": 2, "num_frames": 3, "batch_size": 2}


@pytest.fixture(scope="module", autouse=True)
def cluster(s3_server):
    names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    # Ray gives its workers the last of what a busy machine has
    names |= {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", "AWS_ENDPOINT_URL": s3_server or ""}
    tests = str(Path(__file__).parents[2])
    with pytest.MonkeyPatch.context() as environment:
        for name, value in names.items():
            environment.setenv(name, value)
        environment.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """40 images, of which two are the same, and one that is damaged."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for i in range(39):
        Image.fromarray(noise.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    (folder / "copy.png").write_bytes((folder / "00.png").read_bytes())
    (folder / "broken.png").write_bytes((folder / "00.png").read_bytes()[:80])
    return folder


def index(archive, store, checkpoint, num_workers=1, shard_images=4):
    """What became of each file. A worker takes seconds to start, so one is enough where two are not needed."""
    indexer = ClusterIndexer(store, str(checkpoint), num_workers, shard_images, **OPTIONS)
    found = find_archive(str(archive))
    results = list(indexer.run(indexer.select(found), found.tables))
    indexer.store.close()
    return results


def single_process(archive, store, checkpoint) -> VoCoStore:
    model = VoCoLlamaForConditionalGeneration.from_pretrained(checkpoint)
    processor = VoCoLlamaProcessor.from_pretrained(checkpoint)
    indexer = Indexer(store, model, processor, 2, Sampling(num_frames=3), batch_size=2)
    list(indexer.run(indexer.select(find_files(archive))))
    return indexer.store


def check_equal(store, expected) -> None:
    """The same contents from the same sources, nothing lost and nothing twice, and the same numbers."""
    described = [sorted((e.content_hash, e.num_images, e.size, e.sources) for e in one) for one in (store, expected)]
    assert described[0] == described[1]
    assert store.failures().keys() == expected.failures().keys()
    for entry in expected:
        one, other = store.get(entry.content_hash), expected.get(entry.content_hash)
        np.testing.assert_allclose(one.keys, other.keys, atol=1e-5, rtol=1e-4)
        np.testing.assert_allclose(one.values, other.values, atol=1e-5, rtol=1e-4)
    assert all(problem is None for _, problem in store.verify())


def test_a_folder(make_archive, checkpoint, tmp_path):  # noqa: F811
    """Images and videos, and what cannot be read; the second run has only that to do."""
    results = index(make_archive, tmp_path / "store", checkpoint)
    assert sorted(result.path for result in results) == find_files(make_archive)
    assert sum(result.num_images for result in results) >= 15 + 3 + 2
    with VoCoStore(tmp_path / "store") as store:
        check_every_entry(store, make_archive, checkpoint)
    again = index(make_archive, tmp_path / "store", checkpoint)
    assert {Path(result.path).name for result in again} == {"broken.png", "broken.mp4"}


def find_worker() -> int | None:
    """A process that compresses, a child of this test."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and b"ray::MapWorker(MapBatches(ShardWriter" in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    return None


def test_tiles(tmp_path):
    """A model that divides images: an entry of all tiles of each, as one process makes it; none is done twice."""
    model, photos = tmp_path / "model", tmp_path / "photos"
    processor = build_processor("llava_next")
    tiny_model(voco_token_id=processor.image_token_id, **TILED["llava_next"]).save_pretrained(model)
    processor.save_pretrained(model)
    photos.mkdir()
    for number, size in enumerate([(90, 40), (30, 30), (20, 200)]):
        picture(*size, seed=number).save(photos / f"{number}.png")
    found = find_archive(str(photos))
    indexer = ClusterIndexer(tmp_path / "store", str(model), 1, 2, num_voco_tokens_per_tile=2)
    results = list(indexer.run(indexer.select(found)))
    assert [result.num_images for result in results] == [1, 1, 1] and not indexer.select(found)
    loaded = VoCoLlamaForConditionalGeneration.from_pretrained(model)
    single = Indexer(tmp_path / "single", loaded, processor, 2, Sampling(num_frames=3, per_tile=True))
    expected = list(single.run(single.select(find_files(photos))))
    assert sorted(result.num_tokens for result in results) == sorted(result.num_tokens for result in expected)
    for entry in single.store:
        one, other = (store.get(entry.content_hash, sampling=TILES) for store in (indexer.store, single.store))
        assert one.token_counts == other.token_counts and set(one.token_counts) == {2}
        np.testing.assert_allclose(one.keys, other.keys, atol=1e-5, rtol=1e-4)
    assert {entry.content_hash for entry in indexer.store} == {entry.content_hash for entry in single.store}


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_worker_that_is_killed(photos, checkpoint, tmp_path):
    killed = []

    def kill() -> None:
        shards = tmp_path / "store" / "shards"
        while not killed and not stop.is_set():
            if shards.is_dir() and len(list(shards.glob("*.safetensors"))) >= 2 and (pid := find_worker()):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.01)

    stop = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        results = index(photos, tmp_path / "store", checkpoint, num_workers=2, shard_images=1)
    finally:
        stop.set()
        killer.join()
    assert len(killed) == 1
    assert sorted(result.path for result in results) == find_files(photos)
    with VoCoStore(tmp_path / "store") as store, single_process(photos, tmp_path / "single", checkpoint) as expected:
        check_equal(store, expected)
        assert len(store) == 39 and set(store.failures()) == {str(photos / "broken.png")}


def test_a_head_that_is_killed(photos, checkpoint, tmp_path):
    """What workers wrote before is in the store when the next one comes, which does the rest."""
    indexer = ClusterIndexer(tmp_path / "store", str(checkpoint), 1, shard_images=4, **OPTIONS)
    indexer.store.adopt = lambda: None
    indexer.store.record = lambda contents: None
    done = next(iter(indexer.run(indexer.select(find_archive(str(photos))))))
    assert done.error is None or "broken" in done.path
    results = index(photos, tmp_path / "store", checkpoint)
    assert len(results) < 41
    with VoCoStore(tmp_path / "store") as store, single_process(photos, tmp_path / "single", checkpoint) as expected:
        check_equal(store, expected)


def test_parquet_and_tars(photos, checkpoint, tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    files = sorted(photos.iterdir())
    rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}, "label": 1} for path in files[:15]]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    with tarfile.open(folder / "0000.tar", "w") as tar:
        for path in files[15:]:
            tar.add(path, f"{path.stem}.png")
            tar.addfile(tarfile.TarInfo(f"{path.stem}.txt"), io.BytesIO())
    pq.write_table(pa.table({"number": [1]}), folder / "other.parquet")
    (folder / "torn.tar").write_bytes((folder / "0000.tar").read_bytes()[:-20_000])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        results = index("tables", "store", checkpoint)
    errors = {result.path: result.error for result in results if result.error}
    assert {Path(path).name for path in errors} == {"broken.png", "other.parquet", "torn.tar"}
    assert "has no column of images" in errors[str(folder / "other.parquet")]
    with VoCoStore(tmp_path / "store") as store:
        expected = {hash_file(path) for path in files if path.name != "broken.png"}
        assert {entry.content_hash for entry in store} == expected and len(store) == 39
        (entry,) = store.find("05.png")
        assert f"{folder}/train.parquet/05.png" in entry.sources


def test_from_s3(s3_server, photos, checkpoint, tmp_path):
    if s3_server is None:
        pytest.skip("needs moto[server]")
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("s3", endpoint_url=s3_server, key="a", secret="b")
    files.mkdir("photos")
    files.put(f"{photos}/", "photos/2026/", recursive=True)
    results = index("s3://photos/2026", tmp_path / "store", checkpoint)
    assert len(results) == 41
    with VoCoStore(tmp_path / "store") as store:
        assert len(store) == 39 and set(store.failures()) == {"s3://photos/2026/broken.png"}
        assert store.find("07.png")[0].sources == ("s3://photos/2026/07.png",)
    files.pipe_file("photos/2026/07.png", (photos / "08.png").read_bytes())
    again = index("s3://photos/2026", tmp_path / "store", checkpoint)
    assert sorted(result.path for result in again) == ["s3://photos/2026/07.png", "s3://photos/2026/broken.png"]


def test_another_model_is_refused(checkpoint, tmp_path):
    with VoCoStore(tmp_path / "store", {"weights": "abc"}):
        pass
    with pytest.raises(ValueError, match="was made by another model"):
        ClusterIndexer(tmp_path / "store", str(checkpoint))
    with pytest.raises(ValueError, match=r"cannot be loaded"):
        ClusterIndexer(tmp_path / "new", str(tmp_path))
    assert not (tmp_path / "new").exists()


def test_a_pipeline_of_somebody_else(photos, checkpoint, tmp_path):
    """The class alone, in Ray Data: rows to Parquet, and from there into a store."""
    data = ray.data.read_binary_files(str(photos), include_paths=True)
    rows = data.map_batches(
        VoCoCompressor,
        fn_constructor_kwargs={"model": str(checkpoint), "num_voco_tokens": 2, "image_column": "bytes"},
        batch_size=8,
        num_cpus=0.5,
        concurrency=1,
    )
    rows.write_parquet(str(tmp_path / "rows"))
    assert [problem for _, problem in import_parquet([str(tmp_path / "rows")], tmp_path / "store") if problem] == []
    with VoCoStore(tmp_path / "store") as store, single_process(photos, tmp_path / "single", checkpoint) as expected:
        assert {e.content_hash for e in store} == {e.content_hash for e in expected}
        assert {Path(name).name for name in store.failures()} == {"broken.png"}
        row = next(row for row in rows.take_all() if row["error"] is None)
        np.testing.assert_allclose(cache_from_row(row).keys, expected.get(row["content_hash"]).keys, atol=1e-5)


def test_the_command(photos, checkpoint, tmp_path):
    command = [sys.executable, "-m", "voco_llama_cli", "index", photos, "--store", tmp_path / "store", "--cluster"]
    options = ["--model", checkpoint, "-k", "2", "--num-processes", "2", "--shard-images", "8", "--device", "cpu"]
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "39 entries, 39 images or frames" in done.stdout and "41 files found, 1 cannot be read" in done.stdout
    with VoCoStore(tmp_path / "store") as store, single_process(photos, tmp_path / "single", checkpoint) as expected:
        check_equal(store, expected)
