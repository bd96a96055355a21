from dataclasses import replace

import pytest
import torch
from datasets import disable_progress_bars
from scenes.recipe import RECIPE

from voco_llama_hf.scenes.building import build_processor
from voco_llama_hf.scenes.data import draw_row, phase_rows
from voco_llama_hf.scenes.moving import make_clips
from voco_llama_hf.scenes.recipe import Phase
from voco_llama_hf.scenes.single_questions import SingleQuestionCollator
from voco_llama_hf.scenes.still import make_scene
from voco_llama_hf.training import VoCoDataCollator


disable_progress_bars()


@pytest.fixture(scope="module")
def processor():
    return build_processor(replace(RECIPE, num_train_scenes=400))


def render(processor, messages, **kwargs):
    return processor.apply_chat_template(messages, tokenize=False, **kwargs)


@pytest.mark.parametrize("describe", [False, True])
def test_answers_alone_are_trained(processor, describe):
    collator = VoCoDataCollator(processor, assistant_only_loss=True)
    phase = Phase("some", 1, 1e-3, "cosine", num_voco_tokens=(1,), questions=5, describe=describe)
    rows = phase_rows(RECIPE, phase, "train")
    batch = collator([rows[i] for i in range(6)])
    for i, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"])):
        scene = make_scene("train", i, RECIPE.seed, RECIPE.dense_share, questions_per_scene=5)
        trained = labels != -100
        assert (ids[trained] == labels[trained]).all()
        answers = processor.tokenizer.decode(labels[trained]).split("</s>")
        assert answers == [*scene["answers"], *([scene["description"]] if describe else []), ""]
    assert batch["pixel_values"].shape == (6, 3, 64, 64)
    assert batch["input_ids"].dtype == torch.long


def test_single_questions_are_tokenized_as_they_are_asked(processor):
    phase = Phase("some", 1, 1e-3, "cosine", num_voco_tokens=(1,), questions=5, describe=True, single=True)
    examples = [draw_row(RECIPE, phase, "train", i) for i in range(4)]
    batch = SingleQuestionCollator(processor, num_voco_tokens=3)(examples)
    assert batch["num_voco_tokens"].tolist() == [3] * 4
    assert batch["pixel_values"].shape == (4, 3, 64, 64)
    for i, example in enumerate(examples):
        ids, labels, groups = (batch[name][i] for name in ("input_ids", "labels", "text_groups"))
        assert groups.max() == len(example["messages"]) / 2 == 6
        assert ids[groups == 0].tolist() == [processor.image_token_id] * 3 + [0] * int(
            (1 - batch["attention_mask"][i]).sum()
        )
        for group in range(1, 7):
            question, answer = (message["content"] for message in example["messages"][2 * group - 2 : 2 * group])
            prompt = render(
                processor, [{"role": "user", "content": f"<image>\n{question}"}], add_generation_prompt=True
            )
            asked = processor(images=example["image"], text=prompt, num_voco_tokens=3).input_ids[0][3:]
            own = ids[groups == group].tolist()
            assert own[: len(asked)] == asked
            assert processor.tokenizer.decode(own[len(asked) :]) == f"{answer}</s>"
            assert labels[groups == group].tolist() == [-100] * len(asked) + own[len(asked) :]


def test_videos_and_images_share_a_batch(processor):
    phase = Phase("some", 1, 1e-3, "cosine", (2,), questions=2, describe=True, single=True, videos=True)
    rows, clip = phase_rows(RECIPE, phase, "train"), make_clips("train", 2)[1]
    batch = SingleQuestionCollator(processor, num_voco_tokens=2)([rows[3], rows[2]])
    assert batch["num_voco_tokens"].tolist() == [2] * 9 and len(batch["pixel_values"]) == 9
    voco = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert voco.tolist() == [16, 2]
    told = processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]).split("</s>")
    answers = [turn["content"] for turn in clip["messages"][1:4:2]]
    assert told == [*answers, clip["description"], ""]
    asked = processor.tokenizer.decode(batch["input_ids"][0][batch["text_groups"][0] == 3])
    assert asked.strip().startswith("Describe the video.\n")


def test_rows_are_drawn_alike_whenever_they_are_asked_for():
    phase = Phase("some", 1, 1e-3, "cosine", (2,), questions=3, single=True, videos=True)
    rows = phase_rows(RECIPE, phase, "train")
    assert len(rows) == RECIPE.num_train_scenes
    for row, again in zip(rows.select([5, 2]), (rows[5], draw_row(RECIPE, phase, "train", 2))):
        assert row["messages"] == again["messages"]
        assert [image.tobytes() for image in row["images"]] == [image.tobytes() for image in again["images"]]
    other = draw_row(replace(RECIPE, seed=1), phase, "train", 2)
    assert other["messages"] != rows[2]["messages"]


def test_rows_that_are_kept_are_drawn_once_and_are_the_same():
    phase = Phase("some", 1, 1e-3, "cosine", (0,), questions=2)
    drawn = phase_rows(RECIPE, phase, "train")
    kept = phase_rows(replace(RECIPE, keep_rows=True), phase, "train")
    assert kept[5]["image"] is kept[3:7]["image"][2]
    assert kept[3:7]["messages"] == drawn[3:7]["messages"]
    assert [image.tobytes() for image in kept[[9, 4]]["image"]] == [drawn[i]["image"].tobytes() for i in (9, 4)]
