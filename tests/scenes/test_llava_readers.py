"""Reading without compression, a picture once for all of its questions, beside transformers asked one by one."""

import pytest

from voco_llama_hf import EMBEDDED_CHECKPOINT
from voco_llama_hf.llava import as_llava
from voco_llama_hf.modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.scenes.moving import make_clips
from voco_llama_hf.scenes.readers import make_prompts, preprocess, uncompressed_reader, uncompressed_video_reader
from voco_llama_hf.scenes.still import DESCRIBE, make_scenes


@pytest.fixture(scope="module")
def model():
    return VoCoLlamaForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT).float().eval()


@pytest.fixture(scope="module")
def processor():
    return VoCoLlamaProcessor.from_pretrained(EMBEDDED_CHECKPOINT)


def ask_alone(model, processor, prompt, pixel_values, max_new_tokens):
    """What a LLaVA of the same weights generates."""
    inputs = processor.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    ids = as_llava(model).generate(
        input_ids=inputs["input_ids"], pixel_values=pixel_values, max_new_tokens=max_new_tokens, do_sample=False
    )
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_an_image_is_read_once_for_all_its_questions(model, processor):
    scenes = make_scenes("test", 3)
    images = preprocess(processor, scenes)
    asked = [(2, scenes[2]["questions"][0]), (0, DESCRIBE), (2, DESCRIBE), (0, scenes[0]["questions"][3])]
    read = uncompressed_reader(model, processor, images, max_new_tokens=60)
    seen = []
    vision = model.model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(len(output[0])))
    answers = read([question for _, question in asked], [image for image, _ in asked])
    vision.remove()
    assert sum(seen) == 2
    for (image, question), answer in zip(asked, answers, strict=True):
        (prompt,) = make_prompts(processor, [question])
        prompt = prompt.replace("<image>", "<s>" + "<voco>" * 64)
        assert answer == ask_alone(model, processor, prompt, images["pixel_values"][[image]], 60)
    assert read(["Which?"], [1]) == read(["Which?", "Which?"], [1, 1])[:1]


def test_videos_of_several_lengths_are_read_once(model, processor):
    clips = make_clips("test", 2)
    frames = [frame for clip in clips for frame in clip["images"]]
    length = len(clips[0]["images"])
    shown = [list(range(length)), [length, length + 2, length + 4]]
    asked = [(1, clips[1]["questions"][0]), (0, clips[0]["questions"][0]), (1, clips[1]["questions"][1])]
    read = uncompressed_video_reader(model, processor, frames)(shown)
    answers = read([question for _, question in asked], [video for video, _ in asked])
    pixels = preprocess(processor, {"image": frames})["pixel_values"]
    for (video, question), answer in zip(asked, answers, strict=True):
        (prompt,) = make_prompts(processor, [question], "video")
        prompt = prompt.replace("<video>", "<s>" + "<voco>" * 64 * len(shown[video]))
        assert answer == ask_alone(model, processor, prompt, pixels[shown[video]], 12)
