import numpy as np
import pytest
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel
from rich.console import Console
from training.sft_helpers import (
    build_model,
    config,
    conversations,
    losses,
    make_trainer,
    noise_image,
    processor_and_model,
    record_inputs,
    same_weights,
)
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, TrainerCallback
from trl import SFTConfig, SFTTrainer

from voco_llama_hf import VoCoLlamaForConditionalGeneration
from voco_llama_hf.llava import as_llava
from voco_llama_hf.training import VoCoSFTConfig, VoCoSFTTrainer
from voco_llama_hf.training.elastic import draw_num_voco_tokens
from voco_llama_hf.training.sft_trainer import print_trainable_parameters


disable_progress_bars()


@pytest.mark.parametrize(
    "capability, said, expected", [("AVX2", None, False), ("AVX512", None, True), ("AVX2", True, True)]
)
def test_bfloat16_is_the_default_where_it_is_fast(tmp_path, monkeypatch, capability, said, expected):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert VoCoSFTConfig(str(tmp_path), bf16=said).bf16 is expected


@pytest.mark.parametrize("trainer_class, config_class", [(SFTTrainer, SFTConfig), (VoCoSFTTrainer, VoCoSFTConfig)])
def test_plain_trl_and_ours_train_alike(tmp_path, trainer_class, config_class):
    processor, model = processor_and_model()
    args = config(tmp_path, config_class, **({} if config_class is SFTConfig else {"freeze": []}))
    trainer = trainer_class(model, args, train_dataset=conversations(), processing_class=processor)
    trainer.train()
    assert losses(trainer) == pytest.approx(expected_losses(tmp_path), abs=1e-3)


def expected_losses(tmp_path):
    """Losses of two steps, computed without a trainer."""
    _processor, model = processor_and_model()
    trainer = make_trainer(tmp_path, freeze=[])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    found = []
    for batch in list(trainer.get_train_dataloader())[:2]:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        found.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return found


def as_prompt_completion(row):
    return {"prompt": row["messages"][:3], "completion": row["messages"][3:], "images": row["images"]}


def as_one_image(row):
    return {"messages": row["messages"], "image": row["images"][0]}


def plain_text():
    rng = np.random.default_rng(0)
    pairs = (("<image>ab", "x"), ("cd<image>", "yz"))
    return Dataset.from_list([{"prompt": p, "completion": c, "images": [noise_image(rng)]} for p, c in pairs])


@pytest.mark.parametrize(
    "dataset, options",
    [
        (conversations(4), {}),
        (conversations(4, images_per_row=(2, 0, 1)), {}),
        (conversations(4, images_per_row=(0,)), {}),
        (conversations(4).map(as_one_image, remove_columns="images"), {}),
        (conversations(4).map(as_prompt_completion, remove_columns="messages"), {"assistant_only_loss": False}),
        (
            conversations(4, images_per_row=(0, 1)).map(as_prompt_completion, remove_columns="messages"),
            {"assistant_only_loss": False},
        ),
        (plain_text(), {"assistant_only_loss": False}),
    ],
    ids=[
        "messages",
        "many images",
        "no images",
        "one image",
        "prompt and completion",
        "mixed completion",
        "plain text",
    ],
)
def test_every_format_of_data_trains(tmp_path, dataset, options):
    trainer = make_trainer(tmp_path, dataset=dataset, num_voco_tokens=[2, 1, 0], max_steps=3, **options)
    trainer.train()
    assert len(losses(trainer)) == 3 and all(0 < loss < 20 for loss in losses(trainer))


def test_voco_tokens_are_no_labels(tmp_path):
    trainer = make_trainer(tmp_path, assistant_only_loss=False, num_voco_tokens=[3])
    batch = next(iter(trainer.get_train_dataloader()))
    is_voco = batch["input_ids"] == trainer.processing_class.image_token_id
    assert is_voco.sum() == 6 and (batch["labels"][is_voco] == -100).all()
    assert (batch["labels"][~is_voco & (batch["attention_mask"] == 1)] != -100).all()


def test_elastic_steps_draw_their_number_and_evaluation_keeps_the_first(tmp_path):
    choices = [2, 1, 4, 0]
    trainer = make_trainer(tmp_path, num_voco_tokens=choices, max_steps=12, gradient_accumulation_steps=2)
    seen = []
    record_inputs(trainer.model, seen)
    trainer.train()
    drawn = [draw_num_voco_tokens(choices, 42, step) for step in range(12)]
    assert set(drawn) == set(choices)
    expected = [([max(1, k)] * 2, "uncompressed" if k == 0 else None) for k in drawn for _ in range(2)]
    assert seen == expected
    seen.clear()
    trainer.evaluate()
    assert {(tuple(counts), mode) for counts, mode in seen} == {((2,) * 4, None)}
    assert trainer.model.config.num_voco_tokens == trainer.processing_class.num_voco_tokens == 2


@pytest.mark.parametrize("distillation", [{}, {"distillation_weight": 0.5}], ids=["words", "distilled"])
@pytest.mark.parametrize(
    "accumulation, images", [(1, (1, 2)), (2, (1, 2)), (2, (1, 1, 0, 0))], ids=["one", "two", "one without images"]
)
def test_several_draws_learn_what_steps_of_each_learn(tmp_path, accumulation, images, distillation):
    """The loss and the gradient are the means of those of two trainings that draw one number each."""

    def first_step(choices, draws_per_step=1):
        found = {}
        trainer = make_trainer(
            tmp_path,
            dataset=conversations(8, images_per_row=images),
            num_voco_tokens=choices,
            train_sampling_strategy="sequential",
            draws_per_step=draws_per_step,
            two_stages=True,
            max_steps=1,
            max_grad_norm=0.0,
            gradient_accumulation_steps=accumulation,
            **distillation,
        )

        class Record(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
                found.update((name, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None)

        trainer.add_callback(Record())
        trainer.train()
        return losses(trainer)[0], found

    (few_loss, few), (many_loss, many), (loss, gradient) = first_step([1]), first_step([4]), first_step([4, 1], 2)
    assert few_loss != pytest.approx(many_loss, rel=1e-3)
    assert loss == pytest.approx((few_loss + many_loss) / 2, rel=1e-4)
    assert gradient.keys() == few.keys() == many.keys()
    for name, value in gradient.items():
        torch.testing.assert_close(value, (few[name] + many[name]) / 2, rtol=1e-3, atol=1e-5, msg=name)


def test_the_teacher_reads_a_row_once_for_all_draws(tmp_path):
    options = {"num_voco_tokens": [4, 1], "draws_per_step": 2, "two_stages": True, "distillation_weight": 0.5}
    trainer = make_trainer(tmp_path, max_steps=1, **options)
    seen = []
    record_inputs(trainer.model, seen)
    trainer.train()
    read = sorted(seen, key=lambda one: one[1] is None)
    assert [(len(counts), mode) for counts, mode in read] == [(2, "uncompressed"), (4, None)]


def test_a_collator_may_show_one_image_in_several_rows(tmp_path):
    """Its loss is that of as many equal images, with one draw and with two."""

    def first_loss(draws_per_step, shared):
        trainer = make_trainer(
            tmp_path, num_voco_tokens=[4, 1], draws_per_step=draws_per_step, two_stages=True, max_steps=1
        )
        collate = trainer.data_collator

        def show_the_first(rows):
            batch = collate(rows)
            indices = torch.zeros(len(batch["pixel_values"]), dtype=torch.long)
            if not shared:
                return {**batch, "pixel_values": batch["pixel_values"][indices]}
            return {**batch, "pixel_values": batch["pixel_values"][:1], "image_indices": indices}

        trainer.data_collator = show_the_first
        trainer.train()
        return losses(trainer)[0]

    for draws in (1, 2):
        assert first_loss(draws, shared=True) == pytest.approx(first_loss(draws, shared=False), rel=1e-4)


def test_frozen_parts_stay_and_the_others_move(tmp_path):
    _processor, before = processor_and_model()
    trainer = make_trainer(tmp_path)
    trainer.train()
    same = same_weights(before, trainer.model)
    assert {name for name in same if "vision_tower" not in name} == set()
    assert {name for name, _ in before.named_parameters() if "vision_tower" in name} == same


def test_freezing_what_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"freeze names 'vision_towers'.* language_model, multi_modal_projector"):
        make_trainer(tmp_path, freeze=["vision_towers"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_voco_tokens": [-1]}, "num_voco_tokens"),
        ({"num_voco_tokens": []}, "num_voco_tokens"),
        ({"distillation_weight": 1.5}, "distillation_weight"),
        ({"distillation_temperature": 0.0}, "distillation_temperature"),
        ({"draws_per_step": 0}, "draws_per_step must be at least 1"),
        ({"draws_per_step": 2, "num_voco_tokens": [1, 2]}, "needs two_stages"),
        ({"draws_per_step": 2, "num_voco_tokens": [2, 2, 0], "two_stages": True}, "there are 1 numbers to draw from"),
        ({"draws_per_step": 2, "two_stages": True}, "there are 0 numbers to draw from"),
        ({"two_stages": True, "gradient_checkpointing": True}, "gradient checkpointing needs long sequences"),
    ],
)
def test_bad_options_are_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_the_table_counts_what_is_trained(tmp_path):
    trainer = make_trainer(tmp_path)
    console = Console(record=True, width=100)
    print_trainable_parameters(trainer.model, console)
    table = console.export_text()
    vision = sum(p.numel() for name, p in trainer.model.named_parameters() if "vision_tower" in name)
    total = trainer.model.num_parameters()
    assert f"{total:,}" in table and f"{total - vision:,}" in table
    assert "language_model.layers" in table and "lm_head" in table


def lora(**options):
    return LoraConfig(
        **{"r": 4, "target_modules": r".*language_model.*\.(q|v)_proj", "init_lora_weights": False, **options}
    )


def direct_divergence(student, teacher, batch, temperature):
    """KL a token from full logits, in double precision."""
    scored = batch["labels"][:, 1:] != -100
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        p = teacher(**inputs, attention_mode="uncompressed").logits[:, :-1][scored].double() / temperature
        q = student(**inputs).logits[:, :-1][scored].double() / temperature
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("teacher", ["self", "adapter", "path", "llava"])
def test_the_divergence_is_that_of_the_teacher_that_reads_uncompressed(tmp_path, teacher):
    processor, model = processor_and_model()
    _, original = processor_and_model()
    other = build_model(processor, seed=1)
    options = {"teacher": teacher}
    if teacher == "path":
        other.save_pretrained(tmp_path / "teacher")
        options["teacher"] = str(tmp_path / "teacher")
    if teacher == "llava":
        as_llava(other).save_pretrained(tmp_path / "teacher")
        options["teacher"] = str(tmp_path / "teacher")
    trainer = make_trainer(
        tmp_path,
        model=model,
        peft_config=lora() if teacher == "adapter" else None,
        num_voco_tokens=[2],
        distillation_weight=0.25,
        distillation_temperature=2.0,
        max_steps=1,
        **options,
    )
    torch.manual_seed(0)
    batch = next(iter(trainer.get_train_dataloader()))
    student = trainer.model.eval()
    reference = {"self": student, "adapter": original}.get(teacher, other)
    expected = direct_divergence(student, reference, batch, 2.0)
    trainer.train()
    (nll,), (divergence,) = losses(trainer, "nll_loss"), losses(trainer, "distillation_loss")
    assert divergence == pytest.approx(expected, rel=1e-4) and divergence > 1e-3
    assert losses(trainer) == [pytest.approx(0.75 * nll + 0.25 * 4 * divergence, rel=1e-4)]


def test_the_teacher_without_adapters_has_the_logits_of_the_original_llava(tmp_path):
    from voco_llama_hf.training.distillation import read_uncompressed

    processor, original = processor_and_model()
    trainer = make_trainer(
        tmp_path, peft_config=lora(), num_voco_tokens=[2], distillation_weight=1.0, teacher="adapter"
    )
    trainer.train()
    image = noise_image(np.random.default_rng(5))
    inputs = processor(images=image, text="<image>what is it", num_voco_tokens=1, return_tensors="pt")
    reading = read_uncompressed(trainer.model, trainer.model, inputs, without_adapters=True)
    logits = reading.head(reading.hidden_states)[0, 1:]

    llava: LlavaForConditionalGeneration = as_llava(original)
    num_vision = (28 // 14) ** 2
    voco, bos = processor.image_token_id, processor.tokenizer.bos_token_id
    ids = torch.tensor([[bos, *[voco] * num_vision, *inputs["input_ids"][0, 1:].tolist()]])
    with torch.no_grad():
        expected = llava(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -len(logits) :]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_distillation_moves_the_student_towards_its_teacher(tmp_path):
    _processor, teacher = processor_and_model()
    trainer = make_trainer(
        tmp_path,
        teacher_model=teacher,
        num_voco_tokens=[4],
        distillation_weight=1.0,
        max_steps=30,
        learning_rate=3e-3,
        dataset=conversations(4),
        per_device_train_batch_size=4,
    )
    before = {name: weight.clone() for name, weight in teacher.named_parameters()}
    trainer.train()
    curve = losses(trainer, "distillation_loss")
    assert curve[-1] < 0.5 * curve[0]
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.named_parameters())


def own_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "nll_loss"),
        ({"loss_type": "dft"}, "dft_loss"),
        ({"label_smoothing_factor": 0.1}, "label_smoothed_nll_loss"),
        ({"compute_loss_func": own_loss}, "own_loss"),
    ],
    ids=["nll", "dft", "label smoothing", "own"],
)
def test_the_loss_beside_the_distillation_is_called_what_it_is(tmp_path, options, name):
    trainer = make_trainer(tmp_path, num_voco_tokens=[2], distillation_weight=0.5, max_steps=1, **options)
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "distillation_loss" in entry)
    assert {key for key in entry if key.endswith("_loss")} == {name, "distillation_loss"}
    assert entry["loss"] == pytest.approx(0.5 * entry[name] + 0.5 * entry["distillation_loss"], rel=1e-4)


def test_adapters_are_trained_further(tmp_path):
    _processor, base = processor_and_model()
    base.save_pretrained(tmp_path / "base")
    base = VoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "base")
    options = {"num_voco_tokens": [2], "max_steps": 2}
    first = make_trainer(tmp_path / "first", model=base, peft_config=lora(), **options)
    first.train()
    first.save_model()
    inputs = next(iter(first.get_eval_dataloader()))
    with torch.no_grad():
        trained = first.model.eval()(**inputs).logits
    second = make_trainer(tmp_path / "second", model=str(tmp_path / "first"), **options)
    with torch.no_grad():
        torch.testing.assert_close(second.model.eval()(**inputs).logits, trained, atol=1e-5, rtol=1e-5)
    frozen = {name for name, weight in second.model.named_parameters() if not weight.requires_grad}
    assert frozen and not any("lora_" in name or "trainable_tokens" in name for name in frozen)
    before = {name: weight.detach().clone() for name, weight in second.model.named_parameters()}
    second.train()
    changed = {name for name, weight in second.model.named_parameters() if not torch.equal(weight, before[name])}
    assert any("lora_" in name for name in changed) and any("trainable_tokens" in name for name in changed)
    assert not changed & frozen


def test_two_stages_train_as_long_sequences_do(tmp_path):
    dataset = conversations(images_per_row=(3, 1, 0))
    runs = []
    for two_stages in (False, True):
        options = {"num_voco_tokens": [2, 1, 0], "max_steps": 6, "two_stages": two_stages}
        trainer = make_trainer(tmp_path, dataset=dataset, **options)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)


def test_adapter_teacher_needs_adapters(tmp_path):
    with pytest.raises(ValueError, match="needs a model with PEFT adapters"):
        make_trainer(tmp_path, distillation_weight=0.5, teacher="adapter")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_checkpointing_accumulation_and_bf16_give_the_same_training(tmp_path, attention):
    _, plain = processor_and_model(attn_implementation=attention)
    reference = make_trainer(tmp_path / "a", model=plain, per_device_train_batch_size=4)
    reference.train()
    _, other = processor_and_model(attn_implementation=attention)
    saving = make_trainer(
        tmp_path / "b",
        model=other,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
    )
    saving.train()
    assert losses(saving) == pytest.approx(losses(reference), abs=1e-4)
    _, half = processor_and_model(attn_implementation=attention)
    rounded = make_trainer(tmp_path / "c", model=half, per_device_train_batch_size=4, bf16=True)
    rounded.train()
    assert losses(rounded) == pytest.approx(losses(reference), rel=0.05)


def test_adapters_save_load_and_merge(tmp_path):
    processor, base = processor_and_model()
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "run", model=base, peft_config=lora(), num_voco_tokens=[2], max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    inputs = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        trained = trainer.model.eval()(**inputs).logits

        fresh = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
        untrained = fresh(**inputs).logits
        voco = processor.image_token_id
        embedding_before = fresh.get_input_embeddings().weight.clone()
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
        torch.testing.assert_close(loaded(**inputs).logits, trained, atol=1e-5, rtol=1e-5)
        assert (trained - untrained).abs().max() > 1e-2

        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, trained, atol=1e-4, rtol=1e-4)
        changed = (merged.get_input_embeddings().weight != embedding_before).any(-1).nonzero().flatten()
        assert changed.tolist() == [voco]
        merged.save_pretrained(tmp_path / "merged")
        again = VoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(again(**inputs).logits, trained, atol=1e-4, rtol=1e-4)


def test_a_resumed_run_continues_the_curve(tmp_path):
    options = {"num_voco_tokens": [1, 2, 0], "max_steps": 6, "distillation_weight": 0.5}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    first = make_trainer(tmp_path / "parts", save_strategy="steps", save_steps=3, **options)
    first.train()
    second = make_trainer(tmp_path / "parts", model=build_model(processor_and_model()[0], seed=7), **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert losses(second) == pytest.approx(losses(whole), abs=1e-6)
    same = same_weights(whole.model, second.model)
    assert same == {name for name, _ in whole.model.named_parameters()}
