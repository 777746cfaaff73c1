/**
 * What can go wrong, as facts.
 *
 *     ScripError
 *     ├── NotAccepted            an event was not taken: the caller still has it
 *     │   ├── InvalidEvent       it is no event
 *     │   ├── SpoolFull          there is no room for it
 *     │   ├── SpoolFailed        the disk fails
 *     │   └── ClientClosed
 *     ├── NotDelivered           closed with events that are in memory only
 *     └── LedgerError
 *         ├── Refused            the ledger will not; nothing was changed
 *         │   ├── InsufficientFunds
 *         │   ├── AccountNotOpen
 *         │   └── HoldEnded
 *         ├── RequestRejected    the request, its key or its token is wrong
 *         └── Away               no answer, or not now
 */

/** Anything that this package throws. */
export class ScripError extends Error {
  get name() {
    return this.constructor.name;
  }
}

/** The event was not accepted: whoever reported it still has it. */
export class NotAccepted extends ScripError {}

/** What was reported is no usage event, whoever would be asked. */
export class InvalidEvent extends NotAccepted {}

/** There is no room for the event until others have been delivered. */
export class SpoolFull extends NotAccepted {}

/** The spool's file cannot be written. */
export class SpoolFailed extends NotAccepted {}

/** The client was closed before. */
export class ClientClosed extends NotAccepted {}

/** The client was closed with events that are neither delivered nor on disk: `bodies`, as JSON, are all of them. */
export class NotDelivered extends ScripError {
  /** @param {string[]} bodies */
  constructor(bodies) {
    super(`${bodies.length} events are in memory only and were not delivered`);
    this.bodies = bodies;
  }
}

/** A command or a question to the ledger did not succeed. */
export class LedgerError extends ScripError {}

/**
 * The ledger will not: nothing was changed. `limitSource` is the account whose wallet refused, `required` what it was
 * asked for, `remaining` what it has: each `{ amount, unit }`.
 */
export class Refused extends LedgerError {
  /** @param {number} status @param {Record<string, any>} said */
  constructor(status, said) {
    super(`${said.code}: ${said.detail ?? ""}`);
    this.status = status;
    this.code = said.code;
    this.detail = said.detail ?? "";
    this.limitSource = said.limit_source ?? null;
    this.required = said.required ?? null;
    this.remaining = said.remaining ?? null;
  }
}

/** A wallet has not got what is required. */
export class InsufficientFunds extends Refused {}

/** The account, or a wallet that is named, is not open. */
export class AccountNotOpen extends Refused {}

/** The hold is not there any more, or never was. */
export class HoldEnded extends Refused {}

/** The request cannot be right, however often it is sent. */
export class RequestRejected extends LedgerError {
  /** @param {number} status @param {Record<string, any>} said */
  constructor(status, said) {
    super(`${status} ${said.code}: ${said.detail ?? ""}`);
    this.status = status;
    this.code = said.code;
    this.errors = said.errors ?? [];
  }
}

/** The ledger did not answer in time, or cannot decide now. `maybeDone`: what was asked may have been done. */
export class Away extends LedgerError {
  /** @param {string} why @param {boolean} maybeDone */
  constructor(why, maybeDone) {
    super(why);
    this.maybeDone = maybeDone;
  }
}
