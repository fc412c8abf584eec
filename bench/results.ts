/**
 * What is kept of a run, in results.json: ratios to one reference peer, and no times, which would say more about the
 * machine than about the programs. RESULTS.md and results.svg are drawn from it.
 */
import { readFileSync, writeFileSync } from "node:fs";
import { availableParallelism, loadavg, release } from "node:os";
import { join } from "node:path";

/** What one measurement gave: of `main` more or less is better, as the workload says; of CPU less. */
export interface Sample {
  readonly main: number;
  /** User and system time of the process that is measured, for each request, run or GiB. */
  readonly cpu: number;
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const at = (index: number) => sorted[index] ?? Number.NaN;
  return (at((sorted.length - 1) >> 1) + at(sorted.length >> 1)) / 2;
}

export const SUBJECTS = ["server", "client", "files"] as const;
export type Subject = (typeof SUBJECTS)[number];

/** What a row is: ours, what the kernel alone would take, or somebody else's program. */
export type Role = "ours" | "floor" | "peer";

export interface Row {
  readonly peer: string;
  readonly role: Role;
  /** One for each round: what the peer did, divided by the median of the reference. */
  readonly main: readonly number[];
  readonly cpu: readonly number[];
  /** The most memory that it had resident while it was measured. */
  readonly residentMiB?: number;
}

export interface WorkloadResult {
  readonly name: string;
  /** What is divided: "requests/s", "time", … */
  readonly main: string;
  readonly cpu: string;
  readonly rows: readonly Row[];
}

export interface SubjectResult {
  readonly when: string;
  readonly command: string;
  readonly machine: string;
  readonly versions: Readonly<Record<string, string>>;
  /** Peers that this machine does not have, with the program that they need. */
  readonly missing: readonly string[];
  readonly workloads: readonly WorkloadResult[];
}

/** What a measurement finds out; the rest are its circumstances. */
export type Measured = Pick<SubjectResult, "versions" | "missing" | "workloads">;

export type Results = Partial<Record<Subject, SubjectResult>>;

/** To what everything of a subject is compared. */
export const REFERENCES = { server: "nginx", client: "curl", files: "nginx" } as const satisfies Record<
  Subject,
  string
>;

/** Where little time is the aim, less is better; otherwise more. */
export const isLessBetter = (subject: Subject) => subject === "client";

const rounded = (ratio: number) => Number(ratio.toPrecision(4));

/** The samples of a workload as ratios. */
export function toRows(
  samples: ReadonlyMap<string, readonly Sample[]>,
  reference: string,
  roleOf: (peer: string) => Role,
  residentMiB: ReadonlyMap<string, number> = new Map(),
): Row[] {
  const of = (peer: string, what: keyof Sample) => (samples.get(peer) ?? []).map((sample) => sample[what]);
  const [mainOne, cpuOne] = [median(of(reference, "main")), median(of(reference, "cpu"))];
  return [...samples.keys()].map((peer) => {
    const resident = residentMiB.get(peer);
    return {
      peer,
      role: roleOf(peer),
      main: of(peer, "main").map((value) => rounded(value / mainOne)),
      cpu: of(peer, "cpu").map((value) => rounded(value / cpuOne)),
      ...(resident !== undefined && { residentMiB: Math.round(resident) }),
    };
  });
}

/** What others did with the machine when we began: above some tenths, the figures are theirs too. */
const LOAD_BEFORE = loadavg()[0] ?? Number.NaN;

/** A run and its circumstances. */
export function describe(command: string, found: Measured): SubjectResult {
  return {
    when: new Date().toISOString().slice(0, 10),
    command,
    machine: `${availableParallelism()} cores (${process.arch}), Linux ${release().split("-")[0]}; load average before the run ${LOAD_BEFORE.toFixed(1)}`,
    ...found,
  };
}

const FILE = join(import.meta.dir, "results.json");

export function readResults(): Results {
  try {
    return JSON.parse(readFileSync(FILE, "utf8")) as Results; // written by this file
  } catch (error) {
    if ((error as { code?: string }).code === "ENOENT") return {}; // node:fs throws SystemErrors
    throw error;
  }
}

export function writeResults(results: Results): void {
  writeFileSync(FILE, `${JSON.stringify(results)}\n`);
}
