#!/usr/bin/env bun
/**
 * client-robust.ts: stage 3, the client made efficient and stable.
 *
 *     bun client-robust.ts                              # GET http://localhost:8888/data
 *     bun client-robust.ts http://example.test/a.html   # another URL: head, then content
 *     bun client-robust.ts -o a.iso http://example.test/a.iso
 *
 * It receives in a loop until the framing says that the response is complete (RFC 9112 §6.3), never because no more
 * bytes came. Transient failures are retried, and an interrupted transfer continues where it stopped. The result is one
 * version of the content, whole, or a failure with curl's exit code. Memory use is constant.
 *
 * It reads from top to bottom. **The transfer** is the tutorial's try { … } catch … finally { close }, in a loop.
 * Left out: HTTP/2, compression, cookies, proxies, several URLs.
 */
import type { Stats } from "node:fs";

// ═══ 1 Limits and defaults ═════════════════════════════════════════════════════════════════════

export const VERSION = "0.1.0";
const DEFAULT_URL = "http://localhost:8888/data";

export const LIMITS = Object.freeze({
  connectTimeoutMs: 10_000, // a SYN is sent again after 1, 3 and 7 s: this allows three lost ones
  stallTimeoutMs: 60_000, // silence is a failure, a slow transfer is not; a report may take half a minute to begin
  retriesMax: 5, // in a row without new data: with their waits, a server has some 20 s to restart
  headBytesMax: 307_200, // the head and all 1xx before it, as curl
  fieldLinesMax: 5000, // as curl
  chunkExtensionBytesMax: 1_048_576, // allowed beyond the size of the content: some servers sign each chunk with 85 bytes
  receivedBytesMax: 1_048_576, // received and not yet processed: then we stop reading, and TCP slows the server (backpressure)
  printedBytesMax: 4096, // printed without loading node:fs: PIPE_BUF, which a full pipe takes whole or not at all
  lastWriteMs: 100, // after a deadline, for output that is not blocked
  writeRetryMs: 10, // the wait before the next write to a full stdout that another process has made non-blocking
  backoffFirstMs: 1000, // the first retry waits about a second, the next two, then four …
  backoffMaxMs: 60_000,
  retryAfterMaxMs: 3_600_000, // if a server asks for a longer wait, give up, unless --retry-max-time allows it
  strongDateAgeMs: 60_000, // RFC 9110 §8.8.2.2: a date names one version if it is this much older than the response
  heldDataBytesMax: 67_108_864, // content to send from stdin or a pipe: it is kept in memory so that it can be sent again
  idlePartMs: 1000, // another run that has taken our part over and writes nothing for so long loses it
  syncEveryBytes: 67_108_864, // start writing to the disk each time that so much has come
  redirectsMax: 50, // as curl
  progressAfterMs: 1000, // short transfers get no progress line …
  progressEveryMs: 200, // … and it changes no more often than an eye can follow
});

// ═══ 2 Words ═══════════════════════════════════════════════════════════════════════════════════

export interface Request {
  readonly method: string;
  readonly url: URL;
  readonly fields: readonly (readonly [name: string, value: string])[]; // the user's: each replaces ours of that name
  readonly content: Blob[]; // filled once, and read again for each attempt; no Blob, no content
}

export type Options = Readonly<ReturnType<typeof parseCommandLine>>; // which has the fields, and what they mean
export type Source = Pick<Connection, "receive" | "records">; // where a response comes from
export type Framing = number | "chunked" | "close"; // where content ends (RFC 9112 §6.3): octets, last chunk, close

export interface ResponseHead {
  readonly status: number;
  readonly fields: ReadonlyMap<string, readonly string[]>; // the values of each field, by its name in lower case
  readonly framing: Framing;
  readonly text: string; // the head as it came, one character a byte
}

/** The content received so far: this many bytes from its start, of the version that the validator names. */
export interface Held {
  readonly bytes: number;
  readonly validator: string; // for If-Range: a strong entity-tag or a strong date, which names exactly these bytes; or ""
  readonly etag: string; // the fields as the server sent them, weak or strong; "" without one
  readonly lastModified: string;
  readonly coding: string; // Content-Encoding: each coding has other bytes
  readonly resource: string; // that the validator is of (RFC 9110 §8.8): it tells nothing of another. See resourceOf
  readonly total?: number | undefined; // the length of the whole, if a response has told it
}
export const NOTHING: Held = { bytes: 0, validator: "", etag: "", lastModified: "", coding: "", resource: "" };

/** Where the content goes. Its methods throw TransferErrors and errors of node:fs. `held` was written before. */
interface Sink {
  readonly leftover?: Held | undefined; // what an earlier run has left, to be continued
  write(content: Uint8Array, held: Held): Promise<void>;
  finish?(held: Held): Promise<string>; // the content is whole and verified. Returns what the user should know, or ""
  close?(held: Held): string; // called last, whatever happened. Returns how to continue, or ""
  digest?(held: Held): Promise<string>; // SHA-256 in hex of all that was written, if it can be read again
  discard?(): void; // deletes everything written; a sink without this method cannot start over
  readonly isTerminal?: boolean;
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
  digest: 29, // a code that curl does not use: the content is whole, but does not match a digest
  range: 33, // the response is not the part, or not the whole, that was asked for
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
type SystemError = Error & { code?: string; syscall?: string; path?: string }; // what Bun and node:fs throw

/** A transfer that failed: `outcome` says how, the message says it in a line, or is "" if there is nothing to say. */
export class TransferError extends Error {
  readonly outcome: Outcome;
  readonly retryAfterMs: number = 0; // RFC 9110 §10.2.3: no attempt before this wait
  readonly isFinal: boolean = false; // another attempt cannot help, though the outcome alone would not say so
  readonly isPart: boolean = false; // the response was complete, but only a part of the missing bytes: the server has more
  readonly refusesRest: boolean = false; // a request for the rest got an answer of no use: the whole may still be had
  readonly spoils: boolean = false; // the content held may be wrong

  constructor(outcome: Outcome, message: string, more: Partial<Omit<TransferError, "outcome" | keyof Error>> = {}) {
    super(message);
    this.outcome = outcome;
    Object.assign(this, more);
  }
}

/** Turns everything that is thrown into a TransferError. Other system errors that get this far are of an output. */
export function asTransferError(error: unknown): TransferError {
  if (error instanceof TransferError) return error;
  const { code, syscall, path, message } = error as SystemError; // whatever was thrown, these are only read
  if (syscall === undefined) return new TransferError("fault", `a fault of this program: ${message ?? error}`);
  const doing = path === undefined ? "cannot write" : `cannot write ${path}`;
  return new TransferError("write", code === "EPIPE" ? "" : `${doing}: ${code}`); // `| head` has what it wanted
}

// ═══ 4 The transfer ════════════════════════════════════════════════════════════════════════════

/** The heart: one request, one response. @returns nothing once it is delivered, where it redirects to, or a failure */
export async function transfer(session: Session): Promise<undefined | Request | TransferError> {
  const { job, delivery, request } = session;
  const connection = new Connection(job);
  try {
    await connection.connect(request.url);
    await sendRequest(connection, session);
    const { head, rest } = await receiveHead(connection, request.method);
    job.trace?.complete("head");
    if (job.isVerbose) tellHead("< ", head.text);
    if (head.framing !== "close") connection.stopWatching();
    const verdict = judgeHead(head, delivery.held, session);
    if (verdict.action === "redirect") return verdict.to;
    if (verdict.action === "complete") await delivery.finish(head);
    if (verdict.action !== "deliver") return undefined;
    if (verdict.held.bytes === 0 && delivery.held.bytes > 0 && !job.isSilent)
      tell(`Starting over: ${delivery.held.validator === "" ? "nothing tells whether " : ""}the content has changed`);
    delivery.start(head, verdict);
    for await (const content of receiveContent(connection, head.framing, rest)) {
      job.trace?.complete("content");
      await delivery.write(content);
      showProgress(session);
    }
    job.trace?.complete("content complete");
    await delivery.finish(head);
    // Without -o an error page is printed, and is a failure all the same. With -o, judgeHead has refused it.
    return head.status < 400 ? undefined : new TransferError("status", describeStatus(head), { isFinal: true });
  } catch (error) {
    return asTransferError(error);
  } finally {
    connection.close();
  }
}

async function sendRequest(connection: Connection, session: Session): Promise<void> {
  const { job, delivery, request, asksForWhole } = session;
  const { held } = delivery;
  session.hasRange = held.bytes > 0 && !asksForWhole && (job.hasSha256 || held.resource === resourceOf(request.url));
  let [unsent, left] = [formatRequest(request, session.hasRange ? held : NOTHING), lengthOf(request.content)];
  if (job.isVerbose) tellHead("> ", latin1(unsent, 0, unsent.length));
  session.wasSent = true;
  for await (const piece of piecesOfData(request)) {
    [unsent, left] = [Buffer.concat([unsent, piece]), left - piece.length];
    if (unsent.length < 65_536) continue; // a small request is one write
    if (!(await connection.send(unsent))) return; // the server has answered early, and needs no more
    unsent = new Uint8Array(0);
    await nextTurn(); // or a fast disk and a fast peer would keep timers waiting
  }
  if (left > 0) throw new TransferError("send", "the data has become shorter", { isFinal: true });
  await connection.send(unsent);
}

async function* piecesOfData({ content }: Request): AsyncGenerator<Uint8Array> {
  try {
    for (const blob of content) yield* blob.stream();
  } catch (error) {
    throw new TransferError("send", `cannot read the data: ${(error as SystemError).code}`, { isFinal: true }); // Bun's
  }
}

/** The state that all attempts share. */
const beginSession = (job: Options, sink: Sink) => ({
  job,
  canStartOver: sink.discard !== undefined, // not on stdout: what is printed cannot be deleted
  delivery: new Delivery(sink, job),
  progress: { dueAt: 0, firstBytes: Number.POSITIVE_INFINITY }, // what the progress line needs
  first: job.request, // what every attempt begins with: the user's request, or the GET that a redirect has made of it
  request: job.request, // the last request
  hasRange: false, // it asks for the rest of what is held
  asksForWhole: false, // the next request is for the whole, though something is held
  wasSent: false, // a request may have reached the server
  failures: 0, // attempts in a row that have failed and brought no new data, the last one included
  before: "", // how the last attempt failed, as the end of a message
});
type Session = ReturnType<typeof beginSession>;
export type Attempt = Pick<Session, "job" | "canStartOver" | "request" | "hasRange" | "wasSent" | "failures">;

/** The whole run around the heart. @returns the exit code; a failure has been printed by then, as one line on stderr */
async function download(args: readonly string[]): Promise<number> {
  let session: Session | undefined;
  try {
    const job = parseCommandLine(args);
    if (job.show !== "") return await Bun.write(Bun.stdout, job.show).then(() => EXIT_CODES.ok);
    for (const item of job.data) job.request.content.push(await withinMaxTime(job, readData(item)));
    const sink = await withinMaxTime(job, openSink(job));
    if (sink === undefined && job.isVerbose) tell(`${job.output} has this SHA-256 already`);
    if (sink === undefined) return EXIT_CODES.ok;
    session = beginSession(job, sink);
    if (job.trace !== undefined) fs(); // loaded before the first step, which would count the time
    if (session.canStartOver) keepPartOnSignals(session);
    await withinMaxTime(job, tryUntilDone(session));
    tellSummary(session);
    return EXIT_CODES.ok;
  } catch (error) {
    endLine(); // also if the failure is not told
    const failure = asTransferError(error);
    const isLate = failure.outcome === "timeout" && failure.isFinal; // --max-time is over
    if (isLate) failure.message += session?.before ?? "";
    if (isLate) session?.job.trace?.step("deadline", failure.message);
    if (failure.message !== "") tell(`Error: ${failure.message}`);
    return EXIT_CODES[failure.outcome];
  } finally {
    if (session !== undefined) {
      const { job, delivery } = session;
      const closing = delivery.printHead().then(() => delivery.sink.close?.(delivery.held) ?? "");
      const advice = await withinMaxTime(job, closing, LIMITS.lastWriteMs).catch(() => "");
      if (advice !== "" && !job.isSilent) tell(advice);
    }
  }
}

/** Ctrl-C ends a transfer into a file in order: the part is kept. Then the signal does what it does by default. */
function keepPartOnSignals({ delivery }: Session): void {
  // Signals ignored from the start (nohup) stay so: bit 0 is signal 1. Only Linux tells; else SIGHUP is left alone.
  const status = ignoreErrors(() => fs().readFileSync("/proc/self/status", "latin1")) ?? "";
  const ignored = Number.parseInt(/^SigIgn:\s*\w*(\w{4})$/m.exec(status)?.[1] ?? "1", 16);
  for (const [signal, number] of Object.entries({ SIGHUP: 1, SIGINT: 2, SIGTERM: 15 }))
    if (((ignored >> (number - 1)) & 1) === 0)
      process.once(signal, () => {
        tell(delivery.sink.close?.(delivery.held) || "Interrupted");
        process.kill(process.pid, signal); // a shell sees that Ctrl-C ended the program, and ends its loop
        process.exit(128 + number); // a container's first process ignores the signal
      });
}

/** One attempt after another, until one succeeds. @throws TransferError if there will be no other */
async function tryUntilDone(session: Session): Promise<void> {
  const { job, delivery } = session;
  for (let failure; (failure = await followRedirects(session)) !== undefined;) {
    const hasMore = delivery.endAttempt(failure.spoils);
    session.failures = hasMore ? Number(!failure.isPart) : session.failures + Number(!failure.refusesRest);
    const next = decideNext(failure, delivery.held, session, job.retryMaxMs - performance.now(), Math.random());
    if (typeof next === "string") failure.message += next && ` (${next})`;
    if (typeof next === "string") throw failure;
    session.asksForWhole = next.asksForWhole;
    session.before = `; before that, ${failure.message}`;
    if (!job.isSilent && next.afterMs < job.maxMs - performance.now())
      tell(`Retry in ${(next.afterMs / 1000).toFixed(1)} s: ${failure.message}; ${delivery.held.bytes} bytes kept`);
    await Bun.sleep(next.afterMs);
  }
}

async function followRedirects(session: Session): Promise<TransferError | undefined> {
  session.request = session.first;
  for (let redirects = 0; redirects <= LIMITS.redirectsMax; redirects++) {
    const ending = await transfer(session);
    if (ending === undefined || ending instanceof TransferError) return ending;
    // RFC 9110 §15.4.4: the first request has been carried out, and a retry repeats the GET alone.
    if (ending.method !== session.request.method) session.first = ending;
    session.request = ending;
  }
  return new TransferError("redirects", `more than ${LIMITS.redirectsMax} redirects`);
}

// ═══ 5 Policy ══════════════════════════════════════════════════════════════════════════════════

export type Verdict =
  /** Its content begins at byte `from` of the whole; a part ends before `end`. If `held` is empty, it starts over. */
  | { readonly action: "deliver"; readonly from: number; readonly end?: number; readonly held: Held }
  | { readonly action: "complete" | "unchanged" } // the bytes held are the whole content; the user has it already
  | { readonly action: "redirect"; readonly to: Request };

/** Statuses that are often temporary: of RFC 9110 §15, 425 and 507, and those of large proxies. */
const TRANSIENT_STATUSES = [408, 425, 429, 500, 502, 503, 504, 507, 520, 521, 522, 523, 524, 530, 599];
const IDEMPOTENT_METHODS = ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"]; // RFC 9110 §9.2.2

/** What to do with a response, where `held` is what we have. @throws TransferError if it is a failure */
export function judgeHead(head: ResponseHead, held: Held, attempt: Attempt): Verdict {
  const { status } = head;
  const { job, request, hasRange, failures } = attempt;
  const [place = ""] = [300, 301, 302, 303, 307, 308].includes(status) ? fieldValues(head, "location") : [];
  // Not every server encodes what is not ASCII. Its bytes are sent back as they came, whatever their charset.
  const location = place.replace(/[\x80-\xff]/g, (byte) => `%${byte.charCodeAt(0).toString(16).toUpperCase()}`);
  if (job.followsRedirects && location !== "") return { action: "redirect", to: redirect(request, status, location) };
  // Some servers ignore If-Modified-Since. As in curl, the date of the response tells then.
  const isOld = job.sinceMs !== undefined && parseHttpDate(singleValue(head, "last-modified")) <= job.sinceMs;
  const isUnchanged = status === 304 || (status === 200 && isOld);
  if (isUnchanged && job.keepsOnlyContent && (held.bytes === 0 || job.isConditional)) return { action: "unchanged" };
  // RFC 9110 §14.4, §15.5.17: only an answer to Range may be a part, or say that there is none.
  if (status === 206 && hasRange) return judgePart(head, held, job);
  if (status === 416 && hasRange) return judgeUnsatisfiable(head, held);
  const [isGet, onlyContentCounts] = [request.method === "GET", job.keepsOnlyContent || held.bytes > 0];
  const isTransient = TRANSIENT_STATUSES.includes(status);
  const isLastTry = failures >= job.retries || !IDEMPOTENT_METHODS.includes(request.method); // its page is shown
  if ((isTransient || (status === 202 && onlyContentCounts && isGet)) && !isLastTry)
    throw new TransferError("status", describeStatus(head), { retryAfterMs: parseRetryAfter(head) });
  // Only these answer a GET with what the URL names (RFC 9110 §6.4.2), not 202, 205 or 207; another method, any 2xx.
  const hasContent = isGet ? [200, 203, 206].includes(status) : status >= 200 && status < 300;
  if (!onlyContentCounts || hasContent) return judgeWhole(head, held, attempt);
  const advice = location && `; -L follows it to ${location}`;
  // Some servers answer so to a Range that they do not like, or that the file has become too short for.
  const refusesRest = hasRange && status >= 400 && (status === 500 || !isTransient);
  throw new TransferError("status", describeStatus(head) + advice, { isFinal: true, refusesRest });
}

/** A whole response: bytes held of the same version are skipped, bytes held of another version are given up. */
function judgeWhole(head: ResponseHead, held: Held, { job, canStartOver, request }: Attempt): Verdict {
  const [isGet, onlyContentCounts] = [request.method === "GET", job.keepsOnlyContent || held.bytes > 0];
  // Content-Range means nothing in a 200 (RFC 9110 §14.4). But some servers send such a part so, others 206 unasked.
  const ranges = onlyContentCounts && (isGet || head.status === 206) ? contentRangesOf(head) : [];
  const length = typeof head.framing === "number" ? head.framing : ranges[0]?.total;
  const isPart = ranges.some(({ first, last, total }) => first > 0 || last + 1 !== total || total !== length);
  if (isPart || (onlyContentCounts && head.status === 206 && ranges.length === 0))
    throw new TransferError("range", "the server sent a part of the content as if it were the whole");
  if (length !== undefined && length > job.sizeMax) throw tooLarge(job);
  const isNamed = isGet && (head.status === 200 || (head.status === 206 && onlyContentCounts));
  const version = { ...versionOf(head), resource: resourceOf(request.url), ...(isNamed ? {} : { validator: "" }) };
  const { validator, resource } = version;
  const isSame = validator === held.validator && validator !== "" && resource === held.resource && agrees(head, held);
  const total = length ?? held.total; // what an earlier response said of this version still holds
  if (held.bytes > 0 && (isSame || job.hasSha256) && total === (held.total ?? total))
    return { action: "deliver", from: 0, held: { ...held, total } };
  const changed = "the content has changed since its first part was printed, which cannot be taken back";
  if (held.bytes > 0 && !canStartOver) throw new TransferError("partial", changed, { isFinal: true });
  return { action: "deliver", from: 0, held: { ...version, bytes: 0, total: isSame ? total : length } };
}

/** A part is used only if it continues the bytes held without a gap, and is of the same version. */
function judgePart(head: ResponseHead, held: Held, job: Options): Verdict {
  const { first, last, total = held.total ?? Number.NaN } = parseContentRange(singleValue(head, "content-range"));
  const fits =
    first <= resumeFrom(held) && // caches that work in blocks begin earlier: what is held already is passed over
    last >= resumeFrom(held) && // RFC 9110 §15.3.7: it may be less than was asked for; the next attempt gets the rest
    last < total &&
    total === (held.total ?? total) &&
    (typeof head.framing !== "number" || head.framing === last + 1 - first) &&
    (job.hasSha256 || agrees(head, held));
  if (!fits) throw misfit("the server sent another part than the one that is missing");
  if (total > job.sizeMax) throw tooLarge(job);
  return { action: "deliver", from: first, end: last + 1, held: { ...held, total } };
}

/** RFC 9110 §15.5.17: no byte follows those held. They are the whole only if length and version match. */
function judgeUnsatisfiable(head: ResponseHead, { bytes, total = bytes, validator }: Held): Verdict {
  const complete = Number(/^bytes \*\/(\d{1,15})$/i.exec(singleValue(head, "content-range"))?.[1]);
  const isSame = validator !== "" && validator === versionOf(head).validator;
  if (!isSame || complete !== bytes || total !== bytes) throw misfit("the server has no such part");
  return { action: "complete" };
}

const misfit = (message: string) => new TransferError("range", message, { refusesRest: true });
const tooLarge = ({ sizeMax }: Options) => new TransferError("tooLarge", `the content is larger than ${sizeMax} bytes`);
const describeStatus = ({ text }: ResponseHead) =>
  `the server answered ${asText(/ (.*)/.exec(text)?.[1] ?? "")}`.trimEnd();

/** RFC 9110 §14.4: bytes first-last/total, undefined for "*". No match gives NaN, which fits nothing. */
function parseContentRange(value: string) {
  const [, first, last, total] = /^bytes (\d{1,15})-(\d{1,15})\/(\d{1,15}|\*)$/i.exec(value) ?? [];
  return { first: Number(first), last: Number(last), total: total === "*" ? undefined : Number(total) };
}

const contentRangesOf = (head: ResponseHead) =>
  fieldValues(head, "content-range")
    .filter((value) => /^bytes\b/i.test(value))
    .map(parseContentRange);

const STRONG_ETAG = /^"[\x21\x23-\x7e\x80-\xff]+"$/; // an empty one is that of every version
const codingOf = (head: ResponseHead) => `${fieldValues(head, "content-encoding")}`.replace(/^(identity|[, ])*$/i, "");

/** The fields that name the version of a whole response to a GET. */
export function versionOf(head: ResponseHead): Pick<Held, "validator" | "etag" | "lastModified" | "coding"> {
  const [etag, lastModified, coding] = [singleValue(head, "etag"), singleValue(head, "last-modified"), codingOf(head)];
  if (STRONG_ETAG.test(etag)) return { etag, lastModified, coding, validator: etag };
  // RFC 9110 §13.1.5 wants a date only without an ETag. But many send a weak one; an old date is strong (§8.8.2.2).
  // Reproducible builds give every version one time: second 0 or 1, a day in 1980 or 1985, a midnight.
  const changed = parseHttpDate(lastModified);
  const mayBeStrong = changed >= Date.UTC(1990) && changed % 86_400_000 !== 0;
  const isStrong = mayBeStrong && parseHttpDate(singleValue(head, "date")) - changed >= LIMITS.strongDateAgeMs;
  return { etag, lastModified, coding, validator: isStrong ? lastModified : "" };
}

/** Parameters that sign a query, at the large clouds: they are new each time, and name nothing. */
const SIGNATURE = /&((sig|se|skt|ske|jwt|Expires|Signature|Policy|Key-Pair-Id|X-(Amz|Goog)-[\w-]+)=[^&]*)/g;
/** For what may be a secret. "" for "", as the first digest of a run takes a twentieth of the time of a small transfer. */
const digestOf = (text: string) => text && new Bun.CryptoHasher("sha256").update(text).digest("hex");

/** What a URL names: its path, and a digest of its query. Its host is left out: a redirect may choose a mirror. */
export const resourceOf = ({ pathname, search }: URL) =>
  `${pathname}?${search && digestOf(search.replace("?", "&").replace(SIGNATURE, ""))}`;

/** No field of the response contradicts the version held. */
const agrees = (head: ResponseHead, { etag, lastModified, coding }: Held) =>
  codingOf(head) === coding && // a 206 may omit it (RFC 9110 §15.3.7), but some servers name two codings by one tag
  fieldValues(head, "etag").every((value) => etag === "" || value === etag) &&
  fieldValues(head, "last-modified").every((value) => lastModified === "" || value === lastModified);

/** RFC 9110 §10.2.3: Retry-After = HTTP-date / delay-seconds. @returns milliseconds from now; 0 if it says nothing */
export function parseRetryAfter(head: ResponseHead, now = Date.now()): number {
  const value = singleValue(head, "retry-after");
  return /^\d+$/.test(value) ? Number(value) * 1000 : Math.max(0, parseHttpDate(value) - now) || 0;
}

// "resolve": the name of a container may appear late; "unparsable": a server just starts; "tls": a lost connection.
const TRANSIENT_OUTCOMES = /^(resolve|connect|tls|empty|send|receive|timeout|unparsable|partial|status|range|digest)$/;

/** Decides after a failure, by the first line that applies. @returns the next attempt, or why there is none */
export function decideNext(failure: TransferError, held: Held, attempt: Attempt, leftMs: number, random: number) {
  const { job, canStartOver, request, wasSent, failures } = attempt;
  // At once: the whole instead of a rest; and the next part (RFC 9110 §15.3.7), unless two in a row bring nothing.
  if (failure.refusesRest || (failure.isPart && failures < 2)) return { afterMs: 0, asksForWhole: failure.refusesRest };
  // Nothing to add: it is permanent (a certificate, 404, conflicting lengths, a full disk), or must not be sent twice.
  if (!TRANSIENT_OUTCOMES.test(failure.outcome) || failure.isFinal) return "";
  if (wasSent && !IDEMPOTENT_METHODS.includes(request.method)) return "";
  if (failures > job.retries) return job.retries > 0 ? `after ${failures} attempts` : "";
  if (leftMs <= 0) return "no time is left for another attempt";
  if (failure.retryAfterMs > (Number.isFinite(leftMs) ? leftMs : LIMITS.retryAfterMaxMs))
    return `Retry-After is too long: ${Math.ceil(failure.retryAfterMs / 1000)} s`;
  // Continue after the bytes held; ask for the whole if the content does not fit, or nothing names the version held.
  const isNameless = held.bytes > 0 && held.validator === "" && !job.hasSha256;
  if ((isNameless || failure.spoils) && !canStartOver) return "what is printed cannot be continued exactly";
  // Half of a wait is fixed, to give the server time; half is random, so that many clients do not return at once.
  const backoffMs = Math.min(LIMITS.backoffMaxMs, LIMITS.backoffFirstMs * 2 ** (failures - 1)) * (0.5 + random / 2);
  const afterMs = Math.max(failure.retryAfterMs, Math.min(job.retryDelayMs ?? backoffMs, leftMs));
  return { afterMs, asksForWhole: isNameless || failure.outcome === "range" };
}

// ═══ 6 The request ═════════════════════════════════════════════════════════════════════════════

/** The first byte to ask for. If all may be held, it is the last one held: a 416 past the end names no version. */
const resumeFrom = ({ bytes, total }: Held) => (total === undefined || bytes === total ? bytes - 1 : bytes);
const lengthOf = (content: readonly Blob[]) => content.reduce((length, { size }) => length + size, 0);
const toBytes = (text: string) => Uint8Array.fromBase64(btoa(text)); // of ISO 8859-1; Buffer.from starts more slowly

/** The head of the request as it goes over the wire (RFC 9112 §3): for the whole, or for the bytes after `held`. */
export function formatRequest({ method, url, fields, content }: Request, held: Held): Uint8Array {
  const ours = [
    ["Host", url.host],
    ["User-Agent", `http-over-tcp/${VERSION}`],
    ["Accept", "*/*"],
    ["Accept-Encoding", "identity"], // RFC 9110 §12.5.3: without it any coding would be acceptable
    ["Want-Repr-Digest", "sha-256=10"], // RFC 9530 §4: then the content can be verified
    ["Content-Type", content.length === 0 ? "" : "application/x-www-form-urlencoded"],
    ["Content-Length", content.length === 0 ? "" : `${lengthOf(content)}`],
    ["Connection", "close"],
    ["Range", held.bytes > 0 ? `bytes=${resumeFrom(held)}-` : ""], // RFC 9110 §14.2
    ["If-Range", held.bytes > 0 ? held.validator : ""], // §13.1.5: the whole instead, if the version has changed
  ] as const;
  const isReplaced = (name: string) => fields.some(([field]) => field.toLowerCase() === name.toLowerCase());
  let head = `${method} ${url.href.replace(/^\w+:\/\/[^/]*|#.*$/g, "")} HTTP/1.1\r\n`; // .search drops a lone "?"
  for (const [name, value] of ours) if (value !== "" && !isReplaced(name)) head += `${name}: ${value}\r\n`;
  for (const [name, value] of fields) if (value !== "") head += `${name}: ${value}\r\n`;
  return toBytes(`${head}\r\n`); // values may be any bytes but CTL: the command line has made them ISO 8859-1
}

const SECRET_FIELD = /^(authorization|cookie|host|proxy-authorization)$/i; // only the first server may see it
const CONTENT_FIELD = /^(content-.*|digest|repr-digest|last-modified)$/i; // about content that is not sent again
const isSpoken = ({ protocol }: URL) => protocol === "http:" || protocol === "https:";

/** The request that a redirect asks for (RFC 9110 §15.4). @throws TransferError "url" */
function redirect({ method, url: from, fields, content }: Request, status: number, location: string): Request {
  const url = URL.parse(location, from);
  if (url === null || !isSpoken(url)) throw new TransferError("url", `cannot follow the redirect to ${location}`);
  const becomesGet = status === 303 ? method !== "HEAD" : method === "POST" && (status === 301 || status === 302);
  const isKept = ([name]: readonly [string, string]) =>
    (url.origin === from.origin || !SECRET_FIELD.test(name)) && !(becomesGet && CONTENT_FIELD.test(name));
  return { url, fields: fields.filter(isKept), ...(becomesGet ? { method: "GET", content: [] } : { method, content }) };
}

// ═══ 7 The response ════════════════════════════════════════════════════════════════════════════

// ── shared: byte classes ──
const [LF, CR] = [0x0a, 0x0d];

/** The class of the bytes that a pattern matches, read as ISO 8859-1: a table of 256, 1 for a member. */
function bytesLike(pattern: RegExp): Uint8Array {
  const members = new Uint8Array(256);
  for (let byte = 0; byte < 256; byte++) if (pattern.test(String.fromCharCode(byte))) members[byte] = 1;
  return members;
}

/** field-content: VCHAR / obs-text / SP / HTAB (RFC 9110 §5.5). CR, LF, NUL and other CTL are not. */
const FIELD_CONTENT = bytesLike(/[\t\x20-\x7e\x80-\xff]/);
const HEXDIG = bytesLike(/[0-9A-Fa-f]/);

const byteAt = (bytes: Uint8Array, index: number) => bytes[index] as number; // the caller knows it to be in range

/** The index of the first byte of at..to that is not of the class; `to` if all are. */
function skipWhile(members: Uint8Array, bytes: Uint8Array, at: number, to: number): number {
  while (at < to && members[byteAt(bytes, at)] === 1) at++;
  return at;
}

/** The bytes from..to as ISO 8859-1 text, one character a byte. */
const latin1 = (bytes: Uint8Array, from: number, to: number): string =>
  Buffer.prototype.toString.call(bytes, "latin1", from, to);

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
const QUOTED_STRING = '"[^"\\\\]*(?:\\\\.[^"\\\\]*)*"'; // in runs: single characters would take 0.3 s for 128 KiB
/** chunk-ext = *( BWS ";" BWS token [ BWS "=" BWS ( token / quoted-string ) ] ); before it stands chunk-size = 1*HEXDIG */
const CHUNK_EXT = new RegExp(`^(?:[\\t ]*;[\\t ]*${TOKEN}(?:[\\t ]*=[\\t ]*(?:${TOKEN}|${QUOTED_STRING}))?)*$`);
const FIELD_LINE = new RegExp(`^(${TOKEN}):[\\t\\x20-\\x7e\\x80-\\xff]*$`); // field-name ":" OWS field-value OWS

const CHUNK_LINE_BYTES_MAX = 131_072; // A longer line is refused: it has to be held until its end has come.
const CHUNK_SIZE_DIGITS_MAX = 64; // Leading zeros could go on and on.
const CHUNK_SIZE_END = bytesLike(/[\t ;\r\n]/); // Bytes that may follow it: of an extension, or of the line's end.
const hexValue = (byte: number) => (byte & 15) + (byte > 0x39 ? 9 : 0);

/**
 * chunked-body = *( chunk-size [ chunk-ext ] CRLF chunk-data CRLF ) last-chunk trailer-section CRLF (RFC 9112 §7.1).
 * Call {@link next} until `state` is "done" or there is a fault. It keeps no bytes: if it uses none, a line is not
 * complete, and they must come again with more behind.
 */
export class ChunkedDecoder {
  state: "line" | "data" | "trailer" | "done" = "line";
  fault?: "bare-lf" | "bare-cr" | "chunk-size" | "chunk-extension" | "chunk-data" | "trailer" | "trailer-too-large";
  contentTo = 0; // the end of the content that the last call found: it starts where that call did
  announced = 0; // octets of content so far, those of the chunk under way included
  readonly trailerNames: string[] = []; // in lower case: the caller may have to refuse some
  private left = 0; // octets of the chunk under way
  private known = 0; // bytes of an incomplete line that were checked and need not be again
  private extensionBytes = 0;
  private trailerBytes = 0;

  constructor(
    private readonly limits: { chunkExtensionBytesMax: number; headBytesMax: number; fieldLinesMax: number },
    private readonly isUserAgent: boolean, // a server refuses obs-fold (§5.2), and white space behind a chunk-size
  ) {}

  /** Reads content, or one line, from `from` on. @returns the index behind what it has used, `to` at the most */
  next(bytes: Uint8Array, from: number, to: number): number {
    this.contentTo = Math.min(to, from + this.left);
    this.left -= this.contentTo - from;
    if (this.contentTo > from || from === to) return this.contentTo;
    if (this.state === "data") {
      if (bytes[from] !== CR || (from + 1 < to && bytes[from + 1] !== LF)) return this.fail("chunk-data", from);
      if (from + 1 === to) return from; // its CRLF is used once both bytes are there
      this.state = "line";
      from += 2;
    }
    const isTrailer = this.state === "trailer";
    const sizeTo = isTrailer ? from : skipWhile(HEXDIG, bytes, from, Math.min(to, from + CHUNK_SIZE_DIGITS_MAX));
    const isSize = sizeTo === to || (sizeTo > from && CHUNK_SIZE_END[byteAt(bytes, sizeTo)] === 1);
    const end = skipWhile(FIELD_CONTENT, bytes, Math.max(sizeTo, from + this.known), to);
    this.known = end - from;
    // Bytes that cannot become a line that fits are refused before its end has come.
    if (!isTrailer && !isSize) return this.fail("chunk-size", from);
    const most = isTrailer ? this.limits.headBytesMax - this.trailerBytes - 2 : CHUNK_LINE_BYTES_MAX;
    if (this.known > most) return this.fail(isTrailer ? "trailer-too-large" : "chunk-extension", from);
    if (end === to || (bytes[end] === CR && end + 1 === to)) return from;
    this.known = 0;
    if (bytes[end] === LF) return this.fail("bare-lf", end);
    if (bytes[end] !== CR) return this.fail(isTrailer ? "trailer" : "chunk-extension", end);
    if (bytes[end + 1] !== LF) return this.fail("bare-cr", end);
    return isTrailer ? this.takeTrailerLine(bytes, from, end) : this.takeChunkLine(bytes, from, sizeTo, end);
  }

  private takeChunkLine(bytes: Uint8Array, from: number, sizeTo: number, end: number): number {
    for (let at = from; at < sizeTo; at++) this.left = this.left * 16 + hexValue(byteAt(bytes, at));
    if (this.left + this.announced >= 2 ** 53) return this.fail("chunk-size", end + 2); // past it sums are inexact
    // Most lines are a size alone, and no text is made of them.
    const extension = sizeTo < end ? latin1(bytes, sizeTo, end) : "";
    // All extensions together may outweigh the content only by so much, or tiny chunks would keep the recipient busy.
    this.extensionBytes += extension.length;
    const isTooMuch = this.extensionBytes - this.announced > this.limits.chunkExtensionBytesMax;
    if (isTooMuch || (extension !== "" && !CHUNK_EXT.test(this.isUserAgent ? trimOws(extension) : extension)))
      return this.fail("chunk-extension", end + 2);
    this.announced += this.left;
    this.state = this.left > 0 ? "data" : "trailer";
    return end + 2;
  }

  /** The trailer section has the syntax and the limits of the head (RFC 9112 §7.1.2). */
  private takeTrailerLine(bytes: Uint8Array, from: number, end: number): number {
    const line = latin1(bytes, from, end);
    const [, name] = FIELD_LINE.exec(line) ?? [];
    const isFold = this.isUserAgent && this.trailerNames.length > 0 && /^[ \t]/.test(line);
    this.trailerBytes += line.length + 2;
    if (line === "") this.state = "done";
    else if (name !== undefined) this.trailerNames.push(name.toLowerCase());
    else if (!isFold) return this.fail("trailer", end + 2);
    return this.trailerNames.length > this.limits.fieldLinesMax ? this.fail("trailer-too-large", end + 2) : end + 2;
  }

  private fail(fault: NonNullable<ChunkedDecoder["fault"]>, at: number): number {
    this.fault = fault;
    return at;
  }
}
// ── end shared ──

const unparsable = (fault: string, details: ConstructorParameters<typeof TransferError>[2] = { isFinal: true }) =>
  new TransferError("unparsable", `the response is malformed: ${fault}`, details);
const contradiction = () =>
  new TransferError("range", "the length of the content is not what its head said", { spoils: true });

/** Receives heads up to the final one: 1xx are passed over (RFC 9110 §15.2). `rest` is what came behind it. */
export async function receiveHead(source: Source, method: string): Promise<{ head: ResponseHead; rest: Uint8Array }> {
  let [text, came] = ["", 0]; // what has come of a head; how many bytes have come of all
  for (let bytes; (bytes = await source.receive()) !== undefined;) {
    const [before, piece] = [text, latin1(bytes, 0, Math.min(bytes.length, LIMITS.headBytesMax - came))];
    [text, came] = [before + piece, came + bytes.length];
    // Parsed anew only at the start, when the first line has ended, and at an empty line: a byte at a time is cheap.
    const isDue = piece.includes("\n") && (!before.includes("\n") || EMPTY_LINE.test(text.slice(before.length - 2)));
    if (before.length > 7 && came <= LIMITS.headBytesMax && !isDue) continue;
    for (let head; (head = parseResponseHead(text, method)) !== undefined;) {
      text = text.slice(head.text.length);
      if (head.status === 101) throw unparsable("it switches protocols, and nobody asked for that"); // RFC 9110 §15.2.2
      if (head.status >= 200) return { head, rest: bytes.subarray(piece.length - text.length) };
    }
    if (came > LIMITS.headBytesMax) throw unparsable("the head is too large");
  }
  parseResponseHead(text, method); // a line that is malformed is so whatever would have followed
  if (came > 0) throw new TransferError("partial", "the response ends inside its head");
  throw new TransferError("empty", "the server closed the connection without an answer");
}

/** status-line = HTTP-version SP status-code SP [ reason-phrase ] (RFC 9112 §4); the last SP is often forgotten. */
const STATUS_LINE = /^HTTP\/1\.(\d) ([1-9]\d{2})(?: [\t\x20-\x7e\x80-\xff]*)?$/;
const EMPTY_LINE = /\n\r?\n/;
const NO_FIELD_LINE = "a line of its head is not a field-line";
/** The fields that this client reads: their lines must be right to the letter. Others may be as some servers send them. */
const READ_STRICTLY =
  /^(content-(length|range|encoding)|transfer-encoding|etag|last-modified|date|location|retry-after|repr-digest)$/i;

/** Parses the head that begins a text (RFC 9112 §4, §5). @returns undefined: more is needed. @throws TransferError */
export function parseResponseHead(text: string, method: string): ResponseHead | undefined {
  const end = EMPTY_LINE.exec(text);
  const begun = end === null ? text : text.slice(0, end.index + 1);
  // RFC 9112 §2.2 lets a client take LF alone for the end of a line: some servers pass on what scripts print.
  const [first, ...lines] = begun.split(/\r?\n/).slice(0, -1); // the last one has not ended
  const isMalformed = /\0|\r[^\n]/.test(begun); // other readers may take NUL or CR for an end, in half a line, too
  const [, minorVersion, status] = STATUS_LINE.exec(first ?? "") ?? [];
  // A response that does not start like one is refused before the end of its line has come.
  const isHttp = "HTTP/1.".startsWith(text.slice(0, 7)) && (first === undefined ? !isMalformed : status !== undefined);
  if (!isHttp) throw unparsable("its first line is not a status-line of HTTP/1", {}); // a server may be starting
  if (isMalformed) throw unparsable(NO_FIELD_LINE);
  if (lines.length > LIMITS.fieldLinesMax) throw unparsable("it has too many field-lines");
  const fields = new Map<string, string[]>();
  let last: string[] | undefined;
  for (const line of lines) {
    // RFC 9112 §5.2: a user agent reads obs-fold as SP. Before the first field-line it is a fault (§2.2).
    const name = /^(?![ \t])([^:]*):/.exec(line)?.[1]?.toLowerCase();
    if (last !== undefined && /^[ \t][\t\x20-\x7e\x80-\xff]*$/.test(line))
      last.push(trimOws(`${last.pop()} ${trimOws(line)}`));
    else if (name !== undefined && (FIELD_LINE.test(line) || !READ_STRICTLY.test(name.replace(/[^\w-]/g, "")))) {
      last = fields.getOrInsert(name, []);
      last.push(trimOws(line.slice(name.length + 1)));
    } else throw unparsable(NO_FIELD_LINE);
  }
  if (end === null) return undefined;
  const head = { status: Number(status), fields, text: text.slice(0, end.index + end[0].length) };
  return { ...head, framing: decideFraming(head, minorVersion === "0", method) };
}

const fieldValues = ({ fields }: Pick<ResponseHead, "fields">, name: string) => fields.get(name) ?? [];

/** The value of a field that may appear once; "" without it, or if it appears more often. */
const singleValue = (head: ResponseHead, name: string) =>
  fieldValues(head, name).length > 1 ? "" : fieldValues(head, name).join();

// ── shared: http-date ──
/** HTTP-date (RFC 9110 §5.6.7): the form that is sent today, and two obsolete ones. */
const HTTP_DATE =
  /^([A-Z][a-z]{2}, \d\d \w{3} \d{4} [\d:]{8} GMT|[A-Z][a-z]+day, \d\d-\w{3}-\d\d [\d:]{8} GMT|[A-Z][a-z]{2} \w{3} [ \d]\d [\d:]{8} \d{4})$/;

/** @returns milliseconds since 1970; NaN, which compares with nothing, if it is no HTTP-date */
export function parseHttpDate(text: string, now = Date.now()): number {
  if (!HTTP_DATE.test(text)) return Number.NaN;
  // A year of two digits is the last one that ends so and is not more than 50 years ahead.
  const last = new Date(now).getUTCFullYear() + 50;
  const written = text.replace(/-(\d\d) /, (_, digits: string) => `-${last - ((last - Number(digits)) % 100)} `);
  const date = new Date(written.replace(/\d$/, "$& GMT"));
  // Date reads a 31st of February as a day in March: month, year and time must be those that are written.
  const parts = date.toUTCString().slice(8, -4).split(" ");
  return parts.every((part) => written.includes(part)) ? date.getTime() : Number.NaN;
}
// ── end shared ──

/** Where the content of a response ends: RFC 9112 §6.3, item by item. @throws TransferError "unparsable" */
export function decideFraming(head: Omit<ResponseHead, "framing">, isHttp10: boolean, method: string): Framing {
  // Item 1: never any content, whatever the fields say. Item 2 is about CONNECT, which this client does not send.
  if (method === "HEAD" || head.status < 200 || head.status === 204 || head.status === 304) return 0;
  const [codings, lengths] = [fieldValues(head, "transfer-encoding"), fieldValues(head, "content-length")];
  if (codings.length > 0) {
    // Item 3: both present is an attempt at smuggling or at splitting. §6.1: an HTTP/1.0 server cannot know it.
    if (lengths.length > 0) throw unparsable("it has both Content-Length and Transfer-Encoding");
    if (isHttp10) throw unparsable("it has Transfer-Encoding in HTTP/1.0");
    // Item 4: we asked for no coding, so there is none but chunked. RFC 9110 §5.6.1.2: empty list elements do not count.
    if (!/^[\t ,]*chunked[\t ,]*$/i.test(codings.join(","))) throw unparsable("its transfer coding is not chunked");
    return "chunked";
  }
  if (lengths.length === 0) return "close"; // item 8: until the connection is closed
  const [, length] = /^(\d+)(?:[\t ]*,[\t ]*\1)*$/.exec(lengths.join(",")) ?? []; // items 5 and 6: or the same again
  if (!Number.isSafeInteger(Number(length))) throw unparsable("its Content-Length is not one number");
  return Number(length);
}

/** Receives content and no byte more; `begun` came with the head. Each piece is valid until the next is asked for. */
export async function* receiveContent(source: Source, framing: Framing, begun: Uint8Array): AsyncGenerator<Uint8Array> {
  const decoder = framing === "chunked" ? new ChunkedDecoder(LIMITS, true) : undefined;
  const [length, ofLength] = typeof framing === "number" ? [framing, ` of ${framing}`] : [Number.POSITIVE_INFINITY, ""];
  let [rest, kept, came]: [Uint8Array, number, number] = [begun, 0, 0]; // `kept` bytes: a line of chunks, incomplete
  for (let bytes: Uint8Array | undefined = begun; bytes !== undefined;) {
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
    // Content before a fault may have been damaged as well.
    if (decoder?.fault) throw unparsable(`its chunked content is malformed (${decoder.fault})`, { spoils: true });
    if (came === length || decoder?.state === "done") return;
    bytes = await source.receive().catch((error: TransferError) => {
      // Content that only a close ends may be cut by a reset at any byte: then it is a part.
      throw framing === "close" && error.outcome === "receive" ? new TransferError("partial", error.message) : error;
    });
    // RFC 9112 §8: only content without a length may end with the connection, and over TLS only if announced (§9.8).
    if (bytes === undefined && !(framing === "close" && source.records.endsInOrder))
      throw new TransferError("partial", `the response is not complete: ${came}${ofLength} bytes of content came`);
  }
}

/** Chunks are compacted in place, over the framing: one piece is left to write, and nothing is allocated. */
function takeContent(decoder: ChunkedDecoder | undefined, bytes: Uint8Array, left: number) {
  if (decoder === undefined) return { content: bytes.subarray(0, left), used: bytes.length };
  for (let at = 0, to = 0, next = 0; ; at = next) {
    next = decoder.next(bytes, at, bytes.length);
    if (decoder.contentTo > at) bytes.copyWithin(to, at, decoder.contentTo);
    to += decoder.contentTo - at;
    if (next === at || decoder.fault || decoder.state === "done") return { content: bytes.subarray(0, to), used: next };
  }
}

/** Gives memory back at once. The collector would let some 50 MiB pile up, out of the processor's cache. */
function release({ buffer, byteLength }: Uint8Array): void {
  if (buffer instanceof ArrayBuffer && buffer.byteLength === byteLength) buffer.transfer(0);
}

// ═══ 8 Text ════════════════════════════════════════════════════════════════════════════════════

// ── shared: printable ──
const hexOf = (character: string) => character.codePointAt(0)?.toString(16).padStart(2, "0");
const escaped = (character: string) => (character <= "\xff" ? `\\x${hexOf(character)}` : `\\u{${hexOf(character)}}`);

/** Text of a peer's, safe to print: nothing in it moves the cursor, colours, rings or reorders text. */
export const printable = (text: string) =>
  text.replaceAll("\r\n", "\n").replace(/[^\n\t\P{C}]|[\u2028\u2029]/gu, escaped);
const asLine = (text: string) => `${printable(text).replace(/[\n\t]/g, " ")}\n`;
// ── end shared ──

const DELETE_LINE = "\r\x1b[K";
let lineEnd = ""; // ends the line that a terminal is in: LF for content, DELETE_LINE for progress

/** Called before a message is printed on stderr. */
function endLine(): void {
  if (lineEnd !== "") ignoreErrors(() => isTerminal(2, fs().fstatSync(2)) && fs().writeSync(2, lineEnd));
  lineEnd = "";
}

/** One line on stderr. If stderr is closed the message is lost; that is not an error. */
export function tell(line: string): void {
  endLine();
  ignoreErrors(() => fs().writeSync(2, asLine(line)));
}

// ── shared: sizes ──
/** "1.2 MiB" */
function formatBytes(bytes: number): string {
  const power = Math.min(4, Math.floor(Math.log2(Math.max(1, bytes)) / 10));
  return `${(bytes / 1024 ** power).toFixed(power === 0 ? 0 : 1)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}
// ── end shared ──

/** For steps whose failure changes nothing. */
function ignoreErrors<T>(step: () => T): T | undefined {
  try {
    return step();
  } catch {}
  return undefined;
}

/** A head or a reason phrase for people: UTF-8 if it is that, otherwise ISO 8859-1. */
const asText = (text: string) =>
  ignoreErrors(() => new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(toBytes(text))) ?? text;

/** Heads for people: each line with a mark before it, as curl -v prints them. */
function tellHead(mark: string, head: string): void {
  for (const line of asText(head).trimEnd().split(/\r?\n/)) tell(mark + line);
}

/** "1.2 MiB of 3.4 MiB, 35 %, 0.5 MiB/s, 4 s left": on stderr, overwritten, if that is a terminal without content. */
function showProgress({ job, delivery, progress }: Session): void {
  const { bytes, total = 0 } = delivery.held;
  progress.firstBytes = Math.min(progress.firstBytes, bytes); // less: it has started over
  const now = performance.now();
  if (now < Math.max(LIMITS.progressAfterMs, progress.dueAt)) return;
  progress.dueAt = now + LIMITS.progressEveryMs;
  if (job.isSilent || job.trace || delivery.sink.isTerminal || !isTerminal(2, fs().fstatSync(2))) return;
  lineEnd = DELETE_LINE;
  const bytesPerSecond = ((bytes - progress.firstBytes) / now) * 1000;
  const share = total > 0 ? ` of ${formatBytes(total)}, ${Math.floor((100 * bytes) / total)} %` : "";
  const left = total > 0 && bytesPerSecond > 0 ? `, ${Math.ceil((total - bytes) / bytesPerSecond)} s left` : "";
  const line = `${formatBytes(bytes)}${share}, ${formatBytes(bytesPerSecond)}/s${left}`;
  ignoreErrors(() => fs().writeSync(2, `\r\x1b[?7l${line}\x1b[?7h\x1b[K`)); // a narrow terminal cuts it off
}

function tellSummary({ job, delivery: { held, isVerified, note } }: Session): void {
  if (isVerified !== undefined && (lineEnd === DELETE_LINE || job.isVerbose)) {
    const verified = isVerified ? "SHA-256 verified" : "not verified";
    tell(`${formatBytes(held.bytes)} in ${(performance.now() / 1000).toFixed(1)} s, ${verified}`);
  }
  if (note !== "" && !job.isSilent) tell(note);
}

// ═══ 9 Sockets ═════════════════════════════════════════════════════════════════════════════════

/** A socket turned from events into steps: connect, send, receive, receive …, close. */
export class Connection {
  private static authorities: string[] | undefined; // read once: `--cacert <(command)` is a pipe
  private readonly received: Uint8Array[] = [];
  private receivedBytes = 0;
  private end: { outcome: "FIN" } | TransferError | undefined; // nothing more comes
  private isClosed = false;
  private socket: Bun.Socket | undefined;
  private wake = () => {};
  readonly records = new RecordWatch();
  stopWatching = () => {}; // for content that has a length or a last chunk: spares a copy of each record

  /** Each handler stores what has happened, and wakes the step that waits. */
  readonly handlers = {
    open: (socket: Bun.Socket) => void (this.socket = socket),
    data: (socket: Bun.Socket, bytes: Uint8Array) => {
      this.records.room -= bytes.length;
      this.received.push(bytes);
      this.receivedBytes += bytes.length;
      if (this.receivedBytes >= LIMITS.receivedBytesMax) socket.pause();
      this.wake();
    },
    drain: () => this.wake(),
    end: () => {
      this.end ??= { outcome: "FIN" }; // the peer has sent everything
      this.wake();
    },
    /** A close without FIN is a reset, which never ends a message. Bun reports an alert of TLS here, and then again. */
    close: (_: Bun.Socket, error: SystemError = new Error("reset")) => {
      if (/SSL.*_ALERT_/.test(error.message))
        this.end = new TransferError("tls", `the server refused: ${error.message}`, { isFinal: true });
      this.end ??= new TransferError("receive", `the connection was lost: ${error.code ?? error.message}`);
      this.wake();
    },
    error: (socket: Bun.Socket, error: SystemError) => this.handlers.close(socket, error),
  };

  constructor(private readonly job: Options) {}

  /** @throws TransferError "resolve", "connect", "timeout", "tls", "certificate" or "authorities" */
  async connect(url: URL): Promise<void> {
    this.job.trace?.begin();
    const opening = within(this.job.connectMs, this.open(url), `no connection to ${url.host} within`);
    await opening.catch((error) => this.fail("connect", asTransferError(error)));
  }

  private async open(url: URL): Promise<void> {
    const [hostname, isSecure] = [url.hostname.replace(/^\[|\]$/g, ""), url.protocol === "https:"];
    const port = Number(url.port || (isSecure ? 443 : 80));
    if (isSecure && !this.job.isInsecure) Connection.authorities ??= readAuthorities(this.job.authoritiesFile);
    const socket = await Bun.connect({
      hostname,
      port,
      allowHalfOpen: true, // the server's FIN must not stop us from sending, nor hide what it sent before
      socket: isSecure ? { data: (_, bytes) => this.records.take(bytes) } : this.handlers,
    }).catch(({ syscall, code, message }: SystemError) => {
      if (syscall === "getaddrinfo") throw new TransferError("resolve", `cannot resolve ${hostname}`);
      throw new TransferError("connect", `cannot connect to ${url.host}: ${code ?? message}`);
    });
    if (this.isClosed) return void socket.close(); // the step that waited for it has ended
    const address = socket.remoteAddress ?? hostname; // undefined once the server has left
    this.job.trace?.step("connect", `${address.replace(/.*:.*/, "[$&]")}:${port}`);
    if (isSecure) await this.startTls(socket, hostname);
  }

  private async startTls(socket: Bun.Socket, hostname: string): Promise<void> {
    // RFC 6066 §3: a name goes without the root's dot, an address not at all: then the certificate must name that.
    const serverName = /^[\d.]+$|:/.test(hostname) ? "" : hostname.replace(/\.$/, "");
    const tls = { serverName, ca: Connection.authorities ?? [], rejectUnauthorized: !this.job.isInsecure };
    const { promise, resolve, reject } = Promise.withResolvers<[isTrusted: boolean, error: Partial<SystemError>]>();
    const lost = new TransferError("tls", `the connection to ${hostname} was closed before there was TLS`);
    this.wake = () => this.end && reject(lost);
    const handshake = (_: unknown, isTrusted: boolean, error: SystemError | null) => resolve([isTrusted, error ?? {}]);
    const [encrypted] = socket.upgradeTLS({ tls, socket: { ...this.handlers, handshake } });
    this.stopWatching = () => encrypted.reload({ socket: { drain() {} } });
    const [isTrusted, { code = "", message }] = await promise;
    // The peer speaks no TLS, or not ours: this will not change. But a lost connection may be transient.
    if (/^(EPROTO|ECONN|ERR_SSL)/.test(code))
      throw new TransferError("tls", `no TLS with ${hostname}: ${message}`, { isFinal: !code.startsWith("ECONN") });
    if (!isTrusted && !this.job.isInsecure)
      throw new TransferError("certificate", `the certificate of ${hostname} is not trusted: ${message}`);
    this.job.trace?.step("TLS", `with ${hostname}`);
  }

  /** Sends all of it, or stops if the server answers before. @returns may more be sent? @throws TransferError */
  async send(bytes: Uint8Array): Promise<boolean> {
    // More has come than interim responses, which may come at any time (RFC 9110 §15.2).
    const isAnswered = () =>
      /^(?!HTTP\/1\.\d 1)[^]{10}|\nHTTP\/1\.\d [2-9]/.test(Buffer.concat(this.received).toString("latin1"));
    for (let sent = 0; sent < bytes.length && !isAnswered();) {
      const taken = this.socket?.write(bytes, sent, bytes.length - sent) ?? -1;
      if (taken < 0 && this.end) throw new TransferError("send", "the connection was lost while the request was sent");
      this.job.trace?.step("send", `${Math.max(0, taken)} of ${bytes.length - sent} B`);
      sent += Math.max(0, taken);
      // If the connection is lost, an answer may still be unread: its event comes before that of the loss.
      if (sent < bytes.length) await this.event();
      if (taken >= 0 && !isAnswered() && this.end instanceof TransferError) this.fail("reset", this.end);
    }
    return !isAnswered();
  }

  /** @returns the next bytes, which are the caller's, or undefined after the peer's end. @throws TransferError */
  async receive(): Promise<Uint8Array | undefined> {
    let bytes;
    while ((bytes = this.received.shift()) === undefined) {
      if (this.end instanceof TransferError) this.fail("reset", this.end);
      if (this.end?.outcome === "FIN") return void this.job.trace?.step("FIN", "received");
      this.socket?.resume();
      await this.event();
    }
    this.receivedBytes -= bytes.length;
    this.job.trace?.receive(bytes);
    return bytes;
  }

  private fail(event: string, failure: TransferError): never {
    this.job.trace?.step(failure.outcome === "timeout" ? "deadline" : event, failure.message);
    throw failure;
  }

  /** Sends a FIN. If bytes are unread, the kernel sends a reset instead. */
  close(): void {
    if (this.socket !== undefined) this.job.trace?.step("close", this.end?.outcome === "receive" ? "" : "FIN sent");
    this.isClosed = true;
    this.socket?.close();
  }

  /** Waits for the next event, but only as long as the peer may be silent. */
  private async event(): Promise<void> {
    this.job.trace?.flush();
    const { promise: event, resolve } = Promise.withResolvers<void>(); // its first call takes less than new Promise's
    this.wake = resolve;
    await within(this.job.stallMs, event, "no byte for").catch((late) => (this.end = late));
  }
}

/** The authorities to trust, as PEM. Bun checks them only once it is connected. @throws TransferError "authorities" */
function readAuthorities(file: string | undefined): string[] {
  if (file === undefined) return process.getBuiltinModule("node:tls").getCACertificates("system");
  const { X509Certificate } = process.getBuiltinModule("node:crypto");
  const pem = ignoreErrors(() => fs().readFileSync(file, "latin1")) ?? "";
  if (pem.includes("-----BEGIN") && ignoreErrors(() => new X509Certificate(pem)) !== undefined) return [pem];
  throw new TransferError("authorities", `cannot read a certificate in PEM from ${file}`);
}

/** Waits for a step, but only for `ms`, of which `leftMs` are left. @throws TransferError "timeout" */
async function within<T>(ms: number, step: T | Promise<T>, message: string, leftMs = ms, isFinal = false): Promise<T> {
  if (ms === Number.POSITIVE_INFINITY) return step;
  const { promise: late, reject } = Promise.withResolvers<never>();
  const fail = () => reject(new TransferError("timeout", `${message} ${ms / 1000} s`, { isFinal }));
  // If the process was stopped (Ctrl-Z, a frozen container), bytes may have come: they are read and written first.
  const dueAt = performance.now() + leftMs;
  const graceMs = () => Math.max(1, Math.min(LIMITS.lastWriteMs, performance.now() - dueAt)); // a timer may be early
  let timer = setTimeout(() => (timer = setTimeout(fail, graceMs())), leftMs);
  return Promise.race([step, late]).finally(() => clearTimeout(timer));
}

const nextTurn = () => new Promise(setImmediate); // lets timers and signals have a turn
/** Waits for a step until --max-time, and `moreMs` longer: whatever it waits for. @throws TransferError "timeout" */
const withinMaxTime = <T>(job: Options, step: T | Promise<T>, moreMs = 0): Promise<T> =>
  within(job.maxMs, step, "not done within", Math.max(0, job.maxMs - performance.now()) + moreMs, true);

// ── shared: trace ──
/** Prints a line for each step on a connection: its number, the time since it began, the step. TLS is decrypted. */
class Trace {
  private number = 0;
  private startedAt = 0;
  private received = ""; // the last receive, printed once it is known what it has completed
  private readonly completed = new Map<string, number>(); // how many heads; and content, complete or a part

  constructor(private readonly print: (line: string) => void) {}

  begin(number = this.number + 1): void {
    this.number = number;
    this.startedAt = performance.now();
  }

  /** `#1      0.4 ms  receive  43 B  "GET /data HTTP/1.1\r\nHost: localhost:8888"…  head` */
  step(event: string, details: string, print = this.print): void {
    this.flush();
    const ms = (performance.now() - this.startedAt).toFixed(1).padStart(8);
    print(`#${this.number} ${ms} ms  ${event.padEnd(8)} ${details}`.trimEnd());
  }

  receive(bytes: Uint8Array): void {
    const start = latin1(bytes, 0, Math.min(bytes.length, 40)); // so that a line fits into a terminal
    const text = start.replace(/[\r\n\t"\\]+/g, (found) => JSON.stringify(found).slice(1, -1));
    const details = `${bytes.length} B  "${text.replace(/[^ -~]/g, escaped)}"${start.length < bytes.length ? "…" : ""}`;
    this.step("receive", details, (line) => (this.received = line));
  }

  complete(what: "head" | "content" | "content complete"): void {
    if (what === "content complete") this.completed.delete("content");
    this.completed.set(what, what === "head" ? (this.completed.get(what) ?? 0) + 1 : 1);
  }

  flush(): void {
    const completed = Array.from(this.completed, ([what, times]) => (times > 1 ? `${what} (${times} times)` : what));
    if (this.received !== "") this.print(`${this.received}  ${completed.join(", ") || "nothing yet"}`);
    this.received = "";
    this.completed.clear();
  }
}
// ── end shared ──

const [ALERT, APPLICATION_DATA] = [21, 23];
const ALERT_RECORD_LENGTH = 19; // in TLS 1.3: level, description, inner type, and a tag of 16 bytes (RFC 8446 §5.2, §6)

/** Watches TLS records go by (RFC 8446 §5.1): was the last one an alert, as it is if the peer closes in order? */
export class RecordWatch {
  room = 0; // plaintext bytes that the records of the last read could hold; the caller subtracts those that came of them
  private type = ALERT; // of the last record; without TLS, each end is in order
  private length = 0; // of that record, without its header
  private seen = 0; // bytes of it, with its header; 0 again once it is whole

  /** Records, or pieces of them, before they are decrypted: a copy of their bytes, which is given back. */
  take(bytes: Uint8Array): void {
    this.room = 0;
    for (let at = 0, taken = 1; at < bytes.length; at += taken) {
      if (this.seen === 0) this.type = byteAt(bytes, at); // type, version (2), length (2): a read may end in between
      if (this.seen < 5) this.length = (this.length * 256 + byteAt(bytes, at)) % 65_536;
      taken = this.seen < 5 ? 1 : Math.min(5 + this.length - this.seen, bytes.length - at);
      this.seen += taken;
      if (this.seen < 5 + this.length) continue;
      if (this.type === APPLICATION_DATA) this.room += this.length - ALERT_RECORD_LENGTH + 2;
      this.seen = 0;
    }
    release(bytes);
  }

  /** The peer has announced its end. Without TLS its FIN does that; over TLS, anyone on the path can send one. */
  get endsInOrder(): boolean {
    // In TLS 1.3 an alert looks like content, but for its length and that no content came of it.
    const isAlert13 = this.type === APPLICATION_DATA && this.length === ALERT_RECORD_LENGTH && this.room > 0;
    return this.seen === 0 && (this.type === ALERT || isAlert13);
  }
}

// ═══ 10 Delivery ═══════════════════════════════════════════════════════════════════════════════

/** The content held across all attempts; checks its length and its digest. */
class Delivery {
  note = ""; // what the user should know about the content
  isVerified: boolean | undefined; // its SHA-256 is what the user or the server has said; undefined without new content
  private isFresh = false; // all the content held came in one response
  private hash: Bun.CryptoHasher | undefined;
  private told = ""; // the SHA-256 that the server has told for this version, in hex
  private at = Number.POSITIVE_INFINITY; // the place in the whole that the response under way has reached
  private end = Number.NaN; // the byte of the whole before which that response must end; NaN if nothing tells it
  private unprinted = ""; // the head: printed with the first content, when no other response can replace it

  constructor(
    readonly sink: Sink,
    private readonly job: Options,
    public held: Held = sink.leftover ?? NOTHING,
    private most = held.bytes, // ever held of this version: more is progress. Infinity: it has started over
  ) {}

  /** An attempt has ended. @param spoils what is held is deleted. @returns true if more is held than ever before */
  endAttempt(spoils: boolean): boolean {
    const { most, held } = this;
    this.most = most === Number.POSITIVE_INFINITY ? held.bytes : Math.max(most, held.bytes);
    this.at = Number.POSITIVE_INFINITY;
    if (spoils) this.sink.discard?.();
    if (spoils) this.held = NOTHING;
    return this.held.bytes > most;
  }

  start(head: ResponseHead, { held, from, end = held.total ?? Number.NaN }: Extract<Verdict, { from: number }>): void {
    this.isFresh = held.bytes === 0;
    if (this.isFresh && this.held.bytes > 0) this.most = Number.POSITIVE_INFINITY;
    this.held = held;
    this.at = from;
    this.end = end;
    // Repr-Digest is of the whole, in a 206, too (RFC 9530 §3, RFC 8941 §3.2). It holds for all responses of a version.
    const values = [204, 304].includes(head.status) ? [] : fieldValues(head, "repr-digest"); // these have no content
    const digest = /(?:^|,)[ \t]*sha-256=:([A-Za-z0-9+/]{43}=):/.exec(values.join())?.[1] ?? "";
    if (digest !== "" || this.isFresh) this.told = Uint8Array.fromBase64(digest).toHex();
    if (this.isFresh) this.hash = this.job.sha256 + this.told === "" ? undefined : new Bun.CryptoHasher("sha256");
    if (this.isFresh && !this.job.keepsOnlyContent) this.unprinted = head.text;
  }

  /** Prints the head, unless that is done. */
  async printHead(): Promise<void> {
    const head = this.unprinted;
    this.unprinted = "";
    if (head !== "") await this.sink.write(toBytes(head), this.held);
  }

  async write(bytes: Uint8Array): Promise<void> {
    const content = bytes.subarray(this.held.bytes - this.at); // what is held already is passed over
    this.at += bytes.length;
    const length = this.held.bytes + content.length;
    if (length > this.job.sizeMax) throw tooLarge(this.job);
    if (length > this.end) throw contradiction();
    if (content.length === 0) return;
    await this.printHead();
    await this.sink.write(content, this.held);
    this.hash?.update(content);
    this.held = { ...this.held, bytes: length };
  }

  /** The response has ended: is the content whole, and does it match the digests? @throws TransferError if not */
  async finish(head: ResponseHead): Promise<void> {
    const { job, held, told } = this;
    const { bytes, total = bytes, coding } = held;
    if (head.framing === "chunked" && bytes < this.end) throw contradiction(); // what a close ends may have been cut
    const cut = `the response is not complete: ${bytes - this.at} of ${bytes} bytes held are missing`;
    if (this.at < bytes) throw new TransferError("partial", cut);
    const part = `the response is a part: ${bytes} of ${total} bytes are here`;
    if (bytes !== total) throw new TransferError("partial", part, { isPart: bytes === this.end });
    const wanted = job.request.method === "HEAD" ? "" : job.sha256 || told; // "" if any will do
    const found = wanted && (this.hash?.digest("hex") ?? (await this.sink.digest?.(held)));
    const message = "the first part of the content is not at hand to be verified";
    if (found === undefined) throw new TransferError("digest", message, { isFinal: true });
    // Another attempt helps if pieces were joined that do not fit, or if the server says that bytes were damaged.
    const isFinal = found === told || (told === "" && this.isFresh);
    const mismatch = `the content is not what its digest says: its SHA-256 is ${found}`;
    if (found !== wanted) throw new TransferError("digest", mismatch, { isFinal, spoils: true });
    if (head.status !== 304) this.isVerified = wanted !== "";
    await this.printHead();
    // Encoded content is saved as it is, although we asked for no coding: a mirror sends its a.tar.gz so.
    const encoded = coding && `The content is saved as it comes, with Content-Encoding: ${coding}`;
    this.note = (await this.sink.finish?.(held)) || (job.keepsOnlyContent && bytes > 0 ? encoded : "");
  }
}

// ═══ 11 Sinks ══════════════════════════════════════════════════════════════════════════════════

// Loaded when needed: node:fs takes a fifth of a small transfer's time, getBuiltinModule more. `require` has no types.
const fs = (): typeof import("node:fs") => require("node:fs");
const paths = (): typeof import("node:path") => require("node:path");
const tty = (): typeof import("node:tty") => require("node:tty");

const statOf = (path: string) => ignoreErrors(() => fs().lstatSync(path)); // undefined if it cannot be reached
const canUse = (path: string, mode: number) => ignoreErrors(() => (fs().accessSync(path, mode), true)) ?? false;

/** For a step that may block for any time: another thread takes it, and deadlines go on here. */
const inThread = <T>(step: (done: (error: Error | null, value: T) => void) => void) =>
  new Promise<T>((resolve, reject) => step((error, value) => (error ? reject(error) : resolve(value))));

/** Writes all of it: in a thread, which takes longer, if it may block; after the last write if `position` is null. */
async function writeAll(fd: number, bytes: Uint8Array, mayBlock: boolean, position: number | null): Promise<void> {
  for (let written = 0; written < bytes.length;) {
    const [length, at] = [bytes.length - written, position === null ? null : position + written];
    try {
      written += mayBlock
        ? await inThread<number>((done) => fs().write(fd, bytes, written, length, at, done))
        : fs().writeSync(fd, bytes, written, length, at);
    } catch (error) {
      if ((error as SystemError).code !== "EAGAIN") throw error; // node:fs throws SystemErrors
      await Bun.sleep(LIMITS.writeRetryMs);
    }
  }
}

/** On Linux, the devices of major number 1 are /dev/null, /dev/full and their like: node:tty is not loaded for them. */
const isTerminal = (fd: number, found: Stats) => found.isCharacterDevice() && found.rdev >> 8 !== 1 && tty().isatty(fd);

/** Pipes, devices and terminals: output cannot be taken back. Without -o, it has the head, and a terminal safe text. */
async function openStream(fd: number, job: Options): Promise<Sink> {
  // Bun says at once whether it is a file or a FIFO, and how long a file is. stat() starts Bun's threads.
  const device = (await Bun.file(fd).exists()) ? undefined : await Bun.file(fd).stat(); // or a socket
  const isFifo = device === undefined && Bun.file(fd).size === Number.POSITIVE_INFINITY;
  // If stdout was closed (`>&-`), Bun has opened /dev/null: all would be lost. No inherited descriptor has O_CLOEXEC.
  const [isSuspect, fdinfo] = [fd === 1 && device?.isCharacterDevice(), Bun.file("/proc/self/fdinfo/1")];
  if (isSuspect && /^flags:\s*\d*[2367]\d{6}$/m.test(await fdinfo.text().catch(() => "")))
    throw new TransferError("write", "stdout is closed");
  const isOnTerminal = device !== undefined && isTerminal(fd, device);
  const mayBlock = isOnTerminal || isFifo || device?.isCharacterDevice() === false;
  // Bun.write needs no module: it prints the first bytes. But if a non-blocking descriptor takes a part, it writes that
  // part again, and if a pipe is full, it blocks and no timer can end it. Once node:fs is loaded, it is faster.
  let left = !mayBlock || (isFifo && job.maxMs === Number.POSITIVE_INFINITY) ? LIMITS.printedBytesMax : 0;
  const decoder = isOnTerminal && !job.keepsOnlyContent ? new TextDecoder() : undefined;

  return {
    isTerminal: isOnTerminal,
    async write(content) {
      if (decoder && content.includes(0))
        throw new TransferError("write", "the content is binary: use -o FILE, or -o - to see it here");
      const bytes = decoder ? Buffer.from(printable(decoder.decode(content, { stream: true }))) : content;
      left -= bytes.length;
      await (left < 0 ? writeAll(fd, bytes, mayBlock, null) : Bun.write(Bun.file(fd), bytes));
      if (isOnTerminal) lineEnd = content.at(-1) === LF ? "" : "\n";
    },
  };
}

/** A part beside FILE. All but its length is in its label, a file that is written once, before the first byte of it. */
interface Part extends Held {
  readonly path: string; // FILE.0123456789ab.part, which has the label FILE.0123456789ab.part.json
  readonly file: string; // the name of FILE; that of a part has only the start of it
  readonly request: string; // --sha256, which joins any pieces, or else URL and fields; of what may be a secret, a digest
  readonly labelledAt: number; // milliseconds since 1970: it tells which version was seen last
}
type OpenPart = Part & { readonly fd: number };

/** The name of a part of FILE, up to its random end: short, as names have at most 255 bytes, on some systems fewer. */
const stemOf = (file: string) =>
  Buffer.from(paths().basename(file)).subarray(0, 100).toString().replaceAll("\ufffd", "");

/** The parts of this very FILE, which is `target`. `bytes` is 0 if there is only a label, or if a part is not ours. */
function* findParts(target: string): Generator<Part> {
  const { R_OK, W_OK } = fs().constants;
  const [folder, file, stem] = [paths().dirname(target), paths().basename(target), stemOf(target)];
  // If others may write to the folder, a part of theirs is not to be trusted; nor is a link. The folder's owner could
  // replace FILE itself, and owns the parts on disks that are mounted for another user.
  const owners = [process.geteuid?.(), ignoreErrors(() => fs().statSync(folder).uid)];
  for (const name of ignoreErrors(() => fs().readdirSync(folder)) ?? []) {
    if (!name.startsWith(stem) || !/^\.[0-9a-f]{12}\.part\.json$/.test(name.slice(stem.length))) continue;
    const path = paths().join(folder, name.slice(0, -".json".length));
    const [label, part] = [statOf(`${path}.json`), statOf(path)];
    if (!label?.isFile() || label.size > LIMITS.headBytesMax) continue;
    const isOurs = part?.nlink === 1 && part.isFile() && owners.includes(part.uid) && canUse(path, R_OK | W_OK);
    const found = ignoreErrors(() => readLabel(path, file, isOurs ? part.size : 0));
    if (found?.file === file) yield { ...found, labelledAt: label.mtimeMs };
  }
}

function readLabel(path: string, file: string, bytes: number): Part {
  const text = fs().readFileSync(`${path}.json`, "utf8");
  // A value that is no string becomes "?", which fits nothing. A label is empty if its run was killed before writing it.
  const revive = (key: string, value: unknown) => (typeof value === "string" || /^(total)?$/.test(key) ? value : "?");
  const part: Part = { ...NOTHING, ...(text === "" ? { file } : JSON.parse(text, revive)), path, bytes };
  return STRONG_ETAG.test(part.validator) || parseHttpDate(part.validator) ? part : { ...part, validator: "" };
}

const removePart = (path: string) => ["", ".json"].forEach((end) => ignoreErrors(() => fs().unlinkSync(path + end)));
const takenOver = (path: string) =>
  new TransferError("write", `${path} is gone: another run has taken it over, or something has removed it`);
const changed = (path: string) => new TransferError("write", `${path} has been changed by something else`);

/**
 * Saves the content: it grows in a part beside FILE, which is renamed to FILE when it is whole, verified and synced.
 * One inode holds bytes of one version: a part has a random name and only grows; starting over makes a new part. A run
 * that continues an older part first renames it to a name of its own, which only one run can do. So there is no lock,
 * and nothing is updated in place. A crash between any two calls leaves a part that can be continued, or only a label.
 */
class FileSink implements Sink {
  private readonly folder: string; // of the part
  private readonly request: string; // for the label; "" if the content cannot be continued
  private readonly older: readonly Part[]; // of earlier runs
  readonly leftover: Part | undefined; // the one of them that is continued
  private part: OpenPart | undefined; // that this run writes

  constructor(
    private readonly path: string,
    private readonly job: Options,
  ) {
    const [folder, { method, url, fields, content }] = [paths().dirname(path), job.request];
    const isBeside = canUse(folder, fs().constants.W_OK | fs().constants.X_OK);
    this.folder = isBeside ? folder : process.getBuiltinModule("node:os").tmpdir();
    // Only the content of a GET can be continued (RFC 9110 §14.2), and only beside FILE would a later run look for it.
    const canContinue = isBeside && method === "GET" && content.length === 0;
    this.request = canContinue ? url.origin + resourceOf(url) + digestOf(fields.join("\n")) : "";
    this.older = [...findParts(path)].sort((a, b) => b.labelledAt - a.labelledAt);
    // Of the version that was seen last, the longest part is worth most.
    const usable = this.older.filter((part) => this.canContinue(part));
    const isOfLast = (part: Part) => part.validator === usable[0]?.validator && part.resource === usable[0].resource;
    [this.leftover] = usable.filter(isOfLast).sort((a, b) => b.bytes - a.bytes);
  }

  async write(content: Uint8Array, held: Held): Promise<void> {
    const { fd } = await this.ready(held);
    await writeAll(fd, content, false, held.bytes);
    // The disk begins now: all of it at the end would take as long again. If this fails, the sync at the end will, too.
    if ((held.bytes % LIMITS.syncEveryBytes) + content.length >= LIMITS.syncEveryBytes) fs().fdatasync(fd, () => {});
  }

  digest = async (held: Held) => sha256HexOf(Bun.file((await this.ready(held)).fd));

  async finish(held: Held): Promise<string> {
    const { path, fd } = await this.ready(held);
    if (fs().fstatSync(fd).size !== held.bytes) throw changed(path);
    const old = fs().statSync(this.path, { throwIfNoEntry: false }); // meanwhile its mode or kind may have changed
    const file = followLinks(this.path);
    if (old?.isFile() === false) throw changed(file);
    if (old !== undefined) keepOwnerAndMode(fd, old);
    sync(fd);
    const note = await replaceFile(file, path, fd, old !== undefined);
    const time = this.job.keepsTime ? parseHttpDate(held.lastModified) : Number.NaN;
    if (time >= 0) ignoreErrors(() => fs().utimesSync(file, Date.now() / 1000, time / 1000));
    this.discard();
    for (const { path } of this.older) removePart(path);
    return note;
  }

  discard(): void {
    if (this.part === undefined) return;
    removePart(this.part.path);
    fs().closeSync(this.part.fd);
    this.part = undefined;
  }

  /** Keeps a part that a later run can continue, and nothing else. Bytes of a piece that a full disk cut off count, too. */
  close(held: Held): string {
    if (this.part === undefined) return "";
    const { path, fd } = this.part; // nothing is opened: that may fail, and tell nothing
    const { ino, nlink, size: bytes = 0 } = ignoreErrors(() => fs().fstatSync(fd)) ?? {};
    const isThere = statOf(path)?.ino === ino && nlink === 1 && statOf(`${path}.json`) !== undefined;
    if (isThere && this.canContinue({ ...this.part, bytes }) && bytes >= held.bytes)
      return `Kept ${bytes} bytes in ${path}: the same command continues from there`;
    this.discard();
    return "";
  }

  /** May this run continue the part? The same digest is the same content, whatever the request was. */
  private canContinue({ request, validator, bytes, total = bytes }: Part): boolean {
    const isWanted = request !== "" && this.request !== "" && [this.request, this.job.sha256].includes(request);
    return isWanted && validator + this.job.sha256 !== "" && bytes > 0 && Number.isInteger(total) && bytes <= total;
  }

  /** The part that has the bytes held, or a new one. @throws TransferError if something else has changed it */
  private async ready(held: Held, leftMs = this.job.stallMs): Promise<OpenPart> {
    const part = held.bytes === 0 ? this.begin(held) : (this.part ?? this.begin(held, this.leftover));
    const { ino, size, mtimeMs } = fs().fstatSync(part.fd);
    if (size < held.bytes) throw changed(part.path);
    if (statOf(part.path)?.ino === ino) return part;
    // Another run has taken it over. A run that writes no more has died. With --sha256 it may have joined other bytes.
    await Bun.sleep(LIMITS.idlePartMs);
    const isIdle = fs().fstatSync(part.fd).mtimeMs === mtimeMs;
    const isSame = (other: Part) => statOf(other.path)?.ino === ino && this.canContinue(other);
    const found = isIdle && this.job.sha256 === "" ? findParts(this.path).find(isSame) : undefined;
    if (found !== undefined) this.begin(held, found);
    else if (isIdle || leftMs <= LIMITS.idlePartMs) throw takenOver(part.path);
    return this.ready(held, leftMs - LIMITS.idlePartMs);
  }

  /** Gives a part a name of its own, after its label. A new one is as private as FILE from its first byte on. */
  private begin(held: Held, leftover?: Part): OpenPart {
    const path = paths().join(this.folder, `${stemOf(this.path)}.${crypto.randomUUID().slice(-12)}.part`);
    const [request, validator] = this.job.sha256 === "" ? [this.request, held.validator] : [this.job.sha256, ""];
    const part = { ...held, path, file: paths().basename(this.path), request, validator, labelledAt: Date.now() };
    const flags = leftover === undefined ? "wx+" : fs().constants.O_RDWR | fs().constants.O_NOFOLLOW;
    try {
      fs().writeFileSync(`${path}.json`, JSON.stringify(part), { flag: "wx", mode: 0o600 });
      const mode = 0o600 | (forAnyGroup(fs().statSync(this.path, { throwIfNoEntry: false })?.mode ?? 0o666) & 0o066);
      const fd = fs().openSync(leftover?.path ?? path, flags, mode);
      if (leftover !== undefined) fs().renameSync(leftover.path, path);
      if (leftover !== undefined) removePart(leftover.path);
      this.discard();
      return (this.part = { ...part, fd });
    } catch (error) {
      removePart(path);
      throw leftover !== undefined && statOf(leftover.path) === undefined ? takenOver(leftover.path) : error;
    }
  }
}

/** Puts a part in the place of FILE. @returns what the user should know, or "" */
async function replaceFile(file: string, part: string, fd: number, exists: boolean): Promise<string> {
  try {
    fs().renameSync(part, file);
    return "";
  } catch (error) {
    const { code = "" } = error as SystemError; // node:fs throws SystemErrors
    // A mount point, a folder in which nothing may be renamed, a part on another disk, a disk that replaces no file.
    if (!exists || !/^(EBUSY|EXDEV|EPERM|EACCES|EROFS|EEXIST|ENOSYS|ENOTSUP|EOPNOTSUPP)$/.test(code)) throw error;
    // Nothing below waits for an event: a signal or a deadline comes before the first byte is changed, or after the last.
    const target = fs().openSync(file, fs().constants.O_WRONLY); // closed by the end of the process, which comes next
    const { size } = fs().fstatSync(target); // the bytes beyond it come first: is there room for them?
    await copy(fd, target, size).catch((error) => {
      fs().ftruncateSync(target, size);
      throw error;
    });
    fs().ftruncateSync(target, fs().fstatSync(fd).size);
    await copy(fd, target, 0);
    return `${file} was overwritten in place, since it cannot be replaced (${code})`;
  }
}

/** The mode if the group is another one: that may do no more than all others. */
const forAnyGroup = (mode: number) => (mode & 0o707) | (mode & (mode << 3) & 0o070);

/** FILE keeps owner, group and mode if possible: only root may give files away, and some disks know no modes. */
function keepOwnerAndMode(fd: number, { mode, uid, gid }: Stats): void {
  ignoreErrors(() => fs().fchownSync(fd, -1, gid)); // as a member of the group may
  ignoreErrors(() => fs().fchownSync(fd, uid, -1));
  const now = fs().fstatSync(fd);
  const bits = now.uid === uid ? 0o7777 : 0o777; // not set-user-ID for another owner
  ignoreErrors(() => fs().fchmodSync(fd, bits & (now.gid === gid ? mode : forAnyGroup(mode))));
}

/** @returns undefined if FILE has the SHA-256 already */
async function openSink(job: Options): Promise<Sink | undefined> {
  const { output = "-", sha256 } = job;
  if (output === "-") return openStream(1, job);
  const { O_WRONLY, O_APPEND, W_OK, X_OK } = fs().constants;
  const old = fs().statSync(output, { throwIfNoEntry: false }); // the kernel may refuse links of other users
  const path = followLinks(output);
  // A descriptor that is open already, and anything but a regular file, is written to and never replaced.
  const [, owner, descriptor] = /^\/proc\/(self|\d+)\/fd\/(\d+)$/.exec(path) ?? [];
  if (owner === "self") return openStream(Number(descriptor), job);
  if (old?.isFile() === false || owner !== undefined || path.endsWith("/"))
    return openStream(await inThread<number>((done) => fs().open(path, O_WRONLY | O_APPEND, done)), job);
  fs().accessSync(old === undefined ? paths().dirname(path) : path, old === undefined ? W_OK | X_OK : W_OK);
  const isDone = sha256 !== "" && (await sha256HexOf(Bun.file(paths().resolve(path))).catch(() => "")) === sha256;
  return isDone ? undefined : new FileSink(path, job);
}

/** Where a path leads in the end, whether that exists or not. /dev/stdout leads to /proc/self/fd/1. */
function followLinks(path: string, linksMax = 40): string {
  if (linksMax === 0 || !statOf(path)?.isSymbolicLink()) return path;
  const { basename, dirname, join, resolve } = paths();
  const folder = fs().realpathSync(dirname(path));
  if (/^\/proc\/\d+\/fd$/.test(folder)) return join(folder.replace(`/${process.pid}/`, "/self/"), basename(path));
  return followLinks(resolve(folder, fs().readlinkSync(path)), linksMax - 1);
}

/** Copies all that follows a byte to the same place in another file, and onto its disk. */
async function copy(source: number, target: number, from: number): Promise<void> {
  const buffer = new Uint8Array(1_048_576);
  for (let at = from, length = 0; (length = fs().readSync(source, buffer, 0, buffer.length, at)) > 0; at += length)
    await writeAll(target, buffer.subarray(0, length), false, at);
  sync(target);
}

/** Waits until a file is on its disk. Some network disks have no such call. */
function sync(fd: number): void {
  try {
    fs().fsyncSync(fd);
  } catch (error) {
    if (!/^(EINVAL|ENOSYS|ENOTSUP|EOPNOTSUPP)$/.test((error as SystemError).code ?? "")) throw error; // of node:fs
  }
}

async function sha256HexOf(file: Blob): Promise<string> {
  const hash = new Bun.CryptoHasher("sha256");
  for await (const piece of file.stream()) {
    hash.update(piece);
    await nextTurn();
  }
  return hash.digest("hex");
}

// ═══ 12 Command line ═══════════════════════════════════════════════════════════════════════════

export const HELP = `Usage: client-robust [options] [URL]
Gets URL, by default ${DEFAULT_URL}, and prints the whole response.

  -X, --request METHOD     another method than GET
  -H, --header LINE        a field-line to send, as "Name: value"; "Name:" removes that field
  -d, --data DATA          content to send, by POST; @FILE is that of a file, @- of stdin
  -I, --head               ask for the head alone
  -L, --location           follow redirects, ${LIMITS.redirectsMax} at the most
  -o, --output FILE        save the content, and nothing else, to FILE (- is stdout)
  -O, --remote-name        the same, to the last segment of the URL's path
  -R, --remote-time        FILE gets the time of Last-Modified
  -z, --time-cond FILE     only if the content has changed since FILE was
      --retry N            retries in a row without new data (${LIMITS.retriesMax})
      --retry-delay S      seconds before each (1, 2, 4 … 60, half of it random)
      --retry-max-time S   seconds after which no retry begins (no limit)
      --connect-timeout S  seconds until connected (${LIMITS.connectTimeoutMs / 1000})
      --stall-timeout S    seconds without a byte (${LIMITS.stallTimeoutMs / 1000})
      --max-time S         seconds for everything (no limit)
      --max-size BYTES     of the content (no limit)
      --sha256 HEX         the SHA-256 that the content must have
      --cacert FILE        trust these authorities (PEM) instead of the system's
  -k, --insecure           do not verify the certificate
  -s, --silent             print nothing on stderr but errors
  -v, --verbose            print the heads that are sent and received, and a summary, on stderr
      --trace              show each step on the connection, on stderr
  -f, --fail               accepted: what it means in curl is done anyway
  -S, --show-error         accepted: the same
  -h, --help               print this text
  -V, --version            print the version

FILE is never partial: it is untouched until the download is complete. A transfer that breaks
off leaves a part beside FILE, from which the same command continues. Proxies from the
environment are not used, and a URL takes no user name. Exit codes are curl's: 0 done (304,
too), 2 usage, 3 URL, 6 cannot resolve, 7 cannot connect, 8 malformed or not HTTP, 18 partial,
22 status (400 and above; with -o also one without the content), 23 cannot write, 28 timeout,
33 range, 35 TLS, 47 redirects, 52 no answer, 55 cannot send, 56 cannot receive,
60 certificate, 63 too large, 77 --cacert; and 29 wrong digest, 1 fault of this program.
`;

/** Checks what the user typed. @throws TransferError "usage" */
function check(isRight: boolean, message: string): asserts isRight {
  if (!isRight) throw new TransferError("usage", `${message} (see client-robust --help)`);
}

/** Finds a flag's line in the help text. @returns that line; its letter, its name, and its value's name if it takes one */
function definitionOf(typed: string): readonly (string | undefined)[] {
  // To load parseArgs would take a tenth of a small transfer's time, and find 0.2 ms for its first call.
  for (const names of HELP.matchAll(/^ +(?:(-\w), |)(--[\w-]+)( [A-Z]+)? {2}/gm))
    if (names.includes(typed)) return names;
  return [];
}

/** Reads flags as getopt_long does, and uses `rest` up. @returns the values of each; under "", of what is no flag */
function parseFlags(rest: string[]): Map<string, string[]> {
  const values = new Map<string, string[]>();
  for (let arg; (arg = rest.shift()) !== undefined;) {
    const [, long, longValue, typed = long, following] = /^(?:(--[^=]*)(?:=(.*))?|(-.)(.+)?)$/s.exec(arg) ?? [];
    if (typed === undefined || arg === "--") {
      values.getOrInsert("", []).push(...(typed === undefined ? [arg] : rest.splice(0)));
      continue;
    }
    const [, , flag, metavariable] = definitionOf(typed);
    check(flag !== undefined, `no such option: ${typed}`);
    const takesValue = metavariable !== undefined;
    if (!takesValue && following !== undefined) rest.unshift(`-${following}`);
    // A value that looks like a flag is more often a value that was forgotten; --name=value takes any.
    const next = () => (/^-./.test(rest[0] ?? "-?") ? undefined : rest.shift());
    const value = takesValue ? (longValue ?? following ?? next()) : longValue;
    check(takesValue === (value !== undefined), `${flag} takes ${takesValue ? "a" : "no"} value`);
    values.getOrInsert(flag.slice(2), []).push(value ?? "");
  }
  return values;
}

/** @throws TransferError "usage" or "url" */
export function parseCommandLine(args: readonly string[]) {
  const values = parseFlags([...args]);
  const all = (flag: string) => values.get(flag) ?? [];
  const last = (flag: string, form = /^/, takes = "") => {
    const [value] = all(flag).slice(-1); // at, map and their like take 40 to 90 µs at their first call
    check(value === undefined || form.test(value), `--${flag} takes ${takes}, not ${JSON.stringify(value)}`);
    return value;
  };
  const count = (flag: string, absent: number) => Number(last(flag, /^\d{1,15}$/, "a number") ?? absent);
  const seconds = /^(?=.*[1-9])0*(1?\d{0,6}(\.\d+)?|2000000(\.0+)?)$/; // more than 2^31 ms would fire at once
  const milliseconds = <T>(flag: string, absent: T) =>
    values.has(flag) ? 1000 * Number(last(flag, seconds, "seconds, from above 0 to 2000000")) : absent;
  const [text = DEFAULT_URL, extra] = all("");
  check(extra === undefined, `one argument too many: ${JSON.stringify(extra)}`);
  const url = parseUrl(text);
  const [isHead, isRemoteName, data] = [values.has("head"), values.has("remote-name"), all("data")];
  check(!isRemoteName || !values.has("output"), "--remote-name goes with no --output");
  const output = isRemoteName ? remoteName(text, url) : last("output", /./s, "a file or -");
  check(!output?.includes("\ufffd"), "--output takes a name in UTF-8"); // others come to us as another name
  check(!isHead || (output === undefined && data.length === 0), "--head goes with neither --output nor --data");
  const method = last("request") ?? (isHead ? "HEAD" : data.length > 0 ? "POST" : "GET");
  check(method !== "CONNECT" && new RegExp(`^${TOKEN}$`).test(method), `--request takes no ${JSON.stringify(method)}`);
  check(!isHead || method === "HEAD", "--head asks with HEAD, and --request with another method");
  const sha256 = last("sha256", /^[0-9a-f]{64}$/i, "64 hexadecimal digits")?.toLowerCase() ?? "";
  const timeFile = last("time-cond"); // it may be missing, as in a mirror's first run: then no condition is sent
  const since = timeFile === undefined ? undefined : ignoreErrors(() => fs().statSync(timeFile).mtime);
  if (timeFile !== undefined && since === undefined && timeFile !== output && !values.has("silent"))
    tell(`No condition is sent: there is no file ${timeFile}`);
  const fields: [name: string, value: string][] = [];
  for (const line of all("header")) fields.push(parseField(line));
  if (since !== undefined) fields.push(["If-Modified-Since", since.toUTCString()]); // RFC 9110 §13.1.3
  const request: Request = { method, url, fields, content: [] };
  return {
    show: values.has("help") ? HELP : values.has("version") ? `client-robust ${VERSION}\n` : "", // and do nothing else
    request,
    data: data.length > 1 ? data.flatMap((item) => ["&", item]).slice(1) : data, // joined, as in forms
    output, // undefined: print the whole response
    keepsOnlyContent: output !== undefined, // the page of an error or of a redirect must not pass for content
    sha256, // that the content must have, in lower-case hex; "" if any will do
    hasSha256: sha256 !== "" && method === "GET", // at the end: pieces may be joined whatever their validators say
    followsRedirects: values.has("location"),
    // The user has sent a condition: a 304 is an answer even to a request for the rest.
    isConditional: /^if-(modified-since|none-match),/im.test(fields.join("\n")),
    sinceMs: since?.getTime(), // content that is not newer is not wanted
    retries: count("retry", LIMITS.retriesMax),
    retryDelayMs: milliseconds("retry-delay", undefined), // before each; undefined for a wait that grows
    retryMaxMs: milliseconds("retry-max-time", Number.POSITIVE_INFINITY),
    sizeMax: count("max-size", Number.POSITIVE_INFINITY),
    connectMs: milliseconds("connect-timeout", LIMITS.connectTimeoutMs),
    stallMs: milliseconds("stall-timeout", LIMITS.stallTimeoutMs),
    maxMs: milliseconds("max-time", Number.POSITIVE_INFINITY), // for everything, from the start of the process on
    authoritiesFile: last("cacert"), // certificates in PEM that are trusted instead of the system's
    isInsecure: values.has("insecure"), // certificates are not verified
    keepsTime: values.has("remote-time"), // FILE gets the time of Last-Modified
    isSilent: values.has("silent"),
    isVerbose: values.has("verbose"),
    trace: values.has("trace") ? new Trace(tell) : undefined,
  };
}

/** As in curl, the last segment of the path as it was typed. */
function remoteName(text: string, url: URL): string {
  const name = text.replace(/[?#].*/s, "").replace(/.*\//s, "");
  const isName = !url.pathname.endsWith("/") && !/^\.{0,2}$|[\\\0]/.test(name);
  check(isName, `--remote-name finds no name of a file in ${JSON.stringify(text)}`);
  return name === "-" ? "./-" : name;
}

/** @returns name and value; an empty value means that no such field is to be sent */
function parseField(line: string): [name: string, value: string] {
  const bytes = Buffer.from(line).toString("latin1");
  const name = FIELD_LINE.exec(bytes)?.[1];
  check(name !== undefined, `--header takes "Name: value", not ${JSON.stringify(line)}`);
  // Only the program itself sets the fields that frame the message, or say which part is asked for.
  check(!/^(connection|content-length|if-range|range|transfer-encoding)$/i.test(name), `--header cannot set ${name}`);
  return [name, trimOws(bytes.slice(name.length + 1))];
}

/** As in curl, "http://" may be left out. @throws TransferError "url" */
export function parseUrl(text: string): URL {
  const withScheme = /^[a-z][a-z0-9+.-]*:\/\//i.test(text) ? text : `http://${text}`;
  // URL.parse drops tabs and line ends, and encodes spaces: the result would not be what the user asked for.
  const url = /[\0-\x20\x7f]/.test(text) ? null : URL.parse(withScheme);
  if (url === null) throw new TransferError("url", `not a URL: ${JSON.stringify(text)}`);
  if (!isSpoken(url)) throw new TransferError("url", `only http:// and https:// are spoken, not ${url.protocol}//`);
  if (url.username + url.password !== "") throw new TransferError("url", "a URL with a user name is not supported");
  return url;
}

/** Content to send. A file is read while it is sent. A pipe can be read only once, and is held in memory. */
async function readData(data: string): Promise<Blob> {
  if (!data.startsWith("@")) return new Blob([data]);
  const path = data.slice(1);
  try {
    const found = path === "-" ? undefined : fs().statSync(path);
    if (found?.isFile() && found.size > 0) return Bun.file(paths().resolve(path)).slice(0, found.size); // /proc tells no size
    const pieces: Uint8Array<ArrayBuffer>[] = []; // of a device, too, which Bun.file cannot read
    let left = LIMITS.heldDataBytesMax;
    for await (const piece of found === undefined ? Bun.stdin.stream() : fs().createReadStream(path)) {
      pieces.push(piece);
      left -= piece.length;
      if (left < 0) throw new Error(`a pipe may have ${formatBytes(LIMITS.heldDataBytesMax)}, a file (@FILE) any size`);
    }
    return new Blob(pieces);
  } catch (error) {
    const { code, message } = error as SystemError; // of node:fs, Bun or ours
    throw check(false, `cannot read the data: ${code ?? message}`);
  }
}

if (import.meta.main) process.exit(await download(process.argv.slice(2)));
