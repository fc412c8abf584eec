#!/usr/bin/env bun
/**
 * client-robust.ts: stage 3, the client made efficient and stable.
 *
 *     bun client-robust.ts                              # GET http://localhost:8888/data
 *     bun client-robust.ts http://example.test/a.html   # another URL: head, then content
 *     bun client-robust.ts -o a.iso http://example.test/a.iso
 *
 * It receives in a loop until the framing says that the response is complete (RFC 9112 §6.3), never
 * because no more bytes came. Transient failures are retried, and the transfer continues where it broke
 * off: the bytes are those of one version of the content, or there is a failure, with curl's exit code.
 * Memory is constant.
 *
 * It reads from top to bottom: limits, words, errors; **the transfer**, which is the tutorial's try { connect;
 * send; receive … } catch … finally { close } and the loop around it; the policy; the request; the response
 * (head, framing, content); text; sockets; what is held of the content; where it goes; the command line.
 *
 * Left out: HTTP/2, compression, cookies, proxies, several URLs.
 */
import * as fs from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { parseArgs } from "node:util";

// ═══ 1 Limits and defaults ═════════════════════════════════════════════════════════════════════

export const VERSION = "0.1.0";

export const LIMITS = Object.freeze({
  headBytesMax: 65_536, // the whole head: twice what servers take in a request, as some set many large cookies
  fieldLinesMax: 200, // twice what servers take in a request
  interimResponsesMax: 100, // RFC 9110 §15.2: a client reads any number of 1xx; nobody has reason to send more than a few
  chunkExtensionBytesMax: 1_048_576, // allowed beyond the size of the content: some servers sign each chunk with 85 bytes
  receivedBytesMax: 1_048_576, // received and not yet taken: then we stop reading, and TCP slows the server (backpressure)
  writeRetryMs: 10, // the wait before the next write to a stdout that somebody has made non-blocking, and that is full
  backoffFirstMs: 1000, // the first retry waits about a second, the next two, then four …
  backoffMaxMs: 60_000,
  retryAfterMaxMs: 3_600_000, // a server that asks for a longer wait is given up, unless --retry-max-time allows it
  strongDateAgeMs: 60_000, // RFC 9110 §8.8.2.2: a date names one version if it is this much older than the response
  heldDataBytesMax: 67_108_864, // content to send from stdin or a pipe, which is held so that it can be sent again
  syncEveryBytes: 67_108_864, // the disk is told to begin after this much
  redirectsMax: 50, // as curl
  tracedBytesMax: 40, // of what a receive brought: a line of the trace fits into a terminal
  progressAfterMs: 1000, // the progress line is not for what is done at once …
  progressEveryMs: 200, // … and changes no more often than an eye can follow
});

export const DEFAULTS = Object.freeze({
  url: "http://localhost:8888/data",
  connectTimeoutS: 10, // a SYN is sent again after 1, 3 and 7 s: this allows for three that were lost
  stallTimeoutS: 60, // silence is a failure after this long; slow is not, and a report may take half a minute to begin
  retries: 5, // in a row without new data: with their waits, a server that restarts has some 20 s
});

// ═══ 2 Words ═══════════════════════════════════════════════════════════════════════════════════

export interface Request {
  readonly method: string;
  readonly url: URL;
  /** Field-lines of the user's, which replace those of the same name that would be sent otherwise. */
  readonly fields: readonly (readonly [name: string, value: string])[];
  readonly content: readonly Blob[] | undefined; // can be read as often as it must be sent
}

/** A response head. Field names are in lower case, in the order of arrival. */
export interface ResponseHead {
  readonly status: number;
  readonly reasonPhrase: string;
  readonly minorVersion: number;
  readonly fields: readonly (readonly [name: string, value: string])[];
  readonly text: string; // the head as it came, one character a byte
}

/** Where content ends (RFC 9112 §6.3): after this many octets, with the last chunk, with the connection. */
export type Framing = number | "chunked" | "close";

/** What is held of the content: this many bytes from its start, of the version that the validator names. */
export interface Held {
  readonly bytes: number;
  readonly validator: string; // for If-Range: a strong entity-tag or a strong date, which names these very bytes; or ""
  readonly etag: string; // the fields as the server sent them, weak or strong; "" without one
  readonly lastModified: string;
  readonly total: number | undefined; // the length of the whole, if a response has told it
}

export const NOTHING: Held = Object.freeze({ bytes: 0, validator: "", etag: "", lastModified: "", total: undefined });

/** Where the content goes. Its methods throw TransferErrors and what node:fs throws. */
export interface Sink {
  readonly found: Held; // what an earlier run has left, to be continued
  /** The final head is here. Content follows that continues `held`; if that is nothing, it is a new version's. */
  start(head: ResponseHead, held: Held): void;
  write(content: Uint8Array): Promise<void>;
  /** The content is whole and verified. @returns what the user should know about it, or "" */
  finish(): Promise<string>;
  digest?(): string | undefined; // SHA-256 in hex of all that was written, if it can be read again
  discard?(): void; // throws away what was written, if that can be taken back
  endLine?(): void; // ends the line that a terminal is in, before something else is printed there
  /** Called last, however the transfer ended. @returns how to continue, or "" */
  close(): string | Promise<string>;
}

/** What the user asked for, as far as decisions depend on it. */
export interface Policy {
  readonly keepsOnlyContent: boolean; // -o: the page of an error or of a redirect must not pass for content
  readonly canStartOver: boolean; // content that is held can be thrown away; what is on stdout cannot
  readonly isVerified: boolean; // by --sha256 at the end, so pieces may be joined whatever their validators say
  readonly followsRedirects: boolean;
  readonly isConditional: boolean; // the user has sent a condition: a 304 is an answer even to a request for the rest
  readonly retries: number;
  readonly retryDelayMs: number | undefined; // the wait before each retry; undefined for one that grows
  readonly retryMaxMs: number; // may be Infinity, as the next two
  readonly sizeMax: number;
}

/** All that the user asked for. */
export interface Job extends Policy {
  readonly maxMs: number; // for everything
  readonly request: Request;
  readonly connectMs: number;
  readonly stallMs: number;
  readonly authoritiesFile: string | undefined; // certificates in PEM that are trusted instead of the system's
  readonly isInsecure: boolean; // certificates are not verified
  readonly sha256: string; // that the content must have, in lower-case hex; "" if any will do
  readonly keepsTime: boolean; // FILE gets the time of Last-Modified
  readonly isSilent: boolean;
  readonly isVerbose: boolean;
  readonly isTraced: boolean; // each step on a connection is a line on stderr
}

// ═══ 3 Errors ══════════════════════════════════════════════════════════════════════════════════

/** Outcomes and their exit codes: curl's, so that scripts need not learn new ones. */
export const EXIT_CODES = Object.freeze({
  ok: 0,
  fault: 1, // of this program
  usage: 2,
  url: 3,
  resolve: 6,
  connect: 7,
  unparsable: 8,
  partial: 18,
  status: 22,
  write: 23,
  timeout: 28,
  digest: 29, // no code of curl's that is in use: the content is whole, but is not what a digest says
  range: 33, // what came is not the part, or not the whole, that was asked for
  tls: 35,
  redirects: 47,
  empty: 52,
  send: 55,
  receive: 56,
  certificate: 60,
  tooLarge: 63,
  authorities: 77, // --cacert is not a file of certificates
});
export type Outcome = keyof typeof EXIT_CODES;

/** A transfer that failed: `outcome` says how, the message says it in a line. */
export class TransferError extends Error {
  readonly retryAfterMs: number = 0; // RFC 9110 §10.2.3: do not come back before
  readonly isFinal: boolean = false; // another attempt cannot help, though the outcome alone would not say so
  readonly isQuiet: boolean = false; // a line on stderr would only disturb: `| head` has what it wanted
  readonly isPart: boolean = false; // the response was whole, but only a part of what is missing: the server has more
  readonly spoils: boolean = false; // what is held may be wrong

  constructor(
    readonly outcome: Outcome,
    message: string,
    more: Partial<Pick<TransferError, "retryAfterMs" | "isFinal" | "isQuiet" | "isPart" | "spoils">> = {},
  ) {
    super(message);
    Object.assign(this, more);
  }
}

/** What Bun and node:fs throw. */
type SystemError = Error & { code?: string; syscall?: string; path?: string };

/** What a system call's failure means for the transfer. */
function explainSystemError({ code, message }: SystemError, outcome: Outcome, doing: string): TransferError {
  return new TransferError(outcome, `${doing}: ${code ?? message}`, {
    isQuiet: outcome === "write" && code === "EPIPE",
  });
}

/** Everything that is thrown becomes a TransferError here. Only calls of node:fs get this far with another error. */
export function asTransferError(error: unknown): TransferError {
  if (error instanceof TransferError) return error;
  const fault = error as SystemError; // whatever it is, these are only read
  const doing = fault?.path === undefined ? "cannot write" : `cannot write ${fault.path}`;
  if (fault?.syscall !== undefined) return explainSystemError(fault, "write", doing);
  return new TransferError("fault", `a fault of this program: ${fault?.message ?? fault}`);
}

// ═══ 4 The transfer ════════════════════════════════════════════════════════════════════════════

/** What one attempt and the next ones share. */
interface Session {
  readonly job: Job;
  readonly delivery: Delivery;
  readonly clock: Clock;
  readonly progress: ProgressLine;
  readonly trace: Trace | undefined;
  first: Request; // what every attempt begins with: the user's request, or what a redirect has made a GET of it
  request: Request; // the last request
  asksForWhole: boolean; // the next request is for the whole, though something is held
  wasSent: boolean; // a request has been sent, in part at least
  failures: number; // attempts in a row that have failed and brought no new data
  note: string; // what the user should know about content that has been delivered
}

/**
 * The heart: one request, one response, from connect to close.
 * @returns nothing if the response is whole and delivered, the redirect that it is, or why the transfer failed
 */
export async function transfer(session: Session): Promise<undefined | Redirect | TransferError> {
  const { job, delivery, request, trace } = session;
  let connection: Connection | undefined;
  try {
    connection = await connect(request.url, session.clock, job, trace);
    await sendRequest(connection, session);
    const { head, framing, rest } = await receiveHead(connection, request.method);
    trace?.complete("head");
    const verdict = beginResponse(head, session);
    if (verdict.action === "redirect") return verdict;
    if (verdict.action === "complete") session.note = await delivery.finish(head, framing);
    if (verdict.action !== "deliver") return undefined;
    for await (const content of receiveContent(connection, framing, rest)) {
      trace?.complete("content");
      await delivery.write(content);
      session.progress.show(delivery.held);
    }
    trace?.complete("content complete");
    // An error page has been printed by now, and is a failure all the same.
    if (request.method !== "HEAD") session.note = await delivery.finish(head, framing);
    requireSuccess(head, job.keepsOnlyContent, request.method);
    return undefined;
  } catch (error) {
    const failure = asTransferError(error);
    if (failure.spoils) delivery.discard();
    return failure;
  } finally {
    connection?.close();
  }
}

/** @throws TransferError */
async function sendRequest(connection: Connection, session: Session): Promise<void> {
  const { job, delivery, request } = session;
  const head = formatRequest(request, session.asksForWhole ? NOTHING : delivery.held);
  if (job.isVerbose) tellLines("> ", head);
  session.wasSent = true;
  let [start, left]: [Uint8Array, number] = [head, contentLength(request)];
  for await (const piece of piecesOfData(request)) {
    // A small request is one write. A server that answers already has its reasons: the rest is not sent.
    if (!(await connection.send(Buffer.concat([start, piece])))) return;
    [start, left] = [new Uint8Array(0), left - piece.length];
    await new Promise((resolve) => setImmediate(resolve)); // a fast disk and a fast peer would keep timers waiting
  }
  if (left > 0) throw new TransferError("send", "the data has become shorter", { isFinal: true });
  await connection.send(start);
}

async function* piecesOfData({ content = [] }: Request): AsyncGenerator<Uint8Array> {
  try {
    for (const blob of content) yield* blob.stream();
  } catch (error) {
    throw new TransferError("send", `cannot read the data: ${(error as SystemError).code}`, { isFinal: true }); // Bun's
  }
}

/** The head is here: does its content count? @throws TransferError if not */
function beginResponse(head: ResponseHead, session: Session): Verdict {
  const { job, delivery, request } = session;
  const { held } = delivery;
  if (job.isVerbose) tellLines("< ", Buffer.from(head.text, "latin1"));
  const isLastTry = session.failures >= job.retries || !IDEMPOTENT_METHOD.test(request.method);
  const hasRange = held.bytes > 0 && !session.asksForWhole;
  const verdict = judgeHead(head, held, job, { method: request.method, hasRange, isLastTry });
  if (verdict.action === "fail") throw verdict.failure;
  if (verdict.action !== "deliver") return verdict;
  if (verdict.held.bytes === 0 && job.keepsOnlyContent && !job.isSilent) {
    session.progress.clear();
    if (held.bytes > 0 && held.validator !== "") tell("Starting over: the content has changed");
    if (held.bytes > 0 && held.validator === "") tell("Starting over: nothing tells whether the content has changed");
  }
  delivery.start(head, verdict);
  return verdict;
}

/**
 * The loop around the heart: follows redirects, tries again, continues where it broke off.
 * @returns the exit code; a failure has been printed by then, as one line on stderr
 */
export async function download(job: Job, sink: Sink): Promise<number> {
  const [clock, delivery] = [new Clock(job), new Delivery(sink, job)];
  const progress = new ProgressLine(job, clock);
  const trace = job.isTraced ? new Trace() : undefined;
  const { request } = job;
  const state = { first: request, request, asksForWhole: false, wasSent: false, failures: 0, note: "" };
  const session: Session = { job, delivery, clock, progress, trace, ...state };
  try {
    for (;;) {
      const failure = await followRedirects(session);
      if (failure === undefined) progress.finish(session);
      const exitCode = failure === undefined ? EXIT_CODES.ok : await prepareRetry(failure, session);
      if (exitCode !== undefined) return exitCode;
    }
  } finally {
    progress.clear();
    const advice = await sink.close();
    if (advice !== "" && !job.isSilent) tell(advice);
  }
}

async function followRedirects(session: Session): Promise<TransferError | undefined> {
  session.request = session.first;
  for (let redirects = 0; redirects <= LIMITS.redirectsMax; redirects++) {
    const ending = await transfer(session);
    if (ending === undefined || ending instanceof TransferError) return ending;
    const url = URL.parse(ending.location, session.request.url);
    if (url === null || !isSpoken(url))
      return new TransferError("url", `cannot follow the redirect to ${ending.location}`);
    const next = redirect(session.request, ending.status, url);
    // RFC 9110 §15.4.4: what the first request was for is done, and a retry repeats the GET alone.
    if (next.method !== session.request.method) session.first = next;
    session.request = next;
  }
  return new TransferError("redirects", `more than ${LIMITS.redirectsMax} redirects`);
}

/** Waits until it is time for another attempt, and prepares it; or says that it is all over. @returns the exit code */
async function prepareRetry(failure: TransferError, session: Session): Promise<number | undefined> {
  const { job, delivery, clock, progress, wasSent, request } = session;
  session.failures = delivery.takeProgress() ? 1 : session.failures + 1;
  const [{ method }, { failures }, { elapsedMs }] = [request, session, clock];
  const attempt = { failure, method, wasSent, failures, elapsedMs };
  const decision = decideNext(attempt, delivery.held, job, Math.random);
  progress.clear();
  delivery.sink.endLine?.();
  if (decision.action === "give-up") {
    const why = decision.why === "" ? "" : ` (${decision.why})`;
    if (!failure.isQuiet) tell(`Error: ${failure.message}${why}`);
    return EXIT_CODES[failure.outcome];
  }
  session.asksForWhole = decision.asksForWhole;
  const leftMs = Math.max(0, job.maxMs - clock.elapsedMs);
  const seconds = (decision.afterMs / 1000).toFixed(1);
  if (!job.isSilent && decision.afterMs < leftMs)
    tell(`Retry in ${seconds} s: ${failure.message}; ${delivery.held.bytes} bytes kept`);
  await Bun.sleep(Math.min(decision.afterMs, leftMs));
  if (decision.afterMs < leftMs) return undefined;
  tell(`Error: not done within ${job.maxMs / 1000} s; before that, ${failure.message}`);
  return EXIT_CODES.timeout;
}

// ═══ 5 Policy ══════════════════════════════════════════════════════════════════════════════════
// Two pure functions: `judgeHead` says what to do with a response once its head is here, `decideNext`
// what to do after an attempt has failed.

/** What to do with a response whose head is here. */
export type Verdict =
  /** Its content is bytes `from` to before `end` of the whole, where `held` is held. If that is nothing, it starts over. */
  | { readonly action: "deliver"; readonly from: number; readonly end: number; readonly held: Held }
  | { readonly action: "complete" } // what is held is the whole
  | { readonly action: "unchanged" } // 304: the user has it already
  | Redirect
  | { readonly action: "fail"; readonly failure: TransferError };
type Redirect = { readonly action: "redirect"; readonly status: number; readonly location: string };

/** What may have passed the next time: of RFC 9110 §15, of others (425, 507), and of the proxies of large networks. */
const PASSING_STATUS = /^(408|425|429|50[0234]|507|52[0-4]|530|599)$/;
const REDIRECT_STATUS = /^30[12378]$/;
/** RFC 9110 §9.2.2: asking twice is as good as asking once. */
const IDEMPOTENT_METHOD = /^(GET|HEAD|OPTIONS|TRACE|PUT|DELETE)$/;

/**
 * What to do with a response, where `held` is what we have.
 * @param hasRange the request had Range, so the response may be the rest of what is held
 * @param isLastTry no further attempt will follow: an error page is what there is to show
 */
export function judgeHead(
  head: ResponseHead,
  held: Held,
  policy: Policy,
  { method = "GET", hasRange = held.bytes > 0, isLastTry = false } = {},
): Verdict {
  const { status } = head;
  const [location = ""] = REDIRECT_STATUS.test(`${status}`) ? fieldValues(head, "location").map(asText) : [];
  if (policy.followsRedirects && location !== "") return { action: "redirect", status, location };
  if (status === 304 && policy.keepsOnlyContent && (held.bytes === 0 || policy.isConditional))
    return { action: "unchanged" };
  const onlyContentCounts = policy.keepsOnlyContent || held.bytes > 0;
  // RFC 9110 §14.4, §15.5.17: only an answer to Range may be a part, or say that there is none.
  if (status === 206 && hasRange) return judgePart(head, held, policy);
  if (status === 416 && hasRange) return judgeUnsatisfiable(head, held);
  if (status === 206 && onlyContentCounts) return failed("range", "the server sent a part of the content, unasked");
  const canPass = PASSING_STATUS.test(`${status}`) || (status === 202 && onlyContentCounts && method === "GET");
  if (canPass && !isLastTry) return failed("status", describeStatus(head), { retryAfterMs: parseRetryAfter(head) });
  const advice = location === "" ? "" : `; -L follows it to ${location}`;
  if (onlyContentCounts && !hasContent(head, method))
    return failed("status", describeStatus(head) + advice, { isFinal: true });
  return judgeWhole(head, held, policy, method);
}

/** A whole response: what is held of the same version is passed over, what is held of another is given up. */
function judgeWhole(head: ResponseHead, held: Held, policy: Policy, method: string): Verdict {
  const isGet = method === "GET";
  const stated = isGet && (policy.keepsOnlyContent || held.bytes > 0) ? rangesOfWhole(head) : [];
  const length = promisedLength(head, method) ?? stated[0];
  if (stated.some((complete) => complete !== length))
    return failed("range", "the server sent a part of the content as if it were the whole");
  if (length !== undefined && length > policy.sizeMax) return tooLarge(policy);
  const version = isGet && head.status === 200 ? versionOf(head) : NOTHING;
  // What an earlier response said of this version still holds: its length, if this one does not tell any.
  const total = length ?? held.total;
  const isNamedSame = version.validator !== "" && version.validator === held.validator && agrees(head, held);
  if (held.bytes > 0 && (isNamedSame || policy.isVerified) && total === (held.total ?? total))
    return { action: "deliver", from: 0, end: total ?? Number.POSITIVE_INFINITY, held: { ...held, total } };
  if (held.bytes > 0 && !policy.canStartOver) return failed("partial", CHANGED, { isFinal: true });
  const fresh = { ...NOTHING, ...version, bytes: 0, total: isNamedSame ? total : length };
  return { action: "deliver", from: 0, end: length ?? Number.POSITIVE_INFINITY, held: fresh };
}

const CHANGED = "the content has changed since its first part was printed, which cannot be taken back";

/** A part is used only if it continues what is held without a gap, and is of the same version. */
function judgePart(head: ResponseHead, held: Held, policy: Policy): Verdict {
  const { first, last, complete } = parseContentRange(singleValue(head, "content-range"));
  const total = complete ?? held.total;
  const length = last - first + 1;
  const fits =
    // Caches that work in blocks begin earlier: what overlaps is passed over.
    first <= resumeFrom(held) &&
    // RFC 9110 §15.3.7: it may be less than what was asked for; the next attempt gets the rest.
    last >= resumeFrom(held) &&
    total !== undefined &&
    last < total &&
    total === (held.total ?? total) &&
    length === (promisedLength(head, "GET") ?? length) &&
    (policy.isVerified || agrees(head, held));
  if (!fits) return failed("range", "the server sent another part than the one that is missing");
  if (total > policy.sizeMax) return tooLarge(policy);
  return { action: "deliver", from: first, end: last + 1, held: { ...held, total } };
}

/** RFC 9110 §15.5.17: nothing lies behind what is held. It is the whole only if its length and version say so. */
function judgeUnsatisfiable(head: ResponseHead, held: Held): Verdict {
  const [, complete] = /^bytes \*\/(\d{1,15})$/i.exec(singleValue(head, "content-range")) ?? [];
  const { validator } = versionOf(head);
  const isLength = Number(complete) === held.bytes && (held.total ?? held.bytes) === held.bytes;
  const isWhole = isLength && validator === held.validator && validator !== "";
  return isWhole ? { action: "complete" } : failed("range", "the server has no such part");
}

const failed = (
  outcome: Outcome,
  message: string,
  more: { retryAfterMs?: number; isFinal?: boolean } = {},
): Verdict => ({
  action: "fail",
  failure: new TransferError(outcome, message, more),
});
const tooLarge = ({ sizeMax }: Policy) => failed("tooLarge", `the content is larger than ${sizeMax} bytes`);
const describeStatus = ({ status, reasonPhrase }: ResponseHead) =>
  `the server answered ${status} ${asText(reasonPhrase)}`.trimEnd();

/**
 * Does the response carry what the URL names? To GET only these do (RFC 9110 §6.4.2): the content of a 202, 205 or 207
 * is about something else. To another method any 2xx may.
 */
const hasContent = ({ status }: ResponseHead, method: string) =>
  method === "GET" ? status === 200 || status === 203 || status === 206 : status >= 200 && status < 300;

/** Checks that the response, which is whole, is what was asked for. @throws TransferError "status" */
export function requireSuccess(head: ResponseHead, keepsOnlyContent: boolean, method: string): void {
  if (!(keepsOnlyContent ? hasContent(head, method) : head.status < 400))
    throw new TransferError("status", describeStatus(head), { isFinal: true });
}

/** RFC 9110 §14.4: Content-Range = "bytes" SP first "-" last "/" complete-length; "*" if that is not known. */
function parseContentRange(value: string): { first: number; last: number; complete: number | undefined } {
  const [, first, last, complete] = /^bytes (\d{1,15})-(\d{1,15})\/(\d{1,15}|\*)$/i.exec(value) ?? [];
  return { first: Number(first), last: Number(last), complete: complete === "*" ? undefined : Number(complete) };
}

/**
 * What Content-Range says where it has no meaning (RFC 9110 §14.4), in a response that should carry the whole. Servers
 * exist that answer Range so, and their content is what the field says.
 * @returns for each range the length of the whole, or NaN if it is not the range of a whole
 */
const rangesOfWhole = (head: ResponseHead): number[] =>
  fieldValues(head, "content-range")
    .filter((value) => /^bytes\b/i.test(value))
    .map(parseContentRange)
    .map(({ first, last, complete }) => (first === 0 && last + 1 === complete ? complete : Number.NaN));

const STRONG_ETAG = /^"[\x21\x23-\x7e\x80-\xff]*"$/;

/** What names the version that a whole response to a GET is of. */
export function versionOf(head: ResponseHead): Pick<Held, "validator" | "etag" | "lastModified"> {
  const [etag, lastModified] = [singleValue(head, "etag"), singleValue(head, "last-modified")];
  // RFC 9110 §13.1.5 wants a date only from a server without entity-tags; but many give weak ones and a date, which is
  // strong all the same if nothing can have changed within its second (§8.8.2.2).
  const age = (parseHttpDate(singleValue(head, "date")) ?? 0) - (parseHttpDate(lastModified) ?? Number.NaN);
  const strongDate = age >= LIMITS.strongDateAgeMs ? lastModified : "";
  return { etag, lastModified, validator: STRONG_ETAG.test(etag) ? etag : strongDate };
}

/** Nothing in the response says that it is of another version than what is held. */
const agrees = (head: ResponseHead, { etag, lastModified }: Held) =>
  fieldValues(head, "etag").every((value) => etag === "" || value === etag) &&
  fieldValues(head, "last-modified").every((value) => lastModified === "" || value === lastModified);

/** RFC 9110 §10.2.3: Retry-After = HTTP-date / delay-seconds. @returns milliseconds from now; 0 if it says nothing */
export function parseRetryAfter(head: ResponseHead, now = Date.now()): number {
  const value = singleValue(head, "retry-after");
  return /^\d+$/.test(value) ? Number(value) * 1000 : Math.max(0, (parseHttpDate(value) ?? now) - now);
}

/** What an attempt has come to. */
export interface Attempt {
  readonly failure: TransferError;
  readonly method: string;
  readonly wasSent: boolean; // the request may have reached the server
  readonly failures: number; // attempts in a row that have failed and brought no new data, this one included
  readonly elapsedMs: number; // since the first attempt
}

/** `asksForWhole`: the next request is not only for what is missing. */
export type Decision =
  | { readonly action: "retry"; readonly afterMs: number; readonly asksForWhole: boolean }
  | { readonly action: "give-up"; readonly why: string };

/**
 * What can pass: the next attempt may well succeed. Names of containers come late; what is "unparsable" may be a server
 * that is just starting; "tls" is a connection that was lost before there was TLS.
 */
const PASSING_OUTCOME = /^(resolve|connect|tls|empty|send|receive|timeout|unparsable|partial|status|range|digest)$/;

/** Half of a wait is fixed, so that a server has time; half is random, so that many clients do not return at once. */
const backoffMs = (failures: number, random: () => number) =>
  Math.min(LIMITS.backoffMaxMs, LIMITS.backoffFirstMs * 2 ** (failures - 1)) * (0.5 + random() / 2);

/**
 * What to do after an attempt that failed.
 *
 * | the failure | then |
 * | --- | --- |
 * | can not pass (a certificate, 404, conflicting lengths, disk full) | give up |
 * | the method is not idempotent, and the request was sent | give up |
 * | no retries are left, or no time, or Retry-After goes too far | give up |
 * | the response was whole, but only a part of what is missing | ask for the next part at once |
 * | what came does not fit, or nothing names the version held | ask for the whole; on stdout it cannot always be used |
 * | anything else | continue from what is held |
 */
export function decideNext(attempt: Attempt, held: Held, policy: Policy, random: () => number): Decision {
  const { failure, failures } = attempt;
  const giveUp = (why: string): Decision => ({ action: "give-up", why });
  if (!PASSING_OUTCOME.test(failure.outcome) || failure.isFinal) return giveUp("");
  if (attempt.wasSent && !IDEMPOTENT_METHOD.test(attempt.method)) return giveUp("");
  if (failures > policy.retries) return giveUp(policy.retries > 0 ? `after ${failures} attempts` : "");
  const leftMs = policy.retryMaxMs - attempt.elapsedMs;
  if (leftMs <= 0) return giveUp("no time is left for another attempt");
  const { retryAfterMs } = failure;
  if (retryAfterMs > (Number.isFinite(leftMs) ? leftMs : LIMITS.retryAfterMaxMs))
    return giveUp(`Retry-After is too long: ${Math.ceil(retryAfterMs / 1000)} s`);
  const isNameless = held.bytes > 0 && held.validator === "" && !policy.isVerified;
  const needsOther = isNameless || failure.spoils;
  if (needsOther && !policy.canStartOver) return giveUp("what is printed cannot be continued exactly");
  // RFC 9110 §15.3.7: a part may be less than what was asked for. Nothing is wrong, so the next is asked for at once.
  const wait = failure.isPart && failures === 1 ? 0 : (policy.retryDelayMs ?? backoffMs(failures, random));
  const afterMs = Math.max(retryAfterMs, Math.min(wait, leftMs));
  return { action: "retry", afterMs, asksForWhole: isNameless || failure.outcome === "range" };
}

// ═══ 6 The request ═════════════════════════════════════════════════════════════════════════════

/**
 * The byte to continue from. If the end may have been reached already, that is the last byte held: a range past the
 * end gets 416, which need not name the version.
 */
const resumeFrom = ({ bytes, total }: Held) => (total === undefined || bytes === total ? bytes - 1 : bytes);
const contentLength = ({ content = [] }: Request) => content.reduce((length, { size }) => length + size, 0);

/**
 * The head of the request as it goes over the wire (RFC 9112 §3), for the whole content or for what is missing of
 * `held`. Range (RFC 9110 §14.2) asks for the rest; If-Range (§13.1.5) makes it the whole if the version has changed.
 */
export function formatRequest(request: Request, held: Held): Uint8Array {
  const { method, url, fields, content } = request;
  const replaced = fields.map(([name]) => name.toLowerCase());
  const all = [
    ["Host", url.host],
    ["User-Agent", `http-over-tcp/${VERSION}`],
    ["Accept", "*/*"],
    ["Accept-Encoding", "identity"], // RFC 9110 §12.5.3: without it any coding would be acceptable
    ["Want-Repr-Digest", "sha-256=10"], // RFC 9530 §4: then what comes can be verified
    ["Content-Type", content === undefined ? "" : "application/x-www-form-urlencoded"],
  ].filter(([name = ""]) => !replaced.includes(name.toLowerCase()));
  if (content !== undefined) all.push(["Content-Length", `${contentLength(request)}`]);
  all.push(["Connection", "close"]);
  if (held.bytes > 0) all.push(["Range", `bytes=${resumeFrom(held)}-`], ["If-Range", held.validator]);
  const lines = [...all, ...fields].filter(([, value]) => value !== "").map(([name, value]) => `${name}: ${value}\r\n`);
  // Values may be any bytes but CTL; the command line has made them ISO 8859-1, one character a byte.
  return Buffer.from(`${method} ${url.pathname}${url.search} HTTP/1.1\r\n${lines.join("")}\r\n`, "latin1");
}

const SECRET_FIELD = /^(authorization|cookie|host|proxy-authorization)$/i;
/** The request that a redirect asks for (RFC 9110 §15.4), with nothing in it that only the first server may know. */
function redirect(request: Request, status: number, url: URL): Request {
  const becomesGet = request.method === "POST" ? status <= 303 : status === 303 && request.method !== "HEAD";
  const isElsewhere = url.origin !== request.url.origin;
  const fields = request.fields.filter(([name]) => !(isElsewhere && SECRET_FIELD.test(name)));
  const same = { ...request, url, fields };
  return becomesGet ? { ...same, method: "GET", content: undefined } : same;
}

// ═══ 7 The response ════════════════════════════════════════════════════════════════════════════

/** Where a response comes from: a connection, or a test. */
export interface Source {
  /** @returns the next bytes, which are the caller's, or undefined after the peer's end. @throws TransferError */
  receive(): Promise<Uint8Array | undefined>;
  readonly endsInOrder: boolean; // the peer's end meant that it had said all
}

// ── shared: byte classes ──
const [LF, CR] = [0x0a, 0x0d];

let EVERY_BYTE = "";
for (let byte = 0; byte < 256; byte++) EVERY_BYTE += String.fromCharCode(byte);

/** The class of the bytes that a pattern matches, read as ISO 8859-1: a table of 256, 1 for a member. */
function bytesLike(pattern: RegExp): Uint8Array {
  const members = new Uint8Array(256);
  for (let found; (found = pattern.exec(EVERY_BYTE)) !== null;) members[found.index] = 1;
  return members;
}

/** field-content: VCHAR / obs-text / SP / HTAB (RFC 9110 §5.5). CR, LF, NUL and other CTL are not. */
const FIELD_CONTENT = bytesLike(/[\t\x20-\x7e\x80-\xff]/g);
const HEXDIG = bytesLike(/[0-9A-Fa-f]/g);

/** The byte at an index that the caller knows to be in range; the type cannot know it. */
const byteAt = (bytes: Uint8Array, index: number) => bytes[index] as number;

/** The index of the first byte of from..to that is not of the class; `to` if all are. */
function skipWhile(members: Uint8Array, bytes: Uint8Array, from: number, to: number): number {
  let at = from;
  while (at < to && members[byteAt(bytes, at)] === 1) at++;
  return at;
}

/** The bytes from..to as ISO 8859-1 text, one character a byte. */
const latin1 = (bytes: Uint8Array, from: number, to: number) =>
  Buffer.from(bytes.buffer, bytes.byteOffset + from, to - from).toString("latin1");

/** OWS is SP and HTAB. String.trim takes more, and a regular expression takes quadratic time on long runs. */
function trimOws(text: string): string {
  let [from, to] = [0, text.length];
  while (from < to && (text[from] === " " || text[from] === "\t")) from++;
  while (to > from && (text[to - 1] === " " || text[to - 1] === "\t")) to--;
  return text.slice(from, to);
}
// ── end shared ──

// ── shared: chunked ──
const TOKEN = "[!#$%&'*+\\-.^_`|~\\w]+";
const QUOTED_STRING = '"(?:[^"\\\\]|\\\\.)*"';
/** chunk-ext = *( BWS ";" BWS token [ BWS "=" BWS ( token / quoted-string ) ] ); before it stands chunk-size = 1*HEXDIG */
const CHUNK_EXT = new RegExp(`^(?:[\\t ]*;[\\t ]*${TOKEN}(?:[\\t ]*=[\\t ]*(?:${TOKEN}|${QUOTED_STRING}))?)*$`);
/** field-line = field-name ":" OWS field-value OWS */
const FIELD_LINE = new RegExp(`^(${TOKEN}):[\\t\\x20-\\x7e\\x80-\\xff]*$`);

/** A longer line is refused, whatever its extensions may weigh: it has to be held until its end has come. */
const CHUNK_LINE_BYTES_MAX = 131_072;
const CHUNK_SIZE_DIGITS_MAX = 64;
/** What may stand behind a chunk-size: an extension, or the end of the line. */
const CHUNK_SIZE_END = bytesLike(/[\t ;\r\n]/g);
const hexValue = (byte: number) => (byte & 15) + (byte > 0x39 ? 9 : 0);

/** The index behind a chunk-size, or undefined if it is none. Its digits are bounded: leading zeros could go on and on. */
function findSizeEnd(bytes: Uint8Array, from: number, to: number): number | undefined {
  const end = skipWhile(HEXDIG, bytes, from, Math.min(to, from + CHUNK_SIZE_DIGITS_MAX + 1));
  const isSize = end > from && end - from <= CHUNK_SIZE_DIGITS_MAX;
  return isSize && (end === to || CHUNK_SIZE_END[byteAt(bytes, end)] === 1) ? end : undefined;
}

export type ChunkedFault =
  "bare-lf" | "bare-cr" | "chunk-size" | "chunk-extension" | "chunk-data" | "trailer" | "trailer-too-large";

/**
 * Takes the chunked transfer coding apart (RFC 9112 §7.1):
 *
 *     chunked-body = *( chunk-size [ chunk-ext ] CRLF chunk-data CRLF ) last-chunk trailer-section CRLF
 *
 * A chunk is a line, so many bytes, and CRLF; a trailer section is lines. Call {@link next} until `state` is "done" or
 * "failed". It keeps no bytes: if it uses none, a line is incomplete, and they must come again with more behind them.
 */
export class ChunkedDecoder {
  state: "line" | "data" | "data-end" | "trailer" | "done" | "failed" = "line";
  /** Why, once `state` is "failed". */
  fault: ChunkedFault | "" = "";
  /** The content that the last call found: these indexes into the bytes that it was given. */
  contentFrom = 0;
  contentTo = 0;
  /** Octets of content announced so far, those of the chunk under way included. */
  announced = 0;
  /** The lower-case names of the trailer fields: the caller may have to refuse some. */
  readonly trailerNames: string[] = [];
  private left = 0;
  /** Bytes of an incomplete line that were checked and need not be again. */
  private known = 0;
  private extensionBytes = 0;
  private trailerBytes = 0;

  constructor(
    private readonly limits: { chunkExtensionBytesMax: number; headBytesMax: number; fieldLinesMax: number },
    /** RFC 9112 §5.2: a user agent reads obs-fold as SP; a server refuses it. */
    private readonly acceptsFolds: boolean,
  ) {}

  /** Reads one line, or content, from `from` on. @returns the index behind what it has used, `to` at the most */
  next(bytes: Uint8Array, from: number, to: number): number {
    this.contentFrom = this.contentTo = from;
    if (this.state === "data") return this.takeData(bytes, from, to);
    if (from === to || this.state === "done" || this.state === "failed") return from;
    // Refused at once: what cannot become a line that fits.
    const sizeEnd = this.state === "line" ? findSizeEnd(bytes, from, to) : from;
    if (sizeEnd === undefined) return this.fail("chunk-size", from);
    if (this.state === "data-end" && bytes[from] !== CR) return this.fail("chunk-data", from);
    const end = skipWhile(FIELD_CONTENT, bytes, Math.max(sizeEnd, from + this.known), to);
    this.known = end - from;
    if (this.isTooLong(this.known)) return from;
    if (end === to || (bytes[end] === CR && end + 1 === to)) return from;
    this.known = 0;
    if (bytes[end] === LF) return this.fail("bare-lf", end);
    if (bytes[end] !== CR) return this.fail(this.state === "trailer" ? "trailer" : "chunk-extension", end);
    if (bytes[end + 1] !== LF) return this.fail(this.state === "data-end" ? "chunk-data" : "bare-cr", end);
    if (this.state === "line") this.takeChunkLine(bytes, from, sizeEnd, end);
    else if (this.state === "trailer") this.takeTrailerLine(latin1(bytes, from, end));
    else this.state = "line";
    return end + 2;
  }

  private takeData(bytes: Uint8Array, from: number, to: number): number {
    const end = Math.min(to, from + this.left);
    this.contentTo = end;
    this.left -= end - from;
    if (this.left > 0) return end;
    const hasCrlf = end + 1 < to && bytes[end] === CR && bytes[end + 1] === LF; // a step less for most chunks
    this.state = hasCrlf ? "line" : "data-end";
    return hasCrlf ? end + 2 : end;
  }

  /** Bounds a line before its end has come. */
  private isTooLong(length: number): boolean {
    if (this.state === "trailer" && this.trailerBytes + length + 2 > this.limits.headBytesMax)
      this.fail("trailer-too-large", 0);
    else if (this.state === "line" && length > CHUNK_LINE_BYTES_MAX) this.fail("chunk-extension", 0);
    return this.state === "failed";
  }

  private takeChunkLine(bytes: Uint8Array, from: number, sizeEnd: number, end: number): void {
    for (let at = from; at < sizeEnd; at++) this.left = this.left * 16 + hexValue(byteAt(bytes, at));
    // Past 2^53 sums stop being exact: refuse, never wrap around.
    if (this.left + this.announced > Number.MAX_SAFE_INTEGER) return void this.fail("chunk-size", 0);
    // All extensions together may outweigh the content only by so much, or tiny chunks would keep the recipient busy.
    this.extensionBytes += end - sizeEnd;
    const fits = this.extensionBytes - this.announced <= this.limits.chunkExtensionBytesMax;
    const isExtended = sizeEnd < end; // most lines are a size alone, and no text is made of them
    if (isExtended && !(fits && CHUNK_EXT.test(latin1(bytes, sizeEnd, end))))
      return void this.fail("chunk-extension", 0);
    this.announced += this.left;
    this.state = this.left > 0 ? "data" : "trailer";
  }

  /** The trailer section has the syntax and the limits of the head (RFC 9112 §7.1.2). */
  private takeTrailerLine(line: string): void {
    this.trailerBytes += line.length + 2;
    if (line === "") this.state = "done";
    else if (this.acceptsFolds && this.trailerNames.length > 0 && /^[ \t]/.test(line)) return;
    else {
      const name = FIELD_LINE.exec(line)?.[1];
      if (name === undefined) return void this.fail("trailer", 0);
      if (this.trailerNames.length === this.limits.fieldLinesMax) return void this.fail("trailer-too-large", 0);
      this.trailerNames.push(name.toLowerCase());
    }
  }

  private fail(fault: ChunkedFault, at: number): number {
    this.state = "failed";
    this.fault = fault;
    return at;
  }
}
// ── end shared ──

const unparsable = (fault: string, more: { isFinal?: boolean; spoils?: boolean } = { isFinal: true }) =>
  new TransferError("unparsable", `the response is malformed: ${fault}`, more);
/** More or less came than the head said, so what came may be anything. */
const contradiction = () =>
  new TransferError("range", "the length of the content is not what its head said", { spoils: true });
const partial = (message: string) => new TransferError("partial", message);

/**
 * Receives heads up to the final one: 1xx are passed over (RFC 9110 §15.2).
 * @returns `rest`: what has come behind the head
 * @throws TransferError
 */
export async function receiveHead(source: Source, method: string) {
  let text = "";
  let rest: Uint8Array = new Uint8Array(0);
  for (let interim = 0; interim <= LIMITS.interimResponsesMax;) {
    const bytes = rest.length > 0 ? rest : await source.receive();
    if (bytes === undefined) throw endOfHead(text, interim);
    rest = new Uint8Array(0);
    const before = text.length;
    const piece = latin1(bytes, 0, Math.min(bytes.length, LIMITS.headBytesMax + 1 - before));
    text += piece;
    // It starts again at the head's first byte: only when a line has ended, so that a byte at a time stays cheap.
    if (before > 7 && !piece.includes("\n") && text.length <= LIMITS.headBytesMax) continue;
    const head = parseResponseHead(text);
    if (head === undefined) continue;
    rest = bytes.subarray(head.text.length - before);
    text = "";
    interim++;
    // RFC 9110 §15.2.2: 101 answers an Upgrade, and we sent none.
    if (head.status === 101) throw unparsable("it switches protocols, and nobody asked for that");
    if (head.status < 200) continue;
    return { head, framing: decideFraming(head, method), rest };
  }
  throw unparsable("it has too many interim responses");
}

/** What it means that the peer has ended inside a head. A CR inside the last line makes it malformed, not merely cut. */
function endOfHead(text: string, interim: number): TransferError {
  if (text.slice(text.lastIndexOf("\n") + 1, -1).includes("\r")) return unparsable(NO_FIELD_LINE);
  if (text === "" && interim === 0)
    return new TransferError("empty", "the server closed the connection without an answer");
  return partial("the response ends inside its head");
}

/** status-line = HTTP-version SP status-code SP [ reason-phrase ] (RFC 9112 §4); the last SP is often forgotten. */
const STATUS_LINE = /^HTTP\/1\.(\d) ([1-9]\d{2})(?: ([\t\x20-\x7e\x80-\xff]*))?$/;
const NO_FIELD_LINE = "a line of its head is not a field-line";

/**
 * Parses a response head (RFC 9112 §4 and §5) from its first character on; nothing is kept between calls.
 * @param text what has come so far, one character a byte; what follows the head is not looked at
 * @returns the head, or undefined: more is needed
 * @throws TransferError "unparsable"; what is no HTTP at all may pass
 */
export function parseResponseHead(text: string): ResponseHead | undefined {
  // What does not start like a response will not become one: the end of its line is not waited for.
  const isHttp = "HTTP/1.".startsWith(text.slice(0, 7));
  let statusLine: RegExpExecArray | null = null;
  const fields: [name: string, value: string][] = [];
  for (let at = 0, lf = 0; isHttp && (lf = text.indexOf("\n", at)) >= 0 && lf < LIMITS.headBytesMax; at = lf + 1) {
    // RFC 9112 §2.2 lets a client take LF alone for the end of a line: what scripts print, some servers pass on.
    const line = text.slice(at, text[lf - 1] === "\r" ? lf - 1 : lf);
    const last = fields.at(-1);
    const name = FIELD_LINE.exec(line)?.[1];
    if (statusLine === null) {
      statusLine = STATUS_LINE.exec(line);
      if (statusLine === null) break;
    } else if (line === "") {
      const [, minor, status, reasonPhrase = ""] = statusLine;
      const head = { status: Number(status), reasonPhrase, minorVersion: Number(minor) };
      return { ...head, fields, text: text.slice(0, lf + 1) };
    } else if (name !== undefined) fields.push([name.toLowerCase(), trimOws(line.slice(name.length + 1))]);
    // RFC 9112 §5.2: a user agent reads obs-fold as SP. Before the first field-line it is a fault (§2.2).
    else if (last !== undefined && /^[ \t]/.test(line) && FIELD_LINE.test(`x:${line}`))
      last[1] = [last[1], trimOws(line)].filter((part) => part !== "").join(" ");
    else throw unparsable(NO_FIELD_LINE);
    if (fields.length > LIMITS.fieldLinesMax) throw unparsable("it has too many field-lines");
  }
  if (!isHttp || (statusLine === null && text.includes("\n")))
    throw unparsable("its first line is not a status-line of HTTP/1", {});
  if (text.length > LIMITS.headBytesMax) throw unparsable("the head is too large");
  return undefined;
}

/** All values of a field, in lower-case name. */
const fieldValues = (head: ResponseHead, name: string): string[] =>
  head.fields.filter(([fieldName]) => fieldName === name).map(([, value]) => value);

/** The value of a field that may stand once; "" without it, or if it stands more often. */
function singleValue(head: ResponseHead, name: string): string {
  const [value = "", ...more] = fieldValues(head, name);
  return more.length === 0 ? value : "";
}

/** IMF-fixdate, rfc850-date and asctime-date (RFC 9110 §5.6.7), which Date.parse reads, and much else. */
const HTTP_DATE =
  /^(\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT|[A-Z]\w{5,8}, \d\d-\w{3}-\d\d [\d:]{8} GMT|\w{3} \w{3} [ \d]\d [\d:]{8} \d{4})$/;

/** @returns milliseconds since 1970, or undefined if it is no HTTP-date */
export function parseHttpDate(text: string): number | undefined {
  // A year of two digits that seems to be more than 50 years ahead is the last one that ended so.
  const year = (yy: string) => Number(yy) + 100 * Math.floor((new Date().getUTCFullYear() + 50 - Number(yy)) / 100);
  const date = text.replace(/-(\d\d) /, (_, yy: string) => `-${year(yy)} `).replace(/\d$/, "$& GMT");
  return HTTP_DATE.test(text) ? Date.parse(date) || undefined : undefined;
}

/** Where the content of a response ends: RFC 9112 §6.3, item by item. @throws TransferError "unparsable" */
export function decideFraming(head: ResponseHead, method: string): Framing {
  // Item 1: never any content, whatever the fields say.
  if (method === "HEAD" || head.status < 200 || head.status === 204 || head.status === 304) return 0;
  // Item 2 is about CONNECT, which this client does not send.
  const codings = fieldValues(head, "transfer-encoding");
  const lengths = fieldValues(head, "content-length").flatMap((value) => value.split(",").map(trimOws));
  if (codings.length > 0) {
    // Item 3: both present is an attempt at smuggling or at splitting.
    if (lengths.length > 0) throw unparsable("it has both Content-Length and Transfer-Encoding");
    // §6.1: an HTTP/1.0 server cannot know it: its framing is faulty.
    if (head.minorVersion === 0) throw unparsable("it has Transfer-Encoding in HTTP/1.0");
    // Item 4: we asked for no coding, so there is none but chunked.
    if (!/^chunked$/i.test(codings.join(", "))) throw unparsable("its transfer coding is not chunked");
    return "chunked";
  }
  // Item 8: no length at all: until the connection is closed.
  if (lengths.length === 0) return "close";
  // Items 5 and 6: one value, or the same one again.
  const length = Number(lengths[0]);
  const isOne = lengths.every((value) => /^\d+$/.test(value) && value === lengths[0]);
  if (!isOne || !Number.isSafeInteger(length)) throw unparsable("its Content-Length is not one number");
  return length;
}

/** The octets of content that the head promises, if it does. */
function promisedLength(head: ResponseHead, method: string): number | undefined {
  const framing = decideFraming(head, method);
  return typeof framing === "number" ? framing : undefined;
}

/**
 * Receives the content of a response, piece by piece, and no byte after it. Each piece is good until the next is asked
 * for. RFC 9112 §8: only content without a length may end with the connection, and over TLS only if the peer has
 * announced that (§9.8), since anybody on the way can cut a connection off.
 * @throws TransferError
 */
export async function* receiveContent(source: Source, framing: Framing, begun: Uint8Array): AsyncGenerator<Uint8Array> {
  const decoder = framing === "chunked" ? new ChunkedDecoder(LIMITS, true) : undefined;
  const length = typeof framing === "number" ? framing : Number.POSITIVE_INFINITY;
  let [rest, kept] = [new Uint8Array(0), 0]; // the beginning of a line of chunked content: `kept` bytes
  for (let [came, isFirst] = [0, begun.length > 0]; came < length; isFirst = false) {
    const received = isFirst ? Promise.resolve(begun) : source.receive();
    const bytes = await received.catch((error: TransferError) => {
      // Content that only a close ends may be cut by a reset at any byte: then what came is a part.
      throw framing === "close" && error.outcome === "receive" ? partial(error.message) : error;
    });
    if (bytes === undefined && framing === "close" && source.endsInOrder) return;
    const whole = typeof framing === "number" ? ` of ${framing}` : "";
    if (bytes === undefined) throw partial(`the response is not complete: ${came}${whole} bytes of content came`);
    if (kept > 0 && rest.length < kept + bytes.length)
      rest = Buffer.concat([rest.subarray(0, kept)], 2 * (kept + bytes.length));
    if (kept > 0) rest.set(bytes, kept);
    const all = kept > 0 ? rest.subarray(0, kept + bytes.length) : bytes;
    const { content, used } = takeContent(decoder, all, length - came);
    came += content.length;
    if (content.length > 0) yield content;
    if (used > 0 || kept === 0) rest = new Uint8Array(all.subarray(used));
    kept = all.length - used;
    release(bytes);
    if (decoder !== undefined && decoder.fault !== "")
      // What came before may have been damaged as well.
      throw unparsable(`its chunked content is malformed (${decoder.fault})`, { spoils: true });
    if (decoder?.state === "done") return;
  }
}

/** Chunks are compacted in place, over the framing: one piece is left to write, and nothing is allocated. */
function takeContent(decoder: ChunkedDecoder | undefined, bytes: Uint8Array, left: number) {
  if (decoder === undefined) return { content: bytes.subarray(0, left), used: bytes.length };
  for (let at = 0, to = 0, next = 0; ; at = next) {
    next = decoder.next(bytes, at, bytes.length);
    if (decoder.contentTo > decoder.contentFrom) bytes.copyWithin(to, decoder.contentFrom, decoder.contentTo);
    to += decoder.contentTo - decoder.contentFrom;
    if (next === at || decoder.state === "done" || decoder.state === "failed")
      return { content: bytes.subarray(0, to), used: next };
  }
}

/**
 * Gives the memory of received bytes that are not needed any more back at once. The collector would let some 50 MiB of
 * them pile up first, and each piece would be written to memory that no cache has seen before.
 */
function release({ buffer, byteLength }: Uint8Array): void {
  if (buffer instanceof ArrayBuffer && buffer.byteLength === byteLength) buffer.transfer(0);
}

// ═══ 8 Text ════════════════════════════════════════════════════════════════════════════════════

// ── shared: printable ──
/** Text of a peer's, safe to print: nothing in it moves the cursor, colours, rings or reorders text. */
export function printable(text: string): string {
  return text.replaceAll("\r\n", "\n").replace(/[^\n\t\P{C}]|[\u2028\u2029]/gu, (character) => {
    const code = character.codePointAt(0) ?? 0;
    return code < 0x100 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u{${code.toString(16)}}`;
  });
}

/** One line on stderr. If stderr is closed the message is lost; that is not an error. */
export function tell(line: string): void {
  try {
    fs.writeSync(2, `${printable(line).replace(/[\n\t]/g, " ")}\n`);
  } catch {}
}
// ── end shared ──

// ── shared: sizes ──
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** "1.2 MiB" */
function formatBytes(bytes: number): string {
  const power = Math.min(UNITS.length - 1, Math.floor(Math.log2(Math.max(1, bytes)) / 10));
  return `${(bytes / 1024 ** power).toFixed(power === 0 ? 0 : 1)} ${UNITS[power]}`;
}
// ── end shared ──

/** A field value or reason phrase for people, or as part of a URL: UTF-8 if it is that, otherwise ISO 8859-1. */
const asText = (latin1Text: string): string =>
  ignoreErrors(() => UTF_8.decode(Buffer.from(latin1Text, "latin1"))) ?? latin1Text;
const UTF_8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** Heads for people: each line with a mark before it, as curl -v prints them. */
function tellLines(mark: string, bytes: Uint8Array): void {
  const [head = ""] = asText(Buffer.from(bytes).toString("latin1")).split(/\r?\n\r?\n/, 1);
  for (const line of head.split(/\r?\n/)) tell(mark + line);
}

/** "1.2 MiB of 3.4 MiB, 35 %, 0.5 MiB/s, 4 s left" */
export function formatProgress(bytes: number, total: number | undefined, bytesPerSecond: number): string {
  const speed = `${formatBytes(bytesPerSecond)}/s`;
  if (total === undefined || total === 0) return `${formatBytes(bytes)}, ${speed}`;
  const left = bytesPerSecond > 0 ? `, ${Math.ceil((total - bytes) / bytesPerSecond)} s left` : "";
  return `${formatBytes(bytes)} of ${formatBytes(total)}, ${Math.floor((100 * bytes) / total)} %, ${speed}${left}`;
}

/** Size, speed and time left, in one line of stderr that is written over and over; only if it is a terminal. */
class ProgressLine {
  private readonly isShown: boolean;
  private shownAt = LIMITS.progressAfterMs - LIMITS.progressEveryMs;
  private firstBytes = -1;
  private isOnScreen = false;

  constructor(
    private readonly job: Job,
    private readonly clock: Clock,
  ) {
    this.isShown = !job.isSilent && !job.isTraced && isTerminal(2);
  }

  show({ bytes, total }: Held): void {
    if (!this.isShown) return;
    if (this.firstBytes < 0) this.firstBytes = bytes;
    const now = this.clock.elapsedMs;
    if (now - this.shownAt < LIMITS.progressEveryMs) return;
    this.shownAt = now;
    this.isOnScreen = true;
    const bytesPerSecond = ((bytes - this.firstBytes) / now) * 1000;
    ignoreErrors(() => fs.writeSync(2, `\r${formatProgress(bytes, total, bytesPerSecond)}\x1b[K`));
  }

  /** The line ends as a summary of what came. */
  finish({ delivery, note }: Session): void {
    if (this.isOnScreen || this.job.isVerbose) {
      this.clear();
      const verified = delivery.isToVerify ? "SHA-256 verified" : "not verified";
      tell(`${formatBytes(delivery.held.bytes)} in ${(this.clock.elapsedMs / 1000).toFixed(1)} s, ${verified}`);
    }
    if (note !== "" && !this.job.isSilent) tell(note);
  }

  clear(): void {
    if (this.isOnScreen) ignoreErrors(() => fs.writeSync(2, "\r\x1b[K"));
    this.isOnScreen = false;
  }
}

// ═══ 9 Sockets ═════════════════════════════════════════════════════════════════════════════════

/** A socket turned from events into steps: send, receive, receive …, close. */
export class Connection implements Source {
  private readonly received: Uint8Array[] = [];
  private receivedBytes = 0;
  private isPaused = false;
  private hasEnded = false;
  private failure: TransferError | undefined;
  private isClosed = false;
  private socket: Bun.Socket | undefined;
  /** Over TLS: the records that go by below it. */
  private records: RecordWatch | undefined;
  private wake = () => {};

  /** Each handler stores what has happened, and wakes the step that waits. */
  readonly handlers = {
    open: (socket: Bun.Socket) => {
      this.socket = socket;
      if (this.isClosed) socket.close(); // the step that waited for it has ended
    },
    /** Bytes from the network: the peer's message, or TLS records of it. */
    data: (_: Bun.Socket, bytes: Uint8Array) =>
      this.records === undefined ? this.onData(bytes) : this.records.take(bytes),
    drain: () => this.wake(),
    /** A FIN: all that the peer wanted to send is here. */
    end: () => {
      this.hasEnded = true;
      this.wake();
    },
    /** The connection is gone below TLS, which will say so itself; but it cannot tell a reset. */
    close: (_: Bun.Socket, error?: SystemError) => {
      if (this.records === undefined || error !== undefined) this.onClose(error);
    },
    error: (_: Bun.Socket, error: SystemError) => this.onClose(error),
    connectError() {}, // the promise of Bun.connect is rejected too
  };

  constructor(
    private readonly clock: Clock,
    private readonly trace?: Trace,
  ) {}

  private onData(bytes: Uint8Array): void {
    if (this.records !== undefined) this.records.content += bytes.length;
    this.received.push(bytes);
    this.receivedBytes += bytes.length;
    if (this.receivedBytes >= LIMITS.receivedBytesMax && !this.isPaused) {
      this.isPaused = true;
      this.socket?.pause();
    }
    this.wake();
  }

  /** A close without FIN is a reset, and a reset is never the end of a message. An alert of TLS will come again. */
  private onClose(error: SystemError = new Error("reset")): void {
    if (/SSL.*_ALERT_/.test(error.message))
      this.failure ??= new TransferError("tls", `the server refused: ${error.message}`, { isFinal: true });
    if (!this.hasEnded) this.failure ??= explainSystemError(error, "receive", "the connection was lost");
    this.wake();
  }

  /** Over TLS a FIN alone can be anybody's. */
  get endsInOrder(): boolean {
    return this.records?.endsInOrder ?? true;
  }

  /** Goes on over TLS. @throws TransferError "tls" or "certificate" */
  async secure(hostname: string, authorities: string[], isInsecure: boolean): Promise<void> {
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const handshake = (_: unknown, isTrusted: boolean, error: SystemError | null) => {
      if (isTrusted || (isInsecure && error !== null && !isTlsFault(error))) resolve();
      else if (error === null || isTlsFault(error)) {
        const message = `no TLS with ${hostname}: ${error?.message ?? "refused"}`;
        // What the peer has said will not change; that it has gone may.
        reject(new TransferError("tls", message, { isFinal: !error?.code?.startsWith("ECONN") }));
      } else
        reject(new TransferError("certificate", `the certificate of ${hostname} is not trusted: ${error.message}`));
    };
    const close = (_: unknown, error?: SystemError) => {
      reject(new TransferError("tls", `the connection to ${hostname} was closed before there was TLS`));
      this.onClose(error);
    };
    // RFC 6066 §3: the name is sent without the dot of the root, and an address is not sent. Without a name, the
    // certificate is checked against the address that was connected to.
    const serverName = /^[\d.]+$|:/.test(hostname) ? "" : hostname.replace(/\.$/, "");
    const tls = { serverName, ca: authorities, rejectUnauthorized: !isInsecure };
    this.records = new RecordWatch();
    const { drain, end, error } = this.handlers;
    const data = (_: Bun.Socket, bytes: Uint8Array) => this.onData(bytes);
    const socket = { handshake, data, drain, end, close, error };
    this.socket = this.socket?.upgradeTLS({ data: undefined, tls, socket })[1];
    await promise;
  }

  /** Sends all of it, or as much as the server takes before it answers. @returns may more be sent? @throws TransferError */
  async send(bytes: Uint8Array): Promise<boolean> {
    for (let sent = 0; sent < bytes.length && this.received.length === 0;) {
      const written = this.socket?.write(bytes, sent, bytes.length - sent) ?? -1;
      if (written < 0) throw new TransferError("send", "the connection was lost while the request was sent");
      this.trace?.step("send", `${written} of ${bytes.length - sent} B`);
      sent += written;
      if (sent < bytes.length) await this.event();
      if (this.received.length === 0) this.throwFailure();
    }
    return this.received.length === 0;
  }

  async receive(): Promise<Uint8Array | undefined> {
    while (this.received.length === 0) {
      this.throwFailure();
      if (this.hasEnded) {
        this.trace?.step("FIN", "received");
        return undefined;
      }
      if (this.isPaused) {
        this.isPaused = false;
        this.socket?.resume();
      }
      await this.event();
    }
    const bytes = this.received.shift();
    this.receivedBytes -= bytes?.length ?? 0;
    if (bytes !== undefined) this.trace?.receive(bytes);
    return bytes;
  }

  private throwFailure(): void {
    if (this.failure === undefined) return;
    if (this.failure.outcome !== "timeout") this.trace?.step("reset", this.failure.message);
    throw this.failure;
  }

  /** Sends a FIN; the kernel makes a reset of it if it has bytes that were not read. */
  close(): void {
    if (this.socket !== undefined && !this.isClosed)
      this.trace?.step("close", this.failure?.outcome === "receive" ? "" : "FIN sent");
    this.isClosed = true;
    this.socket?.close();
  }

  /** Waits for the next thing to happen, but not longer than the peer may be silent. */
  private event(): Promise<void> {
    return new Promise((resolve) => {
      const isLate = (failure: TransferError) => {
        this.failure = failure;
        this.trace?.step("deadline", failure.message);
        resolve();
      };
      this.trace?.flush();
      const cancel = this.clock.startTimer("stallMs", (seconds) => `no byte for ${seconds} s`, isLate);
      this.wake = () => {
        cancel();
        resolve();
      };
    });
  }
}

/** Not a certificate that is not trusted, but a peer that speaks no TLS, or not ours. */
const isTlsFault = ({ code = "" }: SystemError) => /^(EPROTO|ECONN|ERR_SSL)/.test(code);

/** @throws TransferError "resolve", "connect", "timeout", "tls", "certificate" or "authorities" */
async function connect(url: URL, clock: Clock, job: Job, trace: Trace | undefined): Promise<Connection> {
  const hostname = url.hostname.replace(/^\[(.*)\]$/, "$1");
  const isSecure = url.protocol === "https:";
  const port = Number(url.port || (isSecure ? 443 : 80));
  const connection = new Connection(clock, trace);
  const { promise: late, reject } = Promise.withResolvers<never>();
  const cancel = clock.startTimer("connectMs", (seconds) => `no connection to ${url.host} within ${seconds} s`, reject);
  trace?.begin();
  try {
    // Half-open: the server's FIN must not stop us from sending, nor hide what it sent before.
    const authorities = isSecure ? readAuthorities(job.authoritiesFile) : [];
    const connecting = Bun.connect({ hostname, port, allowHalfOpen: true, socket: connection.handlers });
    const socket = await Promise.race([late, connecting]);
    trace?.step("connect", formatAddress(socket.remoteAddress, port));
    if (isSecure) await Promise.race([late, connection.secure(hostname, authorities, job.isInsecure)]);
    if (isSecure) trace?.step("TLS", `with ${hostname}`);
    return connection;
  } catch (error) {
    const failure = explainConnectError(error, url, hostname);
    trace?.step(failure.outcome === "timeout" ? "deadline" : "connect", failure.message);
    connection.close();
    throw failure;
  } finally {
    cancel();
  }
}

function explainConnectError(error: unknown, { host }: URL, hostname: string): TransferError {
  if (error instanceof TransferError) return error;
  const fault = error as SystemError; // Bun throws those
  if (fault.syscall === "getaddrinfo") return new TransferError("resolve", `cannot resolve ${hostname}`);
  return explainSystemError(fault, "connect", `cannot connect to ${host}`);
}

const formatAddress = (address: string, port: number) =>
  address.includes(":") ? `[${address}]:${port}` : `${address}:${port}`;

/** The authorities that are trusted, as PEM texts. @throws TransferError "authorities" */
function readAuthorities(file: string | undefined): string[] {
  if (file === undefined) return process.getBuiltinModule("node:tls").getCACertificates("system");
  const { X509Certificate } = process.getBuiltinModule("node:crypto");
  const pem = ignoreErrors(() => fs.readFileSync(file, "latin1")) ?? "";
  // Bun would tell that it is none only once there is a connection.
  if (pem.includes("-----BEGIN") && ignoreErrors(() => new X509Certificate(pem)) !== undefined) return [pem];
  throw new TransferError("authorities", `cannot read a certificate in PEM from ${file}`);
}

/** The first of the bytes, for people: no more than fit into a line, what is not printable as an escape. */
function quote(bytes: Uint8Array): string {
  const text = latin1(bytes, 0, Math.min(bytes.length, LIMITS.tracedBytesMax));
  const escaped = text.replace(/[^\x20-\x7e]|["\\]/g, (character) => {
    const known = { "\r": "\\r", "\n": "\\n", "\t": "\\t", '"': '\\"', "\\": "\\\\" }[character];
    return known ?? `\\x${character.charCodeAt(0).toString(16).padStart(2, "0")}`;
  });
  return `"${escaped}"${bytes.length > LIMITS.tracedBytesMax ? "…" : ""}`;
}

/**
 * `--trace`: prints each step on a connection as one line on stderr.
 *
 *     #1      0.4 ms  connect  127.0.0.1:8888
 *     #1      0.9 ms  send     163 of 163 B
 *     #1      1.3 ms  receive  43 B  "HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n"  head
 *     #1   1002.1 ms  receive  13 B  "Hello, World!"  content complete
 *     #1   1002.3 ms  close    FIN sent
 *
 * First comes the connection's number, then the time since it began. Over TLS the bytes are the decrypted ones.
 */
class Trace {
  private connections = 0;
  private startedAt = 0;
  /** The last receive, printed once it is known what it has completed. */
  private received = "";
  private completed = new Set<string>();

  /** A connection begins. */
  begin(): void {
    this.flush();
    this.connections++;
    this.startedAt = performance.now();
  }

  step(event: string, details: string): void {
    this.flush();
    tell(this.format(event, details));
  }

  receive(bytes: Uint8Array): void {
    this.flush();
    this.received = this.format("receive", `${bytes.length} B  ${quote(bytes)}`);
  }

  /** What the last receive has completed, or brought a part of. */
  complete(what: "head" | "content" | "content complete"): void {
    if (what === "content complete") this.completed.delete("content");
    this.completed.add(what);
  }

  /** Nothing more will come of the last receive. */
  flush(): void {
    if (this.received !== "") tell(`${this.received}  ${[...this.completed].join(", ") || "nothing yet"}`);
    this.received = "";
    this.completed.clear();
  }

  private format(event: string, details: string): string {
    const ms = (performance.now() - this.startedAt).toFixed(1).padStart(8);
    return `#${this.connections} ${ms} ms  ${event.padEnd(8)} ${details}`.trimEnd();
  }
}

/** Time since the start, and timers that never go past the end of all time that the user gives. */
export class Clock {
  private readonly startedAt = performance.now();

  constructor(private readonly job: Pick<Job, "connectMs" | "stallMs" | "maxMs">) {}

  get elapsedMs(): number {
    return performance.now() - this.startedAt;
  }

  /** @returns what ends the timer */
  startTimer(which: "connectMs" | "stallMs", say: (seconds: number) => string, then: (failure: TransferError) => void) {
    const { [which]: limit, maxMs } = this.job;
    const left = Math.max(0, maxMs - this.elapsedMs);
    const isFinal = left < limit;
    const message = isFinal ? `not done within ${maxMs / 1000} s` : say(limit / 1000);
    const timer = setTimeout(() => then(new TransferError("timeout", message, { isFinal })), Math.min(left, limit));
    return () => clearTimeout(timer);
  }
}

/** close_notify as TLS 1.3 sends it: level, description and inner type under a tag of 16 bytes (RFC 8446 §5.2, §6). */
const ALERT_RECORD_LENGTH = 19;
const [ALERT, APPLICATION_DATA] = [21, 23];

/**
 * Watches encrypted TLS records go by (RFC 8446 §5.1) to tell whether the peer closed in order: whether its last record
 * was an alert. In TLS 1.3 an alert looks like content, but for its length and that no content came of it.
 */
export class RecordWatch {
  private header: number[] = [];
  private left = 0;
  private type = 0;
  private length = 0;
  private room = 0; // plaintext bytes that the records of the last read could hold
  content = 0; // plaintext bytes decrypted from them, which the caller adds

  /** Records, or pieces of them, before they are decrypted. */
  take(bytes: Uint8Array): void {
    this.room = this.content = 0;
    for (let at = 0; at < bytes.length;) {
      const taken = Math.min(this.left, bytes.length - at);
      at += taken;
      this.left -= taken;
      if (taken > 0 && this.left === 0 && this.type === APPLICATION_DATA)
        this.room += this.length - ALERT_RECORD_LENGTH + 2;
      if (taken > 0 || this.header.push(byteAt(bytes, at++)) < 5) continue;
      const [type = 0, , , high = 0, low = 0] = this.header;
      this.type = type;
      this.left = this.length = high * 256 + low;
      this.header = [];
    }
  }

  get endsInOrder(): boolean {
    if (this.left > 0 || this.header.length > 0) return false;
    if (this.type === ALERT) return true;
    return this.type === APPLICATION_DATA && this.length === ALERT_RECORD_LENGTH && this.content < this.room;
  }
}

// ═══ 10 What is held ═══════════════════════════════════════════════════════════════════════════

/** Repr-Digest is a dictionary of byte sequences (RFC 9530 §3, RFC 8941 §3.2); of its algorithms SHA-256 is read. */
const REPR_DIGEST = /(?:^|,)[ \t]*sha-256=:([A-Za-z0-9+/]{43}=):/;

/** What is held of the content across all attempts, and what it adds up to. */
class Delivery {
  held: Held;
  private best: number; // the most that was ever held of this version: only what goes beyond it is progress
  private hasStartedOver = false;
  private isJoined = false; // what is held came in several responses
  private hash: Bun.CryptoHasher | undefined;
  private skip = 0; // bytes of the response under way that are held already
  private end = Number.POSITIVE_INFINITY; // the byte of the whole before which the response under way must end
  private expectedDigest = "";

  constructor(
    readonly sink: Sink,
    private readonly job: Job,
  ) {
    this.held = sink.found;
    this.best = this.held.bytes;
  }

  /** True once after more has come than ever before. An attempt that had to start over did not bring more. */
  takeProgress(): boolean {
    const hasProgressed = this.held.bytes > this.best && !this.hasStartedOver;
    this.best = Math.max(this.best, this.held.bytes);
    this.hasStartedOver = false;
    return hasProgressed;
  }

  start(head: ResponseHead, { held, from, end }: Verdict & { action: "deliver" }): void {
    if (held.bytes === 0 && this.held.bytes > 0) this.forget();
    this.held = held;
    this.skip = held.bytes - from;
    this.end = end;
    this.isJoined = held.bytes > 0;
    // RFC 9530 §3: of the whole representation, in a 206 too. What an earlier response said of this version holds.
    const [, digest] = REPR_DIGEST.exec(fieldValues(head, "repr-digest").join(",")) ?? [];
    this.expectedDigest = digest ?? (this.isJoined ? this.expectedDigest : "");
    if (!this.isJoined) this.hash = this.isToVerify ? new Bun.CryptoHasher("sha256") : undefined;
    this.sink.start(head, held);
  }

  async write(bytes: Uint8Array): Promise<void> {
    const skipped = Math.min(this.skip, bytes.length);
    this.skip -= skipped;
    const content = bytes.subarray(skipped);
    const { sizeMax } = this.job;
    if (this.held.bytes + content.length > sizeMax)
      throw new TransferError("tooLarge", `the content is larger than ${sizeMax} bytes`);
    if (this.held.bytes + content.length > this.end) throw contradiction();
    if (content.length === 0) return;
    await this.sink.write(content);
    this.hash?.update(content);
    this.held = { ...this.held, bytes: this.held.bytes + content.length };
  }

  /** The response has ended: is the content whole, and what the digests say? @returns what {@link Sink.finish} says */
  async finish(head: ResponseHead, framing: Framing): Promise<string> {
    const { bytes, total } = this.held;
    // Content that only a close ends may have been cut. The last chunk ends it for sure.
    if (framing === "chunked" && Number.isFinite(this.end) && bytes < this.end) throw contradiction();
    if (this.skip > 0) throw partial(`the response is not complete: ${this.skip} of ${bytes} bytes held are missing`);
    if (total !== undefined && bytes !== total) {
      const message = `the response is a part: ${bytes} of ${total} bytes are here`;
      throw new TransferError("partial", message, { isPart: true });
    }
    if (this.isToVerify) this.verify();
    const note = await this.sink.finish();
    // What is coded although nobody asked for that is saved so: a mirror's a.tar.gz is meant so.
    const codings = fieldValues(head, "content-encoding").filter((coding) => !/^(identity)?$/i.test(coding));
    if (note !== "" || codings.length === 0 || !this.job.keepsOnlyContent) return note;
    return `The content is saved as it comes, with Content-Encoding: ${codings.join(", ")}`;
  }

  /** The user or the server has said what the SHA-256 of the content is. */
  get isToVerify(): boolean {
    return this.job.sha256 !== "" || this.expectedDigest !== "";
  }

  private verify(): void {
    const found = this.hash?.digest("hex") ?? this.sink.digest?.();
    this.hash = undefined;
    if (found === undefined)
      throw new TransferError("digest", "the first part of the content is not at hand to be verified", {
        isFinal: true,
      });
    const { sha256 } = this.job;
    const told = Buffer.from(this.expectedDigest, "base64").toString("hex");
    if (found === (sha256 || told)) return;
    // Another attempt helps if pieces were joined that do not fit, or if the server says that bytes were damaged.
    const isFinal = found === told || (told === "" && !this.isJoined);
    const message = `the content is not what its digest says: its SHA-256 is ${found}`;
    throw new TransferError("digest", message, { isFinal, spoils: true });
  }

  /** Throws away what is held, as it is wrong. */
  discard(): void {
    this.sink.discard?.();
    this.held = NOTHING;
    this.forget();
  }

  private forget(): void {
    this.hash = undefined;
    this.best = 0;
    this.hasStartedOver = true;
  }
}

// ═══ 11 Where it goes ══════════════════════════════════════════════════════════════════════════

/** A failure changes nothing: what is to be removed may have gone, or must stay. */
function ignoreErrors<T>(step: () => T): T | undefined {
  try {
    return step();
  } catch {
    return undefined;
  }
}

/** @returns undefined if it is not there, or cannot be reached */
const statOf = (path: string) => ignoreErrors(() => fs.lstatSync(path));

/**
 * Writes all of it. What may block for as long as somebody else likes (a pipe, a terminal) is written by another
 * thread, so that deadlines go on here; a file or a device takes bytes sooner than a thread can be asked to.
 * @param position in the file; null goes on where the last write ended
 */
async function writeAll(fd: number, bytes: Uint8Array, mayBlock: boolean, position: number | null): Promise<void> {
  for (let written = 0; written < bytes.length;) {
    const [length, at] = [bytes.length - written, position === null ? null : position + written];
    try {
      written += mayBlock
        ? await new Promise<number>((resolve, reject) =>
            fs.write(fd, bytes, written, length, at, (error, count) => (error ? reject(error) : resolve(count))),
          )
        : fs.writeSync(fd, bytes, written, length, at);
    } catch (error) {
      if ((error as SystemError).code !== "EAGAIN") throw error; // node:fs throws SystemErrors
      await Bun.sleep(LIMITS.writeRetryMs);
    }
  }
}

/** node:tty takes longer to load than a small transfer takes: it is asked only about what may be a terminal. */
function isTerminal(fd: number): boolean {
  const found = fs.fstatSync(fd);
  // On Linux, the devices of major number 1 are /dev/null, /dev/full and their like.
  const mayBe = found.isCharacterDevice() && found.rdev >> 8 !== 1;
  return mayBe && process.getBuiltinModule("node:tty").isatty(fd);
}

/** Pipes, devices and terminals: what is written there cannot be taken back. */
class StreamSink implements Sink {
  readonly found = NOTHING;
  /** The head that is still to be printed: with the first content, when it can no longer be another's. */
  private head = "";
  private hasPrinted = false;
  private isInLine = false;
  private readonly isTerminal: boolean;
  private readonly mayBlock: boolean;
  private readonly textDecoder = new TextDecoder();

  /** @param isContentOnly only content goes out, as it is; otherwise the head does too, and a terminal gets safe text */
  constructor(
    private readonly fd: number,
    private readonly isContentOnly: boolean,
  ) {
    this.isTerminal = isTerminal(fd);
    const found = fs.fstatSync(fd);
    this.mayBlock = !found.isFile() && (!found.isCharacterDevice() || this.isTerminal);
  }

  start(head: ResponseHead): void {
    this.head = this.isContentOnly || this.hasPrinted ? "" : head.text;
  }

  async write(content: Uint8Array): Promise<void> {
    await this.finish();
    await this.print(content);
    this.isInLine = this.isTerminal && content.at(-1) !== LF;
  }

  /** A head without content is all that there is to print. */
  async finish(): Promise<string> {
    this.hasPrinted = true;
    if (this.head !== "") await this.print(Buffer.from(this.head, "latin1"));
    this.head = "";
    return "";
  }

  endLine(): void {
    if (this.isInLine) ignoreErrors(() => fs.writeSync(this.fd, "\n"));
    this.isInLine = false;
  }

  /** No other attempt will follow: a head whose content never came is printed, if somebody still reads. */
  close(): Promise<string> {
    return this.finish().catch(() => "");
  }

  private async print(bytes: Uint8Array): Promise<void> {
    if (!this.isTerminal || this.isContentOnly) return writeAll(this.fd, bytes, this.mayBlock, null);
    if (bytes.includes(0))
      throw new TransferError("write", "the content is binary: use -o FILE, or -o - to see it here");
    const text = printable(this.textDecoder.decode(bytes, { stream: true }));
    await writeAll(this.fd, new TextEncoder().encode(text), this.mayBlock, null);
  }
}

/** What a part is a part of: written once, before the part's first byte, into a file of the part's name and ".json". */
interface Label extends Omit<Held, "bytes"> {
  readonly file: string; // the name of FILE; the name of a part has only the start of it
  readonly url: string; // origin and path. A query may be a signature that is new each time, and a secret
  readonly sha256: string; // the --sha256 of the run, which joins pieces whatever their validators say
}

const BLANK: Label = { ...NOTHING, file: "", url: "", sha256: "" };

/** A part that lies beside FILE. `bytes` is 0 if there is only its label, or if it is not ours. */
type FoundPart = { readonly path: string; readonly label: Label; readonly bytes: number; readonly labelledAt: number };

/** The random end of a part's name: FILE.0123456789ab.part has the label FILE.0123456789ab.part.json. */
const LABEL_END = /^\.[0-9a-f]{12}\.part\.json$/;
/** A name may have 255 bytes, on some file systems fewer: a part's begins with this much of FILE's. */
const STEM_BYTES = 100;

/** The path of a part of FILE in the folder, up to its random end. */
const stemOf = (file: string, folder: string) =>
  join(folder, Buffer.from(basename(file)).subarray(0, STEM_BYTES).toString().replaceAll("\ufffd", ""));

/** The parts of this very FILE. An empty label is of a run that was killed before it could write it. */
function* findParts(file: string, folder: string): Generator<FoundPart> {
  const start = basename(stemOf(file, folder));
  for (const name of ignoreErrors(() => fs.readdirSync(folder)) ?? []) {
    if (!name.startsWith(start) || !LABEL_END.test(name.slice(start.length))) continue;
    const path = join(folder, name.slice(0, -".json".length));
    const [found, part] = [statOf(`${path}.json`), statOf(path)];
    const label = found?.isFile() ? readLabel(`${path}.json`, found.size) : undefined;
    if (found === undefined || label === undefined || (found.size > 0 && label.file !== basename(file))) continue;
    // In a folder that others may write to, a part that somebody else owns is not to be trusted; nor is a link.
    const isOurs = part?.isFile() && part.nlink === 1 && part.uid === (process.geteuid?.() ?? part.uid);
    yield { path, label, bytes: isOurs ? (part?.size ?? 0) : 0, labelledAt: found.mtimeMs };
  }
}

/** @returns undefined if it is no label, or has gone. A label with other values than strings fits nothing. */
const readLabel = (path: string, size: number): Label | undefined =>
  ignoreErrors(() => {
    const label: Label = { ...BLANK, ...(size === 0 ? {} : JSON.parse(fs.readFileSync(path, "utf8"))) };
    const isValidator = STRONG_ETAG.test(label.validator) || parseHttpDate(label.validator) !== undefined;
    return size > LIMITS.headBytesMax ? undefined : { ...label, validator: isValidator ? label.validator : "" };
  });

function removePart(path: string): void {
  ignoreErrors(() => fs.unlinkSync(path));
  ignoreErrors(() => fs.unlinkSync(`${path}.json`));
}

const takenOver = (path: string) =>
  new TransferError("write", `${path} is gone: another run has taken it over, or something has removed it`);
const changed = (path: string) => new TransferError("write", `${path} has been changed by something else`);

/**
 * Saves the content: it grows in a part beside FILE, which is renamed to FILE when it is whole, verified and synced.
 *
 * One inode holds bytes of one version. A part has a random name, only grows, and is never written to for another
 * version: starting over makes a new part. A run that continues a part of an earlier run first renames it to a name
 * of its own, which only one run can do; a run that finds its part gone ends. So there is no lock, and nothing is
 * updated in place. A crash between any two calls leaves a part that can be continued, or a label without a part.
 */
class FileSink implements Sink {
  readonly found: Held = NOTHING;
  private readonly leftover: FoundPart | undefined;
  private readonly startedAt = Date.now();
  private readonly url: string;
  /** The part that this run writes. Its inode tells whether the name is still its own. */
  private part: { readonly path: string; readonly fd: number; readonly inode: number } | undefined;
  private isWorthKeeping = false; // a later run can continue the part
  /** The content that comes is not of the version that `part` has: the next byte begins another part. */
  private isOther = false;
  private version = NOTHING;
  private position = 0;
  private syncedTo = 0;

  /** @param old FILE as it was, if it was there; @param folder of the parts */
  private constructor(
    private readonly path: string,
    private readonly old: fs.Stats | undefined,
    private readonly folder: string,
    private readonly canContinue: boolean,
    private readonly job: Job,
  ) {
    const { sha256, request } = job;
    this.url = request.url.origin + request.url.pathname;
    for (const part of canContinue ? findParts(path, folder) : []) {
      const { label, bytes, labelledAt } = part;
      const isVouched = sha256 === "" ? label.validator !== "" : label.sha256 === "" || label.sha256 === sha256;
      if (bytes === 0 || bytes > (label.total ?? bytes) || label.url !== this.url || !isVouched) continue;
      const best = this.leftover;
      // Of the version that was seen last, the longest part is worth most.
      const isSame = label.validator === best?.label.validator;
      if (best === undefined || (isSame ? bytes > best.bytes : labelledAt > best.labelledAt)) this.leftover = part;
    }
    if (this.leftover === undefined) return;
    const { validator, etag, lastModified, total } = this.leftover.label;
    this.found = { bytes: this.leftover.bytes, validator, etag, lastModified, total };
  }

  /** @returns undefined if FILE has the SHA-256 already */
  static open(output: string, job: Job): Sink | undefined {
    const { O_WRONLY, O_APPEND, W_OK, X_OK } = fs.constants;
    const path = followLinks(output);
    const old = fs.statSync(path, { throwIfNoEntry: false });
    // What is not a regular file is written to and never replaced; nor is what is an open descriptor already.
    const [, owner, descriptor] = /^\/proc\/(self|\d+)\/fd\/(\d+)$/.exec(path) ?? [];
    if (descriptor === "1") requireStdout();
    if (descriptor !== undefined && owner === "self") return new StreamSink(Number(descriptor), true);
    if (old?.isFile() === false || descriptor !== undefined || path.endsWith("/"))
      return new StreamSink(fs.openSync(path, O_WRONLY | O_APPEND), true);
    const needFolder = () => fs.accessSync(dirname(path), W_OK | X_OK);
    if (old === undefined) needFolder();
    else fs.accessSync(path, W_OK);
    if (old !== undefined && job.sha256 !== "" && withFile(path, "r", sha256Of) === job.sha256) return undefined;
    const isElsewhere = ignoreErrors(() => (needFolder(), false)) ?? true;
    const folder = isElsewhere ? process.getBuiltinModule("node:os").tmpdir() : dirname(path);
    // Only the content of a GET can be continued (RFC 9110 §14.2), and only beside FILE would a later run look for it.
    return new FileSink(path, old, folder, job.request.method === "GET" && !isElsewhere, job);
  }

  start(_: ResponseHead, held: Held): void {
    this.version = held;
    this.isOther = held.bytes === 0;
    this.position = this.syncedTo = held.bytes;
    if (held.bytes > 0) this.part ??= this.begin(this.leftover);
  }

  async write(content: Uint8Array): Promise<void> {
    const { fd } = this.ready();
    await writeAll(fd, content, false, this.position);
    this.position += content.length;
    if (this.position - this.syncedTo < LIMITS.syncEveryBytes) return;
    // Lets the disk begin while the network goes on: all of it at the end would take as long again. Should it fail,
    // the sync at the end will too.
    this.syncedTo = this.position;
    fs.fdatasync(fd, () => {});
  }

  digest(): string | undefined {
    return this.part && sha256Of(this.part.fd);
  }

  async finish(): Promise<string> {
    const { path, fd } = this.ready();
    if (fs.fstatSync(fd).size !== this.position) throw changed(path);
    this.keepOwnerAndMode(fd);
    fs.fsyncSync(fd);
    const note = this.replaceFile(path, fd);
    const time = this.job.keepsTime ? parseHttpDate(this.version.lastModified) : undefined;
    if (time !== undefined) ignoreErrors(() => fs.utimesSync(this.path, Date.now() / 1000, time / 1000));
    this.discard();
    if (this.folder === dirname(this.path))
      for (const older of findParts(this.path, this.folder))
        if (older.labelledAt < this.startedAt) removePart(older.path);
    return note;
  }

  discard(): void {
    if (this.part !== undefined) removePart(this.part.path);
    if (this.part !== undefined) fs.closeSync(this.part.fd);
    this.part = undefined;
  }

  /** Keeps a part that a later run can continue, and nothing else. */
  close(): string {
    if (this.part === undefined) return "";
    const { path, fd, inode } = this.part;
    const found = statOf(path); // its size counts what a full disk has taken of a piece, too
    const isWhole = found?.ino === inode && found.size >= this.position && statOf(`${path}.json`) !== undefined;
    if (!this.isWorthKeeping || !isWhole || found.size === 0) {
      this.discard();
      return "";
    }
    fs.closeSync(fd);
    return `Kept ${found.size} bytes in ${path}: the same command continues from there`;
  }

  /** The part that the content goes into. @throws TransferError if it is not as this run has left it */
  private ready(): NonNullable<FileSink["part"]> {
    if (this.part === undefined || this.isOther) {
      const next = this.begin();
      this.discard();
      this.part = next;
      this.isOther = false;
    }
    const found = statOf(this.part.path);
    if (found?.ino !== this.part.inode) throw takenOver(this.part.path);
    if (found.size < this.position) throw changed(this.part.path);
    return this.part;
  }

  /** Gives a part a name of its own, be it new or of an earlier run. The label comes first. */
  private begin(leftover?: FoundPart): NonNullable<FileSink["part"]> {
    const { O_RDWR, O_CREAT, O_EXCL, O_NOFOLLOW } = fs.constants;
    const path = `${stemOf(this.path, this.folder)}.${crypto.randomUUID().slice(-12)}.part`;
    const { bytes: _, ...version } = this.version;
    const { sha256 } = this.job;
    const validator = sha256 === "" ? version.validator : "";
    const label: Label = { file: basename(this.path), url: this.url, sha256, ...version, validator };
    const flags = O_RDWR | O_NOFOLLOW | (leftover === undefined ? O_CREAT | O_EXCL : 0);
    try {
      fs.writeFileSync(`${path}.json`, JSON.stringify(label), { flag: "wx", mode: 0o600 });
      // What replaces a private FILE is private from its first byte on.
      const fd = fs.openSync(leftover?.path ?? path, flags, this.old === undefined ? 0o666 : 0o600);
      const inode = fs.fstatSync(fd).ino;
      if (leftover !== undefined) fs.renameSync(leftover.path, path);
      if (leftover !== undefined) removePart(leftover.path);
      this.isWorthKeeping = this.canContinue && (validator !== "" || sha256 !== "");
      return { path, fd, inode };
    } catch (error) {
      removePart(path);
      throw leftover !== undefined && statOf(leftover.path) === undefined ? takenOver(leftover.path) : error;
    }
  }

  /** FILE stays as private, as executable and whose it was. Only root may give files away; some disks know no modes. */
  private keepOwnerAndMode(fd: number): void {
    const { mode = 0o666 & ~process.umask(), uid = -1, gid = -1 } = this.old ?? {};
    const isGiven = this.old === undefined || ignoreErrors(() => (fs.fchownSync(fd, uid, gid), true));
    // Not set-user-ID for somebody else.
    ignoreErrors(() => fs.fchmodSync(fd, mode & (isGiven ? 0o7777 : 0o777)));
  }

  /** @returns what the user should know, or "" */
  private replaceFile(path: string, fd: number): string {
    try {
      fs.renameSync(path, this.path);
      return "";
    } catch (error) {
      const { code = "" } = error as SystemError; // node:fs throws SystemErrors
      // A mount point, a folder in which nothing may be renamed, a part on another disk.
      if (this.old === undefined || !/^(EBUSY|EXDEV|EPERM|EACCES|EROFS)$/.test(code)) throw error;
      withFile(this.path, fs.constants.O_WRONLY | fs.constants.O_TRUNC, (file) => {
        for (const piece of piecesOf(fd))
          for (let written = 0; written < piece.length;) written += fs.writeSync(file, piece, written);
        fs.fsyncSync(file);
      });
      return `${this.path} was overwritten in place, since it cannot be replaced (${code})`;
    }
  }
}

/** What a path leads to in the end, be it there or not. /dev/stdout leads to /proc/self/fd/1. */
function followLinks(path: string): string {
  for (let links = 0; links < 40 && statOf(path)?.isSymbolicLink(); links++) {
    const folder = fs.realpathSync(dirname(path));
    if (/^\/proc\/\d+\/fd$/.test(folder)) return join(folder.replace(`/${process.pid}/`, "/self/"), basename(path));
    path = resolve(folder, fs.readlinkSync(path));
  }
  return path;
}

/** Runs a step with a descriptor that is closed whatever happens. */
function withFile<T>(path: string, flags: number | "r", step: (fd: number) => T): T {
  const fd = fs.openSync(path, flags);
  try {
    return step(fd);
  } finally {
    fs.closeSync(fd);
  }
}

function* piecesOf(fd: number): Generator<Uint8Array> {
  const buffer = new Uint8Array(1_048_576);
  for (let at = 0, length = 0; (length = fs.readSync(fd, buffer, 0, buffer.length, at)) > 0; at += length)
    yield buffer.subarray(0, length);
}

/** SHA-256 in hex of what can be read from a descriptor. */
function sha256Of(fd: number): string {
  const hash = new Bun.CryptoHasher("sha256");
  for (const piece of piecesOf(fd)) hash.update(piece);
  return hash.digest("hex");
}

// ═══ 12 Command line ═══════════════════════════════════════════════════════════════════════════

export const HELP = `Usage: client-robust [options] [URL]
Gets URL, by default ${DEFAULTS.url}, and prints the whole response.

  -X, --request METHOD     another method than GET
  -H, --header LINE        a field-line to send, as "Name: value"; "Name:" removes that field
  -d, --data DATA          content to send, by POST; @FILE is that of a file, @- of stdin
  -I, --head               ask for the head alone
  -L, --location           follow redirects, ${LIMITS.redirectsMax} at the most
  -o, --output FILE        save the content, and nothing else, to FILE (- is stdout)
  -O, --remote-name        the same, to the last segment of the URL's path
  -R, --remote-time        FILE gets the time of Last-Modified
  -z, --time-cond FILE     only if the content has changed since FILE was
      --retry N            retries in a row without new data (${DEFAULTS.retries})
      --retry-delay S      seconds before each (1, 2, 4 … 60, half of it random)
      --retry-max-time S   seconds after which no retry begins (no limit)
      --connect-timeout S  seconds until connected (${DEFAULTS.connectTimeoutS})
      --stall-timeout S    seconds without a byte (${DEFAULTS.stallTimeoutS})
      --max-time S         seconds for everything (no limit)
      --max-size BYTES     of the content (no limit)
      --sha256 HEX         the SHA-256 that the content must have
      --cacert FILE        trust these authorities (PEM) instead of the system's
  -k, --insecure           do not verify the certificate
  -s, --silent             print nothing on stderr but errors
  -v, --verbose            print the heads that are sent and received, and a summary, on stderr
      --trace              show each step on the connection, on stderr
  -f, --fail, -S, --show-error  accepted: what they mean in curl is done anyway
  -h, --help               print this text
  -V, --version            print the version

FILE is never partial: it is untouched until the download is complete. A transfer that breaks
off leaves a part beside FILE, from which the same command continues. Proxies from the
environment are not used, and a URL takes no user name. Exit codes are curl's: 0 done (304,
too), 2 usage, 3 URL, 6 cannot resolve, 7 cannot connect, 8 not HTTP, 18 partial, 22 status (of
a GET with -o any but 200, otherwise 400 and above), 23 cannot write, 28 timeout, 33 range,
35 TLS, 47 redirects, 52 no answer, 55 cannot send, 56 cannot receive, 60 certificate, 63 too
large, 77 --cacert; and 29 if a digest does not fit, 1 a fault of this program.
`;

const STRING = { type: "string" } as const;
const flag = (short: string) => ({ type: "boolean", short }) as const;

const FLAGS = {
  request: { ...STRING, short: "X" },
  header: { ...STRING, short: "H", multiple: true },
  data: { ...STRING, short: "d", multiple: true },
  head: flag("I"),
  location: flag("L"),
  output: { ...STRING, short: "o" },
  "remote-name": flag("O"),
  "remote-time": flag("R"),
  "time-cond": { ...STRING, short: "z" },
  retry: STRING,
  "retry-delay": STRING,
  "retry-max-time": STRING,
  "connect-timeout": STRING,
  "stall-timeout": STRING,
  "max-time": STRING,
  "max-size": STRING,
  sha256: STRING,
  cacert: STRING,
  insecure: flag("k"),
  // These two are habits of hands that type -fsSL: they mean what is done anyway.
  fail: flag("f"),
  "show-error": flag("S"),
  silent: flag("s"),
  verbose: flag("v"),
  trace: { type: "boolean" },
  help: flag("h"),
  version: flag("V"),
} as const;

/** @throws TransferError "usage" or "url" */
export function parseCommandLine(args: string[]) {
  const { values, positionals } = parseFlags(args);
  const [text = DEFAULTS.url, extra] = positionals;
  if (extra !== undefined) throw usageError(`one argument too many: ${JSON.stringify(extra)}`);
  const { data = [], head = false, sha256 = "", "max-size": maxSize, retry, "remote-name": isRemoteName } = values;
  if (isRemoteName && values.output !== undefined) throw usageError("--remote-name goes with no --output");
  const url = parseUrl(text);
  const output = isRemoteName ? remoteName(text, url) : values.output;
  if (output === "") throw usageError("--output takes a file or -");
  if (head && (output !== undefined || data.length > 0))
    throw usageError("--head goes with neither --output nor --data");
  const method = values.request ?? (head ? "HEAD" : data.length > 0 ? "POST" : "GET");
  if (!new RegExp(`^${TOKEN}$`).test(method) || method === "CONNECT")
    throw usageError(`--request takes no ${JSON.stringify(method)}`);
  if (head && method !== "HEAD") throw usageError("--head asks with HEAD, and --request with another method");
  if (sha256 !== "" && !/^[0-9a-f]{64}$/i.test(sha256)) throw usageError("--sha256 takes 64 hexadecimal digits");
  type SecondsFlag = "connect-timeout" | "stall-timeout" | "max-time" | "retry-delay" | "retry-max-time";
  const seconds = (name: SecondsFlag, byDefault: number) => parseSeconds(`--${name}`, values[name], byDefault);
  const fields = [...(values.header ?? []).map(parseField), ...timeCondition(values["time-cond"])];
  const job: Job = {
    request: { method, url, fields, content: undefined },
    keepsOnlyContent: output !== undefined,
    canStartOver: output !== undefined && output !== "-",
    isVerified: sha256 !== "" && method === "GET",
    followsRedirects: values.location ?? false,
    isConditional: fields.some(([name]) => /^if-(modified-since|none-match)$/i.test(name)),
    retries: retry === undefined ? DEFAULTS.retries : parseCount("--retry", retry),
    retryDelayMs: values["retry-delay"] === undefined ? undefined : seconds("retry-delay", 0),
    retryMaxMs: seconds("retry-max-time", Number.POSITIVE_INFINITY),
    sizeMax: maxSize === undefined ? Number.POSITIVE_INFINITY : parseCount("--max-size", maxSize),
    connectMs: seconds("connect-timeout", DEFAULTS.connectTimeoutS),
    stallMs: seconds("stall-timeout", DEFAULTS.stallTimeoutS),
    maxMs: seconds("max-time", Number.POSITIVE_INFINITY),
    authoritiesFile: values.cacert,
    isInsecure: values.insecure ?? false,
    sha256: sha256.toLowerCase(),
    keepsTime: values["remote-time"] ?? false,
    isSilent: values.silent ?? false,
    isVerbose: values.verbose ?? false,
    isTraced: values.trace ?? false,
  };
  const show = values.help ? "help" : values.version ? "version" : "";
  return { show, job, data, output } as const;
}

/** As in curl, the last segment of the path as it was typed. @throws TransferError "usage" if that is no plain name */
function remoteName(text: string, url: URL): string {
  const [path = ""] = text.split(/[?#]/, 1);
  const name = path.slice(path.lastIndexOf("/") + 1);
  if (url.pathname.endsWith("/") || /^\.{0,2}$|[\\\0]/.test(name))
    throw usageError(`--remote-name finds no name of a file in ${JSON.stringify(text)}`);
  return name;
}

/** The condition of -z: only what has changed since FILE did (RFC 9110 §13.1.3). None if there is no FILE. */
function timeCondition(file: string | undefined): [name: string, value: string][] {
  const found = file === undefined ? undefined : ignoreErrors(() => fs.statSync(file));
  return found === undefined ? [] : [["If-Modified-Since", found.mtime.toUTCString()]];
}

function parseFlags(args: string[]) {
  try {
    return parseArgs({ args, options: FLAGS, allowPositionals: true });
  } catch (error) {
    throw usageError((error as Error).message.split(". ", 1)[0] ?? ""); // parseArgs throws TypeErrors
  }
}

const usageError = (message: string) => new TransferError("usage", `${message} (see client-robust --help)`);

function parseSeconds(name: string, text: string | undefined, byDefault: number): number {
  if (text === undefined) return byDefault * 1000;
  const seconds = Number(text);
  // A timer takes 2^31 ms at the most, and would fire at once for more.
  if (!/^\d*\.?\d+$/.test(text) || seconds <= 0 || seconds > 2_000_000)
    throw usageError(`${name} takes seconds, from above 0 to 2000000`);
  return seconds * 1000; // ms
}

function parseCount(name: string, text: string): number {
  if (!/^\d{1,15}$/.test(text)) throw usageError(`${name} takes a number, not ${JSON.stringify(text)}`);
  return Number(text);
}

/** Fields that say how the message is framed, or what is asked for, are the program's own. */
const OWN_FIELD = /^(connection|content-length|if-range|range|transfer-encoding)$/i;
/** @returns name and value; an empty value means that no such field is to be sent */
function parseField(line: string): [name: string, value: string] {
  const bytes = Buffer.from(line).toString("latin1");
  const name = FIELD_LINE.exec(bytes)?.[1];
  if (name === undefined) throw usageError(`--header takes "Name: value", not ${JSON.stringify(line)}`);
  if (OWN_FIELD.test(name)) throw usageError(`--header cannot set ${name}`);
  return [name, trimOws(bytes.slice(name.length + 1))];
}

const isSpoken = ({ protocol }: URL) => protocol === "http:" || protocol === "https:";

/** As in curl, "http://" may be left out. @throws TransferError "url" */
export function parseUrl(text: string): URL {
  const withScheme = /^[a-z][a-z0-9+.-]*:\/\//i.test(text) ? text : `http://${text}`;
  // URL.parse drops tabs and line ends, and encodes spaces: what is left would not be what was asked for.
  const url = /[\0-\x20\x7f]/.test(text) ? null : URL.parse(withScheme);
  if (url === null) throw new TransferError("url", `not a URL: ${JSON.stringify(text)}`);
  if (!isSpoken(url))
    throw new TransferError("url", `only http:// and https:// are spoken here, not ${url.protocol}//`);
  if (url.username !== "" || url.password !== "")
    throw new TransferError("url", "a URL with a user name is not supported");
  return url;
}

/**
 * The content to send; what several -d say is joined with "&", as forms are. A file is read while it is sent, once for
 * each attempt. What can be read once only is held.
 * @throws TransferError "usage"
 */
async function readData(data: readonly string[]): Promise<Blob[] | undefined> {
  if (data.length === 0) return undefined;
  const blobs: Blob[] = [];
  let text = "";
  for (const [i, item] of data.entries()) {
    text += (i > 0 ? "&" : "") + (item.startsWith("@") ? "" : item);
    if (item.startsWith("@")) blobs.push(new Blob([text]), await openData(item.slice(1)));
    if (item.startsWith("@")) text = "";
  }
  return [...blobs, new Blob([text])];
}

async function openData(path: string): Promise<Blob> {
  try {
    const [source, found] = path === "-" ? [Bun.stdin, undefined] : [Bun.file(path), fs.statSync(path)];
    return found?.isFile() ? source.slice(0, found.size) : await hold(source);
  } catch (error) {
    throw usageError(`cannot read the data: ${(error as SystemError).code ?? (error as Error).message}`); // of node:fs or Bun
  }
}

async function hold(source: Blob): Promise<Blob> {
  const pieces: Uint8Array<ArrayBuffer>[] = [];
  let length = 0;
  for await (const piece of source.stream()) {
    length += piece.length;
    if (length > LIMITS.heldDataBytesMax)
      throw new Error(`a pipe may have ${formatBytes(LIMITS.heldDataBytesMax)}, a file (@FILE) any size`);
    pieces.push(piece);
  }
  return new Blob(pieces);
}

/** Ctrl-C ends a transfer into a file in order: what has come is kept. Then the signal does what it does by default. */
function keepPartOnSignals(sink: FileSink): void {
  for (const signal of ["SIGINT", "SIGTERM"] as const)
    process.once(signal, () => {
      tell(sink.close() || "Interrupted");
      // A shell sees that Ctrl-C ended the program, and ends its loop. A container's first process ignores the signal.
      process.kill(process.pid, signal);
      process.exit(signal === "SIGINT" ? 130 : 143);
    });
}

/** If stdout was closed (`>&-`), Bun has put /dev/null there, and all would be lost. @throws TransferError "write" */
function requireStdout(): void {
  if (process.platform !== "linux" || !fs.fstatSync(1).isCharacterDevice()) return;
  // No descriptor that a program is started with has O_CLOEXEC of Linux; those that Bun opens have.
  const flags = ignoreErrors(() => /^flags:\s*(\d+)/m.exec(fs.readFileSync("/proc/self/fdinfo/1", "latin1"))?.[1]);
  if ((Number.parseInt(flags ?? "0", 8) & 0o2000000) !== 0) throw new TransferError("write", "stdout is closed");
}

/** @returns the exit code */
async function main(): Promise<number> {
  try {
    const { show, job, data, output } = parseCommandLine(process.argv.slice(2));
    const text = { help: HELP, version: `client-robust ${VERSION}\n`, "": "" }[show];
    if (show !== "") await writeAll(1, Buffer.from(text), true, null);
    if (show !== "") return EXIT_CODES.ok;
    const isStdout = output === undefined || output === "-";
    if (isStdout) requireStdout();
    const sink = isStdout ? new StreamSink(1, output === "-") : FileSink.open(output, job);
    if (sink === undefined && job.isVerbose) tell(`${output} has this SHA-256 already`);
    if (sink === undefined) return EXIT_CODES.ok;
    if (sink instanceof FileSink) keepPartOnSignals(sink);
    const request = { ...job.request, content: await readData(data) };
    const canStartOver = sink instanceof FileSink;
    return await download({ ...job, request, canStartOver }, sink);
  } catch (error) {
    const failure = asTransferError(error);
    if (!failure.isQuiet) tell(`Error: ${failure.message}`);
    return EXIT_CODES[failure.outcome];
  }
}

if (import.meta.main) process.exit(await main());
