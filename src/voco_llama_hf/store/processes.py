"""The processes that `voco-llama index --num-processes` starts together."""

import os
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist


T = TypeVar("T")

PATIENCE = timedelta(days=7)  # one process may have much longer videos than another


class Processes:
    """This process among others: what launchers say in the environment, over gloo, which every machine has."""

    def __init__(self) -> None:
        self.number = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if self.number > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: T | None) -> T:
        """What the main process has; the others may have None."""
        if self.number == 1:
            return value  # type: ignore[return-value]
        values: list = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """What every process has, on the main one."""
        if self.number == 1:
            return [value]
        values: list = [None] * self.number
        dist.gather_object(value, values if self.is_main else None)
        return values


__all__ = ["Processes"]
