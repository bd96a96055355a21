"""Trains tiny models whose weights FSDP2 has sharded over the processes of torchrun; without it, whole ones.

`python fsdp_run.py OUTPUT_DIR '{"name": {"images_per_row": [1, 0], "max_steps": 4}}'` leaves the losses of every case.

accelerate shards on accelerators only, so the weights are sharded with torch, and the steps are taken here.
"""

import json
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets import disable_progress_bars
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training.sft_helpers import conversations, make_trainer


def shard(model, mesh):
    for layer in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model.model.multi_modal_projector, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train(output_dir, images_per_row, evaluates=False, **options):
    """Losses of the steps, and of an evaluation behind them."""
    dataset = conversations(8, images_per_row=images_per_row)
    trainer = make_trainer(output_dir, dataset=dataset, **options)
    model, accelerator = trainer.model, trainer.accelerator
    if accelerator.num_processes > 1:
        shard(model, init_device_mesh("cpu", (accelerator.num_processes,)))
    # Not Adam: where no row has an image, it moves what has a gradient of 0 on, and leaves alone what has none
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def compute_loss(batch):
        number = accelerator.gather((batch["labels"] != -100).sum()[None]).sum()
        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch), num_items_in_batch=number)
        losses.append(accelerator.gather(loss.detach()[None]).mean().item())
        return loss

    losses = []
    for step, batch in enumerate(trainer.get_train_dataloader()):
        trainer.state.global_step = step
        model.train()
        compute_loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    if evaluates:
        model.eval()
        with torch.no_grad():
            compute_loss(next(iter(trainer.get_eval_dataloader(dataset))))
    return trainer, losses


def main(output_dir, cases):
    disable_progress_bars()
    losses = {}
    for name, options in cases.items():
        trainer, losses[name] = train(output_dir, **options)
    if trainer.accelerator.is_main_process:
        (Path(output_dir) / "losses.json").write_text(json.dumps(losses))
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
