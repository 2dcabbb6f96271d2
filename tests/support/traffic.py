"""Traffic for a server under test."""

import json
import random
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def load(url: str, model: str, clients: int = 4, pause_seconds: float = 1.0) -> Iterator[None]:
    """Clients that send completions of random lengths, each after a random pause, until the end.

    Prompts are token ids that every tokenizer of the tests and of SmolLM2 has.
    """
    stop = threading.Event()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.wait(rng.random() * pause_seconds):
            prompt = [rng.randrange(4, 500) for _ in range(rng.randrange(10, 100))]
            complete(url, model, prompt, rng.randrange(20, 100))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def complete(url: str, model: str, prompt: list[int], tokens: int) -> None:
    """One completion of exactly that many tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == tokens
