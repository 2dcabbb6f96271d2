"""`svdserve bench` as a user types it: options that are out of range, before anything is loaded."""

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
    done = svdserve("bench", *words.split())
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {says}")
