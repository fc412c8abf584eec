/**
 * `server.ts --root` beside other servers of files: a large one to one reader, and small ones to many connections.
 */
import { mkdirSync, truncateSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import {
  cpuSeconds,
  type Effort,
  finish,
  folder,
  forgetMostResident,
  interleave,
  measureLoad,
  mostResidentMiB,
  spawn,
  twoCores,
} from "./measure.ts";
import {
  compileC,
  compileGo,
  nginxArgv,
  type Peer,
  type PeerSpec,
  requireTools,
  ROOT,
  startPeers,
  stopPeers,
  versionsOf,
} from "./peers.ts";
import { REFERENCES, type Measured, type Sample, toRows, type WorkloadResult } from "./results.ts";

const LARGE_BYTES = 2 ** 31;
const GIB = 2 ** 30;
const SMALL_BYTES = 1024;
const SMALL_FILES = 10_000;

const site = join(folder, "site");

/** Small files differ from the first byte on, so that one that is taken for another is seen. */
const contentOf = (name: string) => `${name}\n`.padEnd(SMALL_BYTES - 1, "0123456789abcdef") + "\n";

function makeSite(): void {
  mkdirSync(join(site, "many"), { recursive: true });
  writeFileSync(join(site, "small.txt"), contentOf("small.txt"));
  for (let i = 0; i < SMALL_FILES; i++) writeFileSync(join(site, `many/${i}.txt`), contentOf(`many/${i}.txt`));
  writeFileSync(join(site, "large"), "");
  truncateSync(join(site, "large"), LARGE_BYTES); // sparse: takes no room on the disk, but 2 GiB of the page cache
}

const ours = (name: string, script: string): PeerSpec => ({
  name,
  role: "ours",
  argv: (port) => [
    ...[process.execPath, script, "--root", site, "--log", "off"],
    ...["--host", "127.0.0.1", "--port", String(port)],
  ],
});

const PEERS: readonly PeerSpec[] = [
  {
    name: "floor",
    role: "floor",
    needs: "cc",
    argv: async (port) => [await compileC("floor-files"), String(port), site],
  },
  ours("server.ts --root", join(ROOT, "server.ts")),
  {
    name: "nginx",
    role: "peer",
    needs: "nginx",
    argv: (port) => nginxArgv(port, `root ${site}; sendfile on;`),
  },
  {
    name: "nginx, no sendfile",
    role: "peer",
    needs: "nginx",
    argv: (port) => nginxArgv(port, `root ${site}; sendfile off;`),
  },
  {
    name: "nginx, files open",
    role: "peer",
    needs: "nginx",
    argv: (port) => nginxArgv(port, `root ${site}; sendfile on; open_file_cache max=${2 * SMALL_FILES};`),
  },
  {
    name: "Bun.file",
    role: "peer",
    argv: (port) => [process.execPath, join(import.meta.dir, "peers/bun-files.ts"), String(port), site],
  },
  {
    name: "Go FileServer",
    role: "peer",
    needs: "go",
    argv: async (port) => [await compileGo(), String(port), site],
  },
  {
    name: "python http.server",
    role: "peer",
    needs: "python3",
    // By default it speaks HTTP/1.0 and closes after each answer.
    argv: (port) => [
      ...["python3", "-m", "http.server", "--protocol", "HTTP/1.1"],
      ...["--bind", "127.0.0.1", "--directory", site, String(port)],
    ],
  },
];

/** Right status, length and bytes, for small files from all over, and the length of the large one. */
async function check(name: string, origin: string): Promise<void> {
  const paths = ["small.txt", ...Array.from({ length: 50 }, (_, i) => `many/${(i * SMALL_FILES) / 50}.txt`)];
  for (const path of paths) {
    const answer = await fetch(`${origin}/${path}`);
    if (answer.status !== 200 || (await answer.text()) !== contentOf(path)) throw new Error(`${name}: wrong ${path}`);
  }
  const answer = await fetch(`${origin}/large`, { method: "HEAD" });
  if (answer.status !== 200 || answer.headers.get("Content-Length") !== String(LARGE_BYTES))
    throw new Error(`${name}: wrong length of the large file`);
}

/** The C floor of a client reads and believes, but counts: what it takes itself hides the least of the server. */
async function measureLarge(peer: Peer, reader: string, core: number): Promise<Sample> {
  const before = cpuSeconds(peer.child.pid);
  const start = performance.now();
  const child = spawn([reader, new URL(peer.origin).port, "/large", String(LARGE_BYTES)], { core });
  await finish(child, `the reader of ${peer.name}`);
  const seconds = (performance.now() - start) / 1000;
  const size = LARGE_BYTES / GIB;
  return { main: size / seconds, cpu: (cpuSeconds(peer.child.pid) - before) / size };
}

/** The workloads, each with what it measures of a peer. */
async function workloadsFor({ seconds }: Effort, core: number, peers: readonly Peer[]) {
  const measureSmall = (mode: string[], path: string) => (peer: Peer) => {
    const url = `${peer.origin}/${path}`;
    return measureLoad(peer.name, peer.child.pid, { url, mode, contentBytes: SMALL_BYTES }, core, seconds);
  };
  const workloads = [
    {
      name: "1 KiB, one file again and again",
      main: "requests/s",
      cpu: "CPU a request",
      peers,
      measure: measureSmall(["plain"], "small.txt"),
    },
    {
      name: "1 KiB, 10,000 different files",
      main: "requests/s",
      cpu: "CPU a request",
      peers,
      measure: measureSmall(["files", String(SMALL_FILES)], ""),
    },
  ];
  if (Bun.which("cc") === null) return workloads;
  const reader = await compileC("floor-client");
  return [
    {
      name: "2 GiB to one reader",
      main: "throughput",
      cpu: "CPU a GiB",
      peers: peers.filter(({ name }) => !name.endsWith("files open")), // that is about many files
      measure: (peer: Peer) => measureLarge(peer, reader, core),
    },
    ...workloads,
  ];
}

/** @param beside another version of server.ts, measured in the same run */
export async function benchFiles(effort: Effort, beside?: string): Promise<Measured> {
  requireTools(["taskset", "wrk", "nginx"]);
  const [serving, loading] = twoCores();
  makeSite();
  const specs = beside === undefined ? PEERS : [...PEERS, ours("server.ts beside", resolve(beside))];
  const { peers, missing } = await startPeers(specs, serving, check);
  const roleOf = (name: string) => peers.find((peer) => peer.name === name)?.role ?? "peer";
  const results: WorkloadResult[] = [];
  try {
    for (const { name, main, cpu, peers: some, measure } of await workloadsFor(effort, loading, peers)) {
      for (const { child } of some) forgetMostResident(child.pid);
      const samples = await interleave(`files, ${name}`, some, effort, measure);
      const resident = new Map(some.map((peer) => [peer.name, mostResidentMiB(peer.child.pid)]));
      results.push({ name, main, cpu, rows: toRows(samples, REFERENCES.files, roleOf, resident) });
    }
  } finally {
    await stopPeers(peers);
  }
  if (Bun.which("cc") === null) missing.push("2 GiB to one reader (needs cc, for the reader)");
  const versions = await versionsOf(["nginx", "python3", "go", "cc", "wrk"]);
  return { versions, missing, workloads: results };
}
