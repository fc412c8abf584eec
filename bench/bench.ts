/**
 * Measures the programs beside their peers, in one run: `bun run bench server`, `bun run bench client`.
 *
 * Rounds are interleaved (each peer once, then each again), so that what else the machine does falls on all of them;
 * of the rounds the median counts. The load generator has one core, the server the other. `--rounds N`,
 * `--seconds S` a measurement, `--write` puts the table into bench/README.md.
 */
import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { build } from "../.ci/build.ts";

interface Peer {
  readonly name: string;
  readonly port: number;
  readonly child: Bun.Subprocess;
}

interface Workload {
  readonly name: string;
  /** Arguments of wrk. */
  readonly load: readonly string[];
}

/** What one measurement gave. */
interface Sample {
  readonly requestsPerSecond: number;
  /** User and system time of the server process over the requests that it served. */
  readonly cpuMicroseconds: number;
}

const folder = mkdtempSync(join(tmpdir(), "http-over-tcp-bench-"));
const OURS = "server.ts";

/** What Chromium 156 sends, in the order in which it sends it. */
const BROWSER_FIELDS = [
  'sec-ch-ua: "Not:A-Brand";v="8", "Chromium";v="156"',
  "sec-ch-ua-mobile: ?0",
  'sec-ch-ua-platform: "Linux"',
  "Upgrade-Insecure-Requests: 1",
  "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/156.0.0.0 Safari/537.36",
  "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8",
  "Sec-Fetch-Site: none",
  "Sec-Fetch-Mode: navigate",
  "Sec-Fetch-User: ?1",
  "Sec-Fetch-Dest: document",
  "Accept-Encoding: gzip, deflate, br, zstd",
  "Accept-Language: en-US,en;q=0.9",
];

/** wrk sends what this returns: sixteen requests at once. */
const PIPELINE = `
init = function(args)
  local requests = {}
  for i = 1, 16 do requests[i] = wrk.format() end
  pipelined = table.concat(requests)
end
request = function() return pipelined end`;

function workloads(): Workload[] {
  const script = join(folder, "pipeline.lua");
  writeFileSync(script, PIPELINE);
  return [
    { name: "plain", load: [] },
    { name: "browser-sized", load: BROWSER_FIELDS.flatMap((field) => ["-H", field]) },
    { name: "16 pipelined", load: ["-s", script] },
  ];
}

/** A port that is free just now. */
function freePort(): number {
  const listener = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
  const { port } = listener;
  listener.stop(true);
  return port;
}

/** Starts a peer on the first core and waits until it answers. */
async function startPeer(name: string, argv: (port: number) => string[]): Promise<Peer | undefined> {
  const port = freePort();
  const [program = "", ...args] = argv(port);
  if (Bun.which(program) === null) return undefined;
  const child = Bun.spawn(["taskset", "-c", "0", program, ...args], {
    stdin: "ignore",
    stdout: "ignore",
    stderr: "ignore",
  });
  for (let attempt = 0; attempt < 100; attempt++) {
    const answer = await fetch(`http://127.0.0.1:${port}/`).catch(() => undefined);
    if (answer !== undefined && (await answer.text()) === "Hello, World!") return { name, port, child };
    await Bun.sleep(50);
  }
  child.kill();
  throw new Error(`${name} does not answer`);
}

function nginxConfiguration(port: number, location = 'location / { return 200 "Hello, World!"; }'): string {
  const file = join(folder, "nginx.conf");
  const paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((name) => `${name}_temp_path ${folder};`);
  writeFileSync(
    file,
    `daemon off; master_process off; pid ${folder}/pid; error_log /dev/null;
    events { worker_connections 1024; }
    http { access_log off; keepalive_requests 1000000000; ${paths.join(" ")} default_type text/plain;
      server { listen 127.0.0.1:${port}; ${location} } }`,
  );
  return file;
}

async function startPeers(): Promise<{ peers: Peer[]; missing: string[] }> {
  const root = join(import.meta.dir, "..");
  const floor = join(folder, "floor");
  Bun.spawnSync(["cc", "-O2", "-o", floor, join(import.meta.dir, "floor.c")]);
  const commands: Record<string, (port: number) => string[]> = {
    floor: (port) => [floor, String(port)],
    [OURS]: (port) => [
      process.execPath,
      join(root, "server.ts"),
      "--host",
      "127.0.0.1",
      "--port",
      String(port),
      "--log",
      "off",
    ],
    nginx: (port) => ["nginx", "-c", nginxConfiguration(port)],
    "Bun.serve": (port) => [process.execPath, join(import.meta.dir, "peers/bun-serve.ts"), String(port)],
    "node:http": (port) => ["node", join(import.meta.dir, "peers/node-http.mjs"), String(port)],
  };
  const peers: Peer[] = [];
  const missing: string[] = [];
  for (const [name, argv] of Object.entries(commands)) {
    const peer = await startPeer(name, argv);
    if (peer === undefined) missing.push(name);
    else peers.push(peer);
  }
  return { peers, missing };
}

/** User and system time of a process so far, in microseconds: /proc counts it in ticks of 10 ms. */
function cpuMicroseconds(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ")[1]?.split(" ") ?? [];
  return (Number(fields[11]) + Number(fields[12])) * 10_000;
}

async function measure(peer: Peer, { load }: Workload, seconds: number): Promise<Sample> {
  const before = cpuMicroseconds(peer.child.pid);
  const argv = ["taskset", "-c", "1", "wrk", "-t1", "-c32", `-d${seconds}`, ...load, `http://127.0.0.1:${peer.port}/`];
  const output = await new Response(Bun.spawn(argv).stdout).text();
  const cpu = cpuMicroseconds(peer.child.pid) - before;
  const [, requests, time] = /(\d+) requests in ([\d.]+)s/.exec(output) ?? [];
  if (requests === undefined || /Non-2xx|Socket errors/.test(output)) throw new Error(`${peer.name}: ${output}`);
  return { requestsPerSecond: Number(requests) / Number(time), cpuMicroseconds: cpu / Number(requests) };
}

const median = (values: number[]) => values.toSorted((a, b) => a - b)[values.length >> 1] ?? Number.NaN;

/** The spread of the values around their median, in percent. */
const spread = (values: number[]) =>
  Math.round((100 * (Math.max(...values) - Math.min(...values))) / median(values) / 2);

async function benchServer(rounds: number, seconds: number): Promise<string> {
  const { peers, missing } = await startPeers();
  const table = [
    "| workload | peer | requests/s ÷ floor | CPU a request ÷ floor | CPU a request ÷ nginx | spread |",
    "| --- | --- | ---: | ---: | ---: | ---: |",
  ];
  try {
    for (const workload of workloads()) {
      const samples = new Map<string, Sample[]>(peers.map(({ name }) => [name, []]));
      for (const peer of peers) await measure(peer, workload, 1); // warms up; does not count
      for (let round = 0; round < rounds; round++)
        for (const peer of peers) samples.get(peer.name)?.push(await measure(peer, workload, seconds));
      const rate = (name: string) => median((samples.get(name) ?? []).map((sample) => sample.requestsPerSecond));
      const cpu = (name: string) => median((samples.get(name) ?? []).map((sample) => sample.cpuMicroseconds));
      for (const { name } of peers) {
        const ratios = [rate(name) / rate("floor"), cpu(name) / cpu("floor"), cpu(name) / cpu("nginx")];
        const percent = spread((samples.get(name) ?? []).map((sample) => sample.cpuMicroseconds));
        table.push(
          `| ${workload.name} | ${name} | ${ratios.map((ratio) => ratio.toFixed(2)).join(" | ")} | ±${percent} % |`,
        );
      }
    }
  } finally {
    for (const { child } of peers) child.kill();
    await Promise.all(peers.map(({ child }) => child.exited));
  }
  if (missing.length > 0) table.push("", `Missing on this machine: ${missing.join(", ")}.`);
  return table.join("\n");
}

// ── the client ──

const LARGE = 2 ** 31;

/** The seconds that a command takes. */
async function time(argv: string[], stdout: Bun.BunFile): Promise<number> {
  const start = performance.now();
  const child = Bun.spawn(argv, { stdin: "ignore", stdout, stderr: "ignore" });
  const exitCode = await child.exited;
  if (exitCode !== 0) throw new Error(`${argv.join(" ")}: exit ${exitCode}`);
  return (performance.now() - start) / 1000;
}

/** The clients, each with its command line for a target and, where it takes one, a file to save to. */
async function makeClients(port: number): Promise<Record<string, (target: string, file?: string) => string[]>> {
  const floor = join(folder, "floor-client");
  Bun.spawnSync(["cc", "-O2", "-o", floor, join(import.meta.dir, "floor-client.c")]);
  await build(folder);
  const url = (target: string) => `http://127.0.0.1:${port}${target}`;
  return {
    floor: (target) => [floor, String(port), target],
    "client-robust": (target, file = "-") => [join(folder, "client-robust"), "-o", file, url(target)],
    curl: (target, file = "-") => ["curl", "-s", "-o", file, url(target)],
  };
}

/** Where the content goes: the command line becomes one that puts it there. */
const SINKS: Readonly<Record<string, (argv: (file?: string) => string[], file: string) => [string[], Bun.BunFile]>> = {
  "2 GiB to /dev/null": (argv) => [argv(), Bun.file("/dev/null")],
  "2 GiB through a pipe": (argv) => [["sh", "-c", '"$@" | cat', "sh", ...argv()], Bun.file("/dev/null")],
  "2 GiB to a file": (argv, file) => [argv(file), Bun.file(file)],
  "13 bytes, start to exit": (argv) => [argv(), Bun.file("/dev/null")],
};

async function benchClient(rounds: number): Promise<string> {
  const port = freePort();
  const file = join(folder, "downloaded");
  writeFileSync(join(folder, "small"), "Hello, World!");
  writeFileSync(join(folder, "large"), "");
  truncateSync(join(folder, "large"), LARGE); // sparse: takes no room on the disk
  const nginx = Bun.spawn(["nginx", "-c", nginxConfiguration(port, `root ${folder}; sendfile on;`)], {
    stderr: "ignore",
  });
  const clients = await makeClients(port);
  const table = ["| download | client | time ÷ floor | time ÷ curl | spread |", "| --- | --- | ---: | ---: | ---: |"];
  try {
    for (const [name, sink] of Object.entries(SINKS)) {
      const isSmall = name.startsWith("13");
      const samples = new Map<string, number[]>(Object.keys(clients).map((client) => [client, []]));
      for (let round = 0; round < (isSmall ? 20 * rounds : rounds); round++)
        for (const [client, argvFor] of Object.entries(clients)) {
          rmSync(file, { force: true });
          const argv = (path?: string) => argvFor(isSmall ? "/small" : "/large", path);
          // The floor knows only stdout; the others open the file themselves.
          const [command, stdout] = client === "floor" ? sink(() => argv(), file) : sink(argv, file);
          samples.get(client)?.push(await time(command, client === "floor" ? stdout : Bun.file("/dev/null")));
        }
      const seconds = (client: string) => median(samples.get(client) ?? []);
      for (const [client, all] of samples) {
        const ratios = [seconds(client) / seconds("floor"), seconds(client) / seconds("curl")].map((ratio) =>
          ratio.toFixed(2),
        );
        table.push(`| ${name} | ${client} | ${ratios.join(" | ")} | ±${spread(all)} % |`);
      }
    }
  } finally {
    nginx.kill();
    await nginx.exited;
  }
  return table.join("\n");
}

async function main(): Promise<void> {
  const string = { type: "string" } as const;
  const options = { rounds: string, seconds: string, write: { type: "boolean" } } as const;
  const { values, positionals } = parseArgs({ options, allowPositionals: true });
  const [subject = ""] = positionals;
  if (subject !== "server" && subject !== "client") throw new Error("what is there to measure: server, client");
  const rounds = Number(values.rounds ?? 5);
  const table =
    subject === "server" ? await benchServer(rounds, Number(values.seconds ?? 2)) : await benchClient(rounds);
  console.log(table);
  if (!values.write) return;
  const file = join(import.meta.dir, "README.md");
  const text = readFileSync(file, "utf8");
  const place = new RegExp(`(<!-- ${subject} -->\\n)[^]*(<!-- end ${subject} -->)`);
  writeFileSync(file, text.replace(place, `$1\n${table}\n\n$2`));
}

if (import.meta.main)
  try {
    await main();
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
