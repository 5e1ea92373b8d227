"""Enter a run: lock its folder, join its ranks and check that all of them have the same options."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from training.config import Config
from training.errors import UserError, exit_unless_first_local_rank
from training.files import run_lock
from training.options.notices import notices
from training.terminal import print_note

if TYPE_CHECKING:
    from training.distributed.world import World


class Session(NamedTuple):
    """A run's config, joined ranks and folder lock."""

    config: Config  # with the `model` options that `init_from` sets
    world: "World"
    check_lock: Callable[[], None]  # raises UserError on the main rank if the lock file was removed


def _no_check() -> None:
    """Do nothing: only the main rank holds the lock."""


@contextmanager
def session(config: Config, resume: str, branch: str | None = None) -> Iterator[Session]:
    """Lock the run's folder, join the ranks and check that they agree; leave and unlock at the end.

    Raises UserError if another process trains this run, a rank is missing, or the ranks' options differ.
    """
    with ExitStack() as stack:
        check_lock = _no_check
        if os.environ.get("WORLD_SIZE", "1") == "1":  # before the slow imports: a second process fails at once
            check_lock = stack.enter_context(run_lock(config.run_dir))

        from training.checkpoint import check_copy_to
        from training.device import available_memory_bytes, resolve_precision, select_device
        from training.distributed.consistency import check_same_options
        from training.distributed.mesh import check_mesh
        from training.distributed.world import join_world
        from training.planning.report import check_memory
        from training.weights.init_from import resolve_init_from

        try:
            world = join_world(select_device(config.parallel.device), config.parallel)
        except UserError:  # before the ranks have joined, all of a host raise the same error
            exit_unless_first_local_rank()
            raise
        stack.push(world.close)
        if world.is_main and world.size > 1:
            check_lock = stack.enter_context(run_lock(config.run_dir))
        flags = {"--resume": resume, "--branch": branch}
        check_same_options(world, config, flags, resolve_precision(config.precision, world.device))
        world.set_activity("the preparation of data", "untimed")
        config = resolve_init_from(config, fresh=resume == "never", branch=branch)
        check_mesh(config, world.size)
        if config.parallel.compile:
            from training.kernels.compiler import check_compiler

            check_compiler(world.device, is_main=world.is_main)
        check_memory(config, world.size, available_memory_bytes(world.device))
        if world.is_main:
            if config.logging.wandb is not None:
                from training.logging.wandb import find_mode

                find_mode(config.logging.wandb)  # a wrong mode must not cost the run's folder its name
            check_copy_to(config.checkpoint)
            for line in notices(config):
                print_note(line, once=True)
        yield Session(config, world, check_lock)
