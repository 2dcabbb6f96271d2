// Polls /metrics and shows what it tells; everything is relative to the page's own address.

import { Chart } from "./charts.js";
import { bytes, clock, count, percent, rate, ratio, seconds, secondsTick } from "./format.js";
import { showGroups } from "./groups.js";
import { showMemory, split } from "./memory.js";
import { buckets, gained, parse, quantile, sum } from "./metrics.js";

const PERIOD_SECONDS = 2;
const TIMEOUT_SECONDS = 8;
const WINDOW_SECONDS = 10; // of the quantiles; the tokens per second have the same
const QUANTILES = { p50: 0.5, p95: 0.95, p99: 0.99 };
const KEY = "svdserve-api-key";
const HISTOGRAMS = {
  ttft: "vllm:time_to_first_token_seconds",
  itl: "vllm:inter_token_latency_seconds",
};

const byId = (id) => document.getElementById(id);
const latency = {
  series: Object.keys(QUANTILES),
  format: seconds,
  tick: secondsTick,
  least: 0.01,
};
const charts = Object.fromEntries(
  [
    {
      id: "throughput", title: "Throughput",
      note: `tokens/s, mean of the last ${WINDOW_SECONDS} s`,
      series: ["generated", "prompt"], format: rate, tick: count, least: 10,
    },
    {
      id: "requests", title: "Requests", note: "in the engine",
      series: ["running", "waiting"], format: count, tick: count, least: 4,
    },
    {
      id: "ttft", title: "Time to first token",
      note: `requests of the last ${WINDOW_SECONDS} s`, ...latency,
    },
    {
      id: "itl", title: "Inter-token latency",
      note: `tokens of the last ${WINDOW_SECONDS} s`, ...latency,
    },
  ].map((spec) => [spec.id, new Chart(byId("charts"), spec)]),
);

let scrapes = []; // [{time, histograms}] of the last WINDOW_SECONDS, oldest first
let factsKnown = false;
let lastAnswer = null; // Unix time in seconds
let timer;
let round = 0; // A poll that another one, or a pause, has overtaken shows nothing.

class Refused extends Error {
  constructor(status) {
    super(`HTTP ${status}`);
    this.status = status;
  }
}

async function get(path) {
  const key = sessionStorage.getItem(KEY);
  const answer = await fetch(path, {
    cache: "no-store",
    headers: key ? { Authorization: `Bearer ${key}` } : {},
    signal: AbortSignal.timeout(TIMEOUT_SECONDS * 1000),
  });
  if (!answer.ok) throw new Refused(answer.status);
  return answer;
}

async function poll() {
  clearTimeout(timer);
  const mine = ++round;
  const time = Date.now() / 1000;
  try {
    const samples = parse(await (await get("metrics")).text());
    const facts = factsKnown ? null : await fetchFacts();
    if (mine !== round) return;
    if (facts !== null) showFacts(facts);
    show(time, samples);
    lastAnswer = time;
    setState("live", `Live, every ${PERIOD_SECONDS} s`);
  } catch (failure) {
    if (mine !== round) return;
    scrapes = [];
    factsKnown = false; // Another model may be served when it is back.
    for (const chart of Object.values(charts)) chart.add(time, chart.spec.series.map(() => null));
    explain(failure);
  }
  timer = setTimeout(poll, PERIOD_SECONDS * 1000);
}

function show(time, samples) {
  const histograms = Object.fromEntries(
    Object.entries(HISTOGRAMS).map(([id, name]) => [id, buckets(samples, name)]),
  );
  // Half a period of tolerance: scrapes do not come at exact times.
  const oldest = time - WINDOW_SECONDS - PERIOD_SECONDS / 2;
  scrapes = [...scrapes.filter((scrape) => scrape.time >= oldest), { time, histograms }];
  for (const [id, now] of Object.entries(histograms)) {
    const difference = gained(scrapes[0].histograms[id], now);
    if (difference === null) {
      scrapes = scrapes.slice(-1); // The server was restarted between two scrapes.
      factsKnown = false;
    }
    charts[id].add(time, Object.values(QUANTILES).map((q) => quantile(q, difference ?? [])));
  }
  charts.throughput.add(time, [
    sum(samples, "svdserve_generation_tokens_per_second"),
    sum(samples, "svdserve_prompt_tokens_per_second"),
  ]);
  charts.requests.add(time, [
    sum(samples, "vllm:num_requests_running"),
    sum(samples, "vllm:num_requests_waiting"),
  ]);
  showMemory(split(samples));
}

/** Both are absent where the served model is no local directory. */
async function fetchFacts() {
  try {
    const [served, groups] = await Promise.all([get("svdserve/model"), get("svdserve/groups")]);
    return { served: await served.json(), groups: await groups.json() };
  } catch (failure) {
    if (failure.status === 404) return { served: null, groups: null };
    throw failure;
  }
}

function showFacts({ served, groups }) {
  factsKnown = true;
  showGroups(groups);
  if (served === null) {
    byId("facts").textContent = "The served model is no local directory: no facts about it.";
    return;
  }
  const { name, model, load_seconds: loading } = served;
  const stored = model.lowrank_bytes + model.dense_bytes;
  const share = percent(stored / model.dense_equivalent_bytes);
  byId("model").textContent = name;
  byId("facts").textContent = [
    model.method === "dense" ? "dense" : `${model.method}, ${model.layout}`,
    `κ = ${ratio(model.keep_ratio)}`,
    `${bytes(stored)} of weights, ${share} of dense`,
    ...(loading === null ? [] : [`loaded in ${seconds(loading)}`]),
  ].join(" · ");
  document.title = `${name} · svdserve`;
}

/** Say plainly why nothing is shown. */
function explain(failure) {
  const since = lastAnswer === null ? ""
    : ` Its last answer came at ${clock(lastAnswer)}; memory and groups are of that time.`;
  if (failure.status === 401 || failure.status === 403) {
    const refused = sessionStorage.getItem(KEY) !== null;
    const title = refused ? "The server refuses this API key" : "The server asks for an API key";
    setState("key", title, "Its metrics are not public. Enter a key that it accepts.");
  } else if (failure.status === 404) {
    setState("off", "Metrics are switched off", "The server answers, but not at /metrics.");
  } else if (failure instanceof Refused) {
    const text = `/metrics: ${failure.message}.${since}`;
    setState("failing", "The server answers with an error", text);
  } else {
    setState("unreachable", "The server is unreachable",
      `It does not answer.${since} ` +
        `Trying again every ${PERIOD_SECONDS} s.`);
  }
}

/** One short status, which screen readers hear when it changes; a notice for all but good news. */
function setState(state, title, text = null) {
  const status = byId("status");
  if (status.textContent !== title) status.textContent = title;
  status.dataset.state = document.body.dataset.state = state;
  byId("problem").hidden = text === null;
  byId("problem-title").textContent = title;
  byId("problem-text").textContent = text ?? "";
  byId("key-form").hidden = state !== "key";
}

byId("pause").addEventListener("click", () => {
  const paused = byId("pause").getAttribute("aria-pressed") === "false";
  byId("pause").setAttribute("aria-pressed", String(paused));
  if (!paused) {
    poll();
    return;
  }
  clearTimeout(timer);
  round += 1;
  setState("paused", "Paused");
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value);
  byId("key").value = "";
  poll();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const chart of Object.values(charts)) chart.recolour();
});
poll();
