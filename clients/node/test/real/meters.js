/** The unmodified SDK of OpenMeter asks meters and makes one, and writes what it was told: meters.js URL TOKEN. */

import { OpenMeter } from "@openmeter/sdk";

const [baseUrl, apiKey] = process.argv.slice(2);
const openmeter = new OpenMeter({ baseUrl, apiKey });

const listed = await openmeter.meters.list();
const calls = await openmeter.meters.get("calls");
const total = await openmeter.meters.query("calls");
const grouped = await openmeter.meters.query("input_tokens", {
  windowSize: "DAY",
  windowTimeZone: "Europe/Berlin",
  groupBy: ["model"],
  subject: ["acme"],
});
const made = await openmeter.meters.create({
  slug: "long_calls",
  eventType: "scrip.model.used.v1",
  aggregation: "SUM",
  valueProperty: "$.input_tokens",
  groupBy: { model: "$.model" },
});
const own = await openmeter.meters.query("long_calls");
await openmeter.meters.delete("long_calls");
const gone = await openmeter.meters.get("long_calls").catch((error) => error.status);
const unknown = await openmeter.meters.query("nothing").catch((error) => error.status);

process.stdout.write(
  JSON.stringify({
    slugs: listed.map(({ slug }) => slug),
    calls: { slug: calls.slug, aggregation: calls.aggregation, eventType: calls.eventType },
    total: total.data.map(({ value }) => value),
    grouped: grouped.data.map(({ value, groupBy, windowStart }) => ({ value, groupBy, hasDate: windowStart instanceof Date })),
    made: { slug: made.slug, hasDate: made.createdAt instanceof Date },
    own: own.data.map(({ value }) => value),
    gone,
    unknown,
  }),
);
