/** Reports uses of a model, and writes each id once it is accepted: report.js URL TOKEN SPOOL NAME COUNT. */

import { writeSync } from "node:fs";

import { Scrip } from "../../src/index.js";

const [url, token, spool, name, count] = process.argv.slice(2);
const scrip = new Scrip(url, { source: "demo", token, spool });
const data = { provider: "openai", model: "gpt-4o-mini", input_tokens: 1_000, output_tokens: 0 };

const CALLERS = 5;
let next = 0;

async function caller() {
  while (next < Number(count)) {
    const id = `${name}-${next}`;
    next += 1;
    await scrip.report({ account: "acme", type: "scrip.model.used.v1", id, data });
    writeSync(1, `${id}\n`);
  }
}

// Left without closing: what was accepted is on disk.
await Promise.all(Array.from({ length: CALLERS }, caller));
