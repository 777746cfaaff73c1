/** Scrip's edges as clients see them, on a socket: metering takes, refuses and fails as it is told; the ledger answers. */

import { createServer } from "node:http";
import { gunzipSync } from "node:zlib";

/** @param {(req: any, body: Buffer) => { status: number, json?: any, headers?: any, destroy?: boolean }} handle */
export async function serve(handle, port = 0) {
  const server = createServer(async (req, res) => {
    const parts = [];
    for await (const part of req) parts.push(part);
    const { status, json, headers, destroy } = await handle(req, Buffer.concat(parts));
    if (destroy) {
      req.socket.destroy();
      return;
    }
    const type = status >= 400 ? "application/problem+json" : "application/json";
    res.writeHead(status, { "content-type": type, ...headers });
    res.end(json === undefined ? undefined : JSON.stringify(json));
  });
  await new Promise((resolve) => server.listen(port, "127.0.0.1", resolve));
  return {
    url: `http://127.0.0.1:${server.address().port}`,
    port: server.address().port,
    close: () =>
      new Promise((resolve) => {
        server.close(resolve);
        server.closeAllConnections();
      }),
  };
}

/** Metering: an event whose type is `bad` is refused, by index. `fates` come before it looks. */
export class Metering {
  constructor(fates = []) {
    this.fates = fates;
    this.taken = new Map();
    this.requests = [];
    this.readsGzip = true;
  }

  handle = (req, body) => {
    this.requests.push({ path: req.url, headers: req.headers, body });
    const fate = this.fates.shift();
    if (fate && fate !== "lose") return fate;
    let text = body;
    if (req.headers["content-encoding"] === "gzip") {
      if (!this.readsGzip) return { status: 400, json: { code: "not_a_batch" } };
      text = gunzipSync(body);
    }
    const events = JSON.parse(text.toString());
    const errors = events
      .map(({ type }, index) => (type === "bad" ? { index, field: "type", detail: "unknown" } : null))
      .filter((each) => each !== null);
    if (errors.length) return { status: 400, json: { code: "invalid_events", errors } };
    for (const event of events) this.taken.set(event.id, event);
    return fate === "lose" ? { status: 0, destroy: true } : { status: 204 };
  };
}

/** The ledger: one account with so many calls, counted by holds; a released hold gives back. */
export class Ledger {
  constructor({ calls = 5 } = {}) {
    this.limit = calls;
    this.left = calls;
    this.held = new Map();
    this.released = [];
  }

  handle = (req, body) => {
    const said = body.length ? JSON.parse(body.toString()) : {};
    if (req.method === "GET") return this.#balance(decodeURIComponent(req.url.slice("/v1/balances/".length)));
    if (!req.headers["idempotency-key"]) return { status: 400, json: { code: "idempotency_key_missing" } };
    const released = /^\/v1\/holds\/(.+)\/release$/.exec(req.url);
    if (released) return this.#release(released[1]);
    return this.#place(said);
  };

  #place({ hold, account, legs }) {
    if (account === "nobody") return { status: 404, json: { code: "account_not_open", detail: "not open" } };
    const wanted = Number(legs.find(({ unit }) => unit === "calls").at_most);
    if (wanted > this.left) {
      const [required, remaining] = [wanted, this.left].map((amount) => ({ amount: String(amount), unit: "calls" }));
      const json = { code: "insufficient_funds", detail: "not enough", limit_source: account, required, remaining };
      return { status: 402, json };
    }
    this.left -= wanted;
    this.held.set(hold, wanted);
    const movements = [{ account, unit: "calls", lot: null, posted: "0", held: String(wanted), frozen: "0" }];
    return { status: 200, json: { movements, remaining: [{ account, unit: "calls", available: String(this.left) }] } };
  }

  #release(hold) {
    this.left += this.held.get(hold) ?? 0;
    this.held.delete(hold);
    this.released.push(hold);
    return { status: 200, json: { movements: [], remaining: [] } };
  }

  #balance(account) {
    const wallet = { unit: "calls", kind: "cap", policy: "hard", posted: "0", held: "0", available: String(this.left) };
    const renewals = [{ rule: "monthly", amount: String(this.limit), at: new Date(Date.now() + 3_600_500).toISOString() }];
    return { status: 200, json: { account, as_of: new Date().toISOString(), wallets: [{ ...wallet, lots: [], renewals }] } };
  }
}
