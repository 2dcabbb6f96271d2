"""A headless Chromium, and traffic for it to look at."""

import json
import random
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from playwright.sync_api import Browser, sync_playwright

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
VIEWS = {
    "light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {
        "viewport": {"width": 375, "height": 812},
        "color_scheme": "light",
        "reduced_motion": "reduce",
    },
}


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium; skips the test where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Chromium is not installed (Debian package chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Sent:
    """What was answered so far, by the usage that the server states."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@contextmanager
def load(url: str, model: str, clients: int = 4, pause_seconds: float = 1.0) -> Iterator[Sent]:
    """Clients that send completions of random lengths, each after a random pause, until the end.

    Prompts are token ids that every tokenizer of the tests and of SmolLM2 has.
    """
    sent, lock, stop = Sent(), threading.Lock(), threading.Event()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.wait(rng.random() * pause_seconds):
            prompt = [rng.randrange(4, 500) for _ in range(rng.randrange(10, 100))]
            usage = complete(url, model, prompt, rng.randrange(20, 100))
            with lock:
                sent.requests += 1
                sent.prompt_tokens += usage["prompt_tokens"]
                sent.completion_tokens += usage["completion_tokens"]

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield sent
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def complete(url: str, model: str, prompt: list[int], tokens: int) -> dict[str, int]:
    """Usage of one completion of exactly that many tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["usage"]  # type: ignore[no-any-return]
