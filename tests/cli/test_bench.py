"""`svdserve bench` as a user types it: options that are refused before anything is loaded."""

import pytest

from commands import svdserve

NOT_POSITIVE = "Input should be greater than 0 (given: 0)"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("A B --batch-size 1 --batch-size 0", f"--batch-size: {NOT_POSITIVE}"),
        ("A B --output-len 1", "--output-len: Input should be greater than or equal to 2"),
        (
            "A B --dtype int4",
            "--dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16' (given: 'int4')",
        ),
        ("A B --served --max-len 3", "--max-len: Input should be greater than or equal to 64"),
        ("A B --served --concurrency 0", f"--concurrency: {NOT_POSITIVE}"),
        (
            "A B --served --workload x",
            "--workload: Input should be 'decode', 'prefill' or 'mixed' (given: 'x')",
        ),
        ("--kernels --rows 0", f"--rows: {NOT_POSITIVE}"),
        (
            "--kernels --dtype auto",
            "--dtype: Input should be 'float32', 'bfloat16' or 'float16' (given: 'auto')",
        ),
    ],
)
def test_a_wrong_option_is_one_line(words: str, says: str) -> None:
    assert refused(words).startswith(f"error: {says}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("A B --rows 8", "--rows: is read with --kernels only; give both or neither"),
        ("A B --concurrency 2", "--concurrency: is read with --served only; give both or neither"),
        ("A B --served --keep 0.8", "--keep: is not read with --served; leave one of them out"),
        ("A B --served --batch-size 2", "--batch-size: is not read with --served; "),
        ("--kernels --prompt-len 8", "--prompt-len: is not read with --kernels; "),
        ("--kernels --compiled", "--eager/--compiled: is not read with --kernels; "),
        ("--kernels --served", "--served: is not read with --kernels; "),
        ("--kernels --plot x.svg", "--plot: is not read with --kernels; "),
        ("--kernels A B", "--kernels measures the layers of one model; name at most DENSE"),
    ],
)
def test_an_option_of_another_mode_is_one_line(words: str, says: str) -> None:
    assert refused(words).startswith(f"error: {says}")


def refused(words: str) -> str:
    """The line with which the command refuses."""
    done = svdserve("bench", *words.split())
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    return line
