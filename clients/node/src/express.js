/** Middleware for Express, and whatever calls (req, res, next): check the limit before, track after, tell both in headers. */

import { steps, whole, written } from "./amounts.js";
import { AccountNotOpen, Away, InsufficientFunds, LedgerError, NotAccepted, Refused } from "./errors.js";
import { newHoldId, newId } from "./events.js";

const ACCOUNTS_REMEMBERED_MAX = 10_000;

/**
 * @typedef {import("./ledger.js").Hold} Hold
 * @typedef {import("./ledger.js").Wallet} Wallet
 * @typedef {import("./ledger.js").Legs} Legs
 * @typedef {import("./events.js").UsageEvent} UsageEvent
 *
 * @typedef {object} Admission what the application finds as `req.scrip`
 * @property {string} id of the request, and of its usage event
 * @property {string} account
 * @property {string} holdId
 * @property {Hold | null} hold null if Scrip was away and the request is served all the same
 * @property {string} type of the usage event
 * @property {Record<string, any>} data what the usage event is to say besides
 * @property {boolean} used false: no work was done, the hold is released and nothing charged
 *
 * @typedef {object} Served
 * @property {number} status
 * @property {number} latencyMs
 * @property {number} responseBytes
 * @property {"completed" | "broke_off"} ended
 *
 * @typedef {object} LimitWarning
 * @property {string} account
 * @property {string} unit
 * @property {string} limit
 * @property {string} available
 * @property {number} percent
 *
 * @typedef {object} Rules
 * @property {(req: any) => string | null | Promise<string | null>} account whose request it is; null: not limited
 * @property {(req: any) => Legs | Promise<Legs>} estimate how much to hold: `{ calls: 1 }`
 * @property {(req: any, admission: Admission, served: Served) => UsageEvent | null} [usage] what is reported after;
 *   null: nothing was used
 * @property {string[] | ((req: any) => boolean)} [routes] path prefixes, or which requests are metered; without: all
 * @property {"refuse" | "serve"} [whenAway] what becomes of a request that Scrip cannot decide
 * @property {number} [lifetimeSeconds]
 * @property {"release" | "charge_estimate"} [overdue] what becomes of the hold of a request whose server died
 * @property {number} [warnPercent]
 * @property {(warning: LimitWarning) => void} [onWarning]
 * @property {string} [upgradeUrl]
 * @property {number} [limitsMs] how long an account's limits are remembered
 */

/**
 * @param {import("./index.js").Scrip} scrip
 * @param {Rules} rules
 * @returns {(req: any, res: any, next: (error?: any) => void) => Promise<void>}
 */
export function metered(scrip, rules) {
  const complete = { ...DEFAULTS, ...rules };
  const limits = new Limits(scrip, complete.limitsMs);
  return async (req, res, next) => {
    let admitted;
    try {
      const account = appliesTo(complete, req) ? await complete.account(req) : null;
      if (!account) return next();
      admitted = await admit(scrip, complete, limits, req, account);
    } catch (error) {
      return next(error);
    }
    if (admitted.problem) return answer(res, admitted.problem);
    req.scrip = admitted.admission;
    new Exchange(scrip, complete, req, res, admitted.admission, admitted.wallets).follow();
    return next();
  };
}

/**
 * The usage event of a request that did not fail: what is known of it, and what the application put in `data`.
 *
 * @param {any} req @param {Admission} admission @param {Served} served
 * @returns {UsageEvent | null}
 */
export function servedEvent(req, admission, served) {
  if (served.status >= 400 || !admission.used) return null;
  return {
    account: admission.account,
    type: admission.type,
    data: {
      endpoint: pathOf(req),
      method: req.method,
      status: served.status,
      latency_ms: served.latencyMs,
      response_bytes: served.responseBytes,
      ended: served.ended,
      ...admission.data,
    },
  };
}

const DEFAULTS = {
  usage: servedEvent,
  routes: ["/"],
  whenAway: "refuse",
  lifetimeSeconds: 300,
  overdue: "release",
  warnPercent: 80,
  limitsMs: 30_000,
};

async function admit(scrip, rules, limits, req, account) {
  const holdId = newHoldId(account);
  const admission = { id: newId(), account, holdId, hold: null, type: "request.served", data: {}, used: true };
  if (rules.whenAway === "refuse" && scrip.isFull) return { problem: away("there is no room to record it") };
  const legs = await rules.estimate(req);
  const { lifetimeSeconds, overdue } = rules;
  try {
    admission.hold = await scrip.ledger.hold(account, legs, { id: holdId, lifetimeSeconds, overdue });
  } catch (error) {
    if (error instanceof Refused) {
      return { problem: refusal(error, await limits.of([error.limitSource]), rules) };
    }
    if (!(error instanceof LedgerError)) throw error;
    process.emitWarning(`a hold cannot be placed: ${error.message}`, "ScripWarning");
    // If it was placed after all, the charge settles it; if not, it never will be.
    if (rules.whenAway === "serve") return { admission, wallets: [] };
    if (!(error instanceof Away) || error.maybeDone) release(scrip, admission);
    return { problem: away(`the ledger does not ${error instanceof Away ? "answer" : "accept us"}`) };
  }
  return { admission, wallets: await limits.of(admission.hold.remaining.map((each) => each.account)) };
}

/** One request's answer, on its way out: its use is on disk before its last byte is sent. */
class Exchange {
  #scrip;
  #rules;
  #req;
  #res;
  #admission;
  #wallets;
  #started = performance.now();
  #bytes = 0;
  #done = false;
  #released = false;

  constructor(scrip, rules, req, res, admission, wallets) {
    this.#scrip = scrip;
    this.#rules = rules;
    this.#req = req;
    this.#res = res;
    this.#admission = admission;
    this.#wallets = wallets;
  }

  follow() {
    const res = this.#res;
    const { write, end, writeHead } = res;
    res.writeHead = (...details) => {
      if (!res.headersSent) this.#tell();
      return writeHead.apply(res, details);
    };
    res.write = (chunk, ...details) => {
      const more = write.call(res, chunk, ...details);
      this.#count(chunk, details[0]);
      return more;
    };
    res.end = (...details) => {
      // What cannot be written is refused where it was said.
      if (this.#done || !isWritable(details[0])) return end.apply(res, details);
      this.#done = true;
      if (details[0] && typeof details[0] !== "function") this.#count(details[0], details[1]);
      this.#settle("completed")
        .then((recorded) => {
          if (recorded || res.headersSent) return end.apply(res, details);
          for (const name of res.getHeaderNames()) res.removeHeader(name);
          return answer(res, notRecorded(this.#admission.id));
        })
        .catch((error) => {
          // Nobody is left to be told but the client, whose connection ends.
          process.emitWarning(`an answer was not sent: ${error.message}`, "ScripWarning");
          res.destroy();
        });
      return res;
    };
    res.once("close", () => {
      if (this.#done) return;
      this.#done = true;
      if (res.headersSent) this.#settle("broke_off");
      else release(this.#scrip, this.#admission);
    });
  }

  #count(chunk, encoding) {
    if (chunk) {
      this.#bytes +=
        typeof chunk === "string"
          ? Buffer.byteLength(chunk, typeof encoding === "string" ? encoding : "utf8")
          : chunk.byteLength;
    }
  }

  /** Report the use, or release the hold. False: the use could not be recorded. */
  async #settle(ended) {
    const served = {
      status: this.#res.statusCode,
      latencyMs: Math.round(performance.now() - this.#started),
      responseBytes: this.#bytes,
      ended,
    };
    const admission = this.#admission;
    let event = null;
    try {
      event = this.#rules.usage(this.#req, admission, served);
      if (event === null) {
        this.#released = true;
        release(this.#scrip, admission);
        return true;
      }
      event = { id: admission.id, ...event, data: { hold: admission.holdId, ...event.data } };
      await this.#scrip.report(event);
      return true;
    } catch (error) {
      // All there is to make good by hand what is lost.
      process.emitWarning(`use not recorded: ${error.message}: ${JSON.stringify(event)}`, "ScripWarning");
      return error instanceof NotAccepted && this.#rules.whenAway === "serve";
    }
  }

  #tell() {
    const { hold, id } = this.#admission;
    const headers = { "X-Scrip-Request-Id": id };
    if (hold !== null) {
      if (hold.held.length) headers["X-Scrip-Held"] = hold.held.map(amountText).join(", ");
      const remaining = remainingAfter(hold, this.#released);
      const { told, warnings } = limitHeaders(remaining, this.#wallets, this.#rules.warnPercent, Date.now());
      Object.assign(headers, told);
      warn(this.#rules, warnings);
    }
    for (const [name, value] of Object.entries(headers)) this.#res.setHeader(name, value);
  }
}

/** What accounts were last found to be limited to. Remembered for a while: limits change rarely. */
class Limits {
  #scrip;
  #ms;
  /** @type {Map<string, { at: number, wallets: Wallet[] }>} */
  #found = new Map();

  constructor(scrip, ms) {
    this.#scrip = scrip;
    this.#ms = ms;
  }

  /** @param {(string | null)[]} accounts @returns {Promise<Wallet[]>} their wallets, as far as they are known */
  async of(accounts) {
    const wanted = [...new Set(accounts)].filter((each) => each !== null);
    return (await Promise.all(wanted.map((account) => this.#ofOne(account)))).flat();
  }

  async #ofOne(account) {
    const known = this.#found.get(account);
    if (known !== undefined && performance.now() - known.at < this.#ms) return known.wallets;
    let wallets = [];
    try {
      ({ wallets } = await this.#scrip.ledger.balance(account));
    } catch (error) {
      if (!(error instanceof LedgerError)) throw error;
      process.emitWarning(`limits of ${account} are not told: ${error.message}`, "ScripWarning");
    }
    this.#found.delete(account);
    this.#found.set(account, { at: performance.now(), wallets });
    if (this.#found.size > ACCOUNTS_REMEMBERED_MAX) this.#found.delete(this.#found.keys().next().value);
    return wallets;
  }
}

function warn(rules, warnings) {
  for (const warning of warnings) {
    try {
      rules.onWarning?.(warning);
    } catch (error) {
      // Somebody else's code, and no reason to answer nobody.
      process.emitWarning(error);
    }
  }
}

/** Whether it is what an answer may end with: a chunk, a callback, or nothing. */
function isWritable(chunk) {
  return chunk == null || typeof chunk === "string" || typeof chunk === "function" || chunk instanceof Uint8Array;
}

function release(scrip, { holdId, account }) {
  scrip.ledger.release({ id: holdId, account }).catch((error) => {
    process.emitWarning(`hold ${holdId} is left to its deadline: ${error.message}`, "ScripWarning");
  });
}

// What is told ---------------------------------------------------------------------------------------------------------

/** @param {Hold} hold @param {boolean} released */
export function remainingAfter(hold, released) {
  if (!released) return hold.remaining;
  const held = new Map(hold.held.map(({ unit, amount }) => [unit, steps(amount)]));
  return hold.remaining.map((each) => ({
    ...each,
    amount: written(steps(each.amount) + (held.get(each.unit) ?? 0n)),
  }));
}

/**
 * X-Scrip-Remaining and X-Scrip-Warning; RateLimit-Policy and RateLimit of caps, in whole numbers. And warnings.
 *
 * @param {{ account: string, unit: string, amount: string }[]} remaining
 * @param {Wallet[]} wallets
 * @param {number} warnPercent
 * @param {number} now
 * @returns {{ told: Record<string, string>, warnings: LimitWarning[] }}
 */
export function limitHeaders(remaining, wallets, warnPercent, now) {
  const tightest = new Map();
  for (const each of remaining) {
    const known = tightest.get(each.unit);
    if (known === undefined || steps(each.amount) < steps(known.amount)) tightest.set(each.unit, each);
  }
  const told = {};
  if (tightest.size) told["X-Scrip-Remaining"] = [...tightest.values()].map(amountText).join(", ");
  const policies = [];
  const rates = [];
  const warnings = [];
  for (const [unit, each] of tightest) {
    const wallet = wallets.find((found) => found.account === each.account && found.unit === unit);
    if (wallet === undefined || wallet.policy === "unlimited") continue;
    const limit = steps(wallet.limit);
    if (limit <= 0n) continue;
    const available = steps(each.amount) > 0n ? steps(each.amount) : 0n;
    if (wallet.kind === "cap") {
      const seconds = wallet.renewsAt && Math.max(Math.floor((wallet.renewsAt.getTime() - now) / 1000), 0);
      policies.push(`"${unit}";q=${whole(limit)}`);
      rates.push(`"${unit}";r=${whole(available)}${seconds === null ? "" : `;t=${seconds}`}`);
    }
    const percent = Math.max(Number(((limit - available) * 100n) / limit), 0);
    if (percent >= warnPercent) {
      warnings.push({ account: each.account, unit, limit: wallet.limit, available: written(available), percent });
    }
  }
  if (policies.length) Object.assign(told, { "RateLimit-Policy": policies.join(", "), RateLimit: rates.join(", ") });
  if (warnings.length) {
    told["X-Scrip-Warning"] = warnings.map(({ percent, limit, unit }) => `${percent}% of ${limit} ${unit} used`).join(", ");
  }
  return { told, warnings };
}

/**
 * What a client is told of a refusal: 402 if money is short, 429 if a cap is used up, 403 otherwise.
 *
 * @param {Refused} refused @param {Wallet[]} wallets @param {any} rules
 */
export function refusal(refused, wallets, rules, now = Date.now()) {
  if (!(refused instanceof InsufficientFunds)) {
    return problem(403, refused instanceof AccountNotOpen ? "account_not_open" : refused.code, refused.detail);
  }
  const { limitSource, required, remaining } = refused;
  const wallet = wallets.find((each) => each.unit === required?.unit);
  const isCap = wallet?.kind === "cap";
  const members = { limit_source: limitSource, required, remaining, upgrade_url: rules.upgradeUrl };
  const headers = {};
  if (limitSource !== null && remaining !== null) {
    const each = [{ account: limitSource, ...remaining }];
    const { told, warnings } = limitHeaders(each, wallets, rules.warnPercent, now);
    Object.assign(headers, told);
    warn(rules, warnings);
  }
  if (isCap && wallet.renewsAt !== null) {
    headers["Retry-After"] = String(Math.max(Math.floor((wallet.renewsAt.getTime() - now) / 1000), 1));
  }
  return problem(isCap ? 429 : 402, "insufficient_funds", refused.detail, members, headers);
}

const TITLES = {
  402: "Payment Required",
  403: "Forbidden",
  429: "Too Many Requests",
  500: "Internal Server Error",
  503: "Service Unavailable",
};

function problem(status, code, detail, members = {}, headers = {}) {
  return { body: { type: "about:blank", title: TITLES[status], status, code, detail, ...members }, headers };
}

function away(why) {
  const detail = `whether this may start cannot be decided now: ${why}`;
  return problem(503, "unavailable", detail, {}, { "Retry-After": "2" });
}

function notRecorded(id) {
  const detail = `the use of request ${id} could not be recorded`;
  return problem(500, "usage_not_recorded", detail, {}, { "X-Scrip-Request-Id": id });
}

function answer(res, { body, headers }) {
  const text = JSON.stringify(body);
  res.statusCode = body.status;
  for (const [name, value] of Object.entries(headers)) res.setHeader(name, value);
  res.setHeader("Content-Type", "application/problem+json");
  res.setHeader("Content-Length", Buffer.byteLength(text));
  res.end(text);
}

function amountText({ amount, unit }) {
  return `${amount} ${unit}`;
}

/**
 * The path as the client wrote it: Express takes off what a router is mounted at. A request may name a whole URL, or a
 * fragment, and is served all the same.
 */
function pathOf(req) {
  return (req.originalUrl ?? req.url).replace(/^[a-z][a-z0-9+.-]*:\/\/[^/?#]*/i, "").split(/[?#]/, 1)[0] || "/";
}

function appliesTo({ routes }, req) {
  if (typeof routes === "function") return routes(req);
  // Express serves /JOBS as /jobs, unless it is told otherwise.
  const path = pathOf(req).toLowerCase();
  return routes
    .map((each) => each.toLowerCase())
    .some((each) => path === each || path.startsWith(each.endsWith("/") ? each : `${each}/`));
}
