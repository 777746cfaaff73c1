/**
 * The ledger over HTTP: holds and balances, with typed refusals. Every command has a key, so that asking again is safe;
 * it is asked again until it is answered or the time is up.
 */

import { setTimeout as pause } from "node:timers/promises";

import { decimalText, steps, written } from "./amounts.js";
import { AccountNotOpen, Away, HoldEnded, InsufficientFunds, Refused, RequestRejected } from "./errors.js";
import { newHoldId, newId } from "./events.js";

const AGAIN_MS_MIN = 50;
const AGAIN_MS_MAX = 500;

const REFUSALS = {
  insufficient_funds: InsufficientFunds,
  account_not_open: AccountNotOpen,
  wallet_not_open: AccountNotOpen,
  unknown_hold: HoldEnded,
  hold_released: HoldEnded,
  hold_settled: HoldEnded,
  hold_expired: HoldEnded,
};
const CALLERS_FAULT = new Set([400, 401, 403, 413, 415, 422]);
// A connection that never was has carried nothing.
const NOT_SENT = new Set(["ECONNREFUSED", "ENOTFOUND", "EAI_AGAIN", "EHOSTUNREACH", "UND_ERR_CONNECT_TIMEOUT"]);

/**
 * @typedef {{ amount: string, unit: string }} Amount
 * @typedef {Record<string, string | number> | { unit: string, atMost: string | number, atLeast?: string | number }[]} Legs
 *   how much to hold: by unit, all of it; or what is there between the two
 * @typedef {{ id: string, account: string, held: Amount[], remaining: (Amount & { account: string })[] }} Hold
 * @typedef {object} Wallet
 * @property {string} account
 * @property {string} unit
 * @property {"money" | "cap"} kind
 * @property {string} policy
 * @property {string} posted
 * @property {string} held
 * @property {string} available
 * @property {string} limit what was granted in lots of which something is left, or what renewals give, if that is more
 * @property {Date | null} renewsAt
 */

export class Ledger {
  #url;
  #token;
  #ms;

  /** @param {string} url @param {{ token: string, ms?: number }} options `ms`: how long an answer is waited for in all */
  constructor(url, { token, ms = 2_000 }) {
    this.#url = url;
    this.#token = token;
    this.#ms = ms;
  }

  /**
   * Set amounts aside before work is done.
   *
   * @param {string} account
   * @param {Legs} legs
   * @param {{ id?: string, lifetimeSeconds?: number, overdue?: "release" | "charge_estimate", scope?: object }} [options]
   * @returns {Promise<Hold>}
   */
  async hold(account, legs, { id = newHoldId(account), lifetimeSeconds = 900, overdue = "release", scope } = {}) {
    const body = { hold: id, account, legs: legsOf(legs), lifetime_seconds: lifetimeSeconds, overdue, scope };
    return readHold(id, account, await this.#ask("POST", "/v1/holds", body, `place:${id}`));
  }

  /**
   * Let a hold last so long from now, and set more aside.
   *
   * @param {Hold} hold
   * @param {{ lifetimeSeconds: number, legs?: Legs }} options
   * @returns {Promise<Hold>}
   */
  async extend(hold, { lifetimeSeconds, legs = [] }) {
    const body = { account: hold.account, lifetime_seconds: lifetimeSeconds, legs: legsOf(legs) };
    // A hold may be extended again and again.
    const said = await this.#ask("POST", `/v1/holds/${hold.id}/extend`, body, `extend:${newId()}`);
    const more = readHold(hold.id, hold.account, said);
    const held = new Map(hold.held.map(({ amount, unit }) => [unit, steps(amount)]));
    for (const { amount, unit } of more.held) held.set(unit, (held.get(unit) ?? 0n) + steps(amount));
    const remaining = more.remaining.length ? more.remaining : hold.remaining;
    return { ...more, held: [...held].map(([unit, amount]) => ({ amount: written(amount), unit })), remaining };
  }

  /**
   * Give back what a hold set aside. One that is not known will never be placed.
   *
   * @param {{ id: string, account: string }} hold
   */
  async release({ id, account }) {
    await this.#ask("POST", `/v1/holds/${id}/release`, { account }, `release:${id}`);
  }

  /**
   * What the account's own wallets have.
   *
   * @param {string} account
   * @returns {Promise<{ account: string, asOf: Date, wallets: Wallet[] }>}
   */
  async balance(account) {
    // An account's id is percent-encoded itself: what it has of `%` is part of it.
    const said = await this.#ask("GET", `/v1/balances/${account.replaceAll("%", "%25")}`);
    const wallets = said.wallets.map((each) => readWallet(said.account, each));
    return { account: said.account, asOf: new Date(said.as_of), wallets };
  }

  async #ask(method, path, body, key) {
    const deadline = Date.now() + this.#ms;
    const headers = { authorization: `Bearer ${this.#token}` };
    if (body !== undefined) headers["content-type"] = "application/json";
    if (key !== undefined) headers["idempotency-key"] = key;
    let maybeDone = false;
    for (let wait = AGAIN_MS_MIN; ; wait = Math.min(wait * 2, AGAIN_MS_MAX)) {
      let away;
      try {
        const response = await fetch(new URL(path, this.#url), {
          method,
          headers,
          body: body && JSON.stringify(body),
          redirect: "manual",
          signal: AbortSignal.timeout(Math.max(deadline - Date.now(), 10)),
        });
        return read(response.status, await response.text());
      } catch (error) {
        if (error instanceof Refused || error instanceof RequestRejected) throw error;
        away = error;
        maybeDone ||= error instanceof Away ? error.maybeDone : !NOT_SENT.has(error.cause?.code);
      }
      const ms = wait * (1 + Math.random());
      if (Date.now() + ms > deadline) throw new Away(away.cause?.message ?? away.message, maybeDone);
      await pause(ms);
    }
  }
}

function read(status, text) {
  let said;
  try {
    said = JSON.parse(text);
  } catch {
    said = null;
  }
  if (status >= 200 && status < 300) {
    if (said === null) throw new Away("the answer is not the ledger's", true);
    return said;
  }
  if (typeof said?.code !== "string") said = { code: "not_the_ledger", detail: `the answer ${status} is not the ledger's` };
  if (status >= 500 || status === 408 || status === 429) throw new Away(`${status} ${said.code}: ${said.detail}`, true);
  if (said.code in REFUSALS || !CALLERS_FAULT.has(status)) throw new (REFUSALS[said.code] ?? Refused)(status, said);
  throw new RequestRejected(status, said);
}

function legsOf(legs) {
  const each = Array.isArray(legs) ? legs : Object.entries(legs).map(([unit, atMost]) => ({ unit, atMost }));
  return each.map(({ unit, atMost, atLeast = atMost }) => ({
    unit,
    at_least: decimalText(atLeast),
    at_most: decimalText(atMost),
  }));
}

function readHold(id, account, said) {
  // A cap is counted on every wallet on the path: it is still one amount that was set aside.
  const byWallet = new Map();
  for (const each of said.movements) {
    const wallet = `${each.unit} ${each.account}`;
    byWallet.set(wallet, (byWallet.get(wallet) ?? 0n) + steps(each.held));
  }
  const held = new Map();
  for (const [wallet, amount] of byWallet) {
    const [unit] = wallet.split(" ", 1);
    if (amount > (held.get(unit) ?? 0n)) held.set(unit, amount);
  }
  return {
    id,
    account,
    held: [...held].map(([unit, amount]) => ({ amount: written(amount), unit })),
    remaining: said.remaining.map((each) => ({ account: each.account, amount: each.available, unit: each.unit })),
  };
}

function readWallet(account, said) {
  const total = (amounts) => amounts.reduce((sum, amount) => sum + steps(amount), 0n);
  const granted = total(said.lots.map((lot) => lot.granted));
  const renewed = total(said.renewals.map((renewal) => renewal.amount));
  const renews = said.renewals.map((renewal) => Date.parse(renewal.at));
  const { unit, kind, policy, posted, held, available } = said;
  return {
    account,
    unit,
    kind,
    policy,
    posted,
    held,
    available,
    limit: written(granted > renewed ? granted : renewed),
    renewsAt: renews.length ? new Date(Math.min(...renews)) : null,
  };
}
