"""README.md and docs/: every command runs, every option exists, every link leads somewhere.

tests/support/pages.py says what a page must look like.
"""

import io
import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import typer
from packaging.requirements import Requirement

from models import save_model
from pages import ROOT, Block, blocks, pages, script
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Run, make_recipe
from zygote import listening

SECONDS = 1800  # of one page, on a machine that does something else as well
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",  # threads that wait for each other on a busy machine take minutes
    "COLUMNS": "160",
}
WORDS = "The quick brown fox jumps over the lazy dog; {0} is the number of this line.\n"


README, *OTHERS = pages()


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for the models of every page."""
    root = tmp_path_factory.mktemp("docs")
    (root / "text.txt").write_text("".join(map(WORDS.format, range(400))))
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 8192}
    dense = save_model("llama", root / "smollm2", dtype=torch.bfloat16, **sizes)
    (dense / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content }} {% endfor %}"
    )
    recipe = make_recipe(calibration=str(root / "text.txt"), tokens=512, seq_len=128)
    compress(str(dense), root / "small", recipe, Run(progress=False))
    return root


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A program `svdserve` that has imported everything; tests/test_zygote.py compares."""
    with listening(tmp_path_factory.mktemp("forked")) as program:
        yield program


@pytest.mark.vllm
@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize(
    "page",
    [README, *(pytest.param(page, marks=pytest.mark.exhaustive) for page in OTHERS)],
    ids=named,
)
def test_blocks_run(page: Path, models: Path, forked: Path, tmp_path: Path) -> None:
    """README.md with the program that was installed, the others with one that starts at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = script(page, port)
    if not text:
        pytest.skip("nothing to run")
    (tmp_path / "models").mkdir()
    made = re.search(r"--out models/small\b", text)
    for name in ("smollm2",) if made else ("smollm2", "small"):
        (tmp_path / "models" / name).symlink_to(models / name)
    for name in ("benchmarks", "docker", "docs", "examples", "tests", "Makefile"):
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "text.txt").write_bytes((models / "text.txt").read_bytes())
    (tmp_path / "page.sh").write_text(text)
    environment = os.environ | ENVIRONMENT
    if page.parent != ROOT:
        environment["PATH"] = f"{forked.parent}{os.pathsep}{environment['PATH']}"
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "page.sh"],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            code: int | str = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = f"no end within {SECONDS} s"
        finally:
            for child in tree(process.pid):
                child.kill()
    output_text = log.read_text(errors="replace")
    last = re.findall(r"^--- (\S+)$", output_text, re.MULTILINE)
    assert code == 0, (
        f"the block at {last[-1] if last else page} ends with {code}:\n" + (output_text[-4000:])
    )


def tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return []


# Options


@cache
def commands() -> dict[str, set[str]]:
    """The options of every command of `svdserve`."""
    from svdserve.cli.main import app

    group: Any = typer.main.get_command(app)
    return {
        name: {
            option for param in command.params for option in (*param.opts, *param.secondary_opts)
        }
        | {"--help", "-h"}
        for name, command in group.commands.items()
    }


@cache
def vllm_options() -> set[str]:
    """Of `vllm serve`, as its own parser has them."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())
    return set(parser._option_string_actions)


@cache
def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+)(?: [\w-]+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE))


def extras() -> dict[str, list[str]]:
    import tomllib

    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    found = {"": project["dependencies"], **project["optional-dependencies"]}
    own = {f"{project['name']}[{name}]": lines for name, lines in found.items()}
    return {
        name: [line for given in lines for line in own.get(given, [given])]
        for name, lines in found.items()
    }


@cache
def script_options(file: str) -> set[str]:
    """Of a script of ours, as its help page lists them.

    It runs in this process: a fresh one would import torch and vLLM for every script.
    """
    page = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(page):
        patch.setattr(sys, "argv", [file, "--help"])
        patch.syspath_prepend(str((ROOT / file).parent))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / file), run_name="__main__")
    assert not end.value.code, file
    return {"--", *re.findall(r"(?<![\w-])--?[a-z][\w-]*", page.getvalue())}


def objections(words: list[str]) -> Iterator[str]:
    """What is wrong with a command, as far as the command line alone tells."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    given = [word.partition("=")[0] for word in words if word.startswith("-") and word != "-"]
    match words:
        case ["svdserve", name, *_] if not name.startswith("-"):
            if name not in commands():
                yield f"svdserve has no command {name!r}"
                return
            allowed = commands()[name] | (vllm_options() if name == "serve" else set())
            yield from (f"`svdserve {name}` has no {o}" for o in given if not known(o, allowed))
        case ["vllm", "serve", *_]:
            yield from (f"`vllm serve` has no {o}" for o in given if not known(o, vllm_options()))
        case ["make", *rest]:
            for word in rest:
                if "=" not in word and not word.startswith("-") and word not in targets():
                    yield f"the Makefile has no target {word!r}"
        case ["python" | "python3", "-m", module, *_]:
            try:
                found = find_spec(module)
            except ModuleNotFoundError:
                found = None
            if found is None:
                yield f"there is no module {module!r}"
        case ["python" | "python3", file, *_] if file.endswith(".py") and "/" in file:
            if not (ROOT / file).exists():
                yield f"there is no file {file!r}"
                return
            own = [word for word in given if "--" not in words[: words.index(word)]]
            yield from (f"{file} has no {o}" for o in own if o not in script_options(file))
        case ["pip", "install", *rest]:
            for extra in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
                yield from (f"no extra {e!r}" for e in extra.split(",") if e not in extras())


def known(option: str, allowed: set[str]) -> bool:
    """--a.b sets a part of --a."""
    plain = option.partition(".")[0]
    short = "" if plain.startswith("--") else plain[:2]  # -O3
    return bool({plain, plain.replace("_", "-"), short} & allowed)


@pytest.mark.parametrize("page", pages(), ids=named)
def test_options_exist(page: Path) -> None:
    found = [
        f"{block.place}: {objection} in: {' '.join(words)}"
        for block in blocks(page)
        for words in block.commands()
        for objection in objections(words)
    ]
    assert not found, "\n".join(found)


def test_wrong_commands_are_noticed() -> None:
    for line in (
        "svdserve compress m --out o --kep 0.8",
        "svdserve squeeze m",
        "svdserve serve m --porrt 1",
        "X=1 vllm serve m --max-model-length 5",
        "make demmo",
        "python -m svdserve.nothing",
        "python benchmarks/nothing.py",
        "python benchmarks/reliability/reliability_load.py --models m",
        "pip install -e '.[cpus]'",
    ):
        (words,) = Block(ROOT / "README.md", 1, "bash", line).commands()
        assert list(objections(words)), line
    for line in (
        "python benchmarks/reliability/reliability_load.py --model m -- --enforce-eager",
        "svdserve serve m --port 1 -tp 2 --compilation-config.mode 3 --no-enable-log-requests",
    ):
        (words,) = Block(ROOT / "README.md", 1, "bash", line).commands()
        assert not list(objections(words))


# Links


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages(), ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.is_relative_to(ROOT) or not file.exists():
            broken.append(f"{named(page)}: {target}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            broken.append(f"{named(page)}: {target}: no such heading")
    assert not broken, "\n".join(broken)


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    names = [os.path.relpath(page, ROOT / "docs") for page in pages()[1:]]
    missing = [name for name in names if f"]({name})" not in index]
    assert missing in ([], ["README.md"]), f"docs/README.md does not list {missing}"


# Messages


@cache
def sources(package: str) -> list[str]:
    """The text of a package's files, string literals that follow each other joined."""
    spec = find_spec(package)
    assert spec
    assert spec.submodule_search_locations
    texts = []
    for folder in spec.submodule_search_locations:
        for file in Path(folder).rglob("*.py"):
            text = file.read_text(errors="replace")
            texts.append(re.sub(r"""["']\s*\n\s*f?["']""", "", text))
    return texts


def quoted_messages() -> list[tuple[str, str]]:
    """Package and message, of the tables of troubleshooting.md."""
    owners = {"vLLM": "vllm", "transformers": "transformers", "": "svdserve"}
    found = []
    for row in re.findall(
        r"^\| (?:(\w+): )?(`.*?) \|",
        (ROOT / "docs" / "troubleshooting.md").read_text(),
        re.MULTILINE,
    ):
        if row[0] in owners:
            found += [(owners[row[0]], message) for message in re.findall("`(.+?)`", row[1])]
    return found


@pytest.mark.parametrize(("package", "message"), quoted_messages())
def test_messages_are_those_of_the_code(package: str, message: str) -> None:
    parts = [part.strip() for part in message.split("…") if part.strip()]
    pattern = ".{1,200}?".join(map(re.escape, parts))
    assert any(parts[0] in text and re.search(pattern, text) for text in sources(package))


def test_the_tables_are_those_of_the_results() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "tables.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_number_can_be_had_again() -> None:
    """docs/reproducing.md names each results file, or the script whose default it is."""
    page = (ROOT / "docs" / "reproducing.md").read_text()
    scripts = {Path(name).stem for name in re.findall(r"benchmarks/[\w/]+\.py", page)}
    names = {path.stem for path in (ROOT / "results").glob("*.json")}
    missing = {name for name in names - scripts if f"{name}.json" not in page}
    assert not missing


# The lock file


@pytest.mark.parametrize(
    ("file", "sets"),
    [("cpu.txt", ("", "cpu", "eval", "ray", "demo", "dev", "docker")), ("serve.txt", ("", "cpu"))],
)
def test_the_lock_satisfies_the_project(file: str, sets: tuple[str, ...]) -> None:
    """Exact versions with digests of all that these sets ask for, and nobody's index."""
    text = (ROOT / "requirements" / file).read_text()
    assert not re.search(r"/|--(extra-)?index|--find-links", text)
    entries = re.split(r"\n(?=\S)", text.strip())
    pinned = {}
    for entry in entries:
        requirement = Requirement(re.split(r" \\\n", entry)[0])
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry
        if requirement.marker is None or requirement.marker.evaluate():
            pinned[requirement.name] = specifier.version
    torch_pin = Requirement((ROOT / "requirements" / "torch.txt").read_text().strip())
    (specifier,) = torch_pin.specifier
    pinned["torch"] = specifier.version
    for extra in sets:
        for line in extras()[extra]:
            wanted = Requirement(line)
            name = re.sub(r"[-_.]+", "-", wanted.name).lower()
            assert name in pinned, f"{line} is not in requirements/{file}; run `make lock`"
            version = pinned[name]
            assert wanted.specifier.contains(version, prereleases=True), (
                f"{line}, but {file} has {version}; run `make lock`"
            )
