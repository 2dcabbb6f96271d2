// Prometheus' text format, and quantiles of histograms as histogram_quantile computes them.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** Samples by name: Map of name to [{labels, value}]. */
export function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    if (line === "" || line[0] === "#") continue;
    const match = SAMPLE.exec(line);
    if (match === null) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    }
    if (!samples.has(match[1])) samples.set(match[1], []);
    samples.get(match[1]).push({ labels, value: number(match[3]) });
  }
  return samples;
}

function number(text) {
  return { "+Inf": Infinity, "-Inf": -Infinity }[text] ?? Number(text);
}

/** Sum over all label sets that have these labels; null where there is no such sample. */
export function sum(samples, name, labels = {}) {
  const wanted = Object.entries(labels);
  const found = (samples.get(name) ?? []).filter((sample) =>
    wanted.every(([label, value]) => sample.labels[label] === value),
  );
  return found.length === 0 ? null : found.reduce((total, { value }) => total + value, 0);
}

/** Mean over all label sets, for ratios; null where there is no such sample. */
export function mean(samples, name) {
  const total = sum(samples, name);
  return total === null ? null : total / samples.get(name).length;
}

/** Cumulative counts by upper bound, ascending, added up over all label sets. */
export function buckets(samples, name) {
  const counts = new Map();
  for (const { labels, value } of samples.get(`${name}_bucket`) ?? []) {
    const bound = number(labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return [...counts].sort(([a], [b]) => a - b);
}

/** What a histogram gained between two scrapes; null if it was reset in between. */
export function gained(before, after) {
  const earlier = new Map(before);
  const difference = after.map(([bound, count]) => [bound, count - (earlier.get(bound) ?? 0)]);
  return difference.some(([, count]) => count < 0) ? null : difference;
}

/**
 * The q-quantile, linear within its bucket; null without observations.
 * Beyond the last finite bound that bound is all that is known, and it is returned.
 */
export function quantile(q, cumulative) {
  const total = cumulative.at(-1)?.[1] ?? 0;
  if (total === 0) return null;
  const rank = q * total;
  const index = cumulative.findIndex(([, count]) => count >= rank);
  const [bound, count] = cumulative[index];
  if (bound === Infinity) return cumulative.at(-2)?.[0] ?? null;
  const [lower, below] = index > 0 ? cumulative[index - 1] : [0, 0];
  return count === below ? bound : lower + ((bound - lower) * (rank - below)) / (count - below);
}
