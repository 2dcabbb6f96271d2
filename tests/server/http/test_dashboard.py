"""GET /dashboard in a real browser, on the real server under load."""

import json
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from browser import VIEWS, chromium
from checkpoints import write_checkpoint
from dashboard import View, histogram, nbytes, open_view, quantile, seconds, shown, values
from models import save_model
from ports import free_port
from proxies import proxy
from svdserve.bench.launch import running
from traffic import load

pytestmark = pytest.mark.vllm

SCREENSHOTS = Path(__file__).parents[3] / "build/screenshots"
NAME = "pico"
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
WINDOW_SECONDS, PERIOD_SECONDS = 10, 2
LOAD_SECONDS = 20
PATIENCE_MS = 60_000
HOST = "127.0.0.1"
KEY = "a key of the proxy"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if shutil.which("chromium") is None:
        pytest.skip("Chromium is not installed (Debian package chromium)")
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    dense = save_model("llama", folder / "dense")
    directory = write_checkpoint(dense, folder / "small", layout="interpolative", shared=True)
    errors = {name: 0.01 * i for i, name in enumerate(modules_of(directory))}
    lines = [{"event": "group", "module": name, "error": e} for name, e in errors.items()]
    (directory / "svdserve_log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return directory


def modules_of(directory: Path) -> dict[str, Any]:
    config = json.loads((directory / "config.json").read_text())
    return config["quantization_config"]["modules"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def server(
    browser: Browser,  # noqa: ARG001  (where there is none, no server is started)
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, int]]:
    """The address and the process id."""
    flags = ["--served-model-name", NAME, "--enforce-eager", "--dtype", "float32"]
    flags += ["--max-model-len", "256", "--kv-cache-memory-bytes", str(256 << 20)]
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "HF_HUB_OFFLINE"):
            patch.setenv(variable, "1")
        log = tmp_path_factory.mktemp("server") / "log"
        with running(checkpoint, HOST, free_port(), log, flags) as server:
            yield server.url, server.pid


@pytest.fixture(scope="module")
def views(browser: Browser, server: tuple[str, int]) -> dict[str, View]:
    """Each view after the same load, paused so that nothing changes any more."""
    url, _ = server
    opened = {name: open_view(browser, url, **context) for name, context in VIEWS.items()}
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with load(url, NAME):
        next(iter(opened.values())).page.wait_for_timeout(1000 * LOAD_SECONDS)
        for name, view in opened.items():
            # A slow machine may answer nothing for a whole window.
            for value in view.page.locator(":is(#ttft, #itl) .value").all():
                expect(value).not_to_have_text("–", timeout=PATIENCE_MS)
            view.page.get_by_role("button", name="Pause").click()
            summary = view.page.locator("#throughput summary")
            summary.click()
            view.page.locator("#throughput tbody tr").first.wait_for()
            summary.click()
            view.page.screenshot(path=SCREENSHOTS / f"dashboard_{name}.png", full_page=True)
    return opened


@pytest.mark.parametrize("name", VIEWS)
def test_nothing_leaves_the_host_and_nothing_fails(
    views: dict[str, View], server: tuple[str, int], name: str
) -> None:
    view, (url, _) = views[name], server
    assert view.console == []
    assert view.page.evaluate("violations") == []
    assert len(view.requests) > 10
    assert {request for request in view.requests if not request.startswith(f"{url}/")} == set()
    assert view.page.get_by_role("status").inner_text() == "Paused"


def test_the_policy_forbids_what_the_page_does_not_need(
    views: dict[str, View], server: tuple[str, int]
) -> None:
    """By the header, and by trying: an inline script, a style attribute, another host."""
    url, _ = server
    for path in ("/dashboard", "/dashboard/app.js", "/dashboard/vendor/uplot.min.js"):
        with urllib.request.urlopen(url + path) as answer:
            policy = answer.headers["Content-Security-Policy"]
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
        directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
        assert directives["default-src"] == directives["form-action"] == "'none'"
        sources = {directives[f"{kind}-src"] for kind in ("script", "style", "connect")}
        assert sources == {"'self'"}
    page = views["dark"].page.context.new_page()
    page.goto(f"{url}/dashboard")
    outcome = page.evaluate(
        """async () => {
          const script = document.createElement("script");
          script.textContent = "window.injected = true";
          document.body.append(script);
          document.body.setAttribute("style", "opacity: 0.5");
          const answer = await fetch("http://127.0.0.2:9/").then(() => "sent", () => "refused");
          return [window.injected ?? false, getComputedStyle(document.body).opacity, answer];
        }"""
    )
    page.close()
    assert outcome == [False, "1", "refused"]


@pytest.mark.parametrize("path", ["%2e%2e/__init__.py", "vendor", "absent.js", "/etc/passwd"])
def test_only_the_pages_own_files_are_served(server: tuple[str, int], path: str) -> None:
    url, _ = server
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"{url}/dashboard/{path}")
    assert refusal.value.code == 404


@pytest.mark.parametrize("name", VIEWS)
def test_numbers_agree_with_the_metrics_that_the_page_has_read(
    views: dict[str, View], name: str
) -> None:
    view = views[name]
    times, texts = zip(*view.scrapes(), strict=True)
    last = texts[-1]
    for kind, series in (("generation", "generated"), ("prompt", "prompt")):
        (rate,) = values(last, f"svdserve_{kind}_tokens_per_second")
        text = shown(view.page, "throughput")[series].replace(",", "")
        assert float(text) == pytest.approx(rate, rel=0.006)
        assert rate > 0
    for series in ("running", "waiting"):
        (requests,) = values(last, f"vllm:num_requests_{series}")
        assert float(shown(view.page, "requests")[series]) == requests
    oldest = times[-1] - WINDOW_SECONDS - PERIOD_SECONDS / 2
    first = next(i for i, time in enumerate(times) if time >= oldest)
    for chart, metric in (("ttft", "time_to_first_token"), ("itl", "inter_token_latency")):
        before, now = (histogram(texts[i], f"vllm:{metric}_seconds") for i in (first, -1))
        expected = {series: quantile(q, before, now) for series, q in QUANTILES.items()}
        found = {series: seconds(value) for series, value in shown(view.page, chart).items()}
        assert found == pytest.approx(expected, rel=0.006), chart


def test_memory_adds_up_to_the_gauges(views: dict[str, View]) -> None:
    view = views["light"]
    _, last = view.scrapes()[-1]
    rows = view.page.locator("#memory tbody tr").all()
    cells = {r.get_attribute("data-part"): r.locator("td").all_inner_texts() for r in rows}
    now = {part: nbytes(row[0]) for part, row in cells.items()}
    dense = {part: nbytes(row[1]) for part, row in cells.items()}
    near = lambda value: pytest.approx(value, rel=0.006)  # noqa: E731
    for kind in ("lowrank", "dense"):
        assert now[kind] == near(sum(values(last, "svdserve_worker_weights_bytes", kind=kind)))
    assert now["cache"] == dense["cache"] == near(256 << 20)
    resident = sum(values(last, "svdserve_process_resident_bytes"))
    assert now["total"] == near(resident)
    assert dense["lowrank"] == 0
    assert dense["dense"] == near(sum(values(last, "svdserve_worker_dense_equivalent_bytes")))
    assert dense["dense"] > now["lowrank"] + now["dense"]
    widths = view.page.evaluate(
        "[...document.querySelectorAll('.bar:first-child .track > div')]"
        ".map((part) => part.getBoundingClientRect().width)"
    )
    assert widths[3] / widths[2] == pytest.approx(now["rest"] / now["cache"], rel=0.05)


def test_groups_are_those_of_the_checkpoint(views: dict[str, View], checkpoint: Path) -> None:
    page = views["light"].page
    rows = page.locator("#groups tbody tr").all()
    found = {}
    for row in rows:
        layer, layout, rank, parameters, kept, error = row.locator("td").all_inner_texts()
        module = f"model.layers.{layer}.{row.locator('th').inner_text()}"
        found[module] = (layout, rank, int(parameters.replace(",", "")), kept, error)
    expected = {}
    for i, (module, spec) in enumerate(modules_of(checkpoint).items()):
        m, n, r = sum(spec["out"]), spec["in"], spec["rank"]
        parameters = r * (m + n - r)
        kept = f"{100 * parameters / (m * n):.1f} %"
        rank = f"{r} of {min(m, n)}"
        expected[module] = (spec["layout"], rank, parameters, kept, f"{0.01 * i:.4f}")
    assert found == expected


# Pixels of a canvas that have the colour of a series, up to anti-aliasing.
PIXELS = """([chart, series]) => {
  const canvas = document.querySelector(`#${chart} canvas`);
  const probe = document.createElement("canvas").getContext("2d");
  const root = getComputedStyle(document.documentElement);
  probe.fillStyle = root.getPropertyValue(`--series-${series}`);
  probe.fillRect(0, 0, 1, 1);
  const wanted = probe.getImageData(0, 0, 1, 1).data;
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let found = 0;
  for (let i = 0; i < data.length; i += 4)
    if (data[i + 3] > 128 && [0, 1, 2].every((c) => Math.abs(data[i + c] - wanted[c]) < 40))
      found += 1;
  return found;
}"""


@pytest.mark.parametrize("name", VIEWS)
def test_every_series_is_drawn_in_its_colour(views: dict[str, View], name: str) -> None:
    page = views[name].page
    drawn = {
        (chart, series): page.evaluate(PIXELS, [chart, series])
        for chart, count in (("throughput", 2), ("requests", 2), ("ttft", 3), ("itl", 3))
        for series in range(count)
    }
    assert {key: pixels for key, pixels in drawn.items() if pixels < 10} == {}


def test_charts_follow_a_change_of_the_colour_scheme(views: dict[str, View]) -> None:
    page = views["phone"].page
    page.emulate_media(color_scheme="dark")
    end = time.monotonic() + PATIENCE_MS / 1000
    while page.evaluate(PIXELS, ["throughput", 0]) < 10:  # The probe has the new colour.
        assert time.monotonic() < end
        page.wait_for_timeout(100)
    page.emulate_media(color_scheme="light")


def test_a_chart_is_also_a_table(views: dict[str, View]) -> None:
    """Opened with the keyboard; the newest row is the legend."""
    page = views["light"].page
    page.locator("#throughput summary").focus()
    page.keyboard.press("Enter")
    table = page.locator("#throughput table")
    table.locator("tbody tr").first.wait_for()
    rows = table.locator("tbody tr").all()
    assert rows[0].locator("td").all_inner_texts() == list(shown(page, "throughput").values())
    assert len(rows) >= len(views["light"].answers) - 1  # One may have come after the pause.
    assert re.fullmatch(r"\d\d:\d\d:\d\d", rows[0].locator("th").inner_text())
    assert "Throughput" in table.locator("caption").inner_text()
    page.keyboard.press("Enter")


def test_groups_are_sorted_with_the_keyboard(views: dict[str, View]) -> None:
    page = views["light"].page
    page.locator("#groups").get_by_role("button", name="Rank").focus()

    def ranks() -> list[int]:
        texts = page.locator("#groups tbody tr td:nth-child(4)").all_inner_texts()
        return [int(text.split()[0]) for text in texts]

    for direction, descending in (("ascending", False), ("descending", True)):
        page.keyboard.press("Enter")  # The focus stays where it was.
        assert page.locator("#groups th[aria-sort]").get_attribute("aria-sort") == direction
        assert ranks() == sorted(ranks(), reverse=descending)
    assert len(set(ranks())) > 2


def test_the_keyboard_reaches_everything_in_order(
    views: dict[str, View], server: tuple[str, int]
) -> None:
    page = views["dark"].page.context.new_page()
    page.goto(f"{server[0]}/dashboard")
    page.locator("#groups tbody tr").first.wait_for(timeout=PATIENCE_MS)
    reached = []
    for _ in range(8):  # to the groups' table and its first heading
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim()"))
        outline = page.evaluate(
            "(({outlineStyle, outlineWidth}) => [outlineStyle, outlineWidth])"
            "(getComputedStyle(document.activeElement))"
        )
        assert outline == ["solid", "3px"], reached
    assert reached[:2] == ["Skip to the charts", "Pause"]
    assert reached[2:6] == [
        f"{title} as a table"
        for title in ("Throughput", "Requests", "Time to first token", "Inter-token latency")
    ]
    page.close()


def test_the_page_fits_a_phone(views: dict[str, View]) -> None:
    """No sideways scrolling of the page, and none of its tables either."""
    page = views["phone"].page
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    overflowing = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth)"
        ".map((e) => e.innerText.slice(0, 40))"
    )
    assert overflowing == []


@pytest.mark.parametrize("name", VIEWS)
def test_axe_finds_nothing_serious(views: dict[str, View], name: str) -> None:
    found = Axe().run(views[name].page).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert serious == [], json.dumps(serious, indent=1)[:3000]


def test_the_hidden_table_and_the_notice_pass_axe_too(
    browser: Browser, server: tuple[str, int]
) -> None:
    url, _ = server
    view = open_view(browser, url, color_scheme="dark")
    view.page.locator("#itl summary").click()
    view.page.evaluate("document.getElementById('problem').hidden = false")
    view.page.evaluate("document.getElementById('key-form').hidden = false")
    view.page.locator("#problem-title").evaluate("(title) => { title.textContent = 'Notice'; }")
    found = Axe().run(view.page).response["violations"]
    view.page.context.close()
    assert [v for v in found if v["impact"] in ("serious", "critical")] == []


def test_it_asks_for_a_key_and_comes_back_after_an_outage(
    browser: Browser, server: tuple[str, int]
) -> None:
    """Behind a proxy below a path, which demands a key, goes away and comes back."""
    port = free_port()
    with proxy(server[0], port, KEY) as url:
        page = open_view(browser, url).page
        status, key = page.get_by_role("status"), page.get_by_role("textbox", name="API key")
        page.get_by_text("The server asks for an API key").first.wait_for(timeout=PATIENCE_MS)
        key.fill("a wrong one")
        page.get_by_role("button", name="Use this key").click()
        page.get_by_text("The server refuses this API key").first.wait_for(timeout=PATIENCE_MS)
        page.screenshot(path=SCREENSHOTS / "dashboard_key.png")
        key.fill(KEY)
        page.keyboard.press("Enter")
        status.filter(has_text="Live").wait_for(timeout=PATIENCE_MS)
        assert not key.is_visible()
        assert page.locator("#model").inner_text() == NAME
        assert KEY not in page.content()
    status.filter(has_text="The server is unreachable").wait_for(timeout=PATIENCE_MS)
    with proxy(server[0], port, KEY):
        status.filter(has_text="Live").wait_for(timeout=PATIENCE_MS)
        assert not page.locator("#problem").is_visible()
    page.context.close()


def test_it_says_that_the_server_is_gone(views: dict[str, View], server: tuple[str, int]) -> None:
    """Last of the tests of this server: it is killed."""
    page = views["light"].page
    page.get_by_role("button", name="Pause").click()  # goes on
    status = page.get_by_role("status")
    status.filter(has_text="Live").wait_for(timeout=PATIENCE_MS)
    root = psutil.Process(server[1])
    for process in (*root.children(recursive=True), root):
        process.kill()
    status.filter(has_text="The server is unreachable").wait_for(timeout=PATIENCE_MS)
    assert set(shown(page, "throughput").values()) == {"–"}
    assert re.search(r"last answer came at \d\d:\d\d:\d\d", page.locator("#problem").inner_text())
    page.screenshot(path=SCREENSHOTS / "dashboard_unreachable.png", full_page=True)
    serious = [
        violation
        for violation in Axe().run(page).response["violations"]
        if violation["impact"] in ("serious", "critical")
    ]
    assert serious == []
