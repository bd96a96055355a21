import json

import pytest
import yaml
from datasets import disable_progress_bars
from huggingface_hub import ModelCard
from typer.testing import CliRunner
from video_files import make_frames, write_video

from voco_llama_cli import app
from voco_llama_cli.train import PACKAGE
from voco_llama_cli.train_script import make_parser
from voco_llama_hf import VoCoLlamaForConditionalGeneration
from voco_llama_hf.scenes.building import build_model, build_processor
from voco_llama_hf.scenes.recipe import Recipe


disable_progress_bars()
RECIPES = sorted(PACKAGE.glob("*/recipes/*.yaml"))


@pytest.fixture(scope="module")
def scenes_checkpoint(tmp_path_factory):
    """A random model of one layer that knows the words of the scenes."""
    folder = tmp_path_factory.mktemp("scenes_checkpoint")
    recipe = Recipe(phases=(), num_train_scenes=200, vision_layers=1, text_layers=1)
    processor = build_processor(recipe)
    build_model(processor, recipe).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_have_known_keys(recipe):
    data, config, model = make_parser().parse_args_and_config(["--config", str(recipe)])
    parsed = {**vars(model), **vars(config), **vars(data)}
    written = yaml.safe_load(recipe.read_text())
    assert parsed.keys() >= written.keys()
    for name in written.keys() - {"report_to"}:
        assert parsed[name] == written[name], name


def test_the_paper_recipe_has_its_hyperparameters():
    recipe = yaml.safe_load((PACKAGE / "training" / "recipes" / "paper.yaml").read_text())
    devices = 8
    batch = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * devices
    assert batch == 128 and recipe["num_train_epochs"] == 2
    assert (recipe["learning_rate"], recipe["lr_scheduler_type"], recipe["warmup_steps"]) == (2e-5, "cosine", 0.03)
    assert (recipe["weight_decay"], recipe["max_length"], recipe["freeze"]) == (0.0, 2048, ["vision_tower"])
    assert recipe["bf16"] and recipe["gradient_checkpointing"] and recipe["num_voco_tokens"] == [1]


@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")])
def test_accelerate_reads_its_configurations(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(PACKAGE / "training" / "accelerate_configs" / f"{name}.yaml"))
    assert loaded.distributed_type == kind
    assert loaded.mixed_precision == "bf16"


def test_training_on_scenes_writes_a_model(invoke, tmp_path, scenes_checkpoint):
    output = tmp_path / "trained"
    invoke(
        "train", "--config", "tiny", "--model_name_or_path", scenes_checkpoint, "--output_dir", output,
        "--num_scenes", 8, "--max_steps", 2, "--per_device_train_batch_size=4", "--num_voco_tokens", 2, 0,
    )  # fmt: skip
    before = VoCoLlamaForConditionalGeneration.from_pretrained(scenes_checkpoint)
    after = VoCoLlamaForConditionalGeneration.from_pretrained(output)
    assert after.config.num_voco_tokens == 2
    changed = [name for name, weight in after.named_parameters() if not weight.equal(before.get_parameter(name))]
    assert any("vision_tower" in name for name in changed) and any("embed_tokens" in name for name in changed)
    answer = invoke("ask", "--model", output, "examples/scene.png", "How many objects are there?")
    assert answer.exit_code == 0


def test_a_shipped_model_is_a_teacher_by_its_name(invoke, tmp_path):
    invoke(
        "train", "--config", "tiny", "--output_dir", tmp_path, "--teacher", "voco-scenes-tiny",
        "--distillation_weight", 0.5, "--num_scenes", 2, "--max_steps", 1, "--per_device_train_batch_size=2",
        "--save_strategy", "steps", "--save_steps", 1, "--logging_steps", 1,
        "--model_name_or_path", "voco-scenes-tiny",
    )  # fmt: skip
    log = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    assert any("distillation_loss" in entry for entry in log)


@pytest.fixture
def llava_data(tmp_path, monkeypatch, images):
    """Rows about an image, about a video and about neither; their files lie beside the file."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_video(tmp_path / "film.mp4", make_frames(12))

    def row(question, **files):
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "1"}], **files}

    rows = [row("<image>\nWhat?", image=images[0].name), row("<video>\nWhat?", video="film.mp4"), row("What?")]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows * 4))
    return path


@pytest.mark.parametrize("recipe", ["paper", "paper-video", "lora-24gb", "qlora-24gb"])
def test_every_recipe_starts_with_the_data_it_names(invoke, tmp_path, scenes_checkpoint, llava_data, recipe):
    more = {}
    if recipe == "paper-video":
        # torch trains under flex_attention on accelerators only
        more = {"attn_implementation": "sdpa", "num_frames": 4}
    if "lora" in recipe:
        more = {"max_steps": 1, "num_voco_tokens": 2}
    if recipe == "qlora-24gb":
        pytest.importorskip("bitsandbytes")
        # bitsandbytes repacks weights on CPUs when a teacher reads with them, and cannot train with them any more
        more["distillation_weight"] = 0
    options = {
        "config": recipe,
        "model_name_or_path": scenes_checkpoint,
        "dataset_name": llava_data,
        "output_dir": tmp_path / "out",
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 1,
        "report_to": "none",
        **more,
    }
    invoke("train", *(part for name, value in options.items() for part in (f"--{name}", value)))
    assert (tmp_path / "out" / ("adapter_model.safetensors" if "lora" in recipe else "model.safetensors")).is_file()


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "all of {data} is trained on: name other data to evaluate on with --eval_dataset_name, or hold rows out"),
        (["--eval_dataset_name", "{data}"], "all of {data} is trained on"),
        (["--eval_dataset_name", "{link}"], "all of {data} is trained on"),
        (["--dataset_train_split", "none", "--test_size", "2"], "{data} has no split 'none', it has train"),
        (
            ["--eval_dataset_name", "{other}", "--dataset_test_split", "none"],
            "{other} has no split 'none', it has test",
        ),
        (["--eval_dataset_name", "{other}", "--test_size", "2"], "evaluate either on --eval_dataset_name or on"),
        (
            ["--dataset_name", "voco-scenes", "--dataset_test_split", "train"],
            "the split 'train' of voco-scenes",
        ),
        (["--dataset_name", "voco-scenes", "--dataset_test_split", "nosuch"], "voco-scenes has no split 'nosuch'"),
        (["--test_size", "100"], "test_size"),
    ],
)
def test_nothing_is_evaluated_on_what_is_trained_on(invoke, tmp_path, scenes_checkpoint, llava_data, args, message):
    paths = {name: tmp_path / f"{name}.json" for name in ("data", "link", "other")}
    paths["link"].symlink_to(llava_data)
    paths["other"].write_bytes(llava_data.read_bytes())
    result = invoke(
        "train", "--config", "tiny", "--model_name_or_path", scenes_checkpoint, "--dataset_name", llava_data,
        "--eval_strategy", "steps", "--output_dir", tmp_path / "out", *(arg.format(**paths) for arg in args),
        exit_code=1,
    )  # fmt: skip
    assert message.format(**paths) in result.stderr
    assert not (tmp_path / "out").exists()


def test_rows_that_are_held_out_are_evaluated_on(invoke, tmp_path, scenes_checkpoint, llava_data):
    invoke(
        "train", "--config", "tiny", "--model_name_or_path", scenes_checkpoint, "--dataset_name", llava_data,
        "--test_size", 3, "--eval_strategy", "steps", "--eval_steps", 1, "--max_steps", 1, "--save_strategy", "steps",
        "--save_steps", 1, "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert any("eval_loss" in entry for entry in state["log_history"])
    (figure, *_) = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    assert (figure.dataset_type, figure.dataset_split) == ("data.json", "test")


def test_training_on_llava_data_with_adapters(invoke, tmp_path, scenes_checkpoint, images):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "1"}]
    rows = [{"image": name, "conversations": turns} for name in (images[0].name, "none.png")]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows * 4))
    output = tmp_path / "trained"
    args = (
        "train", "--config", "tiny", "--model_name_or_path", scenes_checkpoint, "--dataset_name", data,
        "--image_folder", images[0].parent, "--output_dir", output, "--max_steps", 2, "--freeze", "vision_tower",
        "--per_device_train_batch_size", 2, "--use_peft", "--lora_target_modules", "all-linear", "--lora_r", 4,
        "--distillation_weight", 0.5, "--teacher", "adapter",
    )  # fmt: skip
    invoke(*args)
    adapter = json.loads((output / "adapter_config.json").read_text())
    assert adapter["trainable_token_indices"] == {"embed_tokens": [before_voco(scenes_checkpoint)]}
    assert "vision_tower" in adapter["exclude_modules"]
    result = CliRunner().invoke(app, [*map(str, args), "--max_bad_rows", "1"])
    assert result.exit_code == 1
    assert "Error: more than 1 rows of data.json cannot be read" in result.stderr


def before_voco(checkpoint):
    return json.loads((checkpoint / "config.json").read_text())["voco_token_id"]


def test_accelerate_launches_what_its_configuration_says(invoke, tmp_path, scenes_checkpoint):
    single = tmp_path / "single.yaml"
    single.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 4\n")
    invoke(
        "train", "--config=tiny", "--accelerate_config", single, "--cpu", "--num_processes", 1,
        "--mixed_precision=no", "--model_name_or_path", scenes_checkpoint, "--num_scenes", 8, "--max_steps", 1,
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("args", "exit_code", "message"),
    [
        (
            ["--config", "none"],
            2,
            "--config takes a YAML file or one of lora-24gb, paper, paper-video, qlora-24gb, tiny, got 'none'",
        ),
        (["--config"], 2, "--config needs a value"),
        (["--accelerate_config=none"], 2, "--accelerate_config takes a YAML file or one of ddp, fsdp2, zero3"),
        (
            ["--dataset_name", "voco-scenes", "--output_dir", "a"],
            1,
            "name the model to train with --model_name_or_path",
        ),
        (["--config", "tiny", "--no_such_flag", "1"], 1, "no_such_flag"),
        (["--config", "tiny", "--max_steps", "many"], 1, "invalid int value: 'many'"),
        (["--config", "tiny", "--num_voco_tokens", "0", "-3"], 1, "num_voco_tokens"),
        (["--config", "tiny", "--dataset_name", "none.json"], 1, "no such file: none.json"),
        (["--config", "tiny", "--model_name_or_path", "none"], 2, "no such model folder: 'none'"),
        (["--config", "tiny", "--teacher", "none"], 2, "no such model folder: 'none'"),
    ],
)
def test_bad_arguments_are_one_line(invoke, args, exit_code, message):
    assert message in invoke("train", *args, exit_code=exit_code).stderr


def test_help_lists_the_flags(invoke):
    result = invoke("train", "--help")
    for flag in ("--num_voco_tokens", "--distillation_weight", "--image_folder", "--lora_r", "--max_bad_rows"):
        assert flag in result.stdout
