"""Conversion of checkpoints of the authors' code and of llava-hf."""

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from voco_llama_hf import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.conversion import convert_checkpoint


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
AUTHORS_VOCAB_SIZE = 32001
EMBEDDING = "model.language_model.embed_tokens.weight"
CLIP = CLIPVisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
)
SIGLIP = SiglipVisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    vision_use_head=False,
)
TEXT_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
NUM_IMAGE_TOKENS = 4


def make_llava(text_config=None, vision_config=CLIP, **kwargs):
    """A tiny Llava with random weights, biases and norms included."""
    text_config = text_config or LlamaConfig(vocab_size=AUTHORS_VOCAB_SIZE, num_key_value_heads=2, **TEXT_SIZES)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text_config, vision_config=vision_config, image_seq_length=NUM_IMAGE_TOKENS, **kwargs)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_tokenizer(*special_tokens, bos_token="<s>"):
    """A byte-level tokenizer: `<unk>`, `<s>`, `</s>`, 256 bytes, then what is added."""
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos_token is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", pair=f"{bos_token} $A $B", special_tokens=[(bos_token, vocab[bos_token])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos_token, eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.add_tokens(list(special_tokens), special_tokens=True)
    return tokenizer


NEWLINE_ID = make_tokenizer().convert_tokens_to_ids("Ċ")


def make_llama_sized_tokenizer(size=AUTHORS_VOCAB_SIZE - 1):
    """A word-level tokenizer with as many tokens as Llama's."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, size)}}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def image_processor(size=28):
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def save_weights(folder, state_dict, suffix=".safetensors", num_shards=1):
    """Writes weights in one file or in shards with an index, as transformers names them."""
    stem = {".safetensors": "model", ".bin": "pytorch_model"}[suffix]
    write = {".safetensors": save_file, ".bin": torch.save}[suffix]
    state_dict = {name: tensor.clone() for name, tensor in state_dict.items()}
    if num_shards == 1:
        return write(state_dict, folder / f"{stem}{suffix}")
    names, weight_map = sorted(state_dict), {}
    for i in range(num_shards):
        file = f"{stem}-{i + 1:05d}-of-{num_shards:05d}{suffix}"
        write({name: state_dict[name] for name in names[i::num_shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::num_shards], file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def authors_state_dict(model, tower_inside=True):
    """The weights of a Llava under the names of the original LLaVA code."""
    names = {}
    for name in model.state_dict():
        new = name.replace("model.language_model.", "model.")
        new = new.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        new = new.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
        names[name] = new.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")
    return {
        new: model.state_dict()[name]
        for name, new in names.items()
        if tower_inside or not name.startswith("model.vision_tower.")
    }


def save_authors_checkpoint(
    folder, model, tower_inside=True, suffix=".bin", num_shards=1, weights=None, without=(), **config
):
    """A checkpoint as the authors' code writes it. `config` replaces fields of config.json, `weights` weights."""
    folder.mkdir()
    text_config = model.config.text_config.to_dict()
    fields = {
        **{name: text_config[name] for name in TEXT_SIZES},
        "num_key_value_heads": text_config["num_key_value_heads"],
        "vocab_size": text_config["vocab_size"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "mm_hidden_size": 16,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "image_aspect_ratio": "pad",
        **config,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    state_dict = {**authors_state_dict(model, tower_inside), **(weights or {})}
    save_weights(
        folder, {name: value for name, value in state_dict.items() if name not in without}, suffix, num_shards
    )
    return folder


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def llava():
    """The model behind the authors' checkpoints."""
    return make_llava()


@pytest.fixture(scope="module")
def clip(tmp_path_factory, llava):
    """The vision tower of `llava` as a CLIP model of its own."""
    folder = tmp_path_factory.mktemp("towers") / "clip"
    tower = CLIPVisionModel(CLIP)
    tower.load_state_dict(llava.model.vision_tower.state_dict())
    tower.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path, llava):
    """A checkpoint of the authors' format, without a tokenizer."""
    return save_authors_checkpoint(tmp_path / "source", llava)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


def random_text(vocab_size, length=7):
    return torch.randint(3, vocab_size, (length,), generator=torch.Generator().manual_seed(1)).tolist()


def random_pixels(size=28):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(2))


# The authors' format


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory):
    target = tmp_path_factory.mktemp("golden") / "converted"
    convert_checkpoint(
        GOLDEN / "original_checkpoint",
        target,
        vision_tower=GOLDEN / "clip-vit-tiny",
        vision_prefix_token_ids=[1],
        vision_suffix_token_ids=[13],
    )
    return VoCoLlamaForConditionalGeneration.from_pretrained(target)


@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("*.npz")))
def test_converted_golden_checkpoint_has_the_logits_of_the_authors(golden_model, case):
    golden = np.load(GOLDEN / f"{case}.npz")
    num_voco_tokens = int(golden["num_voco_tokens"])
    rows = []
    for input_ids in golden["input_ids"]:
        text_start = np.flatnonzero(input_ids == golden_model.config.voco_token_id)[-1] + 1
        rows.append([golden_model.config.voco_token_id] * num_voco_tokens + input_ids[text_start:].tolist())
    length = max(map(len, rows))
    with torch.no_grad():
        outputs = golden_model(
            input_ids=torch.tensor([[0] * (length - len(row)) + row for row in rows]),
            attention_mask=torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
            pixel_values=torch.from_numpy(golden["pixel_values"]),
            num_voco_tokens=num_voco_tokens,
        )
    logits = outputs.logits[..., torch.from_numpy(golden["logit_columns"])]
    expected = torch.from_numpy(golden["logits"])
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, -len(row) :], expected[i, -len(row) :], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("suffix", "num_shards", "tower_inside"),
    [(".bin", 1, True), (".bin", 3, False), (".safetensors", 1, False), (".safetensors", 2, True)],
)
def test_authors_layouts(tmp_path, target, llava, clip, suffix, num_shards, tower_inside):
    source = save_authors_checkpoint(tmp_path / "source", llava, tower_inside, suffix, num_shards)
    report = convert_checkpoint(source, target, vision_tower=clip)

    model = VoCoLlamaForConditionalGeneration.from_pretrained(target)
    assert model.state_dict().keys() == llava.state_dict().keys()
    for name, weight in llava.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)
    config = model.config
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert (config.projector_hidden_act, config.image_seq_length) == ("gelu", NUM_IMAGE_TOKENS)
    assert config.text_config.rope_parameters["rope_theta"] == 500000.0
    assert config.text_config.rms_norm_eps == 1e-5
    assert config.vision_config.num_attention_heads == CLIP.num_attention_heads
    assert (config.voco_token_id, config.num_voco_tokens) == (32000, 1)
    assert (config.vision_prefix_token_ids, config.vision_suffix_token_ids) == ([1], [13])

    assert (report.source, report.target, report.source_format) == (source, target, "llava_llama")
    assert (report.voco_token_id, report.voco_token_origin) == (32000, "the last row of the vocabulary")
    assert (report.vision_prefix_token_ids, report.vision_suffix_token_ids) == ([1], [13])
    assert (report.dtype, report.num_parameters) == ("float32", model.num_parameters())
    assert report.vision_tower == f"weights from {source if tower_inside else clip}, configuration from {clip}"
    assert not report.processor_written
    assert any("vision_suffix_token_ids is [13]" in warning for warning in report.warnings)
    assert any("no tokenizer" in warning for warning in report.warnings)


def test_vision_tower_may_be_a_folder_that_the_checkpoint_names(tmp_path, target, llava, clip):
    source = save_authors_checkpoint(tmp_path / "source", llava, False, mm_vision_tower=str(clip))
    assert str(clip) in convert_checkpoint(source, target).vision_tower
    model = VoCoLlamaForConditionalGeneration.from_pretrained(target)
    tower = llava.model.vision_tower.embeddings.patch_embedding.weight
    torch.testing.assert_close(model.model.vision_tower.embeddings.patch_embedding.weight, tower)


def test_weights_of_the_checkpoint_go_before_those_of_the_vision_tower(tmp_path, target, llava, clip):
    name = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"
    finetuned = llava.model.vision_tower.pre_layrnorm.weight.detach() + 1
    source = save_authors_checkpoint(tmp_path / "source", llava, weights={name: finetuned})
    convert_checkpoint(source, target, vision_tower=clip)
    model = VoCoLlamaForConditionalGeneration.from_pretrained(target)
    torch.testing.assert_close(model.model.vision_tower.pre_layrnorm.weight, finetuned)


def test_buffers_that_old_checkpoints_hold_are_left_out(tmp_path, target, llava, clip):
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    source = save_authors_checkpoint(tmp_path / "source", llava, weights=buffers)
    convert_checkpoint(source, target, vision_tower=clip)
    assert not any("inv_freq" in name or "position_ids" in name for name in load_file(target / "model.safetensors"))


def test_cls_patch_selects_all_vision_tokens(tmp_path, target, llava, clip):
    source = save_authors_checkpoint(tmp_path / "source", llava, mm_vision_select_feature="cls_patch")
    convert_checkpoint(source, target, vision_tower=clip)
    config = VoCoLlamaForConditionalGeneration.from_pretrained(target).config
    assert (config.vision_feature_select_strategy, config.image_seq_length) == ("full", NUM_IMAGE_TOKENS + 1)


@pytest.mark.parametrize("given", ["in the source", "as an argument"])
def test_authors_checkpoint_with_a_tokenizer_that_knows_voco(tmp_path, target, clip, given, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = make_tokenizer("<voco>")
    model = make_llava(LlamaConfig(vocab_size=len(tokenizer), **TEXT_SIZES))
    source = save_authors_checkpoint(tmp_path / "source", model)
    tokenizer.save_pretrained(source if given == "in the source" else tmp_path / "tokenizer")
    argument = None if given == "in the source" else tmp_path / "tokenizer"
    report = convert_checkpoint(source, target, tokenizer=argument, vision_tower=clip, num_voco_tokens=2)

    assert (report.voco_token_id, report.voco_token_origin) == (len(tokenizer) - 1, "the tokenizer")
    assert (report.vision_prefix_token_ids, report.vision_suffix_token_ids) == ([1], [NEWLINE_ID])
    assert (report.num_voco_tokens, report.processor_written, report.warnings) == (2, True, [])
    assert "llava_llama" not in caplog.text
    processor = VoCoLlamaProcessor.from_pretrained(target)
    assert processor.num_voco_tokens == 2
    inputs = processor(images=Image.new("RGB", (40, 30)), text="<image>\nhi", return_tensors="pt")
    assert inputs.input_ids.tolist() == [[report.voco_token_id] * 2 + tokenizer("\nhi").input_ids[1:]]
    converted = VoCoLlamaForConditionalGeneration.from_pretrained(target)
    assert converted.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs.input_ids.shape[1] + 2


def test_sentencepiece_tokenizer_as_the_authors_write_it(tmp_path, target, clip):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("what is this image of a quick brown fox\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model = make_llava(LlamaConfig(vocab_size=301, **TEXT_SIZES))
    source = save_authors_checkpoint(tmp_path / "source", model)
    (tmp_path / "tokenizer.model").rename(source / "tokenizer.model")
    special = {"content": "<voco>", "special": True, **dict.fromkeys(["lstrip", "normalized", "rstrip"], False)}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "added_tokens_decoder": {"300": {**special, "single_word": False}},
        "additional_special_tokens": ["<voco>"],
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    report = convert_checkpoint(source, target, vision_tower=clip)

    assert (report.voco_token_id, report.voco_token_origin, report.processor_written) == (300, "the tokenizer", True)
    # Llama's tokenizer puts a space in front of a text, also of one that starts with a newline
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    assert report.vision_suffix_token_ids == pieces.piece_to_id(["▁", "<0x0A>"])
    inputs = VoCoLlamaProcessor.from_pretrained(target)(text="what is this")
    assert inputs.input_ids == [[1, *pieces.encode("what is this")]]


def test_voco_is_added_to_the_tokenizer_of_llama(tmp_path, target, source, clip):
    make_llama_sized_tokenizer().save_pretrained(source)
    report = convert_checkpoint(source, target, vision_tower=clip)
    assert (report.voco_token_id, report.voco_token_origin) == (32000, "the last row of the vocabulary")
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer("w5 <voco><voco> w6", add_special_tokens=False).input_ids == [5, 32000, 32000, 6]
    assert tokenizer.decode([5, 32000, 6], skip_special_tokens=True) == "w5 w6"
    # This tokenizer splits at white space, so a newline is no token
    assert report.vision_suffix_token_ids == []
    assert any("drops newlines" in warning for warning in report.warnings)


@pytest.mark.parametrize(("aspect_ratio", "padded"), [("pad", True), ("square", False), (None, False)])
def test_images_are_prepared_as_the_authors_do(tmp_path, target, source, clip, aspect_ratio, padded):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "image_aspect_ratio": aspect_ratio}))
    make_llama_sized_tokenizer().save_pretrained(source)
    convert_checkpoint(source, target, vision_tower=clip)

    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if padded:
        # expand2square of the authors' code
        square = Image.new("RGB", (50, 50), tuple(int(x * 255) for x in image_processor().image_mean))
        square.paste(image, (0, 10))
    else:
        square = image
    expected = AutoImageProcessor.from_pretrained(clip)(square, return_tensors="pt").pixel_values
    processor = VoCoLlamaProcessor.from_pretrained(target)
    found = processor(images=image, text="<image>", return_tensors="pt").pixel_values
    torch.testing.assert_close(found, expected)


def test_image_processor_of_the_source_serves_where_the_vision_tower_has_none(tmp_path, target, source):
    make_llama_sized_tokenizer().save_pretrained(source)
    image_processor().save_pretrained(source)
    CLIP.save_pretrained(tmp_path / "tower")
    assert convert_checkpoint(source, target, vision_tower=tmp_path / "tower").processor_written


def test_chat_template_of_the_authors(tmp_path, target, source, clip):
    make_llama_sized_tokenizer().save_pretrained(source)
    convert_checkpoint(source, target, vision_tower=clip)
    processor = VoCoLlamaProcessor.from_pretrained(target)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Sure?"},
    ]
    # conv_templates["vicuna_v1"] with the authors' system prompt, behind f"<image>\n{'<voco>' * k}\n"
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<image>\nA chat between a curious user and an artificial intelligence assistant of the image. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: What is this? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    )
    messages = [{"role": "system", "content": "Be brief."}, *messages[:2]]
    assert processor.apply_chat_template(messages) == ("<image>\nBe brief. USER: What is this? ASSISTANT: A cat.</s>")


def test_chat_template_of_the_tokenizer_goes_before_that_of_the_authors(tmp_path, target, source, clip):
    tokenizer = make_llama_sized_tokenizer()
    tokenizer.chat_template = "{{ 'kept' }}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    convert_checkpoint(source, target, vision_tower=clip, tokenizer=tmp_path / "tokenizer")
    assert VoCoLlamaProcessor.from_pretrained(target).chat_template == "{{ 'kept' }}"


# llava-hf


def save_llava_checkpoint(folder, model, tokenizer=None, suffix=None, num_shards=1):
    """A llava-hf checkpoint: as transformers saves it, or (with a suffix) under the names of modules."""
    model.save_pretrained(folder)
    if suffix is not None:
        (folder / "model.safetensors").unlink()
        state_dict = model.state_dict()
        if model.config.tie_word_embeddings:
            del state_dict["lm_head.weight"]
        save_weights(folder, state_dict, suffix, num_shards)
    if tokenizer is not None:
        image_processor().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def llama(vocab_size, **kwargs):
    return LlamaConfig(vocab_size=vocab_size, **TEXT_SIZES, **kwargs)


# Language model, vision tower, arguments of LlavaConfig, suffix and number of weight files, id of `<voco>` and size of
# the vocabulary afterwards. The tokenizer has 260 tokens.
LLAVA_CASES = {
    "padded vocabulary": (llama(272), CLIP, {}, None, 1, 260, 272),
    "full vocabulary": (llama(260), CLIP, {}, None, 1, 260, 261),
    "tied embeddings": (llama(260, tie_word_embeddings=True), CLIP, {}, None, 1, 260, 261),
    "tied embeddings, padded": (llama(264), CLIP, {"tie_word_embeddings": True}, ".safetensors", 1, 260, 264),
    "mistral, GQA, bin shards": (
        MistralConfig(vocab_size=260, num_key_value_heads=2, sliding_window=None, **TEXT_SIZES),
        CLIP,
        {"vision_feature_layer": -1},
        ".bin",
        2,
        260,
        261,
    ),
    "qwen2, siglip, shards": (
        Qwen2Config(vocab_size=264, num_key_value_heads=1, **TEXT_SIZES),
        SIGLIP,
        {"vision_feature_select_strategy": "full", "projector_hidden_act": "relu", "multimodal_projector_bias": False},
        ".safetensors",
        2,
        260,
        264,
    ),
}


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize("case", LLAVA_CASES)
def test_converted_llava_has_the_logits_of_the_original(tmp_path, target, case, with_tokenizer):
    text_config, vision_config, arguments, suffix, num_shards, voco_token_id, vocab_size = LLAVA_CASES[case]
    old_vocab_size = text_config.vocab_size
    llava = make_llava(text_config, vision_config, image_token_index=259, **arguments)
    tokenizer = make_tokenizer("<image>") if with_tokenizer else None
    source = save_llava_checkpoint(tmp_path / "source", llava, tokenizer, suffix, num_shards)
    if not with_tokenizer:
        voco_token_id, vocab_size = old_vocab_size, old_vocab_size + 1
    report = convert_checkpoint(source, target, vision_prefix_token_ids=[1])

    model = VoCoLlamaForConditionalGeneration.from_pretrained(target)
    added = voco_token_id == old_vocab_size
    origin = "a row added to the vocabulary" if added else "a free row of the padded vocabulary"
    assert (report.voco_token_id, report.voco_token_origin) == (voco_token_id, origin)
    assert (model.config.voco_token_id, model.config.text_config.vocab_size) == (voco_token_id, vocab_size)
    assert model.get_input_embeddings().weight.shape[0] == vocab_size
    assert model.config.image_seq_length == NUM_IMAGE_TOKENS
    assert report.source_format == "llava" and report.text_model == text_config.model_type
    assert report.processor_written == with_tokenizer
    if with_tokenizer:
        tokenizer = VoCoLlamaProcessor.from_pretrained(target).tokenizer
        assert tokenizer.convert_tokens_to_ids("<voco>") == voco_token_id

    text, pixel_values = random_text(259), random_pixels()
    with torch.no_grad():
        expected = llava(
            input_ids=torch.tensor([[1, *[259] * NUM_IMAGE_TOKENS, *text]]), pixel_values=pixel_values
        ).logits
        found = model(
            input_ids=torch.tensor([[voco_token_id, *text]]),
            pixel_values=pixel_values,
            num_voco_tokens=1,
            attention_mode="uncompressed",
        ).logits
    logits = found[:, -len(text) :]
    columns = [i for i in range(old_vocab_size) if i != voco_token_id]
    torch.testing.assert_close(logits[..., columns], expected[:, -len(text) :, columns], rtol=0, atol=1e-4)
    # The logit of <voco> is the mean of those of the tokens below it
    mean = logits[..., :voco_token_id].mean(-1)
    torch.testing.assert_close(logits[..., voco_token_id], mean, rtol=0, atol=1e-4)
    embeddings = model.get_input_embeddings().weight
    torch.testing.assert_close(embeddings[voco_token_id], embeddings[:voco_token_id].mean(0))


@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_llava_names_old_and_new(tmp_path, target, layout):
    llava = make_llava(llama(260))
    source = save_llava_checkpoint(tmp_path / "source", llava)
    if layout == "model.language_model.":
        save_weights(source, llava.state_dict())
    assert any(name.startswith(layout) for name in load_file(source / "model.safetensors"))
    convert_checkpoint(source, target)
    model = VoCoLlamaForConditionalGeneration.from_pretrained(target)
    for name, weight in llava.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name][: weight.shape[0]], weight, rtol=0, atol=0)


def test_llava_tokenizer_that_knows_voco_keeps_its_row(tmp_path, target):
    tokenizer = make_tokenizer("<image>", "<voco>")
    llava = make_llava(llama(264), image_token_index=259)
    source = save_llava_checkpoint(tmp_path / "source", llava, tokenizer)
    report = convert_checkpoint(source, target)
    assert (report.voco_token_id, report.voco_token_origin) == (260, "the tokenizer")
    weights = load_file(target / "model.safetensors")
    torch.testing.assert_close(weights[EMBEDDING], llava.get_input_embeddings().weight.detach(), rtol=0, atol=0)
    torch.testing.assert_close(weights["lm_head.weight"], llava.lm_head.weight.detach(), rtol=0, atol=0)


def test_llava_processor_files_are_taken_over(tmp_path, target):
    source = save_llava_checkpoint(tmp_path / "source", make_llava(llama(264), image_token_index=259))
    tokenizer = make_tokenizer("<img>")
    template = "{% for message in messages %}{{ '<img>\n' + message['role'] }}{% endfor %}"
    LlavaProcessor(
        image_processor(), tokenizer, 14, "default", chat_template=template, image_token="<img>"
    ).save_pretrained(source)
    convert_checkpoint(source, target)
    processor = VoCoLlamaProcessor.from_pretrained(target)
    assert processor.apply_chat_template([{"role": "user", "content": "hi"}]) == "<image>\nuser"
    assert dict(processor.image_processor.crop_size) == {"height": 28, "width": 28}


@pytest.mark.parametrize("place", ["chat_template.json", "chat_template.jinja"])
def test_chat_template_is_kept(tmp_path, target, place):
    tokenizer = make_tokenizer("<image>")
    source = save_llava_checkpoint(tmp_path / "source", make_llava(llama(264), image_token_index=259), tokenizer)
    content = "{{ 'kept' }}" if place.endswith("jinja") else json.dumps({"chat_template": "{{ 'kept' }}"})
    (source / place).write_text(content)
    convert_checkpoint(source, target)
    assert VoCoLlamaProcessor.from_pretrained(target).chat_template == "{{ 'kept' }}"


def test_image_processor_is_that_of_the_vision_tower_given(tmp_path, target, clip):
    tokenizer = make_tokenizer("<image>")
    source = save_llava_checkpoint(tmp_path / "source", make_llava(llama(264), image_token_index=259), tokenizer)
    image_processor(20).save_pretrained(source)
    convert_checkpoint(source, target, vision_tower=clip)
    assert dict(VoCoLlamaProcessor.from_pretrained(target).image_processor.crop_size) == {"height": 28, "width": 28}


def test_prefix_is_empty_for_a_tokenizer_without_bos(tmp_path, target):
    tokenizer = make_tokenizer("<image>", bos_token=None)
    source = save_llava_checkpoint(tmp_path / "source", make_llava(llama(264), image_token_index=259), tokenizer)
    assert convert_checkpoint(source, target).vision_prefix_token_ids == []


# Both


def test_arguments_go_before_what_is_found(tmp_path, target):
    tokenizer = make_tokenizer("<image>")
    source = save_llava_checkpoint(tmp_path / "source", make_llava(llama(264), image_token_index=259), tokenizer)
    report = convert_checkpoint(
        source, target, vision_prefix_token_ids=[], vision_suffix_token_ids=[5, 6], num_voco_tokens=3, dtype="float16"
    )
    config = VoCoLlamaForConditionalGeneration.from_pretrained(target).config
    assert (config.vision_prefix_token_ids, config.vision_suffix_token_ids) == ([], [5, 6])
    assert (report.vision_prefix_token_ids, report.vision_suffix_token_ids) == ([], [5, 6])
    assert (config.num_voco_tokens, report.num_voco_tokens) == (3, 3)
    assert VoCoLlamaProcessor.from_pretrained(target).num_voco_tokens == 3
    assert (report.dtype, config.dtype, config.text_config.dtype) == ("float16", torch.float16, torch.float16)
    assert {weight.dtype for weight in load_file(target / "model.safetensors").values()} == {torch.float16}


@pytest.mark.parametrize("source_format", ["llava_llama", "llava"])
def test_dtype_of_the_weights_is_kept(tmp_path, target, llava, clip, source_format):
    # Whatever config.json says, and whatever the vision tower has
    if source_format == "llava_llama":
        half = {name: weight.bfloat16() for name, weight in authors_state_dict(llava, tower_inside=False).items()}
        source = save_authors_checkpoint(tmp_path / "source", llava, False, weights=half, torch_dtype="float32")
    else:
        source = save_llava_checkpoint(tmp_path / "source", llava)
        weights = llava.state_dict()
        save_weights(source, {name: w if "vision_tower" in name else w.bfloat16() for name, w in weights.items()})
        assert json.loads((source / "config.json").read_text())["dtype"] == "float32"
    assert convert_checkpoint(source, target, vision_tower=clip).dtype == "bfloat16"
    assert {weight.dtype for weight in load_file(target / "model.safetensors").values()} == {torch.bfloat16}


def test_tokenizer_is_kept_where_there_is_no_image_processor(tmp_path, target):
    source = save_llava_checkpoint(tmp_path / "source", make_llava(llama(264), image_token_index=259))
    make_tokenizer("<image>").save_pretrained(source)
    report = convert_checkpoint(source, target)
    assert not report.processor_written
    assert any("no image processor" in warning for warning in report.warnings)
    assert AutoTokenizer.from_pretrained(target).convert_tokens_to_ids("<voco>") == 260


def test_generation_config_is_kept(source, target, clip):
    # Vicuna's, which transformers would not write anew: temperature without do_sample
    content = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6}
    (source / "generation_config.json").write_text(json.dumps(content))
    convert_checkpoint(source, target, vision_tower=clip)
    converted = GenerationConfig.from_pretrained(target).to_dict()
    assert {name: converted[name] for name in content} == content


def test_empty_target_and_missing_parents(source, tmp_path, clip):
    (tmp_path / "empty").mkdir()
    convert_checkpoint(source, tmp_path / "empty", vision_tower=clip)
    convert_checkpoint(str(source), str(tmp_path / "new" / "folder"), vision_tower=str(clip))
    for target in (tmp_path / "empty", tmp_path / "new" / "folder"):
        assert {"config.json", "generation_config.json", "model.safetensors"} <= {
            file.name for file in target.iterdir()
        }
        assert target.stat().st_mode == source.stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"source", "empty", "new"}


# What cannot be converted


def edit_config(**fields):
    """Replaces fields of config.json; None removes one."""

    def edit(folder):
        config = {**json.loads((folder / "config.json").read_text()), **fields}
        config = {name: value for name, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def write_file(name, content):
    return lambda folder: (folder / name).write_text(content)


def edit_weights(**weights):
    """Replaces weights of pytorch_model.bin; None removes one."""

    def edit(folder):
        state_dict = {**torch.load(folder / "pytorch_model.bin"), **weights}
        state_dict = {name: weight for name, weight in state_dict.items() if weight is not None}
        torch.save(state_dict, folder / "pytorch_model.bin")

    return edit


def truncate(name, fraction=0.5):
    def edit(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * fraction)])

    return edit


def remove(name):
    return lambda folder: (folder / name).unlink()


def without_weights(folder):
    (folder / "pytorch_model.bin").rename(folder / "adapter_model.bin")


def as_safetensors(edit):
    def convert_and_edit(folder):
        save_file(torch.load(folder / "pytorch_model.bin"), folder / "model.safetensors")
        (folder / "pytorch_model.bin").unlink()
        edit(folder)

    return convert_and_edit


def in_shards(edit):
    def convert_and_edit(folder):
        save_weights(folder, torch.load(folder / "pytorch_model.bin"), ".bin", 2)
        (folder / "pytorch_model.bin").unlink()
        edit(folder)

    return convert_and_edit


def as_llava(**fields):
    llava = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": CLIP.to_dict(), **fields}
    return edit_config(**llava)


UNUSABLE = {
    "no config": (remove("config.json"), FileNotFoundError, "has no config.json"),
    "config is not JSON": (write_file("config.json", "{nope"), ValueError, "config.json is not a JSON file"),
    "config is a list": (write_file("config.json", "[]"), ValueError, "holds a JSON list"),
    "no model_type": (edit_config(model_type=None), ValueError, "model_type None"),
    "other model_type": (edit_config(model_type="qwen2_vl"), ValueError, "'qwen2_vl'.*'llava_llama'.*was expected"),
    "own model_type": (edit_config(model_type="voco_llama"), ValueError, "already is a voco_llama checkpoint"),
    "old llava": (edit_config(model_type="llava"), ValueError, "original layout"),
    "bad llava": (as_llava(text_config={"model_type": "nope"}), ValueError, "does not describe a Llava"),
    "bad llama": (edit_config(hidden_size="16"), ValueError, "does not describe a Llama.*hidden_size"),
    "quantized": (edit_config(quantization_config={"bits": 4}), ValueError, "is quantized"),
    "linear projector": (
        edit_config(mm_projector_type="linear"),
        ValueError,
        "mm_projector_type 'linear'.*mlp2x_gelu",
    ),
    "no projector type": (edit_config(mm_projector_type=None), ValueError, "mm_projector_type None; 'mlp2x_gelu'"),
    "list of projector types": (edit_config(mm_projector_type=[]), ValueError, r"mm_projector_type \[\]"),
    "feature": (edit_config(mm_vision_select_feature="cls"), ValueError, "'cls'; 'patch' or 'cls_patch'"),
    "layer": (edit_config(mm_vision_select_layer=None), ValueError, "mm_vision_select_layer None; an integer"),
    "anyres": (edit_config(image_aspect_ratio="anyres"), ValueError, "image_aspect_ratio 'anyres'"),
    "start and end tokens": (edit_config(mm_use_im_start_end=True), ValueError, "mm_use_im_start_end True"),
    "no <voco> row": (edit_config(vocab_size=32000), ValueError, "32001 token embeddings; 32000 were expected"),
    "dynamic rope": (edit_config(rope_scaling={"type": "dynamic", "factor": 2.0}), ValueError, "rope_type='dynamic'"),
    "no weights": (remove("pytorch_model.bin"), FileNotFoundError, "has no weights.*among config.json"),
    "adapter": (without_weights, FileNotFoundError, "has no weights.*LoRA adapter"),
    "truncated bin": (truncate("pytorch_model.bin"), ValueError, "pytorch_model.bin is damaged"),
    "empty bin": (truncate("pytorch_model.bin", 0), ValueError, "pytorch_model.bin is damaged"),
    "truncated safetensors": (
        as_safetensors(truncate("model.safetensors")),
        ValueError,
        "model.safetensors is damaged",
    ),
    "no state dict": (
        lambda folder: torch.save({"state_dict": {}}, folder / "pytorch_model.bin"),
        ValueError,
        "does not hold a state dict",
    ),
    "missing shard": (
        in_shards(remove("pytorch_model-00002-of-00002.bin")),
        FileNotFoundError,
        "lacks pytorch_model-00002-of-00002.bin",
    ),
    "bad index": (
        in_shards(write_file("pytorch_model.bin.index.json", "{}")),
        ValueError,
        "index.json does not map weights to shards",
    ),
    "missing tensor": (
        edit_weights(**{"model.layers.1.mlp.up_proj.weight": None}),
        ValueError,
        "missing: model.language_model.layers.1.mlp.up_proj.weight",
    ),
    "missing lm_head": (edit_weights(**{"lm_head.weight": None}), ValueError, "missing: lm_head.weight"),
    "missing projector": (edit_weights(**{"model.mm_projector.2.bias": None}), ValueError, "missing: .*linear_2.bias"),
    "missing embeddings": (edit_weights(**{"model.embed_tokens.weight": None}), ValueError, "has no token embeddings"),
    "unknown tensor": (
        edit_weights(**{"model.image_newline": torch.zeros(16)}),
        ValueError,
        "unknown: .*image_newline",
    ),
    "shape mismatch": (
        edit_weights(**{"model.mm_projector.0.weight": torch.zeros(16, 8)}),
        ValueError,
        r"linear_1.weight is \[16, 8\], the configuration says \[16, 16\]",
    ),
    "integer weights": (
        edit_weights(**{"model.embed_tokens.weight": torch.zeros(32001, 16, dtype=torch.int8)}),
        ValueError,
        "torch.int8 weights",
    ),
    "bare exception": (
        write_file("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE"}}'),
        ValueError,
        "tokenizer of .* cannot be loaded.*Missing vocab",
    ),
    "bad tokenizer": (
        write_file("tokenizer.json", '{"version": "1.0"}'),
        ValueError,
        "tokenizer of .* cannot be loaded",
    ),
    "bad generation config": (write_file("generation_config.json", "{nope"), ValueError, "generation_config.json"),
}


def check_refused(error, match, source, target, **kwargs):
    """Nothing is left behind by a conversion that is refused."""
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(error, match=match) as info:
        convert_checkpoint(source, target, **kwargs)
    assert type(info.value) is error
    assert sorted(target.parent.rglob("*")) == before


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_source_is_refused(source, target, clip, case):
    edit, error, match = UNUSABLE[case]
    edit(source)
    check_refused(error, match, source, target, vision_tower=clip)


def test_unusable_source_path_is_refused(tmp_path, source, target):
    check_refused(FileNotFoundError, "nowhere does not exist", tmp_path / "nowhere", target)
    check_refused(ValueError, "pytorch_model.bin is a file", source / "pytorch_model.bin", target)


def test_unusable_target_is_refused(tmp_path, source):
    check_refused(ValueError, "the same folder", source, source)
    check_refused(ValueError, "the same folder", source, source / ".." / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    check_refused(ValueError, "full already exists and is not empty", source, tmp_path / "full")
    check_refused(ValueError, "file is a file", source, tmp_path / "full" / "file")
    check_refused(ValueError, "file is a file", source, tmp_path / "full" / "file" / "below")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float32"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"num_voco_tokens": 0}, "num_voco_tokens must be at least 1"),
        ({"vision_prefix_token_ids": [32001]}, "hold .32001.; ids of 0 to 32000"),
        ({"vision_suffix_token_ids": [-1]}, "hold .-1."),
        ({"tokenizer": "nowhere"}, "tokenizer of nowhere cannot be loaded"),
        ({"vision_tower": "nowhere"}, "vision tower nowhere cannot be loaded; pass vision_tower"),
        # Offline, the tower that the checkpoint names
        ({"vision_tower": None}, "vision tower openai/clip-vit-large-patch14-336 cannot be loaded; pass vision_tower"),
    ],
)
def test_unusable_arguments_are_refused(source, target, clip, arguments, match):
    check_refused(ValueError, match, source, target, **{"vision_tower": clip, **arguments})


def test_checkpoint_that_names_no_vision_tower_is_refused(source, target):
    edit_config(mm_vision_tower=None)(source)
    check_refused(ValueError, r"does not name its vision tower \(mm_vision_tower\): pass vision_tower", source, target)


def test_vision_tower_that_does_not_fit_is_refused(tmp_path, llava, source, target, clip):
    LlamaConfig(**TEXT_SIZES).save_pretrained(tmp_path / "llama")
    check_refused(ValueError, "of type 'llama'; a CLIP model", source, target, vision_tower=tmp_path / "llama")

    CLIPVisionConfig(**{**CLIP.to_dict(), "image_size": 56}).save_pretrained(tmp_path / "larger")
    match = r"position_embedding.weight is \[5, 16\], the configuration says \[17, 16\]"
    check_refused(ValueError, match, source, target, vision_tower=tmp_path / "larger")

    weightless = save_authors_checkpoint(tmp_path / "weightless", llava, tower_inside=False)
    check_refused(ValueError, "cannot be loaded", weightless, target, vision_tower=tmp_path / "larger")
    weights = load_file(clip / "model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("class_embedding")))
    CLIP.save_pretrained(tmp_path / "torn")
    save_file(weights, tmp_path / "torn" / "model.safetensors")
    check_refused(ValueError, "torn lacks .*class_embedding", weightless, target, vision_tower=tmp_path / "torn")


def test_tokenizer_that_does_not_belong_to_the_checkpoint_is_refused(tmp_path, source, target, clip):
    make_llama_sized_tokenizer(31990).save_pretrained(tmp_path / "small")
    match = "<voco> is token 32000 of the checkpoint, but would be 31990"
    check_refused(ValueError, match, source, target, vision_tower=clip, tokenizer=tmp_path / "small")

    large = make_llama_sized_tokenizer(32005)
    large.add_tokens(["<voco>"], special_tokens=True)
    large.save_pretrained(tmp_path / "large")
    match = "<voco> is token 32005 of the tokenizer, but the checkpoint has 32001 tokens"
    check_refused(ValueError, match, source, target, vision_tower=clip, tokenizer=tmp_path / "large")

    llava = save_llava_checkpoint(tmp_path / "llava", make_llava(llama(100)), make_tokenizer())
    check_refused(ValueError, "<voco> would be token 259 .* the checkpoint has 100 tokens", llava, target)


def test_vocabulary_without_voco_is_refused(tmp_path, target, clip):
    source = save_authors_checkpoint(tmp_path / "source", make_llava(llama(300)))
    match = "vocab_size 300 and no tokenizer that knows <voco>; 32001 was expected"
    check_refused(ValueError, match, source, target, vision_tower=clip)


class Bomb:
    def __reduce__(self):
        return (print, ("code of the checkpoint was run",))


def test_code_in_a_bin_file_is_not_run(source, target, clip, capsys):
    for write in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))):
        write({"model.embed_tokens.weight": Bomb()}, source / "pytorch_model.bin")
        check_refused(ValueError, "pytorch_model.bin is damaged", source, target, vision_tower=clip)
    assert "code of the checkpoint was run" not in capsys.readouterr().out


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_writing_leaves_nothing_behind(source, target, clip, monkeypatch, error, existing):
    make_llama_sized_tokenizer().save_pretrained(source)
    if existing:
        target.mkdir()
    written = []

    def interrupt(self, folder):
        written.extend(path.name for path in folder.iterdir())
        raise error

    monkeypatch.setattr(VoCoLlamaProcessor, "save_pretrained", interrupt)
    check_refused(error, None, source, target, vision_tower=clip)
    assert "model.safetensors" in written
    assert target.exists() == existing
