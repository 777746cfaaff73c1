/**
 * The thread that writes to the spool and delivers what is in it, so that nobody waits for a disk. It commits together
 * whatever came while it committed last, and sends together whatever came while it sent last.
 */

import { setTimeout as pause } from "node:timers/promises";
import { parentPort, workerData } from "node:worker_threads";
import { gzipSync } from "node:zlib";

import { outcome, retryMs } from "./delivery.js";
import { Spool, Turn } from "./spool.js";

const BATCH_EVENTS_MAX = 1_000;
// Metering takes 4 MiB.
const BATCH_BYTES_MAX = 3 << 20;
const COMMIT_EVENTS_MAX = 1_000;
const GZIP_BYTES_MIN = 1 << 10;
const IDLE_MS = 1_000;
const TURN_MS = 50;
const WRITE_AGAIN_MS = 200;

// That SQLite is new to Node is nothing the application's users should read.
process.removeAllListeners("warning");
const { DatabaseSync } = await import("node:sqlite");

const { url, token, file, bytesMax, durable, requestMs } = workerData;
const spool = new Spool(DatabaseSync, file, bytesMax);
const turn = new Turn(DatabaseSync, file === null ? null : `${file}-turn`);

/** @type {{ number: number, body: string }[]} */
let queue = [];
let gzip = workerData.gzip;
let batchEventsMax = BATCH_EVENTS_MAX;
let failures = 0;
let problem = null;
let stopped = false;
let writing = false;
let pauses = 0;
let notBefore = 0;
let wake = () => {};
let hurry = () => {};

const work = {
  accept({ number, body }) {
    queue.push({ number, body });
    if (!writing) {
      writing = true;
      setImmediate(write);
    }
  },
  ask({ number, what, details = [] }) {
    let found;
    let error;
    try {
      found = asked[what](...details);
    } catch (thrown) {
      error = thrown.message;
    }
    parentPort.postMessage({ kind: "answer", number, found, error });
  },
};

const asked = {
  status: () => ({ ...spool.counts(), buffered: queue.length, failures, problem }),
  hurry() {
    pauses = 0;
    hurry();
  },
  left: () => queue.length + (spool.hasWaiting() ? 1 : 0),
  refused: (limit, after) => spool.refused(limit, after),
  discard: (numbers) => spool.discard(numbers),
  sendAgain(numbers) {
    spool.sendAgain(numbers);
    wake();
  },
  stop() {
    const status = asked.status();
    stopped = true;
    wake();
    const inMemory = file === null ? spool.oldest(2 ** 31 - 1, Number.MAX_SAFE_INTEGER).map(({ body }) => body) : [];
    return { left: status.waiting, inMemory: [...inMemory, ...queue.map(({ body }) => body)] };
  },
};

parentPort.on("message", (message) => work[message.kind](message));
parentPort.postMessage({ kind: "ready" });
deliverForEver();

function write() {
  const taken = queue.slice(0, COMMIT_EVENTS_MAX);
  let stored = 0;
  let error = null;
  try {
    stored = spool.put(taken.map(({ body }) => body));
    if (stored < taken.length) {
      const { waiting, refused, bytes } = spool.counts();
      const said = `${waiting} events wait and ${refused} are refused, which is ${bytes} of at most ${bytesMax} bytes`;
      error = { code: "full", message: `the spool is full: ${said}` };
    }
  } catch (thrown) {
    error = { code: "failed", message: `the spool cannot be written: ${thrown.message}` };
  }
  // What was accepted in memory and found no room stays in the queue.
  queue = durable ? queue.slice(taken.length) : queue.slice(stored);
  const numbers = taken.map(({ number }) => number);
  parentPort.postMessage({ kind: "stored", numbers: numbers.slice(0, stored) });
  if (error !== null && durable) parentPort.postMessage({ kind: "failed", numbers: numbers.slice(stored), error });
  wake();
  if (queue.length === 0) writing = false;
  else if (error === null) setImmediate(write);
  else setTimeout(write, WRITE_AGAIN_MS);
}

async function deliverForEver() {
  while (!stopped) {
    const woken = new Promise((resolve) => {
      wake = resolve;
    });
    const hurried = new Promise((resolve) => {
      hurry = resolve;
    });
    let ms;
    try {
      ms = await deliver();
    } catch (error) {
      ms = failed({ why: `the spool cannot be read: ${error.message}`, ms: 0 });
    }
    if (ms === null) await Promise.race([woken, pause(IDLE_MS)]);
    else {
      // Cut short for who waits until all is delivered, but not below what metering asked for.
      await Promise.race([hurried, pause(ms)]);
      await pause(Math.max(notBefore - performance.now(), 0));
    }
  }
}

/** @returns {Promise<number | null>} how long to wait before the next try; null: nothing waits */
async function deliver() {
  if (!spool.hasWaiting()) return null;
  if (!turn.take()) return TURN_MS;
  try {
    while (!stopped) {
      const waiting = spool.oldest(batchEventsMax, BATCH_BYTES_MAX);
      if (waiting.length === 0) return null;
      const ms = await deliverBatch(waiting);
      if (ms !== null) return ms;
    }
    return null;
  } finally {
    turn.give();
  }
}

async function deliverBatch(waiting) {
  const answer = await post(waiting.map(({ body }) => body));
  switch (answer.kind) {
    case "delivered":
      spool.remove(waiting.map(({ number }) => number));
      failures = 0;
      pauses = 0;
      problem = null;
      batchEventsMax = Math.min(batchEventsMax * 2, BATCH_EVENTS_MAX);
      return null;
    case "bad_events":
      setApart(new Map([...answer.problems].map(([place, why]) => [waiting[place].number, why])), waiting);
      return null;
    case "bad_batch":
      if (waiting.length === 1) {
        setApart(new Map([[waiting[0].number, [answer.problem]]]), waiting);
        batchEventsMax = BATCH_EVENTS_MAX;
      } else {
        // Halves, until the good ones are through and the bad one is alone.
        batchEventsMax = Math.floor(waiting.length / 2);
      }
      return null;
    case "no_gzip":
      gzip = false;
      return null;
    default:
      return failed(answer);
  }
}

async function post(bodies) {
  let body = Buffer.from(`[${bodies.join(",")}]`);
  const headers = { authorization: `Bearer ${token}`, "content-type": "application/cloudevents-batch+json" };
  const gzipped = gzip && body.length >= GZIP_BYTES_MIN;
  if (gzipped) {
    body = gzipSync(body, { level: 5 });
    headers["content-encoding"] = "gzip";
  }
  try {
    const response = await fetch(new URL("/api/v1/events", url), {
      method: "POST",
      headers,
      body,
      redirect: "manual",
      signal: AbortSignal.timeout(requestMs),
    });
    const answer = {
      status: response.status,
      contentType: response.headers.get("content-type") ?? "",
      retryAfter: response.headers.get("retry-after"),
      body: await response.text(),
    };
    return outcome(answer, { events: bodies.length, gzipped, now: Date.now() });
  } catch (error) {
    return { kind: "later", why: `${error.name}: ${error.cause?.message ?? error.message}`, ms: 0 };
  }
}

function setApart(problems, waiting) {
  spool.setApart(problems);
  for (const { number, body } of waiting) {
    if (problems.has(number)) {
      parentPort.postMessage({ kind: "refused", event: { number, body, problems: problems.get(number) } });
    }
  }
}

function failed({ why, ms }) {
  failures += 1;
  pauses += 1;
  problem = why;
  notBefore = performance.now() + ms;
  return retryMs(pauses, ms, Math.random());
}
