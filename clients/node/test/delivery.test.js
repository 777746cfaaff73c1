/** What an answer means for a batch, and how long is waited: laws of pure functions. Amounts, too. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { decimalText, steps, whole, written } from "../src/amounts.js";
import { outcome, retryMs } from "../src/delivery.js";
import { newHoldId } from "../src/events.js";

const NOW = Date.parse("2026-03-14T12:00:00Z");

function answered(status, said, { events = 3, gzipped = false, retryAfter = null } = {}) {
  const contentType = said === undefined ? "text/html" : "application/problem+json";
  const body = said === undefined ? "<html>" : JSON.stringify(said);
  return outcome({ status, contentType, retryAfter, body }, { events, gzipped, now: NOW });
}

test("an answer that is not metering's never sets an event apart", () => {
  for (let status = 300; status < 600; status += 1) {
    assert.equal(answered(status, undefined, { events: 1 }).kind, "later");
  }
  assert.equal(answered(413, undefined).kind, "bad_batch");
});

test("bad events are named by their place, and a verdict that names none is on all", () => {
  const errors = [{ index: 2, field: "a" }, { index: 0, field: "b" }, { index: 2, field: "c" }];
  const found = answered(400, { code: "invalid_events", errors });
  assert.deepEqual([...found.problems], [[2, [{ field: "a" }, { field: "c" }]], [0, [{ field: "b" }]]]);
  for (const wrong of [undefined, [], [{ index: 3 }], [{ index: -1 }], [{ index: "0" }], ["x"], [null], "x"]) {
    assert.equal(answered(400, { code: "invalid_events", errors: wrong }).kind, "bad_batch");
  }
});

test("a compressed body that is not understood is sent plain before anything is judged", () => {
  assert.equal(answered(400, { code: "not_a_batch" }, { gzipped: true }).kind, "no_gzip");
  assert.equal(answered(400, { code: "not_a_batch" }).kind, "bad_batch");
});

test("Retry-After is heeded, and pauses grow and are bounded", () => {
  assert.equal(answered(429, undefined, { retryAfter: "7" }).ms, 7_000);
  assert.equal(answered(503, undefined, { retryAfter: "Sat, 14 Mar 2026 12:01:30 GMT" }).ms, 90_000);
  assert.equal(answered(503, undefined, { retryAfter: "soon" }).ms, 0);
  let last = 0;
  for (let failures = 1; failures < 50; failures += 1) {
    const ms = retryMs(failures, 0, 0.5);
    assert.ok(ms >= last && ms <= 30_000);
    last = ms;
  }
  assert.ok(retryMs(1, 60_000, 0) >= 60_000);
});

test("amounts are exact", () => {
  for (const [amount, text] of [[1, "1"], ["0.10", "0.1"], ["0.000000001", "0.000000001"], ["-1.50", "-1.5"], [0, "0"]]) {
    assert.equal(decimalText(amount), text);
  }
  for (const wrong of [0.1, Number.NaN, "1e3", "", "1.0000000001", null]) assert.throws(() => decimalText(wrong), TypeError);
  assert.equal(written(steps("-0.5")), "-0.5");
  assert.deepEqual([whole(steps("2.9")), whole(steps("-0.1"))], [2n, -1n]);
});

test("the id of a hold names its partition", () => {
  // crc32 of the root, modulo 64, as every publisher computes it.
  assert.match(newHoldId("acme/ana"), /^hold_62_/);
  assert.equal(newHoldId("acme").slice(0, 8), newHoldId("acme/ml/bob").slice(0, 8));
});
