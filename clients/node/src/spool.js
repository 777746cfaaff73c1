/**
 * The spool: accepted events that are not delivered yet, and events that were refused, in a SQLite file. What `put`
 * returned for is on disk. Any number of processes may share a file, those of the Python client, too.
 */

import { closeSync, openSync } from "node:fs";

const BUSY_MS = 10_000;
// What a row costs beside its body, about.
export const ROW_BYTES = 64;
const SQLITE_BUSY = 5;

const SCHEMA = `
CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS refused (number INTEGER PRIMARY KEY, body BLOB NOT NULL, problems TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS used (one INTEGER PRIMARY KEY CHECK (one = 1), bytes INTEGER NOT NULL);
INSERT OR IGNORE INTO used VALUES (1, 0);
`;

export class Spool {
  /** @param {typeof import("node:sqlite").DatabaseSync} DatabaseSync @param {string | null} file @param {number} bytesMax */
  constructor(DatabaseSync, file, bytesMax) {
    // It holds what users did: nobody else reads it. SQLite gives the files beside it the same mode.
    if (file !== null) closeSync(openSync(file, "a", 0o600));
    this.bytesMax = bytesMax;
    this.database = new DatabaseSync(file ?? ":memory:");
    this.database.exec(`PRAGMA busy_timeout = ${BUSY_MS}`);
    useWal(this.database);
    this.database.exec("PRAGMA synchronous = FULL; PRAGMA journal_size_limit = 4194304");
    this.#transaction(() => this.database.exec(SCHEMA));
    const prepare = (sql) => this.database.prepare(sql);
    this.sql = {
      used: prepare("SELECT bytes FROM used"),
      setUsed: prepare("UPDATE used SET bytes = ?"),
      insert: prepare("INSERT INTO events (body) VALUES (CAST(? AS BLOB))"),
      some: prepare("SELECT EXISTS (SELECT 1 FROM events) AS some"),
      oldest: prepare("SELECT number, CAST(body AS TEXT) AS body FROM events ORDER BY number LIMIT ?"),
      remove: prepare("DELETE FROM events WHERE number = ? RETURNING length(body) AS size"),
      apart: prepare("INSERT INTO refused SELECT number, body, ? FROM events WHERE number = ?"),
      moved: prepare("DELETE FROM events WHERE number = ?"),
      refused: prepare(
        "SELECT number, CAST(body AS TEXT) AS body, problems FROM refused WHERE number > ? ORDER BY number LIMIT ?",
      ),
      discard: prepare("DELETE FROM refused WHERE number = ? RETURNING length(body) AS size"),
      again: prepare("INSERT INTO events (body) SELECT body FROM refused WHERE number = ?"),
      forget: prepare("DELETE FROM refused WHERE number = ?"),
      counts: prepare(
        "SELECT (SELECT count(*) FROM events) AS waiting, (SELECT count(*) FROM refused) AS refused," +
          " (SELECT bytes FROM used) AS bytes",
      ),
    };
  }

  /** @param {string[]} bodies @returns {number} how many were stored, in one commit: the rest do not fit */
  put(bodies) {
    return this.#transaction(() => {
      let used = this.sql.used.get().bytes;
      let fitting = 0;
      for (const body of bodies) {
        const size = Buffer.byteLength(body) + ROW_BYTES;
        if (used + size > this.bytesMax) break;
        used += size;
        this.sql.insert.run(body);
        fitting += 1;
      }
      this.sql.setUsed.run(used);
      return fitting;
    });
  }

  hasWaiting() {
    return this.sql.some.get().some === 1;
  }

  /** The events that have waited longest: at least one, if there is any. */
  oldest(eventsMax, bytesMax) {
    const rows = this.sql.oldest.all(eventsMax);
    let size = 0;
    for (const [place, { body }] of rows.entries()) {
      size += Buffer.byteLength(body) + 1;
      if (size > bytesMax && place) return rows.slice(0, place);
    }
    return rows;
  }

  /** @param {number[]} numbers these were delivered */
  remove(numbers) {
    this.#take(this.sql.remove, numbers);
  }

  /** @param {Map<number, object[]>} problems these were refused: they wait no longer, and are kept */
  setApart(problems) {
    this.#transaction(() => {
      for (const [number, why] of problems) {
        this.sql.apart.run(JSON.stringify(why), number);
        this.sql.moved.run(number);
      }
    });
  }

  refused(limit, after) {
    return this.sql.refused.all(after, limit).map((row) => ({ ...row, problems: JSON.parse(row.problems) }));
  }

  /** @param {number[]} numbers refused events that nobody needs any more */
  discard(numbers) {
    this.#take(this.sql.discard, numbers);
  }

  /** @param {number[]} numbers refused events that will be taken now */
  sendAgain(numbers) {
    this.#transaction(() => {
      for (const number of numbers) {
        this.sql.again.run(number);
        this.sql.forget.run(number);
      }
    });
  }

  counts() {
    return { ...this.sql.counts.get() };
  }

  close() {
    this.database.close();
  }

  #take(statement, numbers) {
    this.#transaction(() => {
      let freed = 0;
      for (const number of numbers) freed += (statement.get(number)?.size ?? -ROW_BYTES) + ROW_BYTES;
      this.sql.setUsed.run(this.sql.used.get().bytes - freed);
    });
  }

  #transaction(work) {
    this.database.exec("BEGIN IMMEDIATE");
    try {
      const found = work();
      this.database.exec("COMMIT");
      return found;
    } catch (error) {
      if (this.database.isTransaction !== false) {
        try {
          this.database.exec("ROLLBACK");
        } catch {
          // A failed COMMIT may have ended the transaction already.
        }
      }
      throw error;
    }
  }
}

/** Who delivers: of all processes on a spool one at a time. It ends with the process, however that ends. */
export class Turn {
  constructor(DatabaseSync, file) {
    if (file !== null) {
      closeSync(openSync(file, "a", 0o600));
      this.database = new DatabaseSync(file);
    }
  }

  take() {
    try {
      this.database?.exec("BEGIN EXCLUSIVE");
      return true;
    } catch (error) {
      if ((error.errcode & 0xff) !== SQLITE_BUSY) throw error;
      return false;
    }
  }

  give() {
    this.database?.exec("ROLLBACK");
  }

  close() {
    this.database?.close();
  }
}

function useWal(database) {
  const deadline = Date.now() + BUSY_MS;
  for (;;) {
    try {
      database.exec("PRAGMA journal_mode = WAL");
      return;
    } catch (error) {
      // While another process makes the same change SQLite does not wait by itself.
      if (Date.now() > deadline) throw error;
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 10);
    }
  }
}
