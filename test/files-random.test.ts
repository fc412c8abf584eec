/**
 * Connection and FileSite against a random peer: whatever it asks for in one go, in whatever pieces that comes, however
 * little it takes at once and whenever it says that there is room: every answer comes, whole, once and in order.
 */
import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test";
import { createHash } from "node:crypto";
import {
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readlinkSync,
  realpathSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { FileSite, Server, type Transport } from "../server.ts";
import { Random } from "./random.ts";
import { converse, nextTurn } from "./transport.ts";

setDefaultTimeout(60_000);

const seed = Number(process.env["SEED"] ?? Date.now() % 100_000_000);
const RUNS = 1000;

/** Small ones go out with their head, the others piece by piece; 5,000,000 bytes take more than one turn. */
const SIZES = { empty: 0, small: 1000, edge: 65_536, over: 65_537, pieces: 300_000, turns: 5_000_000 } as const;
const NAMES = Object.keys(SIZES) as (keyof typeof SIZES)[]; // Object.keys forgets the type
const contents = new Map<string, Buffer>();
let root = "";

beforeAll(() => {
  root = realpathSync(mkdtempSync(join(tmpdir(), "http-over-tcp-")));
  const past = new Date(Date.now() - 60_000);
  for (const name of NAMES) {
    contents.set(name, new Random(SIZES[name]).bytes(SIZES[name]));
    writeFileSync(join(root, name), contents.get(name) ?? "");
    utimesSync(join(root, name), past, past);
  }
  mkdirSync(join(root, "folder"));
  writeFileSync(join(root, "folder", "listed"), "");
});
afterAll(() => rmSync(root, { recursive: true }));

/** A request, and what has to come of it. */
interface Asked {
  readonly request: string;
  readonly status: number;
  readonly content: Buffer | RegExp | ((content: Buffer) => void);
  readonly fields?: readonly string[];
}

function ask(random: Random): Asked {
  const name = random.pick(NAMES);
  const content = contents.get(name) ?? Buffer.alloc(0);
  const get = (fields = "", target: string = name, method = "GET") =>
    `${method} /${target} HTTP/1.1\r\nHost: x\r\n${fields}\r\n`;
  const none = Buffer.alloc(0);
  switch (random.below(8)) {
    case 0:
      return { request: get("", name, "HEAD"), status: 200, content: none };
    case 1:
      return { request: get("", "folder/"), status: 200, content: /^<!DOCTYPE html>[^]*listed[^]*<\/html>\n$/ };
    case 2:
      return { request: get("", "folder"), status: 301, content: /^it is a folder\n$/ };
    case 3: {
      const digest = createHash("sha256").update(content).digest("base64");
      const fields = [`Repr-Digest: sha-256=:${digest}:`];
      return { request: get("Want-Repr-Digest: sha-256=1\r\n"), status: 200, content, fields };
    }
    case 4: {
      if (content.length === 0) return { request: get("Range: bytes=0-\r\n"), status: 200, content };
      const beyond = `Range: bytes=${content.length}-\r\n`;
      if (random.once(4)) return { request: get(beyond), status: 416, content: /none of these bytes/ };
      if (random.once(3)) return askParts(random, name, content);
      const from = random.below(content.length);
      const to = from + random.below(content.length - from);
      const fields = [`Content-Range: bytes ${from}-${to}/${content.length}`];
      return {
        request: get(`Range: bytes=${from}-${to}\r\n`),
        status: 206,
        content: content.subarray(from, to + 1),
        fields,
      };
    }
    case 5:
      return { request: get("If-None-Match: *\r\n"), status: 304, content: none };
    default:
      return { request: get(), status: 200, content };
  }
}

/** Several ranges, from behind to the front, that do not touch: the parts come as they were asked for. */
function askParts(random: Random, name: string, content: Buffer): Asked {
  const step = Math.floor(content.length / 5);
  const ranges = [4, 2, 0].map((i) => [i * step, i * step + random.below(step - 1)] as const);
  const value = ranges.map(([from, to]) => `${from}-${to}`).join(",");
  const fields = ranges.map(([from, to]) => `Content-Range: bytes ${from}-${to}/${content.length}`);
  const check = (found: Buffer) => {
    const text = found.toString("latin1");
    const [, boundary = ""] = /^\r\n--([^\r]+)\r\n/.exec(text) ?? [];
    const parts = text.split(`\r\n--${boundary}`).slice(1);
    const expected = ranges.map(([from, to], i) => {
      const head = `\r\nContent-Type: application/octet-stream\r\n${fields[i]}\r\n\r\n`;
      return head + content.toString("latin1", from, to + 1);
    });
    expect(parts.length).toBe(4);
    expect([...expected, "--\r\n"].every((part, i) => part === parts[i])).toBeTrue();
  };
  const request = `GET /${name} HTTP/1.1\r\nHost: x\r\nRange: bytes=${value}\r\n\r\n`;
  return { request, status: 206, content: check };
}

/** Takes some of what it is given, and says later, or too early, that there is room for more. */
class Peer implements Transport {
  readonly remoteAddress = "192.0.2.1";
  readonly taken: Buffer[] = [];
  isFull = false;
  ending = "";

  /** So often, on average, it takes all before it takes less. */
  private readonly whole: number;

  constructor(private readonly random: Random) {
    this.whole = random.pick([2, 20, 100]);
  }

  write(bytes: Uint8Array, from: number, length: number): number {
    if (this.ending !== "") throw new Error(`a write after ${this.ending}`);
    if (this.isFull) return 0;
    const taken = this.random.once(this.whole) ? this.random.below(length + 1) : length;
    this.isFull = taken < length;
    this.taken.push(Buffer.from(bytes.subarray(from, from + taken)));
    return taken;
  }
  shutdown(): void {
    this.ending ||= "shutdown";
  }
  end(): void {
    this.ending = "end";
  }
  terminate(): void {
    this.ending = "terminate";
  }
  pause(): void {}
  resume(): void {}
}

/** Takes the answers apart and holds each to what was asked. */
function check(stream: Buffer, asked: readonly Asked[]): void {
  let at = 0;
  for (const { request, status, content, fields = [] } of asked) {
    const headTo = stream.indexOf("\r\n\r\n", at) + 4;
    const head = stream.toString("latin1", at, headTo);
    expect(head, request).toStartWith(`HTTP/1.1 ${status} `);
    for (const field of fields) expect(head, request).toContain(`\r\n${field}\r\n`);
    const length = /^(?:HEAD|.*[^]*If-None-Match)/.test(request) ? 0 : Number(/Content-Length: (\d+)/.exec(head)?.[1]);
    const found = stream.subarray(headTo, headTo + length);
    if (typeof content === "function") content(found);
    else if (content instanceof RegExp) expect(found.toString(), request).toMatch(content);
    else expect(found.equals(content), request).toBeTrue();
    at = headTo + length;
  }
  expect(stream.length).toBe(at);
}

async function play(random: Random): Promise<void> {
  const asked = [ask(random), ...random.several(6, () => ask(random))];
  const message = Buffer.from(asked.map(({ request }) => request).join(""));
  const server = new Server(new FileSite(root), random.pick(["off", "access"] as const), () => {});
  const peer = new Peer(random);
  const connection = converse(peer, server);
  const halfCloses = random.once(2);
  let sent = 0;
  const deadline = performance.now() + 30_000; // not so many turns: a thread that reads may have to wait for a busy machine
  while (peer.ending === "" || peer.ending === "shutdown") {
    if (performance.now() > deadline) throw new Error("it comes to no end");
    if (sent < message.length && random.once(3)) {
      const to = Math.min(message.length, sent + 1 + random.below(random.pick([10, 200, 5000])));
      connection.onData(Buffer.from(message.subarray(sent, to)));
      sent = to;
      if (sent === message.length && halfCloses) connection.onEnd();
    }
    // There may be room before that is told, and it may be told where there always was some.
    if (random.once(2)) peer.isFull = false;
    if (!peer.isFull && random.once(2)) connection.wake("room");
    if (random.once(4)) await nextTurn();
    if (random.once(50)) server.sweep();
    if (sent === message.length && peer.taken.length > 0 && random.once(200)) connection.onEnd();
    if (peer.ending === "shutdown" && sent === message.length) connection.onEnd();
  }
  expect(peer.ending).toBe("end");
  connection.onClose();
  server.sweep();
  expect([server.waitingBytes, server.connections.size]).toEqual([0, 0]);
  check(Buffer.concat(peer.taken), asked);
}

/** What a descriptor leads to; "" if it has been closed meanwhile. */
function pathOf(fd: string): string {
  try {
    return readlinkSync(`/proc/self/fd/${fd}`);
  } catch {
    return "";
  }
}

test(`every answer comes whole, once and in order, however it is asked for and taken (SEED=${seed})`, async () => {
  // Other tests of this process may still close what is theirs: only what is open below the root counts.
  const open = () => readdirSync("/proc/self/fd").filter((fd) => pathOf(fd).startsWith(root)).length;
  const before = process.platform === "linux" ? open() : 0;
  await play(new Random(seed));
  for (let run = 1; run < RUNS; run++) {
    try {
      await play(new Random(seed + run));
    } catch (error) {
      throw new Error(`SEED=${seed + run}`, { cause: error });
    }
  }
  if (process.platform === "linux") expect(open()).toBe(before);
});
