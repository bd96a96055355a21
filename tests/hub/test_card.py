"""Model cards: what they say, that their code runs, and that a person's text survives."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from modeling.helpers import TILED, build_processor, random_pixels, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration, Qwen3Config, SiglipVisionConfig

from voco_llama_hf import EMBEDDED_CHECKPOINT, EMBEDDED_CHECKPOINT_576, VoCoLlamaConfig
from voco_llama_hf.hub import eval_result, make_card, write_card
from voco_llama_hf.hub.card import PICTURE, merge_sections, scaled
from voco_llama_hf.hub.cost import CostModel


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture
def folder(tmp_path, processor):
    tiny_model(voco_token_id=processor.image_token_id).save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def quick_start(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def count_flops(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def approx(number: int):
    return pytest.approx(number, rel=2e-3)


@pytest.mark.parametrize(
    ("text_class", "vision_class", "vision"),
    [(LlamaConfig, CLIPVisionConfig, {}), (Qwen3Config, SiglipVisionConfig, {"vision_use_head": False})],
)
def test_cost_is_what_torch_counts(text_class, vision_class, vision):
    strategy = "default" if vision_class is CLIPVisionConfig else "full"
    model = tiny_model(
        text_class=text_class,
        vision_class=vision_class,
        vision=vision,
        vision_feature_select_strategy=strategy,
    )
    model.set_attn_implementation("eager")
    cost = CostModel(model.config)
    pixels, k, text = random_pixels(model, 1), 3, 5
    model.compress(pixels, k)  # checks the rotation once, which costs nothing of an image
    cache = model.compress(pixels, k)
    ids = torch.tensor([[model.config.voco_token_id] * k + [5] * text])
    compressed = cost.compressed(k, text)
    assert compressed.nbytes == cache.nbytes
    # The angles of the rotary embedding are counted there, and left out here
    assert compressed.image_flops == approx(count_flops(lambda: model.compress(pixels, k)))
    asked = count_flops(lambda: model(ids, voco_cache=cache, use_cache=True, logits_to_keep=1))
    assert compressed.question_flops == approx(asked)

    llava = LlavaForConditionalGeneration(model.config).eval()
    llava.set_attn_implementation("eager")
    vision_tokens = cost.num_vision_tokens
    ids = torch.tensor([[model.config.image_token_id] * vision_tokens + [5] * text])
    uncompressed = cost.uncompressed(text)
    output = []
    total = count_flops(lambda: output.append(llava(ids, pixels, use_cache=True, logits_to_keep=1)))
    assert uncompressed.image_flops + uncompressed.question_flops == approx(total)
    layers = output[0].past_key_values.layers
    assert uncompressed.nbytes * (vision_tokens + text) == sum(
        (layer.keys.nbytes + layer.values.nbytes) * vision_tokens for layer in layers
    )
    assert cost.num_parameters == model.num_parameters()


def test_costs_of_the_paper():
    """Vicuna-7B: 0.5 MB instead of 302 MB in 16 bits."""
    config = VoCoLlamaConfig(
        text_config=LlamaConfig(vocab_size=32001, num_key_value_heads=32),
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        dtype=torch.float16,
    )
    cost = CostModel(config)
    assert [scaled(cost.nbytes(tokens), ("B", "kB", "MB")) for tokens in (1, 576)] == ["524 kB", "302 MB"]
    assert 7.0e9 < cost.num_parameters < 7.1e9
    saved = 1 - cost.compressed(1, 32).question_flops / cost.uncompressed(32).question_flops
    assert 0.94 < saved < 0.96


@pytest.mark.parametrize("template", [True, False])
def test_quick_start_runs_as_printed(folder, processor, template):
    if not template:
        (folder / "chat_template.jinja").unlink()
    card = make_card(VoCoLlamaConfig.from_pretrained(folder), type(processor).from_pretrained(folder), str(folder))
    names: dict = {}
    exec(compile(quick_start(card.content), "quick start", "exec"), names)
    # Pixels and their compressed form give one answer
    question, (ask, cache) = "And now?", (names["ask"], names["cache"])
    assert ask(question, images=names["image"], num_voco_tokens=1) == ask(question, voco_cache=cache)


@pytest.mark.parametrize("kind", TILED)
def test_quick_start_of_a_model_that_divides_images(tmp_path, kind):
    processor = build_processor(kind)
    model = tiny_model(voco_token_id=processor.image_token_id, **TILED[kind])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    card, names = make_card(model.config, processor, str(tmp_path)), {}
    exec(compile(quick_start(card.content), "quick start", "exec"), names)
    question, (ask, cache) = "And now?", (names["ask"], names["cache"])
    assert ask(question, images=names["image"], num_voco_tokens=1) == ask(question, voco_cache=cache)


@pytest.mark.parametrize("checkpoint", [EMBEDDED_CHECKPOINT, EMBEDDED_CHECKPOINT_576])
def test_card_of_a_checkpoint_of_the_package(monkeypatch, capsys, checkpoint):
    card = ModelCard.load(f"{checkpoint}/README.md")
    monkeypatch.chdir(ROOT)
    exec(compile(quick_start(card.content), "quick start", "exec"), {})
    assert re.findall(r"^red$", capsys.readouterr().out, re.MULTILINE) == ["red", "red"]
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-text-to-text"
    results = json.loads(Path(checkpoint, "results.json").read_text())
    scenes = results["test"]["accuracy"]
    figures = {
        (figure.dataset_config, figure.metric_args.get("num_voco_tokens")): figure.metric_value
        for figure in card.data.eval_results
        if figure.metric_type == "exact_match"
    }
    assert figures["dense", 1] == round(100 * scenes["k=1"]["dense"]["all"], 4)
    assert figures["sparse", None] == round(100 * scenes["uncompressed"]["sparse"]["all"], 4)
    if "videos" in results:
        videos = results["videos"]["accuracy"]
        assert figures["temporal", 2] == round(100 * videos["k=2"]["all frames"]["temporal"], 4)
        row = " | ".join(f"{100 * reading['temporal']:.1f}" for reading in videos["k=2"].values())
        assert f"| k = 2 | {row} |" in card.text
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", card.text):
        assert Path(checkpoint, picture).is_file()
    assert PICTURE.read_bytes() == (ROOT / "docs" / "source" / "images" / "attention.png").read_bytes()


def test_refreshing_keeps_what_a_person_wrote(folder):
    results = [eval_result("org/vqa", "accuracy", 61.25, 2), eval_result("org/vqa", "accuracy", 64.0, None)]
    path = write_card(folder, license="mit", base_model="org/base", eval_results=results, training="| lr | 1 |")
    text = path.read_text()
    assert (folder / "attention.png").is_file()
    assert "| k = 2 | 61.2 |" in text and "| uncompressed | 64.0 |" in text

    text = text.replace("A vision-language model that", "Our model of cats that")
    text = text.replace("## Limits\n", "## Limits\n\n- It is fond of cats.\n").replace("license: mit", "license: bsd")
    text = text.replace("61.2 |", "99.9 |").replace("tags:\n", "tags:\n- cats\n")
    path.write_text(text)
    write_card(folder, model_id="org/cats", eval_results=[eval_result("org/vqa", "accuracy", 62.5, 2)])
    card = ModelCard.load(path)
    assert "Our model of cats that" in card.text and "- It is fond of cats." in card.text
    assert card.data.license == "bsd" and card.data.base_model == "org/base"
    assert card.data.base_model_relation == "finetune"
    assert card.data.tags[0] == "cats" and card.data.tags.count("voco-llama") == 1
    assert "| k = 2 | 62.5 |" in card.text and "99.9" not in card.text
    assert 'model_id = "org/cats"' in card.text
    assert "| lr | 1 |" in card.text
    values = {str(figure.metric_args): figure.metric_value for figure in card.data.eval_results}
    assert values == {"{'num_voco_tokens': 2}": 62.5, "{'attention_mode': 'uncompressed'}": 64.0}
    before = path.read_text()
    write_card(folder, model_id="org/cats")
    assert path.read_text() == before


def test_a_card_of_another_tool_gets_our_sections(folder):
    (folder / "README.md").write_text("---\nlicense: mit\nlibrary_name: peft\n---\n# Cats\n\nThey purr.\n")
    card = ModelCard.load(write_card(folder))
    assert card.text.startswith("# Cats\n\nThey purr.\n\n## Quick start\n\n<!-- voco-llama:quick-start -->\n```python")
    assert (card.data.license, card.data.library_name) == ("mit", "peft")
    assert "## Memory and computation" in card.text


words = st.text(alphabet="ab \n#", max_size=20)


@given(st.lists(st.tuples(words, st.sampled_from("xyz"), words), max_size=3, unique_by=lambda part: part[1]), words)
def test_merging_sections(parts, tail):
    """Text outside the markers stays, letter by letter; every section ends up there once."""

    def section(name: str, content: str) -> str:
        return f"<!-- voco-llama:{name} -->{content}<!-- /voco-llama:{name} -->"

    old = "".join(text + section(name, content) for text, name, content in parts) + tail
    new = "".join(f"## {name}\n\n{section(name, f'new {name}')}\n\n" for name in "xyz")
    merged = merge_sections(old, new)
    for name in "xyz":
        assert merged.count(section(name, f"new {name}")) == 1
    assert merge_sections(merged, new) == merged
    if len(parts) == 3:
        assert merged == "".join(text + section(name, f"new {name}") for text, name, _ in parts) + tail


def test_a_marker_without_its_counterpart(folder):
    path = write_card(folder)
    damaged = path.read_text().replace("<!-- /voco-llama:compression -->", "")
    path.write_text(damaged)
    with pytest.raises(ValueError, match="has <!-- voco-llama:compression --> without its counterpart"):
        write_card(folder)
    assert path.read_text() == damaged
