"""What a run goes on from after it was stopped, in the middle or not: Orbax checkpoints."""

import logging
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from csm_jax.errors import CheckpointError, first_line
from csm_jax.train.step import TrainState


class Checkpoints:
    """The last few states of a run, written while it goes on.

    A checkpoint appears under its name when it is whole, so whatever kills the run leaves only
    good ones.
    """

    def __init__(self, directory: Path, keep: int):
        """Args: keep: how many of the latest."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self.directory = directory.absolute()
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._hook = sys.unraisablehook

    def __enter__(self) -> "Checkpoints":
        sys.unraisablehook = self._without_stragglers
        # Of writes that fail after the first, asyncio would print each, also when they are
        # collected long after the manager is closed: so the level stays.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._manager.close()
        finally:
            sys.unraisablehook = self._hook

    def _without_stragglers(self, caught: Any) -> None:
        """The first array that cannot be written ends Orbax's event loop, and is an exception for
        us. Threads of tensorstore that write the others each report that this loop is closed."""
        if str(caught.exc_value) != "Event loop is closed":
            self._hook(caught)

    def latest(self) -> Path | None:
        """The last one that is whole."""
        self._manager.wait_until_finished()
        step = self._manager.latest_step()
        return None if step is None else self.directory / str(step)

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Begins to write a checkpoint; the state is copied before this returns.

        Args:
          position: the data iterator's, as JSON.
        """
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position)
        )
        self._manager.save(step, args=items, force=True)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The last state and position, or None if there is none.

        Args:
          like: a state of the same shapes, types and places.

        Raises:
          CheckpointError: it is damaged, or of another run.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:
            raise CheckpointError(
                f"{self.directory / str(step)} cannot be read ({first_line(error)}): remove it to "
                "go on from the one before"
            ) from error
        return restored["state"], restored["data"]

    def was_told_to_stop(self, step: int) -> bool:
        """Whether any process of several got a SIGTERM; they all learn of it at the same step."""
        return self._manager.reached_preemption(step)
