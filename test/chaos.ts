// Whatever breaks on the way: FILE is the newest version whole and the exit code 0, or there is a failure and no FILE.
/**
 * Transfers a file through an origin that breaks at random, with our client and its peers, and prints one table.
 *
 *     bun test/chaos.ts --runs 200 --seed 1       # ours beside curl and wget
 *     bun test/chaos.ts --runs 1000 --ours        # ours alone, from a random seed
 *     bun test/chaos.ts --seed 1 --only 17        # one run, with each request and what became of its answer
 *
 * Run n of seed s has a schedule: the faults that its first requests meet, one after the other. The same schedule is
 * played to each client, as far as timing allows. After its last fault the origin is right, but in some runs (`dooms`)
 * it never is: then the right end is a failure. Exit 1 where ours was wrong; each such run is told with its seed.
 *
 * In some runs two of our clients save to one FILE at once, and meet the faults between them. FILE is right if it is
 * one whole version, and if nothing else is left after one more run, without faults.
 */
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { binaries, command, makeCertificate, mortal, temporaryFolder, VARIANTS } from "./harness.ts";
import { Random } from "./random.ts";

const CONCURRENT = 40;
/** A client that takes longer for one transfer is killed. */
const TRANSFER_MS = 120_000;
/** Sent in such pieces, or the kernel would hold a whole file that a client has long refused. */
const PIECE_BYTES = 16_384;
/** What has been sent gets so long to arrive: a reset throws away what is still under way. */
const ARRIVAL_MS = 20;
/** Each may make our client wait twice as long as the one before: with seven a transfer would take minutes. */
const FAULTS_MAX = 6;
/** Of ours, on average, over the size of the file, where the origin has strong ETags or dates. */
const FETCHED_MAX = 1.6;

// ── the origin ──

type Framing = "length" | "chunked" | "close";

interface Answer {
  readonly status: number;
  readonly fields: readonly string[];
  readonly content: Buffer;
}

/** The content as it goes over the wire. */
function encode(content: Buffer, framing: Framing): Buffer {
  if (framing !== "chunked") return content;
  const pieces: (string | Buffer)[] = [];
  for (let at = 0; at < content.length; at += 50_000) {
    const chunk = content.subarray(at, at + 50_000);
    pieces.push(`${chunk.length.toString(16)}\r\n`, chunk, "\r\n");
  }
  return Buffer.concat([...pieces, "0\r\n\r\n"].map((piece) => Buffer.from(piece)));
}

/** One request, and the connection that it came over. */
class Exchange {
  text = "";
  fate = "the client closed";
  private isGone = false;
  private wake = () => {};

  constructor(
    readonly origin: Origin,
    private readonly socket: Bun.Socket<Exchange>,
  ) {}

  field = (name: string) => new RegExp(`^${name}: *(.*?)\r$`, "im").exec(this.text)?.[1];
  /** The first byte that is asked for; 0 where all are. */
  get from(): number {
    return Number(/^bytes=(\d+)-$/.exec(this.field("range") ?? "")?.[1] ?? 0);
  }

  onData(bytes: Buffer): void {
    const isNew = !this.text.includes("\r\n\r\n");
    this.text += bytes.toString("latin1");
    if (isNew && this.text.includes("\r\n\r\n")) void this.origin.onRequest(this);
  }
  onDrain = () => this.wake();
  onClose(): void {
    this.isGone = true;
    this.wake();
  }

  async send(piece: string | Buffer, pieceBytes = PIECE_BYTES): Promise<void> {
    const bytes = Buffer.from(piece);
    for (let sent = 0; sent < bytes.length && !this.isGone;) {
      const written = this.socket.write(bytes, sent, Math.min(pieceBytes, bytes.length - sent));
      if (written < 0) return;
      sent += written;
      this.origin.sentBytes += written;
      if (sent < bytes.length) await (written === 0 ? this.event() : Bun.sleep(1));
    }
  }

  /** Room to send, or the end of the connection. */
  private event = () => new Promise<void>((resolve) => (this.wake = resolve));

  async sendHead({ status, fields, content }: Answer, framing: Framing): Promise<void> {
    if (status === 200) this.origin.toldVersion = framing === "length" ? this.origin.version : -1;
    const length = framing === "length" ? [`Content-Length: ${content.length}`] : [];
    const coding = framing === "chunked" ? ["Transfer-Encoding: chunked"] : [];
    await this.send(
      [`HTTP/1.1 ${status} Chaos`, "Connection: close", ...fields, ...length, ...coding, "\r\n"].join("\r\n"),
    );
    // A client that does not want the content may say so before most of it is sent.
    if (status !== 200) await Bun.sleep(ARRIVAL_MS);
  }

  async sendWhole(answer: Answer, framing: Framing = "length"): Promise<void> {
    await this.sendHead(answer, framing);
    await this.send(encode(answer.content, framing));
    this.finish();
  }

  /** Sends the answer to some place inside its content. */
  async sendCut(answer: Answer, framing: Framing, random: Random): Promise<void> {
    await this.sendHead(answer, framing);
    const bytes = encode(answer.content, framing);
    const place = random.pick([1, bytes.length - 1, ...Array.from({ length: 6 }, () => random.below(bytes.length))]);
    await this.send(bytes.subarray(0, place));
  }

  finish(): void {
    if (!this.isGone) this.fate = "FIN";
    this.socket.shutdown();
  }
  async reset(): Promise<void> {
    await Bun.sleep(ARRIVAL_MS);
    if (!this.isGone) this.fate = "reset";
    this.socket.terminate();
  }
  /** Sends nothing more until the client gives up. */
  async stall(): Promise<void> {
    while (!this.isGone) await this.event();
  }
}

/** Old enough for a date to be a strong validator: no number of changes makes it a fresh one. */
const OLD_MS = 86_400_000;

/** Bun.listen on a free port; outside of the range that outgoing connections take theirs from. */
let nextPort = 11_000 + (process.pid % 100) * 100;

class Origin {
  sentBytes = 0;
  version = 0;
  /** The version whose length, and digest if it has any, an answer has told. */
  toldVersion = -1;
  content: Buffer;
  /** All that the content has been: of two clients the slower one may have begun with an earlier version. */
  readonly versions: Buffer[];
  readonly port: number;
  private readonly startedAt = Date.now();
  private readonly faults: Fault[];
  private isOver = false;
  private listener: Bun.TCPSocketListener<Exchange> | undefined;

  constructor(
    readonly schedule: Schedule,
    private readonly log: (line: string) => void,
    readonly tls: Bun.TLSOptions | undefined,
  ) {
    this.content = new Random(schedule.seed).bytes(schedule.size);
    this.versions = [this.content];
    this.faults = [...schedule.faults];
    do this.port = ++nextPort;
    while (!this.listens());
    if (schedule.opensAfterMs > 0) void this.vanish(schedule.opensAfterMs);
  }

  private listens(): boolean {
    const socket: Bun.SocketHandler<Exchange> = {
      open: (socket) => void (socket.data = new Exchange(this, socket)),
      data: (socket, bytes) => socket.data.onData(bytes),
      drain: (socket) => socket.data.onDrain(),
      end: (socket) => void socket.end(),
      close: (socket) => socket.data.onClose(),
      error() {},
    };
    try {
      const options = { hostname: "127.0.0.1", port: this.port, allowHalfOpen: true, socket };
      this.listener = Bun.listen<Exchange>(this.tls === undefined ? options : { ...options, tls: this.tls });
    } catch {}
    return this.listener !== undefined;
  }

  /** Connections are refused for a while. */
  async vanish(ms: number): Promise<void> {
    this.log(`-- nobody listens for ${ms} ms`);
    this.listener?.stop();
    this.listener = undefined;
    await Bun.sleep(ms);
    while (!this.isOver && !this.listens()) await Bun.sleep(ARRIVAL_MS);
  }

  /** Another version of the content, of the same size or not. */
  change(): void {
    const random = new Random(this.schedule.seed + ++this.version);
    this.content = random.bytes(random.once(2) ? this.content.length : 100_000 + random.below(this.content.length));
    this.versions.push(this.content);
  }

  get etag(): string {
    const { tags, seed } = this.schedule;
    return tags === "none" ? "" : `${tags === "weak" ? "W/" : ""}"${seed}-${this.version}"`;
  }
  private tagField = (etag: string) => (etag === "" ? [] : [`ETag: ${etag}`]);
  /** Of this version; "" where the origin tells none. */
  get lastModified(): string {
    const { dates } = this.schedule;
    const age = dates === "old" ? OLD_MS : 0;
    return dates === "none" ? "" : new Date(this.startedAt - age + this.version * 1000).toUTCString();
  }
  private dateFields = (lastModified: string) => [
    `Date: ${new Date().toUTCString()}`,
    ...(lastModified === "" ? [] : [`Last-Modified: ${lastModified}`]),
  ];
  private digestField = () => (this.schedule.hasDigests ? [digestField(this.content)] : []);

  whole(): Answer {
    const validators = [...this.tagField(this.etag), ...this.dateFields(this.lastModified)];
    const fields = ["Accept-Ranges: bytes", ...validators, ...this.digestField()];
    return { status: 200, fields, content: this.content };
  }
  /** As it should be, but for what `wrong` says. */
  part(
    from: number,
    wrong: { size?: number; etag?: string; lastModified?: string; to?: number; range?: string } = {},
  ): Answer {
    const { size = this.content.length, etag = this.etag, lastModified = this.lastModified, to = size } = wrong;
    const range = wrong.range ?? `bytes ${from}-${to - 1}/${size}`;
    const validators = [...this.tagField(etag), ...this.dateFields(lastModified)];
    const fields = [`Content-Range: ${range}`, ...validators, ...this.digestField()];
    // Longer than there is content it is filled up with zeros.
    return { status: 206, fields, content: Buffer.concat([this.content, Buffer.alloc(100)], to).subarray(from) };
  }
  unsatisfiable(size: number | string = this.content.length, etag = this.etag): Answer {
    return empty(416, `Content-Range: bytes */${size}`, ...this.tagField(etag));
  }
  /** RFC 9110 §13.1.5, §14.2: what a right origin says. */
  right(x: Exchange): Answer {
    const condition = x.field("if-range");
    const isStrong =
      (condition === this.etag && !this.etag.startsWith("W/")) ||
      (condition === this.lastModified && this.schedule.dates === "old");
    if (x.from === 0 || (condition !== undefined && !isStrong)) return this.whole();
    return x.from < this.content.length ? this.part(x.from) : this.unsatisfiable();
  }

  /** Plays the next fault; where there is none left, the answer is right. */
  async onRequest(x: Exchange): Promise<void> {
    const { framing, doom } = this.schedule;
    const next = this.faults.shift() ?? doom;
    const kind = next === undefined || isFit(next.kind, x) ? next?.kind : "fin-short";
    const asked = `${x.text.split("\r\n")[0]} Range: ${x.field("range")} If-Range: ${x.field("if-range")}`;
    const before = this.sentBytes;
    if (kind === undefined) await x.sendWhole(this.right(x), framing);
    else await FAULTS[kind](x, new Random((next?.seed ?? 0) + this.version));
    this.log(`${asked}\n   ${kind ?? "right"}: ${this.sentBytes - before} bytes, then ${x.fate}`);
  }

  /** Breaks no more. */
  heal(): void {
    this.faults.length = 0;
  }

  [Symbol.dispose](): void {
    this.isOver = true;
    this.listener?.stop(true);
  }
}

const digestField = (content: Buffer) =>
  `Repr-Digest: sha-256=:${createHash("sha256").update(content).digest("base64")}:`;

const isNoDigest = (line: string) => !line.startsWith("Repr-Digest");

// ── the faults ──

type Play = (x: Exchange, random: Random) => Promise<void> | void;

const empty = (status: number, ...fields: string[]): Answer => ({ status, fields, content: Buffer.from("no\n") });

/** The right answer, to some place inside its content, and then what `how` says. */
const cut =
  (how: "finish" | "reset" | "stall", ...framings: Framing[]): Play =>
  async (x, random) => {
    await x.sendCut(x.origin.right(x), random.pick(framings), random);
    await x[how]();
  };
/** The whole, though perhaps a part was asked for. */
const sendWhole = (x: Exchange, fields: readonly string[], content = x.origin.content, framing?: Framing) =>
  x.sendWhole({ status: 200, fields: [...x.origin.whole().fields.filter(isNoDigest), ...fields], content }, framing);

const FAULTS = {
  refused: async (x, random) => {
    await x.reset();
    await x.origin.vanish(50 + random.below(700));
  },
  away: async (x, random) => {
    await cut("reset", "length")(x, random);
    await x.origin.vanish(1000 + random.below(1000));
  },
  closed: (x) => x.finish(),
  "reset-at-once": (x) => x.reset(),
  "reset-in-head": async (x) => {
    await x.send("HTTP/1.1 200 OK\r\nContent-Le");
    await x.reset();
  },
  "reset-after-head": async (x, random) => {
    await x.sendHead(x.origin.right(x), random.pick(["length", "chunked", "close"]));
    await x.reset();
  },
  /** Something that is just starting, or a page that asks for a login. */
  garbage: async (x, random) => {
    const noise = new Random(random.below(2 ** 31)).bytes(1 + random.below(3000));
    const page = "<!DOCTYPE html><title>Log in</title>";
    await x.send(random.pick(["220 mail ESMTP\r\n", "SSH-2.0-x\r\n", page, "HTTP/2 200\r\n\r\n", noise]));
    x.finish();
  },
  /** Chunked content that is damaged on the way: where a size should stand, or in the line end after the data. */
  "garbage-in-chunks": async (x, random) => {
    const answer = x.origin.right(x);
    await x.sendHead(answer, "chunked");
    const chunks = encode(answer.content.subarray(0, random.below(answer.content.length)), "chunked").subarray(0, -5);
    await x.send(
      Buffer.concat([chunks, Buffer.from(random.pick(["zz\r\n", "\r\n\r\n", "\0\0", "-1\r\n", "5\r\nhelloX\r\n"]))]),
    );
    x.finish();
  },
  "reset-in-content": cut("reset", "length", "chunked", "close"),
  "fin-short": cut("finish", "length"),
  "chunk-cut": cut("finish", "chunked"),
  "no-last-chunk": async (x) => {
    const answer = x.origin.right(x);
    await x.sendHead(answer, "chunked");
    await x.send(encode(answer.content, "chunked").subarray(0, -5));
    x.finish();
  },
  "stall-before-head": (x) => x.stall(),
  "stall-in-content": cut("stall", "length", "chunked", "close"),
  /** No fault: slow, and never silent. */
  drip: async (x, random) => {
    const answer = x.origin.right(x);
    await x.sendHead(answer, "length");
    const slow = random.below(500);
    await x.send(answer.content.subarray(0, slow), 1);
    await x.send(answer.content.subarray(slow));
    x.finish();
  },
  status: async (x, random) => {
    const date = new Date(Date.now() + 1000).toUTCString();
    const later = random.pick([[], ["Retry-After: 0"], ["Retry-After: 1"], [`Retry-After: ${date}`]]);
    await x.sendWhole(empty(random.pick([500, 502, 503, 504, 408, 429]), ...later));
  },
  "error-page": (x, random) => x.sendWhole({ ...x.origin.right(x), status: random.pick([500, 503]) }),
  "range-ignored": async (x, random) => {
    if (random.once(3)) return x.sendWhole(x.origin.whole());
    await x.sendCut(x.origin.whole(), random.pick(["length", "chunked"]), random);
    await x.reset();
  },
  "206-wrong-range": (x, random) => x.sendWhole(x.origin.part(random.pick([0, x.from - 1, Math.floor(x.from / 2)]))),
  "206-wrong-total": (x, random) =>
    x.sendWhole(x.origin.part(x.from, { size: x.origin.content.length + random.pick([-1, 1, 100]) })),
  "206-wrong-etag": (x) => x.sendWhole(x.origin.part(x.from, { etag: '"another"' })),
  /** Of servers that ignore If-Range. */
  "206-wrong-date": (x) => x.sendWhole(x.origin.part(x.from, { lastModified: new Date(0).toUTCString() })),
  /** No fault: to the same content, with a query that is new each time, or another way to write it. */
  redirect: (x, random) => {
    const query = `?sig=${random.below(2 ** 31)}`;
    const { port, tls } = x.origin;
    const scheme = tls === undefined ? "http" : "https";
    const location = random.pick([
      `/file${query}`,
      query,
      `file${query}`,
      `../file${query}`,
      `//127.0.0.1:${port}/file${query}`,
      `${scheme}://127.0.0.1:${port}/file${query}`,
    ]);
    return x.sendWhole(empty(random.pick([301, 302, 303, 307, 308]), `Location: ${location}`));
  },
  /** A name that leads to this machine, and one that leads nowhere until the next attempt. */
  name: (x, random) => {
    const scheme = x.origin.tls === undefined ? "http" : "https";
    const host = random.pick(["localhost", "nowhere.invalid"]);
    return x.sendWhole(empty(302, `Location: ${scheme}://${host}:${x.origin.port}/file?${random.below(2 ** 31)}`));
  },
  "206-garbled": (x, random) =>
    x.sendWhole(x.origin.part(x.from, { range: random.pick(["", "bytes", "bytes */5", "items 0-1/2"]) })),
  /** No fault: RFC 9110 §15.3.7 lets a server send less than was asked for. */
  "206-of-less": (x, random) =>
    x.sendWhole(x.origin.part(x.from, { to: x.from + 1 + random.below(x.origin.content.length - x.from) })),
  /** No fault either: caches that work in blocks begin before the byte that was asked for, and end where they like. */
  "206-overlap": (x, random) => {
    const block = random.pick([512, 4096, 65_536]);
    const from = x.from - (x.from % block);
    const to = Math.min(x.origin.content.length, from + block * (1 + random.below(20)));
    return x.sendWhole(x.origin.part(from, random.once(2) ? {} : { to: Math.max(to, x.from + 1) }));
  },
  /** The slice that a 206 would have, or another one where none was asked for. */
  "200-slice": (x, random) => {
    const from = x.from > 0 ? x.from : random.below(x.origin.content.length);
    const to = x.from > 0 || from > 0 ? x.origin.content.length : from + 1;
    return x.sendWhole({ ...x.origin.part(from, { to }), status: 200 }, random.pick(["length", "chunked"]));
  },
  /** Not done yet: what comes with it, if anything, is not the file. */
  "202": (x, random) => {
    const later = random.pick([[], ["Retry-After: 0"], ["Retry-After: 1"]]);
    const content = Buffer.from(random.pick(["", '{"state":"pending"}\n']));
    return x.sendWhole({ status: 202, fields: later, content }, random.pick(["length", "chunked", "close"]));
  },
  "206-unasked": (x, random) => {
    if (x.from > 0) return x.finish();
    const [from, missing] = [random.pick([0, 1000]), random.pick([0, 1000])];
    return x.sendWhole(x.origin.part(from, { to: x.origin.content.length - missing }));
  },
  "206-multipart": async (x) => {
    const { fields, content } = x.origin.part(x.from);
    const [range = "", ...others] = fields;
    const parts = Buffer.concat([Buffer.from(`--b\r\n${range}\r\n\r\n`), content, Buffer.from("\r\n--b--\r\n")]);
    const type = "Content-Type: multipart/byteranges; boundary=b";
    await x.sendWhole({ status: 206, fields: [type, ...others], content: parts });
  },
  "416-wrong": (x, random) => {
    const { origin, from } = x;
    const wrong = [origin.unsatisfiable(), origin.unsatisfiable(""), origin.unsatisfiable(from, '"another"')];
    // All that is held, though an earlier answer has promised more.
    const isKnown = origin.toldVersion === origin.version && !origin.schedule.isPair;
    return x.sendWhole(random.pick([...wrong, empty(416), ...(isKnown ? [origin.unsatisfiable(from)] : [])]));
  },
  /** Between two answers, or while one is sent. */
  changed: async (x, random) => {
    const answer = x.origin.right(x);
    x.origin.change();
    if (random.once(2)) return x.finish();
    await x.sendCut(answer, random.pick(["length", "chunked"]), random);
    await x.reset();
  },
  /** What is sent is of two versions: only the digest tells. */
  mixed: (x) => {
    const start = x.origin.content.subarray(0, 50_000);
    x.origin.change();
    const { content } = x.origin;
    return sendWhole(x, [digestField(content)], Buffer.concat([start, content.subarray(50_000)]), "chunked");
  },
  /** By a proxy that knows no length, and ends in order: only the digest tells. */
  truncated: (x, random) => {
    const { content } = x.origin;
    return sendWhole(x, [digestField(content)], content.subarray(0, random.below(content.length)), "close");
  },
  /** The same without a digest, but the length is known from an earlier answer of the same version. */
  "truncated-later": (x, random) => {
    const { content } = x.origin;
    return sendWhole(x, [], content.subarray(0, random.below(content.length)), "close");
  },
  /** In order again, but shorter than what the client holds of this version. */
  shrunken: (x, random) => {
    const start = x.origin.content.subarray(0, random.below(x.from));
    return sendWhole(x, [], start, random.pick(["chunked", "close"]));
  },
  /** Wrong bytes without a digest, but an earlier answer of the same version had one. */
  "206-corrupt": (x) => {
    const { status, fields, content } = x.origin.part(x.from);
    const wrong = Buffer.from(content.map((byte) => byte ^ 1));
    return x.sendWhole({ status, fields: fields.filter(isNoDigest), content: wrong });
  },
  "bad-digest": (x) => sendWhole(x, [digestField(Buffer.from("bad"))]),
  /** For ever. */
  gone: (x) => x.sendWhole(empty(404)),
  restless: (x, random) => {
    x.origin.change();
    return cut("reset", "length")(x, random);
  },
} satisfies Record<string, Play>;

type Kind = keyof typeof FAULTS;
/** Afterwards no client can get the whole. */
const DOOMS: readonly Kind[] = ["gone", "restless", "reset-at-once"];
const KINDS = (Object.keys(FAULTS) as Kind[]).filter((kind) => kind !== "gone" && kind !== "restless"); // its keys
/** These answer a request for a part; to another request they are a `fin-short`. */
const NEED_PART = /^(206-(?!unasked)|416|range-ignored|truncated-later|shrunken)/;

const BREAKS: readonly Kind[] = ["fin-short", "fin-short", "chunk-cut"];

/** A fault that only an earlier answer gives away needs that answer; of two clients the other one may have had it. */
function isFit(kind: Kind, { from, origin }: Exchange): boolean {
  const { isPair, hasDigests } = origin.schedule;
  if (isPair && /^(206-corrupt|truncated-later|206-wrong-total)$/.test(kind)) return false;
  // Of two clients one may go on with what the other has got of it, and without a digest.
  if (isPair && kind === "mixed" && !hasDigests) return false;
  if (kind === "206-corrupt" && !hasDigests) return false;
  if (kind === "206-wrong-date" && origin.schedule.dates === "none") return false;
  if (/^(truncated-later|206-wrong-total)$/.test(kind) && origin.toldVersion !== origin.version) return false;
  return !NEED_PART.test(kind) || (from > 0 && from < origin.content.length);
}

interface Fault {
  readonly kind: Kind;
  readonly seed: number;
}

interface Schedule {
  readonly run: number;
  readonly seed: number;
  readonly size: number;
  readonly opensAfterMs: number;
  readonly tags: "strong" | "weak" | "none";
  /** Last-Modified of the first version, each next one a second later: a strong validator, or a weak one, or none. */
  readonly dates: "old" | "fresh" | "none";
  readonly hasDigests: boolean;
  readonly isSecure: boolean;
  /** Of the right answers. */
  readonly framing: Framing;
  readonly faults: readonly Fault[];
  readonly doom: Fault | undefined;
  /** Of ours two run at once, and the second one begins so much later. */
  readonly isPair: boolean;
  readonly secondAfterMs: number;
}

function makeSchedule(seed: number, run: number): Schedule {
  const random = new Random(seed * 1_000_003 + run);
  const fault = (kind: Kind): Fault => ({ kind, seed: random.below(2 ** 31) });
  const doom = random.once(20) ? fault(random.pick(DOOMS)) : undefined;
  const kinds = Array.from({ length: 1 + random.below(4) }, () => random.pick(KINDS));
  // Before a fault in a part there has to be something to go on from.
  const all = kinds.flatMap((kind) => (NEED_PART.test(kind) ? [random.pick(BREAKS), kind] : [kind])).map(fault);
  return {
    run,
    seed: random.below(2 ** 31),
    size: 100_000 + random.below(random.pick([100_000, 500_000, 2_000_000])),
    opensAfterMs: random.once(10) ? random.below(1500) : 0,
    tags: random.pick(["strong", "strong", "strong", "weak", "none"]),
    dates: random.pick(["old", "old", "fresh", "none"]),
    hasDigests: random.once(3),
    framing: random.pick(["length", "length", "chunked", "close"]),
    faults: doom === undefined ? all.slice(0, FAULTS_MAX) : [fault("fin-short")],
    doom,
    isPair: random.once(6),
    secondAfterMs: random.pick([0, random.below(30), random.below(1000)]),
    isSecure: random.once(5),
  };
}

// ── the clients ──

interface Client {
  readonly name: string;
  /** The command line; `retries` are few where all are in vain. */
  readonly line: (retries: number) => string;
  /** The shell loops over the command until it exits with 0: so many times. */
  readonly loops?: true;
}

const CURL = "curl -sS --fail -L -k --connect-timeout 5 --speed-time 1 --speed-limit 1 -o FILE";
// -C - would be no help here: curl 7.88 cuts FILE to where the command found it before each retry.
const CURL_RETRY = `${CURL} --retry-all-errors --retry-connrefused --retry-delay 1 --remove-on-error --retry`;
const WGET =
  "wget -nv -c --no-check-certificate -O FILE --retry-connrefused --retry-on-http-error=408,429,500,502,503,504 " +
  "--connect-timeout=5 --read-timeout=1 --waitretry=1 --tries=";

const OURS: Client = {
  name: "client-robust",
  line: (retries) => `-L -k -o FILE --stall-timeout 0.5 --retry ${Math.min(12, retries)}`,
};
const CLIENTS: readonly Client[] = [
  OURS,
  { name: "curl --retry", line: (retries) => `${CURL_RETRY} ${retries}` },
  { name: "curl -C - loop", line: () => `${CURL} -C -`, loops: true },
  { name: "wget -c", line: (retries) => `${WGET}${retries + 1}` },
];

/** What runs now, to be ended with us. */
const children = new Set<Bun.Subprocess>();

async function spawn(argv: string[], cwd: string, timeout: number) {
  const child = Bun.spawn(mortal(argv), { cwd, stdio: ["ignore", "ignore", "pipe"], timeout, killSignal: "SIGKILL" });
  children.add(child);
  const [stderr, exitCode] = await Promise.all([new Response(child.stderr).text(), child.exited]);
  children.delete(child);
  return { stderr, exitCode };
}

/** Ours, twice at once: all that they say, and 0 if one of them has succeeded. */
async function transferTwice(schedule: Schedule, port: number, folder: string) {
  const second = Bun.sleep(schedule.secondAfterMs).then(() => transfer(OURS, schedule, port, folder));
  const both = await Promise.all([transfer(OURS, schedule, port, folder), second]);
  const codes = both.map(({ exitCode }) => exitCode);
  return {
    exitCode: Math.min(...codes),
    isClean: Math.max(...codes) === 0,
    stderr: both.map(({ stderr }) => stderr).join(""),
  };
}

async function transfer(client: Client, { run, doom, isSecure }: Schedule, port: number, folder: string) {
  const retries = doom === undefined ? 20 : 3;
  const program = client === OURS ? await command("client-robust", VARIANTS[run % 2] ?? "script") : [];
  const argv = [...program, ...client.line(retries).split(" "), `http${isSecure ? "s" : ""}://127.0.0.1:${port}/file`];
  const until = performance.now() + TRANSFER_MS;
  let result = await spawn(argv, folder, TRANSFER_MS);
  for (let left = client.loops ? retries : 0; result.exitCode !== 0 && left > 0 && performance.now() < until; left--) {
    await Bun.sleep(500);
    const { stderr, exitCode } = await spawn(argv, folder, Math.ceil(until - performance.now()));
    result = { stderr: result.stderr + stderr, exitCode };
  }
  return result;
}

// ── the runs ──

/** From the best to the worst. */
const ENDS = ["right", "no FILE", "FILE left", "silently wrong"] as const;
type End = (typeof ENDS)[number];

interface Result {
  readonly schedule: Schedule;
  readonly client: Client;
  readonly end: End;
  /** After a failure: the same command, with the origin mended, came to the right end. */
  readonly isMended: boolean;
  /** What the origin sent, over the size. */
  readonly fetched: number;
  readonly ms: number;
  readonly stderr: string;
}

/** @param contents what FILE may be; `mayKeep`: one of two has failed, and what it has kept is beside FILE */
function judge(folder: string, contents: Buffer[], exitCode: number, mayKeep = false): End {
  const names = readdirSync(folder);
  if (exitCode !== 0) return names.includes("FILE") ? "FILE left" : "no FILE";
  if (!names.includes("FILE") || (names.length > 1 && !mayKeep)) return "silently wrong";
  const found = readFileSync(join(folder, "FILE"));
  return contents.some((content) => found.equals(content)) ? "right" : "silently wrong";
}

async function play(
  client: Client,
  schedule: Schedule,
  root: string,
  tls: Bun.TLSOptions,
  log: (line: string) => void,
): Promise<Result> {
  const folder = join(root, `${schedule.run} ${client.name}`);
  mkdirSync(folder);
  using origin = new Origin(schedule, log, schedule.isSecure ? tls : undefined);
  const startedAt = performance.now();
  const isPair = schedule.isPair && client === OURS;
  const { exitCode, stderr, isClean } = isPair
    ? await transferTwice(schedule, origin.port, folder)
    : { ...(await transfer(client, schedule, origin.port, folder)), isClean: true };
  const ms = performance.now() - startedAt;
  const end = judge(folder, isPair ? origin.versions : [origin.content], exitCode, !isClean);
  log(`== ${client.name}: exit ${exitCode}, ${end}\n${stderr}`);
  const fetched = origin.sentBytes / origin.content.length;
  let isMended = false;
  if ((exitCode !== 0 || isPair) && schedule.doom === undefined) {
    origin.heal();
    const again = await transfer(client, schedule, origin.port, folder);
    isMended = judge(folder, [origin.content], again.exitCode) === "right";
    log(`== again: exit ${again.exitCode}, ${isMended ? "right" : "wrong"}\n${again.stderr}`);
  }
  rmSync(folder, { recursive: true });
  return { schedule, client, end, isMended, fetched, ms, stderr };
}

/** Several at once, each with its own origin, in the order of the list. */
async function playAll(jobs: (() => Promise<Result>)[], concurrent: number): Promise<Result[]> {
  const results: Result[] = [];
  const waiting = jobs.values();
  const work = async () => {
    for (const job of waiting) results.push(await job());
  };
  await Promise.all(Array.from({ length: concurrent }, work));
  return results;
}

// ── the report ──

const average = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length);

function describe(client: Client, results: Result[]): Record<string, string | number> {
  const ours = results.filter((result) => result.client === client);
  const possible = ours.filter(({ schedule }) => schedule.doom === undefined);
  const vain = ours.filter(({ schedule }) => schedule.doom !== undefined);
  const ends = ENDS.map((end) => [end, possible.filter((result) => result.end === end).length]);
  return {
    client: client.name,
    ...Object.fromEntries(ends),
    "then mended": possible.filter(({ end, isMended }) => end !== "right" && isMended).length,
    "fetched / size": average(possible.map(({ fetched }) => fetched)).toFixed(2),
    "average s": (average(possible.map(({ ms }) => ms)) / 1000).toFixed(1),
    "in vain: no FILE": `${vain.filter(({ end }) => end === "no FILE").length} of ${vain.length}`,
  };
}

/**
 * Not even a later run came to the right end; or there was no right end, and this is not a failure without FILE. After
 * two at once a later run has to come to the right end in any case.
 */
const isWrong = ({ schedule: { doom, isPair }, client, end, isMended }: Result) =>
  doom === undefined
    ? !(end === "right" && (isMended || !isPair || client !== OURS)) && !(end === "no FILE" && isMended)
    : end !== "no FILE";

const outline = ({ run, tags, dates, hasDigests, isSecure, framing, faults, doom, isPair }: Schedule) =>
  `run ${run}: ${isPair ? "two at once, " : ""}${isSecure ? "TLS, " : ""}ETag ${tags}, date ${dates}, ${hasDigests ? "digests, " : ""}${framing}: ${faults.map(({ kind }) => kind).join(", ")}` +
  (doom === undefined ? "" : `, then for ever ${doom.kind}`);

/** @returns the exit code */
function report(seed: number, results: Result[], clients: readonly Client[]): number {
  console.table(clients.map((client) => describe(client, results)));
  const ours = results.filter(({ client }) => client === OURS);
  for (const result of ours.filter((one) => isWrong(one) || (one.end !== "right" && one.schedule.doom === undefined))) {
    const { schedule, end, isMended, stderr } = result;
    const ending = `${isWrong(result) ? "WRONG: " : ""}${end}${isMended ? ", then mended" : ""}`;
    const error = /^Error: .*/m.exec(stderr)?.[0] ?? "";
    console.log(`${ending} (--seed ${seed} --only ${schedule.run}) ${error}\n   ${outline(schedule)}`);
  }
  const fetched = average(ours.filter(canResume).map((result) => result.fetched));
  console.log(`fetched / size of ours with strong validators: ${fetched.toFixed(2)} (at most ${FETCHED_MAX})`);
  return ours.some(isWrong) || fetched > FETCHED_MAX ? 1 : 0;
}

/** Only a strong validator, be it a tag or a date, lets a client go on from what it holds. */
const canResume = ({ schedule: { doom, tags, dates, isPair } }: Result) =>
  doom === undefined && (tags === "strong" || dates === "old") && !isPair;

async function main(): Promise<number> {
  const string = { type: "string" } as const;
  const ours = { type: "boolean", default: false } as const;
  const { values } = parseArgs({ options: { runs: string, seed: string, only: string, ours } });
  const seed = Number(values.seed ?? Math.floor(Math.random() * 1e6));
  const only = values.only === undefined ? undefined : Number(values.only);
  const runs = only === undefined ? Array.from({ length: Number(values.runs ?? 200) }, (_, run) => run) : [only];
  const hasTool = ({ name }: Client) => Bun.which(name.replace(/ .*/, "")) !== null;
  const clients = CLIENTS.filter((client) => client === OURS || (!values.ours && hasTool(client)));
  console.log(`seed ${seed}, ${runs.length} runs`);
  await using root = await temporaryFolder();
  const quit = () => {
    for (const child of children) child.kill("SIGKILL");
    for (const path of [root.path, binaries]) rmSync(path, { recursive: true, force: true });
    process.exit(130);
  };
  process.once("SIGINT", quit).once("SIGTERM", quit);
  try {
    const log = only === undefined ? () => {} : console.log;
    const { cert, key } = await makeCertificate(root.path);
    const tls = { cert: Bun.file(cert), key: Bun.file(key) };
    const schedules = runs.map((run) => makeSchedule(seed, run));
    if (only !== undefined) for (const schedule of schedules) log(outline(schedule));
    const jobs = schedules.flatMap((schedule) =>
      clients.map((client) => () => play(client, schedule, root.path, tls, log)),
    );
    return report(seed, await playAll(jobs, only === undefined ? CONCURRENT : 1), clients);
  } finally {
    for (const child of children) child.kill("SIGKILL");
    rmSync(binaries, { recursive: true, force: true });
  }
}

if (import.meta.main) process.exit(await main());
