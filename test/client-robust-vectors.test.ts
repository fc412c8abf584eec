/**
 * Plays the response vectors of test/vectors/response against client-robust.ts: against receiveHead and receiveContent
 * with every split of every message, and over real sockets against the script and the binary.
 *
 *     outcome: partial        a name in EXIT_CODES
 *     content: Hello          what has to be delivered, in the escapes of the message; (none) is no content.
 *                             Without this line not even a head may be delivered.
 *     status: 200             that of the head that is delivered
 *     keepOpen: yes           the server does not close after the message, and the client has to finish all the same
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import {
  EXIT_CODES,
  type Outcome,
  receiveContent,
  receiveHead,
  RecordWatch,
  type ResponseHead,
  type Source,
  TransferError,
} from "../client-robust.ts";
import { command, ROOT, type Variant, VARIANTS } from "./harness.ts";
import { parseMessage, readVectors, splits, type Vector } from "./vector.ts";

// A machine that is busy otherwise takes its time; READ_MS_MAX bounds each reading.
setDefaultTimeout(60_000);

const SEED = Number(process.env["SEED"] ?? Date.now() % 2 ** 31);
console.log(`SEED=${SEED}`);

// ── what should be delivered ──

interface Expectation {
  readonly outcome: Outcome;
  /** Of the final head; undefined where there must be none. */
  readonly head: string | undefined;
  readonly status: number | undefined;
  readonly content: Buffer;
  readonly closes: boolean;
}

const isOutcome = (text: string): text is Outcome => text in EXIT_CODES;

/** @throws Error where the vector says what no response vector can */
function expectationOf({ name, outcome, options, message }: Vector): Expectation {
  const { content, status, keepOpen, ...rest } = options;
  if (!isOutcome(outcome) || Object.keys(rest).length > 0 || (keepOpen ?? "yes") !== "yes")
    throw new Error(`${name}: not the outcome and the options of a response vector`);
  if (content === undefined && (status !== undefined || outcome === "ok" || outcome === "status"))
    throw new Error(`${name}: a head is delivered, so it takes a line that tells the content`);
  return {
    outcome,
    head: content === undefined ? undefined : finalHead(message),
    status: status === undefined ? undefined : Number(status),
    content: parseMessage(content === undefined || content === "(none)" ? "" : content),
    closes: keepOpen === undefined,
  };
}

/** The first head that is not of a 1xx, as sent. Only for messages whose heads are well-formed. */
function finalHead(message: Buffer): string {
  const text = message.toString("latin1");
  const end = (from: number) => from + (/\n\r?\n/.exec(text.slice(from))?.index ?? Number.NaN) + 1;
  const next = (from: number) => text.indexOf("\n", end(from)) + 1;
  let from = 0;
  while (/^HTTP\/1\.\d 1/.test(text.slice(from, from + 10))) from = next(from);
  return text.slice(from, next(from));
}

/** Bytes as they are shown where a test fails: a megabyte of them tells nobody anything. */
const show = (bytes: Buffer) =>
  bytes.length <= 1000 ? bytes.toString("latin1") : `${bytes.length} bytes with hash ${Bun.hash(bytes)}`;

// ── (a) receiveHead and receiveContent ──

/**
 * Reading in time that grows with the square of the length is a way to hang. Linear reading takes a hundredth of this.
 * It is time of the processor, since a busy machine may make anything wait.
 */
const READ_MS_MAX = 2000;

/** Gives pieces as a connection would. If the peer does not close, it would go on waiting after the last one. */
class Pieces implements Source {
  readonly records = new RecordWatch(); // has seen none: without TLS, each end is in order
  isWaiting = false;
  private readonly left: Uint8Array[];

  constructor(
    pieces: readonly Buffer[],
    private readonly closes: boolean,
  ) {
    // The content is compacted in place: the bytes are the vector's, so what is given is a copy.
    this.left = pieces.map((piece) => new Uint8Array(piece));
  }

  async receive(): Promise<Uint8Array | undefined> {
    const piece = this.left.shift();
    if (piece !== undefined || this.closes) return piece;
    this.isWaiting = true;
    throw new TransferError("timeout", "");
  }
}

/** Reads all pieces, as `transfer` does. */
async function read(pieces: readonly Buffer[], { closes, status }: Expectation) {
  const source = new Pieces(pieces, closes);
  const content: Buffer[] = [];
  let final: ResponseHead | undefined;
  let outcome: Outcome | "waiting" = "ok";
  try {
    const { head, rest } = await receiveHead(source, "GET");
    final = head;
    for await (const piece of receiveContent(source, head.framing, rest)) content.push(Buffer.from(piece));
    if (head.status >= 400) outcome = "status";
  } catch (error) {
    if (!(error instanceof TransferError)) throw error;
    outcome = source.isWaiting ? "waiting" : error.outcome;
  }
  return {
    outcome,
    head: final?.text,
    status: status === undefined ? undefined : final?.status,
    content: show(Buffer.concat(content)),
  };
}

const vectors = readVectors("response");

for (const vector of vectors)
  test(`response ${vector.name}: ${vector.title}`, async () => {
    const expectation = expectationOf(vector);
    const { outcome, head, status } = expectation;
    const expected = { outcome, head, status, content: show(expectation.content) };
    for (const pieces of splits(vector.message, SEED)) {
      const before = process.cpuUsage();
      const found = await read(pieces, expectation);
      const split = `${pieces.length} pieces, the first of ${pieces[0]?.length} bytes`;
      expect({ split, ...found }).toEqual({ split, ...expected });
      const { user, system } = process.cpuUsage(before);
      expect((user + system) / 1000).toBeLessThan(READ_MS_MAX);
    }
  });

// ── (b) the programs, over TCP ──

/** Byte by byte is one write and one turn of the event loop a byte: too slow for long messages. */
const BYTEWISE_BYTES_MAX = 300;
/** More processes at a time than the smallest machine has cores for are not quicker. */
const CONCURRENT = 4;
/** One attempt; a client that waits for what will not come fails soon, with 28. */
const ARGS = ["--retry", "0", "--stall-timeout", "10"];

type Delivery = "whole" | "split";
/** To start a process is what takes the time here. The binary starts quicker than the script: it takes both. */
const DELIVERIES: Readonly<Record<Variant, readonly Delivery[]>> = { script: ["split"], binary: ["whole", "split"] };

/** Byte by byte where that is quick, else cut at one place. */
function piecesOf({ name, message }: Vector, delivery: Delivery): Buffer[] {
  if (delivery === "whole" || message.length < 2) return [message];
  if (message.length < BYTEWISE_BYTES_MAX) return Array.from(message, (_, i) => message.subarray(i, i + 1));
  const at = 1 + (Bun.hash.crc32(`${name} ${SEED}`) % (message.length - 1));
  return [message.subarray(0, at), message.subarray(at)];
}

/** The scripted server's state of a connection: the request so far. */
interface Peer {
  request: string;
}

/** Sends the pieces one after the other, and then FIN or nothing. Stops where the client is gone. */
async function send(socket: Bun.Socket<Peer>, pieces: readonly Buffer[], closes: boolean): Promise<void> {
  socket.setNoDelay(true);
  for (const piece of pieces)
    for (let sent = 0; sent < piece.length;) {
      const written = socket.write(piece, sent, piece.length - sent);
      if (written < 0) return;
      sent += written;
      // Lets this piece go out, and the client read it, before the next one.
      await new Promise((resolve) => setImmediate(resolve));
    }
  if (closes) socket.shutdown();
}

/** A server that answers /NAME/DELIVERY with the vector NAME. */
function serveVectors() {
  const byName = new Map(vectors.map((vector) => [vector.name, vector]));
  const onRequest = (socket: Bun.Socket<Peer>): void => {
    const [, name = "", delivery] = /^GET \/([\w-]+)\/(whole|split) HTTP\/1\.1\r\n/.exec(socket.data.request) ?? [];
    const vector = byName.get(name);
    if (vector === undefined) socket.terminate();
    else void send(socket, piecesOf(vector, delivery === "whole" ? "whole" : "split"), expectationOf(vector).closes);
  };
  const listener = Bun.listen<Peer>({
    hostname: "127.0.0.1",
    port: 0,
    allowHalfOpen: true,
    socket: {
      open: (socket) => void (socket.data = { request: "" }),
      data(socket, bytes) {
        socket.data.request += bytes.toString("latin1");
        if (socket.data.request.endsWith("\r\n\r\n")) onRequest(socket);
      },
      end: (socket) => void socket.end(),
      error: (socket) => void socket.terminate(),
    },
  });
  return { port: listener.port, [Symbol.dispose]: () => listener.stop(true) };
}

/** Runs the program to its end. The harness tells output as text; content is bytes. */
async function get(variant: Variant, url: string) {
  const argv = [...(await command("client-robust", variant)), ...ARGS, url];
  await using child = Bun.spawn(argv, { cwd: ROOT, stdin: "ignore", stdout: "pipe", stderr: "pipe" });
  const [stdout, stderr, exitCode] = await Promise.all([
    new Response(child.stdout).bytes(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  return { stdout: Buffer.from(stdout), stderr, exitCode };
}

/** Runs the program and compares. @throws Error where anything is not as it has to be */
async function playOver(port: number, variant: Variant, vector: Vector, delivery: Delivery): Promise<void> {
  const { outcome, head = "", content } = expectationOf(vector);
  const { stdout, stderr, exitCode } = await get(variant, `http://127.0.0.1:${port}/${vector.name}/${delivery}`);
  // All that is content up to a fault or a cut is delivered, and nothing else is.
  expect({ exitCode, stdout: show(stdout) }).toEqual({
    exitCode: EXIT_CODES[outcome],
    stdout: show(Buffer.concat([Buffer.from(head, "latin1"), content])),
  });
  expect(stderr).toMatch(outcome === "ok" ? /^$/ : /^Error: \P{Cc}+\n$/u);
}

/** Each variant is one test: hundreds of processes, as many at a time as are quickest. */
for (const variant of VARIANTS)
  test(`response vectors over TCP, ${variant}`, async () => {
    using server = serveVectors();
    const plays = vectors.flatMap((vector) => DELIVERIES[variant].map((delivery) => ({ vector, delivery }))).values();
    const faults: string[] = [];
    const playAll = async () => {
      for (const { vector, delivery } of plays)
        await playOver(server.port, variant, vector, delivery).catch((error) =>
          faults.push(`${vector.name}, ${delivery}: ${error}`),
        );
    };
    await Promise.all(Array.from({ length: CONCURRENT }, playAll));
    expect(faults).toEqual([]);
  });
