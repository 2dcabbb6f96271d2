"""Every command over directories as people have them: the right result, or one line that helps."""

import contextlib
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from svdserve.cli import main as cli
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.pipeline.calibration.tokens import calibration_tokens
from svdserve.compression.pipeline.recipe import make_recipe
from variants import make_variants

NOT_FINITE = "not finite"
NO_TOKENIZER = "has no tokenizer"
# What compress says, and what eval says, of the directories that they refuse.
REFUSED: dict[str, tuple[str | None, str | None]] = {
    "zero-embedding": (None, None),
    "nan-weight": ("holds inf or nan", NOT_FINITE),
    "inf-embedding": ("holds inf or nan", NOT_FINITE),
    "quantization-junk": ("already quantised", "cannot load"),
    "untied-without-head": ("has no output head", "without output head"),
    "custom-code": ("--trust-remote-code", "--trust-remote-code"),
    "unknown-type": ("cannot read config.json", "cannot read config.json"),
    "float64": ("give --dtype", None),
    "no-tokenizer": (NO_TOKENIZER, NO_TOKENIZER),
    "damaged-tokenizer": ("cannot load the tokenizer", "cannot load the tokenizer"),
}
SMALL = ("--tokens", "64", "--seq-len", "32")


@dataclass(frozen=True)
class Done:
    code: object
    errors: str

    @property
    def message(self) -> str:
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        return lines[-1] if lines else ""


def run(*words: object) -> Done:
    """`svdserve WORDS` in this process; what is no SystemExit would be a traceback."""
    errors = io.StringIO()
    before = sys.argv
    sys.argv = ["svdserve", *map(str, words)]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            cli.main()
        code: object = 0
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.argv = before
    return Done(code, errors.getvalue())


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_variants(tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000)))
    return file


@pytest.fixture(scope="module")
def compressed(
    variants: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What compress made of each directory that it takes."""
    root = tmp_path_factory.mktemp("compressed")
    made: dict[str, Path] = {}
    for name, directory in variants.items():
        if name not in REFUSED or REFUSED[name][0] is None:
            done = run("compress", directory, "--out", root / name, *SMALL)
            assert done.code == 0, (name, done.errors)
            made[name] = root / name
    return made


NAMES = """
pico zero-middle zero-last zero-embedding rank-one dead-channels nan-weight inf-embedding
base-model-names quantization-null quantization-junk untied-without-head custom-code unknown-type
float64 norms-float32 no-tokenizer damaged-tokenizer added-tokens several-templates
generation-config licence
""".split()  # noqa: SIM905


def test_the_list_of_names_is_whole(variants: dict[str, Path]) -> None:
    assert sorted(variants) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_compress_is_right_or_says_why_not(
    name: str, variants: dict[str, Path], compressed: dict[str, Path], tmp_path: Path
) -> None:
    if name in compressed:
        check_finite(open_checkpoint(compressed[name]))
        return
    expected, _ = REFUSED[name]
    done = run("compress", variants[name], "--out", tmp_path / "out", *SMALL)
    assert done.code == 2
    assert expected is not None
    assert re.search(expected, done.message), done.errors
    assert re.search(
        r"[;:,] (and )?(give|copy|add|check|read|repair|the model is damaged)", done.message
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_eval_is_right_or_says_why_not(
    name: str, variants: dict[str, Path], compressed: dict[str, Path], text: Path
) -> None:
    options = ("--text", text, "--seq-len", "32", "--max-chunks", "2")
    done = run("eval", variants[name], *options)
    expected = REFUSED.get(name, (None, None))[1]
    if expected is None:
        assert done.code == 0, done.errors
    else:
        assert done.code == 2
        assert re.search(expected, done.message), done.errors
    if name in compressed:
        done = run("eval", compressed[name], *options)
        assert done.code == 0, done.errors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", ["inspect", "verify", "refine", "bench"])
def test_no_other_command_ends_in_a_traceback(
    name: str, command: str, variants: dict[str, Path], tmp_path: Path
) -> None:
    """Over dense directories: all of these want a compressed one."""
    model = variants[name]
    words = {
        "refine": ("refine", model, model, "--out", tmp_path / "out"),
        "bench": ("bench", model, tmp_path / "nowhere"),
    }.get(command, (command, model))
    done = run(*words)
    assert done.code == 2, done.errors
    assert "Traceback" not in done.errors


def test_sampling_is_plain_whatever_the_model_ships(variants: dict[str, Path]) -> None:
    recipe = make_recipe(tokens=96, seq_len=32)
    plain = calibration_tokens(variants["pico"], recipe)
    assert plain.shape == (3, 32)
    assert calibration_tokens(variants["generation-config"], recipe).equal(plain)


def test_ids_beyond_the_embedding_are_never_drawn_and_named_in_text(
    variants: dict[str, Path], tmp_path: Path
) -> None:
    recipe = make_recipe(tokens=8 * 600, seq_len=8)
    assert int(calibration_tokens(variants["added-tokens"], recipe).max()) < 512
    (tmp_path / "text.txt").write_text("in the <|extra|> case " * 40)
    for command in (
        ("compress", variants["added-tokens"], "--out", tmp_path / "o", "--calibration"),
        ("eval", variants["added-tokens"], "--text"),
    ):
        done = run(*command, tmp_path / "text.txt", "--seq-len", "32")
        assert done.code == 2
        assert re.search(r"token id 51[23], but the model has embeddings for 512", done.message)


def test_stored_bytes_of_mixed_dtypes_are_below_the_dense_file(
    variants: dict[str, Path], compressed: dict[str, Path]
) -> None:
    def size(directory: Path) -> int:
        return (directory / "model.safetensors").stat().st_size

    assert size(compressed["norms-float32"]) < size(variants["norms-float32"])


def test_licence_notice_templates_and_card(compressed: dict[str, Path]) -> None:
    assert (compressed["licence"] / "LICENSE").read_text() == "A community licence"
    assert (compressed["licence"] / "NOTICE").exists()
    card = ModelCard.load(compressed["licence"] / "README.md")
    assert card.data.license == "other"
    assert card.data.base_model is None  # a folder of this machine is no name of the Hub
    folder = compressed["several-templates"] / "additional_chat_templates"
    assert [path.name for path in folder.iterdir()] == ["rag.jinja"]


@pytest.fixture
def link(variants: dict[str, Path], tmp_path: Path) -> Path:
    directory = tmp_path / "linked"
    directory.mkdir()
    for file in variants["pico"].iterdir():
        (directory / file.name).symlink_to(file)
    return directory


def test_links_out_of_the_directory_need_a_word(
    link: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVDSERVE_ALLOW_LINKS", "0")
    options = ("--text", text, "--seq-len", "32", "--max-chunks", "1")
    done = run("eval", link, *options)
    assert done.code == 2
    assert "--allow-links" in done.message
    assert run("eval", link, *options, "--allow-links").code == 0


def test_outputs_are_checked_before_the_job(variants: dict[str, Path], tmp_path: Path) -> None:
    pico = variants["pico"]
    before = sorted(path.name for path in pico.iterdir())
    (tmp_path / "file").write_text("")
    for out in (pico, pico.parent, ".", "/", "", tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        done = run("compress", pico, "--out", out, "--force", *SMALL)
        assert done.code == 2, (out, done.errors)
        assert re.search(r"; give (another|one)|give a directory", done.message), done.message
    partial = pico.parent / "pico-copy"
    done = run("compress", pico, "--out", partial, "--seed", "-1")
    assert "seed" in done.message
    assert sorted(path.name for path in pico.iterdir()) == before


def test_versions() -> None:
    assert run("--version").code == 0
