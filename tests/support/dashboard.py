"""The page of /dashboard in a browser, and what its numbers should be by the text of /metrics."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from playwright.sync_api import Browser, Page, Response
from prometheus_client.parser import text_string_to_metric_families


@dataclass
class View:
    """A page that has looked at the loaded server, and what the browser told of it."""

    page: Page
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    answers: list[Response] = field(default_factory=list)

    def scrapes(self) -> list[tuple[float, str]]:
        """Time (Unix, seconds) and text of every scrape that the page shows.

        The times are those of the rows of its table, and an answer belongs to the row whose time
        its request had; one that a pause has overtaken is not shown and has none.
        """
        rows = self.page.locator("#throughput tbody tr").all()
        known = [row for row in rows if row.locator("td").first.text_content() != "–"]
        iso = [row.locator("time").get_attribute("datetime") for row in reversed(known)]
        times = [datetime.fromisoformat(time or "").timestamp() for time in iso]
        starts = [answer.request.timing["startTime"] / 1000 for answer in self.answers]
        nearest = [min(range(len(starts)), key=lambda i: abs(starts[i] - time)) for time in times]
        assert len(set(nearest)) == len(times) > 3
        return [(t, self.answers[i].text()) for t, i in zip(times, nearest, strict=True)]


def open_view(browser: Browser, url: str, **context: Any) -> View:
    page = browser.new_context(**context).new_page()
    view = View(page)

    def note(message: str) -> None:
        if "willReadFrequently" not in message:  # Tests read the pixels, the page does not.
            view.console.append(message)

    page.on("console", lambda message: note(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: view.console.append(f"error: {error}"))
    page.on("request", lambda request: view.requests.append(request.url))
    page.on("response", lambda r: view.answers.append(r) if r.url.endswith("/metrics") else None)
    page.add_init_script(
        "window.violations = []; addEventListener('securitypolicyviolation',"
        " (event) => violations.push(event.violatedDirective + ' ' + event.blockedURI))"
    )
    page.goto(f"{url}/dashboard")
    return view


def shown(page: Page, chart: str) -> dict[str, str]:
    """The legend of a chart: the value of each series as it is written there."""
    items = page.locator(f"#{chart} [data-series]").all()
    return {i.get_attribute("data-series") or "": i.locator(".value").inner_text() for i in items}


def seconds(text: str) -> float | None:
    """Of a written duration; None of the dash that stands for no observations."""
    if text == "–":
        return None
    value, unit = text.replace(",", "").split()
    return float(value) * {"ms": 1e-3, "s": 1}[unit]


def nbytes(text: str) -> float:
    value, _, unit = text.replace(",", "").partition(" ")
    return float(value) * {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


def values(text: str, name: str, **labels: str) -> list[float]:
    return [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]


def histogram(text: str, name: str) -> list[tuple[float, float]]:
    """Upper bounds and cumulative counts."""
    return [
        (float(sample.labels["le"]), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"{name}_bucket"
    ]


def quantile(
    q: float, before: list[tuple[float, float]], now: list[tuple[float, float]]
) -> float | None:
    """As Prometheus documents histogram_quantile: the observations of a bucket lie evenly in it.

    None without observations.
    """
    rank = q * (now[-1][1] - before[-1][1])
    lower = below = 0.0
    for (_, old), (bound, new) in zip(before, now, strict=True):
        if new - old >= rank and new - old > below:
            if bound == float("inf"):
                return lower
            return lower + (bound - lower) * (rank - below) / (new - old - below)
        lower, below = bound, new - old
    return None
