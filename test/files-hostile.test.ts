/**
 * server.ts --root against clients that try to leave the folder, reach hidden names or exhaust it: the request vectors of
 * test/vectors/path, links that are swapped and files that change under the server's hands, peers that take nothing.
 *
 *     outcome: 404          the status; of a 200 the content is OPEN, or a listing
 *     location: /folder/    of a 301
 *
 * What must not get out has SECRET in it, and no answer may ever have. Outside of the folder everything has it.
 */
import { describe, expect, setDefaultTimeout, spyOn, test } from "bun:test";
import * as fs from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import {
  canMount,
  command,
  exchange,
  LISTENING,
  Peer,
  run,
  start,
  startPython,
  temporaryFolder,
  VARIANTS,
} from "./harness.ts";
import { FileSite, formatListing, Server } from "../server.ts";
import { parseVector, type Vector } from "./vector.ts";
import { converse, FakeTransport, nextTurn } from "./transport.ts";

setDefaultTimeout(60_000);

const SECRET = "SECRET";
const OPEN = "open to everybody\n";
const LARGE_BYTES = 16 * 2 ** 20;
/** What the kernel may hold for a peer that reads nothing: less than this of a large file is on its way. */
const ON_THE_WAY_BYTES_MAX = 12 * 2 ** 20;

const get = (target: string, ...fieldLines: string[]) =>
  `GET ${target} HTTP/1.1\r\n${["Host: x", ...fieldLines].join("\r\n")}\r\n\r\n`;
const getAndClose = (target: string) => get(target, "Connection: close");

/** The resident memory of a process, in MiB. */
const residentMiB = (pid: number) =>
  Number(/VmRSS:\s+(\d+)/.exec(fs.readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]) / 1024;

/** How many files and sockets a process has open. */
const openFiles = (pid: number) => fs.readdirSync(`/proc/${pid}/fd`).length;

/** Waits for what no event tells. @throws where it does not come true within 5 s */
async function until(what: string, isTrue: () => boolean): Promise<void> {
  const deadline = performance.now() + 30_000;
  while (!isTrue()) {
    if (performance.now() > deadline) throw new Error(`it did not come to this: ${what}`);
    await Bun.sleep(10);
  }
}

/** Starts the server on a free port, on the root; `prefix` is a command that becomes the server. */
async function startServer(
  variant: (typeof VARIANTS)[number],
  root: string,
  prefix: string[] = [],
  args: string[] = [],
) {
  const argv = [
    ...prefix,
    ...(await command("server", variant)),
    "--port",
    "0",
    "--log",
    "off",
    "--root",
    root,
    ...args,
  ];
  const server = await start(argv, LISTENING);
  const { pid } = server.child;
  return { ...server, pid, port: Number(server.match[1]), [Symbol.asyncDispose]: server[Symbol.asyncDispose] };
}

/** The server has to go on, whatever was done to it. */
const expectToServe = async (port: number) =>
  expect(await exchange(port, [getAndClose("/file.txt")])).toEndWith(`\r\n\r\n${OPEN}`);

// ── the folder, and what is around it ──

/**
 * DIR is `dir`. Beside it are a folder with secrets and one whose name starts as DIR's does. Links in DIR lead to all of
 * them in many ways; what is hidden or cannot be read is full of secrets too.
 */
async function plant(base: string): Promise<string> {
  const dir = join(base, "dir");
  const at = (...path: string[]) => join(dir, ...path);
  const folders = [
    "folder",
    ".hidden",
    ".well-known",
    "links",
    "index-outside",
    "index-fifo",
    "index-loop",
    "index-inside",
    "closed",
  ];
  const odd = ["example.com", "line\r\nSet-Cookie: a=b", "javascript:alert(1)", "@example.com"];
  for (const folder of [...folders, ...odd, "index-folder/index.html", "unreadable", "index-unreadable"])
    fs.mkdirSync(at(folder), { recursive: true });
  for (const file of ["file.txt", "folder/file.txt", ".well-known/file.txt"]) fs.writeFileSync(at(file), OPEN);
  for (const beside of ["outside", "dir-beside"]) fs.mkdirSync(join(base, beside));
  const secrets = ["dir/.secret", "dir/folder/.secret", "dir/.hidden/secret.txt", "dir/.hidden/index.html"];
  secrets.push("dir/.well-known/.secret", "dir/.well-known-secret");
  secrets.push("outside/secret.txt", "outside/file.txt", "outside/index.html", `outside/${SECRET}-name`);
  secrets.push("outside/unreadable.txt", "dir-beside/secret.txt", "dir/unreadable.txt", "dir/closed/secret.txt");
  secrets.push("dir/unreadable/unreadable.txt", "dir/index-unreadable/index.html");
  for (const secret of secrets) fs.writeFileSync(join(base, secret), `${SECRET}\n`);
  // A name that is not UTF-8.
  fs.writeFileSync(Buffer.concat([Buffer.from(`${dir}/`), Buffer.of(0xff), Buffer.from(".txt")]), `${SECRET}\n`);
  for (const [name, target] of Object.entries(linksOf(base, dir))) fs.symlinkSync(target, at(name));
  await plantSpecialFiles(dir);
  for (const name of ["unreadable.txt", "unreadable/unreadable.txt", "index-unreadable/index.html", "closed"])
    fs.chmodSync(at(name), 0);
  fs.chmodSync(join(base, "outside", "unreadable.txt"), 0);
  return dir;
}

function linksOf(base: string, dir: string): Record<string, string> {
  const links: Record<string, string> = {
    "link-absolute": join(base, "outside/secret.txt"),
    "link-relative": "../outside/secret.txt",
    "link-chain": "link-absolute",
    "link-chain-1": "link-absolute",
    "link-loop": "link-loop",
    "link-loop-a": "link-loop-b",
    "link-loop-b": "link-loop-a",
    "link-dangling": "../outside/nothing",
    "link-folder": "../outside",
    "link-folder-absolute": join(base, "outside"),
    "link-parent": "..",
    "link-beside": "../dir-beside",
    "link-root": "/",
    "link-proc-root": "/proc/self/root",
    "link-proc-outside": `/proc/self/root${base}/outside/secret.txt`,
    "link-proc-inside": `/proc/self/root${dir}/file.txt`,
    "link-proc-environ": "/proc/self/environ",
    "link-proc-cwd": "/proc/self/cwd",
    "link-proc-fd": "/proc/self/fd/0",
    "link-null": "/dev/null",
    "link-zero": "/dev/zero",
    "link-inside": "folder/file.txt",
    "link-inside-absolute": join(dir, "file.txt"),
    "link-inside-folder": "folder",
    "link-self": ".",
    "link-out-and-in": "../dir/file.txt",
    "link-hidden-file": ".secret",
    "link-hidden-folder": ".hidden",
    ".link-file": "file.txt",
    "index-outside/index.html": "../../outside/index.html",
    "index-loop/index.html": "index.html",
    "index-inside/index.html": "../file.txt",
    [`links/${SECRET}-file`]: "../../outside/secret.txt",
    [`links/${SECRET}-folder`]: "../../outside",
    [`links/${SECRET}-dangling`]: "../../outside/nothing",
    [`links/${SECRET}-loop`]: `${SECRET}-loop`,
    [`links/${SECRET}-device`]: "/dev/zero",
    "fifo-link": "fifo",
  };
  for (let i = 2; i <= 10; i++) links[`link-chain-${i}`] = `link-chain-${i - 1}`;
  return links;
}

/** Only root may make a device; for others a link to one has its place. */
async function plantSpecialFiles(dir: string): Promise<void> {
  const script = `mkfifo fifo index-fifo/index.html; mknod device c 1 5 2>/dev/null || ln -s /dev/zero device`;
  await run(["bash", "-c", script], { cwd: dir });
  const socket = createServer();
  await new Promise<void>((resolve) => socket.listen(join(dir, "socket"), resolve));
  // Closing it properly would remove its file.
  fs.linkSync(join(dir, "socket"), join(dir, "socket-kept"));
  await new Promise<unknown>((resolve) => socket.close(resolve));
  fs.renameSync(join(dir, "socket-kept"), join(dir, "socket"));
}

/** A folder without permission could not be removed by others than root. */
async function plantedFolder() {
  const base = await temporaryFolder();
  const dir = await plant(base.path);
  const dispose = async () => {
    fs.chmodSync(join(dir, "closed"), 0o700);
    await base[Symbol.asyncDispose]();
  };
  return { base: base.path, dir, [Symbol.asyncDispose]: dispose };
}

/** Root reads what it has no permission for, unless that is taken from it. Nobody else needs this. */
const WITHOUT_PRIVILEGE =
  process.getuid?.() === 0 && Bun.which("setpriv") !== null
    ? ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    : [];
/** Is it honest to say that a file cannot be read? */
const HAS_PERMISSIONS = process.getuid?.() !== 0 || WITHOUT_PRIVILEGE.length > 0;

// ── what comes back ──

interface Answer {
  readonly status: number;
  readonly fields: ReadonlyMap<string, string>;
  readonly content: string;
}

/** Takes a stream of answers to GET apart. @throws Error where it is not answers to the last byte */
function parseAnswers(stream: string): Answer[] {
  const answers: Answer[] = [];
  for (let at = 0; at < stream.length;) {
    const headTo = stream.indexOf("\r\n\r\n", at);
    const [statusLine = "", ...lines] = stream.slice(at, Math.max(at, headTo)).split("\r\n");
    const status = Number(/^HTTP\/1\.1 (\d{3}) [A-Z][ A-Za-z-]+$/.exec(statusLine)?.[1]);
    const fields = lines.map((line) => /^([A-Za-z-]+): ([!-~](?:[ -~]*[!-~])?)$/.exec(line)?.slice(1) ?? []);
    const byName = new Map(fields as [string, string][]); // two parts, or none: then the size tells
    const length = Number(byName.get("Content-Length"));
    if (headTo < 0 || Number.isNaN(status) || byName.size !== lines.length || !(headTo + 4 + length <= stream.length))
      throw new Error(`not answers: ${JSON.stringify(stream.slice(at, at + 500))}`);
    at = headTo + 4 + length;
    answers.push({ status, fields: byName, content: stream.slice(headTo + 4, at) });
  }
  return answers;
}

/** Holds what came back for a vector, and for NEXT after it, against what should. */
function check(vector: Vector, stream: string): void {
  expect(stream).not.toContain(SECRET);
  const status = Number(vector.outcome);
  const [answer, next, ...more] = parseAnswers(stream);
  expect([answer?.status, more]).toEqual([status, []]);
  expect(answer?.fields.get("Location")).toBe(vector.options["location"]);
  if (status >= 400) expect(answer?.fields.get("Content-Type")).toBe("text/plain; charset=utf-8");
  if (closes(status)) {
    expect([next, answer?.fields.get("Connection")]).toEqual([undefined, "close"]);
    return;
  }
  // A request that is well-formed and finds nothing leaves the connection as it is.
  expect([next?.content, answer?.fields.get("Connection")]).toEqual([OPEN, undefined]);
  if (status === 200 && answer?.content !== OPEN) expect(answer?.content).toStartWith("<!DOCTYPE html>\n");
}

const VECTORS_FOLDER = join(import.meta.dir, "vectors", "path");
const NEXT = getAndClose("/file.txt");
/** Byte by byte is one turn of the event loop a byte: too slow for long messages. */
const BYTEWISE_BYTES_MAX = 400;
const CONCURRENT = 32;

const vectors = fs
  .readdirSync(VECTORS_FOLDER)
  .toSorted()
  .map((name) => parseVector(name.slice(0, -4), fs.readFileSync(join(VECTORS_FOLDER, name), "utf8")))
  .filter(({ name }) => HAS_PERMISSIONS || !name.startsWith("unreadable"));

/** The statuses after which the server closes: NEXT gets no answer. */
const closes = (status: number) => status === 400 || status === 414;

/** The vector and NEXT as one piece, and byte by byte if it is short. */
const piecesOf = ({ message, outcome }: Vector): Uint8Array[][] => {
  const bytes = closes(Number(outcome)) ? message : Buffer.concat([message, Buffer.from(NEXT)]);
  const bytewise = Array.from(bytes, (_, i) => bytes.subarray(i, i + 1));
  return bytes.length < BYTEWISE_BYTES_MAX ? [[bytes], bytewise] : [[bytes]];
};

/** Plays all of them, and after each asks for a file that is there. @returns what is wrong */
async function playAll(port: number): Promise<string[]> {
  const faults: string[] = [];
  const exchanges = vectors.flatMap((vector) => piecesOf(vector).map((pieces) => ({ vector, pieces }))).values();
  const play = async () => {
    for (const { vector, pieces } of exchanges)
      try {
        check(vector, await exchange(port, pieces));
        await expectToServe(port);
      } catch (error) {
        faults.push(`${vector.name}, ${pieces.length} pieces: ${error}`);
      }
  };
  await Promise.all(Array.from({ length: CONCURRENT }, play));
  return faults;
}

/**
 * Opens a FIFO for writing, which waits for a reader, and sends the reader its one message.
 */
const FIFO_WRITER = `
import os, sys
print(1, flush=True)
fifo = os.open(sys.argv[1], os.O_WRONLY)
os.write(fifo, b"undisturbed")`;

// ── swapping ──

/** Exchanges two names at once (renameat2 with RENAME_EXCHANGE), pair after pair, as fast as it can. */
const SWAPPER = `
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
names = [os.fsencode(name) for name in sys.argv[1:]]
pairs = list(zip(names[::2], names[1::2]))
def swap(a, b):
    if libc.renameat2(-100, a, -100, b, 2) != 0: sys.exit(os.strerror(ctypes.get_errno()))
for a, b in pairs: swap(a, b)
print(1, flush=True)
while True:
    for a, b in pairs: swap(a, b)`;

// ── changing a file while it is sent ──

interface Change {
  readonly title: string;
  readonly change: (path: string) => void;
  /** Whoever was being sent the old version gets all of it; else he is cut off. */
  readonly isWhole: boolean;
  /** What comes before the end may be of both versions. */
  readonly isMixed?: boolean;
}

const changes: Change[] = [
  { title: "shrinks to its half", change: (path) => fs.truncateSync(path, LARGE_BYTES / 2), isWhole: false },
  { title: "is emptied", change: (path) => fs.truncateSync(path, 0), isWhole: false },
  { title: "grows", change: (path) => fs.appendFileSync(path, "more"), isWhole: true },
  { title: "grows by its own size", change: (path) => fs.appendFileSync(path, large("b")), isWhole: true },
  {
    title: "grows, and is changed in a byte that has been sent",
    change(path) {
      poke(path, 0);
      fs.appendFileSync(path, "more");
    },
    isWhole: false,
  },
  {
    title: "is written anew in place, and is longer then",
    change: (path) => fs.writeFileSync(path, Buffer.concat([large("b"), large("b")])),
    isWhole: false,
    isMixed: true,
  },
  { title: "is changed in one byte", change: (path) => poke(path, LARGE_BYTES / 2), isWhole: false },
  { title: "is changed in a byte that has been sent", change: (path) => poke(path, 0), isWhole: false },
  { title: "is written anew in place", change: (path) => fs.writeFileSync(path, large("b")), isWhole: false },
  { title: "is deleted", change: (path) => fs.unlinkSync(path), isWhole: true },
  { title: "is moved away", change: (path) => fs.renameSync(path, `${path}-moved`), isWhole: true },
  {
    title: "is replaced by another",
    change(path) {
      fs.writeFileSync(`${path}-new`, large("b"));
      fs.renameSync(`${path}-new`, path);
    },
    isWhole: true,
  },
  {
    title: "is replaced by a link to outside",
    change(path) {
      fs.symlinkSync("../outside/secret.txt", `${path}-new`);
      fs.renameSync(`${path}-new`, path);
    },
    isWhole: true,
  },
];

const large = (letter: string) => Buffer.alloc(LARGE_BYTES, letter);

function poke(path: string, at: number): void {
  const fd = fs.openSync(path, "r+");
  fs.writeSync(fd, "b", at);
  fs.closeSync(fd);
}

/** A large file that was modified long ago, so that every change to come gives it another time. */
function plantLarge(path: string): void {
  fs.writeFileSync(path, large("a"));
  fs.utimesSync(path, 1_000_000_000, 1_000_000_000);
}

/** Asks for a target, and reads no more once the head has come. */
async function takeHead(port: number, target: string): Promise<Peer> {
  const peer = await Peer.connect(port);
  await peer.send(getAndClose(target));
  await peer.waitFor(/^HTTP\/1\.1 200 OK\r\n[^]*?\r\n\r\n/);
  peer.pause();
  return peer;
}

const contentOf = (stream: string) => stream.slice(stream.indexOf("\r\n\r\n") + 4);

describe.each(VARIANTS)("hostile to files (%s)", (variant) => {
  test("no request-target gets out of DIR, or at what is hidden in it, or at what is not a file", async () => {
    await using planted = await plantedFolder();
    const fifo = join(planted.dir, "fifo");
    await using writer = await startPython(FIFO_WRITER, [fifo]);
    await using server = await startServer(variant, planted.dir, WITHOUT_PRIVILEGE);
    expect(await playAll(server.port)).toEqual([]);
    // Had anybody opened the FIFO, this message would have been lost on him.
    expect((await run(["timeout", "5", "cat", fifo])).stdout).toBe("undisturbed");
    expect(await writer.child.exited).toBe(0);
  });

  test("links and folders that are swapped at any moment let no secret out", async () => {
    await using planted = await plantedFolder();
    const { base, dir } = planted;
    fs.mkdirSync(join(dir, "swapped"));
    for (const name of ["swapped.txt", "swapped/file.txt"]) fs.writeFileSync(join(dir, name), OPEN);
    fs.symlinkSync("../outside", join(dir, ".swapped"));
    fs.symlinkSync("../outside/secret.txt", join(dir, ".swapped.txt"));
    const names = ["swapped", ".swapped", "swapped.txt", ".swapped.txt"].map((name) => join(dir, name));
    await using server = await startServer(variant, dir);
    await using swapper = await startPython(SWAPPER, names);
    const targets = ["/swapped/file.txt", "/swapped.txt", "/swapped/", "/swapped/secret.txt", "/swapped"];
    const statuses = new Map<string, Set<number>>();
    const requests = Array.from({ length: 2000 }, (_, i) => targets[i % targets.length] ?? "").values();
    const ask = async () => {
      for (const target of requests) {
        const stream = await exchange(server.port, [getAndClose(target)]);
        expect(stream).not.toContain(SECRET);
        const [answer] = parseAnswers(stream);
        statuses.set(target, (statuses.get(target) ?? new Set()).add(answer?.status ?? 0));
      }
    };
    await Promise.all(Array.from({ length: CONCURRENT }, ask));
    expect(swapper.child.exitCode).toBeNull();
    // Both sides of the swap were seen, or nothing was tested.
    expect([...(statuses.get("/swapped/file.txt") ?? [])].toSorted()).toEqual([200, 404]);
    expect([...(statuses.get("/swapped.txt") ?? [])].toSorted()).toEqual([200, 404]);
    expect([...(statuses.get("/swapped/secret.txt") ?? [])]).toEqual([404]);
    expect(fs.readFileSync(join(base, "outside/secret.txt"), "utf8")).toBe(`${SECRET}\n`);
    await expectToServe(server.port);
  });

  test("a file that changes while slow peers take it is cut off; one that goes away or is replaced is finished", async () => {
    await using planted = await plantedFolder();
    for (const i of changes.keys()) plantLarge(join(planted.dir, `large-${i}`));
    await using server = await startServer(variant, planted.dir);
    const before = openFiles(server.pid);
    const whole = large("a").toString();
    const sendWhileItChanges = async ({ change, isMixed = false }: Change, i: number) => {
      using peer = await takeHead(server.port, `/large-${i}`);
      expect(peer.received.length).toBeLessThan(LARGE_BYTES - ON_THE_WAY_BYTES_MAX);
      change(join(planted.dir, `large-${i}`));
      await expectToServe(server.port);
      peer.resume();
      const how = await peer.closed;
      const content = contentOf(peer.received);
      // A transfer that is cut ends with FIN: what was sent arrives, and Content-Length tells that it is short.
      if (how !== "end" || !(isMixed ? /^a*b*$/ : /^a*$/).test(content)) return how;
      return content === whole ? "whole" : content.length < LARGE_BYTES ? "cut off" : "too long";
    };
    const outcomes = await Promise.all(changes.map(sendWhileItChanges));
    const pairs = changes.map(({ title }, i) => [title, outcomes[i]]);
    expect(pairs).toEqual(changes.map(({ title, isWhole }) => [title, isWhole ? "whole" : "cut off"]));
    await until("no file is left open", () => openFiles(server.pid) === before);
  });

  test("peers that ask for a large file and take none of it cost no memory, and leave no file open", async () => {
    await using planted = await plantedFolder();
    plantLarge(join(planted.dir, "large"));
    await using server = await startServer(variant, planted.dir);
    const before = openFiles(server.pid);
    await expectToServe(server.port);
    const resident = residentMiB(server.pid);
    const peers = await Promise.all(Array.from({ length: 200 }, () => takeHead(server.port, "/large")));
    await expectToServe(server.port);
    expect(residentMiB(server.pid) - resident).toBeLessThan(64);
    for (const peer of peers) peer[Symbol.dispose]();
    await until("no file is left open", () => openFiles(server.pid) === before);
  });

  test("a connection too many for the descriptors is refused; the others are served, and so are all once there is room", async () => {
    await using planted = await plantedFolder();
    const limit = ["bash", "-c", 'ulimit -n 64; exec "$@"', "bash"];
    await using server = await startServer(variant, planted.dir, limit);
    using first = await Peer.connect(server.port);
    const ask = async () => {
      const peer = await Peer.connect(server.port);
      await peer.send(get("/file.txt"));
      await peer.waitFor(/^HTTP\/1\.1 \d{3} /);
      return peer;
    };
    const tries = await Promise.allSettled(Array.from({ length: 70 }, ask));
    const peers = tries.flatMap((attempt) => (attempt.status === "fulfilled" ? [attempt.value] : []));
    try {
      const statuses = peers.map(({ received }) => received.slice(9, 12));
      expect(new Set(statuses)).toEqual(new Set(["200", "503"]));
      await first.send(get("/file.txt"));
      await first.waitFor(/everybody\n$/);
    } finally {
      for (const peer of peers) peer[Symbol.dispose]();
    }
    await until("they are free again", () => openFiles(server.pid) < 32);
    await expectToServe(server.port);
  });
});

// ── a Connection whose socket is in our hands ──

/** What a peer gets, to whom everything is sent at once. */
async function answerOf(root: string, request: string): Promise<string> {
  const socket = new FakeTransport();
  const connection = converse(socket, new Server(new FileSite(root), "off", () => {}));
  connection.onData(Buffer.from(request));
  while (socket.written === "" && !socket.calls.includes("terminate")) await nextTurn();
  connection.onClose();
  return socket.written;
}

/** The race above, won for certain: what is at the name is another exactly while it is opened, and the old one again after. */
test.each(["link to outside", "folder outside", "FIFO"])("a name that is a %s just when it is opened", async (kind) => {
  await using planted = await plantedFolder();
  const name = join(planted.dir, "swapped");
  const [target, swapped, trap] =
    kind === "folder outside"
      ? ["/swapped/file.txt", name, join(planted.dir, "link-folder")]
      : ["/swapped", name, join(planted.dir, kind === "FIFO" ? "fifo" : "link-absolute")];
  if (kind === "folder outside") fs.mkdirSync(name);
  fs.writeFileSync(kind === "folder outside" ? join(name, "file.txt") : name, OPEN);
  const move = (from: string, to: string) => {
    fs.renameSync(to, `${to}-away`);
    fs.renameSync(from, to);
    fs.renameSync(`${to}-away`, from);
  };
  const { openSync } = fs;
  let swaps = 0;
  using _ = spyOn(fs, "openSync").mockImplementation((...args) => {
    swaps++;
    move(trap, swapped);
    try {
      return openSync(...args);
    } finally {
      move(trap, swapped);
    }
  });
  const stream = await answerOf(planted.dir, get(target));
  expect(swaps).toBe(1);
  expect(stream).not.toContain(SECRET);
  expect(stream).toStartWith("HTTP/1.1 404 ");
});

test("a turn that was meant for one file sends nothing of the next before its head", async () => {
  await using folder = await temporaryFolder();
  // More than goes out in one turn, so that another is due.
  const size = 4_500_000;
  for (const name of ["a", "b"]) fs.writeFileSync(join(folder.path, name), Buffer.alloc(size, name));
  await Bun.sleep(20); // a file that has changed within a tick of the clock takes more turns
  const socket = new FakeTransport();
  const connection = converse(socket, new Server(new FileSite(folder.path), "off", () => {}));
  connection.onData(Buffer.from(get("/a") + get("/b")));
  await Promise.resolve(); // the pieces of its first turn are sent
  const end = socket.written.indexOf("\r\n\r\n") + 4 + size;
  expect(socket.written.length).toBeLessThan(end);
  // A drain comes before its next turn: a socket that was paused tells at once that there is room. It is enough for the rest.
  socket.room = end - socket.written.length;
  connection.onDrain();
  for (let turn = 0; socket.written.length < end && turn < 10; turn++) await nextTurn();
  expect(socket.written.length).toBe(end);
  socket.room = Number.POSITIVE_INFINITY;
  for (let turn = 0; socket.written.length === end && turn < 10; turn++) {
    connection.onDrain();
    await nextTurn();
  }
  expect(socket.written.slice(end, end + 17)).toBe("HTTP/1.1 200 OK\r\n");
  connection.onClose();
});

test("answers that took their time count among the bytes that wait", async () => {
  await using folder = await temporaryFolder();
  for (let i = 0; i < 500; i++) fs.writeFileSync(join(folder.path, `${"n".repeat(100)}${i}`), "");
  const server = new Server(new FileSite(folder.path), "off", () => {});
  const socket = new FakeTransport();
  const connection = converse(socket, server);
  socket.room = 100;
  connection.onData(Buffer.from(get("/")));
  while (socket.written === "") await nextTurn();
  expect(server.waitingBytes).toBeGreaterThan(100_000);
  connection.onClose();
  expect(server.waitingBytes).toBe(0);
});

test("a peer that has gone leaves no folder open that waits to be listed", async () => {
  await using folder = await temporaryFolder();
  for (let i = 0; i < 100; i++) fs.mkdirSync(join(folder.path, String(i)));
  const server = new Server(new FileSite(folder.path), "off", () => {});
  const before = openFiles(process.pid);
  for (let i = 0; i < 100; i++) {
    const connection = converse(new FakeTransport(), server);
    connection.onData(Buffer.from(get(`/${i}/`)));
    connection.onClose();
  }
  const after = openFiles(process.pid);
  await until("all are listed", () => openFiles(process.pid) <= before);
  expect(after - before).toBeLessThan(10);
});

test("a link that leads to a hidden name is followed: creating the link publishes the file", async () => {
  await using planted = await plantedFolder();
  await using server = await startServer("script", planted.dir);
  for (const target of ["/link-hidden-file", "/link-hidden-folder/secret.txt"])
    expect(await exchange(server.port, [getAndClose(target)])).toStartWith("HTTP/1.1 200 OK");
});

test("the answer does not tell which names outside of DIR are there and cannot be read", async () => {
  await using planted = await plantedFolder();
  await using server = await startServer("script", planted.dir, WITHOUT_PRIVILEGE);
  const statusOf = async (target: string) => (await exchange(server.port, [getAndClose(target)])).slice(9, 12);
  expect(await statusOf("/link-folder/nothing")).toBe("404");
  expect(await statusOf("/link-folder/unreadable.txt")).toBe("404");
});

test("a link out of DIR into a folder that may not be entered is 404, as any link out of DIR", async () => {
  await using planted = await plantedFolder();
  const { base, dir } = planted;
  fs.mkdirSync(join(base, "private"));
  fs.writeFileSync(join(base, "private", "file.txt"), SECRET);
  fs.symlinkSync("../private/file.txt", join(dir, "link-private-file"));
  fs.symlinkSync("../private/nothing", join(dir, "link-private-nothing"));
  fs.symlinkSync("../private", join(dir, "link-private"));
  fs.symlinkSync("link-private", join(dir, "link-link-private"));
  await using server = await startServer("script", dir, WITHOUT_PRIVILEGE);
  const statusOf = async (target: string) => (await exchange(server.port, [getAndClose(target)])).slice(9, 12);
  const ends = ["", "/", "/file.txt", "/nothing"];
  const targets = ["-file", "-nothing", ...ends].map((end) => `/link-private${end}`);
  targets.push(...ends.map((end) => `/link-link-private${end}`));
  fs.chmodSync(join(base, "private"), 0);
  const statuses = await Promise.all(targets.map(statusOf));
  fs.chmodSync(join(base, "private"), 0o700);
  expect(statuses).toEqual(targets.map(() => "404"));
});

test("a folder that may be entered, but not read, has its index, and no listing", async () => {
  await using planted = await plantedFolder();
  const { dir } = planted;
  for (const name of ["with", "without"]) fs.mkdirSync(join(dir, name));
  for (const name of ["with/index.html", "without/file.txt"]) fs.writeFileSync(join(dir, name), OPEN);
  fs.symlinkSync("with", join(dir, "link"));
  await using server = await startServer("script", dir, WITHOUT_PRIVILEGE);
  for (const name of ["with", "without"]) fs.chmodSync(join(dir, name), 0o311); // others: as 711
  const targets = ["/with/", "/link/", "/with/index.html", "/without/file.txt", "/without/", "/without/nothing"];
  const streams = await Promise.all(targets.map((target) => exchange(server.port, [getAndClose(target)])));
  // As the root, too.
  await using other = await startServer("script", join(dir, "with"), WITHOUT_PRIVILEGE);
  expect(await exchange(other.port, [getAndClose("/")])).toEndWith(OPEN);
  for (const name of ["with", "without"]) fs.chmodSync(join(dir, name), 0o700);
  const answers = streams.flatMap((stream) => parseAnswers(stream));
  expect(answers.map(({ status }) => status)).toEqual([200, 200, 200, 200, 403, 404]);
  for (const { content } of answers.slice(0, 4)) expect(content).toBe(OPEN);
});

test.if(canMount)("in a new PID namespace that keeps the old /proc, files and listings are served", async () => {
  await using planted = await plantedFolder();
  const unshare = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child"];
  await using server = await startServer("script", planted.dir, unshare);
  await expectToServe(server.port);
  expect(await exchange(server.port, [getAndClose("/folder/")])).toContain('<a href="file.txt">');
});

test("a hundred files in a row are served with few descriptors", async () => {
  await using folder = await temporaryFolder();
  for (let i = 0; i < 100; i++) fs.writeFileSync(join(folder.path, `${i}.txt`), OPEN);
  // Long enough ago for a lasting version.
  await Bun.sleep(20);
  await using server = await startServer("script", folder.path, ["bash", "-c", 'ulimit -n 64; exec "$@"', "bash"]);
  const targets = Array.from({ length: 100 }, (_, i) => `/${i}.txt`);
  const stream = await exchange(server.port, [targets.map((target) => get(target)).join(""), getAndClose("/0.txt")]);
  expect(parseAnswers(stream).filter(({ status }) => status === 200).length).toBe(101);
});

test("a time that no calendar has does not keep a folder from being listed", () => {
  // On tmpfs, XFS and Btrfs anybody can give his file one: touch -d @-9000000000000000
  const entry = { name: "a", isFolder: false, size: 0, modified: new Date(Number.NaN) };
  expect(formatListing([], [entry])).toContain('href="a"');
});
