import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from datasets import disable_progress_bars
from scenes.recipe import RECIPE
from transformers import Trainer, TrainingArguments

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.scenes.building import add_tokens, build_model, build_processor, enlarge_positions, grid_waves
from voco_llama_hf.scenes.canvas import LARGE, SMALL
from voco_llama_hf.scenes.data import draw_row, phase_rows
from voco_llama_hf.scenes.moving import WORDS, make_clips
from voco_llama_hf.scenes.muon import MuonWithAdamW
from voco_llama_hf.scenes.objects import COLOURS, SHAPES
from voco_llama_hf.scenes.phases import average_weights, train
from voco_llama_hf.scenes.publishing import publish
from voco_llama_hf.scenes.recipe import SCENES_64, SCENES_576, Phase
from voco_llama_hf.scenes.running import phase_options, run_phase, seconds_spent
from voco_llama_hf.scenes.single_questions import SingleQuestionCollator
from voco_llama_hf.scenes.still import make_scene, make_scenes
from voco_llama_hf.training import VoCoDataCollator


disable_progress_bars()


@pytest.fixture(scope="module")
def processor():
    return build_processor(replace(RECIPE, num_train_scenes=400))


@pytest.fixture(scope="module")
def model(processor):
    return build_model(processor, RECIPE).eval()


def render(processor, messages, **kwargs):
    return processor.apply_chat_template(messages, tokenize=False, **kwargs)


@pytest.mark.parametrize("text", ["Where is the red star?", "grüß dich, 世界 🙂", "a\n\n b\t<c>", "Straße 12345"])
def test_any_text_survives_the_tokenizer(processor, text):
    ids = processor.tokenizer(text).input_ids
    assert ids[0] == processor.tokenizer.bos_token_id
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_words_of_the_scenes_are_single_tokens(processor):
    tokenizer = processor.tokenizer
    assert len(tokenizer) <= 512
    words = [
        *COLOURS,
        *SHAPES,
        *" ".join(SMALL.positions).split(),
        *map(str, range(10)),
        "digits",
        "objects",
        "larger",
    ]
    for word in words:
        assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1, word
    assert len(tokenizer("\n", add_special_tokens=False).input_ids) == 1


def test_special_tokens_are_single_tokens(processor):
    tokenizer = processor.tokenizer
    for token in ("<pad>", "<s>", "</s>", "<image>", "<voco>"):
        assert tokenizer(token, add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids(token)]
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")


def test_template_renders_parts_and_plain_strings_alike(processor):
    parts = [{"type": "image"}, {"type": "text", "text": "Where is the star?"}]
    expected = "<image>\nWhere is the star?\n"
    for content in (parts, "<image>\nWhere is the star?"):
        messages = [{"role": "user", "content": content}]
        assert render(processor, messages) == expected
        assert render(processor, messages, add_generation_prompt=True) == expected
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "center"}]}]
    conversation = [{"role": "user", "content": parts}, *answer, {"role": "user", "content": "And?"}]
    assert render(processor, conversation) == expected + "center</s>And?\n"


def test_template_starts_text_with_bos(processor):
    assert render(processor, [{"role": "user", "content": "Hello"}]) == "<s>Hello\n"


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


def test_images_of_any_size_are_resized(processor):
    image = make_scene("train", 0)["image"].convert("L").resize((200, 90))
    inputs = processor(images=image, text="<image>\nWhere is the star?\n", num_voco_tokens=2, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    assert inputs["input_ids"][0, :2].tolist() == [processor.tokenizer.convert_tokens_to_ids("<voco>")] * 2


def test_model_fits_the_processor(processor):
    model = build_model(processor, SCENES_64)
    assert 3e6 < model.num_parameters() < 6e6
    assert model.config.voco_token_id == processor.tokenizer.convert_tokens_to_ids("<voco>")
    assert model.config.vision_prefix_token_ids == [processor.tokenizer.bos_token_id]
    assert processor.tokenizer.decode(model.config.vision_suffix_token_ids) == "\n"


def test_words_of_videos_become_tokens():
    """Without a change to what is said of images."""
    processor = build_processor(replace(RECIPE, num_train_scenes=400))
    texts = [text for scene in make_scenes("train", 200) for text in (*scene["questions"], scene["description"])]
    before = processor.tokenizer(texts).input_ids
    add_tokens(processor, WORDS)
    assert processor.tokenizer(texts).input_ids == before
    clips = make_clips("train", 40)
    said = [text for clip in clips for text in (*clip["questions"], *clip["answers"], clip["description"])]
    ids = processor.tokenizer(said).input_ids
    assert set(processor.tokenizer.convert_tokens_to_ids(list(WORDS))) <= {id for row in ids for id in row}
    assert processor.batch_decode(ids, skip_special_tokens=True) == said


@pytest.fixture(scope="module")
def started():
    """A model and its processor that start from the embedded checkpoint and read a larger canvas."""
    processor = build_processor(SCENES_576)
    return build_model(processor, SCENES_576).eval(), processor


def test_a_larger_canvas_starts_from_the_embedded_checkpoint(started):
    model, processor = started
    known = VoCoLlamaForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        if not name.endswith("position_embedding.weight"):
            torch.testing.assert_close(weight[: len(known[name])], known[name])
    scene = make_scene("train", 3, dense_share=1.0, canvas=LARGE)
    inputs = processor(images=scene["image"], text="<image>\nWhere?\n", num_voco_tokens=2, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 192, 192)
    assert model.model.get_vision_features(inputs["pixel_values"]).shape == (1, 576, 256)
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_places_of_a_larger_canvas_are_few_tokens(started):
    _, processor = started
    for text in (*LARGE.positions, f"What colour is at {LARGE.at(7)}?"):
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) <= 4 or text.startswith("What")
        assert processor.tokenizer.decode(ids) == text


def test_enlarged_positions_keep_their_places():
    """A field that rises along rows and columns rises alike on a finer grid."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    positions = torch.cat([torch.full((1, 2), -5.0), torch.stack([rows.flatten(), columns.flatten()], dim=1)])
    enlarged = enlarge_positions(positions, 24)
    assert enlarged.shape == (577, 2) and enlarged[0].tolist() == [-5, -5]
    grid = enlarged[1:].view(24, 24, 2)
    middles = (torch.arange(24) + 0.5) / 3 - 0.5
    inner = slice(6, 18)
    torch.testing.assert_close(grid[inner, 12, 0], middles[inner], atol=0.05, rtol=0)
    torch.testing.assert_close(grid[12, inner, 1], middles[inner], atol=0.05, rtol=0)


def test_averaged_weights_lie_between(processor):
    model, earlier = build_model(processor, RECIPE), build_model(processor, replace(RECIPE, seed=1))
    ours, theirs = (deepcopy(m.state_dict()) for m in (model, earlier))
    theirs["lm_head.weight"] = theirs["lm_head.weight"][:-3]  # of a smaller vocabulary
    average_weights(model, theirs, 0.75)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            assert torch.equal(weight[-3:], ours[name][-3:])
            weight, ours[name] = weight[:-3], ours[name][:-3]
        torch.testing.assert_close(weight, 0.75 * ours[name] + 0.25 * theirs[name])


def test_same_seed_builds_the_same_model(processor, model):
    other = build_model(processor, RECIPE)
    assert all(torch.equal(p, other.state_dict()[name]) for name, p in model.state_dict().items())


def test_grid_waves_tell_all_places_apart():
    waves = grid_waves(8, 192)
    assert waves.shape == (64, 192)
    assert torch.cdist(waves, waves).fill_diagonal_(torch.inf).min() > 0.5
    # Neighbours in a row differ in the columns' half alone
    assert torch.equal(waves[0, :96], waves[1, :96]) and torch.equal(waves[0, 96:], waves[8, 96:])


def test_optimizer_moves_every_parameter_once_and_resumes(processor):
    model = build_model(processor, RECIPE)
    optimizer = MuonWithAdamW(model, lr=1e-2, weight_decay=0.0)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(params) == len(set(map(id, params))) == len(list(model.parameters()))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = [p.clone() for p in params]
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(params, before))

    twin = build_model(processor, RECIPE)
    twin.load_state_dict(model.state_dict())
    resumed = MuonWithAdamW(twin, lr=1e-2, weight_decay=0.0)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    for group in (*optimizer.param_groups, *resumed.param_groups):
        group["lr"] = 5e-3
    assert {group["lr"] for part in resumed.parts for group in part.param_groups} == {5e-3}
    for p, q in zip(model.parameters(), twin.parameters()):
        q.grad = p.grad
    optimizer.step()
    resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


class Zeros(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, number):
        return {"loss": (self.weight - number).square().mean()}


def test_an_interrupted_phase_goes_on_and_its_seconds_add_up(tmp_path):
    def trainer(steps):
        options = phase_options(replace(RECIPE, save_steps=1, num_workers=0), tmp_path, steps, batch_size=1)
        args = TrainingArguments(**{**options, "eval_strategy": "no", "logging_steps": 1})
        return Trainer(Zeros(), args, train_dataset=[{"number": 1.0}] * 8)

    first = run_phase(trainer(2))
    spent = seconds_spent(first)
    assert spent > 0
    again = run_phase(trainer(4))
    assert [entry["step"] for entry in again if "loss" in entry] == [1, 2, 3, 4]
    assert seconds_spent(again) > spent
    assert [entry["seconds"] for entry in again] == sorted(entry["seconds"] for entry in again)


@pytest.mark.slow
def test_a_micro_training_runs_end_to_end_and_resumes(tmp_path):
    work_dir, output_dir = tmp_path / "work", tmp_path / "checkpoint"
    work_dir.mkdir()
    first = replace(RECIPE, phases=RECIPE.phases[:1])
    train(first, work_dir, compile=False)
    trained = (work_dir / "uncompressed-final" / "model.safetensors").read_bytes()
    videos = Phase(
        "videos", 2, 1e-3, "cosine", num_voco_tokens=(1, 2, 0), describe=True, single=True, videos=True, share=0.5
    )
    recipe = replace(RECIPE, num_test_clips=4, phases=(*RECIPE.phases, videos))
    train(recipe, work_dir, compile=False)
    assert (work_dir / "uncompressed-final" / "model.safetensors").read_bytes() == trained
    publish(work_dir, recipe, output_dir)

    results = json.loads((output_dir / "results.json").read_text())
    assert results["recipe"]["phases"][1]["num_voco_tokens"] == [1, 2, 0]
    assert set(results["test"]["accuracy"]) == {"k=1", "k=2", "uncompressed"}
    assert set(results["videos"]["accuracy"]) == {"k=1", "k=2"}
    assert {"README.md", "results.png", "training.png", "model.safetensors"} <= {p.name for p in output_dir.iterdir()}
    model = VoCoLlamaForConditionalGeneration.from_pretrained(output_dir)
    processor = VoCoLlamaProcessor.from_pretrained(output_dir)
    inputs = processor(
        images=make_scenes("test", 1)[0]["image"], text="<image>\nWhere is the star?\n", return_tensors="pt"
    )
    assert model.dtype == torch.bfloat16
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.slow
def test_a_larger_canvas_trains_from_the_embedded_checkpoint(tmp_path):
    phases = tuple(replace(phase, steps=1) for phase in SCENES_576.phases)
    small = {"batch_size": 2, "vision_batch_size": 2, "num_validation_scenes": 4}
    recipe = replace(
        SCENES_576, phases=phases, vision_steps=1, num_test_scenes=2, num_test_clips=1, num_train_scenes=8, **small
    )
    train(recipe, tmp_path, compile=False)
    publish(tmp_path, recipe, tmp_path / "checkpoint")
    known = VoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "vision-final").model.vision_tower
    model = VoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    for weight, other in zip(known.parameters(), model.model.vision_tower.parameters(), strict=True):
        torch.testing.assert_close(other, weight, atol=0.02, rtol=0.01)  # frozen after its own training; bfloat16
    assert "192x192" in (tmp_path / "checkpoint" / "README.md").read_text()
    results = json.loads((tmp_path / "checkpoint" / "results.json").read_text())
    assert results["recipe"]["canvas"]["side"] == 192
    assert set(results["videos"]["accuracy"]) == {f"k={k}" for k in (1, 2, 4, 8)}
