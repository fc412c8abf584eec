/**
 * Plays the request vectors of test/vectors/request against server.ts: against its Connection with every split of
 * every message, and over real sockets against the script and the binary.
 *
 *     outcome: 400 bare-lf    status and key of REJECTIONS; a status alone is the application's answer
 *     outcome: 200,405        several requests, each with its status
 *     persists: yes           the connection goes on after the last answer
 *     finish: yes             the peer sends FIN after the message
 *     interim: 100            100 Continue comes before the answer where the content was not there yet
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { REJECTIONS, Server, TextSite, type Transport } from "../server.ts";
import { exchange, startServer, VARIANTS } from "./harness.ts";
import { converse, nextTurn } from "./transport.ts";
import { readVectors, splits, type Vector } from "./vector.ts";

setDefaultTimeout(60_000);

const SEED = Number(process.env["SEED"] ?? Date.now() % 2 ** 31);
console.log(`SEED=${SEED}`);

const TEXT = "Hello, World!";
const NEXT = Buffer.from("GET /next HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
const REASON_PHRASES: Readonly<Record<number, string>> = {
  200: "OK",
  204: "No Content",
  400: "Bad Request",
  405: "Method Not Allowed",
  413: "Content Too Large",
  414: "URI Too Long",
  417: "Expectation Failed",
  431: "Request Header Fields Too Large",
  501: "Not Implemented",
  505: "HTTP Version Not Supported",
};

// ── what comes back ──

interface Answer {
  readonly statusLine: string;
  readonly fields: Readonly<Record<string, string>>;
  readonly content: string;
}

/**
 * Takes a stream of responses apart, to the last byte. 100 Continue is an answer like another here.
 * @param heads which of the answers, 100 left out of the count, are to HEAD
 * @throws Error where the stream is not responses only
 */
function parseAnswers(stream: string, heads: readonly boolean[]): Answer[] {
  const answers: Answer[] = [];
  let finals = 0;
  for (let at = 0; at < stream.length;) {
    const headTo = stream.indexOf("\r\n\r\n", at);
    if (headTo < 0) throw new Error(`a head that does not end: ${JSON.stringify(stream.slice(at))}`);
    const [statusLine = "", ...lines] = stream.slice(at, headTo).split("\r\n");
    const fields = parseFields(lines);
    at = headTo + 4;
    if (statusLine === "HTTP/1.1 100 Continue") {
      answers.push({ statusLine, fields, content: "" });
      continue;
    }
    const length = heads[finals++] === true ? 0 : Number(fields["Content-Length"] ?? 0);
    if (at + length > stream.length) throw new Error(`content shorter than its length after ${statusLine}`);
    answers.push({ statusLine, fields, content: stream.slice(at, at + length) });
    at += length;
  }
  return answers;
}

function parseFields(lines: readonly string[]): Record<string, string> {
  const fields: Record<string, string> = {};
  for (const line of lines) {
    const [, name, value] = /^([A-Za-z-]+): ([!-~](?:[ -~]*[!-~])?)$/.exec(line) ?? [];
    if (name === undefined || value === undefined) throw new Error(`not a field-line: ${JSON.stringify(line)}`);
    if (name in fields) throw new Error(`${name} comes twice`);
    fields[name] = value;
  }
  return fields;
}

// ── what should come back ──

/** One answer as it has to be, all of it but the time. So nothing that the peer sent can be repeated in it. */
function expectedAnswer(outcome: string, content: string, isHead: boolean, connection: string): Answer {
  const status = Number(outcome.slice(0, 3));
  const fields: Record<string, string> = { Date: "now" };
  if (status !== 204) fields["Content-Type"] = "text/plain; charset=utf-8";
  if (status !== 204) fields["Content-Length"] = String(Buffer.byteLength(content));
  if (status === 204 || status === 405) fields["Allow"] = "GET, HEAD, POST, OPTIONS";
  if (connection !== "") fields["Connection"] = connection;
  const statusLine = `HTTP/1.1 ${status} ${REASON_PHRASES[status]}`;
  return { statusLine, fields, content: isHead ? "" : content };
}

/** The contents that an outcome may have: the explanation of its reason; where none is told, of its status. */
function expectedContents(outcome: string): string[] {
  if (outcome === "200") return [TEXT];
  if (outcome === "204") return [""];
  if (outcome === "405") return ["method not allowed\n"];
  if (outcome === "501") return ["no such method here\n"];
  const [status = "", reason] = outcome.split(" ");
  const rejections = Object.entries(REJECTIONS).filter(
    ([key, [code]]) => code === Number(status) && key === (reason ?? key),
  );
  if (rejections.length === 0) throw new Error(`no such outcome: ${outcome}`);
  return rejections.map(([, [, explanation]]) => `${explanation}\n`);
}

/** What a vector says about its answers. */
class Expectation {
  readonly finishes: boolean;
  private readonly persists: boolean;
  private readonly mayAskForContent: boolean;
  private readonly outcomes: string[];
  private readonly requestLines: string[];
  /** Streams that were found right: nearly all splits give the same one. */
  private readonly right = new Set<string>();

  constructor(vector: Vector) {
    const { options } = vector;
    const unknown = Object.keys(options).filter((key) => !["persists", "finish", "interim"].includes(key));
    if (unknown.length > 0 || !["yes", "no"].includes(options["persists"] ?? ""))
      throw new Error(`${vector.name}: not the options of a request vector`);
    this.persists = options["persists"] === "yes";
    this.finishes = options["finish"] === "yes";
    this.mayAskForContent = options["interim"] === "100";
    this.outcomes = vector.outcome.split(",");
    this.requestLines = vector.message.toString("latin1").match(/(?<![^\n])[A-Z]+ [^\r\n]*/g) ?? [];
  }

  /** @param hasNext whether NEXT was sent after the message */
  check(stream: string, hasNext: boolean): void {
    const key = `${hasNext} ${stream}`;
    if (this.right.has(key)) return;
    const outcomes = [...this.outcomes, ...(hasNext && this.persists ? ["200"] : [])];
    const heads = this.outcomes.map((_, i) => this.requestLines[i]?.startsWith("HEAD ") ?? false);
    const all = parseAnswers(stream, heads);
    const answers = all.filter((answer) => !isInterim(answer));
    expect(answers.map((answer) => answer.statusLine.slice(9, 12))).toEqual(outcomes.map((one) => one.slice(0, 3)));
    answers.forEach((answer, i) => this.checkAnswer(answer, outcomes[i] ?? "", i, heads[i] ?? false));
    this.checkInterim(all);
    this.right.add(key);
  }

  private checkAnswer(answer: Answer, outcome: string, index: number, isHead: boolean): void {
    const { Date: date = "", ...fields } = answer.fields;
    expect(date).toMatch(/^(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT$/);
    expect(Math.abs(Date.parse(date) - Date.now())).toBeLessThan(60_000);
    const contents = expectedContents(outcome);
    // A refusal of HEAD tells its reason by its length alone.
    const content = contents.find((one) => one === answer.content) ?? contents[0] ?? "";
    const expected = expectedAnswer(outcome, content, isHead, this.connectionOption(index));
    const found: Answer = { ...answer, fields: { ...fields, Date: "now" } };
    expect(found).toEqual(expected);
  }

  /** `close` exactly where the connection closes; HTTP/1.0 has to be told where it does not. */
  private connectionOption(index: number): string {
    const isNext = index === this.outcomes.length;
    const isLast = index === this.outcomes.length - 1;
    if (isNext || (isLast && !this.persists)) return "close";
    return this.requestLines[index]?.endsWith(" HTTP/1.0") ? "keep-alive" : "";
  }

  /** 100 Continue comes at most once, without fields, and before the one answer that it belongs to. */
  private checkInterim(all: readonly Answer[]): void {
    const interims = all.filter(isInterim);
    expect(interims.length).toBeLessThanOrEqual(this.mayAskForContent ? 1 : 0);
    if (interims.length === 1) expect(all[0]).toEqual({ statusLine: INTERIM, fields: {}, content: "" });
  }

  /** A peer that sends byte by byte has sent no content when its head is complete, and must be told to go on. */
  checkAsked(stream: string): void {
    expect(stream.startsWith(`${INTERIM}\r\n\r\n`)).toBe(this.mayAskForContent);
  }
}

const INTERIM = "HTTP/1.1 100 Continue";
const isInterim = (answer: Answer) => answer.statusLine === INTERIM;

// ── (a) a Connection and a peer that are both in this process ──

/** Takes all that is written, and holds the connection to how a socket may be used. */
class Recorder implements Transport {
  readonly remoteAddress = "192.0.2.1";
  written = "";
  isShutDown = false;
  isEnded = false;

  write(bytes: Uint8Array, from: number, length: number): number {
    if (this.isShutDown) throw new Error("a write after the FIN");
    this.written += Buffer.from(bytes.buffer, bytes.byteOffset + from, length).toString("latin1");
    return length;
  }
  shutdown(): void {
    if (this.isShutDown) throw new Error("a second FIN");
    this.isShutDown = true;
  }
  end(): void {
    this.isEnded = true;
  }
  terminate(): void {
    throw new Error("a reset where a close is due");
  }
  pause(): void {
    throw new Error("a pause where nothing waits to be written");
  }
  resume(): void {
    throw new Error("resumed without a pause");
  }
}

/** Sends the pieces and then FIN; returns what came back. The server has to close, and to forget the connection. */
async function play(server: Server, pieces: readonly Buffer[], finishes: boolean): Promise<string> {
  const transport = new Recorder();
  const connection = converse(transport, server);
  for (const piece of pieces) {
    connection.onData(piece);
    await nextTurn();
  }
  // After NEXT, or after a refusal, the server closes first.
  if (!finishes) expect(transport.isShutDown).toBe(true);
  connection.onEnd();
  await nextTurn();
  expect([transport.isShutDown, transport.isEnded]).toEqual([true, true]);
  connection.onClose();
  expect(server.connections.size).toBe(0);
  return transport.written;
}

/** The pieces with NEXT in the last piece, and with NEXT as a piece of its own. */
const withNext = (pieces: readonly Buffer[]) => [
  [...pieces.slice(0, -1), Buffer.concat([...pieces.slice(-1), NEXT])],
  [...pieces, NEXT],
];

const vectors = readVectors("request");

for (const vector of vectors)
  test(`request ${vector.name}: ${vector.title}`, async () => {
    const expectation = new Expectation(vector);
    // One server for all the splits: what a connection leaves behind in it would show in the next one.
    const server = new Server(new TextSite(TEXT), "off", () => {});
    for (const pieces of splits(vector.message, SEED)) {
      expectation.check(await play(server, pieces, true), false);
      if (pieces.length === vector.message.length) expectation.checkAsked(await play(server, pieces, true));
      if (expectation.finishes) continue;
      for (const sent of withNext(pieces)) expectation.check(await play(server, sent, false), true);
    }
  });

// ── (b) the programs, over TCP ──

/** Byte by byte is one write and one turn of the event loop a byte: too slow for long messages. */
const BYTEWISE_BYTES_MAX = 400;
const CONCURRENT = 32;

interface Exchange {
  readonly vector: Vector;
  readonly expectation: Expectation;
  readonly pieces: Uint8Array[];
}

function* exchangesOf(vector: Vector): Generator<Exchange> {
  const expectation = new Expectation(vector);
  const bytes = expectation.finishes ? vector.message : Buffer.concat([vector.message, NEXT]);
  yield { vector, expectation, pieces: [bytes] };
  if (vector.message.length < BYTEWISE_BYTES_MAX)
    yield { vector, expectation, pieces: Array.from(bytes, (_, i) => bytes.subarray(i, i + 1)) };
}

/** Plays the exchange. @returns what is wrong, or undefined */
async function playOver(port: number, { vector, expectation, pieces }: Exchange): Promise<string | undefined> {
  try {
    const stream = await exchange(port, pieces, { finish: expectation.finishes });
    expectation.check(stream, !expectation.finishes);
    return undefined;
  } catch (error) {
    return `${vector.name}, ${pieces.length} pieces: ${error}`;
  }
}

/** Each variant is one test: a thousand exchanges, as many at a time as are quickest. */
for (const variant of VARIANTS)
  test(`request vectors over TCP, ${variant}`, async () => {
    await using server = await startServer(variant, ["--log", "off"]);
    const exchanges = vectors.flatMap((vector) => [...exchangesOf(vector)]).values();
    const faults: string[] = [];
    const playAll = async () => {
      for (const one of exchanges) {
        const fault = await playOver(server.port, one);
        if (fault !== undefined) faults.push(fault);
      }
    };
    await Promise.all(Array.from({ length: CONCURRENT }, playAll));
    expect(faults).toEqual([]);
  });
