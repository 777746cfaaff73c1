/** Middleware under Node's own server: held before, reported after what was served, given back what was not. */

import assert from "node:assert/strict";
import { createServer, request } from "node:http";
import { test } from "node:test";
import { setTimeout as pause } from "node:timers/promises";

import { limitHeaders, metered, refusal } from "../src/express.js";
import { AccountNotOpen, InsufficientFunds, Scrip } from "../src/index.js";
import { Ledger, Metering, serve } from "./stand_in.js";

/** An application: /jobs/<what> does it, /free is not metered. */
function work(req, res) {
  const path = req.url.split("?", 1)[0];
  const [, , what] = path.split("/");
  switch (what) {
    case "fine":
      req.scrip.data.tokens = 7;
      res.setHeader("X-Own", "1");
      return res.end('{"ok":true}');
    case "head":
      return res.writeHead(201, { "content-type": "text/plain" }).end("made");
    case "nothing":
      req.scrip.used = false;
      return res.end("{}");
    case "invalid":
      res.statusCode = 422;
      return res.end("{}");
    case "stream":
      res.write("x".repeat(10));
      res.write(Buffer.from("y".repeat(10)));
      return res.end();
    case "leave":
      res.write("x".repeat(10));
      return undefined;
    case "hang":
      return undefined;
    case "number":
      return res.end(5);
    case "too-long":
      return res.writeHead(200, { "content-length": 1 }).end("longer");
    case "thrown":
      throw new Error("broken");
    default:
      return res.end("{}");
  }
}

async function world(t, rules = {}, { fates = [], calls, ...options } = {}) {
  const metering = new Metering(fates);
  const ledger = new Ledger({ calls });
  const [meteringServer, ledgerServer] = await Promise.all([serve(metering.handle), serve(ledger.handle)]);
  const scrip = new Scrip(meteringServer.url, {
    source: "demo",
    token: "t",
    spool: null,
    durability: "memory",
    ledgerUrl: ledgerServer.url,
    ledgerMs: 500,
    ...options,
  });
  const middleware = metered(scrip, {
    account: (req) => req.headers["x-account"],
    estimate: () => ({ calls: 1 }),
    routes: ["/jobs"],
    ...rules,
  });
  const server = createServer((req, res) => {
    middleware(req, res, (error) => {
      try {
        if (error) throw error;
        work(req, res);
      } catch {
        // As Express does.
        res.statusCode = 500;
        res.end("failed");
      }
    });
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(async () => {
    server.closeAllConnections();
    server.close();
    await scrip.close(100).catch(() => {});
    await Promise.all([meteringServer.close(), ledgerServer.close()]);
  });
  const url = `http://127.0.0.1:${server.address().port}`;
  const call = (path, account = "acme") => fetch(url + path, { headers: account ? { "x-account": account } : {} });
  return { metering, ledger, scrip, call, url };
}

async function until(condition, ms = 5_000) {
  const deadline = Date.now() + ms;
  while (!condition()) {
    assert.ok(Date.now() < deadline, `not in time: ${condition}`);
    await pause(10);
  }
}

test("a request is held for, served, reported and told of", async (t) => {
  const { metering, ledger, call } = await world(t);
  const answer = await call("/jobs/fine?x=1");
  assert.equal(answer.status, 200);
  assert.deepEqual(await answer.json(), { ok: true });
  const headers = Object.fromEntries(answer.headers);
  assert.equal(headers["x-own"], "1");
  assert.equal(headers["x-scrip-held"], "1 calls");
  assert.equal(headers["x-scrip-remaining"], "4 calls");
  assert.equal(headers["ratelimit-policy"], '"calls";q=5');
  assert.equal(headers.ratelimit, '"calls";r=4;t=3600');
  await until(() => metering.taken.size === 1);
  const event = metering.taken.get(headers["x-scrip-request-id"]);
  assert.equal(event.type, "request.served");
  assert.equal(event.subject, "acme");
  const { hold, latency_ms: latency, ...data } = event.data;
  assert.ok(ledger.held.has(hold));
  assert.ok(latency >= 0);
  assert.deepEqual(data, {
    endpoint: "/jobs/fine",
    method: "GET",
    status: 200,
    response_bytes: 11,
    ended: "completed",
    tokens: 7,
  });
});

test("headers are told whichever way the answer is written", async (t) => {
  const { call, metering } = await world(t);
  const head = await call("/jobs/head");
  assert.deepEqual([head.status, await head.text()], [201, "made"]);
  assert.equal(head.headers.get("x-scrip-remaining"), "4 calls");
  const stream = await call("/jobs/stream");
  assert.equal((await stream.text()).length, 20);
  assert.equal(stream.headers.get("x-scrip-remaining"), "3 calls");
  await until(() => metering.taken.size === 2);
  assert.deepEqual([...metering.taken.values()].map(({ data }) => data.response_bytes), [4, 20]);
});

test("what did no work is given back and not reported", async (t) => {
  const { metering, ledger, call } = await world(t);
  for (const [path, status] of [["invalid", 422], ["nothing", 200], ["thrown", 500]]) {
    const answer = await call(`/jobs/${path}`);
    assert.equal(answer.status, status);
    assert.equal(answer.headers.get("x-scrip-remaining"), "5 calls");
    await answer.text();
    await until(() => ledger.left === 5);
  }
  assert.equal(ledger.released.length, 3);
  assert.equal(metering.taken.size, 0);
});

test("a client that leaves is charged for what was sent, and for nothing if nothing was", async (t) => {
  const { metering, ledger, url } = await world(t);
  for (const what of ["leave", "hang"]) {
    await new Promise((resolve) => {
      const asked = request(`${url}/jobs/${what}`, { headers: { "x-account": "acme" } });
      asked.on("error", () => {});
      asked.on("close", resolve);
      asked.on("response", (answer) => answer.once("data", () => asked.destroy()));
      if (what === "hang") setTimeout(() => asked.destroy(), 200);
      asked.end();
    });
  }
  await until(() => metering.taken.size === 1 && ledger.released.length === 1);
  const [event] = metering.taken.values();
  assert.deepEqual([event.data.ended, event.data.response_bytes], ["broke_off", 10]);
});

test("what is not metered is not touched", async (t) => {
  const { ledger, call } = await world(t);
  for (const answer of [await call("/free"), await call("/jobsite"), await call("/jobs/other", null)]) {
    assert.equal(answer.status, 200);
    assert.equal(answer.headers.get("x-scrip-request-id"), null);
  }
  assert.equal(ledger.left, 5);
});

test("whichever way a path is asked for that Express serves alike, it is metered", async (t) => {
  const { url } = await world(t, {}, { calls: 10 });
  const { hostname, port } = new URL(url);
  const idOf = (path) =>
    new Promise((resolve, reject) => {
      const asked = request({ hostname, port, path, headers: { "x-account": "acme" } }, (answer) => {
        answer.resume();
        resolve(answer.headers["x-scrip-request-id"]);
      });
      asked.on("error", reject).end();
    });
  for (const path of ["/jobs", "/jobs/", "/JOBS/fine", "http://elsewhere/jobs", "HTTP://elsewhere/Jobs#x", "/jobs#x", "/jobs?x"]) {
    assert.ok(await idOf(path), path);
  }
  for (const path of ["/free", "/jobsmith", "http://jobs/free", "/free?/jobs", "/free#/jobs"]) {
    assert.equal(await idOf(path), undefined, path);
  }
});

test("it warns at 80 percent, and refuses with 429 at 100", async (t) => {
  const warnings = [];
  const rules = { onWarning: (warning) => warnings.push(warning.percent), upgradeUrl: "https://acme.example/plans" };
  const { call } = await world(t, rules);
  const told = [];
  for (let number = 0; number < 5; number += 1) told.push((await call("/jobs/fine")).headers.get("x-scrip-warning"));
  assert.deepEqual(told, [null, null, null, "80% of 5 calls used", "100% of 5 calls used"]);
  const refused = await call("/jobs/fine");
  assert.equal(refused.status, 429);
  assert.equal(refused.headers.get("content-type"), "application/problem+json");
  assert.equal(refused.headers.get("ratelimit"), '"calls";r=0;t=3600'.replace("3600", refused.headers.get("retry-after")));
  assert.deepEqual(await refused.json(), {
    type: "about:blank",
    title: "Too Many Requests",
    status: 429,
    code: "insufficient_funds",
    detail: "not enough",
    limit_source: "acme",
    required: { amount: "1", unit: "calls" },
    remaining: { amount: "0", unit: "calls" },
    upgrade_url: "https://acme.example/plans",
  });
  assert.deepEqual(warnings, [80, 100, 100]);
  assert.equal((await call("/jobs/fine", "nobody")).status, 403);
});

test("a warning that fails stops nothing", async (t) => {
  const onWarning = () => {
    throw new Error("broken");
  };
  const { metering, call } = await world(t, { onWarning, warnPercent: 0 }, { calls: 1 });
  const answer = await call("/jobs/fine");
  assert.deepEqual([answer.status, await answer.text()], [200, '{"ok":true}']);
  assert.equal(answer.headers.get("x-scrip-warning"), "100% of 1 calls used");
  await until(() => metering.taken.size === 1);
  assert.equal((await call("/jobs/fine")).status, 429);
});

test("an answer that cannot be written is the application's error, or ends the connection, and nothing else", async (t) => {
  const { ledger, call } = await world(t);
  assert.equal((await call("/jobs/number")).status, 500);
  await until(() => ledger.released.length === 1);
  await call("/jobs/too-long").catch(() => {});
  assert.equal((await call("/jobs/fine")).status, 200);
});

test("nothing is served while the ledger is away, unless that is wanted", async (t) => {
  // It keeps its port: a closed one may be another server's in a moment.
  const gone = await serve(() => ({ destroy: true }));
  t.after(gone.close);
  const silence = { ledgerUrl: gone.url };
  const refusing = await world(t, {}, silence);
  const refused = await refusing.call("/jobs/fine");
  assert.deepEqual([refused.status, (await refused.json()).code], [503, "unavailable"]);
  assert.equal(refused.headers.get("retry-after"), "2");
  const serving = await world(t, { whenAway: "serve" }, silence);
  const served = await serving.call("/jobs/fine");
  assert.equal(served.status, 200);
  assert.equal(served.headers.get("x-scrip-remaining"), null);
  await until(() => serving.metering.taken.size === 1);
  const [event] = serving.metering.taken.values();
  assert.match(event.data.hold, /^hold_/);
});

test("nobody is let in whose use could not be recorded, and who was is told an error", async (t) => {
  const full = await world(t, {}, { fates: Array(100).fill({ status: 503 }), bufferEventsMax: 0 });
  assert.equal((await full.call("/jobs/fine")).status, 503);
  const { scrip, call } = await world(t);
  t.mock.method(scrip, "report", async () => {
    throw new Error("the disk is gone");
  });
  const answer = await call("/jobs/fine");
  assert.equal(answer.status, 500);
  assert.equal((await answer.json()).code, "usage_not_recorded");
  assert.equal(answer.headers.get("x-own"), null);
});

test("a rule that throws is the application's error, and nothing is held", async (t) => {
  const { ledger, call } = await world(t, {
    estimate: () => {
      throw new Error("broken rule");
    },
  });
  assert.equal((await call("/jobs/fine")).status, 500);
  assert.equal(ledger.left, 5);
});

test("money is 402 and in no RateLimit header, an unlimited wallet has no limit to tell", () => {
  const wallet = { account: "acme", unit: "usd", kind: "money", policy: "hard", limit: "25", renewsAt: null };
  const left = [{ account: "acme", unit: "usd", amount: "0.5" }];
  const { told, warnings } = limitHeaders(left, [wallet], 80, 0);
  assert.deepEqual(told, { "X-Scrip-Remaining": "0.5 usd", "X-Scrip-Warning": "98% of 25 usd used" });
  assert.equal(warnings[0].percent, 98);
  assert.deepEqual(limitHeaders(left, [{ ...wallet, policy: "unlimited" }], 80, 0).warnings, []);
  const said = { code: "insufficient_funds", detail: "d", limit_source: "acme", remaining: left[0], required: left[0] };
  assert.equal(refusal(new InsufficientFunds(402, said), [wallet], { warnPercent: 80 }).body.status, 402);
  assert.equal(refusal(new InsufficientFunds(402, said), [], { warnPercent: 80 }).body.status, 402);
  assert.equal(refusal(new AccountNotOpen(404, { code: "wallet_not_open" }), [], {}).body.code, "account_not_open");
});
