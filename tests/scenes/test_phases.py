import json
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from datasets import disable_progress_bars
from safetensors.torch import load_file
from scenes.recipe import RECIPE
from transformers import Trainer, TrainingArguments

from voco_llama_hf import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.scenes.building import build_model, build_processor
from voco_llama_hf.scenes.muon import MuonWithAdamW, NoBfloat16
from voco_llama_hf.scenes.phases import VISION, average_weights, common, make_trainer, train
from voco_llama_hf.scenes.provenance import claim, made_of
from voco_llama_hf.scenes.publishing import publish
from voco_llama_hf.scenes.recipe import SCENES_576, Phase
from voco_llama_hf.scenes.running import phase_options, run_phase, seconds_spent
from voco_llama_hf.scenes.still import make_scenes


disable_progress_bars()


@pytest.fixture(scope="module")
def processor():
    return build_processor(replace(RECIPE, num_train_scenes=400))


def test_a_phase_has_some_of_the_recipe_otherwise():
    phase = Phase("some", 1, 1e-3, "cosine", (1,))
    assert RECIPE.for_phase(phase) == RECIPE
    other = {"seed": 7, "batch_size": 3, "dense_share": 0.9}
    assert RECIPE.for_phase(replace(phase, **other)) == replace(RECIPE, **other)


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


def test_muon_without_bfloat16_takes_the_same_steps():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.ones(24, 16)) for _ in range(2)]
    gradient = torch.randn(24, 16)
    for weight, mode in zip(weights, (nullcontext(), NoBfloat16())):
        weight.grad = gradient.clone()
        with mode:
            torch.optim.Muon([weight], lr=1.0, weight_decay=0.0).step()
        torch.testing.assert_close(weight.grad, gradient)
    rounded, exact = (1 - weight.detach() for weight in weights)
    assert not torch.equal(rounded, exact)
    assert torch.nn.functional.cosine_similarity(rounded.flatten(), exact.flatten(), dim=0) > 0.999


def test_a_phase_has_its_own_batches_scenes_and_schedule(processor, tmp_path):
    phase = replace(RECIPE.phases[1], steps=100, decay=0.6, batch_size=3, dense_share=1.0)
    trainer = make_trainer(build_model(processor, RECIPE), processor, RECIPE, phase, tmp_path)
    trainer.create_optimizer_and_scheduler(phase.steps)
    rates = []
    for _ in range(phase.steps):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.lr_scheduler.step()
    assert [round(rates[i] / phase.learning_rate, 3) for i in (10, 20, 40, 70, 99)] == [0.5, 1, 1, 0.5, 0.001]
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape[0] == 3
    told = processor.tokenizer.batch_decode(batch["input_ids"])
    # Of five objects and more
    assert all(text.rpartition("Describe the scene.")[2].count(",") >= 4 for text in told)


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

    # Killed before its result was written, it has nothing left to learn
    done, known = trainer(4), load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert run_phase(done) == again[:-1]  # without the summary
    torch.testing.assert_close(done.model.state_dict(), known)


def names(recipe):
    return [phase.name for phase in recipe.phases]


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
    # Killed while it wrote its first checkpoint
    claim(work_dir / "voco", made_of(work_dir / "uncompressed-final", common(recipe), recipe.phases[1]))
    (work_dir / "voco" / "checkpoint-1").mkdir()
    train(recipe, work_dir, compile=False)
    assert {path.name for path in work_dir.iterdir()} == {f"{name}-final" for name in (VISION, *names(recipe))}
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
    phases = tuple(replace(phase, steps=1, batch_size=None) for phase in SCENES_576.phases)
    small = {"batch_size": 2, "vision_batch_size": 2, "num_validation_scenes": 4}
    recipe = replace(SCENES_576, phases=phases, vision_steps=1, num_test_scenes=2, num_train_scenes=8, **small)
    train(recipe, tmp_path, compile=False)
    publish(tmp_path, recipe, tmp_path / "checkpoint")
    known = VoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "vision-final").model.vision_tower
    model = VoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    for weight, other in zip(known.parameters(), model.model.vision_tower.parameters(), strict=True):
        torch.testing.assert_close(other, weight, atol=0.02, rtol=0.01)  # frozen after its own training; bfloat16
    assert "192x192" in (tmp_path / "checkpoint" / "README.md").read_text()
    results = json.loads((tmp_path / "checkpoint" / "results.json").read_text())
    assert results["recipe"]["canvas"]["side"] == 192
    assert set(results["test"]["accuracy"]) == {*(f"k={k}" for k in (1, 2, 4, 8)), "uncompressed"}
    assert (
        "videos" not in results and "videos of eight frames" not in (tmp_path / "checkpoint" / "README.md").read_text()
    )
