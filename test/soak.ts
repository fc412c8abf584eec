// Whatever peers do, and for however long: ordinary requests are answered, nothing is lost, and what was taken is given back.
/**
 * Holds the server under many, slow, broken and hostile peers, and prints one table. Linux only: it reads /proc.
 *
 *     bun test/soak.ts                     # all six parts in about two minutes, from a random seed
 *     bun test/soak.ts --quick --seed 1    # small numbers, some 15 seconds: for CI
 *     bun test/soak.ts --seconds 1200      # ten times the numbers
 *     bun test/soak.ts --only crowd,kill   # some parts: crowd, churn, memory, descriptors, kill, stop
 *     bun test/soak.ts --variant script    # server.ts itself instead of the compiled binary
 *
 * A row says what was done, the worst that was seen, what it may be at most, and "ok" or "LOST". Exit 1 where any row
 * says LOST. Whatever is random comes from the seed; when the peers and the kernel have their turns does not.
 */
import { readdirSync, readFileSync, rmSync, truncateSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { binaries, command, LISTENING, mortal, start, temporaryFolder, VARIANTS, type Variant } from "./harness.ts";
import { Random } from "./random.ts";

// ── bounds ──

/** A client that waits longer for an answer has not been served. */
const ANSWER_MS = 5000;
/** Other load may take the machine for a moment; a server that slow peers can hold up stands still for whole seconds. */
const P99_MS = 1000;
/** What a garbage collector and an allocator may keep. A leak of ten bytes a request would be 38 MiB in 4 million. */
const GROWTH_MIB = 32;
/** The same after transfers that broke off: garbage of their responses and promises. */
const KILLED_GROWTH_MIB = 64;
/** Without requests there is nothing to do: a server that is busy then is in a loop. */
const BUSY_PERCENT = 10;
/** A request that was on its way when the server's FIN was: it cannot be answered. Only an idle client can send one. */
const CROSSING_MS = 100;
/** Descriptors and connections go back within the server's linger time, and some sweeps. */
const SETTLE_MS = 8000;
/** Of the requests at a stop none takes longer than a second: a server that is still there later has forgotten somebody. */
const EXIT_MS = 5000;

/** The server's own default. */
const GRACE_MS = 10_000;
/** More than buffers of the kernel hold, or a download would be whole although the server has long gone. */
const DOWNLOAD_BYTES = 64 * 1_048_576;

const TEXT = "Hello, World!";
const GET = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
const GET_AND_CLOSE = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
const MIB = 1_048_576;

// ── sizes ──

/** How much of everything. */
export interface Sizes {
  /** crowd: idle connections, slow peers of each of the three kinds, and how long they go on. */
  readonly idle: number;
  readonly slow: number;
  readonly attackMs: number;
  /** churn: connections, and how many at once. */
  readonly connects: number;
  readonly churners: number;
  /** memory: requests for the text, and for files. */
  readonly requests: number;
  readonly fileRequests: number;
  /** descriptors: the limit, and how many peers come on top of it. */
  readonly descriptors: number;
  readonly over: number;
  /** So long the server is left alone there, and watched for the same time afterwards. */
  readonly overMs: number;
  /** kill: clients at once, how many are killed in all, and the bytes of what others must get whole meanwhile. */
  readonly clients: number;
  readonly kills: number;
  readonly wholeBytes: number;
  /** stop: how often, the callers of each kind, and how long the longest downloads take. */
  readonly stops: number;
  readonly callers: number;
  readonly downloadSeconds: number;
  /** No part of work goes on for longer; what it has not done by then, it says. */
  readonly partMs: number;
}

const QUICK: Sizes = {
  idle: 1000,
  slow: 50,
  attackMs: 2200,
  connects: 2000,
  churners: 50,
  requests: 200_000,
  fileRequests: 5000,
  descriptors: 128,
  over: 60,
  overMs: 500,
  clients: 10,
  kills: 60,
  wholeBytes: 4 * MIB,
  stops: 1,
  callers: 4,
  downloadSeconds: 1,
  partMs: 4000,
};

/** What fits into so many seconds on two cores. The crowd is the same for any: fewer would prove less. */
function sizesFor(seconds: number): Sizes {
  const scale = seconds / 120;
  const scaled = (value: number) => Math.max(1, Math.round(value * scale));
  return {
    idle: 10_000,
    slow: 300,
    attackMs: scaled(22_000),
    connects: scaled(50_000),
    churners: 200,
    requests: scaled(5_000_000),
    fileRequests: scaled(100_000),
    descriptors: 256,
    over: 150,
    overMs: 3000,
    clients: 20,
    kills: scaled(500),
    wholeBytes: 16 * MIB,
    stops: scaled(3),
    callers: 16,
    downloadSeconds: 4,
    partMs: scaled(25_000),
  };
}

// ── the table ──

interface Row {
  readonly part: string;
  readonly done: string;
  readonly worst: string;
  readonly bound: string;
  readonly isOk: boolean;
}

const count = (value: number) => value.toLocaleString("en");
const ms = (value: number) => `${value.toFixed(value < 10 ? 1 : 0)} ms`;
const mib = (value: number) => `${value.toFixed(0)} MiB`;

/** How often each was seen: "200: 5, 503: 7". */
function tally(seen: Iterable<string>): string {
  const counts = new Map<string, number>();
  for (const one of seen) counts.set(one, (counts.get(one) ?? 0) + 1);
  return [...counts].map(([one, times]) => `${one}: ${count(times)}`).join(", ") || "none";
}

// ── what was started ──

/** All that has to end, or be removed, when we do: also when somebody presses Ctrl-C. */
const children = new Set<Bun.Subprocess>();
const folders = new Set<string>();

function endAll(): void {
  for (const child of children) child.kill("SIGKILL");
  for (const path of [...folders, binaries]) rmSync(path, { recursive: true, force: true });
}

async function makeFolder() {
  const folder = await temporaryFolder();
  folders.add(folder.path);
  return folder;
}

/** Starts a program whose output nobody reads but us. */
function spawn(argv: string[], cwd = "/") {
  const child = Bun.spawn(mortal(argv), { cwd, stdin: "ignore", stdout: "pipe", stderr: "ignore" });
  children.add(child);
  void child.exited.then(() => children.delete(child));
  return child;
}

/** Runs a program to its end; what it printed. */
async function print(argv: string[], cwd?: string): Promise<string> {
  const child = spawn(argv, cwd);
  const [text] = await Promise.all([new Response(child.stdout).text(), child.exited]);
  return text;
}

// ── the server, seen from outside ──

/** A running server, and what /proc tells of it. */
class Watched {
  private constructor(
    readonly child: Bun.Subprocess,
    readonly port: number,
    private readonly folder: string,
  ) {}

  /** @param descriptors how many it may have; 0 is what we may have */
  static async start(variant: Variant, args: string[], descriptors = 0) {
    const argv = [...(await command("server", variant)), "--port", "0", "--log", "off", ...args];
    const limited = ["bash", "-c", `ulimit -n ${descriptors} && exec "$@"`, "bash", ...argv];
    const { child, match } = await start(descriptors === 0 ? argv : limited, LISTENING);
    children.add(child);
    void child.exited.then(() => children.delete(child));
    const server = new Watched(child, Number(match[1]), `/proc/${child.pid}`);
    // What is opened once, at the first request, is no leak.
    await server.ask();
    await server.settle(0);
    return server;
  }

  get residentMiB(): number {
    return Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`${this.folder}/status`, "utf8"))?.[1]) / 1024;
  }

  get descriptors(): number {
    return readdirSync(`${this.folder}/fd`).length;
  }

  /** User and system time, in seconds; Linux counts it for us in hundredths. */
  get cpuSeconds(): number {
    const [, fields = ""] = readFileSync(`${this.folder}/stat`, "utf8").split(") ");
    const [user, system] = fields.split(" ").slice(11, 13);
    return (Number(user) + Number(system)) / 100;
  }

  /** How much of one core it takes. */
  async busyPercent(forMs: number): Promise<number> {
    const [before, startedAt] = [this.cpuSeconds, performance.now()];
    await Bun.sleep(forMs);
    return ((this.cpuSeconds - before) * 100_000) / (performance.now() - startedAt);
  }

  /** A request on a new connection. @returns its status, or how it failed */
  async ask(host?: string): Promise<string> {
    const caller = await connect(this.port, host);
    if (caller === undefined) return "not connected";
    const isAnswered = await caller.call(GET_AND_CLOSE);
    caller.terminate();
    return isAnswered ? String(caller.status) : `no answer (${caller.ending || "waiting"})`;
  }

  /** Waits until there are no more descriptors than this, if ever. @returns how many there are */
  async settle(descriptors: number): Promise<number> {
    const until = performance.now() + (descriptors === 0 ? 500 : SETTLE_MS);
    let now = this.descriptors;
    while (now > descriptors && performance.now() < until) {
      await Bun.sleep(50);
      now = this.descriptors;
    }
    return now;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.child.kill("SIGKILL");
    await this.child.exited;
  }
}

/** That everything has gone back: the row that many parts end with. */
async function rowOfDescriptors(part: string, server: Watched, before: number): Promise<Row> {
  const after = await server.settle(before);
  return {
    part,
    done: "all peers gone",
    worst: `${after} descriptors`,
    bound: `${before}, as at the start`,
    isOk: after <= before,
  };
}

// ── peers ──

async function within<T>(milliseconds: number, promise: Promise<T>): Promise<T | undefined> {
  const { promise: late, resolve } = Promise.withResolvers<undefined>();
  const timer = setTimeout(() => resolve(undefined), milliseconds);
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** A connection that counts the answers it gets whole. It trusts their Content-Length: all of ours have one. */
class Caller {
  /** Requests whose last byte was sent, and when the last of them was. */
  sent = 0;
  sentAt = 0;
  /** Has it sent the start of a request, but not its end? */
  isInside = false;
  /** Answers that came whole, the status of the last one, and whether it says that it is the last. */
  answers = 0;
  status = 0;
  saidClose = false;
  /** How the connection ended: in order, or not. */
  ending: "" | "end" | "reset" = "";
  endedAt = 0;
  readonly ended: Promise<void>;
  socket: Bun.Socket<Caller> | undefined;
  private readonly settleEnded: () => void;
  private rest: Buffer = Buffer.alloc(0);
  private left = 0;
  private unsent = "";
  private wake = () => {};

  constructor() {
    const { promise, resolve } = Promise.withResolvers<void>();
    [this.ended, this.settleEnded] = [promise, resolve];
  }

  /** Has it more of an answer than whole ones? */
  get isTorn(): boolean {
    return this.left > 0 || this.rest.length > 0;
  }

  /** Sends text that completes so many requests. */
  send(text: string, requests = 1): void {
    this.sent += requests;
    this.isInside = requests === 0;
    this.sentAt = performance.now();
    this.unsent += text;
    this.flush();
  }

  /** Sends requests and waits for all answers. @returns false where they do not come */
  async call(text: string, requests = 1): Promise<boolean> {
    this.send(text, requests);
    return (await within(ANSWER_MS, this.waitForAnswers())) ?? false;
  }

  /** The same. @returns false where no more can be sent, too */
  async callOn(text: string, requests = 1): Promise<boolean> {
    return (await this.call(text, requests)) && !this.saidClose;
  }

  /** True once everything is answered, false once nothing more can come. */
  async waitForAnswers(): Promise<boolean> {
    while (this.answers < this.sent && this.ending === "") await new Promise<void>((resolve) => (this.wake = resolve));
    return this.answers >= this.sent;
  }

  /** Closes without a word; what has not been read makes a reset of it. */
  terminate(): void {
    this.socket?.terminate();
  }

  flush(): void {
    const written = this.socket?.write(this.unsent) ?? -1;
    if (written > 0) this.unsent = this.unsent.slice(written); // ASCII: a character is a byte
  }

  onData(bytes: Buffer): void {
    const all = this.rest.length === 0 ? bytes : Buffer.concat([this.rest, bytes]);
    let at = 0;
    while (at < all.length) {
      const next = this.left > 0 ? this.readContent(all, at) : this.readHead(all, at);
      if (next === at) break;
      at = next;
    }
    this.rest = at === all.length ? Buffer.alloc(0) : Buffer.from(all.subarray(at));
    this.wake();
  }

  onEnded(how: "end" | "reset"): void {
    if (this.ending !== "") return;
    [this.ending, this.endedAt] = [how, performance.now()];
    this.settleEnded();
    this.wake();
  }

  private readHead(all: Buffer, at: number): number {
    const end = all.indexOf("\r\n\r\n", at);
    if (end < 0) return at;
    const head = all.toString("latin1", at, end);
    this.status = Number(head.slice(9, 12));
    this.saidClose = /\r\nConnection: close/.test(head);
    this.left = Number(/\r\nContent-Length: (\d+)/.exec(head)?.[1] ?? 0);
    if (this.left === 0) this.answers++;
    return end + 4;
  }

  private readContent(all: Buffer, at: number): number {
    const length = Math.min(this.left, all.length - at);
    this.left -= length;
    if (this.left === 0) this.answers++;
    return at + length;
  }
}

const HANDLERS: Bun.SocketHandler<Caller> = {
  data: (socket, bytes) => socket.data.onData(bytes),
  drain: (socket) => socket.data.flush(),
  end(socket) {
    socket.data.onEnded("end");
    socket.end();
  },
  close: (socket, error) => socket.data.onEnded(error === undefined ? "end" : "reset"),
};

/** @returns undefined where nobody listens */
async function connect(port: number, hostname = "127.0.0.1"): Promise<Caller | undefined> {
  const caller = new Caller();
  try {
    const options = { hostname, port, allowHalfOpen: true, data: caller, socket: HANDLERS };
    caller.socket = await Bun.connect<Caller>(options);
    return caller;
  } catch {
    return undefined;
  }
}

/** Tries to connect so many, a hundred at a time. Those that fail are left out. */
async function connectMany(port: number, total: number): Promise<Caller[]> {
  const callers: Caller[] = [];
  for (let left = total; left > 0; left -= 100) {
    const some = await Promise.all(Array.from({ length: Math.min(100, left) }, () => connect(port)));
    callers.push(...some.filter((caller) => caller !== undefined));
  }
  return callers;
}

/** Several workers, each until the work says that there is none left. */
const workers = (total: number, work: (worker: number) => Promise<void>) =>
  Promise.all(Array.from({ length: total }, (_, worker) => work(worker)));

/** Answers, and how long they took. */
class Latencies {
  readonly failures: string[] = [];
  private readonly taken: number[] = [];

  async measure(ask: () => Promise<string>): Promise<void> {
    const startedAt = performance.now();
    const outcome = await ask();
    if (outcome === "200") this.taken.push(performance.now() - startedAt);
    else this.failures.push(outcome);
  }

  row(part: string, what: string): Row {
    const sorted = this.taken.toSorted((a, b) => a - b);
    const at = (share: number) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? Infinity;
    const failed = this.failures.length === 0 ? "" : `, failed: ${tally(this.failures)}`;
    return {
      part,
      done: `${count(sorted.length)} ${what}`,
      worst: `p50 ${ms(at(0.5))}, p99 ${ms(at(0.99))}, max ${ms(at(1))}${failed}`,
      bound: `0 failed, p99 ${ms(P99_MS)}, max ${ms(ANSWER_MS)}`,
      isOk: this.failures.length === 0 && at(0.99) <= P99_MS && at(1) <= ANSWER_MS,
    };
  }
}

// ── (a) crowd ──

/** What we and the server need besides idle connections. */
const SPARE_DESCRIPTORS = 4000;

const descriptorLimit = () =>
  Number(/^Max open files +(\d+)/m.exec(readFileSync("/proc/self/limits", "utf8"))?.[1] ?? 1024);

/** A slow peer: it sends `begin` at once, `drip` again and again, and connects again if it is cut off. */
interface Slow {
  readonly name: string;
  readonly begin: string;
  readonly drip: string;
  /** What the server tells it in the end. */
  readonly status: number;
}

const SLOW: readonly Slow[] = [
  { name: "slow heads", begin: "GET / HTTP/1.1\r\nHost: x\r\nX: ", drip: "x", status: 408 },
  {
    name: "slow contents",
    begin: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n",
    drip: "x",
    status: 408,
  },
];

/** Goes on until told to stop. @returns what it was told each time that it was cut off */
async function dripSlowly({ begin, drip }: Slow, everyMs: number, port: number, signal: AbortSignal) {
  const told: string[] = [];
  while (!signal.aborted) {
    const caller = await connect(port);
    if (caller === undefined) {
      told.push("not connected");
      break;
    }
    caller.send(begin, 0);
    while (caller.ending === "" && !signal.aborted) {
      await within(everyMs, caller.ended);
      caller.send(drip, 0);
    }
    if (caller.ending !== "") told.push(caller.answers === 0 ? caller.ending : String(caller.status));
    caller.terminate();
  }
  return told;
}

/** So many answers, of 8 KiB each, that buffers of the kernel do not hold them. */
const GREEDY_REQUESTS = 1000;
const GREEDY_TEXT = TEXT.repeat(640);

/** Asks for far more than it takes: one read a second. */
async function readSlowly(port: number, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    const caller = await connect(port);
    if (caller === undefined) return;
    caller.socket?.pause();
    caller.send(GET.repeat(GREEDY_REQUESTS), GREEDY_REQUESTS);
    while (caller.ending === "" && !signal.aborted) {
      await within(1000, caller.ended);
      caller.socket?.resume();
      await new Promise((resolve) => setImmediate(resolve));
      caller.socket?.pause();
    }
    caller.terminate();
  }
}

interface Attack {
  readonly port: number;
  readonly slow: number;
  readonly everyMs: number;
  readonly attackMs: number;
}

/** All slow peers at once. @returns what those of each kind were told */
async function attack({ port, slow, everyMs, attackMs }: Attack): Promise<string[][]> {
  const signal = AbortSignal.timeout(attackMs);
  const attackers = SLOW.map(async (kind) => {
    const told: string[] = [];
    await workers(slow, async () => void told.push(...(await dripSlowly(kind, everyMs, port, signal))));
    return told;
  });
  await workers(slow, () => readSlowly(port, signal));
  return Promise.all(attackers);
}

/** The same in a process of its own: where it is busy, what we measure would be our own delay. */
async function attackFromOutside(attack: Attack): Promise<string[][]> {
  const text = await print([process.execPath, import.meta.path, "--attack", JSON.stringify(attack)]);
  return JSON.parse(text) as string[][]; // what `attack` returned there
}

/** Asks on new connections, one after the other. */
async function probeNew(server: Watched, signal: AbortSignal): Promise<Latencies> {
  const latencies = new Latencies();
  while (!signal.aborted) {
    await latencies.measure(() => server.ask());
    await Bun.sleep(20);
  }
  return latencies;
}

/** Asks again and again on one connection, which must last. */
async function probeKept(server: Watched, signal: AbortSignal): Promise<Latencies> {
  const latencies = new Latencies();
  const caller = await connect(server.port);
  if (caller === undefined) latencies.failures.push("not connected");
  while (caller !== undefined && caller.ending === "" && !signal.aborted) {
    await latencies.measure(async () => ((await caller.call(GET)) ? String(caller.status) : `lost (${caller.ending})`));
    await Bun.sleep(20);
  }
  caller?.terminate();
  return latencies;
}

/** slowhttptest's three attacks: a second opinion, with windows of a few bytes that we cannot make. */
async function rowOfSlowhttptest(port: number, { slow, attackMs }: Sizes): Promise<Row> {
  const part = "a slowhttptest";
  const bound = "its own probes: 0 × not available";
  if (Bun.which("slowhttptest") === null) return { part, done: "missing, left out", worst: "-", bound, isOk: true };
  const attacks = ["-H -i 1 -x 24", "-B -i 1 -x 10 -t POST", "-X -w 10 -y 20 -n 1 -z 5 -k 3"];
  const seconds = Math.max(1, Math.floor(attackMs / 1000));
  const common = ["-c", `${slow}`, "-r", `${slow}`, "-l", `${seconds}`, "-p", `${ANSWER_MS / 1000}`];
  const line = (attack: string) => ["slowhttptest", ...attack.split(" "), ...common, "-u", `http://127.0.0.1:${port}/`];
  const texts = await Promise.all(attacks.map((attack) => print(line(attack))));
  // It colours every word.
  const verdicts = texts.flatMap((text) => [...Bun.stripANSI(text).matchAll(/service available: *(YES|NO)/g)]);
  const bad = verdicts.filter(([, verdict]) => verdict === "NO").length;
  return {
    part,
    done: `-H, -B, -X: ${slow} connections each, ${seconds} s`,
    worst: `${bad} of ${verdicts.length} not available`,
    bound,
    isOk: bad === 0 && verdicts.length >= attacks.length,
  };
}

/** Crowds of idle and slow peers, while others ask ordinary requests. */
export async function crowd(variant: Variant, sizes: Sizes): Promise<Row[]> {
  const { slow, attackMs } = sizes;
  const possible = Math.min(sizes.idle, descriptorLimit() - SPARE_DESCRIPTORS);
  // Long attacks meet the default times; in a short one the slow are cut off sooner, so that it happens at all.
  const cutMs = Math.min(10_000, Math.round(attackMs / 2.2));
  // Several in each span: each of them must not win another one.
  const everyMs = Math.min(1000, cutMs / 6);
  const times = ["--head-timeout-ms", `${cutMs}`, "--content-timeout-ms", `${cutMs}`];
  const patience = ["--idle-timeout-ms", `${2 * attackMs + 60_000}`];
  await using server = await Watched.start(variant, [...times, ...patience, "--text", GREEDY_TEXT]);
  const before = server.descriptors;

  const idle = await connectMany(server.port, possible);
  const firsts = await Promise.all(idle.map((caller) => caller.call(GET)));
  const crowded = server.residentMiB;
  const signal = AbortSignal.timeout(attackMs);
  const [told, fresh, kept, tool] = await Promise.all([
    attackFromOutside({ port: server.port, slow, everyMs, attackMs }),
    probeNew(server, signal),
    probeKept(server, signal),
    rowOfSlowhttptest(server.port, sizes),
  ]);
  const stillOpen = idle.filter(({ ending }) => ending === "").length;
  const seconds = await Promise.all(idle.map((caller) => caller.call(GET)));
  const grown = server.residentMiB;
  for (const caller of idle) caller.terminate();

  const served = (answers: boolean[]) => answers.filter(Boolean).length;
  const less = possible < sizes.idle ? ` (of ${count(sizes.idle)}: ulimit -n is ${count(descriptorLimit())})` : "";
  return [
    {
      part: "a idle connections",
      done: `${count(idle.length)}${less}, used before and after, ${(attackMs / 1000).toFixed(1)} s apart`,
      worst: `${count(served(firsts))} served, ${count(stillOpen)} kept, ${count(served(seconds))} served again`,
      bound: "all",
      isOk: idle.length === possible && served(firsts) === possible && served(seconds) === possible,
    },
    fresh.row("a new connections", "asked meanwhile"),
    kept.row("a one kept connection", "asked meanwhile"),
    ...SLOW.map(({ name, status }, kind) => ({
      part: `a ${name}`,
      done: `${slow} at once, a byte every ${ms(everyMs)}, may do so for ${ms(cutMs)}`,
      worst: tally(told[kind] ?? []),
      bound: `nothing but ${status}`,
      isOk: (told[kind] ?? []).length >= slow && (told[kind] ?? []).every((one) => one === String(status)),
    })),
    {
      part: "a slow readers",
      done: `${slow} at once, ${count(GREEDY_REQUESTS)} requests each, one read a second`,
      worst: `${mib(grown)} resident, ${mib(crowded)} before`,
      bound: `${mib(crowded + 256)}: --waiting-bytes-max`,
      isOk: grown <= crowded + 256,
    },
    tool,
    await rowOfDescriptors("a afterwards", server, before),
  ];
}

// ── (b) churn ──

/** How a client leaves: it asks the server to close, sends its FIN, or is gone at once. */
const FAREWELLS = ["server closes", "FIN", "reset"] as const;

async function comeAndGo(port: number, host: string, farewell: (typeof FAREWELLS)[number]): Promise<string> {
  const caller = await connect(port, host);
  if (caller === undefined) return "not connected";
  const isAnswered = await caller.call(farewell === "server closes" ? GET_AND_CLOSE : GET);
  if (isAnswered && farewell === "FIN") caller.socket?.shutdown();
  if (isAnswered && farewell !== "reset") await within(ANSWER_MS, caller.ended);
  const hasEnded = farewell === "reset" || caller.ending === "end";
  caller.terminate();
  if (!isAnswered || caller.status !== 200) return `no answer (${caller.ending || "waiting"})`;
  return hasEnded ? "answered" : `not closed (${caller.ending || "waiting"})`;
}

const timeWait = () => Number(/^TCP:.* tw (\d+)/m.exec(readFileSync("/proc/net/sockstat", "utf8"))?.[1] ?? 0);

/** Connections that come, ask once, and go. */
export async function churn(variant: Variant, { connects, churners, partMs }: Sizes, random: Random): Promise<Row[]> {
  // Each address of 127.0.0.0/8 has all the ports of clients to itself: none runs out, whatever waits in TIME_WAIT.
  await using server = await Watched.start(variant, ["--host", "0.0.0.0"]);
  const before = server.descriptors;
  const outcomes: string[] = [];
  const until = performance.now() + partMs;
  let [begun, slowest, waiting, fifth] = [0, 0, 0, 0];
  await workers(churners, async () => {
    while (begun < connects && performance.now() < until) {
      const host = `127.0.${random.below(4)}.${1 + (begun++ % 250)}`;
      const startedAt = performance.now();
      outcomes.push(await comeAndGo(server.port, host, random.pick(FAREWELLS)));
      slowest = Math.max(slowest, performance.now() - startedAt);
      if (outcomes.length % 500 === 0) waiting = Math.max(waiting, timeWait());
      if (fifth === 0 && outcomes.length >= connects / 5) fifth = server.residentMiB;
    }
  });
  const late = outcomes.length < connects ? ` (of ${count(connects)}: out of time)` : "";
  return [
    {
      part: "b churn",
      done: `${count(outcomes.length)} connects${late}, ${churners} at once, to 1,000 addresses`,
      worst: `${tally(outcomes)}; slowest ${ms(slowest)}; ${count(waiting)} in TIME_WAIT`,
      bound: "all answered",
      isOk: outcomes.every((outcome) => outcome === "answered"),
    },
    {
      part: "b memory",
      done: "of the server, meanwhile",
      worst: `${mib(fifth)} after 1/5, ${mib(server.residentMiB)} at the end`,
      bound: `${mib(fifth + GROWTH_MIB)} at the end`,
      isOk: fifth === 0 || server.residentMiB <= fifth + GROWTH_MIB,
    },
    await rowOfDescriptors("b afterwards", server, before),
  ];
}

// ── (c) memory ──

const SMALL_FILES = 300;

/** Scripts for wrk: sixteen requests at once; one file after the other. */
const PIPELINE = `init = function() local r = {} for i = 1, 16 do r[i] = wrk.format(nil, "/") end all = table.concat(r) end
request = function() return all end`;
const FILES = `local n = 0
request = function() n = (n + 7) % ${SMALL_FILES} return wrk.format(nil, "/" .. n .. ".txt") end`;

/** One burst. @returns how many requests it made, and what went wrong with them */
async function burst(port: number, seconds: number, script?: string): Promise<{ made: number; errors: string[] }> {
  const flags = script === undefined ? [] : ["-s", script];
  const text = await print(["wrk", "-t1", "-c50", `-d${seconds}`, ...flags, `http://127.0.0.1:${port}/`]);
  const made = Number(/(\d+) requests in/.exec(text)?.[1] ?? 0);
  const errors = text.match(/Socket errors.*|Non-2xx.*/g) ?? [];
  return { made, errors: made === 0 ? ["no request", ...errors] : errors };
}

/** Bursts until there are enough, the kinds in turn; resident memory after a fifth of them and at the end. */
async function rowOfMemory(
  part: string,
  server: Watched,
  scripts: (string | undefined)[],
  aim: number,
  partMs: number,
) {
  const until = performance.now() + partMs;
  const errors: string[] = [];
  const made = scripts.map(() => 0);
  const total = () => made.reduce((sum, one) => sum + one, 0);
  let [fifth, most, seconds] = [0, 0, 1];
  for (let turn = 0; total() < aim && performance.now() < until; turn++) {
    const kind = turn % scripts.length;
    const result = await burst(server.port, seconds, scripts[kind]);
    made[kind] = (made[kind] ?? 0) + result.made;
    errors.push(...result.errors);
    most = Math.max(most, server.residentMiB);
    // As many as a fifth, or a fifth of the time: so much has to be warm by then.
    if (fifth === 0 && (total() >= aim / 5 || performance.now() > until - 0.8 * partMs)) fifth = server.residentMiB;
  }
  const end = server.residentMiB;
  const late = total() < aim ? ` (of ${count(aim)}: out of time)` : "";
  const row: Row = {
    part,
    done: `${count(total())} requests${late}: ${made.map(count).join(" + ")}`,
    worst: `${mib(fifth)} after 1/5, ${mib(end)} at the end, ${mib(most)} at most; errors: ${tally(errors)}`,
    bound: `${mib(fifth + GROWTH_MIB)} at the end, no errors`,
    isOk: errors.length === 0 && end <= fifth + GROWTH_MIB,
  };
  return row;
}

/** Millions of requests, and no more memory after them than after the first of them. */
export async function memory(variant: Variant, { requests, fileRequests, partMs }: Sizes): Promise<Row[]> {
  if (Bun.which("wrk") === null)
    return [{ part: "c memory", done: "wrk is missing, left out", worst: "-", bound: "-", isOk: !process.env["CI"] }];
  await using folder = await makeFolder();
  const [pipeline, files, root] = ["pipeline.lua", "files.lua", "root"].map((name) => join(folder.path, name));
  if (pipeline === undefined || files === undefined || root === undefined) throw new Error("three names, three paths");
  await Promise.all([Bun.write(pipeline, PIPELINE), Bun.write(files, FILES)]);
  for (let i = 0; i < SMALL_FILES; i++) await Bun.write(join(root, `${i}.txt`), "x".repeat(17 * i));
  const rows: Row[] = [];
  {
    await using server = await Watched.start(variant, []);
    const before = server.descriptors;
    rows.push(
      await rowOfMemory("c memory: plain + pipelined", server, [undefined, pipeline, pipeline], requests, 0.6 * partMs),
    );
    rows.push(await rowOfDescriptors("c afterwards", server, before));
  }
  await using server = await Watched.start(variant, ["--root", root]);
  const before = server.descriptors;
  const part = `c memory: --root, ${SMALL_FILES} files`;
  rows.push(await rowOfMemory(part, server, [files], fileRequests, 0.4 * partMs));
  rows.push(await rowOfDescriptors("c afterwards", server, before));
  return rows;
}

// ── (d) descriptors ──

/** What became of a request, for those over the limit too. */
const fateOf = (caller: Caller) =>
  caller.status > 0 ? String(caller.status) : caller.ending === "" ? "waiting" : "cut off";

/** The server at its limit: peers above it, how busy it is, and whether it recovers once the peers have gone. */
async function rowsAtLimit(
  name: string,
  server: Watched,
  callers: Caller[],
  before: number,
  overMs: number,
): Promise<Row[]> {
  const until = performance.now() + ANSWER_MS;
  while (callers.map(fateOf).includes("waiting") && performance.now() < until) await Bun.sleep(50);
  const fates = callers.map(fateOf);
  // Those that are served take what buffers hold; then nothing goes on any more.
  await Bun.sleep(overMs);
  // On a busy machine that takes longer.
  const calmBy = performance.now() + ANSWER_MS;
  while ((await server.busyPercent(overMs)) > BUSY_PERCENT && performance.now() < calmBy);
  const busy = await server.busyPercent(overMs);
  const most = server.descriptors;
  for (const caller of callers) caller.terminate();
  const startedAt = performance.now();
  let again = await server.ask();
  // Whoever has gone is known to have gone with the next events: until then there may be no room.
  while (again !== "200" && performance.now() < startedAt + ANSWER_MS) again = await server.ask();
  const recovered = performance.now() - startedAt;
  return [
    {
      part: `d ${name}`,
      done: `${callers.length} peers connected, ${most} descriptors at most`,
      worst: tally(fates),
      bound: "served, 503 or cut off: none waiting",
      isOk: fates.includes("200") && !fates.includes("waiting"),
    },
    {
      part: `d ${name}: at the limit`,
      done: `${ms(overMs)}, nobody asks`,
      worst: `${busy.toFixed(0)} % of a core`,
      bound: `${BUSY_PERCENT} %`,
      isOk: busy <= BUSY_PERCENT,
    },
    {
      part: `d ${name}: peers gone`,
      done: "a new connection",
      worst: `${again} after ${ms(recovered)}`,
      bound: `200 after ${ms(ANSWER_MS)}`,
      isOk: again === "200",
    },
    await rowOfDescriptors(`d ${name}: afterwards`, server, before),
  ];
}

/** More connections than the server may have descriptors; then more files. */
export async function descriptors(variant: Variant, sizes: Sizes): Promise<Row[]> {
  const limit = sizes.descriptors;
  const rows: Row[] = [];
  {
    await using server = await Watched.start(variant, [], limit);
    const before = server.descriptors;
    const callers = await connectMany(server.port, limit + sizes.over);
    for (const caller of callers) caller.send(GET);
    rows.push(...(await rowsAtLimit(`ulimit -n ${limit}`, server, callers, before, sizes.overMs)));
  }
  await using folder = await makeFolder();
  await Bun.write(join(folder.path, "index.html"), TEXT);
  const peers = Math.round(limit * 0.6);
  for (let i = 0; i < peers; i++) await makeSparse(join(folder.path, `${i}`), 64 * MIB);
  await using server = await Watched.start(variant, ["--root", folder.path], limit);
  const before = server.descriptors;
  const callers = await connectMany(server.port, peers);
  // All of them are accepted before the first file takes a descriptor.
  await Promise.all(callers.map((caller) => caller.call(GET)));
  for (const [i, caller] of callers.entries()) {
    if (caller.status !== 200 || caller.ending !== "") continue;
    caller.status = 0;
    caller.send(`GET /${i} HTTP/1.1\r\nHost: x\r\n\r\n`);
    // Reads the head, and then as good as nothing: the file stays open.
    void pauseAfterHead(caller);
  }
  rows.push(...(await rowsAtLimit("a file for each", server, callers, before, sizes.overMs)));
  return rows;
}

async function pauseAfterHead(caller: Caller): Promise<void> {
  while (!caller.isTorn && caller.ending === "") await Bun.sleep(1);
  caller.socket?.pause();
}

async function makeSparse(path: string, bytes: number): Promise<void> {
  await Bun.write(path, "");
  truncateSync(path, bytes);
}

// ── (e) kill ──

const SPARSE_BYTES = 4096 * MIB;

/** A client that is killed in the middle of its transfer; some have stopped reading before. */
async function dieEarly(url: string, random: Random): Promise<void> {
  const flags = random.once(3) ? ["--limit-rate", "5M"] : [];
  const client = spawn(["curl", "-s", ...flags, "-o", "/dev/null", url]);
  const [life, stops] = [20 + random.below(250), random.once(4)];
  await within(life, client.exited);
  if (stops) client.kill("SIGSTOP");
  if (stops) await Bun.sleep(random.below(300));
  client.kill("SIGKILL");
  await client.exited;
}

/** The sha256 of what a command prints, and how many bytes that is. */
async function digestOf(argv: string[]): Promise<string> {
  const child = spawn(argv);
  const hash = new Bun.CryptoHasher("sha256");
  let bytes = 0;
  for await (const piece of child.stdout) {
    hash.update(piece);
    bytes += piece.length;
  }
  return `${bytes} ${await child.exited} ${hash.digest("hex")}`;
}

const digestOfBytes = (bytes: Uint8Array) =>
  `${bytes.length} 0 ${new Bun.CryptoHasher("sha256").update(bytes).digest("hex")}`;

/** Clients killed again and again in the middle of a transfer, and others that must get every byte meanwhile. */
export async function kill(variant: Variant, sizes: Sizes, random: Random): Promise<Row[]> {
  await using folder = await makeFolder();
  await makeSparse(join(folder.path, "sparse"), SPARSE_BYTES);
  const content = random.bytes(sizes.wholeBytes);
  await Bun.write(join(folder.path, "whole"), content);
  await using server = await Watched.start(variant, ["--root", folder.path]);
  const url = `http://127.0.0.1:${server.port}`;
  const whole = digestOfBytes(content);
  const part = digestOfBytes(new Uint8Array(sizes.wholeBytes));
  const before = server.descriptors;
  // What whole transfers alone leave behind is no leak of the broken ones.
  await digestOf(["curl", "-s", `${url}/whole`]);
  const [memoryBefore, until] = [server.residentMiB, performance.now() + sizes.partMs];

  let [kills, most, isOver] = [0, 0, false];
  const outcomes: string[] = [];
  const killing = workers(sizes.clients, async () => {
    while (kills < sizes.kills && performance.now() < until) {
      kills++;
      await dieEarly(`${url}/sparse`, random);
      most = Math.max(most, server.residentMiB);
    }
  }).then(() => (isOver = true));
  const right = workers(2, async (worker) => {
    while (!isOver) {
      const from = random.below(SPARSE_BYTES / MIB - sizes.wholeBytes / MIB) * MIB;
      const range = `${from}-${from + sizes.wholeBytes - 1}`;
      const argv = worker === 0 ? [`${url}/whole`] : ["-r", range, `${url}/sparse`];
      outcomes.push((await digestOf(["curl", "-sf", ...argv])) === (worker === 0 ? whole : part) ? "right" : "wrong");
    }
  });
  await Promise.all([killing, right]);
  const after = await server.settle(before);
  const late = kills < sizes.kills ? ` (of ${count(sizes.kills)}: out of time)` : "";
  const now = server.residentMiB;
  return [
    {
      part: "e kill -9",
      done: `${count(kills)} clients${late}, ${sizes.clients} at once, in the middle of 4 GiB`,
      worst: `${mib(now)} after, ${mib(most)} at most, ${mib(memoryBefore)} before`,
      bound: mib(memoryBefore + KILLED_GROWTH_MIB),
      isOk: now <= memoryBefore + KILLED_GROWTH_MIB,
    },
    {
      part: "e others meanwhile",
      done: `${outcomes.length} transfers of ${mib(sizes.wholeBytes / MIB)}, whole or a range`,
      worst: tally(outcomes),
      bound: "all right, by sha256 and length",
      isOk: outcomes.length > 0 && outcomes.every((outcome) => outcome === "right"),
    },
    {
      part: "e afterwards",
      done: "all peers gone",
      worst: `${after} descriptors; a new request: ${await server.ask()}`,
      bound: `${before}, as at the start; served`,
      isOk: after <= before,
    },
  ];
}

// ── (f) stop ──

/** Each goes on until its connection ends. */
const CALLERS = {
  "keep-alive": async (caller) => {
    while (await caller.callOn(GET));
  },
  pipelining: async (caller, random) => {
    for (let many = 1; await caller.callOn(GET.repeat(many), many); many = 1 + random.below(32));
  },
  "with content": async (caller, random) => {
    do {
      caller.send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3000\r\n\r\n", 0);
      for (let i = 0; i < 2 && caller.ending === ""; i++) {
        caller.send("x".repeat(1000), 0);
        await Bun.sleep(random.below(200));
      }
    } while (caller.ending === "" && (await caller.callOn("x".repeat(1000))));
  },
  // Most of the time there is nothing under way: it may well send at the moment at which the server closes.
  "now and then": async (caller, random) => {
    while (caller.ending === "" && (await caller.callOn(GET))) await within(random.below(400), caller.ended);
  },
} satisfies Record<string, (caller: Caller, random: Random) => Promise<void>>;

/** What became of the requests of one connection. */
function judge(caller: Caller): string {
  const { sent, answers, ending, endedAt, sentAt, saidClose, isInside, isTorn, status } = caller;
  if (isTorn || (answers > 0 && status !== 200)) return "LOST: torn or refused";
  if (isInside && !saidClose) return "LOST: cut off inside a request";
  if (answers === sent) return ending === "" ? "LOST: still open" : "all answered";
  // RFC 9112 §9.6: the last answer says that nothing behind it was looked at. Its client asks again elsewhere.
  if (saidClose) return "behind the last answer";
  // The kernel had connected it, and the server had not yet taken it over.
  if (ending === "reset" && answers === 0) return "never accepted";
  return ending === "end" && endedAt - sentAt < CROSSING_MS ? "crossed the FIN" : `LOST: unanswered (${ending})`;
}

/** One SIGTERM for a server with callers of all kinds. @returns what became of each connection */
async function stopText(variant: Variant, callersOfEach: number, random: Random) {
  await using server = await Watched.start(variant, []);
  const callers: Caller[] = [];
  let answers = 0;
  const calls = Object.values(CALLERS).map(async (call) => {
    const some = await connectMany(server.port, callersOfEach);
    callers.push(...some);
    await Promise.all(some.map(async (caller) => (await call(caller, random), await within(ANSWER_MS, caller.ended))));
  });
  let isStopped = false;
  const newcomers = (async () => {
    for (let caller; !isStopped; await Bun.sleep(1)) {
      caller = await connect(server.port);
      if (caller === undefined) return;
      callers.push(caller);
      await caller.call(GET_AND_CLOSE);
      await within(ANSWER_MS, caller.ended);
    }
  })();
  await Bun.sleep(400 + random.below(400));
  const startedAt = performance.now();
  server.child.kill("SIGTERM");
  const exitCode = await within(GRACE_MS, server.child.exited);
  const took = performance.now() - startedAt;
  isStopped = true;
  await Promise.all([...calls, newcomers]);
  for (const caller of callers) answers += caller.answers;
  const unanswered = callers.filter(({ saidClose }) => saidClose).reduce((sum, one) => sum + one.sent - one.answers, 0);
  for (const caller of callers) caller.terminate();
  return { exitCode, took, answers, unanswered, fates: callers.map(judge) };
}

/** One SIGTERM while files are downloaded, slowly enough to go on for a while after it. */
async function stopRoot(variant: Variant, sizes: Sizes, content: Buffer, random: Random) {
  await using folder = await makeFolder();
  await Bun.write(join(folder.path, "whole"), content);
  await Bun.write(join(folder.path, "half"), content.subarray(0, content.length / 2));
  await using server = await Watched.start(variant, ["--root", folder.path]);
  const whole = digestOfBytes(content);
  // Done a second or some after they began: after the signal, and well within the grace time.
  const rate = () => `${Math.round(content.length / (1 + random.below(sizes.downloadSeconds)) / 1024)}k`;
  const url = `http://127.0.0.1:${server.port}/whole`;
  const line = () => ["curl", "-sf", "--limit-rate", rate(), url];
  const downloads = Array.from({ length: sizes.callers }, async () =>
    (await digestOf(line())) === whole ? "whole" : "LOST: broken",
  );
  // A second request waits behind each of these.
  const pair = "GET /half HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2);
  const callers = await connectMany(server.port, 4);
  const calls = callers.map(async (caller) => {
    while (await caller.callOn(pair, 2));
    await within(ANSWER_MS, caller.ended);
  });
  while (server.descriptors < sizes.callers) await Bun.sleep(10);
  await Bun.sleep(300);
  server.child.kill("SIGTERM");
  const exitCode = await within(GRACE_MS, server.child.exited);
  const [fates] = await Promise.all([Promise.all(downloads), ...calls]);
  for (const caller of callers) caller.terminate();
  return { exitCode, fates: [...fates, ...callers.map(judge)] };
}

/** SIGTERM under load: what was accepted is answered, what is under way is finished, exit 0. */
export async function stop(variant: Variant, sizes: Sizes, random: Random): Promise<Row[]> {
  const texts: Awaited<ReturnType<typeof stopText>>[] = [];
  const roots: Awaited<ReturnType<typeof stopRoot>>[] = [];
  const content = random.bytes(DOWNLOAD_BYTES);
  for (let i = 0; i < sizes.stops; i++) {
    texts.push(await stopText(variant, sizes.callers, random));
    roots.push(await stopRoot(variant, sizes, content, random));
  }
  const longest = Math.max(...texts.map(({ took }) => took));
  const isClean = ({ fates, exitCode }: { fates: string[]; exitCode: number | undefined }) =>
    exitCode === 0 && !fates.some((fate) => fate.startsWith("LOST"));
  const sum = (values: number[]) => values.reduce((total, value) => total + value, 0);
  const unanswered = sum(texts.map((result) => result.unanswered));
  const exits = (results: { exitCode: number | undefined }[]) =>
    `exit ${[...new Set(results.map(({ exitCode }) => exitCode ?? "never"))].join(", ")}`;
  return [
    {
      part: "f SIGTERM",
      done: `${sizes.stops} times, ${count(sum(texts.map(({ answers }) => answers)))} requests answered, ${Object.keys(CALLERS).join(", ")}`,
      worst: `${tally(texts.flatMap(({ fates }) => fates))}; ${count(unanswered)} requests to be sent again; ${exits(texts)} after ${ms(longest)}`,
      bound: `none LOST, exit 0 within ${ms(EXIT_MS)}`,
      isOk: texts.every(isClean) && longest <= EXIT_MS,
    },
    {
      part: "f SIGTERM, --root",
      done: `${sizes.stops} times, ${sizes.callers} downloads of ${mib(DOWNLOAD_BYTES / MIB)} under way, 4 × 2 pipelined`,
      worst: `${tally(roots.flatMap(({ fates }) => fates))}; ${exits(roots)}`,
      bound: "all whole, by sha256; exit 0",
      isOk: roots.every(isClean),
    },
  ];
}

// ── all of it ──

const PARTS: Record<string, (variant: Variant, sizes: Sizes, random: Random) => Promise<Row[]>> = {
  crowd,
  churn,
  memory,
  descriptors,
  kill,
  stop,
};

/** @returns the exit code */
function report(rows: Row[], seed: number): number {
  console.table(rows.map(({ isOk, ...row }) => ({ ...row, end: isOk ? "ok" : "LOST" })));
  const lost = rows.filter(({ isOk }) => !isOk);
  for (const { part, worst, bound } of lost) console.log(`LOST (--seed ${seed}): ${part}: ${worst} (bound: ${bound})`);
  return lost.length > 0 ? 1 : 0;
}

async function main(): Promise<number> {
  const string = { type: "string" } as const;
  const options = {
    seconds: string,
    seed: string,
    variant: string,
    only: string,
    attack: string,
    quick: { type: "boolean" },
  } as const;
  const { values } = parseArgs({ options });
  if (values.attack !== undefined) {
    console.log(JSON.stringify(await attack(JSON.parse(values.attack) as Attack))); // from attackFromOutside
    return 0;
  }
  const seed = Number(values.seed ?? Math.floor(Math.random() * 1e6));
  const sizes = values.quick ? QUICK : sizesFor(Number(values.seconds ?? 120));
  const variant = VARIANTS.find((one) => one === (values.variant ?? "binary"));
  const names = values.only?.split(",") ?? Object.keys(PARTS);
  const parts = names.map((name) => [name, PARTS[name]] as const);
  if (variant === undefined || Number.isNaN(seed + sizes.partMs) || parts.some(([, part]) => part === undefined)) {
    console.error("Usage: soak [--quick | --seconds N] [--seed N] [--variant script|binary] [--only PART,...]");
    return 2;
  }
  const startedAt = performance.now();
  console.log(`seed ${seed}, ${variant}`);
  const rows: Row[] = [];
  for (const [name, part] of parts) {
    const partAt = performance.now();
    rows.push(...((await part?.(variant, sizes, new Random(seed))) ?? []));
    console.log(`${name}: ${((performance.now() - partAt) / 1000).toFixed(1)} s`);
  }
  const exitCode = report(rows, seed);
  console.log(`${((performance.now() - startedAt) / 1000).toFixed(0)} s`);
  return exitCode;
}

if (import.meta.main) {
  const quit = () => {
    endAll();
    process.exit(130);
  };
  process.once("SIGINT", quit).once("SIGTERM", quit);
  let exitCode = 1;
  try {
    exitCode = await main();
  } finally {
    endAll();
  }
  process.exit(exitCode);
}
