"""Trains `voco-scenes-tiny`, the checkpoint that the package ships, from nothing to its results on the test split."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset, Features, Image, concatenate_datasets, load_from_disk
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .. import EMBEDDED_CHECKPOINT
from ..hub import write_card
from ..modeling import VoCoLlamaConfig, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..training.sft_config import VoCoSFTConfig
from ..training.sft_trainer import VoCoSFTTrainer
from .evaluation import evaluate_scenes, plot_results, print_results
from .moving import DESCRIBE_VIDEO, WORDS, make_clips
from .muon import MuonMixin
from .phases import phase_options, run_phase
from .single_questions import SingleQuestionCollator
from .still import CANVAS, DESCRIBE, make_scenes
from .video_evaluation import TEMPORAL, VideoResults, chance, evaluate_videos, plot_video_results, print_video_results
from .vision import train_vision_tower


WORK_DIR = Path("runs") / "voco-scenes-tiny"

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part.type == 'text' -%}{{ part.text }}{%- else -%}{{ '<' + part.type + '>\\n' }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- set text = render(message.content) -%}
{%- if loop.first and not text.startswith(('<image>', '<video>')) -%}{{ bos_token }}{%- endif -%}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ text + eos_token }}{%- endgeneration -%}
{%- else -%}{{ text + '\\n' }}{%- endif -%}
{%- endfor -%}"""

DESCRIPTION = """\
A model of {millions:.1f} million parameters, trained from random weights on procedural scenes: coloured shapes and
handwritten digits on a canvas of 64x64 pixels, then on short videos of them. It answers short questions about colour,
shape, digit, place, number, existence and comparison of the objects, and about what happens in a video: which way
something moves, whether it speeds up, what comes or is hidden first. It reads k VoCo tokens an image or frame, or all
64 vision tokens. It knows nothing else."""

RESULTS = """\
Exact match in percent on the test split ({num_scenes} scenes, {num_questions} questions, each asked on its own).
Sparse scenes have 1 to 4 objects, dense ones 5 to 9. *Shuffled* asks every question about the image of another scene
of the same difficulty: what can be guessed without seeing. *Retention* is the share of what seeing adds that the VoCo
tokens keep, (exact match - shuffled) / (uncompressed - shuffled).

By family of questions: `results.json`, `results.png`. A family whose score is near its shuffled one is not learned.

![exact match by family](results.png)"""

VIDEO_RESULTS = """\
The {num_clips} videos of 8 frames are asked about with all frames, with one of them drawn at random, and with all of
them out of order. *Temporal* are the questions that nobody can answer without the order; guessing gets {chance:.0f} %.

![exact match on videos by family](videos.png)"""

TRAINING = """\
`make train-tiny` reproduces it: `voco_llama_hf.scenes.tiny` draws the scenes, trains the tokenizer, teaches the
vision tower to name what lies on each patch, and then trains the model: first on uncompressed images, then under the
VoCo mask with the number of VoCo tokens drawn anew for every step, and a share of uncompressed steps. In the end every
question sees the VoCo tokens and itself only, so that no answer can be copied from another. The last phase, the second
one of the paper, mixes short videos in, the vision tower frozen: the frames of a batch are compressed together, and
their VoCo tokens stand one behind the other. Of the weights it ends with 70 % are taken, and 30 % of those that it
started from (weight averaging, chosen on the validation split): that restores what it had cost on images.
The handwritten digits are those of scikit-learn's `load_digits`; the splits share none.

![loss and accuracy over the steps](training.png)"""

LIMITS = """\
- It knows the scenes and nothing else: photographs, text and questions in other words are beyond it.
- One token holds a sparse scene; dense ones need two to eight.
- It does not count how often something blinks in a video: that is no better than a guess.
- It was trained on single images and on videos of eight frames: answers about several images, or about much longer
  videos, are guesses."""


@dataclass(frozen=True)
class Phase:
    """
    One run of the trainer.

    Args:
        name (`str`): Folder of its checkpoints.
        steps (`int`): Number of optimizer steps.
        learning_rate (`float`): Peak learning rate.
        scheduler (`str`): Learning rate schedule after the warmup.
        num_voco_tokens (`tuple[int, ...]`): Numbers of VoCo tokens to draw from; 0 reads the uncompressed image.
        questions (`int`): Number of questions about each image.
        describe (`bool`): Whether a description of the scene ends every conversation: it asks for all that there is
            to see, which a compressed image learns to keep.
        single (`bool`): Whether every question sees the image and itself only.
        videos (`bool`): Whether every other row is a video; needs `single`.
        freeze (`tuple[str, ...]`): Modules that are not trained.
        share (`float`): Share of the weights at its end in what it leaves; the rest are those it started from, which
            keeps more of what they knew (Wortsman et al., 2022, WiSE-FT).
    """

    name: str
    steps: int
    learning_rate: float
    scheduler: str
    num_voco_tokens: tuple[int, ...]
    questions: int = 8
    describe: bool = False
    single: bool = False
    videos: bool = False
    freeze: tuple[str, ...] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained."""

    num_train_scenes: int = 300_000
    num_train_clips: int = 30_000
    num_test_clips: int = 600
    num_validation_scenes: int = 300
    num_test_scenes: int = 600
    dense_share: float = 0.3
    batch_size: int = 32
    vision_batch_size: int = 64
    vision_steps: int = 2000
    vision_layers: int = 4
    text_layers: int = 6
    seed: int = 0
    phases: tuple[Phase, ...] = field(
        default=(
            Phase("description", 400, 2e-3, "constant_with_warmup", (0,), describe=True),
            Phase("uncompressed", 1500, 7e-4, "constant_with_warmup", (0,)),
            Phase("compression", 1250, 1e-3, "constant_with_warmup", (1, 1, 2, 2, 4, 8, 0), describe=True),
            Phase("questions", 2000, 7e-4, "cosine", (1, 1, 2, 2, 4, 8, 0, 0)),
            Phase(
                "voco",
                2700,
                1e-3,
                "warmup_stable_decay",
                (1, 1, 2, 2, 4, 8, 8, 0),
                questions=12,
                describe=True,
                single=True,
            ),
            # The paper's second phase
            Phase(
                "videos",
                2100,
                1e-3,
                "warmup_stable_decay",
                (*[1] * 4, *[2] * 8, 4, 8, 0),
                describe=True,
                single=True,
                videos=True,
                freeze=("vision_tower",),
                share=0.7,
            ),
        )
    )

    @property
    def token_counts(self) -> tuple[int, ...]:
        """The numbers of VoCo tokens that the finished model was trained for."""
        return tuple(sorted(set(self.phases[-1].num_voco_tokens) - {0}))


class MuonSFTTrainer(MuonMixin, VoCoSFTTrainer):
    """[`VoCoSFTTrainer`] with [`MuonWithAdamW`]."""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of at most 512 tokens: common words are single tokens, and any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>", "<image>", "<voco>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "voco_token": "<voco>"},
        model_max_length=4096,
        padding_side="left",
    )


def build_processor(scenes: Dataset) -> VoCoLlamaProcessor:
    """Builds the processor, its tokenizer trained on the first eight questions and answers of `scenes`."""
    sample = scenes.select(range(min(len(scenes), 4000))).select_columns(["questions", "answers"])
    pairs = (pair for row in sample for pair in list(zip(row["questions"], row["answers"]))[:8])
    image_processor = CLIPImageProcessorPil(
        size={"height": CANVAS, "width": CANVAS},
        do_center_crop=False,
        # Of the scenes: their dark background is near 0
        image_mean=[0.15] * 3,
        image_std=[0.25] * 3,
    )
    tokenizer = train_tokenizer(f"{question}\n{answer}" for question, answer in pairs)
    return VoCoLlamaProcessor(image_processor, tokenizer, num_voco_tokens=1, chat_template=CHAT_TEMPLATE)


def build_model(processor: VoCoLlamaProcessor, recipe: Recipe) -> PreTrainedModel:
    """Builds the model with random weights: 64 vision tokens of 8x8 pixels, and a Llama with grouped queries."""
    tokenizer = processor.tokenizer
    vision_config = CLIPVisionConfig(
        image_size=CANVAS,
        patch_size=8,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=3,
    )
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = VoCoLlamaConfig(
        vision_config=vision_config,
        text_config=text_config,
        vision_feature_layer=-1,
        voco_token_id=tokenizer.convert_tokens_to_ids("<voco>"),
        vision_prefix_token_ids=[tokenizer.bos_token_id],
        vision_suffix_token_ids=tokenizer("\n", add_special_tokens=False).input_ids,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(recipe.seed)
    # The fused attention of torch is slow backwards on a CPU
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager", dtype=torch.float32)
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    # From CLIP's own small random start the model is slow to learn where things are
    positions.data[1:] = grid_waves(CANVAS // vision_config.patch_size, vision_config.hidden_size)
    return model


def add_words(model: PreTrainedModel, processor: VoCoLlamaProcessor, words: tuple[str, ...]) -> None:
    """Makes tokens of words that the tokenizer has not seen in its training."""
    tokens = [AddedToken(word, normalized=False, single_word=not word.startswith(" ")) for word in words]
    processor.tokenizer.add_tokens(tokens)
    model.resize_token_embeddings(len(processor.tokenizer))


def grid_waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column of a square grid, rows first: `(side * side, width)`."""
    frequencies = 20 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    return torch.cat([waves[rows], waves[columns]], dim=-1)


def conversations(scenes: Dataset, phase: Phase) -> Dataset:
    """
    What is asked and answered about each image or video, perhaps with a description behind: there it gives nothing
    away.
    """
    column = "images" if phase.videos else "image"

    def turns(rows: dict[str, list]) -> dict[str, list]:
        messages = [turns[: 2 * phase.questions] for turns in rows["messages"]]
        if phase.describe:
            for images, conversation, description in zip(rows[column], messages, rows["description"], strict=True):
                request = DESCRIBE_VIDEO if phase.videos and len(images) > 1 else DESCRIBE
                conversation += [{"role": "user", "content": request}, {"role": "assistant", "content": description}]
        return {column: rows[column], "messages": messages}

    return scenes.select_columns([column, "messages", "description"]).with_transform(turns)


def train_phase(
    model: PreTrainedModel,
    processor: VoCoLlamaProcessor,
    scenes: dict[str, Dataset],
    recipe: Recipe,
    phase: Phase,
    work_dir: Path,
    **options,
) -> list[dict]:
    """
    Trains `model` in place, from the last checkpoint of the phase where there is one; `options` are further arguments
    of [`VoCoSFTConfig`]. Returns the trainer's log.
    """
    validation = scenes["validation"].select(range(min(128, len(scenes["validation"]))))
    args = VoCoSFTConfig(
        # Half as many rows, half of which have eight images
        **phase_options(work_dir / phase.name, phase.steps, recipe.batch_size // (1 + phase.videos), recipe.seed),
        learning_rate=phase.learning_rate,
        lr_scheduler_type=phase.scheduler,
        lr_scheduler_kwargs={"num_decay_steps": phase.steps // 3} if phase.scheduler == "warmup_stable_decay" else {},
        gradient_checkpointing=False,
        num_voco_tokens=list(phase.num_voco_tokens),
        two_stages=phase.videos,
        freeze=list(phase.freeze),
        assistant_only_loss=True,
        max_length=None,
        pad_to_multiple_of=8,
        **options,
    )
    collator = SingleQuestionCollator(processor, max(1, *phase.num_voco_tokens)) if phase.single else None
    trainer = MuonSFTTrainer(
        model,
        args,
        data_collator=collator,
        train_dataset=conversations(scenes["train"], phase),
        eval_dataset=conversations(validation, phase),
        processing_class=processor,
    )
    return run_phase(trainer)


def prepare_scenes(recipe: Recipe, work_dir: Path, num_proc: int | None) -> dict[str, Dataset]:
    """Makes the splits that training reads, or loads them where an earlier run has left them."""
    splits = {"train": recipe.num_train_scenes, "validation": recipe.num_validation_scenes}
    for split, number in splits.items():
        if not (work_dir / split).exists():
            scenes = make_scenes(
                split,
                number,
                seed=recipe.seed,
                dense_share=recipe.dense_share,
                questions_per_scene=max(phase.questions for phase in recipe.phases),
                num_proc=num_proc,
            )
            scenes.save_to_disk(work_dir / f"{split}.part")
            (work_dir / f"{split}.part").rename(work_dir / split)
    return {split: load_from_disk(work_dir / split) for split in splits}


def prepare_videos(
    recipe: Recipe, work_dir: Path, scenes: dict[str, Dataset], num_proc: int | None
) -> dict[str, Dataset]:
    """Makes the splits of a phase with videos, of as many images as videos, or loads them."""
    numbers = {"train": recipe.num_train_clips, "validation": recipe.num_validation_scenes}
    for split, number in numbers.items():
        folder = work_dir / f"videos-{split}"
        if not folder.exists():
            clips = make_clips(split, number, seed=recipe.seed, num_proc=num_proc)
            columns = ["images", "messages", "description"]
            features = Features({column: clips.features[column] for column in columns})
            images = scenes[split].select(range(min(number, len(scenes[split]))))
            images = images.cast_column("image", Image(decode=False)).map(
                lambda image: {"images": [image]},
                input_columns="image",
                num_proc=num_proc,
                features=Features({**images.features, "image": Image(decode=False), "images": features["images"]}),
            )
            mixed = concatenate_datasets(
                [clips.select_columns(columns), images.select_columns(columns).cast(features)]
            )
            mixed.shuffle(recipe.seed).save_to_disk(folder.with_suffix(".part"))
            folder.with_suffix(".part").rename(folder)
    return {split: load_from_disk(work_dir / f"videos-{split}") for split in numbers}


def train(recipe: Recipe, work_dir: Path, num_proc: int | None = None, compile: bool = True) -> None:
    """
    Trains the model of a recipe, phase after phase; what an interrupted run has left in `work_dir` is kept.

    Args:
        recipe ([`Recipe`]): What to train.
        work_dir (`Path`): Folder of data, checkpoints and logs.
        num_proc (`int`, *optional*): Processes that draw scenes.
        compile (`bool`, *optional*, defaults to `True`): Whether to compile the layers, which needs a C++ compiler.
    """
    scenes = prepare_scenes(recipe, work_dir, num_proc)
    processor = build_processor(scenes["train"])
    previous = final_dir(work_dir, "vision")
    if not previous.exists():
        model = build_model(processor, recipe)
        if compile:
            compile_layers(model)
        start = time.monotonic()
        log = train_vision_tower(
            model.model.vision_tower,
            processor.image_processor,
            scenes,
            steps=recipe.vision_steps,
            batch_size=recipe.vision_batch_size,
            seed=recipe.seed,
            output_dir=work_dir / "vision",
        )
        summary = {"name": "vision", "steps": recipe.vision_steps, "seconds": time.monotonic() - start, "log": log}
        save_phase(model, processor, summary, previous)
    for phase in recipe.phases:
        final = final_dir(work_dir, phase.name)
        if not final.exists():
            # A new one each time: accelerate's mixed precision stays off for a model that it has prepared before
            model = build_model(processor, recipe)
            weights = load_weights(previous)
            model.load_state_dict(weights)
            if phase.videos:
                add_words(model, processor, WORDS)
            if compile:
                compile_layers(model, with_attention=not phase.videos)
            start = time.monotonic()
            data = prepare_videos(recipe, work_dir, scenes, num_proc) if phase.videos else scenes
            log = train_phase(model, processor, data, recipe, phase, work_dir)
            average_weights(model, weights, phase.share)
            summary = {"name": phase.name, "steps": phase.steps, "seconds": time.monotonic() - start, "log": log}
            save_phase(model, processor, summary, final)
        previous = final


def final_dir(work_dir: Path, name: str) -> Path:
    """Folder of the model, the processor and the log at the end of a phase."""
    return work_dir / f"{name}-final"


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a saved model in float32."""
    return {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}


def average_weights(model: PreTrainedModel, earlier: dict[str, torch.Tensor], share: float) -> None:
    """Weights of the model by `share`, and otherwise earlier ones; rows that they did not have stay."""
    for name, weight in model.state_dict().items():
        old = earlier[name].to(weight)
        weight[: len(old)].lerp_(old, 1 - share)


def compile_layers(model: PreTrainedModel, with_attention: bool = True) -> None:
    """
    Compiles the layers of the language model and of the vision tower in place; `with_attention=False` for passes that
    keep what attention computed in a cache, which is compiled anew for every layer.
    """
    for layer in model.model.vision_tower.encoder.layers:
        layer.compile(dynamic=True)
    for layer in model.model.language_model.layers:
        for part in (layer,) if with_attention else (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.compile(dynamic=True)


def save_phase(model: PreTrainedModel, processor: VoCoLlamaProcessor, summary: dict, final: Path) -> None:
    """Writes what a phase has left, all or nothing."""
    part = final.with_suffix(".part")
    model.save_pretrained(part)
    processor.save_pretrained(part)
    (part / "log.json").write_text(json.dumps(summary))
    part.rename(final)


def plot_training(logs: list[dict], path: Path) -> None:
    """Draws loss and validation accuracy of all phases over their steps, one behind the other."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panel = figure.subplots()
    accuracy = panel.twinx()
    start = 0
    for i, log in enumerate(logs):
        train = [(start + entry["step"], entry["loss"]) for entry in log["log"] if "loss" in entry]
        valid = [
            (start + entry["step"], 100 * entry[key])
            for entry in log["log"]
            for key in ("eval_mean_token_accuracy", "eval_patch_accuracy")
            if key in entry
        ]
        panel.plot(*zip(*train, strict=True), color=f"C{i}", label=f"{log['name']}: training loss")
        label = f"{log['name']}: validation accuracy"
        accuracy.plot(*zip(*valid, strict=True), color=f"C{i}", linestyle="--", marker=".", label=label)
        start += log["steps"]
    panel.set(xlabel="step", ylabel="loss (lines)", yscale="log")
    accuracy.set(ylabel="accuracy, % (dashed)", ylim=(0, 101))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def publish(work_dir: Path, recipe: Recipe, output_dir: Path) -> None:
    """
    Writes the checkpoint that [`train`] left in `work_dir` in bfloat16, with its results on validation and test.

    Everything is written aside first, so an interrupted call leaves an older checkpoint as it was.
    """
    finals = [final_dir(work_dir, name) for name in ("vision", *(phase.name for phase in recipe.phases))]
    trained, logs = finals[-1], [json.loads((final / "log.json").read_text()) for final in finals]
    part = output_dir.with_name(f".{output_dir.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    processor = VoCoLlamaProcessor.from_pretrained(trained)
    VoCoLlamaForConditionalGeneration.from_pretrained(trained, dtype=torch.bfloat16).save_pretrained(part)
    processor.save_pretrained(part)
    for code in part.glob("*.py"):
        code.unlink()  # this package is the code
    (part / "model.safetensors").chmod(0o644)

    # What is measured is what is shipped, in the precision that is the same everywhere
    model = VoCoLlamaForConditionalGeneration.from_pretrained(part, dtype=torch.float32).eval()
    splits = {"validation": recipe.num_validation_scenes, "test": recipe.num_test_scenes}
    results = {
        split: evaluate_scenes(
            model, processor, split, recipe.token_counts, shuffled=split == "test", limit=number, seed=recipe.seed
        )
        for split, number in splits.items()
    }
    for result in results.values():
        print_results(result)
    summary = {
        "recipe": asdict(recipe),
        "num_parameters": model.num_parameters(),
        "train_seconds": round(sum(log["seconds"] for log in logs)),
        **{split: asdict(result) for split, result in results.items()},
    }
    if recipe.phases[-1].videos:
        videos = evaluate_videos(
            model, processor, "test", recipe.token_counts, limit=recipe.num_test_clips, seed=recipe.seed
        )
        print_video_results(videos)
        plot_video_results(videos, part / "videos.png")
        summary["videos"] = asdict(videos)
    (part / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_results(results["test"], part / "results.png")
    plot_training(logs, part / "training.png")
    write_card(part, os.path.relpath(output_dir), **model_card(summary, output_dir.name))

    if output_dir.exists():
        old = output_dir.with_name(f".{output_dir.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        output_dir.rename(old)
        part.rename(output_dir)
        shutil.rmtree(old)
    else:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        part.rename(output_dir)


def model_card(summary: dict, name: str) -> dict[str, Any]:
    """What the card of the checkpoint says beyond what every card does, see [`make_card`]."""
    test = summary["test"]
    num_questions = sum(counts["all"] for counts in test["num_questions"].values())
    results_text = RESULTS.format(num_scenes=test["num_scenes"], num_questions=num_questions)
    if "videos" in summary:
        videos = VideoResults(**summary["videos"])
        results_text += "\n\n" + VIDEO_RESULTS.format(
            num_clips=videos.num_clips, chance=100 * chance(videos)[TEMPORAL]
        )
    return {
        "name": name,
        "license": "apache-2.0",
        "language": "en",
        "description": DESCRIPTION.format(millions=summary["num_parameters"] / 1e6),
        "results_text": results_text,
        "training_text": TRAINING,
        "limits": LIMITS,
    }


def main(
    output_dir: Annotated[Path, typer.Option(help="Folder of the finished checkpoint.")] = Path(EMBEDDED_CHECKPOINT),
    work_dir: Annotated[Path, typer.Option(help="Folder of data, trainer checkpoints and logs.")] = WORK_DIR,
    resume: Annotated[bool, typer.Option(help="Continue what an interrupted run has left in the work folder.")] = True,
    num_proc: Annotated[int | None, typer.Option(help="Processes that draw scenes.")] = None,
    compile: Annotated[bool, typer.Option(help="Compile the layers; needs a C++ compiler.")] = True,
) -> None:
    """Draw the scenes, train the tokenizer and the model, evaluate it and write the checkpoint."""
    recipe = Recipe()
    if not resume:
        shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True, exist_ok=True)
    train(recipe, work_dir, num_proc, compile)
    publish(work_dir, recipe, output_dir)


if __name__ == "__main__":
    typer.run(main)
