#!/usr/bin/env bun
/**
 * client-robust.ts: stage 3, the client made efficient and stable.
 *
 *     bun client-robust.ts                              # GET http://localhost:8888/data
 *     bun client-robust.ts http://example.test/a.html   # another URL: head, then content
 *     bun client-robust.ts -o a.iso http://example.test/a.iso
 *
 * It receives in a loop until the framing says that the response is complete (RFC 9112 §6.3), never
 * because no more bytes came; a short response is a failure, and each failure has curl's exit code.
 * Memory is constant: bytes go straight from the socket to where they belong, as fast as that takes
 * them. The heart is `transfer`, in section 8: try { connect; send; while … receive } catch … finally.
 *
 * Left out so far: https, retries, resuming, redirects. Never: HTTP/2, compression, cookies.
 *
 *  1 Limits and defaults    what is bounded, by how much, and why
 *  2 Types                  the words that the rest is written in
 *  3 Errors                 every way to fail, and the exit code it has
 *  4 Parsing                bytes → response head, bytes → content (pure)
 *  5 Formatting             request → bytes (pure)
 *  6 Application            which responses are a success, and what is kept of them (pure)
 *  7 Connection             what has been received and not been asked for; deadlines
 *  8 Sockets                connect, and the heart
 *  9 Command line           flags, where the content goes
 * 10 Main
 */
import { write, writeSync } from "node:fs";
import { type FileHandle, open, realpath, rename, stat, unlink } from "node:fs/promises";
import { isatty } from "node:tty";
import { parseArgs, promisify } from "node:util";

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
});

export const DEFAULTS = Object.freeze({
  url: "http://localhost:8888/data",
  /** A SYN is sent again after 1, 3 and 7 s: this allows for three that were lost. */
  connectTimeoutS: 10,
  /** No byte for so long. Slow is no failure; silence is. */
  stallTimeoutS: 30,
});

// ═══ 2 Types ═════════════════════════════════════════════════════════════════════════════════════

export interface Request {
  readonly method: "GET";
  readonly url: URL;
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

/** Where a response goes. */
export interface Sink {
  /** The final head is here; content follows. */
  start(head: ResponseHead): Promise<void>;
  write(content: Uint8Array): Promise<void>;
  /** The response is whole. */
  finish(): Promise<void>;
  /** Whatever happened, this is called last. */
  close(): Promise<void>;
}

export interface Timeouts {
  readonly connectMs: number;
  readonly stallMs: number;
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
  empty: 52,
  send: 55,
  receive: 56,
});
export type Outcome = keyof typeof EXIT_CODES;

/** A transfer that failed: `outcome` says how, the message says it in a line. */
export class TransferError extends Error {
  constructor(
    readonly outcome: Outcome,
    message: string,
    /** True where a line on stderr would only disturb: `| head` has what it wanted. */
    readonly isQuiet = false,
  ) {
    super(message);
  }
}

/** What Bun and node:fs throw. */
type SystemError = Error & { code?: string; syscall?: string };

// ═══ 4 Parsing ═══════════════════════════════════════════════════════════════════════════════════
//
// A parser reads bytes and keeps where it is, so that it goes on where it stopped when more bytes
// come: the outcome is the same however a message was split.

// ── shared: byte classes ──
const [HTAB, LF, CR, SP] = [0x09, 0x0a, 0x0d, 0x20];

/** The class of the bytes that a pattern matches, taken as ISO 8859-1: a table of 256, 1 for a member. */
function bytesLike(pattern: RegExp): Uint8Array {
  return Uint8Array.from({ length: 256 }, (_, byte) => (pattern.test(String.fromCharCode(byte)) ? 1 : 0));
}

/** field-content: VCHAR / obs-text / SP / HTAB (RFC 9110 §5.5). CR, LF, NUL and other CTL are not. */
const FIELD_CONTENT = bytesLike(/[\t\x20-\x7e\x80-\xff]/);
const HEXDIG = bytesLike(/[0-9A-Fa-f]/);

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
/** chunk-ext = *( BWS ";" BWS token [ BWS "=" BWS ( token / quoted-string ) ] ) */
const CHUNK_EXT =
  /^(?:[ \t]*;[ \t]*[!#$%&'*+\-.^_`|~\w]+(?:[ \t]*=[ \t]*(?:[!#$%&'*+\-.^_`|~\w]+|"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"))?)*$/;
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
  private extensionBytes = 0;
  private trailerBytes = 0;
  private line = "";

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
      this.takeExtensionByte(byte);
    } else this.fail("chunk-size");
  }

  private takeExtensionByte(byte: number): void {
    if (byte === LF) return this.fail("bare-lf");
    if (byte === CR) return CHUNK_EXT.test(this.line) ? this.go("size-lf") : this.fail("chunk-extension");
    // All of them together may outweigh the content only by so much, or tiny chunks would keep us busy.
    this.extensionBytes++;
    if (FIELD_CONTENT[byte] !== 1 || this.extensionBytes > this.limits.chunkExtensionBytesMax + this.announced)
      return this.fail("chunk-extension");
    this.line += String.fromCharCode(byte);
  }

  private endSizeLine(): void {
    this.announced += this.left;
    this.go(this.left > 0 ? "data" : "trailer");
  }

  /** The trailer section has the syntax and the limits of the head (RFC 9112 §7.1.2). */
  private takeTrailerByte(byte: number): void {
    this.trailerBytes++;
    if (this.trailerBytes > this.limits.headBytesMax) return this.fail("trailer-too-large");
    if (byte === LF) return this.endTrailerLine();
    // CR is only ever the last byte of a line; what else may stand in a line is checked at once.
    if (this.line.endsWith("\r")) return this.fail("bare-cr");
    if (byte !== CR && FIELD_CONTENT[byte] !== 1) return this.fail("trailer");
    this.line += String.fromCharCode(byte);
  }

  private endTrailerLine(): void {
    if (!this.line.endsWith("\r")) return this.fail("bare-lf");
    const line = this.line.slice(0, -1);
    if (line === "") return this.go("done");
    const isFold = this.acceptsFolds && /^[ \t]/.test(line) && this.trailerNames.length > 0;
    if (isFold && FIELD_LINE.test(`x:${line}`)) return this.go("trailer");
    const name = FIELD_LINE.exec(line)?.[1];
    if (name === undefined) return this.fail("trailer");
    if (this.trailerNames.length === this.limits.fieldLinesMax) return this.fail("trailer-too-large");
    this.trailerNames.push(name.toLowerCase());
    this.line = "";
  }

  private go(state: ChunkedDecoder["state"]): void {
    this.state = state;
    this.line = "";
    if (state !== "size") return;
    this.left = this.sizeDigits = 0;
  }

  private fail(fault: ChunkedFault): void {
    this.state = "failed";
    this.fault = fault;
  }
}
// ── end shared ──

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

  /** The peer will send no more. RFC 9112 §8: only content without a length may end like this. */
  end(): void {
    if (this.head === undefined) this.parser.end();
    if (this.parser.state === "failed") this.fault = this.parser.fault;
    if (this.head !== undefined && this.framing === "close") this.isComplete = true;
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

  private takeChunked(bytes: Uint8Array, from: number): Uint8Array {
    const { decoder } = this;
    let to = from;
    for (let at = from; at < bytes.length && !this.isComplete && this.fault === "";) {
      at = decoder.next(bytes, at, bytes.length);
      // Content moves left, over the framing: one piece is left to write, and nothing is allocated.
      bytes.copyWithin(to, decoder.contentFrom, decoder.contentTo);
      to += decoder.contentTo - decoder.contentFrom;
      if (decoder.state === "done") this.isComplete = true;
      if (decoder.fault !== "") this.fault = `its chunked content is malformed (${decoder.fault})`;
    }
    return bytes.subarray(from, to);
  }
}

// ═══ 5 Formatting ════════════════════════════════════════════════════════════════════════════════

/** The request as it goes over the wire (RFC 9112 §3; Host: §3.2). */
export function formatRequest({ method, url }: Request): Uint8Array {
  const lines = [
    `${method} ${url.pathname}${url.search} HTTP/1.1`,
    `Host: ${url.host}`,
    `User-Agent: http-over-tcp/${VERSION}`,
    "Accept: */*",
    "Connection: close",
  ];
  return new TextEncoder().encode(`${lines.join("\r\n")}\r\n\r\n`);
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
    writeSync(2, `${printable(line).replace(/[\n\t]/g, " ")}\n`);
  } catch {}
}
// ── end shared ──

// ═══ 6 Application ═══════════════════════════════════════════════════════════════════════════════

/**
 * Checks that the response is what was asked for. Where only its content is kept, that is 2xx alone:
 * neither the page of an error nor that of a redirect shall pass for the content of the URL.
 * @throws TransferError "status"
 */
export function requireSuccess({ status, reasonPhrase }: ResponseHead, keepsOnlyContent: boolean): void {
  if (keepsOnlyContent ? status >= 200 && status < 300 : status < 400) return;
  throw new TransferError("status", `the server answered ${status} ${reasonPhrase}`.trimEnd());
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
  return new TransferError(
    outcome,
    `${doing}: ${error.code ?? error.message}`,
    outcome === "write" && error.code === "EPIPE",
  );
}

// ═══ 7 Connection ════════════════════════════════════════════════════════════════════════════════

/** A socket turned from events into steps: send, receive, receive …, close. */
export class Connection {
  private readonly received: Uint8Array[] = [];
  private receivedBytes = 0;
  private isPaused = false;
  private hasEnded = false;
  private failure: TransferError | undefined;
  private isClosed = false;
  private socket: Bun.Socket<Connection> | undefined;
  /** Wakes the step that waits: a byte came, there is room to send, or all is over. */
  private wake = () => {};

  constructor(private readonly stallTimeoutMs: number) {}

  onOpen(socket: Bun.Socket<Connection>): void {
    this.socket = socket;
    if (this.isClosed) socket.terminate(); // nobody waits for it any more
  }

  onData(bytes: Uint8Array): void {
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

  /** A close without FIN is a reset, and a reset is never the end of a message. */
  onClose(error?: SystemError): void {
    if (!this.hasEnded)
      this.failure ??= explainSystemError(error ?? new Error("reset"), "receive", "the connection was lost");
    this.wake();
  }

  /** Sends all of it. @throws TransferError */
  async send(bytes: Uint8Array): Promise<void> {
    for (let sent = 0; sent < bytes.length;) {
      const written = this.socket?.write(bytes, sent, bytes.length - sent) ?? -1;
      if (written < 0) throw new TransferError("send", "the connection was lost while the request was sent");
      sent += written;
      if (sent < bytes.length) await this.event();
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
      const timer = setTimeout(() => {
        this.failure = new TransferError("timeout", `no byte for ${this.stallTimeoutMs / 1000} s`);
        resolve();
      }, this.stallTimeoutMs);
      this.wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

// ═══ 8 Sockets ═══════════════════════════════════════════════════════════════════════════════════

const SOCKET_HANDLERS: Bun.SocketHandler<Connection> = {
  open: (socket) => socket.data.onOpen(socket),
  data: (socket, bytes) => socket.data.onData(bytes),
  drain: (socket) => socket.data.onDrain(),
  end: (socket) => socket.data.onEnd(),
  close: (socket, error) => socket.data.onClose(error),
  error: (socket, error) => socket.data.onClose(error),
  connectError() {}, // the promise of Bun.connect is rejected too
};

/** @throws TransferError "resolve", "connect" or "timeout" */
async function connect(url: URL, timeouts: Timeouts): Promise<Connection> {
  const hostname = url.hostname.replace(/^\[(.*)\]$/, "$1");
  const port = Number(url.port || 80);
  const connection = new Connection(timeouts.stallMs);
  const { promise: late, reject } = Promise.withResolvers<never>();
  const isLate = () =>
    reject(new TransferError("timeout", `no connection to ${url.host} within ${timeouts.connectMs / 1000} s`));
  const timer = setTimeout(isLate, timeouts.connectMs);
  try {
    // Half-open: the server's FIN must not stop us from sending, nor hide what it sent before.
    const options = { hostname, port, allowHalfOpen: true, data: connection, socket: SOCKET_HANDLERS };
    await Promise.race([late, Bun.connect(options)]);
    return connection;
  } catch (error) {
    connection.close();
    if (error instanceof TransferError) throw error;
    const isUnknown = (error as SystemError).syscall === "getaddrinfo"; // Bun throws SystemErrors
    throw explainSystemError(error as SystemError, isUnknown ? "resolve" : "connect", `cannot connect to ${url.host}`);
  } finally {
    clearTimeout(timer);
  }
}

/**
 * The heart: one request, one response, from connect to close.
 * @returns the exit code; a failure has been printed by then, as one line on stderr
 */
export async function transfer(request: Request, sink: Sink, timeouts: Timeouts): Promise<number> {
  const reader = new ResponseReader(request.method);
  let connection: Connection | undefined;
  try {
    connection = await connect(request.url, timeouts);
    await connection.send(formatRequest(request));
    let bytes: Uint8Array | undefined;
    while (!reader.isComplete && (bytes = await connection.receive()) !== undefined) {
      const isBeforeHead = reader.head === undefined;
      const content = reader.take(bytes);
      if (isBeforeHead && reader.head !== undefined) await sink.start(reader.head);
      await sink.write(content);
      requireWellFormed(reader);
    }
    if (!reader.isComplete) reader.end();
    requireComplete(reader);
    await sink.finish();
    return EXIT_CODES.ok;
  } catch (error) {
    return report(error, reader);
  } finally {
    connection?.close();
    await sink.close();
  }
}

/** Prints what went wrong and returns its exit code. What is not a TransferError is a fault of ours. */
function report(error: unknown, reader?: ResponseReader): number {
  if (!(error instanceof TransferError)) throw error;
  // Content that only a close ends may be cut by a reset at any byte: what came is a part.
  const isCut = error.outcome === "receive" && reader?.head !== undefined && reader.framing === "close";
  if (!error.isQuiet) tell(`Error: ${error.message}`);
  return EXIT_CODES[isCut ? "partial" : error.outcome];
}

// ═══ 9 Command line ══════════════════════════════════════════════════════════════════════════════

export const HELP = `Usage: client-robust [options] [URL]
Gets URL, by default ${DEFAULTS.url}, and prints the whole response.

  -o, --output FILE        save the content to FILE (- is stdout), if the status is 2xx
  -s, --silent             print nothing on stderr but errors
      --connect-timeout S  seconds until connected (${DEFAULTS.connectTimeoutS})
      --stall-timeout S    seconds without a byte (${DEFAULTS.stallTimeoutS})
  -h, --help               print this text
  -V, --version            print the version

FILE is either absent, as it was, or whole. Exit codes are curl's: 0 whole response, 2 wrong
usage, 3 URL, 6 cannot resolve, 7 cannot connect, 8 not HTTP, 18 partial, 22 status (with -o
any but 2xx, otherwise 400 and above), 23 cannot write, 28 timeout, 52 no answer, 55 cannot
send, 56 cannot receive.
`;

const writeAsync = promisify(write);

/** Writes all of it, and waits while there is no room. @throws TransferError "write" */
async function writeAll(fd: number, bytes: Uint8Array): Promise<void> {
  for (let written = 0; written < bytes.length;) {
    try {
      written += (await writeAsync(fd, bytes, written)).bytesWritten;
    } catch (error) {
      if ((error as SystemError).code !== "EAGAIN")
        throw explainSystemError(error as SystemError, "write", "cannot write");
      await Bun.sleep(LIMITS.writeRetryMs);
    }
  }
}

/** Prints the whole response, or its content alone (-o -). */
class StdoutSink implements Sink {
  private head: ResponseHead | undefined;
  private readonly isTerminal = isatty(1);
  private readonly textDecoder = new TextDecoder();

  constructor(private readonly isContentOnly: boolean) {}

  async start(head: ResponseHead): Promise<void> {
    this.head = head;
    if (this.isContentOnly) requireSuccess(head, true);
    else await this.print(Buffer.from(head.text, "latin1"));
  }

  async write(content: Uint8Array): Promise<void> {
    await (this.isContentOnly ? writeAll(1, content) : this.print(content));
  }

  async finish(): Promise<void> {
    if (this.head !== undefined) requireSuccess(this.head, this.isContentOnly);
  }

  async close(): Promise<void> {}

  /** A terminal gets text, and nothing of it moves the cursor; all else gets the bytes as they came. */
  private async print(bytes: Uint8Array): Promise<void> {
    if (!this.isTerminal) return writeAll(1, bytes);
    if (bytes.includes(0))
      throw new TransferError("write", "the content is binary: use -o FILE, or -o - to see it here");
    await writeAll(1, new TextEncoder().encode(printable(this.textDecoder.decode(bytes, { stream: true }))));
  }
}

/** Saves the content: it grows in FILE.part, which becomes FILE when it is whole and on the disk. */
class FileSink implements Sink {
  private handle: FileHandle | undefined;
  private path: string;
  /** Empty where FILE is no regular file: a device or a pipe is written to, never replaced. */
  private partPath = "";

  constructor(path: string) {
    this.path = path;
  }

  async start(head: ResponseHead): Promise<void> {
    requireSuccess(head, true);
    await this.attempt(async () => {
      // A link goes on pointing to where it did: what it points to is what gets replaced.
      this.path = await realpath(this.path).catch(() => this.path);
      const isReplaceable = await stat(this.path).then(
        (found) => found.isFile(),
        () => true,
      );
      if (isReplaceable) this.partPath = `${this.path}.part`;
      this.handle = await open(this.partPath || this.path, "w");
    });
  }

  async write(content: Uint8Array): Promise<void> {
    if (this.handle !== undefined) await writeAll(this.handle.fd, content);
  }

  async finish(): Promise<void> {
    if (this.partPath === "") return;
    await this.attempt(async () => {
      await this.handle?.sync();
      await rename(this.partPath, this.path);
      this.partPath = "";
    });
  }

  async close(): Promise<void> {
    await this.handle?.close();
    // Nothing goes on from it yet, so nothing is left of it.
    if (this.handle !== undefined && this.partPath !== "") await unlink(this.partPath);
  }

  private async attempt(step: () => Promise<void>): Promise<void> {
    try {
      await step();
    } catch (error) {
      throw explainSystemError(error as SystemError, "write", `cannot write ${this.partPath || this.path}`); // node:fs throws SystemErrors
    }
  }
}

export interface CommandLine {
  readonly show: "" | "help" | "version";
  readonly url: URL;
  readonly output: string | undefined;
  readonly timeouts: Timeouts;
}

/** @throws TransferError "usage" or "url" */
export function parseCommandLine(args: string[]): CommandLine {
  const { values, positionals } = parseFlags(args);
  const [url = DEFAULTS.url, extra] = positionals;
  if (extra !== undefined) throw usageError(`one argument too many: ${JSON.stringify(extra)}`);
  if (values.output === "") throw usageError("--output takes a file or -");
  const connectMs = parseSeconds("--connect-timeout", values["connect-timeout"], DEFAULTS.connectTimeoutS);
  const stallMs = parseSeconds("--stall-timeout", values["stall-timeout"], DEFAULTS.stallTimeoutS);
  const show = values.help ? "help" : values.version ? "version" : "";
  return { show, url: parseUrl(url), output: values.output, timeouts: { connectMs, stallMs } };
}

function parseFlags(args: string[]) {
  const string = { type: "string" } as const;
  const flag = (short: string) => ({ type: "boolean", short }) as const;
  const options = {
    output: { ...string, short: "o" },
    silent: flag("s"),
    "connect-timeout": string,
    "stall-timeout": string,
    help: flag("h"),
    version: flag("V"),
  };
  try {
    return parseArgs({ args, options, allowPositionals: true });
  } catch (error) {
    throw usageError((error as Error).message.split(". ", 1)[0] ?? ""); // parseArgs throws TypeErrors
  }
}

const usageError = (message: string) => new TransferError("usage", `${message} (see client-robust --help)`);

/** @returns milliseconds */
function parseSeconds(name: string, text: string | undefined, byDefault: number): number {
  const seconds = text === undefined ? byDefault : Number(text);
  // A timer takes 2^31 ms at the most, and would fire at once for more.
  if (text !== undefined && (!/^\d*\.?\d+$/.test(text) || seconds <= 0 || seconds > 2_000_000))
    throw usageError(`${name} takes seconds, from above 0 to 2000000`);
  return seconds * 1000;
}

/** As in curl, "http://" may be left out. @throws TransferError "url" */
export function parseUrl(text: string): URL {
  const withScheme = /^[a-z][a-z0-9+.-]*:\/\//i.test(text) ? text : `http://${text}`;
  // URL.parse drops tabs and line ends, and encodes spaces: what is left would not be what was asked for.
  const url = /[\0-\x20\x7f]/.test(text) ? null : URL.parse(withScheme);
  if (url === null) throw new TransferError("url", `not a URL: ${JSON.stringify(text)}`);
  if (url.protocol !== "http:") throw new TransferError("url", `only http:// is spoken here, not ${url.protocol}//`);
  if (url.username !== "" || url.password !== "")
    throw new TransferError("url", "a URL with a user name is not supported");
  return url;
}

/** @returns the exit code */
async function main(): Promise<number> {
  try {
    const { show, url, output, timeouts } = parseCommandLine(process.argv.slice(2));
    if (show !== "") {
      await writeAll(1, new TextEncoder().encode(show === "help" ? HELP : `client-robust ${VERSION}\n`));
      return EXIT_CODES.ok;
    }
    const sink = output === undefined || output === "-" ? new StdoutSink(output === "-") : new FileSink(output);
    return await transfer({ method: "GET", url }, sink, timeouts);
  } catch (error) {
    return report(error);
  }
}

// ═══ 10 Main ═════════════════════════════════════════════════════════════════════════════════════

if (import.meta.main) process.exit(await main());
