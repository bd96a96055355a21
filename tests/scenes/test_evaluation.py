import io
import json
from dataclasses import replace

import pytest
import torch
from datasets import disable_progress_bars
from rich.console import Console
from scenes.recipe import RECIPE

from voco_llama_hf.llava import as_llava
from voco_llama_hf.scenes.building import build_model, build_processor
from voco_llama_hf.scenes.canvas import SMALL
from voco_llama_hf.scenes.evaluation import evaluate_scenes
from voco_llama_hf.scenes.readers import MAX_ANSWER_TOKENS, causal_reader, preprocess
from voco_llama_hf.scenes.still import DIFFICULTIES, FAMILIES, make_scenes


disable_progress_bars()


@pytest.fixture(scope="module")
def processor():
    return build_processor(RECIPE)


@pytest.fixture(scope="module")
def model(processor):
    return build_model(processor, replace(RECIPE, text_layers=2)).eval()


@pytest.fixture(scope="module")
def results(model, processor):
    return evaluate_scenes(model, processor, "validation", (1, 3), batch_size=50, limit=24, progress=False)


def test_results_cover_every_mode_difficulty_and_family(results):
    assert list(results.accuracy) == list(results.blind) == ["k=1", "k=3", "uncompressed"]
    for scores in (*results.accuracy.values(), *results.blind.values()):
        assert set(scores) == set(DIFFICULTIES)
        for by_family in scores.values():
            assert set(by_family) == {*FAMILIES, "all"}
            assert all(0 <= value <= 1 for value in by_family.values())


def test_totals_agree_with_families(results):
    assert sum(counts["all"] for counts in results.num_questions.values()) == 24 * 7
    for difficulty, counts in results.num_questions.items():
        assert sum(counts[family] for family in FAMILIES) == counts["all"]
        for scores in results.accuracy.values():
            mean = sum(scores[difficulty][family] * counts[family] for family in FAMILIES) / counts["all"]
            assert scores[difficulty]["all"] == pytest.approx(mean)


def test_batch_size_does_not_change_the_results(results, model, processor):
    again = evaluate_scenes(model, processor, "validation", (1, 3), batch_size=7, limit=24, progress=False)
    assert again == results


class Oracle(torch.nn.Module):
    """Stands in for a model and its processor: answers from the scenes, about the image that it is shown."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, processor, scenes):
        super().__init__()
        self.processor, self.scenes = processor, scenes

    def compress(self, pixel_values, num_voco_tokens, show_progress):
        return Shown(range(len(pixel_values)), num_voco_tokens)

    def generate(self, input_ids, attention_mask, num_voco_tokens, voco_cache, max_new_tokens, do_sample):
        tokenizer = self.processor.tokenizer
        answers = []
        for ids, image in zip(input_ids, voco_cache.images):
            scene = self.scenes[image]
            question = tokenizer.decode(ids, skip_special_tokens=True).strip()
            known = dict(zip(scene["questions"], scene["answers"]))
            answers.append(known.get(question, "no idea"))
        new = tokenizer(answers, add_special_tokens=False, padding=True, return_tensors="pt").input_ids
        return torch.cat([input_ids, new], dim=1)


class Shown:
    def __init__(self, images, k):
        self.images, self.token_counts = list(images), [k] * len(images)

    def __len__(self):
        return len(self.images)

    def resolve(self, num_voco_tokens):
        return self.token_counts

    def __getitem__(self, images):
        return Shown([self.images[i] for i in images], self.token_counts[0])


def test_true_answers_count_and_shuffled_images_do_not(processor):
    oracle = Oracle(processor, make_scenes("test", 30))
    results = evaluate_scenes(oracle, processor, "test", (2,), False, limit=30, progress=False, canvas=SMALL)
    for difficulty in DIFFICULTIES:
        assert set(results.accuracy["k=2"][difficulty].values()) == {1.0}
        assert results.blind["k=2"][difficulty]["all"] < 0.5


def test_llava_of_the_same_weights_gives_the_logits_of_uncompressed_reading(model, processor):
    scene = make_scenes("test", 1)[0]
    prompt = "<image>\nWhere is the red star?\n"
    inputs = processor(images=scene["image"], text=prompt, num_voco_tokens=1, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs, attention_mode="uncompressed").logits[0, 1:]
        long = processor.tokenizer("<s>" + "<voco>" * 64 + prompt[len("<image>") :], add_special_tokens=False)
        llava = as_llava(model)(input_ids=torch.tensor([long.input_ids]), pixel_values=inputs["pixel_values"])
    torch.testing.assert_close(llava.logits[0, -len(logits) :], logits, atol=1e-4, rtol=1e-4)


def test_causal_reading_gives_the_answers_of_the_causal_forward(model, processor):
    scenes = make_scenes("test", 4)
    read = causal_reader(model, processor, preprocess(processor, scenes), k=2)
    questions = ["Where is the red star?", "What colour is the circle?", "How many digits are there?", "Is it?"]
    expected = []
    for question, image in zip(questions, scenes["image"]):
        inputs = processor(images=image, text=f"<image>\n{question}\n", num_voco_tokens=2, return_tensors="pt")
        ids = inputs["input_ids"]
        for _ in range(MAX_ANSWER_TOKENS):
            step = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                logits = model(**step, attention_mode="causal").logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == processor.tokenizer.eos_token_id:
                break
        new = ids[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(new, skip_special_tokens=True).strip())
    assert read(questions, [0, 1, 2, 3]) == expected
    twice = read([questions[1], *questions], [1, 0, 1, 2, 3])
    assert twice == [expected[1], *expected]


def test_results_are_written_printed_and_drawn(results, tmp_path):
    results.save(tmp_path / "results.json")
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["accuracy"] == results.accuracy and saved["split"] == "validation"
    console = Console(file=io.StringIO(), width=200)
    results.print(console)
    table = console.file.getvalue()
    assert all(word in table for word in ("sparse", "dense", "uncompressed", "k=3, shuffled", *FAMILIES))
    results.plot(tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
