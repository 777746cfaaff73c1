/** An application on the real Express: express.js METERING LEDGER TOKEN SPOOL. Writes its port, serves until it is told to end. */

import express from "express";

import { metered, servedEvent } from "../../src/express.js";
import { Scrip } from "../../src/index.js";

const [url, ledgerUrl, token, spool] = process.argv.slice(2);
const scrip = new Scrip(url, { source: "operator", token, spool, ledgerUrl });

const app = express();
const router = express.Router();
router.use(
  metered(scrip, {
    account: (req) => req.get("x-account"),
    estimate: () => ({ usd: "0.01", calls: 1 }),
    limitsMs: 0,
    usage(req, admission, served) {
      const made = servedEvent(req, admission, served);
      if (made === null) return null;
      const { endpoint, status } = made.data;
      const tokens = { input_tokens: 2_000, output_tokens: 0 };
      const data = { provider: "openai", model: "gpt-4o-mini", ...tokens, attributes: { endpoint, status } };
      return { account: made.account, type: "scrip.model.used.v1", data };
    },
  }),
);
router.get("/fine", (_req, res) => res.json({ ok: true }));
router.get("/invalid", (_req, res) => res.status(422).json({ ok: false }));
router.get("/thrown", () => {
  throw new Error("broken");
});
router.get("/rejected", async () => {
  throw new Error("broken");
});
router.get("/stream", (_req, res) => {
  res.write("x".repeat(10));
  res.end("y".repeat(10));
});
app.use("/jobs", router);
app.get("/free", (_req, res) => res.json({ ok: true }));
// The errors are meant: nobody reads them.
app.use((_error, _req, res, _next) => res.status(500).json({ ok: false }));

const server = app.listen(0, "127.0.0.1", () => process.stdout.write(`${server.address().port}\n`));
process.stdin.on("end", async () => {
  server.close();
  await scrip.close();
});
process.stdin.resume();
