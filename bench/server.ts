/**
 * The server that answers with a text, beside its peers.
 */
import { join } from "node:path";
import { type Effort, interleave, type Load, measureLoad, twoCores } from "./measure.ts";
import {
  compileC,
  compileGo,
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

const WORKLOADS: Readonly<Record<string, Pick<Load, "mode" | "fields">>> = {
  plain: { mode: ["plain"] },
  "browser-sized": { mode: ["plain"], fields: BROWSER_FIELDS },
  "16 pipelined": { mode: ["pipelined", "16"] },
};

const PEERS: readonly PeerSpec[] = [
  { name: "floor", role: "floor", needs: "cc", argv: async (port) => [await compileC("floor"), String(port)] },
  {
    name: "server.ts",
    role: "ours",
    argv: (port) => [
      ...[process.execPath, join(ROOT, "server.ts"), "--log", "off"],
      ...["--host", "127.0.0.1", "--port", String(port)],
    ],
  },
  {
    name: "nginx",
    role: "peer",
    needs: "nginx",
    argv: (port) => nginxArgv(port, `location / { return 200 "${TEXT}"; }`),
  },
  {
    name: "Bun.serve",
    role: "peer",
    argv: (port) => [process.execPath, join(import.meta.dir, "peers/bun-serve.ts"), String(port)],
  },
  {
    name: "node:http",
    role: "peer",
    needs: "node",
    argv: (port) => ["node", join(import.meta.dir, "peers/node-http.mjs"), String(port)],
  },
  { name: "Go net/http", role: "peer", needs: "go", argv: async (port) => [await compileGo(), String(port)] },
];

async function check(name: string, origin: string): Promise<void> {
  const answer = await fetch(origin);
  const text = await answer.text();
  if (answer.status !== 200 || text !== TEXT) throw new Error(`${name} answers ${answer.status} and ${text}`);
}

export async function benchServer(effort: Effort): Promise<Measured> {
  requireTools(["taskset", "wrk", "nginx"]);
  const [serving, loading] = twoCores();
  const { peers, missing } = await startPeers(PEERS, serving, check);
  const roleOf = (name: string) => peers.find((peer) => peer.name === name)?.role ?? "peer";
  const workloads: WorkloadResult[] = [];
  try {
    for (const [name, load] of Object.entries(WORKLOADS)) {
      const samples = await interleave(`server, ${name}`, peers, effort, (peer) => {
        const url = `http://127.0.0.1:${peer.port}/`;
        const whole = { ...load, url, contentBytes: TEXT.length };
        return measureLoad(peer.name, peer.child.pid, whole, loading, effort.seconds);
      });
      const rows = toRows(samples, REFERENCES.server, roleOf);
      workloads.push({ name, main: "requests/s", cpu: "CPU a request", rows });
    }
  } finally {
    await stopPeers(peers);
  }
  const versions = await versionsOf(["nginx", "node", "go", "cc", "wrk"]);
  return { versions, missing, workloads };
}
