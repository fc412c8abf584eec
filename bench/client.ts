/**
 * The robust client, compiled, beside its peers: downloads from nginx over loopback.
 */
import { closeSync, constants, openSync, rmSync, statSync, truncateSync, writeFileSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import {
  type Effort,
  finish,
  folder,
  freePort,
  interleave,
  run,
  spawn,
  stop,
  twoCores,
  waitForAnswer,
} from "./measure.ts";
import { compileC, makeCertificate, nginxArgv, requireTools, ROOT, versionsOf } from "./peers.ts";
import { REFERENCES, type Role, type Measured, toRows, type WorkloadResult } from "./results.ts";

const LARGE_BYTES = 2 ** 31;
const GIB = 2 ** 30;
const TEXT = "Hello, World!";
/** So many starts make one measurement, since one is too short for a clock. */
const STARTS = 20;
/** Of content that comes in chunks, or over TLS. */
const FRAMED_BYTES = 2 ** 30;

interface Client {
  readonly name: string;
  readonly role: Role;
  /** The command line that prints a target's content, or saves it to a file where there is one. */
  readonly argv: (target: string, file?: string) => string[];
  /** The floor knows only stdout, and no TLS and no chunks. */
  readonly isStdoutOnly?: boolean;
  /** Does something with a file that there is nothing to do with otherwise. */
  readonly isFileOnly?: boolean;
}

/** What one run took. */
interface Took {
  readonly seconds: number;
  readonly cpuSeconds: number;
}

/** Seconds from start to exit, and the CPU time of that process alone. */
async function take(argv: string[], stdout: Bun.BunFile | number): Promise<Took> {
  const start = performance.now();
  const child = spawn(argv, { stdout });
  await finish(child, argv.join(" "));
  const seconds = (performance.now() - start) / 1000;
  return { seconds, cpuSeconds: Number(child.resourceUsage()?.cpuTime.total) / 1e6 };
}

const NULL = Bun.file("/dev/null");

/** The sinks: where the content of the large file goes. Each checks what has arrived where it can be seen. */
const SINKS: Readonly<Record<string, (client: Client) => Promise<Took>>> = {
  "2 GiB to /dev/null": ({ argv }) => take(argv("/large"), NULL),
  "2 GiB through a pipe": takeThroughPipe,
  "2 GiB to a file": takeToFile,
};

async function takeToFile({ argv, isStdoutOnly }: Client): Promise<Took> {
  const file = join(folder, "downloaded");
  rmSync(file, { force: true });
  const took = isStdoutOnly ? await take(argv("/large"), Bun.file(file)) : await take(argv("/large", file), NULL);
  if (statSync(file).size !== LARGE_BYTES)
    throw new Error(`${argv("/large").join(" ")} saved ${statSync(file).size} bytes`);
  rmSync(file); // what has not reached the disk yet need not
  return took;
}

/** A named pipe, so that the client alone can be timed and no shell is between; dd reads and counts. */
async function takeThroughPipe({ name, argv }: Client): Promise<Took> {
  const path = join(folder, "pipe");
  const both = openSync(path, "r+"); // without it, each of the next two would wait for the other
  const [readEnd, writeEnd] = [openSync(path, constants.O_RDONLY), openSync(path, constants.O_WRONLY)];
  const start = performance.now();
  const reader = spawn(["dd", "of=/dev/null", "bs=128K"], { stdin: readEnd, stderr: "pipe" });
  const writer = spawn(argv("/large"), { stdout: writeEnd });
  for (const end of [both, readEnd, writeEnd]) closeSync(end); // or the reader would never see the end
  await finish(writer, name);
  await finish(reader, `dd behind ${name}`);
  const seconds = (performance.now() - start) / 1000;
  const printed = reader.stderr instanceof ReadableStream ? await new Response(reader.stderr).text() : "";
  if (!printed.includes(`\n${LARGE_BYTES} bytes`)) throw new Error(`${name} through a pipe: ${printed}`);
  return { seconds, cpuSeconds: Number(writer.resourceUsage()?.cpuTime.total) / 1e6 };
}

async function makeClients(
  port: number,
  beside: string | undefined,
): Promise<{ clients: Client[]; missing: string[] }> {
  const url = (target: string) => (target.startsWith("/") ? `http://127.0.0.1:${port}${target}` : target);
  const missing: string[] = [];
  const clients: Client[] = [];
  const add = (client: Client, needs?: string) => {
    if (needs === undefined || Bun.which(needs) !== null) clients.push(client);
    else missing.push(client.name === needs ? needs : `${client.name} (needs ${needs})`);
  };
  const floor = Bun.which("cc") === null ? "" : await compileC("floor-client");
  add({ name: "floor", role: "floor", isStdoutOnly: true, argv: (target) => [floor, String(port), target] }, "cc");
  // Built by a process of its own: what is half built when it is ended is then in our folder.
  await run([process.execPath, join(ROOT, ".ci/build.ts"), "--outdir", folder]);
  const ours = join(folder, "client-robust");
  add({ name: "client-robust", role: "ours", argv: (target, file = "-") => [ours, "-k", "-o", file, url(target)] });
  if (beside !== undefined) {
    const other = join(folder, "beside");
    await run([process.execPath, join(ROOT, ".ci/build.ts"), "--outdir", other, resolve(beside)]);
    const program = join(other, basename(beside, ".ts"));
    const argv = (target: string, file = "-") => [program, "-k", "-o", file, url(target)];
    add({ name: "client-robust, the other", role: "ours", argv });
  }
  // -q and --no-config: nobody's .curlrc or .wgetrc.
  add({ name: "curl", role: "peer", argv: (target, file = "-") => ["curl", "-q", "-skf", "-o", file, url(target)] });
  // What client-robust does too, so that both leave the content on the disk.
  const synced = (target: string, file = "") => [
    "sh",
    "-c",
    'curl -q -sf -o "$0" "$1" && sync -d "$0"',
    file,
    url(target),
  ];
  add({ name: "curl, then sync", role: "peer", argv: synced, isFileOnly: true });
  const wget = (target: string, file = "-") => {
    const flags = ["--no-config", "--no-check-certificate", "-q"];
    return ["wget", ...flags, "-O", file, url(target)];
  };
  add({ name: "wget", role: "peer", argv: wget }, "wget");
  return { clients, missing };
}

/** Answers each connection with FRAMED_BYTES in chunks of the size that the target names. */
function serveChunks(): { url: (size: number) => string; stop: () => void } {
  const ends = new WeakMap<Bun.Socket, { piece: Buffer; left: number; sent: number }>();
  const send = (socket: Bun.Socket) => {
    const state = ends.get(socket);
    for (let taken = 1; state !== undefined && state.left > 0 && taken > 0;) {
      taken = socket.write(state.piece, state.sent, state.piece.length - state.sent);
      state.sent += Math.max(0, taken);
      if (state.sent < state.piece.length) continue;
      [state.sent, state.left] = [0, state.left - 1];
      if (state.left === 0) socket.end("0\r\n\r\n");
    }
  };
  const listener = Bun.listen({
    hostname: "127.0.0.1",
    port: 0,
    socket: {
      data(socket, request) {
        const size = Number(/^GET \/(\d+) /.exec(request.toString())?.[1]);
        const chunks = 262_144 / size; // what one write offers
        const piece = Buffer.from(`${size.toString(16)}\r\n${"x".repeat(size)}\r\n`.repeat(chunks));
        ends.set(socket, { piece, left: FRAMED_BYTES / 262_144, sent: 0 });
        socket.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n");
        send(socket);
      },
      drain: send,
    },
  });
  return { url: (size) => `http://127.0.0.1:${listener.port}/${size}`, stop: () => listener.stop(true) };
}

/** Each prints exactly the small file. */
async function check({ name, argv }: Client): Promise<void> {
  const printed = await run(argv("/small.txt"));
  if (printed !== TEXT) throw new Error(`${name} prints ${printed}`);
}

/** Start to exit, many times. */
async function takeStarts({ argv }: Client): Promise<Took> {
  let [seconds, cpuSeconds] = [0, 0];
  for (let i = 0; i < STARTS; i++) {
    const took = await take(argv("/small.txt"), NULL);
    seconds += took.seconds / STARTS;
    cpuSeconds += took.cpuSeconds / STARTS;
  }
  return { seconds, cpuSeconds };
}

async function measureAll(
  clients: Client[],
  framed: Readonly<Record<string, string>>,
  effort: Effort,
): Promise<WorkloadResult[]> {
  const roleOf = (name: string) => clients.find((client) => client.name === name)?.role ?? "peer";
  const workloads: WorkloadResult[] = [];
  const anywhere = clients.filter(({ isFileOnly }) => !isFileOnly);
  for (const [name, sink] of Object.entries(SINKS)) {
    const peers = sink === takeToFile ? clients : anywhere;
    const samples = await interleave(`client, ${name}`, peers, effort, async (client) => {
      const { seconds, cpuSeconds } = await sink(client);
      return { main: seconds, cpu: cpuSeconds / (LARGE_BYTES / GIB) };
    });
    workloads.push({ name, main: "time", cpu: "CPU a GiB", rows: toRows(samples, REFERENCES.client, roleOf) });
  }
  for (const [name, url] of Object.entries(framed)) {
    const peers = anywhere.filter(({ isStdoutOnly }) => !isStdoutOnly);
    const samples = await interleave(`client, ${name}`, peers, effort, async ({ argv }) => {
      const { seconds, cpuSeconds } = await take(argv(url), NULL);
      return { main: seconds, cpu: cpuSeconds / (FRAMED_BYTES / GIB) };
    });
    workloads.push({ name, main: "time", cpu: "CPU a GiB", rows: toRows(samples, REFERENCES.client, roleOf) });
  }
  const name = "13 bytes, start to exit";
  const samples = await interleave(`client, ${name}`, anywhere, effort, async (client) => {
    const { seconds, cpuSeconds } = await takeStarts(client);
    return { main: seconds, cpu: cpuSeconds };
  });
  return [...workloads, { name, main: "time", cpu: "CPU", rows: toRows(samples, REFERENCES.client, roleOf) }];
}

/** @param beside another client-robust.ts, to be measured beside ours */
export async function benchClient(effort: Effort, beside?: string): Promise<Measured> {
  requireTools(["taskset", "curl", "nginx", "dd", "mkfifo", "openssl"]);
  const [serving] = twoCores();
  writeFileSync(join(folder, "small.txt"), TEXT);
  writeFileSync(join(folder, "large"), "");
  truncateSync(join(folder, "large"), LARGE_BYTES); // sparse: takes no room on the disk
  writeFileSync(join(folder, "framed"), "");
  truncateSync(join(folder, "framed"), FRAMED_BYTES);
  rmSync(join(folder, "pipe"), { force: true });
  await run(["mkfifo", join(folder, "pipe")]);
  const [port, tlsPort, { cert, key }] = [freePort(), freePort(), await makeCertificate()];
  const tls = `listen 127.0.0.1:${tlsPort} ssl; ssl_certificate ${cert}; ssl_certificate_key ${key};`;
  const chunks = serveChunks();
  const framed = {
    "1 GiB over TLS": `https://127.0.0.1:${tlsPort}/framed`,
    "1 GiB in chunks of 1 KiB": chunks.url(1024),
    "1 GiB in chunks of 64 KiB": chunks.url(65_536),
  };
  // The clients may use any core, as when somebody starts them; the origin keeps to one.
  const nginx = spawn(nginxArgv(port, `root ${folder}; sendfile on; ${tls}`), { core: serving });
  try {
    await waitForAnswer(nginx, "nginx", `http://127.0.0.1:${port}/small.txt`);
    const { clients, missing } = await makeClients(port, beside);
    for (const client of clients) if (!client.isFileOnly) await check(client);
    const workloads = await measureAll(clients, framed, effort);
    const versions = await versionsOf(["curl", "wget", "nginx", "cc"]);
    return { versions, missing, workloads };
  } finally {
    chunks.stop();
    await stop(nginx);
  }
}
