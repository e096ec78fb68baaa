"""The blocks that a run needs, from a pack that may still be growing: whether they will be enough, and waiting for the next."""

import time

from accelerate import Accelerator

from lm.run import main_decides
from lm.session import Session
from lm.shards import Pack

LOOK_EVERY_SEC = 1.0  # also the longest that a process waits for the others, or a signal for its answer
SAY_EVERY_SEC = 30.0


def check_supply(pack: Pack, needed: int, allow_epochs: bool, command: str) -> None:
    """Raise ValueError, naming the `command` that packs more, if the pack is too short and may not be read again.

    Of a pack that is not finished, its target counts; one without a target may become long enough.
    """
    blocks = pack.num_blocks if pack.finished else pack.target_blocks
    if blocks is not None and blocks < needed and not (allow_epochs and blocks):
        raise ValueError(f"{pack.folder} {'has' if pack.finished else 'will have'} {too_few(blocks, needed, command)}")


def too_few(blocks: int, needed: int, command: str) -> str:
    """What is missing, and what to do."""
    return (
        f"{blocks} blocks, {needed} are needed: pack more ({command}, and else the arguments it was packed with), or pass"
        " --allow_epochs to train on these again"
    )


def look_again(pack: Pack, accelerator: Accelerator) -> None:
    """Let every process know the same shards: those that the main process finds now."""

    def look() -> tuple[list[dict], bool]:
        pack.refresh()
        return pack.shards, pack.finished

    pack.take(*main_decides(accelerator, look))


def wait_for_blocks(session: Session, pack: Pack, needed: int, max_wait_sec: float, command: str) -> bool:
    """Return True once the pack has `needed` blocks or is finished, or False if a signal asks to stop: then all is saved.

    Raises: RuntimeError, on every process and once all is saved, if no new shard comes for `max_wait_sec`.
    """

    def enough() -> bool:
        return pack.num_blocks >= needed or pack.finished

    if enough():
        return True
    look_again(pack, session.accelerator)
    if enough():
        return True
    session.run.log.event("waiting_for_shards", step=session.progress.step, block=needed - 1, blocks=pack.num_blocks)
    newest = said = time.monotonic()
    while not enough():
        if session.stop_while_waiting():
            return False
        (too_long,) = session.run.agree(int(time.monotonic() - newest > max_wait_sec))
        if too_long:
            session.give_up(_no_shard_came(pack, needed, max_wait_sec, command))
        if time.monotonic() - said > SAY_EVERY_SEC:
            said = time.monotonic()
            session.run.log.say(f"still waiting for block {needed - 1}, {pack.folder} has {pack.num_blocks} blocks")
        time.sleep(LOOK_EVERY_SEC)
        shards = len(pack.shards)
        look_again(pack, session.accelerator)
        newest = time.monotonic() if len(pack.shards) > shards else newest
    session.run.log.event("going_on", step=session.progress.step, blocks=pack.num_blocks)
    return True


def _no_shard_came(pack: Pack, needed: int, max_wait_sec: float, command: str) -> RuntimeError:
    return RuntimeError(
        f"{pack.folder} got no new shard for {max_wait_sec:g} s and has {pack.num_blocks} blocks, {needed} are needed for the"
        f" next step: see whether {command} still goes on, or start it again; then run the same command again"
    )
