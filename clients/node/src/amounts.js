/** Amounts: decimal strings, computed with as integers of 10⁻⁹. A fraction as a number is refused: it is not exact. */

const DECIMAL = /^(-?)(\d+)(?:\.(\d{1,9}))?$/;
const SCALE = 1_000_000_000n;

/**
 * @param {string | number | bigint} amount
 * @returns {string} as the ledger reads it
 */
export function decimalText(amount) {
  if (typeof amount === "number" && !Number.isSafeInteger(amount)) {
    throw new TypeError(`an amount is text or a whole number, not ${amount}`);
  }
  return written(steps(String(amount)));
}

/**
 * @param {string} text
 * @returns {bigint} in steps of 10⁻⁹
 */
export function steps(text) {
  const found = DECIMAL.exec(text);
  if (found === null) throw new TypeError(`${JSON.stringify(text)} is not an amount`);
  const value = BigInt(found[2]) * SCALE + BigInt((found[3] ?? "").padEnd(9, "0"));
  return found[1] ? -value : value;
}

/**
 * @param {bigint} value in steps of 10⁻⁹
 * @returns {string}
 */
export function written(value) {
  const sign = value < 0n ? "-" : "";
  const size = value < 0n ? -value : value;
  const fraction = (size % SCALE).toString().padStart(9, "0").replace(/0+$/, "");
  return `${sign}${size / SCALE}${fraction ? `.${fraction}` : ""}`;
}

/**
 * @param {bigint} value in steps of 10⁻⁹
 * @returns {bigint} whole ones, rounded down
 */
export function whole(value) {
  const found = value / SCALE;
  return value < 0n && value % SCALE !== 0n ? found - 1n : found;
}
