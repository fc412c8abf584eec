#!/usr/bin/env bun
/**
 * client-robust.ts: stage 3, the client made efficient and stable.
 *
 *     bun client-robust.ts                              # GET http://localhost:8888/data
 *     bun client-robust.ts http://example.test/a.html   # another URL: head, then content
 *     bun client-robust.ts -o a.iso http://example.test/a.iso
 *
 * It receives in a loop until the framing says that the response is complete (RFC 9112 §6.3), never
 * because no more bytes came. What can pass is tried again, and goes on where it broke off: the bytes
 * are those of one version of the content, or there is a failure, with curl's exit code. Memory is
 * constant. The heart is `transfer`, in section 8: try { connect; send; while … receive } catch … finally.
 *
 * Left out: HTTP/2, compression, cookies, proxies, several URLs.
 *
 *  1 Limits and defaults    what is bounded, by how much, and why
 *  2 Types                  the words that the rest is written in
 *  3 Errors                 every way to fail, and the exit code it has
 *  4 Parsing                bytes → response head, bytes → content (pure)
 *  5 Formatting             request → bytes (pure)
 *  6 Application            what to do with a response, and after a failure (pure)
 *  7 Connection             what has been received and not been asked for; what is held of the content
 *  8 Sockets                connect, the heart, and the loop around it
 *  9 Command line           flags, where the content goes
 * 10 Main
 */
import * as fs from "node:fs";
import { parseArgs } from "node:util";

// ═══ 1 Limits and defaults ═══════════════════════════════════════════════════════════════════════

export const VERSION = "0.1.0";

export const LIMITS = Object.freeze({
  /** The whole head. Twice what servers take in a request: some set many large cookies. */
  headBytesMax: 65_536,
  /** Twice what servers take in a request. */
  fieldLinesMax: 200,
  /** RFC 9110 §15.2: a client reads any number of 1xx; nobody has reason to send more than a few. */
  interimResponsesMax: 100,
  /** By so much chunk extensions may outweigh the content. Some servers sign each chunk with 85 bytes. */
  chunkExtensionBytesMax: 1_048_576,
  /** Received and not yet taken: past this we stop reading and TCP slows the server down. */
  receivedBytesMax: 1_048_576,
  /** stdout was made non-blocking by somebody else and is full: how long until the next try. */
  writeRetryMs: 10,
  /** The first retry waits up to a second, the next up to two, then four …, but never more than a minute. */
  backoffFirstMs: 1000,
  backoffMaxMs: 60_000,
  /** The disk is told to begin after so much. */
  syncEveryBytes: 67_108_864,
  /** As curl. */
  redirectsMax: 50,
  /** The progress line: not for what is done at once, and not more often than an eye can follow. */
  progressAfterMs: 1000,
  progressEveryMs: 200,
});

export const DEFAULTS = Object.freeze({
  url: "http://localhost:8888/data",
  /** A SYN is sent again after 1, 3 and 7 s: this allows for three that were lost. */
  connectTimeoutS: 10,
  /** No byte for so long. Slow is no failure; silence is. */
  stallTimeoutS: 30,
  /** Attempts after the first one that bring nothing new. */
  retries: 3,
});

// ═══ 2 Types ═════════════════════════════════════════════════════════════════════════════════════

export interface Request {
  readonly method: string;
  readonly url: URL;
  /** Field-lines of the user's, which stand for those of the same name that would be sent otherwise. */
  readonly fields: readonly (readonly [name: string, value: string])[];
  readonly content: Uint8Array | undefined;
}

/** A response head. Field names are in lower case, in the order of arrival. */
export interface ResponseHead {
  readonly status: number;
  readonly reasonPhrase: string;
  readonly minorVersion: number;
  readonly fields: readonly (readonly [name: string, value: string])[];
  /** The head as it came, one character a byte. */
  readonly text: string;
}

/** Where content ends (RFC 9112 §6.3): after so many octets, with the last chunk, with the connection. */
export type Framing = number | "chunked" | "close";

/** Where the content goes. It is written from its start to its end, or started over. */
export interface Sink {
  /** What an earlier run has left there. */
  readonly found: Held;
  /** The final head is here; content follows, of this version. */
  start(head: ResponseHead, held: Held): Promise<void>;
  write(content: Uint8Array): Promise<void>;
  /** Throws away what was written. */
  startOver(): Promise<void>;
  /** The whole has been written: it may be shown as such. */
  finish(): Promise<void>;
  /** SHA-256 in hex of all that was written, where it can be read again. */
  digest(): Promise<string | undefined>;
  /** Whatever happened, this is called last. @returns how to go on, where that is possible */
  close(): Promise<string>;
}

export interface Timeouts {
  readonly connectMs: number;
  readonly stallMs: number;
  /** For everything; may be Infinity. */
  readonly maxMs: number;
}

/** Who is believed when a server says who it is (https). */
export interface Trust {
  /** A file of authorities in PEM; undefined for those of the system. */
  readonly authoritiesFile: string | undefined;
  /** Anybody is believed. */
  readonly isInsecure: boolean;
}

/** All that the user asked for. */
export interface Job {
  readonly request: Request;
  readonly policy: Policy;
  readonly timeouts: Timeouts;
  readonly trust: Trust;
  /** The SHA-256 that the content must have, in lower-case hex; "" where any will do. */
  readonly sha256: string;
  readonly isSilent: boolean;
  readonly isVerbose: boolean;
}

// ═══ 3 Errors ════════════════════════════════════════════════════════════════════════════════════

/** Outcomes and their exit codes: curl's, so that scripts need not learn new ones. */
export const EXIT_CODES = Object.freeze({
  ok: 0,
  usage: 2,
  url: 3,
  resolve: 6,
  connect: 7,
  unparsable: 8,
  partial: 18,
  status: 22,
  write: 23,
  timeout: 28,
  /** No code of curl's that is in use: the content is whole, but is not what a digest says. */
  digest: 29,
  /** Never shown: the server's part does not fit what is held. */
  range: 33,
  tls: 35,
  redirects: 47,
  empty: 52,
  send: 55,
  receive: 56,
  certificate: 60,
  tooLarge: 63,
});
export type Outcome = keyof typeof EXIT_CODES;

/** A transfer that failed: `outcome` says how, the message says it in a line. */
export class TransferError extends Error {
  /** RFC 9110 §10.2.3: do not come back before. */
  readonly retryAfterMs: number;
  /** True where another attempt cannot help, though the outcome alone would not say so. */
  readonly isFinal: boolean;
  /** True where a line on stderr would only disturb: `| head` has what it wanted. */
  readonly isQuiet: boolean;
  /** True where the response was whole, but only a part of what is missing: the server is in order, and has more. */
  readonly isPart: boolean;

  constructor(
    readonly outcome: Outcome,
    message: string,
    { retryAfterMs = 0, isFinal = false, isQuiet = false, isPart = false } = {},
  ) {
    super(message);
    [this.retryAfterMs, this.isFinal, this.isQuiet, this.isPart] = [retryAfterMs, isFinal, isQuiet, isPart];
  }
}

/** What Bun and node:fs throw. */
type SystemError = Error & { code?: string; syscall?: string };

// ═══ 4 Parsing ═══════════════════════════════════════════════════════════════════════════════════
//
// A parser reads bytes and keeps where it is, so that it goes on where it stopped when more bytes
// come: the outcome is the same however a message was split.

// ── shared: byte classes ──
const [LF, CR] = [0x0a, 0x0d];

const EVERY_BYTE = String.fromCharCode(...Array(256).keys());

/** The class of the bytes that a pattern matches, read as ISO 8859-1: a table of 256, 1 for a member. */
function bytesLike(pattern: RegExp): Uint8Array {
  const members = new Uint8Array(256);
  for (const { index } of EVERY_BYTE.matchAll(pattern)) members[index] = 1;
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
/** chunk-size [ chunk-ext ], chunk-ext = *( BWS ";" BWS token [ BWS "=" BWS ( token / quoted-string ) ] ) */
const CHUNK_LINE = new RegExp(
  `^([\\dA-Fa-f]+)((?:[\\t ]*;[\\t ]*${TOKEN}(?:[\\t ]*=[\\t ]*(?:${TOKEN}|${QUOTED_STRING}))?)*)`,
);
/** field-line = field-name ":" OWS field-value OWS */
const FIELD_LINE = new RegExp(`^(${TOKEN}):[\\t\\x20-\\x7e\\x80-\\xff]*$`);

/** A longer line is refused, whatever its extensions may weigh: it has to be held until its end has come. */
const CHUNK_LINE_BYTES_MAX = 131_072;
const CHUNK_SIZE_DIGITS_MAX = 64;
/** What may stand behind a chunk-size: an extension, or the end of the line. */
const CHUNK_SIZE_END = bytesLike(/[\t ;\r\n]/g);

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
    if (this.state === "data") return this.takeData(from, to);
    if (from === to || this.state === "done" || this.state === "failed") return from;
    // Refused at once: what cannot become a line that fits.
    if (this.state === "line" && !this.mayBeSize(bytes, from, to)) return this.fail("chunk-size", from);
    if (this.state === "data-end" && bytes[from] !== CR) return this.fail("chunk-data", from);
    const end = skipWhile(FIELD_CONTENT, bytes, from + this.known, to);
    this.known = end - from;
    if (this.isTooLong(this.known)) return from;
    if (end === to || (bytes[end] === CR && end + 1 === to)) return from;
    this.known = 0;
    if (bytes[end] === LF) return this.fail("bare-lf", end);
    if (bytes[end] !== CR) return this.fail(this.state === "trailer" ? "trailer" : "chunk-extension", end);
    if (bytes[end + 1] !== LF) return this.fail(this.state === "data-end" ? "chunk-data" : "bare-cr", end);
    if (this.state === "line") this.takeChunkLine(latin1(bytes, from, end));
    else if (this.state === "trailer") this.takeTrailerLine(latin1(bytes, from, end));
    else this.state = "line";
    return end + 2;
  }

  private takeData(from: number, to: number): number {
    this.contentTo = Math.min(to, from + this.left);
    this.left -= this.contentTo - from;
    if (this.left === 0) this.state = "data-end";
    return this.contentTo;
  }

  /** The digits are bounded, or leading zeros would go on without end. */
  private mayBeSize(bytes: Uint8Array, from: number, to: number): boolean {
    const end = skipWhile(HEXDIG, bytes, from, Math.min(to, from + CHUNK_SIZE_DIGITS_MAX + 1));
    const length = end - from;
    return length > 0 && length <= CHUNK_SIZE_DIGITS_MAX && (end === to || CHUNK_SIZE_END[byteAt(bytes, end)] === 1);
  }

  /** Bounds a line before its end has come. */
  private isTooLong(length: number): boolean {
    if (this.state === "trailer" && this.trailerBytes + length + 2 > this.limits.headBytesMax)
      this.fail("trailer-too-large", 0);
    else if (this.state === "line" && length > CHUNK_LINE_BYTES_MAX) this.fail("chunk-extension", 0);
    return this.state === "failed";
  }

  private takeChunkLine(line: string): void {
    const [known, size = "", extensions = ""] = CHUNK_LINE.exec(line) ?? [];
    this.left = Number.parseInt(size, 16);
    // Past 2^53 sums stop being exact: refuse, never wrap around.
    if (this.left + this.announced > Number.MAX_SAFE_INTEGER) return void this.fail("chunk-size", 0);
    // All extensions together may outweigh the content only by so much, or tiny chunks would keep the recipient busy.
    this.extensionBytes += extensions.length;
    const excess = this.extensionBytes - this.announced;
    if (known !== line || excess > this.limits.chunkExtensionBytesMax) return void this.fail("chunk-extension", 0);
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

const IS_TOKEN = /^[!#$%&'*+\-.^_`|~0-9A-Za-z]+$/;
/** status-line = HTTP-version SP status-code SP [ reason-phrase ] (RFC 9112 §4); the last SP is often forgotten. */
const STATUS_LINE = /^HTTP\/1\.(\d) (\d{3})(?: ([\t\x20-\x7e\x80-\xff]*))?$/;

const NO_STATUS_LINE = "its first line is not a status-line of HTTP/1";

/**
 * Parses a response head line by line (RFC 9112 §4 and §5).
 *
 * Call {@link next} until the bytes are used up or `state` is "done" or "failed".
 */
export class ResponseHeadParser {
  state: "status-line" | "field-line" | "done" | "failed" = "status-line";
  /** Why, once `state` is "failed". */
  fault = "";
  status = 0;
  reasonPhrase = "";
  minorVersion = 0;
  readonly fields: [name: string, value: string][] = [];
  /** The head as it came so far, and where its line under way starts. */
  text = "";
  private lineFrom = 0;

  /** Reads from `from` on; returns the index after what it has used, `to` at the most. */
  next(bytes: Uint8Array, from: number, to: number): number {
    let at = from;
    while (at < to && (this.state === "status-line" || this.state === "field-line")) {
      const lf = bytes.subarray(at, to).indexOf(LF);
      const end = lf < 0 ? to : at + lf + 1;
      this.text += latin1(bytes, at, end);
      at = end;
      if (this.text.length > LIMITS.headBytesMax) this.fail("the head is too large");
      // What does not start like a response will not become one: the end of its line is not waited for.
      else if (!"HTTP/1.".startsWith(this.text.slice(0, 7))) this.fail(NO_STATUS_LINE);
      else if (lf >= 0) this.endLine(this.text.slice(this.lineFrom));
    }
    return at;
  }

  /** No more bytes will come. A CR inside the last line makes it malformed, and not merely cut. */
  end(): void {
    if (this.text.slice(this.lineFrom, -1).includes("\r")) this.fail("a line of its head has CR without LF");
  }

  private endLine(lineAndEnd: string): void {
    this.lineFrom = this.text.length;
    if (!lineAndEnd.endsWith("\r\n")) return this.fail("a line ends in LF without CR");
    const line = lineAndEnd.slice(0, -2);
    if (this.state === "status-line") this.takeStatusLine(line);
    else if (line === "") this.state = "done";
    else if (line.startsWith(" ") || line.startsWith("\t")) this.takeFoldedLine(line);
    else this.takeFieldLine(line);
  }

  private takeStatusLine(line: string): void {
    const [, minor, status, reasonPhrase = ""] = STATUS_LINE.exec(line) ?? [];
    // RFC 9110 §15: the first digit is the class, and there is none below 1.
    if (status === undefined || Number(status) < 100) return this.fail(NO_STATUS_LINE);
    this.status = Number(status);
    this.minorVersion = Number(minor);
    this.reasonPhrase = reasonPhrase;
    this.state = "field-line";
  }

  private takeFieldLine(line: string): void {
    const name = FIELD_LINE.exec(line)?.[1];
    if (name === undefined) return this.fail("a line of its head is not a field-line");
    if (this.fields.length === LIMITS.fieldLinesMax) return this.fail("it has too many field-lines");
    this.fields.push([name.toLowerCase(), trimOws(line.slice(name.length + 1))]);
  }

  /** RFC 9112 §5.2: a user agent reads obs-fold as SP. Before the first field-line it is a fault (§2.2). */
  private takeFoldedLine(line: string): void {
    const last = this.fields.at(-1);
    if (last === undefined || !FIELD_LINE.test(`x:${line}`)) return this.fail("a line of its head is not a field-line");
    last[1] = [last[1], trimOws(line)].filter((part) => part !== "").join(" ");
  }

  private fail(fault: string): void {
    this.state = "failed";
    this.fault = fault;
  }
}

/** All values of a field, in lower-case name. */
export const fieldValues = (head: { fields: ResponseHead["fields"] }, name: string): string[] =>
  head.fields.filter(([fieldName]) => fieldName === name).map(([, value]) => value);

/**
 * Where the content of a response ends: RFC 9112 §6.3, item by item.
 * @returns the framing, or a text that says why there is no telling
 */
export function decideFraming(head: ResponseHead, method: string): { framing: Framing } | { fault: string } {
  // Item 1: never any content, whatever the fields say.
  if (method === "HEAD" || head.status < 200 || head.status === 204 || head.status === 304) return { framing: 0 };
  // Item 2 is about CONNECT, which this client does not send.
  const codings = fieldValues(head, "transfer-encoding");
  const lengths = fieldValues(head, "content-length").flatMap((value) => value.split(",").map(trimOws));
  if (codings.length > 0) {
    // Item 3: both present is an attempt at smuggling or at splitting.
    if (lengths.length > 0) return { fault: "it has both Content-Length and Transfer-Encoding" };
    // §6.1: an HTTP/1.0 server cannot know it: its framing is faulty.
    if (head.minorVersion === 0) return { fault: "it has Transfer-Encoding in HTTP/1.0" };
    // Item 4: we asked for no coding, so there is none but chunked.
    return /^chunked$/i.test(codings.join(", "))
      ? { framing: "chunked" }
      : { fault: "its transfer coding is not chunked" };
  }
  // Item 8: no length at all: until the connection is closed.
  if (lengths.length === 0) return { framing: "close" };
  // Items 5 and 6: one value, or the same one again.
  const length = Number(lengths[0]);
  const isOne = lengths.every((value) => /^\d+$/.test(value) && value === lengths[0]);
  return isOne && Number.isSafeInteger(length)
    ? { framing: length }
    : { fault: "its Content-Length is not one number" };
}

/**
 * Reads one response: interim heads (1xx), the final head, the content, and no byte after it.
 *
 * Give {@link take} what was received. It returns what of it is content; then `head` tells whether the
 * final head is here, `isComplete` whether all is, and `fault` what is wrong with it, if anything is.
 */
export class ResponseReader {
  head: ResponseHead | undefined;
  isComplete = false;
  fault = "";
  /** Octets of content so far. */
  contentBytes = 0;
  framing: Framing = "close";
  private parser = new ResponseHeadParser();
  private interimResponses = 0;
  private readonly decoder = new ChunkedDecoder(LIMITS, true);
  /** The beginning of a line of chunked content that has not come to its end. */
  private rest: Uint8Array = new Uint8Array(0);

  constructor(private readonly method: string) {}

  /** True while nothing has been received. */
  get isEmpty(): boolean {
    return this.head === undefined && this.interimResponses === 0 && this.parser.text === "";
  }

  /** The content is compacted in place: the bytes must be the caller's to give away. */
  take(bytes: Uint8Array): Uint8Array {
    const from = this.head === undefined ? this.takeHeads(bytes) : 0;
    if (this.head === undefined || this.isComplete || this.fault !== "") return bytes.subarray(0, 0);
    const content = this.framing === "chunked" ? this.takeChunked(bytes, from) : this.takePlain(bytes, from);
    this.contentBytes += content.length;
    if (this.contentBytes === this.framing) this.isComplete = true;
    return content;
  }

  /**
   * The peer will send no more. RFC 9112 §8: only content without a length may end like this, and over TLS only where
   * the peer has said so (§9.8): anybody on the way can cut a connection off.
   */
  end(isInOrder: boolean): void {
    if (this.head === undefined) this.parser.end();
    if (this.parser.state === "failed") this.fault = this.parser.fault;
    if (this.head !== undefined && this.framing === "close" && isInOrder) this.isComplete = true;
  }

  private takeHeads(bytes: Uint8Array): number {
    let at = 0;
    while (at < bytes.length && this.head === undefined && this.fault === "") {
      at = this.parser.next(bytes, at, bytes.length);
      if (this.parser.state === "failed") this.fault = this.parser.fault;
      if (this.parser.state === "done") this.endHead(this.parser);
    }
    return at;
  }

  private endHead(head: ResponseHeadParser): void {
    // RFC 9110 §15.2.2: 101 answers an Upgrade, and we sent none.
    if (head.status === 101) this.fault = "it switches protocols, and nobody asked for that";
    else if (head.status < 200) {
      this.parser = new ResponseHeadParser();
      if (++this.interimResponses > LIMITS.interimResponsesMax) this.fault = "it has too many interim responses";
    } else {
      const decision = decideFraming(head, this.method);
      if ("fault" in decision) this.fault = decision.fault;
      else {
        this.head = head;
        this.framing = decision.framing;
        this.isComplete = decision.framing === 0;
      }
    }
  }

  private takePlain(bytes: Uint8Array, from: number): Uint8Array {
    const left = this.framing === "close" ? Number.POSITIVE_INFINITY : Number(this.framing) - this.contentBytes;
    return bytes.subarray(from, Math.min(bytes.length, from + left));
  }

  private takeChunked(piece: Uint8Array, pieceFrom: number): Uint8Array {
    const { decoder } = this;
    let [bytes, from] = [piece, pieceFrom];
    // The beginning of a line that came before: the decoder wants all of a line at once.
    if (this.rest.length > 0) [bytes, from] = [Buffer.concat([this.rest, piece.subarray(pieceFrom)]), 0];
    let [at, to] = [from, from];
    while (!this.isComplete && this.fault === "") {
      const next = decoder.next(bytes, at, bytes.length);
      // Content moves left, over the framing: one piece is left to write, and nothing is allocated.
      bytes.copyWithin(to, decoder.contentFrom, decoder.contentTo);
      to += decoder.contentTo - decoder.contentFrom;
      if (decoder.state === "done") this.isComplete = true;
      if (decoder.fault !== "") this.fault = `its chunked content is malformed (${decoder.fault})`;
      if (next === at) break;
      at = next;
    }
    this.rest = new Uint8Array(bytes.subarray(at)); // a copy: Buffer's own slice would not be one
    return bytes.subarray(from, to);
  }
}

/** close_notify as TLS 1.3 sends it: level, description and inner type under a tag of 16 bytes (RFC 8446 §5.2, §6). */
const ALERT_RECORD_LENGTH = 19;
const [ALERT, APPLICATION_DATA] = [21, 23];

/**
 * Watches TLS records go by (RFC 8446 §5.1), encrypted as they are, to tell whether the peer closed in order: whether
 * its last record was an alert. In TLS 1.3 an alert looks like content, but for its length and that no content came
 * of it.
 */
export class RecordWatch {
  private readonly header = new Uint8Array(5);
  private headerLength = 0;
  private left = 0;
  private type = 0;
  private length = 0;
  /** Content that the records of the last read had room for, and content that came of them. */
  private room = 0;
  private content = 0;

  /** Records, or pieces of them, before they are decrypted. */
  take(bytes: Uint8Array): void {
    this.room = this.content = 0;
    for (let at = 0; at < bytes.length;) {
      if (this.left === 0) this.takeHeaderByte(byteAt(bytes, at++));
      else {
        const taken = Math.min(this.left, bytes.length - at);
        at += taken;
        this.left -= taken;
        if (this.left === 0 && this.type === APPLICATION_DATA) this.room += this.length - ALERT_RECORD_LENGTH + 2;
      }
    }
  }

  /** So much content came of what was taken last. */
  noteContent(length: number): void {
    this.content += length;
  }

  get endsInOrder(): boolean {
    if (this.left > 0 || this.headerLength > 0) return false;
    if (this.type === ALERT) return true;
    return this.type === APPLICATION_DATA && this.length === ALERT_RECORD_LENGTH && this.content < this.room;
  }

  private takeHeaderByte(byte: number): void {
    this.header[this.headerLength++] = byte;
    if (this.headerLength < 5) return;
    this.headerLength = 0;
    this.type = byteAt(this.header, 0);
    this.left = this.length = byteAt(this.header, 3) * 256 + byteAt(this.header, 4);
  }
}

// ═══ 5 Formatting ════════════════════════════════════════════════════════════════════════════════

/**
 * The request as it goes over the wire (RFC 9112 §3; Host: §3.2), for all of the content, or for what is missing of
 * it: RFC 9110 §14.2 and §13.1.5 give the rest only while the version is the same.
 */
export function formatRequest({ method, url, fields, content }: Request, held: Held): Uint8Array {
  const all = new Map<string, readonly [name: string, value: string]>();
  const set = (name: string, value: string) => all.set(name.toLowerCase(), [name, value]);
  set("Host", url.host);
  set("User-Agent", `http-over-tcp/${VERSION}`);
  set("Accept", "*/*");
  // RFC 9530 §4: then what comes can be verified.
  set("Want-Repr-Digest", "sha-256=10");
  if (content !== undefined) set("Content-Type", "application/x-www-form-urlencoded");
  const names = new Set(fields.map(([name]) => name.toLowerCase()));
  for (const name of names) all.delete(name);
  if (content !== undefined) set("Content-Length", String(content.length));
  set("Connection", "close");
  if (held.bytes > 0) {
    set("Range", `bytes=${resumeFrom(held)}-`);
    set("If-Range", held.etag);
  }
  const own = fields.filter(([, value]) => value !== "");
  const lines = [...all.values(), ...own].map(([name, value]) => `${name}: ${value}\r\n`);
  // Values may be any bytes but CTL; the command line has made them ISO 8859-1, one character a byte.
  const head = Buffer.from(`${method} ${url.pathname}${url.search} HTTP/1.1\r\n${lines.join("")}\r\n`, "latin1");
  return content === undefined ? head : Buffer.concat([head, content]);
}

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

// ═══ 6 Application ═══════════════════════════════════════════════════════════════════════════════
//
// The whole policy of retrying and resuming: two pure functions. `judgeHead` says what to do with a
// response once its head is here, `decideNext` what to do after an attempt has failed.

/** What is held of the content: so many bytes from its start, of the version that the entity-tag names. */
export interface Held {
  readonly bytes: number;
  /** A strong entity-tag, which names these very bytes (RFC 9110 §8.8.3); "" where there is none. */
  readonly etag: string;
  /** The length of the whole, where a response has told it. */
  readonly total: number | undefined;
}

/**
 * The byte to go on from. Where the end may have been reached already, that is the last one which is held: of what
 * lies behind the end there is no part, and a server that says so (416) need not say of which version.
 */
export const resumeFrom = ({ bytes, total }: Held) => (total === undefined || bytes === total ? bytes - 1 : bytes);

export const NOTHING: Held = Object.freeze({ bytes: 0, etag: "", total: undefined });

/** What the user asked for, as far as decisions depend on it. */
export interface Policy {
  readonly method: string;
  /** Only the content is kept, and only that of a 2xx. */
  readonly keepsOnlyContent: boolean;
  /** Content that is held can be thrown away; what is on stdout cannot. */
  readonly canStartOver: boolean;
  readonly followsRedirects: boolean;
  readonly retries: number;
  readonly retryMaxMs: number;
  readonly sizeMax: number;
}

/** What to do with a response whose head is here. */
export type Verdict =
  /** Its content is what was asked for, from byte `from` of the whole; `startsOver`: drop what is held. */
  | { readonly action: "deliver"; readonly from: number; readonly startsOver: boolean; readonly held: Held }
  /** There is nothing more to come: what is held is the whole. */
  | { readonly action: "complete" }
  | { readonly action: "redirect"; readonly status: number; readonly location: string }
  | { readonly action: "fail"; readonly failure: TransferError };

/** RFC 9110 §15: what may be gone the next time. */
const PASSING_STATUSES: ReadonlySet<number> = new Set([408, 429, 500, 502, 503, 504]);
const REDIRECT_STATUSES: ReadonlySet<number> = new Set([301, 302, 303, 307, 308]);

/** RFC 9110 §9.2.2: asking twice is as good as asking once. */
const IDEMPOTENT_METHODS: ReadonlySet<string> = new Set(["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"]);

/** The entity-tag of a response, if it is a strong one; "" otherwise. */
export function strongEtag(head: { fields: ResponseHead["fields"] }): string {
  const values = fieldValues(head, "etag");
  return values.length === 1 && /^"[\x21\x23-\x7e\x80-\xff]*"$/.test(values[0] ?? "") ? (values[0] ?? "") : "";
}

/**
 * What to do with a response, where `held` is what we have and, unless that is nothing, asked to go on from.
 * @param isLastTry no further attempt will follow: an error page is what there is to show
 */
export function judgeHead(head: ResponseHead, held: Held, policy: Policy, isLastTry: boolean): Verdict {
  const { status } = head;
  if (policy.followsRedirects && REDIRECT_STATUSES.has(status)) {
    const [location] = fieldValues(head, "location");
    if (location !== undefined) return { action: "redirect", status, location };
  }
  const isResuming = held.bytes > 0;
  // RFC 9110 §14.4, §15.5.17: only an answer to Range may be a part, or say that there is none.
  if (status === 206 && isResuming) return judgePart(head, held, policy);
  if (status === 206 && policy.keepsOnlyContent)
    return failed("range", "the server sent a part of the content, unasked");
  if (status === 416 && isResuming) return judgeUnsatisfiable(head, held, policy);
  if (PASSING_STATUSES.has(status) && !isLastTry) return failed("status", describeStatus(head), parseRetryAfter(head));
  if (!isSuccess(head) && (policy.keepsOnlyContent || isResuming))
    return failed("status", describeStatus(head), 0, true);
  return judgeWhole(head, held, policy);
}

/** A whole response: what is held of the same version is passed over, what is held of another is dropped. */
function judgeWhole(head: ResponseHead, held: Held, policy: Policy): Verdict {
  const etag = policy.method === "GET" && head.status === 200 ? strongEtag(head) : "";
  const decision = decideFraming(head, policy.method);
  const total = "framing" in decision && typeof decision.framing === "number" ? decision.framing : undefined;
  if (total !== undefined && total > policy.sizeMax) return tooLarge(policy);
  // What an earlier response said of this version still holds: its length, if this one does not tell any.
  const isSame = etag !== "" && etag === held.etag && (total ?? held.total) === (held.total ?? total);
  if (held.bytes === 0 || isSame) {
    const known = { ...held, etag, total: total ?? (isSame ? held.total : undefined) };
    return { action: "deliver", from: 0, startsOver: false, held: known };
  }
  if (!policy.canStartOver) return failed("partial", CHANGED, 0, true);
  return { action: "deliver", from: 0, startsOver: true, held: { bytes: 0, etag, total } };
}

const CHANGED = "the content has changed since its first part was printed, which cannot be taken back";

/** RFC 9110 §14.4: Content-Range = "bytes" SP first "-" last "/" complete-length; "*" where that is not known. */
const CONTENT_RANGE = /^bytes (\d{1,15})-(\d{1,15})\/(\d{1,15}|\*)$/i;

/** A part is used only if it begins where what is held ends, and is of the same version. */
function judgePart(head: ResponseHead, held: Held, policy: Policy): Verdict {
  const values = fieldValues(head, "content-range");
  const [, first, last, complete] = CONTENT_RANGE.exec(values.length === 1 ? (values[0] ?? "") : "") ?? [];
  const total = complete === "*" ? held.total : Number(complete);
  const decision = decideFraming(head, policy.method);
  const length = "framing" in decision && typeof decision.framing === "number" ? decision.framing : undefined;
  const from = resumeFrom(held);
  const isWhatFollows =
    Number(first) === from &&
    total !== undefined &&
    total === (held.total ?? total) &&
    // RFC 9110 §15.3.7: it may be less than what was asked for; the next attempt gets the rest.
    Number(last) >= from &&
    Number(last) < total &&
    (length ?? Number(last) - from + 1) === Number(last) - from + 1 &&
    (fieldValues(head, "etag").length === 0 || strongEtag(head) === held.etag);
  if (!isWhatFollows) return failed("range", "the server sent another part than the one that is missing");
  if (total > policy.sizeMax) return tooLarge(policy);
  return { action: "deliver", from, startsOver: false, held: { ...held, total } };
}

/** RFC 9110 §15.5.17: nothing lies behind what is held. It is the whole only if its length and version say so. */
function judgeUnsatisfiable(head: ResponseHead, held: Held, policy: Policy): Verdict {
  const [, complete] = /^bytes \*\/(\d{1,15})$/i.exec(fieldValues(head, "content-range").join()) ?? [];
  if (Number(complete) === held.bytes && strongEtag(head) === held.etag && held.etag !== "")
    return { action: "complete" };
  return policy.canStartOver ? failed("range", "the server has no such part") : failed("partial", CHANGED, 0, true);
}

const failed = (outcome: Outcome, message: string, retryAfterMs = 0, isFinal = false): Verdict => ({
  action: "fail",
  failure: new TransferError(outcome, message, { retryAfterMs, isFinal }),
});
const tooLarge = ({ sizeMax }: Policy) => failed("tooLarge", `the content is larger than ${sizeMax} bytes`);
/** RFC 9110 §15.3: 2xx. */
const isSuccess = ({ status }: ResponseHead) => status >= 200 && status < 300;
const describeStatus = ({ status, reasonPhrase }: ResponseHead) =>
  `the server answered ${status} ${reasonPhrase}`.trimEnd();

/** RFC 9110 §10.2.3: Retry-After = HTTP-date / delay-seconds. @returns milliseconds from now; 0 where it says nothing */
export function parseRetryAfter(head: ResponseHead, now = Date.now()): number {
  const [value = ""] = fieldValues(head, "retry-after");
  if (/^\d{1,9}$/.test(value)) return Number(value) * 1000;
  const date = /^[A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} \d{2}:\d{2}:\d{2} GMT$/.test(value)
    ? Date.parse(value)
    : Number.NaN;
  return Number.isNaN(date) ? 0 : Math.max(0, date - now);
}

/** The request that a redirect asks for (RFC 9110 §15.4), with nothing in it that only the first server may know. */
export function redirect(request: Request, status: number, url: URL): Request {
  const becomesGet = request.method === "POST" ? status <= 303 : status === 303 && request.method !== "HEAD";
  const isElsewhere = url.origin !== request.url.origin;
  const fields = request.fields.filter(([name]) => !(isElsewhere && SECRET_FIELDS.has(name.toLowerCase())));
  const same = { ...request, url, fields };
  return becomesGet ? { ...same, method: "GET", content: undefined } : same;
}

const SECRET_FIELDS: ReadonlySet<string> = new Set(["authorization", "cookie", "host", "proxy-authorization"]);

// ── shared: sizes ──
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** "1.2 MiB" */
function formatBytes(bytes: number): string {
  const power = Math.min(UNITS.length - 1, Math.floor(Math.log2(Math.max(1, bytes)) / 10));
  return `${(bytes / 1024 ** power).toFixed(power === 0 ? 0 : 1)} ${UNITS[power]}`;
}
// ── end shared ──

/** "1.2 MiB of 3.4 MiB, 35 %, 0.5 MiB/s, 4 s left" */
export function formatProgress(bytes: number, total: number | undefined, bytesPerSecond: number): string {
  const speed = `${formatBytes(bytesPerSecond)}/s`;
  if (total === undefined || total === 0) return `${formatBytes(bytes)}, ${speed}`;
  const left = bytesPerSecond > 0 ? `, ${Math.ceil((total - bytes) / bytesPerSecond)} s left` : "";
  return `${formatBytes(bytes)} of ${formatBytes(total)}, ${Math.floor((100 * bytes) / total)} %, ${speed}${left}`;
}

/** What an attempt has come to, for {@link decideNext}. */
export interface Attempt {
  readonly failure: TransferError;
  /** The request may have reached the server. */
  readonly wasSent: boolean;
  /** Attempts that failed one after the other, this one included, none of which brought content further. */
  readonly failures: number;
  /** Of the attempt before this one; "ok" where there was none. */
  readonly outcomeBefore: Outcome;
  /** Since the first attempt. */
  readonly elapsedMs: number;
}

export type Decision =
  | { readonly action: "retry"; readonly afterMs: number; /** Without what is held. */ readonly startsOver: boolean }
  | { readonly action: "give-up"; readonly why: string };

/** What can pass: the next attempt may well succeed. */
const PASSING_OUTCOMES: ReadonlySet<Outcome> = new Set([
  "connect",
  "tls", // a connection that was lost before there was TLS; a peer that does not speak it is final
  "partial",
  "timeout",
  "empty",
  "send",
  "receive",
  "status",
  "range",
  "digest",
] as const);

/** What a retry waits for, at the most: AWS calls it full jitter; thousands of clients do not come back at once. */
const backoffMs = (failures: number) => Math.min(LIMITS.backoffMaxMs, LIMITS.backoffFirstMs * 2 ** (failures - 1));

/**
 * What to do after an attempt that failed.
 *
 * | the failure | then |
 * | --- | --- |
 * | can not pass (no such host, 404, malformed, disk full) | give up |
 * | the method is not idempotent, and the request was sent | give up |
 * | no retries are left, or no time for the wait | give up |
 * | the response was whole, but only a part of what is missing | ask for the next part at once |
 * | what is held has no strong validator, or for the second time is not what the server has | start over, if that is possible |
 * | anything else | go on from what is held |
 */
export function decideNext(attempt: Attempt, held: Held, policy: Policy, random: () => number): Decision {
  const { failure, failures } = attempt;
  const giveUp = (why: string): Decision => ({ action: "give-up", why });
  if (!PASSING_OUTCOMES.has(failure.outcome) || failure.isFinal) return giveUp("");
  if (attempt.wasSent && !IDEMPOTENT_METHODS.has(policy.method)) return giveUp("");
  if (failures > policy.retries) return giveUp(policy.retries > 0 ? `after ${failures} attempts` : "");
  // RFC 9110 §15.3.7: a part may be less than what was asked for. Nothing is wrong, so the next is asked for at once.
  const backoff = failure.isPart && failures === 1 ? 0 : random() * backoffMs(failures);
  const afterMs = Math.max(failure.retryAfterMs, backoff);
  if (attempt.elapsedMs + afterMs > policy.retryMaxMs) return giveUp("no time is left for another attempt");
  // A part that does not fit may be a slip of something on the way: what is held is given up the second time.
  const isMisfit = failure.outcome === "digest" || (failure.outcome === "range" && attempt.outcomeBefore === "range");
  const startsOver = held.bytes > 0 && (held.etag === "" || isMisfit);
  if (startsOver && !policy.canStartOver) return giveUp("what is printed cannot be continued exactly");
  return { action: "retry", afterMs, startsOver };
}

/**
 * Checks that the response is what was asked for. Where only its content is kept, that is 2xx alone:
 * neither the page of an error nor that of a redirect shall pass for the content of the URL.
 * @throws TransferError "status"
 */
export function requireSuccess(head: ResponseHead, keepsOnlyContent: boolean): void {
  if (keepsOnlyContent ? isSuccess(head) : head.status < 400) return;
  throw new TransferError("status", describeStatus(head), { isFinal: true });
}

/** @throws TransferError "unparsable" */
export function requireWellFormed({ fault }: ResponseReader): void {
  if (fault !== "") throw new TransferError("unparsable", `the response is malformed: ${fault}`);
}

/**
 * Checks that the response which has ended is whole.
 * @throws TransferError "empty", "unparsable" or "partial"
 */
export function requireComplete(reader: ResponseReader): void {
  if (reader.isComplete) return;
  requireWellFormed(reader);
  if (reader.isEmpty) throw new TransferError("empty", "the server closed the connection without an answer");
  if (reader.head === undefined) throw new TransferError("partial", "the response ends inside its head");
  const whole = typeof reader.framing === "number" ? ` of ${reader.framing}` : "";
  throw new TransferError(
    "partial",
    `the response is not complete: ${reader.contentBytes}${whole} bytes of content came`,
  );
}

/** What a system call's failure means for the transfer. */
export function explainSystemError(error: SystemError, outcome: Outcome, doing: string): TransferError {
  const isQuiet = outcome === "write" && error.code === "EPIPE";
  return new TransferError(outcome, `${doing}: ${error.code ?? error.message}`, { isQuiet });
}

// ═══ 7 Connection ════════════════════════════════════════════════════════════════════════════════

/**
 * Gives the memory of received bytes that nobody needs any more back at once. The collector would let some 50 MiB of
 * them pile up first, and each piece would be written to memory that no cache has seen before.
 */
function release(bytes: Uint8Array): void {
  const { buffer } = bytes;
  if (buffer instanceof ArrayBuffer && buffer.byteLength === bytes.length) buffer.transfer(0);
}

/** A socket turned from events into steps: send, receive, receive …, close. */
export class Connection {
  private readonly received: Uint8Array[] = [];
  private receivedBytes = 0;
  private isPaused = false;
  private hasEnded = false;
  private failure: TransferError | undefined;
  private isClosed = false;
  private socket: Bun.Socket<Connection> | undefined;
  /** Over TLS: what goes by below it. */
  private records: RecordWatch | undefined;
  /** Wakes the step that waits: a byte came, there is room to send, or all is over. */
  private wake = () => {};

  constructor(private readonly clock: Clock) {}

  onOpen(socket: Bun.Socket<Connection>): void {
    this.socket = socket;
    if (this.isClosed) socket.terminate(); // nobody waits for it any more
  }

  /** Bytes from the network: the peer's message, or TLS records of it. */
  onBytes(bytes: Uint8Array): void {
    if (this.records === undefined) this.onData(bytes);
    else this.records.take(bytes);
  }

  onData(bytes: Uint8Array): void {
    this.records?.noteContent(bytes.length);
    this.received.push(bytes);
    this.receivedBytes += bytes.length;
    if (this.receivedBytes >= LIMITS.receivedBytesMax && !this.isPaused) {
      this.isPaused = true;
      this.socket?.pause();
    }
    this.wake();
  }

  onDrain(): void {
    this.wake();
  }

  /** A FIN: all that the peer wanted to send is here. */
  onEnd(): void {
    this.hasEnded = true;
    this.wake();
  }

  /** The connection is gone below TLS, which will say so itself; but it cannot tell a reset. */
  onBytesClose(error?: SystemError): void {
    if (this.records === undefined || error !== undefined) this.onClose(error);
  }

  /** A close without FIN is a reset, and a reset is never the end of a message. */
  onClose(error?: SystemError): void {
    if (!this.hasEnded)
      this.failure ??= explainSystemError(error ?? new Error("reset"), "receive", "the connection was lost");
    this.wake();
  }

  /** Did the peer's end mean that it had said all? Over TLS a FIN alone can be anybody's. */
  get endsInOrder(): boolean {
    return this.records?.endsInOrder ?? true;
  }

  /** Goes on over TLS. @throws TransferError "tls" or "certificate" */
  async secure(hostname: string, authorities: string[], { isInsecure }: Trust): Promise<void> {
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
    const tls = { serverName: hostname, ca: authorities, rejectUnauthorized: !isInsecure };
    this.records = new RecordWatch();
    const socket = { ...TLS_HANDLERS, handshake, close };
    this.socket = this.socket?.upgradeTLS<Connection>({ data: this, tls, socket })[1];
    await promise;
  }

  /** Sends all of it, or as much as the server takes before it answers. @throws TransferError */
  async send(bytes: Uint8Array): Promise<void> {
    for (let sent = 0; sent < bytes.length && this.received.length === 0;) {
      const written = this.socket?.write(bytes, sent, bytes.length - sent) ?? -1;
      if (written < 0) throw new TransferError("send", "the connection was lost while the request was sent");
      sent += written;
      if (sent < bytes.length) await this.event();
      if (this.failure !== undefined && this.received.length === 0) throw this.failure;
    }
  }

  /** The next bytes, or undefined after the peer's FIN. @throws TransferError */
  async receive(): Promise<Uint8Array | undefined> {
    while (this.received.length === 0) {
      if (this.failure !== undefined) throw this.failure;
      if (this.hasEnded) return undefined;
      if (this.isPaused) {
        this.isPaused = false;
        this.socket?.resume();
      }
      await this.event();
    }
    const bytes = this.received.shift();
    this.receivedBytes -= bytes?.length ?? 0;
    return bytes;
  }

  close(): void {
    this.isClosed = true;
    this.socket?.terminate();
  }

  /** Waits for the next thing to happen, but not longer than the peer may be silent. */
  private event(): Promise<void> {
    return new Promise((resolve) => {
      const isLate = (failure: TransferError) => {
        this.failure = failure;
        resolve();
      };
      const cancel = this.clock.startTimer("stallMs", (seconds) => `no byte for ${seconds} s`, isLate);
      this.wake = () => {
        cancel();
        resolve();
      };
    });
  }
}

/** Time since the start, and timers that never go past the end of all time that the user gives. */
export class Clock {
  private readonly startedAt = performance.now();

  constructor(private readonly timeouts: Timeouts) {}

  get elapsedMs(): number {
    return performance.now() - this.startedAt;
  }

  /** @returns what ends the timer */
  startTimer(which: "connectMs" | "stallMs", say: (seconds: number) => string, then: (failure: TransferError) => void) {
    const { [which]: limit, maxMs } = this.timeouts;
    const left = Math.max(0, maxMs - this.elapsedMs);
    const isLast = left < limit;
    const message = isLast ? `not done within ${maxMs / 1000} s` : say(limit / 1000);
    const timer = setTimeout(
      () => then(new TransferError("timeout", message, { isFinal: isLast })),
      Math.min(left, limit),
    );
    return () => clearTimeout(timer);
  }
}

/** Repr-Digest is a dictionary of byte sequences (RFC 9530 §3, RFC 8941 §3.2); of its algorithms SHA-256 is read. */
const REPR_DIGEST = /(?:^|,)[ \t]*sha-256=:([A-Za-z0-9+/]{43}=):/;

/** What is held of the content across all attempts, and what it adds up to. */
export class Delivery {
  held: Held;
  /** The most that was ever held: only what goes beyond it is progress. */
  private best: number;
  private hash: Bun.CryptoHasher | undefined;
  /** Bytes of the response under way that are held already. */
  private skip = 0;
  private expectedDigest = "";

  constructor(
    readonly sink: Sink,
    private readonly job: Job,
  ) {
    this.held = sink.found;
    this.best = this.held.bytes;
    if (job.sha256 !== "" && this.held.bytes === 0) this.hash = new Bun.CryptoHasher("sha256");
  }

  /** True once after more has come than ever before. */
  takeProgress(): boolean {
    const hasProgressed = this.held.bytes > this.best;
    this.best = Math.max(this.best, this.held.bytes);
    return hasProgressed;
  }

  async startOver(): Promise<void> {
    await this.sink.startOver();
    this.held = NOTHING;
    this.hash = undefined;
  }

  async start(head: ResponseHead, verdict: Verdict & { action: "deliver" }): Promise<void> {
    if (verdict.startsOver) await this.startOver();
    this.held = verdict.held;
    this.skip = this.held.bytes - verdict.from;
    // RFC 9530 §3: of the whole representation, in a 206 too. What an earlier response said of this version holds.
    if (this.held.bytes === 0) this.expectedDigest = "";
    const [, digest] = REPR_DIGEST.exec(fieldValues(head, "repr-digest").join(",")) ?? [];
    this.expectedDigest = digest ?? this.expectedDigest;
    if ((this.job.sha256 !== "" || this.expectedDigest !== "") && this.held.bytes === 0)
      this.hash = new Bun.CryptoHasher("sha256");
    await this.sink.start(head, this.held);
  }

  async write(bytes: Uint8Array): Promise<void> {
    const skipped = Math.min(this.skip, bytes.length);
    this.skip -= skipped;
    const content = bytes.subarray(skipped);
    if (this.held.bytes + content.length > this.job.policy.sizeMax)
      throw new TransferError("tooLarge", `the content is larger than ${this.job.policy.sizeMax} bytes`);
    if (content.length === 0) return;
    await this.sink.write(content);
    this.hash?.update(content);
    this.held = { ...this.held, bytes: this.held.bytes + content.length };
  }

  /** The response has ended in order: is the content whole, and what the digests say? @throws TransferError */
  async finish(): Promise<void> {
    const { bytes, total } = this.held;
    if (this.skip > 0)
      throw new TransferError(
        "partial",
        `the response is not complete: of ${bytes} bytes that it had, ${this.skip} are missing`,
      );
    if (total !== undefined && bytes !== total)
      throw new TransferError("partial", `the response is a part: ${bytes} of ${total} bytes are here`, {
        isPart: true,
      });
    await this.verify();
    await this.sink.finish();
  }

  private async verify(): Promise<void> {
    const { sha256, policy } = this.job;
    if (sha256 === "" && this.expectedDigest === "") return;
    const found = this.hash?.digest("hex") ?? (await this.sink.digest());
    this.hash = undefined;
    if (found === undefined)
      throw new TransferError("digest", "the content cannot be verified: its first part is not at hand", {
        isFinal: true,
      });
    const told = Buffer.from(this.expectedDigest, "base64").toString("hex");
    if (found === (told || found) && found === (sha256 || found)) return;
    // Nothing can be made of it, now or later.
    if (policy.canStartOver) await this.startOver();
    const isFinal = found === told; // the server has nothing else to give
    throw new TransferError("digest", `the content is not what its digest says: its SHA-256 is ${found}`, { isFinal });
  }
}

// ═══ 8 Sockets ═══════════════════════════════════════════════════════════════════════════════════

const SOCKET_HANDLERS: Bun.SocketHandler<Connection> = {
  open: (socket) => socket.data.onOpen(socket),
  data: (socket, bytes) => socket.data.onBytes(bytes),
  drain: (socket) => socket.data.onDrain(),
  end: (socket) => socket.data.onEnd(),
  close: (socket, error) => socket.data.onBytesClose(error),
  error: (socket, error) => socket.data.onClose(error),
  connectError() {}, // the promise of Bun.connect is rejected too
};

/** What comes through TLS, where there is TLS. */
const TLS_HANDLERS: Bun.SocketHandler<Connection> = {
  data: (socket, bytes) => socket.data.onData(bytes),
  drain: (socket) => socket.data.onDrain(),
  end: (socket) => socket.data.onEnd(),
  error: (socket, error) => socket.data.onClose(error),
};

/** Not a certificate that is not trusted, but a peer that speaks no TLS, or not ours. */
const isTlsFault = ({ code = "" }: SystemError) => /^(EPROTO|ECONN|ERR_SSL)/.test(code);

/** The authorities that are believed, as PEM texts. @throws TransferError "usage" */
function readAuthorities(file: string | undefined): string[] {
  if (file === undefined) return process.getBuiltinModule("node:tls").getCACertificates("system");
  try {
    return [fs.readFileSync(file, "utf8")];
  } catch (error) {
    throw new TransferError("usage", `cannot read ${file}: ${(error as SystemError).code}`); // node:fs throws those
  }
}

/** @throws TransferError "resolve", "connect", "timeout", "tls" or "certificate" */
async function connect(url: URL, clock: Clock, trust: Trust): Promise<Connection> {
  const hostname = url.hostname.replace(/^\[(.*)\]$/, "$1");
  const isSecure = url.protocol === "https:";
  const port = Number(url.port || (isSecure ? 443 : 80));
  const connection = new Connection(clock);
  const { promise: late, reject } = Promise.withResolvers<never>();
  const cancel = clock.startTimer("connectMs", (seconds) => `no connection to ${url.host} within ${seconds} s`, reject);
  try {
    // Half-open: the server's FIN must not stop us from sending, nor hide what it sent before.
    const options = { hostname, port, allowHalfOpen: true, data: connection, socket: SOCKET_HANDLERS };
    await Promise.race([late, Bun.connect(options)]);
    if (isSecure)
      await Promise.race([late, connection.secure(hostname, readAuthorities(trust.authoritiesFile), trust)]);
    return connection;
  } catch (error) {
    connection.close();
    if (error instanceof TransferError) throw error;
    const isUnknown = (error as SystemError).syscall === "getaddrinfo"; // Bun throws SystemErrors
    throw explainSystemError(error as SystemError, isUnknown ? "resolve" : "connect", `cannot connect to ${url.host}`);
  } finally {
    cancel();
  }
}

/** How an exchange has ended, where it has not failed. */
type Ending = { readonly action: "done" } | (Verdict & { readonly action: "redirect" });

/** What one attempt and the next ones share. */
interface Session {
  readonly job: Job;
  readonly delivery: Delivery;
  readonly clock: Clock;
  readonly progress: ProgressLine;
  failures: number;
  outcomeBefore: Outcome;
  /** The request has been sent, in part at least. */
  wasSent: boolean;
}

/**
 * The heart: one request, one response, from connect to close.
 * @returns how it ended, or why it failed; the caller prints that as `Error: …`, unless it tries again
 */
export async function transfer(request: Request, session: Session): Promise<Ending | TransferError> {
  const { delivery, clock, job } = session;
  const reader = new ResponseReader(request.method);
  let connection: Connection | undefined;
  try {
    connection = await connect(request.url, clock, job.trust);
    const bytesToSend = formatRequest(request, delivery.held);
    if (job.isVerbose) tellLines("> ", bytesToSend);
    session.wasSent = true;
    await connection.send(bytesToSend);
    let bytes: Uint8Array | undefined;
    while (!reader.isComplete && (bytes = await connection.receive()) !== undefined) {
      const isBeforeHead = reader.head === undefined;
      const content = reader.take(bytes);
      if (isBeforeHead && reader.head !== undefined) {
        const ending = await beginResponse(reader.head, session);
        if (ending !== undefined) return ending;
      }
      await delivery.write(content);
      release(bytes);
      session.progress.show(delivery.held);
      requireWellFormed(reader);
    }
    if (!reader.isComplete) reader.end(connection.endsInOrder);
    requireComplete(reader);
    if (reader.head !== undefined) await finishResponse(reader.head, session);
    return { action: "done" };
  } catch (error) {
    return asFailure(error, reader);
  } finally {
    connection?.close();
  }
}

/** The head is here: does its content count? @returns how the exchange ends without it; undefined where it counts */
async function beginResponse(head: ResponseHead, { job, delivery, failures }: Session): Promise<Ending | undefined> {
  if (job.isVerbose) tellLines("< ", Buffer.from(head.text, "latin1"));
  const isLastTry = failures >= job.policy.retries || !IDEMPOTENT_METHODS.has(job.policy.method);
  const verdict = judgeHead(head, delivery.held, job.policy, isLastTry);
  switch (verdict.action) {
    case "fail":
      throw verdict.failure;
    case "redirect":
      return verdict;
    case "complete":
      await delivery.finish();
      return { action: "done" };
    case "deliver":
      await delivery.start(head, verdict);
      return undefined;
    default:
      return verdict satisfies never;
  }
}

/** The response is whole. An error page has been printed by now, and is a failure all the same. */
async function finishResponse(head: ResponseHead, { job, delivery }: Session): Promise<void> {
  if (job.policy.method !== "HEAD") await delivery.finish();
  requireSuccess(head, job.policy.keepsOnlyContent);
}

/** What is not a TransferError is a fault of ours. */
function asFailure(error: unknown, reader: ResponseReader): TransferError {
  if (!(error instanceof TransferError)) throw error;
  // Content that only a close ends may be cut by a reset at any byte: what came is a part.
  const isCut = error.outcome === "receive" && reader.head !== undefined && reader.framing === "close";
  return isCut ? new TransferError("partial", error.message) : error;
}

/**
 * The loop around the heart: follows redirects, tries again, goes on where it broke off.
 * @returns the exit code; a failure has been printed by then, as one line on stderr
 */
export async function download(job: Job, sink: Sink): Promise<number> {
  const progress = new ProgressLine(job.isSilent);
  const clock = new Clock(job.timeouts);
  const session: Session = {
    job,
    delivery: new Delivery(sink, job),
    clock,
    progress,
    failures: 0,
    outcomeBefore: "ok",
    wasSent: false,
  };
  try {
    for (;;) {
      const ending = await followRedirects(session);
      if (!(ending instanceof TransferError)) return EXIT_CODES.ok;
      const exitCode = await prepareRetry(ending, session);
      if (exitCode !== undefined) return exitCode;
    }
  } finally {
    progress.clear();
    const advice = await sink.close();
    if (advice !== "" && !job.isSilent) tell(advice);
  }
}

async function followRedirects(session: Session): Promise<Ending | TransferError> {
  let { request } = session.job;
  for (let redirects = 0; redirects <= LIMITS.redirectsMax; redirects++) {
    const ending = await transfer(request, session);
    if (ending instanceof TransferError || ending.action === "done") return ending;
    const url = URL.parse(ending.location, request.url);
    if (url === null || !isSpoken(url))
      return new TransferError("url", `cannot follow the redirect to ${ending.location}`);
    request = redirect(request, ending.status, url);
  }
  return new TransferError("redirects", `more than ${LIMITS.redirectsMax} redirects`);
}

/** Waits until it is time for another attempt, and prepares it; or says that it is all over. @returns the exit code */
async function prepareRetry(failure: TransferError, session: Session): Promise<number | undefined> {
  const { job, delivery, clock, progress } = session;
  session.failures = delivery.takeProgress() ? 1 : session.failures + 1;
  const { wasSent, failures, outcomeBefore } = session;
  const attempt = { failure, wasSent, failures, outcomeBefore, elapsedMs: clock.elapsedMs };
  session.outcomeBefore = failure.outcome;
  const decision = decideNext(attempt, delivery.held, job.policy, Math.random);
  progress.clear();
  if (decision.action === "give-up") {
    const why = decision.why === "" ? "" : ` (${decision.why})`;
    if (!failure.isQuiet) tell(`Error: ${failure.message}${why}`);
    return EXIT_CODES[failure.outcome];
  }
  if (decision.startsOver) await delivery.startOver();
  const seconds = (decision.afterMs / 1000).toFixed(1);
  if (!job.isSilent) tell(`Retry in ${seconds} s: ${failure.message}; ${delivery.held.bytes} bytes kept`);
  await Bun.sleep(Math.min(decision.afterMs, job.timeouts.maxMs - clock.elapsedMs));
  return undefined;
}

// ═══ 9 Command line ══════════════════════════════════════════════════════════════════════════════

export const HELP = `Usage: client-robust [options] [URL]
Gets URL, by default ${DEFAULTS.url}, and prints the whole response.

  -X, --request METHOD     another method than GET
  -H, --header LINE        a field-line to send, as "Name: value"; "Name:" sends none of that name
  -d, --data DATA          content to send, by POST; @FILE is that of a file, @- of stdin
  -I, --head               ask for the head alone
  -L, --location           follow redirects, ${LIMITS.redirectsMax} at the most
  -o, --output FILE        save the content to FILE (- is stdout), if the status is 2xx
      --retry N            attempts that may follow one that brought nothing new (${DEFAULTS.retries})
      --retry-max-time S   seconds after which none begins (no limit)
      --connect-timeout S  seconds until connected (${DEFAULTS.connectTimeoutS})
      --stall-timeout S    seconds without a byte (${DEFAULTS.stallTimeoutS})
      --max-time S         seconds for everything (no limit)
      --max-size BYTES     of the content (no limit)
      --sha256 HEX         what the content must be
      --cacert FILE        believe these authorities (PEM) instead of the system's
  -k, --insecure           believe anybody
  -s, --silent             print nothing on stderr but errors
  -v, --verbose            print the heads that are sent and received on stderr
  -h, --help               print this text
  -V, --version            print the version

FILE is either absent, as it was, or whole. A transfer that broke off leaves FILE.part and
FILE.part.json, from which the same command goes on. Exit codes are curl's: 0 whole response,
2 wrong usage, 3 URL, 6 cannot resolve, 7 cannot connect, 8 not HTTP, 18 partial, 22 status
(with -o any but 2xx, otherwise 400 and above), 23 cannot write, 28 timeout, 33 wrong range,
35 no TLS, 47 redirects, 52 no answer, 55 cannot send, 56 cannot receive, 60 certificate not
trusted, 63 too large; and 29 where the content is not what a digest says, 130 after Ctrl-C.
`;

/** @returns how many bytes were written */
function writeInThread(fd: number, bytes: Uint8Array, from: number, position: number | null): Promise<number> {
  const { promise, resolve, reject } = Promise.withResolvers<number>();
  fs.write(fd, bytes, from, bytes.length - from, position, (error, written) =>
    error ? reject(error) : resolve(written),
  );
  return promise;
}

/**
 * Writes all of it. What may block for as long as somebody else likes (a pipe, a terminal) is written by another
 * thread, so that deadlines go on here; a file or a device takes bytes sooner than a thread can be asked to.
 * @param position in the file; null goes on where the last write ended
 * @throws TransferError "write"
 */
async function writeAll(
  fd: number,
  bytes: Uint8Array,
  mayBlock: boolean,
  position: number | null = null,
): Promise<void> {
  for (let written = 0; written < bytes.length;) {
    const at = position === null ? null : position + written;
    try {
      if (mayBlock) written += await writeInThread(fd, bytes, written, at);
      else written += fs.writeSync(fd, bytes, written, bytes.length - written, at);
    } catch (error) {
      if ((error as SystemError).code !== "EAGAIN")
        throw explainSystemError(error as SystemError, "write", "cannot write"); // node:fs throws SystemErrors
      await Bun.sleep(LIMITS.writeRetryMs);
    }
  }
}

/** Pipes, sockets and terminals are emptied by others, at their own pace. */
function mayBlock(fd: number): boolean {
  const found = fs.fstatSync(fd);
  return !found.isFile() && (!found.isCharacterDevice() || isTerminal(fd));
}

/** On Linux, the devices of major number 1 are /dev/null, /dev/full and their like. */
const MEMORY_DEVICES = 1;

/** node:tty takes longer to load than a small transfer takes: it is asked only about what may be a terminal. */
function isTerminal(fd: number): boolean {
  const found = fs.fstatSync(fd);
  return (
    found.isCharacterDevice() && found.rdev >> 8 !== MEMORY_DEVICES && process.getBuiltinModule("node:tty").isatty(fd)
  );
}

/** Prints the whole response, or its content alone (-o -). What is printed cannot be taken back. */
class StdoutSink implements Sink {
  readonly found = NOTHING;
  /** The head that is still to be printed: with the first content, when it can no longer be another's. */
  private head = "";
  private hasPrinted = false;
  private readonly isTerminal = isTerminal(1);
  private readonly mayBlock = mayBlock(1);
  private readonly textDecoder = new TextDecoder();

  constructor(private readonly isContentOnly: boolean) {}

  async start(head: ResponseHead): Promise<void> {
    this.head = this.isContentOnly || this.hasPrinted ? "" : head.text;
  }

  async write(content: Uint8Array): Promise<void> {
    await this.printHead();
    await (this.isContentOnly ? writeAll(1, content, this.mayBlock) : this.print(content));
  }

  async startOver(): Promise<void> {
    throw new TransferError("partial", CHANGED, { isFinal: true });
  }

  async finish(): Promise<void> {
    await this.printHead();
  }

  async digest(): Promise<undefined> {}

  /** No other attempt will follow: a head without content is all that there is to show. */
  async close(): Promise<string> {
    await this.printHead().catch(() => {}); // whoever does not read has been told, or does not want to know
    return "";
  }

  private async printHead(): Promise<void> {
    this.hasPrinted = true;
    if (this.head !== "") await this.print(Buffer.from(this.head, "latin1"));
    this.head = "";
  }

  /** A terminal gets text, and nothing of it moves the cursor; all else gets the bytes as they came. */
  private async print(bytes: Uint8Array): Promise<void> {
    if (!this.isTerminal) return writeAll(1, bytes, this.mayBlock);
    if (bytes.includes(0))
      throw new TransferError("write", "the content is binary: use -o FILE, or -o - to see it here");
    const text = printable(this.textDecoder.decode(bytes, { stream: true }));
    await writeAll(1, new TextEncoder().encode(text), this.mayBlock);
  }
}

/** What is not a regular file, such as a device or a pipe, is written to and never replaced. */
class DeviceSink extends StdoutSink {
  constructor(private readonly fd: number) {
    super(true);
  }

  override write(content: Uint8Array): Promise<void> {
    return writeAll(this.fd, content, mayBlock(this.fd));
  }
}

/** What FILE.part.json says: whose part FILE.part is, and who is writing it. */
interface PartState {
  readonly url: string;
  readonly etag: string;
  readonly total: number | null;
  /** The process that writes; 0 where none does. */
  readonly pid: number;
}

/** Saves the content: it grows in FILE.part, which becomes FILE when it is whole and on the disk. */
class FileSink implements Sink {
  found = NOTHING;
  /** Of FILE.part; -1 where it is not open. */
  private fd = -1;
  private position = 0;
  private etag = "";
  private isFinished = false;
  private syncedTo = 0;
  private readonly partPath: string;
  private readonly statePath: string;

  private constructor(
    private readonly path: string,
    private readonly url: string,
  ) {
    this.partPath = `${path}.part`;
    this.statePath = `${path}.part.json`;
  }

  /** Finds out what is there already. @throws TransferError "write" */
  static open(path: string, url: URL): FileSink | DeviceSink {
    return attemptToWrite(path, () => {
      const found = fs.statSync(path, { throwIfNoEntry: false });
      if (found !== undefined && !found.isFile()) return new DeviceSink(fs.openSync(path, "w"));
      // A link goes on pointing to where it did: what it points to is what gets replaced.
      const sink = new FileSink(found === undefined ? path : fs.realpathSync(path), url.href);
      sink.claim();
      return sink;
    });
  }

  async start(_: ResponseHead, held: Held): Promise<void> {
    this.etag = held.etag;
    attemptToWrite(this.partPath, () => {
      this.openPart();
      // Before the first byte: whatever happens from here on, the state tells whose bytes these are.
      this.saveState({ url: this.url, etag: held.etag, total: held.total ?? null, pid: process.pid });
    });
  }

  async write(content: Uint8Array): Promise<void> {
    await writeAll(this.fd, content, false, this.position);
    this.position += content.length;
    if (this.position - this.syncedTo < LIMITS.syncEveryBytes) return;
    // Lets the disk begin while the network goes on: all of it at the end would take as long again. Should it fail,
    // the sync at the end will too.
    this.syncedTo = this.position;
    fs.fdatasync(this.fd, () => {});
  }

  async startOver(): Promise<void> {
    attemptToWrite(this.partPath, () => {
      this.saveState({ url: this.url, etag: "", total: null, pid: process.pid });
      if (this.fd >= 0) fs.ftruncateSync(this.fd, 0);
      [this.position, this.syncedTo, this.etag] = [0, 0, ""];
    });
  }

  async finish(): Promise<void> {
    attemptToWrite(this.path, () => {
      this.openPart();
      fs.ftruncateSync(this.fd, this.position);
      fs.fsyncSync(this.fd);
      fs.renameSync(this.partPath, this.path);
      fs.unlinkSync(this.statePath);
      this.isFinished = true;
    });
  }

  async digest(): Promise<string> {
    return attemptToWrite(this.partPath, () => {
      const hash = new Bun.CryptoHasher("sha256");
      const piece = new Uint8Array(1_048_576);
      const fd = fs.openSync(this.partPath, "r");
      for (let length = 0; (length = fs.readSync(fd, piece)) > 0;) hash.update(piece.subarray(0, length));
      fs.closeSync(fd);
      return hash.digest("hex");
    });
  }

  /** Keeps a part that a later run can go on from, and nothing else. */
  async close(): Promise<string> {
    if (this.isFinished) return "";
    // What a full disk has taken of a piece is content too.
    const kept = this.fd < 0 ? this.position : fs.fstatSync(this.fd).size;
    if (kept > 0 && this.etag !== "") {
      this.saveState({ ...this.readState(), url: this.url, etag: this.etag, pid: 0 });
      return `Kept ${kept} bytes in ${this.partPath}: the same command goes on from there`;
    }
    fs.rmSync(this.partPath, { force: true });
    fs.rmSync(this.statePath, { force: true });
    return "";
  }

  /** A link at its place is not followed, nor is a new part written into what is there: others may put something there. */
  private openPart(): void {
    if (this.fd >= 0) return;
    const { O_WRONLY, O_CREAT, O_EXCL, O_NOFOLLOW } = fs.constants;
    if (this.position === 0) fs.rmSync(this.partPath, { force: true });
    const flags = O_WRONLY | O_NOFOLLOW | (this.position > 0 ? 0 : O_CREAT | O_EXCL);
    this.fd = fs.openSync(this.partPath, flags, 0o666);
  }

  /**
   * Makes the part ours: two processes that write one file would make a third of it. The state file is created by
   * one only; one that was left by a process which is no more is taken away by one only, as a rename succeeds once.
   */
  private claim(): void {
    if (this.createState()) return;
    const state = this.readState();
    if (isAlive(state.pid)) throw new TransferError("write", `process ${state.pid} is writing ${this.partPath}`);
    const taken = `${this.statePath}.${process.pid}`;
    fs.renameSync(this.statePath, taken);
    try {
      if (!this.createState()) throw new TransferError("write", `another process is writing ${this.partPath}`);
      fs.unlinkSync(taken);
    } catch (error) {
      if (error instanceof TransferError) fs.unlinkSync(taken);
      else fs.renameSync(taken, this.statePath); // the disk is full: a later run can still go on
      throw error;
    }
    if (state.url !== this.url || state.etag === "") return;
    const part = fs.lstatSync(this.partPath, { throwIfNoEntry: false });
    const total = state.total ?? undefined;
    if (part === undefined || !part.isFile() || part.size === 0 || part.size > (total ?? part.size)) return;
    this.found = { bytes: part.size, etag: state.etag, total };
    [this.position, this.syncedTo, this.etag] = [part.size, part.size, state.etag];
    this.saveState({ ...state, pid: process.pid });
  }

  /** False where somebody has one. */
  private createState(): boolean {
    const ours: PartState = { url: this.url, etag: "", total: null, pid: process.pid };
    try {
      fs.writeFileSync(this.statePath, JSON.stringify(ours), { flag: "wx" });
      return true;
    } catch (error) {
      if ((error as SystemError).code === "EEXIST") return false; // node:fs throws SystemErrors
      fs.rmSync(this.statePath, { force: true }); // a full disk has room for its name alone
      throw error;
    }
  }

  /** What cannot be read says nothing, and nobody is writing. */
  private readState(): PartState {
    try {
      const text = fs.readFileSync(this.statePath, "utf8");
      const { url, etag, total, pid } = JSON.parse(text) as Record<string, unknown>; // each is checked
      return {
        url: typeof url === "string" ? url : "",
        etag: typeof etag === "string" ? strongEtag({ fields: [["etag", etag]] }) : "",
        total: Number.isSafeInteger(total) ? Number(total) : null,
        pid: Number.isSafeInteger(pid) ? Number(pid) : 0,
      };
    } catch {
      return { url: "", etag: "", total: null, pid: 0 };
    }
  }

  /** In place: a disk that is full still has room for what is there. */
  private saveState(state: PartState): void {
    const text = JSON.stringify(state);
    fs.writeFileSync(this.statePath, text, { flag: "r+" });
    fs.truncateSync(this.statePath, Buffer.byteLength(text));
  }
}

/** Is there such a process? Signal 0 asks without sending anything; EPERM is a yes. */
function isAlive(pid: number): boolean {
  if (pid <= 0 || pid === process.pid) return false;
  try {
    return process.kill(pid, 0);
  } catch (error) {
    return (error as SystemError).code === "EPERM"; // process.kill throws SystemErrors
  }
}

function attemptToWrite<T>(path: string, step: () => T): T {
  try {
    return step();
  } catch (error) {
    if (error instanceof TransferError) throw error;
    throw explainSystemError(error as SystemError, "write", `cannot write ${path}`); // node:fs throws SystemErrors
  }
}

/** Size, speed and time left, in one line of stderr that is written over and over; only where a person looks on. */
class ProgressLine {
  private readonly isShown: boolean;
  private readonly startedAt = performance.now();
  private shownAt = this.startedAt + LIMITS.progressAfterMs - LIMITS.progressEveryMs;
  private firstBytes = -1;
  private isOnScreen = false;

  constructor(isSilent: boolean) {
    this.isShown = !isSilent && isTerminal(2);
  }

  show({ bytes, total }: Held): void {
    if (!this.isShown) return;
    if (this.firstBytes < 0) this.firstBytes = bytes;
    const now = performance.now();
    if (now - this.shownAt < LIMITS.progressEveryMs) return;
    this.shownAt = now;
    this.isOnScreen = true;
    const bytesPerSecond = ((bytes - this.firstBytes) / (now - this.startedAt)) * 1000;
    fs.writeSync(2, `\r${formatProgress(bytes, total, bytesPerSecond)}\x1b[K`);
  }

  clear(): void {
    if (this.isOnScreen) fs.writeSync(2, "\r\x1b[K");
    this.isOnScreen = false;
  }
}

/** Heads for people: each line with a mark before it, as curl -v prints them. */
function tellLines(mark: string, bytes: Uint8Array): void {
  const [head = ""] = Buffer.from(bytes).toString("latin1").split("\r\n\r\n", 1);
  for (const line of head.split("\r\n")) tell(mark + line);
}

const STRING = { type: "string" } as const;
const flag = (short: string) => ({ type: "boolean", short }) as const;

const FLAGS = {
  request: { ...STRING, short: "X" },
  header: { ...STRING, short: "H", multiple: true },
  data: { ...STRING, short: "d", multiple: true },
  head: flag("I"),
  location: flag("L"),
  output: { ...STRING, short: "o" },
  retry: STRING,
  "retry-max-time": STRING,
  "connect-timeout": STRING,
  "stall-timeout": STRING,
  "max-time": STRING,
  "max-size": STRING,
  sha256: STRING,
  cacert: STRING,
  insecure: flag("k"),
  silent: flag("s"),
  verbose: flag("v"),
  help: flag("h"),
  version: flag("V"),
} as const;

export interface CommandLine {
  readonly show: "" | "help" | "version";
  readonly job: Job;
  /** What -d said: DATA, @FILE or @-. */
  readonly data: readonly string[];
  readonly output: string | undefined;
}

/** @throws TransferError "usage" or "url" */
export function parseCommandLine(args: string[]): CommandLine {
  const { values, positionals } = parseFlags(args);
  const [url = DEFAULTS.url, extra] = positionals;
  if (extra !== undefined) throw usageError(`one argument too many: ${JSON.stringify(extra)}`);
  const { output, data = [], head = false, sha256 = "", "max-size": maxSize, retry } = values;
  if (output === "") throw usageError("--output takes a file or -");
  if (head && (output !== undefined || data.length > 0))
    throw usageError("--head goes with neither --output nor --data");
  const method = values.request ?? (head ? "HEAD" : data.length > 0 ? "POST" : "GET");
  if (!IS_TOKEN.test(method) || method === "CONNECT") throw usageError(`--request takes no ${JSON.stringify(method)}`);
  if (head && method !== "HEAD") throw usageError("--head asks with HEAD, and --request with another method");
  if (sha256 !== "" && !/^[0-9a-f]{64}$/i.test(sha256)) throw usageError("--sha256 takes 64 hexadecimal digits");
  const seconds = (name: "connect-timeout" | "stall-timeout" | "max-time" | "retry-max-time", byDefault: number) =>
    parseSeconds(`--${name}`, values[name], byDefault);
  const policy: Policy = {
    method,
    keepsOnlyContent: output !== undefined,
    canStartOver: output !== undefined && output !== "-",
    followsRedirects: values.location ?? false,
    retries: retry === undefined ? DEFAULTS.retries : parseCount("--retry", retry),
    retryMaxMs: seconds("retry-max-time", Number.POSITIVE_INFINITY),
    sizeMax: maxSize === undefined ? Number.POSITIVE_INFINITY : parseCount("--max-size", maxSize),
  };
  const timeouts: Timeouts = {
    connectMs: seconds("connect-timeout", DEFAULTS.connectTimeoutS),
    stallMs: seconds("stall-timeout", DEFAULTS.stallTimeoutS),
    maxMs: seconds("max-time", Number.POSITIVE_INFINITY),
  };
  const request: Request = {
    method,
    url: parseUrl(url),
    fields: (values.header ?? []).map(parseField),
    content: undefined,
  };
  const trust: Trust = { authoritiesFile: values.cacert, isInsecure: values.insecure ?? false };
  const { silent: isSilent = false, verbose: isVerbose = false } = values;
  const show = values.help ? "help" : values.version ? "version" : "";
  return {
    show,
    job: { request, policy, timeouts, trust, sha256: sha256.toLowerCase(), isSilent, isVerbose },
    data,
    output,
  };
}

function parseFlags(args: string[]) {
  try {
    return parseArgs({ args, options: FLAGS, allowPositionals: true });
  } catch (error) {
    throw usageError((error as Error).message.split(". ", 1)[0] ?? ""); // parseArgs throws TypeErrors
  }
}

const usageError = (message: string) => new TransferError("usage", `${message} (see client-robust --help)`);

/** @returns milliseconds */
function parseSeconds(name: string, text: string | undefined, byDefault: number): number {
  if (text === undefined) return byDefault * 1000;
  const seconds = Number(text);
  // A timer takes 2^31 ms at the most, and would fire at once for more.
  if (!/^\d*\.?\d+$/.test(text) || seconds <= 0 || seconds > 2_000_000)
    throw usageError(`${name} takes seconds, from above 0 to 2000000`);
  return seconds * 1000;
}

function parseCount(name: string, text: string): number {
  if (!/^\d{1,15}$/.test(text)) throw usageError(`${name} takes a number, not ${JSON.stringify(text)}`);
  return Number(text);
}

/** Fields that say how the message is framed, or what is asked for, are the program's own. */
const OWN_FIELDS: ReadonlySet<string> = new Set([
  "connection",
  "content-length",
  "if-range",
  "range",
  "transfer-encoding",
]);

/** @returns name and value; an empty value means that no such field is to be sent */
function parseField(line: string): [name: string, value: string] {
  const bytes = Buffer.from(line).toString("latin1");
  const name = FIELD_LINE.exec(bytes)?.[1];
  if (name === undefined) throw usageError(`--header takes "Name: value", not ${JSON.stringify(line)}`);
  if (OWN_FIELDS.has(name.toLowerCase())) throw usageError(`--header cannot set ${name}`);
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

/** The content to send; what several -d say is joined with "&", as forms are. @throws TransferError "usage" */
async function readData(data: readonly string[]): Promise<Uint8Array | undefined> {
  if (data.length === 0) return undefined;
  try {
    const source = (text: string) =>
      text === "@-" ? Bun.stdin : text.startsWith("@") ? Bun.file(text.slice(1)) : new Blob([text]);
    const parts = await Promise.all(data.map(async (text) => Buffer.from(await source(text).arrayBuffer())));
    return Buffer.concat(parts.flatMap((part, i) => (i === 0 ? [part] : [Buffer.from("&"), part])));
  } catch (error) {
    throw usageError(`cannot read the data: ${(error as SystemError).code}`); // Bun throws SystemErrors
  }
}

/** Ctrl-C ends a transfer into a file in order: what has come is kept, and the same command goes on from it. */
function keepPartOnSignals(sink: Sink): void {
  for (const [signal, exitCode] of [
    ["SIGINT", 130],
    ["SIGTERM", 143],
  ] as const)
    process.once(signal, async () => {
      const advice = await sink.close();
      tell(advice === "" ? "Interrupted" : advice);
      process.exit(exitCode);
    });
}

/** @returns the exit code */
async function main(): Promise<number> {
  try {
    const { show, job, data, output } = parseCommandLine(process.argv.slice(2));
    if (show !== "") {
      await writeAll(1, new TextEncoder().encode(show === "help" ? HELP : `client-robust ${VERSION}\n`), mayBlock(1));
      return EXIT_CODES.ok;
    }
    const request = { ...job.request, content: await readData(data) };
    const isFile = output !== undefined && output !== "-";
    const sink = isFile ? FileSink.open(output, request.url) : new StdoutSink(output === "-");
    if (sink instanceof FileSink) keepPartOnSignals(sink);
    const canStartOver = sink instanceof FileSink;
    return await download({ ...job, request, policy: { ...job.policy, canStartOver } }, sink);
  } catch (error) {
    if (!(error instanceof TransferError)) throw error;
    if (!error.isQuiet) tell(`Error: ${error.message}`);
    return EXIT_CODES[error.outcome];
  }
}

// ═══ 10 Main ═════════════════════════════════════════════════════════════════════════════════════

if (import.meta.main) process.exit(await main());
