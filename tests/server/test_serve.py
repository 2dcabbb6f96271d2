"""`svdserve serve` and plain `vllm serve` of a factored checkpoint, as a client sees them."""

import json
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import write_checkpoint
from files import file_bytes
from models import random_tokens, save_model
from ports import free_port
from servers import (
    BIN,
    CHAT_TEMPLATE,
    DEADLINE,
    NAME,
    Server,
    is_alive,
    living_tree,
    refusal,
    running,
    wait_until,
)
from svdserve.compression.system.errors import UserError
from svdserve.server.cpu_install import serves_on_cpu
from svdserve.server.http import security, shutdown
from svdserve.server.serve import (
    allowed_plugins,
    check_model,
    refuse_compressed_draft,
    serve,
    server_arguments,
)
from svdserve.server.worker import EXTENSION

pytestmark = pytest.mark.vllm
FORMAT = ("--load-format", "svdserve")


@dataclass(frozen=True)
class Models:
    """A factored checkpoint, and the dense model whose weights are its factors' products."""

    factored: Path
    reference: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    dense = save_model("llama", folder / "dense")
    models = Models(folder / "factored", folder / "reference")
    write_checkpoint(
        dense, models.factored, layout="interpolative", shared=True, reference=models.reference
    )
    return models


@pytest.fixture(scope="module")
def server(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    template = folder / "chat.jinja"
    template.write_text(CHAT_TEMPLATE)
    command: list[str | Path] = [BIN / "svdserve", "serve", models.factored]
    with running([*command, "--chat-template", template], folder / "log") as server:
        yield server


def expected_tokens(models: Models, prompt: list[int], tokens: int) -> list[int]:
    """Greedy continuation by transformers and the products of the factors."""
    model = AutoModelForCausalLM.from_pretrained(models.reference, dtype=torch.float32)
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def served_tokens(server: Server, prompt: list[int], tokens: int) -> list[int]:
    """Greedy continuation by the server."""
    completion = server.client.completions.create(
        model=NAME,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    (choice,) = completion.choices
    assert choice.finish_reason == "length"
    assert completion.usage
    assert completion.usage.prompt_tokens == len(prompt)
    assert completion.usage.completion_tokens == tokens
    return choice.token_ids  # type: ignore[attr-defined, no-any-return]


def test_the_model_is_listed(server: Server) -> None:
    (listed,) = server.client.models.list().data
    assert (listed.id, listed.object) == (NAME, "model")
    assert listed.model_extra
    assert listed.model_extra["root"] == NAME  # not the directory, which is the server's own affair


def test_completions_are_the_greedy_tokens_of_the_product(server: Server, models: Models) -> None:
    prompt = random_tokens(1, 9)[0].tolist()
    assert served_tokens(server, prompt, 12) == expected_tokens(models, prompt, 12)


def test_streamed_completions_add_up(server: Server) -> None:
    request = {"model": NAME, "prompt": "w7 w8 w9", "max_tokens": 10, "temperature": 0}
    whole = server.client.completions.create(**request)
    # OpenAI's type of this answer forbids the null finish_reason that its own API streams, too.
    lenient = server.make_client(strict=False)
    pieces = list(lenient.completions.create(**request, stream=True))
    assert len(pieces) > 2
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


def test_chat_is_the_completion_of_the_rendered_template(server: Server) -> None:
    messages = [{"role": "user", "content": "w7 w8 w9"}]
    request = {"model": NAME, "messages": messages, "max_tokens": 10, "temperature": 0}
    answer = server.client.chat.completions.create(**request)
    completion = server.client.completions.create(
        model=NAME, prompt="w7 w8 w9 ", max_tokens=10, temperature=0
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].message.content.strip() == completion.choices[0].text.strip()
    chunks = list(
        server.client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage == answer.usage


def test_an_unknown_model_is_refused(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="nothing-of-that-name"):
        server.client.completions.create(model="nothing-of-that-name", prompt="w1")


def test_a_bad_request_is_not_counted_as_a_fault_of_the_server(server: Server) -> None:
    with server.http() as client:
        question = {"state": "w1", "questions": {"a": {"type": "boolean"}}}
        assert client.post("/v1/systemone", json=question).status_code == 404
        careless = {"model": NAME, "prompt": "w1", "structured_outputs": True}
        assert client.post("/v1/completions", json=careless).status_code == 400
    counted = re.findall(r"^http_requests_total\S*", server.get("/metrics"), re.MULTILINE)
    assert any('"4xx"' in one and "/v1/completions" in one for one in counted)
    assert not [one for one in counted if '"5xx"' in one]


def test_gauges_agree_with_the_files(server: Server, models: Models) -> None:
    gauges, stored = server.gauges(), file_bytes(models.factored)
    assert gauges["svdserve_weights_bytes"] == stored
    assert gauges["svdserve_dense_equivalent_bytes"][""] == file_bytes(models.reference)["dense"]
    assert 0.3 < gauges["svdserve_keep_ratio"][""] < 0.9
    assert gauges["svdserve_model_info"] == {"": 1}
    assert 0 < gauges["svdserve_model_load_seconds"][""] < DEADLINE


def test_every_process_has_its_memory(server: Server) -> None:
    gauges = server.gauges()["svdserve_process_resident_bytes"]
    assert set(gauges) == {"api_server_0", "engine_core", "worker_0"}
    memory = {p.pid: p.memory_info().rss for p in living_tree(server.process.pid)}
    assert gauges["api_server_0"] == pytest.approx(memory[server.process.pid], rel=0.05)
    # The three are all there is, but for Python's resource trackers.
    assert sum(gauges.values()) == pytest.approx(sum(memory.values()), rel=0.05)


def test_the_model_route_tells_the_same(server: Server, models: Models) -> None:
    schema = server.client.get("/../openapi.json", cast_to=object)
    assert "/svdserve/model" in schema["paths"]  # type: ignore[index]
    served = server.client.get("/../svdserve/model", cast_to=object)
    stored = file_bytes(models.factored)
    assert served["name"] == NAME  # type: ignore[index]
    facts = served["model"]  # type: ignore[index]
    assert (facts["lowrank_bytes"], facts["dense_bytes"]) == (stored["lowrank"], stored["dense"])


def test_token_rates_rise_under_load_and_return_to_zero(server: Server) -> None:
    """Checked against vLLM's own counter: the rate is never more than all tokens in one second."""

    def rates() -> dict[str, float]:
        gauges = server.gauges()
        kinds = ("generation", "prompt")
        return {kind: gauges[f"svdserve_{kind}_tokens_per_second"][""] for kind in kinds}

    server.client.completions.create(
        model=NAME, prompt=random_tokens(1, 50)[0].tolist(), max_tokens=200
    )
    wait_until(lambda: min(rates().values()) > 0)
    text = server.get("/metrics")
    (total,) = re.findall(r"^vllm:generation_tokens_total\S* (\S+)", text, re.MULTILINE)
    assert rates()["generation"] <= float(total)
    wait_until(lambda: rates() == {"generation": 0, "prompt": 0})


def test_a_second_sigterm_ends_the_server_and_its_children_at_once(server: Server) -> None:
    """Last of the tests of this server: what still runs is cut off, and nothing stays behind."""
    tree = living_tree(server.process.pid)
    assert len(tree) >= 3
    request = {"model": NAME, "prompt": "w7", "max_tokens": 240, "n": 100, "stream": True}
    with (
        server.http() as client,
        client.stream("POST", "/v1/completions", json={**request, "ignore_eos": True}) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.terminate()
        wait_until(lambda: health(server) == 503)
        server.process.terminate()
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    assert server.process.wait(120) == 0
    wait_until(lambda: not any(is_alive(process) for process in tree))


def health(server: Server) -> int:
    with server.http() as client:
        return client.get("/health").status_code


def test_plain_vllm_serves_the_same_checkpoint(models: Models, tmp_path: Path) -> None:
    with running([BIN / "vllm", "serve", models.factored], tmp_path / "log") as server:
        prompt = random_tokens(1, 9)[0].tolist()
        assert served_tokens(server, prompt, 12) == expected_tokens(models, prompt, 12)
        assert server.gauges() == {}


def test_a_refusal_is_one_line(models: Models, tmp_path: Path) -> None:
    assert f"{tmp_path / 'absent'}: no such directory" in refusal(tmp_path / "absent")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in refusal(models.factored, "--port", port)


def test_bad_directories_are_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        check_model(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((models.factored / name).read_bytes())
    assert check_model(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-40])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        check_model(tmp_path)


@pytest.mark.parametrize("port", ["https", "70000", "-1"])
def test_bad_ports_are_refused(models: Models, port: str) -> None:
    with pytest.raises(UserError, match="--port"):
        server_arguments(str(models.factored), ["--port", port])


def test_given_flags_are_kept(models: Models) -> None:
    given = ["--host=localhost", "--port", str(free_port()), "--worker-extension-cls", "own.Class"]
    given += ["--served-model-name", "own", "--shutdown-timeout=0"]
    middleware = []
    for module in (security, shutdown):
        middleware += ["--middleware", module.MIDDLEWARE]
    assert server_arguments(str(models.factored), given) == given + middleware
    defaults = ["--served-model-name", "factored", "--shutdown-timeout", "30"]
    ours = server_arguments(str(models.factored), ["--uds", "socket"])
    extension = ["--worker-extension-cls", EXTENSION]
    assert ours == ["--uds", "socket", *defaults, *extension, *middleware]


def test_a_dense_model_gets_our_kernels_unless_told_otherwise(
    models: Models, tmp_path: Path
) -> None:
    flags = ["--uds", "socket"]
    ours = ["--load-format", "svdserve"] if serves_on_cpu() else []
    chosen = [word for word in server_arguments(str(models.reference), flags) if word in FORMAT]
    assert chosen == ours
    stock = [*flags, "--load-format", "auto"]
    assert server_arguments(str(models.reference), stock)[:4] == stock
    assert "svdserve" not in server_arguments(str(models.reference), stock)
    assert "svdserve" not in server_arguments(str(models.factored), flags)
    quantized = shutil.copytree(models.reference, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (quantized / "config.json").write_text(json.dumps(config))
    assert "svdserve" not in server_arguments(str(quantized), flags)


def test_flags_of_a_config_file_are_kept(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "flags.yaml"
    flags = ["--config", str(file)]
    own = {"host": "0.0.0.0", "port": free_port(), "served_model_name": ["a", "b"]}
    file.write_text(json.dumps({**own, "shutdown-timeout": 3, "enforce-eager": True}))
    arguments = server_arguments(str(models.factored), flags)
    assert arguments[:2] == flags
    assert not {"--host", "--served-model-name", "--shutdown-timeout"} & set(arguments)
    assert "--api-keys-file" in capsys.readouterr().err  # it is open to all
    assert "--host" in server_arguments(str(models.factored), [*flags, "--host", "127.0.0.1"])

    file.write_text('{"kv-cache-memory-bytes": "9999999999999999"}')
    with pytest.raises(UserError, match="9,999,999,999,999,999 bytes of KV cache"):
        server_arguments(str(models.factored), flags)
    for text in ("api-key: secret", "api_key: [secret]"):
        file.write_text(text)
        with pytest.raises(UserError, match="--api-keys-file") as refused:
            server_arguments(str(models.factored), flags)
        assert "secret" not in str(refused.value)
    for text in ("- port", "{", "\0"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"--config .*flags\.yaml"):
            server_arguments(str(models.factored), flags)
    file.unlink()
    with pytest.raises(UserError, match=r"flags\.yaml"):
        server_arguments(str(models.factored), flags)


def test_a_compressed_draft_is_refused_before_vllm_starts(models: Models, tmp_path: Path) -> None:
    small, dense = str(models.factored), str(models.reference)
    file = tmp_path / "flags.yaml"
    settings = {"model": small, "num_speculative_tokens": 2}
    file.write_text(json.dumps({"speculative-config": settings}))
    for flags in (
        ["--speculative-config", json.dumps(settings)],
        [f"--speculative_config={json.dumps(settings)}"],
        ["-sc", json.dumps(settings)],
        ["--speculative-config.model", small, "--speculative-config.num_speculative_tokens", "2"],
        [f"-sc.model={small}"],
        ["--spec-model", small],
        ["--config", str(file)],
    ):
        with pytest.raises(UserError, match=f"^{small}: .* give its dense model as the draft"):
            serve(dense, flags)
    for allowed in ({"model": dense}, {"method": "ngram"}, {"model": "org/name"}, "{"):
        text = allowed if isinstance(allowed, str) else json.dumps(allowed)
        refuse_compressed_draft(["--speculative-config", text])


def test_the_allow_list_takes_no_plugin_away() -> None:
    assert allowed_plugins("theirs") == ["svdserve", "theirs"]
    general = {entry.name for entry in entry_points(group="vllm.general_plugins")}
    assert len(general) > 1
    assert general <= set(allowed_plugins(None))


def test_the_log_holds_no_path(server: Server, models: Models) -> None:
    """The model's is among the arguments that vLLM logs, and traces and caches have theirs."""
    log = server.log.read_text()
    assert "non-default args" in log
    assert str(models.factored) not in log
    paths = set(re.findall(r"(?<![\w.~-])/+[\w.-]+/[\w./-]+", log))
    assert not [path for path in paths if Path("/", Path(path).parts[1]).is_dir()]
