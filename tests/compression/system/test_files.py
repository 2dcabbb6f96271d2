"""Atomic files, and one job at a time."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from models import save_model
from svdserve.compression.format.log import read_log
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Recipe, Run, make_recipe
from svdserve.compression.pipeline.workdir import WorkDirectory
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.files import check_output, exclusive, replacing, write_text

HOLD = """
import sys, time
from pathlib import Path
from svdserve.compression.system.files import exclusive
with exclusive(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""


def test_the_second_process_is_told_and_a_kill_frees_the_lock(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        message = rf"out: process {process.pid} on .* is writing it now; wait until that ends"
        with pytest.raises(UserError, match=message), exclusive(out):
            pass
        recipe = make_recipe(method="svd", allocator="uniform")
        model = save_model("llama", tmp_path / "model")
        with pytest.raises(UserError, match=message):
            compress(str(model), out, recipe, Run(progress=False, resume=True))
        process.kill()
    with exclusive(out):
        assert (tmp_path / ".out.lock").exists()
    assert not (tmp_path / ".out.lock").exists()


def test_waiting_for_the_lock(tmp_path: Path) -> None:
    code = HOLD.replace("60", "0.5")
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        began = time.monotonic()
        with exclusive(tmp_path / "cache", wait=True):
            assert time.monotonic() - began > 0.1


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "before")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text(f"half {1 // 0}")
    assert path.read_text() == "before"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("one")
        second.write_text("two")
    assert path.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("end", ["", ".partial", ".replaced", ".search"])
def test_no_input_may_lie_where_a_job_writes(end: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = tmp_path / f"out{end}" / "model"
    model.mkdir(parents=True)
    with pytest.raises(UserError, match="which this command reads"):
        check_output(out, [model])
    check_output(out, [tmp_path / "elsewhere"])


def test_resume_anyway_goes_on_and_says_so(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000)))
    model, out = save_model("llama", tmp_path / "model"), tmp_path / "out"
    recipe = make_recipe(calibration=str(text), tokens=256, seq_len=32)
    run = Run(progress=False)
    whole = tmp_path / "whole"
    compress(str(model), whole, recipe, run)
    blocks = tmp_path / "out.partial"
    _stop_after_one_block(model, out, recipe, run)
    assert blocks.exists()
    again = run.model_copy(update={"resume": True, "batch_size": 2})
    with pytest.raises(UserError, match=r"order.batch_size was 1 and is 2.*--resume-anyway"):
        compress(str(model), out, recipe, again)
    compress(str(model), out, recipe, again.model_copy(update={"resume_anyway": True}))
    events = [e for e in read_log(out / "svdserve_log.jsonl") if e["event"] == "resumed_anyway"]
    assert [(e["before"]["batch_size"], e["after"]["batch_size"]) for e in events] == [(1, 2)]
    other = recipe.model_copy(update={"keep": 0.7})
    anyway = again.model_copy(update={"resume_anyway": True})
    with pytest.raises(UserError, match=r"recipe.keep was 0.8 and is 0.7"):
        compress(str(model), out, other, anyway)


def _stop_after_one_block(model: Path, out: Path, recipe: Recipe, run: Run) -> None:
    """A job that ended after its first block, as a kill leaves it."""

    class Stopped(Exception):
        pass

    save = WorkDirectory.save_block

    def stop(work: WorkDirectory, *block: object) -> None:
        save(work, *block)  # type: ignore[arg-type]
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkDirectory, "save_block", stop)
        with pytest.raises(Stopped):
            compress(str(model), out, recipe, run)
