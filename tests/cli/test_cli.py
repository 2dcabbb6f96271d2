"""The command line as a user meets it: a process, its two streams and its exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models import random_tokens, save_model

COMMANDS = ("compress", "eval", "serve", "bench", "inspect", "methods")


def svdserve(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "svdserve.cli.main", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "160", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("cli") / "dense")


def test_help_names_every_command_and_loads_no_model_library() -> None:
    code = (
        "import sys; sys.argv = ['svdserve', '--help']; from svdserve.cli.main import app\n"
        "try: app()\n"
        "finally: assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)


def test_compress_help_shows_the_defaults_of_the_recipe() -> None:
    from svdserve.compression.pipeline.recipe import Recipe

    done = svdserve("compress", "--help")
    assert done.returncode == 0
    recipe = Recipe()
    for value in (recipe.keep, recipe.method, recipe.layout, recipe.tokens):
        assert f"({value})" in done.stdout


def test_compress_eval_and_inspect(dense: Path, tmp_path: Path) -> None:
    words = [f"w{400 + i}" for i in (random_tokens(1, 600)[0] % 100).tolist()]
    text = tmp_path / "words.txt"
    text.write_text(" ".join(words))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "method: saes-svd\nkeep: 0.9\nlayout: pair\ntokens: 256\nseq_len: 64\n"
        "refinement:\n  epochs: 2\n"
    )
    small = tmp_path / "small"
    options = ("--recipe", recipe, "--keep", "0.6", "--beta", "0.5", "--calibration", text)
    done = svdserve("compress", dense, "--out", small, *options)
    assert done.returncode == 0, done.stderr
    assert "held-out KL" in done.stdout
    block = json.loads((small / "config.json").read_text())["quantization_config"]
    assert block["keep"] == 0.6  # the command line wins over the file
    assert block["recipe"]["layout"] == "pair"
    assert block["recipe"]["refinement"]["epochs"] == 2
    assert block["recipe"]["parameters"]["beta"] == 0.5

    record = tmp_path / "results" / "eval.json"
    done = svdserve("eval", dense, small, "--text", text, "--seq-len", "64", "--json", record)
    assert done.returncode == 0, done.stderr
    results = json.loads(record.read_text())
    assert [entry["model"] for entry in results] == [str(dense), str(small)]
    assert results[0]["perplexity"] != results[1]["perplexity"]

    done = svdserve("inspect", small, "--json")
    rows = json.loads(done.stdout)["modules"]
    # The first group of the model sees no shift between the streams, so its β is 0.
    assert {row["beta"] for row in rows if row["rank"]} == {0.0, 0.5}


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
        (("refine", "MODEL", "MODEL", "--out", "OUT"), "not a svdserve model"),
        (("eval", "MODEL", "--text", "NOWHERE"), "NOWHERE: cannot be read (No such file"),
        (("eval", "MODEL"), "nothing to evaluate"),
        (("inspect", "MODEL"), "not a svdserve model"),
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


def test_methods_lists_names_and_papers() -> None:
    from svdserve.compression.methods import METHODS

    done = svdserve("methods")
    assert done.returncode == 0
    for name, entry in METHODS.items():
        assert name in done.stdout
        assert entry.paper in done.stdout
