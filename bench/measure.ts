/**
 * What all measurements need: processes that end with us, cores, counters of the kernel, rounds.
 */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Sample } from "./results.ts";

export interface Effort {
  readonly rounds: number;
  /** Of a measurement with wrk. */
  readonly seconds: number;
  /** After so many seconds no other round of a workload begins: on a busy machine there are fewer. */
  readonly workloadSeconds: number;
}

/** All files of a run are in here. */
export const folder = mkdtempSync(join(tmpdir(), "http-over-tcp-bench-"));

// ── processes ──

/** A measurement, or a step before it, takes seconds; what takes so long hangs. */
const STEP_SECONDS_MAX = 60;
const START_SECONDS_MAX = 10;

/** All that run; `cleaning` is set as soon as they are ended. */
const children = new Set<Bun.Subprocess>();
let cleaning: Promise<void> | undefined;

interface SpawnOptions {
  readonly core?: number;
  readonly cwd?: string;
  readonly stdin?: number;
  readonly stdout?: "pipe" | "ignore" | number | Bun.BunFile;
  readonly stderr?: "pipe" | "ignore";
}

/** Neither we nor the peers go through somebody's proxy, and HOST and PORT are for servers that somebody else starts. */
for (const name of Object.keys(process.env)) if (/^(HOST|PORT|.*_proxy)$/i.test(name)) delete process.env[name];

/** Starts a process in a group of its own, so that all that it starts can be ended with it. */
export function spawn(argv: readonly string[], options: SpawnOptions = {}): Bun.Subprocess {
  const { core, cwd = folder, stdin = "ignore", stdout = "ignore", stderr = "ignore" } = options;
  if (cleaning !== undefined) throw new Error("the run is over"); // nobody would end what starts now
  const command = core === undefined ? argv : ["taskset", "-c", String(core), ...argv]; // taskset becomes the command
  const child = Bun.spawn([...command], {
    cwd,
    env: { ...process.env, LC_ALL: "C" },
    stdin,
    stdout,
    stderr,
    detached: true,
  });
  children.add(child);
  void child.exited.then(() => children.delete(child));
  return child;
}

export async function stop(child: Bun.Subprocess): Promise<void> {
  if (children.has(child))
    try {
      process.kill(-child.pid, "SIGKILL");
    } catch {} // it has just ended
  await child.exited;
}

/** Ends every process and removes every file of this run; what is asked for again is waited for. */
export function cleanUp(): Promise<void> {
  cleaning ??= Promise.all([...children].map(stop)).then(() => rmSync(folder, { recursive: true, force: true }));
  return cleaning;
}

/** Waits for the end of a process. @throws where it takes too long, or fails */
export async function finish(child: Bun.Subprocess, name: string, seconds = STEP_SECONDS_MAX): Promise<void> {
  let isLate = false;
  const timer = setTimeout(() => {
    isLate = true;
    void stop(child);
  }, seconds * 1000);
  const exitCode = await child.exited;
  clearTimeout(timer);
  if (isLate) throw new Error(`${name} took longer than ${seconds} s`);
  if (exitCode !== 0) throw new Error(`${name}: exit ${exitCode}`);
}

/** Runs a command to its end and returns what it printed, on stdout and then on stderr. */
export async function run(argv: readonly string[], options: SpawnOptions & { seconds?: number } = {}): Promise<string> {
  const child = spawn(argv, { ...options, stdout: "pipe", stderr: "pipe" });
  const text = (stream: typeof child.stdout) => (stream instanceof ReadableStream ? new Response(stream).text() : "");
  const printed = Promise.all([text(child.stdout), text(child.stderr)]);
  try {
    await finish(child, argv.slice(0, 3).join(" "), options.seconds);
  } catch (error) {
    throw new Error(`${(error as Error).message}\n${(await printed).join("")}`); // finish throws Errors
  }
  return (await printed).join("");
}

/** A port that is free just now. */
export function freePort(): number {
  const listener = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
  const { port } = listener;
  listener.stop(true);
  return port;
}

/** Waits until a server that was just started answers. @throws where it ends, or does not answer in time */
export async function waitForAnswer(child: Bun.Subprocess, name: string, url: string): Promise<void> {
  const deadline = performance.now() + START_SECONDS_MAX * 1000;
  while (performance.now() < deadline) {
    if (!children.has(child)) throw new Error(`${name} ended at its start, with ${await child.exited}`);
    const answer = await fetch(url, { keepalive: false, tls: { rejectUnauthorized: false } }).catch(() => undefined);
    if (answer?.ok) return void (await answer.arrayBuffer());
    await Bun.sleep(20);
  }
  throw new Error(`${name} does not answer`);
}

// ── the machine ──

/** The first two cores that we may use: one for what serves, one for the load. @throws where there is only one */
export function twoCores(): [serving: number, load: number] {
  const [, list = ""] = /^Cpus_allowed_list:\s*(\S+)/m.exec(readFileSync("/proc/self/status", "utf8")) ?? [];
  const cores = list.split(",").flatMap((range) => {
    const [first = 0, last = first] = range.split("-").map(Number);
    return Array.from({ length: last - first + 1 }, (_, i) => first + i);
  });
  const [serving, load] = cores;
  if (serving === undefined || load === undefined)
    throw new Error("this needs two cores: on one, the load generator would take its time from what is measured");
  return [serving, load];
}

/** User and system time of a process so far, in seconds: /proc counts it in ticks of 10 ms. */
export function cpuSeconds(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ")[1]?.split(" ") ?? [];
  return (Number(fields[11]) + Number(fields[12])) / 100;
}

/** From now on, the most memory that a process has resident is counted anew. */
export function forgetMostResident(pid: number): void {
  writeFileSync(`/proc/${pid}/clear_refs`, "5");
}

/** The most memory that a process had resident, in MiB. */
export function mostResidentMiB(pid: number): number {
  return Number(/^VmHWM:\s*(\d+) kB/m.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]) / 1024;
}

/** The version that a program tells; undefined where there is no such program. */
export async function versionOf(argv: readonly string[]): Promise<string | undefined> {
  const [program = ""] = argv;
  if (Bun.which(program) === null) return undefined;
  const child = spawn(argv, { stdout: "pipe", stderr: "pipe" }); // not run(): "wrk -v" exits with 1
  const text = (stream: typeof child.stdout) => (stream instanceof ReadableStream ? new Response(stream).text() : "");
  const printed = (await Promise.all([text(child.stdout), text(child.stderr)])).join("");
  return /\d+\.\d+(\.\d+)*/.exec(printed)?.[0];
}

// ── wrk ──

const CONNECTIONS = 32;
/** No head of an answer is longer here. */
const HEAD_BYTES_MAX = 1024;

export interface Load {
  readonly url: string;
  /** What load.lua is told. */
  readonly mode: readonly string[];
  readonly fields?: readonly string[];
  /** 32 by default. */
  readonly connections?: number;
  /** The length of the content of every answer. */
  readonly contentBytes: number;
}

/** Puts load on a server and tells what it did a second, and what CPU time each request took. */
export async function measureLoad(name: string, pid: number, load: Load, core: number, seconds: number) {
  const { url, mode, fields = [], connections = CONNECTIONS, contentBytes } = load;
  const script = ["-s", join(import.meta.dir, "load.lua")];
  const headers = fields.flatMap((field) => ["-H", field]);
  const before = cpuSeconds(pid);
  const wrk = [
    "wrk",
    "--timeout",
    "20s",
    "-t1",
    `-c${connections}`,
    `-d${seconds}`,
    ...script,
    ...headers,
    url,
    "--",
    ...mode,
  ];
  const printed = await run(wrk, { core, seconds: seconds + STEP_SECONDS_MAX });
  const cpu = cpuSeconds(pid) - before;
  const summary = /^summary (\d+) (\d+) (\d+) (\d+)$/m.exec(printed)?.slice(1).map(Number) ?? [];
  const [requests = 0, microseconds = 0, bytes = 0, errors = 0] = summary;
  const average = bytes / requests;
  if (errors > 0 || !(average > contentBytes && average < contentBytes + HEAD_BYTES_MAX))
    throw new Error(`${name}: ${errors} errors, ${average} bytes an answer of ${contentBytes}:\n${printed}`);
  return { main: (requests / microseconds) * 1e6, cpu: cpu / requests };
}

// ── rounds ──

/**
 * Measures every peer once, then each again, so that what else the machine does falls on all of them. The first round
 * warms up and does not count; one at least does, however long it takes.
 */
export async function interleave<P extends { readonly name: string }>(
  title: string,
  peers: readonly P[],
  { rounds, workloadSeconds }: Effort,
  measure: (peer: P) => Promise<Sample>,
): Promise<Map<string, Sample[]>> {
  const samples = new Map<string, Sample[]>(peers.map(({ name }) => [name, []]));
  const start = performance.now();
  const isLate = () => performance.now() - start > workloadSeconds * 1000;
  let round = 0;
  for (; round <= rounds && (round < 2 || !isLate()); round++) {
    if (process.stderr.isTTY) process.stderr.write(`\r${title}: ${round} of ${rounds} `);
    for (const peer of peers) {
      const sample = await measure(peer);
      if (round > 0) samples.get(peer.name)?.push(sample);
    }
  }
  process.stderr.write(process.stderr.isTTY ? "\r\x1b[K" : `${title}: ${round - 1} rounds\n`);
  return samples;
}
