"""The embedding of `<voco>` is trained with adapters, however their configuration names the embeddings."""

import warnings

import pytest
import torch
from datasets import disable_progress_bars
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from training.sft_helpers import build_model, make_trainer, processor_and_model

from voco_llama_hf.training.voco_embedding import warn_if_voco_is_not_trained, with_voco_embedding


disable_progress_bars()
PATH = "model.language_model.embed_tokens"
OTHER = 40  # another token
QUERIES = r".*language_model.*\.q_proj"
TIED = {"tie_word_embeddings": True, "text": {"tie_word_embeddings": True}}


def lora(**options):
    return LoraConfig(**{"r": 4, "target_modules": QUERIES, **options})


def row(model, token):
    with torch.no_grad():
        return model.get_input_embeddings()(torch.tensor([[token]]))[0, 0].clone()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trainable_token_indices": [OTHER]},
        {"trainable_token_indices": {"embed_tokens": [OTHER]}},
        {"trainable_token_indices": {"language_model.embed_tokens": [OTHER]}},
        {"trainable_token_indices": {PATH: [OTHER]}},
        {"trainable_token_indices": {"tokens": [OTHER], PATH: [OTHER + 1]}},
        {"target_modules": ["q_proj", "embed_tokens"], "exclude_modules": ".*vision.*"},
        {"target_modules": ["q_proj", PATH], "exclude_modules": ".*vision.*"},
        {"target_modules": r".*language_model\.(embed_tokens|.*q_proj)"},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["language_model.embed_tokens"]},
        {"modules_to_save": [PATH, "lm_head"]},
        {"target_parameters": ["embed_tokens.weight"]},
        {"use_dora": True},
    ],
    ids=str,
)
def test_the_row_is_trained_saved_and_loaded(tmp_path, options):
    processor, base = processor_and_model()
    voco, others = processor.image_token_id, options.get("trainable_token_indices", [])
    before = row(base, voco)
    # A gradient, and a step, reach adapters that start as zeros
    trainer = make_trainer(tmp_path, model=base, peft_config=lora(**options), max_steps=2)
    trainer.train()
    trained = row(trainer.model.get_base_model(), voco)
    assert (trained - before).abs().max() > 1e-3
    if others:
        delta = trainer.model.get_base_model().get_input_embeddings().token_adapter
        rows = {OTHER} if isinstance(others, list) else {token for tokens in others.values() for token in tokens}
        assert set(delta.token_indices["default"]) == {voco, *rows}
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(build_model(processor), tmp_path / "adapter")
    torch.testing.assert_close(row(loaded.get_base_model(), voco), trained)
    torch.testing.assert_close(row(loaded.merge_and_unload(), voco), trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("indices", [{"embed_tokens": [OTHER]}, {PATH: [OTHER], "lm_head": [OTHER]}], ids=str)
def test_tied_embeddings_stay_tied(indices):
    processor, _ = processor_and_model()
    model = build_model(processor, **TIED)
    peft_config = with_voco_embedding(lora(trainable_token_indices=indices), model)
    adapted = get_peft_model(model, peft_config).get_base_model()
    delta = adapted.get_input_embeddings().token_adapter
    assert delta.token_indices["default"] == [OTHER, processor.image_token_id]
    with torch.no_grad():
        delta.trainable_tokens_delta["default"] += 1
    torch.testing.assert_close(adapted.get_output_embeddings().weight, adapted.get_input_embeddings().weight)


def test_the_given_configuration_stays_as_it_is():
    _, model = processor_and_model()
    given = lora(trainable_token_indices={"embed_tokens": [OTHER]})
    with_voco_embedding(given, model)
    assert given.trainable_token_indices == {"embed_tokens": [OTHER]}


def adapted(peft_config):
    return get_peft_model(processor_and_model()[1], peft_config)


def test_an_untrained_row_is_told(tmp_path):
    ia3 = IA3Config(target_modules=QUERIES, feedforward_modules=[])
    for peft_config in (lora(), lora(trainable_token_indices=[OTHER]), ia3):
        with pytest.warns(UserWarning, match="the embedding of <voco> is not trained"):
            warn_if_voco_is_not_trained(adapted(peft_config))
    voco = processor_and_model()[0].image_token_id
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the embedding of <voco>")
        warn_if_voco_is_not_trained(adapted(lora(trainable_token_indices=[voco])))
    # From the trainer: a method of PEFT that cannot train rows, a model that has its adapter already, a frozen row
    frozen = {"peft_config": lora(), "freeze": ["embed_tokens"]}
    for options in ({"peft_config": ia3}, {"model": adapted(lora())}, frozen):
        with pytest.warns(UserWarning, match="the embedding of <voco> is not trained"):
            make_trainer(tmp_path, **options)
