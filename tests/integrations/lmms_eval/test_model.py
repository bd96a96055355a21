"""The model in lmms-eval, run by it on small tasks of drawn scenes."""

import pytest
import torch
from modeling.helpers import TILED, build_processor, tiny_model
from modeling.test_large_processing import picture

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoLlamaProcessor


pytest.importorskip("lmms_eval.api.model")


def answers(results, task):
    return [response for (response,) in responses(results, task)]


def responses(results, task):
    return [sample["filtered_resps"] for sample in sorted(results["samples"][task], key=lambda one: one["doc_id"])]


def ask(network, images, question, k):
    """The answer of `generate`, the ordinary way."""
    model, processor = network
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=images, num_voco_tokens=k, add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


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
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        "voco_llama",
        "--model_args",
        arguments,
        "--tasks",
        "scenes",
    ]
    options = [
        "--tasks",
        "scenes",
        "--include_path",
        task_folder,
        "--output_path",
        tmp_path,
        "--limit",
        "4",
        "--device",
        "cpu",
    ]
    subprocess.run([*command, *options], check=True)
    (path,) = tmp_path.rglob("*results.json")
    assert json.loads(path.read_text())["results"]["scenes"]["exact_match,none"] > 0.4


def test_likelihoods_are_those_of_forward(run_task, network, docs):
    model, processor = network
    results = run_task("scenes_choice", num_voco_tokens=2)
    samples = sorted(results["samples"]["scenes_choice"], key=lambda one: one["doc_id"])
    for doc, sample in list(zip(docs, samples))[:3]:
        prompt = f"<image>\n{doc['question']}\n"
        for choice, (loss, is_greedy) in zip(doc["choices"], sample["filtered_resps"]):
            inputs = processor(
                text=prompt + choice,
                images=doc["image"],
                num_voco_tokens=2,
                add_special_tokens=False,
                return_tensors="pt",
            )
            count = len(processor.tokenizer(choice, add_special_tokens=False).input_ids)
            ids = inputs["input_ids"][0]
            with torch.no_grad():
                log_probs = model(**inputs).logits[0, -count - 1 : -1].log_softmax(-1)
            assert loss == pytest.approx(-log_probs.gather(1, ids[-count:, None]).mean().item(), abs=1e-4)
            assert is_greedy == bool((log_probs.argmax(-1) == ids[-count:]).all())
    assert results["results"]["scenes_choice"]["acc,none"] > 0.6


def test_several_images(run_task, network, docs):
    simple = run_task("scenes_two", num_voco_tokens=2)
    expected = [ask(network, [doc["image"], doc["second"]], doc["question"], 2) for doc in docs]
    assert answers(simple, "scenes_two") == expected
    # The same with a line between the images, as the conversations of the task have it
    chat = run_task("scenes_two", "voco_llama_chat", num_voco_tokens=2)
    assert chat["config"]["model_backend"].endswith("VoCoLlamaChat (chat)")
    assert len(answers(chat, "scenes_two")) == len(docs)


def test_videos(run_task, network, task_folder):
    import datasets

    model, processor = network
    docs = datasets.load_dataset("parquet", data_files=str(task_folder / "videos.parquet"), split="train")
    results = run_task("scenes_video", num_voco_tokens=2, num_frames=4)
    expected = []
    for doc in docs:
        inputs = processor(
            text=f"<video>\n{doc['question']}\n",
            videos=str(task_folder / doc["video"]),
            num_frames=4,
            num_voco_tokens=2,
            add_special_tokens=False,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        expected.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    assert answers(results, "scenes_video") == expected
    assert (results["throughput"]["avg_images_read"], results["throughput"]["avg_images_reused"]) == (8, 8)


def test_uncompressed_answers_are_those_of_llava(run_task, network, docs):
    from voco_llama_hf.scenes.readers import preprocess, uncompressed_reader

    model, processor = network
    read = uncompressed_reader(model, processor, preprocess(processor, docs))
    expected = read(list(docs["question"]), list(range(len(docs))))
    assert answers(run_task("scenes", attention_mode="uncompressed"), "scenes") == expected


def test_blind(run_task):
    seen = run_task("scenes", num_voco_tokens=8)["results"]["scenes"]["exact_match,none"]
    blind = run_task("scenes", num_voco_tokens=8, blind=True)
    assert blind["results"]["scenes"]["exact_match,none"] < seen
    assert blind["throughput"]["avg_images_read"] == 4


@pytest.mark.parametrize("task", ["scenes", "scenes_choice"])
def test_cached_answers_are_those_of_their_k(task, run_task, num_choices, tmp_path):
    """The cache of lmms-eval knows the number of VoCo tokens, and finds what it wrote."""
    first = run_task(task, num_voco_tokens=1, use_cache=tmp_path)
    second = run_task(task, num_voco_tokens=8, use_cache=tmp_path)
    assert second["throughput"]["avg_questions_answered"] == (12 if task == "scenes" else num_choices)
    assert responses(second, task) == responses(run_task(task, num_voco_tokens=8), task)
    again = run_task(task, num_voco_tokens=1, use_cache=tmp_path)
    assert "throughput" not in again
    assert responses(again, task) == responses(first, task)
    if task == "scenes_choice":
        assert responses(second, task) != responses(first, task)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_voco_tokens": 0}, "num_voco_tokens must be an integer from 1 on, got 0"),
        ({"num_voco_tokens": "two"}, "num_voco_tokens must be an integer from 1 on, got 'two'"),
        ({"num_voco_tokens": 577}, "at most 576"),
        ({"attention_mode": "none"}, "attention_mode must be one of voco, causal, uncompressed, got 'none'"),
        ({"num_frames": 0}, "num_frames must be an integer from 1 on"),
        ({"batch_size": "auto"}, "batch_size must be an integer from 1 on, got 'auto'"),
        ({"pretrained": "/no/such/model"}, "/no/such/model"),
    ],
)
def test_errors(run_task, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_task("scenes", **arguments)


@pytest.mark.parametrize("attention_mode", ["voco", "causal", "uncompressed"])
def test_a_model_that_was_trained_for_tiles_is_read_whole_when_that_is_said(attention_mode):
    from voco_llama_hf.integrations.lmms_eval.model import LoadedVoCoLlama
    from voco_llama_hf.integrations.lmms_eval.visuals import as_visual

    processor = build_processor("llava_next")
    model = tiny_model(voco_token_id=processor.image_token_id, **TILED["llava_next"])
    trained_so = VoCoLlamaProcessor(processor.image_processor, processor.tokenizer, num_voco_tokens_per_tile=2)
    if attention_mode != "uncompressed":
        with pytest.raises(ValueError, match="trained for VoCo tokens of every tile"):
            LoadedVoCoLlama(model, trained_so, attention_mode=attention_mode)
    shown = [[as_visual(picture(*size), 8)] for size in ((28, 56), (84, 84))]
    one, other = (
        LoadedVoCoLlama(model, each, 3, attention_mode).answerer.reading.encode(["<image>a", "<image>b"], shown)
        for each in (trained_so, processor)
    )
    assert torch.equal(one.input_ids, other.input_ids) and one.length == other.length
    for name in one.inputs.keys() - {"voco_cache"}:
        torch.testing.assert_close(one.inputs[name], other.inputs[name])
