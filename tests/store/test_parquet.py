"""Stores as Parquet files: written and read by `datasets` too, and believed nothing."""

import json
import os

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modeling.helpers import random_inputs, tiny_model
from store.test_store import FINGERPRINT, cache, content, same

from voco_llama_hf.modeling.cache_voco_llama import digest
from voco_llama_hf.store import Content, DamagedError, VoCoStore, arrow_schema, cache_from_row
from voco_llama_hf.store import parquet as parquet_module
from voco_llama_hf.store.parquet import export_parquet, import_parquet


@pytest.fixture(params=["float32", "bfloat16", "8 bits"])
def store(request, tmp_path):
    """Images 0 to 4, one of which lies at two places, and a video."""
    dtype = torch.float32 if request.param == "float32" else torch.bfloat16
    with VoCoStore(tmp_path / "store", FINGERPRINT, eight_bit=request.param == "8 bits") as opened:
        opened.add([content(i, metadata={"number": i}) for i in range(5)], [cache(i, dtype=dtype) for i in range(5)])
        film = content(6, sampling="num_frames=4", size=99)
        opened.add([film], [cache(6, num_images=4, dtype=dtype)])
        opened.record([Content(content(3).content_hash, source="/photos/old/3.png")])
        yield opened


def export(store, folder):
    assert all(problem is None for _, problem in export_parquet(store, folder))
    return folder


def take(sources, store, **options):
    return [problem for _, problem in import_parquet([str(source) for source in sources], store, **options)]


def described(store) -> list:
    return sorted(
        (
            *(entry.content_hash, entry.num_voco_tokens, entry.sampling, entry.num_images, entry.size, entry.added),
            *(json.dumps(entry.metadata), *sorted(os.path.basename(source) for source in entry.sources)),
        )
        for entry in store
    )


def check_equal(first, second) -> None:
    assert described(first) == described(second) and first.fingerprint == second.fingerprint
    for entry in first:
        one, other = first.get(entry.content_hash), second.get(entry.content_hash)
        assert same(one, other) and one.dtype == other.dtype


def test_out_and_in_again(store, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_module, "ROW_GROUP_BYTES", 300)
    monkeypatch.setattr(parquet_module, "FILE_BYTES", 600)
    folder = export(store, tmp_path / "out")
    assert len(list((folder / "data").glob("train-0000?-of-0000?.parquet"))) > 1
    assert take([folder], tmp_path / "copy") == [None] * 6
    with VoCoStore(tmp_path / "copy") as copy:
        assert copy.eight_bit == store.eight_bit
        check_equal(copy, store)
        # Where it lay is nobody's business
        assert {source for entry in copy for source in entry.sources} == {
            *(f"{i}.png" for i in (*range(5), 6)),
            "old/3.png",
        }
        assert copy.find("3.png") and copy.find("old/3.png")
        size = copy.nbytes
    assert take([folder], tmp_path / "copy") == [None] * 6
    with VoCoStore(tmp_path / "copy") as copy:
        check_equal(copy, store)
        assert copy.nbytes == size


def test_datasets_reads_and_writes_it(store, tmp_path):
    rows = load_dataset(str(export(store, tmp_path / "out")), split="train")
    assert len(rows) == 6 and rows.column_names == arrow_schema().names
    for row in rows:
        assert same(cache_from_row(row), store.get(row["content_hash"]))
    rows.filter(lambda row: not row["sampling"]).to_parquet(tmp_path / "images.parquet")
    assert take([tmp_path / "images.parquet"], tmp_path / "copy") == [None] * 5
    # Rows that Python made
    Dataset.from_list(list(rows)).to_parquet(tmp_path / "again.parquet")
    assert take([tmp_path / "again.parquet"], tmp_path / "copy") == [None] * 6
    with VoCoStore(tmp_path / "copy") as copy:
        check_equal(copy, store)


def test_from_a_url(store, tmp_path):
    files = fsspec.filesystem("memory")
    files.put(f"{export(store, tmp_path / 'out')}/", "/archive/", recursive=True)
    try:
        assert take(["memory://archive"], tmp_path / "copy") == [None] * 6
        with pytest.raises(FileNotFoundError):
            take(["memory://nothing"], tmp_path / "copy")
    finally:
        files.rm("/archive", recursive=True)
    with VoCoStore(tmp_path / "copy") as copy:
        check_equal(copy, store)


def test_an_exported_entry_answers_as_the_image_does(tmp_path):
    model = tiny_model()
    inputs = random_inputs(model, [["text:2", "image:2", "text:3"]])
    expected = model.generate(**inputs, max_new_tokens=5)
    with VoCoStore(tmp_path / "store", model.fingerprint()) as store:
        pixels = inputs.pop("pixel_values")
        store.add([Content.of_pixels(pixels)], [model.compress(pixels, 2)])
        (row,) = load_dataset(str(export(store, tmp_path / "out")), split="train")
    assert torch.equal(model.generate(**inputs, voco_cache=cache_from_row(row), max_new_tokens=5), expected)


@pytest.mark.parametrize("store", ["float32"], indirect=True)
@pytest.mark.parametrize("eight_bit", [True, False])
def test_into_a_store_of_the_other_kind(store, tmp_path, eight_bit):
    with VoCoStore(tmp_path / "source", FINGERPRINT, eight_bit=not eight_bit) as source:
        source.add([content(1)], [cache(1)])
        folder = export(source, tmp_path / "out")
    assert take([folder], tmp_path / "copy", eight_bit=eight_bit) == [None]
    with VoCoStore(tmp_path / "copy") as copy:
        assert copy.eight_bit == eight_bit
        torch.testing.assert_close(copy.get(content(1).content_hash).keys, cache(1).keys, atol=0.03, rtol=0.02)
        assert all(problem is None for _, problem in copy.verify())


@pytest.mark.parametrize("store", ["float32"], indirect=True)
def test_names_that_are_no_text(store, tmp_path):
    store.add([Content("f" * 64, source=os.fsdecode(b"/photos/\xff.png"))], [cache(9)])
    assert take([export(store, tmp_path / "out")], tmp_path / "copy") == [None] * 7
    with VoCoStore(tmp_path / "copy") as copy:
        assert copy.find("\\udcff.png")[0].content_hash == "f" * 64


@pytest.mark.parametrize("store", ["float32"], indirect=True)
def test_damaged_entries_are_left_out(store, tmp_path):
    shard = max(store.shards.iterdir(), key=lambda path: path.stat().st_size)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    problems = [problem for _, problem in export_parquet(store, tmp_path / "out")]
    assert [type(problem) for problem in problems if problem] == [DamagedError]
    assert len(load_dataset(str(tmp_path / "out"), split="train")) == 5
    with pytest.raises(FileExistsError):
        export(store, tmp_path / "out")
    # Given up in the middle, nothing is left
    rows = export_parquet(store, tmp_path / "half")
    next(rows)
    rows.close()
    assert not (tmp_path / "half").exists() and not list(tmp_path.glob(".half*"))


def rows_of(folder) -> list[dict]:
    return pq.read_table(folder / "data").to_pylist()


def write(path, rows, schema=None):
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


@pytest.mark.parametrize("store", ["float32", "8 bits"], indirect=True)
def test_rows_of_others_are_believed_nothing(store, tmp_path):
    rows = rows_of(export(store, tmp_path / "out"))
    changes = [
        {"dtype": "int64"},
        {"shape": [2, 2, 3]},
        {"shape": [2, 2, -3, -8]},
        {"shape": [2**40, 2**40, 1, 1]},
        {"keys": rows[0]["keys"][:-1]},
        {"keys": rows[1]["keys"]},
        {"keys": None},
        {"sha256": "0" * 64},
        {"sha256": None},
        {"num_voco_tokens": 3},
        {"num_images": 0},
        {"num_images": -1},
        {"size": -1},
        {"metadata": "[1]"},
        {"metadata": "[" * 100_000},
        {"fingerprint": '{"weights": 3}'},
        {"fingerprint": None},
        {"sources": None},
        {"sources": [None]},
        {"content_hash": None},
        {"sampling": None},
        {"fingerprint": json.dumps({**FINGERPRINT, "layers": "3"})},
    ]
    if not store.eight_bit:
        nan = [states * float("nan") for states in (cache(0).keys, cache(0).values)]
        keys, values = (states.numpy().tobytes() for states in nan)
        changes += [{"keys": keys, "values": values, "sha256": digest(*nan)}, {"dtype": "float16"}]
    else:
        changes += [{"key_scales": None}, {"value_scales": None}, {"key_scales": b""}]
    path = write(tmp_path / "bad.parquet", [rows[5], *(rows[0] | change for change in changes)], arrow_schema())
    problems = take([path], tmp_path / "copy")
    assert problems[0] is None
    assert [change for change, problem in zip(changes, problems[1:]) if not isinstance(problem, ValueError)] == []
    with VoCoStore(tmp_path / "copy") as copy:
        assert [entry.content_hash for entry in copy] == [rows[5]["content_hash"]]


@pytest.mark.parametrize("store", ["float32"], indirect=True)
def test_files_that_are_something_else(store, tmp_path):
    rows = rows_of(export(store, tmp_path / "out"))
    write(tmp_path / "columns.parquet", [{name: row[name] for name in row if name != "dtype"} for row in rows])
    write(tmp_path / "types.parquet", [row | {"shape": "a", "keys": 3} for row in rows])
    (tmp_path / "text.parquet").write_text("PAR1 nothing PAR1")
    (tmp_path / "empty").mkdir()
    for name, message in (("columns", "it has no column dtype"), ("text", "is damaged")):
        with pytest.raises(DamagedError, match=message):
            take([tmp_path / f"{name}.parquet"], tmp_path / "copy")
    assert all(isinstance(problem, DamagedError) for problem in take([tmp_path / "types.parquet"], tmp_path / "copy"))
    with pytest.raises(FileNotFoundError, match="no Parquet files in"):
        take([tmp_path / "empty"], tmp_path / "copy")
    with pytest.raises(FileNotFoundError):
        take([tmp_path / "missing.parquet"], tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "a.parquet").symlink_to(tmp_path / "out" / "README.md")
    with pytest.raises(ValueError, match="is a link out of"):
        take([folder], tmp_path / "copy")
    (folder / "a.parquet").unlink()
    os.mkfifo(folder / "a.parquet")
    with pytest.raises(ValueError, match="is a pipe"):
        take([folder], tmp_path / "copy")


@pytest.mark.parametrize("store", ["float32"], indirect=True)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_files_with_changed_bytes(store, tmp_path, data):
    """Nothing but errors that say so, and never another image than was written."""
    if not (tmp_path / "out").exists():
        export(store, tmp_path / "out")
    (file,) = (tmp_path / "out" / "data").iterdir()
    changed = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "changed.parquet").write_bytes(changed)
    for row in _rows_or_nothing(tmp_path / "changed.parquet"):
        try:
            found = cache_from_row(row)
        except DamagedError:
            continue
        known = [store.get(entry.content_hash) for entry in store]
        assert any(torch.equal(found.keys, one.keys) and torch.equal(found.values, one.values) for one in known)


def _rows_or_nothing(path):
    try:
        yield from parquet_module.read_parquet(str(path))
    except (DamagedError, OSError):
        return


def test_failures_of_a_pipeline_are_kept(tmp_path):
    with VoCoStore(tmp_path / "store", FINGERPRINT) as store:
        store.add([content(1)], [cache(1)])
        rows = rows_of(export(store, tmp_path / "out"))
    failed = dict.fromkeys(rows[0]) | {"sources": ["/photos/broken.png"], "error": "is damaged"}
    schema = arrow_schema().append(pa.field("error", pa.string()))
    path = write(tmp_path / "rows.parquet", [failed, rows[0] | {"error": None}], schema)
    assert take([path], tmp_path / "copy") == [None, None]
    with VoCoStore(tmp_path / "copy") as copy:
        assert len(copy) == 1 and copy.failures() == {"/photos/broken.png": "is damaged"}
