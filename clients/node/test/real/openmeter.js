/** The unmodified SDK of OpenMeter reports use, and writes what it was told: openmeter.js URL TOKEN. */

import { OpenMeter } from "@openmeter/sdk";

const [baseUrl, apiKey] = process.argv.slice(2);
const openmeter = new OpenMeter({ baseUrl, apiKey });

const use = (id, more = {}) => ({
  id,
  source: "demo",
  type: "scrip.model.used.v1",
  subject: "acme",
  data: { provider: "openai", model: "gpt-4o-mini", input_tokens: 1_000, output_tokens: 0 },
  ...more,
});

await openmeter.events.ingest(use("single"));
await openmeter.events.ingest(Array.from({ length: 100 }, (_, number) => use(`batch-${number}`)));
// With an id and a time of the SDK's own.
await openmeter.events.ingest({ ...use(undefined), id: undefined });
// A client that did not hear the answer sends the same again.
const again = use("again", { time: new Date(Date.now() - 60_000) });
await openmeter.events.ingest([again]);
await openmeter.events.ingest([again]);

const refused = await openmeter.events.ingest([use("good"), use("bad", { data: {} })]).catch((error) => error);
const stranger = await new OpenMeter({ baseUrl, apiKey: "guessed" }).events.ingest(use("stranger")).catch((error) => error);
const told = (error) => ({
  status: error.status,
  title: error.title,
  places: (error.getField("errors") ?? []).map(({ index }) => index),
});
process.stdout.write(JSON.stringify({ refused: told(refused), stranger: told(stranger) }));
