"""One stage in a process of its own: what the runner starts."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from .record import FAILED, Parts, about
from .setting import Setting
from .stages import BY_NAME, DEVICE_IS_LOST


class DeviceParts(Parts):
    """Parts of which none runs on a device that an earlier one has left unusable, as an illegal access does."""

    def run(self, name, measure) -> None:
        super().run(name, measure)
        torch = sys.modules.get("torch")  # not every stage needs it
        if torch is not None and self.done[name]["status"] == FAILED and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                print(f"the device is lost: {error}", file=sys.stderr)
                sys.exit(DEVICE_IS_LOST)


def main(
    stage: str,
    output: Path,
    command: str,
    work_dir: Path,
    model: str | None = None,
    dry_run: bool = False,
    again: Annotated[bool, typer.Option(help="Leave out what failed in the process before this one.")] = False,
) -> None:
    """Run one stage."""
    if stage not in BY_NAME:
        raise typer.BadParameter(f"no stage {stage!r}")
    work_dir.mkdir(parents=True, exist_ok=True)
    parts = DeviceParts(output, about(model, dry_run, command), again)
    import_module(f"{__package__}.{stage}").run(parts, Setting(dry_run, model, work_dir))


if __name__ == "__main__":
    typer.run(main)
