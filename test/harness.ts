/**
 * Starts the real programs and real peers, waits for what they say, and ends what it has started.
 */
import { existsSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { build } from "../.ci/build.ts";

export const ROOT = join(import.meta.dir, "..");

export type Program = "server" | "client" | "client-robust";
/** Each program is tested as the script and as the compiled binary. */
export const VARIANTS = ["script", "binary"] as const;
export type Variant = (typeof VARIANTS)[number];

/** Binaries that `bun run test` has built for all workers. */
const givenBinaries = process.env["TESTED_BINARIES"];
/** Where the binaries are; those that are built here, test/preload.ts removes. */
export const binaries = givenBinaries ?? join(tmpdir(), `http-over-tcp-${process.pid}`);
let built: Promise<void> | undefined = givenBinaries === undefined ? undefined : Promise.resolve();

export function removeBinaries(): void {
  if (givenBinaries === undefined) rmSync(binaries, { recursive: true, force: true });
}

/** The command line that starts a program; builds the binaries at the first need. */
export async function command(program: Program, variant: Variant): Promise<string[]> {
  if (variant === "script") return [process.execPath, join(ROOT, `${program}.ts`)];
  built ??= build(binaries);
  await built;
  return [join(binaries, program)];
}

/** A new folder that is gone when the block that made it ends. */
export async function temporaryFolder() {
  const path = await mkdtemp(join(tmpdir(), "http-over-tcp-"));
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) };
}

/**
 * Tests that need a program of the system's are left out where it is missing, and say so; in CI that is a failure.
 */
export function hasTool(name: string): boolean {
  if (Bun.which(name) !== null) return true;
  if (process.env["CI"]) throw new Error(`${name} is missing: CI has to install it`);
  console.warn(`left out: tests that need ${name}`);
  return false;
}

/** Whether this machine lets us have a small disk of our own; the limit on the size of a file does for the rest. */
export const canMount = Bun.spawnSync([
  "unshare",
  "--map-root-user",
  "--mount",
  "mount",
  "-t",
  "tmpfs",
  "tmpfs",
  "/mnt",
]).success;

const pdeathsig = ["setpriv", "--pdeathsig", "KILL"];
const hasPdeathsig = Bun.which("setpriv") !== null && Bun.spawnSync([...pdeathsig, "true"]).success;
/** The command line of a process that the kernel kills when this one ends, even if this one is killed (Linux). */
export const mortal = (argv: readonly string[]): string[] => [...(hasPdeathsig ? pdeathsig : []), ...argv];

/** Waits for what no program says: looks until it is so. */
export async function until(isSo: () => boolean): Promise<void> {
  while (!isSo()) await Bun.sleep(5);
}

type Options = { cwd?: string; env?: Record<string, string>; stdin?: Uint8Array; stdout?: string };

/** The environment of what is tested: ours, but for what would change the programs. */
const environment = ({ env }: Options) => {
  const { HOST: _host, PORT: _port, ...rest } = process.env;
  return { ...rest, ...env };
};

/** Runs a command to its end; `stdout` is a file to write to instead of telling what came. */
export async function run(argv: string[], options: Options = {}) {
  const { cwd = ROOT, stdin = "ignore" } = options;
  const stdout = options.stdout === undefined ? "pipe" : Bun.file(options.stdout);
  const child = Bun.spawn(mortal(argv), { cwd, env: environment(options), stdin, stdout, stderr: "pipe" });
  await using _ = child;
  const text = (stream: typeof child.stdout) => (stream instanceof ReadableStream ? new Response(stream).text() : "");
  const [printed, stderr, exitCode] = await Promise.all([text(child.stdout), text(child.stderr), child.exited]);
  return { stdout: printed, stderr, exitCode };
}

/**
 * Runs a command to its end, and tells the most memory that it had resident, in MiB. A process counts the memory of the
 * one that it was forked from as its own, so that must be a small one.
 */
export async function measureResidentMiB(argv: string[]): Promise<number> {
  const code =
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)";
  const { stdout, stderr } = await run(["python3", "-c", code, ...argv]);
  if (!/^\d+\n$/.test(stdout)) throw new Error(stderr);
  return Number(stdout) / 1024;
}

/** Runs one of the programs to its end. */
export const runProgram = async (program: Program, variant: Variant, args: string[], options?: Options) =>
  run([...(await command(program, variant)), ...args], options);

/** Gets the URL into a new file by client-robust, which prints nothing on stdout, and says how that ended. */
export async function saveToFile(variant: Variant, url: string, ...args: string[]) {
  await using folder = await temporaryFolder();
  const file = join(folder.path, "file");
  const { stdout, stderr, exitCode } = await runProgram("client-robust", variant, ["-o", file, ...args, url]);
  if (stdout !== "") throw new Error(`printed ${JSON.stringify(stdout)}`);
  const content = existsSync(file) ? readFileSync(file) : undefined;
  return { content, stderr, exitCode, files: readdirSync(folder.path) };
}

/** Collects what a stream brings and lets tests wait for a text in it. */
export class Transcript {
  text = "";
  private hasEnded = false;
  private wake = () => {};

  constructor(stream: ReadableStream<Uint8Array>) {
    void this.collect(stream);
  }

  private async collect(stream: ReadableStream<Uint8Array>): Promise<void> {
    const decoder = new TextDecoder();
    for await (const bytes of stream) {
      this.text += decoder.decode(bytes, { stream: true });
      this.wake();
    }
    this.hasEnded = true;
    this.wake();
  }

  /** The match, as soon as there is one. @throws where the stream ends without one */
  async waitFor(pattern: RegExp): Promise<RegExpMatchArray> {
    for (;;) {
      const match = this.text.match(pattern);
      if (match !== null) return match;
      if (this.hasEnded) throw new Error(`ended without ${pattern}: ${JSON.stringify(this.text)}`);
      await new Promise<void>((resolve) => (this.wake = resolve));
    }
  }
}

/** Starts a command that goes on until the test ends; `ready` is what it says on stderr or stdout first. */
export async function start(argv: string[], ready: RegExp, options: Options = {}) {
  const { cwd = ROOT } = options;
  const stdio = { stdin: "ignore", stdout: "pipe", stderr: "pipe" } as const;
  const child = Bun.spawn(mortal(argv), { cwd, env: environment(options), ...stdio });
  const stdout = new Transcript(child.stdout);
  const stderr = new Transcript(child.stderr);
  const dispose = async () => {
    child.kill("SIGKILL");
    await child.exited;
  };
  try {
    const match = await Promise.any([stderr.waitFor(ready), stdout.waitFor(ready)]);
    return { child, stdout, stderr, match, [Symbol.asyncDispose]: dispose };
  } catch (error) {
    await dispose();
    throw error;
  }
}

/** The server's ready line: the URL, then the port. */
export const LISTENING = /https?:\/\/\S+:(\d+)(?=\n)/;

/** Starts the server on a free port and waits until it is ready. */
export async function startServer(variant: Variant, args: string[] = [], options: Options = {}) {
  const argv = [...(await command("server", variant)), "--port", "0", ...args];
  const server = await start(argv, LISTENING, options);
  return {
    ...server,
    port: Number(server.match[1]),
    url: server.match[0],
    [Symbol.asyncDispose]: server[Symbol.asyncDispose],
  };
}

/**
 * Starts a copy of server.ts in which some texts are replaced: as someone would change it, or with a constant that a test
 * can reach. The copy is the one file, in a folder of its own.
 */
export async function startCopy(changes: Readonly<Record<string, string>>, args: string[] = []) {
  let text = await Bun.file(join(ROOT, "server.ts")).text();
  for (const [from, to] of Object.entries(changes)) {
    if (text.split(from).length !== 2) throw new Error(`server.ts does not have exactly one ${JSON.stringify(from)}`);
    text = text.replace(from, () => to);
  }
  const folder = await temporaryFolder();
  await Bun.write(join(folder.path, "server.ts"), text);
  const server = await start([process.execPath, "server.ts", "--port", "0", ...args], LISTENING, { cwd: folder.path });
  const dispose = async () => {
    await server[Symbol.asyncDispose]();
    await folder[Symbol.asyncDispose]();
  };
  return { ...server, port: Number(server.match[1]), url: server.match[0], [Symbol.asyncDispose]: dispose };
}

/** Runs python3 code that prints the port that it listens on as its first line. */
export async function startPython(code: string, args: string[] = []) {
  const server = await start(["python3", "-u", "-c", code, ...args], /^(\d+)\n/);
  return { ...server, port: Number(server.match[1]), [Symbol.asyncDispose]: server[Symbol.asyncDispose] };
}

/** Makes a certificate that signs itself, by default for localhost, in the folder: cert.pem and key.pem. */
export async function makeCertificate(folder: string, names = "DNS:localhost,IP:127.0.0.1") {
  const [cert, key] = [join(folder, "cert.pem"), join(folder, "key.pem")];
  const curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
  const files = ["-keyout", key, "-out", cert];
  const made = await run([
    "openssl",
    "req",
    "-x509",
    ...curve,
    "-subj",
    "/CN=localhost",
    "-addext",
    `subjectAltName=${names}`,
    ...files,
  ]);
  if (made.exitCode !== 0) throw new Error(made.stderr);
  return { cert, key };
}

/** Starts nginx on a free port: `location` is put into its one server, whose root is `root`. */
export async function startNginx(root: string, location = "") {
  const folder = await temporaryFolder();
  const port = await freePort();
  const file = join(folder.path, "nginx.conf");
  const paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((name) => `${name}_temp_path ${folder.path};`);
  await Bun.write(
    file,
    `daemon off; master_process off; pid ${folder.path}/pid; error_log stderr notice;
    events { worker_connections 512; }
    http { access_log off; ${paths.join(" ")} default_type application/octet-stream;
      server { listen 127.0.0.1:${port}; root ${root}; ${location} } }`,
  );
  const nginx = await start(["nginx", "-c", file], /start worker|using the "epoll"/);
  const dispose = async () => {
    await nginx[Symbol.asyncDispose]();
    await folder[Symbol.asyncDispose]();
  };
  return { port, url: `http://127.0.0.1:${port}`, [Symbol.asyncDispose]: dispose };
}

/** A port that nobody listens on just now. */
export async function freePort(): Promise<number> {
  const listener = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
  const { port } = listener;
  listener.stop(true);
  return port;
}

/** A TCP connection to a program under test, with what it has brought so far, one character a byte. */
export class Peer {
  received = "";
  /** Settles when the connection is closed: "end" in order, "reset" otherwise. */
  readonly closed: Promise<"end" | "reset">;
  private readonly settleClosed: (how: "end" | "reset") => void;
  private socket: Bun.Socket | undefined;
  private isClosed = false;
  private wake = () => {};

  private constructor() {
    const { promise, resolve } = Promise.withResolvers<"end" | "reset">();
    [this.closed, this.settleClosed] = [promise, resolve];
  }

  static async connect(port: number, tls: Bun.TLSOptions | false = false): Promise<Peer> {
    const peer = new Peer();
    peer.socket = await Bun.connect({
      hostname: "127.0.0.1",
      port,
      tls,
      allowHalfOpen: true,
      socket: {
        data: (_, bytes) => peer.onData(bytes),
        drain: () => peer.wake(),
        end: (socket) => void socket.end(),
        close: (_, error) => peer.settleClosed(error === undefined ? "end" : "reset"),
      },
    });
    peer.socket.setNoDelay(true);
    void peer.closed.then(() => {
      peer.isClosed = true;
      peer.wake();
    });
    return peer;
  }

  private onData(bytes: Buffer): void {
    this.received += bytes.toString("latin1");
    this.wake();
  }

  /** Sends all of it, or as much as the other side takes before it closes. */
  async send(piece: string | Uint8Array): Promise<void> {
    const bytes = Buffer.from(piece);
    for (let sent = 0; sent < bytes.length;) {
      const written = this.socket?.write(bytes, sent, bytes.length - sent) ?? -1;
      if (written < 0 || this.isClosed) return;
      sent += written;
      if (sent < bytes.length) await new Promise<void>((resolve) => (this.wake = resolve));
    }
  }

  /** Sends a FIN. */
  finish(): void {
    this.socket?.shutdown();
  }

  /** Stops reading; what comes piles up in the kernel. */
  pause(): void {
    this.socket?.pause();
  }

  resume(): void {
    this.socket?.resume();
  }

  /** Waits until what came matches. @throws where the connection closes before */
  async waitFor(pattern: RegExp): Promise<void> {
    while (!pattern.test(this.received)) {
      if (this.isClosed) throw new Error(`closed without ${pattern}: ${JSON.stringify(this.received.slice(0, 500))}`);
      await new Promise<void>((resolve) => (this.wake = resolve));
    }
  }

  [Symbol.dispose](): void {
    this.socket?.terminate();
  }
}

/**
 * Opens a TCP connection, sends the pieces one after the other, and returns all that comes until the peer closes.
 * `finish` sends a FIN after the last piece.
 */
export async function exchange(
  port: number,
  pieces: (string | Uint8Array)[],
  { finish = false } = {},
): Promise<string> {
  using peer = await Peer.connect(port);
  for (const piece of pieces) {
    await peer.send(piece);
    // Lets the other side read this piece before the next one: more would not make the splits any truer.
    await new Promise((resolve) => setImmediate(resolve));
  }
  if (finish) peer.finish();
  if ((await peer.closed) === "reset") throw new Error(`reset after ${JSON.stringify(peer.received.slice(0, 500))}`);
  return peer.received;
}
