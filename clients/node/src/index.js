/** Scrip's client: usage is reported and never lost, holds are placed before work. */

import { resolve } from "node:path";
import { setTimeout as pause } from "node:timers/promises";
import { Worker } from "node:worker_threads";

import { ClientClosed, NotDelivered, SpoolFailed, SpoolFull } from "./errors.js";
import { encode } from "./events.js";
import { Ledger } from "./ledger.js";

export * from "./errors.js";
export { newHoldId, newId } from "./events.js";
export { Ledger };

const SPOOL_BYTES_MAX = 256 << 20;
const BUFFER_EVENTS_MAX = 10_000;
const CLOSE_MS = 5_000;
const LOOK_MS = 10;

/**
 * @typedef {object} Options
 * @property {string} source the principal that `token` belongs to
 * @property {string} token
 * @property {string | null} spool a file on a disk that lasts; null keeps events in memory, with `durability: "memory"`
 * @property {"disk" | "memory"} [durability] an event is accepted once it is on disk; or once it is in a bounded buffer,
 *   of which a crash loses what was not written yet
 * @property {string} [ledgerUrl]
 * @property {string} [ledgerToken]
 * @property {number} [ledgerMs] how long the ledger's answer is waited for in all
 * @property {number} [spoolBytesMax]
 * @property {number} [bufferEventsMax] how many may be on their way to the spool
 * @property {number} [requestMs]
 * @property {boolean} [gzip]
 * @property {(event: { number: number, body: string, problems: object[] }) => void} [onRefused]
 */

/** A client. Close it at the end. */
export class Scrip {
  #worker;
  #source;
  #durable;
  #bufferEventsMax;
  #onRefused;
  #ledger;
  #closed = false;
  #failure = null;
  #number = 0;
  /** Reports that wait for the disk, and questions that wait for an answer. @type {Map<number, any>} */
  #waiting = new Map();
  #buffered = 0;
  #full = false;

  /** @param {string} url metering's @param {Options} options */
  constructor(url, options) {
    const { source, token, spool, durability = "disk", ledgerUrl, ledgerToken = token, ledgerMs } = options;
    const { spoolBytesMax = SPOOL_BYTES_MAX, requestMs = 10_000, gzip = true } = options;
    if (durability !== "disk" && durability !== "memory") {
      throw new TypeError(`the durability is ${durability}; it is disk or memory`);
    }
    if (spool === null && durability === "disk") {
      throw new TypeError('without a spool nothing is on disk: give it a file, or say durability: "memory"');
    }
    this.#source = source;
    this.#durable = durability === "disk";
    this.#bufferEventsMax = options.bufferEventsMax ?? BUFFER_EVENTS_MAX;
    this.#onRefused = options.onRefused;
    this.#ledger = ledgerUrl === undefined ? null : new Ledger(ledgerUrl, { token: ledgerToken, ms: ledgerMs });
    const file = spool === null ? null : resolve(spool);
    this.#worker = new Worker(new URL("./worker.js", import.meta.url), {
      workerData: {
        url: new URL(url).href,
        token,
        file,
        durable: this.#durable,
        bytesMax: spoolBytesMax,
        requestMs,
        gzip,
      },
    });
    this.#worker.on("message", (message) => this.#on[message.kind](message));
    this.#worker.on("error", (error) => this.#fail(error));
    this.#worker.on("exit", () => this.#fail(new Error("its thread has ended")));
    // It holds up nobody's exit: what was accepted is on disk.
    this.#worker.unref();
  }

  /** Holds and balances. */
  get ledger() {
    if (this.#ledger === null) throw new TypeError("the client was made without a ledgerUrl");
    return this.#ledger;
  }

  /** Whether there may be no room for another event. */
  get isFull() {
    return this.#full || this.#failure !== null || this.#buffered >= this.#bufferEventsMax;
  }

  /**
   * Accept an event, and tell its id: from then on it is delivered, whatever happens. Rejects with NotAccepted.
   *
   * @param {import("./events.js").UsageEvent} event
   * @returns {Promise<string>}
   */
  async report(event) {
    const { id, body } = encode(event, this.#source);
    if (this.#closed) throw new ClientClosed("the client is closed");
    if (this.#failure !== null) throw new SpoolFailed(`the spool cannot be used: ${this.#failure.message}`);
    if (this.#buffered >= this.#bufferEventsMax) {
      throw new SpoolFull(`${this.#buffered} events wait in memory already, as many as may`);
    }
    this.#buffered += 1;
    const stored = this.#send({ kind: "accept", body }, this.#durable);
    if (this.#durable) await stored;
    return id;
  }

  /** What waits, what was refused, and why the last delivery failed, if it did. */
  status() {
    return this.#ask("status");
  }

  /** Events that metering will not take as they are, by number. */
  refused({ limit = 100, after = 0 } = {}) {
    return this.#ask("refused", limit, after);
  }

  /** Forget refused events: they are charged to nobody. @param {number[]} numbers */
  discard(numbers) {
    return this.#ask("discard", numbers);
  }

  /** Deliver refused events after all. @param {number[]} numbers */
  sendAgain(numbers) {
    return this.#ask("sendAgain", numbers);
  }

  /** Wait until everything is delivered, but not longer. @returns {Promise<boolean>} whether it is */
  async flush(ms = CLOSE_MS) {
    const deadline = Date.now() + ms;
    // Metering may be there again: who waits does not wait out a pause that has grown to half a minute.
    await this.#ask("hurry");
    while ((await this.#ask("left")) > 0) {
      if (Date.now() >= deadline) return false;
      await pause(LOOK_MS);
    }
    return true;
  }

  /**
   * Deliver until the deadline, and stop. Rejects with NotDelivered for what is in memory only.
   *
   * @returns {Promise<number>} how many events are left in the spool, for the next process
   */
  async close(ms = CLOSE_MS) {
    if (this.#closed) return 0;
    this.#closed = true;
    if (this.#failure !== null) return 0;
    await this.flush(ms);
    const { left, inMemory } = await this.#ask("stop");
    await this.#worker.terminate();
    if (inMemory.length) throw new NotDelivered(inMemory);
    return left;
  }

  #on = {
    ready: () => {},
    stored: ({ numbers }) => {
      for (const number of numbers) this.#settle(number)?.resolve();
      this.#buffered -= numbers.length;
      if (numbers.length) this.#full = false;
    },
    failed: ({ numbers, error }) => {
      this.#full ||= error.code === "full";
      this.#buffered -= numbers.length;
      const Failure = error.code === "full" ? SpoolFull : SpoolFailed;
      for (const number of numbers) this.#settle(number)?.reject(new Failure(error.message));
    },
    answer: ({ number, found, error }) => {
      if (error === undefined) this.#settle(number)?.resolve(found);
      else this.#settle(number)?.reject(new SpoolFailed(error));
    },
    refused: ({ event }) => {
      try {
        this.#onRefused?.(event);
      } catch (error) {
        // Somebody else's code, and no reason to deliver nothing more.
        process.emitWarning(error);
      }
    },
  };

  #ask(what, ...details) {
    if (this.#failure !== null) return Promise.reject(new SpoolFailed(this.#failure.message));
    return this.#send({ kind: "ask", what, details }, true);
  }

  #send(message, waits) {
    const number = ++this.#number;
    this.#worker.postMessage({ ...message, number });
    if (!waits) return undefined;
    // As long as somebody waits for an answer the process lives.
    if (this.#waiting.size === 0) this.#worker.ref();
    return new Promise((resolve, reject) => this.#waiting.set(number, { resolve, reject }));
  }

  #settle(number) {
    const found = this.#waiting.get(number);
    this.#waiting.delete(number);
    if (this.#waiting.size === 0) this.#worker.unref();
    return found;
  }

  #fail(error) {
    this.#failure ??= error;
    for (const number of [...this.#waiting.keys()]) {
      this.#settle(number)?.reject(new SpoolFailed(`the spool cannot be used: ${error.message}`));
    }
  }
}
