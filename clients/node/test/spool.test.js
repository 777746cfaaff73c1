/** The spool: what it says is stored is on disk, its size is bounded, one delivers at a time. */

import assert from "node:assert/strict";
import { mkdtempSync, readdirSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { ROW_BYTES, Spool, Turn } from "../src/spool.js";

process.removeAllListeners("warning");
const { DatabaseSync } = await import("node:sqlite");

function directory(t) {
  const made = mkdtempSync(join(tmpdir(), "scrip-node-"));
  t.after(() => rmSync(made, { recursive: true }));
  return made;
}

const ROOM = 1 << 20;
const bodies = (spool) => spool.oldest(100, ROOM).map(({ body }) => body);

test("it is as durable as it says, and nobody else reads it", (t) => {
  const made = directory(t);
  const spool = new Spool(DatabaseSync, join(made, "spool.sqlite"), ROOM);
  assert.equal(spool.database.prepare("PRAGMA journal_mode").get().journal_mode, "wal");
  assert.equal(spool.database.prepare("PRAGMA synchronous").get().synchronous, 2);
  spool.put(["1", "Ü"]);
  // Nothing is closed: the process has died.
  const next = new Spool(DatabaseSync, join(made, "spool.sqlite"), ROOM);
  assert.deepEqual(bodies(next), ["1", "Ü"]);
  for (const name of readdirSync(made)) assert.equal(statSync(join(made, name)).mode & 0o077, 0, name);
  spool.close();
  next.close();
});

test("what does not fit is not taken, and delivery makes room", () => {
  const spool = new Spool(DatabaseSync, null, 3 * (100 + ROW_BYTES));
  const body = "x".repeat(100);
  assert.equal(spool.put(Array(5).fill(body)), 3);
  assert.equal(spool.put(["y"]), 0);
  const numbers = spool.oldest(2, ROOM).map(({ number }) => number);
  spool.remove(numbers);
  spool.remove(numbers);
  assert.equal(spool.counts().bytes, 100 + ROW_BYTES);
  assert.equal(spool.oldest(10, 1).length, 1);
  spool.close();
});

test("a refused event is kept, counts, and can be sent again or forgotten", () => {
  const spool = new Spool(DatabaseSync, null, ROOM);
  spool.put(["good", "bad"]);
  const before = spool.counts().bytes;
  const { number } = spool.oldest(2, ROOM)[1];
  spool.setApart(new Map([[number, [{ field: "type" }]]]));
  assert.deepEqual(spool.refused(10, 0), [{ number, body: "bad", problems: [{ field: "type" }] }]);
  assert.deepEqual(bodies(spool), ["good"]);
  assert.equal(spool.counts().bytes, before);
  spool.sendAgain([number]);
  assert.deepEqual(bodies(spool), ["good", "bad"]);
  const again = spool.oldest(2, ROOM)[1].number;
  spool.setApart(new Map([[again, []]]));
  spool.discard([again]);
  assert.deepEqual(spool.counts(), { waiting: 1, refused: 0, bytes: 4 + ROW_BYTES });
  spool.close();
});

test("only one delivers at a time", (t) => {
  const file = join(directory(t), "turn");
  const [first, second] = [new Turn(DatabaseSync, file), new Turn(DatabaseSync, file)];
  assert.ok(first.take());
  assert.ok(!second.take());
  first.give();
  assert.ok(second.take());
  // As it ends with its process.
  second.close();
  assert.ok(first.take());
  first.close();
});
