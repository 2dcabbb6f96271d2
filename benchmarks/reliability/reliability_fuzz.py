"""Sends thousands of generated requests, valid and invalid, to a real server: none may get a 5xx.

    python benchmarks/reliability/reliability_fuzz.py --model DIR --openai openapi.json

Schemathesis generates the cases from two documents: the one that the server publishes, with every
route; and OpenAI's own, with the routes that we serve too. Half of the cases break the schema on
purpose. About every second body is then cut to the essential fields and at most two others, with
the name of the served model, since a body with all fields nearly always has a value that is
refused. Most of these bodies get valid essential fields, because the schemas allow a missing or
empty prompt and token ids of any size, so that generated values rarely reach the model. Answers
are kept short.
"""

import argparse
import collections
import contextlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from reliability_client import Target, parse_arguments, serving, write_results
from schemathesis import APIOperation, Case, GenerationMode

# This route is left out because it changes the number of engines.
LEFT_OUT = ("/scale_elastic_ep",)
SHORT = 8
# Text that looks like a secret is not removed, so that requests in the results can be sent again.
WHOLE = schemathesis.Config.from_dict({"output": {"sanitization": {"enabled": False}}})
# The fields without which a request asks for nothing.
ESSENTIAL = {"model", "messages", "prompt", "input", "query", "items", "label_token_ids", "tokens"}
VALID_SHARE = 0.75
# Token ids that are text in the tokenizers of SmolLM2 and of the tests' models.
TOKEN_IDS = range(260, 500)
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")


class Tally:
    """Statuses by document and operation, and all failures; the first of each kind is printed.

    Repeated requests are not counted, so an operation without input counts once.
    """

    def __init__(self) -> None:
        self.statuses: dict[str, dict[str, collections.Counter[str]]] = {}
        self.failures: list[dict[str, Any]] = []
        self.server_lives = True
        self._seen: set[tuple[str, int, str]] = set()
        self._requests: set[str] = set()

    def add(self, document: str, operation: str, case: Case, status: int, answer: str) -> None:
        request = f"{document} {case.as_curl_command()}"
        if request in self._requests and 0 < status < 500:
            return
        self._requests.add(request)
        counter = self.statuses.setdefault(document, {}).setdefault(
            operation, collections.Counter()
        )
        counter[str(status)] += 1
        if status >= 500 or status == 0:
            failure = {
                "operation": operation,
                "status": status,
                "answer": answer[:500],
                "request": case.as_curl_command()[:4000],
            }
            kind = (operation, status, answer[:100])
            if kind not in self._seen:
                print(json.dumps(failure, indent=2), flush=True)
                self._seen.add(kind)
            self.failures.append(failure)

    def cases(self) -> int:
        return sum(counter.total() for one in self.statuses.values() for counter in one.values())


def served_part(openai: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's document with only the operations that this server has as well."""
    paths = {}
    for path, item in openai["paths"].items():
        known = ours["paths"].get(f"/v1{path}", {})
        kept = {method: value for method, value in item.items() if method in known}
        if kept:
            paths[path] = kept
    # Keys are left out, because this server asks for none.
    components = {**openai["components"], "securitySchemes": {}}
    return {**openai, "paths": paths, "components": components, "security": []}


def completed(ours: dict[str, Any]) -> dict[str, Any]:
    """This server's document with a body for /invocations, which accepts that of other routes."""
    body = ours["paths"]["/v1/completions"]["post"]["requestBody"]
    route = {"post": {**ours["paths"]["/invocations"]["post"], "requestBody": body}}
    return {**ours, "paths": {**ours["paths"], "/invocations": route}}


def operations(document: dict[str, Any]) -> Iterator[APIOperation]:
    schema = schemathesis.openapi.from_dict(document, config=WHOLE)
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path not in LEFT_OUT:
            yield operation


def shortened(body: Any) -> Any:
    """The body with its lengths of answers limited to SHORT."""
    if not isinstance(body, dict):
        return body
    changes = {
        name: SHORT for name in LENGTHS if isinstance(body.get(name), int) and body[name] > SHORT
    }
    return {**body, **changes}


def valid_essentials(path: str, source: random.Random) -> dict[str, Any]:
    """Valid values of the essential fields of a route that generates text, without the model."""
    text = " ".join(source.choices(("one", "Two", "3,", "fo\u00fcr", "\u4e94", "\U0001f642"), k=8))
    conversation = [{"role": "user", "content": text}]
    tokens = source.sample(TOKEN_IDS, 3)
    routes: dict[str, dict[str, Any]] = {
        "/invocations": {"prompt": text},
        "/completions": {"prompt": source.choice((text, tokens))},
        "/chat/completions": {"messages": conversation},
        "/chat/completions/batch": {"messages": [conversation, conversation]},
        "/responses": {"input": text},
        "/messages": {"messages": conversation},
        "/generative_scoring": {"query": text, "items": [text], "label_token_ids": tokens},
    }
    return routes.get(path.removeprefix("/v1"), {})


def plausible(body: Any, path: str, model: str, source: random.Random) -> Any:
    """A body with the served model's name, the essential fields and at most two of its others.

    It may pass all checks, so it gets a length even if it had none.
    """
    if not isinstance(body, dict):
        return body
    others = sorted(set(body) - ESSENTIAL)
    chosen = source.sample(others, min(source.randint(0, 2), len(others)))
    generated = {name: value for name, value in body.items() if name in ESSENTIAL}
    valid = valid_essentials(path, source) if source.random() < VALID_SHARE else {}
    kept = {name: body[name] for name in chosen} | (valid or generated)
    if "model" in body:
        kept["model"] = model
    length = "max_output_tokens" if "responses" in path else "max_tokens"
    return kept if kept.get(length) is not None else {**kept, length: SHORT}


def fuzz(
    target: Target,
    base: str,
    document: str,
    operation: APIOperation,
    cases: int,
    chosen: int,
    tally: Tally,
) -> None:
    """Send ``cases`` cases of one operation, half of them valid and half invalid."""
    name = f"{operation.method.upper()} {operation.path}"
    has_input = bool(operation.body) or any(True for _ in operation.iter_parameters())
    edits = st.none() | st.integers(0, 1 << 32) if operation.body else st.none()
    for mode in GenerationMode if has_input else (GenerationMode.POSITIVE,):
        strategy = operation.as_strategy(generation_mode=mode)

        @seed(chosen)
        @settings(
            max_examples=max(1, cases // 2),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy, edit=edits)
        def one(case: Case, edit: int | None) -> None:
            if edit is not None:
                source = random.Random(edit)
                case.body = plausible(case.body, operation.path, target.model, source)
            case.body = shortened(case.body)
            if not tally.server_lives:
                return
            try:
                response = case.call(base_url=base, timeout=300)
                status, answer = response.status_code, response.text
            except Exception as error:
                status, answer = 0, f"{type(error).__name__}: {error}"
                tally.server_lives = _lives(target)
            tally.add(document, name, case, status, answer)

        # If any text is valid, no invalid case exists.
        with contextlib.suppress(Unsatisfiable):
            one()


def _lives(target: Target) -> bool:
    try:
        return httpx.get(f"{target.url}/health", timeout=60).is_success
    except httpx.HTTPError:
        return False


def main() -> int:
    """Run it; the exit status is 1 after any 5xx or missing answer, or after too few cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--openai", type=Path, help="OpenAI's document as JSON")
    parser.add_argument("--cases", type=int, default=2000, help="least number of cases in total")
    parser.add_argument("--url", help="of a running server to use, in place of a new one")
    arguments = parse_arguments(parser, "reliability_fuzz.json")
    tally = Tally()
    if arguments.url:
        listed = httpx.get(f"{arguments.url}/v1/models", timeout=60).json()["data"][0]
        target = Target(arguments.url, 0, listed["id"], listed["max_model_len"])
        run(target, arguments, tally)
    else:
        with serving(arguments.model, arguments.flags) as target:
            run(target, arguments, tally)
    found = {"cases": tally.cases(), "statuses": tally.statuses, "failures": tally.failures}
    write_results(arguments.json, arguments.model, arguments.seed, arguments.flags, found)
    print(f"{tally.cases():,} cases, {len(tally.failures)} answered with 5xx or not at all")
    return 0 if not tally.failures and tally.cases() >= arguments.cases else 1


def run(target: Target, arguments: argparse.Namespace, tally: Tally) -> None:
    """Fuzz both documents; the cases are shared equally among all operations."""
    ours = httpx.get(f"{target.url}/openapi.json", timeout=60).json()
    chosen = [("server", target.url, operation) for operation in operations(completed(ours))]
    if arguments.openai is not None:
        theirs = served_part(json.loads(arguments.openai.read_text()), ours)
        chosen += [("openai", f"{target.url}/v1", operation) for operation in operations(theirs)]
    # Some operations have few distinct cases; the others make up for them.
    while tally.server_lives and tally.cases() < arguments.cases:
        before = tally.cases()
        share = -(-(arguments.cases - before) // len(chosen))
        for document, base, operation in chosen:
            fuzz(target, base, document, operation, share + 2, arguments.seed + before, tally)
        if tally.cases() == before:
            return


if __name__ == "__main__":
    sys.exit(main())
