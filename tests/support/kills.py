"""kill -9 at random moments, and what is left; for tests and for reliability_kill.py."""

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svdserve.compression.format.integrity import verify
from svdserve.compression.format.log import LOG_FILE
from svdserve.compression.format.reader import check_finite, open_checkpoint
from zygote import Zygote


@dataclass(frozen=True)
class Kill:
    """One killed run and how often its resumptions were killed before one finished."""

    moment: str
    killed: int
    blocks: int
    """Finished when it was first killed."""
    published: bool
    """The output was there already."""


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a checkpoint but the log, which has times in it."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != LOG_FILE}


def kill_and_resume(
    zygote: Zygote, command: Sequence[object], out: Path, kills: int, seed: int
) -> dict[str, Any]:
    """Kill runs of ``command --out OUT`` at random moments, resume each, compare every byte.

    Even kills come by the clock, odd ones before a random change of the file system. A resumption
    is killed too, one time in three.

    Raises:
        AssertionError: an output that is not the uninterrupted run's, byte for byte.
    """
    generator = random.Random(seed)
    arguments = [*command, "--out", out, "--resume"]
    began = time.monotonic()
    whole = zygote.run(arguments)
    seconds = time.monotonic() - began
    assert whole.code == 0, whole.errors
    expected = contents(out)
    partial = out.with_name(f"{out.name}.partial")
    records = []
    for index in range(kills):
        shutil.rmtree(out)
        first, killed = None, 0
        while True:
            wanted = killed == 0 or generator.random() < 1 / 3
            at = generator.randint(1, len(whole.changes)) if index % 2 and wanted else 0
            delay = generator.uniform(0, seconds)
            run = zygote.start(arguments, kill_at=at)
            if wanted and not at:
                _kill_after(run.pid, delay)
            ended = run.wait()
            if out.exists():  # whole from the moment it exists
                check_finite(open_checkpoint(out))
                verify(out)
                assert contents(out) == expected
            if ended.code == -signal.SIGKILL:
                killed += 1
                moment = f"change {at} of {len(whole.changes)}" if at else f"{delay / seconds:.2f}"
                blocks = len(list(partial.glob("block-*.safetensors")))
                first = first or Kill(moment, 0, blocks, out.exists())
                continue
            assert ended.code == 0, ended.errors
            if first is None:  # it was faster than the clock
                shutil.rmtree(out)
                continue
            break
        assert contents(out) == expected
        assert not partial.exists()
        print(f"kill {index + 1} of {kills}", flush=True)
        records.append(Kill(first.moment, killed, first.blocks, first.published))
    return {
        "seconds": round(seconds, 3),
        "changes": len(whole.changes),
        "files": sorted(expected),
        "kills": [asdict(record) for record in records],
    }


def _kill_after(pid: int, delay: float) -> None:
    end = time.monotonic() + delay
    while time.monotonic() < end and runs(pid):
        time.sleep(0.001)
    if runs(pid):
        os.kill(pid, signal.SIGKILL)


def runs(pid: int) -> bool:
    """Neither gone nor a zombie that waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
