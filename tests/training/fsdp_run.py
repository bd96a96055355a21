"""Trains a tiny model whose weights FSDP2 has sharded over the processes of torchrun; without it, a whole one.

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
    fully_shard(model, mesh=mesh)


def main(output_dir, options):
    disable_progress_bars()
    trainer = make_trainer(output_dir, dataset=conversations(16, images_per_row=(1, 2, 1, 1)), **options)
    model, accelerator = trainer.model, trainer.accelerator
    if accelerator.num_processes > 1:
        shard(model, init_device_mesh("cpu", (accelerator.num_processes,)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step, batch in enumerate(trainer.get_train_dataloader()):
        trainer.state.global_step = step
        model.train()
        number = accelerator.gather((batch["labels"] != -100).sum()[None]).sum()
        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch), num_items_in_batch=number)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()[None]).mean().item())
    if accelerator.is_main_process:
        (Path(output_dir) / "losses.json").write_text(json.dumps({"loss": losses}))
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
