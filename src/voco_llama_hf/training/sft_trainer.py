"""Supervised fine-tuning under the VoCo mask: TRL's trainer, elastic in the number of tokens, with distillation."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer
from trl.models import prepare_deepspeed

from ..loading import find_base, load_adapters, load_processor, load_whole
from ..modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..modeling.tiled_processing_voco_llama import check_divides_images
from .checkpoints import check_checkpoint, last_checkpoint
from .collator import VoCoDataCollator
from .distillation import (
    Reading,
    bare,
    keep_head_for_backward,
    kl_divergence,
    load_teacher,
    on_last_hidden_states,
    read_uncompressed,
)
from .elastic import draw_several, first_draw, keep_voco_tokens, repeat_rows
from .model_card import without_automatic_card, write_training_card
from .sampling import EpochCallback, ModalityLengthSampler
from .sft_config import OWN_TEACHERS, VoCoSFTConfig
from .voco_embedding import warn_if_voco_is_not_trained, with_voco_embedding


if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import Sampler
    from transformers import DataCollator
    from transformers.utils.quantization_config import QuantizationConfigMixin


class VoCoSFTTrainer(SFTTrainer):
    """
    Trains a [`VoCoLlamaForConditionalGeneration`]. Data sets, arguments and behaviour are those of
    [`~trl.SFTTrainer`]; what [`VoCoSFTConfig`] adds is done here.

    With a [`~peft.LoraConfig`], the embedding of `<voco>` is trained along with the adapters.

    Args:
        model (`str`, [`VoCoLlamaForConditionalGeneration`] or [`~peft.PeftModel`]):
            Model to train, or its folder or Hub id.
        args ([`VoCoSFTConfig`], *optional*):
            Configuration.
        processing_class ([`VoCoLlamaProcessor`], *optional*):
            Processor; that of the model's folder by default.
        teacher_model ([`VoCoLlamaForConditionalGeneration`], *optional*):
            Teacher of the distillation, instead of the one that `args.teacher` names.
        kwargs:
            Those of [`~trl.SFTTrainer`].

    Raises:
        TypeError: if `args` is no [`VoCoSFTConfig`].
        ValueError: if `args.freeze` names nothing in the model, the teacher does not fit, or tiles are to have VoCo
            tokens and images are not divided.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from voco_llama_hf.training import VoCoSFTConfig, VoCoSFTTrainer

    >>> trainer = VoCoSFTTrainer(
    ...     model="path/to/converted-llava",
    ...     args=VoCoSFTConfig(num_voco_tokens=[1, 2, 4, 8, 0], distillation_weight=0.5),
    ...     train_dataset=load_dataset("trl-lib/llava-instruct-mix", split="train"),
    ... )
    >>> trainer.train()
    ```"""

    _tag_names: ClassVar[list[str]] = ["trl", "sft", "voco-llama"]
    _name = "VoCo-SFT"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: VoCoSFTConfig | None = None,
        data_collator: DataCollator | None = None,
        processing_class: VoCoLlamaProcessor | None = None,
        teacher_model: PreTrainedModel | None = None,
        quantization_config: QuantizationConfigMixin | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs,
    ):
        if args is None:
            args = VoCoSFTConfig("voco-llama-sft")
        if not isinstance(args, VoCoSFTConfig):
            raise TypeError(f"args must be a VoCoSFTConfig, got {type(args).__name__}")
        revision = dict(args.model_init_kwargs or {}).get("revision") or "main"
        name = model if isinstance(model, str) else bare(model).config._name_or_path
        if isinstance(model, str):
            model = load_student(model, args, quantization_config)
        if processing_class is None:
            processing_class = load_processor(name, revision)
        per_tile = (
            processing_class.num_voco_tokens_per_tile if isinstance(processing_class, VoCoLlamaProcessor) else None
        )
        # What was trained for tiles is trained on so
        if per_tile is not None and args.choices is None and data_collator is None:
            args.num_voco_tokens_per_tile = [per_tile]
            args.check_tiles()
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            processing_class=processing_class,
            peft_config=None if peft_config is None else with_voco_embedding(peft_config, bare(model)),
            **kwargs,
        )
        self.add_callback(EpochCallback())
        freeze(self.model, args.freeze)
        # Where DeepSpeed shards the weights, they are no tensors yet that could be read
        if isinstance(self.model, PeftModel) and not is_deepspeed_zero3_enabled():
            warn_if_voco_is_not_trained(self.model)
        if args.num_voco_tokens_per_tile is not None:
            check_divides_images(self.processing_class.image_processor)
            if data_collator is not None:
                raise ValueError("num_voco_tokens_per_tile needs this trainer's data collator, which divides images")
            # What is trained says of itself how it is to be asked
            self.processing_class.num_voco_tokens_per_tile = args.num_voco_tokens_per_tile[0]
        elif args.num_voco_tokens is not None:
            self.processing_class.num_voco_tokens_per_tile = None
            if (first := args.num_voco_tokens[0]) > 0:
                self.processing_class.num_voco_tokens = bare(self.model).config.num_voco_tokens = first
        if data_collator is None and self._is_vision_dataset:
            self.data_collator = self._widest_collator(self.data_collator)
        self.teacher_model = self._prepare_teacher(teacher_model) if args.distillation_weight > 0 else None
        if self.accelerator.is_main_process:
            print_trainable_parameters(self.model)

    @property
    def _is_distributed(self) -> bool:
        """Whether there are other processes, which may wait until this one runs the same modules."""
        return self.accelerator.num_processes > 1

    def _widest_collator(self, collator: VoCoDataCollator) -> VoCoDataCollator:
        """A collator that makes as many VoCo tokens as any step may ask for."""
        options: dict[str, Any] = {field.name: getattr(collator, field.name) for field in fields(collator)}
        processor = options["processor"] = copy.copy(self.processing_class)
        if self.args.num_voco_tokens is not None:
            processor.num_voco_tokens = max(1, *self.args.num_voco_tokens)
        if self.args.num_voco_tokens_per_tile is not None:
            processor.num_voco_tokens_per_tile = max(self.args.num_voco_tokens_per_tile)
        return VoCoDataCollator(**options, always_images=self._is_distributed)

    # Private, but what trainers of other data override since LLaVA's own
    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        step_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ModalityLengthSampler(self.train_dataset, step_size, seed)

    # Private: a checkpoint is told by the file that follows, which must not be there before every process is done
    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> Any:
        """
        See [`~transformers.Trainer.train`]; checkpoints that were not written to their end are skipped.

        Raises:
            ValueError: if there is no whole checkpoint to resume from.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no whole checkpoint in {self.args.output_dir}")
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def end(self) -> None:
        """See [`~transformers.Trainer.end`]."""
        # DistributedDataParallel must not be the last to hold the process group: it lets go of it under Python's lock,
        # for which a thread may wait that the group waits for
        self.model_wrapped = self.model  # type: ignore[assignment]
        self.accelerator.free_memory()
        super().end()

    def _prepare_teacher(self, teacher: PreTrainedModel | None) -> torch.nn.Module | None:
        """The teacher as a model of its own, or `None` where the student is."""
        if teacher is None:
            if self.args.teacher == "adapter" and not isinstance(self.model, PeftModel):
                raise ValueError('teacher="adapter" needs a model with PEFT adapters: pass a peft_config')
            if self.args.teacher in OWN_TEACHERS:
                return None
            teacher = load_teacher(self.args.teacher, bare(self.model).config, dtype=bare(self.model).dtype)
        teacher.requires_grad_(False)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(super()._prepare_inputs(inputs))
        choices = self.args.choices
        # Without a gradient many images are compressed in several passes, of which every process has its own number
        if self.args.two_stages and "num_voco_tokens" in inputs and (self.model.training or not self._is_distributed):
            inputs["two_stages"] = True
        if choices is None or "num_voco_tokens" not in inputs:
            return inputs
        drawn = choices[:1]
        if self.model.training:
            drawn = draw_several(choices, self.args.seed, self.state.global_step, self.args.draws_per_step)
        ids = bare(self.model).config.voco_token_id, self._tokenizer.pad_token_id
        if len(drawn) > 1:
            return repeat_rows(inputs, drawn, *ids)
        inputs = keep_voco_tokens(inputs, max(1, *drawn), *ids)
        if drawn == [0]:
            inputs["attention_mode"] = "uncompressed"
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        num_draws = inputs.pop("num_draws", 1)
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch * num_draws  # counted before rows were repeated
        # A model teaches itself nothing about what it reads uncompressed anyway
        is_own_reading = inputs.get("attention_mode") == "uncompressed" and self.args.teacher == "self"
        if self.args.distillation_weight == 0 or (is_own_reading and self.teacher_model is None):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_draws == 1:
            teacher = self._read_as_teacher(model, inputs)
        else:
            teacher = self._read_as_teacher(model, first_draw(inputs, num_draws)).repeat(num_draws, inputs["labels"])
        student = bare(self.accelerator.unwrap_model(model))
        sums: list[torch.Tensor] = []

        def compare(hidden_states: torch.Tensor) -> None:
            reading = Reading(hidden_states, student.get_output_embeddings())
            sums.append(kl_divergence(reading, teacher, inputs["labels"], self.args.distillation_temperature))

        keep_head_for_backward(student)
        with on_last_hidden_states(student, compare):
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        own_loss = result[0] if return_outputs else result
        num_scored = (inputs["labels"][:, 1:] != -100).sum()
        scale = self._scale(num_scored, num_items_in_batch)
        self._log_parts(own_loss / scale, sums[0], num_scored)
        weight = self.args.distillation_weight
        loss = (1 - weight) * own_loss + weight * self.args.distillation_temperature**2 * scale * sums[0]
        return (loss, result[1]) if return_outputs else loss

    def _scale(self, num_scored: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | float:
        """What TRL multiplies a sum over tokens with to get the loss of a process."""
        if num_items_in_batch is None:
            return 1 / num_scored.clamp(min=1)
        num_processes = self.accelerator.num_processes // self.get_tp_size()
        return (num_processes if self.args.average_tokens_across_devices else 1) / num_items_in_batch

    def _read_as_teacher(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Reading:
        if self.teacher_model is not None:
            teacher = self.accelerator.unwrap_model(self.teacher_model)
            return read_uncompressed(self.teacher_model, teacher, inputs, without_adapters=False)
        student = self.accelerator.unwrap_model(model)
        return read_uncompressed(model, student, inputs, without_adapters=self.args.teacher == "adapter")

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        eval_dataset_name: str | None = None,
        eval_split: str = "eval",
    ) -> None:
        """
        Writes the model card to `args.output_dir`, as [`~trl.SFTTrainer`] does at every checkpoint; this one has the
        figures of the run. One that is there is refreshed: text that a person added stays. `eval_dataset_name` and
        `eval_split` name what was evaluated on, by default a split of the data that were trained on.
        """
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else list(tags or [])
            write_training_card(
                self,
                model_name,
                dataset_name,
                [*self._tag_names, *tags],
                eval_dataset_name=eval_dataset_name or dataset_name,
                eval_split=eval_split,
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        with without_automatic_card(folder) if self.is_world_process_zero() else nullcontext():
            super().save_model(output_dir, _internal_call)
        # Called by a user, at the end of a training
        if not _internal_call and output_dir in (None, self.args.output_dir):
            self.create_model_card()

    @property
    def _own_loss_name(self) -> str:
        """What the loss without distillation is called in the logs."""
        if self.compute_loss_func is not None:
            return "own_loss"
        if self.label_smoother is not None and self.args.loss_type == "nll":
            return "label_smoothed_nll_loss"
        return f"{self.args.loss_type}_loss"

    def _log_parts(self, own_loss: torch.Tensor, divergence: torch.Tensor, num_scored: torch.Tensor) -> None:
        """Both parts of the loss, given as sums over the tokens of a process, as means over those of all."""
        sums = torch.stack([own_loss.detach().float(), divergence.detach().float(), num_scored.float()])
        own_sum, divergence_sum, number = self.accelerator.gather_for_metrics(sums[None]).sum(0).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics[self._own_loss_name].append(own_sum / max(1, number))
        metrics["distillation_loss"].append(divergence_sum / max(1, number))


def load_student(
    path: str, args: VoCoSFTConfig, quantization_config: QuantizationConfigMixin | None
) -> VoCoLlamaForConditionalGeneration | PeftModel:
    """
    Loads the model as TRL loads one by its name, in float32 unless `args.model_init_kwargs` says otherwise; adapters
    as such, to be trained further.

    Raises:
        ValueError: if it is not a VoCo-LLaMA.
    """
    options: dict[str, Any] = {"dtype": "float32", **dict(args.model_init_kwargs or {})}
    args.model_init_kwargs = None
    if find_base(path) is not None:
        return load_adapters(path, is_trainable=True, quantization_config=quantization_config, **options)
    return load_whole(path, quantization_config=quantization_config, **options)


def freeze(model: torch.nn.Module, names: list[str]) -> None:
    """
    Takes the parameters with one of `names` in their dotted name out of the training.

    Raises:
        ValueError: if a name fits no parameter.
    """
    parameters = dict(model.named_parameters())
    for frozen in names:
        found = [parameter for name, parameter in parameters.items() if f".{frozen}." in f".{name}."]
        if not found:
            modules = sorted(name for name, _ in bare(model).model.named_children())
            raise ValueError(f"freeze names {frozen!r}, which is no part of the model: it has {', '.join(modules)}")
        for parameter in found:
            parameter.requires_grad_(False)


def print_trainable_parameters(model: torch.nn.Module, console: Console | None = None) -> None:
    """Prints how much of each part of the model is trained."""
    model = bare(model)
    parts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        path = name.removeprefix("model.").split(".")
        part = ".".join(path[:2]) if path[0] == "language_model" else path[0]
        count = parts.setdefault(part, [0, 0])
        # What ZeRO-3 has sharded is empty here
        number = parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
        count[0] += number
        count[1] += number if parameter.requires_grad else 0
    table = Table(title="Trained parameters")
    table.add_column("module")
    for heading in ("parameters", "trained", "share"):
        table.add_column(heading, justify="right")
    totals = [sum(count[i] for count in parts.values()) for i in range(2)]
    for part, (total, trained) in {**parts, "all": totals}.items():
        if part == "all":
            table.add_section()
        table.add_row(part, f"{total:,}", f"{trained:,}", f"{100 * trained / total:.1f} %")
    (console or Console(stderr=True)).print(table)


__all__ = ["VoCoSFTTrainer"]
