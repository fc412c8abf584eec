#!/usr/bin/env bun
/**
 * server.ts: stage 1, an HTTP/1.1 server written by hand on a TCP socket.
 *
 *     bun server.ts                        # listens on http://localhost:8888
 *     bun server.ts --root .               # the same, but serves the files below this folder
 *     curl -v http://localhost:8888/data   # in a second terminal
 *
 * It prints each request and answers `Hello, World!`. The tutorial's sketch takes one receive for one request. Here the
 * bytes may come one at a time or a hundred requests at once, and what breaks a rule of RFC 9112 is refused. Left out:
 * uploads, compression, virtual hosts, HTTP/2. It is no reverse proxy.
 *
 * Read it from top to bottom: `serve`, in section 3, is the tutorial's loop, and what follows is what the loop calls, in
 * the order in which a request meets it. Section 11, Files, is for `--root` alone: a reader can stop before it. To give
 * answers of your own, copy this file and change `respond`, in section 7.
 */
import { isUtf8 } from "node:buffer";
import * as fs from "node:fs";
import { isIPv6 } from "node:net";
import { dirname, join, resolve, sep } from "node:path";
import { parseArgs, type ParseArgsConfig } from "node:util";

export const VERSION = "0.1.0";

// ═══ 1 Limits ════════════════════════════════════════════════════════════════════════════════════

/** The limits that an operator may want to change: default, meaning for `--help`, and the reason for the number. */
const BOUNDS = {
  /** Ten thousand idle peers must leave room for others. Each costs 1 to 2 KiB here, and some more in the kernel. */
  connectionsMax: [16_384, "connections at once, lowered to what ulimit -n allows; above it: 503"],
  headBytesMax: [32_768, "bytes of a request head, and of a trailer section"], // As nginx: 4 buffers of 8 KiB.
  requestTargetBytesMax: [8000, "bytes of a request-target"], // RFC 9112 §3: at least 8,000. Browsers send less.
  fieldLinesMax: [100, "field-lines of a head, and of a trailer section"], // Proxy chains send 50; Apache allows 100.
  contentBytesMax: [1_048_576, "bytes of a request's content"], // Text mode only drops it. nginx has the same default.
  /** RFC 9112 §7.1.1 asks for a limit on the total in a message. Hardly anyone sends any. */
  chunkExtensionBytesMax: [4096, "chunk-extension bytes allowed beyond the size of the content"],
  /** One read may bring 512 KiB, and each peer that does not read can leave that much buffered. */
  waitingBytesMax: [268_435_456, "bytes buffered for all peers together; a peer that exceeds it is disconnected"],
  /** For a whole head, not for each byte, so that sending it slowly gains nothing ("slowloris"). */
  headTimeoutMs: [10_000, "ms for a whole request head, and until the first byte of a connection"],
  idleTimeoutMs: [60_000, "ms between two requests"], // Browsers reuse a connection for about 15 s.
  /** Each interval must deliver 5,000 bytes or complete the content: with the default, 500 bytes a second. */
  contentTimeoutMs: [10_000, "ms in which 5000 more bytes of the content, or its end, must arrive"],
  writeTimeoutMs: [30_000, "ms in which a peer must take some of its answer"], // One that takes none has gone.
  graceMs: [10_000, "ms for requests in flight when told to stop"], // By SIGTERM or SIGINT. A second one ends them.
} as const satisfies Record<string, readonly [value: number, meaning: string]>;

export type Limits = Readonly<Record<keyof typeof BOUNDS, number>>;
const LIMIT_NAMES = Object.keys(BOUNDS) as (keyof Limits)[]; // Neither Object.keys nor fromEntries keeps the type.
export const LIMITS = Object.freeze(Object.fromEntries(LIMIT_NAMES.map((name) => [name, BOUNDS[name][0]])) as Limits);

const REFUSED_CONNECTIONS_MAX = 256; // Connections above the limit that get a 503. More are dropped: it is a flood.
const EMPTY_LINES_MAX = 4; // RFC 9112 §2.2: "at least one" before a request is skipped. Old clients send one.
const LONG_HEAD_BYTES = 1024; // A longer head is parsed again only now and then: see readHead.
const CONTENT_PART_BYTES_MIN = 5000; // The least that must arrive within each content timeout.
const UNSENT_BYTES_MAX = 65_536; // Answers to pipelined requests are buffered up to this, then written.
const LINGER_BYTES_MAX = 1_073_741_824; // Read and dropped after the last answer: a refused upload can come to its end.
const LINGER_TIMEOUT_MS = 5000; // For this long at most without a byte, ...
const LINGER_MS_MAX = 30_000; // ... and in all. Both as nginx.
const SWEEP_MS = 250; // How often deadlines are checked: one sweep costs less than a timer for each connection.
const STOP_IDLE_MS = 250; // On a stop, an idle connection stays open this long: a request may be on its way.
const LOGGED_BYTES_MAX = 1024; // The request log shows so much content at most, as the tutorial's `recv(1024)` does.
const LOG_BACKLOG_CHARS_MAX = 1_048_576; // Log text for a slow reader of stdout. More is dropped and counted.
const LOG_FLUSH_MS = 1000; // At exit, the log gets this long to be read.
const RUNTIME_DESCRIPTORS = 16; // Of the runtime itself: event loop, standard streams, listeners, threads.

// ═══ 2 Words and refusals ════════════════════════════════════════════════════════════════════════

const METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"] as const;
export type Method = (typeof METHODS)[number] | ""; // of RFC 9110 §9.3 and RFC 5789; "" for any other token

const LOG_FORMATS = ["request", "access", "wire", "off"] as const;
export type LogFormat = (typeof LOG_FORMATS)[number];

/** A response that is ready to be sent except for its Date. */
export interface Response {
  readonly status: number;
  readonly head: Uint8Array; // status-line and field-lines, ending in `Date: `
  readonly content: Uint8Array;
  readonly part?: Part; // content that is read while it is sent, instead of `content`; the holder must close it
}

/** What a server answers with: a text, or files. */
export abstract class Site {
  readonly options: Response;
  private readonly notAllowed: Response;

  constructor(private readonly methods: readonly Method[]) {
    this.options = prepareResponse(204, { Allow: methods.join(", ") });
    this.notAllowed = prepareResponse(405, { ...TEXT_FIELDS, Allow: methods.join(", ") }, "method not allowed\n");
  }

  /** The response if the method is refused, whatever the content is. RFC 9110 §15.5.6: 405 says which methods there are. */
  refuse({ method }: RequestHead): Response | undefined {
    if (this.methods.includes(method)) return undefined;
    return method === "" ? responseTo("method-unknown") : this.notAllowed;
  }

  /** The response to a request whose content has been read. Nothing is read from the peer until a promise settles. */
  abstract respond(request: RequestHead): Response | Promise<Response>;

  sweep?(now: number): void; // called every 250 ms to drop short-lived state; answers have `now` as their Date
}

/** Every reason to refuse a request: its status, and the line that explains it to the peer. */
export const REJECTIONS = Object.freeze({
  "bare-lf": [400, "a line ends in LF without CR"],
  "bare-cr": [400, "CR without LF"],
  "empty-lines": [400, "too many empty lines before the request"],
  "request-line": [400, "not a request-line: method SP request-target SP HTTP-version CRLF"],
  "request-target": [400, "the request-target has no form that this method may use"],
  "request-target-byte": [400, "a byte above 0x7e in the request-target: percent-encode it"],
  "request-target-too-long": [414, "the request-target is too long"],
  "method-unknown": [501, "no such method here"],
  "http-version": [505, "only HTTP/1.x is spoken here"],
  "field-line": [400, "not a field-line: field-name, colon, field-value"],
  "field-value": [400, "a control character in a field-value"],
  "obs-fold": [400, "a field-line starts with white space"],
  "head-too-large": [431, "the request head is too large"],
  "too-many-fields": [431, "too many field-lines"],
  "host-missing": [400, "an HTTP/1.1 request needs a Host field"],
  "host-repeated": [400, "more than one Host field"],
  "host-invalid": [400, "the Host field is not host[:port]"],
  "length-and-chunked": [400, "both Content-Length and Transfer-Encoding"],
  "transfer-encoding": [400, "Transfer-Encoding is not exactly one final chunked"],
  "transfer-coding-unknown": [501, "no transfer coding but chunked is known here"],
  "transfer-encoding-1.0": [400, "Transfer-Encoding in an HTTP/1.0 request"],
  "content-length": [400, "Content-Length is not one decimal number"],
  "content-too-large": [413, "the content is too large"],
  "chunk-size": [400, "not a chunk-size"],
  "chunk-extension": [400, "not a chunk extension, or too long"],
  "chunk-data": [400, "chunk data does not end where its size says"],
  trailer: [400, "not a trailer section"],
  "trailer-too-large": [431, "the trailer section is too large"],
  "trailer-forbidden": [400, "a field that is not allowed in a trailer section"],
  expectation: [417, "only the expectation 100-continue is known here"],
  path: [400, "no path of a file: it leads above the root, or has NUL, an encoded slash or what is not UTF-8"],
  forbidden: [403, "the server may not read this"],
  "not-found": [404, "there is no such file here"],
  precondition: [412, "the file is not in the version that the request is about"],
  "too-many-files": [503, "too many files are open, try again later"],
  incomplete: [400, "the connection ended inside the request"],
  timeout: [408, "the request did not arrive in time"],
  internal: [500, "the server failed"],
  "too-many-connections": [503, "too many connections, try again later"],
} as const satisfies Record<string, readonly [status: number, explanation: string]>);
export type Rejection = keyof typeof REJECTIONS;

/** Thrown to end a conversation with an answer. */
class Refusal {
  constructor(readonly rejection: Rejection) {}
}
const GONE = Symbol("gone"); // thrown to end it without one: the peer left, asks no more, or its answer is cut off
class StartError extends Error {} // thrown if it cannot listen as it was told: shown as one line

export type Outcome = "bytes" | "end" | "room" | "late" | "stop"; // of a wait; "end" is FIN, or a lost connection
const NO_BYTES = new Uint8Array(0);

// ═══ 3 The conversation ══════════════════════════════════════════════════════════════════════════
// On its usual path a request is these calls, one after the other:
// receive → readHead → parseRequestHead → refuse → respond → isLast → appendResponse → log → receive → flush

/**
 * Serves one peer, from its first byte to its last. It waits only where bytes, room in the socket or time are missing:
 * pipelined requests that have already arrived are all answered, with one write. Two rules keep that right: the
 * shared output is written before any wait, and after a wait the peer may have gone.
 */
export async function serve(connection: Connection): Promise<void> {
  const { server, head } = connection;
  const { site, limits, output } = server;
  let content: Content | undefined;
  try {
    server.admit(connection);
    let deadline = server.now + limits.headTimeoutMs;
    for (let closes = false; !closes; deadline = server.now + limits.idleTimeoutMs) {
      // Wait for a request until `deadline`. From its first byte on, its head has `headTimeoutMs`.
      for (let outcome: Outcome = "bytes", hadBegun = false; !readHead(connection, outcome); hadBegun = head.hasBegun) {
        if (head.hasBegun && !hadBegun) deadline = server.now + limits.headTimeoutMs;
        if (!head.hasBegun && server.stoppedAt > 0) deadline = Math.min(deadline, server.now + STOP_IDLE_MS);
        outcome = await connection.receive(deadline);
      }

      // Read its content, if it has any.
      head.refusal = site.refuse(head);
      if (head.contentLength !== 0) content = new Content(connection);
      for (let outcome: Outcome = "bytes"; content?.read(outcome) === false;)
        outcome = await connection.receive(content.deadline);

      // Respond. Only --root returns promises: earlier answers are sent meanwhile.
      let response = head.refusal ?? site.respond(head);
      if (response instanceof Promise) [response] = await Promise.all([response, connection.flush()]);
      closes = isLast(connection, response);

      // Send: a part now, a text in the next `receive`, when no whole request is left.
      let sent = output.appendResponse(head, response, closes);
      if (response.part !== undefined) sent = await sendPart(connection, response.part);
      log(connection, content, response.status, sent);
      if (sent < (response.part?.length ?? 0)) throw GONE; // it is cut off
      content = undefined;
      head.content = NO_BYTES;
      if (output.length >= UNSENT_BYTES_MAX) await connection.flush();
    }
  } catch (reason) {
    if (reason === GONE || (reason instanceof Refusal && connection.isGone)) return;
    if (!(reason instanceof Refusal)) report(`Error: ${reason}`); // a fault of ours: it touches no other conversation
    const response = head.refusal ?? responseTo(reason instanceof Refusal ? reason.rejection : "internal");
    connection.trace?.step("refuse", `with ${response.status}`);
    // It closes: where a next request would start is not known, or the server is full or at fault.
    log(connection, content, response.status, output.appendResponse(head, response, true));
  } finally {
    await connection.close();
  }
}

/** Parses what has come of a head. @returns whether it is whole @throws Refusal; GONE if none of it will come */
function readHead(connection: Connection, outcome: Outcome): boolean {
  const { head, bytes, at, to, parsedBytes } = connection;
  // A long head is parsed again only when a line of it or much has come: each byte of it could cost a parse otherwise.
  const isDue = parsedBytes < LONG_HEAD_BYTES || to - at - parsedBytes >= LONG_HEAD_BYTES || outcome !== "bytes";
  if (at === to) head.hasBegun = false;
  else if (isDue || bytes.subarray(at + parsedBytes, to).includes(LF)) {
    const next = parseRequestHead(head, bytes, at, to);
    connection.parsedBytes = next < 0 ? to - at : 0;
    if (next >= 0) {
      connection.at = next;
      connection.trace?.complete("head");
      return true;
    }
  }
  if (outcome !== "end" && outcome !== "late") return false;
  if (!head.hasBegun) throw GONE;
  throw new Refusal(outcome === "late" ? "timeout" : "incomplete"); // it was begun: 408 (RFC 9110 §15.5.9)
}

function isLast({ server, head, hasEnded, at, to }: Connection, { status, part }: Response): boolean {
  // RFC 9112 §9.3: HTTP/1.1 goes on unless told to close; HTTP/1.0 only when asked to.
  if (head.persistence === "close" || (head.minorVersion === 0 && head.persistence === "")) return true;
  // A site's 400 is for a peer that is not understood; 500 and 503 are of a server in trouble. 404 and 405 go on.
  if (status === 400 || status === 500 || status === 503) return true;
  if (at === to && (hasEnded || server.stoppedAt > 0)) return true;
  // On a stop, requests that have already come are answered until STOP_IDLE_MS is over; server.now stands still meanwhile.
  return server.stoppedAt > 0 && (part !== undefined || performance.now() > server.stoppedAt + STOP_IDLE_MS);
}

/** Logs a request: as received, with the start of its content; or one access line, with status and octets sent. */
function log({ server, head, address }: Connection, content: Content | undefined, status: number, sent: number): void {
  if (server.logFormat === "access") server.log(formatAccessLog(head, address, status, sent));
  if (server.logFormat === "request" && head.to > head.from) server.log(formatRequestLog(head, content));
}

// ═══ 4 Request head ══════════════════════════════════════════════════════════════════════════════

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

const TCHAR = bytesLike(/[!#$%&'*+\-.^_`|~0-9A-Za-z]/); // tchar, of which tokens are made (RFC 9110 §5.6.2)
const TARGET = bytesLike(/[\x21-\x22\x24\x26-\x7e]/); // visible ASCII (RFC 9112 §3.2) but "%", and "#" of a fragment
const DIGIT = bytesLike(/[0-9]/);
const OWS = bytesLike(/[\t ]/);
const REG_NAME = bytesLike(/[A-Za-z0-9\-._~!$&'()*+;=]/); // reg-name (RFC 3986) without "%", and "," of a list
/** uri-host [ ":" port ] (RFC 9110 §4.2), "[v" for IPvFuture. No userinfo; no zone id: it means nothing to others. */
const AUTHORITY =
  /^(?:\[(?:v[\dA-F]+\.[\w\-.~!$&'()*+,;=:]+|([^\]%]+))\]|(?:[\w\-.~!$&'()*+;=]|%[\dA-F]{2})+)(?::(\d*))?$/i;
const TARGET_PARTS = /^(?:https?:\/\/([^/?]*))?([^?]*)(.*)$/i; // an authority, if there is one; path; "?" and query
/** Codings that are not implemented, and after them chunked, last and once. */
const OTHER_CODINGS = /^[\t ]*(?:(?!chunked[\t ]*,)[!#$%&'*+\-.^_`|~\w]+[\t ]*,[\t ]*)+chunked[\t ]*\r\n$/i;
const EXPECTATIONS = /^[\t\r\n ,]*(?:100-continue[\t ]*[\r,][\t\r\n ,]*)*$/i; // RFC 9110 §10.1.1 defines no other
const AFTER_TARGET = " HTTP/D.D\r\n"; // RFC 9112 §2.3: in upper case; D is any DIGIT
const [SP, COLON, PERCENT, SLASH] = [0x20, 0x3a, 0x25, 0x2f];
const CHUNKED = -1; // as a length of content: the chunked transfer coding marks its end

/** A request head. Positions are indexes into `bytes`. Texts, a character a byte, are made when they are asked for. */
export class RequestHead {
  bytes: Uint8Array = NO_BYTES;
  from = 0;
  to = 0; // behind the head; if it was refused or is incomplete, behind the part that is kept for the log
  hasBegun = false; // a byte of the request has come; an empty line before it does not count
  method: Method = "";
  targetFrom = 0;
  minorVersion = 0;
  host = 0; // where the value of Host starts: 0 for none, -1 for several lines
  persistence: "" | "keep-alive" | "close" = ""; // what Connection asks for; "close" wins
  // The values of rarer fields that decide about the message, each with its CRLF; "" for none.
  lengthField = "";
  codings = "";
  expect = "";
  contentLength = 0; // octets of content that follow, or CHUNKED
  refusal: Response | undefined; // the response if its method is refused, whatever its content is
  content: Uint8Array = NO_BYTES; // once it has been read, if RESPOND_NEEDS_CONTENT

  constructor(readonly limits: Limits) {}

  start(bytes: Uint8Array, from: number, to: number): void {
    this.bytes = bytes;
    this.from = from;
    this.to = to;
    this.method = this.persistence = this.lengthField = this.codings = this.expect = "";
    this.targetFrom = this.host = 0;
    this.hasBegun = false;
    this.refusal = undefined;
  }

  /** Copies the head out of the bytes of a read, so that these can be freed while it is still needed. */
  keep(): void {
    if (this.from === 0 && this.to === this.bytes.length) return;
    this.bytes = new Uint8Array(this.bytes.subarray(this.from, this.to)); // Buffer's own slice would not copy
    this.targetFrom -= this.from;
    this.to -= this.from;
    this.from = 0;
  }

  get requestTarget(): string {
    return latin1(this.bytes, this.targetFrom, this.bytes.indexOf(SP, this.targetFrom));
  }

  get path(): string {
    return TARGET_PARTS.exec(this.requestTarget)?.[2] || "/";
  }

  get query(): string {
    return (TARGET_PARTS.exec(this.requestTarget)?.[3] ?? "").slice(1);
  }

  get text(): string {
    return latin1(this.bytes, this.from, this.to);
  }

  /** All fields by name, in lower case. RFC 9110 §5.3: lines of one name are one list. */
  get fields(): ReadonlyMap<string, string> {
    const fields = new Map<string, string>();
    for (const [, fieldName = "", value = ""] of this.text.matchAll(/^([^:\s]+):(.*)/gm)) {
      const name = fieldName.toLowerCase();
      const before = fields.has(name) ? `${fields.get(name)}, ` : "";
      fields.set(name, before + trimOws(value));
    }
    return fields;
  }
}

/**
 * Parses a request head that starts at bytes[from]; bytes[to], if there is one, must be 0. It keeps nothing between two
 * calls, so the outcome is the same however the bytes were split. RFC 9112 §2.1: HTTP-message = request-line CRLF
 * *( field-line CRLF ) CRLF [ message-body ]. @returns the index behind the head; -1 if more is needed @throws Refusal
 */
export function parseRequestHead(head: RequestHead, bytes: Uint8Array, from: number, to: number): number {
  head.start(bytes, from, to);
  let at = from; // behind empty lines, which a server should skip (RFC 9112 §2.2)
  for (let emptyLines = 1; bytes[at] === CR; emptyLines++, at += 2) {
    if (bytes[at + 1] !== LF) return misfit(head, "bare-cr", at + 1);
    if (emptyLines > EMPTY_LINES_MAX) return misfit(head, "empty-lines", at);
  }
  head.hasBegun = at < to;

  // RFC 9112 §3: request-line = method SP request-target SP HTTP-version; exactly one SP, no other white space.
  const methodFrom = at;
  at = skipWhile(TCHAR, bytes, at, to);
  if (at === methodFrom || bytes[at] !== SP) return misfit(head, "request-line", at);
  head.method = recogniseMethod(bytes, methodFrom, at);
  head.targetFrom = ++at;
  const targetToMax = at + head.limits.requestTargetBytesMax;
  for (; ; at += 3) {
    at = skipWhile(TARGET, bytes, at, to);
    if (at > targetToMax) return misfit(head, "request-target-too-long", targetToMax); // RFC 9112 §3: 414
    if (bytes[at] !== PERCENT) break;
    // RFC 3986 §2.1: pct-encoded = "%" HEXDIG HEXDIG. Decoders differ on anything else: refuse it.
    if (HEXDIG[byteAt(bytes, at + 1)] !== 1) return misfit(head, "request-target", at + 1);
    if (HEXDIG[byteAt(bytes, at + 2)] !== 1) return misfit(head, "request-target", at + 2);
  }
  if (byteAt(bytes, at) > 0x7e) return misfit(head, "request-target-byte", at);
  if (at === head.targetFrom) return misfit(head, "request-line", at);
  for (let i = 0; i < AFTER_TARGET.length; i++, at++) {
    const expected = AFTER_TARGET.charCodeAt(i);
    if (expected === 0x44 ? DIGIT[byteAt(bytes, at)] !== 1 : bytes[at] !== expected)
      return misfit(head, expected === LF ? "bare-cr" : "request-line", at);
  }
  // RFC 9110 §2.5: a higher minor version is read as ours; another major one is another protocol.
  if (bytes[at - 5] !== 0x31) return misfit(head, "http-version", at - 1);
  head.minorVersion = byteAt(bytes, at - 3) - 0x30;

  // RFC 9112 §5: field-line = field-name ":" OWS field-value OWS. White space before the colon can fool recipients.
  for (let fieldLines = 1; bytes[at] !== CR; fieldLines++, at += 2) {
    const nameFrom = at;
    const nameTo = (at = skipWhile(TCHAR, bytes, at, to));
    if (at === nameFrom && OWS[byteAt(bytes, at)] === 1) return misfit(head, "obs-fold", at); // RFC 9112 §5.2, §2.2
    if (at === nameFrom || bytes[at] !== COLON) return misfit(head, "field-line", at);
    if (fieldLines > head.limits.fieldLinesMax) return misfit(head, "too-many-fields", at);
    at = skipWhile(FIELD_CONTENT, bytes, at + 1, to);
    if (bytes[at] !== CR) return misfit(head, "field-value", at);
    if (bytes[at + 1] !== LF) return misfit(head, "bare-cr", at + 1);
    noteField(head, bytes, nameFrom, nameTo, at);
  }
  if (bytes[at + 1] !== LF) return misfit(head, "bare-cr", at + 1);
  if (at + 2 - from > head.limits.headBytesMax) return misfit(head, "head-too-large", at + 1);
  head.to = at + 2;
  checkRequestTarget(head);
  checkHost(head);
  head.contentLength = decideFraming(head);
  if (head.expect !== "" && !EXPECTATIONS.test(head.expect)) throw new Refusal("expectation");
  return head.to;
}

/** The byte at this index does not fit. @returns -1 if it has yet to come, within the limit @throws Refusal if not */
function misfit(head: RequestHead, rejection: Rejection, at: number): number {
  const { bytes, from, to, targetFrom, limits } = head;
  const isTooLarge = at - from >= limits.headBytesMax;
  if (at === to && !isTooLarge) return -1;
  head.to = Math.min(to, from + LOGGED_BYTES_MAX);
  const isMethod = targetFrom === 0 || targetFrom - from > limits.headBytesMax; // too long a one: 501 (RFC 9112 §3)
  if (isTooLarge) throw new Refusal(isMethod ? "method-unknown" : "head-too-large");
  // Inside a line, LF would end it without CR.
  throw new Refusal(bytes[at] === LF && /^(?:request-line|field)/.test(rejection) ? "bare-lf" : rejection);
}

function recogniseMethod(bytes: Uint8Array, from: number, to: number): Method {
  for (const method of METHODS) if (isText(bytes, from, to, method, 0)) return method; // case-sensitive (RFC 9110 §9.1)
  return "";
}

/** Is the token from..to this text? A text in lower case matches any case; with a caseBit of 0, only itself. */
function isText(bytes: Uint8Array, from: number, to: number, text: string, caseBit = 0x20): boolean {
  if (to - from !== text.length) return false;
  for (let i = 0; i < text.length; i++) if ((byteAt(bytes, from + i) | caseBit) !== text.charCodeAt(i)) return false;
  return true;
}

/** Notes a field-line if its field decides about the message: its name is from..to, its value to + 1..lineTo. */
function noteField(head: RequestHead, bytes: Uint8Array, from: number, to: number, lineTo: number): void {
  if (isText(bytes, from, to, "host")) head.host = head.host === 0 ? to + 1 : -1;
  else if (isText(bytes, from, to, "content-length")) head.lengthField += latin1(bytes, to + 1, lineTo + 2);
  else if (isText(bytes, from, to, "transfer-encoding")) head.codings += latin1(bytes, to + 1, lineTo + 2);
  else if (isText(bytes, from, to, "expect")) head.expect += latin1(bytes, to + 1, lineTo + 2);
  else if (isText(bytes, from, to, "connection"))
    // RFC 9110 §7.6.1: Connection = #connection-option, tokens in any case.
    for (let at = to + 1; at < lineTo; at++) {
      const tokenFrom = at;
      at = skipWhile(TCHAR, bytes, at, lineTo);
      if (isText(bytes, tokenFrom, at, "close")) head.persistence = "close";
      else if (isText(bytes, tokenFrom, at, "keep-alive")) head.persistence ||= "keep-alive";
    }
}

/** RFC 9112 §3.2: the four forms of a request-target, and which method may use which. */
function checkRequestTarget(head: RequestHead): void {
  const { bytes, method, targetFrom } = head;
  if (bytes[targetFrom] === SLASH && method !== "CONNECT") return; // §3.2.1: origin-form = absolute-path [ "?" query ]
  const target = head.requestTarget;
  let fits = isAuthority(TARGET_PARTS.exec(target)?.[1] ?? ""); // §3.2.2: absolute-form, of the schemes served here
  if (method === "CONNECT") fits = isAuthority(target) && /:\d+$/.test(target); // §3.2.3: authority-form, only for it
  if (target === "*") fits = method === "OPTIONS"; // §3.2.4: asterisk-form, only for it
  if (!fits) throw new Refusal("request-target");
}

/** RFC 9112 §3.2: HTTP/1.1 needs a Host, only one, and a valid one, even if the target has an authority. */
function checkHost({ bytes, host, minorVersion, to }: RequestHead): void {
  if (host === 0 && minorVersion === 0) return;
  if (host <= 0) throw new Refusal(host === 0 ? "host-missing" : "host-repeated");
  // Nearly every Host is a name, or a name and a port: no text is made of it.
  const from = skipWhile(OWS, bytes, host, to);
  let at = skipWhile(REG_NAME, bytes, from, to);
  let port = 0;
  if (at > from && bytes[at] === COLON)
    for (at++; DIGIT[byteAt(bytes, at)] === 1; at++) port = 10 * port + byteAt(bytes, at) - 0x30;
  if (at > from && bytes[at] === CR && port <= 65_535) return;
  const value = latin1(bytes, from, skipWhile(FIELD_CONTENT, bytes, from, to));
  if (!isAuthority(trimOws(value))) throw new Refusal("host-invalid");
}

function isAuthority(text: string): boolean {
  const [whole, literal, port = ""] = AUTHORITY.exec(text) ?? [];
  return whole !== undefined && (literal === undefined || isIPv6(literal)) && Number(port) <= 65_535;
}

/** RFC 9112 §6.3: where content ends. Nothing is guessed: parsers that disagree let requests be smuggled in content. */
function decideFraming({ lengthField, codings, minorVersion }: RequestHead): number {
  if (codings !== "") {
    if (minorVersion === 0) throw new Refusal("transfer-encoding-1.0"); // §6.1: an HTTP/1.0 peer cannot know it
    if (lengthField !== "") throw new Refusal("length-and-chunked"); // item 3: an attempt at smuggling or at splitting
    // Item 4: chunked must be the final coding, once; and no other is implemented (§6.1: 501).
    if (/^[\t ]*chunked[\t ]*\r\n$/i.test(codings)) return CHUNKED;
    throw new Refusal(OTHER_CODINGS.test(codings) ? "transfer-coding-unknown" : "transfer-encoding");
  }
  if (lengthField === "") return 0; // item 7: a request with neither has no content
  // Item 5: repeated or listed values are refused even if they are equal; RFC 9110 §8.6: so are those that overflow.
  const length = /^[\t ]*\d+[\t ]*\r\n$/.test(lengthField) ? Number(lengthField) : Number.NaN;
  if (!Number.isSafeInteger(length)) throw new Refusal("content-length");
  return length;
}

// ═══ 5 Content ═══════════════════════════════════════════════════════════════════════════════════

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

/** RFC 9110 §6.5.1: fields for framing, routing and authentication must not come after the content. */
const FORBIDDEN_TRAILER =
  /^(?:authorization|connection|content-(?:encoding|length|range|type)|cookie|expect|host|keep-alive|max-forwards|proxy-authorization|set-cookie|te|trailer|transfer-encoding|upgrade)$/;

/** The content of one request: read to its end, within its bounds. It is kept only if `respond` needs it. */
class Content {
  wireBytes = 0; // octets as they came, the chunked framing included
  logged: Uint8Array = NO_BYTES; // the first of them, for the log
  deadline: number;
  private wireBytesDue = CONTENT_PART_BYTES_MIN; // so many must have come by then
  private readonly decoder: ChunkedDecoder | undefined;

  /** @throws Refusal if the content will not be read */
  constructor(private readonly connection: Connection) {
    const { head, server, at, to } = connection;
    this.deadline = server.now + server.limits.contentTimeoutMs;
    if (head.contentLength === CHUNKED) this.decoder = new ChunkedDecoder(server.limits, false);
    if (head.contentLength > server.limits.contentBytesMax) throw new Refusal("content-too-large");
    if (head.minorVersion === 0 || !/100-continue/i.test(head.expect)) return; // in HTTP/1.0 it is ignored
    // RFC 9110 §10.1.1: whether a client that gets a refusal instead of 100 sends the content is not known.
    if (head.refusal !== undefined) throw new Refusal("expectation"); // `serve` sends head.refusal instead
    if (at === to) server.output.append(encoder.encode("HTTP/1.1 100 Continue\r\n\r\n"));
  }

  /** Uses what has been received. @returns whether all of the content has come @throws Refusal if it will not */
  read(outcome: Outcome): boolean {
    const { connection, decoder } = this;
    const { server, head, bytes, to, trace } = connection;
    for (let from = -1; from < connection.at;) {
      from = connection.at;
      connection.at = decoder?.next(bytes, from, to) ?? Math.min(to, from + head.contentLength - this.wireBytes);
      this.wireBytes += connection.at - from;
      if (server.logFormat === "request" && this.logged.length < LOGGED_BYTES_MAX)
        this.logged = Buffer.concat([this.logged, bytes.subarray(from, connection.at)]).subarray(0, LOGGED_BYTES_MAX);
      if (decoder && decoder.announced > server.limits.contentBytesMax) throw new Refusal("content-too-large");
      if (decoder?.fault) throw new Refusal(decoder.fault);
      if (decoder?.trailerNames.some((name) => FORBIDDEN_TRAILER.test(name))) throw new Refusal("trailer-forbidden");
      if (RESPOND_NEEDS_CONTENT) {
        const { buffer, length } = head.content; // the buffer has room for more
        const more = bytes.subarray(from, decoder?.contentTo ?? connection.at);
        head.content = appended(new Uint8Array(buffer), length, more).subarray(0, length + more.length);
      }
      const isDone = this.wireBytes === head.contentLength || decoder?.state === "done";
      if (connection.at > from) trace?.complete(isDone ? "content complete" : "content");
      if (isDone) return true;
    }
    head.keep();
    if (outcome === "end") throw new Refusal("incomplete");
    if (outcome !== "late") return false;
    if (this.wireBytes < this.wireBytesDue) throw new Refusal("timeout");
    this.wireBytesDue = this.wireBytes + CONTENT_PART_BYTES_MIN;
    this.deadline = server.now + server.limits.contentTimeoutMs;
    return false;
  }
}

/** A buffer with more bytes behind its first `length`. It doubles when it is full, and is 0 behind its end. */
function appended(buffer: Uint8Array, length: number, more: Uint8Array): Uint8Array {
  const needed = length + more.length;
  const all = needed > buffer.length ? new Uint8Array(Math.max(256, 2 * needed)) : buffer;
  if (all !== buffer) all.set(buffer.subarray(0, length));
  all.set(more, length);
  return all;
}

// ═══ 6 Answers and log lines ═════════════════════════════════════════════════════════════════════

const STATUSES = `200 OK, 204 No Content, 206 Partial Content, 301 Moved Permanently, 304 Not Modified, 400 Bad Request,
  403 Forbidden, 404 Not Found, 405 Method Not Allowed, 408 Request Timeout, 412 Precondition Failed,
  413 Content Too Large, 414 URI Too Long, 416 Range Not Satisfiable, 417 Expectation Failed, 500 Internal Server Error,
  431 Request Header Fields Too Large, 501 Not Implemented, 503 Service Unavailable, 505 HTTP Version Not Supported`;
const REASON_PHRASES = new Map(STATUSES.split(/,\s+/).map((line) => [Number(line.slice(0, 3)), line] as const));

const encoder = new TextEncoder();
const utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
const TEXT_FIELDS = { "Content-Type": "text/plain; charset=utf-8" };

function formatHead(status: number, fields: Record<string, string>): Uint8Array {
  const lines = Object.entries(fields).map(([name, value]) => `${name}: ${value}\r\n`);
  return encoder.encode(`HTTP/1.1 ${REASON_PHRASES.get(status) ?? `${status} `}\r\n${lines.join("")}Date: `);
}

/** Makes a response, with its Content-Length. */
export function prepareResponse(status: number, fields: Record<string, string>, content: string | Uint8Array = "") {
  // RFC 9110 §6.4.1, §8.6 and §15.4.5: 204 and 304 have no content, 204 no Content-Length, and 304 none but the whole's.
  if (status === 204 || status === 304) return { status, head: formatHead(status, fields), content: NO_BYTES };
  const bytes = typeof content === "string" ? encoder.encode(content) : content;
  return { status, head: formatHead(status, { ...fields, "Content-Length": String(bytes.length) }), content: bytes };
}

const REJECTION_RESPONSES: { [Key in Rejection]?: Response } = {};
/** The answer to a refused request. It repeats nothing of the peer's, and is formatted once: an attack costs no more. */
function responseTo(rejection: Rejection): Response {
  const [status, explanation] = REJECTIONS[rejection];
  return (REJECTION_RESPONSES[rejection] ??= prepareResponse(status, TEXT_FIELDS, `${explanation}\n`));
}

const CONNECTION_LINES = ["", "Connection: close\r\n", "Connection: keep-alive\r\n"];
/** The ends of heads, one for each of these. RFC 9110 §6.6.1: Date is when the message originates, to the second. */
const formatHeadEnds = (now: number) =>
  CONNECTION_LINES.map((line) => encoder.encode(`${new Date(now).toUTCString()}\r\n${line}\r\n`));

/** Formatted answers that wait to be written, in one buffer that all connections use in turn. */
export class Output {
  bytes: Uint8Array = new Uint8Array(131_072);
  length = 0;
  ends = formatHeadEnds(Date.now()); // renewed by each sweep

  append(bytes: Uint8Array): void {
    this.bytes = appended(this.bytes, this.length, bytes);
    this.length += bytes.length;
  }

  /** @returns the octets of content in it */
  appendResponse(head: RequestHead, response: Response, closes: boolean): number {
    this.append(response.head);
    // RFC 9112 §9.6: the last answer says that the connection closes; an HTTP/1.0 client has to be told if it does not.
    this.append(this.ends[closes ? 1 : head.minorVersion === 0 ? 2 : 0] ?? NO_BYTES);
    if (head.method === "HEAD") return 0; // RFC 9110 §9.3.2: the fields of the answer to a GET, and no content
    this.append(response.content);
    return response.content.length;
  }
}

// ── shared: printable ──
const hexOf = (character: string) => character.codePointAt(0)?.toString(16).padStart(2, "0");
const escaped = (character: string) => (character <= "\xff" ? `\\x${hexOf(character)}` : `\\u{${hexOf(character)}}`);

/** Text of a peer's, safe to print: nothing in it moves the cursor, colours, rings or reorders text. */
export const printable = (text: string) =>
  text.replaceAll("\r\n", "\n").replace(/[^\n\t\P{C}]|[\u2028\u2029]/gu, escaped);
const asLine = (text: string) => `${printable(text).replace(/[\n\t]/g, " ")}\n`;
// ── end shared ──

/** A request as it was received, with an empty line after it: what the tutorial's server prints. */
function formatRequestLog({ bytes, from, to }: RequestHead, content: Content | undefined): string {
  const text = printable(utf8.decode(bytes.subarray(from, to))) + printable(utf8.decode(content?.logged));
  const more = content === undefined ? 0 : content.wireBytes - content.logged.length;
  return `${text}${text.endsWith("\n") ? "" : "\n"}${more > 0 ? `(${more} more bytes)\n` : ""}`;
}

const inQuotes = (text = "") => `"${text.replace(/[^\x20\x21\x23-\x5b\x5d-\x7e]/g, escaped) || "-"}"`;

/** A line of the Combined Log Format, which tools for the logs of web servers read. */
function formatAccessLog({ text }: RequestHead, address: string, status: number, bytes: number): string {
  const [, day, month, year, time] = new Date().toUTCString().split(" ");
  const [requestLine] = text.trimStart().split("\r", 1);
  // A map of all fields would take two fifths of the CPU of such a request.
  const quoted = (line: RegExp) => inQuotes(trimOws(line.exec(text)?.[1] ?? ""));
  const about = `${quoted(/\nreferer:(.*)/i)} ${quoted(/\nuser-agent:(.*)/i)}`;
  return `${address} - - [${day}/${month}/${year}:${time} +0000] ${inQuotes(requestLine)} ${status} ${bytes} ${about}\n`;
}

// ═══ 7 Text mode ═════════════════════════════════════════════════════════════════════════════════

const RESPOND_NEEDS_CONTENT = false as boolean; // True in a copy that uses `request.content`. To tsc it is no constant.

/**
 * Maps a request to its response. **In a copy of this file, this is the function to change**: look at `request.method`,
 * `.path` and `.query` (percent-encoded, as they were sent), `.fields` (a map by lower-case name) and, if the line above
 * says true, `.content` (bytes, at most `--content-bytes-max`), and return what {@link prepareResponse} makes:
 *
 *     if (request.path === "/health")
 *       return prepareResponse(200, { "Content-Type": "application/json" }, '{"status":"ok"}\n');
 *     if (request.path === "/echo" && request.method === "POST")
 *       return prepareResponse(200, { "Content-Type": "application/octet-stream" }, request.content);
 *
 * It is called once the content has been read, for the methods that {@link Site.refuse} lets pass. It must not wait:
 * no other peer is served meanwhile. 400, 500 and 503 close the connection. With `--root`, FileSite answers instead.
 */
export function respond(request: RequestHead, site: TextSite): Response {
  return request.method === "OPTIONS" ? site.options : site.text;
}

/** The answers of text mode, formatted once. */
export class TextSite extends Site {
  readonly text: Response;
  readonly respond = (request: RequestHead) => respond(request, this);

  constructor(text: string) {
    super(["GET", "HEAD", "POST", "OPTIONS"]);
    this.text = prepareResponse(200, TEXT_FIELDS, text);
  }
}

// ═══ 8 Sockets ═══════════════════════════════════════════════════════════════════════════════════

/**
 * What a connection needs of Bun's socket. `write` returns how many of the bytes the kernel took, a negative number once
 * the connection has gone. `shutdown` sends FIN behind what was written: the peer gets all of it, and may still send.
 * `end` closes in order, once both sides have sent FIN. `terminate` closes at once: by reset (RST) if bytes are left.
 */
export type Transport = Pick<Bun.Socket, "write" | "shutdown" | "terminate" | "pause" | "resume"> & {
  end(): void;
  readonly remoteAddress: string | undefined; // undefined once the peer has left
};

/** A socket as steps: one waits at a time, and handlers (`on…`) wake it. None throws: `isGone` tells of a lost peer. */
export class Connection {
  bytes: Uint8Array = NO_BYTES; // received and not used yet: bytes[at..to]; behind them is 0, or the end of the array
  at = 0;
  to = 0;
  parsedBytes = 0; // so many of them were parsed, and are no whole head
  hasEnded = false; // the peer has sent FIN: no more requests, but it may well wait for answers
  isGone = false;
  deadline = 0; // of the step that waits; over TLS, the first one waits for the handshake, too
  readonly head: RequestHead;
  readonly address: string; // taken now: a closed socket does not know it any more
  readonly trace: Trace | undefined;
  private unsent: Uint8Array = NO_BYTES; // answers that the kernel did not take
  private counted = 0; // bytes of this connection in server.waitingBytes
  private writeDeadline = 0; // by then the peer must have taken some of what is left
  private needsRoom = false; // the kernel did not take all of the last write: the next step waits for room
  private isPaused = false;
  private resolve: ((outcome: Outcome) => void) | undefined; // ends the wait; all waits share one executor function
  private readonly executor = (resolve: (outcome: Outcome) => void) => void (this.resolve = resolve);

  constructor(
    private readonly socket: Transport,
    readonly server: Server,
  ) {
    this.head = new RequestHead(server.limits);
    this.address = server.logFormat === "access" || server.logFormat === "wire" ? (socket.remoteAddress ?? "-") : "";
    server.connections.add(this);
    this.trace = server.logFormat === "wire" ? new Trace((line) => server.log(`${line}\n`)) : undefined;
    this.trace?.begin(++server.connectionsTraced);
    this.trace?.step("connect", `from ${this.address}`);
  }

  onData(bytes: Uint8Array): void {
    if (this.isGone) return;
    this.trace?.receive(bytes);
    if (this.at === this.to) this.hold(bytes, 0, bytes.length);
    else this.hold(appended(this.bytes, this.to, bytes), this.at, this.to + bytes.length);
    if (this.wake("bytes")) return;
    // Backpressure: a peer that sends before it has its answers is not read from until then. (Its FIN still shows.)
    if (!this.isPaused) this.socket.pause();
    this.isPaused = true;
    if (this.server.waitingBytes > this.server.limits.waitingBytesMax) this.abort();
  }

  onEnd(): void {
    this.trace?.step("FIN", "received");
    this.hasEnded = true;
    this.wake("end");
  }

  onClose(error?: Error): void {
    if (!this.isGone && !this.hasEnded) this.trace?.step(error === undefined ? "FIN" : "reset", "received");
    this.trace?.flush();
    this.leave();
    this.server.connections.delete(this);
    if (this.server.connections.size === 0) this.server.onEmpty();
  }

  /** Ends the step that waits, if this concerns it. @returns whether it does */
  wake(outcome: Outcome): boolean {
    const { resolve } = this;
    const isForBoth = outcome === "late" || this.isGone;
    if (resolve === undefined || (!isForBoth && this.needsRoom !== (outcome === "room"))) return false;
    if (outcome === "late")
      this.trace?.step("deadline", this.needsRoom ? "the peer takes nothing" : "nothing has come in time");
    this.resolve = undefined;
    resolve(outcome);
    return true;
  }

  /** Writes what the output holds, then waits for bytes behind those that are there. */
  receive(deadline: number): Promise<Outcome> | Outcome {
    const draining = this.flush();
    if (draining !== undefined) return draining;
    if (this.isGone || this.hasEnded) return "end";
    if (this.at === this.to) this.hold(NO_BYTES, 0, 0);
    // A part of a message is kept in a buffer with room for more, so that the bytes of the read can be freed.
    else if (this.at > 0 || this.to === this.bytes.length)
      this.hold(appended(NO_BYTES, 0, this.bytes.subarray(this.at, this.to)), 0, this.to - this.at);
    if (this.isPaused) this.socket.resume();
    this.isPaused = false;
    this.needsRoom = false; // even if a part was cut off
    return this.wait(deadline);
  }

  /** Writes what the output holds. @returns a promise if the kernel did not take all: it settles when it has */
  flush(): Promise<Outcome> | undefined {
    const { bytes, length } = this.server.output;
    if (length === 0) return undefined;
    this.server.output.length = 0;
    const taken = this.write(bytes, length);
    return taken < length && !this.isGone ? this.drain(bytes.slice(taken, length)) : undefined;
  }

  /** Waits until the kernel has taken these bytes. More may have been received by then. */
  private async drain(unsent: Uint8Array): Promise<Outcome> {
    this.unsent = unsent;
    while (this.unsent.length > 0) {
      await this.waitForRoom();
      const taken = this.write(this.unsent, this.unsent.length);
      this.unsent = this.unsent.slice(taken);
    }
    return "room";
  }

  /** Writes bytes. @returns how many the kernel took; none if the connection has gone */
  write(bytes: Uint8Array, length: number): number {
    if (this.isGone) return 0;
    const taken = this.socket.write(bytes, 0, length);
    this.trace?.step("send", `${taken} of ${length} B`);
    const { now, limits } = this.server;
    if (taken > 0 || !this.needsRoom) this.writeDeadline = now + limits.writeTimeoutMs;
    if (taken < 0 || this.writeDeadline < now) this.abort();
    this.needsRoom = taken < length;
    return Math.max(0, taken);
  }

  /** Waits, after a write, until the kernel tells of room, or the deadline passes: then the next write decides. */
  waitForRoom(): Promise<Outcome> | Outcome {
    return this.wait(this.writeDeadline); // it tells only when a third of its buffer is free: a slow peer may take less
  }

  /** Writes what is left and sends FIN, then reads and drops until the peer's FIN (RFC 9112 §9.6). */
  async close(): Promise<void> {
    await this.flush();
    if (this.isGone) return;
    // A close with bytes unread would send a reset: the peer's kernel may then discard what it holds of our answer.
    this.socket.shutdown();
    this.trace?.step("close", "FIN sent");
    const isIdle = this.server.stoppedAt > 0 && !this.head.hasBegun; // a peer that asks for nothing gets little time
    const deadline = this.server.now + (isIdle ? STOP_IDLE_MS : LINGER_MS_MAX);
    for (let dropped = 0, outcome: Outcome = "bytes"; outcome !== "end" && outcome !== "late";) {
      dropped += this.to - this.at;
      if (dropped > LINGER_BYTES_MAX) return this.abort();
      this.at = this.to;
      outcome = await this.receive(Math.min(deadline, this.server.now + LINGER_TIMEOUT_MS));
    }
    if (!this.isGone) this.socket.end(); // no reset: a slow peer may still be reading what the kernel has taken
    this.leave();
  }

  /** Drops the connection without an answer or a FIN. */
  abort(): void {
    if (this.isGone) return;
    this.trace?.step("close", "dropped");
    this.leave();
    this.socket.terminate();
  }

  private leave(): void {
    this.isGone = true;
    this.unsent = NO_BYTES;
    this.hold(NO_BYTES, 0, 0);
    this.wake("end");
  }

  private wait(deadline: number): Promise<Outcome> | Outcome {
    this.count();
    if (this.counted > 0 && this.server.waitingBytes > this.server.limits.waitingBytesMax) this.abort();
    if (this.isGone) return "end";
    this.deadline = deadline;
    this.trace?.flush();
    return new Promise(this.executor);
  }

  private hold(bytes: Uint8Array, at: number, to: number): void {
    this.bytes = bytes;
    this.at = at;
    this.to = to;
    this.count();
  }

  private count(): void {
    const kept = 2 * this.head.content.length; // its buffer may be twice as long
    const held = this.isGone ? 0 : this.bytes.length + this.unsent.length + kept;
    this.server.waitingBytes += held - this.counted;
    this.counted = held;
  }
}

/** The state that the connections of a server share. */
export class Server {
  readonly connections = new Set<Connection>();
  readonly output = new Output();
  connectionsTraced = 0;
  waitingBytes = 0; // in the buffers of all connections
  stoppedAt = 0; // when it was told to stop; 0 until then
  onEmpty = () => {}; // called when the last connection has gone
  now = 0; // milliseconds, as of the last sweep
  private sweptAt = performance.now();

  constructor(
    readonly site: Site,
    readonly logFormat: LogFormat,
    readonly log: (text: string) => void,
    readonly limits: Limits = LIMITS,
    private readonly refusedConnectionsMax = REFUSED_CONNECTIONS_MAX,
  ) {}

  /** Refuses a connection above the limit; in a flood, without a word. @throws Refusal */
  admit(connection: Connection): void {
    const excess = this.connections.size - this.limits.connectionsMax;
    if (excess > this.refusedConnectionsMax) connection.abort();
    else if (excess > 0) throw new Refusal("too-many-connections");
  }

  /** Ends the steps that are late, and sets the Date, for all connections at once. */
  sweep(): void {
    const sweptAt = performance.now();
    // If the event loop was blocked, what peers have sent meanwhile is not read yet: that time does not count.
    this.now += Math.min(sweptAt - this.sweptAt, SWEEP_MS);
    this.sweptAt = sweptAt;
    const date = Date.now();
    this.output.ends = formatHeadEnds(date);
    this.site.sweep?.(date);
    for (const connection of this.connections) if (connection.deadline < this.now) connection.wake("late");
  }

  /** Requests in flight are answered, idle connections closed. */
  stop(): void {
    this.stoppedAt = performance.now();
    for (const connection of this.connections) connection.wake("stop");
    if (this.connections.size === 0) this.onEmpty();
  }
}

/** Listens and serves. Port 0 picks a free one, the same for all listeners. @throws StartError if it cannot */
function listen(server: Server, commandLine: CommandLine, tls: { cert: string; key: string } | false) {
  const { host, port, reusePort } = commandLine;
  const fail = (socket: Bun.Socket<Connection>, error: Error) => {
    report(`Error: ${error}`);
    socket.terminate();
  };
  const socket: Bun.SocketHandler<Connection> = {
    open(socket) {
      socket.data = new Connection(socket, server);
      serve(socket.data).catch((error) => fail(socket, error));
    },
    // Without this handler `open` would wait for the handshake, and nothing would bound how long it takes.
    handshake(socket, isSecure) {
      socket.data.trace?.step("TLS", isSecure ? "agreed" : "failed");
      if (!isSecure) socket.data.abort();
    },
    data: (socket, bytes) => socket.data.onData(bytes),
    drain: (socket) => void socket.data.wake("room"),
    end: (socket) => socket.data.onEnd(),
    close: (socket, error) => socket.data.onClose(error),
    error: fail,
  };
  const options = { socket, allowHalfOpen: true, reusePort, tls };
  const listeners: Bun.TCPSocketListener<Connection>[] = [];
  // "localhost" is both loopback addresses; Bun binds only the first, and clients may try either.
  for (const hostname of host.toLowerCase() === "localhost" ? ["127.0.0.1", "::1"] : [host]) {
    try {
      listeners.push(Bun.listen<Connection>({ ...options, hostname, port: listeners[0]?.port ?? port }));
    } catch (error) {
      const { code = "" } = error as { code?: string }; // Bun throws a SystemError
      if (listeners.length > 0 && code !== "EADDRINUSE") continue; // a machine without IPv6 has no ::1
      for (const listener of listeners) listener.stop();
      // The free port that 127.0.0.1 got may be taken on ::1: look for another.
      if (listeners.length > 0 && port === 0) return listen(server, commandLine, tls);
      throw new StartError(explainListenError(code, commandLine));
    }
  }
  return listeners;
}

function explainListenError(code: string, { host, isHostFromEnv, port }: CommandLine): string {
  if (code === "EADDRINUSE")
    return `port ${port} is taken: stop the program that has it, or choose another with --port; if it has just ended, wait a minute`;
  if (code === "EACCES") return `not allowed to listen on port ${port}: choose one from 1024 on with --port`;
  if (code.includes("ERR_OSSL_")) return `the certificate and the key cannot be used: ${code.replace("ERR_OSSL_", "")}`;
  const from = isHostFromEnv ? "; the environment variable HOST names it, --host another" : "";
  // Bun has no code for a name that does not resolve, and none if descriptors are missing.
  const why = code === "" ? "no such host, or no file descriptor is free" : `no address of this machine (${code})`;
  return `cannot listen on ${host}: ${why}${from}`;
}

// ═══ 9 Log ═══════════════════════════════════════════════════════════════════════════════════════

const nextTurn = () => new Promise(setImmediate); // lets all other connections have a turn

/** Writes follow one another: one that waits for its reader keeps a thread of the pool, which may have only two. */
let lastWrite = Promise.resolve<Uint8Array>(NO_BYTES);

/** Writes to stdout or stderr without ever making a peer wait for it: what a slow reader leaves is bounded. */
class Log {
  written = Promise.resolve(); // settles when all is written
  private waiting = "";
  private dropped = 0;

  constructor(private readonly fd: 1 | 2) {}

  print(text: string): void {
    if (this.waiting === "") this.written = this.written.then(() => this.write());
    if (this.waiting.length > LOG_BACKLOG_CHARS_MAX) this.dropped++;
    else this.waiting += text;
  }

  private async write(): Promise<void> {
    await nextTurn(); // so that all lines of one turn go out together
    if (this.dropped > 0) this.waiting += `(${this.dropped} log entries dropped: their reader is slow)\n`;
    let rest: Uint8Array = encoder.encode(this.waiting);
    [this.waiting, this.dropped] = ["", 0];
    while (rest.length > 0) rest = await (lastWrite = lastWrite.then(() => writeSome(this.fd, rest)));
  }
}

/** Writes bytes. @returns those that are left; if the output is closed or its disk is full, all count as written */
const writeSome = (fd: number, bytes: Uint8Array) =>
  new Promise<Uint8Array>((resolve) =>
    fs.write(fd, bytes, (error, written) => {
      if (error?.code === "EAGAIN") setTimeout(resolve, SWEEP_MS, bytes);
      else resolve(error === null ? bytes.subarray(written) : NO_BYTES);
    }),
  );

const reports = new Log(2);
const report = (line: string) => reports.print(asLine(line));

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

// ═══ 10 Command line ═════════════════════════════════════════════════════════════════════════════

export const DEFAULTS = Object.freeze({ host: "localhost", port: 8888, text: "Hello, World!", log: "request" });

export const HELP = `Usage: server [options]
An HTTP/1.1 server that prints each request and answers it with a text, or with a file.

  --host HOST      address to listen on (${DEFAULTS.host}: 127.0.0.1 and, if there is one, ::1)
  --port PORT      port to listen on (${DEFAULTS.port}); 0 picks a free one, which the ready line tells
  --text TEXT      the answer to every request-target ("${DEFAULTS.text}")
  --root DIR       serve the files below DIR instead, for GET and HEAD;
                   dotfiles, and links that leave DIR, get 404
  --log FORMAT     on stdout: request, each request as received (default);
                   access, a line of the Combined Log Format;
                   wire, each step of each connection; or off
  --tls-cert FILE  serve TLS with this certificate (PEM, the chain after it) ...
  --tls-key FILE   ... and this private key (PEM)
  --reuse-port     let several processes listen on the port (Linux)
  -h, --help       print this text; --help limits: the limits, each of which has a flag
  -V, --version    print the version

Environment: HOST and PORT are used if --host and --port are absent.
It is ready when stderr says "Listening on http://...". SIGINT or SIGTERM: requests in flight
are answered, then exit 0; a second signal exits at once. SIGHUP, with TLS: certificate and key
are read again for new connections. Exit 1: cannot listen. Exit 2: wrong usage.
`;

const flagOf = (name: string) => name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`); // "head-bytes-max"

export const HELP_LIMITS = `Limits, each a flag that takes a number, with its default:

${LIMIT_NAMES.map((name) => `  --${flagOf(name).padEnd(26)} ${String(BOUNDS[name][0]).padStart(9)}  ${BOUNDS[name][1]}\n`).join("")}`;

/** A line of these texts defines an option: its letter, its name, and what it takes, by name or default. */
const OPTION = /^ +(?:-(\w), )?--([\w-]+)( +(?:[A-Z]+|\d+))? {2}/gm;
type CommandLine = ReturnType<typeof parseCommandLine>;

/** @throws StartError that says in one line what is wrong */
export function parseCommandLine(args: string[], env: Record<string, string | undefined>) {
  const { values, positionals: topics } = parseOptions(args);
  const value = (name: string) => (typeof values[name] === "string" ? values[name] : undefined);
  const [extra] = values["help"] && topics[0] === "limits" ? topics.slice(1) : topics;
  if (extra !== undefined) throw new StartError(`Unexpected argument '${extra}'`);
  const limits: Record<keyof Limits, number> = { ...LIMITS };
  for (const name of LIMIT_NAMES)
    limits[name] = parseNumber(`--${flagOf(name)}`, value(flagOf(name)) ?? `${LIMITS[name]}`, 2 ** 50); // exact in sums
  const log = LOG_FORMATS.find((format) => format === (value("log") ?? DEFAULTS.log));
  if (log === undefined) throw new StartError("--log takes request, access, wire or off");
  const [text, root, cert, key] = ["text", "root", "tls-cert", "tls-key"].map(value);
  if ((cert === undefined) !== (key === undefined)) throw new StartError("--tls-cert and --tls-key need each other");
  if (root !== undefined && text !== undefined) throw new StartError("--root and --text exclude each other");
  if (root === "") throw new StartError("--root takes a folder");
  const isHostFromEnv = value("host") === undefined && Boolean(env["HOST"]); // an empty variable counts as absent
  const host = (value("host") ?? (env["HOST"] || DEFAULTS.host)).replace(/^\[(.*)\]$/, "$1");
  if (host === "") throw new StartError("--host takes a name or an address");
  const portName = value("port") === undefined ? "the environment variable PORT" : "--port";
  const port = parseNumber(portName, value("port") ?? (env["PORT"] || `${DEFAULTS.port}`), 65_535);
  const reusePort = values["reuse-port"] === true;
  const help = topics.length > 0 ? HELP_LIMITS : HELP;
  const show = values["help"] ? help : values["version"] ? `server ${VERSION}\n` : "";
  return { show, host, isHostFromEnv, port, text: text ?? DEFAULTS.text, root, log, cert, key, reusePort, limits };
}

function parseOptions(args: string[]) {
  const options: NonNullable<ParseArgsConfig["options"]> = {};
  for (const [, short, name = "", argument] of (HELP + HELP_LIMITS).matchAll(OPTION))
    options[name] = { type: argument === undefined ? "boolean" : "string", ...(short !== undefined && { short }) };
  try {
    return parseArgs({ args, options, allowPositionals: true });
  } catch (error) {
    throw new StartError((error as Error).message.split(". ", 1)[0] ?? ""); // parseArgs throws TypeErrors
  }
}

function parseNumber(name: string, text: string, max: number): number {
  if (/^\d{1,16}$/.test(text) && Number(text) <= max) return Number(text);
  throw new StartError(`${name} takes a number from 0 to ${max}, not ${JSON.stringify(text)}`);
}

function readPem(path: string): string {
  try {
    return fs.readFileSync(path, "utf8").replace(/^\ufeff/, ""); // OpenSSL skips a byte order mark, too
  } catch (error) {
    throw new StartError(`cannot read ${path}: ${(error as { code?: string }).code}`); // node:fs throws SystemErrors
  }
}

/** Lowers connectionsMax, `each` descriptors a connection: if none is free, the event loop spins, and accepts none. */
export function fitLimits(limits: Limits, descriptors: number, each: 1 | 2): { limits: Limits; reserve: number } {
  const reserve = Math.min(REFUSED_CONNECTIONS_MAX, Math.floor(descriptors / 8)); // so many may be refused at once
  const left = Math.floor((descriptors - RUNTIME_DESCRIPTORS - 3 * reserve) / each); // twice as many are for files
  return { limits: { ...limits, connectionsMax: Math.max(1, Math.min(limits.connectionsMax, left)) }, reserve };
}

/** Serves until SIGINT or SIGTERM; a second one exits at once. */
function run(commandLine: CommandLine): void {
  const { host, text, root, log: logFormat, cert, key } = commandLine;
  const { userLimits } = process.report.getReport() as { userLimits?: { open_files: { soft: unknown } } }; // as in Node
  const descriptors = Number(userLimits?.open_files.soft) || Number.POSITIVE_INFINITY; // "unlimited", or on Windows
  const { limits, reserve } = fitLimits(commandLine.limits, descriptors, root === undefined ? 1 : 2);
  const log = new Log(1);
  const site = root === undefined ? new TextSite(text) : new FileSite(root);
  const server = new Server(site, logFormat, (entry) => log.print(entry), limits, reserve);
  const isTls = cert !== undefined && key !== undefined;
  const readTls = () => isTls && { cert: readPem(cert), key: readPem(key) };
  let listeners = listen(server, commandLine, readTls());
  const port = listeners[0]?.port ?? 0;
  setInterval(() => server.sweep(), SWEEP_MS);

  const exit = () => process.exit(0);
  const stop = () => {
    if (server.stoppedAt > 0) exit();
    for (const listener of listeners) listener.stop();
    // The conversation on the last connection goes on for a turn, and may still log its request.
    const isLogged = () => nextTurn().then(() => Promise.all([log.written, reports.written]));
    server.onEmpty = () => void Promise.race([isLogged(), Bun.sleep(LOG_FLUSH_MS)]).then(exit);
    setTimeout(exit, Math.min(limits.graceMs, 2 ** 31 - 1)); // a timer set for longer fires at once
    server.stop();
  };
  process.on("SIGINT", stop).on("SIGTERM", stop);

  const reload = async () => {
    try {
      const tls = readTls();
      // Certificate and key that do not fit fail here, on a free port, while the old listeners live.
      for (const listener of listen(server, { ...commandLine, port: 0, reusePort: false }, tls)) listener.stop();
      await Bun.sleep(1); // that took a while: peers that have connected meanwhile would be reset
      if (server.stoppedAt > 0) return;
      for (const listener of listeners) listener.stop();
      listeners = listen(server, { ...commandLine, port }, tls);
      report("Certificate and key are read again");
    } catch (error) {
      report(`Error: ${(error as Error).message}; certificate and key stay as they were`); // listen throws StartErrors
    }
  };
  if (isTls) process.on("SIGHUP", reload);
  report(`Listening on http${isTls ? "s" : ""}://${isIPv6(host) ? `[${host}]` : host}:${port}`);
}

function main(): void {
  let commandLine: CommandLine | undefined;
  try {
    commandLine = parseCommandLine(process.argv.slice(2), process.env);
    if (commandLine.show === "") run(commandLine);
    else new Log(1).print(commandLine.show);
  } catch (error) {
    if (!(error instanceof StartError)) throw error;
    report(`Error: ${error.message}${commandLine ? "" : " (see server --help)"}`);
    process.exitCode = commandLine ? 1 : 2;
    setTimeout(process.exit, LOG_FLUSH_MS).unref(); // even if nobody reads it
  }
}

// ═══ 11 Files ════════════════════════════════════════════════════════════════════════════════════
// Only for --root. Without this section, and with `new TextSite(text)` in `run`, the rest serves a
// text; the type checker names what else can go. A request for a file is these calls, in this order:
// parseTargetPath → open → evaluateConditions → decideRanges → prepareContent → respondContent → sendPart

const PIECE_BYTES = 262_144; // A file is read, and written to a socket, in pieces of this size.
const PIECES_PER_TURN = 16; // After so many pieces for one connection, the others have their turn.
const SMALL_FILE_BYTES_MAX = 65_536; // A file up to this size is read at once and sent with its head.
const RANGES_MAX = 50; // A request for more gets the whole file. PDF readers and zsync ask for some ten.
const KNOWN_FILES_MAX = 16_384; // So many files are remembered, each in about 1 KB.
const FOUND_BELOW_MS = 5000; // For this long, a version of a file that was found below the root needs no proof.
const DIGEST_TIMEOUT_MS = 1000; // A digest is requested, never required: a response waits this long for it.
const DIGEST_WAITERS_MAX = 8; // So many responses may wait for a digest at once; others go without.
const LIVELY_MS = 10_000; // A file that changed within this time, such as a log, may change while it is sent.
const CLOCK_TICK_MS = 10; // Two changes within a tick of the kernel's clock leave the same timestamps.
const COARSE_TICK_MS = 2000; // ext4 on a small disk keeps them in whole seconds, FAT in even ones.
const SLOW_READ_MS = 20; // A read that takes this long has waited for a slow disk.
const SLOW_DISK_MS = 2000; // For this long after a slow read, the thread pool waits for the disk instead of us.
const NO_SNIFF = { "X-Content-Type-Options": "nosniff" }; // A browser must not guess another type from the content.
const LISTING_ENTRIES_MAX = 10_000; // A page shows no more names, of 300 bytes each. The others can be fetched.

// ── what is requested ──

const NO_FILE_NAME = process.platform === "win32" ? /[\0/\\:]/ : /[\0/]/; // Windows: "\" is a slash, ":" names streams.

/**
 * Takes the path of a request-target (RFC 3986 §3.3) apart. It is decoded once. Then dot segments are resolved (§5.2.4),
 * by their text alone. Slashes in a row are one. @returns undefined if it leads above the root or no file can have it
 */
export function parseTargetPath(requestTarget: string) {
  const [, , path = "", query = ""] = TARGET_PARTS.exec(requestTarget) ?? [];
  const segments: string[] = [];
  let isFolder = false;
  try {
    for (const encoded of path.split("/")) {
      const name = encoded.includes("%") ? decodeURIComponent(encoded) : encoded;
      if (NO_FILE_NAME.test(name)) return undefined;
      isFolder = name === "" || name === "." || name === "..";
      if (!isFolder) segments.push(name);
      else if (name === ".." && segments.pop() === undefined) return undefined;
    }
  } catch {
    return undefined; // decodeURIComponent: not UTF-8
  }
  return { segments, isFolder, query };
}

/** Names with a leading dot are hidden. In the path of a request, /.well-known/ is not (RFC 8615). */
const isHidden = (name: string, depth = 1) => name.startsWith(".") && (depth > 0 || name !== ".well-known");
const isFileOrFolder = (stats: fs.Stats | undefined) => stats?.isFile() || stats?.isDirectory();

/** What a failed system call means for the request. If it is a fault of the disk, say, the operator is told. */
function rejectionFor(error: unknown): Rejection {
  const { code = "", message } = error as { code?: string; message: string }; // node:fs throws SystemErrors
  if (code === "EACCES" || code === "EPERM") return "forbidden";
  if (code === "EMFILE" || code === "ENFILE") return "too-many-files";
  if (/^E(?:NOENT|NOTDIR|LOOP|NAMETOOLONG|INVAL|ILSEQ|NXIO|NODEV)$/.test(code)) return "not-found";
  report(`Error: ${message}`);
  return "internal";
}

/** On Linux, what was opened, wherever its path leads by now. ("self", since /proc may be of an outer PID namespace.) */
const openedPath = (fd: number, path: string) => (process.platform === "linux" ? `/proc/self/fd/${fd}` : path);

/** The files below a folder, as they are at this moment. Of their content nothing is remembered but digests. */
export class FileSite extends Site {
  private readonly root: string;
  private realRoot = ""; // Ends in a slash. "" at each sweep: links in the path of the root are followed anew.
  private readonly knownFiles = new Map<string, KnownFile>(); // by path
  private readonly listings = new Map<string, Promise<Response>>(); // those that wait for their turn, by path
  private lastListing = Promise.resolve(this.options);
  private dateNow = Date.now(); // the time that answers have as their Date

  /** @throws StartError if it is not the path of a folder that may be entered */
  constructor(path: string) {
    super(["GET", "HEAD", "OPTIONS"]);
    this.root = fs.existsSync(resolve(path)) ? resolve(path) : path; // a name that is not UTF-8 is above it
    try {
      fs.statSync(`${path}/.`); // to enter it is enough: its files can be served even if it cannot be listed
    } catch (error) {
      throw new StartError(`cannot serve ${path}: ${(error as { code?: string }).code}`); // node:fs throws SystemErrors
    }
  }

  respond(request: RequestHead): Response | Promise<Response> {
    if (request.method === "OPTIONS") return this.options;
    const target = parseTargetPath(request.requestTarget);
    if (target === undefined) return responseTo("path");
    const { segments, isFolder, query } = target;
    if (segments.some(isHidden)) return responseTo("not-found");
    const path = [this.root, ...segments].join(sep) + (isFolder ? sep : ""); // with a slash it is no file's: ENOTDIR
    // The index comes first: a folder that may be entered, but not read, can have one.
    const index = isFolder ? this.open(`${path}index.html`) : "not-found";
    const file = index === "not-found" ? this.open(path) : index;
    if (typeof file === "string") return responseTo(file);
    if (file.known.stats.isFile()) return respondFile(request, file);
    fs.closeSync(file.fd);
    if (isFolder) return this.listings.get(path) ?? this.list(segments, path); // its index.html may be a folder, too
    const Location = `${encodeURIComponent(segments.at(-1) ?? "")}/${query}`; // relative, as links on a page are
    return prepareResponse(301, { ...TEXT_FIELDS, Location }, "it is a folder\n");
  }

  override sweep(now: number): void {
    this.dateNow = now;
    this.realRoot = "";
  }

  /** Opens a path if it is a file or a folder, and is below the root when all links are followed. */
  private open(path: string): OpenFile | Rejection {
    let fd = -1;
    let known: KnownFile | undefined;
    try {
      // Opening a device or a FIFO may already do something, so only what is, or last was, a file or a folder is opened.
      if (!this.knownFiles.has(path) && !isFileOrFolder(fs.statSync(path, { throwIfNoEntry: false })))
        return "not-found";
      // The path may lead elsewhere by now: opening must not block, and the file is checked again.
      fd = fs.openSync(path, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK | fs.constants.O_NOCTTY);
      known = this.know(fd, path);
      return known === undefined ? "not-found" : { fd, known };
    } catch (error) {
      const rejection = rejectionFor(error);
      return rejection === "forbidden" && !this.isKnownBelow(path) ? "not-found" : rejection;
    } finally {
      if (known === undefined && fd >= 0) fs.closeSync(fd);
    }
  }

  /**
   * What is known of an open file; undefined if it is no file or folder below the root. Swapping links gains nothing:
   * the kernel says where it is, or this very version was found there within 5 s. (Renaming a file changes its ctime.)
   */
  private know(fd: number, path: string): KnownFile | undefined {
    const stats = fs.fstatSync(fd);
    const last = this.knownFiles.get(path);
    const isSame = last !== undefined && isOneVersion(last.stats, stats);
    const isRecent = Math.abs(this.dateNow - (last?.foundAt ?? 0)) < FOUND_BELOW_MS; // clocks may be set back
    if (isSame && isRecent && last.foundBelow === this.realRoot) return last;
    this.knownFiles.delete(path);
    // Other systems resolve the path a second time: whoever can change links below the root may win that race.
    const realPath = process.platform === "linux" ? fs.readlinkSync(openedPath(fd, path)) : fs.realpathSync(path);
    if (!isFileOrFolder(stats) || !this.hasBelow(realPath)) return undefined;
    const known: KnownFile = isSame ? last : describeFile(path, stats, this.dateNow);
    [known.foundAt, known.foundBelow] = [this.dateNow, this.realRoot];
    if (known.isLasting) this.knownFiles.set(path, known); // another request may find the same version
    const [oldest = ""] = this.knownFiles.size > KNOWN_FILES_MAX ? this.knownFiles.keys() : [];
    this.knownFiles.delete(oldest);
    return known;
  }

  /** Is this real path below the root? @throws SystemError if the root is not there */
  private hasBelow(realPath: string): boolean {
    const isBelow = () => this.realRoot !== "" && join(realPath, sep).startsWith(this.realRoot);
    if (!isBelow()) this.realRoot = join(fs.realpathSync(this.root), sep);
    return isBelow();
  }

  /** Whether what cannot be read is reported as 403, or hidden as 404 because a link leads out of the root. */
  private isKnownBelow(path: string): boolean {
    try {
      return this.hasBelow(fs.realpathSync(path));
    } catch {
      // If its folder may be entered, it is a link that leads into a folder that may not.
      const folder = dirname(path);
      return path !== this.root && !fs.existsSync(`${folder}/.`) && this.isKnownBelow(folder);
    }
  }

  /** A folder may be large: one listing is made at a time, and identical requests that wait for their turn share one. */
  private list(segments: readonly string[], path: string): Promise<Response> {
    const openAndList = async () => {
      this.listings.delete(path); // a later request may know of a change that this listing misses
      const folder = this.open(path); // not kept open: many may wait, and their peers may have gone
      if (typeof folder === "string") return responseTo(folder);
      return this.listFolder(segments, openedPath(folder.fd, path)).finally(() => fs.closeSync(folder.fd));
    };
    this.lastListing = this.lastListing.then(openAndList).catch((error: unknown) => responseTo(rejectionFor(error)));
    this.listings.set(path, this.lastListing);
    return this.lastListing;
  }

  private async listFolder(segments: readonly string[], folder: string): Promise<Response> {
    const names = await fs.promises.readdir(folder, { encoding: "buffer" });
    const readable = names.filter((name) => isUtf8(name)).map(String);
    const served = readable.filter((name) => !isHidden(name) && !NO_FILE_NAME.test(name));
    const entries: ListingEntry[] = [];
    for (const [i, name] of served.slice(0, LISTING_ENTRIES_MAX).entries()) {
      try {
        const path = join(folder, name);
        let stats = fs.lstatSync(path);
        if (stats.isSymbolicLink() && this.hasBelow(fs.realpathSync(path))) stats = fs.statSync(path);
        const { size, mtime: modified } = stats;
        if (isFileOrFolder(stats)) entries.push({ name, isFolder: stats.isDirectory(), size, modified });
      } catch {} // it has gone, or its link leads nowhere
      if (i % 256 === 255) await nextTurn();
    }
    const page = formatListing(segments, entries, served.length - LISTING_ENTRIES_MAX, names.length - readable.length);
    // Nothing on the page may be loaded, run or sent; its style is known by its digest.
    const style = Bun.CryptoHasher.hash("sha256", LISTING_STYLE, "base64");
    const policy = `default-src 'none'; style-src 'sha256-${style}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'`;
    const fields = { "Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy, ...NO_SNIFF };
    return prepareResponse(200, fields, page);
  }
}

// ── what is opened ──

let slowUntil = 0; // The disk is slow until then.
let digestWaiters = 0; // So many responses wait for a digest.
const piece = new Uint8Array(PIECE_BYTES); // Shared: its content is used before the event loop turns.
const unused = new Uint8Array(PIECE_BYTES); // Filled by several threads at once, and never looked at.

/** Reads a piece in the thread pool, for the page cache alone: to read it then does not wait for the disk. */
const warm = (fd: number, position: number) =>
  new Promise<void>((resolve) => fs.read(fd, unused, 0, PIECE_BYTES, position, () => resolve()));

/** A version of a file, and what responses say about it. Two with the same entity-tag are the same, byte by byte. */
type KnownFile = ReturnType<typeof describeFile> & {
  foundAt?: number; // when it was found below a root
  foundBelow?: string; // that root
  usual?: Prepared; // what most requests get: all of the file, without a digest
  digest?: string; // SHA-256 in base64, once all of it has passed by: for Repr-Digest (RFC 9530 §3)
  hasher?: Bun.CryptoHasher; // once a digest was wanted
};

function describeFile(path: string, stats: fs.Stats, dateNow: number) {
  const { size, ino, mtimeMs, ctimeMs } = stats;
  const [mediaType = ""] = Bun.file(path).type.split(";"); // By the name's extension. All text is taken for UTF-8.
  const type = mediaType.startsWith("text/") ? `${mediaType}; charset=utf-8` : mediaType;
  // Changed within the resolution of its time: a second change might leave the same times, so this tag is used once.
  const isFresh = Math.abs(Date.now() - ctimeMs) <= (ctimeMs % 1000 === 0 ? COARSE_TICK_MS : CLOCK_TICK_MS);
  const once = isFresh ? `-${crypto.randomUUID()}` : "";
  // Strong (RFC 9110 §8.8.3): anyone can set the time of the last modification, nobody that of the last change.
  const etag = `"${Math.round(mtimeMs * 1000)}-${size}-${ino}-${Math.round(ctimeMs * 1000)}${once}"`;
  // Times that cannot tell are no proof: such a file counts as one that has become longer. A small one is read at once.
  const expected = { size: isFresh && size > SMALL_FILE_BYTES_MAX ? -1 : size, mtimeMs };
  // Never later than Date (RFC 9110 §8.8.2.1). Nix and reproducible images give every version the time 0 or 1.
  const modified = Math.floor(Math.min(mtimeMs, dateNow) / 1000) * 1000;
  const lastModified = modified > 1000 ? modified : Number.NaN; // in ms since 1970; unknown equals nothing
  const validators = { ETag: etag, ...(modified > 1000 && { "Last-Modified": new Date(modified).toUTCString() }) };
  const isLasting = !isFresh && modified === Math.floor(mtimeMs / 1000) * 1000 && stats.isFile();
  return { path, stats, size, type, etag, lastModified, validators, expected, isFresh, isLasting, hashedTo: 0 };
}

const isOneVersion = (a: fs.Stats, b: fs.Stats) =>
  a.dev === b.dev && a.ino === b.ino && a.size === b.size && a.mtimeMs === b.mtimeMs && a.ctimeMs === b.ctimeMs;

/** Fills into[from..to] with what stands at a position of a file. @returns false if there is less @throws SystemError */
function readFully({ fd, known }: OpenFile, into: Uint8Array, from: number, to: number, position: number): boolean {
  const start = performance.now();
  for (let at = from, more = 1; at < to; at += more) {
    more = fs.readSync(fd, into, at, to - at, position + at - from);
    if (more === 0) return false;
  }
  if (performance.now() - start > SLOW_READ_MS) slowUntil = performance.now() + SLOW_DISK_MS;
  // All transfers of a version share one hash. It has had the file up to `hashedTo`, which is into[next].
  const next = from + known.hashedTo - position;
  if (known.hasher === undefined || known.digest !== undefined || next < from || next > to) return true;
  known.hasher.update(into.subarray(next, to));
  known.hashedTo = position + to - from;
  const isWhole = known.hashedTo === known.size && isOneVersion(known.stats, fs.fstatSync(fd));
  if (isWhole) known.digest = known.hasher.digest("base64");
  return true;
}

/** Hashes what is left of the file, for as long as a response waits: a piece at least. */
async function hash(file: OpenFile): Promise<void> {
  const { fd, known } = file;
  const deadline = digestWaiters++ < DIGEST_WAITERS_MAX ? performance.now() + DIGEST_TIMEOUT_MS : 0;
  known.hasher ??= new Bun.CryptoHasher("sha256");
  try {
    do {
      const bytes = piece.subarray(0, Math.min(PIECE_BYTES, known.size - known.hashedTo));
      if (!readFully(file, bytes, 0, bytes.length, known.hashedTo)) break;
      await (performance.now() < slowUntil ? warm(fd, known.hashedTo) : nextTurn());
    } while (known.hashedTo < known.size && performance.now() < deadline);
  } catch {} // the disk fails: sending will tell
  digestWaiters--;
}

// ── what is answered ──

export type FileVersion = Pick<KnownFile, "size" | "etag" | "lastModified">;
type Fields = RequestHead["fields"];

/** Is this entity-tag (RFC 9110 §8.8.3) on the list? "*" is any version. In a weak comparison `W/` does not count. */
function isListed(list: string, etag: string, isWeakly: boolean): boolean {
  const tags: readonly string[] = list === "*" ? [etag] : (list.match(/(?:W\/)?"[\x21\x23-\x7e\x80-\xff]*"/g) ?? []);
  return tags.includes(etag) || (isWeakly && tags.includes(`W/${etag}`));
}

/** RFC 9110 §13.2.2, for GET and HEAD. @returns 304: the client's copy is current; 412: a precondition failed */
export function evaluateConditions(fields: Fields, { etag, lastModified }: FileVersion): 304 | 412 | undefined {
  const date = (name: string) => parseHttpDate(fields.get(name) ?? ""); // NaN compares with nothing
  const ifMatch = fields.get("if-match"); // step 1, and step 2 only without it
  if (ifMatch === undefined ? lastModified > date("if-unmodified-since") : !isListed(ifMatch, etag, false)) return 412;
  const ifNoneMatch = fields.get("if-none-match"); // step 3, and step 4 only without it
  if (ifNoneMatch !== undefined) return isListed(ifNoneMatch, etag, true) ? 304 : undefined;
  return lastModified <= date("if-modified-since") ? 304 : undefined;
}

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

export type ByteRange = Readonly<{ from: number; to: number }>; // the byte at `to` is the first behind it

/** @returns "unsatisfiable" if the file has nothing of what is asked for */
export function decideRanges(method: Method, fields: Fields, { size, etag, lastModified }: FileVersion, now: number) {
  const [range, ifRange = etag] = [fields.get("range"), fields.get("if-range")];
  if (method !== "GET" || range === undefined) return undefined; // RFC 9110 §14.2: it has a meaning only in a GET
  // Step 5: RFC 9110 §13.1.5. A date counts only if the file cannot have changed again within its second.
  const isSame = ifRange === etag || (now - lastModified >= 1000 && parseHttpDate(ifRange) === lastModified);
  return isSame ? parseRanges(range, size) : undefined;
}

/**
 * Parses a Range (RFC 9110 §14.1.2). Ranges that overlap or touch are joined, so that all together are at most the file.
 * @returns in the order asked for; "unsatisfiable" if the file has none of it; undefined if it is to be ignored: another
 * unit, a syntax error, too many, or an empty file, of which Content-Range can say nothing
 */
export function parseRanges(value: string, size: number): readonly ByteRange[] | "unsatisfiable" | undefined {
  const [, list = ""] = /^bytes=(.*)$/i.exec(value) ?? [];
  const specs = list.split(",").map(trimOws).filter(Boolean); // §5.6.1: empty elements are ignored
  if (size === 0 || specs.length === 0 || specs.length > RANGES_MAX) return undefined;
  let ranges: ByteRange[] = [];
  for (const spec of specs) {
    const [, first = "", last = ""] = /^(\d*)-(\d*)$/.exec(spec) ?? [];
    if (first + last === "" || (first !== "" && last !== "" && Number(last) < Number(first))) return undefined;
    const from = first === "" ? Math.max(0, size - Number(last)) : Number(first);
    const to = first === "" || last === "" ? size : Math.min(size, Number(last) + 1);
    if (from >= to) continue;
    // It is joined with those that it touches, in the place of the first of these. No others can touch the result.
    ranges.push({ from, to });
    const touched = ranges.filter((other) => other.from <= to && from <= other.to);
    const joined = { from: Math.min(...touched.map((one) => one.from)), to: Math.max(...touched.map((one) => one.to)) };
    ranges = ranges.map((one) => (one === touched[0] ? joined : one)).filter((one) => !touched.includes(one));
  }
  return ranges.length === 0 ? "unsatisfiable" : ranges;
}

/** RFC 9530 §4: a dictionary of preferences from 0, "not this one", to 10. Of a key that comes twice the last counts. */
export const wantsSha256 = (wantReprDigest: string) =>
  Number(/^(?:.*,)?[ \t]*sha-256=(\d{1,2})(?=[ \t]*(?:[,;]|$))/.exec(wantReprDigest)?.[1]) > 0;

type OpenFile = Readonly<{ fd: number; known: KnownFile }>; // or folder, below the root; the holder must close it
type Segment = ByteRange & { readonly text?: Uint8Array }; // of content: a range of the file, or a text between two
export type Part = OpenFile & Readonly<{ segments: readonly Segment[]; length: number }>; // is read while it is sent
type Prepared = Response & Partial<Pick<Part, "segments" | "length">>; // a response before its content is read

/** The response with a file or parts of it, or that says why there is none. Only a digest is waited for. */
function respondFile(request: RequestHead, file: OpenFile): Response | Promise<Response> {
  const { known } = file;
  const answer = (prepared: Prepared) => respondContent(request.method, file, prepared);
  // Most heads have no field that decides what of a file is sent, and need no map of their fields.
  if (!/\n(?:if-|range|want-)/i.test(request.text)) return answer((known.usual ??= prepareContent(known)));
  const { fields } = request;
  const status = evaluateConditions(fields, known);
  if (status === 412) return answer(responseTo("precondition"));
  if (status === 304) return answer(prepareResponse(304, known.validators));
  const ranges = decideRanges(request.method, fields, known, Date.now());
  if (ranges === "unsatisfiable") {
    const about = { ...TEXT_FIELDS, "Content-Range": `bytes */${known.size}`, ...known.validators };
    return answer(prepareResponse(416, about, "the file has none of these bytes\n"));
  }
  const wantsDigest = !known.isFresh && wantsSha256(fields.get("want-repr-digest") ?? ""); // a fresh one may change yet
  const answerContent = () => answer(prepareContent(known, ranges, wantsDigest));
  return wantsDigest && known.digest === undefined ? hash(file).then(answerContent) : answerContent();
}

/** All that a response with content has before it is read. */
function prepareContent(known: KnownFile, ranges?: readonly ByteRange[], wantsDigest = false): Prepared {
  const { size, type, validators } = known;
  const contentRange = ({ from, to }: ByteRange) => `bytes ${from}-${to - 1}/${size}`;
  const fields: Record<string, string> = { "Content-Type": type, ...NO_SNIFF, "Accept-Ranges": "bytes", ...validators };
  const [range = { from: 0, to: size }, ...more] = ranges ?? [];
  let segments: readonly Segment[] = [range];
  if (more.length > 0) {
    const boundary = crypto.randomUUID(); // RFC 9110 §14.6: in multipart/byteranges each range has a head of its own
    const asSegment = (text: string) => ({ from: 0, to: text.length, text: encoder.encode(text) }); // it is ASCII
    const head = `\r\n--${boundary}\r\nContent-Type: ${type}\r\nContent-Range: `;
    const parts = [range, ...more].flatMap((one) => [asSegment(`${head}${contentRange(one)}\r\n\r\n`), one]);
    segments = [...parts, asSegment(`\r\n--${boundary}--\r\n`)];
    fields["Content-Type"] = `multipart/byteranges; boundary=${boundary}`;
  } else if (ranges !== undefined) fields["Content-Range"] = contentRange(range);
  if (wantsDigest && known.digest !== undefined) fields["Repr-Digest"] = `sha-256=:${known.digest}:`;
  const length = segments.reduce((sum, { from, to }) => sum + to - from, 0);
  fields["Content-Length"] = String(length);
  const status = ranges === undefined ? 200 : 206;
  return { status, head: formatHead(status, fields), content: NO_BYTES, segments, length };
}

/** Reads small content, and closes the file. Large content is read while it is sent. */
function respondContent(method: Method, { fd, known }: OpenFile, prepared: Prepared): Response {
  const { status, head, segments, length = 0 } = prepared;
  let { content } = prepared;
  if (segments !== undefined && method !== "HEAD") {
    const part = { fd, known, segments, length };
    if (length <= SMALL_FILE_BYTES_MAX) content = new Uint8Array(length);
    // A file that has just changed is sent as a large one: sendPart finds out whether it can be.
    if (content.length < length || readPart(part, 0, content) !== "same") return { ...prepared, part };
  }
  fs.closeSync(fd);
  return { status, head, content };
}

// ── what is sent ──

/** Reads what stands at a position of the content, and says what has become of the file. */
function readPart(part: Part, position: number, into: Uint8Array, expected = part.known.expected) {
  try {
    let start = -position; // of a segment, in `into`
    for (const { from, to, text } of part.segments) {
      const at = Math.max(0, start);
      const end = Math.min(into.length, start + to - from);
      const source = from + at - start;
      if (text === undefined && !readFully(part, into, at, end, source)) return "gone";
      if (text !== undefined && at < end) into.set(text.subarray(source, source + end - at), at);
      start += to - from;
    }
    const { size, mtimeMs } = fs.fstatSync(part.fd);
    // Not the time of the last change: moving, replacing or deleting a file changes that too.
    if (size === expected.size && mtimeMs === expected.mtimeMs) return "same";
    return size > expected.size ? "longer" : "changed";
  } catch (error) {
    report(`Error: ${(error as Error).message}`); // of node:fs: the disk fails
    return "gone";
  }
}

/** CRC-32 of the start of the content, as the file has it now. @returns undefined if it has less, or cannot be read */
async function checksumOf(part: Part, length: number): Promise<number | undefined> {
  let checksum = 0;
  for (let at = 0; at < length; at += PIECE_BYTES) {
    const bytes = piece.subarray(0, Math.min(PIECE_BYTES, length - at));
    if (readPart(part, at, bytes) === "gone") return undefined;
    checksum = Bun.hash.crc32(bytes, checksum);
    await nextTurn();
  }
  return checksum;
}

/**
 * Sends a part behind its head: reads a piece, sends it, and reads again what the kernel did not take. All of it must be
 * one version: of a file that has become longer, the last piece waits until a checksum tells that the rest is as it was.
 * @returns the octets sent; if not all, FIN follows: the peer keeps what it got, and Content-Length tells of the rest
 */
async function sendPart(connection: Connection, part: Part): Promise<number> {
  const { fd, known, segments, length } = part;
  const start = segments.length === 1 ? (segments[0]?.from ?? 0) : Number.NaN; // in the file, of a single range
  // A checksum takes time: a file that was the same for LIVELY_MS goes without, and is cut off if it grows.
  const isLively = Date.now() - known.stats.ctimeMs < LIVELY_MS;
  let [sent, checksum, expected] = [0, 0, known.expected];
  try {
    await connection.flush();
    for (let pieces = 1, warmTo = 0; sent < length && !connection.isGone; pieces++) {
      const position = start + sent;
      if (warmTo < position + PIECE_BYTES && performance.now() < slowUntil) {
        warmTo = Math.max(warmTo, position) + PIECE_BYTES;
        await warm(fd, warmTo - PIECE_BYTES);
      }
      const bytes = piece.subarray(0, Math.min(PIECE_BYTES, length - sent));
      let found = readPart(part, sent, bytes, expected);
      if (found === "changed") {
        await Bun.sleep(CLOCK_TICK_MS); // An append may show in the file's time before it shows in its length.
        found = readPart(part, sent, bytes, expected);
      }
      if (found === "longer" && sent + bytes.length === length) {
        expected = fs.fstatSync(fd);
        const isSame = sent === 0 || (isLively && checksum === (await checksumOf(part, sent)));
        await Bun.sleep(CLOCK_TICK_MS); // as above
        found = isSame ? readPart(part, sent, bytes, expected) : "changed";
      }
      if (found === "changed" || found === "gone") throw new Error(`${known.path} has changed or cannot be read`);
      const taken = bytes.subarray(0, connection.write(bytes, bytes.length));
      if (isLively) checksum = Bun.hash.crc32(taken, checksum);
      sent += taken.length;
      if (taken.length < bytes.length) await connection.waitForRoom();
      else if (pieces % PIECES_PER_TURN === 0) await nextTurn();
    }
  } catch (error) {
    report(`Error: ${(error as Error).message}: the connection is cut off`); // nothing but Errors is thrown here
  }
  fs.closeSync(fd);
  return sent;
}

// ── what a page shows ──

export type ListingEntry = Readonly<{ name: string; isFolder: boolean; size: number; modified: Date }>;

// ── shared: sizes ──
/** "1.2 MiB" */
function formatBytes(bytes: number): string {
  const power = Math.min(4, Math.floor(Math.log2(Math.max(1, bytes)) / 10));
  return `${(bytes / 1024 ** power).toFixed(power === 0 ? 0 : 1)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}
// ── end shared ──

/** The page of a folder. Links are relative, so that it works behind a proxy that puts the folder elsewhere. */
export function formatListing(path: readonly string[], entries: readonly ListingEntry[], unlisted = 0, unreadable = 0) {
  const { compare } = new Intl.Collator("en", { numeric: true }); // "file9" before "file10", and folders first
  const sorted = entries.toSorted((a, b) => Number(b.isFolder) - Number(a.isFolder) || compare(a.name, b.name));
  const items = sorted.map(formatListingEntry);
  if (path.length > 0) items.unshift('<li><a href="../">Parent folder</a></li>');
  const heading = Bun.escapeHTML(printable(["", ...path, ""].join("/")));
  const plural = (n: number, one: string, many = `${one}s`) => (n > 0 ? `${n} ${n === 1 ? one : many}` : "");
  const folders = entries.filter(({ isFolder }) => isFolder).length;
  const more = unlisted > 0 ? `and ${unlisted} more that the page leaves out` : "";
  const shown = [plural(folders, "folder"), plural(entries.length - folders, "file"), more].filter(Boolean).join(", ");
  const left = plural(unreadable, "name that is not UTF-8 is left out", "names that are not UTF-8 are left out");
  const about = shown + left === "" ? "This folder is empty" : "Times are in UTC";
  return `<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Index of ${heading}</title>
<style>${LISTING_STYLE}</style>
<main>
<h1><bdi>${heading}</bdi></h1>
<ul role="list">
${items.join("\n")}
</ul>
<p>${[shown, left, about].filter(Boolean).join(". ")}.</p>
</main>
</html>
`;
}

function formatListingEntry({ name, isFolder, size, modified }: ListingEntry): string {
  const slash = isFolder ? "/" : "";
  const href = encodeURIComponent(name).replaceAll("'", "%27") + slash;
  const link = `<a href="${href}"><bdi>${Bun.escapeHTML(printable(name))}</bdi>${slash}</a>`;
  const time = Number.isNaN(modified.getTime()) ? "" : modified.toISOString(); // a date that no calendar has
  const length = isFolder ? "" : `<span title="${size} bytes">${formatBytes(size)}</span>`;
  return `<li>${link} ${length} <time datetime="${time}">${time.slice(0, 16).replace("T", " ")}</time></li>`;
}

// Browsers that do not know "light-dark" use their own colours. Icons are clipped boxes: a link that ends in a slash is
// a folder. A link covers its whole row, as a target for a thumb. On a phone, time and size stand below the name.
const LISTING_STYLE = `
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 58rem; margin: auto; padding: 1rem .5rem;
  color: light-dark(#1c2024, #e4e7ea); background: light-dark(#fff, #14161a); }
h1 { font-size: 1.25rem; padding: 0 .5rem; }
h1, a { overflow-wrap: anywhere; white-space: pre-wrap; }
ul { margin: 0; padding: 0; }
li, p { margin: 0; padding: .5rem; border-top: 1px solid light-dark(#e3e6ea, #2c3036); }
li { position: relative; display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline; padding-left: 2.25rem; }
li:hover { background: light-dark(#f3f6f9, #1d2025); }
a { flex: 1; text-decoration: none; color: light-dark(#0a58ca, #8ab8ff); }
a:visited { color: light-dark(#6b3fa0, #c3a6f2); }
a::after { content: ""; position: absolute; inset: 0; }
a::before { content: ""; position: absolute; left: .5rem; top: .75rem; width: 1rem; height: 1rem;
  background: #8b949e; clip-path: polygon(12% 0, 60% 0, 88% 28%, 88% 100%, 12% 100%); }
[href$="/"]::before { background: light-dark(#3b82d6, #6ba6f0);
  clip-path: polygon(0 8%, 40% 8%, 52% 22%, 100% 22%, 100% 92%, 0 92%); }
[href="../"]::before { clip-path: polygon(50% 4%, 96% 50%, 64% 50%, 64% 96%, 36% 96%, 36% 50%, 4% 50%); }
span, time, p { font-size: .875rem; color: light-dark(#59626d, #9aa3ae); font-variant-numeric: tabular-nums; }
time { min-width: 9rem; text-align: right; }
@media (max-width: 40rem) { a { flex: 100%; } time { flex: 1; text-align: left; } span { order: 1; } }
`;

// ═══ 12 Main ═════════════════════════════════════════════════════════════════════════════════════

if (import.meta.main) main();
