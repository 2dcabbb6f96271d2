// The memory of the server by part, beside what it would be with dense weights.

import { bytes, element, percent } from "./format.js";
import { mean, sum } from "./metrics.js";

/** Bytes of each part now, and if all weights were dense. */
export function split(samples) {
  // What the workers hold; the files' bytes where another loader than svdserve's has loaded.
  const weights = (kind) =>
    sum(samples, "svdserve_worker_weights_bytes", { kind }) ??
    sum(samples, "svdserve_weights_bytes", { kind }) ?? 0;
  const [lowrank, dense] = [weights("lowrank"), weights("dense")];
  const equivalent =
    sum(samples, "svdserve_worker_dense_equivalent_bytes") ??
    sum(samples, "svdserve_dense_equivalent_bytes") ?? 0;
  const cache = sum(samples, "svdserve_kv_cache_bytes") ?? 0;
  // Weights and cache lie in the accelerator's memory where there is one, else in the processes'.
  const device = sum(samples, "svdserve_device_memory_bytes");
  const total = device ?? sum(samples, "svdserve_process_resident_bytes") ?? 0;
  const rest = Math.max(0, total - lowrank - dense - cache);
  return {
    onDevice: device !== null,
    cacheUsed: mean(samples, "vllm:kv_cache_usage_perc"),
    parts: [
      { id: "lowrank", name: "Low-rank weights", now: lowrank, dense: 0 },
      { id: "dense", name: "Dense weights", now: dense, dense: equivalent },
      { id: "cache", name: "KV cache", now: cache, dense: cache },
      {
        id: "rest",
        name: device === null ? "Rest of process memory" : "Rest of reserved device memory",
        now: rest,
        dense: rest,
      },
    ],
  };
}

/** Show the bars, the table and the sentences around them. */
export function showMemory({ parts, cacheUsed, onDevice }) {
  const total = (column) => parts.reduce((bytes, part) => bytes + part[column], 0);
  const [now, dense] = [total("now"), total("dense")];
  const byId = (id) => document.getElementById(id);
  byId("memory-bars").replaceChildren(
    bar("This server", parts, "now", Math.max(now, dense)),
    bar("If dense", parts, "dense", Math.max(now, dense)),
  );
  const row = (name, id, values) => {
    const swatch = element("span", { class: `swatch part-${id}`, "aria-hidden": "true" });
    const cells = values.map((value) => element("td", { class: "number" }, bytes(value)));
    const head = element("th", { scope: "row" }, swatch, name);
    return element("tr", { "data-part": id }, head, ...cells);
  };
  byId("memory").tBodies[0].replaceChildren(
    ...parts.map((part) => row(part.name, part.id, [part.now, part.dense])),
    row("Total", "total", [now, dense]),
  );
  const weights = (column) => parts[0][column] + parts[1][column];
  const saved = 1 - weights("now") / weights("dense");
  byId("memory-saving").textContent =
    parts[0].now > 0 ? `weights ${percent(saved)} smaller than dense` : "";
  byId("memory-note").textContent =
    `${cacheUsed === null ? "" : `KV cache in use: ${percent(cacheUsed)}. `}` +
    (onDevice ? "Accelerator memory of all workers. " : "Resident memory of all processes. ") +
    "If dense: computed, with the same KV cache and the same rest.";
}

function bar(name, parts, column, full) {
  const track = element("div", { class: "track" });
  for (const part of parts) {
    if (part[column] === 0) continue;
    const segment = element("div", { class: `part-${part.id}` });
    segment.style.width = `${(100 * part[column]) / full}%`; // Allowed: no style attribute's text.
    track.append(segment);
  }
  return element("div", { class: "bar" }, element("span", {}, name), track);
}
