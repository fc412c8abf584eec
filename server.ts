#!/usr/bin/env bun
/**
 * server.ts: stage 1, an HTTP/1.1 server written by hand on a TCP socket.
 *
 *     bun server.ts                        # listens on http://localhost:8888
 *     bun server.ts --root .               # the same, but serves the files below this folder
 *     curl -v http://localhost:8888/data   # in a second terminal
 *
 * It prints each request and answers `Hello, World!`. The tutorial's sketch takes one receive for
 * one request; here the bytes may come one at a time or a hundred requests at once, and every
 * message is held to RFC 9112 before it is answered: what is not HTTP gets 400 and a close.
 *
 * Left out: uploads, compression, virtual hosts, HTTP/2. It is no reverse proxy.
 *
 *  1 Limits and defaults    what is bounded, by how much, and why
 *  2 Types                  the words that the rest is written in
 *  3 Errors                 every reason to refuse a message, and the status it gets
 *  4 Parsing                bytes → request head, bytes → content (pure)
 *  5 Formatting             response → bytes, request → log line (pure)
 *  6 Application            request → response: the part to change in a copy; then files
 *  7 Connection             what is read, what is still to write, what has a deadline
 *  8 Sockets                listen, and six handlers that call section 7
 *  9 Command line           flags, signals, the ready line
 * 10 Main
 */
import * as fs from "node:fs";
import { isIPv6 } from "node:net";
import { dirname, join, sep } from "node:path";
import { parseArgs } from "node:util";

// ═══ 1 Limits and defaults ═══════════════════════════════════════════════════════════════════════

export const VERSION = "0.1.0";

/** Every bound: its default, what it is for the user, and above it why that number. Each is a flag. */
const BOUNDS = {
  /** Ten thousand idle peers must leave room for others; each costs us 1 to 2 KiB, and the kernel some more. */
  connectionsMax: [16_384, "connections at once, or as many as ulimit -n has room for; one more gets 503"],
  /** Enough to tell a proxy that it is one too many; in a flood nobody is told. */
  refusedConnectionsMax: [256, "connections beyond these that still get a 503; the rest is cut off"],
  /** Longest registered method: UPDATEREDIRECTREF, 17. A longer one is none that we know. */
  methodBytesMax: [32, "bytes of a method"],
  /** RFC 9112 §3 asks for at least 8,000; what browsers and proxies send stays below. */
  requestTargetBytesMax: [8000, "bytes of a request-target"],
  /** The whole head, request-line to empty line: what nginx takes (4 buffers of 8 KiB). */
  headBytesMax: [32_768, "bytes of a request head, and of a trailer section"],
  /** Browsers send some 20 field-lines, chains of proxies 50; Apache draws its line at 100 too. */
  fieldLinesMax: [100, "field-lines of a head, and of a trailer section"],
  /** RFC 9112 §2.2: "at least one" empty line before a request is skipped; old clients send one. */
  emptyLinesMax: [4, "empty lines before a request"],
  /** Text mode ignores content, so this bounds only wasted reading. nginx's default is the same. */
  contentBytesMax: [1_048_576, "bytes of a request's content"],
  /** RFC 9112 §7.1.1 asks for a limit on all of a message. Hardly anybody uses them. */
  chunkExtensionBytesMax: [4096, "bytes by which chunk extensions may outweigh a request's content"],
  /** What may be formatted before the peer has taken it; then we stop reading from that peer. */
  unsentBytesMax: [65_536, "bytes of answers that a peer has not taken, before we stop reading"],
  /** One read may bring 512 KiB, and many peers that read nothing may each leave us so much. */
  waitingBytesMax: [268_435_456, "bytes that wait for all peers together; who adds more is cut off"],
  /** For a whole head, not for each byte, so that sending it slowly gains nothing ("slowloris"). */
  headTimeoutMs: [10_000, "ms for a whole request head"],
  /** Between two requests. Longer than the 15 s at which browsers tend to reuse a connection. */
  idleTimeoutMs: [60_000, "ms between two requests"],
  /** Each such span must bring its least number of bytes, or the end of the content. */
  contentTimeoutMs: [10_000, "ms in which the next part of the content must come"],
  /** With the default span 500 bytes a second: slower than any modem that is left. */
  contentPartBytesMin: [5000, "bytes of such a part"],
  /** A peer that takes nothing of its answer for so long has gone. */
  writeTimeoutMs: [30_000, "ms in which a peer must take some of its answer"],
  /** After our last byte we read and drop what the peer still sends, so that no reset destroys it. */
  lingerTimeoutMs: [5000, "ms to wait for the peer's end after ours"],
  lingerBytesMax: [16_777_216, "bytes to drop while we wait for it"],
  /** A name takes some 300 bytes of a page. Of a folder with more, the rest can still be fetched by name. */
  listingEntriesMax: [10_000, "names in the listing of a folder"],
  /** A digest is asked for, never demanded: a third of the time for which client-robust waits for a byte. */
  digestTimeoutMs: [10_000, "ms that an answer waits for the digest of its file; then it goes without"],
  /** Each holds a file open while it waits. Whoever is one more gets an answer without a digest. */
  pendingDigestsMax: [64, "digests that may wait to be computed"],
  /** What many ask for is not opened each time. They are closed a few times a second. */
  recentFilesMax: [256, "files that stay open for a moment after they were asked for"],
  /** Requests under way when the server is told to stop get this long. */
  graceMs: [10_000, "ms for requests under way when told to stop"],
} as const satisfies Record<string, readonly [value: number, meaning: string]>;

export type Limits = Readonly<Record<keyof typeof BOUNDS, number>>;
const LIMIT_NAMES = Object.keys(BOUNDS) as (keyof Limits)[]; // Object.keys forgets the type

/** The defaults. */
export const LIMITS = Object.freeze(
  Object.fromEntries(LIMIT_NAMES.map((name) => [name, BOUNDS[name][0]])) as Limits, // fromEntries too
);

/** What is read of a file and written to a socket at once. */
const PIECE_BYTES = 262_144;
/** So many pieces for one connection; then the others have their turn. */
const PIECES_PER_TURN = 16;
/** A file up to this size is read at once, and goes out together with its head. */
const SMALL_FILE_BYTES_MAX = 65_536;
/** Digests that are remembered, each with the path of its file. */
const DIGESTS_KEPT_MAX = 4096;
/** Two changes of a file within one tick of the kernel's clock leave it with one time: 10 ms at the most. */
const CLOCK_TICK_MS = 10;
/** How often deadlines are looked at: one sweep costs less than a timer for each connection. */
const SWEEP_MS = 250;
/** On stop, requests that idle peers have already sent arrive within this time and are served. */
const STOP_IDLE_MS = 250;
/** What the runtime has open besides: its event loop, its standard streams, listeners, threads. */
const RUNTIME_DESCRIPTORS = 16;
/** Of what was sent, the request log shows the start: what the tutorial's one receive would show. */
const LOGGED_BYTES_MAX = 1024;
/** Log text that waits for a slow reader of stdout; more is dropped and counted, never waited for. */
const LOG_BACKLOG_CHARS_MAX = 1_048_576;
/** A timer that is set for longer fires at once. */
const TIMER_MS_MAX = 2 ** 31 - 1;
/** At the end, the log may still want to be read for so long. */
const LOG_FLUSH_MS = 1000;

// ═══ 2 Types ═════════════════════════════════════════════════════════════════════════════════════

/** The methods of RFC 9110 §9.3 and RFC 5789. Any other token is a method that we do not know: "". */
const METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"] as const;
export type Method = (typeof METHODS)[number] | "";

export type LogFormat = "request" | "access" | "off";

/** A response that is ready to be sent but for its Date: all that does not change, as bytes. */
export interface Response {
  readonly status: number;
  /** status-line and field-lines, ending in `Date: `. */
  readonly head: Uint8Array;
  readonly content: Uint8Array;
  /** Content that is read while it is sent, instead of `content`. Whoever has it closes it. */
  readonly file?: FilePart;
}

/** What a server serves. */
export interface Site {
  /** The answer to a request whose content has been read. It may come later: then nothing else is read meanwhile. */
  respond(request: RequestHead): Response | Promise<Response>;
  /** The answer that no content will change: who asks with Expect before it sends some is told at once. */
  refuse(request: RequestHead): Response | undefined;
  /** Called a few times a second: what was kept for a moment can go. */
  sweep?(): void;
}

/** The version of a file: two that have one entity-tag are the same, byte by byte. */
export interface FileVersion {
  readonly size: number;
  /** Strong (RFC 9110 §8.8.3). */
  readonly etag: string;
  /** In milliseconds since 1970, whole seconds: all that Last-Modified can say. */
  readonly lastModified: number;
  /** So fresh that another change could go unseen: its tag is good for one response. */
  readonly isFresh: boolean;
}

/** The bytes from `from` up to, but not including, `to`. */
export interface ByteRange {
  readonly from: number;
  readonly to: number;
}

/** A line of a listing. */
export interface ListingEntry {
  readonly name: string;
  readonly isFolder: boolean;
  readonly size: number;
  readonly modified: Date;
}

/** What section 7 needs of a socket; Bun's sockets have it. */
export interface Transport {
  /** Returns how many of the bytes the kernel took; negative where the connection has gone. */
  write(bytes: Uint8Array, from: number, length: number): number;
  shutdown(): void;
  end(): void;
  terminate(): void;
  pause(): void;
  resume(): void;
  readonly remoteAddress: string;
}

/**
 * reading-head → reading-content → reading-head …, and from either:
 * responding (an answer takes longer than this turn) → reading-head …, or
 * finishing (the last answer is not all written) → lingering (it is; FIN is sent) → closed.
 */
type ConnectionState = "reading-head" | "reading-content" | "responding" | "finishing" | "lingering" | "closed";

/** What a connection waits for: each has its own timeout. */
type Awaited = "head" | "idle" | "content" | "write" | "linger";

// ═══ 3 Errors ════════════════════════════════════════════════════════════════════════════════════

/** Every reason to refuse a request: the status that it gets and the line that says why. */
export const REJECTIONS = Object.freeze({
  "bare-lf": [400, "a line ends in LF without CR"],
  "bare-cr": [400, "CR without LF"],
  "empty-lines": [400, "too many empty lines before the request"],
  "request-line": [400, "not a request-line: method SP request-target SP HTTP-version CRLF"],
  "request-target": [400, "the request-target has no form that this method may use"],
  "request-target-too-long": [414, "the request-target is too long"],
  "method-too-long": [501, "no such method here"],
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
  path: [400, "no path of a file: it has .., a backslash, NUL, an encoded slash or what is not UTF-8"],
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

const REASON_PHRASES: Readonly<Record<number, string>> = Object.freeze({
  200: "OK",
  204: "No Content",
  206: "Partial Content",
  301: "Moved Permanently",
  304: "Not Modified",
  400: "Bad Request",
  403: "Forbidden",
  404: "Not Found",
  405: "Method Not Allowed",
  408: "Request Timeout",
  412: "Precondition Failed",
  413: "Content Too Large",
  414: "URI Too Long",
  416: "Range Not Satisfiable",
  417: "Expectation Failed",
  431: "Request Header Fields Too Large",
  500: "Internal Server Error",
  501: "Not Implemented",
  503: "Service Unavailable",
  505: "HTTP Version Not Supported",
});

/** What went wrong before there was a connection: shown as one line, with the exit code it causes. */
class StartError extends Error {
  constructor(
    message: string,
    readonly exitCode: 1 | 2,
  ) {
    super(message);
  }
}

// ═══ 4 Parsing ═══════════════════════════════════════════════════════════════════════════════════
//
// A parser reads bytes and keeps where it is, so that it goes on where it stopped when more bytes
// come: the outcome is the same however a message was split, and hardly a byte is looked at twice.

/** What a parser says instead of a position: it has read all there is; or never mind what comes. */
const NEED_MORE = -1;
const REJECT = -2;

// ── shared: byte classes ──
const [HTAB, LF, CR, SP] = [0x09, 0x0a, 0x0d, 0x20];

const EVERY_BYTE = String.fromCharCode(...Array(256).keys());

/** The class of the bytes that a pattern matches, taken as ISO 8859-1: a table of 256, 1 for a member. */
function bytesLike(pattern: RegExp): Uint8Array {
  const members = new Uint8Array(256);
  for (const { index } of EVERY_BYTE.matchAll(pattern)) members[index] = 1;
  return members;
}

/** field-content: VCHAR / obs-text / SP / HTAB (RFC 9110 §5.5). CR, LF, NUL and other CTL are not. */
const FIELD_CONTENT = bytesLike(/[\t\x20-\x7e\x80-\xff]/g);
/** tchar = "!" / "#" / "$" / "%" / "&" / "'" / "*" / "+" / "-" / "." / "^" / "_" / "`" / "|" / "~" / DIGIT / ALPHA */
const TCHAR = bytesLike(/[!#$%&'*+\-.^_`|~0-9A-Za-z]/g);
const HEXDIG = bytesLike(/[0-9A-Fa-f]/g);

/** The byte at an index that the caller knows to be in range; the type cannot know it. */
const byteAt = (bytes: Uint8Array, index: number) => bytes[index] as number;

/** The bytes from..to as ISO 8859-1 text, one character a byte. */
const latin1 = (bytes: Uint8Array, from: number, to: number) =>
  Buffer.from(bytes.buffer, bytes.byteOffset + from, to - from).toString("latin1");

/** OWS is SP and HTAB; String.trim takes more, and a regular expression takes quadratic time on long runs. */
function trimOws(text: string): string {
  let [from, to] = [0, text.length];
  while (from < to && (text[from] === " " || text[from] === "\t")) from++;
  while (to > from && (text[to - 1] === " " || text[to - 1] === "\t")) to--;
  return text.slice(from, to);
}
// ── end shared ──

// ── shared: chunked ──
type ExtensionState =
  | "start"
  | "before-name"
  | "name"
  | "after-name"
  | "before-value"
  | "token"
  | "quoted"
  | "quoted-pair"
  | "after-quoted"
  | "after-value";
type ExtensionByte = "BWS" | ";" | "=" | '"' | "\\" | "tchar" | "other";

const QUOTED_TEXT = { BWS: "quoted", ";": "quoted", "=": "quoted", tchar: "quoted", other: "quoted" } as const;

/**
 * chunk-ext = *( BWS ";" BWS token [ BWS "=" BWS ( token / quoted-string ) ] )
 *
 * Where each byte leads to, so that nothing of an extension has to be kept. What is not here is a fault.
 */
const EXTENSION_STEPS: Readonly<Record<ExtensionState, Readonly<Partial<Record<ExtensionByte, ExtensionState>>>>> = {
  start: { BWS: "start", ";": "before-name" },
  "before-name": { BWS: "before-name", tchar: "name" },
  name: { tchar: "name", BWS: "after-name", "=": "before-value", ";": "before-name" },
  "after-name": { BWS: "after-name", "=": "before-value", ";": "before-name" },
  "before-value": { BWS: "before-value", tchar: "token", '"': "quoted" },
  token: { tchar: "token", BWS: "after-value", ";": "before-name" },
  quoted: { ...QUOTED_TEXT, "\\": "quoted-pair", '"': "after-quoted" },
  "quoted-pair": { ...QUOTED_TEXT, "\\": "quoted", '"': "quoted" },
  "after-quoted": { BWS: "after-value", ";": "before-name" },
  "after-value": { BWS: "after-value", ";": "before-name" },
};
/** The states in which the line may end. */
const EXTENSION_ENDS: ReadonlySet<ExtensionState> = new Set(["name", "token", "after-quoted"] as const);

function extensionByte(byte: number): ExtensionByte {
  if (byte === SP || byte === HTAB) return "BWS";
  if (TCHAR[byte] === 1) return "tchar";
  const character = String.fromCharCode(byte);
  return character === ";" || character === "=" || character === '"' || character === "\\" ? character : "other";
}

/** field-line = field-name ":" OWS field-value OWS */
const FIELD_LINE = /^([!#$%&'*+\-.^_`|~\w]+):[\t\x20-\x7e\x80-\xff]*$/;

export type ChunkedFault =
  "bare-lf" | "bare-cr" | "chunk-size" | "chunk-extension" | "chunk-data" | "trailer" | "trailer-too-large";

/**
 * Takes the chunked transfer coding apart (RFC 9112 §7.1), however its bytes are split:
 *
 *     chunked-body = *( chunk-size [ chunk-ext ] CRLF chunk-data CRLF ) last-chunk trailer-section CRLF
 *
 * Call {@link next} until the bytes are used up or `state` is "done" or "failed".
 */
export class ChunkedDecoder {
  state: "size" | "extension" | "size-lf" | "data" | "data-cr" | "data-lf" | "trailer" | "done" | "failed" = "size";
  /** Why, once `state` is "failed". */
  fault: ChunkedFault | "" = "";
  /** What the last call found to be content: these indexes into the bytes that it was given. */
  contentFrom = 0;
  contentTo = 0;
  /** Octets of content announced so far, those of the chunk under way included. */
  announced = 0;
  /** The lower-case names of the trailer fields, for who has to refuse some of them. */
  readonly trailerNames: string[] = [];
  private left = 0;
  private sizeDigits = 0;
  private extension: ExtensionState = "start";
  private extensionBytes = 0;
  private trailerBytes = 0;
  /** The line of the trailer section that is under way: the first `lineLength` of the bytes. */
  private line = new Uint8Array(0);
  private lineLength = 0;

  /** Bytes that are kept until there are more. */
  get heldBytes(): number {
    return this.line.length;
  }

  constructor(
    private readonly limits: { chunkExtensionBytesMax: number; headBytesMax: number; fieldLinesMax: number },
    /** RFC 9112 §5.2: a user agent reads obs-fold as SP; a server refuses it. */
    private readonly acceptsFolds: boolean,
  ) {}

  /** Reads from `from` on; returns the index after what it has used, `to` at the most. */
  next(bytes: Uint8Array, from: number, to: number): number {
    this.contentFrom = this.contentTo = from;
    let at = from;
    while (at < to && this.state !== "done" && this.state !== "failed") {
      if (this.state === "data") return this.takeData(at, to);
      this.takeByte(byteAt(bytes, at));
      at++;
    }
    return at;
  }

  private takeData(from: number, to: number): number {
    const end = Math.min(to, from + this.left);
    this.contentFrom = from;
    this.contentTo = end;
    this.left -= end - from;
    if (this.left === 0) this.state = "data-cr";
    return end;
  }

  private takeByte(byte: number): void {
    switch (this.state) {
      case "size":
        return this.takeSizeByte(byte);
      case "extension":
        return this.takeExtensionByte(byte);
      case "size-lf":
        return byte === LF ? this.endSizeLine() : this.fail("bare-cr");
      case "data-cr":
        return byte === CR ? this.go("data-lf") : this.fail("chunk-data");
      case "data-lf":
        return byte === LF ? this.go("size") : this.fail("chunk-data");
      case "trailer":
        return this.takeTrailerByte(byte);
      case "data":
      case "done":
      case "failed":
        return;
      default:
        this.state satisfies never;
    }
  }

  private takeSizeByte(byte: number): void {
    if (HEXDIG[byte] === 1) {
      this.left = this.left * 16 + Number.parseInt(String.fromCharCode(byte), 16);
      this.sizeDigits++;
      // Past 2^53 sums stop being exact: refuse, never wrap around. The digits are bounded too, or
      // leading zeros would go on for ever.
      if (this.left + this.announced > Number.MAX_SAFE_INTEGER || this.sizeDigits > 64) this.fail("chunk-size");
    } else if (this.sizeDigits === 0) this.fail("chunk-size");
    else if (byte === CR) this.go("size-lf");
    else if (byte === LF) this.fail("bare-lf");
    else if (byte === SP || byte === HTAB || byte === 0x3b) {
      this.go("extension");
      this.extension = "start";
      this.takeExtensionByte(byte);
    } else this.fail("chunk-size");
  }

  private takeExtensionByte(byte: number): void {
    if (byte === LF) return this.fail("bare-lf");
    if (byte === CR) return EXTENSION_ENDS.has(this.extension) ? this.go("size-lf") : this.fail("chunk-extension");
    // All of them together may outweigh the content only by so much, or tiny chunks would keep us busy.
    this.extensionBytes++;
    const next = FIELD_CONTENT[byte] === 1 ? EXTENSION_STEPS[this.extension][extensionByte(byte)] : undefined;
    if (next === undefined || this.extensionBytes > this.limits.chunkExtensionBytesMax + this.announced)
      return this.fail("chunk-extension");
    this.extension = next;
  }

  private endSizeLine(): void {
    this.announced += this.left;
    this.go(this.left > 0 ? "data" : "trailer");
  }

  /** The trailer section has the syntax and the limits of the head (RFC 9112 §7.1.2). */
  private takeTrailerByte(byte: number): void {
    this.trailerBytes++;
    if (this.trailerBytes > this.limits.headBytesMax) return this.fail("trailer-too-large");
    const isAfterCr = this.lineLength > 0 && this.line[this.lineLength - 1] === CR;
    if (byte === LF) return isAfterCr ? this.endTrailerLine() : this.fail("bare-lf");
    // CR is only ever the last byte of a line; what else may stand in a line is checked at once.
    if (isAfterCr) return this.fail("bare-cr");
    if (byte !== CR && FIELD_CONTENT[byte] !== 1) return this.fail("trailer");
    if (this.lineLength === this.line.length) {
      const longer = new Uint8Array(Math.max(64, 2 * this.lineLength));
      longer.set(this.line);
      this.line = longer;
    }
    this.line[this.lineLength++] = byte;
  }

  private endTrailerLine(): void {
    const line = latin1(this.line, 0, this.lineLength - 1);
    this.lineLength = 0;
    if (line === "") return this.go("done");
    const isFold = this.acceptsFolds && /^[ \t]/.test(line) && this.trailerNames.length > 0;
    if (isFold && FIELD_LINE.test(`x:${line}`)) return;
    const name = FIELD_LINE.exec(line)?.[1];
    if (name === undefined) return this.fail("trailer");
    if (this.trailerNames.length === this.limits.fieldLinesMax) return this.fail("trailer-too-large");
    this.trailerNames.push(name.toLowerCase());
  }

  private go(state: ChunkedDecoder["state"]): void {
    this.state = state;
    if (state === "size") this.left = this.sizeDigits = 0;
  }

  private fail(fault: ChunkedFault): void {
    this.state = "failed";
    this.fault = fault;
  }
}
// ── end shared ──

const IS_TOKEN = /^[!#$%&'*+\-.^_`|~0-9A-Za-z]+$/;
/** request-target: visible ASCII (RFC 9112 §3.2), but "#", which starts a fragment, and "%". */
const TARGET = bytesLike(/[\x21-\x22\x24\x26-\x7e]/g);
/** reg-name (RFC 3986 §3.2.2) but "%", and but ",": in Host it can only be a list of hosts. */
const REG_NAME = bytesLike(/[A-Za-z0-9\-._~!$&'()*+;=]/g);
/** IPvFuture = "v" 1*HEXDIG "." 1*( unreserved / sub-delims / ":" ) */
const IP_FUTURE = /^v[0-9A-Fa-f]+\.[A-Za-z0-9\-._~!$&'()*+,;=:]+$/i;
const DIGIT = bytesLike(/[0-9]/g);
const [COLON, PERCENT, SLASH, ASTERISK] = [0x3a, 0x25, 0x2f, 0x2a];
const [QUESTION_MARK, BRACKET_OPEN, BRACKET_CLOSE] = [0x3f, 0x5b, 0x5d];

/** The index of the first byte of from..to that is not of the class; `to` where all are. */
function skipWhile(members: Uint8Array, bytes: Uint8Array, from: number, to: number): number {
  let at = from;
  while (at < to && members[byteAt(bytes, at)] === 1) at++;
  return at;
}

const isHex = (bytes: Uint8Array, at: number) => HEXDIG[byteAt(bytes, at)] === 1;

/** Are the bytes from..to this lower-case text, in any case? Only for bytes above 0x1f. */
function isText(bytes: Uint8Array, from: number, to: number, lowerCase: string): boolean {
  if (to - from !== lowerCase.length) return false;
  for (let i = 0; i < lowerCase.length; i++)
    if ((byteAt(bytes, from + i) | 0x20) !== lowerCase.charCodeAt(i)) return false;
  return true;
}

/** The value of 1*DIGIT; NaN where the bytes from..to are anything else. Past 2^53 it is not exact. */
function parseDecimal(bytes: Uint8Array, from: number, to: number): number {
  let value = from === to ? Number.NaN : 0;
  for (let at = from; at < to; at++) {
    const byte = byteAt(bytes, at);
    value = DIGIT[byte] === 1 ? 10 * value + (byte - 0x30) : Number.NaN;
  }
  return value;
}

/** What the parser of a head is about to read. */
enum HeadState {
  EmptyLine,
  Method,
  RequestTarget,
  HttpVersion,
  FieldName,
  FieldValue,
  Done,
}

/** The fields that decide about a message; the parser notes where they are as it passes them. */
enum Field {
  Other,
  Host,
  ContentLength,
  TransferEncoding,
  Connection,
  Expect,
}

/** Content whose end is marked by the chunked transfer coding; other lengths are octets. */
export const CHUNKED = -1;

/**
 * A request head: first the state of its parser, then what it found. Positions count from `base`,
 * the index of the head's first byte, and texts are made only for who asks: a head that nobody
 * looks at closely costs no allocation.
 */
export class RequestHead {
  bytes: Uint8Array = new Uint8Array(0);
  base = 0;
  /** Octets parsed so far; the length of the head when it is complete. */
  length = 0;
  rejection: Rejection | "" = "";

  state = HeadState.EmptyLine;
  emptyLines = 0;
  fieldLines = 0;
  /** Where the element under way starts, and which field it belongs to. */
  elementFrom = 0;
  field = Field.Other;

  method: Method = "";
  targetFrom = 0;
  targetTo = 0;
  minorVersion = 0;
  hosts = 0;
  hostFrom = 0;
  hostTo = 0;
  contentLengths = 0;
  contentLengthFrom = 0;
  contentLengthTo = 0;
  transferEncodings = 0;
  transferEncodingFrom = 0;
  transferEncodingTo = 0;
  hasClose = false;
  hasKeepAlive = false;
  expectsContinue = false;
  hasOtherExpectation = false;
  /** Octets of content that follow, or {@link CHUNKED}. */
  contentLength = 0;

  constructor(readonly limits: Limits) {}

  /** Makes ready for a head that starts at bytes[base]. */
  start(bytes: Uint8Array, base: number): void {
    this.bytes = bytes;
    this.base = base;
    this.length = this.emptyLines = this.fieldLines = this.elementFrom = 0;
    this.hosts = this.contentLengths = this.transferEncodings = this.contentLength = 0;
    this.targetFrom = this.targetTo = 0;
    this.state = HeadState.EmptyLine;
    this.rejection = this.method = "";
    this.hasClose = this.hasKeepAlive = this.expectsContinue = this.hasOtherExpectation = false;
  }

  /** RFC 9112 §9.3: HTTP/1.1 goes on unless told to close; HTTP/1.0 only when asked to. */
  get keepsAlive(): boolean {
    return !this.hasClose && (this.minorVersion >= 1 || this.hasKeepAlive);
  }

  /** The request-target as it stands in the request-line. */
  get requestTarget(): string {
    return latin1(this.bytes, this.base + this.targetFrom, this.base + this.targetTo);
  }

  /** The request-line without CRLF; what there is of it where the head was refused. */
  get requestLine(): string {
    return this.text.trimStart().split("\r", 1)[0] ?? "";
  }

  /** The head as text, one character a byte. */
  get text(): string {
    return latin1(this.bytes, this.base, this.base + this.length);
  }

  /** All fields by name, in lower case. RFC 9110 §5.3: lines of one name are one list. */
  fields(): Map<string, string> {
    const fields = new Map<string, string>();
    for (const line of this.text.trimStart().split("\r\n").slice(1)) {
      const colon = line.indexOf(":");
      if (colon < 0) continue;
      const name = line.slice(0, colon).toLowerCase();
      const value = trimOws(line.slice(colon + 1));
      const before = fields.get(name);
      fields.set(name, before === undefined ? value : `${before}, ${value}`);
    }
    return fields;
  }
}

/**
 * Parses a request head (RFC 9112 §2 to §5) from where it stands on in head.bytes, up to index `to`.
 *
 * Returns the index after the head; NEED_MORE, to be called again with more bytes; or REJECT, and
 * head.rejection says why. After NEED_MORE the bytes may have moved: set head.bytes and head.base.
 */
export function parseRequestHead(head: RequestHead, to: number): number {
  const { bytes, base } = head;
  const end = Math.min(to, base + head.limits.headBytesMax);
  let at = base + head.length;
  while (head.state !== HeadState.Done) {
    const next = parseElement(head, bytes, at, end);
    if (next === NEED_MORE && end - base < head.limits.headBytesMax) return NEED_MORE;
    if (next < 0) {
      if (next === NEED_MORE) reject(head, "head-too-large");
      // What came, the fault included, is kept for the log.
      head.length = Math.min(to - base, LOGGED_BYTES_MAX);
      return REJECT;
    }
    at = next;
  }
  head.length = at - base;
  return decide(head);
}

function parseElement(head: RequestHead, bytes: Uint8Array, at: number, end: number): number {
  switch (head.state) {
    case HeadState.EmptyLine:
      return skipEmptyLine(head, bytes, at, end);
    case HeadState.Method:
      return parseMethod(head, bytes, at, end);
    case HeadState.RequestTarget:
      return parseRequestTarget(head, bytes, at, end);
    case HeadState.HttpVersion:
      return parseHttpVersion(head, bytes, at, end);
    case HeadState.FieldName:
      return parseFieldName(head, bytes, at, end);
    case HeadState.FieldValue:
      return parseFieldValue(head, bytes, at, end);
    case HeadState.Done:
      return at;
    default:
      return head.state satisfies never;
  }
}

/** Everything before `at` is parsed; the rest has to wait for more bytes. */
function needMore(head: RequestHead, at: number): number {
  head.length = at - head.base;
  return NEED_MORE;
}

function reject(head: RequestHead, rejection: Rejection): number {
  head.rejection = rejection;
  return REJECT;
}

/** The next element starts at `at`. */
function go(head: RequestHead, state: HeadState, at: number): number {
  head.state = state;
  head.elementFrom = at - head.base;
  return at;
}

/** RFC 9112 §2.2: a server should skip an empty line that precedes the request-line. */
function skipEmptyLine(head: RequestHead, bytes: Uint8Array, at: number, end: number): number {
  if (at === end) return needMore(head, at);
  if (bytes[at] === LF) return reject(head, "bare-lf");
  if (bytes[at] !== CR) return go(head, HeadState.Method, at);
  if (at + 1 === end) return needMore(head, at);
  if (bytes[at + 1] !== LF) return reject(head, "bare-cr");
  head.emptyLines++;
  return head.emptyLines > head.limits.emptyLinesMax ? reject(head, "empty-lines") : at + 2;
}

/** RFC 9112 §3: request-line = method SP request-target SP HTTP-version; exactly one SP, no other white space. */
function parseMethod(head: RequestHead, bytes: Uint8Array, at: number, end: number): number {
  const from = head.base + head.elementFrom;
  const to = skipWhile(TCHAR, bytes, at, end);
  // RFC 9112 §3: a method longer than any that is implemented gets 501.
  if (to - from > head.limits.methodBytesMax) return reject(head, "method-too-long");
  if (to === end) return needMore(head, to);
  if (bytes[to] !== SP || to === from) return reject(head, "request-line");
  head.method = recogniseMethod(bytes, from, to);
  return go(head, HeadState.RequestTarget, to + 1);
}

/** Methods are case-sensitive (RFC 9110 §9.1). */
function recogniseMethod(bytes: Uint8Array, from: number, to: number): Method {
  for (const method of METHODS) {
    let i = 0;
    while (i < method.length && bytes[from + i] === method.charCodeAt(i)) i++;
    if (i === method.length && to - from === i) return method;
  }
  return "";
}

function parseRequestTarget(head: RequestHead, bytes: Uint8Array, from: number, end: number): number {
  const start = head.base + head.elementFrom;
  let at = from;
  for (;;) {
    at = skipWhile(TARGET, bytes, at, end);
    // RFC 9112 §3: a request-target longer than any that is served gets 414.
    if (at - start > head.limits.requestTargetBytesMax) return reject(head, "request-target-too-long");
    if (at === end) return needMore(head, at);
    if (bytes[at] !== PERCENT) break;
    // RFC 3986 §2.1: pct-encoded = "%" HEXDIG HEXDIG. Decoders differ on anything else: refuse it.
    if (at + 1 < end && !isHex(bytes, at + 1)) return reject(head, "request-target");
    if (at + 2 >= end) return needMore(head, at);
    if (!isHex(bytes, at + 2)) return reject(head, "request-target");
    at += 3;
  }
  if (bytes[at] !== SP) return reject(head, bytes[at] === LF ? "bare-lf" : "request-line");
  if (at === start) return reject(head, "request-line");
  head.targetFrom = head.elementFrom;
  head.targetTo = at - head.base;
  return go(head, HeadState.HttpVersion, at + 1);
}

/** RFC 9112 §2.3: HTTP-version = "HTTP" "/" DIGIT "." DIGIT, in upper case; then CRLF. D is any digit. */
const VERSION_LINE_END = "HTTP/D.D\r\n";

function parseHttpVersion(head: RequestHead, bytes: Uint8Array, from: number, end: number): number {
  for (let i = 0; i < VERSION_LINE_END.length; i++) {
    if (from + i === end) return needMore(head, from);
    const byte = byteAt(bytes, from + i);
    const expected = VERSION_LINE_END.charCodeAt(i);
    if (expected === 0x44 ? DIGIT[byte] === 1 : byte === expected) continue;
    if (expected === LF) return reject(head, "bare-cr");
    return reject(head, byte === LF ? "bare-lf" : "request-line");
  }
  // RFC 9110 §2.5: a higher minor version is read as ours; another major one is another protocol.
  if (bytes[from + 5] !== 0x31) return reject(head, "http-version");
  head.minorVersion = byteAt(bytes, from + 7) - 0x30;
  return go(head, HeadState.FieldName, from + VERSION_LINE_END.length);
}

/** RFC 9112 §5: field-line = field-name ":" OWS field-value OWS */
function parseFieldName(head: RequestHead, bytes: Uint8Array, at: number, end: number): number {
  const from = head.base + head.elementFrom;
  const to = skipWhile(TCHAR, bytes, at, end);
  if (to === end) return needMore(head, to);
  // RFC 9112 §5.1: no white space between name and colon: recipients that skip it can be fooled.
  if (to === from || bytes[to] !== COLON) return endFieldSection(head, bytes, from, to, end);
  if (++head.fieldLines > head.limits.fieldLinesMax) return reject(head, "too-many-fields");
  head.field = knownField(bytes, from, to);
  return go(head, HeadState.FieldValue, to + 1);
}

/** No field-name here: the empty line that ends the head, or a fault. */
function endFieldSection(head: RequestHead, bytes: Uint8Array, from: number, at: number, end: number): number {
  const byte = byteAt(bytes, at);
  if (byte === LF) return reject(head, "bare-lf");
  // RFC 9112 §5.2 and §2.2: obs-fold, or white space before the first field-line.
  if (at === from && (byte === SP || byte === HTAB)) return reject(head, "obs-fold");
  if (at !== from || byte !== CR) return reject(head, "field-line");
  if (at + 1 === end) return needMore(head, at);
  if (bytes[at + 1] !== LF) return reject(head, "bare-cr");
  return go(head, HeadState.Done, at + 2);
}

function parseFieldValue(head: RequestHead, bytes: Uint8Array, at: number, end: number): number {
  const to = skipWhile(FIELD_CONTENT, bytes, at, end);
  if (to === end) return needMore(head, to);
  if (bytes[to] !== CR) return reject(head, bytes[to] === LF ? "bare-lf" : "field-value");
  if (to + 1 === end) return needMore(head, to);
  if (bytes[to + 1] !== LF) return reject(head, "bare-cr");
  if (head.field !== Field.Other) noteField(head, bytes, head.base + head.elementFrom, to);
  return go(head, HeadState.FieldName, to + 2);
}

function knownField(bytes: Uint8Array, from: number, to: number): Field {
  switch (to - from) {
    case 4:
      return isText(bytes, from, to, "host") ? Field.Host : Field.Other;
    case 6:
      return isText(bytes, from, to, "expect") ? Field.Expect : Field.Other;
    case 10:
      return isText(bytes, from, to, "connection") ? Field.Connection : Field.Other;
    case 14:
      return isText(bytes, from, to, "content-length") ? Field.ContentLength : Field.Other;
    case 17:
      return isText(bytes, from, to, "transfer-encoding") ? Field.TransferEncoding : Field.Other;
    default:
      return Field.Other;
  }
}

/** Notes a field that decides about the message. OWS around its value is SP and HTAB, nothing else. */
function noteField(head: RequestHead, bytes: Uint8Array, lineFrom: number, lineTo: number): void {
  let from = lineFrom;
  let to = lineTo;
  while (from < to && (bytes[from] === SP || bytes[from] === HTAB)) from++;
  while (to > from && (bytes[to - 1] === SP || bytes[to - 1] === HTAB)) to--;
  switch (head.field) {
    case Field.Host:
      head.hosts++;
      head.hostFrom = from - head.base;
      head.hostTo = to - head.base;
      return;
    case Field.ContentLength:
      head.contentLengths++;
      head.contentLengthFrom = from - head.base;
      head.contentLengthTo = to - head.base;
      return;
    case Field.TransferEncoding:
      head.transferEncodings++;
      head.transferEncodingFrom = from - head.base;
      head.transferEncodingTo = to - head.base;
      return;
    case Field.Connection:
      return noteConnectionOptions(head, bytes, from, to);
    case Field.Expect:
      return noteExpectations(head, latin1(bytes, from, to));
    case Field.Other:
      return;
    default:
      head.field satisfies never;
  }
}

/** RFC 9110 §7.6.1: Connection = #connection-option, tokens in any case. */
function noteConnectionOptions(head: RequestHead, bytes: Uint8Array, from: number, to: number): void {
  let at = from;
  while (at < to) {
    const tokenTo = skipWhile(TCHAR, bytes, at, to);
    if (isText(bytes, at, tokenTo, "close")) head.hasClose = true;
    else if (isText(bytes, at, tokenTo, "keep-alive")) head.hasKeepAlive = true;
    at = Math.max(tokenTo, at + 1);
  }
}

/** RFC 9110 §10.1.1: Expect = #expectation, case-insensitive, and nothing but 100-continue is defined. */
function noteExpectations(head: RequestHead, value: string): void {
  for (const expectation of value.toLowerCase().split(",").map(trimOws)) {
    if (expectation === "100-continue") head.expectsContinue = true;
    else if (expectation !== "") head.hasOtherExpectation = true;
  }
}

/** The head is complete and each line well-formed: is it one request, and where does it end? */
function decide(head: RequestHead): number {
  const rejection = checkRequestTarget(head) ?? checkHost(head) ?? decideFraming(head) ?? checkExpectation(head);
  return rejection === undefined ? head.base + head.length : reject(head, rejection);
}

/** RFC 9112 §3.2: the four forms of a request-target, and which method may use which. */
function checkRequestTarget(head: RequestHead): Rejection | undefined {
  const { bytes } = head;
  const from = head.base + head.targetFrom;
  const to = head.base + head.targetTo;
  // §3.2.3: authority-form = uri-host ":" port, for CONNECT and only for it.
  if (head.method === "CONNECT") return isAuthority(bytes, from, to, true) ? undefined : "request-target";
  // §3.2.1: origin-form = absolute-path [ "?" query ]
  if (bytes[from] === SLASH) return undefined;
  // §3.2.4: asterisk-form = "*", for OPTIONS and only for it.
  if (bytes[from] === ASTERISK && to - from === 1) return head.method === "OPTIONS" ? undefined : "request-target";
  // §3.2.2: absolute-form = absolute-URI, of the schemes that we could answer for.
  let authorityFrom = from;
  if (isText(bytes, from, Math.min(to, from + 7), "http://")) authorityFrom = from + 7;
  else if (isText(bytes, from, Math.min(to, from + 8), "https://")) authorityFrom = from + 8;
  else return "request-target";
  let authorityTo = authorityFrom;
  while (authorityTo < to && bytes[authorityTo] !== SLASH && bytes[authorityTo] !== QUESTION_MARK) authorityTo++;
  return isAuthority(bytes, authorityFrom, authorityTo, false) ? undefined : "request-target";
}

/**
 * RFC 9112 §3.2: 400 for an HTTP/1.1 request without Host, and for any request with more than one or
 * with an invalid one. In absolute-form the target's authority wins, but Host must still be in order.
 */
function checkHost(head: RequestHead): Rejection | undefined {
  if (head.hosts === 0) return head.minorVersion === 0 ? undefined : "host-missing";
  if (head.hosts > 1) return "host-repeated";
  return isAuthority(head.bytes, head.base + head.hostFrom, head.base + head.hostTo, false)
    ? undefined
    : "host-invalid";
}

/** Is it uri-host [ ":" port ]? Without userinfo, and never empty: an http URI has a host (RFC 9110 §4.2.1). */
function isAuthority(bytes: Uint8Array, from: number, to: number, needsPort: boolean): boolean {
  const hostTo = skipHost(bytes, from, to);
  if (hostTo === from) return false;
  if (hostTo === to) return !needsPort;
  if (bytes[hostTo] !== COLON) return false;
  // RFC 3986 §3.2.3: port = *DIGIT; empty is the default port, but not where one is needed.
  const portFrom = hostTo + 1;
  return portFrom === to ? !needsPort : parseDecimal(bytes, portFrom, to) <= 65_535;
}

/** The index after an IP-literal or a reg-name (RFC 3986 §3.2.2); `from` where there is neither. */
function skipHost(bytes: Uint8Array, from: number, to: number): number {
  if (from < to && bytes[from] === BRACKET_OPEN) {
    const close = bytes.subarray(from, to).indexOf(BRACKET_CLOSE);
    if (close < 0) return from;
    const literal = latin1(bytes, from + 1, from + close);
    // A zone id ("fe80::1%eth0") means nothing to another machine and has no place in a URI.
    const isLiteral = (isIPv6(literal) && !literal.includes("%")) || IP_FUTURE.test(literal);
    return isLiteral ? from + close + 1 : from;
  }
  let at = from;
  for (;;) {
    at = skipWhile(REG_NAME, bytes, at, to);
    if (at === to || bytes[at] !== PERCENT) return at;
    if (at + 2 >= to || !isHex(bytes, at + 1) || !isHex(bytes, at + 2)) return from;
    at += 3;
  }
}

/** RFC 9112 §6.1: codings that are not implemented get 501, where chunked comes after them, last and once. */
function explainCodings(value: string): Rejection {
  const codings = value.toLowerCase().split(",").map(trimOws);
  const isForeign =
    codings.pop() === "chunked" && codings.every((coding) => coding !== "chunked" && IS_TOKEN.test(coding));
  return isForeign ? "transfer-coding-unknown" : "transfer-encoding";
}

/**
 * RFC 9112 §6.3: where the content ends. Who reads it otherwise than the server in front of us or
 * behind us lets a second request be smuggled in the first one's content, so nothing is guessed.
 */
function decideFraming(head: RequestHead): Rejection | undefined {
  const { bytes, base } = head;
  if (head.transferEncodings > 0) {
    // §6.1: an HTTP/1.0 peer cannot know it: its framing is faulty.
    if (head.minorVersion === 0) return "transfer-encoding-1.0";
    // §6.3 item 3: both present is an attempt at smuggling or at splitting.
    if (head.contentLengths > 0) return "length-and-chunked";
    // §6.3 item 4: chunked must be the final coding, once; and no other is implemented (§6.1: 501).
    const from = base + head.transferEncodingFrom;
    const to = base + head.transferEncodingTo;
    head.contentLength = CHUNKED;
    if (head.transferEncodings > 1) return "transfer-encoding";
    if (isText(bytes, from, to, "chunked")) return undefined;
    return explainCodings(latin1(bytes, from, to));
  }
  if (head.contentLengths > 0) {
    // §6.3 item 5: repeated or listed values are refused even where they are equal.
    if (head.contentLengths > 1) return "content-length";
    // RFC 9110 §8.6: guard against values that overflow: past 2^53 numbers are no longer exact.
    head.contentLength = parseDecimal(bytes, base + head.contentLengthFrom, base + head.contentLengthTo);
    return Number.isSafeInteger(head.contentLength) ? undefined : "content-length";
  }
  // §6.3 item 7: a request with neither has no content.
  return undefined;
}

function checkExpectation(head: RequestHead): Rejection | undefined {
  // RFC 9110 §10.1.1: in an HTTP/1.0 request 100-continue is ignored.
  if (head.minorVersion === 0) head.expectsContinue = false;
  return head.hasOtherExpectation ? "expectation" : undefined;
}

/** RFC 9110 §6.5.1: fields for framing, routing and authentication must not come after the content. */
const FORBIDDEN_TRAILERS: ReadonlySet<string> = new Set(
  "authorization connection content-encoding content-length content-range content-type cookie expect host keep-alive max-forwards proxy-authorization set-cookie te trailer transfer-encoding upgrade".split(
    " ",
  ),
);

/** The path of a request-target (RFC 3986 §3.3), taken apart. */
export interface TargetPath {
  /** Decoded, none of them empty. */
  readonly segments: readonly string[];
  /** It ends in a slash: it is about a folder. */
  readonly isFolder: boolean;
  /** "?" and what follows; "" where there is none. */
  readonly query: string;
}

/** What no name of a file may have: elsewhere than here these lead to other folders. On Windows ":" names streams. */
const NO_FILE_NAME = process.platform === "win32" ? /[\0/\\:]|^\.\.$/ : /[\0/\\]|^\.\.$/;

/**
 * Takes the path of a request-target apart. It is decoded once, and nothing in it is resolved: who sends ".." has not
 * done it himself, and wants to get somewhere else. Slashes in a row count as one, so that no path starts with "//".
 * @returns undefined where no file can have this path
 */
export function parseTargetPath(requestTarget: string): TargetPath | undefined {
  const [, path = "", query = ""] = /^(?:https?:\/\/[^/?]*)?([^?]*)(.*)$/i.exec(requestTarget) ?? [];
  try {
    const segments = path
      .split("/")
      .filter((segment) => segment !== "")
      .map(decodeURIComponent);
    if (segments.some((segment) => NO_FILE_NAME.test(segment))) return undefined;
    return { segments, isFolder: path === "" || path.endsWith("/"), query };
  } catch {
    return undefined; // decodeURIComponent: not UTF-8
  }
}

/**
 * The one range that is asked for (RFC 9110 §14.1.2).
 * @returns "unsatisfiable" where nothing of it is there; undefined where it is to be ignored: another unit, not to the
 * letter, or several ranges, for which a server may send the whole (§14.2)
 */
export function parseRange(value: string, size: number): ByteRange | "unsatisfiable" | undefined {
  const [, first, last] = /^bytes=[ \t]*(\d*)-(\d*)[ \t]*$/i.exec(value) ?? [];
  if (first === undefined || last === undefined || (first === "" && last === "")) return undefined;
  if (first === "") {
    if (Number(last) === 0) return "unsatisfiable";
    // Of an empty file the last bytes are the whole, and Content-Range has no way to say so.
    return size === 0 ? undefined : { from: Math.max(0, size - Number(last)), to: size };
  }
  if (last !== "" && Number(last) < Number(first)) return undefined;
  if (Number(first) >= size) return "unsatisfiable";
  return { from: Number(first), to: last === "" ? size : Math.min(size, Number(last) + 1) };
}

const IMF_FIXDATE = /^[A-Z][a-z]{2}, (\d\d) ([A-Z][a-z]{2}) (\d{4}) (\d\d:\d\d:\d\d) GMT$/;
const RFC850_DATE = /^[A-Z][a-z]+day, (\d\d)-([A-Z][a-z]{2})-(\d\d) (\d\d:\d\d:\d\d) GMT$/;
const ASCTIME_DATE = /^[A-Z][a-z]{2} ([A-Z][a-z]{2}) ([ \d]\d) (\d\d:\d\d:\d\d) (\d{4})$/;

/** RFC 9110 §5.6.7: HTTP-date, in the form that is sent today or in one of the two that have been. NaN where it is none. */
export function parseHttpDate(text: string, now = Date.now()): number {
  const [, asctimeMonth = "", asctimeDay = "", asctimeTime = "", asctimeYear = ""] = ASCTIME_DATE.exec(text) ?? [];
  const [, day = asctimeDay.replace(" ", "0"), month = asctimeMonth, year = asctimeYear, time = asctimeTime] =
    IMF_FIXDATE.exec(text) ?? RFC850_DATE.exec(text) ?? [];
  // Two digits are the year that is not more than 50 years ahead.
  const century = new Date(now).getUTCFullYear() + 50 - Number(year);
  const wholeYear = year.length === 2 ? String(Number(year) + 100 * Math.floor(century / 100)) : year;
  const date = new Date(`${day} ${month} ${wholeYear} ${time} GMT`);
  // The 31st of February is none, and Date takes it for one of March.
  const isDate =
    !Number.isNaN(date.getTime()) && date.toUTCString().endsWith(`${day} ${month} ${wholeYear} ${time} GMT`);
  return isDate ? date.getTime() : Number.NaN;
}

/** RFC 9530 §4: a dictionary of preferences from 0, "not this one", to 10. */
export function wantsSha256(wantReprDigest: string): boolean {
  const last = [...wantReprDigest.matchAll(/(?:^|,)[ \t]*sha-256=(\d{1,2})(?=[ \t]*(?:[,;]|$))/g)].at(-1);
  return Number(last?.[1] ?? 0) > 0;
}

// ═══ 5 Formatting ════════════════════════════════════════════════════════════════════════════════

const NO_BYTES = new Uint8Array(0);
const encoder = new TextEncoder();
const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
const CONTINUE = encoder.encode("HTTP/1.1 100 Continue\r\n\r\n");

/** status-line and field-lines, up to the Date. */
function formatHead(status: number, fields: Record<string, string>): Uint8Array {
  const lines = Object.entries(fields).map(([name, value]) => `${name}: ${value}\r\n`);
  return encoder.encode(`HTTP/1.1 ${status} ${REASON_PHRASES[status] ?? ""}\r\n${lines.join("")}Date: `);
}

/** The part of a response that does not change. Content-Length is added where content may follow. */
export function prepareResponse(status: number, fields: Record<string, string>, content = ""): Response {
  const bytes = encoder.encode(content);
  // RFC 9110 §8.6 and §15.4.5: no Content-Length in a 1xx or 204 response, and none of another content in a 304.
  const hasLength = status !== 204 && status !== 304;
  const all = hasLength ? { ...fields, "Content-Length": String(bytes.length) } : fields;
  return { status, head: formatHead(status, all), content: bytes };
}

const TEXT_FIELDS = { "Content-Type": "text/plain; charset=utf-8" };

const REJECTION_RESPONSES = new Map<Rejection, Response>();

/**
 * The answer to a request that is refused. It repeats nothing of what the peer sent. Made at the first use and kept: an
 * attacker shall not cost more than an ordinary peer.
 */
function responseTo(rejection: Rejection): Response {
  const known = REJECTION_RESPONSES.get(rejection);
  if (known !== undefined) return known;
  const [status, explanation] = REJECTIONS[rejection];
  const made = prepareResponse(status, TEXT_FIELDS, `${explanation}\n`);
  REJECTION_RESPONSES.set(rejection, made);
  return made;
}

/** What may follow the Date: the end of the head, with or without a Connection field. */
const HEAD_ENDS = {
  "": "\r\n\r\n",
  close: "\r\nConnection: close\r\n\r\n",
  "keep-alive": "\r\nConnection: keep-alive\r\n\r\n",
};
export type ConnectionOption = keyof typeof HEAD_ENDS;

/** Formatted responses that wait to be written, in one buffer that all connections take turns with. */
export class Output {
  bytes = new Uint8Array(131_072);
  length = 0;
  private dateAndEnd: Record<ConnectionOption, Uint8Array> = this.format(new Date());

  /** RFC 9110 §6.6.1: Date is the time at which the message originates; a second is its resolution. */
  setDate(date: Date): void {
    this.dateAndEnd = this.format(date);
  }

  private format(date: Date): Record<ConnectionOption, Uint8Array> {
    const line = (end: ConnectionOption) => encoder.encode(date.toUTCString() + HEAD_ENDS[end]);
    return { "": line(""), close: line("close"), "keep-alive": line("keep-alive") };
  }

  append(bytes: Uint8Array): void {
    const length = this.length + bytes.length;
    if (length > this.bytes.length) {
      const larger = new Uint8Array(2 * length);
      larger.set(this.bytes.subarray(0, this.length));
      this.bytes = larger;
    }
    this.bytes.set(bytes, this.length);
    this.length = length;
  }

  appendResponse(response: Response, option: ConnectionOption, withContent: boolean): void {
    this.append(response.head);
    this.append(this.dateAndEnd[option]);
    if (withContent) this.append(response.content);
  }
}

// ── shared: printable ──
/** What a peer sent, safe to print: nothing in it moves the cursor, colours, rings or reorders text. */
export function printable(text: string): string {
  return text.replaceAll("\r\n", "\n").replace(/[^\n\t\P{C}]|[\u2028\u2029]/gu, (character) => {
    const code = character.codePointAt(0) ?? 0;
    return code < 0x100 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u{${code.toString(16)}}`;
  });
}

/** One line on stderr. Where stderr is closed there is nobody to tell, and that is no reason to fail. */
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

/**
 * Colours that a browser does not know yet ("light-dark") leave it with its own. Icons are cut out of boxes: a folder
 * is what ends in a slash. A link covers its whole row, to be hit by a thumb.
 */
const LISTING_STYLE = `
:root { color-scheme: light dark; --dim: light-dark(#59626d, #9aa3ae); --line: light-dark(#e3e6ea, #2c3036); }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 58rem; margin: 0 auto; padding: 2rem 1rem; }
body { color: light-dark(#1c2024, #e4e7ea); background: light-dark(#fff, #14161a); }
h1 { font-size: 1.25rem; margin: 0; padding: 0 .5rem 1rem; }
h1, a { overflow-wrap: anywhere; white-space: pre-wrap; }
ul { list-style: none; margin: 0; padding: 0; border: solid var(--line); border-width: 1px 0; }
li { display: grid; grid: auto / 1fr 6rem 9rem; gap: 0 1rem; align-items: baseline; align-content: center; }
li { position: relative; padding: .5rem; }
li + li { border-top: 1px solid var(--line); }
li:hover { background: light-dark(#f3f6f9, #1d2025); }
a { padding-left: 1.75rem; text-decoration: none; color: light-dark(#0a58ca, #8ab8ff); }
a:visited { color: light-dark(#6b3fa0, #c3a6f2); }
li:hover a { text-decoration: underline; }
a::after { content: ""; position: absolute; inset: 0; }
a:focus-visible { outline: none; }
a:focus-visible::after { outline: 2px solid; outline-offset: -2px; border-radius: 4px; }
a::before { content: ""; position: absolute; left: .5rem; top: .75rem; width: 1rem; height: 1rem; background: #8b949e; }
a::before { clip-path: polygon(12% 0, 60% 0, 88% 28%, 88% 100%, 12% 100%); }
[href$="/"]::before { background: light-dark(#3b82d6, #6ba6f0); }
[href$="/"]::before { clip-path: polygon(0 8%, 40% 8%, 52% 22%, 100% 22%, 100% 92%, 0 92%); }
[href="../"]::before { clip-path: polygon(50% 4%, 96% 50%, 64% 50%, 64% 96%, 36% 96%, 36% 50%, 4% 50%); }
span, time, p { font-size: .875rem; color: var(--dim); font-variant-numeric: tabular-nums; white-space: nowrap; }
span { text-align: right; }
time { grid-column: 3; text-align: right; }
p { margin: 0; padding: .75rem .5rem; white-space: normal; }
@media (max-width: 40rem) {
  body { padding: 1rem .5rem; }
  li { grid: auto / 1fr auto; min-height: 1.75rem; }
  a { grid-column: 1 / 3; }
  time { grid-area: 2 / 1; text-align: left; padding-left: 1.75rem; }
  span { grid-area: 2 / 2; }
}
`;

/** A text of a peer's or of a file's, as content of an HTML page. */
const escapeText = (text: string) => Bun.escapeHTML(printable(text));

/**
 * The page that shows what is in a folder. Links are relative and start with "./", so that no name is taken for a
 * scheme or a host, and the page works behind a proxy that puts the folder elsewhere.
 * @param segments the path of the folder
 * @param unlisted how many names there are besides the entries
 */
export function formatListing(segments: readonly string[], entries: readonly ListingEntry[], unlisted: number): string {
  // Folders first; then "file9" before "file10".
  const { compare } = new Intl.Collator("en", { numeric: true });
  const sorted = entries.toSorted((a, b) => Number(b.isFolder) - Number(a.isFolder) || compare(a.name, b.name));
  const items = sorted.map(formatListingEntry);
  if (segments.length > 0) items.unshift('<li><a href="../">Parent folder</a></li>');
  const path = escapeText(["", ...segments, ""].join("/"));
  return `<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Index of ${path}</title>
<style>${LISTING_STYLE}</style>
</head>
<body>
<main>
<h1><bdi>${path}</bdi></h1>
<ul role="list">
${items.join("\n")}
</ul>
<p>${formatListingSummary(entries, unlisted)}</p>
</main>
</body>
</html>
`;
}

/** What is here, and what is not on the page. */
function formatListingSummary(entries: readonly ListingEntry[], unlisted: number): string {
  if (entries.length === 0 && unlisted === 0) return "This folder is empty.";
  const count = (n: number, what: string) => (n === 0 ? [] : [`${n} ${what}${n === 1 ? "" : "s"}`]);
  const folders = entries.filter(({ isFolder }) => isFolder).length;
  const counts = [...count(folders, "folder"), ...count(entries.length - folders, "file")];
  const more = unlisted > 0 ? [`and ${unlisted} more that the page leaves out`] : [];
  return `${[...counts, ...more].join(", ")}. Times are in UTC.`;
}

function formatListingEntry({ name, isFolder, size, modified }: ListingEntry): string {
  const slash = isFolder ? "/" : "";
  const link = `<a href="./${encodeURIComponent(name).replaceAll("'", "%27")}${slash}"><bdi>${escapeText(name)}</bdi>${slash}</a>`;
  const time = Number.isNaN(modified.getTime()) ? "" : modified.toISOString(); // beyond what a calendar has
  const length = isFolder ? "" : `<span title="${size} bytes">${formatBytes(size)}</span>`;
  return `<li>${link}${length}<time datetime="${time}">${time.slice(0, 16).replace("T", " ")}</time></li>`;
}

/** A request as it was received, with an empty line after it: what the tutorial's server prints. */
export function formatRequestLog(head: RequestHead, content: Uint8Array, contentLength: number): string {
  const headBytes = head.bytes.subarray(head.base, head.base + head.length);
  const text = printable(decoder.decode(headBytes)) + printable(decoder.decode(content));
  const more = contentLength - content.length;
  return `${text}${text.endsWith("\n") ? "" : "\n"}${more > 0 ? `(${more} more bytes)\n` : ""}`;
}

/** A line of the Combined Log Format, which logs of web servers have been read in since NCSA. */
export function formatAccessLog(head: RequestHead, address: string, date: Date, status: number, bytes: number): string {
  const quote = (text: string | undefined) =>
    text
      ? text.replace(/[^\x20\x21\x23-\x5b\x5d-\x7e]/g, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`)
      : "-";
  const [, day, month, year, time] = date.toUTCString().split(" ");
  const fields = head.fields();
  const referer = quote(fields.get("referer"));
  const userAgent = quote(fields.get("user-agent"));
  return `${address} - - [${day}/${month}/${year}:${time} +0000] "${quote(head.requestLine)}" ${status} ${bytes} "${referer}" "${userAgent}"\n`;
}

// ═══ 6 Application ═══════════════════════════════════════════════════════════════════════════════

const NOT_IMPLEMENTED = prepareResponse(501, TEXT_FIELDS, "no such method here\n");

/** RFC 9110 §15.5.6: 405 says which methods there are. */
const prepareNotAllowed = (allow: string) =>
  prepareResponse(405, { ...TEXT_FIELDS, Allow: allow }, "method not allowed\n");

/** The answers of text mode, formatted once: all of them but the text are known beforehand. */
export class TextSite implements Site {
  readonly text: Response;
  readonly options = prepareResponse(204, { Allow: "GET, HEAD, POST, OPTIONS" });
  readonly notAllowed = prepareNotAllowed("GET, HEAD, POST, OPTIONS");

  constructor(text: string) {
    this.text = prepareResponse(200, TEXT_FIELDS, text);
  }

  respond(request: RequestHead): Response {
    return respond(request, this);
  }

  refuse(request: RequestHead): Response | undefined {
    const response = this.respond(request);
    return response.status >= 400 ? response : undefined;
  }
}

/**
 * Maps a request to its response. **In a copy of this file, this is the function to change**: look
 * at `request.method`, `request.requestTarget` and `request.fields()`, and return what
 * {@link prepareResponse} makes. It is called once the content has been read; it must not wait.
 */
export function respond(request: RequestHead, site: TextSite): Response {
  switch (request.method) {
    case "GET":
    case "HEAD":
    case "POST":
      return site.text;
    case "OPTIONS":
      return site.options;
    case "PUT":
    case "DELETE":
    case "CONNECT":
    case "TRACE":
    case "PATCH":
      return site.notAllowed;
    case "":
      return NOT_IMPLEMENTED;
    default:
      return request.method satisfies never;
  }
}

// ── files ──

/** entity-tag (RFC 9110 §8.8.3) */
const ENTITY_TAG = /(?:W\/)?"[\x21\x23-\x7e\x80-\xff]*"/g;

/** Is the tag on the list? The list may be "*", which any version is on. Weakly, `W/` counts for nothing (§8.8.3.2). */
function isListed(list: string, etag: string, isWeakly: boolean): boolean {
  if (list === "*") return true;
  const tags: readonly string[] = list.match(ENTITY_TAG) ?? [];
  return tags.includes(etag) || (isWeakly && tags.includes(`W/${etag}`));
}

/**
 * Evaluates the conditional fields of a GET or HEAD in the order of RFC 9110 §13.2.2.
 * @returns the status that ends it; undefined where the request is to be answered
 */
export function evaluateConditions(fields: ReadonlyMap<string, string>, version: FileVersion): 304 | 412 | undefined {
  /** NaN, which compares with nothing, where there is none. */
  const date = (name: string) => (fields.has(name) ? parseHttpDate(fields.get(name) ?? "") : Number.NaN);
  // Step 1, and step 2 only without it.
  const ifMatch = fields.get("if-match");
  if (ifMatch !== undefined) {
    if (!isListed(ifMatch, version.etag, false)) return 412;
  } else if (version.lastModified > date("if-unmodified-since")) return 412;
  // Step 3, and step 4 only without it.
  const ifNoneMatch = fields.get("if-none-match");
  if (ifNoneMatch !== undefined) return isListed(ifNoneMatch, version.etag, true) ? 304 : undefined;
  return version.lastModified <= date("if-modified-since") ? 304 : undefined;
}

/** Step 5: RFC 9110 §13.1.5. A date counts only where the file cannot have changed again within its second. */
function mayTakePart(ifRange: string | undefined, version: FileVersion, now: number): boolean {
  if (ifRange === undefined || ifRange === version.etag) return true;
  return parseHttpDate(ifRange) === version.lastModified && now - version.lastModified >= 1000;
}

/** What of a file is to be sent; "unsatisfiable" if it has none of what was asked for. */
export function decideRange(
  method: Method,
  fields: ReadonlyMap<string, string>,
  version: FileVersion,
  now: number,
): ByteRange | "unsatisfiable" | undefined {
  const range = fields.get("range");
  // RFC 9110 §14.2: Range means nothing but in a GET.
  if (method !== "GET" || range === undefined || !mayTakePart(fields.get("if-range"), version, now)) return undefined;
  return parseRange(range, version.size);
}

/** Two versions within one tick of the clock look the same: what is so fresh gets a tag that nothing else has. */
let freshVersions = 0;

function versionOf({ size, ino, mtimeMs, ctimeMs }: fs.Stats, now: number): FileVersion {
  // The time of the last change goes in, too: anybody can set that of the last modification. Both are exact to less than
  // a microsecond, and two changes that lie closer are told apart by the tag of what is fresh.
  const parts = [mtimeMs * 1000, size, ino, ctimeMs * 1000].map((part) => Math.round(part).toString(36));
  const isFresh = Math.abs(now - ctimeMs) <= CLOCK_TICK_MS;
  if (isFresh) parts.push(`${now}.${freshVersions++}`);
  // RFC 9110 §8.8.2.1: never later than Date. Before 1970 there were no files, but there are such times.
  const modified = Math.max(0, Math.min(mtimeMs, now));
  return { size, etag: `"${parts.join("-")}"`, lastModified: Math.floor(modified / 1000) * 1000, isFresh };
}

/** The media type by the name's extension. All text is taken for UTF-8. */
function typeOf(path: string): string {
  const [type = ""] = Bun.file(path).type.split(";");
  return type.startsWith("text/") ? `${type}; charset=utf-8` : type;
}

/** Whatever a browser makes of a file, it shall be what its type says. */
const FILE_FIELDS = { "X-Content-Type-Options": "nosniff" };

/** A file or a folder that was found below the root. It is closed when the last of its holders has closed it. */
class OpenFile {
  readonly isFolder: boolean;
  readonly version: FileVersion;
  private knownFields: Record<string, string> | undefined;
  private holders = 1;

  constructor(
    readonly fd: number,
    /** As it was asked for, links and all; and without them. */
    readonly path: string,
    readonly realPath: string,
    private readonly stats: fs.Stats,
  ) {
    this.isFolder = stats.isDirectory();
    this.version = versionOf(stats, Date.now());
  }

  hold(): this {
    this.holders++;
    return this;
  }

  close(): void {
    if (--this.holders === 0) fs.closeSync(this.fd);
  }

  /** Has nothing been written to it since it was opened? */
  isUnchanged(): boolean {
    const { size, mtimeMs } = fs.fstatSync(this.fd);
    // The time of the last change says less here: to move, replace or delete a file changes it too.
    return size === this.stats.size && mtimeMs === this.stats.mtimeMs;
  }

  /** Does its path still lead to this file, in this version? */
  isCurrent(): boolean {
    const { dev, ino, size, mtimeMs, ctimeMs } = this.stats;
    try {
      const found = fs.statSync(this.path);
      const isOne = found.dev === dev && found.ino === ino;
      return isOne && found.size === size && found.mtimeMs === mtimeMs && found.ctimeMs === ctimeMs;
    } catch {
      return false;
    }
  }

  /** What a response says of its version (RFC 9110 §8.8). */
  get validators(): Record<string, string> {
    const { etag, lastModified } = this.version;
    return { ETag: etag, "Last-Modified": new Date(lastModified).toUTCString() };
  }

  /** What a response says of it, whatever part it sends. */
  get fields(): Record<string, string> {
    this.knownFields ??= {
      "Content-Type": typeOf(this.path),
      "Accept-Ranges": "bytes",
      ...this.validators,
      ...FILE_FIELDS,
    };
    return this.knownFields;
  }
}

/** Content that is read while it is sent: bytes of a file, of which no piece is kept. */
export class FilePart {
  constructor(
    private readonly file: OpenFile,
    private readonly range: ByteRange,
    private at = range.from,
  ) {}

  get path(): string {
    return this.file.path;
  }

  get left(): number {
    return this.range.to - this.at;
  }

  get sent(): number {
    return this.at - this.range.from;
  }

  /** Reads the bytes that come next. False where these are not, or may not be, what the head has promised. */
  read(piece: Uint8Array, length: number): boolean {
    try {
      for (let read = 0; read < length;) {
        const more = fs.readSync(this.file.fd, piece, read, length - read, this.at + read);
        if (more === 0) return false;
        read += more;
      }
      // Looked at before the last byte goes out, so that nothing which has changed can pass for a whole.
      return length < this.left || this.file.isUnchanged();
    } catch {
      return false; // the disk fails
    }
  }

  /** So many of them are sent. */
  advance(length: number): void {
    this.at += length;
  }

  close(): void {
    this.file.close();
  }
}

/** What is read of files on its way elsewhere. It is used up before anybody else has a turn: one is enough for all. */
const piece = new Uint8Array(PIECE_BYTES);

/** Lets everybody else have a turn. */
const nextTurn = () => new Promise<void>((resolve) => setImmediate(resolve));

/** SHA-256 digests of files, for Repr-Digest (RFC 9530 §3): they are computed in turns, and the last ones are remembered. */
class Digests {
  private readonly known = new Map<string, string>();
  private readonly pending = new Map<string, Promise<string | undefined>>();

  constructor(private readonly pendingMax: number) {}

  /** In base64; undefined where there is none: the file changes, or too many others are being computed. */
  find(file: OpenFile): string | undefined | Promise<string | undefined> {
    const key = `${file.realPath} ${file.version.etag}`;
    const known = this.known.get(key);
    if (known !== undefined) this.remember(key, known);
    return known ?? this.pending.get(key) ?? this.start(key, file);
  }

  private start(key: string, file: OpenFile): Promise<string | undefined> | undefined {
    if (this.pending.size >= this.pendingMax) return undefined;
    const whole = new FilePart(file.hold(), { from: 0, to: file.version.size });
    const found = computeDigest(whole)
      .then((digest) => {
        if (digest !== undefined) this.remember(key, digest);
        return digest;
      })
      .finally(() => {
        whole.close();
        this.pending.delete(key);
      });
    this.pending.set(key, found);
    return found;
  }

  private remember(key: string, digest: string): void {
    this.known.delete(key);
    this.known.set(key, digest);
    const [oldest] = this.known.keys();
    if (this.known.size > DIGESTS_KEPT_MAX && oldest !== undefined) this.known.delete(oldest);
  }
}

/** @returns in base64; undefined where the file changes, or cannot be read: sending it will tell */
async function computeDigest(whole: FilePart): Promise<string | undefined> {
  const hash = new Bun.CryptoHasher("sha256");
  while (whole.left > 0) {
    const length = Math.min(PIECE_BYTES, whole.left);
    if (!whole.read(piece, length)) return undefined;
    hash.update(piece.subarray(0, length));
    whole.advance(length);
    await nextTurn();
  }
  return hash.digest("base64");
}

/**
 * Where an open file really is. Linux knows that of the very file; elsewhere the path is resolved once more, and who can
 * change links below the root between the two could get at a file that we may read.
 */
function realPathOf(fd: number, path: string): string {
  return process.platform === "linux" ? fs.readlinkSync(`/proc/self/fd/${fd}`) : fs.realpathSync(path);
}

const isBelow = (root: string, realPath: string) =>
  realPath === root || realPath.startsWith(root.endsWith(sep) ? root : root + sep);

/** What a failed system call means to who asked for a file. */
function rejectionFor(error: unknown): Rejection {
  const { code } = error as { code?: string }; // node:fs throws SystemErrors
  if (code === "EACCES" || code === "EPERM") return "forbidden";
  if (code === "EMFILE" || code === "ENFILE") return "too-many-files";
  return code === "EIO" || code === undefined ? "internal" : "not-found";
}

/** Opens what is at a path, if it is a file or a folder, and is below the root even when all links are followed. */
function openBelow(root: string, path: string): OpenFile | Rejection {
  let fd = -1;
  try {
    // Only what is one of them is opened: to open a device or a FIFO may already do something.
    const found = fs.statSync(path, { throwIfNoEntry: false });
    if (found === undefined || !(found.isFile() || found.isDirectory())) return "not-found";
    // It may have become another by now: then this does not block, and what was opened is looked at again.
    fd = fs.openSync(path, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK | fs.constants.O_NOCTTY);
    const realPath = realPathOf(fd, path);
    const stats = fs.fstatSync(fd);
    if (!isBelow(root, realPath) || !(stats.isFile() || stats.isDirectory())) return "not-found";
    const file = new OpenFile(fd, path, realPath, stats);
    fd = -1;
    return file;
  } catch (error) {
    const rejection = rejectionFor(error);
    return rejection === "forbidden" && !isKnownBelow(root, path) ? "not-found" : rejection;
  } finally {
    if (fd >= 0) fs.closeSync(fd);
  }
}

/** Of what may not be opened: may a peer know that there is something? Not if a link leads there from below the root. */
function isKnownBelow(root: string, path: string): boolean {
  for (let at = path; isBelow(root, at); at = dirname(at)) {
    try {
      return isBelow(root, fs.realpathSync(at));
    } catch {} // the folder above it may be looked at, or the one above that
  }
  return false;
}

/** Names in a folder that are neither hidden nor impossible in a request. */
const isServed = (name: string) => !name.startsWith(".") && !NO_FILE_NAME.test(name);

/** Looks at a name in a folder. @returns undefined where a request for it would find nothing */
function lookAt(root: string, folder: string, name: string): ListingEntry | undefined {
  try {
    const path = join(folder, name);
    let stats = fs.lstatSync(path);
    if (stats.isSymbolicLink()) {
      if (!isBelow(root, fs.realpathSync(path))) return undefined;
      stats = fs.statSync(path);
    }
    if (!stats.isFile() && !stats.isDirectory()) return undefined;
    return { name, isFolder: stats.isDirectory(), size: stats.size, modified: stats.mtime };
  } catch {
    return undefined; // it has gone, or its link leads nowhere
  }
}

/** Does a head have a field that decides what of a file is sent? Most do not, and need not be looked at closely. */
const HAS_CONDITIONS = /\n(?:if-|range|want-)/i;
const NO_FIELDS: ReadonlyMap<string, string> = new Map();
const conditionsOf = (request: RequestHead) => (HAS_CONDITIONS.test(request.text) ? request.fields() : NO_FIELDS);

/** Of what is made anew each time: no tag, and no date that could be compared. */
const NO_VERSION: FileVersion = { size: 0, etag: "", lastModified: Number.NaN, isFresh: true };

/** The files below a folder, as they are at this moment. Of what they hold nothing is remembered but digests. */
export class FileSite implements Site {
  private readonly notAllowed = prepareNotAllowed("GET, HEAD");
  private readonly digests: Digests;
  /** What was asked for since the last sweep, by path. */
  private readonly recent = new Map<string, OpenFile>();
  /** Listings that wait for their turn, by the path of the folder, and the last of them. */
  private readonly listings = new Map<string, Promise<Response>>();
  private lastListing: Promise<unknown> = Promise.resolve();
  private listingFields: Record<string, string> | undefined;

  /** @param root its real path */
  constructor(
    private readonly root: string,
    private readonly limits: Limits,
  ) {
    this.digests = new Digests(limits.pendingDigestsMax);
  }

  refuse({ method }: RequestHead): Response | undefined {
    if (method === "GET" || method === "HEAD") return undefined;
    return method === "" ? NOT_IMPLEMENTED : this.notAllowed;
  }

  respond(request: RequestHead): Response | Promise<Response> {
    const refusal = this.refuse(request);
    if (refusal !== undefined) return refusal;
    const path = parseTargetPath(request.requestTarget);
    if (path === undefined) return responseTo("path");
    if (!path.segments.every(isServed)) return responseTo("not-found");
    const found = this.find(join(this.root, ...path.segments));
    if (typeof found === "string") return responseTo(found);
    try {
      if (found.isFolder) return this.respondFolder(request, path, found);
      return path.isFolder ? responseTo("not-found") : this.respondFile(request, found);
    } finally {
      found.close();
    }
  }

  sweep(): void {
    for (const file of this.recent.values()) file.close();
    this.recent.clear();
  }

  /** Opens what is at a path, unless it is open: then its version tells whether it is still there. */
  private find(path: string): OpenFile | Rejection {
    const known = this.recent.get(path);
    if (known?.isCurrent()) return known.hold();
    let found = openBelow(this.root, path);
    if (found === "too-many-files" && this.recent.size > 0) {
      this.sweep();
      found = openBelow(this.root, path);
    }
    if (typeof found === "string" || found.isFolder || found.version.isFresh) return found;
    if (this.recent.size >= this.limits.recentFilesMax) this.sweep();
    this.recent.get(path)?.close();
    this.recent.set(path, found.hold());
    return found;
  }

  private respondFolder(request: RequestHead, path: TargetPath, folder: OpenFile): Response | Promise<Response> {
    if (!path.isFolder) {
      const location = `/${path.segments.map(encodeURIComponent).join("/")}/${path.query}`;
      return prepareResponse(301, { ...TEXT_FIELDS, Location: location }, "it is a folder\n");
    }
    const index = this.find(join(folder.realPath, "index.html"));
    const list = () => this.respondListing(request, path.segments, folder.path);
    if (typeof index === "string") return index === "not-found" ? list() : responseTo(index);
    try {
      return index.isFolder ? list() : this.respondFile(request, index);
    } finally {
      index.close();
    }
  }

  /** A listing has no validator. Of the conditions, those about whether there is anything at all can still fail. */
  private respondListing(request: RequestHead, segments: readonly string[], path: string) {
    const status = evaluateConditions(conditionsOf(request), NO_VERSION);
    if (status === 412) return responseTo("precondition");
    return status === 304 ? prepareResponse(304, {}) : this.list(segments, path);
  }

  /** A folder may be large: one listing is made at a time, and who asks for it before its turn gets the same. */
  private list(segments: readonly string[], path: string): Promise<Response> {
    const known = this.listings.get(path);
    if (known !== undefined) return known;
    const listing = this.lastListing
      .then(() => this.openAndList(segments, path))
      .catch((error: unknown) => responseTo(rejectionFor(error)));
    this.listings.set(path, listing);
    this.lastListing = listing;
    return listing;
  }

  /** While it waited, the folder was not kept open: many may wait, and their peers may have gone. */
  private async openAndList(segments: readonly string[], path: string): Promise<Response> {
    this.listings.delete(path); // whoever asks from now on may have seen what is not on this one
    const folder = openBelow(this.root, path);
    if (typeof folder === "string") return responseTo(folder);
    try {
      return await this.formatFolder(segments, folder);
    } finally {
      folder.close();
    }
  }

  private async formatFolder(segments: readonly string[], folder: OpenFile): Promise<Response> {
    // The very folder that was opened, wherever its path leads by now.
    const path = process.platform === "linux" ? `/proc/self/fd/${folder.fd}` : folder.realPath;
    const served = (await fs.promises.readdir(path)).filter(isServed);
    const entries: ListingEntry[] = [];
    for (const [i, name] of served.slice(0, this.limits.listingEntriesMax).entries()) {
      const entry = lookAt(this.root, path, name);
      if (entry !== undefined) entries.push(entry);
      if (i % 256 === 255) await nextTurn();
    }
    const unlisted = Math.max(0, served.length - this.limits.listingEntriesMax);
    return prepareResponse(200, this.fieldsOfListing(), formatListing(segments, entries, unlisted));
  }

  /** Nothing on the page may be loaded, run or sent; its style is known by its digest. */
  private fieldsOfListing(): Record<string, string> {
    if (this.listingFields !== undefined) return this.listingFields;
    const style = new Bun.CryptoHasher("sha256").update(LISTING_STYLE).digest("base64");
    const policy = `default-src 'none'; style-src 'sha256-${style}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'`;
    this.listingFields = {
      "Content-Type": "text/html; charset=utf-8",
      "Content-Security-Policy": policy,
      ...FILE_FIELDS,
    };
    return this.listingFields;
  }

  private respondFile(request: RequestHead, file: OpenFile): Response | Promise<Response> {
    const { version } = file;
    const fields = conditionsOf(request);
    const status = evaluateConditions(fields, version);
    if (status === 412) return responseTo("precondition");
    if (status === 304) return prepareResponse(304, file.validators);
    const range = decideRange(request.method, fields, version, Date.now());
    if (range === "unsatisfiable") {
      const explained = { ...TEXT_FIELDS, "Content-Range": `bytes */${version.size}`, ...file.validators };
      return prepareResponse(416, explained, "the file has none of these bytes\n");
    }
    const part = new FilePart(file.hold(), range ?? { from: 0, to: version.size });
    const send = (digest?: string) => sendPart(request.method, file, range, part, digest);
    const want = fields.get("want-repr-digest");
    if (want === undefined || !wantsSha256(want)) return send();
    const digest = this.digests.find(file);
    if (!(digest instanceof Promise)) return send(digest);
    return Promise.race([digest, Bun.sleep(this.limits.digestTimeoutMs).then(() => undefined)]).then(send);
  }
}

/** The response with a part of a file: what is small is read now, what is not while it is sent. */
function sendPart(
  method: Method,
  file: OpenFile,
  range: ByteRange | undefined,
  part: FilePart,
  digest: string | undefined,
): Response {
  const status = range === undefined ? 200 : 206;
  const length = part.left;
  const head = formatHead(status, {
    ...file.fields,
    ...(range && { "Content-Range": `bytes ${range.from}-${range.to - 1}/${file.version.size}` }),
    ...(digest !== undefined && { "Repr-Digest": `sha-256=:${digest}:` }),
    "Content-Length": String(length),
  });
  if (method !== "HEAD" && length > SMALL_FILE_BYTES_MAX) return { status, head, content: NO_BYTES, file: part };
  const content = method === "HEAD" ? NO_BYTES : new Uint8Array(length);
  // Where it has just changed, it is sent like a large one: and that is where it is cut off.
  if (!part.read(content, content.length)) return { status, head, content: NO_BYTES, file: part };
  part.close();
  return { status, head, content };
}

// ═══ 7 Connection ════════════════════════════════════════════════════════════════════════════════

/** What the connections of a server have in common. */
export class Server {
  readonly connections = new Set<Connection>();
  readonly output = new Output();
  /** The head that is parsed; a connection takes it along when the request is not complete. */
  spareHead: RequestHead;
  readonly timeoutsMs: Readonly<Record<Awaited, number>>;
  /** Bytes that the buffers of all connections hold. */
  waitingBytes = 0;
  /** When it was told to stop. */
  stoppedAt = Number.POSITIVE_INFINITY;
  /** Called once the server was told to stop and the last connection has gone. */
  onEmpty = () => {};
  /** Milliseconds, not of the day: the time of the last sweep, exact enough for deadlines. */
  now = performance.now();

  constructor(
    readonly site: Site,
    readonly logFormat: LogFormat,
    readonly log: (text: string) => void,
    readonly limits: Limits = LIMITS,
  ) {
    this.spareHead = new RequestHead(limits);
    this.timeoutsMs = {
      head: limits.headTimeoutMs,
      idle: limits.idleTimeoutMs,
      content: limits.contentTimeoutMs,
      write: limits.writeTimeoutMs,
      linger: limits.lingerTimeoutMs,
    };
  }

  get isStopping(): boolean {
    return this.stoppedAt < Number.POSITIVE_INFINITY;
  }

  /** Looks at the clock for all connections at once. */
  sweep(): void {
    const now = performance.now();
    // We stood still. Timers come before sockets, so what peers have sent meanwhile is not read yet: they get the time back.
    const lateMs = Math.max(0, now - this.now - SWEEP_MS);
    this.now = now;
    this.output.setDate(new Date());
    this.site.sweep?.();
    for (const connection of this.connections) {
      connection.deadline += lateMs;
      if (connection.deadline < now) connection.onDeadline();
    }
  }

  /** Requests under way are answered, idle connections closed. */
  stop(): void {
    // The last sweep may be as long ago as idle connections have time.
    this.now = this.stoppedAt = performance.now();
    for (const connection of this.connections) connection.onStop();
    if (this.connections.size === 0) this.onEmpty();
  }

  remove(connection: Connection): void {
    this.connections.delete(connection);
    if (this.isStopping && this.connections.size === 0) this.onEmpty();
  }
}

/** What a log entry tells of a request: its head, the octets of its content, the first of them, and what it got. */
interface Logged {
  readonly head: RequestHead;
  readonly contentBytes: number;
  readonly content: Uint8Array;
  readonly status: number;
}

/** An answer that is sent bit by bit. */
interface Answering {
  readonly file: FilePart;
  readonly closes: boolean;
  readonly logged: Logged;
}

/** One peer: what it has sent and we have not used, what we have formatted and it has not taken. */
export class Connection {
  deadline: number;
  private state: ConnectionState = "reading-head";
  private awaits: Awaited | "" = "head";
  /** Bytes of the peer's that could not be used yet: the first `retainedLength` of `retained`. */
  private retained: Uint8Array = NO_BYTES;
  private retainedLength = 0;
  /** Bytes for the peer that the kernel did not take. While there are any, nothing is read. */
  private unsent: Uint8Array = NO_BYTES;
  /** The request under way, when its head or its content is incomplete. */
  private head: RequestHead | null = null;
  private content: ContentReader | null = null;
  /** The answer under way, when its content is a file. */
  private answering: Answering | null = null;
  private peerHasFinished = false;
  private lingeredBytes = 0;
  /** Do bytes follow the request that is being answered? */
  private isFollowed = false;
  /** What of the server's `waitingBytes` is ours. */
  private weight = 0;

  constructor(
    private readonly transport: Transport,
    private readonly server: Server,
  ) {
    this.deadline = server.now + server.limits.headTimeoutMs;
    server.connections.add(this);
  }

  // ── what the socket tells ──

  onOpen(): void {
    const excess = this.server.connections.size - this.server.limits.connectionsMax;
    if (excess > this.server.limits.refusedConnectionsMax) this.abort();
    else if (excess > 0) this.refuse("too-many-connections");
  }

  onData(bytes: Uint8Array): void {
    if (this.state === "responding") {
      this.retain(bytes, 0, bytes.length);
      return this.weigh();
    }
    if (!this.isReading()) return this.drop(bytes.length);
    const isFirst = this.retainedLength === 0;
    if (!isFirst || this.hasUnsent()) this.retain(bytes, 0, bytes.length);
    if (!this.hasUnsent()) this.serve(isFirst ? bytes : this.retained, isFirst ? bytes.length : this.retainedLength);
    this.weigh();
  }

  /** The kernel has room again. */
  onDrain(): void {
    if (!this.hasUnsent()) return this.onTurn();
    if (!this.send(this.unsent, this.unsent.length) || this.hasUnsent()) return;
    if (this.answering !== null) this.sendFile(this.answering);
    this.goOn();
  }

  /** It is our turn to send more of a file, unless all of that has gone out meanwhile. */
  onTurn(answering = this.answering): void {
    if (answering === null || answering !== this.answering) return;
    this.sendFile(answering);
    this.goOn();
  }

  /** The peer has sent its FIN: no more requests, but it may well wait for answers. */
  onEnd(): void {
    this.peerHasFinished = true;
    if (this.hasUnsent()) return;
    if (this.state === "lingering") return this.transport.end();
    if (!this.isReading()) return;
    if (this.isInsideRequest()) this.refuse("incomplete");
    else this.linger();
  }

  onClose(): void {
    this.state = "closed";
    this.endAnswer();
    this.retained = this.unsent = NO_BYTES;
    this.head = this.content = null;
    this.weigh();
    this.server.remove(this);
  }

  /** The server stops: answers from now on close; who is idle has a moment for a request in flight. */
  onStop(): void {
    if (this.isReading() && !this.isInsideRequest() && !this.hasUnsent())
      this.deadline = this.server.now + STOP_IDLE_MS;
  }

  /** What we waited for did not happen in time. */
  onDeadline(): void {
    switch (this.awaits) {
      case "head":
        // RFC 9110 §15.5.9: 408 for a request that was begun; who never said a word is not asked.
        return this.isInsideRequest() ? this.refuse("timeout") : this.linger();
      case "idle":
        return this.linger();
      case "content":
        if (this.content?.startSpan() !== true) return this.refuse("timeout");
        this.awaits = "";
        return this.awaitNext("content");
      case "write":
        return this.insist();
      case "linger":
        // No reset: of what the kernel has taken, a slow peer may still be reading.
        this.awaits = "";
        return this.transport.end();
      case "":
        return;
      default:
        this.awaits satisfies never;
    }
  }

  /**
   * The kernel tells of room when a third of its buffer is free, which may be a megabyte: a slow peer has taken some of
   * its answer all the same, if the kernel takes more of it now.
   */
  private insist(): void {
    const { deadline } = this;
    this.onDrain();
    if (this.awaits === "write" && this.deadline === deadline) this.abort();
  }

  // ── reading ──

  /** Serves every request that is in the bytes, with one write; keeps what is left of them. */
  private serve(bytes: Uint8Array, to: number): void {
    const { output } = this.server;
    let at = 0;
    for (;;) {
      output.length = 0;
      const from = at;
      at = this.readRequests(bytes, at, to);
      if (!this.flush()) return;
      // More of the bytes can be used only if the output was full and the kernel took all of it.
      if (at === from || at === to || this.hasUnsent() || !this.isReading()) break;
    }
    if (this.state === "responding") {
      this.keep(bytes, at, to);
      return void this.transport.pause();
    }
    if (!this.isReading()) return;
    this.keep(bytes, at, to);
    this.awaitNext(
      this.hasUnsent() ? "write" : this.content !== null ? "content" : this.isInsideRequest() ? "head" : "idle",
    );
  }

  /** Reads requests and formats answers until the bytes, the state or the output say stop. */
  private readRequests(bytes: Uint8Array, from: number, to: number): number {
    let at = from;
    while (at < to && this.isReading() && this.server.output.length < this.server.limits.unsentBytesMax) {
      const next = this.content === null ? this.readHead(bytes, at, to) : this.readContent(this.content, bytes, at, to);
      if (next === NEED_MORE) break;
      at = next;
    }
    return at;
  }

  /** Parses a head and, where no content follows, answers. Returns the next index or NEED_MORE. */
  private readHead(bytes: Uint8Array, at: number, to: number): number {
    const head = this.head ?? this.server.spareHead;
    if (this.head === null) head.start(bytes, at);
    else [head.bytes, head.base] = [bytes, at];
    const next = parseRequestHead(head, to);
    this.isFollowed = next >= 0 && next < to;
    if (next >= 0 && head.contentLength === 0) {
      this.answer(head, 0, NO_BYTES);
      return next;
    }
    if (this.head === null) {
      this.head = head;
      this.server.spareHead = new RequestHead(this.server.limits);
    }
    if (next === NEED_MORE) return NEED_MORE;
    if (head.rejection !== "") {
      this.answerRejection(head.rejection);
      return to;
    }
    this.startContent(head, next < to);
    return next;
  }

  private startContent(head: RequestHead, hasContent: boolean): void {
    this.state = "reading-content";
    this.outlive(head);
    this.content = new ContentReader(head.contentLength, this.server.limits, this.server.logFormat === "request");
    if (head.contentLength > this.server.limits.contentBytesMax) return this.answerRejection("content-too-large");
    if (!head.expectsContinue) return;
    // RFC 9110 §10.1.1: who asks before it sends is told at once where the answer will be no.
    if (this.server.site.refuse(head) !== undefined) return this.answer(head, 0, NO_BYTES);
    if (!hasContent) this.server.output.append(CONTINUE);
  }

  /** Reads content; answers when it is complete. Returns the next index. */
  private readContent(content: ContentReader, bytes: Uint8Array, at: number, to: number): number {
    const next = content.read(bytes, at, to);
    if (content.rejection !== "") {
      this.answerRejection(content.rejection);
      return to;
    }
    this.isFollowed = next < to;
    if (content.isComplete && this.head !== null) this.answer(this.head, content.wireBytes, content.logged);
    return next;
  }

  // ── answering ──

  private answer(head: RequestHead, contentBytes: number, content: Uint8Array): void {
    let response: Response | Promise<Response>;
    try {
      response = this.server.site.respond(head);
    } catch (error) {
      response = this.fail(error);
    }
    if (!(response instanceof Promise)) return this.sendResponse(head, response, contentBytes, content);
    const kept = this.outlive(head);
    this.head = this.content = null;
    this.state = "responding";
    this.awaits = "";
    response
      .catch((error: unknown) => this.fail(error))
      .then((response) => this.onResponse(kept, response, contentBytes, content));
  }

  /** A fault of ours ends this request, and touches no other. */
  private fail(error: unknown): Response {
    tell(`Error: ${error}`);
    return responseTo("internal");
  }

  /** The answer that took its time is here. */
  private onResponse(head: RequestHead, response: Response, contentBytes: number, content: Uint8Array): void {
    if (this.state !== "responding") return void response.file?.close();
    const { output } = this.server;
    output.length = 0;
    // What the kernel has not taken of earlier answers comes first.
    output.append(this.unsent);
    this.unsent = NO_BYTES;
    this.sendResponse(head, response, contentBytes, content);
    if (this.flush()) this.goOn();
    this.weigh();
  }

  /** The head outlives the read that brought it. (Buffer's own slice would not copy.) */
  private outlive(head: RequestHead): RequestHead {
    if (head === this.server.spareHead) this.server.spareHead = new RequestHead(this.server.limits);
    [head.bytes, head.base] = [new Uint8Array(head.bytes.subarray(head.base, head.base + head.length)), 0];
    return head;
  }

  /** Refuses what is under way. After a fault nobody knows where a next request would start. */
  private answerRejection(rejection: Rejection): void {
    const { wireBytes, logged } = this.content ?? { wireBytes: 0, logged: NO_BYTES };
    const head = this.head ?? new RequestHead(this.server.limits);
    this.sendResponse(head, responseTo(rejection), wireBytes, logged);
  }

  /** As answerRejection, where no read is being served. */
  private refuse(rejection: Rejection): void {
    this.server.output.length = 0;
    this.answerRejection(rejection);
    this.flush();
  }

  private sendResponse(head: RequestHead, response: Response, contentBytes: number, content: Uint8Array): void {
    const closes = response.status >= 400 || !head.keepsAlive || (this.server.isStopping && !this.hasMore(response));
    const option = closes ? "close" : head.minorVersion === 0 ? "keep-alive" : "";
    // RFC 9110 §9.3.2 and §15.3.5: no content for HEAD and in a 204, whatever the fields say.
    const withContent = head.method !== "HEAD" && response.status !== 204;
    this.server.output.appendResponse(response, option, withContent);
    this.head = this.content = null;
    this.awaits = "";
    const { status, file } = response;
    if (file === undefined) {
      this.finishAnswer(closes);
      return this.log({ head, contentBytes, content, status }, withContent ? response.content.length : 0);
    }
    this.state = "responding";
    this.answering = { file, closes, logged: { head: this.outlive(head), contentBytes, content, status } };
  }

  private finishAnswer(closes: boolean): void {
    this.state = closes ? "finishing" : "reading-head";
  }

  private log({ head, contentBytes, content, status }: Logged, sent: number): void {
    const { logFormat, log } = this.server;
    if (logFormat === "request" && head.length > 0) log(formatRequestLog(head, content, contentBytes));
    else if (logFormat === "access") log(formatAccessLog(head, this.transport.remoteAddress, new Date(), status, sent));
  }

  /** Sends pieces of a file until the kernel takes no more, others want their turn, or all is sent. */
  private sendFile(answering: Answering): void {
    const { file } = answering;
    for (let pieces = 0; pieces < PIECES_PER_TURN; pieces++) {
      const length = Math.min(piece.length, file.left);
      if (!file.read(piece, length)) {
        tell(`Error: ${file.path} has changed while it was sent: the connection is cut off`);
        return this.abort();
      }
      const written = this.transport.write(piece, 0, length);
      if (written < 0) return this.abort();
      file.advance(written);
      if (written > 0) this.awaits = "";
      this.awaitNext("write");
      if (file.left === 0) return this.endAnswer();
      // What the kernel did not take is read again: nothing of it is kept.
      if (written < length) return;
    }
    setImmediate(() => this.onTurn(answering));
  }

  /** Nothing more is sent of the answer under way, if there is one. */
  private endAnswer(): void {
    const { answering } = this;
    if (answering === null) return;
    this.answering = null;
    this.awaits = "";
    if (this.state === "responding") this.finishAnswer(answering.closes);
    this.log(answering.logged, answering.file.sent);
    answering.file.close();
  }

  // ── writing and closing ──

  /** Writes what the output holds. False where the connection has gone. */
  private flush(): boolean {
    const { output } = this.server;
    if (output.length > 0 && !this.send(output.bytes, output.length)) return false;
    if (this.hasUnsent()) {
      this.transport.pause();
      this.awaitNext("write");
      return true;
    }
    if (this.answering !== null) this.sendFile(this.answering);
    if (this.state === "finishing") this.linger();
    return true;
  }

  /** Gives bytes to the kernel, keeps a copy of what it does not take. False where the peer has gone. */
  private send(bytes: Uint8Array, length: number): boolean {
    const written = this.transport.write(bytes, 0, length);
    if (written < 0) {
      this.abort();
      return false;
    }
    if (written === length) this.unsent = NO_BYTES;
    else if (written > 0 || bytes !== this.unsent) {
      this.unsent = bytes.slice(written, length);
      this.awaits = "";
      this.awaitNext("write");
    }
    return true;
  }

  /**
   * Everything is written: send FIN, then read and drop until the peer's FIN (RFC 9112 §9.6). A close
   * while bytes of the peer's are unread is a reset, and a reset takes back what we wrote.
   */
  private linger(): void {
    this.state = "lingering";
    this.retained = NO_BYTES;
    this.retainedLength = 0;
    this.awaitNext("linger");
    this.transport.shutdown();
    if (this.peerHasFinished) this.transport.end();
  }

  /** There is nobody to talk to any more, or nobody worth it: no FIN, no answer. */
  private abort(): void {
    this.state = "closed";
    this.endAnswer();
    this.retained = this.unsent = NO_BYTES;
    this.transport.terminate();
  }

  private drop(length: number): void {
    this.lingeredBytes += length;
    if (this.lingeredBytes > this.server.limits.lingerBytesMax) this.abort();
  }

  private isReading(): boolean {
    return this.state === "reading-head" || this.state === "reading-content";
  }

  /** Has a request begun that is not complete? An empty line before it does not count. */
  private isInsideRequest(): boolean {
    return this.content !== null || (this.head !== null && this.head.state !== HeadState.EmptyLine);
  }

  private hasUnsent(): boolean {
    return this.unsent.length > 0;
  }

  /** Has the peer sent something behind the request that is answered now? Who goes on and on is stopped all the same. */
  private hasMore({ file }: Response): boolean {
    return this.isFollowed && file === undefined && performance.now() < this.server.stoppedAt + STOP_IDLE_MS;
  }

  /** Sets the deadline where we begin to wait for something; more of the same does not extend it. */
  private awaitNext(awaited: Awaited): void {
    if (this.awaits === awaited) return;
    this.awaits = awaited;
    const { isStopping, now, timeoutsMs } = this.server;
    this.deadline = now + (isStopping && awaited === "idle" ? STOP_IDLE_MS : timeoutsMs[awaited]);
  }

  /** What kept us from reading may be over: then goes on with what came meanwhile. */
  private goOn(): void {
    if (this.hasUnsent() || this.state === "responding" || this.state === "closed") return;
    this.transport.resume();
    if (this.state === "finishing") return this.linger();
    if (!this.isReading()) return;
    this.serve(this.retained, this.retainedLength);
    this.weigh();
    if (this.peerHasFinished) this.onEnd();
  }

  // ── bytes that wait ──

  /** Keeps account of what all connections hold; who takes it over the limit is cut off. */
  private weigh(): void {
    const weight = this.retained.length + this.unsent.length + (this.content?.heldBytes ?? 0);
    if (weight === this.weight) return;
    const { server } = this;
    const isMore = weight > this.weight;
    server.waitingBytes += weight - this.weight;
    this.weight = weight;
    if (isMore && server.waitingBytes > server.limits.waitingBytesMax) this.abort();
  }

  /** Of the bytes that were served, at..to could not be used yet. */
  private keep(bytes: Uint8Array, at: number, to: number): void {
    if (at === to) {
      this.retained = NO_BYTES;
      this.retainedLength = 0;
    } else if (bytes !== this.retained) this.retain(bytes, at, to);
    else {
      this.retained.copyWithin(0, at, to);
      this.retainedLength = to - at;
    }
    // A head that is not complete is among the bytes that were kept, at their start.
    if (this.head !== null && this.content === null) [this.head.bytes, this.head.base] = [this.retained, 0];
  }

  /** Adds bytes to those that wait. The buffer doubles, so that a byte at a time costs no more. */
  private retain(bytes: Uint8Array, from: number, to: number): void {
    const length = this.retainedLength + to - from;
    if (length > this.retained.length) {
      const larger = new Uint8Array(Math.max(256, 2 * length));
      larger.set(this.retained.subarray(0, this.retainedLength));
      this.retained = larger;
    }
    this.retained.set(bytes.subarray(from, to), this.retainedLength);
    this.retainedLength = length;
  }
}

/** The content of one request: read to its end, held to its bounds, and dropped. */
class ContentReader {
  rejection: Rejection | "" = "";
  isComplete = false;
  /** Octets as they came, the chunked framing included, and the first of them for the log. */
  wireBytes = 0;
  logged: Uint8Array = NO_BYTES;
  private readonly decoder: ChunkedDecoder | null;
  private left: number;
  private spanBytes = 0;

  constructor(
    contentLength: number,
    private readonly limits: Limits,
    private readonly isLogged: boolean,
  ) {
    this.decoder = contentLength === CHUNKED ? new ChunkedDecoder(limits, false) : null;
    this.left = contentLength;
  }

  /** Returns the index after what it has used. */
  read(bytes: Uint8Array, from: number, to: number): number {
    const next = this.decoder === null ? Math.min(to, from + this.left) : this.decoder.next(bytes, from, to);
    this.wireBytes += next - from;
    this.spanBytes += next - from;
    if (this.isLogged && this.logged.length < LOGGED_BYTES_MAX)
      this.logged = Buffer.concat([this.logged, bytes.subarray(from, next)]).subarray(0, LOGGED_BYTES_MAX);
    if (this.decoder === null) {
      this.left -= next - from;
      this.isComplete = this.left === 0;
    } else {
      this.rejection = checkChunked(this.decoder, this.limits) ?? "";
      this.isComplete = this.decoder.state === "done";
    }
    return next;
  }

  get heldBytes(): number {
    return this.logged.length + (this.decoder?.heldBytes ?? 0);
  }

  /** False where the span that ends now brought less than the least rate. */
  startSpan(): boolean {
    const isFastEnough = this.spanBytes >= this.limits.contentPartBytesMin;
    this.spanBytes = 0;
    return isFastEnough;
  }
}

/** What is wrong with chunked content so far, if anything is. */
function checkChunked(decoder: ChunkedDecoder, limits: Limits): Rejection | undefined {
  if (decoder.announced > limits.contentBytesMax) return "content-too-large";
  // Before the fault: such a field came first, and what came first decides, however the bytes are split.
  if (decoder.trailerNames.some((name) => FORBIDDEN_TRAILERS.has(name))) return "trailer-forbidden";
  return decoder.fault === "" ? undefined : decoder.fault;
}

// ═══ 8 Sockets ═══════════════════════════════════════════════════════════════════════════════════

/** "localhost" is both loopback addresses; Bun binds only the first, and clients may try either. */
const addressesOf = (host: string) => (host === "localhost" ? ["127.0.0.1", "::1"] : [host]);

export interface ListenOptions {
  readonly host: string;
  readonly port: number;
  /** Several processes may listen on the port; the kernel spreads the connections (Linux). */
  readonly reusePort: boolean;
  /** PEM texts. */
  readonly tls?: { readonly cert: string; readonly key: string } | undefined;
}

/**
 * Listens and serves. Port 0 picks a free one.
 * @returns the listeners, all on one port
 * @throws StartError where the port is taken or not allowed, or the host is none of this machine's
 */
export function listen(server: Server, options: ListenOptions): Bun.TCPSocketListener<Connection>[] {
  const { host, port, tls } = options;
  const socket: Bun.SocketHandler<Connection> = {
    open(socket) {
      socket.data = new Connection(socket, server);
      if (tls === undefined) socket.data.onOpen();
    },
    // Without this handler `open` would wait for the handshake, and nothing would bound how long it takes.
    handshake: (socket, isSecure) => (isSecure ? socket.data.onOpen() : socket.terminate()),
    data: (socket, bytes) => socket.data.onData(bytes),
    drain: (socket) => socket.data.onDrain(),
    end: (socket) => socket.data.onEnd(),
    close: (socket) => socket.data.onClose(),
    error(socket, error) {
      // A throw of ours. It ends this connection and touches no other.
      tell(`Error: ${error}`);
      socket.terminate();
    },
  };
  const listeners: Bun.TCPSocketListener<Connection>[] = [];
  for (const hostname of addressesOf(host)) {
    try {
      const bound = listeners[0]?.port ?? port;
      const { reusePort } = options;
      const all = { hostname, port: bound, allowHalfOpen: true, reusePort, socket, ...(tls !== undefined && { tls }) };
      listeners.push(Bun.listen<Connection>(all));
    } catch (error) {
      const { code } = error as { code?: string }; // Bun throws a SystemError
      // A machine without IPv6 has no ::1.
      if (listeners.length > 0 && code !== "EADDRINUSE") continue;
      for (const listener of listeners) listener.stop();
      // The free port that 127.0.0.1 got may be taken on ::1: look for another.
      if (listeners.length > 0 && port === 0) return listen(server, options);
      throw new StartError(explainListenError(code, host, port), 1);
    }
  }
  return listeners;
}

function explainListenError(code: string | undefined, host: string, port: number): string {
  if (code === "EADDRINUSE")
    return `port ${port} is taken: stop the program that has it, or choose another with --port`;
  if (code === "EACCES") return `not allowed to listen on port ${port}: choose one from 1024 on with --port`;
  if (code?.startsWith("ERR_OSSL_"))
    return `the certificate and the key cannot be used: ${code.slice("ERR_OSSL_".length)}`;
  return `cannot listen on ${host}: it is not an address of this machine (${code ?? "unknown host"})`;
}

/** Writes to stdout without ever waiting for it: what a slow reader leaves behind is bounded. */
class Log {
  onIdle = () => {};
  private waiting = "";
  private isWriting = false;
  private dropped = 0;

  /** Several lines of one turn of the event loop go out together. */
  print(text: string): void {
    if (this.waiting.length > LOG_BACKLOG_CHARS_MAX) this.dropped++;
    else this.waiting += text;
    if (this.isWriting) return;
    this.isWriting = true;
    setImmediate(() => this.writeNext());
  }

  get isIdle(): boolean {
    return !this.isWriting;
  }

  private writeNext(): void {
    if (this.dropped > 0) this.waiting += `(${this.dropped} log entries dropped: stdout is slow)\n`;
    this.dropped = 0;
    const bytes = encoder.encode(this.waiting);
    this.waiting = "";
    this.writeBytes(bytes);
  }

  private writeBytes(bytes: Uint8Array): void {
    fs.write(1, bytes, (error, written) => {
      if (error?.code === "EAGAIN") return void setTimeout(() => this.writeBytes(bytes), SWEEP_MS);
      // stdout is closed or its disk is full: the log goes nowhere, the server goes on.
      const rest = error === null ? bytes.subarray(written) : NO_BYTES;
      if (rest.length > 0) return this.writeBytes(rest);
      if (this.waiting !== "") return this.writeNext();
      this.isWriting = false;
      this.onIdle();
    });
  }
}

// ═══ 9 Command line ══════════════════════════════════════════════════════════════════════════════

export const DEFAULTS = Object.freeze({ host: "localhost", port: 8888, text: "Hello, World!", log: "request" });

/** The flag of a limit: headBytesMax is --head-bytes-max. */
const flagOf = (name: string) => name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);

const LIMIT_LINES = LIMIT_NAMES.map((name) => {
  const [value, meaning] = BOUNDS[name];
  return `  --${flagOf(name).padEnd(28)} ${String(value).padStart(9)}  ${meaning}`;
});

export const HELP = `Usage: server [options]
An HTTP/1.1 server that prints each request and answers it with a text, or with a file.

  --host HOST      address to listen on (${DEFAULTS.host}: 127.0.0.1 and, where there is one, ::1)
  --port PORT      port to listen on (${DEFAULTS.port}); 0 picks a free one, the ready line tells which
  --text TEXT      the answer to every request-target ("${DEFAULTS.text}")
  --root DIR       serve the files below DIR instead, for GET and HEAD; names with a leading
                   dot are not there, nor what links lead to outside of DIR
  --log FORMAT     on stdout: request, each request as received (default);
                   access, a line of the Combined Log Format; or off
  --tls-cert FILE  serve TLS with this certificate (PEM, the chain after it) ...
  --tls-key FILE   ... and this private key (PEM)
  --reuse-port     let several processes listen on the port (Linux)
  -h, --help       print this text
  -V, --version    print the version

Limits, each a flag that takes a number, with its default:
${LIMIT_LINES.join("\n")}

Environment: HOST and PORT stand in for --host and --port where these are absent.
Ready when stderr says "Listening on http://...". SIGINT or SIGTERM: what is under way is
answered, then exit 0; a second one exits at once. Exit 1: cannot listen. Exit 2: wrong usage.
`;

export interface CommandLine {
  readonly show: "" | "help" | "version";
  readonly host: string;
  readonly port: number;
  readonly text: string;
  /** Files below it are served instead of the text. */
  readonly root: string | undefined;
  readonly log: LogFormat;
  readonly tlsFiles: { readonly cert: string; readonly key: string } | undefined;
  readonly reusePort: boolean;
  readonly limits: Limits;
}

/** @throws StartError that says in one line what is wrong */
export function parseCommandLine(args: string[], env: Record<string, string | undefined>): CommandLine {
  const { flags, limits } = parseFlags(args);
  const { log = DEFAULTS.log, text = DEFAULTS.text, root, "tls-cert": cert, "tls-key": key } = flags;
  if (log !== "request" && log !== "access" && log !== "off") throw usageError("--log takes request, access or off");
  const host = (flags.host ?? (env["HOST"] || DEFAULTS.host)).replace(/^\[(.*)\]$/, "$1");
  if (host === "") throw usageError("--host takes a name or an address");
  const port = parseNumber("--port", flags.port ?? (env["PORT"] || String(DEFAULTS.port)), 65_535);
  if ((cert === undefined) !== (key === undefined)) throw usageError("--tls-cert and --tls-key need each other");
  if (root !== undefined && flags.text !== undefined) throw usageError("--root and --text exclude each other");
  if (root === "") throw usageError("--root takes a folder");
  const tlsFiles = cert !== undefined && key !== undefined ? { cert, key } : undefined;
  const show = flags.help ? "help" : flags.version ? "version" : "";
  return { show, host, port, text, root, log, tlsFiles, reusePort: flags["reuse-port"] ?? false, limits };
}

function parseFlags(args: string[]) {
  const string = { type: "string" } as const;
  const flag = (short: string) => ({ type: "boolean", short }) as const;
  const texts = {
    host: string,
    port: string,
    text: string,
    root: string,
    log: string,
    "tls-cert": string,
    "tls-key": string,
  };
  const switches = { "reuse-port": { type: "boolean" }, help: flag("h"), version: flag("V") } as const;
  const numbers = Object.fromEntries(LIMIT_NAMES.map((name) => [flagOf(name), string]));
  try {
    const flags = parseArgs({ args, options: { ...numbers, ...texts, ...switches } }).values;
    const limits = LIMIT_NAMES.map((name) => {
      const text = (flags as Record<string, unknown>)[flagOf(name)]; // a flag of `numbers`: a string, if there
      return [name, text === undefined ? LIMITS[name] : parseNumber(`--${flagOf(name)}`, String(text), MAX_LIMIT)];
    });
    return { flags, limits: Object.fromEntries(limits) as Limits }; // fromEntries forgets the names
  } catch (error) {
    if (error instanceof StartError) throw error;
    throw usageError((error as Error).message.split(". ", 1)[0] ?? ""); // parseArgs throws TypeErrors
  }
}

/** As much as still leaves sums of limits exact. */
const MAX_LIMIT = 2 ** 50;

function parseNumber(name: string, text: string, max: number): number {
  if (/^\d{1,16}$/.test(text) && Number(text) <= max) return Number(text);
  throw usageError(`${name} takes a number from 0 to ${max}, not ${JSON.stringify(text)}`);
}

const usageError = (message: string) => new StartError(`${message} (see server --help)`, 2);

function readPem(path: string): string {
  try {
    return fs.readFileSync(path, "utf8");
  } catch (error) {
    throw new StartError(`cannot read ${path}: ${(error as { code?: string }).code}`, 1); // node:fs throws SystemErrors
  }
}

/** How many files and sockets this process may have open; without end where nobody says. */
function descriptorsMax(): number {
  try {
    return Number(/^Max open files +(\d+)/m.exec(fs.readFileSync("/proc/self/limits", "latin1"))?.[1] ?? Infinity);
  } catch {
    return Number.POSITIVE_INFINITY; // not Linux
  }
}

/**
 * Limits that leave a free descriptor for whoever connects. Without one nobody is accepted, nobody is told, and the event
 * loop turns round and round, as there is somebody to accept.
 * @param each descriptors that a connection may need
 */
export function fitLimits(limits: Limits, descriptors: number, each: 1 | 2): Limits {
  const fit = (limit: number) => Math.min(limit, Math.floor(descriptors / 8));
  const refusedConnectionsMax = fit(limits.refusedConnectionsMax);
  const pendingDigestsMax = fit(limits.pendingDigestsMax);
  const recentFilesMax = fit(limits.recentFilesMax);
  const left = descriptors - RUNTIME_DESCRIPTORS - refusedConnectionsMax - pendingDigestsMax - recentFilesMax;
  const connectionsMax = Math.max(1, Math.min(limits.connectionsMax, Math.floor(left / each)));
  return { ...limits, refusedConnectionsMax, pendingDigestsMax, recentFilesMax, connectionsMax };
}

/** The real path of the folder to serve. @throws StartError where it is none, or cannot be read */
function findRoot(path: string): string {
  try {
    fs.readdirSync(path);
    return fs.realpathSync(path);
  } catch (error) {
    throw new StartError(`cannot serve ${path}: ${(error as { code?: string }).code}`, 1); // node:fs throws SystemErrors
  }
}

/** Serves until a signal: the first asks, the second insists. */
function run(commandLine: CommandLine): void {
  const { text, root, log: logFormat, tlsFiles } = commandLine;
  const limits = fitLimits(commandLine.limits, descriptorsMax(), root === undefined ? 1 : 2);
  const log = new Log();
  const site = root === undefined ? new TextSite(text) : new FileSite(findRoot(root), limits);
  const server = new Server(site, logFormat, (entry) => log.print(entry), limits);
  const tls = tlsFiles && { cert: readPem(tlsFiles.cert), key: readPem(tlsFiles.key) };
  const listeners = listen(server, { ...commandLine, tls });
  setInterval(() => server.sweep(), SWEEP_MS);

  const exit = () => process.exit(0);
  const stop = () => {
    if (server.isStopping) exit();
    for (const listener of listeners) listener.stop();
    server.onEmpty = () => {
      if (log.isIdle) exit();
      log.onIdle = exit;
      setTimeout(exit, LOG_FLUSH_MS);
    };
    setTimeout(exit, Math.min(limits.graceMs, TIMER_MS_MAX));
    server.stop();
  };
  process.on("SIGINT", stop).on("SIGTERM", stop);

  const { host } = commandLine;
  tell(`Listening on http${tls ? "s" : ""}://${isIPv6(host) ? `[${host}]` : host}:${listeners[0]?.port}`);
}

function main(): void {
  try {
    const commandLine = parseCommandLine(process.argv.slice(2), process.env);
    if (commandLine.show === "help") process.stdout.write(HELP);
    else if (commandLine.show === "version") process.stdout.write(`server ${VERSION}\n`);
    else run(commandLine);
  } catch (error) {
    if (!(error instanceof StartError)) throw error;
    tell(`Error: ${error.message}`);
    process.exitCode = error.exitCode;
  }
}

// ═══ 10 Main ═════════════════════════════════════════════════════════════════════════════════════

if (import.meta.main) main();
