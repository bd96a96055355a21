import io
from dataclasses import replace

import pytest
import torch
from datasets import disable_progress_bars
from PIL import Image
from rich.console import Console
from scenes.recipe import RECIPE

from voco_llama_hf.scenes.building import build_model, build_processor
from voco_llama_hf.scenes.data import draw_row
from voco_llama_hf.scenes.moving import NUM_FRAMES, make_clips
from voco_llama_hf.scenes.recipe import Phase
from voco_llama_hf.scenes.retention.baselines import put_compressor
from voco_llama_hf.scenes.retention.llama_vid import LlamaVid, LlamaVidCollator, llama_vid_reader
from voco_llama_hf.scenes.retention.report import percent
from voco_llama_hf.scenes.retention.sizes import Size
from voco_llama_hf.scenes.retention.videos import (
    GROUPS,
    READING,
    Arm,
    VideoComparison,
    VideoStudy,
    make_video_reader,
    parse_arm,
    run_video_study,
    video_arms,
)
from voco_llama_hf.scenes.still import make_scenes
from voco_llama_hf.scenes.video_evaluation import VideoResults, choose_frames


disable_progress_bars()
PHASE = Phase("some", 1, 1e-3, "cosine", (0,), questions=2, single=True, videos=True)


@pytest.fixture(scope="module")
def processor():
    return build_processor(RECIPE)


def make_arm_model(processor, compressor, num_tokens):
    model = build_model(processor, RECIPE)
    torch.manual_seed(0)
    put_compressor(model, compressor, num_tokens)
    return model.eval()


@pytest.mark.parametrize("num_tokens", [1, 2, 8])
def test_pooling_takes_means_of_equal_parts(processor, num_tokens):
    model = build_model(processor, RECIPE).eval()
    pixels = processor.image_processor(images=list(make_scenes("test", 2)["image"]), return_tensors="pt").pixel_values
    before = model.model.get_vision_features(pixels).view(2, 8, 8, -1)
    put_compressor(model, "average pooling", num_tokens)
    after = model.model.get_vision_features(pixels)
    assert after.shape == (2, num_tokens, 256)
    torch.testing.assert_close(after.mean(1), before.mean((1, 2)))
    height, width = {1: (8, 8), 2: (8, 4), 8: (4, 2)}[num_tokens]
    torch.testing.assert_close(after[:, -1], before[:, -height:, -width:].mean((1, 2)))


@pytest.mark.parametrize(("compressor", "num_tokens"), [("average pooling", 2), ("q-former", 2)])
def test_videos_are_read_as_they_were_trained(processor, compressor, num_tokens):
    """The first token of an answer is the one that the forward pass of the training finds."""
    model = make_arm_model(processor, compressor, num_tokens)
    clips = make_clips("test", 2)
    reader = make_video_reader(Arm("some", (0,), compressor=compressor), model, processor, clips)
    question = "What shape is blue?"
    (answer,) = reader(choose_frames(2, 0)["all frames"])([question], [1])
    inputs = processor(
        text=f"{'<image>' * NUM_FRAMES}\n{question}\n",
        images=clips[1]["images"],
        num_voco_tokens=1,
        return_tensors="pt",
    )
    with torch.no_grad():
        first = model(**inputs, attention_mode="uncompressed").logits[0, -1].argmax()
    assert answer.startswith(processor.decode(first, skip_special_tokens=True).strip())


def llama_vid_batch(processor):
    rows = [draw_row(RECIPE, PHASE, "train", index) for index in (1, 2)]
    return rows, LlamaVidCollator(processor)(rows)


def test_every_question_makes_two_tokens_of_a_frame(processor):
    model = make_arm_model(processor, "llama-vid", 2)
    _, batch = llama_vid_batch(processor)
    assert batch["frames"].tolist() == [list(range(8))] * 2 + [[-1] * 7 + [8]] * 2
    asked = LlamaVid(model)
    vision = model.model.get_vision_features(batch["pixel_values"])
    arguments = [batch[name] for name in ("frames", "input_ids", "attention_mask", "question_mask")]
    embeddings, mask = asked.embed(vision, *arguments)
    assert embeddings.shape[1] == mask.shape[1] == 1 + 2 * 8 + batch["input_ids"].shape[1]
    assert mask[:, 1:17].sum(1).tolist() == [16, 16, 2, 2]

    # Worked out anew for one frame: softmax over its vision tokens, mean over the words of the question
    two = model.model.multi_modal_projector
    words = model.get_input_embeddings()(batch["input_ids"][1])[batch["question_mask"][1].bool()]
    weights = (two.query(words) @ vision[3].T / 16).softmax(-1)
    torch.testing.assert_close(embeddings[1, 1 + 2 * 3], two.context((weights @ vision[3]).mean(0)))
    torch.testing.assert_close(embeddings[1, 1 + 2 * 3 + 1], vision[3].mean(0), atol=1e-5, rtol=1e-5)
    # Another question finds something else in the same frame, whose mean stays
    assert not torch.allclose(embeddings[0, 7], embeddings[1, 7])
    torch.testing.assert_close(embeddings[0, 8], embeddings[1, 8])


def test_padding_changes_nothing_and_everything_is_trained(processor):
    model = make_arm_model(processor, "llama-vid", 2)
    rows, batch = llama_vid_batch(processor)
    asked = LlamaVid(model)
    alone = LlamaVidCollator(processor)([rows[1]])
    together, single = asked(**batch), asked(**alone)
    length = alone["input_ids"].shape[1]
    scored = alone["labels"] != -100
    assert (together.logits[2:, :length][scored] == single.logits[scored]).all()
    together.loss.backward()
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())


def test_llama_vid_answers_as_its_forward_pass_does(processor):
    model = make_arm_model(processor, "llama-vid", 2)
    clips = make_clips("test", 2)
    frames = [frame for images in clips["images"] for frame in images]
    question, turns = "What shape is blue?", [{"role": "user", "content": "What shape is blue?"}]
    batch = LlamaVidCollator(processor)(
        [{"images": clips[1]["images"], "messages": [*turns, {"role": "assistant", "content": "star"}]}]
    )
    with torch.no_grad():
        guesses = LlamaVid(model)(**batch).logits
    first = guesses[0, int(batch["question_mask"].sum())]
    (answer,) = llama_vid_reader(model, processor, frames)(choose_frames(2, 0)["all frames"])([question], [1])
    assert answer.startswith(processor.decode(first, skip_special_tokens=True).strip())


def test_every_arm_has_as_many_tokens():
    arms = video_arms((1, 2, 8))
    assert len({arm.folder for arm in arms}) == len(arms) == 10
    assert [arm.num_tokens for arm in arms if arm.compressor == "q-former"] == [1, 2, 8]


def test_the_comparison_is_shown_written_and_drawn(tmp_path):
    scores = {name: dict.fromkeys(GROUPS, share) for name, share in (("all frames", 0.9), ("one frame", 0.5))}
    results = VideoResults("test", 3, dict.fromkeys(GROUPS, 4), {READING: scores})
    other = replace(results, accuracy={READING: {name: dict.fromkeys(GROUPS, 0.8) for name in scores}})
    comparison = VideoComparison(10, {"VoCo, 2 a frame": [results, other], "llama-vid": [results] * 2})
    console = Console(file=io.StringIO(), width=200)
    console.print(comparison.table())
    assert all(
        word in console.file.getvalue()
        for word in ("VoCo, 2 a frame", "llama-vid", "blinks", "chance", "85.0 ±7.1", "2 seeds")
    )
    comparison.save(tmp_path / "videos.md")
    head, _, first, *_ = (tmp_path / "videos.md").read_text().splitlines()
    assert head.startswith("| arm | temporal |") and first.startswith("| VoCo, 2 a frame | 85.0 ±7.1 |")
    # Which learning rate was an arm's is said where several were tried
    replace(comparison, search={"llama-vid": {"0.002": 0.7, "0.004": 0.6}}).save(tmp_path / "searched.md")
    assert (tmp_path / "searched.md").read_text().splitlines()[2:] == [
        *(tmp_path / "videos.md").read_text().splitlines()[2:3],
        "| llama-vid, at 0.002" + "".join(f" | {percent([0.9, 0.9])}" for _ in GROUPS) + " |",
    ]
    # A panel for each number of tokens, that of LLaMA-VID among those of two
    heights = []
    for arms in (["VoCo, 2 a frame"], ["VoCo, 1 a frame", "VoCo, 2 a frame", "VoCo, 8 a frame"]):
        VideoComparison(10, {arm: [results] for arm in (*arms, "llama-vid")}).plot(tmp_path / "videos.png")
        heights.append(Image.open(tmp_path / "videos.png").height)
    assert heights[1] > 2 * heights[0]
    assert [parse_arm(arm.name) for arm in video_arms([1, 8])] == [
        *(("VoCo", 1), ("average pooling", 1), ("q-former", 1)),
        *(("VoCo", 8), ("average pooling", 8), ("q-former", 8)),
        ("llama-vid", 2),
    ]


@pytest.mark.slow
def test_a_micro_study_runs_end_to_end_and_is_found_again(tmp_path):
    study = VideoStudy(tmp_path, Size(RECIPE, steps=2, learning_rates=(1e-3, 2e-3)), compile=False)
    first = run_video_study(study, (2,), range(1), "validation", 4, report=lambda what: None)
    assert list(first.results) == [arm.name for arm in video_arms((2,))]
    # Each was trained with both learning rates, and is the one that was better on validation
    for arm in video_arms((2,)):
        tried = first.search[arm.name]
        assert list(tried) == ["0.001", "0.002"]
        best = min(rate for rate, share in tried.items() if share == max(tried.values()))
        assert study.folder_of(arm, 0).name.endswith(f"-at-{best}-seed-0-final")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert run_video_study(study, (2,), range(1), "validation", 4, report=lambda what: None) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == written
