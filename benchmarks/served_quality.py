"""Perplexity that clients of the server measure, beside that of transformers on the same chunks.

    python benchmarks/served_quality.py --text FILE MODEL [MODEL ...]

The first model is the dense one. With int8 weights vLLM rounds more than transformers: the input of
every product too. The chunks and the loss are those of `svdserve eval`.
"""

import argparse
import math
import socket
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from svdserve.bench.launch import running
from svdserve.compression.evaluation.perplexity import perplexity, text_chunks
from svdserve.compression.format.tensors import TensorFiles
from svdserve.compression.system.files import write_results
from svdserve.compression.system.machine import this_machine

HOST = "127.0.0.1"
FLAGS = ("--kv-cache-memory-bytes", "1G", "--enforce-eager", "--max-num-seqs", "1")


def served_losses(model: Path, chunks: list[list[int]]) -> list[float]:
    """The mean loss of each chunk's tokens, by the server's log-probabilities of the prompt.

    Args:
        chunks: token ids, all of one length.

    Returns:
        nats for each token but a chunk's first.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    flags = [*FLAGS, "--max-model-len", str(len(chunks[0]) + 1)]
    losses = []
    with (
        TemporaryDirectory() as folder,
        running(model, HOST, port, Path(folder) / "log", flags) as server,
        httpx.Client(base_url=server.url, timeout=600) as client,
    ):
        name = client.get("/v1/models").json()["data"][0]["id"]
        for chunk in chunks:
            body = {"model": name, "prompt": chunk, "max_tokens": 1, "prompt_logprobs": 0}
            answer = client.post("/v1/completions", json=body).raise_for_status().json()
            found = answer["choices"][0]["prompt_logprobs"][1:]
            pairs = zip(found, chunk[1:], strict=True)
            losses.append(statistics.fmean(-one[str(token)]["logprob"] for one, token in pairs))
    return losses


def main() -> None:
    """Measure, print and write the perplexities."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", help="the dense one first")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a chunk")
    parser.add_argument("--max-chunks", type=int, default=16)
    parser.add_argument("--json", type=Path, default=Path("results/served_quality.json"))
    given = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for model in given.models:
        chunks = text_chunks(model, given.text, given.seq_len, given.max_chunks).tolist()
        own = perplexity(
            model, given.text, seq_len=given.seq_len, max_chunks=given.max_chunks, progress=False
        )
        loss = statistics.fmean(served_losses(model, chunks))
        rows[model.name] = {
            "stored_bytes": sum(info.nbytes for info in TensorFiles(model).info.values()),
            "transformers": own.mean_loss,
            "served": loss,
            "served_perplexity": math.exp(loss),
        }
        print(model.name, rows[model.name], flush=True)
    written = {
        "command": " ".join(["python", *(Path(one).name for one in sys.argv)]),
        "flags": FLAGS,
        "text": {"file": given.text.name, "sha256": own.text_sha256, "chunks": own.chunks},
        "machine": this_machine().model_dump(mode="json"),
        "mean_loss": rows,
    }
    write_results(given.json, written)


if __name__ == "__main__":
    main()
