/**
 * Usage events: CloudEvents 1.0, whose subject is the account. An event is given its id and time when it is reported,
 * so that however late it arrives, and however often, it is the same event of the same moment.
 */

import { randomBytes } from "node:crypto";
import { crc32 } from "node:zlib";

import { InvalidEvent } from "./errors.js";

export const EVENT_BYTES_MAX = 64 << 10;
const PARTITIONS = 64;

/**
 * @typedef {object} UsageEvent
 * @property {string} account whose use it is
 * @property {string} type
 * @property {Record<string, any>} [data] a JSON object; of a use that was held for it names the `hold`
 * @property {string} [id]
 * @property {Date | string | number} [time] a number is milliseconds, as of Date.now()
 * @property {Record<string, string | number | boolean>} [attributes] CloudEvents extension attributes
 */

/**
 * The id and the JSON of an event, with what it lacks filled in.
 *
 * @param {UsageEvent} event
 * @param {string} source
 * @returns {{ id: string, body: string }}
 * @throws {InvalidEvent}
 */
export function encode(event, source) {
  if (typeof event !== "object" || event === null) throw new InvalidEvent("a usage event is an object");
  const { account, type, data = {}, id = newId(), time, attributes = {} } = event;
  for (const [name, value] of Object.entries({ account, type, id })) {
    if (typeof value !== "string" || value === "") throw new InvalidEvent(`a usage event has a text as its ${name}`);
  }
  if (typeof data !== "object" || data === null || Array.isArray(data)) {
    throw new InvalidEvent("the data of a usage event is an object");
  }
  const said = { ...attributes, specversion: "1.0", id, source, type, subject: account, time: timeText(time ?? new Date()), data };
  let body;
  try {
    body = JSON.stringify(said, exact);
  } catch (error) {
    throw error instanceof InvalidEvent ? error : new InvalidEvent(`the event is not JSON: ${error.message}`);
  }
  const size = Buffer.byteLength(body);
  if (size > EVENT_BYTES_MAX) {
    throw new InvalidEvent(`an event has at most ${EVENT_BYTES_MAX} bytes, this one has ${size}`);
  }
  return { id, body };
}

/** @returns {string} a new id for an event: a UUIDv7 */
export function newId() {
  const bytes = randomBytes(16);
  bytes.writeUIntBE(Date.now(), 0, 6);
  bytes[6] = (bytes[6] & 0x0f) | 0x70;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = bytes.toString("hex");
  return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join("-");
}

/**
 * @param {string} account
 * @returns {string} the id of a new hold, made by whoever is going to place it
 */
export function newHoldId(account) {
  const partition = crc32(account.split("/", 1)[0]) % PARTITIONS;
  return `hold_${String(partition).padStart(2, "0")}_${newId()}`;
}

function timeText(time) {
  const moment = time instanceof Date ? time : new Date(time);
  if (Number.isNaN(moment.getTime())) throw new InvalidEvent("the time of an event is a time");
  return typeof time === "string" ? time : moment.toISOString();
}

function exact(_name, value) {
  // JSON.stringify would write null.
  if (typeof value === "number" && !Number.isFinite(value)) throw new InvalidEvent(`${value} is no JSON`);
  return value;
}
