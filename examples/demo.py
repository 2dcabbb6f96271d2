"""`make demo`: fetch a small model, compress it, measure both, serve it and ask it a question.

Every step is a plain command, printed before it runs. The table at the end holds only what this run
measured on this machine.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from svdserve.bench.launch import running
from svdserve.compression.format.tensors import TensorFiles
from svdserve.server.serve import DEFAULT_HOST, check_port

SMOLLM2 = Path(os.path.relpath(Path(__file__).with_name("smollm2.py")))
QUESTION = "What is the capital of France?"
KEEP = "0.8"
# Sequences are short, because sampling them from the model takes most of the calibration's time.
CALIBRATION = ("--calibration", "self", "--tokens", "8192", "--seq-len", "256")
GRADIENTS = ("--gradient-tokens", "4096")
EVALUATION = ("--seq-len", "1024", "--max-chunks", "8")
BENCH = ("--pairs", "2", "--batch-size", "1", "--batch-size", "8", "--output-len", "32")
SERVING = ("--max-model-len", "2048", "--enforce-eager")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

console = Console()


def demo(
    work: Annotated[Path, typer.Option(help="Folder for the models.")] = Path("work/demo"),
    text: Annotated[
        Path | None,
        typer.Option(
            envvar="SVDSERVE_DEMO_TEXT",
            help="The text for perplexity. Without it, Python's language reference is used.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the server on 127.0.0.1.")] = 8000,
) -> None:
    """Compress SmolLM2-135M to 80 % and show what that costs and gains."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the server like Ctrl-C
    check_port(DEFAULT_HOST, port)
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    work.mkdir(parents=True, exist_ok=True)
    dense, small = work / "SmolLM2-135M-Instruct", work / f"SmolLM2-135M-Instruct-keep{KEEP}"
    text = text or _language_reference(work / "python-language-reference.txt")

    _run(str(SMOLLM2), str(dense))
    if not small.exists():
        resume = ["--resume"] if small.with_name(f"{small.name}.partial").exists() else []
        options = ("--out", str(small), "--keep", KEEP, *CALIBRATION, *GRADIENTS, *resume)
        _svdserve("compress", str(dense), *options)
    models = str(dense), str(small)
    perplexities = _json(work / "eval.json", "eval", *models, "--text", str(text), *EVALUATION)
    bench = _json(work / "bench.json", "bench", *models, *BENCH)
    with _server(small, port) as url:
        answer = _ask(url)
        console.print(_table((dense, small), perplexities, bench))
        console.print(f"perplexity on {text.name}; {bench['machine']['processor']}", style="dim")
        console.print(f"[bold]{QUESTION}[/bold]\n{answer}")
        if sys.stdout.isatty():
            console.print(f"\nServing at {url}; Ctrl-C stops it.")
            signal.pause()


def _table(models: tuple[Path, Path], perplexities: list[Any], bench: dict[str, Any]) -> Table:
    """One row for each figure: dense, compressed, and compressed over dense."""
    rows = [
        ("weights, MiB", [_weight_bytes(model) / 2**20 for model in models]),
        ("perplexity", [entry["perplexity"] for entry in perplexities]),
        ("engine memory, MiB", [entry["resident_bytes"] / 2**20 for entry in bench["models"]]),
    ]
    for workload in bench["models"][0]["tokens_per_second"]:
        label = workload.replace("decode_", "decode, batch ").replace("prefill_", "prefill of ")
        rounds = [entry["tokens_per_second"][workload] for entry in bench["models"]]
        rows.append((f"{label}, tokens/s", [statistics.median(values) for values in rounds]))
    table = Table("measured here and now", title=f"SmolLM2-135M-Instruct at κ = {KEEP}")
    for heading in ("dense", "compressed", "ratio"):
        table.add_column(heading, justify="right")
    for label, (before, after) in rows:
        table.add_row(label, f"{before:,.1f}", f"{after:,.1f}", f"{after / before:.2f}")
    return table


def _weight_bytes(model: Path) -> int:
    return sum(info.nbytes for info in TensorFiles(model).info.values())


def _language_reference(path: Path) -> Path:
    """Write English text by humans that needs no download, because it is part of Python."""
    from pydoc_data.topics import topics

    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


def _ask(url: str) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=48,
        temperature=0,
    )
    return answer.choices[0].message.content or ""


@contextmanager
def _server(model: Path, port: int) -> Iterator[str]:
    """The URL of a ready `svdserve serve`, which ends with the context."""
    console.print(f"[bold]$ svdserve serve {model} --port {port} {' '.join(SERVING)}[/bold]")
    with running(model, DEFAULT_HOST, port, model.parent / "server.log", SERVING) as server:
        try:
            yield server.url
        except KeyboardInterrupt:
            console.print("stopping")


def _svdserve(*arguments: str) -> None:
    subprocess.run(_command(*arguments), check=True)


def _json(file: Path, *arguments: str) -> Any:
    """Run a command of svdserve and return what it writes with --json."""
    _svdserve(*arguments, "--json", str(file))
    return json.loads(file.read_text())


def _command(*arguments: str) -> list[str]:
    console.print(f"[bold]$ svdserve {' '.join(arguments)}[/bold]", highlight=False, soft_wrap=True)
    return [sys.executable, "-m", "svdserve.cli.main", *arguments]


def _run(*arguments: str) -> None:
    console.print(f"[bold]$ python {' '.join(arguments)}[/bold]", highlight=False, soft_wrap=True)
    subprocess.run([sys.executable, *arguments], check=True)


def main() -> None:
    """Entry point; a failed step prints its own message, and its exit code is passed on."""
    try:
        typer.run(demo)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
