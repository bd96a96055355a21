"""A folder of PEFT adapters is a model to every command."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from voco_llama_hf import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.hub.push import plan_push
from voco_llama_hf.images import open_image
from voco_llama_hf.loading import find_base, load_model


def save_adapters(checkpoint, folder, **options):
    """What a training leaves: adapters that change every answer, made for two VoCo tokens, and PEFT's own card."""
    processor = VoCoLlamaProcessor.from_pretrained(checkpoint, num_voco_tokens=2)
    model = VoCoLlamaForConditionalGeneration.from_pretrained(checkpoint)
    config = LoraConfig(
        **{
            "r": 8,
            "lora_alpha": 32,
            "target_modules": r".*language_model.*_proj",
            "init_lora_weights": False,
            "trainable_token_indices": {"embed_tokens": [processor.image_token_id]},
            "task_type": "CAUSAL_LM",
            **options,
        }
    )
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name or "lora_magnitude_vector" in name:
                parameter.mul_(1.5)
    adapted.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(checkpoint, tmp_path_factory):
    return save_adapters(checkpoint, tmp_path_factory.mktemp("trained") / "lora")


@pytest.fixture
def copied(adapters, tmp_path):
    """To be written into."""
    return shutil.copytree(adapters, tmp_path / "lora")


def answer_in_python(model, adapters, image, k=2):
    processor = VoCoLlamaProcessor.from_pretrained(adapters)
    text = "user: <image>What?assistant: "
    inputs = processor(images=open_image(image), text=text, num_voco_tokens=k, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def peft_model(checkpoint, adapters):
    return PeftModel.from_pretrained(VoCoLlamaForConditionalGeneration.from_pretrained(checkpoint), adapters).eval()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_ask_answers_as_peft_does_merged_or_not(invoke, checkpoint, adapters, images, tmp_path, options):
    folder = save_adapters(checkpoint, tmp_path / "other", **options) if options else adapters
    expected = answer_in_python(peft_model(checkpoint, folder), folder, images[0])
    assert expected != answer_in_python(
        VoCoLlamaForConditionalGeneration.from_pretrained(checkpoint), folder, images[0]
    )
    answer = invoke("ask", "--model", folder, "--max-new-tokens", 6, images[0], "What?").stdout.strip()
    assert answer == expected
    assert answer_in_python(load_model(str(folder), merge=True), folder, images[0]) == expected


def test_a_processor_may_be_that_of_the_base(invoke, copied, images):
    for path in copied.iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    # One VoCo token, as the base model has it
    invoke("ask", "--model", copied, "--max-new-tokens", 3, images[0], "What?")
    assert load_model(str(copied)).config.num_voco_tokens == 1


def test_what_adapters_compressed_is_theirs(invoke, checkpoint, adapters, images, tmp_path):
    cache = tmp_path / "cache.safetensors"
    invoke("compress", "--model", adapters, "--output", cache, images[0])
    asked = "--max-new-tokens", 6, "--cache", cache, "What?"
    expected = answer_in_python(peft_model(checkpoint, adapters), adapters, images[0])
    assert invoke("ask", "--model", adapters, *asked).stdout.strip() == expected
    assert "made by another model" in invoke("ask", "--model", checkpoint, *asked, exit_code=1).stderr
    network, processor = peft_model(checkpoint, adapters), VoCoLlamaProcessor.from_pretrained(adapters)
    pixels = processor(images=open_image(images[0]), return_tensors="pt")["pixel_values"]
    assert network.compress(pixels, 2).fingerprint == load_model(str(adapters)).fingerprint()


def test_index_and_benchmark(invoke, adapters, images, tmp_path):
    assert "3 entries" in invoke("index", images[0].parent, "--store", tmp_path / "store", "--model", adapters).stdout
    result = invoke("benchmark", "--model", adapters, "--device", "meta")
    assert "lora" in result.stdout + result.stderr


@pytest.mark.slow
def test_export_merges(invoke, checkpoint, adapters, images, tmp_path):
    from voco_llama_hf.export import ORTVoCoLlamaForConditionalGeneration

    invoke("export", "onnx", adapters, tmp_path / "onnx")
    exported = ORTVoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "onnx")
    expected = answer_in_python(peft_model(checkpoint, adapters), adapters, images[0])
    assert answer_in_python(exported, adapters, images[0]) == expected


@pytest.mark.slow
def test_serve(adapters, images):
    from serving.conftest import serving

    with serving(adapters) as server:
        assert [model.id for model in server.client().models.list()] == ["lora"]


def test_the_card_is_ours(invoke, checkpoint, copied):
    assert "[More Information Needed]" in (copied / "README.md").read_text()
    invoke("card", copied, "--license", "apache-2.0")
    card = ModelCard.load(copied / "README.md")
    assert "[More Information Needed]" not in card.content and "PeftModel.from_pretrained(base_model" in card.text
    for path in (checkpoint, copied.parent):
        assert str(path) not in card.content
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-text-to-text", "peft")
    assert card.data.base_model is None
    invoke("card", copied, "--base-model", "org/base")
    card = ModelCard.load(copied / "README.md")
    assert (card.data.base_model, card.data["base_model_relation"]) == ("org/base", "adapter")
    assert 'from_pretrained("org/base")' in card.text and card.data.license == "apache-2.0"


def test_the_quick_start_of_adapters_runs(checkpoint, copied, monkeypatch):
    from hub.test_card import quick_start

    from voco_llama_hf.hub import write_card

    code = quick_start(write_card(copied).read_text()).replace("path/to/the-base-model", str(checkpoint))
    monkeypatch.chdir(copied.parent)
    exec(compile(code, "quick start", "exec"), {})


def listed(result):
    return {line.split()[0] for line in result.stdout.splitlines() if line.strip()}


def test_push_sends_adapters_or_a_whole_model(invoke, checkpoint, copied):
    invoke("card", copied)
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    message = invoke("push", copied, "org/lora", "--dry-run", exit_code=1).stderr
    assert "lies on this machine" in message and "--merge" in message
    files = listed(invoke("push", copied, "org/lora", "--dry-run", "--base-model", "org/base"))
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"} <= files
    assert "modeling_voco_llama.py" not in files
    sent = {file.path: file for file in plan_push(copied, "org/lora", base_model="org/base").files}
    config = json.loads(sent["adapter_config.json"].source)
    assert config["base_model_name_or_path"] == "org/base" and config["r"] == 8
    for file in sent.values():
        if file.path.endswith((".json", ".md")):
            content = file.source if isinstance(file.source, bytes) else file.source.read_bytes()
            assert str(checkpoint).encode() not in content, file.path
    files = listed(invoke("push", copied, "org/model", "--dry-run", "--merge"))
    assert {"model.safetensors", "config.json", "modeling_voco_llama.py", "README.md"} <= files
    assert "adapter_config.json" not in files
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_merging_writes_the_whole_model(checkpoint, copied, images, tmp_path):
    from voco_llama_hf.hub import merge_adapters, write_card

    card = write_card(copied, base_model="org/base")
    card.write_text(card.read_text().replace("## Limits", "Fond of cats.\n\n## Limits"))
    merge_adapters(copied, tmp_path / "merged")
    card = ModelCard.load(write_card(tmp_path / "merged"))
    assert "Fond of cats." in card.text and "PeftModel" not in card.text
    assert (card.data.library_name, card.data["base_model_relation"]) == ("transformers", "finetune")
    model = VoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert model.config.num_voco_tokens == 2
    assert answer_in_python(model, copied, images[0]) == answer_in_python(
        peft_model(checkpoint, copied), copied, images[0]
    )


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_cannot_be_loaded_is_one_line(invoke, checkpoint, other_checkpoint, copied, images, tmp_path):
    def fails(message):
        assert message in invoke("ask", "--model", copied, images[0], "What?", exit_code=1).stderr

    (copied / "adapter_model.safetensors").rename(tmp_path / "weights")
    fails("cannot be loaded")
    (copied / "adapter_model.safetensors").write_bytes((tmp_path / "weights").read_bytes()[:500])
    fails("cannot be loaded")
    shutil.copy(tmp_path / "weights", copied / "adapter_model.safetensors")
    # Layers that the file has no weights for
    change(copied, target_modules=r".*language_model.*(_proj|lm_head)|lm_head")
    fails("Found missing adapter keys")
    for base, message in (
        (None, "name no base model"),
        (str(tmp_path / "gone"), "were trained on"),
        (str(copied), "are adapters too"),
    ):
        change(copied, base_model_name_or_path=base)
        fails(message)
    (llava := tmp_path / "llava").mkdir()
    (llava / "config.json").write_text('{"model_type": "llava"}')
    change(copied, base_model_name_or_path=str(llava))
    fails("run voco-llama convert")
    (copied / "adapter_config.json").write_text("{")
    fails("adapter_config.json of")


def test_learned_prompts_are_refused(invoke, checkpoint, images, tmp_path):
    model = VoCoLlamaForConditionalGeneration.from_pretrained(checkpoint)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=64, num_layers=3)
    get_peft_model(model, config).save_pretrained(tmp_path / "prompts")
    message = invoke("ask", "--model", tmp_path / "prompts", images[0], "What?", exit_code=1).stderr
    assert "holds learned prompts" in message


def test_adapters_of_the_hub_name_no_folder(adapters, tmp_path, monkeypatch):
    """A folder that an author names is none of the reader's."""
    path = adapters / "adapter_config.json"
    monkeypatch.setattr("voco_llama_hf.loading.find_adapter_config_file", lambda *_, **__: path)
    with pytest.raises(ValueError, match="which is not here"):
        find_base("org/lora")


@pytest.mark.parametrize(
    ("args", "exit_code", "message"),
    [
        (["push", "{base}", "org/model", "--merge"], 2, "--merge adds adapters to their base model"),
        (["card", "{base}", "--license", "Apache-2"], 1, "did you mean apache-2.0?"),
        (["card", "{base}", "--license", "my own"], 1, "the Hub knows no licence 'my own'"),
        (["card", "{base}", "--base-model", "/models/llava"], 1, "named by its id on the Hub"),
        (["card", "{base}", "--base-model", "org/base/part"], 1, "named by its id on the Hub"),
        (["push", "{lora}", "org/lora", "--base-model", "../base", "--dry-run"], 1, "named by its id on the Hub"),
    ],
)
def test_errors(invoke, checkpoint, adapters, args, exit_code, message):
    places = {"base": checkpoint, "lora": adapters}
    assert message in invoke(*(arg.format(**places) for arg in args), exit_code=exit_code).stderr
    assert not (checkpoint / "README.md").exists()
