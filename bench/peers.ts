/**
 * The peers: what they need, how they are compiled, configured, started and ended.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { folder, freePort, run, spawn, stop, versionOf, waitForAnswer } from "./measure.ts";
import type { Role } from "./results.ts";

/** How to start a peer. */
export interface PeerSpec {
  readonly name: string;
  readonly role: Role;
  /** The program that it needs: without it the peer is left out, by name. */
  readonly needs?: string;
  /** Its command line, after what there is to compile or to configure. */
  readonly argv: (port: number) => Promise<string[]> | string[];
  /** Its certificate signs itself. */
  readonly isTls?: boolean;
}

export interface Peer {
  readonly name: string;
  readonly role: Role;
  readonly origin: string;
  readonly child: Bun.Subprocess;
}

export const ROOT = join(import.meta.dir, "..");

/** A C compiler and Go compile a small program in seconds, Go its library too at the first time. */
const COMPILE_SECONDS_MAX = 180;

/** Compiles a C program of this folder. */
export async function compileC(name: string): Promise<string> {
  const program = join(folder, name);
  await run(["cc", "-O2", "-o", program, join(import.meta.dir, `${name}.c`)], { seconds: COMPILE_SECONDS_MAX });
  return program;
}

let goProgram: Promise<string> | undefined;

/** Compiles the Go peer, once. */
export function compileGo(): Promise<string> {
  const program = join(folder, "go-http");
  const argv = ["go", "build", "-o", program, "main.go"];
  goProgram ??= run(argv, { cwd: join(import.meta.dir, "peers/go-http"), seconds: COMPILE_SECONDS_MAX }).then(
    () => program,
  );
  return goProgram;
}

/** A certificate that signs itself, for the peers that speak TLS. */
export async function makeCertificate(): Promise<{ cert: string; key: string }> {
  const [cert, key] = [join(folder, "cert.pem"), join(folder, "key.pem")];
  const curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
  await run(["openssl", "req", "-x509", ...curve, "-subj", "/CN=localhost", "-keyout", key, "-out", cert]);
  return { cert, key };
}

/**
 * One nginx process, without a log unless `log` says where, as Debian configures it otherwise; `rules` go into its one
 * server, `listen` behind its address.
 */
export function nginxArgv(port: number, rules: string, { listen = "", log = "off" } = {}): string[] {
  const own = join(folder, `nginx-${port}`);
  const paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((name) => `${name}_temp_path ${own};`);
  writeFileSync(
    `${own}.conf`,
    `daemon off; master_process off; pid ${own}.pid; error_log /dev/null;
    events { worker_connections 8192; }
    http { access_log ${log}; tcp_nopush on; keepalive_requests 1000000000; ${paths.join(" ")} default_type text/plain;
      server { listen 127.0.0.1:${port}${listen}; ${rules} } }`,
  );
  return ["nginx", "-e", "/dev/null", "-c", `${own}.conf`];
}

/** Starts what this machine has of the peers, on one core, and checks what each answers. */
export async function startPeers(
  specs: readonly PeerSpec[],
  core: number,
  check: (name: string, origin: string) => Promise<void>,
): Promise<{ peers: Peer[]; missing: string[] }> {
  const peers: Peer[] = [];
  const missing: string[] = [];
  try {
    for (const { name, role, needs, argv, isTls } of specs) {
      if (needs !== undefined && Bun.which(needs) === null) {
        missing.push(name === needs ? name : `${name} (needs ${needs})`);
        continue;
      }
      const port = freePort();
      const origin = `${isTls ? "https" : "http"}://127.0.0.1:${port}`;
      const child = spawn(await argv(port), { core });
      peers.push({ name, role, origin, child });
      await waitForAnswer(child, name, `${origin}/small.txt`);
      await check(name, origin);
    }
  } catch (error) {
    await stopPeers(peers);
    throw error;
  }
  return { peers, missing };
}

export const stopPeers = (peers: readonly Peer[]) => Promise.all(peers.map(({ child }) => stop(child)));

const VERSION_ARGVS: Readonly<Record<string, readonly string[]>> = {
  nginx: ["nginx", "-v"],
  wrk: ["wrk", "-v"],
  curl: ["curl", "--version"],
  wget: ["wget", "--version"],
  node: ["node", "--version"],
  python3: ["python3", "--version"],
  go: ["go", "version"],
  cc: ["cc", "--version"],
};

/** The versions of those programs that this machine has, and of Bun. */
export async function versionsOf(programs: readonly string[]): Promise<Record<string, string>> {
  const versions: Record<string, string> = { bun: Bun.version };
  for (const program of programs) {
    const version = await versionOf(VERSION_ARGVS[program] ?? []);
    if (version !== undefined) versions[program] = version;
  }
  return versions;
}

/** Those without which a subject says nothing. @throws where one is missing */
export function requireTools(tools: readonly string[]): void {
  if (process.platform !== "linux") throw new Error("this reads /proc and pins processes to cores: it needs Linux");
  const missing = tools.filter((tool) => Bun.which(tool) === null);
  if (missing.length === 0) return;
  throw new Error(`missing: ${missing.join(", ")}. In Debian: apt-get install curl nginx-light util-linux wrk`);
}
