/** Reporting: accepted means kept until delivered or refused, whatever metering answers. */

import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { setTimeout as pause } from "node:timers/promises";

import { ClientClosed, InvalidEvent, NotDelivered, Scrip, SpoolFull } from "../src/index.js";
import { Metering, serve } from "./stand_in.js";

const AWAY = { status: 503, json: { code: "stream_away" } };

/** Metering, and a directory for spools. */
async function world(t, fates) {
  const metering = new Metering(fates);
  const server = await serve(metering.handle);
  const directory = mkdtempSync(join(tmpdir(), "scrip-node-"));
  t.after(async () => {
    await server.close();
    rmSync(directory, { recursive: true });
  });
  const options = { source: "demo", token: "t", spool: join(directory, "spool.sqlite") };
  return { metering, server, options };
}

const use = (id, type = "t", data = {}) => ({ account: "acme/ana", type, id, data });

test("an event arrives as it was reported", async (t) => {
  const { metering, server, options } = await world(t);
  const scrip = new Scrip(server.url, options);
  const time = new Date("2026-03-14T12:00:00+02:00");
  assert.equal(await scrip.report({ ...use("use-1", "pages.printed", { pages: 3, who: "Ünsal" }), time }), "use-1");
  assert.equal(await scrip.close(), 0);
  assert.deepEqual(metering.taken.get("use-1"), {
    specversion: "1.0",
    id: "use-1",
    source: "demo",
    type: "pages.printed",
    subject: "acme/ana",
    time: "2026-03-14T10:00:00.000Z",
    data: { pages: 3, who: "Ünsal" },
  });
  assert.equal(metering.requests[0].path, "/api/v1/events");
  assert.equal(metering.requests[0].headers.authorization, "Bearer t");
  await assert.rejects(scrip.report(use("late")), ClientClosed);
});

test("an event without id and time gets both when it is reported", async (t) => {
  const { metering, server, options } = await world(t, [AWAY]);
  const scrip = new Scrip(server.url, options);
  const before = Date.now();
  const id = await scrip.report({ account: "acme", type: "t" });
  const after = Date.now();
  await scrip.close();
  const time = Date.parse(metering.taken.get(id).time);
  assert.ok(before <= time && time <= after);
  assert.match(id, /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
});

test("what is no event is told at once", async (t) => {
  const { server, options } = await world(t);
  const scrip = new Scrip(server.url, options);
  const wrong = [
    { type: "t" },
    { account: "", type: "t" },
    { account: "acme" },
    { ...use("x"), data: [1] },
    { ...use("x"), data: { x: Number.NaN } },
    { ...use("x"), data: { x: 1n } },
    { ...use("x"), data: { x: "y".repeat(70_000) } },
    { ...use("x"), time: "soon" },
    { ...use("x"), time: Number.NaN },
    undefined,
    null,
    "acme",
  ];
  for (const event of wrong) await assert.rejects(scrip.report(event), InvalidEvent);
  assert.equal(await scrip.close(), 0);
});

test("a time may be a Date, a text, or what Date.now() says; without one it is now", async (t) => {
  const { metering, server, options } = await world(t);
  const scrip = new Scrip(server.url, options);
  const time = 1_780_000_000_123;
  for (const [id, said] of Object.entries({ date: new Date(time), text: "2026-05-28T20:26:40.123Z", number: time })) {
    await scrip.report({ ...use(id), time: said });
  }
  const before = Date.now();
  await scrip.report({ ...use("none"), time: null });
  assert.equal(await scrip.close(), 0);
  for (const id of ["date", "text", "number"]) assert.equal(metering.taken.get(id).time, "2026-05-28T20:26:40.123Z");
  assert.ok(Date.parse(metering.taken.get("none").time) >= before);
});

test("a durability that is none is told at once, not taken for less than was meant", async (t) => {
  const { server, options } = await world(t);
  for (const spool of [options.spool, null]) {
    assert.throws(() => new Scrip(server.url, { ...options, spool, durability: "dsk" }), /durability/);
  }
});

test("whatever is answered, every accepted event arrives or is set apart", async (t) => {
  const fates = [AWAY, "lose", { status: 401, json: { code: "unauthenticated" } }, { status: 0, destroy: true }, "lose"];
  const { metering, server, options } = await world(t, fates);
  const told = [];
  const scrip = new Scrip(server.url, { ...options, onRefused: (event) => told.push(event) });
  const numbers = Array.from({ length: 500 }, (_, number) => number);
  await Promise.all(numbers.map((number) => scrip.report(use(`use-${number}`, number % 100 === 7 ? "bad" : "t"))));
  assert.ok(await scrip.flush(20_000));
  assert.equal(metering.taken.size, 495);
  assert.deepEqual(
    told.map(({ body }) => JSON.parse(body).id).sort(),
    ["use-107", "use-207", "use-307", "use-407", "use-7"],
  );
  const refused = await scrip.refused();
  assert.deepEqual(refused[0].problems, [{ field: "type", detail: "unknown" }]);
  await scrip.sendAgain([refused[0].number]);
  await scrip.discard(refused.slice(1).map(({ number }) => number));
  await scrip.flush();
  assert.equal((await scrip.status()).refused, 1);
  assert.equal(await scrip.close(), 0);
});

test("what is left at the deadline stays, and the next process delivers it", async (t) => {
  const { metering, server, options } = await world(t, Array(100).fill(AWAY));
  const first = new Scrip(server.url, options);
  await Promise.all([1, 2, 3].map((number) => first.report(use(`use-${number}`))));
  assert.equal(await first.close(100), 3);
  metering.fates = [];
  const second = new Scrip(server.url, options);
  assert.ok(await second.flush());
  assert.equal(await second.close(), 0);
  assert.equal(metering.taken.size, 3);
});

test("who closes does not wait out a pause between tries", async (t) => {
  const { metering, server, options } = await world(t, Array(6).fill(AWAY));
  const scrip = new Scrip(server.url, options);
  await scrip.report(use("kept"));
  while ((await scrip.status()).failures < 5) await pause(10);
  // The next try would be more than a second away, and the one after that more than two.
  assert.equal(await scrip.close(1_000), 0);
  assert.ok(metering.taken.has("kept"));
});

test("a full spool says so, and takes events again once others are delivered", async (t) => {
  const { metering, server, options } = await world(t, Array(3).fill(AWAY));
  const scrip = new Scrip(server.url, { ...options, spoolBytesMax: 20_000 });
  const found = await Promise.allSettled(
    [...Array(10).keys()].map((number) => scrip.report(use(`use-${number}`, "t", { x: "y".repeat(4_000) }))),
  );
  const accepted = found.filter(({ status }) => status === "fulfilled").map(({ value }) => value);
  for (const { reason } of found.filter(({ status }) => status === "rejected")) {
    assert.ok(reason instanceof SpoolFull);
    assert.match(reason.message, /the spool is full: \d+ events wait/);
  }
  assert.equal(accepted.length, 4);
  assert.ok(scrip.isFull);
  assert.ok(await scrip.flush(20_000));
  await scrip.report(use("after"));
  assert.ok(!scrip.isFull);
  await scrip.close();
  assert.deepEqual([...metering.taken.keys()].sort(), [...accepted, "after"].sort());
});

test("in memory a report waits for nothing, and what is not delivered is handed back", async (t) => {
  const { metering, server, options } = await world(t, Array(100).fill(AWAY));
  assert.throws(() => new Scrip(server.url, { ...options, spool: null }), /durability/);
  const memory = { ...options, spool: null, durability: "memory", bufferEventsMax: 50 };
  const first = new Scrip(server.url, memory);
  for (let number = 0; number < 50; number += 1) await first.report(use(`use-${number}`));
  await assert.rejects(first.report(use("more")), SpoolFull);
  const lost = await first.close(100).catch((error) => error);
  assert.ok(lost instanceof NotDelivered);
  assert.equal(lost.bodies.length, 50);
  assert.equal(metering.taken.size, 0);
});

test("bodies are compressed where that is understood, and plain where not", async (t) => {
  const { metering, server, options } = await world(t);
  for (const [readsGzip, wanted] of [
    [true, ["gzip"]],
    [false, ["gzip", undefined, undefined]],
  ]) {
    metering.readsGzip = readsGzip;
    metering.requests = [];
    const scrip = new Scrip(server.url, options);
    for (let number = 0; number < wanted.length; number += 2) {
      await scrip.report(use(`${readsGzip}-${number}`, "t", { x: "y".repeat(5_000) }));
      assert.ok(await scrip.flush());
    }
    await scrip.close();
    assert.deepEqual(
      metering.requests.map(({ headers }) => headers["content-encoding"]),
      wanted,
    );
  }
});

test("a spool that cannot be opened takes nothing", async (t) => {
  const { server, options } = await world(t);
  const scrip = new Scrip(server.url, { ...options, spool: "/proc/nothing/spool.sqlite" });
  await assert.rejects(scrip.report(use("x")), { name: "SpoolFailed" });
  assert.ok(scrip.isFull);
  assert.equal(await scrip.close(), 0);
});
