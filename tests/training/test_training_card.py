"""The card that the trainer writes at the end."""

import math

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from training.sft_helpers import losses, make_trainer, processor_and_model

from voco_llama_hf import VoCoLlamaForConditionalGeneration


def test_the_card_has_the_figures_of_the_run(tmp_path):
    trainer = make_trainer(tmp_path, num_voco_tokens=[2, 1, 0], eval_strategy="steps", eval_steps=2)
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert f"| training loss, last logged | {losses(trainer)[-1]:.4f} |" in card.text
    assert f"| evaluation loss | {losses(trainer, 'eval_loss')[-1]:.4f} |" in card.text
    assert "| VoCo tokens, drawn for every step | 2, 1, uncompressed |" in card.text
    assert "| steps | 2 |" in card.text
    assert {"trl", "sft", "voco-llama"} <= set(card.data.tags)
    assert (tmp_path / "attention.png").is_file()

    # As the script does, which knows the name of the data; what a person wrote stays
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("## Limits", "It likes noise.\n\n## Limits"))
    trainer.create_model_card(dataset_name="org/noise")
    card = ModelCard.load(path)
    assert "It likes noise." in card.text and card.data.datasets == ["org/noise"]
    figures = {figure.metric_type: figure for figure in card.data.eval_results}
    assert figures["loss"].metric_value == round(losses(trainer, "eval_loss")[-1], 4)
    assert figures["loss"].metric_args == {"num_voco_tokens": 2}


def test_what_came_to_no_number_is_no_figure(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.state.log_history = [{"eval_loss": math.nan, "eval_mean_token_accuracy": 0.5}]
    trainer.create_model_card(dataset_name="org/noise", eval_split="test")
    (figure,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert (figure.metric_type, figure.metric_value, figure.dataset_split) == ("token_accuracy", 50.0, "test")
    assert ".nan" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "name", ["/nowhere/mix.json", "data/mix.json", "data/rows.parquet", "./mix", "~/mix", "../data/mix", "a/b/c"]
)
def test_no_path_is_a_data_set_of_the_hub(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path)
    trainer.state.log_history = [{"eval_loss": 1.0}]
    trainer.create_model_card(dataset_name=name)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets is None
    assert card.data.eval_results[0].dataset_type == name.rsplit("/", 1)[-1]


def test_adapters_are_called_so(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(target_modules=["q_proj"]))
    trainer.model.base_model.model.config._name_or_path = "org/base"
    trainer.create_model_card(tags="cats")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "adapter")
    assert "| adapters | LORA |" in card.text and "cats" in card.data.tags


def test_no_card_names_a_local_path(tmp_path):
    """Neither that of the output folder nor what PEFT would leave in a checkpoint."""
    processor, model = processor_and_model()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model = VoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "base")
    output = tmp_path / "output"
    trainer = make_trainer(
        output,
        model=model,
        peft_config=LoraConfig(target_modules=r".*language_model.*\.q_proj", task_type="CAUSAL_LM"),
        num_voco_tokens=[1],
        distillation_weight=0.5,
        teacher=str(tmp_path / "base"),
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(output / "README.md")
    assert "[More Information Needed]" not in card.content and "teacher `base`" in card.text
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-text-to-text", "peft")
    assert "PeftModel.from_pretrained(base_model, model_id)" in card.text
    cards = sorted(output.rglob("README.md"))
    assert not [path for path in cards if str(tmp_path) in path.read_text()]
    assert (output / "checkpoint-2" / "adapter_model.safetensors").is_file()

    # What a person wrote stays when the adapters are saved again
    text = (output / "README.md").read_text().replace("## Limits", "It likes noise.\n\n## Limits")
    (output / "README.md").write_text(text)
    trainer.save_model()
    assert "It likes noise." in (output / "README.md").read_text()
    assert str(tmp_path) not in (output / "README.md").read_text()
