"""Orbax checkpoints of a run, from which it is resumed after it was stopped or killed."""

import logging
import sys
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import orbax.checkpoint as ocp

from csm_jax.errors import CheckpointError, first_line


class State(Protocol):
    """A NamedTuple with the number of its step, such as `step.TrainState`."""

    @property
    def step(self) -> jax.Array: ...
    def _asdict(self) -> dict[str, Any]: ...


S = TypeVar("S", bound=State)

# Fields that have another name in the files, in which checkpoints of earlier versions have them.
_STORED_NAMES = {"opt_state": "optimiser"}


class Checkpoints:
    """The last few states of a run, written while it continues.

    A checkpoint gets its name when it is complete, so a run that is killed leaves only complete
    ones.
    """

    def __init__(self, directory: Path, keep: int):
        """Opens or makes the directory; the latest `keep` checkpoints stay in it."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self.directory = directory.absolute()
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._hook = sys.unraisablehook

    def __enter__(self) -> "Checkpoints":
        sys.unraisablehook = self._ignore_closed_loops
        # Of writes that fail after the first, asyncio would print each, also when they are
        # collected long after the manager is closed: so the level stays.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._manager.close()
        finally:
            sys.unraisablehook = self._hook

    def _ignore_closed_loops(self, caught: Any) -> None:
        """Hides what follows a failed write.

        The first array that cannot be written ends Orbax's event loop, and is raised as an
        exception. Each of the threads of tensorstore that write the others then reports that this
        loop is closed.
        """
        if str(caught.exc_value) != "Event loop is closed":
            self._hook(caught)

    def latest(self) -> Path | None:
        """The last complete checkpoint."""
        self._manager.wait_until_finished()
        step = self._manager.latest_step()
        return None if step is None else self.directory / str(step)

    def save(self, state: State, position: dict[str, Any]) -> None:
        """Begins to write a checkpoint; the state is copied before this returns.

        Args:
          position: the data iterator's, as JSON.
        """
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_as_stored(state)), data=ocp.args.JsonSave(position)
        )
        self._manager.save(step, args=items, force=True)

    def restore(self, like: S) -> tuple[S, dict[str, Any]] | None:
        """The last state and position, or None if there is none.

        Args:
          like: a state of the same shapes, types and shardings.

        Raises:
          CheckpointError: it is damaged, or of another run.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_stored(like))
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:
            raise CheckpointError(
                f"{self.directory / str(step)} cannot be read ({first_line(error)}): remove it to "
                "resume from the one before"
            ) from error
        stored = restored["state"]
        fields = {name: stored[_STORED_NAMES.get(name, name)] for name in like._asdict()}
        return type(like)(**fields), restored["data"]

    def is_preempted(self, step: int) -> bool:
        """Whether any process of several got a SIGTERM; all of them see it at the same step."""
        return self._manager.reached_preemption(step)


def _as_stored(state: State) -> dict[str, Any]:
    return {_STORED_NAMES.get(name, name): leaf for name, leaf in state._asdict().items()}
