// Any bytes give a valid response stream or a close, the same however they are split; never a throw, a hang or growth.
/**
 * A seeded fuzzer for server.ts. Input i of seed N is input 0 of seed N + i, so a finding is made again by its seed.
 *
 *     bun test/fuzz.ts                              # a random seed; a million inputs, then some thousands over TCP
 *     bun test/fuzz.ts --seed 7 --runs 1000 --socket-runs 0
 *     bun test/fuzz.ts --input finding.txt          # one input, written like the message of a vector
 */
import { readdirSync, readFileSync, rmSync, writeSync } from "node:fs";
import { parseArgs } from "node:util";
import { isMainThread, Worker, workerData } from "node:worker_threads";
import { type Connection, type Limits, LIMITS, type LogFormat, Server, TextSite, type Transport } from "../server.ts";
import { binaries, exchange, startServer, type Variant, VARIANTS } from "./harness.ts";
import { Random } from "./random.ts";
import { converse, nextTurn } from "./transport.ts";
import { parseMessage, readVectors } from "./vector.ts";

const FINDINGS_MAX = 5;
/** An input that takes longer is a hang; 50 µs are usual, and some hundred ms over TCP. */
const HANG_MS = 20_000;
/** What a process may grow by after its first quarter: so much garbage may lie about; 2 MiB are usual. */
const GROWTH_KIB_MAX = 16_384;
const BATCH = 250;
const CONCURRENT = 32;

// ── inputs ──

/** Texts in the form of the vectors, with "|" between them. */
const texts = (line: string) => line.split("|").map((text) => parseMessage(text.trim()).toString("latin1"));

const TOKENS = texts(
  String.raw`\r|\n|\r\n|\0|\t|\x20|:|;|,|.|/|%|*|"|\\|0|1|9|f|g|-|+|\x80|\xff|%4|%00|HEAD\x20|HTTP/1.0|HTTP/1.1|close|chunked|
  \r\n\r\n|\r\n\n|0\r\n\r\n|3\r\nabc\r\n|3;a=b\r\n|9007199254740993|18446744073709551617|ffffffffffffffff|00000000003|99999999|
  Host:|Host: x\r\n|Expect:|Expect: 100-continue\r\n|Connection: close\r\n|Connection: keep-alive\r\n|Content-Length:|
  Content-Length: 3\r\n|Transfer-Encoding:|Transfer-Encoding: chunked\r\n|GET / HTTP/1.1\r\n|HEAD / HTTP/1.0\r\n\r\n|
  GET /a HTTP/1.1\r\nHost: x\r\n\r\n|POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n`,
);

/** What may stand in each part of a request; after "!", what may not; with the status that it gets. */
const PARTS = new Map<string, [text: string, status: number][]>();
const TABLE = String.raw`
method 200:GET|HEAD|POST
method 204:OPTIONS
method 405:PUT
method 501:BREW
!method 400:|G T|G(T|GET\t|\x80|\x20GET|G\rT|\0
!method 501:\{x*33}
target 0:/|/a?b=c&d|/%7e%00|http://x|hTTps://a.example:8080/?|/{\x7c}^"\\|/?/?|http://[::1]:/
!target 400:|a|**|/#|/%4|/%zz|http://|http://u@x/|http://x:y|/\x80|/\t|/\r|/\x20|/\0|x:/
!target 414:/\{x*8000}
version 0:HTTP/1.1|HTTP/1.1|HTTP/1.9|HTTP/1.0
!version 400:|HTTP/1.1\x20|http/1.1|HTTP/1.10|HTTP/1|HTTP/1.1\r|HTTP/1.x
!version 505:HTTP/2.0|HTTP/0.9
host 0:Host: x|hOST:a.example:65535|Host:\t [::1]:80\t\x20|Host: %41-._~!$&'()*+;=|Host: x:
!host 400:X: y|Host:|Host: a b|Host: x:65536|Host: [::1|Host: a,b|Host: x\r\nhost: x|Host: u@x|Host: %4
field 0:A: b|x-:|Cookie:\t\x80 \xff\t|Connection: close|Connection: x ,Keep-Alive|^: :|Content: 5
!field 400:Host: x|A : b|\x20a: b|\ta: b|: b|a|a\0: b|A: \0|A: b\rc|A: b\nc: d|\x80: a|A:\r|A: \x7f|Transfer-Encoding: x
!field 400:Content-Length: 0\r\nTransfer-Encoding: chunked|Transfer-Encoding: chunked, chunked|Transfer-Encoding:
!field 400:Content-Length: 3\r\nContent-Length: 3|Connection: close\n
!field 417:Expect: 200-ok
!field 431:A: \{x*32768}
!length 400:|+1|-1|1, 1|1,|0x1|1 1|1.0|1\x0b|\xa01|9007199254740992|\{9*400}
!length 413:1048577|9007199254740991
!chunk 400:-1\r\na\r\n|\r\n|g\r\n|0x1\r\na\r\n|+1\r\na\r\n|\x201\r\na\r\n|1\na\r\n|1\ra\r\n|1\r\nab|2\r\na\r\n|1;\r\na\r\n
!chunk 400:1 x\r\na\r\n|1;a="\r\na\r\n|1;a=\r\na\r\n|1;\0\r\n|1;a\na\r\n|1\r\na\n|1\r\na\rb|20000000000000\r\n|\{f*40}
!chunk 400:\{0*65}|1;\{a*8000}
!chunk 413:100001\r\n|fffffffff\r\n
trailer 0:|X: y\r\n|a:\r\nb:\t\x80\r\n
!trailer 400:Host: x\r\n|content-LENGTH: 3\r\n|a b: c\r\n|: x\r\n|\x20x: y\r\n|a\r\n|a: \0\r\n|a: b\n|a: b\r\r\n
!trailer 431:a: \{x*32768}`;
for (const [, place = "", status, line = ""] of TABLE.matchAll(/^(!?\w+) (\d+):(.*)$/gm))
  PARTS.set(place, [
    ...(PARTS.get(place) ?? []),
    ...texts(line).map((text): [string, number] => [text, Number(status)]),
  ]);
const FAULTS = [...PARTS.keys()].filter((place) => place.startsWith("!"));
const CONTENTS = texts(String.raw`a|GET /x HTTP/1.1\r\nHost: y\r\n\r\n|0\r\n\r\n|\r\n|\0\xff\r\n|\{z*300}`);

/** A request with at most one fault, and the answer that it gets. */
function makeRequest(random: Random) {
  const fault = random.once(3) ? random.pick(FAULTS) : "";
  let status = 0;
  let isRefused = false;
  const part = (place: string): string => {
    const [text, code] = random.pick(PARTS.get(fault === `!${place}` ? fault : place) ?? [["", 0]]);
    // A refused method is told so whatever its content is.
    if (!isRefused || (place !== "chunk" && place !== "trailer" && code !== 413)) status = code || status;
    return text;
  };
  const method = part("method");
  isRefused = status === 405 || status === 501;
  const isChunked = /chunk|trailer/.test(fault) || (!/length|version/.test(fault) && random.once(3));
  const version = isChunked || fault === "!host" ? "HTTP/1.1" : part("version");
  const fields = [part("host"), ...random.several(3, () => random.pick(PARTS.get("field") ?? [])[0])];
  if (fault === "!field") fields.splice(random.below(fields.length + 1), 0, part("field"));
  // Where the answer is no, it comes before the content, and before a fault in that.
  if (!isRefused && random.once(8)) fields.push("Expect: , 100-Continue");
  const closes = version === "HTTP/1.0" && !fields.includes("Connection: x ,Keep-Alive");
  let content = isChunked ? makeChunked(random, part("chunk"), part("trailer")) : "";
  if (isChunked) fields.push("Transfer-Encoding: Chunked");
  else if (fault === "!length" || random.once(2)) {
    content = random.pick(CONTENTS);
    fields.unshift(`Content-Length: ${fault === "!length" ? part("length") : `0${content.length}`}`);
  }
  const text = `${method} ${part("target")} ${version}\r\n${fields.join("\r\n")}\r\n\r\n${content}`;
  // 501 for a method leaves no doubt about where the next request starts.
  const isFaulty = fault !== "" && !(fault === "!method" && isRefused);
  const isLast = closes || isFaulty || fields.includes("Connection: close");
  return { text, status, isLast, isHead: method === "HEAD", isFaulty: fault !== "", isRefused };
}

function makeChunked(random: Random, fault: string, trailer: string): string {
  const chunks = random.several(3, () => {
    const data = random.pick(CONTENTS);
    const size = "0".repeat(random.below(3)) + data.length.toString(16);
    return `${random.once(2) ? size.toUpperCase() : size}${random.pick(["", ";a", ' ;\tb = "\\"c;"'])}\r\n${data}\r\n`;
  });
  chunks.splice(random.below(chunks.length + 1), 0, fault);
  return `${chunks.join("")}${random.pick(["0", "000", "0;x=y"])}\r\n${trailer}\r\n`;
}

interface Input {
  readonly message: Buffer;
  /** What a message from the grammar gets: statuses, with "-" where no content belongs to the answer. */
  readonly expected?: string;
}

/** Some requests one after the other, the last one perhaps cut off. */
function makePipeline(random: Random): Input {
  const requests = [makeRequest(random), ...random.several(3, () => makeRequest(random))];
  const last = requests.at(-1);
  if (last?.isFaulty === false && random.once(3)) {
    last.text = last.text.slice(0, 1 + random.below(last.text.length - 1));
    last.isHead &&= last.text.startsWith("HEAD ");
    if (!last.isRefused || !last.text.includes("\r\n\r\n")) last.status = 400;
  }
  const answered = requests.slice(0, 1 + requests.findIndex(({ isLast }) => isLast) || requests.length);
  const expected = answered.map(({ status, isHead }) => `${status}${isHead || status === 204 ? "-" : ""}`).join();
  return { message: Buffer.from(requests.map(({ text }) => text).join(""), "latin1"), expected };
}

const VECTORS = readVectors("request").map(({ message }) => message.toString("latin1"));
const SHORT_VECTORS = VECTORS.filter((message) => message.length < 2048);

function mutate(random: Random, text: string): string {
  const from = random.below(text.length + 1);
  const to = from + random.below(random.once(4) ? 200 : 4);
  const [before, span, after] = [text.slice(0, from), text.slice(from, to), text.slice(to)];
  const other = random.pick(SHORT_VECTORS);
  const byte = String.fromCharCode(random.below(256));
  const token = random.pick(TOKENS);
  const inserted = ["", span + span, token, token + span, byte, byte + span, other + span];
  if (random.once(8)) return before + other.slice(random.below(other.length + 1));
  return before + random.pick(inserted) + after;
}

/** The input of a seed. */
function makeInput(seed: number): Input {
  const random = new Random(seed);
  const kind = random.below(8);
  if (kind < 3) return makePipeline(random);
  let text = random.pick(random.once(200) ? VECTORS : SHORT_VECTORS);
  if (kind === 3) text = random.several(60, () => String.fromCharCode(random.below(256))).join("");
  if (kind === 4) text = random.several(20, () => random.pick(TOKENS)).join("");
  if (kind === 5) text = makePipeline(random).message.toString("latin1");
  for (let i = random.below(5); i > 0; i--) text = mutate(random, text);
  if (random.once(300)) {
    const token = random.pick(TOKENS) || "\0";
    const at = random.below(text.length + 1);
    text = text.slice(0, at) + token.repeat(random.below(102_400) / token.length) + text.slice(at);
  }
  return { message: Buffer.from(text, "latin1") };
}

// ── what comes back ──

const INTERIM = "HTTP/1.1 100 Continue\r\n\r\n";
const RESPONSE = new RegExp(
  String.raw`HTTP/1\.1 (200 OK|204 No Content|[45]\d\d [A-Z][A-Za-z -]+)\r\n(Content-Type: text/plain; charset=utf-8\r\n)?` +
    String.raw`(?:Allow: [A-Z, ]+\r\n)?(?:Content-Length: (\d+)\r\n)?Date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\r\n` +
    String.raw`(?:Connection: (close|keep-alive)\r\n)?\r\n`,
  "y",
);

interface Answer {
  readonly status: number;
  readonly contentBytes: number;
}

/** Takes a stream without interim responses apart, to its last byte. @throws Error where it is not responses only */
function parseAnswers(stream: string): Answer[] {
  const answers: Answer[] = [];
  for (let at = 0; at < stream.length;) {
    RESPONSE.lastIndex = at;
    const [head = "", statusLine = "", type, length, option] = RESPONSE.exec(stream) ?? [];
    const status = Number(statusLine.slice(0, 3));
    const isInOrder = (status === 204) === (length === undefined) && (type === undefined) === (length === undefined);
    if (head === "" || !isInOrder) throw new Error(`not a response: ${show(stream.slice(at))}`);
    at += head.length;
    // Another answer where content would start: this one is to HEAD.
    const contentBytes = at === stream.length || stream.startsWith("HTTP/1.1 ", at) ? 0 : Number(length ?? 0);
    at += contentBytes;
    answers.push({ status, contentBytes });
    if (at > stream.length) throw new Error(`content shorter than its length: ${show(stream)}`);
    if (option === "close" ? at < stream.length : status >= 400 && status !== 405 && status !== 501)
      throw new Error(`close, and not last: ${show(stream)}`);
  }
  return answers;
}

/** How often 100 Continue comes depends on how the bytes are split: once for a request, or not. */
function withoutInterims(stream: string): string {
  if (stream.includes(INTERIM + INTERIM)) throw new Error("100 Continue twice for one request");
  return stream.replaceAll(INTERIM, "");
}

/** Whether the last answer says close depends on when FIN comes: the server may know of it by then, or not. */
function withoutLastOption(stream: string): string {
  const last = stream.lastIndexOf("HTTP/1.1 ");
  return stream.slice(0, last) + stream.slice(last).replace(/\r\nConnection: (?:close|keep-alive)(?=\r\n)/, "");
}

const show = (text: string) => JSON.stringify(text.length > 2000 ? `${text.slice(0, 2000)}...` : text);

// ── (a) a Connection and a peer that are both in this process ──

/** Limits that short messages reach. */
const SMALL: Limits = {
  ...{ ...LIMITS, requestTargetBytesMax: 40, headBytesMax: 200, fieldLinesMax: 5 },
  ...{ contentBytesMax: 60, chunkExtensionBytesMax: 12 },
};
let logged: string[] = [];
const makeServer = (format: LogFormat, limits = LIMITS) =>
  new Server(new TextSite("Hello, World!"), format, (entry) => void logged.push(entry), limits);
const makeServers = () => ({
  ...{ usual: makeServer("off"), small: makeServer("off", SMALL) },
  ...{ access: makeServer("access"), request: makeServer("request") },
});
/** Used by all inputs, so that what a connection leaves behind shows; made anew after a finding. */
let servers = makeServers();

/** How an input is played. */
interface Plan {
  /** The pieces end at these indexes. */
  readonly cuts: readonly number[];
  readonly takesAll: boolean;
  /** FIN; silence until the deadlines pass; a reset that is told at once; a reset that a write finds. */
  readonly ending: "fin" | "silence" | "reset" | "write-fails";
}

function planOf(length: number, random: Random, ending: Plan["ending"] = "fin"): Plan {
  const cuts = new Set([...random.several(length && 7, () => 1 + random.below(length)), length]);
  return { cuts: [...cuts].filter(Boolean).toSorted((a, b) => a - b), takesAll: random.below(3) > 0, ending };
}

/** Takes all or a part of what is written, and holds the connection to how a socket may be used. */
class Peer implements Transport {
  readonly remoteAddress = "192.0.2.1";
  written = "";
  isFull = false;
  /** It takes nothing any more: then the server may ask once more before it gives up. */
  isSilent = false;
  isShutDown = false;
  isEnded = false;
  isTerminated = false;
  private fault = "";
  constructor(
    private readonly plan: Plan,
    private readonly random: Random,
  ) {}

  write(bytes: Uint8Array, from: number, length: number): number {
    if (this.isFull && this.isSilent) return 0;
    if (this.isShutDown || this.isTerminated || this.isFull) this.fail("a write after FIN or before the drain");
    if (this.plan.ending === "write-fails" && this.random.once(3)) return -1;
    const taken = this.plan.takesAll || this.random.once(3) ? length : this.random.below(length + 1);
    this.isFull = taken < length;
    this.written += Buffer.from(bytes.buffer, bytes.byteOffset + from, taken).toString("latin1");
    return taken;
  }
  shutdown(): void {
    if (this.isShutDown || this.isFull) this.fail("a second FIN, or one before the last byte");
    this.isShutDown = true;
  }
  end(): void {
    if (!this.isShutDown) this.fail("an end before the FIN");
    this.isEnded = true;
  }
  terminate(): void {
    if (this.plan.ending === "fin") this.fail("a reset where a close is due");
    this.isTerminated = true;
  }
  pause(): void {}
  resume(): void {}

  /** A throw would end the conversation as a fault of the server's does: it is kept until the input has been played. */
  private fail(fault: string): void {
    this.fault ||= fault;
  }
  check(): void {
    if (this.fault !== "") throw new Error(this.fault);
  }
}

/** What is handed to onData lies between BELs: a byte of them that shows anywhere was read beyond what was received. */
function handed(bytes: Buffer): Buffer {
  const between = Buffer.alloc(bytes.length + 64, 0x07);
  bytes.copy(between, 32);
  return between.subarray(32, 32 + bytes.length);
}

/** Answers that may wait for a peer before no more are formatted, and the longest one. */
const UNSENT_BYTES_MAX = 65_536 + 1024;

/** Plays an input and its ending. @returns what came back @throws Error at anything that must not be */
async function play(server: Server, message: Buffer, plan: Plan, random: Random): Promise<string> {
  const peer = new Peer(plan, random);
  const connection = converse(peer, server);
  const drain = async (until: () => boolean) => {
    for (let i = 0; peer.isFull && !peer.isTerminated && !until(); i++) {
      if (i === 10_000) throw new Error("a slow peer is written to without end");
      if (random.once(4)) await visit(server);
      peer.isFull = false;
      connection.onDrain();
      await nextTurn();
      peer.check();
    }
  };
  let from = 0;
  for (const cut of plan.cuts) {
    // Bytes come now and then although reading is paused: they had been read already.
    await drain(() => random.once(4));
    if (peer.isTerminated) break;
    if (random.once(8)) await visit(server);
    connection.onData(handed(message.subarray(from, cut)));
    await nextTurn();
    peer.check();
    from = cut;
    const most = 4 * (server.limits.headBytesMax + UNSENT_BYTES_MAX + message.length);
    if (server.waitingBytes > most) throw new Error(`${server.waitingBytes} bytes wait`);
  }
  if (plan.ending === "silence") await fallSilent(connection, peer);
  else if (plan.ending !== "reset") {
    if (!peer.isFull) checkClose(peer);
    if (!peer.isTerminated) connection.onEnd();
    await nextTurn();
    await drain(() => false);
    peer.check();
    if (!peer.isEnded && !peer.isTerminated) throw new Error("FIN does not end the connection");
  }
  connection.onClose();
  await nextTurn();
  if (server.waitingBytes !== 0 || server.connections.size !== 0) throw new Error(`${server.waitingBytes} bytes stay`);
  return peer.written;
}

const ORDINARY = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

/** Another peer in the middle of it: what connections share must not mix them up. */
async function visit(server: Server): Promise<void> {
  if (server.logFormat !== "off") return;
  const peer = new Peer({ cuts: [], takesAll: true, ending: "fin" }, new Random(0));
  const connection = converse(peer, server);
  connection.onData(handed(Buffer.from(ORDINARY)));
  await nextTurn();
  connection.onEnd();
  await nextTurn();
  peer.check();
  connection.onClose();
  if (!peer.written.startsWith("HTTP/1.1 200 OK\r\n")) throw new Error("an ordinary request is not answered");
}

function checkClose({ isShutDown, isTerminated, written }: Peer): void {
  if (isTerminated || isShutDown === written.includes("\r\nConnection: close\r\n")) return;
  throw new Error(isShutDown ? "closes and has not said so" : "has said that it closes, and does not");
}

/** Deadlines pass until the server gives up. */
async function fallSilent(connection: Connection, peer: Peer): Promise<void> {
  peer.isSilent = true;
  for (let i = 0; !peer.isTerminated && !peer.isEnded; i++) {
    if (i === 4) throw new Error("a silent peer is waited for without end");
    connection.server.now = Math.max(connection.server.now, connection.deadline + 1);
    connection.onDeadline();
    await nextTurn();
    peer.check();
  }
}

/** How the last input was played, for the report. */
let plan: Plan = { cuts: [], takesAll: true, ending: "fin" };
/** How many responses had which status. */
const tally = new Map<number, number>();

/** Plays an input in several ways. @throws Error that says what is wrong */
async function examine({ message, expected }: Input, seed: number): Promise<void> {
  const random = new Random(~seed);
  const server = expected === undefined && random.once(2) ? servers.small : servers.usual;
  const playAs = async (next: Plan, on = server) => withoutInterims(await play(on, message, (plan = next), random));
  const { length } = message;
  const whole = await playAs({ cuts: length > 0 ? [length] : [], takesAll: true, ending: "fin" });
  const answers = parseAnswers(whole);
  for (const { status } of answers) tally.set(status, (tally.get(status) ?? 0) + 1);
  const found = answers.map(({ status, contentBytes }) => `${status}${contentBytes > 0 ? "" : "-"}`).join();
  if (found !== (expected ?? found)) throw new Error(`${found} instead of ${expected}`);
  const plans = [planOf(length, random)];
  if (length < 1024 && random.once(16))
    plans.push({ ...planOf(0, random), cuts: Array.from(message, (_, i) => i + 1) });
  for (const next of plans) {
    const stream = await playAs(next);
    if (withoutLastOption(stream) !== withoutLastOption(whole))
      throw new Error(`${show(stream)} instead of ${show(whole)}`);
  }
  if (random.once(4)) {
    const stream = await playAs(planOf(length, random, random.pick(["silence", "reset", "write-fails"])));
    // Less has come; what was taken may end anywhere; and a timeout is told where the end would be told.
    if (plan.takesAll && !whole.startsWith(stream.replace(/HTTP\/1\.1 408 [^]*$/, ""))) throw new Error(show(stream));
  }
  if (server === servers.usual && random.once(8))
    await checkLogs(message, answers, (on) => playAs({ ...planOf(length, random), takesAll: true }, on));
}

/** The log has each answer as it was sent, and shows no byte that was not received. */
async function checkLogs(
  message: Buffer,
  answers: readonly Answer[],
  playOn: (server: Server) => Promise<unknown>,
): Promise<void> {
  logged = [];
  await playOn(servers.request);
  if (logged.join("").includes("\\x07") && !message.includes("\x07") && !message.includes("x07"))
    throw new Error(`logged what was not received: ${show(logged.join(""))}`);
  logged = [];
  await playOn(servers.access);
  const fault = () => new Error(`logged ${show(logged.join(""))} for ${JSON.stringify(answers)}`);
  if (logged.length !== answers.length) throw fault();
  for (const [i, { status, contentBytes }] of answers.entries()) {
    const line = /^192\.0\.2\.1 - - \[[^\]"]+\] "([ !#-~]*)" (\d+) (\d+) "[ !#-~]*" "[ !#-~]*"\n$/.exec(
      logged[i] ?? "",
    );
    const requestLine = line?.[1] ?? "";
    if (!/\\x|^-$/.test(requestLine) && !message.includes(requestLine)) throw fault();
    const hasContent = status !== 204 && !requestLine.startsWith("HEAD ");
    if (Number(line?.[2]) !== status || Number(line?.[3]) !== contentBytes) throw fault();
    if (hasContent && contentBytes === 0) throw fault();
  }
}

/** What is wrong with an input, or "". */
async function faultOf(input: Input, seed: number): Promise<string> {
  try {
    await examine(input, seed);
    return "";
  } catch (error) {
    servers = makeServers();
    return error instanceof Error ? (error.stack ?? error.message).split("\n", 5).join("\n") : String(error);
  }
}

/** Leaves out what is not needed for a fault, as far as some thousands of trials go. */
async function shrink(message: Buffer, seed: number): Promise<Buffer> {
  const isWrong = async (part: Buffer) => {
    for (let i = 0; i < 8; i++) if ((await faultOf({ message: part }, seed + i)) !== "") return true;
    return false;
  };
  let least = message;
  let trials = 3000;
  for (let size = message.length >> 1; size > 0; size >>= 1)
    for (let at = 0; at < least.length && trials > 0; trials--) {
      const part = Buffer.concat([least.subarray(0, at), least.subarray(at + size)]);
      if (await isWrong(part)) least = part;
      else at += size;
    }
  return least;
}

// ── (b) the programs, over TCP ──

const FLAGS =
  `--log off --head-timeout-ms 3000 --content-timeout-ms 3000 --write-timeout-ms 3000 --idle-timeout-ms 500`.split(
    /\s+/,
  );
const MANNERS = ["finish", "finish", "finish", "silent", "slow", "deaf", "reset"] as const;

/** Sends an input in some manner; returns what came until the server closed. */
async function talk(port: number, message: Buffer, manner: (typeof MANNERS)[number], cuts: readonly number[]) {
  let received = "";
  const { promise: closed, resolve, reject } = Promise.withResolvers<void>();
  const data = (_: unknown, bytes: Buffer) => void (received += bytes.toString("latin1"));
  const socket = await Bun.connect({
    ...{ hostname: "127.0.0.1", port, allowHalfOpen: true },
    socket: { data, end: (socket) => void socket.end(), close: () => resolve() },
  });
  const timer = setTimeout(() => reject(new Error("the connection does not end")), HANG_MS);
  if (manner === "deaf") socket.pause();
  let from = 0;
  for (const cut of cuts)
    while (from < cut) {
      const written = socket.write(message, from, cut - from);
      if (written === 0) socket.resume();
      from = written < 0 ? message.length : from + written;
      await (manner === "slow" ? Bun.sleep(5) : new Promise((resolve) => setImmediate(resolve)));
    }
  if (manner === "reset") socket.terminate();
  else if (manner !== "silent") socket.shutdown();
  socket.resume();
  await closed.finally(() => clearTimeout(timer));
  return received;
}

/** Plays the input of a seed over TCP: the answers are those that a Connection in this process gives. */
async function talkOver(port: number, seed: number): Promise<void> {
  const { message } = makeInput(seed);
  const random = new Random(~seed);
  const manner = random.pick(MANNERS);
  const { cuts } = planOf(message.length, random);
  const stream = withoutInterims(await talk(port, message, manner, cuts));
  if (manner === "reset") return;
  plan = { cuts, takesAll: true, ending: "fin" };
  parseAnswers(stream);
  const expected = withoutInterims(await play(makeServer("off"), message, plan, random));
  const undated = (text: string) => text.replaceAll(/(?<=\r\nDate: )[^\r]+/g, "");
  if (manner !== "silent" && withoutLastOption(undated(stream)) !== withoutLastOption(undated(expected)))
    throw new Error(`${manner}: ${show(stream)} instead of ${show(expected)}`);
}

const residentKiB = (pid: number) => Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]);
const descriptors = (pid: number) => readdirSync(`/proc/${pid}/fd`).length;

/** Plays inputs against a server: after each batch it has to answer, and in the end to be as it was. */
async function fuzzProgram(variant: Variant, seed: number, runs: number): Promise<void> {
  await using server = await startServer(variant, FLAGS);
  const { port } = server;
  const { pid } = server.child;
  const isServing = async () => (await exchange(port, [ORDINARY])).startsWith("HTTP/1.1 200 OK\r\n");
  await isServing();
  const descriptorsBefore = descriptors(pid);
  let residentBefore = Infinity;
  for (let from = 0; from < runs && findings < FINDINGS_MAX; from += BATCH) {
    const seeds = Array.from({ length: Math.min(BATCH, runs - from) }, (_, i) => seed + from + i).values();
    const talkAll = async () => {
      for (const one of seeds)
        await talkOver(port, one).catch((error) => {
          servers = makeServers();
          report(`${variant}, ${error}`, one);
        });
    };
    await Promise.all(Array.from({ length: CONCURRENT }, talkAll));
    if (!(await isServing())) report(`${variant} does not answer`, seed + from);
    if (from < runs / 4) residentBefore = residentKiB(pid);
  }
  for (let i = 0; i < 50 && descriptors(pid) > descriptorsBefore; i++) await Bun.sleep(100);
  const [open, grown] = [descriptors(pid) - descriptorsBefore, residentKiB(pid) - residentBefore];
  console.log(`${variant}: ${runs} inputs over TCP, grown by ${grown} KiB, ${open} more descriptors`);
  if (open > 0 || grown > GROWTH_KIB_MAX) report(`${variant} has grown`, seed);
  if (!/^Listening on .*\n$/.test(server.stderr.text)) report(`${variant} says ${server.stderr.text}`, seed);
}

// ── findings and figures ──

let findings = 0;

/** A message as vectors write it. */
function visible(message: Buffer): string {
  const escapes: Readonly<Record<string, string>> = { "\r": "\\r", "\n": "\\n\n", "\\": "\\\\" };
  return message.toString("latin1").replace(/([A-Za-z0-9 ])\1{19,}|[^ -[\]-~]/g, (match, repeated?: string) => {
    if (repeated !== undefined) return `\\{${repeated}*${match.length}}`;
    return escapes[match] ?? `\\x${match.charCodeAt(0).toString(16).padStart(2, "0")}`;
  });
}

function report(fault: string, seed: number, { message } = makeInput(seed)): void {
  findings++;
  const played = JSON.stringify(plan);
  // Not console.log: what a thread prints with that is lost where the process ends.
  writeSync(1, `FINDING ${fault}\nseed: ${seed}, played: ${played}\ninput:\n${visible(message)}\n\n`);
}

/** Plays the inputs of many seeds, or one input of the user's as each of these seeds would have it played. */
async function fuzzConnection(seed: number, runs: number, progress: Int32Array, message?: Buffer): Promise<void> {
  let heapBefore = Infinity;
  for (let one = seed; one < seed + runs && findings < FINDINGS_MAX; one++) {
    if (one === seed + (runs >> 2)) heapBefore = heapKiB();
    progress[0] = one;
    const input = message === undefined ? makeInput(one) : { message };
    const fault = await faultOf(input, one);
    if (fault === "") continue;
    report(fault, one, input);
    const least = await shrink(input.message, one);
    if (least.length < input.message.length) console.log(`this part is enough:\n${visible(least)}\n`);
    if (message !== undefined) return;
  }
  if (heapKiB() - heapBefore > GROWTH_KIB_MAX) report("this process has grown", seed);
}

function heapKiB(): number {
  Bun.gc(true);
  return process.memoryUsage().heapUsed / 1024;
}

/** In a thread of its own: ends the process where one input takes too long, and tells which. */
function watch(progress: Int32Array): void {
  let last = -1;
  setInterval(() => {
    const [seed = -1] = progress;
    if (seed === last && seed !== -1) {
      report("a hang", seed);
      process.kill(process.pid, "SIGKILL");
    }
    last = seed;
  }, HANG_MS);
}

async function main(): Promise<void> {
  const string = { type: "string" } as const;
  const { values } = parseArgs({ options: { seed: string, runs: string, "socket-runs": string, input: string } });
  const seed = Number(values.seed ?? Date.now() % 2 ** 30);
  console.log(`--seed ${seed}`);
  const message = values.input === undefined ? undefined : parseMessage(readFileSync(values.input, "utf8"));
  const runs = Number(values.runs ?? (message ? 1000 : 1_000_000));
  const socketRuns = Number(values["socket-runs"] ?? (message ? 0 : 4000));
  const progress = new Int32Array(new SharedArrayBuffer(4)).fill(-1);
  const watcher = new Worker(import.meta.path, { workerData: progress });
  const started = performance.now();
  await fuzzConnection(seed, runs, progress, message);
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  await watcher.terminate();
  for (const variant of socketRuns > 0 && findings < FINDINGS_MAX ? VARIANTS : [])
    await fuzzProgram(variant, seed, socketRuns);
  rmSync(binaries, { recursive: true, force: true });
  const statuses = [...tally].toSorted(([a], [b]) => a - b).map(([status, count]) => `${status}: ${count}`);
  console.log(`${runs} inputs in ${seconds} s; responses ${statuses.join(", ")}; ${findings} findings`);
  process.exit(findings === 0 ? 0 : 1);
}

if (isMainThread) await main();
else watch(workerData as Int32Array); // main gives it
