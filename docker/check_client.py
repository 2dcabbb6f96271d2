"""Send requests to the server that check.sh started, with the standard library only."""

import json
import sys
from http import HTTPStatus
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

URL = "http://127.0.0.1:8000"
KEY = sys.argv[1]
CHOICES = ["Paris", "Lyon"]


def ask(path: str, body: dict[str, Any] | None = None, key: str = KEY) -> str:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(URL + path, data, headers)) as answer:
        return str(answer.read().decode())


def complete(prompt: str, **options: Any) -> str:
    body = {"model": model, "prompt": prompt, "temperature": 0, **options}
    return str(json.loads(ask("/v1/completions", body))["choices"][0]["text"])


try:
    ask("/v1/models", key="a-key-that-nobody-was-given")
    sys.exit("a wrong key was accepted")
except HTTPError as error:
    if error.code != HTTPStatus.UNAUTHORIZED:
        raise
model = json.loads(ask("/v1/models"))["data"][0]["id"]
print(f"{model} answers:", repr(complete("The capital of France is", max_tokens=16)))
# The image has no Triton, and xgrammar must work without it.
chosen = complete("The capital of France is ", structured_outputs={"choice": CHOICES})
print("of two choices:", chosen)
assert chosen in CHOICES
gauges = [line for line in ask("/metrics").splitlines() if line.startswith("svdserve_")]
assert gauges
print(*gauges, sep="\n")
