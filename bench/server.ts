/**
 * The server that answers with a text, beside its peers.
 */
import { join, resolve } from "node:path";
import { type Effort, interleave, type Load, measureLoad, twoCores } from "./measure.ts";
import {
  compileC,
  compileGo,
  makeCertificate,
  nginxArgv,
  type PeerSpec,
  requireTools,
  ROOT,
  startPeers,
  stopPeers,
  versionsOf,
} from "./peers.ts";
import { REFERENCES, type Measured, toRows, type WorkloadResult } from "./results.ts";

const TEXT = "Hello, World!";

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

type Workload = Pick<Load, "mode" | "fields" | "connections"> & {
  /** Peers left out: the floor parses nothing, and Bun.serve does not say when it closes, which wrk takes for an error. */
  readonly without?: readonly string[];
  /** At least so long: thousands of connections take a second to be made. */
  readonly seconds?: number;
};

const CLOSING = ["Connection: close"];
const PLAIN: Readonly<Record<string, Workload>> = {
  plain: { mode: ["plain"] },
  "browser-sized": { mode: ["plain"], fields: BROWSER_FIELDS },
  "16 pipelined": { mode: ["pipelined", "16"] },
  "a connection a request": { mode: ["plain"], fields: CLOSING, without: ["floor", "Bun.serve"] },
  "POST of 1 KiB": { mode: ["post", "1024"] },
  "5,000 connections": { mode: ["plain"], connections: 5000, seconds: 4 },
};

/** The program, or another version of it. */
const ours = (name: string, path: string, flags: () => Promise<string[]> | string[], isTls = false): PeerSpec => ({
  ...{ name, isTls, role: name === "server.ts" ? "ours" : "peer" },
  argv: async (port) => [process.execPath, path, ...(await flags()), "--host", "127.0.0.1", "--port", String(port)],
});
const NGINX_ANSWER = `location / { return 200 "${TEXT}"; }`;

/** Workloads and the peers for them; `versions` are ours, by name. */
function groupsOf(versions: ReadonlyMap<string, string>) {
  const all = (flags: () => Promise<string[]> | string[], isTls = false) =>
    [...versions].map(([name, path]) => ours(name, path, flags, isTls));
  let certificate: ReturnType<typeof makeCertificate> | undefined;
  const certified = () => (certificate ??= makeCertificate());
  const bunServe = join(import.meta.dir, "peers/bun-serve.ts");
  const plain: PeerSpec[] = [
    { name: "floor", role: "floor", needs: "cc", argv: async (port) => [await compileC("floor"), String(port)] },
    ...all(() => ["--log", "off"]),
    { name: "nginx", role: "peer", needs: "nginx", argv: (port) => nginxArgv(port, NGINX_ANSWER) },
    { name: "Bun.serve", role: "peer", argv: (port) => [process.execPath, bunServe, String(port)] },
    {
      name: "node:http",
      role: "peer",
      needs: "node",
      argv: (port) => ["node", join(import.meta.dir, "peers/node-http.mjs"), String(port)],
    },
    { name: "Go net/http", role: "peer", needs: "go", argv: async (port) => [await compileGo(), String(port)] },
  ];
  const tls: PeerSpec[] = [
    ...all(async () => {
      const { cert, key } = await certified();
      return ["--log", "off", "--tls-cert", cert, "--tls-key", key];
    }, true),
    {
      ...{ name: "nginx", role: "peer", needs: "nginx", isTls: true },
      async argv(port) {
        const { cert, key } = await certified();
        const rules = `ssl_certificate ${cert}; ssl_certificate_key ${key}; ${NGINX_ANSWER}`;
        return nginxArgv(port, rules, { listen: " ssl" });
      },
    },
  ];
  const logged: PeerSpec[] = [
    ...all(() => ["--log", "access"]),
    {
      name: "nginx",
      role: "peer",
      needs: "nginx",
      argv: (port) => nginxArgv(port, NGINX_ANSWER, { log: "/dev/null" }),
    },
  ];
  return [
    { workloads: PLAIN, specs: plain },
    { workloads: { TLS: { mode: ["plain"] } }, specs: tls },
    { workloads: { "--log access": { mode: ["plain"], fields: BROWSER_FIELDS } }, specs: logged },
  ] satisfies { workloads: Readonly<Record<string, Workload>>; specs: PeerSpec[] }[];
}

async function check(name: string, origin: string): Promise<void> {
  const answer = await fetch(origin, { tls: { rejectUnauthorized: false } });
  const text = await answer.text();
  if (answer.status !== 200 || text !== TEXT) throw new Error(`${name} answers ${answer.status} and ${text}`);
}

/** @param beside another version of server.ts, measured in the same run */
export async function benchServer(effort: Effort, beside?: string): Promise<Measured> {
  requireTools(["taskset", "wrk", "nginx", "openssl"]);
  const [serving, loading] = twoCores();
  const versions = new Map([["server.ts", join(ROOT, "server.ts")]]);
  if (beside !== undefined) versions.set("server.ts beside", resolve(beside));
  const workloads: WorkloadResult[] = [];
  const missing = new Set<string>();
  for (const group of groupsOf(versions)) {
    const started = await startPeers(group.specs, serving, check);
    for (const name of started.missing) missing.add(name);
    const roleOf = (name: string) => started.peers.find((peer) => peer.name === name)?.role ?? "peer";
    try {
      for (const [name, { without = [], seconds = 0, ...load }] of Object.entries<Workload>(group.workloads)) {
        const peers = started.peers.filter((peer) => !without.includes(peer.name));
        const samples = await interleave(`server, ${name}`, peers, effort, (peer) => {
          const whole = { ...load, url: `${peer.origin}/`, contentBytes: TEXT.length };
          return measureLoad(peer.name, peer.child.pid, whole, loading, Math.max(seconds, effort.seconds));
        });
        workloads.push({
          ...{ name, main: "requests/s", cpu: "CPU a request" },
          rows: toRows(samples, REFERENCES.server, roleOf),
        });
      }
    } finally {
      await stopPeers(started.peers);
    }
  }
  const tools = await versionsOf(["nginx", "node", "go", "cc", "wrk"]);
  return { versions: tools, missing: [...missing], workloads };
}
