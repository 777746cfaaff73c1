/** What becomes of a batch, by what metering answered; and how long to wait before the next try. Only computes. */

export const RETRY_MS_MIN = 200;
export const RETRY_MS_MAX = 30_000;
const RETRY_AFTER_MS_MAX = 3_600_000;

const TRY_AGAIN = new Set([408, 425, 429]);
const REFUSED = new Set([400, 413, 422]);

/**
 * @typedef {{ kind: "delivered" }
 *   | { kind: "later", why: string, ms: number }
 *   | { kind: "bad_events", problems: Map<number, object[]> }
 *   | { kind: "bad_batch", problem: object }
 *   | { kind: "no_gzip" }} Outcome
 */

/**
 * What an answer to a batch means.
 *
 * @param {{ status: number, contentType: string, retryAfter: string | null, body: string }} answer
 * @param {{ events: number, gzipped: boolean, now: number }} sent
 * @returns {Outcome}
 */
export function outcome(answer, { events, gzipped, now }) {
  const { status } = answer;
  if (status >= 200 && status < 300) return { kind: "delivered" };
  const said = problemOf(answer);
  const why = `${status} ${said.code ?? ""}`.trim();
  if (REFUSED.has(status) && said.code === "invalid_events") return badEvents(said, events);
  if (gzipped && [400, 411, 415].includes(status)) return { kind: "no_gzip" };
  // Only what is told in metering's own words is a verdict on events: a proxy in between may answer anything. One that
  // says "too large" of several may be helped.
  if ((REFUSED.has(status) && said.code) || (status === 413 && events > 1)) return { kind: "bad_batch", problem: said };
  if (TRY_AGAIN.has(status) || status >= 500) return { kind: "later", why, ms: retryAfter(answer.retryAfter, now) };
  return { kind: "later", why: `${why}: the address or the token is wrong`, ms: 0 };
}

/**
 * How long to wait after so many failures in a row: twice as long each time, less up to a half by `chance`.
 *
 * @param {number} failures
 * @param {number} atLeast
 * @param {number} chance
 * @returns {number} milliseconds
 */
export function retryMs(failures, atLeast, chance) {
  const longest = Math.min(RETRY_MS_MIN * 2 ** Math.min(failures - 1, 16), RETRY_MS_MAX);
  return Math.max(longest * (1 - chance / 2), atLeast * (1 + chance / 10));
}

function problemOf({ contentType, body }) {
  if (!contentType.startsWith("application/problem+json")) return {};
  try {
    const said = JSON.parse(body);
    return typeof said === "object" && said !== null && !Array.isArray(said) ? said : {};
  } catch {
    return {};
  }
}

function badEvents(said, events) {
  const problems = new Map();
  for (const error of Array.isArray(said.errors) ? said.errors : []) {
    const { index, ...why } = error ?? {};
    if (!Number.isInteger(index) || index < 0 || index >= events) continue;
    problems.set(index, [...(problems.get(index) ?? []), why]);
  }
  return problems.size ? { kind: "bad_events", problems } : { kind: "bad_batch", problem: said };
}

function retryAfter(text, now) {
  if (text === null) return 0;
  const ms = /^\s*\d+\s*$/.test(text) ? Number(text) * 1000 : Date.parse(text) - now;
  return Number.isNaN(ms) ? 0 : Math.min(Math.max(ms, 0), RETRY_AFTER_MS_MAX);
}
