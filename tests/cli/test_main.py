"""The command line as a user meets it: a process, its two streams and its exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

from commands import svdserve
from models import save_model

COMMANDS = (
    "compress", "refine", "eval", "compare", "serve", "bench", "inspect", "verify", "install-hook",
    "methods",
)  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("cli") / "dense")


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["squeeze"], ["methods", "--help"], []], ids=str
)
def test_what_needs_no_model_library_imports_none(words: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['svdserve', *{words}]; from svdserve.cli.main import app\n"
        "try: app()\n"
        "finally: assert not {'torch', 'transformers', 'vllm'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "imported" not in done.stderr
    assert done.returncode == (2 if words in ([], ["squeeze"]) else 0)


def test_help_names_every_command() -> None:
    done = svdserve("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)


def test_the_server_does_not_import_the_command_line() -> None:
    code = (
        "import sys, svdserve.server.serve, svdserve.server.vllm_flags\n"
        "assert not [name for name in sys.modules if name.startswith('svdserve.cli')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("compress", "MODEL", "--out", "OUT", "--keep", "1.5"), "keep: Input should be less"),
        (("compress", "MODEL", "--out", "OUT", "--method", "x"), "unknown method 'x'; allowed:"),
        (("compress", "NOWHERE", "--out", "OUT"), "NOWHERE"),
        (
            ("compress", "MODEL", "--out", "OUT", "--recipe", "bst"),
            "recipe bst: No such file or directory; give a YAML file or one of: default, best",
        ),
        (("refine", "MODEL", "MODEL", "--out", "OUT"), "this is no svdserve checkpoint"),
        (("eval", "MODEL", "--text", "NOWHERE"), "NOWHERE: cannot be read (No such file"),
        (("eval", "MODEL"), "nothing to evaluate"),
        (("inspect", "MODEL"), "this is no svdserve checkpoint"),
        (("serve", "NOWHERE"), "no such directory"),
        (
            ("serve", "MODEL", "--max-model-len", "999999"),
            "error: User-specified max_model_len (999999) is greater than",
        ),
        (("bench", "MODEL", "MODEL", "--pairs", "0"), "pairs: Input should be greater"),
        (("bench",), "name the dense one and then a compressed one"),
        (("bench", "--kernels", "--keep", "1"), "nothing to measure at keep 1"),
        (("bench", "--kernels", "--device", "cuda:99"), "device 'cuda:99' cannot be used here"),
        (("compress", "MODEL"), "Missing option '--out'"),
        (("inspect", "MODEL", "--colour"), "No such option"),
        (("squeeze",), "No such command 'squeeze'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], says: str, dense: Path, tmp_path: Path
) -> None:
    places = {"MODEL": dense, "NOWHERE": tmp_path / "NOWHERE", "OUT": tmp_path / "out"}
    done = svdserve(*(places.get(word, word) for word in arguments))
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    if done.stderr.startswith("error: "):
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
