"""The model in lmms-eval, run by it on small tasks of drawn scenes."""

import pytest
import torch

from voco_llama_hf import EMBEDDED_CHECKPOINT


pytest.importorskip("lmms_eval.api.model")


def answers(results, task):
    return [sample["filtered_resps"][0] for sample in sorted(results["samples"][task], key=lambda one: one["doc_id"])]


def ask(network, images, question, k):
    """The answer of `generate`, the ordinary way."""
    model, processor = network
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=images, num_voco_tokens=k, add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def docs(task_folder):
    import datasets

    return datasets.load_dataset("parquet", data_files=str(task_folder / "questions.parquet"), split="train")


@pytest.mark.parametrize("k", [1, 8])
def test_answers_are_those_of_generate(run_task, network, docs, k):
    results = run_task("scenes", num_voco_tokens=k)
    assert answers(results, "scenes") == [ask(network, [doc["image"]], doc["question"], k) for doc in docs]
    assert results["results"]["scenes"]["exact_match,none"] > 0.5


def test_shared_images_are_compressed_once(run_task, docs):
    throughput = run_task("scenes", num_voco_tokens=2, batch_size=5)["throughput"]
    assert throughput["avg_images_read"] == 4
    assert throughput["avg_images_reused"] == len(docs) - 4


def test_command(task_folder, tmp_path):
    import json
    import subprocess
    import sys

    arguments = f"pretrained={EMBEDDED_CHECKPOINT},num_voco_tokens=2"
    command = [sys.executable, "-m", "lmms_eval", "--model", "voco_llama", "--model_args", arguments, "--tasks", "scenes"]
    options = ["--include_path", task_folder, "--output_path", tmp_path, "--limit", "4", "--device", "cpu"]
    subprocess.run([*command, *options], check=True)
    (path,) = tmp_path.rglob("*results.json")
    assert json.loads(path.read_text())["results"]["scenes"]["exact_match,none"] > 0.4
